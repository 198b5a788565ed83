//! The scanner: every rule of one place as one search over a text that may come in pieces, exact however it is cut.
//!
//! # What a match is
//!
//! Each rule is a function of the whole text: going from left to right, it takes the first place where it matches and
//! goes on behind it. No rule hides another's matches. Redactions that overlap become one, named after the one that
//! begins first (of two that begin together, the rule that stands first in the policy); if one of them blocks, all do.
//!
//! # Why pieces do not matter
//!
//! A rule decides about a place only when no further text can change what it says there ([`Search::advance`]): its
//! automaton, started at that place, has died within the text that is there, or the text is at its end. It looks back no
//! further than [`LOOK_BACK`] bytes, and that much is always kept. So the decisions are those that the whole text
//! would bring, in the same order. What is before the first place that some rule has not decided is released, and
//! nothing behind it: exactly the bytes that still are a possible beginning of a match are held, and never more than
//! [`Scanner::hold_max`]. (Where more than [`IMPATIENT`] bytes are held, they are looked at again only after another
//! eighth has come, so that the work stays linear.) A text that is there at once is the same with one piece.
//!
//! Rules that only watch (`flag`, or in `mode: monitor`) hold nothing: they read what was released, as it was before
//! any edit, and what is behind a block they never see.

use std::fmt::Debug;
use std::ops::Range;
use std::sync::Arc;

use super::redact::{Placeholders, Style};

/// How far a rule looks back behind the start of a match, at most: for context words and word boundaries.
pub const LOOK_BACK: usize = 96;

/// More bytes than this are looked at again only when an eighth has been added.
pub const IMPATIENT: u64 = 512;

/// The part of a text that is at hand.
#[derive(Clone, Copy, Debug)]
pub struct Window<'t> {
    /// The text.
    pub text: &'t str,
    /// Where it stands in the whole text.
    pub base: u64,
    /// Whether nothing comes behind it.
    pub last: bool,
}

/// What looks for matches: built once, shared.
pub trait Finder: Debug + Send + Sync {
    /// Begins a text.
    fn begin(self: Arc<Self>) -> Box<dyn Search>;

    /// The most bytes that it ever holds back.
    fn hold_max(&self) -> usize;
}

/// A search through one text.
pub trait Search: Send + Sync {
    /// Finds every match that starts before the place that is returned, in addition to those found before. What it says
    /// must be true for every text that begins with what it was given. With [`Window::last`] it returns the end.
    fn advance(&mut self, window: &Window<'_>, found: &mut Vec<Found>) -> u64;
}

/// A match, in bytes of the whole text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// The rule: its place in the policy's list.
    pub rule: usize,
    /// What was found, like `EMAIL` or a secret's name.
    pub label: Arc<str>,
    /// Where.
    pub range: Range<u64>,
}

/// What the scanner does about a rule's matches.
#[derive(Clone, Debug)]
pub(crate) enum Act {
    /// Tells of them.
    Watch,
    /// Changes them.
    Redact(Style),
    /// Ends the text where the first of them starts.
    Block,
}

/// All rules of one place.
#[derive(Debug)]
pub struct Scanner {
    acts: Vec<Act>,
    enforcing: Vec<Arc<dyn Finder>>,
    watching: Vec<Arc<dyn Finder>>,
}

/// A change of the text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Edit {
    /// The bytes that go.
    pub range: Range<u64>,
    /// What comes in their place.
    pub replacement: String,
}

/// What is known after another piece.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// What is before may leave, edited.
    pub released: u64,
    /// The edits before [`Self::released`] that are new, in order; they do not overlap.
    pub edits: Vec<Edit>,
    /// The matches that are new, of all rules.
    pub found: Vec<Found>,
    /// The text ends at [`Self::released`], by this rule: nothing from there on may leave.
    pub blocked: Option<usize>,
}

impl Scanner {
    pub(crate) fn new(acts: Vec<Act>, enforcing: Vec<Arc<dyn Finder>>, watching: Vec<Arc<dyn Finder>>) -> Self {
        Self { acts, enforcing, watching }
    }

