//! What was promised, and whether it held.

use super::mix::Tally;
use super::samples::{Samples, Table, Trend, sum};
use super::world::{KEEP_BYTES, SEGMENT_BYTES, World, bytes};
use crate::{Failure, wire};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// What is left when the load is over.
pub struct Evidence {
    tally: Tally,
    page: String,
    /// Of finished segments: how many lie there, and how many of them are compressed.
    segments: [usize; 2],
    journal_bytes: u64,
    /// What `audit verify` said, and whether it was content.
    proof: (bool, String),
    /// By the ledger, since it began.
    folded: f64,
    /// Of what the journal has still: by the ledger, and by its records.
    sums: [Sums; 2],
    /// Lines that the gateway should not have logged.
    complaints: Vec<String>,
    ended: String,
}

impl Evidence {
    /// Waits until nothing runs, ends the gateway and reads what it wrote.
    pub async fn gather(mut world: World<'_>, tally: Tally) -> Result<Self, Failure> {
        let page = rested(&world).await?;
        let journal = world.journal();
        let ended = world.gateway.end()?.to_string();
        let verify = Command::new(&world.program).args(["audit", "verify"]).arg(&journal).output()?;
        let said = String::from_utf8_lossy(&verify.stdout).into_owned() + &String::from_utf8_lossy(&verify.stderr);
        let (since, records) = records(&world.program, &journal)?;
        let folded = ledger(&world.program, &journal, "7d")?.requests as f64;
        let sums = [ledger(&world.program, &journal, &since)?, records];
        Ok(Self {
            tally,
            page,
            segments: segments(&journal)?,
            journal_bytes: bytes(&journal.join("runs")),
            proof: (verify.status.success(), said.trim().to_owned()),
            folded,
            sums,
            complaints: complaints(&world.gateway.words()),
            ended,
        })
    }
}

