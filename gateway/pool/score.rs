//! Which replica a request is best at: the policies of choice, and how many seconds each replica is expected to take.
//!
//! Pure: no clock, no lock, no allocation. Counts come from the gateway's own books ([`load`](super::load)), rates are
//! learned from what it saw, and what engines tell of themselves only ever adds to that.

use schemars::JsonSchema;
use serde::Deserialize;

/// How a pool chooses among its endpoints.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Balance {
    /// The less busy of two that are drawn by weight.
    #[default]
    P2c,
    /// One after the other, each as often as its weight says.
    RoundRobin,
    /// The one with the fewest requests for its weight.
    LeastInFlight,
    /// The better of two that are drawn by weight: requests in flight, times the time that answers took lately.
    P2cEwma,
    /// Always the same one for the same key (rendezvous hashing), unless it has a quarter more than its share.
    Hash,
    /// The one that holds most of the prompt's beginning, unless it has a quarter more than its share.
    Prefix,
    /// The cheapest one; among equals the one that is expected to be done first.
    LeastCost,
    /// The least product of prompt tokens to be read and requests in flight (LMetric, arXiv 2603.15202).
    Lmetric,
    /// The one that is expected to be done first, in seconds.
    ExpectedTime,
}

/// What a request asks of whoever answers it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Asked {
    /// Tokens of the prompt, estimated from its bytes.
    pub prompt: u32,
    /// Tokens of the answer, as far as can be expected.
    pub output: u32,
    /// What stays the same for requests that belong together.
    pub key: u64,
    /// Counts the requests of the pool.
    pub turn: u64,
}

/// One endpoint that could answer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    /// Tells it from the others, whoever asks and however often.
    pub seed: u64,
    /// Its share beside the others; above zero.
    pub weight: f32,
    /// Requests on it. Exact, for this gateway.
    pub in_flight: u32,
    /// Prompt tokens that it has yet to read, without those that it holds already. Exact but for the estimate.
    pub prefill: u32,
    /// Answers that it is writing. Exact.
    pub streams: u32,
    /// Tokens that are still expected of those answers.
    pub decode: u32,
    /// How many tokens of this prompt's beginning it holds, most likely.
    pub matched: u32,
    /// Seconds that it takes to read one token of a prompt. Learned.
    pub read_s: f32,
    /// Seconds that it takes for one token of an answer when it writes no other. Learned.
    pub token_s: f32,
    /// Seconds from asking to the end of an answer, lately. Learned.
    pub answer_s: f32,
    /// Seconds since its line last moved, where requests stand in it and nothing came of any.
    pub silent_s: f32,
    /// Whether it tells which adapters it has loaded and this model is none of them.
    pub loads_adapter: bool,
    /// Nano-dollars that this request costs there; the same everywhere if nobody knows.
    pub nanousd: f32,
    /// What it tells of itself.
    pub told: Told,
}

/// What an engine tells of itself, and how much that is worth.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Told {
    /// Prompt tokens of others that wait there: of clients that do not come through this gateway.
    pub others: f32,
    /// Answers to others that it is writing.
    pub streams: f32,
    /// The share of its KV cache that is taken, 0 to 1.
    pub kv: f32,
    /// How much that counts: 1 when it has just been told, 0 when it is too old to be believed.
    pub trust: f32,
}

/// So many answers at once make each of them twice as slow as one alone: until then reading the weights takes longest.
/// At 8 billion parameters and a thousand tokens each, a batch of 32 takes about a third more than one alone.
const KNEE: f32 = 96.0;
/// Seconds until an engine has an adapter loaded.
const ADAPTER_S: f32 = 0.5;
/// What others' waiting prompts can add at most, in seconds: no engine can talk itself out of all work.
const OTHERS_S_MAX: f32 = 2.0;
/// The same for others' answers.
const OTHERS_STREAMS_MAX: f32 = 64.0;
/// The weight of the KV barrier `k / (1 - k)`, in seconds (SMG's least_load, measured there), and the `k` it ends at.
const KV_S: f32 = 0.15;
const KV_MAX: f32 = 0.95;
/// First tokens that are expected within this share of their time, or these seconds, are expected at the same: chance
/// decides, so that several gateways do not all run to one replica. (A share of the whole answer's seconds would drown
/// what a prefix is worth.)
const NEAR: f64 = 0.05;
const NEAR_S: f64 = 0.002;
/// How much more than its share an endpoint may have before `hash` and `prefix` pass it over (bounded loads, arXiv
/// 1608.01350).
const CROWDED: f32 = 1.25;
/// So many requests are nobody's crowd, however few the others have.
const FEW: u32 = 3;
/// Stands for "last of all".
const LAST: f64 = 1e15;
/// What is told counts fully for so many seconds, and after so many not at all.
const FRESH_S: f32 = 1.5;
const STALE_S: f32 = 10.0;

