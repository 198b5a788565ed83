//! Authenticators: who asks. They are asked in order, and the first answer wins.
//! # A whole plugin
//!
//! Tickets: `ticket-NAME-END`, good until the second END. (A real one checks a signature before it believes a word.)
//!
//! ```
//! use std::sync::Arc;
//! use std::time::{Duration, SystemTime};
//!
//! use http::{HeaderMap, HeaderValue};
//! use infergate_plugins::authenticator::{Answer, Authenticator, Credentials, Fault, Identity, Mark};
//!
//! #[derive(Debug)]
//! struct Tickets {
//!     tenant: Arc<str>,
//! }
//!
//! impl Tickets {
//!     /// Whose ticket this is, and when it ends.
//!     fn read(ticket: &[u8]) -> Option<(&str, SystemTime)> {
//!         let (name, end) = std::str::from_utf8(ticket).ok()?.strip_prefix("ticket-")?.rsplit_once('-')?;
//!         Some((name, SystemTime::UNIX_EPOCH + Duration::from_secs(end.parse::<u32>().ok()?.into())))
//!     }
//! }
//!
//! impl Authenticator for Tickets {
//!     fn kind(&self) -> &'static str {
//!         "tickets"
//!     }
//!
//!     fn ask(&self, credentials: &Credentials<'_>, now: SystemTime) -> Answer {
//!         // What is not of its kind is left to the next one.
//!         let Some(ticket) = credentials.tokens().find(|token| token.starts_with(b"ticket-")) else {
//!             return Answer::Pass;
//!         };
//!         match Self::read(ticket) {
//!             None => Answer::No(Fault::Malformed),
//!             Some((name, end)) if end <= now => Answer::No(Fault::Expired(name.into())),
//!             Some((name, end)) => Answer::Yes(Identity {
//!                 principal: name.into(),
//!                 tenant: self.tenant.clone(),
//!                 by: "a ticket".into(),
//!                 mark: [1; 32],
//!                 expires: Some(end),
//!                 plans: [].into(),
//!                 claims: [].into(),
//!             }),
//!         }
//!     }
//!
//!     // Nothing is ever taken back: tickets end by themselves.
//!     fn still_knows(&self, mark: &Mark) -> bool {
//!         *mark == [1; 32]
//!     }
//! }
//!
//! let tickets = Tickets { tenant: "guests".into() };
//! let ask = |key: &'static str| {
//!     let headers = HeaderMap::from_iter([(http::header::AUTHORIZATION, HeaderValue::from_static(key))]);
//!     tickets.ask(&Credentials::of(&headers), SystemTime::UNIX_EPOCH + Duration::from_secs(1000))
//! };
//! assert!(matches!(ask("Bearer ticket-ada-2000"), Answer::Yes(ada) if &*ada.principal == "ada"));
//! assert_eq!(ask("Bearer ticket-ada-500"), Answer::No(Fault::Expired("ada".into())));
//! assert_eq!(ask("Bearer ticket-ada"), Answer::No(Fault::Malformed));
//! assert_eq!(ask("Bearer ig_another"), Answer::Pass);
//! ```

pub mod jwt;
pub mod keys;
pub mod mtls;

mod anonymous;

use std::borrow::Cow;
use std::fmt::Debug;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use http::HeaderMap;
use http::header::AUTHORIZATION;
use schemars::JsonSchema;
use serde::Deserialize;

use self::mtls::Certificate;
use crate::claim::Claims;
use crate::secret::{Secret, SecretSource};

/// One way of knowing who asks.
pub trait Authenticator: Debug + Send + Sync {
    /// The word for it in `policy.yaml`.
    fn kind(&self) -> &'static str;

    /// Who asks, as far as these credentials tell.
    fn ask(&self, credentials: &Credentials<'_>, now: SystemTime) -> Answer;

    /// Whether somebody is still known who was let in under an older policy. Whose time is over meanwhile was not
    /// revoked.
    fn still_knows(&self, mark: &Mark) -> bool;
}

/// What an authenticator says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It knows who asks.
    Yes(Identity),
    /// These are credentials of its own kind, and they are not good. The caller is refused and does not learn why.
    No(Fault),
    /// That is not for it to say: the next one is asked.
    Pass,
}

/// Somebody who is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Who asks.
    pub principal: Arc<str>,
    /// Who pays.
    pub tenant: Arc<str>,
    /// The plans that they have, by which limits may be told apart.
    pub plans: Arc<[Arc<str>]>,
    /// What their token says, as far as rules ask for it; none where they have no token.
    pub claims: Claims,
    /// By what they were known, for the record; never anything secret.
    pub by: Arc<str>,
    /// What they are found by again when the policy changes.
    pub mark: Mark,
    /// When what they showed ends, if it does.
    pub expires: Option<SystemTime>,
}

