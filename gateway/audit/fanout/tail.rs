//! One sink's way through the journal: what dead runs left, then our own run, line after line, for ever.

use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime};

use infergate_plugins::sink::{Batch, Failure, From, Outlet, Rejected};
use tokio::sync::watch;

use super::carry::{Carried, Carrier, Undelivered};
use super::position::{Home, Position};
use super::{Source, Still};
use crate::audit::read::{self, Lines, Run};
use crate::egress::Egress;
use crate::telemetry::SinkMeters;

/// How often it is looked whether another process died and left something.
const LEFT: Duration = Duration::from_secs(5);
/// How often the journal is looked at where nobody says that it grew.
const POLL: Duration = Duration::from_secs(1);
/// How long a delivery may go on before it is told that something is wrong.
const ALARM: Duration = Duration::from_secs(3);
/// The first wait after a failure, doubled each time, and the longest.
const BACKOFF: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(30);
/// The longest wait between lines that are refused for good, one after the other: a receiver that is set up wrongly
/// must not lose the whole journal before somebody looks.
const REFUSED_MAX: Duration = Duration::from_secs(1);

/// A sink and where it is.
pub(super) struct Tail {
    outlet: Arc<Outlet>,
    source: Source,
    home: Home,
    carrier: Carrier,
    trouble: Trouble,
    still: Arc<Still>,
    /// Dead runs that may have something: the next line that is wanted, and the one behind their last.
    left: BTreeMap<String, (u64, u64)>,
    /// When it was last looked for dead runs.
    looked: Instant,
    /// Dead runs that have nothing more.
    finished: HashSet<String>,
    takes_over: Option<File>,
}

impl Tail {
    pub(super) fn new(
        outlet: Arc<Outlet>,
        source: Source,
        egress: Arc<Egress>,
        meters: SinkMeters,
        still: Arc<Still>,
    ) -> Self {
        let home = Home::new(&source.directory, &outlet.config.name);
        let trouble = Trouble { outlet: outlet.clone(), meters, since: None, in_a_row: 0 };
        let (carrier, looked) = (Carrier::new(egress), Instant::now());
        let (left, finished, takes_over) = (BTreeMap::new(), HashSet::new(), None);
        Self { outlet, source, home, carrier, trouble, still, left, looked, finished, takes_over }
    }

    /// Delivers until it is stopped. A journal that cannot be read is tried again, like a sink that does not answer.
    pub(super) async fn run(mut self) {
        let mut failures = 0;
        loop {
            if let Err(error) = self.deliver().await {
                self.trouble.failed(&format!("the journal cannot be read, or the position not written: {error}"));
                tokio::time::sleep(backoff(failures)).await;
                failures += 1;
            }
        }
    }

    async fn deliver(&mut self) -> io::Result<()> {
        let (home, since) = (self.home.clone(), self.since());
        blocking(move || home.begin(&since)).await?;
        let mut own = self.stretch(self.own_run()).await?;
        own.position.save().await;
        self.still.next.store(own.position.next(), Ordering::Relaxed);
        loop {
            for run in self.left_over().await? {
                let mut stretch = self.stretch(run).await?;
                while self.step(&mut stretch, None).await? {}
                stretch.position.save().await;
                self.finished.insert(stretch.run.name.clone());
                self.left.remove(&stretch.run.name);
                self.tell_left();
            }
            self.follow(&mut own).await?;
        }
    }

    /// Follows our own run for a while.
    async fn follow(&mut self, own: &mut Stretch) -> io::Result<()> {
        let mut committed = self.source.committed.clone();
        let until = Instant::now() + LEFT;
        while Instant::now() < until {
            if self.step(own, Some(&mut committed)).await? {
                continue;
            }
            let wait = own.position.due().map_or(POLL, |due| due.min(POLL));
            let _ = tokio::time::timeout(wait, grown(&mut committed, own.position.next())).await;
            own.position.save_if_due().await;
        }
        Ok(())
    }

