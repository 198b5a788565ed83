//! Who chooses: ours, by the very pool of the gateway, and others.

use std::cell::RefCell;
use std::collections::HashMap;
use std::fmt::Write as _;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use infergate::policy::{Policy, World, compile};
use infergate::pool::load::Work;
use infergate::pool::origin::Endpoint;
use infergate::pool::prefix::{Blocks, Chain, Prefixes};
use infergate::pool::score::Asked;
use infergate::pool::told::Report;
use infergate::pool::{Pool, Wanted};
use infergate::settings::Settings;
use infergate::state::State;
use infergate::telemetry::Telemetry;
use infergate_plugins::operation::Operation;

use crate::engine::{BLOCK, Speed, Told};
use crate::rivals::{CacheAware, LlmD};
use crate::trace::Turn;

/// A request that needs an engine.
pub struct Ask<'a> {
    pub request: usize,
    pub turn: &'a Rc<Turn>,
    pub tenant: u32,
    pub now: f64,
}

/// What chooses engines, and what it is told of them.
pub trait Choice {
    /// The engine that a request goes to.
    fn choose(&mut self, ask: &Ask<'_>) -> usize;

    /// A request got its first token.
    fn first_token(&mut self, _request: usize, _now: f64) {}

    /// A request got its last token, with so many in all; or its client went away.
    fn ended(&mut self, _request: usize, _tokens: Option<u32>, _now: f64) {}

    /// An engine's figures; every 50 ms.
    fn told(&mut self, _engine: usize, _told: Told, _now: f64) {}
}

/// The ways of choosing that are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    RoundRobin,
    P2c,
    LeastInFlight,
    LlmD,
    CacheAware,
    Lmetric,
    Prefix,
    ExpectedTime,
}

impl Kind {
    pub const ALL: [Self; 8] = [
        Self::RoundRobin,
        Self::P2c,
        Self::LeastInFlight,
        Self::LlmD,
        Self::CacheAware,
        Self::Lmetric,
        Self::Prefix,
        Self::ExpectedTime,
    ];
    /// The one that has to be better than the others.
    pub const OURS: Self = Self::ExpectedTime;

    pub const fn name(self) -> &'static str {
        match self {
            Self::LlmD => "llm-d 2/2/3",
            Self::CacheAware => "SGLang cache_aware",
            Self::RoundRobin => "round_robin",
            Self::P2c => "p2c",
            Self::LeastInFlight => "least_in_flight",
            Self::Lmetric => "lmetric",
            Self::Prefix => "prefix",
            Self::ExpectedTime => "expected_time",
        }
    }

    pub fn begin(self, speeds: &[Speed], seed: u64) -> Box<dyn Choice> {
        match self {
            Self::LlmD => Box::new(LlmD::new(speeds, seed)),
            Self::CacheAware => Box::new(CacheAware::new(speeds.len())),
            _ => Box::new(Ours::new(self.name(), speeds, seed)),
        }
    }
}

/// The gateway's own pool, asked at times that do not pass.
struct Ours {
    begun: Instant,
    pool: Arc<Pool>,
    /// Keeps the pool's levels.
    _policy: (Policy, State),
    prefixes: Option<Arc<Prefixes>>,
    engines: HashMap<usize, usize>,
    endpoints: Vec<Arc<Endpoint>>,
    running: HashMap<usize, Running>,
    body: RefCell<Vec<u8>>,
    looked: Vec<f64>,
}

/// A request that was placed.
struct Running {
    endpoint: Arc<Endpoint>,
    work: Work,
    chain: Chain,
}

/// How often the gateway looks at what engines tell.
const LOOK_S: f64 = 1.0;

fn policy(balance: &str, engines: usize) -> String {
    let mut text =
        format!("version: 1\nmodels: [{{name: m, pool: p}}]\npools:\n  p:\n    balance: {balance}\n    upstreams:\n");
    for engine in 0..engines {
        let _ = writeln!(text, "      - url: http://127.0.0.1:{}", 10_000 + engine);
    }
    text
}

