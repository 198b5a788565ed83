//! Tenants: who pays, and what they may use. What a tenant may, those above it may too.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use infergate_plugins::operation::Operation;

use super::problem::nearest;
use super::{Compiler, Models, Route, file, fits};
use crate::limits::Limit;
use crate::parameters::{Parameters, User};
use crate::pool::Pool;
use crate::scan::Field;
use crate::surface;

/// One tenant, with all that those above it say.
#[derive(Debug)]
pub struct Tenant {
    /// Its name.
    pub name: Arc<str>,
    /// The lists of models of it and of those above it that have one. A model must be in each.
    models: Vec<Vec<Pattern>>,
    /// The same for paths.
    surfaces: Vec<HashSet<String>>,
    /// The same for regions.
    regions: Vec<HashSet<String>>,
    /// Its limits and those of them above it: all hold.
    pub limits: Vec<Arc<Limit>>,
    /// The most tokens that an answer may have.
    pub output_tokens_max: Option<u64>,
    /// Its share of a full pool's places.
    pub share: u32,
    /// What its requests may ask of a model, if anything is said about that.
    pub parameters: Option<Parameters>,
    /// Whether what it spends has a metric of its own.
    pub is_measured: bool,
}

/// All tenants by name.
pub type Tenants = HashMap<Arc<str>, Arc<Tenant>>;

/// A name, or what stands before and behind its star.
#[derive(Debug)]
pub enum Pattern {
    /// This name.
    Exact(String),
    /// Any that begins and ends so.
    Star(String, String),
}

impl Pattern {
    /// Reads a name in which one star may stand.
    pub fn new(text: &str) -> Self {
        match text.split_once('*') {
            Some((before, behind)) => Self::Star(before.to_owned(), behind.to_owned()),
            None => Self::Exact(text.to_owned()),
        }
    }

    /// Whether `name` fits it.
    pub fn takes(&self, name: &str) -> bool {
        match self {
            Self::Exact(exact) => exact == name,
            Self::Star(before, behind) => fits(name, before, behind),
        }
    }
}

impl Tenant {
    /// Whether it may use what is served at `path`: a row of the table of endpoints, or a path that passes through.
    pub fn may_ask(&self, path: &str) -> bool {
        self.surfaces.iter().all(|list| list.contains(path))
    }

    /// Whether what it asks may not go everywhere.
    pub fn is_bound(&self) -> bool {
        !self.regions.is_empty()
    }

    /// Whether what it asks may go to this pool.
    pub fn may_reach(&self, pool: &Pool) -> bool {
        self.regions.iter().all(|list| pool.region.as_deref().is_some_and(|region| list.contains(region)))
    }

    /// Whether some pool of `route` that can do `operation` is where its requests may go.
    pub fn reaches(&self, route: &Route, operation: Operation) -> bool {
        route.stages.iter().any(|stage| stage.pool.serves(operation) && self.may_reach(&stage.pool))
    }

    /// Whether its lists have this name.
    pub fn names(&self, model: &str) -> bool {
        self.models.iter().all(|list| has(list, model))
    }

    /// Whether it may use the entry `route` by the name `asked`: where a list has the entry's name, its aliases go
    /// with it. A name that the entry does not know goes to the upstream as it is, so the lists must have both.
    pub fn may_use(&self, route: &Route, asked: Option<&str>) -> bool {
        self.models.iter().all(|list| {
            let entry = has(list, &route.model.name);
            match asked {
                None => entry,
                Some(name) if route.knows(name) => entry || has(list, name),
                Some(name) => entry && has(list, name),
            }
        })
    }
}

fn has(list: &[Pattern], name: &str) -> bool {
    list.iter().any(|pattern| pattern.takes(name))
}

