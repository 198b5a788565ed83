//! Everything else: keys and the database, callbacks, the cache, pass-through paths.

use super::cursor::At;
use super::yaml::Yaml;
use super::{Importer, Outcome};
use crate::policy::file::Http2;
use crate::pool::origin::Origin;
use crate::surface;

/// What is in force here anyway.
const ANYWAY: &[(&str, &str)] = &[
    ("litellm_settings.set_verbose", "`--log debug` says more"),
    ("litellm_settings.json_logs", "the log has JSON lines where it does not go to a terminal, or with --log-json"),
    (
        "litellm_settings.turn_off_message_logging",
        "no text of a prompt or an answer is kept unless `audit.capture` says so",
    ),
    ("litellm_settings.redact_user_api_key_info", "no key is in the log or in a record"),
    ("litellm_settings.redact_messages_in_exceptions", "errors never have text of a prompt"),
    ("litellm_settings.telemetry", "nothing is sent to anybody"),
    ("litellm_settings.suppress_debug_info", "there is none"),
    (
        "litellm_settings.include_cost_in_streaming_usage",
        "the record of a stream has its cost; the stream itself does not",
    ),
    ("litellm_settings.set_default_user_id", "nobody needs one"),
    ("general_settings.disable_spend_logs", "the settings decide: `ledger.enabled: false`"),
    ("general_settings.disable_master_key_return", "no key can be read back"),
    ("general_settings.disable_adding_master_key_hash_to_db", "there is no such database"),
    ("general_settings.database_connection_pool_limit", "there is no such database"),
    ("general_settings.database_connection_timeout", "there is no such database"),
    ("general_settings.proxy_batch_write_at", "records are written within `audit.commit_ms`"),
    ("general_settings.use_redis_transaction_buffer", "the ledger is folded from each gateway's own journal"),
    ("router_settings.set_verbose", "`--log debug` says more"),
    ("router_settings.debug_level", "`--log debug` says more"),
    ("router_settings.enable_pre_call_checks", "a prompt that is too long goes where `on: [context_length]` says"),
];

/// What there is another way for.
const HINTS: &[(&str, &str)] = &[
    (
        "litellm_settings.drop_params",
        "bodies pass as they came: what an upstream does not understand it refuses itself, or a tenant's `parameters.forbid` does before",
    ),
    ("litellm_settings.additional_drop_params", "bodies pass as they came"),
    ("litellm_settings.modify_params", "bodies pass as they came"),
    ("litellm_settings.cache", "answers are not kept here; the prompt cache of a model server works as before"),
    ("litellm_settings.cache_params", "answers are not kept here"),
    (
        "litellm_settings.default_internal_user_params",
        "there are no users here: a tenant's `limits` with `each: [user]` are near it",
    ),
    ("litellm_settings.default_team_settings", "write a tenant for each team, and `audit.sinks` for what it logs"),
    ("litellm_settings.default_team_params", "write a tenant for each team with its `models` and `limits`"),
    (
        "litellm_settings.upperbound_key_generate_params",
        "`infergate key create --expires` says how long a key holds; its tenant's `limits` how much",
    ),
    ("litellm_settings.default_key_generate_params", "a key has what its tenant has"),
    ("litellm_settings.key_generation_settings", "an owner of the admin port makes keys"),
    ("litellm_settings.ssl_verify", "certificates are always checked: name your authority in the settings, `ca_file`"),
    ("litellm_settings.ssl_certificate", "client certificates to upstreams are not sent"),
    ("litellm_settings.force_ipv4", "a name's addresses are all used"),
    ("litellm_settings.public_model_groups", "`GET /v1/models` lists what the caller may use"),
    ("litellm_settings.tag_budget_config", "write `tenants` for tags"),
    ("router_settings.retry_policy", "retries are counted together: `retry.on` of a pool says for which causes"),
    ("router_settings.model_group_retry_policy", "`retry` of a model's pool says it"),
    ("router_settings.allowed_fails_policy", "answers of 4xx never count, all else counts as one"),
    ("router_settings.routing_strategy_args", "there is nothing to set"),
    ("router_settings.enable_tag_filtering", "write `models` of `tenants`"),
    ("router_settings.max_fallbacks", "`retry.attempts` bounds all attempts together"),
    ("router_settings.optional_pre_call_checks", "an upstream is chosen for each request by how busy it is"),
    ("router_settings.cache_responses", "answers are not kept here"),
    ("general_settings.alerting", "docker/prometheus/alerts.yaml has alerts for Prometheus"),
    ("general_settings.alerting_threshold", "docker/prometheus/alerts.yaml has alerts for Prometheus"),
    ("general_settings.alert_types", "docker/prometheus/alerts.yaml has alerts for Prometheus"),
    ("general_settings.alert_to_webhook_url", "docker/prometheus/alerts.yaml has alerts for Prometheus"),
    ("general_settings.allowed_routes", "a tenant's `surfaces` are the endpoints that it may use"),
    ("general_settings.allowed_ips", "bind the listener to where only they come from"),
    ("general_settings.enforce_user_param", "a tenant's `parameters.user` sets it"),
    ("general_settings.max_parallel_requests", "a limit on `concurrency` with `each: [key]` is near it"),
    ("general_settings.store_prompts_in_spend_logs", "`audit.capture` keeps texts, if you want that"),
    ("general_settings.store_model_in_db", "models stand in the policy, which is reloaded when it is saved"),
    ("general_settings.forward_client_headers_to_llm_api", "clients' headers go on anyway, but for their credentials"),
    ("general_settings.key_management_system", "keys come from the environment or from files"),
    ("general_settings.key_management_settings", "keys come from the environment or from files"),
    ("general_settings.ui_access_mode", "there is no such page; docker/grafana has dashboards"),
    ("environment_variables", "set them where the gateway starts; only addresses were taken from here"),
    ("callback_settings", "see `telemetry.traces` and `audit.sinks`"),
    ("mcp_servers", "tools of MCP servers are not served here"),
    ("vector_store_registry", "vector stores are not served here"),
    ("prompts", "prompts are not kept here"),
    ("files_settings", "files are not served here"),
    ("finetune_settings", "fine-tuning is not served here"),
    ("assistant_settings", "assistants are not served here"),
    ("include", "write all into one file and import that"),
    ("credential_list", "no entry of the list uses it"),
    ("search_tools", "search is not served here"),
];

