//! `/v1/responses`.

use serde_json::{Value, json};

use super::answer::{Answer, EVENT_STREAM, Refusal, Whole, unix_seconds};
use super::chat;
use super::draft::{Draft, End, Wish, hex_id};
use super::encoding::quoted;
use super::engine::Finish;
use super::events::{Source, Step};
use super::input::{Input, Prompt};
use super::routes::Call;

pub(super) async fn answer(call: &Call) -> Result<Answer, Refusal> {
    let input = Input::parse(&call.body)?;
    let mut wish = Wish::read(call, &input, &["max_output_tokens"])?;
    wish.choices = 1;
    let prompt = prompt(&input)?;
    let work = wish.work(&call.server, &prompt.text)?;
    let draft = draft(&input, &wish, &prompt);
    let longest = call.server.options.max_model_len;
    let reply = Reply::new(call, &input, &wish, draft, longest - work.prompt_tokens);
    if wish.stream {
        let source = Box::new(Stream { prompt_tokens: work.prompt_tokens, ..Stream::new(reply) });
        return Ok(Answer::Stream { content_type: EVENT_STREAM, source, work });
    }
    let (prompt_tokens, tokens) = (work.prompt_tokens, reply.draft.len());
    let slot = call.generate(work, tokens, tokens).await;
    let body = reply.finished(prompt_tokens, slot.cached);
    slot.finish(reply.draft.end.finish());
    Ok(Whole::json(body).into())
}

/// The input as one text: instructions and tools first.
fn prompt(input: &Input) -> Result<Prompt, Refusal> {
    let mut prompt = Prompt::default();
    for tool in input.list("tools")? {
        prompt.text.push_str(&tool.to_string());
        prompt.text.push('\n');
    }
    if let Some(instructions) = input.get("instructions") {
        prompt.message("system", Some(instructions));
    }
    match input.needed("input")? {
        Value::Array(items) => items.iter().for_each(|item| add_item(&mut prompt, item)),
        text => prompt.message("user", Some(text)),
    }
    prompt.text.push_str("assistant:");
    Ok(prompt)
}

fn add_item(prompt: &mut Prompt, item: &Value) {
    let field = |name: &str| item.get(name).and_then(Value::as_str);
    match field("type").unwrap_or("message") {
        "function_call_output" => prompt.message("tool", item.get("output")),
        "function_call" => prompt.message("assistant", Some(&item.to_string().into())),
        _ => prompt.message(field("role").unwrap_or("user"), item.get("content")),
    }
}

fn draft(input: &Input, wish: &Wish, prompt: &Prompt) -> Draft {
    if let Some((name, parameters)) = tool(input, prompt) {
        return Draft::call(&name, &parameters, prompt, wish);
    }
    let format = input.get("text").and_then(|text| text.get("format"));
    match format.and_then(|format| chat::structured(format, prompt)) {
        Some(text) => Draft::fixed(&text, wish),
        None => Draft::words(wish, prompt, 0),
    }
}

/// As in chat, but tools and the choice of one are flat here.
fn tool(input: &Input, prompt: &Prompt) -> Option<(String, Value)> {
    let choice = input.get("tool_choice");
    let forced = choice.is_some_and(|choice| choice == "required" || choice.is_object());
    if choice.is_some_and(|choice| choice == "none") || prompt.after_tool && !forced {
        return None;
    }
    let name = |tool: &Value| tool.get("name").and_then(Value::as_str).map(str::to_owned);
    let wanted = choice.and_then(name);
    let callable = |tool: &&Value| tool.get("type").is_some_and(|kind| kind == "function");
    let tools = input.list("tools").ok()?.iter().filter(callable);
    let chosen = tools.into_iter().find(|tool| wanted.is_none() || name(tool) == wanted)?;
    let parameters = chosen.get("parameters").cloned().unwrap_or_else(|| json!({}));
    Some((name(chosen)?, parameters))
}

/// What of an answer is known before it is generated, and the draft.
struct Reply {
    id: String,
    item: String,
    call: String,
    created: u64,
    /// The fields from `instructions` on that only repeat the request, as JSON members.
    model: String,
    instructions: String,
    metadata: String,
    temperature: f64,
    top_p: f64,
    tool_choice: String,
    tools: String,
    text: String,
    user: String,
    parallel: bool,
    max_tokens: u64,
    has_usage: bool,
    draft: Draft,
}

