//! Answers: heads as uvicorn writes them, bodies as they are sent, refusals in the dialect of the engine.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use http::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, DATE, HeaderName, SERVER, VARY};
use http::{HeaderValue, Response, StatusCode};
use hyper::body::{Frame, SizeHint};

use super::Server;
use super::encoding::quoted;
use super::engine::Work;
use super::events::{Events, Source};
use super::fault::Trouble;
use super::options::Engine;
use super::visit::Visit;

/// What an endpoint has to say.
pub(super) enum Answer {
    Whole(Whole),
    Stream { content_type: &'static str, source: Box<dyn Source>, work: Work },
}

/// An answer that is known in full.
pub(super) struct Whole {
    pub(super) status: StatusCode,
    pub(super) content_type: Option<&'static str>,
    pub(super) body: Bytes,
    pub(super) headers: Vec<(HeaderName, HeaderValue)>,
}

pub(super) const JSON: &str = "application/json";
pub(super) const EVENT_STREAM: &str = "text/event-stream; charset=utf-8";

impl Whole {
    pub(super) fn new(status: StatusCode, content_type: &'static str, body: impl Into<Bytes>) -> Self {
        Self { status, content_type: Some(content_type), body: body.into(), headers: Vec::new() }
    }

    pub(super) fn empty(status: StatusCode) -> Self {
        Self { status, content_type: None, body: Bytes::new(), headers: Vec::new() }
    }

    pub(super) fn json(body: impl Into<Bytes>) -> Self {
        Self::new(StatusCode::OK, JSON, body)
    }

    pub(super) fn with(mut self, name: &'static str, value: &str) -> Self {
        // A value that no header can carry is left out: it came from the request.
        if let Ok(value) = HeaderValue::from_str(value) {
            self.headers.push((HeaderName::from_static(name), value));
        }
        self
    }
}

impl From<Whole> for Answer {
    fn from(whole: Whole) -> Self {
        Self::Whole(whole)
    }
}

/// A refused request, before it is put into a dialect.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Refusal {
    pub(super) status: u16,
    pub(super) message: String,
    pub(super) param: Option<String>,
    /// Instead of the type that the status implies.
    pub(super) kind: Option<&'static str>,
    /// OpenAI's code.
    pub(super) code: Option<&'static str>,
}

