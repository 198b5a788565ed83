//! Azure OpenAI's v1 API: OpenAI's paths under `/openai`, another header for the key.

use super::openai::OPENAI;
use super::{Credential, Provider};
use crate::operation::Operation;

/// Azure OpenAI. Its base URL ends in `/openai`.
#[derive(Debug)]
pub struct Azure;

impl Provider for Azure {
    fn kind(&self) -> &'static str {
        "azure"
    }

    fn credential(&self, key: &str) -> Credential {
        Credential { name: "api-key", value: key.to_owned() }
    }

    fn serves(&self, operation: Operation) -> bool {
        OPENAI.serves(operation)
    }

    fn takes_stream_options(&self) -> bool {
        OPENAI.takes_stream_options()
    }

    fn takes_max_completion_tokens(&self) -> bool {
        true
    }

    fn health_path(&self) -> &'static str {
        OPENAI.health_path()
    }
}