    /// Whether no rule looks here.
    pub fn is_idle(&self) -> bool {
        self.enforcing.is_empty() && self.watching.is_empty()
    }

    /// The most bytes that are ever held back.
    pub fn hold_max(&self) -> usize {
        let one = self.enforcing.iter().map(|finder| finder.hold_max()).max().unwrap_or(0);
        // A match, what overlaps it, and what overlaps that.
        if one > 0 { 2 * one + JOIN_MAX as usize } else { 0 }
    }

    /// Begins a text that comes in pieces.
    pub fn stream(self: &Arc<Self>) -> Stream {
        Stream {
            enforcing: Half::new(&self.enforcing),
            watching: Half::new(&self.watching),
            scanner: Arc::clone(self),
            over: false,
            blocked: None,
        }
    }

    /// What the rules say of a whole text.
    pub fn judge(self: &Arc<Self>, text: &str, placeholders: &mut Placeholders) -> Progress {
        let mut stream = self.stream();
        let mut progress = Progress::default();
        let window = Window { text, base: 0, last: true };
        stream.enforcing.advance(&window);
        stream.enforcing.settle(&self.acts, &window, placeholders, &mut progress);
        let seen = Window { text: &text[..progress.released as usize], ..window };
        stream.watching.advance(&seen);
        stream.watching.tell(&mut progress);
        progress
    }

    /// Whether the rules have nothing to say of a whole text.
    pub fn finds_nothing(self: &Arc<Self>, text: &str) -> bool {
        self.judge(text, &mut Placeholders::default()).found.is_empty()
    }
}

impl Progress {
    /// A whole text, as far as it may leave and as it leaves.
    pub fn apply(&self, text: &str) -> String {
        let mut out = String::with_capacity(text.len());
        let mut at = 0;
        for edit in &self.edits {
            out.push_str(&text[at..edit.range.start as usize]);
            out.push_str(&edit.replacement);
            at = edit.range.end as usize;
        }
        out.push_str(&text[at..self.released as usize]);
        out
    }
}

/// One text that comes in pieces.
pub struct Stream {
    scanner: Arc<Scanner>,
    enforcing: Half,
    watching: Half,
    over: bool,
    blocked: Option<usize>,
}

impl Stream {
    /// Takes the next piece. `progress` is overwritten.
    pub fn push(&mut self, piece: &str, placeholders: &mut Placeholders, progress: &mut Progress) {
        self.take(piece, false, placeholders, progress);
    }

    /// The text is at its end.
    pub fn finish(&mut self, placeholders: &mut Placeholders, progress: &mut Progress) {
        self.take("", true, placeholders, progress);
    }

    /// How many bytes are held back.
    pub fn held(&self) -> u64 {
        self.enforcing.end() - self.enforcing.released
    }

    fn take(&mut self, piece: &str, last: bool, placeholders: &mut Placeholders, progress: &mut Progress) {
        progress.edits.clear();
        progress.found.clear();
        let before = self.enforcing.released;
        (progress.released, progress.blocked) = (before, self.blocked);
        if self.over {
            return;
        }
        let enforcing = &mut self.enforcing;
        enforcing.text.push_str(piece);
        let text = std::mem::take(&mut enforcing.text);
        let window = Window { text: &text, base: enforcing.base, last };
        enforcing.advance(&window);
        enforcing.settle(&self.scanner.acts, &window, placeholders, progress);
        let at = |offset: u64| (offset - window.base) as usize;
        self.blocked = progress.blocked;
        self.over = last || self.blocked.is_some();
        self.watching.read(&text[at(before)..at(progress.released)], self.over, progress);
        self.enforcing.text = text;
        self.enforcing.forget();
    }
}

/// The rules that enforce, or those that watch.
struct Half {
    searches: Vec<Box<dyn Search>>,
    /// What is known and not yet told, by start.
    found: Vec<Found>,
    /// What was not decided yet, and as much before as rules look back.
    text: String,
    base: u64,
    decided: u64,
    released: u64,
    /// The end of the last edit.
    settled: u64,
}

impl Half {
    fn new(finders: &[Arc<dyn Finder>]) -> Self {
        Self {
            searches: finders.iter().map(|finder| Arc::clone(finder).begin()).collect(),
            found: Vec::new(),
            text: String::new(),
            base: 0,
            decided: 0,
            released: 0,
            settled: 0,
        }
    }

