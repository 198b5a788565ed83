//! Every way we say no: status, error body in the caller's dialect, when to come back.

use std::borrow::Cow;
use std::time::Duration;

use http::StatusCode;
use serde_json::json;

use crate::surface::Dialect;

/// An answer of ours instead of the model's. We decided it, or no upstream could be asked.
#[derive(Debug)]
pub struct Refusal {
    /// What went wrong; it fixes status and type.
    pub code: Code,
    /// A sentence for the person who reads it: what happened and what to do.
    pub message: Cow<'static, str>,
    /// The request's field that is at fault.
    pub param: Option<Cow<'static, str>>,
    /// When it is worth asking again.
    pub retry_after: Option<Duration>,
    /// Whether the connection must be closed, because we cannot know where the next request begins.
    pub close: bool,
}

/// The refusals, one name each. The name is the `code` on the wire and the label on the metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Code {
    /// The head is ambiguous or malformed.
    BadRequest,
    /// The body is not what the endpoint takes.
    InvalidBody,
    /// A field that decides something stands twice.
    DuplicateField,
    /// Nobody knows who asks.
    InvalidApiKey,
    /// The caller may not use the model.
    ModelNotAllowed,
    /// The caller may not use the endpoint.
    SurfaceNotAllowed,
    /// The caller may not send the parameter.
    ParameterNotAllowed,
    /// The caller's key was revoked while the answer was on its way.
    KeyRevoked,
    /// A limit has too little left; it will have more.
    RateLimitExceeded,
    /// A budget is spent.
    InsufficientQuota,
    /// The request alone needs more than a limit ever has.
    RequestExceedsLimit,
    /// A limit on money holds, and the model has no price.
    ModelUnpriced,
    /// A guardrail found something in the prompt or in the answer.
    ContentFilter,
    /// A guardrail must read what it cannot read.
    ContentUnread,
    /// The path is nobody's.
    NotFound,
    /// The path exists, the method does not.
    MethodNotAllowed,
    /// No pool serves the model.
    ModelNotFound,
    /// The body is larger than the policy allows.
    RequestTooLarge,
    /// The body did not arrive in time.
    RequestTimeout,
    /// No room for another body, or the process is at its memory ceiling.
    Overloaded,
    /// No room for the request's record, which the policy insists on.
    AuditUnavailable,
    /// The store of shared limits is away, and the policy insists on it.
    LimitsUnavailable,
    /// The pool's queue is full.
    QueueFull,
    /// The pool's queue was too slow.
    QueueTimeout,
    /// Every upstream of the pool is out.
    NoUpstream,
    /// The upstream could not be reached.
    ConnectFailed,
    /// The upstream could not be reached in time.
    ConnectTimeout,
    /// The upstream closed without an answer.
    UpstreamClosed,
    /// The upstream answered something that is not HTTP.
    UpstreamInvalid,
    /// The first token did not come in time.
    FirstTokenTimeout,
    /// The answer did not begin in time.
    AnswerTimeout,
    /// The next token did not come in time.
    BetweenTokensTimeout,
    /// The whole request took too long.
    TotalTimeout,
    /// The request wants a protocol change that we do not do there.
    UpgradeUnsupported,
    /// Something of ours broke.
    Internal,
}

/// Every code, for the metrics and the tests.
pub const CODES: &[Code] = &[
    Code::BadRequest,
    Code::InvalidBody,
    Code::DuplicateField,
    Code::InvalidApiKey,
    Code::ModelNotAllowed,
    Code::SurfaceNotAllowed,
    Code::ParameterNotAllowed,
    Code::KeyRevoked,
    Code::RateLimitExceeded,
    Code::InsufficientQuota,
    Code::RequestExceedsLimit,
    Code::ModelUnpriced,
    Code::ContentFilter,
    Code::ContentUnread,
    Code::NotFound,
    Code::MethodNotAllowed,
    Code::ModelNotFound,
    Code::RequestTooLarge,
    Code::RequestTimeout,
    Code::Overloaded,
    Code::AuditUnavailable,
    Code::LimitsUnavailable,
    Code::QueueFull,
    Code::QueueTimeout,
    Code::NoUpstream,
    Code::ConnectFailed,
    Code::ConnectTimeout,
    Code::UpstreamClosed,
    Code::UpstreamInvalid,
    Code::FirstTokenTimeout,
    Code::AnswerTimeout,
    Code::BetweenTokensTimeout,
    Code::TotalTimeout,
    Code::UpgradeUnsupported,
    Code::Internal,
];

