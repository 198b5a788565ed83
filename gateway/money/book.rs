//! The book of prices: what a model costs at a pool on a day.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use sha2::{Digest, Sha256};

use super::file::{self, ServiceTiers, TierBy};
use super::usd::Usd;
use super::{Price, Rates, Tier};
use crate::time;
use crate::usage::ServiceTier;

/// All prices of a policy.
#[derive(Debug, Default)]
pub struct Book {
    /// The first twelve hex digits of the SHA-256 over all prices: the same version prices the same.
    pub version: Arc<str>,
    /// Whether any price is by the hour, so that the work of servers is measured.
    pub by_hour: bool,
    named: HashMap<Box<str>, Vec<Arc<Entry>>>,
    /// The longest first.
    patterns: Vec<Pattern>,
}

/// A name with a star: what is before it, what is behind it, and the prices.
type Pattern = (Box<str>, Box<str>, Vec<Arc<Entry>>);

/// A price, and where and when it holds.
#[derive(Debug)]
struct Entry {
    price: Arc<Price>,
    pool: Option<Box<str>>,
    provider: Option<Box<str>>,
    from: SystemTime,
    /// Its place: those in the policy come before those in the file.
    rank: usize,
}

/// What is wrong with a price: the key below the list (`[2].from`), and what to do.
pub type Wrong = (String, String);

impl Book {
    /// A book of several lists, of which the first comes first. What is wrong is told for each list.
    pub fn of(lists: &[&[file::Price]]) -> Result<Self, Vec<Vec<Wrong>>> {
        let mut book = Self { version: version(lists), ..Self::default() };
        let mut wrongs = Vec::new();
        for (rank, list) in lists.iter().enumerate() {
            book.by_hour |= list.iter().any(|price| price.gpu_hour.is_some());
            wrongs.push(book.add(rank, list));
        }
        book.sort();
        if wrongs.iter().all(Vec::is_empty) { Ok(book) } else { Err(wrongs) }
    }

    /// What the model that the upstream knows as `model` costs there and then.
    pub fn find(&self, model: &str, pool: &str, provider: &str, at: SystemTime) -> Option<&Arc<Price>> {
        let holding = |entries: &'_ Vec<Arc<Entry>>| entries.iter().position(|entry| entry.holds(pool, provider, at));
        let named = self.named.get(model).and_then(|entries| Some(&entries[holding(entries)?].price));
        named.or_else(|| {
            let fits = |before: &str, behind: &str| {
                model.len() >= before.len() + behind.len() && model.starts_with(before) && model.ends_with(behind)
            };
            let fitting = self.patterns.iter().filter(|(before, behind, _)| fits(before, behind));
            fitting.map(|(_, _, entries)| entries).find_map(|entries| Some(&entries[holding(entries)?].price))
        })
    }

    /// How many names and patterns it knows.
    pub fn len(&self) -> usize {
        self.named.len() + self.patterns.len()
    }

    /// Whether it has no price.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn add(&mut self, rank: usize, list: &[file::Price]) -> Vec<Wrong> {
        let (mut wrongs, mut seen) = (Vec::new(), HashSet::new());
        for (index, written) in list.iter().enumerate() {
            let mut wrong = |key: String, message: String| wrongs.push((format!("[{index}]{key}"), message));
            check(written, &mut wrong);
            let from = match written.from.as_deref().map_or(Some(UNIX_EPOCH), day) {
                Some(from) => from,
                None => {
                    wrong(".from".to_owned(), "must be a day like 2026-01-31".to_owned());
                    continue;
                }
            };
            let entry = Arc::new(Entry {
                price: Arc::new(Price::of(written)),
                pool: written.pool.as_deref().map(Into::into),
                provider: written.provider.as_deref().map(Into::into),
                from,
                rank,
            });
            for (place, name) in written.models.iter().enumerate() {
                if !seen.insert((name, &written.pool, &written.provider, from)) {
                    wrong(format!(".models[{place}]"), format!("{name} is priced twice for the same place and day"));
                }
                self.put(name, &entry);
            }
        }
        wrongs
    }

    fn put(&mut self, name: &str, entry: &Arc<Entry>) {
        let Some((before, behind)) = name.split_once('*') else {
            return self.named.entry(name.into()).or_default().push(entry.clone());
        };
        match self.patterns.iter_mut().find(|pattern| &*pattern.0 == before && &*pattern.1 == behind) {
            Some((_, _, entries)) => entries.push(entry.clone()),
            None => self.patterns.push((before.into(), behind.into(), vec![entry.clone()])),
        }
    }

    /// The one that says more about its place goes first, then the one in the policy, then the newer one.
    fn sort(&mut self) {
        let patterns = self.patterns.iter_mut().map(|(_, _, entries)| entries);
        for entries in self.named.values_mut().chain(patterns) {
            let places = |entry: &Entry| usize::from(entry.pool.is_some()) * 2 + usize::from(entry.provider.is_some());
            entries.sort_by(|one, other| {
                let by_place = places(other).cmp(&places(one));
                by_place.then(one.rank.cmp(&other.rank)).then(other.from.cmp(&one.from))
            });
        }
        self.patterns.sort_by_key(|(before, behind, _)| std::cmp::Reverse(before.len() + behind.len()));
    }
}

