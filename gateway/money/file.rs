//! Prices exactly as they are written, in the policy or in a file of their own.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::usd::Usd;

/// What models cost. Where this stands, every record says what its request cost, or that it is unpriced.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Prices {
    /// A file with a `list` of prices, beside the policy unless the path is absolute. It is read again with the policy.
    pub file: Option<PathBuf>,
    /// Prices that stand here. They come before those in the file for the same name.
    pub list: Vec<Price>,
}

/// A file of prices.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PriceFile {
    /// The version of this format. It is 1.
    #[schemars(range(min = 1, max = 1))]
    pub version: u32,
    /// The prices.
    pub list: Vec<Price>,
}

/// What some models cost, in US dollars. A price that is not given is not zero: where tokens without a price were used,
/// the request is unpriced.
#[derive(Clone, Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Price {
    /// The names by which the upstream knows the models. One `*` in a name stands for any text; a name beats every
    /// pattern, the longest pattern wins.
    #[schemars(length(min = 1))]
    pub models: Vec<String>,
    /// Only at upstreams of this kind: `openai`, `azure`, `vllm` and so on. Absent: at all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub provider: Option<String>,
    /// Only at the upstreams of this pool. Absent: at all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool: Option<String>,
    /// The first day, in UTC, on which it holds: `2026-01-31`. Absent: it always held.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
    /// Where it was read, and when. Only for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// A million input tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub input: Option<Usd>,
    /// A million output tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output: Option<Usd>,
    /// A million input tokens that the prompt cache had. Absent: as `input`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cached_input: Option<Usd>,
    /// A million input tokens that were written to the prompt cache. Absent: as `input`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache_write: Option<Usd>,
    /// The same, for an hour instead of five minutes. Absent: as `cache_write`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache_write_1h: Option<Usd>,
    /// A million output tokens of reasoning. Absent: as `output`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reasoning: Option<Usd>,
    /// A million input tokens of sound. Absent: as `input`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub audio_input: Option<Usd>,
    /// A million output tokens of sound. Absent: as `output`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub audio_output: Option<Usd>,
    /// A million input tokens of images. Absent: as `input`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_input: Option<Usd>,
    /// A million output tokens of images. Absent: as `output`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_output: Option<Usd>,
    /// One request, whatever it uses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request: Option<Usd>,
    /// One image that is made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<Usd>,
    /// One second of sound that is heard.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub audio_second: Option<Usd>,
    /// One hour of one GPU of an own server. A request pays for the time from when it went to the server until its answer
    /// was over; of each moment in which others ran on the same server through this gateway, its equal part. Hours in
    /// which nothing ran are nobody's. What it will cost is not known before: budgets count it when it is over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu_hour: Option<Usd>,
    /// How many GPUs one server has. Absent: 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 4096))]
    pub gpus: Option<u32>,
    /// Other prices for longer prompts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tiers: Option<Tiers>,
    /// Factors by the class of service that the answer names (`service_tier`): `{flex: 0.5, priority: 2}`. Absent: 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service_tiers: Option<ServiceTiers>,
}

/// Prices that depend on how long the prompt is, the cached part included.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Tiers {
    /// What a tier holds for: `whole`, the whole request if its prompt is longer than the threshold, or `slice`, only
    /// the part of the prompt beyond it.
    pub by: TierBy,
    /// The tiers, the lower thresholds first.
    #[schemars(length(min = 1))]
    pub list: Vec<Tier>,
}

/// What a tier holds for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum TierBy {
    /// The whole request.
    Whole,
    /// The part of the prompt beyond the threshold; the answer costs what the prompt's last token does.
    Slice,
}

/// One tier. A price that is not given is the one without tiers.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Tier {
    /// The longest prompt, in tokens, for which it does not hold yet.
    #[schemars(range(min = 1))]
    pub above: u64,
    /// As above.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub input: Option<Usd>,
    /// As above.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output: Option<Usd>,
    /// As above.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cached_input: Option<Usd>,
    /// As above.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache_write: Option<Usd>,
    /// As above.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache_write_1h: Option<Usd>,
    /// As above.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reasoning: Option<Usd>,
    /// As above.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub audio_input: Option<Usd>,
    /// As above.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub audio_output: Option<Usd>,
}

/// Factors on the whole price of a request. `default`, `standard` and `auto` are 1.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ServiceTiers {
    /// Slower and cheaper.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub flex: Option<Usd>,
    /// Much slower and cheaper.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub batch: Option<Usd>,
    /// Faster and dearer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub priority: Option<Usd>,
    /// Bought ahead.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scale: Option<Usd>,
}
