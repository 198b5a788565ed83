//! `infergate import`: another gateway's configuration becomes a policy, and a report of what became of each key.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Subcommand};
use serde_json::json;

use crate::import::{self, BYTES_MAX, Finding, Imported, Outcome};
use crate::policy::problem::Problem;

/// Make a policy of another gateway's configuration.
#[derive(Args)]
pub(super) struct Import {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Make a policy of LiteLLM's config.yaml: the policy on the standard output, what became of each key on the standard
    /// error
    Litellm(Litellm),
}

#[derive(Args)]
struct Litellm {
    /// LiteLLM's file
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Write the policy to this file, which must not be there yet
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Tell the findings as JSON, one object a line
    #[arg(long)]
    json: bool,
    /// Exit with 1 if anything in the file is not supported
    #[arg(long)]
    strict: bool,
}

impl Import {
    pub(super) fn run(self) -> Result<ExitCode, String> {
        match self.command {
            Command::Litellm(litellm) => litellm.run(),
        }
    }
}

impl Litellm {
    fn run(self) -> Result<ExitCode, String> {
        let name = self.file.display().to_string();
        let env = |name: &str| std::env::var(name).ok();
        let imported = import::litellm(&read(&self.file)?, &env).map_err(|problem| told(&name, &problem))?;
        match &self.out {
            Some(out) => write(out, &imported.policy)?,
            None => print!("{}", imported.policy),
        }
        for finding in &imported.findings {
            self.tell(&name, finding);
        }
        let [taken, changed, not_supported] =
            [Outcome::Taken, Outcome::Changed, Outcome::NotSupported].map(|outcome| count(&imported, outcome));
        if !self.json {
            eprintln!("{name}: {taken} taken, {changed} changed, {not_supported} not supported");
        }
        Ok(if self.strict && not_supported > 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS })
    }

    fn tell(&self, name: &str, finding: &Finding) {
        let Problem { place, path, message } = &finding.problem;
        let outcome = finding.outcome.name();
        if !self.json {
            let place = place.map(|(line, column)| format!("{line}:{column}: ")).unwrap_or_default();
            return eprintln!("{name}:{place}{outcome}: {path}: {message}");
        }
        let (line, column) = place.unzip();
        let told =
            json!({"file": name, "line": line, "column": column, "key": path, "outcome": outcome, "message": message});
        eprintln!("{told}");
    }
}

fn count(imported: &Imported, outcome: Outcome) -> usize {
    imported.findings.iter().filter(|finding| finding.outcome == outcome).count()
}

/// The file's text; no more of it than can be a configuration.
fn read(path: &Path) -> Result<String, String> {
    let wrong = |error: std::io::Error| format!("{} cannot be read: {error}", path.display());
    let mut text = String::new();
    let file = std::fs::File::open(path).map_err(wrong)?;
    file.take(BYTES_MAX as u64 + 1).read_to_string(&mut text).map_err(wrong)?;
    Ok(text)
}

/// Nothing is overwritten: what is in force may lie there.
fn write(path: &Path, text: &str) -> Result<(), String> {
    let file = std::fs::OpenOptions::new().write(true).create_new(true).open(path);
    let written = file.and_then(|mut file| std::io::Write::write_all(&mut file, text.as_bytes()));
    written.map_err(|error| format!("{} cannot be written: {error}", path.display()))
}

fn told(name: &str, problem: &Problem) -> String {
    format!("{name}:{problem}")
}
