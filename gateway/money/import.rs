//! Reads LiteLLM's `model_prices_and_context_window.json` and writes our file of prices.
//!
//! Numbers are read from the JSON's text, digit by digit. What has no counterpart here is told, never guessed.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write;

use serde_json::value::RawValue;

use super::file::{Price, ServiceTiers, Tier, TierBy, Tiers};
use super::usd::Usd;

/// What came of a file.
#[derive(Debug, Default)]
pub struct Imported {
    /// The prices.
    pub prices: Vec<Price>,
    /// What a person should know, one sentence each: the model in front.
    pub findings: Vec<String>,
}

/// One model there: each member's JSON text.
pub type Model = BTreeMap<String, Box<RawValue>>;

/// Reads `text`; of the vendors in `only` (LiteLLM's names for them), or of all if there are none.
pub fn litellm(text: &str, only: &[String]) -> Result<Imported, String> {
    let file: BTreeMap<String, Box<RawValue>> =
        serde_json::from_str(text).map_err(|error| format!("this is no object of models: {error}"))?;
    let (mut imported, mut seen) = (Imported::default(), HashMap::new());
    for (key, raw) in file.iter().filter(|(key, _)| *key != "sample_spec") {
        let Ok(members) = serde_json::from_str::<Model>(raw.get()) else {
            imported.findings.push(format!("{key}: is no object of prices"));
            continue;
        };
        let mut reader = Reader { key, members: &members, findings: Vec::new() };
        let vendor = reader.word("litellm_provider").unwrap_or_default();
        if !only.is_empty() && !only.contains(&vendor) {
            continue;
        }
        let price = reader.price(&vendor);
        imported.findings.append(&mut reader.findings);
        let Some(price) = price else { continue };
        // Where a model was read is no part of its price.
        let place = (price.models.clone(), price.provider.clone());
        let plain = serde_json::to_string(&Price { source: None, ..price.clone() }).unwrap_or_default();
        match seen.get(&place) {
            Some((_, known)) if *known == plain => {}
            Some((first, _)) => imported.findings.push(format!("{key}: left out, another price than that of {first}")),
            None => {
                seen.insert(place, (key.clone(), plain));
                imported.prices.push(price);
            }
        }
    }
    Ok(imported)
}

/// The price in the members of one model, and what a person should know of it.
pub fn of_model(key: &str, members: &Model) -> (Option<Price>, Vec<String>) {
    let mut reader = Reader { key, members, findings: Vec::new() };
    let price = reader.price("");
    (price, reader.findings)
}

/// What costs nothing, because its owner says so.
pub fn free() -> Price {
    Price { input: Some(Usd::new(0)), output: Some(Usd::new(0)), ..Price::default() }
}

/// Reads one model.
struct Reader<'a> {
    key: &'a str,
    members: &'a Model,
    findings: Vec<String>,
}

/// A place for a price.
type Slot = fn(&mut Tier) -> &mut Option<Usd>;

/// The name of a price by tokens there, and where it stands here.
const TOKENS: [(&str, Slot); 8] = [
    ("input_cost_per_token", |tier| &mut tier.input),
    ("output_cost_per_token", |tier| &mut tier.output),
    ("cache_read_input_token_cost", |tier| &mut tier.cached_input),
    ("cache_creation_input_token_cost", |tier| &mut tier.cache_write),
    ("cache_creation_input_token_cost_above_1hr", |tier| &mut tier.cache_write_1h),
    ("output_cost_per_reasoning_token", |tier| &mut tier.reasoning),
    ("input_cost_per_audio_token", |tier| &mut tier.audio_input),
    ("output_cost_per_audio_token", |tier| &mut tier.audio_output),
];

/// Those with a tier here, behind whose name stands a class of service.
const CLASSES: [&str; 3] = ["flex", "priority", "batches"];

