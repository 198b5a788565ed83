//! A cascade on its way: the model that was chosen answers, its answer is judged before anything of it leaves, and where
//! it is not good enough the next model is asked.
//!
//! Whatever was asked is on the record with what it used and cost, and limits count all of it. Where a limit has nothing
//! left for the next model, the answer that is there stands.

pub mod answered;

use std::sync::Arc;
use std::time::{Duration, Instant};

use infergate_plugins::guardrail::schema;
use infergate_plugins::operation::Operation;
use infergate_plugins::provider::Reason;
use infergate_plugins::router::cascade::{Cascade, Cause, Streams};
use infergate_plugins::router::effort::Effort;

use crate::answering;
use crate::audit::record::{Ending, Text};
use crate::exchange::{Exchange, Heard};
use crate::failover::{self, Asked};
use crate::guard::{BESIDE, WHOLE_MAX};
use crate::house::House;
use crate::limits;
use crate::pipeline::{Planned, Stop, waiting};
use crate::policy::Route;
use crate::refusal::{Code, Refusal};
use crate::relay::{Downstream, Interrupted, WholeFault};
use crate::routers::{Chosen, Decided, Routers, effort};
use crate::scan::Edit;
use crate::stored::keeps_answer;
use crate::text;
use crate::text::asked::Schema;
use crate::weighing;

/// The models that one request may come to, in order.
#[derive(Debug)]
pub struct Ladder {
    /// The virtual model.
    name: Arc<str>,
    cascade: Arc<Cascade>,
    first: Step,
    rest: Vec<Step>,
    /// The conversation, where that is remembered.
    key: Option<u64>,
    /// Whether the model is to go on from what a tool gave back.
    in_loop: bool,
    /// What the tenant's parameters want of the body, before any rule said how much is thought.
    unthought: Vec<Edit>,
}

#[derive(Debug)]
struct Step {
    model: Arc<str>,
    route: Arc<Route>,
    /// How much it thinks when it is its turn; `None`: what was said before stays.
    effort: Option<Effort>,
}

/// What came of a model that does not suffice, and why not.
struct Short<'a> {
    came: Result<Asked<'a>, Refusal>,
    /// In a word, for metrics.
    cause: &'static str,
    why: Text,
}

/// The cause where there is no answer at all.
const FAILURE: &str = "failure";

impl Ladder {
    /// The models behind the one that was decided on, if its answer decides whether they are asked. `unthought` are the
    /// edits of the body before that decision said how much is thought.
    pub fn of(
        routers: &Routers,
        decided: &Decided,
        exchange: &mut Exchange,
        planned: &Planned,
        unthought: Vec<Edit>,
    ) -> Option<Box<Self>> {
        let cascade = routers.cascade.as_ref()?;
        let step = |model: &Arc<str>| {
            let (route, effort) = (routers.models.get(model)?.clone(), routers.effort.get(&**model).copied());
            Some(Step { model: model.clone(), route, effort })
        };
        let rest: Vec<Step> = decided.able.iter().filter_map(step).collect();
        if rest.is_empty() {
            return None;
        }
        if let Some(why) = skips(cascade, decided, planned) {
            exchange.decide("cascade", &routers.name, "skip", why);
            return None;
        }
        let (name, cascade) = (routers.name.clone(), cascade.clone());
        let (first, key, in_loop) = (step(&decided.model)?, decided.key, decided.in_loop);
        Some(Box::new(Self { name, cascade, first, rest, key, in_loop, unthought }))
    }

    /// Whether this is where it begins: a limit may have sent the request elsewhere.
    pub fn begins_with(&self, route: &Arc<Route>) -> bool {
        Arc::ptr_eq(&self.first.route, route)
    }

