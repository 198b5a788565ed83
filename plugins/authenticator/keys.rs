//! API keys of the gateway's own: looked up by a keyed hash, so that whoever reads the policy learns no key.
//!
//! A key is `ig_`, six characters that may be shown, 43 that are secret (256 random bits in base 62), and six of
//! checksum over all before, by which scanners know a leaked key and people a mistyped one.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use aws_lc_rs::constant_time::verify_slices_are_equal;
use aws_lc_rs::hmac;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Answer, Authenticator, Built, Credentials, Fault, Identity, Mark, Named, World, Wrong};
use crate::secret::{Secret, SecretSource};

/// API keys of the gateway's own: `infergate key create` makes one and its entry. Whoever has the policy and the
/// pepper can make no key of them.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Keys")]
pub struct Config {
    /// The secret that all hashes are made with: at least 32 characters, from `openssl rand -hex 32`. With another
    /// pepper no key is known any more.
    pub pepper: SecretSource,
    /// The keys. Two entries of one name and tenant are one principal with two keys: add the new one, change the
    /// application, take the old one out.
    #[serde(default)]
    pub list: Vec<Entry>,
    /// A YAML file with a list of more of them. It is watched with the policy.
    #[serde(default)]
    pub file: Option<PathBuf>,
}

/// One key. Take the entry out and the key is revoked.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Key")]
pub struct Entry {
    /// Who has it, for records. Absent: its prefix.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1))]
    pub name: Option<String>,
    /// The tenant that pays, one of `tenants`.
    pub tenant: String,
    /// The part of it that may be shown: `ig_` and six characters.
    pub prefix: String,
    /// HMAC-SHA256 of the whole key under the pepper, in 64 hexadecimal digits.
    pub hash: String,
    /// When it ends: `2027-02-01T00:00:00Z`. Absent: never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires: Option<String>,
}

/// The entries of a file, and how to tell where in it something stands.
pub struct Listed {
    /// The entries.
    pub entries: Vec<Entry>,
    /// `keys.yaml:7:5: [3].hash: ` for `[3].hash`.
    pub at: Box<dyn Fn(&str) -> String>,
}

#[derive(Debug)]
struct Keys(Ring<Identity>);

pub(super) fn build(config: &Config, world: &mut World<'_>) -> Result<Built, Vec<Wrong>> {
    let (mut wrong, mut tenants) = (Vec::new(), Vec::new());
    let pepper = (world.secret)(&config.pepper);
    let pepper = pepper.unwrap_or_else(|error| {
        wrong.push((".keys.pepper".to_owned(), error));
        Secret::new("")
    });
    let file = config.file.as_ref().map(|path| (world.entries)(path));
    let file = file.transpose().unwrap_or_else(|errors| {
        wrong.extend(errors.into_iter().map(|error| (".keys.file".to_owned(), error)));
        None
    });
    let mut ring = Ring::new(&pepper);
    let listed = config.list.iter().enumerate().map(|(index, entry)| (Place::List(index), entry));
    let filed =
        file.iter().flat_map(|file| file.entries.iter().enumerate().map(|(n, entry)| (Place::File(n, file), entry)));
    for (place, entry) in listed.chain(filed) {
        tenants.push(Named { tenant: entry.tenant.clone(), ..place.named("tenant") });
        if let Err((member, message)) = ring.add_entry(entry, world.time) {
            let Named { path, within, .. } = place.named(member);
            wrong.push((path, within + &message));
        }
    }
    if wrong.is_empty() { Ok(Built { authenticator: Arc::new(Keys(ring)), tenants }) } else { Err(wrong) }
}

/// Where an entry stands.
enum Place<'a> {
    List(usize),
    File(usize, &'a Listed),
}

impl Place<'_> {
    fn named(&self, member: &str) -> Named {
        let (path, within) = match self {
            Self::List(index) => (format!(".keys.list[{index}].{member}"), String::new()),
            Self::File(index, file) => (".keys.file".to_owned(), (file.at)(&format!("[{index}].{member}"))),
        };
        Named { path, within, tenant: String::new() }
    }
}

