//! The life of a request on one page: identify, read, admit, ask, relay, settle.
//!
//! Cheap before expensive; the head before the body; the body before the model; the decision before the
//! connection. Each stage owns what it produced and hands it to the next.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::header::{ALLOW, CONTENT_TYPE, RETRY_AFTER, UPGRADE, WWW_AUTHENTICATE};
use http::response::Parts;
use http::{HeaderValue, Method, StatusCode};
use infergate_plugins::operation::Operation;

use crate::answering;
use crate::audit::record::clip;
use crate::cascade::Ladder;
use crate::compatible;
use crate::exchange::Exchange;
use crate::failover::{self};
use crate::guard::remote::Asked;
use crate::guard::{Blocked, Guard};
use crate::headers::{self, set};
use crate::house::House;
use crate::identity;
use crate::limits;
use crate::local;
use crate::parameters;
use crate::policy::file::{CaptureText, OnDisconnect, OnError, Priority};
use crate::policy::{Passthrough, Route};
use crate::refusal::{Code, Refusal};
use crate::relay::{BodyFault, Downstream, Interrupted, Waiting};
use crate::routers;
use crate::scan::{self, Edit, Scan};
use crate::state::Lease;
use crate::surface::{self, Body, Surface};
use crate::text::Reading;

impl Planned {
    /// How many answers are asked for.
    pub fn choices(&self) -> u64 {
        self.scan.choices(&self.received.body).unwrap_or(1)
    }

    /// The model that was asked for left it open which one answers: this one does.
    pub fn goes_to(&mut self, exchange: &Exchange, route: Arc<Route>) {
        self.priority = self.priority.or(route.priority);
        self.total = exchange.times.received + Duration::from_millis(route.stages[0].pool.timeouts.total_ms);
        self.route = route;
    }
}

/// Why a request went no further.
pub enum Stop {
    /// We said no.
    Refused(Refusal),
    /// The client left.
    Gone,
}

