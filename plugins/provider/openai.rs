//! OpenAI, and the open servers that speak its HTTP: vLLM and SGLang.

use super::{Provider, Reason};
use crate::operation::Operation;

/// A server of the OpenAI family; they differ in their extras.
#[derive(Debug)]
pub struct OpenAi {
    kind: &'static str,
    health_path: &'static str,
    lacks: &'static [Operation],
}

/// OpenAI itself, and clouds that copy it.
pub const OPENAI: OpenAi = OpenAi {
    kind: "openai",
    health_path: "/v1/models",
    lacks: &[
        Operation::Messages,
        Operation::CountTokens,
        Operation::Rerank,
        Operation::Score,
        Operation::Pooling,
        Operation::Tokenize,
        Operation::Generate,
    ],
};

/// vLLM.
pub const VLLM: OpenAi = OpenAi { kind: "vllm", health_path: "/health", lacks: &[Operation::Generate] };

/// SGLang.
pub const SGLANG: OpenAi = OpenAi { kind: "sglang", health_path: "/health", lacks: &[] };

impl Provider for OpenAi {
    fn kind(&self) -> &'static str {
        self.kind
    }

    fn serves(&self, operation: Operation) -> bool {
        !self.lacks.contains(&operation)
    }

    fn takes_stream_options(&self) -> bool {
        true
    }

    fn takes_max_completion_tokens(&self) -> bool {
        self.kind == "openai"
    }

    fn health_path(&self) -> &'static str {
        self.health_path
    }
}

/// The words by which the family says that a prompt is too long or was filtered. OpenAI gives a `code`;
/// vLLM, SGLang and TGI only a sentence.
pub(super) fn reason(status: u16, body: &[u8]) -> Option<Reason> {
    const TOO_LONG: &[&str] =
        &["context_length_exceeded", "maximum context length", "longer than the model's context", "`inputs` tokens"];
    const FILTERED: &[&str] = &["content_filter", "content_policy_violation", "ResponsibleAIPolicyViolation"];
    if !matches!(status, 400 | 403 | 413 | 422) {
        return None;
    }
    let text = String::from_utf8_lossy(body);
    let says = |words: &[&str]| words.iter().any(|word| text.contains(word));
    match () {
        () if says(TOO_LONG) => Some(Reason::ContextLength),
        () if says(FILTERED) => Some(Reason::ContentFilter),
        () => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prompt_too_long_is_known_by_code_and_by_sentence() {
        let openai = br#"{"error":{"code":"context_length_exceeded","message":"..."}}"#;
        let vllm = br#"{"error":{"message":"This model's maximum context length is 4096 tokens."}}"#;
        assert_eq!(reason(400, openai), Some(Reason::ContextLength));
        assert_eq!(reason(400, vllm), Some(Reason::ContextLength));
    }

    #[test]
    fn an_answer_that_only_talks_about_contexts_is_no_refusal() {
        assert_eq!(reason(200, b"maximum context length"), None);
        assert_eq!(reason(400, br#"{"error":{"message":"temperature"}}"#), None);
    }

    #[test]
    fn a_filtered_prompt_is_known() {
        assert_eq!(reason(400, br#"{"error":{"code":"content_filter"}}"#), Some(Reason::ContentFilter));
    }
}
