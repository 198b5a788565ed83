//! What happens when a server fails: timeouts, retries, cooldowns, fallbacks, aliases.

use super::Importer;
use super::cursor::At;
use super::models::{Deployment, Fallback, Group};
use super::yaml::Yaml;

/// What holds for every pool.
#[derive(Default)]
pub(super) struct Usual {
    answer_ms: Option<u64>,
    first_ms: Option<u64>,
    retries: Option<u64>,
    backoff_ms: Option<u64>,
    failures: Option<u64>,
    open_ms: Option<u64>,
    no_cooldown: bool,
    pub health_ms: Option<u64>,
}

/// What LiteLLM's `fallbacks` help with.
const USUAL_CAUSES: [&str; 6] = ["connect", "reset", "timeout", "5xx", "429", "unavailable"];

/// The most attempts of one request.
const ATTEMPTS_MAX: u64 = 20;

impl Usual {
    pub fn breaker(&self) -> Option<Yaml> {
        if self.no_cooldown {
            let never = [("failures", Some(Yaml::number(0))), ("failure_ratio", Some(Yaml::number(1)))];
            let never = never.into_iter().chain([("requests_min", Some(Yaml::number(u64::from(u32::MAX))))]);
            return Some(Yaml::map(never));
        }
        let longest = self.open_ms.filter(|ms| *ms > 60_000);
        let members = [
            ("failures", self.failures.map(Yaml::number)),
            ("open_ms", self.open_ms.map(Yaml::number)),
            ("open_ms_max", longest.map(Yaml::number)),
        ];
        let there = self.failures.or(self.open_ms).is_some();
        there.then(|| Yaml::map(members))
    }
}

impl<'a> Importer<'a> {
    /// Reads what holds for every pool, from the two sections that may say it. The router's word counts.
    pub(super) fn usual(&mut self, root: &At<'a>) {
        let (litellm, router) = (root.get("litellm_settings"), root.get("router_settings"));
        let sections = [&litellm, &router];
        for section in sections.into_iter().flatten() {
            for key in ["request_timeout", "timeout"] {
                self.usual.answer_ms = self.seconds(section, key, "until an answer begins").or(self.usual.answer_ms);
            }
            self.usual.first_ms =
                self.seconds(section, "stream_timeout", "until a stream's first event").or(self.usual.first_ms);
            self.usual.retries = self.retries(section.get("num_retries")).or(self.usual.retries);
            self.usual.failures = self.allowed_fails(section).or(self.usual.failures);
            self.usual.open_ms = self.cooldown(section).or(self.usual.open_ms);
        }
        let Some(router) = router else { return self.health(root) };
        self.usual.backoff_ms =
            self.seconds(&router, "retry_after", "before the same upstream is asked again, doubled each time");
        if let Some(at) = router.get("disable_cooldowns") {
            self.usual.no_cooldown = at.is_true();
            self.taken(&at, "no breaker opens");
        }
        if let Some(at) = router.get("routing_strategy") {
            self.strategy(&at);
        }
        self.health(root);
    }

    fn seconds(&mut self, section: &At<'_>, key: &str, what: &str) -> Option<u64> {
        let at = section.get(key)?;
        match at.milliseconds() {
            Some(ms) => self.taken(&at, format!("{ms} ms {what}")),
            None => self.not_supported(&at, "this is no time between a millisecond and a day"),
        }
        at.milliseconds()
    }

    fn retries(&mut self, at: Option<At<'_>>) -> Option<u64> {
        let at = at?;
        let count = at.count();
        match count {
            Some(count) if count < ATTEMPTS_MAX => {
                self.taken(
                    &at,
                    format!("{count} more attempts, and one for each fallback; each at another upstream first"),
                );
            }
            Some(_) => self.changed(&at, format!("a request has at most {ATTEMPTS_MAX} attempts")),
            None => self.not_supported(&at, "this is no number"),
        }
        count
    }

    fn allowed_fails(&mut self, section: &At<'_>) -> Option<u64> {
        let at = section.get("allowed_fails")?;
        let failures = at.count().filter(|count| *count < u64::from(u32::MAX))?;
        self.changed(&at, format!("the breaker opens at {} failures in a row, or at half of at least 20 in ten seconds; a minute is not counted", failures + 1));
        Some(failures + 1)
    }

    fn cooldown(&mut self, section: &At<'_>) -> Option<u64> {
        let at = section.get("cooldown_time")?;
        match at.milliseconds() {
            Some(ms) => self.changed(&at, format!("{ms} ms the first time, twice as long each time it opens again")),
            None => self.not_supported(&at, "this is no time between a millisecond and a day"),
        }
        at.milliseconds()
    }

    fn strategy(&mut self, at: &At<'_>) {
        match at.text().unwrap_or_default() {
            "least-busy" => self.taken(at, "the less busy of two upstreams that are drawn by weight"),
            "simple-shuffle" => self.changed(at, "the less busy of two upstreams that are drawn by weight"),
            _ => self.not_supported(
                at,
                "upstreams are drawn by weight and by how busy they are, not by latency, cost or use",
            ),
        }
    }

