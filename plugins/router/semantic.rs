//! Routes by what a prompt is about, each told by a few prompts that belong there.
//!
//! What is like no example is nobody's: the router passes, and the next one or the default answers.

use std::sync::Arc;

use schemars::JsonSchema;
use serde::Deserialize;

use super::second::{self, Doubt, Second};
use super::{Answer, Choice, Router, Why, World, Wrong};
use crate::prompt::Prompt;
use crate::semantic::{Embedding, Examples, Heads, Report};

/// Routes by what the prompt is about. Give each 5 to 50 examples in the styles in which people really ask.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[schemars(rename = "SemanticRouter")]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The routes.
    pub routes: Vec<RouteConfig>,
    /// How like the examples a prompt must be, from 0 to 2. Without it, as like as 19 of 20 examples are like the
    /// others.
    #[serde(default)]
    pub least_likeness: Option<f32>,
    /// How much likelier than the second the best route must be, from 0 to 1. The default takes the best.
    #[serde(default)]
    pub least_margin: f32,
    /// Another service, which says which of two routes it is where they are about as good.
    #[serde(default)]
    pub second: Option<second::Config>,
}

/// One route.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[schemars(rename = "SemanticRoute")]
#[serde(deny_unknown_fields)]
pub struct RouteConfig {
    /// Its name, for the record and the header.
    pub name: String,
    /// The model that answers.
    pub model: String,
    /// Prompts that belong here.
    pub examples: Vec<String>,
}

/// A policy with more would take seconds to compile.
const MOST_ROUTES: usize = 500;
const MOST_EXAMPLES: usize = 10_000;

/// Routes that are ready.
#[derive(Debug)]
pub struct Semantic {
    models: Vec<(Arc<str>, Arc<str>)>,
    heads: Heads,
    report: Report,
    places: Vec<String>,
    least_likeness: f32,
    least_margin: f32,
    second: Option<Arc<Second>>,
}

pub(super) fn build(config: &Config, world: &mut World<'_>) -> Result<Semantic, Vec<Wrong>> {
    let mut wrong = wrong(config);
    let routes = || config.routes.iter().map(|route| (route.name.as_str(), route.examples.as_slice()));
    let second = config.second.as_ref().map(|second| second::build(second, routes(), world)).transpose();
    let second = second.unwrap_or_else(|found| {
        wrong.extend(found.into_iter().map(|(path, message)| (format!(".second{path}"), message)));
        None
    });
    if !wrong.is_empty() {
        return Err(wrong);
    }
    let examples =
        Examples::of(config.routes.iter().map(|route| (route.name.as_str(), route.examples.iter().collect())));
    let (heads, report) = examples.trained();
    Ok(Semantic {
        models: config.routes.iter().map(|route| (route.name.as_str().into(), route.model.as_str().into())).collect(),
        least_likeness: config.least_likeness.unwrap_or(heads.least_likeness()),
        least_margin: config.least_margin,
        second: second.map(Arc::new),
        report,
        places: places(config),
        heads,
    })
}

/// Where each example stands in the policy.
fn places(config: &Config) -> Vec<String> {
    let of = |(at, route): (usize, &RouteConfig)| {
        (0..route.examples.len()).map(move |example| format!(".routes[{at}].examples[{example}]"))
    };
    config.routes.iter().enumerate().flat_map(of).collect()
}

fn wrong(config: &Config) -> Vec<Wrong> {
    let mut wrong = Vec::new();
    let mut say = |path: String, message: String| wrong.push((path, message));
    let all: usize = config.routes.iter().map(|route| route.examples.len()).sum();
    match config.routes.len() {
        0 => say(".routes".into(), "is empty: a semantic router needs at least one route".into()),
        many if many > MOST_ROUTES => say(".routes".into(), format!("has {many} routes, {MOST_ROUTES} at most")),
        _ if all > MOST_EXAMPLES => say(".routes".into(), format!("has {all} examples, {MOST_EXAMPLES} at most")),
        _ => {}
    }
    for (at, route) in config.routes.iter().enumerate() {
        for (key, text) in [("name", &route.name), ("model", &route.model)] {
            if text.is_empty() {
                say(format!(".routes[{at}].{key}"), format!("is empty: give the route a {key}"));
            }
        }
        if config.routes[..at].iter().any(|other| other.name == route.name) {
            say(format!(".routes[{at}].name"), format!("{} is the name of an earlier route", route.name));
        }
        if route.examples.is_empty() {
            say(format!(".routes[{at}].examples"), "is empty: give at least five prompts that belong here".into());
        }
    }
    if !config.least_likeness.is_none_or(|least| (-1.0..=2.0).contains(&least)) {
        say(".least_likeness".into(), "must be from 0 to 2".into());
    }
    if !(0.0..=1.0).contains(&config.least_margin) {
        say(".least_margin".into(), "must be from 0 to 1".into());
    }
    wrong
}

