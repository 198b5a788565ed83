//! The table, for people (Markdown) and for scripts (JSON).

use crate::Failure;
use serde_json::{Value, json};
use std::fmt::Write;
use std::fs;
use std::path::Path;

/// One line of the table.
pub struct Row {
    /// What was done.
    pub case: String,
    /// What the figures count.
    pub unit: &'static str,
    /// What came of it.
    pub result: Result<Figures, Failure>,
    /// What the gateway should reach.
    pub goal: Goal,
}

/// The figures of one line.
pub struct Figures {
    /// The bare proxy's, the median of all rounds.
    pub bare: f64,
    /// The gateway's, likewise.
    pub gateway: f64,
    /// The gateway's by the bare proxy's, a number a round; empty where a ratio means nothing.
    pub ratios: Vec<f64>,
}

/// What the gateway should reach.
#[derive(Clone, Copy)]
pub enum Goal {
    /// Nothing was promised.
    None,
    /// The median ratio is at most this.
    Ratio(f64),
    /// The median ratio is 1, give or take this.
    Same(f64),
    /// The gateway's own figure is at most this.
    Figure(f64),
}

impl Figures {
    /// From what both showed in each round.
    pub fn of_rounds(rounds: &[(f64, f64)]) -> Self {
        Self {
            bare: median(rounds.iter().map(|round| round.0)),
            gateway: median(rounds.iter().map(|round| round.1)),
            ratios: rounds.iter().map(|(bare, own)| own / bare).collect(),
        }
    }

    /// The median of the rounds' ratios.
    pub fn ratio(&self) -> Option<f64> {
        (!self.ratios.is_empty()).then(|| median(self.ratios.iter().copied()))
    }

    /// How far the true median may be from the one we saw (95 %), by the spread of the rounds.
    pub fn doubt(&self) -> Option<f64> {
        let count = self.ratios.len();
        let mut ratios = self.ratios.clone();
        ratios.sort_by(f64::total_cmp);
        let middle_half = ratios.get(count * 3 / 4)? - ratios.get(count / 4)?;
        (count >= 5).then(|| 1.57 * middle_half / (count as f64).sqrt())
    }

    /// The ratio as the table shows it.
    fn verdict(&self) -> String {
        match (self.ratio(), self.doubt()) {
            (None, _) => String::new(),
            (Some(ratio), None) => format!("{ratio:.2}"),
            (Some(ratio), Some(doubt)) => format!("{ratio:.2} ± {doubt:.2}"),
        }
    }

    fn range(&self) -> String {
        if self.ratios.len() < 2 {
            return String::new();
        }
        let least = self.ratios.iter().copied().fold(f64::INFINITY, f64::min);
        let most = self.ratios.iter().copied().fold(0.0, f64::max);
        format!("{least:.2} to {most:.2}")
    }
}

impl Goal {
    /// Whether it was; `None` if there is nothing to say.
    pub fn met(self, figures: &Figures) -> Option<bool> {
        match self {
            Self::None => None,
            Self::Ratio(most) => figures.ratio().map(|ratio| ratio <= most),
            Self::Same(apart) => figures.ratio().map(|ratio| (ratio - 1.0).abs() <= apart),
            Self::Figure(most) => Some(figures.gateway <= most),
        }
    }

    fn text(self) -> String {
        match self {
            Self::None => String::new(),
            Self::Ratio(most) => format!("≤ {most:.2}"),
            Self::Same(apart) => format!("1 ± {apart:.2}"),
            Self::Figure(most) => format!("≤ {most:.0}"),
        }
    }

    fn number(self) -> Option<f64> {
        match self {
            Self::None => None,
            Self::Same(_) => Some(1.0),
            Self::Ratio(most) | Self::Figure(most) => Some(most),
        }
    }
}

/// The value in the middle.
pub fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        count if count % 2 == 1 => values[count / 2],
        count => (values[count / 2 - 1] + values[count / 2]) / 2.0,
    }
}

