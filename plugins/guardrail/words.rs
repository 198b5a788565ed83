//! Words: a list of literals, any number of them, with or without their case.

use std::path::PathBuf;
use std::sync::Arc;

use aho_corasick::automaton::Automaton;
use aho_corasick::nfa::contiguous;
use aho_corasick::{Anchored, MatchKind};
use schemars::JsonSchema;
use serde::Deserialize;

use super::stream::{Finder, Found, Search, Window, patient};
use super::triggers::{ByteSet, Need, Triggers};
use super::{Detector, World, Wrong};

/// Words and phrases. Upper and lower case count as equal in every alphabet that has them, one letter for one letter
/// (so `ß` is not `SS`); accents count.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Words")]
pub struct Config {
    /// The words.
    #[serde(default)]
    pub list: Vec<String>,
    /// A file with more, one a line; empty lines and those that begin with # do not count.
    #[serde(default)]
    pub file: Option<PathBuf>,
    /// Whether they must be written as they are here.
    #[serde(default)]
    pub case: bool,
    /// Whether they must stand alone: no letter or digit directly before or behind.
    #[serde(default = "yes")]
    pub whole: bool,
    /// What they are called in records, headers and redactions.
    #[serde(default = "word")]
    #[schemars(length(min = 1, max = 40))]
    pub label: String,
}

fn yes() -> bool {
    true
}

fn word() -> String {
    "word".to_owned()
}

/// One literal of one rule.
#[derive(Clone, Debug)]
pub(crate) struct Word {
    pub rule: usize,
    pub label: Arc<str>,
    pub text: String,
    pub case: bool,
    pub whole: bool,
}

/// The longest word, in bytes.
const WORD_MAX: usize = 1024;

pub(super) fn build(config: &Config, rule: usize, world: &mut World<'_>) -> Result<Detector, Vec<Wrong>> {
    let mut wrong = Vec::new();
    let mut texts = config.list.clone();
    match config.file.as_deref().map(|path| (world.file)(path)) {
        Some(Ok(lines)) => texts.extend(lines.lines().map(str::trim).filter(|line| counts(line)).map(str::to_owned)),
        Some(Err(message)) => wrong.push((".file".to_owned(), message)),
        None if texts.is_empty() => wrong.push((".list".to_owned(), "no words: give a list or a file".to_owned())),
        None => {}
    }
    for (index, text) in texts.iter().enumerate() {
        if text.trim().is_empty() || text.len() > WORD_MAX {
            wrong.push((format!(".list[{index}]"), format!("a word has 1 to {WORD_MAX} bytes and is not blank")));
        }
    }
    let label: Arc<str> = config.label.as_str().into();
    let word = |text| Word { rule, label: Arc::clone(&label), text, case: config.case, whole: config.whole };
    if wrong.is_empty() { Ok(Detector::Words(texts.into_iter().map(word).collect())) } else { Err(wrong) }
}

fn counts(line: &str) -> bool {
    !line.is_empty() && !line.starts_with('#')
}

/// All words of a place that share the same sense of case.
#[derive(Debug)]
pub(crate) struct Words {
    words: Vec<Word>,
    /// The same length for each, folded.
    lengths: Vec<usize>,
    tree: contiguous::NFA,
    folded: bool,
    triggers: Triggers,
    whole: bool,
    longest: usize,
}

/// The letter that stands for both cases. ASCII stays among itself: the triggers rely on it.
fn fold(c: char) -> char {
    if c.is_ascii() {
        return c.to_ascii_lowercase();
    }
    let mut lower = c.to_lowercase();
    match (lower.next(), lower.next()) {
        (Some(one), None) if !one.is_ascii() => one,
        _ => c,
    }
}

