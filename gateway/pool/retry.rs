//! The retry budget of a pool: retries are a share of requests, so that they cannot finish off a pool that is down.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// Retries that are always allowed in a window.
const FLOOR: f64 = 10.0;
/// Half of the ten seconds that count.
const HALF: Duration = Duration::from_secs(5);

/// One pool's budget.
#[derive(Debug)]
pub struct Budget(Mutex<Halves>);

#[derive(Debug)]
struct Halves {
    since: Instant,
    requests: [u32; 2],
    retries: [u32; 2],
}

impl Budget {
    /// An unused budget.
    pub fn new(now: Instant) -> Self {
        Self(Mutex::new(Halves { since: now, requests: [0; 2], retries: [0; 2] }))
    }

    /// A request came.
    pub fn request(&self, now: Instant) {
        let mut halves = self.0.lock();
        halves.turn(now);
        halves.requests[0] += 1;
    }

    /// Asks for one retry under a budget of `share` retries a request.
    pub fn retry(&self, share: f64, now: Instant) -> bool {
        self.grant(share, FLOOR, now)
    }

    /// Asks for one hedge under a budget of `share` hedges a request: nothing depends on it, so there is no floor.
    pub fn hedge(&self, share: f64, now: Instant) -> bool {
        self.grant(share, 0.0, now)
    }

    fn grant(&self, share: f64, floor: f64, now: Instant) -> bool {
        let mut halves = self.0.lock();
        halves.turn(now);
        let requests: u32 = halves.requests.iter().sum();
        let retries: u32 = halves.retries.iter().sum();
        let allowed = f64::from(retries + 1) <= (f64::from(requests) * share).max(floor);
        halves.retries[0] += u32::from(allowed);
        allowed
    }
}

impl Halves {
    fn turn(&mut self, now: Instant) {
        let age = now.saturating_duration_since(self.since);
        if age < HALF {
            return;
        }
        let stale = age >= HALF * 2;
        for counts in [&mut self.requests, &mut self.retries] {
            *counts = [0, if stale { 0 } else { counts[0] }];
        }
        self.since = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retries_are_a_share_of_requests_with_a_floor() {
        let now = Instant::now();
        let budget = Budget::new(now);
        let granted = |budget: &Budget, now| (0..1_000).filter(|_| budget.retry(0.2, now)).count();
        assert_eq!(granted(&budget, now), 10);
        for _ in 0..500 {
            budget.request(now);
        }
        assert_eq!(granted(&budget, now), 90);
        assert_eq!(granted(&budget, now + Duration::from_secs(60)), 10, "the past is forgotten");
    }

    #[test]
    fn hedges_are_a_share_of_requests_and_no_more() {
        let now = Instant::now();
        let budget = Budget::new(now);
        assert!(!budget.hedge(0.05, now));
        (0..100).for_each(|_| budget.request(now));
        assert_eq!((0..1_000).filter(|_| budget.hedge(0.05, now)).count(), 5);
    }
}
