//! The golden table, and what holds for any numbers.

use std::time::SystemTime;

use serde::Deserialize;

use super::book::Book;
use super::*;
use crate::surface;
use crate::usage::{Meter, Source};

/// One line of `tests/fixtures/money/golden.json`: what a vendor's answer says, a price, and what that costs, reckoned
/// with fractions by something else than this code.
#[derive(Deserialize)]
struct Golden {
    name: String,
    source: String,
    surface: String,
    stream: bool,
    answer: String,
    price: serde_json::Value,
    /// Images that were asked for.
    n: Option<u64>,
    /// Absent: it has no price.
    nanousd: Option<u64>,
}

fn golden() -> Vec<Golden> {
    serde_json::from_str(include_str!("../../tests/fixtures/money/golden.json")).unwrap()
}

impl Golden {
    fn price(&self) -> Price {
        let mut written = self.price.clone();
        written["models"] = serde_json::json!(["m"]);
        let written: file::Price = serde_json::from_value(written).unwrap();
        let book = Book::of(&[&[written]]).unwrap();
        Price::clone(book.find("m", "p", "openai", SystemTime::now()).unwrap())
    }

    fn usage(&self, price: &Price, pieces: usize) -> Usage {
        let mut meter = Meter::new(surface::find(&self.surface).unwrap().operation, self.stream);
        if price.asks_service_tier() {
            meter = meter.with_service_tier();
        }
        self.answer.as_bytes().chunks(pieces).for_each(|piece| meter.push(piece));
        Usage { images: self.n, ..meter.usage() }
    }

    fn cost(&self, pieces: usize) -> Option<NanoUsd> {
        let price = self.price();
        let cached = if self.surface == "/v1/messages" { Cached::Beside } else { Cached::Within };
        price.cost(&self.usage(&price, pieces), cached)
    }
}

#[test]
fn the_golden_table_holds_to_the_nano_dollar() {
    let table = golden();
    assert!(table.len() >= 200, "{}", table.len());
    for line in &table {
        assert!(!line.source.is_empty(), "{}", line.name);
        for pieces in [usize::MAX, 1, 7] {
            assert_eq!(line.cost(pieces).map(|cost| cost.0), line.nanousd, "{} ({})", line.name, line.source);
        }
    }
    let invoice = table.iter().find(|line| line.name == "sonnet message 3/12304+0/0/550").unwrap();
    assert!((invoice.nanousd.unwrap() as i64 - 54_400_000).abs() <= 10_000);
}

/// Any price; tiers that never get cheaper where `rising`.
fn any_price(random: &mut fastrand::Rng, rising: bool) -> Price {
    fn usd(random: &mut fastrand::Rng) -> Option<Usd> {
        let places = random.u32(0..18);
        Some(Usd::new(random.u64(..10u64.pow(places))))
    }
    let mut rates = |floor: Rates| {
        let mut next = |least: Option<Usd>| {
            let fresh = usd(random);
            if rising { fresh.max(least) } else { fresh }
        };
        // What is cheaper in the cache stays so, or a prompt of fewer cached tokens could cost less.
        Rates {
            input: next(floor.input),
            cached: next(floor.cached),
            write: next(floor.write),
            write_1h: next(floor.write_1h),
            audio_input: next(floor.audio_input),
            image_input: next(floor.image_input),
            output: next(floor.output),
            reasoning: next(floor.reasoning),
            audio_output: next(floor.audio_output),
            image_output: next(floor.image_output),
        }
    };
    let base = rates(Rates::default());
    let (second, third) = (rates(base), Rates::default());
    let third = Rates { ..rates(if rising { second } else { third }) };
    Price {
        base,
        tiers: vec![Tier { above: 100, rates: second }, Tier { above: 10_000, rates: third }],
        slices: random.bool(),
        request: usd(random).filter(|_| random.bool()),
        image: usd(random).filter(|_| random.bool()),
        audio_second: usd(random).filter(|_| random.bool()),
        gpu_hour: usd(random).filter(|_| random.bool()),
        gpus: random.u32(1..=4096),
        service: vec![(ServiceTier::Flex, Usd::new(Usd::ONE / 2)), (ServiceTier::Priority, Usd::new(2 * Usd::ONE))],
    }
}

fn any_count(random: &mut fastrand::Rng) -> u64 {
    match random.u8(..12) {
        0 => u64::MAX - random.u64(..3),
        1 => random.u64(..),
        2..5 => 0,
        _ => random.u64(..30_000),
    }
}

fn any_tokens(random: &mut fastrand::Rng, most: u64) -> Tokens {
    Tokens { input: std::array::from_fn(|_| random.u64(..=most)), output: std::array::from_fn(|_| random.u64(..=most)) }
}

#[test]
fn no_number_of_any_upstream_overflows() {
    let mut random = fastrand::Rng::with_seed(1);
    for _ in 0..50_000 {
        let price = any_price(&mut random, false);
        let some = |random: &mut fastrand::Rng| random.bool().then(|| any_count(random));
        let usage = Usage {
            input_tokens: some(&mut random),
            output_tokens: some(&mut random),
            cached_tokens: some(&mut random),
            cache_write_tokens: some(&mut random),
            cache_write_1h_tokens: some(&mut random),
            reasoning_tokens: some(&mut random),
            audio_input_tokens: some(&mut random),
            audio_output_tokens: some(&mut random),
            image_input_tokens: some(&mut random),
            image_output_tokens: some(&mut random),
            audio_ms: some(&mut random),
            images: some(&mut random),
            gpu_us: some(&mut random),
            service_tier: random.choice([None, Some(ServiceTier::Flex), Some(ServiceTier::Priority)]).flatten(),
            source: Source::Upstream,
        };
        for cached in [Cached::Within, Cached::Beside] {
            assert!(price.cost(&usage, cached).is_none_or(|cost| cost <= NanoUsd::MAX));
        }
    }
    assert_eq!(NanoUsd::MAX.plus(NanoUsd(1)), NanoUsd::MAX);
}

