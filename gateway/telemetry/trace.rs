//! Traces: a request's place in one, whether it is kept, and the spans on their way to the collector.
//!
//! A span is built once its request is over, from the record's times. What is not kept costs two random numbers.

mod export;
mod span;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use http::{HeaderMap, HeaderName, Uri};
use opentelemetry_proto::tonic::trace::v1::Span;
use parking_lot::Mutex;

use self::export::Exporter;
use crate::audit::record::{Outcome, Record, Trace};
use crate::egress::Egress;
use crate::hex;
use crate::policy::reload::InForce;
use crate::telemetry::TraceMeters;

/// Spans that may wait for the collector; beyond it they are dropped and counted.
const HELD_MAX: usize = 4096;
/// How often what waits is sent.
const EVERY: Duration = Duration::from_secs(1);

/// The spans of the process on their way out.
#[derive(Debug)]
pub struct Tracer {
    queue: Mutex<Vec<Span>>,
    /// Spans in the queue and with the exporter together.
    held: AtomicUsize,
    meters: TraceMeters,
    exporter: tokio::sync::Mutex<Exporter>,
}

impl Tracer {
    /// A tracer with nothing to send.
    pub fn new(meters: TraceMeters) -> Self {
        let exporter = tokio::sync::Mutex::new(Exporter::new());
        Self { queue: Mutex::default(), held: AtomicUsize::new(0), meters, exporter }
    }

    /// A request is over: its spans go into the queue if they are to be kept, which is returned. Nobody is woken.
    pub fn finish(&self, traces: &Traces, record: &Record<'_>) -> bool {
        let Some(trace) = record.trace.filter(|trace| traces.keeps(trace, record)) else { return false };
        let count = 1 + record.attempts.list.len();
        if self.hold(count) {
            let spans = span::spans(&trace, record);
            self.queue.lock().extend(spans);
        } else {
            self.meters.dropped.inc_by(count as u64);
        }
        true
    }

    /// Takes room for so many spans, if there is any.
    fn hold(&self, count: usize) -> bool {
        let more = |held: usize| held.checked_add(count).filter(|held| *held <= HELD_MAX);
        self.held.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).is_ok()
    }

    /// Sends what waits, every second or so, as long as the process lives.
    pub async fn run(&self, policy: &InForce, egress: &Egress) {
        self.exporter.lock().await.egress = Some(egress.clone());
        let mut pause = EVERY;
        loop {
            tokio::time::sleep(pause).await;
            pause = self.export(policy).await;
        }
    }

    /// Sends what waits now, for `within` at most: the process is about to end.
    pub async fn flush(&self, policy: &InForce, within: Duration) {
        if tokio::time::timeout(within, self.export(policy)).await.is_err() {
            tracing::warn!(spans = self.held.load(Ordering::Relaxed), "traces are lost: no time was left to send them");
        }
    }

    /// Sends batches until nothing waits or one fails. Returns how long to wait before the next.
    async fn export(&self, policy: &InForce) -> Duration {
        let mut exporter = self.exporter.lock().await;
        exporter.take(std::mem::take(&mut *self.queue.lock()));
        let policy = policy.get();
        let Some(traces) = &policy.traces else {
            let dropped = exporter.clear();
            self.let_go(dropped);
            self.meters.dropped.inc_by(dropped as u64);
            return EVERY;
        };
        while let Some(sent) = exporter.send_batch(&traces.target).await {
            self.let_go(sent.taken + sent.dropped);
            self.meters.exported.inc_by(sent.taken as u64);
            self.meters.dropped.inc_by(sent.dropped as u64);
            if sent.failed {
                self.meters.failures.inc();
            }
            if let Some(pause) = sent.again_in {
                return pause;
            }
        }
        EVERY
    }

    fn let_go(&self, count: usize) {
        self.held.fetch_sub(count, Ordering::Relaxed);
    }
}

/// What the policy wants of traces.
#[derive(Debug)]
pub struct Traces {
    /// New traces whose id's lower half, without its lowest bit, is below this are kept.
    below: u64,
    slow: Option<Duration>,
    errors: bool,
    target: Target,
}

/// Where spans go.
#[derive(Debug)]
pub struct Target {
    /// The collector, path included.
    pub url: Uri,
    /// The policy's headers, secrets among them.
    pub headers: HeaderMap,
    /// The gateway's name among services.
    pub service: String,
}

