//! Regular expressions as one search: a single automaton for all of them decides what is alive, the expression itself
//! decides where its match ends.
//!
//! At each place where a match may begin (see [`Triggers`]), the joint automaton runs until it dies. It is built lazily,
//! so its size is bounded whatever the expressions are. While it lives at the end of the text at hand, the place is
//! undecided. When it has died, it knows which expressions match there, and only those are asked for the extent of their
//! match: the first one that a backtracking engine would find, as everybody expects. A [`Judge`] may then refuse it
//! (checksums, context) or take a part of it.

use std::fmt::Debug;
use std::panic::{RefUnwindSafe, UnwindSafe};
use std::sync::Arc;

use regex_automata::hybrid::LazyStateID;
use regex_automata::hybrid::dfa::{Cache, DFA};
use regex_automata::nfa::thompson::NFA;
use regex_automata::util::pool::Pool;
use regex_automata::util::{start, syntax};
use regex_automata::{Anchored, Input, MatchKind, meta};
use regex_syntax::hir::Hir;

use super::marks::is_word;
use super::runs::Run;
use super::stream::{Finder, Found, IMPATIENT, Search, Window, look_back, patient};
use super::triggers::{ByteSet, Need, Triggers, firsts};

/// One expression.
#[derive(Clone, Debug)]
pub(crate) struct Pattern {
    pub rule: usize,
    pub label: Arc<str>,
    hir: Hir,
    regex: meta::Regex,
    /// The group that is the match; 0 is all.
    group: usize,
    /// Longer matches are cut here.
    window: usize,
    /// Whether only the window ends it.
    unbounded: bool,
}

/// The first group that matched something, or all where none did.
pub(crate) const FIRST_GROUP: usize = usize::MAX;

/// The longest match that a policy may ask for.
pub(crate) const WINDOW_MAX: usize = 65_536;

impl Pattern {
    /// Reads an expression, or says what is wrong with it.
    pub fn new(
        rule: usize,
        label: &str,
        expression: &str,
        window: Option<usize>,
        group: usize,
    ) -> Result<Self, String> {
        Self::parse(rule, label, expression, window, group, syntax::Config::new().utf8(true))
    }

    /// The same for bytes, as those write expressions who think of ASCII only: `\w` is `[0-9A-Za-z_]`.
    pub fn ascii(
        rule: usize,
        label: &str,
        expression: &str,
        window: Option<usize>,
        group: usize,
    ) -> Result<Self, String> {
        Self::parse(rule, label, expression, window, group, syntax::Config::new().unicode(false).utf8(false))
    }

    fn parse(
        rule: usize,
        label: &str,
        expression: &str,
        window: Option<usize>,
        group: usize,
        config: syntax::Config,
    ) -> Result<Self, String> {
        let expression = ascii_boundaries(expression);
        let hir = syntax::parse_with(&expression, &config).map_err(|error| error.to_string())?;
        let properties = hir.properties();
        if properties.minimum_len().is_none_or(|len| len == 0) {
            return Err("it matches the empty text, and so everywhere: make something in it mandatory".to_owned());
        }
        let longest = properties.maximum_len();
        let window = match (longest, window) {
            (None, None) => return Err(UNBOUNDED.to_owned()),
            (Some(len), None) if len > WINDOW_MAX => return Err(UNBOUNDED.to_owned()),
            (Some(len), window) => len.min(window.unwrap_or(len)),
            (None, Some(window)) => window,
        };
        let kind = meta::Config::new().utf8_empty(false).nfa_size_limit(Some(SIZE_MAX));
        let regex = meta::Builder::new().configure(kind).build_from_hir(&hir).map_err(|error| error.to_string())?;
        if group != FIRST_GROUP && regex.captures_len() <= group {
            return Err(format!("it has no group {group}"));
        }
        let unbounded = longest.is_none_or(|longest| longest > window);
        Ok(Self { rule, label: label.into(), hir, regex, group, window, unbounded })
    }

