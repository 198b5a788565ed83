//! The journal as it lies on disk: its runs, their segments, and line after line, also while it is being written.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use memchr::{memchr, memmem};
use rustix::fs::{FlockOperation, flock};

use crate::time::micros;

/// The longest line that is read, in bytes.
pub const LONGEST: usize = 4 << 20;

/// How much is read at once.
const CHUNK: usize = 256 << 10;

/// How far clocks and the order of writing may differ when time decides where to look, in microseconds.
const SLACK: u64 = 60_000_000;

/// What one process wrote.
#[derive(Clone, Debug)]
pub struct Run {
    /// Its name, by which runs sort: about when it started, and eight random digits.
    pub name: String,
    /// Its directory.
    pub path: PathBuf,
}

/// The runs of the journal in `directory`, oldest first.
pub fn runs(directory: &Path) -> io::Result<Vec<Run>> {
    let place = directory.join("runs");
    let mut runs = Vec::new();
    for entry in std::fs::read_dir(&place).map_err(named(&place))? {
        let entry = entry.map_err(named(&place))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if !name.starts_with('.') && entry.path().is_dir() {
            runs.push(Run { name, path: entry.path() });
        }
    }
    runs.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(runs)
}

impl Run {
    /// Its segments, oldest first. Where a segment is there plain and compressed, the plain one counts.
    pub fn segments(&self) -> io::Result<Vec<Segment>> {
        let mut segments = Vec::new();
        for entry in std::fs::read_dir(&self.path).map_err(named(&self.path))? {
            segments.extend(Segment::named(entry.map_err(named(&self.path))?.path()));
        }
        segments.sort_by_key(|segment: &Segment| (segment.number, segment.packed));
        segments.dedup_by_key(|segment| segment.number);
        Ok(segments)
    }

    /// Whether its process is still there: it holds the lock as long as it lives.
    pub fn is_live(&self) -> bool {
        // Shared, so that two who ask at once do not take each other for the process, and never waiting.
        let lock = File::open(self.path.join("lock"));
        lock.is_ok_and(|lock| flock(&lock, FlockOperation::NonBlockingLockShared).is_err())
    }

    /// Its lines from `from_seq` on.
    pub fn lines(&self, from_seq: u64) -> Lines {
        Lines { run: self.clone(), wanted: from_seq, open: None }
    }

    /// When its name says that it started, in microseconds since 1970. That only orders runs: names run ahead of the
    /// clock where several start within a second, and far ahead after a start with a wrong clock.
    pub fn started(&self) -> Option<u64> {
        let (date, rest) = self.name.split_once('T')?;
        let (date, time) = (date.get(..8)?, rest.get(..6)?);
        let part = |text: &str, range: Range<usize>| text.get(range).map(str::to_owned);
        let date = [part(date, 0..4)?, part(date, 4..6)?, part(date, 6..8)?].join("-");
        let time = [part(time, 0..2)?, part(time, 2..4)?, part(time, 4..6)?].join(":");
        micros(format!("{date}T{time}Z").as_bytes())
    }

    /// The segments that may hold lines of the time between `since` and `until`, in microseconds since 1970.
    pub fn segments_between(&self, since: Option<u64>, until: Option<u64>) -> io::Result<Vec<Segment>> {
        let mut segments = self.segments()?;
        let begun = segments.first().and_then(Segment::run_begun).unwrap_or(0);
        let changed = segments.last().and_then(Segment::changed).unwrap_or(u64::MAX);
        if before(changed, begun) {
            // The clock was set back while it was written: no time in it tells where to look.
            return Ok(segments);
        }
        let early = since.is_some_and(|since| before(changed, since) && !self.is_live());
        if early || until.is_some_and(|until| before(until, begun)) {
            return Ok(Vec::new());
        }
        let Some(since) = since else { return Ok(segments) };
        let later = segments.partition_point(|segment| segment.begun().is_some_and(|begun| before(begun, since)));
        Ok(segments.split_off(later.saturating_sub(1)))
    }

