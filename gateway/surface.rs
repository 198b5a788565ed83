//! The table of endpoints: path -> operation, how the body is framed, whose error envelope, how it streams.
//!
//! Every row runs through the same pipeline; what differs between endpoints is data, here.

use http::Method;
use infergate_plugins::operation::Operation;

/// One row: an endpoint and all that the pipeline must know of it.
#[derive(Debug, PartialEq, Eq)]
pub struct Surface {
    /// The path, without any prefix that the policy strips.
    pub path: &'static str,
    /// The only method it answers.
    pub method: Method,
    /// What is asked of the model.
    pub operation: Operation,
    /// How the request's body is framed.
    pub body: Body,
    /// Whose words a refusal uses.
    pub dialect: Dialect,
}

/// How a request's body is framed, and so where the model's name is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Body {
    /// A JSON object with the model under `model`.
    Json,
    /// A multipart form with the model in the part `model`.
    Multipart,
    /// No body; the model is the query's `model`, or the policy's default.
    None,
    /// Whatever it is, it is not read.
    Opaque,
}

/// Whose envelope an error wears.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    /// `{"error": {"message", "type", "param", "code"}}`
    OpenAi,
    /// The same, but on a stream a named event: `{"type": "error", "code", "message", "param"}`
    Responses,
    /// `{"type": "error", "error": {"type", "message"}}`
    Anthropic,
    /// `{"error", "error_type"}`
    Tgi,
}

const fn row(method: Method, path: &'static str, operation: Operation, body: Body, dialect: Dialect) -> Surface {
    Surface { path, method, operation, body, dialect }
}

const fn json(path: &'static str, operation: Operation) -> Surface {
    row(Method::POST, path, operation, Body::Json, Dialect::OpenAi)
}

const fn local(path: &'static str, operation: Operation) -> Surface {
    row(Method::GET, path, operation, Body::None, Dialect::OpenAi)
}

/// Every endpoint, in the order in which people ask for them.
pub static TABLE: &[Surface] = &[
    json("/v1/chat/completions", Operation::Chat),
    json("/v1/completions", Operation::Completions),
    json("/v1/embeddings", Operation::Embeddings),
    row(Method::POST, "/v1/responses", Operation::Responses, Body::Json, Dialect::Responses),
    row(Method::POST, "/v1/messages", Operation::Messages, Body::Json, Dialect::Anthropic),
    row(Method::POST, "/v1/messages/count_tokens", Operation::CountTokens, Body::Json, Dialect::Anthropic),
    json("/v1/rerank", Operation::Rerank),
    json("/v1/score", Operation::Score),
    json("/v1/pooling", Operation::Pooling),
    row(Method::POST, "/v1/audio/transcriptions", Operation::Transcription, Body::Multipart, Dialect::OpenAi),
    row(Method::POST, "/v1/audio/translations", Operation::Transcription, Body::Multipart, Dialect::OpenAi),
    json("/v1/audio/speech", Operation::Speech),
    json("/v1/images/generations", Operation::Images),
    json("/v1/moderations", Operation::Moderation),
    json("/tokenize", Operation::Tokenize),
    json("/detokenize", Operation::Tokenize),
    row(Method::POST, "/generate", Operation::Generate, Body::Json, Dialect::Tgi),
    row(Method::POST, "/generate_stream", Operation::Generate, Body::Json, Dialect::Tgi),
    row(Method::GET, "/info", Operation::Generate, Body::None, Dialect::Tgi),
    row(Method::GET, "/v1/realtime", Operation::Realtime, Body::None, Dialect::OpenAi),
    local("/v1/models", Operation::Models),
    local("/health", Operation::Status),
    local("/ping", Operation::Status),
    local("/version", Operation::Status),
];

/// What a policy's pass-through path is: unread, but in the same pipeline.
pub static PASSTHROUGH: Surface = row(Method::POST, "*", Operation::Passthrough, Body::Opaque, Dialect::OpenAi);

/// Requests whose path is nobody's, so that their refusals have a row too.
pub static UNKNOWN: Surface = row(Method::POST, "unknown", Operation::Passthrough, Body::Opaque, Dialect::OpenAi);

/// The same where the caller speaks Anthropic's dialect.
pub static UNKNOWN_ANTHROPIC: Surface =
    row(Method::POST, "unknown", Operation::Passthrough, Body::Opaque, Dialect::Anthropic);

/// The row for `path`, whatever the method.
pub fn find(path: &str) -> Option<&'static Surface> {
    TABLE.iter().find(|surface| surface.path == path)
}

impl Surface {
    /// Whether the answer is a stream although the body need not say so.
    pub fn always_streams(&self) -> bool {
        self.path == "/generate_stream"
    }

    /// Whether the gateway answers itself, without an upstream.
    pub fn is_local(&self) -> bool {
        matches!(self.operation, Operation::Models | Operation::Status)
    }

    /// The row's place among the metrics: rows of [`TABLE`], then the pass-through, then the unknown.
    pub fn index(&self) -> usize {
        match self.path {
            "*" => TABLE.len(),
            _ => TABLE.iter().position(|row| std::ptr::eq(row, self)).unwrap_or(TABLE.len() + 1),
        }
    }
}

/// How many values [`Surface::index`] has.
pub const ROWS: usize = TABLE_LEN + 2;
const TABLE_LEN: usize = 24;
const _: () = assert!(TABLE.len() == TABLE_LEN);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_path_stands_twice() {
        for (index, row) in TABLE.iter().enumerate() {
            assert_eq!(find(row.path).map(Surface::index), Some(index), "{}", row.path);
        }
    }

    #[test]
    fn a_path_is_found_only_as_it_is_written() {
        assert!(find("/v1/chat/completions/").is_none());
        assert!(find("/V1/chat/completions").is_none());
        assert!(find("/v1/chat/completions").is_some());
    }
}
