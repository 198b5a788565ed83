//! What a request cost: its usage, priced in whole nano-dollars.
//!
//! No number here is a float. A price is decimal text, read exactly; products and sums are integers of atto-dollars
//! (10⁻¹⁸); the whole is rounded once, half up, to a nano-dollar. What has no price has no cost: it is never zero.

pub mod bill;
pub mod book;
pub mod file;
pub mod import;
#[cfg(test)]
mod tests;
pub mod usd;

use std::fmt;

use schemars::JsonSchema;
use serde::Serialize;

use self::usd::Usd;
use crate::decimal::{digits, fill};
use crate::usage::{ServiceTier, Usage};

/// A sum of money in nano-dollars (10⁻⁹). It saturates: whoever owes nine billion dollars for one request has other
/// worries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, JsonSchema)]
#[serde(transparent)]
pub struct NanoUsd(pub u64);

impl NanoUsd {
    /// The most there is: what a ledger's signed 64 bits can hold.
    pub const MAX: Self = Self(i64::MAX as u64);

    /// Both together.
    pub fn plus(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0).min(Self::MAX.0))
    }

    /// The nearest to `atto` atto-dollars times `factor`.
    fn rounded(atto: u128, factor: Usd) -> Self {
        const HALF: u64 = 500_000_000;
        // What nearly everything costs, in the numbers that a processor divides itself.
        if let (Ok(atto), Usd::ONE) = (u64::try_from(atto), factor.pico()) {
            return Self(atto / (2 * HALF) + u64::from(atto % (2 * HALF) >= HALF));
        }
        // Both scales together: 10⁻¹⁸ dollars, and the factor's 10⁻¹².
        const NANO: u128 = 1_000_000_000 * Usd::ONE as u128;
        let exact = atto.checked_mul(u128::from(factor.pico())).and_then(|exact| exact.checked_add(NANO / 2));
        let nano = exact.and_then(|exact| u64::try_from(exact / NANO).ok());
        Self(nano.unwrap_or(u64::MAX).min(Self::MAX.0))
    }
}

impl fmt::Display for NanoUsd {
    /// In dollars, with all nine decimals: `0.054399000`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (mut whole, mut decimals) = ([0; 20], *b".000000000");
        fill(&mut decimals[1..], self.0 % 1_000_000_000);
        [digits(self.0 / 1_000_000_000, &mut whole), &decimals]
            .into_iter()
            .try_for_each(|part| f.write_str(std::str::from_utf8(part).unwrap_or_default()))
    }
}

/// How a dialect counts the part of a prompt that the cache knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cached {
    /// Cached and written tokens are among the input tokens: OpenAI's way.
    Within,
    /// They stand beside them: Anthropic's way.
    Beside,
}

/// What one model costs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Price {
    /// For prompts of any size; `tiers` may say otherwise.
    pub base: Rates,
    /// For longer prompts, the shorter first.
    pub tiers: Vec<Tier>,
    /// Whether a tier holds for the whole prompt or for what is beyond its threshold.
    pub slices: bool,
    /// For a request, whatever it uses.
    pub request: Option<Usd>,
    /// For an image that was made.
    pub image: Option<Usd>,
    /// For a second of sound that was heard.
    pub audio_second: Option<Usd>,
    /// For an hour of a GPU.
    pub gpu_hour: Option<Usd>,
    /// How many GPUs work for a request.
    pub gpus: u32,
    /// What everything is multiplied by, by the class of service.
    pub service: Vec<(ServiceTier, Usd)>,
}

/// What tokens cost, in dollars a million, which is picodollars a token or, in the least digit, atto-dollars.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rates {
    /// Of the prompt, what is not told apart below.
    pub input: Option<Usd>,
    /// Of the prompt, read from the cache.
    pub cached: Option<Usd>,
    /// Of the prompt, written to the cache for five minutes.
    pub write: Option<Usd>,
    /// Of the prompt, written to the cache for an hour.
    pub write_1h: Option<Usd>,
    /// Of the prompt, sound.
    pub audio_input: Option<Usd>,
    /// Of the prompt, images.
    pub image_input: Option<Usd>,
    /// Of the answer, what is not told apart below.
    pub output: Option<Usd>,
    /// Of the answer, reasoning.
    pub reasoning: Option<Usd>,
    /// Of the answer, sound.
    pub audio_output: Option<Usd>,
    /// Of the answer, images.
    pub image_output: Option<Usd>,
}

/// Rates for long prompts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tier {
    /// The longest prompt, in tokens, for which they do not hold yet.
    pub above: u64,
    /// The rates.
    pub rates: Rates,
}

impl Price {
    /// What `usage` costs; `None` if something was used that has no price here.
    pub fn cost(&self, usage: &Usage, cached: Cached) -> Option<NanoUsd> {
        let units = self.units(usage);
        let tokens = if usage.has_tokens() { self.tokens(&Tokens::of(usage, cached)) } else { None };
        let atto = match (units, tokens) {
            (None, None) => return None,
            // Tokens without a price, beside something that is paid by the piece, are told for information.
            (units, tokens) => units.unwrap_or(0).saturating_add(tokens.unwrap_or(0)),
        };
        Some(NanoUsd::rounded(atto, self.factor(usage.service_tier)))
    }

