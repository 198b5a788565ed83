//! `model_list`: entries of one name become a model and its pool; an `order` becomes a pool behind it.

use super::cursor::At;
use super::reliability::Usual;
use super::vendors::{Vendor, vendor_of};
use super::yaml::Yaml;
use super::{Draft, Importer};
use crate::policy::file::Http2;
use crate::pool::origin::Origin;

/// The longest name of a model.
const NAME_MAX: usize = 100;

/// All entries of one `model_name`.
pub(super) struct Group<'a> {
    pub name: String,
    /// The first of them.
    pub at: At<'a>,
    pub deployments: Vec<Deployment<'a>>,
}

/// One entry: a model at one server.
pub(super) struct Deployment<'a> {
    /// The entry.
    pub at: At<'a>,
    pub params: At<'a>,
    pub provider: &'static str,
    /// The name that the server knows it by.
    pub model: String,
    url: String,
    key: Option<String>,
    headers: Vec<(String, String)>,
    name: Option<String>,
    order: Option<u64>,
    is_cloud: bool,
}

/// How the servers of a group know its model.
#[derive(PartialEq)]
enum Known {
    /// All by this name.
    As(String),
    /// Each by its own.
    ByEach,
}

/// A model of the policy.
pub(super) struct Entry {
    pub name: String,
    pub aliases: Vec<String>,
    pub pool: String,
    pub rename: Option<String>,
    pub providers: Vec<&'static str>,
    pub fallbacks: Vec<Fallback>,
}

/// Where its requests go else.
pub(super) struct Fallback {
    pub pool: String,
    pub rename: Option<String>,
    /// The words for the causes; none for the usual ones.
    pub on: Vec<&'static str>,
}

impl Entry {
    /// What the star of its name stands for in `name`.
    pub fn star<'n>(&self, name: &'n str) -> Option<&'n str> {
        let (before, behind) = self.name.split_once('*')?;
        name.strip_prefix(before)?.strip_suffix(behind)
    }

    /// How its upstreams know what clients call `name`.
    pub fn name_there(&self, name: &str) -> String {
        match self.rename.as_deref() {
            Some("*") => self.star(name).unwrap_or(name).to_owned(),
            Some(rename) => rename.to_owned(),
            None => name.to_owned(),
        }
    }

    pub fn yaml(&self) -> Yaml {
        let aliases = (!self.aliases.is_empty()).then(|| Yaml::texts(self.aliases.iter().map(String::as_str)));
        let fallbacks: Vec<Yaml> = self.fallbacks.iter().map(Fallback::yaml).collect();
        Yaml::map([
            ("name", Some(Yaml::text(&self.name))),
            ("aliases", aliases),
            ("rename", self.rename.as_deref().map(Yaml::text)),
            ("pool", Some(Yaml::text(&self.pool))),
            ("fallbacks", (!fallbacks.is_empty()).then_some(Yaml::List(fallbacks))),
        ])
    }
}

impl Fallback {
    fn yaml(&self) -> Yaml {
        // 429 is a word there, not a number.
        let words = self.on.iter().map(|word| Yaml::text(word)).collect();
        Yaml::map([
            ("pool", Some(Yaml::text(&self.pool))),
            ("rename", self.rename.as_deref().map(Yaml::text)),
            ("on", (!self.on.is_empty()).then_some(Yaml::List(words))),
        ])
    }
}

impl Deployment<'_> {
    fn yaml(&self, weight: u64, model: Option<&str>) -> Yaml {
        let headers = self.headers.iter().map(|(name, value)| (name.as_str(), Some(Yaml::text(value))));
        let key = self.key.as_deref().map(|name| Yaml::map([("env", Some(Yaml::text(name)))]));
        Yaml::map([
            ("url", Some(Yaml::text(&self.url))),
            ("name", self.name.as_deref().map(Yaml::text)),
            ("provider", (self.provider != "vllm").then(|| Yaml::text(self.provider))),
            ("model", model.map(Yaml::text)),
            ("key", key),
            ("headers", (!self.headers.is_empty()).then(|| Yaml::map(headers))),
            ("weight", (weight != 1).then(|| Yaml::number(weight))),
        ])
    }

    /// A number among its parameters.
    pub fn number(&self, key: &str) -> Option<f64> {
        self.params.get(key)?.number()
    }
}

