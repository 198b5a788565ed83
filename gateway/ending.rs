//! How a stream ends early and yet properly: as its protocol ends an answer that became too long, or was filtered.

use bytes::Bytes;
use infergate_plugins::operation::Operation;
use serde_json::{Map, Value, json};

use crate::sse::Framer;

/// Why it ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// Nothing more may be used.
    Length,
    /// A guardrail says no.
    Filtered,
}

/// A stream that has begun, as far as its end must know it.
#[derive(Clone, Copy, Debug)]
pub struct Begun<'a> {
    /// What it answers.
    pub operation: Operation,
    /// Its first events, as they came.
    pub opening: &'a [u8],
    /// The last events that the client got.
    pub last: &'a [u8],
    /// How many choices it has.
    pub choices: u64,
    /// Tokens: of the prompt, of the answer so far.
    pub tokens: (u64, u64),
    /// Whether the client asked to be told them.
    pub tells_usage: bool,
}

impl Why {
    /// OpenAI's `finish_reason`.
    const fn finish_reason(self) -> &'static str {
        match self {
            Self::Length => "length",
            Self::Filtered => "content_filter",
        }
    }

    /// Anthropic's `stop_reason`.
    const fn stop_reason(self) -> &'static str {
        match self {
            Self::Length => "max_tokens",
            Self::Filtered => "refusal",
        }
    }

    /// The Responses API's `incomplete_details.reason`.
    const fn incomplete(self) -> &'static str {
        match self {
            Self::Length => "max_output_tokens",
            Self::Filtered => "content_filter",
        }
    }
}

/// The events that end `begun`.
pub fn events(begun: &Begun<'_>, why: Why) -> String {
    match begun.operation {
        Operation::Messages => messages(begun, why),
        Operation::Responses => response(begun, why),
        Operation::Generate => generate(begun, why),
        Operation::Completions => chunks(begun, why, "text_completion"),
        _ => chunks(begun, why, "chat.completion.chunk"),
    }
}

fn chunks(begun: &Begun<'_>, why: Why, object: &str) -> String {
    let first = data(begun.opening).next().unwrap_or_default();
    let mut chunk = Map::new();
    for key in ["id", "created", "model", "system_fingerprint"] {
        chunk.extend(first.get(key).map(|value| (key.to_owned(), value.clone())));
    }
    chunk.insert("object".to_owned(), object.into());
    let choice = |index: u64| {
        let mut choice = json!({"index": index, "logprobs": null, "finish_reason": why.finish_reason()});
        if object == "text_completion" {
            choice["text"] = "".into()
        } else {
            choice["delta"] = json!({})
        }
        choice
    };
    let mut out = String::new();
    chunk.insert("choices".to_owned(), (0..begun.choices).map(choice).collect());
    out += &format!("data: {}\n\n", Value::Object(chunk.clone()));
    if begun.tells_usage {
        let (input, output) = begun.tokens;
        chunk.insert("choices".to_owned(), json!([]));
        let usage = json!({"prompt_tokens": input, "completion_tokens": output, "total_tokens": input + output});
        chunk.insert("usage".to_owned(), usage);
        out += &format!("data: {}\n\n", Value::Object(chunk));
    }
    out + "data: [DONE]\n\n"
}

fn messages(begun: &Begun<'_>, why: Why) -> String {
    let mut out = String::new();
    // A block that is open is closed.
    let blocks =
        data(begun.last).filter(|event| event["type"].as_str().is_some_and(|kind| kind.starts_with("content_block")));
    if let Some(index) =
        blocks.last().filter(|event| event["type"] != "content_block_stop").map(|event| event["index"].clone())
    {
        out += &event("content_block_stop", &json!({"type": "content_block_stop", "index": index}));
    }
    let delta = json!({"stop_reason": why.stop_reason(), "stop_sequence": null});
    let usage = json!({"output_tokens": begun.tokens.1});
    out += &event("message_delta", &json!({"type": "message_delta", "delta": delta, "usage": usage}));
    out + &event("message_stop", &json!({"type": "message_stop"}))
}

