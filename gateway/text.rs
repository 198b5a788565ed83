//! Where the texts stand in what clients send and upstreams answer, for every endpoint that has any: as offsets into
//! the bytes, inside the quotes, still encoded.
//!
//! What is read is what models read and write: messages, prompts, documents, what tools said, answers, reasoning,
//! arguments of tools. Names, identifiers, images and sound are not.

mod answer;
pub mod asked;
mod event;
mod prompt;
mod reading;
mod traces;

use std::borrow::Cow;
use std::ops::Range;

use serde::Deserialize;
use serde_json::value::RawValue;

pub use self::answer::{answer, answer_with_tools};
pub use self::asked::schemas;
pub use self::event::{Event, Events, data, each, told};
pub use self::prompt::{extras, form, prompt};
pub use self::reading::{Reading, Texts, unescaped, written};
pub use self::traces::{forget_end, forget_tokens};
pub use infergate_plugins::guardrail::Place;

/// One text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Text {
    /// What it is.
    pub place: Place,
    /// Which of several texts of its kind: those of one stream that belong together have the same number.
    pub channel: u64,
    /// The message that it is in, from 1; 0 for what stands beside messages.
    pub turn: u32,
    /// Where it stands: a JSON string, without its quotes.
    pub span: Range<usize>,
    /// Whether it is JSON itself, as the arguments of tools are.
    pub is_json: bool,
    /// Whether it stands there as it is: in a form, where nothing is quoted.
    pub is_raw: bool,
}

/// A tool that is called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tool {
    /// The number of its arguments.
    pub channel: u64,
    /// Where its name stands: a JSON string, without its quotes.
    pub name: Range<usize>,
    /// Where its arguments stand, if they are a JSON value there and no text.
    pub input: Option<Range<usize>>,
}

/// The number of a text: the choice or the item it belongs to, and its place in that.
const fn channel(index: u64, sub: u64) -> u64 {
    index << 32 | (sub & 0xffff_ffff)
}

/// How deep parts with parts may stand in one another: what a tool said has parts, and no more.
const NESTED_MAX: u8 = 4;

/// Collects the texts of one document.
struct Collector<'a> {
    document: &'a [u8],
    texts: Vec<Text>,
    tools: Vec<Tool>,
    /// The message that is read.
    turn: u32,
}

/// The document is not what its endpoint takes or gives, as far as its texts are concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unreadable;

impl From<serde_json::Error> for Unreadable {
    fn from(_: serde_json::Error) -> Self {
        Self
    }
}

impl<'a> Collector<'a> {
    fn new(document: &'a [u8]) -> Self {
        Self { document, texts: Vec::new(), tools: Vec::new(), turn: 0 }
    }

    /// A JSON value of the document that is a text: a string. Anything else is none.
    fn string(&mut self, place: Place, channel: u64, value: &'a RawValue) {
        self.any(place, channel, value, false);
    }

    /// The arguments of a tool: JSON in a string.
    fn arguments(&mut self, place: Place, channel: u64, value: Option<&'a RawValue>) {
        if let Some(value) = value {
            self.any(place, channel, value, true);
        }
    }

    fn any(&mut self, place: Place, channel: u64, value: &'a RawValue, is_json: bool) {
        let text = value.get();
        if text.len() > 2 && text.starts_with('"') {
            let span = self.span(value);
            let span = span.start + 1..span.end - 1;
            self.texts.push(Text { place, channel, turn: self.turn, span, is_json, is_raw: false });
        }
    }

    /// A tool is called by its name.
    fn tool(&mut self, channel: u64, name: Option<&'a RawValue>, input: Option<&'a RawValue>) {
        let Some(name) = name.filter(|name| name.get().len() > 2 && name.get().starts_with('"')) else { return };
        let name = self.span(name);
        let input = input.map(|input| self.span(input));
        self.tools.push(Tool { channel, name: name.start + 1..name.end - 1, input });
    }

    /// Where a value stands: it was borrowed from the document.
    fn span(&self, value: &'a RawValue) -> Range<usize> {
        let from = value.get().as_ptr() as usize - self.document.as_ptr() as usize;
        from..from + value.get().len()
    }

    fn optional(&mut self, place: Place, channel: u64, value: Option<&'a RawValue>) {
        if let Some(value) = value {
            self.string(place, channel, value);
        }
    }

    /// A text, or a list of parts with texts. The first has the number `channel`, the next the next.
    fn parts(&mut self, place: Place, channel: u64, value: &'a RawValue) -> Result<(), Unreadable> {
        self.nested(place, channel, value, NESTED_MAX)
    }

