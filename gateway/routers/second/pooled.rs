//! The second stage in one of the policy's pools: one attempt, made as any request's is, by the thread that carries the
//! request.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::header::CONTENT_TYPE;
use infergate_plugins::router::second::Doubt;
use tokio::time::timeout_at;

use super::late;
use crate::exchange::Exchange;
use crate::failover;
use crate::guard::BESIDE;
use crate::house::House;
use crate::money::bill::Bill;
use crate::pool::queue::{Full, Permit};
use crate::pool::score::Asked;
use crate::pool::worked::Share;
use crate::pool::{Picked, Pool, Wanted};
use crate::relay::headers::RequestHead;
use crate::relay::{self, Answer, Failure, Order, Waiting, WholeFault};

/// The longest answer that is read.
const ANSWER_BYTES_MAX: usize = 1 << 20;

/// The pool, if the tenant's requests may go there.
pub(super) fn reached(exchange: &Exchange, name: &str) -> Result<Arc<Pool>, String> {
    let pool = exchange.policy.pools.get(name).ok_or_else(|| format!("there is no pool {name}"))?;
    match &exchange.who {
        Some(who) if !who.tenant.may_reach(pool) => Err(format!("pool {name} is in no region of {}", who.tenant.name)),
        _ => Ok(pool.clone()),
    }
}

/// The route that an upstream of the pool says it is, or why none says so.
pub(super) async fn ask(
    house: &House,
    exchange: &mut Exchange,
    pool: &Pool,
    doubt: &Doubt,
) -> Result<Arc<str>, String> {
    let until = Instant::now() + doubt.second.deadline();
    let _permit = enter(pool, doubt, until).await?;
    let picked = pick(pool, doubt).ok_or_else(|| failover::out(pool))?;
    let model = picked.upstream.model.as_deref().unwrap_or(doubt.second.model());
    let asked = doubt.body(model);
    let price = exchange.price(model, pool, picked.upstream).cloned();
    let bill = Bill::open(price, doubt.second.operation().0, &asked, 1, true);
    let share = Share::begin(&picked.endpoint, Instant::now());
    let body = match attempt(house, exchange, pool, &picked, doubt, (asked, until)).await {
        Ok(answer) => good(house, pool, &picked, answer).await?,
        Err(failure) => return Err(failed(pool, &picked, doubt, failure)),
    };
    let (usage, cost) = bill.settle_whole(&body, Some(share.micros(Instant::now())));
    // As if the request had used it itself.
    exchange.used_besides(usage, cost.flatten());
    read(doubt, body).await
}

/// A place in the pool, if there is one in time.
async fn enter(pool: &Pool, doubt: &Doubt, until: Instant) -> Result<Permit, String> {
    let mut permit = match timeout_at(until.into(), pool.state.queue.enter(pool.concurrency, 0)).await {
        Ok(Ok(permit)) => permit,
        Ok(Err(Full::Queue(_) | Full::Wait(_))) => return Err(format!("pool {} is full", pool.name)),
        Err(_) => return Err(late(doubt)),
    };
    permit.placed();
    Ok(permit)
}

fn pick<'p>(pool: &'p Pool, doubt: &Doubt) -> Option<Picked<'p>> {
    let (operation, _) = doubt.second.operation();
    let asked = Asked { prompt: doubt.tokens(), ..Asked::default() };
    let wanted = Wanted { asked, model: doubt.second.model(), ..Wanted::of(operation) };
    pool.pick(&wanted, &[], Instant::now())
}

/// The whole answer of the one that was picked.
async fn attempt(
    house: &House,
    exchange: &Exchange,
    pool: &Pool,
    picked: &Picked<'_>,
    doubt: &Doubt,
    (body, until): (Bytes, Instant),
) -> Result<Answer, Failure> {
    let (upstream, target) = (picked.upstream, &picked.endpoint.target);
    let path = [&*upstream.path, doubt.second.operation().1].concat();
    let client = http::Request::post("/").header(CONTENT_TYPE, "application/json").body(());
    let (client, ()) = client.map_err(|error| Failure::Invalid(error.to_string()))?.into_parts();
    let own = RequestHead::own(&client, upstream, &path, exchange.id.as_str());
    let head = RequestHead { length: Some(body.len()), ..own };
    let order = Order::new(target, &head, body, false, &pool.timeouts)?;
    let mut waiting = Waiting::beside(until, exchange.id);
    let mut answer = relay::ask(&house.connections, target, &order, &mut waiting).await?;
    let between = Duration::from_millis(pool.timeouts.between_tokens_ms);
    match answer.rest.read_whole(&mut waiting, between, ANSWER_BYTES_MAX).await {
        Ok(()) => Ok(answer),
        Err(WholeFault::Interrupted(_)) => Err(Failure::TotalTimeout),
        Err(WholeFault::Broken(_, why)) => Err(Failure::Reset(why)),
        Err(WholeFault::TooLong) => Err(Failure::Invalid(format!("it is longer than {ANSWER_BYTES_MAX} bytes"))),
    }
}

/// What a good answer says. Its endpoint's breaker hears of it whatever it is.
async fn good(house: &House, pool: &Pool, picked: &Picked<'_>, answer: Answer) -> Result<Bytes, String> {
    let (status, body) = (answer.head.status, answer.rest.first.clone());
    let attempts = &picked.upstream.attempts;
    let counter = match failover::judge(pool, picked, &answer, false) {
        None => &attempts.answered,
        Some(_) => &attempts.status,
    };
    counter.inc();
    answer.rest.discard(&house.connections, &picked.endpoint.target).await;
    if status.is_success() { Ok(body) } else { Err(format!("it answers with status {}", status.as_u16())) }
}

/// Why there is no answer. One that does not come in our time tells nothing about its endpoint.
fn failed(pool: &Pool, picked: &Picked<'_>, doubt: &Doubt, failure: Failure) -> String {
    match failover::told(failure, &pool.timeouts) {
        Ok((ending, code, message)) => {
            failover::fails(pool, picked, (ending, code, &message));
            message
        }
        Err(_) => {
            picked.upstream.attempts.timeout.inc();
            picked.endpoint.breaker.released();
            late(doubt)
        }
    }
}

/// Long lists of numbers are read beside the threads that carry requests.
async fn read(doubt: &Doubt, body: Bytes) -> Result<Arc<str>, String> {
    if body.len() <= BESIDE {
        return Ok(doubt.read(&body)?.clone());
    }
    let doubt = doubt.clone();
    let reading = tokio::task::spawn_blocking(move || doubt.read(&body).cloned());
    Ok(reading.await.map_err(|_| "its answer cannot be read")??)
}
