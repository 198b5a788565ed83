//! Limits: how much of what, over which time, for whom. What a request may use at most is reserved before an upstream
//! is asked, all limits at once or none; what it did not use is given back when it is over, whatever way it ends.

pub mod admit;
pub mod density;
pub mod effort;
pub mod level;
pub mod ratio;
pub mod restore;
pub mod shared;
pub mod standing;
pub mod warn;
pub mod window;

use std::collections::HashSet;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use dashmap::mapref::multiple::RefMulti;
use dashmap::{DashMap, DashSet};
use schemars::JsonSchema;
use serde::Serialize;
use sha2::{Digest, Sha256};
use smallvec::SmallVec;

use self::effort::Work;
use self::level::{Count, Id, Level, Terms};
use self::shared::Shared;
use self::standing::Standing;
use self::warn::Warnings;
use self::window::Window;
use crate::money::{Cached, Price};
use crate::policy::Pattern;
use crate::policy::file::OnLimit;
use crate::telemetry::{LimitMeters, Table};
use crate::usage::Usage;

/// One limit of a policy.
#[derive(Debug)]
pub struct Limit {
    /// Its name, one of a kind in the policy.
    pub name: Arc<str>,
    /// What it counts.
    pub unit: Unit,
    /// The most of it: requests, tokens, nano-dollars, places.
    pub max: u64,
    /// Over which time.
    pub window: Window,
    /// What it counts apart.
    pub each: Vec<Each>,
    /// The models that it holds for; all, if there is no list.
    pub models: Option<Vec<Pattern>>,
    /// The endpoints that it holds for; all, if there is no list.
    pub surfaces: Option<HashSet<String>>,
    /// The plans that it holds for; everybody, if there is no list.
    pub plans: Option<HashSet<String>>,
    /// Whether an answer ends where no more may be used.
    pub on_limit: OnLimit,
    /// Whether a request may have less of an answer than it asks for.
    pub clamps: bool,
    /// Whether a request whose price nobody knows passes a limit on money.
    pub passes_unpriced: bool,
    /// What is done instead of a refusal.
    pub exhausted: Exhausted,
    /// Per cent of it at which somebody is told, ascending.
    pub warn_at: Vec<u8>,
    /// The level, where it counts for all together.
    pub level: Option<Arc<Level>>,
    /// Where the levels are that it counts apart.
    pub apart: u128,
    /// What its levels are called, wherever the same policy holds.
    pub levels: Box<str>,
    /// Its metrics.
    pub meters: LimitMeters,
    /// Where somebody hears that it is nearly used up.
    pub warnings: Warnings,
}

/// What a limit counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Unit {
    /// Requests that an upstream was asked for.
    Requests,
    /// Tokens of prompts.
    InputTokens,
    /// Tokens of answers.
    OutputTokens,
    /// Both.
    Tokens,
    /// Nano-dollars (10⁻⁹ US dollars).
    Nanousd,
    /// Requests at one time.
    Concurrency,
}

/// What a limit counts apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Each {
    /// The caller's own tenant.
    Tenant,
    /// Whoever asks: a key, the subject of a token.
    Key,
    /// The policy's entry for the model.
    Model,
    /// The endpoint.
    Surface,
    /// The end user as the application names them, in the body's `user` or in a header.
    User,
}

/// What is done when a limit has nothing left.
#[derive(Clone, Debug, Default)]
pub struct Exhausted {
    /// The model that answers instead.
    pub instead: Option<Arc<str>>,
    /// How long a request may wait for room.
    pub wait: Duration,
}

/// A request, as far as limits count it.
#[derive(Clone, Copy, Debug)]
pub struct Counted<'a> {
    /// Who pays.
    pub tenant: Option<&'a str>,
    /// Who asks.
    pub key: Option<&'a str>,
    /// The plans that they have.
    pub plans: &'a [Arc<str>],
    /// The policy's entry for the model.
    pub model: &'a str,
    /// The endpoint.
    pub surface: &'a str,
    /// The end user, if one is named.
    pub user: Option<&'a str>,
    /// Tokens of the prompt, at most.
    pub input: u64,
    /// Tokens of the answer that are asked for: of all choices together.
    pub output: u64,
    /// What it costs at most. None: nobody knows.
    pub cost: Costs<'a>,
    /// What was used for it before.
    pub before: Used,
    /// What it has already, where another model is asked after one that was: a request is one request all the same.
    pub held: Option<&'a Reservation>,
    /// Now, in milliseconds since 1970.
    pub now: u64,
}

