//! Where in a text a match may begin at all: everything else is passed over at the speed of memory.
//!
//! Every match of a rule contains, at most [`Need::reach`] bytes behind its start, one of a few bytes or one of a few
//! literals: an e-mail address its `@`, a card number a digit. What a rule needs is read off its pattern ([`Need::of`])
//! and chosen by what it costs on prose. Bytes are looked for with vector compares, literals by hashed trigrams that are
//! sampled every few bytes, as Wu and Manber do. A trigger is a suspicion, never a verdict.

use memchr::memmem;
use regex_syntax::hir::{Class, Hir, HirKind};

/// A set of bytes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct ByteSet([u64; 4]);

impl std::fmt::Debug for ByteSet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", self.ranges().iter().map(|(low, high)| (*low as char, *high as char)).collect::<Vec<_>>())
    }
}

impl ByteSet {
    pub const EMPTY: Self = Self([0; 4]);

    pub fn add(&mut self, byte: u8) {
        self.0[usize::from(byte >> 6)] |= 1 << (byte & 63);
    }

    pub fn has(&self, byte: u8) -> bool {
        self.0[usize::from(byte >> 6)] & (1 << (byte & 63)) != 0
    }

    pub fn is_empty(&self) -> bool {
        *self == Self::EMPTY
    }

    fn union(&mut self, other: &Self) {
        self.0.iter_mut().zip(other.0).for_each(|(mine, theirs)| *mine |= theirs);
    }

    fn bytes(self) -> impl Iterator<Item = u8> {
        (0..=u8::MAX).filter(move |byte| self.has(*byte))
    }

    fn ranges(&self) -> Vec<(u8, u8)> {
        let mut ranges: Vec<(u8, u8)> = Vec::new();
        for byte in self.bytes() {
            match ranges.last_mut() {
                Some((_, high)) if *high + 1 == byte => *high = byte,
                _ => ranges.push((byte, byte)),
            }
        }
        ranges
    }
}

/// What every match contains: a byte of a set, or one of some literals, at most so many bytes behind its start.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Need {
    bytes: ByteSet,
    /// Folded with [`fold`].
    literals: Vec<Vec<u8>>,
    /// As they are.
    exact: Vec<Vec<u8>>,
    /// From the start of a match to the start of what it contains.
    pub reach: usize,
}

/// Equal for the two cases of a letter (and for a few pairs of signs, which costs nothing but a look).
fn fold(byte: u8) -> u8 {
    byte | 0x20
}

/// How often a byte stands in prose, about, in a thousand.
fn frequency(byte: u8) -> f32 {
    const LETTERS: [f32; 26] = [
        65., 12., 22., 34., 102., 18., 16., 49., 56., 1.2, 6.2, 32., 19., 56., 60., 15., 0.8, 48., 51., 73., 22., 8.,
        19., 1.2, 16., 0.6,
    ];
    match byte {
        b'a'..=b'z' => LETTERS[usize::from(byte - b'a')],
        b'A'..=b'Z' => 0.4 + LETTERS[usize::from(byte - b'A')] / 60.,
        b' ' => 170.,
        b'.' | b',' | b'\n' => 11.,
        b'-' | b'\'' | b'"' => 4.,
        b'0'..=b'9' => 0.5,
        128.. => 3.,
        _ => 0.7,
    }
}

impl Need {
    fn of_bytes(bytes: ByteSet) -> Self {
        Self { bytes, literals: Vec::new(), exact: Vec::new(), reach: 0 }
    }

    /// What a literal needs. With `folded`, its letters stand for both cases.
    pub fn of_literal(literal: &[u8], folded: bool) -> Option<Self> {
        let mut best = Best::default();
        best.literal(literal, folded, Some(0));
        best.take()
    }

    /// What matches of a pattern need; they are cut at `window` bytes.
    pub fn of(hir: &Hir, window: usize) -> Option<Self> {
        match hir.kind() {
            HirKind::Literal(literal) => Self::of_literal(&literal.0, false),
            HirKind::Class(class) => Some(Self::of_bytes(first_bytes(class))),
            HirKind::Capture(capture) => Self::of(&capture.sub, window),
            HirKind::Repetition(repetition) if repetition.min > 0 => Self::of(&repetition.sub, window),
            HirKind::Concat(parts) => Self::of_all(parts, window),
            HirKind::Alternation(parts) => Self::of_any(parts, window),
            _ => None,
        }
    }

