//! A journal for tests, made from the description of the format and nothing of the writer, so that two must agree.

use std::path::{Path, PathBuf};

use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// A directory with a journal.
pub struct Made {
    pub directory: tempfile::TempDir,
    pub key: Ed25519KeyPair,
    /// The earlier runs' ends, for the next `open` line.
    pub previous: Vec<Value>,
    ids: u64,
}

/// A run that is being written.
pub struct MadeRun<'a> {
    made: &'a mut Made,
    pub name: String,
    pub path: PathBuf,
    pub seq: u64,
    pub chain: String,
    segment: u32,
    first: u64,
    records: u64,
}

pub fn digits(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// `line` (without its chain member) with its chain member behind `before`.
pub fn chained(before: &str, line: &str) -> (String, String) {
    let chain = digits(&Sha256::digest(format!("{before}{line}")));
    (format!("{line},\"chain\":\"{chain}\"}}\n"), chain)
}

pub fn zeros() -> String {
    "0".repeat(64)
}

/// The time at which line `seq` of a run is written.
fn time(seq: u64) -> String {
    format!("2026-11-22T14:{:02}:{:02}.{:06}Z", seq / 60 % 60, seq % 60, seq)
}

impl Made {
    pub fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let key = Ed25519KeyPair::generate().unwrap();
        std::fs::write(directory.path().join("signing.pub"), digits(key.public_key().as_ref()) + "\n").unwrap();
        Self { directory, key, previous: Vec::new(), ids: 0 }
    }

    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    pub fn public(&self) -> String {
        digits(self.key.public_key().as_ref())
    }

    pub fn key_id(&self) -> String {
        digits(&Sha256::digest(self.key.public_key().as_ref()))[..16].to_owned()
    }

    /// The id of the `n`th record.
    pub fn id(n: u64) -> String {
        // 2026-11-22T14:00:00Z in milliseconds, and a number.
        format!("{:08x}-{:04x}-7000-8000-{n:012x}", 1_795_356_000_000_u64 >> 16, 1_795_356_000_000_u64 & 0xffff)
    }

    /// Begins run `n`, on another day each.
    pub fn run(&mut self, n: u32) -> MadeRun<'_> {
        let name = format!("20261122T1400{n:02}Z-{n:08x}");
        let path = self.path().join("runs").join(&name);
        std::fs::create_dir_all(&path).unwrap();
        std::fs::write(path.join("lock"), "").unwrap();
        let previous = std::mem::take(&mut self.previous);
        let key = self.key_id();
        let mut run = MadeRun { made: self, name, path, seq: 0, chain: zeros(), segment: 1, first: 1, records: 0 };
        let opening = json!({"run": run.name, "version": "0.1.0", "key": key, "previous": previous});
        run.line("open", &opening);
        run
    }

    /// The files of run `n`, sorted.
    pub fn file(&self, n: u32, segment: u32) -> PathBuf {
        self.path().join("runs").join(format!("20261122T1400{n:02}Z-{n:08x}")).join(format!("{segment:06}.jsonl"))
    }

    /// Changes the lines of a file.
    pub fn edit(&self, n: u32, segment: u32, edit: impl FnOnce(&mut Vec<String>)) {
        let path = self.file(n, segment);
        let text = std::fs::read_to_string(&path).unwrap();
        let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
        edit(&mut lines);
        std::fs::write(&path, lines.iter().map(|line| format!("{line}\n")).collect::<String>()).unwrap();
    }
}

