//! Guardrails: which text may pass, and how it is changed. All of them read everything that they are asked to.
//!
//! A rule looks at some [places](Place) of an exchange with one kind of eyes, and has one [verdict](Verdict) for what it
//! finds. The rules of a place become one [`Scanner`], which gives the same answer however the text is cut into pieces
//! and holds back no more than what may still become a match (see [`stream`]).
//!
//! # What is not promised
//!
//! - Names, street addresses, employers, ages and places are not found. Nothing here understands a sentence.
//! - A phone number without a country code, a known shape or a word such as "call" near it is a number like any other.
//!   Identity numbers are found where their check digit or a word before them gives them away.
//! - A secret of no known shape is found only where it is assigned to something called a password, token or key.
//! - What is spelled out, written backwards, encoded (base64, hex, leetspeak), put into a picture or spread over several
//!   messages is not found. Words are compared letter for letter: a zero-width sign or a look-alike letter from another
//!   alphabet hides one.
//! - Injections are suspected, not known, and topics are guessed from what a text has in common with examples, both in
//!   English: an attack that is new, short or buried in a long document passes, and now and then something harmless is
//!   found. Whoever lets a model act on what others wrote must bound what it may do.
//! - A language is told from 40 letters on, by script and frequent words: enough to keep a conversation in its language,
//!   not to tell dialects.
//! - A schema is held against what stands there: `format` says nothing, and nobody looks whether what is right is true.
//! - Rules that are found to be wrong on some text cannot be excused for it here: write an `allow` list or use
//!   `mode: monitor` first.
//!
//! # A whole plugin
//!
//! Three exclamation marks in a row. It is asked again and again while a text comes in, and says how far it has decided:
//! what may still become a match waits.
//!
//! ```
//! use std::sync::Arc;
//!
//! use infergate_plugins::guardrail::{Finder, Found, Search, Window};
//!
//! #[derive(Debug)]
//! struct Shouting {
//!     /// Its place in the policy's list.
//!     rule: usize,
//! }
//!
//! impl Finder for Shouting {
//!     fn begin(self: Arc<Self>) -> Box<dyn Search> {
//!         Box::new(Listening { rule: self.rule, at: 0 })
//!     }
//!
//!     fn hold_max(&self) -> usize {
//!         2
//!     }
//! }
//!
//! struct Listening {
//!     rule: usize,
//!     /// What is before is decided.
//!     at: u64,
//! }
//!
//! impl Search for Listening {
//!     fn advance(&mut self, window: &Window<'_>, found: &mut Vec<Found>) -> u64 {
//!         let rest = |at: u64| &window.text[(at - window.base) as usize..];
//!         while let Some(here) = rest(self.at).find("!!!") {
//!             let start = self.at + here as u64;
//!             found.push(Found { rule: self.rule, label: "shouting".into(), range: start..start + 3 });
//!             self.at = start + 3;
//!         }
//!         let undecided = rest(self.at);
//!         let marks = undecided.len() - undecided.trim_end_matches('!').len();
//!         self.at += (undecided.len() - if window.last { 0 } else { marks }) as u64;
//!         self.at
//!     }
//! }
//!
//! // However the text is cut, the same is found.
//! for cut in 0..="No!!! Stop!!".len() {
//!     let (mut search, mut found) = (Arc::new(Shouting { rule: 7 }).begin(), Vec::new());
//!     for (end, last) in [(cut, false), (12, true)] {
//!         let window = Window { text: &"No!!! Stop!!"[..end], base: 0, last };
//!         let decided = search.advance(&window, &mut found);
//!         assert!(decided + 2 >= end as u64);
//!     }
//!     assert_eq!(found, [Found { rule: 7, label: "shouting".into(), range: 2..5 }]);
//! }
//! ```

pub mod json;
pub mod redact;
pub mod stream;

mod injection;
mod language;
mod marks;
mod patterns;
mod pii;
mod regex;
pub mod remote;
mod repetition;
mod runs;
pub mod schema;
mod secrets;
mod size;
mod topic;
mod triggers;
mod whole;
mod words;