    /// Delivers a batch, if there is one. `false`: there is nothing more for now.
    async fn step(
        &mut self,
        stretch: &mut Stretch,
        mut committed: Option<&mut watch::Receiver<u64>>,
    ) -> io::Result<bool> {
        let mut gathered = Gathered::default();
        let mut until = None;
        loop {
            let limit = committed.as_ref().map_or(u64::MAX, |committed| *committed.borrow());
            gathered = stretch.read(gathered, &self.outlet, limit).await?;
            let Some(committed) = &mut committed else { break };
            let wait = Duration::from_millis(self.outlet.config.batch.wait_ms);
            let until = *until.get_or_insert_with(|| Instant::now() + wait);
            let left = until.saturating_duration_since(Instant::now());
            if gathered.is_empty() || gathered.full || left.is_zero() {
                break;
            }
            // Others may come along.
            let _ = tokio::time::timeout(left, grown(committed, gathered.next)).await;
        }
        if gathered.next == stretch.position.next() {
            return Ok(false);
        }
        self.hand_over(stretch, &gathered).await;
        Ok(true)
    }

    /// Delivers a batch, however often it takes; in smaller parts where something in it is refused.
    async fn hand_over(&mut self, stretch: &mut Stretch, gathered: &Gathered) {
        let lines = gathered.lines();
        let (mut done, mut size) = (0, lines.len());
        while done < lines.len() {
            let part = &lines[done..lines.len().min(done.saturating_add(size))];
            let went = self.attempt(&stretch.run.name, part).await;
            (done, size) = (done + went.over, went.size);
            self.moved(stretch, lines.get(done).map_or(gathered.next, |line| read::seq(line).unwrap_or(0))).await;
            if let Some(longest) = went.wait {
                self.wait(stretch, longest).await;
            }
        }
        self.moved(stretch, gathered.next).await;
    }

    /// Delivers lines once.
    async fn attempt(&mut self, run: &str, part: &[&[u8]]) -> Went {
        let delivery = self.outlet.sink.delivery(&Batch { run, lines: part, now: SystemTime::now() });
        let Undelivered { done, why, alone } = match self.watched(run, delivery).await {
            Ok(rejected) => {
                self.trouble.succeeded(part.len(), rejected);
                return Went { over: part.len(), size: part.len().saturating_mul(2), wait: None };
            }
            Err(undelivered) => undelivered,
        };
        self.trouble.acknowledged(done);
        match why {
            Failure::Later(why) => {
                self.trouble.failed(&why);
                Went { over: done, size: part.len(), wait: Some(BACKOFF_MAX) }
            }
            Failure::Refused(why) if alone || part.len() - done <= 1 => {
                self.trouble.passed_over(run, part.get(done).and_then(|line| read::seq(line)), &why);
                Went { over: done + 1, size: part.len(), wait: Some(REFUSED_MAX) }
            }
            // Only some of them may be what it does not take.
            Failure::Refused(_) => Went { over: done, size: (part.len() - done) / 2, wait: None },
        }
    }

    /// Waits before the next attempt, and says meanwhile what else has come together.
    async fn wait(&mut self, stretch: &mut Stretch, longest: Duration) {
        tokio::time::sleep(backoff(self.trouble.in_a_row).min(longest)).await;
        stretch.position.save_if_due().await;
        if self.looked.elapsed() >= LEFT
            && let Err(error) = self.left_over().await
        {
            tracing::debug!(sink = %self.outlet.config.name, %error, "what dead runs left cannot be counted");
        }
    }

    /// A delivery that is told of when it takes suspiciously long.
    async fn watched(&mut self, run: &str, delivery: infergate_plugins::sink::Delivery) -> Carried {
        let mut carried = std::pin::pin!(self.carrier.carry(&self.outlet, run, delivery));
        tokio::select! {
            carried = &mut carried => return carried,
            () = tokio::time::sleep(ALARM) => {}
        }
        self.trouble.failed(&format!("no answer for {} s", ALARM.as_secs()));
        carried.await
    }

    async fn moved(&mut self, stretch: &mut Stretch, next: u64) {
        stretch.position.advance(next);
        if stretch.run.name == self.source.run {
            self.still.next.store(stretch.position.next(), Ordering::Relaxed);
        } else if let Some((wanted, _)) = self.left.get_mut(&stretch.run.name) {
            *wanted = stretch.position.next();
            self.tell_left();
        }
        stretch.position.save_if_due().await;
    }

