//! How often limits held, and how often they were near.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

/// The metrics.
#[derive(Debug)]
pub(super) struct Limits {
    refused: Family<LimitLabels, Counter>,
    clamped: Family<LimitLabels, Counter>,
    cut: Counter,
    overshot: Family<LimitLabels, Counter>,
    warned: Family<LimitLabels, Counter>,
    max: Family<LimitLabels, Gauge>,
    left: Family<LimitLabels, Gauge>,
    reserved: Gauge,
    levels: Gauge,
}

/// The handles of one limit. They live with the policy, so that a request looks nothing up.
#[derive(Clone, Debug, Default)]
pub struct LimitMeters {
    /// A request was refused because too little was left.
    pub refused: Counter,
    /// An answer was bounded because too little was left.
    pub clamped: Counter,
    /// A request used more than was reserved: by so much.
    pub overshot: Counter,
    /// A threshold was passed.
    pub warned: Counter,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct LimitLabels {
    limit: String,
}

impl Limits {
    pub(super) fn new(registry: &mut Registry) -> Self {
        let limits = Self {
            refused: Family::default(),
            clamped: Family::default(),
            cut: Counter::default(),
            overshot: Family::default(),
            warned: Family::default(),
            max: Family::default(),
            left: Family::default(),
            reserved: Gauge::default(),
            levels: Gauge::default(),
        };
        registry.register("limit_refusals", "Requests refused by a limit", limits.refused.clone());
        registry.register("limit_clamps", "Answers bounded to what was left of a limit", limits.clamped.clone());
        registry.register("limit_cuts", "Streams ended where nothing was left", limits.cut.clone());
        registry.register("limit_overshoot", "What was used beyond what was reserved", limits.overshot.clone());
        registry.register("limit_warnings", "Thresholds of limits that were passed", limits.warned.clone());
        registry.register("limit_max", "The most of a limit that counts for all together", limits.max.clone());
        registry.register("limit_left", "What is left of a limit that counts for all together", limits.left.clone());
        registry.register("limit_reserved", "Reserved by requests that run, over all limits", limits.reserved.clone());
        registry.register("limit_levels", "Levels that limits keep", limits.levels.clone());
        limits
    }

    /// Puts the levels of a moment into the gauges: the name of each limit, the most, what is left.
    pub(super) fn levels<'a>(&self, left: impl Iterator<Item = (&'a str, u64, u64)>, reserved: u64, levels: usize) {
        self.max.clear();
        self.left.clear();
        let gauge = |amount: u64| i64::try_from(amount).unwrap_or(i64::MAX);
        for (name, max, free) in left {
            let labels = LimitLabels { limit: name.to_owned() };
            self.max.get_or_create(&labels).set(gauge(max));
            self.left.get_or_create(&labels).set(gauge(free));
        }
        self.reserved.set(gauge(reserved));
        self.levels.set(levels as i64);
    }

    /// The handles of the limit `name`.
    pub(super) fn of(&self, name: &str) -> LimitMeters {
        let labels = LimitLabels { limit: name.to_owned() };
        let handle = |family: &Family<LimitLabels, Counter>| family.get_or_create_owned(&labels);
        LimitMeters {
            refused: handle(&self.refused),
            clamped: handle(&self.clamped),
            overshot: handle(&self.overshot),
            warned: handle(&self.warned),
        }
    }

    /// A stream was ended.
    pub(super) fn cut(&self) {
        self.cut.inc();
    }
}
