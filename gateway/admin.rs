//! The operators' port: is it alive, is it ready, what does it measure, which policy is in force, reload.

pub mod access;
mod denials;
mod keys;
mod usage;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use http::header::{ALLOW, CONTENT_TYPE, ORIGIN, WWW_AUTHENTICATE};
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Body;
use serde_json::{Value, json};

use self::access::{Access, Denied, Need, by_a_strangers_name};
use self::denials::Denials;
use crate::audit::journal::By;
use crate::audit::read;
use crate::house::House;
use crate::limits::standing::Standing;
use crate::limits::{Limit, millis};
use crate::logging::Levels;
use crate::policy::reload::{Reloaded, reload};
use crate::pool::breaker::State as BreakerState;
use crate::pool::origin::Endpoint;
use crate::pool::prefix::Seat;
use crate::relay::server::Certificates;
use crate::settings::Role;
use crate::telemetry::EndpointLevel;

/// What answers on the admin listener.
pub struct Admin {
    house: Arc<House>,
    /// The file that a reload reads; `None` where the policy was made of parts.
    policy: Option<PathBuf>,
    certificates: Certificates,
    levels: Levels,
    access: Access,
    denials: Denials,
}

type Answer = Response<Full<Bytes>>;
type BoxError = Box<dyn std::error::Error + Send + Sync>;

const VIEWER: Need = Need::Role(Role::Viewer);
const OPERATOR: Need = Need::Role(Role::Operator);
const OWNER: Need = Need::Role(Role::Owner);

/// One thing that can be done here: the path, the method, what it takes, and what it is for.
type Entry = (&'static str, Method, Need, &'static str);

/// Every path.
const PATHS: &[Entry] = &[
    ("/livez", Method::GET, Need::Nothing, "200 as long as the process can answer"),
    ("/readyz", Method::GET, Need::Nothing, "200 if new requests are welcome"),
    ("/metrics", Method::GET, Need::Metrics, "metrics in OpenMetrics' text format"),
    ("/admin/policy", Method::GET, VIEWER, "the policy in force, and what was wrong with the newest file"),
    ("/admin/upstreams", Method::GET, VIEWER, "every endpoint: health, breaker, requests in flight"),
    ("/admin/v1/limits", Method::GET, VIEWER, "every limit: what is used of it, what is reserved, and for whom"),
    ("/admin/reload", Method::POST, OPERATOR, "reads policy, secrets and certificates again"),
    ("/admin/v1/requests/{id}", Method::GET, VIEWER, "the record of a request, by the x-request-id of its answer"),
    (
        "/admin/v1/breaker",
        Method::POST,
        OPERATOR,
        "?pool=P&address=A&state=open|closed: takes an endpoint out, or back in",
    ),
    ("/admin/v1/keys", Method::GET, OWNER, "the callers' keys: names, prefixes, tenants, when they end"),
    (
        "/admin/v1/keys",
        Method::POST,
        OWNER,
        "{\"tenant\": \"T\", \"name\": \"N\", \"expires_in\": \"90d\"}: makes a key, which is told only now",
    ),
    ("/admin/v1/keys/{name or prefix}", Method::DELETE, OWNER, "revokes a key, or all keys of a name"),
    (
        "/admin/v1/usage",
        Method::GET,
        VIEWER,
        "?by=tenant,model,principal,day,hour&since=7d&until=&tenant=&model=&principal=&limit=&cursor=: what was spent",
    ),
    ("/admin/v1/log", Method::GET, VIEWER, "what is logged, by module"),
    ("/admin/v1/log", Method::PUT, OPERATOR, "{\"levels\": \"info,infergate=debug\"}: logs more, or less, from now on"),
];

/// How long a look-up waits for the newest records to be on disk.
const FLUSH: Duration = Duration::from_secs(2);

