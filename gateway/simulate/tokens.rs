//! Tokens without a vocabulary: how many a prompt has, their ids, and the words of an answer.

use std::borrow::Cow;
use std::hash::{DefaultHasher, Hash, Hasher};

/// The longest token, in bytes; a character of UTF-8 always fits.
const LONGEST: usize = 4;

/// The tokens of a text: up to four bytes each, never ending within a character.
pub(super) fn split(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let (token, left) = rest.split_at(rest.floor_char_boundary(LONGEST));
        rest = left;
        Some(token)
    })
}

/// How many tokens a text has.
pub(super) fn count(text: &str) -> u64 {
    if text.is_ascii() {
        return text.len().div_ceil(LONGEST) as u64;
    }
    split(text).count() as u64
}

/// The id of a token: its bytes as a number, so that every id can be turned back.
///
/// Bijective base 256: one-byte tokens have the ids from 1, two-byte tokens follow, and so on.
pub(super) fn id(token: &str) -> u64 {
    token.bytes().fold(0, |id, byte| id * 256 + u64::from(byte) + 1)
}

/// The bytes of a token by its id; none for an id that no text of up to four bytes has.
pub(super) fn bytes(mut id: u64) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(LONGEST);
    while id > 0 {
        bytes.push(((id - 1) % 256) as u8);
        id = (id - 1) / 256;
    }
    bytes.reverse();
    (bytes.len() <= LONGEST).then_some(bytes)
}

/// The text of token ids, as far as it is UTF-8.
pub(super) fn text(ids: &[u64]) -> Option<String> {
    let mut all = Vec::with_capacity(ids.len() * LONGEST);
    for id in ids {
        all.extend(bytes(*id)?);
    }
    Some(String::from_utf8_lossy(&all).into_owned())
}

/// A number that depends on all of `parts` and on nothing else.
pub(super) fn hash(parts: impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    parts.hash(&mut hasher);
    hasher.finish()
}

/// How many prompt words an answer repeats.
const QUOTED: usize = 12;

const FILLER: [&str; 48] = [
    " the",
    " model",
    " reads",
    " each",
    " word",
    " and",
    " answers",
    " with",
    " a",
    " steady",
    " stream",
    " of",
    " tokens",
    " that",
    " nobody",
    " has",
    " to",
    " believe",
    " because",
    " this",
    " server",
    " only",
    " pretends",
    " it",
    " counts",
    " what",
    " comes",
    " in",
    " keeps",
    " time",
    " fills",
    " its",
    " cache",
    " waits",
    " for",
    " room",
    " then",
    " speaks",
    " again",
    " until",
    " limit",
    " ends",
    " here",
    " as",
    " any",
    " real",
    " one",
    " would",
];

const WIDE: [&str; 12] =
    ["😀", " 你好", "🚀", "世界", " é", "こんにちは", "👩‍💻", " ñandú", "한국어", "🇩🇪", " ёлка", "数据"];

/// The words of one answer, in order and without end.
#[derive(Clone, Debug)]
pub(super) struct Words {
    opening: std::vec::IntoIter<String>,
    seed: u64,
    in_sentence: u32,
    wide: bool,
}

impl Words {
    /// Words that follow from `seed` alone; they begin with what was `said`.
    pub(super) fn new(said: &str, seed: u64, wide: bool) -> Self {
        let mut opening = vec!["You".to_owned(), " said".to_owned(), ":".to_owned()];
        let words = said.split_whitespace().take(QUOTED);
        opening.extend(words.map(|word| format!(" {}", shortened(word))));
        opening.push(".".to_owned());
        Self { opening: opening.into_iter(), seed, in_sentence: 0, wide }
    }

    fn random(&mut self, below: usize) -> usize {
        self.seed = self.seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.seed >> 33) as usize % below
    }
}

fn shortened(word: &str) -> &str {
    &word[..word.floor_char_boundary(24)]
}

impl Iterator for Words {
    type Item = Cow<'static, str>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.wide {
            let at = self.random(WIDE.len());
            return Some(WIDE[at].into());
        }
        if let Some(word) = self.opening.next() {
            return Some(word.into());
        }
        self.in_sentence += 1;
        if self.in_sentence > 6 && self.random(4) == 0 {
            self.in_sentence = 0;
            return Some(".".into());
        }
        let at = self.random(FILLER.len());
        Some(FILLER[at].into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_text_survives_its_tokens() {
        for said in ["", "a", "hello world", "日本語 and 😀 emoji\0\u{1}", "ÿþ\u{10ffff}"] {
            let ids: Vec<u64> = split(said).map(id).collect();
            assert_eq!(text(&ids).unwrap(), said);
            assert_eq!(ids.len() as u64, count(said));
        }
        assert_eq!(bytes(u64::MAX), None);
    }

    #[test]
    fn words_depend_on_the_seed_and_begin_with_what_was_said() {
        let answer = |seed| Words::new("hello there", seed, false).take(40).collect::<String>();
        assert_eq!(answer(1), answer(1));
        assert_ne!(answer(1), answer(2));
        assert!(answer(1).starts_with("You said: hello there. "));
    }
}