    /// Where its matches are cut; 0 if they end by themselves. Only those that share it can be searched for together.
    pub fn cut(&self) -> usize {
        if self.unbounded { self.window } else { 0 }
    }

    /// Whether its matches begin with a long run of bytes that sentences do not have.
    pub fn is_run(&self) -> bool {
        Run::of(std::iter::once(&self.hir)).is_some()
    }

    /// Where it matches from `start` on: all of it, and its group.
    fn find(&self, text: &str, start: usize) -> Option<(usize, usize, usize)> {
        let end = text.len().min(start + self.window);
        let input = Input::new(text).range(start..end).anchored(Anchored::Yes);
        if self.group == 0 {
            let found = self.regex.search(&input)?;
            return Some((found.end(), start, found.end()));
        }
        let mut captures = self.regex.create_captures();
        self.regex.search_captures(&input, &mut captures);
        let all = captures.get_match()?;
        let group = match self.group {
            FIRST_GROUP => captures.iter().skip(1).flatten().find(|group| !group.is_empty()).unwrap_or(all.span()),
            group => captures.get_group(group)?,
        };
        Some((all.end(), group.start, group.end))
    }
}

const UNBOUNDED: &str = "it may match any length of text, all of which would have to be held back: give its repetitions \
                         an upper bound ({1,64} for +), or declare `window`, the most bytes that a match has";
const SIZE_MAX: usize = 64 << 20;

/// Word boundaries as an automaton knows them: between ASCII letters, digits and `_`, and everything else.
fn ascii_boundaries(expression: &str) -> String {
    let mut out = String::with_capacity(expression.len());
    let (mut depth, mut chars) = (0usize, expression.chars());
    while let Some(c) = chars.next() {
        match c {
            '\\' => match chars.next() {
                Some(b @ ('b' | 'B')) if depth == 0 && !chars.as_str().starts_with('{') => {
                    out.push_str(if b == 'b' { r"(?-u:\b)" } else { r"(?-u:\B)" });
                    continue;
                }
                Some(other) => out.extend(['\\', other]),
                None => out.push('\\'),
            },
            _ => out.push(c),
        }
        match c {
            '[' => depth += 1,
            ']' => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    out
}

/// A match that an expression found, for a judge.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Candidate<'t> {
    /// The expression's place in the list.
    pub pattern: usize,
    text: &'t str,
    /// Where the match begins.
    pub start: usize,
    /// What the expression's group matched.
    pub group: (usize, usize),
    /// Where the whole match ends.
    pub end: usize,
    last: bool,
}

impl<'t> Candidate<'t> {
    /// What is before the match, a bounded part of it.
    pub fn before(&self) -> &'t str {
        look_back(self.text, self.start)
    }

    /// What matched.
    pub fn matched(&self) -> &'t str {
        &self.text[self.group.0..self.group.1]
    }

    /// The whole match, where the group is only a part of it.
    pub fn whole(&self) -> &'t str {
        &self.text[self.start..self.end]
    }

    /// A part of the text that was ruled to be one.
    pub fn part(&self, start: usize, end: usize) -> &'t str {
        &self.text[start..end]
    }

    /// The byte so many places behind the match; None if that cannot be said yet.
    pub fn after(&self, offset: usize) -> Option<Option<u8>> {
        let byte = self.text.as_bytes().get(self.group.1 + offset).copied();
        (byte.is_some() || self.last).then_some(byte)
    }

    /// The whole match.
    pub fn yes(&self) -> Ruling {
        Ruling::Yes(self.group.0, self.group.1)
    }

    /// The first `len` bytes of the match.
    pub fn first(&self, len: usize) -> Ruling {
        Ruling::Yes(self.group.0, self.group.0 + len)
    }
}

/// What a judge says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ruling {
    /// It is none.
    No,
    /// This part of the text is one.
    Yes(usize, usize),
    /// More text is needed to say.
    More,
}

