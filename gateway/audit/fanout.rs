//! Records leave for other systems. The journal on disk is the queue: each sink reads it at its own pace, keeps its
//! own position and tries again on its own, so a slow one stops nobody, and an outage loses nothing.
//!
//! Every line arrives at least once, those of one run in order. A run is delivered by the process that writes it;
//! what a process leaves behind when it ends is taken over by the next one.

mod carry;
mod file;
#[cfg(feature = "kafka")]
mod kafka;
mod nats;
pub(crate) mod position;
mod tail;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use infergate_plugins::sink::Outlet;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use self::position::Home;
use self::tail::Tail;
use crate::egress::Egress;
use crate::house::House;
use crate::telemetry::{SinkMeters, Telemetry};

/// The ledger keeps its positions as a sink does, under a name that no sink can have.
pub(crate) const LEDGER: &str = ".ledger";
/// How often the sinks of the policy are compared with those that run.
const EVERY: Duration = Duration::from_secs(1);
/// How often the positions are looked at when the process ends.
const SETTLE: Duration = Duration::from_millis(20);

/// What is delivered: the journal, and the run that this process writes in it.
#[derive(Clone, Debug)]
pub struct Source {
    /// The journal's directory.
    pub directory: PathBuf,
    /// The name of this process's run.
    pub run: String,
    /// The `seq` of its last line on disk.
    pub committed: watch::Receiver<u64>,
}

/// Delivers the journal to the sinks of the policy, as long as the process lives. For the background runtime.
pub async fn run(house: Arc<House>, egress: Arc<Egress>) {
    let Some(journal) = house.journal.clone() else { return };
    let source = Source {
        directory: journal.directory().to_owned(),
        run: journal.run().to_owned(),
        committed: journal.committed(),
    };
    let mut fanout = Fanout::new(source, egress, house.telemetry.clone());
    loop {
        fanout.follow(&house.policy.get().sinks).await;
        tokio::time::sleep(EVERY).await;
    }
}

/// The smallest position that the sinks called `names` have in `run`: lines before it may be removed. `None`: no sink
/// wants anything of it.
pub fn wanted(directory: &Path, run: &str, names: &[&str]) -> Option<u64> {
    names.iter().filter_map(|name| Home::new(directory, name).wanted(run)).min()
}

/// Waits until every sink has all of the journal, `within` this time at most. For the end of the process, when the
/// journal is closed: what a sink does not get in time, the next process delivers.
pub async fn settle(house: &House, within: Duration) {
    let Some(journal) = &house.journal else { return };
    let (policy, last) = (house.policy.get(), *journal.committed().borrow());
    let names: Vec<&str> = policy.sinks.iter().map(|outlet| outlet.config.name.as_str()).collect();
    let settled = settled(journal.directory(), journal.run(), &names, last);
    if tokio::time::timeout(within, settled).await.is_err() {
        tracing::warn!("the process ends before its sinks have every record: the next one delivers the rest");
    }
}

async fn settled(directory: &Path, run: &str, names: &[&str], last: u64) {
    while wanted(directory, run, names).is_some_and(|next| next <= last) {
        tokio::time::sleep(SETTLE).await;
    }
}

/// The sinks that run.
struct Fanout {
    source: Source,
    egress: Arc<Egress>,
    telemetry: Arc<Telemetry>,
    running: BTreeMap<String, Running>,
}

struct Running {
    outlet: Arc<Outlet>,
    task: JoinHandle<()>,
    meters: SinkMeters,
    still: Arc<Still>,
}

/// What a sink has still to get.
#[derive(Debug)]
struct Still {
    /// The next line of this process's run.
    next: AtomicU64,
    /// Lines that dead runs left.
    left: AtomicU64,
}

impl Still {
    /// How many lines it is behind, where `committed` is the last one of our run.
    fn lines(&self, committed: u64) -> u64 {
        let own = (committed + 1).saturating_sub(self.next.load(Ordering::Relaxed));
        own.saturating_add(self.left.load(Ordering::Relaxed))
    }
}

impl Fanout {
    fn new(source: Source, egress: Arc<Egress>, telemetry: Arc<Telemetry>) -> Self {
        Self { source, egress, telemetry, running: BTreeMap::new() }
    }

    /// Makes the sinks that run those of the policy: what is gone stops, what is new starts, what has changed or has
    /// broken down starts anew.
    async fn follow(&mut self, outlets: &[Arc<Outlet>]) {
        let stays = |running: &Running| outlets.contains(&running.outlet) && !running.task.is_finished();
        let leaving: Vec<String> =
            self.running.iter().filter(|(_, running)| !stays(running)).map(|(name, _)| name.clone()).collect();
        for name in leaving {
            if let Some(running) = self.running.remove(&name) {
                running.stop().await;
            }
            if !outlets.iter().any(|outlet| outlet.config.name == name) {
                self.telemetry.sink_gone(&name);
            }
        }
        for outlet in outlets {
            if !self.running.contains_key(&outlet.config.name) {
                let running = self.start(outlet.clone());
                self.running.insert(outlet.config.name.clone(), running);
            }
        }
        self.measure();
    }

    fn start(&self, outlet: Arc<Outlet>) -> Running {
        let meters = self.telemetry.sink(&outlet.config.name);
        meters.healthy.set(1);
        let still = Arc::new(Still { next: AtomicU64::new(1), left: AtomicU64::new(0) });
        tracing::info!(sink = %outlet.config.name, kind = outlet.sink.kind(), "audit records go there");
        let tail = Tail::new(outlet.clone(), self.source.clone(), self.egress.clone(), meters.clone(), still.clone());
        Running { outlet, task: tokio::spawn(tail.run()), meters, still }
    }

    fn measure(&self) {
        let committed = *self.source.committed.borrow();
        for running in self.running.values() {
            let lag = running.still.lines(committed);
            running.meters.lag.set(i64::try_from(lag).unwrap_or(i64::MAX));
        }
    }
}

impl Running {
    /// Stops it and waits until it is gone: two with one name must not run at once.
    async fn stop(mut self) {
        self.task.abort();
        match (&mut self.task).await {
            Err(error) if error.is_panic() => {
                tracing::error!(sink = %self.outlet.config.name, "the sink broke down and starts anew");
            }
            _ => {
                tracing::info!(sink = %self.outlet.config.name, "the sink stops, or starts anew as the policy now says")
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[cfg(test)]
mod tests;