    fn end(&self) -> u64 {
        self.base + self.text.len() as u64
    }

    fn advance(&mut self, window: &Window<'_>) {
        let known = self.found.len();
        let end = window.base + window.text.len() as u64;
        self.decided =
            self.searches.iter_mut().map(|search| search.advance(window, &mut self.found)).fold(end, u64::min);
        if self.found.len() > known {
            self.found.sort_by_key(|found| (found.range.start, found.rule, found.range.end));
        }
    }

    /// Turns matches that no later one can join into edits, or ends the text.
    fn settle(&mut self, acts: &[Act], window: &Window<'_>, placeholders: &mut Placeholders, progress: &mut Progress) {
        let mut told = 0;
        self.released = self.decided;
        while let Some(first) = self.found.get(told).filter(|found| found.range.start < self.decided) {
            let (group, end) = overlapping(&self.found[told..]);
            let start = first.range.start.max(self.settled);
            if end > self.decided {
                self.released = start;
                break;
            }
            let blocking = group.iter().find(|found| matches!(acts.get(found.rule), Some(Act::Block)));
            progress.blocked = blocking.map(|found| found.rule);
            progress.found.extend_from_slice(group);
            if progress.blocked.is_some() {
                self.released = start;
                break;
            }
            if end > start {
                progress.edits.extend(edit(first, start..end, acts, window, placeholders));
            }
            self.settled = self.settled.max(end);
            told += group.len();
        }
        if told > 0 {
            self.found.drain(..told);
        }
        progress.released = self.released;
    }

    /// Tells of the matches, and edits nothing.
    fn tell(&mut self, progress: &mut Progress) {
        let told = self.found.iter().take_while(|found| found.range.start < self.decided).count();
        progress.found.extend(self.found.drain(..told));
    }

    /// Reads what was released.
    fn read(&mut self, piece: &str, last: bool, progress: &mut Progress) {
        if self.searches.is_empty() || (piece.is_empty() && !last) {
            return;
        }
        self.text.push_str(piece);
        let text = std::mem::take(&mut self.text);
        self.advance(&Window { text: &text, base: self.base, last });
        self.tell(progress);
        self.released = self.decided;
        self.text = text;
        self.forget();
    }

    /// Forgets what nobody will look at again, now and then.
    fn forget(&mut self) {
        let useless = (self.released.min(self.decided) - self.base) as usize;
        if useless < 4 * LOOK_BACK || useless < self.text.len() / 2 {
            return;
        }
        let cut = self.text.floor_char_boundary(useless - LOOK_BACK - 4);
        self.text.drain(..cut);
        self.base += cut as u64;
    }
}

/// Matches that begin so much later than the first are no longer joined to it, however they overlap: a chain of them
/// would be held without end. Their edit begins where the one before ends.
const JOIN_MAX: u64 = 1024;

/// The first matches, as long as they overlap, and where they end.
fn overlapping(found: &[Found]) -> (&[Found], u64) {
    let (mut count, mut end) = (0, 0);
    let bound = found.first().map_or(0, |first| first.range.start + JOIN_MAX);
    for next in found {
        if count > 0 && (next.range.start >= end || next.range.start >= bound) {
            break;
        }
        count += 1;
        end = end.max(next.range.end);
    }
    (&found[..count], end)
}

fn edit(
    first: &Found,
    range: Range<u64>,
    acts: &[Act],
    window: &Window<'_>,
    placeholders: &mut Placeholders,
) -> Option<Edit> {
    let Some(Act::Redact(style)) = acts.get(first.rule) else { return None };
    let at = |offset: u64| (offset - window.base) as usize;
    let original = window.text.get(at(range.start)..at(range.end))?;
    Some(Edit { replacement: style.replace(&first.label, original, placeholders), range })
}

/// The last [`LOOK_BACK`] bytes of a text, from a letter's start on.
pub(crate) fn look_back(text: &str, end: usize) -> &str {
    let start = text.ceil_char_boundary(end.saturating_sub(LOOK_BACK));
    &text[start.min(end)..end]
}

