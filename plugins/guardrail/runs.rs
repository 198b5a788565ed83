//! Which rules match only where a text has a long run of certain bytes: what secrets and tokens are, and prose is not.
//!
//! A rule whose every match begins with so many bytes without a blank can begin nowhere in a sentence of short words.

use regex_syntax::hir::{Class, Hir, HirKind};

use super::triggers::ByteSet;

/// Shorter runs are too frequent to be worth a look.
const LEN_MIN: usize = 12;

/// Longer ones are hardly rarer.
const LEN_MAX: usize = 32;

/// The run with which every match of some rules begins.
#[derive(Debug)]
pub(crate) struct Run {
    pub len: usize,
    pub inside: ByteSet,
}

impl Run {
    /// The run with which every match of these expressions begins; None if it is short, or if sentences have such runs.
    pub fn of<'a>(hirs: impl Iterator<Item = &'a Hir> + Clone) -> Option<Self> {
        let shortest = hirs.clone().map(|hir| hir.properties().minimum_len().unwrap_or(0)).min()?;
        let len = shortest.min(LEN_MAX);
        let mut set = ByteSet::EMPTY;
        hirs.for_each(|hir| beginning(hir, len, &mut set));
        let rare = len >= LEN_MIN && ![b' ', b'\n'].iter().any(|blank| set.has(*blank));
        rare.then_some(Self { len, inside: set })
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
    use super::*;

    fn run(patterns: &[&str]) -> Option<Run> {
        let hirs: Vec<Hir> = patterns.iter().map(|pattern| regex_syntax::parse(pattern).unwrap()).collect();
        Run::of(hirs.iter())
    }

    #[test]
    fn a_run_is_as_long_as_the_shortest_match_and_has_no_blank() {
        assert_eq!(run(&[r"\bkey-[0-9a-f]{20}", r"\b(?:AB|CDE)[A-Z]{12}"]).unwrap().len, 14);
        for short in [r"key-[0-9]{5}", r"key [0-9]{20}", r"[^x]{20}", r"a{0,30}"] {
            assert!(run(&[r"key-[0-9a-f]{20}", short]).is_none(), "{short}");
        }
        assert!(run(&[r"[0-9]{32} and a blank behind it"]).is_some());
    }
}
