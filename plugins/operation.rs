//! What a request asks a model to do, whatever the path it came in on.

/// One kind of work. The table of paths in the gateway maps each endpoint to one of these.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operation {
    /// `/v1/chat/completions`
    Chat,
    /// `/v1/completions`
    Completions,
    /// `/v1/embeddings`
    Embeddings,
    /// `/v1/responses`
    Responses,
    /// `/v1/messages`, Anthropic's
    Messages,
    /// `/v1/messages/count_tokens`
    CountTokens,
    /// `/v1/rerank`
    Rerank,
    /// `/v1/score`
    Score,
    /// `/v1/pooling`
    Pooling,
    /// `/v1/audio/transcriptions` and `/v1/audio/translations`
    Transcription,
    /// `/v1/audio/speech`
    Speech,
    /// `/v1/images/generations`
    Images,
    /// `/v1/moderations`
    Moderation,
    /// `/tokenize` and `/detokenize`
    Tokenize,
    /// `/generate`, `/generate_stream` and `/info`, TGI's own
    Generate,
    /// `/v1/realtime`, a WebSocket
    Realtime,
    /// `/v1/models`
    Models,
    /// `/health`, `/ping` and `/version`
    Status,
    /// A path that the policy passes through unread
    Passthrough,
}

impl Operation {
    /// OpenTelemetry's `gen_ai.operation.name` where it has one, else the nearest plain word.
    pub const fn name(self) -> &'static str {
        match self {
            // The conventions know three APIs by one name.
            Self::Chat | Self::Responses | Self::Messages => "chat",
            Self::Completions => "text_completion",
            Self::Embeddings => "embeddings",
            Self::CountTokens => "count_tokens",
            Self::Rerank => "rerank",
            Self::Score => "score",
            Self::Pooling => "pooling",
            Self::Transcription => "transcription",
            Self::Speech => "speech",
            Self::Images => "images",
            Self::Moderation => "moderation",
            Self::Tokenize => "tokenize",
            Self::Generate => "generate_content",
            Self::Realtime => "realtime",
            Self::Models => "models",
            Self::Status => "status",
            Self::Passthrough => "passthrough",
        }
    }
}
