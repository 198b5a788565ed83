//! The tips of earlier runs: a new run names them in its first line, so that nobody can shorten an old one later.

use std::collections::HashSet;
use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::read::{self, Run};

/// The end of a run as another run found it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tip {
    /// The run.
    pub run: String,
    /// Its last whole line.
    pub seq: u64,
    /// That line's chain.
    pub chain: String,
    /// Bytes behind it, of a line that was cut off by a crash.
    pub torn: u64,
    /// Whether its process was still alive, so that the tip moves on.
    pub live: bool,
}

#[derive(Deserialize)]
struct Line {
    seq: u64,
    chain: String,
    #[serde(default)]
    previous: Vec<Tip>,
}

/// The tips of the runs in `directory` whose end no run has named yet.
pub fn of_earlier_runs(directory: &Path) -> io::Result<Vec<Tip>> {
    let runs = read::runs(directory)?;
    let named: HashSet<String> = runs.iter().flat_map(named_by).filter(|tip| !tip.live).map(|tip| tip.run).collect();
    let unnamed = runs.iter().filter(|run| !named.contains(&run.name));
    Ok(unnamed.filter_map(|run| of(run).unwrap_or_else(|error| unread(run, &error))).collect())
}

/// The tips that the first line of `run` names.
fn named_by(run: &Run) -> Vec<Tip> {
    let line = run.lines(1).next().map(|line| line.and_then(|line| serde_json::from_slice::<Line>(line).ok()));
    line.unwrap_or_else(|error| unread(run, &error)).map(|line| line.previous).unwrap_or_default()
}

/// A damaged run keeps nobody from starting; `verify` names the damage.
fn unread<T>(run: &Run, error: &io::Error) -> Option<T> {
    // Another process's retention may have removed it since it was listed.
    if error.kind() != io::ErrorKind::NotFound {
        tracing::error!(run = %run.name, %error, "an earlier run of the journal cannot be read: its end stays unnamed");
    }
    None
}

/// The tip of one run; none if it has not one whole line.
fn of(run: &Run) -> io::Result<Option<Tip>> {
    // Asked first: a process that ends in between leaves a tip that is final, which is no harm to call live.
    let live = run.is_live();
    let mut torn = 0;
    for segment in run.segments()?.iter().rev() {
        let (mut lines, mut last) = (segment.open()?, Vec::new());
        while lines.advance()? {
            last.clear();
            last.extend_from_slice(lines.line());
        }
        torn += lines.torn();
        if let Ok(Line { seq, chain, .. }) = serde_json::from_slice(&last) {
            return Ok(Some(Tip { run: run.name.clone(), seq, chain, torn, live }));
        }
    }
    Ok(None)
}
