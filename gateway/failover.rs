//! Asking: the pools of a route in order, the upstreams of a pool, until one gives an answer to pass on.
//!
//! Everything here happens before the first piece of an answer has reached the client.

use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use http::header::{CACHE_CONTROL, CONTENT_LENGTH, CONTENT_LOCATION, LOCATION};
use http::response::Parts;
use http::{HeaderMap, HeaderValue};
use infergate_plugins::operation::Operation;
use infergate_plugins::provider::Reason;

use crate::audit::record::{Ending, Text};
use crate::exchange::Exchange;
use crate::headers::{self, set};
use crate::hedge::{self, Race};
use crate::house::House;
use crate::identity;
use crate::limits::standing;
use crate::local;
use crate::money::bill::Bill;
use crate::pipeline::{Planned, Stop, drain, waiting};
use crate::policy::file::{Cause, KvSession, Timeouts};
use crate::policy::{Route, Stage};
use crate::pool::origin::Endpoint;
use crate::pool::queue::{Full, Permit};
use crate::pool::score::Balance;
use crate::pool::{Picked, Pool, Upstream, Wanted, told};
use crate::refusal::{Code, Refusal};
use crate::relay::headers::{HOP_BY_HOP, RequestHead, led};
use crate::relay::{self, Answer, AnswerHead, Downstream, Failure, Interrupted, Order, Parting, Tunnel, Tunnelled};
use crate::routers::Chosen;
use crate::scan::{self, Edit};
use crate::telemetry::server_timing;
use crate::weighing::{self, Weight};

/// The longest pause that an upstream's `Retry-After` can ask for.
const PAUSE_MAX: Duration = Duration::from_secs(600);

/// An answer to pass on, and whom it came from.
pub struct Asked<'a> {
    /// The answer.
    pub answer: Answer,
    /// Who gave it.
    pub picked: Picked<'a>,
    /// The place in the pool.
    pub permit: Permit,
    /// The pool.
    pub stage: &'a Stage,
}

/// What one attempt came to, where that is no answer to pass on.
pub struct Miss {
    cause: Option<Cause>,
    refusal: Refusal,
    /// Whether the same pool is to be asked again; its budget has paid for it then.
    again: bool,
}

/// What asking one pool came to, where that is no answer to pass on.
#[allow(clippy::large_enum_variant, reason = "made once a request, and taken apart at once")]
enum Outcome<'a> {
    Answered(Asked<'a>),
    Missed(Miss),
}

/// Asks the pools of `route` until there is an answer to pass on.
pub async fn ask<'a>(
    house: &House,
    exchange: &mut Exchange,
    downstream: &mut Downstream,
    planned: &Planned,
    route: &'a Route,
) -> Result<Asked<'a>, Stop> {
    let bound = exchange.who.as_ref().filter(|who| who.tenant.is_bound()).map(|who| who.tenant.clone());
    let may = |pool: &Pool| bound.as_ref().is_none_or(|tenant| tenant.may_reach(pool));
    let serves = |stage: &&Stage| stage.pool.serves(planned.identified.surface.operation) && may(&stage.pool);
    let mut stages = route.stages.iter().filter(serves);
    let mut stage = stages.next();
    let mut last = None;
    while let Some(current) = stage {
        let rest = stages.clone();
        match ask_stage(house, exchange, downstream, planned, current, &rest.collect::<Vec<_>>()).await? {
            Outcome::Answered(asked) => return Ok(asked),
            Outcome::Missed(miss) => {
                let cause = miss.cause;
                let spent = exchange.attempt_count() >= planned.attempts_max();
                last = Some(miss.refusal);
                stage =
                    if spent { None } else { stages.find(|next| cause.is_some_and(|cause| next.on.contains(&cause))) };
            }
        }
    }
    Err(last.unwrap_or_else(|| Refusal::new(Code::NoUpstream, "no pool can serve this request")).into())
}

impl Miss {
    fn unavailable(refusal: Refusal) -> Self {
        Self { cause: Some(Cause::Unavailable), refusal, again: false }
    }
}

