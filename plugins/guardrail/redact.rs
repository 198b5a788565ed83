//! What comes in the place of text that must not be seen, and how an answer gets the original back.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::ops::Bound;

use aws_lc_rs::hmac;
use schemars::JsonSchema;
use serde::Deserialize;

use super::stream::{Edit, Progress};

/// What comes in the place of a match.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[schemars(rename = "Redaction")]
#[serde(rename_all = "lowercase")]
pub enum Redaction {
    /// What it is, in brackets: `[EMAIL]`.
    #[default]
    Label,
    /// A star for each letter and digit; signs and spaces stay: `***@*******.***`.
    Mask,
    /// What it is and a keyed hash, the same for the same text while the policy's key is: `[EMAIL:5f0c2a9be1d4]`.
    Hash,
    /// Nothing.
    Drop,
    /// A placeholder such as `<EMAIL_1>`, which the answer turns into the original again. Only for prompts.
    Placeholder,
}

/// A way to redact that has all it needs.
#[derive(Clone, Debug)]
pub(crate) enum Style {
    Label,
    Mask,
    Hash(Box<hmac::Key>),
    Drop,
    Placeholder,
}

impl Style {
    pub fn new(redaction: Redaction, key: &[u8]) -> Self {
        match redaction {
            Redaction::Label => Self::Label,
            Redaction::Mask => Self::Mask,
            Redaction::Hash => Self::Hash(Box::new(hmac::Key::new(hmac::HMAC_SHA256, key))),
            Redaction::Drop => Self::Drop,
            Redaction::Placeholder => Self::Placeholder,
        }
    }

    pub fn replace(&self, label: &str, original: &str, placeholders: &mut Placeholders) -> String {
        match self {
            Self::Label => format!("[{}]", token(label)),
            Self::Mask => original.chars().map(|c| if c.is_alphanumeric() { '*' } else { c }).collect(),
            Self::Hash(key) => hashed(key, label, original),
            Self::Drop => String::new(),
            Self::Placeholder => placeholders.hide(label, original),
        }
    }
}

fn hashed(key: &hmac::Key, label: &str, original: &str) -> String {
    let tag = hmac::sign(key, original.as_bytes());
    let mut text = format!("[{}:", token(label));
    for byte in tag.as_ref().iter().take(6) {
        let _ = write!(text, "{byte:02x}");
    }
    text + "]"
}

/// A label as one word in capitals that models copy as it is.
fn token(label: &str) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_uppercase() } else { '_' };
    label.chars().take(LABEL_MAX).map(plain).collect()
}

const LABEL_MAX: usize = 40;

/// The originals behind the placeholders of one exchange. They live as long as it and are never shown.
#[derive(Clone, Default)]
pub struct Placeholders {
    originals: BTreeMap<String, String>,
    known: BTreeMap<(String, String), String>,
    /// The highest number that is taken, by label.
    numbers: BTreeMap<String, u64>,
}

impl std::fmt::Debug for Placeholders {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.originals.keys()).finish()
    }
}

impl Placeholders {
    /// Whether none was given out.
    pub fn is_empty(&self) -> bool {
        self.originals.is_empty()
    }

    /// Keeps clear of what looks like a placeholder in a text of the exchange already. All texts are to be shown before
    /// the first is redacted.
    pub fn avoid(&mut self, text: &str) {
        for at in memchr::memchr_iter(b'<', text.as_bytes()) {
            if let Some((label, number)) = looks_like_one(&text[at..]) {
                let highest = self.numbers.entry(label.to_owned()).or_default();
                *highest = number.max(*highest);
            }
        }
    }

    /// The placeholder for an original: the same for the same.
    pub fn hide(&mut self, label: &str, original: &str) -> String {
        let label = token(label);
        let key = (label, original.to_owned());
        if let Some(placeholder) = self.known.get(&key) {
            return placeholder.clone();
        }
        let number = self.numbers.entry(key.0.clone()).or_default();
        *number = number.saturating_add(1);
        let placeholder = format!("<{}_{number}>", key.0);
        self.originals.insert(placeholder.clone(), original.to_owned());
        self.known.insert(key, placeholder.clone());
        placeholder
    }

    /// The original behind a placeholder.
    pub fn original(&self, placeholder: &str) -> Option<&str> {
        self.originals.get(placeholder).map(String::as_str)
    }

    /// Whether a placeholder begins with this.
    fn begins(&self, text: &str) -> bool {
        let next = self.originals.range::<str, _>((Bound::Included(text), Bound::Unbounded)).next();
        next.is_some_and(|(placeholder, _)| placeholder.starts_with(text))
    }
}

/// Label and number of what looks like a placeholder.
fn looks_like_one(text: &str) -> Option<(&str, u64)> {
    let inner = text.strip_prefix('<')?;
    let inner = &inner[..inner.bytes().take(LABEL_MAX + 21).position(|byte| byte == b'>')?];
    let (label, number) = inner.rsplit_once('_')?;
    let wanted = label.bytes().all(|byte| byte.is_ascii_uppercase() || byte.is_ascii_digit() || byte == b'_');
    let number: u64 = number.parse().ok()?;
    // The highest numbers are left alone, or one text could use them all up.
    (wanted && !label.is_empty() && number < u64::MAX / 2).then_some((label, number))
}

/// Puts originals back into a text that comes in pieces. Only what may be the beginning of a placeholder that was
/// given out is held.
#[derive(Debug, Default)]
pub struct Restorer {
    held: String,
    base: u64,
}