use std::collections::{BTreeMap, HashSet};
use std::path::Path;
use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::sink::Resolve;
use patterns::{AsFound, Pattern, Patterns};
use redact::{Redaction, Style};
pub use size::Measure;
use stream::Act;
pub use stream::{Edit, Finder, Found, Progress, Scanner, Search, Stream, Window};
use whole::Whole;
use words::{Word, Words};

/// One rule. Exactly one of the kinds must be given.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Guardrail")]
pub struct Config {
    /// Its name, for records, metrics and headers.
    #[schemars(length(min = 1, max = 64))]
    pub name: String,
    /// Where it looks.
    #[serde(rename = "in")]
    #[schemars(length(min = 1))]
    pub places: Vec<Place>,
    /// What happens where it finds something.
    pub verdict: Verdict,
    /// Whether the verdict is carried out or only told.
    #[serde(default)]
    pub mode: Mode,
    /// What happens where it cannot run. Absent: `deny` where the verdict is carried out, else `allow`.
    #[serde(default)]
    pub on_error: Option<OnError>,
    /// What comes in the place of what it finds, where it redacts.
    #[serde(default)]
    pub redact: Option<Redaction>,
    /// Words and phrases.
    #[serde(default)]
    pub words: Option<words::Config>,
    /// Regular expressions.
    #[serde(default)]
    pub regex: Option<regex::Config>,
    /// Personal data of known shapes.
    #[serde(default)]
    pub pii: Option<pii::Config>,
    /// API keys, tokens, passwords, private keys.
    #[serde(default)]
    pub secrets: Option<secrets::Config>,
    /// More than is allowed.
    #[serde(default)]
    pub size: Option<size::Config>,
    /// The same again and again.
    #[serde(default)]
    pub repetition: Option<repetition::Config>,
    /// Another language than those that are allowed.
    #[serde(default)]
    pub language: Option<language::Config>,
    /// Attempts to override a model's instructions.
    #[serde(default)]
    pub injection: Option<injection::Config>,
    /// What it is about.
    #[serde(default)]
    pub topic: Option<topic::Config>,
    /// Another shape than it must have.
    #[serde(default)]
    pub schema: Option<schema::Config>,
    /// What another service finds.
    #[serde(default)]
    pub remote: Option<remote::Config>,
}

/// A part of an exchange that has text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize, Serialize, JsonSchema)]
#[schemars(rename = "GuardrailPlace")]
pub enum Place {
    /// Instructions of the application.
    #[serde(rename = "prompt.system")]
    PromptSystem,
    /// What the user says.
    #[serde(rename = "prompt.user")]
    PromptUser,
    /// What the model said before, as the caller tells it.
    #[serde(rename = "prompt.assistant")]
    PromptAssistant,
    /// What tools and documents say: nobody vouches for it.
    #[serde(rename = "prompt.tool")]
    PromptTool,
    /// The answer itself.
    #[serde(rename = "answer.content")]
    AnswerContent,
    /// How the model came to it.
    #[serde(rename = "answer.reasoning")]
    AnswerReasoning,
    /// What the model wants a tool to do.
    #[serde(rename = "answer.tool_arguments")]
    AnswerToolArguments,
    /// Why the model does not answer.
    #[serde(rename = "answer.refusal")]
    AnswerRefusal,
}

impl Place {
    /// Every place.
    pub const ALL: [Self; 8] = [
        Self::PromptSystem,
        Self::PromptUser,
        Self::PromptAssistant,
        Self::PromptTool,
        Self::AnswerContent,
        Self::AnswerReasoning,
        Self::AnswerToolArguments,
        Self::AnswerRefusal,
    ];

    /// Its word in the policy and in records.
    pub fn name(self) -> &'static str {
        match self {
            Self::PromptSystem => "prompt.system",
            Self::PromptUser => "prompt.user",
            Self::PromptAssistant => "prompt.assistant",
            Self::PromptTool => "prompt.tool",
            Self::AnswerContent => "answer.content",
            Self::AnswerReasoning => "answer.reasoning",
            Self::AnswerToolArguments => "answer.tool_arguments",
            Self::AnswerRefusal => "answer.refusal",
        }
    }

    /// Whether it belongs to what the caller sends.
    pub fn is_prompt(self) -> bool {
        matches!(self, Self::PromptSystem | Self::PromptUser | Self::PromptAssistant | Self::PromptTool)
    }
}