impl Reply {
    fn new(call: &Call, input: &Input, wish: &Wish, draft: Draft, room: u64) -> Self {
        let or_null = |name: &str| input.get(name).map_or_else(|| "null".to_owned(), Value::to_string);
        let tools = input.get("tools");
        let implied = if tools.is_some() { "auto" } else { "none" };
        Self {
            id: quoted(&call.id("resp_")),
            item: quoted(&format!("{}{}", if draft.tool.is_some() { "fc_" } else { "msg_" }, hex_id())),
            call: quoted(&format!("call_{}", hex_id())),
            created: unix_seconds(),
            model: quoted(&wish.model),
            instructions: or_null("instructions"),
            metadata: or_null("metadata"),
            temperature: input.get("temperature").and_then(Value::as_f64).unwrap_or(1.0),
            top_p: input.get("top_p").and_then(Value::as_f64).unwrap_or(1.0),
            tool_choice: input.get("tool_choice").map_or_else(|| quoted(implied), Value::to_string),
            tools: tools.map_or_else(|| "[]".to_owned(), Value::to_string),
            text: or_null("text"),
            user: or_null("user"),
            parallel: input.get("parallel_tool_calls").and_then(Value::as_bool).unwrap_or(true),
            max_tokens: wish.max_tokens.unwrap_or(room),
            has_usage: !call.trouble.no_usage,
            draft,
        }
    }

