//! The object that says how many tokens were used, in every dialect's words.

use std::fmt;

use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;

use super::{REPORT_MAX, ServiceTier, Usage};

/// What `object` says, if it says anything. `cut_short`: of one that is too long, its beginning counts, because
/// TGI's and SGLang's hold the answer's tokens as well, behind their number.
pub(super) fn read(object: &[u8], cut_short: bool) -> Option<Usage> {
    let too_long = object.len() > REPORT_MAX;
    if too_long && !cut_short {
        return None;
    }
    let mut report = Report::default();
    let mut json = serde_json::Deserializer::from_slice(&object[..object.len().min(REPORT_MAX)]);
    let read = Members(&mut report).deserialize(&mut json);
    if read.is_err() && !too_long {
        return None;
    }
    report.usage()
}

/// The numbers as they are found. Upstreams that speak two dialects at once fill one of them with zeros, so the
/// greater of two numbers for the same thing counts.
#[derive(Default)]
struct Report {
    usage: Usage,
    total: Option<u64>,
    /// Sound and images, of whichever side the details are.
    audio: Option<u64>,
    image: Option<u64>,
    written_5m: Option<u64>,
    /// Whether these are the members of details.
    inner: bool,
}

/// The members that matter.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(field_identifier)]
enum Name {
    #[serde(rename = "prompt_tokens", alias = "input_tokens", alias = "input_length")]
    Input,
    #[serde(rename = "completion_tokens", alias = "output_tokens", alias = "generated_tokens")]
    Output,
    #[serde(rename = "total_tokens")]
    Total,
    #[serde(rename = "cached_tokens", alias = "cache_read_input_tokens", alias = "prompt_cache_hit_tokens")]
    Cached,
    #[serde(rename = "created_cache_tokens", alias = "cache_write_tokens", alias = "cache_creation_input_tokens")]
    CacheWrite,
    #[serde(rename = "reasoning_tokens")]
    Reasoning,
    #[serde(rename = "prompt_tokens_details", alias = "input_tokens_details", alias = "input_token_details")]
    InputDetails,
    #[serde(rename = "completion_tokens_details", alias = "output_tokens_details", alias = "output_token_details")]
    OutputDetails,
    #[serde(rename = "cache_creation")]
    CacheCreation,
    #[serde(rename = "ephemeral_5m_input_tokens")]
    CacheWrite5m,
    #[serde(rename = "ephemeral_1h_input_tokens")]
    CacheWrite1h,
    #[serde(rename = "audio_tokens")]
    Audio,
    #[serde(rename = "image_tokens")]
    Image,
    #[serde(rename = "seconds")]
    Seconds,
    #[serde(rename = "service_tier")]
    ServiceTier,
    #[serde(rename = "prefill")]
    Prefill,
    #[serde(other)]
    Other,
}

impl Report {
    fn usage(self) -> Option<Usage> {
        let mut usage = self.usage;
        if usage.input_tokens.is_none() {
            // Embeddings and ranks often have a total alone.
            usage.input_tokens = self.total.map(|total| total.saturating_sub(usage.output_tokens.unwrap_or(0)));
        }
        if let (Some(output), Some(reasoning)) = (usage.output_tokens, usage.reasoning_tokens)
            && (reasoning > output || self.has_reasoning_beside(output, reasoning))
        {
            usage.output_tokens = Some(output.saturating_add(reasoning));
        }
        (usage != Usage::default()).then_some(usage)
    }

    /// Whether the total says that the answer's tokens are told without the reasoning.
    fn has_reasoning_beside(&self, output: u64, reasoning: u64) -> bool {
        let input = self.usage.input_tokens.unwrap_or(0);
        let sum = input.checked_add(output).and_then(|sum| sum.checked_add(reasoning));
        reasoning > 0 && self.total.is_some() && self.total == sum
    }

