//! Looking after upstreams in the background: their health, their load, their addresses, their kept connections.
//!
//! Nothing of this ever stands on a request's way.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use hickory_resolver::TokioResolver;
use hickory_resolver::config::{NameServerConfig, ResolverConfig};
use tokio::task::{JoinHandle, JoinSet};

use super::load::millis;
use super::origin::{Address, Endpoint, Host, Origin, OriginState};
use super::told::{Scanner, Wants};
use super::{Pool, Upstream, feed};
use crate::house::House;
use crate::policy::Policy;
use crate::relay;

/// The bounds of how long the watch sleeps when nothing is due.
const SLEEP: std::ops::RangeInclusive<Duration> = Duration::from_millis(20)..=Duration::from_millis(500);
/// The bounds of how long an answer of the name service is believed.
const TTL: std::ops::RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(300);
/// How soon a name that could not be looked up is tried again.
const LOOKUP_AGAIN: Duration = Duration::from_secs(1);
/// How long the start waits for names.
const LOOKUP_FIRST: Duration = Duration::from_secs(3);

/// Looks names up.
pub struct Names(Option<TokioResolver>);

impl Names {
    /// Asks `servers`, or whom the system asks.
    pub fn new(servers: &[SocketAddr]) -> Self {
        let resolver = if servers.is_empty() {
            TokioResolver::builder_tokio().ok().map(|builder| builder.build())
        } else {
            let mut config = ResolverConfig::default();
            for server in servers {
                let mut name_server = NameServerConfig::udp_and_tcp(server.ip());
                for connection in &mut name_server.connections {
                    connection.port = server.port();
                }
                config.add_name_server(name_server);
            }
            Some(TokioResolver::builder_with_config(config, Default::default()).build())
        };
        let resolver = resolver.and_then(|built| {
            built
                .inspect_err(|error| tracing::error!(%error, "no resolver: upstreams with names cannot be reached"))
                .ok()
        });
        Self(resolver)
    }

    /// The addresses of `name`, and for how long they may be believed.
    pub async fn look_up(&self, name: &str) -> Result<(Vec<IpAddr>, Duration), String> {
        let Some(resolver) = &self.0 else { return Err("there is no resolver".to_owned()) };
        let found = resolver.lookup_ip(name).await.map_err(|error| error.to_string())?;
        let ttl = found.valid_until().saturating_duration_since(Instant::now());
        Ok((found.iter().collect(), ttl.clamp(*TTL.start(), *TTL.end())))
    }
}

/// Looks up every name of the policy once, for a few seconds at most, so that the first requests find somebody.
pub async fn look_up_all(names: &Arc<Names>, policy: &Policy) {
    let mut lookups = JoinSet::new();
    for origin in origins(policy).into_values().filter(|origin| origin.endpoints().is_empty()) {
        let names = names.clone();
        lookups.spawn(async move { resolve(&names, &origin).await });
    }
    let all = async { while lookups.join_next().await.is_some() {} };
    if tokio::time::timeout(LOOKUP_FIRST, all).await.is_err() {
        tracing::warn!("some upstreams' names are still being looked up");
    }
}

/// Looks after the upstreams of the policy in force, until the process ends.
pub async fn run(house: Arc<House>, names: Arc<Names>) {
    let mut due = Due::default();
    let mut jobs = JoinSet::new();
    loop {
        tokio::time::sleep(due.sleep(Instant::now())).await;
        due.finish(&mut jobs);
        let policy = house.policy.get();
        let now = Instant::now();
        due.batch_waits = false;
        let current = origins(&policy);
        due.lookups.retain(|key, _| current.contains_key(key));
        for (key, origin) in current {
            if due.lookups.get(&key).is_none_or(|at| now >= *at) && matches!(key.host, Host::Name(..)) {
                // Until it has come back, whatever it comes back with.
                due.lookups.insert(key.clone(), now + Duration::from_secs(30));
                let names = names.clone();
                jobs.spawn(async move { Job::Resolved(key, resolve(&names, &origin).await) });
            }
        }
        for pool in policy.pools.values() {
            due.check(&house, pool, now, &mut jobs);
            due.ask_load(&house, pool, now, &mut jobs);
            due.let_batch_in(pool, now);
            due.listen(pool, now);
        }
        due.feeds.retain(|_, (_, wanted)| *wanted == now);
        due.tidy(&house, &policy, now, &mut jobs);
    }
}

