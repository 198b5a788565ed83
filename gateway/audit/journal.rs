//! The journal: one line a record, appended, chained, signed, committed in groups.
//!
//! Requests push their lines into a buffer; one thread empties it every `commit_ms`, so no request wakes anybody. On
//! disk a line is a JSON object whose first member after the version is `seq`, without holes, and whose last is
//! `chain`: SHA-256 over the chain of the line before and this line's own bytes. Every minute, and where a segment
//! ends, a checkpoint signs the chain with Ed25519. The format is told in `config/guides/journal.md`.

use std::cell::RefCell;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use arc_swap::ArcSwap;
use parking_lot::{Condvar, Mutex, MutexGuard};
use serde::Serialize;
use sha2::{Digest, Sha256};
use tokio::sync::watch;

use super::capture::Store;
use super::json::{self, Line};
use super::key::SigningKey;
use super::read;
use super::record::Record;
use super::tip::{self, Tip};
use super::{keep, private};
use crate::decimal;
use crate::hex;
use crate::ledger::facts::{Fact, Facts, Feed};
use crate::policy::file::Audit;
use crate::telemetry::{JournalMeters, Telemetry};
use crate::time::Stamp;

/// How long the disk is left alone after it failed.
const RETRY: Duration = Duration::from_millis(250);
/// How often the journal is put in order where nothing else asks for it.
const KEEP_EVERY: Duration = Duration::from_secs(3600);
/// How long a thread waits for the disk that could go on without.
const PATIENCE: Duration = Duration::from_secs(30);
/// Captured text that may wait for the disk, in bytes. Beyond it nothing is captured.
const CAPTURES: usize = 64 << 20;
/// How long the end of the process waits for the last lines.
const CLOSE: Duration = Duration::from_secs(10);
/// A buffer that has grown beyond this is given back when it has been emptied.
const BUFFER_KEPT: usize = 4 << 20;
/// Lines are chained in groups of about so many bytes, while they are still in the core's cache.
const GROUP: usize = 128 << 10;
/// The chain before the first line of a run.
const GENESIS: Chain = [b'0'; 64];

/// A chain value: 64 hexadecimal digits.
pub type Chain = [u8; 64];

/// The journal of this process.
#[derive(Debug)]
pub struct Journal {
    directory: PathBuf,
    run: String,
    policy: ArcSwap<Audit>,
    pending: Mutex<Pending>,
    wake: Condvar,
    taken: AtomicUsize,
    lost: Lost,
    /// Entries that are on disk, for those who wait for their own.
    durable: watch::Sender<u64>,
    /// The last line on disk, for those who read along.
    committed: watch::Sender<u64>,
    meters: JournalMeters,
    /// Where a ledger is folded from it, which must have had what is to be removed: what is told to it.
    ledger: OnceLock<Arc<Feed>>,
    /// Has a clone for each thread that keeps it in order.
    pub(super) keepers: Arc<()>,
    writer: Mutex<Option<JoinHandle<()>>>,
}

/// What has been pushed and not been taken by the writer.
#[derive(Debug, Default)]
struct Pending {
    /// Lines without their frame: `"kind":…`, each with its line end.
    lines: Vec<u8>,
    /// What the records among them count.
    facts: Facts,
    /// Captured text, each with its line end.
    captures: Vec<u8>,
    /// Entries pushed since the start.
    entries: u64,
    /// Whether somebody waits for the disk.
    urgent: bool,
    /// Whether somebody waits for a signature: taken back when it is on disk.
    sign: bool,
    closing: Option<&'static str>,
    /// Whether the last line has been taken.
    closed: bool,
}

/// Requests that went without a record since the last `gap` line.
#[derive(Debug, Default)]
struct Lost {
    refused: AtomicU64,
    served: AtomicU64,
    /// When the first of them came, in microseconds since 1970; 0: none.
    since: AtomicU64,
}

