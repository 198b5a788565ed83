//! The breaker of one endpoint: closed, open, half open.
//!
//! Levels live here and outlast reloads; the parameters come from the policy at each use.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// When a breaker opens and for how long.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Parameters {
    /// Failures in a row that open it. 0: never.
    pub failures: u32,
    /// The share of failures in the window that opens it.
    pub failure_ratio: f64,
    /// The window.
    pub window: Duration,
    /// The least number of requests in the window for the ratio to count.
    pub requests_min: u32,
    /// How long it stays open the first time; doubled each time it opens again before a success.
    pub open: Duration,
    /// The longest it stays open.
    pub open_max: Duration,
}

/// What a breaker lets through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Everything.
    Closed,
    /// Nothing, for this much longer.
    Open(Duration),
    /// One request, to see.
    HalfOpen,
}

/// One endpoint's breaker.
#[derive(Debug)]
pub struct Breaker {
    base: Instant,
    /// Milliseconds after `base` until which nothing passes; 0 when closed. Read on every pick.
    open_until: AtomicU64,
    counts: Mutex<Counts>,
}

#[derive(Debug, Default)]
struct Counts {
    in_a_row: u32,
    window_start: u64,
    requests: u32,
    failures: u32,
    /// How often it has opened since the last success.
    opened: u32,
    /// When the request was let through that tries a half-open breaker; it counts as lost after a while.
    trial: Option<u64>,
}

/// A trial that has not come back after this long is given up, so that no breaker hangs half open.
const TRIAL_MS: u64 = 30_000;

impl Breaker {
    /// A closed breaker that counts its time from `now`.
    pub fn new(now: Instant) -> Self {
        Self { base: now, open_until: AtomicU64::new(0), counts: Mutex::default() }
    }

    /// What it lets through at `now`.
    pub fn state(&self, now: Instant) -> State {
        match self.open_until.load(Ordering::Relaxed) {
            0 => State::Closed,
            until => match until.saturating_sub(self.at(now)) {
                0 => State::HalfOpen,
                left => State::Open(Duration::from_millis(left)),
            },
        }
    }

    /// Whether [`admit`](Self::admit) would say yes, without asking.
    pub fn ready(&self, now: Instant) -> bool {
        match self.state(now) {
            State::Closed => true,
            State::Open(_) => false,
            State::HalfOpen => self.counts.lock().trial_is_free(self.at(now)),
        }
    }

    /// Asks to let one request through. Half open, only one gets a yes until its outcome is known.
    pub fn admit(&self, now: Instant) -> bool {
        match self.state(now) {
            State::Closed => true,
            State::Open(_) => false,
            State::HalfOpen => {
                let at = self.at(now);
                let mut counts = self.counts.lock();
                let free = counts.trial_is_free(at);
                if free {
                    counts.trial = Some(at);
                }
                free
            }
        }
    }

    /// The endpoint answered: it is well.
    pub fn success(&self, parameters: &Parameters, now: Instant) {
        let mut counts = self.counts.lock();
        counts.turn(self.at(now), parameters);
        counts.requests += 1;
        counts.in_a_row = 0;
        let was_trial = counts.trial.take().is_some();
        if was_trial || counts.opened == 0 {
            counts.opened = 0;
            if self.state(now) == State::HalfOpen {
                *counts = Counts::default();
                self.open_until.store(0, Ordering::Relaxed);
            }
        }
    }

    /// The endpoint failed. Returns whether this opened the breaker.
    pub fn failure(&self, parameters: &Parameters, now: Instant) -> bool {
        let at = self.at(now);
        let mut counts = self.counts.lock();
        counts.turn(at, parameters);
        counts.requests += 1;
        counts.failures += 1;
        counts.in_a_row += 1;
        let trial_failed = counts.trial.take().is_some();
        let opens = trial_failed || counts.opens(parameters);
        if opens {
            let doubled = parameters.open.saturating_mul(1 << counts.opened.min(16));
            let opened = counts.opened + 1;
            *counts = Counts { opened, ..Counts::default() };
            self.hold(at, doubled.min(parameters.open_max));
        }
        opens
    }

    /// The endpoint asked for a pause (429 with `Retry-After`): nothing passes until then, whatever health checks
    /// say, and nothing is counted.
    pub fn pause(&self, pause: Duration, now: Instant) {
        let mut counts = self.counts.lock();
        (counts.trial, counts.opened) = (None, 0);
        drop(counts);
        self.hold(self.at(now), pause);
    }

    /// Closes it, whatever has been counted: somebody knows better.
    pub fn reset(&self) {
        *self.counts.lock() = Counts::default();
        self.open_until.store(0, Ordering::Relaxed);
    }

