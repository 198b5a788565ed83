//! One engine, step by step: continuous batching, prefill in chunks, a KV cache of blocks with what was read before.
//!
//! It is vLLM's scheduler as far as it matters to whoever chooses a replica: who writes gets a token each step; what is
//! left of the step's tokens goes to prompts, first come first served; blocks that nobody uses any more stay until
//! their room is needed, the longest unused first and the last of a prompt before its first; who finds no room for
//! another block while writing is put back.

use std::cmp::Reverse;
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::rc::Rc;

use crate::trace::Turn;

/// Tokens of a block. Prompts differ at multiples of it.
pub const BLOCK: u32 = 64;

/// How fast an engine is. The defaults are about those of a model of 8 billion parameters on one A100.
#[derive(Clone, Copy, Debug)]
pub struct Speed {
    /// Prompt tokens a second, at the beginning of a prompt.
    pub prefill_rate: f64,
    /// The place in a prompt where tokens take twice as long: attention looks back at all before them.
    pub prefill_half: f64,
    /// Seconds of a step whatever is in it: all weights are read.
    pub step_s: f64,
    /// Seconds that each answer adds to a step.
    pub stream_s: f64,
    /// Seconds that each token adds that some answer looks back at.
    pub context_s: f64,
    /// Tokens of a step at most.
    pub step_tokens: u32,
    /// Requests in a step at most.
    pub requests_max: usize,
    /// Blocks of the KV cache.
    pub blocks: usize,
}

impl Speed {
    /// An A100's speed, times `factor`; the cache has its size whatever the speed.
    pub fn times(factor: f64) -> Self {
        Self {
            prefill_rate: 12_000.0 * factor,
            prefill_half: 32_000.0,
            step_s: 0.010 / factor,
            stream_s: 0.000_05 / factor,
            context_s: 0.000_000_08 / factor,
            step_tokens: 2048,
            requests_max: 256,
            // 400,000 tokens: 52 GB at 128 KiB a token.
            blocks: 400_000 / BLOCK as usize,
        }
    }

    /// Seconds of the whole engine that a request takes which finds nothing cached and is one of 32.
    pub fn seconds_of(&self, turn: &Turn) -> f64 {
        let (prompt, output) = (f64::from(turn.tokens()), f64::from(turn.output));
        let prefill = prompt / self.prefill_rate * (1.0 + prompt / 2.0 / self.prefill_half);
        prefill + output * (self.step_s / 32.0 + self.stream_s + prompt * self.context_s)
    }
}

/// What an engine tells in `/metrics`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Told {
    pub waiting: u32,
    pub running: u32,
    /// The share of blocks that somebody uses.
    pub kv: f64,
}

/// What a step brought about.
#[derive(Clone, Copy, Debug)]
pub enum News {
    /// A request got its first token, with so many prompt tokens from the cache.
    First { request: usize, cached: u32 },
    /// A request got its last token.
    Last { request: usize },
}

#[derive(Debug)]
pub struct Engine {
    pub speed: Speed,
    waiting: VecDeque<Job>,
    running: Vec<Job>,
    cache: Cache,
    /// Prompt tokens and answers' tokens in the step that runs.
    step: Vec<(usize, u32)>,
    busy: bool,
    /// Requests that were put back.
    pub preempted: u64,
    /// Seconds in steps.
    pub busy_s: f64,
}

#[derive(Debug)]
struct Job {
    request: usize,
    turn: Rc<Turn>,
    /// Tokens whose keys and values are there.
    computed: u32,
    /// Tokens of the answer.
    generated: u32,
    /// Prompt tokens that were found in the cache.
    cached: u32,
    /// Blocks beside those of the prompt.
    own: u32,
    told_first: bool,
}

impl Job {
    /// Tokens to be computed before the next token comes.
    fn needed(&self) -> u32 {
        self.turn.tokens() + self.generated
    }

    fn is_writing(&self) -> bool {
        self.generated > 0 && self.computed + 1 >= self.needed()
    }

    /// Blocks beside those of the prompt that so many tokens need.
    fn own_needed(&self) -> u32 {
        (self.needed() + 1).div_ceil(BLOCK).saturating_sub(self.turn.prompt.len() as u32)
    }
}

