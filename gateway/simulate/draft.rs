//! What the simulated model is going to say: tokens, where they end, and why.

use std::borrow::Cow;

use serde_json::Value;

use super::Server;
use super::answer::Refusal;
use super::encoding::escape;
use super::engine::{Finish, Work};
use super::input::{Input, Prompt};
use super::options::Engine;
use super::tokens::{self, Words};
use super::{routes, schema};

/// How many tokens an answer has that nothing bounds, the one that ends it included.
pub(super) const NATURAL: u64 = 64;

/// More choices than this is an attack on a test's patience.
const MOST_CHOICES: u64 = 128;

/// What a request wants of its generation, whatever its surface.
pub(super) struct Wish {
    pub(super) model: String,
    pub(super) stream: bool,
    pub(super) include_usage: bool,
    pub(super) continuous_usage: bool,
    pub(super) choices: u32,
    pub(super) max_tokens: Option<u64>,
    pub(super) stop: Vec<String>,
    /// Wanted: how many alternatives a token.
    pub(super) logprobs: Option<usize>,
    /// The answer's text has this many bytes.
    pub(super) bytes: Option<usize>,
    pub(super) wide: bool,
    pub(super) filtered: bool,
    pub(super) reasoning: bool,
}

impl Wish {
    /// Reads what chat and completions have in common.
    pub(super) fn read(call: &routes::Call, input: &Input, bounds: &[&str]) -> Result<Self, Refusal> {
        let stream_options = input.get("stream_options");
        let option = |name: &str| stream_options.and_then(|all| all.get(name)).and_then(Value::as_bool) == Some(true);
        check_sampling(input)?;
        let choices = input.count("n")?.unwrap_or(1);
        if choices > MOST_CHOICES {
            return Err(Refusal::value("n", &format!("n must be at most {MOST_CHOICES}"), choices));
        }
        let mut max_tokens = None;
        for name in bounds {
            max_tokens = max_tokens.or(input.count(name)?);
        }
        let usage = !call.trouble.no_usage;
        Ok(Self {
            model: call.model(input)?,
            stream: input.flag("stream")?,
            include_usage: usage && option("include_usage"),
            continuous_usage: usage && option("include_usage") && option("continuous_usage_stats"),
            choices: choices as u32,
            max_tokens,
            stop: stops(input.get("stop")),
            logprobs: None,
            bytes: call.trouble.big,
            wide: call.trouble.half_utf8,
            filtered: call.trouble.filtered,
            reasoning: input.text("reasoning_effort")?.is_some_and(|effort| effort != "none"),
        })
    }

    /// Refuses what does not fit into the context; tells the engine about the rest.
    pub(super) fn work(&self, server: &Server, prompt: &str) -> Result<Work, Refusal> {
        let longest = server.options.max_model_len;
        let work = Work::new(prompt, self.choices, self.max_tokens.unwrap_or(NATURAL));
        if work.prompt_tokens >= longest {
            return Err(too_long(server.options.engine, longest, work.prompt_tokens));
        }
        match self.max_tokens {
            Some(wanted) if wanted + work.prompt_tokens > longest => Err(too_many(longest, work.prompt_tokens, wanted)),
            _ => Ok(work),
        }
    }
}

fn check_sampling(input: &Input) -> Result<(), Refusal> {
    let bounds: [(&str, f64, f64); 4] = [
        ("temperature", 0.0, 2.0),
        ("top_p", f64::MIN_POSITIVE, 1.0),
        ("presence_penalty", -2.0, 2.0),
        ("frequency_penalty", -2.0, 2.0),
    ];
    for (name, least, most) in bounds {
        if let Some(value) = input.number(name)?
            && !(least..=most).contains(&value)
        {
            let open = if name == "top_p" { "(0" } else { if least < 0.0 { "[-2" } else { "[0" } };
            return Err(Refusal::value(name, &format!("{name} must be in {open}, {most}]"), format!("{value:?}")));
        }
    }
    Ok(())
}

