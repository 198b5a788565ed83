//! Limits that several replicas share, through a store that speaks Redis' protocol.
//!
//! A request that has to be counted with those of other replicas is one question to the store, over all its limits,
//! answered by one script (`shared/script.lua`): all of them have room, and it is taken, or none is. Questions of
//! requests that come at the same time travel together, one call at a time. Each call also tells what this replica
//! has used and holds of the levels it names, in absolute numbers: that is how what is over comes back, and how all is
//! well again after a call that was lost, a store that was away or one that has forgotten everything. What a request
//! used is told within a few milliseconds, by whichever call comes next, never by the request itself.
//!
//! In the mode `lease` the store holds a slice of each level for each replica that uses it, and a request that fits
//! into the slices is admitted here. What a slice has is counted at the store before anybody spends it, so together
//! the replicas pass a limit only if the store loses what it knew, and then by no more than the slices that are out
//! (`infergate_limit_lease_held`): each is at most what is free, divided by twice the number of replicas, so that the
//! last of a limit is never leased.

mod talk;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};

pub use self::talk::run;
use super::level::{Count, Level};
use super::standing::Standing;
use super::{Counted, Few, Hold, Holds, Levels, Limit, Outcome, Reservation, Short, Way, agreed, millis, reserved};
use crate::policy::file::OnStoreError;
use crate::secret::Secret;
use crate::telemetry::Telemetry;

/// What the policy says of the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parameters {
    /// Its address, with whatever opens it.
    pub url: Secret,
    /// What all keys begin with.
    pub namespace: String,
    /// Whether slices are taken in advance.
    pub leases: bool,
    /// How long a request waits for it at most.
    pub timeout: Duration,
    /// What is done without it.
    pub on_error: OnStoreError,
    /// How many replicas there are.
    pub replicas: u64,
}

impl Parameters {
    /// Whether the same levels are meant.
    fn is_same_store(&self, other: &Self) -> bool {
        self.url == other.url && self.namespace == other.namespace
    }
}

/// What joins the requests of this replica with its store.
#[derive(Debug)]
pub struct Shared {
    /// This process, as the store knows it.
    me: String,
    /// The number of the last call.
    number: AtomicU64,
    /// Whether the store answers.
    up: AtomicBool,
    /// Whether nothing may be used while it does not.
    denies: AtomicBool,
    /// Whether slices are taken in advance.
    leases: AtomicBool,
    /// The first moment; `contact` counts from it, in milliseconds.
    began: Instant,
    contact: AtomicU64,
    /// How far the store's clock is ahead of ours, in milliseconds.
    ahead: AtomicI64,
    asks: mpsc::Sender<Ask>,
    heard: Mutex<Option<mpsc::Receiver<Ask>>>,
    /// Levels of which the store has still to be told. Each is in it once, so it is never longer than they are many.
    untold: Mutex<VecDeque<Entry>>,
}

/// A level that is shared, and the limit that it is of.
type Entry = (Arc<Limit>, Arc<Level>);

/// A request's question: all of these, or nothing.
#[derive(Debug)]
struct Ask {
    holds: Holds,
    answer: oneshot::Sender<Answer>,
}

/// What became of it, and how the levels stood then.
#[derive(Debug)]
enum Answer {
    /// It has them.
    Taken(Box<Reservation>, Counts),
    /// It has nothing.
    Short(Box<Holds>, Counts),
}

type Counts = Few<Count>;

/// The store does not answer, or not in time.
struct Away;

/// So many questions wait at most; beyond it the store counts as away.
const ASKS_MAX: usize = 4096;
/// How often a request asks for less before it is refused.
const ROUNDS: usize = 3;
/// A replica that the store has not answered for so long spends nothing any more that the store holds for it. Well
/// before it is taken for dead.
const STALE: Duration = Duration::from_secs(2);
impl Default for Shared {
    fn default() -> Self {
        let (asks, heard) = mpsc::channel(ASKS_MAX);
        Self {
            me: uuid::Uuid::now_v7().simple().to_string(),
            number: AtomicU64::new(0),
            up: AtomicBool::new(false),
            denies: AtomicBool::new(false),
            leases: AtomicBool::new(false),
            began: Instant::now(),
            contact: AtomicU64::new(0),
            ahead: AtomicI64::new(0),
            asks,
            heard: Mutex::new(Some(heard)),
            untold: Mutex::default(),
        }
    }
}

