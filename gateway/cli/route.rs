//! `infergate route`: which model a prompt gets and why; how well routes do on labelled prompts.

mod train;

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use clap::{Args, Subcommand};
use http::{HeaderName, HeaderValue};
use infergate_plugins::operation::Operation;
use infergate_plugins::prompt::Prompt;
use infergate_plugins::router::effort::Effort;
use infergate_plugins::router::evaluation::{self, Evaluation, Row};
use infergate_plugins::router::semantic::Semantic;
use infergate_plugins::router::signals::Signals;
use infergate_plugins::router::{Answer, Router};
use infergate_plugins::semantic::Embedding;
use serde_json::{Map, Value, json};

use super::counted;
use crate::policy::problem::nearest;
use crate::policy::{self, Policy, Tenant, World, load};
use crate::routers::conversations::Conversations;
use crate::routers::shortlist::{Weighed, Weight};
use crate::routers::words::Words;
use crate::routers::{Routers, Whose, told};
use crate::scan;
use crate::state::State;
use crate::surface::{self, Surface};
use crate::telemetry::Telemetry;
use crate::text::Reading;

/// The longest request that is read.
const LONGEST: u64 = 64 << 20;
/// How many wrong rows are shown.
const WORST: usize = 10;
/// How often a decision is made to tell how long it takes.
const ROUNDS: u32 = 100;

/// Which model a prompt gets.
#[derive(Args)]
pub(super) struct Route {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Read a request's body from the standard input and tell which model it gets, and what each router says
    Explain(Explain),
    /// Try the routes told by examples on labelled prompts, one JSON object a line: {"text": ..., "label": ROUTE}
    Eval(Eval),
    /// Learn from labelled prompts which are difficult, one JSON object a line: {"text": ..., "weak_ok": BOOL,
    /// "strong_ok": BOOL}, and tell what that is worth
    Train(train::Train),
}

