//! An hour of everything at once: keys, tenants, models, users, upstreams and policies that come and go, at half of what
//! the gateway can do. What it holds must not grow, what it wrote must be whole, and nothing must go wrong that was not
//! provoked.

mod mix;
mod samples;
mod verdict;
mod world;

use self::mix::{Client, Tally};
use self::samples::{Samples, Watch};
use self::verdict::{Evidence, Verdict};
use self::world::World;
use crate::children::Stage;
use crate::cpu;
use crate::{Failure, compare, on_one_thread};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Options of `load soak`.
#[derive(clap::Args)]
pub struct Options {
    /// The gateway's binary [default: `infergate` beside this one, built if it is missing]
    #[arg(long, value_name = "PATH")]
    gateway: Option<PathBuf>,
    /// How long the paced part takes
    #[arg(long, default_value_t = 60.0)]
    minutes: f64,
    /// One minute: does everything work?
    #[arg(long)]
    quick: bool,
    /// Requests a second, instead of half of what was found
    #[arg(long)]
    rate: Option<f64>,
    /// Write every sample and the verdict into a file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// How long the closed loop runs that finds the full rate, as a share of the whole, at most.
const FINDING: Duration = Duration::from_secs(30);

/// Runs it and prints the verdict; the exit code is 1 if a promise was broken.
pub fn command(options: &Options) -> Result<ExitCode, Failure> {
    let program = compare::gateway(options.gateway.as_ref())?;
    let (cores, _) = cpu::take_the_load_side()?;
    let minutes = if options.quick { 1.0 } else { options.minutes };
    let time = Duration::from_secs_f64(minutes * 60.0);
    let stage = Stage::new(cores)?;
    let verdict = on_one_thread(soak(&stage, program, time, options.rate))?;
    print!("{verdict}");
    if let Some(file) = &options.json {
        std::fs::write(file, format!("{:#}\n", verdict.json()))?;
    }
    Ok(match verdict.broken() {
        0 => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    })
}

async fn soak(stage: &Stage, program: PathBuf, time: Duration, rate: Option<f64>) -> Result<Verdict, Failure> {
    let mut world = World::begin(stage, program).await?;
    let client = Client::new(world.gateway.address, world.names());
    let full = full_rate(&client, FINDING.min(time / 10)).await?;
    let half = rate.unwrap_or(full / 2.0);
    eprintln!("{full:.0} requests a second in a closed loop; {half:.0} a second from now on, for {time:.0?}");
    let (tally, samples) = paced(&mut world, &client, half, time).await?;
    eprintln!("the load is over; the journal and the ledger are looked at");
    let evidence = Evidence::gather(world, tally).await?;
    Ok(Verdict::of(evidence, samples, [full, half]))
}

/// Requests a second, one after the other on as many connections as it takes.
async fn full_rate(client: &Client, time: Duration) -> Result<f64, Failure> {
    let began = Instant::now();
    let done = client.closed_loop(began + time).await?;
    Ok(done as f64 / began.elapsed().as_secs_f64())
}

/// The long part: requests come when they come, the world turns, and somebody looks at the gateway.
async fn paced(world: &mut World<'_>, client: &Client, rate: f64, time: Duration) -> Result<(Tally, Samples), Failure> {
    let end = Instant::now() + time;
    let watch = Watch::new(world.gateway.pid(), world.admin()?, time);
    let (turned, samples, ()) =
        tokio::try_join!(world.turn_until(end, client), watch.until(end, client), client.open_loop(rate, end))?;
    let mut tally = client.take_tally();
    tally.turns = turned;
    Ok((tally, samples))
}