/// The answer to a request that a page in a browser may have sent under its own name.
const STRANGE_NAME: &str = "ask for this by IP address, as localhost or by a name without a dot: any other name could be \
                            that of a page in a browser. With operators' keys (settings: admin.keys) every name is good\n";

/// How long a breaker stays open that was opened by hand.
const BY_HAND: Duration = Duration::from_secs(3600);

/// The longest body that is read.
const BODY_BYTES_MAX: usize = 16 << 10;

/// The path's entries in the list, one a method. A word in braces stands for the rest of the path.
fn entries(path: &str) -> Vec<&'static Entry> {
    let fits = |pattern: &str| match pattern.split_once('{') {
        Some((before, _)) => path.strip_prefix(before).is_some_and(|rest| !rest.is_empty() && !rest.contains('/')),
        None => pattern == path,
    };
    PATHS.iter().filter(|(pattern, ..)| fits(pattern)).collect()
}

impl Admin {
    /// The admin port of `house`.
    pub fn new(
        house: Arc<House>,
        policy: Option<PathBuf>,
        certificates: Certificates,
        levels: Levels,
        access: Access,
    ) -> Self {
        Self { house, policy, certificates, levels, access, denials: Denials::default() }
    }

    /// Answers one request, which came from `peer`.
    pub async fn answer<B: Body<Error: Into<BoxError>>>(&self, request: Request<B>, peer: Option<String>) -> Answer {
        let known = entries(request.uri().path());
        let Some((pattern, ..)) = known.first() else {
            let list = PATHS.iter().map(|(path, method, _, what)| format!("{method} {path}: {what}\n"));
            return text(StatusCode::NOT_FOUND, list.collect());
        };
        let method = request.method();
        let Some((_, _, need, _)) = known.iter().find(|(_, known, ..)| known == method) else {
            let methods: Vec<&str> = known.iter().map(|(_, method, ..)| method.as_str()).collect();
            let methods = methods.join(", ");
            let mut answer = text(StatusCode::METHOD_NOT_ALLOWED, format!("this path takes {methods}\n"));
            if let Ok(allow) = methods.parse() {
                answer.headers_mut().insert(ALLOW, allow);
            }
            return answer;
        };
        // A page that an operator has open must not be able to change anything for them.
        if *method != Method::GET && request.headers().contains_key(ORIGIN) {
            return text(StatusCode::FORBIDDEN, "browsers may not do this\n".to_owned());
        }
        // Nor may a page read anything because its own name suddenly leads here.
        if *need != Need::Nothing && self.access.is_open() && by_a_strangers_name(&request) {
            return text(StatusCode::FORBIDDEN, STRANGE_NAME.to_owned());
        }
        let operator = match self.access.admit(*need, request.headers(), SystemTime::now()) {
            Ok(operator) => operator,
            Err(denied) => return self.denied(&denied, (method, pattern), peer),
        };
        let by = By { how: "admin", address: peer, principal: operator.map(|operator| operator.name.to_string()) };
        let query = request.uri().query().unwrap_or_default();
        match *pattern {
            "/livez" => text(StatusCode::OK, "ok\n".to_owned()),
            "/readyz" => self.readiness(),
            "/metrics" => self.metrics(),
            "/admin/policy" => json_answer(StatusCode::OK, &self.policy_status()),
            "/admin/upstreams" => json_answer(StatusCode::OK, &self.upstreams()),
            "/admin/v1/limits" => json_answer(StatusCode::OK, &limits(&self.house)),
            "/admin/v1/requests/{id}" => self.record(request.uri().path().rsplit('/').next().unwrap_or_default()).await,
            "/admin/v1/usage" => self.usage(query).await,
            "/admin/v1/breaker" => self.breaker(query, by),
            "/admin/v1/keys" if *method == Method::GET => self.keys(),
            "/admin/v1/keys" => self.create_key(request.into_body(), by).await,
            "/admin/v1/keys/{name or prefix}" => {
                self.delete_key(request.uri().path().rsplit('/').next().unwrap_or_default(), by).await
            }
            "/admin/v1/log" if *method == Method::GET => self.log(),
            "/admin/v1/log" => self.set_log(request.into_body(), by).await,
            _ => self.reload(by),
        }
    }

