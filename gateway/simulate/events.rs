//! A body sent piece by piece: the events of a stream at the engine's pace, or any body with trouble on its way.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use tokio::time::{Instant, Sleep};

use super::encoding::Gzip;
use super::engine::{Engine, Finish, Slot, Work};
use super::fault::{Ending, Trouble};
use super::visit::Visit;

/// What the events of a stream are.
pub(super) trait Source: Send {
    /// Appends what is sent before the engine takes the request up, if anything.
    fn opening(&mut self, _out: &mut Vec<u8>) {}

    /// The engine took the request up; so many of its prompt's tokens were in the prefix cache, so many now are.
    fn start(&mut self, _cached: u64, _created: u64) {}

    /// Appends the next event.
    fn next(&mut self, out: &mut Vec<u8>) -> Step;

    /// Appends the event that tells of an error in the engine.
    fn error(&mut self, out: &mut Vec<u8>);

    /// Why the engine ended.
    fn finish(&self) -> Finish;
}

/// What an event was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Part of the envelope: sent along with what comes before.
    Event,
    /// A token; one without any text may have no event. All choices advance together: only the first one's token waits for the engine.
    Token { waits: bool },
    /// There is no next event.
    Done,
}

/// The body.
pub(super) struct Events {
    source: Option<Box<dyn Source>>,
    stage: Stage,
    moves: VecDeque<Move>,
    asleep: Option<Pin<Box<Sleep>>>,
    scratch: Vec<u8>,
    trouble: Trouble,
    shaped: bool,
    gzip: Option<Gzip>,
    sent: u32,
    next_token: Option<Instant>,
    first_token: Duration,
    interval: Duration,
    pieces: u32,
    faulted: bool,
    /// A fault ended the stream: nothing more is planned.
    ended: bool,
    stalled: bool,
}

enum Stage {
    Queued(Pin<Box<dyn Future<Output = Slot> + Send>>),
    Running(Slot),
    Sent,
}

/// What is done with the connection, in order.
enum Move {
    Send(Bytes),
    Wait(Duration),
    WaitUntil(Instant),
    Token,
    Cut,
    Stall,
    /// The stream ends here, and not as it should.
    Fail,
}

impl Events {
    /// The events of `source`, once the engine has a slot for `work`.
    pub(super) fn new(engine: &Arc<Engine>, source: Box<dyn Source>, work: Work, trouble: Trouble) -> Self {
        let mut events = Self::empty(trouble);
        events.source = Some(source);
        events.first_token = engine.first_token() + events.trouble.slow_first_token.unwrap_or_default();
        events.interval = engine.interval();
        events.moves.reserve(2);
        if events.trouble.gzip {
            events.gzip = Some(Gzip::default());
        }
        let mut opening = Vec::new();
        if let Some(source) = &mut events.source {
            source.opening(&mut opening);
        }
        events.open(&opening);
        events.stage = Stage::Queued(Box::pin(Arc::clone(engine).enter(work)));
        events
    }

    /// A body that is known in full, with trouble on its way.
    pub(super) fn whole(body: &Bytes, trouble: Trouble) -> Self {
        let mut events = Self::empty(trouble);
        let ending = events.trouble.ending.filter(|(ending, _)| *ending != Ending::Error);
        let sent = if ending.is_some() { body.len() / 2 } else { body.len() };
        events.pieces(&body[..sent]);
        match ending {
            Some((Ending::Stall, _)) => events.moves.push_back(Move::Stall),
            Some(_) => events.moves.push_back(Move::Cut),
            None => {}
        }
        events
    }

    fn empty(trouble: Trouble) -> Self {
        let shaped = trouble.ending.is_some()
            || trouble.drip.is_some()
            || trouble.delay_between.is_some()
            || trouble.half_utf8
            || trouble.gzip
            || trouble.crlf
            || trouble.no_done;
        Self {
            source: None,
            stage: Stage::Sent,
            moves: VecDeque::new(),
            asleep: None,
            scratch: Vec::with_capacity(512),
            trouble,
            shaped,
            gzip: None,
            sent: 0,
            next_token: None,
            first_token: Duration::ZERO,
            interval: Duration::ZERO,
            pieces: 0,
            faulted: false,
            ended: false,
            stalled: false,
        }
    }

