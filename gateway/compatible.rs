//! Paths and headers of another gateway, for applications and probes that count on them: off unless the policy says so.
//!
//! They say what our own say, in the other's words; nothing is made up to look alike.

use std::time::{Duration, Instant};

use http::{HeaderMap, HeaderName};

use crate::exchange::Exchange;
use crate::headers::set;
use crate::policy::{Policy, Stage};
use crate::pool::Upstream;
use crate::refusal::Refusal;
use crate::surface::{self, Surface};

/// LiteLLM's name for the id of a request.
pub const CALL_ID: HeaderName = HeaderName::from_static("x-litellm-call-id");
const MODEL_ID: HeaderName = HeaderName::from_static("x-litellm-model-id");
const MODEL_GROUP: HeaderName = HeaderName::from_static("x-litellm-model-group");
const RESPONSE_COST: HeaderName = HeaderName::from_static("x-litellm-response-cost");
const RESPONSE_DURATION_MS: HeaderName = HeaderName::from_static("x-litellm-response-duration-ms");
const OVERHEAD_DURATION_MS: HeaderName = HeaderName::from_static("x-litellm-overhead-duration-ms");
const ATTEMPTED_RETRIES: HeaderName = HeaderName::from_static("x-litellm-attempted-retries");
const ATTEMPTED_FALLBACKS: HeaderName = HeaderName::from_static("x-litellm-attempted-fallbacks");

const LIVENESS: [&str; 2] = ["/health/liveliness", "/health/liveness"];
const READINESS: &str = "/health/readiness";

/// The endpoint of ours that answers for `path`, where the policy has such paths.
pub fn surface(policy: &Policy, path: &str) -> Option<&'static Surface> {
    policy.requests.compatible_with?;
    (LIVENESS.contains(&path) || path == READINESS).then(|| surface::find("/health"))?
}

/// Whether a path, with its query, asks if the process is alive.
pub fn is_liveness(path: &str) -> bool {
    LIVENESS.contains(&without_query(path))
}

/// Whether it asks if the gateway serves.
pub fn is_readiness(path: &str) -> bool {
    without_query(path) == READINESS
}

fn without_query(path: &str) -> &str {
    path.split('?').next().unwrap_or(path)
}

/// Who answered, and what it cost.
pub struct Told<'a> {
    /// The upstream.
    pub upstream: &'a Upstream,
    /// Its pool.
    pub stage: &'a Stage,
    /// When its answer began.
    pub first_at: Instant,
    /// Dollars, where they are known already.
    pub cost: Option<String>,
}

/// Says of an answer what LiteLLM would.
pub fn tell(headers: &mut HeaderMap, exchange: &Exchange, told: &Told<'_>) -> Result<(), Refusal> {
    let now = Instant::now();
    let route = exchange.route.as_ref();
    let stage = route.and_then(|route| route.stages.iter().position(|stage| std::ptr::eq(stage, told.stage)));
    let milliseconds = |time: Duration| format!("{:.3}", time.as_secs_f64() * 1000.0);
    if exchange.policy.requests.name_upstream {
        set(headers, MODEL_ID, told.upstream.name.clone())?;
    }
    if let Some(route) = route.filter(|route| route.model.name.is_ascii()) {
        let _ = set(headers, MODEL_GROUP, route.model.name.as_str());
    }
    if let Some(cost) = &told.cost {
        set(headers, RESPONSE_COST, cost.as_str())?;
    }
    set(headers, RESPONSE_DURATION_MS, milliseconds(now - exchange.times.received))?;
    set(headers, OVERHEAD_DURATION_MS, milliseconds(exchange.overhead(told.first_at, now)))?;
    set(headers, ATTEMPTED_RETRIES, u64::from(exchange.attempt_count().saturating_sub(1)))?;
    set(headers, ATTEMPTED_FALLBACKS, stage.unwrap_or(0) as u64)
}
