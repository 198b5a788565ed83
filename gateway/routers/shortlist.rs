//! Models of which the best answers: what each would take is measured, and what comes of that goes on record.

use std::fmt::Write;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use infergate_plugins::router::score::{Candidate, Judged, Takes, Weights};
use schemars::JsonSchema;
use serde::Serialize;
use smallvec::SmallVec;

use super::case::{Case, Unfit};
use super::conversations::Kept;
use crate::audit::record::Text;
use crate::money::bill::cached;
use crate::money::book::Book;
use crate::money::{Cached, NanoUsd};
use crate::policy::{Route, Stage};
use crate::pool::outlook::Outlook;
use crate::pool::score::Asked;
use crate::pool::{Upstream, Wanted};
use crate::usage::Usage;
use crate::weighing;

/// Where no index says what servers hold, they are taken to hold nothing of a prompt that is shorter: no cloud's cache does.
const LEAST_HELD: u32 = 1_024;

/// A shortlist of the policy.
#[derive(Debug)]
pub struct Shortlist {
    /// Its name.
    pub name: Arc<str>,
    /// How much each term counts.
    pub weights: Weights,
    /// The models, in the order of the file.
    pub models: Vec<Listed>,
    /// How long servers hold what they have read, where no index says it.
    pub holds: Duration,
    /// What models cost, if somebody pays.
    pub prices: Option<Arc<Book>>,
}

/// A model on it.
#[derive(Debug)]
pub struct Listed {
    /// Its name.
    pub model: Arc<str>,
    /// Where it is served.
    pub route: Arc<Route>,
    /// How good it is.
    pub quality: f32,
}

/// What came of a shortlist.
#[derive(Debug)]
pub struct Weighed {
    /// Its name.
    pub shortlist: Arc<str>,
    /// The place of the best one among the candidates.
    pub best: usize,
    /// How far the next one is behind.
    pub margin: f32,
    /// All that are on it.
    pub candidates: Vec<Weight>,
}

/// What came of one model.
#[derive(Debug)]
pub struct Weight {
    /// The model.
    pub model: Arc<str>,
    /// Why it was not weighed, if it was not.
    pub out: Option<Out>,
    /// Whether it has the conversation.
    pub stays: bool,
    /// Tokens of the prompt that it holds, most likely.
    pub held: u32,
    /// What the request would take.
    pub takes: Takes,
    /// What came of that.
    pub judged: Judged,
}

/// Why a model was not weighed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Out {
    /// It cannot answer this.
    Unfit(Unfit),
    /// Nobody can be asked for it now, and others can.
    Away,
}

/// What a request is at one of the models.
struct Measured<'a> {
    place: usize,
    listed: &'a Listed,
    stage: &'a Stage,
    outlook: Outlook<'a>,
    prompt: u32,
    output: u32,
    held: u32,
}