impl MadeRun<'_> {
    /// Appends a line.
    pub fn line(&mut self, kind: &str, members: &Value) -> String {
        self.seq += 1;
        let members = members.to_string();
        let members = members.trim_start_matches('{').trim_end_matches('}');
        let (seq, at) = (self.seq, time(self.seq));
        // Trimming took the braces of a member at the end too; there is none in these tests' last members.
        let line = format!("{{\"v\":1,\"seq\":{seq},\"kind\":\"{kind}\",\"at\":\"{at}\",{members}");
        let (line, chain) = chained(&self.chain, &line);
        self.chain = chain;
        let file = self.path.join(format!("{:06}.jsonl", self.segment));
        let text = std::fs::read_to_string(&file).unwrap_or_default() + &line;
        std::fs::write(&file, text).unwrap();
        line
    }

    /// Appends a record; its id.
    pub fn record(&mut self) -> String {
        let id = Made::id(self.made.ids);
        self.made.ids += 1;
        self.record_with(&json!({"id": id, "outcome": "ok", "status": 200, "model": {"asked": "m"}, "z": 0}));
        id
    }

    pub fn record_with(&mut self, record: &Value) {
        self.records += 1;
        self.line("request", record);
    }

    pub fn records(&mut self, count: usize) -> &mut Self {
        (0..count).for_each(|_| drop(self.record()));
        self
    }

    fn sign(&mut self, kind: &str) -> String {
        let (run, seq, records, head) = (self.name.clone(), self.seq + 1, self.records, self.chain.clone());
        let at = time(seq);
        let message = format!("infergate checkpoint v1\n{run}\n{seq}\n{records}\n{at}\n{head}\n");
        let signature = digits(self.made.key.sign(message.as_bytes()).as_ref());
        let members = json!({"run": run, "segment": self.segment, "segment_first": self.first, "records": records,
            "head": head, "key": self.made.key_id(), "signature": signature});
        self.line(kind, &members)
    }

    pub fn checkpoint(&mut self) -> String {
        self.sign("checkpoint")
    }

    /// Ends the segment and begins the next. What a `retired` line would say of the one that ended.
    pub fn rotate(&mut self) -> Value {
        self.checkpoint();
        let ended = self.retired();
        let (prev, segment) = (self.chain.clone(), self.segment + 1);
        (self.segment, self.first) = (segment, self.seq + 1);
        let run = self.name.clone();
        self.line("segment", &json!({"run": run, "segment": segment, "prev": prev}));
        ended
    }

    /// What a `retired` line would say of the segment that is being written.
    pub fn retired(&self) -> Value {
        let file = self.path.join(format!("{:06}.jsonl", self.segment));
        let text = std::fs::read_to_string(file).unwrap();
        let first: Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
        let prev = first.get("prev").cloned().unwrap_or_else(|| zeros().into());
        let records = text.matches("\"kind\":\"request\"").count();
        json!({"run": self.name, "segment": self.segment, "first": self.first, "last": self.seq, "prev": prev,
            "head": self.chain, "records": records})
    }

    /// The end of the run as the next `open` line tells it.
    pub fn tip(&mut self, torn: u64, live: bool) {
        let tip = json!({"run": self.name, "seq": self.seq, "chain": self.chain, "torn": torn, "live": live});
        self.made.previous.push(tip);
    }

    /// Ends the run in order.
    pub fn close(mut self) -> String {
        let line = self.sign("close");
        self.tip(0, false);
        line
    }

    /// Ends the run as a kill does, with some bytes of a line cut off.
    pub fn kill(mut self, torn: &str) {
        let file = self.path.join(format!("{:06}.jsonl", self.segment));
        let text = std::fs::read_to_string(&file).unwrap() + torn;
        std::fs::write(&file, text).unwrap();
        self.tip(torn.len() as u64, false);
    }
}

/// Replaces a plain file by a compressed one.
pub fn pack(path: &Path) {
    let packed = zstd::encode_all(std::fs::File::open(path).unwrap(), 3).unwrap();
    std::fs::write(path.with_extension("jsonl.zst"), packed).unwrap();
    std::fs::remove_file(path).unwrap();
}

/// Computes the chain anew from line `from` on, as somebody would who has no key.
pub fn rechain(lines: &mut [String], from: usize) {
    let own = |line: &str| line[line.len() - 66..line.len() - 2].to_owned();
    let mut before = if from == 0 { zeros() } else { own(&lines[from - 1]) };
    for line in &mut lines[from..] {
        let (again, chain) = chained(&before, &line[..line.len() - 76]);
        (*line, before) = (again.trim_end().to_owned(), chain);
    }
}