impl Reader<'_> {
    fn finding(&mut self, what: &str) {
        self.findings.push(format!("{}: {what}", self.key));
    }

    fn word(&self, name: &str) -> Option<String> {
        serde_json::from_str(self.members.get(name)?.get()).ok()
    }

    /// A price there, in dollars for one, as the price of `10^shift`.
    fn usd(&mut self, name: &str, shift: i64) -> Option<Usd> {
        let members = self.members;
        let text = members.get(name)?.get();
        if text == "null" {
            return None;
        }
        let text = text.trim_matches('"');
        Usd::parse(text, shift)
            .or_else(|wrong| {
                let near = Usd::parse_near(text, shift);
                let told = if near.is_ok() { "was rounded there" } else { "was left out" };
                self.finding(&format!("{name} {text} {wrong}: it {told}"));
                near
            })
            .ok()
    }

    fn tokens(&mut self, behind: &str, above: u64) -> Tier {
        let mut tier = Tier { above, ..Tier::default() };
        for (name, slot) in TOKENS {
            *slot(&mut tier) = self.usd(&format!("{name}{behind}"), 6);
        }
        tier
    }

    fn price(&mut self, vendor: &str) -> Option<Price> {
        let base = self.base();
        let mode = self.word("mode").unwrap_or_default();
        let mut price = Price {
            models: vec![self.key.strip_prefix(&format!("{vendor}/")).unwrap_or(self.key).to_owned()],
            provider: ["openai", "azure", "anthropic"].contains(&vendor).then(|| vendor.to_owned()),
            source: Some(format!("LiteLLM {}", self.key)),
            input: base.input,
            output: base.output,
            cached_input: base.cached_input,
            cache_write: base.cache_write,
            cache_write_1h: base.cache_write_1h,
            reasoning: base.reasoning,
            audio_input: base.audio_input,
            audio_output: base.audio_output,
            image_input: self.usd("input_cost_per_image_token", 6),
            image_output: self.usd("output_cost_per_image_token", 6),
            request: self.usd("input_cost_per_request", 0),
            ..Price::default()
        };
        if mode == "image_generation" && price.image_output.is_none() {
            price.image = self.usd("output_cost_per_image", 0).or_else(|| self.usd("input_cost_per_image", 0));
        }
        if mode == "audio_transcription" && price.audio_input.is_none() {
            price.audio_second = self.usd("input_cost_per_second", 0).or_else(|| self.usd("output_cost_per_second", 0));
        }
        price.tiers = self.tiers();
        price.service_tiers = self.classes(&base);
        self.told_others(&price);
        self.is_a_price(&price).then_some(price)
    }

    fn base(&mut self) -> Tier {
        match self.ranges().first() {
            Some((_, first)) => *first,
            None => self.tokens("", 0),
        }
    }

    /// `tiered_pricing`: each with its `range`.
    fn ranges(&mut self) -> Vec<(u64, Tier)> {
        let list = self.members.get("tiered_pricing");
        let list = list.and_then(|list| serde_json::from_str::<Vec<Model>>(list.get()).ok()).unwrap_or_default();
        let mut ranges = Vec::new();
        for members in &list {
            let range = members.get("range").and_then(|range| serde_json::from_str::<Vec<f64>>(range.get()).ok());
            let Some(from) = range.and_then(|range| range.first().copied()) else { continue };
            let mut inner = Reader { key: self.key, members, findings: Vec::new() };
            ranges.push((from as u64, inner.tokens("", from as u64)));
        }
        ranges
    }

    /// `…_above_200k_tokens`, or the ranges behind the first.
    fn tiers(&mut self) -> Option<Tiers> {
        let mut list: Vec<Tier> = self.ranges().into_iter().skip(1).map(|(_, tier)| tier).collect();
        let mut thresholds: Vec<u64> = self.members.keys().filter_map(|name| threshold(name)).collect();
        thresholds.sort_unstable();
        thresholds.dedup();
        list.extend(thresholds.into_iter().map(|k| self.tokens(&format!("_above_{k}k_tokens"), k * 1000)));
        list.sort_by_key(|tier| tier.above);
        list.dedup_by_key(|tier| tier.above);
        (!list.is_empty()).then_some(Tiers { by: TierBy::Whole, list })
    }

    /// Classes of service whose prices are all the same multiple of the usual ones.
    fn classes(&mut self, base: &Tier) -> Option<ServiceTiers> {
        let [flex, priority, batch] = CLASSES.map(|class| self.factor(class, base));
        let any = flex.or(priority).or(batch).is_some();
        any.then_some(ServiceTiers { flex, batch, priority, scale: None })
    }

    fn factor(&mut self, class: &str, base: &Tier) -> Option<Usd> {
        let (mut base, mut tier) = (*base, self.tokens(&format!("_{class}"), 0));
        let mut factors = Vec::new();
        for (_, slot) in TOKENS {
            if let (Some(usual), Some(price)) = (*slot(&mut base), *slot(&mut tier)) {
                factors.push(ratio(price, usual));
            }
        }
        let first = *factors.first()?;
        if first.is_none() || factors.iter().any(|factor| *factor != first) {
            self.finding(&format!("{class} is no single factor on the usual prices: left out"));
            return None;
        }
        first
    }

    /// Prices there that have no counterpart here.
    fn told_others(&mut self, price: &Price) {
        let members = self.members;
        let others = members.iter().filter(|(name, value)| name.contains("cost") && value.get() != "null");
        let others: Vec<&str> = others.map(|(name, _)| name.as_str()).filter(|name| !is_known(name, price)).collect();
        if !others.is_empty() {
            self.finding(&format!("not imported: {}", others.join(", ")));
        }
    }

    fn is_a_price(&mut self, price: &Price) -> bool {
        let all = [price.input, price.output, price.request, price.image, price.audio_second];
        if all.iter().all(Option::is_none) {
            self.finding("left out, it has no price that is known here");
            return false;
        }
        if all.iter().flatten().all(|price| price.pico() == 0) {
            self.finding("left out, it is free there, which often means unknown");
            return false;
        }
        true
    }
}

