//! One run, line by line: what can be judged without knowing the other runs, and what they will be asked about it.

use std::borrow::Cow;
use std::collections::{BTreeSet, HashMap};
use std::io;
use std::ops::Range;

use serde::Deserialize;
use serde_json::value::RawValue;
use sha2::{Digest, Sha256};

use super::{Chain, End, GENESIS, Ids, Problem, PublicKey, RunReport, TOLD, What, text};
use crate::audit::read::{self, Run, Segment};
use crate::audit::story::counted;
use crate::{hex, time};

/// Every so many lines the progress is told.
const STEP: u64 = 4_096;

/// What a run turned out to hold.
pub(super) struct Found {
    pub(super) name: String,
    pub(super) segments: usize,
    pub(super) lines: u64,
    pub(super) records: u64,
    from: String,
    to: String,
    /// The last line: its seq and chain.
    pub(super) tip: (u64, Chain),
    /// The last segment that is there, and the bytes behind its last line.
    pub(super) last: Option<Segment>,
    pub(super) torn: u64,
    pub(super) closed: bool,
    pub(super) live: bool,
    pub(super) end: End,
    /// The last signature's seq.
    pub(super) signed: u64,
    /// The chain values that were asked for.
    pub(super) chains: HashMap<u64, Chain>,
    pub(super) gaps: Vec<Gap>,
    pub(super) retired: Vec<Retired>,
    pub(super) retired_segments: usize,
    pub(super) claims: Vec<Claim>,
    lost: u64,
    pub(super) problems: Vec<Problem>,
    pub(super) untold: usize,
}

/// Segments that are not there, between two ends that are.
pub(super) struct Gap {
    pub(super) missing: Range<u32>,
    /// The last line before it.
    pub(super) before: (u64, Option<Chain>),
    /// The first line behind it: its seq, and the chain value that it goes on from.
    pub(super) after: Option<(u64, Chain)>,
    pub(super) place: Place,
    /// Records before it, and those that the first checkpoint behind it counts on top of what is there.
    pub(super) records: Option<u64>,
    pub(super) counted: Option<u64>,
}

/// Where in a run.
#[derive(Clone, Default)]
pub(super) struct Place {
    pub(super) segment: Option<String>,
    pub(super) line: Option<u64>,
    pub(super) seq: Option<u64>,
}

/// The end of another run, as an `open` line found it.
#[derive(Clone, Deserialize)]
pub(super) struct Claim {
    pub(super) run: String,
    pub(super) seq: u64,
    pub(super) chain: Sealed,
    #[serde(default)]
    pub(super) torn: u64,
    #[serde(default)]
    pub(super) live: bool,
}

/// A segment that retention removed.
#[derive(Clone, Deserialize)]
pub(super) struct Retired {
    #[serde(default)]
    pub(super) seq: u64,
    pub(super) run: String,
    pub(super) segment: u32,
    pub(super) first: u64,
    pub(super) last: u64,
    pub(super) prev: Sealed,
    pub(super) head: Sealed,
    pub(super) records: u64,
}

/// A chain value inside a line.
#[derive(Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub(super) struct Sealed(pub(super) Chain);

impl TryFrom<String> for Sealed {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        // A segment without a line has no chain value.
        if text.is_empty() {
            return Ok(Self(GENESIS));
        }
        text.as_bytes().try_into().map(Self).map_err(|_| "a chain value has 64 digits")
    }
}

#[derive(Deserialize)]
struct Frame<'a> {
    v: u64,
    seq: u64,
    #[serde(borrow)]
    kind: Cow<'a, str>,
    #[serde(borrow)]
    at: Cow<'a, str>,
    #[serde(borrow)]
    id: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Opening {
    run: String,
    key: String,
    #[serde(default)]
    previous: Vec<Claim>,
}

#[derive(Deserialize)]
struct Beginning {
    run: String,
    segment: u32,
    prev: Sealed,
}

#[derive(Deserialize)]
pub(super) struct Checkpoint {
    pub(super) run: String,
    pub(super) seq: u64,
    pub(super) at: String,
    records: u64,
    segment: u32,
    segment_first: u64,
    pub(super) head: Sealed,
    pub(super) key: String,
    signature: String,
}

impl Checkpoint {
    /// Whether one of `keys` signed it.
    pub(super) fn signed(&self, keys: &[PublicKey]) -> bool {
        let (Self { run, seq, records, at, .. }, head) = (self, text(&self.head.0));
        let message = format!("infergate checkpoint v1\n{run}\n{seq}\n{records}\n{at}\n{head}\n");
        keys.iter().any(|key| key.id == self.key && key.signed(message.as_bytes(), &self.signature))
    }
}

