//! The compiled policy: what the YAML means, immutable, swapped whole, pinned by each request.

mod authenticators;
pub mod file;
mod guardrails;
mod kept;
pub mod key_file;
mod limits;
pub mod prices;
pub mod problem;
pub mod reload;
mod routers;
mod shared;
mod tenants;
mod traces;

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use http::{HeaderName, HeaderValue, Method};
use infergate_plugins::authenticator::Authenticator;
use infergate_plugins::{provider, sink};
use sha2::{Digest, Sha256};

pub use self::authenticators::{OwnKey, OwnKeys, authenticators};
use self::file::{Cause, File};
use self::problem::{Document, Problem, nearest};
pub use self::tenants::{Pattern, Tenant, Tenants};
use crate::guard::Rails;
use crate::limits::Limit;
use crate::limits::density::Density;
use crate::limits::shared::Parameters;
use crate::money::book::Book;
use crate::pool::origin::Origin;
use crate::pool::{Pool, Upstream, breaker, queue, told};
use crate::refusal::{Code, Refusal};
use crate::routers::Routers;
use crate::secret::{self, Secret, SecretSource};
use crate::settings::Settings;
use crate::state::State;
use crate::telemetry::trace::Traces;
use crate::telemetry::{Meters, SpentMeters, Telemetry};
use crate::tokens::Tokenizer;

/// What every request is decided by.
#[derive(Debug)]
pub struct Policy {
    /// SHA-256 of the file and of the secrets it names, in hex: the same hash decides the same.
    pub hash: String,
    /// Counts the policies since the start; set when it comes into force.
    pub revision: u64,
    /// What holds for every request.
    pub requests: file::Requests,
    /// Who may ask, in the order in which they are asked; `None`: everybody may.
    pub authenticators: Option<Vec<Arc<dyn Authenticator>>>,
    /// The gateway's own keys, if there are any.
    pub own_keys: Option<OwnKeys>,
    /// Who pays.
    pub tenants: Tenants,
    /// How much may be used, whoever asks.
    pub limits: Vec<Arc<Limit>>,
    /// What texts may pass.
    pub guardrails: Option<Arc<Rails>>,
    /// Where they are shared with other replicas, if they are.
    pub shared: Option<Arc<Parameters>>,
    /// The pools, by name.
    pub pools: BTreeMap<String, Arc<Pool>>,
    /// Paths that pass through unread.
    pub passthrough: Vec<Passthrough>,
    /// The header by which clients name a class of urgency.
    pub priority_header: Option<HeaderName>,
    /// The header by which clients name the end user.
    pub user_header: Option<HeaderName>,
    /// The classes of urgency.
    pub priorities: BTreeMap<String, file::Priority>,
    /// The files whose secrets or keys are in it.
    pub secret_files: Vec<PathBuf>,
    /// What becomes of records.
    pub audit: file::Audit,
    /// What models cost, if somebody pays.
    pub prices: Option<Arc<Book>>,
    /// Whether streams are asked for the usage that their clients did not ask for.
    pub asks_for_usage: bool,
    /// Whether streams tell what they cost.
    pub cost_on_streams: bool,
    /// Where the lines of the journal go.
    pub sinks: Vec<Arc<sink::Outlet>>,
    /// Which traces are kept and where they go; none is, without it.
    pub traces: Option<Traces>,
    /// What is not good about it, though it works.
    pub warnings: Vec<Problem>,
    models: Models,
}

/// The names that clients use.
#[derive(Debug, Default)]
struct Models {
    exact: HashMap<String, Arc<Route>>,
    /// Patterns with a star, the longest first: (before the star, behind it, where it goes).
    patterns: Vec<(String, String, Arc<Route>)>,
    default: Option<String>,
    /// For the list of models: every name and alias in the order of the file.
    listed: Vec<(String, Arc<Route>)>,
}

/// Where a model is served.
#[derive(Debug)]
pub struct Route {
    /// The pool, then the fallbacks, in order.
    pub stages: Vec<Stage>,
    /// The class of urgency.
    pub priority: Option<file::Priority>,
    /// The entry in the file, for the list of models.
    pub model: file::Model,
    /// The entry's name, for records.
    pub rule: Arc<str>,
    /// The pools' names in order, for records.
    pub verdict: Arc<str>,
    /// How many tokens it makes of a byte.
    pub density: Arc<Density>,
    /// The handles of its metrics.
    pub meters: Meters,
    /// The handles of what it costs.
    pub spent: SpentMeters,
    /// Who decides which model answers, where this one is none.
    pub routers: Option<Arc<Routers>>,
}

impl Route {
    fn new(
        stages: Vec<Stage>,
        priority: Option<file::Priority>,
        model: file::Model,
        density: Arc<Density>,
    ) -> Arc<Self> {
        let pools: Vec<&str> = stages.iter().map(|stage| &*stage.pool.name).collect();
        Arc::new(Self {
            verdict: pools.join(", ").into(),
            rule: model.name.as_str().into(),
            stages,
            priority,
            model,
            density,
            meters: Meters::default(),
            spent: SpentMeters::default(),
            routers: None,
        })
    }

