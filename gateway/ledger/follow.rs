//! The thread that folds the journal: what dead runs left, then our own run, batch after batch, for ever.
//!
//! A ledger that fails is opened anew, after a while, and its own positions say where to go on. Meanwhile the journal
//! waits: retention keeps what is not folded.

use std::collections::HashSet;
use std::fmt;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use parking_lot::{Condvar, Mutex};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::{Notify, watch};

use super::facts::Feed;
use super::fold::{Batch, begin};
use super::{Place, Position, Store, Trouble};
use crate::audit::fanout::{self, position};
use crate::audit::journal::Journal;
use crate::audit::read::{self, Lines, Run};
use crate::settings;
use crate::telemetry::LedgerMeters;
use crate::time::seconds;

/// How many lines are folded together at most.
const LINES: u64 = 1_000;
/// How long the first line waits for others.
const GATHER: Duration = Duration::from_millis(100);
/// How often it is looked whether another process died and left something.
const LEFT: Duration = Duration::from_secs(5);
/// How often the metrics are set where nothing else happens.
const POLL: Duration = Duration::from_secs(1);
/// How often what is too old is removed.
const PRUNE: Duration = Duration::from_secs(3_600);
/// The first wait after a failure, doubled each time, and the longest.
const BACKOFF: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(15);

/// What the thread and those who wait for it share.
#[derive(Debug, Default)]
pub(super) struct Shared {
    progress: Mutex<Progress>,
    changed: Condvar,
    wake: Notify,
    stopping: AtomicBool,
}

#[derive(Debug, Default)]
struct Progress {
    /// The next line of our own run.
    next: u64,
    /// Whether all that dead runs had left is folded.
    left: bool,
    /// What is wrong now.
    trouble: Option<Trouble>,
}

impl Shared {
    /// How many of the lines up to `committed` are still to be folded.
    pub(super) fn lag(&self, committed: u64) -> u64 {
        (committed + 1).saturating_sub(self.progress.lock().next.max(1))
    }

    /// Waits until our own run is folded up to line `target`, and what dead runs left.
    pub(super) fn folded(&self, target: u64, deadline: Instant) -> Result<(), Trouble> {
        let mut progress = self.progress.lock();
        while !(progress.left && progress.next > target) {
            self.wake.notify_one();
            if self.changed.wait_until(&mut progress, deadline).timed_out() {
                let why = progress.trouble.clone();
                return Err(why.unwrap_or_else(|| "the journal is not folded to its end yet".to_owned()));
            }
        }
        Ok(())
    }

    pub(super) fn stop(&self) {
        self.stopping.store(true, Ordering::Relaxed);
        self.wake.notify_one();
    }

    /// Until it is to stop. Who only wants to know how far it is does not hurry a ledger that fails.
    async fn stopped(&self) {
        while !self.is_stopping() {
            self.wake.notified().await;
        }
    }

    fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }

    fn tell(&self, change: impl FnOnce(&mut Progress)) {
        change(&mut self.progress.lock());
        self.changed.notify_all();
    }
}

/// What the thread works with.
pub(super) struct Follower {
    place: Place,
    directory: PathBuf,
    run: String,
    committed: watch::Receiver<u64>,
    home: position::Home,
    /// What the journal tells of our own run's lines, where their sums are enough.
    feed: Arc<Feed>,
    rows: bool,
    keep_minutes: Duration,
    keep_rows: Option<Duration>,
    meters: LedgerMeters,
    shared: Arc<Shared>,
    /// Dead runs that have nothing more.
    finished: HashSet<String>,
    /// How often it failed in a row, and since when.
    failing: Option<(u32, Instant)>,
    pruned: Option<Instant>,
}

/// Why it begins anew.
enum Stop {
    /// Somebody else folded a run of ours, or our ledger is another one now.
    Moved,
    /// The ledger has a position of another run of this name.
    Another(String),
    /// Something is wrong.
    Failed(Trouble),
}