impl<'a> Importer<'a> {
    /// The entries of `model_list` by their names, in the order of the file.
    pub(super) fn groups(&mut self, root: &At<'a>) -> Vec<Group<'a>> {
        let mut groups: Vec<Group<'a>> = Vec::new();
        let mut places = std::collections::HashMap::new();
        for entry in root.get("model_list").map(|list| list.items()).unwrap_or_default() {
            let Some((name, deployment)) = self.deployment(root, &entry) else { continue };
            let place = *places.entry(name.clone()).or_insert_with(|| {
                groups.push(Group { name, at: entry.clone(), deployments: Vec::new() });
                groups.len() - 1
            });
            groups[place].deployments.push(deployment);
        }
        groups
    }

    fn deployment(&mut self, root: &At<'a>, entry: &At<'a>) -> Option<(String, Deployment<'a>)> {
        let (name, params) = entry.get("model_name").zip(entry.get("litellm_params")).or_else(|| {
            self.not_supported(entry, "it has no `model_name` or no `litellm_params`: left out");
            None
        })?;
        let model = params.get("model").filter(|model| model.text().is_some()).or_else(|| {
            self.not_supported(&params, "it has no `model`: left out");
            None
        })?;
        let named = self.public_name(&name)?;
        self.seen(Some(name));
        let custom = params.get("custom_llm_provider");
        self.seen(custom.clone());
        let (vendor, known_as) = match vendor_of(model.text()?, custom.and_then(|custom| custom.text())) {
            Ok((_, name)) if !is_name(name) => {
                return self.leave_out(entry, &model, "left out: this names no model that a server could have");
            }
            Ok(found) => found,
            Err(why) => return self.leave_out(entry, &model, &why),
        };
        let credential = self.credential(root, &params);
        let find = |key: &str| params.get(key).or_else(|| credential.as_ref()?.get(key));
        let base = find("api_base").or_else(|| find("base_url"));
        let url = match self.url(vendor, base.as_ref()) {
            Ok(url) => url,
            Err(why) => return self.leave_out(entry, base.as_ref().unwrap_or(&model), &why),
        };
        let key = match find("api_key") {
            Some(at) => self.key(&at, &named),
            None => self.usual_key(vendor, base.as_ref()),
        };
        let order = params.get("order").and_then(|order| order.count());
        let is_cloud = url.starts_with("https:") && !["vllm", "tgi"].contains(&vendor.provider);
        let key_told = key.as_ref().map_or("no key".to_owned(), |name| format!("with the key in {name}"));
        self.taken(&model, format!("{known_as} at {url}, {}, {key_told}", vendor.provider));
        self.told_of_dialect(vendor, &model, find("api_version"));
        let headers = self.upstream_headers(&params);
        let id = entry.get("model_info").and_then(|info| info.get("id"));
        let id_name = id.as_ref().and_then(|id| id.text()).filter(|id| is_header_text(id)).map(str::to_owned);
        self.seen(id);
        let (model, provider) = (known_as.to_owned(), vendor.provider);
        let (at, name) = (entry.clone(), id_name);
        Some((named, Deployment { at, params, provider, model, url, key, headers, name, order, is_cloud }))
    }

    /// The name that clients send.
    fn public_name(&mut self, at: &At<'_>) -> Option<String> {
        let text = at.text().unwrap_or_default();
        let why = match text {
            "" => "a model needs a name: left out",
            text if text.len() > NAME_MAX => "a name has at most 100 bytes here: left out",
            text if text.chars().any(char::is_control) => "the name has characters that cannot be seen: left out",
            text if text.matches('*').count() > 1 => "only one * is understood in a name: left out",
            text => return Some(text.to_owned()),
        };
        self.not_supported(at, why);
        None
    }

    /// An entry that the policy has nothing of; what stands in it needs no word more.
    fn leave_out<T>(&mut self, entry: &At<'_>, at: &At<'_>, why: &str) -> Option<T> {
        self.not_supported(at, why);
        self.told.insert(entry.path.clone());
        None
    }

    /// The `credential_values` that the entry names.
    fn credential(&mut self, root: &At<'a>, params: &At<'a>) -> Option<At<'a>> {
        let name = params.get("litellm_credential_name")?;
        let listed = root.get("credential_list").map(|list| list.items()).unwrap_or_default();
        let found =
            listed.into_iter().find(|entry| entry.get("credential_name").is_some_and(|at| at.value == name.value));
        match found {
            Some(entry) => {
                self.seen(entry.get("credential_name"));
                self.taken(&name, "its values stand with the upstream");
                entry.get("credential_values")
            }
            None => {
                self.not_supported(&name, "no entry of `credential_list` has this name");
                None
            }
        }
    }