/// What a request may cost.
#[derive(Clone, Copy, Debug)]
pub struct Costs<'a> {
    /// The prices of those who may answer; the dearest counts. Empty: nobody knows.
    pub prices: &'a [Arc<Price>],
    /// How its dialect counts cached tokens.
    pub cached: Cached,
    /// What it uses besides text.
    pub besides: Usage,
    /// How much work it may be for servers that are paid by the hour.
    pub work: Work,
}

impl Costs<'_> {
    fn of(&self, input: u64, output: u64) -> u64 {
        let gpu_us = Some(self.work.micros(input, output));
        let usage = Usage { input_tokens: Some(input), output_tokens: Some(output), gpu_us, ..self.besides };
        let dearest = self.prices.iter().filter_map(|price| price.cost(&usage, self.cached)).max();
        dearest.map_or(0, |cost| cost.0)
    }
}

/// How a reservation was decided, and so how it may grow and where the rest goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Way {
    /// Nobody else counts.
    #[default]
    Alone,
    /// The store was asked.
    Asked,
    /// From what the store holds for this replica.
    Leased,
    /// Without the store: one of so many parts of each limit may be taken here.
    Part(u64),
    /// Without the store, and nothing is refused.
    Unchecked,
}

/// What one request has of one limit.
#[derive(Debug)]
struct Hold {
    limit: Arc<Limit>,
    level: Arc<Level>,
    /// When the span began in which it was taken.
    from: u64,
    reserved: u64,
    /// Whether it is the limit that the answer is bounded by.
    bounds: bool,
    settled: Option<u64>,
}

/// What one request has of all limits. Dropped unsettled, it used nothing.
#[derive(Debug, Default)]
pub struct Reservation {
    holds: Holds,
    /// How the limits stood when it had been made.
    pub standings: SmallVec<[Standing; 4]>,
    /// Tokens of the prompt, at most.
    pub input: u64,
    /// Tokens of the answer that are paid for.
    pub output: u64,
    /// Bytes of text of the request.
    pub text_bytes: u64,
    prices: SmallVec<[Arc<Price>; 2]>,
    work: Work,
    before: Used,
    way: Way,
    /// Where the levels are shared, if they are.
    shared: Option<Arc<Shared>>,
}

/// What a request used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Used {
    /// Whether an upstream was asked.
    pub asked: bool,
    /// Tokens of the prompt, cached ones included.
    pub input: u64,
    /// Tokens of the answer.
    pub output: u64,
    /// What it cost, in nano-dollars.
    pub nanousd: u64,
}

/// What became of one limit, for the record.
#[derive(Clone, Copy, Debug, Serialize, JsonSchema)]
pub struct Settled<'a> {
    /// The limit's name.
    pub limit: &'a str,
    /// What it counts.
    pub unit: Unit,
    /// What the request could have used at most.
    pub reserved: u64,
    /// What it used; more than was reserved is an overshoot.
    pub used: u64,
}

/// Why nothing was reserved.
#[derive(Clone, Debug)]
pub struct Short {
    /// The limit that has not enough left.
    pub limit: Arc<Limit>,
    /// What is left of it.
    pub free: u64,
    /// What would have been needed at least.
    pub needed: u64,
    /// When that is free again; `None`: never.
    pub wait: Option<Duration>,
    /// How all limits stand.
    pub standings: Box<[Standing]>,
}

impl Short {
    /// Whether it matters how well the prompt was estimated: a tenth less would fit.
    fn is_close(&self) -> bool {
        self.limit.unit.reads() && self.needed - self.needed / 10 <= self.free
    }
}