impl From<Trouble> for Stop {
    fn from(trouble: Trouble) -> Self {
        Self::Failed(trouble)
    }
}

impl From<io::Error> for Stop {
    fn from(error: io::Error) -> Self {
        Self::Failed(format!("the journal cannot be read: {error}"))
    }
}

impl Follower {
    pub(super) fn new(
        place: Place,
        settings: &settings::Ledger,
        journal: &Journal,
        feed: Arc<Feed>,
        meters: LedgerMeters,
        shared: Arc<Shared>,
    ) -> Self {
        let days = |days: u32| Duration::from_secs(86_400 * u64::from(days));
        meters.healthy.set(1);
        Self {
            place,
            directory: journal.directory().to_owned(),
            run: journal.run().to_owned(),
            committed: journal.committed(),
            home: position::Home::new(journal.directory(), fanout::LEDGER),
            feed,
            rows: settings.rows == settings::Rows::All,
            keep_minutes: days(settings.keep_minutes_days),
            keep_rows: settings.keep_rows_days.map(days),
            meters,
            shared,
            finished: HashSet::new(),
            failing: None,
            pruned: None,
        }
    }

    /// Folds until it is stopped.
    pub(super) fn run(mut self) {
        let Ok(runtime) = Builder::new_current_thread().enable_time().build() else {
            tracing::error!("the ledger cannot wait for anything: nothing is folded");
            return;
        };
        while !self.shared.is_stopping() {
            // Whatever breaks down in here, money is counted on.
            let followed = catch_unwind(AssertUnwindSafe(|| self.follow(&runtime)));
            match followed.unwrap_or_else(|_| Err(Stop::Failed("it broke down: see above".to_owned()))) {
                Ok(()) => return,
                Err(Stop::Moved) => {
                    tracing::info!(ledger = %self.place, "the ledger's position is another one now: going on from there");
                    std::thread::sleep(BACKOFF);
                }
                Err(Stop::Another(run)) => self.failed(&runtime, format!("{run}: {ANOTHER}")),
                Err(Stop::Failed(trouble)) => self.failed(&runtime, trouble),
            }
        }
    }

    /// Tells what is wrong and waits a while.
    fn failed(&mut self, runtime: &Runtime, trouble: Trouble) {
        let (times, since) = self.failing.unwrap_or((0, Instant::now()));
        self.failing = Some((times.saturating_add(1), since));
        self.meters.failures.inc();
        self.meters.healthy.set(0);
        match times {
            0 => tracing::error!(error = trouble, "the ledger cannot be written: the journal waits for it"),
            _ => tracing::debug!(error = trouble, "the ledger still cannot be written"),
        }
        self.shared.tell(|progress| progress.trouble = Some(trouble));
        let until = Instant::now() + backoff(times);
        while Instant::now() < until && !self.shared.is_stopping() {
            let wait = until.saturating_duration_since(Instant::now()).min(POLL);
            let pause = async { tokio::time::timeout(wait, self.shared.stopped()).await };
            let _ = runtime.block_on(pause);
        }
    }

    /// All is well: a batch was folded, or there is none.
    fn works(&mut self) {
        let Some((_, since)) = self.failing.take() else { return };
        tracing::info!(seconds = since.elapsed().as_secs_f32(), "the ledger can be written again");
        self.meters.healthy.set(1);
        self.shared.tell(|progress| progress.trouble = None);
    }

    fn follow(&mut self, runtime: &Runtime) -> Result<(), Stop> {
        self.finished.clear();
        self.shared.tell(|progress| progress.left = false);
        self.home.begin("")?;
        let mut store = self.place.open(self.rows)?;
        self.take_back(store.as_mut())?;
        let mut own = self.stretch(store.as_mut(), self.own_run())?;
        self.shared.tell(|progress| progress.next = own.at.next);
        while !self.shared.is_stopping() {
            self.fold_left_over(store.as_mut())?;
            self.prune(store.as_mut())?;
            self.fold_own(store.as_mut(), &mut own, runtime)?;
            store.is_in_place()?;
        }
        Ok(())
    }