impl Planned {
    /// One number bounds all attempts of a request, on whatever pools.
    pub fn attempts_max(&self) -> u32 {
        self.route.stages[0].pool.retry.attempts
    }

    /// Whether nobody waits for it: it takes what room others leave.
    pub fn is_batch(&self) -> bool {
        self.priority.is_some_and(|priority| priority.batch)
    }

    /// The edits with which this upstream is asked for the usage of its stream; none where it is not.
    pub fn asks_for_usage(&self, upstream: &Upstream) -> Option<&[Edit]> {
        self.usage_edits.as_deref().filter(|_| upstream.provider.takes_stream_options())
    }
}

/// Asks the upstreams of one pool. `rest` are the pools that could be asked after it.
async fn ask_stage<'a>(
    house: &House,
    exchange: &mut Exchange,
    downstream: &mut Downstream,
    planned: &Planned,
    stage: &'a Stage,
    rest: &[&Stage],
) -> Result<Outcome<'a>, Stop> {
    let pool = &*stage.pool;
    let mut permit = match enter(exchange, downstream, planned, stage).await? {
        Ok(permit) => permit,
        Err(miss) => return Ok(Outcome::Missed(miss)),
    };
    queued(exchange, planned, pool);
    pool.state.retries.request(exchange.times.queued);
    if pool.hedge.is_some() {
        pool.state.hedges.request(exchange.times.queued);
    }
    let (mut tried, mut now): (Vec<Arc<Endpoint>>, Instant) = (Vec::new(), exchange.times.queued);
    let weight = Weight::of(exchange, planned, stage, &downstream.head().headers);
    loop {
        let Some(mut picked) = weight.pick(exchange, planned, stage, &tried, now) else {
            return Ok(Outcome::Missed(nobody(pool)));
        };
        permit.placed();
        back_off(exchange, downstream, planned, pool, &tried, &picked.endpoint).await?;
        tried.push(picked.endpoint.clone());
        let hedge = (&weight, &mut tried);
        match attempt(house, exchange, downstream, planned, stage, rest, &mut picked, hedge).await? {
            Ok(answer) => {
                let began = exchange.attempts.last().map_or(now, |attempt| attempt.began);
                weight.begins(stage, &mut picked, &answer, began);
                return Ok(Outcome::Answered(Asked { answer, picked, permit, stage }));
            }
            // What is drained for a client that has left is not tried again.
            Err(_) if downstream.is_mute() => return Err(Stop::Gone),
            Err(miss) if !miss.again => return Ok(Outcome::Missed(miss)),
            Err(_) => now = Instant::now(),
        }
    }
}

/// The request has its place in the pool.
fn queued(exchange: &mut Exchange, planned: &Planned, pool: &Pool) {
    let before = exchange.attempts.last().and_then(|attempt| attempt.ended).unwrap_or(exchange.times.admitted);
    exchange.times.queued = before;
    if pool.concurrency.max.is_none() && !planned.is_batch() {
        return;
    }
    exchange.times.queued = Instant::now();
    let waited = exchange.times.queued.saturating_duration_since(before).as_millis();
    let why = if waited == 0 { Text::from("at once") } else { Text::from(format!("waited {waited} ms")) };
    exchange.decide("queue", &pool.name, "enter", why);
}

/// A place in the pool, or why there is none.
async fn enter(
    exchange: &Exchange,
    downstream: &mut Downstream,
    planned: &Planned,
    stage: &Stage,
) -> Result<Result<Permit, Miss>, Stop> {
    let pool = &stage.pool;
    let mut parameters = pool.concurrency;
    let level = planned.priority.map_or(0, |priority| priority.level);
    if let Some(ms) = planned.priority.and_then(|priority| priority.queue_ms) {
        parameters.wait = Duration::from_millis(ms);
    }
    if planned.is_batch() {
        pool.lets_batch_in(Instant::now());
    }
    let entering = pool.state.queue.enter(parameters, weighing::claim(exchange, planned, stage, level));
    let entered = waiting(downstream, exchange, planned).until(planned.total, entering).await;
    let (code, message, after) = match entered {
        Ok(Ok(permit)) => return Ok(Ok(permit)),
        Ok(Err(Full::Queue(after))) => (Code::QueueFull, format!("the queue of pool {} is full", pool.name), after),
        Ok(Err(Full::Wait(after))) => {
            let waited = parameters.wait.as_millis();
            let what = if planned.is_batch() { "room for batch" } else { "place" };
            (Code::QueueTimeout, format!("no {what} in pool {} came free within {waited} ms", pool.name), after)
        }
        Err(Interrupted::Gone) => return Err(Stop::Gone),
        Err(Interrupted::Stopped) => return Err(stopped().into()),
        Err(_) => return Err(too_long(planned).into()),
    };
    Ok(Err(Miss::unavailable(Refusal::new(code, message).retry_after(after))))
}