impl Compiler<'_> {
    pub(super) fn tenants(&mut self, file: &file::File, models: &Models) -> Tenants {
        let mut limits = HashMap::new();
        for (name, tenant) in &file.tenants {
            self.tenant(name, tenant, file, models);
            let path = format!("tenants.{name}.limits");
            limits.insert(name.as_str(), self.limits(&path, Some(name), &tenant.limits, file, models));
        }
        let names: Vec<&String> = file.tenants.keys().collect();
        let built = names.into_iter().map(|name| {
            Arc::new(Tenant {
                is_measured: file.telemetry.tenants.contains(name),
                ..built(name, &file.tenants, &limits)
            })
        });
        built.map(|tenant| (tenant.name.clone(), tenant)).collect()
    }

    /// The tenants whose text is captured.
    pub(super) fn captured_tenants(&mut self, file: &file::File) {
        for (index, name) in file.audit.capture.tenants.iter().flatten().enumerate() {
            self.known_tenant(&format!("audit.capture.tenants[{index}]"), name, file);
        }
    }

    /// The tenants whose cost is measured: they are there, and they are not too many for a metric.
    pub(super) fn measured_tenants(&mut self, file: &file::File) {
        const MOST: usize = 100;
        for (index, name) in file.telemetry.tenants.iter().enumerate() {
            self.known_tenant(&format!("telemetry.tenants[{index}]"), name, file);
        }
        if file.telemetry.tenants.len() > MOST {
            self.wrong("telemetry.tenants", format!("a metric has room for {MOST} tenants: name those that matter"));
        }
    }

    fn known_tenant(&mut self, path: &str, name: &str, file: &file::File) {
        if !file.tenants.contains_key(name) {
            let hint = nearest(name, file.tenants.keys().map(String::as_str));
            self.wrong(path, format!("no tenant is named {name}{hint}"));
        }
    }

    fn tenant(&mut self, name: &str, tenant: &file::Tenant, file: &file::File, models: &Models) {
        let path = format!("tenants.{name}");
        if name.is_empty() || name.len() > 128 || name.chars().any(char::is_control) {
            self.wrong(&path, "a tenant's name has 1 to 128 characters that can be seen");
        }
        if let Some(parent) = &tenant.parent {
            if !file.tenants.contains_key(parent) {
                let hint = nearest(parent, file.tenants.keys().map(String::as_str));
                self.wrong(&format!("{path}.parent"), format!("no tenant is named {parent}{hint}"));
            } else if line(name, &file.tenants).is_none() {
                self.wrong(&format!("{path}.parent"), format!("{name} would stand above itself, by way of {parent}"));
            }
        }
        for (index, model) in tenant.models.iter().flatten().enumerate() {
            self.listed_model(&format!("{path}.models[{index}]"), model, file, models);
        }
        for (index, surface) in tenant.surfaces.iter().flatten().enumerate() {
            self.listed_surface(&format!("{path}.surfaces[{index}]"), surface, file);
        }
        for (index, region) in tenant.regions.iter().flatten().enumerate() {
            self.known_region(&format!("{path}.regions[{index}]"), region, file);
        }
        if let Some(parameters) = &tenant.parameters {
            self.tenant_parameters(&format!("{path}.parameters"), parameters);
        }
    }

    fn known_region(&mut self, path: &str, region: &str, file: &file::File) {
        let mut known = file.pools.values().filter_map(|pool| pool.region.as_deref());
        if !known.clone().any(|known| known == region) {
            let hint = nearest(region, &mut known);
            self.wrong(path, format!("no pool has the region {region}{hint}"));
        }
    }

    fn tenant_parameters(&mut self, path: &str, parameters: &file::Parameters) {
        for (index, name) in parameters.forbid.iter().enumerate() {
            if name.is_empty() || !name.bytes().all(|byte| byte.is_ascii_graphic()) {
                self.wrong(&format!("{path}.forbid[{index}]"), "this is no name of a field");
            }
        }
        for name in parameters.defaults.keys() {
            let decided = Field::named(name.as_bytes()).is_some() || CONTENT.contains(&name.as_str());
            if decided || name.is_empty() {
                let message = format!("{name} can have no default: the gateway decides by what the caller sends");
                self.wrong(&format!("{path}.defaults.{name}"), message);
            }
        }
    }

    pub(super) fn listed_model(&mut self, path: &str, name: &str, file: &file::File, models: &Models) {
        if name.matches('*').count() > 1 {
            return self.wrong(path, format!("{name}: only one * is understood"));
        }
        let passes = file.passthrough.iter().any(|entry| entry.path == name);
        let passes = passes || file.routers.contains_key(name);
        let known = name.contains('*') || passes || models.default.is_some() || models.named(name).is_some();
        // An entry that is wrong itself is told there.
        if !known && !file.models.iter().any(|model| model.name == name || model.aliases.iter().any(|a| a == name)) {
            let hint = nearest(name, models.exact.keys().map(String::as_str));
            self.wrong(path, format!("no model is named {name}{hint}"));
        }
    }

    pub(super) fn listed_surface(&mut self, path: &str, surface: &str, file: &file::File) {
        let passing = file.passthrough.iter().map(|entry| entry.path.as_str());
        let mut known = surface::TABLE.iter().map(|row| row.path).chain(passing.clone());
        if !known.any(|known| known == surface) {
            let hint = nearest(surface, surface::TABLE.iter().map(|row| row.path).chain(passing));
            self.wrong(path, format!("nothing is served at {surface}{hint}"));
        }
    }
}

/// What a request is about.
const CONTENT: [&str; 7] = ["messages", "prompt", "input", "inputs", "instructions", "system", "metadata"];

