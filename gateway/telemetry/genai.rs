//! OpenTelemetry's GenAI metrics under the names that Prometheus has for them, so that dashboards which know the
//! conventions know us.
//!
//! Names, units, labels and buckets are those of the GenAI semantic conventions (`gen-ai-metrics.md`). The model is
//! the policy's entry, never the client's text.

use std::collections::HashSet;
use std::sync::{Arc, OnceLock};

use infergate_plugins::operation::Operation;
use infergate_plugins::provider::KINDS;
use parking_lot::Mutex;
use prometheus_client::encoding::{EncodeLabel, EncodeLabelSet, LabelSetEncoder};
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

use super::series::Series;
use super::tables::Table;
use super::{names, seconds};
use crate::audit::record::{Outcome, Record};
use crate::policy::Route;
use crate::refusal::CODES;

/// `gen_ai.server.request.duration`, in seconds.
const DURATION: [f64; 14] = [0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92];
/// `gen_ai.server.time_to_first_token`, in seconds.
const FIRST: [f64; 16] = [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0];
/// `gen_ai.server.time_per_output_token`, in seconds.
const PER_TOKEN: [f64; 13] = [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5];
/// `gen_ai.client.token.usage`, in tokens: powers of four.
const TOKENS: [f64; 14] = [
    1.0,
    4.0,
    16.0,
    64.0,
    256.0,
    1024.0,
    4096.0,
    16_384.0,
    65_536.0,
    262_144.0,
    1_048_576.0,
    4_194_304.0,
    16_777_216.0,
    67_108_864.0,
];

/// The most models that have a label of their own; the ones after are `other`.
const MODELS_MAX: usize = 1_000;
/// The most label sets; a set beyond that has `other` for its model.
const SETS_MAX: usize = 10_000;
pub(super) const OTHER: &str = "other";
/// The most label sets of that one: operations, providers and errors are few.
const OTHERS: usize = 1_000;

/// Every operation has its number as an index.
const OPERATIONS: usize = Operation::Passthrough as usize + 1;

type Histograms<L> = Series<L, Histogram>;

/// The four metrics.
#[derive(Debug)]
pub(super) struct GenAi {
    durations: Histograms<Labels>,
    first: Histograms<Labels>,
    per_token: Histograms<Labels>,
    tokens: Histograms<TokenLabels>,
    models: Mutex<HashSet<Arc<str>>>,
}

/// The handles of one route, by provider and operation. They live with the policy, so that a request looks nothing up.
#[derive(Debug, Default)]
pub struct Meters([OnceLock<Box<ByOperation>>; KINDS.len()]);

type ByOperation = [OnceLock<Handles>; OPERATIONS];

#[derive(Clone, Debug)]
struct Handles {
    duration: Histogram,
    first: Histogram,
    per_token: Histogram,
    input: Histogram,
    output: Histogram,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq)]
struct Labels {
    operation: &'static str,
    provider: &'static str,
    model: Arc<str>,
    error: Option<&'static str>,
}

impl EncodeLabelSet for Labels {
    /// By hand, because a request that went well has no `error_type` at all.
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> std::fmt::Result {
        ("gen_ai_operation_name", self.operation).encode(encoder.encode_label())?;
        ("gen_ai_provider_name", self.provider).encode(encoder.encode_label())?;
        ("gen_ai_request_model", &*self.model).encode(encoder.encode_label())?;
        match self.error {
            Some(error) => ("error_type", error).encode(encoder.encode_label()),
            None => Ok(()),
        }
    }
}

