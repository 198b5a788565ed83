//! What engines tell of their load: in the head of an answer (ORCA), or on their page of metrics.
//!
//! Read by a scanner that keeps nothing but the figures it wants, and believed only within bounds and for seconds.

use std::ops::RangeInclusive;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use arc_swap::ArcSwapOption;
use smallvec::SmallVec;

use super::origin::fnv;
use super::score::Told;

/// The header in which an engine tells its load, and the one that asks for it.
pub const TELLS: &str = "endpoint-load-metrics";
/// The header that asks for it.
pub const ASKS: &str = "endpoint-load-metrics-format";

/// What was told at one moment. What is absent was not told, or was no number.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Report {
    /// Requests that wait, or whose share of this waits.
    pub waiting: Option<f32>,
    /// Requests that run.
    pub running: Option<f32>,
    /// The share of the KV cache that is taken, 0 to 1.
    pub kv: Option<f32>,
    /// The adapters that are loaded, where it tells of any.
    pub adapters: Option<SmallVec<[u64; 8]>>,
    /// What its KV cache is like.
    pub cache: Option<Cache>,
}

/// What an engine's KV cache is like. It stays so until the engine is started anew.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cache {
    /// Tokens of one of its blocks: it finds whole ones again and no parts.
    pub block: u32,
    /// Tokens that it has room for.
    pub tokens: u32,
}

/// What an endpoint last told. Written now and then, read on every pick.
#[derive(Debug, Default)]
pub struct Telling {
    /// Requests of others, as `f32`s: those that wait, those that run.
    others: AtomicU64,
    /// The share of the KV cache as an `f32`.
    kv: AtomicU64,
    /// When, in milliseconds after the endpoint's beginning, plus one; 0: never.
    at: AtomicU64,
    adapters: ArcSwapOption<SmallVec<[u64; 8]>>,
    /// Its cache: tokens of a block, tokens of all; 0: never told.
    cache: AtomicU64,
    /// When it was last asked for that, in milliseconds after the endpoint's beginning, plus one; 0: never.
    cache_asked: AtomicU64,
}

/// More requests than any engine runs.
const REQUESTS_MAX: f32 = 1e4;
/// The most adapters that are remembered of one endpoint.
const ADAPTERS_MAX: usize = 256;
/// What a KV cache can be like. Hybrid models have blocks of hundreds of tokens; what is beyond is no cache of today's.
const BLOCK_TOKENS: RangeInclusive<u64> = 1..=1 << 16;
const CACHE_TOKENS: RangeInclusive<u64> = 1 << 10..=1 << 30;
/// What a cache is like is asked this often: an engine that restarts between two health checks may have another.
const CACHE_AGAIN_MS: u64 = 300_000;

impl Telling {
    /// Takes a report that came at `at`, when this gateway had `in_flight` requests there of which `may_wait` may have
    /// been waiting: what is beyond those is others'.
    pub fn take(&self, report: Report, in_flight: u32, may_wait: u32, at: u64) {
        let beyond = |told: Option<f32>, ours: u32| (told.unwrap_or(0.0) - ours as f32).max(0.0);
        let (waiting, running) = (beyond(report.waiting, may_wait), beyond(report.running, in_flight));
        self.others.store(u64::from(waiting.to_bits()) << 32 | u64::from(running.to_bits()), Relaxed);
        self.kv.store(u64::from(report.kv.unwrap_or(0.0).to_bits()), Relaxed);
        self.at.store(at + 1, Relaxed);
        if let Some(adapters) = report.adapters {
            self.adapters.store(Some(Arc::new(adapters)));
        }
        if let Some(Cache { block, tokens }) = report.cache {
            self.cache.store(u64::from(block) << 32 | u64::from(tokens), Relaxed);
        }
    }

    /// What it told of its cache.
    pub fn cache(&self) -> Option<Cache> {
        let told = self.cache.load(Relaxed);
        (told != 0).then_some(Cache { block: (told >> 32) as u32, tokens: told as u32 })
    }

    /// Whether it should be asked what its cache is like.
    pub fn wants_cache(&self, now: u64) -> bool {
        let asked = self.cache_asked.load(Relaxed);
        asked == 0 || now.saturating_sub(asked - 1) >= CACHE_AGAIN_MS
    }

