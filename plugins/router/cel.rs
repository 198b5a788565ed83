//! Conditions in CEL, the Common Expression Language, over what is known of a request: who asks, where, what its head
//! says, and what can be counted in it.
//!
//! An expression comes from the policy and from nowhere else. It is compiled when the policy is loaded, on a stack of its
//! own, short and not deep, with no comprehension in another: how long it takes is bounded then. One that fails at a
//! request, or is no boolean, does not hold.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread;

use cel::common::ast::{EntryExpr, Expr};
use cel::parser::Expression;
use cel::{Context, Env, ExecutionError, Value};
use schemars::JsonSchema;
use serde::Deserialize;

use super::signals::Signals;
use super::{Answer, Choice, Router, Why, Wrong};
use crate::claim::Claim;
use crate::prompt::Prompt;

/// A rule whose condition is an expression in CEL (cel.dev), without regular expressions, dates and durations. It knows
/// `tenant`, `principal` and `plans` (a list) of whoever asks, `surface` (the endpoint's path), `headers` (a map of those
/// listed here that the request has, by their names in lower case), `claims` (a map of those listed here that the token of
/// whoever asks has; empty where they came with a key, a certificate or nothing), and the signals: `bytes`, `tokens`, `turns`, `images`,
/// `tools` (numbers), `language` (a text, empty where it cannot be told), `code`, `maths`, `structured` (booleans).
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[schemars(rename = "CelRouter")]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The model that answers where the condition holds.
    pub model: String,
    /// Its name, for the record and the header.
    #[serde(default)]
    pub name: Option<String>,
    /// The condition, at most 1,024 bytes, such as `tokens > 8000 && 'gold' in plans`. One that fails at a request, or is
    /// no boolean, does not hold, and the record says so.
    pub when: String,
    /// The headers that it may look at, 16 at most.
    #[serde(default)]
    pub headers: Vec<String>,
    /// The claims of tokens (JWT) that it may look at, 16 at most. A dot leads into an object: `claims['account.plan']`.
    /// Texts of up to 256 bytes, whole numbers, booleans and lists of up to 128 texts are claims, as far as 4 KiB of one
    /// token hold them; any other is as one that is not there. Nothing else of a token is kept, and none of it goes on
    /// record.
    #[serde(default)]
    pub claims: Vec<String>,
}

/// The longest expression, in bytes.
const BYTES_MAX: usize = 1024;
/// How deep it may be.
const DEPTH_MAX: u16 = 24;
/// So many headers may be looked at, and so many claims.
const NAMES_MAX: usize = 16;
/// The stack that it is compiled on: the parser takes about 100 KiB a level where it is not optimised.
const STACK: usize = 64 << 20;

/// What can be counted, and what is known of who asks.
const SIGNALS: [&str; 9] = ["bytes", "tokens", "turns", "images", "tools", "language", "code", "maths", "structured"];
const ASKER: [&str; 6] = ["tenant", "principal", "plans", "surface", "headers", "claims"];

/// A condition, compiled.
pub struct Condition {
    model: Arc<str>,
    name: Arc<str>,
    expression: Expression,
    env: Arc<Env>,
    headers: Vec<Arc<str>>,
    claims: Vec<Arc<str>>,
    /// What it looks at.
    looks_at: Vec<&'static str>,
}

impl std::fmt::Debug for Condition {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Condition").field("name", &self.name).field("model", &self.model).finish_non_exhaustive()
    }
}

