//! Text to the ids of the embedding's table: BERT's uncased WordPiece over `model/vocab.txt`.
//!
//! The same ids as Hugging Face's `BertNormalizer`, `BertPreTokenizer` and `WordPiece` give, but for text such as
//! `[CLS]`, which is text here and never a special token. Nothing is allocated, and nothing is read twice: a word's
//! hash grows with the word.

use std::ops::ControlFlow;
use std::sync::LazyLock;

use unicode_normalization::char::decompose_canonical;
use unicode_properties::{GeneralCategory, GeneralCategoryGroup, UnicodeGeneralCategory};

/// The id of a word that the vocabulary has no pieces for.
pub const UNKNOWN: u16 = 100;

/// How many ids there are.
pub(super) const IDS: usize = 30_522;

/// A word of more characters is unknown, whatever it is made of.
const WORD_CHARS: usize = 100;

/// The longest piece, in bytes without its `##`.
const LONGEST: usize = 18;

static VOCABULARY: LazyLock<Vocabulary> = LazyLock::new(|| Vocabulary::of(include_str!("model/vocab.txt")));

/// Hands the ids of `text` to `emit`, in order, until it breaks.
pub fn each(text: &str, emit: impl FnMut(u16) -> ControlFlow<()>) -> ControlFlow<()> {
    let mut words = Words { vocabulary: &VOCABULARY, word: Word::new(), emit };
    let bytes = text.as_bytes();
    let mut at = 0;
    while let Some(&byte) = bytes.get(at) {
        at += 1;
        match ASCII[usize::from(byte)] {
            DROPPED => {}
            SPACE => words.end()?,
            MARK => words.alone(char::from(byte))?,
            WIDE => {
                let wide = text.get(at - 1..).and_then(|rest| rest.chars().next()).unwrap_or('\u{fffd}');
                at += wide.len_utf8() - 1;
                words.wide(wide)?;
            }
            _ => at += words.word.letters(&bytes[at - 1..]) - 1,
        }
    }
    words.end()
}

/// Whether the vocabulary has this lower-case word whole.
pub(super) fn is_word(word: &str) -> bool {
    VOCABULARY.find(hashed(WHOLE, word.as_bytes()), word.as_bytes(), WHOLE).is_some()
}

/// Whether no word goes on over this character, whatever is around it.
pub(super) fn parts_words(letter: char) -> bool {
    matches!(letter, ' ' | '\n' | '\t' | '\r') || letter.is_ascii_punctuation() || is_ideograph(letter)
}

/// Gets the vocabulary ready, which the first text would otherwise wait for.
pub(super) fn prepare() {
    LazyLock::force(&VOCABULARY);
}

fn is_letter(byte: u8) -> bool {
    ASCII[usize::from(byte)] > WIDE
}

const DROPPED: u8 = 0;
const SPACE: u8 = 1;
const MARK: u8 = 2;
const WIDE: u8 = 3;

/// What each byte is; what is none of the above is a letter, and this is its lower case.
static ASCII: [u8; 256] = {
    let mut table = [WIDE; 256];
    let mut at = 0;
    while at < 128 {
        let byte = at as u8;
        table[at] = match byte {
            b' ' | b'\t' | b'\n' | b'\r' => SPACE,
            _ if byte.is_ascii_control() => DROPPED,
            _ if byte.is_ascii_punctuation() => MARK,
            _ => byte.to_ascii_lowercase(),
        };
        at += 1;
    }
    table
};

/// The word that is being read, and where its ids go.
struct Words<'a, F> {
    vocabulary: &'a Vocabulary,
    word: Word,
    emit: F,
}

impl<F: FnMut(u16) -> ControlFlow<()>> Words<'_, F> {
    fn end(&mut self) -> ControlFlow<()> {
        if self.word.chars == 0 {
            return ControlFlow::Continue(());
        }
        let flow = self.vocabulary.pieces(&self.word, &mut self.emit);
        self.word.clear();
        flow
    }

    /// A character that is a word by itself.
    fn alone(&mut self, mark: char) -> ControlFlow<()> {
        self.end()?;
        self.word.push(mark);
        self.end()
    }

    /// Beyond ASCII: controls go, accents go, ideographs stand alone.
    fn wide(&mut self, wide: char) -> ControlFlow<()> {
        if is_dropped(wide) {
            return ControlFlow::Continue(());
        }
        if wide.is_whitespace() {
            return self.end();
        }
        let ideograph = is_ideograph(wide);
        if ideograph {
            self.end()?;
        }
        let mut flow = ControlFlow::Continue(());
        decompose_canonical(wide, |part| {
            if flow.is_continue() {
                flow = self.part(part);
            }
        });
        flow?;
        if ideograph { self.end() } else { flow }
    }

    fn part(&mut self, part: char) -> ControlFlow<()> {
        if part.general_category() == GeneralCategory::NonspacingMark {
            return ControlFlow::Continue(());
        }
        for lower in part.to_lowercase() {
            if is_punctuation(lower) {
                self.alone(lower)?;
            } else {
                self.word.push(lower);
            }
        }
        ControlFlow::Continue(())
    }
}

