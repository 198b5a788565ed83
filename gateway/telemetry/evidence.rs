//! The metrics of what goes on behind a request: the journal, the sinks, the traces. Each is a struct of handles that
//! its owner keeps and sets from its own thread.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

/// From a quick disk to one that is in trouble, in seconds.
const COMMIT: [f64; 12] = [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0];

/// What the journal tells of itself.
#[derive(Clone, Debug)]
pub struct JournalMeters {
    /// Lines that were written.
    pub lines: Counter,
    /// Bytes that were written.
    pub bytes: Counter,
    /// Groups of lines that were made durable.
    pub commits: Counter,
    /// How long that took, in seconds.
    pub commit_duration: Histogram,
    /// 1 while nothing can be written.
    pub failing: Gauge,
    /// Requests that were refused because no record could be promised.
    pub refused: Counter,
    /// Requests that were served without a record, because the policy allows it.
    pub served: Counter,
    /// Places in the queue that requests hold.
    pub places_in_use: Gauge,
    /// All places.
    pub places: Gauge,
    /// Lines that were filed and are not durable yet.
    pub lag: Gauge,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct WhyLabels {
    why: &'static str,
}

impl JournalMeters {
    pub(super) fn new(registry: &mut Registry) -> Self {
        let unrecorded = Family::<WhyLabels, Counter>::default();
        let why = |why| unrecorded.get_or_create_owned(&WhyLabels { why });
        let m = Self {
            lines: Counter::default(),
            bytes: Counter::default(),
            commits: Counter::default(),
            commit_duration: Histogram::new(COMMIT),
            failing: Gauge::default(),
            refused: why("refused"),
            served: why("served"),
            places_in_use: Gauge::default(),
            places: Gauge::default(),
            lag: Gauge::default(),
        };
        registry.register("journal_lines", "Lines of the journal", m.lines.clone());
        registry.register_with_unit("journal", "Bytes of the journal", Unit::Bytes, m.bytes.clone());
        registry.register("journal_commits", "Groups of lines made durable", m.commits.clone());
        let duration = m.commit_duration.clone();
        registry.register_with_unit("journal_commit_duration", "To make a group durable", Unit::Seconds, duration);
        registry.register("journal_failing", "1 while nothing can be written", m.failing.clone());
        registry.register("journal_unrecorded", "Requests that have no record", unrecorded);
        registry.register("journal_places_in_use", "Places that requests hold", m.places_in_use.clone());
        registry.register("journal_places", "Places in the queue", m.places.clone());
        registry.register("journal_lag_lines", "Filed and not durable yet", m.lag.clone());
        m
    }
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct SinkLabels {
    sink: String,
}

/// What one sink tells of itself.
#[derive(Clone, Debug, Default)]
pub struct SinkMeters {
    /// Lines of the journal that it has not delivered yet.
    pub lag: Gauge,
    /// Lines that were delivered.
    pub delivered: Counter,
    /// Lines that the sink refuses for good and does not get.
    pub refused: Counter,
    /// Deliveries that failed.
    pub failures: Counter,
    /// 0 since the newest delivery failed, else 1.
    pub healthy: Gauge,
}

/// The metrics of all sinks.
#[derive(Debug, Default)]
pub(super) struct Sinks {
    lag: Family<SinkLabels, Gauge>,
    delivered: Family<SinkLabels, Counter>,
    refused: Family<SinkLabels, Counter>,
    failures: Family<SinkLabels, Counter>,
    healthy: Family<SinkLabels, Gauge>,
}

impl Sinks {
    pub(super) fn new(registry: &mut Registry) -> Self {
        let sinks = Self::default();
        registry.register("sink_lag_lines", "Lines that are still to be delivered", sinks.lag.clone());
        registry.register("sink_delivered", "Lines that were delivered", sinks.delivered.clone());
        registry.register("sink_refused", "Lines refused for good and passed over", sinks.refused.clone());
        registry.register("sink_failures", "Deliveries that failed", sinks.failures.clone());
        registry.register("sink_healthy", "0 since a delivery failed", sinks.healthy.clone());
        sinks
    }

    pub(super) fn of(&self, name: &str) -> SinkMeters {
        let labels = SinkLabels { sink: name.to_owned() };
        SinkMeters {
            lag: self.lag.get_or_create_owned(&labels),
            delivered: self.delivered.get_or_create_owned(&labels),
            refused: self.refused.get_or_create_owned(&labels),
            failures: self.failures.get_or_create_owned(&labels),
            healthy: self.healthy.get_or_create_owned(&labels),
        }
    }

    pub(super) fn forget(&self, name: &str) {
        let labels = SinkLabels { sink: name.to_owned() };
        self.lag.remove(&labels);
        self.delivered.remove(&labels);
        self.refused.remove(&labels);
        self.failures.remove(&labels);
        self.healthy.remove(&labels);
    }
}

/// What the ledger tells of itself.
#[derive(Clone, Debug, Default)]
pub struct LedgerMeters {
    /// Lines of this process's run that are not folded yet.
    pub lag: Gauge,
    /// Records that were folded.
    pub folded: Counter,
    /// Times that it could not be opened, read or written.
    pub failures: Counter,
    /// Lines that were removed or lost before they were folded.
    pub missed: Counter,
    /// 0 since the newest attempt failed, else 1.
    pub healthy: Gauge,
}

impl LedgerMeters {
    pub(super) fn new(registry: &mut Registry) -> Self {
        let meters = Self::default();
        registry.register("ledger_lag_lines", "Lines that are still to be folded", meters.lag.clone());
        registry.register("ledger_folded", "Records that were folded", meters.folded.clone());
        registry.register("ledger_failures", "Times that the ledger could not be used", meters.failures.clone());
        registry.register("ledger_missed_lines", "Lines lost before they were folded", meters.missed.clone());
        registry.register("ledger_healthy", "0 since the ledger failed", meters.healthy.clone());
        meters
    }
}

/// What the exporter of traces tells of itself.
#[derive(Clone, Debug, Default)]
pub struct TraceMeters {
    /// Spans that the collector took.
    pub exported: Counter,
    /// Spans that were thrown away: the queue was full, or the collector would not have them.
    pub dropped: Counter,
    /// Exports that failed.
    pub failures: Counter,
}

impl TraceMeters {
    pub(super) fn new(registry: &mut Registry) -> Self {
        let meters = Self::default();
        registry.register("trace_spans_exported", "Spans that the collector took", meters.exported.clone());
        registry.register("trace_spans_dropped", "Spans thrown away: no room, or not wanted", meters.dropped.clone());
        registry.register("trace_exports_failed", "Exports that failed", meters.failures.clone());
        meters
    }
}

#[cfg(test)]
mod tests {
    use prometheus_client::encoding::text::encode;

    use super::*;

    #[test]
    fn a_sink_that_is_gone_leaves_the_metrics() {
        let mut registry = Registry::default();
        let sinks = Sinks::new(&mut registry);
        sinks.of("siem").delivered.inc();
        sinks.of("disk").healthy.set(1);
        sinks.forget("siem");
        let mut page = String::new();
        encode(&mut page, &registry).unwrap();
        assert!(!page.contains("siem") && page.contains("sink_healthy{sink=\"disk\"} 1"), "{page}");
    }
}
