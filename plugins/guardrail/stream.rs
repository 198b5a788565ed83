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
pub trait Search: Send {
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
        self.enforcing.iter().map(|finder| finder.hold_max()).max().unwrap_or(0)
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
        }
    }

    fn end(&self) -> u64 {
        self.base + self.text.len() as u64
    }

    fn advance(&mut self, window: &Window<'_>) {
        let known = self.found.len();
        let end = window.base + window.text.len() as u64;
        self.decided = self.searches.iter_mut().map(|search| search.advance(window, &mut self.found)).fold(end, u64::min);
        if self.found.len() > known {
            self.found.sort_by(|a, b| (a.range.start, a.rule, a.range.end).cmp(&(b.range.start, b.rule, b.range.end)));
        }
    }

    /// Turns matches that no later one can join into edits, or ends the text.
    fn settle(&mut self, acts: &[Act], window: &Window<'_>, placeholders: &mut Placeholders, progress: &mut Progress) {
        let mut told = 0;
        self.released = self.decided;
        while let Some(first) = self.found.get(told).filter(|found| found.range.start < self.decided) {
            let (group, end) = overlapping(&self.found[told..]);
            if end > self.decided {
                self.released = first.range.start;
                break;
            }
            let blocking = group.iter().find(|found| matches!(acts.get(found.rule), Some(Act::Block)));
            progress.blocked = blocking.map(|found| found.rule);
            progress.found.extend_from_slice(group);
            if progress.blocked.is_some() {
                self.released = first.range.start;
                break;
            }
            progress.edits.extend(edit(first, end, acts, window, placeholders));
            told += group.len();
        }
        self.found.drain(..told);
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

/// The first matches, as long as they overlap, and where they end.
fn overlapping(found: &[Found]) -> (&[Found], u64) {
    let (mut count, mut end) = (0, 0);
    for next in found {
        if count > 0 && next.range.start >= end {
            break;
        }
        count += 1;
        end = end.max(next.range.end);
    }
    (&found[..count], end)
}

fn edit(first: &Found, end: u64, acts: &[Act], window: &Window<'_>, placeholders: &mut Placeholders) -> Option<Edit> {
    let Some(Act::Redact(style)) = acts.get(first.rule) else { return None };
    let range = first.range.start..end;
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
pub(crate) fn patient(at: u64, window: &Window<'_>) -> u64 {
    let end = window.base + window.text.len() as u64;
    let held = end - at;
    if held > IMPATIENT { end + held / 8 } else { 0 }
}
