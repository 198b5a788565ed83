//! The comparison: every case through the bare proxy and through the gateway, in turns, and
//! what each of them spent on it. What it does besides is measured on the gateway beside itself.

use crate::children::{Besides, Neighbour, Running, Stage, Subject};
use crate::client::{Answer, Client, Load, Seen, Stop, Transport, quantile};
use crate::cpu;
use crate::prompt::Turns;
use crate::report::{self, Figures, Goal, Row, median};
use crate::{Failure, memory, on_one_thread, plot, upstream};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::Duration;

/// Options of `load compare`.
#[derive(clap::Args)]
pub struct Options {
    /// A few short rounds: enough to see that everything works
    #[arg(long)]
    quick: bool,
    /// The gateway's binary [default: `infergate` beside this one, built if it is missing]
    #[arg(long, value_name = "PATH")]
    gateway: Option<PathBuf>,
    /// Rounds with each pair of processes, either proxy twice in each [default: 7, or 3 with --quick]
    #[arg(long)]
    rounds: Option<usize>,
    /// Write the figures of every round there
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Draw the ratios there, as a picture (SVG)
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
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
    let (cores, files) = cpu::take_the_load_side()?;
    match &cores {
        Some(cores) => eprintln!("proxies on core {}, load and fake server on {}", cores.proxy, cores.load),
        None => eprintln!("one core only: nothing is pinned, the figures will be noisy"),
    }
    let bench = Bench::new(options, subject, Stage::new(cores)?, files)?;
    let rows = on_one_thread(bench.rows())?;
    print!("\n{}", report::table(&rows, bench.subject_name()));
    if let Some(file) = &bench.options.json {
        report::write_json(file, &rows)?;
    }
    if let Some(file) = &bench.options.svg {
        std::fs::write(file, plot::svg(&rows))?;
    }
    Ok(bench.verdict(&rows))
}

fn subject(options: &Options) -> Result<Subject, Failure> {
    match options.self_check {
        true => Ok(Subject::BareAgain),
        false => gateway(options.gateway.as_ref()).map(Subject::Gateway),
    }
}

/// The gateway's binary: the one that is named, or the one beside this one.
pub fn gateway(named: Option<&PathBuf>) -> Result<PathBuf, Failure> {
    let program = match named {
        Some(path) => path.clone(),
        None => beside_this_one()?,
    };
    let age = std::fs::metadata(&program)
        .map_err(|error| format!("no gateway at {}: {error}", program.display()))?
        .modified()?
        .elapsed()
        .unwrap_or_default();
    eprintln!("gateway: {}, built {} min ago", program.display(), age.as_secs() / 60);
    Ok(program)
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
pub const PLAIN: Load = Load {
    connections: 32,
    bytes: 1024,
    turns: Turns::One,
    answer: Answer::Whole,
    transport: Transport::Kept,
    apart: false,
};

/// One line of the table that is about CPU time.
struct Case {
    name: &'static str,
    load: Load,
    goal: Goal,
    yardstick: Yardstick,
}

/// What stands in the column `bare`.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Yardstick {
    /// The bare proxy.
    Bare,
    /// The bare proxy, beside a gateway that does so much more.
    BareBeside(Besides),
    /// The bare proxy, beside another one.
    BareBy(Neighbour),
    /// The same gateway without it.
    Itself(Besides),
}

impl Case {
    fn is_stream(&self) -> bool {
        matches!(self.load.answer, Answer::Stream { .. })
    }

    fn is_beside_itself(&self) -> bool {
        matches!(self.yardstick, Yardstick::Itself(_))
    }

