//! One run: sessions, engines and whoever chooses, moved from event to event.

use std::cmp::Ordering;
use std::collections::BinaryHeap;
use std::rc::Rc;

use serde::Serialize;

use crate::choice::{Ask, Choice};
use crate::engine::{Engine, News, Speed};
use crate::trace::{Session, Turn};

/// Seconds after which who has no first token goes away: refused, whoever's fault that is.
pub const PATIENCE_S: f64 = 30.0;
/// What is good: a first token within so many seconds, and others within so many each on average.
pub const GOOD_FIRST_S: f64 = 2.0;
pub const GOOD_TOKEN_S: f64 = 0.06;
/// How often engines are looked at. Who looks more seldom takes what it needs.
pub const LOOK_S: f64 = 0.05;
/// The share of a run that is not counted: caches and rates are cold.
const WARM_UP: f64 = 0.2;

/// What a run came to.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Outcome {
    /// Requests that are counted.
    pub requests: usize,
    /// Seconds to the first token; of who was refused, as long as they waited.
    pub first_p50_s: f64,
    pub first_p99_s: f64,
    /// Good answers a second.
    pub goodput: f64,
    /// Prompt tokens that were found in caches, of all that were read.
    pub hits: f64,
    /// Jain's index over tenants of the share of their requests that was good.
    pub fairness: f64,
    /// Requests that were refused.
    pub refused: f64,
    /// The busiest engine's time in steps over the mean.
    pub spread: f64,
    /// Requests that engines put back for want of room.
    pub preempted: u64,
}

enum What {
    Asks { session: usize, turn: usize },
    StepEnds { engine: usize },
    Leaves { request: usize },
    Looks,
}

struct Event {
    at: f64,
    order: u64,
    what: What,
}

impl PartialEq for Event {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Event {}

impl PartialOrd for Event {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Event {
    /// The soonest is the greatest; of two at once, the one that was planned first.
    fn cmp(&self, other: &Self) -> Ordering {
        other.at.total_cmp(&self.at).then(other.order.cmp(&self.order))
    }
}

struct Request {
    session: usize,
    turn: usize,
    engine: usize,
    asked_s: f64,
    first_s: Option<f64>,
    ended_s: Option<f64>,
    cached: u32,
}

struct Run<'a> {
    sessions: &'a [Session],
    engines: Vec<Engine>,
    choice: &'a mut dyn Choice,
    requests: Vec<Request>,
    events: BinaryHeap<Event>,
    planned: u64,
    now: f64,
    seconds: f64,
    news: Vec<News>,
}

/// Runs `sessions` for `seconds` on engines of these speeds.
pub fn run(sessions: &[Session], speeds: &[Speed], choice: &mut dyn Choice, seconds: f64) -> Outcome {
    let engines = speeds.iter().map(|speed| Engine::new(*speed)).collect();
    let (requests, events) = (Vec::new(), BinaryHeap::new());
    let mut run = Run { sessions, engines, choice, requests, events, planned: 0, now: 0.0, seconds, news: Vec::new() };
    for (session, begins) in sessions.iter().enumerate() {
        run.plan(begins.begins_s, What::Asks { session, turn: 0 });
    }
    run.plan(0.0, What::Looks);
    while let Some(event) = run.events.pop() {
        run.now = event.at;
        run.happens(event.what);
    }
    run.outcome()
}

impl Run<'_> {
    fn plan(&mut self, at: f64, what: What) {
        self.planned += 1;
        self.events.push(Event { at, order: self.planned, what });
    }

    fn happens(&mut self, what: What) {
        match what {
            What::Asks { session, turn } => self.asks(session, turn),
            What::StepEnds { engine } => self.step_ends(engine),
            What::Leaves { request } => self.leaves(request),
            What::Looks => self.looks(),
        }
    }

    fn looks(&mut self) {
        for (number, engine) in self.engines.iter().enumerate() {
            self.choice.told(number, engine.told(), self.now);
        }
        if self.now < self.seconds {
            self.plan(self.now + LOOK_S, What::Looks);
        }
    }

    fn asks(&mut self, session: usize, turn: usize) {
        if self.now >= self.seconds {
            return;
        }
        let (request, asked) = (self.requests.len(), self.sessions[session].turns[turn].clone());
        let engine =
            self.choice.choose(&Ask { request, turn: &asked, tenant: self.sessions[session].tenant, now: self.now });
        let (first_s, ended_s) = (None, None);
        self.requests.push(Request { session, turn, engine, asked_s: self.now, first_s, ended_s, cached: 0 });
        self.engines[engine].ask(request, asked);
        self.plan(self.now + PATIENCE_S, What::Leaves { request });
        self.steps(engine);
    }

    fn steps(&mut self, engine: usize) {
        if let Some(seconds) = self.engines[engine].begin_step() {
            self.plan(self.now + seconds, What::StepEnds { engine });
        }
    }

    fn step_ends(&mut self, engine: usize) {
        let mut news = std::mem::take(&mut self.news);
        self.engines[engine].end_step(&mut news);
        for one in news.drain(..) {
            match one {
                News::First { request, cached } => {
                    self.requests[request].first_s = Some(self.now);
                    self.requests[request].cached = cached;
                    self.choice.first_token(request, self.now);
                }
                News::Last { request } => self.ends(request),
            }
        }
        self.news = news;
        self.steps(engine);
    }

