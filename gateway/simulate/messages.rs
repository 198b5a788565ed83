//! `/v1/messages` and `/v1/messages/count_tokens`: Anthropic's dialect.

use serde_json::{Value, json};

use super::answer::{Answer, EVENT_STREAM, Refusal, Whole};
use super::draft::{self, Draft, End, NATURAL, Tool, Wish};
use super::encoding::{escape, quoted};
use super::engine::Finish;
use super::events::{Source, Step};
use super::input::{Input, Prompt};
use super::routes::Call;
use super::tokens;

pub(super) async fn answer(call: &Call) -> Result<Answer, Refusal> {
    let input = Input::parse(&call.body)?;
    input.needed("max_tokens")?;
    let mut wish = Wish::read(call, &input, &["max_tokens"])?;
    wish.choices = 1;
    wish.stop = draft::stops(input.get("stop_sequences"));
    // Here a bound is mandatory, so it says nothing about how long the answer is wished to be.
    wish.max_tokens = wish.max_tokens.filter(|most| *most < NATURAL || input.flag("ignore_eos") == Ok(true));
    let prompt = prompt(&input)?;
    let work = wish.work(&call.server, &prompt.text)?;
    let draft = draft(&input, &wish, &prompt);
    let reply = Reply {
        id: quoted(&call.id("chatcmpl-")),
        model: quoted(&wish.model),
        has_usage: !call.trouble.no_usage,
        draft,
    };
    if wish.stream {
        let prompt_tokens = work.prompt_tokens;
        let source = Box::new(Stream { reply, prompt_tokens, cached: 0, sent: 0, stage: Stage::MessageStart });
        return Ok(Answer::Stream { content_type: EVENT_STREAM, source, work });
    }
    let (prompt_tokens, tokens) = (work.prompt_tokens, reply.draft.len());
    let slot = call.generate(work, tokens, tokens).await;
    let body = reply.whole(prompt_tokens, slot.cached);
    slot.finish(reply.draft.end.finish());
    Ok(Whole::json(body).into())
}

