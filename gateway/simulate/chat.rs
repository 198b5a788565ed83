//! `/v1/chat/completions`.

use serde_json::{Value, json};

use super::answer::{Answer, EVENT_STREAM, Refusal, Whole, unix_seconds};
use super::draft::{self, Draft, Wish};
use super::encoding::{escape, quoted};
use super::engine::{Finish, Slot};
use super::events::{Source, Step};
use super::input::{Input, Prompt};
use super::options::Engine;
use super::routes::Call;
use super::schema;

pub(super) async fn answer(call: &Call) -> Result<Answer, Refusal> {
    let input = Input::parse(&call.body)?;
    let mut wish = Wish::read(call, &input, &["max_completion_tokens", "max_tokens"])?;
    wish.logprobs = logprobs(&input)?;
    let prompt = prompt(&input)?;
    let work = wish.work(&call.server, &prompt.text)?;
    let drafts: Vec<Draft> = (0..wish.choices).map(|choice| draft(&input, &wish, &prompt, choice)).collect();
    let head = Head::new(call, &wish);
    if wish.stream {
        let source = Box::new(Stream::new(head, wish, drafts, work.prompt_tokens));
        return Ok(Answer::Stream { content_type: EVENT_STREAM, source, work });
    }
    let (tokens, longest) = lengths(&drafts);
    let prompt_tokens = work.prompt_tokens;
    let slot = call.generate(work, tokens, longest).await;
    let usage = Usage::new(prompt_tokens, tokens, &slot, reasoning(&drafts));
    let body = head.whole(&drafts, &wish, (!call.trouble.no_usage).then_some(usage));
    slot.finish(drafts.first().map_or(Finish::Stop, |draft| draft.end.finish()));
    Ok(Whole::json(body).into())
}

/// All tokens, and those of the longest answer.
pub(super) fn lengths(drafts: &[Draft]) -> (u64, u64) {
    let lengths = || drafts.iter().map(Draft::len);
    (lengths().sum(), lengths().max().unwrap_or(0))
}

fn reasoning(drafts: &[Draft]) -> u64 {
    drafts.iter().map(|draft| draft.reasoning.len() as u64).sum()
}

fn logprobs(input: &Input) -> Result<Option<usize>, Refusal> {
    let top = input.integer("top_logprobs")?.unwrap_or(0);
    if !(0..=20).contains(&top) {
        return Err(Refusal::value("top_logprobs", "top_logprobs must be in [0, 20]", top));
    }
    Ok(input.flag("logprobs")?.then_some(top as usize))
}

/// The messages as one text, with the tools before them.
pub(super) fn prompt(input: &Input) -> Result<Prompt, Refusal> {
    let mut prompt = Prompt::default();
    for tool in input.list("tools")? {
        prompt.text.push_str(&tool.to_string());
        prompt.text.push('\n');
    }
    input.needed("messages")?;
    let messages = input.list("messages")?;
    if messages.is_empty() {
        return Err(Refusal::new(400, "messages must not be empty").about("messages"));
    }
    for message in messages {
        let role = message.get("role").and_then(Value::as_str);
        let role = role.ok_or_else(|| Refusal::new(400, "every message needs a role").about("messages"))?;
        prompt.message(role, message.get("content"));
        if let Some(calls) = message.get("tool_calls") {
            prompt.text.push_str(&calls.to_string());
        }
    }
    if input.get("add_generation_prompt") != Some(&Value::Bool(false)) {
        prompt.text.push_str("assistant:");
    }
    Ok(prompt)
}

fn draft(input: &Input, wish: &Wish, prompt: &Prompt, choice: u32) -> Draft {
    if let Some((name, parameters)) = tool(input, prompt) {
        return Draft::call(&name, &parameters, prompt, wish);
    }
    match input.get("response_format").and_then(|format| structured(format, prompt)) {
        Some(text) => Draft::fixed(&text, wish),
        None => Draft::words(wish, prompt, choice),
    }
}

/// The tool to call: the named one, or the first one unless it was just called or none may be.
fn tool(input: &Input, prompt: &Prompt) -> Option<(String, Value)> {
    let tools = input.list("tools").ok()?;
    let choice = input.get("tool_choice");
    let forced = choice.is_some_and(|choice| choice == "required" || choice.is_object());
    if choice.is_some_and(|choice| choice == "none") || prompt.after_tool && !forced {
        return None;
    }
    let name = |tool: &Value| tool.pointer("/function/name").and_then(Value::as_str).map(str::to_owned);
    let wanted = choice.and_then(name);
    let chosen = tools.iter().find(|tool| wanted.is_none() || name(tool) == wanted)?;
    let parameters = chosen.pointer("/function/parameters").cloned().unwrap_or_else(|| json!({}));
    Some((name(chosen)?, parameters))
}

