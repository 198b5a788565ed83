//! The texts of an answer that is no stream.

use std::borrow::Cow;

use infergate_plugins::operation::Operation;
use serde::Deserialize;
use serde_json::value::RawValue;

use super::{Collector, Function, Place, Text, Tool, ToolCall, Unreadable, channel, read};

/// An answer of any endpoint: each has some of these.
#[derive(Deserialize)]
struct Answer<'a> {
    #[serde(borrow, default)]
    choices: Option<Vec<Choice<'a>>>,
    #[serde(borrow, default)]
    output: Option<Vec<Item<'a>>>,
    #[serde(borrow, default)]
    content: Option<Vec<Block<'a>>>,
    #[serde(borrow, default)]
    generated_text: Option<&'a RawValue>,
    #[serde(borrow, default)]
    text: Option<&'a RawValue>,
    #[serde(borrow, default)]
    segments: Option<Vec<Segment<'a>>>,
    #[serde(borrow, default)]
    details: Option<Details<'a>>,
}

/// TGI's details: where several answers were asked for, all but the best stand here.
#[derive(Deserialize)]
struct Details<'a> {
    #[serde(borrow, default)]
    best_of_sequences: Option<Vec<Sequence<'a>>>,
}

#[derive(Deserialize)]
struct Sequence<'a> {
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
    message: Option<Spoken<'a>>,
}

/// What a model says in a chat: a message, or a part of one on a stream.
#[derive(Deserialize)]
pub(super) struct Spoken<'a> {
    #[serde(borrow, default)]
    content: Option<&'a RawValue>,
    #[serde(borrow, default)]
    reasoning_content: Option<&'a RawValue>,
    #[serde(borrow, default)]
    reasoning: Option<&'a RawValue>,
    #[serde(borrow, default)]
    refusal: Option<&'a RawValue>,
    #[serde(borrow, default)]
    tool_calls: Option<Vec<ToolCall<'a>>>,
    #[serde(borrow, default)]
    function_call: Option<Function<'a>>,
    #[serde(borrow, default)]
    audio: Option<Audio<'a>>,
}

/// What is spoken aloud, written down. The sound itself nobody reads.
#[derive(Deserialize)]
struct Audio<'a> {
    #[serde(borrow, default)]
    transcript: Option<&'a RawValue>,
}

/// One item of a response's output.
#[derive(Deserialize)]
pub(super) struct Item<'a> {
    #[serde(borrow, default, rename = "type")]
    kind: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    content: Option<Vec<Block<'a>>>,
    #[serde(borrow, default)]
    summary: Option<Vec<Block<'a>>>,
    #[serde(borrow, default)]
    name: Option<&'a RawValue>,
    #[serde(borrow, default)]
    arguments: Option<&'a RawValue>,
    /// What a tool gets that takes any text.
    #[serde(borrow, default)]
    input: Option<&'a RawValue>,
}

/// One block of a message, one part of a response's item.
#[derive(Deserialize)]
pub(super) struct Block<'a> {
    #[serde(borrow, default)]
    text: Option<&'a RawValue>,
    #[serde(borrow, default)]
    thinking: Option<&'a RawValue>,
    #[serde(borrow, default)]
    refusal: Option<&'a RawValue>,
    #[serde(borrow, default)]
    name: Option<&'a RawValue>,
    #[serde(borrow, default)]
    input: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Segment<'a> {
    #[serde(borrow, default)]
    text: Option<&'a RawValue>,
}

/// Whether answers to an operation have texts.
pub(super) fn speaks(operation: Operation) -> bool {
    use Operation::{Chat, Completions, Generate, Messages, Responses, Transcription};
    matches!(operation, Chat | Completions | Responses | Messages | Generate | Transcription)
}

/// The texts of the whole answer `body` to `operation`.
pub fn answer(operation: Operation, body: &[u8]) -> Result<Vec<Text>, Unreadable> {
    answer_with_tools(operation, body).map(|(texts, _)| texts)
}

