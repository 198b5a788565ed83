//! Every header that the gateway itself puts on answers, in one list.

use http::{HeaderMap, HeaderName, HeaderValue};

use crate::refusal::{Code, Refusal};

/// The request's id, which its record has too.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// The id that the client gave the request, if it did.
pub const CLIENT_REQUEST_ID: HeaderName = HeaderName::from_static("x-client-request-id");
/// The id that the upstream gave it, if it did.
pub const UPSTREAM_REQUEST_ID: HeaderName = HeaderName::from_static("x-upstream-request-id");
/// The model that answered, as the upstream knows it.
pub const MODEL: HeaderName = HeaderName::from_static("x-infergate-model");
/// Where a virtual model was asked for: the rule that decided, and the model it chose.
pub const ROUTE: HeaderName = HeaderName::from_static("x-infergate-route");
/// The upstream that answered, where the policy tells.
pub const UPSTREAM: HeaderName = HeaderName::from_static("x-infergate-upstream");
/// How often upstreams were asked.
pub const ATTEMPTS: HeaderName = HeaderName::from_static("x-infergate-attempts");
/// The gateway's own share of the time, in microseconds.
pub const OVERHEAD_US: HeaderName = HeaderName::from_static("x-infergate-overhead-us");
/// The time of each stage (W3C Server Timing).
pub const SERVER_TIMING: HeaderName = HeaderName::from_static("server-timing");
/// The rules that flagged the prompt or the answer.
pub const GUARDRAILS: HeaderName = HeaderName::from_static("x-infergate-guardrails");
/// What the answer cost, in US dollars.
pub const COST_USD: HeaderName = HeaderName::from_static("x-infergate-cost-usd");
/// Whether it is any use to ask again (OpenAI's clients read it).
pub const SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");
/// Tells nginx in front to pass a stream on as it comes.
pub const ACCEL_BUFFERING: HeaderName = HeaderName::from_static("x-accel-buffering");

/// Sets one header of an answer.
pub fn set<V: TryInto<HeaderValue>>(headers: &mut HeaderMap, name: HeaderName, value: V) -> Result<(), Refusal> {
    let value = value.try_into().map_err(|_| broken())?;
    headers.insert(name, value);
    Ok(())
}

fn broken() -> Refusal {
    Refusal::new(Code::Internal, "a header of the answer could not be written")
}
