//! The engine that the simulated server pretends to have: slots that queue, a prefix cache, a KV cache.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::metrics::Metrics;
use super::options::Options;
use super::tokens;

/// Tokens in a block of the KV cache.
pub(super) const BLOCK: u64 = 16;

/// Slots, caches and the figures they leave in `/metrics`.
pub(super) struct Engine {
    slots: Arc<Semaphore>,
    total: u32,
    cache: Mutex<PrefixCache>,
    kv_used: AtomicU64,
    kv_tokens: u64,
    first_token: Duration,
    /// Held by the one whose prompt is being read.
    reading: tokio::sync::Mutex<()>,
    prefill_per_second: f64,
    interval: Duration,
    pub(super) metrics: Metrics,
}

impl Engine {
    pub(super) fn new(options: &Options) -> Self {
        let rate = options.tokens_per_second;
        Self {
            slots: Arc::new(Semaphore::new(options.slots)),
            total: options.slots as u32,
            cache: Mutex::new(PrefixCache::new(options.kv_tokens / BLOCK)),
            kv_used: AtomicU64::new(0),
            kv_tokens: options.kv_tokens,
            first_token: Duration::from_millis(options.ttft_ms),
            reading: tokio::sync::Mutex::new(()),
            prefill_per_second: options.prefill_per_second,
            interval: if rate > 0.0 { Duration::from_secs_f64(1.0 / rate) } else { Duration::ZERO },
            metrics: Metrics::new(options.max_model_len),
        }
    }

    /// Waits in the queue, takes the slots that the work needs and reads its prompt. Dropping the slot ends the work.
    pub(super) async fn enter(self: Arc<Self>, work: Work) -> Slot {
        let arrived = Instant::now();
        let waiting = Waiting::new(&self.metrics, work.choices);
        let wanted = work.choices.clamp(1, self.total);
        let permit = Arc::clone(&self.slots).acquire_many_owned(wanted).await.ok();
        drop(waiting);
        let slot = Slot::new(Arc::clone(&self), work, permit, arrived);
        self.read(&slot).await;
        slot
    }

    /// Reads what of a prompt is not in the prefix cache, in order of arrival.
    async fn read(&self, slot: &Slot) {
        if self.prefill_per_second > 0.0 {
            let _alone = self.reading.lock().await;
            let unread = slot.work.prompt_tokens - slot.cached;
            slot.pause(Duration::from_secs_f64(unread as f64 / self.prefill_per_second)).await;
        }
    }

    /// The whole of a non-streamed generation: queue, first token, the other tokens.
    pub(super) async fn generate(self: Arc<Self>, work: Work, tokens: u64, longest: u64, extra: Duration) -> Slot {
        let mut slot = self.enter(work).await;
        slot.pause(slot.engine.first_token + extra).await;
        slot.tokens(1.min(tokens));
        let steps = u32::try_from(longest.saturating_sub(1)).unwrap_or(u32::MAX);
        slot.pause(slot.engine.interval.saturating_mul(steps)).await;
        slot.tokens(tokens.saturating_sub(1));
        slot
    }

    pub(super) fn first_token(&self) -> Duration {
        self.first_token
    }

    pub(super) fn interval(&self) -> Duration {
        self.interval
    }

    /// The share of the KV cache that running requests hold, 0 to 1.
    pub(super) fn kv_usage(&self) -> f64 {
        (self.kv_used.load(Relaxed) as f64 / self.kv_tokens as f64).min(1.0)
    }
}

/// What the engine needs to know of a request.
#[derive(Clone, Debug, Default)]
pub(super) struct Work {
    pub(super) prompt_tokens: u64,
    /// A hash of each full block of the prompt and all before it.
    pub(super) blocks: Vec<u64>,
    pub(super) choices: u32,
    pub(super) max_tokens: u64,
}

impl Work {
    pub(super) fn new(prompt: &str, choices: u32, max_tokens: u64) -> Self {
        let (prompt_tokens, blocks) = blocks(prompt);
        Self { prompt_tokens, blocks, choices, max_tokens }
    }
}

/// Tokens and block hashes of a prompt, in one pass.
fn blocks(prompt: &str) -> (u64, Vec<u64>) {
    let (mut count, mut before, mut block_start, mut at) = (0, 0, 0, 0);
    let mut blocks = Vec::with_capacity(prompt.len() / 64);
    for token in tokens::split(prompt) {
        count += 1;
        at += token.len();
        if count % BLOCK == 0 {
            before = tokens::hash((before, &prompt[block_start..at]));
            blocks.push(before);
            block_start = at;
        }
    }
    (count, blocks)
}