#[derive(Deserialize)]
struct Lost {
    #[serde(default)]
    lost: u64,
}

/// The ends of other runs that the first line of `run` names.
pub(super) fn claims(run: &Run) -> io::Result<Vec<Claim>> {
    let first = match run.segments()?.first() {
        Some(segment) if segment.number == 1 => segment.first().ok().flatten(),
        _ => None,
    };
    let opening = first.filter(|line| read::kind(line) == b"open").and_then(|line| serde_json::from_slice(&line).ok());
    Ok(opening.map_or_else(Vec::new, |opening: Opening| opening.previous))
}

/// Goes through run after run.
pub(super) struct Walk<'a> {
    keys: &'a [PublicKey],
    progress: Option<&'a dyn Fn(u64, u64)>,
    ids: Ids,
    lines: u64,
    bytes: u64,
}

impl<'a> Walk<'a> {
    pub(super) fn new(keys: &'a [PublicKey], progress: Option<&'a dyn Fn(u64, u64)>) -> Self {
        Self { keys, progress, ids: Ids::new(), lines: 0, bytes: 0 }
    }

    /// Reads `run`, and remembers the chain values of the lines `asked` for.
    pub(super) fn run(&mut self, run: &Run, asked: &BTreeSet<u64>) -> io::Result<Found> {
        // Asked first: a run that ends while it is read must not look as if it had been killed.
        let live = run.is_live();
        let mut reading = Reading::new(self, &run.name, live, asked);
        let segments = run.segments()?;
        let mut due = 1;
        for segment in &segments {
            if segment.number > due {
                reading.missing(due..segment.number);
            }
            reading.segment(segment, segments.last() == Some(segment));
            due = segment.number + 1;
        }
        reading.found.segments = segments.len();
        Ok(reading.found)
    }

    fn step(&mut self, bytes: usize) {
        self.lines += 1;
        self.bytes += bytes as u64;
        if self.lines.is_multiple_of(STEP) {
            self.progress.iter().for_each(|progress| progress(self.lines, self.bytes));
        }
    }
}

/// One run while it is read.
struct Reading<'a, 'w> {
    walk: &'a mut Walk<'w>,
    asked: &'a BTreeSet<u64>,
    found: Found,
    place: Place,
    number: u32,
    segment_first: u64,
    /// What the next line must be; unknown behind something unreadable.
    due: Option<u64>,
    chain: Option<Chain>,
    /// Records so far; unknown behind something missing, until a checkpoint tells.
    records: Option<u64>,
    /// Records since that became unknown.
    since: u64,
    /// Whether the line before was wrong itself.
    suspect: bool,
    /// Whether the segments right before this one are missing.
    jumped: bool,
    /// Keys that have been told as unknown.
    strangers: Vec<String>,
}

impl<'a, 'w> Reading<'a, 'w> {
    fn new(walk: &'a mut Walk<'w>, name: &str, live: bool, asked: &'a BTreeSet<u64>) -> Self {
        Self {
            walk,
            asked,
            found: Found::new(name, live),
            place: Place::default(),
            number: 0,
            segment_first: 1,
            due: Some(1),
            chain: Some(GENESIS),
            records: Some(0),
            since: 0,
            suspect: false,
            jumped: false,
            strangers: Vec::new(),
        }
    }

    /// Segments are not there; whether that is in order turns out when all `retired` lines are known.
    fn missing(&mut self, missing: Range<u32>) {
        let (before, records) = ((self.found.tip.0, self.chain), self.records);
        self.lose();
        self.found.gaps.push(Gap { missing, before, after: None, place: Place::default(), records, counted: None });
        self.jumped = true;
    }

    /// From here on the lines are taken as they come.
    fn lose(&mut self) {
        (self.due, self.chain) = (None, None);
        self.uncount();
    }

    fn uncount(&mut self) {
        (self.records, self.since) = (None, 0);
        // What is counted from here on says nothing about the segments that were missing before.
        self.found.gaps.last_mut().filter(|gap| gap.counted.is_none()).iter_mut().for_each(|gap| gap.records = None);
    }

