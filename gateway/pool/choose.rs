//! Choosing among all endpoints of a pool: each is judged by what it has to do, and the best one taken.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use infergate_plugins::operation::Operation;
use smallvec::SmallVec;

use super::load::{Job, Usual, Work, millis};
use super::origin::Endpoint;
use super::prefix::{Chain, Held};
use super::score::{Asked, Balance, Candidate, Placed, Ranked};
use super::{Picked, Pool, Upstream, told};

/// What an endpoint is picked for.
#[derive(Clone, Copy)]
pub struct Wanted<'a> {
    /// What is to be done.
    pub operation: Operation,
    /// How much of it.
    pub asked: Asked,
    /// Whether the answer comes as a whole.
    pub whole: bool,
    /// Whether it is to go where there is room.
    pub batch: bool,
    /// The model's name, but for upstreams that know it by another.
    pub model: &'a str,
    /// The prompt's blocks, where the pool's balance asks who has read them.
    pub chain: Option<&'a Chain>,
    /// Nano-dollars that the request costs at an upstream, where the balance asks for that.
    pub cost: Option<&'a dyn Fn(&Upstream) -> f32>,
}

impl Wanted<'_> {
    /// Something of which no more is known.
    pub fn of(operation: Operation) -> Self {
        Self { operation, asked: Asked::default(), whole: true, batch: false, model: "", chain: None, cost: None }
    }
}