    fn find(&self, wanted: &[u8], time: u64) -> io::Result<Option<Vec<u8>>> {
        let finder = memmem::Finder::new(wanted);
        for segment in self.segments_between(Some(time), Some(time))? {
            let mut lines = match segment.open() {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue, // removed while we looked
                lines => lines?,
            };
            while lines.advance()? {
                if finder.find(lines.line()).is_some() && is_record(lines.line(), wanted) {
                    return Ok(Some(lines.line().to_vec()));
                }
            }
        }
        Ok(None)
    }
}

/// Whether one time is clearly before another.
fn before(one: u64, other: u64) -> bool {
    one.saturating_add(SLACK) < other
}

/// The record of the request `id` (a UUIDv7), if the journal in `directory` has it. Looks only where its time allows.
pub fn find(directory: &Path, id: &str) -> io::Result<Option<Vec<u8>>> {
    let Some(id) = uuid::Uuid::parse_str(id).ok().filter(|id| id.get_version_num() == 7) else { return Ok(None) };
    let time = u64::try_from(id.as_u128() >> 80).unwrap_or(0).saturating_mul(1_000);
    let wanted = format!("\"id\":\"{}\"", id.hyphenated());
    for run in runs(directory)?.iter().rev() {
        if let Some(line) = run.find(wanted.as_bytes(), time)? {
            return Ok(Some(line));
        }
    }
    Ok(None)
}

/// Whether `line` is a record and the found member is its own, not one further inside.
fn is_record(line: &[u8], wanted: &[u8]) -> bool {
    #[derive(serde::Deserialize)]
    struct Named<'a> {
        #[serde(borrow)]
        id: std::borrow::Cow<'a, str>,
    }
    kind(line) == b"request"
        && serde_json::from_slice::<Named<'_>>(line)
            .is_ok_and(|named| format!("\"id\":\"{}\"", named.id).as_bytes() == wanted)
}

/// One file of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Its number in the run, from 1.
    pub number: u32,
    /// The file.
    pub path: PathBuf,
    /// Whether it is compressed.
    pub packed: bool,
}

impl Segment {
    /// The segment that `path` is named for.
    fn named(path: PathBuf) -> Option<Self> {
        let name = path.file_name()?.to_str()?;
        let (stem, packed) = match name.strip_suffix(".zst") {
            Some(stem) => (stem, true),
            None => (name, false),
        };
        let number = stem.strip_suffix(".jsonl")?.parse().ok()?;
        (stem == format!("{number:06}.jsonl")).then_some(Self { number, path, packed })
    }

    /// Segment `number` of the run in `directory`, plain or compressed.
    fn of(directory: &Path, number: u32) -> Option<Self> {
        let plain = directory.join(format!("{number:06}.jsonl"));
        let packed = directory.join(format!("{number:06}.jsonl.zst"));
        // In this order: a plain file is replaced by a compressed one, never the other way round.
        [plain, packed].into_iter().find(|path| path.exists()).and_then(Self::named)
    }

    /// The file's name.
    pub fn file_name(&self) -> String {
        self.path.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// Its lines. A file that was compressed since it was listed is found under its new name.
    pub fn open(&self) -> io::Result<SegmentLines> {
        match SegmentLines::open(self) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let directory = self.path.parent().unwrap_or(Path::new(""));
                Self::of(directory, self.number).map_or(Err(error), |segment| SegmentLines::open(&segment))
            }
            lines => lines,
        }
    }

    /// Its first line, once that is written.
    pub fn first(&self) -> io::Result<Option<Vec<u8>>> {
        let mut lines = self.open()?;
        Ok(lines.advance()?.then(|| lines.line().to_vec()))
    }

    /// The time on its first line.
    fn begun(&self) -> Option<u64> {
        self.first().ok().flatten().and_then(|line| micros(at(&line)))
    }

    /// The same, if it is the run's first one. Later ones also hold what had begun before them and took its time.
    fn run_begun(&self) -> Option<u64> {
        if self.number == 1 { self.begun() } else { None }
    }

    /// When it was last written to.
    fn changed(&self) -> Option<u64> {
        let changed = std::fs::metadata(&self.path).and_then(|file| file.modified()).ok()?;
        u64::try_from(changed.duration_since(UNIX_EPOCH).ok()?.as_micros()).ok()
    }
}