/// The JSON that a `response_format` asks for, Responses' `text.format` included.
pub(super) fn structured(format: &Value, prompt: &Prompt) -> Option<String> {
    let hint = draft::subject(&prompt.said);
    match format.get("type").and_then(Value::as_str)? {
        "json_object" => Some(json!({"answer": prompt.said, "simulated": true}).to_string()),
        "json_schema" => {
            let wrapped = format.get("json_schema").unwrap_or(format);
            Some(schema::example(wrapped.get("schema")?, hint).to_string())
        }
        _ => None,
    }
}

/// Tokens of the prompt, of the answer, found in the cache, added to it, and spent on reasoning.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Usage {
    pub(super) prompt: u64,
    pub(super) completion: u64,
    pub(super) cached: u64,
    pub(super) created: u64,
    pub(super) reasoning: u64,
}

impl Usage {
    pub(super) fn new(prompt: u64, completion: u64, slot: &Slot, reasoning: u64) -> Self {
        Self { prompt, completion, cached: slot.cached, created: slot.created, reasoning }
    }

    fn counts(&self) -> String {
        let total = self.prompt + self.completion;
        format!(r#""prompt_tokens":{},"total_tokens":{total},"completion_tokens":{}"#, self.prompt, self.completion)
    }

    fn completion_details(&self) -> String {
        match self.reasoning {
            0 => "null".to_owned(),
            reasoning => format!(r#"{{"reasoning_tokens":{reasoning}}}"#),
        }
    }

    /// As the whole of an answer ends with it.
    pub(super) fn whole(&self, engine: Engine, created: bool) -> String {
        match engine {
            Engine::Vllm => {
                let created = if created { self.created.to_string() } else { "null".to_owned() };
                format!(
                    r#"{{{},"prompt_tokens_details":{{"cached_tokens":{},"created_cache_tokens":{created},"multimodal_tokens":null}},"completion_tokens_details":{}}}"#,
                    self.counts(),
                    self.cached,
                    self.completion_details()
                )
            }
            other => self.foreign(other),
        }
    }

    /// As a stream ends with it.
    fn last(&self, engine: Engine) -> String {
        match engine {
            Engine::Vllm => {
                let (counts, cached, created) = (self.counts(), self.cached, self.created);
                let reasoning = match self.reasoning {
                    0 => String::new(),
                    _ => format!(r#","completion_tokens_details":{}"#, self.completion_details()),
                };
                format!(
                    r#"{{{counts},"prompt_tokens_details":{{"cached_tokens":{cached},"created_cache_tokens":{created}}}{reasoning}}}"#
                )
            }
            other => self.foreign(other),
        }
    }

    /// As it is in other engines.
    fn foreign(&self, engine: Engine) -> String {
        let (prompt, completion, total) = (self.prompt, self.completion, self.prompt + self.completion);
        let (cached, reasoning) = (self.cached, self.reasoning);
        match engine {
            Engine::Tgi => {
                format!(r#"{{"prompt_tokens":{prompt},"completion_tokens":{completion},"total_tokens":{total}}}"#)
            }
            Engine::Sglang => format!(
                r#"{{"prompt_tokens":{prompt},"total_tokens":{total},"completion_tokens":{completion},"prompt_tokens_details":{{"cached_tokens":{cached}}},"reasoning_tokens":{reasoning}}}"#
            ),
            _ => format!(
                r#"{{"prompt_tokens":{prompt},"completion_tokens":{completion},"total_tokens":{total},"prompt_tokens_details":{{"cached_tokens":{cached},"audio_tokens":0}},"completion_tokens_details":{{"reasoning_tokens":{reasoning},"audio_tokens":0,"accepted_prediction_tokens":0,"rejected_prediction_tokens":0}}}}"#
            ),
        }
    }
}

/// What all parts of an answer begin with.
struct Head {
    engine: Engine,
    id: String,
    created: u64,
    model: String,
    fingerprint: String,
}

impl Head {
    fn new(call: &Call, wish: &Wish) -> Self {
        let id = match call.engine() {
            Engine::Tgi => String::new(),
            Engine::Sglang => draft::hex_id(),
            _ => call.id("chatcmpl-"),
        };
        Self {
            engine: call.engine(),
            id: quoted(&id),
            created: unix_seconds(),
            model: quoted(&wish.model),
            fingerprint: call.fingerprint(),
        }
    }

    fn whole(&self, drafts: &[Draft], wish: &Wish, usage: Option<Usage>) -> String {
        let Self { id, created, model, fingerprint, .. } = self;
        let choices: Vec<String> =
            drafts.iter().enumerate().map(|(index, draft)| self.choice(index, draft, wish)).collect();
        let choices = choices.join(",");
        let head = format!(
            r#"{{"id":{id},"object":"chat.completion","created":{created},"model":{model},"choices":[{choices}]"#
        );
        let usage = usage.map_or_else(String::new, |usage| format!(r#","usage":{}"#, usage.whole(self.engine, true)));
        match self.engine {
            Engine::Vllm => format!(
                r#"{head},"service_tier":null,"system_fingerprint":"{fingerprint}"{usage},"prompt_logprobs":null,"prompt_token_ids":null,"prompt_text":null,"kv_transfer_params":null,"ec_transfer_params":null,"metrics":null}}"#
            ),
            Engine::Sglang => format!(r#"{head}{usage},"metadata":{{"weight_version":"simulated"}}}}"#),
            Engine::Tgi => format!(r#"{head},"system_fingerprint":"{fingerprint}"{usage}}}"#),
            Engine::Openai => {
                format!(r#"{head}{usage},"service_tier":"default","system_fingerprint":"{fingerprint}"}}"#)
            }
        }
    }

    fn choice(&self, index: usize, draft: &Draft, wish: &Wish) -> String {
        let content = match draft.tool {
            Some(_) => "null".to_owned(),
            None => quoted(&draft.text()),
        };
        let calls = draft.tool.as_ref().map(|tool| {
            let (id, name, arguments) = (quoted(&tool.id), quoted(&tool.name), quoted(&draft.text()));
            format!(r#"[{{"id":{id},"type":"function","function":{{"name":{name},"arguments":{arguments}}}}}]"#)
        });
        let thought = match draft.reasoning.is_empty() {
            true => "null".to_owned(),
            false => quoted(&draft.reasoning.concat()),
        };
        let logprobs = wish.logprobs.map_or_else(|| "null".to_owned(), |top| all_logprobs(draft, top));
        let (finish, stop) = (draft.end.reason(), draft.end.stop_reason());
        let with = |name: &str| calls.as_ref().map_or_else(String::new, |calls| format!(r#","{name}":{calls}"#));
        match self.engine {
            Engine::Vllm => format!(
                r#"{{"index":{index},"message":{{"role":"assistant","content":{content},"refusal":null,"annotations":null,"audio":null,"function_call":null{},"reasoning":{thought}}},"logprobs":{logprobs},"finish_reason":"{finish}","stop_reason":{stop},"token_ids":null,"routed_experts":null}}"#,
                with("tool_calls")
            ),
            Engine::Sglang => format!(
                r#"{{"index":{index},"message":{{"role":"assistant","content":{content},"reasoning_content":{thought},"tool_calls":{}}},"logprobs":{logprobs},"finish_reason":"{finish}","matched_stop":{stop}}}"#,
                calls.as_deref().unwrap_or("null")
            ),
            Engine::Tgi => format!(
                r#"{{"index":{index},"message":{{"role":"assistant","content":{content}{}}},"logprobs":{logprobs},"finish_reason":"{finish}"}}"#,
                with("tool_calls")
            ),
            Engine::Openai => format!(
                r#"{{"index":{index},"message":{{"role":"assistant","content":{content}{},"refusal":null,"annotations":[]}},"logprobs":{logprobs},"finish_reason":"{finish}"}}"#,
                with("tool_calls")
            ),
        }
    }
}

fn all_logprobs(draft: &Draft, top: usize) -> String {
    let mut out = br#"{"content":["#.to_vec();
    for (at, token) in draft.tokens.iter().enumerate() {
        if at > 0 {
            out.push(b',');
        }
        draft::chat_logprob_entry(&mut out, token, top);
    }
    out.extend_from_slice(b"]}");
    String::from_utf8(out).unwrap_or_default()
}

/// The chunks of a streamed answer.
struct Stream {
    head: Head,
    wish: Wish,
    drafts: Vec<Draft>,
    /// How many tokens of each choice were sent.
    sent: Vec<usize>,
    turn: usize,
    stage: Stage,
    usage: Usage,
    /// What every chunk begins with, up to the index of its choice.
    prefix: Vec<u8>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Roles(usize),
    Tokens,
    Usage,
    Done,
    Over,
}

impl Stream {
    fn new(head: Head, wish: Wish, drafts: Vec<Draft>, prompt: u64) -> Self {
        let prefix = head.prefix();
        let usage = Usage { prompt, reasoning: reasoning(&drafts), ..Usage::default() };
        let sent = vec![0; drafts.len()];
        Self { head, wish, drafts, sent, turn: 0, stage: Stage::Roles(0), usage, prefix }
    }

    fn role(&mut self, out: &mut Vec<u8>, index: usize) {
        out.extend_from_slice(&self.prefix);
        let delta = match self.head.engine {
            Engine::Openai => r#"{"role":"assistant","content":"","refusal":null}"#,
            Engine::Sglang => r#"{"role":"assistant","content":"","reasoning_content":null,"tool_calls":null}"#,
            _ => r#"{"role":"assistant","content":""}"#,
        };
        out.extend_from_slice(format!(r#"{index},"delta":{delta},"logprobs":null,"finish_reason":null"#).as_bytes());
        if self.head.engine == Engine::Sglang {
            out.extend_from_slice(br#","matched_stop":null"#);
        }
        out.extend_from_slice(b"}]");
        self.chunk_usage(out);
        if self.head.engine == Engine::Vllm {
            out.extend_from_slice(br#","prompt_token_ids":null,"prompt_text":null"#);
        }
        out.extend_from_slice(b"}\n\n");
        self.stage = if index + 1 < self.drafts.len() { Stage::Roles(index + 1) } else { Stage::Tokens };
    }

    /// The usage that every chunk has, by wish or by the engine's custom.
    fn chunk_usage(&self, out: &mut Vec<u8>) {
        match self.head.engine {
            Engine::Vllm if self.wish.continuous_usage => {
                let usage = format!(r#","usage":{{{},"completion_tokens_details":null}}"#, self.usage.counts());
                out.extend_from_slice(usage.as_bytes());
            }
            Engine::Vllm => {}
            _ if self.wish.include_usage => out.extend_from_slice(br#","usage":null"#),
            _ => {}
        }
    }

    fn token(&mut self, out: &mut Vec<u8>) -> Step {
        let index = self.turn;
        let at = self.sent[index];
        self.sent[index] += 1;
        self.usage.completion += 1;
        let draft = &self.drafts[index];
        let last = self.sent[index] as u64 == draft.len();
        out.extend_from_slice(&self.prefix);
        out.extend_from_slice(index.to_string().as_bytes());
        out.extend_from_slice(br#","delta":"#);
        delta(out, self.head.engine, draft, at, last);
        out.extend_from_slice(br#","logprobs":"#);
        match (self.wish.logprobs, content(draft, at)) {
            (Some(top), Some(text)) => draft::chat_logprobs(out, text, top),
            _ => out.extend_from_slice(b"null"),
        }
        self.end_of_choice(out, index, last);
        self.chunk_usage(out);
        if last && self.head.engine == Engine::Vllm && !self.wish.include_usage {
            out.extend_from_slice(format!(r#","system_fingerprint":"{}""#, self.head.fingerprint).as_bytes());
        }
        out.extend_from_slice(b"}\n\n");
        self.next_turn();
        Step::Token { waits: index == 0 || self.drafts.len() == 1 }
    }

    fn end_of_choice(&self, out: &mut Vec<u8>, index: usize, last: bool) {
        if !last {
            out.extend_from_slice(match self.head.engine {
                Engine::Vllm => br#","finish_reason":null,"token_ids":null}]"#,
                Engine::Sglang => br#","finish_reason":null,"matched_stop":null}]"#,
                _ => br#","finish_reason":null}]"#.as_slice(),
            });
            return;
        }
        let end = &self.drafts[index].end;
        let (reason, stop) = (end.reason(), end.stop_reason());
        let text = match self.head.engine {
            Engine::Vllm => format!(r#","finish_reason":"{reason}","stop_reason":{stop},"token_ids":null}}]"#),
            Engine::Sglang => format!(r#","finish_reason":"{reason}","matched_stop":{stop}}}]"#),
            _ => format!(r#","finish_reason":"{reason}"}}]"#),
        };
        out.extend_from_slice(text.as_bytes());
    }

    /// Choices take turns; those that are complete are passed over.
    fn next_turn(&mut self) {
        let choices = self.drafts.len();
        let open = |index: usize| (self.sent[index] as u64) < self.drafts[index].len();
        let next = (1..=choices).map(|step| (self.turn + step) % choices).find(|index| open(*index));
        match next {
            Some(index) => self.turn = index,
            None => self.stage = Stage::Usage,
        }
    }

    fn usage(&self, out: &mut Vec<u8>) {
        let usage = self.usage.last(self.head.engine);
        // The prefix ends within the list of choices: this one is empty.
        let list = br#"{"index":"#.len();
        out.extend_from_slice(&self.prefix[..self.prefix.len() - list]);
        out.extend_from_slice(format!(r#"],"usage":{usage}"#).as_bytes());
        if self.head.engine == Engine::Vllm {
            out.extend_from_slice(format!(r#","system_fingerprint":"{}""#, self.head.fingerprint).as_bytes());
        }
        out.extend_from_slice(b"}\n\n");
    }
}

/// The text of the content token at `at`, if that is what it is.
fn content(draft: &Draft, at: usize) -> Option<&str> {
    let at = at.checked_sub(draft.reasoning.len())?;
    draft.tokens.get(at).map(|token| &**token).filter(|_| draft.tool.is_none())
}

/// What one token adds to a message.
fn delta(out: &mut Vec<u8>, engine: Engine, draft: &Draft, at: usize, last: bool) {
    let Some(at) = at.checked_sub(draft.reasoning.len()) else {
        let name: &[u8] = if engine == Engine::Vllm { br#"{"reasoning":""# } else { br#"{"reasoning_content":""# };
        return field(out, name, &draft.reasoning[at]);
    };
    let text = &*draft.tokens[at];
    if text.is_empty() && last && engine == Engine::Openai {
        return out.extend_from_slice(b"{}");
    }
    match &draft.tool {
        Some(_) if at > 0 && last && text.is_empty() => out.extend_from_slice(br#"{"content":""}"#),
        Some(tool) if at == 0 => {
            let (id, name, text) = (quoted(&tool.id), quoted(&tool.name), quoted(text));
            out.extend_from_slice(
                format!(r#"{{"tool_calls":[{{"id":{id},"type":"function","index":0,"function":{{"name":{name},"arguments":{text}}}}}]}}"#)
                    .as_bytes(),
            );
        }
        Some(_) => {
            out.extend_from_slice(br#"{"tool_calls":[{"index":0,"function":{"arguments":""#);
            escape(out, text);
            out.extend_from_slice(br#""}}]}"#);
        }
        None if engine == Engine::Sglang => {
            out.extend_from_slice(br#"{"role":null,"content":""#);
            escape(out, text);
            out.extend_from_slice(br#"","reasoning_content":null,"tool_calls":null}"#);
        }
        None if engine == Engine::Tgi => field(out, br#"{"role":"assistant","content":""#, text),
        None => field(out, br#"{"content":""#, text),
    }
}

fn field(out: &mut Vec<u8>, before: &[u8], text: &str) {
    out.extend_from_slice(before);
    escape(out, text);
    out.extend_from_slice(br#""}"#);
}

impl Head {
    fn prefix(&self) -> Vec<u8> {
        let Self { id, created, model, fingerprint, .. } = self;
        let middle = match self.engine {
            Engine::Openai => format!(r#","service_tier":"default","system_fingerprint":"{fingerprint}""#),
            Engine::Tgi => format!(r#","system_fingerprint":"{fingerprint}""#),
            _ => String::new(),
        };
        format!(
            r#"data: {{"id":{id},"object":"chat.completion.chunk","created":{created},"model":{model}{middle},"choices":[{{"index":"#
        )
        .into_bytes()
    }
}

impl Source for Stream {
    fn start(&mut self, cached: u64, created: u64) {
        self.usage.cached = cached;
        self.usage.created = created;
    }

    fn next(&mut self, out: &mut Vec<u8>) -> Step {
        match self.stage {
            Stage::Roles(index) => self.role(out, index),
            Stage::Tokens => return self.token(out),
            Stage::Usage if self.wish.include_usage => {
                self.usage(out);
                self.stage = Stage::Done;
            }
            Stage::Usage | Stage::Done => {
                out.extend_from_slice(b"data: [DONE]\n\n");
                self.stage = Stage::Over;
            }
            Stage::Over => return Step::Done,
        }
        Step::Event
    }

    fn error(&mut self, out: &mut Vec<u8>) {
        stream_error(out, self.head.engine);
    }

    fn finish(&self) -> Finish {
        self.drafts.first().map_or(Finish::Stop, |draft| draft.end.finish())
    }
}

/// An error in the engine, told in a stream of OpenAI's shape.
pub(super) fn stream_error(out: &mut Vec<u8>, engine: Engine) {
    let refusal = Refusal::new(500, "Simulated fault: the engine failed while it was answering");
    out.extend_from_slice(format!("data: {}\n\n", refusal.body(engine, "/v1/")).as_bytes());
    if engine == Engine::Vllm {
        out.extend_from_slice(b"data: [DONE]\n\n");
    }
}