    /// The base URL as it is written here: with what stands before `/v1`.
    fn url(&mut self, vendor: &Vendor, base: Option<&At<'_>>) -> Result<String, String> {
        let Some(at) = base else {
            let missing = || format!("left out: {}/ needs an `api_base`", vendor.prefix);
            return vendor.base.map(str::to_owned).ok_or_else(missing);
        };
        let text = match at.variable() {
            Some(name) => {
                let value = self.variable(name);
                let value = value.ok_or_else(|| {
                    format!("left out: the address is in the environment variable {name}, which is not set here: set it and import again")
                })?;
                self.changed(
                    at,
                    format!("what {name} says now stands in the policy: an address comes from no variable here"),
                );
                value
            }
            None => at.text().unwrap_or_default().to_owned(),
        };
        let url = trimmed(&text, vendor.provider);
        // Whoever wrote a password into it will not want to read it again.
        let is_private = text.contains('@') || text.contains('?');
        let shown = if is_private { "this".to_owned() } else { url.clone() };
        if is_private || Origin::parse(&url, Http2::Tls).is_err() {
            return Err(format!("left out: {shown} is no address of a server here: http://HOST:PORT or https://HOST"));
        }
        self.seen(Some(at.clone()));
        Ok(url)
    }

    /// The environment variable in which LiteLLM looks for a vendor's key. It goes to the vendor, and to nobody else.
    fn usual_key(&mut self, vendor: &Vendor, base: Option<&At<'_>>) -> Option<String> {
        let name = vendor.key?;
        let (Some(at), Some(_)) = (base, vendor.base) else { return Some(name.to_owned()) };
        let told = format!(
            "no key is sent there: LiteLLM would send what {name} holds, which is another's; say `key` if it wants one"
        );
        self.changed(at, told);
        None
    }

    /// An environment variable: `environment_variables` of the file comes first.
    fn variable(&self, name: &str) -> Option<String> {
        let of_file = self.document.value.get("environment_variables").and_then(|all| all.get(name)?.as_str());
        let of_file = of_file.filter(|value| !value.starts_with("os.environ/"));
        of_file.map(str::to_owned).or_else(|| (self.env)(name)).filter(|value| !value.is_empty())
    }

    fn told_of_dialect(&mut self, vendor: &Vendor, model: &At<'_>, version: Option<At<'_>>) {
        match (vendor.provider, vendor.prefix) {
            ("anthropic", _) => {
                let told = "asked on /v1/messages and /v1/messages/count_tokens only: bodies are not translated";
                self.changed(model, told);
            }
            ("azure", _) => self.changed(model, "asked by Azure's v1 API, where the deployment is the model's name"),
            ("tgi", _) => self.changed(model, "asked as a TGI server, by its own paths and OpenAI's"),
            (_, "ollama" | "ollama_chat") => self.changed(model, "asked by Ollama's OpenAI-compatible paths"),
            _ => {}
        }
        if let Some(version) = version {
            self.changed(&version, "Azure's v1 API needs no version: not sent");
        }
    }

    fn upstream_headers(&mut self, params: &At<'_>) -> Vec<(String, String)> {
        let mut headers = Vec::new();
        if let Some(at) = params.get("organization") {
            self.header(&at, "openai-organization", &mut headers);
        }
        for key in ["extra_headers", "headers", "default_headers"] {
            for (name, at) in params.get(key).map(|at| at.members()).unwrap_or_default() {
                self.header(&at, name, &mut headers);
            }
        }
        headers
    }

    fn header(&mut self, at: &At<'_>, name: &str, headers: &mut Vec<(String, String)>) {
        const SECRET: [&str; 6] = ["authorization", "key", "token", "secret", "cookie", "password"];
        let lower = name.to_ascii_lowercase();
        let parsed = lower.parse::<http::HeaderName>().ok();
        let own = parsed.as_ref().is_none_or(crate::relay::headers::is_framing);
        match at.text().filter(|text| is_header_text(text)) {
            _ if SECRET.iter().any(|word| lower.contains(word)) => {
                self.not_supported(
                    at,
                    "a header with a secret cannot stand in a policy: `key` is for the upstream's key",
                );
            }
            _ if own => self.not_supported(at, "the gateway itself writes this header, or it is none"),
            Some(text) if text.starts_with("os.environ/") => {
                self.not_supported(at, "a header's value cannot come from the environment");
            }
            Some(text) if headers.iter().all(|(known, _)| *known != lower) => {
                self.taken(at, format!("the header {lower} of every request to this upstream"));
                headers.push((lower, text.to_owned()));
            }
            _ => self.not_supported(at, "this is no header's value, or the header stands here twice"),
        }
    }

