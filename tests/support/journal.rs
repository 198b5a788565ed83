//! A gateway's journal, read from its files by nothing of the gateway's own, and what `infergate audit` says of it.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::{Gateway, Process};

/// An id that no request has.
const NOBODY: &str = "01970000-0000-7000-8000-000000000000";

/// A directory with a journal.
#[derive(Clone, Debug)]
pub struct Journal(pub PathBuf);

impl Journal {
    /// The journal of `gateway`, as far as it is on disk.
    pub fn of(gateway: &Gateway) -> Self {
        Self(gateway.directory.path().join("journal"))
    }

    /// The journal of `gateway` when nothing runs any more and everything is on disk.
    pub async fn settled(gateway: &Gateway) -> Self {
        gateway.comes_to("infergate_requests_in_flight", 0.0).await;
        // It answers when all that has been filed is on disk.
        gateway.admin(&format!("/admin/v1/requests/{NOBODY}")).await;
        Self::of(gateway)
    }

    /// The directories of its runs, by name.
    pub fn runs(&self) -> Vec<PathBuf> {
        listed(&self.0.join("runs"))
    }

    /// The segments of all runs, in order; where one is there plain and compressed, the plain one.
    pub fn segments(&self) -> Vec<PathBuf> {
        let mut segments: Vec<_> =
            self.runs().iter().flat_map(|run| listed(run)).filter(|path| is_segment(path)).collect();
        segments.dedup_by_key(|path| path.display().to_string().trim_end_matches(".zst").to_owned());
        segments
    }

    /// Every whole line of every run.
    pub fn lines(&self) -> Vec<Value> {
        let texts = self.segments().into_iter().map(|path| text(&path));
        let whole = |text: String| text.split_inclusive('\n').filter(|line| line.ends_with('\n')).map(parse).collect();
        texts.flat_map::<Vec<_>, _>(whole).collect()
    }

    /// The lines of a kind.
    pub fn of_kind(&self, kind: &str) -> Vec<Value> {
        self.lines().into_iter().filter(|line| line["kind"] == kind).collect()
    }

    /// The records by id, each with how often it is there.
    pub fn ids(&self) -> HashMap<String, usize> {
        let mut ids = HashMap::new();
        for record in self.of_kind("request") {
            *ids.entry(record["id"].as_str().unwrap().to_owned()).or_default() += 1;
        }
        ids
    }

    /// The only record with this id.
    pub fn record(&self, id: &str) -> Value {
        let mut found: Vec<_> = self.of_kind("request").into_iter().filter(|record| record["id"] == id).collect();
        assert_eq!(found.len(), 1, "records of {id}");
        found.remove(0)
    }

    /// The acts of this name.
    pub fn acts(&self, act: &str) -> Vec<Value> {
        self.of_kind("act").into_iter().filter(|line| line["act"] == act).collect()
    }

    /// What its files take together, in bytes.
    pub fn size(&self) -> u64 {
        let files = self.runs().into_iter().flat_map(|run| listed(&run));
        files.filter_map(|path| fs::metadata(path).ok()).map(|file| file.len()).sum()
    }

    /// Every byte of every file in it, segments unpacked.
    pub fn everything(&self) -> Vec<u8> {
        let files = listed(&self.0).into_iter().chain(self.runs().into_iter().flat_map(|run| listed(&run)));
        files.filter(|path| path.is_file()).flat_map(|path| bytes(&path)).collect()
    }

    /// What `infergate audit verify` makes of it: the exit code and the report.
    pub fn verify(&self) -> (i32, Value) {
        let (code, out, err) = Process::run(&["audit", "verify", "--json", self.0.to_str().unwrap()]);
        let report = serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error}: {out}{err}"));
        (code.unwrap(), report)
    }

    /// Asserts that it is proved; returns the report.
    #[track_caller]
    pub fn proved(&self) -> Value {
        let (code, report) = self.verify();
        assert_eq!((code, &report["proved"]), (0, &true.into()), "{:#}", report["problems"]);
        report
    }

    /// A copy to be changed.
    pub fn copy(&self) -> (tempfile::TempDir, Self) {
        let directory = tempfile::tempdir().unwrap();
        copy(&self.0, directory.path());
        let journal = Self(directory.path().to_owned());
        (directory, journal)
    }
}

fn copy(from: &Path, to: &Path) {
    for path in listed(from) {
        let target = to.join(path.file_name().unwrap());
        if path.is_dir() {
            fs::create_dir_all(&target).unwrap();
            copy(&path, &target);
        } else {
            fs::copy(&path, &target).unwrap();
        }
    }
}

/// What is in a directory, by name; nothing if it has just been removed.
fn listed(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).map(|entries| entries.filter_map(|entry| Some(entry.ok()?.path())));
    let mut paths: Vec<_> = entries.into_iter().flatten().collect();
    paths.sort();
    paths
}

fn is_segment(path: &Path) -> bool {
    let name = path.file_name().unwrap().to_str().unwrap();
    name.ends_with(".jsonl") || name.ends_with(".jsonl.zst")
}

/// The bytes of a file, unpacked.
pub fn bytes(path: &Path) -> Vec<u8> {
    // It may be compressed or removed between two looks.
    let read = fs::read(path).or_else(|_| fs::read(format!("{}.zst", path.display()))).unwrap_or_default();
    match read.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
        true => zstd::decode_all(&read[..]).unwrap(),
        false => read,
    }
}

/// The text of a segment.
pub fn text(path: &Path) -> String {
    String::from_utf8(bytes(path)).unwrap()
}

/// Replaces a segment's lines.
pub fn edit(path: &Path, change: impl FnOnce(&mut Vec<String>)) {
    let mut lines: Vec<String> = text(path).split_inclusive('\n').map(str::to_owned).collect();
    change(&mut lines);
    let packed = path.extension().is_some_and(|extension| extension == "zst");
    let plain = lines.concat().into_bytes();
    fs::write(path, if packed { zstd::encode_all(&plain[..], 3).unwrap() } else { plain }).unwrap();
}

fn parse(line: &str) -> Value {
    serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"))
}
