//! Who asks what, and when: traces that are made up, with all parameters in one place, and Mooncake's.
//!
//! Sessions arrive by a Poisson process; a session asks its next turn some time after the last answer. Blocks are named
//! by chained hashes, so that two prompts have a block in common if and only if they begin alike up to its end.

use std::collections::HashMap;
use std::path::Path;
use std::rc::Rc;

use clap::ValueEnum;
use fastrand::Rng;
use serde::Deserialize;

use crate::Failure;
use crate::engine::BLOCK;

/// One request.
#[derive(Clone, Debug, Default)]
pub struct Turn {
    /// Its whole blocks.
    pub prompt: Rc<[u64]>,
    /// Its tokens behind the last whole block.
    pub tail: u32,
    /// Tokens of its answer.
    pub output: u32,
    /// Blocks that prompt and answer together have behind those of the prompt.
    pub answer: Vec<u64>,
    /// Seconds between the answer before and this request.
    pub pause_s: f64,
}

impl Turn {
    pub fn tokens(&self) -> u32 {
        self.prompt.len() as u32 * BLOCK + self.tail
    }
}

/// Requests that follow one another.
#[derive(Clone, Debug, Default)]
pub struct Session {
    pub begins_s: f64,
    pub tenant: u32,
    pub turns: Vec<Rc<Turn>>,
}

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// 60 tenants (Zipf 0.8), each with a system prompt of 2,048 to 8,192 tokens; questions of 64 to 512; one turn.
    System,
    /// Conversations: a system prompt of 512 tokens out of 8, 6 turns on average, 64 to 384 tokens each, 10 s of thought.
    Chat,
    /// Loops of an agent: 8,192 tokens of tools out of 12 kinds, 10 steps on average of 128 to 2,048 tokens, 1 s a tool.
    Agents,
    /// Retrieval: 512 tokens of system, then 4 of 2,000 documents (Zipf 0.9) of 512 tokens in any order; one turn.
    Rag,
    /// One prompt of 6,144 tokens begins four of five requests; the rest has nothing in common.
    Hot,
    /// Nothing has anything in common: 256 to 4,096 tokens. Whoever looks for prefixes can only lose here.
    Unlike,
    /// A fifth of the load each of system, chat, agents, rag and unlike.
    Mixed,
}

impl Kind {
    pub fn name(self) -> String {
        self.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
    }
}

/// Makes sessions up.
struct Making {
    random: Rng,
    made: Names,
}

/// Names blocks.
#[derive(Default)]
struct Names {
    fresh: u64,
}

impl Names {
    /// Content that nothing else has.
    fn fresh(&mut self) -> u64 {
        self.fresh += 1;
        (1 << 63) | self.fresh
    }
}

