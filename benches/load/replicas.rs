//! Several replicas behind one gateway: what choosing among them is worth and what it costs, and whether one of them can
//! make the others slower.

use crate::children::{Running, Stage};
use crate::client::{self, Answer, Client, Load, Seen, Stop, quantile};
use crate::compare::{self, PLAIN, right};
use crate::cpu;
use crate::report::Figures;
use crate::wire::{self, Wire};
use crate::{Failure, on_one_thread, prompt};
use bytes::Bytes;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::task::JoinSet;

/// Options of `load replicas`.
#[derive(clap::Args)]
pub struct Options {
    /// What is measured; all of it if nothing is named
    #[arg(value_enum)]
    parts: Vec<Part>,
    /// The gateway's binary [default: `infergate` beside this one, built if it is missing]
    #[arg(long, value_name = "PATH")]
    gateway: Option<PathBuf>,
    /// How long each line of a part is measured
    #[arg(long, default_value_t = 60)]
    seconds: u64,
}

/// What is measured.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    /// Four servers of unequal speed that keep what they have read: first tokens and hits
    Unequal,
    /// Prompts of 220 KB on 200 streams: requests a second and first tokens
    Long,
    /// A hundred upstreams that have nothing to do: the gateway's share of a core
    Idle,
    /// One of four leaves, joins, freezes or lies: the first tokens of the others
    Disturbed,
}

/// Measures and prints.
pub fn command(options: &Options) -> Result<ExitCode, Failure> {
    let program = compare::gateway(options.gateway.as_ref())?;
    let (cores, _) = cpu::take_the_load_side()?;
    let bench = Bench { stage: Stage::new(cores)?, program, time: Duration::from_secs(options.seconds) };
    let is_wanted = |part| options.parts.is_empty() || options.parts.contains(&part);
    on_one_thread(async {
        if is_wanted(Part::Unequal) {
            bench.unequal().await?;
        }
        if is_wanted(Part::Long) {
            bench.long().await?;
        }
        if is_wanted(Part::Idle) {
            bench.idle().await?;
        }
        if is_wanted(Part::Disturbed) {
            bench.disturbed().await?;
        }
        Ok(ExitCode::SUCCESS)
    })
}

struct Bench {
    stage: Stage,
    program: PathBuf,
    time: Duration,
}

/// One worker, no journal, as in the comparison.
const SETTINGS: &str = "threads: 1\naudit: {enabled: false}\n";

/// A pool of these upstreams.
fn policy(upstreams: &[SocketAddr], more: &str) -> String {
    let urls: Vec<String> = upstreams.iter().map(|address| format!("{{url: 'http://{address}'}}")).collect();
    let urls = urls.join(", ");
    format!("version: 1\nmodels: [{{name: 'load-*', pool: load}}]\npools: {{load: {{upstreams: [{urls}], {more}}}}}\n")
}

fn addresses(servers: &[Running]) -> Vec<SocketAddr> {
    servers.iter().map(|server| server.address).collect()
}

/// What came of one request.
struct Heard {
    first: Duration,
    /// Who answered, and at which attempt.
    upstream: String,
    attempts: u64,
}