impl Traces {
    /// Keeps a `share` of the requests that no caller has decided about, and beside them those that took `slow`, and
    /// those that failed (`errors`).
    pub fn new(share: f64, slow: Option<Duration>, errors: bool, target: Target) -> Self {
        // As OpenTelemetry's TraceIdRatioBased does it, so that all services with the same share keep the same traces.
        let below = (share.clamp(0.0, 1.0) * (1u64 << 63) as f64) as u64;
        Self { below, slow, errors, target }
    }

    /// A request's place: in its caller's trace, or in a new one.
    pub fn place(&self, caller: Option<Context>) -> Trace {
        let span = new_span();
        match caller {
            Some(caller) => Trace { id: caller.trace, span, parent: Some(caller.parent), sampled: caller.sampled },
            None => {
                let id = fastrand::u128(1..);
                Trace { id, span, parent: None, sampled: self.draws(id) }
            }
        }
    }

    fn draws(&self, id: u128) -> bool {
        (id as u64) >> 1 < self.below
    }

    /// Whether the spans of a request are kept, now that its end is known.
    fn keeps(&self, trace: &Trace, record: &Record<'_>) -> bool {
        let slow = || self.slow.is_some_and(|slow| u128::from(record.times.ended) >= slow.as_micros());
        trace.sampled || (self.errors && failed(record)) || slow()
    }
}

/// Whether a request failed by our fault or the upstream's; what a client did wrong, or wanted, is no failure.
fn failed(record: &Record<'_>) -> bool {
    let broken = matches!(record.outcome, Outcome::UpstreamError | Outcome::Timeout | Outcome::Aborted);
    broken || record.status.is_some_and(|status| status >= 500)
}

/// A new span's id.
pub fn new_span() -> u64 {
    fastrand::u64(1..)
}

/// A caller's place in a trace, as its `traceparent` tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Context {
    /// The trace.
    pub trace: u128,
    /// The caller's span.
    pub parent: u64,
    /// Whether the caller keeps the trace.
    pub sampled: bool,
}

impl Context {
    /// The context in a request's head. Two of them are none: nobody knows which one is right.
    pub fn of(headers: &HeaderMap) -> Option<Self> {
        let mut values = headers.get_all(&PLACE).iter();
        let value = values.next().filter(|_| values.next().is_none())?;
        Self::parse(value.to_str().ok()?)
    }

    /// Reads a `traceparent` (W3C Trace Context, 3.2). Of a version that is not known yet, the part that all versions
    /// have in common counts.
    pub fn parse(traceparent: &str) -> Option<Self> {
        let text = traceparent.as_bytes();
        let dashes = text.len() >= TRACEPARENT_BYTES && [2, 35, 52].iter().all(|at| text[*at] == b'-');
        if !dashes {
            return None;
        }
        let (version, flags) = (hex::number(&text[..2])?, hex::number(&text[53..55])?);
        let (trace, parent) = (hex::number(&text[3..35])?, hex::number(&text[36..52])? as u64);
        let ends = match version {
            0 => text.len() == TRACEPARENT_BYTES,
            0xff => false,
            _ => text.get(TRACEPARENT_BYTES).is_none_or(|next| *next == b'-'),
        };
        (ends && trace != 0 && parent != 0).then_some(Self { trace, parent, sampled: flags & 1 == 1 })
    }
}

/// The header that carries a place in a trace.
pub const TRACEPARENT: &str = "traceparent";
/// The same, ready to be looked up.
static PLACE: HeaderName = HeaderName::from_static(TRACEPARENT);
/// The header that goes with it; it means nothing where the other one is not valid.
pub const TRACESTATE: &str = "tracestate";
/// The length of a `traceparent` of version 00.
pub const TRACEPARENT_BYTES: usize = 55;

/// The `traceparent` for an upstream, whose parent is our attempt's `span`.
pub fn traceparent(trace: &Trace, span: u64) -> [u8; TRACEPARENT_BYTES] {
    let mut text = *b"00-00000000000000000000000000000000-0000000000000000-00";
    hex::spell(&mut text[3..35], trace.id);
    hex::spell(&mut text[36..52], u128::from(span));
    text[54] += u8::from(trace.sampled);
    text
}

#[cfg(test)]
mod tests;