fn response(begun: &Begun<'_>, why: Why) -> String {
    let created = data(begun.opening).find_map(|event| event.get("response").cloned());
    let mut response = created.unwrap_or_else(|| json!({"object": "response"}));
    let number = data(begun.last).filter_map(|event| event["sequence_number"].as_u64()).last();
    let (input, output) = begun.tokens;
    response["status"] = "incomplete".into();
    response["incomplete_details"] = json!({"reason": why.incomplete()});
    response["usage"] = json!({
        "input_tokens": input, "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": output, "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": input + output,
    });
    let mut last = json!({"type": "response.incomplete", "response": response});
    if let Some(number) = number {
        last["sequence_number"] = (number + 1).into();
    }
    event("response.incomplete", &last)
}

fn generate(begun: &Begun<'_>, why: Why) -> String {
    let output = begun.tokens.1;
    let token = json!({"id": 0, "text": "", "logprob": 0.0, "special": true});
    let details = json!({"finish_reason": why.finish_reason(), "generated_tokens": output, "seed": null});
    let last = json!({"index": output, "token": token, "generated_text": null, "details": details});
    format!("data: {last}\n\n")
}

fn event(name: &str, data: &Value) -> String {
    format!("event: {name}\ndata: {data}\n\n")
}

/// The JSON objects that `events` carry.
fn data(events: &[u8]) -> impl Iterator<Item = Value> {
    let lines = events.split(|byte| matches!(byte, b'\n' | b'\r'));
    lines.filter_map(|line| serde_json::from_slice(line.strip_prefix(b"data:")?).ok()).filter(Value::is_object)
}

/// `events` with a comment before the last of them; behind it where it cannot be told where that begins. `whole`: they
/// begin with an event.
pub fn before_last(events: &[u8], comment: &str, whole: bool) -> Bytes {
    let mut places: Vec<usize> = whole.then_some(0).into_iter().chain(ends(events)).collect();
    places.pop_if(|end| *end == events.len() && !events.is_empty());
    let at = places.pop().unwrap_or(events.len());
    [&events[..at], comment.as_bytes(), &events[at..]].concat().into()
}