    /// How a request that asks for `asked` came to this entry.
    pub fn why(&self, asked: Option<&str>) -> &'static str {
        match asked {
            Some(name) if name == self.model.name => "by its name",
            Some(name) if self.model.aliases.iter().any(|alias| alias == name) => "by an alias",
            Some(name) if self.takes(name) => "by a pattern",
            Some(_) => "the default model, because no entry knows the name",
            None if self.model.name.starts_with('/') => "by its path",
            None => "the default model, because the request names none",
        }
    }

    /// Whether the entry itself has this name, so that it is not the default model that took it.
    pub fn knows(&self, name: &str) -> bool {
        name == self.model.name || self.model.aliases.iter().any(|alias| alias == name) || self.takes(name)
    }

    fn takes(&self, name: &str) -> bool {
        let patterns = std::iter::once(&self.model.name).chain(&self.model.aliases);
        patterns.filter_map(|pattern| pattern.split_once('*')).any(|(before, behind)| fits(name, before, behind))
    }
}

/// Whether `name` begins and ends as the pattern does that has a star between the two.
fn fits(name: &str, before: &str, behind: &str) -> bool {
    name.len() >= before.len() + behind.len() && name.starts_with(before) && name.ends_with(behind)
}

/// One pool that a request may go to.
#[derive(Debug)]
pub struct Stage {
    /// The pool.
    pub pool: Arc<Pool>,
    /// The model's name there.
    naming: Naming,
    /// What must have happened before; empty for the first.
    pub on: Vec<Cause>,
}

impl Stage {
    /// The name that an upstream knows the model by that was asked for as `asked`, if the policy gives another than the
    /// client's.
    pub fn other_name<'a>(&'a self, upstream: &'a Upstream, asked: Option<&'a str>) -> Option<&'a str> {
        upstream.model.as_deref().or_else(|| self.renamed(asked))
    }

    /// The same, as far as its upstreams have no names of their own for it.
    pub fn renamed<'a>(&'a self, asked: Option<&'a str>) -> Option<&'a str> {
        self.naming.other(asked)
    }
}

/// What the upstreams of a pool call a model.
#[derive(Debug)]
enum Naming {
    /// What the client calls it.
    AsAsked,
    /// Always so.
    Always(String),
    /// What is left of the client's name without what stands around the star of the entry's.
    OfStar(String, String),
    /// The entry's name, also where the client used an alias.
    Own { name: String, aliases: Vec<String> },
}

impl Naming {
    fn of(model: &file::Model, rename: Option<&str>) -> Self {
        match (rename, model.name.split_once('*')) {
            (Some("*"), Some((before, behind))) => Self::OfStar(before.to_owned(), behind.to_owned()),
            (Some(name), _) => Self::Always(name.to_owned()),
            (None, Some(_)) => Self::AsAsked,
            (None, None) => Self::Own { name: model.name.clone(), aliases: model.aliases.clone() },
        }
    }

    /// The name, if it is another than the client's.
    fn other<'a>(&'a self, asked: Option<&'a str>) -> Option<&'a str> {
        match self {
            Self::AsAsked => None,
            Self::Always(name) => Some(name),
            Self::OfStar(before, behind) => {
                asked?.strip_prefix(before.as_str())?.strip_suffix(behind.as_str()).filter(|name| !name.is_empty())
            }
            Self::Own { name, aliases } => aliases.iter().any(|alias| Some(alias.as_str()) == asked).then_some(name),
        }
    }
}

/// A path that passes through unread.
#[derive(Debug)]
pub struct Passthrough {
    /// The path as the policy has it.
    pub path: String,
    methods: Vec<Method>,
    /// Whether WebSockets may be opened.
    pub websocket: bool,
    /// Where it goes.
    pub route: Arc<Route>,
}

/// What a file is compiled against.
pub struct World<'a> {
    /// Reads an environment variable.
    pub env: &'a dyn Fn(&str) -> Option<String>,
    /// The levels that upstreams and pools are tied to.
    pub state: &'a State,
    /// Where their counters are.
    pub telemetry: &'a Telemetry,
    /// The gateway's own zone.
    pub zone: Option<&'a str>,
    /// The time.
    pub now: Instant,
    /// Whether the files with secrets must be there.
    pub secret_files: bool,
}

impl<'a> World<'a> {
    /// The world of a running gateway.
    pub fn new(
        env: &'a dyn Fn(&str) -> Option<String>,
        state: &'a State,
        telemetry: &'a Telemetry,
        settings: &'a Settings,
    ) -> Self {
        Self { env, state, telemetry, zone: settings.zone.as_deref(), now: Instant::now(), secret_files: true }
    }
}

/// The schema of `policy.yaml`.
pub fn schema() -> schemars::Schema {
    schemars::schema_for!(File)
}

/// Everything that is wrong with a policy file.
#[derive(Debug)]
pub struct Problems(pub Vec<Problem>);

