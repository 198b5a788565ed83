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
pub(super) fn event(operation: Operation, data: &[u8]) -> Result<Event, Unreadable> {
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

/// Reads the events of one stream, one after the other. Most are the one before but for a string: of such no more than the
/// string is read.
#[derive(Debug, Default)]
pub struct Events {
    frame: Option<Frame>,
}

/// What stands around the only text of an event.
#[derive(Debug)]
struct Frame {
    before: Box<[u8]>,
    behind: Box<[u8]>,
    text: Text,
}

/// Longer frames are not kept.
const FRAME_MAX: usize = 1024;

impl Events {
    /// What the next event says, of the stream that answers `operation`, and whose data this is. `[DONE]` says nothing.
    pub fn read(&mut self, operation: Operation, data: &[u8]) -> Result<Event, Unreadable> {
        if let Some(text) = self.frame.as_ref().and_then(|frame| frame.text(data)) {
            return Ok(Event { texts: vec![text], is_part: true, ..Event::default() });
        }
        let told = event(operation, data)?;
        self.frame = Frame::of(&told, data);
        Ok(told)
    }
}

impl Frame {
    /// The frame of an event that says one thing and means nothing besides.
    fn of(told: &Event, data: &[u8]) -> Option<Self> {
        let [text] = told.texts.as_slice() else { return None };
        let (before, behind) = (data.get(..text.span.start)?, data.get(text.span.end..)?);
        let is_all = told.is_part && told.tools.is_empty() && told.ends.is_none();
        let is_kept = is_all && before.ends_with(b"\"") && before.len() + behind.len() <= FRAME_MAX;
        is_kept.then(|| Self { before: before.into(), behind: behind.into(), text: text.clone() })
    }

    /// The text of an event that has this frame. Where the string in it is as it stands, the event is built as that one was.
    fn text(&self, data: &[u8]) -> Option<Text> {
        let said = data.strip_prefix(&*self.before)?.strip_suffix(&*self.behind)?;
        let span = self.before.len()..self.before.len() + said.len();
        is_as_it_stands(said).then(|| Text { span, ..self.text.clone() })
    }
}

/// Whether these bytes are a string's that ends where they end, with nothing in it to undo.
fn is_as_it_stands(said: &[u8]) -> bool {
    let plain = |byte: &u8| *byte >= b' ' && !matches!(byte, b'"' | b'\\');
    !said.is_empty() && said.iter().all(plain) && std::str::from_utf8(said).is_ok()
}

/// What a whole stream says altogether: a document with each of its texts, and where they stand in it.
pub fn told(operation: Operation, events: &[u8]) -> Result<(Bytes, Vec<Text>), Unreadable> {
    let mut parts: Vec<(Text, Vec<u8>)> = Vec::new();
    let mut wholes: Vec<(Text, Vec<u8>)> = Vec::new();
    let mut reader = Events::default();
    for event in each(events) {
        let data = data(event).ok_or(Unreadable)?;
        let said = reader.read(operation, &event[data.clone()])?;
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
    for end in memchr::memchr2_iter(b'\n', b'\r', event).chain([event.len()]) {
        if let Some(value) = event[at..end].strip_prefix(b"data:") {
            if found.is_some() {
                return None;
            }
            found = Some(end - value.len()..end);
        }
        at = end + 1;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_that_are_alike_are_read_as_each_would_be_alone() {
        let chat = |said: &str, more: &str| {
            format!(
                r#"{{"id":"x","choices":[{{"index":0,"delta":{{"content":"{said}"}},{more}"finish_reason":null}}]}}"#
            )
        };
        let part = |kind: &str, said: &str| {
            format!(r#"{{"type":"{kind}","index":1,"delta":{{"type":"text_delta","text":"{said}"}}}}"#)
        };
        let said = [
            "a",
            "",
            "two words",
            "b",
            "\"",
            "\\\"",
            r#""},"x":{"content":"y"#,
            "\\",
            "\\n",
            "\u{4e2d}",
            "\u{1}",
            "\t",
            "c",
            r#"d","refusal":"no"#,
            r#"e"},"finish_reason":"stop","x":{"y":"z"#,
            "f",
            "\\u0000",
            "\\ud800",
            "g",
        ];
        let documents: Vec<(Operation, Vec<u8>)> = said
            .iter()
            .flat_map(|said| {
                [
                    (Operation::Chat, chat(said, "")),
                    (Operation::Chat, chat(said, "\"logprobs\":null,")),
                    (Operation::Chat, chat(said, "").replace("null", "\"stop\"")),
                    (Operation::Chat, chat(said, "").replace("\"index\":0", "\"index\":1")),
                    (Operation::Messages, part("content_block_delta", said)),
                    (Operation::Messages, part("content_block_stop", said)),
                    (Operation::Responses, format!(r#"{{"type":"response.output_text.delta","delta":"{said}"}}"#)),
                    (Operation::Responses, format!(r#"{{"type":"response.output_text.done","text":"{said}"}}"#)),
                    (Operation::Responses, format!(r#"{{"type":"{said}","delta":"x"}}"#)),
                    (Operation::Generate, format!(r#"{{"token":{{"text":"{said}"}},"generated_text":null}}"#)),
                ]
            })
            .map(|(operation, document)| (operation, document.into_bytes()))
            .chain([(Operation::Chat, [chat("a", "").split_at(54).0.as_bytes(), b"\xff\"}}]}"].concat())])
            .collect();
        let mut random = fastrand::Rng::with_seed(3);
        for round in 0..200 {
            let operation = documents[round % documents.len()].0;
            let mut events = Events::default();
            let mut read_again = 0;
            for _ in 0..60 {
                let (_, mut document) = random.choice(&documents).cloned().unwrap();
                if random.u8(..8) == 0 && !document.is_empty() {
                    let at = random.usize(..document.len());
                    document[at] = random.u8(..);
                }
                for _ in 0..2 {
                    assert_eq!(
                        events.read(operation, &document),
                        event(operation, &document),
                        "{}",
                        document.escape_ascii()
                    );
                    read_again +=
                        usize::from(events.frame.as_ref().is_some_and(|frame| frame.text(&document).is_some()));
                }
            }
            assert!(round != 0 || read_again > 5, "{read_again}");
        }
    }
}