/// Looks at candidates twice. What it says may depend on nothing but what a [`Candidate`] shows.
pub(crate) trait Judge: Debug + Send + Sync {
    fn judge(&self, candidate: &Candidate<'_>) -> Ruling;

    /// Whether a match may begin at this place, where that can be said at little cost. False only if nothing that an
    /// expression matches here would be ruled to be one, whatever follows: a match that is known before this looks at what
    /// is behind it would else depend on the pieces.
    fn may_begin(&self, _text: &str, _start: usize, _last: bool) -> bool {
        true
    }
}

/// Takes every match as it is.
#[derive(Debug)]
pub(crate) struct AsFound;

impl Judge for AsFound {
    fn judge(&self, candidate: &Candidate<'_>) -> Ruling {
        candidate.yes()
    }
}

type MakeCache = Box<dyn Fn() -> Cache + Send + Sync + UnwindSafe + RefUnwindSafe>;

/// Expressions that are searched for together.
#[derive(Debug)]
pub(crate) struct Patterns<J> {
    patterns: Vec<Pattern>,
    judge: J,
    /// Whether a match of one keeps the others out of its bytes; the first in the list goes before. Else each goes its
    /// own way.
    exclusive: bool,
    dfa: DFA,
    caches: Pool<Cache, MakeCache>,
    /// Where matches may begin.
    triggers: Triggers,
    /// The most bytes that are looked at from one place, where the expressions do not bound it themselves.
    limit: usize,
    longest: usize,
}

impl<J: Judge> Patterns<J> {
    /// Makes one search of them. All of `patterns` either bound themselves or have the same window.
    pub fn new(patterns: Vec<Pattern>, judge: J, exclusive: bool) -> Result<Self, String> {
        let hirs: Vec<&Hir> = patterns.iter().map(|pattern| &pattern.hir).collect();
        let told = |error: &dyn std::fmt::Display| error.to_string();
        let config = NFA::config().utf8(false).nfa_size_limit(Some(SIZE_MAX));
        let nfa = NFA::compiler().configure(config).build_many_from_hir(&hirs).map_err(|error| told(&error))?;
        let config = DFA::config()
            .match_kind(MatchKind::All)
            .starts_for_each_pattern(false)
            .skip_cache_capacity_check(true)
            .cache_capacity(CACHE_MAX);
        let dfa = DFA::builder().configure(config).build_from_nfa(nfa).map_err(|error| told(&error))?;
        let maker = dfa.clone();
        let caches: Pool<Cache, MakeCache> = Pool::new(Box::new(move || maker.create_cache()));
        let need = |pattern: &Pattern| (Need::of(&pattern.hir, pattern.window, patterns.len()), firsts(&pattern.hir));
        let needs: Vec<_> = patterns.iter().map(need).collect();
        let (first, at_boundary) = beginnings(&dfa);
        let longest = patterns.iter().map(|pattern| pattern.window).max().unwrap_or(0);
        let unbounded = patterns.iter().any(|pattern| pattern.unbounded);
        let limit = if unbounded { longest + 1 } else { usize::MAX };
        // Words begin so rarely in a long run that nothing else has to be looked for there.
        let run = if at_boundary { Run::of(hirs.into_iter()) } else { None };
        let triggers = match run {
            Some(run) => Triggers::of_run(&run, &first, at_boundary),
            None => Triggers::new(&needs, &first, at_boundary),
        };
        Ok(Self { patterns, judge, exclusive, dfa, caches, triggers, limit, longest })
    }
}

const CACHE_MAX: usize = 16 << 20;

/// The bytes that something may begin with, and whether it begins only at the beginning of a word.
fn beginnings(dfa: &DFA) -> (ByteSet, bool) {
    let mut cache = dfa.create_cache();
    let mut alive = |behind: Option<u8>, byte: u8| {
        let start = start::Config::new().anchored(Anchored::Yes).look_behind(behind);
        let Ok(start) = dfa.start_state(&mut cache, &start) else { return true };
        dfa.next_state(&mut cache, start, byte).map_or(true, |state| !state.is_dead())
    };
    let before = [None, Some(b' '), Some(b'\n'), Some(b'\r'), Some(b'a')];
    let mut first = ByteSet::EMPTY;
    let begins = |byte: &u8| before.iter().any(|behind| alive(*behind, *byte));
    (0..=u8::MAX).filter(begins).for_each(|byte| first.add(byte));
    let at_boundary = !(0..=u8::MAX).filter(|byte| is_word(*byte)).any(|byte| alive(Some(b'a'), byte));
    (first, at_boundary)
}

impl<J: Judge + 'static> Finder for Patterns<J> {
    fn begin(self: Arc<Self>) -> Box<dyn Search> {
        Box::new(Way { patterns: self, at: 0, patience: 0, looks: Looks::default() })
    }