impl Restorer {
    /// Takes the next piece. `progress` is overwritten; there are edits and what is released.
    pub fn push(&mut self, piece: &str, placeholders: &Placeholders, progress: &mut Progress) {
        progress.edits.clear();
        progress.found.clear();
        let held = std::mem::take(&mut self.held);
        let joined = if held.is_empty() { None } else { Some(held + piece) };
        let text = joined.as_deref().unwrap_or(piece);
        let kept = self.walk(text, placeholders, progress);
        self.base += kept as u64;
        self.held.push_str(&text[kept..]);
        progress.released = self.base;
    }

    /// The text is at its end: what is held leaves as it is.
    pub fn finish(&mut self, progress: &mut Progress) {
        progress.edits.clear();
        progress.found.clear();
        self.base += self.held.len() as u64;
        self.held.clear();
        progress.released = self.base;
    }

    /// Finds placeholders; returns where the first possible one begins that is not complete.
    fn walk(&self, text: &str, placeholders: &Placeholders, progress: &mut Progress) -> usize {
        let mut done = 0;
        for at in memchr::memchr_iter(b'<', text.as_bytes()) {
            if at < done {
                continue;
            }
            let rest = &text[at..];
            match rest.bytes().take(LABEL_MAX + 22).position(|byte| byte == b'>') {
                None if placeholders.begins(rest) => return at,
                Some(end) => {
                    let Some(original) = placeholders.original(&rest[..=end]) else { continue };
                    done = at + end + 1;
                    let range = self.base + at as u64..self.base + done as u64;
                    progress.edits.push(Edit { range, replacement: original.to_owned() });
                }
                None => {}
            }
        }
        text.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What comes out of a text in pieces.
    fn restored(placeholders: &Placeholders, pieces: &[&str]) -> String {
        let whole = pieces.concat();
        let (mut restorer, mut progress) = (Restorer::default(), Progress::default());
        let mut all = Progress::default();
        for piece in pieces {
            restorer.push(piece, placeholders, &mut progress);
            all.edits.append(&mut progress.edits);
            assert!(all.edits.iter().all(|edit| edit.range.end <= progress.released));
        }
        restorer.finish(&mut progress);
        all.released = progress.released;
        all.apply(&whole)
    }

    fn people() -> Placeholders {
        let mut placeholders = Placeholders::default();
        for (label, original) in [("email", "ann@a.example"), ("email", "bob@b.example"), ("phone", "555-0100")] {
            placeholders.hide(label, original);
        }
        placeholders
    }

    #[test]
    fn the_same_original_gets_the_same_placeholder() {
        let mut placeholders = people();
        assert_eq!(placeholders.hide("email", "ann@a.example"), "<EMAIL_1>");
        assert_eq!(placeholders.hide("email", "cay@c.example"), "<EMAIL_3>");
        assert_eq!(placeholders.hide("us-ssn", "078-05-1120"), "<US_SSN_1>");
    }

    #[test]
    fn originals_come_back_however_the_answer_is_cut() {
        let placeholders = people();
        let text = "<<EMAIL_1>, <EMAIL_2> or <PHONE_1>; <EMAIL_9> <EMAIL_1 é<";
        let expected = "<ann@a.example, bob@b.example or 555-0100; <EMAIL_9> <EMAIL_1 é<";
        for first in (0..=text.len()).filter(|at| text.is_char_boundary(*at)) {
            for second in (first..=text.len()).filter(|at| text.is_char_boundary(*at)) {
                let pieces = [&text[..first], &text[first..second], &text[second..]];
                assert_eq!(restored(&placeholders, &pieces), expected, "{pieces:?}");
            }
        }
    }

    #[test]
    fn only_what_may_become_a_placeholder_waits() {
        let placeholders = people();
        let (mut restorer, mut progress) = (Restorer::default(), Progress::default());
        for (piece, released) in [("a <EM", 2), ("AIL", 2), ("X", 9), ("<b", 11), ("<PHONE_", 11), ("1", 11), (">", 20)]
        {
            restorer.push(piece, &placeholders, &mut progress);
            assert_eq!(progress.released, released, "{piece}");
        }
    }

    #[test]
    fn what_the_caller_wrote_is_not_taken_for_a_placeholder_of_ours() {
        let mut placeholders = Placeholders::default();
        placeholders.avoid("template <EMAIL_7>, <b>, <_1>, <EMAIL_x> and <EMAIL_18446744073709551615>");
        assert_eq!(placeholders.hide("email", "ann@a.example"), "<EMAIL_8>");
        assert_eq!(restored(&placeholders, &["<EMAIL_7> <EMAIL_8>"]), "<EMAIL_7> ann@a.example");
    }

    #[test]
    fn styles_show_nothing_of_the_original() {
        let mut none = Placeholders::default();
        let with =
            |redaction| Style::new(redaction, b"key").replace("email", "ann@a.example", &mut Placeholders::default());
        assert_eq!(with(Redaction::Label), "[EMAIL]");
        assert_eq!(with(Redaction::Mask), "***@*.*******");
        assert_eq!(with(Redaction::Drop), "");
        let hash = with(Redaction::Hash);
        assert_eq!((hash.len(), &hash[..7]), ("[EMAIL:5f0c2a9be1d4]".len(), "[EMAIL:"));
        assert_ne!(hash, Style::new(Redaction::Hash, b"other").replace("email", "ann@a.example", &mut none));
        assert!(!format!("{:?}", people()).contains("ann@"));
    }
}