    /// The next piece of the body.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>, mut visit: Option<&mut Visit>) -> Poll<Option<Bytes>> {
        loop {
            if self.stalled {
                return Poll::Pending;
            }
            if let Some(sleep) = &mut self.asleep {
                ready!(sleep.as_mut().poll(cx));
                self.asleep = None;
            }
            if let Some(next) = self.moves.pop_front() {
                let Move::Send(piece) = next else {
                    self.make(next, visit.as_deref_mut());
                    continue;
                };
                if self.is_last_piece() {
                    self.settle(visit);
                }
                return Poll::Ready(Some(piece));
            }
            match &mut self.stage {
                Stage::Sent => {
                    self.settle(visit);
                    return Poll::Ready(None);
                }
                Stage::Queued(entering) => {
                    let slot = ready!(entering.as_mut().poll(cx));
                    self.begin(slot);
                }
                Stage::Running(_) => {
                    if let Some(event) = self.advance() {
                        return Poll::Ready(Some(event));
                    }
                }
            }
        }
    }

    /// Whether nothing follows in a body of a known length: its end is not asked for again.
    fn is_last_piece(&self) -> bool {
        let rest = self.moves.front();
        self.source.is_none() && self.moves.len() <= 1 && rest.is_none_or(|next| matches!(next, Move::Wait(_)))
    }

    fn settle(&self, visit: Option<&mut Visit>) {
        let Some(visit) = visit else { return };
        match self.faulted {
            true => visit.faulted(),
            false => visit.completed(),
        }
        // The peer is not told; what was written is sent first.
        if self.trouble.close_after {
            visit.line().cut();
        }
    }

    fn make(&mut self, next: Move, visit: Option<&mut Visit>) {
        match next {
            Move::Send(_) => {}
            Move::Wait(time) => self.asleep = Some(Box::pin(tokio::time::sleep(time))),
            Move::WaitUntil(when) => self.asleep = Some(Box::pin(tokio::time::sleep_until(when))),
            Move::Token => self.count(),
            Move::Stall => self.stalled = true,
            Move::Fail => {
                self.end(Finish::Error);
                self.faulted = true;
            }
            Move::Cut => {
                self.end(Finish::Error);
                self.stalled = true;
                if let Some(visit) = visit {
                    visit.faulted();
                    visit.line().cut();
                }
            }
        }
    }

    fn begin(&mut self, slot: Slot) {
        if let Some(source) = &mut self.source {
            source.start(slot.cached, slot.created);
        }
        self.stage = Stage::Running(slot);
        if !self.first_token.is_zero() {
            self.moves.push_back(Move::Wait(self.first_token));
        }
    }

    fn count(&mut self) {
        if let Stage::Running(slot) = &mut self.stage {
            slot.tokens(1);
        }
    }

    fn end(&mut self, why: Finish) {
        if let Stage::Running(slot) = std::mem::replace(&mut self.stage, Stage::Sent) {
            slot.finish(why);
        }
    }

    /// Asks the source for an event: returns it if nothing stands in its way, else plans the moves.
    fn advance(&mut self) -> Option<Bytes> {
        let source = self.source.as_mut()?;
        self.scratch.clear();
        let step = source.next(&mut self.scratch);
        if step == Step::Done {
            let why = source.finish();
            self.end(why);
            self.close();
            return None;
        }
        let token = matches!(step, Step::Token { .. });
        if self.scratch.is_empty() {
            self.count();
            return None;
        }
        let waits = step == Step::Token { waits: true } && !self.interval.is_zero() && self.wait_for_token();
        if !self.shaped && !waits {
            if token {
                self.count();
            }
            return Some(Bytes::copy_from_slice(&self.scratch));
        }
        if token {
            self.moves.push_back(Move::Token);
        }
        let event = std::mem::take(&mut self.scratch);
        self.event(&event);
        self.scratch = event;
        None
    }

    /// Plans the wait that the engine's pace asks for; the first token has none.
    fn wait_for_token(&mut self) -> bool {
        let due = self.next_token;
        let base = due.unwrap_or_else(Instant::now);
        self.next_token = Some(base + self.interval);
        if let Some(due) = due {
            self.moves.push_back(Move::WaitUntil(due));
        }
        due.is_some()
    }

    fn open(&mut self, opening: &[u8]) {
        for event in split_events(opening) {
            self.event(event);
        }
    }

    /// Plans an event with whatever is to go wrong around it.
    fn event(&mut self, event: &[u8]) {
        if self.ended {
            return;
        }
        if let Some((ending, after)) = self.trouble.ending
            && self.sent >= after
        {
            self.ended = true;
            return self.fail(ending);
        }
        if self.trouble.no_done && is_end(event) {
            self.faulted = true;
            return;
        }
        if let (Some(wait), 1..) = (self.trouble.delay_between, self.sent) {
            self.moves.push_back(Move::Wait(wait));
        }
        self.sent += 1;
        self.dress(event);
    }

    fn dress(&mut self, event: &[u8]) {
        let dressed = match self.trouble.crlf {
            true => crlf(event),
            false => event.to_vec(),
        };
        match &mut self.gzip {
            Some(gzip) => {
                let packed = gzip.block(&dressed);
                self.pieces(&packed);
            }
            None => self.pieces(&dressed),
        }
    }

    /// Plans how bytes are cut into pieces.
    fn pieces(&mut self, bytes: &[u8]) {
        let mut rest = bytes;
        if self.trouble.half_utf8 {
            while let Some(at) = half_character(rest) {
                self.moves.push_back(Move::Send(Bytes::copy_from_slice(&rest[..at])));
                self.moves.push_back(Move::Wait(self.trouble.drip.unwrap_or(Duration::from_millis(1))));
                rest = &rest[at..];
            }
        } else if let Some(wait) = self.trouble.drip {
            while !rest.is_empty() {
                // Sizes from 1 to 7 in an order that meets every offset of an event sooner or later.
                self.pieces = self.pieces.wrapping_mul(29).wrapping_add(13);
                let (piece, left) = rest.split_at(rest.len().min(1 + (self.pieces >> 3) as usize % 7));
                self.moves.push_back(Move::Send(Bytes::copy_from_slice(piece)));
                self.moves.push_back(Move::Wait(wait));
                rest = left;
            }
        }
        if !rest.is_empty() {
            self.moves.push_back(Move::Send(Bytes::copy_from_slice(rest)));
        }
    }

    fn fail(&mut self, ending: Ending) {
        match ending {
            Ending::Stall => self.moves.push_back(Move::Stall),
            Ending::Cut => self.moves.push_back(Move::Cut),
            Ending::Error => {
                let mut error = Vec::new();
                if let Some(source) = &mut self.source {
                    source.error(&mut error);
                }
                for event in split_events(&error) {
                    self.dress(event);
                }
                self.close();
                self.moves.push_back(Move::Fail);
            }
        }
    }

    /// What an encoding writes at the very end.
    fn close(&mut self) {
        if let Some(gzip) = self.gzip.take() {
            let tail = gzip.end();
            self.pieces(&tail);
        }
    }
}

