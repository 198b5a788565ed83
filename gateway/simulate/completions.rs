//! `/v1/completions`.

use std::borrow::Cow;

use super::answer::{Answer, EVENT_STREAM, Refusal, Whole, unix_seconds};
use super::chat::{Usage, lengths, stream_error};
use super::draft::{self, Draft, Wish};
use super::encoding::{escape, quoted};
use super::engine::Finish;
use super::events::{Source, Step};
use super::input::{Input, Prompt, Text, texts};
use super::options::Engine;
use super::routes::Call;

/// More alternatives a token than this are refused.
const MOST_LOGPROBS: i64 = 20;

pub(super) async fn answer(call: &Call) -> Result<Answer, Refusal> {
    let input = Input::parse(&call.body)?;
    let mut wish = Wish::read(call, &input, &["max_tokens"])?;
    wish.logprobs = logprobs(&input)?;
    let prompts = texts(input.needed("prompt")?, "prompt")?;
    // Every prompt gets `n` choices, all of them numbered through.
    let all: String = prompts.iter().map(|prompt| prompt.text.as_str()).collect();
    let each = wish.choices;
    wish.choices *= prompts.len() as u32;
    let mut work = wish.work(&call.server, &all)?;
    work.prompt_tokens = prompts.iter().map(|prompt| prompt.tokens).sum();
    let echo = input.flag("echo")?;
    let drafts: Vec<Draft> = prompts.iter().flat_map(|prompt| choices(&wish, prompt, each, echo)).collect();
    let generated: u64 = drafts.iter().map(Draft::len).sum::<u64>() - if echo { drafts.len() as u64 } else { 0 };
    let head = Head {
        engine: call.engine(),
        id: quoted(&call.id("cmpl-")),
        created: unix_seconds(),
        model: quoted(&wish.model),
        fingerprint: call.fingerprint(),
    };
    if wish.stream {
        let source = Box::new(Stream::new(head, wish, drafts, work.prompt_tokens));
        return Ok(Answer::Stream { content_type: EVENT_STREAM, source, work });
    }
    let (_, longest) = lengths(&drafts);
    let prompt_tokens = work.prompt_tokens;
    let slot = call.generate(work, generated, longest).await;
    let usage = Usage::new(prompt_tokens, generated, &slot, 0);
    let body = head.whole(&drafts, &wish, (!call.trouble.no_usage).then_some(usage));
    slot.finish(drafts.first().map_or(Finish::Stop, |draft| draft.end.finish()));
    Ok(Whole::json(body).into())
}

fn logprobs(input: &Input) -> Result<Option<usize>, Refusal> {
    match input.integer("logprobs")? {
        Some(top) if !(0..=MOST_LOGPROBS).contains(&top) => {
            Err(Refusal::value("logprobs", &format!("logprobs must be in [0, {MOST_LOGPROBS}]"), top))
        }
        top => Ok(top.map(|top| top as usize)),
    }
}