    /// It was asked what its cache is like, whether it told or not; `None`: what it told may not be so any more.
    pub fn cache_asked(&self, at: Option<u64>) {
        self.cache_asked.store(at.map_or(0, |at| at + 1), Relaxed);
    }

    /// Of a prompt's first `tokens`, those that are in whole blocks of the engine's: the others it reads again.
    pub fn whole_blocks(&self, tokens: u32) -> u32 {
        match (self.cache.load(Relaxed) >> 32) as u32 {
            0 | 1 => tokens,
            block => tokens - tokens % block,
        }
    }

    /// What it is worth at `now`, where a request of others is taken to be as long as one of `prompt` tokens.
    pub fn at(&self, now: u64, prompt: u32) -> Told {
        let at = self.at.load(Relaxed);
        if at == 0 {
            return Told::default();
        }
        let others = self.others.load(Relaxed);
        let (waiting, running) = (f32::from_bits((others >> 32) as u32), f32::from_bits(others as u32));
        Told {
            others: waiting * prompt as f32,
            streams: running,
            kv: f32::from_bits(self.kv.load(Relaxed) as u32),
            trust: Told::trust(now.saturating_sub(at - 1) as f32 / 1e3),
        }
    }

    /// Whether it has told that the adapter of this name is loaded.
    pub fn has_adapter(&self, name: u64) -> bool {
        self.adapters.load().as_ref().is_some_and(|adapters| adapters.contains(&name))
    }
}

/// An adapter's name, as it is remembered.
pub fn adapter(name: &str) -> u64 {
    fnv(name.trim().as_bytes())
}

/// Reads the header of an answer: `JSON {"named_metrics": {...}}` or `TEXT named_metrics.a=1, ...`, with or without
/// the word that names the form (ORCA; vLLM and Triton send it).
pub fn header(value: &[u8]) -> Option<Report> {
    const LONGEST: usize = 4096;
    let text = std::str::from_utf8(value.get(..value.len().min(LONGEST))?).ok()?.trim();
    let mut report = Report::default();
    let body = text.strip_prefix("JSON").or_else(|| text.strip_prefix("TEXT")).unwrap_or(text);
    for pair in body.split([',', '{', '}']) {
        let Some((name, value)) = pair.rsplit_once([':', '=']) else { continue };
        let name = name.trim().trim_matches('"');
        let name = name.rsplit('.').next().unwrap_or(name).trim_matches('"');
        if let (Some(figure), Ok(value)) = (figure(name), value.trim().parse()) {
            report.add(figure, value);
        }
    }
    (report != Report::default()).then_some(report)
}

/// The figures that are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Figure {
    Waiting,
    Running,
    Kv,
    Adapters,
    /// Labels that tell what the cache is like.
    CacheLabels,
    /// Tokens of one of its blocks.
    CacheBlock,
    /// Blocks that it has.
    CacheBlocks,
    /// Tokens that it has room for.
    CacheTokens,
}

/// How many figures there are.
const FIGURES: usize = Figure::CacheTokens as usize + 1;

/// What a metric of this name tells, whoever's it is: vLLM's old and new names, SGLang's with either separator, TGI's,
/// TensorRT-LLM's.
fn figure(name: &str) -> Option<Figure> {
    let name = name.rsplit_once(':').map_or(name, |(_, name)| name);
    let name = ["sglang_", "trtllm_", "tgi_"].iter().find_map(|engine| name.strip_prefix(engine)).unwrap_or(name);
    match name {
        "num_requests_waiting" | "num_queue_reqs" | "queue_size" => Some(Figure::Waiting),
        "num_requests_running" | "num_running_reqs" | "batch_current_size" => Some(Figure::Running),
        "kv_cache_usage_perc" | "gpu_cache_usage_perc" | "token_usage" | "kv_cache_utilization" => Some(Figure::Kv),
        "lora_requests_info" => Some(Figure::Adapters),
        "cache_config_info" => Some(Figure::CacheLabels),
        "page_size" | "kv_cache_tokens_per_block" => Some(Figure::CacheBlock),
        "num_pages" | "kv_cache_max_blocks" => Some(Figure::CacheBlocks),
        "max_total_num_tokens" => Some(Figure::CacheTokens),
        _ => None,
    }
}