/// What there is to be had.
pub enum Outcome {
    /// All that was asked for, or as much of the answer as is payable.
    Reserved(Box<Reservation>),
    /// Too little.
    Short(Short),
    /// A limit on money, and nobody knows what the model costs.
    Unpriced(Arc<Limit>),
    /// The store of shared limits is away, and without it nothing may be used.
    Unavailable,
}

/// What one request has of all limits, before it has anything of them.
type Holds = SmallVec<[Hold; 4]>;

/// A shorter answer helps nobody, unless no more was asked for.
const LEAST: u64 = 16;

/// The levels of limits that count apart: whoever is counted has one while it says anything.
#[derive(Debug, Default)]
pub struct Levels {
    apart: DashMap<u128, Arc<Level>>,
    /// Those that count for all together, and those of newcomers where there is no room: policies name them.
    together: DashMap<u128, Arc<Level>>,
    /// The limits whose levels have what was spent before the process began.
    restored: DashSet<u128>,
    hashers: (RandomState, RandomState),
    /// How they are shared with other replicas, where the policy says so.
    pub shared: Arc<Shared>,
    /// Where somebody hears of limits that are nearly used up.
    pub warnings: Warnings,
}

/// So many levels are kept of limits that count apart. Beyond it, all newcomers of a limit share one: it is never passed
/// by inventing names.
const LEVELS_MAX: usize = 200_000;

impl Levels {
    /// The level of a limit that counts for all together, old or new.
    pub fn named(&self, levels: &str) -> Arc<Level> {
        level(&self.together, self.key(0, &[levels]), levels, "", || id(levels, &[]))
    }

    /// Where a limit's levels are that it counts apart.
    pub fn apart(&self, levels: &str) -> u128 {
        self.key(1, &[levels])
    }

    fn key(&self, seed: u128, parts: &[&str]) -> u128 {
        let one = self.hashers.0.hash_one((seed, parts));
        let other = self.hashers.1.hash_one((seed, parts));
        u128::from(one) << 64 | u128::from(other)
    }

    /// The level that `limit` counts `request` on.
    fn of(&self, limit: &Limit, request: &Counted<'_>) -> Arc<Level> {
        if let Some(level) = &limit.level {
            return level.clone();
        }
        let parts: SmallVec<[&str; 3]> = limit.each.iter().map(|each| each.of(request)).collect();
        let key = self.key(limit.apart, &parts);
        if let Some(known) = self.apart.get(&key) {
            return known.clone();
        }
        if self.apart.len() >= LEVELS_MAX {
            let id = || id(&limit.levels, &["", "others"]);
            return level(&self.together, limit.apart, &limit.levels, "others", id);
        }
        level(&self.apart, key, &limit.levels, &parts.join(" "), || id(&limit.levels, &parts))
    }