/// The right to file one record: room for it is kept until it is on disk.
#[derive(Debug)]
pub struct Place(Option<Arc<Journal>>);

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(journal) = &self.0 {
            journal.taken.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// An administrative act: who did what.
#[derive(Debug, Serialize)]
pub struct Act<'a> {
    /// What was done.
    pub act: &'a str,
    /// By what way, and from where.
    pub by: By,
    /// What changed.
    #[serde(flatten)]
    pub change: serde_json::Value,
}

/// Who did something.
#[derive(Clone, Debug, Serialize)]
pub struct By {
    /// `signal`, `file`, `admin` or `process`.
    pub how: &'static str,
    /// The address it came from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
    /// Who it was, where operators have keys.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub principal: Option<String>,
}

impl By {
    /// Something other than a person's request: a signal, a changed file, the process itself.
    pub fn itself(how: &'static str) -> Self {
        Self { how, address: None, principal: None }
    }
}

impl Journal {
    /// Begins a run in `directory`, which is made if it is not there.
    pub fn open(
        directory: &Path,
        key_file: Option<&Path>,
        policy: Audit,
        meters: JournalMeters,
    ) -> Result<Arc<Self>, String> {
        let (journal, writer) = Self::begin(directory, key_file, policy, meters)?;
        let thread = std::thread::Builder::new().name("journal".to_owned()).spawn(move || writer.run());
        *journal.writer.lock() = Some(thread.map_err(|error| unwritable(directory, &error))?);
        Ok(journal)
    }

    /// The same without the thread.
    fn begin(
        directory: &Path,
        key_file: Option<&Path>,
        policy: Audit,
        meters: JournalMeters,
    ) -> Result<(Arc<Self>, Writer), String> {
        let place = |error: std::io::Error| unwritable(directory, &error);
        let key = SigningKey::load(directory, key_file)?;
        ["runs", "sinks"].iter().try_for_each(|name| private::directory(&directory.join(name))).map_err(place)?;
        let previous = tip::of_earlier_runs(directory).map_err(place)?;
        let run = run_name(directory).map_err(place)?;
        let journal = Arc::new(Self {
            directory: directory.to_owned(),
            run,
            policy: ArcSwap::from_pointee(policy),
            pending: Mutex::default(),
            wake: Condvar::new(),
            taken: AtomicUsize::new(0),
            lost: Lost::default(),
            durable: watch::Sender::new(0),
            committed: watch::Sender::new(0),
            meters,
            ledger: OnceLock::new(),
            keepers: Arc::default(),
            writer: Mutex::default(),
        });
        let mut writer = Writer::begin(journal.clone(), key).map_err(place)?;
        writer.open_line(&previous);
        // What this run vouches for of earlier ones is signed at once.
        writer.sign("checkpoint", None);
        writer.commit(0);
        Ok((journal, writer))
    }

    /// Where it is.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The name of this process's run.
    pub fn run(&self) -> &str {
        &self.run
    }

    /// From now on nothing is removed that the ledger has not folded, and it is told what records count if that is all
    /// that it wants of them.
    pub(crate) fn feed_ledger(&self, sums: bool) -> Arc<Feed> {
        self.ledger.get_or_init(|| Arc::new(Feed::new(sums))).clone()
    }

    /// Whether a ledger is folded from it.
    pub(super) fn feeds_ledger(&self) -> bool {
        self.ledger.get().is_some()
    }

    /// From now on the policy says this of it.
    pub fn configure(self: &Arc<Self>, policy: &Audit) {
        self.meters.places.set(i64::from(policy.places));
        self.policy.store(Arc::new(policy.clone()));
        // A group that has begun under another policy may be waiting for a long time.
        self.hurry();
        keep::house(self);
    }

    /// What the policy says of it now.
    pub(super) fn policy(&self) -> Arc<Audit> {
        self.policy.load_full()
    }

    /// The `seq` of the last line on disk.
    pub fn committed(&self) -> watch::Receiver<u64> {
        self.committed.subscribe()
    }

