//! The closed-loop client: every connection sends its next request when the answer to the last
//! one is complete and has been checked.

use crate::prompt::{self, Turns};
use crate::wire::{Head, Wire};
use crate::{Failure, h2c, on_one_thread, upstream};
use bytes::Bytes;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::task::JoinSet;

/// Options of `load client`.
#[derive(clap::Args)]
pub struct Options {
    /// The server to load
    #[arg(long, default_value = "127.0.0.1:8000")]
    target: SocketAddr,
    /// Connections, each with one request at a time (with --h2: streams, eight a connection)
    #[arg(long, default_value_t = 32)]
    connections: usize,
    /// Requests in all
    #[arg(long, default_value_t = 10_000)]
    requests: u64,
    /// Bytes of each request body
    #[arg(long, default_value_t = 1024)]
    bytes: usize,
    /// Write the body as a conversation of many messages
    #[arg(long)]
    many_turns: bool,
    /// Stream answers of so many chunks
    #[arg(long)]
    events: Option<u64>,
    /// Microseconds between two chunks of a stream; 0: as fast as they go
    #[arg(long, default_value_t = 0)]
    interval_us: u64,
    /// Open a new connection for each request
    #[arg(long, conflicts_with = "h2")]
    fresh: bool,
    /// Speak HTTP/2 without TLS
    #[arg(long, conflicts_with = "events")]
    h2: bool,
}

/// Runs the client alone and prints what it saw.
pub fn command(options: &Options) -> Result<ExitCode, Failure> {
    let load = Load {
        connections: options.connections,
        bytes: options.bytes,
        turns: match options.many_turns {
            true => Turns::Many,
            false => Turns::One,
        },
        answer: match options.events {
            None => Answer::Whole,
            Some(events) => Answer::Stream { events, interval: Duration::from_micros(options.interval_us) },
        },
        transport: match (options.fresh, options.h2) {
            (_, true) => Transport::Http2,
            (true, _) => Transport::Fresh,
            _ => Transport::Kept,
        },
        apart: false,
    };
    let seen = on_one_thread(Client::new(load, options.target).run(Stop::after(options.requests)))?;
    print!("{seen}");
    Ok(match seen.errors {
        0 => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    })
}

/// What to send, how, and how much of it at once.
#[derive(Clone, Copy)]
pub struct Load {
    /// Exchanges at the same time.
    pub connections: usize,
    /// Size of a request body.
    pub bytes: usize,
    /// How the text in it is laid out.
    pub turns: Turns,
    /// What is asked for.
    pub answer: Answer,
    /// What carries it.
    pub transport: Transport,
    /// Whether each connection's prompt begins like no other's.
    pub apart: bool,
}

/// What is asked for, and what has to come.
#[derive(Clone, Copy)]
pub enum Answer {
    /// One JSON document.
    Whole,
    /// So many chunks, so far apart, then the usage and the end.
    Stream {
        /// Chunks of the answer.
        events: u64,
        /// From one to the next; zero is as fast as they go.
        interval: Duration,
    },
}

/// What carries the requests.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// HTTP/1.1 connections that are kept.
    Kept,
    /// A new HTTP/1.1 connection for each request.
    Fresh,
    /// HTTP/2 without TLS, eight streams a connection.
    Http2,
}

/// A load on one target. Its connections stay open from one run to the next, so that runs can be
/// short and nobody pays for opening them.
pub struct Client {
    load: Load,
    target: SocketAddr,
    /// More header lines of every request.
    header_lines: String,
    /// Whether the target may write answers anew: then only what they say is compared.
    rewrites: bool,
    kept: Vec<Wire>,
    kept_h2: Vec<h2c::Sender>,
}

impl Client {
    /// Nothing is opened before the first run.
    pub fn new(load: Load, target: SocketAddr) -> Self {
        Self { load, target, header_lines: String::new(), rewrites: false, kept: Vec::new(), kept_h2: Vec::new() }
    }

    /// The same, for a target that wants more header lines, or writes answers anew.
    pub fn minding(self, header_lines: String, rewrites: bool) -> Self {
        Self { header_lines, rewrites, ..self }
    }

