//! `infergate audit`: is the journal whole, and what stands in it?

use std::cell::Cell;
use std::io::{self, BufWriter, IsTerminal, Write};
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::counted;
use crate::audit::search::{self, Filter};
use crate::audit::story::{grouped, plain};
use crate::audit::verify::{self, End, Options, PublicKey, Report, RunReport};
use crate::settings;

/// Read the audit journal.
#[derive(Args)]
pub(super) struct Audit {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Prove that nobody changed, removed or added a line; exits with 1 if that fails, with 2 if it cannot be read
    Verify(Verify),
    /// Print the lines that fit
    Grep(Box<Grep>),
}

/// Where the journal is.
#[derive(Args)]
struct Place {
    /// The journal's directory. Without it: the one that a gateway of this user has if nothing else is said
    #[arg(value_name = "DIR", env = "INFERGATE_JOURNAL", default_value_os_t = usual())]
    directory: PathBuf,
}

fn usual() -> PathBuf {
    settings::Audit::usual_directory(&|name| std::env::var(name).ok()).unwrap_or_else(|| ".".into())
}

#[derive(Args)]
struct Verify {
    #[command(flatten)]
    place: Place,
    /// The public key that signed it, in hexadecimal digits or as a file; several if it was changed. Without it the
    /// key in the directory itself is taken
    #[arg(long, value_name = "FILE|HEX")]
    key: Vec<String>,
    /// A file of checkpoint lines that was kept elsewhere: each must stand in the journal
    #[arg(long, value_name = "FILE")]
    anchor: Vec<PathBuf>,
    /// Accept runs that end without a seal
    #[arg(long)]
    open_end: bool,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct Grep {
    #[command(flatten)]
    place: Place,
    /// Not before this time: 2h or 3d (ago), or like 2026-11-22T14:03:05Z
    #[arg(long, value_name = "TIME", value_parser = search::time)]
    since: Option<u64>,
    /// Not after this time
    #[arg(long, value_name = "TIME", value_parser = search::time)]
    until: Option<u64>,
    /// How it ended: ok, refused, upstream_error, timeout, client_closed, blocked, limit_cut, aborted
    #[arg(long)]
    outcome: Option<String>,
    /// The model, as asked for, as in the policy, or as the upstream knows it
    #[arg(long)]
    model: Option<String>,
    /// The tenant
    #[arg(long)]
    tenant: Option<String>,
    /// The code that the client got, such as queue_full
    #[arg(long)]
    code: Option<String>,
    /// An upstream that was asked, by name or address, or its pool
    #[arg(long)]
    upstream: Option<String>,
    /// The kind of line: request, act, open, checkpoint, gap, retired, close, …
    #[arg(long)]
    kind: Option<String>,
    /// The request's id, ours or the client's
    #[arg(long)]
    id: Option<String>,
    /// Any other member, such as attempts.status=503; may be given again
    #[arg(long = "where", value_name = "MEMBER=VALUE", value_parser = condition)]
    conditions: Vec<(String, String)>,
    /// Only the newest so many
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// Print whole lines; the default where the output does not go to a terminal
    #[arg(long)]
    json: bool,
    /// Print a table; the default on a terminal
    #[arg(long, conflicts_with = "json")]
    table: bool,
}

fn condition(text: &str) -> Result<(String, String), String> {
    let (member, value) = text.split_once('=').ok_or("give MEMBER=VALUE, such as attempts.status=503")?;
    Ok((member.to_owned(), value.to_owned()))
}

impl Audit {
    pub(super) fn run(self) -> Result<ExitCode, String> {
        match self.command {
            Command::Verify(verify) => Ok(verify.run()),
            Command::Grep(grep) => grep.run(),
        }
    }
}

impl Verify {
    fn run(self) -> ExitCode {
        let proved = self.prove().and_then(|report| {
            let proved = report.problems.is_empty();
            let mut out = BufWriter::new(io::stdout().lock());
            if self.json {
                write_json(&mut out, &report)?
            } else {
                write_text(&mut out, &report)?
            }
            out.flush().map(|()| proved)
        });
        match proved {
            Ok(true) => ExitCode::SUCCESS,
            Ok(false) => ExitCode::FAILURE,
            Err(error) => {
                eprintln!("infergate: the journal in {} cannot be read: {error}", self.place.directory.display());
                ExitCode::from(2)
            }
        }
    }