async fn ask(target: SocketAddr, request: &Bytes) -> Result<Heard, Failure> {
    let began = Instant::now();
    let mut wire = Wire::new(TcpStream::connect(target).await?)?;
    wire.socket.write_all(request).await?;
    let head = wire.head().await?.ok_or("closed instead of an answer")?;
    client::check_status(&mut wire, &head).await?;
    let mut first = None;
    wire.body(head.framing(), |_| _ = first.get_or_insert_with(|| began.elapsed())).await?;
    let upstream = head.header("x-infergate-upstream").unwrap_or_default().to_owned();
    let attempts = head.number("x-infergate-attempts").unwrap_or_default();
    Ok(Heard { first: first.ok_or("an answer of nothing")?, upstream, attempts })
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

// Of unequal speed.

/// Prompts that somebody begins with, of 2,000 tokens or so: more than fit into one server's cache, fewer than fit into
/// four.
const BEGINNINGS: usize = 48;
const CACHE: &str = "50000";
/// How many requests run at once.
const AT_ONCE: usize = 8;
/// Prompt tokens that the servers read in a second.
const SPEEDS: [&str; 4] = ["20000", "20000", "10000", "5000"];

impl Bench {
    async fn unequal(&self) -> Result<(), Failure> {
        println!(
            "four servers that keep {CACHE} tokens and read {} tokens a second, {AT_ONCE} requests at once:",
            SPEEDS.join(", ")
        );
        for balance in ["balance: round_robin", "balance: p2c", ASKS] {
            let start = |speed| {
                let more = ["--prefill-per-second", speed, "--tokens-per-second", "200", "--kv-tokens", CACHE];
                self.stage.simulated(&self.program, Ipv4Addr::LOCALHOST, &more)
            };
            let servers = SPEEDS.into_iter().map(start).collect::<Result<Vec<_>, _>>()?;
            let policy = policy(&addresses(&servers), balance);
            let gateway = self.stage.gateway_on(&self.program, "gateway", &policy, SETTINGS)?;
            let mut firsts = self.conversations(gateway.address).await?;
            let (asked, had) = cached(&servers).await?;
            let [p50, p99] = [0.5, 0.99].map(|part| ms(quantile(&mut firsts, part)));
            let (count, hits) = (firsts.len(), 100.0 * had / asked);
            println!("  {balance}: {count} answers, first token p50 {p50:.0} ms p99 {p99:.0} ms, hits {hits:.1} %");
        }
        Ok(())
    }

    /// The first tokens of requests that follow each other as fast as they are answered.
    async fn conversations(&self, gateway: SocketAddr) -> Result<Vec<Duration>, Failure> {
        let (next, end) = (Arc::new(AtomicUsize::new(0)), Instant::now() + self.time);
        let mut asking = JoinSet::new();
        for _ in 0..AT_ONCE {
            let next = Arc::clone(&next);
            asking.spawn(async move {
                let mut firsts = Vec::new();
                while Instant::now() < end {
                    let request = question(next.fetch_add(1, Ordering::Relaxed));
                    firsts.push(ask(gateway, &request).await.map_err(|failure| failure.to_string())?.first);
                }
                Ok::<_, String>(firsts)
            });
        }
        let mut firsts = Vec::new();
        while let Some(asked) = asking.join_next().await {
            firsts.extend(asked??);
        }
        Ok(firsts)
    }
}

/// Engines say how much they keep.
const ASKS: &str = "balance: expected_time, load: {metrics_ms: 1000}";

/// The n-th request: one of the beginnings, and a question of its own.
fn question(n: usize) -> Bytes {
    // No pattern that taking turns could meet by chance.
    let which = (n.wrapping_mul(2_654_435_761) >> 9) % BEGINNINGS;
    let system = format!("{which:03} be brief. ").repeat(8_000 / 14);
    let body = format!(
        r#"{{"messages":[{{"role":"system","content":"{system}"}},{{"role":"user","content":"and question {n}?"}}],"model":"load-model","stream":true,"max_tokens":20}}"#
    );
    prompt::request(&body.into(), "connection: close\r\n")
}

/// Prompt tokens that servers were asked to read, and how many of them they had.
async fn cached(servers: &[Running]) -> Result<(f64, f64), Failure> {
    let mut sums = [0.0, 0.0];
    for server in servers {
        let page = wire::get(server.address, "/metrics").await?;
        for (sum, name) in sums.iter_mut().zip(["vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total"]) {
            let line = page.lines().find(|line| line.starts_with(name)).ok_or_else(|| format!("no {name}"))?;
            *sum += line.rsplit(' ').next().unwrap_or_default().parse::<f64>()?;
        }
    }
    Ok(sums.into())
}

// Long prompts.

/// llm-d's published shape: 220 KB of prompt on each of 200 streams, each a conversation of its own.
const LONG: Load = Load {
    connections: 200,
    bytes: 220 << 10,
    answer: Answer::Stream { events: 10, interval: Duration::ZERO },
    apart: true,
    ..PLAIN
};

impl Bench {
    async fn long(&self) -> Result<(), Failure> {
        let servers = (0..4).map(|_| self.stage.upstream()).collect::<Result<Vec<_>, _>>()?;
        println!("220 KB on each of 200 streams, four servers that answer at once:");
        let bare = self.stage.bare(servers[0].address, false)?;
        self.long_through("bare, to one of them", &bare).await?;
        for balance in ["round_robin", "expected_time"] {
            let policy = policy(&addresses(&servers), &format!("balance: {balance}"));
            let gateway = self.stage.gateway_on(&self.program, "gateway", &policy, SETTINGS)?;
            self.long_through(balance, &gateway).await?;
        }
        Ok(())
    }

    async fn long_through(&self, name: &str, proxy: &Running) -> Result<(), Failure> {
        let mut client = Client::new(LONG, proxy.address);
        right(client.run(Stop::when(self.time / 10)).await)?;
        let before = cpu::time(proxy.pid())?;
        let mut seen: Seen = right(client.run(Stop::when(self.time)).await)?;
        let spent = (cpu::time(proxy.pid())? - before).as_secs_f64() * 1e6 / seen.requests as f64;
        let rate = seen.requests as f64 / seen.wall.as_secs_f64();
        let [p50, p99] = [0.5, 0.99].map(|part| ms(quantile(&mut seen.first_events, part)));
        println!(
            "  {name}: {rate:.0} requests/s, first token p50 {p50:.0} ms p99 {p99:.0} ms, {spent:.0} µs of CPU each"
        );
        Ok(())
    }
}

// With nothing to do.

/// How many upstreams there are: one process at as many addresses of this machine.
const IDLE: u8 = 100;

impl Bench {
    async fn idle(&self) -> Result<(), Failure> {
        let server = self.stage.simulated(&self.program, Ipv4Addr::UNSPECIFIED, &[])?;
        let port = server.address.port();
        let upstreams: Vec<SocketAddr> =
            (1..=IDLE).map(|n| SocketAddr::from((Ipv4Addr::new(127, 0, 0, n), port))).collect();
        println!("{IDLE} upstreams with nothing to do, asked for their health once a second:");
        for (name, more) in [
            ("p2c", "balance: p2c"),
            ("expected_time, /metrics each second", "balance: expected_time, load: {metrics_ms: 1000}"),
        ] {
            let gateway = self.stage.gateway_on(&self.program, "gateway", &policy(&upstreams, more), SETTINGS)?;
            for (load, pause) in [("no request", None), ("one request a second", Some(Duration::from_secs(1)))] {
                let share = self.share(&gateway, pause).await?;
                println!("  {name}, {load}: {:.2} % of a core", share * 100.0);
            }
        }
        Ok(())
    }

    /// The share of a core that a gateway takes, user and system, of all its threads.
    async fn share(&self, gateway: &Running, pause: Option<Duration>) -> Result<f64, Failure> {
        let request = prompt::request(&PLAIN.body(), "connection: close\r\n");
        tokio::time::sleep(Duration::from_secs(2)).await;
        let (began, before) = (Instant::now(), cpu::ticks(gateway.pid())?);
        while began.elapsed() < self.time {
            if pause.is_some() {
                ask(gateway.address, &request).await?;
            }
            tokio::time::sleep(pause.unwrap_or(self.time)).await;
        }
        Ok((cpu::ticks(gateway.pid())? - before).as_secs_f64() / began.elapsed().as_secs_f64())
    }
}

// Disturbed by one.

/// Requests a second, and how long an answer takes: the servers have room for many times as many.
const RATE: u32 = 400;
const ANSWER: Duration = Duration::from_millis(25);
/// A turn without the disturbance, and one with it, are a round.
const TURN: Duration = Duration::from_secs(2);

/// What the fourth of four servers does.
enum Deed {
    /// The policy names these instead.
    Policy(&'static str, Vec<SocketAddr>),
    /// It is stopped where it is.
    Freezes,
    /// Nothing: what the method itself shows.
    Nothing,
}

impl Deed {
    fn name(&self) -> &'static str {
        match self {
            Self::Policy(name, _) => name,
            Self::Freezes => "freezes",
            Self::Nothing => "does nothing",
        }
    }
}

impl Bench {
    async fn disturbed(&self) -> Result<(), Failure> {
        let servers = (0..5).map(|_| self.stage.upstream()).collect::<Result<Vec<_>, _>>()?;
        let liar = |claim| self.stage.upstream_that(&["--claims", claim]);
        let (idle, full) = (liar("idle")?, liar("full")?);
        let all = addresses(&servers);
        let instead = |liar: &Running| [&all[..3], &[liar.address]].concat();
        println!(
            "one of four, {RATE} requests a second of {} ms each; p99 of the others' whole answers:",
            ANSWER.as_millis()
        );
        let scene = Scene { bench: self, usual: all[..4].to_vec(), fourth: &servers[3], others: all[..3].to_vec() };
        for deed in [
            Deed::Nothing,
            Deed::Policy("leaves", all[..3].to_vec()),
            Deed::Policy("is joined by a fifth", all.clone()),
            Deed::Policy("claims to be idle", instead(&idle)),
            Deed::Policy("claims to be full", instead(&full)),
            Deed::Freezes,
        ] {
            let rounds = scene.rounds(&deed).await?;
            let figures = Figures::of_rounds(&rounds);
            let (ratio, doubt) = (figures.ratio().unwrap_or(f64::NAN), figures.doubt().unwrap_or(f64::NAN));
            let [without, with] = [figures.bare, figures.gateway];
            println!("  {}: {without:.2} ms without, {with:.2} ms with, ratio {ratio:.3} ± {doubt:.3}", deed.name());
        }
        Ok(())
    }
}

/// Four servers and whoever disturbs them.
struct Scene<'a> {
    bench: &'a Bench,
    usual: Vec<SocketAddr>,
    fourth: &'a Running,
    others: Vec<SocketAddr>,
}

