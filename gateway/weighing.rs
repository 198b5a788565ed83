//! What a request is to those who could answer it: tokens to read and to write, what they have read before, its price.
//! And what it was in the end, for the next one.

use std::sync::Arc;
use std::time::Instant;

use http::{HeaderMap, HeaderValue};
use infergate_plugins::operation::Operation;

use crate::exchange::Exchange;
use crate::failover::model_at;
use crate::limits::admit::{end_user, prompt_tokens};
use crate::money::bill;
use crate::pipeline::Planned;
use crate::policy::{Route, Stage};
use crate::pool::origin::{Endpoint, fnv};
use crate::pool::prefix::{Blocks, Chain};
use crate::pool::queue::Claim;
use crate::pool::score::{Asked, Balance};
use crate::pool::{Picked, Pool, Upstream, Wanted, told};
use crate::relay::Answer;
use crate::usage::{Source, Usage};

/// What one request is to the endpoints of one pool.
#[derive(Debug, Default)]
pub struct Weight {
    asked: Asked,
    chain: Chain,
}

/// Of a user's name, or of a prompt that names none, so many bytes decide where `hash` puts it: what its conversation begins with.
const KEY_BYTES: usize = 256;

impl Weight {
    /// Weighs it, as far as the pool's balance asks for that. `head` is the client's.
    pub fn of(exchange: &Exchange, planned: &Planned, stage: &Stage, head: &HeaderMap) -> Self {
        let balance = stage.pool.balance;
        let key = if balance == Balance::Hash { key(exchange, planned, head) } else { 0 };
        if !balance.weighs() {
            return Self { asked: Asked { key, ..Asked::default() }, chain: Chain::default() };
        }
        let (prompt, output) = tokens(exchange, planned, stage);
        Self { asked: Asked { prompt, output, key, turn: 0 }, chain: chain(exchange, planned, stage) }
    }

    /// Picks who is asked.
    pub fn pick<'a>(
        &self,
        exchange: &Exchange,
        planned: &Planned,
        stage: &'a Stage,
        tried: &[Arc<Endpoint>],
        now: Instant,
    ) -> Option<Picked<'a>> {
        let cost = |upstream: &Upstream| nanousd(exchange, planned, stage, upstream, &self.asked);
        let wanted = Wanted {
            operation: planned.identified.surface.operation,
            asked: self.asked,
            whole: !planned.streaming,
            batch: planned.is_batch(),
            model: stage.renamed(exchange.named()).or(exchange.named()).unwrap_or_default(),
            chain: Some(&self.chain),
            cost: if stage.pool.balance == Balance::LeastCost { Some(&cost) } else { None },
        };
        stage.pool.pick(&wanted, tried, now)
    }

    /// An answer to it has begun: its prompt has been read.
    pub fn begins(&self, stage: &Stage, picked: &mut Picked<'_>, answer: &Answer, began: Instant) {
        let pool = &stage.pool;
        if pool.hedge.is_some() && answer.head.status.is_success() {
            let took = answer.rest.first_at.saturating_duration_since(began).as_secs_f32();
            let state = &pool.state;
            let seen = if answer.is_event_stream() { &state.first_tokens } else { &state.whole_answers };
            seen.took(took);
        }
        if !pool.balance.weighs() {
            return;
        }
        if let Some(told) = answer.head.headers.get(told::TELLS).map(HeaderValue::as_bytes).and_then(told::header) {
            picked.endpoint.hears(told, answer.head_at);
        }
        if !answer.head.status.is_success() {
            return;
        }
        if answer.is_event_stream() {
            picked.work.first_token(&pool.state.paces, answer.rest.first_at);
        }
        if let Some(prefixes) = pool.prefixes.as_ref().filter(|_| !self.chain.is_empty())
            && let Some(seat) = picked.endpoint.seat(prefixes)
        {
            prefixes.learn(&self.chain, seat);
            picked.read = picked.upstream.kv_session.map(|_| self.chain.clone());
        }
    }
}

/// An answer was given to its end: what is seen of it tells how fast its endpoint is, and how long answers are.
pub fn ends(exchange: &Exchange, stage: &Stage, picked: &mut Picked<'_>) {
    let pool = &stage.pool;
    if !pool.balance.weighs() {
        return;
    }
    let usage = exchange.tally.usage(true);
    let output = usage.output_tokens.unwrap_or_default();
    picked.work.answered(output, &pool.state.paces, Instant::now());
    if let Some((prefixes, seat)) = pool.prefixes.as_ref().zip(picked.endpoint.seated()) {
        prefixes.wrote(seat, Blocks::default().in_tokens(output));
    }
    if usage.source != Source::Upstream {
        return;
    }
    let prompt = prompt_tokens(&usage, bill::cached(exchange.surface.operation));
    if let Some(chain) = picked.read.take() {
        let tokens = [prompt, output].map(|tokens| u32::try_from(tokens).unwrap_or(u32::MAX));
        picked.endpoint.feed.read(exchange.id.bytes(), chain, tokens.into(), Instant::now());
    }
    // Where there are limits they learn this, from the text alone.
    if let Some(route) = exchange.route.as_ref().filter(|_| exchange.tally.reservation.is_none()) {
        route.density.learn(exchange.body_bytes, prompt);
    }
}

