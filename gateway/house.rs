//! What lives as long as the process: the policy in force, the levels, the metrics, the connections.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::watch;

use crate::policy::reload::InForce;
use crate::relay::Connections;
use crate::settings::Settings;
use crate::state::State;
use crate::telemetry::Telemetry;

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
    /// The connections to upstreams.
    pub connections: Connections,
    /// Turns true when connections of clients are to be closed after their answer.
    pub connections_closing: watch::Receiver<bool>,
    close_connections: watch::Sender<bool>,
    started: AtomicBool,
}

impl House {
    /// A house without a policy, which is not ready for requests.
    pub fn new(settings: Settings) -> Self {
        let (close_connections, connections_closing) = watch::channel(false);
        Self {
            state: Arc::new(State::new(settings.bodies_bytes())),
            telemetry: Arc::new(Telemetry::new()),
            connections: Connections::new(settings.ca_file.as_deref(), settings.kept_connections),
            policy: InForce::default(),
            connections_closing,
            close_connections,
            started: AtomicBool::new(false),
            settings,
        }
    }

    /// Whether new requests are welcome: a policy is in force, the upstreams' names have been looked up, and the
    /// process is not going down.
    pub fn ready(&self) -> bool {
        self.started.load(Ordering::Relaxed) && !self.draining()
    }

    /// The process has what it needs.
    pub fn set_started(&self) {
        self.started.store(true, Ordering::Relaxed);
    }

    /// Whether the process is going down.
    pub fn draining(&self) -> bool {
        *self.connections_closing.borrow()
    }

    /// The process is going down: readiness fails, and connections close after their answer.
    pub fn drain(&self) {
        self.close_connections.send_replace(true);
    }
}