    fn hold_max(&self) -> usize {
        let held = self.longest + 2;
        held + if held as u64 > IMPATIENT { held / 8 } else { 0 }
    }
}

/// A search that is under way.
struct Way<J> {
    patterns: Arc<Patterns<J>>,
    /// The first place that is not decided.
    at: u64,
    /// Nothing is looked at again before the text is so long.
    patience: u64,
    looks: Looks,
}

/// What was seen at a place.
#[derive(Default)]
struct Looks {
    /// The expressions that have a match which goes on behind the place, and where it ends.
    until: Vec<(usize, u64)>,
    /// The expressions that match at the place at hand.
    matching: Vec<usize>,
    /// What they found.
    agreed: Vec<(usize, Found)>,
}

/// What is known of a place.
enum Place {
    Undecided,
    Decided,
    /// A match that keeps others out ends here.
    Taken(usize),
}

impl<J: Judge + 'static> Search for Way<J> {
    fn advance(&mut self, window: &Window<'_>, found: &mut Vec<Found>) -> u64 {
        let len = window.text.len();
        if !window.last && window.base + (len as u64) < self.patience {
            return self.at;
        }
        let patterns = &*self.patterns;
        let mut cache = None;
        let mut start = (self.at - window.base) as usize;
        let starts = patterns.triggers.starts(window.text.as_bytes(), start, window.last);
        loop {
            start = starts.next(start);
            if start >= len {
                break;
            }
            if !window.text.is_char_boundary(start) || !patterns.judge.may_begin(window.text, start, window.last) {
                start += 1;
                continue;
            }
            let cache = cache.get_or_insert_with(|| patterns.caches.get());
            match self.looks.look(patterns, cache, window, start, found) {
                Place::Undecided => break,
                Place::Decided => start += 1,
                Place::Taken(end) => start = end.max(start + 1),
            }
        }
        self.at = window.base + start.min(len) as u64;
        self.patience = patient(self.at, window);
        self.at
    }
}

impl Looks {
    fn look<J: Judge>(
        &mut self,
        patterns: &Patterns<J>,
        cache: &mut Cache,
        window: &Window<'_>,
        start: usize,
        found: &mut Vec<Found>,
    ) -> Place {
        self.matching.clear();
        match run(patterns, cache, window, start, &mut self.matching) {
            None => return Place::Undecided,
            Some(false) => return Place::Decided,
            Some(true) => self.matching.sort_unstable(),
        }
        self.agreed.clear();
        for index in 0..self.matching.len() {
            match self.ask(patterns, self.matching[index], window, start) {
                Err(More) => return Place::Undecided,
                Ok(None) => {}
                Ok(Some(one)) => {
                    let end = (one.range.end - window.base) as usize;
                    if patterns.exclusive {
                        found.push(one);
                        return Place::Taken(end);
                    }
                    self.agreed.push((self.matching[index], one));
                }
            }
        }
        self.until.retain(|(_, end)| *end > window.base + start as u64);
        self.until.extend(self.agreed.iter().map(|(index, one)| (*index, one.range.end)));
        found.extend(self.agreed.drain(..).map(|(_, one)| one));
        Place::Decided
    }