/// What becomes of a request whose prompt turned out not to pass; whoever found it says more.
pub fn stopped() -> Refusal {
    Refusal::new(Code::ContentFilter, "the prompt does not pass the guardrails")
}

/// The whole request took too long.
pub fn too_long(planned: &Planned) -> Refusal {
    let ms = planned.route.stages[0].pool.timeouts.total_ms;
    Refusal::new(Code::TotalTimeout, format!("the whole request took longer than {ms} ms"))
}

/// Why nobody in the pool can be asked.
pub fn out(pool: &Pool) -> String {
    format!("every upstream of pool {} is out: unhealthy, failing, drained or not resolved", pool.name)
}

/// Nobody in the pool can be asked.
fn nobody(pool: &Pool) -> Miss {
    let refusal = Refusal::new(Code::NoUpstream, out(pool)).retry_after(pool.back_in(Instant::now()));
    Miss::unavailable(refusal)
}

/// Waits before an upstream is asked again that has failed already in this request: twice as long each time, with
/// full jitter over the upper half.
async fn back_off(
    exchange: &Exchange,
    downstream: &mut Downstream,
    planned: &Planned,
    pool: &Pool,
    tried: &[Arc<Endpoint>],
    endpoint: &Arc<Endpoint>,
) -> Result<(), Stop> {
    let repeats = tried.iter().filter(|other| Arc::ptr_eq(other, endpoint)).count() as u32;
    if repeats == 0 || pool.retry.backoff_ms == 0 {
        return Ok(());
    }
    let longest = pool.retry.backoff_ms.saturating_mul(1 << repeats.min(10));
    let wait = Duration::from_millis(longest / 2 + fastrand::u64(0..=longest / 2));
    let limit = Instant::now() + wait;
    match waiting(downstream, exchange, planned).until(limit, std::future::pending::<()>()).await {
        Err(Interrupted::Gone) => Err(Stop::Gone),
        Err(Interrupted::Total) => Err(too_long(planned).into()),
        Err(Interrupted::Stopped) => Err(stopped().into()),
        _ => Ok(()),
    }
}

