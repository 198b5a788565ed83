//! Which endpoint has computed the beginning of this prompt before, and how far.
//!
//! An engine keeps the keys and values of what it has read. A prompt that begins as an earlier one did is cheap there
//! and dear everywhere else. So a prompt is cut into blocks (`chain.rs`), each named by a hash of itself and all that is
//! before it; [`Prefixes`] remembers which endpoint has seen which block, and a look-up tells for every endpoint how
//! many blocks, counted from the first, it has.
//!
//! It is a memory of what was sent, not of what engines hold: two generations for each endpoint approximate what an
//! engine of its size forgets, by what it learns or, where it tells that ([`feed`](super::feed)), by what it evicts; and
//! where it tells of which request's blocks it speaks, by which. A wrong guess costs time, never a wrong answer.
//!
//! Bounded: [`SEATS`] endpoints; 82 bytes for each block of the capacity that it is made with, taken when it is made,
//! plus 3 KiB. Nothing is allocated and nothing is locked in a look-up.

mod chain;
mod seats;
mod table;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use parking_lot::Mutex;

use self::chain::Key;
pub use self::chain::{BLOCKS_MAX, Blocks, Chain};
pub use self::seats::SEATS;
use self::seats::{Bits, Seats};
use self::table::Table;

/// Blocks that a process remembers: 32 MiB of distinct prompts at the usual 256 bytes each, in 11 MiB.
pub const CAPACITY: usize = 1 << 17;

/// Looks into the table in one look-up. An answer found by then is exact; what is still open is answered too low.
const PROBES_MAX: usize = 64;

/// What is known of where prompts were read.
#[derive(Debug)]
pub struct Prefixes {
    table: Table,
    seats: Seats,
    /// Counts what was learned: the age of a block is how much was learned since.
    clock: AtomicU32,
    /// Held by the one who tidies.
    tidying: Mutex<()>,
    key: Key,
}

/// An endpoint's place in the index: given back, and what is known of it forgotten, when dropped.
#[derive(Debug)]
pub struct Seat {
    prefixes: Arc<Prefixes>,
    number: u8,
}

/// How many blocks of a chain each seat has, counted from the first.
#[derive(Clone, Debug)]
pub struct Held {
    depths: [u16; SEATS],
    /// The most that any has.
    pub deepest: u16,
}

impl Prefixes {
    /// An index with room for `capacity` blocks. `seed` keys its hashes, so that nobody can aim at another's blocks.
    pub fn new(capacity: usize, seed: u64) -> Self {
        let (table, seats) = (Table::new(capacity), Seats::default());
        Self { table, seats, clock: AtomicU32::new(0), tidying: Mutex::new(()), key: Key::new(seed) }
    }