    /// The models and pools of all groups.
    pub(super) fn models(&mut self, groups: &[Group<'_>]) {
        for group in groups {
            let Some(known) = self.rename(group) else { continue };
            let orders = orders(group);
            let mut stages = Vec::new();
            for (index, order) in orders.iter().enumerate() {
                let members: Vec<&Deployment<'_>> =
                    group.deployments.iter().filter(|deployment| deployment.order == *order).collect();
                let behind = if index == 0 { String::new() } else { format!("-{}", index + 1) };
                let name = self.draft.pool_name(&format!("{}{behind}", slug(&group.name)));
                let pool = self.pool(group, &members, orders.len(), known == Known::ByEach);
                self.draft.pools.push((name.clone(), pool));
                stages.push(name);
            }
            self.told_of_pool(group, stages.len());
            let mut stages = stages.into_iter();
            let fallback = |pool| Fallback { pool, rename: None, on: Vec::new() };
            let providers = group.deployments.iter().map(|deployment| deployment.provider).collect();
            let (name, aliases) = (group.name.clone(), Vec::new());
            let pool = stages.next().unwrap_or_default();
            let rename = match known {
                Known::As(rename) if rename != group.name => Some(rename),
                _ => None,
            };
            let fallbacks = stages.map(fallback).collect();
            self.draft.models.push(Entry { name, aliases, pool, rename, providers, fallbacks });
        }
    }

    /// How its servers know the model. None where a wildcard cannot be meant here.
    fn rename(&mut self, group: &Group<'_>) -> Option<Known> {
        let first = &group.deployments.first()?.model;
        let same = group.deployments.iter().all(|deployment| deployment.model == *first);
        let stars = group.deployments.iter().any(|deployment| deployment.model.contains('*'));
        match (stars, group.name.contains('*')) {
            (false, _) if same => Some(Known::As(first.clone())),
            (false, _) => Some(Known::ByEach),
            (true, true) if same && *first == group.name => Some(Known::As(group.name.clone())),
            // What the star stands for is the name there.
            (true, true) if same && first == "*" => Some(Known::As("*".to_owned())),
            _ => {
                let told = "this wildcard cannot be meant here: the name there is either what the * stands for, or the \
                            whole name: left out";
                for deployment in &group.deployments {
                    self.leave_out_all(&deployment.at);
                }
                self.not_supported(&group.at, told);
                None
            }
        }
    }

    fn pool(&mut self, group: &Group<'_>, members: &[&Deployment<'_>], orders: usize, each: bool) -> Yaml {
        let weights = weights(members);
        let upstreams = members
            .iter()
            .zip(weights)
            .map(|(member, weight)| member.yaml(weight, each.then_some(member.model.as_str())));
        let upstreams = Yaml::List(upstreams.collect());
        let timeouts = self.timeouts(members);
        let retry = self.retry(members, orders);
        let health = self.usual.health(members.iter().all(|member| member.is_cloud));
        let breaker = self.usual.breaker();
        let concurrency = self.concurrency(group, members);
        Yaml::map([
            ("upstreams", Some(upstreams)),
            ("timeouts", timeouts),
            ("retry", retry),
            ("breaker", breaker),
            ("concurrency", concurrency),
            ("health", health),
        ])
    }

    /// `max_parallel_requests` of all members together.
    fn concurrency(&mut self, group: &Group<'_>, members: &[&Deployment<'_>]) -> Option<Yaml> {
        let limits: Vec<At<'_>> =
            members.iter().filter_map(|member| member.params.get("max_parallel_requests")).collect();
        let sum: Option<u64> = limits.iter().map(|at| at.count().filter(|count| *count > 0)).sum();
        let sum = sum.filter(|sum| limits.len() == members.len() && (1..=u64::from(u32::MAX)).contains(sum));
        for at in &limits {
            match sum {
                Some(sum) => {
                    self.changed(at, format!("{sum} requests at once for all of {} together; others wait", group.name))
                }
                None => self.not_supported(at, "a pool has one bound: every entry of the model must have one"),
            }
        }
        sum.map(|sum| Yaml::map([("max", Some(Yaml::number(sum)))]))
    }

    fn told_of_pool(&mut self, group: &Group<'_>, stages: usize) {
        for deployment in &group.deployments {
            let params = &deployment.params;
            let beside = group.deployments.iter().filter(|other| other.order == deployment.order);
            let weighed = beside.into_iter().any(|other| other.number("weight").is_some());
            match (params.get("weight"), deployment.number("weight")) {
                (Some(at), Some(_)) => self.taken(&at, "its share of the requests"),
                (Some(at), None) => self.not_supported(&at, "this is no number: it has the share 0"),
                (None, _) if weighed => {
                    self.changed(
                        &deployment.at,
                        "it has no weight beside others that have one: it gets no requests, as there",
                    );
                }
                (None, _) => {}
            }
            if let Some(at) = params.get("order") {
                match stages {
                    1 => self.taken(&at, "all have the same: one pool"),
                    _ => self.taken(&at, "a pool for each order, the next one where the one before cannot answer"),
                }
            }
        }
    }
}