pub(super) fn count(call: &Call) -> Result<Answer, Refusal> {
    let input = Input::parse(&call.body)?;
    call.model(&input)?;
    let count = tokens::count(&prompt(&input)?.text);
    let body = format!(r#"{{"input_tokens":{count},"context_management":{{"original_input_tokens":{count}}}}}"#);
    Ok(Whole::json(body).into())
}

fn prompt(input: &Input) -> Result<Prompt, Refusal> {
    let mut prompt = Prompt::default();
    for tool in input.list("tools")? {
        prompt.text.push_str(&tool.to_string());
        prompt.text.push('\n');
    }
    if let Some(system) = input.get("system") {
        prompt.message("system", Some(system));
    }
    input.needed("messages")?;
    for message in input.list("messages")? {
        let role = message.get("role").and_then(Value::as_str).unwrap_or("user");
        prompt.message(role, message.get("content"));
    }
    prompt.text.push_str("assistant:");
    Ok(prompt)
}

fn draft(input: &Input, wish: &Wish, prompt: &Prompt) -> Draft {
    match tool(input, prompt) {
        Some((name, schema)) => Draft::call(&name, &schema, prompt, wish),
        None => Draft::words(wish, prompt, 0),
    }
}

fn tool(input: &Input, prompt: &Prompt) -> Option<(String, Value)> {
    let choice = input.get("tool_choice").and_then(|choice| choice.get("type")).and_then(Value::as_str);
    let forced = matches!(choice, Some("any" | "tool"));
    if choice == Some("none") || prompt.after_tool && !forced {
        return None;
    }
    let name = |tool: &Value| tool.get("name").and_then(Value::as_str).map(str::to_owned);
    let wanted = input.get("tool_choice").and_then(name);
    let chosen = input.list("tools").ok()?.iter().find(|tool| wanted.is_none() || name(tool) == wanted)?;
    let schema = chosen.get("input_schema").cloned().unwrap_or_else(|| json!({}));
    Some((name(chosen)?, schema))
}

struct Reply {
    id: String,
    model: String,
    has_usage: bool,
    draft: Draft,
}

impl Reply {
    fn stop_reason(&self) -> &'static str {
        match self.draft.end {
            End::Natural => "end_turn",
            End::Stop(_) => "stop_sequence",
            End::Length => "max_tokens",
            End::Tool => "tool_use",
            End::Filter => "refusal",
        }
    }

    fn usage(&self, prompt: u64, cached: u64) -> String {
        if !self.has_usage {
            return String::new();
        }
        let (input, output) = (prompt - cached, self.draft.len());
        format!(
            r#","usage":{{"input_tokens":{input},"output_tokens":{output},"cache_creation_input_tokens":0,"cache_read_input_tokens":{cached}}}"#
        )
    }

    fn whole(&self, prompt: u64, cached: u64) -> String {
        let (id, model, reason) = (&self.id, &self.model, self.stop_reason());
        let content = match &self.draft.tool {
            Some(tool) => {
                // Arguments that a bound cut off are no JSON, and an input has to be an object.
                let input: Value = serde_json::from_str(&self.draft.text()).unwrap_or_else(|_| json!({}));
                tool_use(tool, &input.to_string())
            }
            None => format!(r#"{{"type":"text","text":{}}}"#, quoted(&self.draft.text())),
        };
        let stop = match &self.draft.end {
            End::Stop(text) => format!(r#","stop_sequence":{}"#, quoted(text)),
            _ => String::new(),
        };
        let usage = self.usage(prompt, cached);
        format!(
            r#"{{"id":{id},"type":"message","role":"assistant","content":[{content}],"model":{model},"stop_reason":"{reason}"{stop}{usage}}}"#
        )
    }
}

fn tool_use(tool: &Tool, input: &str) -> String {
    format!(r#"{{"type":"tool_use","id":{},"name":{},"input":{input}}}"#, quoted(&tool.id), quoted(&tool.name))
}

/// The events of a streamed answer.
struct Stream {
    reply: Reply,
    prompt_tokens: u64,
    cached: u64,
    sent: usize,
    stage: Stage,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    MessageStart,
    BlockStart,
    Deltas,
    BlockStop,
    MessageDelta,
    MessageStop,
    Over,
}

impl Stream {
    fn message_start(&self) -> String {
        let (id, model, prompt) = (&self.reply.id, &self.reply.model, self.prompt_tokens);
        let usage = match self.reply.has_usage {
            true => format!(r#","usage":{{"input_tokens":{prompt},"output_tokens":0}}"#),
            false => String::new(),
        };
        format!(
            r#""message":{{"id":{id},"type":"message","role":"assistant","content":[],"model":{model},"stop_reason":null,"stop_sequence":null{usage}}}"#
        )
    }

    fn block_start(&self) -> String {
        let block = match &self.reply.draft.tool {
            Some(tool) => tool_use(tool, "{}"),
            None => r#"{"type":"text","text":""}"#.to_owned(),
        };
        format!(r#""content_block":{block},"index":0"#)
    }

    fn delta(&mut self, out: &mut Vec<u8>) -> Step {
        let text = &self.reply.draft.tokens[self.sent];
        if !text.is_empty() {
            out.extend_from_slice(b"event: content_block_delta\ndata: {\"type\":\"content_block_delta\",\"delta\":");
            out.extend_from_slice(match self.reply.draft.tool {
                Some(_) => br#"{"type":"input_json_delta","partial_json":""#,
                None => br#"{"type":"text_delta","text":""#.as_slice(),
            });
            escape(out, text);
            out.extend_from_slice(b"\"},\"index\":0}\n\n");
        }
        self.sent += 1;
        if self.sent == self.reply.draft.tokens.len() {
            self.stage = Stage::BlockStop;
        }
        Step::Token { waits: true }
    }

    fn message_delta(&self) -> String {
        let stop = self.reply.draft.end.stop_reason();
        let (reason, usage) = (self.reply.stop_reason(), self.reply.usage(self.prompt_tokens, self.cached));
        format!(r#""delta":{{"stop_reason":"{reason}","stop_sequence":{stop}}}{usage}"#)
    }
}

fn event(out: &mut Vec<u8>, name: &str, fields: &str) {
    let comma = if fields.is_empty() { "" } else { "," };
    out.extend_from_slice(format!("event: {name}\ndata: {{\"type\":\"{name}\"{comma}{fields}}}\n\n").as_bytes());
}

impl Source for Stream {
    fn start(&mut self, cached: u64, _created: u64) {
        self.cached = cached;
    }

    fn next(&mut self, out: &mut Vec<u8>) -> Step {
        let stage = self.stage;
        let (name, fields, next) = match stage {
            Stage::MessageStart => ("message_start", self.message_start(), Stage::BlockStart),
            Stage::BlockStart => ("content_block_start", self.block_start(), Stage::Deltas),
            Stage::Deltas => return self.delta(out),
            Stage::BlockStop => ("content_block_stop", r#""index":0"#.to_owned(), Stage::MessageDelta),
            Stage::MessageDelta => ("message_delta", self.message_delta(), Stage::MessageStop),
            Stage::MessageStop => ("message_stop", String::new(), Stage::Over),
            Stage::Over => return Step::Done,
        };
        event(out, name, &fields);
        self.stage = next;
        Step::Event
    }

    fn error(&mut self, out: &mut Vec<u8>) {
        let fields =
            r#""error":{"type":"api_error","message":"Simulated fault: the engine failed while it was answering"}"#;
        event(out, "error", fields);
    }

    fn finish(&self) -> Finish {
        self.reply.draft.end.finish()
    }
}
