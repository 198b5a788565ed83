//! The keys of an issuer: a JSON Web Key Set (RFC 7517), of which only public keys for signatures count.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use aws_lc_rs::signature::{self, ParsedPublicKey, RsaParameters, RsaPublicKeyComponents, VerificationAlgorithm};
use http::Uri;
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::Value;

use super::claims::{Flaw, shown};
use super::{Mark, decoded, hash};

/// The most keys that are kept of one set.
const KEYS_MAX: usize = 64;
/// The most keys that are tried for one token.
const TRIES_MAX: usize = 8;

/// How a token is signed (RFC 7518, 3.1; RFC 8037).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
pub enum Algorithm {
    /// RSA, PKCS#1 v1.5, SHA-256.
    RS256,
    /// RSA, PKCS#1 v1.5, SHA-384.
    RS384,
    /// RSA, PKCS#1 v1.5, SHA-512.
    RS512,
    /// RSA, PSS, SHA-256.
    PS256,
    /// RSA, PSS, SHA-384.
    PS384,
    /// RSA, PSS, SHA-512.
    PS512,
    /// ECDSA on P-256.
    ES256,
    /// ECDSA on P-384.
    ES384,
    /// Ed25519.
    #[serde(rename = "EdDSA")]
    Ed25519,
}

const ALGORITHMS: [(Algorithm, &str); 9] = [
    (Algorithm::RS256, "RS256"),
    (Algorithm::RS384, "RS384"),
    (Algorithm::RS512, "RS512"),
    (Algorithm::PS256, "PS256"),
    (Algorithm::PS384, "PS384"),
    (Algorithm::PS512, "PS512"),
    (Algorithm::ES256, "ES256"),
    (Algorithm::ES384, "ES384"),
    (Algorithm::Ed25519, "EdDSA"),
];

impl Algorithm {
    /// Its name in a token's header.
    pub fn name(self) -> &'static str {
        ALGORITHMS[self as usize].1
    }

    fn rsa(self) -> Option<&'static RsaParameters> {
        match self {
            Self::RS256 => Some(&signature::RSA_PKCS1_2048_8192_SHA256),
            Self::RS384 => Some(&signature::RSA_PKCS1_2048_8192_SHA384),
            Self::RS512 => Some(&signature::RSA_PKCS1_2048_8192_SHA512),
            Self::PS256 => Some(&signature::RSA_PSS_2048_8192_SHA256),
            Self::PS384 => Some(&signature::RSA_PSS_2048_8192_SHA384),
            Self::PS512 => Some(&signature::RSA_PSS_2048_8192_SHA512),
            Self::ES256 | Self::ES384 | Self::Ed25519 => None,
        }
    }
}

/// Where a key set comes from.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Source {
    /// A file.
    File(PathBuf),
    /// Its address.
    Url(String),
    /// What the issuer with this address says of itself.
    Discovery(String),
}

/// Whether keys may come from this address: nobody must be able to change them on their way.
pub fn check_url(url: &str) -> Result<(), String> {
    let uri: Uri = url.parse().map_err(|_| format!("{} is no address", shown(url)))?;
    let host = uri.host().unwrap_or_default();
    if uri.authority().is_none_or(|authority| authority.as_str().contains('@')) || host.is_empty() {
        return Err("this is no address of a server, like https://login.example.com/keys".to_owned());
    }
    match uri.scheme_str() {
        Some("https") => Ok(()),
        Some("http") if is_this_machine(host) => Ok(()),
        _ => Err("keys come over https: whoever can change them on their way can be anybody".to_owned()),
    }
}

fn is_this_machine(host: &str) -> bool {
    let host = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// The keys of an issuer, which somebody keeps up to date.
pub struct KeySet {
    keys: RwLock<Arc<Keys>>,
    wanted: AtomicBool,
    wish: Box<dyn Fn() + Send + Sync>,
}

#[derive(Default)]
struct Keys {
    generation: u64,
    list: Vec<Key>,
}

/// One key, parsed for each algorithm that it may be used with.
struct Key {
    id: Option<String>,
    /// By which it is known from others.
    mark: Mark,
    verifiers: Vec<(Algorithm, ParsedPublicKey)>,
}

impl std::fmt::Debug for KeySet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "KeySet({} keys)", self.keys().list.len())
    }
}

impl KeySet {
    /// A set without keys. `wish` is called when a token names a key that is not there: once, until somebody has
    /// [looked](Self::looking).
    pub fn new(wish: impl Fn() + Send + Sync + 'static) -> Self {
        Self { keys: RwLock::default(), wanted: AtomicBool::new(false), wish: Box::new(wish) }
    }

    /// The keys in `text`, for good.
    pub fn fixed(text: &[u8]) -> Result<Self, String> {
        let set = Self::new(|| {});
        set.put(text).map(|_| set)
    }

    /// Takes the keys in `text` in place of those that are there; how many. If there are none, the old ones stay.
    pub fn put(&self, text: &[u8]) -> Result<usize, String> {
        let list = read(text)?;
        let mut keys = self.keys.write().unwrap_or_else(PoisonError::into_inner);
        let count = list.len();
        let same = |one: &[Key], other: &[Key]| one.iter().all(|key| other.iter().any(|known| known.mark == key.mark));
        if !(same(&list, &keys.list) && same(&keys.list, &list)) {
            *keys = Arc::new(Keys { generation: keys.generation + 1, list });
        }
        Ok(count)
    }

