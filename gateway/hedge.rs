//! Hedging: a second endpoint is asked beside one that is slow to begin, and whoever begins first answers.
//!
//! The other one is let go at once. Only what can be done twice without harm is asked twice, and only as often as the
//! pool's budget allows.

use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::{Duration, Instant};

use http::StatusCode;
use infergate_plugins::operation::Operation;
use memchr::memmem;

use crate::answering;
use crate::audit::record::{Attempt, Ending};
use crate::exchange::Exchange;
use crate::failover::{begin, failed};
use crate::house::House;
use crate::money::bill::End;
use crate::pipeline::{Planned, Stop, drain, waiting};
use crate::policy::Stage;
use crate::pool::Picked;
use crate::pool::origin::Endpoint;
use crate::relay::{self, Answer, Downstream, Failure, Interrupted, Order, Waiting};
use crate::stored::leaves_nothing;
use crate::usage::{Source, Usage};
use crate::weighing::{self, Weight};

/// Fewer seconds than this are no delay worth asking twice for.
const DELAY_MIN: Duration = Duration::from_millis(5);

/// After how long a second endpoint would be asked; `None`: none would.
pub fn delay(exchange: &Exchange, planned: &Planned, stage: &Stage) -> Option<Duration> {
    let pool = &stage.pool;
    pool.hedge?;
    if exchange.attempt_count() >= planned.attempts_max() || planned.is_batch() || !is_repeatable(planned) {
        return None;
    }
    let seen = if planned.streaming { &pool.state.first_tokens } else { &pool.state.whole_answers };
    Some(Duration::from_secs_f32(seen.p95_s()?).max(DELAY_MIN))
}

/// Whether it does no harm to ask twice: nothing is kept of the answer but the answer.
fn is_repeatable(planned: &Planned) -> bool {
    let body = &planned.received.body;
    let says = |key: &str| memmem::find(body, key.as_bytes()).is_some();
    match planned.identified.surface.operation {
        Operation::Chat | Operation::Completions | Operation::Generate => !says("\"store\""),
        Operation::Messages => !says("\"store\"") && !says("\"mcp_servers\"") && !says("\"container\""),
        Operation::Responses => says("\"store\"") && leaves_nothing(body),
        Operation::Embeddings | Operation::Rerank | Operation::Score | Operation::Pooling => true,
        _ => false,
    }
}

/// One request that may be asked twice.
pub struct Race<'r, 'a> {
    /// What lives as long as the process.
    pub house: &'r House,
    /// The request.
    pub planned: &'r Planned,
    /// The pool.
    pub stage: &'a Stage,
    /// What it is to the pool's endpoints.
    pub weight: &'r Weight,
}

type Asking<'f> = Pin<&'f mut (dyn Future<Output = Result<Answer, Failure>> + Send)>;

/// Who came first: the endpoint that was asked first, or the other.
enum First {
    Earlier(Result<Answer, Failure>),
    Later(Result<Answer, Failure>),
}