const GATEWAY: &str = "gateway";
const CHOOSING: &str = "balance: expected_time, load: {metrics_ms: 500}";

impl Scene<'_> {
    /// The others' p99 without and with the deed, in milliseconds, a pair a round. Every other round begins with it.
    async fn rounds(&self, deed: &Deed) -> Result<Vec<(f64, f64)>, Failure> {
        let (stage, program) = (&self.bench.stage, &self.bench.program);
        let gateway = stage.gateway_on(program, GATEWAY, &policy(&self.usual, CHOOSING), SETTINGS)?;
        self.turn(gateway.address, &Deed::Nothing).await?;
        let mut rounds = Vec::new();
        let count = (self.bench.time.as_secs() / (2 * TURN.as_secs())).max(5);
        for round in 0..count {
            let pair = match round % 2 {
                0 => {
                    let without = self.turn(gateway.address, &Deed::Nothing).await?;
                    (without, self.turn(gateway.address, deed).await?)
                }
                _ => {
                    let with = self.turn(gateway.address, deed).await?;
                    (self.turn(gateway.address, &Deed::Nothing).await?, with)
                }
            };
            rounds.push(pair);
        }
        Ok(rounds)
    }

    /// Requests at a steady rate, the deed from the first quarter of them to the last.
    async fn turn(&self, gateway: SocketAddr, deed: &Deed) -> Result<f64, Failure> {
        let lines = format!("connection: close\r\nx-load-events: 2\r\nx-load-interval-us: {}\r\n", ANSWER.as_micros());
        let request =
            prompt::request(&Load { answer: Answer::Stream { events: 2, interval: ANSWER }, ..PLAIN }.body(), &lines);
        let count = RATE * TURN.as_secs() as u32;
        let mut ticks = tokio::time::interval(TURN / count);
        let mut asking = JoinSet::new();
        for n in 0..count {
            if n == count / 4 {
                self.begins(deed)?;
            }
            ticks.tick().await;
            let request = request.clone();
            asking.spawn(async move {
                let began = Instant::now();
                let heard = ask(gateway, &request).await.map_err(|failure| failure.to_string())?;
                Ok::<_, String>((heard, began.elapsed()))
            });
        }
        self.ends(deed)?;
        let others: Vec<String> = self.others.iter().map(SocketAddr::to_string).collect();
        let mut took = Vec::new();
        while let Some(asked) = asking.join_next().await {
            let (heard, whole) = asked??;
            // What had to be asked twice was another's before.
            if heard.attempts == 1 && others.contains(&heard.upstream) {
                took.push(whole);
            }
        }
        tokio::time::sleep(TURN / 4).await;
        Ok(ms(quantile(&mut took, 0.99)))
    }

    fn begins(&self, deed: &Deed) -> Result<(), Failure> {
        match deed {
            Deed::Policy(_, upstreams) => self.names(upstreams),
            Deed::Freezes => self.fourth.signal("STOP"),
            Deed::Nothing => Ok(()),
        }
    }

    fn ends(&self, deed: &Deed) -> Result<(), Failure> {
        match deed {
            Deed::Policy(..) => self.names(&self.usual),
            Deed::Freezes => self.fourth.signal("CONT"),
            Deed::Nothing => Ok(()),
        }
    }

    fn names(&self, upstreams: &[SocketAddr]) -> Result<(), Failure> {
        self.bench.stage.rewrite(GATEWAY, &policy(upstreams, CHOOSING)).map(drop)
    }
}
