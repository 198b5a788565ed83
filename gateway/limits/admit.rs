//! Where a request meets its limits: what it may use at most is reserved, and its answer is bounded to that.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use http::{HeaderMap, HeaderValue};
use infergate_plugins::operation::Operation;
use smallvec::SmallVec;
use tokio::sync::Semaphore;

use super::effort::Work;
use super::{Costs, Counted, Limit, Outcome, Reservation, Short, Unit, Used, millis, shared};
use crate::exchange::Exchange;
use crate::failover;
use crate::house::House;
use crate::money::bill::{cached, text_bytes, work};
use crate::money::{Cached, Price};
use crate::parameters::User;
use crate::pipeline::{Planned, Stop, invalid, waiting};
use crate::policy::{Policy, Route};
use crate::refusal::{Code, Refusal};
use crate::relay::{Downstream, Interrupted};
use crate::scan::Field;
use crate::usage::Usage;

/// What the body and the head say that limits count.
struct Asked {
    user: Option<Box<str>>,
    input: u64,
    /// Whether the prompt has been estimated, and may be counted.
    estimated: bool,
    text_bytes: u64,
    /// Tokens that one choice of the answer may have.
    output: u64,
    choices: u64,
    besides: Usage,
}

/// Reserves what the request may use, all limits at once or none.
pub async fn reserve(
    house: &House,
    exchange: &mut Exchange,
    downstream: &mut Downstream,
    planned: &mut Planned,
) -> Result<(), Stop> {
    let policy = exchange.policy.clone();
    let tenant = exchange.who.as_ref().map(|who| who.tenant.clone());
    let cap = tenant.as_ref().and_then(|tenant| tenant.output_tokens_max);
    let limits = || policy.limits.iter().chain(tenant.iter().flat_map(|tenant| &tenant.limits));
    if limits().next().is_none() {
        planned.output_max = cap.filter(|_| writes(planned));
        return Ok(());
    }
    let user = end_user(exchange, planned, &downstream.head().headers);
    let mut asked = asked(exchange, planned, user, cap)?;
    let reserved = in_time(house, exchange, downstream, (planned, &mut asked), limits()).await;
    if reserved.is_err() {
        charge(house, exchange, planned, &asked, limits());
    }
    reserved
}

/// The same, for as long as the request may wait for room.
async fn in_time<'a>(
    house: &House,
    exchange: &mut Exchange,
    downstream: &mut Downstream,
    (planned, asked): (&mut Planned, &mut Asked),
    limits: impl Iterator<Item = &'a Arc<Limit>> + Clone,
) -> Result<(), Stop> {
    let (policy, began) = (exchange.policy.clone(), Instant::now());
    loop {
        let short = match attempt(house, exchange, planned, asked, limits.clone()).await {
            Ok(Tried::Reserved) => return Ok(()),
            Ok(Tried::Close) => {
                count(exchange, planned, asked).await;
                continue;
            }
            Ok(Tried::Short(short)) => short,
            Err(refusal) => return Err(refusal.into()),
        };
        if goes_elsewhere(exchange, planned, &policy, &short) {
            continue;
        }
        let Some(pause) = pause(&short, began) else { return Err(refuse(exchange, short).into()) };
        match waiting(downstream, exchange, planned).until(Instant::now() + pause, std::future::pending::<()>()).await {
            Err(Interrupted::Gone) => return Err(Stop::Gone),
            Err(Interrupted::Stopped) => return Err(failover::stopped().into()),
            _ if Instant::now() >= planned.total => return Err(refuse(exchange, short).into()),
            _ => {}
        }
    }
}

fn writes(planned: &Planned) -> bool {
    work(planned.identified.surface.operation).1
}

/// What the request asks for.
fn asked(exchange: &Exchange, planned: &Planned, user: Option<Box<str>>, cap: Option<u64>) -> Result<Asked, Refusal> {
    let (operation, body) = (planned.identified.surface.operation, &planned.received.body);
    let (reads, writes) = work(operation);
    let text_bytes = if reads { text_bytes(body) } else { 0 };
    let usual = match operation {
        // What OpenAI's reference says.
        Operation::Completions => 16,
        _ => exchange.policy.requests.output_tokens,
    };
    let asked = planned.scan.output_max(operation, body).map_err(invalid)?;
    let output = asked.unwrap_or(usual).min(cap.unwrap_or(u64::MAX));
    let choices = planned.scan.choices(body).map_err(invalid)?;
    Ok(Asked {
        user,
        input: if reads { planned.route.density.estimate(text_bytes) } else { 0 },
        estimated: reads,
        text_bytes,
        output: if writes { output } else { 0 },
        choices,
        besides: besides(operation, choices, body.len()),
    })
}

