//! Who was not let in on the admin port is on record, but not so often that it could fill the disk.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// So many at once,
const BURST: u32 = 20;
/// and then one in this time.
const EVERY: Duration = Duration::from_secs(10);

/// What was refused lately.
#[derive(Debug, Default)]
pub struct Denials(Mutex<Level>);

#[derive(Debug, Default)]
struct Level {
    /// When the bucket is empty again.
    until: Option<Instant>,
    left_out: u64,
}

impl Denials {
    /// Whether one more is to be told now; then how many were left out since the last one.
    pub fn told(&self, now: Instant) -> Option<u64> {
        let mut level = self.0.lock();
        let from = level.until.filter(|until| *until > now).unwrap_or(now);
        if from.saturating_duration_since(now) > EVERY * (BURST - 1) {
            level.left_out += 1;
            return None;
        }
        level.until = Some(from + EVERY);
        Some(std::mem::take(&mut level.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_counted_and_not_told() {
        let (denials, begun) = (Denials::default(), Instant::now());
        let told = |after: u64, count: u32| -> Vec<u64> {
            let now = begun + Duration::from_secs(after);
            (0..count).filter_map(|_| denials.told(now)).collect()
        };
        assert_eq!(told(0, 1_000), [0; BURST as usize]);
        assert_eq!(told(9, 100), Vec::<u64>::new());
        assert_eq!(told(10, 100), [980 + 100]);
        assert_eq!(told(1_000, 1_000).len(), BURST as usize);
    }
}
