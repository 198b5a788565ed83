//! What the simulated server remembers of each request, and how it learns that a client left.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use bytes::Bytes;
use http::HeaderMap;
use http::request::Parts;
use parking_lot::Mutex;
use sha2::{Digest, Sha256};

use super::Server;
use super::connection::Line;

/// How many requests are remembered.
const REMEMBERED: usize = 1000;

/// How much of a body is remembered.
const KEPT: usize = 64 * 1024;

/// A request as the server saw it.
#[derive(Clone, Debug)]
pub struct Seen {
    /// Counts from 1 in order of arrival.
    pub id: u64,
    /// GET, POST, ...
    pub method: String,
    /// The path with its query.
    pub path: String,
    /// Whether it came over HTTP/2.
    pub http2: bool,
    /// Its headers.
    pub headers: HeaderMap,
    /// How long its body was.
    pub body_bytes: usize,
    /// SHA-256 of its whole body, in hex.
    pub body_sha256: String,
    /// The first 64 KiB of its body.
    pub body: Bytes,
    /// What became of it.
    pub outcome: Outcome,
    /// How long after its arrival that was; none while it runs.
    pub outcome_after_ms: Option<u64>,
}

/// What became of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Its answer is under way.
    Running,
    /// Its whole answer was handed to the network.
    Completed,
    /// The peer left before the answer was complete.
    Disconnected,
    /// A fault ended it: an error status, a cut, a reset, an error event.
    Faulted,
}

impl Outcome {
    /// The name that `/simulate/seen` uses.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Completed => "completed",
            Self::Disconnected => "disconnected",
            Self::Faulted => "faulted",
        }
    }
}

/// The requests of late.
#[derive(Default)]
pub(super) struct Log(Mutex<VecDeque<Arc<Mutex<Record>>>>);

struct Record {
    seen: Seen,
    arrived: Instant,
}

impl Log {
    pub(super) fn list(&self) -> Vec<Seen> {
        let records: Vec<_> = self.0.lock().iter().cloned().collect();
        records.iter().map(|record| record.lock().read()).collect()
    }

    fn add(&self, record: Arc<Mutex<Record>>) {
        let mut records = self.0.lock();
        if records.len() == REMEMBERED {
            records.pop_front();
        }
        records.push_back(record);
    }
}

impl Record {
    /// A copy. Bodies that were kept whole are hashed only when somebody asks.
    fn read(&mut self) -> Seen {
        if self.seen.body_sha256.is_empty() {
            self.seen.body_sha256 = hex_sha256(&self.seen.body);
        }
        self.seen.clone()
    }
}

fn hex_sha256(bytes: &[u8]) -> String {
    let digest = Sha256::digest(bytes);
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// One request being served. Dropped before it was settled, its peer has left.
pub(super) struct Visit {
    server: Arc<Server>,
    line: Arc<Line>,
    record: Arc<Mutex<Record>>,
    settled: bool,
}

impl Visit {
    pub(super) fn new(server: &Arc<Server>, line: &Arc<Line>, parts: &Parts) -> Self {
        let seen = Seen {
            id: server.visits.fetch_add(1, Relaxed) + 1,
            method: parts.method.to_string(),
            path: parts.uri.path_and_query().map_or("/", |path| path.as_str()).to_owned(),
            http2: parts.version == http::Version::HTTP_2,
            headers: parts.headers.clone(),
            body_bytes: 0,
            body_sha256: String::new(),
            body: Bytes::new(),
            outcome: Outcome::Running,
            outcome_after_ms: None,
        };
        let record = Arc::new(Mutex::new(Record { seen, arrived: Instant::now() }));
        server.seen.add(Arc::clone(&record));
        server.in_flight.fetch_add(1, Relaxed);
        line.begin();
        Self { server: Arc::clone(server), line: Arc::clone(line), record, settled: false }
    }

    /// Remembers the body.
    pub(super) fn body(&self, body: &Bytes) {
        let kept = Bytes::copy_from_slice(&body[..body.len().min(KEPT)]);
        let hash = if body.len() > KEPT { hex_sha256(body) } else { String::new() };
        let mut record = self.record.lock();
        record.seen.body = kept;
        record.seen.body_bytes = body.len();
        record.seen.body_sha256 = hash;
    }

    /// The whole answer was handed to the network.
    pub(super) fn completed(&mut self) {
        self.settle(Outcome::Completed);
    }

    /// A fault ended the exchange.
    pub(super) fn faulted(&mut self) {
        self.settle(Outcome::Faulted);
    }

    pub(super) fn line(&self) -> &Arc<Line> {
        &self.line
    }

    fn settle(&mut self, outcome: Outcome) {
        if std::mem::replace(&mut self.settled, true) {
            return;
        }
        let mut record = self.record.lock();
        record.seen.outcome = outcome;
        record.seen.outcome_after_ms = Some(record.arrived.elapsed().as_millis() as u64);
        drop(record);
        self.server.in_flight.fetch_sub(1, Relaxed);
        self.line.end(self.server.elapsed_ms());
    }
}

impl Drop for Visit {
    fn drop(&mut self) {
        self.settle(Outcome::Disconnected);
    }
}