    fn each(&self) -> impl Iterator<Item = RefMulti<'_, u128, Arc<Level>>> {
        self.together.iter().chain(self.apart.iter())
    }

    /// What the store holds for this replica in advance, and nobody has taken yet.
    pub fn leased(&self) -> u64 {
        self.each().map(|level| level.count().slice).sum()
    }

    fn all(&self) -> Vec<Arc<Level>> {
        self.each().map(|level| level.clone()).collect()
    }

    fn is_restored(&self, limit: &Limit) -> bool {
        self.restored.contains(&limit.apart)
    }

    fn set_restored(&self, limit: &Limit) {
        self.restored.insert(limit.apart);
    }

    /// Limits that no policy names any more are asked for again when they come back.
    fn forget_restored<'a>(&self, limits: impl Iterator<Item = &'a Arc<Limit>>) {
        let known: HashSet<u128> = limits.map(|limit| limit.apart).collect();
        self.restored.retain(|limit| known.contains(limit));
    }

    /// Forgets the levels that say nothing.
    pub fn sweep(&self, now: u64) {
        for levels in [&self.together, &self.apart] {
            levels.retain(|_, level| Arc::strong_count(level) > 1 || !level.is_idle(now));
        }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.together.len() + self.apart.len()
    }

    /// The levels of limits that count apart, and those of the others.
    pub fn tables(&self) -> [Table; 2] {
        [
            Table { name: "limit_levels", entries: self.apart.len(), room: Some(LEVELS_MAX) },
            Table::named("limit_levels_together", self.together.len()),
        ]
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How the levels of `limit` stand, the fullest first, `most` of them.
    pub fn standings(&self, limit: &Limit, now: u64, most: usize) -> Vec<(Box<str>, Standing, u64)> {
        // Most limits count for all together: for them nobody looks at everybody's.
        let apart = (!limit.each.is_empty()).then(|| self.apart.iter()).into_iter().flatten();
        let of_it = self.together.iter().chain(apart).filter(|level| level.levels == limit.levels);
        let mut standings: Vec<_> = of_it
            .map(|level| {
                let mut count = level.count();
                count.roll(&limit.terms(now));
                (level.whose.clone(), Standing::of(limit, &count, now), count.held())
            })
            .collect();
        standings.sort_by_key(|(_, standing, _)| standing.free);
        standings.truncate(most);
        standings
    }

    /// What all requests together have reserved and not settled.
    pub fn held(&self) -> u64 {
        self.each().map(|level| level.count().held()).sum()
    }

    /// Reserves what `request` may use of all of `limits`: everything, or nothing.
    pub fn reserve<'a>(&self, limits: impl Iterator<Item = &'a Arc<Limit>>, request: &Counted<'_>) -> Option<Outcome> {
        match self.holds(limits, request) {
            Err(limit) => Some(Outcome::Unpriced(limit)),
            Ok(holds) => (!holds.is_empty()).then(|| reserved(holds, request, Way::Alone)),
        }
    }

    /// Takes what was used for a request that goes nowhere, whether it is free or not: somebody has paid for it.
    pub fn charge<'a>(
        &self,
        limits: impl Iterator<Item = &'a Arc<Limit>>,
        request: &Counted<'_>,
        shared: bool,
    ) -> Option<Box<Reservation>> {
        let now = if shared { self.shared.now() } else { request.now };
        let mut holds = self.holds(limits.filter(|limit| limit.unit.works()), request).ok()?;
        for hold in &mut holds {
            let mut count = hold.level.count();
            count.roll(&hold.limit.terms(now));
            hold.reserved = hold.limit.used(&request.before);
            (hold.from, count.touched) = (count.take(hold.reserved), now);
        }
        let mut reservation = Reservation::new(holds, SmallVec::new(), Way::Unchecked);
        reservation.shared = shared.then(|| self.shared.clone());
        reservation.settle(&request.before, now);
        Some(Box::new(reservation))
    }

    /// The limits that hold for `request`, with their levels; or the one that counts money where nobody knows what the
    /// model costs.
    fn holds<'a>(
        &self,
        limits: impl Iterator<Item = &'a Arc<Limit>>,
        request: &Counted<'_>,
    ) -> Result<Holds, Arc<Limit>> {
        let mut holds = Holds::new();
        for limit in limits.filter(|limit| limit.holds_for(request)) {
            let level = self.of(limit, request);
            if request.held.is_some_and(|held| held.counts(&level)) {
                continue;
            }
            if limit.unit == Unit::Nanousd && request.cost.prices.is_empty() && !limit.passes_unpriced {
                return Err(limit.clone());
            }
            holds.push(Hold { limit: limit.clone(), level, from: 0, reserved: 0, bounds: false, settled: None });
        }
        // In one order everywhere: nobody waits in a circle.
        holds.sort_unstable_by_key(|hold| Arc::as_ptr(&hold.level) as usize);
        Ok(holds)
    }
}

fn level(
    known: &DashMap<u128, Arc<Level>>,
    key: u128,
    levels: &str,
    whose: &str,
    id: impl FnOnce() -> Id,
) -> Arc<Level> {
    if let Some(level) = known.get(&key) {
        return level.clone();
    }
    known.entry(key).or_insert_with(|| Arc::new(Level::new(levels, whose, id()))).clone()
}

/// The name of a level among replicas. Every part says how long it is, so that no two lists read the same.
fn id(levels: &str, parts: &[&str]) -> Id {
    let mut hash = Sha256::new();
    for part in std::iter::once(&levels).chain(parts) {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part.as_bytes());
    }
    let mut id = Id::default();
    id.iter_mut().zip(hash.finalize()).for_each(|(to, from)| *to = from);
    id
}