    /// Loads the target until `stop` and says what came back.
    pub async fn run(&mut self, stop: Stop) -> Result<Seen, Failure> {
        let began = Instant::now();
        let stop = Arc::new(stop);
        let ended = tokio::time::timeout(PATIENCE, async {
            match self.load.transport {
                Transport::Http2 => h2c::run(&mut self.kept_h2, self.load, self.target, &stop).await,
                _ => self.run_h1(&stop).await,
            }
        });
        let mut seen = ended.await.map_err(|_| format!("no end of the answers in {PATIENCE:?}"))??;
        seen.wall = began.elapsed();
        Ok(seen)
    }

    async fn run_h1(&mut self, stop: &Arc<Stop>) -> Result<Seen, Failure> {
        let (body, lines) = (self.load.body(), self.load.header_lines() + &self.header_lines);
        let request = prompt::request(&body, &lines);
        let mut running = JoinSet::new();
        for number in 0..self.load.connections {
            let request = match self.load.apart {
                true => prompt::request(&prompt::begun_apart(&body, number), &lines),
                false => request.clone(),
            };
            let connection = Connection { load: self.load, request, target: self.target, rewrites: self.rewrites };
            let (kept, delay, stop) = (self.kept.pop(), self.load.delay(number), Arc::clone(stop));
            running.spawn(async move {
                if !delay.is_zero() {
                    tokio::time::sleep(delay).await;
                }
                connection.run(kept, &stop).await
            });
        }
        let mut seen = Seen::default();
        while let Some(part) = running.join_next().await {
            let (part, kept) = part?;
            seen.add(part);
            self.kept.extend(kept);
        }
        Ok(seen)
    }
}

impl Load {
    /// The request's body.
    pub fn body(&self) -> Bytes {
        let streams = matches!(self.answer, Answer::Stream { .. });
        prompt::chat(self.bytes, self.turns, streams)
    }

    fn header_lines(&self) -> String {
        let mut lines = String::new();
        if let Answer::Stream { events, interval } = self.answer {
            let micros = interval.as_micros();
            lines = format!("x-load-events: {events}\r\nx-load-interval-us: {micros}\r\n");
        }
        if self.transport == Transport::Fresh {
            lines.push_str("connection: close\r\n");
        }
        lines
    }

    /// Paced streams begin one after the other within an interval, to be spread evenly over it.
    fn delay(&self, number: usize) -> Duration {
        match self.answer {
            Answer::Stream { interval, .. } if interval < Duration::from_secs(1) => {
                interval.mul_f64(number as f64 / self.connections as f64)
            }
            _ => Duration::ZERO,
        }
    }

    /// Data events that a right answer has.
    fn events_due(&self) -> u64 {
        match self.answer {
            Answer::Whole => 0,
            Answer::Stream { events, .. } => events + upstream::EVENTS_AROUND,
        }
    }

    /// Opens `count` streams and returns their connections as soon as each has had its first event.
    pub async fn hold(self, target: SocketAddr, count: usize) -> Result<Vec<Wire>, Failure> {
        let request = prompt::request(&self.body(), &self.header_lines());
        let mut held = Vec::with_capacity(count);
        while held.len() < count {
            let mut opening = JoinSet::new();
            for _ in 0..(count - held.len()).min(50) {
                opening.spawn(first_event(target, request.clone()));
            }
            while let Some(opened) = opening.join_next().await {
                held.push(opened??);
            }
        }
        Ok(held)
    }
}

const PATIENCE: Duration = Duration::from_secs(120);

/// A connection or stream with so many gives up.
pub const MOST_ERRORS: u64 = 10;

async fn first_event(target: SocketAddr, request: Bytes) -> Result<Wire, Failure> {
    let mut wire = Wire::new(TcpStream::connect(target).await?)?;
    wire.socket.write_all(&request).await?;
    let head = wire.head().await?.ok_or("no answer")?;
    check_status(&mut wire, &head).await?;
    let mut framing = head.framing();
    let mut events = Events::default();
    while events.count == 0 && !framing.is_done() {
        wire.piece(&mut framing, &mut |piece| events.feed(piece)).await?;
    }
    Ok(wire)
}

/// When the connections stop sending.
pub struct Stop {
    requests: AtomicU64,
    deadline: Option<Instant>,
}