/// The thousands of tokens in `…_above_200k_tokens`.
fn threshold(name: &str) -> Option<u64> {
    let (before, behind) = name.split_once("_above_")?;
    TOKENS.iter().find(|(known, _)| *known == before)?;
    behind.strip_suffix("k_tokens")?.parse().ok()
}

fn is_known(name: &str, price: &Price) -> bool {
    let class = CLASSES.iter().find_map(|class| name.strip_suffix(class)?.strip_suffix('_'));
    let tokens = |name: &str| TOKENS.iter().any(|(known, _)| *known == name);
    match name {
        "input_cost_per_image_token" | "output_cost_per_image_token" | "input_cost_per_request" => true,
        "input_cost_per_image" | "output_cost_per_image" => price.image.is_some(),
        "input_cost_per_second" | "output_cost_per_second" => price.audio_second.is_some(),
        name => tokens(name) || threshold(name).is_some() || class.is_some_and(tokens),
    }
}

/// `price` divided by `usual`, if twelve places are enough for that.
fn ratio(price: Usd, usual: Usd) -> Option<Usd> {
    let scaled = u128::from(price.pico()) * u128::from(Usd::ONE);
    let usual = u128::from(usual.pico());
    let fits = usual > 0 && scaled.is_multiple_of(usual);
    fits.then(|| u64::try_from(scaled / usual).ok().map(Usd::new)).flatten()
}

/// A file of prices as people would write it.
pub fn yaml(prices: &[Price]) -> String {
    let mut out = String::from("version: 1\nlist:\n");
    for price in prices {
        for (index, (name, value)) in members(price).iter().enumerate() {
            let lead = if index == 0 { "  - " } else { "    " };
            let _ = writeln!(out, "{lead}{name}: {}", flow(value));
        }
    }
    out
}

/// A price on one line.
pub fn flow_of(price: &Price) -> String {
    let members = members(price);
    let members: Vec<String> = members.iter().map(|(name, value)| format!("{name}: {}", flow(value))).collect();
    format!("{{{}}}", members.join(", "))
}

/// What is given of a price, in the order in which people look.
fn members(price: &Price) -> Vec<(String, serde_json::Value)> {
    // JSON is YAML, and serde has left out what is not given.
    let Ok(serde_json::Value::Object(members)) = serde_json::to_value(price) else { return Vec::new() };
    let order = |name: &str| FIRST.iter().position(|first| *first == name).unwrap_or(FIRST.len());
    let mut members: Vec<_> = members.into_iter().collect();
    members.sort_by_key(|(name, _)| order(name));
    members
}

const FIRST: [&str; 9] =
    ["models", "provider", "pool", "from", "source", "input", "output", "cached_input", "cache_write"];