    /// Somebody may not do this: it is on record, unless there was too much of that lately.
    fn denied(&self, denied: &Denied, (method, path): (&Method, &str), address: Option<String>) -> Answer {
        let (why, principal) = match denied {
            Denied::Unknown => ("unknown", None),
            Denied::Lesser(name, _) => ("role", Some(name.to_string())),
        };
        self.house.telemetry.admin_denied(why);
        if let Some(left_out) = self.denials.told(Instant::now()) {
            let by = By { how: "admin", address, principal };
            let what = json!({"method": method.as_str(), "path": path, "why": why, "left_out": left_out});
            self.house.act("denied", by, what);
        }
        not_let_in(denied, path)
    }

    fn log(&self) -> Answer {
        json_answer(StatusCode::OK, &json!({"levels": self.levels.get()}))
    }

    /// Changes what is logged.
    async fn set_log<B: Body<Error: Into<BoxError>>>(&self, body: B, by: By) -> Answer {
        let wrong = |why: String| json_answer(StatusCode::BAD_REQUEST, &json!({"error": why}));
        let body = match collected(body).await {
            Ok(body) => body,
            Err(error) => return wrong(error),
        };
        let asked = serde_json::from_slice::<Value>(&body).unwrap_or_default();
        let Some(levels) = asked.get("levels").and_then(Value::as_str) else {
            return wrong("the body is {\"levels\": \"info,infergate=debug\"}".to_owned());
        };
        let before = self.levels.get();
        if let Err(why) = self.levels.set(levels) {
            return wrong(why);
        }
        tracing::info!(levels, "log levels changed");
        self.house.act("log_levels", by, json!({"before": before, "levels": levels}));
        self.log()
    }

    /// The record of one request, as it stands in the journal.
    async fn record(&self, id: &str) -> Answer {
        let Some(journal) = self.house.journal.clone() else {
            return json_answer(StatusCode::CONFLICT, &json!({"error": "this gateway keeps no journal"}));
        };
        // On a disk that does not answer, what is there already is looked through.
        let _ = tokio::time::timeout(FLUSH, journal.flush()).await;
        let wanted = id.to_owned();
        let found = tokio::task::spawn_blocking(move || read::find(journal.directory(), &wanted)).await;
        match found.map_err(std::io::Error::other).flatten() {
            Ok(Some(line)) => {
                answer(StatusCode::OK, "application/json", format!("{}\n", String::from_utf8_lossy(&line)))
            }
            Ok(None) => json_answer(StatusCode::NOT_FOUND, &json!({"error": "the journal has no record with this id"})),
            Err(error) => json_answer(StatusCode::INTERNAL_SERVER_ERROR, &json!({"error": error.to_string()})),
        }
    }

    /// What was spent, of all that is on record now.
    async fn usage(&self, query: &str) -> Answer {
        let Some(ledger) = self.house.ledger.clone() else {
            return json_answer(StatusCode::CONFLICT, &json!({"error": "this gateway keeps no ledger"}));
        };
        let asked = match usage::asked(query) {
            Ok(asked) => asked,
            Err(error) => return json_answer(StatusCode::BAD_REQUEST, &json!({"error": error})),
        };
        if let Some(journal) = &self.house.journal {
            let _ = tokio::time::timeout(FLUSH, journal.flush()).await;
        }
        match tokio::task::spawn_blocking(move || usage::told(&ledger, &asked)).await {
            Ok(Ok(report)) => json_answer(StatusCode::OK, &report),
            Ok(Err(error)) => json_answer(StatusCode::SERVICE_UNAVAILABLE, &json!({"error": error})),
            Err(error) => json_answer(StatusCode::INTERNAL_SERVER_ERROR, &json!({"error": error.to_string()})),
        }
    }