    fn segment(&mut self, segment: &Segment, last: bool) {
        self.number = segment.number;
        self.place = Place { segment: Some(segment.file_name()), line: None, seq: None };
        let lines = match segment.open() {
            // Retention removed it since it was listed.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return self.missing(segment.number..segment.number + 1);
            }
            lines => lines,
        };
        match lines {
            Ok(lines) => self.lines(lines, last),
            Err(error) => self.unreadable(&error),
        }
        if last {
            self.found.last = Some(segment.clone());
        }
        self.jumped = false;
    }

    fn lines(&mut self, mut lines: read::SegmentLines, last: bool) {
        loop {
            let before = lines.number_of_line();
            match lines.advance() {
                Ok(true) => {
                    self.place = Place { line: Some(lines.number_of_line()), seq: None, ..self.place.clone() };
                    self.line(lines.line());
                    self.walk.step(lines.line().len());
                }
                Ok(false) => break,
                Err(error) => {
                    self.place = Place { line: Some(before + 1), seq: None, ..self.place.clone() };
                    self.unreadable(&error);
                    // Only one line was too long; whatever else it is goes on as it is.
                    if lines.number_of_line() == before {
                        return;
                    }
                }
            }
        }
        self.place = Place { line: Some(lines.number_of_line() + 1), seq: None, ..self.place.clone() };
        self.behind(&lines, last);
    }

    /// What stands behind a segment's last line.
    fn behind(&mut self, lines: &read::SegmentLines, last: bool) {
        self.found.torn = lines.torn();
        if last {
            return;
        }
        if lines.torn() > 0 {
            self.problem(
                What::Torn,
                format!("a finished segment ends in half a line of {}", counted(lines.torn(), "byte")),
            );
            self.lose();
        }
        if lines.number_of_line() == 0 {
            self.problem(What::Malformed, "a finished segment is empty: its lines were removed".to_owned());
            self.lose();
        }
    }

    fn unreadable(&mut self, error: &io::Error) {
        self.problem(What::Malformed, format!("cannot be read from here on: {error}"));
        self.lose();
    }

    fn line(&mut self, line: &[u8]) {
        self.found.lines += 1;
        let (frame, chain) = match parse(line) {
            Ok(parsed) => parsed,
            Err(why) => return self.malformed(line, &why),
        };
        self.place.seq = Some(frame.seq);
        if self.place.line == Some(1) {
            self.begins(line, &frame);
        } else if matches!(&*frame.kind, "open" | "segment") {
            self.problem(What::Malformed, format!("a line of kind {} stands in the middle of a segment", frame.kind));
        }
        let before = self.chain;
        let follows = before.is_none_or(|before| follow(&before, line) == chain);
        let fine = self.in_order(frame.seq, follows);
        if !fine && !follows && self.due.is_some_and(|due| frame.seq < due) {
            return; // it is there twice or was moved: what comes next follows from the line before it
        }
        if !fine {
            self.uncount();
        }
        self.suspect = !fine;
        (self.due, self.chain) = (Some(frame.seq + 1), Some(chain));
        self.found.came(&frame, chain, self.asked);
        self.content(line, &frame, before.filter(|_| fine));
    }

    fn malformed(&mut self, line: &[u8], why: &str) {
        self.problem(
            What::Malformed,
            format!("this is no line of a journal: it was changed, or the disk damaged it ({why})"),
        );
        self.lose();
        self.chain = read::chain(line).and_then(|(chain, _)| chain.try_into().ok());
        self.suspect = true;
    }

    /// Whether the line is the one that is due; says what is wrong if not.
    fn in_order(&mut self, seq: u64, follows: bool) -> bool {
        let due = self.due.unwrap_or(seq);
        // A line that follows from the one before it is right about its place if the one before it was not.
        if seq != due && follows && self.suspect {
            return true;
        }
        if seq > due {
            let lines =
                if seq - due == 1 { format!("line {due} is") } else { format!("lines {due} to {} are", seq - 1) };
            let message = format!("seq {due} is due here: {lines} missing, removed or moved, or this line was changed");
            self.problem(What::Hole, message);
        } else if seq < due {
            let message = format!("seq {due} is due here: this line was moved, or it is there twice");
            self.problem(What::Repeat, message);
        } else if !follows {
            let message = "this line or the one before it was changed, removed or moved: its chain does not follow";
            self.problem(What::Chain, message.to_owned());
        }
        seq == due && follows
    }

    /// A segment's first line.
    fn begins(&mut self, line: &[u8], frame: &Frame<'_>) {
        self.segment_first = frame.seq;
        let due = if self.number == 1 { "open" } else { "segment" };
        if frame.kind != due {
            let message = format!("the segment begins with a line of kind {}; {due} is due", frame.kind);
            return self.problem(What::Malformed, message);
        }
        if let (true, Ok(begin)) = (self.jumped, serde_json::from_slice::<Beginning>(line)) {
            self.chain = Some(begin.prev.0);
            if let Some(gap) = self.found.gaps.last_mut() {
                (gap.after, gap.place) = (Some((frame.seq, begin.prev.0)), self.place.clone());
            }
        }
    }

    fn goes_on(&mut self, line: &[u8], before: Option<Chain>) {
        let Some(begin) = self.members::<Beginning>(line) else { return };
        self.own(&begin.run);
        if begin.segment != self.number {
            let message = format!("the file is named for segment {}, the line is of {}", self.number, begin.segment);
            self.problem(What::Malformed, message);
        }
        if before.is_some_and(|before| before != begin.prev.0) {
            let message = "the segment says that it goes on from another line than the one before it";
            self.problem(What::Chain, message.to_owned());
        }
    }

    /// The run that a line names must be this one.
    fn own(&mut self, run: &str) {
        if run != self.found.name {
            let message = format!("this line is of run {run}: the directory was renamed or copied, or the line moved");
            self.problem(What::Malformed, message);
        }
    }

    fn content(&mut self, line: &[u8], frame: &Frame<'_>, before: Option<Chain>) {
        if self.found.closed {
            self.problem(What::Added, "this line stands behind the signed end of the run: it was added".to_owned());
        }
        match &*frame.kind {
            "request" => self.request(frame),
            "open" => self.open(line),
            "segment" => self.goes_on(line, before),
            "checkpoint" | "close" => self.checkpoint(line, frame, before),
            "retired" => self.retired(line),
            "gap" => self.found.lost += self.members::<Lost>(line).map_or(0, |gap| gap.lost),
            _ => {}
        }
    }

    fn retired(&mut self, line: &[u8]) {
        let retired = self.members(line);
        self.found.retired.extend(retired);
    }

    fn request(&mut self, frame: &Frame<'_>) {
        self.found.records += 1;
        self.since += 1;
        self.records = self.records.map(|records| records + 1);
        let id = frame.id.and_then(|id| serde_json::from_str::<Cow<'_, str>>(id.get()).ok());
        match id.as_ref().and_then(|id| uuid::Uuid::parse_str(id).ok()) {
            None => self.problem(What::Malformed, "the record has no id".to_owned()),
            Some(id) if self.walk.ids.insert(id.into_bytes()) => {}
            Some(id) => self.problem(What::DuplicateId, format!("another record has the id {id} too")),
        }
    }

    fn open(&mut self, line: &[u8]) {
        let Some(opening) = self.members::<Opening>(line) else { return };
        self.own(&opening.run);
        self.known(&opening.key);
        self.found.claims = opening.previous;
    }

    fn checkpoint(&mut self, line: &[u8], frame: &Frame<'_>, before: Option<Chain>) {
        let Some(checkpoint) = self.members::<Checkpoint>(line) else { return };
        self.found.closed |= frame.kind == "close";
        self.own(&checkpoint.run);
        self.count(&checkpoint);
        let known = self.known(&checkpoint.key);
        let signed = known && checkpoint.signed(self.walk.keys);
        let fits = before.is_none_or(|before| before == checkpoint.head.0);
        if known && !signed {
            let message = "this checkpoint was not signed with the journal's key: it is forged, or it or lines before \
                           it were changed and chained anew";
            self.problem(What::Signature, message.to_owned());
        } else if known && !fits {
            let message = "the signature is for another line than the one before it: lines before it were changed, \
                           removed or moved, and chained anew";
            self.problem(What::Signature, message.to_owned());
        } else if signed {
            self.found.signed = frame.seq;
        }
    }

    fn count(&mut self, checkpoint: &Checkpoint) {
        if checkpoint.segment != self.number || checkpoint.segment_first != self.segment_first {
            let message =
                format!("the checkpoint is of segment {}, from seq {}", checkpoint.segment, checkpoint.segment_first);
            self.problem(What::Count, message);
        }
        if let Some(records) = self.records.filter(|records| *records != checkpoint.records) {
            let message = format!("the checkpoint counts {} records, but there are {records}", checkpoint.records);
            self.problem(What::Count, message);
        }
        if self.records.is_none()
            && let Some(gap) = self.found.gaps.last_mut()
            && gap.counted.is_none()
        {
            gap.counted = checkpoint.records.checked_sub(self.since);
        }
        self.records = Some(checkpoint.records);
    }

    /// Whether the key is one of those given; an unknown one is told once.
    fn known(&mut self, id: &str) -> bool {
        let known = self.walk.keys.iter().any(|key| key.id == id);
        if !known && !self.strangers.iter().any(|stranger| stranger == id) {
            self.strangers.push(id.to_owned());
            let given: Vec<&str> = self.walk.keys.iter().map(|key| key.id.as_str()).collect();
            let message = format!("signed with the key {id}, which is not the one given ({})", given.join(", "));
            self.problem(What::Signature, message);
        }
        known
    }

    /// The members of a line of ours.
    fn members<T: for<'de> Deserialize<'de>>(&mut self, line: &[u8]) -> Option<T> {
        serde_json::from_slice(line)
            .inspect_err(|error| self.problem(What::Malformed, format!("members are missing or wrong: {error}")))
            .ok()
    }

    fn problem(&mut self, what: What, message: String) {
        let place = self.place.clone();
        self.found.problem(what, place, message);
    }
}

