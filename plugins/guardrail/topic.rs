//! Topic: what a text is about, told by example. Some topics are forbidden, or only some are allowed.

use std::collections::BTreeSet;
use std::sync::Arc;

use schemars::JsonSchema;
use serde::Deserialize;

use super::whole::{Judge, Whole};
use super::{Detector, Wrong};
use crate::semantic::{Embedding, Examples, Heads, Report};

/// What a text is about. With `forbid`, a text that is like the examples of a forbidden topic is found, and `allow` has
/// what must not be mistaken for it. Without `forbid`, a text that is like none of the allowed topics is found, as
/// `off_topic`. Topics that are only forbidden are told by likeness alone, and take what is near them along: name under
/// `allow` what people usually ask. Texts are judged at their end; an answer that may be blocked is held until then, up to 16 KiB at a time.
/// What has fewer than four tokens, and what is not English, tells nothing and passes.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(rename = "TopicRule")]
pub struct Config {
    /// Topics that are forbidden.
    pub forbid: Vec<TopicConfig>,
    /// Topics that are allowed.
    pub allow: Vec<TopicConfig>,
    /// How like the examples a text must be to be about one of the topics, from 0 to 2. Without it, as like as 19 of 20
    /// examples are like the others. Higher finds less that is forbidden, and more that is off topic.
    #[schemars(range(min = 0, max = 2))]
    pub least_likeness: Option<f32>,
}

/// One topic.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Topic")]
pub struct TopicConfig {
    /// Its name, for the record.
    #[schemars(length(min = 1, max = 64))]
    pub name: String,
    /// Texts about it, in English, as people really write them: 10 to 50 are a good number.
    #[schemars(length(min = 5))]
    pub examples: Vec<String>,
}

/// With fewer examples nobody can say how alike they are.
const EXAMPLES_MIN: usize = 5;
/// All examples of a rule: with more, reloading the policy would take seconds.
const EXAMPLES_MAX: usize = 1_000;
/// An example is a sentence or a few.
const EXAMPLE_BYTES_MAX: usize = 2_000;
const TOPICS_MAX: usize = 64;

/// Fewer tokens tell nothing.
const TOKENS_MIN: u32 = 4;
/// A longer text is judged in stretches of about so many bytes: a text may be about more than one thing.
const STRETCH: usize = 400;

const OFF_TOPIC: &str = "off_topic";

pub(super) fn build(config: &Config, rule: usize) -> Result<Detector, Vec<Wrong>> {
    let wrong = wrong(config);
    if !wrong.is_empty() {
        return Err(wrong);
    }
    let (heads, report) =
        Examples::of(topics(config).map(|(_, topic)| (topic.name.as_str(), topic.examples.iter().collect()))).trained();
    let unknown = unknown(config, &report);
    if !unknown.is_empty() {
        return Err(unknown);
    }
    let least = config.least_likeness.unwrap_or(heads.least_likeness());
    let topics = Topics { forbidden: config.forbid.len(), least, heads, off_topic: OFF_TOPIC.into() };
    Ok(Detector::Whole(Whole { judge: Arc::new(topics), rule }))
}

/// All topics, the forbidden ones first, with where they stand.
fn topics(config: &Config) -> impl Iterator<Item = (String, &TopicConfig)> {
    let list = |key: &'static str, topics| {
        let topics: &[TopicConfig] = topics;
        topics.iter().enumerate().map(move |(at, topic)| (format!(".{key}[{at}]"), topic))
    };
    list("forbid", &config.forbid).chain(list("allow", &config.allow))
}

fn wrong(config: &Config) -> Vec<Wrong> {
    let (mut wrong, mut names) = (Vec::new(), BTreeSet::from([OFF_TOPIC]));
    let mut say = |path: String, message: String| wrong.push((path, message));
    for (path, topic) in topics(config) {
        let TopicConfig { name, examples } = topic;
        if name.is_empty() || name.len() > 64 {
            say(format!("{path}.name"), "a topic's name has 1 to 64 bytes".to_owned());
        }
        if !names.insert(name) {
            say(format!("{path}.name"), format!("{name} is taken already"));
        }
        if examples.len() < EXAMPLES_MIN {
            let message = format!("{} are too few to learn from: give at least {EXAMPLES_MIN}", examples.len());
            say(format!("{path}.examples"), message);
        }
        for (at, _) in examples.iter().enumerate().filter(|(_, example)| example.len() > EXAMPLE_BYTES_MAX) {
            say(format!("{path}.examples[{at}]"), format!("an example has at most {EXAMPLE_BYTES_MAX} bytes"));
        }
    }
    let (all, count) = (topics(config).map(|(_, topic)| topic.examples.len()).sum::<usize>(), topics(config).count());
    match count {
        0 => say(String::new(), "no topic is named: give `forbid`, `allow` or both".to_owned()),
        _ if count > TOPICS_MAX => say(String::new(), format!("{count} topics are too many: {TOPICS_MAX} at most")),
        _ if all > EXAMPLES_MAX => say(String::new(), format!("{all} examples are too many: {EXAMPLES_MAX} at most")),
        _ => {}
    }
    if !config.least_likeness.is_none_or(|least| (0.0..=2.0).contains(&least)) {
        say(".least_likeness".to_owned(), "it must be from 0 to 2".to_owned());
    }
    wrong
}

