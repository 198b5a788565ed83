//! Hugging Face's Text Generation Inference, with its own `/generate` beside OpenAI's paths.

use super::Provider;
use crate::operation::Operation;

/// TGI.
#[derive(Debug)]
pub struct Tgi;

impl Provider for Tgi {
    fn kind(&self) -> &'static str {
        "tgi"
    }

    fn serves(&self, operation: Operation) -> bool {
        use Operation::{Chat, Completions, Embeddings, Generate, Passthrough, Tokenize};
        matches!(operation, Chat | Completions | Embeddings | Generate | Passthrough | Tokenize)
    }
}