    /// What an expression that matches at this place, and the judge, say of it.
    fn ask<J: Judge>(
        &self,
        patterns: &Patterns<J>,
        index: usize,
        window: &Window<'_>,
        start: usize,
    ) -> Result<Option<Found>, More> {
        let busy = |(other, end): &(usize, u64)| *other == index && *end > window.base + start as u64;
        let Some(pattern) = patterns.patterns.get(index).filter(|_| !self.until.iter().any(busy)) else {
            return Ok(None);
        };
        let Some((end, from, to)) = pattern.find(window.text, start) else { return Ok(None) };
        let end = window.text.ceil_char_boundary(end);
        let group = (window.text.floor_char_boundary(from), window.text.ceil_char_boundary(to));
        let candidate = Candidate { pattern: index, text: window.text, start, group, end, last: window.last };
        match patterns.judge.judge(&candidate) {
            Ruling::No => Ok(None),
            Ruling::More if window.last => Ok(None),
            Ruling::More => Err(More),
            Ruling::Yes(from, to) => {
                let range = window.base + from as u64..window.base + to as u64;
                Ok(Some(Found { rule: pattern.rule, label: Arc::clone(&pattern.label), range }))
            }
        }
    }
}

/// A judge needs more text.
struct More;

/// Runs the joint automaton from a place until it dies. Whether something matches there; None if more text may say so.
fn run<J>(
    patterns: &Patterns<J>,
    cache: &mut Cache,
    window: &Window<'_>,
    start: usize,
    matching: &mut Vec<usize>,
) -> Option<bool> {
    let (dfa, text) = (&patterns.dfa, window.text.as_bytes());
    let behind = start.checked_sub(1).and_then(|at| text.get(at).copied());
    let begin = start::Config::new().anchored(Anchored::Yes).look_behind(behind);
    // The automaton never gives up (it empties its cache instead), so these errors do not occur; where one did, every
    // expression would be asked.
    let everything = |matching: &mut Vec<usize>| matching.extend(0..patterns.patterns.len());
    let Ok(mut state) = dfa.start_state(cache, &begin) else {
        everything(matching);
        return Some(true);
    };
    let end = text.len().min(start.saturating_add(patterns.limit));
    for byte in &text[start..end] {
        match dfa.next_state(cache, state, *byte) {
            Ok(next) => state = next,
            Err(_) => {
                everything(matching);
                return Some(true);
            }
        }
        if state.is_tagged() {
            if state.is_dead() {
                return Some(!matching.is_empty());
            }
            note(dfa, cache, state, matching);
        }
    }
    if end < text.len() || end - start >= patterns.limit {
        return Some(!matching.is_empty());
    }
    if !window.last {
        return None;
    }
    if let Ok(state) = dfa.next_eoi_state(cache, state) {
        note(dfa, cache, state, matching);
    }
    Some(!matching.is_empty())
}

