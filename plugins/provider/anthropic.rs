//! Anthropic's own API.

use super::{Credential, Provider, Reason};
use crate::operation::Operation;

/// Anthropic.
#[derive(Debug)]
pub struct Anthropic;

impl Provider for Anthropic {
    fn kind(&self) -> &'static str {
        "anthropic"
    }

    fn credential(&self, key: &str) -> Credential {
        Credential { name: "x-api-key", value: key.to_owned() }
    }

    /// Source: Anthropic's API reference, "Versioning"; the header is required on every call.
    fn required_headers(&self) -> &'static [(&'static str, &'static str)] {
        &[("anthropic-version", "2023-06-01")]
    }

    fn serves(&self, operation: Operation) -> bool {
        use Operation::{CountTokens, Messages, Passthrough};
        matches!(operation, Messages | CountTokens | Passthrough)
    }

    fn health_path(&self) -> &'static str {
        "/v1/models"
    }

    fn reason(&self, status: u16, body: &[u8]) -> Option<Reason> {
        let too_long = status == 400 && String::from_utf8_lossy(body).contains("prompt is too long");
        too_long.then_some(Reason::ContextLength)
    }
}
