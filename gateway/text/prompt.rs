//! The texts of a request.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::LazyLock;

use infergate_plugins::operation::Operation;
use memchr::memmem::Finder;
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::value::RawValue;

use super::{Collector, Function, Place, Text, ToolCall, Unreadable, read};
use crate::scan;

/// A request of any endpoint: each has some of these.
#[derive(Deserialize)]
struct Request<'a> {
    #[serde(borrow, default)]
    messages: Option<Vec<Message<'a>>>,
    #[serde(borrow, default)]
    system: Option<&'a RawValue>,
    #[serde(borrow, default)]
    instructions: Option<&'a RawValue>,
    #[serde(borrow, default)]
    input: Option<&'a RawValue>,
    #[serde(borrow, default)]
    inputs: Option<&'a RawValue>,
    #[serde(borrow, default)]
    prompt: Option<&'a RawValue>,
    #[serde(borrow, default)]
    suffix: Option<&'a RawValue>,
    #[serde(borrow, default)]
    query: Option<&'a RawValue>,
    #[serde(borrow, default)]
    documents: Option<&'a RawValue>,
    #[serde(default)]
    tools: Option<Vec<IgnoredAny>>,
    #[serde(borrow, default)]
    text_1: Option<&'a RawValue>,
    #[serde(borrow, default)]
    text_2: Option<&'a RawValue>,
}

/// One message, or one item of a response's input.
#[derive(Deserialize)]
struct Message<'a> {
    #[serde(borrow, default)]
    role: Option<Cow<'a, str>>,
    #[serde(borrow, default, rename = "type")]
    kind: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    content: Option<&'a RawValue>,
    #[serde(borrow, default)]
    reasoning_content: Option<&'a RawValue>,
    #[serde(borrow, default)]
    refusal: Option<&'a RawValue>,
    #[serde(borrow, default)]
    tool_calls: Option<Vec<ToolCall<'a>>>,
    #[serde(borrow, default)]
    function_call: Option<Function<'a>>,
    #[serde(borrow, default)]
    arguments: Option<&'a RawValue>,
    #[serde(borrow, default)]
    input: Option<&'a RawValue>,
    #[serde(borrow, default)]
    output: Option<&'a RawValue>,
    #[serde(borrow, default)]
    summary: Option<&'a RawValue>,
}

impl Message<'_> {
    /// Whose words they are. Whoever has no role that is known is taken for a user.
    fn place(&self) -> Place {
        match (self.role.as_deref(), self.kind.as_deref()) {
            (Some("system" | "developer"), _) => Place::PromptSystem,
            (Some("assistant" | "model"), _) | (None, Some("reasoning")) => Place::PromptAssistant,
            (Some("tool" | "function"), _) => Place::PromptTool,
            // Functions, custom tools, shells: each has a name of its own for both.
            (None, Some(kind)) if kind.ends_with("_call") => Place::PromptAssistant,
            (None, Some(kind)) if kind.ends_with("_output") => Place::PromptTool,
            _ => Place::PromptUser,
        }
    }
}

/// The texts of the request `body` to `operation`, in the order in which models read them.
pub fn prompt(operation: Operation, body: &[u8]) -> Result<Vec<Text>, Unreadable> {
    use Operation::{
        Chat, Completions, CountTokens, Embeddings, Generate, Images, Messages, Moderation, Pooling, Rerank, Responses,
        Score, Speech, Tokenize,
    };
    if !matches!(
        operation,
        Chat | Completions
            | CountTokens
            | Embeddings
            | Generate
            | Images
            | Messages
            | Moderation
            | Pooling
            | Rerank
            | Responses
            | Score
            | Speech
            | Tokenize
    ) {
        return Ok(Vec::new());
    }
    let request: Request<'_> = read(body)?;
    let mut found = Collector::new(body);
    for value in [request.system, request.instructions].into_iter().flatten() {
        found.parts(Place::PromptSystem, 0, value)?;
    }
    if let Some(input) = request.input {
        found.input(input)?;
    }
    for value in [request.inputs, request.prompt, request.suffix, request.query].into_iter().flatten() {
        found.parts(Place::PromptUser, 0, value)?;
    }
    for value in [request.text_1, request.text_2].into_iter().flatten() {
        found.parts(Place::PromptUser, 0, value)?;
    }
    for message in request.messages.iter().flatten() {
        found.message(message)?;
    }
    if let Some(documents) = request.documents {
        found.turn = 0;
        found.parts(Place::PromptTool, 0, documents)?;
    }
    Ok(found.texts)
}

