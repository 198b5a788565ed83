//! How a limit stands, as answers tell it: OpenAI's `x-ratelimit-*`, Anthropic's `anthropic-ratelimit-*`.

use std::time::{Duration, SystemTime};

use bytes::BufMut;
use http::{HeaderMap, HeaderName};

use super::level::{Count, Terms};
use super::{Limit, Unit};
use crate::decimal::digits;
use crate::headers::{Values, set};
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
    if standings.is_empty() {
        return Ok(());
    }
    let anthropic = dialect == Dialect::Anthropic;
    let mut values = Values::with_room(VALUES * KINDS.len());
    headers.reserve(3 * KINDS.len());
    for (unit, openai_names, anthropic_names) in &KINDS {
        let Some(standing) = Standing::tightest(standings, *unit) else { continue };
        let [limit, free, reset] = if anthropic { anthropic_names } else { openai_names };
        set(headers, limit.clone(), values.number(standing.max)?)?;
        set(headers, free.clone(), values.number(standing.free)?)?;
        let rest = values.text(|text| match anthropic {
            true => text.put_slice(&Stamp(at + standing.rest).seconds()),
            false => spell(standing.rest, text),
        });
        set(headers, reset.clone(), rest?)?;
    }
    Ok(())
}

/// Bytes that the three values of one kind have, mostly; more of them take more memory.
const VALUES: usize = 48;

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
    let mut text = Vec::new();
    spell(rest, &mut text);
    String::from_utf8(text).unwrap_or_default()
}

fn spell(rest: Duration, text: &mut impl BufMut) {
    let millis = rest.as_millis() as u64;
    let seconds = millis.div_ceil(1000);
    let (hours, minutes) = ((seconds / 3600, b"h".as_slice()), (seconds / 60 % 60, b"m".as_slice()));
    let put = |(amount, unit): (u64, &[u8])| {
        text.put_slice(digits(amount, &mut [0; 20]));
        text.put_slice(unit);
    };
    match seconds {
        0..=1 if millis < 1000 => [(millis, b"ms".as_slice())].into_iter().for_each(put),
        0..60 => [(seconds, b"s".as_slice())].into_iter().for_each(put),
        60..3600 => [minutes, (seconds % 60, b"s")].into_iter().for_each(put),
        _ => [hours, minutes, (seconds % 60, b"s")].into_iter().for_each(put),
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
    fn a_limit_is_told_in_the_dialect_of_whoever_asks() {
        let standing = Standing { unit: Unit::Tokens, max: 100, free: 7, rest: Duration::from_millis(61_500) };
        let at = SystemTime::UNIX_EPOCH + Duration::from_millis(86_399_200);
        for (dialect, names, reset) in
            [(Dialect::OpenAi, &KINDS[1].1, "1m2s"), (Dialect::Anthropic, &KINDS[1].2, "1970-01-02T00:01:00Z")]
        {
            // What an upstream said of its own limits makes room.
            let mut headers: HeaderMap = [(names[1].clone(), "theirs".parse().unwrap())].into_iter().collect();
            tell(&mut headers, dialect, &[standing], at).unwrap();
            assert_eq!(names.each_ref().map(|name| headers[name].to_str().unwrap()), ["100", "7", reset]);
            assert_eq!(headers.len(), 3);
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