impl Problems {
    /// The problems in the order in which they stand in the file.
    pub fn in_order(mut problems: Vec<Problem>) -> Self {
        problems.sort_by_key(|problem| problem.place);
        Self(problems)
    }

    /// One line for each, with the file's name in front as editors and terminals like it.
    pub fn lines(&self, name: &str) -> Vec<String> {
        let line = |problem: &Problem| match problem.place {
            Some(_) => format!("{name}:{problem}"),
            None => format!("{name}: {problem}"),
        };
        self.0.iter().map(line).collect()
    }
}

/// Reads and compiles `text`: a policy, or all that is wrong with it.
pub fn compile(text: &str, world: &World<'_>) -> Result<Policy, Problems> {
    compile_in(None, text, world)
}

/// The same for a text that lies in a directory, for the files that it names beside itself.
fn compile_in(directory: Option<&Path>, text: &str, world: &World<'_>) -> Result<Policy, Problems> {
    let (document, file) = parse(text)?;
    let mut compiler = Compiler::new(document, text, world);
    compiler.directory = directory.map(Path::to_owned);
    let policy = compiler.policy(file);
    if compiler.problems.is_empty() { Ok(policy) } else { Err(Problems::in_order(compiler.problems)) }
}

/// Reads `text` and nothing that it names.
pub fn parse(text: &str) -> Result<(Document, File), Problems> {
    let document = Document::parse(text).map_err(|problem| Problems(vec![problem]))?;
    let file = document.read().map_err(Problems::in_order)?;
    Ok((document, file))
}

/// Compiles a policy that was not written by a person but made of parts (`--upstream`).
pub fn compile_file(file: File, source: &str, world: &World<'_>) -> Result<Policy, Problems> {
    let mut compiler = Compiler::new(Document::default(), source, world);
    let policy = compiler.policy(file);
    if compiler.problems.is_empty() { Ok(policy) } else { Err(Problems::in_order(compiler.problems)) }
}

/// Reads the file at `path` and compiles it.
pub fn load(path: &Path, world: &World<'_>) -> Result<Policy, Problems> {
    compile_in(path.parent(), &read(path)?, world)
}

/// The text of the file at `path`.
pub fn read(path: &Path) -> Result<String, Problems> {
    std::fs::read_to_string(path).map_err(|error| {
        let message = format!("cannot be read: {error}");
        Problems(vec![Problem { place: None, path: String::new(), message }])
    })
}

/// Reads a file that the policy names, or says why that cannot be done.
type Open<'a> = &'a mut dyn FnMut(&Path) -> Result<String, String>;

struct Compiler<'a> {
    document: Document,
    world: &'a World<'a>,
    problems: Vec<Problem>,
    warnings: Vec<Problem>,
    /// The hash of the file and of what it names.
    secrets: Sha256,
    secret_files: Vec<PathBuf>,
    /// Where the file lies.
    directory: Option<PathBuf>,
    own_keys: Option<OwnKeys>,
}

impl<'a> Compiler<'a> {
    fn new(document: Document, source: &str, world: &'a World<'a>) -> Self {
        let secrets = Sha256::new_with_prefix(source);
        let (problems, secret_files) = (Vec::new(), Vec::new());
        let warnings = Vec::new();
        Self { document, world, problems, warnings, secrets, secret_files, directory: None, own_keys: None }
    }

    /// A path that the policy gives, which begins where the policy lies.
    fn beside(&self, path: &Path) -> PathBuf {
        self.directory.as_ref().map_or_else(|| path.to_owned(), |directory| directory.join(path))
    }

    /// Lets plugins be built from the files and the secrets that the policy names. All of them count for its hash.
    fn with_files<T>(&mut self, build: impl FnOnce(Open<'_>, sink::Resolve<'_>) -> T) -> T {
        let (mut read, directory) = (Vec::new(), self.directory.clone());
        let mut open = |path: &Path| {
            let path = directory.as_ref().map_or_else(|| path.to_owned(), |directory| directory.join(path));
            let text = std::fs::read_to_string(&path);
            let text = text.map_err(|error| format!("{} cannot be read: {error}", path.display()))?;
            read.push((path, text.clone()));
            Ok(text)
        };
        let built = build(&mut open, &mut |source| self.resolve(source));
        for (path, text) in read {
            self.secrets.update(&text);
            self.secret_files.push(path);
        }
        built
    }

    fn wrong(&mut self, path: &str, message: impl Into<String>) {
        let problem = self.document.problem(path, message);
        self.problems.push(problem);
    }

    /// It works and is not good.
    fn warn(&mut self, path: &str, message: impl Into<String>) {
        let warning = self.document.problem(path, message);
        self.warnings.push(warning);
    }