/// What works and is not good: on texts that others labelled, forbidden topics alone found 68 of 100 texts about something
/// else.
pub(super) fn warnings(config: &Config) -> Vec<Wrong> {
    if config.forbid.is_empty() || !config.allow.is_empty() {
        return Vec::new();
    }
    let message = "without `allow`, much of what is about something else is taken for it too: name under `allow` what people \
                   usually ask";
    vec![(".forbid".to_owned(), message.to_owned())]
}

/// Examples from which nothing can be learned.
fn unknown(config: &Config, report: &Report) -> Vec<Wrong> {
    let each = |(path, topic): (String, &TopicConfig)| {
        (0..topic.examples.len()).map(move |at| format!("{path}.examples[{at}]")).collect::<Vec<_>>()
    };
    let places: Vec<String> = topics(config).flat_map(each).collect();
    let message = "nothing is known of this text: write it in English, in whole words";
    report.unknown.iter().filter_map(|at| Some((places.get(*at)?.clone(), message.to_owned()))).collect()
}

struct Topics {
    heads: Heads,
    /// So many of the topics, the first ones, are forbidden.
    forbidden: usize,
    least: f32,
    off_topic: Arc<str>,
}

impl std::fmt::Debug for Topics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Topics")
            .field("labels", &self.heads.labels())
            .field("least", &self.least)
            .finish_non_exhaustive()
    }
}

/// What a stretch of text is about.
enum About {
    Forbidden(Arc<str>),
    Allowed,
    Other,
    /// Nothing can be said.
    Unknown,
}

impl Topics {
    fn about(&self, text: &str) -> About {
        let embedding = Embedding::of(text);
        if embedding.tokens() < TOKENS_MIN {
            return About::Unknown;
        }
        match self.heads.classify(&embedding) {
            None => About::Unknown,
            Some(class) if class.likeness < self.least => About::Other,
            Some(class) if class.index < self.forbidden => About::Forbidden(Arc::clone(class.label)),
            Some(_) => About::Allowed,
        }
    }
}

impl Judge for Topics {
    fn judge(&self, text: &str) -> Option<Arc<str>> {
        let (mut allowed, mut other) = (0, 0);
        for stretch in stretches(text) {
            match self.about(stretch) {
                About::Forbidden(label) => return Some(label),
                About::Allowed => allowed += 1,
                About::Other => other += 1,
                About::Unknown => {}
            }
        }
        // One stretch about something else does not lead a long text away from its topic.
        (self.forbidden == 0 && other > allowed).then(|| Arc::clone(&self.off_topic))
    }
}

/// A text in stretches that end between words; a short one is one.
fn stretches(mut text: &str) -> impl Iterator<Item = &str> {
    std::iter::from_fn(move || {
        if text.is_empty() {
            return None;
        }
        let (stretch, rest) = text.split_at(end_of_stretch(text));
        text = rest;
        Some(stretch)
    })
}

