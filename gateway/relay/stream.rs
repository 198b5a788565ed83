//! The way of an answer: pieces in, pieces out, as they came and when they came.

use std::future::pending;
use std::pin::{Pin, pin};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use futures_now::now;
use infergate_plugins::operation::Operation;
use tokio::time::sleep_until;

use super::attempt::{AnswerBody, Rest};
use super::connection::{Connections, Target};
use super::hide::Hide;
use super::waiting::HEARTBEAT;
use super::{AnswerHead, Downstream, Gone};
use crate::audit::capture::Capture;
use crate::refusal::Code;
use crate::usage::{Meter, Usage};

/// The most that leaves in one write when several pieces have come already.
const GATHER_MAX: usize = 64 << 10;

/// How an answer ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Passed {
    /// Complete, but for its end.
    Whole,
    /// The client left.
    Gone,
    /// The upstream broke off: why. The client still waits for an ending.
    Broken(Code, String),
}

/// What holds while an answer is passed on.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// Between two pieces.
    pub between: Duration,
    /// When the whole request must be over.
    pub total: Instant,
    /// How often a silent event stream's client gets a sign of life.
    pub heartbeat: Option<Duration>,
    /// How long an answer is read on without its client; `None`: not at all.
    pub drain: Option<Duration>,
    /// Whether the event that tells a stream's end leaves only with the end.
    pub holds_end: bool,
}

/// What has gone to a client of an answer, and what it told of itself.
#[derive(Debug, Default)]
pub struct Tally {
    /// Bytes of its body.
    pub bytes: u64,
    /// Its text, where that is to be kept.
    pub capture: Option<Box<Capture>>,
    meter: Option<Meter>,
    hide: Hide,
}

/// What is to be made of an answer besides passing it on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reading {
    /// Whether it is a stream of events.
    pub events: bool,
    /// Whether it tells its usage only because the gateway asked.
    pub hides_usage: bool,
    /// Whether its class of service is looked for.
    pub service_tier: bool,
}

impl Tally {
    /// An answer to `operation` begins.
    pub fn begin(&mut self, operation: Operation, reading: Reading) {
        let meter = Meter::new(operation, reading.events);
        self.meter = Some(if reading.service_tier { meter.with_service_tier() } else { meter });
        self.hide = if reading.hides_usage && reading.events { Hide::Usage } else { Hide::Nothing };
    }

    /// The tokens that it used, as far as it told: to its end, or to where it broke off.
    pub fn usage(&self, ended: bool) -> Usage {
        let usage = if ended { Meter::usage } else { Meter::usage_of_a_part };
        self.meter.as_ref().map(usage).unwrap_or_default()
    }

    /// Reads the first piece; returns what of it the client gets.
    fn first(&mut self, piece: Bytes) -> Bytes {
        self.read(&piece);
        let piece = self.hide.out_of_first(piece);
        self.count(&piece);
        piece
    }

    /// Reads more of the answer and leaves in it what the client gets.
    fn next(&mut self, pieces: &mut BytesMut) {
        self.read(pieces);
        if self.hide != Hide::Nothing {
            self.hide.out_of(pieces);
        }
        self.count(pieces);
    }

    fn read(&mut self, piece: &[u8]) {
        if let Some(meter) = &mut self.meter {
            meter.push(piece);
        }
    }

    fn count(&mut self, piece: &[u8]) {
        self.bytes += piece.len() as u64;
        if let Some(capture) = &mut self.capture {
            capture.answer(piece);
        }
    }
}

/// Passes an answer on, all but its end: that is the caller's. The head is what the client gets for one; `None` if it
/// has one already. When `cut` resolves, it ends as if it had broken.
pub async fn pass_on(
    downstream: &mut Downstream,
    tally: &mut Tally,
    connections: &Connections,
    target: &Target,
    (head, answer): (Option<Box<AnswerHead>>, Rest),
    pace: Pace,
    cut: Pin<&mut impl Future<Output = ()>>,
) -> Passed {
    let Rest { first, mut body, .. } = answer;
    // Nothing follows: the head is the whole answer.
    let is_bare = first.is_empty();
    let first = tally.first(first);
    hold_end(downstream, &pace, &first);
    // A client may have left before the first piece came.
    let written = if downstream.is_mute() { Err(Gone) } else { begin(downstream, head, is_bare, first).await };
    let passed = match written {
        Ok(()) => pieces(downstream, tally, &mut body, &pace, cut).await,
        Err(Gone) => Err(Stop::Gone),
    };
    let passed = match passed {
        Err(Stop::Gone) => {
            if let Some(longest) = pace.drain {
                drain(downstream, tally, &mut body, pace, longest).await;
            }
            Passed::Gone
        }
        Err(Stop::Broken(code, why)) => {
            if !body.at_boundary() {
                // A piece of a long event has left: what follows must not become part of it.
                let _ = downstream.write(Bytes::from_static(b"\n\n")).await;
            }
            Passed::Broken(code, why)
        }
        Ok(()) if downstream.is_mute() => Passed::Gone,
        Ok(()) => Passed::Whole,
    };
    body.release(connections, target).await;
    passed
}

