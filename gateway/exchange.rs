//! One request's owned state, from its head to its end. It settles itself, whatever way it ends.

use std::sync::Arc;
use std::time::Instant;

use uuid::Uuid;

use crate::house::House;
use crate::policy::Policy;
use crate::refusal::Code;
use crate::surface::{Surface, UNKNOWN};
use crate::telemetry::{InFlight, Outcome, Telemetry, Times};

/// One request.
#[derive(Debug)]
pub struct Exchange {
    /// Its id: the client's own if that is sane, else ours (UUIDv7).
    pub id: String,
    /// The policy that decides everything about it.
    pub policy: Arc<Policy>,
    /// Its endpoint.
    pub surface: &'static Surface,
    /// When its stages began.
    pub times: Times,
    /// Attempts so far.
    pub attempts: u32,
    outcome: Outcome,
    telemetry: Arc<Telemetry>,
    _in_flight: InFlight,
}

impl Exchange {
    /// A request whose head has been read.
    pub fn begin(house: &House, client_id: Option<&str>) -> Self {
        let now = Instant::now();
        Self {
            id: client_id.map_or_else(|| Uuid::now_v7().to_string(), str::to_owned),
            policy: house.policy.get(),
            surface: &UNKNOWN,
            times: Times { received: now, body: now, admitted: now, queued: now, answered: now },
            attempts: 0,
            outcome: Outcome::Aborted,
            telemetry: house.telemetry.clone(),
            _in_flight: InFlight::enter(&house.telemetry),
        }
    }

    /// The first piece of the answer is about to leave.
    pub fn answering(&mut self, head_at: Instant) {
        self.times.answered = head_at;
        self.telemetry.first_token(self.surface, self.times.received.elapsed());
    }

    /// Everything that the gateway does itself before it asks an upstream has been done.
    pub fn admitted(&mut self) {
        self.times.admitted = Instant::now();
        self.telemetry.self_time.observe((self.times.admitted - self.times.body).as_secs_f64());
    }

    /// We said no.
    pub fn refused(&mut self, code: Code) {
        self.telemetry.refused(code);
        self.outcome = match code {
            Code::ConnectFailed | Code::UpstreamClosed | Code::UpstreamInvalid => Outcome::UpstreamError,
            Code::ConnectTimeout
            | Code::FirstTokenTimeout
            | Code::AnswerTimeout
            | Code::BetweenTokensTimeout
            | Code::TotalTimeout => Outcome::Timeout,
            _ => Outcome::Refused,
        };
    }

    /// The answer was given to its end.
    pub fn completed(&mut self) {
        self.outcome = Outcome::Ok;
    }

    /// The client left.
    pub fn client_closed(&mut self) {
        self.outcome = Outcome::ClientClosed;
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        let took = self.times.received.elapsed();
        self.telemetry.ended(self.surface, self.outcome, took);
        tracing::debug!(
            id = %self.id,
            surface = self.surface.path,
            outcome = self.outcome.name(),
            attempts = self.attempts,
            policy = %self.policy.hash,
            took_ms = took.as_millis() as u64,
            "request ended"
        );
    }
}
