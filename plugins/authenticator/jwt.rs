//! Tokens of identity providers (JWT, OpenID Connect): verified with the issuer's keys, mapped to a tenant.
//!
//! Who signs decides nothing about how it is verified: the policy pins the algorithms of each issuer, and the keys come
//! from where the policy says, never from the token (RFC 8725). A token that was verified once is known by its hash
//! until it ends or the issuer's keys change, because a signature is the dearest step of a request.

mod claims;
mod keyset;
mod seen;

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use aws_lc_rs::digest::{SHA256, digest};
use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use http::Uri;
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Map, Value};

use self::claims::{Claims, Flaw};
pub use self::claims::{Plans, Roles, TenantClaim};
pub use self::keyset::{Algorithm, KeySet, Source, check_url};
use self::seen::Seen;
use super::{Answer, Authenticator, Built, Credentials, Fault, Identity, Mark, Named, World, Wrong};

/// The longest token that is looked at.
const LENGTH_MAX: usize = 16 << 10;

/// Tokens of identity providers (JWT, OpenID Connect). A token of an issuer that is not listed is left to the next
/// authenticator.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Jwt")]
pub struct Config {
    /// Whose tokens are good.
    #[schemars(length(min = 1))]
    pub issuers: Vec<Issuer>,
}

/// One identity provider, and what its tokens say of who asks.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Issuer {
    /// The `iss` of its tokens, to the letter: `https://login.example.com/realms/acme`.
    #[schemars(length(min = 1))]
    pub issuer: String,
    /// What stands before the names of its principals: `corp` makes `corp:alice` of the `sub` alice. Absent: the host
    /// of `issuer`.
    #[serde(default)]
    #[schemars(length(min = 1))]
    pub name: Option<String>,
    /// Whom its tokens must be meant for: one of these must be in `aud`.
    #[schemars(length(min = 1))]
    pub audience: Vec<String>,
    /// The signatures that are good: `RS256`, `ES256`, `EdDSA`, … A token that was signed in any other way is refused.
    #[schemars(length(min = 1))]
    pub algorithms: Vec<Algorithm>,
    /// Where its keys are. Absent: where `/.well-known/openid-configuration` below `issuer` says.
    #[serde(default)]
    pub jwks: Option<Jwks>,
    /// How far its clock and ours may be apart, in seconds.
    #[serde(default = "ten")]
    #[schemars(range(max = 30))]
    pub leeway_s: u64,
    /// Who pays.
    pub tenant: TenantClaim,
    /// The roles without which nobody is let in.
    #[serde(default)]
    pub roles: Option<Roles>,
    /// Which plans its tokens have. `limits` with `plans` hold for those alone.
    #[serde(default)]
    pub plans: Option<Plans>,
}

fn ten() -> u64 {
    10
}

/// Where an issuer's keys are: `{url: …}`, read again every ten minutes and when a token names a key that is not among
/// them, or `{file: …}`, watched with the policy.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Jwks {
    /// The address of its JSON Web Key Set. It is https, except on this machine.
    #[serde(default)]
    pub url: Option<String>,
    /// A file with its JSON Web Key Set.
    #[serde(default)]
    pub file: Option<std::path::PathBuf>,
}

#[derive(Debug)]
struct Jwt {
    issuers: Vec<Known>,
    seen: Seen<Verified>,
}

/// An issuer that is known.
#[derive(Debug)]
struct Known {
    issuer: Box<str>,
    name: Box<str>,
    audience: Vec<String>,
    algorithms: Vec<Algorithm>,
    leeway: Duration,
    keys: Arc<KeySet>,
    claims: Claims,
}

/// What a token turned out to say, for as long as it and the key that signed it are good.
#[derive(Debug)]
struct Verified {
    identity: Identity,
    issuer: usize,
    /// Which keys it was verified with.
    generation: u64,
    begins: Option<SystemTime>,
    ends: SystemTime,
}

pub(super) fn build(config: &Config, world: &mut World<'_>) -> Result<Built, Vec<Wrong>> {
    let (mut issuers, mut wrong, mut tenants) = (Vec::<Known>::new(), Vec::new(), Vec::new());
    for (index, issuer) in config.issuers.iter().enumerate() {
        let path = |key: String| format!(".jwt.issuers[{index}]{key}");
        tenants.extend(issuer.tenant.named().into_iter().map(|(key, tenant)| Named {
            path: path(format!(".tenant{key}")),
            within: String::new(),
            tenant,
        }));
        match known(issuer, world) {
            Ok(known) if issuers.iter().any(|other| other.issuer == known.issuer) => {
                wrong.push((path(".issuer".to_owned()), format!("{} is listed already: join the two", issuer.issuer)));
            }
            Ok(known) if issuers.iter().any(|other| other.name == known.name) => {
                let message = format!("another issuer is named {} too: give each a `name` of its own", known.name);
                wrong.push((path(".name".to_owned()), message));
            }
            Ok(known) => issuers.push(known),
            Err(faults) => wrong.extend(faults.into_iter().map(|(key, message)| (path(key), message))),
        }
    }
    let authenticator = Arc::new(Jwt { issuers, seen: Seen::default() });
    if wrong.is_empty() { Ok(Built { authenticator, tenants }) } else { Err(wrong) }
}