impl Code {
    /// The word on the wire.
    pub const fn name(self) -> &'static str {
        match self {
            Self::BadRequest => "bad_request",
            Self::InvalidBody => "invalid_body",
            Self::DuplicateField => "duplicate_field",
            Self::InvalidApiKey => "invalid_api_key",
            Self::ModelNotAllowed => "model_not_allowed",
            Self::SurfaceNotAllowed => "surface_not_allowed",
            Self::ParameterNotAllowed => "parameter_not_allowed",
            Self::KeyRevoked => "key_revoked",
            Self::RateLimitExceeded => "rate_limit_exceeded",
            Self::InsufficientQuota => "insufficient_quota",
            Self::RequestExceedsLimit => "request_exceeds_limit",
            Self::ModelUnpriced => "model_unpriced",
            Self::ContentFilter => "content_filter",
            Self::ContentUnread => "content_unread",
            Self::NotFound => "not_found",
            Self::MethodNotAllowed => "method_not_allowed",
            Self::ModelNotFound => "model_not_found",
            Self::RequestTooLarge => "request_too_large",
            Self::RequestTimeout => "request_timeout",
            Self::Overloaded => "overloaded",
            Self::AuditUnavailable => "audit_unavailable",
            Self::LimitsUnavailable => "limits_unavailable",
            Self::QueueFull => "queue_full",
            Self::QueueTimeout => "queue_timeout",
            Self::NoUpstream => "no_upstream",
            Self::ConnectFailed => "connect_failed",
            Self::ConnectTimeout => "connect_timeout",
            Self::UpstreamClosed => "upstream_closed",
            Self::UpstreamInvalid => "upstream_invalid",
            Self::FirstTokenTimeout => "first_token_timeout",
            Self::AnswerTimeout => "answer_timeout",
            Self::BetweenTokensTimeout => "between_tokens_timeout",
            Self::TotalTimeout => "total_timeout",
            Self::UpgradeUnsupported => "upgrade_unsupported",
            Self::Internal => "internal_error",
        }
    }

    /// The HTTP status.
    pub const fn status(self) -> StatusCode {
        match self {
            Self::BadRequest
            | Self::InvalidBody
            | Self::DuplicateField
            | Self::ParameterNotAllowed
            | Self::UpgradeUnsupported
            | Self::ContentFilter
            | Self::ContentUnread => StatusCode::BAD_REQUEST,
            Self::InvalidApiKey | Self::KeyRevoked => StatusCode::UNAUTHORIZED,
            Self::ModelNotAllowed | Self::SurfaceNotAllowed | Self::ModelUnpriced => StatusCode::FORBIDDEN,
            Self::RateLimitExceeded | Self::InsufficientQuota | Self::RequestExceedsLimit => {
                StatusCode::TOO_MANY_REQUESTS
            }
            Self::NotFound | Self::ModelNotFound => StatusCode::NOT_FOUND,
            Self::MethodNotAllowed => StatusCode::METHOD_NOT_ALLOWED,
            Self::RequestTooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Self::RequestTimeout => StatusCode::REQUEST_TIMEOUT,
            Self::Overloaded
            | Self::AuditUnavailable
            | Self::LimitsUnavailable
            | Self::QueueFull
            | Self::QueueTimeout
            | Self::NoUpstream => StatusCode::SERVICE_UNAVAILABLE,
            Self::ConnectFailed | Self::UpstreamClosed | Self::UpstreamInvalid => StatusCode::BAD_GATEWAY,
            Self::ConnectTimeout
            | Self::FirstTokenTimeout
            | Self::AnswerTimeout
            | Self::BetweenTokensTimeout
            | Self::TotalTimeout => StatusCode::GATEWAY_TIMEOUT,
            Self::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    /// Whether the same request may succeed later; becomes `x-should-retry`, which the official SDKs obey.
    pub const fn retryable(self) -> bool {
        !matches!(self, Self::InsufficientQuota | Self::RequestExceedsLimit)
            && !matches!(self.status().as_u16(), 400..=407 | 413 | 500)
    }
}

impl Refusal {
    /// A refusal with nothing but its code and sentence.
    pub fn new(code: Code, message: impl Into<Cow<'static, str>>) -> Self {
        Self { code, message: message.into(), param: None, retry_after: None, close: false }
    }

    /// Names the field at fault.
    pub fn param(self, param: impl Into<Cow<'static, str>>) -> Self {
        Self { param: Some(param.into()), ..self }
    }

    /// Says when to come back.
    pub fn retry_after(self, after: Duration) -> Self {
        Self { retry_after: Some(after), ..self }
    }

    /// Closes the connection after the answer.
    pub fn closing(self) -> Self {
        Self { close: true, ..self }
    }

    /// The error as `dialect` writes it, one JSON object.
    pub fn body(&self, dialect: Dialect, request_id: &str) -> String {
        let code = self.code.name();
        match dialect {
            Dialect::OpenAi | Dialect::Responses => json!({"error": {
                "message": self.message, "type": self.openai_type(), "param": self.param, "code": code,
            }}),
            Dialect::Anthropic => json!({
                "type": "error",
                "error": {"type": self.anthropic_type(), "message": self.message},
                "request_id": request_id,
            }),
            Dialect::Tgi => json!({"error": self.message, "error_type": code}),
        }
        .to_string()
    }

    /// The error as the last event of a stream that had begun: never a clean end.
    pub fn event(&self, dialect: Dialect, request_id: &str) -> String {
        let body = self.body(dialect, request_id);
        match dialect {
            // OpenAI's own event, with the envelope beside it: the SDKs raise an exception only for that.
            Dialect::Responses => {
                let (code, message, param) = (self.code.name(), &self.message, &self.param);
                let error = json!({"code": code, "message": message, "param": param, "type": self.openai_type()});
                let event = json!({"type": "error", "code": code, "message": message, "param": param, "error": error});
                format!("event: error\ndata: {event}\n\n")
            }
            Dialect::Anthropic => format!("event: error\ndata: {body}\n\n"),
            Dialect::OpenAi | Dialect::Tgi => format!("data: {body}\n\n"),
        }
    }

    /// `retry-after` in whole seconds, at least 1.
    pub fn retry_after_s(&self) -> Option<u64> {
        self.retry_after.map(|after| (after.as_millis().div_ceil(1000) as u64).max(1))
    }

    fn openai_type(&self) -> &'static str {
        match self.code.status().as_u16() {
            429 if self.code == Code::InsufficientQuota => "insufficient_quota",
            429 => "rate_limit_error",
            400..=499 => "invalid_request_error",
            503 => "service_unavailable_error",
            _ => "upstream_error",
        }
    }

    /// Source: Anthropic's API reference, "Errors".
    fn anthropic_type(&self) -> &'static str {
        match self.code.status().as_u16() {
            401 => "authentication_error",
            403 => "permission_error",
            404 => "not_found_error",
            413 => "request_too_large",
            429 => "rate_limit_error",
            400..=499 => "invalid_request_error",
            503 => "overloaded_error",
            _ => "api_error",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_dialect_gets_its_own_envelope() {
        let refusal = Refusal::new(Code::ModelNotFound, "no model x").param("model");
        let openai: serde_json::Value = serde_json::from_str(&refusal.body(Dialect::OpenAi, "r")).unwrap();
        assert_eq!(openai["error"]["code"], "model_not_found");
        assert_eq!(openai["error"]["param"], "model");
        let anthropic: serde_json::Value = serde_json::from_str(&refusal.body(Dialect::Anthropic, "r")).unwrap();
        assert_eq!((&anthropic["type"], &anthropic["error"]["type"]), (&json!("error"), &json!("not_found_error")));
        assert!(refusal.body(Dialect::Tgi, "r").contains("error_type"));
    }

    #[test]
    fn sdks_retry_what_may_heal_and_nothing_else() {
        for code in CODES {
            let healable =
                code.status().as_u16() >= 501 || matches!(code, Code::RequestTimeout | Code::RateLimitExceeded);
            assert_eq!(code.retryable(), healable, "{code:?}");
        }
    }

    #[test]
    fn a_wait_is_rounded_up_to_whole_seconds() {
        let wait = |ms| Refusal::new(Code::QueueFull, "").retry_after(Duration::from_millis(ms)).retry_after_s();
        assert_eq!((wait(0), wait(1), wait(1000), wait(1001)), (Some(1), Some(1), Some(1), Some(2)));
    }
}
