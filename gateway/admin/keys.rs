//! Keys over the admin port: made and told once, written into the policy's file of keys, listed, taken out.

use std::path::PathBuf;
use std::time::SystemTime;

use http::header::CACHE_CONTROL;
use http::{HeaderValue, StatusCode};
use hyper::body::Body;
use infergate_plugins::authenticator::keys::{Entry, Fresh};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{Admin, Answer, BoxError, collected, json_answer};
use crate::audit::journal::By;
use crate::policy::problem::nearest;
use crate::policy::reload::{Reloaded, reload};
use crate::policy::{Policy, key_file};
use crate::secret::Secret;
use crate::time;

/// What a new key is to be.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Wanted {
    tenant: String,
    #[serde(default)]
    name: Option<String>,
    /// `90d`, or a time.
    #[serde(default)]
    expires_in: Option<String>,
}

/// Why something cannot be done.
struct Refused(StatusCode, String);

impl From<String> for Refused {
    fn from(message: String) -> Self {
        Self(StatusCode::INTERNAL_SERVER_ERROR, message)
    }
}

impl Refused {
    fn answer(self) -> Answer {
        json_answer(self.0, &json!({"error": self.1}))
    }
}

fn bad(message: impl Into<String>) -> Refused {
    Refused(StatusCode::BAD_REQUEST, message.into())
}

fn conflict(message: impl Into<String>) -> Refused {
    Refused(StatusCode::CONFLICT, message.into())
}

impl Admin {
    /// Every key of the policy in force, without anything that could be used.
    pub(super) fn keys(&self) -> Answer {
        let policy = self.house.policy.get();
        let now = SystemTime::now();
        let keys: Vec<Value> = policy.own_keys.iter().flat_map(|own| &own.list).map(|key| key.shown(now)).collect();
        json_answer(StatusCode::OK, &json!({"keys": keys}))
    }

    /// Makes a key and tells it, which happens once.
    pub(super) async fn create_key<B: Body<Error: Into<BoxError>>>(&self, body: B, by: By) -> Answer {
        let body = match collected(body).await {
            Ok(body) => body,
            Err(error) => return bad(error).answer(),
        };
        let policy = self.house.policy.get();
        let made = Wanted::read(&body, &policy).and_then(|wanted| {
            let (path, pepper) = key_file_of(&policy)?;
            Ok((wanted.make(&pepper)?, path))
        });
        let ((fresh, entry), path) = match made {
            Ok(made) => made,
            Err(refused) => return refused.answer(),
        };
        let added = entry.clone();
        let written = changed(path, move |entries| {
            if entries.iter().any(|other| other.prefix == added.prefix) {
                return Err(conflict("by chance another key begins like this one: ask again"));
            }
            entries.push(added);
            Ok(())
        });
        if let Err(refused) = written.await {
            return refused.answer();
        }
        let told =
            json!({"name": entry.name, "prefix": entry.prefix, "tenant": entry.tenant, "expires": entry.expires});
        self.house.act("key_create", by.clone(), told.clone());
        let mut answer = self.in_force(StatusCode::CREATED, told, by);
        answer.1["key"] = json!(fresh.key().reveal());
        let mut answer = json_answer(answer.0, &answer.1);
        answer.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        answer
    }

    /// Takes out the key with this prefix, or all of this name.
    pub(super) async fn delete_key(&self, wanted: &str, by: By) -> Answer {
        let policy = self.house.policy.get();
        let Some(wanted) = decoded(wanted) else { return bad("the name is not percent-encoded text").answer() };
        let path = match key_file_of(&policy) {
            Ok((path, _)) => path,
            Err(refused) => return refused.answer(),
        };
        let name = wanted.clone();
        let taken = changed(path, move |entries| {
            let is_it = |entry: &Entry| entry.prefix == name || entry.name.as_deref() == Some(&name);
            let taken: Vec<String> = entries.extract_if(.., |entry| is_it(entry)).map(|entry| entry.prefix).collect();
            if taken.is_empty() { Err(not_in_file(&policy, &name)) } else { Ok(taken) }
        });
        match taken.await {
            Ok(prefixes) => {
                let told = json!({"key": wanted, "prefixes": prefixes});
                self.house.act("key_delete", by.clone(), told.clone());
                let (status, told) = self.in_force(StatusCode::OK, told, by);
                json_answer(status, &told)
            }
            Err(refused) => refused.answer(),
        }
    }

