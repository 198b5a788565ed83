//! A text as a direction in 256 dimensions: the sum of its tokens' rows in a static int8 table, at length one.
//!
//! Each sum runs in one fixed order and no product is fused with an addition, so the same text gives the same bits on
//! every machine, however many numbers it adds at once. The table lies in the binary and is used where it lies.

use std::ops::ControlFlow;

use fearless_simd::{Level, Simd, dispatch};

use super::tokens::{self, IDS, UNKNOWN};

/// How many numbers an embedding has.
pub const DIMENSIONS: usize = 256;

/// Of a longer text the first and the last half of this many tokens are read.
pub const MOST_TOKENS: usize = 512;

const HALF: usize = MOST_TOKENS / 2;

pub(super) type Vector = [f32; DIMENSIONS];

/// What a text is about.
#[derive(Clone, Debug, PartialEq)]
pub struct Embedding {
    unit: Vector,
    tokens: u32,
    unknown: u32,
}

impl Embedding {
    /// What `text` is about.
    pub fn of(text: &str) -> Self {
        Self::of_parts(&[text])
    }

    /// What texts that stand one after another are about.
    pub fn of_parts<T: AsRef<str>>(parts: &[T]) -> Self {
        let mut sum = Sum::new();
        let mut first = [0; MOST_TOKENS];
        match read(parts, &mut first) {
            Read::All(count) => sum.add(&first[..count]),
            Read::TooMany => {
                sum.add(&first[..HALF]);
                let last = Last::of(parts);
                last.in_order().into_iter().for_each(|ids| sum.add(ids));
            }
        }
        sum.embedding()
    }

    /// The direction, of length one; all zeros where nothing of the text is known.
    pub fn unit(&self) -> &[f32; DIMENSIONS] {
        &self.unit
    }

    /// How many tokens were read, [`MOST_TOKENS`] at most.
    pub fn tokens(&self) -> u32 {
        self.tokens
    }

    /// Whether enough of the text is in the vocabulary, which is English, to say what it is about.
    pub fn is_known(&self) -> bool {
        self.unit.iter().any(|x| *x != 0.0) && u64::from(self.unknown) * 10 <= u64::from(self.tokens) * 3
    }

    /// How alike two texts are: 1 where they are the same, about 0 where they have nothing in common.
    pub fn cosine(&self, other: &Self) -> f32 {
        dot(&self.unit, &other.unit)
    }
}

/// The sum of tokens' rows.
#[derive(Clone)]
pub(super) struct Sum {
    pub(super) vector: Vector,
    tokens: u32,
    unknown: u32,
}

impl Sum {
    pub(super) fn new() -> Self {
        Self { vector: [0.0; DIMENSIONS], tokens: 0, unknown: 0 }
    }

    /// Adds the rows of `ids`, in their order.
    pub(super) fn add(&mut self, ids: &[u16]) {
        self.tokens += ids.len() as u32;
        self.unknown += ids.iter().filter(|id| **id == UNKNOWN).count() as u32;
        let vector = &mut self.vector;
        vectorized(
            #[inline(always)]
            || add_rows(vector, ids),
        );
    }

    fn embedding(self) -> Embedding {
        let norm = dot(&self.vector, &self.vector).sqrt();
        let by = if norm > 0.0 { 1.0 / norm } else { 0.0 };
        Embedding { unit: self.vector.map(|x| x * by), tokens: self.tokens, unknown: self.unknown }
    }
}

/// Does `work` with the widest instructions that this machine has, as far as it is a closure that is always inlined.
#[inline(always)]
pub(super) fn vectorized<T>(work: impl FnOnce() -> T) -> T {
    dispatch!(Level::new(), simd => simd.vectorize(work))
}

/// So many sums of a vector stay in registers while all rows go by.
const AT_ONCE: usize = 64;