pub(super) fn stops(value: Option<&Value>) -> Vec<String> {
    let texts = match value {
        Some(Value::String(text)) => vec![text.clone()],
        Some(Value::Array(all)) => all.iter().filter_map(Value::as_str).map(str::to_owned).collect(),
        _ => Vec::new(),
    };
    texts.into_iter().filter(|text| !text.is_empty()).collect()
}

/// vLLM's refusal of a prompt that does not fit.
pub(super) fn too_long(engine: Engine, longest: u64, tokens: u64) -> Refusal {
    if engine == Engine::Openai {
        let message = format!(
            "This model's maximum context length is {longest} tokens. However, your messages resulted in {tokens} tokens. Please reduce the length of the messages."
        );
        return Refusal::new(400, message).about("messages").code("context_length_exceeded");
    }
    Refusal::new(400, format!("This model's maximum context length is {longest} tokens. However, your prompt contains at least {tokens} input tokens, which exceeds this limit even without any output tokens. Please reduce the length of the input prompt. (parameter=input_tokens, value={tokens})")).about("input_tokens")
}

fn too_many(longest: u64, prompt: u64, wanted: u64) -> Refusal {
    let message = format!(
        "'max_tokens' or 'max_completion_tokens' is too large: {wanted}. This model's maximum context length is {longest} tokens and your request has {prompt} input tokens ({wanted} > {longest} - {prompt}). (parameter=max_tokens, value={wanted})"
    );
    Refusal::new(400, message).about("max_tokens").code("context_length_exceeded")
}

/// One answer, token by token. The last token carries the reason of the end.
#[derive(Clone, Debug)]
pub(super) struct Draft {
    pub(super) reasoning: Vec<Cow<'static, str>>,
    pub(super) tokens: Vec<Cow<'static, str>>,
    /// The tokens are the arguments of this tool.
    pub(super) tool: Option<Tool>,
    pub(super) end: End,
}

#[derive(Clone, Debug)]
pub(super) struct Tool {
    pub(super) id: String,
    pub(super) name: String,
}

/// Why an answer ends.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum End {
    Natural,
    /// At this stop text.
    Stop(String),
    Length,
    Tool,
    Filter,
}

impl End {
    /// In OpenAI's words.
    pub(super) fn reason(&self) -> &'static str {
        match self {
            Self::Natural | Self::Stop(_) => "stop",
            Self::Length => "length",
            Self::Tool => "tool_calls",
            Self::Filter => "content_filter",
        }
    }

    /// In the engine's metrics.
    pub(super) fn finish(&self) -> Finish {
        match self {
            Self::Length => Finish::Length,
            _ => Finish::Stop,
        }
    }

    /// The `stop_reason` of vLLM's choices, as JSON.
    pub(super) fn stop_reason(&self) -> String {
        match self {
            Self::Stop(text) => super::encoding::quoted(text),
            _ => "null".to_owned(),
        }
    }
}

const THINKING: &str = "The user wants an answer . I am simulated , so I say what was said and fill the rest .";

impl Draft {
    /// Free text about what was said.
    pub(super) fn words(wish: &Wish, prompt: &Prompt, choice: u32) -> Self {
        let seed = tokens::hash((&wish.model, &prompt.text, choice));
        Self::write(Words::new(&prompt.said, seed, wish.wide), wish)
    }

    /// A fixed text, such as JSON that was asked for.
    pub(super) fn fixed(text: &str, wish: &Wish) -> Self {
        let pieces: Vec<Cow<'static, str>> = tokens::split(text).map(|piece| piece.to_owned().into()).collect();
        Self::write(pieces.into_iter(), wish)
    }

    /// A call of a tool.
    pub(super) fn call(name: &str, parameters: &Value, prompt: &Prompt, wish: &Wish) -> Self {
        let arguments = schema::example(parameters, subject(&prompt.said)).to_string();
        let mut draft = Self::fixed(&arguments, wish);
        draft.tool = Some(Tool { id: format!("chatcmpl-tool-{}", hex_id()), name: name.to_owned() });
        if draft.end == End::Natural {
            draft.end = End::Tool;
        }
        draft
    }

