//! The operators' port: is it alive, is it ready, what does it measure, which policy is in force, reload.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use http::header::{ALLOW, CONTENT_TYPE, ORIGIN};
use http::{Method, Request, Response, StatusCode};
use http_body_util::Full;
use serde_json::{Value, json};

use crate::house::House;
use crate::policy::reload::{Reloaded, reload};
use crate::pool::breaker::State as BreakerState;
use crate::pool::origin::Endpoint;
use crate::relay::server::Certificates;
use crate::telemetry::EndpointLevel;

/// What answers on the admin listener.
pub struct Admin {
    house: Arc<House>,
    /// The file that a reload reads; `None` where the policy was made of parts.
    policy: Option<PathBuf>,
    certificates: Certificates,
}

type Answer = Response<Full<Bytes>>;

/// Every path: what it takes and what it is for.
const PATHS: &[(&str, Method, &str)] = &[
    ("/livez", Method::GET, "200 as long as the process can answer"),
    ("/readyz", Method::GET, "200 if new requests are welcome"),
    ("/metrics", Method::GET, "metrics in OpenMetrics' text format"),
    ("/admin/policy", Method::GET, "the policy in force, and what was wrong with the newest file"),
    ("/admin/upstreams", Method::GET, "every endpoint: health, breaker, requests in flight"),
    ("/admin/reload", Method::POST, "reads policy, secrets and certificates again"),
];

impl Admin {
    /// The admin port of `house`.
    pub fn new(house: Arc<House>, policy: Option<PathBuf>, certificates: Certificates) -> Self {
        Self { house, policy, certificates }
    }

    /// Answers one request.
    pub async fn answer<B>(&self, request: Request<B>) -> Answer {
        let Some((_, method, _)) = PATHS.iter().find(|(path, ..)| *path == request.uri().path()) else {
            let list = PATHS.iter().map(|(path, method, what)| format!("{method} {path}: {what}\n"));
            return text(StatusCode::NOT_FOUND, list.collect());
        };
        if request.method() != method {
            let mut answer = text(StatusCode::METHOD_NOT_ALLOWED, format!("this path takes {method}\n"));
            if let Ok(allow) = method.as_str().parse() {
                answer.headers_mut().insert(ALLOW, allow);
            }
            return answer;
        }
        // A page that an operator has open must not be able to reload for them.
        if *method == Method::POST && request.headers().contains_key(ORIGIN) {
            return text(StatusCode::FORBIDDEN, "browsers may not do this\n".to_owned());
        }
        match request.uri().path() {
            "/livez" => text(StatusCode::OK, "ok\n".to_owned()),
            "/readyz" => self.readiness(),
            "/metrics" => self.metrics(),
            "/admin/policy" => json_answer(StatusCode::OK, &self.policy_status()),
            "/admin/upstreams" => json_answer(StatusCode::OK, &self.upstreams()),
            _ => self.reload(),
        }
    }

    fn readiness(&self) -> Answer {
        match (self.house.ready(), self.house.draining()) {
            (true, _) => text(StatusCode::OK, "ok\n".to_owned()),
            (_, true) => text(StatusCode::SERVICE_UNAVAILABLE, "going down\n".to_owned()),
            _ => text(StatusCode::SERVICE_UNAVAILABLE, "starting\n".to_owned()),
        }
    }

    fn metrics(&self) -> Answer {
        let policy = self.house.policy.get();
        let pools: Vec<_> = policy
            .pools
            .values()
            .map(|pool| (pool.name.clone(), pool.state.queue.in_flight(), pool.state.queue.waiting()))
            .collect();
        self.house.telemetry.levels(&pools, &self.levels(), self.house.state.bodies.used());
        let mut answer = text(StatusCode::OK, self.house.telemetry.text());
        let kind = http::HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");
        answer.headers_mut().insert(CONTENT_TYPE, kind);
        answer
    }

    fn levels(&self) -> Vec<EndpointLevel> {
        let policy = self.house.policy.get();
        let now = Instant::now();
        let mut levels = Vec::new();
        for pool in policy.pools.values() {
            for upstream in &pool.upstreams {
                levels.extend(upstream.origin.endpoints().iter().map(|endpoint| EndpointLevel {
                    pool: pool.name.clone(),
                    upstream: upstream.name.to_str().unwrap_or_default().to_owned(),
                    address: endpoint.address.to_string(),
                    in_flight: endpoint.in_flight(),
                    healthy: endpoint.healthy(),
                    breaker: breaker_level(endpoint, now),
                }));
            }
        }
        levels
    }

    fn upstreams(&self) -> Value {
        let words = ["closed", "half_open", "open"];
        let entry = |level: EndpointLevel| {
            json!({
                "pool": level.pool, "upstream": level.upstream, "address": level.address,
                "in_flight": level.in_flight, "healthy": level.healthy,
                "breaker": words.get(usize::try_from(level.breaker).unwrap_or(0)),
            })
        };
        json!({"endpoints": self.levels().into_iter().map(entry).collect::<Vec<_>>()})
    }

    fn policy_status(&self) -> Value {
        let policy = self.house.policy.get();
        let last = self.house.policy.last();
        let seconds = |time: SystemTime| time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        json!({
            "revision": policy.revision, "hash": policy.hash,
            "file": self.policy, "loaded_at": last.loaded.map(seconds), "problems": last.problems,
        })
    }

    fn reload(&self) -> Answer {
        self.certificates.reload();
        let Some(path) = &self.policy else {
            return json_answer(StatusCode::CONFLICT, &json!({"error": "this gateway runs without a policy file"}));
        };
        match reload(&self.house, path) {
            Ok(Reloaded::Swapped(revision, hash)) => {
                json_answer(StatusCode::OK, &json!({"reloaded": true, "revision": revision, "hash": hash}))
            }
            Ok(Reloaded::Unchanged) => json_answer(StatusCode::OK, &json!({"reloaded": false})),
            Err(problems) => {
                let lines = problems.lines(&path.display().to_string());
                json_answer(StatusCode::UNPROCESSABLE_ENTITY, &json!({"reloaded": false, "problems": lines}))
            }
        }
    }
}

fn breaker_level(endpoint: &Endpoint, now: Instant) -> i64 {
    match endpoint.breaker.state(now) {
        BreakerState::Closed => 0,
        BreakerState::HalfOpen => 1,
        BreakerState::Open(_) => 2,
    }
}

fn text(status: StatusCode, body: String) -> Answer {
    answer(status, "text/plain; charset=utf-8", body)
}

fn json_answer(status: StatusCode, body: &Value) -> Answer {
    answer(status, "application/json", format!("{body:#}\n"))
}

fn answer(status: StatusCode, kind: &'static str, body: String) -> Answer {
    let mut answer = Response::new(Full::new(Bytes::from(body)));
    *answer.status_mut() = status;
    answer.headers_mut().insert(CONTENT_TYPE, http::HeaderValue::from_static(kind));
    answer
}