impl Found {
    fn new(name: &str, live: bool) -> Self {
        Self {
            name: name.to_owned(),
            segments: 0,
            lines: 0,
            records: 0,
            from: String::new(),
            to: String::new(),
            tip: (0, GENESIS),
            last: None,
            torn: 0,
            closed: false,
            live,
            end: End::Open,
            signed: 0,
            chains: HashMap::new(),
            gaps: Vec::new(),
            retired: Vec::new(),
            retired_segments: 0,
            claims: Vec::new(),
            lost: 0,
            problems: Vec::new(),
            untold: 0,
        }
    }

    fn came(&mut self, frame: &Frame<'_>, chain: Chain, asked: &BTreeSet<u64>) {
        if self.from.is_empty() {
            self.from = frame.at.clone().into_owned();
        }
        self.to.clear();
        self.to.push_str(&frame.at);
        self.tip = (frame.seq, chain);
        if asked.contains(&frame.seq) {
            self.chains.insert(frame.seq, chain);
        }
    }

    /// Files a problem, as long as there is room.
    pub(super) fn problem(&mut self, what: What, place: Place, message: String) {
        if self.problems.len() >= TOLD {
            self.untold += 1;
            return;
        }
        let Place { segment, line, seq } = place;
        self.problems.push(Problem { what, run: self.name.clone(), segment, line, seq, message });
    }

