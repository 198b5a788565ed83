//! `/generate` and `/generate_stream`: Text Generation Inference's own dialect, and SGLang's `/generate`.

use serde_json::Value;

use super::answer::{Answer, Refusal, Whole};
use super::draft::{self, Draft, End, Wish};
use super::encoding::quoted;
use super::engine::Finish;
use super::events::{Source, Step};
use super::input::{Input, Prompt};
use super::options::Engine;
use super::routes::{self, Call};
use super::tokens;

pub(super) async fn answer(call: &Call) -> Result<Answer, Refusal> {
    match call.engine() {
        Engine::Tgi => generate(call).await,
        Engine::Sglang if call.path == "/generate" => sglang(call).await,
        _ => Ok(routes::not_found().into()),
    }
}

async fn generate(call: &Call) -> Result<Answer, Refusal> {
    let input = Input::parse(&call.body)?;
    input.needed("inputs")?;
    let prompt = Prompt::plain(input.text("inputs")?.unwrap_or_default());
    let parameters = part(&input, "parameters")?;
    let mut wish = Wish::read(call, &parameters, &["max_new_tokens"])?;
    wish.stop = draft::stops(parameters.get("stop"));
    wish.stream = call.path == "/generate_stream" || call.path == "/" && input.flag("stream")?;
    let work = wish.work(&call.server, &prompt.text)?;
    let draft = Draft::words(&wish, &prompt, 0);
    if wish.stream {
        let source = Box::new(Stream { draft, prompt: work.prompt_tokens, sent: 0 });
        return Ok(Answer::Stream { content_type: "text/event-stream", source, work });
    }
    let tokens = draft.len();
    let slot = call.generate(work, tokens, tokens).await;
    slot.finish(draft.end.finish());
    let details = match parameters.flag("details")? {
        true => format!(r#","details":{}"#, details(&draft)),
        false => String::new(),
    };
    let answer = format!(r#"{{"generated_text":{}{details}}}"#, quoted(&draft.text()));
    // The compatible route answers with a list.
    let body = if call.path == "/" { format!("[{answer}]") } else { answer };
    Ok(Whole::json(body).with("x-compute-type", "simulated").with("x-generated-tokens", &tokens.to_string()).into())
}

/// An object within the input; an empty one if it is not there.
fn part(input: &Input, name: &str) -> Result<Input, Refusal> {
    let text = input.get(name).map_or_else(|| "{}".to_owned(), Value::to_string);
    Input::parse(text.as_bytes())
}

fn details(draft: &Draft) -> String {
    let list: Vec<String> = draft.tokens.iter().map(|text| token(text)).collect();
    let (reason, count) = (reason(draft), draft.len());
    format!(
        r#"{{"finish_reason":"{reason}","generated_tokens":{count},"seed":null,"prefill":[],"tokens":[{}]}}"#,
        list.join(",")
    )
}

fn token(text: &str) -> String {
    let id = tokens::hash(text) % 128_000;
    let special = text.is_empty();
    let text_json = quoted(text);
    format!(r#"{{"id":{id},"text":{text_json},"logprob":{:?},"special":{special}}}"#, draft::logprob(text, 0))
}

fn reason(draft: &Draft) -> &'static str {
    match draft.end {
        End::Length => "length",
        End::Stop(_) => "stop_sequence",
        _ => "eos_token",
    }
}

/// The events of `/generate_stream`; the last token's has the whole text.
struct Stream {
    draft: Draft,
    prompt: u64,
    sent: usize,
}

impl Source for Stream {
    fn next(&mut self, out: &mut Vec<u8>) -> Step {
        let Some(text) = self.draft.tokens.get(self.sent) else { return Step::Done };
        self.sent += 1;
        let last = self.sent == self.draft.tokens.len();
        let (whole, details) = match last {
            true => (
                quoted(&self.draft.text()),
                format!(
                    r#"{{"finish_reason":"{}","generated_tokens":{},"seed":null,"input_length":{}}}"#,
                    reason(&self.draft),
                    self.draft.len(),
                    self.prompt
                ),
            ),
            false => ("null".to_owned(), "null".to_owned()),
        };
        let (index, token) = (self.sent, token(text));
        out.extend_from_slice(
            format!(
                "data:{{\"index\":{index},\"token\":{token},\"generated_text\":{whole},\"details\":{details}}}\n\n"
            )
            .as_bytes(),
        );
        Step::Token { waits: true }
    }

    fn error(&mut self, out: &mut Vec<u8>) {
        let error =
            r#"{"error":"Simulated fault: the engine failed while it was answering","error_type":"generation"}"#;
        out.extend_from_slice(format!("data:{error}\n\n").as_bytes());
    }

    fn finish(&self) -> Finish {
        self.draft.end.finish()
    }
}

async fn sglang(call: &Call) -> Result<Answer, Refusal> {
    let input = Input::parse(&call.body)?;
    input.needed("text")?;
    let prompt = Prompt::plain(input.text("text")?.unwrap_or_default());
    let sampling = part(&input, "sampling_params")?;
    let mut wish = Wish::read(call, &sampling, &["max_new_tokens"])?;
    wish.stream = input.flag("stream")?;
    let work = wish.work(&call.server, &prompt.text)?;
    let draft = Draft::words(&wish, &prompt, 0);
    let id = quoted(&draft::hex_id());
    if wish.stream {
        let source =
            Box::new(Growing { draft, id, prompt: work.prompt_tokens, cached: 0, sent: 0, text: String::new() });
        return Ok(Answer::Stream { content_type: "text/event-stream", source, work });
    }
    let (prompt_tokens, tokens) = (work.prompt_tokens, draft.len());
    let slot = call.generate(work, tokens, tokens).await;
    let body = sglang_answer(&id, &draft, &draft.text(), prompt_tokens, slot.cached, draft.tokens.len());
    slot.finish(draft.end.finish());
    Ok(Whole::json(body).into())
}

fn sglang_answer(id: &str, draft: &Draft, text: &str, prompt: u64, cached: u64, sent: usize) -> String {
    let finish = match (&draft.end, sent == draft.tokens.len()) {
        (_, false) => "null".to_owned(),
        (End::Length, true) => format!(r#"{{"type":"length","length":{sent}}}"#),
        (end, true) => format!(r#"{{"type":"stop","matched":{}}}"#, end.stop_reason()),
    };
    format!(
        r#"{{"text":{},"meta_info":{{"id":{id},"finish_reason":{finish},"prompt_tokens":{prompt},"completion_tokens":{sent},"cached_tokens":{cached}}}}}"#,
        quoted(text)
    )
}

/// SGLang's stream: every event has all of the text so far.
struct Growing {
    draft: Draft,
    id: String,
    prompt: u64,
    cached: u64,
    sent: usize,
    text: String,
}

impl Source for Growing {
    fn start(&mut self, cached: u64, _created: u64) {
        self.cached = cached;
    }

    fn next(&mut self, out: &mut Vec<u8>) -> Step {
        let Some(token) = self.draft.tokens.get(self.sent) else {
            if self.sent > self.draft.tokens.len() {
                return Step::Done;
            }
            self.sent += 1;
            out.extend_from_slice(b"data: [DONE]\n\n");
            return Step::Event;
        };
        self.sent += 1;
        self.text.push_str(token);
        let event = sglang_answer(&self.id, &self.draft, &self.text, self.prompt, self.cached, self.sent);
        out.extend_from_slice(format!("data: {event}\n\n").as_bytes());
        Step::Token { waits: true }
    }

    fn error(&mut self, out: &mut Vec<u8>) {
        super::chat::stream_error(out, Engine::Sglang);
    }

    fn finish(&self) -> Finish {
        self.draft.end.finish()
    }
}
