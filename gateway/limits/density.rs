//! How many tokens a model makes of a byte of a request, learned from what its upstreams report.

use super::ratio::Ratio;

/// Tokens a byte.
#[derive(Debug)]
pub struct Density(Ratio);

/// Before anything was learned: safe for prose, code and JSON in languages of Latin letters.
const MEAN: f32 = 0.30;
const DEVIATION: f32 = 0.05;
/// Every chat template adds some tokens to a prompt of whatever length.
const TEMPLATE: u64 = 8;

impl Default for Density {
    fn default() -> Self {
        Self(Ratio::new(MEAN, DEVIATION))
    }
}

impl Density {
    /// How many tokens a text of so many bytes has at most, most likely.
    pub fn estimate(&self, bytes: u64) -> u64 {
        TEMPLATE + (bytes as f64 * f64::from(self.0.most())).ceil() as u64
    }

    /// How many tokens a text of so many bytes has, most likely.
    pub fn likely(&self, bytes: u64) -> u64 {
        TEMPLATE + (bytes as f64 * f64::from(self.0.likely())) as u64
    }

    /// An upstream made so many tokens of so many bytes.
    pub fn learn(&self, bytes: u64, tokens: u64) {
        if bytes > 0 && tokens > 0 {
            self.0.learn(tokens as f32 / bytes as f32);
        }
    }
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
