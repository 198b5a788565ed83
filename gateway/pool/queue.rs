//! The gate of a pool: so many requests at once, so many waiting, the urgent first, and nobody at others' expense.
//!
//! Among equally urgent ones places are shared out by start-time fair queueing (Goyal, Vin and Cheng 1996): every
//! tenant's requests stand on a line of their own, as long as their tokens, and the one goes next whose request begins
//! first on its line. A tenant that asks for much waits behind itself, not before others.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::oneshot;

/// How wide the gate is; from the policy, at each use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parameters {
    /// Requests at once; `None`: any number.
    pub max: Option<u32>,
    /// Requests that may wait.
    pub queue: u32,
    /// How long one may wait.
    pub wait: Duration,
}

/// One pool's gate.
#[derive(Debug, Default)]
pub struct Queue(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    in_flight: u32,
    arrivals: u64,
    /// Batch last, then by urgency, then by where they begin on their tenant's line, then by arrival.
    waiting: BTreeMap<Key, oneshot::Sender<Permit>>,
    lines: Lines,
    room: Room,
    /// Seconds between two releases, smoothed: how fast the queue drains.
    release_s: Option<f64>,
    released_at: Option<Instant>,
}

/// Room for batch, as it was measured last.
#[derive(Debug, Default)]
struct Room {
    /// Requests of batch that it is for.
    left: u32,
    /// No batch is let in where as many requests run; `None`: any number.
    below: Option<u32>,
    /// Those that were let in and are not on an endpoint yet, so that no measure can see them.
    on_their_way: u32,
}

/// Whether it is batch, urgency, beginning, arrival.
type Key = (bool, Reverse<i32>, u64, u64);

/// What one request claims.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Claim {
    /// How urgent it is.
    pub level: i32,
    /// Whose it is.
    pub tenant: u64,
    /// How much it is, in tokens.
    pub tokens: u32,
    /// Its tenant's share beside others.
    pub share: u32,
    /// Whether it goes only where there is room, and behind all others.
    pub batch: bool,
}

impl From<i32> for Claim {
    fn from(level: i32) -> Self {
        Self { level, tenant: 0, tokens: 1, share: 1, batch: false }
    }
}

/// Where each tenant's line ends, and how far all have come.
#[derive(Debug, Default)]
struct Lines {
    ends: HashMap<u64, u64>,
    now: u64,
}

/// The length of a token on the line of a tenant with the share of one.
const TOKEN: u64 = 1000;
/// More lines than this are looked through for those that have been overtaken.
const LINES_MAX: usize = 1024;

impl Lines {
    /// Puts a claim on its tenant's line. Returns where it begins.
    fn add(&mut self, claim: Claim) -> u64 {
        let begins = self.now.max(self.ends.get(&claim.tenant).copied().unwrap_or(0));
        if self.ends.len() >= LINES_MAX {
            self.ends.retain(|_, end| *end > self.now);
        }
        let length = u64::from(claim.tokens.max(1)) * TOKEN / u64::from(claim.share.max(1));
        self.ends.insert(claim.tenant, begins + length);
        begins
    }

    /// One that begins there goes.
    fn goes(&mut self, begins: u64) {
        self.now = self.now.max(begins);
    }
}

/// Why there is no place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Full {
    /// The queue is full; a place is to be expected after this long.
    Queue(Duration),
    /// The wait was too long; the same.
    Wait(Duration),
}

/// The right to run one request; given back when dropped.
#[derive(Debug)]
pub struct Permit {
    queue: Option<Arc<Queue>>,
    /// Whether it is batch that is not on an endpoint yet.
    on_its_way: bool,
}

impl Queue {
    /// Waits for a place. A caller that stops waiting loses nothing but its turn.
    pub async fn enter(self: &Arc<Self>, parameters: Parameters, claim: impl Into<Claim>) -> Result<Permit, Full> {
        let turn = match self.arrive(parameters, claim.into()) {
            Arrival::Admitted(permit) => return Ok(permit),
            Arrival::Full(full) => return Err(full),
            Arrival::Waits(turn) => turn,
        };
        let key = turn.key;
        match tokio::time::timeout(parameters.wait, turn.wait()).await {
            Ok(Some(permit)) => Ok(permit),
            Ok(None) => Err(Full::Queue(self.0.lock().expected_wait(key))),
            Err(_) => Err(Full::Wait(self.0.lock().expected_wait(key))),
        }
    }