/// Reserves what `request` may use of all of `limits`, counted with what other replicas have taken.
pub async fn reserve<'a>(
    levels: &Levels,
    parameters: &Parameters,
    telemetry: &Telemetry,
    limits: impl Iterator<Item = &'a Arc<Limit>> + Clone,
    request: &Counted<'_>,
) -> Option<Outcome> {
    let shared = &levels.shared;
    let request = &Counted { now: shared.now(), ..*request };
    let holds = || levels.holds(limits.clone(), request);
    let asked = match holds() {
        Err(limit) => return Some(Outcome::Unpriced(limit)),
        Ok(holds) if holds.is_empty() => return None,
        Ok(holds) => holds,
    };
    if parameters.leases
        && shared.answers()
        && let Ok(holds) = holds()
        && let Outcome::Reserved(reservation) = reserved(holds, request, Way::Leased)
    {
        return Some(Outcome::Reserved(Box::new(shared.takes(*reservation))));
    }
    match shared.reserve(asked, request, parameters.timeout).await {
        Ok(outcome) => Some(outcome),
        Err(Away) => holds().ok().map(|holds| shared.without_store(holds, request, parameters, telemetry)),
    }
}

impl Shared {
    /// The time of the day by the store's clock, in milliseconds since 1970: spans begin and end for all replicas at
    /// once.
    pub fn now(&self) -> u64 {
        millis(SystemTime::now()).saturating_add_signed(self.ahead.load(Ordering::Relaxed))
    }

    /// Whether nothing may be used, because the store is away and the policy wants it so.
    pub fn denies(&self) -> bool {
        self.denies.load(Ordering::Relaxed) && !self.answers()
    }

    /// Whether the store answers.
    pub fn answers(&self) -> bool {
        self.up.load(Ordering::Relaxed) && self.silent() < STALE.as_millis() as u64
    }

    /// For how many milliseconds the store has not answered.
    fn silent(&self) -> u64 {
        self.elapsed().saturating_sub(self.contact.load(Ordering::Relaxed))
    }

    fn elapsed(&self) -> u64 {
        self.began.elapsed().as_millis() as u64
    }

    /// Asks the store for all that `request` may use, and for less if there is less.
    async fn reserve(
        self: &Arc<Self>,
        mut holds: Holds,
        request: &Counted<'_>,
        timeout: Duration,
    ) -> Result<Outcome, Away> {
        let until = tokio::time::Instant::now() + timeout;
        let (mut output, mut round) = (request.output, 0);
        loop {
            for hold in &mut holds {
                hold.reserved = hold.limit.needs(request, output);
            }
            let mut counts;
            (holds, counts) = match self.ask(holds, until).await? {
                Answer::Taken(mut reservation, counts) => {
                    reservation.standings = standings(&reservation.holds, &counts, request.now);
                    return Ok(Outcome::Reserved(Box::new((*reservation).of(request, output))));
                }
                Answer::Short(holds, counts) => (*holds, counts),
            };
            round += 1;
            match agreed(&mut holds, counts.iter_mut(), request, Way::Asked) {
                Ok(less) if round < ROUNDS => output = less,
                // Others took it each time before we could.
                Ok(_) => return Ok(Outcome::Short(taken_by_others(&holds, &counts, request))),
                Err(mut short) => {
                    short.standings = standings(&holds, &counts, request.now).into_vec().into();
                    return Ok(Outcome::Short(short));
                }
            }
        }
    }

    async fn ask(&self, holds: Holds, until: tokio::time::Instant) -> Result<Answer, Away> {
        if !self.answers() {
            return Err(Away);
        }
        let (answer, heard) = oneshot::channel();
        self.asks.try_send(Ask { holds, answer }).map_err(|_| Away)?;
        // An answer that comes too late is dropped, and what it has goes back with it.
        tokio::time::timeout_at(until, heard).await.map_err(|_| Away)?.map_err(|_| Away)
    }