    fn ends(&mut self, request: usize) {
        let now = self.now;
        self.requests[request].ended_s = Some(now);
        let Request { session, turn, .. } = self.requests[request];
        self.choice.ended(request, Some(self.turn(request).output), now);
        if let Some(next) = self.sessions[session].turns.get(turn + 1) {
            let pause = next.pause_s;
            self.plan(now + pause, What::Asks { session, turn: turn + 1 });
        }
    }

    fn leaves(&mut self, request: usize) {
        let engine = self.requests[request].engine;
        if self.requests[request].first_s.is_none() && self.engines[engine].abandon(request) {
            self.choice.ended(request, None, self.now);
            self.steps(engine);
        }
    }

    fn turn(&self, request: usize) -> &Rc<Turn> {
        let Request { session, turn, .. } = self.requests[request];
        &self.sessions[session].turns[turn]
    }

    fn outcome(&self) -> Outcome {
        let from = self.seconds * WARM_UP;
        let counted: Vec<usize> =
            (0..self.requests.len()).filter(|request| self.requests[*request].asked_s >= from).collect();
        let mut firsts: Vec<f64> = counted.iter().map(|request| self.first_s(*request)).collect();
        firsts.sort_by(f64::total_cmp);
        let at = |share: f64| firsts.get(((firsts.len() as f64 * share) as usize).min(firsts.len().max(1) - 1));
        let good = counted.iter().filter(|request| self.is_good(**request)).count();
        let served = || counted.iter().filter(|request| self.requests[**request].first_s.is_some());
        let tokens: f64 = served().map(|request| f64::from(self.turn(*request).tokens())).sum();
        let cached: f64 = served().map(|request| f64::from(self.requests[*request].cached)).sum();
        let busy: Vec<f64> = self.engines.iter().map(|engine| engine.busy_s).collect();
        let mean = busy.iter().sum::<f64>() / busy.len() as f64;
        Outcome {
            requests: counted.len(),
            first_p50_s: at(0.5).copied().unwrap_or_default(),
            first_p99_s: at(0.99).copied().unwrap_or_default(),
            goodput: good as f64 / (self.seconds - from),
            hits: cached / tokens.max(1.0),
            fairness: self.fairness(&counted),
            refused: 1.0 - served().count() as f64 / counted.len().max(1) as f64,
            spread: busy.iter().copied().fold(0.0, f64::max) / mean.max(1e-9),
            preempted: self.engines.iter().map(|engine| engine.preempted).sum(),
        }
    }

    fn first_s(&self, request: usize) -> f64 {
        let request = &self.requests[request];
        request.first_s.map_or(PATIENCE_S, |first| first - request.asked_s)
    }

    fn is_good(&self, request: usize) -> bool {
        let Request { first_s: Some(first), ended_s: Some(ended), .. } = self.requests[request] else { return false };
        let each = (ended - first) / f64::from(self.turn(request).output - 1).max(1.0);
        self.first_s(request) <= GOOD_FIRST_S && each <= GOOD_TOKEN_S
    }

    fn fairness(&self, counted: &[usize]) -> f64 {
        let mut tenants = std::collections::BTreeMap::<u32, (f64, f64)>::new();
        for request in counted {
            let tenant = tenants.entry(self.sessions[self.requests[*request].session].tenant).or_default();
            tenant.0 += f64::from(u8::from(self.is_good(*request)));
            tenant.1 += 1.0;
        }
        let shares: Vec<f64> = tenants.values().map(|(good, all)| good / all).collect();
        let (sum, squares) = (shares.iter().sum::<f64>(), shares.iter().map(|share| share * share).sum::<f64>());
        if squares == 0.0 { 1.0 } else { sum * sum / (shares.len() as f64 * squares) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::choice::Kind as Chooser;
    use crate::trace::{self, Kind};

    fn outcome(kind: Kind, chooser: Chooser, load: f64, speeds: &[Speed]) -> Outcome {
        let work = |turn: &Turn| Speed::times(1.0).seconds_of(turn);
        let sessions = trace::make(kind, load * speeds.len() as f64, 60.0, 5, work);
        run(&sessions, speeds, &mut *chooser.begin(speeds, 5), 60.0)
    }

    #[test]
    fn the_same_run_comes_to_the_same() {
        let told = || format!("{:?}", outcome(Kind::Mixed, Chooser::ExpectedTime, 0.8, &[Speed::times(1.0); 3]));
        assert_eq!(told(), told());
    }

    #[test]
    fn whatever_is_chosen_an_idle_fleet_serves_everybody() {
        for chooser in Chooser::ALL {
            let outcome = outcome(Kind::Mixed, chooser, 0.2, &[Speed::times(1.0); 4]);
            assert!(outcome.requests > 20 && outcome.refused == 0.0, "{chooser:?}: {outcome:?}");
            assert!(outcome.fairness > 0.99, "{chooser:?}: {outcome:?}");
        }
    }

    #[test]
    fn twice_as_much_as_fits_is_refused_and_told() {
        let outcome = outcome(Kind::Unlike, Chooser::RoundRobin, 2.5, &[Speed::times(1.0); 2]);
        assert!(outcome.refused > 0.05 && outcome.first_p99_s > GOOD_FIRST_S, "{outcome:?}");
    }

    #[test]
    fn looking_for_prefixes_finds_more_of_them() {
        let hits = |chooser| outcome(Kind::System, chooser, 0.5, &[Speed::times(1.0); 4]).hits;
        assert!(hits(Chooser::ExpectedTime) > hits(Chooser::RoundRobin) + 0.05);
    }
}
