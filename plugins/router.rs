//! Routers: which model answers a request that leaves it open. They are asked in order, and the first answer wins.
//! # A whole plugin
//!
//! Long conversations have a model of their own.
//!
//! ```
//! use std::sync::Arc;
//!
//! use infergate_plugins::prompt::{Prompt, Role, Span};
//! use infergate_plugins::router::{Answer, Choice, Router, Why};
//!
//! #[derive(Debug)]
//! struct Talkative {
//!     model: Arc<str>,
//!     least_turns: u32,
//! }
//!
//! impl Router for Talkative {
//!     fn kind(&self) -> &'static str {
//!         "talkative"
//!     }
//!
//!     fn ask(&self, prompt: &Prompt<'_>) -> Answer {
//!         if prompt.turns() < self.least_turns {
//!             return Answer::Pass(Why::Unmatched);
//!         }
//!         Answer::Route(Choice { model: self.model.clone(), route: "talkative".into(), score: 1.0, margin: 1.0 })
//!     }
//!
//!     fn models(&self) -> Vec<Arc<str>> {
//!         vec![self.model.clone()]
//!     }
//! }
//!
//! let router = Talkative { model: "patient".into(), least_turns: 2 };
//! let said = |turn| Span { role: Role::User, turn, text: "Hello?" };
//! let ask = |spans: &[Span<'_>]| router.ask(&Prompt { spans, ..Prompt::default() });
//! assert_eq!(ask(&[said(0)]), Answer::Pass(Why::Unmatched));
//! assert!(matches!(ask(&[said(0), said(2)]), Answer::Route(choice) if &*choice.model == "patient"));
//! ```

pub mod cascade;
pub mod cel;
pub mod difficulty;
pub mod effort;
pub mod evaluation;
pub mod score;
pub mod second;
pub mod semantic;
pub mod signals;

use std::fmt::Debug;
use std::path::Path;
use std::sync::Arc;

use schemars::JsonSchema;
use serde::Deserialize;

use crate::operation::Operation;
use crate::prompt::Prompt;
use crate::sink::Resolve;

/// One way of choosing.
pub trait Router: Debug + Send + Sync {
    /// The word for it in `policy.yaml`.
    fn kind(&self) -> &'static str;

    /// The model for this prompt, as far as it is for this router to say.
    fn ask(&self, prompt: &Prompt<'_>) -> Answer;

    /// The models that it may choose.
    fn models(&self) -> Vec<Arc<str>>;

    /// The headers that it looks at, in lower case.
    fn headers(&self) -> &[Arc<str>] {
        &[]
    }

    /// The claims that it looks at, of the token of whoever asks.
    fn claims(&self) -> &[Arc<str>] {
        &[]
    }

    /// The routes told by examples, where it goes by those: to be looked into and measured.
    fn semantic(&self) -> Option<&semantic::Semantic> {
        None
    }
}

/// What a router says.
#[derive(Clone, Debug, PartialEq)]
pub enum Answer {
    /// This model.
    Route(Choice),
    /// That is not for it to say: the next one is asked.
    Pass(Why),
}

/// A model that was chosen, and how clearly: for the header and the record.
#[derive(Clone, Debug, PartialEq)]
pub struct Choice {
    /// The model.
    pub model: Arc<str>,
    /// The name of the route or the rule that chose it.
    pub route: Arc<str>,
    /// How likely it is the right one, or how difficult the prompt is; 1 where there was nothing to weigh.
    pub score: f32,
    /// How far that is from another choice.
    pub margin: f32,
}

/// Why a router does not choose.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Why {
    /// Nothing is asked, or nothing that its vocabulary knows.
    Unknown,
    /// What is asked is like none of its examples: their likeness, and the least that would do.
    OutOfScope(f32, f32),
    /// Two routes are about as good: the margin, and the least that would do.
    Unsure(f32, f32),
    /// Its conditions do not hold.
    Unmatched,
    /// Whether its condition holds cannot be said, and why.
    Failed(&'static str),
}

/// One way of choosing. Exactly one of the kinds must be given.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Router")]
pub struct Config {
    /// By what the prompt is about, told by examples.
    #[serde(default)]
    pub semantic: Option<semantic::Config>,
    /// By what can be counted: size, language, code, maths, words.
    #[serde(default)]
    pub signals: Option<signals::Config>,
    /// By how difficult it is: one of two models.
    #[serde(default)]
    pub difficulty: Option<difficulty::Config>,
    /// By a condition in CEL.
    #[serde(default)]
    pub cel: Option<cel::Config>,
}

impl Config {
    /// The models that it names, each with its key below this one.
    pub fn models(&self) -> Vec<(String, &str)> {
        let routes = self.semantic.iter().flat_map(|semantic| semantic.routes.iter().enumerate());
        let routes = routes.map(|(at, route)| (format!(".semantic.routes[{at}].model"), route.model.as_str()));
        let signals = self.signals.iter().map(|signals| (".signals.model".to_owned(), signals.model.as_str()));
        let pairs = self.difficulty.iter().flat_map(|pair| [("weak", &pair.weak), ("strong", &pair.strong)]);
        let pairs = pairs.map(|(key, model)| (format!(".difficulty.{key}"), model.as_str()));
        let cel = self.cel.iter().map(|cel| (".cel.model".to_owned(), cel.model.as_str()));
        routes.chain(signals).chain(pairs).chain(cel).collect()
    }

