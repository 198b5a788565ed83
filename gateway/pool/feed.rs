//! What an engine tells of its KV cache while it works: blocks stored, blocks evicted, all of it cleared.
//!
//! vLLM and SGLang publish this over ZeroMQ (`vllm/distributed/kv_events.py`, `sglang/srt/disaggregation/kv_events.py`):
//! batches in a numbered sequence. Their blocks are named by hashes of tokens, and the tokens of a prompt are not known
//! without its model's tokenizer. But both tell for which session they stored a block, and a request says which that is
//! ([`KvSession`](crate::policy::file::KvSession)): so it is known which blocks of which prompt an engine holds, and they
//! are forgotten when it evicts them (`feed/known.rs`). What is not known so is forgotten by how much the engine evicts, which
//! takes the place of the guess at that.
//!
//! A batch that is missing, or cannot be read, ends both: the guess is in force again until a hundred came in a row. So it
//! is where an engine works and tells nothing ([`Seat::is_followed`](super::prefix::Seat::is_followed)).

mod events;
mod known;
mod wire;

use std::io;
use std::net::SocketAddr;
use std::sync::Weak;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::net::sockopt;
use tokio::net::TcpStream;

use self::events::Event;
use self::known::{Known, Read};
use self::wire::{Subscription, numbered};
use super::origin::{Address, Endpoint};
use super::prefix::{Blocks, Chain, Seat};

/// The header that gives a request a name which vLLM tells with the blocks that it stores for it.
pub const SESSION: &str = "x-session-id";

/// Prompts of answers that have ended, which wait for what their engine tells of them.
const READ_MAX: usize = 256;
/// How long they wait: an engine tells what it stored before it answers, and that arrives within milliseconds.
const PATIENCE: Duration = Duration::from_secs(1);
/// When an engine has told all that it will tell of an answer.
const ALL_TOLD: Duration = Duration::from_millis(200);

/// What an endpoint's engine has told in events so far.
#[derive(Debug, Default)]
pub struct Feed {
    batches: AtomicU64,
    gaps: AtomicU64,
    stored: AtomicU64,
    removed: AtomicU64,
    known: Mutex<Known>,
    read: Mutex<Vec<(Read, Instant)>>,
}

/// The same as numbers: batches, gaps in their sequence, blocks stored and evicted, and those that are known.
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
    /// Blocks that it holds, as far as they are known.
    pub held: u64,
    /// Blocks of prompts, of the index's size, that are known to be in those.
    pub placed: u64,
}

impl Feed {
    /// What was heard; `None` if nothing was.
    pub fn heard(&self) -> Option<Heard> {
        let [batches, gaps, stored, removed] =
            [&self.batches, &self.gaps, &self.stored, &self.removed].map(|counter| counter.load(Relaxed));
        let (held, placed) = self.known.lock().sizes();
        let [held, placed] = [held, placed].map(|size| size as u64);
        (batches + gaps > 0).then_some(Heard { batches, gaps, stored, removed, held, placed })
    }

    /// Its engine has answered the request `session`, whose prompt is `chain`; both were so many tokens long.
    pub fn read(&self, session: [u8; 36], chain: Chain, (tokens, answer): (u32, u32), now: Instant) {
        let mut read = self.read.lock();
        if read.len() < READ_MAX {
            read.push((Read { session, chain, tokens, answer }, now));
        }
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
            Some((number, batch)) => endpoint.follows(sequence.step(number), batch, Instant::now()),
            None => endpoint.follows(sequence.lose(), &[], Instant::now()),
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
    fn follows(&self, step: Step, batch: &[u8], now: Instant) {
        self.feed.batches.fetch_add(1, Relaxed);
        let mut known = self.feed.known.lock();
        match step {
            Step::Restart => self.has_nothing(&mut known),
            Step::Gap => *known = Known::default(),
            // Before the batch is heard: what is evicted with it was there until now.
            Step::Next | Step::Distrusted => self.places(&mut known, now),
        }
        let (evicted, is_whole) = self.hears_events(&mut known, batch);
        self.feed.removed.fetch_add(evicted, Relaxed);
        if !is_whole {
            *known = Known::default();
        }
        let misses = !is_whole || step == Step::Gap;
        self.feed.gaps.fetch_add(misses.into(), Relaxed);
        let Some(seat) = self.seated() else { return };
        seat.follow(is_whole && matches!(step, Step::Next | Step::Restart));
        if misses {
            seat.missed();
        }
        let block = self.load.told.cache().map_or(BLOCK_TOKENS, |cache| cache.block);
        seat.evicted(Blocks::default().in_tokens(evicted.saturating_mul(u64::from(block))));
        renews(&known, seat);
    }

    /// Finds what was read among what the engine has told by now.
    fn places(&self, known: &mut Known, now: Instant) {
        let Some(seat) = self.seated() else { return };
        let mut waiting = std::mem::take(&mut *self.feed.read.lock());
        waiting.retain(|(read, at)| {
            let waited = now.saturating_duration_since(*at);
            !known.place(read, waited >= ALL_TOLD, |block, depth| seat.keeps(block, depth)) && waited < PATIENCE
        });
        self.feed.read.lock().append(&mut waiting);
    }

    /// Takes in a batch: how many blocks were evicted, and whether it could be read to its end.
    fn hears_events(&self, known: &mut Known, batch: &[u8]) -> (u64, bool) {
        let (seat, mut evicted) = (self.seated(), 0);
        let gone = |hash| seat.into_iter().for_each(|seat| seat.lacks(hash));
        let is_whole = events::read(batch, |event| match event {
            Event::Stored(stored) => {
                self.feed.stored.fetch_add(stored.names.len(), Relaxed);
                // Of a model with several kinds of attention, the first cache is that of all its tokens.
                if stored.names.group == 0 {
                    known.stored(&stored);
                }
            }
            Event::Removed(names) => {
                evicted += names.len();
                if names.group == 0 {
                    known.removed(&names, gone);
                }
            }
            Event::Cleared => {
                evicted = 0;
                self.has_nothing(known);
            }
        });
        (evicted, is_whole)
    }

    /// Its cache is empty.
    fn has_nothing(&self, known: &mut Known) {
        *known = Known::default();
        self.forget_prompts();
    }
}

/// What is known to be held does not get old with what is guessed at.
fn renews(known: &Known, seat: &Seat) {
    if seat.is_aged() {
        known.ours().for_each(|(hash, depth)| seat.keeps(hash, depth));
    }
}

#[cfg(test)]
mod tests;