#[derive(Clone, Debug, Hash, PartialEq, Eq)]
struct TokenLabels(Labels, &'static str);

impl EncodeLabelSet for TokenLabels {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> std::fmt::Result {
        self.0.encode(encoder)?;
        ("gen_ai_token_type", self.1).encode(encoder.encode_label())
    }
}

impl GenAi {
    /// All four without a series, named in `registry`, which must not have a prefix.
    pub(super) fn new(registry: &mut Registry) -> Self {
        let metrics = Self {
            durations: Series::new(|| Histogram::new(DURATION)),
            first: Series::new(|| Histogram::new(FIRST)),
            per_token: Series::new(|| Histogram::new(PER_TOKEN)),
            tokens: Series::new(|| Histogram::new(TOKENS)),
            models: Mutex::default(),
        };
        let mut seconds = |name, help, family: &Histograms<Labels>| {
            registry.register_with_unit(name, help, Unit::Seconds, family.family());
        };
        seconds("gen_ai_server_request_duration", "From head to end of answer", &metrics.durations);
        seconds("gen_ai_server_time_to_first_token", "From head to first piece of a stream", &metrics.first);
        seconds("gen_ai_server_time_per_output_token", "Of a stream, after the first token", &metrics.per_token);
        registry.register("gen_ai_client_token_usage", "Tokens that a request used", metrics.tokens.family());
        metrics
    }

    /// Makes a series of each.
    pub(super) fn show(&self) {
        let labels = Labels { operation: "", provider: "", model: "".into(), error: None };
        self.durations.of(&Labels { error: Some(""), ..labels.clone() });
        for family in [&self.durations, &self.first, &self.per_token] {
            family.of(&labels);
        }
        self.tokens.of(&TokenLabels(labels, ""));
    }

    /// A request that went to `route` is over.
    pub(super) fn finished(&self, record: &Record<'_>, operation: Operation, route: &Route) {
        // What passes through unread is not known to be a model's work.
        let Some(provider) = provider(record, route).filter(|_| operation != Operation::Passthrough) else { return };
        let handles = self.handles(operation, provider, route);
        match error_type(record) {
            Some(error) => self.failed(operation, provider, route, error).observe(seconds(record.times.ended)),
            None => handles.succeeded(record),
        }
        handles.used(record, operation);
    }

    fn handles<'a>(&self, operation: Operation, provider: usize, route: &'a Route) -> &'a Handles {
        let by_operation = route.meters.0[provider].get_or_init(Box::default);
        by_operation[operation as usize].get_or_init(|| {
            let labels = self.labels(operation, provider, route, None);
            let tokens = |kind| self.tokens.of(&TokenLabels(labels.clone(), kind));
            Handles {
                duration: self.durations.of(&labels),
                first: self.first.of(&labels),
                per_token: self.per_token.of(&labels),
                input: tokens("input"),
                output: tokens("output"),
            }
        })
    }

    /// Failures are looked up: there are too many kinds of them to keep each.
    fn failed(&self, operation: Operation, provider: usize, route: &Route, error: &'static str) -> Histogram {
        self.durations.of(&self.labels(operation, provider, route, Some(error)))
    }

    fn labels(&self, operation: Operation, provider: usize, route: &Route, error: Option<&'static str>) -> Labels {
        let model = self.model(&route.model.name);
        let labels = Labels { operation: operation.name(), provider: names::provider(KINDS[provider].0), model, error };
        let fits = self.durations.has(&labels) || self.durations.len() < SETS_MAX;
        if fits { labels } else { Labels { model: OTHER.into(), ..labels } }
    }

    /// Models of other names leave the page, and make room for others.
    pub(super) fn keep(&self, models: &HashSet<&str>) {
        let mut known = self.models.lock();
        known.retain(|model| models.contains(&**model));
        for series in [&self.durations, &self.first, &self.per_token] {
            series.keep(|labels| models.contains(&*labels.model));
        }
        self.tokens.keep(|TokenLabels(labels, _)| models.contains(&*labels.model));
    }

    /// The tables behind the labels.
    pub(super) fn tables(&self) -> [Table; 2] {
        [
            Table { name: "label_models", entries: self.models.lock().len(), room: Some(MODELS_MAX) },
            Table { name: "label_sets", entries: self.durations.len(), room: Some(SETS_MAX + OTHERS) },
        ]
    }

    pub(super) fn model(&self, name: &str) -> Arc<str> {
        let mut models = self.models.lock();
        if let Some(known) = models.get(name) {
            return known.clone();
        }
        if models.len() >= MODELS_MAX {
            return OTHER.into();
        }
        let fresh: Arc<str> = name.into();
        models.insert(fresh.clone());
        fresh
    }
}

impl Handles {
    fn succeeded(&self, record: &Record<'_>) {
        let times = &record.times;
        self.duration.observe(seconds(times.ended));
        let Some(first) = times.first.filter(|_| record.stream) else { return };
        self.first.observe(seconds(first));
        // An answer of one token has none after the first.
        if let Some(rest) = record.usage.output_tokens.and_then(|tokens| tokens.checked_sub(1)).filter(|rest| *rest > 0)
        {
            self.per_token.observe(seconds(times.ended.saturating_sub(first)) / rest as f64);
        }
    }

    /// Tokens cost something whether or not the answer came to its end.
    fn used(&self, record: &Record<'_>, operation: Operation) {
        let usage = &record.usage;
        // The conventions count the cache's share as input; Anthropic's dialect tells it beside the input.
        let beside = match operation {
            Operation::Messages => {
                [usage.cached_tokens, usage.cache_write_tokens].into_iter().flatten().fold(0, u64::saturating_add)
            }
            _ => 0,
        };
        if let Some(tokens) = usage.input_tokens {
            self.input.observe(tokens.saturating_add(beside) as f64);
        }
        if let Some(tokens) = usage.output_tokens {
            self.output.observe(tokens as f64);
        }
    }
}

