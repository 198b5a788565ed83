//! Where a sink is in the journal, on disk: `sinks/<name>/<run>` has the seq of the next line that it wants.

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How often a position is written at most. After a crash as much is delivered again.
const EVERY: Duration = Duration::from_millis(200);
/// The file with the first run that the sink wants.
const SINCE: &str = "since";
/// The file that is locked by the process that delivers what dead ones left.
const LOCK: &str = "lock";

/// The directory of one sink.
#[derive(Clone, Debug)]
pub(crate) struct Home(PathBuf);

impl Home {
    pub(crate) fn new(directory: &Path, name: &str) -> Self {
        Self(directory.join("sinks").join(name))
    }

    /// Makes it, if the sink is new. `since` is the first run that it then wants; empty: all of them.
    pub(crate) fn begin(&self, since: &str) -> io::Result<()> {
        fs::create_dir_all(&self.0)?;
        let path = self.0.join(SINCE);
        if path.exists() { Ok(()) } else { replace(&path, since) }
    }

    /// The right to deliver what other processes left, as long as the file lives; `None` if another one has it.
    pub(crate) fn lock(&self) -> io::Result<Option<File>> {
        let file = File::options().create(true).truncate(false).write(true).open(self.0.join(LOCK))?;
        match file.try_lock() {
            Ok(()) => Ok(Some(file)),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }

    /// The next line that the sink wants of a run; `None` if it wants nothing of it. A sink without a home is new.
    pub(crate) fn wanted(&self, run: &str) -> Option<u64> {
        match fs::read_to_string(self.0.join(run)) {
            // A position that cannot be read is lost: everything is delivered again.
            Ok(text) => Some(text.trim().parse().unwrap_or(1)),
            Err(_) => {
                let since = fs::read_to_string(self.0.join(SINCE)).unwrap_or_default();
                (run >= since.as_str()).then_some(1)
            }
        }
    }

    /// The position in a run, of which it wants everything if nothing is known.
    pub(crate) fn position(&self, run: &str) -> Position {
        let next = self.wanted(run).unwrap_or(1);
        Position { path: self.0.join(run), next, saved: 0, when: Instant::now() }
    }

    /// A position that is known from elsewhere, whatever is on disk.
    pub(crate) fn position_at(&self, run: &str, next: u64) -> Position {
        Position { path: self.0.join(run), next, saved: 0, when: Instant::now() }
    }

    /// Removes the positions in runs that `exists` does not know.
    pub(crate) fn sweep(&self, exists: impl Fn(&str) -> bool) -> io::Result<()> {
        for entry in fs::read_dir(&self.0)? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            if name != SINCE && name != LOCK && !name.starts_with('.') && !exists(&name) {
                fs::remove_file(self.0.join(name))?;
            }
        }
        Ok(())
    }
}

/// A sink's position in one run. It is written when it is dropped, too.
#[derive(Debug)]
pub(crate) struct Position {
    path: PathBuf,
    next: u64,
    /// What is on disk; 0 if nothing is.
    saved: u64,
    when: Instant,
}

impl Position {
    /// The next line that the sink wants.
    pub(crate) fn next(&self) -> u64 {
        self.next
    }

    /// Everything before `next` was delivered.
    pub(crate) fn advance(&mut self, next: u64) {
        self.next = next.max(self.next);
    }

    /// How long it may still wait to be written; `None` if it is on disk.
    pub(crate) fn due(&self) -> Option<Duration> {
        (self.next != self.saved).then(|| EVERY.saturating_sub(self.when.elapsed()))
    }

    /// Writes it, on a thread that may block. Where that cannot be done it is tried again later: the sink goes on, and
    /// lines will come twice if the process ends before.
    pub(crate) async fn save(&mut self) {
        let (path, next) = (self.path.clone(), self.next);
        self.when = Instant::now();
        match tokio::task::spawn_blocking(move || replace(&path, &format!("{next}\n"))).await {
            Ok(Ok(())) => self.saved = next,
            Ok(Err(error)) => self.complain(&error),
            Err(_) => {}
        }
    }

    /// Writes it on this thread, which may block.
    pub(crate) fn keep(&mut self) {
        self.when = Instant::now();
        match replace(&self.path, &format!("{}\n", self.next)) {
            Ok(()) => self.saved = self.next,
            Err(error) => self.complain(&error),
        }
    }

    /// The same, where there is something new.
    pub(crate) fn keep_if_changed(&mut self) {
        if self.next != self.saved {
            self.keep();
        }
    }

    /// The same, where some time has passed since the last time.
    pub(crate) fn keep_if_due(&mut self) {
        if self.due().is_some_and(|wait| wait.is_zero()) {
            self.keep();
        }
    }

    /// [`Position::save`], where some time has passed since the last time.
    pub(crate) async fn save_if_due(&mut self) {
        if self.due().is_some_and(|wait| wait.is_zero()) {
            self.save().await;
        }
    }

    fn complain(&self, error: &io::Error) {
        tracing::warn!(path = %self.path.display(), %error, "a sink's position cannot be kept: lines may come twice");
    }
}

impl Drop for Position {
    fn drop(&mut self) {
        if self.next != self.saved
            && let Err(error) = replace(&self.path, &format!("{}\n", self.next))
        {
            self.complain(&error);
        }
    }
}

/// Writes a file so that there is always a whole one.
fn replace(path: &Path, text: &str) -> io::Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let fresh = path.with_file_name(format!(".{name}.{:08x}", fastrand::u32(..)));
    fs::write(&fresh, text)?;
    fs::rename(&fresh, path).inspect_err(|_| drop(fs::remove_file(&fresh)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_sink_wants_the_runs_from_its_own_on_and_an_old_one_goes_on() {
        let directory = tempfile::tempdir().unwrap();
        let home = Home::new(directory.path(), "s");
        assert_eq!(home.wanted("2026-b"), Some(1), "nothing may be removed before it has begun");
        home.begin("2026-b").unwrap();
        assert_eq!([home.wanted("2026-a"), home.wanted("2026-b"), home.wanted("2026-c")], [None, Some(1), Some(1)]);
        home.position("2026-b").advance(7);
        home.begin("2027").unwrap();
        assert_eq!(home.wanted("2026-b"), Some(7));
    }

    #[tokio::test]
    async fn a_position_is_written_now_and_then_and_at_the_end() {
        let directory = tempfile::tempdir().unwrap();
        let home = Home::new(directory.path(), "s");
        home.begin("").unwrap();
        let mut position = home.position("r");
        position.save().await;
        assert_eq!(position.due(), None);
        position.advance(5);
        assert!(position.due().is_some_and(|wait| wait > Duration::ZERO));
        assert_eq!(home.wanted("r"), Some(1));
        drop(position);
        assert_eq!(home.wanted("r"), Some(5));
    }

    #[test]
    fn one_process_takes_over_and_runs_that_are_gone_are_forgotten() {
        let directory = tempfile::tempdir().unwrap();
        let home = Home::new(directory.path(), "s");
        home.begin("").unwrap();
        let lock = home.lock().unwrap();
        assert!(lock.is_some() && home.lock().unwrap().is_none());
        drop(lock);
        assert!(home.lock().unwrap().is_some());
        home.position("gone").advance(2);
        home.position("here").advance(3);
        home.sweep(|run| run == "here").unwrap();
        assert_eq!((home.wanted("gone"), home.wanted("here")), (Some(1), Some(3)));
    }
}