/// What happens to a text in which a rule finds something. Where rules differ, the strictest counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize, Serialize, JsonSchema)]
#[schemars(rename = "GuardrailVerdict")]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// It passes, and a header, a metric and the record tell.
    Flag,
    /// It passes without what was found.
    Redact,
    /// It does not pass. An answer that has begun ends before it.
    Block,
}

impl Verdict {
    /// Its word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Flag => "flag",
            Self::Redact => "redact",
            Self::Block => "block",
        }
    }
}

/// Whether a verdict is carried out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[schemars(rename = "GuardrailMode")]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// It is.
    #[default]
    Enforce,
    /// It is only told what would have happened: not one byte changes, and nothing waits.
    Monitor,
}

/// What happens where a rule cannot run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[schemars(rename = "GuardrailOnError")]
#[serde(rename_all = "lowercase")]
pub enum OnError {
    /// The text passes, and the record says that it was not read.
    Allow,
    /// The text does not pass.
    Deny,
}

/// What became of a rule on a text, for records.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize, Serialize, JsonSchema)]
#[schemars(rename = "GuardrailOutcome")]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// It read all that it was asked to, and found nothing.
    Passed,
    /// It found something and told.
    Flagged,
    /// It found something that was taken out.
    Redacted,
    /// It found something that did not pass.
    Blocked,
    /// It was not asked, or did not see the end.
    Skipped,
    /// It could not run.
    Failed,
    /// It did not answer in time.
    TimedOut,
}

/// What a kind makes of its configuration.
#[derive(Debug)]
pub(crate) enum Detector {
    /// Literals, searched for together with those of other rules.
    Words(Vec<Word>),
    /// Expressions, searched for together with those of other rules.
    Patterns(Vec<Pattern>),
    /// Searches of its own.
    Own(Vec<Arc<dyn Finder>>),
    /// Bounds of a whole prompt, and a search for answers.
    Size(size::Bounds),
    /// A view of whole texts.
    Whole(Whole),
    /// The shape of answers that are JSON, as they stand.
    Shape(schema::Shape),
    /// Another service, which somebody else asks.
    Remote(Arc<remote::Remote>),
}

/// A rule as the policy has it.
#[derive(Debug)]
pub struct Rule {
    /// Its name.
    pub name: Arc<str>,
    /// The word for its kind.
    pub kind: &'static str,
    /// Where it looks.
    pub places: Vec<Place>,
    /// What happens where it finds something.
    pub verdict: Verdict,
    /// Whether that is carried out.
    pub mode: Mode,
    /// What happens where it cannot run.
    pub on_error: OnError,
    redaction: Redaction,
    detector: Detector,
}

impl Rule {
    /// Whether it can change or end a text.
    pub fn enforces(&self) -> bool {
        self.mode == Mode::Enforce && self.verdict != Verdict::Flag
    }

    /// Whether nothing may pass that it could not read.
    pub fn insists(&self) -> bool {
        self.enforces() && self.on_error == OnError::Deny
    }

    /// What finding something means for it.
    pub fn outcome(&self) -> Outcome {
        match (self.mode, self.verdict) {
            (Mode::Monitor, _) | (_, Verdict::Flag) => Outcome::Flagged,
            (_, Verdict::Redact) => Outcome::Redacted,
            (_, Verdict::Block) => Outcome::Blocked,
        }
    }

    fn act(&self, key: &[u8]) -> Act {
        match self.verdict {
            _ if !self.enforces() => Act::Watch,
            Verdict::Redact => Act::Redact(Style::new(self.redaction, key)),
            _ => Act::Block,
        }
    }
}

/// The rules of a policy.
#[derive(Debug)]
pub struct Guardrails {
    rules: Vec<Rule>,
    acts: Vec<Act>,
    scanners: BTreeMap<Place, Arc<Scanner>>,
}