impl Each {
    fn of<'a>(self, request: &Counted<'a>) -> &'a str {
        match self {
            Self::Tenant => request.tenant.unwrap_or_default(),
            Self::Key => request.key.unwrap_or_default(),
            Self::Model => request.model,
            Self::Surface => request.surface,
            // Whoever names nobody shares one level with all who do so.
            Self::User => request.user.unwrap_or_default(),
        }
    }
}

impl Unit {
    /// Its word in messages.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Requests => "requests",
            Self::InputTokens => "input tokens",
            Self::OutputTokens => "output tokens",
            Self::Tokens => "tokens",
            Self::Nanousd => "dollars",
            Self::Concurrency => "requests at one time",
        }
    }

    /// An amount of it, as people read it.
    pub fn spelt(self, amount: u64) -> String {
        match self {
            Self::Nanousd => format!("${}", crate::money::NanoUsd(amount)),
            _ if amount == 1 => {
                format!("1 {}", self.name().replacen("requests", "request", 1).replacen("tokens", "token", 1))
            }
            _ => format!("{amount} {}", self.name()),
        }
    }

    /// Whether a longer prompt needs more of it.
    fn reads(self) -> bool {
        matches!(self, Self::InputTokens | Self::Tokens | Self::Nanousd)
    }

    /// Whether it counts what is done, and not that somebody asks.
    fn works(self) -> bool {
        !matches!(self, Self::Requests | Self::Concurrency)
    }

    /// Whether a longer answer needs more of it.
    fn grows(self) -> bool {
        matches!(self, Self::OutputTokens | Self::Tokens | Self::Nanousd)
    }
}

impl Limit {
    /// Whether it is a budget: what is spent of it is gone for a while, and asking again soon is no use.
    pub fn is_budget(&self) -> bool {
        self.window.is_calendar() && self.unit != Unit::Concurrency
    }

    fn holds_for(&self, request: &Counted<'_>) -> bool {
        self.models.as_ref().is_none_or(|list| list.iter().any(|pattern| pattern.takes(request.model)))
            && self.surfaces.as_ref().is_none_or(|list| list.contains(request.surface))
            && self.plans.as_ref().is_none_or(|list| request.plans.iter().any(|plan| list.contains(&**plan)))
    }

    fn terms(&self, now: u64) -> Terms<'_> {
        Terms { max: self.max, window: &self.window, now }
    }

    /// How much of it a request needs whose answer has so many tokens, with what was used for it before.
    fn needs(&self, request: &Counted<'_>, output: u64) -> u64 {
        let own = match self.unit {
            Unit::Requests | Unit::Concurrency => 1,
            Unit::InputTokens => request.input,
            Unit::OutputTokens => output,
            Unit::Tokens => request.input.saturating_add(output),
            Unit::Nanousd => request.cost.of(request.input, output),
        };
        own.saturating_add(self.used(&request.before))
    }

    /// How much of it was used.
    fn used(&self, used: &Used) -> u64 {
        match self.unit {
            Unit::Requests => u64::from(used.asked),
            Unit::Concurrency => 0,
            Unit::InputTokens => used.input,
            Unit::OutputTokens => used.output,
            Unit::Tokens => used.input.saturating_add(used.output),
            Unit::Nanousd => used.nanousd,
        }
    }

    /// The longest answer, up to `wanted` tokens, that costs no more than `free`.
    fn payable(&self, request: &Counted<'_>, wanted: u64, free: u64) -> Option<u64> {
        if self.needs(request, wanted) <= free {
            return Some(wanted);
        }
        if !self.unit.grows() || !self.clamps || self.needs(request, 1) > free {
            return None;
        }
        let (mut can, mut cannot) = (1, wanted);
        while cannot - can > 1 {
            let middle = can + (cannot - can) / 2;
            if self.needs(request, middle) <= free { can = middle } else { cannot = middle }
        }
        Some(can)
    }
}