    fn prove(&self) -> io::Result<Report> {
        let told = Cell::new(Instant::now());
        let progress = |lines: u64, bytes: u64| {
            if told.get().elapsed() >= Duration::from_secs(2) {
                told.set(Instant::now());
                eprintln!("{}, {} MiB …", counted(lines, "line"), grouped(bytes >> 20));
            }
        };
        let options = Options {
            keys: self.key.iter().map(|key| PublicKey::read(key)).collect::<io::Result<_>>()?,
            anchors: self.anchor.clone(),
            open_end: self.open_end,
            progress: io::stderr().is_terminal().then_some(&progress),
        };
        verify::directory(&self.place.directory, &options)
    }
}

fn write_json(out: &mut impl Write, report: &Report) -> io::Result<()> {
    let mut value = json!(report);
    value["proved"] = report.problems.is_empty().into();
    writeln!(out, "{value:#}")
}

fn write_text(out: &mut impl Write, report: &Report) -> io::Result<()> {
    // Whoever changed the journal chose what some of it quotes: it must not pass for a line of ours.
    let mut tell = |text: String| writeln!(out, "{}", plain(&text, &[]));
    report.runs.iter().try_for_each(|run| tell(line(run)))?;
    report.problems.iter().try_for_each(|problem| tell(problem.to_string()))?;
    report.notes.iter().try_for_each(|note| tell(format!("note: {note}")))?;
    let (records, lines) = (counted(report.records, "record"), counted(report.lines, "line"));
    let what = format!("{records} in {lines} of {}", counted(report.runs.len() as u64, "run"));
    let told = report.runs.iter().map(|run| run.problems).sum::<usize>().max(report.problems.len());
    if told > 0 {
        return writeln!(out, "NOT proved: {}; read: {what}", counted(told as u64, "problem"));
    }
    let unsigned = match report.unsigned {
        0 => String::new(),
        lines => format!("; {} not signed yet: the next checkpoint does that", counted(lines, "line")),
    };
    writeln!(out, "proved: {what}; none was changed, removed or added{unsigned}")
}

/// What is told of one run.
fn line(run: &RunReport) -> String {
    let end = match &run.end {
        End::Closed => "closed".to_owned(),
        End::Sealed { by } => format!("ended without a close (killed), sealed by {by}"),
        End::Live => format!("still being written, signed up to seq {}", run.signed_to),
        End::Retired => "its end was removed by retention".to_owned(),
        End::Empty => "its process was killed before it wrote a line".to_owned(),
        End::Open => format!("ends without a seal, signed up to seq {}", run.signed_to),
    };
    let retired = if run.retired > 0 { format!(" (and {} retired)", run.retired) } else { String::new() };
    let wrong = if run.problems > 0 { format!("; PROBLEMS: {}", run.problems) } else { String::new() };
    let times = if run.from.is_empty() { String::new() } else { format!(", {} to {}", run.from, run.to) };
    let segments = counted(run.segments as u64, "segment");
    let (records, lines) = (counted(run.records, "record"), counted(run.lines, "line"));
    format!("{}: {segments}{retired}, {lines}, {records}{times}; {end}{wrong}", run.run)
}

impl Grep {
    fn run(self) -> Result<ExitCode, String> {
        let table = self.table || (!self.json && io::stdout().is_terminal());
        let mut out = BufWriter::new(io::stdout().lock());
        match self.print(&mut out, table).and_then(|()| out.flush()) {
            // Whoever reads has seen enough.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(ExitCode::SUCCESS),
            Err(error) => Err(format!("the journal in {} cannot be read: {error}", self.place.directory.display())),
            Ok(()) => Ok(ExitCode::SUCCESS),
        }
    }

    fn print(&self, out: &mut impl Write, table: bool) -> io::Result<()> {
        let filter = self.filter();
        if table {
            row(out, ["at", "id", "outcome", "status", "model", "upstream", "ms"])?;
        }
        let mut print = |line: &[u8]| if table { write_row(out, line) } else { write_line(out, line) };
        if let Some(limit) = self.limit {
            return search::newest(&self.place.directory, &filter, limit)?.0.iter().try_for_each(|line| print(line));
        }
        let mut printed = Ok(());
        search::each(&self.place.directory, &filter, |line| {
            printed = print(line);
            if printed.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        })?;
        printed
    }

    fn filter(&self) -> Filter {
        let mut filter = Filter::between(self.since, self.until);
        let members: [(&Option<String>, &[&str]); 7] = [
            (&self.outcome, &["outcome"]),
            (&self.model, &["model.asked", "model.route", "model.used"]),
            (&self.tenant, &["tenant"]),
            (&self.code, &["code"]),
            (&self.upstream, &["attempts.upstream", "attempts.address", "attempts.pool"]),
            (&self.kind, &["kind"]),
            (&self.id, &["id", "client.request_id"]),
        ];
        for (value, paths) in members {
            value.iter().for_each(|value| filter.with(paths, value));
        }
        self.conditions.iter().for_each(|(member, value)| filter.with(&[member], value));
        filter
    }
}

fn write_line(out: &mut impl Write, line: &[u8]) -> io::Result<()> {
    out.write_all(line)?;
    out.write_all(b"\n")
}

/// A line as a row of the table. Lines of other kinds show their kind, and what they are about.
fn write_row(out: &mut impl Write, line: &[u8]) -> io::Result<()> {
    let value: Value = serde_json::from_slice(line).unwrap_or_default();
    let text = |path: &[&str]| {
        let value = path.iter().fold(&value, |value, name| &value[name]);
        let text = value.as_str().map(str::to_owned).or_else(|| value.as_u64().map(|number| number.to_string()));
        // Clients wrote some of it, and it goes to a terminal.
        text.map(|text| plain(&text, &[]))
    };
    let or = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
    let last = value["attempts"].as_array().and_then(|attempts| attempts.last());
    let upstream = plain(last.and_then(|last| last["upstream"].as_str()).unwrap_or("-"), &[]);
    let ms = value["times"]["ended"].as_u64().map(|ended| format!("{}.{}", ended / 1_000, ended / 100 % 10));
    let at = or(text(&["at"]));
    let outcome = or(text(&["outcome"]).or_else(|| text(&["kind"])));
    let model = or(text(&["model", "asked"]).or_else(|| text(&["act"])));
    let columns = [at, or(text(&["id"])), outcome, or(text(&["status"])), model, upstream, or(ms)];
    row(out, columns.each_ref().map(String::as_str))
}

fn row(out: &mut impl Write, [at, id, outcome, status, model, upstream, ms]: [&str; 7]) -> io::Result<()> {
    writeln!(out, "{at:<27}  {id:<36}  {outcome:<14}  {status:>6}  {model:<24}  {upstream:<16}  {ms:>10}")
}