    fn policy(&mut self, file: File) -> Policy {
        let pools: BTreeMap<_, _> = file
            .pools
            .iter()
            .map(|(name, pool)| (name.clone(), Arc::new(self.pool(&format!("pools.{name}"), name, pool))))
            .collect();
        let prices = self.prices(&file).map(Arc::new);
        let models = self.models(&file, &pools, prices.as_ref());
        let authenticators = self.authenticators(&file);
        let tenants = self.tenants(&file, &models);
        let limits = self.limits("limits", None, &file.limits, &file, &models);
        self.limits_are_told_apart(&file, &limits, &tenants);
        let guardrails = self.guardrails(&file);
        let shared = file.shared.as_ref().and_then(|shared| self.shared(shared));
        self.captured_tenants(&file);
        self.measured_tenants(&file);
        let passthrough = file.passthrough.iter().enumerate();
        let passthrough = passthrough.filter_map(|(index, entry)| self.passthrough(index, entry, &pools)).collect();
        self.requests(&file.requests);
        let asks_for_usage = prices::asks_for_usage(&file);
        let traces = file.telemetry.traces.as_ref().and_then(|traces| self.traces(traces));
        Policy {
            sinks: self.sinks(&file.audit.sinks),
            hash: format!("{:x}", self.secrets.clone().finalize()),
            revision: 0,
            priority_header: file.requests.priority_header.as_deref().and_then(|name| name.parse().ok()),
            user_header: file.requests.user_header.as_deref().and_then(|name| name.parse().ok()),
            requests: file.requests,
            authenticators,
            own_keys: self.own_keys.take(),
            tenants,
            limits,
            guardrails,
            shared,
            pools,
            passthrough,
            priorities: file.priorities,
            secret_files: std::mem::take(&mut self.secret_files),
            audit: file.audit,
            prices,
            asks_for_usage,
            cost_on_streams: file.metering.is_some_and(|metering| metering.cost_on_streams),
            traces,
            warnings: Problems::in_order(std::mem::take(&mut self.warnings)).0,
            models,
        }
    }

    fn requests(&mut self, requests: &file::Requests) {
        for (index, prefix) in requests.strip_prefixes.iter().enumerate() {
            if !prefix.starts_with('/') || prefix.ends_with('/') {
                self.wrong(
                    &format!("requests.strip_prefixes[{index}]"),
                    format!("{prefix} must begin with a slash and not end with one, like /openai"),
                );
            }
        }
        let headers = [("priority_header", &requests.priority_header), ("user_header", &requests.user_header)];
        for (key, name) in headers {
            if let Some(name) = name.as_ref().filter(|name| name.parse::<HeaderName>().is_err()) {
                self.wrong(&format!("requests.{key}"), format!("{name} is no header name"));
            }
        }
    }

    fn pool(&mut self, path: &str, name: &str, pool: &file::Pool) -> Pool {
        for (index, cause) in pool.retry.on.iter().enumerate() {
            if matches!(cause, Cause::Unavailable | Cause::ContextLength | Cause::ContentFilter) {
                let message = "only a fallback can help with that: put it under a model's `fallbacks`";
                self.wrong(&format!("{path}.retry.on[{index}]"), message);
            }
        }
        if let Some(probe) = pool.health.path.as_ref().filter(|probe| !probe.starts_with('/')) {
            self.wrong(&format!("{path}.health.path"), format!("{probe} must begin with a slash"));
        }
        let upstreams = pool.upstreams.iter().enumerate();
        let mut upstreams: Vec<Upstream> = upstreams
            .filter_map(|(index, upstream)| self.upstream(&format!("{path}.upstreams[{index}]"), name, upstream))
            .collect();
        upstreams.iter_mut().enumerate().for_each(|(index, upstream)| upstream.index = index);
        if pool.load.headers {
            let asks = (HeaderName::from_static(told::ASKS), HeaderValue::from_static("json"));
            upstreams.iter_mut().for_each(|upstream| upstream.headers.push(asks.clone()));
        }
        if pool.load != file::Load::default() && !pool.balance.weighs() {
            let message = format!("the balance {} does not ask for it: choose expected_time", pool.balance.name());
            self.wrong(&format!("{path}.load"), message);
        }
        if let Some(index) = pool.upstreams.iter().position(|upstream| upstream.kv_events.is_some())
            && !pool.balance.matches_prefixes()
        {
            let message = format!("the balance {} does not ask for it: choose expected_time", pool.balance.name());
            self.wrong(&format!("{path}.upstreams[{index}].kv_events"), message);
        }
        Pool {
            name: name.into(),
            region: pool.region.as_deref().map(Into::into),
            upstreams,
            timeouts: pool.timeouts,
            retry: pool.retry.clone(),
            breaker: breaker::Parameters {
                failures: pool.breaker.failures,
                failure_ratio: pool.breaker.failure_ratio,
                window: Duration::from_millis(pool.breaker.window_ms),
                requests_min: pool.breaker.requests_min,
                open: Duration::from_millis(pool.breaker.open_ms),
                open_max: Duration::from_millis(pool.breaker.open_ms_max),
            },
            health: pool.health.clone(),
            concurrency: queue::Parameters {
                max: pool.concurrency.max,
                queue: pool.concurrency.queue,
                wait: Duration::from_millis(pool.concurrency.queue_ms),
            },
            headroom: pool.batch,
            slow_start: Duration::from_millis(pool.slow_start_ms),
            balance: pool.balance,
            load: pool.load,
            hedge: pool.hedge,
            prefixes: pool.balance.matches_prefixes().then(|| self.world.state.prefixes()),
            state: self.world.state.pool(name, self.world.telemetry, self.world.now),
        }
    }

