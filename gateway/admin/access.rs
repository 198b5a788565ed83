//! Who may do what on the operators' port.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::SystemTime;

use http::header::HOST;
use http::uri::Authority;
use http::{HeaderMap, Request};
use infergate_plugins::authenticator::keys::{Ring, expiry, mark};
use infergate_plugins::authenticator::{Credentials, Fault};

use crate::secret::{self, Secret};
use crate::settings::{Admin, AdminKey, Role};
use crate::time;

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

    /// Whether nobody has to show a key.
    pub fn is_open(&self) -> bool {
        self.ring.is_none()
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

/// Whether a request names us by a name that strangers could have pointed here. A page in an operator's browser can read
/// what its own host answers, and its owner decides what address that host has; but not that of an IP address, nor of a
/// name without a dot, which nobody can register: `localhost`, or a service beside us, such as `infergate`.
pub fn by_a_strangers_name<B>(request: &Request<B>) -> bool {
    let named = request.headers().get_all(HOST).iter().map(|host| Authority::try_from(host.as_bytes()).ok());
    let asked = request.uri().authority().cloned().map(Some);
    asked.into_iter().chain(named).any(|authority| authority.is_none_or(|authority| !is_ours(authority.host())))
}

fn is_ours(host: &str) -> bool {
    let bracketed = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
    bracketed.is_some_and(|host| host.parse::<Ipv6Addr>().is_ok())
        || host.parse::<Ipv4Addr>().is_ok()
        || !host.contains(['.', '[', ':'])
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
    let expires = expiry(key.expires.as_deref(), time::parse).map_err(|error| ("expires", error))?;
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
    fn a_name_that_a_stranger_could_have_pointed_here_is_told_from_an_address() {
        let strange = |uri: &str, hosts: &[&str]| {
            let request = Request::builder().uri(uri);
            let request = hosts.iter().fold(request, |request, host| request.header(HOST, *host));
            by_a_strangers_name(&request.body(()).unwrap())
        };
        assert!(!strange("/metrics", &[]), "HTTP/1.0");
        for host in ["127.0.0.1:9090", "10.1.2.3", "[::1]:9090", "localhost", "localhost:9090", "infergate:9090"] {
            assert!(!strange("/metrics", &[host]), "{host}");
            assert!(!strange(&format!("http://{host}/metrics"), &[]), "{host}");
        }
        for host in ["rebound.example:9090", "rebound.example", "a.b.", "127.0.0.1.example", "127.1", "[::1", "", "a b"]
        {
            assert!(strange("/metrics", &[host]), "{host}");
        }
        assert!(strange("http://rebound.example/metrics", &["localhost"]));
        assert!(strange("/metrics", &["localhost", "rebound.example"]));
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