/// The same for keys of an entry in `model_list`.
const PARAMETER_HINTS: &[(&str, &str)] = &[
    ("api_version", "Azure's v1 API needs none"),
    ("tags", "write `models` of `tenants`"),
    ("mock_response", "`infergate simulate` is a model server that needs no model"),
    ("drop_params", "bodies pass as they came"),
    ("cooldown_time", "`breaker.open_ms` holds for a whole pool"),
    ("region_name", "an upstream's address decides"),
    ("access_groups", "a tenant's `models` say what it may use"),
    ("team_id", "a tenant's `models` say what it may use"),
];

/// What is said of a key that nothing was made of.
pub(super) fn hint(path: &str) -> Option<&'static str> {
    if path.starts_with("credential_list[") && path.contains("].credential_") {
        return Some("a policy has nothing of it");
    }
    let begins =
        |known: &str| path.strip_prefix(known).is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']));
    if let Some((_, told)) = HINTS.iter().find(|(known, _)| begins(known)) {
        return Some(told);
    }
    let key = path.rsplit('.').next().unwrap_or_default();
    let (of_info, of_params) =
        (path.contains("].model_info.") || path.ends_with("].model_info"), path.contains("].litellm_params."));
    if !path.starts_with("model_list[") || !(of_info || of_params) {
        return None;
    }
    let known = PARAMETER_HINTS.iter().find(|(known, _)| *known == key).map(|(_, told)| *told);
    let else_told = match of_info {
        true => "what a model can do is for its server to say",
        false => {
            "a field of requests has no default for one model: a tenant's `parameters.defaults` has, or the application sets it"
        }
    };
    Some(known.unwrap_or(else_told))
}

impl<'a> Importer<'a> {
    pub(super) fn rest(&mut self, root: &At<'a>) {
        for (path, told) in ANYWAY {
            let (section, key) = path.split_once('.').unwrap_or((path, ""));
            if let Some(at) = root.get(section).and_then(|section| section.get(key)) {
                self.taken(&at, *told);
            }
        }
        self.callbacks(root);
        let general = root.get("general_settings");
        self.who_may(root, general.as_ref());
        if let Some(general) = &general {
            self.general(general);
        }
        self.shared(root);
        self.told_of_prices(root);
    }

    fn callbacks(&mut self, root: &At<'a>) {
        let Some(litellm) = root.get("litellm_settings") else { return };
        for key in ["callbacks", "success_callback", "failure_callback", "service_callbacks"] {
            let Some(list) = litellm.get(key) else { continue };
            self.seen(Some(list.clone()));
            for (name, at) in list.texts() {
                self.callback(name, &at);
            }
        }
    }