/// Who was asked last, or would have been first: its place in the list of kinds.
fn provider(record: &Record<'_>, route: &Route) -> Option<usize> {
    let asked = record.attempts.list.last().and_then(|attempt| attempt.upstream());
    let upstream = asked.or_else(|| route.stages.first()?.pool.upstreams.first())?;
    let kind = upstream.provider.kind();
    KINDS.iter().position(|(name, _)| *name == kind)
}

/// What went wrong, in words of which there are few: a refusal's code, an outcome, or the class of a status.
fn error_type(record: &Record<'_>) -> Option<&'static str> {
    if let Some(code) = record.code {
        return Some(CODES.iter().map(|known| known.name()).find(|known| *known == code).unwrap_or("_OTHER"));
    }
    match (record.outcome, record.status.unwrap_or(200)) {
        (Outcome::Ok, ..400) => None,
        (Outcome::Ok, 429) => Some("status_429"),
        (Outcome::Ok, ..500) => Some("status_4xx"),
        (Outcome::Ok | Outcome::UpstreamError, 500..) => Some("status_5xx"),
        (outcome, _) => Some(outcome.name()),
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Instant, SystemTime};

    use super::*;
    use crate::audit::record::{Moment, Times};
    use crate::policy::{Policy, World, compile};
    use crate::settings::Settings;
    use crate::state::State;
    use crate::surface;
    use crate::telemetry::Telemetry;
    use crate::usage::{Source, Usage};

    /// A policy whose models have these names, all on one Azure upstream.
    fn policy(telemetry: &Telemetry, names: &[String]) -> Policy {
        let models: String = names.iter().map(|name| format!("  - {{name: '{name}', pool: p}}\n")).collect();
        let text = format!(
            "version: 1\npools:\n  p: {{upstreams: [{{url: 'http://127.0.0.1:1', provider: azure}}]}}\nmodels:\n{models}"
        );
        let (state, settings) = (State::new(0), Settings::default());
        compile(&text, &World::new(&|_| None, &state, telemetry, &settings)).unwrap()
    }

    /// A stream of eleven tokens: the first after half a second, the last after one and a half.
    fn record<'a>() -> Record<'a> {
        let now = Instant::now();
        let moment = Moment { at: SystemTime::now(), received: now, ended: now };
        let times =
            Times { body: Some(10), admitted: Some(60), first: Some(500_000), ended: 1_500_000, own: 80, queued: None };
        let usage =
            Usage { input_tokens: Some(100), output_tokens: Some(11), source: Source::Upstream, ..Usage::default() };
        Record { usage, times, ..Record::sample(moment) }
    }

    fn finish(telemetry: &Telemetry, policy: &Policy, model: &str, path: &str, record: &Record<'_>) {
        let route = policy.route(Some(model)).unwrap();
        telemetry.finished(record, surface::find(path).unwrap(), Some(route));
    }

    /// How many label sets durations have.
    fn sets(telemetry: &Telemetry) -> usize {
        telemetry.text().matches("\ngen_ai_server_request_duration_seconds_count{").count()
    }

    #[test]
    fn a_stream_is_told_as_the_conventions_say() {
        let telemetry = Telemetry::new();
        let policy = policy(&telemetry, &["gpt".to_owned()]);
        finish(&telemetry, &policy, "gpt", "/v1/chat/completions", &record());
        let page = telemetry.text();
        let labels =
            r#"gen_ai_operation_name="chat",gen_ai_provider_name="azure.ai.openai",gen_ai_request_model="gpt""#;
        for line in [
            format!("gen_ai_server_request_duration_seconds_sum{{{labels}}} 1.5"),
            format!("gen_ai_server_time_to_first_token_seconds_sum{{{labels}}} 0.5"),
            format!("gen_ai_server_time_per_output_token_seconds_sum{{{labels}}} 0.1"),
            format!(r#"gen_ai_client_token_usage_sum{{{labels},gen_ai_token_type="input"}} 100.0"#),
            format!(r#"gen_ai_client_token_usage_bucket{{le="16.0",{labels},gen_ai_token_type="output"}} 1"#),
            r#"infergate_self_time_seconds_sum{stage="admit"} 0.00005"#.to_owned(),
            r#"infergate_self_time_seconds_sum{stage="relay"} 0.00003"#.to_owned(),
        ] {
            assert!(page.lines().any(|known| known == line), "{line}\n{page}");
        }
    }

    #[test]
    fn a_failure_is_told_by_one_word_and_spoils_no_other_metric() {
        let telemetry = Telemetry::new();
        let policy = policy(&telemetry, &["gpt".to_owned()]);
        let with = |outcome, status, code| Record { outcome, status, code, ..record() };
        for (word, record) in [
            ("queue_full", with(Outcome::Refused, Some(503), Some("queue_full"))),
            ("_OTHER", with(Outcome::Refused, Some(503), Some("no code of ours"))),
            ("client_closed", with(Outcome::ClientClosed, Some(200), None)),
            ("status_429", with(Outcome::Ok, Some(429), None)),
            ("status_4xx", with(Outcome::Ok, Some(404), None)),
            ("status_5xx", with(Outcome::Ok, Some(500), None)),
        ] {
            finish(&telemetry, &policy, "gpt", "/v1/chat/completions", &record);
            let page = telemetry.text();
            assert!(
                page.contains(&format!("gen_ai_request_model=\"gpt\",error_type=\"{word}\"}} 1\n")),
                "{word}\n{page}"
            );
        }
        let page = telemetry.text();
        assert!(page.contains("gen_ai_server_time_to_first_token_seconds_count{gen_ai"), "{page}");
        assert!(
            !page.lines().any(|line| line.starts_with("gen_ai_server_time") && line.ends_with("gpt\"} 1")),
            "{page}"
        );
    }

    #[test]
    fn the_caches_share_counts_as_input_in_every_dialect() {
        let telemetry = Telemetry::new();
        let policy = policy(&telemetry, &["gpt".to_owned()]);
        let usage = Usage { cached_tokens: Some(30), cache_write_tokens: Some(7), ..record().usage };
        let record = Record { usage, ..record() };
        // Anthropic's dialect reports the cache's share beside the input, OpenAI's within it; both are a chat.
        for (path, tokens) in [("/v1/messages", 137), ("/v1/chat/completions", 137 + 100)] {
            finish(&telemetry, &policy, "gpt", path, &record);
            let line = telemetry.text().lines().any(|line| {
                line.starts_with("gen_ai_client_token_usage_sum{gen_ai_operation_name=\"chat\"")
                    && line.ends_with(&format!("gen_ai_token_type=\"input\"}} {tokens}.0"))
            });
            assert!(line, "{path}\n{}", telemetry.text());
        }
    }

    #[test]
    fn what_passes_through_unread_is_no_models_work() {
        let telemetry = Telemetry::new();
        let policy = policy(&telemetry, &["gpt".to_owned()]);
        telemetry.finished(&record(), &surface::PASSTHROUGH, Some(policy.route(Some("gpt")).unwrap()));
        assert_eq!(sets(&telemetry), 0);
    }

    #[test]
    fn policies_that_come_and_go_with_ever_other_models_leave_a_bounded_number_of_series() {
        let telemetry = Telemetry::new();
        for round in 0..3 {
            let names: Vec<String> = (0..500).map(|n| format!("m-{round}-{n}")).collect();
            let policy = policy(&telemetry, &names);
            for name in &names {
                finish(&telemetry, &policy, name, "/v1/chat/completions", &record());
            }
        }
        assert_eq!(sets(&telemetry), MODELS_MAX + 1);
        let counted = r#"gen_ai_request_model="other"} 500"#;
        assert!(
            telemetry.text().lines().any(|line| line.contains("duration_seconds_count") && line.ends_with(counted))
        );
    }

    #[test]
    fn every_model_failing_in_every_way_leaves_a_bounded_number_of_series() {
        let telemetry = Telemetry::new();
        let names: Vec<String> = (0..1_000).map(|n| format!("m-{n}")).collect();
        let policy = policy(&telemetry, &names);
        for name in &names {
            for code in CODES {
                let record = Record { outcome: Outcome::Refused, code: Some(code.name()), ..record() };
                finish(&telemetry, &policy, name, "/v1/chat/completions", &record);
            }
        }
        let sets = sets(&telemetry);
        assert!((SETS_MAX..SETS_MAX + 2 * CODES.len()).contains(&sets), "{sets}");
    }

    #[test]
    fn models_that_are_gone_make_room_and_those_that_stay_go_on() {
        let telemetry = Telemetry::new();
        let names: Vec<String> = (0..2 * MODELS_MAX).map(|n| format!("model-{n}")).collect();
        let (before, after) = names.split_at(MODELS_MAX);
        for named in [before.to_vec(), [&before[..1], &after[1..]].concat()] {
            let policy = policy(&telemetry, &named);
            telemetry.keep(&policy);
            for name in &named {
                finish(&telemetry, &policy, name, "/v1/chat/completions", &record());
            }
        }
        let page = telemetry.text();
        let counted = |name: &str| {
            let labels = format!(
                "{{gen_ai_operation_name=\"chat\",gen_ai_provider_name=\"azure.ai.openai\",gen_ai_request_model=\"{name}\"}}"
            );
            let line = format!("gen_ai_server_request_duration_seconds_count{labels} ");
            page.lines().find_map(|known| known.strip_prefix(&line)).map(str::to_owned)
        };
        assert_eq!(sets(&telemetry), MODELS_MAX);
        let counts = ["model-0", "model-1", "model-1999"].map(counted);
        assert_eq!(counts, [Some("2".to_owned()), None, Some("1".to_owned())]);
    }
}