/// How long the text must be before it is looked at again.
#[inline]
pub(crate) fn patient(at: u64, window: &Window<'_>) -> u64 {
    let end = window.base + window.text.len() as u64;
    let held = end - at;
    if held > IMPATIENT { end + held / 8 } else { 0 }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use regex_automata::meta;

    use super::super::tests::{check_cuts, judged, scanner_of, streamed};
    use super::*;

    const PLACE: &str = "answer.content";

    fn regexes(list: &[&str]) -> String {
        let list = serde_json::to_string(list).unwrap();
        format!(r#"[{{"name":"r","in":["{PLACE}"],"verdict":"redact","regex":{{"list":{list},"window":6}}}}]"#)
    }

    /// Every text of these letters up to a length.
    fn texts(letters: &[char], longest: usize) -> Vec<String> {
        let mut all = vec![String::new()];
        let mut last = 0;
        for _ in 0..longest {
            let next: Vec<String> =
                all[last..].iter().flat_map(|text| letters.iter().map(move |c| format!("{text}{c}"))).collect();
            last = all.len();
            all.extend(next);
        }
        all
    }

    /// Every way to cut a text.
    fn cuts(text: &str) -> impl Iterator<Item = Vec<&str>> {
        let places: Vec<usize> = (1..text.len()).filter(|at| text.is_char_boundary(*at)).collect();
        (0u32..1 << places.len()).map(move |mask| {
            let mut ends = vec![0];
            ends.extend(places.iter().enumerate().filter(|(nth, _)| mask >> nth & 1 == 1).map(|(_, at)| *at));
            ends.push(text.len());
            ends.windows(2).map(|pair| &text[pair[0]..pair[1]]).collect()
        })
    }

    #[test]
    fn every_short_text_in_every_cut_leaves_as_the_whole() {
        let json = format!(
            r#"[{{"name":"a","in":["{PLACE}"],"verdict":"redact","redact":"mask","regex":{{"list":["a{{2,3}}b?"]}}}},
            {{"name":"b","in":["{PLACE}"],"verdict":"redact","regex":{{"list":["\\bb.{{0,2}}é","^b$"],"label":"b"}}}},
            {{"name":"c","in":["{PLACE}"],"verdict":"redact","redact":"drop","words":{{"list":["É a","b"],"label":"c"}}}},
            {{"name":"d","in":["{PLACE}"],"verdict":"block","regex":{{"list":["bab+"],"window":5}}}},
            {{"name":"e","in":["{PLACE}"],"verdict":"flag","words":{{"list":["ab"],"whole":false}}}}]"#
        );
        let scanner = scanner_of(&json, "", PLACE);
        let mut edited = 0;
        for text in texts(&['a', 'b', ' ', 'é'], 5) {
            let progress = scanner.judge(&text, &mut Placeholders::default());
            let expected = progress.apply(&text);
            edited += usize::from(expected != text);
            for pieces in cuts(&text) {
                let (out, all) = streamed(&scanner, &pieces);
                assert_eq!((&out, all.blocked), (&expected, progress.blocked), "{pieces:?}");
                assert_eq!(all.found.len(), progress.found.len(), "{pieces:?}");
            }
        }
        assert!(edited > 500, "{edited} texts show something");
    }

    #[test]
    fn an_expression_finds_what_its_own_engine_finds() {
        for expression in [
            "a{2,3}b?",
            "a|ab",
            "(?:ab|a)(?:c|bcd)?",
            r"a.{0,3}?c",
            r"(?-u:\b)a[bc]{1,2}(?-u:\b)",
            "(?i)[AB]c",
            "^a|c$",
        ] {
            let regex = meta::Regex::new(expression).unwrap();
            let scanner = scanner_of(&regexes(&[expression]), "", PLACE);
            for text in texts(&['a', 'b', 'c', ' '], 6) {
                let found = scanner.judge(&text, &mut Placeholders::default()).found;
                let ours: Vec<Range<u64>> = found.into_iter().map(|found| found.range).collect();
                let theirs: Vec<Range<u64>> =
                    regex.find_iter(&text).map(|found| found.start() as u64..found.end() as u64).collect();
                assert_eq!(ours, theirs, "{expression} in {text:?}");
            }
        }
    }

    #[test]
    fn a_chain_of_matches_that_overlap_is_not_held_without_end() {
        let json = format!(
            r#"[{{"name":"a","in":["{PLACE}"],"verdict":"redact","regex":{{"list":["a[a-z]{{8}}z"],"label":"a"}}}},
            {{"name":"b","in":["{PLACE}"],"verdict":"redact","regex":{{"list":["x[a-z]{{8}}y"],"label":"b"}}}}]"#
        );
        let scanner = scanner_of(&json, "", PLACE);
        // From each a to a z, from each x to a y, without end.
        let text = "abbbyxbbbz".repeat(600);
        let whole = scanner.judge(&text, &mut Placeholders::default());
        assert!(whole.edits.len() > 3 && whole.edits.len() < 20, "{}", whole.edits.len());
        let pieces: Vec<&str> = text.as_bytes().chunks(7).map(|piece| std::str::from_utf8(piece).unwrap()).collect();
        assert_eq!(streamed(&scanner, &pieces), (whole.apply(&text), whole));
    }

    #[test]
    fn words_far_before_count_the_same_though_they_were_forgotten() {
        let secrets = r#""secrets":{"known":false,"gitleaks":"/rules.toml"}"#;
        let json = format!(
            r#"[{{"name":"p","in":["{PLACE}"],"verdict":"redact",{secrets}}},
            {{"name":"f","in":["{PLACE}"],"verdict":"flag",{secrets}}}]"#
        );
        let file = include_str!("../../tests/fixtures/guardrails/gitleaks.toml");
        let scanner = scanner_of(&json, file, PLACE);
        let mut counted = 0;
        for gap in (0..700).step_by(3) {
            let text = format!("{} vault {} 77-55-33.", "né ".repeat(300), "é\n".repeat(gap / 3));
            let whole = scanner.judge(&text, &mut Placeholders::default());
            counted += usize::from(!whole.edits.is_empty());
            for size in [1, 5, 64] {
                let (out, all) = streamed(&scanner, &cut(&text, &[size]));
                assert_eq!((out, all.found.len()), (whole.apply(&text), whole.found.len()), "{gap} in {size}");
            }
        }
        assert!((10..40).contains(&counted), "{counted} of them have the word near");
    }

    #[test]
    fn a_match_is_cut_at_its_window() {
        let (out, progress) = judged(&regexes(&["a[^b]+b"]), PLACE, "a123b a12345b");
        assert_eq!(out, "[PATTERN] a12345b", "{progress:?}");
        check_cuts(&scanner_of(&regexes(&["a[^b]+b"]), "", PLACE), "a123b a12345b aab");
    }

    #[test]
    fn a_long_wait_is_looked_at_again_only_now_and_then_and_ends_the_same() {
        let json = format!(
            r#"[{{"name":"r","in":["{PLACE}"],"verdict":"redact","regex":{{"list":["<[a-z]+>"],"window":4000}}}}]"#
        );
        let scanner = scanner_of(&json, "", PLACE);
        for len in [3000, 5000] {
            let text = format!("x <{}> y", "q".repeat(len));
            let pieces: Vec<&str> =
                text.as_bytes().chunks(7).map(|piece| std::str::from_utf8(piece).unwrap()).collect();
            let whole = scanner.judge(&text, &mut Placeholders::default()).apply(&text);
            assert_eq!(streamed(&scanner, &pieces).0, whole);
            assert_eq!(whole == "x [PATTERN] y", len == 3000);
        }
    }

    /// All kinds at once.
    const ALL: &str = r#"[
        {"name":"pii","in":["answer.content"],"verdict":"redact","pii":{"find":["email","phone","card","iban","ip","url","birth_date"],
            "countries":["au","be","br","ca","ch","de","es","fr","gb","in","it","nl","pl","se","us"]}},
        {"name":"keys","in":["answer.content"],"verdict":"redact","secrets":{"assigned":true}},
        {"name":"words","in":["answer.content"],"verdict":"redact","redact":"mask","words":{"list":["Project Kestrel","straße","σοφός"]}},
        {"name":"raw","in":["answer.content"],"verdict":"redact","words":{"list":["XK7"],"case":true,"whole":false}},
        {"name":"regex","in":["answer.content"],"verdict":"redact","regex":{"list":["(?i)ticket [a-z]{2,4}-\\d{1,6}","\\bé\\w{1,4}"]}},
        {"name":"tags","in":["answer.content"],"verdict":"redact","regex":{"list":["<s>.*?</s>"],"window":40}},
        {"name":"stop","in":["answer.content"],"verdict":"block","words":{"list":["abort now"]}},
        {"name":"loop","in":["answer.content"],"verdict":"block","repetition":{"times":5,"piece_bytes_max":40,"bytes_min":40}},
        {"name":"seen","in":["answer.content"],"verdict":"flag","regex":{"list":["[a-z]{3}\\d"]}}]"#;

    const PARTS: &[&str] = &[
        " ",
        " ",
        " ",
        ", ",
        ". ",
        "\n",
        "-",
        "@",
        "+",
        "(",
        ")",
        ":",
        "the ",
        "call ",
        "phone ",
        "born ",
        "ann",
        "bob@mail.example",
        "4111 1111 1111 1111",
        "4111-1111",
        "378282246310005",
        "GB82 WEST 1234 5698 7654 32",
        "DE89370400440532013000",
        "555-123-4567",
        "+46 (0)179 459 33",
        "078-05-1120",
        "192.168.17.4",
        "2001:db8::8a2e:370:7334",
        "https://a.example/x?y=1",
        "14 March 1987",
        "1987-03-14",
        "12345678Z",
        "AB 12 34 56 C",
        "project ",
        "KESTREL",
        "Kestrel",
        "STRASSE",
        "straße",
        "ΣΟΦΌΣ",
        "XK7",
        "xk7",
        "Ticket ",
        "abc-123",
        "é",
        "éclair",
        "<s>",
        "</s>",
        "abort ",
        "now",
        "again and ",
        "password = ",
        "hunter2hunter2",
        "ghp_",
        "0123456789abcdefABCDEFghijklmnopqrst",
        "AKIA",
        "Z7Q2M4N6P8R3T5V2",
        "-----BEGIN PRIVATE KEY-----",
        "MIIEvQIBADANBgkqhkiG9w0B",
        "eyJhbGciOiJIUzI1NiJ9",
        ".eyJzdWIiOiIxIn0",
        ".c2lnbmF0dXJl",
        "postgres://u:",
        "p4ssw0rd!@h",
        "😀",
        "世界",
        "a1",
        "7",
        "19",
        "2024",
    ];

    fn text() -> impl Strategy<Value = String> {
        proptest::collection::vec((0..PARTS.len()).prop_map(|at| PARTS[at]), 0..40).prop_map(|parts| parts.concat())
    }

    fn cut<'t>(text: &'t str, sizes: &[usize]) -> Vec<&'t str> {
        let (mut pieces, mut at) = (Vec::new(), 0);
        for size in sizes.iter().cycle() {
            if at >= text.len() {
                break;
            }
            let end = text.ceil_char_boundary((at + size).min(text.len()));
            pieces.push(&text[at..end]);
            at = end;
        }
        pieces
    }

    proptest! {
        #[test]
        fn whatever_the_text_and_the_cuts_the_same_leaves(text in text(), sizes in proptest::collection::vec(1usize..24, 1..12)) {
            thread_local!(static SCANNER: Arc<Scanner> = scanner_of(ALL, "", PLACE));
            let scanner = SCANNER.with(Arc::clone);
            let whole = scanner.judge(&text, &mut Placeholders::default());
            let (out, all) = streamed(&scanner, &cut(&text, &sizes));
            prop_assert_eq!(out, whole.apply(&text));
            prop_assert_eq!(all.blocked, whole.blocked);
            let sorted = |mut found: Vec<Found>| {
                found.sort_by_key(|found| (found.range.start, found.range.end, found.rule));
                found
            };
            prop_assert_eq!(sorted(all.found), sorted(whole.found));
        }
    }
}
