//! `/metrics`: the figures of the simulated engine under the names of the engine it imitates.

use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{SystemTime, UNIX_EPOCH};

use super::engine::{BLOCK, Engine};
use super::options::{self, Options};

/// Everything that is counted.
pub(super) struct Metrics {
    created: f64,
    pub(super) running: AtomicU64,
    pub(super) waiting: AtomicU64,
    pub(super) prefix_queries: AtomicU64,
    pub(super) prefix_hits: AtomicU64,
    pub(super) prompt_tokens: AtomicU64,
    pub(super) generation_tokens: AtomicU64,
    /// By `Finish`.
    pub(super) finished: [AtomicU64; 4],
    pub(super) request_prompt: Histogram,
    pub(super) request_generation: Histogram,
    pub(super) iteration: Histogram,
    pub(super) request_n: Histogram,
    pub(super) request_max_tokens: Histogram,
    pub(super) first_token: Histogram,
    pub(super) inter_token: Histogram,
    pub(super) per_token: Histogram,
    pub(super) whole_time: Histogram,
    pub(super) queue_time: Histogram,
    pub(super) inference_time: Histogram,
    pub(super) prefill_time: Histogram,
    pub(super) decode_time: Histogram,
    pub(super) request_preemptions: Histogram,
    pub(super) request_computed: Histogram,
}

const FIRST_TOKEN: [f64; 22] = [
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
];
const PER_TOKEN: [f64; 19] =
    [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0];
const REQUEST: [f64; 21] = [
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
];
const ITERATION: [f64; 13] = [1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0];
const CHOICES: [f64; 5] = [1.0, 2.0, 5.0, 10.0, 20.0];
const PREEMPTIONS: [f64; 7] = [1.0, 2.0, 3.0, 4.0, 5.0, 10.0, 20.0];

impl Metrics {
    pub(super) fn new(max_model_len: u64) -> Self {
        let tokens = one_two_five(max_model_len);
        let created = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let zero = || AtomicU64::new(0);
        Self {
            created: created.as_secs_f64(),
            running: zero(),
            waiting: zero(),
            prefix_queries: zero(),
            prefix_hits: zero(),
            prompt_tokens: zero(),
            generation_tokens: zero(),
            finished: [zero(), zero(), zero(), zero()],
            request_prompt: Histogram::new(&tokens),
            request_generation: Histogram::new(&tokens),
            iteration: Histogram::new(&ITERATION),
            request_n: Histogram::new(&CHOICES),
            request_max_tokens: Histogram::new(&tokens),
            first_token: Histogram::new(&FIRST_TOKEN),
            inter_token: Histogram::new(&PER_TOKEN),
            per_token: Histogram::new(&PER_TOKEN),
            whole_time: Histogram::new(&REQUEST),
            queue_time: Histogram::new(&REQUEST),
            inference_time: Histogram::new(&REQUEST),
            prefill_time: Histogram::new(&REQUEST),
            decode_time: Histogram::new(&REQUEST),
            request_preemptions: Histogram::new(&PREEMPTIONS),
            request_computed: Histogram::new(&tokens),
        }
    }
}

/// 1, 2, 5, 10, 20, ... up to `most`, as vLLM chooses buckets of tokens.
fn one_two_five(most: u64) -> Vec<f64> {
    let decades = (0..18).map(|power| 10_u64.pow(power));
    let steps = decades.flat_map(|decade| [decade, 2 * decade, 5 * decade]);
    steps.take_while(|step| *step <= most).map(|step| step as f64).collect()
}

/// A Prometheus histogram.
pub(super) struct Histogram {
    bounds: Vec<f64>,
    /// One more than bounds: the last one has no upper bound.
    counts: Vec<AtomicU64>,
    sum: AtomicU64,
}

impl Histogram {
    fn new(bounds: &[f64]) -> Self {
        Self {
            bounds: bounds.to_vec(),
            counts: (0..=bounds.len()).map(|_| AtomicU64::new(0)).collect(),
            sum: AtomicU64::new(0),
        }
    }

    pub(super) fn record(&self, value: f64) {
        self.record_many(value, 1);
    }

    pub(super) fn record_many(&self, value: f64, times: u64) {
        let at = self.bounds.partition_point(|bound| *bound < value);
        self.counts[at].fetch_add(times, Relaxed);
        let add = |bits: u64| Some((f64::from_bits(bits) + value * times as f64).to_bits());
        // Always `Ok`: `add` never declines.
        let _ = self.sum.fetch_update(Relaxed, Relaxed, add);
    }
}