    /// The claims of tokens that its condition may look at.
    pub fn claims(&self) -> &[String] {
        self.cel.as_ref().map(|cel| &*cel.claims).unwrap_or_default()
    }

    /// The pool that another service stands in, with its key below this one, what it must be able to do, and where.
    pub fn pool(&self) -> Option<(&'static str, &str, (Operation, &'static str))> {
        let second = self.semantic.as_ref()?.second.as_ref()?;
        Some((".semantic.second.pool", second.pool.as_deref()?, second.shape.operation()))
    }

    /// The names of its decisions: of routes, of a rule; of difficulty those of its models.
    pub fn decisions(&self) -> Vec<&str> {
        let routes = self.semantic.iter().flat_map(|semantic| &semantic.routes).map(|route| route.name.as_str());
        let signals = self.signals.iter().map(|signals| signals.name.as_deref().unwrap_or("signals"));
        let pairs = self.difficulty.iter().flat_map(|pair| [pair.weak.as_str(), pair.strong.as_str()]);
        let cel = self.cel.iter().map(|cel| cel.name.as_deref().unwrap_or(&cel.model));
        routes.chain(signals).chain(pairs).chain(cel).collect()
    }
}

/// What is wrong, or not good: the key below the list of routers, like `[0].semantic.routes[1].examples`, and what to
/// do.
pub type Wrong = (String, String);

/// A router, and what is not good about it though it works.
#[derive(Debug)]
pub struct Built {
    /// The router.
    pub router: Arc<dyn Router>,
    /// What `check` warns of.
    pub warnings: Vec<Wrong>,
}

/// What routers may have of the world while they are built.
pub struct World<'a> {
    /// Reads a file that the policy names, or says why that cannot be done.
    pub file: &'a mut dyn FnMut(&Path) -> Result<String, String>,
    /// Finds a secret, or says why that cannot be done.
    pub secret: Resolve<'a>,
}

/// The routers of a policy, or all that is wrong with them.
pub fn build(configs: &[Config], world: &mut World<'_>) -> Result<Vec<Built>, Vec<Wrong>> {
    let (mut built, mut wrong) = (Vec::new(), Vec::new());
    for (index, config) in configs.iter().enumerate() {
        let at = |(path, message): Wrong| (format!("[{index}]{path}"), message);
        match one(config, world) {
            Ok(one) => built.push(Built { warnings: one.warnings.into_iter().map(at).collect(), ..one }),
            Err(found) => wrong.extend(found.into_iter().map(at)),
        }
    }
    if wrong.is_empty() { Ok(built) } else { Err(wrong) }
}