/// One attempt: an answer to pass on, or why there is none. Where the pool hedges, another endpoint may be asked beside
/// the one that was `picked`, and takes its place if it begins first.
#[allow(clippy::too_many_arguments, reason = "what a request is, and what is asked for it")]
async fn attempt<'a>(
    house: &House,
    exchange: &mut Exchange,
    downstream: &mut Downstream,
    planned: &Planned,
    stage: &'a Stage,
    rest: &[&Stage],
    picked: &mut Picked<'a>,
    (weight, tried): (&Weight, &mut Vec<Arc<Endpoint>>),
) -> Result<Result<Answer, Miss>, Stop> {
    let order = begin(exchange, downstream, planned, stage, picked);
    let asked = match (order, hedge::delay(exchange, planned, stage)) {
        (Err(failure), _) => Err(failure),
        (Ok(order), None) => {
            let mut waits = waiting(downstream, exchange, planned);
            waits.drain = drain(exchange);
            relay::ask(&house.connections, &picked.endpoint.target, &order, &mut waits).await
        }
        (Ok(order), Some(delay)) => {
            let race = Race { house, planned, stage, weight };
            Box::pin(race.run(exchange, downstream, picked, tried, (order, delay))).await
        }
    };
    let target = &picked.endpoint.target;
    let mut waits = waiting(downstream, exchange, planned);
    waits.drain = drain(exchange);
    let mut answer = match asked {
        Ok(answer) => answer,
        Err(failure) => {
            let mut miss = failed(exchange, planned, stage, picked, failure)?;
            miss.again = may_retry(exchange, planned, &stage.pool, rest, miss.cause) && granted(&stage.pool);
            return Ok(Err(miss));
        }
    };
    exchange.attempt_answers(answer.head_at, answer.head.status.as_u16());
    if answer.stale {
        picked.upstream.attempts.stale.inc();
    }
    let looks = rest
        .iter()
        .any(|next| [Cause::ContextLength, Cause::ContentFilter].iter().any(|cause| next.on.contains(cause)));
    if looks && answer.head.status.is_client_error() {
        answer.read_reason(&mut waits).await;
    }
    let Some(cause) = judge(&stage.pool, picked, &answer, looks) else { return Ok(Ok(answer)) };
    let status = answer.head.status.as_u16();
    let refusal = Refusal::new(Code::UpstreamInvalid, format!("the upstream answered with status {status}"));
    let again = may_retry(exchange, planned, &stage.pool, rest, Some(cause)) && granted(&stage.pool);
    let miss = Miss { cause: Some(cause), refusal, again };
    if !again && !may_fall_back(exchange, planned, rest, cause) && !downstream.head_sent() {
        // The upstream's own error says more than ours would.
        return Ok(Ok(answer));
    }
    picked.upstream.attempts.status.inc();
    exchange.attempt_ends(Ending::Status, Some(format!("status {status}").into()));
    answer.rest.discard(&house.connections, target).await;
    Ok(Err(miss))
}

/// What `picked` is asked; the attempt is on the record from here on.
pub fn begin<'a>(
    exchange: &mut Exchange,
    downstream: &Downstream,
    planned: &Planned,
    stage: &'a Stage,
    picked: &Picked<'_>,
) -> Result<Order<'a>, Failure> {
    let body = body_for(exchange, planned, stage, picked.upstream);
    let path = [&*picked.upstream.path, &planned.identified.path].concat();
    exchange.attempt_begins(&stage.pool, picked, body.len());
    if let Some(choice) = &picked.choice {
        let balance = stage.pool.balance;
        let unit = if balance == Balance::ExpectedTime { " s" } else { "" };
        let (rule, name) = (stage.pool.name.clone(), picked.upstream.name.to_str().unwrap_or_default());
        let why = format!("{} {}", balance.name(), choice.why(unit));
        exchange.decide("replica", &rule, name.to_owned(), why);
    }
    let head = request_head(exchange, planned, picked.upstream, downstream.head(), &path, Some(body.len()));
    Order::new(&picked.endpoint.target, &head, body, planned.streaming, &stage.pool.timeouts)
}

/// The name of the model that answers.
pub fn model_at<'a>(exchange: &'a Exchange, stage: &'a Stage, upstream: &'a Upstream) -> &'a str {
    let asked = || exchange.named().or(exchange.route.as_ref().map(|route| route.model.name.as_str()));
    stage.other_name(upstream, exchange.named()).or_else(asked).unwrap_or_default()
}

/// The body as this upstream is to get it: the very bytes, but for the model's name where the policy gives another, for
/// what guardrails and the tenant's parameters change, for the length of the answer where that is limited, for the
/// question of what a stream used where the policy wants to know and the client does not, and for the session's name where
/// the engine wants it there.
fn body_for(exchange: &Exchange, planned: &Planned, stage: &Stage, upstream: &Upstream) -> Bytes {
    let name = stage.other_name(upstream, exchange.named()).or(exchange.substitute.as_deref());
    let mut edits: Vec<Edit> = name.and_then(|name| planned.scan.rename_model(name)).into_iter().collect();
    edits.extend(planned.parameter_edits.iter().chain(&planned.guard_edits).cloned());
    if let Some(max) = planned.output_max {
        let operation = planned.identified.surface.operation;
        let newer = upstream.provider.takes_max_completion_tokens();
        edits.extend(planned.scan.bound_output(operation, &planned.received.body, max, newer));
    }
    if let Some(asks) = planned.asks_for_usage(upstream) {
        edits.extend_from_slice(asks);
    }
    let chats = matches!(planned.identified.surface.operation, Operation::Chat | Operation::Completions);
    if chats && upstream.kv_session == Some(KvSession::Body) {
        edits.extend(planned.scan.name_session(&planned.received.body, exchange.id.as_str()));
    }
    scan::splice(&planned.received.body, &mut edits)
}