/// The whole page.
pub(super) fn page(engine: &Engine, options: &Options) -> String {
    let mut page =
        Page { text: String::with_capacity(48 * 1024), model: options.first_model(), created: engine.metrics.created };
    match options.engine {
        options::Engine::Vllm | options::Engine::Openai => vllm(&mut page, engine, options),
        options::Engine::Tgi => tgi(&mut page, engine, options),
        options::Engine::Sglang => sglang(&mut page, engine),
    }
    page.text
}

struct Page<'a> {
    text: String,
    model: &'a str,
    created: f64,
}

fn vllm(page: &mut Page<'_>, engine: &Engine, options: &Options) {
    let m = &engine.metrics;
    let load = |counter: &AtomicU64| counter.load(Relaxed) as f64;
    page.counter(
        "estimated_flops_per_gpu",
        "Estimated number of floating point operations per GPU (for Model Flops Utilization calculations).",
        0.0,
    );
    page.counter(
        "estimated_read_bytes_per_gpu",
        "Estimated number of bytes read from memory per GPU (for Model Flops Utilization calculations).",
        0.0,
    );
    page.counter(
        "estimated_write_bytes_per_gpu",
        "Estimated number of bytes written to memory per GPU (for Model Flops Utilization calculations).",
        0.0,
    );
    let waiting = load(&m.waiting);
    page.gauge("num_requests_running", "Number of requests in model execution batches.", &[("", load(&m.running))]);
    page.gauge("num_requests_waiting", "Number of requests waiting to be processed.", &[("", waiting)]);
    page.gauge(
        "num_requests_waiting_by_reason",
        "Number of waiting requests by reason. Reason labels: 'capacity' = waiting for scheduling capacity; 'deferred' = deferred by transient constraints (LoRA budget, KV transfer, blocked status). Sum of all reasons equals vllm:num_requests_waiting.",
        &[(",reason=\"capacity\"", waiting), (",reason=\"deferred\"", 0.0)],
    );
    page.gauge(
        "engine_sleep_state",
        "Engine sleep state; awake = 0 means engine is sleeping; awake = 1 means engine is awake; weights_offloaded = 1 means sleep level 1; discard_all = 1 means sleep level 2.",
        &[
            (",sleep_state=\"awake\"", 1.0),
            (",sleep_state=\"weights_offloaded\"", 0.0),
            (",sleep_state=\"discard_all\"", 0.0),
        ],
    );
    page.gauge("kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage.", &[("", engine.kv_usage())]);
    let (queries, hits) = (load(&m.prefix_queries), load(&m.prefix_hits));
    page.counter("prefix_cache_queries", "Prefix cache queries, in terms of number of queried tokens.", queries);
    page.counter("prefix_cache_hits", "Prefix cache hits, in terms of number of cached tokens.", hits);
    page.counter("external_prefix_cache_queries", "External prefix cache queries from KV connector cross-instance cache sharing, in terms of number of queried tokens.", 0.0);
    page.counter("external_prefix_cache_hits", "External prefix cache hits from KV connector cross-instance cache sharing, in terms of number of cached tokens.", 0.0);
    page.counter("mm_cache_queries", "Multi-modal cache queries, in terms of number of queried items.", 0.0);
    page.counter("mm_cache_hits", "Multi-modal cache hits, in terms of number of cached items.", 0.0);
    page.counter("num_preemptions", "Cumulative number of preemption from the engine.", 0.0);
    let prompt = load(&m.prompt_tokens);
    page.counter("prompt_tokens", "Number of prefill tokens processed.", prompt);
    page.counters(
        "prompt_tokens_by_source",
        "Number of prompt tokens by source.",
        &[
            (",source=\"local_compute\"", (prompt - hits).max(0.0)),
            (",source=\"local_cache_hit\"", hits),
            (",source=\"external_kv_transfer\"", 0.0),
        ],
    );
    page.counter("prompt_tokens_cached", "Number of cached prompt tokens (local + external).", hits);
    page.counters(
        "prompt_tokens_cached_by_source",
        "Prefix-cache hit tokens by the cache tier that supplied them: device (local HBM), host (offloaded to DRAM), disk, p2p (transferred from another vLLM instance) or external_unspecified. Counted at admission; sums to vllm:prefix_cache_hits + vllm:external_prefix_cache_hits.",
        &[
            (",source=\"device\"", hits),
            (",source=\"host\"", 0.0),
            (",source=\"p2p\"", 0.0),
            (",source=\"disk\"", 0.0),
            (",source=\"external_unspecified\"", 0.0),
        ],
    );
    page.counter("generation_tokens", "Number of generation tokens processed.", load(&m.generation_tokens));
    page.finished(&m.finished);
    page.rejections();
    page.histogram("request_prompt_tokens", "Number of prefill tokens processed.", &m.request_prompt);
    page.histogram("request_generation_tokens", "Number of generation tokens processed.", &m.request_generation);
    page.histogram("iteration_tokens_total", "Histogram of number of tokens per engine_step.", &m.iteration);
    page.histogram(
        "request_max_num_generation_tokens",
        "Histogram of maximum number of requested generation tokens.",
        &m.request_generation,
    );
    page.histogram("request_params_n", "Histogram of the n request parameter.", &m.request_n);
    page.histogram(
        "request_params_max_tokens",
        "Histogram of the max_tokens request parameter.",
        &m.request_max_tokens,
    );
    page.histogram("time_to_first_token_seconds", "Histogram of time to first token in seconds.", &m.first_token);
    page.histogram("inter_token_latency_seconds", "Histogram of inter-token latency in seconds.", &m.inter_token);
    page.histogram(
        "request_time_per_output_token_seconds",
        "Histogram of time_per_output_token_seconds per request.",
        &m.per_token,
    );
    page.histogram("e2e_request_latency_seconds", "Histogram of e2e request latency in seconds.", &m.whole_time);
    page.histogram(
        "request_queue_time_seconds",
        "Histogram of time spent in WAITING phase for request.",
        &m.queue_time,
    );
    page.histogram(
        "request_inference_time_seconds",
        "Histogram of time spent in RUNNING phase for request.",
        &m.inference_time,
    );
    page.histogram(
        "request_prefill_time_seconds",
        "Histogram of time spent in PREFILL phase for request.",
        &m.prefill_time,
    );
    page.histogram(
        "request_decode_time_seconds",
        "Histogram of time spent in DECODE phase for request.",
        &m.decode_time,
    );
    page.histogram(
        "request_num_preemptions",
        "Histogram of the number of times a request was preempted.",
        &m.request_preemptions,
    );
    page.histogram(
        "request_prefill_kv_computed_tokens",
        "Histogram of new KV tokens computed during prefill (excluding cached tokens).",
        &m.request_computed,
    );
    page.cache_config(options);
}