/// The lines of a run, one after the other, from segment to segment.
pub struct Lines {
    run: Run,
    wanted: u64,
    open: Option<SegmentLines>,
}

impl Lines {
    /// The next line, without its line end. `None`: there is nothing more for now; ask again later, also for what
    /// stands in segments that are begun by then. A line of which only a part is written is not returned. What is no
    /// line of a journal is passed over (`verify` names it); one that is too long is an error once.
    #[expect(clippy::should_implement_trait, reason = "the line is borrowed from the reader")]
    pub fn next(&mut self) -> io::Result<Option<&[u8]>> {
        while self.advance()? {
            if seq(self.line()).is_some_and(|seq| seq >= self.wanted) {
                self.wanted = seq(self.line()).unwrap_or(self.wanted) + 1;
                return Ok(Some(self.line()));
            }
        }
        Ok(None)
    }

    /// The seq that the next line has.
    pub fn position(&self) -> u64 {
        self.wanted
    }

    fn line(&self) -> &[u8] {
        self.open.as_ref().map_or(&[], SegmentLines::line)
    }

    fn advance(&mut self) -> io::Result<bool> {
        loop {
            let Some(open) = &mut self.open else {
                let Some(segment) = self.beginning()? else { return Ok(false) };
                self.open = Some(segment.open()?);
                continue;
            };
            if open.advance()? {
                return Ok(true);
            }
            let Some(next) = following(&self.run, open.number)? else { return Ok(false) };
            // What was written between our look and the beginning of the next segment.
            if open.advance()? {
                return Ok(true);
            }
            self.open = Some(next.open()?);
        }
    }

    /// The segment in which the wanted line stands or will stand.
    fn beginning(&self) -> io::Result<Option<Segment>> {
        let mut segments = self.run.segments()?;
        let begins = |segment: &Segment| segment.first().ok().flatten().and_then(|line| seq(&line));
        let later = segments.partition_point(|segment| begins(segment).is_some_and(|seq| seq <= self.wanted));
        let at = later.saturating_sub(1);
        Ok((at < segments.len()).then(|| segments.swap_remove(at)))
    }
}

/// The segment behind `number`, if it is begun. Retention may have removed some between.
fn following(run: &Run, number: u32) -> io::Result<Option<Segment>> {
    let next = Segment::of(&run.path, number + 1);
    if next.is_some() || Segment::of(&run.path, number).is_some() {
        return Ok(next);
    }
    match run.segments() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None), // the whole run was removed
        segments => Ok(segments?.into_iter().find(|segment| segment.number > number)),
    }
}

/// The lines of one segment.
pub struct SegmentLines {
    /// The number of the segment.
    pub number: u32,
    path: PathBuf,
    source: Source,
    buffer: Vec<u8>,
    filled: usize,
    line: Range<usize>,
    /// Where the line begins that was not whole yet.
    rest: usize,
    count: u64,
    torn: u64,
    skipped: u64,
}

enum Source {
    Plain(File),
    Packed(zstd::stream::read::Decoder<'static, io::BufReader<File>>),
}

impl SegmentLines {
    fn open(segment: &Segment) -> io::Result<Self> {
        let file = File::open(&segment.path).map_err(named(&segment.path))?;
        let source = match segment.packed {
            false => Source::Plain(file),
            true => Source::Packed(zstd::stream::read::Decoder::new(file).map_err(named(&segment.path))?),
        };
        let (number, path) = (segment.number, segment.path.clone());
        let (buffer, line) = (vec![0; CHUNK], 0..0);
        Ok(Self { number, path, source, buffer, filled: 0, line, rest: 0, count: 0, torn: 0, skipped: 0 })
    }

