//! Where upstreams are: the origin in a URL, and the endpoints behind it.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::ops::Deref;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use arc_swap::{ArcSwap, Guard};

use super::breaker::Breaker;
use super::feed::Feed;
use super::load::{Load, millis};
use super::prefix::{Blocks, CAPACITY, Prefixes, Seat};
use super::told::Report;
use super::worked::Worked;
use crate::policy::file::Http2;
use crate::relay::Target;

/// The scheme, host and port of an upstream, and the protocol spoken to it: what connections can be shared by.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Origin {
    /// Whether TLS is spoken.
    pub tls: bool,
    /// Whether, and how, HTTP/2 is spoken.
    pub http2: Http2,
    /// Where it is.
    pub host: Host,
}

/// A name to be resolved, an address, or a socket file.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Host {
    /// A name and a port: any number of addresses, which change.
    Name(String, u16),
    /// One address.
    Ip(SocketAddr),
    /// A Unix socket.
    Unix(PathBuf),
}

/// One address of an endpoint.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Address {
    /// TCP.
    Tcp(SocketAddr),
    /// A Unix socket.
    Unix(PathBuf),
}

impl Origin {
    /// Reads a base URL: the origin, and the path before `/v1` (without a slash at its end).
    pub fn parse(url: &str, http2: Http2) -> Result<(Self, String), String> {
        if let Some(path) = url.strip_prefix("unix:") {
            let absolute = path.starts_with('/');
            let origin = Self { tls: false, http2, host: Host::Unix(path.into()) };
            return absolute
                .then_some((origin, String::new()))
                .ok_or_else(|| format!("{url}: give unix:/absolute/path"));
        }
        // Before anything is told of it: a password may be in it, or a key in its query.
        let authority = url.split_once("://").map_or(url, |(_, rest)| rest).split(['/', '?', '#']).next();
        if authority.is_some_and(|authority| authority.contains('@')) {
            return Err("a URL carries no user or password: give the key under `key`".to_owned());
        }
        let told = url.split(['?', '#']).next().unwrap_or_default();
        if told.len() < url.len() {
            return Err(format!("{told}: a base URL has no query and no fragment"));
        }
        let uri: http::Uri = url.parse().map_err(|error| format!("{url} is no URL: {error}"))?;
        let tls = match uri.scheme_str() {
            Some("https") => true,
            Some("http") => false,
            _ => return Err(format!("{url}: a URL begins with http:// or https://, or is unix:/path")),
        };
        let host = uri.host().filter(|host| !host.is_empty()).ok_or_else(|| format!("{url} has no host"))?;
        let port = uri.port_u16().unwrap_or(if tls { 443 } else { 80 });
        let ip = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
        let host = match ip {
            Ok(ip) => Host::Ip(SocketAddr::new(ip, port)),
            Err(_) => Host::Name(host.to_ascii_lowercase(), port),
        };
        Ok((Self { tls, http2, host }, uri.path().trim_end_matches('/').to_owned()))
    }

    /// What goes into the `Host` header.
    pub fn authority(&self) -> String {
        let usual = if self.tls { 443 } else { 80 };
        match &self.host {
            Host::Name(name, port) if *port == usual => name.clone(),
            Host::Ip(address) if address.port() == usual && address.is_ipv4() => address.ip().to_string(),
            Host::Unix(_) => "localhost".to_owned(),
            other => other.to_string(),
        }
    }

    /// The name that a certificate must have.
    pub fn server_name(&self) -> String {
        match &self.host {
            Host::Name(name, _) => name.clone(),
            Host::Ip(address) => address.ip().to_string(),
            Host::Unix(_) => "localhost".to_owned(),
        }
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name, port) => write!(f, "{name}:{port}"),
            Self::Ip(address) => address.fmt(f),
            Self::Unix(path) => path.display().fmt(f),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => path.display().fmt(f),
        }
    }
}

/// One origin's level: its endpoints at the moment. Outlives reloads.
#[derive(Debug)]
pub struct OriginState {
    /// The origin.
    pub origin: Origin,
    whereabouts: Whereabouts,
}