pub(super) fn build(config: &Config) -> Result<Condition, Wrong> {
    let wrong = |path: &str, message: String| (path.to_owned(), message);
    if config.model.is_empty() {
        return Err(wrong(".model", "is empty: name a model".to_owned()));
    }
    for (path, what, list) in [(".headers", "headers", &config.headers), (".claims", "claims", &config.claims)] {
        if list.len() > NAMES_MAX {
            return Err(wrong(path, format!("{} {what} are too many: {NAMES_MAX} at most", list.len())));
        }
    }
    let is_plain = |name: &String| name.parse::<http::HeaderName>().is_ok_and(|parsed| parsed.as_str() == name);
    if let Some(at) = config.headers.iter().position(|name| !is_plain(name)) {
        let message = format!("{} is no header's name in lower case", config.headers[at]);
        return Err(wrong(&format!(".headers[{at}]"), message));
    }
    if let Some(secret) = config.headers.iter().position(|name| SECRETS.contains(&name.as_str())) {
        let message = format!("{} carries credentials: nothing is decided by them", config.headers[secret]);
        return Err(wrong(&format!(".headers[{secret}]"), message));
    }
    if let Some(at) = config.claims.iter().position(String::is_empty) {
        return Err(wrong(&format!(".claims[{at}]"), "is empty: name a claim, such as groups".to_owned()));
    }
    let (env, expression) = compiled(&config.when).map_err(|message| wrong(".when", message))?;
    let looks_at = known(&expression).map_err(|message| wrong(".when", message))?;
    if looks_at.contains(&"headers") && config.headers.is_empty() {
        return Err(wrong(".headers", "is empty: list the headers that the condition looks at".to_owned()));
    }
    if looks_at.contains(&"claims") && config.claims.is_empty() {
        return Err(wrong(".claims", "is empty: list the claims that the condition looks at".to_owned()));
    }
    let name = config.name.as_deref().unwrap_or(&config.model).into();
    let listed = |names: &[String]| names.iter().map(|name| name.as_str().into()).collect();
    let (headers, claims) = (listed(&config.headers), listed(&config.claims));
    Ok(Condition { model: config.model.as_str().into(), name, expression, env, headers, claims, looks_at })
}

/// Headers in which secrets come.
const SECRETS: [&str; 6] = ["authorization", "proxy-authorization", "cookie", "x-api-key", "api-key", "x-goog-api-key"];

/// The expression, compiled on a stack of its own.
fn compiled(source: &str) -> Result<(Arc<Env>, Expression), String> {
    if source.len() > BYTES_MAX {
        return Err(format!("is {} bytes long, and may have {BYTES_MAX}", source.len()));
    }
    let source = source.to_owned();
    let compiling = thread::Builder::new().name("cel".to_owned()).stack_size(STACK).spawn(move || bounded(&source));
    let compiled = compiling.map_err(|error| format!("cannot be compiled: {error}"))?.join();
    compiled.map_err(|_| "cannot be compiled: it breaks the compiler".to_owned())?
}

fn bounded(source: &str) -> Result<(Arc<Env>, Expression), String> {
    let env = Env::stdlib();
    let parsed = env.parser().max_recursion_depth(DEPTH_MAX).parse(source);
    let expression = parsed.map_err(|errors| format!("is no condition in CEL: {}", first_line(&errors.to_string())))?;
    check(&expression, 0, false)?;
    Ok((Arc::new(env), expression))
}

fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().chars().take(200).collect()
}

/// An expression that is deep takes much stack at every request, and comprehensions in one another much time.
fn check(at: &Expression, depth: u16, loops: bool) -> Result<(), String> {
    if depth > 2 * DEPTH_MAX {
        return Err(format!("is too deep: more than {} operations in one another", 2 * DEPTH_MAX));
    }
    let is_loop = matches!(at.expr, Expr::Comprehension(_));
    if is_loop && loops {
        return Err("has a comprehension (all, exists, map, filter) in another".to_owned());
    }
    parts(at).into_iter().try_for_each(|part| check(part, depth + 1, loops || is_loop))
}

/// What an expression consists of.
fn parts(of: &Expression) -> Vec<&Expression> {
    match &of.expr {
        Expr::Call(call) => call.target.iter().map(|target| &**target).chain(&call.args).collect(),
        Expr::Select(select) => vec![&select.operand],
        Expr::List(list) => list.elements.iter().collect(),
        Expr::Map(map) => map.entries.iter().flat_map(|entry| entry_parts(&entry.expr)).collect(),
        Expr::Struct(object) => object.entries.iter().flat_map(|entry| entry_parts(&entry.expr)).collect(),
        Expr::Comprehension(all) => {
            vec![&all.iter_range, &all.accu_init, &all.loop_cond, &all.loop_step, &all.result]
        }
        Expr::Ident(_) | Expr::Literal(_) | Expr::Unspecified => Vec::new(),
    }
}

fn entry_parts(entry: &EntryExpr) -> Vec<&Expression> {
    match entry {
        EntryExpr::StructField(field) => vec![&field.value],
        EntryExpr::MapEntry(entry) => vec![&entry.key, &entry.value],
    }
}

