//! What an engine tells of its KV cache while it works: blocks stored, blocks evicted, all of it cleared.
//!
//! vLLM and SGLang publish this over ZeroMQ (`vllm/distributed/kv_events.py`, `sglang/srt/disaggregation/kv_events.py`):
//! batches in a numbered sequence. Their blocks are named by hashes of tokens, and the tokens of a prompt are not known
//! without its model's tokenizer: which of a prompt's blocks an engine holds cannot be told from them. What can is how
//! much it has evicted, and that it has lost everything. That takes the place of the guess at when an engine forgets.
//!
//! A batch that is missing, or cannot be read, ends that: the guess is in force again until a hundred came in a row.
//! So it is where an engine works and tells nothing ([`Seat::is_followed`](super::prefix::Seat::is_followed)).

mod events;
mod wire;

use std::io;
use std::net::SocketAddr;
use std::sync::Weak;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use rustix::net::sockopt;
use tokio::net::TcpStream;

use self::events::Event;
use self::wire::{Subscription, numbered};
use super::origin::{Address, Endpoint};
use super::prefix::Blocks;

/// What an endpoint's engine has told in events so far.
#[derive(Debug, Default)]
pub struct Feed {
    batches: AtomicU64,
    gaps: AtomicU64,
    stored: AtomicU64,
    removed: AtomicU64,
}

/// The same as numbers: batches, gaps in their sequence, blocks stored and evicted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Heard {
    /// Batches that came.
    pub batches: u64,
    /// How often some were missing or could not be read.
    pub gaps: u64,
    /// Blocks stored, of the engine's size.
    pub stored: u64,
    /// Blocks evicted.
    pub removed: u64,
}

impl Feed {
    /// What was heard; `None` if nothing was.
    pub fn heard(&self) -> Option<Heard> {
        let [batches, gaps, stored, removed] =
            [&self.batches, &self.gaps, &self.stored, &self.removed].map(|counter| counter.load(Relaxed));
        (batches + gaps > 0).then_some(Heard { batches, gaps, stored, removed })
    }
}

/// The bounds of the pause before an engine is connected to again.
const AGAIN: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(30));
/// How long it may take until an engine is connected to and says who it is.
const CONNECT: Duration = Duration::from_secs(5);

/// How long an engine may tell nothing until the system asks whether its host is still there, how often it asks, and how
/// often in vain: one that vanished says no goodbye.
const SILENCE: (Duration, Duration, u32) = (Duration::from_secs(60), Duration::from_secs(10), 3);

/// Listens at `port` of the endpoint's address, until the endpoint is gone.
pub async fn follow(endpoint: Weak<Endpoint>, port: u16) {
    let (mut sequence, mut pause) = (Sequence::default(), AGAIN.0);
    while let Some(address) = endpoint.upgrade().and_then(|endpoint| tcp(&endpoint.address, port)) {
        let before = sequence.next;
        let end = listen(&endpoint, address, &mut sequence).await;
        tracing::debug!(%address, ?end, "no KV events");
        pause = if sequence.next == before { (pause * 2).min(AGAIN.1) } else { AGAIN.0 };
        tokio::time::sleep(pause.mul_f64(0.8 + 0.4 * fastrand::f64())).await;
    }
}

fn tcp(address: &Address, port: u16) -> Option<SocketAddr> {
    match address {
        Address::Tcp(address) => Some(SocketAddr::new(address.ip(), port)),
        Address::Unix(_) => None,
    }
}

async fn listen(endpoint: &Weak<Endpoint>, address: SocketAddr, sequence: &mut Sequence) -> io::Result<()> {
    let connected = async { Subscription::open(connect(address).await?).await };
    let mut subscription = tokio::time::timeout(CONNECT, connected).await??;
    loop {
        let message = subscription.next().await?;
        let Some(endpoint) = endpoint.upgrade() else { return Ok(()) };
        match numbered(message) {
            Some((number, batch)) => endpoint.follows(sequence.step(number), batch),
            None => endpoint.follows(sequence.lose(), &[]),
        }
    }
}

/// A connection that ends when the engine's host is gone.
async fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(address).await?;
    let (idle, every, times) = SILENCE;
    sockopt::set_socket_keepalive(&stream, true)?;
    sockopt::set_tcp_keepidle(&stream, idle)?;
    sockopt::set_tcp_keepintvl(&stream, every)?;
    sockopt::set_tcp_keepcnt(&stream, times)?;
    Ok(stream)
}

/// How far a sequence of batches has come.
#[derive(Debug, Default)]
struct Sequence {
    /// The number of the batch that is to come; `None` before the first.
    next: Option<u64>,
    /// So many must come in a row until nothing counts as missing.
    distrusted: u32,
}

/// After a gap, so many batches must come in a row.
const IN_A_ROW: u32 = 100;

/// What a batch's number says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// Nothing is missing.
    Next,
    /// Nothing is missing since a gap, but that is not long ago.
    Distrusted,
    /// Some batches are missing.
    Gap,
    /// The engine counts anew: it was started anew.
    Restart,
}

impl Sequence {
    fn step(&mut self, number: u64) -> Step {
        let expected = self.next.replace(number.wrapping_add(1)).unwrap_or(number);
        if number < expected {
            self.distrusted = 0;
            return Step::Restart;
        }
        if number > expected {
            self.distrusted = IN_A_ROW;
            return Step::Gap;
        }
        self.distrusted = self.distrusted.saturating_sub(1);
        if self.distrusted == 0 { Step::Next } else { Step::Distrusted }
    }

    /// What came could not be read, number and all.
    fn lose(&mut self) -> Step {
        self.distrusted = IN_A_ROW;
        Step::Gap
    }
}

/// What a block has where an engine has not told its size.
const BLOCK_TOKENS: u32 = 16;

impl Endpoint {
    /// Its engine told a batch of events.
    fn follows(&self, step: Step, batch: &[u8]) {
        self.feed.batches.fetch_add(1, Relaxed);
        if step == Step::Restart {
            self.forget_prompts();
        }
        let mut evicted = 0_u64;
        let is_whole = events::read(batch, |event| match event {
            Event::Stored(blocks) => drop(self.feed.stored.fetch_add(blocks, Relaxed)),
            Event::Removed(blocks) => evicted += blocks,
            Event::Cleared => {
                evicted = 0;
                self.forget_prompts();
            }
        });
        self.feed.removed.fetch_add(evicted, Relaxed);
        if !is_whole || step == Step::Gap {
            self.feed.gaps.fetch_add(1, Relaxed);
        }
        let Some(seat) = self.seated() else { return };
        seat.follow(is_whole && matches!(step, Step::Next | Step::Restart));
        if !is_whole || step == Step::Gap {
            seat.missed();
        }
        let block = self.load.told.cache().map_or(BLOCK_TOKENS, |cache| cache.block);
        seat.evicted(Blocks::default().in_tokens(evicted.saturating_mul(u64::from(block))));
    }
}

#[cfg(test)]
mod tests;