impl Refusal {
    pub(super) fn new(status: u16, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), param: None, kind: None, code: None }
    }

    /// A value out of bounds, in vLLM's words.
    pub(super) fn value(param: &str, why: &str, value: impl std::fmt::Display) -> Self {
        let message = format!("{why}, got {value}. (parameter={param}, value={value})");
        Self { param: Some(param.to_owned()), ..Self::new(400, message) }
    }

    pub(super) fn about(mut self, param: &str) -> Self {
        self.param = Some(param.to_owned());
        self
    }

    pub(super) fn kind(mut self, kind: &'static str) -> Self {
        self.kind = Some(kind);
        self
    }

    pub(super) fn code(mut self, code: &'static str) -> Self {
        self.code = Some(code);
        self
    }

    /// The answer: Anthropic's envelope for `/v1/messages`, else that of the engine.
    pub(super) fn whole(&self, engine: Engine, path: &str) -> Whole {
        let status = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        Whole::new(status, JSON, self.body(engine, path))
    }

    pub(super) fn body(&self, engine: Engine, path: &str) -> String {
        let message = quoted(&self.message);
        if path.starts_with("/v1/messages") {
            let kind = quoted(self.kind.unwrap_or_else(|| anthropic_kind(self.status)));
            return format!(r#"{{"type":"error","error":{{"type":{kind},"message":{message}}}}}"#);
        }
        let param = self.param.as_deref().map_or_else(|| "null".to_owned(), quoted);
        let status = self.status;
        match engine {
            Engine::Vllm => {
                let kind = quoted(self.kind.unwrap_or_else(|| vllm_kind(status)));
                format!(r#"{{"error":{{"message":{message},"type":{kind},"param":{param},"code":{status}}}}}"#)
            }
            Engine::Sglang => {
                let kind = quoted(self.kind.unwrap_or_else(|| vllm_kind(status)));
                format!(r#"{{"object":"error","message":{message},"type":{kind},"param":{param},"code":{status}}}"#)
            }
            Engine::Tgi => {
                let kind = quoted(tgi_kind(status));
                format!(r#"{{"error":{message},"error_type":{kind}}}"#)
            }
            Engine::Openai => {
                let (kind, implied) = openai_kind(status);
                let code = self.code.or(implied).map_or_else(|| "null".to_owned(), quoted);
                format!(r#"{{"error":{{"message":{message},"type":"{kind}","param":{param},"code":{code}}}}}"#)
            }
        }
    }
}

fn vllm_kind(status: u16) -> &'static str {
    match status {
        401 => "AuthenticationError",
        403 => "PermissionDeniedError",
        404 => "NotFoundError",
        409 => "ConflictError",
        422 => "UnprocessableEntityError",
        429 => "RateLimitError",
        501 => "NotImplementedError",
        503 => "ServiceUnavailableError",
        400..=499 => "BadRequestError",
        _ => "InternalServerError",
    }
}

fn tgi_kind(status: u16) -> &'static str {
    match status {
        429 | 503 => "overloaded",
        400..=499 => "validation",
        _ => "generation",
    }
}

fn openai_kind(status: u16) -> (&'static str, Option<&'static str>) {
    match status {
        401 => ("invalid_request_error", Some("invalid_api_key")),
        404 => ("invalid_request_error", None),
        429 => ("requests", Some("rate_limit_exceeded")),
        400..=499 => ("invalid_request_error", None),
        _ => ("server_error", None),
    }
}

fn anthropic_kind(status: u16) -> &'static str {
    match status {
        401 => "authentication_error",
        403 => "permission_error",
        404 => "not_found_error",
        413 => "request_too_large",
        429 => "rate_limit_error",
        503 | 529 => "overloaded_error",
        400..=499 => "invalid_request_error",
        _ => "api_error",
    }
}

/// Puts an answer on its way.
pub(super) fn send(server: &Server, mut visit: Visit, trouble: Trouble, answer: Answer, head: bool) -> Response<Body> {
    match answer {
        Answer::Whole(whole) if head || whole.body.is_empty() => {
            visit.completed();
            let length = whole.body.len();
            respond(server, whole, length, State::Done, None, false)
        }
        Answer::Whole(whole) => send_whole(server, visit, trouble, whole),
        Answer::Stream { content_type, source, work } => {
            let gzip = trouble.gzip;
            let events = Events::new(&server.engine, source, work, trouble);
            let mut response = Response::new(Body { state: State::Events(Box::new(events)), visit: Some(visit) });
            let headers = response.headers_mut();
            headers.insert(DATE, server.date.lock().now());
            headers.insert(SERVER, HeaderValue::from_static("uvicorn"));
            headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
            headers.insert(VARY, HeaderValue::from_static("Origin"));
            if gzip {
                headers.insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
            }
            response
        }
    }
}

fn send_whole(server: &Server, visit: Visit, trouble: Trouble, mut whole: Whole) -> Response<Body> {
    let gzip = trouble.gzip;
    if gzip {
        whole.body = super::encoding::gzip(&whole.body).into();
    }
    let body = whole.body.clone();
    let length = body.len();
    let plain = trouble.ending.is_none() && trouble.drip.is_none() && !trouble.half_utf8 && !trouble.close_after;
    let state = if plain { State::Whole(body) } else { State::Events(Box::new(Events::whole(&body, trouble))) };
    respond(server, whole, length, state, Some(visit), gzip)
}

fn respond(
    server: &Server,
    whole: Whole,
    length: usize,
    state: State,
    visit: Option<Visit>,
    gzip: bool,
) -> Response<Body> {
    let mut response = Response::new(Body { state, visit });
    *response.status_mut() = whole.status;
    let headers = response.headers_mut();
    headers.reserve(8);
    headers.insert(DATE, server.date.lock().now());
    headers.insert(SERVER, HeaderValue::from_static("uvicorn"));
    for (name, value) in whole.headers {
        headers.insert(name, value);
    }
    if whole.status != StatusCode::NO_CONTENT && !whole.status.is_informational() {
        headers.insert(CONTENT_LENGTH, length.into());
    }
    if let Some(content_type) = whole.content_type {
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    }
    if gzip {
        headers.insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
    }
    headers.insert(VARY, HeaderValue::from_static("Origin"));
    response
}

/// The body of an answer.
pub(super) struct Body {
    state: State,
    visit: Option<Visit>,
}

enum State {
    Whole(Bytes),
    Events(Box<Events>),
    Done,
}

impl Body {
    /// Nothing, while the exchange goes on in another way (an upgraded connection).
    pub(super) fn nothing() -> Self {
        Self { state: State::Done, visit: None }
    }
}

impl hyper::body::Body for Body {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let this = &mut *self;
        match &mut this.state {
            State::Events(events) => {
                events.poll(cx, this.visit.as_mut()).map(|event| event.map(|e| Ok(Frame::data(e))))
            }
            State::Whole(bytes) => {
                let bytes = std::mem::take(bytes);
                this.state = State::Done;
                if let Some(visit) = &mut this.visit {
                    visit.completed();
                }
                Poll::Ready(Some(Ok(Frame::data(bytes))))
            }
            State::Done => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self.state, State::Done)
    }

    fn size_hint(&self) -> SizeHint {
        match &self.state {
            State::Whole(bytes) => SizeHint::with_exact(bytes.len() as u64),
            State::Events(_) => SizeHint::default(),
            State::Done => SizeHint::with_exact(0),
        }
    }
}

