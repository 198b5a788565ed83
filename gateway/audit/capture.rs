//! Captured text: what was asked and answered, where policy wants it kept, apart from the journal.
//!
//! A record carries the SHA-256 of what was captured, so a capture that is there can be proven, and one that retention
//! has removed (or had to be removed) breaks no chain. Files lie in `captures/<run>/`, one JSON line a request.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::private;
use super::record::Id;
use crate::hex;
use crate::policy::file;
use crate::time::Stamp;

/// The text of one request, as it comes together.
#[derive(Debug, Default)]
pub struct Capture {
    request: Vec<u8>,
    answer: Vec<u8>,
    max: usize,
    cut: bool,
    redacted: bool,
}

/// What a record says of its capture.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Mark {
    /// SHA-256 over the captured bytes of the request's body.
    pub request: String,
    /// SHA-256 over the captured bytes of the answer's body.
    pub answer: String,
    /// Whether one of them was longer than what is captured at most.
    pub cut: bool,
}

/// A capture on disk. Bodies that are no UTF-8 have their odd bytes replaced; the mark's sums are of what came.
#[derive(Debug, Serialize, Deserialize)]
pub struct Captured {
    /// The request's id.
    pub id: String,
    /// When it was over.
    pub at: String,
    /// The body of the request.
    pub request: String,
    /// The body of the answer, as it went to the client.
    pub answer: String,
}

impl Capture {
    /// Begins with the `body` of a request of `tenant`, if the policy wants this one.
    pub fn begin(policy: &file::Capture, tenant: Option<&str>, body: &[u8]) -> Option<Box<Self>> {
        let named = |tenants: &Vec<String>| tenants.iter().any(|named| Some(named.as_str()) == tenant);
        let drawn = || policy.share >= 1.0 || fastrand::f64() < policy.share;
        if policy.text == file::CaptureText::None || !policy.tenants.as_ref().is_none_or(named) || !drawn() {
            return None;
        }
        let max = usize::try_from(policy.bytes_max).unwrap_or(usize::MAX);
        let redacted = policy.text == file::CaptureText::Redacted;
        let mut capture = Box::new(Self { max, redacted, ..Self::default() });
        capture.cut = !take(&mut capture.request, body, max);
        Some(capture)
    }

    /// Whether only what the guardrails left may be in it.
    pub fn is_redacted(&self) -> bool {
        self.redacted
    }

    /// A piece of the answer.
    pub fn answer(&mut self, piece: &[u8]) {
        self.cut |= !take(&mut self.answer, piece, self.max);
    }

    /// What the record says of it.
    pub fn mark(&self) -> Mark {
        Mark { request: sum(&self.request), answer: sum(&self.answer), cut: self.cut }
    }

    /// The line that goes to disk.
    pub fn line(&self, id: &Id) -> Vec<u8> {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let captured = Captured {
            id: id.to_string(),
            at: Stamp(SystemTime::now()).to_string(),
            request: text(&self.request),
            answer: text(&self.answer),
        };
        // Strings always serialise.
        let mut line = serde_json::to_vec(&captured).unwrap_or_default();
        line.push(b'\n');
        line
    }
}

/// SHA-256 over `bytes`, in hexadecimal digits.
pub fn sum(bytes: &[u8]) -> String {
    hex::text(&Sha256::digest(bytes))
}

/// Appends `piece` as far as there is room. Returns whether all of it found some.
fn take(to: &mut Vec<u8>, piece: &[u8], max: usize) -> bool {
    let room = max.saturating_sub(to.len()).min(piece.len());
    to.extend_from_slice(&piece[..room]);
    room == piece.len()
}

/// The files of one run, on the side that writes.
pub struct Store {
    directory: PathBuf,
    open: Option<(File, u64, Instant)>,
    number: u32,
}

impl Store {
    /// The captures of `run`; nothing is made before the first one.
    pub fn new(journal: &Path, run: &str) -> Self {
        Self { directory: journal.join("captures").join(run), open: None, number: 0 }
    }

