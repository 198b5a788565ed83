//! A bit for every place of a text: whether a match may begin there, by the bytes that are near. Sixty-four places are
//! told at once.
//!
//! A set of bytes is two shuffles (Muła's way): the low half of a byte chooses a row of eight bits, the high half one of
//! them. The text is read from its end to its beginning, so that the nearest byte behind a place is always known.

use fearless_simd::prelude::*;
use fearless_simd::{Level, dispatch, u8x16, u8x64};

use super::triggers::ByteSet;

/// A set of bytes. Of those beyond ASCII all are in it or none.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Table {
    rows: [u8; 16],
    beyond: bool,
}

/// So many bytes make a word of bits.
const BLOCK: usize = 64;

/// One bit for each of the high halves that ASCII has.
const BITS: [u8; 16] = [1, 2, 4, 8, 16, 32, 64, 128, 0, 0, 0, 0, 0, 0, 0, 0];

impl Table {
    /// The table of all of a set.
    pub fn new(set: &ByteSet) -> Self {
        let row = |low: u8| (0..8).filter(|high| set.has(high << 4 | low)).fold(0, |row, high| row | 1 << high);
        let beyond = (0x80..=u8::MAX).any(|byte| set.has(byte));
        Self { rows: std::array::from_fn(|low| row(low as u8)), beyond }
    }
}

/// Bytes that are looked up in tables.
struct Block<S: Simd> {
    low: u8x64<S>,
    bit: u8x64<S>,
    beyond: u64,
}

impl<S: Simd> Block<S> {
    #[inline(always)]
    fn new(simd: S, bytes: &[u8; BLOCK]) -> Self {
        let bytes = u8x64::load_array_ref(simd, bytes);
        let bits = u8x64::block_splat(u8x16::load_array(simd, BITS));
        let bit = bits.swizzle_dyn_within_blocks(bytes >> 4);
        Self { low: bytes & 0x0f, bit, beyond: bytes.simd_ge(0x80).to_bitmask() }
    }

    /// Which of them are in the table.
    #[inline(always)]
    fn of(&self, simd: S, table: &Table) -> u64 {
        let rows = u8x64::block_splat(u8x16::load_array(simd, table.rows)).swizzle_dyn_within_blocks(self.low);
        let ascii = !(rows & self.bit).simd_eq(0).to_bitmask();
        if table.beyond { ascii | self.beyond } else { ascii }
    }
}

/// What the bytes near a place must be that a match may begin there.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Near {
    /// One of these is at most so far behind the place, where one of those others is; the farthest first.
    Any(Table, Vec<(usize, Table)>),
    /// So many of these stand there.
    All(Table, usize),
}

/// So many are told at once, at most.
pub(crate) const NEARS_MAX: usize = 6;

/// The places of a text.
pub(crate) struct Marks<'t> {
    text: &'t [u8],
    from: usize,
    /// Whether nothing comes behind the text. What is not there yet may be anything.
    last: bool,
    bits: Vec<u64>,
}

impl<'t> Marks<'t> {
    /// Marks for the places from `from` on, none of which is marked.
    pub fn new(text: &'t [u8], from: usize, last: bool) -> Self {
        Self { text, from, last, bits: vec![0; (text.len() - from).div_ceil(BLOCK)] }
    }

    /// Marks all places.
    pub fn mark_all(&mut self) {
        self.bits.fill(u64::MAX);
    }

    /// Marks the places that have near them what one of these says.
    pub fn mark(&mut self, nears: &[Near]) {
        if nears.is_empty() {
            return;
        }
        let (text, last, marks) = (&self.text[self.from..], self.last, &mut self.bits[..]);
        dispatch!(Level::new(), simd => mark(simd, nears, text, last, marks));
    }

    /// Marks the places from `first` to `last`.
    pub fn mark_range(&mut self, first: usize, last: usize) {
        for at in first.max(self.from)..last.saturating_add(1).min(self.text.len()) {
            let place = at - self.from;
            self.bits[place / BLOCK] |= 1 << (place % BLOCK);
        }
    }

    /// Keeps the marks where a byte of a table is and, `at_boundary`, none inside words of ASCII.
    pub fn keep(&mut self, first: &Table, at_boundary: bool) {
        let (text, bits) = (&self.text[self.from..], &mut self.bits[..]);
        let behind = self.from.checked_sub(1).is_some_and(|before| is_word(self.text[before]));
        dispatch!(Level::new(), simd => keep(simd, first, at_boundary, text, behind, bits));
    }