/// The end user: whom the tenant's parameters name, or the policy's header in the client's `head`, or the body.
pub fn end_user(exchange: &Exchange, planned: &Planned, head: &HeaderMap) -> Option<Box<str>> {
    let header = exchange.policy.user_header.as_ref().and_then(|name| head.get(name));
    forced_user(exchange).or_else(|| user(planned, header))
}

/// The end user that the tenant's parameters put into all its requests: what a request itself says is replaced.
fn forced_user(exchange: &Exchange) -> Option<Box<str>> {
    let who = exchange.who.as_ref()?;
    match who.tenant.parameters.as_ref()?.user.as_ref()? {
        User::Caller => Some((*who.identity.principal).into()),
        User::Fixed(name) => Some(name.as_str().into()),
    }
}

/// The end user as the header names them, or the body.
fn user(planned: &Planned, header: Option<&HeaderValue>) -> Option<Box<str>> {
    const MAX: usize = 256;
    let body = &planned.received.body;
    let named = || {
        let text = std::str::from_utf8(body.get(planned.scan.span(Field::User)?)?).ok()?;
        serde_json::from_str::<String>(text).ok().or_else(|| Some(text.to_owned()))
    };
    let named = header.map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned()).or_else(named)?;
    Some(named.chars().take(MAX).collect::<String>().into())
}

/// What is used besides text: images that are made, and sound that is heard, at two kilobytes a second at least.
fn besides(operation: Operation, choices: u64, bytes: usize) -> Usage {
    Usage {
        images: (operation == Operation::Images).then_some(choices),
        audio_ms: (operation == Operation::Transcription).then_some(bytes as u64 / 2),
        ..Usage::default()
    }
}

/// What came of an attempt to reserve.
enum Tried {
    Reserved,
    Short(Short),
    /// Nothing was reserved, or it was given back: the estimate of the prompt is too near what there is to go by it.
    Close,
}

/// The longest request whose prompt is counted: beyond it, that takes longer than it is worth.
const COUNTED_MAX: usize = 256 << 10;
/// So many prompts are counted at one time. More than that, and estimates stand.
static COUNTING: Semaphore = Semaphore::const_new(2);

/// Counts the prompt's tokens, beside the threads that carry requests, where its model's tokenizer is known.
async fn count(exchange: &mut Exchange, planned: &Planned, asked: &mut Asked) {
    asked.estimated = false;
    let name = planned.route.stages.first().and_then(|stage| stage.renamed(exchange.named()));
    let name = name.or(exchange.named()).unwrap_or(&planned.route.model.name);
    let Some(encoding) = planned.route.model.tokenizer.of(name).filter(|encoding| encoding.is_its_own) else { return };
    let (operation, body) = (planned.identified.surface.operation, planned.received.body.clone());
    let Some(permit) = COUNTING.try_acquire().ok().filter(|_| body.len() <= COUNTED_MAX) else { return };
    let counting = tokio::task::spawn_blocking(move || (encoding.prompt(operation, &body), permit));
    let Ok((Some(tokens), _)) = counting.await else { return };
    exchange.decide("limit", "tokens", "count", format!("{tokens} in the prompt, estimated at {}", asked.input));
    asked.input = tokens;
}

/// Reserves, for the model that is to answer as things stand.
async fn attempt<'a>(
    house: &House,
    exchange: &mut Exchange,
    planned: &mut Planned,
    asked: &Asked,
    limits: impl Iterator<Item = &'a Arc<Limit>> + Clone,
) -> Result<Tried, Refusal> {
    let operation = planned.identified.surface.operation;
    let prices = prices(exchange, &planned.route, limits.clone());
    let counted = counted(exchange, planned, asked, &prices);
    let levels = &house.state.limits;
    let outcome = match &exchange.policy.shared {
        None => levels.reserve(limits, &counted),
        Some(parameters) => shared::reserve(levels, parameters, &house.telemetry, limits, &counted).await,
    };
    match outcome {
        None => {}
        Some(Outcome::Short(short)) if asked.estimated && short.is_close() => return Ok(Tried::Close),
        Some(Outcome::Short(short)) => return Ok(Tried::Short(short)),
        Some(Outcome::Unavailable) => return Err(unavailable(exchange)),
        Some(Outcome::Unpriced(limit)) => return Err(unpriced(exchange, planned, &limit)),
        Some(Outcome::Reserved(reservation)) if asked.estimated && reservation.is_tight() => return Ok(Tried::Close),
        Some(Outcome::Reserved(mut reservation)) => {
            reservation.text_bytes = asked.text_bytes;
            bound(planned, asked, &reservation);
            let beside = beside(operation, asked.choices);
            exchange.tally.reserve(reservation, cached(operation), beside);
        }
    }
    Ok(Tried::Reserved)
}

