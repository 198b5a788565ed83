//! How good routes are on labelled prompts: accuracy, confusion, what is out of scope, the worst examples, and the
//! likeness that would have been best.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::semantic::{Embedding, Heads};

/// A prompt and its label.
#[derive(Clone, Debug, Deserialize)]
pub struct Row {
    /// The prompt.
    pub text: String,
    /// The name of its route.
    pub label: String,
}

/// The rows of JSON lines, or the line that is none and why.
pub fn rows<T: DeserializeOwned>(lines: &str) -> Result<Vec<T>, String> {
    let read = |(at, line)| serde_json::from_str(line).map_err(|error| format!("line {}: {error}", at + 1));
    lines.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()).map(read).collect()
}

/// The texts of rows by label, in the order in which the labels come.
pub fn by_label(rows: &[Row]) -> Vec<(&str, Vec<&str>)> {
    let mut labels: Vec<(&str, Vec<&str>)> = Vec::new();
    let mut at = BTreeMap::new();
    for row in rows {
        let at = *at.entry(row.label.as_str()).or_insert_with(|| {
            labels.push((&row.label, Vec::new()));
            labels.len() - 1
        });
        labels[at].1.push(&row.text);
    }
    labels
}

/// How heads did.
#[derive(Clone, Debug)]
pub struct Evaluation {
    /// Rows whose label is one of the heads'.
    pub in_scope: usize,
    /// The share of those that got their own label, whether or not they were thought out of scope.
    pub accuracy: f64,
    /// The same, each label counting alike.
    pub mean_accuracy: f64,
    /// Rows with any other label.
    pub out_of_scope: usize,
    /// How often something in scope is more like the examples than something out of scope, if there is both.
    pub auroc: Option<f64>,
    /// The share of rows in scope, and out of scope, that are taken for in scope.
    pub taken: (f64, f64),
    /// The least likeness that keeps 95 % of what is in scope.
    pub suggested_likeness: f32,
    /// How many rows of a label got which, the wrong ones only.
    pub confusion: BTreeMap<(String, String), usize>,
    /// The rows that got a wrong label, the surest first.
    pub worst: Vec<Miss>,
}

/// What a row gets of which nothing is known.
pub const NOTHING: &str = "(nothing)";

/// A row that got a wrong label.
#[derive(Clone, Debug)]
pub struct Miss {
    /// Its number.
    pub row: usize,
    /// What it got.
    pub got: String,
    /// How sure of it the heads were.
    pub score: f32,
}

impl Evaluation {
    /// Judges `heads`, which ask for `least` likeness, by `rows`.
    pub fn of(heads: &Heads, least: f32, rows: &[Row]) -> Self {
        let mut tally = Tally::default();
        rows.iter().enumerate().for_each(|(at, row)| tally.count(heads, at, row));
        tally.evaluation(least)
    }
}

#[derive(Default)]
struct Tally {
    of_label: BTreeMap<String, (usize, usize)>,
    within: Vec<f32>,
    without: Vec<f32>,
    confusion: BTreeMap<(String, String), usize>,
    worst: Vec<Miss>,
}

impl Tally {
    fn count(&mut self, heads: &Heads, row: usize, Row { text, label }: &Row) {
        let class = heads.classify(&Embedding::of(text));
        let likeness = class.map_or(-1.0, |class| class.likeness);
        if !heads.labels().iter().any(|known| **known == **label) {
            self.without.push(likeness);
            return;
        }
        self.within.push(likeness);
        let right = class.is_some_and(|class| **class.label == **label);
        let counts = self.of_label.entry(label.clone()).or_default();
        *counts = (counts.0 + 1, counts.1 + usize::from(right));
        if !right {
            let (got, score) = class.map_or((NOTHING.into(), 0.0), |class| (Arc::clone(class.label), class.score));
            *self.confusion.entry((label.clone(), got.to_string())).or_default() += 1;
            self.worst.push(Miss { row, got: got.to_string(), score });
        }
    }

