//! `infergate check`: is this file good, and if not, what is all that is wrong with it?

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, ValueEnum};
use serde_json::json;

use super::counted;
use crate::policy::problem::Problem;
use crate::policy::{Problems, World, load};
use crate::settings::Settings;
use crate::state::State;
use crate::telemetry::Telemetry;

/// Check files.
#[derive(Args)]
pub(super) struct Check {
    /// The files
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// What the files are
    #[arg(long, value_enum, default_value_t = Kind::Policy)]
    kind: Kind,
    /// Do not insist that the environment variables and files with secrets are there
    #[arg(long)]
    without_secrets: bool,
    /// Print the problems as JSON, one object a line
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Kind {
    Policy,
    Settings,
}

impl Check {
    pub(super) fn run(self) -> Result<ExitCode, String> {
        let mut good = true;
        for file in &self.files {
            let name = file.display().to_string();
            let found = match self.kind {
                Kind::Policy => self.policy(file),
                Kind::Settings => Settings::load(file)
                    .map(|settings| (counted(settings.listeners.len() as u64, "listener"), Problems(Vec::new()))),
            };
            match found {
                Ok((summary, warnings)) => {
                    self.tell_all(&name, &warnings, "warning");
                    self.praise(&name, &summary);
                }
                Err(problems) => {
                    good = false;
                    self.tell(&name, &problems);
                }
            }
        }
        Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }

    fn policy(&self, file: &std::path::Path) -> Result<(String, Problems), Problems> {
        let (state, telemetry) = (State::new(0), Telemetry::new());
        let strict = |name: &str| std::env::var(name).ok();
        let lenient = |name: &str| std::env::var(name).ok().or_else(|| Some("unknown".to_owned()));
        let env: &dyn Fn(&str) -> Option<String> = if self.without_secrets { &lenient } else { &strict };
        let world = World {
            env,
            state: &state,
            telemetry: &telemetry,
            zone: None,
            now: std::time::Instant::now(),
            secret_files: !self.without_secrets,
        };
        let policy = load(file, &world)?;
        let upstreams: usize = policy.pools.values().map(|pool| pool.upstreams.len()).sum();
        let summary = format!(
            "{}, {}, {}, hash {}",
            counted(policy.listed().len() as u64, "model"),
            counted(policy.pools.len() as u64, "pool"),
            counted(upstreams as u64, "upstream"),
            &policy.hash[..12]
        );
        Ok((summary, Problems(policy.warnings)))
    }

    fn praise(&self, name: &str, summary: &str) {
        match self.json {
            true => println!("{}", json!({"file": name, "ok": true, "summary": summary})),
            false => println!("{name}: good ({summary})"),
        }
    }

    fn tell(&self, name: &str, problems: &Problems) {
        self.tell_all(name, problems, "message");
        if !self.json {
            println!("{name}: {} to mend", counted(problems.0.len() as u64, "problem"));
        }
    }

    /// Each on a line of its own: what must be mended is a `message`, what only might be a `warning`.
    fn tell_all(&self, name: &str, problems: &Problems, word: &str) {
        if !self.json {
            let mark = if word == "warning" { "warning: " } else { "" };
            return problems.lines(name).into_iter().for_each(|line| println!("{mark}{line}"));
        }
        for Problem { place, path, message } in &problems.0 {
            let (line, column) = place.unzip();
            println!("{}", json!({"file": name, "line": line, "column": column, "key": path, word: message}));
        }
    }
}
