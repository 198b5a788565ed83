//! Remote: what another service says of a text: a moderation API, a model that judges, or a service of one's own.
//!
//! Nothing is sent here: a [`Remote`] says what to send and what an answer means. Whoever sends it holds to
//! [`Remote::deadline`], [`Remote::calls_max`] and [`Remote::kept`].

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::digest;
use bytes::Bytes;
use http::{HeaderName, HeaderValue, Uri};
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Value, json};

use super::stream::{Finder, Found, Scanner, Search, Window};
use super::{Config as RuleConfig, Detector, Guardrails, Place, Verdict, World, Wrong};
use crate::secret::SecretSource;
use crate::sink::{self, Post};

/// What another service says. It gets every text of the rule's places, as the other rules left it.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "RemoteRule")]
pub struct Config {
    /// How it is asked.
    pub shape: Shape,
    /// Where it is asked, path and all: `https://api.example.com/v1/moderations`.
    pub url: String,
    /// More headers.
    #[serde(default)]
    pub headers: BTreeMap<String, String>,
    /// More headers whose values are secrets, such as `authorization`.
    #[serde(default)]
    pub secret_headers: BTreeMap<String, SecretSource>,
    /// The model that is asked. A judge needs one.
    #[serde(default)]
    pub model: Option<String>,
    /// What a judge is asked, with `{text}` where the text stands. Absent: the text alone, as a message of the user or of
    /// the assistant, as Llama Guard wants it.
    #[serde(default)]
    pub template: Option<String>,
    /// The categories of a moderation that count, each with the least score, such as `violence: 0.4`. Absent: what the
    /// service itself flags.
    #[serde(default)]
    pub categories: Option<BTreeMap<String, f64>>,
    /// The codes of a judge that count, such as `S1`. Absent: all.
    #[serde(default)]
    pub codes: Option<Vec<String>>,
    /// How long the whole answer may take, in milliseconds. Then `on_error` decides.
    #[serde(default = "deadline_ms")]
    #[schemars(range(min = 1, max = 60_000))]
    pub deadline_ms: u64,
    /// How many calls may be under way at once.
    #[serde(default = "calls_max")]
    #[schemars(range(min = 1, max = 1_000))]
    pub calls_max: usize,
    /// For so many seconds what it said of a text is not asked again. 0: never kept.
    #[serde(default = "cache_s")]
    #[schemars(range(max = 86_400))]
    pub cache_s: u64,
    /// The longest text that is sent, in bytes. A longer one cannot be judged (`on_error`).
    #[serde(default = "bytes_max")]
    #[schemars(range(min = 1, max = 1_048_576))]
    pub bytes_max: usize,
    /// Whether a prompt is judged beside the upstream call: nothing of the answer leaves before both are there, and the
    /// upstream is left where the prompt does not pass. Only for prompts, and not to redact.
    #[serde(default)]
    pub beside: bool,
    /// What happens to streams, where it looks at answers: only `hold`, they are held to their end.
    #[serde(default)]
    pub stream: Option<OnStream>,
}

/// How another service is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[schemars(rename = "RemoteShape")]
pub enum Shape {
    /// As OpenAI's moderations are: many texts at once, categories with scores back.
    Moderation,
    /// As a chat model is, which answers `safe`, or `unsafe` and codes in the next line.
    Judge,
    /// As JSON: `{"rule", "side", "spans": [{"place", "text"}]}`; back comes `{"verdict": "allow"}` or, for example,
    /// `{"verdict": "block", "label": "x", "spans": [{"span": 0, "start": 3, "end": 9, "label": "x"}]}`, in bytes of UTF-8.
    Webhook,
}

/// What happens to a stream whose answer must be judged as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[schemars(rename = "RemoteOnStream")]
pub enum OnStream {
    /// It is held to its end.
    Hold,
}

fn deadline_ms() -> u64 {
    1_000
}

fn calls_max() -> usize {
    16
}

fn cache_s() -> u64 {
    300
}

fn bytes_max() -> usize {
    64 << 10
}

/// A service that is asked.
#[derive(Debug)]
pub struct Remote {
    config: Config,
    rule: Box<str>,
    url: Uri,
    headers: Vec<(HeaderName, HeaderValue)>,
    /// What makes its verdicts its own, in a cache that others use too.
    seed: Box<str>,
}

/// A text that it is asked about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// What the text is.
    pub place: Place,
    /// The text.
    pub text: Arc<str>,
}

