//! The way back: an answer is judged, its head is written, its pieces pass, and it ends properly, whoever ended it.

use std::pin::pin;
use std::time::{Duration, Instant};

use http::{Method, StatusCode};

use crate::audit::record::Ending;
use crate::compatible;
use crate::ending;
use crate::exchange::Exchange;
use crate::failover::{self, Asked};
use crate::guard;
use crate::headers::{self, set};
use crate::house::House;
use crate::identity;
use crate::judging;
use crate::money::{self, bill::Bill};
use crate::pipeline::{self, Planned, Stop, broken_off, drain, heartbeat};
use crate::policy::Stage;
use crate::pool::{Picked, Upstream};
use crate::refusal::{Code, Refusal};
use crate::relay::{self, Answer, AnswerHead, Downstream, Interrupted, Pace, Passed, Reading, Rest, WholeFault};
use crate::scan::Field;
use crate::tokens::Encoding;
use crate::weighing;

/// Passes the answer on, and ends it properly if the upstream did not.
pub async fn relay(
    house: &House,
    exchange: &mut Exchange,
    downstream: &mut Downstream,
    mut planned: Planned,
    asked: Asked<'_>,
) -> Result<(), Stop> {
    let is_events = asked.answer.is_event_stream();
    let pace = Pace {
        between: Duration::from_millis(asked.stage.pool.timeouts.between_tokens_ms),
        total: planned.total,
        heartbeat: heartbeat(exchange),
        drain: drain(exchange),
        holds_end: is_events && holds_end(exchange),
    };
    let Asked { answer, mut picked, permit, stage } = asked;
    let target = &picked.endpoint.target;
    if let Err(refusal) = may_pass(house, exchange, downstream, &picked, &answer) {
        answer.rest.discard(&house.connections, target).await;
        return Err(refusal.into());
    }
    let Answer { mut head, rest: mut answer, .. } = answer;
    let status = head.status;
    let operation = planned.identified.surface.operation;
    let reading = opened(exchange, &planned, (stage, picked.upstream), status, is_events);
    let mut passes = pipeline::heard_beside(exchange, &mut planned, Some(downstream)).await;
    let is_known = passes.is_ok();
    let guards = status.is_success() && exchange.tally.guard.as_mut().is_some_and(|guard| guard.answers(operation));
    let holds = !is_events || exchange.tally.guard.as_ref().is_some_and(|guard| guard.holds());
    if is_known && guards && holds {
        let mut waits = pipeline::waiting(downstream, exchange, &planned);
        waits.heartbeat = pace.heartbeat.filter(|_| is_events);
        let read = answer.read_whole(&mut waits, pace.between, guard::WHOLE_MAX).await;
        passes = read.map_err(|fault| unread(fault, &planned));
        if passes.is_ok() {
            let body = answer.body();
            passes = match is_events {
                true => judging::held(house, exchange, downstream, &planned, &body).await,
                false => match judging::whole(house, exchange, downstream, &planned, body).await {
                    Ok(body) => {
                        answer.replace(&mut head, body);
                        Ok(())
                    }
                    Err(stop) => Err(stop),
                },
            };
        }
    }
    if let Err(stop) = passes {
        // It was made, so it is paid for.
        exchange.tally.begin(operation, reading);
        exchange.tally.meter(&answer.body());
        answer.discard(&house.connections, target).await;
        let (counter, ending, why) = match is_known {
            true => (&picked.upstream.attempts.answered, Ending::Answered, None),
            false => (&picked.upstream.attempts.cancelled, Ending::Cancelled, Some("a guardrail ended it".into())),
        };
        counter.inc();
        exchange.attempt_ends(ending, why);
        return Err(stop);
    }
    let head = match downstream.head_sent() {
        true => None,
        false => Some(client_head(exchange, head, &answer, is_events, picked.upstream, stage)?),
    };
    exchange.answering(answer.first_at, status.as_u16());
    exchange.tally.begin(operation, reading);
    // What tells a client that it has all is the last piece; of a stream, its last event.
    downstream.hold_last(holds_end(exchange) && !is_events);
    let ending = (planned.choices(), planned.scan.tells_usage(&planned.received.body));
    // Nothing can be sent a second time from here on: the body's memory goes to the next request.
    drop(planned);
    let cut = pin!(identity::revoked(house, exchange.policy.clone(), exchange.hold()));
    let tally = &mut exchange.tally;
    let passed = relay::pass_on(downstream, tally, &house.connections, target, (head, answer), pace, cut).await;
    drop(permit);
    if passed == Passed::Whole && status.is_success() {
        weighing::ends(exchange, stage, &mut picked);
    }
    account(exchange, stage, &picked, &passed);
    conclude(exchange, downstream, passed, ending, is_events).await
}