    /// Asks one model after another until there is an answer to pass on.
    pub async fn ask<'a>(
        &'a self,
        house: &House,
        exchange: &mut Exchange,
        downstream: &mut Downstream,
        planned: &mut Planned,
    ) -> Result<Asked<'a>, Stop> {
        planned.climbing = true;
        let shape = Arc::new(self.shape(exchange, planned));
        let mut step = &self.first;
        for next in &self.rest {
            let came = failover::ask(house, exchange, downstream, planned, &step.route).await;
            let mut short = match self.judge(house, exchange, downstream, planned, &shape, came).await? {
                Ok(asked) => return Ok(asked),
                Err(short) => short,
            };
            if !self.climbs(house, exchange, downstream, planned, &mut short, (step, next)).await? {
                return short.came.map_err(Stop::from);
            }
            self.let_go(house, exchange, short, next).await;
            step = next;
        }
        failover::ask(house, exchange, downstream, planned, &step.route).await
    }

    /// The shape that the request asks for; none where it asks for none, or where that cannot be read.
    fn shape(&self, exchange: &mut Exchange, planned: &Planned) -> schema::Asked {
        if !self.cascade.asks_on(Cause::Schema) {
            return schema::Asked::default();
        }
        let body = &planned.received.body;
        let found = text::schemas(planned.identified.surface.operation, body).unwrap_or_default();
        let answer = found.answer.map(|schema| match schema {
            Schema::Object => br#"{"type":"object"}"#.as_slice(),
            Schema::At(span) => &body[span],
        });
        schema::Asked::of(answer, None).unwrap_or_else(|why| {
            exchange.decide("cascade", &self.name, "unread", why);
            schema::Asked::default()
        })
    }

    /// Whether what came is to be passed on.
    async fn judge<'a>(
        &self,
        house: &House,
        exchange: &mut Exchange,
        downstream: &mut Downstream,
        planned: &Planned,
        shape: &Arc<schema::Asked>,
        came: Result<Asked<'a>, Stop>,
    ) -> Result<Result<Asked<'a>, Short<'a>>, Stop> {
        let on_failure = self.cascade.asks_on(Cause::Failure);
        let mut asked = match came {
            Ok(asked) => asked,
            Err(Stop::Refused(refusal)) if on_failure && is_failure(refusal.code) => {
                let why = format!("failure: {}", refusal.message).into();
                return Ok(Err(Short { came: Err(refusal), cause: FAILURE, why }));
            }
            Err(stop) => return Err(stop),
        };
        let status = asked.answer.head.status;
        if status.is_success() && !self.cascade.reads() || !status.is_success() && !on_failure {
            return Ok(Ok(asked));
        }
        let between = Duration::from_millis(asked.stage.pool.timeouts.between_tokens_ms);
        let mut waits = waiting(downstream, exchange, planned);
        match asked.answer.rest.read_whole(&mut waits, between, WHOLE_MAX).await {
            Ok(()) => {}
            Err(WholeFault::Broken(code, why)) => {
                let short = broken(house, exchange, planned, asked, (code, why)).await;
                return if on_failure { Ok(Err(short)) } else { short.came.map(Ok).map_err(Stop::from) };
            }
            Err(WholeFault::TooLong) => {
                exchange.decide("cascade", &self.name, "unread", "the answer is too long to be judged");
                return Ok(Ok(asked));
            }
            Err(WholeFault::Interrupted(why)) => return Err(given_up(house, exchange, planned, asked, why).await),
        }
        let why = if status.is_success() { self.fault(planned, &asked, shape).await } else { failure(&asked) };
        Ok(match why {
            Some((cause, why)) => Err(Short { came: Ok(asked), cause, why: why.into() }),
            None => Ok(asked),
        })
    }

    /// Why the answer does not suffice. A long one is read beside the threads that carry requests.
    async fn fault(
        &self,
        planned: &Planned,
        asked: &Asked<'_>,
        shape: &Arc<schema::Asked>,
    ) -> Option<(&'static str, String)> {
        let (operation, is_events) = (planned.identified.surface.operation, asked.answer.is_event_stream());
        let (cascade, answer, shape) = (self.cascade.clone(), asked.answer.rest.first.clone(), shape.clone());
        let fault = move || {
            let answered = answered::read(operation, &answer, is_events);
            cascade.fault(&answered, &shape).map(|fault| (fault.word(), fault.to_string()))
        };
        if asked.answer.rest.first.len() <= BESIDE {
            return fault();
        }
        tokio::task::spawn_blocking(fault).await.unwrap_or_else(|_| Some((FAILURE, "reading it failed".to_owned())))
    }

    /// Whether there is enough left for the next model. The request is that model's then; else nothing has changed.
    async fn climbs(
        &self,
        house: &House,
        exchange: &mut Exchange,
        downstream: &mut Downstream,
        planned: &mut Planned,
        short: &mut Short<'_>,
        (step, next): (&Step, &Step),
    ) -> Result<bool, Stop> {
        let heard = meter(exchange, planned, short);
        exchange.settle_work(heard);
        let before = (planned.priority, planned.total);
        exchange.serve_instead(next.route.clone(), next.model.clone());
        planned.goes_to(exchange, next.route.clone());
        let Err(stop) = limits::admit::reserve(house, exchange, downstream, planned).await else {
            self.thinks(exchange, planned, next);
            return Ok(true);
        };
        exchange.serve_instead(step.route.clone(), step.model.clone());
        planned.goes_to(exchange, step.route.clone());
        (planned.priority, planned.total) = before;
        exchange.short = None;
        exchange.unread();
        let Stop::Refused(refusal) = stop else { return Err(stop) };
        let why = format!("{}; {}", short.why.as_str(), refusal.message);
        exchange.decide("cascade", &self.name, "stay", why);
        Ok(false)
    }

    /// The next model thinks as much as its own rule says. What that rule cannot change is left as the client wrote it.
    fn thinks(&self, exchange: &mut Exchange, planned: &mut Planned, next: &Step) {
        let Some(effort) = next.effort else { return };
        planned.parameter_edits = self.unthought.clone();
        let rule = Text::from(&next.model);
        if let Err(refusal) = effort::says(exchange, planned, effort, (rule.clone(), self.in_loop)) {
            exchange.decide("effort", rule, "leave", refusal.message);
        }
    }

    /// The answer that does not suffice goes no further; the next model is the one that was chosen.
    async fn let_go(&self, house: &House, exchange: &mut Exchange, short: Short<'_>, next: &Step) {
        let Short { came, cause, why } = short;
        house.telemetry.escalated(&self.name, cause);
        if let Ok(mut asked) = came {
            let (is_answer, counters) = (asked.answer.head.status.is_success(), &asked.picked.upstream.attempts);
            let heard = heard(&asked, true);
            if is_answer {
                counters.answered.inc();
                weighing::ends(exchange, asked.stage, &mut asked.picked);
            } else {
                counters.status.inc();
            }
            let ending = if is_answer { Ending::Escalated } else { Ending::Status };
            exchange.set_aside(ending, why.clone(), heard);
            discard(house, asked).await;
        }
        exchange.decide("cascade", &self.name, &next.model, why);
        exchange.chosen = Some(Chosen { by: self.name.clone(), model: next.model.clone() });
        if let Some(key) = self.key {
            // Who calls a tool gets what it gives back.
            house.state.conversations.goes_to(key, &next.model, None, Instant::now());
        }
    }
}