impl Guardrails {
    /// The rules, in the policy's order: what [`Found::rule`] counts.
    pub fn rules(&self) -> &[Rule] {
        &self.rules
    }

    /// What scans a place; None if no rule looks there.
    pub fn scanner(&self, place: Place) -> Option<&Arc<Scanner>> {
        self.scanners.get(&place)
    }

    /// Searches a text of `place` with one rule alone, which finds and changes nothing: for measurements. None if it does
    /// not look there.
    pub fn alone(&self, rule: usize, place: Place) -> Option<Arc<Scanner>> {
        let one = self.rules.get(rule).filter(|rule| rule.places.contains(&place))?;
        // Its words and expressions were put together before, with those of the others.
        let finders = finders(std::iter::once(one), place.is_prompt()).ok()?;
        let acts = vec![Act::Watch; self.rules.len()];
        Some(Arc::new(Scanner::new(acts, Vec::new(), finders)))
    }

    /// Whether some rule has to think about a text: it takes a millisecond for 32 KiB.
    pub fn thinks(&self) -> bool {
        self.rules.iter().any(|rule| matches!(rule.detector, Detector::Whole(_)))
    }

    /// The rules whose bounds a prompt exceeds, and by what.
    pub fn exceeded<'g>(&'g self, measure: &'g Measure) -> impl Iterator<Item = (usize, &'static str)> + 'g {
        self.rules.iter().enumerate().filter_map(move |(index, rule)| match &rule.detector {
            Detector::Size(bounds) if rule.places.iter().any(|place| place.is_prompt()) => {
                bounds.exceeded(measure).map(|what| (index, what))
            }
            _ => None,
        })
    }
}

/// What the world hands to guardrails that are built.
pub struct World<'a> {
    /// Reads a file of words or rules, or says why that cannot be done.
    pub file: &'a mut dyn FnMut(&Path) -> Result<String, String>,
    /// Finds a secret, or says why that cannot be done.
    pub secret: Resolve<'a>,
    /// The key of hashed redactions.
    pub key: &'a [u8],
}

/// What is wrong: the key below the list of guardrails, like `[0].regex.list[2]`, and what to do.
pub type Wrong = (String, String);

/// What is not good about rules that work, each with its key below the list: `check` warns of it.
pub fn warnings(configs: &[Config]) -> Vec<Wrong> {
    let of = |config: &Config| config.topic.as_ref().map(topic::warnings).unwrap_or_default();
    let each = configs.iter().enumerate();
    each.flat_map(|(at, config)| of(config).into_iter().map(move |(path, told)| (format!("[{at}].topic{path}"), told)))
        .collect()
}

/// The guardrails of a policy, or all that is wrong with them.
pub fn build(configs: &[Config], world: &mut World<'_>) -> Result<Guardrails, Vec<Wrong>> {
    let (mut rules, mut wrong, mut names) = (Vec::new(), Vec::new(), HashSet::new());
    for (index, config) in configs.iter().enumerate() {
        let at = |(path, message): Wrong| (format!("[{index}]{path}"), message);
        if !names.insert(&config.name) {
            wrong.push(at((".name".to_owned(), format!("{} is taken already by a rule above", config.name))));
        }
        wrong.extend(contradictions(config).into_iter().map(at));
        match detector(config, index, world) {
            Ok((kind, detector)) => rules.push(rule(config, kind, detector)),
            Err(faults) => wrong.extend(faults.into_iter().map(at)),
        }
    }
    if !wrong.is_empty() {
        return Err(wrong);
    }
    let scanners = scanners(&rules, world.key).map_err(|message| vec![(String::new(), message)])?;
    let acts = rules.iter().map(|rule| rule.act(world.key)).collect();
    Ok(Guardrails { rules, acts, scanners })
}

fn rule(config: &Config, kind: &'static str, detector: Detector) -> Rule {
    let strict = config.mode == Mode::Enforce && config.verdict != Verdict::Flag;
    let on_error = config.on_error.unwrap_or(if strict { OnError::Deny } else { OnError::Allow });
    Rule {
        name: config.name.as_str().into(),
        kind,
        places: config.places.clone(),
        verdict: config.verdict,
        mode: config.mode,
        on_error,
        redaction: config.redact.unwrap_or_default(),
        detector,
    }
}

