//! What an answer tells of how good it is: what it says, whether it refuses, how sure its model was of each token.
//!
//! A body that is not what its endpoint gives tells nothing, and then nothing is wrong with it.

use std::collections::BTreeMap;

use infergate_plugins::operation::Operation;
use infergate_plugins::router::cascade::Answered;
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::guard::decoded;
use crate::text::{self, Place, Text};

/// Reads the whole answer `body` to `operation`, or all `events` of one.
pub fn read(operation: Operation, body: &[u8], is_events: bool) -> Answered {
    let mut told = Told::default();
    if is_events {
        let (document, texts) = text::told(operation, body).unwrap_or_default();
        told.says(&document, &texts);
        for event in text::each(body) {
            told.document(text::data(event).map_or(b"".as_slice(), |data| &event[data]));
        }
    } else {
        told.says(body, &text::answer(operation, body).unwrap_or_default());
        told.document(body);
    }
    told.answered()
}

#[derive(Default)]
struct Told {
    texts: BTreeMap<u64, String>,
    refuses: Option<&'static str>,
    /// Of each choice: the sum of its tokens' log probabilities, and how many there are.
    sure: BTreeMap<u64, (f64, u32)>,
}

/// So many choices are told apart.
const CHOICES_MAX: usize = 128;
/// Engines write this or less for what they thought impossible.
const LOGPROB_MIN: f64 = -100.0;

impl Told {
    fn says(&mut self, document: &[u8], texts: &[Text]) {
        let mut room = String::new();
        for text in texts.iter().filter(|text| !text.span.is_empty()) {
            match text.place {
                Place::AnswerRefusal => self.refuses = Some("refusal"),
                Place::AnswerContent => {
                    let said = self.texts.entry(text.channel >> 32).or_default();
                    said.push_str(decoded(&document[text.span.clone()], text, &mut room));
                }
                _ => {}
            }
        }
    }

    fn document(&mut self, document: &[u8]) {
        let Ok(document) = serde_json::from_slice::<Document<'_>>(document) else { return };
        self.part(&document);
        if let Some(response) = &document.response {
            self.part(response);
        }
        let delta = document.delta.filter(|delta| delta.get().starts_with('{'));
        if let Some(delta) = delta.and_then(|delta| serde_json::from_str::<Delta>(delta.get()).ok()) {
            self.ends(delta.stop_reason.as_deref());
        }
    }

    fn part(&mut self, document: &Document<'_>) {
        self.ends(document.stop_reason.as_deref());
        self.ends(document.incomplete_details.as_ref().and_then(|details| details.reason.as_deref()));
        for (at, choice) in (0..).zip(document.choices.iter().flatten()) {
            self.ends(choice.finish_reason.as_deref());
            let all = choice.logprobs.iter().flat_map(Logprobs::all);
            self.sure(choice.index.unwrap_or(at), all);
        }
        for (at, item) in (0..).zip(document.output.iter().flatten()) {
            let tokens = item.content.iter().flatten().flat_map(|part| part.logprobs.iter().flatten());
            self.sure(at, tokens.filter_map(|token| token.logprob));
        }
        let tokens = document.details.iter().flat_map(|details| details.tokens.iter().flatten());
        self.sure(0, tokens.chain(&document.token).filter_map(|token| token.logprob));
    }

    fn ends(&mut self, reason: Option<&str>) {
        match reason {
            Some("content_filter") => self.refuses = Some("content_filter"),
            Some("refusal") => self.refuses = Some("stop_reason"),
            _ => {}
        }
    }

    fn sure(&mut self, choice: u64, tokens: impl Iterator<Item = f64>) {
        for logprob in tokens.filter(|logprob| *logprob <= 0.0) {
            if self.sure.len() >= CHOICES_MAX && !self.sure.contains_key(&choice) {
                return;
            }
            let (sum, count) = self.sure.entry(choice).or_default();
            (*sum, *count) = (*sum + logprob.max(LOGPROB_MIN), count.saturating_add(1));
        }
    }

    fn answered(self) -> Answered {
        let means = self.sure.values().map(|(sum, count)| sum / f64::from(*count));
        let mean_logprob = means.min_by(f64::total_cmp);
        Answered { texts: self.texts.into_values().collect(), refuses: self.refuses, mean_logprob }
    }
}

/// An answer, or an event of one: each has some of these.
#[derive(Deserialize)]
struct Document<'a> {
    #[serde(default)]
    choices: Option<Vec<Choice>>,
    #[serde(default)]
    stop_reason: Option<String>,
    #[serde(default)]
    incomplete_details: Option<Reason>,
    #[serde(default)]
    output: Option<Vec<Item>>,
    #[serde(default)]
    details: Option<Details>,
    #[serde(default)]
    token: Option<Token>,
    #[serde(borrow, default)]
    response: Option<Box<Document<'a>>>,
    /// An object in Anthropic's events, a text in the Responses API's.
    #[serde(borrow, default)]
    delta: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Choice {
    #[serde(default)]
    index: Option<u64>,
    #[serde(default)]
    finish_reason: Option<String>,
    #[serde(default)]
    logprobs: Option<Logprobs>,
}

/// Of a chat, or of a completion.
#[derive(Deserialize)]
struct Logprobs {
    #[serde(default)]
    content: Option<Vec<Token>>,
    #[serde(default)]
    token_logprobs: Option<Vec<Option<f64>>>,
}

