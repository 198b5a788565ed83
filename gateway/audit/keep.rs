//! Housekeeping of the journal: finished segments are compressed, and the oldest go when policy says so.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use rustix::fs::{FlockOperation, flock};
use serde::Serialize;

use super::journal::Journal;
use super::read::{self, Run, Segment};
use super::{capture, fanout, private};
use crate::policy::file::Audit;

/// Records are so alike that zstd's fastest levels make them much smaller: this one 8 to 1, at a fifth of the time that
/// the usual level takes for 12 to 1. It is CPU that requests would like to have.
const LEVEL: i32 = -3;

/// How much is compressed at once, each piece by itself: that takes a third less than a stream, and one can be read like
/// the other.
const PIECE: usize = 1 << 20;

/// How long the ledger is waited for, which is always a moment behind.
const LEDGER: Duration = Duration::from_secs(2);

/// A segment that retention removed.
#[derive(Debug, Serialize)]
struct Retired {
    run: String,
    segment: u32,
    first: u64,
    last: u64,
    /// The chain before its first line.
    prev: String,
    /// The chain of its last line.
    head: String,
    /// Request lines in it.
    records: u64,
}

/// Puts the journal in order on a thread of its own, because disks are slow and requests are not to wait.
pub fn house(journal: &Arc<Journal>) {
    // One works and one waits its turn: a third would find nothing that the second leaves.
    if Arc::strong_count(&journal.keepers) > 2 {
        return;
    }
    let (keeper, journal) = (journal.keepers.clone(), journal.clone());
    let work = move || {
        let _keeper = keeper;
        // One at a time, also among processes.
        let lock = private::fresh(&journal.directory().join("keep.lock"));
        let Ok(_lock) = lock.and_then(|lock| Ok(flock(&lock, FlockOperation::LockExclusive).map(|()| lock)?)) else {
            return;
        };
        let policy = journal.policy();
        // Each whatever became of the one before: a full disk cannot compress, but it can let go.
        let compressed = if policy.compress { compress_all(&journal) } else { Ok(()) };
        let retired = retire(&journal, &policy);
        let captures = policy.capture.keep_days.map_or(Ok(()), |days| capture::retire(journal.directory(), days));
        for error in [compressed, retired, captures].into_iter().filter_map(Result::err) {
            tracing::error!(%error, "the journal could not be put in order");
        }
    };
    if let Err(error) = std::thread::Builder::new().name("journal-keep".to_owned()).spawn(work) {
        tracing::error!(%error, "the journal could not be put in order");
    }
}

/// The segments that nobody writes to any more, oldest first: those of this run but the last, and all of runs whose
/// process is gone. Other living processes keep their own.
fn finished(journal: &Journal) -> io::Result<Vec<(Run, Segment)>> {
    let mut finished = Vec::new();
    for run in read::runs(journal.directory())? {
        let own = run.name == journal.run();
        if !own && run.is_live() {
            continue;
        }
        let mut segments = run.segments()?;
        if own {
            segments.pop();
        }
        finished.extend(segments.into_iter().map(|segment| (run.clone(), segment)));
    }
    Ok(finished)
}

fn compress_all(journal: &Journal) -> io::Result<()> {
    let plain = finished(journal)?.into_iter().filter(|(_, segment)| !segment.packed);
    plain.map(|(_, segment)| segment).try_for_each(|segment| compress(&segment.path))
}

/// Replaces a file by its compressed form; at every moment one of the two is whole.
fn compress(path: &Path) -> io::Result<()> {
    let named = |suffix: &str| PathBuf::from(format!("{}{suffix}", path.display()));
    let (fresh, packed) = (named(".zst.new"), named(".zst"));
    if let Err(error) = pack(path, &fresh) {
        // Half of it would only take room.
        let _ = std::fs::remove_file(&fresh);
        return Err(error);
    }
    std::fs::rename(&fresh, &packed)?;
    path.parent().map_or(Ok(()), private::sync)?;
    std::fs::remove_file(path)
}

fn pack(path: &Path, fresh: &Path) -> io::Result<()> {
    let (source, mut target) = (File::open(path)?, private::fresh(fresh)?);
    let (mut packer, mut piece) = (zstd::bulk::Compressor::new(LEVEL)?, Vec::with_capacity(PIECE));
    loop {
        piece.clear();
        (&source).take(PIECE as u64).read_to_end(&mut piece)?;
        target.write_all(&packer.compress(&piece)?)?;
        if piece.len() < PIECE {
            break;
        }
    }
    // Its age is that of its lines.
    target.set_modified(source.metadata()?.modified()?)?;
    target.sync_all()
}

