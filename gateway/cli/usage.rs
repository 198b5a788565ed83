//! `infergate usage`: what was used, and what it cost.

use std::io::{self, BufWriter, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

use super::counted;
use crate::audit::search;
use crate::audit::story::{grouped, plain};
use crate::ledger::report::time;
use crate::ledger::{Dimension, Place, Query, Report, Spent};
use crate::settings::{self, Settings};

/// Tell what was used and what it cost.
#[derive(Args)]
pub(super) struct Usage {
    /// What the rows are for: tenant, model, principal, day, hour (both UTC); several with commas
    #[arg(long, value_name = "WHAT", default_value = "tenant", value_parser = Dimension::list)]
    by: std::vec::Vec<Dimension>,
    /// From this time on: 24h or 7d (ago), or like 2026-11-01 or 2026-11-22T14:03:00Z
    #[arg(long, value_name = "TIME", default_value = "7d", value_parser = search::time)]
    since: u64,
    /// Before this time
    #[arg(long, value_name = "TIME", value_parser = search::time)]
    until: Option<u64>,
    /// Only this tenant; may be given again
    #[arg(long, value_name = "NAME")]
    tenant: Vec<String>,
    /// Only this model, by the policy's name; may be given again
    #[arg(long, value_name = "NAME")]
    model: Vec<String>,
    /// Only this principal; may be given again
    #[arg(long, value_name = "NAME")]
    principal: Vec<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Print CSV
    #[arg(long, conflicts_with = "json")]
    csv: bool,
    /// The ledger: a file or postgres://user@host/database (the password in PGPASSWORD). Without it: the one that the
    /// settings name, or that a gateway of this user has if nothing else is said
    #[arg(long, value_name = "PATH|URL")]
    ledger: Option<String>,
    /// The settings file that names the ledger
    #[arg(long, value_name = "FILE", env = "INFERGATE_SETTINGS", conflicts_with = "ledger")]
    settings: Option<PathBuf>,
    /// The directory of the journal beside which the ledger is
    #[arg(long, value_name = "DIR", env = "INFERGATE_JOURNAL")]
    journal: Option<PathBuf>,
}

impl Usage {
    pub(super) fn run(self) -> Result<ExitCode, String> {
        // Before anything that speaks TLS: one provider for all of it.
        let _already_there = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let report = self.place()?.reader()?.report(&self.query())?;
        let mut out = BufWriter::new(io::stdout().lock());
        let printed = match (self.json, self.csv) {
            (true, _) => writeln!(out, "{:#}", report.json()),
            (_, true) => write_csv(&mut out, &report),
            _ => write_table(&mut out, &report),
        };
        match printed.and_then(|()| out.flush()) {
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error.to_string()),
            _ => Ok(ExitCode::SUCCESS),
        }
    }

    fn place(&self) -> Result<Place, String> {
        if let Some(ledger) = &self.ledger {
            return Place::named(ledger);
        }
        let settings = match &self.settings {
            Some(path) => Settings::load(path).map_err(|wrong| wrong.lines(&path.display().to_string()).join("\n"))?,
            None => Settings::default(),
        };
        let usual = || settings::Audit::usual_directory(&|name| std::env::var(name).ok());
        let journal = self.journal.clone().or_else(|| settings.audit.directory.clone()).or_else(usual);
        Place::of(&settings, journal.as_deref())
    }

    fn query(&self) -> Query {
        let seconds = |micros: u64| micros / 1_000_000;
        let mut query = Query { by: self.by.clone(), since: seconds(self.since), ..Query::default() };
        query.until = self.until.map(seconds);
        query.scope.tenants.clone_from(&self.tenant);
        query.scope.models.clone_from(&self.model);
        query.scope.principals.clone_from(&self.principal);
        query
    }
}

/// What a table shows of the numbers, and what is told of all of them below it.
const SHOWN: [&str; 6] = ["requests", "ok", "input tokens", "output tokens", "cached", "cost USD"];

fn shown(spent: &Spent) -> [String; 6] {
    let tokens = [spent.requests, spent.ok, spent.input_tokens, spent.output_tokens, spent.cached_tokens].map(grouped);
    let [requests, ok, input, output, cached] = tokens;
    [requests, ok, input, output, cached, spent.cost.to_string()]
}

fn write_table(out: &mut impl Write, report: &Report) -> io::Result<()> {
    let heads = report.by.iter().map(|dimension| dimension.name().to_owned());
    let mut lines = vec![heads.chain(SHOWN.map(str::to_owned)).collect::<Vec<_>>()];
    for row in &report.rows {
        // Names may come from a stranger's token, and they go to a terminal.
        let names = row.key.iter().map(|name| if name.is_empty() { "-".to_owned() } else { plain(name, &[]) });
        lines.push(names.chain(shown(&row.spent)).collect());
    }
    let total = std::iter::once("total".to_owned()).chain(std::iter::repeat(String::new())).take(report.by.len());
    lines.push(total.chain(shown(&report.total)).collect());
    let widths: Vec<usize> = (0..lines[0].len())
        .map(|column| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0))
        .collect();
    for line in &lines {
        let cells = line.iter().zip(&widths).enumerate().map(|(column, (cell, width))| {
            if column < report.by.len() { format!("{cell:<width$}") } else { format!("{cell:>width$}") }
        });
        writeln!(out, "{}", cells.collect::<Vec<_>>().join("  ").trim_end())?;
    }
    write_notes(out, report)
}