    fn upstream(&mut self, path: &str, pool: &str, upstream: &file::Upstream) -> Option<Upstream> {
        let (origin, base) = Origin::parse(&upstream.url, upstream.http2)
            .map_err(|error| self.wrong(&format!("{path}.url"), error))
            .ok()?;
        let provider = self.provider(path, upstream)?;
        let mut headers = self.headers(path, upstream);
        if let Some(source) = &upstream.key {
            let secret = self.secret(&format!("{path}.key"), source)?;
            let credential = provider.credential(secret.reveal());
            let mut value = HeaderValue::try_from(credential.value)
                .map_err(|_| self.wrong(&format!("{path}.key"), "the secret cannot stand in a header"))
                .ok()?;
            value.set_sensitive(true);
            headers.push((HeaderName::from_static(credential.name), value));
        }
        let name = upstream.name.clone().unwrap_or_else(|| origin.host.to_string());
        let header_value = |text: &str| HeaderValue::from_str(text).ok();
        let Some((name_value, authority)) = header_value(&name).zip(header_value(&origin.authority())) else {
            self.wrong(&format!("{path}.name"), "a name may only have visible ASCII characters");
            return None;
        };
        if upstream.kv_session.is_some() && upstream.kv_events.is_none() {
            self.wrong(&format!("{path}.kv_session"), "no engine is listened to: give its port as kv_events");
        }
        Some(Upstream {
            index: 0,
            attempts: self.world.telemetry.attempts(pool, &name),
            name: name_value,
            path: base,
            authority,
            provider,
            headers,
            weight: upstream.weight,
            kv_events: upstream.kv_events,
            kv_session: upstream.kv_events.map(|_| upstream.kv_session.unwrap_or(file::KvSession::Header)),
            near: upstream.zone.is_none() || self.world.zone.is_none() || upstream.zone.as_deref() == self.world.zone,
            model: upstream.model.clone(),
            origin: self.world.state.origin(&origin, self.world.now),
        })
    }

    /// Reads the secret that the key at `path` names.
    fn secret(&mut self, path: &str, source: &SecretSource) -> Option<Secret> {
        self.resolve(source).map_err(|error| self.wrong(path, error)).ok()
    }

    /// Reads a secret; it counts for the hash.
    fn resolve(&mut self, source: &SecretSource) -> Result<Secret, String> {
        let secret = match (source, self.world.secret_files) {
            (SecretSource { file: Some(_), env: None }, false) => Secret::new("unknown"),
            _ => secret::read(source, self.world.env)?,
        };
        self.secrets.update(secret.reveal());
        self.secret_files.extend(source.file.clone());
        Ok(secret)
    }

    fn sinks(&mut self, configs: &[sink::Config]) -> Vec<Arc<sink::Outlet>> {
        sink::build(configs, &mut |source| self.resolve(source)).unwrap_or_else(|problems| {
            for (path, message) in problems {
                self.wrong(&format!("audit.sinks{path}"), message);
            }
            Vec::new()
        })
    }

    fn provider(&mut self, path: &str, upstream: &file::Upstream) -> Option<Arc<dyn provider::Provider>> {
        let kind = upstream.provider.as_deref().unwrap_or("vllm");
        let found = provider::named(kind);
        if found.is_none() {
            let names: Vec<&str> = provider::KINDS.iter().map(|(name, _)| *name).collect();
            let hint = nearest(kind, names.iter().copied());
            self.wrong(&format!("{path}.provider"), format!("{kind} is none of {}{hint}", names.join(", ")));
        }
        found
    }

    fn headers(&mut self, path: &str, upstream: &file::Upstream) -> Vec<(HeaderName, HeaderValue)> {
        let mut headers = Vec::new();
        for (name, value) in &upstream.headers {
            match (name.parse::<HeaderName>(), HeaderValue::from_str(value)) {
                (Ok(name), Ok(value)) if !crate::relay::headers::is_framing(&name) => headers.push((name, value)),
                (Ok(_), Ok(_)) => {
                    self.wrong(&format!("{path}.headers.{name}"), "the gateway itself sets this header: take it out");
                }
                _ => self.wrong(&format!("{path}.headers.{name}"), "this is no valid header"),
            }
        }
        headers
    }

