//! How long a server worked for each of the requests that ran on it at one time: of every second, each has an equal
//! part. The parts of all add up to the time in which the server had anything to do, however many came and went.

use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;

use super::origin::Endpoint;

/// A server's work so far.
#[derive(Debug, Default)]
pub struct Worked(Mutex<Level>);

#[derive(Debug, Default)]
struct Level {
    running: u32,
    at: Option<Instant>,
    /// What a request would have that had run from the beginning on, in nanoseconds.
    each: u64,
}

/// One request's part of it, while it runs.
#[derive(Debug)]
pub struct Share {
    endpoint: Arc<Endpoint>,
    from: u64,
}

impl Worked {
    fn enter(&self, now: Instant) -> u64 {
        let mut level = self.0.lock();
        level.goes_on(now);
        level.running += 1;
        level.each
    }

    fn leave(&self, now: Instant) {
        let mut level = self.0.lock();
        level.goes_on(now);
        level.running = level.running.saturating_sub(1);
    }

    fn each(&self, now: Instant) -> u64 {
        let mut level = self.0.lock();
        level.goes_on(now);
        level.each
    }
}

impl Level {
    fn goes_on(&mut self, now: Instant) {
        let passed = self.at.map_or(0, |at| now.saturating_duration_since(at).as_nanos() as u64);
        self.each += passed.checked_div(self.running.into()).unwrap_or(0);
        self.at = self.at.max(Some(now));
    }
}

impl Share {
    /// A request begins to run on `endpoint`; it is over when this is dropped.
    pub fn begin(endpoint: &Arc<Endpoint>, now: Instant) -> Self {
        Self { endpoint: endpoint.clone(), from: endpoint.worked.enter(now) }
    }

    /// The microseconds that the server worked for it until `now`.
    pub fn micros(&self, now: Instant) -> u64 {
        (self.endpoint.worked.each(now) - self.from) / 1_000
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.endpoint.worked.leave(Instant::now());
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_parts_add_up_to_the_time_in_which_there_was_anything_to_do() {
        let (worked, begin) = (Worked::default(), Instant::now());
        let at = |seconds| begin + Duration::from_secs(seconds);
        // Nothing runs until 10; one alone until 12, two until 18, the second alone until 20; then nothing.
        let first = worked.enter(at(10));
        let second = worked.enter(at(12));
        let first = worked.each(at(18)) - first;
        worked.leave(at(18));
        let second = worked.each(at(20)) - second;
        worked.leave(at(20));
        assert_eq!((first, second), (5_000_000_000, 5_000_000_000));
        assert_eq!(worked.each(at(60)) - worked.each(at(20)), 0, "whoever is not there pays for no idle second");
    }

    #[test]
    fn a_clock_that_is_read_out_of_order_counts_no_time_twice() {
        let (worked, begin) = (Worked::default(), Instant::now());
        let at = |seconds| begin + Duration::from_secs(seconds);
        let from = worked.enter(at(0));
        assert_eq!(worked.each(at(9)) - from, 9_000_000_000);
        assert_eq!(worked.each(at(5)) - from, 9_000_000_000);
        assert_eq!(worked.each(at(10)) - from, 10_000_000_000);
    }
}
