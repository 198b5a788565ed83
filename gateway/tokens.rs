//! How many tokens a text has, counted instead of estimated: of a prompt that is near a hard limit, and of an answer
//! whose upstream does not say it.
//!
//! A vocabulary takes a third of a second and thirty megabytes to load, so it is loaded beside the requests, by the
//! first that asks for it; until it is there, nothing is counted and the estimate stands.

mod said;

use std::panic::catch_unwind;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use infergate_plugins::operation::Operation;
use schemars::JsonSchema;
use serde::Deserialize;
use tiktoken_rs::CoreBPE;
use tiktoken_rs::tokenizer::{Tokenizer as Known, get_tokenizer};

pub use self::said::Said;
use crate::scan;
use crate::text;

/// How the tokens of a model's texts are counted, where its upstreams do not say how many there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Tokenizer {
    /// By the name that the upstream knows it by, as OpenAI's tokenizers are listed. A name that is not listed: answers
    /// with `o200k`, which is near for most models; prompts are estimated from what the upstream reports.
    #[default]
    Auto,
    /// OpenAI's vocabulary of GPT-4o, GPT-4.1, GPT-5, the o-series and gpt-oss.
    O200k,
    /// OpenAI's vocabulary of GPT-4 and GPT-3.5, and of its embeddings.
    Cl100k,
    /// Not at all: what upstreams do not say is estimated.
    None,
}

/// How one model's texts are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Encoding {
    vocabulary: Vocabulary,
    /// Whether the model is known to have it; otherwise it is near.
    pub is_its_own: bool,
}

/// A vocabulary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Vocabulary {
    O200k,
    Cl100k,
}

impl Tokenizer {
    /// How the texts of the model are counted that its upstream knows by `name`.
    pub fn of(self, name: &str) -> Option<Encoding> {
        let own = |vocabulary| Some(Encoding { vocabulary, is_its_own: true });
        match self {
            Self::None => None,
            Self::O200k => own(Vocabulary::O200k),
            Self::Cl100k => own(Vocabulary::Cl100k),
            Self::Auto => match listed(name) {
                Some(vocabulary) => own(vocabulary),
                None => Some(Encoding { vocabulary: Vocabulary::O200k, is_its_own: false }),
            },
        }
    }
}

/// The vocabulary that OpenAI's list has for a model, whoever serves it.
fn listed(name: &str) -> Option<Vocabulary> {
    match get_tokenizer(name.rsplit('/').next().unwrap_or(name))? {
        Known::O200kBase | Known::O200kHarmony => Some(Vocabulary::O200k),
        Known::Cl100kBase => Some(Vocabulary::Cl100k),
        _ => None,
    }
}

/// The longest text that is taken as one, in bytes. A longer one is cut, which makes a token more of it at each cut: a
/// word of a megabyte must not take seconds.
const PIECE: usize = 16 << 10;
/// A chat template adds so many tokens to each message, near enough, and to the whole.
const MESSAGE: u64 = 4;

impl Encoding {
    /// How many tokens `text` has. `None` while the vocabulary is not loaded, or where it cannot be counted.
    pub fn count(self, text: &str) -> Option<u64> {
        let words = self.vocabulary.loaded()?;
        let mut rest = text;
        let mut tokens = 0;
        while !rest.is_empty() {
            let (piece, behind) = rest.split_at(rest.floor_char_boundary(PIECE));
            // The crate's regular expression may give up, and the crate with it.
            tokens += catch_unwind(|| words.encode_ordinary(piece).len()).ok()? as u64;
            rest = behind;
        }
        Some(tokens)
    }

    /// How many tokens the prompt has that the request `body` to `operation` brings, templates included. `None` where
    /// something in it is no text.
    pub fn prompt(self, operation: Operation, body: &[u8]) -> Option<u64> {
        let (images, _) = text::extras(body);
        let texts = text::prompt(operation, body).ok().filter(|_| images == 0)?;
        let mut tokens = MESSAGE * (1 + u64::from(texts.iter().map(|text| text.turn).max().unwrap_or_default()));
        for text in &texts {
            tokens += self.count(&text::unescaped(body, text)?)?;
        }
        for (_, tools) in scan::members(body)?.iter().filter(|(name, _)| name == "tools" || name == "functions") {
            tokens += self.count(std::str::from_utf8(body.get(tools.clone())?).ok()?)?;
        }
        Some(tokens)
    }