impl From<Refusal> for Stop {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

/// What the head told.
pub struct Identified {
    /// Its endpoint.
    pub surface: &'static Surface,
    /// The path at the upstream, behind its base path, with the query.
    pub path: String,
    /// Where it goes, if the path passes through unread.
    pub passthrough: Option<Arc<Route>>,
    /// The protocol that the client wants to change to.
    pub upgrade: Option<HeaderValue>,
}

/// A body in memory, and the right to keep it there.
pub struct Received {
    /// The bytes as they came.
    pub body: Bytes,
    /// Whether the request had a body at all.
    pub has_body: bool,
    _lease: Lease,
}

/// Everything that is decided before an upstream is asked.
pub struct Planned {
    /// What the head told.
    pub identified: Identified,
    /// The body as it came.
    pub received: Received,
    /// Where the deciding fields stand.
    pub scan: Scan,
    /// The edits that the tenant's parameters want.
    pub parameter_edits: Vec<Edit>,
    /// The edits that ask for a stream's usage, where the policy wants it and the client did not ask.
    pub usage_edits: Option<Vec<Edit>>,
    /// Whether the answer is to be a stream.
    pub streaming: bool,
    /// What guardrails change in the body.
    pub guard_edits: Vec<Edit>,
    /// What other services are asked about the prompt while an upstream is asked for the answer.
    pub beside: Option<Asked>,
    /// The most tokens that one choice of the answer may have, where that is not for the client to say.
    pub output_max: Option<u64>,
    /// The pools to ask.
    pub route: Arc<Route>,
    /// The models to ask one after another, where that is left to their answers.
    pub ladder: Option<Box<Ladder>>,
    /// Whether they are being asked: no limit sends it to yet another one.
    pub climbing: bool,
    /// The class of urgency.
    pub priority: Option<Priority>,
    /// When all must be over.
    pub total: Instant,
}

/// Serves one request from its head to its end.
pub async fn serve(house: &House, downstream: &mut Downstream) {
    let mut exchange = Exchange::begin(house, downstream);
    downstream.set_write_timeout(Duration::from_millis(exchange.policy.requests.write_ms));
    match line(house, &mut exchange, downstream).await {
        Ok(()) => {}
        Err(Stop::Gone) => exchange.client_closed(),
        Err(Stop::Refused(refusal)) => refuse(&mut exchange, downstream, refusal).await,
    }
}

async fn line(house: &House, exchange: &mut Exchange, downstream: &mut Downstream) -> Result<(), Stop> {
    let identified = identify(house, exchange, downstream)?;
    if identified.surface.is_local() {
        return local::answer(house, exchange, downstream, &identified).await;
    }
    let received = read(house, exchange, downstream).await?;
    exchange.times.body = Instant::now();
    exchange.body_bytes = received.body.len() as u64;
    exchange.capture(CaptureText::Full, || received.body.clone());
    let mut planned = admit(exchange, downstream, identified, received)?;
    let mut read = None;
    if planned.route.routers.is_some() {
        let reading = read.insert(reading(downstream, &planned)).clone();
        Box::pin(routers::choose(house, exchange, downstream, &mut planned, &reading)).await?;
    }
    limits::admit::reserve(house, exchange, downstream, &mut planned).await?;
    judge(house, exchange, downstream, &mut planned, read).await?;
    exchange.capture(CaptureText::Redacted, || scan::splice(&planned.received.body, &mut planned.guard_edits.clone()));
    exchange.admitted();
    if planned.identified.upgrade.is_some() {
        return Box::pin(failover::tunnel(house, exchange, downstream, &planned)).await;
    }
    let route = planned.route.clone();
    let ladder = planned.ladder.take().filter(|ladder| ladder.begins_with(&route));
    let asked = match &ladder {
        None => failover::ask(house, exchange, downstream, &planned, &route).await,
        Some(ladder) => Box::pin(ladder.ask(house, exchange, downstream, &mut planned)).await,
    };
    if asked.is_err() {
        // Why it does not pass says more than that nobody went on.
        heard_beside(exchange, &mut planned, None).await?;
    }
    let asked = asked?;
    answering::relay(house, exchange, downstream, planned, asked).await
}

/// From the head alone: is it well formed, and whose is it?
fn identify(house: &House, exchange: &mut Exchange, downstream: &Downstream) -> Result<Identified, Stop> {
    let head = downstream.head();
    let policy = exchange.policy.clone();
    let path = policy.stripped(head.uri.path());
    let found = surface::find(path).or_else(|| compatible::surface(&policy, path));
    let passthrough = policy.passthrough(&head.method, path);
    // The endpoint is known before anything is refused, so that the refusal speaks its dialect.
    exchange.surface = match (found, passthrough) {
        (Some(surface), _) => surface,
        (None, Some(_)) => &surface::PASSTHROUGH,
        (None, None) if path.starts_with("/v1/messages/") || head.headers.contains_key("anthropic-version") => {
            &surface::UNKNOWN_ANTHROPIC
        }
        (None, None) => &surface::UNKNOWN,
    };
    // Counted whatever is wrong with the head besides.
    let recordable = recordable(exchange);
    downstream.check_head()?;
    recordable?;
    if house.state.shedding.load(std::sync::atomic::Ordering::Relaxed) {
        let refusal = Refusal::new(Code::Overloaded, "the gateway is at its memory ceiling");
        return Err(refusal.retry_after(Duration::from_secs(1)).into());
    }
    identity::identify(exchange, &downstream.credentials(), path_in_policy(exchange.surface, passthrough))?;
    if found.is_none() && passthrough.is_none() {
        let path: String = path.chars().take(200).collect();
        return Err(Refusal::new(Code::NotFound, format!("nothing is served at {path}")).into());
    }
    if found.is_some() && exchange.surface.method != head.method {
        let message = format!("{} takes {}, not {}", exchange.surface.path, exchange.surface.method, head.method);
        return Err(Refusal::new(Code::MethodNotAllowed, message).into());
    }
    let upgrade = upgrade(exchange.surface, downstream, passthrough.is_some_and(|entry| entry.websocket))?;
    let query = forwarded_query(head.uri.query().unwrap_or_default());
    Ok(Identified {
        surface: exchange.surface,
        path: [path, &query].concat(),
        passthrough: passthrough.filter(|_| found.is_none()).map(|entry| entry.route.clone()),
        upgrade,
    })
}

/// The endpoint as lists in the policy name it.
fn path_in_policy<'a>(surface: &Surface, passthrough: Option<&'a Passthrough>) -> &'a str {
    match passthrough {
        Some(entry) if *surface == surface::PASSTHROUGH => &entry.path,
        _ => surface.path,
    }
}