    /// Whether what a proxy does between its turns counts too, and in threads that end: where it keeps a journal.
    fn counts_all(&self) -> bool {
        matches!(self.yardstick, Yardstick::Itself(_) | Yardstick::BareBeside(_))
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
    let case = |name, load, goal| Case { name, load, goal, yardstick: Yardstick::Bare };
    let beside =
        |name, load, besides, most| Case { name, load, goal: Goal::Ratio(most), yardstick: Yardstick::Itself(besides) };
    let evidence = |name, load, besides| beside(name, load, besides, 1.06);
    let all = |name, load, besides, most| Case {
        name,
        load,
        goal: Goal::Ratio(most),
        yardstick: Yardstick::BareBeside(besides),
    };
    let neighbour = |name, load, who| Case { name, load, goal: Goal::None, yardstick: Yardstick::BareBy(who) };
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
        evidence("evidence, 1 KB", PLAIN, Besides::Evidence),
        evidence("evidence, 16 KB", sized(32, 16 << 10, Turns::One), Besides::Evidence),
        evidence("evidence, stream at full speed", stream(16, Duration::ZERO), Besides::Evidence),
        evidence("evidence, 1 KB, compressed", PLAIN, Besides::Packed),
        beside("limits, 1 KB", PLAIN, Besides::Limits, 1.10),
        beside("limits, stream at full speed", stream(16, Duration::ZERO), Besides::Limits, 1.10),
        beside("guardrails, 1 KB", PLAIN, Besides::Guards, 1.15),
        beside("guardrails, stream at full speed", stream(16, Duration::ZERO), Besides::Guards, 1.10),
        all("everything on, 1 KB", PLAIN, Besides::Everything, 1.0),
        all("everything on, 16 KB", sized(32, 16 << 10, Turns::One), Besides::Everything, 1.2),
        all("everything on, 100 KB", sized(16, 100 << 10, Turns::One), Besides::Everything, 1.5),
        all("everything on, an event each 10 ms", stream(200, pace), Besides::Everything, 1.15),
        all("all but prompt guards, 1 KB", PLAIN, Besides::AllButPrompts, 1.0),
        all("all but prompt guards, 16 KB", sized(32, 16 << 10, Turns::One), Besides::AllButPrompts, 1.0),
        all("all but prompt guards, 100 KB", sized(16, 100 << 10, Turns::One), Besides::AllButPrompts, 1.0),
        neighbour("nginx, 1 KB", PLAIN, Neighbour::Nginx),
        neighbour("nginx, 16 KB", sized(32, 16 << 10, Turns::One), Neighbour::Nginx),
        neighbour("nginx, an event each 10 ms", stream(200, pace), Neighbour::Nginx),
        neighbour("haproxy, 1 KB", PLAIN, Neighbour::Haproxy),
        neighbour("haproxy, 16 KB", sized(32, 16 << 10, Turns::One), Neighbour::Haproxy),
        neighbour("haproxy, an event each 10 ms", stream(200, pace), Neighbour::Haproxy),
        neighbour("sglang-router, 1 KB", PLAIN, Neighbour::SglangRouter),
        neighbour("sglang-router, 16 KB", sized(32, 16 << 10, Turns::One), Neighbour::SglangRouter),
        neighbour("sglang-router, an event each 10 ms", stream(200, pace), Neighbour::SglangRouter),
        neighbour("vllm-router, 1 KB", PLAIN, Neighbour::VllmRouter),
        neighbour("vllm-router, 16 KB", sized(32, 16 << 10, Turns::One), Neighbour::VllmRouter),
        neighbour("vllm-router, an event each 10 ms", stream(200, pace), Neighbour::VllmRouter),
        neighbour("portkey, 1 KB", PLAIN, Neighbour::Portkey),
        neighbour("portkey, 16 KB", sized(32, 16 << 10, Turns::One), Neighbour::Portkey),
        neighbour("litellm, 1 KB", PLAIN, Neighbour::Litellm),
        neighbour("litellm, 16 KB", sized(32, 16 << 10, Turns::One), Neighbour::Litellm),
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

    /// A bare proxy can do nothing besides, and what is not installed does nothing at all.
    fn is_possible(&self, case: &Case) -> bool {
        match case.yardstick {
            Yardstick::Bare => true,
            Yardstick::BareBy(neighbour) => neighbour.program().is_some(),
            Yardstick::BareBeside(_) | Yardstick::Itself(_) => matches!(self.subject, Subject::Gateway(_)),
        }
    }

    async fn rows(&self) -> Result<Vec<Row>, Failure> {
        let mut rows = Vec::new();
        for case in cases().into_iter().filter(|case| self.is_wanted(case.name) && self.is_possible(case)) {
            eprintln!("{} …", case.name);
            let result = match case.yardstick {
                Yardstick::Bare => self.measure(&case).await,
                Yardstick::BareBy(neighbour) => self.measure_neighbour(&case, neighbour).await,
                Yardstick::BareBeside(besides) | Yardstick::Itself(besides) => {
                    self.measure_besides(&case, besides).await
                }
            };
            rows.push(Row { case: case.name.into(), unit: case.unit(), result, goal: self.goal(&case) });
        }
        if self.is_wanted(FIRST_TOKEN) {
            rows.push(self.first_token().await);
        }
        if self.is_wanted(MEMORY) {
            rows.extend(self.memory().await);
        }
        Ok(rows)
    }

    fn pair(&self, h2c: bool) -> Result<Pair, Failure> {
        Ok(Pair {
            bare: self.stage.bare(self.upstream.address, h2c)?,
            own: self.stage.subject(&self.subject, self.upstream.address, h2c)?,
        })
    }

    /// Some of what a process costs is decided when it starts, by where its memory comes to lie
    /// and how far its sockets' buffers grow: several pairs of processes are needed to see the rest.
    async fn measure(&self, case: &Case) -> Result<Figures, Failure> {
        let mut rounds = Vec::new();
        for _ in 0..if self.options.quick { 2 } else { 5 } {
            // Listening for HTTP/2 costs the bare proxy a look into each new connection.
            let pair = self.pair(case.load.transport == Transport::Http2)?;
            rounds.extend(self.measure_pair(&pair, case).await?);
            pair.check_clocks()?;
        }
        Ok(Figures::of_rounds(&rounds))
    }

    async fn measure_neighbour(&self, case: &Case, neighbour: Neighbour) -> Result<Figures, Failure> {
        let mut rounds = Vec::new();
        for _ in 0..if self.options.quick { 2 } else { 5 } {
            let own = self.stage.neighbour(neighbour, self.upstream.address)?;
            let pair = Pair { bare: self.stage.bare(self.upstream.address, false)?, own };
            rounds.extend(self.measure_pair(&pair, case).await?);
        }
        Ok(Figures::of_rounds(&rounds))
    }

    /// The same for a gateway with what it does besides: beside itself without it, or beside the bare proxy.
    async fn measure_besides(&self, case: &Case, besides: Besides) -> Result<Figures, Failure> {
        let Subject::Gateway(program) = &self.subject else { return Err("no gateway".into()) };
        let gateway = |besides| self.stage.gateway(program, self.upstream.address, besides);
        let mut rounds = Vec::new();
        for _ in 0..if self.options.quick { 2 } else { 5 } {
            let before = upstream::batches(self.upstream.address).await?;
            let bare = match case.is_beside_itself() {
                true => gateway(besides.without())?,
                false => self.stage.bare(self.upstream.address, false)?,
            };
            let pair = Pair { bare, own: gateway(besides)? };
            rounds.extend(self.measure_pair(&pair, case).await?);
            let sent = upstream::batches(self.upstream.address).await? - before;
            drop(pair);
            let packed = self.stage.forget_journal()?;
            if besides.is_evidence() && (sent == 0 || (packed > 0) != (besides == Besides::Packed)) {
                return Err(format!("{sent} batches of spans, {packed} compressed segments").into());
            }
        }
        Ok(Figures::of_rounds(&rounds))
    }

    async fn measure_pair(&self, pair: &Pair, case: &Case) -> Result<Vec<(f64, f64)>, Failure> {
        let slice = self.slice(case);
        let [mut bare, mut own] = [&pair.bare, &pair.own].map(|proxy| Lane::new(proxy, case));
        for lane in [&mut bare, &mut own] {
            lane.spend(slice.max(WARM_UP)).await?;
            lane.cost()?;
        }
        let mut rounds = Vec::new();
        for number in 0..self.rounds(case) {
            // There and back, and from the other end the next time: a drift favours nobody.
            let [first, second] = match number % 2 {
                0 => [&mut bare, &mut own],
                _ => [&mut own, &mut bare],
            };
            first.spend(slice).await?;
            second.spend(slice).await?;
            second.spend(slice).await?;
            first.spend(slice).await?;
            if case.counts_all() {
                tokio::time::sleep(COMMIT).await;
            }
            rounds.push((bare.cost()?, own.cost()?));
        }
        let ended = (bare.ended()?, own.ended()?);
        Ok(rounds.into_iter().map(|(bare, own)| (bare + ended.0, own + ended.1)).collect())
    }

    fn goal(&self, case: &Case) -> Goal {
        match self.subject {
            Subject::Gateway(_) => case.goal,
            Subject::BareAgain => Goal::Same(0.05),
        }
    }

    /// Paced streams take a second each: they have fewer rounds.
    fn rounds(&self, case: &Case) -> usize {
        let usual = if self.options.quick { 3 } else { 7 };
        let rounds = self.options.rounds.unwrap_or(usual).max(1);
        match case.is_paced() {
            true => rounds.div_ceil(3),
            false => rounds,
        }
    }

    /// How long a proxy is loaded before it is the other's turn: short, because a machine's speed
    /// changes from one moment to the next, and a round should see one speed.
    fn slice(&self, case: &Case) -> Duration {
        Duration::from_millis(match (case.is_paced(), case.yardstick, self.options.quick) {
            (true, ..) => 900,
            // Long enough for a group of records to be of the usual size.
            (false, Yardstick::Itself(_) | Yardstick::BareBeside(_), false) => 200,
            (false, _, false) => 100,
            (false, _, true) => 50,
        })
    }

    /// The time a proxy adds to the first event when nothing else goes on.
    async fn first_token(&self) -> Row {
        eprintln!("{FIRST_TOKEN} …");
        let rounds = if self.options.quick { 3 } else { 11 };
        let result = match self.pair(false) {
            Ok(pair) => added_to_first_event(self.upstream.address, &pair, rounds).await,
            Err(failure) => Err(failure),
        };
        Row { case: FIRST_TOKEN.into(), unit: "µs", result, goal: Goal::Figure(1000.0) }
    }

    async fn memory(&self) -> Vec<Row> {
        eprintln!("{MEMORY} …");
        let small = self.both_memories(1 << 10).await;
        let large = self.both_memories(16 << 10).await;
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
    async fn both_memories(&self, bytes: usize) -> Result<[memory::Memory; 2], Failure> {
        let pair = self.pair(false)?;
        Ok([
            memory::measure(&pair.bare, bytes, self.streams).await?,
            memory::measure(&pair.own, bytes, self.streams).await?,
        ])
    }

    /// A failed case is a failure, and so is a method that does not hold; a missed goal is a finding.
    fn verdict(&self, rows: &[Row]) -> ExitCode {
        let is_wrong = |row: &Row| match (&row.result, row.goal) {
            (Err(_), _) => true,
            (Ok(figures), Goal::Same(_)) => row.goal.met(figures) == Some(false),
            _ => false,
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
    fn check_clocks(&self) -> Result<(), Failure> {
        for proxy in [&self.bare, &self.own] {
            let fine = cpu::time(proxy.pid())?.as_secs_f64();
            let coarse = cpu::ticks(proxy.pid())?.as_secs_f64();
            if (fine - coarse).abs() > 0.05 + coarse * 0.02 {
                let name = proxy.name;
                eprintln!("warning: {name} spent {fine:.2} s in its present threads, {coarse:.2} s in all");
            }
        }
        Ok(())
    }
}

/// One proxy's side of a case.
struct Lane<'a> {
    proxy: &'a Running,
    client: Client,
    counts_events: bool,
    /// Whether what it does between its turns counts too, and what it does in threads that end.
    counts_all: bool,
    /// Its CPU time when that was last looked at.
    seen: Duration,
    spent: Duration,
    count: u64,
    /// The same since the first turn.
    all: u64,
}

impl<'a> Lane<'a> {
    fn new(proxy: &'a Running, case: &Case) -> Self {
        Self {
            proxy,
            client: Client::new(case.load, proxy.address).minding(proxy.header_lines.clone(), proxy.rewrites),
            counts_events: case.is_stream(),
            counts_all: case.counts_all(),
            seen: Duration::ZERO,
            spent: Duration::ZERO,
            count: 0,
            all: 0,
        }
    }

    /// Loads the proxy for a while.
    async fn spend(&mut self, slice: Duration) -> Result<(), Failure> {
        self.look(self.counts_all)?;
        let seen = right(self.client.run(Stop::when(slice)).await)
            .map_err(|failure| format!("{}: {failure}; it says:\n{}", self.proxy.name, self.proxy.last_words()))?;
        // What it still does after the last answer (closing, pooling, counting) is its work too.
        tokio::time::sleep(Duration::from_millis(10)).await;
        self.look(true)?;
        self.count += if self.counts_events { seen.events } else { seen.requests };
        Ok(())
    }

    /// Looks at the clock; what has passed on it since the last look counts, or does not.
    fn look(&mut self, counts: bool) -> Result<(), Failure> {
        let now = cpu::time(self.proxy.pid())?;
        let since = now.saturating_sub(std::mem::replace(&mut self.seen, now));
        self.spent += if counts { since } else { Duration::ZERO };
        Ok(())
    }

    /// CPU microseconds for each request or event since the last call.
    fn cost(&mut self) -> Result<f64, Failure> {
        self.look(self.counts_all)?;
        self.all += self.count;
        let spent = std::mem::take(&mut self.spent).as_secs_f64() * 1e6;
        Ok(spent / std::mem::take(&mut self.count) as f64)
    }

    /// The same for what threads spent that have ended: one compresses each finished segment.
    fn ended(&self) -> Result<f64, Failure> {
        if !self.counts_all {
            return Ok(0.0);
        }
        let (all, present) = (cpu::ticks(self.proxy.pid())?, cpu::time(self.proxy.pid())?);
        Ok(all.saturating_sub(present).as_secs_f64() * 1e6 / self.all as f64)
    }
}

/// How long the journal gathers records, and a little more.
const COMMIT: Duration = Duration::from_millis(150);

/// Until buffers, windows and pools have the size they keep.
const WARM_UP: Duration = Duration::from_millis(500);

/// A single wrong answer spoils the measurement.
pub fn right(seen: Result<Seen, Failure>) -> Result<Seen, Failure> {
    let seen = seen?;
    if seen.errors == 0 && seen.requests > 0 {
        return Ok(seen);
    }
    let first = seen.first_error.as_deref().unwrap_or("nothing came back");
    let sent = seen.requests + seen.errors;
    Err(format!("{} of {sent} requests failed, the first: {first}", seen.errors).into())
}

async fn added_to_first_event(upstream: SocketAddr, pair: &Pair, rounds: usize) -> Result<Figures, Failure> {
    let [mut direct, mut bare, mut own] = [upstream, pair.bare.address, pair.own.address].map(one_by_one);
    let mut added = Vec::new();
    for _ in 0..rounds {
        let direct = first_event(&mut direct).await?;
        let bare = first_event(&mut bare).await?;
        let own = first_event(&mut own).await?;
        added.push((bare - direct, own - direct));
    }
    Ok(Figures {
        bare: median(added.iter().map(|round| round.0)),
        gateway: median(added.iter().map(|round| round.1)),
        ratios: Vec::new(),
    })
}

/// Short streams, one at a time.
fn one_by_one(target: SocketAddr) -> Client {
    let answer = Answer::Stream { events: 3, interval: Duration::ZERO };
    Client::new(Load { connections: 1, answer, ..PLAIN }, target)
}

/// The median time to the first event, in microseconds.
async fn first_event(client: &mut Client) -> Result<f64, Failure> {
    let mut seen = right(client.run(Stop::after(100)).await)?;
    Ok(quantile(&mut seen.first_events, 0.5).as_secs_f64() * 1e6)
}
