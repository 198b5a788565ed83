//! Which of several models is best for a request: a shortlist, weighed by what the policy says matters.
//!
//! Each of the four terms is a number from 0 to 1, and 1 is the best there is. Quality is the policy's own number. Price
//! and first token are compared as people compare them, by ratios: the least of the shortlist has 1, and each doubling
//! takes an eighth. Load is the share that is free. The score is the mean of the terms by their weights, so that with
//! `quality: 2, price: 1` four doublings of the price weigh as much as a quarter of quality, whoever else is on the list.
//!
//! Where a conversation has been read by one of them, the others would have to read it again: another one takes over
//! only if its score, once it had read it, is better by more than that costs.

use std::cmp::Ordering;

use schemars::JsonSchema;
use serde::Deserialize;

use super::Wrong;
use crate::semantic::ln;

/// Models of which the best answers, weighed anew for each request. What a model cannot do (`can`), and where a tenant's
/// requests may not go (`regions`), no weight outvotes.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[schemars(rename = "Shortlist")]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// How much each term counts beside the others. What is not weighed is not measured.
    pub weigh: Weights,
    /// The models, two of them at least. Of equals the first one answers.
    #[schemars(length(min = 2, max = 16))]
    pub models: Vec<Listed>,
    /// How long a model's server is taken to hold what it has read of a conversation, in seconds, where its pool keeps no
    /// index of that.
    #[serde(default = "five_minutes")]
    pub held_s: u64,
}

/// How much each term counts. At least one counts something.
#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize, JsonSchema)]
#[schemars(rename = "ShortlistWeights")]
#[serde(deny_unknown_fields, default)]
pub struct Weights {
    /// The `quality` that the policy gives each model.
    #[schemars(range(min = 0.0, max = 1000.0))]
    pub quality: f32,
    /// What the request is expected to cost, by `prices`: tokens of the prompt that are read anew, those that are held,
    /// and those of an answer of the usual length.
    #[schemars(range(min = 0.0, max = 1000.0))]
    pub price: f32,
    /// The expected time to the first token: of a pool whose balance measures that, such as `expected_time`.
    #[schemars(range(min = 0.0, max = 1000.0))]
    pub first_token: f32,
    /// The share of the pool that is taken: of `concurrency.max`, or else of 96 requests on each of its endpoints, which
    /// is where an answer takes twice as long as alone.
    #[schemars(range(min = 0.0, max = 1000.0))]
    pub load: f32,
}

/// A model on a shortlist.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[schemars(rename = "ShortlistModel")]
#[serde(deny_unknown_fields)]
pub struct Listed {
    /// One of `models`.
    pub model: String,
    /// How good it is at what is decided here, from 0 to 1: yours to say. Needed where quality is weighed.
    #[serde(default)]
    #[schemars(range(min = 0.0, max = 1.0))]
    pub quality: Option<f32>,
}

fn five_minutes() -> u64 {
    300
}

/// The most models that one shortlist has.
pub const MOST: usize = 16;
/// So many doublings of a price or a time are the whole term.
const DOUBLINGS: f64 = 8.0;
/// Requests that cost less than a thousandth of a cent cost the same, in nano-dollars.
const LEAST_NANOUSD: f32 = 10_000.0;
/// Nobody notices which of two first tokens came sooner that both come within this.
const LEAST_S: f32 = 0.05;

/// What is known of one model for one request.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Candidate {
    /// What the policy says of it.
    pub quality: f32,
    /// What the request takes there as things stand.
    pub now: Takes,
    /// What it would take had the model read all that the conversation's own has.
    pub settled: Takes,
    /// The share of its pool that is taken, 0 to 1.
    pub load: f32,
}

/// What a request takes of money and time, as far as that is known.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Takes {
    /// Nano-dollars.
    pub nanousd: Option<f32>,
    /// Seconds to the first token.
    pub first_token_s: Option<f32>,
}

/// What came of one candidate.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Judged {
    /// Its terms, those that are weighed: quality, price, first token, load.
    pub terms: [Option<f32>; 4],
    /// Their mean by weight.
    pub score: f32,
    /// What is taken off for reading the conversation again.
    pub loss: f32,
}

impl Judged {
    /// What it is compared by.
    pub fn worth(&self) -> f32 {
        self.score - self.loss
    }
}