/// No work is done whose record could not be kept, unless the policy says that it may.
fn recordable(exchange: &Exchange) -> Result<(), Refusal> {
    if exchange.is_recorded() {
        return Ok(());
    }
    let served = exchange.policy.audit.on_error == OnError::Allow;
    exchange.unrecorded(served);
    let refusal = || Refusal::new(Code::AuditUnavailable, "the journal has no room for the record of this request");
    if served { Ok(()) } else { Err(refusal().retry_after(Duration::from_secs(1))) }
}

/// The query as the upstream gets it: what came, without the client's credentials.
fn forwarded_query(query: &str) -> String {
    const CREDENTIALS: [&str; 4] = ["key", "api_key", "api-key", "access_token"];
    if query.is_empty() {
        return String::new();
    }
    let secret = |pair: &str| CREDENTIALS.contains(&pair.split('=').next().unwrap_or_default());
    let kept: Vec<&str> = query.split('&').filter(|pair| !secret(pair)).collect();
    let kept = kept.join("&");
    if kept.is_empty() { kept } else { format!("?{kept}") }
}

/// The protocol to change to: only a WebSocket, only where one is expected, only from HTTP/1.1.
fn upgrade(surface: &Surface, downstream: &Downstream, allowed: bool) -> Result<Option<HeaderValue>, Refusal> {
    let wanted = downstream.head().headers.get(UPGRADE).filter(|_| !downstream.is_http2());
    let expected = surface.operation == Operation::Realtime;
    match wanted {
        Some(protocol) if (expected || allowed) && protocol.as_bytes().eq_ignore_ascii_case(b"websocket") => {
            Ok(Some(protocol.clone()))
        }
        Some(_) => Err(Refusal::new(Code::UpgradeUnsupported, "this path does not change its protocol").closing()),
        None if expected => {
            let message = "this endpoint is a WebSocket: open it over HTTP/1.1 with `Upgrade: websocket`";
            Err(Refusal::new(Code::UpgradeUnsupported, message))
        }
        None => Ok(None),
    }
}

/// Reads the body, under the budget for all bodies together, which is asked before the first byte is read.
async fn read(house: &House, exchange: &Exchange, downstream: &mut Downstream) -> Result<Received, Stop> {
    let requests = &exchange.policy.requests;
    let (max, length) = (requests.body_bytes_max, downstream.content_length());
    if length.is_some_and(|length| length > max) {
        return Err(too_large(max).into());
    }
    let Some(mut lease) = house.state.bodies.lease(length.unwrap_or(0)) else { return Err(no_room().into()) };
    let has_body = length.is_some() || exchange.surface.method == Method::POST;
    let reading = downstream.read_body(max, &mut lease);
    let body = match tokio::time::timeout(Duration::from_millis(requests.body_ms), reading).await {
        Ok(Ok(body)) => body,
        Ok(Err(BodyFault::Gone)) => return Err(Stop::Gone),
        Ok(Err(BodyFault::TooLarge)) => return Err(too_large(max).into()),
        Ok(Err(BodyFault::NoRoom)) => return Err(no_room().into()),
        Ok(Err(BodyFault::Malformed)) => {
            return Err(Refusal::new(Code::BadRequest, "the body's framing is broken").closing().into());
        }
        Ok(Err(BodyFault::Slow)) | Err(_) => {
            let message = format!("the body did not arrive within {} ms", requests.body_ms);
            return Err(Refusal::new(Code::RequestTimeout, message).closing().into());
        }
    };
    Ok(Received { body, has_body, _lease: lease })
}

fn too_large(max: u64) -> Refusal {
    Refusal::new(Code::RequestTooLarge, format!("the body is larger than the {max} bytes allowed")).closing()
}

