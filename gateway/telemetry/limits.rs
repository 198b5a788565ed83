//! How often limits held, and how often they were near.

use std::collections::HashSet;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

use super::series::Series;

/// The metrics.
#[derive(Debug)]
pub(super) struct Limits {
    refused: Series<LimitLabels, Counter>,
    clamped: Series<LimitLabels, Counter>,
    cut: Counter,
    overshot: Series<LimitLabels, Counter>,
    warned: Series<LimitLabels, Counter>,
    max: Family<LimitLabels, Gauge>,
    left: Family<LimitLabels, Gauge>,
    reserved: Gauge,
    levels: Gauge,
    degraded: Family<HowLabels, Counter>,
    leased: Family<LimitLabels, Gauge>,
    store_up: Family<StoreLabels, Gauge>,
    store_errors: Family<StoreLabels, Counter>,
    store_duration: Family<StoreLabels, Histogram, fn() -> Histogram>,
}

/// What the store of shared limits tells of itself.
#[derive(Clone, Debug)]
pub struct StoreMeters {
    /// 1 while it answers.
    pub up: Gauge,
    /// How often it did not, or not in time.
    pub errors: Counter,
    /// How long its answers took, in seconds.
    pub duration: Histogram,
}

/// From a store beside us to one that is in trouble, in seconds.
const STORE: [f64; 10] = [0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 1.0];

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct StoreLabels {
    store: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct HowLabels {
    how: &'static str,
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
            refused: Series::default(),
            clamped: Series::default(),
            cut: Counter::default(),
            overshot: Series::default(),
            warned: Series::default(),
            max: Family::default(),
            left: Family::default(),
            reserved: Gauge::default(),
            levels: Gauge::default(),
            degraded: Family::default(),
            leased: Family::default(),
            store_up: Family::default(),
            store_errors: Family::default(),
            store_duration: Family::new_with_constructor(|| Histogram::new(STORE)),
        };
        registry.register("limit_refusals", "Requests refused by a limit", limits.refused.family());
        registry.register("limit_clamps", "Answers bounded to what was left of a limit", limits.clamped.family());
        registry.register("limit_cuts", "Streams ended where nothing was left", limits.cut.clone());
        registry.register("limit_overshoot", "What was used beyond what was reserved", limits.overshot.family());
        registry.register("limit_warnings", "Thresholds of limits that were passed", limits.warned.family());
        registry.register("limit_max", "The most of a limit that counts for all together", limits.max.clone());
        registry.register("limit_left", "What is left of a limit that counts for all together", limits.left.clone());
        registry.register("limit_reserved", "Reserved by requests that run, over all limits", limits.reserved.clone());
        registry.register("limit_levels", "Levels that limits keep", limits.levels.clone());
        let degraded = limits.degraded.clone();
        registry.register("limit_degraded", "Requests whose limits were decided without their store", degraded);
        let leased = limits.leased.clone();
        registry.register("limit_lease_held", "Of a shared limit: held for this replica in advance", leased);
        registry.register("store_up", "1 while the store of shared limits answers", limits.store_up.clone());
        let errors = limits.store_errors.clone();
        registry.register("store_errors", "Calls of the store of shared limits that failed or took too long", errors);
        let duration = limits.store_duration.clone();
        registry.register_with_unit("store_duration", "Calls of the store of shared limits", Unit::Seconds, duration);
        limits
    }

    /// The metrics of the store, from when there is one.
    pub(super) fn store(&self) -> StoreMeters {
        let labels = StoreLabels { store: "redis" };
        StoreMeters {
            up: self.store_up.get_or_create_owned(&labels),
            errors: self.store_errors.get_or_create_owned(&labels),
            duration: self.store_duration.get_or_create_owned(&labels),
        }
    }

    /// A request was decided without the store.
    pub(super) fn degraded(&self, how: &'static str) {
        self.degraded.get_or_create(&HowLabels { how }).inc();
    }

    /// What the store holds for this replica, by limit.
    pub(super) fn leased<'a>(&self, held: impl Iterator<Item = (&'a str, u64)>) {
        self.leased.clear();
        for (name, amount) in held {
            let labels = LimitLabels { limit: name.to_owned() };
            self.leased.get_or_create(&labels).set(i64::try_from(amount).unwrap_or(i64::MAX));
        }
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
        let handle = |series: &Series<LimitLabels, Counter>| series.of(&labels);
        LimitMeters {
            refused: handle(&self.refused),
            clamped: handle(&self.clamped),
            overshot: handle(&self.overshot),
            warned: handle(&self.warned),
        }
    }

    /// Limits of other names leave the page.
    pub(super) fn keep(&self, limits: &HashSet<&str>) {
        for series in [&self.refused, &self.clamped, &self.overshot, &self.warned] {
            series.keep(|labels| limits.contains(&*labels.limit));
        }
    }

    /// How many series there are.
    pub(super) fn len(&self) -> usize {
        [&self.refused, &self.clamped, &self.overshot, &self.warned].map(Series::len).iter().sum()
    }

    /// A stream was ended.
    pub(super) fn cut(&self) {
        self.cut.inc();
    }
}
