//! The comparison: every case through the bare proxy and through the gateway, in turns, and
//! what each of them spent on it.

use crate::children::{Running, Stage, Subject};
use crate::client::{Answer, Load, Seen, Stop, Transport, quantile};
use crate::cpu::{self, Cores};
use crate::prompt::Turns;
use crate::report::{self, Figures, Goal, Row, median};
use crate::{Failure, memory, on_one_thread};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::Duration;

/// Options of `load compare`.
#[derive(clap::Args)]
pub struct Options {
    /// Three short rounds: enough to see that everything works
    #[arg(long)]
    quick: bool,
    /// The gateway's binary [default: `infergate` beside this one, built if it is missing]
    #[arg(long, value_name = "PATH")]
    gateway: Option<PathBuf>,
    /// Rounds a case, each of them once through either proxy [default: 11, or 3 with --quick]
    #[arg(long)]
    rounds: Option<usize>,
    /// Write the figures of every round there
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Only the cases with this in their name (repeatable)
    #[arg(long, value_name = "CASE")]
    only: Vec<String>,
    /// A second bare proxy in the gateway's place: every CPU ratio must be 1.00 ± 0.05
    #[arg(long, conflicts_with = "gateway")]
    self_check: bool,
}

/// Runs the comparison and prints the table.
pub fn command(options: Options) -> Result<ExitCode, Failure> {
    let subject = subject(&options)?;
    let cores = Cores::split()?;
    match &cores {
        Some(cores) => {
            cores.take_the_load_side()?;
            eprintln!("proxies on core {}, load and fake server on {}", cores.proxy, cores.load);
        }
        None => eprintln!("one core only: nothing is pinned, the figures will be noisy"),
    }
    let files = cpu::raise_open_files()?;
    let bench = Bench::new(options, subject, Stage::new(cores)?, files)?;
    let rows = bench.rows()?;
    print!("\n{}", report::table(&rows, bench.subject_name()));
    if let Some(file) = &bench.options.json {
        report::write_json(file, &rows)?;
    }
    Ok(bench.verdict(&rows))
}

fn subject(options: &Options) -> Result<Subject, Failure> {
    if options.self_check {
        return Ok(Subject::BareAgain);
    }
    let program = match &options.gateway {
        Some(path) => path.clone(),
        None => beside_this_one()?,
    };
    let age = std::fs::metadata(&program)
        .map_err(|error| format!("no gateway at {}: {error}", program.display()))?
        .modified()?
        .elapsed()
        .unwrap_or_default();
    eprintln!("gateway: {}, built {} min ago", program.display(), age.as_secs() / 60);
    Ok(Subject::Gateway(program))
}

fn beside_this_one() -> Result<PathBuf, Failure> {
    let path = std::env::current_exe()?.with_file_name("infergate");
    if !path.exists() {
        eprintln!("no gateway yet: cargo build --release --package infergate");
        let built = Command::new("cargo").args(["build", "--release", "--package", "infergate"]).status()?;
        if !built.success() {
            return Err("the gateway does not build".into());
        }
    }
    Ok(path)
}

/// Kept connections, whole answers: what most cases change one thing of.
const PLAIN: Load =
    Load { connections: 32, bytes: 1024, turns: Turns::One, answer: Answer::Whole, transport: Transport::Kept };

/// One line of the table that is about CPU time.
struct Case {
    name: &'static str,
    load: Load,
    goal: Goal,
}

impl Case {
    fn is_stream(&self) -> bool {
        matches!(self.load.answer, Answer::Stream { .. })
    }

    fn is_paced(&self) -> bool {
        matches!(self.load.answer, Answer::Stream { interval, .. } if !interval.is_zero())
    }

    fn unit(&self) -> &'static str {
        match self.is_stream() {
            true => "µs/event",
            false => "µs/request",
        }
    }
}

fn cases() -> Vec<Case> {
    let sized = |connections, bytes, turns| Load { connections, bytes, turns, ..PLAIN };
    let stream =
        |connections, interval| Load { connections, answer: Answer::Stream { events: 100, interval }, ..PLAIN };
    let carried = |transport| Load { transport, ..PLAIN };
    let case = |name, load, goal| Case { name, load, goal };
    let pace = Duration::from_millis(10);
    vec![
        case("1 KB", PLAIN, Goal::Ratio(0.9)),
        case("16 KB", sized(32, 16 << 10, Turns::One), Goal::Ratio(1.0)),
        case("16 KB, many turns", sized(32, 16 << 10, Turns::Many), Goal::Ratio(1.0)),
        case("100 KB", sized(16, 100 << 10, Turns::One), Goal::Ratio(1.0)),
        case("1 MB", sized(8, 1 << 20, Turns::One), Goal::Ratio(1.0)),
        case("stream, 100 events at full speed", stream(16, Duration::ZERO), Goal::Ratio(0.9)),
        case("200 streams, an event each 10 ms", stream(200, pace), Goal::Ratio(0.9)),
        case("1 KB, new connection", carried(Transport::Fresh), Goal::None),
        case("1 KB, HTTP/2", carried(Transport::Http2), Goal::None),
    ]
}

