//! What a text is about, in microseconds on the processor: static embeddings, and heads over them.
//!
//! No transformer runs here. A token has one row in a table that was distilled from all-MiniLM-L6-v2 (`model/NOTICE`),
//! a text is the sum of its rows, and a head is a product with it. That is nearly as good as the transformer where a
//! route or a topic is told by example (the README has the figures), a thousand times cheaper, and blind to word
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