/// Holds back the piece in which a stream tells its client that it is complete, if the end has to wait.
fn hold_end(downstream: &mut Downstream, pace: &Pace, piece: &[u8]) {
    const ENDS: [&[u8]; 4] = [b"[DONE]", b"message_stop", b"response.completed", b"response.incomplete"];
    if pace.holds_end && ENDS.iter().any(|end| memchr::memmem::find(piece, end).is_some()) {
        downstream.hold_last(true);
    }
}

/// Why pieces stopped coming or going.
enum Stop {
    Gone,
    Broken(Code, String),
}

impl From<Gone> for Stop {
    fn from(_: Gone) -> Self {
        Self::Gone
    }
}

async fn begin(
    downstream: &mut Downstream,
    head: Option<Box<AnswerHead>>,
    is_bare: bool,
    first: Bytes,
) -> Result<(), Gone> {
    match head {
        Some(head) if is_bare => downstream.hold_head(head),
        Some(head) => downstream.write_head(head).await?,
        None => {}
    }
    downstream.write(first).await
}

/// Every piece until the end. One timer serves the whole answer: it is set anew only when it has gone off.
async fn pieces(
    downstream: &mut Downstream,
    tally: &mut Tally,
    body: &mut AnswerBody,
    pace: &Pace,
    mut cut: Pin<&mut impl Future<Output = ()>>,
) -> Result<(), Stop> {
    let mut clock = Clock::new(Instant::now());
    let alarm = sleep_until(clock.alarm(pace).into());
    tokio::pin!(alarm);
    let mut out = BytesMut::new();
    while !body.ended {
        tokio::select! {
            biased;
            // First: where both sides are always ready, nothing behind the next piece would ever be looked at.
            () = cut.as_mut() => return Err(Stop::Broken(Code::KeyRevoked, "the caller's key was revoked".to_owned())),
            read = body.next(&mut out) => {
                read.map_err(broken)?;
                clock.heard();
                gather(body, &mut out);
                if !out.is_empty() {
                    tally.next(&mut out);
                    hold_end(downstream, pace, &out);
                    downstream.write(out.split().freeze()).await?;
                    clock.said();
                }
            }
            gone = downstream.departed() => return Err(gone.into()),
            () = alarm.as_mut() => {
                rang(downstream, body, &mut clock, pace).await?;
                alarm.as_mut().reset(clock.alarm(pace).into());
            }
        }
    }
    Ok(())
}

/// Everything that is here already leaves in one write; nothing is waited for.
fn gather(body: &mut AnswerBody, out: &mut BytesMut) {
    while out.len() < GATHER_MAX && !body.ended {
        match now(body.next(out)) {
            Some(Ok(())) => {}
            Some(Err(fault)) => return body.keep_fault(fault),
            None => return,
        }
    }
}

fn broken(why: String) -> Stop {
    Stop::Broken(Code::UpstreamClosed, why)
}

/// The timer went off: the upstream is too slow, or the client needs a sign of life.
async fn rang(downstream: &mut Downstream, body: &AnswerBody, clock: &mut Clock, pace: &Pace) -> Result<(), Stop> {
    let now = Instant::now();
    if now >= pace.total {
        return Err(Stop::Broken(Code::TotalTimeout, "the whole request took too long".to_owned()));
    }
    if now >= clock.heard + pace.between {
        return Err(Stop::Broken(
            Code::BetweenTokensTimeout,
            "the next piece of the answer did not come in time".to_owned(),
        ));
    }
    let due = pace.heartbeat.is_some_and(|every| now >= clock.said + every);
    if due {
        clock.said = now;
        if body.framer.is_some() && body.at_boundary() {
            downstream.write(HEARTBEAT).await?;
        }
    }
    Ok(())
}

/// Reads an answer to its end without its client, so that the upstream finishes and tells what it used.
async fn drain(
    downstream: &mut Downstream,
    tally: &mut Tally,
    body: &mut AnswerBody,
    mut pace: Pace,
    longest: Duration,
) {
    downstream.mute();
    pace.total = pace.total.min(Instant::now() + longest);
    pace.heartbeat = None;
    // Whether it ends well or not: the client is gone.
    let _ = pieces(downstream, tally, body, &pace, pin!(pending())).await;
}

/// When the last pieces came and went.
struct Clock {
    heard: Instant,
    said: Instant,
}

impl Clock {
    fn new(now: Instant) -> Self {
        Self { heard: now, said: now }
    }

    fn heard(&mut self) {
        self.heard = Instant::now();
    }

    /// A piece left as soon as it came.
    fn said(&mut self) {
        self.said = self.heard;
    }

    fn alarm(&self, pace: &Pace) -> Instant {
        let sign = pace.heartbeat.map(|every| self.said + every);
        let slow = self.heard + pace.between;
        sign.unwrap_or(slow).min(slow).min(pace.total)
    }
}

mod futures_now {
    use std::future::Future;
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    /// The result of `work` if it has one already.
    pub(super) fn now<T>(work: impl Future<Output = T>) -> Option<T> {
        match pin!(work).poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(done) => Some(done),
            Poll::Pending => None,
        }
    }
}