/// What cannot be meant.
fn contradictions(config: &Config) -> Vec<Wrong> {
    let mut wrong = Vec::new();
    let mut tell = |path: &str, message: &str| wrong.push((path.to_owned(), message.to_owned()));
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    if !(1..=64).contains(&config.name.len()) || !config.name.bytes().all(plain) {
        tell(".name", "a rule's name has up to 64 letters, digits, - _ and .: it becomes a label");
    }
    if config.places.is_empty() {
        tell(".in", "it looks nowhere: give at least one place, like prompt.user");
    }
    if config.redact.is_some() && config.verdict != Verdict::Redact {
        tell(".redact", "nothing is redacted with this verdict: take it out, or make the verdict `redact`");
    }
    let answers = config.places.iter().any(|place| !place.is_prompt());
    if config.redact == Some(Redaction::Placeholder) && answers {
        tell(
            ".redact",
            "placeholders hide things from the model, so they are for prompts: take the answer's places out",
        );
    }
    let of_parts = config.size.is_some() || config.repetition.is_some() || config.language.is_some();
    let of_wholes = config.injection.is_some() || config.topic.is_some() || config.schema.is_some();
    if (of_parts || of_wholes) && config.verdict == Verdict::Redact {
        tell(".verdict", "there is nothing to take out of such a text: make it `flag` or `block`");
    }
    wrong
}

type Detected = Result<Detector, Vec<Wrong>>;

