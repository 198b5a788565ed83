//! From limits as they are written to those that requests meet.

use std::sync::Arc;
use std::time::Duration;

use super::problem::nearest;
use super::{Compiler, Models, Pattern, Tenants, file};
use crate::limits::window::Window;
use crate::limits::{Each, Exhausted, Limit, Unit};

impl Compiler<'_> {
    /// The limits at `path`: everybody's, or those of a tenant.
    pub(super) fn limits(
        &mut self,
        path: &str,
        tenant: Option<&str>,
        limits: &[file::Limit],
        file: &file::File,
        models: &Models,
    ) -> Vec<Arc<Limit>> {
        let place = |index: usize| format!("{path}[{index}]");
        let found = limits.iter().enumerate();
        found
            .filter_map(|(index, limit)| self.limit(&place(index), tenant, limit, file, models))
            .map(Arc::new)
            .collect()
    }

    fn limit(
        &mut self,
        path: &str,
        tenant: Option<&str>,
        limit: &file::Limit,
        file: &file::File,
        models: &Models,
    ) -> Option<Limit> {
        for (index, model) in limit.models.iter().flatten().enumerate() {
            self.listed_model(&format!("{path}.models[{index}]"), model, file, models);
            // Limits count the model that is chosen.
            self.is_no_router(&format!("{path}.models[{index}]"), model, file);
        }
        for (index, surface) in limit.surfaces.iter().flatten().enumerate() {
            self.listed_surface(&format!("{path}.surfaces[{index}]"), surface, file);
        }
        self.limit_words(path, limit, file, models);
        let (unit, max) = self.amount(path, limit)?;
        let window = self.window(path, limit, unit)?;
        let name = name(tenant, limit, unit);
        let state = &self.world.state.limits;
        // A limit that counts another thing, or over another time, has levels of its own.
        let levels = format!("{name} {unit:?} {}", limit.per.as_deref().unwrap_or_default());
        Some(Limit {
            level: limit.each.is_empty().then(|| state.named(&levels)),
            apart: state.apart(&levels),
            levels: levels.clone().into(),
            meters: self.world.telemetry.limit(&name),
            warnings: state.warnings.clone(),
            name: name.into(),
            unit,
            max,
            window,
            each: limit.each.clone(),
            models: limit.models.as_ref().map(|list| list.iter().map(|text| Pattern::new(text)).collect()),
            surfaces: limit.surfaces.as_ref().map(|list| list.iter().cloned().collect()),
            plans: limit.plans.as_ref().map(|list| list.iter().cloned().collect()),
            on_limit: limit.on_limit,
            clamps: limit.on_short == file::OnShort::Clamp,
            passes_unpriced: limit.on_unpriced == file::OnError::Allow,
            exhausted: exhausted(limit),
            warn_at: ascending(&limit.warn_at),
        })
    }

    /// What the words of a limit say beside its amount.
    fn limit_words(&mut self, path: &str, limit: &file::Limit, file: &file::File, models: &Models) {
        if let Some(instead) = limit.on_exhausted.as_ref().and_then(|exhausted| exhausted.instead.as_ref())
            && !self.is_no_router(&format!("{path}.on_exhausted.use"), instead, file)
            && models.named(instead).is_none()
        {
            let hint = nearest(instead, file.models.iter().map(|model| model.name.as_str()));
            self.wrong(&format!("{path}.on_exhausted.use"), format!("no model is named {instead}{hint}"));
        }
        for (index, at) in limit.warn_at.iter().enumerate().filter(|(_, at)| !(1..=100).contains(*at)) {
            self.wrong(&format!("{path}.warn_at[{index}]"), format!("{at} is no share: it has 1 to 100 per cent"));
        }
        for (index, each) in limit.each.iter().enumerate() {
            if limit.each[..index].contains(each) {
                self.wrong(&format!("{path}.each[{index}]"), "stands here twice");
            }
        }
        if limit.plans.is_some() && !file.gives_plans() {
            self.wrong(
                &format!("{path}.plans"),
                "nobody has a plan: name the claim with it under an issuer of a `jwt`",
            );
        }
        let whose = limit.each.iter().any(|each| matches!(each, Each::Tenant | Each::Key));
        if whose && file.authenticators.is_none() {
            self.wrong(&format!("{path}.each"), "nobody is known: give the policy `authenticators`");
        }
    }

    /// The one thing that it counts.
    fn amount(&mut self, path: &str, limit: &file::Limit) -> Option<(Unit, u64)> {
        let amounts = [
            (Unit::Requests, limit.requests),
            (Unit::InputTokens, limit.input_tokens),
            (Unit::OutputTokens, limit.output_tokens),
            (Unit::Tokens, limit.tokens),
            (Unit::Concurrency, limit.concurrency),
            (Unit::Nanousd, limit.usd.map(|usd| usd.pico() / 1000)),
        ];
        let mut given = amounts.into_iter().filter_map(|(unit, amount)| Some((unit, amount?)));
        match (given.next(), given.next()) {
            (Some(one), None) => Some(one),
            (None, _) => {
                self.wrong(
                    path,
                    "a limit needs an amount: requests, input_tokens, output_tokens, tokens, usd or concurrency",
                );
                None
            }
            (Some(_), Some(_)) => {
                self.wrong(path, "a limit counts one thing: make another limit of the second amount");
                None
            }
        }
    }

    fn window(&mut self, path: &str, limit: &file::Limit, unit: Unit) -> Option<Window> {
        let zone = limit.zone.as_deref();
        let window = match (&limit.per, unit) {
            (None, Unit::Concurrency) => return Some(Window::Total),
            (None, _) => {
                Err((path.to_owned(), "a limit needs a window: per: 1m, 1h, day, week, month, total".to_owned()))
            }
            (Some(_), Unit::Concurrency) => {
                Err((format!("{path}.per"), "concurrency is counted at one time: it has no window".to_owned()))
            }
            (Some(per), _) => Window::parse(per, zone).map_err(|error| (format!("{path}.per"), error)),
        };
        let window = window.map_err(|(path, error)| self.wrong(&path, error)).ok()?;
        if zone.is_some() && !matches!(window, Window::Calendar(..)) {
            self.wrong(&format!("{path}.zone"), "only day, week and month begin somewhere: this window has no zone");
        }
        Some(window)
    }

    /// One name, one limit: levels, records and metrics go by it.
    pub(super) fn limits_are_told_apart(&mut self, file: &file::File, limits: &[Arc<Limit>], tenants: &Tenants) {
        let mut seen = std::collections::HashSet::new();
        let mut twice = |limit: &Limit| (!seen.insert(limit.name.clone())).then(|| limit.name.clone());
        let of_all: Vec<_> = limits.iter().filter_map(|limit| twice(limit)).collect();
        for name in of_all {
            self.wrong("limits", format!("two limits are named {name}: give one of them a name of its own"));
        }
        for name in file.tenants.keys() {
            let Some(tenant) = tenants.get(name.as_str()) else { continue };
            let own = file.tenants[name].limits.len().min(tenant.limits.len());
            let twice: Vec<_> = tenant.limits[..own].iter().filter_map(|limit| twice(limit)).collect();
            for limit in twice {
                let message = format!("two limits are named {limit}: give one of them a name of its own");
                self.wrong(&format!("tenants.{name}.limits"), message);
            }
        }
    }
}

