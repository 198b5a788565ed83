//! Sending spans: OTLP over HTTP, in batches, again after a while if the collector could not take them.

use std::collections::VecDeque;
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_TYPE, RETRY_AFTER};
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode};
use opentelemetry_proto::tonic::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
use opentelemetry_proto::tonic::common::v1::InstrumentationScope;
use opentelemetry_proto::tonic::resource::v1::Resource;
use opentelemetry_proto::tonic::trace::v1::{ResourceSpans, ScopeSpans, Span};
use prost::Message;
use uuid::Uuid;

use super::Target;
use super::span::Attributes;
use crate::audit::record::clip;
use crate::egress::Egress;
use crate::telemetry::names;

/// The most spans in one request.
const BATCH: usize = 512;
/// How long the collector may take. With the pause before it, an outage is told within 5 s.
const WITHIN: Duration = Duration::from_secs(3);
/// The pause after the first failure; doubled each time up to [`PAUSE_MAX`], so that a recovery is seen within 5 s.
const PAUSE: Duration = Duration::from_millis(500);
const PAUSE_MAX: Duration = Duration::from_secs(2);
/// The longest pause that a collector can ask for.
const ASKED_MAX: Duration = Duration::from_secs(60);
/// The release of the conventions that the names on our spans are from.
const SCHEMA: &str = "https://opentelemetry.io/schemas/1.42.0";

/// What is being sent, and how it has gone so far.
#[derive(Debug)]
pub(super) struct Exporter {
    /// How it gets out; nothing is sent without.
    pub egress: Option<Egress>,
    waiting: VecDeque<Span>,
    /// A batch that was refused for now, as it was sent.
    again: Option<Batch>,
    /// Failures since the last success.
    failures: u32,
    instance: String,
    host: Option<String>,
}

#[derive(Clone, Debug)]
struct Batch {
    body: Bytes,
    spans: usize,
}

/// What became of one batch.
pub(super) struct Sent {
    /// Spans that the collector has.
    pub taken: usize,
    /// Spans that are lost.
    pub dropped: usize,
    /// Whether anything went wrong.
    pub failed: bool,
    /// How long to wait before the same batch is sent again.
    pub again_in: Option<Duration>,
}

/// What the collector said.
#[derive(Debug, PartialEq, Eq)]
enum Said {
    Taken,
    /// It took the rest.
    Rejected(usize, String),
    /// Not now.
    Later(String, Option<Duration>),
    /// Not ever.
    Never(String),
}

impl Exporter {
    pub(super) fn new() -> Self {
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").ok();
        Self {
            egress: None,
            waiting: VecDeque::new(),
            again: None,
            failures: 0,
            instance: Uuid::now_v7().to_string(),
            host: host.map(|name| name.trim().to_owned()).filter(|name| !name.is_empty()),
        }
    }

    /// Takes more spans to send.
    pub(super) fn take(&mut self, spans: Vec<Span>) {
        self.waiting.extend(spans);
    }

    /// Forgets everything that waits; returns how many spans that were.
    pub(super) fn clear(&mut self) -> usize {
        let batch = self.again.take().map_or(0, |batch| batch.spans);
        batch + self.waiting.drain(..).count()
    }

    /// Sends one batch, if anything waits.
    pub(super) async fn send_batch(&mut self, target: &Target) -> Option<Sent> {
        // It stays where it is until the collector has spoken: this future may be dropped.
        if self.again.is_none() {
            self.again = self.next_batch(target);
        }
        let (batch, egress) = self.again.clone().zip(self.egress.as_ref())?;
        let said = match request(target, batch.body) {
            Ok(request) => judge(egress.send(request, WITHIN).await),
            Err(error) => Said::Never(error),
        };
        Some(self.hear(said, batch.spans))
    }

    fn next_batch(&mut self, target: &Target) -> Option<Batch> {
        let count = self.waiting.len().min(BATCH);
        let spans: Vec<Span> = self.waiting.drain(..count).collect();
        let scope = InstrumentationScope {
            name: "infergate".to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..InstrumentationScope::default()
        };
        let scope_spans = vec![ScopeSpans { scope: Some(scope), spans, schema_url: SCHEMA.to_owned() }];
        let resource = Some(self.resource(&target.service));
        let part = ResourceSpans { resource, scope_spans, schema_url: SCHEMA.to_owned() };
        let body = ExportTraceServiceRequest { resource_spans: vec![part] }.encode_to_vec().into();
        (count > 0).then_some(Batch { body, spans: count })
    }