impl Page<'_> {
    fn head(&mut self, name: &str, help: &str, kind: &str) {
        let _ = write!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
    }

    /// One sample of vLLM; `labels` come after the model's name.
    fn sample(&mut self, name: &str, labels: &str, value: f64) {
        let model = self.model;
        let _ = writeln!(self.text, "vllm:{name}{{engine=\"0\",model_name=\"{model}\"{labels}}} {}", float(value));
    }

    fn gauge(&mut self, name: &str, help: &str, samples: &[(&str, f64)]) {
        self.head(&format!("vllm:{name}"), help, "gauge");
        for (labels, value) in samples {
            self.sample(name, labels, *value);
        }
    }

    fn counter(&mut self, name: &str, help: &str, value: f64) {
        self.counters(name, help, &[("", value)]);
    }

    fn counters(&mut self, name: &str, help: &str, samples: &[(&str, f64)]) {
        self.head(&format!("vllm:{name}_total"), help, "counter");
        for (labels, value) in samples {
            self.sample(&format!("{name}_total"), labels, *value);
        }
        let created: Vec<_> = samples.iter().map(|(labels, _)| (*labels, self.created)).collect();
        self.gauge(&format!("{name}_created"), help, &created);
    }

    /// The one counter whose label comes before the model's name.
    fn finished(&mut self, finished: &[AtomicU64; 4]) {
        let help = "Count of successfully processed requests.";
        let (model, created) = (self.model, float(self.created));
        let zero = AtomicU64::new(0);
        let reasons = ["stop", "length", "abort", "error", "repetition"];
        self.head("vllm:request_success_total", help, "counter");
        for (reason, count) in reasons.iter().zip(finished.iter().chain([&zero])) {
            let count = float(count.load(Relaxed) as f64);
            let labels = format!("engine=\"0\",finished_reason=\"{reason}\",model_name=\"{model}\"");
            let _ = writeln!(self.text, "vllm:request_success_total{{{labels}}} {count}");
        }
        self.head("vllm:request_success_created", help, "gauge");
        for reason in reasons {
            let labels = format!("engine=\"0\",finished_reason=\"{reason}\",model_name=\"{model}\"");
            let _ = writeln!(self.text, "vllm:request_success_created{{{labels}}} {created}");
        }
    }

    /// The one counter without an engine.
    fn rejections(&mut self) {
        let help = "Number of admission attempts rejected by a queue limit, by reason.";
        let (model, created) = (self.model, float(self.created));
        for (name, kind, value) in [("total", "counter", "0.0"), ("created", "gauge", created.as_str())] {
            self.head(&format!("vllm:admission_rejections_{name}"), help, kind);
            for reason in ["max_num_queued_reqs", "max_num_queued_tokens"] {
                let labels = format!("model_name=\"{model}\",reason=\"{reason}\"");
                let _ = writeln!(self.text, "vllm:admission_rejections_{name}{{{labels}}} {value}");
            }
        }
    }

    fn histogram(&mut self, name: &str, help: &str, histogram: &Histogram) {
        self.head(&format!("vllm:{name}"), help, "histogram");
        let model = self.model;
        let mut count = 0;
        let bounds = histogram.bounds.iter().copied().chain([f64::INFINITY]);
        for (bound, held) in bounds.zip(&histogram.counts) {
            count += held.load(Relaxed);
            let labels = format!("engine=\"0\",le=\"{}\",model_name=\"{model}\"", float(bound));
            let _ = writeln!(self.text, "vllm:{name}_bucket{{{labels}}} {}", float(count as f64));
        }
        self.sample(&format!("{name}_count"), "", count as f64);
        self.sample(&format!("{name}_sum"), "", f64::from_bits(histogram.sum.load(Relaxed)));
        self.gauge(&format!("{name}_created"), help, &[("", self.created)]);
    }

    fn cache_config(&mut self, options: &Options) {
        let blocks = options.kv_tokens / BLOCK;
        let bytes = options.kv_tokens.saturating_mul(1024);
        let (tokens, slots) = (options.kv_tokens, float(options.slots as f64));
        self.head("vllm:cache_config_info", "Information of the LLMEngine CacheConfig", "gauge");
        let _ = writeln!(
            self.text,
            "vllm:cache_config_info{{_block_size_resolved=\"True\",block_size=\"{BLOCK}\",cache_dtype=\"auto\",\
             cache_hit_alignment_tokens=\"None\",effective_attention_block_size=\"{BLOCK}\",\
             enable_mamba_shared_prefix_checkpoint=\"False\",enable_prefix_caching=\"True\",engine=\"0\",\
             gpu_memory_utilization=\"0.92\",hash_block_size=\"None\",is_attention_free=\"False\",\
             kv_cache_dtype_skip_layers=\"[]\",kv_cache_layout=\"None\",kv_cache_max_concurrency=\"{slots}\",\
             kv_cache_memory_bytes=\"{bytes}\",kv_cache_size_tokens=\"{tokens}\",kv_offloading_backend=\"native\",\
             kv_offloading_size=\"None\",kv_sharing_fast_prefill=\"False\",mamba_block_size=\"None\",\
             mamba_cache_dtype=\"auto\",mamba_cache_mode=\"none\",mamba_page_size_padded=\"None\",\
             mamba_ssm_cache_dtype=\"float32\",num_cpu_blocks=\"None\",num_gpu_blocks=\"{blocks}\",\
             num_gpu_blocks_override=\"None\",prefix_cache_retention_interval=\"0\",\
             prefix_caching_hash_algo=\"sha256\",prefix_match_unit=\"None\",replayssm_buffer_len=\"16\",\
             skip_page_size_padded=\"None\",sliding_window=\"None\",swa_bounded_replay=\"True\",\
             use_kda_recoverssm=\"False\",use_replayssm=\"False\",user_specified_block_size=\"False\"}} 1.0"
        );
    }

    /// One unlabelled or freely labelled sample of another engine.
    fn plain(&mut self, name: &str, kind: &str, labels: &str, value: f64) {
        let _ = write!(self.text, "# TYPE {name} {kind}\n{name}{labels} {}\n", float(value));
    }
}

