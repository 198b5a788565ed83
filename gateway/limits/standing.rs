//! How a limit stands, as answers tell it: OpenAI's `x-ratelimit-*`, Anthropic's `anthropic-ratelimit-*`.

use std::time::{Duration, SystemTime};

use super::level::{Count, Terms};
use super::{Limit, Unit};
use crate::refusal::Refusal;
use crate::relay::AnswerHead;
use crate::surface::Dialect;
use crate::time::Stamp;

/// One limit at one time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standing {
    /// What it counts.
    pub unit: Unit,
    /// The most.
    pub max: u64,
    /// What is left.
    pub free: u64,
    /// How long the span still lasts in which it counts.
    pub rest: Duration,
}

impl Standing {
    /// How `limit` stands.
    pub fn of(limit: &Limit, count: &Count, now: u64) -> Self {
        let terms = Terms { max: limit.max, window: &limit.window, now };
        Self { unit: limit.unit, max: limit.max, free: count.free(&terms), rest: count.rest(now) }
    }

    /// Of several limits of a kind, the one that has the least left is told.
    fn tightest(standings: &[Self], unit: Unit) -> Option<&Self> {
        standings.iter().filter(|standing| standing.unit == unit).min_by_key(|standing| (standing.free, standing.max))
    }
}

/// Puts the standings on an answer, in its dialect. What an upstream said of its own limits makes room: they are not
/// the caller's.
pub fn tell(head: &mut AnswerHead, dialect: Dialect, standings: &[Standing], at: SystemTime) -> Result<(), Refusal> {
    let anthropic = dialect == Dialect::Anthropic;
    for (unit, openai_names, anthropic_names) in KINDS {
        let Some(standing) = Standing::tightest(standings, unit) else { continue };
        let [limit, free, reset] = if anthropic { anthropic_names } else { openai_names };
        let rest = if anthropic { Stamp(at + standing.rest).seconds() } else { spelt(standing.rest) };
        crate::local::set(head, limit, standing.max)?;
        crate::local::set(head, free, standing.free)?;
        crate::local::set(head, reset, rest)?;
    }
    Ok(())
}

/// A unit, and the names of its headers: limit, remaining, reset.
type Kind = (Unit, [&'static str; 3], [&'static str; 3]);

const KINDS: [Kind; 4] = [
    (
        Unit::Requests,
        ["x-ratelimit-limit-requests", "x-ratelimit-remaining-requests", "x-ratelimit-reset-requests"],
        [
            "anthropic-ratelimit-requests-limit",
            "anthropic-ratelimit-requests-remaining",
            "anthropic-ratelimit-requests-reset",
        ],
    ),
    (
        Unit::Tokens,
        ["x-ratelimit-limit-tokens", "x-ratelimit-remaining-tokens", "x-ratelimit-reset-tokens"],
        [
            "anthropic-ratelimit-tokens-limit",
            "anthropic-ratelimit-tokens-remaining",
            "anthropic-ratelimit-tokens-reset",
        ],
    ),
    (
        Unit::InputTokens,
        ["x-ratelimit-limit-input-tokens", "x-ratelimit-remaining-input-tokens", "x-ratelimit-reset-input-tokens"],
        [
            "anthropic-ratelimit-input-tokens-limit",
            "anthropic-ratelimit-input-tokens-remaining",
            "anthropic-ratelimit-input-tokens-reset",
        ],
    ),
    (
        Unit::OutputTokens,
        ["x-ratelimit-limit-output-tokens", "x-ratelimit-remaining-output-tokens", "x-ratelimit-reset-output-tokens"],
        [
            "anthropic-ratelimit-output-tokens-limit",
            "anthropic-ratelimit-output-tokens-remaining",
            "anthropic-ratelimit-output-tokens-reset",
        ],
    ),
];

/// A duration as OpenAI spells it: `12ms`, `1s`, `6m0s`, `1h0m0s`.
pub(super) fn spelt(rest: Duration) -> String {
    let (millis, seconds) = (rest.as_millis() as u64, rest.as_millis().div_ceil(1000) as u64);
    match seconds {
        0..=1 if millis < 1000 => format!("{millis}ms"),
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m{}s", seconds / 60, seconds % 60),
        _ => format!("{}h{}m{}s", seconds / 3600, seconds / 60 % 60, seconds % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reset_is_spelt_as_openai_spells_it() {
        let cases = [(12, "12ms"), (1000, "1s"), (59_001, "1m0s"), (360_000, "6m0s"), (3_661_000, "1h1m1s")];
        for (millis, text) in cases {
            assert_eq!(spelt(Duration::from_millis(millis)), text);
        }
    }

    #[test]
    fn the_tightest_limit_of_a_kind_is_told() {
        let standing = |free| Standing { unit: Unit::Tokens, max: 100, free, rest: Duration::from_secs(1) };
        let standings = [standing(7), standing(3), standing(9)];
        assert_eq!(Standing::tightest(&standings, Unit::Tokens).unwrap().free, 3);
        assert_eq!(Standing::tightest(&standings, Unit::Requests), None);
    }
}