/// The request as limits count it, where the model answers that is to answer as things stand.
fn counted<'a>(
    exchange: &'a Exchange,
    planned: &'a Planned,
    asked: &'a Asked,
    prices: &'a [Arc<Price>],
) -> Counted<'a> {
    let (cached, work) = (cached(planned.identified.surface.operation), work_of(&planned.route));
    Counted {
        tenant: exchange.who.as_ref().map(|who| &*who.tenant.name),
        key: exchange.who.as_ref().map(|who| &*who.identity.principal),
        plans: exchange.who.as_ref().map_or(&[], |who| &who.identity.plans),
        model: &planned.route.model.name,
        surface: planned.identified.surface.path,
        user: asked.user.as_deref(),
        input: asked.input,
        output: asked.output.saturating_mul(asked.choices),
        cost: Costs { prices, cached, besides: asked.besides, work },
        before: exchange.used_before(),
        held: exchange.tally.reservation.as_deref(),
        now: millis(SystemTime::now()),
    }
}

/// A request that goes nowhere may have been decided by somebody who was asked for it: that is paid for all the same.
fn charge<'a>(
    house: &House,
    exchange: &mut Exchange,
    planned: &Planned,
    asked: &Asked,
    limits: impl Iterator<Item = &'a Arc<Limit>> + Clone,
) {
    if exchange.used_before() == Used::default() {
        return;
    }
    let prices = prices(exchange, &planned.route, limits.clone());
    let counted = counted(exchange, planned, asked, &prices);
    let shared = exchange.policy.shared.is_some();
    if let Some(charged) = house.state.limits.charge(limits, &counted, shared) {
        exchange.charged(charged);
    }
}

/// How many events of a stream have no token and look as if they had one: those that open and close each choice, and
/// the one that tells the usage.
fn beside(operation: Operation, choices: u64) -> u64 {
    match operation {
        Operation::Chat => 2 * choices + 1,
        Operation::Completions => choices + 1,
        _ => 0,
    }
}

/// The answer may be so long and no longer.
fn bound(planned: &mut Planned, asked: &Asked, reservation: &Reservation) {
    if !writes(planned) || !reservation.bounds_output() {
        return;
    }
    planned.output_max = Some((reservation.output / asked.choices.max(1)).max(1));
    if reservation.output < asked.output.saturating_mul(asked.choices) {
        reservation.clamped();
    }
}

/// How much work it may be for whoever may answer.
fn work_of(route: &Route) -> Work {
    let pools = route.stages.iter().map(|stage| &stage.pool);
    pools.map(|pool| pool.state.effort.most(pool.timeouts.total_ms)).fold(Work::default(), Work::or)
}

/// The prices of all who may answer, where one of the limits counts money; none if one of them has none.
fn prices<'a>(
    exchange: &Exchange,
    route: &Route,
    mut limits: impl Iterator<Item = &'a Arc<Limit>>,
) -> SmallVec<[Arc<Price>; 2]> {
    let mut prices: SmallVec<[Arc<Price>; 2]> = SmallVec::new();
    if !limits.any(|limit| limit.unit == Unit::Nanousd) {
        return prices;
    }
    let asked = exchange.named().unwrap_or(&route.model.name);
    for stage in &route.stages {
        for upstream in &stage.pool.upstreams {
            let model = stage.other_name(upstream, Some(asked)).unwrap_or(asked);
            let Some(price) = exchange.price(model, &stage.pool, upstream) else { return SmallVec::new() };
            if !prices.iter().any(|known| Arc::ptr_eq(known, price)) {
                prices.push(price.clone());
            }
        }
    }
    prices
}

