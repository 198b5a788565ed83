//! What a build that is guided by a profile learns from: a little of every load, through a gateway that takes notes
//! (`-Cprofile-generate`) and writes them down when it is told to end.

use crate::children::{Besides, Running, Stage};
use crate::client::{Answer, Client, Load, Stop, Transport};
use crate::compare::{self, PLAIN};
use crate::prompt::Turns;
use crate::{Failure, cpu, on_one_thread};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// Options of `load train`.
#[derive(clap::Args)]
pub struct Options {
    /// The gateway's binary, built to take notes
    #[arg(long, value_name = "PATH")]
    gateway: PathBuf,
}

/// What the gateway does, one after the other: alone, each part of it counts as much as all of it together.
const BESIDES: [Besides; 5] =
    [Besides::Nothing, Besides::Evidence, Besides::Limits, Besides::Guards, Besides::Everything];

/// What it is asked, and how often.
const LOADS: [(Load, u64); 9] = [
    (PLAIN, 20_000),
    (Load { bytes: 16 << 10, ..PLAIN }, 5_000),
    (Load { bytes: 16 << 10, turns: Turns::Many, ..PLAIN }, 2_000),
    (Load { bytes: 100 << 10, ..PLAIN }, 500),
    (Load { bytes: 1 << 20, ..PLAIN }, 50),
    (Load { answer: stream(0), ..PLAIN }, 300),
    (Load { answer: stream(1_000), ..PLAIN }, 100),
    (Load { transport: Transport::Fresh, ..PLAIN }, 2_000),
    (Load { transport: Transport::Http2, ..PLAIN }, 3_000),
];

const fn stream(interval_us: u64) -> Answer {
    Answer::Stream { events: 100, interval: Duration::from_micros(interval_us) }
}

/// Runs the loads and waits until the gateway has written down what it saw.
pub fn command(options: &Options) -> Result<ExitCode, Failure> {
    let (gateway, stage) = (compare::gateway(Some(&options.gateway))?, Stage::new(None)?);
    cpu::raise_open_files()?;
    let upstream = stage.upstream()?;
    for besides in BESIDES {
        let mut running = stage.gateway(&gateway, upstream.address, besides)?;
        eprintln!("{} …", running.name);
        LOADS.into_iter().try_for_each(|(load, requests)| asks(&running, load, requests))?;
        let ended = running.end()?;
        if !ended.success() {
            return Err(format!("{} ended with {ended}:\n{}", running.name, running.last_words()).into());
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn asks(running: &Running, load: Load, requests: u64) -> Result<(), Failure> {
    let seen = on_one_thread(Client::new(load, running.address).run(Stop::after(requests)))?;
    match seen.errors {
        0 => Ok(()),
        errors => Err(format!("{} gave {errors} wrong answers:\n{}", running.name, running.last_words()).into()),
    }
}