/// The `date` header, written once a second.
#[derive(Default)]
pub(super) struct Date {
    second: u64,
    value: Option<HeaderValue>,
}

impl Date {
    pub(super) fn now(&mut self) -> HeaderValue {
        let second = unix_seconds();
        match &self.value {
            Some(value) if self.second == second => value.clone(),
            _ => {
                let value = HeaderValue::from_str(&written(second)).unwrap_or(HeaderValue::from_static(""));
                self.second = second;
                self.value = Some(value.clone());
                value
            }
        }
    }
}

/// Seconds since 1970.
pub(super) fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// A point in time as HTTP writes it, such as `Sun, 06 Nov 1994 08:49:37 GMT`.
fn written(seconds: u64) -> String {
    const DAYS: [&str; 7] = ["Thu", "Fri", "Sat", "Sun", "Mon", "Tue", "Wed"];
    const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let days = seconds / 86_400;
    // The calendar in years that begin in March, so that the leap day is the last one.
    let shifted = days + 719_468;
    let (era, in_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (in_era - in_era / 1460 + in_era / 36_524 - in_era / 146_096) / 365;
    let in_year = in_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * in_year + 2) / 153;
    let day = in_year - (153 * march_month + 2) / 5 + 1;
    let month = (march_month + 2) % 12;
    let year = era * 400 + year_of_era + u64::from(march_month >= 10);
    let (name, month) = (DAYS[(days % 7) as usize], MONTHS[month as usize]);
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    format!("{name}, {day:02} {month} {year} {hour:02}:{minute:02}:{second:02} GMT")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_http() {
        assert_eq!(written(784_111_777), "Sun, 06 Nov 1994 08:49:37 GMT");
        assert_eq!(written(951_782_400), "Tue, 29 Feb 2000 00:00:00 GMT");
        assert_eq!(written(1_767_225_599), "Wed, 31 Dec 2025 23:59:59 GMT");
    }

    #[test]
    fn a_refusal_speaks_the_dialect_of_its_engine_and_path() {
        let refusal = Refusal::value("temperature", "temperature must be in [0, 2]", "9.0");
        assert_eq!(
            refusal.body(Engine::Vllm, "/v1/chat/completions"),
            r#"{"error":{"message":"temperature must be in [0, 2], got 9.0. (parameter=temperature, value=9.0)","type":"BadRequestError","param":"temperature","code":400}}"#
        );
        assert!(refusal.body(Engine::Tgi, "/generate").ends_with(r#""error_type":"validation"}"#));
        assert!(refusal.body(Engine::Vllm, "/v1/messages").contains(r#""type":"invalid_request_error""#));
    }
}