/// What the numbers are not.
fn write_notes(out: &mut impl Write, report: &Report) -> io::Result<()> {
    let until = report.until.map_or_else(|| "now".to_owned(), time);
    writeln!(out, "\nfrom {} to {until}", time(report.since))?;
    let Spent { unpriced, estimated, .. } = report.total;
    if unpriced > 0 {
        let are = if unpriced == 1 { "is" } else { "are" };
        writeln!(out, "{} {are} unpriced: what they cost is not in the sums", counted(unpriced, "request"))?;
    }
    if estimated > 0 {
        let have = if estimated == 1 { "has" } else { "have" };
        writeln!(out, "{} {have} estimated tokens: no upstream reported them", counted(estimated, "request"))?;
    }
    Ok(())
}

fn write_csv(out: &mut impl Write, report: &Report) -> io::Result<()> {
    let heads: Vec<&str> = report.by.iter().map(|dimension| dimension.name()).chain(Spent::NAMES).collect();
    writeln!(out, "{},cost_usd", heads.join(","))?;
    let rows = report.rows.iter().map(|row| (row.key.as_slice(), &row.spent));
    let total: &[(&[String], &Spent)] = if report.by.is_empty() { &[(&[], &report.total)] } else { &[] };
    for (key, spent) in rows.chain(total.iter().copied()) {
        let names = key.iter().map(|name| field(name));
        let numbers = spent.numbers().into_iter().map(|number| number.to_string());
        let fields: Vec<String> = names.chain(numbers).chain([spent.cost.to_string()]).collect();
        writeln!(out, "{}", fields.join(","))?;
    }
    Ok(())
}

/// A field of CSV. What a spreadsheet would take for a formula gets an apostrophe: names may be a stranger's.
fn field(text: &str) -> String {
    let formula = text.starts_with(['=', '+', '-', '@', '\t', '\r']);
    let text = format!("{}{}", if formula { "'" } else { "" }, plain(text, &[]));
    if text.contains(['"', ',', '\n']) { format!("\"{}\"", text.replace('"', "\"\"")) } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::report::Row;
    use crate::money::NanoUsd;

    fn report() -> Report {
        let spent =
            |cost: u64| Spent { requests: 1_200, ok: 1_000, cost: NanoUsd(cost), unpriced: 3, ..Spent::default() };
        let row = |names: [&str; 2], cost| Row { key: names.map(str::to_owned).to_vec(), spent: spent(cost) };
        let rows = vec![row(["team-a", "m"], 54_399_000), row(["=x\u{1b}\",b", ""], 1)];
        let total = rows.iter().fold(Spent::default(), |sum, row| sum.plus(&row.spent));
        Report { by: vec![Dimension::Tenant, Dimension::Model], since: 60, until: None, rows, total, cursor: None }
    }

    fn printed(write: impl Fn(&mut Vec<u8>, &Report) -> io::Result<()>) -> String {
        let mut out = Vec::new();
        write(&mut out, &report()).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn a_table_has_totals_and_says_what_is_not_in_them() {
        let text = printed(write_table);
        let lines: Vec<&str> = text.lines().collect();
        let words = |line: usize| lines[line].split_whitespace().collect::<Vec<_>>();
        assert_eq!(words(0)[..4], ["tenant", "model", "requests", "ok"]);
        assert_eq!(words(1), ["team-a", "m", "1,200", "1,000", "0", "0", "0", "0.054399000"]);
        assert_eq!(words(3), ["total", "2,400", "2,000", "0", "0", "0", "0.054399001"]);
        assert!(lines[..4].iter().all(|line| line.chars().count() == lines[0].len()), "columns stand: {text}");
        assert!(lines.contains(&"from 1970-01-01T00:01:00Z to now"), "{text}");
        assert!(lines.contains(&"6 requests are unpriced: what they cost is not in the sums"), "{text}");
        assert!(!text.contains('\u{1b}'));
    }

    #[test]
    fn csv_is_exact_and_starts_no_formula() {
        let text = printed(write_csv);
        let lines: Vec<&str> = text.lines().collect();
        assert!(
            lines[0].starts_with("tenant,model,requests,ok,input_tokens")
                && lines[0].ends_with("estimated,asked,cost_usd")
        );
        assert_eq!(lines[1], "team-a,m,1200,1000,0,0,0,0,54399000,3,0,0,0.054399000");
        assert!(lines[2].starts_with("\"'=x\u{fffd}\"\",b\",,1200"), "{text}");
    }
}
