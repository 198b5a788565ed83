//! What rules read and what they found, for records and metrics: never the text itself.

use infergate_plugins::guardrail::{Guardrails, Mode, Outcome};
use schemars::JsonSchema;
use serde::{Serialize, Serializer};
use smallvec::SmallVec;
use std::sync::Arc;

/// What became of one rule on one side of an exchange.
#[derive(Debug)]
pub struct Judged {
    /// The rule's place in the policy's list.
    pub rule: usize,
    /// Whether it is the prompt that was judged.
    pub prompt: bool,
    /// What became of it.
    pub outcome: Outcome,
    /// How often it found something.
    pub found: u64,
    /// Whether it has yet to say something, or was not asked at all: that the rest was read says nothing of it.
    pub(super) waits: bool,
    bytes: u64,
    labels: SmallVec<[(Arc<str>, u64); 2]>,
}

/// So many kinds of finds are told apart.
const LABELS_MAX: usize = 16;

impl Judged {
    /// Nothing has been judged yet.
    pub(super) fn of(rails: &Guardrails) -> Vec<Self> {
        let mut all = Vec::new();
        for (rule, config) in rails.rules().iter().enumerate() {
            for prompt in [true, false] {
                if config.places.iter().any(|place| place.is_prompt() == prompt) {
                    let (outcome, labels) = (Outcome::Skipped, SmallVec::new());
                    all.push(Self { rule, prompt, outcome, found: 0, waits: false, bytes: 0, labels });
                }
            }
        }
        all
    }

    pub(super) fn read(&mut self, bytes: u64) {
        self.bytes += bytes;
    }

    /// Something was found, and `outcome` came of it. The gravest counts.
    pub(super) fn find(&mut self, label: &str, outcome: Outcome) {
        self.found += 1;
        let before = if self.outcome == Outcome::Skipped { Outcome::Passed } else { self.outcome };
        self.outcome = before.max(outcome);
        let known = self.labels.iter().position(|(known, _)| **known == *label);
        match known {
            Some(index) => self.labels[index].1 += 1,
            None if self.labels.len() < LABELS_MAX => self.labels.push((label.into(), 1)),
            None => {}
        }
    }
}

/// The word of an outcome in records, headers and metrics.
pub(crate) fn word(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Passed => "passed",
        Outcome::Flagged => "flagged",
        Outcome::Redacted => "redacted",
        Outcome::Blocked => "blocked",
        Outcome::Skipped => "skipped",
        Outcome::Failed => "failed",
        Outcome::TimedOut => "timed_out",
    }
}

/// One rule's part in a record.
#[derive(Serialize, JsonSchema)]
pub struct JudgedRecord<'a> {
    /// The rule's name.
    rule: &'a str,
    /// What it judged: `prompt` or `answer`.
    side: &'static str,
    /// Whether its verdict was carried out: `enforce`, or only told: `monitor`.
    mode: &'static str,
    /// What became of it: `passed` only if it read everything that it was asked to.
    outcome: &'static str,
    /// Bytes that it read, as they are encoded.
    bytes: u64,
    /// What it found, and how often.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<std::collections::BTreeMap<String, u64>>")]
    found: Option<Labels<'a>>,
}

struct Labels<'a>(&'a [(Arc<str>, u64)]);

impl Serialize for Labels<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(label, count)| (&**label, count)))
    }
}

/// What became of every rule of an exchange.
#[derive(Clone, Copy, Debug)]
pub struct JudgedList<'a>(pub(super) &'a Guardrails, pub(super) &'a [Judged]);

impl Serialize for JudgedList<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.1.iter().map(|judged| {
            let rule = &self.0.rules()[judged.rule];
            JudgedRecord {
                rule: &rule.name,
                side: if judged.prompt { "prompt" } else { "answer" },
                mode: if rule.mode == Mode::Enforce { "enforce" } else { "monitor" },
                outcome: word(judged.outcome),
                bytes: judged.bytes,
                found: (!judged.labels.is_empty()).then_some(Labels(&judged.labels)),
            }
        }))
    }
}