/// One call, and the questions that it asks.
#[derive(Debug)]
pub struct Call {
    /// What is sent.
    pub post: Post,
    /// Which of the questions it asks.
    pub questions: Range<usize>,
}

/// What was found in one text: what it is called, and where.
pub type Finds = Vec<(Arc<str>, Range<u64>)>;

/// So many texts are asked about in one moderation.
const BATCH: usize = 32;
/// The longest name of a find.
const LABEL_MAX: usize = 64;

pub(super) fn build(rule: &RuleConfig, config: &Config, world: &mut World<'_>) -> Result<Detector, Vec<Wrong>> {
    let mut wrong = contradictions(rule, config);
    let url = sink::url(&config.url).map_err(|fault| wrong.push(fault));
    let headers = sink::headers(&config.headers, &config.secret_headers, world.secret);
    let headers = headers.map_err(|fault| wrong.push(fault));
    let (Ok(url), Ok(headers), true) = (url, headers, wrong.is_empty()) else { return Err(wrong) };
    let (rule, seed) = (rule.name.as_str().into(), format!("{config:?}").into());
    Ok(Detector::Remote(Arc::new(Remote { config: config.clone(), rule, url, headers, seed })))
}

/// What cannot be meant.
fn contradictions(rule: &RuleConfig, config: &Config) -> Vec<Wrong> {
    let mut wrong = Vec::new();
    let mut unless = |holds: bool, path: &str, message: &str| {
        if !holds {
            wrong.push((path.to_owned(), message.to_owned()));
        }
    };
    let (answers, redacts) = (rule.places.iter().any(|place| !place.is_prompt()), rule.verdict == Verdict::Redact);
    let (judges, webhook) = (config.shape == Shape::Judge, config.shape == Shape::Webhook);
    unless((1..=60_000).contains(&config.deadline_ms), ".deadline_ms", "it must be 1 to 60000");
    unless((1..=1_000).contains(&config.calls_max), ".calls_max", "it must be 1 to 1000");
    unless(config.cache_s <= 86_400, ".cache_s", "it must be at most 86400");
    unless((1..=1 << 20).contains(&config.bytes_max), ".bytes_max", "it must be 1 to 1048576");
    unless(!judges || config.model.is_some(), ".model", "a judge is a model: name it");
    unless(judges || config.template.is_none(), ".template", "only a judge is asked with a template");
    let asks = config.template.as_ref().is_none_or(|template| template.contains("{text}"));
    unless(asks, ".template", "it has no {text}: the judge would not see what it judges");
    unless(judges || config.codes.is_none(), ".codes", "only a judge tells codes");
    let moderates = config.shape == Shape::Moderation;
    unless(moderates || config.categories.is_none(), ".categories", "only a moderation tells categories");
    let scores = config.categories.iter().flatten().all(|(_, least)| (0.0..=1.0).contains(least));
    unless(scores, ".categories", "a score is from 0 to 1");
    unless(webhook || !redacts, "", "only a webhook says where something is: make the verdict `flag` or `block`");
    unless(!(answers && redacts), "", "what it says of answers cannot be redacted: take the answer's places out");
    let hold = "an answer can be a stream, which it can only read as a whole: say `stream: hold`, or take the answer's places out";
    unless(!answers || config.stream.is_some(), ".stream", hold);
    unless(answers || config.stream.is_none(), ".stream", "it looks at no answer: take it out");
    unless(!(config.beside && answers), ".beside", "only a prompt can be judged beside the upstream call");
    unless(!(config.beside && redacts), ".beside", "what the upstream has already cannot be redacted: take it out");
    wrong
}

impl Remote {
    /// How long everything may take.
    pub fn deadline(&self) -> Duration {
        Duration::from_millis(self.config.deadline_ms)
    }

    /// How many calls may be under way.
    pub fn calls_max(&self) -> usize {
        self.config.calls_max
    }

    /// How long what it said holds.
    pub fn kept(&self) -> Duration {
        Duration::from_secs(self.config.cache_s)
    }

    /// The longest text that it gets.
    pub fn bytes_max(&self) -> usize {
        self.config.bytes_max
    }

    /// Whether it is asked beside the upstream.
    pub fn is_beside(&self) -> bool {
        self.config.beside
    }

