//! Replicas that only exist in time: traces of requests, engines that read, write, cache and evict, and whoever chooses
//! among them. One command prints a table of all ways of choosing, and where ours is not the best.

mod choice;
mod engine;
mod report;
mod rivals;
mod run;
mod trace;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, ValueEnum};

use self::choice::Kind as Chooser;
use self::engine::Speed;
use self::report::Row;
use self::trace::{Kind, Session, Turn};

/// Whatever goes wrong here is for the person at the terminal: a sentence is enough.
type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Compares ways of choosing a replica, on engines that are simulated step by step.
#[derive(Parser)]
#[command(name = "fleet", version)]
struct Options {
    /// What is asked for; all of them if none is named.
    #[arg(long = "trace", value_enum)]
    traces: Vec<Kind>,
    /// A trace in Mooncake's format (JSON lines) instead of those that are made up.
    #[arg(long, value_name = "FILE", conflicts_with = "traces")]
    mooncake: Option<PathBuf>,
    /// How many times faster its requests come than its timestamps say.
    #[arg(long, default_value_t = 1.0)]
    faster: f64,
    /// The work that comes, as a share of what the engines can do if nothing is ever found in a cache.
    #[arg(long = "load", default_values_t = [0.5, 0.8, 1.1])]
    loads: Vec<f64>,
    /// What the made-up traces and all chance begin with; each is a run.
    #[arg(long = "seed", default_values_t = [1, 2, 3])]
    seeds: Vec<u64>,
    /// How many engines there are.
    #[arg(long, default_value_t = 8)]
    engines: usize,
    /// Every other engine has a third of the speed.
    #[arg(long)]
    uneven: bool,
    /// How many seconds requests come for.
    #[arg(long, default_value_t = 120.0)]
    seconds: f64,
    /// Prints every run as a line of JSON instead of the table.
    #[arg(long)]
    json: bool,
}

/// How slow the slow ones are.
const SLOW: f64 = 1.0 / 3.0;

fn main() -> ExitCode {
    compare(&Options::parse()).map_or_else(
        |failure| {
            eprintln!("fleet: {failure}");
            ExitCode::FAILURE
        },
        |()| ExitCode::SUCCESS,
    )
}

impl Options {
    fn speeds(&self) -> Vec<Speed> {
        let factor = |engine: usize| if self.uneven && engine % 2 == 1 { SLOW } else { 1.0 };
        (0..self.engines.max(1)).map(|engine| Speed::times(factor(engine))).collect()
    }

    /// Full engines that they amount to.
    fn amount(&self) -> f64 {
        let slow = if self.uneven { self.engines / 2 } else { 0 } as f64;
        self.engines as f64 - slow * (1.0 - SLOW)
    }
}

fn compare(options: &Options) -> Result<(), Failure> {
    let mut rows = Vec::new();
    if let Some(path) = &options.mooncake {
        let most = (options.speeds()[0].blocks as u32 * engine::BLOCK) / 2;
        let (sessions, left_out) = trace::mooncake(path, options.faster, most)?;
        eprintln!("fleet: {} requests, {left_out} with more than {most} tokens left out", sessions.len());
        options.seeds.iter().for_each(|seed| rows.extend(runs(options, "mooncake", options.faster, *seed, &sessions)));
    }
    let all = Kind::value_variants();
    let traces = if options.traces.is_empty() { all } else { &options.traces };
    for kind in traces.iter().filter(|_| options.mooncake.is_none()) {
        for load in &options.loads {
            for seed in &options.seeds {
                let work = |turn: &Turn| Speed::times(1.0).seconds_of(turn);
                let sessions = trace::make(*kind, load * options.amount(), options.seconds, *seed, work);
                rows.extend(runs(options, &kind.name(), *load, *seed, &sessions));
            }
        }
    }
    if options.json {
        rows.iter().try_for_each(|row| serde_json::to_string(row).map(|line| println!("{line}")))?;
        return Ok(());
    }
    println!("{}", report::markdown(&rows, &Chooser::ALL));
    let losses = report::losses(&rows, &Chooser::ALL);
    println!("Where {} is not the best ({}):\n", Chooser::OURS.name(), losses.len());
    losses.iter().for_each(|line| println!("- {line}"));
    Ok(())
}

/// Everybody's run of the same sessions.
fn runs(options: &Options, trace: &str, load: f64, seed: u64, sessions: &[Session]) -> Vec<Row> {
    let speeds = options.speeds();
    let one = |chooser: Chooser| {
        let outcome = run::run(sessions, &speeds, &mut *chooser.begin(&speeds, seed), options.seconds);
        Row { trace: trace.to_owned(), load, seed, chooser, outcome }
    };
    Chooser::ALL.into_iter().map(one).collect()
}