/// What a choice was made from.
#[derive(Clone, Copy, Debug)]
pub struct Choice<'a> {
    /// How many endpoints there were.
    pub candidates: usize,
    /// The best three and what they were judged by, the best one first.
    pub best: [Option<(&'a Upstream, f64)>; 3],
    /// Tokens of the prompt that the chosen one has read before, most likely, and all of them.
    pub held: (u32, u32),
}

/// So many endpoints are judged without an allocation.
const INLINE: usize = 128;

/// Where a candidate is: the upstream, and the endpoint in its list.
type Place = (u32, u32);
type Places = SmallVec<[Place; INLINE]>;

impl Pool {
    /// Judges every endpoint of `upstreams` that `may` be taken and takes the best one. An upstream's list can have been
    /// renewed meanwhile: what is at its place now must be one that may be taken.
    pub(super) fn choose<'a>(
        &'a self,
        wanted: &Wanted<'_>,
        upstreams: impl Iterator<Item = &'a Upstream>,
        now: Instant,
        may: impl Fn(&Arc<Endpoint>) -> bool,
    ) -> Option<Picked<'a>> {
        let turn = self.state.turns.fetch_add(1, Relaxed);
        let wanted = Wanted { asked: Asked { turn, ..wanted.asked }, ..*wanted };
        let prompt = Prompt::of(self, &wanted, now);
        let may = |endpoint: &Arc<Endpoint>| endpoint.available(now) && may(endpoint);
        let (places, ranked) = match self.balance {
            _ if self.load.adapters => self.beside_each_other(&prompt, upstreams, may),
            // The usual one has a loop of its own, without what only others ask for.
            Balance::ExpectedTime => self.each_alone(Balance::ExpectedTime, &prompt, upstreams, may),
            balance if balance.judges_alone() => self.each_alone(balance, &prompt, upstreams, may),
            _ => self.beside_each_other(&prompt, upstreams, may),
        };
        // A half-open breaker lets one request through; where that was another one, the next best is taken.
        let order = ranked.iter().map(|placed| placed.index).chain(0..places.len());
        let mut found = order.filter_map(|index| self.at(places[index]).filter(|(_, endpoint)| may(endpoint)));
        let (upstream, endpoint) = found.find(|(_, endpoint)| endpoint.breaker.admit(now))?;
        let (asked, taken) = (&wanted.asked, self.candidate(self.balance, &prompt, upstream, &endpoint));
        let job = Job { unread: taken.unread(asked), output: asked.output, whole: wanted.whole };
        Some(Picked {
            upstream,
            work: Work::begin(&endpoint, self.balance.weighs().then_some(job), &self.state.paces, now),
            endpoint,
            choice: Some(self.choice(&ranked, &places, (taken.matched, asked.prompt))),
            read: None,
        })
    }

    /// The best by what each is by itself. Nothing is kept of those that are passed over.
    #[inline(always)] // So that it is compiled for each balance that is a constant.
    fn each_alone<'a>(
        &self,
        balance: Balance,
        prompt: &Prompt<'_>,
        upstreams: impl Iterator<Item = &'a Upstream>,
        may: impl Fn(&Arc<Endpoint>) -> bool,
    ) -> (Places, Ranked) {
        let (mut places, mut ranked, mut chance) = (Places::new(), Ranked::default(), chance());
        each(upstreams, may, |place, upstream, endpoint| {
            let one = self.candidate(balance, prompt, upstream, endpoint);
            let score = balance.alone(&prompt.wanted.asked, &one, &mut chance);
            ranked.add(Placed { index: places.len(), score });
            places.push(place);
        });
        (places, ranked)
    }

    /// The best by what each is beside the others.
    fn beside_each_other<'a>(
        &self,
        prompt: &Prompt<'_>,
        upstreams: impl Iterator<Item = &'a Upstream>,
        may: impl Fn(&Arc<Endpoint>) -> bool,
    ) -> (Places, Ranked) {
        let (mut places, mut candidates) = (Places::new(), SmallVec::<[Candidate; INLINE]>::new());
        each(upstreams, may, |place, upstream, endpoint| {
            places.push(place);
            candidates.push(self.candidate(self.balance, prompt, upstream, endpoint));
        });
        if self.load.adapters {
            self.prefer_adapters(prompt.wanted.model, &places, &mut candidates);
        }
        let ranked = self.balance.rank(&prompt.wanted.asked, &candidates, &mut chance());
        (places, ranked)
    }

    /// Who is at this place, if there still is somebody.
    fn at(&self, (upstream, endpoint): Place) -> Option<(&Upstream, Arc<Endpoint>)> {
        let upstream = &self.upstreams[upstream as usize];
        Some((upstream, upstream.origin.endpoints().get(endpoint as usize)?.clone()))
    }

    /// An endpoint as it stands, for this balance.
    #[inline(always)] // A hundred of them are looked at for one that is taken: copying each would cost most of that.
    pub(super) fn candidate(
        &self,
        balance: Balance,
        prompt: &Prompt<'_>,
        upstream: &Upstream,
        endpoint: &Endpoint,
    ) -> Candidate {
        let (wanted, tokens) = (prompt.wanted, prompt.wanted.asked.prompt);
        let known = match balance.weighs() {
            true => endpoint.load.candidate(prompt.usual, tokens, prompt.at),
            false => Candidate::default(),
        };
        Candidate {
            seed: endpoint.seed,
            weight: upstream.weight as f32 * endpoint.warmth(self.slow_start, prompt.now) as f32,
            in_flight: endpoint.in_flight(),
            matched: prompt.held_by(endpoint, tokens),
            nanousd: wanted.cost.map_or(0.0, |cost| cost(upstream)),
            ..known
        }
    }

    /// Where some endpoint has the adapter loaded, the others would have to load it.
    fn prefer_adapters(&self, model: &str, places: &[Place], candidates: &mut [Candidate]) {
        let mut any = false;
        for (candidate, place) in candidates.iter_mut().zip(places) {
            let Some((upstream, endpoint)) = self.at(*place) else { continue };
            let name = told::adapter(upstream.model.as_deref().unwrap_or(model));
            let has = endpoint.load.told.has_adapter(name);
            candidate.loads_adapter = !has;
            any |= has;
        }
        candidates.iter_mut().for_each(|candidate| candidate.loads_adapter &= any);
    }

    fn choice(&self, ranked: &Ranked, places: &[Place], held: (u32, u32)) -> Choice<'_> {
        let mut best = [None; 3];
        for (kept, placed) in best.iter_mut().zip(ranked.iter()) {
            *kept = Some((&self.upstreams[places[placed.index].0 as usize], placed.score));
        }
        Choice { candidates: places.len(), best, held }
    }
}