fn known(config: &Issuer, world: &mut World<'_>) -> Result<Known, Vec<Wrong>> {
    let mut wrong = Vec::new();
    let source = source(config).map_err(|fault| wrong.push(fault));
    let keys = source.ok().and_then(|source| {
        let place = if matches!(source, Source::File(_)) { ".jwks.file" } else { ".jwks" };
        (world.key_set)(&source).map_err(|told| wrong.push((place.to_owned(), told))).ok()
    });
    let claims = Claims::build(config, world.claims).map_err(|faults| wrong.extend(faults)).ok();
    match (keys, claims) {
        (Some(keys), Some(claims)) if wrong.is_empty() => Ok(Known {
            issuer: config.issuer.as_str().into(),
            name: name(config).into(),
            audience: config.audience.clone(),
            algorithms: config.algorithms.clone(),
            leeway: Duration::from_secs(config.leeway_s),
            keys,
            claims,
        }),
        _ => Err(wrong),
    }
}

/// What stands before its principals.
fn name(config: &Issuer) -> String {
    let host = || config.issuer.parse::<Uri>().ok().and_then(|uri| uri.host().map(str::to_owned));
    config.name.clone().or_else(host).unwrap_or_else(|| config.issuer.clone())
}

fn source(config: &Issuer) -> Result<Source, Wrong> {
    match &config.jwks {
        None => check_url(&config.issuer)
            .map(|()| Source::Discovery(config.issuer.clone()))
            .map_err(|told| (".issuer".to_owned(), format!("{told}; or say where its keys are, under `jwks`"))),
        Some(Jwks { url: Some(url), file: None }) => {
            check_url(url).map(|()| Source::Url(url.clone())).map_err(|told| (".jwks.url".to_owned(), told))
        }
        Some(Jwks { url: None, file: Some(file) }) => Ok(Source::File(file.clone())),
        Some(_) => Err((".jwks".to_owned(), "give either url or file".to_owned())),
    }
}

impl Authenticator for Jwt {
    fn kind(&self) -> &'static str {
        "jwt"
    }

    fn ask(&self, credentials: &Credentials<'_>, now: SystemTime) -> Answer {
        let mut tokens = credentials.tokens().filter(|token| is_token(token));
        let Some(token) = tokens.next() else { return Answer::Pass };
        if tokens.any(|other| other != token) {
            return Answer::No(Fault::Ambiguous);
        }
        if token.len() > LENGTH_MAX {
            return Answer::No(Fault::Refused(format!("the token is longer than {LENGTH_MAX} bytes").into()));
        }
        let hash = hash(&[token]);
        if let Some(verified) = self.seen.get(&hash).filter(|verified| self.is_fresh(verified)) {
            return self.at(&verified, now);
        }
        match self.verify(token) {
            Ok(None) => Answer::Pass,
            Ok(Some(verified)) => {
                let answer = self.at(&verified, now);
                if matches!(answer, Answer::Yes(_)) {
                    self.seen.put(hash, verified);
                }
                answer
            }
            Err(flaw) => Answer::No(Fault::Refused(flaw)),
        }
    }

    fn still_knows(&self, mark: &Mark) -> bool {
        self.issuers.iter().any(|issuer| mark[..16] == half(&issuer.issuer) && issuer.claims.still_give(&mark[16..]))
    }
}

impl Jwt {
    /// Whether the keys are still those that it was verified with.
    fn is_fresh(&self, verified: &Verified) -> bool {
        self.issuers.get(verified.issuer).is_some_and(|issuer| issuer.keys.generation() == verified.generation)
    }

    /// What a token that was verified says at a moment.
    fn at(&self, verified: &Verified, now: SystemTime) -> Answer {
        let no = |what: &str| Answer::No(Fault::Refused(format!("{} {what}", verified.identity.by).into()));
        match verified {
            _ if now >= verified.ends => no("has expired"),
            _ if verified.begins.is_some_and(|begins| now < begins) => no("is not good yet"),
            _ => Answer::Yes(verified.identity.clone()),
        }
    }