/// Where each of several whole events ends.
pub fn ends(events: &[u8]) -> impl Iterator<Item = usize> {
    let (mut framer, mut at) = (Framer::default(), 0);
    std::iter::from_fn(move || {
        at += framer.to_end(&events[at..])?;
        // Of CRLF, the line feed belongs to its carriage return.
        at += usize::from(events[at - 1] == b'\r' && events.get(at) == Some(&b'\n'));
        Some(at)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn begun(operation: Operation, opening: &'static str, last: &'static str) -> Begun<'static> {
        Begun {
            operation,
            opening: opening.as_bytes(),
            last: last.as_bytes(),
            choices: 1,
            tokens: (3, 5),
            tells_usage: false,
        }
    }

    #[test]
    fn a_chat_ends_with_its_own_names_for_every_choice_and_with_usage_where_it_was_asked_for() {
        let opening = "data: {\"id\":\"c-1\",\"object\":\"chat.completion.chunk\",\"created\":7,\"model\":\"m\",\"choices\":[]}\n\n";
        let begun = Begun { choices: 2, tells_usage: true, ..begun(Operation::Chat, opening, "") };
        let ended = events(&begun, Why::Length);
        let told: Vec<Value> = data(ended.as_bytes()).collect();
        assert_eq!((&told[0]["id"], &told[0]["created"], &told[0]["model"]), (&json!("c-1"), &json!(7), &json!("m")));
        let reasons: Vec<_> =
            told[0]["choices"].as_array().unwrap().iter().map(|c| c["finish_reason"].clone()).collect();
        assert_eq!(reasons, ["length", "length"]);
        assert_eq!(told[1]["usage"]["total_tokens"], 8);
        assert!(ended.ends_with("data: [DONE]\n\n"));
    }

    #[test]
    fn a_message_closes_the_block_that_is_open_and_no_other() {
        let open = "event: content_block_delta\ndata: {\"type\":\"content_block_delta\",\"index\":2,\"delta\":{}}\n\n";
        let ended = events(&begun(Operation::Messages, "", open), Why::Filtered);
        let kinds: Vec<_> = data(ended.as_bytes()).map(|event| event["type"].as_str().unwrap().to_owned()).collect();
        assert_eq!(kinds, ["content_block_stop", "message_delta", "message_stop"]);
        assert!(ended.contains("\"index\":2") && ended.contains("refusal"));
        let closed = "data: {\"type\":\"content_block_stop\",\"index\":2}\n\n";
        assert!(!events(&begun(Operation::Messages, "", closed), Why::Length).contains("content_block_stop"));
    }

    #[test]
    fn a_response_is_incomplete_and_goes_on_counting() {
        let opening = "event: response.created\ndata: {\"type\":\"response.created\",\"response\":{\"id\":\"r-1\",\"status\":\"in_progress\"},\"sequence_number\":0}\n\n";
        let last = "data: {\"type\":\"response.output_text.delta\",\"sequence_number\":9}\n\n";
        let ended = events(&begun(Operation::Responses, opening, last), Why::Length);
        let told = data(ended.as_bytes()).next().unwrap();
        assert_eq!((&told["response"]["id"], &told["sequence_number"]), (&json!("r-1"), &json!(10)));
        assert_eq!(told["response"]["incomplete_details"]["reason"], "max_output_tokens");
    }

    #[test]
    fn a_comment_stands_before_the_last_event_and_never_in_one() {
        let put =
            |events: &str, whole| String::from_utf8(before_last(events.as_bytes(), ": c\n\n", whole).to_vec()).unwrap();
        let done = "data: [DONE]\n\n";
        assert_eq!(put(done, true), format!(": c\n\n{done}"));
        assert_eq!(put("ta: [DONE]\n\n", false), "ta: [DONE]\n\n: c\n\n");
        assert_eq!(put(&format!("\"}}\n\n{done}"), false), format!("\"}}\n\n: c\n\n{done}"));
        let message = "event: message_delta\ndata: {}\n\nevent: message_stop\ndata: {}\n\n";
        assert_eq!(put(message, true), message.replace("event: message_stop", ": c\n\nevent: message_stop"));
        assert_eq!(put("", true), ": c\n\n");
    }

    #[test]
    fn the_ends_of_events_are_where_a_reader_of_single_bytes_finds_them() {
        let mut random = fastrand::Rng::with_seed(9);
        for _ in 0..20_000 {
            let text: Vec<u8> = (0..random.usize(..40)).map(|_| *random.choice(b"\n\n\r\rab:").unwrap()).collect();
            let (mut framer, mut at, mut expected) = (Framer::default(), 0, Vec::new());
            while at < text.len() {
                let is_end = framer.push(&text[at..=at]) > 0;
                at += 1;
                if is_end {
                    at += usize::from(text[at - 1] == b'\r' && text.get(at) == Some(&b'\n'));
                    expected.push(at);
                }
            }
            assert_eq!(ends(&text).collect::<Vec<_>>(), expected, "{}", text.escape_ascii());
        }
    }

    #[test]
    fn the_ends_of_events_are_found_whatever_ends_their_lines() {
        for text in ["data: a\n\ndata: b\n\n", "data: a\r\n\r\ndata: b\r\n\r\n", "data: a\r\rdata: b\r\r"] {
            let found: Vec<usize> = ends(text.as_bytes()).collect();
            assert_eq!(found, [text.len() / 2, text.len()], "{text:?}");
        }
    }
}
