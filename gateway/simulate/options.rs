//! What one simulated model server is told when it starts.

use std::net::{Ipv4Addr, SocketAddr};

use clap::Args;
use clap::builder::{PossibleValue, TypedValueParser};

use super::fault::Fault;

/// The options of `infergate simulate`.
#[derive(Args, Clone, Debug)]
// Else clap would take the line above for what the command that has these options is about.
#[command(about = None, long_about = None)]
pub struct Options {
    /// The address to listen on; port 0 takes a free one.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:8000", value_parser = address)]
    pub listen: SocketAddr,

    /// A model to serve; may be given several times, the first one names the metrics.
    #[arg(long = "model", value_name = "NAME", default_value = "sim-small", value_parser = name)]
    pub models: Vec<String>,

    /// How long the first token takes, in milliseconds.
    #[arg(long, value_name = "MS", default_value_t = 0, value_parser = milliseconds)]
    pub ttft_ms: u64,

    /// How many prompt tokens are read in a second, one prompt after the other, those in the prefix cache for nothing; 0
    /// means all at once.
    #[arg(long, value_name = "N", default_value_t = 0.0, value_parser = rate)]
    pub prefill_per_second: f64,

    /// How many tokens a second each answer gets; 0 means as fast as possible.
    #[arg(long, value_name = "N", default_value_t = 0.0, value_parser = rate)]
    pub tokens_per_second: f64,

    /// Which model server to look like: vllm, tgi, sglang or openai.
    #[arg(long, value_name = "ENGINE", default_value = "vllm", value_parser = EngineParser)]
    pub engine: Engine,

    /// How many requests run at once; the others wait in order of arrival.
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = slots)]
    pub slots: usize,

    /// How many tokens fit into the KV cache.
    #[arg(long, value_name = "N", default_value_t = 1_048_576, value_parser = at_least_one)]
    pub kv_tokens: u64,

    /// The longest context of a model, prompt and answer together, in tokens.
    #[arg(long, value_name = "N", default_value_t = 4096 * 8, value_parser = at_least_one)]
    pub max_model_len: u64,

    /// What goes wrong: `KIND[=VALUE][,times=N][,path=/v1/...][,after=EVENTS]`; may be given several times.
    ///
    /// Kinds: status=503 (with ,retry_after=SECONDS if wished), slow-first=MS, slow-first-token=MS, stall, cut, reset,
    /// drip=MS, half-utf8, gzip, crlf, no-usage, hang, close-after, context, content-filter, garbage, big=BYTES,
    /// error-event, delay-between=MS, no-done, redirect=URL. A request can ask for its own with the header
    /// `x-simulate-fault`, several separated by semicolons.
    #[arg(long = "fault", value_name = "FAULT")]
    pub faults: Vec<Fault>,

    /// Close connections that were idle this long, unannounced, as uvicorn does after 5000.
    #[arg(long, value_name = "MS", value_parser = milliseconds)]
    pub keep_alive_ms: Option<u64>,

    /// Answer 401 to requests without this key (Authorization: Bearer, or x-api-key on /v1/messages).
    #[arg(long = "api-key", value_name = "KEY", value_parser = name)]
    pub key: Option<String>,

    /// Tells several simulated servers apart: ends their `system_fingerprint`.
    #[arg(long, value_name = "NAME", default_value = "simulated", value_parser = name)]
    pub name: String,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            models: vec!["sim-small".to_owned()],
            ttft_ms: 0,
            prefill_per_second: 0.0,
            tokens_per_second: 0.0,
            engine: Engine::Vllm,
            slots: 256,
            kv_tokens: 1_048_576,
            max_model_len: 4096 * 8,
            faults: Vec::new(),
            keep_alive_ms: None,
            key: None,
            name: "simulated".to_owned(),
        }
    }
}

impl Options {
    /// The name that metrics and model-less answers carry.
    pub(super) fn first_model(&self) -> &str {
        self.models.first().map_or("sim-small", String::as_str)
    }

    /// Whether a model of this name is served; with no models listed, all are.
    pub(super) fn serves(&self, model: &str) -> bool {
        self.models.is_empty() || self.models.iter().any(|known| known == model)
    }
}

/// The model server that is being imitated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// vLLM 0.32.
    Vllm,
    /// Hugging Face's Text Generation Inference.
    Tgi,
    /// SGLang.
    Sglang,
    /// OpenAI's own API.
    Openai,
}

impl Engine {
    const ALL: [(&'static str, Self, &'static str); 4] = [
        ("vllm", Self::Vllm, "vLLM 0.32"),
        ("tgi", Self::Tgi, "Text Generation Inference: /generate, /info"),
        ("sglang", Self::Sglang, "SGLang: /get_server_info"),
        ("openai", Self::Openai, "OpenAI's own API"),
    ];
}