fn is_dropped(wide: char) -> bool {
    use GeneralCategory::{Control, Format, PrivateUse, Surrogate};
    wide == '\u{fffd}' || matches!(wide.general_category(), Control | Format | PrivateUse | Surrogate)
}

fn is_punctuation(letter: char) -> bool {
    letter.is_ascii_punctuation() || letter.general_category_group() == GeneralCategoryGroup::Punctuation
}

fn is_ideograph(wide: char) -> bool {
    matches!(u32::from(wide),
        0x4E00..=0x9FFF | 0x3400..=0x4DBF | 0x20000..=0x2A6DF | 0x2A700..=0x2B73F | 0x2B740..=0x2B81F
        | 0x2B920..=0x2CEAF | 0xF900..=0xFAFF | 0x2F800..=0x2FA1F)
}

/// A word in lower case, and the hash of it so far.
struct Word {
    bytes: [u8; 4 * WORD_CHARS],
    len: usize,
    chars: usize,
    hash: u64,
}

impl Word {
    fn new() -> Self {
        Self { bytes: [0; 4 * WORD_CHARS], len: 0, chars: 0, hash: WHOLE }
    }

    fn clear(&mut self) {
        (self.len, self.chars, self.hash) = (0, 0, WHOLE);
    }

    /// The letters that `text` begins with; returns how many.
    fn letters(&mut self, text: &[u8]) -> usize {
        let room = WORD_CHARS.saturating_sub(self.chars);
        let (mut kept, mut hash) = (0, self.hash);
        for (slot, byte) in self.bytes[self.len..].iter_mut().zip(&text[..room.min(text.len())]) {
            let letter = ASCII[usize::from(*byte)];
            if letter <= WIDE {
                break;
            }
            *slot = letter;
            hash = step(hash, letter);
            kept += 1;
        }
        // Of a word that is too long, nothing matters but where it ends.
        let beyond = if kept < room { 0 } else { text[kept..].iter().take_while(|byte| is_letter(**byte)).count() };
        self.hash = hash;
        self.len += kept;
        self.chars += kept + beyond;
        kept + beyond
    }

    fn push(&mut self, letter: char) {
        if self.chars < WORD_CHARS {
            letter.encode_utf8(&mut [0; 4]).bytes().for_each(|byte| self.keep(byte));
        }
        self.chars += 1;
    }

    fn keep(&mut self, byte: u8) {
        if let Some(slot) = self.bytes.get_mut(self.len) {
            *slot = byte;
            self.len += 1;
            self.hash = step(self.hash, byte);
        }
    }

    /// The word, unless it is too long to be one.
    fn whole(&self) -> Option<&[u8]> {
        if self.chars <= WORD_CHARS { self.bytes.get(..self.len) } else { None }
    }
}

/// Where a hash starts: at a word's beginning, or in a word.
const WHOLE: u64 = 0xCBF2_9CE4_8422_2325;
const WITHIN: u64 = 0x8422_2325_CBF2_9CE4;

fn step(hash: u64, byte: u8) -> u64 {
    (hash ^ u64::from(byte)).wrapping_mul(0x9E37_79B9_7F4A_7C15)
}

fn hashed(start: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(start, |hash, byte| step(hash, *byte))
}

const SLOTS: usize = 1 << 16;
const EMPTY: u32 = u32::MAX;

/// The pieces, found by hash: an open table whose slots hold 16 bits of the hash beside the id.
struct Vocabulary {
    text: &'static [u8],
    ends: Vec<u32>,
    slots: Vec<u32>,
}

impl Vocabulary {
    fn of(text: &'static str) -> Self {
        let mut built = Self { text: text.as_bytes(), ends: Vec::with_capacity(IDS + 1), slots: vec![EMPTY; SLOTS] };
        built.ends.push(0);
        for line in text.split_inclusive('\n').take(IDS) {
            let id = built.ends.len() as u32 - 1;
            built.ends.push(built.ends[id as usize] + line.len() as u32);
            let line = line.trim_end_matches('\n');
            built.insert(id, line.strip_prefix("##").map_or((WHOLE, line), |piece| (WITHIN, piece)));
        }
        built
    }

    fn insert(&mut self, id: u32, (start, piece): (u64, &str)) {
        let hash = hashed(start, piece.as_bytes());
        let mut at = home(hash);
        while self.slots[at] != EMPTY {
            at = (at + 1) % SLOTS;
        }
        self.slots[at] = tag(hash) | id;
    }

