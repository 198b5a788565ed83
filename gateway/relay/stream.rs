//! The way of an answer: pieces in, pieces out, as they came and when they came.

use std::future::pending;
use std::pin::{Pin, pin};
use std::sync::LazyLock;
use std::time::{Duration, Instant, SystemTime};

use bytes::{Bytes, BytesMut};
use futures_now::now;
use infergate_plugins::operation::Operation;
use memchr::memmem::Finder;
use tokio::time::sleep_until;

use super::attempt::{AnswerBody, Rest};
use super::connection::{Connections, Target};
use super::hide::Hide;
use super::waiting::{HEARTBEAT, Interrupted, Waiting};
use super::{AnswerHead, Downstream, Gone};
use crate::audit::capture::Capture;
use crate::ending;
use crate::guard::{Blocked, Guard};
use crate::limits::{self, Reservation};
use crate::money::Cached;
use crate::refusal::Code;
use crate::tokens::{Encoding, Said};
use crate::usage::{Meter, Source, Usage};

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
    /// Nothing more may be used. The client still waits for an ending.
    Spent,
    /// What comes next does not pass. The client still waits for an ending.
    Blocked(Blocked),
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
    /// Whether the event that tells a stream's end leaves only with the end. False where there are no events.
    pub holds_end: bool,
}

/// What has gone to a client of an answer, and what it told of itself.
#[derive(Debug, Default)]
pub struct Tally {
    /// Bytes of its body.
    pub bytes: u64,
    /// Its text, where that is to be kept.
    pub capture: Option<Box<Capture>>,
    /// What its text has to pass.
    pub guard: Option<Box<Guard>>,
    /// What it may use of its limits.
    pub reservation: Option<Box<Reservation>>,
    meter: Option<Meter>,
    said: Option<Box<Said>>,
    hide: Hide,
    line: Option<Box<Line>>,
    edge: Option<Box<Edge>>,
    /// Whether guardrails read it.
    judged: bool,
    /// Whether it was read as a whole before it passes.
    is_read: bool,
    /// Of what the client gets: whether the last piece began with an event, and whether it ended with one.
    boundary: (bool, bool),
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
    /// How its tokens are counted, should it not tell them.
    pub counts: Option<Encoding>,
}

impl Tally {
    /// An answer to `operation` begins.
    pub fn begin(&mut self, operation: Operation, reading: Reading) {
        self.line = self.line.take().filter(|_| reading.events);
        (self.boundary, self.is_read) = ((true, true), false);
        self.judged = self.guard.as_ref().is_some_and(|guard| guard.is_reading());
        self.edge = (reading.events && (self.line.is_some() || self.guard.is_some())).then(Box::default);
        let meter = Meter::new(operation, reading.events);
        self.meter = Some(if reading.service_tier { meter.with_service_tier() } else { meter });
        self.said = reading.counts.map(|encoding| Box::new(Said::begin(operation, reading.events, encoding)));
        self.hide = if reading.hides_usage && reading.events { Hide::Usage } else { Hide::Nothing };
    }

    /// What was read of an answer that nobody gets says nothing of the next one.
    pub fn forget(&mut self) {
        (self.meter, self.said) = (None, None);
    }

    /// Reads an answer that nobody gets, for what it used.
    pub fn meter(&mut self, body: &[u8]) {
        self.read(body);
    }

    /// Reads a whole answer before it passes: then it is not read a second time.
    pub fn read_ahead(&mut self, body: &[u8]) {
        self.read(body);
        self.is_read = true;
    }

    /// The tokens that it used: as far as it told, and else as its text has them; to its end, or to where it broke off.
    pub fn usage(&self, ended: bool) -> Usage {
        let Some(meter) = &self.meter else { return Usage::default() };
        let told = if ended { meter.usage() } else { meter.usage_of_a_part() };
        let Some(said) = self.said.as_ref().filter(|_| told.source != Source::Upstream) else { return told };
        let Some(counted) = said.tokens() else { return told };
        let source = if ended { Source::Estimated } else { Source::Partial };
        Usage { output_tokens: meter.told_output().max(Some(counted)), source, ..told }
    }

    /// An answer may use what has been reserved. Where that is to hold while it comes, its tokens are counted.
    /// `beside` events of it have no token.
    pub fn reserve(&mut self, mut reservation: Box<Reservation>, cached: Cached, beside: u64) {
        if let Some(before) = self.reservation.take() {
            reservation.absorb(*before);
        }
        self.line = reservation.stops().then(|| Box::new(Line::new(reservation.output, cached, beside)));
        self.reservation = Some(reservation);
    }

    /// What the end of a stream must know of its beginning: its first events, and the last ones that have passed.
    pub fn begun(&self) -> (&[u8], &[u8]) {
        self.edge.as_ref().map_or((&[], &[]), |edge| (&edge.opening, &edge.last))
    }

    /// Whether the last piece that the client gets begins with an event.
    pub fn last_is_whole(&self) -> bool {
        self.boundary.0
    }

