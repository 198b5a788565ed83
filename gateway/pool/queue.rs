//! The gate of a pool: so many requests at once, so many waiting, the urgent first.

use std::cmp::Reverse;
use std::collections::BTreeMap;
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
    /// By urgency, then by arrival.
    waiting: BTreeMap<(Reverse<i32>, u64), oneshot::Sender<Permit>>,
    /// Seconds between two releases, smoothed: how fast the queue drains.
    release_s: Option<f64>,
    released_at: Option<Instant>,
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
    pub async fn enter(self: &Arc<Self>, parameters: Parameters, level: i32) -> Result<Permit, Full> {
        let turn = match self.arrive(parameters, level) {
            Arrival::Admitted(permit) => return Ok(permit),
            Arrival::Full(full) => return Err(full),
            Arrival::Waits(turn) => turn,
        };
        let key = turn.key;
        match tokio::time::timeout(parameters.wait, turn.wait()).await {
            Ok(Some(permit)) => Ok(permit),
            _ => Err(Full::Wait(self.0.lock().expected_wait(key.0))),
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

    fn arrive(self: &Arc<Self>, parameters: Parameters, level: i32) -> Arrival {
        let mut inner = self.0.lock();
        let free = parameters.max.is_none_or(|max| inner.in_flight < max);
        if free && inner.waiting.is_empty() {
            inner.in_flight += 1;
            return Arrival::Admitted(Permit(Some(self.clone())));
        }
        if inner.waiting.len() >= parameters.queue as usize {
            return Arrival::Full(Full::Queue(inner.expected_wait(Reverse(level))));
        }
        inner.arrivals += 1;
        let key = (Reverse(level), inner.arrivals);
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
            let Some((_, next)) = inner.waiting.pop_first() else { return };
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
        let next = inner.waiting.pop_first();
        if next.is_none() {
            inner.in_flight -= 1;
        }
        drop(inner);
        if let Some((_, next)) = next {
            drop(next.send(Permit(Some(self))));
        }
    }
}

impl Inner {
    fn note_release(&mut self, now: Instant) {
        if let Some(before) = self.released_at.replace(now) {
            let gap = now.saturating_duration_since(before).as_secs_f64();
            self.release_s = Some(self.release_s.map_or(gap, |smoothed| smoothed * 0.9 + gap * 0.1));
        }
    }

    /// How long one that came now would wait: those before it, times the time that one place takes to come free.
    fn expected_wait(&self, level: Reverse<i32>) -> Duration {
        let ahead = self.waiting.range(..=(level, u64::MAX)).count() as f64 + 1.0;
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
    key: (Reverse<i32>, u64),
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