fn request_head<'a>(
    exchange: &'a Exchange,
    planned: &'a Planned,
    upstream: &'a Upstream,
    client: &'a http::request::Parts,
    path: &'a str,
    length: Option<usize>,
) -> RequestHead<'a> {
    RequestHead {
        client,
        path,
        authority: &upstream.authority,
        set: &upstream.headers,
        required: upstream.provider.required_headers(),
        id: exchange.id.as_str(),
        traceparent: exchange.traceparent().and_then(|text| HeaderValue::from_bytes(&text).ok()),
        session: upstream.kv_session == Some(KvSession::Header),
        inspected: planned.identified.passthrough.is_none(),
        length: length.filter(|_| planned.received.has_body),
        upgrade: planned.identified.upgrade.as_ref(),
    }
}

/// What an answer's status tells about its upstream, and whether it may be looked for elsewhere.
pub fn judge(pool: &Pool, picked: &Picked<'_>, answer: &Answer, looks: bool) -> Option<Cause> {
    let (breaker, now) = (&picked.endpoint.breaker, answer.rest.first_at);
    let status = answer.head.status.as_u16();
    match status {
        500 | 502..=504 | 529 => {
            if breaker.failure(&pool.breaker, now) {
                tracing::warn!(pool = %pool.name, upstream = ?picked.upstream.name, status, "breaker opened");
            }
            Some(Cause::Status5xx)
        }
        429 => {
            match retry_after(&answer.head) {
                Some(pause) => breaker.pause(pause.min(PAUSE_MAX), now),
                None => breaker.released(),
            }
            Some(Cause::Status429)
        }
        _ => {
            breaker.success(&pool.breaker, now);
            let reason = if looks { picked.upstream.provider.reason(status, &answer.rest.first) } else { None };
            reason.map(|reason| match reason {
                Reason::ContextLength => Cause::ContextLength,
                Reason::ContentFilter => Cause::ContentFilter,
            })
        }
    }
}

/// `Retry-After`, in seconds or as a date (RFC 9110, 10.2.3).
fn retry_after(head: &AnswerHead) -> Option<Duration> {
    pause(head.headers.get(http::header::RETRY_AFTER)?.to_str().ok()?.trim(), SystemTime::now())
}

fn pause(text: &str, now: SystemTime) -> Option<Duration> {
    let pause = match text.parse::<f64>() {
        Ok(seconds) => Duration::try_from_secs_f64(seconds).ok()?,
        Err(_) => httpdate::parse_http_date(text).ok()?.duration_since(now).ok()?,
    };
    (!pause.is_zero()).then_some(pause)
}

/// An attempt that gave no answer: what it tells about the upstream, and how it is told to the client.
pub fn failed(
    exchange: &mut Exchange,
    planned: &Planned,
    stage: &Stage,
    picked: &Picked<'_>,
    failure: Failure,
) -> Result<Miss, Stop> {
    let (ending, code, message) = match told(failure, &stage.pool.timeouts) {
        Ok(told) => told,
        Err(ours) => return Err(ended(exchange, planned, picked, &ours)),
    };
    fails(&stage.pool, picked, (ending, code, &message));
    exchange.attempt_ends(ending, Some(message.clone().into()));
    let cause = match ending {
        Ending::Connect => Cause::Connect,
        Ending::Timeout => Cause::Timeout,
        _ => Cause::Reset,
    };
    Ok(Miss { cause: Some(cause), refusal: Refusal::new(code, message), again: false })
}