    /// Somebody looks for newer keys now: what is wished from here on is a wish for the next time.
    pub fn looking(&self) {
        self.wanted.store(false, Ordering::Relaxed);
    }

    /// Counts the times that its keys have changed.
    pub fn generation(&self) -> u64 {
        self.keys().generation
    }

    /// How many keys there are.
    pub fn count(&self) -> usize {
        self.keys().list.len()
    }

    fn keys(&self) -> Arc<Keys> {
        self.keys.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether one of the keys made `signature` over `signed`; the generation of that key.
    pub(super) fn verify(
        &self,
        algorithm: Algorithm,
        id: Option<&str>,
        signed: &[u8],
        signature: &[u8],
    ) -> Result<u64, Flaw> {
        let keys = self.keys();
        let named = || keys.list.iter().filter(|key| id.is_none() || key.id.as_deref() == id);
        if named().next().is_none() {
            if !self.wanted.swap(true, Ordering::Relaxed) {
                (self.wish)();
            }
            return Err(match id {
                _ if keys.list.is_empty() => "none of its issuer's keys is known yet".into(),
                Some(id) => format!("its issuer has no key `{}`", shown(id)).into(),
                None => "it names no key".into(),
            });
        }
        let fits = |key: &'_ &Key| key.verifiers.iter().any(|(known, _)| *known == algorithm);
        if named().find(fits).is_none() {
            return Err(format!("the key is none for {}", algorithm.name()).into());
        }
        let verifiers = named().flat_map(|key| &key.verifiers).filter(|(known, _)| *known == algorithm);
        let mut tried = verifiers.take(TRIES_MAX);
        if tried.any(|(_, key)| key.verify_sig(signed, signature).is_ok()) {
            return Ok(keys.generation);
        }
        Err("its signature is wrong".into())
    }
}

/// The keys of a set that are public, and for signatures.
fn read(text: &[u8]) -> Result<Vec<Key>, String> {
    #[derive(Deserialize)]
    struct Set {
        keys: Vec<Value>,
    }
    let set: Set = serde_json::from_slice(text).map_err(|_| "this is no JSON Web Key Set".to_owned())?;
    let list: Vec<Key> = set.keys.iter().filter_map(Key::read).take(KEYS_MAX).collect();
    if list.is_empty() {
        return Err(format!("of {} keys none is public and for signatures that are known", set.keys.len()));
    }
    Ok(list)
}

impl Key {
    /// A key of a kind that is not known is passed over (RFC 7517, 5).
    fn read(key: &Value) -> Option<Self> {
        let text = |name: &str| key.get(name).and_then(Value::as_str);
        let signs = text("use").is_none_or(|word| word == "sig");
        let verifies = key
            .get("key_ops")
            .is_none_or(|list| list.as_array().is_some_and(|list| list.iter().any(|word| word == "verify")));
        if !signs || !verifies {
            return None;
        }
        let bytes = |name: &str| text(name).and_then(|text| decoded(text.as_bytes()));
        let verifiers = match (text("kty")?, text("crv")) {
            ("RSA", _) => rsa(&bytes("n")?, &bytes("e")?),
            ("EC", Some("P-256")) => {
                let point = point(&bytes("x")?, &bytes("y")?, 32)?;
                one(Algorithm::ES256, &signature::ECDSA_P256_SHA256_FIXED, &point)
            }
            ("EC", Some("P-384")) => {
                let point = point(&bytes("x")?, &bytes("y")?, 48)?;
                one(Algorithm::ES384, &signature::ECDSA_P384_SHA384_FIXED, &point)
            }
            ("OKP", Some("Ed25519")) => one(Algorithm::Ed25519, &signature::ED25519, &bytes("x")?),
            _ => return None,
        };
        let only = text("alg");
        let verifiers: Vec<_> =
            verifiers.into_iter().filter(|(algorithm, _)| only.is_none_or(|only| only == algorithm.name())).collect();
        let id = text("kid").map(str::to_owned);
        let (_, first) = verifiers.first()?;
        let mark = hash(&[
            id.as_deref().unwrap_or_default().as_bytes(),
            b"\0",
            only.unwrap_or_default().as_bytes(),
            b"\0",
            first.as_ref(),
        ]);
        Some(Self { id, mark, verifiers })
    }
}

/// A modulus of 2048 to 8192 bits serves every algorithm of its kind.
fn rsa(modulus: &[u8], exponent: &[u8]) -> Vec<(Algorithm, ParsedPublicKey)> {
    let whole = |bytes: &[u8]| bytes.iter().position(|byte| *byte != 0).map_or(Vec::new(), |at| bytes[at..].to_vec());
    let components = RsaPublicKeyComponents { n: whole(modulus), e: whole(exponent) };
    if !(256..=1024).contains(&components.n.len()) || !(1..=8).contains(&components.e.len()) {
        return Vec::new();
    }
    let parsed = |(algorithm, _): &(Algorithm, &str)| {
        Some((*algorithm, components.to_parsed_public_key(algorithm.rsa()?).ok()?))
    };
    ALGORITHMS.iter().filter_map(parsed).collect()
}

/// A point of a curve, uncompressed.
fn point(x: &[u8], y: &[u8], length: usize) -> Option<Vec<u8>> {
    (x.len() == length && y.len() == length).then(|| [&[4], x, y].concat())
}

fn one(algorithm: Algorithm, how: &'static dyn VerificationAlgorithm, key: &[u8]) -> Vec<(Algorithm, ParsedPublicKey)> {
    ParsedPublicKey::new(how, key).ok().map(|key| (algorithm, key)).into_iter().collect()
}
