//! A record as spans: one for the request, one for each attempt.

use std::borrow::Cow;
use std::time::{SystemTime, UNIX_EPOCH};

use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue};
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use opentelemetry_proto::tonic::trace::v1::status::StatusCode;
use opentelemetry_proto::tonic::trace::v1::{Span, SpanFlags, Status};

use super::failed;
use crate::audit::record::{Attempt, AttemptRecord, Ending, Outcome, Record, Trace, clip};
use crate::pool::origin::{Address, Host};
use crate::telemetry::names;

/// The spans of a request: its own first, then its attempts in their order.
pub(super) fn spans(trace: &Trace, record: &Record<'_>) -> Vec<Span> {
    let mut spans = Vec::with_capacity(1 + record.attempts.list.len());
    spans.push(request(trace, record));
    spans.extend(record.attempts.list.iter().map(|one| attempt(trace, record, one)));
    spans
}

fn request(trace: &Trace, record: &Record<'_>) -> Span {
    let parent = trace.parent.map_or_else(Vec::new, |parent| parent.to_be_bytes().to_vec());
    let error = failed(record).then(|| error_type(record));
    let attributes = request_attributes(record, error.as_deref());
    Span {
        trace_id: trace.id.to_be_bytes().to_vec(),
        span_id: trace.span.to_be_bytes().to_vec(),
        parent_span_id: parent,
        flags: flags(trace, trace.parent.is_some()),
        name: name(record.operation, record.model.route),
        kind: SpanKind::Server as i32,
        start_time_unix_nano: nanos(record.moment.at),
        end_time_unix_nano: nanos(record.moment.clock(record.moment.ended)),
        attributes,
        status: error.map(|error| broken(record.message.unwrap_or(&error))),
        ..Span::default()
    }
}

/// In one word why a request failed: our own code, else the status that was passed on, else how it ended.
fn error_type<'a>(record: &Record<'a>) -> Cow<'a, str> {
    match (record.code, record.outcome, record.status) {
        (Some(code), ..) => code.into(),
        (None, Outcome::Ok | Outcome::UpstreamError, Some(status)) => status.to_string().into(),
        (None, outcome, _) => outcome.name().into(),
    }
}

fn request_attributes(record: &Record<'_>, error: Option<&str>) -> Vec<KeyValue> {
    let (usage, times) = (&record.usage, &record.times);
    let moment = &record.moment;
    let last = record.attempts.list.last().map(|attempt| attempt.record(moment, record.bytes));
    let answered = last.as_ref().is_some_and(|last| last.result == Ending::Answered);
    let mut all = Attributes(Vec::with_capacity(24));
    all.text(names::OPERATION, Some(record.operation));
    all.text(names::PROVIDER, last.as_ref().map(|last| names::provider(last.provider)));
    all.text(names::REQUEST_MODEL, record.model.route);
    all.text(names::RESPONSE_MODEL, record.model.used.filter(|_| answered));
    all.stream(record.stream);
    let first = times.first.filter(|_| record.stream);
    all.put(names::TIME_TO_FIRST_CHUNK, first.map(|micros| Value::DoubleValue(micros as f64 / 1e6)));
    all.number(names::INPUT_TOKENS, usage.input_tokens);
    all.number(names::OUTPUT_TOKENS, usage.output_tokens);
    all.number(names::CACHE_READ_TOKENS, usage.cached_tokens);
    all.number(names::CACHE_CREATION_TOKENS, usage.cache_write_tokens);
    all.number(names::REASONING_TOKENS, usage.reasoning_tokens);
    all.text(names::ERROR_TYPE, error);
    all.text(names::METHOD, Some(record.method));
    all.text(names::ROUTE, Some(record.surface));
    all.number(names::STATUS, record.status.map(u64::from));
    all.text(names::PROTOCOL_VERSION, Some(version(record.client.protocol)));
    all.text(names::REQUEST_ID, Some(record.id.as_str()));
    all.text(names::OUTCOME, Some(record.outcome.name()));
    all.text(names::TENANT, record.tenant);
    all.text(names::POLICY_HASH, Some(record.policy.hash));
    all.number(names::POLICY_REVISION, Some(record.policy.revision));
    all.number(names::ATTEMPTS, Some(record.attempts.list.len() as u64));
    all.number(names::TIME_BODY, times.body);
    all.number(names::TIME_ADMITTED, times.admitted);
    all.number(names::TIME_QUEUED, times.queued);
    all.number(names::TIME_FIRST, times.first);
    all.number(names::TIME_SELF, Some(times.own));
    all.0
}