    fn callback(&mut self, name: &str, at: &At<'_>) {
        match name {
            "prometheus" | "prometheus_system" => self.changed(at, "the admin port has /metrics, with other names; docker/grafana has dashboards for them"),
            "otel" | "opentelemetry" => {
                self.draft.has_traces = true;
                self.changed(at, "traces go by OTLP over HTTP to OTEL_EXPORTER_OTLP_ENDPOINT, one request in a hundred and those that fail or are slow");
            }
            "detect_prompt_injection" => {
                self.changed(at, "the rule `injection`: English only, a first filter");
                let rule = Yaml::map([
                    ("name", Some(Yaml::text("injection"))),
                    ("in", Some(Yaml::texts(["prompt.user", "prompt.tool"]))),
                    ("verdict", Some(Yaml::word("block"))),
                    ("injection", Some(Yaml::Map(Vec::new()))),
                ]);
                self.rule(at, rule);
            }
            "hide_secrets" => {
                self.changed(at, "the rule `hide_secrets`: known shapes of secrets are taken out");
                let rule = Yaml::map([
                    ("name", Some(Yaml::text("hide_secrets"))),
                    ("in", Some(Yaml::texts(["prompt.system", "prompt.user", "prompt.tool"]))),
                    ("verdict", Some(Yaml::word("redact"))),
                    ("secrets", Some(Yaml::Map(Vec::new()))),
                ]);
                self.rule(at, rule);
            }
            "dynamic_rate_limiter" | "dynamic_rate_limiter_v2" | "max_budget_limiter" | "parallel_request_limiter" => {
                self.taken(at, "`limits` are there without it");
            }
            _ => self.not_supported(at, "every request leaves a record: `audit.sinks` sends it to files, webhooks, OTLP logs, NATS or Kafka, `telemetry.traces` to what understands OpenTelemetry"),
        }
    }

    /// Who may ask: whoever had to have a key before must have one here.
    fn who_may(&mut self, root: &At<'a>, general: Option<&At<'a>>) {
        let find = |key: &str| general.and_then(|general| general.get(key));
        if let Some(at) = find("master_key") {
            self.draft.has_keys = true;
            self.changed(&at, "everybody needs a key of the gateway: set INFERGATE_PEPPER (openssl rand -hex 32), then `infergate key create --policy FILE --tenant default --name WHO` for each; the admin port has keys of its own (settings, `admin.keys`)");
        }
        if let Some(at) = find("database_url") {
            self.draft.has_keys = true;
            self.not_supported(&at, "keys, teams and spend in it are not read: make keys with `infergate key create`, teams as `tenants`; several gateways share one ledger in PostgreSQL (settings, `ledger.url`)");
        }
        for key in ["custom_auth", "enable_jwt_auth", "enable_oauth2_auth", "litellm_jwtauth"] {
            let Some(at) = find(key).filter(|at| at.value.as_bool() != Some(false)) else { continue };
            self.draft.has_keys = true;
            let told = "not read: `authenticators: - jwt` takes tokens of identity providers; without that, everybody needs a key of the gateway";
            self.not_supported(&at, told);
        }
        if !self.draft.has_keys {
            let at = general.cloned().or_else(|| root.get("model_list"));
            if let Some(at) = at {
                self.note(Outcome::Changed, &at, "no `master_key`: everybody who reaches the gateway may ask, as before, unless it came from LITELLM_MASTER_KEY: then add `authenticators`");
            }
        }
    }

    fn general(&mut self, general: &At<'_>) {
        if let Some(at) = general.get("completion_model") {
            self.default_model(&at);
        }
        if let Some(at) = general.get("max_request_size_mb") {
            self.largest_body(&at);
        }
        if let Some(at) = general.get("user_header_name") {
            self.user_header(&at);
        }
        if let Some(at) = general.get("maximum_spend_logs_retention_period") {
            self.retention(&at);
        }
        for entry in general.get("pass_through_endpoints").map(|list| list.items()).unwrap_or_default() {
            self.pass_through(&entry);
        }
    }

    fn default_model(&mut self, at: &At<'_>) {
        let known = at.text().filter(|name| self.draft.has_model(name));
        self.draft.default_model = known.map(str::to_owned);
        match known {
            Some(_) => self.changed(at, "the model of requests that name none, or one that is not there"),
            None => self.not_supported(at, "no model has this name"),
        }
    }

