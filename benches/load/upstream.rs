//! A fake model server that costs next to nothing: hand-written HTTP/1.1 with fixed answers.
//!
//! `POST` anything: one chat completion, or a stream if `x-load-events` is there (that many
//! chunks, `x-load-interval-us` apart) or the body says `"stream":true`. `GET /health` and
//! `GET /v1/models` answer 200; `GET /metrics` is empty, or a lie. It is a collector of traces too: `POST /v1/traces` is counted,
//! `GET /v1/traces` says how often.

use crate::wire::{self, Head, Wire};
use crate::{Failure, on_one_thread};
use bytes::Bytes;
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;

/// Options of `load upstream`.
#[derive(clap::Args)]
pub struct Options {
    /// The address to listen on
    #[arg(long, default_value = "127.0.0.1:8000")]
    listen: SocketAddr,
    /// What it claims of itself in /metrics, whatever it does
    #[arg(long, value_enum)]
    claims: Option<Claim>,
}

/// A lie.
#[derive(Clone, Copy, clap::ValueEnum)]
pub enum Claim {
    /// Nothing runs, nothing waits, the cache is empty
    Idle,
    /// A thousand wait and the cache is full
    Full,
}

impl Claim {
    /// The page, in vLLM's names.
    fn page(self) -> String {
        let (requests, cache) = match self {
            Self::Idle => (0, 0),
            Self::Full => (1000, 1),
        };
        ["num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"]
            .iter()
            .zip([requests, requests, cache])
            .map(|(name, value)| format!("vllm:{name}{{engine=\"0\",model_name=\"load-model\"}} {value}.0\n"))
            .collect()
    }
}

/// Runs the fake model server until it is killed.
pub fn command(options: &Options) -> Result<ExitCode, Failure> {
    let (pacer, claims) = (Pacer::start()?, options.claims);
    on_one_thread(async {
        let listener = TcpListener::bind(options.listen).await?;
        loop {
            let (socket, _) = listener.accept().await?;
            tokio::spawn(serve(socket, Arc::clone(&pacer), claims));
        }
    })
}

/// A peer that leaves is nothing to report: the client counts what it missed.
async fn serve(socket: TcpStream, pacer: Arc<Pacer>, claims: Option<Claim>) -> Result<(), Failure> {
    let mut wire = Wire::new(socket)?;
    let mut body = Vec::new();
    while let Some(head) = wire.head().await? {
        body.clear();
        wire.body(head.framing(), |piece| body.extend_from_slice(piece)).await?;
        match Stream::asked(&head, &body) {
            Some(stream) => stream.answer(&mut wire, &pacer).await?,
            None => wire.socket.write_all(&reply(&head, claims)).await?,
        }
        if head.closes() {
            break;
        }
    }
    Ok(())
}

/// Batches of spans that came so far.
static BATCHES: AtomicU64 = AtomicU64::new(0);

/// Asks a fake server how many batches of spans it got.
pub async fn batches(server: SocketAddr) -> Result<u64, Failure> {
    Ok(wire::get(server, "/v1/traces").await?.parse()?)
}