#[test]
fn more_tokens_never_cost_less_where_no_tier_is_cheaper() {
    let mut random = fastrand::Rng::with_seed(2);
    for _ in 0..20_000 {
        let price = any_price(&mut random, true);
        let less = any_tokens(&mut random, 6_000);
        let mut more = less;
        // Added behind what is there: by slices, what is put in front pushes the others into the next tier.
        more.input[5] += random.u64(..6_000);
        more.output[random.usize(..4)] += random.u64(..6_000);
        let whole = Price { slices: false, ..price.clone() };
        assert!(price.tokens(&more) >= price.tokens(&less), "{price:?} {less:?} {more:?}");
        more.input[random.usize(..6)] += random.u64(..6_000);
        assert!(whole.tokens(&more) >= whole.tokens(&less), "{whole:?} {less:?} {more:?}");
    }
}

#[test]
fn slices_add_up_wherever_a_prompt_is_cut() {
    let mut random = fastrand::Rng::with_seed(3);
    for _ in 0..20_000 {
        let price = Price { slices: true, ..any_price(&mut random, false) };
        let tokens = Tokens { output: [0; 4], ..any_tokens(&mut random, 5_000) };
        let mut cuts = [0, random.u64(..30_000), random.u64(..30_000), 100, 10_000, u64::MAX];
        cuts.sort_unstable();
        let tier = |from: u64| {
            price.tiers.iter().rev().find(|tier| from >= tier.above).map_or(&price.base, |tier| &tier.rates)
        };
        let parts = cuts.windows(2).map(|cut| tokens.between(cut[0], cut[1]).input(tier(cut[0])).unwrap());
        assert_eq!(parts.sum::<u128>(), price.tokens(&tokens).unwrap());
        let pieces: u64 = cuts.windows(2).map(|cut| tokens.between(cut[0], cut[1]).prompt()).sum();
        assert_eq!(pieces, tokens.prompt());
    }
}

#[test]
fn two_requests_cost_what_both_cost_within_their_rounding() {
    let mut random = fastrand::Rng::with_seed(4);
    for _ in 0..20_000 {
        let price = Price {
            tiers: Vec::new(),
            request: None,
            image: None,
            audio_second: None,
            ..any_price(&mut random, false)
        };
        let usage = |input, output| Usage {
            input_tokens: Some(input),
            output_tokens: Some(output),
            source: Source::Upstream,
            ..Usage::default()
        };
        let cost = |input, output| price.cost(&usage(input, output), Cached::Within).unwrap();
        let [a, b, c, d] = std::array::from_fn(|_| random.u64(..100_000));
        let (apart, together) = (cost(a, b).plus(cost(c, d)), cost(a + c, b + d));
        assert!(apart.0.abs_diff(together.0) <= 1, "{apart} {together}");
    }
}

#[test]
fn an_hour_of_a_gpu_costs_what_it_costs_and_a_part_of_it_its_part() {
    let price = |dollars: u64, gpus| Price { gpu_hour: Some(Usd::new(dollars * Usd::ONE)), gpus, ..Price::default() };
    let cost = |price: Price, gpu_us| {
        let usage = Usage { gpu_us, output_tokens: Some(7), source: Source::Upstream, ..Usage::default() };
        price.cost(&usage, Cached::Within)
    };
    assert_eq!(cost(price(2, 1), Some(3_600_000_000)), Some(NanoUsd(2_000_000_000)));
    // 1.8 seconds are a two-thousandth of an hour; of eight GPUs at three dollars it costs 24 / 2,000.
    assert_eq!(cost(price(3, 8), Some(1_800_000)), Some(NanoUsd(12_000_000)));
    assert_eq!(cost(price(3, 1), Some(1)), Some(NanoUsd(1)), "0.83 nano-dollars, rounded");
    assert_eq!(cost(price(3, 1), None), None, "what was not measured has no cost, and not none");
}

#[test]
fn dollars_are_written_with_all_their_places() {
    assert_eq!(NanoUsd(54_399_000).to_string(), "0.054399000");
    assert_eq!(NanoUsd(12_000_000_001).to_string(), "12.000000001");
}

#[test]
fn what_a_processor_divides_itself_is_rounded_as_what_it_cannot() {
    let mut random = fastrand::Rng::with_seed(5);
    let (one, nano) = (Usd::new(Usd::ONE), 1_000_000_000u128);
    let edges = [0, 1, nano / 2 - 1, nano / 2, nano / 2 + 1, nano, u128::from(u64::MAX), u128::from(u64::MAX) + 1];
    let any = (0..20_000).map(|_| u128::from(random.u64(..) >> random.u32(..64)));
    for atto in edges.into_iter().chain(any) {
        assert_eq!(u128::from(NanoUsd::rounded(atto, one).0), (atto + nano / 2) / nano, "{atto}");
    }
}