    fn put(&mut self, name: Name, value: &str) {
        match name {
            Name::InputDetails | Name::OutputDetails | Name::CacheCreation if self.inner => {}
            Name::InputDetails | Name::OutputDetails | Name::CacheCreation => self.put_details(name, value),
            // The prompt's tokens one by one; empty unless they were asked for.
            Name::Prefill => self.put_number(Name::Input, length(value).filter(|length| *length > 0)),
            Name::Seconds => self.usage.audio_ms = self.usage.audio_ms.max(milliseconds(value)),
            Name::ServiceTier => {
                let word = value.strip_prefix('"').and_then(|value| value.strip_suffix('"'));
                self.usage.service_tier = word.map(|word| ServiceTier::named(word.as_bytes()));
            }
            // What is no number of tokens does not parse.
            name => self.put_number(name, value.parse().ok()),
        }
    }

    fn put_number(&mut self, name: Name, number: Option<u64>) {
        let slot = match name {
            Name::Input => &mut self.usage.input_tokens,
            Name::Output => &mut self.usage.output_tokens,
            Name::Total => &mut self.total,
            Name::Cached => &mut self.usage.cached_tokens,
            Name::CacheWrite => &mut self.usage.cache_write_tokens,
            Name::CacheWrite5m => &mut self.written_5m,
            Name::CacheWrite1h => &mut self.usage.cache_write_1h_tokens,
            Name::Reasoning => &mut self.usage.reasoning_tokens,
            Name::Audio => &mut self.audio,
            Name::Image => &mut self.image,
            _ => return,
        };
        *slot = number.max(*slot);
    }

    /// Details say what the tokens are made of; how many there are is said outside.
    fn put_details(&mut self, name: Name, value: &str) {
        if !value.starts_with('{') {
            return; // `null`, most of the time
        }
        let mut inner = Self { inner: true, ..Self::default() };
        if Members(&mut inner).deserialize(&mut serde_json::Deserializer::from_str(value)).is_err() {
            return;
        }
        self.put_number(Name::Cached, inner.usage.cached_tokens);
        self.put_number(Name::CacheWrite, inner.usage.cache_write_tokens);
        self.put_number(Name::Reasoning, inner.usage.reasoning_tokens);
        let usage = &mut self.usage;
        match name {
            Name::InputDetails => {
                usage.audio_input_tokens = inner.audio.max(usage.audio_input_tokens);
                usage.image_input_tokens = inner.image.max(usage.image_input_tokens);
            }
            Name::OutputDetails => {
                usage.audio_output_tokens = inner.audio.max(usage.audio_output_tokens);
                usage.image_output_tokens = inner.image.max(usage.image_output_tokens);
            }
            _ => {
                let hour = inner.usage.cache_write_1h_tokens;
                let sum = [inner.written_5m, hour].into_iter().flatten().reduce(u64::saturating_add);
                usage.cache_write_1h_tokens = hour.filter(|hour| *hour > 0).max(usage.cache_write_1h_tokens);
                usage.cache_write_tokens = sum.max(usage.cache_write_tokens);
            }
        }
    }
}

/// A number of seconds, with decimals or without, in milliseconds.
fn milliseconds(seconds: &str) -> Option<u64> {
    let (whole, part) = seconds.split_once('.').unwrap_or((seconds, ""));
    let part = part.bytes().chain(*b"000").take(3);
    let mut milliseconds = part.map(|digit| digit.is_ascii_digit().then(|| u64::from(digit - b'0')));
    let milliseconds = milliseconds.try_fold(0, |sum, digit| Some(sum * 10 + digit?))?;
    whole.parse::<u64>().ok()?.checked_mul(1000)?.checked_add(milliseconds)
}

/// How many elements a list has.
fn length(list: &str) -> Option<u64> {
    serde_json::from_str::<Vec<IgnoredAny>>(list).ok().map(|list| list.len() as u64)
}

/// Reads an object's members into a report. What was read before an error stays.
struct Members<'a>(&'a mut Report);

impl<'de> DeserializeSeed<'de> for Members<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Members<'_> {
    type Value = ();

    fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("an object with numbers of tokens")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<(), A::Error> {
        while let Some(name) = members.next_key()? {
            if name == Name::Other {
                members.next_value::<IgnoredAny>()?;
            } else {
                self.0.put(name, members.next_value::<&RawValue>()?.get());
            }
        }
        Ok(())
    }
}