    fn models(&mut self, file: &File, pools: &BTreeMap<String, Arc<Pool>>, prices: Option<&Arc<Book>>) -> Models {
        let mut models = Models { default: file.default_model.clone(), ..Models::default() };
        let mut seen: HashMap<&str, String> = HashMap::new();
        for (index, model) in file.models.iter().enumerate() {
            let path = format!("models[{index}]");
            let route = self.route(&path, model, file, pools);
            let aliases = model.aliases.iter().enumerate().map(|(n, alias)| (alias, format!("{path}.aliases[{n}]")));
            for (name, place) in std::iter::once((&model.name, format!("{path}.name"))).chain(aliases) {
                if let Some(before) = seen.insert(name, place.clone()) {
                    self.wrong(&place, format!("{name} is taken already, at {before}"));
                }
                if name.matches('*').count() > 1 {
                    self.wrong(&place, format!("{name}: only one * is understood"));
                }
                if let Some(route) = &route {
                    models.add(name, route.clone());
                }
            }
        }
        models.patterns.sort_by_key(|(before, behind, _)| std::cmp::Reverse(before.len() + behind.len()));
        self.routers(file, &mut models, pools, prices);
        if let Some(name) = &file.default_model
            && models.named(name).is_none()
            && !seen.contains_key(name.as_str())
            && !file.routers.contains_key(name)
        {
            let hint = nearest(name, seen.keys().copied());
            self.wrong("default_model", format!("no model is named {name}{hint}"));
        }
        models
    }

    fn route(
        &mut self,
        path: &str,
        model: &file::Model,
        file: &File,
        pools: &BTreeMap<String, Arc<Pool>>,
    ) -> Option<Arc<Route>> {
        let first = self.find_pool(&format!("{path}.pool"), &model.pool, pools);
        let mut complete = first.is_some();
        if model.rename.as_deref() == Some("*") && !model.name.contains('*') {
            let message = format!("* is what the * of the model's name stands for, and {} has none", model.name);
            self.wrong(&format!("{path}.rename"), message);
        }
        let naming = || Naming::of(model, model.rename.as_deref());
        let stage = |pool| Stage { pool, naming: naming(), on: Vec::new() };
        let mut stages: Vec<Stage> = first.into_iter().map(stage).collect();
        for (index, fallback) in model.fallbacks.iter().enumerate() {
            let place = format!("{path}.fallbacks[{index}].pool");
            if stages.iter().any(|stage| *stage.pool.name == *fallback.pool) {
                self.wrong(&place, format!("{} is tried already before this", fallback.pool));
            }
            let Some(pool) = self.find_pool(&place, &fallback.pool, pools) else {
                complete = false;
                continue;
            };
            let naming = Naming::of(model, fallback.rename.as_deref().or(model.rename.as_deref()));
            stages.push(Stage { pool, naming, on: fallback.on.clone().unwrap_or_else(usual_causes) });
        }
        let priority = match &model.priority {
            None => None,
            Some(name) => {
                let found = file.priorities.get(name).copied();
                if found.is_none() {
                    let hint = nearest(name, file.priorities.keys().map(String::as_str));
                    self.wrong(&format!("{path}.priority"), format!("no priority is named {name}{hint}"));
                }
                found
            }
        };
        complete.then(|| Route::new(stages, priority, model.clone(), self.world.state.density(&model.name)))
    }

    fn passthrough(
        &mut self,
        index: usize,
        entry: &file::Passthrough,
        pools: &BTreeMap<String, Arc<Pool>>,
    ) -> Option<Passthrough> {
        let path = format!("passthrough[{index}]");
        if !entry.path.starts_with('/') {
            self.wrong(&format!("{path}.path"), format!("{} must begin with a slash", entry.path));
        }
        let names = entry.methods.clone().unwrap_or_else(|| vec!["GET".to_owned(), "POST".to_owned()]);
        let mut methods = Vec::new();
        for (n, name) in names.iter().enumerate() {
            match Method::from_bytes(name.as_bytes()) {
                Ok(method) if method != Method::CONNECT => methods.push(method),
                _ => self
                    .wrong(&format!("{path}.methods[{n}]"), format!("{name} is no method that can be passed through")),
            }
        }
        let pool = self.find_pool(&format!("{path}.pool"), &entry.pool, pools)?;
        let model = file::Model {
            name: entry.path.clone(),
            aliases: Vec::new(),
            pool: entry.pool.clone(),
            rename: None,
            fallbacks: Vec::new(),
            priority: None,
            tokenizer: Tokenizer::Auto,
            can: file::Abilities::default(),
            description: None,
        };
        let stages = vec![Stage { pool, naming: Naming::AsAsked, on: Vec::new() }];
        let density = self.world.state.density(&model.name);
        let route = Route::new(stages, None, model, density);
        Some(Passthrough { path: entry.path.clone(), methods, websocket: entry.websocket, route })
    }

    fn find_pool(&mut self, path: &str, name: &str, pools: &BTreeMap<String, Arc<Pool>>) -> Option<Arc<Pool>> {
        let found = pools.get(name).cloned();
        if found.is_none() {
            let hint = nearest(name, pools.keys().map(String::as_str));
            self.wrong(path, format!("no pool is named {name}{hint}; add it under `pools`"));
        }
        found
    }
}

/// What a fallback helps with unless the policy says otherwise.
fn usual_causes() -> Vec<Cause> {
    vec![Cause::Connect, Cause::Reset, Cause::Timeout, Cause::Status5xx, Cause::Status429, Cause::Unavailable]
}