    /// Dead runs, oldest first, of which the sink may still want something.
    async fn left_over(&mut self) -> io::Result<Vec<Run>> {
        let (home, directory, lock) = (self.home.clone(), self.source.directory.clone(), self.takes_over.take());
        let (lock, runs) = blocking(move || {
            let lock = if lock.is_some() { lock } else { home.lock()? };
            let mut runs = read::runs(&directory)?;
            if lock.is_some() {
                home.sweep(|name| runs.iter().any(|run| run.name == name))?;
            }
            runs.retain(|run| lock.is_some() && home.wanted(&run.name).is_some());
            Ok((lock, runs))
        })
        .await?;
        self.takes_over = lock;
        let candidates =
            runs.into_iter().filter(|run| run.name != self.source.run && !self.finished.contains(&run.name));
        let candidates: Vec<Run> = candidates.collect();
        let dead: Vec<Run> =
            blocking(move || Ok(candidates.into_iter().filter(|run| !run.is_live()).collect())).await?;
        self.count_left(&dead).await?;
        Ok(dead)
    }

    /// Counts what these runs still have. A dead run's end stands still, so it is looked up once.
    async fn count_left(&mut self, dead: &[Run]) -> io::Result<()> {
        let (home, dead, mut known) = (self.home.clone(), dead.to_vec(), std::mem::take(&mut self.left));
        let count = move |run: Run| {
            let counted = known.remove(&run.name);
            let counted = counted.unwrap_or_else(|| (home.wanted(&run.name).unwrap_or(1), last(&run).unwrap_or(0) + 1));
            (run.name, counted)
        };
        self.left = blocking(move || Ok(dead.into_iter().map(count).collect())).await?;
        self.looked = Instant::now();
        self.tell_left();
        Ok(())
    }

    fn tell_left(&self) {
        let left = self.left.values().map(|(wanted, behind)| behind.saturating_sub(*wanted)).sum();
        self.still.left.store(left, Ordering::Relaxed);
    }

    async fn stretch(&self, run: Run) -> io::Result<Stretch> {
        let home = self.home.clone();
        let stretch = move || {
            let position = home.position(&run.name);
            Ok(Stretch { lines: Some(run.lines(position.next())), position, run })
        };
        blocking(stretch).await
    }

    fn own_run(&self) -> Run {
        let path = self.source.directory.join("runs").join(&self.source.run);
        Run { name: self.source.run.clone(), path }
    }

    fn since(&self) -> String {
        match self.outlet.config.from {
            From::Start => self.source.run.clone(),
            From::Beginning => String::new(),
        }
    }
}

/// What became of an attempt to deliver lines.
struct Went {
    /// How many of them need not be sent again.
    over: usize,
    /// How many should be sent at once next.
    size: usize,
    /// The longest wait before that, if there must be one.
    wait: Option<Duration>,
}

/// The seq of a run's last whole line.
fn last(run: &Run) -> io::Result<u64> {
    for segment in run.segments()?.iter().rev() {
        let (mut lines, mut last) = (segment.open()?, None);
        while lines.advance()? {
            last = read::seq(lines.line()).or(last);
        }
        if let Some(last) = last {
            return Ok(last);
        }
    }
    Ok(0)
}

/// Waits until line `next` is on disk.
async fn grown(committed: &mut watch::Receiver<u64>, next: u64) {
    if committed.wait_for(|seq| *seq >= next).await.is_err() {
        // The journal is closed; what it still has is found by looking.
        std::future::pending().await
    }
}

/// A run while it is delivered.
struct Stretch {
    run: Run,
    lines: Option<Lines>,
    position: Position,
}

impl Stretch {
    /// Adds lines up to number `limit` to what was gathered, as many as may leave at once.
    async fn read(&mut self, mut gathered: Gathered, outlet: &Arc<Outlet>, limit: u64) -> io::Result<Gathered> {
        gathered.next = gathered.next.max(self.position.next());
        let (run, outlet, from) = (self.run.clone(), outlet.clone(), gathered.next);
        let lines = self.lines.take();
        let (lines, gathered) = blocking(move || {
            let mut lines = lines.unwrap_or_else(|| run.lines(from));
            gathered.fill(&mut lines, &outlet, limit)?;
            Ok((lines, gathered))
        })
        .await?;
        self.lines = Some(lines);
        Ok(gathered)
    }
}