impl Engine {
    pub fn new(speed: Speed) -> Self {
        Self {
            speed,
            waiting: VecDeque::new(),
            running: Vec::new(),
            cache: Cache::new(speed.blocks),
            step: Vec::new(),
            busy: false,
            preempted: 0,
            busy_s: 0.0,
        }
    }

    pub fn told(&self) -> Told {
        let kv = self.cache.used() as f64 / self.speed.blocks as f64;
        Told { waiting: self.waiting.len() as u32, running: self.running.len() as u32, kv }
    }

    pub fn ask(&mut self, request: usize, turn: Rc<Turn>) {
        self.waiting.push_back(Job { request, turn, computed: 0, generated: 0, cached: 0, own: 0, told_first: false });
    }

    /// The client has gone. Returns whether it was still waiting for its first token.
    pub fn abandon(&mut self, request: usize) -> bool {
        let hopes = |job: &Job| job.request == request && !job.told_first;
        if let Some(place) = self.waiting.iter().position(hopes) {
            self.waiting.remove(place);
            return true;
        }
        let Some(place) = self.running.iter().position(hopes) else { return false };
        let job = self.running.remove(place);
        self.step.retain(|(of, _)| *of != request);
        self.cache.release(&job);
        true
    }

    /// Begins a step, unless one runs or there is nothing to do. Returns how many seconds it takes.
    pub fn begin_step(&mut self) -> Option<f64> {
        if self.busy {
            return None;
        }
        let (writing, context) = self.write();
        let mut left = self.speed.step_tokens.saturating_sub(writing);
        let mut seconds = f64::from(writing) * self.speed.stream_s + context as f64 * self.speed.context_s;
        for place in 0..self.running.len() {
            seconds += self.read(place, &mut left);
        }
        while left > 0 && self.admit() {
            seconds += self.read(self.running.len() - 1, &mut left);
        }
        if self.step.is_empty() {
            return None;
        }
        self.busy = true;
        seconds += self.speed.step_s;
        self.busy_s += seconds;
        Some(seconds)
    }

    /// Gives a token to everybody who writes, and the room for it. Returns how many do, and what they look back at.
    fn write(&mut self) -> (u32, u64) {
        let (mut place, mut writing, mut context) = (0, 0, 0);
        while place < self.running.len() {
            if !self.running[place].is_writing() {
                place += 1;
                continue;
            }
            let needed = self.running[place].own_needed();
            if self.running[place].own < needed {
                if !self.cache.take(1) {
                    // The youngest goes back, which may be this one.
                    self.put_back();
                    continue;
                }
                self.running[place].own += 1;
            }
            let job = &self.running[place];
            self.step.push((job.request, 1));
            (writing, context, place) = (writing + 1, context + u64::from(job.needed()), place + 1);
        }
        (writing, context)
    }

    fn put_back(&mut self) {
        let Some(mut job) = self.running.pop() else { return };
        self.step.retain(|(request, _)| *request != job.request);
        self.cache.release(&job);
        (job.computed, job.own) = (0, 0);
        self.preempted += 1;
        self.waiting.push_front(job);
    }

    /// Reads as much of a prompt as the step has tokens left. Returns the seconds.
    fn read(&mut self, place: usize, left: &mut u32) -> f64 {
        let job = &self.running[place];
        if job.is_writing() || *left == 0 {
            return 0.0;
        }
        let tokens = (job.needed() - job.computed).min(*left);
        *left -= tokens;
        self.step.push((job.request, tokens));
        let middle = f64::from(job.computed) + f64::from(tokens) / 2.0;
        f64::from(tokens) / self.speed.prefill_rate * (1.0 + middle / self.speed.prefill_half)
    }

    /// Lets the first that waits in, if there is room for its prompt and one block more.
    fn admit(&mut self) -> bool {
        if self.running.len() >= self.speed.requests_max {
            return false;
        }
        let Some(job) = self.waiting.front() else { return false };
        let own = job.own_needed();
        let Some(known) = self.cache.acquire(&job.turn.prompt, own) else { return false };
        let Some(mut job) = self.waiting.pop_front() else { return false };
        // The last token is always computed: it is what the answer grows from.
        job.computed = (known * BLOCK).min(job.needed() - 1);
        if !job.told_first {
            job.cached = job.computed;
        }
        job.own = own;
        self.running.push(job);
        true
    }