impl Logprobs {
    fn all(&self) -> impl Iterator<Item = f64> {
        let of_chat = self.content.iter().flatten().filter_map(|token| token.logprob);
        of_chat.chain(self.token_logprobs.iter().flatten().filter_map(|logprob| *logprob))
    }
}

#[derive(Deserialize)]
struct Token {
    #[serde(default)]
    logprob: Option<f64>,
}

#[derive(Deserialize)]
struct Item {
    #[serde(default)]
    content: Option<Vec<Part>>,
}

#[derive(Deserialize)]
struct Part {
    #[serde(default)]
    logprobs: Option<Vec<Token>>,
}

#[derive(Deserialize)]
struct Details {
    #[serde(default)]
    tokens: Option<Vec<Token>>,
}

#[derive(Deserialize)]
struct Reason {
    #[serde(default)]
    reason: Option<String>,
}

#[derive(Deserialize)]
struct Delta {
    #[serde(default)]
    stop_reason: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use Operation::{Chat, Completions, Generate, Messages, Responses};

    fn told(operation: Operation, body: &str) -> (String, Option<&'static str>, Option<f64>) {
        let Answered { texts, refuses, mean_logprob } = read(operation, body.as_bytes(), body.starts_with("data:"));
        (texts.join("|"), refuses, mean_logprob)
    }

    #[test]
    fn every_dialect_tells_what_it_says_and_whether_it_refuses() {
        for (operation, body, said, refuses) in [
            (Chat, r#"{"choices":[{"message":{"content":"a \"b\""}},{"message":{"content":"c"}}]}"#, "a \"b\"|c", None),
            (Chat, r#"{"choices":[{"message":{"content":null,"refusal":"no"}}]}"#, "", Some("refusal")),
            (Chat, r#"{"choices":[{"message":{"content":"x","refusal":null}}]}"#, "x", None),
            (
                Chat,
                r#"{"choices":[{"finish_reason":"content_filter","message":{"content":""}}]}"#,
                "",
                Some("content_filter"),
            ),
            (
                Messages,
                r#"{"content":[{"type":"text","text":"a"},{"type":"text","text":"b"}],"stop_reason":"refusal"}"#,
                "ab",
                Some("stop_reason"),
            ),
            (
                Responses,
                r#"{"output":[{"type":"message","content":[{"type":"refusal","refusal":"no"}]}]}"#,
                "",
                Some("refusal"),
            ),
            (
                Responses,
                r#"{"output":[],"incomplete_details":{"reason":"content_filter"}}"#,
                "",
                Some("content_filter"),
            ),
            (Completions, r#"{"choices":[{"text":"a","finish_reason":"stop"}]}"#, "a", None),
            (Generate, r#"{"generated_text":"a"}"#, "a", None),
        ] {
            assert_eq!(told(operation, body), (said.to_owned(), refuses, None), "{body}");
        }
    }

    #[test]
    fn a_stream_tells_the_same_as_a_whole_answer() {
        let chat = "data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"{\\\"a\"},\"logprobs\":{\"content\":[{\"logprob\":-1}]}}]}\n\ndata: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"\\\":1}\"},\"finish_reason\":\"content_filter\",\"logprobs\":{\"content\":[{\"logprob\":-3}]}}]}\n\ndata: [DONE]\n\n";
        assert_eq!(told(Chat, chat), ("{\"a\":1}".to_owned(), Some("content_filter"), Some(-2.0)));
        let message = "data: {\"type\":\"message_delta\",\"delta\":{\"stop_reason\":\"refusal\"}}\n\n";
        assert_eq!(told(Messages, message).1, Some("stop_reason"));
        let response = "data: {\"type\":\"response.incomplete\",\"delta\":\"x\",\"response\":{\"incomplete_details\":{\"reason\":\"content_filter\"}}}\n\n";
        assert_eq!(told(Responses, response).1, Some("content_filter"));
    }

    #[test]
    fn the_choice_that_is_least_sure_counts_by_its_mean() {
        let of = |operation, body: &str| told(operation, body).2;
        let chat = r#"{"choices":[{"logprobs":{"content":[{"logprob":-0.5},{"logprob":-1.5}]}},{"logprobs":{"content":[{"logprob":-0.1}]}}]}"#;
        assert_eq!(of(Chat, chat), Some(-1.0));
        assert_eq!(
            of(Completions, r#"{"choices":[{"logprobs":{"token_logprobs":[null,-2.0,-9999.0]}}]}"#),
            Some(-51.0)
        );
        assert_eq!(of(Responses, r#"{"output":[{"content":[{"logprobs":[{"logprob":-0.25}]}]}]}"#), Some(-0.25));
        assert_eq!(of(Generate, r#"{"generated_text":"a","details":{"tokens":[{"logprob":-4}]}}"#), Some(-4.0));
        assert_eq!(of(Chat, r#"{"choices":[{"logprobs":null}]}"#), None);
    }

    #[test]
    fn what_is_no_answer_tells_nothing() {
        for body in ["", "no", "[1]", r#"{"choices":7}"#, "data: {\n\n", r#"{"choices":[{"logprobs":"x"}]}"#] {
            assert_eq!(told(Chat, body), (String::new(), None, None), "{body}");
        }
    }
}