/// Lines that leave together.
#[derive(Default)]
struct Gathered {
    bytes: Vec<u8>,
    ends: Vec<usize>,
    /// The line behind the last one that was looked at.
    next: u64,
    full: bool,
}

impl Gathered {
    fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    fn fill(&mut self, lines: &mut Lines, outlet: &Outlet, limit: u64) -> io::Result<()> {
        let bounds = outlet.config.batch;
        while !self.full && self.next <= limit {
            let line = match lines.next() {
                // Told once; what is behind it can be read.
                Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                    tracing::error!(sink = %outlet.config.name, %error, "a line of the journal is passed over");
                    continue;
                }
                line => line?,
            };
            let Some(line) = line else { break };
            let seq = read::seq(line).unwrap_or(self.next);
            if seq > self.next {
                tracing::error!(sink = %outlet.config.name, from = self.next, to = seq - 1, "lines are gone before the sink had them");
            }
            self.next = seq + 1;
            if outlet.wants(read::kind(line)) {
                self.bytes.extend_from_slice(line);
                self.ends.push(self.bytes.len());
                self.full = self.ends.len() >= bounds.records || self.bytes.len() >= bounds.bytes;
            } else if seq.is_multiple_of(100_000) {
                // Where nothing is wanted, the position is written now and then.
                self.full = true;
            }
        }
        Ok(())
    }

    fn lines(&self) -> Vec<&[u8]> {
        let begins = std::iter::once(0).chain(self.ends.iter().copied());
        begins.zip(&self.ends).map(|(begin, end)| &self.bytes[begin..*end]).collect()
    }
}

/// Tells when a sink begins to fail, and when it works again.
struct Trouble {
    outlet: Arc<Outlet>,
    meters: SinkMeters,
    since: Option<Instant>,
    /// How often it was since a line was acknowledged.
    in_a_row: u32,
}

impl Trouble {
    fn failed(&mut self, why: &str) {
        self.in_a_row = self.in_a_row.saturating_add(1);
        self.meters.failures.inc();
        self.meters.healthy.set(0);
        let (sink, kind) = (self.outlet.config.name.as_str(), self.outlet.sink.kind());
        match self.since {
            Some(_) => tracing::debug!(sink, kind, error = why, "audit records still cannot be delivered"),
            None => {
                tracing::error!(sink, kind, error = why, "audit records cannot be delivered: they wait in the journal")
            }
        }
        self.since.get_or_insert_with(Instant::now);
    }

    /// A line that will never be taken does not stop those behind it. It is still in the journal.
    fn passed_over(&mut self, run: &str, seq: Option<u64>, why: &str) {
        self.in_a_row = self.in_a_row.saturating_add(1);
        self.meters.refused.inc();
        let (sink, kind) = (self.outlet.config.name.as_str(), self.outlet.sink.kind());
        tracing::error!(sink, kind, run, seq, error = why, "the sink refuses this line for good and does not get it");
    }

    fn acknowledged(&mut self, lines: usize) {
        self.meters.delivered.inc_by(lines as u64);
        if lines > 0 {
            self.in_a_row = 0;
        }
    }

    fn succeeded(&mut self, lines: usize, rejected: Option<Rejected>) {
        let refused = rejected.as_ref().map_or(0, |rejected| rejected.lines);
        self.acknowledged(lines.saturating_sub(usize::try_from(refused).unwrap_or(usize::MAX)));
        self.meters.refused.inc_by(refused);
        self.meters.healthy.set(1);
        let (sink, kind) = (self.outlet.config.name.as_str(), self.outlet.sink.kind());
        if let Some(Rejected { why, .. }) = rejected {
            tracing::error!(sink, kind, error = why, "audit records were delivered, but not all were taken");
        }
        if let Some(since) = self.since.take() {
            tracing::info!(sink, kind, seconds = since.elapsed().as_secs_f32(), "audit records are delivered again");
        }
    }
}

/// The wait after so many failures in a row, half of it by chance, so that gateways do not come all at once.
fn backoff(failures: u32) -> Duration {
    let longest = BACKOFF.saturating_mul(1 << failures.min(20)).min(BACKOFF_MAX);
    longest.mul_f64(0.5 + fastrand::f64() / 2.0)
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| Err(io::Error::other(error)))
}