fn no_room() -> Refusal {
    let refusal = Refusal::new(Code::Overloaded, "the gateway holds as many bytes of bodies as it may");
    refusal.retry_after(Duration::from_secs(1)).closing()
}

/// Parses and routes.
fn admit(
    exchange: &mut Exchange,
    downstream: &Downstream,
    identified: Identified,
    received: Received,
) -> Result<Planned, Stop> {
    let policy = exchange.policy.clone();
    let scan = scan_body(identified.surface, downstream, &received.body)?;
    let model = asked_model(identified.surface, &scan, downstream, &received.body)?;
    exchange.asked = model.as_deref().map(|name| clip(name).into());
    let streaming = identified.surface.always_streams() || scan.stream(&received.body).map_err(invalid)?;
    let route = match &identified.passthrough {
        Some(route) => identity::may_pass(exchange, route).map(|()| route.clone())?,
        None => identity::route(exchange, model.as_deref())?,
    };
    let parameter_edits = parameters::admit(exchange, &identified, downstream.head(), &received.body)?;
    let operation = identified.surface.operation;
    if !route.stages.iter().any(|stage| stage.pool.serves(operation)) {
        let name = model.as_deref().unwrap_or(&route.model.name);
        let message = format!("no upstream of the model `{name}` can do {}", identified.surface.path);
        return Err(Refusal::new(Code::NotFound, message).into());
    }
    identity::may_go(exchange, &route)?;
    exchange.decide("route", &route.rule, &route.verdict, route.why(model.as_deref()));
    exchange.streaming = streaming;
    exchange.route = Some(route.clone());
    let header = policy.priority_header.as_ref().and_then(|name| downstream.head().headers.get(name));
    let priority = policy.priority(header, &route);
    let total = exchange.times.received + Duration::from_millis(route.stages[0].pool.timeouts.total_ms);
    let asks = policy.asks_for_usage && streaming && matches!(operation, Operation::Chat | Operation::Completions);
    let usage_edits = if asks { scan.ask_for_usage(&received.body) } else { None };
    Ok(Planned {
        identified,
        scan,
        parameter_edits,
        usage_edits,
        streaming,
        guard_edits: Vec::new(),
        beside: None,
        output_max: None,
        route,
        ladder: None,
        climbing: false,
        priority,
        total,
        received,
    })
}

/// What the request says, for whoever reads prompts.
fn reading(downstream: &Downstream, planned: &Planned) -> Arc<Reading> {
    let surface = planned.identified.surface;
    let reading = Reading::of(surface.operation, planned.received.body.clone());
    Arc::new(match surface.body {
        Body::Multipart => reading.in_form(downstream.head().headers.get(CONTENT_TYPE).cloned()),
        _ => reading,
    })
}

/// Lets the guardrails read the prompt. A long one is read beside the threads that carry requests.
async fn judge(
    house: &House,
    exchange: &mut Exchange,
    downstream: &mut Downstream,
    planned: &mut Planned,
    read: Option<Arc<Reading>>,
) -> Result<(), Stop> {
    let Some(rails) = exchange.policy.guardrails.clone() else { return Ok(()) };
    if planned.identified.passthrough.is_some() {
        // The policy says that it is meant to pass unread.
        return Ok(());
    }
    let reading = read.unwrap_or_else(|| reading(downstream, planned));
    if reading.operation == Operation::Realtime
        && let Some(rule) = rails.insists(true).or_else(|| rails.insists(false))
    {
        return Err(Blocked::Unread(rule.clone()).refusal("a WebSocket").into());
    }
    let tokens = exchange.tally.reservation.as_ref().map(|reservation| reservation.input);
    let judged = if reading.body.len() > rails.beside() {
        let read = reading.clone();
        let judging = tokio::task::spawn_blocking(move || Guard::prompt(rails, &read, tokens)).await;
        judging.map_err(|_| Refusal::new(Code::Internal, "a guardrail broke"))?
    } else {
        Guard::prompt(rails, &reading, tokens)
    };
    let mut guard = Box::new(judged.guard);
    let texts = reading.texts().map_or(&[][..], |texts| &texts.all);
    let ask = |beside| guard.ask(house, texts, &reading.body, &judged.edits, (true, beside));
    let (now, beside) = if judged.blocked.is_none() { (ask(false), ask(true)) } else { (None, None) };
    planned.guard_edits = judged.edits;
    planned.beside = beside;
    let mut blocked = judged.blocked;
    if let Some(asked) = now {
        let said = waiting(downstream, exchange, planned).until(planned.total, asked.said()).await;
        let heard = guard.hear(&asked, &reading.body, &mut planned.guard_edits, true);
        exchange.tally.guard = Some(guard);
        said.map_err(|interrupted| cut_short(interrupted, planned))?;
        blocked = heard.err();
    } else {
        exchange.tally.guard = Some(guard);
    }
    blocked.map_or(Ok(()), |blocked| Err(refused(exchange, &blocked, &judged.what).into()))
}