/// Which one is best.
#[derive(Clone, Debug, PartialEq)]
pub struct Verdict {
    /// Its place among the candidates.
    pub best: usize,
    /// How far the next one is behind it.
    pub margin: f32,
    /// What came of each, in their order.
    pub judged: Vec<Judged>,
}

/// What is wrong with a shortlist, each with its key below it.
pub fn wrong(config: &Config) -> Vec<Wrong> {
    let mut wrong = Vec::new();
    let mut say = |path: String, message: &str| wrong.push((path, message.to_owned()));
    if !(2..=MOST).contains(&config.models.len()) {
        say(".models".into(), "must have 2 to 16 models: name one alone where the decision is");
    }
    let weights = config.weigh.all();
    if !weights.iter().all(|weight| (0.0..=1000.0).contains(weight)) || weights.iter().all(|weight| *weight == 0.0) {
        say(".weigh".into(), "must have numbers from 0 to 1000, and one at least that is more than 0");
    }
    for (at, listed) in config.models.iter().enumerate() {
        if config.models[..at].iter().any(|other| other.model == listed.model) {
            say(format!(".models[{at}].model"), "is on the list already");
        }
        match listed.quality {
            None if config.weigh.quality > 0.0 => {
                say(format!(".models[{at}]"), "quality is weighed: say how good it is, from 0 to 1");
            }
            Some(quality) if !(0.0..=1.0).contains(&quality) => {
                say(format!(".models[{at}].quality"), "must be from 0 to 1");
            }
            _ => {}
        }
    }
    wrong
}

impl Weights {
    fn all(&self) -> [f32; 4] {
        [self.quality, self.price, self.first_token, self.load]
    }

    /// The best of `candidates`, of which there is one at least. `stays` is the place of the one that has read the
    /// conversation: among equals it stays, and otherwise the first one wins.
    pub fn judge(&self, candidates: &[Candidate], stays: Option<usize>) -> Verdict {
        let least = Least::of(candidates);
        let judge = |(at, candidate): (usize, &Candidate)| {
            let terms = self.terms(candidate, &least);
            let loss = if stays.is_none_or(|stays| stays == at) { 0.0 } else { self.loss(candidate) };
            Judged { terms, score: self.mean(terms), loss }
        };
        let judged: Vec<Judged> = candidates.iter().enumerate().map(judge).collect();
        let better =
            |one: usize, other: usize| judged[one].worth().total_cmp(&judged[other].worth()) == Ordering::Greater;
        let first = stays.filter(|stays| *stays < judged.len()).unwrap_or(0);
        let best = (0..judged.len()).fold(first, |best, next| if better(next, best) { next } else { best });
        let others = judged.iter().enumerate().filter(|(at, _)| *at != best).map(|(_, other)| other.worth());
        let second = others.max_by(f32::total_cmp);
        let margin = second.map_or(1.0, |second| judged[best].worth() - second);
        Verdict { best, margin, judged }
    }

    /// What is weighed and not known counts as the worst.
    fn terms(&self, candidate: &Candidate, least: &Least) -> [Option<f32>; 4] {
        let Takes { nanousd, first_token_s } = candidate.settled;
        let terms = [
            candidate.quality,
            nanousd.map_or(0.0, |is| ratio(is, least.nanousd, LEAST_NANOUSD)),
            first_token_s.map_or(0.0, |is| ratio(is, least.first_token_s, LEAST_S)),
            1.0 - candidate.load,
        ];
        let mut weighed = self.all().into_iter().zip(terms).map(|(weight, term)| (weight > 0.0).then_some(term));
        std::array::from_fn(|_| weighed.next().flatten().map(|term| term.clamp(0.0, 1.0)))
    }

    fn mean(&self, terms: [Option<f32>; 4]) -> f32 {
        let weights = self.all();
        let sum: f32 = weights.iter().zip(terms).map(|(weight, term)| weight * term.unwrap_or(0.0)).sum();
        sum / weights.iter().sum::<f32>()
    }