    /// Whether it matters which class of service an answer had.
    pub fn asks_service_tier(&self) -> bool {
        !self.service.is_empty()
    }

    fn factor(&self, service: Option<ServiceTier>) -> Usd {
        let found = self.service.iter().find(|(tier, _)| Some(*tier) == service);
        found.map_or(Usd::new(Usd::ONE), |(_, factor)| *factor)
    }

    /// What is paid by the piece; `None` if nothing is.
    fn units(&self, usage: &Usage) -> Option<u128> {
        const HOUR: u128 = 3_600_000_000;
        let worked = usage.gpu_us.map(|micros| micros.saturating_mul(self.gpus.into()));
        let counted =
            [(self.image, usage.images, 1), (self.audio_second, usage.audio_ms, 1000), (self.gpu_hour, worked, HOUR)];
        let counted = counted
            .into_iter()
            .filter_map(|(price, count, per)| Some(price?.atto_each().saturating_mul(u128::from(count?)) / per));
        self.request.map(Usd::atto_each).into_iter().chain(counted).reduce(u128::saturating_add)
    }

    fn tokens(&self, tokens: &Tokens) -> Option<u128> {
        if !self.slices {
            let rates = self.rates(tokens.prompt());
            return Some(tokens.input(rates)?.saturating_add(tokens.output(rates)?));
        }
        // The prompt's tokens stand in this order: what the cache knows comes first. The answer costs what the
        // prompt's last token does.
        let ends = self.tiers.iter().map(|tier| tier.above).chain([u64::MAX]);
        let (mut sum, mut from) = (0u128, 0);
        for (end, rates) in ends.zip(std::iter::once(&self.base).chain(self.tiers.iter().map(|tier| &tier.rates))) {
            sum = sum.saturating_add(tokens.between(from, end).input(rates)?);
            from = end;
        }
        Some(sum.saturating_add(tokens.output(self.rates(tokens.prompt()))?))
    }

    fn rates(&self, prompt: u64) -> &Rates {
        let tier = self.tiers.iter().rev().find(|tier| prompt > tier.above);
        tier.map_or(&self.base, |tier| &tier.rates)
    }
}

/// A usage, each token counted once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Tokens {
    /// In the order in which a prompt has them: read from the cache, written for an hour, for five minutes, images,
    /// sound, the rest.
    input: [u64; 6],
    /// Reasoning, images, sound, the rest.
    output: [u64; 4],
}

impl Tokens {
    fn of(usage: &Usage, counted: Cached) -> Self {
        let count = |tokens: Option<u64>| tokens.unwrap_or(0);
        let (cached, written) = (count(usage.cached_tokens), count(usage.cache_write_tokens));
        let known = cached.saturating_add(written);
        // More than the whole cannot be within it: somebody has put one vendor's numbers under another's names.
        let input = count(usage.input_tokens);
        let mut rest = if counted == Cached::Within && known <= input { input - known } else { input };
        let hour = count(usage.cache_write_1h_tokens).min(written);
        let images = take(&mut rest, usage.image_input_tokens);
        let sound = take(&mut rest, usage.audio_input_tokens);
        let mut said = count(usage.output_tokens);
        let reasoning = take(&mut said, usage.reasoning_tokens);
        let drawn = take(&mut said, usage.image_output_tokens);
        let spoken = take(&mut said, usage.audio_output_tokens);
        Self { input: [cached, hour, written - hour, images, sound, rest], output: [reasoning, drawn, spoken, said] }
    }

    /// How long the prompt is.
    fn prompt(&self) -> u64 {
        self.input.iter().fold(0, |sum, count| sum.saturating_add(*count))
    }

    /// The part of the prompt from one place to another.
    fn between(&self, from: u64, end: u64) -> Self {
        let mut at = 0u64;
        let input = self.input.map(|count| {
            let (begin, behind) = (at, at.saturating_add(count));
            at = behind;
            behind.min(end).saturating_sub(begin.max(from))
        });
        Self { input, ..Self::default() }
    }

    fn input(&self, rates: &Rates) -> Option<u128> {
        let write = rates.write.or(rates.input);
        let prices = [
            rates.cached.or(rates.input),
            rates.write_1h.or(write),
            write,
            rates.image_input.or(rates.input),
            rates.audio_input.or(rates.input),
            rates.input,
        ];
        priced(&self.input, &prices)
    }

    fn output(&self, rates: &Rates) -> Option<u128> {
        let prices = [
            rates.reasoning.or(rates.output),
            rates.image_output.or(rates.output),
            rates.audio_output.or(rates.output),
            rates.output,
        ];
        priced(&self.output, &prices)
    }
}

/// Takes `part` out of `whole`, as far as it is in there.
fn take(whole: &mut u64, part: Option<u64>) -> u64 {
    let part = part.unwrap_or(0).min(*whole);
    *whole -= part;
    part
}

/// `None` if there is something without a price.
fn priced(counts: &[u64], prices: &[Option<Usd>]) -> Option<u128> {
    let used = counts.iter().zip(prices).filter(|(count, _)| **count > 0);
    used.map(|(count, price)| Some(price.as_ref()?.atto_of_a_million().saturating_mul(u128::from(*count))))
        .try_fold(0u128, |sum, cost| Some(sum.saturating_add(cost?)))
}