    fn largest_body(&mut self, at: &At<'_>) {
        let bytes = at.number().map(|megabytes| (megabytes * 1_048_576.0) as u64);
        let Some(bytes) = bytes.filter(|bytes| (1..=1 << 40).contains(bytes)) else {
            return self.not_supported(at, "this is no size");
        };
        self.taken(at, "the largest body");
        self.draft.requests.push(("body_bytes_max", Yaml::number(bytes)));
    }

    fn user_header(&mut self, at: &At<'_>) {
        let Some(name) = at.text().filter(|name| name.parse::<http::HeaderName>().is_ok()) else {
            return self.not_supported(at, "this is no header's name");
        };
        self.taken(at, "the header that names the end user");
        self.draft.requests.push(("user_header", Yaml::text(name)));
    }

    fn retention(&mut self, at: &At<'_>) {
        let days = at.text().and_then(|text| text.strip_suffix('d')?.parse::<u32>().ok()).filter(|days| *days > 0);
        self.draft.keep_days = days.map(u64::from);
        match days {
            Some(days) => self.changed(at, format!("the journal is kept for {days} days; the ledger keeps its sums")),
            None => self.not_supported(at, "only whole days are understood, like 30d: `audit.keep_days`"),
        }
    }

    /// A path that passes unread, if the server has it at the same path.
    fn pass_through(&mut self, entry: &At<'_>) {
        self.told.insert(entry.path.clone());
        let part = |key: &str| entry.get(key).and_then(|at| at.text()).unwrap_or_default();
        let (path, target) = (part("path"), part("target").trim_end_matches('/'));
        let below = entry.get("include_subpath").is_some_and(|at| at.is_true());
        if surface::find(path).is_some() {
            return self
                .not_supported(entry, "the gateway serves this path itself: give it a model whose pool is there");
        }
        let base = target.strip_suffix(path.trim_end_matches('/')).filter(|_| path.starts_with('/') && path.len() > 1);
        let good = base.filter(|base| !base.contains(['@', '?']) && Origin::parse(base, Http2::Tls).is_ok());
        let Some(base) = good else {
            return self.not_supported(entry, "a path that passes through is the same at the upstream here: left out");
        };
        if entry.get("headers").is_some() {
            self.not_supported(entry, "its headers are left out: give its pool's upstream a `key` or `headers`");
        }
        let name = format!("pass-through-{}", self.draft.passthrough.len() + 1);
        let upstream = Yaml::map([("url", Some(Yaml::text(base))), ("provider", Some(Yaml::word("openai")))]);
        let health = Yaml::map([("enabled", Some(Yaml::word("false")))]);
        let pool = Yaml::map([("upstreams", Some(Yaml::List(vec![upstream]))), ("health", Some(health))]);
        self.draft.pools.push((name.clone(), pool));
        let pattern = if below { format!("{}/*", path.trim_end_matches('/')) } else { path.to_owned() };
        let unguarded = (!self.draft.guardrails.is_empty()).then(|| Yaml::word("true"));
        let members =
            [("path", Some(Yaml::text(&pattern))), ("pool", Some(Yaml::text(&name))), ("unguarded", unguarded)];
        self.draft.passthrough.push(Yaml::map(members));
        self.changed(entry, "GET and POST pass unread: no limit on tokens and no guardrail sees them");
    }

    /// Redis between several gateways, where there is something to share.
    fn shared(&mut self, root: &At<'a>) {
        let Some(router) = root.get("router_settings") else { return };
        let keys = ["redis_host", "redis_url", "redis_port", "redis_password"].map(|key| router.get(key));
        let Some(first) = keys.iter().flatten().next().cloned() else { return };
        keys.into_iter().for_each(|at| self.seen(at));
        if self.draft.limits.is_empty() {
            return self.taken(&first, "there are no limits that several gateways would share");
        }
        let redis = Yaml::map([("env", Some(Yaml::text("STORE_URL")))]);
        self.draft.shared = Some(Yaml::map([("redis", Some(redis)), ("replicas", Some(Yaml::number(2)))]));
        self.changed(&first, "limits are shared by way of the Redis in the environment variable STORE_URL (redis://:PASSWORD@HOST:6379/0); say in `replicas` how many gateways there are");
    }

    /// Prices change what upstreams are asked, which nobody should find out later.
    fn told_of_prices(&mut self, root: &At<'a>) {
        let Some(at) = root.get("model_list").filter(|_| !self.draft.prices.is_empty()) else { return };
        let count = self.draft.prices.len();
        let told = format!(
            "{count} prices, the file's own and the gateway's shipped ones; streams are asked for their usage because of them"
        );
        self.note(Outcome::Changed, &at, told);
    }
}