    /// The first marked place from `at` on; the text's length if there is none. [`Self::keep`] comes before.
    pub fn next(&self, at: usize) -> usize {
        let place = at - self.from;
        let mut index = place / BLOCK;
        let mut bits = self.bits.get(index).map_or(0, |bits| bits & u64::MAX << (place % BLOCK));
        while bits == 0 {
            index += 1;
            let Some(next) = self.bits.get(index) else { return self.text.len() };
            bits = *next;
        }
        self.from + index * BLOCK + bits.trailing_zeros() as usize
    }
}

/// The places of a short text that have a byte of a table.
pub(crate) fn places(text: &[u8], table: &Table) -> u64 {
    let text = &text[..text.len().min(BLOCK)];
    let block = dispatch!(Level::new(), simd => block(simd, text, 0).of(simd, table));
    block & there(text, 0)
}

#[inline(always)]
fn mark<S: Simd>(simd: S, nears: &[Near], text: &[u8], last: bool, marks: &mut [u64]) {
    // Where the next hit behind the block is.
    let mut nexts = [usize::MAX; NEARS_MAX];
    for (nth, near) in nears.iter().enumerate() {
        if last == matches!(near, Near::All(..)) {
            nexts[nth] = text.len();
        }
    }
    for (index, marks) in marks.iter_mut().enumerate().rev() {
        let at = index * BLOCK;
        let block = block(simd, text, at);
        let there = there(text, at);
        for (nth, near) in nears.iter().enumerate() {
            let next = nexts[nth];
            let hits = match near {
                Near::Any(table, firsts) => {
                    let hits = block.of(simd, table) & there;
                    for (reach, first) in firsts {
                        let places = before(hits, at, next, *reach);
                        if places == 0 {
                            break;
                        }
                        *marks |= places & block.of(simd, first);
                    }
                    hits
                }
                Near::All(table, len) => {
                    let others = !block.of(simd, table) & there;
                    *marks |= !before(others, at, next, len - 1);
                    others
                }
            };
            if hits != 0 {
                nexts[nth] = at + hits.trailing_zeros() as usize;
            }
        }
    }
}

#[inline(always)]
fn keep<S: Simd>(simd: S, first: &Table, at_boundary: bool, text: &[u8], behind: bool, marks: &mut [u64]) {
    for (index, marks) in marks.iter_mut().enumerate() {
        if *marks == 0 {
            continue;
        }
        let at = index * BLOCK;
        let block = block(simd, text, at);
        *marks &= block.of(simd, first) & there(text, at);
        if at_boundary {
            let words = block.of(simd, &WORD);
            let behind = if at > 0 { is_word(text[at - 1]) } else { behind };
            *marks &= !(words & (words << 1 | u64::from(behind)));
        }
    }
}

/// Digits, letters and `_`.
const WORD: Table = Table {
    rows: [0xa8, 0xf8, 0xf8, 0xf8, 0xf8, 0xf8, 0xf8, 0xf8, 0xf8, 0xf8, 0xf0, 0x50, 0x50, 0x50, 0x50, 0x70],
    beyond: false,
};

/// Whether words are made of it, as automata know them.
#[inline]
pub(crate) fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_'
}

/// The places of a block that have a hit at most so far behind them, in the block or where the next one is.
#[inline(always)]
fn before(hits: u64, at: usize, next: usize, reach: usize) -> u64 {
    let (mut places, mut covered) = (hits, 0);
    while hits != 0 && covered < reach.min(BLOCK - 1) {
        let step = (covered + 1).min(reach - covered);
        places |= places >> step;
        covered += step;
    }
    let from = next.saturating_sub(reach);
    if from < at + BLOCK { places | u64::MAX << from.saturating_sub(at) } else { places }
}

/// The places of a block that are in the text.
#[inline(always)]
fn there(text: &[u8], at: usize) -> u64 {
    match text.len() - at {
        0 => 0,
        len => u64::MAX >> (BLOCK - len.min(BLOCK)),
    }
}

