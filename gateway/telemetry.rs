//! Every metric, in one list, with the handles that the request path keeps.
//!
//! Labels come from bounded sets only: the table of surfaces, the refusals, the policy's models, pools and upstreams.

mod evidence;
mod genai;
mod guards;
mod issuers;
mod limits;
pub mod names;
mod process;
mod routes;
mod series;
mod shown;
mod spent;
mod tables;
pub mod trace;

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

use self::evidence::Sinks;
pub use self::evidence::{JournalMeters, LedgerMeters, SinkMeters, TraceMeters};
use self::genai::GenAi;
pub use self::genai::Meters;
pub use self::guards::GuardMeters;
use self::guards::Guards;
pub use self::issuers::IssuerMeters;
use self::issuers::Issuers;
use self::limits::Limits;
pub use self::limits::{LimitMeters, StoreMeters};
use self::process::Process;
pub use self::process::Runtimes;
use self::routes::Routes;
use self::series::Series;
use self::spent::Spent;
pub use self::spent::SpentMeters;
pub use self::tables::Table;
use self::tables::Tables;
use crate::audit::record::{OUTCOMES, Record};
use crate::decimal;
use crate::policy::file::OnStoreError;
use crate::policy::{Policy, Route, Tenant};
use crate::pool::feed::Heard;
use crate::pool::told::Cache;
use crate::refusal::{CODES, Code};
use crate::routers::Decided;
use crate::surface::{ROWS, Surface, TABLE};

/// Seconds, from a millisecond to the longest answers.
const BUCKETS: [f64; 15] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0, 600.0];