/// The one kind that a rule names.
fn detector(config: &Config, rule: usize, world: &mut World<'_>) -> Result<(&'static str, Detector), Vec<Wrong>> {
    let mut built: Vec<(&'static str, Detected)> = Vec::new();
    if let Some(config) = &config.words {
        built.push(("words", words::build(config, rule, world)));
    }
    if let Some(config) = &config.regex {
        built.push(("regex", regex::build(config, rule)));
    }
    if let Some(config) = &config.pii {
        built.push(("pii", pii::build(config, rule)));
    }
    if let Some(config) = &config.secrets {
        built.push(("secrets", secrets::build(config, rule, world)));
    }
    if let Some(config) = &config.size {
        built.push(("size", size::build(config, rule)));
    }
    if let Some(config) = &config.repetition {
        built.push(("repetition", repetition::build(config, rule)));
    }
    if let Some(config) = &config.language {
        built.push(("language", language::build(config, rule)));
    }
    if let Some(config) = &config.injection {
        built.push(("injection", injection::build(config, rule)));
    }
    if let Some(config) = &config.topic {
        built.push(("topic", topic::build(config, rule)));
    }
    if let Some(of_shapes) = &config.schema {
        built.push(("schema", schema::build(config, of_shapes, world)));
    }
    if let Some(of_service) = &config.remote {
        built.push(("remote", remote::build(config, of_service, world)));
    }
    let count = built.len();
    match (built.pop(), count) {
        (Some((kind, Ok(detector))), 1) => Ok((kind, detector)),
        (Some((kind, Err(wrong))), 1) => {
            Err(wrong.into_iter().map(|(path, message)| (format!(".{kind}{path}"), message)).collect())
        }
        (None, _) => Err(vec![(String::new(), format!("it looks for nothing: give one of {}", KINDS.join(", ")))]),
        (Some((kind, _)), _) => Err(vec![(format!(".{kind}"), "a rule is of one kind: make another rule".to_owned())]),
    }
}

/// Every built-in kind: the word in `policy.yaml`.
pub const KINDS: &[&str] =
    &["words", "regex", "pii", "secrets", "size", "repetition", "language", "injection", "topic", "schema", "remote"];

/// One scanner for each place where rules look; places with the same rules share it.
fn scanners(rules: &[Rule], key: &[u8]) -> Result<BTreeMap<Place, Arc<Scanner>>, String> {
    let mut made: Vec<(Vec<usize>, bool, Arc<Scanner>)> = Vec::new();
    let mut scanners = BTreeMap::new();
    for place in Place::ALL {
        let here: Vec<usize> = (0..rules.len()).filter(|index| rules[*index].places.contains(&place)).collect();
        let prompt = place.is_prompt();
        let scanner = match made.iter().find(|(rules, kind, _)| *rules == here && *kind == prompt) {
            _ if here.is_empty() => continue,
            Some((_, _, scanner)) => Arc::clone(scanner),
            None => Arc::new(scanner(rules, &here, prompt, key)?),
        };
        made.push((here, prompt, Arc::clone(&scanner)));
        if !scanner.is_idle() {
            scanners.insert(place, scanner);
        }
    }
    Ok(scanners)
}

fn scanner(rules: &[Rule], here: &[usize], prompt: bool, key: &[u8]) -> Result<Scanner, String> {
    let acts = rules.iter().map(|rule| rule.act(key)).collect();
    let of = |enforcing: bool| {
        let rules = here.iter().filter_map(|index| rules.get(*index)).filter(|rule| rule.enforces() == enforcing);
        finders(rules, prompt)
    };
    Ok(Scanner::new(acts, of(true)?, of(false)?))
}

/// As few searches as these rules can do with.
fn finders<'r>(rules: impl Iterator<Item = &'r Rule>, prompt: bool) -> Result<Vec<Arc<dyn Finder>>, String> {
    let mut finders: Vec<Arc<dyn Finder>> = Vec::new();
    let mut words: BTreeMap<bool, Vec<Word>> = BTreeMap::new();
    let mut patterns: BTreeMap<usize, Vec<Pattern>> = BTreeMap::new();
    for rule in rules {
        match &rule.detector {
            Detector::Words(more) => {
                more.iter().for_each(|word| words.entry(word.case).or_default().push(word.clone()));
            }
            Detector::Patterns(more) => {
                more.iter().for_each(|one| patterns.entry(one.cut()).or_default().push(one.clone()));
            }
            Detector::Own(own) => finders.extend(own.iter().cloned()),
            Detector::Size(bounds) if !prompt => finders.extend(bounds.finder()),
            Detector::Size(_) | Detector::Shape(_) | Detector::Remote(_) => {}
            Detector::Whole(whole) => finders.push(whole.finder(prompt)),
        }
    }
    for words in words.into_values() {
        finders.push(Arc::new(Words::new(words)?));
    }
    for patterns in patterns.into_values() {
        finders.push(Arc::new(Patterns::new(patterns, AsFound, false)?));
    }
    Ok(finders)
}

#[cfg(test)]
mod tests {
    use super::redact::Placeholders;
    use super::*;

    /// Builds what this JSON says; the one file there is has this text.
    pub fn built_with(json: &str, file: &str) -> Result<Guardrails, Vec<Wrong>> {
        let configs: Vec<Config> = serde_json::from_str(json).unwrap();
        build(
            &configs,
            &mut World {
                file: &mut |_| Ok(file.to_owned()),
                secret: &mut |_| Err("there is no secret".to_owned()),
                key: b"a key of the policy",
            },
        )
    }

    pub fn built(json: &str) -> Result<Guardrails, Vec<Wrong>> {
        built_with(json, "")
    }

    fn at(place: &str) -> Place {
        serde_json::from_value(place.into()).unwrap()
    }

    pub fn scanner_of(json: &str, file: &str, place: &str) -> Arc<Scanner> {
        Arc::clone(built_with(json, file).unwrap().scanner(at(place)).unwrap())
    }

    /// What a whole text becomes.
    pub fn judged_with(json: &str, file: &str, place: &str, text: &str) -> (String, Progress) {
        let progress = scanner_of(json, file, place).judge(text, &mut Placeholders::default());
        (progress.apply(text), progress)
    }

    pub fn judged(json: &str, place: &str, text: &str) -> (String, Progress) {
        judged_with(json, "", place, text)
    }