    /// What a verdict is kept under: nothing of the text can be told from it.
    pub fn key(&self, question: &Question) -> [u8; 32] {
        let mut context = digest::Context::new(&digest::SHA256);
        for part in [&*self.seed, "\0", question.place.name(), "\0", &*question.text] {
            context.update(part.as_bytes());
        }
        context.finish().as_ref().try_into().unwrap_or_default()
    }

    /// The calls that ask these questions.
    pub fn calls(&self, questions: &[Question]) -> Vec<Call> {
        let size = match self.config.shape {
            Shape::Moderation => BATCH,
            Shape::Judge => 1,
            Shape::Webhook => questions.len().max(1),
        };
        let starts = (0..questions.len()).step_by(size);
        starts
            .map(|start| {
                let range = start..(start + size).min(questions.len());
                Call { post: self.post(&questions[range.clone()]), questions: range }
            })
            .collect()
    }

    fn post(&self, questions: &[Question]) -> Post {
        let body = match self.config.shape {
            Shape::Moderation => self.moderation(questions),
            Shape::Judge => self.judgement(questions),
            Shape::Webhook => self.webhook(questions),
        };
        let mut headers = vec![(http::header::CONTENT_TYPE, HeaderValue::from_static("application/json"))];
        headers.extend(self.headers.iter().cloned());
        Post { url: self.url.clone(), headers, body: Bytes::from(body.to_string()) }
    }

    fn moderation(&self, questions: &[Question]) -> Value {
        let input: Vec<&str> = questions.iter().map(|question| &*question.text).collect();
        match &self.config.model {
            Some(model) => json!({"input": input, "model": model}),
            None => json!({"input": input}),
        }
    }

    fn judgement(&self, questions: &[Question]) -> Value {
        let Some(Question { place, text }) = questions.first() else { return Value::Null };
        let (role, content) = match &self.config.template {
            Some(template) => ("user", template.replace("{text}", text)),
            None if place.is_prompt() && *place != Place::PromptAssistant => ("user", text.to_string()),
            None => ("assistant", text.to_string()),
        };
        let messages = json!([{"role": role, "content": content}]);
        json!({"model": self.config.model, "messages": messages, "max_tokens": 32, "temperature": 0})
    }

    fn webhook(&self, questions: &[Question]) -> Value {
        let side = if questions.iter().all(|question| question.place.is_prompt()) { "prompt" } else { "answer" };
        let span = |question: &Question| json!({"place": question.place.name(), "text": &*question.text});
        json!({"rule": self.rule, "side": side, "spans": questions.iter().map(span).collect::<Vec<_>>()})
    }

    /// What the answer to a call with these questions found in each. The error says what is wrong with it, and shows
    /// nothing of any text.
    pub fn read(&self, questions: &[Question], answer: &[u8]) -> Result<Vec<Finds>, String> {
        let finds = match self.config.shape {
            Shape::Moderation => self.moderated(questions, serde_json::from_slice(answer).map_err(unread)?),
            Shape::Judge => self.judged(questions, &serde_json::from_slice(answer).map_err(unread)?),
            Shape::Webhook => told(questions, serde_json::from_slice(answer).map_err(unread)?),
        }?;
        if finds.len() == questions.len() {
            Ok(finds)
        } else {
            Err("it answers more or fewer than were asked".to_owned())
        }
    }

    fn moderated(&self, questions: &[Question], answer: Moderations) -> Result<Vec<Finds>, String> {
        let labels = |result: &Moderation| -> Result<Vec<Arc<str>>, String> {
            let Some(categories) = &self.config.categories else {
                let named = result.categories.iter().filter(|(_, is)| is.unwrap_or(false)).map(|(name, _)| label(name));
                let named: Vec<Arc<str>> = named.collect();
                return Ok(match result.flagged {
                    true if named.is_empty() => vec!["flagged".into()],
                    true => named,
                    false => Vec::new(),
                });
            };
            let mut over = Vec::new();
            for (name, least) in categories {
                let score = result.category_scores.get(name).ok_or_else(|| format!("it has no score of {name}"))?;
                if score >= least {
                    over.push(label(name));
                }
            }
            Ok(over)
        };
        let whole = |(result, question): (&Moderation, &Question)| Ok(whole(labels(result)?, question));
        if answer.results.len() != questions.len() {
            return Err("it answers more or fewer than were asked".to_owned());
        }
        answer.results.iter().zip(questions).map(whole).collect()
    }