const FIRST_TOKEN: &str = "added to the first token, p50";

const MEMORY: &str = "memory";

struct Bench {
    options: Options,
    subject: Subject,
    stage: Stage,
    upstream: Running,
    streams: usize,
}

impl Bench {
    fn new(options: Options, subject: Subject, stage: Stage, open_files: u64) -> Result<Self, Failure> {
        let upstream = stage.upstream()?;
        // A stream is two sockets in a proxy, and something must be left for the rest.
        let possible = usize::try_from(open_files)?.saturating_sub(200) / 2;
        Ok(Self { options, subject, stage, upstream, streams: possible.min(2000) })
    }

    fn subject_name(&self) -> &'static str {
        match self.subject {
            Subject::Gateway(_) => "gateway",
            Subject::BareAgain => "bare again",
        }
    }

    fn is_wanted(&self, name: &str) -> bool {
        let only = &self.options.only;
        only.is_empty() || only.iter().any(|part| name.contains(part.as_str()))
    }

    fn rounds(&self) -> usize {
        let usual = if self.options.quick { 3 } else { 11 };
        self.options.rounds.unwrap_or(usual).max(1)
    }

    fn rows(&self) -> Result<Vec<Row>, Failure> {
        let mut rows = Vec::new();
        let (h1, h2): (Vec<Case>, Vec<Case>) = cases()
            .into_iter()
            .filter(|case| self.is_wanted(case.name))
            .partition(|case| case.load.transport != Transport::Http2);
        let first_token = self.is_wanted(FIRST_TOKEN);
        if !h1.is_empty() || first_token {
            let pair = self.pair(false)?;
            rows.extend(h1.iter().map(|case| self.row(&pair, case)));
            if first_token {
                rows.push(self.first_token(&pair));
            }
            pair.compare_clocks()?;
        }
        if !h2.is_empty() {
            // The bare proxy listens for HTTP/2 only here: it costs each new connection a look.
            let pair = self.pair(true)?;
            rows.extend(h2.iter().map(|case| self.row(&pair, case)));
        }
        if self.is_wanted(MEMORY) {
            rows.extend(self.memory());
        }
        Ok(rows)
    }

    fn pair(&self, h2c: bool) -> Result<Pair, Failure> {
        Ok(Pair {
            bare: self.stage.bare(self.upstream.address, h2c)?,
            own: self.stage.subject(&self.subject, self.upstream.address, h2c)?,
        })
    }

    fn row(&self, pair: &Pair, case: &Case) -> Row {
        eprintln!("{} …", case.name);
        Row { case: case.name.into(), unit: case.unit(), result: self.measure(pair, case), goal: case.goal }
    }

    fn measure(&self, pair: &Pair, case: &Case) -> Result<Figures, Failure> {
        let slice = self.slice(case);
        for proxy in [&pair.bare, &pair.own] {
            spent(proxy, case, slice.min(Duration::from_millis(500)))?;
        }
        let mut rounds = Vec::new();
        for number in 0..self.rounds() {
            // Who goes first changes, so that a drift of the machine favours nobody.
            let (bare, own);
            if number % 2 == 0 {
                bare = spent(&pair.bare, case, slice)?;
                own = spent(&pair.own, case, slice)?;
            } else {
                own = spent(&pair.own, case, slice)?;
                bare = spent(&pair.bare, case, slice)?;
            }
            rounds.push((bare, own));
        }
        Ok(Figures::of_rounds(&rounds))
    }

    /// How long a proxy is loaded before it is the other's turn.
    fn slice(&self, case: &Case) -> Duration {
        Duration::from_millis(match (case.is_paced(), self.options.quick) {
            // A paced stream takes a second: two after each other, or one.
            (true, false) => 1900,
            (true, true) => 900,
            (false, false) => 800,
            (false, true) => 400,
        })
    }

    /// The time a proxy adds to the first event when nothing else goes on.
    fn first_token(&self, pair: &Pair) -> Row {
        eprintln!("{FIRST_TOKEN} …");
        let result = (|| {
            let mut rounds = Vec::new();
            for _ in 0..self.rounds() {
                let direct = first_event(self.upstream.address)?;
                let bare = first_event(pair.bare.address)?;
                let own = first_event(pair.own.address)?;
                rounds.push((bare - direct, own - direct));
            }
            Ok(Figures {
                bare: median(rounds.iter().map(|round| round.0)),
                gateway: median(rounds.iter().map(|round| round.1)),
                ratios: Vec::new(),
            })
        })();
        Row { case: FIRST_TOKEN.into(), unit: "µs", result, goal: Goal::Figure(1000.0) }
    }

    fn memory(&self) -> Vec<Row> {
        eprintln!("{MEMORY} …");
        let small = self.both_memories(1 << 10);
        let large = self.both_memories(16 << 10);
        let row = |case: String, result: Result<(f64, f64), Failure>| Row {
            case,
            unit: "KiB",
            result: result.map(|both| Figures::of_rounds(&[both])),
            goal: Goal::None,
        };
        let streams = self.streams;
        let of = |memories: &Result<[memory::Memory; 2], Failure>, part: fn(&memory::Memory) -> f64| match memories {
            Ok([bare, own]) => Ok((part(bare), part(own))),
            Err(failure) => Err(failure.to_string().into()),
        };
        vec![
            row(format!("{MEMORY}, idle"), of(&small, |m| m.idle)),
            row(format!("{MEMORY}, {streams} open streams"), of(&small, |m| m.open)),
            row(format!("{MEMORY} of an open stream, 1 KB prompt"), of(&small, |m| m.stream)),
            row(format!("{MEMORY} of an open stream, 16 KB prompt"), of(&large, |m| m.stream)),
        ]
    }

    /// Fresh processes: what an allocator once took it seldom gives back.
    fn both_memories(&self, bytes: usize) -> Result<[memory::Memory; 2], Failure> {
        let pair = self.pair(false)?;
        Ok([memory::measure(&pair.bare, bytes, self.streams)?, memory::measure(&pair.own, bytes, self.streams)?])
    }

    /// A failed case is a failure; a missed goal is a finding.
    fn verdict(&self, rows: &[Row]) -> ExitCode {
        let is_wrong = |row: &Row| match &row.result {
            Err(_) => true,
            Ok(figures) => {
                let is_about_cpu = row.unit.starts_with("µs/");
                let apart = figures.ratio().map_or(0.0, |ratio| (ratio - 1.0).abs());
                self.options.self_check && is_about_cpu && apart > 0.05
            }
        };
        match rows.iter().any(is_wrong) {
            true => ExitCode::FAILURE,
            false => ExitCode::SUCCESS,
        }
    }
}