impl Entry {
    fn holds(&self, pool: &str, provider: &str, at: SystemTime) -> bool {
        let fits = |wanted: &Option<Box<str>>, is: &str| wanted.as_deref().is_none_or(|wanted| wanted == is);
        fits(&self.pool, pool) && fits(&self.provider, provider) && self.from <= at
    }
}

/// What no schema says about a price.
fn check(price: &file::Price, wrong: &mut impl FnMut(String, String)) {
    let by_tokens = price.input.is_some() || price.output.is_some();
    let by_piece = [price.request, price.image, price.audio_second, price.gpu_hour];
    if !by_tokens && by_piece.iter().all(Option::is_none) {
        wrong(String::new(), "no price is in it: give `input` and `output`, or a price by the piece".to_owned());
    }
    let twice = [
        (
            "image",
            price.image.is_some() && price.image_output.is_some(),
            "images are priced by the piece and by tokens",
        ),
        (
            "audio_second",
            price.audio_second.is_some() && price.audio_input.is_some(),
            "sound is priced by the second and by tokens",
        ),
        ("gpu_hour", price.gpu_hour.is_some() && by_tokens, "work is priced by the hour and by tokens"),
    ];
    if price.gpus.is_some_and(|gpus| gpus == 0 || price.gpu_hour.is_none()) {
        wrong(".gpus".to_owned(), "must be 1 or more, beside `gpu_hour`".to_owned());
    }
    for (key, both, message) in twice {
        if both {
            wrong(format!(".{key}"), format!("{message} at once: give one of the two"));
        }
    }
    for (place, name) in price.models.iter().enumerate() {
        if name.is_empty() || name.matches('*').count() > 1 {
            wrong(format!(".models[{place}]"), format!("{name:?} must be a name with one * at most"));
        }
    }
    let Some(tiers) = &price.tiers else { return };
    if !by_tokens {
        wrong(".tiers".to_owned(), "tiers are for prices by tokens: give `input` and `output`".to_owned());
    }
    for (place, two) in tiers.list.windows(2).enumerate() {
        if two[1].above <= two[0].above {
            let message = format!("must be more than {}, the threshold before it", two[0].above);
            wrong(format!(".tiers.list[{}].above", place + 1), message);
        }
    }
}

impl Price {
    fn of(written: &file::Price) -> Self {
        let base = Rates {
            input: written.input,
            cached: written.cached_input,
            write: written.cache_write,
            write_1h: written.cache_write_1h,
            audio_input: written.audio_input,
            image_input: written.image_input,
            output: written.output,
            reasoning: written.reasoning,
            audio_output: written.audio_output,
            image_output: written.image_output,
        };
        let tiers = written.tiers.as_ref();
        Self {
            base,
            tiers: tiers.map(|tiers| tiers.list.iter().map(|tier| over(&base, tier)).collect()).unwrap_or_default(),
            slices: tiers.is_some_and(|tiers| tiers.by == TierBy::Slice),
            request: written.request,
            image: written.image,
            audio_second: written.audio_second,
            gpu_hour: written.gpu_hour,
            gpus: written.gpus.unwrap_or(1),
            service: written.service_tiers.as_ref().map(factors).unwrap_or_default(),
        }
    }
}

fn over(base: &Rates, tier: &file::Tier) -> Tier {
    let rates = Rates {
        input: tier.input.or(base.input),
        cached: tier.cached_input.or(base.cached),
        write: tier.cache_write.or(base.write),
        write_1h: tier.cache_write_1h.or(base.write_1h),
        audio_input: tier.audio_input.or(base.audio_input),
        image_input: base.image_input,
        output: tier.output.or(base.output),
        reasoning: tier.reasoning.or(base.reasoning),
        audio_output: tier.audio_output.or(base.audio_output),
        image_output: base.image_output,
    };
    Tier { above: tier.above, rates }
}