fn refused(exchange: &mut Exchange, blocked: &Blocked, what: &str) -> Refusal {
    let (Blocked::By(rule) | Blocked::Unread(rule)) = blocked;
    exchange.decide("guard", rule, "block", blocked.why());
    blocked.refusal(what)
}

/// A wait for what another service says ended without it.
fn cut_short(interrupted: Interrupted, planned: &Planned) -> Stop {
    match interrupted {
        Interrupted::Gone => Stop::Gone,
        _ => failover::too_long(planned).into(),
    }
}

/// Takes what was said about the prompt beside the upstream call: all of it, while `downstream` waits, or what has been
/// said until now. It is an error if it does not pass.
pub async fn heard_beside(
    exchange: &mut Exchange,
    planned: &mut Planned,
    downstream: Option<&mut Downstream>,
) -> Result<(), Stop> {
    let Some(asked) = planned.beside.take() else { return Ok(()) };
    match downstream {
        Some(downstream) => {
            let said = waiting(downstream, exchange, planned).until(planned.total, asked.said()).await;
            said.map_err(|interrupted| cut_short(interrupted, planned))?;
        }
        None if !asked.is_said() => return Ok(()),
        None => {}
    }
    let Some(guard) = &mut exchange.tally.guard else { return Ok(()) };
    let heard = guard.hear(&asked, &planned.received.body, &mut Vec::new(), true);
    let Err(blocked) = heard else { return Ok(()) };
    // Nothing of a prompt that did not pass is kept.
    exchange.tally.capture = exchange.tally.capture.take().filter(|capture| !capture.is_redacted());
    Err(refused(exchange, &blocked, "the prompt").into())
}

fn scan_body(surface: &Surface, downstream: &Downstream, body: &Bytes) -> Result<Scan, Refusal> {
    match surface.body {
        Body::Json => scan::json(body).map_err(invalid),
        Body::Multipart => {
            let content_type =
                downstream.head().headers.get(CONTENT_TYPE).map_or(b"".as_slice(), HeaderValue::as_bytes);
            scan::multipart(body, content_type).map_err(invalid)
        }
        Body::None | Body::Opaque => Ok(Scan::default()),
    }
}

/// A body that is not what its endpoint takes.
pub fn invalid(fault: scan::Fault) -> Refusal {
    let (code, param) = match &fault {
        scan::Fault::Malformed(..) => (Code::InvalidBody, None),
        scan::Fault::Twice(field) => (Code::DuplicateField, Some(field.name())),
        scan::Fault::Kind(field, _) => (Code::InvalidBody, Some(field.name())),
    };
    Refusal { param: param.map(Cow::Borrowed), ..Refusal::new(code, fault.to_string()) }
}

/// The model's name, in the body or in the query.
fn asked_model<'a>(
    surface: &Surface,
    scan: &Scan,
    downstream: &Downstream,
    body: &'a Bytes,
) -> Result<Option<Cow<'a, str>>, Refusal> {
    if surface.body != Body::None {
        return scan.model(body).map_err(invalid);
    }
    let query = downstream.head().uri.query().unwrap_or_default();
    let named = query.split('&').find_map(|pair| pair.strip_prefix("model="));
    Ok(named.map(|name| Cow::Owned(name.to_owned())))
}