impl Ours {
    #[expect(clippy::panic, reason = "its own policy is wrong: nothing to run")]
    fn new(balance: &str, speeds: &[Speed], seed: u64) -> Self {
        fastrand::seed(seed);
        let (state, telemetry, settings) = (State::new(0), Telemetry::new(), Settings::default());
        let begun = Instant::now();
        let none = |_: &str| None;
        let world = World { now: begun, ..World::new(&none, &state, &telemetry, &settings) };
        let policy = match compile(&policy(balance, speeds.len()), &world) {
            Ok(policy) => policy,
            Err(problems) => panic!("{:?}", problems.lines("policy")),
        };
        let pool = policy.pools.values().next().cloned();
        let Some(pool) = pool else { panic!("the policy has no pool") };
        let endpoints: Vec<_> = pool
            .upstreams
            .iter()
            .flat_map(|upstream| upstream.origin.endpoints().iter().cloned().collect::<Vec<_>>())
            .collect();
        let engines = endpoints.iter().enumerate().map(|(n, endpoint)| (Arc::as_ptr(endpoint) as usize, n)).collect();
        let prefixes = pool.prefixes.clone();
        if let Some(prefixes) = &prefixes {
            for (endpoint, speed) in endpoints.iter().zip(speeds) {
                // What vLLM tells of its cache's size.
                let tokens = speed.blocks as u64 * u64::from(BLOCK);
                endpoint.seat(prefixes).into_iter().for_each(|seat| seat.holds(Blocks::default().in_tokens(tokens)));
            }
        }
        let looked = vec![f64::NEG_INFINITY; speeds.len()];
        let (running, body) = (HashMap::new(), RefCell::default());
        Self { begun, pool, _policy: (policy, state), prefixes, engines, endpoints, running, body, looked }
    }

    fn at(&self, now: f64) -> Instant {
        // Whole microseconds: what is written as text and read again is the same.
        self.begun + Duration::from_micros((now * 1e6).round() as u64)
    }

    /// The prompt as a client would write it: as many bytes as its tokens have, roughly, each block another text.
    fn chain(&self, ask: &Ask<'_>) -> Chain {
        let Some(prefixes) = &self.prefixes else { return Chain::default() };
        let mut body = self.body.borrow_mut();
        body.clear();
        for block in ask.turn.prompt.iter() {
            let begin = body.len();
            body.resize(begin + Blocks::default().bytes() as usize, b' ');
            body[begin..begin + 8].copy_from_slice(&block.to_le_bytes());
        }
        let whole = body.len() + ask.turn.tail as usize * 4;
        body.resize(whole, b' ');
        prefixes.chain(Blocks::default(), "m", [("messages", body.as_slice())].into_iter())
    }
}

impl Choice for Ours {
    #[expect(clippy::panic, reason = "all engines are always well")]
    fn choose(&mut self, ask: &Ask<'_>) -> usize {
        let (chain, now) = (self.chain(ask), self.at(ask.now));
        let asked = Asked {
            prompt: ask.turn.tokens(),
            output: self.pool.state.paces.output(),
            key: u64::from(ask.tenant),
            turn: 0,
        };
        let wanted = Wanted { asked, whole: false, model: "m", chain: Some(&chain), ..Wanted::of(Operation::Chat) };
        let Some(picked) = self.pool.pick(&wanted, &[], now) else { panic!("nobody could be picked") };
        let engine = self.engines[&(Arc::as_ptr(&picked.endpoint) as usize)];
        self.running.insert(ask.request, Running { endpoint: picked.endpoint, work: picked.work, chain });
        engine
    }

    fn first_token(&mut self, request: usize, now: f64) {
        let at = self.at(now);
        let Some(running) = self.running.get_mut(&request) else { return };
        if let Some(took) = running.work.first_token(&self.pool.state.paces, at) {
            self.pool.state.first_tokens.took(took);
        }
        if let Some(prefixes) = &self.prefixes
            && let Some(seat) = running.endpoint.seat(prefixes)
        {
            prefixes.learn(&running.chain, seat);
        }
    }

    fn ended(&mut self, request: usize, tokens: Option<u32>, now: f64) {
        let at = self.at(now);
        let Some(Running { endpoint, mut work, .. }) = self.running.remove(&request) else { return };
        let Some(tokens) = tokens else { return };
        work.answered(u64::from(tokens), &self.pool.state.paces, at);
        if let Some((prefixes, seat)) = self.prefixes.as_ref().zip(endpoint.seated()) {
            prefixes.wrote(seat, Blocks::default().in_tokens(u64::from(tokens)));
        }
    }

    fn told(&mut self, engine: usize, told: Told, now: f64) {
        if now - self.looked[engine] < LOOK_S {
            return;
        }
        self.looked[engine] = now;
        let (waiting, running) = (Some(told.waiting as f32), Some(told.running as f32));
        let report = Report { waiting, running, kv: Some(told.kv as f32), ..Report::default() };
        self.endpoints[engine].hears(report, self.at(now));
        if let Some(prefixes) = self.prefixes.as_ref().filter(|prefixes| prefixes.is_untidy()) {
            prefixes.tidy();
        }
    }
}