impl Stop {
    /// After so many requests.
    pub fn after(requests: u64) -> Self {
        Self { requests: AtomicU64::new(requests), deadline: None }
    }

    /// After so much time; what is under way then is finished.
    pub fn when(passed: Duration) -> Self {
        Self { requests: AtomicU64::new(u64::MAX), deadline: Some(Instant::now() + passed) }
    }

    /// Whether there is one more request to send.
    pub fn one_more(&self) -> bool {
        let in_time = self.deadline.is_none_or(|end| Instant::now() < end);
        let take = |left: u64| left.checked_sub(1);
        in_time && self.requests.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok()
    }
}

struct Connection {
    load: Load,
    request: Bytes,
    target: SocketAddr,
    rewrites: bool,
}

impl Connection {
    async fn run(self, mut kept: Option<Wire>, stop: &Stop) -> (Seen, Option<Wire>) {
        let mut seen = Seen::default();
        // A target that is gone would otherwise be asked for ever.
        while seen.errors < MOST_ERRORS && stop.one_more() {
            match self.exchange(kept.take(), &mut seen).await {
                Ok(wire) => kept = wire,
                Err(failure) => seen.fail(failure),
            }
        }
        (seen, kept)
    }

    /// One request and its answer; returns the connection if it can be used again.
    async fn exchange(&self, kept: Option<Wire>, seen: &mut Seen) -> Result<Option<Wire>, Failure> {
        let began = Instant::now();
        let mut wire = match kept {
            Some(wire) => wire,
            None => Wire::new(TcpStream::connect(self.target).await?)?,
        };
        wire.socket.write_all(&self.request).await?;
        let head = wire.head().await?.ok_or("closed instead of an answer")?;
        check_status(&mut wire, &head).await?;
        match self.load.answer {
            Answer::Whole if self.rewrites => says_the_same(&mut wire, &head).await?,
            Answer::Whole => whole(&mut wire, &head).await?,
            Answer::Stream { .. } => {
                let events = stream(&mut wire, &head, began, seen).await?;
                events.check(self.load.events_due())?;
                seen.events += events.count;
            }
        }
        seen.requests += 1;
        seen.latencies.push(began.elapsed());
        Ok((self.load.transport == Transport::Kept && !head.closes()).then_some(wire))
    }
}

/// An error that says what came instead of a good answer.
pub async fn check_status(wire: &mut Wire, head: &Head) -> Result<(), Failure> {
    let status = head.word(1);
    if status == "200" {
        return Ok(());
    }
    let mut text = Vec::new();
    wire.body(head.framing(), |piece| text.extend_from_slice(piece)).await?;
    text.truncate(500);
    Err(format!("status {status}: {}", String::from_utf8_lossy(&text)).into())
}

async fn whole(wire: &mut Wire, head: &Head) -> Result<(), Failure> {
    let mut left = upstream::COMPLETION.as_bytes();
    let mut is_same = true;
    wire.body(head.framing(), |piece| match left.strip_prefix(piece) {
        Some(rest) => left = rest,
        None => is_same = false,
    })
    .await?;
    match is_same && left.is_empty() {
        true => Ok(()),
        false => Err("the answer is not what the upstream sent".into()),
    }
}

/// Whether an answer that was written anew has the text of the one that was sent.
async fn says_the_same(wire: &mut Wire, head: &Head) -> Result<(), Failure> {
    let mut text = Vec::new();
    wire.body(head.framing(), |piece| text.extend_from_slice(piece)).await?;
    let answer: serde_json::Value = serde_json::from_slice(&text)?;
    let sent: serde_json::Value = serde_json::from_str(upstream::COMPLETION)?;
    let said = "/choices/0/message/content";
    match answer.pointer(said) == sent.pointer(said) {
        true => Ok(()),
        false => Err("the answer does not say what the upstream sent".into()),
    }
}

async fn stream(wire: &mut Wire, head: &Head, began: Instant, seen: &mut Seen) -> Result<Events, Failure> {
    let mut events = Events::default();
    let mut first = None;
    wire.body(head.framing(), |piece| {
        events.feed(piece);
        if events.count > 0 && first.is_none() {
            first = Some(began.elapsed());
        }
    })
    .await?;
    seen.first_events.extend(first);
    Ok(events)
}

