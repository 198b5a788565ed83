//! What a token says of its bearer, as far as some rule of the policy asks for it, and no more than fits.
//!
//! A claim that does not fit is as one that is not there: of half a list nobody could say what is not in it.

use std::fmt;
use std::sync::Arc;

use serde_json::{Map, Value};

/// The value of a claim.
#[derive(Clone, PartialEq, Eq)]
pub enum Claim {
    /// A text.
    Text(Box<str>),
    /// A whole number.
    Number(i64),
    /// Yes or no.
    Flag(bool),
    /// A list of texts.
    Texts(Box<[Box<str>]>),
}

/// The claims that are kept, each with its name.
pub type Claims = Arc<[(Arc<str>, Claim)]>;

/// The longest text that is kept, in bytes.
const TEXT_MAX: usize = 256;
/// The longest list.
const LIST_MAX: usize = 128;
/// So many bytes of text are kept of one token; there may be 65,536 tokens.
const BYTES_MAX: usize = 4 << 10;

/// The claims of these names that `all` has, as far as there is room, in the order of the names.
pub fn kept(all: &Map<String, Value>, names: &[Arc<str>]) -> Claims {
    let mut room = BYTES_MAX;
    let mut fits = |claim: &Claim| {
        let left = room.checked_sub(claim.bytes());
        room = left.unwrap_or(room);
        left.is_some()
    };
    let found = names.iter().filter_map(|name| Some((name.clone(), Claim::of(named(all, name)?)?)));
    found.filter(|(_, claim)| fits(claim)).collect()
}

/// A claim: its name to the letter, or the way through objects.
pub fn named<'a>(all: &'a Map<String, Value>, name: &str) -> Option<&'a Value> {
    all.get(name).or_else(|| {
        let mut parts = name.split('.');
        let first = all.get(parts.next()?)?;
        parts.try_fold(first, |value, part| value.get(part))
    })
}

impl Claim {
    fn of(value: &Value) -> Option<Self> {
        match value {
            Value::String(text) => short(text).map(Self::Text),
            Value::Bool(flag) => Some(Self::Flag(*flag)),
            Value::Number(number) => number.as_i64().map(Self::Number),
            Value::Array(list) if list.len() <= LIST_MAX => {
                let texts: Option<_> = list.iter().map(|value| value.as_str().and_then(short)).collect();
                texts.map(Self::Texts)
            }
            _ => None,
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::Text(text) => text.len(),
            Self::Texts(texts) => texts.iter().map(|text| text.len()).sum(),
            Self::Number(_) | Self::Flag(_) => 0,
        }
    }
}

fn short(text: &str) -> Option<Box<str>> {
    (text.len() <= TEXT_MAX).then(|| text.into())
}

/// What a claim says is its bearer's: no log shows it.
impl fmt::Debug for Claim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Claim")
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn of(claims: Value, names: &[&str]) -> Vec<(String, Claim)> {
        let names: Vec<Arc<str>> = names.iter().map(|name| (*name).into()).collect();
        let Value::Object(claims) = claims else { panic!("no object") };
        kept(&claims, &names).iter().map(|(name, claim)| (name.to_string(), claim.clone())).collect()
    }

    #[test]
    fn what_is_asked_for_is_kept_and_nothing_else() {
        let claims = json!({"team": "search", "level": 3, "staff": true, "realm": {"roles": ["a", "b"]}, "a.b": "c",
            "email": "alice@corp.test"});
        let found = of(claims, &["a.b", "level", "none", "realm.roles", "staff", "team"]);
        let expected = [
            ("a.b", Claim::Text("c".into())),
            ("level", Claim::Number(3)),
            ("realm.roles", Claim::Texts(["a".into(), "b".into()].into())),
            ("staff", Claim::Flag(true)),
            ("team", Claim::Text("search".into())),
        ];
        assert_eq!(found, expected.map(|(name, claim)| (name.to_owned(), claim)));
    }

    #[test]
    fn what_does_not_fit_is_left_out_whole() {
        let texts = |count: usize, length: usize| json!(vec!["x".repeat(length); count]);
        for (value, fits) in [
            (json!("x".repeat(TEXT_MAX)), true),
            (json!("x".repeat(TEXT_MAX + 1)), false),
            (texts(LIST_MAX, 8), true),
            (texts(LIST_MAX + 1, 8), false),
            (texts(16, TEXT_MAX), true),
            (texts(17, TEXT_MAX), false),
            (json!(["x", 1]), false),
            (json!(1.5), false),
            (json!(u64::MAX), false),
            (json!({"x": "y"}), false),
            (Value::Null, false),
        ] {
            assert_eq!(of(json!({"c": value}), &["c"]).len(), usize::from(fits), "{value}");
        }
        let both = json!({"a": texts(10, TEXT_MAX), "b": texts(10, TEXT_MAX), "c": "short"});
        let names: Vec<String> = of(both, &["a", "b", "c"]).into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["a", "c"], "all of them together fit");
    }

    #[test]
    fn no_log_shows_what_a_claim_says() {
        assert!(!format!("{:?}", of(json!({"team": "canary"}), &["team"])).contains("canary"));
    }
}
