//! What the runs came to, as a table in Markdown and as JSON, and where ours is not the best.

use std::fmt::Write as _;

use serde::Serialize;

use crate::choice::Kind as Chooser;
use crate::run::Outcome;

/// One run.
#[derive(Debug, Serialize)]
pub struct Row {
    pub trace: String,
    pub load: f64,
    pub seed: u64,
    #[serde(serialize_with = "name")]
    pub chooser: Chooser,
    #[serde(flatten)]
    pub outcome: Outcome,
}

fn name<S: serde::Serializer>(chooser: &Chooser, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(chooser.name())
}

/// What is compared: its heading, its value, and whether more of it is better.
struct Figure {
    heading: &'static str,
    of: fn(&Outcome) -> f64,
    more: bool,
    decimals: usize,
    /// Differences up to this are none.
    noise: (f64, f64),
}

const FIGURES: [Figure; 6] = [
    Figure {
        heading: "first token p50 (ms)",
        of: |o| o.first_p50_s * 1e3,
        more: false,
        decimals: 0,
        noise: (0.05, 5.0),
    },
    Figure { heading: "p99 (ms)", of: |o| o.first_p99_s * 1e3, more: false, decimals: 0, noise: (0.05, 20.0) },
    Figure { heading: "good answers/s", of: |o| o.goodput, more: true, decimals: 2, noise: (0.02, 0.0) },
    Figure { heading: "hits %", of: |o| o.hits * 100.0, more: true, decimals: 1, noise: (0.02, 0.5) },
    Figure { heading: "fairness", of: |o| o.fairness, more: true, decimals: 3, noise: (0.0, 0.005) },
    Figure { heading: "refused %", of: |o| o.refused * 100.0, more: false, decimals: 1, noise: (0.0, 0.2) },
];

/// The mean over seeds of one way of choosing, at one trace and load.
fn mean(rows: &[Row], trace: &str, load: f64, chooser: Chooser, figure: &Figure) -> f64 {
    let here = rows.iter().filter(|row| row.trace == trace && row.load == load && row.chooser == chooser);
    let values: Vec<f64> = here.map(|row| (figure.of)(&row.outcome)).collect();
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

/// The traces and loads, in the order in which they were run.
fn cases(rows: &[Row]) -> Vec<(String, f64)> {
    let mut cases: Vec<(String, f64)> = Vec::new();
    for row in rows {
        if !cases.iter().any(|(trace, load)| *trace == row.trace && *load == row.load) {
            cases.push((row.trace.clone(), row.load));
        }
    }
    cases
}

pub fn markdown(rows: &[Row], choosers: &[Chooser]) -> String {
    let mut text = String::new();
    let headings: Vec<&str> = FIGURES.iter().map(|figure| figure.heading).collect();
    let _ = writeln!(text, "| trace, load | chosen by | {} |", headings.join(" | "));
    let _ = writeln!(text, "|---|---|{}", "--:|".repeat(FIGURES.len()));
    for (trace, load) in cases(rows) {
        for (n, chooser) in choosers.iter().enumerate() {
            let case = if n == 0 { format!("{trace}, {load}") } else { String::new() };
            let cell = |figure: &Figure| {
                let value = mean(rows, &trace, load, *chooser, figure);
                let best =
                    choosers.iter().all(|other| !is_better(figure, mean(rows, &trace, load, *other, figure), value));
                let value = format!("{value:.*}", figure.decimals);
                if best { format!("**{value}**") } else { value }
            };
            let cells: Vec<String> = FIGURES.iter().map(cell).collect();
            let _ = writeln!(text, "| {case} | {} | {} |", chooser.name(), cells.join(" | "));
        }
    }
    text
}

/// Whether `one` is better than `other` by more than chance.
fn is_better(figure: &Figure, one: f64, other: f64) -> bool {
    let gain = if figure.more { one - other } else { other - one };
    gain > (figure.noise.0 * other.abs()).max(figure.noise.1)
}

/// A line for each figure in which somebody does better than ours.
pub fn losses(rows: &[Row], choosers: &[Chooser]) -> Vec<String> {
    let mut lines = Vec::new();
    for (trace, load) in cases(rows) {
        for figure in &FIGURES {
            let ours = mean(rows, &trace, load, Chooser::OURS, figure);
            let value = |chooser: &Chooser| mean(rows, &trace, load, *chooser, figure);
            let sign = if figure.more { 1.0 } else { -1.0 };
            let best = choosers.iter().max_by(|one, other| (sign * value(one)).total_cmp(&(sign * value(other))));
            if let Some(best) = best.filter(|best| is_better(figure, value(best), ours)) {
                let (name, decimals) = (best.name(), figure.decimals);
                let theirs = value(best);
                lines.push(format!(
                    "{trace}, {load}: {} is {ours:.decimals$}, {theirs:.decimals$} with {name}",
                    figure.heading
                ));
            }
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(chooser: Chooser, first_p99_s: f64) -> Row {
        let outcome = Outcome { first_p99_s, fairness: 1.0, ..Outcome::default() };
        Row { trace: "chat".to_owned(), load: 0.5, seed: 1, chooser, outcome }
    }

    #[test]
    fn where_ours_loses_is_told() {
        let choosers = [Chooser::RoundRobin, Chooser::ExpectedTime];
        let told = |theirs| losses(&[row(Chooser::RoundRobin, theirs), row(Chooser::ExpectedTime, 0.5)], &choosers);
        assert_eq!(told(0.2), ["chat, 0.5: p99 (ms) is 500, 200 with round_robin"]);
        assert!(told(0.49).is_empty() && told(3.0).is_empty());
    }

    #[test]
    fn a_table_has_a_line_for_everybody_and_the_best_in_bold() {
        let choosers = [Chooser::RoundRobin, Chooser::ExpectedTime];
        let rows = [row(Chooser::RoundRobin, 0.2), row(Chooser::RoundRobin, 0.4), row(Chooser::ExpectedTime, 0.5)];
        let table = markdown(&rows, &choosers);
        assert_eq!(table.lines().count(), 4);
        assert!(table.contains("| **300** |") && table.contains("| 500 |"), "{table}");
    }
}
