//! Pools of upstreams: which one a request goes to, and what its fate tells about the others.

pub mod breaker;
pub mod choose;
pub mod feed;
pub mod headroom;
pub mod load;
pub mod origin;
pub mod outlook;
pub mod prefix;
pub mod queue;
pub mod retry;
pub mod score;
pub mod told;
pub mod watch;
pub mod worked;

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use http::{HeaderName, HeaderValue};
use infergate_plugins::operation::Operation;
use infergate_plugins::provider::Provider;
use prometheus_client::metrics::counter::Counter;

use self::breaker::State as BreakerState;
pub use self::choose::{Choice, Wanted};
use self::headroom::Headroom;
use self::load::{FirstTokens, Paces, Work};
use self::origin::{Endpoint, OriginState};
use self::prefix::{Chain, Prefixes};
use self::score::Balance;
use crate::limits::effort::Effort;
use crate::policy::file;
use crate::telemetry::{AttemptCounters, HedgeCounters};

/// A pool as the policy means it.
#[derive(Debug)]
pub struct Pool {
    /// Its name.
    pub name: Arc<str>,
    /// Where what it is sent is read, if the policy says so.
    pub region: Option<Box<str>>,
    /// The upstreams, in the order of the file.
    pub upstreams: Vec<Upstream>,
    /// How long each phase may take.
    pub timeouts: file::Timeouts,
    /// When an attempt is made again.
    pub retry: file::Retry,
    /// When an endpoint is left alone.
    pub breaker: breaker::Parameters,
    /// How endpoints are asked for their health.
    pub health: file::Health,
    /// How many requests run and wait.
    pub concurrency: queue::Parameters,
    /// When an endpoint has room for batch.
    pub headroom: Headroom,
    /// How long a joining endpoint takes to get its full share.
    pub slow_start: Duration,
    /// How one of its endpoints is chosen.
    pub balance: Balance,
    /// What engines are asked of their load.
    pub load: file::Load,
    /// When a second endpoint is asked beside a slow one.
    pub hedge: Option<file::Hedge>,
    /// Who has read which prompt, where the balance asks for that.
    pub prefixes: Option<Arc<Prefixes>>,
    /// The levels, which outlive this policy.
    pub state: Arc<PoolState>,
}

/// One upstream as the policy means it.
#[derive(Debug)]
pub struct Upstream {
    /// Its place in the pool's list.
    pub index: usize,
    /// Its name in headers and metrics.
    pub name: HeaderValue,
    /// The path before `/v1`.
    pub path: String,
    /// The `Host` header.
    pub authority: HeaderValue,
    /// Its dialect.
    pub provider: Arc<dyn Provider>,
    /// Its key and the policy's own headers, ready to send.
    pub headers: Vec<(HeaderName, HeaderValue)>,
    /// Its share.
    pub weight: u32,
    /// Whether it is in the gateway's own zone; true where neither says a zone.
    pub near: bool,
    /// The name it knows the model by.
    pub model: Option<String>,
    /// The port at which its engine tells of its KV cache.
    pub kv_events: Option<u16>,
    /// Where it is told a request's id, to tell whose blocks it stores.
    pub kv_session: Option<file::KvSession>,
    /// The endpoints behind it.
    pub origin: Arc<OriginState>,
    /// Its counters.
    pub attempts: Arc<AttemptCounters>,
}

impl Upstream {
    /// Whether `authority` (a host, and a port where it is not the usual one) is its name or one of its addresses.
    pub fn is_at(&self, authority: &str) -> bool {
        let is = |own: &str| own.eq_ignore_ascii_case(authority);
        let origin = &self.origin.origin;
        is(&origin.authority())
            || is(&origin.host.to_string())
            || self.origin.endpoints().iter().any(|endpoint| is(&endpoint.address.to_string()))
    }
}

/// A pool's levels.
#[derive(Debug)]
pub struct PoolState {
    /// The gate.
    pub queue: Arc<queue::Queue>,
    /// The retry budget.
    pub retries: retry::Budget,
    /// Retries that the budget refused.
    pub retries_refused: Counter,
    /// How fast its endpoints usually are.
    pub paces: Paces,
    /// How long its servers work for a request, where they are paid by the hour.
    pub effort: Effort,
    /// How long its first tokens take.
    pub first_tokens: FirstTokens,
    /// How long its answers take that come as a whole.
    pub whole_answers: FirstTokens,
    /// The budget of what is asked twice at once.
    pub hedges: retry::Budget,
    /// What became of that.
    pub hedged: HedgeCounters,
    /// Counts the requests that were placed.
    pub turns: AtomicU64,
}

/// A picked endpoint, counted as in flight until dropped.
#[derive(Debug)]
pub struct Picked<'a> {
    /// The upstream.
    pub upstream: &'a Upstream,
    /// The address.
    pub endpoint: Arc<Endpoint>,
    /// Its share of what the endpoint has to do.
    pub work: Work,
    /// What it was chosen from, where the pool's balance judges all endpoints.
    pub choice: Option<Choice<'a>>,
    /// The blocks of the prompt that it has read, where its engine tells which of them it holds.
    pub read: Option<Chain>,
}