    /// What a text in pieces becomes; nothing that was released is ever taken back.
    pub fn streamed(scanner: &Arc<Scanner>, pieces: &[&str]) -> (String, Progress) {
        let (mut stream, mut placeholders) = (scanner.stream(), Placeholders::default());
        let (mut progress, mut all, mut pushed) = (Progress::default(), Progress::default(), 0);
        let last: &[&str] = &[""];
        for (index, piece) in pieces.iter().chain(last).enumerate() {
            match index == pieces.len() {
                true => stream.finish(&mut placeholders, &mut progress),
                false => stream.push(piece, &mut placeholders, &mut progress),
            }
            pushed += piece.len() as u64;
            assert!((all.released..=pushed).contains(&progress.released), "{pieces:?}");
            let outside = |edit: &Edit| edit.range.start < all.released || edit.range.end > progress.released;
            assert!(!progress.edits.iter().any(outside), "{pieces:?}: {progress:?}");
            let held = pushed - progress.released;
            assert!(progress.blocked.is_some() || held <= scanner.hold_max() as u64, "{held} held: {pieces:?}");
            all.edits.append(&mut progress.edits);
            all.found.append(&mut progress.found);
            (all.released, all.blocked) = (progress.released, progress.blocked);
        }
        (all.apply(&pieces.concat()), all)
    }

    /// Whether pieces make no difference: every way to cut a short text in three, a longer one in two; and pieces of one
    /// size each.
    pub fn same_however_cut_with(json: &str, file: &str, place: &str, text: &str) {
        let scanner = scanner_of(json, file, place);
        check_cuts(&scanner, text);
    }

    pub fn check_cuts(scanner: &Arc<Scanner>, text: &str) {
        let progress = scanner.judge(text, &mut Placeholders::default());
        let expected = (progress.apply(text), progress);
        let same = |pieces: &[&str]| {
            let (out, mut progress) = streamed(scanner, pieces);
            let mut wanted = expected.1.clone();
            // Rules that watch tell of what they find when it is released: sooner or later, but of the same.
            let order =
                |a: &Found, b: &Found| (a.range.start, a.range.end, a.rule).cmp(&(b.range.start, b.range.end, b.rule));
            progress.found.sort_by(order);
            wanted.found.sort_by(order);
            assert_eq!((out, progress), (expected.0.clone(), wanted), "{pieces:?}");
        };
        let cuts: Vec<usize> = (0..=text.len()).filter(|at| text.is_char_boundary(*at)).collect();
        for (nth, first) in cuts.iter().enumerate() {
            let seconds = if cuts.len() <= 64 { &cuts[nth..] } else { &cuts[nth..=nth] };
            for second in seconds {
                same(&[&text[..*first], &text[*first..*second], &text[*second..]]);
            }
        }
        for size in [1, 2, 3, 5, 8, 13] {
            let mut ends: Vec<usize> = cuts.iter().copied().step_by(size).collect();
            ends.push(text.len());
            same(&ends.windows(2).map(|pair| &text[pair[0]..pair[1]]).collect::<Vec<_>>());
        }
    }

    pub fn same_however_cut(json: &str, place: &str, text: &str) {
        same_however_cut_with(json, "", place, text);
    }

    const CHAT: &str = r#""in":["prompt.user","answer.content"]"#;

    fn rules(rules: &[&str]) -> String {
        format!("[{}]", rules.iter().map(|rule| rule.replace("CHAT", CHAT)).collect::<Vec<_>>().join(","))
    }