/// All levels are held while they are looked at, so that two requests never take the same rest, and a request that is
/// refused by one limit never makes another be refused by the next.
fn reserved(mut holds: Holds, request: &Counted<'_>, way: Way) -> Outcome {
    let levels: SmallVec<[Arc<Level>; 4]> = holds.iter().map(|hold| hold.level.clone()).collect();
    let mut counts: SmallVec<[_; 4]> = levels.iter().map(|level| level.count()).collect();
    let agreed = agreed(&mut holds, counts.iter_mut().map(|count| &mut **count), request, way);
    let standing = |hold: &Hold, count: &Count| Standing::of(&hold.limit, count, request.now);
    let output = match agreed {
        Ok(output) => output,
        Err(mut short) => {
            short.standings = holds.iter().zip(&counts).map(|(hold, count)| standing(hold, count)).collect();
            return Outcome::Short(short);
        }
    };
    for (hold, count) in holds.iter_mut().zip(counts.iter_mut()) {
        hold.reserved = hold.limit.needs(request, output);
        hold.from = count.take(hold.reserved);
        count.touched = request.now;
        if way == Way::Leased {
            count.slice -= count.slice.min(hold.reserved);
        }
    }
    let standings = holds.iter().zip(&counts).map(|(hold, count)| standing(hold, count)).collect();
    drop(counts);
    Outcome::Reserved(Box::new(Reservation::new(holds, standings, way).of(request, output)))
}

/// The longest answer that all limits have room for, as far as it is worth it; or the one that is short.
fn agreed<'a>(
    holds: &mut Holds,
    counts: impl Iterator<Item = &'a mut Count>,
    request: &Counted<'_>,
    way: Way,
) -> Result<u64, Short> {
    let (mut output, mut short, mut bounding) = (request.output, None, None);
    for (index, (hold, count)) in holds.iter().zip(counts).enumerate() {
        let terms = hold.limit.terms(request.now);
        count.roll(&terms);
        let payable = hold.limit.payable(request, request.output, way.free(count, &terms));
        match payable.filter(|payable| way.is_worth_it(*payable, request.output)) {
            Some(payable) if payable < output => (output, bounding) = (payable, Some(index)),
            Some(_) => {}
            None => short = Some(shorter(short, hold, count, request, way)),
        }
    }
    holds.iter_mut().enumerate().for_each(|(index, hold)| hold.bounds = bounding == Some(index));
    short.map_or(Ok(output), Err)
}

impl Way {
    /// What may be taken of a level, as things stand.
    fn free(self, count: &mut Count, terms: &Terms<'_>) -> u64 {
        match self {
            Self::Alone => {
                count.alone();
                count.free(terms)
            }
            Self::Asked => count.free(terms),
            Self::Leased => count.slice,
            Self::Part(parts) => count.free_of_part(terms, parts),
            Self::Unchecked => u64::MAX,
        }
    }

    /// Whether an answer that short helps anybody.
    fn is_worth_it(self, payable: u64, wanted: u64) -> bool {
        // Where a slice is too small, the store may have more.
        payable >= if self == Self::Leased { wanted } else { wanted.min(LEAST) }
    }
}

/// Of two limits that have too little, the one counts that knows what to do instead of refusing; a budget says more than
/// a rate, and the longer wait more than the shorter.
fn shorter(other: Option<Short>, hold: &Hold, count: &mut Count, request: &Counted<'_>, way: Way) -> Short {
    let terms = hold.limit.terms(request.now);
    let needed = hold.limit.needs(request, if hold.limit.clamps { request.output.min(LEAST) } else { request.output });
    let short = Short {
        limit: hold.limit.clone(),
        free: way.free(count, &terms),
        needed,
        wait: count.wait(&terms, needed),
        standings: Box::default(),
    };
    let knows = |short: &Short| short.limit.exhausted.instead.is_some();
    let weight = |short: &Short| (knows(short), short.limit.is_budget(), short.wait.unwrap_or(Duration::MAX));
    match other {
        Some(other) if weight(&other) >= weight(&short) => other,
        _ => short,
    }
}

impl Reservation {
    fn new(holds: Holds, standings: SmallVec<[Standing; 4]>, way: Way) -> Self {
        let mut reservation = Self::default();
        (reservation.holds, reservation.standings, reservation.way) = (holds, standings, way);
        reservation
    }