/// What somebody is found by again; nothing that anybody else could use.
pub type Mark = [u8; 32];

/// Why credentials are not good, for the record only.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// There are none, or none that anybody here understands.
    Absent,
    /// They are not what such a credential looks like: mistyped, or cut off.
    Malformed,
    /// Two headers carry two different ones.
    Ambiguous,
    /// Nobody knows them: made up, or revoked.
    Unknown,
    /// They were good until their time was over. Whose they were.
    Expired(Arc<str>),
    /// They are not good for another reason, told in a sentence that shows nothing secret.
    Refused(Cow<'static, str>),
}

/// The credentials that came with a request.
#[derive(Clone, Copy, Debug)]
pub struct Credentials<'a> {
    headers: &'a HeaderMap,
    certificate: Option<&'a Certificate>,
}

impl<'a> Credentials<'a> {
    /// The credentials among these headers.
    pub fn of(headers: &'a HeaderMap) -> Self {
        Self { headers, certificate: None }
    }

    /// The same, and the certificate that was shown, and checked, when the connection was made.
    pub fn with(self, certificate: Option<&'a Certificate>) -> Self {
        Self { certificate, ..self }
    }

    /// The certificate of the connection.
    pub fn certificate(self) -> Option<&'a Certificate> {
        self.certificate
    }

    /// Every token, in the order `Authorization: Bearer`, `x-api-key`, `api-key`.
    pub fn tokens(self) -> impl Iterator<Item = &'a [u8]> {
        let bearers = self.headers.get_all(AUTHORIZATION).into_iter().filter_map(|value| bearer(value.as_bytes()));
        let named = ["x-api-key", "api-key"].into_iter().flat_map(move |name| self.headers.get_all(name));
        bearers.chain(named.map(|value| value.as_bytes().trim_ascii()))
    }
}

/// The token of an `Authorization: Bearer` (RFC 6750, 2.1; the scheme's case does not count: RFC 9110, 11.1).
fn bearer(value: &[u8]) -> Option<&[u8]> {
    let (scheme, token) = value.split_at_checked(7)?;
    scheme.eq_ignore_ascii_case(b"bearer ").then(|| token.trim_ascii())
}

/// One way of knowing who asks. Exactly one of the kinds must be given.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Authenticator")]
pub struct Config {
    /// API keys of the gateway's own.
    #[serde(default)]
    pub keys: Option<keys::Config>,
    /// Tokens of identity providers (JWT, OpenID Connect).
    #[serde(default)]
    pub jwt: Option<jwt::Config>,
    /// Client certificates (mTLS).
    #[serde(default)]
    pub mtls: Option<mtls::Config>,
    /// Whoever asks and was not known or refused by one above.
    #[serde(default)]
    pub anonymous: Option<anonymous::Config>,
}

/// What the world hands to authenticators that are built.
pub struct World<'a> {
    /// Reads a secret, or says why that cannot be done.
    pub secret: &'a mut dyn FnMut(&SecretSource) -> Result<Secret, String>,
    /// Reads a file with keys, or says all that is wrong with it.
    pub entries: &'a mut dyn FnMut(&Path) -> Result<keys::Listed, Vec<String>>,
    /// Gives the keys of an issuer, which are kept up to date, or says why there are none to be had.
    pub key_set: &'a mut dyn FnMut(&jwt::Source) -> Result<Arc<jwt::KeySet>, String>,
    /// The claims of tokens that some rule asks for: no others are kept.
    pub claims: &'a [Arc<str>],
    /// Reads a time.
    pub time: fn(&str) -> Option<SystemTime>,
}

/// What is wrong: the key below the list of authenticators, like `[0].keys.list[1].hash`, and what to do.
pub type Wrong = (String, String);

/// An authenticator, and every tenant that its configuration names.
pub struct Built {
    /// The authenticator.
    pub authenticator: Arc<dyn Authenticator>,
    /// The tenants.
    pub tenants: Vec<Named>,
}

/// A tenant that is named somewhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Named {
    /// The key below the list of authenticators, like `[0].anonymous.tenant`.
    pub path: String,
    /// Where in the file that the key names, to stand before a message; empty where it names none.
    pub within: String,
    /// Its name.
    pub tenant: String,
}

