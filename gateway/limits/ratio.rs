//! A ratio that is learned from what is seen, and how far it strays.

use std::sync::atomic::{AtomicU64, Ordering};

/// The mean and the mean deviation, as two `f32` in one word, so that both change at once.
#[derive(Debug)]
pub struct Ratio(AtomicU64);

/// How much a new sample weighs.
const WEIGHT: f32 = 0.125;

impl Ratio {
    /// One of which nothing has been seen.
    pub fn new(mean: f32, deviation: f32) -> Self {
        Self(AtomicU64::new(packed(mean, deviation)))
    }

    /// What it is, most likely.
    pub fn likely(&self) -> f32 {
        self.learned().0
    }

    /// What it is at most, most likely: two deviations above the mean.
    pub fn most(&self) -> f32 {
        let (mean, deviation) = self.learned();
        2.0f32.mul_add(deviation, mean)
    }

    /// It was seen to be this.
    pub fn learn(&self, seen: f32) {
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