fn one(config: &Config, world: &mut World<'_>) -> Result<Built, Vec<Wrong>> {
    let under = |key: &'static str| move |(path, message): Wrong| (format!(".{key}{path}"), message);
    let only = |key, wrong: Wrong| vec![under(key)(wrong)];
    let without = |router: Arc<dyn Router>| Built { router, warnings: Vec::new() };
    let Config { semantic, signals, difficulty, cel } = config;
    match (semantic, signals, difficulty, cel) {
        (Some(config), None, None, None) => {
            let built = semantic::build(config, world);
            let built = built.map_err(|wrong| wrong.into_iter().map(under("semantic")).collect::<Vec<_>>())?;
            let warnings = built.warnings().into_iter().map(under("semantic")).collect();
            Ok(Built { router: Arc::new(built), warnings })
        }
        (None, Some(config), None, None) => {
            let built = signals::build(config).map_err(|wrong| only("signals", wrong))?;
            Ok(without(Arc::new(built)))
        }
        (None, None, Some(config), None) => {
            let built = difficulty::build(config, world).map_err(|wrong| only("difficulty", wrong))?;
            Ok(without(Arc::new(built)))
        }
        (None, None, None, Some(config)) => {
            let built = cel::build(config).map_err(|wrong| only("cel", wrong))?;
            Ok(without(Arc::new(built)))
        }
        _ => Err(vec![(String::new(), "give exactly one of: semantic, signals, difficulty, cel".to_owned())]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prompt::{Role, Span};

    /// The routers that this JSON configures.
    pub(super) fn built(json: &str) -> Result<Vec<Built>, Vec<Wrong>> {
        built_with(json, "")
    }

    /// The same, where every file says this.
    pub(super) fn built_with(json: &str, file: &str) -> Result<Vec<Built>, Vec<Wrong>> {
        let mut world = World { file: &mut |_| Ok(file.to_owned()), secret: &mut |_| Err("there is none".to_owned()) };
        build(&serde_json::from_str::<Vec<Config>>(json).unwrap(), &mut world)
    }

    /// What a router says when the user asks `text`.
    pub(super) fn asked(router: &dyn Router, text: &str) -> Answer {
        let spans = [Span { role: Role::User, turn: 0, text }];
        router.ask(&Prompt { spans: &spans, ..Prompt::default() })
    }

    #[test]
    fn a_decision_is_called_what_its_configuration_says_it_is_called() {
        let one = r#"{"cel": {"model": "m", "when": "code"}}"#;
        let config: Config = serde_json::from_str(one).unwrap();
        let router = built(&format!("[{one}]")).unwrap().remove(0).router;
        let Answer::Route(choice) = asked(&*router, "write a python function") else { panic!("it holds") };
        assert_eq!(config.decisions(), [&*choice.route]);
    }

    #[test]
    fn exactly_one_kind_must_be_given() {
        let both = r#"[{}, {"signals": {"model": "m", "code": true}, "difficulty": {"weak": "a", "strong": "b"}}]"#;
        let wrong = built(both).unwrap_err();
        assert_eq!(wrong.iter().map(|(path, _)| path.as_str()).collect::<Vec<_>>(), ["[0]", "[1]"]);
        assert!(wrong[0].1.contains("exactly one"));
    }

    #[test]
    fn each_kind_is_called_by_its_key() {
        for (kind, config) in [
            ("semantic", r#"{"routes": [{"name": "n", "model": "m", "examples": ["fix this bug"]}]}"#),
            ("signals", r#"{"model": "m", "code": true}"#),
            ("difficulty", r#"{"weak": "w", "strong": "s"}"#),
            ("cel", r#"{"model": "m", "when": "tokens > 5"}"#),
        ] {
            let router = &built(&format!(r#"[{{"{kind}": {config}}}]"#)).unwrap()[0].router;
            assert_eq!(router.kind(), kind);
            assert!(!router.models().is_empty());
        }
    }
}