/// What is to be done when.
#[derive(Default)]
struct Due {
    lookups: HashMap<Origin, Instant>,
    /// By pool and endpoint: the next check, and the results in a row (good ones above zero).
    checks: HashMap<(Arc<str>, usize), Check>,
    /// By the same: the next look at an engine's page of metrics.
    looks: HashMap<(Arc<str>, usize), Look>,
    /// By pool: how many requests it has placed, and when that last changed.
    uses: HashMap<Arc<str>, (u64, Instant)>,
    swept: Option<Instant>,
    /// Whether batch waits for room somewhere.
    batch_waits: bool,
    /// By endpoint and port: who listens to what its engine tells of its cache, and when that was last wanted.
    feeds: HashMap<(usize, u16), (Listener, Instant)>,
}

/// Somebody who listens until nobody wants it any more.
struct Listener(JoinHandle<()>);

impl Drop for Listener {
    fn drop(&mut self) {
        self.0.abort();
    }
}

struct Check {
    endpoint: Arc<Endpoint>,
    next: Instant,
    running: bool,
    in_a_row: i64,
    seen: Instant,
}

/// When an engine's page of metrics is read next.
struct Look {
    next: Instant,
    running: bool,
    /// How often in a row it failed.
    failures: u32,
    seen: Instant,
}

/// A pool of which nobody has asked anything for so long is not in use: its engines are left in peace.
const IN_USE: Duration = Duration::from_secs(10);
/// The longest pause between two looks at an engine that does not answer, or answers slowly.
const LOOK_AGAIN_MAX: Duration = Duration::from_secs(30);
/// An engine spends no more than this share of its time on being looked at.
const LOOKED_AT: u32 = 20;

/// A background job's end.
enum Job {
    Looked { key: (Arc<str>, usize), took: Duration, heard: bool, interval: Duration },
    Resolved(Origin, Duration),
    Tidied,
    Checked { key: (Arc<str>, usize), well: bool, healthy_after: u32, unhealthy_after: u32 },
}

impl Due {
    /// Starts the health checks that are due. The first one comes at a random moment of the interval, so that
    /// checks do not march in step.
    fn check(&mut self, house: &Arc<House>, pool: &Arc<Pool>, now: Instant, jobs: &mut JoinSet<Job>) {
        if !pool.health.enabled {
            return;
        }
        let interval = Duration::from_millis(pool.health.interval_ms);
        for (index, upstream) in pool.upstreams.iter().enumerate() {
            for endpoint in upstream.origin.endpoints().iter() {
                let key = (pool.name.clone(), Arc::as_ptr(endpoint) as usize);
                let check = self.checks.entry(key.clone()).or_insert_with(|| Check {
                    endpoint: endpoint.clone(),
                    next: now + interval.mul_f64(fastrand::f64()),
                    running: false,
                    in_a_row: 0,
                    seen: now,
                });
                check.seen = now;
                if check.running || now < check.next {
                    continue;
                }
                check.running = true;
                check.next = now + interval;
                let (house, pool, endpoint) = (house.clone(), pool.clone(), endpoint.clone());
                jobs.spawn(async move {
                    let well = probe(&house, &pool, &pool.upstreams[index], &endpoint).await;
                    let (healthy_after, unhealthy_after) = (pool.health.healthy_after, pool.health.unhealthy_after);
                    Job::Checked { key, well, healthy_after, unhealthy_after }
                });
            }
        }
    }

    /// Starts the looks at pages of metrics that are due, in pools that are in use.
    fn ask_load(&mut self, house: &Arc<House>, pool: &Arc<Pool>, now: Instant, jobs: &mut JoinSet<Job>) {
        let interval = Duration::from_millis(pool.load.metrics_ms).max(LOOK_INTERVAL_MIN);
        if pool.load.metrics_ms == 0 || !self.is_in_use(pool, now) {
            return self.looks.retain(|(name, _), look| *name != pool.name || look.running);
        }
        for (index, upstream) in pool.upstreams.iter().enumerate() {
            for endpoint in upstream.origin.endpoints().iter().filter(|endpoint| endpoint.available(now)) {
                let key = (pool.name.clone(), Arc::as_ptr(endpoint) as usize);
                let next = now + interval.mul_f64(fastrand::f64());
                let fresh = || Look { next, running: false, failures: 0, seen: now };
                let look = self.looks.entry(key.clone()).or_insert_with(fresh);
                look.seen = now;
                if look.running || now < look.next {
                    continue;
                }
                look.running = true;
                let (house, pool, endpoint) = (house.clone(), pool.clone(), endpoint.clone());
                jobs.spawn(async move {
                    let heard = look_at(&house, &pool, &pool.upstreams[index], &endpoint).await;
                    Job::Looked { key, took: now.elapsed(), heard, interval }
                });
            }
        }
    }