    /// The same, made for `request`, whose answer may have `output` tokens.
    fn of(mut self, request: &Counted<'_>, output: u64) -> Self {
        self.prices = request.cost.prices.iter().cloned().collect();
        (self.work, self.before) = (request.cost.work, request.before);
        (self.input, self.output) = (request.input, output);
        self
    }

    /// What is known of each limit: what was reserved, and what was used as far as that is settled.
    pub fn settled(&self) -> impl Iterator<Item = Settled<'_>> {
        self.holds.iter().map(|hold| Settled {
            limit: &hold.limit.name,
            unit: hold.limit.unit,
            reserved: hold.reserved,
            used: hold.settled.unwrap_or_default(),
        })
    }

    /// Whether all of it is settled.
    pub fn is_settled(&self) -> bool {
        self.holds.iter().all(|hold| hold.settled.is_some())
    }

    /// Whether any of the work has been settled.
    pub fn has_heard(&self) -> bool {
        self.holds.iter().any(|hold| hold.settled.is_some() && hold.limit.unit.works())
    }

    /// Whether any limit counts how long the answer is.
    pub fn bounds_output(&self) -> bool {
        self.holds.iter().any(|hold| hold.limit.unit.grows())
    }

    /// The answer was bounded to less than was asked for.
    pub fn clamped(&self) {
        if let Some(hold) = self.holds.iter().find(|hold| hold.bounds) {
            hold.limit.meters.clamped.inc();
        }
    }

    /// Whether so little is left of a limit that counts the prompt that it matters how well that was estimated: less
    /// than a tenth of what there was.
    pub fn is_tight(&self) -> bool {
        let counts = self.holds.iter().zip(&self.standings);
        counts
            .into_iter()
            .any(|(hold, standing)| hold.limit.unit.reads() && standing.free.saturating_mul(9) <= hold.reserved)
    }

    /// Whether answers end where no more may be used, as far as any limit counts them.
    pub fn stops(&self) -> bool {
        self.holds.iter().any(|hold| hold.limit.unit.grows() && hold.limit.on_limit == OnLimit::Stop)
    }

    /// An answer has `output` tokens already: takes what it needs beyond what was reserved, and some more. Returns
    /// whether it may go on.
    pub fn extend(&mut self, output: u64, cached: Cached, now: u64) -> bool {
        const AHEAD: u64 = 16;
        let wanted = output.saturating_add(AHEAD);
        let costs = Costs { prices: &self.prices, cached, besides: Usage::default(), work: self.work };
        let counted = Counted { before: self.before, ..Counted::of_tokens(self.input, wanted, costs, now) };
        let grows =
            |hold: &Hold| hold.settled.is_none() && hold.limit.unit.grows() && hold.limit.on_limit == OnLimit::Stop;
        let mut holds: SmallVec<[&mut Hold; 4]> = self.holds.iter_mut().filter(|hold| grows(hold)).collect();
        let levels: SmallVec<[Arc<Level>; 4]> = holds.iter().map(|hold| hold.level.clone()).collect();
        // They are in their one order since they were reserved.
        let mut counts: SmallVec<[_; 4]> = levels.iter().map(|level| level.count()).collect();
        let more = |hold: &Hold| hold.limit.needs(&counted, wanted).saturating_sub(hold.reserved);
        let way = self.way;
        let fits = holds.iter().zip(counts.iter_mut()).all(|(hold, count)| {
            let terms = hold.limit.terms(now);
            count.roll(&terms);
            // Nobody waits for the store here: it counts what was free when it last told, and it is told at once.
            way.free(count, &terms) >= more(hold)
        });
        if !fits {
            return false;
        }
        for (hold, count) in holds.iter_mut().zip(counts.iter_mut()) {
            let more = more(hold);
            // What belongs to a span that is over stays there; the rest is taken now.
            count.grow(hold.from, more);
            if way == Way::Leased {
                count.slice -= count.slice.min(more);
            }
            if let Some(shared) = &self.shared {
                shared.has_to_tell(&hold.limit, &hold.level, count);
            }
            hold.reserved += more;
        }
        self.output = wanted;
        true
    }

    /// The request is over: what it did not use is given back, what it used beyond is taken.
    pub fn settle(&mut self, used: &Used, now: u64) {
        self.settle_some(used, now, |_| true);
    }

    /// A model has done its work, and another one may be asked after it: that work is settled, and the request is not
    /// over.
    pub fn settle_work(&mut self, used: &Used, now: u64) {
        self.settle_some(used, now, Unit::works);
    }

    /// What was reserved for another model before belongs to the same request.
    pub fn absorb(&mut self, mut before: Self) {
        self.holds.append(&mut before.holds);
    }

    /// Whether it has its place on a level that counts requests, and not their work.
    fn counts(&self, level: &Arc<Level>) -> bool {
        let is_it = |hold: &&Hold| !hold.limit.unit.works() && Arc::ptr_eq(&hold.level, level);
        self.holds.iter().any(|hold| is_it(&hold))
    }

    fn settle_some(&mut self, used: &Used, now: u64, is_over: impl Fn(Unit) -> bool) {
        let open = |hold: &&mut Hold| hold.settled.is_none() && is_over(hold.limit.unit);
        for hold in self.holds.iter_mut().filter(open) {
            let amount = hold.limit.used(used);
            hold.settled = Some(amount);
            hold.limit.meters.overshot.inc_by(amount.saturating_sub(hold.reserved));
            let mut count = hold.level.count();
            count.settle(hold.from, hold.reserved, amount);
            if let Some(shared) = &self.shared {
                shared.settled(hold, &mut count, amount);
            }
            let terms = hold.limit.terms(now);
            count.roll(&terms);
            // Where levels are shared, the store says which replica tells it.
            let asks = self.shared.as_ref().is_some_and(|shared| shared.answers());
            if let Some(passed) = count.warns(&terms, &hold.limit.warn_at)
                && !asks
                && count.announces(passed)
            {
                hold.limit.warned(&hold.level.whose, passed);
            }
        }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.settle(&Used::default(), 0);
    }
}

