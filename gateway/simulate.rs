//! The embedded model server: a believable vLLM for the demo, the tests and the benches.
//!
//! It answers every surface of a model server with made-up but well-formed text, queues like an engine with a
//! few slots, moves the metrics that a router reads, and fails on demand (see [`Fault`]). It knows nothing of the
//! gateway and the gateway knows nothing of it. What it answers says so: its `system_fingerprint` begins with
//! `simulated`.
//!
//! How long an answer is: without a bound it ends by itself after 64 tokens (`stop`); a `max_tokens` is used up
//! (`length`). `/v1/messages`, where the bound is mandatory, ends after 64 tokens unless `ignore_eos` is set.
//!
//! Two paths exist on no real server: `GET /simulate/seen` lists the requests of late, `POST /simulate/faults`
//! with `{"faults": ["status=503,times=2"]}` sets what goes wrong from now on.

mod answer;
mod audio;
mod chat;
mod completions;
mod connection;
mod draft;
mod embeddings;
mod encoding;
mod engine;
mod events;
mod fault;
mod images;
mod input;
mod listing;
mod messages;
mod metrics;
mod options;
mod responses;
mod routes;
mod schema;
mod socket;
#[cfg(test)]
mod tests;
mod tgi;
mod tokens;
mod visit;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicU64, AtomicUsize};
use std::time::Instant;

use parking_lot::{Mutex, RwLock};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;

pub use fault::Fault;
pub use options::{Engine, Options};
pub use visit::{Outcome, Seen};

/// A running model server. Dropping it stops it at once: all connections are cut.
#[derive(Debug)]
pub struct Simulated {
    server: Arc<Server>,
    address: SocketAddr,
    accepting: JoinHandle<()>,
}

impl Simulated {
    /// Binds, and serves on the current runtime.
    pub async fn start(options: Options) -> io::Result<Self> {
        let listener = TcpListener::bind(options.listen).await?;
        let address = listener.local_addr()?;
        let server = Arc::new(Server::new(options));
        let accepting = tokio::spawn(connection::accept(Arc::clone(&server), listener));
        Ok(Self { server, address, accepting })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The same as a URL.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The last 1,000 requests in order of arrival.
    pub fn seen(&self) -> Vec<Seen> {
        self.server.seen.list()
    }

    /// Replaces the faults for later requests.
    pub fn set_faults(&self, faults: Vec<Fault>) {
        self.server.set_faults(faults);
    }

    /// Connections that are open now.
    pub fn open_connections(&self) -> usize {
        self.server.open.load(Relaxed)
    }

    /// Requests that arrived and are not over.
    pub fn in_flight(&self) -> usize {
        self.server.in_flight.load(Relaxed)
    }

    /// Runs until cancelled.
    pub async fn stopped(mut self) {
        // An error can only mean that the accepting task ended, which is what is awaited.
        let _ = (&mut self.accepting).await;
    }

    /// Stops, and returns when the port is free.
    pub async fn stop(mut self) {
        self.accepting.abort();
        let _ = (&mut self.accepting).await;
    }
}

impl Drop for Simulated {
    fn drop(&mut self) {
        self.accepting.abort();
        self.server.stop.send_replace(true);
    }
}

/// What all connections share.
struct Server {
    options: Options,
    engine: Arc<engine::Engine>,
    faults: RwLock<Arc<fault::Faults>>,
    seen: visit::Log,
    started: Instant,
    open: AtomicUsize,
    in_flight: AtomicUsize,
    visits: AtomicU64,
    stop: watch::Sender<bool>,
    date: Mutex<answer::Date>,
}

impl std::fmt::Debug for Server {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Server").field("options", &self.options).finish_non_exhaustive()
    }
}

impl Server {
    fn new(mut options: Options) -> Self {
        let faults = fault::Faults::new(std::mem::take(&mut options.faults));
        Self {
            engine: Arc::new(engine::Engine::new(&options)),
            options,
            faults: RwLock::new(Arc::new(faults)),
            seen: visit::Log::default(),
            started: Instant::now(),
            open: AtomicUsize::new(0),
            in_flight: AtomicUsize::new(0),
            visits: AtomicU64::new(0),
            stop: watch::Sender::new(false),
            date: Mutex::new(answer::Date::default()),
        }
    }

    fn set_faults(&self, faults: Vec<Fault>) {
        *self.faults.write() = Arc::new(fault::Faults::new(faults));
    }

    fn elapsed_ms(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }
}