/// What holds for the first tenant of a line, those above it included.
fn parameters(line: &[&file::Tenant]) -> Option<Parameters> {
    let said: Vec<&file::Parameters> = line.iter().filter_map(|tenant| tenant.parameters.as_ref()).collect();
    let user = said.iter().rev().find_map(|said| said.user.clone());
    let defaults = said.iter().rev().flat_map(|said| &said.defaults);
    (!said.is_empty()).then(|| Parameters {
        forbid: said.iter().flat_map(|said| said.forbid.iter().cloned()).collect(),
        user: user.map(|user| if user == "caller" { User::Caller } else { User::Fixed(user) }),
        defaults: defaults.map(|(name, value)| (name.clone(), value.to_string())).collect(),
    })
}

/// `name` and those above it, itself first; `None` if it stands above itself.
fn line<'a>(name: &'a str, tenants: &'a BTreeMap<String, file::Tenant>) -> Option<Vec<(&'a str, &'a file::Tenant)>> {
    let mut line = Vec::new();
    let mut next = Some(name);
    while let Some((name, tenant)) = next.and_then(|name| Some((name, tenants.get(name)?))) {
        if line.len() == tenants.len() {
            return None;
        }
        line.push((name, tenant));
        next = tenant.parent.as_deref();
    }
    Some(line)
}

fn built(name: &str, tenants: &BTreeMap<String, file::Tenant>, limits: &HashMap<&str, Vec<Arc<Limit>>>) -> Tenant {
    let line = line(name, tenants).unwrap_or_default();
    let patterns = |list: &Vec<String>| list.iter().map(|text| Pattern::new(text)).collect();
    let surfaces = |tenant: &file::Tenant| Some(tenant.surfaces.as_ref()?.iter().cloned().collect());
    Tenant {
        parameters: parameters(&line.iter().map(|(_, tenant)| *tenant).collect::<Vec<_>>()),
        name: name.into(),
        models: line.iter().filter_map(|(_, tenant)| tenant.models.as_ref().map(patterns)).collect(),
        surfaces: line.iter().filter_map(|(_, tenant)| surfaces(tenant)).collect(),
        regions: line
            .iter()
            .filter_map(|(_, tenant)| Some(tenant.regions.as_ref()?.iter().cloned().collect()))
            .collect(),
        limits: line.iter().filter_map(|(name, _)| limits.get(name)).flatten().cloned().collect(),
        share: line.first().and_then(|(_, tenant)| tenant.share).unwrap_or(1),
        output_tokens_max: line.iter().filter_map(|(_, tenant)| tenant.output_tokens_max).min(),
        is_measured: false,
    }
}

#[cfg(test)]
mod tests {
    use crate::parameters::User;
    use crate::policy::tests::{POOLS, compiled, problems};

    const MODELS: &str = "models:\n  - {name: llama-3, pool: fast, aliases: [four]}\n  - {name: 'gpt-*', pool: slow}\n";

    #[test]
    fn lists_narrow_downwards_and_none_allows_all() {
        let text = format!(
            "{POOLS}{MODELS}tenants:\n  top: {{models: ['gpt-*', llama-3], surfaces: [/v1/chat/completions, /v1/embeddings]}}\n  mid: {{parent: top}}\n  low: {{parent: mid, models: ['gpt-4*', four], surfaces: [/v1/embeddings, /v1/messages]}}\n  none: {{parent: top, models: [], surfaces: []}}\n  free: {{}}\n"
        );
        let policy = compiled(&text).unwrap();
        let may = |tenant: &str, model: &str| {
            let route = policy.route(Some(model)).unwrap();
            policy.tenants[tenant].may_use(route, Some(model))
        };
        let table = [
            ("top", [true, true, true]),
            ("mid", [true, true, true]),
            ("low", [true, false, false]),
            ("none", [false; 3]),
            ("free", [true; 3]),
        ];
        for (tenant, expected) in table {
            assert_eq!(["gpt-4o", "gpt-5", "llama-3"].map(|model| may(tenant, model)), expected, "{tenant}");
        }
        assert!(may("low", "four"), "by the alias that is listed, though not by the name");
        assert!(may("mid", "four"), "an alias goes with its entry");
        let asks = |tenant: &str| {
            ["/v1/chat/completions", "/v1/embeddings", "/v1/messages"].map(|path| policy.tenants[tenant].may_ask(path))
        };
        assert_eq!(
            [asks("mid"), asks("low"), asks("none"), asks("free")],
            [[true, true, false], [false, true, false], [false; 3], [true; 3]]
        );
    }

    #[test]
    fn the_default_model_lets_nobody_around_the_list() {
        let text = format!(
            "{POOLS}{MODELS}default_model: llama-3\ntenants: {{t: {{models: [llama-3]}}, u: {{models: [llama-3, else]}}}}\n"
        );
        let policy = compiled(&text).unwrap();
        let may =
            |tenant: &str, asked: Option<&str>| policy.tenants[tenant].may_use(policy.route(asked).unwrap(), asked);
        assert!(may("t", None) && may("t", Some("llama-3")) && !may("t", Some("gpt-4")));
        assert!(!may("t", Some("else")), "the upstream would get this name");
        assert!(may("u", Some("else")));
    }