    /// Goes to the next line; `false` if there is none, or none yet.
    pub fn advance(&mut self) -> io::Result<bool> {
        let mut searched = self.rest;
        loop {
            if let Some(length) = memchr(b'\n', &self.buffer[searched..self.filled]) {
                self.line = self.rest..searched + length;
                self.rest = self.line.end + 1;
                self.count += 1;
                return self.whole();
            }
            if self.filled - self.rest > LONGEST {
                self.skipped += (self.filled - self.rest) as u64;
                self.rest = self.filled;
            }
            searched = self.filled - self.rest;
            if self.fill()? == 0 {
                self.pause()?;
                return Ok(false);
            }
        }
    }

    /// The line that it is at, without its line end.
    pub fn line(&self) -> &[u8] {
        &self.buffer[self.line.clone()]
    }

    /// The number of that line in the file, from 1.
    pub fn number_of_line(&self) -> u64 {
        self.count
    }

    /// Bytes behind the last line end, as of the last time that there was no further line.
    pub fn torn(&self) -> u64 {
        self.torn
    }

    fn whole(&mut self) -> io::Result<bool> {
        if std::mem::take(&mut self.skipped) == 0 && self.line.len() <= LONGEST {
            return Ok(true);
        }
        self.line = 0..0;
        let message = format!("line {} is longer than {LONGEST} bytes", self.count);
        Err(named(&self.path)(io::Error::new(io::ErrorKind::InvalidData, message)))
    }

    /// Reads more behind what is there, which moves to the front of the buffer.
    fn fill(&mut self) -> io::Result<usize> {
        self.buffer.copy_within(self.rest..self.filled, 0);
        (self.filled, self.rest, self.line) = (self.filled - self.rest, 0, 0..0);
        if self.buffer.len() - self.filled < CHUNK / 2 {
            self.buffer.resize(self.buffer.len() * 2, 0);
        }
        let room = &mut self.buffer[self.filled..];
        let read = match &mut self.source {
            Source::Plain(file) => file.read(room),
            Source::Packed(decoder) => decoder.read(room),
        };
        let read = read.map_err(named(&self.path))?;
        self.filled += read;
        Ok(read)
    }

    /// Forgets the half line at the end: its writer may take it back and write another.
    fn pause(&mut self) -> io::Result<()> {
        let half = self.filled - self.rest;
        self.torn = self.skipped + half as u64;
        if let Source::Plain(file) = &mut self.source {
            file.seek(SeekFrom::Current(-i64::try_from(half).unwrap_or(0))).map_err(named(&self.path))?;
            self.filled = self.rest;
        }
        Ok(())
    }
}

/// Adds the place to an error.
fn named(path: &Path) -> impl Fn(io::Error) -> io::Error {
    move |error| io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

/// A line's seq. This and the next ones rely on the order in which every line begins and ends, and read no further.
pub fn seq(line: &[u8]) -> Option<u64> {
    let rest = &line[behind(line, b",\"seq\":")?..];
    let digits = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
    std::str::from_utf8(&rest[..digits]).ok()?.parse().ok()
}

/// A line's kind; empty if it has none.
pub fn kind(line: &[u8]) -> &[u8] {
    text(line, b",\"kind\":\"")
}

/// A line's time; empty if it has none.
pub fn at(line: &[u8]) -> &[u8] {
    text(line, b",\"at\":\"")
}

/// A line's chain value, 64 hexadecimal digits, and the bytes that it covers besides the chain value before.
pub fn chain(line: &[u8]) -> Option<(&[u8], &[u8])> {
    let covered = line.len().checked_sub(b",\"chain\":\"\"}".len() + 64)?;
    let value = line[covered..].strip_prefix(b",\"chain\":\"")?.strip_suffix(b"\"}")?;
    let digits = value.iter().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    digits.then_some((value, &line[..covered]))
}

/// Where the value behind `name` begins, which stands near the beginning of the line.
fn behind(line: &[u8], name: &[u8]) -> Option<usize> {
    let beginning = &line[..line.len().min(160)];
    // So near that making a searcher would cost more than the search.
    let at = beginning.windows(name.len()).position(|window| window == name)?;
    beginning.starts_with(b"{\"v\":").then_some(at + name.len())
}

fn text<'a>(line: &'a [u8], name: &[u8]) -> &'a [u8] {
    let Some(from) = behind(line, name) else { return &[] };
    let rest = &line[from..];
    &rest[..memchr(b'"', rest).unwrap_or(0)]
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::audit::made::{Made, pack};