    /// The cheapest need of things in a row.
    fn of_all(parts: &[Hir], window: usize) -> Option<Self> {
        let mut best = Best::default();
        let (mut run, mut folded, mut run_at, mut at) = (Vec::new(), false, Some(0), Some(0usize));
        for part in parts {
            match letters(part) {
                Some((mut letters, either)) => {
                    if run.is_empty() {
                        (run_at, folded) = (at, false);
                    }
                    run.append(&mut letters);
                    folded |= either;
                }
                None => best.literal(&std::mem::take(&mut run), folded, run_at),
            }
            if let (Some(need), Some(at)) = (Self::of(part, window), at) {
                best.offer(Self { reach: need.reach + at, ..need });
            }
            let next = part.properties().maximum_len().zip(at).map_or(window, |(len, at)| len + at);
            at = Some(next.min(window));
        }
        best.literal(&run, folded, run_at);
        best.take()
    }

    fn of_any(parts: &[Hir], window: usize) -> Option<Self> {
        let mut all = Self::of_bytes(ByteSet::EMPTY);
        for part in parts {
            all.join(Self::of(part, window)?);
        }
        Some(all)
    }

    fn join(&mut self, mut other: Self) {
        self.bytes.union(&other.bytes);
        self.literals.append(&mut other.literals);
        self.exact.append(&mut other.exact);
        self.reach = self.reach.max(other.reach);
    }

    /// About what looking for it costs, in nanoseconds for a thousand bytes of prose.
    fn cost(&self) -> f32 {
        let shortest = self.literals.iter().map(Vec::len).min();
        let looking = shortest.map_or(100., |len| 1200. / (len - 2) as f32) + 400. * self.exact.len() as f32;
        let bytes: f32 = self.bytes.bytes().map(frequency).sum();
        // With every other rule that needs bytes, suspicions become more.
        let hits = bytes + self.literals.iter().map(|literal| if literal.len() > 4 { 0.2 } else { 1. }).sum::<f32>();
        looking + (hits + 0.1 * self.exact.len() as f32) * (10 * self.reach.max(NEAR) + 40) as f32
    }
}

/// The cheapest need that was offered.
#[derive(Default)]
struct Best(Option<Need>);

impl Best {
    fn offer(&mut self, need: Need) {
        let better = self.0.as_ref().is_none_or(|best| need.cost() < best.cost());
        if better {
            self.0 = Some(need);
        }
    }

    /// Offers a literal as a whole, and each of its bytes.
    fn literal(&mut self, literal: &[u8], folded: bool, at: Option<usize>) {
        let Some(at) = at else { return };
        for (offset, byte) in literal.iter().enumerate() {
            let mut bytes = ByteSet::EMPTY;
            bytes.add(*byte);
            if folded {
                bytes.add(byte.to_ascii_lowercase());
                bytes.add(byte.to_ascii_uppercase());
            }
            // Behind a letter that is longer in its other case, a little further on.
            let shift = literal[..offset].iter().filter(|byte| !byte.is_ascii()).count();
            self.offer(Need { reach: at + offset + shift, ..Need::of_bytes(bytes) });
        }
        if literal.len() >= 3 && literal.is_ascii() {
            let folded = literal.iter().map(|byte| fold(*byte)).collect();
            self.offer(Need { literals: vec![folded], reach: at, ..Need::of_bytes(ByteSet::EMPTY) });
        }
        // A search of its own, which pays where a suspicion is dear.
        if literal.len() >= 3 && !folded {
            self.offer(Need { exact: vec![literal.to_vec()], reach: at, ..Need::of_bytes(ByteSet::EMPTY) });
        }
    }

    fn take(self) -> Option<Need> {
        self.0
    }
}

/// The bytes of something that is one literal but for the case of its letters, and whether it is so.
fn letters(hir: &Hir) -> Option<(Vec<u8>, bool)> {
    match hir.kind() {
        HirKind::Literal(literal) if literal.0.is_ascii() => Some((literal.0.to_vec(), false)),
        HirKind::Class(class) => {
            let bytes: Vec<u8> = first_bytes(class).bytes().collect();
            match bytes[..] {
                [upper, lower] if upper.is_ascii_uppercase() && lower == upper.to_ascii_lowercase() => {
                    Some((vec![lower], true))
                }
                _ => None,
            }
        }
        _ => None,
    }
}

/// The bytes with which something of this class begins.
fn first_bytes(class: &Class) -> ByteSet {
    let mut set = ByteSet::EMPTY;
    let mut add = |low: u8, high: u8| (low..=high).for_each(|byte| set.add(byte));
    match class {
        Class::Bytes(class) => class.iter().for_each(|range| add(range.start(), range.end())),
        Class::Unicode(class) => {
            for range in class.iter() {
                let lead = |c: char| c.encode_utf8(&mut [0; 4]).as_bytes()[0];
                add(lead(range.start()), lead(range.end()));
            }
        }
    }
    set
}

