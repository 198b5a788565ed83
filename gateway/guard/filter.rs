//! A stream of events on its way through the rules, exact however its texts are cut: an event leaves when every text
//! in it may, as the very bytes that came unless something in them was edited.

use std::collections::VecDeque;
use std::ops::Range;

use bytes::{Bytes, BytesMut};
use infergate_plugins::guardrail::Place;
use infergate_plugins::guardrail::stream::Progress;
use infergate_plugins::operation::Operation;
use smallvec::SmallVec;

use super::channel::{Channel, Encoded};
use super::{Blocked, Guard, named};
use crate::ending::ends;
use crate::scan::{self, splice};
use crate::text::{self, Text, Tool};

/// The events of one stream that wait, and the texts that they are parts of.
#[derive(Debug)]
pub(super) struct Filter {
    operation: Operation,
    /// Reads what comes.
    events: text::Events,
    /// Whether it brings originals back instead of asking rules.
    restores: bool,
    channels: Vec<Open>,
    /// The tools that are called, by the numbers of their arguments.
    tools: Vec<(u64, String)>,
    waiting: VecDeque<Waiting>,
    waiting_bytes: usize,
    over: bool,
    /// More waits than may, and whoever must read everything is not asked any more: all of it leaves.
    blind: bool,
}

/// A text that has begun.
#[derive(Debug)]
struct Open {
    place: Place,
    number: u64,
    channel: Channel,
    ended: bool,
}

/// An event that has not left yet.
#[derive(Debug)]
struct Waiting {
    event: Bytes,
    parts: SmallVec<[Part; 2]>,
    edits: Vec<scan::Edit>,
}

/// A part of a text in an event.
#[derive(Debug)]
struct Part {
    open: usize,
    /// Where it begins in its text, encoded.
    from: u64,
    /// Where it stands in the event.
    span: Range<usize>,
}

/// The most that waits. What rules hold back is much less; beyond it nobody can say that everything is read.
const WAITING_MAX: usize = 4 << 20;

impl Filter {
    pub(super) fn of_rules(operation: Operation) -> Self {
        Self::new(operation, false)
    }

    pub(super) fn of_originals(operation: Operation) -> Self {
        Self::new(operation, true)
    }

    fn new(operation: Operation, restores: bool) -> Self {
        let (channels, waiting) = (Vec::new(), VecDeque::new());
        let (tools, events) = (Vec::new(), text::Events::default());
        Self { operation, restores, events, channels, tools, waiting, waiting_bytes: 0, over: false, blind: false }
    }

    /// Takes whole events and leaves in `events` what may leave.
    pub(super) fn take(&mut self, events: &mut BytesMut, guard: &mut Guard) -> Result<(), Blocked> {
        let came = events.split().freeze();
        let mut from = 0;
        for end in ends(&came).chain([came.len()]) {
            if end > from && !self.over {
                let event = came.slice(from..end);
                from = end;
                self.event(event, guard).map_err(|blocked| self.stop(blocked, events))?;
            }
        }
        self.leave(events);
        Ok(())
    }

    /// The stream is at its end: everything is decided, and leaves or does not.
    pub(super) fn finish(&mut self, events: &mut BytesMut, guard: &mut Guard) -> Result<(), Blocked> {
        if self.over {
            return Ok(());
        }
        if !self.blind {
            self.end_all(|_| true, guard).map_err(|blocked| self.stop(blocked, events))?;
        }
        self.leave(events);
        Ok(())
    }

    /// Takes one event.
    fn event(&mut self, event: Bytes, guard: &mut Guard) -> Result<(), Blocked> {
        let Some(data) = text::data(&event).filter(|_| !self.blind) else {
            return self.unread(event, guard);
        };
        let Ok(told) = self.events.read(self.operation, &event[data.clone()]) else {
            return self.unread(event, guard);
        };
        if self.waiting_bytes + event.len() > WAITING_MAX {
            self.unread(event, guard)?;
            self.blind = true;
            return Ok(());
        }
        self.waiting_bytes += event.len();
        self.called(&event[data.clone()], &told.tools, guard);
        let mut waiting = Waiting { event, parts: SmallVec::new(), edits: Vec::new() };
        if !told.is_part {
            // The parts of what is repeated here are at their end: they are judged first.
            told.ends.map_or(Ok(()), |number| self.end_all(|open| open.number >> 32 == number, guard))?;
            for text in told.texts {
                let span = data.start + text.span.start..data.start + text.span.end;
                self.whole(&mut waiting, Text { span, ..text }, guard)?;
            }
            self.waiting.push_back(waiting);
        } else {
            let begun = self.begun(&mut waiting, &told.texts, data.start, guard);
            self.waiting.push_back(waiting);
            for (open, encoded) in begun {
                self.part(open, &encoded, guard)?;
            }
        }
        match told.ends {
            Some(number) => self.end_all(|open| open.number >> 32 == number, guard),
            None => Ok(()),
        }
    }