/// The two that are compared.
struct Pair {
    bare: Running,
    own: Running,
}

impl Pair {
    /// The fine clock forgets threads that end; the coarse one does not.
    fn compare_clocks(&self) -> Result<(), Failure> {
        for proxy in [&self.bare, &self.own] {
            let fine = cpu::time(proxy.pid())?.as_secs_f64();
            let coarse = cpu::ticks(proxy.pid())?.as_secs_f64();
            if (fine - coarse).abs() > 0.05 + coarse * 0.02 {
                eprintln!("warning: {} spent {fine:.2} s by schedstat but {coarse:.2} s by stat", proxy.name);
            }
        }
        Ok(())
    }
}

/// CPU microseconds of a proxy for each request or event of a load.
fn spent(proxy: &Running, case: &Case, slice: Duration) -> Result<f64, Failure> {
    let before = cpu::time(proxy.pid())?;
    let seen = run(proxy.address, case.load, Stop::when(slice))
        .map_err(|failure| format!("{}: {failure}; it says:\n{}", proxy.name, proxy.last_words()))?;
    // What it still does after the last answer (closing, pooling, counting) is its work too.
    std::thread::sleep(Duration::from_millis(20));
    let spent = cpu::time(proxy.pid())? - before;
    let count = match case.is_stream() {
        true => seen.events,
        false => seen.requests,
    };
    Ok(spent.as_secs_f64() * 1e6 / count as f64)
}

fn run(target: SocketAddr, load: Load, stop: Stop) -> Result<Seen, Failure> {
    let seen = on_one_thread(load.run(target, stop))?;
    match (seen.errors, &seen.first_error) {
        (0, _) if seen.requests > 0 => Ok(seen),
        (errors, first) => Err(format!(
            "{errors} of {} requests failed, the first: {}",
            seen.requests + errors,
            first.as_deref().unwrap_or("nothing came back")
        )
        .into()),
    }
}

/// The median time to the first event, in microseconds, one stream at a time.
fn first_event(target: SocketAddr) -> Result<f64, Failure> {
    let load = Load { connections: 1, answer: Answer::Stream { events: 3, interval: Duration::ZERO }, ..PLAIN };
    let mut seen = run(target, load, Stop::after(100))?;
    Ok(quantile(&mut seen.first_events, 0.5).as_secs_f64() * 1e6)
}
