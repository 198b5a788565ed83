//! Connections to endpoints: opened by Pingora's connectors, kept by us.
//!
//! Kept HTTP/1 connections lie in a stack at their endpoint: taking one is a pop and a look whether the upstream
//! has closed it meanwhile. (Pingora's own pool starts a task for each kept connection and asks the kernel for
//! its peer at each use.) HTTP/2 connections are shared and stay in Pingora's pool.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures_poll::closed_or_talking;
use parking_lot::Mutex;
use pingora::connectors::http::Connector;
use pingora::connectors::{ConnectorOptions, TransportConnector};
use pingora::protocols::http::client::HttpSession;
use pingora::protocols::http::v2::client::Http2Session;
use pingora::protocols::{ALPN, Stream};
use pingora::upstreams::peer::HttpPeer;

use crate::policy::file::Http2;
use crate::pool::origin::{Address, Origin};
use crate::telemetry::Table;

/// The most of an answer that waits here, on an HTTP/2 connection, for a client that is slow to read.
const STREAM_WINDOW: u32 = 256 << 10;

/// An address that nobody listens on.
const NOWHERE: std::net::SocketAddr =
    std::net::SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED), 0);

/// What is needed to connect to one endpoint, and its kept connections.
pub struct Target {
    peer: HttpPeer,
    kept: Mutex<Vec<Kept>>,
}

struct Kept {
    stream: Stream,
    since: Instant,
    _count: KeptCount,
}

/// Counts one kept connection in all, as long as it lies here.
struct KeptCount(Arc<AtomicUsize>);

impl Drop for KeptCount {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl fmt::Debug for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Target({})", self.peer)
    }
}

impl Target {
    /// The target for one address of an origin.
    pub fn new(origin: &Origin, address: &Address) -> Self {
        let mut peer = match address {
            Address::Tcp(address) => HttpPeer::new(*address, origin.tls, origin.server_name()),
            // A socket file has no SNI and is checked by its permissions. A path too long for a socket becomes an
            // address that nobody listens on; `check` has told the operator before.
            Address::Unix(path) => HttpPeer::new_uds(&path.to_string_lossy(), false, String::new())
                .unwrap_or_else(|_| HttpPeer::new(NOWHERE, false, String::new())),
        };
        peer.options.alpn = match (origin.http2, origin.tls) {
            (Http2::Always, false) => ALPN::H2,
            (Http2::Always | Http2::Tls, true) => ALPN::H2H1,
            (Http2::Never, _) | (Http2::Tls, false) => ALPN::H1,
        };
        peer.options.max_h2_streams = 100;
        // All streams together fit into their connection's window: one slow client cannot stop the others.
        peer.options.h2_stream_window_size = Some(STREAM_WINDOW);
        peer.options.h2_connection_window_size = Some(100 * STREAM_WINDOW);
        peer.options.h2_ping_interval = Some(Duration::from_secs(30));
        Self { peer, kept: Mutex::default() }
    }

    /// Whether HTTP/2 may come out of a connection to it.
    pub fn may_speak_http2(&self) -> bool {
        !matches!(self.peer.options.alpn, ALPN::H1)
    }

    /// Drops the kept connections that have lain longer than `idle` or were closed. Called now and then.
    pub fn sweep(&self, idle: Duration, now: Instant) {
        self.kept.lock().retain_mut(|kept| !kept.stale(idle, now));
    }

    /// A kept connection that still stands.
    fn take(&self, idle: Duration, now: Instant) -> Option<Stream> {
        let mut kept = self.kept.lock();
        while let Some(mut last) = kept.pop() {
            if !last.stale(idle, now) {
                return Some(last.stream);
            }
        }
        None
    }
}

impl Kept {
    fn stale(&mut self, idle: Duration, now: Instant) -> bool {
        now.saturating_duration_since(self.since) >= idle || closed_or_talking(&mut self.stream)
    }
}

mod futures_poll {
    use std::pin::Pin;
    use std::task::{Context, Poll, Waker};

    use tokio::io::{AsyncRead, ReadBuf};

    /// Whether an idle connection was closed, or says something unasked: either way it is not to be used.
    pub(super) fn closed_or_talking(stream: &mut (impl AsyncRead + Unpin + ?Sized)) -> bool {
        let mut byte = [0];
        let mut buffer = ReadBuf::new(&mut byte);
        let mut context = Context::from_waker(Waker::noop());
        !matches!(Pin::new(stream).poll_read(&mut context, &mut buffer), Poll::Pending)
    }
}

