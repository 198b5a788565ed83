//! From virtual models as they are written to those that choose. Training happens here, away from the threads that carry
//! requests.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use http::HeaderName;
use infergate_plugins::router::{self, effort, score};

use super::authenticators::claims_that_rules_name;
use super::problem::nearest;
use super::{Compiler, Models, Naming, Route, Stage, file};
use crate::money::book::Book;
use crate::pool::Pool;
use crate::routers::Routers;
use crate::routers::shortlist::{Listed, Shortlist};
use crate::tokens::Tokenizer;

/// Where candidates are served, by the names that decisions have for them.
type Known = HashMap<Arc<str>, Arc<Route>>;

impl Compiler<'_> {
    /// Adds the virtual models to those that are served.
    pub(super) fn routers(
        &mut self,
        file: &file::File,
        models: &mut Models,
        pools: &BTreeMap<String, Arc<Pool>>,
        prices: Option<&Arc<Book>>,
    ) {
        let claims = claims_that_rules_name(file);
        let mut built = Vec::new();
        for (name, written) in &file.routers {
            let path = format!("routers.{name}");
            self.router_name(&path, name, file, models);
            let known = self.candidates(&path, written, file, models);
            let shortlists = self.shortlists(&path, written, (file, models), known.as_ref(), prices);
            let routers = self.built_routers(&path, (name, written), &claims, known, shortlists);
            self.somebody_has_claims(&path, written, file);
            self.pools_of_seconds(&path, written, pools);
            built.extend(routers.map(|routers| (name, self.virtual_route(name, written, routers))));
        }
        // Only now, so that none finds another one.
        for (name, route) in built {
            models.add(name, route);
        }
    }

    /// A condition that looks at claims, where nobody comes with a token, hardly ever holds.
    fn somebody_has_claims(&mut self, path: &str, written: &file::VirtualModel, file: &file::File) {
        if file.authenticators.iter().flatten().any(|config| config.jwt.is_some()) {
            return;
        }
        for (at, _) in written.ask.iter().enumerate().filter(|(_, config)| !config.claims().is_empty()) {
            let message = "nobody has any: no authenticator reads tokens (`jwt`)";
            self.warn(&format!("{path}.ask[{at}].cel.claims"), message);
        }
    }

    /// A second stage that stands in a pool has one that can do what it takes.
    fn pools_of_seconds(&mut self, path: &str, written: &file::VirtualModel, pools: &BTreeMap<String, Arc<Pool>>) {
        let named = written.ask.iter().enumerate().filter_map(|(at, config)| Some((at, config.pool()?)));
        for (at, (key, name, (operation, endpoint))) in named {
            let wrong = match pools.get(name) {
                None => format!("no pool is named {name}{}", nearest(name, pools.keys().map(String::as_str))),
                Some(pool) if !pool.serves(operation) => format!("no upstream of the pool {name} serves {endpoint}"),
                Some(_) => continue,
            };
            self.wrong(&format!("{path}.ask[{at}]{key}"), wrong);
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
    ) -> Option<Known> {
        let named = named(path, written).into_iter().filter(|(_, name)| !written.shortlists.contains_key(*name));
        let listed = written.shortlists.iter().flat_map(|(name, list)| {
            let place = move |at: usize| format!("{path}.shortlists.{name}.models[{at}].model");
            list.models.iter().enumerate().map(move |(at, listed)| (place(at), listed.model.as_str()))
        });
        let cascade = written.cascade.iter().flat_map(|cascade| cascade.models.iter().enumerate());
        let cascade = cascade.map(|(at, model)| (format!("{path}.cascade.models[{at}]"), model.as_str()));
        let mut known = Some(HashMap::new());
        for (place, name) in named.chain(listed).chain(cascade) {
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

    /// The shortlists, with all that is wrong with them told.
    fn shortlists(
        &mut self,
        path: &str,
        written: &file::VirtualModel,
        (file, models): (&file::File, &Models),
        known: Option<&Known>,
        prices: Option<&Arc<Book>>,
    ) -> HashMap<Arc<str>, Shortlist> {
        let mut shortlists = HashMap::new();
        for (name, list) in &written.shortlists {
            let path = format!("{path}.shortlists.{name}");
            if models.named(name).is_some() || file.routers.contains_key(name) {
                self.wrong(&path, format!("{name} is the name of a model already: give the shortlist another"));
            }
            if !named("", written).iter().any(|(_, named)| named == name) {
                let unused = "no decision names it: put its name where a model is named, in `ask` or as `default`";
                self.warn(&path, unused);
            }
            for (key, message) in score::wrong(list) {
                self.wrong(&format!("{path}{key}"), message);
            }
            let Some(known) = known else { continue };
            let shortlist = shortlist(name, list, known, prices);
            self.measurable(&path, &shortlist);
            shortlists.insert(shortlist.name.clone(), shortlist);
        }
        shortlists
    }

    /// What is weighed can be measured, of each model wherever it is served.
    fn measurable(&mut self, path: &str, shortlist: &Shortlist) {
        for (at, listed) in shortlist.models.iter().enumerate() {
            let path = format!("{path}.models[{at}]");
            for stage in &listed.route.stages {
                let pool = &stage.pool;
                if shortlist.weights.first_token > 0.0 && !pool.balance.weighs() {
                    let balance = pool.balance.name();
                    let message = format!(
                        "first_token is weighed, and the balance {balance} of the pool {} measures none: choose expected_time",
                        pool.name
                    );
                    self.wrong(&path, message);
                }
                if shortlist.weights.price > 0.0 && !has_price(shortlist, listed, stage) {
                    let message = format!(
                        "price is weighed, and {} has none at the pool {}: give it one under `prices`",
                        listed.model, pool.name
                    );
                    self.wrong(&path, message);
                }
            }
        }
    }

    /// How much models think, by the decision: one that there is.
    fn effort(&mut self, path: &str, written: &file::VirtualModel) -> HashMap<Box<str>, effort::Effort> {
        let steps = written.cascade.iter().flat_map(|cascade| cascade.models.iter().skip(1)).map(String::as_str);
        let asked = written.ask.iter().flat_map(router::Config::decisions);
        let decisions: Vec<&str> = asked.chain(["default"]).chain(steps).collect();
        let mut built = HashMap::new();
        for (decision, config) in &written.effort {
            let path = format!("{path}.effort.{decision}");
            if !decisions.contains(&decision.as_str()) {
                let hint = nearest(decision, decisions.iter().copied());
                self.wrong(&path, format!("no decision is named {decision}{hint}"));
            }
            match effort::build(config) {
                Ok(effort) => _ = built.insert(decision.as_str().into(), effort),
                Err(message) => self.wrong(&path, message),
            }
        }
        built
    }

    fn built_routers(
        &mut self,
        path: &str,
        (name, written): (&str, &file::VirtualModel),
        claims: &[Arc<str>],
        known: Option<Known>,
        shortlists: HashMap<Arc<str>, Shortlist>,
    ) -> Option<Routers> {
        let session_header = written.session_header.as_ref().map(|header| header.parse::<HeaderName>());
        if let (Some(Err(_)), Some(header)) = (&session_header, &written.session_header) {
            self.wrong(&format!("{path}.session_header"), format!("{header} is no header name"));
        }
        let effort = self.effort(path, written);
        let built = self.with_files(|file, secret| router::build(&written.ask, &mut router::World { file, secret }));
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
        let weighs = written.shortlists.contains_key(&written.default);
        if written.ask.is_empty() && written.cascade.is_none() && !weighs {
            self.wrong(path, "nothing decides: give it `ask`, or `cascade`, or a shortlist as its `default`");
        }
        let (built, cascade) = (built.ok()?, cascade.ok()?);
        for (key, message) in built.iter().flat_map(|built| &built.warnings) {
            self.warn(&format!("{path}.ask{key}"), message);
        }
        let ask: Vec<Arc<dyn router::Router>> = built.into_iter().map(|built| built.router).collect();
        let models = known?;
        let can = || models.values().map(|route| route.model.can);
        let lacks = |can: file::Abilities| !(can.images && can.tools && can.structured);
        Some(Routers {
            name: name.into(),
            counts: ask.iter().any(|router| ["signals", "cel"].contains(&router.kind())) || can().any(lacks),
            // Those of all, where one of its own looks at any: what a token says has one room for all of them.
            claims: if ask.iter().any(|router| !router.claims().is_empty()) { claims.to_vec() } else { Vec::new() },
            headers: ask.iter().flat_map(|router| router.headers()).cloned().collect(),
            measures: !shortlists.is_empty() || can().any(|can| can.context_tokens.is_some()),
            ask,
            default: written.default.as_str().into(),
            models,
            cascade: cascade.map(Arc::new),
            keep: written.keep,
            session_header: session_header.and_then(Result::ok),
            shortlists,
            effort,
        })
    }

    /// The entry for the name itself: where it may go, the default's pools first.
    fn virtual_route(&self, name: &str, written: &file::VirtualModel, routers: Routers) -> Arc<Route> {
        let candidates: Vec<Arc<str>> = routers.candidates().cloned().collect();
        let mut stages: Vec<Stage> = Vec::new();
        for stage in candidates.iter().filter_map(|name| routers.models.get(name)).flat_map(|route| &route.stages) {
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
            can: file::Abilities::default(),
            description: written.description.clone(),
        };
        let mut route = Route::new(stages, None, model, self.world.state.density(name));
        if let Some(route) = Arc::get_mut(&mut route) {
            route.verdict = candidates.join(", ").into();
            route.routers = Some(Arc::new(routers));
        }
        route
    }
}

/// What decisions name, with the key of each: a model or a shortlist.
fn named<'a>(path: &str, written: &'a file::VirtualModel) -> Vec<(String, &'a str)> {
    let asked = written.ask.iter().enumerate().flat_map(|(at, config)| {
        config.models().into_iter().map(move |(key, model)| (format!("{path}.ask[{at}]{key}"), model))
    });
    std::iter::once((format!("{path}.default"), written.default.as_str())).chain(asked).collect()
}

fn shortlist(name: &str, list: &score::Config, known: &Known, prices: Option<&Arc<Book>>) -> Shortlist {
    let listed = list.models.iter().filter_map(|listed| {
        let route = known.get(listed.model.as_str())?.clone();
        Some(Listed { model: listed.model.as_str().into(), route, quality: listed.quality.unwrap_or(0.0) })
    });
    let (weights, holds) = (list.weigh, Duration::from_secs(list.held_s));
    Shortlist { name: name.into(), weights, models: listed.collect(), holds, prices: prices.cloned() }
}

/// Whether the model has a price today at each upstream of the stage.
fn has_price(shortlist: &Shortlist, listed: &Listed, stage: &Stage) -> bool {
    let (pool, now) = (&stage.pool, SystemTime::now());
    let Some(book) = &shortlist.prices else { return false };
    pool.upstreams.iter().all(|upstream| {
        let model = stage.other_name(upstream, Some(&listed.model)).unwrap_or(&listed.model);
        book.find(model, &pool.name, upstream.provider.kind(), now).is_some()
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use infergate_plugins::operation::Operation;
    use serde_json::Value;

    use crate::policy::Policy;
    use crate::policy::tests::{POOLS, compiled, problems};
    use crate::routers::Whose;
    use crate::routers::conversations::Conversations;
    use crate::scan;
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
    fn what_is_explained_of_a_token_is_what_a_request_would_have_of_it() {
        let rule = |claims: &str| format!("      - cel: {{model: big, when: \"'x' in claims.z\", claims: {claims}}}\n");
        let other = format!("  other:\n    default: small\n    ask:\n{}", rule("[m, z]"));
        let policy = compiled(&auto(&(rule("[z, b]") + &rule("[z]") + &other))).unwrap();
        let routers = policy.route(Some("auto")).unwrap().routers.clone().unwrap();
        let names: Vec<&str> = routers.claims.iter().map(|name| &**name).collect();
        assert_eq!(names, ["b", "m", "z"], "each once, in the order in which a token's are kept");
        let half = serde_json::json!(vec!["x".repeat(200); 11]);
        let Value::Object(says) = serde_json::json!({"z": half, "m": half, "b": "short"}) else { panic!() };
        let whose = Whose::default().named(None, &[], &says, &routers);
        let kept: Vec<&str> = whose.asker().claims.iter().map(|(name, _)| &**name).collect();
        assert_eq!(kept, ["b", "m"], "another router's have their part of the room");
    }

    #[test]
    fn who_cannot_do_what_is_asked_is_passed_over() {
        let policy = compiled(&auto("").replace("'http://127.0.0.1:2'", "'http://127.0.0.1:2', provider: anthropic"));
        let routers = policy.unwrap().route(Some("auto")).unwrap().routers.clone().unwrap();
        let body = br#"{"messages":[{"role":"user","content":"explain this sql query"}]}"#;
        let scan = scan::json(body).unwrap();
        let decide = |operation| {
            let reading = Reading::of(operation, body.as_slice());
            routers.decide(&reading, &scan, &Conversations::default(), &Whose::default())
        };
        assert_eq!(&*decide(Operation::Messages).model, "large");
        let passed = decide(Operation::Chat);
        assert_eq!((&*passed.model, passed.why.as_str()), ("small", "semantic: large cannot do this"));
    }

    #[test]
    fn a_decision_allocates_no_more_where_a_shortlist_is_not_asked_and_a_handful_where_it_is() {
        let list = "    shortlists: {best: {weigh: {quality: 1}, models: [{model: large, quality: 1}, {model: small, quality: 0}]}}\n";
        let body = br#"{"messages":[{"role":"user","content":"explain this sql query"}]}"#;
        let scan = scan::json(body).unwrap();
        let allocated = |text: &str| {
            let policy = compiled(text).unwrap();
            let routers = policy.route(Some("auto")).unwrap().routers.clone().unwrap();
            let (reading, kept) = (Reading::of(Operation::Chat, body.as_slice()), Conversations::default());
            let decide = || assert_eq!(&*routers.decide(&reading, &scan, &kept, &Whose::default()).model, "large");
            decide();
            allocation_counter::measure(decide).count_total
        };
        let (plain, listed) = (allocated(&auto("")), auto(list));
        assert_eq!(allocated(&listed), plain);
        let weighed = allocated(&listed.replacen("model: large", "model: best", 1));
        assert!(weighed <= plain + 8, "{weighed} and not {plain}");
    }

    #[test]
    fn a_second_stage_stands_in_a_pool_that_there_is_and_that_can_do_it() {
        let second = |pool: &str, shape: &str| {
            auto("").replace(
                "          routes:\n",
                &format!("          second: {{pool: {pool}, shape: {shape}, model: m}}\n          routes:\n"),
            )
        };
        assert!(compiled(&second("slow", "embeddings")).is_ok());
        let told = problems(&second("slwo", "judge"));
        assert!(
            told[0].contains("routers.auto.ask[0].semantic.second.pool: no pool is named slwo; did you mean slow?"),
            "{told:?}"
        );
        let told = problems(
            &second("slow", "embeddings").replace("'http://127.0.0.1:2'", "'http://127.0.0.1:2', provider: anthropic"),
        );
        assert!(
            told.iter().any(|line| line.contains("no upstream of the pool slow serves /v1/embeddings")),
            "{told:?}"
        );
    }

    #[test]
    fn a_shortlist_that_no_decision_names_is_a_warning() {
        let list = "    shortlists: {best: {weigh: {quality: 1}, models: [{model: small, quality: 1}, {model: big, quality: 0}]}}\n";
        let warnings = compiled(&auto(list)).unwrap().warnings;
        assert!(warnings.iter().any(|warning| warning.path == "routers.auto.shortlists.best"), "{warnings:?}");
    }

    #[test]
    fn what_works_and_is_not_good_is_a_warning() {
        let policy = compiled(&auto("            - {name: tiny, model: small, examples: [sing a song for my cat]}\n"));
        let warnings = policy.unwrap().warnings;
        let few = warnings.iter().find(|warning| warning.path.ends_with("routes[2].examples")).unwrap();
        assert!(few.message.contains("few") && few.place.is_some(), "{few:?}");
    }
}