/// Why no other model is asked than the one that was chosen.
fn skips(cascade: &Cascade, decided: &Decided, planned: &Planned) -> Option<&'static str> {
    use Operation::{Chat, Completions, Generate, Messages, Responses};
    let operation = planned.identified.surface.operation;
    match operation {
        Chat | Completions | Generate | Messages | Responses => {}
        _ => return Some("its answer has no text"),
    }
    if decided.kept {
        return Some("the model was chosen before, and is kept");
    }
    if planned.streaming && cascade.streams == Streams::Skip {
        return Some("it is a stream");
    }
    (operation == Responses && keeps_answer(&planned.received.body)).then_some("the upstream keeps its answer")
}

/// Whether another model may do better where this one gave nothing.
fn is_failure(code: Code) -> bool {
    matches!(
        code,
        Code::NoUpstream
            | Code::QueueFull
            | Code::QueueTimeout
            | Code::ConnectFailed
            | Code::ConnectTimeout
            | Code::UpstreamClosed
            | Code::UpstreamInvalid
            | Code::FirstTokenTimeout
            | Code::AnswerTimeout
    )
}

/// Why an error of the upstream's is no answer, if another model may do better.
fn failure(asked: &Asked<'_>) -> Option<(&'static str, String)> {
    let status = asked.answer.head.status;
    let reason = asked.picked.upstream.provider.reason(status.as_u16(), &asked.answer.rest.first);
    let is_short = reason == Some(Reason::ContextLength);
    let fails = status.is_server_error() || status.as_u16() == 429 || is_short;
    let short = if is_short { ", the context is too short" } else { "" };
    fails.then(|| (FAILURE, format!("failure: status {}{short}", status.as_u16())))
}

