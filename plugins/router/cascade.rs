//! Cascade: the cheap model answers first, and a dearer one only where that answer is not good enough.
//!
//! What is not good enough can be read off the answer: it does not fit the schema that the request asked for, it refuses,
//! or the model was unsure of its own words. Each of these is a weak witness, so only what hardly ever lies counts.

use std::fmt;
use std::sync::Arc;

use schemars::JsonSchema;
use serde::Deserialize;

use super::Wrong;
use crate::guardrail::schema::Asked;

/// Models that are asked one after another until one gives a good answer. It holds for requests that come to one of them;
/// those after that one are asked then.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[schemars(rename = "Cascade")]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The models, the cheapest first.
    #[schemars(length(min = 2, max = 4))]
    pub models: Vec<String>,
    /// Why the next one is asked.
    #[serde(default = "Cause::all")]
    pub on: Vec<Cause>,
    /// The next one is also asked where the mean log probability of the answer's tokens is below this, from -20 to 0.
    /// Only what the upstream tells counts: a client asks for it with `logprobs`.
    #[serde(default)]
    #[schemars(range(min = -20, max = 0))]
    pub mean_logprob_min: Option<f64>,
    /// What becomes of streams.
    #[serde(default)]
    pub streams: Streams,
}

/// Why an answer is not good enough.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Cause {
    /// No upstream of the model gave an answer: none was reached, or there was an error (5xx, 429, a context that is too
    /// short), after all retries and fallbacks of its own.
    Failure,
    /// The answer is not the JSON that the request's `response_format` asks for.
    Schema,
    /// The answer refuses: it says so in its own field (`refusal`, `finish_reason: content_filter`,
    /// `stop_reason: refusal`), or it is at most 400 characters and begins as refusals do.
    Refusal,
}

impl Cause {
    fn all() -> Vec<Self> {
        vec![Self::Failure, Self::Schema, Self::Refusal]
    }
}

/// What becomes of streams, of which the client would have the beginning before their end is known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Streams {
    /// The model that was chosen answers, and no other is asked. The record says so.
    #[default]
    Skip,
    /// All but the last model's answers are held to their end, while the client gets signs of life.
    Hold,
}

/// The longest text that can be a refusal by its words, in characters.
const REFUSAL_MAX: usize = 400;

/// How refusals begin.
const REFUSALS: [&str; 16] = [
    "i'm sorry, but i can't",
    "i'm sorry, but i cannot",
    "i'm sorry, i can't",
    "i'm sorry, i cannot",
    "i'm sorry, but i'm not able to",
    "i'm sorry, but i'm unable to",
    "sorry, but i can't",
    "sorry, i can't",
    "i can't help with",
    "i can't assist with",
    "i cannot help with",
    "i cannot assist with",
    "i cannot fulfill",
    "i'm unable to help with",
    "i'm unable to assist with",
    "i'm not able to help with",
];

/// A cascade as it is built.
#[derive(Debug)]
pub struct Cascade {
    models: Vec<Arc<str>>,
    on: Vec<Cause>,
    mean_logprob_min: Option<f64>,
    /// What becomes of streams.
    pub streams: Streams,
}

/// An answer, as far as it tells how good it is.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Answered {
    /// What each choice says.
    pub texts: Vec<String>,
    /// The field in which it refuses.
    pub refuses: Option<&'static str>,
    /// The mean log probability of the tokens of the choice that is least sure.
    pub mean_logprob: Option<f64>,
}

/// What is wrong with an answer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fault {
    /// It does not fit the schema: what of that it breaks.
    Schema(&'static str),
    /// It refuses, in this field.
    Refuses(&'static str),
    /// It is so unsure, and this is the least.
    Unsure(f64, f64),
}

impl Fault {
    /// The same in a word, for metrics.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Schema(_) => "schema",
            Self::Refuses(_) => "refusal",
            Self::Unsure(..) => "logprob",
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Schema(keyword) => write!(f, "schema: {keyword}"),
            Self::Refuses(field) => write!(f, "refusal: {field}"),
            Self::Unsure(is, least) => write!(f, "logprob: mean {is:.3} of {least:.3}"),
        }
    }
}

/// Builds one, or says all that is wrong with it.
pub fn build(config: &Config) -> Result<Cascade, Vec<Wrong>> {
    let mut wrong = Vec::new();
    let mut say = |path: String, message: &str| wrong.push((path, message.to_owned()));
    if !(2..=4).contains(&config.models.len()) {
        say(".models".to_owned(), "name 2 to 4 models, the cheapest first");
    }
    for (at, model) in config.models.iter().enumerate() {
        if config.models[..at].contains(model) {
            say(format!(".models[{at}]"), "is named before: each model is asked once");
        }
    }
    if config.on.is_empty() && config.mean_logprob_min.is_none() {
        say(".on".to_owned(), "nothing makes it ask the next model: name a cause, or give mean_logprob_min");
    }
    if config.mean_logprob_min.is_some_and(|least| !(-20.0..=0.0).contains(&least)) {
        say(".mean_logprob_min".to_owned(), "must be from -20 to 0");
    }
    let Config { on, mean_logprob_min, streams, .. } = config.clone();
    let models = config.models.iter().map(|model| model.as_str().into()).collect();
    if wrong.is_empty() { Ok(Cascade { models, on, mean_logprob_min, streams }) } else { Err(wrong) }
}