/// Every endpoint of `upstreams` that `may` be taken.
#[inline(always)]
fn each<'a>(
    upstreams: impl Iterator<Item = &'a Upstream>,
    may: impl Fn(&Arc<Endpoint>) -> bool,
    mut then: impl FnMut(Place, &Upstream, &Endpoint),
) {
    for upstream in upstreams {
        for (n, endpoint) in upstream.origin.endpoints().iter().enumerate() {
            if may(endpoint) {
                then((upstream.index as u32, n as u32), upstream, endpoint);
            }
        }
    }
}

/// Numbers from 0 to 1, of a source of one's own: the thread's is asked once.
fn chance() -> impl FnMut() -> f64 {
    let mut random = fastrand::Rng::new();
    move || (random.u64(..) >> 11) as f64 * (0.5 / (1u64 << 52) as f64)
}

/// What is wanted, and what is known of its prompt and when, once for all endpoints.
pub(super) struct Prompt<'a> {
    wanted: &'a Wanted<'a>,
    usual: Usual,
    now: Instant,
    at: u64,
    held: Option<(&'a Chain, Held)>,
}

impl<'a> Prompt<'a> {
    pub(super) fn of(pool: &Pool, wanted: &'a Wanted<'a>, now: Instant) -> Self {
        let chain = wanted.chain.filter(|chain| !chain.is_empty());
        let held = pool.prefixes.as_ref().zip(chain).map(|(prefixes, chain)| (chain, prefixes.held(chain)));
        Self { wanted, usual: pool.state.paces.usual(), now, at: millis(now), held }
    }

    /// Tokens of it that an endpoint has read before.
    fn held_by(&self, endpoint: &Endpoint, prompt: u32) -> u32 {
        let Some((chain, held)) = self.held.as_ref().filter(|(_, held)| held.deepest > 0) else { return 0 };
        let depth = endpoint.seated().map_or(0, |seat| held.by(seat));
        endpoint.load.told.whole_blocks((chain.share(depth) * f64::from(prompt)) as u32)
    }
}