/// Removes what is too old or too much, oldest first, and says so in the journal before it is gone. What a sink or
/// the ledger has not had yet stays.
fn retire(journal: &Journal, policy: &Audit) -> io::Result<()> {
    let segments = finished(journal)?;
    let size = |segment: &Segment| std::fs::metadata(&segment.path).map(|file| file.len());
    let mut total = segments.iter().map(|(_, segment)| size(segment)).sum::<io::Result<u64>>()?;
    let oldest = policy.keep_days.map(|days| SystemTime::now() - Duration::from_secs(86_400 * u64::from(days)));
    let sinks: Vec<&str> = policy.sinks.iter().map(|sink| sink.name.as_str()).collect();
    let mut leaving = Vec::new();
    let mut told_by = 0;
    for (run, segment) in segments {
        let written = std::fs::metadata(&segment.path)?.modified()?;
        let too_old = oldest.is_some_and(|oldest| written < oldest);
        let too_much = policy.keep_bytes.is_some_and(|max| total > max);
        if !too_old && !too_much {
            break;
        }
        let retired = told(&run, &segment)?;
        let is_wanted = fanout::wanted(journal.directory(), &run.name, &sinks).is_some_and(|next| next <= retired.last);
        if is_wanted || !is_folded(journal, &run, retired.last) {
            tracing::warn!(run = %run.name, segment = segment.number, "kept beyond its time: a sink or the ledger has not had it yet");
            break;
        }
        total -= size(&segment)?;
        tracing::info!(run = %run.name, segment = segment.number, "journal segment retired");
        told_by = journal.push("retired", SystemTime::now(), &retired);
        leaving.push((run, segment));
    }
    // One signature, however many there are: without it nobody could tell that it was the gateway who removed them.
    if !leaving.is_empty() && !journal.signed(told_by) {
        return Err(io::Error::other("what is to be retired cannot be put on record; it stays"));
    }
    leaving.iter().try_for_each(|(run, segment)| {
        std::fs::remove_file(&segment.path)?;
        forget_empty(run)
    })
}

/// Whether the ledger has everything up to line `last`, where there is one.
fn is_folded(journal: &Journal, run: &Run, last: u64) -> bool {
    let begun = Instant::now();
    let is_wanted =
        || fanout::wanted(journal.directory(), &run.name, &[fanout::LEDGER]).is_some_and(|next| next <= last);
    while journal.feeds_ledger() && is_wanted() {
        if begun.elapsed() > LEDGER {
            return false;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    true
}

/// What the journal remembers of a segment.
fn told(run: &Run, segment: &Segment) -> io::Result<Retired> {
    let (mut lines, mut ends, mut records) = (segment.open()?, None, 0);
    while lines.advance()? {
        let line = lines.line();
        let Some(seq) = read::seq(line) else { continue };
        let chain = read::chain(line).map(|(chain, _)| String::from_utf8_lossy(chain).into_owned()).unwrap_or_default();
        records += u64::from(read::kind(line) == b"request");
        let (first, prev) = match ends {
            Some((first, prev, _, _)) => (first, prev),
            None => (seq, prev_of(line)),
        };
        ends = Some((first, prev, seq, chain));
    }
    let (first, prev, last, head) = ends.unwrap_or_default();
    Ok(Retired { run: run.name.clone(), segment: segment.number, first, last, prev, head, records })
}

/// The chain before a segment's first line, which says it; before a run's first line it is zeros.
fn prev_of(line: &[u8]) -> String {
    #[derive(serde::Deserialize)]
    struct First {
        prev: Option<String>,
    }
    let said = serde_json::from_slice::<First>(line).ok().and_then(|first| first.prev);
    said.unwrap_or_else(|| "0".repeat(64))
}

/// A run without segments leaves nothing but its lock.
fn forget_empty(run: &Run) -> io::Result<()> {
    match run.segments()?.is_empty() && !run.is_live() {
        true => std::fs::remove_dir_all(&run.path),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_compressed_segment_has_the_lines_of_the_plain_one_whatever_its_length() {
        let directory = tempfile::tempdir().unwrap();
        for (number, length) in [(1, 0), (2, 1), (3, PIECE - 1), (4, PIECE), (5, 2 * PIECE + 7)] {
            let path = directory.path().join(format!("{number:06}.jsonl"));
            let text: Vec<u8> =
                (0..length).map(|at| if at % 99 == 0 { b'\n' } else { b'0' + (at / 99 % 10) as u8 }).collect();
            std::fs::write(&path, &text).unwrap();
            compress(&path).unwrap();
            let run = Run { name: String::new(), path: directory.path().to_owned() };
            let segment = run.segments().unwrap().pop().unwrap();
            assert!(segment.packed && segment.number == number && !path.exists());
            let (mut lines, mut read) = (segment.open().unwrap(), Vec::new());
            while lines.advance().unwrap() {
                read.extend([lines.line(), b"\n"].concat());
            }
            let whole = text.iter().rposition(|byte| *byte == b'\n').map_or(0, |last| last + 1);
            assert_eq!((read.len(), lines.torn()), (whole, (length - whole) as u64), "{length}");
            assert!(read == text[..whole]);
        }
    }
}