    fn write(pieces: impl Iterator<Item = Cow<'static, str>>, wish: &Wish) -> Self {
        let mut draft = Self { reasoning: Vec::new(), tokens: Vec::new(), tool: None, end: End::Natural };
        let bound = wish.max_tokens.unwrap_or(u64::MAX);
        if wish.reasoning {
            let thought = THINKING.split_inclusive(' ').map(Cow::from);
            draft.reasoning = thought.take(usize::try_from(bound - 1).unwrap_or(usize::MAX)).collect();
        }
        let left = bound - draft.reasoning.len() as u64;
        draft.fill(pieces, wish, left);
        if wish.filtered {
            draft.end = End::Filter;
        }
        draft
    }

    /// Takes pieces until they, a bound or a stop text end the answer.
    fn fill(&mut self, mut pieces: impl Iterator<Item = Cow<'static, str>>, wish: &Wish, left: u64) {
        let free = wish.bytes.is_none() && wish.max_tokens.is_none();
        let endless = pieces.size_hint().1.is_none();
        let natural = if free && endless { NATURAL } else { u64::MAX };
        let most = if wish.bytes.is_some() { u64::MAX } else { left };
        let mut bytes = wish.bytes.unwrap_or(usize::MAX);
        let mut text = String::new();
        loop {
            let made = self.tokens.len() as u64 + 1;
            let over = made >= natural || bytes == 0;
            let piece = if over { None } else { pieces.next() };
            let Some(mut piece) = piece else {
                self.tokens.push("".into());
                return;
            };
            shorten(&mut piece, &mut bytes);
            if !wish.stop.is_empty() && self.stopped(&mut text, &piece, &wish.stop) {
                return;
            }
            self.tokens.push(piece);
            if made >= most {
                self.end = End::Length;
                return;
            }
        }
    }

    /// Whether a stop text ends with this piece; cuts the tokens before it then.
    fn stopped(&mut self, text: &mut String, piece: &str, stops: &[String]) -> bool {
        let longest = stops.iter().map(String::len).max().unwrap_or(0);
        let from = text.floor_char_boundary(text.len().saturating_sub(longest));
        text.push_str(piece);
        let hits = stops.iter().filter_map(|stop| text[from..].find(stop.as_str()).map(|at| (from + at, stop)));
        let Some((at, stop)) = hits.min_by_key(|(at, _)| *at) else { return false };
        self.cut(at, piece);
        self.end = End::Stop(stop.clone());
        true
    }

    fn cut(&mut self, at: usize, piece: &str) {
        self.tokens.push(piece.to_owned().into());
        let mut left = at;
        for token in &mut self.tokens {
            let kept = token.len().min(left);
            if kept < token.len() {
                *token = token[..kept].to_owned().into();
            }
            left -= kept;
        }
    }

    /// Tokens generated.
    pub(super) fn len(&self) -> u64 {
        (self.reasoning.len() + self.tokens.len()) as u64
    }

    /// The whole text.
    pub(super) fn text(&self) -> String {
        self.tokens.concat()
    }
}

/// Takes from `left` what the piece has, and from the piece what `left` does not have.
fn shorten(piece: &mut Cow<'static, str>, left: &mut usize) {
    if piece.len() > *left {
        *piece = format!("{:x<1$}", &piece[..piece.floor_char_boundary(*left)], *left).into();
    }
    *left -= piece.len();
}

/// What a prompt is about, for a tool's argument: its last capitalised word, else its last word.
pub(super) fn subject(said: &str) -> &str {
    let words = || said.split(|c: char| !c.is_alphanumeric() && c != '-').filter(|word| !word.is_empty());
    let named = words().skip(1).filter(|word| word.starts_with(char::is_uppercase)).last();
    named.or_else(|| words().next_back()).unwrap_or("example")
}