    /// Puts what was written in force at once, and says whether it is.
    fn in_force(&self, status: StatusCode, mut told: Value, by: By) -> (StatusCode, Value) {
        let Some(path) = &self.policy else { return (status, told) };
        match reload(&self.house, path, by) {
            Ok(Reloaded::Swapped(..) | Reloaded::Unchanged) => {
                told["in_force"] = json!(true);
                (status, told)
            }
            Err(problems) => {
                told["in_force"] = json!(false);
                told["problems"] = json!(problems.lines(&path.display().to_string()));
                (StatusCode::ACCEPTED, told)
            }
        }
    }
}

/// Where keys are written to, and what they are hashed with.
fn key_file_of(policy: &Policy) -> Result<(PathBuf, Secret), Refused> {
    let own = policy.own_keys.as_ref();
    let own =
        own.ok_or_else(|| conflict("the policy has no `keys` under `authenticators`: add them, with a `file`"))?;
    let path = own.file.clone();
    let path = path.ok_or_else(|| conflict("the policy names no file of keys: add `file: keys.yaml` to its `keys`"))?;
    Ok((path, own.pepper.clone()))
}

async fn changed<T: Send + 'static>(
    path: PathBuf,
    change: impl FnOnce(&mut Vec<Entry>) -> Result<T, Refused> + Send + 'static,
) -> Result<T, Refused> {
    let done = tokio::task::spawn_blocking(move || key_file::change(&path, change)).await;
    done.unwrap_or_else(|error| Err(Refused::from(error.to_string())))
}

fn not_in_file(policy: &Policy, wanted: &str) -> Refused {
    let list = policy.own_keys.iter().flat_map(|own| &own.list);
    match list.filter(|key| !key.filed).any(|key| key.prefix == wanted || key.name.as_deref() == Some(wanted)) {
        true => conflict("this key stands in the policy itself: take its entry out there"),
        false => Refused(StatusCode::NOT_FOUND, "no key has this name or prefix: GET /admin/v1/keys lists them".into()),
    }
}

impl Wanted {
    fn read(body: &[u8], policy: &Policy) -> Result<Self, Refused> {
        let wanted: Self = serde_json::from_slice(body).map_err(|error| {
            bad(format!("the body is {{\"tenant\": \"T\", \"name\": \"N\", \"expires_in\": \"90d\"}}: {error}"))
        })?;
        let is_name = |name: &String| (1..=128).contains(&name.chars().count()) && !name.chars().any(char::is_control);
        if !wanted.name.as_ref().is_none_or(is_name) {
            return Err(bad("a name has 1 to 128 characters that can be seen"));
        }
        if !policy.tenants.contains_key(wanted.tenant.as_str()) {
            let hint = nearest(&wanted.tenant, policy.tenants.keys().map(|name| &**name));
            let tenant: String = wanted.tenant.chars().take(128).collect();
            return Err(bad(format!("no tenant is named {tenant}{hint}")));
        }
        Ok(wanted)
    }

    fn make(self, pepper: &Secret) -> Result<(Fresh, Entry), Refused> {
        let expires = self
            .expires_in
            .map(|when| time::end(&when, SystemTime::now()).map_err(|told| bad(format!("expires_in: {told}"))));
        let fresh =
            Fresh::make(|bytes| aws_lc_rs::rand::fill(bytes).map_err(|_| "the system gives no chance".to_owned()))?;
        let (prefix, hash) = (fresh.prefix().to_owned(), fresh.hash(pepper));
        let entry = Entry { name: self.name, tenant: self.tenant, prefix, hash, expires: expires.transpose()? };
        Ok((fresh, entry))
    }
}

/// Text with its percent-encoding taken off.
fn decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((byte, more)) = rest.split_first() {
        rest = more;
        if *byte != b'%' {
            bytes.push(*byte);
            continue;
        }
        let (digits, more) = rest.split_at_checked(2)?;
        let digits =
            std::str::from_utf8(digits).ok().filter(|digits| digits.bytes().all(|digit| digit.is_ascii_hexdigit()))?;
        bytes.push(u8::from_str_radix(digits, 16).ok()?);
        rest = more;
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percent_encoding_is_taken_off_or_is_none() {
        for (text, plain) in [
            ("ci", Some("ci")),
            ("a%20b%2Fc%C3%A4", Some("a b/c\u{e4}")),
            ("%", None),
            ("%2", None),
            ("%+f", None),
            ("%ff", None),
        ] {
            assert_eq!(decoded(text).as_deref(), plain, "{text}");
        }
    }
}