    fn evaluation(mut self, least: f32) -> Evaluation {
        let right: usize = self.of_label.values().map(|(_, right)| right).sum();
        let means = self.of_label.values().map(|(all, right)| *right as f64 / *all as f64);
        self.worst.sort_by(|a, b| b.score.total_cmp(&a.score));
        let taken = |of: &[f32]| of.iter().filter(|x| **x >= least).count() as f64 / of.len().max(1) as f64;
        let mut sorted = self.within.clone();
        sorted.sort_by(f32::total_cmp);
        Evaluation {
            in_scope: self.within.len(),
            accuracy: right as f64 / self.within.len().max(1) as f64,
            mean_accuracy: means.sum::<f64>() / self.of_label.len().max(1) as f64,
            out_of_scope: self.without.len(),
            auroc: auroc(&self.within, &self.without),
            taken: (taken(&self.within), taken(&self.without)),
            suggested_likeness: sorted.get(sorted.len() / 20).copied().unwrap_or(0.0),
            confusion: self.confusion,
            worst: self.worst,
        }
    }
}

/// How often one of `high` is above one of `low`; ties count half. Nothing where either is empty.
pub fn auroc(high: &[f32], low: &[f32]) -> Option<f64> {
    if high.is_empty() || low.is_empty() {
        return None;
    }
    let mut low = low.to_vec();
    low.sort_by(f32::total_cmp);
    let below = |x: &f32| {
        let under = low.partition_point(|y| y < x);
        let up_to = low.partition_point(|y| y <= x);
        (under + up_to) as f64 / 2.0
    };
    Some(high.iter().map(below).sum::<f64>() / (high.len() * low.len()) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::semantic::Examples;

    const LINES: &str = r#"{"text": "what is the weather like today", "label": "weather"}
{"text": "will it rain tomorrow", "label": "weather"}

{"text": "how cold is it outside", "label": "weather"}
{"text": "is there snow in the forecast", "label": "weather"}
{"text": "do i need an umbrella this afternoon", "label": "weather"}
{"text": "transfer fifty dollars to my savings account", "label": "money"}
{"text": "what is my account balance", "label": "money"}
{"text": "how do i pay my credit card bill", "label": "money"}
{"text": "send money to my landlord", "label": "money"}
{"text": "show my recent transactions", "label": "money"}"#;

    fn row(text: &str, label: &str) -> Row {
        Row { text: text.to_owned(), label: label.to_owned() }
    }

    #[test]
    fn heads_are_judged_by_labelled_prompts() {
        let train: Vec<Row> = rows(LINES).unwrap();
        let heads = Examples::train(by_label(&train));
        let test = [
            row("is it going to rain in paris", "weather"),
            row("send 20 dollars to my savings account", "money"),
            row("will it snow", "money"),
            row("the mitochondria is the powerhouse of the cell", "oos"),
        ];
        let found = Evaluation::of(&heads, heads.least_likeness(), &test);
        assert_eq!((found.in_scope, found.out_of_scope, found.worst.len()), (3, 1, 1));
        assert!((found.accuracy - 2.0 / 3.0).abs() < 1e-9 && (found.mean_accuracy - 0.75).abs() < 1e-9);
        assert_eq!((found.auroc, found.taken.1), (Some(1.0), 0.0));
        assert_eq!((found.worst[0].row, found.worst[0].got.as_str()), (2, "weather"));
        assert_eq!(found.confusion[&("money".to_owned(), "weather".to_owned())], 1);
    }

    #[test]
    fn a_line_that_is_no_row_is_named() {
        let wrong = rows::<Row>("{\"text\": \"a\", \"label\": \"b\"}\n{\"text\": 1}").unwrap_err();
        assert!(wrong.starts_with("line 2: "), "{wrong}");
    }

    #[test]
    fn the_area_is_the_share_of_pairs_in_order() {
        assert_eq!(auroc(&[3.0, 2.0], &[1.0, 2.0]), Some(0.875));
        assert_eq!(auroc(&[], &[1.0]), None);
    }
}