impl Default for Candidate {
    fn default() -> Self {
        Self {
            seed: 0,
            weight: 1.0,
            in_flight: 0,
            prefill: 0,
            streams: 0,
            decode: 0,
            matched: 0,
            read_s: READ_S,
            token_s: TOKEN_S,
            answer_s: 0.0,
            silent_s: 0.0,
            loads_adapter: false,
            nanousd: 0.0,
            told: Told::default(),
        }
    }
}

/// Before anything was learned: a model of 8 billion parameters on one GPU of a data centre.
pub const READ_S: f32 = 1.0 / 8_000.0;
/// The same, for the seconds of a token.
pub const TOKEN_S: f32 = 0.012;

/// How much slower each answer is that is one of so many.
pub fn crowding(streams: u32) -> f32 {
    1.0 + streams as f32 / KNEE
}

impl Told {
    /// How much something counts that was told so many seconds ago.
    pub fn trust(age_s: f32) -> f32 {
        ((STALE_S - age_s) / (STALE_S - FRESH_S)).clamp(0.0, 1.0)
    }

    /// The seconds that a full KV cache costs: little up to two thirds, then ever more.
    fn pressure_s(&self) -> f32 {
        if self.trust == 0.0 {
            return 0.0;
        }
        let taken = self.kv.clamp(0.0, KV_MAX);
        self.trust * KV_S * taken / (1.0 - taken)
    }
}

impl Candidate {
    /// Prompt tokens that it would have to read for this request.
    pub fn unread(&self, asked: &Asked) -> u32 {
        // The last token is always computed: it is what the answer grows from.
        asked.prompt.saturating_sub(self.matched).max(1)
    }

    /// Seconds until the first token is expected.
    pub fn first_token_s(&self, asked: &Asked) -> f32 {
        let work = self.prefill.saturating_add(self.unread(asked)) as f32 * self.read_s;
        let others = self.told.trust * (self.told.others * self.read_s).min(OTHERS_S_MAX);
        // What is overdue may well stay so for as long again.
        let overdue = (self.silent_s - self.prefill as f32 * self.read_s).max(0.0);
        let adapter = if self.loads_adapter { ADAPTER_S } else { 0.0 };
        work + others + overdue + adapter
    }

    /// Seconds that the answer is expected to take after its first token. What is written beside it slows it down for as
    /// long as both last.
    pub fn rest_s(&self, asked: &Asked) -> f32 {
        let output = asked.output as f32;
        let beside = (self.decode as f32).min(self.streams as f32 * output);
        let others = self.told.trust * self.told.streams.min(OTHERS_STREAMS_MAX) * output;
        self.token_s * (output + (output + beside + others) * (1.0 / KNEE))
    }

    /// Seconds that it is expected to take for everything, with what a full cache would cost.
    pub fn expected_s(&self, asked: &Asked) -> f32 {
        self.expected_after(self.first_token_s(asked), asked)
    }

    /// The same where it is known after how many seconds the first token is expected.
    fn expected_after(&self, first: f32, asked: &Asked) -> f32 {
        first + self.rest_s(asked) + self.told.pressure_s()
    }

    fn busy(&self, more: u32) -> f64 {
        f64::from(self.in_flight + more) / f64::from(self.weight)
    }
}

/// One of the best.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Placed {
    /// Its place among the candidates.
    pub index: usize,
    /// What it was judged by: less is better. Seconds, for `expected_time`.
    pub score: f64,
}

/// The best three of the candidates, the best one first.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ranked([Placed; 3]);

/// Stands where there is no candidate.
const NOBODY: Placed = Placed { index: usize::MAX, score: f64::INFINITY };

impl Default for Ranked {
    fn default() -> Self {
        Self([NOBODY; 3])
    }
}