    /// A health check found the endpoint well: an open breaker lets one request try.
    pub fn recovered(&self, now: Instant) {
        let at = self.at(now).max(1);
        let was_failing = self.counts.lock().opened > 0;
        if was_failing {
            let _ =
                self.open_until.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |until| (until > at).then_some(at));
        }
    }

    /// The request that was let through ended without telling anything (the client left).
    pub fn released(&self) {
        self.counts.lock().trial = None;
    }

    /// Deadlines only ever move to the later value.
    fn hold(&self, at: u64, pause: Duration) {
        let until = at.saturating_add(u64::try_from(pause.as_millis()).unwrap_or(u64::MAX)).max(1);
        self.open_until.fetch_max(until, Ordering::Relaxed);
    }

    fn at(&self, now: Instant) -> u64 {
        u64::try_from(now.saturating_duration_since(self.base).as_millis()).unwrap_or(u64::MAX)
    }
}

impl Counts {
    fn trial_is_free(&self, at: u64) -> bool {
        self.trial.is_none_or(|since| at.saturating_sub(since) > TRIAL_MS)
    }

    fn turn(&mut self, at: u64, parameters: &Parameters) {
        let window = u64::try_from(parameters.window.as_millis()).unwrap_or(u64::MAX);
        if at.saturating_sub(self.window_start) >= window {
            (self.window_start, self.requests, self.failures) = (at, 0, 0);
        }
    }

    fn opens(&self, parameters: &Parameters) -> bool {
        let row = parameters.failures > 0 && self.in_a_row >= parameters.failures;
        let share = f64::from(self.failures) / f64::from(self.requests.max(1));
        row || (self.requests >= parameters.requests_min.max(1) && share > parameters.failure_ratio)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PARAMETERS: Parameters = Parameters {
        failures: 3,
        failure_ratio: 0.5,
        window: Duration::from_secs(10),
        requests_min: 20,
        open: Duration::from_secs(2),
        open_max: Duration::from_secs(5),
    };

    fn after(base: Instant, ms: u64) -> Instant {
        base + Duration::from_millis(ms)
    }

    fn opened(base: Instant) -> Breaker {
        let breaker = Breaker::new(base);
        for _ in 0..3 {
            breaker.failure(&PARAMETERS, base);
        }
        breaker
    }

    #[test]
    fn failures_in_a_row_open_it_and_a_success_between_does_not() {
        let base = Instant::now();
        let breaker = Breaker::new(base);
        assert!(!breaker.failure(&PARAMETERS, base) && !breaker.failure(&PARAMETERS, base));
        breaker.success(&PARAMETERS, base);
        assert!(!breaker.failure(&PARAMETERS, base));
        assert_eq!(breaker.state(base), State::Closed);
        assert_eq!(opened(base).state(base), State::Open(Duration::from_secs(2)));
    }

    #[test]
    fn a_share_of_failures_opens_it_too() {
        let base = Instant::now();
        let breaker = Breaker::new(base);
        for _ in 0..9 {
            breaker.success(&PARAMETERS, base);
            breaker.failure(&PARAMETERS, base);
        }
        assert_eq!(breaker.state(base), State::Closed);
        breaker.failure(&PARAMETERS, base);
        assert!(breaker.failure(&PARAMETERS, base), "11 of 20");
    }

    #[test]
    fn half_open_lets_one_through_and_its_outcome_decides() {
        let base = Instant::now();
        let breaker = opened(base);
        let later = after(base, 2_000);
        assert!(breaker.admit(later) && !breaker.admit(later));
        breaker.success(&PARAMETERS, later);
        assert_eq!(breaker.state(later), State::Closed);
    }

    #[test]
    fn each_opening_lasts_twice_as_long_up_to_the_most() {
        let base = Instant::now();
        let breaker = opened(base);
        let mut now = after(base, 2_000);
        for seconds in [4, 5, 5] {
            assert!(breaker.admit(now));
            assert!(breaker.failure(&PARAMETERS, now));
            assert_eq!(breaker.state(now), State::Open(Duration::from_secs(seconds)));
            now += Duration::from_secs(seconds);
        }
    }

    #[test]
    fn a_good_health_check_makes_it_half_open_at_once() {
        let base = Instant::now();
        let breaker = opened(base);
        breaker.recovered(after(base, 500));
        assert_eq!(breaker.state(after(base, 500)), State::HalfOpen);
    }

    #[test]
    fn a_pause_is_kept_whatever_health_checks_say_and_only_grows() {
        let base = Instant::now();
        let breaker = Breaker::new(base);
        breaker.pause(Duration::from_secs(7), base);
        breaker.pause(Duration::from_secs(1), base);
        breaker.recovered(after(base, 500));
        assert_eq!(breaker.state(after(base, 1_000)), State::Open(Duration::from_secs(6)));
    }

    #[test]
    fn a_trial_that_never_comes_back_does_not_hold_the_breaker_for_ever() {
        let base = Instant::now();
        let breaker = opened(base);
        assert!(breaker.admit(after(base, 2_000)));
        assert!(!breaker.admit(after(base, 2_000 + TRIAL_MS)));
        assert!(breaker.admit(after(base, 2_001 + TRIAL_MS)));
        breaker.released();
        assert!(breaker.admit(after(base, 2_001 + TRIAL_MS)));
    }
}
