//! Size: more than is allowed, of a whole prompt or of one text of an answer.

use std::sync::Arc;

use schemars::JsonSchema;
use serde::Deserialize;

use super::stream::{Finder, Found, Search, Window};
use super::{Detector, Wrong};

/// The most that a prompt may have altogether, or one text of an answer. At least one of them must be given.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Size")]
pub struct Config {
    /// Characters. An answer ends before the first that is too many.
    #[serde(default)]
    #[schemars(range(min = 1))]
    pub characters_max: Option<u64>,
    /// Tokens, as far as the gateway counts them; only of prompts.
    #[serde(default)]
    #[schemars(range(min = 1))]
    pub tokens_max: Option<u64>,
    /// Images; only of prompts.
    #[serde(default)]
    pub images_max: Option<u64>,
    /// Tools; only of prompts.
    #[serde(default)]
    pub tools_max: Option<u64>,
}

/// What a whole prompt has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Measure {
    /// Characters of all its texts.
    pub characters: u64,
    /// Tokens, if they were counted or estimated.
    pub tokens: Option<u64>,
    /// Images.
    pub images: u64,
    /// Tools.
    pub tools: u64,
}

/// What is allowed.
#[derive(Clone, Debug)]
pub(crate) struct Bounds {
    config: Config,
    rule: usize,
}

pub(super) fn build(config: &Config, rule: usize) -> Result<Detector, Vec<Wrong>> {
    let bounds = [config.characters_max, config.tokens_max, config.images_max, config.tools_max];
    if bounds.iter().all(Option::is_none) {
        let message = "nothing is bounded: give characters_max, tokens_max, images_max or tools_max";
        return Err(vec![(String::new(), message.to_owned())]);
    }
    Ok(Detector::Size(Bounds { config: config.clone(), rule }))
}

impl Bounds {
    /// The first bound that a prompt exceeds.
    pub fn exceeded(&self, measure: &Measure) -> Option<&'static str> {
        let Config { characters_max, tokens_max, images_max, tools_max } = self.config;
        let over = |max: Option<u64>, is: u64| max.is_some_and(|max| is > max);
        let bounds = [
            (over(characters_max, measure.characters), "characters"),
            (over(tokens_max, measure.tokens.unwrap_or(0)), "tokens"),
            (over(images_max, measure.images), "images"),
            (over(tools_max, measure.tools), "tools"),
        ];
        bounds.into_iter().find_map(|(over, what)| over.then_some(what))
    }

    /// What looks at a text of an answer.
    pub fn finder(&self) -> Option<Arc<dyn Finder>> {
        let max = self.config.characters_max?;
        Some(Arc::new(Longest { max, rule: self.rule }))
    }
}

#[derive(Debug)]
struct Longest {
    max: u64,
    rule: usize,
}

impl Finder for Longest {
    fn begin(self: Arc<Self>) -> Box<dyn Search> {
        Box::new(Counting { longest: self, count: 0, at: 0 })
    }

    fn hold_max(&self) -> usize {
        0
    }
}

struct Counting {
    longest: Arc<Longest>,
    count: u64,
    at: u64,
}

impl Search for Counting {
    fn advance(&mut self, window: &Window<'_>, found: &mut Vec<Found>) -> u64 {
        let new = &window.text[(self.at - window.base) as usize..];
        let left = self.longest.max.saturating_sub(self.count);
        // Only the letter that is one too many is a match.
        if self.count <= self.longest.max
            && let Some((over, c)) = new.char_indices().nth(usize::try_from(left).unwrap_or(usize::MAX))
        {
            let start = self.at + over as u64;
            let range = start..start + c.len_utf8() as u64;
            found.push(Found { rule: self.longest.rule, label: "characters".into(), range });
        }
        self.count += new.chars().count() as u64;
        self.at += new.len() as u64;
        self.at
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{built, judged, same_however_cut};
    use super::*;

    #[test]
    fn an_answer_ends_before_the_first_character_that_is_too_many() {
        let rules = r#"[{"name":"s","in":["answer.content"],"verdict":"block","size":{"characters_max":5}}]"#;
        for (text, expected, blocked) in [("12345", "12345", false), ("äöü€56", "äöü€5", true), ("", "", false)]
        {
            let (out, progress) = judged(rules, "answer.content", text);
            assert_eq!((out.as_str(), progress.blocked.is_some()), (expected, blocked), "{text}");
            same_however_cut(rules, "answer.content", text);
        }
    }

    #[test]
    fn a_prompt_is_measured_as_a_whole() {
        let rules = r#"[{"name":"s","in":["prompt.user"],"verdict":"block",
            "size":{"characters_max":10,"images_max":0,"tokens_max":7}}]"#;
        let guardrails = built(rules).unwrap();
        let exceeded = |measure: Measure| guardrails.exceeded(&measure).map(|(_, what)| what).next();
        assert_eq!(exceeded(Measure { characters: 10, tokens: Some(7), ..Measure::default() }), None);
        assert_eq!(exceeded(Measure { characters: 11, ..Measure::default() }), Some("characters"));
        assert_eq!(exceeded(Measure { tokens: Some(8), ..Measure::default() }), Some("tokens"));
        assert_eq!(exceeded(Measure { images: 1, ..Measure::default() }), Some("images"));
    }

    #[test]
    fn a_size_without_a_bound_is_an_error() {
        let rules = r#"[{"name":"s","in":["prompt.user"],"verdict":"block","size":{}}]"#;
        assert!(built(rules).unwrap_err()[0].1.contains("nothing is bounded"));
    }
}