    /// Ends the step that runs.
    pub fn end_step(&mut self, news: &mut Vec<News>) {
        self.busy = false;
        for (request, tokens) in std::mem::take(&mut self.step) {
            let Some(place) = self.running.iter().position(|job| job.request == request) else { continue };
            let job = &mut self.running[place];
            job.computed += tokens;
            let read = (job.computed / BLOCK) as usize;
            self.cache.ready(&job.turn.prompt[..read.min(job.turn.prompt.len())]);
            if job.computed < job.needed() {
                continue;
            }
            job.generated += 1;
            if !job.told_first {
                job.told_first = true;
                news.push(News::First { request, cached: job.cached });
            }
            if job.generated >= job.turn.output {
                let job = self.running.remove(place);
                self.cache.release(&job);
                self.cache.keep(&job.turn.answer, job.turn.prompt.len());
                news.push(News::Last { request });
            }
        }
    }
}

/// The blocks of the KV cache.
#[derive(Debug)]
struct Cache {
    blocks: HashMap<u64, Block>,
    /// Those that nobody uses: the first goes first.
    idle: BTreeSet<(u64, Reverse<u32>, u64)>,
    free: usize,
    total: usize,
    clock: u64,
}

#[derive(Debug)]
struct Block {
    users: u32,
    /// Whether it has been computed.
    ready: bool,
    depth: u32,
    idle_since: u64,
}

impl Cache {
    fn new(total: usize) -> Self {
        Self { blocks: HashMap::new(), idle: BTreeSet::new(), free: total, total, clock: 0 }
    }

    fn used(&self) -> usize {
        self.total - self.free - self.idle.len()
    }

    /// Takes blocks that are nobody's.
    fn take(&mut self, count: u32) -> bool {
        let count = count as usize;
        if self.free + self.idle.len() < count {
            return false;
        }
        while self.free < count {
            let Some((_, _, id)) = self.idle.pop_first() else { return false };
            self.blocks.remove(&id);
            self.free += 1;
        }
        self.free -= count;
        true
    }

    /// Takes all blocks of a prompt and `own` more, or nothing. Returns how many are there from its beginning.
    fn acquire(&mut self, prompt: &[u64], own: u32) -> Option<u32> {
        let is_idle = |block: &Block| block.users == 0;
        let there: Vec<_> = prompt.iter().filter_map(|id| self.blocks.get(id)).collect();
        let missing = prompt.len() - there.len() + own as usize;
        let idle = there.iter().filter(|block| is_idle(block)).count();
        if self.free + self.idle.len() - idle < missing {
            return None;
        }
        let known = prompt.iter().take_while(|id| self.blocks.get(*id).is_some_and(|block| block.ready)).count();
        for id in prompt {
            if let Some(block) = self.blocks.get_mut(id) {
                if block.users == 0 {
                    self.idle.remove(&(block.idle_since, Reverse(block.depth), *id));
                }
                block.users += 1;
            }
        }
        for (depth, id) in prompt.iter().enumerate() {
            if !self.blocks.contains_key(id) && self.take(1) {
                let block = Block { users: 1, ready: false, depth: depth as u32, idle_since: 0 };
                self.blocks.insert(*id, block);
            }
        }
        self.take(own);
        Some(known as u32)
    }

    fn ready(&mut self, prompt: &[u64]) {
        // The blocks of a prompt become ready in order: from the end, until one is met that was.
        for id in prompt.iter().rev() {
            match self.blocks.get_mut(id) {
                Some(block) if !block.ready => block.ready = true,
                _ => return,
            }
        }
    }

    fn release(&mut self, job: &Job) {
        self.clock += 1;
        for id in job.turn.prompt.iter() {
            let Some(block) = self.blocks.get_mut(id) else { continue };
            block.users -= 1;
            if block.users > 0 {
                continue;
            }
            if block.ready {
                block.idle_since = self.clock;
                self.idle.insert((self.clock, Reverse(block.depth), *id));
            } else {
                self.blocks.remove(id);
                self.free += 1;
            }
        }
        self.free += job.own as usize;
    }

