//! What models cost, and how much of them may be used.

use std::collections::HashSet;

use serde_json::value::RawValue;

use super::Importer;
use super::cursor::At;
use super::models::Group;
use super::yaml::Yaml;
use crate::limits::window::Window;
use crate::money::file::Price;
use crate::money::import;
use crate::policy::prices;

/// The prices that ship with the gateway.
const SHIPPED: &str = include_str!("../../config/prices.yaml");

/// What a limit on tokens or dollars does beside limiting.
const BOUNDS: &str = "a request that does not say how long its answer may be is given `requests.output_tokens`";

impl<'a> Importer<'a> {
    pub(super) fn budgets(&mut self, root: &At<'a>, groups: &[Group<'_>]) {
        self.prices(groups);
        for group in groups {
            if !self.draft.has_model(&group.name) {
                continue;
            }
            self.rate(group, "rpm", "requests");
            self.rate(group, "tpm", "tokens");
            self.budget_of_group(group);
        }
        let litellm = root.get("litellm_settings");
        if let Some(at) = litellm.as_ref().and_then(|litellm| litellm.get("max_budget")) {
            let duration = litellm.as_ref().and_then(|litellm| litellm.get("budget_duration"));
            self.budget(&at, duration, "budget", Yaml::List(Vec::new()), &[]);
        }
        if let Some(at) = litellm.as_ref().and_then(|litellm| litellm.get("max_end_user_budget")) {
            self.budget(&at, None, "budget of each user", Yaml::texts(["user"]), &[]);
        }
        self.provider_budgets(root, groups);
        self.parallel(root);
    }

    /// `rpm` or `tpm` of all entries of a model together.
    fn rate(&mut self, group: &Group<'_>, key: &str, unit: &str) {
        let there: Vec<At<'_>> = group.deployments.iter().filter_map(|deployment| deployment.params.get(key)).collect();
        let sum: Option<u64> = there.iter().map(At::count).sum();
        let sum = sum.filter(|sum| *sum > 0 && there.len() == group.deployments.len());
        let name = format!("{key} of {}", group.name);
        for at in &there {
            match sum {
                Some(sum) => {
                    let more = if unit == "tokens" { format!("; {BOUNDS}") } else { String::new() };
                    self.changed(
                        at,
                        format!("the limit `{name}`: {sum} {unit} a minute of all its entries together{more}"),
                    );
                }
                None => self.not_supported(at, "not every entry of the model has one, so the model has no limit here"),
            }
        }
        if let Some(sum) = sum {
            self.draft.limits.push(Yaml::map([
                ("name", Some(Yaml::text(&name))),
                ("models", Some(Yaml::texts([group.name.as_str()]))),
                (unit, Some(Yaml::number(sum))),
                ("per", Some(Yaml::text("1m"))),
            ]));
        }
    }

    fn budget_of_group(&mut self, group: &Group<'_>) {
        let budgets = || group.deployments.iter().filter_map(|deployment| deployment.params.get("max_budget"));
        if budgets().count() == 0 {
            return;
        }
        let one = group.deployments.len() == 1;
        for at in budgets() {
            let duration = group.deployments.iter().find_map(|deployment| deployment.params.get("budget_duration"));
            match one {
                true => self.budget(
                    &at,
                    duration,
                    &format!("budget of {}", group.name),
                    Yaml::List(Vec::new()),
                    &[&group.name],
                ),
                false => self.not_supported(&at, "a budget is a model's here, not an entry's among several"),
            }
        }
    }

    /// A limit on dollars.
    fn budget(&mut self, at: &At<'_>, duration: Option<At<'_>>, name: &str, each: Yaml, models: &[&str]) {
        let amount = at.number().filter(|dollars| *dollars <= 1e6).map(|dollars| format!("{:.6}", dollars));
        let Some(amount) = amount else {
            return self.not_supported(at, "this is no amount of dollars up to a million");
        };
        let amount = if amount.contains('.') { amount.trim_end_matches('0').trim_end_matches('.') } else { &amount };
        let Some(per) = window(duration.as_ref().and_then(|at| at.text())) else {
            return self.not_supported(duration.as_ref().unwrap_or(at), "this is no time here: the budget is left out");
        };
        if let Some(at) = duration {
            self.taken(&at, format!("the limit counts by this: {per}"));
        }
        let is = if per == "total" { "in all".to_owned() } else { format!("per {per}") };
        self.changed(at, format!("the limit `{name}`: {amount} US dollars {is}, by `prices`, a model without a price counting nothing; {BOUNDS}"));
        self.draft.limits.push(Yaml::map([
            ("name", Some(Yaml::text(name))),
            ("each", (each != Yaml::List(Vec::new())).then_some(each)),
            ("models", (!models.is_empty()).then(|| Yaml::texts(models.iter().copied()))),
            ("usd", Some(Yaml::word(amount))),
            ("per", Some(Yaml::text(per))),
            ("on_unpriced", Some(Yaml::word("allow"))),
        ]));
    }

    /// `provider_budget_config`: a budget of all models of one vendor.
    fn provider_budgets(&mut self, root: &At<'a>, groups: &[Group<'_>]) {
        let Some(config) = root.get("router_settings").and_then(|router| router.get("provider_budget_config")) else {
            return;
        };
        for (vendor, at) in config.members() {
            let (amount, period) = (
                at.get("budget_limit").or_else(|| at.get("max_budget")),
                at.get("time_period").or_else(|| at.get("budget_duration")),
            );
            let prefix = format!("{vendor}/");
            let is_of = |group: &&Group<'_>| {
                let mut models = group
                    .deployments
                    .iter()
                    .map(|one| one.params.get("model").and_then(|at| at.text()).unwrap_or_default());
                models.all(|model| model.starts_with(&prefix))
            };
            let names: Vec<&str> = groups.iter().filter(is_of).map(|group| group.name.as_str()).collect();
            let there: Vec<&str> = names.into_iter().filter(|name| self.draft.has_model(name)).collect();
            match amount {
                Some(amount) if !there.is_empty() => {
                    self.budget(&amount, period, &format!("budget of {vendor}"), Yaml::List(Vec::new()), &there);
                }
                _ => self.not_supported(&at, "it has no `budget_limit`, or no model is this vendor's alone"),
            }
        }
    }

    /// `global_max_parallel_requests`, and its per-key sister.
    fn parallel(&mut self, root: &At<'a>) {
        let Some(general) = root.get("general_settings") else { return };
        let Some(at) = general.get("global_max_parallel_requests") else { return };
        match at.count().filter(|count| *count > 0) {
            Some(count) => {
                self.taken(&at, format!("the limit `concurrency`: {count} requests at one time"));
                self.draft.limits.push(Yaml::map([("concurrency", Some(Yaml::number(count)))]));
            }
            None => self.not_supported(&at, "this is no number above 0"),
        }
    }

    /// The file's own prices, and of what has none there those that ship with the gateway.
    fn prices(&mut self, groups: &[Group<'_>]) {
        let shipped = prices::read(SHIPPED).map(|(_, file)| file.list).unwrap_or_default();
        let (mut own, mut book) = (HashSet::new(), HashSet::new());
        for group in groups {
            let Some(entry) = self.draft.models.iter().find(|entry| entry.name == group.name) else { continue };
            let pool = entry.pool.clone();
            for deployment in &group.deployments {
                let info = deployment.at.get("model_info");
                let price = self.own_price(&deployment.params, info.as_ref(), &deployment.model, &pool);
                let base = info.as_ref().and_then(|info| info.get("base_model"));
                let known_as = base
                    .as_ref()
                    .and_then(At::text)
                    .map_or(&*deployment.model, |name| name.rsplit('/').next().unwrap_or(name));
                match price {
                    Some(price) if own.insert((deployment.model.clone(), pool.clone())) => {
                        self.draft.prices.push(line(&price))
                    }
                    Some(_) => self.not_supported(
                        &deployment.at,
                        "another entry of the model has a price already: a price is a model's",
                    ),
                    None => {
                        let found = shipped.iter().find(|price| price.models.iter().any(|name| name == known_as));
                        if let Some(price) = found.filter(|_| book.insert(deployment.model.clone())) {
                            self.draft
                                .prices
                                .push(line(&Price { models: vec![deployment.model.clone()], ..price.clone() }));
                        }
                        if let Some(base) = &base {
                            let told = if found.is_some() {
                                "its price is that of the base model"
                            } else {
                                "no price is known for it"
                            };
                            self.taken(base, told);
                        }
                    }
                }
                if let Some(base) = base {
                    self.told.insert(base.path);
                }
            }
        }
    }

    /// What the file says that a model costs, in `litellm_params` or `model_info`.
    fn own_price(&mut self, params: &At<'_>, info: Option<&At<'_>>, model: &str, pool: &str) -> Option<Price> {
        let members =
            || [Some(params), info].into_iter().flatten().flat_map(At::members).filter(|(key, _)| is_price(key));
        let first = members().next()?.1;
        let raw =
            members().filter_map(|(key, at)| Some((key.to_owned(), RawValue::from_string(at.value.to_string()).ok()?)));
        let (price, findings) = import::of_model(model, &raw.collect());
        members().for_each(|(_, at)| self.seen(Some(at)));
        let is_free = members().all(|(_, at)| at.number() == Some(0.0));
        let price = price.or_else(|| is_free.then(import::free));
        let findings = if is_free { String::new() } else { findings.join("; ") };
        let Some(price) = price else {
            self.not_supported(&first, format!("no price could be made of it: {findings}"));
            return None;
        };
        if !findings.is_empty() {
            self.changed(&first, findings);
        }
        self.taken(&first, "the price of this model at its pool, by the million; streams are asked for their usage");
        Some(Price {
            models: vec![model.to_owned()],
            pool: Some(pool.to_owned()),
            provider: None,
            source: None,
            ..price
        })
    }
}

/// Whether a key says what something costs.
fn is_price(key: &str) -> bool {
    key.contains("cost_per")
        || key.ends_with("_token_cost")
        || key.contains("token_cost_above")
        || key == "tiered_pricing"
}

fn line(price: &Price) -> Yaml {
    Yaml::Word(import::flow_of(price))
}

/// LiteLLM's duration as a window here.
fn window(duration: Option<&str>) -> Option<&str> {
    match duration {
        None => Some("total"),
        Some("1d" | "24h" | "daily") => Some("day"),
        Some("7d" | "1w" | "weekly") => Some("week"),
        Some("30d" | "1mo" | "monthly") => Some("month"),
        Some(text) => Window::parse(text, None).is_ok().then_some(text),
    }
}
