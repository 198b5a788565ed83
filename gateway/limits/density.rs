//! How many tokens a model makes of a byte of a request, learned from what its upstreams report.

use std::sync::atomic::{AtomicU64, Ordering};

/// Tokens a byte: the mean and the mean deviation, as two `f32` in one word, so that both change at once.
#[derive(Debug)]
pub struct Density(AtomicU64);

/// Before anything was learned: safe for prose, code and JSON in languages of Latin letters.
const MEAN: f32 = 0.30;
const DEVIATION: f32 = 0.05;
/// How much a new request weighs.
const WEIGHT: f32 = 0.125;
/// Every chat template adds some tokens to a prompt of whatever length.
const TEMPLATE: u64 = 8;

impl Default for Density {
    fn default() -> Self {
        Self(AtomicU64::new(packed(MEAN, DEVIATION)))
    }
}

impl Density {
    /// How many tokens a text of so many bytes has at most, most likely: two deviations above the mean.
    pub fn estimate(&self, bytes: u64) -> u64 {
        let (mean, deviation) = self.learned();
        TEMPLATE + (bytes as f64 * f64::from(2.0f32.mul_add(deviation, mean))).ceil() as u64
    }

    /// How many tokens a text of so many bytes has, most likely.
    pub fn likely(&self, bytes: u64) -> u64 {
        TEMPLATE + (bytes as f64 * f64::from(self.learned().0)) as u64
    }

    /// An upstream made so many tokens of so many bytes.
    pub fn learn(&self, bytes: u64, tokens: u64) {
        if bytes == 0 || tokens == 0 {
            return;
        }
        let seen = tokens as f32 / bytes as f32;
        let (mean, deviation) = self.learned();
        let off = (seen - mean).abs();
        let next = packed(WEIGHT.mul_add(seen - mean, mean), WEIGHT.mul_add(off - deviation, deviation));
        // Two at once: one of them is not learned from.
        self.0.store(next, Ordering::Relaxed);
    }

    fn learned(&self) -> (f32, f32) {
        let both = self.0.load(Ordering::Relaxed);
        (f32::from_bits((both >> 32) as u32), f32::from_bits(both as u32))
    }
}

fn packed(mean: f32, deviation: f32) -> u64 {
    u64::from(mean.to_bits()) << 32 | u64::from(deviation.to_bits())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_learns_within_some_requests_and_stays_above_what_comes() {
        let density = Density::default();
        for _ in 0..50 {
            density.learn(1000, 180);
        }
        assert!((188..=200).contains(&density.estimate(1000)), "{}", density.estimate(1000));
        for _ in 0..50 {
            density.learn(1000, 700);
        }
        assert!((708..=800).contains(&density.estimate(1000)), "{}", density.estimate(1000));
    }

    #[test]
    fn nothing_is_learned_from_nothing() {
        let density = Density::default();
        density.learn(0, 5);
        density.learn(5, 0);
        assert_eq!(density.estimate(100), Density::default().estimate(100));
    }
}
