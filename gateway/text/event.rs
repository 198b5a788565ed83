//! The texts of one event of a stream, and whether they are parts of longer ones.

use std::borrow::Cow;
use std::ops::Range;

use bytes::Bytes;
use infergate_plugins::operation::Operation;
use serde::Deserialize;
use serde_json::value::RawValue;

use super::answer::{Block, Item, Spoken, speaks};
use super::{Collector, Place, Text, Tool, Unreadable, channel, read};
use crate::ending::ends;

/// What an event says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Event {
    /// Its texts.
    pub texts: Vec<Text>,
    /// The tools whose calls begin with it.
    pub tools: Vec<Tool>,
    /// Whether they go on in the next events of their channel. Otherwise each is whole: the end of a stream often
    /// repeats what its parts said.
    pub is_part: bool,
    /// Which texts are at their end with this event: those of this choice, block or item.
    pub ends: Option<u64>,
}

/// An event of any endpoint: each has some of these.
#[derive(Deserialize)]
struct Data<'a> {
    #[serde(borrow, default)]
    choices: Option<Vec<Choice<'a>>>,
    #[serde(borrow, default, rename = "type")]
    kind: Option<Cow<'a, str>>,
    #[serde(default)]
    index: Option<u64>,
    #[serde(default)]
    output_index: Option<u64>,
    #[serde(default)]
    content_index: Option<u64>,
    #[serde(default)]
    summary_index: Option<u64>,
    #[serde(borrow, default)]
    delta: Option<&'a RawValue>,
    #[serde(borrow, default)]
    content_block: Option<Block<'a>>,
    #[serde(borrow, default)]
    text: Option<&'a RawValue>,
    #[serde(borrow, default)]
    refusal: Option<&'a RawValue>,
    #[serde(borrow, default)]
    arguments: Option<&'a RawValue>,
    #[serde(borrow, default)]
    part: Option<Block<'a>>,
    #[serde(borrow, default)]
    item: Option<Item<'a>>,
    #[serde(borrow, default)]
    response: Option<Response<'a>>,
    #[serde(borrow, default)]
    token: Option<Token<'a>>,
    #[serde(borrow, default)]
    generated_text: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Choice<'a> {
    #[serde(default)]
    index: Option<u64>,
    #[serde(borrow, default)]
    text: Option<&'a RawValue>,
    #[serde(borrow, default)]
    delta: Option<Spoken<'a>>,
    #[serde(borrow, default)]
    finish_reason: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Response<'a> {
    #[serde(borrow, default)]
    output: Option<Vec<Item<'a>>>,
}

#[derive(Deserialize)]
struct Token<'a> {
    #[serde(borrow, default)]
    text: Option<&'a RawValue>,
}

/// A part of one of Anthropic's blocks.
#[derive(Deserialize)]
struct BlockDelta<'a> {
    #[serde(borrow, default)]
    text: Option<&'a RawValue>,
    #[serde(borrow, default)]
    thinking: Option<&'a RawValue>,
    #[serde(borrow, default)]
    partial_json: Option<&'a RawValue>,
}

/// What the event with this `data` says, on the stream that answers `operation`. `[DONE]` says nothing.
pub fn event(operation: Operation, data: &[u8]) -> Result<Event, Unreadable> {
    if !speaks(operation) || data.trim_ascii() == b"[DONE]" || data.trim_ascii().is_empty() {
        return Ok(Event::default());
    }
    let told: Data<'_> = read(data)?;
    let mut found = Collector::new(data);
    let (is_part, ends) = match operation {
        Operation::Messages => found.of_message(&told)?,
        Operation::Responses => found.of_response(&told),
        Operation::Generate => found.generated(&told),
        Operation::Transcription => found.transcribed(&told),
        _ => found.chosen(&told),
    };
    Ok(Event { texts: found.texts, tools: found.tools, is_part, ends })
}

/// What a whole stream says altogether: a document with each of its texts, and where they stand in it.
pub fn told(operation: Operation, events: &[u8]) -> Result<(Bytes, Vec<Text>), Unreadable> {
    let mut parts: Vec<(Text, Vec<u8>)> = Vec::new();
    let mut wholes: Vec<(Text, Vec<u8>)> = Vec::new();
    for event in each(events) {
        let data = data(event).ok_or(Unreadable)?;
        let said = self::event(operation, &event[data.clone()])?;
        let texts = if said.is_part { &mut parts } else { &mut wholes };
        for text in said.texts {
            let encoded = &event[data.start + text.span.start..data.start + text.span.end];
            match texts.iter_mut().find(|(other, _)| other.place == text.place && other.channel == text.channel) {
                Some((_, before)) if said.is_part => before.extend_from_slice(encoded),
                Some(_) => {}
                None => texts.push((text, encoded.to_vec())),
            }
        }
    }
    // The end of a stream repeats what its parts said, unless there were none.
    wholes.retain(|(text, _)| !parts.iter().any(|(part, _)| part.place == text.place));
    let (mut document, mut texts) = (Vec::new(), Vec::new());
    for (text, encoded) in parts.into_iter().chain(wholes) {
        let span = document.len()..document.len() + encoded.len();
        document.extend(encoded);
        texts.push(Text { span, ..text });
    }
    Ok((document.into(), texts))
}