impl Semantic {
    /// What is known of the routes before any prompt comes.
    pub fn report(&self) -> &Report {
        &self.report
    }

    /// The heads, to be judged on labelled prompts.
    pub fn heads(&self) -> &Heads {
        &self.heads
    }

    /// The likeness that a prompt needs.
    pub fn least_likeness(&self) -> f32 {
        self.least_likeness
    }

    /// What is chosen for a text with this embedding.
    pub fn choose(&self, text: &Embedding) -> Answer {
        let Some(class) = self.heads.classify(text) else { return Answer::Pass(Why::Unknown) };
        if class.likeness < self.least_likeness {
            return Answer::Pass(Why::OutOfScope(class.likeness, self.least_likeness));
        }
        if class.margin < self.least_margin {
            return Answer::Pass(Why::Unsure(class.margin, self.least_margin));
        }
        let Some((route, model)) = self.models.get(class.index) else {
            return Answer::Pass(Why::Unknown);
        };
        let (model, route) = (Arc::clone(model), Arc::clone(route));
        Answer::Route(Choice { model, route, score: class.score, margin: class.margin })
    }

    /// The two best routes, where they are so near to each other that another service is to say which it is.
    pub fn doubt(&self, answer: &Answer, prompt: &Prompt<'_>) -> Option<Doubt> {
        let margin = match answer {
            Answer::Route(choice) => choice.margin,
            Answer::Pass(Why::Unsure(margin, _)) => *margin,
            Answer::Pass(_) => return None,
        };
        let second = self.second.as_ref().filter(|second| second.decides(margin))?.clone();
        let asked = prompt.asked();
        let ranked = self.heads.ranked(&Embedding::of_parts(asked));
        let mut best =
            ranked.iter().filter_map(|(name, _)| self.models.iter().find(|(route, _)| route == *name).cloned());
        let text = asked.iter().map(|span| span.text).collect::<Vec<_>>().join("\n").into();
        Some(Doubt { second, text, routes: [best.next()?, best.next()?], margin })
    }

    pub(super) fn warnings(&self) -> Vec<Wrong> {
        let route = |label: &str| self.models.iter().position(|(name, _)| &**name == label).unwrap_or_default();
        let few = self.report.few.iter().map(|(label, count)| {
            let message = format!("{count} examples are few: with five or more the route is told better");
            (format!(".routes[{}].examples", route(label)), message)
        });
        let twins = self.report.twins.iter().map(|twins| {
            let [a, b] = &twins.labels;
            let message = format!(
                "{b} is hard to tell from {a} (cosine {:.2}): join them or sharpen their examples",
                twins.cosine
            );
            (format!(".routes[{}]", route(b)), message)
        });
        let unknown = self.report.unknown.iter().map(|at| {
            (self.places[*at].clone(), "nothing in it is known, the vocabulary is English: it is left out".to_owned())
        });
        let strays = self.report.strays.iter().map(|(at, label)| {
            (self.places[*at].clone(), format!("is more like the examples of {label} than those of its own route"))
        });
        few.chain(twins).chain(unknown).chain(strays).collect()
    }
}

