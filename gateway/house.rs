//! What lives as long as the process: the policy in force, the levels, the metrics, the connections.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use crate::audit::journal::{Act, By, Journal};
use crate::guard::remote::Remotes;
use crate::ledger::Ledger;
use crate::policy::reload::InForce;
use crate::relay::Connections;
use crate::routers::second::Seconds;
use crate::settings::Settings;
use crate::state::State;
use crate::telemetry::trace::Tracer;
use crate::telemetry::{Table, Telemetry};

/// How long the end of the process waits for the ledger to have what the journal has.
const FOLD: Duration = Duration::from_secs(2);
/// How long requests that have been cut may take to settle.
const LAST: Duration = Duration::from_millis(500);

/// The process's belongings.
#[derive(Debug)]
pub struct House {
    /// How the process is set up.
    pub settings: Settings,
    /// The policy in force.
    pub policy: InForce,
    /// The levels that outlive reloads.
    pub state: Arc<State>,
    /// The metrics.
    pub telemetry: Arc<Telemetry>,
    /// The traces on their way out.
    pub tracer: Arc<Tracer>,
    /// The journal, if there is one.
    pub journal: Option<Arc<Journal>>,
    /// The account of what was spent, folded from the journal.
    pub ledger: Option<Arc<Ledger>>,
    /// The connections to upstreams.
    pub connections: Connections,
    /// The way to services that guardrails ask.
    pub remotes: Remotes,
    /// The way to services that routers ask.
    pub seconds: Seconds,
    /// Turns true when connections of clients are to be closed after their answer.
    pub connections_closing: watch::Receiver<bool>,
    close_connections: watch::Sender<bool>,
    started: AtomicBool,
}

impl House {
    /// A house without a policy, which is not ready for requests.
    pub fn new(settings: Settings) -> Self {
        let (close_connections, connections_closing) = watch::channel(false);
        let telemetry = Arc::new(Telemetry::new());
        Self {
            tracer: Arc::new(Tracer::new(telemetry.traces.clone())),
            telemetry,
            state: Arc::new(State::new(settings.bodies_bytes())),
            connections: Connections::new(settings.ca_file.as_deref(), settings.kept_connections),
            remotes: Remotes::default(),
            seconds: Seconds::default(),
            journal: None,
            ledger: None,
            policy: InForce::default(),
            connections_closing,
            close_connections,
            started: AtomicBool::new(false),
            settings,
        }
    }

    /// Whether new requests are welcome: a policy is in force, the upstreams' names have been looked up, the process is
    /// not going down, and the store of shared limits answers if nothing is allowed without it.
    pub fn ready(&self) -> bool {
        self.started.load(Ordering::Relaxed) && !self.draining() && !self.state.limits.shared.denies()
    }

    /// The process has what it needs.
    pub fn set_started(&self) {
        self.started.store(true, Ordering::Relaxed);
    }

    /// Whether the process is going down.
    pub fn draining(&self) -> bool {
        *self.connections_closing.borrow()
    }

    /// How full the tables are that requests and policies fill.
    pub fn tables(&self) -> impl Iterator<Item = Table> {
        let own = [self.connections.table(), self.remotes.table(), self.seconds.table()];
        self.state.tables().chain(own)
    }

    /// Files an administrative act.
    pub fn act(&self, act: &str, by: By, change: serde_json::Value) {
        if let Some(journal) = &self.journal {
            journal.act(&Act { act, by, change });
        }
    }

    /// Waits a moment for requests that have been cut to file what became of them.
    pub fn wait_for_the_last(&self) {
        let begun = Instant::now();
        while self.telemetry.in_flight.get() > 0 && begun.elapsed() < LAST {
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// The process ends: what the journal still holds goes to disk, and its run is closed; then it is folded.
    pub fn close_journal(&self) {
        if let Some(journal) = &self.journal {
            journal.close("the process ended");
        }
        if let Some(ledger) = &self.ledger {
            ledger.close(FOLD);
        }
    }

    /// The process is going down: readiness fails, and connections close after their answer.
    pub fn drain(&self) {
        self.close_connections.send_replace(true);
    }
}