/// The events in `bytes`, each with the empty line that ends it.
fn split_events(bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let end = memchr::memmem::find(rest, b"\n\n").map_or(rest.len(), |at| at + 2);
        let (event, left) = rest.split_at(end);
        rest = left;
        (!event.is_empty()).then_some(event)
    })
}

/// Whether this is the event that says that the stream is complete.
fn is_end(event: &[u8]) -> bool {
    let ends: [&[u8]; 4] =
        [b"data: [DONE]", b"event: message_stop", b"event: response.completed", b"event: response.incomplete"];
    ends.iter().any(|end| event.starts_with(end))
}

fn crlf(event: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(event.len() + 8);
    for byte in event {
        if *byte == b'\n' {
            out.push(b'\r');
        }
        out.push(*byte);
    }
    out
}

/// Where the first character of more than one byte is cut in two.
fn half_character(bytes: &[u8]) -> Option<usize> {
    let at = bytes.iter().skip(1).position(|byte| *byte & 0xc0 == 0x80)? + 1;
    // After the cut, the rest of the same character must not be cut again.
    let starts = bytes[at - 1] & 0xc0 == 0xc0;
    if starts { Some(at) } else { next_half(bytes, at) }
}

fn next_half(bytes: &[u8], from: usize) -> Option<usize> {
    let lead = bytes[from..].iter().position(|byte| *byte & 0xc0 == 0xc0)? + from;
    (lead + 1 < bytes.len()).then_some(lead + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_half_character_is_found_and_its_rest_is_not_cut_again() {
        let text = "a😀b世".as_bytes();
        assert_eq!(half_character(text), Some(2));
        assert_eq!(half_character(&text[2..]), Some(5));
        assert_eq!(half_character(&text[7..]), None);
        assert_eq!(half_character(b"plain"), None);
    }

    #[test]
    fn events_are_found_by_their_empty_lines() {
        let events: Vec<_> = split_events(b"data: 1\n\nevent: x\ndata: 2\n\n").collect();
        assert_eq!(events, [b"data: 1\n\n".as_slice(), b"event: x\ndata: 2\n\n"]);
    }
}