impl std::str::FromStr for Engine {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = Self::ALL.iter().find(|(name, ..)| *name == text);
        known.map(|(_, engine, _)| *engine).ok_or_else(|| "must be one of vllm, tgi, sglang, openai".to_owned())
    }
}

/// Lets `--help` list the engines and a bad value name them.
#[derive(Clone)]
struct EngineParser;

impl TypedValueParser for EngineParser {
    type Value = Engine;

    fn parse_ref(
        &self,
        command: &clap::Command,
        arg: Option<&clap::Arg>,
        value: &std::ffi::OsStr,
    ) -> Result<Engine, clap::Error> {
        let parse = |text: &str| text.parse::<Engine>();
        parse.parse_ref(command, arg, value)
    }

    fn possible_values(&self) -> Option<Box<dyn Iterator<Item = PossibleValue> + '_>> {
        let values = Engine::ALL.iter();
        Some(Box::new(values.map(|(name, _, help)| PossibleValue::new(*name).help(*help))))
    }
}

fn address(text: &str) -> Result<SocketAddr, String> {
    text.parse()
        .map_err(|_| "must be an IP address and a port, such as 127.0.0.1:8000, 0.0.0.0:8000 or [::1]:8000".to_owned())
}

fn name(text: &str) -> Result<String, String> {
    if text.is_empty() || text.chars().any(char::is_control) {
        return Err("must be a text of at least one character, without control characters".to_owned());
    }
    Ok(text.to_owned())
}

const DAY_MS: u64 = 86_400_000;

fn milliseconds(text: &str) -> Result<u64, String> {
    let parsed = text.parse().ok().filter(|ms| *ms <= DAY_MS);
    parsed.ok_or_else(|| format!("must be a whole number of milliseconds from 0 to {DAY_MS} (one day)"))
}

fn rate(text: &str) -> Result<f64, String> {
    let parsed = text.parse().ok().filter(|rate: &f64| (0.0..=1e6).contains(rate));
    parsed.ok_or_else(|| "must be a number from 0 (as fast as possible) to 1000000".to_owned())
}

fn slots(text: &str) -> Result<usize, String> {
    let parsed = text.parse().ok().filter(|slots| (1..=1_000_000).contains(slots));
    parsed.ok_or_else(|| "must be a whole number from 1 to 1000000".to_owned())
}

const MAX_TOKENS: u64 = 1 << 40;

fn at_least_one(text: &str) -> Result<u64, String> {
    let parsed = text.parse().ok().filter(|tokens| (1..=MAX_TOKENS).contains(tokens));
    parsed.ok_or_else(|| format!("must be a whole number of tokens from 1 to {MAX_TOKENS}"))
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};

    use super::*;

    #[derive(Parser)]
    struct Simulate {
        #[command(flatten)]
        options: Options,
    }

    fn parse(arguments: &[&str]) -> Result<Options, String> {
        let all = std::iter::once("simulate").chain(arguments.iter().copied());
        Simulate::try_parse_from(all).map(|parsed| parsed.options).map_err(|error| error.to_string())
    }

    #[test]
    fn every_flag_has_a_help_line_and_a_default_that_parses() {
        Simulate::command().debug_assert();
        let options = parse(&[]).unwrap();
        assert_eq!((options.slots, options.models), (256, vec!["sim-small".to_owned()]));
    }

    #[test]
    fn a_bad_value_is_answered_with_what_is_allowed() {
        for (flag, value, expected) in [
            ("--listen", "localhost", "an IP address and a port"),
            ("--model", "", "at least one character"),
            ("--ttft-ms", "-1", "unexpected argument"),
            ("--ttft-ms", "soon", "milliseconds from 0 to"),
            ("--prefill-per-second", "fast", "as fast as possible"),
            ("--tokens-per-second", "fast", "as fast as possible"),
            ("--tokens-per-second", "NaN", "as fast as possible"),
            ("--engine", "llama", "vllm, tgi, sglang, openai"),
            ("--slots", "0", "from 1 to 1000000"),
            ("--kv-tokens", "0", "tokens from 1 to"),
            ("--max-model-len", "many", "tokens from 1 to"),
            ("--fault", "explode", "status, slow-first"),
            ("--keep-alive-ms", "x", "milliseconds from 0 to"),
            ("--api-key", "", "at least one character"),
            ("--name", "\n", "control characters"),
        ] {
            let said = parse(&[flag, value]).unwrap_err();
            assert!(said.contains(expected), "{flag} {value}: {said}");
        }
    }
}
