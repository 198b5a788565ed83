//! A table of fixed size from a block's hash to the seats that have the block.
//!
//! A hash belongs to one bucket of seven. Whoever writes holds its bucket, for some twenty instructions; whoever finds
//! it held does without. Whoever reads holds nothing: it looks whether the bucket gave an entry to another block
//! meanwhile, and has found nothing then.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

use super::seats::{Bits, Turn};

/// Entries in a bucket: seven hashes and the guard are one line of the processor's cache.
const WAYS: usize = 7;
/// Of the guard: somebody writes.
const HELD: u64 = 1;
/// Of the guard: an entry was given to another block. Odd while that is done.
const GIVEN: u64 = 2;
/// How often a writer asks for a bucket.
const TRIES: usize = 32;

#[derive(Debug)]
pub(super) struct Table {
    buckets: Box<[Bucket]>,
}

#[derive(Debug, Default)]
#[repr(align(64))]
struct Bucket {
    guard: AtomicU64,
    hashes: [AtomicU64; WAYS],
    entries: [Entry; WAYS],
    marks: [Mark; WAYS],
}

/// Who has a block: who read it in this generation, and who in the last.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Entry {
    young: [AtomicU64; 4],
    old: [AtomicU64; 4],
}

/// What tells which block goes first.
#[derive(Debug, Default)]
struct Mark {
    learned: AtomicU32,
    depth: AtomicU32,
}

impl Table {
    pub(super) fn new(capacity: usize) -> Self {
        let buckets = capacity.div_ceil(WAYS).max(1);
        Self { buckets: std::iter::repeat_with(Bucket::default).take(buckets).collect() }
    }

    pub(super) fn capacity(&self) -> usize {
        self.buckets.len() * WAYS
    }

    pub(super) fn used(&self) -> usize {
        let used = |bucket: &Bucket| bucket.hashes.iter().filter(|hash| hash.load(Ordering::Relaxed) != 0).count();
        self.buckets.iter().map(used).sum()
    }

    /// The seats that have the block.
    pub(super) fn holders(&self, hash: u64) -> Bits {
        self.bucket(hash).holders(hash)
    }

    /// Notes that `seat` has the block. Returns whether that is news in its generation.
    pub(super) fn put(&self, hash: u64, depth: u16, seat: u8, now: u32) -> bool {
        let bucket = self.bucket(hash);
        let Some(guard) = bucket.hold() else { return false };
        let (way, guard) = match bucket.way(hash) {
            Some(way) => (way, guard),
            None => bucket.give(hash, depth, guard, now),
        };
        bucket.marks[way].learned.store(now, Ordering::Relaxed);
        let new = bucket.entries[way].put(seat);
        bucket.guard.store(guard, Ordering::Release);
        new
    }

    /// Notes that `seat` has the block no more. While somebody else writes beside it, it stays.
    pub(super) fn take(&self, hash: u64, seat: u8) {
        let bucket = self.bucket(hash);
        let Some(guard) = bucket.hold() else { return };
        if let Some(way) = bucket.way(hash) {
            bucket.entries[way].take(seat);
        }
        bucket.guard.store(guard, Ordering::Release);
    }

    /// Makes young blocks old and takes out what is forgotten.
    pub(super) fn turn(&self, turn: &Turn) {
        for bucket in &self.buckets {
            bucket.turn(turn);
        }
    }

    fn bucket(&self, hash: u64) -> &Bucket {
        // The upper half of a product: as even as a remainder, without the division.
        let place = (u128::from(hash) * self.buckets.len() as u128) >> 64;
        &self.buckets[place as usize]
    }
}

impl Bucket {
    fn holders(&self, hash: u64) -> Bits {
        let before = self.guard.load(Ordering::Acquire);
        let Some(way) = self.way(hash) else { return Bits::default() };
        let holders = self.entries[way].holders();
        fence(Ordering::Acquire);
        let after = self.guard.load(Ordering::Relaxed);
        // The lowest bit may differ: who adds a seat to the block takes nothing from what was read.
        let same = before | HELD == after | HELD && before & GIVEN == 0;
        if same { holders } else { Bits::default() }
    }

    fn way(&self, hash: u64) -> Option<usize> {
        self.hashes.iter().position(|known| known.load(Ordering::Relaxed) == hash)
    }