    /// Notes where the parts of an event belong; returns each with its bytes.
    fn begun(
        &mut self,
        waiting: &mut Waiting,
        texts: &[Text],
        at: usize,
        guard: &Guard,
    ) -> SmallVec<[(usize, Bytes); 2]> {
        let before = |begun: &[(usize, Bytes)], open: usize| -> u64 {
            begun.iter().filter(|(other, _)| *other == open).map(|(_, part)| part.len() as u64).sum()
        };
        let mut begun: SmallVec<[(usize, Bytes); 2]> = SmallVec::new();
        for text in texts {
            let Some(open) = self.open(text, guard) else { continue };
            let span = at + text.span.start..at + text.span.end;
            let from = self.channels[open].channel.end + before(&begun, open);
            begun.push((open, waiting.event.slice(span.clone())));
            waiting.parts.push(Part { open, from, span });
        }
        begun
    }

    /// The text that this is a part of; none if nobody looks at it.
    fn open(&mut self, text: &Text, guard: &Guard) -> Option<usize> {
        let known = |open: &Open| !open.ended && open.place == text.place && open.number == text.channel;
        if let Some(index) = self.channels.iter().position(known) {
            return Some(index);
        }
        let channel = match self.restores {
            true => Channel::of_originals(text.is_json),
            false => guard.channel(text, self.tool(text))?,
        };
        self.channels.push(Open { place: text.place, number: text.channel, channel, ended: false });
        Some(self.channels.len() - 1)
    }

    /// Notes which tools are called here, where a rule wants to know.
    fn called(&mut self, data: &[u8], tools: &[Tool], guard: &Guard) {
        if self.restores || !guard.shapes_tools() {
            return;
        }
        for tool in tools {
            let name = named(data, tool);
            match self.tools.iter_mut().find(|(channel, _)| *channel == tool.channel) {
                Some(known) => known.1 = name,
                None => self.tools.push((tool.channel, name)),
            }
        }
    }

    /// The tool that gets this text.
    fn tool(&self, text: &Text) -> Option<&str> {
        self.tools.iter().find(|(channel, _)| *channel == text.channel).map(|(_, name)| name.as_str())
    }

    /// Judges the next part of a text.
    fn part(&mut self, index: usize, encoded: &[u8], guard: &mut Guard) -> Result<(), Blocked> {
        let open = &mut self.channels[index];
        let (progress, edits) = open.channel.push(encoded, &mut guard.placeholders);
        let (place, blocked) = (open.place, progress.blocked);
        if !self.restores {
            let progress = Progress { found: progress.found.clone(), ..Progress::default() };
            guard.noted(place, &progress, encoded.len());
        }
        self.edit(index, edits);
        blocked.map_or(Ok(()), |rule| Err(guard.blocked_by(rule)))
    }

    /// Judges a text that stands in an event as a whole.
    fn whole(&mut self, waiting: &mut Waiting, text: Text, guard: &mut Guard) -> Result<(), Blocked> {
        let mut channel = match (self.restores, guard.channel(&text, self.tool(&text))) {
            (true, _) => Channel::of_originals(text.is_json),
            (false, Some(channel)) => channel,
            (false, None) => return Ok(()),
        };
        let (progress, edits) = channel.whole(&waiting.event[text.span.clone()], &mut guard.placeholders);
        waiting.edits.extend(edits.into_iter().map(|edit| edit.at(&text)));
        // What is found was found in its parts already, unless there were none, or they are not at their end.
        let in_parts = |open: &Open| open.place == text.place && open.number >> 32 == text.channel >> 32;
        if !self.restores && (progress.blocked.is_some() || !self.channels.iter().any(in_parts)) {
            guard.noted(text.place, &progress, text.span.len());
        }
        progress.blocked.map_or(Ok(()), |rule| Err(guard.blocked_by(rule)))
    }