fn end_of_stretch(text: &str) -> usize {
    if text.len() <= STRETCH * 3 / 2 {
        return text.len();
    }
    let bound = &text[..text.floor_char_boundary(STRETCH)];
    match bound.rfind(char::is_whitespace) {
        Some(space) if space >= STRETCH / 2 => space,
        _ => bound.len(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::tests::{built, judged, same_however_cut};
    use super::*;

    const MEDICINE: [&str; 8] = [
        "which medicine should I take against a headache",
        "what dose of ibuprofen is safe for a child",
        "is this rash a symptom of measles",
        "how do I treat a high fever at home",
        "can I mix antibiotics with painkillers",
        "what are the side effects of this blood pressure medication",
        "do I have diabetes if I am always thirsty",
        "my chest hurts when I breathe, what illness is it",
    ];
    const TRAVEL: [&str; 8] = [
        "book me a flight to lisbon on friday",
        "which hotel is close to the train station",
        "how much luggage may I take on the plane",
        "cancel my reservation for next week",
        "what is the cheapest ticket to berlin",
        "is breakfast included in the room price",
        "my flight was delayed, can I get a refund",
        "rent a car at the airport for three days",
    ];

    const ILL: &str = "what medicine helps a child with a fever and a rash";
    const TRIP: &str = "can I get a cheaper flight to berlin next friday";
    const CODE: &str = "write a python function that sorts a linked list";

    fn topic(name: &str, examples: &[&str]) -> Value {
        json!([{"name": name, "examples": examples}])
    }

    fn rule(place: &str, topics: &Value) -> String {
        json!([{"name": "t", "in": [place], "verdict": "block", "topic": topics}]).to_string()
    }

    fn found(topics: &Value, text: &str) -> Option<String> {
        let (_, progress) = judged(&rule("prompt.user", topics), "prompt.user", text);
        progress.found.first().map(|found| found.label.as_ref().to_owned())
    }

    #[test]
    fn a_forbidden_topic_is_found_and_others_are_not() {
        let topics = json!({"forbid": topic("medicine", &MEDICINE), "allow": topic("travel", &TRAVEL)});
        assert_eq!(found(&topics, ILL).as_deref(), Some("medicine"));
        assert_eq!((found(&topics, TRIP), found(&topics, CODE)), (None, None));
        let alone = json!({"forbid": topic("medicine", &MEDICINE)});
        assert_eq!(found(&alone, ILL).as_deref(), Some("medicine"));
        assert_eq!((found(&alone, TRIP), found(&alone, CODE)), (None, None));
    }

    #[test]
    fn where_only_some_topics_are_allowed_the_rest_is_off_topic() {
        let topics = json!({"allow": topic("travel", &TRAVEL)});
        assert_eq!(found(&topics, TRIP), None);
        assert_eq!(found(&topics, CODE).as_deref(), Some("off_topic"));
        for nothing in ["thanks!", "", "ok", "ᚠᚢᚦ ᚨᚱᚲ ᚷᚹᚺ ᚾᛁᛃ ᛇᛈᛉ"] {
            assert_eq!(found(&topics, nothing), None, "{nothing} tells nothing");
        }
    }

    /// Texts that other people have labelled, and topics with examples that other people have written.
    struct Labelled(Vec<(String, Option<String>)>);

    impl Labelled {
        fn read(lines: &str) -> Self {
            let row = |line: &str| serde_json::from_str::<Value>(line).unwrap();
            let word = |value: &Value| value.as_str().map(str::to_owned);
            let rows = lines.lines().map(row).map(|row| (word(&row["text"]).unwrap(), word(&row["label"])));
            Self(rows.collect())
        }

        /// The examples of a topic.
        fn examples(&self, name: &str) -> TopicConfig {
            let own = self.0.iter().filter(|(_, label)| label.as_deref() == Some(name));
            TopicConfig { name: name.to_owned(), examples: own.map(|(text, _)| text.clone()).collect() }
        }

        fn names(&self) -> BTreeSet<&str> {
            self.0.iter().filter_map(|(_, label)| label.as_deref()).collect()
        }

        /// The shares of what should be found that is, and of what should not be found that is all the same.
        fn shares(&self, config: &Config, should: impl Fn(Option<&str>) -> bool) -> (f64, f64) {
            let Ok(Detector::Whole(whole)) = build(config, 0) else { panic!("these topics can be learned") };
            let (mut all, mut found) = ([0u32; 2], [0u32; 2]);
            for (text, label) in &self.0 {
                let which = usize::from(!should(label.as_deref()));
                all[which] += 1;
                found[which] += u32::from(whole.judge.judge(text).is_some());
            }
            let share = |which: usize| f64::from(found[which]) / f64::from(all[which]);
            (share(0), share(1))
        }
    }

    #[test]
    fn what_is_off_topic_is_found_as_often_as_the_guide_says() {
        let examples = Labelled::read(include_str!("../../tests/fixtures/topics/banking-examples.jsonl"));
        let texts = Labelled::read(include_str!("../../tests/fixtures/topics/banking-texts.jsonl"));
        let config = Config { allow: vec![examples.examples("banking")], ..Config::default() };
        let (found, alarms) = texts.shares(&config, |label| label.is_none());
        assert!(found >= 0.94 && alarms <= 0.04, "{found} of what is off topic, {alarms} of what is not");
    }

    #[test]
    fn what_is_forbidden_is_found_as_often_as_the_guide_says() {
        let examples = Labelled::read(include_str!("../../tests/fixtures/topics/subjects-examples.jsonl"));
        let texts = Labelled::read(include_str!("../../tests/fixtures/topics/subjects-texts.jsonl"));
        let is_forbidden = |name: &str| ["health", "law"].contains(&name);
        let (forbid, allow): (Vec<TopicConfig>, _) = examples
            .names()
            .into_iter()
            .map(|name| examples.examples(name))
            .partition(|topic| is_forbidden(&topic.name));
        let alone = Config { forbid: forbid.clone(), ..Config::default() };
        let (found, alarms) = texts.shares(&alone, |label| label.is_some_and(is_forbidden));
        assert!(found >= 0.85 && alarms <= 0.7, "alone: {found} of what is forbidden, {alarms} of what is not");
        let beside = Config { forbid, allow, ..Config::default() };
        let (found, alarms) = texts.shares(&beside, |label| label.is_some_and(is_forbidden));
        assert!(found >= 0.7 && alarms <= 0.03, "beside others: {found} of what is forbidden, {alarms} of what is not");
    }

    #[test]
    fn one_forbidden_paragraph_is_found_in_a_long_text() {
        let topics = json!({"forbid": topic("medicine", &MEDICINE), "allow": topic("travel", &TRAVEL)});
        let filler = format!("{}. ", TRAVEL.join(". "));
        let text = format!("{}\n\n{}.\n\n{}", filler.repeat(3), MEDICINE[..7].join(". "), filler.repeat(3));
        assert_eq!(found(&topics, &text).as_deref(), Some("medicine"));
        assert_eq!(found(&topics, &filler.repeat(6)), None);
        let allowed = json!({"allow": topic("travel", &TRAVEL)});
        assert_eq!(found(&allowed, &format!("{} {CODE}", filler.repeat(6))), None, "it stays on its topic");
    }

    #[test]
    fn stretches_have_the_whole_text_and_end_between_words() {
        let words = "some words and é ".repeat(200);
        for text in ["", "short", words.as_str(), "x".repeat(2_000).as_str(), "é".repeat(1_999).as_str()] {
            let parts: Vec<&str> = stretches(text).collect();
            assert_eq!(parts.concat(), text);
            assert!(parts.iter().all(|part| part.len() <= STRETCH * 3 / 2));
        }
        assert!(stretches(&words).skip(1).all(|part| part.starts_with(' ')));
    }

    #[test]
    fn the_likeness_that_is_needed_can_be_set() {
        let with = |least: f32| json!({"forbid": topic("medicine", &MEDICINE), "least_likeness": least});
        assert_eq!((found(&with(2.0), ILL), found(&with(0.0), ILL).as_deref()), (None, Some("medicine")));
    }

    #[test]
    fn pieces_make_no_difference() {
        let topics = json!({"forbid": topic("medicine", &MEDICINE)});
        for text in [ILL, TRIP, "é"] {
            same_however_cut(&rule("answer.content", &topics), "answer.content", text);
        }
    }

    #[test]
    fn everything_that_is_wrong_is_told_at_its_place() {
        let wrong = |topics: Value| -> Vec<String> {
            built(&rule("prompt.user", &topics)).unwrap_err().into_iter().map(|(path, _)| path).collect()
        };
        assert_eq!(wrong(json!({})), ["[0].topic"]);
        let few = json!({"forbid": [{"name": "", "examples": ["a"]}], "least_likeness": 3.0});
        let places = ["[0].topic.forbid[0].name", "[0].topic.forbid[0].examples", "[0].topic.least_likeness"];
        assert_eq!(wrong(few), places);
        let twice = json!({"forbid": topic("a", &MEDICINE), "allow": topic("a", &TRAVEL)});
        assert_eq!(wrong(twice), ["[0].topic.allow[0].name"]);
        let mut foreign = MEDICINE.to_vec();
        foreign.push("ᚠᚢᚦ ᚨᚱᚲ ᚷᚹᚺ");
        assert_eq!(wrong(json!({"allow": topic("a", &foreign)})), ["[0].topic.allow[0].examples[8]"]);
        let long = "word ".repeat(500);
        foreign[8] = &long;
        assert_eq!(wrong(json!({"allow": topic("a", &foreign)})), ["[0].topic.allow[0].examples[8]"]);
        let many = vec!["how do I get a ticket"; 1_001];
        assert_eq!(wrong(json!({"allow": topic("a", &many)})), ["[0].topic"]);
    }
}
