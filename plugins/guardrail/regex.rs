//! Regular expressions of the policy's own.

use schemars::JsonSchema;
use serde::Deserialize;

use super::patterns::{Pattern, WINDOW_MAX};
use super::{Detector, Wrong};

/// Regular expressions, in the syntax of Rust's `regex`: no back-references and no look-around, and so no text takes
/// longer than others. Of all matches that begin at the first possible place, the one that a backtracking engine would
/// find counts (`a|ab` matches `a`). `\b` knows ASCII words. `^` and `$` are the ends of the text, or of a line in
/// `(?m)`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Regex")]
pub struct Config {
    /// The expressions.
    #[schemars(length(min = 1))]
    pub list: Vec<String>,
    /// The most bytes that a match has. Without it, every expression must have an upper bound of its own, since all of a
    /// match is held back until it is decided.
    #[serde(default)]
    #[schemars(range(min = 1, max = 65_536))]
    pub window: Option<usize>,
    /// The group that is the match, where not all of it is: 1 for the first.
    #[serde(default)]
    pub group: usize,
    /// What matches are called in records, headers and redactions.
    #[serde(default = "pattern")]
    #[schemars(length(min = 1, max = 40))]
    pub label: String,
}

fn pattern() -> String {
    "pattern".to_owned()
}

pub(super) fn build(config: &Config, rule: usize) -> Result<Detector, Vec<Wrong>> {
    let (mut patterns, mut wrong) = (Vec::new(), Vec::new());
    if config.list.is_empty() {
        wrong.push((".list".to_owned(), "no expressions: give at least one".to_owned()));
    }
    if config.window.is_some_and(|window| !(1..=WINDOW_MAX).contains(&window)) {
        wrong.push((".window".to_owned(), format!("a window has 1 to {WINDOW_MAX} bytes")));
    }
    for (index, expression) in config.list.iter().enumerate() {
        match Pattern::new(rule, &config.label, expression, config.window, config.group) {
            Ok(pattern) => patterns.push(pattern),
            Err(message) => wrong.push((format!(".list[{index}]"), message)),
        }
    }
    if wrong.is_empty() { Ok(Detector::Patterns(patterns)) } else { Err(wrong) }
}