impl Models {
    fn add(&mut self, name: &str, route: Arc<Route>) {
        self.listed.push((name.to_owned(), route.clone()));
        match name.split_once('*') {
            Some((before, behind)) => self.patterns.push((before.to_owned(), behind.to_owned(), route)),
            None => drop(self.exact.insert(name.to_owned(), route)),
        }
    }

    fn named(&self, name: &str) -> Option<&Arc<Route>> {
        self.exact.get(name).or_else(|| {
            self.patterns.iter().find(|(before, behind, _)| fits(name, before, behind)).map(|(_, _, route)| route)
        })
    }
}

impl Policy {
    /// A policy that serves nothing.
    pub fn empty() -> Self {
        Self {
            hash: "none".to_owned(),
            revision: 0,
            requests: file::Requests::default(),
            authenticators: None,
            own_keys: None,
            tenants: Tenants::default(),
            limits: Vec::new(),
            guardrails: None,
            shared: None,
            pools: BTreeMap::new(),
            passthrough: Vec::new(),
            priority_header: None,
            user_header: None,
            priorities: BTreeMap::new(),
            secret_files: Vec::new(),
            audit: file::Audit::default(),
            prices: None,
            asks_for_usage: false,
            cost_on_streams: false,
            sinks: Vec::new(),
            traces: None,
            warnings: Vec::new(),
            models: Models::default(),
        }
    }

    /// Every limit once: everybody's, then the tenants'.
    pub fn all_limits(&self) -> impl Iterator<Item = &Arc<Limit>> {
        let mut seen = std::collections::HashSet::new();
        let all = self.limits.iter().chain(self.tenants.values().flat_map(|tenant| &tenant.limits));
        all.filter(move |limit| seen.insert(limit.name.clone()))
    }

    /// Where the model `asked` is served: by its name, by the longest pattern, or by the default.
    pub fn route(&self, asked: Option<&str>) -> Result<&Arc<Route>, Refusal> {
        self.route_among(asked, &|_| true)
    }

    /// The same for somebody who is told only of the names that they `may` use.
    pub fn route_among(&self, asked: Option<&str>, may: &dyn Fn(&str) -> bool) -> Result<&Arc<Route>, Refusal> {
        let by_default = || self.models.default.as_deref().and_then(|name| self.models.named(name));
        if let Some(route) = asked.and_then(|name| self.models.named(name)).or_else(by_default) {
            return Ok(route);
        }
        let message = match asked {
            Some(name) => {
                let name: String = name.chars().take(200).collect();
                let hint = nearest(&name, self.models.exact.keys().map(String::as_str).filter(|name| may(name)));
                format!("no model is named `{name}`{hint}; GET /v1/models lists those that are served")
            }
            None => "the request names no model, and the policy has no default_model".to_owned(),
        };
        Err(Refusal::new(Code::ModelNotFound, message).param("model"))
    }

    /// Whether callers may be known by a certificate.
    pub fn asks_for_certificates(&self) -> bool {
        self.authenticators.iter().flatten().any(|authenticator| authenticator.kind() == "mtls")
    }

    /// The pass-through entry for a path, if there is one.
    pub fn passthrough(&self, method: &Method, path: &str) -> Option<&Passthrough> {
        self.passthrough.iter().find(|entry| entry.methods.contains(method) && entry.fits(path))
    }

    /// The path without the first prefix that the policy strips.
    pub fn stripped<'a>(&self, path: &'a str) -> &'a str {
        let rest = |prefix: &String| path.strip_prefix(prefix.as_str()).filter(|rest| rest.starts_with('/'));
        self.requests.strip_prefixes.iter().find_map(rest).unwrap_or(path)
    }

    /// Every name that clients may send, in the order of the file.
    pub fn listed(&self) -> &[(String, Arc<Route>)] {
        &self.models.listed
    }

    /// How many seconds any class or pool lets a request wait at most is decided per pool; this is the class.
    pub fn priority(&self, header: Option<&HeaderValue>, route: &Route) -> Option<file::Priority> {
        let named = header.and_then(|value| value.to_str().ok()).and_then(|name| self.priorities.get(name)).copied();
        named.or(route.priority)
    }
}

