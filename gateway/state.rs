//! What outlives a reload: levels, keyed by name.
//!
//! The policy carries parameters and this carries levels, so a reload resets nobody's breaker, queue or count.
//! Every map here is swept of what no policy names any more.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Instant, SystemTime};

use dashmap::DashMap;
use infergate_plugins::authenticator::jwt::{KeySet, Source};

use crate::issuers::Kept;
use crate::limits::density::Density;
use crate::limits::effort::Effort;
use crate::limits::{self, Levels};
use crate::pool::PoolState;
use crate::pool::load::{FirstTokens, Paces};
use crate::pool::origin::{Origin, OriginState};
use crate::pool::prefix::{self, Prefixes};
use crate::pool::queue::Queue;
use crate::pool::retry::Budget;
use crate::routers::conversations::{self, Conversations};
use crate::telemetry::{Table, Telemetry};

/// The levels of the process.
#[derive(Debug)]
pub struct State {
    origins: DashMap<Origin, Arc<OriginState>>,
    pools: DashMap<String, Arc<PoolState>>,
    densities: DashMap<String, Arc<Density>>,
    prefixes: OnceLock<Arc<Prefixes>>,
    /// Which models conversations have.
    pub conversations: Arc<Conversations>,
    /// What limits have counted.
    pub limits: Levels,
    key_sets: DashMap<Source, Arc<Kept>>,
    /// Bytes of bodies that are held now.
    pub bodies: Arc<ByteBudget>,
    /// Set while the process is at its memory ceiling.
    pub shedding: AtomicBool,
}

impl State {
    /// Empty levels, with room for `body_bytes_max` bytes of bodies.
    pub fn new(body_bytes_max: u64) -> Self {
        Self {
            origins: DashMap::new(),
            pools: DashMap::new(),
            densities: DashMap::new(),
            prefixes: OnceLock::new(),
            conversations: Arc::default(),
            limits: Levels::default(),
            key_sets: DashMap::new(),
            bodies: Arc::new(ByteBudget::new(body_bytes_max)),
            shedding: AtomicBool::new(false),
        }
    }

    /// The levels of an origin, old or new.
    pub fn origin(&self, origin: &Origin, now: Instant) -> Arc<OriginState> {
        let entry = self.origins.entry(origin.clone());
        entry.or_insert_with(|| Arc::new(OriginState::new(origin.clone(), now))).clone()
    }

    /// The levels of a pool, old or new.
    pub fn pool(&self, name: &str, telemetry: &Telemetry, now: Instant) -> Arc<PoolState> {
        let fresh = || PoolState {
            queue: Arc::new(Queue::default()),
            retries: Budget::new(now),
            retries_refused: telemetry.retries_refused(name),
            paces: Paces::default(),
            effort: Effort::default(),
            first_tokens: FirstTokens::default(),
            whole_answers: FirstTokens::default(),
            hedges: Budget::new(now),
            hedged: telemetry.hedges(name),
            turns: AtomicU64::new(0),
        };
        self.pools.entry(name.to_owned()).or_insert_with(|| Arc::new(fresh())).clone()
    }

    /// What has been learned of a model's tokens.
    pub fn density(&self, model: &str) -> Arc<Density> {
        self.densities.entry(model.to_owned()).or_default().clone()
    }

    /// Who has read which prompt; made when the first pool asks for it.
    pub fn prefixes(&self) -> Arc<Prefixes> {
        self.prefixes.get_or_init(|| Arc::new(Prefixes::new(prefix::CAPACITY, fastrand::u64(..)))).clone()
    }

    /// The same, if there is something in it to be forgotten.
    pub fn untidy_prefixes(&self) -> Option<Arc<Prefixes>> {
        self.prefixes.get().filter(|prefixes| prefixes.is_untidy()).cloned()
    }

    /// The keys of an issuer, old ones or none yet.
    pub fn key_set(&self, source: &Source) -> Arc<KeySet> {
        self.key_sets.entry(source.clone()).or_insert_with(|| Arc::new(Kept::new(source.clone()))).set.clone()
    }

