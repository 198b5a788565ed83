//! OpenTelemetry logs over HTTP: one log record a line, with the attributes that one filters by.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

use http::{HeaderName, HeaderValue, Uri};
use opentelemetry_proto::tonic::collector::logs::v1::{ExportLogsServiceRequest, ExportLogsServiceResponse};
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::common::v1::{AnyValue, InstrumentationScope, KeyValue};
use opentelemetry_proto::tonic::logs::v1::{LogRecord, ResourceLogs, ScopeLogs, SeverityNumber};
use opentelemetry_proto::tonic::resource::v1::Resource;
use prost::Message;
use schemars::JsonSchema;
use serde::Deserialize;

use super::line::Line;
use super::{Batch, Delivery, Failure, Post, Rejected, Resolve, Sink, Way, Wrong, headers, url};
use crate::secret::SecretSource;

/// OpenTelemetry logs over HTTP (OTLP, protobuf). The body of a log record is the line; its attributes have the
/// record's id (`log.record.uid`), outcome, status, surface, models, upstream and tokens; it belongs to the
/// request's trace.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[schemars(rename = "OtlpSink")]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The collector's address for logs, with its path: `http://collector:4318/v1/logs`.
    pub url: String,
    /// The service that the logs are from, `service.name`.
    #[serde(default = "Config::service")]
    pub service: String,
    /// More headers.
    #[serde(default)]
    pub headers: BTreeMap<String, String>,
    /// More headers whose values are secrets.
    #[serde(default)]
    pub secret_headers: BTreeMap<String, SecretSource>,
}

impl Config {
    fn service() -> String {
        "infergate".to_owned()
    }
}

#[derive(Debug)]
pub(super) struct Otlp {
    url: Uri,
    service: String,
    headers: Vec<(HeaderName, HeaderValue)>,
}

pub(super) fn build(config: &Config, resolve: Resolve<'_>) -> Result<Otlp, Wrong> {
    let headers = headers(&config.headers, &config.secret_headers, resolve)?;
    Ok(Otlp { url: url(&config.url)?, service: config.service.clone(), headers })
}

impl Sink for Otlp {
    fn kind(&self) -> &'static str {
        "otlp"
    }

    fn way(&self) -> Way<'_> {
        Way::Http
    }

    fn delivery(&self, batch: &Batch<'_>) -> Delivery {
        let body = self.request(batch).encode_to_vec().into();
        let mut headers = vec![(http::header::CONTENT_TYPE, HeaderValue::from_static("application/x-protobuf"))];
        headers.extend(self.headers.iter().cloned());
        Delivery::Http(Post { url: self.url.clone(), headers, body })
    }

    /// A collector may take a part and say that the rest is no good; sending that again would not help.
    fn judge(&self, status: u16, body: &[u8]) -> Result<Option<Rejected>, Failure> {
        if !(200..300).contains(&status) {
            return Err(Failure::of(status, format!("the collector answers with status {status}")));
        }
        let partial = ExportLogsServiceResponse::decode(body).ok().and_then(|answer| answer.partial_success);
        Ok(partial.and_then(|partial| {
            let lines = u64::try_from(partial.rejected_log_records).ok().filter(|lines| *lines > 0)?;
            let why: String = partial.error_message.chars().take(200).collect();
            Some(Rejected { lines, why: format!("the collector refuses {lines} of these records: {why}") })
        }))
    }
}

impl Otlp {
    fn request(&self, batch: &Batch<'_>) -> ExportLogsServiceRequest {
        let names = [("service.name", self.service.as_str()), ("service.instance.id", batch.run)];
        let resource = Resource {
            attributes: names.map(|(key, text)| attribute(key, string(text))).into(),
            ..Resource::default()
        };
        let scope = InstrumentationScope { name: "infergate.audit".to_owned(), ..InstrumentationScope::default() };
        let log_records = batch.lines.iter().map(|line| record(line, batch)).collect();
        let scope_logs = vec![ScopeLogs { scope: Some(scope), log_records, ..ScopeLogs::default() }];
        let logs = ResourceLogs { resource: Some(resource), scope_logs, ..ResourceLogs::default() };
        ExportLogsServiceRequest { resource_logs: vec![logs] }
    }
}