/// Where matches may begin, of several rules at once.
#[derive(Debug)]
pub(crate) struct Triggers {
    parts: Vec<Part>,
    /// Starts that are nearer to the end of a text than this cannot be excluded while more text may come.
    pub zone: usize,
}

#[derive(Debug)]
struct Part {
    probe: Probe,
    reach: usize,
}

#[derive(Debug)]
enum Probe {
    Bytes(Bytes),
    Grams(Grams),
    Text(Box<memmem::Finder<'static>>),
}

/// Needs with a longer reach are looked for on their own, or each suspicion of another would cost as much as theirs.
const NEAR: usize = 4;

/// So many literals are looked for each on its own.
const SEARCHES_MAX: usize = 12;

impl Triggers {
    /// The triggers for rules with these needs; None if a rule may begin anywhere.
    pub fn new(needs: &[Option<Need>]) -> Option<Self> {
        let (mut parts, mut alone): (Vec<Need>, usize) = (Vec::new(), 0);
        for need in needs {
            for mut need in split(need.as_ref()?) {
                if alone > SEARCHES_MAX {
                    need.literals.extend(need.exact.drain(..).map(|text| text.into_iter().map(fold).collect()));
                }
                alone += need.exact.len();
                match parts.iter_mut().find(|part| together(part, &need)) {
                    Some(part) => part.join(need),
                    None => parts.push(need),
                }
            }
        }
        let longest =
            parts.iter().flat_map(|need| need.literals.iter().chain(&need.exact)).map(Vec::len).max().unwrap_or(1);
        let zone = parts.iter().map(|need| need.reach).max().unwrap_or(0) + longest;
        let parts = parts.iter().map(part).collect();
        Some(Self { parts, zone })
    }

    /// To look through a text from left to right.
    pub fn search(&self) -> Hits<'_> {
        Hits { triggers: self, next: self.parts.iter().map(|_| None).collect() }
    }
}

/// Bytes and literals apart.
fn split(need: &Need) -> impl Iterator<Item = Need> {
    let none = Need { reach: need.reach, ..Need::of_bytes(ByteSet::EMPTY) };
    let bytes = Need { bytes: need.bytes, ..none.clone() };
    let literals = Need { literals: need.literals.clone(), ..none.clone() };
    let exact = need.exact.iter().map(move |text| Need { exact: vec![text.clone()], ..none.clone() });
    let used = |need: &Need| !need.bytes.is_empty() || !need.literals.is_empty() || !need.exact.is_empty();
    [bytes, literals].into_iter().chain(exact.collect::<Vec<_>>()).filter(used)
}

fn together(a: &Need, b: &Need) -> bool {
    if !a.exact.is_empty() || !b.exact.is_empty() {
        return a.exact == b.exact;
    }
    let near = |need: &Need| need.reach <= NEAR;
    let alike = a.bytes == b.bytes || (near(a) && near(b));
    a.literals.is_empty() == b.literals.is_empty() && (if a.literals.is_empty() { alike } else { near(a) == near(b) })
}

fn part(need: &Need) -> Part {
    if let Some(text) = need.exact.first() {
        return Part { probe: Probe::Text(Box::new(memmem::Finder::new(text).into_owned())), reach: need.reach };
    }
    match need.literals.is_empty() {
        true => Part { probe: Probe::Bytes(Bytes::new(need.bytes)), reach: need.reach },
        false => {
            let grams = Grams::new(&need.literals);
            let reach = need.reach + grams.step - 1;
            Part { probe: Probe::Grams(grams), reach }
        }
    }
}

/// Where suspicions crowd, looking for them costs more than it saves: for a stretch every place counts as one, for a
/// longer one each time.
#[derive(Debug, Default)]
pub(crate) struct Crowd(u32);

impl Crowd {
    /// The place before which none is excluded, when the next suspicion after `from` is `first`.
    pub fn open(&mut self, from: usize, first: usize) -> usize {
        if first.saturating_sub(from) >= 16 {
            self.0 = 0;
            return first;
        }
        self.0 = (self.0 + 1).min(7);
        if self.0 < 3 { first } else { first.saturating_add(8 << self.0) }
    }
}

/// A search for places where matches may begin.
pub(crate) struct Hits<'t> {
    triggers: &'t Triggers,
    /// For each part the next hits that lie so near to each other that matches may begin at every place between.
    next: Vec<Option<(usize, usize)>>,
}