    /// What retention goes by is what this ledger has: it may be a new one.
    fn take_back(&self, store: &mut dyn Store) -> Result<(), Stop> {
        for run in read::runs(&self.directory)? {
            if run.name == self.run || !run.is_live() {
                self.home.position_at(&run.name, store.position(&run.name)?.next).keep();
            }
        }
        Ok(())
    }

    /// Folds what dead runs left, oldest first.
    fn fold_left_over(&mut self, store: &mut dyn Store) -> Result<(), Stop> {
        for run in self.left_over()? {
            let name = run.name.clone();
            match self.stretch(store, run) {
                Ok(mut stretch) => while !self.shared.is_stopping() && self.read(store, &mut stretch, u64::MAX)? {},
                // That does not go away, and must not stop the others.
                Err(Stop::Another(run)) => tracing::error!(run, "{ANOTHER}"),
                Err(stop) => return Err(stop),
            }
            self.finished.insert(name);
        }
        self.shared.tell(|progress| progress.left = true);
        Ok(())
    }

    fn left_over(&self) -> io::Result<Vec<Run>> {
        let mut runs = read::runs(&self.directory)?;
        self.home.sweep(|name| runs.iter().any(|run| run.name == name))?;
        runs.retain(|run| run.name != self.run && !self.finished.contains(&run.name) && !run.is_live());
        Ok(runs)
    }

    /// Follows our own run for a while.
    fn fold_own(&mut self, store: &mut dyn Store, own: &mut Stretch, runtime: &Runtime) -> Result<(), Stop> {
        let mut committed = self.committed.clone();
        let until = Instant::now() + LEFT;
        while Instant::now() < until && !self.shared.is_stopping() {
            let limit = *committed.borrow();
            let more = self.step(store, own, limit)?;
            self.shared.tell(|progress| progress.next = own.at.next);
            if !more {
                self.works();
            }
            if more && own.at.next + LINES <= *committed.borrow() {
                continue;
            }
            own.kept.keep_if_changed();
            // One line wakes us, others come along; who waits for us wakes us at once.
            let (next, wake) = (own.at.next, &self.shared.wake);
            let woken = async {
                if grown(&mut committed, next).await {
                    tokio::time::sleep(GATHER).await;
                }
            };
            runtime.block_on(async {
                tokio::select! {
                    _ = tokio::time::timeout(POLL, woken) => {}
                    () = wake.notified() => {}
                }
            });
        }
        Ok(())
    }

    /// Folds a batch of our own run, if there is one: what the journal told of it, or lines up to number `limit`.
    fn step(&mut self, store: &mut dyn Store, own: &mut Stretch, limit: u64) -> Result<bool, Stop> {
        let (told, before) = self.feed.take(own.at.next);
        if told.is_empty() {
            return self.read(store, own, limit.min(before - 1));
        }
        let batch = Batch::told(&own.run.name, own.at.clone(), &told);
        own.lines = own.run.lines(batch.to.next);
        self.fold(store, own, batch)
    }

    /// Folds a batch of lines up to number `limit`, if there is one. `false`: there is nothing more for now.
    fn read(&mut self, store: &mut dyn Store, stretch: &mut Stretch, limit: u64) -> Result<bool, Stop> {
        let batch = self.gather(stretch, limit)?;
        if batch.to == batch.from {
            return Ok(false);
        }
        self.fold(store, stretch, batch)
    }

    fn fold(&mut self, store: &mut dyn Store, stretch: &mut Stretch, batch: Batch) -> Result<bool, Stop> {
        if !store.fold(&batch)? {
            return Err(Stop::Moved);
        }
        self.works();
        self.meters.folded.inc_by(batch.records);
        stretch.at = batch.to;
        stretch.kept.advance(stretch.at.next);
        stretch.kept.keep_if_due();
        Ok(true)
    }