/// What a line of Triton's tells, which has its figures in labels.
fn tritons(name: &str, labels: &str) -> Option<Figure> {
    let has = |label: &str| labels.contains(label);
    match name {
        "nv_trt_llm_request_metrics" if has("request_type=\"waiting\"") => Some(Figure::Waiting),
        "nv_trt_llm_request_metrics" if has("request_type=\"scheduled\"") => Some(Figure::Running),
        "nv_trt_llm_kv_cache_block_metrics" if has("kv_cache_block_type=\"fraction\"") => Some(Figure::Kv),
        "nv_trt_llm_kv_cache_block_metrics" if has("kv_cache_block_type=\"tokens_per\"") => Some(Figure::CacheBlock),
        "nv_trt_llm_kv_cache_block_metrics" if has("kv_cache_block_type=\"max\"") => Some(Figure::CacheBlocks),
        _ => None,
    }
}

impl Report {
    /// Several engines behind one page (data parallel): requests add up, and the fullest cache counts.
    fn add(&mut self, figure: Figure, value: f32) {
        let within = |most: f32| value.is_finite() && (0.0..=most).contains(&value);
        match figure {
            Figure::Waiting if within(REQUESTS_MAX) => *self.waiting.get_or_insert(0.0) += value,
            Figure::Running if within(REQUESTS_MAX) => *self.running.get_or_insert(0.0) += value,
            Figure::Kv if within(1.0) => self.kv = Some(self.kv.map_or(value, |kv| kv.max(value))),
            _ => {}
        }
    }

    fn add_adapters(&mut self, labels: &str) {
        let listed = labels.split_once("running_lora_adapters=\"").and_then(|(_, rest)| rest.split('"').next());
        let adapters = self.adapters.get_or_insert_default();
        for name in listed.into_iter().flat_map(|names| names.split(',')).filter(|name| !name.trim().is_empty()) {
            let name = adapter(name);
            if adapters.len() < ADAPTERS_MAX && !adapters.contains(&name) {
                adapters.push(name);
            }
        }
    }
}

/// What a page tells of the KV caches of the engines behind it, as far as it has been read.
#[derive(Debug, Default)]
struct Caches {
    block: u64,
    blocks: u64,
    tokens: u64,
}

impl Caches {
    fn add(&mut self, figure: Figure, value: f32) {
        // A number that is none becomes zero, which is not believed.
        let value = value as u64;
        match figure {
            Figure::CacheBlock => self.block = value,
            Figure::CacheBlocks => self.blocks = self.blocks.saturating_add(value),
            Figure::CacheTokens => self.tokens = self.tokens.saturating_add(value),
            _ => {}
        }
    }

    /// vLLM's and SGLang's labels. Where some layers keep less than others, tokens are fewer than blocks times their size.
    fn add_labels(&mut self, labels: &str) {
        let label = |name: &str| {
            let mut pairs = labels.trim_start_matches('{').split(',').filter_map(|pair| pair.split_once('='));
            pairs.find(|(label, _)| label.trim() == name)?.1.trim_matches('"').parse().ok()
        };
        let (block, blocks) =
            (label("block_size").or(label("page_size")), label("num_gpu_blocks").or(label("num_pages")));
        let of_blocks = block.zip(blocks).map(|(block, blocks): (u64, u64)| block.saturating_mul(blocks));
        self.block = block.unwrap_or(self.block);
        self.tokens = self.tokens.saturating_add(label("kv_cache_size_tokens").or(of_blocks).unwrap_or(0));
    }

    /// What they are like together, if that can be.
    fn told(&self) -> Option<Cache> {
        let tokens = if self.tokens > 0 { self.tokens } else { self.blocks.saturating_mul(self.block) };
        let can_be = BLOCK_TOKENS.contains(&self.block) && CACHE_TOKENS.contains(&tokens);
        can_be.then_some(Cache { block: self.block as u32, tokens: tokens as u32 })
    }
}

/// What is wanted of a page besides requests and how full the KV cache is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wants {
    /// The adapters that are loaded.
    pub adapters: bool,
    /// What the KV cache is like.
    pub cache: bool,
}

/// Reads a page of metrics as it comes, until it has what it wants.
#[derive(Debug)]
pub struct Scanner {
    report: Report,
    caches: Caches,
    /// The beginning of a line whose end has not come.
    line: Vec<u8>,
    /// Whether the rest of a line that is too long is passed over.
    skipping: bool,
    wants: Wants,
    seen: [bool; FIGURES],
    /// The figure of the line before.
    last: Option<Figure>,
}