    /// Loads the vocabulary, and waits for that.
    pub fn load(self) {
        self.vocabulary.load();
    }
}

/// A vocabulary's words, and whether somebody loads them.
struct Slot {
    words: OnceLock<Option<CoreBPE>>,
    begun: AtomicBool,
}

static SLOTS: [Slot; 2] = [const { Slot { words: OnceLock::new(), begun: AtomicBool::new(false) } }; 2];

impl Vocabulary {
    /// Its words, if they are there; otherwise they will be soon.
    fn loaded(self) -> Option<&'static CoreBPE> {
        let slot = &SLOTS[self as usize];
        if let Some(words) = slot.words.get() {
            return words.as_ref();
        }
        if !slot.begun.swap(true, Ordering::Relaxed) {
            let loading = std::thread::Builder::new().name("vocabulary".to_owned()).spawn(move || self.load());
            loading.map_or_else(|error| tracing::error!(%error, "a vocabulary cannot be loaded"), drop);
        }
        None
    }

    fn load(self) {
        SLOTS[self as usize].words.get_or_init(|| {
            let read = match self {
                Self::O200k => tiktoken_rs::o200k_base(),
                Self::Cl100k => tiktoken_rs::cl100k_base(),
            };
            read.inspect_err(|error| tracing::error!(%error, vocabulary = ?self, "a vocabulary cannot be loaded")).ok()
        });
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    fn o200k() -> Encoding {
        let encoding = Tokenizer::O200k.of("any").unwrap();
        encoding.load();
        encoding
    }

    #[test]
    fn a_models_name_says_how_its_tokens_are_counted_unless_the_policy_does() {
        let own = |vocabulary| Some(Encoding { vocabulary, is_its_own: true });
        for (name, vocabulary) in [
            ("gpt-4o-2024-08-06", Vocabulary::O200k),
            ("openai/gpt-oss-120b", Vocabulary::O200k),
            ("gpt-4", Vocabulary::Cl100k),
            ("text-embedding-3-small", Vocabulary::Cl100k),
        ] {
            assert_eq!(Tokenizer::Auto.of(name), own(vocabulary), "{name}");
            assert_eq!(Tokenizer::Cl100k.of(name), own(Vocabulary::Cl100k));
            assert_eq!(Tokenizer::None.of(name), None);
        }
        assert!(!Tokenizer::Auto.of("meta-llama/Llama-3-70B").unwrap().is_its_own);
    }

    #[test]
    fn a_text_has_the_tokens_that_openai_counts() {
        let texts = ["hello world", "The quick brown fox jumps over the lazy dog.", ""];
        assert_eq!(texts.map(|text| o200k().count(text)), [Some(2), Some(10), Some(0)]);
        let cl100k = Tokenizer::Cl100k.of("any").unwrap();
        cl100k.load();
        // From OpenAI's cookbook.
        assert_eq!(cl100k.count("tiktoken is great!"), Some(6));
    }

    #[test]
    fn a_text_that_is_made_to_be_slow_is_not() {
        let most = 256 << 10;
        for unit in ["a", " ", "\n \t", "'s", "\u{4e2d}", "0", "\u{301}", "aA"] {
            let text = unit.repeat(most / unit.len());
            let began = Instant::now();
            assert!(o200k().count(&text).is_some_and(|tokens| tokens > 0), "{unit:?}");
            assert!(began.elapsed() < Duration::from_secs(5), "{unit:?} took {:?}", began.elapsed());
        }
    }

    #[test]
    fn a_prompt_is_counted_with_its_messages_and_tools_and_not_where_it_has_images() {
        let body =
            br#"{"model":"m","messages":[{"role":"system","content":"hello"},{"role":"user","content":"w\u006frld"}]}"#;
        let plain = o200k().prompt(Operation::Chat, body).unwrap();
        assert_eq!(plain, 2 + 3 * MESSAGE);
        let tools = br#"{"tools":[{"type":"function"}],"messages":[{"role":"user","content":"hello"}]}"#;
        assert!(o200k().prompt(Operation::Chat, tools).unwrap() > 1 + 2 * MESSAGE + 4);
        let image = br#"{"messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":"x"}}]}]}"#;
        assert_eq!(o200k().prompt(Operation::Chat, image), None);
    }
}