    /// Listens to what engines tell of their caches.
    fn listen(&mut self, pool: &Pool, now: Instant) {
        for upstream in &pool.upstreams {
            let Some(port) = upstream.kv_events else { continue };
            for endpoint in upstream.origin.endpoints().iter() {
                let key = (Arc::as_ptr(endpoint) as usize, port);
                let listens = || Listener(tokio::spawn(feed::follow(Arc::downgrade(endpoint), port)));
                self.feeds.entry(key).or_insert_with(|| (listens(), now)).1 = now;
            }
        }
    }

    /// Measures the pool's room where batch waits for it.
    fn let_batch_in(&mut self, pool: &Pool, now: Instant) {
        if pool.state.queue.batch_waits() {
            pool.lets_batch_in(now);
            self.batch_waits = true;
        }
    }

    /// Whether somebody has asked something of the pool lately.
    fn is_in_use(&mut self, pool: &Pool, now: Instant) -> bool {
        let turns = pool.state.turns.load(Ordering::Relaxed);
        let (before, since) = self.uses.entry(pool.name.clone()).or_insert((turns, now));
        if *before != turns {
            (*before, *since) = (turns, now);
        }
        turns > 0 && now < *since + IN_USE
    }

    /// How long nothing will be due. A new policy is noticed within half a second.
    fn sleep(&self, now: Instant) -> Duration {
        let checks = self.checks.values().filter(|check| !check.running).map(|check| check.next);
        let looks = self.looks.values().filter(|look| !look.running).map(|look| look.next);
        let next = checks.chain(looks).chain(self.lookups.values().copied()).min();
        let sleep = next.map_or(*SLEEP.end(), |next| next.saturating_duration_since(now));
        let running = self.checks.values().any(|check| check.running) || self.looks.values().any(|look| look.running);
        sleep.clamp(*SLEEP.start(), if running || self.batch_waits { Duration::from_millis(50) } else { *SLEEP.end() })
    }

    /// Takes the results that have come.
    fn finish(&mut self, jobs: &mut JoinSet<Job>) {
        while let Some(done) = jobs.try_join_next() {
            match done {
                Ok(Job::Looked { key, took, heard, interval }) => {
                    if let Some(look) = self.looks.get_mut(&key) {
                        look.result(took, heard, interval, Instant::now());
                    }
                }
                Ok(Job::Tidied) => {}
                Ok(Job::Resolved(key, ttl)) => drop(self.lookups.insert(key, Instant::now() + ttl)),
                Ok(Job::Checked { key, well, healthy_after, unhealthy_after }) => {
                    if let Some(check) = self.checks.get_mut(&key) {
                        check.result(well, healthy_after, unhealthy_after);
                    }
                }
                Err(error) => tracing::error!(%error, "a background job broke"),
            }
        }
    }

    /// Forgets endpoints that are gone and what they have read, and drops kept connections that have lain too long.
    fn tidy(&mut self, house: &Arc<House>, policy: &Policy, now: Instant, jobs: &mut JoinSet<Job>) {
        if self.swept.is_some_and(|at| now < at + Duration::from_secs(1)) {
            return;
        }
        self.swept = Some(now);
        if let Some(prefixes) = house.state.untidy_prefixes() {
            jobs.spawn_blocking(move || {
                prefixes.tidy();
                Job::Tidied
            });
        }
        self.checks.retain(|_, check| check.running || check.seen == now);
        self.looks.retain(|_, look| look.running || look.seen == now);
        self.uses.retain(|name, _| policy.pools.contains_key(&**name));
        for pool in policy.pools.values() {
            let idle = Duration::from_millis(pool.timeouts.idle_ms);
            for upstream in &pool.upstreams {
                for endpoint in upstream.origin.endpoints().iter() {
                    endpoint.target.sweep(idle, now);
                }
            }
        }
    }
}

impl Look {
    /// The next look comes after the interval, give or take a fifth; later where this one failed or was slow.
    fn result(&mut self, took: Duration, heard: bool, interval: Duration, now: Instant) {
        self.running = false;
        self.failures = if heard { 0 } else { self.failures + 1 };
        let patient = interval.saturating_mul(1 << self.failures.min(6)).max(took.saturating_mul(LOOKED_AT));
        self.next = now + patient.min(LOOK_AGAIN_MAX.max(interval)).mul_f64(0.8 + 0.4 * fastrand::f64());
    }
}

/// Nobody is looked at more often than this.
const LOOK_INTERVAL_MIN: Duration = Duration::from_secs(1);