fn choices(wish: &Wish, prompt: &Text, each: u32, echo: bool) -> Vec<Draft> {
    let heard = Prompt::plain(&prompt.text);
    let write = |choice: u32| {
        let mut draft = Draft::words(wish, &heard, choice);
        if echo {
            draft.tokens.insert(0, Cow::Owned(prompt.text.clone()));
        }
        draft
    };
    (0..each).map(write).collect()
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
    fn whole(&self, drafts: &[Draft], wish: &Wish, usage: Option<Usage>) -> String {
        let Self { id, created, model, fingerprint, .. } = self;
        let choices: Vec<String> =
            drafts.iter().enumerate().map(|(index, draft)| self.choice(index, draft, wish)).collect();
        let choices = choices.join(",");
        let head = format!(
            r#"{{"id":{id},"object":"text_completion","created":{created},"model":{model},"choices":[{choices}]"#
        );
        let usage = usage.map_or_else(String::new, |usage| format!(r#","usage":{}"#, usage.whole(self.engine, false)));
        match self.engine {
            Engine::Vllm => format!(
                r#"{head},"service_tier":null,"system_fingerprint":"{fingerprint}"{usage},"kv_transfer_params":null,"ec_transfer_params":null,"metrics":null}}"#
            ),
            Engine::Sglang => format!(r#"{head}{usage}}}"#),
            _ => format!(r#"{head},"system_fingerprint":"{fingerprint}"{usage}}}"#),
        }
    }

    fn choice(&self, index: usize, draft: &Draft, wish: &Wish) -> String {
        let (text, finish, stop) = (quoted(&draft.text()), draft.end.reason(), draft.end.stop_reason());
        let logprobs = wish.logprobs.map_or_else(|| "null".to_owned(), |top| logprob_lists(&draft.tokens, 0, top));
        let head = format!(r#"{{"index":{index},"text":{text},"logprobs":{logprobs},"finish_reason":"{finish}""#);
        match self.engine {
            Engine::Vllm => format!(
                r#"{head},"stop_reason":{stop},"token_ids":null,"prompt_logprobs":null,"prompt_token_ids":null,"routed_experts":null}}"#
            ),
            Engine::Sglang => format!(r#"{head},"matched_stop":{stop}}}"#),
            _ => format!("{head}}}"),
        }
    }
}

/// The four parallel lists of the old logprobs, of tokens that begin at a text offset.
fn logprob_lists(tokens: &[Cow<'static, str>], mut offset: usize, top: usize) -> String {
    let mut offsets = Vec::with_capacity(tokens.len());
    for token in tokens {
        offsets.push(offset.to_string());
        offset += token.chars().count();
    }
    let values: Vec<String> = tokens.iter().map(|token| format!("{:?}", draft::logprob(token, 0))).collect();
    let names: Vec<String> = tokens.iter().map(|token| quoted(token)).collect();
    let tops: Vec<String> = tokens.iter().map(|token| alternatives(token, top)).collect();
    format!(
        r#"{{"text_offset":[{}],"token_logprobs":[{}],"tokens":[{}],"top_logprobs":[{}]}}"#,
        offsets.join(","),
        values.join(","),
        names.join(","),
        tops.join(",")
    )
}

fn alternatives(token: &str, top: usize) -> String {
    let one = |rank: usize| {
        let text = draft::alternative(token, rank);
        format!("{}:{:?}", quoted(text), draft::logprob(token, rank as u64))
    };
    let all: Vec<String> = (0..top.max(1)).map(one).collect();
    format!("{{{}}}", all.join(","))
}

/// The chunks of a streamed answer.
struct Stream {
    head: Head,
    wish: Wish,
    drafts: Vec<Draft>,
    sent: Vec<usize>,
    /// Characters of each choice that were sent.
    offsets: Vec<usize>,
    turn: usize,
    stage: Stage,
    prompt: u64,
    completion: u64,
    cached: u64,
    prefix: Vec<u8>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Tokens,
    Usage,
    Done,
    Over,
}

impl Stream {
    fn new(head: Head, wish: Wish, drafts: Vec<Draft>, prompt: u64) -> Self {
        let Head { id, created, model, fingerprint, .. } = &head;
        let middle = match head.engine {
            Engine::Openai | Engine::Tgi => format!(r#","system_fingerprint":"{fingerprint}""#),
            _ => String::new(),
        };
        let prefix = format!(
            r#"data: {{"id":{id},"object":"text_completion","created":{created},"model":{model}{middle},"choices":[{{"index":"#
        );
        let zeros = vec![0; drafts.len()];
        Self {
            prefix: prefix.into_bytes(),
            head,
            wish,
            sent: zeros.clone(),
            offsets: zeros,
            drafts,
            turn: 0,
            stage: Stage::Tokens,
            prompt,
            completion: 0,
            cached: 0,
        }
    }

    fn token(&mut self, out: &mut Vec<u8>) -> Step {
        let index = self.turn;
        let at = self.sent[index];
        self.sent[index] += 1;
        self.completion += 1;
        let draft = &self.drafts[index];
        let text = &draft.tokens[at];
        out.extend_from_slice(&self.prefix);
        out.extend_from_slice(index.to_string().as_bytes());
        out.extend_from_slice(br#","text":""#);
        escape(out, text);
        out.extend_from_slice(br#"","logprobs":"#);
        match self.wish.logprobs {
            Some(top) => {
                let lists = logprob_lists(&draft.tokens[at..=at], self.offsets[index], top);
                out.extend_from_slice(lists.as_bytes());
            }
            None => out.extend_from_slice(b"null"),
        }
        self.offsets[index] += text.chars().count();
        let last = self.sent[index] == draft.tokens.len();
        self.end_of_choice(out, last.then_some(index));
        self.chunk_usage(out);
        if last && self.head.engine == Engine::Vllm && !self.wish.include_usage {
            out.extend_from_slice(format!(r#","system_fingerprint":"{}""#, self.head.fingerprint).as_bytes());
        }
        out.extend_from_slice(b"}\n\n");
        self.next_turn();
        Step::Token { waits: index == 0 }
    }

    fn end_of_choice(&self, out: &mut Vec<u8>, ended: Option<usize>) {
        let end = ended.map(|index| &self.drafts[index].end);
        let reason = end.map_or_else(|| "null".to_owned(), |end| quoted(end.reason()));
        let stop = end.map_or_else(|| "null".to_owned(), |end| end.stop_reason());
        let text = match self.head.engine {
            Engine::Vllm => {
                format!(r#","finish_reason":{reason},"stop_reason":{stop},"prompt_token_ids":null,"token_ids":null}}]"#)
            }
            Engine::Sglang => format!(r#","finish_reason":{reason},"matched_stop":{stop}}}]"#),
            _ => format!(r#","finish_reason":{reason}}}]"#),
        };
        out.extend_from_slice(text.as_bytes());
    }

    fn chunk_usage(&self, out: &mut Vec<u8>) {
        let (prompt, completion) = (self.prompt, self.completion);
        match self.head.engine {
            Engine::Vllm if self.wish.continuous_usage => {
                let total = prompt + completion;
                let usage = format!(
                    r#","usage":{{"prompt_tokens":{prompt},"total_tokens":{total},"completion_tokens":{completion},"completion_tokens_details":null}}"#
                );
                out.extend_from_slice(usage.as_bytes());
            }
            Engine::Vllm => {}
            _ if self.wish.include_usage => out.extend_from_slice(br#","usage":null"#),
            _ => {}
        }
    }

    fn next_turn(&mut self) {
        let choices = self.drafts.len();
        let open = |index: usize| self.sent[index] < self.drafts[index].tokens.len();
        let next = (1..=choices).map(|step| (self.turn + step) % choices).find(|index| open(*index));
        match next {
            Some(index) => self.turn = index,
            None => self.stage = Stage::Usage,
        }
    }

    fn usage(&self, out: &mut Vec<u8>) {
        let (prompt, completion, cached) = (self.prompt, self.completion, self.cached);
        let total = prompt + completion;
        let list = br#"{"index":"#.len();
        out.extend_from_slice(&self.prefix[..self.prefix.len() - list]);
        out.extend_from_slice(
            format!(
                r#"],"usage":{{"prompt_tokens":{prompt},"total_tokens":{total},"completion_tokens":{completion},"prompt_tokens_details":{{"cached_tokens":{cached}}}}}"#
            )
            .as_bytes(),
        );
        if self.head.engine == Engine::Vllm {
            out.extend_from_slice(format!(r#","system_fingerprint":"{}""#, self.head.fingerprint).as_bytes());
        }
        out.extend_from_slice(b"}\n\n");
    }
}

impl Source for Stream {
    fn start(&mut self, cached: u64, _created: u64) {
        self.cached = cached;
    }

    fn next(&mut self, out: &mut Vec<u8>) -> Step {
        match self.stage {
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