    /// Keeps the blocks of an answer, which were just given back, for who asks on.
    fn keep(&mut self, answer: &[u64], depth: usize) {
        for (depth, id) in (depth..).zip(answer) {
            if self.blocks.contains_key(id) || !self.take(1) {
                continue;
            }
            let depth = depth as u32;
            self.blocks.insert(*id, Block { users: 0, ready: true, depth, idle_since: self.clock });
            self.idle.insert((self.clock, Reverse(depth), *id));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn turn(prompt: &[u64], output: u32) -> Rc<Turn> {
        Rc::new(Turn { prompt: prompt.into(), output, ..Turn::default() })
    }

    /// Lets the engine work until it has nothing to do. Returns what came when.
    fn run(engine: &mut Engine) -> Vec<(f64, News)> {
        let (mut now, mut all, mut news) = (0.0, Vec::new(), Vec::new());
        while let Some(seconds) = engine.begin_step() {
            now += seconds;
            engine.end_step(&mut news);
            all.extend(news.drain(..).map(|one| (now, one)));
        }
        all
    }

    fn firsts(news: &[(f64, News)]) -> Vec<(f64, u32)> {
        let first = |(at, one): &(f64, News)| match one {
            News::First { cached, .. } => Some((*at, *cached)),
            News::Last { .. } => None,
        };
        news.iter().filter_map(first).collect()
    }

    #[test]
    fn a_prompt_that_was_read_before_is_read_much_faster() {
        let mut engine = Engine::new(Speed::times(1.0));
        let prompt: Vec<u64> = (1..=100).collect();
        engine.ask(0, turn(&prompt, 10));
        let cold = firsts(&run(&mut engine))[0];
        engine.ask(1, turn(&prompt, 10));
        let warm = firsts(&run(&mut engine))[0];
        assert_eq!((cold.1, warm.1), (0, 6399));
        assert!(warm.0 < cold.0 / 20.0, "{} {}", cold.0, warm.0);
    }

    #[test]
    fn the_rates_are_those_that_were_asked_for() {
        let mut engine = Engine::new(Speed { prefill_half: f64::INFINITY, ..Speed::times(1.0) });
        engine.ask(0, turn(&(1..=188).collect::<Vec<_>>(), 101));
        let news = run(&mut engine);
        let (first, last) = (firsts(&news)[0].0, news.last().unwrap().0);
        let steps = (188.0 * 64.0 / 2048.0_f64).ceil() * 0.010;
        assert!((first - (188.0 * 64.0 / 12_000.0 + steps)).abs() < 1e-6, "{first}");
        assert!((last - first) > 1.0 && (last - first) < 1.2, "{}", last - first);
    }

    #[test]
    fn a_full_cache_makes_others_wait_and_loses_no_block() {
        let mut engine = Engine::new(Speed { blocks: 64, ..Speed::times(1.0) });
        for request in 0..20 {
            let base = request as u64 * 1000;
            engine.ask(request, turn(&(base + 1..base + 20).collect::<Vec<_>>(), 300));
        }
        let news = run(&mut engine);
        assert_eq!(news.len(), 40, "everybody is served in the end");
        assert_eq!((engine.cache.used(), engine.told().waiting), (0, 0));
        assert_eq!(engine.cache.free + engine.cache.idle.len(), 64);
        assert!(engine.preempted > 0);
    }

    #[test]
    fn whoever_leaves_gives_everything_back() {
        let mut engine = Engine::new(Speed::times(1.0));
        engine.ask(0, turn(&(1..=300).collect::<Vec<_>>(), 300));
        engine.ask(1, turn(&[7], 3));
        assert!(engine.begin_step().is_some());
        assert!(engine.abandon(0) && !engine.abandon(0));
        engine.end_step(&mut Vec::new());
        let news = run(&mut engine);
        assert_eq!(firsts(&news).len(), 1);
        assert_eq!(engine.cache.used(), 0);
    }

    #[test]
    fn the_end_of_a_prompt_is_forgotten_before_its_beginning() {
        let mut engine = Engine::new(Speed { blocks: 40, ..Speed::times(1.0) });
        engine.ask(0, turn(&(1..=30).collect::<Vec<_>>(), 2));
        run(&mut engine);
        engine.ask(1, turn(&(101..=120).collect::<Vec<_>>(), 2));
        run(&mut engine);
        engine.ask(2, turn(&(1..=30).collect::<Vec<_>>(), 2));
        let cached = firsts(&run(&mut engine))[0].1;
        assert!((10 * BLOCK..25 * BLOCK).contains(&cached), "{cached}");
    }
}