/// What is written as an address stays there, and is read without asking whether it has moved.
#[derive(Debug)]
enum Whereabouts {
    Fixed([Arc<Endpoint>; 1]),
    Resolved(ArcSwap<Vec<Arc<Endpoint>>>),
}

/// An origin's endpoints, as they were when it was asked.
pub enum Endpoints<'a> {
    /// Of an address.
    Fixed(&'a [Arc<Endpoint>]),
    /// Of a name.
    Resolved(Guard<Arc<Vec<Arc<Endpoint>>>>),
}

impl Deref for Endpoints<'_> {
    type Target = [Arc<Endpoint>];

    fn deref(&self) -> &Self::Target {
        match self {
            Self::Fixed(endpoints) => endpoints,
            Self::Resolved(endpoints) => endpoints,
        }
    }
}

impl OriginState {
    /// An origin whose endpoints are known if its host is an address, and still to be resolved if it is a name.
    pub fn new(origin: Origin, now: Instant) -> Self {
        let fixed = |address| Whereabouts::Fixed([Arc::new(Endpoint::new(&origin, address, now))]);
        let whereabouts = match &origin.host {
            Host::Ip(address) => fixed(Address::Tcp(*address)),
            Host::Unix(path) => fixed(Address::Unix(path.clone())),
            Host::Name(..) => Whereabouts::Resolved(ArcSwap::default()),
        };
        Self { origin, whereabouts }
    }

    /// The endpoints of the moment.
    pub fn endpoints(&self) -> Endpoints<'_> {
        match &self.whereabouts {
            Whereabouts::Fixed(endpoints) => Endpoints::Fixed(endpoints),
            Whereabouts::Resolved(endpoints) => Endpoints::Resolved(endpoints.load()),
        }
    }

    /// Takes the addresses that the name has now. An endpoint that stays keeps its levels; no address at all
    /// changes nothing, because a resolver's bad moment is no reason to stop; nor does it at an origin that is an
    /// address itself.
    pub fn resolved(&self, addresses: Vec<Address>, now: Instant) {
        let Whereabouts::Resolved(endpoints) = &self.whereabouts else { return };
        if addresses.is_empty() {
            return;
        }
        let before = endpoints.load();
        let kept = |address: &Address| before.iter().find(|endpoint| endpoint.address == *address).cloned();
        let fresh = |address: Address| Arc::new(Endpoint::new(&self.origin, address, now));
        let after = addresses.into_iter().map(|address| kept(&address).unwrap_or_else(|| fresh(address)));
        endpoints.store(Arc::new(after.collect()));
    }
}

/// A hash that is the same in every process (FNV-1a).
pub fn fnv(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3))
}

/// One address behind an origin, and how it is doing.
#[derive(Debug)]
pub struct Endpoint {
    /// The address.
    pub address: Address,
    /// The same as text.
    pub spelt: Box<str>,
    /// What the connector needs to know of it.
    pub target: Target,
    /// Whether failures keep it out.
    pub breaker: Breaker,
    /// How long it worked for whom, where that has a price.
    pub worked: Worked,
    /// What runs on it, in tokens, and how fast it is.
    pub load: Load,
    /// What its engine tells of its KV cache while it works, where anybody listens.
    pub feed: Feed,
    /// Tells it from other endpoints, in every process.
    pub seed: u64,
    seat: OnceLock<Seat>,
    in_flight: AtomicU32,
    healthy: AtomicBool,
    base: Instant,
    /// Milliseconds after `base` at which it joined or last recovered, for the slow start.
    well_since: AtomicU64,
}

impl Endpoint {
    fn new(origin: &Origin, address: Address, now: Instant) -> Self {
        Self {
            target: Target::new(origin, &address),
            spelt: address.to_string().into(),
            seed: fnv(address.to_string().as_bytes()),
            load: Load::default(),
            feed: Feed::default(),
            address,
            breaker: Breaker::new(now),
            worked: Worked::default(),
            seat: OnceLock::new(),
            in_flight: AtomicU32::new(0),
            healthy: AtomicBool::new(true),
            base: now,
            well_since: AtomicU64::new(0),
        }
    }