/// The metrics once no request runs and all that is on record is in the ledger.
async fn rested(world: &World<'_>) -> Result<String, Failure> {
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        let page = wire::get(world.admin()?, "/metrics").await?;
        let busy = ["requests_in_flight", "ledger_lag_lines", "journal_lag_lines"]
            .map(|name| sum(&page, &format!("infergate_{name}")));
        if busy == [0.0; 3] {
            return Ok(page);
        }
        if Instant::now() > end {
            return Err(format!(
                "requests in flight, lines to fold, lines to write: {busy:?}, a minute after the last request"
            )
            .into());
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

fn segments(journal: &Path) -> Result<[usize; 2], Failure> {
    let mut found = [0, 0];
    for run in fs::read_dir(journal.join("runs"))? {
        for file in fs::read_dir(run?.path())? {
            let name = file?.file_name().to_string_lossy().into_owned();
            found[0] += usize::from(name.contains(".jsonl"));
            found[1] += usize::from(name.ends_with(".zst"));
        }
    }
    Ok(found)
}

/// Requests, and what they cost.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
struct Sums {
    requests: u64,
    nanousd: u64,
}

impl fmt::Display for Sums {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { requests, nanousd } = self;
        write!(f, "{requests} requests for ${}.{:09}", nanousd / 1_000_000_000, nanousd % 1_000_000_000)
    }
}

/// What the ledger has from a time on.
fn ledger(program: &Path, journal: &Path, since: &str) -> Result<Sums, Failure> {
    let usage = Command::new(program).args(["usage", "--json", "--since", since, "--journal"]).arg(journal).output()?;
    let usage: Value = serde_json::from_slice(&usage.stdout)
        .map_err(|error| format!("`usage`: {error}: {}", String::from_utf8_lossy(&usage.stderr)))?;
    let total = |field| usage.pointer(&format!("/total/{field}")).and_then(Value::as_u64).unwrap_or_default();
    Ok(Sums { requests: total("requests"), nanousd: total("cost_nanousd") })
}

/// The first minute of which the journal has every record, and what all from there on come to.
fn records(program: &Path, journal: &Path) -> Result<(String, Sums), Failure> {
    let mut grep = Command::new(program);
    grep.args(["audit", "grep", "--json", "--kind", "request"]).arg(journal).stdout(Stdio::piped());
    let mut running = grep.spawn()?;
    let (mut first, mut sums) = (None, BTreeMap::<String, Sums>::new());
    for line in BufReader::new(running.stdout.take().ok_or("no output of `audit grep`")?).lines() {
        let record: Value = serde_json::from_str(&line?)?;
        let at = record["at"].as_str().and_then(|at| at.get(..16)).ok_or("a record without a time")?;
        first.get_or_insert_with(|| at.to_owned());
        let sum = sums.entry(at.to_owned()).or_default();
        sum.requests += 1;
        sum.nanousd += record["cost"]["nanousd"].as_u64().unwrap_or_default();
    }
    running.wait()?;
    // Retention may have taken a part of the first minutes: records come in the order in which they ended.
    let mut whole = sums.into_iter().skip_while(|(minute, _)| Some(minute) <= first.as_ref()).peekable();
    let since = whole.peek().map(|(minute, _)| format!("{minute}:00Z")).ok_or("no whole minute in the journal")?;
    let total = whole.fold(Sums::default(), |sum, (_, more)| Sums {
        requests: sum.requests + more.requests,
        nanousd: sum.nanousd + more.nanousd,
    });
    Ok((since, total))
}

/// Panics, and errors that are not about the broken policies that it was given.
fn complaints(log: &str) -> Vec<String> {
    let is_bad =
        |line: &&str| line.contains("panicked") || line.contains("\"level\":\"ERROR\"") && !line.contains("policy");
    log.lines().filter(is_bad).map(str::to_owned).collect()
}

/// What was promised, with what came of it.
pub struct Verdict {
    promises: Vec<Promise>,
    tally: Tally,
    samples: Samples,
    rates: [f64; 2],
    proof: String,
}

struct Promise {
    what: &'static str,
    found: String,
    kept: bool,
}

/// A run shorter than this says nothing about growth.
const LONG_ENOUGH_S: f64 = 600.0;
/// What memory may grow by from the first to the last quarter after the warm-up, as a share, and in KiB.
const GROWTH: (f64, f64) = (0.03, 4096.0);
/// The same for handles and threads.
const GROWTH_OF_HANDLES: (f64, f64) = (0.1, 20.0);
/// Threads that look at the same moment may each find room for one.
const AT_ONCE: f64 = 16.0;

impl Verdict {
    /// Judges.
    pub fn of(evidence: Evidence, samples: Samples, rates: [f64; 2]) -> Self {
        let mut promises = Vec::new();
        let mut promise = |what, found: String, kept| promises.push(Promise { what, found, kept });
        let is_long = samples.0.last().is_some_and(|last| last.at >= LONG_ENOUGH_S);
        let memory = Trend::of(samples.warm(), |sample| sample.memory);
        promise("memory is flat", growth(memory, "KiB", is_long), !is_long || flat(memory, GROWTH));
        let handles = Trend::of(samples.warm(), |sample| sample.handles);
        promise("file handles are flat", growth(handles, "", is_long), !is_long || flat(handles, GROWTH_OF_HANDLES));
        let threads = Trend::of(samples.warm(), |sample| sample.threads);
        promise("threads are flat", growth(threads, "", is_long), !is_long || flat(threads, GROWTH_OF_HANDLES));
        let lines = Trend::of(samples.warm(), |sample| sample.lines);
        promise(
            "the page of metrics does not grow",
            growth(lines, "lines", is_long),
            !is_long || flat(lines, (0.05, 50.0)),
        );
        let over: Vec<String> = overfull(&samples.tables());
        promise("no table is beyond its cap", listed(&over), over.is_empty());
        let Evidence { tally, page, .. } = &evidence;
        promise(
            "nothing went wrong that should not",
            format!("{} errors in {} requests", tally.errors, tally.sent),
            tally.errors == 0,
        );
        promise(
            "nothing was logged as an error, no panic",
            listed(&evidence.complaints),
            evidence.complaints.is_empty(),
        );
        let [reloads, refused] =
            ["policy_reloads_total", "policy_reloads_failed_total"].map(|name| sum(page, &format!("infergate_{name}")));
        let turns = tally.turns;
        promise(
            "good policies came into force, broken ones did not",
            format!("{reloads} and {refused} by its own count, {} and {} given", turns.reloads, turns.refused),
            reloads >= turns.reloads as f64 && refused >= turns.refused as f64,
        );
        let unrecorded = sum(page, "infergate_journal_unrecorded_total");
        promise("every request has a record", format!("{unrecorded} without"), unrecorded == 0.0);
        promise("the journal is proved", last_line(&evidence.proof.1), evidence.proof.0);
        let [segments, packed] = evidence.segments;
        promise(
            "the journal keeps to its size",
            format!(
                "{segments} segments, {packed} compressed, {:.1} MiB of {} MiB",
                mib(evidence.journal_bytes),
                KEEP_BYTES >> 20
            ),
            packed > 0 && evidence.journal_bytes <= KEEP_BYTES + 8 * SEGMENT_BYTES,
        );
        let requests = sum(page, "infergate_requests_total");
        promise(
            "the ledger has every request",
            format!("{} by the ledger, {requests} by the metrics", evidence.folded),
            evidence.folded == requests && sum(page, "infergate_ledger_missed_lines_total") == 0.0,
        );
        promise(
            "the ledger has every cent",
            format!("{}; by the records that are left: {}", evidence.sums[0], evidence.sums[1]),
            evidence.sums[0] == evidence.sums[1] && evidence.sums[0].nanousd > 0,
        );
        promise("it ended when it was asked to", evidence.ended.clone(), evidence.ended == "exit status: 0");
        Self { promises, tally: evidence.tally, samples, rates, proof: evidence.proof.1 }
    }

    /// How many promises were broken.
    pub fn broken(&self) -> usize {
        self.promises.iter().filter(|promise| !promise.kept).count()
    }

    /// Everything, for scripts.
    pub fn json(&self) -> Value {
        let promises =
            |promise: &Promise| json!({"promise": promise.what, "found": promise.found, "kept": promise.kept});
        let outcomes = |((kind, outcome), count): (&(super::mix::Kind, String), &u64)| json!({"kind": kind.to_string(), "outcome": outcome, "count": count});
        let tables =
            |(name, table): (&str, Table)| (name.to_owned(), json!({"most": table.entries, "room": table.room}));
        json!({
            "promises": self.promises.iter().map(promises).collect::<Value>(),
            "rate_full": self.rates[0], "rate": self.rates[1], "cores": self.samples.cores(),
            "outcomes": self.tally.outcomes.iter().map(outcomes).collect::<Value>(),
            "errors": self.tally.first_errors, "late": self.tally.late, "frozen": self.tally.turns.frozen,
            "tables": self.samples.tables().into_iter().map(tables).collect::<serde_json::Map<_, _>>(),
            "proof": self.proof, "samples": self.samples.json(),
        })
    }
}

fn flat(trend: Trend, (share, least): (f64, f64)) -> bool {
    trend.growth() <= (trend.first * share).max(least)
}

fn growth(trend: Trend, unit: &str, is_long: bool) -> String {
    let Trend { first, last, slope, noise } = trend;
    let short = if is_long { "" } else { " (too short to tell)" };
    format!("{first:.0} then {last:.0} {unit}, {slope:+.1} ± {noise:.1} a minute{short}").replace("  ", " ")
}

fn overfull(tables: &BTreeMap<&str, Table>) -> Vec<String> {
    let over = tables.iter().filter(|(_, table)| table.room.is_some_and(|room| table.entries > room + AT_ONCE));
    over.map(|(name, table)| format!("{name}: {} of {}", table.entries, table.room.unwrap_or_default())).collect()
}

fn listed(lines: &[String]) -> String {
    match lines.split_first() {
        None => "none".to_owned(),
        Some((first, [])) => first.clone(),
        Some((first, rest)) => format!("{first} (and {} more)", rest.len()),
    }
}

fn last_line(text: &str) -> String {
    text.lines().last().unwrap_or_default().to_owned()
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [full, half] = self.rates;
        let time = self.samples.0.last().map_or(0.0, |last| last.at) / 60.0;
        writeln!(
            f,
            "{time:.0} minutes at {half:.0} requests a second of {full:.0} in a closed loop, {:.0} % of a core; {} policies, {} refused, {} times a server stood still\n",
            self.samples.cores() * 100.0,
            self.tally.turns.reloads,
            self.tally.turns.refused,
            self.tally.turns.frozen
        )?;
        writeln!(f, "| promise | found | |\n|---|---|---|")?;
        for Promise { what, found, kept } in &self.promises {
            writeln!(f, "| {what} | {} | {} |", found.replace('|', "/"), if *kept { "held" } else { "**BROKEN**" })?;
        }
        writeln!(f, "\n| table | at its fullest | room |\n|---|--:|--:|")?;
        for (name, table) in self.samples.tables() {
            let room =
                table.room.map_or_else(|| "what the policy and requests name".to_owned(), |room| room.to_string());
            writeln!(f, "| {name} | {} | {room} |", table.entries)?;
        }
        writeln!(f, "\n| requests | what came | how often |\n|---|---|--:|")?;
        for ((kind, outcome), count) in &self.tally.outcomes {
            writeln!(f, "| {kind} | {outcome} | {count} |")?;
        }
        if self.tally.late > 0 {
            writeln!(f, "\n{} requests were not sent: too many were under way", self.tally.late)?;
        }
        self.tally.first_errors.iter().try_for_each(|error| writeln!(f, "\n{error}"))
    }
}