impl Words {
    /// Makes one search of words that all mind their case, or all do not.
    pub fn new(words: Vec<Word>) -> Result<Self, String> {
        let folded = words.iter().any(|word| !word.case);
        let keys: Vec<String> = words.iter().map(|word| key(&word.text, folded)).collect();
        let tree = contiguous::Builder::new()
            .match_kind(MatchKind::LeftmostLongest)
            .build(&keys)
            .map_err(|error| error.to_string())?;
        let first = firsts(&keys, folded);
        // The other case of some letters is not a byte away from it; such words are looked for everywhere.
        let plain = keys.iter().all(|key| !folded || key.is_ascii());
        let need = |key: &String| (Need::of_literal(key.as_bytes(), folded, keys.len()).filter(|_| plain), first);
        let needs: Vec<_> = keys.iter().map(need).collect();
        let longest = keys.iter().map(|key| key.chars().count() * 4).max().unwrap_or(0).min(4 * WORD_MAX);
        Ok(Self {
            lengths: keys.iter().map(String::len).collect(),
            triggers: Triggers::new(&needs, &first, false),
            whole: words.iter().all(|word| word.whole),
            words,
            tree,
            folded,
            longest,
        })
    }
}

fn key(text: &str, folded: bool) -> String {
    if folded { text.chars().map(fold).collect() } else { text.to_owned() }
}

/// The bytes that a word may begin with, in either case.
fn firsts(keys: &[String], folded: bool) -> ByteSet {
    let mut first = ByteSet::EMPTY;
    let lead = |c: char| c.encode_utf8(&mut [0; 4]).as_bytes()[0];
    for c in keys.iter().filter_map(|key| key.chars().next()) {
        first.add(lead(c));
        if folded && c.is_ascii() {
            first.add(lead(c.to_ascii_uppercase()));
        } else if folded {
            (0xc2..=0xf4u8).for_each(|byte| first.add(byte));
        }
    }
    first
}

impl Finder for Words {
    fn begin(self: Arc<Self>) -> Box<dyn Search> {
        Box::new(Reading { words: self, at: 0, patience: 0, looks: Looks::default() })
    }

    fn hold_max(&self) -> usize {
        self.longest + 4
    }
}

struct Reading {
    words: Arc<Words>,
    at: u64,
    patience: u64,
    looks: Looks,
}

/// What was seen at a place.
#[derive(Default)]
struct Looks {
    /// The rules that have a match which goes on behind the place, and where it ends.
    until: Vec<(usize, u64)>,
    /// The words that match at the place at hand, and where they end; for each rule the longest.
    matching: Vec<(usize, usize)>,
}

impl Search for Reading {
    fn advance(&mut self, window: &Window<'_>, found: &mut Vec<Found>) -> u64 {
        let len = window.text.len();
        if !window.last && window.base + (len as u64) < self.patience {
            return self.at;
        }
        let words = &*self.words;
        let mut start = (self.at - window.base) as usize;
        let starts = words.triggers.starts(window.text.as_bytes(), start, window.last);
        loop {
            start = starts.next(start);
            if start >= len || !self.looks.look(words, window, start) {
                break;
            }
            self.looks.note(words, window, start, found);
            start += 1;
        }
        self.at = window.base + start.min(len) as u64;
        self.patience = patient(self.at, window);
        self.at
    }
}

impl Looks {
    /// Walks the tree from a place; false if more text may change what is found.
    fn look(&mut self, words: &Words, window: &Window<'_>, start: usize) -> bool {
        self.matching.clear();
        let bytes = window.text.as_bytes();
        if !window.text.is_char_boundary(start) || (words.whole && !free_before(window.text, start)) {
            return true;
        }
        let Ok(mut state) = words.tree.start_state(Anchored::Yes) else { return true };
        let (mut at, mut len) = (start, 0);
        for c in window.text[start..].chars() {
            let c = if words.folded { fold(c) } else { c };
            for byte in c.encode_utf8(&mut [0; 4]).bytes() {
                state = words.tree.next_state(Anchored::Yes, state, byte);
                len += 1;
            }
            at += c_len(bytes[at]);
            if words.tree.is_dead(state) {
                return true;
            }
            if words.tree.is_match(state) && !self.keep(words, window, state, (start, at, len)) {
                return false;
            }
        }
        window.last
    }

    /// Keeps the words that end here; false if it cannot be said yet whether one stands alone.
    fn keep(
        &mut self,
        words: &Words,
        window: &Window<'_>,
        state: aho_corasick::automaton::StateID,
        (start, at, len): (usize, usize, usize),
    ) -> bool {
        for nth in 0..words.tree.match_len(state) {
            let index = words.tree.match_pattern(state, nth).as_usize();
            let Some(word) = words.words.get(index).filter(|_| words.lengths[index] == len) else { continue };
            if word.whole {
                match window.text[at..].chars().next() {
                    None if !window.last => return false,
                    Some(c) if c.is_alphanumeric() => continue,
                    _ if !free_before(window.text, start) => continue,
                    _ => {}
                }
            }
            self.matching.retain(|(other, _)| words.words[*other].rule != word.rule);
            self.matching.push((index, at));
        }
        true
    }