    /// Requests that run on it now, through this gateway.
    pub fn in_flight(&self) -> u32 {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// Its place in the index of who has read which prompt, taken when first asked for. It has none while all are
    /// taken.
    pub fn seat(&self, prefixes: &Arc<Prefixes>) -> Option<&Seat> {
        if self.seat.get().is_none() {
            // Of two at once one keeps its seat, and the other's is given back.
            let _lost = self.seat.set(prefixes.seat()?);
            self.sizes_seat();
        }
        self.seat.get()
    }

    /// Its seat remembers as much as its engine does, once that has been told: more than nothing, and no more than a
    /// whole index has room for.
    fn sizes_seat(&self) {
        const TOKENS_MIN: u64 = 4096;
        if let Some((seat, cache)) = self.seat.get().zip(self.load.told.cache()) {
            let blocks = Blocks::default().in_tokens(u64::from(cache.tokens).max(TOKENS_MIN));
            seat.holds(blocks.min(CAPACITY as u32));
        }
    }

    /// The place that it has taken, if it has.
    pub fn seated(&self) -> Option<&Seat> {
        self.seat.get()
    }

    /// It told of its load.
    pub fn hears(&self, told: Report, now: Instant) {
        let tells_cache = told.cache.is_some();
        self.load.told.take(told, self.in_flight(), self.load.may_wait(), millis(now));
        if tells_cache {
            self.sizes_seat();
        }
    }

    /// It has nothing any more of what it has read: it was started anew, maybe with another cache.
    pub fn forget_prompts(&self) {
        self.load.told.cache_asked(None);
        if let Some(seat) = self.seat.get() {
            seat.forget();
        }
    }

    /// Counts one request in; it is counted out when the value is dropped.
    pub fn enter(self: &Arc<Self>) -> InFlight {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        InFlight(self.clone())
    }

    /// Whether its health checks are good.
    pub fn healthy(&self) -> bool {
        self.healthy.load(Ordering::Relaxed)
    }

    /// What its health checks found. Returns whether that is news.
    pub fn set_healthy(&self, healthy: bool, now: Instant) -> bool {
        let news = self.healthy.swap(healthy, Ordering::Relaxed) != healthy;
        if news && healthy {
            self.well_since.store(self.at(now), Ordering::Relaxed);
        }
        news
    }

    /// Whether a request may be sent to it.
    pub fn available(&self, now: Instant) -> bool {
        self.healthy() && self.breaker.ready(now)
    }

    /// Its share of its weight while it starts slowly: from a tenth up to 1.
    pub fn warmth(&self, slow_start: Duration, now: Instant) -> f64 {
        if slow_start.is_zero() {
            return 1.0;
        }
        let age = self.at(now).saturating_sub(self.well_since.load(Ordering::Relaxed));
        (age as f64 / slow_start.as_millis() as f64).clamp(0.1, 1.0)
    }

    fn at(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.base).as_millis() as u64
    }
}

/// One request on an endpoint.
#[derive(Debug)]
pub struct InFlight(Arc<Endpoint>);