impl Ranked {
    /// The best ones, the best first.
    pub fn iter(&self) -> impl Iterator<Item = Placed> + '_ {
        self.0.into_iter().filter(|placed| placed.index != NOBODY.index)
    }

    /// The best one.
    pub fn first(&self) -> Option<Placed> {
        self.iter().next()
    }

    /// Takes it in, if it is one of them.
    #[inline]
    pub fn add(&mut self, placed: Placed) {
        let [first, second, third] = &mut self.0;
        if placed.score >= third.score {
            return;
        }
        *third = placed;
        if third.score < second.score {
            std::mem::swap(second, third);
        }
        if second.score < first.score {
            std::mem::swap(first, second);
        }
    }
}

impl Balance {
    /// Its name in policies.
    pub const fn name(self) -> &'static str {
        match self {
            Self::P2c => "p2c",
            Self::RoundRobin => "round_robin",
            Self::LeastInFlight => "least_in_flight",
            Self::P2cEwma => "p2c_ewma",
            Self::Hash => "hash",
            Self::Prefix => "prefix",
            Self::LeastCost => "least_cost",
            Self::Lmetric => "lmetric",
            Self::ExpectedTime => "expected_time",
        }
    }

    /// Whether it asks what endpoints have to do, in tokens.
    pub const fn weighs(self) -> bool {
        !matches!(self, Self::P2c | Self::RoundRobin | Self::LeastInFlight | Self::Hash)
    }

    /// Whether it asks how much of a prompt an endpoint holds.
    pub const fn matches_prefixes(self) -> bool {
        matches!(self, Self::Prefix | Self::LeastCost | Self::Lmetric | Self::ExpectedTime)
    }

    /// The best of `candidates`. `chance` gives numbers from 0 to 1.
    pub fn rank(self, asked: &Asked, candidates: &[Candidate], chance: &mut impl FnMut() -> f64) -> Ranked {
        match self {
            Self::P2c => the_better_of_two(candidates, chance, |one, more| one.busy(more)),
            Self::P2cEwma => {
                the_better_of_two(candidates, chance, |one, _| f64::from(one.in_flight + 1) * latency(one))
            }
            Self::RoundRobin => in_turn(asked.turn, candidates),
            Self::Hash => bounded(candidates, |one| rendezvous(one, asked.key)),
            Self::Prefix => bounded(candidates, |one| {
                let busy = one.busy(1);
                f64::from(one.unread(asked)) + busy / (busy + 1.0) * (1.0 - 1e-6 * chance())
            }),
            Self::LeastInFlight | Self::LeastCost | Self::Lmetric | Self::ExpectedTime => {
                ranked(candidates, |one| self.alone(asked, one, chance))
            }
        }
    }

    /// Whether it judges each candidate by itself, whatever the others are.
    pub const fn judges_alone(self) -> bool {
        matches!(self, Self::LeastInFlight | Self::LeastCost | Self::Lmetric | Self::ExpectedTime)
    }

    /// What a candidate is worth by itself: less is better. All the same to a policy that does not judge so.
    #[inline(always)] // So that it is compiled for each balance that is a constant.
    pub fn alone(self, asked: &Asked, one: &Candidate, chance: &mut impl FnMut() -> f64) -> f64 {
        match self {
            Self::LeastInFlight => one.busy(1) * (1.0 + 1e-6 * chance()),
            Self::LeastCost => {
                let seconds = f64::from(one.expected_s(asked)) / f64::from(one.weight);
                f64::from(one.nanousd.ceil()) + seconds / (seconds + 1.0) * (1.0 - NEAR * chance())
            }
            Self::Lmetric => {
                let unread = f64::from(one.prefill) + f64::from(one.unread(asked));
                unread * one.busy(1) * (1.0 + NEAR * chance())
            }
            Self::ExpectedTime => {
                let first = one.first_token_s(asked);
                let whole = f64::from(one.expected_after(first, asked));
                // Nearly always it is one, and a division takes as long as all the rest.
                let whole = if one.weight == 1.0 { whole } else { whole / f64::from(one.weight) };
                whole + (NEAR_S + NEAR * f64::from(first)) * chance()
            }
            Self::P2c | Self::P2cEwma | Self::RoundRobin | Self::Hash | Self::Prefix => 0.0,
        }
    }
}