/// The events of a whole stream, one after another; the last one may have no end.
pub fn each(events: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut from = 0;
    ends(events).chain([events.len()]).filter(|end| *end > 0).map(move |end| {
        let event = &events[from.min(end)..end];
        from = end;
        event
    })
}

/// Where the data of an event stands: behind `data:` of its one such line. An event without data has none, at its end.
pub fn data(event: &[u8]) -> Option<Range<usize>> {
    let (mut found, mut at) = (None, 0);
    for line in event.split(|byte| matches!(byte, b'\n' | b'\r')) {
        if let Some(value) = line.strip_prefix(b"data:") {
            if found.is_some() {
                return None;
            }
            found = Some(at + line.len() - value.len()..at + line.len());
        }
        at += line.len() + 1;
    }
    Some(found.unwrap_or(event.len()..event.len()))
}

impl<'a> Collector<'a> {
    fn chosen(&mut self, told: &Data<'a>) -> (bool, Option<u64>) {
        let mut ends = None;
        for (index, choice) in (0..).zip(told.choices.iter().flatten()) {
            let index = choice.index.unwrap_or(index);
            self.optional(Place::AnswerContent, channel(index, 0), choice.text);
            if let Some(delta) = &choice.delta {
                self.spoken(index, delta);
            }
            if choice.finish_reason.is_some_and(|reason| reason.get() != "null") {
                ends = Some(index);
            }
        }
        (true, ends)
    }

    fn of_message(&mut self, told: &Data<'a>) -> Result<(bool, Option<u64>), Unreadable> {
        let index = told.index.unwrap_or_default();
        if let Some(block) = &told.content_block {
            self.block(channel(index, 0), Place::AnswerContent, block);
        }
        if told.kind.as_deref() == Some("content_block_delta")
            && let Some(delta) = told.delta
        {
            let delta: BlockDelta<'a> = serde_json::from_str(delta.get())?;
            self.optional(Place::AnswerContent, channel(index, 0), delta.text);
            self.optional(Place::AnswerReasoning, channel(index, 0), delta.thinking);
            self.arguments(Place::AnswerToolArguments, channel(index, 0), delta.partial_json);
        }
        Ok((true, (told.kind.as_deref() == Some("content_block_stop")).then_some(index)))
    }

    fn of_response(&mut self, told: &Data<'a>) -> (bool, Option<u64>) {
        let kind = told.kind.as_deref().unwrap_or_default();
        let index = told.output_index.unwrap_or_default();
        let number = channel(index, told.content_index.or(told.summary_index).unwrap_or_default());
        let place = match kind {
            _ if kind.contains("arguments") || kind.contains("input") => Place::AnswerToolArguments,
            _ if kind.contains("reasoning") => Place::AnswerReasoning,
            _ if kind.contains("refusal") => Place::AnswerRefusal,
            _ => Place::AnswerContent,
        };
        if kind.ends_with(".delta") {
            if place == Place::AnswerToolArguments {
                self.arguments(place, number, told.delta);
            } else {
                self.optional(place, number, told.delta);
            }
            return (true, None);
        }
        for text in [told.text, told.refusal].into_iter().flatten() {
            self.string(place, number, text);
        }
        self.arguments(place, number, told.arguments);
        if let Some(part) = &told.part {
            self.block(number, place, part);
        }
        if let Some(item) = &told.item {
            self.item(index, item);
        }
        let items = told.response.as_ref().and_then(|response| response.output.as_ref());
        for (index, item) in (0..).zip(items.into_iter().flatten()) {
            self.item(index, item);
        }
        (false, kind.ends_with(".done").then_some(index))
    }

    /// TGI: a token an event; the last one repeats the whole text.
    fn generated(&mut self, told: &Data<'a>) -> (bool, Option<u64>) {
        let token = told.token.as_ref().and_then(|token| token.text);
        let whole = told.generated_text.filter(|text| text.get() != "null");
        self.optional(Place::AnswerContent, 0, token);
        self.optional(Place::AnswerContent, channel(0, 1), whole);
        (true, whole.map(|_| 0))
    }

    fn transcribed(&mut self, told: &Data<'a>) -> (bool, Option<u64>) {
        let is_part = told.delta.is_some();
        self.optional(Place::AnswerContent, 0, told.delta.or(told.text));
        (is_part, None)
    }
}