    /// `safe`, or `unsafe` and codes. Anything else is no verdict.
    fn judged(&self, questions: &[Question], answer: &Value) -> Result<Vec<Finds>, String> {
        let said = answer["choices"][0]["message"]["content"].as_str().ok_or("it says nothing")?;
        let (first, rest) = said.trim().split_once('\n').unwrap_or((said.trim(), ""));
        let codes: Vec<&str> = rest.split([',', '\n']).map(str::trim).filter(|code| !code.is_empty()).collect();
        let counts = |code: &&str| self.config.codes.as_ref().is_none_or(|codes| codes.iter().any(|one| one == code));
        let labels = match first.trim().to_ascii_lowercase().as_str() {
            "safe" => Vec::new(),
            // Whoever does not say why is believed.
            "unsafe" if codes.is_empty() => vec!["unsafe".into()],
            "unsafe" => codes.into_iter().filter(counts).map(label).collect(),
            _ => return Err("it says neither safe nor unsafe".to_owned()),
        };
        Ok(questions.iter().map(|question| whole(labels.clone(), question)).collect())
    }
}

fn unread(error: serde_json::Error) -> String {
    format!("its answer is not of this shape, at column {}", error.column())
}

/// A name that a service gives, for records: short and plain.
fn label(name: &str) -> Arc<str> {
    let plain: String = name.chars().filter(|c| !c.is_control()).take(LABEL_MAX).collect();
    if plain.is_empty() { "found".into() } else { plain.into() }
}

fn whole(labels: Vec<Arc<str>>, question: &Question) -> Finds {
    labels.into_iter().map(|label| (label, 0..question.text.len() as u64)).collect()
}

#[derive(Deserialize)]
struct Moderations {
    results: Vec<Moderation>,
}

#[derive(Deserialize)]
struct Moderation {
    flagged: bool,
    #[serde(default)]
    categories: BTreeMap<String, Option<bool>>,
    #[serde(default)]
    category_scores: BTreeMap<String, f64>,
}

#[derive(Deserialize)]
struct Told {
    verdict: ToldVerdict,
    #[serde(default)]
    label: Option<String>,
    #[serde(default)]
    spans: Vec<ToldSpan>,
}

#[derive(Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum ToldVerdict {
    Allow,
    Flag,
    Redact,
    Block,
}

#[derive(Deserialize)]
struct ToldSpan {
    span: usize,
    start: usize,
    end: usize,
    #[serde(default)]
    label: Option<String>,
}

/// What a webhook found. Where it does not say where, it is everywhere.
fn told(questions: &[Question], answer: Told) -> Result<Vec<Finds>, String> {
    let named = |own: Option<String>| label(own.as_deref().or(answer.label.as_deref()).unwrap_or("found"));
    if answer.verdict == ToldVerdict::Allow {
        return Ok(vec![Vec::new(); questions.len()]);
    }
    if answer.spans.is_empty() {
        return Ok(questions.iter().map(|question| whole(vec![named(None)], question)).collect());
    }
    let mut finds: Vec<Finds> = vec![Vec::new(); questions.len()];
    for ToldSpan { span, start, end, label } in answer.spans {
        let text = questions.get(span).map(|question| &*question.text).and_then(|text| text.get(start..end));
        if text.is_none_or(str::is_empty) {
            return Err("a span of its answer is no piece of the text".to_owned());
        }
        finds[span].push((named(label), start as u64..end as u64));
    }
    Ok(finds)
}

impl Guardrails {
    /// The services that are asked about prompts, or about answers, with their rules.
    pub fn remotes(&self, prompts: bool) -> impl Iterator<Item = (usize, &Arc<Remote>)> {
        let looks = move |places: &[Place]| places.iter().any(|place| place.is_prompt() == prompts);
        self.rules.iter().enumerate().filter_map(move |(index, rule)| match &rule.detector {
            Detector::Remote(remote) if looks(&rule.places) => Some((index, remote)),
            _ => None,
        })
    }

    /// A rule's service, if it is one that asks.
    pub fn remote(&self, rule: usize) -> Option<&Arc<Remote>> {
        match &self.rules.get(rule)?.detector {
            Detector::Remote(remote) => Some(remote),
            _ => None,
        }
    }

    /// What does with one whole text what `rule` wants, now that it is known what is in it.
    pub fn heard(&self, rule: usize, finds: &Finds) -> Arc<Scanner> {
        let mut found: Vec<Found> =
            finds.iter().map(|(label, range)| Found { rule, label: label.clone(), range: range.clone() }).collect();
        found.sort_by_key(|found| (found.range.start, found.range.end));
        Arc::new(Scanner::new(self.acts.clone(), vec![Arc::new(Heard { found })], Vec::new()))
    }
}