    /// Some texts are at their end.
    fn end_all(&mut self, which: impl Fn(&Open) -> bool, guard: &mut Guard) -> Result<(), Blocked> {
        for index in 0..self.channels.len() {
            let open = &mut self.channels[index];
            if open.ended || !which(open) {
                continue;
            }
            open.ended = true;
            let (progress, edits) = open.channel.finish(&mut guard.placeholders);
            let place = open.place;
            if !self.restores {
                guard.noted(place, &progress, 0);
            }
            self.edit(index, edits);
            if let Some(rule) = progress.blocked {
                return Err(guard.blocked_by(rule));
            }
        }
        Ok(())
    }

    /// Puts edits of a text into the events that it stands in: what is new stands where the edit begins.
    fn edit(&mut self, index: usize, edits: Vec<Encoded>) {
        for Encoded(edit) in edits {
            let mut replacement = Some(edit.replacement);
            for waiting in &mut self.waiting {
                for part in waiting.parts.iter().filter(|part| part.open == index) {
                    let to = part.from + part.span.len() as u64;
                    let (start, end) = (edit.range.start.max(part.from), edit.range.end.min(to));
                    let begins = edit.range.start >= part.from && edit.range.start < to.max(part.from + 1);
                    if start < end || (begins && edit.range.is_empty()) {
                        let place = |offset: u64| part.span.start + (offset - part.from) as usize;
                        let text = replacement.take().unwrap_or_default();
                        waiting.edits.push(scan::Edit { span: place(start)..place(end), text });
                    }
                }
            }
        }
    }

    /// Nobody can read this event.
    fn unread(&mut self, event: Bytes, guard: &mut Guard) -> Result<(), Blocked> {
        if !self.restores
            && let Some(blocked) = guard.unread(false)
        {
            return Err(blocked);
        }
        self.waiting_bytes += event.len();
        self.waiting.push_back(Waiting { event, parts: SmallVec::new(), edits: Vec::new() });
        Ok(())
    }

    /// Lets go what may leave, in order.
    fn leave(&mut self, out: &mut BytesMut) {
        let is_free =
            |part: &Part, channels: &[Open]| channels[part.open].channel.released >= part.from + part.span.len() as u64;
        while let Some(first) = self.waiting.front()
            && (self.blind || first.parts.iter().all(|part| is_free(part, &self.channels)))
            && let Some(mut first) = self.waiting.pop_front()
        {
            self.waiting_bytes -= first.event.len();
            self.forget_tokens(&mut first);
            out.extend_from_slice(&splice(&first.event, &mut first.edits));
        }
    }

    /// What an event told of texts that were edited is not told by their tokens either. Originals are the client's own.
    fn forget_tokens(&self, waiting: &mut Waiting) {
        if !self.restores {
            text::forget_tokens(self.operation, &waiting.event, &mut waiting.edits);
        }
    }

    /// Something does not pass: what stands before it leaves, and nothing else ever does.
    fn stop(&mut self, blocked: Blocked, out: &mut BytesMut) -> Blocked {
        self.leave(out);
        self.over = true;
        if let Some(mut first) = self.waiting.pop_front() {
            let mut kept = 0;
            // What repeats the whole text at its end goes whole.
            let repeats = |part: &Part| self.operation == Operation::Generate && self.channels[part.open].number != 0;
            for part in first.parts.iter().filter(|part| !repeats(part)) {
                let released = self.channels[part.open].channel.released.saturating_sub(part.from);
                let released = (released as usize).min(part.span.len());
                kept += released;
                let gone = part.span.start + released..part.span.end;
                first.edits.retain(|edit| edit.span.end <= gone.start || edit.span.start >= gone.end);
                first.edits.push(scan::Edit { span: gone, text: String::new() });
            }
            if kept > 0 {
                // What ends the stream comes behind this, and nothing else says that it is over.
                self.forget_tokens(&mut first);
                text::forget_end(self.operation, &first.event, &mut first.edits);
                out.extend_from_slice(&splice(&first.event, &mut first.edits));
            }
        }
        self.waiting.clear();
        blocked
    }
}

impl Guard {
    fn blocked_by(&self, rule: usize) -> Blocked {
        Blocked::By(self.rails.rules.rules()[rule].name.clone())
    }
}
