//! Where in a text a match may begin at all: everything else is passed over at the speed of memory.
//!
//! Every match of a rule contains, at most [`Need::reach`] bytes behind its start, one of a few bytes or one of a few
//! literals: an e-mail address its `@`, a card number a digit. What a rule needs is read off its pattern ([`Need::of`])
//! and chosen by what it costs on prose. Bytes are told for all places of a text at once ([`Marks`]), literals are looked
//! for: few of them one by one or by their heads, many by hashed trigrams that are sampled every few bytes, as Wu and
//! Manber do. A trigger is a suspicion, never a verdict.

use std::cmp::Reverse;

use aho_corasick::packed;
use memchr::memmem;
use regex_syntax::hir::{Class, Hir, HirKind};

use super::marks::{Marks, NEARS_MAX, Near, Table, is_word};
use super::runs::Run;

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

    #[inline]
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

/// How often a byte stands in text, about, in a thousand.
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
        b'-' | b'\'' | b'"' => 6.,
        b'0'..=b'9' => 0.5,
        128.. => 3.,
        // Few in prose, but text is also code, tables and logs.
        _ => 5.,
    }
}

impl Need {
    fn of_bytes(bytes: ByteSet) -> Self {
        Self { bytes, literals: Vec::new(), exact: Vec::new(), reach: 0 }
    }

    /// What a literal needs. With `folded`, its letters stand for both cases.
    pub fn of_literal(literal: &[u8], folded: bool, rules: usize) -> Option<Self> {
        let mut best = Best::new(rules);
        best.literal(literal, folded, Some(0));
        best.take()
    }

    /// What matches of a pattern need; they are cut at `window` bytes. So many rules are searched for together.
    pub fn of(hir: &Hir, window: usize, rules: usize) -> Option<Self> {
        match hir.kind() {
            HirKind::Literal(literal) => Self::of_literal(&literal.0, false, rules),
            HirKind::Class(class) => Some(Self::of_bytes(first_bytes(class))),
            HirKind::Capture(capture) => Self::of(&capture.sub, window, rules),
            HirKind::Repetition(repetition) if repetition.min > 0 => Self::of(&repetition.sub, window, rules),
            HirKind::Concat(parts) => Self::of_all(parts, window, rules),
            HirKind::Alternation(parts) => Self::of_any(parts, window, rules),
            _ => None,
        }
    }