/// Its name: what it says, where nobody gave it one; a tenant's begin with the tenant's.
fn name(tenant: Option<&str>, limit: &file::Limit, unit: Unit) -> String {
    let says = || {
        let mut words = vec![match unit {
            Unit::Requests => "requests",
            Unit::InputTokens => "input_tokens",
            Unit::OutputTokens => "output_tokens",
            Unit::Tokens => "tokens",
            Unit::Nanousd => "usd",
            Unit::Concurrency => "concurrency",
        }];
        words.extend(limit.per.as_deref());
        words.join("/")
    };
    let own = limit.name.clone().unwrap_or_else(says);
    tenant.map_or(own.clone(), |tenant| format!("{tenant}/{own}"))
}

fn exhausted(limit: &file::Limit) -> Exhausted {
    let Some(exhausted) = &limit.on_exhausted else { return Exhausted::default() };
    Exhausted { instead: exhausted.instead.as_deref().map(Into::into), wait: Duration::from_millis(exhausted.wait_ms) }
}

fn ascending(thresholds: &[u8]) -> Vec<u8> {
    let mut sorted = thresholds.to_vec();
    sorted.sort_unstable();
    sorted
}

#[cfg(test)]
mod tests {
    use crate::policy::tests::{POOLS, compiled, problems};

