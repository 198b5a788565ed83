//! What a request says, as routers see it: borrowed from the body wherever it reads as it is written.
//!
//! Only what is asked now, the user's last message, is read with its escapes undone; of the rest routers want the length,
//! and that of its bytes will do.

use infergate_plugins::operation::Operation;
use infergate_plugins::prompt::{Prompt, Role, Span};
use memchr::memmem;
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::text::{self, Place, Reading, Text, Unreadable};

/// The texts of a request.
#[derive(Debug)]
pub struct Words<'a> {
    spans: Vec<Span<'a>>,
    images: u32,
    tools: u32,
    structured: bool,
    loops: bool,
}

impl<'a> Words<'a> {
    /// The texts of a request; `counts`: also how many images and tools there are.
    pub fn of(reading: &'a Reading, counts: bool) -> Result<Self, Unreadable> {
        let (texts, body) = (reading.texts()?, &reading.body);
        let last = texts.all.iter().rev().find(|text| text.place == Place::PromptUser).map(|text| text.turn);
        let asked = |text: &Text| text.place == Place::PromptUser && Some(text.turn) == last;
        let span = |(number, text): (usize, &'a Text)| {
            let undone = asked(text).then(|| texts.undone(number, body)).flatten();
            // What is not undone reads as it is written.
            let read = undone.or_else(|| text::written(body, text)).unwrap_or_default();
            Span { role: role(text.place), turn: text.turn, text: read }
        };
        let (images, tools) = if counts { reading.extras() } else { (0, 0) };
        Ok(Self {
            spans: texts.all.iter().enumerate().map(span).collect(),
            images: clamp(images),
            tools: clamp(tools),
            structured: counts && is_structured(body),
            loops: matches!(reading.operation, Operation::Chat | Operation::Messages | Operation::Responses),
        })
    }

    /// The prompt.
    pub fn prompt(&self) -> Prompt<'_> {
        let (images, tools, structured) = (self.images, self.tools, self.structured);
        Prompt { spans: &self.spans, images, tools, structured, ..Prompt::default() }
    }

    /// Whether the model is to go on from what a tool gave back. Documents are no tool's.
    pub fn in_loop(&self, prompt: &Prompt<'_>) -> bool {
        self.loops && prompt.in_tool_loop() && prompt.spans.last().is_some_and(|span| span.turn > 0)
    }
}

fn clamp(count: u64) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

const fn role(place: Place) -> Role {
    match place {
        Place::PromptSystem => Role::System,
        Place::PromptAssistant => Role::Assistant,
        Place::PromptTool => Role::Tool,
        _ => Role::User,
    }
}

/// What asks for a form of the answer, in the dialects that have it.
#[derive(Deserialize)]
struct Form<'a> {
    #[serde(borrow, default)]
    response_format: Option<&'a RawValue>,
    #[serde(borrow, default)]
    text: Option<&'a RawValue>,
    #[serde(borrow, default)]
    output_config: Option<&'a RawValue>,
    #[serde(borrow, default)]
    guided_json: Option<&'a RawValue>,
    #[serde(borrow, default)]
    structured_outputs: Option<&'a RawValue>,
}

fn is_structured(body: &[u8]) -> bool {
    let Ok(form) = serde_json::from_slice::<Form<'_>>(body) else { return false };
    let json =
        |value: &&RawValue| value.get().starts_with('{') && memmem::find(value.get().as_bytes(), b"\"json_").is_some();
    let given = |value: &&RawValue| value.get() != "null";
    [form.response_format, form.text, form.output_config].iter().flatten().any(json)
        || [form.guided_json, form.structured_outputs].iter().flatten().any(given)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(operation: Operation, body: &str) -> (Vec<String>, bool) {
        let reading = Reading::of(operation, body.to_owned());
        let words = Words::of(&reading, true).unwrap();
        let prompt = words.prompt();
        (prompt.asked().iter().map(|span| span.text.to_owned()).collect(), words.in_loop(&prompt))
    }

    #[test]
    fn what_is_asked_is_the_users_last_message_in_every_dialect() {
        use Operation::{Chat, Completions, Embeddings, Messages, Rerank, Responses};
        let cases: &[(Operation, &str, &[&str], bool)] = &[
            (
                Chat,
                r#"{"messages":[{"role":"system","content":"S"},{"role":"user","content":"A"},{"role":"user","content":[{"type":"text","text":"B\n"},{"type":"text","text":"\u4e2d"}]}]}"#,
                &["B\n", "中"],
                false,
            ),
            (
                Chat,
                r#"{"messages":[{"role":"user","content":"A"},{"role":"assistant","tool_calls":[{"function":{"arguments":"{}"}}]},{"role":"tool","content":"T"}]}"#,
                &["A"],
                true,
            ),
            (Chat, r#"{"messages":[{"role":"user","content":"A"}],"documents":[{"text":"D"}]}"#, &["A"], false),
            (
                Messages,
                r#"{"messages":[{"role":"user","content":"A"},{"role":"assistant","content":[{"type":"tool_use","input":{"k":"v"}}]},{"role":"user","content":[{"type":"tool_result","content":"T"}]}]}"#,
                &["A"],
                true,
            ),
            (Responses, r#"{"instructions":"S","input":"A"}"#, &["A"], false),
            (
                Responses,
                r#"{"input":[{"role":"user","content":"A"},{"type":"function_call_output","output":"T"}]}"#,
                &["A"],
                true,
            ),
            (Completions, r#"{"prompt":"A"}"#, &["A"], false),
            (Embeddings, r#"{"input":["A","B"]}"#, &["A", "B"], false),
            (Rerank, r#"{"query":"Q","documents":["D"]}"#, &["Q"], false),
            (Chat, r#"{"messages":[]}"#, &[], false),
            (Chat, r#"{"messages":[{"role":"user","content":"\ud800 lone"}]}"#, &[r"\ud800 lone"], false),
        ];
        for (operation, body, expected, in_loop) in cases {
            let expected: Vec<String> = expected.iter().map(|&text| text.to_owned()).collect();
            assert_eq!(asked(*operation, body), (expected, *in_loop), "{body}");
        }
    }

    #[test]
    fn what_comes_with_a_prompt_is_counted_where_somebody_counts() {
        let body = r#"{"messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":"x"}}]}],"tools":[{},{}],"response_format":{"type":"json_schema"}}"#;
        let counted = |counts| {
            let reading = Reading::of(Operation::Chat, body);
            let words = Words::of(&reading, counts).unwrap();
            let prompt = words.prompt();
            (prompt.images, prompt.tools, prompt.structured)
        };
        assert_eq!((counted(true), counted(false)), ((1, 2, true), (0, 0, false)));
        assert!(is_structured(br#"{"text":{"format":{"type":"json_object"}}}"#));
        assert!(!is_structured(br#"{"text":"a \"json_object\"","response_format":{"type":"text"}}"#));
    }
}