/// The name of a block of this content behind those before.
fn chained(before: u64, content: u64) -> u64 {
    let mut bits = before.rotate_left(17) ^ content.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

/// A text that grows.
#[derive(Clone, Default)]
struct Written {
    blocks: Vec<u64>,
    tail: u32,
}

impl Written {
    /// So many tokens of a content that others may have too; in whole blocks.
    fn shared(&mut self, content: u64, tokens: u32) {
        for part in 0..u64::from(tokens / BLOCK) {
            let before = self.blocks.last().copied().unwrap_or_default();
            self.blocks.push(chained(before, content << 16 | part));
        }
    }

    /// So many tokens that nobody else has.
    fn own(&mut self, tokens: u32, names: &mut Names) {
        self.tail += tokens;
        while self.tail >= BLOCK {
            self.tail -= BLOCK;
            let before = self.blocks.last().copied().unwrap_or_default();
            self.blocks.push(chained(before, names.fresh()));
        }
    }
}

impl Making {
    fn between(&mut self, least: u32, most: u32) -> u32 {
        // Small ones are more frequent than large ones: even on the scale of logarithms.
        let (least, most) = (f64::from(least).ln(), f64::from(most).ln());
        (least + self.random.f64() * (most - least)).exp() as u32
    }

    fn exponential(&mut self, mean: f64) -> f64 {
        -mean * (1.0 - self.random.f64()).ln()
    }

    /// At least one, `mean` on average, without memory.
    fn geometric(&mut self, mean: f64) -> usize {
        1 + (self.exponential(1.0) / -(1.0 - 1.0 / mean).ln()).floor() as usize
    }

    /// One of `count`, the n-th with a weight of 1 / n^`skew`.
    fn zipf(&mut self, count: u32, skew: f64) -> u64 {
        let weight = |n: u32| f64::from(n).powf(-skew);
        let mut left = self.random.f64() * (1..=count).map(weight).sum::<f64>();
        for n in 1..=count {
            left -= weight(n);
            if left <= 0.0 {
                return u64::from(n);
            }
        }
        u64::from(count)
    }

    /// The text is sent, and its answer written behind it.
    fn asked(&mut self, text: &mut Written, output: u32, pause_s: f64) -> Rc<Turn> {
        let (prompt, tail): (Rc<[u64]>, u32) = (text.blocks.as_slice().into(), text.tail);
        text.own(output, &mut self.made);
        let answer = text.blocks[prompt.len()..].to_vec();
        Rc::new(Turn { prompt, tail, output: output.max(2), answer, pause_s })
    }

    fn session(&mut self, kind: Kind) -> (u32, Vec<Rc<Turn>>) {
        let (mut text, mut turns) = (Written::default(), Vec::new());
        let mut tenant = 0;
        match kind {
            Kind::System => {
                let system = self.zipf(60, 0.8);
                tenant = system as u32;
                text.shared(1 << 32 | system, 2048 + (system * 7 % 13) as u32 * 512);
                text.own(self.between(64, 512), &mut self.made);
                let output = self.between(64, 512);
                turns.push(self.asked(&mut text, output, 0.0));
            }
            Kind::Chat => {
                let app = self.random.u64(1..=8);
                tenant = 100 + app as u32;
                text.shared(2 << 32 | app, 512);
                for turn in 0..self.geometric(6.0) {
                    text.own(self.between(64, 384), &mut self.made);
                    let pause = if turn == 0 { 0.0 } else { self.exponential(10.0) };
                    let output = self.between(64, 512);
                    turns.push(self.asked(&mut text, output, pause));
                }
            }
            Kind::Agents => {
                let app = self.zipf(12, 0.8);
                tenant = 200 + app as u32;
                text.shared(3 << 32 | app, 8192);
                text.own(self.between(64, 512), &mut self.made);
                for turn in 0..self.geometric(10.0).min(40) {
                    let pause = if turn == 0 { 0.0 } else { self.exponential(1.0) };
                    let output = self.between(32, 256);
                    turns.push(self.asked(&mut text, output, pause));
                    text.own(self.between(128, 2048), &mut self.made);
                }
            }
            Kind::Rag => {
                let app = self.random.u64(1..=4);
                tenant = 300 + app as u32;
                text.shared(4 << 32 | app, 512);
                for _ in 0..4 {
                    let document = self.zipf(2000, 0.9);
                    text.shared(5 << 32 | document, 512);
                }
                text.own(self.between(32, 256), &mut self.made);
                let output = self.between(64, 384);
                turns.push(self.asked(&mut text, output, 0.0));
            }
            Kind::Hot => {
                tenant = 400 + u32::from(self.random.u8(..5) == 0);
                if tenant == 400 {
                    text.shared(6 << 32, 6144);
                    text.own(self.between(64, 512), &mut self.made);
                } else {
                    text.own(self.between(512, 6144), &mut self.made);
                }
                let output = self.between(64, 384);
                turns.push(self.asked(&mut text, output, 0.0));
            }
            Kind::Unlike => {
                tenant += 500 + self.random.u32(..8);
                text.own(self.between(256, 4096), &mut self.made);
                let output = self.between(64, 512);
                turns.push(self.asked(&mut text, output, 0.0));
            }
            Kind::Mixed => unreachable!("it is made of the others"),
        }
        (tenant, turns)
    }
}

const PARTS: [Kind; 5] = [Kind::System, Kind::Chat, Kind::Agents, Kind::Rag, Kind::Unlike];

/// The sessions that begin within `seconds`. `work` tells how many seconds of an engine a request takes; as many come
/// as keep `engines` of them busy if nothing is ever found in a cache.
pub fn make(kind: Kind, engines: f64, seconds: f64, seed: u64, work: impl Fn(&Turn) -> f64) -> Vec<Session> {
    let mut making = Making { random: Rng::with_seed(seed), made: Names::default() };
    let mut all = Vec::new();
    let kinds = if kind == Kind::Mixed { &PARTS[..] } else { &[kind] };
    for part in kinds {
        // What a session of this kind takes on average, from many that are thrown away.
        let trial: f64 = (0..400).flat_map(|_| making.session(*part).1).map(|turn| work(&turn)).sum::<f64>() / 400.0;
        let apart = trial / engines * kinds.len() as f64;
        let mut now = making.exponential(apart);
        while now < seconds {
            let (tenant, turns) = making.session(*part);
            all.push(Session { begins_s: now, tenant, turns });
            now += making.exponential(apart);
        }
    }
    all.sort_by(|one, other| one.begins_s.total_cmp(&other.begins_s));
    all
}

/// A line of Mooncake's traces (FAST 25): a block has 512 tokens, and its number tells it and all before it.
#[derive(Deserialize)]
struct Line {
    timestamp: f64,
    input_length: u32,
    output_length: u32,
    hash_ids: Vec<u64>,
}

/// Tokens of a block there.
const MOONCAKE: u32 = 512;

/// Reads a trace of Mooncake's. Times are divided by `faster`. Prompts longer than `tokens_max` are left out; how many
/// is told.
pub fn mooncake(path: &Path, faster: f64, tokens_max: u32) -> Result<(Vec<Session>, usize), Failure> {
    let text = std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
    let (mut all, mut left_out) = (Vec::new(), 0);
    // Who asks is not told. Requests with the same first blocks are taken for one tenant's.
    let mut tenants: HashMap<u64, u32> = HashMap::new();
    let mut names = Names::default();
    for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let wrong = |error: serde_json::Error| format!("{}:{}: {error}", path.display(), number + 1);
        let line: Line = serde_json::from_str(line).map_err(wrong)?;
        if line.input_length > tokens_max {
            left_out += 1;
            continue;
        }
        let mut text = Written::default();
        for id in &line.hash_ids[..line.hash_ids.len().min((line.input_length / MOONCAKE) as usize)] {
            text.shared(7 << 32 | *id, MOONCAKE);
        }
        text.own(line.input_length.saturating_sub(text.blocks.len() as u32 * BLOCK), &mut names);
        let fresh = tenants.len() as u32;
        let tenant = *tenants.entry(line.hash_ids.get(1).copied().unwrap_or_default()).or_insert(fresh);
        let (prompt, output) = (text.blocks.as_slice().into(), line.output_length.max(2));
        let turn = Turn { prompt, tail: text.tail, output, answer: Vec::new(), pause_s: 0.0 };
        all.push(Session { begins_s: line.timestamp / 1000.0 / faster, tenant, turns: vec![Rc::new(turn)] });
    }
    all.sort_by(|one, other| one.begins_s.total_cmp(&other.begins_s));
    Ok((all, left_out))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::Speed;

    fn made(kind: Kind, seed: u64) -> Vec<Session> {
        make(kind, 4.0, 60.0, seed, |turn| Speed::times(1.0).seconds_of(turn))
    }

    #[test]
    fn a_seed_makes_the_same_trace_again_and_another_seed_another() {
        let told = |seed| format!("{:?}", made(Kind::Mixed, seed));
        assert_eq!(told(1), told(1));
        assert_ne!(told(1), told(2));
    }

    #[test]
    fn the_load_is_what_was_asked_for() {
        for kind in Kind::value_variants() {
            let all: Vec<_> = (0..10).flat_map(|seed| made(*kind, seed)).collect();
            let work: f64 =
                all.iter().flat_map(|session| &session.turns).map(|turn| Speed::times(1.0).seconds_of(turn)).sum();
            let load = work / 10.0 / 60.0 / 4.0;
            assert!((0.7..1.3).contains(&load), "{kind:?}: {load}");
        }
    }

    #[test]
    fn a_conversation_begins_each_time_with_all_that_was_said_before() {
        let all = made(Kind::Chat, 3);
        let long = all.iter().find(|session| session.turns.len() > 3).unwrap();
        for pair in long.turns.windows(2) {
            let before: Vec<u64> = pair[0].prompt.iter().chain(&pair[0].answer).copied().collect();
            assert!(pair[1].prompt.starts_with(&before));
        }
    }

    #[test]
    fn documents_in_another_order_have_nothing_in_common_behind_the_first_that_differs() {
        let (mut one, mut other) = (Written::default(), Written::default());
        for (text, documents) in [(&mut one, [1, 2, 3]), (&mut other, [1, 3, 2])] {
            documents.iter().for_each(|document| text.shared(*document, 512));
        }
        let same = one.blocks.iter().zip(&other.blocks).filter(|(one, other)| one == other).count();
        assert_eq!(same, 8);
    }

    #[test]
    fn a_line_of_mooncakes_is_read_and_a_broken_one_told() {
        let path = std::env::temp_dir().join(format!("mooncake-{}.jsonl", std::process::id()));
        let line = r#"{"timestamp": 3000, "input_length": 1300, "output_length": 52, "hash_ids": [0, 1, 2]}"#;
        std::fs::write(&path, format!("{line}\n{line}\n")).unwrap();
        let (read, left_out) = mooncake(&path, 2.0, 100_000).unwrap();
        let turn = &read[0].turns[0];
        assert_eq!((read.len(), left_out, read[0].begins_s, turn.tokens()), (2, 0, 1.5, 1300));
        assert_eq!(read[1].turns[0].prompt[..16], turn.prompt[..16]);
        assert_ne!(read[1].turns[0].prompt.last(), turn.prompt.last());
        std::fs::write(&path, format!("{line}\nno\n")).unwrap();
        assert!(mooncake(&path, 1.0, 100_000).unwrap_err().to_string().contains(":2: "));
        std::fs::remove_file(&path).unwrap();
    }
}
