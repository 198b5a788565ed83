//! `infergate guard`: try the guardrails of a policy on a text, or measure them on labelled ones.

mod rows;
mod score;

use std::io::Read;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use clap::{Args, Subcommand};
use infergate_plugins::guardrail::redact::Placeholders;
use infergate_plugins::guardrail::stream::Progress;
use infergate_plugins::guardrail::{Found, Guardrails, Measure, Mode, Outcome, Place};
use serde_json::json;

use super::counted;
use crate::guard::{Rails, word};
use crate::policy::{World, load};
use crate::state::State;
use crate::telemetry::Telemetry;

/// Try guardrails.
#[derive(Args)]
pub(super) struct Guard {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Judge the text on the standard input: what is found, by which rule, and what would leave
    Try(Try),
    /// Judge labelled texts: precision, recall, false alarms and the time of each rule, with the worst examples
    ///
    /// Each line of the file is a JSON object with `text`; `label`: the name of the rule that should find it, a list of
    /// such names, or null (or no such key) if none should; or `spans` in its place: a list of {"start", "end", "label"},
    /// in characters, also as [label, start, end]. A label is the name of a rule, or what a rule calls its finds, like
    /// card. `in` is where the text stands, if not what --in says. Each rule is measured alone, whatever its mode.
    Test(Test),
}