    /// Reads the first piece; returns what of it the client gets, and whether the answer may go on.
    fn first(&mut self, piece: Bytes) -> (Bytes, Result<(), Stop>) {
        if self.edge.is_some() {
            let mut pieces = BytesMut::from(piece);
            let goes_on = self.next(&mut pieces);
            return (pieces.freeze(), goes_on);
        }
        self.read(&piece);
        let piece = self.hide.out_of_first(piece);
        self.count(&piece);
        (piece, Ok(()))
    }

    /// Reads more of the answer and leaves in it what the client gets. Returns whether the answer may go on.
    fn next(&mut self, pieces: &mut BytesMut) -> Result<(), Stop> {
        let goes_on = self.read_paid(pieces);
        if self.hide != Hide::Nothing {
            self.hide.out_of(pieces);
        }
        let Some(edge) = &mut self.edge else {
            self.count(pieces);
            return goes_on;
        };
        edge.began(pieces);
        let mut seen = |text: &[u8]| redacted(&mut self.capture, text);
        let passes = self.guard.as_mut().map_or(Ok(()), |guard| guard.events(pieces, &mut seen));
        edge.passed(pieces);
        self.count(pieces);
        passes.map_err(Stop::Blocked).and(goes_on)
    }

    /// What the guardrails held back of a stream that is at its end.
    fn rest(&mut self) -> (Bytes, Result<(), Stop>) {
        let (Some(guard), Some(edge)) = (&mut self.guard, &mut self.edge) else { return (Bytes::new(), Ok(())) };
        let (pieces, passes) = guard.rest(&mut |text| redacted(&mut self.capture, text));
        edge.passed(&pieces);
        self.count(&pieces);
        (pieces.freeze(), passes.map_err(Stop::Blocked))
    }

    /// Reads as much as is paid for, and leaves no more.
    fn read_paid(&mut self, pieces: &mut BytesMut) -> Result<(), Stop> {
        let Some(mut line) = self.line.take() else {
            self.read(pieces);
            return Ok(());
        };
        let passes = self.read_to(&mut line, pieces);
        self.line = Some(line);
        let goes_on = if passes == pieces.len() { Ok(()) } else { Err(Stop::Spent) };
        pieces.truncate(passes);
        goes_on
    }

    /// Reads whole events as long as their tokens are paid for; returns how far that is.
    fn read_to(&mut self, line: &mut Line, pieces: &[u8]) -> usize {
        let counted = self.meter.as_ref().map_or(0, Meter::counted);
        if counted + pieces.len() as u64 / EVENT_MIN < line.output + line.beside {
            self.read(pieces);
            return pieces.len();
        }
        let mut from = 0;
        for end in ending::ends(pieces).chain([pieces.len()]).filter(|end| *end > 0) {
            if end > from && !self.reads_paid(line, &pieces[from..end]) {
                return from;
            }
            from = end;
        }
        pieces.len()
    }

    /// Reads one event, if its token is paid for or can be. A look ahead tells, so that what does not pass is not
    /// counted either.
    fn reads_paid(&mut self, line: &mut Line, event: &[u8]) -> bool {
        let Some(meter) = &self.meter else { return true };
        let mut ahead = meter.clone();
        ahead.push(event);
        let counted = ahead.counted();
        let paid = counted <= line.output + line.beside || line.extend(self.reservation.as_deref_mut(), counted);
        if paid {
            self.meter = Some(ahead);
            self.keep(event);
        }
        paid
    }

    fn read(&mut self, piece: &[u8]) {
        if self.is_read {
            return;
        }
        if let Some(meter) = &mut self.meter {
            meter.push(piece);
        }
        self.keep(piece);
    }

    fn keep(&mut self, piece: &[u8]) {
        if let Some(said) = &mut self.said {
            said.push(piece);
        }
    }

    fn count(&mut self, piece: &[u8]) {
        self.bytes += piece.len() as u64;
        if !piece.is_empty() {
            let ends = [&b"\n\n"[..], b"\n\r\n", b"\r\r"].iter().any(|end| piece.ends_with(end));
            self.boundary = (self.boundary.1, ends);
        }
        // What rules have left of it is captured where they leave it.
        if let Some(capture) = self.capture.as_mut().filter(|capture| !(self.judged && capture.is_redacted())) {
            capture.answer(piece);
        }
    }
}

/// Captures what the rules left, where no more may be kept.
pub fn redacted(capture: &mut Option<Box<Capture>>, text: &[u8]) {
    if let Some(capture) = capture.as_mut().filter(|capture| capture.is_redacted()) {
        capture.answer(text);
    }
}

/// The least that an event with a token has: `data: {}` and two line ends.
const EVENT_MIN: u64 = 10;

/// How far a stream may go.
#[derive(Debug)]
struct Line {
    /// Tokens that are paid for.
    output: u64,
    /// Events without a token that are counted with them.
    beside: u64,
    cached: Cached,
}

/// What the early end of a stream must know of it.
#[derive(Debug, Default)]
struct Edge {
    /// The first events.
    opening: Bytes,
    /// The last events that passed.
    last: Bytes,
}