/// How often a silent stream gets a sign of life.
pub fn heartbeat(exchange: &Exchange) -> Option<Duration> {
    let every = exchange.policy.requests.heartbeat_ms;
    (every > 0).then(|| Duration::from_millis(every))
}

/// Waits for an upstream while minding the client; a stream's client gets signs of life.
pub fn waiting<'a>(downstream: &'a mut Downstream, exchange: &Exchange, planned: &Planned) -> Waiting<'a> {
    let heartbeat = if planned.streaming { heartbeat(exchange) } else { None };
    let mut waiting = Waiting::new(downstream, planned.total, exchange.id, heartbeat);
    waiting.stops = planned.beside.as_ref().map(Asked::stops);
    waiting
}

/// How long an upstream may go on when its client has left; `None`: not at all.
pub fn drain(exchange: &Exchange) -> Option<Duration> {
    let requests = &exchange.policy.requests;
    (requests.on_disconnect == OnDisconnect::Drain).then(|| Duration::from_millis(requests.drain_ms))
}

/// Says no, in the caller's dialect: as a whole answer, or as the last event of a stream that has begun.
async fn refuse(exchange: &mut Exchange, downstream: &mut Downstream, refusal: Refusal) {
    if downstream.head_sent() {
        return broken_off(exchange, downstream, refusal, true).await;
    }
    exchange.refused(&refusal);
    tracing::debug!(id = %exchange.id, code = refusal.code.name(), message = %refusal.message, "refused");
    let body = refusal.body(exchange.surface.dialect, exchange.id.as_str());
    exchange.settle();
    exchange.tally.bytes = body.len() as u64;
    // A refusal says nothing that would need the record's backing.
    let _ = exchange.put_on_record().await;
    if let Ok(head) = refusal_head(exchange, &refusal)
        && downstream.answer(Box::new(head.into()), body.into(), refusal.close).await.is_err()
    {
        exchange.client_closed();
    }
}

fn refusal_head(exchange: &Exchange, refusal: &Refusal) -> Result<Parts, Refusal> {
    let mut head = local::head(refusal.code.status(), "application/json", exchange)?;
    let to = &mut head.headers;
    set(to, headers::SHOULD_RETRY, if refusal.code.retryable() { "true" } else { "false" })?;
    set(to, headers::ATTEMPTS, u64::from(exchange.attempt_count()))?;
    if let Some(seconds) = refusal.retry_after_s() {
        set(to, RETRY_AFTER, seconds)?;
    }
    if refusal.code.status() == StatusCode::UNAUTHORIZED {
        set(to, WWW_AUTHENTICATE, "Bearer realm=\"infergate\"")?;
    }
    if refusal.code == Code::MethodNotAllowed {
        set(to, ALLOW, exchange.surface.method.as_str())?;
    }
    limits::standing::tell(to, exchange.surface.dialect, exchange.standings(), exchange.times.at)?;
    Ok(head)
}

/// Ends an answer that has begun and cannot be completed: an event stream with an error event, anything else with a
/// connection that breaks off, so that nobody takes it for whole.
pub async fn broken_off(exchange: &mut Exchange, downstream: &mut Downstream, refusal: Refusal, is_events: bool) {
    exchange.refused(&refusal);
    exchange.settle();
    let _ = exchange.put_on_record().await;
    tracing::warn!(id = %exchange.id, code = refusal.code.name(), message = %refusal.message, "an answer broke off");
    if !is_events {
        return downstream.abort().await;
    }
    let event = refusal.event(exchange.surface.dialect, exchange.id.as_str());
    let ended = async {
        downstream.write(event.into()).await?;
        downstream.finish().await
    };
    if ended.await.is_err() {
        exchange.client_closed();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_loses_the_clients_credentials_and_nothing_else() {
        let cases = [
            ("", ""),
            ("a=1&&b", "?a=1&&b"),
            ("key=canary", ""),
            ("a=1&api_key=canary&b=%20", "?a=1&b=%20"),
            ("monkey=1", "?monkey=1"),
        ];
        for (came, goes) in cases {
            assert_eq!(forwarded_query(came), goes);
        }
    }
}