    /// Whose a token is; `None` where it is no token, or that of an issuer that nobody here knows.
    fn verify(&self, token: &[u8]) -> Result<Option<Arc<Verified>>, Flaw> {
        let Some((parts, payload)) = Parts::of(token).and_then(|parts| Some((parts, object(parts.payload)?))) else {
            return Ok(None);
        };
        let issuer = payload.get("iss").and_then(Value::as_str);
        let found = self.issuers.iter().enumerate().find(|(_, known)| issuer == Some(&known.issuer));
        let Some((index, known)) = found else { return Ok(None) };
        let told = |flaw: Flaw| Flaw::from(format!("a token of {}: {flaw}", known.name));
        let generation = known.signed(&parts).map_err(told)?;
        known.verified(&payload, index, generation).map(|verified| Some(Arc::new(verified))).map_err(told)
    }
}

impl Known {
    /// Whether one of the issuer's keys signed it, in a way that the policy lists; which keys these are.
    fn signed(&self, parts: &Parts<'_>) -> Result<u64, Flaw> {
        let header = object(parts.header).ok_or("its header is no JSON object")?;
        if header.contains_key("crit") {
            return Err("it asks for an extension that is not known".into());
        }
        let word = header.get("alg").and_then(Value::as_str).unwrap_or_default();
        let algorithm = self.algorithms.iter().find(|known| known.name() == word).copied();
        let algorithm = algorithm.ok_or_else(|| format!("the algorithm {} is not listed", claims::shown(word)))?;
        let signature = decoded(parts.signature).ok_or("its signature is no base64url")?;
        let kid = match header.get("kid") {
            None => None,
            Some(kid) => Some(kid.as_str().ok_or("its `kid` is no text")?),
        };
        self.keys.verify(algorithm, kid, parts.signed, &signature)
    }

    /// What its claims say, which are the issuer's.
    fn verified(&self, claims: &Map<String, Value>, issuer: usize, generation: u64) -> Result<Verified, Flaw> {
        self.meant_for_us(claims)?;
        let ends = claims::time(claims, "exp")?.ok_or("it has no `exp`")?;
        let begins = claims::time(claims, "nbf")?.and_then(|begins| begins.checked_sub(self.leeway));
        let ends = ends.checked_add(self.leeway).ok_or("its `exp` is no time")?;
        let subject = claims.get("sub").and_then(Value::as_str).filter(|subject| claims::is_name(subject, 256));
        let subject = subject.ok_or("it has no `sub` of 1 to 256 characters")?;
        let given = self.claims.read(claims)?;
        let mut mark = Mark::default();
        mark[..16].copy_from_slice(&half(&self.issuer));
        mark[16..].copy_from_slice(&given.mark);
        let identity = Identity {
            principal: format!("{}:{subject}", self.name).into(),
            tenant: given.tenant,
            plans: given.plans,
            claims: given.claims,
            by: format!("a token of {}", self.name).into(),
            mark,
            expires: Some(ends),
        };
        Ok(Verified { identity, issuer, generation, begins, ends })
    }

    fn meant_for_us(&self, claims: &Map<String, Value>) -> Result<(), Flaw> {
        let ours = |value: &Value| value.as_str().is_some_and(|value| self.audience.iter().any(|ours| ours == value));
        match claims.get("aud") {
            None => Err("it has no `aud`".into()),
            Some(Value::Array(list)) if list.iter().any(ours) => Ok(()),
            Some(one) if ours(one) => Ok(()),
            Some(_) => Err("its `aud` names somebody else".into()),
        }
    }
}

/// Whether it has the shape of a signed token: three parts, of which the first begins as a JSON object does.
fn is_token(token: &[u8]) -> bool {
    token.starts_with(b"eyJ") && token.iter().filter(|byte| **byte == b'.').count() == 2
}

/// The parts of a token, as they came.
#[derive(Clone, Copy)]
struct Parts<'a> {
    header: &'a [u8],
    payload: &'a [u8],
    signature: &'a [u8],
    signed: &'a [u8],
}

impl<'a> Parts<'a> {
    fn of(token: &'a [u8]) -> Option<Self> {
        let mut parts = token.split(|byte| *byte == b'.');
        let (header, payload, signature) = (parts.next()?, parts.next()?, parts.next()?);
        let signed = token.get(..header.len() + 1 + payload.len())?;
        Some(Self { header, payload, signature, signed })
    }
}

fn decoded(part: &[u8]) -> Option<Vec<u8>> {
    BASE64_URL_SAFE_NO_PAD.decode(part).ok()
}

fn object(part: &[u8]) -> Option<Map<String, Value>> {
    serde_json::from_slice(&decoded(part)?).ok()
}

fn hash(parts: &[&[u8]]) -> Mark {
    let mut mark = Mark::default();
    mark.copy_from_slice(digest(&SHA256, &parts.concat()).as_ref());
    mark
}

/// Half a mark, for the parts that are looked up on their own.
fn half(text: &str) -> [u8; 16] {
    let mut half = [0; 16];
    half.copy_from_slice(&hash(&[text.as_bytes()])[..16]);
    half
}

#[cfg(test)]
mod tests;