    /// The response object.
    fn response(&self, status: &str, output: &str, details: &str, usage: &str) -> String {
        let Self { id, created, model, instructions, metadata, temperature, top_p, tool_choice, tools, .. } = self;
        let Self { text, user, parallel, max_tokens, .. } = self;
        let usage = if self.has_usage { format!(r#""usage":{usage},"#) } else { String::new() };
        format!(
            r#"{{"id":{id},"created_at":{created},"incomplete_details":{details},"instructions":{instructions},"metadata":{metadata},"model":{model},"object":"response","output":[{output}],"parallel_tool_calls":{parallel},"temperature":{temperature:?},"tool_choice":{tool_choice},"tools":{tools},"top_p":{top_p:?},"background":false,"max_output_tokens":{max_tokens},"max_tool_calls":null,"previous_response_id":null,"prompt":null,"reasoning":null,"service_tier":"auto","status":"{status}","text":{text},"top_logprobs":null,"truncation":"disabled",{usage}"user":{user},"presence_penalty":0.0,"frequency_penalty":0.0,"kv_transfer_params":null,"ec_transfer_params":null,"input_messages":null,"output_messages":null}}"#
        )
    }

    fn finished(&self, prompt: u64, cached: u64) -> String {
        let (status, details) = match self.draft.end {
            End::Length => ("incomplete", r#"{"reason":"max_output_tokens"}"#),
            End::Filter => ("incomplete", r#"{"reason":"content_filter"}"#),
            _ => ("completed", "null"),
        };
        let output = self.draft.len();
        let total = prompt + output;
        let usage = format!(
            r#"{{"input_tokens":{prompt},"input_tokens_details":{{"cached_tokens":{cached},"cache_write_tokens":0,"input_tokens_per_turn":[],"cached_tokens_per_turn":[]}},"output_tokens":{output},"output_tokens_details":{{"reasoning_tokens":0,"tool_output_tokens":0,"output_tokens_per_turn":[],"tool_output_tokens_per_turn":[]}},"total_tokens":{total}}}"#
        );
        self.response(status, &self.item("completed"), details, &usage)
    }

    /// The one item of the output.
    fn item(&self, status: &str) -> String {
        let (id, done) = (&self.item, status == "completed");
        if let Some(tool) = &self.draft.tool {
            let arguments = if done { quoted(&self.draft.text()) } else { quoted("") };
            let (call, name) = (&self.call, quoted(&tool.name));
            return format!(
                r#"{{"arguments":{arguments},"call_id":{call},"name":{name},"type":"function_call","id":{id},"status":"{status}"}}"#
            );
        }
        let content = if done { self.part(&self.draft.text(), "null") } else { String::new() };
        format!(
            r#"{{"id":{id},"content":[{content}],"role":"assistant","status":"{status}","type":"message","phase":null}}"#
        )
    }

    fn part(&self, text: &str, logprobs: &str) -> String {
        format!(r#"{{"annotations":[],"text":{},"type":"output_text","logprobs":{logprobs}}}"#, quoted(text))
    }
}

/// The events of a streamed answer.
struct Stream {
    reply: Reply,
    prompt_tokens: u64,
    cached: u64,
    /// Every event has a number.
    number: u64,
    sent: usize,
    stage: Stage,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    ItemAdded,
    PartAdded,
    Deltas,
    TextDone,
    PartDone,
    ItemDone,
    Completed,
    Over,
}

impl Stream {
    fn new(reply: Reply) -> Self {
        Self { reply, prompt_tokens: 0, cached: 0, number: 0, sent: 0, stage: Stage::ItemAdded }
    }

    /// Appends an event; `fields` come before its number and name.
    fn event(&mut self, out: &mut Vec<u8>, name: &str, fields: &str) {
        let number = self.number;
        self.number += 1;
        out.extend_from_slice(b"event: ");
        out.extend_from_slice(name.as_bytes());
        out.extend_from_slice(b"\ndata: {");
        out.extend_from_slice(fields.as_bytes());
        out.extend_from_slice(format!("\"sequence_number\":{number}").as_bytes());
        // The text comes between the number and the name: the fields are in the order of the alphabet.
        if name == "response.output_text.done" {
            out.extend_from_slice(format!(r#","text":{}"#, quoted(&self.reply.draft.text())).as_bytes());
        }
        out.extend_from_slice(br#","type":""#);
        out.extend_from_slice(name.as_bytes());
        out.extend_from_slice(b"\"}\n\n");
    }

    fn is_call(&self) -> bool {
        self.reply.draft.tool.is_some()
    }

    fn delta(&mut self, out: &mut Vec<u8>) -> Step {
        let text = self.reply.draft.tokens[self.sent].clone();
        self.sent += 1;
        if self.sent == self.reply.draft.tokens.len() {
            self.stage = Stage::TextDone;
        }
        if !text.is_empty() {
            let (delta, item) = (quoted(&text), self.reply.item.clone());
            match self.is_call() {
                true => {
                    let fields = format!(r#""delta":{delta},"item_id":{item},"output_index":0,"#);
                    self.event(out, "response.function_call_arguments.delta", &fields);
                }
                false => {
                    let fields = format!(
                        r#""content_index":0,"delta":{delta},"item_id":{item},"logprobs":[],"output_index":0,"#
                    );
                    self.event(out, "response.output_text.delta", &fields);
                }
            }
        }
        Step::Token { waits: true }
    }

    fn text_done(&mut self, out: &mut Vec<u8>) {
        let item = self.reply.item.clone();
        if self.is_call() {
            let arguments = quoted(&self.reply.draft.text());
            let name = self.reply.draft.tool.as_ref().map_or_else(String::new, |tool| quoted(&tool.name));
            let fields = format!(r#""arguments":{arguments},"item_id":{item},"name":{name},"output_index":0,"#);
            return self.event(out, "response.function_call_arguments.done", &fields);
        }
        let fields = format!(r#""content_index":0,"item_id":{item},"logprobs":[],"output_index":0,"#);
        self.event(out, "response.output_text.done", &fields);
    }

    fn part(&mut self, out: &mut Vec<u8>, name: &str, part: &str) {
        let item = self.reply.item.clone();
        let fields = format!(r#""content_index":0,"item_id":{item},"output_index":0,"part":{part},"#);
        self.event(out, name, &fields);
    }
}

impl Source for Stream {
    fn opening(&mut self, out: &mut Vec<u8>) {
        let response = format!(r#""response":{},"#, self.reply.response("in_progress", "", "null", "null"));
        self.event(out, "response.created", &response);
        self.event(out, "response.in_progress", &response);
    }

    fn start(&mut self, cached: u64, _created: u64) {
        self.cached = cached;
    }

    fn next(&mut self, out: &mut Vec<u8>) -> Step {
        let (stage, call) = (self.stage, self.is_call());
        self.stage = match stage {
            Stage::ItemAdded if call => Stage::Deltas,
            Stage::ItemAdded => Stage::PartAdded,
            Stage::PartAdded | Stage::Deltas => Stage::Deltas,
            Stage::TextDone if call => Stage::ItemDone,
            Stage::TextDone => Stage::PartDone,
            Stage::PartDone => Stage::ItemDone,
            Stage::ItemDone => Stage::Completed,
            Stage::Completed | Stage::Over => Stage::Over,
        };
        match stage {
            Stage::ItemAdded => {
                let fields = format!(r#""item":{},"output_index":0,"#, self.reply.item("in_progress"));
                self.event(out, "response.output_item.added", &fields);
            }
            Stage::PartAdded => {
                let part = self.reply.part("", "[]");
                self.part(out, "response.content_part.added", &part);
            }
            Stage::Deltas => return self.delta(out),
            Stage::TextDone => self.text_done(out),
            Stage::PartDone => {
                let part = self.reply.part(&self.reply.draft.text(), "null");
                self.part(out, "response.content_part.done", &part);
            }
            Stage::ItemDone => {
                let fields = format!(r#""item":{},"output_index":0,"#, self.reply.item("completed"));
                self.event(out, "response.output_item.done", &fields);
            }
            Stage::Completed => {
                let fields = format!(r#""response":{},"#, self.reply.finished(self.prompt_tokens, self.cached));
                self.event(out, "response.completed", &fields);
            }
            Stage::Over => return Step::Done,
        }
        Step::Event
    }

    fn error(&mut self, out: &mut Vec<u8>) {
        let fields = r#""code":"server_error","message":"Simulated fault: the engine failed while it was answering","param":null,"#;
        self.event(out, "error", fields);
    }

    fn finish(&self) -> Finish {
        self.reply.draft.end.finish()
    }
}