    /// Appends lines, on disk when this returns.
    pub fn append(&mut self, lines: &[u8], policy: &file::Audit) -> io::Result<()> {
        if lines.is_empty() {
            return Ok(());
        }
        let full = |(_, bytes, begun): &(File, u64, Instant)| {
            *bytes >= policy.segment_bytes || begun.elapsed() >= Duration::from_secs(policy.segment_s)
        };
        if self.open.as_ref().is_none_or(full) {
            private::directory(&self.directory)?;
            self.number += 1;
            let path = self.directory.join(format!("{:06}.jsonl", self.number));
            self.open = Some((private::append(&path)?, 0, Instant::now()));
        }
        let Some((file, bytes, _)) = &mut self.open else { return Ok(()) };
        file.set_len(*bytes)?;
        file.write_all(lines)?;
        file.sync_data()?;
        *bytes += lines.len() as u64;
        Ok(())
    }
}

/// Removes captures that are older than `days`.
pub fn retire(journal: &Path, days: u32) -> io::Result<()> {
    let oldest = SystemTime::now() - Duration::from_secs(86_400 * u64::from(days));
    for file in files(journal)? {
        if std::fs::metadata(&file)?.modified()? < oldest {
            std::fs::remove_file(&file)?;
            tracing::info!(file = %file.display(), "captures retired");
        }
    }
    Ok(())
}

/// The capture of the request `id`, if the journal in `directory` still has it.
pub fn find(directory: &Path, id: &str) -> io::Result<Option<Captured>> {
    let wanted = format!(r#"{{"id":"{id}","#);
    for file in files(directory)?.iter().rev() {
        for line in BufReader::new(File::open(file)?).split(b'\n') {
            let line = line?;
            if line.starts_with(wanted.as_bytes()) {
                return Ok(serde_json::from_slice(&line).ok());
            }
        }
    }
    Ok(None)
}

/// Every file with captures, oldest first.
fn files(journal: &Path) -> io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let captures = journal.join("captures");
    if captures.is_dir() {
        for run in std::fs::read_dir(captures)? {
            for file in std::fs::read_dir(run?.path())? {
                files.push(file?.path());
            }
        }
    }
    files.sort();
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(share: f64) -> file::Capture {
        file::Capture { text: file::CaptureText::Full, tenants: None, share, bytes_max: 8, keep_days: None }
    }

    #[test]
    fn nothing_is_captured_unless_the_policy_asks() {
        assert!(Capture::begin(&file::Capture::default(), None, b"canary").is_none());
        assert!(Capture::begin(&policy(0.0), None, b"canary").is_none());
    }

    #[test]
    fn only_the_tenants_that_are_named_are_captured() {
        let policy = file::Capture { tenants: Some(vec!["research".to_owned()]), ..policy(1.0) };
        let captured = |tenant| Capture::begin(&policy, tenant, b"canary").is_some();
        assert_eq!([captured(Some("research")), captured(Some("legal")), captured(None)], [true, false, false]);
    }

    #[test]
    fn a_capture_is_bounded_and_its_record_proves_it() {
        let mut capture = Capture::begin(&policy(1.0), None, b"question").unwrap();
        capture.answer(b"a\xff");
        assert!(!capture.mark().cut);
        capture.answer(b"nswer is too long");
        let mark = capture.mark();
        assert!(mark.cut);
        assert_eq!(mark.request, format!("{:x}", Sha256::digest(b"question")));
        assert_eq!(mark.answer, format!("{:x}", Sha256::digest(b"a\xffnswer i".get(..8).unwrap())));
    }

    #[test]
    fn a_capture_is_found_by_its_id() {
        let directory = tempfile::tempdir().unwrap();
        let mut store = Store::new(directory.path(), "run");
        let capture = Capture::begin(&policy(1.0), None, b"question").unwrap();
        let (one, other) = (Id::new(), Id::new());
        for id in [&one, &other] {
            store.append(&capture.line(id), &file::Audit::default()).unwrap();
        }
        assert_eq!(find(directory.path(), other.as_str()).unwrap().unwrap().request, "question");
        assert!(find(directory.path(), Id::new().as_str()).unwrap().is_none());
    }
}
