//! The proof that nobody changed, removed or added a line of the journal; it needs the directory and the public key.
//!
//! Every line is chained to the one before it, checkpoints sign the chain, a run's first line names the ends of the
//! runs before it, and what retention removed is named by `retired` lines. What nothing vouches for is said too: the
//! lines behind the last checkpoint of a run that was killed, until the next start seals it, and the newest run as a
//! whole, whose disappearance only an anchor (a checkpoint line kept elsewhere) can show.

mod across;
mod key;
mod run;
#[cfg(test)]
mod tests;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::audit::read::{self, Run};
use crate::audit::story::counted;

pub use key::PublicKey;
use run::Found;

/// Problems that are told of one run; the rest is counted.
const TOLD: usize = 20;

/// How a journal is proved.
#[derive(Default)]
pub struct Options<'a> {
    /// The keys that may have signed it. Empty: the one in the directory itself, which proves less.
    pub keys: Vec<PublicKey>,
    /// Files of checkpoint lines that were kept elsewhere; each line must stand in the journal.
    pub anchors: Vec<PathBuf>,
    /// Whether a run that ends without a seal is accepted.
    pub open_end: bool,
    /// Is told now and then how many lines and bytes are done.
    pub progress: Option<&'a dyn Fn(u64, u64)>,
}

/// What a proof came to.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    /// Every run in the directory, oldest first.
    pub runs: Vec<RunReport>,
    /// All that is wrong. Empty: the journal is proved.
    pub problems: Vec<Problem>,
    /// What the reader of the proof should know.
    pub notes: Vec<String>,
    /// Requests on record.
    pub records: u64,
    /// Lines.
    pub lines: u64,
    /// Lines that are chained, but wait for the next checkpoint to be signed: whoever can write there could still
    /// replace them.
    pub unsigned: u64,
}

/// What became of one run.
#[derive(Debug, Serialize)]
pub struct RunReport {
    /// Its name.
    pub run: String,
    /// Segments that are there.
    pub segments: usize,
    /// Segments that retention removed.
    pub retired: usize,
    /// Lines that are there.
    pub lines: u64,
    /// Requests on record among them.
    pub records: u64,
    /// The time on its first line.
    pub from: String,
    /// The time on its last line.
    pub to: String,
    /// How it ends.
    #[serde(flatten)]
    pub end: End,
    /// Up to which seq signatures vouch for it.
    pub signed_to: u64,
    /// What is wrong with it.
    pub problems: usize,
}

/// How a run ends.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "end", rename_all = "snake_case")]
pub enum End {
    /// With a signed last line.
    Closed,
    /// Without one, but a later run found its end and signed for it.
    Sealed {
        /// That run.
        by: String,
    },
    /// It goes on.
    Live,
    /// Retention removed its end.
    Retired,
    /// Its process was killed before it wrote a line.
    Empty,
    /// Nothing vouches for its end.
    Open,
}

/// Something that should not be.
#[derive(Clone, Debug, Serialize)]
pub struct Problem {
    /// What it is.
    pub what: What,
    /// The run.
    pub run: String,
    /// The file in the run's directory.
    pub segment: Option<String>,
    /// The line in the file, from 1.
    pub line: Option<u64>,
    /// The line's seq.
    pub seq: Option<u64>,
    /// What that means.
    pub message: String,
}

/// What can be wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum What {
    /// A line does not follow from the one before it.
    Chain,
    /// Lines are missing.
    Hole,
    /// A line stands where it should not, or twice.
    Repeat,
    /// Lines stand behind an end that was signed for.
    Added,
    /// A signature does not fit.
    Signature,
    /// Half a line.
    Torn,
    /// A segment is gone.
    MissingSegment,
    /// A run is gone.
    MissingRun,
    /// Two records have the same id.
    DuplicateId,
    /// A checkpoint counts other records than there are.
    Count,
    /// Nothing vouches for the end of a run.
    Unsealed,
    /// No line of a journal, or one where another is due.
    Malformed,
    /// A checkpoint that was kept elsewhere is not in the journal.
    Anchor,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.run)?;
        self.segment.iter().try_for_each(|segment| write!(f, "/{segment}"))?;
        self.line.iter().try_for_each(|line| write!(f, ":{line}"))?;
        self.seq.iter().try_for_each(|seq| write!(f, ": seq {seq}"))?;
        write!(f, ": {}", self.message)
    }
}

/// Proves the journal in `directory`. An error: it cannot be read.
pub fn directory(directory: &Path, options: &Options<'_>) -> io::Result<Report> {
    let mut report = Report::default();
    let keys = key::keys(directory, &options.keys, &mut report.notes)?;
    let anchors = across::anchors(&options.anchors)?;
    let runs = read::runs(directory)?;
    let asked = asked(&runs, &anchors)?;
    let mut walk = run::Walk::new(&keys, options.progress);
    let none = BTreeSet::new();
    let mut found = Vec::new();
    for run in &runs {
        found.push(walk.run(run, asked.get(&run.name).unwrap_or(&none))?);
    }
    across::judge(&mut found, &anchors, &keys, options, &mut report);
    Ok(finish(found, report))
}

/// Which lines' chain values later lines and anchors ask for, by run.
fn asked(runs: &[Run], anchors: &[across::Anchor]) -> io::Result<HashMap<String, BTreeSet<u64>>> {
    let mut asked: HashMap<String, BTreeSet<u64>> = HashMap::new();
    for run in runs {
        for claim in run::claims(run)? {
            asked.entry(claim.run).or_default().insert(claim.seq);
        }
    }
    for anchor in anchors {
        asked.entry(anchor.run.clone()).or_default().insert(anchor.seq);
    }
    Ok(asked)
}

fn finish(found: Vec<Found>, mut report: Report) -> Report {
    let mut problems = Vec::new();
    for run in found {
        report.lines += run.lines;
        report.records += run.records;
        report.unsigned += run.tip.0.saturating_sub(run.signed).min(run.lines);
        report.notes.extend(run.notes());
        if run.untold > 0 {
            report.notes.push(format!("{}: {}, not told", run.name, counted(run.untold as u64, "more problem")));
        }
        report.runs.push(run.report());
        problems.extend(run.problems);
    }
    report.problems.splice(0..0, problems);
    report
}

/// The ids of all records so far.
type Ids = HashSet<[u8; 16]>;

/// A line's chain value: 64 hexadecimal digits.
type Chain = [u8; 64];

/// What the first line of a run is chained to.
const GENESIS: Chain = [b'0'; 64];

fn text(chain: &Chain) -> &str {
    std::str::from_utf8(chain).unwrap_or_default()
}