impl<'a> Counted<'a> {
    /// One whose tokens alone matter.
    fn of_tokens(input: u64, output: u64, cost: Costs<'a>, now: u64) -> Self {
        let (tenant, key, user, held, before) = (None, None, None, None, Used::default());
        Self { tenant, key, plans: &[], model: "", surface: "", user, input, output, cost, before, held, now }
    }

    /// One that says only whom it belongs to.
    fn nobody(now: u64) -> Self {
        let cost = Costs { prices: &[], cached: Cached::Within, besides: Usage::default(), work: Work::default() };
        Self::of_tokens(0, 0, cost, now)
    }
}

/// A time of the day as limits count it.
pub fn millis(at: SystemTime) -> u64 {
    at.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::{World, compile};
    use crate::settings::Settings;
    use crate::state::State;
    use crate::telemetry::Telemetry;

    #[test]
    fn beyond_so_many_levels_newcomers_share_one_and_whoever_was_there_keeps_theirs() {
        let text =
            "version: 1\nlimits: [{name: users, each: [user], requests: 1, per: day}, {requests: 9, per: day}]\n";
        let (state, telemetry, settings) = (State::new(0), Telemetry::new(), Settings::default());
        let policy = compile(text, &World::new(&|_| None, &state, &telemetry, &settings)).unwrap();
        let (levels, limit) = (&state.limits, &policy.limits[0]);
        let of = |user: usize| levels.of(limit, &Counted { user: Some(&user.to_string()), ..Counted::nobody(0) });
        let first = of(0);
        (0..LEVELS_MAX).for_each(|user| drop(of(user)));
        let [late, later] = [LEVELS_MAX, LEVELS_MAX + 1].map(of);
        assert!(Arc::ptr_eq(&late, &later) && Arc::ptr_eq(&first, &of(0)) && !Arc::ptr_eq(&first, &late));
        assert_eq!(levels.tables().map(|table| table.entries), [LEVELS_MAX, 2]);
        assert_eq!(levels.standings(limit, 0, usize::MAX).len(), LEVELS_MAX + 1);
        assert_eq!(levels.standings(&policy.limits[1], 0, usize::MAX).len(), 1);
    }
}