    /// All keys of issuers.
    pub fn key_sets(&self) -> Vec<Arc<Kept>> {
        self.key_sets.iter().map(|kept| kept.value().clone()).collect()
    }

    /// Whether this key set is still asked.
    pub fn keeps(&self, kept: &Arc<Kept>) -> bool {
        self.key_sets.iter().any(|known| Arc::ptr_eq(known.value(), kept))
    }

    /// Forgets the levels that neither a policy nor a request holds any more.
    pub fn sweep(&self, telemetry: &Telemetry) {
        self.origins.retain(|_, state| Arc::strong_count(state) > 1);
        self.pools.retain(|name, state| {
            let held = Arc::strong_count(state) > 1;
            if !held {
                telemetry.pool_gone(name);
            }
            held
        });
        self.densities.retain(|_, density| Arc::strong_count(density) > 1);
        self.limits.sweep(limits::millis(SystemTime::now()));
        self.key_sets.retain(|_, kept| kept.is_asked());
    }

    /// How full everything here is.
    pub fn tables(&self) -> impl Iterator<Item = Table> {
        [
            Table::named("origins", self.origins.len()),
            Table::named("pools", self.pools.len()),
            Table::named("densities", self.densities.len()),
            Table::named("issuers", self.key_sets.len()),
            Table { name: "conversations", entries: self.conversations.len(), room: Some(conversations::MOST) },
        ]
        .into_iter()
        .chain(self.limits.tables())
        .chain(self.prefixes.get().map(|prefixes| {
            let (entries, room) = prefixes.sizes();
            Table { name: "prefix_blocks", entries, room: Some(room) }
        }))
    }

    /// How many origins and pools are known.
    pub fn sizes(&self) -> (usize, usize) {
        (self.origins.len(), self.pools.len())
    }
}

/// A bound on the bytes of all bodies together.
#[derive(Debug)]
pub struct ByteBudget {
    used: AtomicU64,
    max: u64,
}

/// Bytes that were taken from the budget; given back when dropped.
#[derive(Debug)]
pub struct Lease {
    budget: Arc<ByteBudget>,
    bytes: u64,
}

impl ByteBudget {
    /// A budget of `max` bytes.
    pub fn new(max: u64) -> Self {
        Self { used: AtomicU64::new(0), max }
    }

    /// Bytes that are held now.
    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// Takes `bytes`, if they are free.
    pub fn lease(self: &Arc<Self>, bytes: u64) -> Option<Lease> {
        self.take(bytes).then(|| Lease { budget: self.clone(), bytes })
    }

    fn take(&self, bytes: u64) -> bool {
        let grown = |used: u64| used.checked_add(bytes).filter(|used| *used <= self.max);
        self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, grown).is_ok()
    }
}

impl Lease {
    /// Grows the lease to `bytes` in all. Returns whether there was room.
    pub fn grow(&mut self, bytes: u64) -> bool {
        let more = bytes.saturating_sub(self.bytes);
        let granted = self.budget.take(more);
        if granted {
            self.bytes += more;
        }
        granted
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.budget.used.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::file::Http2;

    #[test]
    fn a_budget_never_gives_more_than_it_has_and_gets_all_back() {
        let budget = Arc::new(ByteBudget::new(100));
        let mut small = budget.lease(60).unwrap();
        assert!(budget.lease(41).is_none());
        assert!(small.grow(100) && !small.grow(101));
        assert!(budget.lease(u64::MAX).is_none());
        drop(small);
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn levels_are_kept_while_somebody_holds_them() {
        let (state, now) = (State::new(0), Instant::now());
        let (origin, _) = Origin::parse("http://127.0.0.1:1", Http2::Tls).unwrap();
        let held = state.origin(&origin, now);
        let _request = held.endpoints()[0].enter();
        state.sweep(&Telemetry::new());
        assert_eq!(state.origin(&origin, now).endpoints()[0].in_flight(), 1);
        drop(held);
        state.sweep(&Telemetry::new());
        assert_eq!(state.sizes(), (0, 0));
    }
}