    /// Requests that run now.
    pub fn in_flight(&self) -> u32 {
        self.0.lock().in_flight
    }

    /// Requests that wait now.
    pub fn waiting(&self) -> usize {
        self.0.lock().waiting.len()
    }

    fn arrive(self: &Arc<Self>, parameters: Parameters, claim: Claim) -> Arrival {
        let mut inner = self.0.lock();
        let free = parameters.max.is_none_or(|max| inner.in_flight < max);
        if free && inner.is_next(claim.batch) {
            if parameters.max.is_some() {
                let begins = inner.lines.add(claim);
                inner.lines.goes(begins);
            }
            return Arrival::Admitted(inner.admit(self, claim.batch));
        }
        let key = inner.key(claim);
        if inner.waiting.len() >= parameters.queue as usize && !inner.makes_room(key) {
            return Arrival::Full(Full::Queue(inner.expected_wait(key)));
        }
        inner.arrivals += 1;
        inner.lines.add(claim);
        let (sender, receiver) = oneshot::channel();
        inner.waiting.insert(key, sender);
        drop(inner);
        self.widen(parameters);
        Arrival::Waits(Turn { queue: self.clone(), key, receiver })
    }

    /// Lets in as many as a policy that has just become wider allows.
    fn widen(self: &Arc<Self>, parameters: Parameters) {
        loop {
            let mut inner = self.0.lock();
            if parameters.max.is_some_and(|max| inner.in_flight >= max) {
                return;
            }
            let Some((batch, next)) = inner.next() else { return };
            let permit = inner.admit(self, batch);
            drop(inner);
            // A permit that nobody takes any more comes back by its own drop.
            drop(next.send(permit));
        }
    }

    /// Takes the measure of how much batch there is room for, while nobody is let in; those for whom there is are.
    /// `below`: no batch goes where as many requests run.
    pub fn measure(self: &Arc<Self>, parameters: Parameters, below: Option<u32>, room: impl FnOnce() -> u32) {
        let mut inner = self.0.lock();
        let left = room().saturating_sub(inner.room.on_their_way);
        inner.room = Room { left, below, ..inner.room };
        drop(inner);
        self.widen(parameters);
    }

    /// Whether batch waits.
    pub fn batch_waits(&self) -> bool {
        self.0.lock().waiting.last_key_value().is_some_and(|((batch, ..), _)| *batch)
    }

    /// A place is free: the next in line gets it.
    fn release(self: Arc<Self>) {
        let mut inner = self.0.lock();
        inner.note_release(Instant::now());
        inner.in_flight -= 1;
        let next = inner.next().map(|(batch, next)| (inner.admit(&self, batch), next));
        drop(inner);
        if let Some((permit, next)) = next {
            drop(next.send(permit));
        }
    }
}

impl Inner {
    /// Where a claim would stand.
    fn key(&self, claim: Claim) -> Key {
        let begins = self.lines.now.max(self.lines.ends.get(&claim.tenant).copied().unwrap_or(0));
        (claim.batch, Reverse(claim.level), begins, self.arrivals + 1)
    }

    /// Whether one that comes now may go before all that wait: before batch, unless it is batch itself.
    fn is_next(&self, batch: bool) -> bool {
        match self.waiting.first_key_value() {
            None => !batch || self.has_room(),
            Some(((first, ..), _)) => *first && !batch,
        }
    }

    fn has_room(&self) -> bool {
        self.room.left > 0 && self.room.below.is_none_or(|below| self.in_flight < below)
    }

    fn admit(&mut self, queue: &Arc<Queue>, batch: bool) -> Permit {
        self.in_flight += 1;
        if batch {
            self.room.left = self.room.left.saturating_sub(1);
            self.room.on_their_way += 1;
        }
        Permit { queue: Some(queue.clone()), on_its_way: batch }
    }