    /// Decides without the store, as the policy says.
    fn without_store(
        self: &Arc<Self>,
        holds: Holds,
        request: &Counted<'_>,
        parameters: &Parameters,
        telemetry: &Telemetry,
    ) -> Outcome {
        telemetry.limit_degraded(parameters.on_error);
        let way = match parameters.on_error {
            OnStoreError::Deny => return Outcome::Unavailable,
            OnStoreError::Allow => Way::Unchecked,
            OnStoreError::LocalShare => Way::Part(parameters.replicas),
        };
        match reserved(holds, request, way) {
            Outcome::Reserved(reservation) => Outcome::Reserved(Box::new(self.takes(*reservation))),
            other => other,
        }
    }

    /// A reservation that was made here: the store will be told.
    fn takes(self: &Arc<Self>, mut reservation: Reservation) -> Reservation {
        for hold in &reservation.holds {
            self.has_to_tell(&hold.limit, &hold.level, &mut hold.level.count());
        }
        reservation.shared = Some(self.clone());
        reservation
    }

    /// A level was changed here: the store will be told with the next call.
    pub(super) fn has_to_tell(&self, limit: &Arc<Limit>, level: &Arc<Level>, count: &mut Count) {
        if !count.untold {
            count.untold = true;
            self.untold.lock().push_back((limit.clone(), level.clone()));
        }
    }

    /// A request is over that used so much of what it had. The rest stays here only if the store had counted it.
    pub(super) fn settled(&self, hold: &Hold, count: &mut Count, (way, used): (Way, u64)) {
        if self.leases.load(Ordering::Relaxed) && matches!(way, Way::Asked | Way::Leased) {
            count.keep(hold.from, hold.reserved, used);
        }
        self.has_to_tell(&hold.limit, &hold.level, count);
    }

    /// Waits until the store has been told everything, `within` this time at most. For the end of the process.
    pub async fn settle(&self, within: Duration) {
        const LOOK_AGAIN: Duration = Duration::from_millis(5);
        let until = Instant::now() + within;
        while self.answers() && !self.untold.lock().is_empty() && Instant::now() < until {
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }
}

fn standings(holds: &Holds, counts: &Counts, now: u64) -> Few<Standing> {
    holds.iter().zip(counts).map(|(hold, count)| Standing::of(&hold.limit, count, now)).collect()
}

/// There was room each time that the store was asked, and none when it was to be taken.
fn taken_by_others(holds: &Holds, counts: &Counts, request: &Counted<'_>) -> Short {
    let free = |index: usize| counts[index].free(&holds[index].limit.terms(request.now));
    let index = (0..holds.len()).min_by_key(|index| free(*index)).unwrap_or_default();
    Short {
        limit: holds[index].limit.clone(),
        free: free(index),
        needed: holds[index].reserved,
        wait: Some(Duration::from_millis(1)),
        standings: standings(holds, counts, request.now).into_vec().into(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Used;
    use super::*;
    use crate::policy::{World, compile};
    use crate::settings::Settings;
    use crate::state::State;

    #[test]
    fn what_was_taken_without_the_store_and_not_used_is_nobodys_slice() {
        let (state, telemetry, settings) = (State::new(0), Telemetry::new(), Settings::default());
        let text = "version: 1\nlimits: [{name: all, tokens: 100, per: 1h}]\n";
        let policy = compile(text, &World::new(&|_| None, &state, &telemetry, &settings)).unwrap();
        let (limit, shared) = (&policy.limits[0], &state.limits.shared);
        shared.leases.store(true, Ordering::Relaxed);
        let left = |way: Way| {
            let level = state.limits.named(&limit.levels);
            let mut count = level.count();
            count.roll(&limit.terms(1));
            (count.slice, count.touched) = (0, 1);
            let from = count.take(20);
            drop(count);
            let mut reservation = Reservation::new(Few::new(), Few::new(), way);
            let hold =
                Hold { limit: limit.clone(), level: level.clone(), from, reserved: 20, bounds: false, settled: None };
            reservation.holds.push(hold);
            reservation.shared = Some(shared.clone());
            reservation.settle(&Used { asked: true, input: 8, output: 0, nanousd: 0 }, 1);
            level.count().slice
        };
        assert_eq!([Way::Asked, Way::Leased].map(left), [12, 12], "the store has counted it, and need not be asked");
        assert_eq!([Way::Unchecked, Way::Part(3)].map(left), [0, 0]);
    }
}