/// Opens the bill for an answer that begins, and says what is read of it.
pub fn opened(
    exchange: &mut Exchange,
    planned: &Planned,
    (stage, upstream): (&Stage, &Upstream),
    status: StatusCode,
    is_events: bool,
) -> Reading {
    exchange.bill = bill(exchange, planned, stage, upstream, status);
    Reading {
        events: is_events,
        hides_usage: planned.asks_for_usage(upstream).is_some(),
        service_tier: exchange.bill.as_ref().is_some_and(Bill::asks_service_tier),
        counts: exchange.bill.as_ref().and_then(|_| encoding(exchange, stage, upstream)),
    }
}

/// Whether an answer may go to this client at all.
fn may_pass(
    house: &House,
    exchange: &mut Exchange,
    downstream: &Downstream,
    picked: &Picked<'_>,
    answer: &Answer,
) -> Result<(), Refusal> {
    if exchange.hold().is_some_and(|hold| identity::is_revoked(house, &exchange.policy, &hold)) {
        picked.upstream.attempts.cancelled.inc();
        exchange.attempt_ends(Ending::Cancelled, Some("the caller's key was revoked".into()));
        return Err(identity::revoked_refusal());
    }
    if downstream.head_sent() && !answer.is_event_stream() {
        // A sign of life has promised an event stream already.
        let message = format!("the upstream answered with status {} and no stream", answer.head.status.as_u16());
        return Err(Refusal::new(Code::UpstreamInvalid, message));
    }
    Ok(())
}

/// The head that the client gets.
fn client_head(
    exchange: &Exchange,
    head: Box<AnswerHead>,
    answer: &Rest,
    is_events: bool,
    upstream: &Upstream,
    stage: &Stage,
) -> Result<Box<AnswerHead>, Refusal> {
    let cost = answer.whole(&head).and_then(|body| exchange.costs(body));
    let mut head = failover::head_for_client(*head, answer.first_at, is_events, upstream, exchange, stage)?;
    if let Some(flagged) = exchange.tally.guard.as_ref().and_then(|guard| guard.flagged()) {
        set(&mut head.headers, headers::GUARDRAILS, flagged)?;
    }
    if exchange.policy.requests.compatible_with.is_some() {
        let told =
            compatible::Told { upstream, stage, first_at: answer.first_at, cost: cost.map(|cost| cost.to_string()) };
        compatible::tell(&mut head.headers, exchange, &told)?;
    }
    if let Some(cost) = cost {
        set(&mut head.headers, headers::COST_USD, cost.to_string())?;
    }
    Ok(Box::new(head.into()))
}

/// Ends what the client has, as its protocol ends such answers.
async fn conclude(
    exchange: &mut Exchange,
    downstream: &mut Downstream,
    passed: Passed,
    ending: (u64, bool),
    is_events: bool,
) -> Result<(), Stop> {
    let (code, why) = match passed {
        Passed::Whole => {
            exchange.settle();
            if let Some(comment) = cost_comment(exchange).filter(|_| is_events) {
                downstream.put_before_end(&comment, exchange.tally.last_is_whole());
            }
            return end(exchange, downstream).await;
        }
        Passed::Gone => return Err(Stop::Gone),
        Passed::Spent | Passed::Blocked(_) => {
            let why = if passed == Passed::Spent { ending::Why::Length } else { ending::Why::Filtered };
            exchange.settle();
            let events = early(exchange, ending, why);
            let comment = cost_comment(exchange).unwrap_or_default();
            downstream.write(ending::before_last(events.as_bytes(), &comment, true)).await.map_err(|_| Stop::Gone)?;
            return end(exchange, downstream).await;
        }
        Passed::Broken(code, why) => (code, why),
    };
    let refusal = match code {
        Code::KeyRevoked => identity::revoked_refusal(),
        _ => Refusal::new(code, format!("the upstream broke off its answer: {why}")),
    };
    broken_off(exchange, downstream, refusal, is_events).await;
    Ok(())
}