/// Counts as waiting until dropped, whether that is a slot found or a client gone.
struct Waiting<'a>(&'a Metrics, u64);

impl<'a> Waiting<'a> {
    fn new(metrics: &'a Metrics, choices: u32) -> Self {
        metrics.waiting.fetch_add(u64::from(choices), Relaxed);
        Self(metrics, u64::from(choices))
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(self.1, Relaxed);
    }
}

/// A running request. Dropped before `finish`, it counts as aborted.
pub(super) struct Slot {
    engine: Arc<Engine>,
    work: Work,
    /// Prompt tokens that were found in the prefix cache.
    pub(super) cached: u64,
    /// Prompt tokens that this request added to the prefix cache.
    pub(super) created: u64,
    generated: u64,
    arrived: Instant,
    started: Instant,
    first: Option<Instant>,
    last: Instant,
    finished: Option<Finish>,
    _permit: Option<OwnedSemaphorePermit>,
}

/// Why a request ended, in the order of vLLM's labels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Finish {
    Stop,
    Length,
    Abort,
    Error,
}

impl Slot {
    fn new(engine: Arc<Engine>, work: Work, permit: Option<OwnedSemaphorePermit>, arrived: Instant) -> Self {
        let (cached, created) = engine.cache.lock().look_up(&work);
        let metrics = &engine.metrics;
        metrics.running.fetch_add(u64::from(work.choices), Relaxed);
        metrics.prefix_queries.fetch_add(work.prompt_tokens, Relaxed);
        metrics.prefix_hits.fetch_add(cached, Relaxed);
        engine.kv_used.fetch_add(work.prompt_tokens, Relaxed);
        let started = Instant::now();
        let (last, first, finished) = (started, None, None);
        let _permit = permit;
        Self { engine, work, cached, created, generated: 0, arrived, started, first, last, finished, _permit }
    }

    async fn pause(&self, time: Duration) {
        if !time.is_zero() {
            tokio::time::sleep(time).await;
        }
    }

    /// Counts tokens that were just generated.
    pub(super) fn tokens(&mut self, tokens: u64) {
        if tokens == 0 {
            return;
        }
        let now = Instant::now();
        let metrics = &self.engine.metrics;
        match self.first {
            None => {
                self.first = Some(now);
                metrics.prompt_tokens.fetch_add(self.work.prompt_tokens, Relaxed);
                metrics.first_token.record(now.duration_since(self.arrived).as_secs_f64());
                metrics.iteration.record((self.work.prompt_tokens - self.cached + tokens) as f64);
            }
            Some(_) => {
                let each = now.duration_since(self.last).as_secs_f64() / tokens as f64;
                metrics.inter_token.record_many(each, tokens);
                metrics.iteration.record_many(1.0, tokens);
            }
        }
        self.last = now;
        self.generated += tokens;
        self.engine.kv_used.fetch_add(tokens, Relaxed);
        metrics.generation_tokens.fetch_add(tokens, Relaxed);
    }

    /// The request got all it was to get.
    pub(super) fn finish(mut self, why: Finish) {
        self.finished = Some(why);
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let engine = &self.engine;
        engine.kv_used.fetch_sub(self.work.prompt_tokens + self.generated, Relaxed);
        let metrics = &engine.metrics;
        metrics.running.fetch_sub(u64::from(self.work.choices), Relaxed);
        let choices = u64::from(self.work.choices);
        let why = self.finished.unwrap_or(Finish::Abort);
        metrics.finished[why as usize].fetch_add(choices, Relaxed);
        if self.finished.is_some() {
            self.record();
        }
    }
}

impl Slot {
    /// What a finished request leaves in the histograms.
    fn record(&self) {
        let metrics = &self.engine.metrics;
        let now = Instant::now();
        let between = |from: Instant, to: Instant| to.saturating_duration_since(from).as_secs_f64();
        let first = self.first.unwrap_or(now);
        metrics.queue_time.record(between(self.arrived, self.started));
        metrics.prefill_time.record(between(self.started, first));
        metrics.decode_time.record(between(first, self.last));
        metrics.inference_time.record(between(self.started, self.last));
        metrics.whole_time.record(between(self.arrived, now));
        if self.generated > 1 {
            metrics.per_token.record(between(first, self.last) / (self.generated - 1) as f64);
        }
        metrics.request_prompt.record(self.work.prompt_tokens as f64);
        metrics.request_generation.record(self.generated as f64);
        metrics.request_computed.record((self.work.prompt_tokens - self.cached) as f64);
        metrics.request_n.record(f64::from(self.work.choices));
        metrics.request_max_tokens.record(self.work.max_tokens as f64);
        metrics.request_preemptions.record(0.0);
    }
}