    /// What reading the conversation again costs this one, in the units of scores: the doublings of its price and of its
    /// first token, by their weights. Where neither is weighed, the larger of the two counts whole, so that a conversation
    /// is not torn from its model by a hair of quality or load.
    fn loss(&self, candidate: &Candidate) -> f32 {
        let (now, settled) = (candidate.now, candidate.settled);
        let more = |now: Option<f32>, settled: Option<f32>, floor| {
            now.zip(settled).map_or(0.0, |(now, settled)| doublings(now, settled, floor).max(0.0))
        };
        let price = more(now.nanousd, settled.nanousd, LEAST_NANOUSD);
        let time = more(now.first_token_s, settled.first_token_s, LEAST_S);
        if self.price + self.first_token == 0.0 {
            return price.max(time);
        }
        (self.price * price + self.first_token * time) / self.all().iter().sum::<f32>()
    }
}

/// What the cheapest and the fastest take.
struct Least {
    nanousd: f32,
    first_token_s: f32,
}

impl Least {
    fn of(candidates: &[Candidate]) -> Self {
        let least = |of: fn(&Takes) -> Option<f32>| {
            candidates.iter().filter_map(|candidate| of(&candidate.settled)).fold(f32::MAX, f32::min)
        };
        Self { nanousd: least(|takes| takes.nanousd), first_token_s: least(|takes| takes.first_token_s) }
    }
}

/// 1 for the least, an eighth less for each doubling, 0 from 256 times on.
fn ratio(is: f32, least: f32, floor: f32) -> f32 {
    1.0 - doublings(is, least, floor)
}

