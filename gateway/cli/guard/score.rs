//! How good rules are: what each found of labelled texts, and what it should have found.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use infergate_plugins::guardrail::redact::Placeholders;
use infergate_plugins::guardrail::{Found, Guardrails, Place, Rule, Scanner};
use serde_json::{Value, json};

use super::rows::{Expected, Row};

/// The scores of all rules.
pub(super) struct Scores<'g> {
    rules: Vec<Score<'g>>,
    rows: usize,
    /// Labels that no rule tells, and how often they are expected.
    unclaimed: BTreeMap<String, usize>,
}

/// The score of one rule.
struct Score<'g> {
    rule: &'g Rule,
    /// What it calls its finds, in small letters.
    labels: BTreeSet<String>,
    /// Texts that it looked at, and of those with nothing to find.
    texts: usize,
    clean: usize,
    /// Clean texts in which it found something.
    alarms: usize,
    right: usize,
    wrong: usize,
    missed: usize,
    bytes: usize,
    time: Duration,
    mistakes: Vec<Mistake>,
    worst: usize,
}

/// One find.
struct Find {
    label: String,
    range: Range<usize>,
}

struct Mistake {
    line: usize,
    missed: bool,
    label: String,
    text: String,
}

impl<'g> Scores<'g> {
    /// Judges every row with every rule that looks at its place; keeps `worst` mistakes of a kind.
    pub fn of(rules: &'g Guardrails, rows: &[Row], worst: usize) -> Self {
        let scores = (0..rules.rules().len()).map(|rule| Score::of(rules, rule, rows, worst));
        let scores: Vec<Score<'_>> = scores.collect();
        let mut unclaimed = BTreeMap::new();
        for label in rows.iter().flat_map(|row| row.expected.labels()) {
            if !scores.iter().any(|score| score.claims(label)) {
                *unclaimed.entry(label.to_owned()).or_default() += 1;
            }
        }
        Self { rules: scores, rows: rows.len(), unclaimed }
    }
}

impl<'g> Score<'g> {
    fn of(rules: &'g Guardrails, number: usize, rows: &[Row], worst: usize) -> Self {
        let (labels, mistakes) = (BTreeSet::new(), Vec::new());
        let (texts, clean, alarms, right, wrong, missed, bytes) = Default::default();
        let (rule, time) = (&rules.rules()[number], Duration::ZERO);
        let mut score = Self { rule, labels, texts, clean, alarms, right, wrong, missed, bytes, time, mistakes, worst };
        let scanners: BTreeMap<Place, Option<Arc<Scanner>>> =
            rule.places.iter().map(|place| (*place, rules.alone(number, *place))).collect();
        let looked = rows.iter().filter_map(|row| Some((row, scanners.get(&row.place)?)));
        let judged: Vec<(&Row, Vec<Find>)> = looked
            .map(|(row, scanner)| {
                let mut finds = score.judge(scanner.as_ref(), row);
                finds.extend(exceeds(rules, number, row));
                score.labels.extend(finds.iter().map(|find| find.label.to_ascii_lowercase()));
                (row, finds)
            })
            .collect();
        // Only now it is known what the rule calls its finds.
        for (row, finds) in judged {
            score.count(row, &finds);
        }
        score
    }

    fn judge(&mut self, scanner: Option<&Arc<Scanner>>, row: &Row) -> Vec<Find> {
        let start = Instant::now();
        let found = scanner.map(|scanner| scanner.judge(&row.text, &mut Placeholders::default()).found);
        self.time += start.elapsed();
        self.bytes += row.text.len();
        let find = |found: Found| {
            let range = found.range.start as usize..found.range.end as usize;
            Find { label: found.label.to_string(), range }
        };
        found.unwrap_or_default().into_iter().map(find).collect()
    }

    /// Whether a label is this rule's name, or what it calls its finds.
    fn claims(&self, label: &str) -> bool {
        self.rule.name.eq_ignore_ascii_case(label) || self.labels.contains(&label.to_ascii_lowercase())
    }

    fn count(&mut self, row: &Row, finds: &[Find]) {
        let is_clean = !row.expected.labels().into_iter().any(|label| self.claims(label));
        self.texts += 1;
        self.clean += usize::from(is_clean);
        self.alarms += usize::from(is_clean && !finds.is_empty());
        match &row.expected {
            Expected::Labels(_) => self.count_text(row, finds, is_clean),
            Expected::Spans(spans) => self.count_spans(row, finds, spans),
        }
    }

    fn count_text(&mut self, row: &Row, finds: &[Find], is_clean: bool) {
        match (finds.first(), is_clean) {
            (Some(_), false) => self.right += 1,
            (Some(find), true) => self.mistake(row, false, &find.label, find.range.clone()),
            (None, false) => self.mistake(row, true, &row.expected.labels().join(", "), 0..row.text.len()),
            (None, true) => {}
        }
    }