    fn nested(&mut self, place: Place, channel: u64, value: &'a RawValue, deeper: u8) -> Result<(), Unreadable> {
        if !value.get().starts_with('[') {
            self.string(place, channel, value);
            return Ok(());
        }
        let deeper = deeper.checked_sub(1).ok_or(Unreadable)?;
        for (number, part) in (channel..).zip(serde_json::from_str::<Vec<&RawValue>>(value.get())?) {
            if !part.get().starts_with('{') {
                self.string(place, number, part);
                continue;
            }
            let part: Part<'a> = serde_json::from_str(part.get())?;
            let place = if part.is_from_tool() { Place::PromptTool } else { place };
            for text in [part.text, part.thinking, part.refusal, part.output].into_iter().flatten() {
                self.string(place, number, text);
            }
            if let Some(content) = part.content {
                self.nested(place, number, content, deeper)?;
            }
            if let Some(input) = part.input {
                self.deep(place, number, input);
            }
        }
        Ok(())
    }

    /// Every string that stands as a value anywhere in `value`.
    fn deep(&mut self, place: Place, channel: u64, value: &'a RawValue) {
        let text = value.get();
        let base = text.as_ptr() as usize - self.document.as_ptr() as usize;
        let bytes = text.as_bytes();
        let mut at = 0;
        while let Some(open) = memchr::memchr(b'"', &bytes[at..]).map(|found| at + found) {
            let Some(close) = closing(bytes, open + 1) else { return };
            let next = bytes[close + 1..].iter().find(|byte| !byte.is_ascii_whitespace());
            if next != Some(&b':') && close > open + 1 {
                let span = base + open + 1..base + close;
                self.texts.push(Text { place, channel, turn: self.turn, span, is_json: false, is_raw: false });
            }
            at = close + 1;
        }
    }
}

/// Reads a document. What is text all through is looked at once for that, and not string by string; a string that is none
/// may stand where nobody looks.
fn read<'a, T: Deserialize<'a>>(document: &'a [u8]) -> serde_json::Result<T> {
    match std::str::from_utf8(document) {
        Ok(text) => serde_json::from_str(text),
        Err(_) => serde_json::from_slice(document),
    }
}

/// Where the string ends that begins at `from`.
fn closing(bytes: &[u8], mut from: usize) -> Option<usize> {
    loop {
        let found = from + memchr::memchr2(b'"', b'\\', bytes.get(from..)?)?;
        if bytes[found] == b'"' {
            return Some(found);
        }
        from = found + 2;
    }
}

/// One part of a message, in OpenAI's dialects or in Anthropic's.
#[derive(Deserialize)]
struct Part<'a> {
    #[serde(borrow, default, rename = "type")]
    kind: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    text: Option<&'a RawValue>,
    #[serde(borrow, default)]
    thinking: Option<&'a RawValue>,
    #[serde(borrow, default)]
    refusal: Option<&'a RawValue>,
    #[serde(borrow, default)]
    output: Option<&'a RawValue>,
    #[serde(borrow, default)]
    content: Option<&'a RawValue>,
    #[serde(borrow, default)]
    input: Option<&'a RawValue>,
}

impl Part<'_> {
    fn is_from_tool(&self) -> bool {
        matches!(self.kind.as_deref(), Some("tool_result" | "document" | "search_result" | "function_call_output"))
    }
}

/// A function that is called, with its arguments: JSON in a string.
#[derive(Default, Deserialize)]
struct Function<'a> {
    #[serde(borrow, default)]
    name: Option<&'a RawValue>,
    #[serde(borrow, default)]
    arguments: Option<&'a RawValue>,
}

/// One call of a tool.
#[derive(Deserialize)]
struct ToolCall<'a> {
    #[serde(default)]
    index: Option<u64>,
    #[serde(borrow, default)]
    function: Option<Function<'a>>,
    #[serde(borrow, default)]
    custom: Option<Custom<'a>>,
}

/// A tool that takes any text.
#[derive(Deserialize)]
struct Custom<'a> {
    #[serde(borrow, default)]
    input: Option<&'a RawValue>,
}

#[cfg(test)]
mod tests {
    use infergate_plugins::operation::Operation;

    use super::*;

    /// An operation, a document, and the texts in it: the last word of each one's place, and what it says.
    type Case = (Operation, &'static str, &'static [(&'static str, &'static str)]);

    #[test]
    fn bytes_that_are_no_text_are_read_over_where_nobody_looks_and_are_unreadable_where_somebody_does() {
        let document = |id: &[u8], content: &[u8]| {
            let parts = [b"{\"id\":\"", id, b"\",\"choices\":[{\"message\":{\"content\":\"", content, b"\"}}]}"];
            parts.concat()
        };
        let beside = document(b"\xff", b"hello");
        let texts = answer(Operation::Chat, &beside).unwrap();
        assert_eq!(&beside[texts[0].span.clone()], b"hello");
        assert_eq!(answer(Operation::Chat, &document(b"x", b"\xff")), Err(Unreadable));
    }