/// How often `least` must be doubled to be as much, in eighths. By a logarithm of the house: the same on every machine.
fn doublings(is: f32, least: f32, floor: f32) -> f32 {
    let ratio = f64::from(is.max(floor)) / f64::from(least.max(floor));
    (ln(ratio) / std::f64::consts::LN_2 / DOUBLINGS) as f32
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const EVEN: Weights = Weights { quality: 1.0, price: 1.0, first_token: 1.0, load: 1.0 };

    fn takes(dollars: f32, seconds: f32) -> Takes {
        Takes { nanousd: Some(dollars * 1e9), first_token_s: Some(seconds) }
    }

    fn candidate(quality: f32, dollars: f32, seconds: f32, load: f32) -> Candidate {
        let takes = takes(dollars, seconds);
        Candidate { quality, now: takes, settled: takes, load }
    }

    fn near(one: f32, other: f32) -> bool {
        (one - other).abs() < 1e-5
    }

    #[test]
    fn each_doubling_takes_an_eighth_and_a_weight_is_a_share() {
        let judged = |weights: Weights| {
            let all = [candidate(0.5, 0.001, 0.5, 0.0), candidate(0.75, 0.016, 2.0, 0.5)];
            weights.judge(&all, None).judged[1]
        };
        let all = judged(EVEN);
        assert!(near(all.terms[1].unwrap(), 0.5) && near(all.terms[2].unwrap(), 0.75), "{all:?}");
        assert!(near(all.score, (0.75 + 0.5 + 0.75 + 0.5) / 4.0), "{all:?}");
        let priced = judged(Weights { quality: 2.0, price: 1.0, ..Weights::default() });
        assert!(near(priced.score, (2.0 * 0.75 + 0.5) / 3.0) && priced.terms[3].is_none(), "{priced:?}");
    }

    #[test]
    fn four_doublings_of_the_price_weigh_as_much_as_a_quarter_of_quality_at_half_its_weight() {
        let weights = Weights { quality: 2.0, price: 1.0, ..Weights::default() };
        let all = [candidate(0.5, 0.001, 1.0, 0.0), candidate(0.75, 0.016, 1.0, 0.0)];
        let verdict = weights.judge(&all, None);
        assert!(near(verdict.judged[0].score, verdict.judged[1].score), "{verdict:?}");
        let dearer = [all[0], candidate(0.75, 0.017, 1.0, 0.0)];
        assert_eq!(weights.judge(&dearer, None).best, 0);
        let better = [all[0], candidate(0.76, 0.016, 1.0, 0.0)];
        assert_eq!(weights.judge(&better, None).best, 1);
    }

    #[test]
    fn of_equals_the_first_one_answers_unless_another_has_the_conversation() {
        let same = [candidate(0.5, 0.01, 1.0, 0.2); 3];
        assert_eq!(EVEN.judge(&same, None).best, 0);
        assert_eq!(EVEN.judge(&same, Some(2)).best, 2);
        assert_eq!(EVEN.judge(&same, Some(2)).margin, 0.0);
    }

    #[test]
    fn what_is_too_little_to_notice_makes_no_difference() {
        let all = [candidate(0.5, 0.000_009, 0.049, 0.0), candidate(0.5, 0.000_001, 0.001, 0.0)];
        let verdict = EVEN.judge(&all, None);
        assert_eq!((verdict.best, verdict.margin), (0, 0.0));
    }

    #[test]
    fn what_is_weighed_and_not_known_counts_as_the_worst() {
        let unknown = Candidate { quality: 0.5, ..Candidate::default() };
        let verdict = EVEN.judge(&[unknown, candidate(0.5, 5.0, 60.0, 0.0)], None);
        assert_eq!((verdict.best, verdict.judged[0].terms[1]), (1, Some(0.0)));
    }

    /// One that has read the conversation, and one that would cost `times` as much as once it had read it.
    fn torn(gain: f32, times: f32) -> [Candidate; 2] {
        let stays = candidate(0.5, 0.01, 1.0, 0.0);
        let settled = takes(0.01, 1.0);
        [stays, Candidate { quality: 0.5 + gain, now: takes(0.01 * times, times), settled, load: 0.0 }]
    }

    #[test]
    fn another_takes_a_conversation_over_only_if_its_gain_is_more_than_the_loss() {
        let weights = Weights { quality: 1.0, price: 1.0, ..Weights::default() };
        // Four times the price is a quarter, of which half counts.
        for (gain, best) in [(0.2, 0), (0.24, 0), (0.26, 1)] {
            let verdict = weights.judge(&torn(gain, 4.0), Some(0));
            assert_eq!(verdict.best, best, "{gain}: {verdict:?}");
            assert!(near(verdict.judged[1].loss, 0.125), "{verdict:?}");
            assert_eq!(weights.judge(&torn(gain, 4.0), None).best, 1, "no conversation, nothing to lose");
        }
    }

    #[test]
    fn where_neither_money_nor_time_is_weighed_the_loss_counts_whole() {
        let weights = Weights { quality: 1.0, ..Weights::default() };
        for (gain, best) in [(0.2, 0), (0.26, 1)] {
            assert_eq!(weights.judge(&torn(gain, 4.0), Some(0)).best, best, "{gain}");
        }
    }

    #[test]
    fn what_cannot_be_meant_is_told_with_its_key() {
        let wrong = |json: &str| wrong(&serde_json::from_str(json).unwrap());
        let told = wrong(
            r#"{"weigh": {"quality": 1, "load": -1}, "models": [{"model": "a"}, {"model": "a", "quality": 1.5}]}"#,
        );
        let keys: Vec<&str> = told.iter().map(|(key, _)| key.as_str()).collect();
        assert_eq!(keys, [".weigh", ".models[0]", ".models[1].model", ".models[1].quality"]);
        let told = wrong(r#"{"weigh": {}, "models": [{"model": "a"}]}"#);
        assert_eq!(told.iter().map(|(key, _)| key.as_str()).collect::<Vec<_>>(), [".models", ".weigh"]);
    }

    proptest! {
        #[test]
        fn a_third_one_changes_nothing_between_two(
            ones in prop::array::uniform3((0.0f32..=1.0, 0.001f32..0.05, 0.1f32..4.0, 0.0f32..=1.0)),
        ) {
            let all = ones.map(|(quality, dollars, seconds, load)| candidate(quality, dollars, seconds, load));
            let gap = |judged: &[Judged]| judged[0].score - judged[1].score;
            let (two, three) = (EVEN.judge(&all[..2], None), EVEN.judge(&all, None));
            prop_assert!((gap(&two.judged) - gap(&three.judged)).abs() < 1e-4);
        }

        #[test]
        fn scores_are_shares_and_the_best_is_the_best(
            ones in prop::collection::vec((0.0f32..=1.0, 0.0f32..1e3, 0.0f32..1e4, 0.0f32..=1.0), 1..MOST),
            stays in prop::option::of(0usize..MOST),
        ) {
            let all: Vec<Candidate> = ones.iter().map(|&(q, d, s, l)| candidate(q, d, s, l)).collect();
            let verdict = EVEN.judge(&all, stays);
            prop_assert!(verdict.judged.iter().all(|one| (0.0..=1.0).contains(&one.score) && one.loss >= 0.0));
            prop_assert!(verdict.judged.iter().all(|one| one.worth() <= verdict.judged[verdict.best].worth()));
            prop_assert!(verdict.margin >= 0.0);
        }
    }
}