impl Choice<'_> {
    /// In a sentence: what the best were judged by.
    pub fn why(&self, unit: &str) -> String {
        let mut why = format!("of {}", self.candidates);
        for (upstream, score) in self.best.iter().flatten() {
            why += &format!(", {} {score:.3}{unit}", upstream.name.to_str().unwrap_or_default());
        }
        if self.held.0 > 0 {
            why += &format!("; has read {} of {} tokens", self.held.0, self.held.1);
        }
        why
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::{World, compile};
    use crate::pool::prefix::Blocks;
    use crate::settings::Settings;
    use crate::state::State;
    use crate::telemetry::Telemetry;

    /// A pool of so many endpoints.
    fn pool(upstreams: usize, balance: &str) -> Arc<Pool> {
        let urls: String = (0..upstreams).map(|n| format!("      - url: http://127.0.0.1:{}\n", 10_000 + n)).collect();
        let text = format!("version: 1\npools:\n  p:\n    balance: {balance}\n    upstreams:\n{urls}");
        let (state, telemetry, settings) = (State::new(0), Telemetry::new(), Settings::default());
        let policy = compile(&text, &World::new(&|_| None, &state, &telemetry, &settings)).unwrap();
        policy.pools["p"].clone()
    }

    #[test]
    fn choosing_among_a_hundred_allocates_nothing_whatever_the_balance() {
        let prompt = vec![b'x'; 20_000];
        for balance in ["expected_time", "lmetric", "prefix", "hash", "p2c_ewma", "round_robin", "least_in_flight"] {
            let (pool, now) = (pool(100, balance), Instant::now());
            let asked = Asked { prompt: 5_000, output: 200, key: 7, turn: 0 };
            let chain = pool.prefixes.as_ref().map(|prefixes| {
                let chain = prefixes.chain(Blocks::default(), "m", std::iter::once(("messages", &*prompt)));
                let endpoint = pool.upstreams[40].origin.endpoints()[0].clone();
                prefixes.learn(&chain, endpoint.seat(prefixes).unwrap());
                chain
            });
            let wanted = Wanted { asked, chain: chain.as_ref(), ..Wanted::of(Operation::Chat) };
            let mut chosen = 0;
            let mut pick = || chosen = pool.pick(&wanted, &[], now).map_or(0, |picked| picked.upstream.index);
            pick();
            let allocated = allocation_counter::measure(pick);
            assert_eq!(allocated.count_total, 0, "{balance}");
            assert!(
                chosen == 40 || !pool.balance.matches_prefixes(),
                "{balance}: {chosen} and not the one that has it"
            );
        }
    }

    #[test]
    fn looking_ahead_allocates_nothing_and_takes_nothing() {
        let (pool, now) = (pool(100, "expected_time"), Instant::now());
        let asked = Asked { prompt: 8_000, output: 200, ..Asked::default() };
        let wanted = Wanted { asked, ..Wanted::of(Operation::Chat) };
        let running: Vec<_> = (0..96).map(|_| pool.pick(&wanted, &[], now).unwrap()).collect();
        let mut seen = None;
        let mut look = || seen = pool.outlook(&wanted, now);
        look();
        assert_eq!(allocation_counter::measure(look).count_total, 0);
        let outlook = seen.unwrap();
        // 8,000 tokens a second, and each of a hundred would have one of these.
        let near = |is: f32, should: f32| (is - should).abs() < 0.01;
        assert!(near(outlook.first_token_s(0).unwrap(), 1.0) && near(outlook.first_token_s(6_000).unwrap(), 0.25));
        assert!(near(outlook.load(), 0.01), "{}", outlook.load());
        assert!(outlook.works_s(0) > outlook.works_s(6_000));
        drop(running);
        assert_eq!(pool.outlook(&wanted, now).unwrap().load(), 0.0);
    }

    #[test]
    fn a_pool_that_measures_no_time_tells_none() {
        let pool = pool(2, "p2c");
        let outlook = pool.outlook(&Wanted::of(Operation::Chat), Instant::now()).unwrap();
        assert_eq!((outlook.first_token_s(0), outlook.held()), (None, None));
    }

    #[test]
    fn one_that_has_failed_in_this_request_is_asked_again_only_if_there_is_no_other() {
        let (pool, now) = (pool(3, "expected_time"), Instant::now());
        let wanted = Wanted::of(Operation::Chat);
        let mut tried = Vec::new();
        for _ in 0..3 {
            let picked = pool.pick(&wanted, &tried, now).unwrap();
            assert!(!tried.iter().any(|one| Arc::ptr_eq(one, &picked.endpoint)));
            tried.push(picked.endpoint.clone());
        }
        assert!(pool.pick(&wanted, &tried, now).is_some());
    }

    #[test]
    fn what_is_on_an_endpoint_is_taken_on_at_once_so_that_a_burst_spreads() {
        let (pool, now) = (pool(4, "expected_time"), Instant::now());
        let asked = Asked { prompt: 4_000, output: 100, ..Asked::default() };
        let wanted = Wanted { asked, whole: false, ..Wanted::of(Operation::Chat) };
        let burst: Vec<_> = (0..40).map(|_| pool.pick(&wanted, &[], now).unwrap()).collect();
        let on = |n: usize| burst.iter().filter(|picked| picked.upstream.index == n).count();
        assert!((0..4).all(|n| on(n) == 10), "{:?}", [on(0), on(1), on(2), on(3)]);
    }
}