impl Check {
    fn result(&mut self, well: bool, healthy_after: u32, unhealthy_after: u32) {
        let now = Instant::now();
        self.running = false;
        self.in_a_row = match (well, self.in_a_row) {
            (true, row) => row.max(0) + 1,
            (false, row) => row.min(0) - 1,
        };
        if self.in_a_row >= i64::from(healthy_after) {
            self.endpoint.breaker.recovered(now);
            if self.endpoint.set_healthy(true, now) {
                tracing::info!(address = %self.endpoint.address, "upstream is healthy again");
            }
        }
        if self.in_a_row <= -i64::from(unhealthy_after) && self.endpoint.set_healthy(false, now) {
            // Whatever comes back has nothing in its cache.
            self.endpoint.forget_prompts();
            tracing::warn!(address = %self.endpoint.address, "upstream is unhealthy");
        }
    }
}

/// Asks one endpoint for its health: any status below 500 but 429 says that a server is there and at work.
async fn probe(house: &House, pool: &Pool, upstream: &Upstream, endpoint: &Endpoint) -> bool {
    let path = pool.health.path.as_deref().unwrap_or(upstream.provider.health_path());
    let path = format!("{}{path}", upstream.path);
    let timeout = Duration::from_millis(pool.health.timeout_ms);
    let asked = relay::fetch(&house.connections, &endpoint.target, upstream, &path);
    let status = match tokio::time::timeout(timeout, asked).await {
        Ok(Ok((status, _))) => Ok(status),
        Ok(Err(why)) => Err(why),
        Err(_) => Err("no answer in time".to_owned()),
    };
    let well = status.as_ref().is_ok_and(|status| *status < 500 && *status != 429);
    if !well {
        tracing::debug!(address = %endpoint.address, ?status, "health check failed");
    }
    well
}

/// Reads an engine's page of metrics as far as is needed. Returns whether it told anything.
async fn look_at(house: &House, pool: &Pool, upstream: &Upstream, endpoint: &Endpoint) -> bool {
    let at = millis(Instant::now());
    let wants = Wants {
        adapters: pool.load.adapters,
        cache: pool.balance.matches_prefixes() && endpoint.load.told.wants_cache(at),
    };
    let mut scanner = Scanner::new(wants);
    let path = format!("{}/metrics", upstream.path);
    let timeout = Duration::from_millis(pool.health.timeout_ms);
    let read = relay::fetch_until(&house.connections, &endpoint.target, upstream, &path, |piece| scanner.push(piece));
    let status = tokio::time::timeout(timeout, read).await;
    let report = scanner.finish().filter(|_| matches!(status, Ok(Ok(200))));
    let heard = report.is_some();
    if heard && wants.cache {
        // Most of its page is read for this: one that does not tell is not asked every time.
        endpoint.load.told.cache_asked(Some(at));
    }
    match report {
        Some(report) => endpoint.hears(report, Instant::now()),
        None => tracing::debug!(address = %endpoint.address, ?status, "the page of metrics told nothing"),
    }
    heard
}

/// Every origin of a policy, once.
fn origins(policy: &Policy) -> HashMap<Origin, Arc<OriginState>> {
    let upstreams = policy.pools.values().flat_map(|pool| &pool.upstreams);
    upstreams.map(|upstream| (upstream.origin.origin.clone(), upstream.origin.clone())).collect()
}

/// Looks an origin's name up and hands it the addresses. Returns when to do it again.
async fn resolve(names: &Names, origin: &OriginState) -> Duration {
    let Host::Name(name, port) = &origin.origin.host else { return *TTL.end() };
    match names.look_up(name).await {
        Ok((addresses, ttl)) => {
            let mut addresses: Vec<_> = addresses.into_iter().map(|ip| SocketAddr::new(ip, *port)).collect();
            addresses.sort_unstable();
            origin.resolved(addresses.into_iter().map(Address::Tcp).collect(), Instant::now());
            ttl
        }
        Err(error) => {
            tracing::warn!(%name, %error, "the name of an upstream could not be looked up");
            LOOKUP_AGAIN
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_engine_that_is_slow_or_silent_is_looked_at_less_often() {
        let now = Instant::now();
        let second = Duration::from_secs(1);
        let mut look = Look { next: now, running: true, failures: 0, seen: now };
        let mut pause = |took, heard| {
            look.result(took, heard, second, now);
            look.next - now
        };
        let around = |pause: Duration, seconds: f64| (0.8 * seconds..=1.2 * seconds).contains(&pause.as_secs_f64());
        assert!(around(pause(second / 100, true), 1.0));
        assert!(around(pause(second / 2, true), 10.0), "a page that takes half a second");
        assert!(around(pause(second / 100, false), 2.0));
        assert!(around(pause(second / 100, false), 4.0));
        (0..9).for_each(|_| assert!(pause(second / 100, false) <= LOOK_AGAIN_MAX.mul_f64(1.2)));
        assert!(around(pause(second / 100, true), 1.0));
    }
}
