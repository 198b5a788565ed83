//! Who may do what on the operators' port.

use std::sync::Arc;
use std::time::SystemTime;

use http::HeaderMap;
use infergate_plugins::authenticator::keys::{Ring, expiry, mark};
use infergate_plugins::authenticator::{Credentials, Fault};

use crate::policy::time;
use crate::secret::{self, Secret};
use crate::settings::{Admin, AdminKey, Role};

/// The keys of operators. Without any, whoever reaches the port may do everything.
#[derive(Debug, Default)]
pub struct Access {
    ring: Option<Ring<Operator>>,
    closed_metrics: bool,
}

/// Somebody who operates the gateway.
#[derive(Clone, Debug)]
pub struct Operator {
    /// Their name, for the journal.
    pub name: Arc<str>,
    role: Role,
}

/// Why somebody is not let in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Denied {
    /// Nobody knows them.
    Unknown,
    /// They may not do this: who, and the role that it takes.
    Lesser(Arc<str>, Role),
}

/// What it takes to be let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// Nothing.
    Nothing,
    /// The settings say: nothing, or a viewer.
    Metrics,
    /// A role.
    Role(Role),
}

impl Access {
    /// The access that the settings give.
    pub fn new(admin: &Admin, env: &dyn Fn(&str) -> Option<String>) -> Result<Self, String> {
        let Some(source) = admin.pepper.as_ref().filter(|_| !admin.keys.is_empty()) else { return Ok(Self::default()) };
        let pepper = secret::read(source, env).and_then(|pepper| secret::check_pepper(&pepper).map(|()| pepper));
        let pepper = pepper.map_err(|error| format!("settings: admin.pepper: {error}"))?;
        let told = |wrong: Vec<(String, String)>| {
            wrong.iter().map(|(path, message)| format!("settings: {path}: {message}")).collect::<Vec<_>>().join("\n")
        };
        let ring = ring(&admin.keys, &pepper).map_err(told)?;
        Ok(Self { ring: Some(ring), closed_metrics: !admin.open_metrics })
    }

    /// Lets somebody in, or not; who they are, where anybody is known.
    pub fn admit(&self, need: Need, headers: &HeaderMap, now: SystemTime) -> Result<Option<Operator>, Denied> {
        let Some(ring) = &self.ring else { return Ok(None) };
        let role = match need {
            Need::Nothing => return Ok(None),
            Need::Metrics if !self.closed_metrics => return Ok(None),
            Need::Metrics => Role::Viewer,
            Need::Role(role) => role,
        };
        let found: Result<Option<&Operator>, Fault> = ring.find(&Credentials::of(headers), now);
        match found {
            Ok(Some(operator)) if operator.role >= role => Ok(Some(operator.clone())),
            Ok(Some(operator)) => Err(Denied::Lesser(operator.name.clone(), role)),
            Ok(None) | Err(_) => Err(Denied::Unknown),
        }
    }
}

/// The keys by their hash, or all that is wrong with them, each thing at its place in the settings.
pub fn ring(keys: &[AdminKey], pepper: &Secret) -> Result<Ring<Operator>, Vec<(String, String)>> {
    let (mut ring, mut wrong) = (Ring::new(pepper), Vec::new());
    for (index, key) in keys.iter().enumerate() {
        if let Err((member, message)) = add(&mut ring, key) {
            wrong.push((format!("admin.keys[{index}].{member}"), message));
        }
    }
    if wrong.is_empty() { Ok(ring) } else { Err(wrong) }
}

fn add(ring: &mut Ring<Operator>, key: &AdminKey) -> Result<(), (&'static str, String)> {
    let hash = mark(&key.hash).ok_or_else(|| ("hash", "this is not 64 hexadecimal digits".to_owned()))?;
    let expires = expiry(key.expires.as_deref(), time).map_err(|error| ("expires", error))?;
    let operator = Operator { name: key.name.as_str().into(), role: key.role };
    ring.add(hash, operator.name.clone(), expires, operator).map_err(|error| ("hash", error))
}

#[cfg(test)]
mod tests {
    use infergate_plugins::authenticator::keys::Fresh;

    use super::*;
    use crate::settings::Settings;

    const PEPPER: &str = "a pepper of thirty-two characters";

    fn fresh() -> Fresh {
        Fresh::make(|bytes| {
            bytes.iter_mut().for_each(|byte| *byte = fastrand::u8(..));
            Ok(())
        })
        .unwrap()
    }

    fn key(fresh: &Fresh, name: &str, role: Role) -> AdminKey {
        let hash = fresh.hash(&Secret::new(PEPPER));
        AdminKey { name: name.to_owned(), role, prefix: fresh.prefix().to_owned(), hash, expires: None }
    }

    fn headers(key: &str) -> HeaderMap {
        [(http::header::AUTHORIZATION, format!("Bearer {key}").parse().unwrap())].into_iter().collect()
    }

    #[test]
    fn each_role_may_do_what_those_before_it_may() {
        let keys = [Role::Viewer, Role::Operator, Role::Owner].map(|role| (fresh(), role));
        let entries = keys.iter().map(|(fresh, role)| key(fresh, &format!("{role:?}"), *role)).collect();
        let source = serde_json::from_str(r#"{"env":"P"}"#).unwrap();
        let mut admin = Admin { keys: entries, pepper: Some(source), ..Admin::default() };
        let env = |_: &str| Some(PEPPER.to_owned());
        let access = Access::new(&admin, &env).unwrap();
        for (fresh, role) in &keys {
            for need in [Role::Viewer, Role::Operator, Role::Owner] {
                let admitted = access.admit(Need::Role(need), &headers(fresh.key().reveal()), SystemTime::now());
                assert_eq!(admitted.is_ok(), *role >= need, "{role:?} for {need:?}");
            }
        }
        let nobody = HeaderMap::new();
        let ask = |access: &Access, need| access.admit(need, &nobody, SystemTime::now()).is_ok();
        assert!(ask(&access, Need::Nothing) && ask(&access, Need::Metrics) && !ask(&access, Need::Role(Role::Viewer)));
        admin.open_metrics = false;
        let closed = Access::new(&admin, &env).unwrap();
        assert!(ask(&closed, Need::Nothing) && !ask(&closed, Need::Metrics));
        assert!(Access::new(&admin, &|_| Some("short".to_owned())).unwrap_err().contains("openssl rand"));
        assert!(ask(&Access::default(), Need::Role(Role::Owner)), "without keys the port is open");
    }

    #[test]
    fn wrong_keys_are_told_at_their_lines() {
        let hash = "0".repeat(64);
        let text = format!(
            "admin:\n  keys:\n    - {{name: a, role: viewer, prefix: ig_aaaaaa, hash: '{hash}'}}\n    - {{name: b, role: owner, prefix: ig_bbbbbb, hash: '{hash}'}}\n    - {{name: c, role: owner, prefix: ig_cccccc, hash: 'x'}}\n"
        );
        let told = Settings::parse(&text).unwrap_err().lines("settings.yaml");
        assert_eq!(told.len(), 3, "{told:#?}");
        assert!(told[0].contains("`pepper` is missing"));
        assert!(told[1].starts_with("settings.yaml:4:") && told[1].contains("another entry too, a"), "{}", told[1]);
        assert!(told[2].starts_with("settings.yaml:5:") && told[2].contains("64 hexadecimal digits"), "{}", told[2]);
    }
}