fn record(text: &[u8], batch: &Batch<'_>) -> LogRecord {
    let line = Line::read(text);
    let (severity, severity_text) = severity(&line);
    LogRecord {
        time_unix_nano: nanos(&line.at).unwrap_or(0),
        observed_time_unix_nano: observed(batch.now),
        severity_number: severity.into(),
        severity_text: severity_text.to_owned(),
        body: Some(AnyValue { value: Some(string(&String::from_utf8_lossy(text))) }),
        attributes: attributes(&line, batch.run),
        flags: u32::from(line.trace.sampled),
        trace_id: bytes(&line.trace.id, 16),
        span_id: bytes(&line.trace.span, 8),
        event_name: format!("infergate.{}", line.kind),
        ..LogRecord::default()
    }
}

/// What is our or an upstream's fault is worth a look.
fn severity(line: &Line<'_>) -> (SeverityNumber, &'static str) {
    match line.outcome.as_deref() {
        Some("upstream_error" | "timeout" | "aborted") => (SeverityNumber::Warn, "WARN"),
        _ if line.kind == "gap" => (SeverityNumber::Error, "ERROR"),
        _ => (SeverityNumber::Info, "INFO"),
    }
}

fn attributes(line: &Line<'_>, run: &str) -> Vec<KeyValue> {
    let last = line.attempts.last();
    let texts = [
        ("http.request.method", &line.method),
        ("url.path", &line.surface),
        ("error.type", &line.code),
        ("gen_ai.request.model", &line.model.asked),
        ("gen_ai.response.model", &line.model.used),
        ("infergate.outcome", &line.outcome),
        ("infergate.operation", &line.operation),
        ("infergate.principal", &line.principal),
        ("infergate.tenant", &line.tenant),
        ("infergate.act", &line.act),
        ("infergate.pool", last.map_or(&None, |attempt| &attempt.pool)),
        ("infergate.upstream", last.map_or(&None, |attempt| &attempt.upstream)),
    ];
    // OTLP has no larger ones.
    let whole = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
    let numbers = [
        ("http.response.status_code", line.status),
        ("gen_ai.usage.input_tokens", line.usage.input_tokens.map(whole)),
        ("gen_ai.usage.output_tokens", line.usage.output_tokens.map(whole)),
        ("infergate.seq", Some(whole(line.seq))),
        ("infergate.attempts", i64::try_from(line.attempts.len()).ok().filter(|count| *count > 0)),
    ];
    let text = |(key, text): (&str, &Option<Cow<'_, str>>)| Some(attribute(key, string(text.as_deref()?)));
    let number = |(key, number): (&str, Option<i64>)| Some(attribute(key, Value::IntValue(number?)));
    let mut attributes = vec![attribute("log.record.uid", string(&line.key(run)))];
    attributes.extend(texts.into_iter().filter_map(text));
    attributes.extend(numbers.into_iter().filter_map(number));
    attributes
}

fn attribute(key: &str, value: Value) -> KeyValue {
    KeyValue { key: key.to_owned(), value: Some(AnyValue { value: Some(value) }), ..KeyValue::default() }
}

fn string(text: &str) -> Value {
    Value::StringValue(text.to_owned())
}

/// Hexadecimal digits as so many bytes, or none.
fn bytes(hex: &str, length: usize) -> Vec<u8> {
    let byte = |at: usize| u8::from_str_radix(hex.get(2 * at..2 * at + 2)?, 16).ok();
    let bytes: Option<Vec<u8>> = (0..length).map(byte).collect();
    bytes.filter(|_| hex.len() == 2 * length).unwrap_or_default()
}

fn observed(now: SystemTime) -> u64 {
    now.duration_since(UNIX_EPOCH).map_or(0, |since| u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
}

/// `2026-11-22T14:03:05.123456Z` as nanoseconds since 1970.
fn nanos(at: &str) -> Option<u64> {
    let part = |from: usize, to: usize| at.get(from..to)?.parse::<u64>().ok();
    let (year, month, day) = (part(0, 4)?, part(5, 7)?, part(8, 10)?);
    let (hours, minutes, seconds, micros) = (part(11, 13)?, part(14, 16)?, part(17, 19)?, part(20, 26)?);
    if !(1970..=9999).contains(&year) || !(1..=12).contains(&month) || !(1..=31).contains(&day) {
        return None;
    }
    // Years that begin in March, so that the leap day is the last.
    let years = if month <= 2 { year - 1 } else { year };
    let of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let days = years * 365 + years / 4 - years / 100 + years / 400 + of_year - 719_468;
    let seconds = ((days * 24 + hours) * 60 + minutes) * 60 + seconds;
    seconds.checked_mul(1_000_000_000)?.checked_add(micros * 1_000)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sink::tests::{LINE, OPEN, batch, built};

    fn sent(lines: &[&[u8]]) -> (Post, Vec<LogRecord>) {
        let json =
            r#"[{"name":"o","otlp":{"url":"http://c:4318/v1/logs","secret_headers":{"x-key":{"env":"canary"}}}}]"#;
        let sink = built(json).unwrap().remove(0).sink.clone();
        let Delivery::Http(post) = sink.delivery(&batch(lines)) else { panic!() };
        let mut decoded = ExportLogsServiceRequest::decode(post.body.clone()).unwrap();
        let records = decoded.resource_logs.remove(0).scope_logs.remove(0).log_records;
        (post, records)
    }

    fn value<'a>(record: &'a LogRecord, key: &str) -> Option<&'a Value> {
        let found = record.attributes.iter().find(|attribute| attribute.key == key)?;
        found.value.as_ref()?.value.as_ref()
    }

    #[test]
    fn a_line_is_a_log_record_of_its_trace() {
        let (post, records) = sent(&[OPEN.as_bytes(), LINE.as_bytes()]);
        assert_eq!(post.url.path(), "/v1/logs");
        let record = &records[1];
        assert_eq!(record.time_unix_nano, 1_795_356_185_123_456_000); // date -ud 2026-11-22T14:03:05 +%s
        assert_eq!(record.body.as_ref().unwrap().value, Some(string(LINE)));
        assert_eq!((record.trace_id.len(), record.span_id.len(), record.flags), (16, 8, 1));
        assert_eq!(record.event_name, "infergate.request");
        assert_eq!(value(record, "log.record.uid"), Some(&string("0197-a")));
        assert_eq!(value(record, "gen_ai.request.model"), Some(&string("gpt-4o")));
        assert_eq!(value(record, "gen_ai.usage.output_tokens"), Some(&Value::IntValue(40)));
        assert_eq!(value(record, "infergate.upstream"), Some(&string("gpu-2")));
        assert_eq!(value(&records[0], "log.record.uid"), Some(&string("R:1")));
        assert_eq!(value(&records[0], "infergate.upstream"), None);
    }

    #[test]
    fn a_number_that_otlp_does_not_have_is_its_largest() {
        let line = LINE.replace(":40}", &format!(":{}}}", u64::MAX));
        let (_, records) = sent(&[line.as_bytes()]);
        assert_eq!(value(&records[0], "gen_ai.usage.output_tokens"), Some(&Value::IntValue(i64::MAX)));
        assert_eq!(value(&records[0], "log.record.uid"), Some(&string("0197-a")));
    }

    #[test]
    fn what_is_no_line_leaves_all_the_same() {
        let (_, records) = sent(&[b"\xff\xff"]);
        assert_eq!(records[0].time_unix_nano, 0);
        assert!(records[0].trace_id.is_empty());
    }

    #[test]
    fn a_header_with_a_secret_is_marked() {
        let (post, _) = sent(&[OPEN.as_bytes()]);
        assert!(post.headers.iter().any(|(name, value)| name == "x-key" && value.is_sensitive()));
        assert!(!format!("{post:?} {:?}", post.headers).contains("canary"));
    }

    #[test]
    fn a_part_that_the_collector_refuses_is_a_warning_and_a_status_is_a_failure() {
        use opentelemetry_proto::tonic::collector::logs::v1::ExportLogsPartialSuccess;
        let sink = Otlp { url: Uri::default(), service: String::new(), headers: Vec::new() };
        let partial = ExportLogsPartialSuccess { rejected_log_records: 2, error_message: "too old".to_owned() };
        let answer = ExportLogsServiceResponse { partial_success: Some(partial) }.encode_to_vec();
        let rejected = sink.judge(200, &answer).unwrap().unwrap();
        assert!(rejected.lines == 2 && rejected.why.contains("refuses 2 of these records: too old"), "{rejected:?}");
        assert_eq!(sink.judge(200, b"").unwrap(), None);
        assert!(matches!(sink.judge(503, b""), Err(Failure::Later(_))));
        assert!(matches!(sink.judge(400, b""), Err(Failure::Refused(_))));
    }
}