/// What is known of a text before it is read.
#[derive(Debug)]
struct Heard {
    found: Vec<Found>,
}

impl Finder for Heard {
    fn begin(self: Arc<Self>) -> Box<dyn Search> {
        Box::new(Hearing(self))
    }

    fn hold_max(&self) -> usize {
        usize::MAX >> 2
    }
}

struct Hearing(Arc<Heard>);

impl Search for Hearing {
    fn advance(&mut self, window: &Window<'_>, found: &mut Vec<Found>) -> u64 {
        if !window.last {
            return 0;
        }
        found.extend(self.0.found.iter().cloned());
        window.base + window.text.len() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::super::redact::Placeholders;
    use super::super::tests::built;
    use super::*;

    fn rule(places: &str, verdict: &str, config: &str) -> String {
        format!(
            r#"[{{"name":"r","in":[{places}],"verdict":"{verdict}","remote":{{"url":"https://x.example/v1","headers":{{"x-a":"b"}},{config}}}}}]"#
        )
    }

    fn remote(config: &str) -> Arc<Remote> {
        let guardrails = built(&rule(r#""prompt.user""#, "block", config)).unwrap();
        Arc::clone(guardrails.remote(0).unwrap())
    }

    fn questions(texts: &[&str]) -> Vec<Question> {
        texts.iter().map(|text| Question { place: Place::PromptUser, text: (*text).into() }).collect()
    }

    fn sent(remote: &Remote, texts: &[&str]) -> Vec<Value> {
        let calls = remote.calls(&questions(texts));
        calls.iter().map(|call| serde_json::from_slice(&call.post.body).unwrap()).collect()
    }

    /// What was found in each text, or what is wrong.
    fn heard(remote: &Remote, texts: &[&str], answer: &Value) -> Result<Vec<Vec<String>>, String> {
        let finds = remote.read(&questions(texts), answer.to_string().as_bytes())?;
        Ok(finds.into_iter().map(|finds| finds.iter().map(|(label, _)| label.to_string()).collect()).collect())
    }

    #[test]
    fn a_moderation_asks_about_many_texts_at_once_and_scores_count_from_their_thresholds_on() {
        let moderation = remote(r#""shape":"moderation","model":"m","categories":{"hate":0.5,"self-harm":0.1}"#);
        let many: Vec<String> = (0..40).map(|n| n.to_string()).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        let calls = moderation.calls(&questions(&many));
        assert_eq!(calls.iter().map(|call| call.questions.clone()).collect::<Vec<_>>(), [0..32, 32..40]);
        assert_eq!(sent(&moderation, &["a", "b"]), [json!({"input": ["a", "b"], "model": "m"})]);
        let scores =
            |hate: f64, harm: f64| json!({"flagged": false, "category_scores": {"hate": hate, "self-harm": harm}});
        let answer = json!({"results": [scores(0.5, 0.0), scores(0.49, 0.0)]});
        assert_eq!(heard(&moderation, &["a", "b"], &answer).unwrap(), [vec!["hate".to_owned()], vec![]]);
        assert!(heard(&moderation, &["a"], &answer).is_err(), "two answers to one question");
        assert!(heard(&moderation, &["a"], &json!({"results": [{"flagged": false}]})).is_err(), "no score, no verdict");
        let own = remote(r#""shape":"moderation""#);
        let answer = json!({"results": [{"flagged": true, "categories": {"hate": true, "violence": false}}]});
        assert_eq!(heard(&own, &["a"], &answer).unwrap(), [vec!["hate".to_owned()]]);
    }

    #[test]
    fn a_judge_says_safe_or_unsafe_and_anything_else_is_no_verdict() {
        let judge = remote(r#""shape":"judge","model":"guard","codes":["S1","S3"]"#);
        assert_eq!(sent(&judge, &["a"])[0]["messages"], json!([{"role": "user", "content": "a"}]));
        let said = |text: &str| heard(&judge, &["a"], &json!({"choices": [{"message": {"content": text}}]}));
        assert_eq!(said("\n\nsafe"), Ok(vec![vec![]]));
        assert_eq!(said("unsafe\nS1,S9, S3"), Ok(vec![vec!["S1".to_owned(), "S3".to_owned()]]));
        assert_eq!(said("unsafe"), Ok(vec![vec!["unsafe".to_owned()]]));
        assert!(said("I think it is safe").is_err() && said("").is_err());
        let asked = remote(r#""shape":"judge","model":"guard","template":"Is this fine?\n{text}""#);
        assert_eq!(sent(&asked, &["a"])[0]["messages"][0]["content"], "Is this fine?\na");
    }

    #[test]
    fn a_webhook_gets_all_spans_and_says_where_something_is() {
        let webhook = remote(r#""shape":"webhook""#);
        let expected = json!({"rule": "r", "side": "prompt", "spans": [{"place": "prompt.user", "text": "a"}]});
        assert_eq!(sent(&webhook, &["a"]), [expected]);
        assert_eq!(heard(&webhook, &["a", "b"], &json!({"verdict": "allow"})), Ok(vec![vec![], vec![]]));
        let spans =
            |start, end| json!({"verdict": "redact", "spans": [{"span": 1, "start": start, "end": end, "label": "x"}]});
        assert_eq!(heard(&webhook, &["a", "né"], &spans(1, 3)), Ok(vec![vec![], vec!["x".to_owned()]]));
        for (start, end) in [(0, 4), (0, 2), (2, 1), (1, 1)] {
            assert!(heard(&webhook, &["a", "né"], &spans(start, end)).is_err(), "{start} to {end}");
        }
        let everywhere = heard(&webhook, &["a"], &json!({"verdict": "block", "label": "bad\n"}));
        assert_eq!(everywhere, Ok(vec![vec!["bad".to_owned()]]));
        assert!(heard(&webhook, &["a"], &json!({"verdict": "maybe"})).is_err());
    }

    #[test]
    fn what_was_heard_is_done_as_the_rule_wants_it() {
        let redacts = built(&rule(r#""prompt.user""#, "redact", r#""shape":"webhook""#)).unwrap();
        let finds: Finds = vec![("x".into(), 6..9), ("y".into(), 0..2)];
        let text = "ab cd éfg";
        let progress = redacts.heard(0, &finds).judge(text, &mut Placeholders::default());
        assert_eq!(progress.apply(text), "[Y] cd [X]g");
        let blocks = built(&rule(r#""prompt.user""#, "block", r#""shape":"webhook""#)).unwrap();
        assert_eq!(blocks.heard(0, &finds).judge(text, &mut Placeholders::default()).blocked, Some(0));
    }

    #[test]
    fn a_verdict_is_kept_for_one_rule_one_place_and_one_text() {
        let (one, other) = (remote(r#""shape":"webhook""#), remote(r#""shape":"webhook","cache_s":1"#));
        let question = |place, text: &str| Question { place, text: text.into() };
        let asked = question(Place::PromptUser, "a");
        assert_eq!(one.key(&asked), one.key(&asked.clone()));
        for (remote, asked) in [
            (&other, asked.clone()),
            (&one, question(Place::PromptTool, "a")),
            (&one, question(Place::PromptUser, "b")),
        ] {
            assert_ne!(remote.key(&asked), one.key(&question(Place::PromptUser, "a")));
        }
    }

    #[test]
    fn what_cannot_be_kept_to_is_an_error() {
        let (prompt, answer) = (r#""prompt.user""#, r#""answer.content""#);
        for (places, verdict, config, path) in [
            (answer, "block", r#""shape":"webhook""#, ".stream"),
            (answer, "redact", r#""shape":"webhook","stream":"hold""#, ""),
            (answer, "block", r#""shape":"webhook","stream":"hold","beside":true"#, ".beside"),
            (prompt, "redact", r#""shape":"webhook","beside":true"#, ".beside"),
            (prompt, "redact", r#""shape":"moderation""#, ""),
            (prompt, "block", r#""shape":"judge""#, ".model"),
            (prompt, "block", r#""shape":"judge","model":"m","template":"x""#, ".template"),
            (prompt, "block", r#""shape":"webhook","deadline_ms":0"#, ".deadline_ms"),
            (prompt, "block", r#""shape":"moderation","categories":{"a":2}"#, ".categories"),
            (
                prompt,
                "block",
                r#""shape":"webhook","secret_headers":{"authorization":{"env":"NONE"}}"#,
                ".secret_headers.authorization",
            ),
        ] {
            let wrong = built(&rule(places, verdict, config)).unwrap_err();
            assert_eq!(wrong[0].0, format!("[0].remote{path}"), "{wrong:?}");
        }
    }
}