    const MODELS: &str = "models:\n  - {name: llama-3, pool: fast}\n";

    fn wrong(limits: &str) -> Vec<String> {
        problems(&format!("{POOLS}{MODELS}{limits}"))
    }

    #[test]
    fn a_limit_has_one_amount_and_one_window() {
        let cases = [
            ("{per: 1m}", "needs an amount"),
            ("{requests: 1, tokens: 1, per: 1m}", "counts one thing"),
            ("{requests: 1}", "needs a window"),
            ("{concurrency: 1, per: 1m}", "has no window"),
            ("{requests: 1, per: 1m, zone: Europe/Berlin}", "has no zone"),
            ("{requests: 1, per: day, zone: Berlin}", "no time zone"),
            ("{requests: 1, per: fortnight}", "is no window"),
            ("{requests: 1, per: 1m, models: [lama-3]}", "did you mean llama-3"),
            ("{requests: 1, per: 1m, surfaces: [/v1/chat]}", "nothing is served at"),
            ("{requests: 1, per: 1m, each: [key]}", "authenticators"),
            ("{requests: 1, per: 1m, each: [user, user]}", "twice"),
            ("{usd: 1, per: day, on_exhausted: {use: small}}", "no model is named small"),
            ("{usd: 1, per: day, warn_at: [0]}", "no share"),
            ("{usd: -1, per: day}", "negative"),
            ("{requests: -1, per: day}", "requests"),
        ];
        for (limit, expected) in cases {
            let told = wrong(&format!("limits:\n  - {limit}\n"));
            assert!(told.iter().any(|line| line.contains(expected)), "{limit}: {told:?}");
            let lines = POOLS.lines().count() + MODELS.lines().count() + 2;
            assert!(told.iter().all(|line| line.starts_with(&format!("policy.yaml:{lines}:"))), "{limit}: {told:?}");
        }
    }

    #[test]
    fn a_tenant_has_the_limits_of_those_above_it_too() {
        let policy = compiled(&format!(
            "{POOLS}{MODELS}tenants:\n  top:\n    output_tokens_max: 10\n    limits: [{{requests: 9, per: 1m}}, {{usd: 5, per: month}}]\n  low: {{parent: top, output_tokens_max: 20, limits: [{{requests: 3, per: 1m}}]}}\n"
        ));
        let policy = policy.unwrap();
        let names = |tenant: &str| -> Vec<String> {
            policy.tenants[tenant].limits.iter().map(|limit| limit.name.to_string()).collect()
        };
        assert_eq!(names("low"), ["low/requests/1m", "top/requests/1m", "top/usd/month"]);
        assert_eq!(policy.tenants["low"].output_tokens_max, Some(10));
        assert_eq!(policy.tenants["low"].limits[2].max, 5_000_000_000);
    }

    #[test]
    fn a_name_is_given_once() {
        let twice = wrong("limits: [{requests: 1, per: 1m}, {requests: 2, per: 1m, each: [user]}]\n");
        assert!(twice[0].contains("two limits are named requests/1m"), "{twice:?}");
        let named = "limits: [{requests: 1, per: 1m}, {name: x, requests: 2, per: 1m}]\n";
        assert!(compiled(&format!("{POOLS}{MODELS}{named}")).is_ok());
    }

    #[test]
    fn a_reload_keeps_the_level_of_a_limit_whose_amount_changes() {
        // The levels live in the state; `compiled` makes one for each call, so one text with both stands for it.
        let policy = compiled(&format!("{POOLS}{MODELS}limits: [{{requests: 1, per: 1m}}, {{tokens: 1, per: 1m}}]\n"));
        let limits = policy.unwrap().limits;
        let levels: Vec<_> = limits.iter().map(|limit| limit.level.clone().unwrap()).collect();
        assert!(!std::sync::Arc::ptr_eq(&levels[0], &levels[1]));
    }
}