    #[test]
    fn every_problem_is_told_at_its_place() {
        let json = r#"[{"name":"a","in":["prompt.user"],"verdict":"block"},
            {"name":"a","in":[],"verdict":"block","words":{"list":["x"]}},
            {"name":"no good","in":["prompt.user"],"verdict":"flag","redact":"mask","words":{"list":["x"]}},
            {"name":"b","in":["answer.content"],"verdict":"redact","redact":"placeholder","regex":{"list":["ok","a+"]}},
            {"name":"c","in":["prompt.user"],"verdict":"redact","size":{"images_max":1}},
            {"name":"d","in":["prompt.user"],"verdict":"block","words":{"list":["x"]},"size":{"images_max":1}}]"#;
        let wrong = built(json).unwrap_err();
        let places: Vec<&str> = wrong.iter().map(|(path, _)| path.as_str()).collect();
        let expected = [
            "[0]",
            "[1].name",
            "[1].in",
            "[2].name",
            "[2].redact",
            "[3].redact",
            "[3].regex.list[1]",
            "[4].verdict",
            "[5].size",
        ];
        assert_eq!(places, expected, "{wrong:?}");
    }

    #[test]
    fn a_rule_that_enforces_fails_closed_unless_told_otherwise() {
        let json = rules(&[
            r#"{"name":"a",CHAT,"verdict":"block","words":{"list":["x"]}}"#,
            r#"{"name":"b",CHAT,"verdict":"block","mode":"monitor","words":{"list":["x"]}}"#,
            r#"{"name":"c",CHAT,"verdict":"flag","words":{"list":["x"]}}"#,
            r#"{"name":"d",CHAT,"verdict":"redact","on_error":"allow","words":{"list":["x"]}}"#,
        ]);
        let guardrails = built(&json).unwrap();
        let on_error: Vec<OnError> = guardrails.rules().iter().map(|rule| rule.on_error).collect();
        assert_eq!(on_error, [OnError::Deny, OnError::Allow, OnError::Allow, OnError::Allow]);
        assert!(guardrails.scanner(Place::AnswerContent).is_some());
        assert!(guardrails.scanner(Place::PromptTool).is_none(), "nobody looks there");
    }

    #[test]
    fn a_rule_that_only_watches_changes_and_holds_nothing() {
        let json = rules(&[
            r#"{"name":"a",CHAT,"verdict":"block","mode":"monitor","words":{"list":["secret plan"]}}"#,
            r#"{"name":"b",CHAT,"verdict":"flag","regex":{"list":["plan [a-z]{1,5}"]}}"#,
        ]);
        let scanner = scanner_of(&json, "", "answer.content");
        let (mut stream, mut progress) = (scanner.stream(), Progress::default());
        let mut count = 0;
        for (index, c) in "the secret plan b".chars().enumerate() {
            stream.push(&c.to_string(), &mut Placeholders::default(), &mut progress);
            assert_eq!((progress.released, stream.held()), (index as u64 + 1, 0));
            count += progress.found.len();
        }
        stream.finish(&mut Placeholders::default(), &mut progress);
        assert_eq!(count + progress.found.len(), 2);
    }

    #[test]
    fn redactions_that_overlap_become_one_and_a_block_among_them_wins() {
        let redacting = [
            r#"{"name":"a",CHAT,"verdict":"redact","regex":{"list":["bcd"],"label":"one"}}"#,
            r#"{"name":"b",CHAT,"verdict":"redact","regex":{"list":["cde"],"label":"two"}}"#,
        ];
        let (out, progress) = judged(&rules(&redacting), "answer.content", "abcdef bcd");
        assert_eq!((out.as_str(), progress.found.len()), ("a[ONE]f [ONE]", 3));
        same_however_cut(&rules(&redacting), "answer.content", "abcdef bcd");
        let blocking = [redacting[0], r#"{"name":"b",CHAT,"verdict":"block","regex":{"list":["cde"]}}"#];
        let (out, progress) = judged(&rules(&blocking), "answer.content", "bcd abcdef");
        assert_eq!((out.as_str(), progress.blocked), ("[ONE] a", Some(1)));
        same_however_cut(&rules(&blocking), "answer.content", "bcd abcdef");
    }

    #[test]
    fn only_what_may_still_become_a_match_is_held() {
        let json = rules(&[r#"{"name":"a",CHAT,"verdict":"block","words":{"list":["attack at dawn"]}}"#]);
        let scanner = scanner_of(&json, "", "answer.content");
        let (mut stream, mut progress) = (scanner.stream(), Progress::default());
        for (piece, released) in
            [("We att", 3), ("end. ", 11), ("Attack a", 11), ("ll", 21), (" attack", 22), ("ed", 30)]
        {
            stream.push(piece, &mut Placeholders::default(), &mut progress);
            assert_eq!(progress.released, released, "{piece}");
        }
    }
}