impl Edge {
    /// The most of events that is kept.
    const KEPT: usize = 64 << 10;

    fn began(&mut self, pieces: &[u8]) {
        if self.opening.is_empty() && pieces.len() <= Self::KEPT {
            self.opening = Bytes::copy_from_slice(pieces);
        }
    }

    fn passed(&mut self, pieces: &[u8]) {
        // A sign of life says nothing of what is open.
        let is_sign = pieces.starts_with(b":") || pieces.starts_with(b"event: ping");
        let is_alone = || ending::ends(pieces).nth(1).is_none();
        if !pieces.is_empty() && pieces.len() <= Self::KEPT && !(is_sign && is_alone()) {
            self.last = Bytes::copy_from_slice(pieces);
        }
    }
}

impl Line {
    fn new(output: u64, cached: Cached, beside: u64) -> Self {
        Self { output, beside, cached }
    }

    /// Takes more of the limits. Returns whether there was enough left.
    fn extend(&mut self, reservation: Option<&mut Reservation>, counted: u64) -> bool {
        let Some(reservation) = reservation else { return true };
        let extended =
            reservation.extend(counted.saturating_sub(self.beside), self.cached, limits::millis(SystemTime::now()));
        self.output = reservation.output.max(self.output);
        extended
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
    let (first, goes_on) = tally.first(first);
    hold_end(downstream, &pace, &first);
    // A client may have left before the first piece came.
    let written = if downstream.is_mute() { Err(Gone) } else { begin(downstream, head, is_bare, first).await };
    let passed = match written {
        Ok(()) => match goes_on {
            Ok(()) => pieces(downstream, tally, &mut body, &pace, cut).await,
            stopped => stopped,
        },
        Err(Gone) => Err(Stop::Gone),
    };
    let passed = flushed(downstream, tally, passed).await;
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
        Err(Stop::Spent | Stop::Blocked(_)) if downstream.is_mute() => Passed::Gone,
        Err(Stop::Spent) => Passed::Spent,
        Err(Stop::Blocked(blocked)) => Passed::Blocked(blocked),
        Ok(()) if downstream.is_mute() => Passed::Gone,
        Ok(()) => Passed::Whole,
    };
    body.release(connections, target).await;
    passed
}

/// What guardrails held back leaves, or not, before the end, whatever the end is.
async fn flushed(downstream: &mut Downstream, tally: &mut Tally, passed: Result<(), Stop>) -> Result<(), Stop> {
    if matches!(passed, Err(Stop::Gone | Stop::Blocked(_))) {
        return passed;
    }
    let (rest, passes) = tally.rest();
    if !rest.is_empty() {
        downstream.write(rest).await?;
    }
    passes.and(passed)
}

/// Why an answer is not here as a whole.
#[derive(Debug)]
pub enum WholeFault {
    /// Nobody waits for it any more.
    Interrupted(Interrupted),
    /// The upstream broke off.
    Broken(Code, String),
    /// It is longer than may be held.
    TooLong,
}

impl Rest {
    /// Reads it to its end, `most` bytes of it, and keeps what has come, whatever comes of the rest. Between two pieces
    /// it waits no longer than `between`.
    pub async fn read_whole(
        &mut self,
        waiting: &mut Waiting<'_>,
        between: Duration,
        most: usize,
    ) -> Result<(), WholeFault> {
        let mut read = BytesMut::from(&*self.first);
        let ended = loop {
            if read.len() > most {
                break Err(WholeFault::TooLong);
            }
            if self.body.ended {
                break Ok(());
            }
            match waiting.until(Instant::now() + between, self.body.next(&mut read)).await {
                Ok(Ok(())) => {}
                Ok(Err(why)) => break Err(WholeFault::Broken(Code::UpstreamClosed, why)),
                Err(Interrupted::Limit) => break Err(late()),
                Err(interrupted) => break Err(WholeFault::Interrupted(interrupted)),
            }
        };
        self.first = read.freeze();
        ended
    }
}

fn late() -> WholeFault {
    WholeFault::Broken(Code::BetweenTokensTimeout, "the next piece of the answer did not come in time".to_owned())
}

/// Holds back the piece in which a stream tells its client that it is complete, if the end has to wait.
fn hold_end(downstream: &mut Downstream, pace: &Pace, piece: &[u8]) {
    if pace.holds_end && ENDS.iter().any(|end| end.find(piece).is_some()) {
        downstream.hold_last(true);
    }
}

/// What tells a client that its stream is complete.
static ENDS: LazyLock<[Finder<'static>; 4]> =
    LazyLock::new(|| ["[DONE]", "message_stop", "response.completed", "response.incomplete"].map(Finder::new));

/// Why pieces stopped coming or going.
enum Stop {
    Gone,
    Broken(Code, String),
    Spent,
    Blocked(Blocked),
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
                    let goes_on = tally.next(&mut out);
                    if !out.is_empty() {
                        hold_end(downstream, pace, &out);
                        downstream.write(out.split().freeze()).await?;
                        clock.said();
                    }
                    goes_on?;
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