fn tgi(page: &mut Page<'_>, engine: &Engine, options: &Options) {
    let m = &engine.metrics;
    let load = |counter: &AtomicU64| counter.load(Relaxed) as f64;
    page.plain("tgi_queue_size", "gauge", "", load(&m.waiting));
    page.plain("tgi_batch_current_size", "gauge", "", load(&m.running));
    let held = engine.kv_usage() * options.kv_tokens as f64;
    page.plain("tgi_batch_current_max_tokens", "gauge", "", held);
    let done: f64 = m.finished.iter().map(load).sum();
    page.plain("tgi_request_count", "counter", "", done);
    let succeeded = load(&m.finished[0]) + load(&m.finished[1]);
    page.plain("tgi_request_success", "counter", "", succeeded);
    for (name, histogram) in [
        ("tgi_request_duration", &m.whole_time),
        ("tgi_request_queue_duration", &m.queue_time),
        ("tgi_request_inference_duration", &m.inference_time),
        ("tgi_request_mean_time_per_token_duration", &m.per_token),
        ("tgi_request_generated_tokens", &m.request_generation),
        ("tgi_request_input_length", &m.request_prompt),
        ("tgi_request_max_new_tokens", &m.request_max_tokens),
    ] {
        page.foreign_histogram(name, "", histogram);
    }
}