impl Shortlist {
    /// The best of those that can answer. `kept` is what is known of the conversation. Where nobody can, why.
    pub fn weigh(&self, case: &Case<'_>, kept: Option<&Kept>) -> Result<Weighed, (Unfit, String)> {
        let mut candidates = self.candidates(case);
        let able = self.models.iter().enumerate().filter(|(place, _)| candidates[*place].out.is_none());
        let measured = able.filter_map(|(place, listed)| self.measure(case, place, listed, kept));
        let measured: SmallVec<[Measured<'_>; 8]> = measured.collect();
        if measured.is_empty() {
            return Err(nobody(&candidates));
        }
        let stays = kept.and_then(|kept| measured.iter().position(|one| one.listed.model == kept.model));
        let share = stays.map_or(0.0, |stays| measured[stays].share());
        let known = measured.iter().map(|one| self.known(case, one, share, stays.is_some()));
        let known: SmallVec<[Candidate; 8]> = known.collect();
        let verdict = self.weights.judge(&known, stays);
        for (at, (one, judged)) in measured.iter().zip(verdict.judged).enumerate() {
            let candidate = &mut candidates[one.place];
            (candidate.held, candidate.takes) = (one.held, known[at].now);
            (candidate.judged, candidate.stays) = (judged, stays == Some(at));
        }
        let best = measured[verdict.best].place;
        Ok(Weighed { shortlist: self.name.clone(), best, margin: verdict.margin, candidates })
    }

    /// All of them, and why some are out of the question. That nobody can be asked now is no reason where that is so of
    /// all.
    fn candidates(&self, case: &Case<'_>) -> Vec<Weight> {
        let fits = |listed: &Listed| case.unfit(&listed.route).map(Out::Unfit);
        let mut all: Vec<Weight> = self.models.iter().map(|listed| Weight::of(&listed.model, fits(listed))).collect();
        let here: SmallVec<[bool; 8]> = self.models.iter().map(|listed| is_here(case, &listed.route)).collect();
        if all.iter().zip(&here).any(|(one, here)| one.out.is_none() && *here) {
            let away = |(one, here): (&mut Weight, bool)| one.out = one.out.or((!here).then_some(Out::Away));
            all.iter_mut().zip(here).for_each(away);
        }
        all
    }

    fn measure<'a>(
        &self,
        case: &Case<'_>,
        place: usize,
        listed: &'a Listed,
        kept: Option<&Kept>,
    ) -> Option<Measured<'a>> {
        let route = &*listed.route;
        let operation = case.request.operation;
        let mut stages = usable(case, route);
        let stage = stages.clone().find(|stage| stage.pool.available(case.now)).or_else(|| stages.next())?;
        let (output, choices) = (case.output_max(), case.choices());
        let (prompt, output) = weighing::expected(operation, route, &stage.pool, case.text_bytes, output, choices);
        let tenant = case.tenant.map_or(b"".as_slice(), |tenant| tenant.name.as_bytes());
        let template = case.request.scan.template(case.request.body);
        let chain = weighing::chain_of(&stage.pool, tenant, &route.model.name, template);
        let asked = Asked { prompt, output, ..Asked::default() };
        let wanted = Wanted { asked, model: &listed.model, chain: Some(&chain), ..Wanted::of(operation) };
        let outlook = stage.pool.outlook(&wanted, case.now);
        let outlook = outlook.unwrap_or_else(|| stage.pool.idle_outlook(&wanted, case.now));
        let kept = kept.filter(|kept| kept.model == listed.model && kept.tokens >= LEAST_HELD);
        let kept = kept.filter(|kept| case.now.saturating_duration_since(kept.at) < self.holds);
        let said = || kept.map_or(0, |kept| kept.tokens.min(prompt));
        let held = outlook.held().unwrap_or_else(said);
        Some(Measured { place, listed, stage, outlook, prompt, output, held })
    }

    /// What is known of one where the conversation's own has read such a share of the prompt.
    fn known(&self, case: &Case<'_>, one: &Measured<'_>, share: f32, goes_on: bool) -> Candidate {
        let settled = one.held.max((share * one.prompt as f32) as u32);
        let now = self.takes(case, one, one.held, goes_on);
        let settled = if settled == one.held { now } else { self.takes(case, one, settled, goes_on) };
        Candidate { quality: one.listed.quality, now, settled, load: one.outlook.load() }
    }

    /// What it takes where so much is held. What neither counts nor is lost is not measured.
    fn takes(&self, case: &Case<'_>, one: &Measured<'_>, held: u32, goes_on: bool) -> Takes {
        let lost = goes_on && self.weights.price + self.weights.first_token == 0.0;
        let time = || one.outlook.first_token_s(held);
        Takes {
            nanousd: if lost || self.weights.price > 0.0 { self.costs(case, one, held) } else { None },
            first_token_s: if lost || self.weights.first_token > 0.0 { time() } else { None },
        }
    }

    /// Nano-dollars at the dearest upstream that could answer.
    fn costs(&self, case: &Case<'_>, one: &Measured<'_>, held: u32) -> Option<f32> {
        let counted = cached(case.request.operation);
        let beside = if counted == Cached::Beside { held } else { 0 };
        let usage = Usage {
            input_tokens: Some(u64::from(one.prompt.saturating_sub(beside))),
            cached_tokens: Some(u64::from(held)),
            output_tokens: Some(u64::from(one.output)),
            gpu_us: Some((one.outlook.works_s(held) * 1e6) as u64),
            ..Usage::default()
        };
        let book = self.prices.as_ref()?;
        let (pool, at) = (&one.stage.pool, SystemTime::now());
        let cost = |upstream: &Upstream| {
            let model = one.stage.other_name(upstream, Some(&one.listed.model)).unwrap_or(&one.listed.model);
            book.find(model, &pool.name, upstream.provider.kind(), at)?.cost(&usage, counted)
        };
        let able = pool.upstreams.iter().filter(|one| one.weight > 0 && one.provider.serves(case.request.operation));
        let mut dearest = Some(NanoUsd::default());
        for upstream in able {
            dearest = dearest.zip(cost(upstream)).map(|(dearest, cost)| dearest.max(cost));
        }
        dearest.map(|cost| cost.0 as f32)
    }
}

