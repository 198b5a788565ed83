//! Providers: how each family of model servers wants to be spoken to.

mod anthropic;
mod azure;
mod openai;
mod tgi;

use std::fmt::Debug;
use std::sync::Arc;

use crate::operation::Operation;

/// The dialect of one family of model servers. Bodies pass untouched; this is about everything around them.
pub trait Provider: Debug + Send + Sync {
    /// The word for it in `policy.yaml`.
    fn kind(&self) -> &'static str;

    /// The header that carries an API key.
    fn credential(&self, key: &str) -> Credential {
        Credential { name: "authorization", value: format!("Bearer {key}") }
    }

    /// Headers that a request must have, set when the caller sent none: (lower-case name, value).
    fn required_headers(&self) -> &'static [(&'static str, &'static str)] {
        &[]
    }

    /// Whether this server can do `operation` at all. Routing passes over servers that cannot.
    fn serves(&self, operation: Operation) -> bool;

    /// Whether a stream of this server can be asked for its usage with `stream_options`.
    fn takes_stream_options(&self) -> bool {
        false
    }

    /// Whether a chat of this server is bounded by `max_completion_tokens` rather than `max_tokens`.
    fn takes_max_completion_tokens(&self) -> bool {
        false
    }

    /// The path of its health check.
    fn health_path(&self) -> &'static str {
        "/health"
    }

    /// Why an error answer was given, where the body tells: the policy may send such a request elsewhere.
    /// `body` is the beginning of the answer, at most 64 KiB.
    fn reason(&self, status: u16, body: &[u8]) -> Option<Reason> {
        openai::reason(status, body)
    }
}

/// A header with a key in it. It has no `Debug`: a key is never printed.
pub struct Credential {
    /// The header's lower-case name.
    pub name: &'static str,
    /// Its value, the key included.
    pub value: String,
}

/// Why a model server turned a request down although nothing is wrong with the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The prompt is longer than the model's context.
    ContextLength,
    /// The provider's own content filter refused.
    ContentFilter,
}

/// Makes one provider.
pub type Build = fn() -> Arc<dyn Provider>;

/// Every built-in provider: the word in `policy.yaml`, and the value.
pub const KINDS: &[(&str, Build)] = &[
    ("openai", || Arc::new(openai::OPENAI)),
    ("vllm", || Arc::new(openai::VLLM)),
    ("sglang", || Arc::new(openai::SGLANG)),
    ("tgi", || Arc::new(tgi::Tgi)),
    ("anthropic", || Arc::new(anthropic::Anthropic)),
    ("azure", || Arc::new(azure::Azure)),
];

/// The provider that `kind` names, if there is one.
///
/// ```
/// assert_eq!(infergate_plugins::provider::named("vllm").unwrap().kind(), "vllm");
/// assert!(infergate_plugins::provider::named("vlm").is_none());
/// ```
pub fn named(kind: &str) -> Option<Arc<dyn Provider>> {
    KINDS.iter().find(|(name, _)| *name == kind).map(|(_, build)| build())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_is_found_by_its_own_name() {
        for (name, build) in KINDS {
            assert_eq!(build().kind(), *name);
        }
    }

    #[test]
    fn each_dialect_carries_a_key_its_own_way() {
        let header = |kind| {
            let credential = named(kind).unwrap().credential("k");
            format!("{}: {}", credential.name, credential.value)
        };
        assert_eq!(header("openai"), "authorization: Bearer k");
        assert_eq!(header("anthropic"), "x-api-key: k");
        assert_eq!(header("azure"), "api-key: k");
    }
}