    fn find(&self, hash: u64, piece: &[u8], start: u64) -> Option<u16> {
        let mut at = home(hash);
        loop {
            let slot = self.slots[at];
            if slot == EMPTY {
                return None;
            }
            let id = slot as u16;
            if slot & TAG == tag(hash) && self.is(id, piece, start) {
                return Some(id);
            }
            at = (at + 1) % SLOTS;
        }
    }

    fn is(&self, id: u16, piece: &[u8], start: u64) -> bool {
        let id = usize::from(id);
        let (from, to) = (self.ends[id] as usize, self.ends[id + 1] as usize - 1);
        let from = if start == WITHIN { from + 2 } else { from };
        self.text.get(from..to) == Some(piece)
    }

    fn pieces(&self, word: &Word, emit: &mut impl FnMut(u16) -> ControlFlow<()>) -> ControlFlow<()> {
        let Some(bytes) = word.whole() else { return emit(UNKNOWN) };
        if bytes.len() <= LONGEST
            && let Some(id) = self.find(word.hash, bytes, WHOLE)
        {
            return emit(id);
        }
        let mut found = [0; 4 * WORD_CHARS];
        match self.split(bytes, &mut found) {
            Some(count) => found.iter().take(count).try_for_each(|id| emit(*id)),
            None => emit(UNKNOWN),
        }
    }

    /// The longest piece, then the longest of what is left, and so on; all of it or nothing.
    fn split(&self, mut rest: &[u8], found: &mut [u16]) -> Option<usize> {
        let (mut start, mut count) = (WHOLE, 0);
        while !rest.is_empty() {
            let (id, len) = self.longest(rest, start)?;
            *found.get_mut(count)? = id;
            count += 1;
            rest = rest.get(len..)?;
            start = WITHIN;
        }
        Some(count)
    }

    fn longest(&self, rest: &[u8], start: u64) -> Option<(u16, usize)> {
        let mut hashes = [0; LONGEST];
        let mut hash = start;
        for (slot, byte) in hashes.iter_mut().zip(rest) {
            hash = step(hash, *byte);
            *slot = hash;
        }
        let reach = rest.len().min(LONGEST);
        (1..=reach).rev().find_map(|len| Some((self.find(hashes[len - 1], &rest[..len], start)?, len)))
    }
}

const TAG: u32 = 0xFFFF_0000;

fn home(hash: u64) -> usize {
    (hash >> 48) as usize
}

fn tag(hash: u64) -> u32 {
    (hash >> 16) as u32 & TAG
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::semantic::tests::golden;

    fn ids(text: &str) -> Vec<u16> {
        let mut ids = Vec::new();
        let _ = each(text, |id| {
            ids.push(id);
            ControlFlow::Continue(())
        });
        ids
    }

    #[test]
    fn the_golden_texts_have_their_ids() {
        for case in golden() {
            assert_eq!(ids(&case.text), case.ids, "{:?}", case.text);
        }
    }

    #[test]
    fn every_entry_of_the_vocabulary_is_found_under_its_own_id() {
        let lines: Vec<&str> = include_str!("model/vocab.txt").lines().collect();
        assert_eq!(lines.len(), IDS);
        for (id, line) in lines.iter().enumerate() {
            let (start, piece) = line.strip_prefix("##").map_or((WHOLE, *line), |piece| (WITHIN, piece));
            assert!(piece.len() <= LONGEST, "{line}");
            let bytes = piece.as_bytes();
            assert_eq!(VOCABULARY.find(hashed(start, bytes), bytes, start), Some(id as u16), "{line}");
        }
    }

    #[test]
    fn a_word_of_a_hundred_characters_is_read_and_a_longer_one_is_unknown() {
        assert_ne!(ids(&"a".repeat(100)), [UNKNOWN]);
        assert_eq!(ids(&"a".repeat(101)), [UNKNOWN]);
        assert_eq!(ids(&format!("{} b", "é".repeat(101))), [UNKNOWN, ids("b")[0]]);
    }

    #[test]
    fn controls_join_and_spaces_part() {
        assert_eq!(ids("he\u{0}l\u{200b}lo"), ids("hello"));
        assert_eq!(ids("hello\u{a0}world\u{2003}"), ids("hello world"));
        assert_eq!(ids("HÉLLO"), ids("hello"));
        assert_eq!(ids("東京"), ids("東 京"));
    }

    #[test]
    fn reading_stops_where_the_caller_stops() {
        let mut seen = 0;
        let flow = each("one two three", |_| {
            seen += 1;
            if seen == 2 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        assert_eq!((flow, seen), (ControlFlow::Break(()), 2));
    }
}