    /// Takes the guard; returns what it has to be when it is given back.
    fn hold(&self) -> Option<u64> {
        for _ in 0..TRIES {
            let guard = self.guard.load(Ordering::Relaxed);
            let free = guard & HELD == 0;
            let taken = |guard| self.guard.compare_exchange(guard, guard | HELD, Ordering::Acquire, Ordering::Relaxed);
            if free && taken(guard).is_ok() {
                return Some(guard);
            }
            std::hint::spin_loop();
        }
        None
    }

    /// Gives an entry to a new block: a free one, or that of the block that is missed least.
    fn give(&self, hash: u64, depth: u16, guard: u64, now: u32) -> (usize, u64) {
        let way = self.victim(now);
        self.guard.store((guard + GIVEN) | HELD, Ordering::Relaxed);
        fence(Ordering::Release);
        self.hashes[way].store(hash, Ordering::Relaxed);
        self.entries[way].clear();
        self.marks[way].depth.store(u32::from(depth), Ordering::Relaxed);
        (way, guard.wrapping_add(2 * GIVEN))
    }

    /// The block that nobody has, or was learned longest ago; of those learned together, the one furthest behind:
    /// without its end a beginning is of use, and not the other way round.
    fn victim(&self, now: u32) -> usize {
        let missed = |way: &usize| {
            let (mark, entry) = (&self.marks[*way], &self.entries[*way]);
            let age = now.wrapping_sub(mark.learned.load(Ordering::Relaxed));
            (entry.holders().is_empty(), age, mark.depth.load(Ordering::Relaxed))
        };
        (0..WAYS).max_by_key(missed).unwrap_or(0)
    }

    fn turn(&self, turn: &Turn) {
        for (hash, entry) in self.hashes.iter().zip(&self.entries) {
            if hash.load(Ordering::Relaxed) != 0 {
                entry.turn(turn);
            }
        }
    }
}

impl Entry {
    fn holders(&self) -> Bits {
        Bits::load(&self.young).or(Bits::load(&self.old))
    }

    fn put(&self, seat: u8) -> bool {
        let bit = 1 << (seat % 64);
        self.young[usize::from(seat) / 64].fetch_or(bit, Ordering::Relaxed) & bit == 0
    }

    fn take(&self, seat: u8) {
        let (word, bit) = (usize::from(seat) / 64, 1 << (seat % 64));
        self.young[word].fetch_and(!bit, Ordering::Relaxed);
        self.old[word].fetch_and(!bit, Ordering::Relaxed);
    }

    fn clear(&self) {
        for word in self.young.iter().chain(&self.old) {
            word.store(0, Ordering::Relaxed);
        }
    }

    fn turn(&self, turn: &Turn) {
        let off = turn.older.or(turn.clean);
        for (word, off) in off.0.iter().enumerate().filter(|(_, off)| **off != 0) {
            let was = self.young[word].load(Ordering::Relaxed);
            let older = was & turn.older.0[word] & !turn.clean.0[word];
            if was & off != 0 {
                self.young[word].fetch_and(!off, Ordering::Relaxed);
            }
            if self.old[word].load(Ordering::Relaxed) & off != older {
                self.old[word].fetch_and(!off, Ordering::Relaxed);
                self.old[word].fetch_or(older, Ordering::Relaxed);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_held_bucket_is_left_alone_by_writers_and_still_read() {
        let table = Table::new(WAYS);
        assert!(table.put(1, 0, 5, 0));
        let held = table.buckets[0].hold().unwrap();
        assert!(!table.put(1, 0, 6, 1) && !table.put(2, 0, 6, 1));
        assert_eq!((table.holders(1), table.holders(2)), (Bits::of(5), Bits::default()));
        table.buckets[0].guard.store(held, Ordering::Release);
        assert!(table.put(1, 0, 6, 2));
        assert_eq!(table.holders(1), Bits::of(5).or(Bits::of(6)));
    }

    #[test]
    fn an_entry_that_is_being_given_to_another_block_is_not_read() {
        let table = Table::new(WAYS);
        table.put(1, 0, 5, 0);
        let bucket = &table.buckets[0];
        let guard = bucket.hold().unwrap();
        let (way, after) = bucket.give(2, 0, guard, 1);
        bucket.entries[way].put(6);
        assert_eq!((table.holders(1), table.holders(2)), (Bits::default(), Bits::default()));
        bucket.guard.store(after, Ordering::Release);
        assert_eq!((table.holders(1), table.holders(2)), (Bits::of(5), Bits::of(6)));
        assert_ne!(after, guard, "who began to read before knows it");
    }
}