    fn resource(&self, service: &str) -> Resource {
        let mut all = Attributes(Vec::with_capacity(4));
        all.text(names::SERVICE_NAME, Some(service));
        all.text(names::SERVICE_VERSION, Some(env!("CARGO_PKG_VERSION")));
        all.text(names::SERVICE_INSTANCE, Some(&self.instance));
        all.text(names::HOST_NAME, self.host.as_deref());
        Resource { attributes: all.0, ..Resource::default() }
    }

    fn hear(&mut self, said: Said, spans: usize) -> Sent {
        let (taken, why, after) = match said {
            Said::Taken => {
                self.well();
                self.again = None;
                return Sent { taken: spans, dropped: 0, failed: false, again_in: None };
            }
            Said::Later(why, after) => {
                let pause = after.map_or_else(|| pause(self.failures), |after| after.min(ASKED_MAX));
                (0, why, Some(pause))
            }
            Said::Rejected(rejected, why) => (spans.saturating_sub(rejected), why, None),
            Said::Never(why) => (0, why, None),
        };
        self.trouble(&why, after.is_some());
        if after.is_some() {
            return Sent { taken: 0, dropped: 0, failed: true, again_in: after };
        }
        self.again = None;
        Sent { taken, dropped: spans - taken, failed: true, again_in: None }
    }

    /// Tells of the first failure in a row; the metric tells of all.
    fn trouble(&mut self, why: &str, kept: bool) {
        if self.failures == 0 && kept {
            tracing::warn!(error = why, "traces cannot be exported; spans wait, then are dropped");
        } else if self.failures == 0 {
            tracing::warn!(error = why, "the collector of traces refuses spans for good; they are dropped");
        }
        self.failures = self.failures.saturating_add(1);
    }

    fn well(&mut self) {
        if self.failures > 0 {
            tracing::info!(failures = self.failures, "traces are exported again");
        }
        self.failures = 0;
    }
}

/// Twice as long after each failure, with jitter over the upper half.
fn pause(failures: u32) -> Duration {
    let longest = PAUSE.saturating_mul(1 << failures.min(8)).min(PAUSE_MAX);
    longest / 2 + longest.mul_f64(fastrand::f64() / 2.0)
}

fn request(target: &Target, body: Bytes) -> Result<Request<Bytes>, String> {
    let mut request = Request::post(target.url.clone()).body(body).map_err(|error| error.to_string())?;
    *request.headers_mut() = target.headers.clone();
    request.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/x-protobuf"));
    Ok(request)
}

/// What an answer means (OTLP specification, 1.10: OTLP/HTTP response).
fn judge(answer: Result<Response<Bytes>, String>) -> Said {
    let answer = match answer {
        Ok(answer) => answer,
        Err(error) => return Said::Later(error, None),
    };
    let status = answer.status();
    let why = || format!("the collector answers with status {}", status.as_u16());
    match status {
        status if status.is_success() => taken(answer.into_body()),
        StatusCode::TOO_MANY_REQUESTS
        | StatusCode::BAD_GATEWAY
        | StatusCode::SERVICE_UNAVAILABLE
        | StatusCode::GATEWAY_TIMEOUT => Said::Later(why(), retry_after(answer.headers())),
        _ => Said::Never(why()),
    }
}

fn taken(body: Bytes) -> Said {
    // A collector that answers with something else took the spans all the same.
    let partial = ExportTraceServiceResponse::decode(body).ok().and_then(|answer| answer.partial_success);
    match partial.map(|partial| (usize::try_from(partial.rejected_spans).unwrap_or(0), partial.error_message)) {
        Some((rejected @ 1.., why)) => {
            Said::Rejected(rejected, format!("the collector rejected {rejected} spans: {}", clip(&why)))
        }
        _ => Said::Taken,
    }
}

fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let seconds = headers.get(RETRY_AFTER)?.to_str().ok()?.trim().parse().ok()?;
    Some(Duration::from_secs(seconds))
}

#[cfg(test)]
mod tests {
    use http::Uri;

    use super::*;

    fn answered(status: u16, headers: &[(&str, &str)], body: Vec<u8>) -> Said {
        let builder = Response::builder().status(status);
        let builder = headers.iter().fold(builder, |builder, (name, value)| builder.header(*name, *value));
        judge(Ok(builder.body(body.into()).unwrap()))
    }

    #[test]
    fn only_what_may_pass_is_sent_again() {
        for status in [429, 502, 503, 504] {
            assert!(matches!(answered(status, &[], vec![]), Said::Later(_, None)), "{status}");
        }
        for status in [301, 400, 401, 403, 404, 413, 500, 501] {
            assert!(matches!(answered(status, &[], vec![]), Said::Never(_)), "{status}");
        }
        let after = answered(503, &[("retry-after", "7")], vec![]);
        assert!(matches!(after, Said::Later(_, Some(pause)) if pause == Duration::from_secs(7)), "{after:?}");
        assert!(matches!(judge(Err("gone".to_owned())), Said::Later(why, None) if why == "gone"));
    }

    #[test]
    fn a_partial_success_is_told_and_anything_else_is_a_success() {
        use opentelemetry_proto::tonic::collector::trace::v1::ExportTracePartialSuccess;
        let body = |rejected_spans, error_message: &str| {
            let error_message = error_message.to_owned();
            let partial_success = Some(ExportTracePartialSuccess { rejected_spans, error_message });
            ExportTraceServiceResponse { partial_success }.encode_to_vec()
        };
        let said = answered(200, &[], body(3, "too old"));
        assert_eq!(said, Said::Rejected(3, "the collector rejected 3 spans: too old".to_owned()));
        for body in [body(0, "a warning"), body(-1, ""), vec![], b"{\"partialSuccess\":{}}".to_vec()] {
            assert_eq!(answered(200, &[], body), Said::Taken);
        }
        assert_eq!(answered(202, &[], vec![]), Said::Taken);
    }

    #[test]
    fn the_pause_grows_and_stays_short_enough_to_see_a_recovery_in_time() {
        assert!((PAUSE / 2..=PAUSE).contains(&pause(0)));
        for failures in 0..40 {
            assert!(pause(failures) <= PAUSE_MAX);
        }
        assert!(pause(20) >= PAUSE_MAX / 2);
        assert!(super::super::EVERY + WITHIN < Duration::from_secs(5), "an outage is told within 5 s");
        assert!(PAUSE_MAX + WITHIN <= Duration::from_secs(5), "and a recovery is seen within 5 s");
    }

    #[test]
    fn a_batch_that_is_refused_for_now_stays_and_one_that_is_refused_for_good_goes() {
        let mut exporter = Exporter::new();
        let target = Target {
            url: Uri::from_static("http://127.0.0.1:1/v1/traces"),
            headers: HeaderMap::new(),
            service: "infergate".to_owned(),
        };
        exporter.take(vec![Span::default(); BATCH + 1]);
        exporter.again = exporter.next_batch(&target);
        let later = exporter.hear(Said::Later("down".to_owned(), None), BATCH);
        assert!(later.failed && later.again_in.is_some() && (later.taken, later.dropped) == (0, 0));
        assert!(exporter.again.is_some());
        let asked = exporter.hear(Said::Later("busy".to_owned(), Some(Duration::from_secs(9999))), BATCH);
        assert_eq!(asked.again_in, Some(ASKED_MAX));
        let never = exporter.hear(Said::Never("no".to_owned()), BATCH);
        assert_eq!((never.dropped, never.again_in, exporter.again.is_some()), (BATCH, None, false));
        exporter.again = exporter.next_batch(&target);
        assert_eq!(exporter.again.as_ref().map(|batch| batch.spans), Some(1));
        let part = exporter.hear(Said::Rejected(5, "odd".to_owned()), 1);
        assert_eq!((part.taken, part.dropped), (0, 1), "a collector that cannot count does no harm");
        assert!(exporter.next_batch(&target).is_none());
    }
}