/// The longest line that is read: one that lists adapters.
const LINE_MAX: usize = 8 << 10;

impl Scanner {
    /// Wants requests and how full the KV cache is, and `wants` as well.
    pub fn new(wants: Wants) -> Self {
        Self {
            report: Report::default(),
            caches: Caches::default(),
            line: Vec::new(),
            skipping: false,
            wants,
            seen: [false; FIGURES],
            last: None,
        }
    }

    /// Reads the next piece. Returns whether it has all it wants.
    pub fn push(&mut self, mut piece: &[u8]) -> bool {
        while let Some(end) = memchr::memchr(b'\n', piece) {
            let line = std::mem::take(&mut self.line);
            let done = match (self.skipping, line.is_empty()) {
                (true, _) => false,
                (false, true) => self.line(&piece[..end]),
                (false, false) => self.line(&[&line, &piece[..end]].concat()),
            };
            (self.skipping, piece) = (false, &piece[end + 1..]);
            if done {
                return true;
            }
        }
        self.skipping |= self.line.len() + piece.len() > LINE_MAX;
        if self.skipping {
            self.line.clear()
        } else {
            self.line.extend_from_slice(piece)
        }
        false
    }

    /// What was found, if anything was.
    pub fn finish(mut self) -> Option<Report> {
        self.report.cache = self.caches.told().filter(|_| self.wants.cache);
        (self.report != Report::default()).then_some(self.report)
    }

    fn line(&mut self, line: &[u8]) -> bool {
        if line.first().is_none_or(|first| *first == b'#' || line.len() > LINE_MAX) {
            return false;
        }
        let Ok(line) = std::str::from_utf8(line) else { return false };
        let name_ends = line.find(['{', ' ']).unwrap_or(line.len());
        let (name, rest) = line.split_at(name_ends);
        let (labels, value) = rest.rfind('}').map_or(("", rest), |end| (&rest[..end], &rest[end + 1..]));
        let found = figure(name).or_else(|| tritons(name, labels));
        // The lines of one metric stand together: when another begins, there is no more of the one before.
        let done = found != self.last && self.has_all();
        if let Some(figure) = found.filter(|_| !done) {
            self.seen[figure as usize] = true;
            match (figure, value.split_ascii_whitespace().next().map(str::parse)) {
                (Figure::Adapters, _) => self.report.add_adapters(labels),
                (Figure::CacheLabels, _) => self.caches.add_labels(labels),
                (figure @ (Figure::Waiting | Figure::Running | Figure::Kv), Some(Ok(value))) => {
                    self.report.add(figure, value);
                }
                (figure, Some(Ok(value))) => self.caches.add(figure, value),
                _ => {}
            }
        }
        self.last = found;
        done
    }