    /// Room for one record, if there is any.
    pub fn reserve(self: &Arc<Self>) -> Option<Place> {
        let max = self.policy.load().places as usize;
        let taken = self.taken.fetch_add(1, Ordering::Relaxed);
        // Where there is no room, the drop gives it back.
        let place = Place(Some(self.clone()));
        (taken < max).then_some(place)
    }

    /// A request goes without a record, because there was no room: it is refused, or served all the same.
    pub fn lose(&self, served: bool) {
        let (lost, meter) = match served {
            true => (&self.lost.served, &self.meters.served),
            false => (&self.lost.refused, &self.meters.refused),
        };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |since| since.as_micros() as u64);
        let _an_earlier_one_stays = self.lost.since.compare_exchange(0, now, Ordering::Relaxed, Ordering::Relaxed);
        lost.fetch_add(1, Ordering::Relaxed);
        meter.inc();
    }

    /// Files a record. Returns the number to wait for with [`Journal::durable`].
    pub fn file(&self, record: &Record<'_>, mut place: Place) -> u64 {
        // The writer gives it back, when the line is on disk.
        place.0 = None;
        let fact = self.ledger.get().filter(|feed| feed.is_taken()).map(|_| Fact::of(record));
        let entry = self.push_with("request", record.moment.at, record, fact);
        self.meters.lag.inc();
        entry
    }

    /// Whether more text can be captured: not while the disk does not keep up.
    pub fn takes_captures(&self) -> bool {
        self.pending.lock().captures.len() < CAPTURES
    }

    /// Keeps captured text. It is on disk before the record that is filed next.
    pub fn capture(&self, line: &[u8]) {
        self.pending.lock().captures.extend_from_slice(line);
    }

    /// Files an act.
    pub fn act(&self, act: &Act<'_>) -> u64 {
        self.push("act", SystemTime::now(), act)
    }

    /// Files any other line.
    pub(super) fn push(&self, kind: &str, at: SystemTime, members: &impl Serialize) -> u64 {
        self.push_with(kind, at, members, None)
    }

    fn push_with(&self, kind: &str, at: SystemTime, members: &impl Serialize, fact: Option<Fact<'_>>) -> u64 {
        thread_local!(static LINE: RefCell<Line> = const { RefCell::new(Line::new()) });
        LINE.with_borrow_mut(|line| {
            line.truncate(0);
            let is_told = encode(line, kind, at, members);
            let mut pending = self.pending.lock();
            if pending.closed {
                tracing::error!(kind, "a line came after the journal had been closed: it is lost");
                self.meters.served.inc();
                return pending.entries;
            }
            let before = pending.lines.len();
            pending.lines.extend_from_slice(line.text());
            // What does not stand in the line counts nothing.
            if let Some(fact) = fact.filter(|_| is_told) {
                pending.facts.push(&fact);
            }
            let full = before < GROUP && pending.lines.len() >= GROUP;
            pending.entries += 1;
            let entry = pending.entries;
            drop(pending);
            // The others find the writer awake, or it has no need of them yet.
            if before == 0 || full {
                self.wake.notify_one();
            }
            entry
        })
    }

    /// Waits until `entry` is on disk.
    pub async fn durable(&self, entry: u64) {
        let mut durable = self.durable.subscribe();
        if *durable.borrow() >= entry {
            return;
        }
        self.hurry();
        // The sender lives in this journal.
        let _ = durable.wait_for(|done| *done >= entry).await;
    }

    /// Waits until everything that has been filed is on disk.
    pub async fn flush(&self) {
        let entry = self.pending.lock().entries;
        self.durable(entry).await;
    }

    /// Waits until `entry` is on disk and signed, on a thread that may block. Returns whether that came about.
    pub(super) fn signed(&self, entry: u64) -> bool {
        self.pending.lock().sign = true;
        let (durable, begun) = (self.durable.subscribe(), Instant::now());
        while *durable.borrow() < entry || self.pending.lock().sign {
            if begun.elapsed() > PATIENCE || self.pending.lock().closing.is_some() {
                return false;
            }
            self.hurry();
            std::thread::sleep(Duration::from_millis(5));
        }
        true
    }

    fn hurry(&self) {
        self.pending.lock().urgent = true;
        self.wake.notify_one();
    }

    /// Ends the run: everything that has been filed goes to disk, and a signed last line says that this is the end.
    pub fn close(&self, reason: &'static str) {
        let Some(thread) = self.writer.lock().take() else { return };
        self.pending.lock().closing = Some(reason);
        self.wake.notify_one();
        let begun = Instant::now();
        while !thread.is_finished() && begun.elapsed() < CLOSE {
            std::thread::park_timeout(Duration::from_millis(1));
        }
        if !thread.is_finished() {
            tracing::error!("the journal could not be closed: its disk does not answer");
        }
    }
}