/// Which blocks of prompts were seen lately; the least recently used are forgotten first.
struct PrefixCache {
    used: HashMap<u64, u64>,
    /// Uses in order; those that a later use of the same block has overtaken are skipped.
    order: VecDeque<(u64, u64)>,
    clock: u64,
    most: usize,
}

impl PrefixCache {
    fn new(most: u64) -> Self {
        Self { used: HashMap::new(), order: VecDeque::new(), clock: 0, most: most.max(1) as usize }
    }

    /// Tokens of the prompt that are here, and tokens that are now and were not.
    fn look_up(&mut self, work: &Work) -> (u64, u64) {
        let known = work.blocks.iter().take_while(|block| self.used.contains_key(*block)).count() as u64;
        for block in &work.blocks {
            self.clock += 1;
            self.used.insert(*block, self.clock);
            self.order.push_back((*block, self.clock));
        }
        self.forget();
        let added = work.blocks.len() as u64 - known;
        // As in vLLM, the last token is always computed: it is what the answer grows from.
        let whole = known > 0 && known * BLOCK == work.prompt_tokens;
        ((known - u64::from(whole)) * BLOCK, added * BLOCK)
    }

    fn forget(&mut self) {
        while self.used.len() > self.most || self.order.len() > 4 * self.most {
            let Some((block, at)) = self.order.pop_front() else { return };
            if self.used.get(&block) == Some(&at) {
                self.used.remove(&block);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_repeated_prefix_is_cached_in_whole_blocks() {
        let mut cache = PrefixCache::new(64);
        let prompt = "x".repeat(4 * 40);
        assert_eq!(cache.look_up(&Work::new(&prompt, 1, 1)), (0, 32));
        assert_eq!(cache.look_up(&Work::new(&prompt, 1, 1)), (32, 0));
        assert_eq!(cache.look_up(&Work::new(&format!("y{prompt}"), 1, 1)), (0, 32));
        assert_eq!(cache.look_up(&Work::new(&prompt[..4 * 32], 1, 1)), (16, 0));
    }

    #[test]
    fn the_cache_forgets_what_was_used_longest_ago() {
        let mut cache = PrefixCache::new(2);
        let [one, two, three] = ["a", "b", "c"].map(|text| Work::new(&text.repeat(80), 1, 1));
        for work in [&one, &two, &one, &three] {
            cache.look_up(work);
        }
        assert_eq!(cache.look_up(&one).0, 16);
        assert_eq!(cache.look_up(&two).0, 0);
        assert!(cache.used.len() <= 2 && cache.order.len() <= 8);
    }

    #[tokio::test(start_paused = true)]
    async fn prompts_are_read_one_after_the_other_and_what_is_cached_for_nothing() {
        let options = Options { prefill_per_second: 1000.0, ..Options::default() };
        let engine = Arc::new(Engine::new(&options));
        let [one, other] = ["a", "b"].map(|letter| Work::new(&letter.repeat(4 * 1600), 1, 1));
        let begun = tokio::time::Instant::now();
        let read = |work: &Work| Arc::clone(&engine).enter(work.clone());
        tokio::join!(read(&one), read(&other));
        assert_eq!(begun.elapsed().as_millis(), 3200);
        read(&one).await;
        assert_eq!(begun.elapsed().as_millis(), 3216, "the last block is read again");
    }

    #[tokio::test]
    async fn work_beyond_the_slots_waits_and_a_dropped_slot_is_free_at_once() {
        let engine = Arc::new(Engine::new(&Options { slots: 1, ..Options::default() }));
        let first = Arc::clone(&engine).enter(Work::new("hello", 1, 8)).await;
        let second = tokio::spawn(Arc::clone(&engine).enter(Work::new("hello", 1, 8)));
        while engine.metrics.waiting.load(Relaxed) == 0 {
            tokio::task::yield_now().await;
        }
        assert_eq!(engine.metrics.running.load(Relaxed), 1);
        drop(first);
        second.await.unwrap().finish(Finish::Stop);
        assert_eq!(engine.metrics.finished[Finish::Abort as usize].load(Relaxed), 1);
        assert_eq!(engine.kv_usage(), 0.0);
    }
}
