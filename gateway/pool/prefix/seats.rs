//! The seats of an index: who sits where, how much each may hold, and who is due for the next generation.

use std::ops::{BitAnd, Not};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use parking_lot::Mutex;

/// Endpoints that an index can tell apart.
pub const SEATS: usize = 256;
const WORDS: usize = SEATS / 64;

/// What an engine is taken to hold as long as it has not told: two million tokens in blocks of 64.
const ROOM: u32 = 31_250;

/// A set of seats.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Bits(pub(super) [u64; WORDS]);

impl Bits {
    pub(super) fn of(seat: u8) -> Self {
        let mut bits = Self::default();
        bits.0[usize::from(seat) / 64] = 1 << (seat % 64);
        bits
    }

    pub(super) fn load(words: &[AtomicU64; WORDS]) -> Self {
        Self(std::array::from_fn(|word| words[word].load(Ordering::Relaxed)))
    }

    pub(super) fn is_empty(self) -> bool {
        self.0 == [0; WORDS]
    }

    pub(super) fn or(self, other: Self) -> Self {
        Self(std::array::from_fn(|word| self.0[word] | other.0[word]))
    }

    fn first(self) -> Option<u8> {
        let word = self.0.iter().position(|word| *word != 0)?;
        u8::try_from(word * 64 + self.0[word].trailing_zeros() as usize).ok()
    }

    pub(super) fn for_each(mut self, mut seat: impl FnMut(u8)) {
        while let Some(first) = self.first() {
            seat(first);
            self = self & !Self::of(first);
        }
    }
}

impl BitAnd for Bits {
    type Output = Self;

    fn bitand(self, other: Self) -> Self {
        Self(std::array::from_fn(|word| self.0[word] & other.0[word]))
    }
}

impl Not for Bits {
    type Output = Self;

    fn not(self) -> Self {
        Self(self.0.map(|word| !word))
    }
}

/// What one pass over the table does.
#[derive(Clone, Copy, Debug)]
pub(super) struct Turn {
    /// Seats whose young blocks become old, and whose old ones are forgotten.
    pub(super) older: Bits,
    /// Seats of which everything is forgotten.
    pub(super) clean: Bits,
}

#[derive(Debug)]
pub(super) struct Seats {
    places: Mutex<Places>,
    /// Seats of which the table still says what is not so any more.
    dirty: [AtomicU64; WORDS],
    /// Seats that have learned half of what they hold since they were turned.
    due: [AtomicU64; WORDS],
    levels: Box<[Level]>,
}

#[derive(Debug)]
struct Places {
    free: Bits,
    /// Left, and not yet cleaned.
    left: Bits,
}

#[derive(Debug)]
struct Level {
    /// Blocks that came to the young generation.
    new: AtomicU32,
    /// Blocks that the engine holds.
    room: AtomicU32,
    /// Whether the engine tells what it evicts: then that makes blocks old, and not what it learns.
    followed: AtomicBool,
    /// Blocks learned since it last told anything.
    unheard: AtomicU32,
    /// Whether its blocks got older since somebody asked.
    aged: AtomicBool,
}

/// An engine that has learned so many blocks and told nothing of it does not tell.
const UNHEARD_MAX: u32 = 256;

impl Default for Seats {
    fn default() -> Self {
        let level = || Level {
            new: AtomicU32::new(0),
            room: AtomicU32::new(ROOM),
            followed: AtomicBool::new(false),
            unheard: AtomicU32::new(0),
            aged: AtomicBool::new(false),
        };
        Self {
            places: Mutex::new(Places { free: !Bits::default(), left: Bits::default() }),
            dirty: Default::default(),
            due: Default::default(),
            levels: std::iter::repeat_with(level).take(SEATS).collect(),
        }
    }
}

impl Seats {
    pub(super) fn take(&self) -> Option<u8> {
        let mut places = self.places.lock();
        let seat = places.free.first()?;
        places.free = places.free & !Bits::of(seat);
        self.level(seat).new.store(0, Ordering::Relaxed);
        self.level(seat).room.store(ROOM, Ordering::Relaxed);
        self.follow(seat, false);
        Some(seat)
    }