/// The stages that can answer and may be asked, in order.
fn usable<'a>(case: &Case<'_>, route: &'a Route) -> impl Iterator<Item = &'a Stage> + Clone {
    let (tenant, operation) = (case.tenant, case.request.operation);
    route
        .stages
        .iter()
        .filter(move |stage| stage.pool.serves(operation) && tenant.is_none_or(|tenant| tenant.may_reach(&stage.pool)))
}

fn is_here(case: &Case<'_>, route: &Route) -> bool {
    usable(case, route).any(|stage| stage.pool.available(case.now))
}

impl Measured<'_> {
    fn share(&self) -> f32 {
        if self.prompt == 0 { 0.0 } else { self.held as f32 / self.prompt as f32 }
    }
}

/// Why nobody can answer: what is in the way of the first one, and what of each.
fn nobody(candidates: &[Weight]) -> (Unfit, String) {
    let mut why = String::new();
    for (model, out) in candidates.iter().filter_map(|one| Some((&one.model, one.out?))) {
        let between = if why.is_empty() { "" } else { ", " };
        let _ = write!(why, "{between}{model} {out}");
    }
    let unfit = candidates.iter().find_map(|one| match one.out {
        Some(Out::Unfit(unfit)) => Some(unfit),
        _ => None,
    });
    (unfit.unwrap_or(Unfit::Operation), why)
}

impl Weighed {
    /// The model that answers.
    pub fn model(&self) -> &Arc<str> {
        &self.candidates[self.best].model
    }

    /// In a few words; the figures stand beside it in the record.
    pub fn why(&self) -> String {
        let (best, weighed) = (&self.candidates[self.best], self.candidates.iter().filter(|one| one.out.is_none()));
        let (of, score) = (weighed.count(), best.judged.score);
        let stays = if best.stays { ", which has the conversation" } else { "" };
        format!("{}: {score:.3} is the best of {of}{stays}, margin {:.3}", self.shortlist, self.margin)
    }
}

impl std::fmt::Display for Out {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unfit(unfit) => unfit.fmt(f),
            Self::Away => f.write_str("has nobody who can be asked now"),
        }
    }
}

/// One model of a shortlist, in a record. Scores, terms and the loss are in thousandths: 1000 is the best.
#[derive(Debug, Serialize, JsonSchema)]
pub struct CandidateRecord<'a> {
    /// The model.
    pub model: &'a str,
    /// Why it was not weighed, if it was not: what it cannot do, or that nobody could be asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    pub out: Option<Text>,
    /// Its score, before the loss.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub score_permille: Option<u32>,
    /// What was taken off because it would have to read the conversation again.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss_permille: Option<u32>,
    /// The term of its quality, where that is weighed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub quality_permille: Option<u32>,
    /// The term of its price.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub price_permille: Option<u32>,
    /// The term of its first token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first_token_permille: Option<u32>,
    /// The term of its pool's load.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub load_permille: Option<u32>,
    /// What the request was expected to cost, in nano-dollars.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cost_nanousd: Option<u64>,
    /// When its first token was expected, in microseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first_token_us: Option<u64>,
    /// Tokens of the prompt that it was taken to hold already.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub held_tokens: Option<u32>,
    /// Whether the conversation was its own.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub has_conversation: bool,
}

impl Weight {
    fn of(model: &Arc<str>, out: Option<Out>) -> Self {
        let (model, takes, judged) = (model.clone(), Takes::default(), Judged::default());
        Self { model, out, stays: false, held: 0, takes, judged }
    }

    /// As a record tells it.
    pub fn record(&self) -> CandidateRecord<'_> {
        let permille = |share: f32| (share * 1000.0).round().max(0.0) as u32;
        let [quality, price, first_token, load] = self.judged.terms.map(|term| term.map(permille));
        CandidateRecord {
            model: &self.model,
            out: self.out.map(|out| out.to_string().into()),
            score_permille: self.out.is_none().then(|| permille(self.judged.score)),
            loss_permille: Some(permille(self.judged.loss)).filter(|loss| *loss > 0),
            quality_permille: quality,
            price_permille: price,
            first_token_permille: first_token,
            load_permille: load,
            cost_nanousd: self.takes.nanousd.map(|cost| cost as u64),
            first_token_us: self.takes.first_token_s.map(|seconds| (seconds * 1e6) as u64),
            held_tokens: Some(self.held).filter(|held| *held > 0),
            has_conversation: self.stays,
        }
    }
}
