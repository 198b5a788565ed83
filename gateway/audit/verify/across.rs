//! How the runs of a journal vouch for one another: their ends, what retention removed, and anchors from elsewhere.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::run::{Checkpoint, Claim, Found, Gap, Place, Retired, Sealed};
use super::{Chain, End, Options, Problem, PublicKey, Report, What};
use crate::audit::read;
use crate::audit::story::counted;

/// A chain value that was kept elsewhere.
pub(super) struct Anchor {
    /// The file and the line in it.
    place: String,
    pub(super) run: String,
    pub(super) seq: u64,
    chain: Chain,
    /// The whole checkpoint, if it was kept whole.
    checkpoint: Option<Checkpoint>,
}

/// A checkpoint line, or what the log told of it.
#[derive(Deserialize)]
struct Kept {
    run: String,
    seq: u64,
    head: Sealed,
}

/// Reads files with checkpoint lines; other lines of a journal in them say nothing.
pub(super) fn anchors(files: &[PathBuf]) -> io::Result<Vec<Anchor>> {
    let mut anchors = Vec::new();
    for path in files {
        let named = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
        for (at, line) in BufReader::new(File::open(path).map_err(named)?).split(b'\n').enumerate() {
            kept(path, at + 1, &line.map_err(named)?, &mut anchors);
        }
        if anchors.is_empty() {
            return Err(named(io::Error::new(io::ErrorKind::InvalidData, "there is no checkpoint line in it")));
        }
    }
    Ok(anchors)
}

fn kept(path: &Path, at: usize, line: &[u8], anchors: &mut Vec<Anchor>) {
    let Ok(Kept { run, seq, head }) = serde_json::from_slice::<Kept>(line) else { return };
    let place = format!("{}:{at}", path.display());
    let own = read::chain(line).and_then(|(chain, _)| chain.try_into().ok());
    let checkpoint = own.and_then(|_| serde_json::from_slice(line).ok());
    if let Some(chain) = own {
        anchors.push(Anchor { place: place.clone(), run: run.clone(), seq, chain, checkpoint });
    }
    anchors.push(Anchor { place, run, seq: seq.saturating_sub(1), chain: head.0, checkpoint: None });
}

/// Judges what no run shows by itself.
pub(super) fn judge(
    found: &mut [Found],
    anchors: &[Anchor],
    keys: &[PublicKey],
    options: &Options<'_>,
    report: &mut Report,
) {
    let retirements = Retirements::of(found);
    for run in found.iter_mut() {
        let gaps = std::mem::take(&mut run.gaps);
        gaps.iter().for_each(|gap| retirements.fill(run, gap));
        retirements.extend(run);
    }
    let claims = claims(found, &retirements, report);
    ends(found, &claims, options, report);
    vouch(found, &claims);
    for anchor in anchors {
        hold(anchor, found, &retirements, keys, report);
    }
    if found.is_empty() {
        report.notes.push("the journal has no runs: there is nothing to prove".to_owned());
    }
}

/// What retention removed, by run and segment.
struct Retirements {
    removed: HashMap<String, BTreeMap<u32, Retired>>,
    /// Runs and segments that lines tell of which nobody signed.
    unsigned: HashSet<(String, u32)>,
}

/// What is known of a line's chain value.
enum Known {
    Is(Chain),
    /// Retention removed it.
    Retired,
    /// The run ends before it.
    Beyond,
    /// It could not be read, which has been told.
    Unread,
}

impl Retirements {
    /// A line counts if a signature of its own run stands behind it. The seal of a later run does not do: that signs
    /// whatever it finds, and behind the last signature of a run that was killed anybody can have written.
    fn of(found: &[Found]) -> Self {
        let mut retirements = Self { removed: HashMap::new(), unsigned: HashSet::new() };
        for (retired, signed) in found.iter().flat_map(|by| by.retired.iter().map(|retired| (retired, by.signed))) {
            let Retired { run, segment, .. } = retired;
            if retired.seq < signed {
                retirements.removed.entry(run.clone()).or_default().insert(*segment, retired.clone());
            } else {
                retirements.unsigned.insert((run.clone(), *segment));
            }
        }
        retirements
    }