/// A value in one line; a price without its quotes where no digit is lost so.
fn flow(value: &serde_json::Value) -> String {
    use serde_json::Value;
    match value {
        Value::Object(members) => {
            let members: Vec<String> = members.iter().map(|(name, value)| format!("{name}: {}", flow(value))).collect();
            format!("{{{}}}", members.join(", "))
        }
        Value::Array(elements) => format!("[{}]", elements.iter().map(flow).collect::<Vec<_>>().join(", ")),
        Value::String(text) if Usd::parse(text, 0).is_ok_and(|usd| usd.to_string() == *text) && text.len() <= 15 => {
            text.clone()
        }
        Value::String(text) if text == "whole" || text == "slice" => text.clone(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::prices;

    const FILE: &str = r#"{
        "sample_spec": {"input_cost_per_token": 0},
        "gpt-4o": {"litellm_provider": "openai", "mode": "chat", "input_cost_per_token": 2.5e-06,
            "output_cost_per_token": 1e-05, "cache_read_input_token_cost": 1.25e-06, "max_tokens": 16384,
            "input_cost_per_token_batches": 1.25e-06, "output_cost_per_token_batches": 5e-06,
            "input_cost_per_token_priority": 4.25e-06, "output_cost_per_token_priority": 1.7e-05,
            "search_context_cost_per_query": {"high": 0.05}},
        "azure/gpt-4o": {"litellm_provider": "azure", "mode": "chat", "input_cost_per_token": 2.75e-06, "output_cost_per_token": 1.1e-05},
        "claude": {"litellm_provider": "anthropic", "mode": "chat", "input_cost_per_token": 3e-06, "output_cost_per_token": 1.5e-05,
            "cache_creation_input_token_cost": 3.75e-06, "cache_creation_input_token_cost_above_1hr": 6e-06,
            "input_cost_per_token_above_200k_tokens": 6e-06, "output_cost_per_token_above_200k_tokens": 2.25e-05},
        "dashscope/qwen": {"litellm_provider": "dashscope", "tiered_pricing": [
            {"range": [0, 32000.0], "input_cost_per_token": 1.2e-06, "output_cost_per_token": 6e-06},
            {"range": [32000.0, 128000.0], "input_cost_per_token": 2.4e-06, "output_cost_per_token": 1.2e-05}]},
        "whisper": {"litellm_provider": "openai", "mode": "audio_transcription", "input_cost_per_second": 0.0001, "output_cost_per_second": 0.0001},
        "dall-e": {"litellm_provider": "openai", "mode": "image_generation", "output_cost_per_image": 0.04},
        "odd": {"litellm_provider": "x", "input_cost_per_token": 1.4999999999999998e-07, "output_cost_per_token": 3e-07,
            "input_cost_per_token_flex": 1e-07, "output_cost_per_token_flex": 3e-07},
        "free": {"litellm_provider": "x", "input_cost_per_token": 0.0, "output_cost_per_token": 0.0},
        "gemini/g": {"litellm_provider": "gemini", "input_cost_per_token": 1e-06},
        "g": {"litellm_provider": "vertex", "input_cost_per_token": 2e-06},
        "none": {"litellm_provider": "x", "max_tokens": 3},
        "list": [1]
    }"#;

    #[test]
    fn what_litellm_knows_becomes_a_file_of_prices() {
        let imported = litellm(FILE, &[]).unwrap();
        let text = yaml(&imported.prices);
        assert!(prices::book(&text).is_ok(), "{text}");
        for entry in [
            "  - models: [\"gpt-4o\"]\n    provider: \"openai\"\n    source: \"LiteLLM gpt-4o\"\n    input: 2.5\n    output: 10\n    cached_input: 1.25\n    service_tiers: {batch: 0.5, priority: 1.7}\n",
            "  - models: [\"gpt-4o\"]\n    provider: \"azure\"\n    source: \"LiteLLM azure/gpt-4o\"\n    input: 2.75\n    output: 11\n",
            "    cache_write: 3.75\n    cache_write_1h: 6\n    tiers: {by: whole, list: [{above: 200000, input: 6, output: 22.5}]}\n",
            "  - models: [\"qwen\"]\n    source: \"LiteLLM dashscope/qwen\"\n    input: 1.2\n    output: 6\n    tiers: {by: whole, list: [{above: 32000, input: 2.4, output: 12}]}\n",
            "    audio_second: 0.0001\n",
            "    image: 0.04\n",
            "    input: 0.15\n",
        ] {
            assert!(text.contains(entry), "{entry}\n{text}");
        }
        for finding in [
            "gpt-4o: not imported: search_context_cost_per_query",
            "free: left out, it is free there",
            "none: left out, it has no price",
            "list: is no object of prices",
            "odd: input_cost_per_token 1.4999999999999998e-07 has more than twelve decimal places: it was rounded there",
            "odd: flex is no single factor",
            "gemini/g: left out, another price than that of g",
        ] {
            assert!(
                imported.findings.iter().any(|known| known.starts_with(finding)),
                "{finding}: {:#?}",
                imported.findings
            );
        }
        assert_eq!(litellm(FILE, &["azure".to_owned()]).unwrap().prices.len(), 1);
        assert!(litellm("[]", &[]).is_err());
    }
}