fn attempt(trace: &Trace, record: &Record<'_>, attempt: &Attempt) -> Span {
    let moment = &record.moment;
    let told = attempt.record(moment, record.bytes);
    let status = told.status.filter(|status| *status >= 400).map(|status| status.to_string());
    let error = match told.result {
        Ending::Answered | Ending::Status | Ending::Escalated => status.as_deref(),
        other => Some(result(other)),
    };
    // A client that leaves is no failure of the upstream's.
    let broke = error.filter(|_| told.result != Ending::Cancelled);
    let why = told.why.map(|why| why.as_str());
    Span {
        trace_id: trace.id.to_be_bytes().to_vec(),
        span_id: attempt.span.to_be_bytes().to_vec(),
        parent_span_id: trace.span.to_be_bytes().to_vec(),
        flags: flags(trace, false),
        name: name(record.operation, model(record, attempt)),
        kind: SpanKind::Client as i32,
        start_time_unix_nano: nanos(moment.clock(attempt.began)),
        end_time_unix_nano: nanos(moment.clock(attempt.ended.unwrap_or(moment.ended))),
        attributes: attempt_attributes(record, attempt, &told, error),
        status: broke.map(|error| broken(why.unwrap_or(error))),
        ..Span::default()
    }
}

fn attempt_attributes(
    record: &Record<'_>,
    attempt: &Attempt,
    told: &AttemptRecord<'_>,
    error: Option<&str>,
) -> Vec<KeyValue> {
    let mut all = Attributes(Vec::with_capacity(13));
    all.text(names::OPERATION, Some(record.operation));
    all.text(names::PROVIDER, Some(names::provider(told.provider)));
    all.text(names::REQUEST_MODEL, model(record, attempt));
    all.stream(record.stream);
    all.server(attempt, attempt.address());
    all.number(names::STATUS, told.status.map(u64::from));
    all.text(names::ERROR_TYPE, error);
    all.text(names::POOL, Some(told.pool));
    all.text(names::UPSTREAM, Some(told.upstream));
    all.text(names::ATTEMPT_RESULT, Some(result(told.result)));
    all.0
}

/// What the upstream knows the model by, as far as that is certain.
fn model<'a>(record: &Record<'a>, attempt: &'a Attempt) -> Option<&'a str> {
    let last = record.attempts.list.last().is_some_and(|last| std::ptr::eq(last, attempt));
    let own = attempt.upstream().and_then(|upstream| upstream.model.as_deref());
    own.or(record.model.used.filter(|_| last)).or(attempt.model()).or(record.model.route)
}

/// An attempt's result as records name it.
fn result(ending: Ending) -> &'static str {
    match ending {
        Ending::Answered => "answered",
        Ending::Connect => "connect",
        Ending::Reset => "reset",
        Ending::Timeout => "timeout",
        Ending::Status => "status",
        Ending::Cancelled => "cancelled",
        Ending::Broken => "broken",
        Ending::Escalated => "escalated",
    }
}

fn name(operation: &str, model: Option<&str>) -> String {
    match model {
        Some(model) => format!("{operation} {}", clip(model)),
        None => operation.to_owned(),
    }
}

/// The version as the convention writes it: `1.1`, `2`.
fn version(protocol: &str) -> &str {
    protocol.strip_prefix("http/").or_else(|| protocol.strip_prefix('h')).unwrap_or(protocol)
}

fn flags(trace: &Trace, remote: bool) -> u32 {
    let known = SpanFlags::ContextHasIsRemoteMask as u32;
    u32::from(trace.sampled) | known | if remote { SpanFlags::ContextIsRemoteMask as u32 } else { 0 }
}

fn nanos(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64)
}

fn broken(why: &str) -> Status {
    Status { code: StatusCode::Error as i32, message: clip(why).to_owned() }
}

/// Attributes of one span; what is absent is left out.
pub(super) struct Attributes(pub(super) Vec<KeyValue>);

impl Attributes {
    fn put(&mut self, name: &'static str, value: Option<Value>) {
        let Some(value) = value else { return };
        let value = Some(AnyValue { value: Some(value) });
        self.0.push(KeyValue { key: name.to_owned(), value, ..KeyValue::default() });
    }

    pub(super) fn text(&mut self, name: &'static str, value: Option<&str>) {
        self.put(name, value.map(|text| Value::StringValue(clip(text).to_owned())));
    }

    fn number(&mut self, name: &'static str, value: Option<u64>) {
        self.put(name, value.map(|number| Value::IntValue(i64::try_from(number).unwrap_or(i64::MAX))));
    }

    /// Told of streams only, as the convention has it.
    fn stream(&mut self, stream: bool) {
        self.put(names::REQUEST_STREAM, stream.then_some(Value::BoolValue(true)));
    }

    /// The upstream's name where it has one, and the address that was asked.
    fn server(&mut self, attempt: &Attempt, address: &Address) {
        let host = attempt.upstream().map(|upstream| &upstream.origin.origin.host);
        let (ip, port) = match address {
            Address::Tcp(address) => (address.ip().to_string(), Some(u64::from(address.port()))),
            Address::Unix(path) => (path.display().to_string(), None),
        };
        match host {
            Some(Host::Name(name, _)) => {
                self.text(names::SERVER_ADDRESS, Some(name));
                self.text(names::PEER_ADDRESS, Some(&ip));
            }
            _ => self.text(names::SERVER_ADDRESS, Some(&ip)),
        }
        self.number(names::SERVER_PORT, port);
    }
}