    fn get(&self, run: &str, segment: u32) -> Option<&Retired> {
        self.removed.get(run)?.get(&segment)
    }

    /// The removed segment of `run` that held line `seq`.
    fn holding(&self, run: &str, seq: u64) -> Option<&Retired> {
        self.removed.get(run)?.values().find(|retired| (retired.first..=retired.last).contains(&seq))
    }

    /// Whether what is missing was removed by retention, and fits between what is there.
    fn fill(&self, run: &mut Found, gap: &Gap) {
        let (mut seq, mut chain) = (Some(gap.before.0 + 1).filter(|_| gap.before.1.is_some()), gap.before.1);
        let mut records = Some(0);
        for number in gap.missing.clone() {
            let Some(retired) = self.get(&run.name, number) else {
                (seq, chain, records) = (None, None, None);
                if self.told_by_a_later_one(run, gap, number) {
                    run.retired_segments += 1;
                    continue;
                }
                let message = self.missing(&run.name, gap, number);
                run.problem(What::MissingSegment, Place::segment(number), message);
                continue;
            };
            run.retired_segments += 1;
            if retired.last == 0 {
                continue; // nothing had been written to it
            }
            self.next(run, retired, seq, chain);
            (seq, chain) = (Some(retired.last + 1), Some(retired.head.0));
            records = records.map(|records| records + retired.records);
        }
        let fits = |after: (u64, Chain)| seq.is_none_or(|seq| seq == after.0) && chain.is_none_or(|c| c == after.1);
        if gap.after.is_some_and(|after| !fits(after)) {
            let message = "this segment does not go on where the one before it, which retention removed, ended";
            run.problem(What::Chain, gap.place.clone(), message.to_owned());
        }
        if let (Some(counted), Some(before), Some(records)) = (gap.counted, gap.records, records)
            && counted != before + records
        {
            let message = format!(
                "{records} records were in the removed segments before this one, says retention, \
                                   but its checkpoint counts {}",
                counted.saturating_sub(before)
            );
            run.problem(What::Count, gap.place.clone(), message);
        }
    }

    /// The line that told of a run's first segments goes with the segment that held it. Retention begins with the
    /// oldest, so one that tells of a later segment tells of those before it too.
    fn told_by_a_later_one(&self, run: &Found, gap: &Gap, number: u32) -> bool {
        let told = self.removed.get(&run.name).and_then(|told| told.range(number + 1..gap.missing.end).next());
        gap.missing.start == 1 && told.is_some()
    }

    fn next(&self, run: &mut Found, retired: &Retired, seq: Option<u64>, chain: Option<Chain>) {
        let fits = seq.is_none_or(|seq| seq == retired.first) && chain.is_none_or(|chain| chain == retired.prev.0);
        if !fits {
            let message = "what the `retired` line says of this segment does not go on from the line before it";
            run.problem(What::Chain, Place::segment(retired.segment), message.to_owned());
        }
    }

    /// Moves the end of `run` to that of the removed segments behind those that are there.
    fn extend(&self, run: &mut Found) {
        let mut number = run.last.as_ref().map_or(0, |segment| segment.number);
        while let Some(retired) = self.get(&run.name, number + 1) {
            if retired.last > 0 {
                let begun = (run.lines > 0).then_some(run.tip);
                self.next(run, retired, begun.map(|tip| tip.0 + 1), begun.map(|tip| tip.1));
                run.tip = (retired.last, retired.head.0);
            }
            run.retired_segments += 1;
            run.end = End::Retired;
            number += 1;
        }
    }

    fn chain_at(&self, run: &Found, seq: u64) -> Known {
        if let Some(chain) = run.chains.get(&seq) {
            return Known::Is(*chain);
        }
        match self.holding(&run.name, seq) {
            Some(retired) if retired.last == seq => Known::Is(retired.head.0),
            Some(_) => Known::Retired,
            None if seq > run.tip.0 => Known::Beyond,
            None => Known::Unread,
        }
    }

    fn missing(&self, run: &str, gap: &Gap, number: u32) -> String {
        let lines = match gap.after {
            Some((after, _)) if after > gap.before.0 + 1 => format!(" (between seq {} and {after})", gap.before.0),
            _ => String::new(),
        };
        format!("segment {number}{lines} is not there, and {}", self.untold(run, number))
    }

