//! How a limit stands, as answers tell it: OpenAI's `x-ratelimit-*`, Anthropic's `anthropic-ratelimit-*`.

use std::time::{Duration, SystemTime};

use http::{HeaderMap, HeaderName};

use super::level::{Count, Terms};
use super::{Limit, Unit};
use crate::headers::set;
use crate::refusal::Refusal;
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
pub fn tell(headers: &mut HeaderMap, dialect: Dialect, standings: &[Standing], at: SystemTime) -> Result<(), Refusal> {
    let anthropic = dialect == Dialect::Anthropic;
    for (unit, openai_names, anthropic_names) in &KINDS {
        let Some(standing) = Standing::tightest(standings, *unit) else { continue };
        let [limit, free, reset] = if anthropic { anthropic_names } else { openai_names };
        let rest = if anthropic { Stamp(at + standing.rest).seconds() } else { spelt(standing.rest) };
        set(headers, limit.clone(), standing.max)?;
        set(headers, free.clone(), standing.free)?;
        set(headers, reset.clone(), rest)?;
    }
    Ok(())
}

/// A unit, and the names of its headers: limit, remaining, reset.
type Kind = (Unit, [HeaderName; 3], [HeaderName; 3]);

static KINDS: [Kind; 4] = [
    (
        Unit::Requests,
        [
            HeaderName::from_static("x-ratelimit-limit-requests"),
            HeaderName::from_static("x-ratelimit-remaining-requests"),
            HeaderName::from_static("x-ratelimit-reset-requests"),
        ],
        [
            HeaderName::from_static("anthropic-ratelimit-requests-limit"),
            HeaderName::from_static("anthropic-ratelimit-requests-remaining"),
            HeaderName::from_static("anthropic-ratelimit-requests-reset"),
        ],
    ),
    (
        Unit::Tokens,
        [
            HeaderName::from_static("x-ratelimit-limit-tokens"),
            HeaderName::from_static("x-ratelimit-remaining-tokens"),
            HeaderName::from_static("x-ratelimit-reset-tokens"),
        ],
        [
            HeaderName::from_static("anthropic-ratelimit-tokens-limit"),
            HeaderName::from_static("anthropic-ratelimit-tokens-remaining"),
            HeaderName::from_static("anthropic-ratelimit-tokens-reset"),
        ],
    ),
    (
        Unit::InputTokens,
        [
            HeaderName::from_static("x-ratelimit-limit-input-tokens"),
            HeaderName::from_static("x-ratelimit-remaining-input-tokens"),
            HeaderName::from_static("x-ratelimit-reset-input-tokens"),
        ],
        [
            HeaderName::from_static("anthropic-ratelimit-input-tokens-limit"),
            HeaderName::from_static("anthropic-ratelimit-input-tokens-remaining"),
            HeaderName::from_static("anthropic-ratelimit-input-tokens-reset"),
        ],
    ),
    (
        Unit::OutputTokens,
        [
            HeaderName::from_static("x-ratelimit-limit-output-tokens"),
            HeaderName::from_static("x-ratelimit-remaining-output-tokens"),
            HeaderName::from_static("x-ratelimit-reset-output-tokens"),
        ],
        [
            HeaderName::from_static("anthropic-ratelimit-output-tokens-limit"),
            HeaderName::from_static("anthropic-ratelimit-output-tokens-remaining"),
            HeaderName::from_static("anthropic-ratelimit-output-tokens-reset"),
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
    fn one_of_something_is_not_many() {
        let told = [Unit::Requests, Unit::InputTokens, Unit::Concurrency, Unit::Nanousd].map(|unit| unit.spelt(1));
        assert_eq!(told, ["1 request", "1 input token", "1 request at one time", "$0.000000001"]);
        assert_eq!(Unit::Tokens.spelt(2), "2 tokens");
    }

    #[test]
    fn the_tightest_limit_of_a_kind_is_told() {
        let standing = |free| Standing { unit: Unit::Tokens, max: 100, free, rest: Duration::from_secs(1) };
        let standings = [standing(7), standing(3), standing(9)];
        assert_eq!(Standing::tightest(&standings, Unit::Tokens).unwrap().free, 3);
        assert_eq!(Standing::tightest(&standings, Unit::Requests), None);
    }
}
