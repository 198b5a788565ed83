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
    /// By urgency, then by where they begin on their tenant's line, then by arrival.
    waiting: BTreeMap<Key, oneshot::Sender<Permit>>,
    lines: Lines,
    /// Seconds between two releases, smoothed: how fast the queue drains.
    release_s: Option<f64>,
    released_at: Option<Instant>,
}

/// Urgency, beginning, arrival.
type Key = (Reverse<i32>, u64, u64);

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
}

impl From<i32> for Claim {
    fn from(level: i32) -> Self {
        Self { level, tenant: 0, tokens: 1, share: 1 }
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
pub struct Permit(Option<Arc<Queue>>);

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
            Ok(None) => Err(Full::Queue(self.0.lock().expected_wait(key.0))),
            Err(_) => Err(Full::Wait(self.0.lock().expected_wait(key.0))),
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
        if free && inner.waiting.is_empty() {
            inner.in_flight += 1;
            if parameters.max.is_some() {
                let begins = inner.lines.add(claim);
                inner.lines.goes(begins);
            }
            return Arrival::Admitted(Permit(Some(self.clone())));
        }
        let key = inner.key(claim);
        if inner.waiting.len() >= parameters.queue as usize && !inner.makes_room(key) {
            return Arrival::Full(Full::Queue(inner.expected_wait(key.0)));
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
            let Some(next) = inner.next() else { return };
            inner.in_flight += 1;
            drop(inner);
            // A permit that nobody takes any more comes back by its own drop.
            drop(next.send(Permit(Some(self.clone()))));
        }
    }

    /// A place is free: the next in line gets it.
    fn release(self: Arc<Self>) {
        let mut inner = self.0.lock();
        inner.note_release(Instant::now());
        let next = inner.next();
        if next.is_none() {
            inner.in_flight -= 1;
        }
        drop(inner);
        if let Some(next) = next {
            drop(next.send(Permit(Some(self))));
        }
    }
}

impl Inner {
    /// Where a claim would stand.
    fn key(&self, claim: Claim) -> Key {
        let begins = self.lines.now.max(self.lines.ends.get(&claim.tenant).copied().unwrap_or(0));
        (Reverse(claim.level), begins, self.arrivals + 1)
    }

    /// The queue is full: the last one, whose tenant has the longest line, gives way to an equally urgent one that
    /// would stand before it. Its sender is dropped, which tells it.
    fn makes_room(&mut self, newcomer: Key) -> bool {
        let gives_way =
            self.waiting.last_key_value().is_some_and(|(last, _)| last.0 == newcomer.0 && last.1 > newcomer.1);
        gives_way && self.waiting.pop_last().is_some()
    }

    /// The next in line.
    fn next(&mut self) -> Option<oneshot::Sender<Permit>> {
        let ((_, begins, _), next) = self.waiting.pop_first()?;
        self.lines.goes(begins);
        Some(next)
    }

    fn note_release(&mut self, now: Instant) {
        if let Some(before) = self.released_at.replace(now) {
            let gap = now.saturating_duration_since(before).as_secs_f64();
            self.release_s = Some(self.release_s.map_or(gap, |smoothed| smoothed * 0.9 + gap * 0.1));
        }
    }

    /// How long one that came now would wait: those before it, times the time that one place takes to come free.
    fn expected_wait(&self, level: Reverse<i32>) -> Duration {
        let ahead = self.waiting.range(..=(level, u64::MAX, u64::MAX)).count() as f64 + 1.0;
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

impl Drop for Permit {
    fn drop(&mut self) {
        if let Some(queue) = self.0.take() {
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