/// An attempt that ended for a reason of ours, which tells nothing about the upstream.
fn ended(exchange: &mut Exchange, planned: &Planned, picked: &Picked<'_>, why: &Failure) -> Stop {
    let attempts = &picked.upstream.attempts;
    picked.endpoint.breaker.released();
    let (counter, ending, told, stop) = match why {
        Failure::Gone => (&attempts.cancelled, Ending::Cancelled, "the client left".into(), Stop::Gone),
        Failure::Stopped => (&attempts.cancelled, Ending::Cancelled, "a guardrail ended it".into(), stopped().into()),
        _ => {
            let refusal = too_long(planned);
            (&attempts.timeout, Ending::Timeout, Text::from(refusal.message.clone()), refusal.into())
        }
    };
    counter.inc();
    exchange.attempt_ends(ending, Some(told));
    stop
}

/// How a failure of the upstream's is told; one of ours is given back.
pub fn told(failure: Failure, timeouts: &Timeouts) -> Result<(Ending, Code, String), Failure> {
    Ok(match failure {
        Failure::Gone | Failure::Stopped | Failure::TotalTimeout => return Err(failure),
        Failure::Connect(why) => {
            (Ending::Connect, Code::ConnectFailed, format!("the upstream cannot be reached: {why}"))
        }
        Failure::ConnectTimeout => {
            let message = format!("no connection to the upstream within {} ms", timeouts.connect_ms);
            (Ending::Connect, Code::ConnectTimeout, message)
        }
        Failure::Reset(why) => {
            let message = format!("the upstream closed the connection without an answer: {why}");
            (Ending::Reset, Code::UpstreamClosed, message)
        }
        Failure::Invalid(why) => {
            (Ending::Reset, Code::UpstreamInvalid, format!("the upstream's answer is no HTTP: {why}"))
        }
        Failure::FirstTokenTimeout => {
            let message = format!("no first token within {} ms", timeouts.first_token_ms);
            (Ending::Timeout, Code::FirstTokenTimeout, message)
        }
        Failure::AnswerTimeout => {
            (Ending::Timeout, Code::AnswerTimeout, format!("no answer within {} ms", timeouts.answer_ms))
        }
    })
}

/// An upstream failed: that is counted, and its breaker hears of it.
pub fn fails(pool: &Pool, picked: &Picked<'_>, (ending, code, message): (Ending, Code, &str)) {
    let attempts = &picked.upstream.attempts;
    let counter = match ending {
        Ending::Connect => &attempts.connect,
        Ending::Timeout => &attempts.timeout,
        _ => &attempts.reset,
    };
    counter.inc();
    tracing::warn!(pool = %pool.name, upstream = ?picked.upstream.name, code = code.name(), %message, "attempt failed");
    if picked.endpoint.breaker.failure(&pool.breaker, Instant::now()) {
        tracing::warn!(pool = %pool.name, upstream = ?picked.upstream.name, "breaker opened");
    }
}

/// Whether the same pool may be asked again: an attempt is kept for every pool behind it that could help.
fn may_retry(exchange: &Exchange, planned: &Planned, pool: &Pool, rest: &[&Stage], cause: Option<Cause>) -> bool {
    let Some(cause) = cause.filter(|cause| pool.retry.on.contains(cause)) else { return false };
    let now = Instant::now();
    let kept = rest.iter().filter(|next| next.on.contains(&cause) && next.pool.available(now)).count() as u32;
    exchange.attempt_count() + kept < planned.attempts_max() && pool.available(now)
}

fn may_fall_back(exchange: &Exchange, planned: &Planned, rest: &[&Stage], cause: Cause) -> bool {
    let now = Instant::now();
    let helps = |next: &&Stage| next.on.contains(&cause) && next.pool.available(now);
    exchange.attempt_count() < planned.attempts_max() && rest.iter().any(helps)
}

/// Whether the pool's budget still has a retry.
fn granted(pool: &Pool) -> bool {
    let granted = pool.state.retries.retry(pool.retry.budget, Instant::now());
    if !granted {
        pool.state.retries_refused.inc();
    }
    granted
}