    fn note(&mut self, words: &Words, window: &Window<'_>, start: usize, found: &mut Vec<Found>) {
        if self.matching.is_empty() {
            return;
        }
        let here = window.base + start as u64;
        self.until.retain(|(_, end)| *end > here);
        for (index, end) in self.matching.drain(..) {
            let word = &words.words[index];
            if self.until.iter().any(|(rule, _)| *rule == word.rule) {
                continue;
            }
            let end = window.base + end as u64;
            self.until.push((word.rule, end));
            found.push(Found { rule: word.rule, label: Arc::clone(&word.label), range: here..end });
        }
    }
}

/// The length of the letter that begins with this byte.
fn c_len(lead: u8) -> usize {
    match lead {
        0..0xc0 => 1,
        0xc0..0xe0 => 2,
        0xe0..0xf0 => 3,
        _ => 4,
    }
}

/// Whether no letter or digit stands directly before.
fn free_before(text: &str, start: usize) -> bool {
    !text[..start].chars().next_back().is_some_and(char::is_alphanumeric)
}

#[cfg(test)]
mod tests {
    use super::super::tests::{built, built_with, judged, same_however_cut};

    fn rule(words: &str) -> String {
        format!(r#"[{{"name":"w","in":["answer.content"],"verdict":"redact","words":{words}}}]"#)
    }

    fn out(words: &str, text: &str) -> String {
        same_however_cut(&rule(words), "answer.content", text);
        judged(&rule(words), "answer.content", text).0
    }

    #[test]
    fn case_does_not_count_in_any_alphabet() {
        let words = r#"{"list":["Straße","Σοφός","ЁЛКА","kelvin"]}"#;
        let text = "STRAßE σοφόσ ёлка KELVIN";
        assert_eq!(out(words, "straße Ёлка Kelvin"), "[WORD] [WORD] [WORD]");
        assert_eq!(out(words, text), "[WORD] σοφόσ [WORD] [WORD]", "a final sigma is another letter");
        assert_eq!(out(r#"{"list":["Kelvin"],"case":true}"#, "kelvin Kelvin"), "kelvin [WORD]");
    }

    #[test]
    fn words_stand_alone_unless_told_otherwise() {
        assert_eq!(
            out(r#"{"list":["cat"]}"#, "cat concat cats (cat) écat cat9"),
            "[WORD] concat cats ([WORD]) écat cat9"
        );
        assert_eq!(out(r#"{"list":["cat"],"whole":false}"#, "concat cats"), "con[WORD] [WORD]s");
    }

    #[test]
    fn the_longest_word_counts() {
        assert_eq!(out(r#"{"list":["a","a b","a b c d"],"label":"x"}"#, "a b c e a b c d a"), "[X] c e [X] [X]");
    }

    #[test]
    fn many_words_are_as_good_as_few() {
        let list: Vec<String> = (0..5000).map(|n| format!("word number {n}")).collect();
        let json = rule(&format!(r#"{{"list":{}}}"#, serde_json::to_string(&list).unwrap()));
        let (out, progress) =
            judged(&json, "answer.content", "a word number 4711, Word Number 12345 and word number 0");
        assert_eq!((out.as_str(), progress.found.len()), ("a [WORD], Word Number 12345 and [WORD]", 2));
    }

    #[test]
    fn a_file_has_one_word_a_line() {
        let json = rule(r#"{"file":"/words"}"#);
        let file = "# comment\n  one\n\ntwo three\n";
        let (out, _) = super::super::tests::judged_with(&json, file, "answer.content", "one, two three # comment");
        assert_eq!(out, "[WORD], [WORD] # comment");
        assert!(built_with(&rule(r#"{"list":[" "]}"#), "").unwrap_err()[0].0.ends_with(".list[0]"));
        assert!(built(&rule("{}")).unwrap_err()[0].1.contains("no words"));
    }
}