impl Ring<Identity> {
    fn add_entry(&mut self, entry: &Entry, time: fn(&str) -> Option<SystemTime>) -> Result<(), (&'static str, String)> {
        let hash = mark(&entry.hash).ok_or_else(|| ("hash", "this is not 64 hexadecimal digits".to_owned()))?;
        if entry.prefix.len() != SHOWN
            || !entry.prefix.starts_with(BEGIN)
            || !entry.prefix[BEGIN.len()..].bytes().all(is_digit)
        {
            // A whole key may stand there: it is not told.
            return Err(("prefix", "this is not `ig_` and six letters or digits".to_owned()));
        }
        let expires = expiry(entry.expires.as_deref(), time).map_err(|error| ("expires", error))?;
        let identity = Identity {
            principal: entry.name.as_ref().unwrap_or(&entry.prefix).as_str().into(),
            tenant: entry.tenant.as_str().into(),
            plans: [].into(),
            claims: [].into(),
            by: format!("the key {}", entry.prefix).into(),
            mark: hash,
            expires,
        };
        let name: Arc<str> = format!("{} of `{}`", entry.prefix, identity.principal).into();
        self.add(hash, name, expires, identity).map_err(|error| ("hash", error))
    }
}

/// When a key ends.
pub fn expiry(text: Option<&str>, time: fn(&str) -> Option<SystemTime>) -> Result<Option<SystemTime>, String> {
    let wrong = |text: &str| format!("{text} is no time: give one like 2027-02-01T00:00:00Z");
    text.map(|text| time(text).ok_or_else(|| wrong(text))).transpose()
}

impl Authenticator for Keys {
    fn kind(&self) -> &'static str {
        "keys"
    }

    fn ask(&self, credentials: &Credentials<'_>, now: SystemTime) -> Answer {
        match self.0.find(credentials, now) {
            Ok(Some(identity)) => Answer::Yes(identity.clone()),
            Ok(None) => Answer::Pass,
            Err(fault) => Answer::No(fault),
        }
    }

    fn still_knows(&self, mark: &Mark) -> bool {
        self.0.get(mark).is_some()
    }
}

/// Keys by their hash, each with what it opens.
pub struct Ring<T> {
    pepper: hmac::Key,
    known: HashMap<u128, Known<T>, BuildHasherDefault<Already>>,
}

struct Known<T> {
    hash: Mark,
    /// What may be told of it.
    name: Arc<str>,
    expires: Option<SystemTime>,
    value: T,
}

impl<T> std::fmt::Debug for Ring<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Ring({} keys)", self.known.len())
    }
}

impl<T> Ring<T> {
    /// A ring without keys.
    pub fn new(pepper: &Secret) -> Self {
        Self { pepper: hmac::Key::new(hmac::HMAC_SHA256, pepper.reveal().as_bytes()), known: HashMap::default() }
    }

    /// Adds the key with this hash; `name` is what may be told of it.
    pub fn add(&mut self, hash: Mark, name: Arc<str>, expires: Option<SystemTime>, value: T) -> Result<(), String> {
        match self.known.insert(short(&hash), Known { hash, name, expires, value }) {
            None => Ok(()),
            Some(before) => {
                Err(format!("this is the hash of another entry too, {}: two entries, two keys", before.name))
            }
        }
    }

    /// What the key among these credentials opens: nothing where none of them is a key of ours.
    pub fn find(&self, credentials: &Credentials<'_>, now: SystemTime) -> Result<Option<&T>, Fault> {
        let mut ours = credentials.tokens().filter(|token| token.starts_with(BEGIN.as_bytes()));
        let Some(key) = ours.next() else { return Ok(None) };
        if ours.any(|other| other != key) {
            return Err(Fault::Ambiguous);
        }
        self.open(key, now).map(Some)
    }

    /// What `key` opens.
    pub fn open(&self, key: &[u8], now: SystemTime) -> Result<&T, Fault> {
        if key.len() != LENGTH {
            return Err(Fault::Malformed);
        }
        match self.get(&self.hash(key)) {
            Some(known) if known.expires.is_some_and(|expires| now >= expires) => {
                Err(Fault::Expired(known.name.clone()))
            }
            Some(known) => Ok(&known.value),
            // Only who is refused pays for the checksum.
            None if is_whole(key) => Err(Fault::Unknown),
            None => Err(Fault::Malformed),
        }
    }

    fn get(&self, hash: &Mark) -> Option<&Known<T>> {
        let known = self.known.get(&short(hash))?;
        verify_slices_are_equal(&known.hash, hash).is_ok().then_some(known)
    }

