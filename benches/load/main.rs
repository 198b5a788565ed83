//! What the gateway costs: a load generator, a fast fake model server and a bare Pingora
//! pass-through, run side by side by one command that prints one table (see README.md).

mod bare;
mod children;
mod client;
mod compare;
mod cpu;
mod h2c;
mod memory;
mod plot;
mod prompt;
mod replicas;
mod report;
mod soak;
mod train;
mod upstream;
mod wire;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Whatever goes wrong here is for the person at the terminal: a sentence is enough.
type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Measures the gateway against a bare Pingora pass-through.
#[derive(Parser)]
#[command(name = "load", version, args_conflicts_with_subcommands = true)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    compare: compare::Options,
}

#[derive(Subcommand)]
enum Command {
    /// Run every case through the gateway and the bare proxy and print the table (the default)
    Compare(compare::Options),
    /// The fast fake model server
    Upstream(upstream::Options),
    /// The yardstick: a ProxyHttp with nothing but upstream_peer
    Bare(bare::Options),
    /// The closed-loop client alone
    Client(client::Options),
    /// An hour of everything at once: does what it holds stay as it is?
    Soak(soak::Options),
    /// Several replicas behind one gateway
    Replicas(replicas::Options),
    /// A little of every load, for a build that is guided by a profile
    Train(train::Options),
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let outcome = match arguments.command {
        None => compare::command(arguments.compare),
        Some(Command::Compare(options)) => compare::command(options),
        Some(Command::Upstream(options)) => upstream::command(&options),
        Some(Command::Bare(options)) => bare::command(&options),
        Some(Command::Client(options)) => client::command(&options),
        Some(Command::Soak(options)) => soak::command(&options),
        Some(Command::Replicas(options)) => replicas::command(&options),
        Some(Command::Train(options)) => train::command(&options),
    };
    outcome.unwrap_or_else(|failure| {
        eprintln!("load: {failure}");
        ExitCode::FAILURE
    })
}

/// One thread is all the load side ever uses: it shares one core.
fn on_one_thread<T>(work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(work)
}