#[inline(always)]
fn add_rows(vector: &mut Vector, ids: &[u16]) {
    for (part, kept) in vector.as_chunks_mut::<AT_ONCE>().0.iter_mut().enumerate() {
        let mut sums = *kept;
        for id in ids {
            let (scale, row) = TABLE.row(*id);
            for (sum, weight) in sums.iter_mut().zip(&row.as_chunks::<AT_ONCE>().0[part]) {
                *sum += scale * f32::from(*weight as i8);
            }
        }
        *kept = sums;
    }
}

/// The inner product: sixteen sums side by side, then those in order.
pub(super) fn dot(a: &Vector, b: &Vector) -> f32 {
    let mut lanes = [0.0_f32; 16];
    for (a, b) in a.as_chunks::<16>().0.iter().zip(b.as_chunks::<16>().0) {
        for ((lane, a), b) in lanes.iter_mut().zip(a).zip(b) {
            *lane += a * b;
        }
    }
    lanes.iter().sum()
}

enum Read {
    All(usize),
    TooMany,
}

fn read<T: AsRef<str>>(parts: &[T], into: &mut [u16; MOST_TOKENS]) -> Read {
    let mut count = 0;
    let flow = parts.iter().try_for_each(|part| {
        tokens::each(part.as_ref(), |id| match into.get_mut(count) {
            Some(slot) => {
                *slot = id;
                count += 1;
                ControlFlow::Continue(())
            }
            None => ControlFlow::Break(()),
        })
    });
    if flow.is_continue() { Read::All(count) } else { Read::TooMany }
}

/// The last tokens of a text, found without reading what is before them.
struct Last {
    ids: [u16; HALF],
    seen: usize,
}

impl Last {
    /// A space parts words whatever is around it, so reading may begin at any. It begins near the end, and where that
    /// holds too few tokens, farther before.
    fn of<T: AsRef<str>>(parts: &[T]) -> Self {
        let all = parts.iter().map(|part| part.as_ref().len()).sum();
        let mut bytes: usize = 8 * HALF;
        loop {
            let mut last = Self { ids: [0; HALF], seen: 0 };
            last.read(parts, bytes);
            if last.seen >= HALF || bytes >= all {
                return last;
            }
            bytes = bytes.saturating_mul(2);
        }
    }

    fn read<T: AsRef<str>>(&mut self, parts: &[T], bytes: usize) {
        let mut ahead: usize = parts.iter().map(|part| part.as_ref().len()).sum();
        for part in parts.iter().map(T::as_ref) {
            let skipped = ahead.saturating_sub(bytes);
            ahead -= part.len();
            if skipped < part.len() {
                let _ = tokens::each(from_a_parting(part, skipped), |id| self.keep(id));
            }
        }
    }

    fn keep(&mut self, id: u16) -> ControlFlow<()> {
        self.ids[self.seen % HALF] = id;
        self.seen += 1;
        ControlFlow::Continue(())
    }

    fn in_order(&self) -> [&[u16]; 2] {
        let (behind, before) = self.ids.split_at(self.seen % HALF);
        [before, behind]
    }
}

/// What begins `skipped` bytes in or later with a character that parts words; all of it where nothing is to be skipped.
fn from_a_parting(part: &str, skipped: usize) -> &str {
    if skipped == 0 {
        return part;
    }
    let from = part.ceil_char_boundary(skipped);
    let rest = part.get(from..).unwrap_or_default();
    rest.find(tokens::parts_words).and_then(|at| rest.get(at..)).unwrap_or_default()
}

/// `static-minilm-256.i8.bin`: a head of 24 bytes, a scale for each token, a row for each token.
struct Table {
    scales: &'static [[u8; 4]],
    rows: &'static [[u8; DIMENSIONS]],
}

static TABLE: Table = Table::of(include_bytes!("model/static-minilm-256.i8.bin"));

