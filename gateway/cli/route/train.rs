//! `infergate route train`: a difficulty score from labelled prompts, and what it is worth.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use infergate_plugins::router::difficulty::Labelled;
use infergate_plugins::router::difficulty::train::{ENOUGH, Figures, Training};
use infergate_plugins::router::evaluation;
use serde_json::{Value, json};

#[derive(Args)]
pub(super) struct Train {
    /// The labelled prompts
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Write the score here, for `difficulty.trained` in the policy
    #[arg(long, value_name = "FILE")]
    into: Option<PathBuf>,
    /// The share of prompts for the strong model, from 0 to 1
    #[arg(long, value_name = "SHARE", default_value_t = 0.5, value_parser = share)]
    strong_share: f32,
    /// Go by the twelve counters alone, and not by what prompts are about
    #[arg(long)]
    counters_only: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

fn share(text: &str) -> Result<f32, String> {
    let share = text.parse().ok().filter(|share| (0.0..=1.0).contains(share));
    share.ok_or_else(|| "must be a number from 0 to 1".to_owned())
}

impl Train {
    pub(super) fn run(self) -> Result<ExitCode, String> {
        let file = self.file.display();
        let lines = std::fs::read_to_string(&self.file).map_err(|error| format!("{file} cannot be read: {error}"))?;
        let prompts: Vec<Labelled> = evaluation::rows(&lines).map_err(|wrong| format!("{file}: {wrong}"))?;
        let found = Training::of(&prompts, !self.counters_only, self.strong_share);
        let found = found.map_err(|wrong| format!("{file}: {wrong}"))?;
        if let Some(into) = &self.into {
            let text = serde_json::to_string(&found.difficulty).map_err(|error| error.to_string())? + "\n";
            std::fs::write(into, text).map_err(|error| format!("{} cannot be written: {error}", into.display()))?;
        }
        if self.json {
            println!("{}", self.measured(&found));
        } else {
            print!("{}", self.report(&found));
        }
        Ok(ExitCode::SUCCESS)
    }

    fn measured(&self, found: &Training) -> Value {
        let figures = |of: &Figures| json!({"auroc": of.auroc, "apgr": of.recovered});
        json!({
            "prompts": found.prompts, "weak_right": found.right.0, "strong_right": found.right.1,
            "held_out": figures(&found.held_out), "by_length": figures(&found.by_length),
            "chance": {"auroc": 0.5, "apgr": 0.5, "apgr_deviation": found.chance},
            "strong_share": self.strong_share, "threshold": found.threshold,
            "at_threshold": {"strong_share": found.at_threshold.0, "right": found.at_threshold.1},
            "into": self.into,
        })
    }

    /// The same for people, with what to write into the policy.
    fn report(&self, found: &Training) -> String {
        let percent = |share: f64| 100.0 * share;
        let (weak, strong) = found.right;
        let mut told = format!(
            "{} prompts: the weak model gets {:.1} % right, the strong one {:.1} %\n",
            found.prompts,
            percent(weak),
            percent(strong)
        );
        told += "on prompts not seen in training (each fifth left out once), chance is 0.500:\n";
        for (name, of) in [("trained", &found.held_out), ("length alone", &found.by_length)] {
            told += &format!("  {name:<14} AUROC {:.3}   APGR {:.3}\n", of.auroc, of.recovered);
        }
        told += &format!("  an APGR within {:.3} of 0.500 may be chance\n", 2.0 * found.chance);
        let (share, right) = found.at_threshold;
        told += &format!(
            "threshold {:.4} for {:.0} % strong calls: {:.1} % of prompts not seen, and {:.1} % right answers\n",
            found.threshold,
            percent(self.strong_share.into()),
            percent(share),
            percent(right)
        );
        if found.prompts < ENOUGH {
            told += &format!("warning: {} prompts are few: label {ENOUGH} to rely on these figures\n", found.prompts);
        }
        if found.held_out.recovered < 0.5 + 2.0 * found.chance {
            told += "warning: this is no better than chance: it cannot tell what is difficult among these prompts\n";
        } else if found.held_out.recovered <= found.by_length.recovered {
            told += "warning: the length alone does as well\n";
        }
        let file = self.into.as_ref().map_or_else(|| "FILE".into(), |into| into.to_string_lossy());
        told + &format!(
            "for the policy{}:\n  - difficulty: {{weak: WEAK, strong: STRONG, trained: {file}, strong_share: {}}}\n",
            if self.into.is_some() { "" } else { " (write it with --into FILE)" },
            self.strong_share
        )
    }
}