/// Counts the `data:` lines of a stream, wherever it is cut, and keeps its last bytes.
#[derive(Default)]
struct Events {
    count: u64,
    in_line: bool,
    end: Vec<u8>,
}

impl Events {
    fn feed(&mut self, mut piece: &[u8]) {
        let tail = piece.len().saturating_sub(END.len());
        self.end.extend_from_slice(&piece[tail..]);
        self.end.drain(..self.end.len().saturating_sub(END.len()));
        while let Some(first) = piece.first() {
            // `d` of `data:`; comments, event names and empty lines are not counted.
            self.count += u64::from(!self.in_line && *first == b'd');
            match memchr::memchr(b'\n', piece) {
                Some(at) => {
                    self.in_line = false;
                    piece = &piece[at + 1..];
                }
                None => {
                    self.in_line = true;
                    return;
                }
            }
        }
    }

    fn check(&self, due: u64) -> Result<(), Failure> {
        if self.end != END {
            return Err("a stream without [DONE] at its end".into());
        }
        match self.count == due {
            true => Ok(()),
            false => Err(format!("a stream of {} events instead of {due}", self.count).into()),
        }
    }
}

const END: &[u8] = b"data: [DONE]\n\n";

/// What came back.
#[derive(Default)]
pub struct Seen {
    /// Right answers.
    pub requests: u64,
    /// Everything else.
    pub errors: u64,
    /// What the first error was.
    pub first_error: Option<String>,
    /// Data events in the right answers.
    pub events: u64,
    /// From beginning to end.
    pub wall: Duration,
    /// From the request's first byte to the answer's last.
    pub latencies: Vec<Duration>,
    /// From the request's first byte to the first data event.
    pub first_events: Vec<Duration>,
}

impl Seen {
    /// Counts an error.
    pub fn fail(&mut self, failure: Failure) {
        self.errors += 1;
        self.first_error.get_or_insert_with(|| failure.to_string());
    }

    /// Takes in what another connection saw.
    pub fn add(&mut self, other: Self) {
        self.requests += other.requests;
        self.errors += other.errors;
        self.first_error = self.first_error.take().or(other.first_error);
        self.events += other.events;
        self.latencies.extend(other.latencies);
        self.first_events.extend(other.first_events);
    }
}

/// The value below which `part` of them lie.
pub fn quantile(values: &mut [Duration], part: f64) -> Duration {
    values.sort_unstable();
    let last = values.len().saturating_sub(1);
    let at = (last as f64 * part).round() as usize;
    values.get(at).copied().unwrap_or_default()
}

impl std::fmt::Display for Seen {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let rate = self.requests as f64 / self.wall.as_secs_f64();
        writeln!(
            out,
            "requests {}  errors {}  wall {:.3} s  {rate:.0} a second",
            self.requests,
            self.errors,
            self.wall.as_secs_f64()
        )?;
        if let Some(error) = &self.first_error {
            writeln!(out, "first error: {error}")?;
        }
        line(out, "latency", &self.latencies)?;
        if self.events > 0 {
            writeln!(out, "events {}", self.events)?;
            line(out, "first event", &self.first_events)?;
        }
        Ok(())
    }
}

fn line(out: &mut std::fmt::Formatter<'_>, name: &str, values: &[Duration]) -> std::fmt::Result {
    let mut values = values.to_vec();
    let [median, tail] = [0.5, 0.99].map(|part| quantile(&mut values, part).as_micros());
    writeln!(out, "{name}: p50 {median} µs  p99 {tail} µs")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_counted_wherever_the_stream_is_cut() {
        let stream = b"data: {\"d\":1}\n\n: ping\n\ndata: {}\n\ndata: [DONE]\n\n";
        for split in 0..stream.len() {
            let mut events = Events::default();
            events.feed(&stream[..split]);
            events.feed(&stream[split..]);
            assert!(events.check(3).is_ok(), "cut at {split}");
        }
    }

    #[test]
    fn the_last_request_ends_the_load() {
        let stop = Stop::after(2);
        assert_eq!([(); 3].map(|()| stop.one_more()), [true, true, false]);
    }
}
