//! What the guardrails say of an answer that is here as a whole: one that came so, or a stream that was held.

use bytes::Bytes;

use crate::exchange::Exchange;
use crate::failover;
use crate::guard::{Blocked, Guard};
use crate::house::House;
use crate::pipeline::{Planned, Stop, waiting};
use crate::refusal::{Code, Refusal};
use crate::relay::{self, Downstream, Interrupted};
use crate::scan::Edit;
use crate::text::{self, Text, Texts};

/// Judges an answer in one piece; returns it as it may leave.
pub async fn whole(
    house: &House,
    exchange: &mut Exchange,
    downstream: &mut Downstream,
    planned: &Planned,
    body: Bytes,
) -> Result<Bytes, Stop> {
    let operation = exchange.surface.operation;
    let judged = beside(exchange, body, move |guard, body| guard.whole(operation, body)).await?;
    let body = judged.map_err(|blocked| refused(exchange, &blocked))?;
    if exchange.tally.guard.as_ref().is_some_and(|guard| guard.holds()) {
        let texts = text::answer(operation, &body).unwrap_or_default();
        asked(house, exchange, downstream, planned, (&body, texts, Vec::new())).await?;
    }
    relay::redacted(&mut exchange.tally.capture, &body);
    let restored = beside(exchange, body, move |guard, body| guard.restored(operation, body)).await;
    restored.map_err(Stop::from)
}

/// Asks other services about a stream that was held to its end, as the rules that read as it comes leave it. Those note what
/// they find when it leaves; where one of them stops it, nothing does, and nobody else is asked.
pub async fn held(
    house: &House,
    exchange: &mut Exchange,
    downstream: &mut Downstream,
    planned: &Planned,
    events: &Bytes,
) -> Result<(), Stop> {
    let operation = exchange.surface.operation;
    let Ok((document, texts)) = text::told(operation, events) else {
        let unread = exchange.tally.guard.as_mut().and_then(|guard| guard.unread(false));
        return unread.map_or(Ok(()), |blocked| Err(refused(exchange, &blocked).into()));
    };
    let Some(guard) = &mut exchange.tally.guard else { return Ok(()) };
    let texts = Texts::from(texts);
    match guard.foreseen(&texts, &document) {
        Ok(edits) => asked(house, exchange, downstream, planned, (&document, texts.all, edits)).await,
        Err(blocked) => {
            guard.note(&texts, &document);
            Err(refused(exchange, &blocked).into())
        }
    }
}

/// Asks other services about these texts, and waits for what they say.
async fn asked(
    house: &House,
    exchange: &mut Exchange,
    downstream: &mut Downstream,
    planned: &Planned,
    (document, texts, mut edits): (&Bytes, Vec<Text>, Vec<Edit>),
) -> Result<(), Stop> {
    let Some(guard) = &exchange.tally.guard else { return Ok(()) };
    let Some(asked) = guard.ask(house, &texts, document, &edits, (false, false)) else { return Ok(()) };
    let said = waiting(downstream, exchange, planned).until(planned.total, asked.said()).await;
    let guard = exchange.tally.guard.as_mut();
    let heard = guard.map_or(Ok(()), |guard| guard.hear(&asked, document, &mut edits, false));
    match said {
        Ok(()) => heard.map_err(|blocked| refused(exchange, &blocked).into()),
        Err(Interrupted::Gone) => Err(Stop::Gone),
        Err(_) => Err(failover::too_long(planned).into()),
    }
}

fn refused(exchange: &mut Exchange, blocked: &Blocked) -> Refusal {
    let (Blocked::By(rule) | Blocked::Unread(rule)) = blocked;
    exchange.decide("guard", rule, "block", blocked.why());
    blocked.refusal("the answer")
}

/// Lets the guardrails work on a body: beside the threads that carry requests, if it is long.
async fn beside<T: Send + 'static>(
    exchange: &mut Exchange,
    body: Bytes,
    work: impl FnOnce(&mut Guard, Bytes) -> T + Send + 'static,
) -> Result<T, Refusal> {
    let broke = || Refusal::new(Code::Internal, "a guardrail broke");
    let mut guard = exchange.tally.guard.take().ok_or_else(broke)?;
    if !guard.is_long(&body) {
        let done = work(&mut guard, body);
        exchange.tally.guard = Some(guard);
        return Ok(done);
    }
    let working = tokio::task::spawn_blocking(move || {
        let done = work(&mut guard, body);
        (guard, done)
    });
    let (guard, done) = working.await.map_err(|_| broke())?;
    exchange.tally.guard = Some(guard);
    Ok(done)
}