/// Reads what an answer used that may not be passed on; returns how much of it there was.
fn meter(exchange: &mut Exchange, planned: &Planned, short: &Short<'_>) -> Heard {
    match &short.came {
        Ok(asked) => metered(exchange, planned, asked, true),
        Err(_) => Heard { whole: true, bytes: 0 },
    }
}

fn metered(exchange: &mut Exchange, planned: &Planned, asked: &Asked<'_>, whole: bool) -> Heard {
    let Asked { answer, picked, stage, .. } = asked;
    let is_events = answer.is_event_stream();
    if let Some(attempt) = exchange.attempts.last_mut() {
        attempt.worked();
    }
    let reading = answering::opened(exchange, planned, (stage, picked.upstream), answer.head.status, is_events);
    exchange.tally.begin(planned.identified.surface.operation, reading);
    exchange.tally.meter(&answer.rest.first);
    heard(asked, whole)
}

fn heard(asked: &Asked<'_>, whole: bool) -> Heard {
    Heard { whole, bytes: asked.answer.rest.first.len() as u64 }
}

/// An answer broke off while it was held: it is paid for, and no answer.
async fn broken<'a>(
    house: &House,
    exchange: &mut Exchange,
    planned: &Planned,
    asked: Asked<'_>,
    (code, why): (Code, String),
) -> Short<'a> {
    let heard = metered(exchange, planned, &asked, false);
    exchange.settle_work(heard);
    asked.picked.endpoint.breaker.failure(&asked.stage.pool.breaker, Instant::now());
    asked.picked.upstream.attempts.broken.inc();
    exchange.set_aside(Ending::Broken, why.clone().into(), heard);
    discard(house, asked).await;
    let message = format!("the upstream broke off its answer: {why}");
    Short { cause: FAILURE, why: format!("failure: {message}").into(), came: Err(Refusal::new(code, message)) }
}

/// Nobody waits any more for an answer that is held.
async fn given_up(
    house: &House,
    exchange: &mut Exchange,
    planned: &Planned,
    asked: Asked<'_>,
    why: Interrupted,
) -> Stop {
    let heard = metered(exchange, planned, &asked, false);
    asked.picked.upstream.attempts.cancelled.inc();
    let (stop, ending, told) = match why {
        Interrupted::Gone => (Stop::Gone, Ending::Cancelled, "the client left"),
        Interrupted::Stopped => (failover::stopped().into(), Ending::Cancelled, "a guardrail ended it"),
        _ => (failover::too_long(planned).into(), Ending::Timeout, "the whole request took too long"),
    };
    exchange.settle_work(heard);
    exchange.set_aside(ending, told.into(), heard);
    discard(house, asked).await;
    stop
}

async fn discard(house: &House, asked: Asked<'_>) {
    let Asked { answer, picked, permit, .. } = asked;
    drop(permit);
    answer.rest.discard(&house.connections, &picked.endpoint.target).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_another_model_may_do_better_is_a_failure() {
        for code in [Code::ConnectFailed, Code::NoUpstream, Code::QueueFull, Code::AnswerTimeout] {
            assert!(is_failure(code), "{code:?}");
        }
        for code in [Code::TotalTimeout, Code::ContentFilter, Code::RateLimitExceeded, Code::KeyRevoked] {
            assert!(!is_failure(code), "{code:?}");
        }
    }
}