/// What an expression looks at, if it is all known.
fn known(expression: &Expression) -> Result<Vec<&'static str>, String> {
    let mut own = Vec::new();
    bound(expression, &mut own);
    let all = || SIGNALS.into_iter().chain(ASKER);
    let references = expression.references();
    let unknown = |name: &&str| !all().any(|known| known == *name) && !own.contains(name) && !name.starts_with('@');
    let mut unknown: Vec<&str> = references.variables().into_iter().filter(unknown).collect();
    unknown.sort_unstable();
    match unknown.first() {
        Some(name) => Err(format!("{name} is not known: there are {}", all().collect::<Vec<_>>().join(", "))),
        None => Ok(all().filter(|name| references.has_variable(name)).collect()),
    }
}

/// The names that comprehensions give to their elements.
fn bound<'e>(at: &'e Expression, names: &mut Vec<&'e str>) {
    if let Expr::Comprehension(all) = &at.expr {
        names.extend([all.iter_var.as_str(), all.accu_var.as_str()]);
        names.extend(all.iter_var2.as_deref());
    }
    parts(at).into_iter().for_each(|part| bound(part, names));
}

impl Condition {
    /// Whether it holds, or why that cannot be said.
    fn holds(&self, prompt: &Prompt<'_>) -> Result<bool, &'static str> {
        let context = self.context(prompt);
        // Whatever the evaluator does costs one answer, and never more.
        let value = catch_unwind(AssertUnwindSafe(|| context.resolve(&self.expression)));
        match value.map_err(|_| "it breaks the evaluator")? {
            Ok(Value::Bool(holds)) => Ok(holds),
            Ok(_) => Err("it is no boolean"),
            Err(error) => Err(told(&error)),
        }
    }

    /// What it looks at, and nothing else.
    fn context(&self, prompt: &Prompt<'_>) -> Context<'_, '_> {
        let mut context = Context::with_env(self.env.clone());
        let counts = self.looks_at.iter().any(|name| SIGNALS.contains(name));
        let signals = if counts { Signals::of(prompt) } else { Signals::default() };
        for name in &self.looks_at {
            context.add_variable_from_value(*name, self.value(name, prompt, &signals));
        }
        context
    }

    fn value(&self, name: &str, prompt: &Prompt<'_>, signals: &Signals) -> Value {
        let number = |count: usize| Value::Int(i64::try_from(count).unwrap_or(i64::MAX));
        let asker = &prompt.asker;
        match name {
            "bytes" => number(signals.bytes),
            "tokens" => number(signals.tokens),
            "turns" => Value::Int(signals.turns.into()),
            "images" => Value::Int(signals.images.into()),
            "tools" => Value::Int(signals.tools.into()),
            "language" => signals.language.unwrap_or_default().into(),
            "code" => Value::Bool(signals.code),
            "maths" => Value::Bool(signals.maths),
            "structured" => Value::Bool(signals.structured),
            "tenant" => asker.tenant.into(),
            "principal" => asker.principal.into(),
            "surface" => asker.surface.into(),
            "plans" => Value::List(Arc::new(asker.plans.iter().map(|plan| (&**plan).into()).collect())),
            "headers" => self.headers(prompt),
            "claims" => self.claimed(prompt),
            _ => Value::Null,
        }
    }

    /// Those that it may look at, of all that somebody may.
    fn headers(&self, prompt: &Prompt<'_>) -> Value {
        let listed = prompt.asker.headers.iter().filter(|(name, _)| self.headers.contains(name));
        let map: HashMap<&str, &str> = listed.map(|(name, value)| (&**name, &**value)).collect();
        Value::Map(map.into())
    }

    fn claimed(&self, prompt: &Prompt<'_>) -> Value {
        let listed = prompt.asker.claims.iter().filter(|(name, _)| self.claims.contains(name));
        let map: HashMap<&str, Value> = listed.map(|(name, claim)| (&**name, said(claim))).collect();
        Value::Map(map.into())
    }
}

fn said(claim: &Claim) -> Value {
    match claim {
        Claim::Text(text) => (&**text).into(),
        Claim::Number(number) => Value::Int(*number),
        Claim::Flag(flag) => Value::Bool(*flag),
        Claim::Texts(texts) => Value::List(Arc::new(texts.iter().map(|text| (&**text).into()).collect())),
    }
}

/// What went wrong. What the values were is nobody's business: it would be in the record.
fn told(error: &ExecutionError) -> &'static str {
    match error {
        ExecutionError::NoSuchKey(_) => "there is no such key",
        ExecutionError::NoSuchOverload(_) => "an operation does not go with these types",
        ExecutionError::UndeclaredReference(_) => "a name is not known",
        ExecutionError::DivisionByZero(_) | ExecutionError::RemainderByZero(_) => "it divides by zero",
        ExecutionError::Overflow(..) => "a number is too large",
        ExecutionError::IndexOutOfBounds(_) => "an index is out of bounds",
        _ => "it cannot be evaluated",
    }
}