fn factors(written: &ServiceTiers) -> Vec<(ServiceTier, Usd)> {
    let all = [
        (ServiceTier::Flex, written.flex),
        (ServiceTier::Batch, written.batch),
        (ServiceTier::Priority, written.priority),
        (ServiceTier::Scale, written.scale),
    ];
    all.into_iter().filter_map(|(tier, factor)| Some((tier, factor?))).collect()
}

/// Where a price was read is no part of it.
fn version(lists: &[&[file::Price]]) -> Arc<str> {
    let plain = |price: &file::Price| file::Price { source: None, ..price.clone() };
    let lists: Vec<Vec<file::Price>> = lists.iter().map(|list| list.iter().map(plain).collect()).collect();
    let digest = format!("{:x}", Sha256::digest(serde_json::to_vec(&lists).unwrap_or_default()));
    digest[..12].into()
}

/// The beginning of a day in UTC.
fn day(text: &str) -> Option<SystemTime> {
    let bytes = text.as_bytes();
    let shaped = bytes.len() == 10 && bytes[4] == b'-' && bytes[7] == b'-';
    if shaped { time::parse(text) } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prices(yaml: &str) -> Vec<file::Price> {
        serde_saphyr::from_str(yaml).unwrap()
    }

    fn secs(text: &str) -> Option<u64> {
        Some(day(text)?.duration_since(UNIX_EPOCH).unwrap().as_secs())
    }

    #[test]
    fn a_day_begins_at_midnight_in_utc() {
        assert_eq!(secs("1970-01-01"), Some(0));
        assert_eq!(secs("2000-02-29"), Some(951_782_400));
        assert_eq!(secs("2026-11-22"), Some(1_795_305_600));
        for text in
            ["2026-02-29", "2026-13-01", "26-01-01", "2026-1-1", "2026/01/01", "+026-01-01", "soon", "1969-12-31"]
        {
            assert_eq!(secs(text), None, "{text}");
        }
    }

    #[test]
    fn the_nearest_and_newest_price_holds() {
        let own = prices("[{models: [m], input: 7, output: 7, pool: near}, {models: ['m*'], input: 8, output: 8}]");
        let file = prices(
            "[{models: [m], input: 1, output: 1}, {models: [m], from: 2026-01-01, input: 2, output: 2}, {models: [m], provider: azure, input: 3, output: 3}, {models: ['*'], input: 9, output: 9}]",
        );
        let book = Book::of(&[&own, &file]).unwrap();
        let input = |model, pool, provider, at: &str| {
            book.find(model, pool, provider, day(at).unwrap()).and_then(|price| price.base.input).unwrap().to_string()
        };
        assert_eq!(input("m", "p", "openai", "2025-12-31"), "1");
        assert_eq!(input("m", "p", "openai", "2026-01-01"), "2");
        assert_eq!(input("m", "p", "azure", "2026-01-01"), "3");
        assert_eq!(input("m", "near", "azure", "2026-01-01"), "7");
        assert_eq!(input("mm", "near", "azure", "2026-01-01"), "8");
        assert_eq!(input("x", "near", "azure", "2026-01-01"), "9");
        assert!(Book::default().find("m", "p", "openai", UNIX_EPOCH).is_none());
    }

    #[test]
    fn the_version_is_that_of_the_prices_and_of_nothing_else() {
        let version = |yaml| Book::of(&[&prices(yaml)]).unwrap().version;
        let one = version("[{models: [m], input: 2.50, output: 10}]");
        assert_eq!(one.len(), 12);
        assert_eq!(one, version("[{source: here, output: 10.0, models: [m], input: '2.5'}]"));
        assert_ne!(one, version("[{models: [m], input: 2.51, output: 10}]"));
    }

    #[test]
    fn what_is_wrong_is_told_with_its_key() {
        let list = prices(
            "[{models: [a]}, {models: [b, b], input: 1}, {models: ['*x*'], input: 1}, {models: [c], from: tomorrow, input: 1}, {models: [d], image: 1, image_output: 1}, {models: [e], request: 1, tiers: {by: whole, list: [{above: 2}, {above: 2}]}}, {models: [f], audio_second: 1, audio_input: 2, input: 3}]",
        );
        let wrongs = Book::of(&[&[], &list]).unwrap_err();
        let keys: Vec<&str> = wrongs[1].iter().map(|(key, _)| key.as_str()).collect();
        assert!(wrongs[0].is_empty());
        assert_eq!(
            keys,
            [
                "[0]",
                "[1].models[1]",
                "[2].models[0]",
                "[3].from",
                "[4].image",
                "[5].tiers",
                "[5].tiers.list[1].above",
                "[6].audio_second"
            ]
        );
    }
}