    /// Opens or closes an endpoint's breaker by hand.
    fn breaker(&self, query: &str, by: By) -> Answer {
        let named = |name: &str| {
            query.split('&').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('=')).unwrap_or_default()
        };
        let (pool, address, state) = (named("pool"), named("address"), named("state"));
        let policy = self.house.policy.get();
        let upstreams = policy.pools.get(pool).map_or(&[][..], |pool| &pool.upstreams);
        let endpoints = upstreams.iter().flat_map(|upstream| upstream.origin.endpoints().to_vec());
        let Some(endpoint) = endpoints.into_iter().find(|endpoint| endpoint.address.to_string() == address) else {
            let error = "no such endpoint: give pool and address as GET /admin/upstreams lists them";
            return json_answer(StatusCode::NOT_FOUND, &json!({"error": error}));
        };
        match state {
            "open" => endpoint.breaker.pause(BY_HAND, Instant::now()),
            "closed" => endpoint.breaker.reset(),
            _ => return json_answer(StatusCode::BAD_REQUEST, &json!({"error": "state is open or closed"})),
        }
        let change = json!({"pool": pool, "address": address, "state": state});
        tracing::warn!(pool, address, state, "breaker set by hand");
        self.house.act("breaker", by, change.clone());
        json_answer(StatusCode::OK, &change)
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
            .map(|pool| (pool.name.to_string(), pool.state.queue.in_flight(), pool.state.queue.waiting()))
            .collect();
        self.house.telemetry.levels(&pools, &self.levels(), self.house.state.bodies.used());
        self.limit_levels();
        self.house.telemetry.tables(self.house.tables());
        self.house.ledger.iter().for_each(|ledger| ledger.measure());
        let mut answer = text(StatusCode::OK, self.house.telemetry.text());
        let kind = http::HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");
        answer.headers_mut().insert(CONTENT_TYPE, kind);
        answer
    }

    /// The limits that count for all together: the others would be a series for everybody.
    fn limit_levels(&self) {
        let (policy, now) = (self.house.policy.get(), millis(SystemTime::now()));
        let together = policy.all_limits().filter(|limit| limit.each.is_empty());
        let left = together.map(|limit| {
            let standing = self.house.state.limits.standings(limit, now, 1).into_iter().next();
            (&*limit.name, limit.max, standing.map_or(limit.max, |(_, standing, _)| standing.free))
        });
        let limits = &self.house.state.limits;
        self.house.telemetry.limit_levels(left, limits.held(), limits.len());
    }

    fn levels(&self) -> Vec<EndpointLevel> {
        let policy = self.house.policy.get();
        let now = Instant::now();
        let mut levels = Vec::new();
        for pool in policy.pools.values() {
            for upstream in &pool.upstreams {
                levels.extend(upstream.origin.endpoints().iter().map(|endpoint| EndpointLevel {
                    pool: pool.name.to_string(),
                    upstream: upstream.name.to_str().unwrap_or_default().to_owned(),
                    address: endpoint.address.to_string(),
                    in_flight: endpoint.in_flight(),
                    healthy: endpoint.healthy(),
                    breaker: breaker_level(endpoint, now),
                    work: pool.balance.weighs().then(|| endpoint.load.levels(now)),
                    cache: endpoint.load.told.cache(),
                    events:
                        endpoint.feed.heard().map(|heard| (heard, endpoint.seated().is_some_and(Seat::is_followed))),
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
                "kv_cache": level.cache.map(|cache| json!({"tokens": cache.tokens, "block_tokens": cache.block})),
                "kv_events": level.events.map(|(heard, followed)| json!({
                    "followed": followed, "batches": heard.batches, "gaps": heard.gaps,
                    "stored_blocks": heard.stored, "removed_blocks": heard.removed,
                    "held_blocks": heard.held, "placed_blocks": heard.placed,
                })),
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

    fn reload(&self, by: By) -> Answer {
        self.certificates.reload();
        let Some(path) = &self.policy else {
            return json_answer(StatusCode::CONFLICT, &json!({"error": "this gateway runs without a policy file"}));
        };
        // Whether it was this call or the watch that was faster: what is in force is the newest file, or it is not.
        let (status, reloaded, problems) = match reload(&self.house, path, by) {
            Ok(Reloaded::Swapped(..)) => (StatusCode::OK, true, None),
            Ok(Reloaded::Unchanged) => (StatusCode::OK, false, None),
            Err(problems) => {
                (StatusCode::UNPROCESSABLE_ENTITY, false, Some(problems.lines(&path.display().to_string())))
            }
        };
        let policy = self.house.policy.get();
        let mut told = json!({
            "reloaded": reloaded, "newest": problems.is_none(), "revision": policy.revision, "hash": policy.hash,
        });
        if let Some(problems) = problems {
            told["problems"] = problems.into();
        }
        json_answer(status, &told)
    }
}

/// Every limit with its levels, the fullest first.
fn limits(house: &House) -> Value {
    const MOST: usize = 100;
    let (policy, now) = (house.policy.get(), millis(SystemTime::now()));
    let entry = |limit: &Arc<Limit>| {
        let level = |(whose, standing, held): (Box<str>, Standing, u64)| {
            let whose = (!whose.is_empty()).then_some(whose);
            json!({"for": whose, "left": standing.free, "reserved": held, "ends_in_s": ends_in(&standing)})
        };
        let levels = house.state.limits.standings(limit, now, MOST);
        let levels: Vec<Value> = levels.into_iter().map(level).collect();
        json!({"limit": &*limit.name, "unit": limit.unit, "max": limit.max, "levels": levels})
    };
    let held = house.state.limits.held();
    let limits: Vec<Value> = policy.all_limits().map(entry).collect();
    let mut told = json!({"limits": limits, "reserved": held});
    if let Some(shared) = &policy.shared {
        // What others have taken is as the store last told this replica.
        told["shared"] = json!({"namespace": shared.namespace, "answers": house.state.limits.shared.answers()});
    }
    told
}

/// When the span ends that is counted now, if it does.
fn ends_in(standing: &Standing) -> Option<u64> {
    const AGES: u64 = 10 * 366 * 86_400;
    Some(standing.rest.as_secs()).filter(|seconds| *seconds < AGES)
}

/// A whole body, if it is not too long.
async fn collected<B: Body<Error: Into<BoxError>>>(body: B) -> Result<Bytes, String> {
    let collected = Limited::new(body, BODY_BYTES_MAX).collect().await;
    collected.map(|body| body.to_bytes()).map_err(|error| error.to_string())
}

fn breaker_level(endpoint: &Endpoint, now: Instant) -> i64 {
    match endpoint.breaker.state(now) {
        BreakerState::Closed => 0,
        BreakerState::HalfOpen => 1,
        BreakerState::Open(_) => 2,
    }
}

/// The answer to somebody who may not do this.
fn not_let_in(denied: &Denied, path: &str) -> Answer {
    let (status, error) = match denied {
        Denied::Unknown => {
            (StatusCode::UNAUTHORIZED, "give an operator's key as `Authorization: Bearer KEY`".to_owned())
        }
        Denied::Lesser(name, role) => {
            tracing::warn!(operator = %name, path, ?role, "an operator asked for more than their role allows");
            (StatusCode::FORBIDDEN, format!("this takes the role {}", format!("{role:?}").to_lowercase()))
        }
    };
    let mut answer = json_answer(status, &json!({"error": error}));
    if status == StatusCode::UNAUTHORIZED {
        let scheme = http::HeaderValue::from_static("Bearer realm=\"infergate-admin\"");
        answer.headers_mut().insert(WWW_AUTHENTICATE, scheme);
    }
    answer
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