impl Passthrough {
    fn fits(&self, path: &str) -> bool {
        match self.path.strip_suffix('*') {
            Some(prefix) => path.starts_with(prefix),
            None => path == self.path,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn compiled(text: &str) -> Result<Policy, Problems> {
        let (state, telemetry) = (State::new(0), Telemetry::new());
        let env = |name: &str| (name == "KEY").then(|| "canary".to_owned());
        let now = Instant::now();
        compile(
            text,
            &World { env: &env, state: &state, telemetry: &telemetry, zone: Some("a"), now, secret_files: true },
        )
    }

    pub(super) fn problems(text: &str) -> Vec<String> {
        compiled(text).unwrap_err().lines("policy.yaml")
    }

    pub(super) const POOLS: &str = "version: 1\npools:\n  fast: {upstreams: [{url: 'http://127.0.0.1:1'}]}\n  slow: {upstreams: [{url: 'http://127.0.0.1:2'}]}\n";

    #[test]
    fn the_longest_pattern_wins_and_a_name_beats_every_pattern() {
        let text = format!(
            "{POOLS}models:\n  - {{name: '*', pool: slow}}\n  - {{name: 'gpt-*', pool: fast}}\n  - {{name: gpt-4, pool: slow, aliases: [four]}}\n"
        );
        let policy = compiled(&text).unwrap();
        let pool = |name: &str| policy.route(Some(name)).unwrap().stages[0].pool.name.to_string();
        assert_eq!([pool("gpt-5"), pool("gpt-4"), pool("four"), pool("else")], ["fast", "slow", "slow", "slow"]);
    }

    #[test]
    fn an_unknown_model_is_refused_with_a_hint_and_a_default_takes_it() {
        let text = format!("{POOLS}models: [{{name: llama, pool: fast}}]\n");
        let refusal = compiled(&text).unwrap().route(Some("lama")).unwrap_err();
        assert!(refusal.message.contains("did you mean llama?"), "{}", refusal.message);
        let policy = compiled(&format!("{text}default_model: llama\n")).unwrap();
        assert_eq!(policy.route(Some("lama")).unwrap().model.name, "llama");
        assert_eq!(policy.route(None).unwrap().model.name, "llama");
    }

    #[test]
    fn every_dangling_name_is_told_at_its_line() {
        let text = format!(
            "{POOLS}default_model: b\nmodels:\n  - name: a\n    pool: fats\n  - name: c\n    pool: fast\n    priority: urgent\n    fallbacks: [{{pool: nowhere}}]\n  - {{name: c, pool: slow}}\n"
        );
        let told = problems(&text);
        assert!(
            told.iter()
                .any(|t| t.starts_with("policy.yaml:8:5: models[0].pool: no pool is named fats; did you mean fast?")),
            "{told:#?}"
        );
        assert!(told.iter().any(|t| t.contains("fallbacks[0].pool: no pool is named nowhere")), "{told:#?}");
        assert!(told.iter().any(|t| t.contains("default_model: no model is named b")), "{told:#?}");
    }

    #[test]
    fn a_broken_upstream_is_told_and_no_secret_is() {
        let text = "version: 1\npools:\n  p:\n    upstreams:\n      - {url: 'gpu:8000'}\n      - {url: 'http://x', provider: vlm}\n      - {url: 'http://x', key: {env: NONE}}\n      - {url: 'http://x', headers: {content-length: '3'}}\n    retry: {on: [context_length]}\n";
        let told = problems(text);
        assert_eq!(told.len(), 5, "{told:#?}");
        assert!(told.iter().any(|t| t.contains("did you mean vllm?")));
        assert!(told.iter().any(|t| t.contains("NONE is not set")));
        let policy = compiled("version: 1\npools: {p: {upstreams: [{url: 'http://x', key: {env: KEY}}]}}\n").unwrap();
        assert!(!format!("{policy:?}").contains("canary"));
    }

    #[test]
    fn a_status_needs_no_quotes_to_be_a_cause() {
        let told = |on: &str| {
            let fallback = format!("fallbacks: [{{pool: slow, on: {on}}}]");
            let retry = POOLS.replacen("1'}]}", &format!("1'}}], retry: {{on: {on}}}}}"), 1);
            compiled(&format!("{retry}models: [{{name: m, pool: fast, {fallback}}}]\n"))
        };
        let policy = told("[5xx, 429]").unwrap();
        assert_eq!(policy.hash.len(), told("[5xx, '429']").unwrap().hash.len());
        let route = policy.route(Some("m")).unwrap();
        let causes = [Cause::Status5xx, Cause::Status429];
        assert_eq!((&route.stages[0].pool.retry.on[..], &route.stages[1].on[..]), (&causes[..], &causes[..]));
        let wrong = told("[5xx, 430]").unwrap_err().lines("policy.yaml");
        assert!(wrong[0].starts_with("policy.yaml:3:") && wrong[0].contains("430 is none of connect"), "{wrong:?}");
        assert_eq!(wrong.len(), 2, "{wrong:?}");
    }

    #[test]
    fn the_hash_changes_with_a_secret() {
        let text = "version: 1\npools: {p: {upstreams: [{url: 'http://x', key: {env: KEY}}]}}\n";
        let (state, telemetry, settings) = (State::new(0), Telemetry::new(), Settings::default());
        let hash = |secret: &'static str| {
            let env = move |_: &str| Some(secret.to_owned());
            compile(text, &World::new(&env, &state, &telemetry, &settings)).unwrap().hash
        };
        assert_eq!(hash("a"), hash("a"));
        assert_ne!(hash("a"), hash("b"));
    }

    #[test]
    fn a_prefix_is_stripped_only_at_a_slash() {
        let policy = compiled(&format!("{POOLS}requests: {{strip_prefixes: [/openai]}}\n")).unwrap();
        assert_eq!(policy.stripped("/openai/v1/models"), "/v1/models");
        assert_eq!(policy.stripped("/openaiv1/models"), "/openaiv1/models");
    }
}