    /// The texts of a document, each with the last word of its place.
    fn told(document: &str, texts: Vec<Text>) -> Vec<(String, String)> {
        let word = |place: Place| place.name().rsplit('.').next().unwrap().to_owned();
        texts.into_iter().map(|text| (word(text.place), document[text.span].to_owned())).collect()
    }

    fn pairs(list: &[(&str, &str)]) -> Vec<(String, String)> {
        list.iter().map(|(place, text)| ((*place).to_owned(), (*text).to_owned())).collect()
    }

    #[test]
    fn every_text_of_a_request_is_found_with_whose_it_is() {
        use Operation::{Chat, Completions, Embeddings, Generate, Messages, Rerank, Responses, Score};
        let cases: &[Case] = &[
            (
                Chat,
                r#"{"messages":[{"content":"S","role":"system"},{"role":"user","content":[{"type":"text","text":"U\n"},{"type":"image_url","image_url":{"url":"x"}}]},{"role":"assistant","content":null,"tool_calls":[{"id":"i","function":{"name":"f","arguments":"{\"a\":1}"}}]},{"role":"assistant","tool_calls":[{"id":"i","type":"custom","custom":{"name":"f","input":"I"}}]},{"role":"tool","content":"T"}],"model":"m"}"#,
                &[("system", "S"), ("user", r"U\n"), ("assistant", r#"{\"a\":1}"#), ("assistant", "I"), ("tool", "T")],
            ),
            (Completions, r#"{"prompt":["A","B"],"suffix":"C"}"#, &[("user", "A"), ("user", "B"), ("user", "C")]),
            (
                Responses,
                r#"{"instructions":"S","input":[{"role":"user","content":[{"type":"input_text","text":"U"}]},{"type":"function_call_output","output":"T"},{"type":"function_call","arguments":"A"},{"type":"custom_tool_call","input":"I"},{"type":"custom_tool_call_output","output":"O"}]}"#,
                &[("system", "S"), ("user", "U"), ("tool", "T"), ("assistant", "A"), ("assistant", "I"), ("tool", "O")],
            ),
            (Responses, r#"{"input":"U"}"#, &[("user", "U")]),
            (
                Messages,
                r#"{"system":[{"type":"text","text":"S"}],"messages":[{"role":"user","content":[{"type":"tool_result","content":[{"type":"text","text":"T"}]},{"type":"text","text":"U"}]},{"role":"assistant","content":[{"type":"tool_use","input":{"city":"C","n":[1,"D"]}}]}]}"#,
                &[("system", "S"), ("tool", "T"), ("user", "U"), ("assistant", "C"), ("assistant", "D")],
            ),
            (Generate, r#"{"inputs":"U"}"#, &[("user", "U")]),
            (Embeddings, r#"{"input":["A","B"]}"#, &[("user", "A"), ("user", "B")]),
            (Rerank, r#"{"query":"Q","documents":["A",{"text":"B"}]}"#, &[("user", "Q"), ("tool", "A"), ("tool", "B")]),
            (Score, r#"{"text_1":"A","text_2":["B"]}"#, &[("user", "A"), ("user", "B")]),
        ];
        for (operation, document, expected) in cases {
            let texts = prompt(*operation, document.as_bytes()).unwrap();
            assert_eq!(told(document, texts), pairs(expected), "{document}");
        }
    }

    #[test]
    fn an_escaped_key_hides_nothing_and_a_key_that_stands_twice_is_not_read_half() {
        let document = r#"{"messages":[{"role":"user","\u0063ontent":"U"}]}"#;
        assert_eq!(told(document, prompt(Operation::Chat, document.as_bytes()).unwrap()), pairs(&[("user", "U")]));
        let twice = br#"{"messages":[{"role":"user","content":"U","content":"V"}]}"#;
        assert_eq!(prompt(Operation::Chat, twice), Err(Unreadable));
    }

    #[test]
    fn every_text_of_an_answer_is_found() {
        use Operation::{Chat, Completions, Generate, Messages, Responses, Transcription};
        let cases: &[Case] = &[
            (
                Chat,
                r#"{"choices":[{"message":{"content":"A","reasoning_content":"R","refusal":"N","tool_calls":[{"function":{"arguments":"{}"}}]}},{"message":{"content":"B"}}]}"#,
                &[("content", "A"), ("reasoning", "R"), ("refusal", "N"), ("tool_arguments", "{}"), ("content", "B")],
            ),
            (Completions, r#"{"choices":[{"text":"A"},{"text":"B"}]}"#, &[("content", "A"), ("content", "B")]),
            (
                Responses,
                r#"{"output":[{"type":"reasoning","summary":[{"text":"R"}]},{"type":"message","content":[{"type":"output_text","text":"A"},{"type":"refusal","refusal":"N"}]},{"type":"function_call","arguments":"{}"}]}"#,
                &[("reasoning", "R"), ("content", "A"), ("refusal", "N"), ("tool_arguments", "{}")],
            ),
            (
                Messages,
                r#"{"content":[{"type":"thinking","thinking":"R"},{"type":"text","text":"A"},{"type":"tool_use","input":{"k":"V"}}]}"#,
                &[("reasoning", "R"), ("content", "A"), ("tool_arguments", "V")],
            ),
            (
                Chat,
                r#"{"choices":[{"message":{"content":null,"audio":{"data":"x","transcript":"A"},"tool_calls":[{"type":"custom","custom":{"name":"f","input":"I"}}]}}]}"#,
                &[("tool_arguments", "I"), ("content", "A")],
            ),
            (
                Responses,
                r#"{"output":[{"type":"custom_tool_call","name":"f","input":"I"}]}"#,
                &[("tool_arguments", "I")],
            ),
            (
                Generate,
                r#"{"generated_text":"A","details":{"finish_reason":"length","best_of_sequences":[{"generated_text":"B"}]}}"#,
                &[("content", "A"), ("content", "B")],
            ),
            (Generate, r#"{"generated_text":"A"}"#, &[("content", "A")]),
            (Generate, r#"[{"generated_text":"A"}]"#, &[("content", "A")]),
            (Transcription, r#"{"text":"A","segments":[{"text":"B"}]}"#, &[("content", "A"), ("content", "B")]),
        ];
        for (operation, document, expected) in cases {
            let texts = answer(*operation, document.as_bytes()).unwrap();
            assert_eq!(told(document, texts), pairs(expected), "{document}");
        }
    }

    #[test]
    fn every_text_of_an_event_is_found_and_belongs_to_its_stream() {
        use Operation::{Chat, Completions, Generate, Messages, Responses};
        let cases: &[Case] = &[
            (
                Chat,
                r#"{"choices":[{"index":1,"delta":{"content":"A","reasoning":"R","tool_calls":[{"index":2,"function":{"arguments":"{\""}}]}}]}"#,
                &[("content", "A"), ("reasoning", "R"), ("tool_arguments", r#"{\""#)],
            ),
            (Completions, r#"{"choices":[{"index":0,"text":"A"}]}"#, &[("content", "A")]),
            (
                Messages,
                r#"{"type":"content_block_delta","index":3,"delta":{"type":"text_delta","text":"A"}}"#,
                &[("content", "A")],
            ),
            (
                Messages,
                r#"{"type":"content_block_delta","index":3,"delta":{"type":"input_json_delta","partial_json":"{"}}"#,
                &[("tool_arguments", "{")],
            ),
            (
                Chat,
                r#"{"choices":[{"index":0,"delta":{"audio":{"transcript":"A"},"tool_calls":[{"index":0,"custom":{"input":"I"}}]}}]}"#,
                &[("tool_arguments", "I"), ("content", "A")],
            ),
            (
                Responses,
                r#"{"type":"response.output_text.delta","output_index":0,"content_index":1,"delta":"A"}"#,
                &[("content", "A")],
            ),
            (Responses, r#"{"type":"response.output_text.done","text":"AB"}"#, &[("content", "AB")]),
            (
                Responses,
                r#"{"type":"response.completed","response":{"output":[{"type":"message","content":[{"type":"output_text","text":"A"}]}]}}"#,
                &[("content", "A")],
            ),
            (Generate, r#"{"token":{"text":"A"},"generated_text":null}"#, &[("content", "A")]),
        ];
        for (operation, document, expected) in cases {
            let event = event::event(*operation, document.as_bytes()).unwrap();
            assert_eq!(told(document, event.texts), pairs(expected), "{document}");
        }
        let numbers = |data: &str| -> Vec<u64> {
            event::event(Operation::Chat, data.as_bytes()).unwrap().texts.into_iter().map(|text| text.channel).collect()
        };
        let of = |choice: u64| format!(r#"{{"choices":[{{"index":{choice},"delta":{{"content":"A"}}}}]}}"#);
        assert_eq!(numbers(&of(1)), numbers(&of(1)));
        assert_ne!(numbers(&of(1)), numbers(&of(0)));
    }
}