impl Router for Semantic {
    fn kind(&self) -> &'static str {
        "semantic"
    }

    fn ask(&self, prompt: &Prompt<'_>) -> Answer {
        self.choose(&Embedding::of_parts(prompt.asked()))
    }

    fn models(&self) -> Vec<Arc<str>> {
        self.models.iter().map(|(_, model)| Arc::clone(model)).collect()
    }

    fn semantic(&self) -> Option<&Semantic> {
        Some(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::router::tests::{asked, built};

    const ROUTES: &str = r#"
        {"name": "code", "model": "coder", "examples": ["write a python function that sorts a list",
          "fix the bug in this javascript loop", "why does my rust program not compile", "explain this sql query",
          "refactor this class into smaller functions"]},
        {"name": "bank", "model": "small", "examples": ["transfer fifty dollars to my savings account",
          "what is my account balance", "how do i pay my credit card bill", "send money to my landlord",
          "show my recent transactions"]}"#;

    fn router(more: &str) -> Vec<super::super::Built> {
        built(&format!(r#"[{{"semantic": {{"routes": [{ROUTES}]{more}}}}}]"#)).unwrap()
    }

    #[test]
    fn a_prompt_goes_to_the_model_of_its_route() {
        let router = &router("")[0].router;
        for (text, model) in
            [("implement quicksort in c++", "coder"), ("move 20 euros to my checking account", "small")]
        {
            let Answer::Route(choice) = asked(router.as_ref(), text) else { panic!("{text} passes") };
            assert_eq!(&*choice.model, model);
            assert!(choice.score > 0.5 && choice.margin > 0.0);
        }
    }

    #[test]
    fn what_belongs_nowhere_passes_and_says_why() {
        let ask = |more: &str, text: &str| asked(router(more)[0].router.as_ref(), text);
        assert_eq!(ask("", ""), Answer::Pass(Why::Unknown));
        assert!(matches!(ask("", "who painted the mona lisa"), Answer::Pass(Why::OutOfScope(is, least)) if is < least));
        assert!(matches!(ask(r#","least_likeness": 2"#, "fix my code"), Answer::Pass(Why::OutOfScope(_, 2.0))));
        let torn = r#","least_likeness": -1, "least_margin": 0.999"#;
        assert!(matches!(ask(torn, "what is it"), Answer::Pass(Why::Unsure(_, 0.999))));
    }

    #[test]
    fn only_what_is_asked_now_counts() {
        use crate::prompt::{Role, Span};
        let span = |role, turn, text| Span { role, turn, text };
        let spans = [
            span(Role::System, 0, "you are a bank's assistant, show balances and transfer money"),
            span(Role::User, 1, "what is my account balance"),
            span(Role::Assistant, 2, "your account balance is ten dollars"),
            span(Role::User, 3, "now write a python function"),
            span(Role::User, 3, "that sorts a list"),
        ];
        let answer = router("")[0].router.ask(&Prompt { spans: &spans, ..Prompt::default() });
        assert!(matches!(answer, Answer::Route(choice) if &*choice.model == "coder"));
    }

    #[test]
    fn what_is_wrong_is_said_with_its_place() {
        let json = r#"[{"semantic": {"least_margin": 2, "routes": [
            {"name": "a", "model": "m", "examples": ["hello"]}, {"name": "a", "model": "", "examples": []}]}},
            {"semantic": {"routes": []}}]"#;
        let paths: Vec<String> = built(json).unwrap_err().into_iter().map(|(path, _)| path).collect();
        assert_eq!(
            paths,
            [
                "[0].semantic.routes[1].model",
                "[0].semantic.routes[1].name",
                "[0].semantic.routes[1].examples",
                "[0].semantic.least_margin",
                "[1].semantic.routes",
            ]
        );
    }

    #[test]
    fn check_warns_of_routes_that_will_not_work() {
        let json = format!(
            r#"[{{"semantic": {{"routes": [{ROUTES}, {{"name": "dev", "model": "m", "examples": [
            "write a python function that sorts a list", "fix the bug in this javascript loop",
            "why does my rust program not compile", "explain this sql query", "refactor this class into smaller functions"]}},
            {{"name": "tiny", "model": "m", "examples": ["sing a song for my cat", "яяяяяяяяяя"]}}]}}}}]"#
        );
        let warnings = built(&json).unwrap().remove(0).warnings;
        let has = |path: &str, words: &str| warnings.iter().any(|(at, said)| at == path && said.contains(words));
        assert!(has("[0].semantic.routes[2]", "dev is hard to tell from code"), "{warnings:?}");
        assert!(has("[0].semantic.routes[3].examples", "are few"), "{warnings:?}");
        assert!(router("")[0].warnings.iter().all(|(path, _)| path.contains(".examples[")), "strays at most");
    }
}
