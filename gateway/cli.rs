//! The command line: one file a subcommand.

mod audit;
mod check;
mod explain;
mod guard;
mod import;
mod key;
mod prices;
mod reference;
mod route;
mod schema;
mod serve;
mod simulate;
mod usage;

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use crate::audit::story::counted;
use crate::logging::{self, Levels};

/// An inference gateway: one process between your applications and your model servers.
#[derive(Parser)]
#[command(name = "infergate", version, max_term_width = 110, args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    serve: serve::Serve,
}

#[derive(Subcommand)]
enum Command {
    /// Serve requests (the default)
    Serve(serve::Serve),
    /// Check policy or settings files: prints every problem with its line, exits with 1 if there is one
    Check(check::Check),
    /// Read the audit journal: prove it, look for lines in it
    Audit(audit::Audit),
    /// Tell what happened to a request
    Explain(explain::Explain),
    /// Try guardrails on a text, or measure them on labelled ones
    Guard(guard::Guard),
    /// Make a policy of another gateway's configuration
    Import(import::Import),
    /// Make API keys, tell whose a key is
    Key(key::Key),
    /// Check a file of prices, or make one
    Prices(prices::Prices),
    /// Tell what was used and what it cost, by tenant, model, principal, day or hour
    Usage(Box<usage::Usage>),
    /// Tell which model a prompt gets and why, or how well routes do on labelled prompts
    Route(route::Route),
    /// Print the JSON Schema of the policy
    Schema(schema::Schema),
    /// Print the reference of the policy as Markdown
    Reference(reference::Reference),
    /// Run the embedded model server alone: a stand-in for vLLM, TGI, SGLang or OpenAI
    Simulate(simulate::Simulate),
}

/// How much is logged, and how.
#[derive(Args, Clone)]
struct Logging {
    /// What is logged: error, warn, info, debug, trace, or by module (infergate=debug,pingora=warn)
    #[arg(long, env = "INFERGATE_LOG", default_value = "info", value_name = "LEVELS")]
    log: String,
    /// Log JSON lines; the default where the log does not go to a terminal
    #[arg(long, env = "INFERGATE_LOG_JSON")]
    log_json: bool,
}

/// Runs the command line of this process.
pub fn run() -> ExitCode {
    let cli = Cli::parse();
    let done = match cli.command.unwrap_or(Command::Serve(cli.serve)) {
        Command::Serve(serve) => serve.run(),
        Command::Check(check) => check.run(),
        Command::Audit(audit) => audit.run(),
        Command::Explain(explain) => explain.run(),
        Command::Guard(guard) => guard.run(),
        Command::Import(import) => import.run(),
        Command::Key(key) => key.run(),
        Command::Prices(prices) => prices.run(),
        Command::Route(route) => route.run(),
        Command::Schema(schema) => schema.run(),
        Command::Reference(reference) => reference.run(),
        Command::Simulate(simulate) => simulate.run(),
        Command::Usage(usage) => usage.run(),
    };
    match done {
        Ok(code) => code,
        Err(message) => {
            eprintln!("infergate: {message}");
            ExitCode::FAILURE
        }
    }
}

impl Logging {
    /// Sends logs to the standard error, readable on a terminal and as JSON lines elsewhere.
    fn start(&self) -> Result<Levels, String> {
        let json = self.log_json || !std::io::stderr().is_terminal();
        logging::start(&self.log, json).map_err(|error| format!("--log {}: {error}; try --log info", self.log))
    }
}