impl Pool {
    /// Picks an endpoint that can do what is wanted, as the pool's balance says: near ones first, none of `tried` as
    /// long as there is another; for batch, one with room as long as there is any.
    pub fn pick(&self, wanted: &Wanted<'_>, tried: &[Arc<Endpoint>], now: Instant) -> Option<Picked<'_>> {
        let fresh = |endpoint: &Arc<Endpoint>| !tried.iter().any(|other| Arc::ptr_eq(other, endpoint));
        let again = || if tried.is_empty() { None } else { self.roomy(wanted, now, |_| true) };
        self.roomy(wanted, now, fresh).or_else(again)
    }

    /// One with room for it, where it is batch and there is one.
    fn roomy(&self, wanted: &Wanted<'_>, now: Instant, may: impl Fn(&Arc<Endpoint>) -> bool) -> Option<Picked<'_>> {
        let roomy = |one: &Arc<Endpoint>| may(one) && self.has_room(one, now);
        let found = if wanted.batch { self.near(wanted, now, roomy) } else { None };
        found.or_else(|| self.near(wanted, now, may))
    }

    /// One that is near, where there is one.
    fn near(&self, wanted: &Wanted<'_>, now: Instant, may: impl Fn(&Arc<Endpoint>) -> bool) -> Option<Picked<'_>> {
        let able = |near| self.able(wanted.operation).filter(move |one| one.near == near);
        let one = |near| match self.balance {
            Balance::P2c => self.draw(able(near), now, &may),
            _ => self.choose(wanted, able(near), now, &may),
        };
        one(true).or_else(|| one(false))
    }

    /// The upstreams that have a share and can do `operation`.
    fn able(&self, operation: Operation) -> impl Iterator<Item = &Upstream> {
        self.upstreams.iter().filter(move |one| one.weight > 0 && one.provider.serves(operation))
    }

    /// Whether any upstream can do `operation` at all.
    pub fn serves(&self, operation: Operation) -> bool {
        self.upstreams.iter().any(|upstream| upstream.provider.serves(operation))
    }

    /// How long until some endpoint may be asked again, as far as is known.
    pub fn back_in(&self, now: Instant) -> Duration {
        let wait = |endpoint: &Arc<Endpoint>| match endpoint.breaker.state(now) {
            BreakerState::Open(left) => left,
            _ => Duration::from_millis(self.health.interval_ms),
        };
        let soonest = |upstream: &Upstream| upstream.origin.endpoints().iter().map(wait).min();
        self.upstreams.iter().filter_map(soonest).min().unwrap_or(Duration::from_secs(1))
    }

    /// Whether any endpoint may be asked now.
    pub fn available(&self, now: Instant) -> bool {
        self.upstreams.iter().any(|upstream| {
            upstream.weight > 0 && upstream.origin.endpoints().iter().any(|endpoint| endpoint.available(now))
        })
    }

    /// Power of two choices over the endpoints that `may` be taken: two are drawn by weight (Efraimidis and Spirakis 2006,
    /// weighted sampling in one pass); the first is taken unless the second is less busy.
    fn draw<'a>(
        &'a self,
        upstreams: impl Iterator<Item = &'a Upstream>,
        now: Instant,
        may: impl Fn(&Arc<Endpoint>) -> bool,
    ) -> Option<Picked<'a>> {
        let mut drawn: [Option<Drawn<'_>>; 2] = [None, None];
        for upstream in upstreams {
            for endpoint in upstream.origin.endpoints().iter() {
                if endpoint.available(now) && may(endpoint) {
                    let weight = f64::from(upstream.weight) * endpoint.warmth(self.slow_start, now);
                    keep_two(&mut drawn, upstream, endpoint, weight);
                }
            }
        }
        if second_is_less_busy(&drawn) {
            drawn.swap(0, 1);
        }
        // A half-open breaker lets one request through; where that was another one, the second is taken.
        drawn.into_iter().flatten().find(|drawn| drawn.endpoint.breaker.admit(now)).map(|drawn| Picked {
            upstream: drawn.upstream,
            work: Work::begin(&drawn.endpoint, None, &self.state.paces, now),
            endpoint: drawn.endpoint,
            choice: None,
            read: None,
        })
    }
}

/// One of the two that were drawn.
struct Drawn<'a> {
    key: f64,
    weight: f64,
    upstream: &'a Upstream,
    endpoint: Arc<Endpoint>,
}

fn keep_two<'a>(drawn: &mut [Option<Drawn<'a>>; 2], upstream: &'a Upstream, endpoint: &Arc<Endpoint>, weight: f64) {
    let chance = fastrand::f64();
    let key = if weight == 1.0 { chance } else { chance.powf(1.0 / weight) };
    let beats = |place: &Option<Drawn<'_>>| place.as_ref().is_none_or(|kept| key > kept.key);
    let place = match (beats(&drawn[0]), beats(&drawn[1])) {
        (true, _) => {
            drawn.swap(0, 1);
            0
        }
        (false, true) => 1,
        (false, false) => return,
    };
    drawn[place] = Some(Drawn { key, weight, upstream, endpoint: endpoint.clone() });
}

/// Whether the second, with one request more, would be no busier for its weight than the first is already. Among
/// equals that is the less busy one; among idle ones, whatever their weights, the draw stands, so weights are shares.
fn second_is_less_busy(drawn: &[Option<Drawn<'_>>; 2]) -> bool {
    let [Some(first), Some(second)] = drawn else { return false };
    let busy = |drawn: &Drawn<'_>, more: u32| f64::from(drawn.endpoint.in_flight() + more) / drawn.weight;
    busy(first, 0) >= busy(second, 1)
}