fn sglang(page: &mut Page<'_>, engine: &Engine) {
    let m = &engine.metrics;
    let load = |counter: &AtomicU64| counter.load(Relaxed) as f64;
    let model = format!("model_name=\"{}\"", page.model);
    let labels = format!("{{{model}}}");
    let (queries, hits) = (load(&m.prefix_queries), load(&m.prefix_hits));
    for (name, kind, value) in [
        ("sglang:num_running_reqs", "gauge", load(&m.running)),
        ("sglang:num_queue_reqs", "gauge", load(&m.waiting)),
        ("sglang:token_usage", "gauge", engine.kv_usage()),
        ("sglang:cache_hit_rate", "gauge", if queries > 0.0 { hits / queries } else { 0.0 }),
        ("sglang:gen_throughput", "gauge", 0.0),
        ("sglang:prompt_tokens_total", "counter", load(&m.prompt_tokens)),
        ("sglang:generation_tokens_total", "counter", load(&m.generation_tokens)),
        ("sglang:cached_tokens_total", "counter", hits),
        ("sglang:num_requests_total", "counter", m.finished.iter().map(load).sum()),
    ] {
        page.plain(name, kind, &labels, value);
    }
    for (name, histogram) in [
        ("sglang:time_to_first_token_seconds", &m.first_token),
        ("sglang:inter_token_latency_seconds", &m.inter_token),
        ("sglang:e2e_request_latency_seconds", &m.whole_time),
    ] {
        page.foreign_histogram(name, &model, histogram);
    }
}

impl Page<'_> {
    fn foreign_histogram(&mut self, name: &str, labels: &str, histogram: &Histogram) {
        let _ = writeln!(self.text, "# TYPE {name} histogram");
        let comma = if labels.is_empty() { "" } else { "," };
        let mut count = 0;
        for (bound, held) in histogram.bounds.iter().copied().chain([f64::INFINITY]).zip(&histogram.counts) {
            count += held.load(Relaxed);
            let _ = writeln!(self.text, "{name}_bucket{{{labels}{comma}le=\"{}\"}} {count}", float(bound));
        }
        let sum = f64::from_bits(histogram.sum.load(Relaxed));
        let _ = write!(self.text, "{name}_sum{{{labels}}} {sum}\n{name}_count{{{labels}}} {count}\n");
    }
}

/// A number as Python's Prometheus client writes it: `repr`, but with an exponent from seven digits on.
fn float(value: f64) -> String {
    if value.is_infinite() {
        return "+Inf".to_owned();
    }
    let plain = format!("{value:?}");
    match plain.find('.') {
        Some(dot) if value > 0.0 && dot > 6 => {
            let mantissa = format!("{}.{}{}", &plain[..1], &plain[1..dot], &plain[dot + 1..]);
            let mantissa = mantissa.trim_end_matches('0').trim_end_matches('.');
            format!("{mantissa}e+{:02}", dot - 1)
        }
        _ => plain,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_as_python_does() {
        let written = [0.0, 16384.0, 0.025, 1_795_343_540.5, 7_680_000.0].map(float);
        assert_eq!(written, ["0.0", "16384.0", "0.025", "1.7953435405e+09", "7.68e+06"]);
    }

    #[test]
    fn a_histogram_counts_up() {
        let histogram = Histogram::new(&[1.0, 2.0]);
        for value in [0.5, 1.0, 1.5, 9.0] {
            histogram.record(value);
        }
        let counts: Vec<_> = histogram.counts.iter().map(|count| count.load(Relaxed)).collect();
        assert_eq!((counts, f64::from_bits(histogram.sum.load(Relaxed))), (vec![2, 1, 1], 12.0));
    }
}