/// The same, with the tools that it calls.
pub fn answer_with_tools(operation: Operation, body: &[u8]) -> Result<(Vec<Text>, Vec<Tool>), Unreadable> {
    if !speaks(operation) {
        return Ok(Default::default());
    }
    let mut found = Collector::new(body);
    // TGI may give a list of answers.
    let is_list = body.iter().find(|byte| !byte.is_ascii_whitespace()) == Some(&b'[');
    let answers: Vec<Answer<'_>> = if is_list { read(body)? } else { vec![read(body)?] };
    for answer in &answers {
        found.answer(answer);
    }
    Ok((found.texts, found.tools))
}

impl<'a> Collector<'a> {
    fn answer(&mut self, answer: &Answer<'a>) {
        for (index, choice) in (0..).zip(answer.choices.iter().flatten()) {
            let index = choice.index.unwrap_or(index);
            self.optional(Place::AnswerContent, channel(index, 0), choice.text);
            if let Some(message) = &choice.message {
                self.spoken(index, message);
            }
        }
        for (index, item) in (0..).zip(answer.output.iter().flatten()) {
            self.item(index, item);
        }
        self.blocks(0, Place::AnswerContent, answer.content.as_deref().unwrap_or_default());
        for text in [answer.generated_text, answer.text].into_iter().flatten() {
            self.string(Place::AnswerContent, 0, text);
        }
        let details = answer.details.as_ref().and_then(|details| details.best_of_sequences.as_ref());
        for sequence in details.into_iter().flatten() {
            self.optional(Place::AnswerContent, 0, sequence.generated_text);
        }
        for segment in answer.segments.iter().flatten() {
            self.optional(Place::AnswerContent, 0, segment.text);
        }
    }

    pub(super) fn spoken(&mut self, index: u64, spoken: &Spoken<'a>) {
        if let Some(content) = spoken.content {
            // A list of parts is rare, and what cannot be read of it is no text.
            let _ = self.parts(Place::AnswerContent, channel(index, 0), content);
        }
        for reasoning in [spoken.reasoning_content, spoken.reasoning].into_iter().flatten() {
            self.string(Place::AnswerReasoning, channel(index, 0), reasoning);
        }
        self.optional(Place::AnswerRefusal, channel(index, 0), spoken.refusal);
        for (at, call) in (0..).zip(spoken.tool_calls.iter().flatten()) {
            let number = channel(index, call.index.unwrap_or(at));
            if let Some(function) = &call.function {
                self.tool(number, function.name, None);
                self.arguments(Place::AnswerToolArguments, number, function.arguments);
            }
            let input = call.custom.as_ref().and_then(|custom| custom.input);
            self.optional(Place::AnswerToolArguments, number, input);
        }
        let transcript = spoken.audio.as_ref().and_then(|audio| audio.transcript);
        self.optional(Place::AnswerContent, channel(index, u64::from(u32::MAX)), transcript);
        if let Some(function) = &spoken.function_call {
            let number = channel(index, u64::from(u32::MAX));
            self.tool(number, function.name, None);
            self.arguments(Place::AnswerToolArguments, number, function.arguments);
        }
    }

    pub(super) fn item(&mut self, index: u64, item: &Item<'a>) {
        let place = match item.kind.as_deref() {
            Some("reasoning") => Place::AnswerReasoning,
            _ => Place::AnswerContent,
        };
        for blocks in [&item.summary, &item.content].into_iter().flatten() {
            self.blocks(index, place, blocks);
        }
        self.tool(channel(index, 0), item.name, None);
        self.arguments(Place::AnswerToolArguments, channel(index, 0), item.arguments);
        self.optional(Place::AnswerToolArguments, channel(index, 0), item.input);
    }

    pub(super) fn blocks(&mut self, index: u64, place: Place, blocks: &[Block<'a>]) {
        for (at, block) in (0..).zip(blocks) {
            self.block(channel(index, at), place, block);
        }
    }

    pub(super) fn block(&mut self, channel: u64, place: Place, block: &Block<'a>) {
        self.optional(place, channel, block.text);
        self.optional(Place::AnswerReasoning, channel, block.thinking);
        self.optional(Place::AnswerRefusal, channel, block.refusal);
        self.tool(channel, block.name, block.input);
        if let Some(input) = block.input {
            self.deep(Place::AnswerToolArguments, channel, input);
        }
    }
}