fn unwritable(directory: &Path, error: &std::io::Error) -> String {
    format!("the journal in {} cannot be written: {error}", directory.display())
}

/// A journal for the benches: what is filed is framed when they say so, and goes no further.
#[doc(hidden)]
pub struct Unwritten(Writer, Vec<u8>);

impl Unwritten {
    /// Begins a run in `directory`.
    pub fn open(directory: &Path) -> Result<Self, String> {
        let (_, writer) = Journal::begin(directory, None, Audit::default(), Telemetry::new().journal)?;
        Ok(Self(writer, Vec::new()))
    }

    /// Where records are filed.
    pub fn journal(&self) -> &Arc<Journal> {
        &self.0.journal
    }

    /// Frames what has been filed. Returns how many bytes that makes.
    pub fn frame(&mut self) -> usize {
        let Self(writer, lines) = self;
        std::mem::swap(&mut writer.journal.pending.lock().lines, lines);
        writer.frame_all(lines);
        lines.clear();
        writer.count(Duration::ZERO);
        let bytes = writer.out.len();
        writer.out.clear();
        bytes
    }
}

/// Appends a line without its frame: the kind, the time, and the members of a struct. `false`: without them.
fn encode(line: &mut Line, kind: &str, at: SystemTime, members: &impl Serialize) -> bool {
    line.put(br#""kind":""#);
    line.put(kind.as_bytes());
    line.put(br#"","at":""#);
    line.put(&Stamp(at).spelt());
    line.put(b"\"");
    let begun = line.text().len();
    let written = json::append(line, members).is_ok() || {
        line.truncate(begun);
        serde_json::to_writer(&mut *line, members).is_ok()
    };
    let end = line.text().len();
    // Nothing of ours fails to serialise; if it ever does, the line stays whole.
    let is_told = written && end - begun > 2;
    if is_told {
        line.set(begun, b',');
    }
    line.truncate(if is_told { end - 1 } else { begun });
    line.put(b"\n");
    is_told
}

/// A name for a new run, `20261122T140305Z-1a2b3c4d`. Names sort by time, so two starts within a second count as two.
fn run_name(directory: &Path) -> std::io::Result<String> {
    let latest = read::runs(directory)?.iter().filter_map(read::Run::started).max().unwrap_or(0);
    let at = SystemTime::now().max(UNIX_EPOCH + Duration::from_micros(latest) + Duration::from_secs(1));
    let digits: String = Stamp(at).to_string()[..19].chars().filter(|c| *c != '-' && *c != ':').collect();
    Ok(format!("{digits}Z-{:08x}", fastrand::u32(..)))
}

/// What the writer took beside the lines.
struct Taken {
    /// Entries pushed so far.
    entries: u64,
    /// Why this is the end, if it is.
    closing: Option<&'static str>,
    /// Whether somebody waits for a signature over these lines.
    sign: bool,
}

/// The thread that writes.
struct Writer {
    journal: Arc<Journal>,
    key: SigningKey,
    segment: Segment,
    seq: u64,
    chain: Chain,
    /// Records in this run.
    records: u64,
    /// Captured text that is not on disk yet, and where it goes.
    captures: Vec<u8>,
    store: Store,
    /// Entries that are on disk.
    entries: u64,
    /// Lines that are framed and not yet on disk.
    out: Vec<u8>,
    /// How many those are, and how many of them are records.
    uncommitted: (u64, u64),
    /// What these count.
    facts: Facts,
    /// The last checkpoint: when, and its seq.
    checkpoint: (Instant, u64),
    /// When the journal was last put in order.
    kept: Instant,
    /// Whether the disk failed at the last try.
    failing: bool,
    /// Held as long as the process lives.
    _lock: File,
}

/// The file that is being written.
struct Segment {
    path: PathBuf,
    file: File,
    number: u32,
    /// The `seq` of its first line.
    first: u64,
    /// Bytes that are on disk.
    bytes: u64,
    /// Bytes of the next lines that have been written and may not be on disk.
    ahead: usize,
    /// Whether a write failed, so that nobody knows what stands behind `bytes`.
    torn: bool,
    begun: Instant,
}

impl Segment {
    fn create(run: &Path, number: u32, first: u64) -> std::io::Result<Self> {
        let path = run.join(format!("{number:06}.jsonl"));
        // A try before may have left it behind, empty; the run is nobody else's.
        let file = private::append(&path)?;
        Ok(Self { path, file, number, first, bytes: 0, ahead: 0, torn: false, begun: Instant::now() })
    }

    /// Puts whole lines on disk. What a failed try left behind is taken off first.
    fn append(&mut self, lines: &[u8]) -> std::io::Result<()> {
        if self.torn {
            self.file.set_len(self.bytes)?;
            (self.torn, self.ahead) = (false, 0);
        }
        let written = self.write(lines).and_then(|()| self.file.sync_data());
        self.torn = written.is_err();
        written?;
        (self.bytes, self.ahead) = (self.bytes + lines.len() as u64, 0);
        Ok(())
    }

    /// Writes what can be written of the lines that are to be on disk soon, while they are still in the core's cache.
    fn write_ahead(&mut self, lines: &[u8]) {
        self.torn = self.torn || self.write(lines).is_err();
    }

    fn write(&mut self, lines: &[u8]) -> std::io::Result<()> {
        self.file.write_all(&lines[self.ahead..])?;
        self.ahead = lines.len();
        Ok(())
    }
}

#[derive(Serialize)]
struct Opening<'a> {
    run: &'a str,
    version: &'a str,
    key: &'a str,
    previous: &'a [Tip],
}

#[derive(Serialize)]
struct SegmentLine<'a> {
    run: &'a str,
    segment: u32,
    prev: &'a str,
}