/// What an answer's end tells of its upstream, and of the attempt.
fn account(exchange: &mut Exchange, stage: &Stage, picked: &Picked<'_>, passed: &Passed) {
    let attempts = &picked.upstream.attempts;
    let (counter, ending, why) = match passed {
        Passed::Whole => (&attempts.answered, Ending::Answered, None),
        Passed::Gone => (&attempts.cancelled, Ending::Cancelled, None),
        Passed::Spent => (&attempts.cancelled, Ending::Cancelled, Some("nothing more may be used".into())),
        Passed::Blocked(_) => (&attempts.cancelled, Ending::Cancelled, Some("a guardrail ended it".into())),
        Passed::Broken(Code::KeyRevoked, why) => (&attempts.cancelled, Ending::Cancelled, Some(why.clone().into())),
        Passed::Broken(_, why) => {
            picked.endpoint.breaker.failure(&stage.pool.breaker, Instant::now());
            (&attempts.broken, Ending::Broken, Some(why.clone().into()))
        }
    };
    counter.inc();
    exchange.attempt_ends(ending, why);
    match passed {
        Passed::Whole => exchange.completed(),
        Passed::Spent => exchange.limit_cut(),
        Passed::Blocked(blocked) => exchange.blocked(blocked),
        Passed::Gone | Passed::Broken(..) => {}
    }
}

/// What a stream tells of its cost, if the policy wants it told.
fn cost_comment(exchange: &Exchange) -> Option<String> {
    let cost = if exchange.policy.cost_on_streams { exchange.cost() } else { None };
    cost.map(|cost| format!(": x-infergate-cost-usd={cost}\n\n"))
}

/// The end of an answer: what was not used is given back first, so that whoever has read it all may ask again.
async fn end(exchange: &mut Exchange, downstream: &mut Downstream) -> Result<(), Stop> {
    exchange.settle();
    if !exchange.put_on_record().await {
        // Its record says `ok`, and may come to the disk yet: the client must not believe so.
        downstream.abort().await;
        return Ok(());
    }
    downstream.finish().await.map_err(|_| Stop::Gone)
}

/// An answer that did not come as a whole.
fn unread(fault: WholeFault, planned: &Planned) -> Stop {
    match fault {
        WholeFault::Interrupted(Interrupted::Gone) => Stop::Gone,
        WholeFault::Interrupted(_) => failover::too_long(planned).into(),
        WholeFault::Broken(code, why) => Refusal::new(code, format!("the upstream broke off its answer: {why}")).into(),
        WholeFault::TooLong => {
            let message = "the answer is too long to be read by the guardrails, which must read it as a whole";
            Refusal::new(Code::ContentUnread, message).into()
        }
    }
}

/// The events that end a stream before its upstream does.
fn early(exchange: &Exchange, (choices, tells_usage): (u64, bool), why: ending::Why) -> String {
    let (opening, last) = exchange.tally.begun();
    let usage = exchange.tally.usage(false);
    let tokens = (usage.input_tokens.unwrap_or_default(), usage.output_tokens.unwrap_or_default());
    let operation = exchange.surface.operation;
    let begun = ending::Begun { operation, opening, last, choices, tokens, tells_usage };
    ending::events(&begun, why)
}

/// Opens the bill for an answer that begins, where the policy has prices or limits.
pub fn bill(
    exchange: &Exchange,
    planned: &Planned,
    stage: &Stage,
    upstream: &Upstream,
    status: StatusCode,
) -> Option<Bill> {
    let surface = planned.identified.surface;
    let counts = exchange.policy.prices.is_some() || exchange.tally.reservation.is_some();
    if !counts || !money::bill::is_paid(surface.operation) || surface.method != Method::POST {
        return None;
    }
    let price = exchange.price(failover::model_at(exchange, stage, upstream), &stage.pool, upstream).cloned();
    let body = &planned.received.body;
    let images = planned.scan.span(Field::N).and_then(|span| std::str::from_utf8(&body[span]).ok()?.parse().ok());
    Some(Bill::open(price, surface.operation, body, images.unwrap_or(1), status.is_success()))
}

/// How the tokens of an answer are counted that does not tell them.
fn encoding(exchange: &Exchange, stage: &Stage, upstream: &Upstream) -> Option<Encoding> {
    let route = exchange.route.as_ref()?;
    route.model.tokenizer.of(failover::model_at(exchange, stage, upstream))
}

/// Whether something must be done before a client may know that its answer is complete.
fn holds_end(exchange: &Exchange) -> bool {
    exchange.is_durable() || exchange.tally.reservation.is_some() || exchange.policy.cost_on_streams
}
