//! What others choose by, as their code or papers say, with their defaults.

use std::collections::{BTreeMap, HashMap};

use fastrand::Rng;

use crate::choice::{Ask, Choice};
use crate::engine::{BLOCK, Speed, Told};

/// llm-d's endpoint picker with its default profile: queue 2, KV cache 2, prefix 3, the best one taken.
///
/// Figures of engines are looked at every 50 ms. The index has 64-token blocks, one LRU an engine, as many entries as
/// the engine has blocks of 16 tokens; a block counts for whoever has it, whether or not it has those before it.
pub struct LlmD {
    told: Vec<Told>,
    known: Vec<Lru>,
    random: Rng,
}

/// Blocks that were sent somewhere; the one that was longest ago goes first.
#[derive(Default)]
struct Lru {
    used: HashMap<u64, u64>,
    order: BTreeMap<u64, u64>,
    clock: u64,
    most: usize,
}

/// Blocks of a prompt that llm-d looks at.
const LLM_D_BLOCKS: usize = 2048;

impl Lru {
    fn put(&mut self, block: u64) {
        self.clock += 1;
        if let Some(before) = self.used.insert(block, self.clock) {
            self.order.remove(&before);
        }
        self.order.insert(self.clock, block);
        if self.used.len() > self.most
            && let Some((_, oldest)) = self.order.pop_first()
        {
            self.used.remove(&oldest);
        }
    }
}

impl LlmD {
    pub fn new(speeds: &[Speed], seed: u64) -> Self {
        let lru = |speed: &Speed| Lru { most: speed.blocks * BLOCK as usize / 16, ..Lru::default() };
        Self {
            told: vec![Told::default(); speeds.len()],
            known: speeds.iter().map(lru).collect(),
            random: Rng::with_seed(seed),
        }
    }

    fn matched(&self, prompt: &[u64]) -> Vec<f64> {
        let mut counts = vec![0.0; self.known.len()];
        for block in prompt {
            let mut anybody = false;
            for (known, count) in self.known.iter().zip(&mut counts) {
                if known.used.contains_key(block) {
                    *count += 1.0;
                    anybody = true;
                }
            }
            if !anybody {
                break;
            }
        }
        counts
    }
}

impl Choice for LlmD {
    fn choose(&mut self, ask: &Ask<'_>) -> usize {
        let prompt = &ask.turn.prompt[..ask.turn.prompt.len().min(LLM_D_BLOCKS)];
        let (matched, whole) = (self.matched(prompt), prompt.len().max(1) as f64);
        let queues = || self.told.iter().map(|told| f64::from(told.waiting));
        let (least, most) = (queues().fold(f64::INFINITY, f64::min), queues().fold(0.0, f64::max));
        let queue = |waiting: u32| if most > least { (most - f64::from(waiting)) / (most - least) } else { 1.0 };
        let score = |engine: usize| {
            2.0 * queue(self.told[engine].waiting) + 2.0 * (1.0 - self.told[engine].kv) + 3.0 * matched[engine] / whole
        };
        let mut engines: Vec<usize> = (0..self.told.len()).collect();
        self.random.shuffle(&mut engines);
        let best = engines.into_iter().max_by(|one, other| score(*one).total_cmp(&score(*other))).unwrap_or(0);
        prompt.iter().for_each(|block| self.known[best].put(*block));
        best
    }

    fn told(&mut self, engine: usize, told: Told, _now: f64) {
        self.told[engine] = told;
    }
}

/// SGLang's `cache_aware` with the defaults of its command line: if the busiest has more than 64 requests more than the
/// idlest, and half as many again, the idlest; else whoever has most of the prompt, if that is more than 0.3 of it;
/// else the idlest.
///
/// Its tree holds 67 million characters, which no run here fills, so nothing is forgotten.
pub struct CacheAware {
    /// Who got a block, and when last.
    tree: HashMap<u64, Vec<(usize, u64)>>,
    in_flight: Vec<u32>,
    processed: Vec<u64>,
    placed: HashMap<usize, usize>,
    clock: u64,
}

impl CacheAware {
    pub fn new(engines: usize) -> Self {
        Self {
            tree: HashMap::new(),
            in_flight: vec![0; engines],
            processed: vec![0; engines],
            placed: HashMap::new(),
            clock: 0,
        }
    }

    fn idlest(&self) -> usize {
        let key = |engine: &usize| (self.in_flight[*engine], self.processed[*engine], *engine);
        (0..self.in_flight.len()).min_by_key(key).unwrap_or(0)
    }

    fn chosen(&self, prompt: &[u64]) -> usize {
        let least = self.in_flight.iter().min().copied().unwrap_or_default();
        let most = self.in_flight.iter().max().copied().unwrap_or_default();
        if most - least > 64 && f64::from(most) > 1.5 * f64::from(least) {
            return self.idlest();
        }
        let depth = prompt.iter().take_while(|block| self.tree.contains_key(*block)).count();
        if depth as f64 <= 0.3 * prompt.len() as f64 {
            return self.idlest();
        }
        let tenants = &self.tree[&prompt[depth - 1]];
        tenants.iter().max_by_key(|(_, used)| *used).map_or(0, |(engine, _)| *engine)
    }
}

impl Choice for CacheAware {
    fn choose(&mut self, ask: &Ask<'_>) -> usize {
        let chosen = self.chosen(&ask.turn.prompt);
        self.clock += 1;
        for block in ask.turn.prompt.iter() {
            let tenants = self.tree.entry(*block).or_default();
            tenants.retain(|(engine, _)| *engine != chosen);
            tenants.push((chosen, self.clock));
        }
        self.in_flight[chosen] += 1;
        self.processed[chosen] += 1;
        self.placed.insert(ask.request, chosen);
        chosen
    }

    fn ended(&mut self, request: usize, _tokens: Option<u32>, _now: f64) {
        if let Some(engine) = self.placed.remove(&request) {
            self.in_flight[engine] -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use super::*;
    use crate::trace::Turn;

    fn choose(choice: &mut dyn Choice, request: usize, prompt: &[u64]) -> usize {
        let turn = Rc::new(Turn { prompt: prompt.into(), output: 2, ..Turn::default() });
        choice.choose(&Ask { request, turn: &turn, tenant: 0, now: 0.0 })
    }

    #[test]
    fn llm_d_goes_back_to_where_a_prompt_was_unless_the_queue_is_long_there() {
        let mut llm_d = LlmD::new(&[Speed::times(1.0); 8], 1);
        let first = choose(&mut llm_d, 0, &[1, 2, 3]);
        assert_eq!(choose(&mut llm_d, 1, &[1, 2, 3]), first);
        llm_d.told(first, Told { waiting: 9, running: 1, kv: 0.9 }, 0.0);
        assert_ne!(choose(&mut llm_d, 2, &[1, 2, 3]), first);
    }

    #[test]
    fn sglang_goes_back_to_where_a_prompt_was_until_the_load_is_uneven() {
        let mut aware = CacheAware::new(2);
        for request in 0..65 {
            assert_eq!(choose(&mut aware, request, &[1, 2, 3]), 0);
        }
        assert_eq!(choose(&mut aware, 65, &[1, 2, 3]), 1);
        assert_eq!(choose(&mut aware, 66, &[9, 8, 7]), 1);
    }
}