fn unpriced(exchange: &mut Exchange, planned: &Planned, limit: &Limit) -> Refusal {
    exchange.decide("limit", &limit.name, "refuse", "the model has no price");
    limit.meters.refused.inc();
    let message = format!(
        "the model `{}` has no price, and the limit {} counts money: give it one under `prices`",
        planned.route.model.name, limit.name
    );
    Refusal::new(Code::ModelUnpriced, message).param("model")
}

fn unavailable(exchange: &mut Exchange) -> Refusal {
    exchange.decide("limit", "shared", "refuse", "the store of shared limits does not answer");
    let message =
        "nobody knows how much of the limits is left: their store does not answer, and the policy wants to wait for it";
    Refusal::new(Code::LimitsUnavailable, message).retry_after(Duration::from_secs(1))
}

/// Another model answers, where the limit that is short names one that has not been tried.
fn goes_elsewhere(exchange: &mut Exchange, planned: &mut Planned, policy: &Policy, short: &Short) -> bool {
    let Some(instead) = &short.limit.exhausted.instead else { return false };
    if planned.climbing {
        // The cascade has named the model: what came before it stands.
        return false;
    }
    if *planned.route.model.name == **instead {
        return false;
    }
    let Ok(route) = policy.route(Some(instead)) else { return false };
    let operation = planned.identified.surface.operation;
    let may = exchange
        .who
        .as_ref()
        .is_none_or(|who| who.tenant.may_use(route, Some(instead)) && who.tenant.reaches(route, operation));
    if !may || !route.stages.iter().any(|stage| stage.pool.serves(operation)) {
        return false;
    }
    exchange.decide("limit", &short.limit.name, instead, "too little is left for the model that was asked for");
    exchange.serve_instead(route.clone(), instead.clone());
    planned.route = route.clone();
    true
}

/// How long the request may wait for room, where its limit lets it.
fn pause(short: &Short, began: Instant) -> Option<Duration> {
    let left = short.limit.exhausted.wait.checked_sub(began.elapsed())?;
    // Others may give back what they reserved before the span is over.
    const LOOK_AGAIN: Duration = Duration::from_millis(50);
    (!left.is_zero()).then(|| short.wait.unwrap_or(LOOK_AGAIN).min(LOOK_AGAIN).min(left))
}

fn refuse(exchange: &mut Exchange, short: Short) -> Refusal {
    let Short { limit, free, needed, wait, standings } = short;
    let (unit, free, needed) = (limit.unit, limit.unit.spelt(free), limit.unit.spelt(needed));
    limit.meters.refused.inc();
    exchange.decide("limit", &limit.name, "refuse", format!("{needed} needed, {free} left, {}", again(unit, wait)));
    exchange.short = Some(standings);
    let (name, max) = (&limit.name, unit.spelt(limit.max));
    if unit == Unit::Concurrency {
        let message = format!("the limit {name} allows {max}: ask again when one of them is over");
        return Refusal::new(Code::RateLimitExceeded, message).retry_after(Duration::from_secs(1));
    }
    if limit.is_budget() {
        let message = format!("the budget {name} of {max} is spent: {free} left, and this request may use {needed}");
        return Refusal { retry_after: wait, ..Refusal::new(Code::InsufficientQuota, message) };
    }
    let Some(wait) = wait else {
        let message = format!("this request may use {needed}, and the limit {name} never allows more than {max}");
        return Refusal::new(Code::RequestExceedsLimit, message);
    };
    let message = format!("the limit {name} of {max} has {free} left, and this request may use {needed}");
    Refusal::new(Code::RateLimitExceeded, message).retry_after(wait)
}

/// When a limit that is short has room again.
fn again(unit: Unit, wait: Option<Duration>) -> String {
    match wait {
        _ if unit == Unit::Concurrency => "free again when another request is over".to_owned(),
        Some(wait) => format!("free again in {}", super::standing::spelt(wait)),
        None => "never as much".to_owned(),
    }
}

/// How its dialect counts cached tokens, for whoever settles.
pub fn prompt_tokens(usage: &Usage, cached: Cached) -> u64 {
    let input = usage.input_tokens.unwrap_or_default();
    match cached {
        Cached::Within => input,
        Cached::Beside => {
            input + usage.cached_tokens.unwrap_or_default() + usage.cache_write_tokens.unwrap_or_default()
        }
    }
}