    fn all(lines: &mut Lines) -> Vec<u64> {
        let mut seqs = Vec::new();
        while let Some(line) = lines.next().unwrap() {
            seqs.push(seq(line).unwrap());
        }
        seqs
    }

    fn only(made: &Made) -> Run {
        runs(made.path()).unwrap().remove(0)
    }

    #[test]
    fn lines_go_on_from_segment_to_segment_plain_or_compressed() {
        let mut made = Made::new();
        let mut run = made.run(1);
        run.records(3).rotate();
        run.records(3).rotate();
        run.records(1);
        pack(&made.file(1, 1));
        let run = only(&made);
        assert_eq!(all(&mut run.lines(1)), (1..=12).collect::<Vec<_>>());
        assert_eq!(all(&mut run.lines(4)), (4..=12).collect::<Vec<_>>());
        assert_eq!(all(&mut run.lines(7)), (7..=12).collect::<Vec<_>>());
        assert!(all(&mut run.lines(13)).is_empty());
    }

    #[test]
    fn a_reader_waits_for_what_is_not_written_yet() {
        let mut made = Made::new();
        let mut writer = made.run(1);
        let reader = Run { name: writer.name.clone(), path: writer.path.clone() };
        let mut lines = reader.lines(2);
        assert!(all(&mut lines).is_empty());
        writer.records(2);
        assert_eq!(all(&mut lines), [2, 3]);
        // A half line is taken back and another is written in its place.
        let path = writer.path.join("000001.jsonl");
        let whole = std::fs::read(&path).unwrap();
        std::fs::File::options().append(true).open(&path).unwrap().write_all(b"{\"v\":1,\"seq\":99,").unwrap();
        assert!(all(&mut lines).is_empty());
        std::fs::File::options().write(true).open(&path).unwrap().set_len(whole.len() as u64).unwrap();
        writer.records(1).rotate();
        writer.records(1);
        assert_eq!(all(&mut lines), [4, 5, 6, 7]);
        assert_eq!(lines.position(), 8);
    }

    #[test]
    fn a_reader_copes_with_segments_that_are_compressed_or_removed_beneath_it() {
        let mut made = Made::new();
        let mut writer = made.run(1);
        let reader = Run { name: writer.name.clone(), path: writer.path.clone() };
        writer.records(2);
        let mut lines = reader.lines(1);
        assert_eq!(all(&mut lines), [1, 2, 3]);
        writer.rotate();
        writer.rotate();
        writer.records(1);
        let path = writer.path.clone();
        pack(&path.join("000001.jsonl"));
        std::fs::remove_file(path.join("000002.jsonl")).unwrap();
        assert_eq!(all(&mut lines), [4], "the first segment is read to its end though it was compressed");
        std::fs::remove_file(path.join("000001.jsonl.zst")).unwrap();
        assert_eq!(all(&mut lines), [7, 8]);
        std::fs::remove_dir_all(path).unwrap();
        assert!(all(&mut lines).is_empty());
    }

    #[test]
    fn a_run_is_live_as_long_as_its_lock_is_held() {
        let mut made = Made::new();
        let run = made.run(1);
        let reader = Run { name: run.name.clone(), path: run.path.clone() };
        assert!(!reader.is_live());
        let lock = File::open(run.path.join("lock")).unwrap();
        flock(&lock, FlockOperation::NonBlockingLockExclusive).unwrap();
        assert!(reader.is_live() && reader.is_live());
        drop(lock);
        assert!(!reader.is_live());
    }