fn reply(head: &Head, claims: Option<Claim>) -> Vec<u8> {
    let (counted, claimed);
    let body = match (head.word(0), head.word(1)) {
        ("GET", "/health") => "",
        ("GET", "/v1/models") => MODELS,
        ("GET", "/metrics") => {
            claimed = claims.map(Claim::page).unwrap_or_default();
            &claimed
        }
        ("GET", "/v1/traces") => {
            counted = BATCHES.load(Ordering::Relaxed).to_string();
            &counted
        }
        // An empty answer says that all spans were taken.
        ("POST", "/v1/traces") => {
            BATCHES.fetch_add(1, Ordering::Relaxed);
            ""
        }
        _ => COMPLETION,
    };
    format!(
        "HTTP/1.1 200 OK\r\ndate: Sat, 22 Nov 2025 10:00:00 GMT\r\nserver: uvicorn\r\ncontent-length: {}\r\ncontent-type: application/json\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}

/// What a streamed answer consists of.
struct Stream {
    events: u64,
    interval: Duration,
}

impl Stream {
    fn asked(head: &Head, body: &[u8]) -> Option<Self> {
        let events = head
            .number("x-load-events")
            .or_else(|| memchr::memmem::find(body, b"\"stream\":true").map(|_| DEFAULT_STREAM_EVENTS))?;
        let interval = Duration::from_micros(head.number("x-load-interval-us").unwrap_or(0));
        Some(Self { events, interval })
    }

    /// Every event is its own chunk and its own write, as model servers do it.
    async fn answer(&self, wire: &mut Wire, pacer: &Arc<Pacer>) -> Result<(), Failure> {
        let event = chunk(EVENT);
        wire.socket.write_all(STREAM_HEAD.as_bytes()).await?;
        let mut due = Instant::now();
        for number in 0..self.events {
            if number > 0 && !self.interval.is_zero() {
                due += self.interval;
                tokio::select! {
                    () = pacer.sleep_until(due) => {}
                    _ = wire.closed() => return Err("the peer left".into()),
                }
            }
            wire.socket.write_all(&event).await?;
        }
        wire.socket.write_all(&chunk(USAGE)).await?;
        wire.socket.write_all(&chunk("data: [DONE]\n\n")).await?;
        Ok(wire.socket.write_all(b"0\r\n\r\n").await?)
    }
}

fn chunk(text: &str) -> Bytes {
    format!("{:x}\r\n{text}\r\n", text.len()).into()
}

/// Wakes streams at the microsecond: Tokio's own timer has a grain of a millisecond, so that
/// events of many streams would leave in bunches and a proxy's cost of an event would look smaller.
struct Pacer {
    due: Mutex<BinaryHeap<Reverse<Alarm>>>,
    thread: Thread,
}

struct Alarm {
    at: Instant,
    wake: Arc<Notify>,
}

impl Pacer {
    fn start() -> Result<Arc<Self>, Failure> {
        let (send, receive) = std::sync::mpsc::sync_channel::<Arc<Self>>(1);
        let running =
            thread::Builder::new().name("pacer".into()).spawn(move || receive.recv().map(|pacer| pacer.run()))?;
        let pacer = Arc::new(Self { due: Mutex::default(), thread: running.thread().clone() });
        send.send(Arc::clone(&pacer))?;
        Ok(pacer)
    }

    async fn sleep_until(&self, at: Instant) {
        let wake = Arc::new(Notify::new());
        let alarm = Alarm { at, wake: Arc::clone(&wake) };
        let is_first = {
            let mut due = self.alarms();
            let is_first = due.peek().is_none_or(|Reverse(first)| at < first.at);
            due.push(Reverse(alarm));
            is_first
        };
        if is_first {
            self.thread.unpark();
        }
        wake.notified().await;
    }

    fn run(&self) {
        loop {
            match self.ring() {
                Some(next) => thread::park_timeout(next),
                None => thread::park(),
            }
        }
    }

    /// Wakes what is due and says how long the rest can wait.
    fn ring(&self) -> Option<Duration> {
        let mut due = self.alarms();
        let now = Instant::now();
        while due.peek().is_some_and(|Reverse(first)| first.at <= now) {
            if let Some(Reverse(alarm)) = due.pop() {
                alarm.wake.notify_one();
            }
        }
        due.peek().map(|Reverse(first)| first.at - now)
    }

    fn alarms(&self) -> MutexGuard<'_, BinaryHeap<Reverse<Alarm>>> {
        self.due.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ord for Alarm {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.at.cmp(&other.at)
    }
}

impl PartialOrd for Alarm {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Alarm {
    fn eq(&self, other: &Self) -> bool {
        self.at == other.at
    }
}

impl Eq for Alarm {}

/// Data events of a stream beyond its chunks: the usage and the end.
pub const EVENTS_AROUND: u64 = 2;

const DEFAULT_STREAM_EVENTS: u64 = 100;

const STREAM_HEAD: &str = "HTTP/1.1 200 OK\r\ndate: Sat, 22 Nov 2025 10:00:00 GMT\r\nserver: uvicorn\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n";

const EVENT: &str = "data: {\"id\":\"chatcmpl-7f3a5b0e9c2d4e61\",\"object\":\"chat.completion.chunk\",\"created\":1763805600,\"model\":\"load-model\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\" token\"},\"logprobs\":null,\"finish_reason\":null}]}\n\n";

const USAGE: &str = "data: {\"id\":\"chatcmpl-7f3a5b0e9c2d4e61\",\"object\":\"chat.completion.chunk\",\"created\":1763805600,\"model\":\"load-model\",\"choices\":[],\"usage\":{\"prompt_tokens\":211,\"total_tokens\":311,\"completion_tokens\":100}}\n\n";

const MODELS: &str = "{\"object\":\"list\",\"data\":[{\"id\":\"load-model\",\"object\":\"model\",\"created\":1763805600,\"owned_by\":\"load\"}]}";

/// The answer to every request that does not stream.
pub const COMPLETION: &str = "{\"id\":\"chatcmpl-7f3a5b0e9c2d4e61\",\"object\":\"chat.completion\",\"created\":1763805600,\"model\":\"load-model\",\"choices\":[{\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":\"The harbour was quiet that morning; the boats had gone out before the light, and only the keeper of the weather station noticed that the wind had turned. He wrote it down, as he wrote down everything, and went back to his tea.\",\"refusal\":null,\"tool_calls\":[]},\"logprobs\":null,\"finish_reason\":\"stop\",\"stop_reason\":null}],\"usage\":{\"prompt_tokens\":211,\"total_tokens\":260,\"completion_tokens\":49,\"prompt_tokens_details\":null}}";
