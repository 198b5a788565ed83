//! Where a text has a long run of certain bytes: what secrets and tokens are, and prose is not.
//!
//! A rule whose every match begins with so many bytes without a blank can begin nowhere in a sentence of short words.
//! Such runs are found by looking only at every n-th byte and from there back, as Boyer and Moore do: a blank within
//! reach excludes all places up to it.

use regex_syntax::hir::{Class, Hir, HirKind};

use super::triggers::ByteSet;

/// Shorter runs are too frequent to be worth a look.
const LEN_MIN: usize = 12;

/// Longer ones are hardly rarer.
const LEN_MAX: usize = 32;

/// The run with which every match of some rules begins.
#[derive(Debug)]
pub(crate) struct Runs {
    len: usize,
    inside: Box<[bool; 256]>,
}

impl Runs {
    /// The run with which every match of these expressions begins; None if it is short, or if sentences have such runs.
    pub fn of<'a>(hirs: impl Iterator<Item = &'a Hir> + Clone) -> Option<Self> {
        let shortest = hirs.clone().map(|hir| hir.properties().minimum_len().unwrap_or(0)).min()?;
        let len = shortest.min(LEN_MAX);
        let mut set = ByteSet::EMPTY;
        hirs.for_each(|hir| beginning(hir, len, &mut set));
        let rare = len >= LEN_MIN && ![b' ', b'\n'].iter().any(|blank| set.has(*blank));
        rare.then(|| Self { len, inside: Box::new(std::array::from_fn(|byte| set.has(byte as u8))) })
    }

    /// The first place from `from` on where a match may begin (or the text's length), and the last place behind it up
    /// to which that is true of every place. While more text may come, the run at its end counts, however short.
    pub fn next(&self, text: &[u8], from: usize, last: bool) -> (usize, usize) {
        let outside = |byte: &u8| !self.inside[usize::from(*byte)];
        let mut start = from;
        while start < text.len() {
            let end = text.len().min(start + self.len);
            match text[start..end].iter().rposition(outside) {
                Some(at) => start += at + 1,
                None if end - start < self.len && last => break,
                None => {
                    let more = text[end..].iter().position(outside);
                    let run = more.map_or(text.len(), |more| end + more);
                    let open = run == text.len() && !last;
                    return (start, if open { run } else { run - self.len });
                }
            }
        }
        (text.len(), text.len())
    }
}

/// Adds to `set` whatever may stand in the first `len` bytes of a match.
fn beginning(hir: &Hir, len: usize, set: &mut ByteSet) {
    match hir.kind() {
        HirKind::Empty | HirKind::Look(_) => {}
        HirKind::Literal(literal) => literal.0.iter().take(len).for_each(|byte| set.add(*byte)),
        HirKind::Class(class) if len > 0 => all_bytes(class, set),
        HirKind::Class(_) => {}
        HirKind::Capture(capture) => beginning(&capture.sub, len, set),
        HirKind::Repetition(repetition) => beginning(&repetition.sub, len, set),
        HirKind::Alternation(parts) => parts.iter().for_each(|part| beginning(part, len, set)),
        HirKind::Concat(parts) => {
            let mut at = 0;
            for part in parts {
                beginning(part, len - at, set);
                at = len.min(at + part.properties().minimum_len().unwrap_or(0));
            }
        }
    }
}

/// Adds every byte that something of this class may have.
fn all_bytes(class: &Class, set: &mut ByteSet) {
    let mut add = |low: u8, high: u8| (low..=high).for_each(|byte| set.add(byte));
    match class {
        Class::Bytes(class) => class.iter().for_each(|range| add(range.start(), range.end())),
        Class::Unicode(class) => {
            for range in class.iter() {
                let ascii = |c: char| u8::try_from(c).unwrap_or(u8::MAX).min(0x7f);
                if range.start().is_ascii() {
                    add(ascii(range.start()), ascii(range.end()));
                }
                if !range.end().is_ascii() {
                    add(0x80, u8::MAX);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn runs(patterns: &[&str]) -> Option<Runs> {
        let hirs: Vec<Hir> = patterns.iter().map(|pattern| regex_syntax::parse(pattern).unwrap()).collect();
        Runs::of(hirs.iter())
    }

    #[test]
    fn a_run_is_as_long_as_the_shortest_match_and_has_no_blank() {
        assert_eq!(runs(&[r"\bkey-[0-9a-f]{20}", r"\b(?:AB|CDE)[A-Z]{12}"]).unwrap().len, 14);
        for short in [r"key-[0-9]{5}", r"key [0-9]{20}", r"[^x]{20}", r"a{0,30}"] {
            assert!(runs(&[r"key-[0-9a-f]{20}", short]).is_none(), "{short}");
        }
        assert!(runs(&[r"[0-9]{32} and a blank behind it"]).is_some());
    }

    #[test]
    fn prose_has_no_place_where_one_may_begin() {
        let runs = runs(&["[a-z]{14}"]).unwrap();
        let prose = "The committee met again on Thursday, and nobody was surprised.".repeat(3);
        for last in [true, false] {
            assert_eq!(runs.next(prose.as_bytes(), 0, last).0, prose.len());
        }
    }

    proptest! {
        #[test]
        fn every_place_where_a_match_may_begin_is_told_and_no_other(text in "[ab ]{0,80}", from in 0usize..80) {
            let runs = runs(&["[ab]{12}"]).unwrap();
            let bytes = text.as_bytes();
            for last in [true, false] {
                let (mut at, mut told) = (from.min(text.len()), vec![]);
                while at < text.len() {
                    let (first, last) = runs.next(bytes, at, last);
                    told.extend(first..=last);
                    at = last.max(first) + 1;
                }
                told.retain(|at| *at < text.len());
                let may = |at: &usize| {
                    let run = &bytes[*at..text.len().min(at + 12)];
                    !run.contains(&b' ') && (run.len() == 12 || !last)
                };
                prop_assert_eq!(told, (from.min(text.len())..text.len()).filter(may).collect::<Vec<_>>());
            }
        }
    }
}