/// Remembers the expressions that match.
fn note(dfa: &DFA, cache: &Cache, state: LazyStateID, matching: &mut Vec<usize>) {
    if !state.is_match() {
        return;
    }
    for nth in 0..dfa.match_len(cache, state) {
        let index = dfa.match_pattern(cache, state, nth).as_usize();
        if !matching.contains(&index) {
            matching.push(index);
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;

    impl<J: Judge> Patterns<J> {
        /// The same, tried at every place.
        pub(crate) fn everywhere(mut self) -> Self {
            let mut all = ByteSet::EMPTY;
            (0..=u8::MAX).for_each(|byte| all.add(byte));
            self.triggers = Triggers::new(&[(None, all)], &all, false);
            self
        }
    }

    /// What is found in a text.
    pub(crate) fn found<J: Judge + 'static>(patterns: &Arc<Patterns<J>>, text: &str) -> Vec<Found> {
        let mut found = Vec::new();
        Arc::clone(patterns).begin().advance(&Window { text, base: 0, last: true }, &mut found);
        found
    }

    /// The same where the text comes in two pieces.
    fn found_in_pieces<J: Judge + 'static>(patterns: &Arc<Patterns<J>>, text: &str, cut: usize) -> Vec<Found> {
        let (mut search, mut found) = (Arc::clone(patterns).begin(), Vec::new());
        let piece = &text[..text.floor_char_boundary(cut)];
        search.advance(&Window { text: piece, base: 0, last: false }, &mut found);
        search.advance(&Window { text, base: 0, last: true }, &mut found);
        found
    }

    /// Expressions that are looked for in every way there is.
    const EXPRESSIONS: &[&str] = &[
        r"[a-z]{1,5}@[a-z]{2,5}",
        r"\b[0-9]{2}-?[0-9]{2}\b",
        r"(?i)aws.{0,9}[=:]",
        r"\b[a-z]{1,6}://x",
        r"\+?\(?\b[0-9]{3}",
        r"\bkey-[0-9a-f]{20}",
        r"é[a-z]|[x-z]{3}[éü]",
        r"a.{0,150}b!",
        r"(?i)passphrase|memory|fox",
        r"c$|^k",
    ];

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(600))]

        #[test]
        fn no_place_is_left_out_where_a_match_begins(
            text in "([a-z]{1,9}[ .@:]|[0-9]{2}-?|AwS =|é|x://x|key-[0-9a-f]{19,21}|pASSphrase|fox|a|b!|[c-k ]{30,90}){0,30}",
            from in 0..EXPRESSIONS.len(),
            count in 1usize..5,
            cut in 0usize..200,
        ) {
            let chosen = || EXPRESSIONS.iter().cycle().skip(from).take(count);
            let made = || {
                let pattern = |expression: &&str| Pattern::new(0, expression, expression, None, 0).unwrap();
                Patterns::new(chosen().map(pattern).collect(), AsFound, false).unwrap()
            };
            let (fast, slow) = (Arc::new(made()), Arc::new(made().everywhere()));
            prop_assert_eq!(found(&fast, &text), found(&slow, &text));
            prop_assert_eq!(found(&fast, &text), found_in_pieces(&fast, &text, cut));
        }
    }

    #[test]
    fn word_boundaries_become_those_of_ascii() {
        let (given, expected) = (r"\bfoo\B[\b\]]\\b", r"(?-u:\b)foo(?-u:\B)[\b\]]\\b");
        assert_eq!(ascii_boundaries(given), expected);
    }

    #[test]
    fn what_has_no_bound_must_declare_one() {
        let wrong = |expression: &str, window| Pattern::new(0, "x", expression, window, 0).err();
        assert!(wrong("a+b", None).unwrap().contains("declare `window`"));
        assert!(wrong("a{1,70000}b", None).unwrap().contains("declare `window`"));
        assert_eq!(wrong("a+b", Some(100)), None);
        assert_eq!(wrong("a{1,64}b", None), None);
        assert!(wrong("a*", Some(3)).unwrap().contains("empty text"));
        assert!(wrong("(", None).is_some());
    }

    #[test]
    fn the_beginnings_of_matches_are_read_off_the_automaton() {
        let made = |expression: &str| {
            let pattern = Pattern::new(0, "x", expression, None, 0).unwrap();
            beginnings(&Patterns::new(vec![pattern], AsFound, false).unwrap().dfa)
        };
        let (first, at_boundary) = made(r"\b\d{2,4}");
        assert!(at_boundary && first.has(b'7') && !first.has(b'a'));
        assert!(!made("[0-9]{2,4}").1);
    }
}