/// The table in Markdown, its columns aligned for the terminal.
pub fn table(rows: &[Row], gateway: &str) -> String {
    let heads = ["case", "unit", "bare", gateway, "ratio", "min to max", "goal", "met"];
    let mut lines = vec![heads.map(String::from)];
    lines.extend(rows.iter().map(cells));
    let widths: Vec<usize> = (0..heads.len())
        .map(|column| lines.iter().map(|line| width(&line[column])).max())
        .map(|most| most.unwrap_or(0).max(3))
        .collect();
    let mut out = String::new();
    for (number, line) in lines.iter().enumerate() {
        for (column, cell) in line.iter().enumerate() {
            let blanks = " ".repeat(widths[column] - width(cell));
            out.push_str("| ");
            out.push_str(&match is_text(column) {
                true => format!("{cell}{blanks} "),
                false => format!("{blanks}{cell} "),
            });
        }
        out.push_str("|\n");
        if number == 0 {
            rule(&mut out, &widths);
        }
    }
    out.push_str(&failures(rows));
    out
}

fn is_text(column: usize) -> bool {
    matches!(column, 0 | 1 | 7)
}

fn width(cell: &str) -> usize {
    cell.chars().count()
}

fn rule(out: &mut String, widths: &[usize]) {
    for (column, width) in widths.iter().enumerate() {
        let dashes = "-".repeat(width + 1);
        out.push('|');
        out.push_str(&dashes);
        out.push(if is_text(column) { '-' } else { ':' });
    }
    out.push_str("|\n");
}

fn cells(row: &Row) -> [String; 8] {
    let mut cells = [const { String::new() }; 8];
    cells[0].clone_from(&row.case);
    cells[1] = row.unit.into();
    cells[6] = row.goal.text();
    match &row.result {
        Err(_) => cells[7] = "failed".into(),
        Ok(figures) => {
            cells[2] = figure(figures.bare);
            cells[3] = figure(figures.gateway);
            cells[4] = figures.verdict();
            cells[5] = figures.range();
            cells[7] = match row.goal.met(figures) {
                None => String::new(),
                Some(true) => "yes".into(),
                Some(false) => "**no**".into(),
            };
        }
    }
    cells
}

/// Three digits are all that means anything.
fn figure(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

fn failures(rows: &[Row]) -> String {
    let mut out = String::new();
    for row in rows {
        if let Err(failure) = &row.result {
            // Writing to a String does not fail.
            let _ = write!(out, "\n{}: {failure}\n", row.case);
        }
    }
    out
}

/// Writes every figure to a file.
pub fn write_json(file: &Path, rows: &[Row]) -> Result<(), Failure> {
    let rows: Vec<Value> = rows.iter().map(value).collect();
    fs::write(file, serde_json::to_string_pretty(&rows)?)
        .map_err(|error| format!("cannot write {}: {error}", file.display()).into())
}

fn value(row: &Row) -> Value {
    match &row.result {
        Err(failure) => json!({ "case": row.case, "failed": failure.to_string() }),
        Ok(figures) => json!({
            "case": row.case,
            "unit": row.unit,
            "bare": figures.bare,
            "gateway": figures.gateway,
            "ratio": figures.ratio(),
            "ratio_doubt": figures.doubt(),
            "ratios": figures.ratios,
            "goal": row.goal.number(),
            "met": row.goal.met(figures),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_goal_is_judged_by_the_median_round() {
        let figures = Figures::of_rounds(&[(10.0, 8.0), (10.0, 9.0), (10.0, 30.0)]);
        assert_eq!(Goal::Ratio(0.9).met(&figures), Some(true));
        assert_eq!(Goal::Ratio(0.89).met(&figures), Some(false));
        assert_eq!(Goal::Figure(8.5).met(&figures), Some(false));
        assert_eq!(Goal::None.met(&figures), None);
    }

    #[test]
    fn a_failed_case_is_named_below_the_table() {
        let row =
            Row { case: "1 KB".into(), unit: "µs/request", result: Err("status 502".into()), goal: Goal::Ratio(0.9) };
        assert!(table(&[row], "gateway").ends_with("1 KB: status 502\n"));
    }
}