/// The head that the client gets: the upstream's, with what belongs to our connection taken off and what the client
/// can use put on. Names of headers leave in lower case: keeping the case of each would cost a second map.
pub fn head_for_client(
    head: AnswerHead,
    first_at: Instant,
    is_event_stream: bool,
    upstream: &Upstream,
    exchange: &Exchange,
    stage: &Stage,
) -> Result<Parts, Refusal> {
    let mut head = Parts::from(head);
    let to = &mut head.headers;
    // Nearly always none.
    if to.keys().any(|name| HOP_BY_HOP.contains(name)) {
        HOP_BY_HOP.iter().for_each(|name| _ = to.remove(name));
    }
    if stage.pool.load.headers {
        to.remove(told::TELLS);
    }
    if let Some(theirs) = to.remove(headers::REQUEST_ID) {
        set(to, headers::UPSTREAM_REQUEST_ID, theirs)?;
    }
    redirect(to, upstream, exchange)?;
    if is_event_stream {
        to.remove(CONTENT_LENGTH);
        set(to, CACHE_CONTROL, "no-cache")?;
        set(to, headers::ACCEL_BUFFERING, "no")?;
    }
    local::identify(to, exchange)?;
    let model = model_at(exchange, stage, upstream);
    // A name that no header can carry is not told.
    if model.is_ascii() {
        let _ = set(to, headers::MODEL, model);
    }
    if let Some(Chosen { by, model }) = &exchange.chosen {
        let _ = set(to, headers::ROUTE, format!("{by}={model}"));
    }
    standing::tell(to, exchange.surface.dialect, exchange.standings(), exchange.times.at)?;
    if exchange.policy.requests.name_upstream {
        set(to, headers::UPSTREAM, upstream.name.clone())?;
    }
    set(to, headers::ATTEMPTS, u64::from(exchange.attempt_count()))?;
    let now = Instant::now();
    if exchange.policy.requests.server_timing {
        set(to, headers::SERVER_TIMING, timing(exchange, first_at, now))?;
    }
    if exchange.policy.requests.overhead {
        let own = exchange.overhead(first_at, now).as_micros();
        set(to, headers::OVERHEAD_US, own as u64)?;
    }
    Ok(head)
}

/// Says where an answer leads without telling where its upstream is. Only what passes unread may lead elsewhere: the
/// prompt and the key of any other request would follow.
fn redirect(to: &mut HeaderMap, upstream: &Upstream, exchange: &Exchange) -> Result<(), Refusal> {
    for name in [LOCATION, CONTENT_LOCATION] {
        let Some(told) = to.remove(&name) else { continue };
        let led = told.to_str().ok().and_then(|told| led(told, |host| upstream.is_at(host), &upstream.path));
        match led {
            Some(path) => set(to, name, path)?,
            None if exchange.surface.operation == Operation::Passthrough => set(to, name, told)?,
            None => {}
        }
    }
    Ok(())
}

fn timing(exchange: &Exchange, first_at: Instant, now: Instant) -> Vec<u8> {
    let times = &exchange.times;
    server_timing(&[
        ("body", times.body - times.received),
        ("admit", times.admitted - times.body),
        ("queue", times.queued - times.admitted),
        ("upstream", first_at.saturating_duration_since(times.queued)),
        ("relay", now.saturating_duration_since(first_at)),
    ])
}