/// A connection, ready for one request.
pub enum Connection {
    /// HTTP/1.1; the flag says that it was kept from an earlier request.
    Http1(Stream, bool),
    /// A stream on a shared HTTP/2 connection; the flag says that the connection existed.
    Http2(Box<Http2Session>, bool),
}

/// All connections to all upstreams.
pub struct Connections {
    transport: TransportConnector,
    http: Connector,
    kept: Arc<AtomicUsize>,
    kept_max: usize,
}

impl fmt::Debug for Connections {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Connections({} kept)", self.kept.load(Ordering::Relaxed))
    }
}

impl Connections {
    /// Connections that trust `ca_file`, of which at most `kept_max` are kept.
    pub fn new(ca_file: Option<&std::path::Path>, kept_max: usize) -> Self {
        let mut options = ConnectorOptions::new(kept_max);
        options.ca_file = ca_file.map(|path| path.to_string_lossy().into_owned());
        Self {
            transport: TransportConnector::new(Some(options.clone())),
            http: Connector::new(Some(options)),
            kept: Arc::default(),
            kept_max,
        }
    }

    /// How many HTTP/1 connections are kept.
    pub fn table(&self) -> Table {
        let entries = self.kept.load(Ordering::Relaxed);
        Table { name: "kept_connections", entries, room: Some(self.kept_max) }
    }

    /// A connection to `target`: a kept one that has lain for less than `idle` now, if there is one and the time is
    /// told, or a new one.
    pub async fn connect(&self, target: &Target, idle: Duration, now: Option<Instant>) -> Result<Connection, String> {
        match now.and_then(|now| target.take(idle, now)) {
            Some(stream) => Ok(Connection::Http1(stream, true)),
            // Opening takes a state of many kilobytes (TLS, HTTP/2), which no other request should carry about.
            None => Box::pin(self.open(target)).await,
        }
    }

    async fn open(&self, target: &Target) -> Result<Connection, String> {
        let told = |error: pingora::BError| plain(&error);
        if !target.may_speak_http2() {
            return Ok(Connection::Http1(self.transport.new_stream(&target.peer).await.map_err(told)?, false));
        }
        let (session, reused) = self.http.get_http_session(&target.peer).await.map_err(told)?;
        match session {
            HttpSession::H1(session) => Ok(Connection::Http1(session.into_inner(), false)),
            HttpSession::H2(session) => Ok(Connection::Http2(Box::new(session), reused)),
            HttpSession::Custom(()) => Err("the upstream chose an unknown protocol".to_owned()),
        }
    }

    /// Keeps an HTTP/1 connection that can serve another request.
    pub fn keep(&self, target: &Target, stream: Stream) {
        if self.kept.fetch_add(1, Ordering::Relaxed) >= self.kept_max {
            self.kept.fetch_sub(1, Ordering::Relaxed);
            return;
        }
        let _count = KeptCount(self.kept.clone());
        target.kept.lock().push(Kept { stream, since: Instant::now(), _count });
    }

    /// Gives back a finished stream of a shared HTTP/2 connection.
    pub async fn release(&self, target: &Target, session: Http2Session) {
        let idle = Some(Duration::from_secs(60));
        self.http.release_http_session(HttpSession::H2(session), &target.peer, idle).await;
    }
}

/// A Pingora error as one short sentence: its type, and its innermost cause or else where it happened.
pub(super) fn plain(error: &pingora::Error) -> String {
    // Where a head cannot be parsed the context is the head itself, credentials and all.
    let context = error.context.as_ref().map_or("", |context| context.as_str());
    let context = if context.starts_with("buf:") { "" } else { context };
    let cause = error.cause.as_ref().map(ToString::to_string).unwrap_or_default();
    // An error of Pingora's within one of Pingora's tells the same again, and where.
    let cause = cause.rsplit("cause: ").next().unwrap_or_default().trim();
    let rest = if cause.is_empty() { context } else { cause };
    let kind = error.etype().as_str();
    if rest.is_empty() { kind.to_owned() } else { format!("{kind}: {rest}") }
}