#[derive(Args)]
struct Explain {
    #[command(flatten)]
    of: Of,
    /// The endpoint that the request is for
    #[arg(long, value_name = "PATH", default_value = "/v1/chat/completions")]
    surface: String,
    /// The tenant that asks: its models, surfaces and regions count
    #[arg(long, value_name = "NAME")]
    tenant: Option<String>,
    /// The principal that asks
    #[arg(long, value_name = "NAME")]
    principal: Option<String>,
    /// A plan that they have; may be given several times
    #[arg(long = "plan", value_name = "NAME")]
    plans: Vec<String>,
    /// What their token says, as a JSON object: {"groups": ["ml"]}
    #[arg(long, value_name = "JSON", value_parser = claims, default_value = "{}")]
    claims: Map<String, Value>,
    /// A header that the request has; may be given several times
    #[arg(long = "header", value_name = "NAME: VALUE", value_parser = header)]
    headers: Vec<(HeaderName, HeaderValue)>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct Eval {
    /// The labelled prompts; a label that no route has is out of scope
    #[arg(value_name = "FILE")]
    file: PathBuf,
    #[command(flatten)]
    of: Of,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Whose routers.
#[derive(Args)]
struct Of {
    /// The policy
    #[arg(long, value_name = "FILE", default_value = "config/policy.yaml")]
    policy: PathBuf,
    /// The virtual model: one of the policy's `routers`. Absent: the first
    #[arg(long, value_name = "NAME")]
    model: Option<String>,
}

impl Route {
    pub(super) fn run(self) -> Result<ExitCode, String> {
        match self.command {
            Command::Explain(explain) => explain.run(),
            Command::Eval(eval) => eval.run(),
            Command::Train(train) => train.run(),
        }
    }
}

impl Of {
    fn routers(&self) -> Result<Arc<Routers>, String> {
        Ok(self.route(&compiled(&self.policy)?)?.1)
    }

    /// The virtual model of the policy.
    fn route(&self, policy: &Policy) -> Result<(Arc<policy::Route>, Arc<Routers>), String> {
        let mut virtuals = policy.listed().iter().filter_map(|(_, route)| Some((route, route.routers.clone()?)));
        let found = virtuals.find(|(route, _)| self.model.as_ref().is_none_or(|wanted| *wanted == route.model.name));
        found.map(|(route, routers)| (route.clone(), routers)).ok_or_else(|| {
            let file = self.policy.display();
            match &self.model {
                Some(name) => format!("{file} has no {name} under `routers`"),
                None => format!("{file} has no `routers`: name a policy that has with --policy"),
            }
        })
    }
}

/// The policy, whether or not its secrets are there.
fn compiled(file: &Path) -> Result<Policy, String> {
    let (state, telemetry) = (State::new(0), Telemetry::new());
    let env = |name: &str| std::env::var(name).ok().or_else(|| Some("unknown".to_owned()));
    let now = Instant::now();
    let world = World { env: &env, state: &state, telemetry: &telemetry, zone: None, now, secret_files: false };
    load(file, &world).map_err(|problems| problems.lines(&file.display().to_string()).join("\n"))
}

/// A header as it is written on the command line.
fn header(text: &str) -> Result<(HeaderName, HeaderValue), String> {
    let (name, value) = text.split_once(':').ok_or("write it as 'name: value'")?;
    let name = name.trim().parse().map_err(|_| format!("{name} is no header's name: write it as 'name: value'"))?;
    let value = value.trim().parse().map_err(|_| format!("no header can have this value: {}", value.trim()))?;
    Ok((name, value))
}

/// What a token says, as it is written on the command line.
fn claims(text: &str) -> Result<Map<String, Value>, String> {
    serde_json::from_str(text).map_err(|error| format!("this is no JSON object: {error}"))
}

impl Explain {
    fn run(self) -> Result<ExitCode, String> {
        let policy = compiled(&self.of.policy)?;
        let (route, routers) = self.of.route(&policy)?;
        let surface = surface::find(&self.surface).ok_or_else(|| format!("nothing is served at {}", self.surface))?;
        let tenant = self.tenant.as_deref().map(|name| known(&policy, name)).transpose()?;
        let mut body = Vec::new();
        let read = std::io::stdin().take(LONGEST).read_to_end(&mut body);
        read.map_err(|error| format!("the standard input cannot be read: {error}"))?;
        let headers = self.headers.iter().cloned().collect();
        let whose = Whose::of_tenant(tenant.clone(), surface.path, &routers, &headers);
        let whose = whose.named(self.principal.as_deref(), &self.plans, &self.claims, &routers);
        let mut found = explained(&routers, surface.operation, &whose, body)?;
        found["tenant"] = self.tenant.as_deref().into();
        found["refused"] = tenant.and_then(|tenant| refused(&tenant, &route, surface)).into();
        if self.json {
            println!("{found}");
        } else {
            print!("{}", story(&found));
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// The tenant of this name.
fn known(policy: &Policy, name: &str) -> Result<Arc<Tenant>, String> {
    policy.tenants.get(name).cloned().ok_or_else(|| {
        let hint = nearest(name, policy.tenants.keys().map(|known| &**known));
        format!("the policy has no tenant {name}{hint}: name one that stands under `tenants`")
    })
}

/// Why the tenant's requests do not come as far as to be routed, if so.
fn refused(tenant: &Tenant, route: &policy::Route, surface: &Surface) -> Option<String> {
    let (name, model) = (&tenant.name, &route.model.name);
    if !tenant.may_ask(surface.path) {
        return Some(format!("{} is not in the surfaces of {name}", surface.path));
    }
    (!tenant.may_use(route, Some(model))).then(|| format!("{model} is not in the models of {name}"))
}

/// What a request gets, and what everybody says of it.
fn explained(routers: &Routers, operation: Operation, whose: &Whose, body: Vec<u8>) -> Result<Value, String> {
    let unreadable = "this is no request for that endpoint: give the JSON that a client would send";
    let scan = scan::json(&body).map_err(|fault| fault.to_string())?;
    let request = Reading::of(operation, body);
    let words = Words::of(&request, true).map_err(|_| unreadable)?;
    let prompt = Prompt { asker: whose.asker(), ..words.prompt() };
    let kept = Conversations::default();
    // The first time the tables are cold.
    let decided = routers.decide(&request, &scan, &kept, whose);
    let fresh = Conversations::default();
    let began = Instant::now();
    for _ in 0..ROUNDS {
        let unread = Reading::of(operation, request.body.clone());
        std::hint::black_box(routers.decide(&unread, &scan, &fresh, whose));
    }
    let micros = (began.elapsed() / ROUNDS).as_nanos() as f64 / 1000.0;
    Ok(json!({
        "asked": &*routers.name,
        "model": &*decided.model,
        "rule": decided.rule.as_str(),
        "why": decided.why.as_str(),
        "in_tool_loop": words.in_loop(&prompt),
        "microseconds": micros,
        "unfit": decided.unfit.map(|unfit| unfit.1),
        "shortlist": decided.weighed.as_deref().map(weighed),
        "effort": routers.effort.get(decided.by.as_str()).map(|effort| thinks(*effort)),
        "escalates_to": decided.able.iter().map(|name| &**name).collect::<Vec<_>>(),
        "candidates": routers.candidates().map(|name| &**name).collect::<Vec<_>>(),
        "routers": routers.ask.iter().map(|router| said(router.as_ref(), &prompt)).collect::<Vec<_>>(),
        "signals": signals(&prompt),
    }))
}

/// What came of a shortlist. Nobody runs here: loads and rates are those of idle servers that nobody has measured.
fn weighed(weighed: &Weighed) -> Value {
    json!({
        "name": &*weighed.shortlist,
        "margin": rounded(weighed.margin),
        "models": weighed.candidates.iter().map(Weight::record).collect::<Vec<_>>(),
    })
}

fn thinks(effort: Effort) -> Value {
    match effort {
        Effort::Set(level) => json!({"set": level.name()}),
        Effort::Default(level) => json!({"default": level.name()}),
        Effort::Strip => json!({"strip": true}),
    }
}

fn said(router: &dyn Router, prompt: &Prompt<'_>) -> Value {
    let mut said = match router.ask(prompt) {
        Answer::Route(choice) => json!({
            "model": &*choice.model, "route": &*choice.route,
            "score": rounded(choice.score), "margin": rounded(choice.margin),
        }),
        Answer::Pass(why) => json!({"passes": told(why)}),
    };
    said["kind"] = router.kind().into();
    if let Some(semantic) = router.semantic() {
        said["routes"] = ranked(semantic, prompt);
        said["fingerprint"] = format!("{:016x}", semantic.heads().fingerprint()).into();
        said["least_likeness"] = rounded(semantic.least_likeness());
        let class = semantic.heads().classify(&Embedding::of_parts(prompt.asked())).map(|class| class.likeness);
        said["likeness"] = class.map_or(Value::Null, rounded);
    }
    said
}

/// The routes by how likely they are.
fn ranked(semantic: &Semantic, prompt: &Prompt<'_>) -> Value {
    let asked = Embedding::of_parts(prompt.asked());
    let ranked = semantic.heads().ranked(&asked).into_iter();
    ranked.map(|(route, score)| json!({"route": &**route, "score": rounded(score)})).collect()
}

fn rounded(number: f32) -> Value {
    json!((f64::from(number) * 10_000.0).round() / 10_000.0)
}

fn signals(prompt: &Prompt<'_>) -> Value {
    let found = Signals::of(prompt);
    json!({
        "bytes": found.bytes, "tokens": found.tokens, "turns": found.turns, "images": found.images,
        "tools": found.tools, "language": found.language, "code": found.code, "maths": found.maths,
        "structured": found.structured,
    })
}

/// The same for people.
fn story(found: &Value) -> String {
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let mut told = format!(
        "{} -> {}   by {} ({}), in {:.0} microseconds\n",
        text(&found["asked"]),
        text(&found["model"]),
        text(&found["rule"]),
        text(&found["why"]),
        found["microseconds"].as_f64().unwrap_or_default()
    );
    if let Some(refused) = found["refused"].as_str() {
        told += &format!("  refused     {refused}\n");
    }
    told += &listed(&found["shortlist"]);
    if let Some(unfit) = found["unfit"].as_str() {
        told += &format!("  nobody      {unfit}\n");
    }
    if found["effort"].is_object() {
        told += &format!("  effort      {}\n", found["effort"]);
    }
    for router in found["routers"].as_array().into_iter().flatten() {
        let answer = match router.get("passes") {
            Some(why) => format!("passes: {}", text(why)),
            None => format!(
                "{} (route {}, score {}, margin {})",
                text(&router["model"]),
                text(&router["route"]),
                router["score"],
                router["margin"]
            ),
        };
        told += &format!("  {:<11} {answer}\n", text(&router["kind"]));
        if let Some(likeness) = router.get("likeness") {
            told += &format!("    likeness {likeness} of {} at least\n", router["least_likeness"]);
        }
        for route in router["routes"].as_array().into_iter().flatten().take(5) {
            told += &format!("    {:<20} {}\n", text(&route["route"]), route["score"]);
        }
    }
    let steps: Vec<String> = found["escalates_to"].as_array().into_iter().flatten().map(text).collect();
    if !steps.is_empty() {
        told += &format!("  cascade     {} if the answer is not good enough\n", steps.join(", then "));
    }
    let signals = found["signals"].as_object().into_iter().flatten();
    let signals: Vec<String> = signals.map(|(name, value)| format!("{name} {}", text(value))).collect();
    told + &format!("  signals     {}\n", signals.join(", "))
}

/// The models of a shortlist, one a line, with their terms in thousandths.
fn listed(shortlist: &Value) -> String {
    let mut told = String::new();
    for one in shortlist["models"].as_array().into_iter().flatten() {
        let figures = ["quality", "price", "first_token", "load", "loss"].into_iter().filter_map(|term| {
            let figure = one.get(format!("{term}_permille"))?;
            Some(format!("{term} {figure}"))
        });
        let figures = figures.collect::<Vec<_>>().join(", ");
        let name = one["model"].as_str().unwrap_or_default();
        told += &match one["out"].as_str() {
            Some(out) => format!("  {name:<20} out: {out}\n"),
            None => format!("  {name:<20} score {} ({figures})\n", one["score_permille"]),
        };
    }
    told
}

impl Eval {
    fn run(self) -> Result<ExitCode, String> {
        let routers = self.of.routers()?;
        let semantic = routers.ask.iter().find_map(|router| router.semantic());
        let semantic = semantic.ok_or_else(|| format!("{} has no routes told by examples", routers.name))?;
        let file = self.file.display();
        let lines = std::fs::read_to_string(&self.file).map_err(|error| format!("{file} cannot be read: {error}"))?;
        let rows: Vec<Row> = evaluation::rows(&lines).map_err(|wrong| format!("{file}: {wrong}"))?;
        let began = Instant::now();
        let found = Evaluation::of(semantic.heads(), semantic.least_likeness(), &rows);
        let micros = began.elapsed().as_nanos() as f64 / 1000.0 / rows.len().max(1) as f64;
        if self.json {
            println!("{}", measured(&found, semantic, &rows, micros));
        } else {
            print!("{}", report(&found, semantic, &rows, micros));
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn measured(found: &Evaluation, semantic: &Semantic, rows: &[Row], micros: f64) -> Value {
    let confusion: Vec<Value> = found
        .confusion
        .iter()
        .map(|((label, got), count)| json!({"label": label, "got": got, "rows": count}))
        .collect();
    let worst = found.worst.iter().take(WORST).map(|miss| {
        let Row { text, label } = &rows[miss.row];
        json!({"row": miss.row + 1, "text": text, "label": label, "got": miss.got, "score": rounded(miss.score)})
    });
    json!({
        "in_scope": found.in_scope, "accuracy": found.accuracy, "mean_accuracy": found.mean_accuracy,
        "out_of_scope": found.out_of_scope, "auroc": found.auroc,
        "taken_in_scope": found.taken.0, "taken_out_of_scope": found.taken.1,
        "least_likeness": rounded(semantic.least_likeness()),
        "suggested_likeness": rounded(found.suggested_likeness),
        "left_out_accuracy": semantic.report().accuracy(),
        "confusion": confusion, "worst": worst.collect::<Vec<_>>(), "microseconds": micros,
    })
}

/// The same for people.
fn report(found: &Evaluation, semantic: &Semantic, rows: &[Row], micros: f64) -> String {
    let (in_scope, out_of_scope) = (found.in_scope, found.out_of_scope);
    let mut told = format!(
        "accuracy {:.1} % of {}, {:.1} % with each route counting alike; {micros:.0} microseconds each\n",
        100.0 * found.accuracy,
        counted(in_scope as u64, "prompt"),
        100.0 * found.mean_accuracy
    );
    if let Some(auroc) = found.auroc {
        told +=
            &format!("out of scope: AUROC {:.1} % over {}\n", 100.0 * auroc, counted(out_of_scope as u64, "prompt"));
    }
    told += &format!(
        "taken by a route: {:.1} % in scope, {:.1} % out of scope, at least_likeness {:.3}; {:.3} would keep 95 % in scope\n",
        100.0 * found.taken.0,
        100.0 * found.taken.1,
        semantic.least_likeness(),
        found.suggested_likeness
    );
    told += &matrix(found, semantic, rows);
    for miss in found.worst.iter().take(WORST) {
        let Row { text, label } = &rows[miss.row];
        let text: String = text.chars().take(80).collect();
        told += &format!("line {}: {label} taken for {} ({:.2}): {text}\n", miss.row + 1, miss.got, miss.score);
    }
    told
}

/// Which label got which route. Of many routes only what went wrong is shown.
fn matrix(found: &Evaluation, semantic: &Semantic, rows: &[Row]) -> String {
    const MOST: usize = 20;
    let labels = semantic.heads().labels();
    if labels.len() > MOST {
        let mut wrong: Vec<_> = found.confusion.iter().collect();
        wrong.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
        let line = |((label, got), count): &(&(String, String), &usize)| format!("{count:>5} {label} -> {got}\n");
        return wrong.iter().take(MOST).map(line).collect();
    }
    let wrong = |label: &str, got: &str| found.confusion.get(&(label.to_owned(), got.to_owned())).copied();
    let row = |label: &Arc<str>| {
        let all = rows.iter().filter(|row| row.label == **label).count();
        let missed: usize = found.confusion.iter().filter(|((of, _), _)| *of == **label).map(|(_, count)| count).sum();
        let cell = |got: &Arc<str>| if got == label { all - missed } else { wrong(label, got).unwrap_or_default() };
        let cells: String = labels.iter().map(|got| format!("{:>6}", cell(got))).collect();
        format!("{label:<20}{cells}\n")
    };
    let head: String = (1..=labels.len()).map(|number| format!("{number:>6}")).collect();
    format!("{:<20}{head}\n", "label \\ got route") + &labels.iter().map(row).collect::<String>()
}