    /// The queue is full: the last one, whose tenant has the longest line, gives way to an equally urgent one that
    /// would stand before it, and batch to whatever is none. Its sender is dropped, which tells it.
    fn makes_room(&mut self, (batch, level, begins, _): Key) -> bool {
        let gives_way = |last: &Key| last.0 && !batch || (last.0, last.1) == (batch, level) && last.2 > begins;
        self.waiting.last_key_value().is_some_and(|(last, _)| gives_way(last)) && self.waiting.pop_last().is_some()
    }

    /// The next in line, and whether it is batch; that is not next where there is no room.
    fn next(&mut self) -> Option<(bool, oneshot::Sender<Permit>)> {
        let has_room = self.has_room();
        let first = self.waiting.first_entry().filter(|first| !first.key().0 || has_room)?;
        let ((batch, _, begins, _), next) = first.remove_entry();
        self.lines.goes(begins);
        Some((batch, next))
    }

    fn note_release(&mut self, now: Instant) {
        if let Some(before) = self.released_at.replace(now) {
            let gap = now.saturating_duration_since(before).as_secs_f64();
            self.release_s = Some(self.release_s.map_or(gap, |smoothed| smoothed * 0.9 + gap * 0.1));
        }
    }

    /// How long one that came now would wait: those before it, times the time that one place takes to come free.
    fn expected_wait(&self, (batch, level, ..): Key) -> Duration {
        let ahead = self.waiting.range(..=(batch, level, u64::MAX, u64::MAX)).count() as f64 + 1.0;
        Duration::from_secs_f64((ahead * self.release_s.unwrap_or(1.0)).clamp(1.0, 60.0))
    }
}

enum Arrival {
    Admitted(Permit),
    Waits(Turn),
    Full(Full),
}

/// A place in the line; left when dropped.
struct Turn {
    queue: Arc<Queue>,
    key: Key,
    receiver: oneshot::Receiver<Permit>,
}

impl Turn {
    async fn wait(mut self) -> Option<Permit> {
        (&mut self.receiver).await.ok()
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.queue.0.lock().waiting.remove(&self.key);
    }
}