    /// Why nothing excuses that a segment is gone.
    fn untold(&self, run: &str, segment: u32) -> &'static str {
        match self.unsigned.contains(&(run.to_owned(), segment)) {
            true => "the `retired` line that tells of it was not signed in its own run: anybody can have written it",
            false => "no `retired` line says that retention removed it",
        }
    }
}

impl Place {
    fn segment(number: u32) -> Self {
        Self { segment: Some(format!("{number:06}.jsonl")), ..Self::default() }
    }
}

/// A claim that holds, and the run that makes it.
struct Held {
    by: String,
    claim: Claim,
}

/// Checks what runs say of the ends of others.
fn claims(found: &mut [Found], retirements: &Retirements, report: &mut Report) -> Vec<Held> {
    let at: HashMap<String, usize> = found.iter().enumerate().map(|(at, run)| (run.name.clone(), at)).collect();
    let made: Vec<Held> = found
        .iter()
        .flat_map(|run| run.claims.iter().map(|claim| Held { by: run.name.clone(), claim: claim.clone() }))
        .collect();
    let mut gone = HashSet::new();
    let mut held = Vec::new();
    for Held { by, claim } in made {
        match at.get(&claim.run) {
            Some(at) if holds(&mut found[*at], &by, &claim, retirements) => held.push(Held { by, claim }),
            Some(_) => {}
            None if retirements.holding(&claim.run, claim.seq).is_some_and(|retired| ended(retired, &claim)) => {}
            None if gone.insert(claim.run.clone()) => report.problems.push(lost(&by, &claim)),
            None => {}
        }
    }
    held
}

/// Whether a removed segment ends, or lies, as the claim says.
fn ended(retired: &Retired, claim: &Claim) -> bool {
    let last = retired.last == claim.seq;
    if last { retired.head == claim.chain } else { claim.live }
}

fn lost(by: &str, claim: &Claim) -> Problem {
    let message = format!(
        "the whole run is not there: run {by} found it when it started, up to seq {}, and no signed `retired` line says \
         that retention removed it",
        claim.seq
    );
    Problem { what: What::MissingRun, run: claim.run.clone(), segment: None, line: None, seq: None, message }
}

/// Whether `run` is as `by` found it; says what is wrong if not.
fn holds(run: &mut Found, by: &str, claim: &Claim, retirements: &Retirements) -> bool {
    let (tip, seq) = (run.tip.0, claim.seq);
    let (what, message) = match retirements.chain_at(run, seq) {
        // Nothing was written yet.
        _ if seq == 0 && (claim.live || tip == 0) => return true,
        Known::Is(chain) if chain != claim.chain.0 => {
            (What::Chain, format!("run {by} found another line with seq {seq} here when it started: it was changed"))
        }
        Known::Beyond => (
            What::Hole,
            format!(
                "run {by} found lines up to seq {seq} here when it started: the lines behind seq {tip} were cut off"
            ),
        ),
        _ if !claim.live && tip > seq => {
            (What::Added, format!("run {by} found seq {seq} to be the last line here: what is behind it was added"))
        }
        Known::Is(_) | Known::Retired => return torn_as_found(run, by, claim),
        Known::Unread => return false,
    };
    run.problem(what, run.ending(), message);
    false
}

fn torn_as_found(run: &mut Found, by: &str, claim: &Claim) -> bool {
    let fits = claim.live || run.end == End::Retired || run.torn == claim.torn;
    if !fits {
        let (is, was) = (run.torn, claim.torn);
        let message = format!(
            "half a line of {} stands at the end, but run {by} found {was} when it started",
            counted(is, "byte")
        );
        run.problem(What::Torn, run.ending(), message);
    }
    fits
}