impl Draft {
    pub fn has_model(&self, name: &str) -> bool {
        self.models.iter().any(|entry| entry.name == name)
    }

    /// A pool's name that is not taken.
    fn pool_name(&self, wanted: &str) -> String {
        let taken = |name: &str| self.pools.iter().any(|(known, _)| known == name);
        let numbered = format!("{wanted}-{}", self.pools.len() + 1);
        match (taken(wanted), taken(&numbered)) {
            (false, _) => wanted.to_owned(),
            (true, false) => numbered,
            // Whoever names models so gets a name that nobody else has.
            (true, true) => format!("pool-{}-of-{wanted}", self.pools.len() + 1),
        }
    }
}

/// The orders that there are, the first to ask first; entries without one come last.
fn orders(group: &Group<'_>) -> Vec<Option<u64>> {
    let mut orders: Vec<Option<u64>> = group.deployments.iter().map(|deployment| deployment.order).collect();
    orders.sort_by_key(|order| order.unwrap_or(u64::MAX));
    orders.dedup();
    orders
}

/// Shares as whole numbers up to 1000: by `weight`, else by `rpm`, else by `tpm`, as LiteLLM shuffles.
fn weights(members: &[&Deployment<'_>]) -> Vec<u64> {
    let of_all = |by: &str| members.iter().all(|member| member.number(by).is_some());
    let weighed = members.iter().any(|member| member.number("weight").is_some());
    let by = ["rpm", "tpm"].into_iter().find(|by| of_all(by));
    let Some(by) = weighed.then_some("weight").or(by) else { return vec![1; members.len()] };
    let shares: Vec<f64> = members.iter().map(|member| member.number(by).unwrap_or(0.0)).collect();
    let most = shares.iter().copied().fold(0.0, f64::max);
    if most <= 0.0 || shares.iter().all(|share| *share == most) {
        return vec![1; members.len()];
    }
    let scale = if most <= 1000.0 && shares.iter().all(|share| share.fract() == 0.0) { 1.0 } else { 1000.0 / most };
    shares.iter().map(|share| if *share > 0.0 { ((share * scale).round() as u64).max(1) } else { 0 }).collect()
}

/// A base URL without what our own paths begin with.
fn trimmed(url: &str, provider: &str) -> String {
    let url = url.trim().trim_end_matches('/');
    let url = url.strip_suffix("/chat/completions").unwrap_or(url);
    if provider == "azure" {
        let host = url.find("/openai").map_or(url, |cut| &url[..cut]);
        return format!("{host}/openai");
    }
    url.strip_suffix("/v1").unwrap_or(url).to_owned()
}

/// A name for a pool that reads well in metrics.
fn slug(name: &str) -> String {
    let letter = |c: char| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '-' };
    let slug: String = name.chars().map(letter).collect();
    let slug = slug.trim_matches('-');
    if slug.is_empty() { "models".to_owned() } else { slug.to_owned() }
}

/// Whether a server may know a model by this name; one star stands for any text.
fn is_name(name: &str) -> bool {
    (1..=200).contains(&name.len()) && name.matches('*').count() <= 1 && !name.chars().any(char::is_control)
}

fn is_header_text(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| (b' '..0x7f).contains(&byte))
}

impl Usual {
    /// How a pool's upstreams are asked for their health: clouds are not, unless the file says so.
    fn health(&self, is_cloud: bool) -> Option<Yaml> {
        match self.health_ms {
            Some(ms) => Some(Yaml::map([("interval_ms", Some(Yaml::number(ms)))])),
            None => is_cloud.then(|| Yaml::map([("enabled", Some(Yaml::word("false")))])),
        }
    }
}