    fn has_all(&self) -> bool {
        let seen = |figure: Figure| self.seen[figure as usize];
        let load = seen(Figure::Waiting) && seen(Figure::Running) && seen(Figure::Kv);
        let cache = seen(Figure::CacheLabels) || seen(Figure::CacheBlock) && seen(Figure::CacheBlocks);
        load && (seen(Figure::Adapters) || !self.wants.adapters) && (cache || !self.wants.cache)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const JSON: &str = r#"JSON {"named_metrics": {"num_requests_waiting": 3.0, "kv_cache_usage_perc": 0.25}}"#;
    const TEXT: &str = "TEXT named_metrics.num_requests_waiting=3.0, named_metrics.kv_cache_usage_perc=0.25";

    const LOAD: Wants = Wants { adapters: false, cache: false };
    const CACHE: Wants = Wants { cache: true, ..LOAD };

    fn scan(page: &str, adapters: bool) -> (Option<Report>, bool) {
        let mut scanner = Scanner::new(Wants { adapters, ..LOAD });
        let done = scanner.push(page.as_bytes());
        (scanner.finish(), done)
    }

    fn three(waiting: f32, running: f32, kv: f32) -> Option<Report> {
        Some(Report { waiting: Some(waiting), running: Some(running), kv: Some(kv), ..Report::default() })
    }

    #[test]
    fn both_forms_of_vllms_header_are_read() {
        let told = Report { waiting: Some(3.0), kv: Some(0.25), ..Report::default() };
        for value in [JSON, TEXT, &JSON[5..], &TEXT[5..]] {
            assert_eq!(header(value.as_bytes()), Some(told.clone()), "{value}");
        }
        for nothing in ["", "JSON", "JSON {}", "BIN abc", "a=b", "JSON {\"num_requests_waiting\": \"NaN\"}"] {
            assert_eq!(header(nothing.as_bytes()), None, "{nothing}");
        }
    }

    #[test]
    fn every_engines_names_are_known() {
        let pages = [
            "vllm:num_requests_running{engine=\"0\",model_name=\"m\"} 4.0\nvllm:num_requests_waiting{engine=\"0\"} 2.0\nvllm:kv_cache_usage_perc{engine=\"0\"} 0.5\n",
            "vllm:num_requests_running 4\nvllm:num_requests_waiting 2\nvllm:gpu_cache_usage_perc 0.5\n",
            "sglang:num_running_reqs{a=\"b\"} 4.0\nsglang:token_usage 0.5\nsglang:num_queue_reqs 2.0\n",
            "sglang_num_running_reqs 4.0\nsglang_token_usage 0.5\nsglang_num_queue_reqs 2.0\n",
            "trtllm_num_requests_waiting 2\ntrtllm_num_requests_running 4\ntrtllm_kv_cache_utilization 0.5\n",
            "nv_trt_llm_request_metrics{model=\"m\",request_type=\"waiting\",version=\"1\"} 2\nnv_trt_llm_request_metrics{request_type=\"scheduled\"} 4\nnv_trt_llm_request_metrics{request_type=\"max\"} 99\nnv_trt_llm_kv_cache_block_metrics{kv_cache_block_type=\"fraction\"} 0.5\nnv_trt_llm_kv_cache_block_metrics{kv_cache_block_type=\"tokens_per\"} 64\n",
        ];
        for page in pages {
            assert_eq!(scan(page, false).0, three(2.0, 4.0, 0.5), "{page}");
        }
        let tgi = "tgi_batch_current_max_tokens 900\ntgi_queue_size 2\ntgi_batch_current_size 4\n";
        assert_eq!(scan(tgi, false).0, Some(Report { kv: None, ..three(2.0, 4.0, 0.0).unwrap() }));
    }

    #[test]
    fn several_engines_behind_one_page_add_up() {
        let page = "vllm:num_requests_running{engine=\"0\"} 1\nvllm:num_requests_running{engine=\"1\"} 3\nvllm:num_requests_waiting{engine=\"0\"} 0\nvllm:num_requests_waiting{engine=\"1\"} 2\nvllm:kv_cache_usage_perc{engine=\"0\"} 0.5\nvllm:kv_cache_usage_perc{engine=\"1\"} 0.125\nother 1\n";
        assert_eq!(scan(page, false), (three(2.0, 4.0, 0.5), true));
    }

    #[test]
    fn it_stops_as_soon_as_it_has_what_it_wants_and_does_not_care_how_the_page_is_cut() {
        let page = include_str!("../../tests/fixtures/vllm-0.32/metrics.txt");
        let mut whole = Scanner::new(LOAD);
        let enough = page.find("vllm:prefix_cache_queries_total{").unwrap() + 100;
        assert!(whole.push(&page.as_bytes()[..enough]), "a twentieth of the page is enough");
        for size in [1, 7, 64] {
            let mut scanner = Scanner::new(LOAD);
            assert!(page.as_bytes().chunks(size).any(|piece| scanner.push(piece)));
            assert_eq!(scanner.finish(), three(0.0, 0.0, 0.0));
        }
    }

    #[test]
    fn lies_are_not_read_and_a_line_without_end_costs_nothing() {
        let page = "vllm:num_requests_waiting NaN\nvllm:num_requests_running -5\nvllm:kv_cache_usage_perc 7e30\n";
        assert_eq!(scan(page, false).0, None);
        let mut scanner = Scanner::new(LOAD);
        (0..1_000).for_each(|_| assert!(!scanner.push(&[b'x'; 4096])));
        assert!(scanner.line.capacity() <= LINE_MAX);
        scanner.push(b"\nvllm:num_requests_waiting 1\n");
        assert_eq!(scanner.finish().and_then(|report| report.waiting), Some(1.0));
    }

    fn cache(page: &str) -> Option<Cache> {
        let mut scanner = Scanner::new(CACHE);
        scanner.push(page.as_bytes());
        scanner.finish().and_then(|report| report.cache)
    }

    #[test]
    fn every_engine_that_tells_what_its_cache_is_like_is_understood() {
        let vllm = include_str!("../../tests/fixtures/vllm-0.32/metrics.txt");
        assert_eq!(cache(vllm), Some(Cache { block: 128, tokens: 1 << 20 }));
        for page in [
            "vllm:cache_config_info{block_size=\"16\",num_gpu_blocks=\"4096\",hash_block_size=\"7\"} 1\n",
            "sglang:cache_config_info{num_pages=\"4096\",page_size=\"16\"} 1.0\n",
            "sglang:num_pages 4096.0\nsglang:page_size 16.0\n",
            "sglang_max_total_num_tokens{tp_rank=\"0\"} 65536\nsglang_page_size 16\n",
            "trtllm_kv_cache_tokens_per_block 16\ntrtllm_kv_cache_max_blocks 4096\n",
            "nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type=\"max\"} 4096\nnv_trt_llm_kv_cache_block_metrics{kv_cache_block_type=\"tokens_per\"} 16\n",
            "vllm:cache_config_info{engine=\"0\",block_size=\"16\",num_gpu_blocks=\"2048\"} 1\nvllm:cache_config_info{engine=\"1\",block_size=\"16\",num_gpu_blocks=\"2048\"} 1\n",
        ] {
            assert_eq!(cache(page), Some(Cache { block: 16, tokens: 65_536 }), "{page}");
        }
    }

    #[test]
    fn a_cache_that_cannot_be_is_not_believed() {
        for (block, blocks) in [
            ("0", "4096"),
            ("16", "0"),
            ("16", "None"),
            ("-16", "9"),
            ("99999999", "1"),
            ("16", "18446744073709551615"),
        ] {
            let page = format!("vllm:cache_config_info{{block_size=\"{block}\",num_gpu_blocks=\"{blocks}\"}} 1\n");
            assert_eq!(cache(&page), None, "{page}");
            let page = format!("sglang:page_size {block}\nsglang:num_pages {blocks}\n");
            assert_eq!(cache(&page), None, "{page}");
        }
        assert_eq!(cache("sglang:page_size NaN\nsglang:num_pages 1e38\nsglang:max_total_num_tokens inf\n"), None);
    }

    #[test]
    fn what_a_cache_is_like_is_asked_once_and_again_when_that_may_have_changed() {
        let told = Telling::default();
        assert!(told.wants_cache(0) && told.cache().is_none());
        told.cache_asked(Some(0));
        assert!(!told.wants_cache(CACHE_AGAIN_MS - 1) && told.wants_cache(CACHE_AGAIN_MS));
        told.cache_asked(None);
        assert!(told.wants_cache(1));
    }

    #[test]
    fn an_engine_has_whole_blocks_of_a_prompt_and_no_parts() {
        let told = Telling::default();
        assert_eq!(told.whole_blocks(1_000), 1_000, "nothing is known of its blocks");
        told.take(Report { cache: Some(Cache { block: 128, tokens: 4_096 }), ..Report::default() }, 0, 0, 0);
        assert_eq!([127, 128, 1_000].map(|tokens| told.whole_blocks(tokens)), [0, 128, 896]);
    }

    #[test]
    fn loaded_adapters_are_known_by_name() {
        let page = "vllm:lora_requests_info{max_lora=\"4\",running_lora_adapters=\"sql, poems\",waiting_lora_adapters=\"x\"} 1.7e9\n";
        let told = Telling::default();
        told.take(scan(page, true).0.unwrap(), 0, 0, 0);
        assert!(told.has_adapter(adapter("sql")) && told.has_adapter(adapter("poems")));
        assert!(!told.has_adapter(adapter("x")));
    }

    #[test]
    fn only_what_is_beyond_our_own_is_others_and_it_is_forgotten_within_seconds() {
        let telling = Telling::default();
        assert_eq!(telling.at(0, 100), Told::default());
        telling.take(three(5.0, 9.0, 0.5).unwrap(), 7, 3, 1_000);
        let told = telling.at(1_000, 100);
        assert_eq!((told.others, told.streams, told.kv, told.trust), (200.0, 2.0, 0.5, 1.0));
        assert_eq!(telling.at(12_000, 100).trust, 0.0);
        telling.take(three(0.0, 0.0, 0.0).unwrap(), 7, 3, 2_000);
        assert_eq!(telling.at(2_000, 100).others, 0.0, "a zero takes nothing from what we know ourselves");
    }
}