fn ranked(candidates: &[Candidate], mut score: impl FnMut(&Candidate) -> f64) -> Ranked {
    let mut best = Ranked::default();
    for (index, candidate) in candidates.iter().enumerate() {
        best.add(Placed { index, score: score(candidate) });
    }
    best
}

/// Those that have more than their share of the requests come last.
fn bounded(candidates: &[Candidate], mut score: impl FnMut(&Candidate) -> f64) -> Ranked {
    let (busy, weight) =
        candidates.iter().fold((1.0, 0.0), |(busy, weight), one| (busy + one.in_flight as f32, weight + one.weight));
    let share = CROWDED * busy / weight;
    ranked(candidates, |one| {
        let crowded = one.in_flight >= FEW && one.in_flight as f32 + 1.0 > (share * one.weight).ceil();
        score(one) + if crowded { LAST } else { 0.0 }
    })
}

/// The seconds of its answers; of one that has given none yet, so few that it is tried.
fn latency(one: &Candidate) -> f64 {
    f64::from(one.answer_s.max(1e-3))
}

/// Weighted rendezvous hashing: every key has its own order of the endpoints, and one that comes or goes moves only
/// its own keys.
fn rendezvous(one: &Candidate, key: u64) -> f64 {
    let mixed = mix(one.seed ^ mix(key));
    // In (0, 1).
    let draw = ((mixed >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
    -draw.ln() / f64::from(one.weight)
}

/// SplitMix64's finalizer.
const fn mix(mut bits: u64) -> u64 {
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

/// The turn falls on a point of the line on which each has its weight, and those behind it follow. The golden ratio
/// spreads turns evenly over the line, so that a heavy one does not get all of its turns in a row.
fn in_turn(turn: u64, candidates: &[Candidate]) -> Ranked {
    let count = candidates.len();
    let Some(weight) = candidates.first().map(|one| one.weight) else { return Ranked::default() };
    let first = if candidates.iter().all(|one| one.weight == weight) {
        (turn % count as u64) as usize
    } else {
        let whole: f64 = candidates.iter().map(|one| f64::from(one.weight)).sum();
        let mut point = (turn.wrapping_mul(GOLDEN) >> 11) as f64 / (1u64 << 53) as f64 * whole;
        let found = candidates.iter().position(|one| {
            point -= f64::from(one.weight);
            point < 0.0
        });
        found.unwrap_or(0)
    };
    let mut ranked = Ranked::default();
    (0..count.min(3)).for_each(|n| ranked.0[n] = Placed { index: (first + n) % count, score: n as f64 });
    ranked
}

/// 2^64 divided by the golden ratio.
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// Two are drawn by weight (Efraimidis and Spirakis 2006, weighted sampling in one pass). The first is taken unless
/// the second, with one request more, would be no busier than the first is already: among equals that is the less busy
/// one; among idle ones, whatever their weights, the draw stands, so weights are shares.
fn the_better_of_two(
    candidates: &[Candidate],
    chance: &mut impl FnMut() -> f64,
    busy: impl Fn(&Candidate, u32) -> f64,
) -> Ranked {
    let mut drawn = Ranked::default();
    for (index, candidate) in candidates.iter().enumerate() {
        let key = chance();
        let key = if candidate.weight == 1.0 { key } else { key.powf(1.0 / f64::from(candidate.weight)) };
        drawn.add(Placed { index, score: -key });
    }
    let [first, second, _] = &mut drawn.0;
    if second.index != NOBODY.index {
        (first.score, second.score) = (busy(&candidates[first.index], 0), busy(&candidates[second.index], 1));
        if first.score >= second.score {
            std::mem::swap(first, second);
        }
    }
    drawn
}

#[cfg(test)]
mod tests {
    use super::*;

    const ASKED: Asked = Asked { prompt: 6_000, output: 200, key: 7, turn: 0 };
    const ALL: [Balance; 9] = [
        Balance::P2c,
        Balance::RoundRobin,
        Balance::LeastInFlight,
        Balance::P2cEwma,
        Balance::Hash,
        Balance::Prefix,
        Balance::LeastCost,
        Balance::Lmetric,
        Balance::ExpectedTime,
    ];

    fn idle(count: u64) -> Vec<Candidate> {
        (0..count).map(|n| Candidate { seed: mix(n + 1), ..Candidate::default() }).collect()
    }

    /// How often each is chosen in `times` turns.
    fn shares(balance: Balance, asked: Asked, candidates: &[Candidate], times: u64) -> Vec<u64> {
        let mut random = fastrand::Rng::with_seed(1);
        let mut shares = vec![0; candidates.len()];
        for turn in 0..times {
            let ranked = balance.rank(&Asked { turn, ..asked }, candidates, &mut || random.f64());
            shares[ranked.first().unwrap().index] += 1;
        }
        shares
    }

    fn best(balance: Balance, candidates: &[Candidate]) -> usize {
        balance.rank(&ASKED, candidates, &mut || 0.5).first().unwrap().index
    }

    #[test]
    fn every_policy_answers_for_none_one_and_many() {
        for balance in ALL {
            for count in [0, 1, 2, 3, 100] {
                let candidates = idle(count);
                let ranked = balance.rank(&ASKED, &candidates, &mut || 0.5);
                let placed: Vec<usize> = ranked.iter().map(|placed| placed.index).collect();
                assert_eq!(placed.len(), (count as usize).min(3), "{}", balance.name());
                assert!(placed.iter().all(|index| *index < candidates.len()));
                assert!(placed.iter().enumerate().all(|(n, index)| !placed[..n].contains(index)), "{placed:?}");
            }
        }
    }

    #[test]
    fn equals_share_alike_whatever_the_policy() {
        let candidates = idle(4);
        for balance in ALL.into_iter().filter(|balance| *balance != Balance::Hash) {
            let shares = shares(balance, ASKED, &candidates, 4_000);
            assert!(shares.iter().all(|share| (850..=1_150).contains(share)), "{}: {shares:?}", balance.name());
        }
    }

    #[test]
    fn weights_are_shares_where_turns_are_taken() {
        let mut candidates = idle(3);
        candidates[1].weight = 2.0;
        let shares = shares(Balance::RoundRobin, ASKED, &candidates, 4_000);
        assert!(shares[1].abs_diff(2_000) < 5 && shares[0].abs_diff(1_000) < 5, "{shares:?}");
    }

    #[test]
    fn a_replica_that_holds_the_prompt_is_better_until_its_line_costs_more_than_reading_it_anew() {
        let mut candidates = idle(2);
        candidates[1].matched = 5_000;
        assert_eq!(best(Balance::ExpectedTime, &candidates), 1);
        candidates[1].prefill = 4_000;
        assert_eq!(best(Balance::ExpectedTime, &candidates), 1);
        candidates[1].prefill = 7_000;
        assert_eq!(best(Balance::ExpectedTime, &candidates), 0);
    }

    #[test]
    fn chance_never_outweighs_what_a_prefix_is_worth() {
        let mut candidates = idle(8);
        candidates[3].matched = 1_500;
        let asked = Asked { prompt: 2_000, output: 2_000, ..ASKED };
        assert_eq!(shares(Balance::ExpectedTime, asked, &candidates, 500)[3], 500, "however long the answer is");
    }

    #[test]
    fn a_faster_gpu_is_better_by_what_it_has_shown() {
        let mut candidates = idle(2);
        candidates[0].read_s /= 4.0;
        candidates[0].prefill = 12_000;
        assert_eq!(best(Balance::ExpectedTime, &candidates), 0, "a line twice as long that moves four times as fast");
        candidates[0].prefill = 24_000;
        assert_eq!(best(Balance::ExpectedTime, &candidates), 1);
    }

    #[test]
    fn every_answer_that_is_being_written_slows_the_next_one() {
        let mut candidates = idle(2);
        (candidates[0].streams, candidates[0].decode) = (8, 1_600);
        assert_eq!(best(Balance::ExpectedTime, &candidates), 1);
        let beside = |decode| Candidate { streams: 95, decode, ..Candidate::default() }.rest_s(&ASKED);
        assert!((beside(95 * 200) / (200.0 * TOKEN_S) - 2.0).abs() < 1e-3);
        assert!(beside(95) < beside(95 * 100), "those that are nearly done slow it less");
    }

    #[test]
    fn what_an_engine_tells_of_itself_only_ever_adds() {
        let silent = Candidate::default();
        for lie in [0.0, -1e30, f32::NEG_INFINITY] {
            let told = Told { kv: lie, trust: 1.0, ..Told::default() };
            assert_eq!(Candidate { told, ..silent }.expected_s(&ASKED), silent.expected_s(&ASKED));
        }
        let told = Told { others: 1e30, streams: 1e30, kv: 1e30, trust: 1.0 };
        let most = Candidate { told, ..silent }.expected_s(&ASKED) - silent.expected_s(&ASKED);
        assert!((2.0..=OTHERS_S_MAX + KV_S * 20.0 + 2.0 * 200.0 * TOKEN_S).contains(&most), "{most}");
        let stale = Told { trust: Told::trust(11.0), ..told };
        assert_eq!(Candidate { told: stale, ..silent }.expected_s(&ASKED), silent.expected_s(&ASKED));
    }

    #[test]
    fn what_was_told_counts_less_with_every_second() {
        assert_eq!([Told::trust(0.0), Told::trust(1.5), Told::trust(10.0)], [1.0, 1.0, 0.0]);
        assert!(Told::trust(3.0) > Told::trust(6.0));
    }

    #[test]
    fn one_from_which_nothing_comes_any_more_is_left_alone() {
        let mut candidates = idle(2);
        candidates[0].prefill = 100;
        candidates[0].silent_s = 3.0;
        candidates[0].matched = 5_000;
        assert_eq!(best(Balance::ExpectedTime, &candidates), 1);
    }

    #[test]
    fn a_loaded_adapter_is_worth_half_a_second() {
        let mut candidates = idle(2);
        candidates[0].loads_adapter = true;
        assert_eq!(best(Balance::ExpectedTime, &candidates), 1);
        candidates[1].prefill = 5_000;
        assert_eq!(best(Balance::ExpectedTime, &candidates), 0);
    }

    #[test]
    fn a_key_stays_where_it_is_and_only_those_of_one_that_leaves_move() {
        let candidates = idle(5);
        let place = |key, candidates: &[Candidate]| {
            let ranked = Balance::Hash.rank(&Asked { key, ..ASKED }, candidates, &mut || 0.5);
            candidates[ranked.first().unwrap().index].seed
        };
        let (mut moved, gone) = (0, candidates[4].seed);
        for key in 0..1_000 {
            let (before, after) = (place(key, &candidates), place(key, &candidates[..4]));
            assert!(before == after || before == gone);
            moved += u32::from(before != after);
        }
        assert!((150..=250).contains(&moved), "{moved}");
    }

    #[test]
    fn a_crowded_replica_is_passed_over_by_hash_and_by_prefix() {
        let mut candidates = idle(4);
        let home = best(Balance::Hash, &candidates);
        candidates[home].matched = 5_000;
        candidates[home].in_flight = 1;
        assert_eq!(best(Balance::Prefix, &candidates), home, "one is nobody's crowd");
        candidates[home].in_flight = 9;
        candidates.iter_mut().filter(|one| one.in_flight == 0).for_each(|one| one.in_flight = 2);
        assert_ne!(best(Balance::Hash, &candidates), home);
        assert_ne!(best(Balance::Prefix, &candidates), home);
        assert_eq!(best(Balance::ExpectedTime, &candidates), home, "this one counts seconds, not heads");
    }

    #[test]
    fn the_cheapest_wins_and_among_equals_the_soonest() {
        let mut candidates = idle(3);
        candidates.iter_mut().for_each(|one| one.nanousd = 900.0);
        candidates[2].nanousd = 800.0;
        candidates[2].prefill = 1_000_000;
        assert_eq!(best(Balance::LeastCost, &candidates), 2);
        candidates[2].nanousd = 900.0;
        candidates[0].prefill = 10_000;
        assert_eq!(best(Balance::LeastCost, &candidates), 1);
    }

    #[test]
    fn lmetric_weighs_unread_prompts_by_the_crowd() {
        let mut candidates = idle(2);
        candidates[0].matched = 3_000;
        candidates[0].in_flight = 2;
        assert_eq!(best(Balance::Lmetric, &candidates), 1, "3,000 tokens times 3 requests against 6,000 times 1");
        candidates[1].in_flight = 1;
        assert_eq!(best(Balance::Lmetric, &candidates), 0);
    }
}