impl Table {
    const fn of(bytes: &'static [u8; 24 + IDS * (4 + DIMENSIONS)]) -> Self {
        let (head, rest) = bytes.split_at(24);
        assert!(matches!(head.first_chunk(), Some(b"STEM1\0\0\0")), "this is no STEM1 table");
        let (scales, rows) = rest.split_at(4 * IDS);
        Self { scales: scales.as_chunks().0, rows: rows.as_chunks().0 }
    }

    fn row(&self, id: u16) -> (f32, &'static [u8; DIMENSIONS]) {
        let id = usize::from(id);
        (f32::from_le_bytes(self.scales[id]), &self.rows[id])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::semantic::tests::golden;

    fn sum(text: &str) -> Sum {
        let mut sum = Sum::new();
        let _ = tokens::each(text, |id| {
            sum.add(&[id]);
            ControlFlow::Continue(())
        });
        sum
    }

    #[test]
    fn the_golden_texts_have_their_embeddings() {
        for case in golden() {
            let sum = sum(&case.text);
            let norm = dot(&sum.vector, &sum.vector).sqrt();
            assert!((f64::from(norm) - case.norm).abs() < 1e-4, "{:?}: {norm}", case.text);
            for (got, wanted) in Embedding::of(&case.text).unit().iter().zip(case.embedding_first8) {
                assert!((f64::from(*got) - wanted).abs() < 1e-4, "{:?}: {got} {wanted}", case.text);
            }
        }
    }

    #[test]
    fn a_text_is_like_itself_and_less_like_others() {
        let [a, b, c] = ["A man is eating food.", "A man is eating a piece of bread.", "A cheetah chases its prey."]
            .map(Embedding::of);
        assert!((a.cosine(&a) - 1.0).abs() < 1e-5);
        assert!(a.cosine(&b) > 0.6 && a.cosine(&b) > a.cosine(&c) + 0.3, "{} {}", a.cosine(&b), a.cosine(&c));
    }

    #[test]
    fn of_a_long_text_both_ends_are_read_whatever_is_between_and_however_it_is_parted() {
        let (head, tail) = ("weather today ".repeat(128), " transfer money".repeat(128));
        let ends = Embedding::of(&format!("{head}{tail}"));
        assert_eq!(ends.tokens(), 512);
        for middle in [" xylophone zebra".repeat(10_000), "东".repeat(20_000), " ".repeat(100_000)] {
            let whole = Embedding::of(&format!("{head}{middle}{tail}"));
            let parted = Embedding::of_parts(&[&head[..700], &head[700..], &middle, &tail]);
            assert_eq!(whole.unit(), ends.unit());
            assert_eq!(parted, whole);
        }
    }

    #[test]
    fn a_long_text_without_spaces_is_read_to_its_end_too() {
        let text = "a.b,c;d".repeat(1000);
        assert_eq!(Embedding::of(&text).tokens(), 512);
        let Read::TooMany = read(&[&text], &mut [0; MOST_TOKENS]) else { panic!("it is short") };
        let mut ids = Vec::new();
        let _ = tokens::each(&text, |id| {
            ids.push(id);
            ControlFlow::Continue(())
        });
        let last = Last::of(&[&text]).in_order().concat();
        assert_eq!(last, ids[ids.len() - HALF..]);
    }

    #[test]
    fn nothing_is_known_of_an_empty_text_or_a_foreign_one() {
        assert!(Embedding::of("what is the weather").is_known());
        assert!(!Embedding::of("  \n").is_known());
        let long = "x".repeat(200);
        assert!(!Embedding::of(&format!("hello {long} {long} {long}")).is_known());
    }

    #[test]
    fn embedding_allocates_nothing() {
        tokens::prepare();
        let text = "How do I transfer money to another account? Łódź, 東京. ".repeat(200);
        let count = allocation_counter::measure(|| {
            std::hint::black_box(Embedding::of(&text));
        });
        assert_eq!(count.count_total, 0);
    }
}
