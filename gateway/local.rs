//! Answers that need no upstream: the list of models, health, version.

use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::response::Parts;
use http::{HeaderMap, HeaderValue, StatusCode};
use serde_json::{Value, json};

use crate::compatible;
use crate::exchange::Exchange;
use crate::headers::{self, set};
use crate::house::House;
use crate::pipeline::{Identified, Stop};
use crate::policy::Route;
use crate::refusal::Refusal;
use crate::relay::Downstream;

/// Answers for the gateway itself.
pub async fn answer(
    house: &House,
    exchange: &mut Exchange,
    downstream: &mut Downstream,
    identified: &Identified,
) -> Result<(), Stop> {
    let (status, body) = match identified.surface.path {
        _ if compatible::is_liveness(&identified.path) => (StatusCode::OK, json!("I'm alive!")),
        _ if compatible::is_readiness(&identified.path) && house.ready() => {
            (StatusCode::OK, json!({"status": "healthy"}))
        }
        "/v1/models" => (StatusCode::OK, models(exchange)),
        "/version" => (StatusCode::OK, json!({"version": env!("CARGO_PKG_VERSION"), "server": "infergate"})),
        _ if house.ready() => (StatusCode::OK, json!({"status": "ok"})),
        _ => (StatusCode::SERVICE_UNAVAILABLE, json!({"status": "not ready"})),
    };
    let head = head(status, "application/json", exchange)?;
    let body = Bytes::from(body.to_string());
    exchange.answering(exchange.times.received, status.as_u16());
    exchange.tally.bytes = body.len() as u64;
    exchange.completed();
    let _ = exchange.put_on_record().await;
    // A body on such a request is not read, so the connection cannot be used again.
    let close = downstream.content_length().is_some_and(|length| length > 0);
    downstream.answer(Box::new(head.into()), body, close).await.map_err(|_| Stop::Gone)
}

/// `GET /v1/models` in OpenAI's shape, with what each model is and where it lives: those that the caller may use.
fn models(exchange: &Exchange) -> Value {
    let entry = |name: &str, route: &Route| {
        let stages: Vec<&str> = route.stages.iter().map(|stage| &*stage.pool.name).collect();
        let providers: Vec<&str> = route
            .stages
            .iter()
            .flat_map(|stage| &stage.pool.upstreams)
            .map(|upstream| upstream.provider.kind())
            .collect();
        json!({
            "id": name, "object": "model", "created": 0, "owned_by": "infergate",
            "description": route.model.description,
            "alias_of": (name != route.model.name).then_some(&route.model.name),
            "pools": stages,
            "providers": dedup(providers),
        })
    };
    // A pattern is no name that a client could send.
    let named = exchange.policy.listed().iter().filter(|(name, _)| !name.contains('*'));
    let may = |name: &str, route: &Route| {
        let stages = || route.stages.iter();
        exchange.who.as_ref().is_none_or(|who| {
            who.tenant.may_use(route, Some(name)) && stages().any(|stage| who.tenant.may_reach(&stage.pool))
        })
    };
    let named = named.filter(|(name, route)| may(name, route));
    json!({"object": "list", "data": named.map(|(name, route)| entry(name, route)).collect::<Vec<_>>()})
}

fn dedup(mut words: Vec<&str>) -> Vec<&str> {
    words.sort_unstable();
    words.dedup();
    words
}

/// The head of an answer of our own.
pub fn head(status: StatusCode, content_type: &'static str, exchange: &Exchange) -> Result<Parts, Refusal> {
    let (mut head, ()) = http::Response::new(()).into_parts();
    head.status = status;
    head.headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    identify(&mut head.headers, exchange)?;
    Ok(head)
}

/// Says which request an answer belongs to: our id, and the client's own.
pub fn identify(headers: &mut HeaderMap, exchange: &Exchange) -> Result<(), Refusal> {
    set(headers, headers::REQUEST_ID, exchange.id.as_str())?;
    if exchange.policy.requests.compatible_with.is_some() {
        set(headers, compatible::CALL_ID, exchange.id.as_str())?;
    }
    exchange.client_id().map_or(Ok(()), |id| set(headers, headers::CLIENT_REQUEST_ID, id))
}
