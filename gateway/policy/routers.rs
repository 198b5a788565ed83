//! From virtual models as they are written to those that choose. Training happens here, away from the threads that carry
//! requests.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use http::HeaderName;
use infergate_plugins::router;
use sha2::Digest;

use super::guardrails::beside;
use super::problem::nearest;
use super::{Compiler, Models, Naming, Route, Stage, file};
use crate::routers::Routers;
use crate::tokens::Tokenizer;

impl Compiler<'_> {
    /// Adds the virtual models to those that are served.
    pub(super) fn routers(&mut self, file: &file::File, models: &mut Models) {
        let mut built = Vec::new();
        for (name, written) in &file.routers {
            let path = format!("routers.{name}");
            self.router_name(&path, name, file, models);
            let known = self.candidates(&path, written, file, models);
            let routers = self.built_routers(&path, name, written, known);
            built.extend(routers.map(|routers| (name, self.virtual_route(name, written, routers))));
        }
        // Only now, so that none finds another one.
        for (name, route) in built {
            models.add(name, route);
        }
    }

    fn router_name(&mut self, path: &str, name: &str, file: &file::File, models: &Models) {
        let is_taken = file.models.iter().any(|model| model.name == name) || models.exact.contains_key(name);
        if is_taken {
            self.wrong(path, format!("{name} is the name of a model already"));
        }
        if name.is_empty() || name.contains('*') {
            self.wrong(path, "a virtual model has a name, and no * in it");
        }
    }

    /// The models that may be chosen, if all are there.
    fn candidates(
        &mut self,
        path: &str,
        written: &file::VirtualModel,
        file: &file::File,
        models: &Models,
    ) -> Option<HashMap<Arc<str>, Arc<Route>>> {
        let asked = written.ask.iter().enumerate();
        let asked = asked.flat_map(|(at, config)| {
            config.models().into_iter().map(move |(key, model)| (format!("{path}.ask[{at}]{key}"), model))
        });
        let cascade = written.cascade.iter().flat_map(|cascade| cascade.models.iter().enumerate());
        let cascade = cascade.map(|(at, model)| (format!("{path}.cascade.models[{at}]"), model.as_str()));
        let default = std::iter::once((format!("{path}.default"), written.default.as_str()));
        let all = default.chain(asked).chain(cascade);
        let mut known = Some(HashMap::new());
        for (place, name) in all {
            match self.candidate(&place, name, file, models) {
                Some(route) => known.iter_mut().for_each(|known| _ = known.insert(name.into(), route.clone())),
                None => known = None,
            }
        }
        known
    }

    fn candidate(&mut self, path: &str, name: &str, file: &file::File, models: &Models) -> Option<Arc<Route>> {
        if self.is_no_router(path, name, file) {
            return None;
        }
        let found = models.named(name).filter(|_| !name.contains('*')).cloned();
        // An entry that is wrong itself is told there.
        if found.is_none() && !file.models.iter().any(|model| model.name == name && !name.contains('*')) {
            let hint = nearest(name, models.exact.keys().map(String::as_str));
            self.wrong(path, format!("no model is named {name}{hint}; name one of `models`"));
        }
        found
    }

    /// A model is asked for, and not a name that leaves it open. Returns whether that is wrong.
    pub(super) fn is_no_router(&mut self, path: &str, name: &str, file: &file::File) -> bool {
        let wrong = file.routers.contains_key(name);
        if wrong {
            let message = format!("{name} is one of `routers`, and leaves the model open: name one of `models`");
            self.wrong(path, message);
        }
        wrong
    }

    fn built_routers(
        &mut self,
        path: &str,
        name: &str,
        written: &file::VirtualModel,
        known: Option<HashMap<Arc<str>, Arc<Route>>>,
    ) -> Option<Routers> {
        let session_header = written.session_header.as_ref().map(|header| header.parse::<HeaderName>());
        if let (Some(Err(_)), Some(header)) = (&session_header, &written.session_header) {
            self.wrong(&format!("{path}.session_header"), format!("{header} is no header name"));
        }
        let (mut read, directory) = (Vec::new(), self.directory.clone());
        let mut open = |path: &Path| {
            let (path, text) = beside(directory.as_deref(), path)?;
            read.push((path, text.clone()));
            Ok(text)
        };
        let mut secret = |source: &_| self.resolve(source);
        let built = router::build(&written.ask, &mut router::World { file: &mut open, secret: &mut secret });
        for (path, text) in read {
            self.secrets.update(&text);
            self.secret_files.push(path);
        }
        let built = built.map_err(|wrongs| {
            for (key, message) in wrongs {
                self.wrong(&format!("{path}.ask{key}"), message);
            }
        });
        let cascade = written.cascade.as_ref().map(router::cascade::build).transpose().map_err(|wrongs| {
            for (key, message) in wrongs {
                self.wrong(&format!("{path}.cascade{key}"), message);
            }
        });
        if written.ask.is_empty() && written.cascade.is_none() {
            self.wrong(path, "nothing decides: give it `ask`, or `cascade`");
        }
        let (built, cascade) = (built.ok()?, cascade.ok()?);
        for (key, message) in built.iter().flat_map(|built| &built.warnings) {
            let warning = self.document.problem(&format!("{path}.ask{key}"), message);
            self.warnings.push(warning);
        }
        let ask: Vec<Arc<dyn router::Router>> = built.into_iter().map(|built| built.router).collect();
        Some(Routers {
            name: name.into(),
            counts: ask.iter().any(|router| ["signals", "cel"].contains(&router.kind())),
            headers: ask.iter().flat_map(|router| router.headers()).cloned().collect(),
            ask,
            default: written.default.as_str().into(),
            models: known?,
            cascade: cascade.map(Arc::new),
            keep: written.keep,
            session_header: session_header.and_then(Result::ok),
        })
    }

    /// The entry for the name itself: where it may go, the default's pools first.
    fn virtual_route(&self, name: &str, written: &file::VirtualModel, routers: Routers) -> Arc<Route> {
        let default = routers.models.get(&routers.default);
        let others = routers.candidates().filter_map(|name| routers.models.get(name));
        let mut stages: Vec<Stage> = Vec::new();
        for stage in default.into_iter().chain(others).flat_map(|route| &route.stages) {
            if !stages.iter().any(|known| Arc::ptr_eq(&known.pool, &stage.pool)) {
                stages.push(Stage { pool: stage.pool.clone(), naming: Naming::AsAsked, on: Vec::new() });
            }
        }
        let model = file::Model {
            name: name.to_owned(),
            aliases: Vec::new(),
            pool: stages.first().map(|stage| stage.pool.name.to_string()).unwrap_or_default(),
            rename: None,
            fallbacks: Vec::new(),
            priority: None,
            tokenizer: Tokenizer::Auto,
            description: written.description.clone(),
        };
        let mut route = Route::new(stages, None, model, self.world.state.density(name));
        if let Some(route) = Arc::get_mut(&mut route) {
            route.verdict = routers.candidates().map(|name| &**name).collect::<Vec<_>>().join(", ").into();
            route.routers = Some(Arc::new(routers));
        }
        route
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use infergate_plugins::operation::Operation;

    use crate::policy::Policy;
    use crate::policy::tests::{POOLS, compiled, problems};
    use crate::routers::Whose;
    use crate::routers::conversations::Conversations;
    use crate::text::Reading;

    const MODELS: &str = "models:\n  - {name: small, pool: fast}\n  - {name: big, pool: slow, aliases: [large]}\n";
    const ROUTES: &str = "      - semantic:\n          routes:\n            - {name: code, model: large, examples: [write a python function that sorts a list, fix the bug in this javascript loop, why does my rust program not compile, explain this sql query, refactor this class]}\n            - {name: bank, model: small, examples: [transfer fifty dollars to my savings, what is my account balance, how do i pay my credit card bill, send money to my landlord, show my transactions]}\n";

    fn auto(more: &str) -> String {
        format!("{POOLS}{MODELS}routers:\n  auto:\n    default: small\n    ask:\n{ROUTES}{more}")
    }

    fn fingerprint(policy: &Policy) -> u64 {
        let routers = policy.route(Some("auto")).unwrap().routers.clone().unwrap();
        routers.ask[0].semantic().unwrap().heads().fingerprint()
    }

    #[test]
    fn the_same_policy_decides_by_the_same_numbers() {
        let (one, two) = (compiled(&auto("")).unwrap(), compiled(&auto("")).unwrap());
        assert_eq!(fingerprint(&one), fingerprint(&two));
        let other = compiled(&auto("").replace("explain this sql query", "explain that query")).unwrap();
        assert_ne!(fingerprint(&one), fingerprint(&other));
    }

    #[test]
    fn a_virtual_model_is_listed_with_the_pools_it_may_come_to_the_defaults_first() {
        let policy = compiled(&format!("{}default_model: auto\n", auto(""))).unwrap();
        let route = policy.route(None).unwrap();
        let pools: Vec<&str> = route.stages.iter().map(|stage| &*stage.pool.name).collect();
        assert_eq!((pools, &*route.verdict), (vec!["fast", "slow"], "small, large"));
        assert!(policy.listed().iter().any(|(name, of)| name == "auto" && Arc::ptr_eq(of, route)));
    }

    #[test]
    fn everything_wrong_with_a_virtual_model_is_told_at_its_line() {
        let text = format!(
            "{POOLS}{MODELS}limits: [{{tokens: 5, per: 1m, models: [auto], on_exhausted: {{use: auto}}}}]\nrouters:\n  auto:\n    default: smal\n    session_header: 'a b'\n    ask:\n      - {{}}\n      - signals: {{model: other, code: true}}\n      - difficulty:\n          weak: small\n          strong: nobody\n  other: {{default: other, ask: [{{signals: {{model: small}}}}]}}\n  big: {{default: small, ask: [{{signals: {{model: small, code: true}}}}]}}\n  'x*': {{default: small, ask: [{{signals: {{model: small, code: true}}}}]}}\n"
        );
        let told = problems(&text);
        for (place, words) in [
            ("8:", "limits[0].models[0]: auto is one of `routers`"),
            ("8:", "limits[0].on_exhausted.use: auto is one of `routers`"),
            ("11:5: ", "routers.auto.default: no model is named smal; did you mean small?"),
            ("12:5: ", "routers.auto.session_header: a b is no header name"),
            ("14:9: ", "routers.auto.ask[0]: give exactly one of"),
            ("15:19: ", "routers.auto.ask[1].signals.model: other is one of `routers`"),
            ("18:11: ", "routers.auto.ask[2].difficulty.strong: no model is named nobody"),
            ("19:11: ", "routers.other.default: other is one of `routers`"),
            ("19:", "routers.other.ask[0].signals: holds for every prompt"),
            ("20:3: ", "routers.big: big is the name of a model already"),
            ("21:3: ", "has a name, and no * in it"),
        ] {
            let is = |line: &String| line.starts_with(&format!("policy.yaml:{place}")) && line.contains(words);
            assert!(told.iter().any(is), "{place}{words} is not in {told:#?}");
        }
    }

    #[test]
    fn who_cannot_do_what_is_asked_is_passed_over() {
        let policy = compiled(&auto("").replace("'http://127.0.0.1:2'", "'http://127.0.0.1:2', provider: anthropic"));
        let routers = policy.unwrap().route(Some("auto")).unwrap().routers.clone().unwrap();
        let body = br#"{"messages":[{"role":"user","content":"explain this sql query"}]}"#;
        let decide = |operation| {
            routers.decide(&Reading::of(operation, body.as_slice()), &Conversations::default(), &Whose::default())
        };
        assert_eq!(&*decide(Operation::Messages).model, "large");
        let passed = decide(Operation::Chat);
        assert_eq!((&*passed.model, passed.why.as_str()), ("small", "semantic: large cannot do this"));
    }

    #[test]
    fn what_works_and_is_not_good_is_a_warning() {
        let policy = compiled(&auto("            - {name: tiny, model: small, examples: [sing a song for my cat]}\n"));
        let warnings = policy.unwrap().warnings;
        let few = warnings.iter().find(|warning| warning.path.ends_with("routes[2].examples")).unwrap();
        assert!(few.message.contains("few") && few.place.is_some(), "{few:?}");
    }
}