    #[test]
    fn a_record_is_found_by_its_id() {
        let mut made = Made::new();
        let mut run = made.run(1);
        let first = run.record();
        run.rotate();
        let second = run.record();
        run.close();
        let third = made.run(2).record();
        pack(&made.file(1, 1));
        for (id, seq_expected) in [(&first, 2), (&second, 5), (&third, 2), (&third.to_uppercase(), 2)] {
            let line = find(made.path(), id).unwrap().unwrap();
            assert_eq!(seq(&line), Some(seq_expected));
        }
        assert_eq!(find(made.path(), &Made::id(99)).unwrap(), None);
        assert_eq!(find(made.path(), "their own").unwrap(), None);
        let later = "f0000000-0000-7000-8000-000000000000";
        assert_eq!(find(made.path(), later).unwrap(), None);
    }

    #[test]
    fn a_record_is_found_whatever_time_the_name_of_its_run_tells() {
        let mut made = Made::new();
        let mut run = made.run(1);
        let (id, path) = (run.record(), run.path.clone());
        run.close();
        // As after a start with a wrong clock: later names come behind that one.
        std::fs::rename(&path, path.with_file_name("20300101T000000Z-00000001")).unwrap();
        assert!(find(made.path(), &id).unwrap().is_some());
    }

    #[test]
    fn a_record_is_found_though_the_clock_was_set_back_since_its_run_began() {
        let mut made = Made::new();
        let id = made.run(1).record();
        made.edit(1, 1, |lines| lines[0] = lines[0].replace("2026-11-22", "2030-01-01"));
        let last = UNIX_EPOCH + std::time::Duration::from_secs(1_795_356_000);
        File::options().append(true).open(made.file(1, 1)).unwrap().set_modified(last).unwrap();
        assert!(find(made.path(), &id).unwrap().is_some());
    }

    #[test]
    fn a_record_that_took_long_is_found_behind_what_retention_removed() {
        let mut made = Made::new();
        let mut run = made.run(1);
        run.rotate();
        let id = run.record();
        run.close();
        // It had begun long before the segment that its end stands in.
        made.edit(1, 2, |lines| lines[0] = lines[0].replace("T14:", "T16:"));
        std::fs::remove_file(made.file(1, 1)).unwrap();
        assert!(find(made.path(), &id).unwrap().is_some());
    }

    #[test]
    fn an_id_that_a_client_put_elsewhere_is_not_a_record() {
        let mut made = Made::new();
        let id = Made::id(1);
        made.run(1).record_with(&serde_json::json!({"a": [{"id": id}], "id": Made::id(2), "z": 0}));
        assert_eq!(find(made.path(), &id).unwrap(), None);
        assert!(find(made.path(), &Made::id(2)).unwrap().is_some());
    }

    #[test]
    fn the_frame_of_a_line_is_read_without_the_rest() {
        let digits = "0123456789abcdef".repeat(4);
        let line = format!(r#"{{"v":1,"seq":42,"kind":"act","at":"2026-11-22T14:03:05.123456Z","chain":"{digits}"}}"#);
        let line = line.as_bytes();
        assert_eq!((seq(line), kind(line), at(line)), (Some(42), &b"act"[..], &b"2026-11-22T14:03:05.123456Z"[..]));
        let (value, covered) = chain(line).unwrap();
        assert_eq!((value, covered.len()), (digits.as_bytes(), line.len() - 76));
        for bad in [&b""[..], b"{", b"{\"v\":", b"{\"v\":1,\"seq\":", b"{\"v\":1,\"seq\":x,\"kind\":\"", &[b'"'; 90]] {
            assert_eq!((seq(bad), kind(bad), at(bad), chain(bad)), (None, &b""[..], &b""[..], None));
        }
    }
}