impl Router for Condition {
    fn kind(&self) -> &'static str {
        "cel"
    }

    fn ask(&self, prompt: &Prompt<'_>) -> Answer {
        match self.holds(prompt) {
            Ok(true) => {
                let (model, route) = (self.model.clone(), self.name.clone());
                Answer::Route(Choice { model, route, score: 1.0, margin: 1.0 })
            }
            Ok(false) => Answer::Pass(Why::Unmatched),
            Err(why) => Answer::Pass(Why::Failed(why)),
        }
    }

    fn models(&self) -> Vec<Arc<str>> {
        vec![self.model.clone()]
    }

    fn headers(&self) -> &[Arc<str>] {
        &self.headers
    }

    fn claims(&self) -> &[Arc<str>] {
        &self.claims
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prompt::{Asker, Role, Span};

    fn condition(when: &str, headers: &[&str]) -> Result<Condition, Wrong> {
        let headers = headers.iter().map(|&name| name.to_owned()).collect();
        let claims = ["groups", "account.level", "staff", "none"].map(str::to_owned).to_vec();
        build(&Config { model: "m".to_owned(), name: None, when: when.to_owned(), headers, claims })
    }

    fn asked(condition: &Condition) -> Answer {
        let plans: [Arc<str>; 1] = ["gold".into()];
        let headers: [(Arc<str>, Box<str>); 2] = [("x-team".into(), "blue".into()), ("x-other".into(), "y".into())];
        let claims: [(Arc<str>, Claim); 4] = [
            ("groups".into(), Claim::Texts(["ml".into(), "ops".into()].into())),
            ("account.level".into(), Claim::Number(3)),
            ("staff".into(), Claim::Flag(true)),
            ("email".into(), Claim::Text("alice@corp.test".into())),
        ];
        let asker = Asker {
            tenant: "acme",
            principal: "key:1",
            plans: &plans,
            surface: "/v1/chat/completions",
            headers: &headers,
            claims: &claims,
        };
        let spans = [Span { role: Role::User, turn: 0, text: "fix this bug in my python function: def f():" }];
        condition.ask(&Prompt { spans: &spans, tools: 2, asker, ..Prompt::default() })
    }

    fn holds(when: &str) -> Result<bool, Why> {
        match asked(&condition(when, &["x-team", "x-none"]).unwrap()) {
            Answer::Route(choice) => Ok(&*choice.model == "m"),
            Answer::Pass(Why::Unmatched) => Ok(false),
            Answer::Pass(why) => Err(why),
        }
    }

    #[test]
    fn a_condition_sees_who_asks_where_and_what() {
        for (when, expected) in [
            ("tenant == 'acme' && 'gold' in plans", true),
            ("headers['x-team'] == 'blue' && !('x-none' in headers)", true),
            ("surface.startsWith('/v1/chat') && principal.contains(':')", true),
            ("code && tools == 2 && images == 0 && turns == 1", true),
            ("tokens > 5 && tokens < 100 && bytes > 20 && !maths && !structured", true),
            ("plans.exists(plan, plan == 'gold')", true),
            ("{'a': plans.exists(p, p == 'gold')}['a']", true),
            ("'ml' in claims.groups && claims['account.level'] >= 3 && claims.staff", true),
            ("!('none' in claims) && claims.groups.exists(group, group.startsWith('op'))", true),
            ("'email' in claims", false),
            ("language == 'de'", false),
            ("size(plans) > 1 ? true : tokens > 100000", false),
        ] {
            assert_eq!(holds(when), Ok(expected), "{when}");
        }
    }

    #[test]
    fn what_fails_or_is_no_boolean_does_not_hold_and_says_so() {
        for (when, why) in [
            ("headers['x-none'] == 'a'", "there is no such key"),
            ("claims.none == 'a'", "there is no such key"),
            ("claims.groups > 3", "an operation does not go with these types"),
            ("tokens", "it is no boolean"),
            ("tokens / 0 == 1", "it divides by zero"),
            ("9223372036854775807 + tokens > 0", "a number is too large"),
            ("tenant > 3", "an operation does not go with these types"),
            ("plans[7] == 'x'", "an index is out of bounds"),
        ] {
            assert_eq!(holds(when), Err(Why::Failed(why)), "{when}");
        }
    }

    #[test]
    fn a_header_that_is_not_listed_is_not_seen() {
        assert_eq!(holds("'x-other' in headers"), Ok(false));
    }

    #[test]
    fn what_cannot_be_meant_is_refused_when_the_policy_is_loaded() {
        let nested = "plans.all(a, plans.all(b, a == b))";
        for (when, words) in [
            ("", "no condition in CEL"),
            ("tokens >", "no condition in CEL"),
            ("tokens > 1 && team == 'a'", "team is not known: there are bytes"),
            (nested, "a comprehension"),
            (&format!("{}true{}", "(".repeat(200), ")".repeat(200)), "no condition in CEL"),
            (&format!("tokens > 1{}", " + 1".repeat(100)), "too deep"),
            (&format!("true{}", " && true".repeat(200)), "may have 1024"),
        ] {
            let (path, message) = condition(when, &["x-team"]).unwrap_err();
            assert!(path == ".when" && message.contains(words), "{when}: {message}");
        }
        for (headers, words) in [
            (&["X-Team"][..], "in lower case"),
            (&["a b"], "in lower case"),
            (&["authorization"], "credentials"),
            (&["x"; 17], "too many"),
        ] {
            let (path, message) = condition("tokens > 1", headers).unwrap_err();
            assert!(path.starts_with(".headers") && message.contains(words), "{path} {message}");
        }
        assert!(condition("'a' in headers", &[]).unwrap_err().1.contains("list the headers"));
    }

    #[test]
    fn the_deepest_condition_needs_little_stack_and_bounded_time() {
        let deep = [
            format!("tokens > 1{}", " + 1".repeat(44)),
            format!("{}tokens > 1{}", "(".repeat(10), ")".repeat(10)),
            format!("{}true", "true ? !code : ".repeat(6)),
            format!("[{}].all(a, a + tokens + tokens > 0)", "1,".repeat(450) + "1"),
        ];
        for when in deep {
            let condition = condition(&when, &[]).unwrap_or_else(|wrong| panic!("{when}: {wrong:?}"));
            let asking = thread::Builder::new().stack_size(512 << 10).spawn(move || asked(&condition)).unwrap();
            assert!(!matches!(asking.join().unwrap(), Answer::Pass(Why::Failed(_))), "{when}");
        }
    }

    #[test]
    fn no_text_breaks_the_compiler_or_the_evaluator() {
        let seeds = [
            "tokens > 1 && tenant == 'a'",
            "headers['x-team'].startsWith('b') || !code",
            "plans.exists(p, p in ['a'])",
        ];
        let marks = b"()[]{}'\"\\.,:?!&|=<>+-*/%0x\xc3\xa9";
        let mut state = 0x9E37_79B9_7F4A_7C15_u64;
        let mut draw = |below: usize| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state % below as u64) as usize
        };
        let mut compiled = 0;
        for round in 0..600 {
            let mut text = seeds[round % seeds.len()].as_bytes().to_vec();
            for _ in 0..draw(4) {
                let at = draw(text.len());
                match draw(3) {
                    0 => text[at] = marks[draw(marks.len())],
                    1 => text.insert(at, marks[draw(marks.len())]),
                    _ => drop(text.drain(at..(at + 3).min(text.len() - 1).max(at))),
                }
            }
            if let Ok(condition) = condition(&String::from_utf8_lossy(&text), &["x-team"]) {
                compiled += 1;
                let broke = Answer::Pass(Why::Failed("it breaks the evaluator"));
                assert_ne!(asked(&condition), broke, "{}", text.escape_ascii());
            }
        }
        assert!(compiled > 100, "{compiled}");
    }
}