    /// The chain of a prompt: of `model`, and of what [`Scan::template`](crate::scan::Scan::template) tells of it.
    pub fn chain<'a>(&self, cut: Blocks, model: &str, parts: impl Iterator<Item = (&'static str, &'a [u8])>) -> Chain {
        self.key.chain(cut, model, parts)
    }

    /// A seat for an endpoint. `None` while all are taken: that endpoint is then simply not known.
    pub fn seat(self: &Arc<Self>) -> Option<Seat> {
        let number = self.seats.take().or_else(|| {
            self.tidy();
            self.seats.take()
        })?;
        Some(Seat { prefixes: self.clone(), number })
    }

    /// How far each seat has read what `chain` is of.
    pub fn held(&self, chain: &Chain) -> Held {
        let mut held = Held { depths: [0; SEATS], deepest: 0 };
        let Some(first) = chain.hashes().first() else { return held };
        let known = self.table.holders(*first) & !self.seats.dirty();
        self.search(chain.hashes(), known, &mut held);
        held
    }

    /// Halves what is open, the deeper half first: whoever has a block has all blocks before it.
    fn search(&self, hashes: &[u64], known: Bits, held: &mut Held) {
        let mut open = smallvec::SmallVec::<[Open; 16]>::new();
        open.push(Open { seats: known, at_least: 1, below: hashes.len() as u16 + 1 });
        let mut probes = 0;
        while let Some(Open { seats, at_least, below }) = open.pop() {
            if seats.is_empty() {
                continue;
            }
            if below - at_least == 1 || probes == PROBES_MAX {
                held.put(seats, at_least);
                continue;
            }
            let middle = at_least + (below - at_least) / 2;
            let deeper = seats & self.table.holders(hashes[usize::from(middle) - 1]);
            probes += 1;
            open.push(Open { seats: seats & !deeper, at_least, below: middle });
            open.push(Open { seats: deeper, at_least: middle, below });
        }
    }

    /// The endpoint on `seat` has read what `chain` is of. The last block is learned first, so that a look-up
    /// meanwhile, or whoever evicts, never finds a beginning without what was promised behind it.
    pub fn learn(&self, chain: &Chain, seat: &Seat) {
        let now = self.clock.fetch_add(1, Ordering::Relaxed);
        let blocks = chain.hashes().iter().enumerate().rev();
        let new = blocks.filter(|(depth, hash)| self.table.put(**hash, *depth as u16, seat.number, now)).count();
        self.seats.learned(seat.number, new as u32);
    }

    /// The endpoint on `seat` wrote that many blocks more, answers mostly, and has room for as much less.
    pub fn wrote(&self, seat: &Seat, blocks: u32) {
        self.seats.learned(seat.number, blocks);
    }

    /// The endpoint on `seat` has nothing of what it had: it was started anew, or its cache was emptied.
    pub fn forget(&self, seat: &Seat) {
        self.seats.forget(seat.number);
    }

    /// Whether [`Prefixes::tidy`] has anything to do.
    pub fn is_untidy(&self) -> bool {
        self.seats.turn().is_some()
    }

    /// Takes out what seats have forgotten, and what is two generations old. One pass over the table, some
    /// milliseconds: for whoever watches endpoints, beside the requests.
    pub fn tidy(&self) {
        let Some(_alone) = self.tidying.try_lock() else { return };
        if let Some(turn) = self.seats.turn() {
            self.table.turn(&turn);
            self.seats.turned(&turn);
        }
    }

    /// Blocks that are remembered, and the most that can be. One pass over the table: for whoever asks for metrics.
    pub fn sizes(&self) -> (usize, usize) {
        (self.table.used(), self.table.capacity())
    }
}

/// Seats that have at least so many blocks, and fewer than so many.
struct Open {
    seats: Bits,
    at_least: u16,
    below: u16,
}

impl Held {
    /// How many blocks the endpoint on `seat` has.
    pub fn by(&self, seat: &Seat) -> u16 {
        self.depths[usize::from(seat.number)]
    }

    fn put(&mut self, seats: Bits, depth: u16) {
        seats.for_each(|seat| self.depths[usize::from(seat)] = depth);
        self.deepest = self.deepest.max(depth);
    }
}

impl Seat {
    /// How many blocks the endpoint's engine holds, as far as that is known: its KV cache, in blocks of this index.
    pub fn holds(&self, blocks: u32) {
        self.prefixes.seats.holds(self.number, blocks);
    }

    /// How many blocks it is taken to hold.
    pub fn room(&self) -> u32 {
        self.prefixes.seats.room(self.number)
    }

    /// Whether its engine tells what it evicts from now on. Where it does, that makes blocks old, and not what it learns;
    /// until so much is learned without a word from it that it cannot be so any more.
    pub fn follow(&self, followed: bool) {
        self.prefixes.seats.follow(self.number, followed);
    }

    /// See [`Seat::follow`].
    pub fn is_followed(&self) -> bool {
        self.prefixes.seats.is_followed(self.number)
    }

    /// Its engine told that it has evicted so many blocks of this index's size.
    pub fn evicted(&self, blocks: u32) {
        self.prefixes.seats.evicted(self.number, blocks);
    }

    /// What its engine told did not all come: it may have evicted anything.
    pub fn missed(&self) {
        self.prefixes.seats.missed(self.number);
    }

    /// Its engine holds a block of a prompt: whatever was forgotten of it since is remembered.
    pub fn keeps(&self, block: u64, depth: u16) {
        let now = self.prefixes.clock.load(Ordering::Relaxed);
        self.prefixes.table.put(block, depth, self.number, now);
    }

    /// Its engine does not hold a block of a prompt any more.
    pub fn lacks(&self, block: u64) {
        self.prefixes.table.take(block, self.number);
    }

    /// Whether its blocks got older since this was last asked.
    pub fn is_aged(&self) -> bool {
        self.prefixes.seats.is_aged(self.number)
    }

    /// See [`Prefixes::forget`].
    pub fn forget(&self) {
        self.prefixes.forget(self);
    }

    /// Its number.
    pub fn number(&self) -> u8 {
        self.number
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.prefixes.seats.leave(self.number);
    }
}

#[cfg(test)]
mod tests;