impl Hits<'_> {
    /// The first place from `from` on where a match may begin (or the text's length), and the last place behind it up
    /// to which that is true of every place.
    pub fn next(&mut self, text: &[u8], from: usize) -> (usize, usize) {
        let (mut first, mut last) = (text.len(), text.len());
        for (part, next) in self.triggers.parts.iter().zip(&mut self.next) {
            let (hit, end) = match *next {
                Some(hits) if hits.1 >= from => hits,
                _ => {
                    let hit = part.probe.find(text, from);
                    *next.insert((hit, part.probe.run(text, hit, part.reach)))
                }
            };
            let start = hit.saturating_sub(part.reach).max(from);
            if start < first || (start == first && end > last) {
                (first, last) = (start, end);
            }
        }
        (first, last)
    }
}

impl Probe {
    /// The first hit from `from` on; `usize::MAX` if there is none.
    fn find(&self, text: &[u8], from: usize) -> usize {
        let rest = text.get(from..).unwrap_or_default();
        let found = match self {
            Self::Bytes(bytes) => bytes.find(rest),
            Self::Grams(grams) => grams.find(rest),
            Self::Text(finder) => finder.find(rest),
        };
        found.map_or(usize::MAX, |at| at + from)
    }
}

impl Probe {
    /// The last of the hits from `hit` on of which none is further than `reach` from the one before.
    fn run(&self, text: &[u8], hit: usize, reach: usize) -> usize {
        let Self::Bytes(bytes) = self else { return hit };
        let (mut end, mut at) = (hit, hit.saturating_add(1));
        while at < text.len() && at <= end + reach + 1 && end < hit + RUN_MAX {
            if bytes.has(text[at]) {
                end = at;
            }
            at += 1;
        }
        end
    }
}

/// Looking ahead further than this is left for later.
const RUN_MAX: usize = 256;

/// Finds a byte of a set.
#[derive(Debug)]
enum Bytes {
    One(u8),
    Two(u8, u8),
    Three(u8, u8, u8),
    Ranges(Box<[(u8, u8)]>),
    Many(Box<[bool; 256]>),
}

/// Up to so many ranges, comparing is faster than a table.
const RANGES: usize = 12;

impl Bytes {
    fn new(set: ByteSet) -> Self {
        let all: Vec<u8> = set.bytes().collect();
        let ranges = set.ranges();
        match all[..] {
            [a] => Self::One(a),
            [a, b] => Self::Two(a, b),
            [a, b, c] => Self::Three(a, b, c),
            _ if ranges.len() <= RANGES => Self::Ranges(ranges.into()),
            _ => Self::Many(Box::new(std::array::from_fn(|byte| set.has(byte as u8)))),
        }
    }

    fn has(&self, byte: u8) -> bool {
        match self {
            Self::One(a) => byte == *a,
            Self::Two(a, b) => byte == *a || byte == *b,
            Self::Three(a, b, c) => byte == *a || byte == *b || byte == *c,
            Self::Ranges(ranges) => ranges.iter().any(|(low, high)| byte.wrapping_sub(*low) <= high - low),
            Self::Many(table) => table[usize::from(byte)],
        }
    }

    fn find(&self, text: &[u8]) -> Option<usize> {
        match self {
            Self::One(a) => memchr::memchr(*a, text),
            Self::Two(a, b) => memchr::memchr2(*a, *b, text),
            Self::Three(a, b, c) => memchr::memchr3(*a, *b, *c, text),
            Self::Ranges(ranges) => in_ranges(ranges, text),
            Self::Many(table) => text.iter().position(|byte| table[usize::from(*byte)]),
        }
    }
}

fn in_ranges(ranges: &[(u8, u8)], text: &[u8]) -> Option<usize> {
    let within = |byte: u8| ranges.iter().any(|(low, high)| byte.wrapping_sub(*low) <= high - low);
    // Where there is one there are more: the next bytes first.
    let near = text.len().min(8);
    if let Some(at) = text[..near].iter().position(|byte| within(*byte)) {
        return Some(at);
    }
    let (chunks, _) = text.as_chunks::<32>();
    // Written so that the compiler makes vector compares of it.
    let suspicious = |chunk: &[u8; 32]| {
        let mut any = [0u8; 32];
        for (low, high) in ranges {
            let width = high - low;
            for (any, byte) in any.iter_mut().zip(chunk) {
                *any |= u8::from(byte.wrapping_sub(*low) <= width);
            }
        }
        any.iter().fold(0, |all, one| all | one) != 0
    };
    let clean = chunks.iter().position(suspicious).unwrap_or(chunks.len()) * 32;
    text[clean..].iter().position(|byte| within(*byte)).map(|at| at + clean)
}