    #[test]
    fn parameters_narrow_downwards() {
        let text = format!(
            "{POOLS}{MODELS}tenants:\n  top: {{parameters: {{forbid: [tools], user: caller, defaults: {{temperature: 0.20, seed: 1}}}}}}\n  mid: {{parent: top}}\n  low: {{parent: mid, parameters: {{forbid: [logit_bias], user: me, defaults: {{temperature: 1}}}}}}\n  free: {{}}\n"
        );
        let policy = compiled(&text).unwrap();
        let of = |tenant: &str| policy.tenants[tenant].parameters.clone();
        assert_eq!((of("mid"), of("free")), (of("top"), None));
        let low = of("low").unwrap();
        assert_eq!(low.forbid.iter().map(String::as_str).collect::<Vec<_>>(), ["logit_bias", "tools"]);
        assert_eq!(low.user, Some(User::Caller), "what those above say comes first");
        assert_eq!((low.defaults["temperature"].as_str(), low.defaults["seed"].as_str()), ("1", "1"));
        assert_eq!(of("top").unwrap().defaults["temperature"], "0.2");
        let told = problems(&format!(
            "{POOLS}tenants:\n  t:\n    parameters:\n      forbid: ['']\n      defaults:\n        max_tokens: 5\n        messages: []\n"
        ));
        let places = [
            "policy.yaml:8:16: tenants.t.parameters.forbid[0]: ",
            "policy.yaml:10:9: tenants.t.parameters.defaults.max_tokens: ",
            "policy.yaml:11:9: ",
        ];
        assert!(told.len() == 3 && told.iter().zip(places).all(|(told, place)| told.starts_with(place)), "{told:#?}");
    }

    #[test]
    fn a_tenant_whose_text_is_captured_is_there() {
        let told =
            problems(&format!("{POOLS}tenants: {{legal: {{}}}}\naudit: {{capture: {{tenants: [legal, legl]}}}}\n"));
        assert_eq!(told.len(), 1);
        assert!(told[0].contains("audit.capture.tenants[1]: no tenant is named legl; did you mean legal?"), "{told:?}");
    }

    #[test]
    fn a_tenant_whose_cost_is_measured_is_there_and_one_of_a_hundred() {
        let told = problems(&format!("{POOLS}tenants: {{legal: {{}}}}\ntelemetry: {{tenants: [legal, legl]}}\n"));
        assert!(told.len() == 1 && told[0].contains("telemetry.tenants[1]: no tenant is named legl"), "{told:?}");
        let (all, list): (String, String) = (0..101).map(|n| (format!("t{n}: {{}}, "), format!("t{n}, "))).unzip();
        let told = problems(&format!("{POOLS}tenants: {{{all}}}\ntelemetry: {{tenants: [{list}]}}\n"));
        assert!(told.len() == 1 && told[0].contains("room for 100 tenants"), "{told:?}");
        let policy = compiled(&format!("{POOLS}tenants: {{a: {{}}, b: {{}}}}\ntelemetry: {{tenants: [b]}}\n")).unwrap();
        assert_eq!(["a", "b"].map(|name| policy.tenants[name].is_measured), [false, true]);
    }

    #[test]
    fn wrong_tenants_are_told_at_their_lines() {
        let text = format!(
            "{POOLS}{MODELS}tenants:\n  a: {{parent: b}}\n  b: {{parent: c}}\n  c: {{parent: a}}\n  d: {{parent: d}}\n  e: {{parent: aa}}\n  f: {{models: [lama-3, '*-*-*', 'x-*', four]}}\n  g: {{surfaces: [/v1/chat/completion, /v1/messages]}}\n"
        );
        let told = problems(&text);
        let expected = [
            "policy.yaml:9:7: tenants.a.parent: a would stand above itself, by way of b",
            "policy.yaml:10:7: tenants.b.parent: b would stand above itself, by way of c",
            "policy.yaml:11:7: tenants.c.parent: c would stand above itself, by way of a",
            "policy.yaml:12:7: tenants.d.parent: d would stand above itself, by way of d",
            "policy.yaml:13:7: tenants.e.parent: no tenant is named aa; did you mean a?",
            "policy.yaml:14:16: tenants.f.models[0]: no model is named lama-3; did you mean llama-3?",
            "policy.yaml:14:24: tenants.f.models[1]: *-*-*: only one * is understood",
            "policy.yaml:15:18: tenants.g.surfaces[0]: nothing is served at /v1/chat/completion; did you mean /v1/chat/completions?",
        ];
        assert_eq!(told, expected);
    }
}
