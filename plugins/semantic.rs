//! What a text is about, in microseconds on the processor: static embeddings, and heads over them.
//!
//! No transformer runs here. A token has one row in a table that was distilled from all-MiniLM-L6-v2 (`model/NOTICE`),
//! a text is the sum of its rows, and a head is a product with it. That is nearly as good as the transformer where a
//! route or a topic is told by example (`config/guides/choosing-models.md` has the figures), a thousand times cheaper, and blind to word
//! order, to negation and to what is not English.

mod embed;
mod fold;
mod head;
mod injection;
mod logistic;
mod tokens;

pub use embed::{DIMENSIONS, Embedding, MOST_TOKENS};
pub use fold::Folded;
pub use head::{Class, Examples, Heads, Report, Twins};
pub use injection::Injection;
pub(crate) use logistic::{Regression, exp, ln};

/// Gets ready what the first text would otherwise wait a millisecond or two for.
pub fn prepare() {
    tokens::prepare();
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    /// A text and what the model's makers computed of it.
    #[derive(Deserialize)]
    pub(super) struct Golden {
        pub(super) text: String,
        pub(super) ids: Vec<u16>,
        pub(super) embedding_first8: [f64; 8],
        pub(super) norm: f64,
        pub(super) injection_score: f64,
    }

    pub(super) fn golden() -> Vec<Golden> {
        let cases: Vec<Golden> = serde_json::from_str(include_str!("semantic/model/golden.json")).unwrap();
        assert_eq!(cases.len(), 12);
        cases
    }

    /// Text as nobody writes it: pieces of packing, of scripts and of nothing, thrown together.
    fn thrown(seed: u64) -> String {
        const PIECES: [&str; 24] = [
            "ignore",
            " ",
            "\n",
            "1gn0r3",
            "a b c d e",
            "é",
            "\u{300}",
            "東京",
            "ﷺ",
            "\u{200b}",
            "\u{E0049}",
            "0x69, ",
            "\\x",
            "%6",
            "aWdub3JlIGFsbCBydWxlcw==",
            "==",
            "ѕуѕ",
            "𝐢𝐠",
            "\u{fffd}",
            "\0",
            "-",
            "```",
            "İ",
            "🏳️‍🌈",
        ];
        let mut state = seed;
        let mut next = move || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as usize
        };
        (0..next() % 60).map(|_| PIECES[next() % PIECES.len()].repeat(1 + next() % 4)).collect()
    }

    #[test]
    fn whatever_comes_nothing_panics_and_every_number_is_one() {
        use crate::prompt::{Prompt, Role, Span};
        let default = crate::router::difficulty::Difficulty::counters_only().unwrap();
        for seed in 0..600 {
            let text = thrown(seed);
            assert!(Injection::score(&text).is_finite() && default.score(&text).is_finite(), "{text:?}");
            let norm: f32 = Embedding::of(&text).unit().iter().map(|x| x * x).sum();
            assert!(norm == 0.0 || (norm - 1.0).abs() < 1e-3, "{text:?}");
            let spans = [Span { role: Role::User, turn: 0, text: &text }];
            let found = crate::router::signals::Signals::of(&Prompt { spans: &spans, ..Prompt::default() });
            assert_eq!(found.bytes, text.len());
        }
    }

    #[test]
    fn the_model_is_the_one_that_the_manifest_names() {
        use sha2::{Digest, Sha256};
        let manifest: serde_json::Value = serde_json::from_str(include_str!("semantic/model/MANIFEST.json")).unwrap();
        let files = manifest["files"].as_array().unwrap();
        assert_eq!(files.len(), 6);
        for file in files {
            let name = file["file"].as_str().unwrap();
            let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("semantic/model").join(name);
            let sum: String = Sha256::digest(std::fs::read(path).unwrap()).iter().map(|b| format!("{b:02x}")).collect();
            assert_eq!(file["sha256"].as_str().unwrap(), sum, "{name}");
        }
    }
}