/// Finds where one of many literals may stand, by their folded trigrams.
#[derive(Debug)]
struct Grams {
    bits: Box<[u64; 1024]>,
    /// Every literal has a trigram at each of so many places in a row: one sample in so many bytes is enough.
    step: usize,
}

impl Grams {
    fn new(literals: &[Vec<u8>]) -> Self {
        let shortest = literals.iter().map(Vec::len).min().unwrap_or(3);
        let step = (shortest - 2).clamp(1, 8);
        let mut bits = Box::new([0; 1024]);
        for literal in literals {
            for gram in literal.windows(3).take(step) {
                let slot = slot(gram[0], gram[1], gram[2]);
                bits[slot >> 6] |= 1u64 << (slot & 63);
            }
        }
        Self { bits, step }
    }

    fn has(&self, slot: usize) -> bool {
        self.bits[slot >> 6] & (1 << (slot & 63)) != 0
    }

    fn find(&self, text: &[u8]) -> Option<usize> {
        let last = text.len().checked_sub(3)?;
        let mut at = 0;
        while at <= last {
            let [a, b, c] = [text[at], text[at + 1], text[at + 2]];
            if self.has(slot(a, b, c)) {
                return Some(at);
            }
            at += self.step;
        }
        None
    }
}

/// The place of a trigram in the table, 16 bits.
fn slot(a: u8, b: u8, c: u8) -> usize {
    let word = u32::from_le_bytes([a, b, c, 0]) | 0x0020_2020;
    (word.wrapping_mul(0x9e37_79b1) >> 16) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    fn need(pattern: &str) -> Option<Need> {
        Need::of(&regex_syntax::parse(pattern).unwrap(), 1000)
    }

    fn starts(pattern: &str, text: &str) -> Vec<usize> {
        let triggers = Triggers::new(&[need(pattern)]).unwrap();
        let mut hits = triggers.search();
        let (mut at, mut all) = (0, Vec::new());
        while at < text.len() {
            let (first, last) = hits.next(text.as_bytes(), at);
            all.extend(first..=last);
            at = last.max(first) + 1;
        }
        all.retain(|at| *at < text.len());
        all
    }

    #[test]
    fn an_address_needs_its_at_sign_and_a_number_its_digits() {
        let mut at = ByteSet::EMPTY;
        at.add(b'@');
        assert_eq!(need("[a-z]{1,64}@[a-z]+"), Some(Need { reach: 64, ..Need::of_bytes(at) }));
        assert_eq!(need("[a-z]{2}[0-9]{2}").unwrap().reach, 2);
        assert_eq!(need("(?i-u)password[a-z]+").unwrap().literals, [b"password".to_vec()]);
        assert_eq!(need("(?:alpha|betas)x?").unwrap().literals, [b"alpha".to_vec(), b"betas".to_vec()]);
        assert_eq!(need("a*"), None);
    }

    #[test]
    fn no_match_begins_where_no_trigger_is() {
        let text = "one two@three.four, five PassWord six 4111-22 seven alpha beta9 b";
        for pattern in ["[a-z]{1,5}@[a-z]+", "(?i)password", "[0-9]{2,4}", "alpha|beta9", "(?i)six|seven", "e.?r"] {
            let regex = regex_automata::meta::Regex::new(pattern).unwrap();
            let starts = starts(pattern, text);
            let missed: Vec<_> = regex.find_iter(text).filter(|found| !starts.contains(&found.start())).collect();
            assert!(missed.is_empty(), "{pattern}: {missed:?}, {starts:?}");
        }
    }

    #[test]
    fn prose_without_triggers_is_passed_over() {
        let prose = "the quick brown fox jumps over a lazy dog and sleeps ".repeat(50);
        for pattern in ["[a-z]{1,5}@[a-z]+", "(?i)passphrase", "[0-9]{2,4}"] {
            assert!(starts(pattern, &prose).is_empty(), "{pattern}");
        }
    }

    #[test]
    fn ranges_find_what_a_table_finds() {
        let mut set = ByteSet::EMPTY;
        b"0123456789@:_".iter().for_each(|byte| set.add(*byte));
        let bytes = Bytes::new(set);
        assert!(matches!(bytes, Bytes::Ranges(_)));
        for at in 0..100 {
            let mut text = vec![b'x'; 100];
            text[at] = b'_';
            assert_eq!(bytes.find(&text), Some(at));
        }
        assert_eq!(bytes.find(&[b'x'; 100]), None);
    }
}
