//! Reads the configuration of another gateway and writes a policy that means the same, as far as that can be meant here.
//!
//! Nothing is guessed and nothing is passed over in silence: every key of the file is told as taken, changed or not
//! supported, at its line. No secret of the file comes out again, in the policy or in what is told.

mod budgets;
mod credentials;
mod cursor;
mod guardrails;
mod models;
mod reliability;
mod rest;
mod vendors;
mod yaml;

use std::collections::HashSet;

use serde_json::Value;

use cursor::At;
use reliability::Usual;
use yaml::Yaml;

use crate::policy::problem::{Document, Problem};
use crate::policy::{self, World};
use crate::state::State;
use crate::telemetry::Telemetry;

/// The largest file that is read, in bytes.
pub const BYTES_MAX: usize = 4 << 20;
/// The most entries of a `model_list`.
const DEPLOYMENTS_MAX: usize = 2_000;

/// What came of a file.
#[derive(Debug)]
pub struct Imported {
    /// The policy, as people would write it; `infergate check` takes it.
    pub policy: String,
    /// What became of each key, in the order of the file.
    pub findings: Vec<Finding>,
}

/// What became of one key of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Whether the policy has it.
    pub outcome: Outcome,
    /// Where it stands, and what a person should know of it.
    pub problem: Problem,
}

/// Whether the policy has what a key says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It has, and it means the same.
    Taken,
    /// It has something near; or somebody must do something.
    Changed,
    /// It has nothing of it.
    NotSupported,
}

impl Outcome {
    /// Its words.
    pub fn name(self) -> &'static str {
        match self {
            Self::Taken => "taken",
            Self::Changed => "changed",
            Self::NotSupported => "not supported",
        }
    }
}

/// Reads the `config.yaml` of a LiteLLM proxy. `env` knows the environment, for addresses that the file leaves to it.
pub fn litellm(text: &str, env: &dyn Fn(&str) -> Option<String>) -> Result<Imported, Problem> {
    let nowhere = |message: String| Problem { place: None, path: String::new(), message };
    if text.len() > BYTES_MAX {
        return Err(nowhere(format!("it has more than {BYTES_MAX} bytes")));
    }
    let document = Document::parse(text)?;
    let known = ["model_list", "litellm_settings", "router_settings", "general_settings"];
    if !document.value.as_object().is_some_and(|members| known.iter().any(|key| members.contains_key(*key))) {
        return Err(nowhere(format!("this is no configuration of LiteLLM: it has none of {}", known.join(", "))));
    }
    let mut importer = Importer::new(&document, env);
    importer.read()?;
    let policy = importer.draft.policy();
    check(&policy)
        .map_err(|told| nowhere(format!("what was made of it is no good policy, which is our mistake: {told}")))?;
    importer.tell_untold();
    Ok(Imported { policy, findings: in_order(importer.findings) })
}

/// What is printed is taken by `infergate check`.
fn check(policy: &str) -> Result<(), String> {
    let (state, telemetry) = (State::new(0), Telemetry::new());
    let env = |_: &str| Some("unknown".to_owned());
    let now = std::time::Instant::now();
    let world = World { env: &env, state: &state, telemetry: &telemetry, zone: None, now, secret_files: false };
    policy::compile(policy, &world).map(drop).map_err(|problems| problems.lines("policy").join("; "))
}

fn in_order(mut findings: Vec<Finding>) -> Vec<Finding> {
    findings.sort_by_key(|finding| finding.problem.place);
    findings
}

fn is_empty(value: &Value) -> bool {
    let nothing = |list: &Vec<Value>| list.is_empty();
    value.is_null()
        || value.as_array().is_some_and(nothing)
        || value.as_object().is_some_and(|members| members.is_empty())
}