/// How every run ends.
fn ends(found: &mut [Found], claims: &[Held], options: &Options<'_>, report: &mut Report) {
    let last = claims.iter().filter(|held| !held.claim.live);
    let sealed: HashMap<&str, &str> = last.map(|held| (held.claim.run.as_str(), held.by.as_str())).collect();
    let newest = found.last().map(|run| run.name.clone());
    for run in found {
        let by = sealed.get(run.name.as_str());
        match (&run.end, by) {
            (End::Retired, _) => continue,
            (_, None) if run.closed && run.torn > 0 => {
                let message = format!("half a line of {} stands behind the signed end", counted(run.torn, "byte"));
                run.problem(What::Torn, run.ending(), message);
            }
            _ => {}
        }
        run.end = match by {
            _ if run.closed => End::Closed,
            Some(by) => End::Sealed { by: (*by).to_owned() },
            None if run.live => End::Live,
            // Had it had a line, the runs behind it would name that.
            None if run.tip.0 == 0 && run.problems.is_empty() && newest.as_ref() != Some(&run.name) => End::Empty,
            None => End::Open,
        };
        if run.end == End::Open {
            open(run, options.open_end, report);
        }
    }
}

fn open(run: &mut Found, accepted: bool, report: &mut Report) {
    let torn = if run.torn > 0 {
        format!(", with half a line of {} at the end", counted(run.torn, "byte"))
    } else {
        String::new()
    };
    if accepted {
        report.notes.push(format!("{}: ends without a seal{torn}, which was accepted (--open-end)", run.name));
        return;
    }
    let message = format!(
        "the run ends here without a seal{torn}: the process was killed or the tail was cut off, and nothing vouches \
         for what stands after the last checkpoint; start the gateway once on this directory, which seals it, or \
         compare with an anchor, or accept it with --open-end"
    );
    run.problem(What::Unsealed, run.ending(), message);
}

/// Carries signatures over: a run that is signed for signs for what its first line says of others.
fn vouch(found: &mut [Found], claims: &[Held]) {
    let at: HashMap<String, usize> = found.iter().enumerate().map(|(at, run)| (run.name.clone(), at)).collect();
    let mut changed = true;
    while changed {
        changed = false;
        for Held { by, claim } in claims.iter().rev() {
            let (Some(by), Some(run)) = (at.get(by), at.get(&claim.run)) else { continue };
            if found[*by].signed > 0 && found[*run].signed < claim.seq {
                found[*run].signed = claim.seq;
                changed = true;
            }
        }
    }
}

/// Whether a line that was kept elsewhere stands in the journal.
fn hold(anchor: &Anchor, found: &[Found], retirements: &Retirements, keys: &[PublicKey], report: &mut Report) {
    let Anchor { place, run: name, seq, chain, checkpoint } = anchor;
    let run = found.iter().find(|run| run.name == *name);
    let message = match run.map(|run| retirements.chain_at(run, *seq)) {
        _ if checkpoint.as_ref().is_some_and(|checkpoint| !checkpoint.signed(keys)) => {
            format!("the anchor {place} itself was not signed with the journal's key")
        }
        Some(Known::Is(is)) if is == *chain => return,
        Some(Known::Is(_)) => {
            format!("the anchor {place} has another line with this seq: the journal was written anew")
        }
        Some(Known::Retired) => return,
        Some(Known::Beyond) => format!("the anchor {place} saw this line: the journal was cut off before it"),
        Some(Known::Unread) => format!("the anchor {place} saw this line, which is not there or cannot be read"),
        None if retirements.holding(name, *seq).is_some_and(|gone| gone.last != *seq || gone.head.0 == *chain) => {
            return;
        }
        None if older_than_all(name, found, retirements) => {
            let note = format!("the anchor {place} is older than everything that retention left: it was not compared");
            return report.notes.push(note);
        }
        None => format!("the anchor {place} saw this run: the whole run was removed"),
    };
    let what = What::Anchor;
    report.problems.push(Problem { what, run: name.clone(), segment: None, line: None, seq: Some(*seq), message });
}

/// Whether retention removed what stood before the oldest run, and `name` is older than that.
fn older_than_all(name: &str, found: &[Found], retirements: &Retirements) -> bool {
    let Some(oldest) = found.first() else { return false };
    let removed = oldest.claims.iter().any(|claim| retirements.removed.contains_key(&claim.run));
    name < oldest.name.as_str() && (removed || oldest.retired_segments > 0)
}