    /// The cheapest need of things in a row.
    fn of_all(parts: &[Hir], window: usize, rules: usize) -> Option<Self> {
        let mut best = Best::new(rules);
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
            if let (Some(need), Some(at)) = (Self::of(part, window, rules), at) {
                best.offer(Self { reach: need.reach + at, ..need });
            }
            let next = part.properties().maximum_len().zip(at).map_or(window, |(len, at)| len + at);
            at = Some(next.min(window));
        }
        best.literal(&run, folded, run_at);
        best.take()
    }

    fn of_any(parts: &[Hir], window: usize, rules: usize) -> Option<Self> {
        let mut all = Self::of_bytes(ByteSet::EMPTY);
        for part in parts {
            all.join(Self::of(part, window, rules)?);
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
    fn cost(&self, rules: usize) -> f32 {
        let shortest = self.literals.iter().map(Vec::len).min();
        let literals = |len: usize| if len < SAMPLED { 150. } else { 1200. / (len - 2) as f32 };
        // Each in a reading of its own, where others share theirs.
        let alone = if rules <= FEW { 60. } else { 400. };
        let sets = if self.bytes.is_empty() { 0. } else { 60. };
        let looking = sets + shortest.map_or(0., literals) + alone * self.exact.len() as f32;
        let bytes: f32 = self.bytes.bytes().map(frequency).sum();
        // With every other rule that needs bytes, suspicions become more.
        let hits = bytes + self.literals.iter().map(|literal| if literal.len() > 4 { 0.2 } else { 1. }).sum::<f32>();
        looking + (hits + 0.1 * self.exact.len() as f32) * (10 * self.reach.max(NEAR) + 40) as f32
    }
}

/// The cheapest need that was offered.
struct Best {
    need: Option<Need>,
    rules: usize,
}

impl Best {
    fn new(rules: usize) -> Self {
        Self { need: None, rules }
    }

    fn offer(&mut self, need: Need) {
        let better = self.need.as_ref().is_none_or(|best| need.cost(self.rules) < best.cost(self.rules));
        if better {
            self.need = Some(need);
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
        self.need
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

/// The bytes with which matches of a pattern begin.
pub(crate) fn firsts(hir: &Hir) -> ByteSet {
    let mut set = ByteSet::EMPTY;
    add_firsts(hir, &mut set);
    set
}

/// Adds what a pattern begins with; whether that is all, or it may be empty and what follows it counts too.
fn add_firsts(hir: &Hir, set: &mut ByteSet) -> bool {
    match hir.kind() {
        HirKind::Empty | HirKind::Look(_) => return false,
        HirKind::Literal(literal) => literal.0.first().into_iter().for_each(|byte| set.add(*byte)),
        HirKind::Class(class) => set.union(&first_bytes(class)),
        HirKind::Capture(capture) => return add_firsts(&capture.sub, set),
        HirKind::Repetition(repetition) => return add_firsts(&repetition.sub, set) && repetition.min > 0,
        HirKind::Concat(parts) => return parts.iter().any(|part| add_firsts(part, set)),
        HirKind::Alternation(parts) => return parts.iter().filter(|part| !add_firsts(part, set)).count() == 0,
    }
    true
}

/// Where matches may begin, of several rules at once.
#[derive(Debug)]
pub(crate) struct Triggers {
    near: Vec<Near>,
    literals: Vec<Literals>,
    first: First,
    /// Whether they begin only where a word of ASCII does.
    at_boundary: bool,
    /// Whether some rule needs nothing.
    anywhere: bool,
}

/// The bytes that matches begin with, to look up many or one.
#[derive(Debug)]
struct First {
    table: Table,
    is: Box<[bool; 256]>,
}

impl First {
    fn new(set: &ByteSet) -> Self {
        Self { table: Table::new(set), is: Box::new(std::array::from_fn(|byte| set.has(byte as u8))) }
    }
}

/// The places of one text where matches may begin.
pub(crate) struct Starts<'t> {
    triggers: &'t Triggers,
    text: &'t [u8],
    /// None where the text is short.
    marks: Option<Marks<'t>>,
}

impl Starts<'_> {
    /// The first of them from `at` on; the text's length if there is none.
    pub fn next(&self, at: usize) -> usize {
        match &self.marks {
            Some(marks) => marks.next(at),
            None => self.triggers.next(self.text, at),
        }
    }
}

/// Literals that are looked for together, and how far they are behind the start of a match.
#[derive(Debug)]
struct Literals {
    probe: Probe,
    reach: usize,
    longest: usize,
}

#[derive(Debug)]
enum Probe {
    Few(Box<packed::Searcher>),
    Many(Grams),
    One(Box<memmem::Finder<'static>>),
}

/// Needs with a longer reach are looked for on their own, or each suspicion of another would cost as much as theirs.
const NEAR: usize = 3;

/// In fewer bytes, trying every place costs less than telling which may be left out.
const SHORT: usize = 32;

/// So many literals are looked for each on its own.
const SEARCHES_MAX: usize = 12;

impl Triggers {
    /// The triggers for rules with these needs and first bytes, and the first bytes of all.
    pub fn new(needs: &[(Option<Need>, ByteSet)], all: &ByteSet, at_boundary: bool) -> Self {
        let (mut bytes, mut parts, mut alone): (Vec<Bytes>, Vec<Need>, usize) = (Vec::new(), Vec::new(), 0);
        for (need, first) in needs {
            for mut need in need.iter().flat_map(split) {
                if !need.bytes.is_empty() {
                    offer(&mut bytes, need.bytes, need.reach, first);
                    continue;
                }
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
        let near = bytes.into_iter().map(Bytes::near).collect();
        let literals = parts.iter().map(Literals::new).collect();
        let anywhere = needs.iter().any(|(need, _)| need.is_none());
        Self { near, literals, first: First::new(all), at_boundary, anywhere }
    }

    /// The triggers for rules whose matches begin with such a run.
    pub fn of_run(run: &Run, first: &ByteSet, at_boundary: bool) -> Self {
        let near = vec![Near::All(Table::new(&run.inside), run.len)];
        Self { near, literals: Vec::new(), first: First::new(first), at_boundary, anywhere: false }
    }

    /// The places of a text, from `from` on, where a match may begin.
    pub fn starts<'t>(&'t self, text: &'t [u8], from: usize, last: bool) -> Starts<'t> {
        let long = text.len() - from >= SHORT;
        Starts { triggers: self, text, marks: long.then(|| self.marks(text, from, last)) }
    }

    fn marks<'t>(&self, text: &'t [u8], from: usize, last: bool) -> Marks<'t> {
        let mut marks = Marks::new(text, from, last);
        if self.anywhere {
            marks.mark_all();
        }
        marks.mark(&self.near);
        self.literals.iter().for_each(|literals| literals.mark(text, from, last, &mut marks));
        marks.keep(&self.first.table, self.at_boundary);
        marks
    }

    /// The first place from `at` on that has a first byte, and is not inside a word where that counts.
    fn next(&self, text: &[u8], at: usize) -> usize {
        let inside = |at: usize| self.at_boundary && at > 0 && is_word(text[at - 1]) && is_word(text[at]);
        (at..text.len()).find(|at| self.first.is[usize::from(text[*at])] && !inside(*at)).unwrap_or(text.len())
    }
}

/// Bytes that matches have, in which reach of their first bytes.
struct Bytes {
    set: ByteSet,
    firsts: Vec<(usize, ByteSet)>,
}

/// Adds a need to those of the same bytes; where there are many others, to the last of them.
fn offer(all: &mut Vec<Bytes>, set: ByteSet, reach: usize, first: &ByteSet) {
    let reach = reach.max(NEAR);
    let full = (all.len() == NEARS_MAX).then_some(NEARS_MAX - 1);
    let Some(at) = all.iter().position(|bytes| bytes.set == set).or(full) else {
        return all.push(Bytes { set, firsts: vec![(reach, *first)] });
    };
    let Bytes { set: all, firsts } = &mut all[at];
    all.union(&set);
    let full = (firsts.len() == NEARS_MAX).then_some(NEARS_MAX - 1);
    match firsts.iter().position(|(other, _)| *other == reach).or(full) {
        Some(at) => {
            firsts[at].0 = reach.max(firsts[at].0);
            firsts[at].1.union(first);
        }
        None => firsts.push((reach, *first)),
    }
}

impl Bytes {
    fn near(mut self) -> Near {
        self.firsts.sort_by_key(|(reach, _)| Reverse(*reach));
        let firsts = self.firsts.iter().map(|(reach, first)| (*reach, Table::new(first)));
        Near::Any(Table::new(&self.set), firsts.collect())
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
    let near = |need: &Need| need.reach <= NEAR;
    a.exact == b.exact && (!a.exact.is_empty() || near(a) == near(b))
}

impl Literals {
    fn new(need: &Need) -> Self {
        let longest = need.literals.iter().chain(&need.exact).map(Vec::len).max().unwrap_or(1);
        if let Some(text) = need.exact.first() {
            let probe = Probe::One(Box::new(memmem::Finder::new(text).into_owned()));
            return Self { probe, reach: need.reach, longest };
        }
        if let Some(few) = few(&need.literals) {
            return Self { probe: Probe::Few(Box::new(few)), reach: need.reach, longest };
        }
        let grams = Grams::new(&need.literals);
        let reach = need.reach + grams.step - 1;
        Self { probe: Probe::Many(grams), reach, longest }
    }

    fn mark(&self, text: &[u8], from: usize, last: bool, marks: &mut Marks<'_>) {
        let mut at = from;
        while let Some(hit) = text.get(at..).and_then(|rest| self.probe.find(rest)) {
            marks.mark_range((at + hit).saturating_sub(self.reach), at + hit);
            at += hit + 1;
        }
        if !last {
            marks.mark_range(text.len().saturating_sub(self.longest - 1 + self.reach), text.len());
        }
    }
}

impl Probe {
    fn find(&self, text: &[u8]) -> Option<usize> {
        match self {
            Self::Few(searcher) => searcher.find(text).map(|found| found.start()),
            Self::Many(grams) => grams.find(text),
            Self::One(finder) => finder.find(text),
        }
    }
}

/// So many short literals are looked for by their first three bytes in either case.
const FEW: usize = 8;

/// A search for a few literals that are too short to be sampled.
fn few(literals: &[Vec<u8>]) -> Option<packed::Searcher> {
    let short = literals.iter().any(|literal| literal.len() < SAMPLED);
    let cases = |literal: &Vec<u8>| {
        let head = [literal[0], literal[1], literal[2]];
        (0..8u8).map(move |upper| [0, 1, 2].map(|at| head[at] & !(fold(0) * (upper >> at & 1))))
    };
    if short && literals.len() <= FEW { packed::Searcher::new(literals.iter().flat_map(cases)) } else { None }
}

/// Literals of so many bytes are found by looking at every third place.
const SAMPLED: usize = 5;

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
        Need::of(&regex_syntax::parse(pattern).unwrap(), 1000, 1)
    }

    fn starts(pattern: &str, text: &str) -> Vec<usize> {
        let hir = regex_syntax::parse(pattern).unwrap();
        let triggers = Triggers::new(&[(need(pattern), firsts(&hir))], &firsts(&hir), false);
        let marks = triggers.marks(text.as_bytes(), 0, true);
        (0..text.len()).filter(|at| marks.next(*at) == *at).collect()
    }

    #[test]
    fn an_address_needs_its_at_sign_and_a_number_its_digits() {
        let mut at = ByteSet::EMPTY;
        at.add(b'@');
        assert_eq!(need("[a-z]{1,64}@[a-z]+"), Some(Need { reach: 64, ..Need::of_bytes(at) }));
        assert_eq!(need("[a-z]{2}[0-9]{2}").unwrap().reach, 2);
        assert_eq!(need("(?i-u)password[a-z]+").unwrap().literals, [b"password".to_vec()]);
        assert_eq!(need("(?:alpha|betas)x?").unwrap().exact, [b"alpha".to_vec(), b"betas".to_vec()]);
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
    fn a_pattern_begins_with_one_of_its_first_bytes() {
        let firsts = |pattern: &str| format!("{:?}", firsts(&regex_syntax::parse(pattern).unwrap()));
        assert_eq!(firsts(r"(?-u:\b)a?(b|c*d)e"), "[('a', 'd')]");
        assert_eq!(firsts(r"\+?\(?\b[0-9]{2}x"), "[('(', '('), ('+', '+'), ('0', '9')]");
        assert_eq!(firsts(r"(?:x{0,2}){2}(?i)y"), "[('Y', 'Y'), ('x', 'y')]");
    }
}