/// The policy while it comes to be.
#[derive(Default)]
struct Draft {
    models: Vec<models::Entry>,
    pools: Vec<(String, Yaml)>,
    limits: Vec<Yaml>,
    guardrails: Vec<Yaml>,
    prices: Vec<Yaml>,
    passthrough: Vec<Yaml>,
    requests: Vec<(&'static str, Yaml)>,
    default_model: Option<String>,
    shared: Option<Yaml>,
    keep_days: Option<u64>,
    has_keys: bool,
    has_traces: bool,
}

impl Draft {
    fn policy(&self) -> String {
        let list = |list: &[Yaml]| (!list.is_empty()).then(|| Yaml::List(list.to_vec()));
        let word = |word: &str| Yaml::word(word);
        let pepper = || Yaml::map([("env", Some(word("INFERGATE_PEPPER")))]);
        let keys = || {
            Yaml::map([("keys", Some(Yaml::map([("pepper", Some(pepper())), ("list", Some(Yaml::List(Vec::new())))])))])
        };
        let models: Vec<Yaml> = self.models.iter().map(models::Entry::yaml).collect();
        let requests = Yaml::map(self.requests.iter().map(|(name, value)| (*name, Some(value.clone()))));
        let pools = Yaml::Map(self.pools.clone());
        let sections = [
            ("authenticators", self.has_keys.then(|| Yaml::List(vec![keys()]))),
            ("tenants", self.has_keys.then(|| Yaml::map([("default", Some(Yaml::Map(Vec::new())))]))),
            ("limits", list(&self.limits)),
            ("shared", self.shared.clone()),
            ("guardrails", list(&self.guardrails)),
            ("requests", (!self.requests.is_empty()).then_some(requests)),
            ("models", list(&models)),
            ("default_model", self.default_model.as_deref().map(Yaml::text)),
            ("pools", (!self.pools.is_empty()).then_some(pools)),
            ("passthrough", list(&self.passthrough)),
            ("prices", list(&self.prices).map(|list| Yaml::map([("list", Some(list))]))),
            ("audit", self.keep_days.map(|days| Yaml::map([("keep_days", Some(Yaml::number(days)))]))),
            ("telemetry", self.has_traces.then(|| Yaml::map([("traces", Some(Yaml::Map(Vec::new())))]))),
        ];
        let mut text = String::from("# yaml-language-server: $schema=policy.schema.json\n#\n");
        text.push_str("# Made by `infergate import litellm`. Check it with: infergate check --without-secrets FILE\n");
        text.push_str("version: 1\n");
        for (name, value) in sections {
            if let Some(value) = value {
                value.section(name, &mut text);
            }
        }
        text
    }
}

/// Reads one file.
struct Importer<'a> {
    document: &'a Document,
    env: &'a dyn Fn(&str) -> Option<String>,
    findings: Vec<Finding>,
    told: HashSet<String>,
    draft: Draft,
    usual: Usual,
    credentials: credentials::Credentials,
}

impl<'a> Importer<'a> {
    fn new(document: &'a Document, env: &'a dyn Fn(&str) -> Option<String>) -> Self {
        let (draft, usual, credentials) = (Draft::default(), Usual::default(), credentials::Credentials::default());
        Self { document, env, findings: Vec::new(), told: HashSet::new(), draft, usual, credentials }
    }

    fn read(&mut self) -> Result<(), Problem> {
        let root = At::root(&self.document.value);
        if root.get("model_list").is_some_and(|list| list.items().len() > DEPLOYMENTS_MAX) {
            return Err(self.document.problem("model_list", format!("it has more than {DEPLOYMENTS_MAX} entries")));
        }
        self.usual(&root);
        let groups = self.groups(&root);
        self.models(&groups);
        self.fallbacks(&root, &groups);
        self.aliases(&root);
        self.budgets(&root, &groups);
        self.guardrails(&root);
        self.rest(&root);
        Ok(())
    }

    fn tell(&mut self, outcome: Outcome, at: &At<'_>, message: impl Into<String>) {
        self.told.insert(at.path.clone());
        self.note(outcome, at, message);
    }

    /// Says something of a whole section, whose keys are told of one by one.
    fn note(&mut self, outcome: Outcome, at: &At<'_>, message: impl Into<String>) {
        let message = message.into().split_whitespace().collect::<Vec<_>>().join(" ");
        let problem = self.document.problem(&at.path, message);
        self.findings.push(Finding { outcome, problem });
    }

    fn taken(&mut self, at: &At<'_>, message: impl Into<String>) {
        self.tell(Outcome::Taken, at, message);
    }

    fn changed(&mut self, at: &At<'_>, message: impl Into<String>) {
        self.tell(Outcome::Changed, at, message);
    }

    fn not_supported(&mut self, at: &At<'_>, message: impl Into<String>) {
        self.tell(Outcome::NotSupported, at, message);
    }

    /// Takes back what was told of `at`, because all of it is left out.
    fn leave_out_all(&mut self, at: &At<'_>) {
        let below = |path: &str| path.strip_prefix(at.path.as_str()).is_some_and(|rest| rest.starts_with('.'));
        self.findings.retain(|finding| finding.outcome == Outcome::NotSupported || !below(&finding.problem.path));
        self.told.insert(at.path.clone());
    }

    /// What is told with something else.
    fn seen(&mut self, at: Option<At<'_>>) {
        self.told.extend(at.map(|at| at.path));
    }

    /// Tells every key that nobody has told of yet, the topmost of a tree of them.
    fn tell_untold(&mut self) {
        let mut above: HashSet<String> = HashSet::new();
        for path in &self.told {
            let cuts = path.char_indices().filter(|(_, letter)| matches!(letter, '.' | '[')).map(|(cut, _)| cut);
            above.extend(cuts.map(|cut| path[..cut].to_owned()));
        }
        let mut left = vec![At::root(&self.document.value)];
        while let Some(at) = left.pop() {
            let below = at.below();
            match self.told.contains(&at.path) {
                true => {}
                false if at.path.is_empty() || above.contains(&at.path) => left.extend(below),
                false if is_empty(at.value) => {}
                false => {
                    let hint = rest::hint(&at.path);
                    self.not_supported(&at, hint.unwrap_or("nothing here is like it; the policy has nothing of it"));
                }
            }
        }
    }
}