    /// The end of the run as a place.
    pub(super) fn ending(&self) -> Place {
        Place { segment: self.last.as_ref().map(Segment::file_name), line: None, seq: Some(self.tip.0) }
    }

    /// What the reader of the proof should know about it.
    pub(super) fn notes(&self) -> Option<String> {
        let Self { name, lost, .. } = self;
        (*lost > 0)
            .then(|| format!("{name}: served without a record, as the policy allowed: {}", counted(*lost, "request")))
    }

    /// What is told of it.
    pub(super) fn report(&self) -> RunReport {
        RunReport {
            run: self.name.clone(),
            segments: self.segments,
            retired: self.retired_segments,
            lines: self.lines,
            records: self.records,
            from: self.from.clone(),
            to: self.to.clone(),
            end: self.end.clone(),
            signed_to: self.signed,
            problems: self.problems.len() + self.untold,
        }
    }
}

/// A line's frame and chain value, or what keeps it from being a line.
fn parse(line: &[u8]) -> Result<(Frame<'_>, Chain), String> {
    let frame: Frame<'_> = serde_json::from_slice(line).map_err(|error| error.to_string())?;
    let begins = read::seq(line) == Some(frame.seq)
        && read::kind(line) == frame.kind.as_bytes()
        && read::at(line) == frame.at.as_bytes();
    let chain = read::chain(line).and_then(|(chain, _)| chain.try_into().ok());
    match chain {
        Some(chain) if begins && frame.v == 1 && time::micros(frame.at.as_bytes()).is_some() => Ok((frame, chain)),
        None => Err("no chain value at its end".to_owned()),
        _ if frame.v != 1 => Err(format!("format {}, which is not known here", frame.v)),
        _ => Err("it does not begin with v, seq, kind and a time".to_owned()),
    }
}

/// The chain value of `line` if it follows the line with the chain value `before`.
fn follow(before: &Chain, line: &[u8]) -> Chain {
    let covered = read::chain(line).map_or(line, |(_, covered)| covered);
    hex::digits(&Sha256::new().chain_update(before).chain_update(covered).finalize())
}