/// The texts of the form `body` to `operation`, whose `Content-Type` this is: what a transcription is told beforehand.
pub fn form(operation: Operation, body: &[u8], content_type: &[u8]) -> Result<Vec<Text>, Unreadable> {
    if operation != Operation::Transcription {
        return Ok(Vec::new());
    }
    let spans = scan::parts_named(body, content_type, "prompt").map_err(|_| Unreadable)?;
    let text = |span: Range<usize>| {
        std::str::from_utf8(&body[span.clone()]).map_err(|_| Unreadable)?;
        Ok(Text { place: Place::PromptUser, channel: 0, turn: 0, span, is_json: false, is_raw: true })
    };
    spans.into_iter().filter(|span| !span.is_empty()).map(text).collect()
}

/// How many images and how many tools a request has.
pub fn extras(body: &[u8]) -> (u64, u64) {
    static IMAGES: LazyLock<[(Finder<'static>, bool); 3]> = LazyLock::new(|| {
        [("\"image_url\"", true), ("\"image\"", false), ("\"input_image\"", false)]
            .map(|(word, is_key)| (Finder::new(word), is_key))
    });
    let is_there = |at: usize, word: usize, is_key: bool| match is_key {
        true => body[at + word..].trim_ascii_start().first() == Some(&b':'),
        false => is_type(&body[..at]),
    };
    let count = |(word, is_key): &(Finder<'_>, bool)| {
        word.find_iter(body).filter(|at| is_there(*at, word.needle().len(), *is_key)).count() as u64
    };
    let images = IMAGES.iter().map(count).sum();
    let tools = read::<Request<'_>>(body).ok().and_then(|request| request.tools);
    (images, tools.map_or(0, |tools| tools.len() as u64))
}

/// Whether what ends here is `"type":`, however it is spaced.
fn is_type(before: &[u8]) -> bool {
    let key = before.trim_ascii_end().strip_suffix(b":").map(<[u8]>::trim_ascii_end);
    key.is_some_and(|key| key.ends_with(b"\"type\""))
}

impl<'a> Collector<'a> {
    /// What embeddings and responses call their input: a text, texts, or items that are messages.
    fn input(&mut self, input: &'a RawValue) -> Result<(), Unreadable> {
        if !input.get().starts_with('[') {
            self.string(Place::PromptUser, 0, input);
            return Ok(());
        }
        for item in serde_json::from_str::<Vec<&RawValue>>(input.get())? {
            if item.get().starts_with('{') {
                self.message(&serde_json::from_str(item.get())?)?;
            } else {
                self.string(Place::PromptUser, 0, item);
            }
        }
        Ok(())
    }

    fn message(&mut self, message: &Message<'a>) -> Result<(), Unreadable> {
        let place = message.place();
        self.turn += 1;
        for value in [message.content, message.output, message.summary].into_iter().flatten() {
            self.parts(place, 0, value)?;
        }
        for value in [message.reasoning_content, message.refusal].into_iter().flatten() {
            self.string(place, 0, value);
        }
        self.arguments(place, 0, message.arguments);
        self.optional(place, 0, message.input);
        let calls = message.tool_calls.iter().flatten().filter_map(|call| call.function.as_ref());
        for function in calls.chain(&message.function_call) {
            self.arguments(place, 0, function.arguments);
        }
        for custom in message.tool_calls.iter().flatten().filter_map(|call| call.custom.as_ref()) {
            self.optional(place, 0, custom.input);
        }
        Ok(())
    }
}