/// The authenticators of a policy, or all that is wrong with them.
pub fn build(configs: &[Config], world: &mut World<'_>) -> Result<Vec<Built>, Vec<Wrong>> {
    let (mut built, mut wrong) = (Vec::<Built>::new(), Vec::new());
    for (index, config) in configs.iter().enumerate() {
        let at = |(path, message): Wrong| (format!("[{index}]{path}"), message);
        match one(config, world) {
            Ok(mut one) => {
                one.tenants.iter_mut().for_each(|named| named.path.insert_str(0, &format!("[{index}]")));
                wrong.extend(behind(&built, one.authenticator.kind()).map(|told| at((String::new(), told))));
                built.push(one);
            }
            Err(faults) => wrong.extend(faults.into_iter().map(at)),
        }
    }
    if wrong.is_empty() { Ok(built) } else { Err(wrong) }
}

/// Why an authenticator would never be asked, or never decide, behind those `before` it.
fn behind(before: &[Built], kind: &str) -> Option<String> {
    let has = |kind: &str| before.iter().any(|built| built.authenticator.kind() == kind);
    match kind {
        _ if has("anonymous") => Some("`anonymous` takes whoever is left: put this before it".to_owned()),
        "keys" if has("keys") => Some("one `keys` knows all keys: put these into its list or its file".to_owned()),
        _ => None,
    }
}

fn one(config: &Config, world: &mut World<'_>) -> Result<Built, Vec<Wrong>> {
    match config {
        Config { keys: Some(keys), jwt: None, mtls: None, anonymous: None } => keys::build(keys, world),
        Config { keys: None, jwt: Some(jwt), mtls: None, anonymous: None } => jwt::build(jwt, world),
        Config { keys: None, jwt: None, mtls: Some(mtls), anonymous: None } => mtls::build(mtls),
        Config { keys: None, jwt: None, mtls: None, anonymous: Some(anonymous) } => Ok(anonymous::build(anonymous)),
        _ => Err(vec![(String::new(), format!("give one of {} and nothing else", KINDS.join(", ")))]),
    }
}

/// Every built-in kind: the word in `policy.yaml`.
pub const KINDS: &[&str] = &["keys", "jwt", "mtls", "anonymous"];

#[cfg(test)]
pub(crate) mod tests {
    use std::time::Duration;

    use http::HeaderValue;

    use super::*;

    pub fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (name.parse().unwrap(), HeaderValue::from_str(value).unwrap())).collect()
    }

    /// Builds what this JSON says, with a pepper and no files.
    pub fn built(json: &str) -> Result<Vec<Built>, Vec<Wrong>> {
        let configs: Vec<Config> = serde_json::from_str(json).unwrap();
        let mut world = World {
            secret: &mut |_| Ok(Secret::new("a pepper of thirty-two characters")),
            entries: &mut |path| Err(vec![format!("{} cannot be read", path.display())]),
            key_set: &mut |source| Err(format!("{source:?} cannot be had")),
            claims: &[],
            time: |text| text.parse().ok().map(|seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)),
        };
        build(&configs, &mut world)
    }

    #[test]
    fn tokens_come_from_three_headers_in_this_order() {
        let headers =
            headers(&[("api-key", "c"), ("x-api-key", " b "), ("authorization", "bearer  a"), ("x-key", "d")]);
        let tokens: Vec<&[u8]> = Credentials::of(&headers).tokens().collect();
        assert_eq!(tokens, [b"a", b"b", b"c"]);
    }

    #[test]
    fn only_a_bearer_is_a_token() {
        for value in ["Basic YTpi", "ig_abc", "Bearer", "", "Bearerx"] {
            assert_eq!(Credentials::of(&headers(&[("authorization", value)])).tokens().count(), 0, "{value}");
        }
    }

    #[test]
    fn whoever_is_never_asked_is_an_error() {
        let anonymous = r#"{"anonymous":{"tenant":"public"}}"#;
        let keys = r#"{"keys":{"pepper":{"env":"P"}}}"#;
        assert_eq!(built(&format!("[{keys},{anonymous}]")).map(|built| built.len()).ok(), Some(2));
        for wrong in [format!("[{anonymous},{keys}]"), format!("[{keys},{keys}]"), format!("[{anonymous},{anonymous}]")]
        {
            assert_eq!(built(&wrong).err().unwrap()[0].0, "[1]", "{wrong}");
        }
        let both = r#"[{"keys":{"pepper":{"env":"P"}},"anonymous":{"tenant":"public"}}]"#;
        assert!(built(both).err().unwrap()[0].1.contains("and nothing else"));
        assert!(built("[{}]").err().unwrap()[0].1.contains("give one of keys, jwt, mtls, anonymous"));
    }
}