    /// Whoever sat here is gone; the seat is free again once it is clean.
    pub(super) fn leave(&self, seat: u8) {
        let mut places = self.places.lock();
        places.left = places.left.or(Bits::of(seat));
        self.forget(seat);
    }

    pub(super) fn forget(&self, seat: u8) {
        mark(&self.dirty, seat);
    }

    pub(super) fn dirty(&self) -> Bits {
        Bits::load(&self.dirty)
    }

    pub(super) fn holds(&self, seat: u8, blocks: u32) {
        self.level(seat).room.store(blocks.max(2), Ordering::Relaxed);
    }

    pub(super) fn room(&self, seat: u8) -> u32 {
        self.level(seat).room.load(Ordering::Relaxed)
    }

    pub(super) fn learned(&self, seat: u8, blocks: u32) {
        let level = self.level(seat);
        if !level.followed.load(Ordering::Relaxed) {
            return self.ages(seat, blocks);
        }
        let unheard = level.unheard.fetch_add(blocks, Ordering::Relaxed).saturating_add(blocks);
        if unheard > UNHEARD_MAX {
            self.follow(seat, false);
        }
    }

    /// Whether the engine on `seat` tells what it evicts, as it just has.
    pub(super) fn follow(&self, seat: u8, followed: bool) {
        let level = self.level(seat);
        level.unheard.store(0, Ordering::Relaxed);
        level.followed.store(followed, Ordering::Relaxed);
    }

    pub(super) fn is_followed(&self, seat: u8) -> bool {
        self.level(seat).followed.load(Ordering::Relaxed)
    }

    /// The engine told that it has evicted so many blocks.
    pub(super) fn evicted(&self, seat: u8, blocks: u32) {
        if self.is_followed(seat) {
            self.ages(seat, blocks);
        }
    }

    /// Whether the blocks of `seat` got older since this was last asked.
    pub(super) fn is_aged(&self, seat: u8) -> bool {
        let aged = &self.level(seat).aged;
        aged.load(Ordering::Relaxed) && aged.swap(false, Ordering::Relaxed)
    }

    /// The engine may have evicted anything: what is not read again soon counts as forgotten.
    pub(super) fn missed(&self, seat: u8) {
        self.ages(seat, self.room(seat) / 2);
    }

    fn ages(&self, seat: u8, blocks: u32) {
        let level = self.level(seat);
        let new = level.new.fetch_add(blocks, Ordering::Relaxed).saturating_add(blocks);
        if new >= level.room.load(Ordering::Relaxed) / 2 {
            mark(&self.due, seat);
        }
    }

    /// What the next pass over the table has to do.
    pub(super) fn turn(&self) -> Option<Turn> {
        let (older, clean) = (Bits::load(&self.due), self.dirty());
        (!older.or(clean).is_empty()).then_some(Turn { older, clean })
    }

    /// That pass was made.
    pub(super) fn turned(&self, turn: &Turn) {
        let mut places = self.places.lock();
        let freed = places.left & turn.clean;
        places.free = places.free.or(freed);
        places.left = places.left & !freed;
        turn.older.or(turn.clean).for_each(|seat| {
            self.level(seat).new.store(0, Ordering::Relaxed);
            self.level(seat).aged.store(true, Ordering::Relaxed);
        });
        unmark(&self.due, turn.older.or(turn.clean));
        unmark(&self.dirty, turn.clean);
    }

    fn level(&self, seat: u8) -> &Level {
        &self.levels[usize::from(seat)]
    }
}

fn mark(words: &[AtomicU64; WORDS], seat: u8) {
    words[usize::from(seat) / 64].fetch_or(1 << (seat % 64), Ordering::Relaxed);
}

fn unmark(words: &[AtomicU64; WORDS], seats: Bits) {
    for (word, bits) in words.iter().zip(seats.0) {
        word.fetch_and(!bits, Ordering::Relaxed);
    }
}