/// What it claims of a pool's places; weighed only where those are counted.
pub fn claim(exchange: &Exchange, planned: &Planned, stage: &Stage, level: i32) -> Claim {
    let batch = planned.is_batch();
    if stage.pool.concurrency.max.is_none() && !batch {
        return Claim::from(level);
    }
    let (prompt, output) = tokens(exchange, planned, stage);
    let (tenant, share) =
        exchange.who.as_ref().map_or((0, 1), |who| (fnv(who.tenant.name.as_bytes()), who.tenant.share));
    Claim { level, tenant, tokens: prompt.saturating_add(output), share, batch }
}

/// Tokens to be read, and to be written as far as can be expected.
pub fn tokens(exchange: &Exchange, planned: &Planned, stage: &Stage) -> (u32, u32) {
    let (operation, body) = (planned.identified.surface.operation, &planned.received.body);
    let bytes = exchange.tally.reservation.as_ref().map_or_else(|| bill::text_bytes(body), |held| held.text_bytes);
    let most = planned.scan.output_max(operation, body).ok().flatten().or(planned.output_max);
    expected(operation, &planned.route, &stage.pool, bytes, most, planned.choices())
}

/// The same of a text of so many bytes, of whose answer each choice may have `most` tokens.
pub fn expected(
    operation: Operation,
    route: &Route,
    pool: &Pool,
    text_bytes: u64,
    most: Option<u64>,
    choices: u64,
) -> (u32, u32) {
    let (reads, writes) = bill::work(operation);
    let prompt = if reads { route.density.likely(text_bytes) } else { 0 };
    let usual = u64::from(pool.state.paces.output());
    let output = most.map_or(usual, |most| most.min(usual)).saturating_mul(choices);
    let within = |tokens: u64| u32::try_from(tokens.min(TOKENS_MAX)).unwrap_or(u32::MAX);
    (within(prompt), if writes { within(output) } else { 0 })
}

/// More tokens than any model reads or writes: what a client claims cannot overflow a sum of many.
const TOKENS_MAX: u64 = 4_000_000;

/// The blocks of its prompt. What one tenant's prompts tell is nothing to another's.
fn chain(exchange: &Exchange, planned: &Planned, stage: &Stage) -> Chain {
    let tenant = exchange.who.as_ref().map_or(b"".as_slice(), |who| who.tenant.name.as_bytes());
    chain_of(&stage.pool, tenant, &planned.route.model.name, planned.scan.template(&planned.received.body))
}

/// The blocks of a prompt with this template, as the pool's index has them.
pub fn chain_of<'a>(
    pool: &Pool,
    tenant: &'a [u8],
    model: &str,
    template: impl Iterator<Item = (&'static str, &'a [u8])>,
) -> Chain {
    let Some(prefixes) = &pool.prefixes else { return Chain::default() };
    prefixes.chain(Blocks::default(), model, std::iter::once(("tenant", tenant)).chain(template))
}

/// What stays the same for requests that belong together: the end user, as limits know them, or else how the prompt
/// begins.
fn key(exchange: &Exchange, planned: &Planned, head: &HeaderMap) -> u64 {
    let body = &planned.received.body;
    let tenant = exchange.who.as_ref().map_or("", |who| &*who.tenant.name);
    let user = end_user(exchange, planned, head);
    let begins = || planned.scan.template(body).map(|(_, value)| value).next().unwrap_or_default();
    let told = user.as_ref().map_or_else(begins, |user| user.as_bytes());
    fnv(tenant.as_bytes()) ^ fnv(&told[..told.len().min(KEY_BYTES)]).rotate_left(32)
}

/// What it costs at an upstream; the most of all where that has no price.
fn nanousd(exchange: &Exchange, planned: &Planned, stage: &Stage, upstream: &Upstream, asked: &Asked) -> f32 {
    if exchange.policy.prices.is_none() {
        return 0.0;
    }
    let price = exchange.price(model_at(exchange, stage, upstream), &stage.pool, upstream);
    let usage = Usage {
        input_tokens: Some(u64::from(asked.prompt)),
        output_tokens: Some(u64::from(asked.output)),
        ..Usage::default()
    };
    let cached = bill::cached(planned.identified.surface.operation);
    price.and_then(|price| price.cost(&usage, cached)).map_or(f32::MAX, |cost| cost.0 as f32)
}