    /// The hash of `key` under the pepper.
    pub fn hash(&self, key: &[u8]) -> Mark {
        let mut hash = Mark::default();
        hash.copy_from_slice(hmac::sign(&self.pepper, key).as_ref());
        hash
    }
}

/// What a hash is looked up by. It tells nobody anything: without the pepper nobody can make a hash.
fn short(hash: &Mark) -> u128 {
    hash.iter().take(16).fold(0, |short, byte| short << 8 | u128::from(*byte))
}

/// A hash is spread evenly already.
#[derive(Debug, Default)]
pub(super) struct Already(u64);

impl Hasher for Already {
    fn write(&mut self, bytes: &[u8]) {
        self.0 = bytes.iter().fold(self.0, |sum, byte| sum.rotate_left(8) ^ u64::from(*byte));
    }

    fn write_u128(&mut self, short: u128) {
        self.0 = short as u64;
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

/// What every key begins with.
const BEGIN: &str = "ig_";
/// The part that may be shown.
const SHOWN: usize = BEGIN.len() + 6;
const CHECKED: usize = SHOWN + 43;
const LENGTH: usize = CHECKED + 6;
const DIGITS: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";

fn is_digit(byte: u8) -> bool {
    byte.is_ascii_alphanumeric()
}

/// A key that was just made.
pub struct Fresh(Secret);

impl Fresh {
    /// A key from bytes that `random` fills with chance.
    pub fn make(mut random: impl FnMut(&mut [u8]) -> Result<(), String>) -> Result<Self, String> {
        let mut key = BEGIN.to_owned();
        let mut bytes = [0; 64];
        while key.len() < CHECKED {
            random(&mut bytes)?;
            // 248 is the largest multiple of 62 in a byte: beyond it, some digits would come more often.
            let even = bytes.iter().filter(|byte| **byte < 248).map(|byte| char::from(DIGITS[usize::from(byte % 62)]));
            key.extend(even.take(CHECKED - key.len()));
        }
        key.push_str(&checksum(key.as_bytes()));
        Ok(Self(Secret::new(key)))
    }

    /// The key, to be shown once.
    pub fn key(&self) -> &Secret {
        &self.0
    }

    /// The part that may be shown again.
    pub fn prefix(&self) -> &str {
        &self.0.reveal()[..SHOWN]
    }

    /// Its hash under `pepper`, in hexadecimal digits.
    pub fn hash(&self, pepper: &Secret) -> String {
        let hash = Ring::<()>::new(pepper).hash(self.0.reveal().as_bytes());
        hash.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// The bytes that 64 hexadecimal digits stand for.
pub fn mark(digits: &str) -> Option<Mark> {
    let digits = digits.as_bytes();
    let mut mark = Mark::default();
    if digits.len() != 2 * mark.len() || !digits.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    for (byte, pair) in mark.iter_mut().zip(digits.chunks(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(mark)
}

fn is_whole(key: &[u8]) -> bool {
    key.len() == LENGTH && key[CHECKED..] == *checksum(&key[..CHECKED]).as_bytes()
}

/// CRC-32 (IEEE 802.3) in base 62, six digits.
fn checksum(text: &[u8]) -> String {
    let step = |crc: u32| crc >> 1 ^ if crc & 1 == 1 { 0xedb8_8320 } else { 0 };
    let crc = text.iter().fold(u32::MAX, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), |crc, _| step(crc)));
    let digit = |place: u32| char::from(DIGITS[(u64::from(!crc) / 62_u64.pow(place) % 62) as usize]);
    (0..6).rev().map(digit).collect()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::authenticator::tests::{built, headers};

    const PEPPER: &str = "a pepper of thirty-two characters";

    fn fresh(seed: u8) -> Fresh {
        let mut next = seed;
        Fresh::make(|bytes| {
            bytes.iter_mut().for_each(|byte| {
                next = next.wrapping_mul(5).wrapping_add(7);
                *byte = next;
            });
            Ok(())
        })
        .unwrap()
    }

    fn entry(key: &Fresh, more: &str) -> String {
        let (prefix, hash) = (key.prefix(), key.hash(&Secret::new(PEPPER)));
        format!(r#"{{"tenant":"t","prefix":"{prefix}","hash":"{hash}"{more}}}"#)
    }

    fn keys(entries: &[String]) -> Arc<dyn Authenticator> {
        let entries = entries.join(",");
        built(&format!(r#"[{{"keys":{{"pepper":{{"env":"P"}},"list":[{entries}]}}}}]"#))
            .ok()
            .unwrap()
            .remove(0)
            .authenticator
    }

    fn ask(keys: &Arc<dyn Authenticator>, pairs: &[(&'static str, &str)]) -> Answer {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000);
        keys.ask(&Credentials::of(&headers(pairs)), now)
    }

    #[test]
    fn a_key_is_known_in_every_header_and_names_its_holder() {
        let key = fresh(1);
        let keys = keys(&[entry(&key, r#","name":"ci""#)]);
        let key = key.key().reveal();
        for (name, value) in
            [("authorization", format!("Bearer {key}")), ("x-api-key", key.into()), ("api-key", key.into())]
        {
            let Answer::Yes(identity) = ask(&keys, &[(name, &value)]) else { panic!("{name}") };
            assert_eq!((&*identity.principal, &*identity.tenant), ("ci", "t"));
            assert!(identity.by.starts_with("the key ig_") && !identity.by.contains(key));
            assert!(keys.still_knows(&identity.mark));
        }
    }

    #[test]
    fn what_is_no_good_is_refused_and_the_reason_is_told_apart() {
        let (known, stranger) = (fresh(1), fresh(2));
        let keys = keys(&[entry(&known, "")]);
        let key = known.key().reveal();
        let mistyped = key.replacen(&key[20..21], if &key[20..21] == "a" { "b" } else { "a" }, 1);
        let no = |pairs: &[(&'static str, &str)]| match ask(&keys, pairs) {
            Answer::No(fault) => fault,
            other => panic!("{other:?}"),
        };
        assert_eq!(no(&[("x-api-key", stranger.key().reveal())]), Fault::Unknown);
        for wrong in [
            &mistyped,
            "ig_",
            &key[..57],
            &format!("{key}x"),
            &"ig_\u{e4}".repeat(15),
            &format!("ig_{}", "x".repeat(60_000)),
        ] {
            assert_eq!(no(&[("x-api-key", wrong)]), Fault::Malformed, "{wrong:.80}");
        }
        assert_eq!(no(&[("x-api-key", key), ("api-key", stranger.key().reveal())]), Fault::Ambiguous);
        assert!(
            matches!(ask(&keys, &[("x-api-key", key), ("api-key", key)]), Answer::Yes(_)),
            "the same twice is clear"
        );
        for none in [
            &[][..],
            &[("authorization", "Bearer sk-other")],
            &[("api-key", "id_token")],
            &[("authorization", "Basic eDp5")],
        ] {
            assert_eq!(ask(&keys, none), Answer::Pass);
        }
    }

    #[test]
    fn a_key_ends_with_its_time() {
        let [over, not_yet] = [1, 2].map(fresh);
        let keys = keys(&[entry(&over, r#","expires":"1000","name":"old""#), entry(&not_yet, r#","expires":"1001""#)]);
        let Answer::No(Fault::Expired(whose)) = ask(&keys, &[("api-key", over.key().reveal())]) else { panic!() };
        assert_eq!(*whose, *format!("{} of `old`", over.prefix()));
        assert!(matches!(ask(&keys, &[("api-key", not_yet.key().reveal())]), Answer::Yes(_)));
    }

    #[test]
    fn two_keys_of_one_name_are_one_principal_and_one_can_go() {
        let (old, new) = (fresh(1), fresh(2));
        let both = keys(&[entry(&old, r#","name":"ci""#), entry(&new, r#","name":"ci""#)]);
        let who = |key: &Fresh| match ask(&both, &[("api-key", key.key().reveal())]) {
            Answer::Yes(identity) => identity,
            other => panic!("{other:?}"),
        };
        assert_eq!(who(&old).principal, who(&new).principal);
        let rotated = keys(&[entry(&new, r#","name":"ci""#)]);
        assert_eq!(ask(&rotated, &[("api-key", old.key().reveal())]), Answer::No(Fault::Unknown));
        assert!(!rotated.still_knows(&who(&old).mark) && rotated.still_knows(&who(&new).mark));
    }

    #[test]
    fn every_wrong_entry_is_told_at_its_place() {
        let key = fresh(1);
        let good = entry(&key, "");
        let wrong = |text: &str| {
            let told = built(&format!(r#"[{{"keys":{{"pepper":{{"env":"P"}},{text}}}}}]"#)).err().unwrap();
            assert_eq!(told.len(), 1, "{told:?}");
            told.into_iter().next().unwrap()
        };
        let list = |entries: &str| wrong(&format!(r#""list":[{entries}]"#));
        assert_eq!(list(&good.replace("\"hash\":\"", "\"hash\":\"0")).0, "[0].keys.list[0].hash");
        let (place, told) = list(&format!("{good},{good}"));
        assert!(
            place == "[0].keys.list[1].hash" && told.contains(&format!("another entry too, {}", key.prefix())),
            "{told}"
        );
        let (place, told) = list(&entry(&key, r#","expires":"soon""#));
        assert!(place == "[0].keys.list[0].expires" && told.contains("soon is no time"), "{told}");
        for prefix in ["ix_aaaaaa", "ig_aaaaa", "ig_aaaaaaa", "ig_aaa-aa"] {
            assert_eq!(list(&good.replace(key.prefix(), prefix)).0, "[0].keys.list[0].prefix", "{prefix}");
        }
        let whole = good.replace(&format!("{}\"", key.prefix()), &format!("{}\"", key.key().reveal()));
        let (place, told) = list(&whole);
        assert!(place == "[0].keys.list[0].prefix" && !told.contains(key.key().reveal()), "{told}");
        assert_eq!(wrong(r#""file":"/none""#), ("[0].keys.file".to_owned(), "/none cannot be read".to_owned()));
    }

    #[test]
    fn a_key_is_what_it_is_said_to_be() {
        let key = fresh(3);
        let text = key.key().reveal();
        assert_eq!(text.len(), 58);
        assert!(text.starts_with(key.prefix()) && key.prefix().len() == 9 && is_whole(text.as_bytes()));
        // The check value of CRC-32/ISO-HDLC in the catalogue of parametrised CRC algorithms: cbf43926.
        let value = |text: &str| {
            text.bytes()
                .fold(0_u64, |sum, byte| sum * 62 + DIGITS.iter().position(|digit| *digit == byte).unwrap() as u64)
        };
        assert_eq!(value(&checksum(b"123456789")), 0xcbf4_3926);
    }

    #[test]
    fn the_hash_is_hmac_sha256() {
        // RFC 4231, test case 2.
        let hash = Ring::<()>::new(&Secret::new("Jefe")).hash(b"what do ya want for nothing?");
        assert_eq!(Some(hash), mark("5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"));
    }

    #[test]
    fn half_a_hash_opens_nothing() {
        let key = fresh(1);
        let mut hash = mark(&key.hash(&Secret::new(PEPPER))).unwrap();
        let open = |hash: Mark| {
            let mut ring = Ring::new(&Secret::new(PEPPER));
            ring.add(hash, "k".into(), None, ()).unwrap();
            ring.open(key.key().reveal().as_bytes(), SystemTime::UNIX_EPOCH).cloned()
        };
        assert_eq!(open(hash), Ok(()));
        hash[31] ^= 1;
        assert_eq!(open(hash), Err(Fault::Unknown));
        hash[31] ^= 1;
        hash[0] ^= 1;
        assert_eq!(open(hash), Err(Fault::Unknown));
    }

    #[test]
    fn every_digit_of_a_key_comes_as_often_as_any_other() {
        let mut bytes = [250, 62, 255, 247].into_iter().chain(std::iter::repeat(123));
        let key = Fresh::make(|fill| {
            fill.iter_mut().for_each(|byte| *byte = bytes.next().unwrap());
            Ok(())
        });
        let digits = [62, 247, 123].map(|byte: usize| char::from(DIGITS[byte % 62]));
        let expected: String = digits.into_iter().collect();
        assert!(key.unwrap().key().reveal().starts_with(&format!("ig_{expected}")), "248 and above are no digits");
    }

    #[test]
    fn a_hash_is_64_digits_and_nothing_else() {
        let good = "0F".repeat(32);
        assert_eq!(mark(&good), Some([15; 32]));
        for wrong in [good.replacen("0F", "+F", 1), good.clone() + "0F", good[1..].to_owned(), "\u{e4}".repeat(32)] {
            assert_eq!(mark(&wrong), None, "{wrong}");
        }
    }

    #[test]
    fn a_ring_shows_no_hash() {
        let mut ring = Ring::new(&Secret::new(PEPPER));
        ring.add([7; 32], "k".into(), None, ()).unwrap();
        assert_eq!(format!("{ring:?}"), "Ring(1 keys)");
    }
}