/// Seconds, for what takes microseconds.
const SELF_BUCKETS: [f64; 9] = [10e-6, 25e-6, 50e-6, 100e-6, 250e-6, 500e-6, 1e-3, 5e-3, 25e-3];

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct RequestLabels {
    surface: &'static str,
    outcome: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct SurfaceLabels {
    surface: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct StageLabels {
    stage: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct CodeLabels {
    code: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct WhyLabels {
    why: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct AttemptLabels {
    pool: String,
    upstream: String,
    result: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct PoolLabels {
    pool: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct EndpointLabels {
    pool: String,
    upstream: String,
    address: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct HedgeLabels {
    pool: String,
    result: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct HashLabels {
    hash: String,
}

/// The results of attempts on one upstream.
#[derive(Clone, Debug, Default)]
pub struct AttemptCounters {
    /// An answer was passed on.
    pub answered: Counter,
    /// No connection.
    pub connect: Counter,
    /// The connection was lost before an answer.
    pub reset: Counter,
    /// No answer in time.
    pub timeout: Counter,
    /// A status that the policy counts as a failure.
    pub status: Counter,
    /// A kept connection was stale; one more was opened, for free.
    pub stale: Counter,
    /// The client left first.
    pub cancelled: Counter,
    /// The answer broke off on its way.
    pub broken: Counter,
}

/// What became of asking a second endpoint beside a slow one, in one pool.
#[derive(Clone, Debug)]
pub struct HedgeCounters {
    /// The second one began first.
    pub won: Counter,
    /// The first one did after all.
    pub lost: Counter,
    /// The budget did not allow it.
    pub refused: Counter,
    /// Prompt tokens that losers were given to read.
    pub tokens: Counter,
}

/// The words for the fields of [`AttemptCounters`], in their order.
const RESULTS: [&str; 8] = ["answered", "connect", "reset", "timeout", "status", "stale", "cancelled", "broken"];

/// All metrics of the process.
#[derive(Debug)]
pub struct Telemetry {
    registry: Mutex<Registry>,
    genai: GenAi,
    sinks: Sinks,
    issuers: Issuers,
    spent: Spent,
    limits: Limits,
    guards: Guards,
    routes: Routes,
    tables: Tables,
    requests: [[Counter; OUTCOMES.len()]; ROWS],
    durations: [Histogram; ROWS],
    first_tokens: [Histogram; ROWS],
    refusals: [Counter; CODES.len()],
    attempts: Family<AttemptLabels, Counter>,
    /// The upstreams, by pool and name, whose counters somebody holds.
    attempted: Mutex<HashMap<(String, String), Weak<AttemptCounters>>>,
    admin_denied: Family<WhyLabels, Counter>,
    retries_refused: Series<PoolLabels, Counter>,
    hedges: Series<HedgeLabels, Counter>,
    hedge_tokens: Series<PoolLabels, Counter>,
    pool_in_flight: Family<PoolLabels, Gauge>,
    pool_waiting: Family<PoolLabels, Gauge>,
    endpoint_in_flight: Family<EndpointLabels, Gauge>,
    endpoint_healthy: Family<EndpointLabels, Gauge>,
    endpoint_breaker: Family<EndpointLabels, Gauge>,
    endpoint_kv: Family<EndpointLabels, Gauge>,
    endpoint_prefill: Family<EndpointLabels, Gauge>,
    endpoint_streams: Family<EndpointLabels, Gauge>,
    endpoint_prefill_rate: Family<EndpointLabels, Gauge<f64, AtomicU64>>,
    policy_hash: Family<HashLabels, Gauge>,
    policy_revision: Gauge,
    policy_age: Gauge<f64, AtomicU64>,
    policy_failed: Gauge,
    reloads: Counter,
    reloads_failed: Counter,
    body_bytes: Gauge,
    resident: Gauge,
    shedding: Gauge,
    /// Requests that run now.
    pub in_flight: Gauge,
    admit_time: Histogram,
    relay_time: Histogram,
    loaded_at: AtomicU64,
    /// For the journal to keep.
    pub journal: JournalMeters,
    /// For the ledger to keep.
    pub ledger: LedgerMeters,
    /// For the exporter of traces to keep.
    pub traces: TraceMeters,
    /// Where runtimes tell of themselves.
    pub runtimes: Runtimes,
}

/// What an endpoint is doing, for the gauges.
pub struct EndpointLevel {
    /// The pool's name.
    pub pool: String,
    /// The upstream's name.
    pub upstream: String,
    /// The address.
    pub address: String,
    /// Requests on it.
    pub in_flight: u32,
    /// Whether its health checks are good.
    pub healthy: bool,
    /// 0 closed, 1 half open, 2 open.
    pub breaker: i64,
    /// Prompt tokens that it has to read, answers that it writes, prompt tokens that it reads a second; where its pool
    /// weighs them.
    pub work: Option<(u32, u32, f32)>,
    /// Its KV cache, where its engine told.
    pub cache: Option<Cache>,
    /// What its engine told of its cache in events, and whether they are believed.
    pub events: Option<(Heard, bool)>,
}

fn histogram() -> Histogram {
    Histogram::new(BUCKETS)
}

fn surface_name(row: usize) -> &'static str {
    match row {
        row if row < TABLE.len() => TABLE[row].path,
        row if row == TABLE.len() => "passthrough",
        _ => "unknown",
    }
}

impl Default for Telemetry {
    fn default() -> Self {
        Self::new()
    }
}

impl Telemetry {
    /// All metrics at zero.
    pub fn new() -> Self {
        let mut page = Registry::default();
        let genai = GenAi::new(&mut page);
        let runtimes = Runtimes::default();
        page.register_collector(Box::new(Process(runtimes.clone())));
        let registry = page.sub_registry_with_prefix("infergate");
        let requests = Family::<RequestLabels, Counter>::default();
        let durations = Family::<SurfaceLabels, Histogram>::new_with_constructor(histogram);
        let first_tokens = Family::<SurfaceLabels, Histogram>::new_with_constructor(histogram);
        let refusals = Family::<CodeLabels, Counter>::default();
        let self_time = Family::<StageLabels, Histogram>::new_with_constructor(|| Histogram::new(SELF_BUCKETS));
        let telemetry = Self {
            requests: std::array::from_fn(|row| {
                std::array::from_fn(|outcome| {
                    let labels = RequestLabels { surface: surface_name(row), outcome: OUTCOMES[outcome].1 };
                    requests.get_or_create(&labels).clone()
                })
            }),
            durations: std::array::from_fn(|row| {
                durations.get_or_create(&SurfaceLabels { surface: surface_name(row) }).clone()
            }),
            first_tokens: std::array::from_fn(|row| {
                first_tokens.get_or_create(&SurfaceLabels { surface: surface_name(row) }).clone()
            }),
            refusals: std::array::from_fn(|code| {
                refusals.get_or_create(&CodeLabels { code: CODES[code].name() }).clone()
            }),
            attempts: Family::default(),
            attempted: Mutex::default(),
            admin_denied: Family::default(),
            retries_refused: Series::default(),
            hedges: Series::default(),
            hedge_tokens: Series::default(),
            pool_in_flight: Family::default(),
            pool_waiting: Family::default(),
            endpoint_in_flight: Family::default(),
            endpoint_healthy: Family::default(),
            endpoint_breaker: Family::default(),
            endpoint_kv: Family::default(),
            endpoint_prefill: Family::default(),
            endpoint_streams: Family::default(),
            endpoint_prefill_rate: Family::default(),
            policy_hash: Family::default(),
            policy_revision: Gauge::default(),
            policy_age: Gauge::default(),
            policy_failed: Gauge::default(),
            reloads: Counter::default(),
            reloads_failed: Counter::default(),
            body_bytes: Gauge::default(),
            resident: Gauge::default(),
            shedding: Gauge::default(),
            in_flight: Gauge::default(),
            admit_time: self_time.get_or_create_owned(&StageLabels { stage: "admit" }),
            relay_time: self_time.get_or_create_owned(&StageLabels { stage: "relay" }),
            loaded_at: AtomicU64::new(0),
            journal: JournalMeters::new(registry),
            ledger: LedgerMeters::new(registry),
            traces: TraceMeters::new(registry),
            sinks: Sinks::new(registry),
            issuers: Issuers::new(registry),
            spent: Spent::new(registry),
            limits: Limits::new(registry),
            guards: Guards::new(registry),
            routes: Routes::new(registry),
            tables: Tables::new(registry),
            runtimes,
            genai,
            registry: Mutex::default(),
        };
        let t = &telemetry;
        registry.register("requests", "Requests by surface and outcome", requests);
        registry.register_with_unit("request_duration", "From head to end of answer", Unit::Seconds, durations);
        registry.register_with_unit("time_to_first_token", "From head to first piece", Unit::Seconds, first_tokens);
        registry.register("refusals", "Refusals by code", refusals);
        registry.register("attempts", "Attempts on upstreams by result", t.attempts.clone());
        registry.register("admin_denied", "Requests on the admin port that were not let in", t.admin_denied.clone());
        registry.register("retries_refused", "Retries that the budget refused", t.retries_refused.family());
        registry.register("hedges", "Second endpoints asked beside slow ones", t.hedges.family());
        registry.register("hedge_tokens", "Prompt tokens given to those that lost", t.hedge_tokens.family());
        registry.register("requests_in_flight", "Requests that run now", t.in_flight.clone());
        registry.register("pool_in_flight", "Requests that a pool runs now", t.pool_in_flight.clone());
        registry.register("pool_waiting", "Requests in a pool's queue", t.pool_waiting.clone());
        registry.register("endpoint_in_flight", "Requests on an endpoint", t.endpoint_in_flight.clone());
        registry.register("endpoint_healthy", "1 if the health checks are good", t.endpoint_healthy.clone());
        registry.register("endpoint_breaker", "0 closed, 1 half open, 2 open", t.endpoint_breaker.clone());
        registry.register("endpoint_kv_tokens", "Tokens of its KV cache, as it told", t.endpoint_kv.clone());
        registry.register("endpoint_prefill_tokens", "Prompt tokens to be read", t.endpoint_prefill.clone());
        registry.register("endpoint_streams", "Answers that are being written", t.endpoint_streams.clone());
        let learned = t.endpoint_prefill_rate.clone();
        registry.register("endpoint_prefill_rate", "Prompt tokens that it reads a second, as learned", learned);
        registry.register("policy_info", "1 for the policy in force", t.policy_hash.clone());
        registry.register("policy_revision", "Counts the policies since the start", t.policy_revision.clone());
        registry.register_with_unit("policy_age", "Since the policy was loaded", Unit::Seconds, t.policy_age.clone());
        registry.register("policy_failed", "1 if the newest policy was refused", t.policy_failed.clone());
        registry.register("policy_reloads", "Policies that came into force", t.reloads.clone());
        registry.register("policy_reloads_failed", "Policies that were refused", t.reloads_failed.clone());
        registry.register_with_unit("bodies_in_flight", "Bodies held in memory", Unit::Bytes, t.body_bytes.clone());
        registry.register_with_unit("resident_memory", "Of the process", Unit::Bytes, t.resident.clone());
        registry.register("shedding", "1 while requests are refused for memory", t.shedding.clone());
        registry.register_with_unit("self_time", "What the gateway itself took", Unit::Seconds, self_time);
        *telemetry.registry.lock() = page;
        telemetry
    }

    /// A request is over. `route` is where it went, if it came so far.
    pub fn finished(&self, record: &Record<'_>, surface: &Surface, route: Option<&Route>) {
        let (row, times) = (surface.index(), &record.times);
        self.requests[row][record.outcome as usize].inc();
        self.durations[row].observe(seconds(times.ended));
        if let Some((body, admitted)) = times.body.zip(times.admitted) {
            let admit = admitted.saturating_sub(body);
            self.admit_time.observe(seconds(admit));
            if times.first.is_some() {
                self.relay_time.observe(seconds(times.own.saturating_sub(admit)));
            }
        }
        if let Some(first) = times.first {
            self.first_tokens[row].observe(seconds(first));
        }
        if let Some(route) = route {
            self.genai.finished(record, surface.operation, route);
            self.spent.finished(record, &route.spent, || self.genai.model(&route.model.name));
        }
    }

    /// A request of `tenant` is over: where its cost is measured, that is counted.
    pub fn spent_by(&self, record: &Record<'_>, tenant: &Tenant, route: Option<&Route>) {
        if let (Some(cost), Some(route)) = (record.cost.filter(|_| tenant.is_measured), route) {
            self.spent.by(tenant.name.clone(), self.genai.model(&route.model.name), cost.nanousd);
        }
    }

    /// A model was chosen where its name left it open.
    pub fn decided(&self, router: &Arc<str>, decided: &Decided, took: Duration) {
        self.routes.decided(router, decided, took);
    }

    /// An answer was not good enough, and the next model of a cascade is asked.
    pub fn escalated(&self, router: &Arc<str>, cause: &'static str) {
        self.routes.escalated(router, cause);
    }

    /// We said no.
    pub fn refused(&self, code: Code) {
        self.refusals[code as usize].inc();
    }

    /// The counters of one upstream, to be kept with it. They leave the page when nobody holds them any more.
    pub fn attempts(&self, pool: &str, upstream: &str) -> Arc<AttemptCounters> {
        let mut attempted = self.attempted.lock();
        let entry = attempted.entry((pool.to_owned(), upstream.to_owned())).or_default();
        entry.upgrade().unwrap_or_else(|| {
            let counters = Arc::new(self.attempt_counters(pool, upstream));
            *entry = Arc::downgrade(&counters);
            counters
        })
    }

    fn attempt_counters(&self, pool: &str, upstream: &str) -> AttemptCounters {
        let [answered, connect, reset, timeout, status, stale, cancelled, broken] = RESULTS.map(|result| {
            let labels = AttemptLabels { pool: pool.to_owned(), upstream: upstream.to_owned(), result };
            self.attempts.get_or_create_owned(&labels)
        });
        AttemptCounters { answered, connect, reset, timeout, status, stale, cancelled, broken }
    }

    fn forget_upstreams(&self) {
        self.attempted.lock().retain(|(pool, upstream), counters| {
            let held = counters.strong_count() > 0;
            if !held {
                for result in RESULTS {
                    let labels = AttemptLabels { pool: pool.clone(), upstream: upstream.clone(), result };
                    self.attempts.remove(&labels);
                }
            }
            held
        });
    }

    /// The metrics of one sink, to be kept with it.
    pub fn sink(&self, name: &str) -> SinkMeters {
        self.sinks.of(name)
    }

    /// The metrics of one guardrail, to be kept with it.
    pub fn guardrail(&self, name: &str) -> GuardMeters {
        self.guards.of(name)
    }

    /// The metrics of one limit, to be kept with it.
    pub fn limit(&self, name: &str) -> LimitMeters {
        self.limits.of(name)
    }

    /// Puts the levels of limits into the gauges.
    pub fn limit_levels<'a>(&self, left: impl Iterator<Item = (&'a str, u64, u64)>, reserved: u64, levels: usize) {
        self.limits.levels(left, reserved, levels);
    }

    /// The metrics of the store of shared limits, from when there is one.
    pub fn store(&self) -> StoreMeters {
        self.limits.store()
    }

    /// A request was decided without it.
    pub fn limit_degraded(&self, how: OnStoreError) {
        self.limits.degraded(match how {
            OnStoreError::LocalShare => "local_share",
            OnStoreError::Allow => "allow",
            OnStoreError::Deny => "deny",
        });
    }

    /// What the store holds for this replica, by limit.
    pub fn lease_held<'a>(&self, held: impl Iterator<Item = (&'a str, u64)>) {
        self.limits.leased(held);
    }

    /// A stream was ended where nothing was left.
    pub fn limit_cut(&self) {
        self.limits.cut();
    }

    /// A sink left the policy.
    pub fn sink_gone(&self, name: &str) {
        self.sinks.forget(name);
    }

    /// Somebody was not let in on the admin port.
    pub fn admin_denied(&self, why: &'static str) {
        self.admin_denied.get_or_create(&WhyLabels { why }).inc();
    }

    /// The metrics of one issuer's keys, to be kept with them.
    pub fn issuer(&self, server: &str) -> IssuerMeters {
        self.issuers.of(server)
    }

    /// An issuer left the policy.
    pub fn issuer_gone(&self, server: &str) {
        self.issuers.forget(server);
    }

    /// The counter of one pool's refused retries, to be kept with it.
    pub fn retries_refused(&self, pool: &str) -> Counter {
        self.retries_refused.of(&PoolLabels { pool: pool.to_owned() })
    }

    /// The counters of one pool's hedges, to be kept with it.
    pub fn hedges(&self, pool: &str) -> HedgeCounters {
        let of = |result| self.hedges.of(&HedgeLabels { pool: pool.to_owned(), result });
        let tokens = self.hedge_tokens.of(&PoolLabels { pool: pool.to_owned() });
        HedgeCounters { won: of("won"), lost: of("lost"), refused: of("refused"), tokens }
    }

    /// A policy came into force.
    pub fn policy_loaded(&self, revision: u64, hash: &str) {
        self.policy_hash.clear();
        self.policy_hash.get_or_create(&HashLabels { hash: hash.to_owned() }).set(1);
        self.policy_revision.set(i64::try_from(revision).unwrap_or(i64::MAX));
        self.policy_failed.set(0);
        self.reloads.inc();
        self.loaded_at.store(now_ms(), Ordering::Relaxed);
        self.forget_upstreams();
    }

    /// What `policy`, the one in force, does not name leaves the page.
    pub fn keep(&self, policy: &Policy) {
        let rules = policy.guardrails.iter().flat_map(|rails| rails.rules.rules());
        self.guards.keep(&rules.map(|rule| &*rule.name).collect());
        self.limits.keep(&policy.all_limits().map(|limit| &*limit.name).collect());
        let tenants = policy.tenants.values().filter(|tenant| tenant.is_measured);
        let routes = policy.listed().iter().map(|(_, route)| route);
        // Whoever has no label of their own is counted under a name that stays.
        let routes = routes.chain(policy.passthrough.iter().map(|path| &path.route));
        let models = routes.map(|route| &*route.model.name).chain([genai::OTHER]).collect();
        self.spent.keep(&models, &tenants.map(|tenant| &*tenant.name).collect());
        self.genai.keep(&models);
        let routers = policy.listed().iter().filter_map(|(_, route)| route.routers.as_deref());
        self.routes.keep(&routers.map(|router| (&*router.name, router)).collect());
    }

    /// A pool's levels are gone, and so are their counters.
    pub fn pool_gone(&self, pool: &str) {
        self.retries_refused.keep(|labels| labels.pool != pool);
        self.hedge_tokens.keep(|labels| labels.pool != pool);
        self.hedges.keep(|labels| labels.pool != pool);
    }

    /// Puts the sizes of tables into the gauges, those of metrics included.
    pub fn tables(&self, tables: impl Iterator<Item = Table>) {
        let own = [
            Table::named("series_of_upstreams", self.attempted.lock().len() * RESULTS.len()),
            Table::named("series_of_pools", self.retries_refused.len() + self.hedges.len() + self.hedge_tokens.len()),
            Table::named("series_of_guardrails", self.guards.len()),
            Table::named("series_of_limits", self.limits.len()),
            Table::named("series_of_routes", self.routes.len()),
            Table::named("series_of_tenants", self.spent.len()),
        ];
        tables.chain(own).chain(self.genai.tables()).for_each(|table| self.tables.show(table));
    }

    /// The newest policy is the one in force already.
    pub fn policy_kept(&self) {
        self.policy_failed.set(0);
    }

    /// A policy was refused; the one before stays.
    pub fn policy_refused(&self) {
        self.policy_failed.set(1);
        self.reloads_failed.inc();
    }

    /// Puts the levels of a moment into the gauges; pools and endpoints that are gone leave them.
    pub fn levels(&self, pools: &[(String, u32, usize)], endpoints: &[EndpointLevel], body_bytes: u64) {
        self.pool_in_flight.clear();
        self.pool_waiting.clear();
        for (pool, in_flight, waiting) in pools {
            let labels = PoolLabels { pool: pool.clone() };
            self.pool_in_flight.get_or_create(&labels).set(i64::from(*in_flight));
            self.pool_waiting.get_or_create(&labels).set(*waiting as i64);
        }
        let families = [&self.endpoint_in_flight, &self.endpoint_healthy, &self.endpoint_breaker];
        let work = [&self.endpoint_prefill, &self.endpoint_streams, &self.endpoint_kv];
        families.into_iter().chain(work).for_each(Family::clear);
        self.endpoint_prefill_rate.clear();
        for level in endpoints {
            let labels = EndpointLabels {
                pool: level.pool.clone(),
                upstream: level.upstream.clone(),
                address: level.address.clone(),
            };
            self.endpoint_in_flight.get_or_create(&labels).set(i64::from(level.in_flight));
            self.endpoint_healthy.get_or_create(&labels).set(i64::from(level.healthy));
            self.endpoint_breaker.get_or_create(&labels).set(level.breaker);
            if let Some((prefill, streams, rate)) = level.work {
                self.endpoint_prefill.get_or_create(&labels).set(i64::from(prefill));
                self.endpoint_streams.get_or_create(&labels).set(i64::from(streams));
                self.endpoint_prefill_rate.get_or_create(&labels).set(f64::from(rate));
            }
            if let Some(cache) = level.cache {
                self.endpoint_kv.get_or_create(&labels).set(i64::from(cache.tokens));
            }
        }
        self.forget_upstreams();
        self.body_bytes.set(i64::try_from(body_bytes).unwrap_or(i64::MAX));
        self.policy_age.set(now_ms().saturating_sub(self.loaded_at.load(Ordering::Relaxed)) as f64 / 1e3);
    }

    /// The process's memory, and whether requests are refused for it.
    pub fn memory(&self, resident: u64, shedding: bool) {
        self.resident.set(i64::try_from(resident).unwrap_or(i64::MAX));
        self.shedding.set(i64::from(shedding));
    }

    /// Everything in OpenMetrics' text format.
    pub fn text(&self) -> String {
        let mut out = String::new();
        match text::encode(&mut out, &self.registry.lock()) {
            Ok(()) => out,
            Err(error) => format!("# the metrics could not be written: {error}\n# EOF\n"),
        }
    }
}

fn seconds(micros: u64) -> f64 {
    micros as f64 / 1e6
}

fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

/// Counts a request in as long as it lives.
#[derive(Debug)]
pub struct InFlight(Arc<Telemetry>);

impl InFlight {
    /// Counts one in.
    pub fn enter(telemetry: &Arc<Telemetry>) -> Self {
        telemetry.in_flight.inc();
        Self(telemetry.clone())
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.in_flight.dec();
    }
}

/// Milliseconds with three decimals, as `Server-Timing` wants them. By hand: every answer has them.
pub fn server_timing(stages: &[(&'static str, Duration)]) -> Vec<u8> {
    let mut out = Vec::with_capacity(stages.len() * 24);
    for (index, (name, took)) in stages.iter().enumerate() {
        let (ms, micros) = (took.as_secs() * 1000 + u64::from(took.subsec_millis()), took.subsec_micros() % 1000);
        out.extend_from_slice(if index == 0 { b"" } else { b", " });
        out.extend_from_slice(name.as_bytes());
        out.extend_from_slice(b";dur=");
        out.extend_from_slice(decimal::digits(ms, &mut [0; 20]));
        out.push(b'.');
        out.extend([micros / 100, micros / 10 % 10, micros % 10].map(|digit| b'0' + digit as u8));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_stand_in_the_order_of_the_enum() {
        for (index, code) in CODES.iter().enumerate() {
            assert_eq!(*code as usize, index, "{code:?}");
        }
    }

    #[test]
    fn stages_are_told_in_milliseconds() {
        let stages = [("body", Duration::from_micros(1_500)), ("admit", Duration::from_micros(7))];
        assert_eq!(server_timing(&stages), b"body;dur=1.500, admit;dur=0.007");
        let long = server_timing(&[("upstream", Duration::from_micros(3_661_000_999))]);
        assert_eq!(long, b"upstream;dur=3661000.999");
    }

    #[test]
    fn a_pool_that_is_gone_leaves_the_gauges() {
        let telemetry = Telemetry::new();
        telemetry.levels(&[("old".into(), 1, 0)], &[], 0);
        assert!(telemetry.text().contains("pool=\"old\""));
        telemetry.levels(&[], &[], 0);
        assert!(!telemetry.text().contains("pool=\"old\""));
    }

    #[test]
    fn an_upstream_that_nobody_holds_leaves_the_page() {
        let telemetry = Telemetry::new();
        let held = telemetry.attempts("p", "held");
        let before = telemetry.attempts("p", "back");
        before.reset.inc();
        drop((before, telemetry.attempts("p", "gone")));
        let back = telemetry.attempts("p", "back");
        telemetry.levels(&[], &[], 0);
        held.answered.inc();
        back.reset.inc();
        let page = telemetry.text();
        assert!(!page.contains("gone"), "{page}");
        let line = |upstream, result, count| {
            let labels = format!("{{pool=\"p\",upstream=\"{upstream}\",result=\"{result}\"}}");
            page.contains(&format!("infergate_attempts_total{labels} {count}\n"))
        };
        assert!(line("held", "answered", 1) && line("back", "reset", 2), "{page}");
    }
}