    fn health(&mut self, root: &At<'a>) {
        let Some(general) = root.get("general_settings") else { return };
        let (asks, interval) = (general.get("background_health_checks"), general.get("health_check_interval"));
        if let Some(at) = asks.filter(At::is_true) {
            let ms = interval.as_ref().and_then(At::milliseconds).unwrap_or(300_000).max(10);
            self.usual.health_ms = Some(ms);
            self.changed(
                &at,
                format!("every upstream is asked every {ms} ms on its health path, which costs no tokens"),
            );
        } else if let Some(at) = general.get("background_health_checks") {
            self.taken(&at, "clouds are not asked for their health; own servers are, every second");
        }
        self.seen(interval);
    }

    /// How long the phases of a request may take: the longest that a member says, else what holds for all.
    pub(super) fn timeouts(&mut self, members: &[&Deployment<'_>]) -> Option<Yaml> {
        let own = |importer: &mut Self, key, what| {
            members.iter().filter_map(|member| importer.seconds(&member.params, key, what)).max()
        };
        let answer = own(self, "timeout", "until an answer begins").or(self.usual.answer_ms);
        let first = own(self, "stream_timeout", "until a stream's first event").or(self.usual.first_ms).or(answer);
        let total = answer.max(first).filter(|ms| *ms >= 3_600_000).map(|ms| ms * 2);
        let members = [("first_token_ms", first), ("answer_ms", answer), ("total_ms", total)];
        let there = answer.or(first).is_some();
        there.then(|| Yaml::map(members.map(|(key, ms)| (key, ms.map(Yaml::number)))))
    }

    /// How often a request is tried: `orders` pools of the model itself included.
    pub(super) fn retry(&mut self, members: &[&Deployment<'_>], orders: usize) -> Option<Yaml> {
        let mut own = None;
        for key in ["num_retries", "max_retries"] {
            own = members.iter().filter_map(|member| self.retries(member.params.get(key))).max().or(own);
        }
        let retries = own.or(self.usual.retries).unwrap_or(2);
        let attempts = (retries + orders as u64).clamp(1, ATTEMPTS_MAX);
        let members = [("attempts", (attempts != 3).then_some(attempts)), ("backoff_ms", self.usual.backoff_ms)];
        let there = members.iter().any(|(_, value)| value.is_some());
        there.then(|| Yaml::map(members.map(|(key, value)| (key, value.map(Yaml::number)))))
    }

    /// Where the requests of a model go when it cannot answer.
    pub(super) fn fallbacks(&mut self, root: &At<'a>, groups: &[Group<'_>]) {
        for section in ["litellm_settings", "router_settings"].into_iter().filter_map(|key| root.get(key)) {
            let kinds = [
                ("fallbacks", USUAL_CAUSES.to_vec()),
                ("context_window_fallbacks", vec!["context_length"]),
                ("content_policy_fallbacks", vec!["content_filter"]),
            ];
            for (key, causes) in kinds {
                let Some(at) = section.get(key) else { continue };
                self.seen(Some(at.clone()));
                // A list of mappings, or one mapping.
                let mappings = if at.value.is_object() { vec![at] } else { at.items() };
                for (from, to) in mappings.iter().flat_map(At::members) {
                    self.fallback(from, &to, &causes, groups);
                }
            }
            if let Some(at) = section.get("default_fallbacks") {
                self.fallback("*", &at, &USUAL_CAUSES, groups);
            }
        }
        self.attempts_for_fallbacks();
    }

    fn fallback(&mut self, from: &str, to: &At<'_>, causes: &[&'static str], groups: &[Group<'_>]) {
        let everybody = from == "*" && !self.draft.models.iter().any(|entry| entry.name == "*");
        let sources: Vec<usize> =
            (0..self.draft.models.len()).filter(|index| everybody || self.draft.models[*index].name == from).collect();
        if sources.is_empty() {
            return self.not_supported(to, format!("no model is named {from}: left out"));
        }
        let (mut taken, mut left) = (Vec::new(), Vec::new());
        for (name, _) in to.texts() {
            for source in &sources {
                match self.stage(*source, name, causes, groups) {
                    Ok(true) => taken.push(name),
                    Ok(false) => {}
                    Err(why) => left.push(why),
                }
            }
        }
        left.dedup();
        if to.texts().len() != to.items().len().max(1) {
            left.push("only names of models are understood".to_owned());
        }
        taken.dedup();
        let causes = causes.join(", ");
        match (taken.as_slice(), left.as_slice()) {
            ([], []) => self.taken(to, "nothing to fall back on"),
            (taken, []) => self
                .changed(to, format!("{from} falls back on {} for {causes}; not for other errors", taken.join(", "))),
            ([], left) => self.not_supported(to, left.join("; ")),
            (taken, left) => {
                self.changed(to, format!("{from} falls back on {} for {causes}", taken.join(", ")));
                self.not_supported(to, left.join("; "));
            }
        }
    }

    /// Adds the model `name` to those that stand behind one; whether there was anything to add.
    fn stage(
        &mut self,
        source: usize,
        name: &str,
        causes: &[&'static str],
        groups: &[Group<'_>],
    ) -> Result<bool, String> {
        if self.draft.models[source].fallbacks.len() as u64 + 1 >= ATTEMPTS_MAX {
            return Err(format!("{} has as many fallbacks as a request has attempts", self.draft.models[source].name));
        }
        let target = self.draft.models.iter().position(|entry| entry.name == name);
        let target = target.or_else(|| self.draft.models.iter().position(|entry| entry.star(name).is_some()));
        let target = target.ok_or_else(|| format!("no model is named {name}"))?;
        if target == source {
            return Ok(false);
        }
        let (from, to) = (&self.draft.models[source], &self.draft.models[target]);
        let is_anthropic = |providers: &[&str]| providers.iter().all(|provider| *provider == "anthropic");
        if is_anthropic(&from.providers) != is_anthropic(&to.providers) {
            return Err(format!(
                "{} cannot fall back on {name}: bodies are not translated between dialects",
                from.name
            ));
        }
        let each = groups.iter().find(|group| group.name == name).is_some_and(|group| {
            group.deployments.iter().any(|deployment| deployment.model != group.deployments[0].model)
        });
        let rename = (!each).then(|| to.name_there(name));
        let pool = to.pool.clone();
        let entry = &mut self.draft.models[source];
        match entry.fallbacks.iter_mut().find(|fallback| fallback.pool == pool) {
            // It is there already, for something else.
            Some(fallback) => fallback
                .on
                .extend(causes.iter().filter(|cause| !fallback.on.contains(cause)).copied().collect::<Vec<_>>()),
            None => entry.fallbacks.push(Fallback { pool, rename, on: causes.to_vec() }),
        }
        Ok(true)
    }

    /// A fallback costs an attempt.
    fn attempts_for_fallbacks(&mut self) {
        for entry in &mut self.draft.models {
            for fallback in &mut entry.fallbacks {
                if fallback.on == USUAL_CAUSES {
                    fallback.on.clear();
                }
            }
            let least = entry.fallbacks.len() as u64 + 1;
            let Some((_, Yaml::Map(pool))) = self.draft.pools.iter_mut().find(|(name, _)| *name == entry.pool) else {
                continue;
            };
            more_attempts(pool, least, self.usual.retries);
        }
    }

    /// Other names for models.
    pub(super) fn aliases(&mut self, root: &At<'a>) {
        let of_router = root.get("router_settings").and_then(|router| router.get("model_group_alias"));
        let of_litellm = root.get("litellm_settings").and_then(|litellm| litellm.get("model_alias_map"));
        for (alias, at) in [of_router, of_litellm].iter().flatten().flat_map(At::members) {
            let target = at.text().or_else(|| at.value.get("model")?.as_str()).unwrap_or_default();
            let known = |name: &str| {
                self.draft.models.iter().any(|entry| entry.name == name || entry.aliases.iter().any(|a| a == name))
            };
            let why = match alias {
                alias if known(alias) => Some(format!("{alias} is a model or an alias already")),
                alias if alias.is_empty() || alias.len() > 100 || alias.matches('*').count() > 1 => {
                    Some("this is no name here".to_owned())
                }
                _ => None,
            };
            let entry = self.draft.models.iter_mut().find(|entry| entry.name == target);
            match (why, entry) {
                (Some(why), _) => self.not_supported(&at, why),
                (None, None) => self.not_supported(&at, format!("no model is named {target}")),
                (None, Some(entry)) => {
                    // Without it the alias itself would reach the upstream.
                    entry.rename =
                        entry.rename.take().or_else(|| (!entry.name.contains('*')).then(|| entry.name.clone()));
                    entry.aliases.push(alias.to_owned());
                    self.alias_told(&at, alias, target);
                }
            }
        }
    }

    fn alias_told(&mut self, at: &At<'_>, alias: &str, target: &str) {
        if at.get("hidden").is_some_and(|hidden| hidden.is_true()) {
            return self
                .changed(at, format!("{alias} is an alias of {target}; `GET /v1/models` lists it all the same"));
        }
        self.taken(at, format!("{alias} is an alias of {target}"));
    }
}

/// Raises a pool's attempts so that every fallback has one.
fn more_attempts(pool: &mut Vec<(String, Yaml)>, least: u64, retries: Option<u64>) {
    let wanted = (least + retries.unwrap_or(0)).clamp(1, ATTEMPTS_MAX);
    let known = pool.iter_mut().find_map(|(key, value)| match value {
        Yaml::Map(members) if key == "retry" => Some(members),
        _ => None,
    });
    let Some(members) = known else {
        if wanted > 3 {
            pool.push(("retry".to_owned(), Yaml::map([("attempts", Some(Yaml::number(wanted)))])));
        }
        return;
    };
    match members.iter_mut().find(|(key, _)| key == "attempts") {
        Some((_, Yaml::Word(attempts))) if attempts.parse::<u64>().is_ok_and(|known| known < wanted) => {
            *attempts = wanted.to_string();
        }
        None if wanted > 3 => members.push(("attempts".to_owned(), Yaml::number(wanted))),
        _ => {}
    }
}