impl Cascade {
    /// The models to be asked after `model`; none if it is the last, or none of them.
    pub fn after(&self, model: &str) -> &[Arc<str>] {
        let at = self.models.iter().position(|known| **known == *model);
        at.and_then(|at| self.models.get(at + 1..)).unwrap_or_default()
    }

    /// Whether something of this kind makes it ask the next model.
    pub fn asks_on(&self, cause: Cause) -> bool {
        self.on.contains(&cause)
    }

    /// Whether it looks at answers.
    pub fn reads(&self) -> bool {
        self.mean_logprob_min.is_some() || self.on.iter().any(|cause| *cause != Cause::Failure)
    }

    /// What is wrong with an answer to a request that asked for a shape, or none.
    pub fn fault(&self, answered: &Answered, asked: &Asked) -> Option<Fault> {
        let refuses =
            || answered.refuses.or_else(|| answered.texts.iter().find(|text| refuses(text)).map(|_| "its words"));
        let wrong = || answered.texts.iter().find_map(|text| asked.wrong_with(text));
        let unsure =
            |least: f64| answered.mean_logprob.filter(|mean| *mean < least).map(|mean| Fault::Unsure(mean, least));
        let refusal = self.asks_on(Cause::Refusal).then(refuses).flatten().map(Fault::Refuses);
        let schema = || self.asks_on(Cause::Schema).then(wrong).flatten().map(Fault::Schema);
        refusal.or_else(schema).or_else(|| unsure(self.mean_logprob_min?))
    }
}

/// Whether a text says nothing but that it will not.
fn refuses(text: &str) -> bool {
    let text = text.trim_start();
    if text.chars().nth(REFUSAL_MAX).is_some() {
        return false;
    }
    let spelt = text.replace('\u{2019}', "'").to_lowercase();
    REFUSALS.iter().any(|refusal| spelt.starts_with(refusal))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn built(more: &str) -> Result<Cascade, Vec<Wrong>> {
        build(&serde_json::from_str(&format!(r#"{{"models": ["small", "middle", "large"]{more}}}"#)).unwrap())
    }

    fn says(text: &str) -> Answered {
        Answered { texts: vec![text.to_owned()], ..Answered::default() }
    }

    fn shape() -> Asked {
        Asked::of(Some(br#"{"type":"object","required":["name"]}"#), None).unwrap()
    }

    #[test]
    fn the_models_behind_the_one_that_was_chosen_are_asked() {
        let cascade = built("").unwrap();
        let after = |model| cascade.after(model).iter().map(|model| &**model).collect::<Vec<_>>();
        assert_eq!(after("small"), ["middle", "large"]);
        assert_eq!(after("middle"), ["large"]);
        assert_eq!((after("large").len(), after("other").len()), (0, 0));
    }

    #[test]
    fn an_answer_that_does_not_fit_refuses_or_is_unsure_is_not_good_enough() {
        let cascade = built(r#", "mean_logprob_min": -0.5"#).unwrap();
        let unsure = |mean| Answered { mean_logprob: Some(mean), ..says("ok") };
        let told = Answered { refuses: Some("refusal"), ..says("ok") };
        for (answered, asked, expected) in [
            (says(r#"{"name": 1}"#), shape(), None),
            (says("{}"), shape(), Some(Fault::Schema("required"))),
            (says("Sure! {\"name\": 1}"), shape(), Some(Fault::Schema("not_json"))),
            (says("Sure!"), Asked::default(), None),
            (told, Asked::default(), Some(Fault::Refuses("refusal"))),
            (
                says("I\u{2019}m sorry, but I can\u{2019}t do that."),
                Asked::default(),
                Some(Fault::Refuses("its words")),
            ),
            (unsure(-0.51), Asked::default(), Some(Fault::Unsure(-0.51, -0.5))),
            (unsure(-0.5), Asked::default(), None),
            (Answered::default(), shape(), None),
        ] {
            assert_eq!(cascade.fault(&answered, &asked), expected, "{answered:?}");
            assert!(expected.is_none_or(|fault| fault.to_string().starts_with(fault.word())));
        }
    }

    #[test]
    fn only_what_hardly_ever_lies_is_a_refusal() {
        for passes in ["I can't help but smile at this: yes.", "The phrase \"I'm sorry, but I can't\" is polite.", ""] {
            assert!(!refuses(passes), "{passes}");
        }
        let long = format!("I'm sorry, but I can't be brief. {}", "word ".repeat(100));
        assert!(!refuses(&long) && refuses(&long[..100]));
    }

    #[test]
    fn what_the_policy_does_not_name_is_no_reason() {
        let cascade = built(r#", "on": ["failure"]"#).unwrap();
        let answered = Answered { refuses: Some("refusal"), mean_logprob: Some(-9.0), texts: vec!["x".to_owned()] };
        assert_eq!(cascade.fault(&answered, &shape()), None);
        assert!(!cascade.reads() && cascade.asks_on(Cause::Failure));
    }

    #[test]
    fn what_cannot_be_meant_is_refused_at_its_place() {
        for (config, path) in [
            (r#"{"models": ["a"]}"#, ".models"),
            (r#"{"models": ["a", "b", "c", "d", "e"]}"#, ".models"),
            (r#"{"models": ["a", "b", "a"]}"#, ".models[2]"),
            (r#"{"models": ["a", "b"], "on": []}"#, ".on"),
            (r#"{"models": ["a", "b"], "mean_logprob_min": 0.1}"#, ".mean_logprob_min"),
        ] {
            assert_eq!(build(&serde_json::from_str(config).unwrap()).unwrap_err()[0].0, path, "{config}");
        }
    }
}