/// Opens a WebSocket to an upstream and carries it. It is tried on another upstream only if none was reached.
pub async fn tunnel(
    house: &House,
    exchange: &mut Exchange,
    downstream: &mut Downstream,
    planned: &Planned,
) -> Result<(), Stop> {
    let stage = &planned.route.stages[0];
    let pool = &*stage.pool;
    if exchange.who.as_ref().is_some_and(|who| !who.tenant.may_reach(pool)) {
        return Err(
            Refusal::new(Code::ModelNotAllowed, "this WebSocket goes to no region that this key may use").into()
        );
    }
    let mut permit = match enter(exchange, downstream, planned, stage).await? {
        Ok(permit) => permit,
        Err(miss) => return Err(miss.refusal.into()),
    };
    queued(exchange, planned, pool);
    let mut tried: Vec<Arc<Endpoint>> = Vec::new();
    let operation = planned.identified.surface.operation;
    loop {
        let wants = || Wanted { batch: planned.is_batch(), ..Wanted::of(operation) };
        let Some(picked) = pool.pick(&wants(), &tried, Instant::now()) else {
            return Err(nobody(pool).refusal.into());
        };
        permit.placed();
        tried.push(picked.endpoint.clone());
        exchange.attempt_begins(&stage.pool, &picked, 0);
        let client = downstream.head().clone();
        let path = format!("{}{}", picked.upstream.path, planned.identified.path);
        let head = request_head(exchange, planned, picked.upstream, &client, &path, None);
        let mut waits = waiting(downstream, exchange, planned);
        let opened =
            relay::tunnel(&house.connections, &picked.endpoint.target, &head, &pool.timeouts, &mut waits).await;
        match opened {
            Ok(Tunnelled::Open(tunnel)) => {
                picked.endpoint.breaker.success(&pool.breaker, Instant::now());
                carried(house, exchange, downstream, *tunnel, &picked).await;
                return Ok(());
            }
            Ok(Tunnelled::Refused(answer)) => {
                let status = answer.status.as_u16();
                exchange.attempt_answers(Instant::now(), status);
                exchange.attempt_ends(Ending::Status, None);
                let message = format!("the upstream refused to open a WebSocket: status {status}");
                return Err(Refusal::new(Code::UpstreamInvalid, message).into());
            }
            Err(failure) => {
                let miss = failed(exchange, planned, stage, &picked, failure)?;
                if miss.cause != Some(Cause::Connect)
                    || !may_retry(exchange, planned, pool, &[], miss.cause)
                    || !granted(pool)
                {
                    return Err(miss.refusal.into());
                }
            }
        }
    }
}

/// Carries a tunnel that stands, to its end. Where records must be durable first, the client has neither the upstream's
/// goodbye nor the end of its connection before this one's is.
async fn carried(
    house: &House,
    exchange: &mut Exchange,
    downstream: &mut Downstream,
    mut tunnel: Tunnel,
    picked: &Picked<'_>,
) {
    let now = Instant::now();
    exchange.attempt_answers(now, 101);
    exchange.answering(now, 101);
    exchange.bill = exchange.policy.prices.as_ref().map(|_| Bill::unknown());
    let cut = pin!(identity::revoked(house, exchange.policy.clone(), exchange.hold()));
    let (durable, counts) = (exchange.is_durable(), (&mut exchange.body_bytes, &mut exchange.tally.bytes));
    let parting = relay::carry(&mut tunnel, downstream, counts, durable, cut).await;
    if matches!(parting, Parting::Cut) {
        picked.upstream.attempts.cancelled.inc();
        exchange.attempt_ends(Ending::Cancelled, Some("the caller's key was revoked".into()));
        exchange.refused(&identity::revoked_refusal());
    } else {
        picked.upstream.attempts.answered.inc();
        exchange.attempt_ends(Ending::Answered, None);
        exchange.completed();
    }
    exchange.settle();
    let on_record = exchange.put_on_record().await;
    let goodbye = if let Parting::Goodbye(bytes) = parting { Some(bytes) } else { None };
    // A connection that ends without a goodbye tells the client that not all is well.
    relay::part(tunnel, downstream, goodbye.filter(|_| on_record)).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_is_read_in_seconds_and_as_a_date() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_770);
        assert_eq!(pause("7", now), Some(Duration::from_secs(7)));
        assert_eq!(pause("0.5", now), Some(Duration::from_millis(500)));
        assert_eq!(pause("Sun, 06 Nov 1994 08:49:37 GMT", now), Some(Duration::from_secs(7)));
        for nothing in ["0", "-1", "NaN", "soon", "", "Sun, 06 Nov 1994 08:49:00 GMT"] {
            assert_eq!(pause(nothing, now), None, "{nothing}");
        }
    }
}