impl Permit {
    /// Its request is on an endpoint, where a measure sees it.
    pub fn placed(&mut self) {
        if let Some(queue) = self.queue.as_ref().filter(|_| self.on_its_way) {
            self.on_its_way = false;
            queue.0.lock().room.on_their_way -= 1;
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.placed();
        if let Some(queue) = self.queue.take() {
            queue.release();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NARROW: Parameters = Parameters { max: Some(1), queue: 2, wait: Duration::from_secs(60) };

    async fn waits(queue: &Arc<Queue>, level: i32) -> tokio::task::JoinHandle<Result<Permit, Full>> {
        let before = queue.waiting();
        let task = tokio::spawn({
            let queue = queue.clone();
            async move { queue.enter(NARROW, level).await }
        });
        while queue.waiting() == before {
            tokio::task::yield_now().await;
        }
        task
    }

    #[tokio::test]
    async fn the_urgent_go_first_and_equals_in_the_order_they_came() {
        let queue = Arc::new(Queue::default());
        let first = queue.enter(NARROW, 0).await.unwrap();
        let batch = waits(&queue, -10).await;
        let interactive = waits(&queue, 5).await;
        drop(first);
        let permit = interactive.await.unwrap().unwrap();
        assert!(!batch.is_finished());
        drop(permit);
        assert!(batch.await.unwrap().is_ok());
    }

    /// The order in which claims get the one place, each told by its tenant, after one of `first` has had it.
    async fn order(first: Claim, claims: &[Claim]) -> Vec<u64> {
        let queue = Arc::new(Queue::default());
        let wide = Parameters { queue: 100, ..NARROW };
        let held = queue.enter(wide, first).await.unwrap();
        let (told, mut order) = tokio::sync::mpsc::channel(100);
        for (n, claim) in claims.iter().copied().enumerate() {
            let (queue, told) = (queue.clone(), told.clone());
            tokio::spawn({
                let queue = queue.clone();
                async move {
                    let _permit = queue.enter(wide, claim).await.unwrap();
                    told.send(claim.tenant).await.unwrap();
                }
            });
            while queue.waiting() <= n {
                tokio::task::yield_now().await;
            }
        }
        drop((held, told));
        let mut went = Vec::new();
        while let Some(tenant) = order.recv().await {
            went.push(tenant);
        }
        went
    }

    #[tokio::test]
    async fn one_that_asks_for_much_waits_behind_itself() {
        let claim = |tenant, tokens| Claim { tenant, tokens, ..Claim::from(0) };
        let greedy = [claim(1, 1_000); 4];
        let went = order(claim(1, 1_000), &[&greedy[..], &[claim(2, 1_000); 2]].concat()).await;
        assert_eq!(went, [2, 1, 2, 1, 1, 1], "turn and turn about, though the one came first");
        let went = order(claim(1, 1_000), &[&greedy[..], &[claim(2, 250); 4]].concat()).await;
        assert_eq!(went, [2, 2, 2, 2, 1, 1, 1, 1], "four small ones are as much as one large one");
        let double = Claim { share: 2, ..claim(2, 1_000) };
        let went = order(claim(3, 1), &[&greedy[..], &[double; 4]].concat()).await;
        assert_eq!(went.iter().take(6).filter(|tenant| **tenant == 2).count(), 4, "{went:?}");
    }

    #[tokio::test]
    async fn urgency_comes_before_fairness_and_the_order_within_a_tenant_stays() {
        let claim = |level, tenant| Claim { tenant, ..Claim::from(level) };
        let went = order(claim(0, 9), &[claim(0, 1), claim(0, 1), claim(5, 3), claim(-1, 2)]).await;
        assert_eq!(went, [3, 1, 1, 2]);
    }

    #[tokio::test]
    async fn a_full_queue_has_room_for_one_with_a_shorter_line() {
        let queue = Arc::new(Queue::default());
        let _held = queue.enter(NARROW, 0).await.unwrap();
        let (first, second) = (waits(&queue, 0).await, waits(&queue, 0).await);
        let other = Claim { tenant: 7, ..Claim::from(0) };
        let newcomer = tokio::spawn({
            let queue = queue.clone();
            async move { queue.enter(NARROW, other).await }
        });
        assert!(matches!(second.await.unwrap(), Err(Full::Queue(_))), "the last of the longest line gives way");
        assert!(!first.is_finished() && !newcomer.is_finished());
        assert_eq!(queue.waiting(), 2);
        assert!(matches!(queue.enter(NARROW, 0).await, Err(Full::Queue(_))), "and not the other way round");
    }

    const BATCH: Claim = Claim { level: 100, tenant: 0, tokens: 1, share: 1, batch: true };
    const WIDE: Parameters = Parameters { max: None, queue: 3, wait: Duration::from_secs(60) };

    /// One of batch that has come and waits.
    async fn batch_waits(queue: &Arc<Queue>) -> tokio::task::JoinHandle<Result<Permit, Full>> {
        let (before, queue) = (queue.waiting(), queue.clone());
        let task = tokio::spawn({
            let queue = queue.clone();
            async move { queue.enter(WIDE, BATCH).await }
        });
        while queue.waiting() == before {
            tokio::task::yield_now().await;
        }
        task
    }

    #[tokio::test]
    async fn batch_goes_only_where_room_was_measured_and_never_more_than_that() {
        let queue = Arc::new(Queue::default());
        let (first, second) = (batch_waits(&queue).await, batch_waits(&queue).await);
        let other = queue.enter(WIDE, 0).await.unwrap();
        assert_eq!((queue.in_flight(), queue.waiting()), (1, 2), "others pass it by");
        drop(other);
        assert_eq!(queue.waiting(), 2, "a place that comes free is no room");
        queue.measure(WIDE, None, || 1);
        let mut first = first.await.unwrap().unwrap();
        assert!(!second.is_finished());
        queue.measure(WIDE, None, || 1);
        assert_eq!(queue.waiting(), 1, "that room was given away, though nothing is to be seen of it yet");
        first.placed();
        queue.measure(WIDE, None, || 1);
        drop(second.await.unwrap().unwrap());
        drop(first);
        assert_eq!(queue.in_flight(), 0);
        queue.measure(WIDE, None, || 2);
        let all = [queue.enter(WIDE, BATCH).await.unwrap(), queue.enter(WIDE, BATCH).await.unwrap()];
        let _third = batch_waits(&queue).await;
        drop(all);
    }

    #[tokio::test]
    async fn batch_leaves_places_free_and_waits_behind_others_however_urgent_it_calls_itself() {
        let queue = Arc::new(Queue::default());
        let parameters = Parameters { max: Some(2), ..WIDE };
        queue.measure(parameters, Some(1), || 9);
        let first = queue.enter(parameters, BATCH).await.unwrap();
        let batch = batch_waits(&queue).await;
        let other = queue.enter(parameters, -100).await.unwrap();
        drop(first);
        assert!(!batch.is_finished() && queue.waiting() == 1, "one place of two stays free of it");
        drop(other);
        assert!(batch.await.unwrap().is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn a_queue_full_of_batch_has_room_for_whatever_is_none() {
        let queue = Arc::new(Queue::default());
        let held = queue.enter(NARROW, 0).await.unwrap();
        let (first, second) = (batch_waits(&queue).await, batch_waits(&queue).await);
        let other = tokio::spawn({
            let queue = queue.clone();
            async move { queue.enter(NARROW, -100).await }
        });
        assert!(matches!(second.await.unwrap(), Err(Full::Queue(_))));
        assert!(!first.is_finished() && !other.is_finished());
        drop(held);
        assert!(other.await.unwrap().is_ok());
        assert!(
            matches!(queue.enter(NARROW, BATCH).await, Err(Full::Wait(_) | Full::Queue(_))) || !first.is_finished()
        );
    }

    #[tokio::test(start_paused = true)]
    async fn batch_keeps_its_deadline() {
        let queue = Arc::new(Queue::default());
        let began = tokio::time::Instant::now();
        assert!(matches!(queue.enter(WIDE, BATCH).await, Err(Full::Wait(_))));
        assert_eq!((began.elapsed(), queue.waiting(), queue.batch_waits()), (WIDE.wait, 0, false));
    }

    #[test]
    fn lines_that_have_been_overtaken_are_forgotten() {
        let mut lines = Lines::default();
        for tenant in 0..100_000 {
            let begins = lines.add(Claim { tenant, ..Claim::from(0) });
            lines.goes(begins + TOKEN);
        }
        assert!(lines.ends.len() <= LINES_MAX);
    }

    #[tokio::test]
    async fn beyond_the_queue_there_is_no_place_and_a_time_to_come_back() {
        let queue = Arc::new(Queue::default());
        let _first = queue.enter(NARROW, 0).await.unwrap();
        let (_a, _b) = (waits(&queue, 0).await, waits(&queue, 0).await);
        let full = queue.enter(NARROW, 0).await.unwrap_err();
        assert!(matches!(full, Full::Queue(after) if after >= Duration::from_secs(1)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_wait_ends_in_time_and_leaves_nothing() {
        let queue = Arc::new(Queue::default());
        let first = queue.enter(NARROW, 0).await.unwrap();
        let late = queue.enter(NARROW, 0).await;
        assert!(matches!(late, Err(Full::Wait(_))));
        assert_eq!(queue.waiting(), 0);
        drop(first);
        assert_eq!(queue.in_flight(), 0);
    }

    #[tokio::test]
    async fn one_that_leaves_the_line_gives_its_turn_to_the_next() {
        let queue = Arc::new(Queue::default());
        let first = queue.enter(NARROW, 0).await.unwrap();
        let leaver = waits(&queue, 1).await;
        let stayer = waits(&queue, 0).await;
        leaver.abort();
        let _ = leaver.await;
        drop(first);
        assert!(stayer.await.unwrap().is_ok());
        assert_eq!((queue.in_flight(), queue.waiting()), (0, 0));
    }

    #[tokio::test]
    async fn a_wider_policy_lets_the_waiting_in() {
        let queue = Arc::new(Queue::default());
        let _first = queue.enter(NARROW, 0).await.unwrap();
        let waiting = waits(&queue, 0).await;
        let wide = Parameters { max: Some(3), ..NARROW };
        let _third = queue.enter(wide, 0).await.unwrap();
        assert!(waiting.await.unwrap().is_ok());
    }
}
