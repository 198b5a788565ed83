//! How long a server works for a request, its part of what the server does: learned from what was measured, so that a
//! budget holds for servers that are paid by the hour, whose work is known only when it is done.

use super::ratio::Ratio;

/// Nanoseconds of work for a token of a prompt. One of an answer is so much work as `WRITING` of those, and a request is
/// so much more than its tokens as `BESIDES` of those.
#[derive(Debug)]
pub struct Effort(Ratio);

const WRITING: u64 = 96;
const BESIDES: u64 = 16 * WRITING;
/// Before anything was learned: a model of 8 billion parameters alone on one GPU of a data centre, or one twice as slow.
const MEAN: f32 = 125_000.0;
const DEVIATION: f32 = 62_500.0;

/// How much work a request may be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// Nanoseconds for a token of a prompt.
    token_ns: u64,
    /// No request is more: it would be too late. In microseconds.
    most_us: u64,
}

impl Default for Effort {
    fn default() -> Self {
        Self(Ratio::new(MEAN, DEVIATION))
    }
}

impl Effort {
    /// The work of a request that may take so many milliseconds in all, at most, most likely: a quarter more than has
    /// been seen, since what is learned of short answers is a little too little for long ones.
    pub fn most(&self, total_ms: u64) -> Work {
        Work { token_ns: (self.0.most() * 1.25).ceil() as u64, most_us: total_ms.saturating_mul(1_000) }
    }

    /// A request with so many tokens of prompt and answer was work of so many microseconds.
    pub fn learn(&self, input: u64, output: u64, micros: u64) {
        self.0.learn((micros as f64 * 1e3 / size(input, output) as f64) as f32);
    }
}

impl Work {
    /// The larger of both.
    pub fn or(self, other: Self) -> Self {
        Self { token_ns: self.token_ns.max(other.token_ns), most_us: self.most_us.max(other.most_us) }
    }

    /// Microseconds for a prompt and an answer of so many tokens.
    pub fn micros(self, input: u64, output: u64) -> u64 {
        (size(input, output).saturating_mul(self.token_ns) / 1_000).min(self.most_us)
    }
}

/// A request in tokens of a prompt.
fn size(input: u64, output: u64) -> u64 {
    output.saturating_mul(WRITING).saturating_add(input).saturating_add(BESIDES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_above_what_was_seen_whether_servers_are_faster_or_slower_than_was_thought() {
        for ms_a_token in [1, 12, 90] {
            let effort = Effort::default();
            let micros = |tokens: u64| tokens * ms_a_token * 1_000;
            for turn in 0..60 {
                effort.learn(800, 200 + turn % 20, micros(200 + turn % 20));
            }
            let most = effort.most(600_000).micros(800, 400);
            assert!((micros(400)..micros(540)).contains(&most), "{ms_a_token}: {most}");
        }
    }

    #[test]
    fn it_is_never_more_than_the_time_that_a_request_has() {
        assert_eq!(Effort::default().most(2_000).micros(u64::MAX, u64::MAX), 2_000_000);
        assert_eq!(Work::default().micros(10, 10), 0);
    }

    #[test]
    fn more_tokens_are_never_less_work() {
        let work = Effort::default().most(600_000);
        let micros: Vec<u64> = (0..2_000).map(|output| work.micros(100, output)).collect();
        assert!(micros.is_sorted() && micros[0] > 0);
    }
}