/// Which guardrails.
#[derive(Args)]
struct Which {
    /// The policy file. Secrets that it names need not be there
    #[arg(long, value_name = "FILE", env = "INFERGATE_POLICY", default_value = "config/policy.yaml")]
    policy: PathBuf,
    /// Where the text stands
    #[arg(long = "in", value_name = "PLACE", default_value = "prompt.user", value_parser = place)]
    place: Place,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct Try {
    #[command(flatten)]
    which: Which,
}

#[derive(Args)]
struct Test {
    /// The labelled texts, one JSON object a line
    #[arg(value_name = "FILE")]
    file: PathBuf,
    #[command(flatten)]
    which: Which,
    /// So many examples of each kind of mistake of each rule
    #[arg(long, value_name = "COUNT", default_value_t = 3)]
    worst: usize,
}

fn place(name: &str) -> Result<Place, String> {
    let names = || Place::ALL.map(Place::name).join(", ");
    Place::ALL.into_iter().find(|place| place.name() == name).ok_or_else(|| format!("give one of {}", names()))
}

/// The longest text that is tried: no request is longer.
const TEXT_MAX: u64 = 64 << 20;

impl Guard {
    pub(super) fn run(self) -> Result<ExitCode, String> {
        match self.command {
            Command::Try(run) => run.run(),
            Command::Test(run) => run.run(),
        }
    }
}

impl Which {
    /// The guardrails of the policy, which need no secrets.
    fn rails(&self) -> Result<Arc<Rails>, String> {
        let (state, telemetry) = (State::new(0), Telemetry::new());
        let env: &dyn Fn(&str) -> Option<String> =
            &|name: &str| std::env::var(name).ok().or_else(|| Some("unknown".to_owned()));
        let now = Instant::now();
        let world = World { env, state: &state, telemetry: &telemetry, zone: None, now, secret_files: false };
        let name = self.policy.display();
        let policy = load(&self.policy, &world).map_err(|problems| problems.lines(&name.to_string()).join("\n"))?;
        policy
            .guardrails
            .ok_or_else(|| format!("{name} has no guardrails: give it some, or name another with --policy"))
    }
}

impl Try {
    fn run(self) -> Result<ExitCode, String> {
        let rails = self.which.rails()?;
        let tried = Tried::of(&rails.rules, self.which.place, read()?);
        match self.which.json {
            true => println!("{}", tried.json()),
            false => tried.tell(),
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn read() -> Result<String, String> {
    let mut text = String::new();
    let read = std::io::stdin().lock().take(TEXT_MAX + 1).read_to_string(&mut text);
    read.map_err(|error| format!("the standard input cannot be read as text: {error}"))?;
    if text.len() as u64 > TEXT_MAX { Err(format!("the text is longer than {TEXT_MAX} bytes")) } else { Ok(text) }
}

/// A text and what the rules make of it.
struct Tried<'g> {
    rules: &'g Guardrails,
    place: Place,
    text: String,
    progress: Progress,
}

impl<'g> Tried<'g> {
    fn of(rules: &'g Guardrails, place: Place, text: String) -> Self {
        let mut placeholders = Placeholders::default();
        placeholders.avoid(&text);
        let mut progress = match rules.scanner(place) {
            Some(scanner) => scanner.judge(&text, &mut placeholders),
            None => Progress { released: text.len() as u64, ..Progress::default() },
        };
        for (rule, what) in exceeded(rules, place, &text) {
            progress.found.push(Found { rule, label: what.into(), range: 0..text.len() as u64 });
            if rules.rules()[rule].outcome() == Outcome::Blocked {
                progress.blocked.get_or_insert(rule);
            }
        }
        Self { rules, place, text, progress }
    }

    fn outcome(&self) -> Outcome {
        let outcomes = self.progress.found.iter().map(|found| self.rules.rules()[found.rule].outcome());
        outcomes.max().unwrap_or(Outcome::Passed)
    }

    /// The text as it would leave; of a prompt that is blocked nothing does.
    fn leaves(&self) -> String {
        let nothing = self.place.is_prompt() && self.progress.blocked.is_some();
        if nothing { String::new() } else { self.progress.apply(&self.text) }
    }

    fn found(&self, found: &Found) -> &str {
        self.text.get(found.range.start as usize..found.range.end as usize).unwrap_or_default()
    }

    fn tell(&self) {
        let looking = self.rules.rules().iter().filter(|rule| rule.places.contains(&self.place)).count();
        let (place, bytes, outcome) = (self.place.name(), self.text.len(), word(self.outcome()));
        let rules = if looking == 1 { "1 rule looks".to_owned() } else { format!("{looking} rules look") };
        println!("{place}, {}, {rules} there: {outcome}", counted(bytes as u64, "byte"));
        for found in &self.progress.found {
            let rule = &self.rules.rules()[found.rule];
            let monitored = if rule.mode == Mode::Monitor { ", only watched" } else { "" };
            println!(
                "  {}..{}  {} ({})  {}  {}{monitored}  {}",
                found.range.start,
                found.range.end,
                rule.name,
                rule.kind,
                found.label,
                word(rule.outcome()),
                score::excerpt(self.found(found))
            );
        }
        match (self.progress.blocked, self.place.is_prompt()) {
            (Some(_), true) => println!("nothing of it leaves: the request is refused with content_filter"),
            (Some(_), false) => println!("it ends early, with content_filter. Before that leaves:\n{}", self.leaves()),
            (None, _) if self.progress.edits.is_empty() => println!("it leaves as it is"),
            (None, _) => println!("it leaves as:\n{}", self.leaves()),
        }
    }

    fn json(&self) -> serde_json::Value {
        let found = |found: &Found| {
            let rule = &self.rules.rules()[found.rule];
            json!({
                "rule": &*rule.name, "kind": rule.kind, "label": &*found.label, "verdict": rule.verdict,
                "mode": rule.mode, "outcome": rule.outcome(), "start": found.range.start, "end": found.range.end,
                "text": self.found(found),
            })
        };
        let found: Vec<_> = self.progress.found.iter().map(found).collect();
        json!({
            "in": self.place, "bytes": self.text.len(), "outcome": self.outcome(), "found": found,
            "blocked": self.progress.blocked.is_some(), "leaves": self.leaves(),
        })
    }
}

/// The rules with bounds for a whole prompt that this text exceeds, were it all of it.
fn exceeded(rules: &Guardrails, place: Place, text: &str) -> Vec<(usize, &'static str)> {
    if !place.is_prompt() {
        return Vec::new();
    }
    let measure = Measure { characters: text.chars().count() as u64, ..Measure::default() };
    rules.exceeded(&measure).filter(|(rule, _)| rules.rules()[*rule].places.contains(&place)).collect()
}

impl Test {
    fn run(self) -> Result<ExitCode, String> {
        let rails = self.which.rails()?;
        let rows = rows::read(&self.file, self.which.place)?;
        let scores = score::Scores::of(&rails.rules, &rows, self.worst);
        match self.which.json {
            true => println!("{}", scores.json(&self.file)),
            false => scores.tell(&self.file),
        }
        Ok(ExitCode::SUCCESS)
    }
}