impl InFlight {
    /// The endpoint that it is on.
    pub fn endpoint(&self) -> &Arc<Endpoint> {
        &self.0
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::super::told::Cache;
    use super::*;

    fn parse(url: &str) -> Result<(Origin, String), String> {
        Origin::parse(url, Http2::Tls)
    }

    #[test]
    fn a_base_url_is_an_origin_and_a_path() {
        let (origin, path) = parse("https://API.example.com/openai/").unwrap();
        assert_eq!((origin.authority().as_str(), path.as_str(), origin.tls), ("api.example.com", "/openai", true));
        let (origin, path) = parse("http://[::1]:8000").unwrap();
        assert_eq!((origin.authority().as_str(), path.as_str()), ("[::1]:8000", ""));
        let (origin, _) = parse("unix:/run/vllm.sock").unwrap();
        assert_eq!(origin.host, Host::Unix("/run/vllm.sock".into()));
    }

    #[test]
    fn what_is_no_base_url_is_told() {
        for (url, told) in [
            ("gpu:8000", "begins with http://"),
            ("ftp://x", "begins with http://"),
            ("http://user:pass@x", "no user or password"),
            ("http://x/?a=1", "no query"),
            ("unix:run", "absolute"),
            ("http://", "URL"),
        ] {
            let error = parse(url).unwrap_err();
            assert!(error.contains(told), "{url}: {error}");
            assert!(!error.contains("pass@"), "a password is never repeated");
        }
    }

    #[test]
    fn an_endpoint_that_stays_keeps_its_levels() {
        let (origin, _) = parse("http://pods:80").unwrap();
        let now = Instant::now();
        let state = OriginState::new(origin, now);
        assert!(state.endpoints().is_empty());
        let address = |last| Address::Tcp(SocketAddr::from(([127, 0, 0, last], 80)));
        state.resolved(vec![address(1), address(2)], now);
        let busy = state.endpoints()[1].clone();
        let _request = busy.enter();
        state.resolved(vec![address(2), address(3)], now);
        assert_eq!(state.endpoints()[0].in_flight(), 1);
        state.resolved(Vec::new(), now);
        assert_eq!(state.endpoints().len(), 2);
    }

    #[test]
    fn an_endpoint_keeps_its_seat_as_long_as_it_is_resolved() {
        let (origin, _) = parse("http://pods:80").unwrap();
        let (now, prefixes) = (Instant::now(), Arc::new(Prefixes::new(7, 0)));
        let state = OriginState::new(origin, now);
        let address = |last| Address::Tcp(SocketAddr::from(([127, 0, 0, last], 80)));
        let number = |place: usize| state.endpoints()[place].seat(&prefixes).map(Seat::number);
        state.resolved(vec![address(1), address(2)], now);
        assert_eq!([number(0), number(1)], [Some(0), Some(1)]);
        state.resolved(vec![address(3), address(2)], now);
        assert_eq!([number(0), number(1)], [Some(2), Some(1)]);
        assert!(prefixes.is_untidy(), "what the one that went had read is to be forgotten");
    }

    #[test]
    fn a_seat_remembers_as_much_as_its_engine_does_whenever_that_is_told() {
        let (now, prefixes) = (Instant::now(), Arc::new(Prefixes::new(1 << 10, 0)));
        let tells = |tokens| Report { cache: Some(Cache { block: 16, tokens }), ..Report::default() };
        let endpoint = || Endpoint::new(&parse("http://127.0.0.1:1").unwrap().0, Address::Unix("/x".into()), now);
        let (before, after) = (endpoint(), endpoint());
        before.hears(tells(128_000), now);
        assert_eq!(before.seat(&prefixes).map(Seat::room), Some(2_000));
        assert_eq!(after.seat(&prefixes).map(Seat::room), Some(31_250), "before anything was told");
        for (tokens, blocks) in [(64_000, 1_000), (1 << 10, 64), (1 << 30, CAPACITY as u32)] {
            after.hears(tells(tokens), now);
            assert_eq!(after.seated().map(Seat::room), Some(blocks), "{tokens}");
        }
    }

    #[test]
    fn a_recovered_endpoint_starts_slowly() {
        let now = Instant::now();
        let endpoint = Endpoint::new(&parse("http://127.0.0.1:1").unwrap().0, Address::Unix("/x".into()), now);
        assert!(endpoint.set_healthy(false, now) && !endpoint.available(now));
        assert!(endpoint.set_healthy(true, now));
        let slow = Duration::from_secs(10);
        assert_eq!(endpoint.warmth(slow, now), 0.1);
        assert_eq!(endpoint.warmth(slow, now + slow / 2), 0.5);
        assert_eq!(endpoint.warmth(slow, now + slow * 2), 1.0);
    }
}