    /// The next lines up to number `limit`.
    fn gather(&self, stretch: &mut Stretch, limit: u64) -> io::Result<Batch> {
        let mut batch = Batch::new(&stretch.run.name, stretch.at.clone(), self.rows);
        while batch.to.next <= limit && batch.to.next - batch.from.next < LINES {
            let line = match stretch.lines.next() {
                // Told once; what is behind it can be read.
                Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                    tracing::error!(%error, "a line of the journal is not in the ledger");
                    continue;
                }
                line => line?,
            };
            let Some(line) = line else { break };
            let (expected, seq) = (batch.to.next, read::seq(line).unwrap_or(0));
            if seq > expected {
                self.meters.missed.inc_by(seq - expected);
                let run = &batch.run;
                tracing::error!(run, from = expected, to = seq - 1, "lines are gone before the ledger had them");
            }
            if let Err(error) = batch.add(line) {
                tracing::error!(run = batch.run, seq, error, "a record of the journal is not in the ledger");
            }
            if seq > expected {
                // As many as a batch may have would be counted from the wrong line.
                break;
            }
        }
        Ok(batch)
    }

    fn stretch(&self, store: &mut dyn Store, run: Run) -> Result<Stretch, Stop> {
        let at = store.position(&run.name)?;
        if !is_this(&run, &at)? {
            return Err(Stop::Another(run.name));
        }
        let (lines, kept) = (run.lines(at.next), self.home.position_at(&run.name, at.next));
        Ok(Stretch { run, lines, at, kept })
    }

    fn own_run(&self) -> Run {
        Run { name: self.run.clone(), path: self.directory.join("runs").join(&self.run) }
    }

    /// Removes what is too old, now and then.
    fn prune(&mut self, store: &mut dyn Store) -> Result<(), Trouble> {
        if self.pruned.is_some_and(|pruned| pruned.elapsed() < PRUNE) {
            return Ok(());
        }
        self.pruned = Some(Instant::now());
        // Whole hours go: what is left begins with one.
        store.prune(begin(ago(self.keep_minutes), 3_600), self.keep_rows.map(ago))
    }
}

/// What is told of a run whose position in the ledger is another one's.
const ANOTHER: &str = "the ledger has another run of this name: this one is not folded";

/// A time before now, in seconds since 1970.
fn ago(time: Duration) -> i64 {
    seconds(SystemTime::now().checked_sub(time).unwrap_or(UNIX_EPOCH))
}

/// Whether `run` is the one whose position this is: if the line before it is still there, it tells.
fn is_this(run: &Run, at: &Position) -> io::Result<bool> {
    if at.chain.is_empty() {
        return Ok(true);
    }
    let mut lines = run.lines(at.next - 1);
    let line = lines.next()?.filter(|line| read::seq(line) == Some(at.next - 1));
    Ok(line.and_then(read::chain).is_none_or(|(chain, _)| chain == at.chain.as_bytes()))
}

/// Waits until line `next` is on disk. `false`: the journal is closed, and nothing comes any more.
async fn grown(committed: &mut watch::Receiver<u64>, next: u64) -> bool {
    match committed.wait_for(|seq| *seq >= next).await {
        Ok(_) => true,
        Err(_) => std::future::pending().await,
    }
}

/// A run while it is folded.
struct Stretch {
    run: Run,
    lines: Lines,
    at: Position,
    /// The same on disk, for retention.
    kept: position::Position,
}

impl fmt::Debug for Stretch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {}", self.run.name, self.at.next)
    }
}

/// The wait after so many failures in a row, half of it by chance, so that gateways do not come all at once.
fn backoff(failures: u32) -> Duration {
    let longest = BACKOFF.saturating_mul(1 << failures.min(20)).min(BACKOFF_MAX);
    longest.mul_f64(0.5 + fastrand::f64() / 2.0)
}