impl<'a> Race<'_, 'a> {
    /// Asks `picked`, and another one beside it if nothing came of it after `delay`. Who answers is `picked` then.
    pub async fn run(
        &self,
        exchange: &mut Exchange,
        downstream: &mut Downstream,
        picked: &mut Picked<'a>,
        tried: &mut Vec<Arc<Endpoint>>,
        (order, delay): (Order<'_>, Duration),
    ) -> Result<Answer, Failure> {
        let (endpoint, planned) = (picked.endpoint.clone(), self.planned);
        let mut patience = Waiting::beside(planned.total, exchange.id);
        let mut asking = pin!(relay::ask(&self.house.connections, &endpoint.target, &order, &mut patience));
        let mut waits = self.waits(exchange, downstream);
        match waits.until(Instant::now() + delay, asking.as_mut()).await {
            Ok(done) => return done,
            Err(Interrupted::Limit) => {}
            Err(interrupted) => return Err(ended(interrupted)),
        }
        let Some(mut other) = self.other(exchange, tried) else {
            return self
                .waits(exchange, downstream)
                .until(planned.total, asking)
                .await
                .unwrap_or_else(|why| Err(ended(why)));
        };
        let other_order = begin(exchange, downstream, planned, self.stage, &other)?;
        let other_endpoint = other.endpoint.clone();
        let mut other_patience = Waiting::beside(planned.total, exchange.id);
        let other_asking =
            pin!(relay::ask(&self.house.connections, &other_endpoint.target, &other_order, &mut other_patience));
        let won = self.both(exchange, downstream, (picked, &mut other), (asking, other_asking)).await;
        if won.1 {
            std::mem::swap(picked, &mut other);
        }
        won.0
    }

    /// Another endpoint, if there is one and the budget allows it.
    fn other(&self, exchange: &Exchange, tried: &mut Vec<Arc<Endpoint>>) -> Option<Picked<'a>> {
        let (pool, now) = (&self.stage.pool, Instant::now());
        let share = f64::from(pool.hedge?.budget_percent) / 100.0;
        let other = self.weight.pick(exchange, self.planned, self.stage, tried, now)?;
        if tried.iter().any(|one| Arc::ptr_eq(one, &other.endpoint)) {
            return None;
        }
        if !pool.state.hedges.hedge(share, now) {
            pool.state.hedged.refused.inc();
            return None;
        }
        tried.push(other.endpoint.clone());
        Some(other)
    }

    fn waits<'w>(&self, exchange: &Exchange, downstream: &'w mut Downstream) -> Waiting<'w> {
        let mut waits = waiting(downstream, exchange, self.planned);
        waits.drain = drain(exchange);
        waits
    }

    /// Waits for either; where one of them fails, for the other. Returns whether the later one came first. What the
    /// loser was is on the record before the winner.
    async fn both<'f>(
        &self,
        exchange: &mut Exchange,
        downstream: &mut Downstream,
        (earlier, later): (&Picked<'a>, &Picked<'a>),
        (mut first, mut second): (Asking<'f>, Asking<'f>),
    ) -> (Result<Answer, Failure>, bool) {
        let total = self.planned.total;
        let mut waits = self.waits(exchange, downstream);
        let came = match waits.until(total, either(first.as_mut(), second.as_mut())).await {
            Ok(came) => came,
            Err(interrupted) => {
                exchange.other_attempt();
                self.cancel(exchange, earlier, "the other one ended with it");
                exchange.other_attempt();
                return (Err(ended(interrupted)), true);
            }
        };
        let (done, is_later, loser, rest) = match came {
            First::Earlier(done) => (done, false, later, second),
            First::Later(done) => (done, true, earlier, first),
        };
        match done {
            Ok(answer) => {
                let counter = &self.stage.pool.state.hedged;
                if is_later {
                    counter.won.inc()
                } else {
                    counter.lost.inc()
                };
                self.let_go(exchange, loser, is_later);
                if !is_later {
                    exchange.other_attempt();
                }
                (Ok(answer), is_later)
            }
            Err(failure) => {
                let one = if is_later { later } else { earlier };
                self.fails(exchange, one, failure, is_later);
                let mut waits = self.waits(exchange, downstream);
                let done = waits.until(total, rest).await.unwrap_or_else(|why| Err(ended(why)));
                (done, !is_later)
            }
        }
    }

    /// The one that lost is ended, and what it was given is used; the `earlier` one is not the last on the record.
    fn let_go(&self, exchange: &mut Exchange, loser: &Picked<'_>, earlier: bool) {
        if earlier {
            exchange.other_attempt();
        }
        let prompt = u64::from(weighing::tokens(exchange, self.planned, self.stage).0);
        self.stage.pool.state.hedged.tokens.inc_by(prompt);
        self.cancel(exchange, loser, "another endpoint began first");
        self.meter(exchange, loser, prompt);
        if earlier {
            exchange.other_attempt();
        }
    }

    fn cancel(&self, exchange: &mut Exchange, loser: &Picked<'_>, why: &'static str) {
        loser.upstream.attempts.cancelled.inc();
        loser.endpoint.breaker.released();
        exchange.attempt_ends(Ending::Cancelled, Some(why.into()));
    }

    /// Nobody says how far an endpoint came that was let go before its answer began: its whole prompt counts, as for
    /// any answer that is cut.
    fn meter(&self, exchange: &mut Exchange, loser: &Picked<'_>, prompt: u64) {
        let told = Usage { input_tokens: Some(prompt), source: Source::Partial, ..Usage::default() };
        let gpu_us = exchange.attempts.last().and_then(Attempt::gpu_us);
        let bill = answering::bill(exchange, self.planned, self.stage, loser.upstream, StatusCode::OK);
        let end = End { bytes: 0, events: true, whole: false, gpu_us };
        let (usage, cost) = bill.map_or((told, None), |bill| bill.settle(told, end));
        exchange.attempt_used(usage, cost.flatten());
    }

    /// One of two fails while the other one runs: that is the last on the record from now on.
    fn fails(&self, exchange: &mut Exchange, one: &Picked<'_>, failure: Failure, is_later: bool) {
        if !is_later {
            exchange.other_attempt();
        }
        let _: Result<_, Stop> = failed(exchange, self.planned, self.stage, one, failure);
        exchange.other_attempt();
    }
}

/// Whichever comes first.
async fn either(mut first: Asking<'_>, mut second: Asking<'_>) -> First {
    tokio::select! {
        biased;
        done = &mut first => First::Earlier(done),
        done = &mut second => First::Later(done),
    }
}

fn ended(interrupted: Interrupted) -> Failure {
    match interrupted {
        Interrupted::Gone => Failure::Gone,
        Interrupted::Stopped => Failure::Stopped,
        _ => Failure::TotalTimeout,
    }
}