/// The bytes of a block; behind the text's end there are zeros.
#[inline(always)]
fn block<S: Simd>(simd: S, text: &[u8], at: usize) -> Block<S> {
    if let Some(whole) = text[at..].first_chunk() {
        return Block::new(simd, whole);
    }
    let mut part = [0; BLOCK];
    part[..text.len() - at].copy_from_slice(&text[at..]);
    Block::new(simd, &part)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn set(of: &[u8]) -> ByteSet {
        let mut set = ByteSet::EMPTY;
        of.iter().for_each(|byte| set.add(*byte));
        set
    }

    fn marked(near: &Near, text: &str, from: usize, last: bool) -> Vec<usize> {
        let mut marks = Marks::new(text.as_bytes(), from, last);
        marks.mark(std::slice::from_ref(near));
        marks.keep(&Table::new(&set(&(0..=255).collect::<Vec<_>>())), false);
        all(&marks)
    }

    fn all(marks: &Marks<'_>) -> Vec<usize> {
        let next = |at: usize| Some(marks.next(at)).filter(|next| *next < marks.text.len());
        std::iter::successors(next(marks.from), |at| next(at + 1)).collect()
    }

    /// Whether one of some bytes is in the text from `at` on, or may come there.
    fn has(text: &str, at: usize, len: usize, last: bool, wanted: impl Fn(u8) -> bool) -> bool {
        let end = at.saturating_add(len);
        (end > text.len() && !last) || text.as_bytes()[at..end.min(text.len())].iter().any(|byte| wanted(*byte))
    }

    #[test]
    fn every_set_of_ascii_is_told_byte_for_byte_and_all_that_is_beyond_counts_as_one() {
        let all: String = (0..=255u8).map(char::from).collect();
        for step in 1..40u8 {
            let wanted: Vec<u8> = (0..=255).filter(|byte| byte % step == step / 2).collect();
            let near = Near::Any(Table::new(&set(&wanted)), vec![(0, Table::new(&set(&wanted)))]);
            let beyond = wanted.iter().any(|byte| *byte >= 0x80);
            let is = |at: &usize| match all.as_bytes()[*at] {
                byte @ 0..0x80 => wanted.contains(&byte),
                _ => beyond,
            };
            assert_eq!(marked(&near, &all, 0, true), (0..all.len()).filter(is).collect::<Vec<_>>(), "{step}");
        }
    }

    #[test]
    fn words_are_of_digits_letters_and_underscores() {
        assert_eq!(WORD, Table::new(&set(&(0..=255).filter(|byte| is_word(*byte)).collect::<Vec<_>>())));
    }

    proptest! {
        #[test]
        fn only_first_bytes_stay_marked_and_none_inside_a_word(
            text in "([a-zA-Z0-9_]{0,90}[ .é]?){0,6}",
            from in 0usize..70,
            at_boundary: bool,
        ) {
            let from = from.min(text.len());
            let mut marks = Marks::new(text.as_bytes(), from, true);
            marks.mark_all();
            marks.keep(&Table::new(&set(b"aeiou .")), at_boundary);
            let word = |at: usize| is_word(text.as_bytes()[at]);
            let inside = |at: usize| at_boundary && at > 0 && word(at) && word(at - 1);
            let first = |at: usize| b"aeiou .".contains(&text.as_bytes()[at]);
            let expected = (from..text.len()).filter(|at| first(*at) && !inside(*at));
            prop_assert_eq!(all(&marks), expected.collect::<Vec<_>>());
        }

        #[test]
        fn the_places_that_have_a_byte_near_are_marked_and_no_others(
            text in "[a-d ]{0,9}([a-d]{0,70}|[cd]{0,300}|[ab7é]{0,20}){0,4}",
            from in 0usize..70,
            mut reaches in proptest::collection::vec(0usize..200, 1..3),
            last: bool,
        ) {
            let from = from.min(text.len());
            let (hit, first) = (Table::new(&set(b"7")), Table::new(&set(b"bd")));
            let reach = *reaches.iter().max().unwrap();
            reaches.sort_by_key(|reach| std::cmp::Reverse(*reach));
            let near = Near::Any(hit, reaches.iter().map(|reach| (*reach, first.clone())).collect());
            let may = |at: &usize| {
                b"bd".contains(&text.as_bytes()[*at]) && has(&text, *at, reach + 1, last, |byte| byte == b'7')
            };
            prop_assert_eq!(marked(&near, &text, from, last), (from..text.len()).filter(may).collect::<Vec<_>>());
        }

        #[test]
        fn the_places_where_a_run_begins_are_marked_and_no_others(
            text in "([a-d]{0,40} ?|[a-d]{60,200}){0,6}",
            from in 0usize..70,
            len in 1usize..150,
            last: bool,
        ) {
            let from = from.min(text.len());
            let near = Near::All(Table::new(&set(b"abcd")), len);
            // At the end of all text a run is over.
            let over = |at: usize| last && at + len > text.len();
            let may = |at: &usize| !over(*at) && !has(&text, *at, len, true, |byte| byte == b' ');
            prop_assert_eq!(marked(&near, &text, from, last), (from..text.len()).filter(may).collect::<Vec<_>>());
        }
    }
}