/// 16 hex digits.
pub(super) fn hex_id() -> String {
    format!("{:016x}", fastrand::u64(..))
}

/// A made-up log probability that depends on the token alone.
pub(super) fn logprob(token: &str, rank: u64) -> f64 {
    let noise = tokens::hash((token, rank)) % 4096;
    -(0.05 + rank as f64 * 1.25 + noise as f64 / 8192.0)
}

/// A token's entry in chat's logprobs.
pub(super) fn chat_logprobs(out: &mut Vec<u8>, token: &str, top: usize) {
    out.extend_from_slice(br#"{"content":["#);
    chat_logprob_entry(out, token, top);
    out.extend_from_slice(b"]}");
}

pub(super) fn chat_logprob_entry(out: &mut Vec<u8>, token: &str, top: usize) {
    one_logprob(out, token, 0);
    out.extend_from_slice(br#","top_logprobs":["#);
    for rank in 0..top {
        if rank > 0 {
            out.push(b',');
        }
        one_logprob(out, alternative(token, rank), rank as u64);
        out.push(b'}');
    }
    out.extend_from_slice(b"]}");
}

/// The token itself, then words it might have been.
pub(super) fn alternative(token: &str, rank: usize) -> &str {
    const OTHERS: [&str; 20] = [
        " or", " but", " an", " its", "!", "?", " so", " yes", " no", " we", " they", " it's", " on", " at", " by",
        " if", " my", " up", " do", " go",
    ];
    if rank == 0 { token } else { OTHERS[(rank - 1) % OTHERS.len()] }
}

fn one_logprob(out: &mut Vec<u8>, token: &str, rank: u64) {
    out.extend_from_slice(br#"{"token":""#);
    escape(out, token);
    let bytes: Vec<String> = token.bytes().map(|byte| byte.to_string()).collect();
    out.extend_from_slice(
        format!("\",\"logprob\":{:?},\"bytes\":[{}]", logprob(token, rank), bytes.join(",")).as_bytes(),
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wish() -> Wish {
        Wish {
            model: "m".to_owned(),
            stream: false,
            include_usage: false,
            continuous_usage: false,
            choices: 1,
            max_tokens: None,
            stop: Vec::new(),
            logprobs: None,
            bytes: None,
            wide: false,
            filtered: false,
            reasoning: false,
        }
    }

    #[test]
    fn an_answer_ends_by_itself_or_at_its_bound() {
        let prompt = Prompt::plain("hello there");
        let free = Draft::words(&wish(), &prompt, 0);
        assert_eq!((free.len(), free.end), (NATURAL, End::Natural));
        for bound in [1, 5, 200] {
            let bounded = Draft::words(&Wish { max_tokens: Some(bound), ..wish() }, &prompt, 0);
            assert_eq!((bounded.len(), bounded.end), (bound, End::Length));
        }
    }

    #[test]
    fn a_stop_text_is_left_out_even_across_tokens() {
        let prompt = Prompt::plain("hello there");
        let stop = vec!["d: hel".to_owned()];
        let draft = Draft::words(&Wish { stop, ..wish() }, &prompt, 0);
        assert_eq!((draft.text().as_str(), draft.end), ("You sai", End::Stop("d: hel".to_owned())));
    }

    #[test]
    fn a_size_is_met_exactly() {
        let draft = Draft::words(&Wish { bytes: Some(100_001), ..wish() }, &Prompt::plain("x"), 0);
        assert_eq!(draft.text().len(), 100_001);
    }

    #[test]
    fn a_tool_is_called_with_what_the_prompt_is_about() {
        let prompt = Prompt::plain("What is the weather in Paris today?");
        let parameters = serde_json::json!({"type": "object", "properties": {"city": {"type": "string"}}});
        let draft = Draft::call("weather", &parameters, &prompt, &wish());
        assert_eq!((draft.text().as_str(), draft.end), (r#"{"city":"Paris"}"#, End::Tool));
    }
}