#[derive(Serialize)]
struct Checkpoint<'a> {
    run: &'a str,
    segment: u32,
    segment_first: u64,
    records: u64,
    head: &'a str,
    key: &'a str,
    signature: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'a str>,
}

#[derive(Serialize)]
struct Gap {
    lost: u64,
    refused: u64,
    /// When the first of them came.
    since: String,
}

impl Writer {
    fn begin(journal: Arc<Journal>, key: SigningKey) -> std::io::Result<Self> {
        let run = journal.directory.join("runs").join(&journal.run);
        private::directory(&run)?;
        let lock = private::fresh(&run.join("lock"))?;
        // Whoever asks whether this run is alive holds it for a moment.
        rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive)?;
        let segment = Segment::create(&run, 1, 1)?;
        let store = Store::new(&journal.directory, &journal.run);
        Ok(Self {
            journal,
            key,
            segment,
            seq: 0,
            chain: GENESIS,
            records: 0,
            captures: Vec::new(),
            store,
            entries: 0,
            out: Vec::new(),
            uncommitted: (0, 0),
            facts: Facts::default(),
            checkpoint: (Instant::now(), 0),
            kept: Instant::now(),
            failing: false,
            _lock: lock,
        })
    }

    fn run(mut self) {
        let mut lines = Vec::new();
        loop {
            let Taken { entries, closing, sign } = self.wait(&mut lines);
            self.gap();
            self.frame_all(&lines);
            lines.clear();
            if lines.capacity() > BUFFER_KEPT {
                lines = Vec::new();
            }
            let policy = self.journal.policy.load_full();
            if let Some(reason) = closing {
                self.sign("close", Some(reason));
                self.commit(entries);
                return;
            }
            let due = sign || self.checkpoint.0.elapsed() >= Duration::from_secs(policy.checkpoint_s);
            if due && self.seq > self.checkpoint.1 {
                self.sign("checkpoint", None);
            }
            self.commit(entries);
            if sign {
                self.journal.pending.lock().sign = false;
            }
            if self.segment_is_full(&policy) {
                self.rotate();
            }
            if self.kept.elapsed() >= KEEP_EVERY {
                self.keep();
            }
        }
    }

    /// Waits until there is something to do, and takes what has been pushed into `lines`.
    fn wait(&mut self, lines: &mut Vec<u8>) -> Taken {
        let journal = self.journal.clone();
        let idle = self.idle(&journal.policy.load());
        let mut pending = journal.pending.lock();
        if pending.lines.is_empty() && !pending.urgent && pending.closing.is_none() {
            journal.wake.wait_for(&mut pending, idle);
        }
        // It may be another one by now.
        let policy = journal.policy.load();
        // The first line has come: others join it until the group is committed.
        let until = Instant::now() + Duration::from_millis(policy.commit_ms);
        while !pending.urgent && pending.closing.is_none() && !(pending.lines.is_empty() && self.out.is_empty()) {
            if pending.lines.len() >= GROUP {
                std::mem::swap(&mut pending.lines, lines);
                self.facts.append(&mut pending.facts);
                let captures = !pending.captures.is_empty() || !self.captures.is_empty();
                MutexGuard::unlocked(&mut pending, || self.group(lines, captures));
                lines.clear();
                // Whoever was in a hurry meanwhile has woken nobody.
                continue;
            }
            if journal.wake.wait_until(&mut pending, until).timed_out() {
                break;
            }
        }
        pending.urgent = false;
        pending.closed = pending.closing.is_some();
        std::mem::swap(&mut pending.lines, lines);
        self.facts.append(&mut pending.facts);
        self.captures.append(&mut pending.captures);
        Taken { entries: pending.entries, closing: pending.closing, sign: pending.sign }
    }

    /// A group of lines is framed before the rest has come, and written, unless captured text goes first.
    fn group(&mut self, lines: &[u8], captures: bool) {
        self.frame_all(lines);
        if !captures {
            self.segment.write_ahead(&self.out);
        }
    }

    /// How long there may be nothing to do.
    fn idle(&self, policy: &Audit) -> Duration {
        let unsigned = self.seq > self.checkpoint.1;
        let checkpoint = Duration::from_secs(policy.checkpoint_s).saturating_sub(self.checkpoint.0.elapsed());
        let rotation = Duration::from_secs(policy.segment_s).saturating_sub(self.segment.begun.elapsed());
        let keeping = KEEP_EVERY.saturating_sub(self.kept.elapsed());
        let due = [(unsigned, checkpoint), (self.segment_holds_something(), rotation), (true, keeping)];
        let next = due.iter().filter(|(is_due, _)| *is_due).map(|(_, at)| *at).min();
        next.unwrap_or(keeping).max(Duration::from_millis(10))
    }

    fn segment_is_full(&self, policy: &Audit) -> bool {
        let old = self.segment.begun.elapsed() >= Duration::from_secs(policy.segment_s);
        self.segment.bytes >= policy.segment_bytes || (old && self.segment_holds_something())
    }

    /// Whether there is more in the segment than its first line and the checkpoint behind it.
    fn segment_holds_something(&self) -> bool {
        self.seq > self.segment.first + 1
    }

    /// Says in the journal itself how many requests went without a record.
    fn gap(&mut self) {
        let lost = &self.journal.lost;
        let take = |count: &AtomicU64| count.swap(0, Ordering::Relaxed);
        let (served, refused, since) = (take(&lost.served), take(&lost.refused), take(&lost.since));
        if served + refused > 0 {
            let since = Stamp(UNIX_EPOCH + Duration::from_micros(since)).to_string();
            self.own("gap", SystemTime::now(), &Gap { lost: served, refused, since });
        }
    }

    fn open_line(&mut self, previous: &[Tip]) {
        let (journal, key) = (self.journal.clone(), self.key.id.clone());
        let opening = Opening { run: &journal.run, version: env!("CARGO_PKG_VERSION"), key: &key, previous };
        self.own("open", SystemTime::now(), &opening);
    }

    /// Frames a line of the writer's own.
    fn own(&mut self, kind: &str, at: SystemTime, members: &impl Serialize) {
        let mut line = Line::new();
        encode(&mut line, kind, at, members);
        self.frame_all(line.text());
    }

    /// Gives every line its number and its chain.
    fn frame_all(&mut self, lines: &[u8]) {
        let mut rest = lines;
        while let Some(end) = memchr::memchr(b'\n', rest) {
            self.frame(&rest[..end]);
            rest = &rest[end + 1..];
        }
    }

    fn frame(&mut self, line: &[u8]) {
        self.seq += 1;
        let record = u64::from(line.starts_with(br#""kind":"request""#));
        self.records += record;
        self.uncommitted = (self.uncommitted.0 + 1, self.uncommitted.1 + record);
        let begun = self.out.len();
        self.out.extend_from_slice(br#"{"v":1,"seq":"#);
        self.out.extend_from_slice(decimal::digits(self.seq, &mut [0; 20]));
        self.out.push(b',');
        self.out.extend_from_slice(line);
        let digest = Sha256::new().chain_update(self.chain).chain_update(&self.out[begun..]).finalize();
        self.chain = hex::digits(&digest);
        self.out.extend_from_slice(br#","chain":""#);
        self.out.extend_from_slice(&self.chain);
        self.out.extend_from_slice(b"\"}\n");
    }

    /// Signs the chain up to here.
    fn sign(&mut self, kind: &str, reason: Option<&str>) {
        let (at, head) = (SystemTime::now(), self.chain);
        let head = std::str::from_utf8(&head).unwrap_or_default();
        let (run, seq, records) = (self.journal.run.clone(), self.seq + 1, self.records);
        let text = format!("infergate checkpoint v1\n{run}\n{seq}\n{records}\n{}\n{head}\n", Stamp(at));
        let signature = self.key.sign(text.as_bytes());
        let key = self.key.id.clone();
        let checkpoint = Checkpoint {
            run: &run,
            segment: self.segment.number,
            segment_first: self.segment.first,
            records,
            head,
            key: &key,
            signature: &signature,
            reason,
        };
        self.own(kind, at, &checkpoint);
        self.checkpoint = (Instant::now(), self.seq);
        // Kept elsewhere, this line shows later that nothing before it was cut off.
        tracing::info!(%run, seq, records, head, signature, "journal checkpoint");
    }

    /// Puts everything on disk, however long that takes, and tells those who wait.
    fn commit(&mut self, entries: u64) {
        self.entries = entries;
        if !self.out.is_empty() {
            let begun = Instant::now();
            while let Err(error) = self.append() {
                self.failed(&error);
                std::thread::sleep(RETRY);
            }
            self.recovered();
            self.tell_ledger();
            self.count(begun.elapsed());
            self.out.clear();
            self.out.shrink_to(BUFFER_KEPT);
        }
        let seq = self.seq;
        self.journal.committed.send_if_modified(|committed| std::mem::replace(committed, seq) != seq);
        self.journal.durable.send_if_modified(|durable| std::mem::replace(durable, entries) != entries);
    }

    /// Captures first: no record is to promise what is not there.
    fn append(&mut self) -> std::io::Result<()> {
        self.store.append(&self.captures, &self.journal.policy.load())?;
        self.captures.clear();
        self.segment.append(&self.out)
    }

    fn failed(&mut self, error: &std::io::Error) {
        self.journal.meters.failing.set(1);
        if !self.failing {
            tracing::error!(path = %self.segment.path.display(), %error, "the journal cannot be written; trying on");
        }
        self.failing = true;
    }

    fn recovered(&mut self) {
        if std::mem::take(&mut self.failing) {
            tracing::warn!("the journal can be written again");
            self.journal.meters.failing.set(0);
        }
    }

    /// What was committed is told, unless facts are missing: of records that were filed before somebody asked for them.
    fn tell_ledger(&mut self) {
        let (lines, records) = self.uncommitted;
        let facts = std::mem::take(&mut self.facts);
        if let Some(ledger) = self.journal.ledger.get().filter(|_| facts.len() as u64 == records) {
            ledger.add(self.seq + 1 - lines, self.seq, &self.chain, facts);
        }
    }

    /// What was committed is counted, and its places are given back.
    fn count(&mut self, took: Duration) {
        let meters = &self.journal.meters;
        let (lines, records) = std::mem::take(&mut self.uncommitted);
        self.journal.taken.fetch_sub(records as usize, Ordering::Relaxed);
        meters.lag.dec_by(records as i64);
        meters.places_in_use.set(self.journal.taken.load(Ordering::Relaxed) as i64);
        meters.lines.inc_by(lines);
        meters.bytes.inc_by(self.out.len() as u64);
        meters.commits.inc();
        meters.commit_duration.observe(took.as_secs_f64());
    }

    /// Ends this segment with a signature and begins the next; the old one is compressed, and the oldest go.
    fn rotate(&mut self) {
        self.sign("checkpoint", None);
        self.commit(self.entries);
        let run = self.journal.directory.join("runs").join(&self.journal.run);
        let prev = self.chain;
        let next = loop {
            match Segment::create(&run, self.segment.number + 1, self.seq + 1) {
                Ok(next) => break next,
                Err(error) => self.failed(&error),
            }
            std::thread::sleep(RETRY);
        };
        self.segment = next;
        let line = SegmentLine {
            run: &self.journal.run.clone(),
            segment: self.segment.number,
            prev: std::str::from_utf8(&prev).unwrap_or_default(),
        };
        self.own("segment", SystemTime::now(), &line);
        self.commit(self.entries);
        self.keep();
    }

    fn keep(&mut self) {
        self.kept = Instant::now();
        keep::house(&self.journal);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn begun() -> (tempfile::TempDir, Writer) {
        let directory = tempfile::tempdir().unwrap();
        let (_, writer) = Journal::begin(directory.path(), None, Audit::default(), Telemetry::new().journal).unwrap();
        (directory, writer)
    }

    fn text(writer: &Writer) -> String {
        std::fs::read_to_string(&writer.segment.path).unwrap()
    }

    #[test]
    fn lines_that_were_written_ahead_stand_once_whatever_failed_meanwhile() {
        let (_directory, mut writer) = begun();
        let before = text(&writer).len();
        writer.group(b"\"kind\":\"a\"\n", false);
        assert!(text(&writer).len() > before, "it is there before it is on disk");
        writer.segment.file.write_all(b"half a li").unwrap();
        writer.segment.torn = true;
        writer.group(b"\"kind\":\"b\"\n", false);
        writer.commit(2);
        writer.group(b"\"kind\":\"c\"\n", false);
        writer.commit(3);
        let lines: Vec<Value> = text(&writer).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let kinds: Vec<_> = lines.iter().map(|line| line["kind"].as_str().unwrap()).collect();
        assert_eq!(kinds, ["open", "checkpoint", "a", "b", "c"]);
        assert!(lines.iter().zip(1..).all(|(line, seq)| line["seq"] == seq), "{lines:#?}");
        assert_eq!(text(&writer).len() as u64, writer.segment.bytes);
    }

    #[test]
    fn no_line_is_written_before_the_captured_text_that_it_promises() {
        let (_directory, mut writer) = begun();
        let before = text(&writer).len();
        writer.group(b"\"kind\":\"a\"\n", true);
        assert_eq!(text(&writer).len(), before);
        writer.commit(1);
        assert!(text(&writer).len() > before);
    }
}