    fn count_spans(&mut self, row: &Row, finds: &[Find], spans: &[(String, Range<usize>)]) {
        let overlap = |a: &Range<usize>, b: &Range<usize>| a.start < b.end && b.start < a.end;
        // A find is right where a span with its label stands, or one with the rule's name.
        let is = |find: &Find, (label, range): &(String, Range<usize>)| {
            let same = label.eq_ignore_ascii_case(&find.label) || label.eq_ignore_ascii_case(&self.rule.name);
            same && overlap(&find.range, range)
        };
        let wrong: Vec<&Find> = finds.iter().filter(|find| !spans.iter().any(|span| is(find, span))).collect();
        let own = spans.iter().filter(|(label, _)| self.claims(label));
        let (right, missed): (Vec<_>, Vec<_>) = own.partition(|span| finds.iter().any(|find| is(find, span)));
        self.right += right.len();
        for find in wrong {
            self.mistake(row, false, &find.label, find.range.clone());
        }
        for (label, range) in missed {
            self.mistake(row, true, label, range.clone());
        }
    }

    fn mistake(&mut self, row: &Row, missed: bool, label: &str, range: Range<usize>) {
        let count = if missed { &mut self.missed } else { &mut self.wrong };
        *count += 1;
        if *count <= self.worst {
            let text = excerpt(row.text.get(range).unwrap_or_default());
            self.mistakes.push(Mistake { line: row.line, missed, label: label.to_owned(), text });
        }
    }

    fn precision(&self) -> Option<f64> {
        share(self.right, self.right + self.wrong)
    }

    fn recall(&self) -> Option<f64> {
        share(self.right, self.right + self.missed)
    }

    fn false_alarms(&self) -> Option<f64> {
        share(self.alarms, self.clean)
    }

    fn us_per_kb(&self) -> Option<f64> {
        (self.bytes > 0).then(|| self.time.as_secs_f64() * 1e6 / (self.bytes as f64 / 1e3))
    }
}

/// What a rule with bounds for whole prompts says, were this text all of it.
fn exceeds(rules: &Guardrails, number: usize, row: &Row) -> impl Iterator<Item = Find> {
    let exceeded = super::exceeded(rules, row.place, &row.text).into_iter().filter(move |(rule, _)| *rule == number);
    let range = 0..row.text.len();
    exceeded.map(move |(_, what)| Find { label: what.to_owned(), range: range.clone() })
}

fn share(part: usize, of: usize) -> Option<f64> {
    (of > 0).then(|| part as f64 / of as f64)
}

/// The beginning of a text, on one line.
pub(super) fn excerpt(text: &str) -> String {
    const LETTERS: usize = 80;
    let shown: String = text.chars().take(LETTERS).flat_map(char::escape_debug).collect();
    if text.chars().nth(LETTERS).is_some() { format!("\"{shown}...\"") } else { format!("\"{shown}\"") }
}

impl Scores<'_> {
    pub fn tell(&self, file: &Path) {
        println!(
            "{:<24} {:<11} {:>7} {:>6} {:>6} {:>6} {:>9} {:>7} {:>12} {:>9}",
            "rule", "kind", "texts", "right", "wrong", "missed", "precision", "recall", "false alarms", "us a KB"
        );
        for score in &self.rules {
            let Score { rule, texts, right, wrong, missed, .. } = score;
            let (name, kind) = (&rule.name, rule.kind);
            let told = |number: Option<f64>, digits: usize| number.map_or("-".to_owned(), |n| format!("{n:.digits$}"));
            println!(
                "{name:<24} {kind:<11} {texts:>7} {right:>6} {wrong:>6} {missed:>6} {:>9} {:>7} {:>12} {:>9}",
                told(score.precision(), 3),
                told(score.recall(), 3),
                told(score.false_alarms(), 4),
                told(score.us_per_kb(), 2)
            );
        }
        for score in &self.rules {
            for Mistake { line, missed, label, text } in &score.mistakes {
                let what = if *missed { "missed" } else { "wrong" };
                println!("{}:{line}: {} {what} ({label}): {text}", file.display(), score.rule.name);
            }
        }
        if !self.unclaimed.is_empty() {
            let labels: Vec<String> =
                self.unclaimed.iter().map(|(label, count)| format!("{label} ({count})")).collect();
            println!("no rule is named so, or found anything that it calls so: {}", labels.join(", "));
        }
    }

    pub fn json(&self, file: &Path) -> Value {
        let rules: Vec<Value> = self.rules.iter().map(Score::json).collect();
        json!({"file": file.display().to_string(), "rows": self.rows, "rules": rules, "unclaimed": self.unclaimed})
    }
}

impl Score<'_> {
    fn json(&self) -> Value {
        let examples = |kind: bool| -> Vec<Value> {
            let mistakes = self.mistakes.iter().filter(|mistake| mistake.missed == kind);
            mistakes
                .map(|Mistake { line, label, text, .. }| json!({"line": line, "label": label, "text": text}))
                .collect()
        };
        json!({
            "rule": &*self.rule.name, "kind": self.rule.kind, "texts": self.texts, "clean": self.clean,
            "right": self.right, "wrong": self.wrong, "missed": self.missed,
            "precision": self.precision(), "recall": self.recall(), "false_alarms": self.false_alarms(),
            "us_per_kb": self.us_per_kb(), "wrong_examples": examples(false), "missed_examples": examples(true),
        })
    }
}
