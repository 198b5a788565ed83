//! `infergate prices`: check a file of prices, or make one.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Subcommand};

use super::counted;
use crate::money::import;
use crate::policy::prices;

/// Check a file of prices, or make one.
#[derive(Args)]
pub(super) struct Prices {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Check files of prices: prints every problem with its line, exits with 1 if there is one
    Check(Check),
    /// Make a file of prices from LiteLLM's model_prices_and_context_window.json: the file on the standard output, what
    /// could not be taken over on the standard error
    Import(Import),
}

#[derive(Args)]
struct Check {
    /// The files
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
}

#[derive(Args)]
struct Import {
    /// LiteLLM's file
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Only the models of this vendor, by LiteLLM's name for it (`litellm_provider`); may be given more than once
    #[arg(long, value_name = "VENDOR")]
    only: Vec<String>,
}

impl Prices {
    pub(super) fn run(self) -> Result<ExitCode, String> {
        match self.command {
            Command::Check(check) => check.run(),
            Command::Import(import) => import.run(),
        }
    }
}

impl Check {
    fn run(self) -> Result<ExitCode, String> {
        let mut good = true;
        for file in &self.files {
            let name = file.display();
            match prices::book(&read(file)?) {
                Ok(book) => println!("{name}: good ({}, version {})", counted(book.len() as u64, "name"), book.version),
                Err(problems) => {
                    good = false;
                    problems.lines(&name.to_string()).iter().for_each(|line| println!("{line}"));
                }
            }
        }
        Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

impl Import {
    fn run(self) -> Result<ExitCode, String> {
        let imported = import::litellm(&read(&self.file)?, &self.only)
            .map_err(|wrong| format!("{}: {wrong}", self.file.display()))?;
        let text = import::yaml(&imported.prices);
        prices::book(&text).map_err(|problems| problems.lines("what was made").join("\n"))?;
        println!(
            "# yaml-language-server: $schema=prices.schema.json\n#\n# Made by `infergate prices import`. US dollars."
        );
        print!("{text}");
        for finding in &imported.findings {
            eprintln!("{finding}");
        }
        let (prices, findings) = (imported.prices.len() as u64, imported.findings.len() as u64);
        eprintln!("{}, {}", counted(prices, "price"), counted(findings, "finding"));
        Ok(ExitCode::SUCCESS)
    }
}

fn read(file: &Path) -> Result<String, String> {
    std::fs::read_to_string(file).map_err(|error| format!("{} cannot be read: {error}", file.display()))
}
