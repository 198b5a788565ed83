//! `policy.yaml` exactly as it is written.
//!
//! The doc comments here are the reference that users read: the JSON Schema, the editor's completion and the
//! table in `config/reference.md` are generated from them. What the words mean together is decided in `policy.rs`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use infergate_plugins::{authenticator, guardrail, router, sink};
use schemars::JsonSchema;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use crate::limits::Each;
use crate::money::file::Prices;
use crate::money::usd::Usd;
use crate::pool::headroom::Headroom;
use crate::pool::score::Balance;
use crate::secret::SecretSource;
use crate::tokens::Tokenizer;

/// What the gateway does with every request. Reloaded under traffic: save the file, send SIGHUP, or
/// `POST /admin/reload`.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct File {
    /// The version of this format. It is 1.
    #[schemars(range(min = 1, max = 1))]
    pub version: u32,
    /// Who may ask. They are asked in order, and the first answer wins: known, refused, or not for it to say.
    /// Absent: everybody may, as nobody in particular.
    #[serde(default)]
    #[schemars(length(min = 1))]
    pub authenticators: Option<Vec<authenticator::Config>>,
    /// Who pays, by name, and what they may use.
    #[serde(default)]
    pub tenants: BTreeMap<String, Tenant>,
    /// How much may be used, whoever asks. Those of a tenant stand with it.
    #[serde(default)]
    pub limits: Vec<Limit>,
    /// What texts may pass, in prompts and in answers, and how they are changed. All rules read everything that they
    /// are asked to; where several find something, the strictest verdict counts.
    #[serde(default)]
    pub guardrails: Vec<guardrail::Config>,
    /// The secret that hashes are made with that stand in place of what was found (`redact: hash`).
    #[serde(default)]
    pub guardrail_key: Option<SecretSource>,
    /// Where several replicas share what they count. Absent: each counts for itself.
    #[serde(default)]
    pub shared: Option<Shared>,
    /// The models that clients may name, and where each is served.
    #[serde(default)]
    pub models: Vec<Model>,
    /// The model for requests that name none, or one that no entry of `models` knows. Absent: such requests get
    /// 404.
    #[serde(default)]
    pub default_model: Option<String>,
    /// Models by name that are none: which one of `models` answers is decided for each request, by what it asks.
    #[serde(default)]
    pub routers: BTreeMap<String, VirtualModel>,
    /// The pools of upstreams, by name.
    #[serde(default)]
    pub pools: BTreeMap<String, Pool>,
    /// Paths that are passed through unread, first match wins.
    #[serde(default)]
    pub passthrough: Vec<Passthrough>,
    /// What holds for every request, whatever its model.
    #[serde(default)]
    pub requests: Requests,
    /// Classes of urgency, by name. When a pool is full, a request of a higher class goes first.
    #[serde(default)]
    pub priorities: BTreeMap<String, Priority>,
    /// What models cost. Absent: no request has a cost.
    #[serde(default)]
    pub prices: Option<Prices>,
    /// How the tokens of requests come to be known.
    #[serde(default)]
    pub metering: Option<Metering>,
    /// The journal: what becomes of the record that every request leaves.
    #[serde(default)]
    pub audit: Audit,
    /// What is told to other systems while requests run.
    #[serde(default)]
    pub telemetry: Telemetry,
}

impl File {
    /// Whether anybody may have a plan.
    pub fn gives_plans(&self) -> bool {
        let all = self.authenticators.iter().flatten();
        all.filter_map(|one| one.jwt.as_ref()).any(|jwt| jwt.issuers.iter().any(|issuer| issuer.plans.is_some()))
    }
}

/// One tenant: an organisation, a team, an application. What it may use, those above it must be allowed too.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Tenant {
    /// The tenant above it.
    pub parent: Option<String>,
    /// The models that it may use, by the names that clients send; one `*` stands for any text. The name of an entry
    /// of `models` stands for its aliases too; a path that is passed through counts as a model of that name. Absent:
    /// all. Empty: none.
    pub models: Option<Vec<String>>,
    /// The endpoints that it may use: paths of the gateway's own table, such as `/v1/chat/completions`, or of
    /// `passthrough`. Absent: all. The list of models and the health of the gateway need not be among them.
    pub surfaces: Option<Vec<String>>,
    /// How much it and all below it may use together, or each of them. Those above it must allow it too.
    pub limits: Vec<Limit>,
    /// The most tokens that one answer may have, for each of its choices. The lowest of it and those above it counts.
    #[schemars(range(min = 1))]
    pub output_tokens_max: Option<u64>,
    /// Its share of a full pool's places beside other tenants that wait. Absent: 1.
    #[schemars(range(min = 1, max = 1000))]
    pub share: Option<u32>,
    /// What its requests may ask of a model, and what they ask anyway.
    pub parameters: Option<Parameters>,
    /// The regions that its requests may go to: to pools of these and no others, whatever else speaks for one. Those
    /// above it must allow them too. Absent: all, and pools that name none.
    pub regions: Option<Vec<String>>,
}

/// How much of one thing may be used over one time. It has exactly one of `requests`, `input_tokens`,
/// `output_tokens`, `tokens`, `usd` and `concurrency`; 0 allows nothing.
///
/// What a request may use at most is reserved before an upstream is asked: the prompt's tokens, estimated from its
/// bytes as the model's upstreams have counted so far, and the answer's, which are bounded in the request's body where
/// it asks for more than is left. What it does not use is given back at its end.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Limit {
    /// Its name in records, metrics and messages. Absent: what it says, as `tokens/1m`.
    #[schemars(length(min = 1, max = 128))]
    pub name: Option<String>,
    /// What it counts apart, each combination for itself. Absent: all together.
    pub each: Vec<Each>,
    /// The models that it holds for, by the names of their entries; one `*` stands for any text. Absent: all.
    pub models: Option<Vec<String>>,
    /// The endpoints that it holds for, such as `/v1/chat/completions`. Absent: all.
    pub surfaces: Option<Vec<String>>,
    /// The plans that it holds for, as the tokens of an identity provider name them (`plans` of an issuer). Absent: it
    /// holds for everybody.
    pub plans: Option<Vec<String>>,
    /// So many requests.
    pub requests: Option<u64>,
    /// So many tokens of prompts.
    pub input_tokens: Option<u64>,
    /// So many tokens of answers.
    pub output_tokens: Option<u64>,
    /// So many tokens of both.
    pub tokens: Option<u64>,
    /// So many US dollars, by `prices`.
    pub usd: Option<Usd>,
    /// So many requests at one time.
    pub concurrency: Option<u64>,
    /// Over which time. `30s`, `1m`, `24h`, `7d`: over any such span, as near as two counters tell; no span that begins
    /// at a multiple of its length has more. `day`, `week` (from Monday), `month`, `total`: a budget, of the calendar.
    /// All but `concurrency` have one.
    pub per: Option<String>,
    /// The time zone of a calendar's window, such as `Europe/Berlin`. Absent: UTC.
    pub zone: Option<String>,
    /// What happens to a stream that has used up all that is left, because its upstream does not keep to the bound.
    pub on_limit: OnLimit,
    /// What happens to a request for whose whole answer too little is left.
    pub on_short: OnShort,
    /// What happens, under a limit on money, to a request whose model has no price.
    pub on_unpriced: OnError,
    /// What happens instead of a refusal when too little is left.
    pub on_exhausted: Option<OnExhausted>,
    /// Per cent of the limit at which the log and the metric `infergate_limit_warnings_total` say so, and a line of the
    /// kind `act` in the journal, which sinks such as webhooks get: once a level and window.
    pub warn_at: Vec<u8>,
}

/// How several replicas share all `limits`, through a Redis or Valkey. Each tells it what it has used and holds, and
/// asks it before it takes more, so that all together keep to a limit.
///
/// In the mode `exact` every request asks. In the mode `lease` each replica has a slice of every limit that it uses,
/// of what is free divided by twice the number of replicas, and only a request that its slice has no room for asks. In
/// both, all replicas together pass a limit only where the store forgets what it was told, by a restart without
/// persistence: then by what is used until each has told again (within half a second), in the mode `lease` by the
/// slices that are out at most (`infergate_limit_lease_held`). What a replica held that is killed is free again after
/// five seconds.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Shared {
    /// The store: `{url: redis://HOST:6379/0}`; where the address has a password, `{env: NAME}` or `{file: PATH}`.
    /// `rediss://` is with TLS.
    pub redis: StoreAddress,
    /// How many replicas there are. It decides how large slices are, and what each may use without the store.
    #[schemars(range(min = 1, max = 1000))]
    pub replicas: u64,
    /// What the keys in the store begin with. Gateways with the same one share their limits.
    #[serde(default = "infergate")]
    #[schemars(length(min = 1, max = 64))]
    pub namespace: String,
    /// Whether every request asks the store.
    #[serde(default)]
    pub mode: SharedMode,
    /// How long a request waits for the store at most, in milliseconds.
    #[serde(default = "ten")]
    #[schemars(range(min = 1, max = 10_000))]
    pub timeout_ms: u64,
    /// What happens while the store does not answer. Nothing waits for it then; it is tried again five times a second.
    #[serde(default)]
    pub on_store_error: OnStoreError,
}

/// Where the store is: one of the three.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct StoreAddress {
    /// The address, without a password.
    pub url: Option<String>,
    /// The environment variable that holds it.
    pub env: Option<String>,
    /// The file that holds it.
    pub file: Option<PathBuf>,
}

/// Whether every request asks the store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum SharedMode {
    /// It does.
    #[default]
    Exact,
    /// It asks where the replica's own slice has no room for it.
    Lease,
}

/// What happens while the store does not answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnStoreError {
    /// Each replica may use its part of every limit: the limit divided by `replicas`, rounded up, and no more than was
    /// free when the store last answered.
    #[default]
    LocalShare,
    /// No limit holds.
    Allow,
    /// Requests that a limit holds for are refused: 503 `limits_unavailable`. The gateway is not ready meanwhile.
    Deny,
}

fn infergate() -> String {
    "infergate".to_owned()
}

fn ten() -> u64 {
    10
}

/// What happens instead of a refusal.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct OnExhausted {
    /// Another model answers, if its own limits allow it: one of `models`.
    #[serde(rename = "use")]
    pub instead: Option<String>,
    /// The request waits for room, at most so many milliseconds.
    pub wait_ms: u64,
}

/// What happens to a stream that has used up all that is left.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum OnLimit {
    /// It ends as its protocol ends answers that are too long: `finish_reason: length`.
    #[default]
    Stop,
    /// It goes on to its end; what it used beyond the limit is missing afterwards.
    Finish,
}

/// What happens to a request for whose whole answer too little is left.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum OnShort {
    /// Its answer may have so many tokens as are left, if that is at least 16 or all that it asked for.
    #[default]
    Clamp,
    /// It is refused.
    Refuse,
}

/// What a tenant's requests may ask of a model. The gateway changes a body only where this says so, and there only the
/// bytes that it must.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Parameters {
    /// Fields that a body may not have, such as `logit_bias` or `tools`: 400 `parameter_not_allowed`. What the tenants
    /// above forbid is forbidden too. What passes through unread, and WebSockets, are refused then.
    pub forbid: Vec<String>,
    /// The end user of all its requests, put in or in place of what was sent (`user`; on `/v1/messages`
    /// `metadata.user_id`): `caller` for the name of whoever asks, or a fixed text. What a tenant above says comes first.
    #[schemars(length(min = 1))]
    pub user: Option<String>,
    /// Fields for requests that do not have them, where models write (chat, completions, responses, messages):
    /// `temperature: 0.2`. What a tenant above says holds where this has nothing.
    pub defaults: BTreeMap<String, serde_json::Value>,
}

/// One model as clients see it.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Model {
    /// The name that clients send. One `*` stands for any text: `llama-*`, `*`. The longest match wins.
    #[schemars(length(min = 1))]
    pub name: String,
    /// Other names for the same model. Its upstreams hear `rename`, or else `name`.
    #[serde(default)]
    pub aliases: Vec<String>,
    /// The pool that serves it.
    pub pool: String,
    /// The name that the upstreams know it by, if it is another; `*` for what the star of `name` stands for
    /// (`openai/*`). Only the name's bytes change in the body.
    #[serde(default)]
    pub rename: Option<String>,
    /// Where a request goes when the pool cannot answer it, in this order.
    #[serde(default)]
    pub fallbacks: Vec<Fallback>,
    /// The class of urgency of its requests, one of `priorities`.
    #[serde(default)]
    pub priority: Option<String>,
    /// How the tokens of its texts are counted where its upstreams do not say how many there are: of an answer without
    /// usage, and of a prompt that is near a hard limit.
    #[serde(default)]
    pub tokenizer: Tokenizer,
    /// What it can do. Where it is chosen (`routers`), it is passed over for what it cannot.
    #[serde(default)]
    pub can: Abilities,
    /// A sentence for `GET /v1/models`.
    #[serde(default)]
    pub description: Option<String>,
}

/// What a model can do. What is not said, it is taken to be able to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Abilities {
    /// Whether it reads images.
    pub images: bool,
    /// Whether it calls tools.
    pub tools: bool,
    /// Whether it answers in a form that the request asks for: JSON, a schema.
    pub structured: bool,
    /// The most tokens of a prompt and its answer together. The prompt's are estimated as limits do, the answer's are
    /// those that the request asks for.
    #[schemars(range(min = 1))]
    pub context_tokens: Option<u64>,
}

impl Default for Abilities {
    fn default() -> Self {
        Self { images: true, tools: true, structured: true, context_tokens: None }
    }
}

/// A model that is chosen for each request by what it asks. Whoever may use it may use what it chooses; limits, prices
/// and priorities are those of the model that is chosen.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VirtualModel {
    /// The routers. They are asked in order, and the first answer wins. May be absent where there is a `cascade`, or where a
    /// shortlist is the default.
    #[serde(default)]
    pub ask: Vec<router::Config>,
    /// The model for what no router has an answer to, and for requests without text.
    pub default: String,
    /// Models of which the best answers, by a name that may stand wherever a model is named here: in `ask`, as `default`.
    #[serde(default)]
    pub shortlists: BTreeMap<String, router::score::Config>,
    /// How much models think, by the decision that chose them: the name of a route or a rule, for `difficulty` that of
    /// the model, or `default`. Where a `cascade` goes on, by the name of the model that it goes on to: one that is not
    /// named here is asked as the one before it was.
    #[serde(default)]
    pub effort: BTreeMap<String, router::effort::Config>,
    /// Models that are asked one after another until one gives a good answer.
    #[serde(default)]
    pub cascade: Option<router::cascade::Config>,
    /// How long a choice holds.
    #[serde(default)]
    pub keep: Keep,
    /// The header by which clients name a conversation. Absent, or not sent: its beginning names it, up to the user's
    /// first message.
    #[serde(default)]
    pub session_header: Option<String>,
    /// A sentence for `GET /v1/models`.
    #[serde(default)]
    pub description: Option<String>,
}

/// How long the choice of a model holds. It is remembered for an hour, in this process. Unless each request is decided
/// for itself, a shortlist lets another model take a conversation over only if its gain is more than the loss of what the
/// conversation's own has read of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Keep {
    /// While the model waits for a tool: whoever called it gets what it gave back.
    #[default]
    ToolLoop,
    /// For the whole conversation.
    Conversation,
    /// Each request is decided for itself.
    Never,
}

/// Another pool to try before the first byte has reached the client.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Fallback {
    /// The pool.
    pub pool: String,
    /// What must have happened. Absent: `connect`, `reset`, `timeout`, `5xx`, `429`, `unavailable`.
    #[serde(default, deserialize_with = "some_causes")]
    pub on: Option<Vec<Cause>>,
    /// The model's name there.
    #[serde(default)]
    pub rename: Option<String>,
}

/// Why an attempt did not give an answer to pass on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Deserialize, JsonSchema)]
pub enum Cause {
    /// No connection: nothing was sent.
    #[serde(rename = "connect")]
    Connect,
    /// The connection was lost after the request had been sent and before any answer.
    #[serde(rename = "reset")]
    Reset,
    /// No first token, or no answer, in time.
    #[serde(rename = "timeout")]
    Timeout,
    /// Status 500, 502, 503, 504 or 529.
    #[serde(rename = "5xx")]
    Status5xx,
    /// Status 429.
    #[serde(rename = "429")]
    Status429,
    /// The pool had no upstream to ask, or no place in its queue.
    #[serde(rename = "unavailable")]
    Unavailable,
    /// The prompt is longer than the model's context.
    #[serde(rename = "context_length")]
    ContextLength,
    /// The provider's content filter refused.
    #[serde(rename = "content_filter")]
    ContentFilter,
}

/// Causes as people write them: to YAML, 429 without quotes is a number.
fn causes<'de, D: Deserializer<'de>>(written: D) -> Result<Vec<Cause>, D::Error> {
    let words = Vec::<Value>::deserialize(written)?.into_iter().map(|word| match word {
        Value::Number(number) => Value::String(number.to_string()),
        word => word,
    });
    words.map(|word| Cause::deserialize(word).map_err(D::Error::custom)).collect()
}

fn some_causes<'de, D: Deserializer<'de>>(written: D) -> Result<Option<Vec<Cause>>, D::Error> {
    #[derive(Deserialize)]
    struct Causes(#[serde(deserialize_with = "causes")] Vec<Cause>);
    Ok(Option::<Causes>::deserialize(written)?.map(|Causes(causes)| causes))
}

/// Upstreams that can stand in for each other.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Pool {
    /// The model servers.
    #[schemars(length(min = 1))]
    pub upstreams: Vec<Upstream>,
    /// Where they read what they are sent, for tenants whose requests may not go everywhere (`regions`).
    #[serde(default)]
    #[schemars(length(min = 1))]
    pub region: Option<String>,
    /// How long each phase of a request may take.
    #[serde(default)]
    pub timeouts: Timeouts,
    /// When an attempt is made again, and how often.
    #[serde(default)]
    pub retry: Retry,
    /// When an upstream is left alone for a while.
    #[serde(default)]
    pub breaker: Breaker,
    /// How upstreams are asked for their health. `health: {enabled: false}` turns it off.
    #[serde(default)]
    pub health: Health,
    /// How many requests run at once, and how many may wait.
    #[serde(default)]
    pub concurrency: Concurrency,
    /// When an endpoint has room for requests of a class that is `batch`.
    #[serde(default)]
    pub batch: Headroom,
    /// How one of its endpoints is chosen. Absent: `p2c`.
    #[serde(default)]
    pub balance: Balance,
    /// What engines are asked of their load, beside what the gateway counts itself; for those balances that weigh it.
    #[serde(default)]
    pub load: Load,
    /// When a second endpoint is asked beside one that is slow to begin. Absent: never.
    #[serde(default)]
    pub hedge: Option<Hedge>,
    /// An upstream that joins or recovers gets its full share only after this long, in milliseconds. 0: at once.
    #[serde(default)]
    pub slow_start_ms: u64,
}

/// One model server, or all the addresses behind one name.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Upstream {
    /// Its base URL, with the path that stands before `/v1`, if any: `http://gpu-7:8000`,
    /// `https://api.openai.com`, `unix:/run/vllm.sock`. Every address behind the name counts as an upstream of
    /// its own.
    pub url: String,
    /// Its name in headers and metrics. Absent: host and port.
    #[serde(default)]
    pub name: Option<String>,
    /// Its dialect: `openai`, `vllm`, `sglang`, `tgi`, `anthropic`, `azure`. Absent: `vllm`.
    #[serde(default)]
    pub provider: Option<String>,
    /// The key it wants: `{env: NAME}` or `{file: PATH}`. Clients' keys never go there.
    #[serde(default)]
    pub key: Option<SecretSource>,
    /// Headers to set on every request to it.
    #[serde(default)]
    pub headers: BTreeMap<String, String>,
    /// Its share of the requests beside the others. 0 drains it: no new requests. Absent: 1.
    #[serde(default = "one")]
    #[schemars(range(max = 1000))]
    pub weight: u32,
    /// Where it is. Upstreams in the gateway's own zone (settings) are asked first.
    #[serde(default)]
    pub zone: Option<String>,
    /// The name it knows the model by, if it is another than the pool's.
    #[serde(default)]
    pub model: Option<String>,
    /// HTTP/2 to it: `never`, `tls` (where TLS negotiates it), `always` (without TLS too). Absent: `tls`.
    #[serde(default)]
    pub http2: Http2,
    /// The port at which its engine publishes KV events over ZeroMQ (vLLM and SGLang: `--kv-events-config`), at the same
    /// address. For balances that look at prefixes. Absent: nobody listens.
    #[serde(default)]
    #[schemars(range(min = 1))]
    pub kv_events: Option<u16>,
    /// Where requests tell an engine with `kv_events` their id as that of a session, by which it tells whose blocks it
    /// stores: `header` (`x-session-id`: vLLM), `body` (`session_id`, of chats and completions: SGLang). Absent: `header`.
    #[serde(default)]
    pub kv_session: Option<KvSession>,
}

/// Where an engine reads a session's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum KvSession {
    /// In the header `x-session-id`.
    Header,
    /// In the body, as `session_id`; a client's own stays, and its blocks are not known.
    Body,
}

fn one() -> u32 {
    1
}

/// When HTTP/2 is spoken to an upstream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Http2 {
    /// HTTP/1.1 only.
    Never,
    /// Where TLS negotiates it.
    #[default]
    Tls,
    /// Without TLS too.
    Always,
}

/// How long each phase may take, in milliseconds. Each one has its own name in the error.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Timeouts {
    /// Until the connection stands, TLS included.
    #[schemars(range(min = 1))]
    pub connect_ms: u64,
    /// Until the first event of a streamed answer.
    #[schemars(range(min = 1))]
    pub first_token_ms: u64,
    /// Until an answer that is not streamed begins.
    #[schemars(range(min = 1))]
    pub answer_ms: u64,
    /// Between two pieces of an answer.
    #[schemars(range(min = 1))]
    pub between_tokens_ms: u64,
    /// For the whole request, all attempts and the queue included.
    #[schemars(range(min = 1))]
    pub total_ms: u64,
    /// How long a kept connection may lie idle. Keep it under the upstream's own limit (5 s in vLLM's server).
    #[schemars(range(min = 1))]
    pub idle_ms: u64,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            connect_ms: 5_000,
            first_token_ms: 120_000,
            answer_ms: 600_000,
            between_tokens_ms: 60_000,
            total_ms: 3_600_000,
            idle_ms: 4_000,
        }
    }
}

/// When an attempt is made again. Only before the first byte of an answer has reached the client.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Retry {
    /// How many attempts one request may cost in all, the first one and those on fallback pools included. One of them is
    /// kept for each fallback that could help.
    #[schemars(range(min = 1, max = 20))]
    pub attempts: u32,
    /// What must have happened: `connect`, `reset`, `timeout`, `5xx`, `429`.
    #[serde(deserialize_with = "causes")]
    pub on: Vec<Cause>,
    /// The wait before an attempt on an upstream that has failed already in this request, doubled each time,
    /// with jitter, in milliseconds. Another upstream is tried without a wait.
    pub backoff_ms: u64,
    /// Retries beyond the first attempt, as a share of requests over the last ten seconds; at least 10 are always
    /// allowed. Keeps retries from finishing off a pool that is down.
    #[schemars(range(min = 0.0, max = 10.0))]
    pub budget: f64,
}

impl Default for Retry {
    fn default() -> Self {
        Self {
            attempts: 3,
            on: vec![Cause::Connect, Cause::Reset, Cause::Timeout, Cause::Status5xx, Cause::Status429],
            backoff_ms: 100,
            budget: 0.2,
        }
    }
}

/// When an upstream is left alone. Answers of 4xx never count; 429 brings a pause as long as `Retry-After` says.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Breaker {
    /// Failures in a row that open it. 0: never.
    pub failures: u32,
    /// The share of failures over `window_ms` that opens it, where there were at least `requests_min` requests.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub failure_ratio: f64,
    /// The window for `failure_ratio`, in milliseconds.
    #[schemars(range(min = 1))]
    pub window_ms: u64,
    /// The least number of requests in the window for `failure_ratio` to count.
    pub requests_min: u32,
    /// How long it stays open the first time, in milliseconds; doubled each time it opens again.
    #[schemars(range(min = 1))]
    pub open_ms: u64,
    /// The longest it stays open, in milliseconds.
    #[schemars(range(min = 1))]
    pub open_ms_max: u64,
}

impl Default for Breaker {
    fn default() -> Self {
        Self {
            failures: 5,
            failure_ratio: 0.5,
            window_ms: 10_000,
            requests_min: 20,
            open_ms: 2_000,
            open_ms_max: 60_000,
        }
    }
}

/// How upstreams are asked for their health, beside what their answers tell.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Health {
    /// Whether they are asked at all.
    pub enabled: bool,
    /// The path to ask. Absent: the provider's (`/health` for vLLM, SGLang and TGI, `/v1/models` for clouds).
    pub path: Option<String>,
    /// The time between two questions, in milliseconds.
    #[schemars(range(min = 10))]
    pub interval_ms: u64,
    /// How long an answer may take, in milliseconds.
    #[schemars(range(min = 1))]
    pub timeout_ms: u64,
    /// Bad answers in a row that take an upstream out.
    #[schemars(range(min = 1))]
    pub unhealthy_after: u32,
    /// Good answers in a row that bring it back.
    #[schemars(range(min = 1))]
    pub healthy_after: u32,
}

impl Default for Health {
    fn default() -> Self {
        Self { enabled: true, path: None, interval_ms: 1_000, timeout_ms: 2_000, unhealthy_after: 3, healthy_after: 1 }
    }
}

/// How many requests a pool runs at once, and how many may wait for their turn.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Concurrency {
    /// Requests at once. Absent: no limit.
    #[schemars(range(min = 1))]
    pub max: Option<u32>,
    /// Requests that may wait. Beyond it: 503 with `Retry-After`.
    pub queue: u32,
    /// How long one may wait, in milliseconds.
    #[schemars(range(min = 1))]
    pub queue_ms: u64,
}

impl Default for Concurrency {
    fn default() -> Self {
        Self { max: None, queue: 1_000, queue_ms: 30_000 }
    }
}

/// What engines are asked of their load.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Load {
    /// Whether they are asked to tell it in the head of every answer (ORCA's `endpoint-load-metrics`, which vLLM and
    /// Triton know). The client does not see it.
    pub headers: bool,
    /// How often their page of metrics is read while the pool is in use, in milliseconds. 0: never.
    #[schemars(range(max = 60_000))]
    pub metrics_ms: u64,
    /// Whether models' names are those of adapters (LoRA), so that an endpoint that has one loaded is better. Read
    /// from the page of metrics.
    pub adapters: bool,
}

/// When a second endpoint is asked beside one that is slow to begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Hedge {
    /// After how long.
    #[serde(default)]
    pub after: HedgeAfter,
    /// How many of a hundred requests may be asked twice.
    #[serde(default = "five")]
    #[schemars(range(min = 1, max = 50))]
    pub budget_percent: u32,
}

/// After how long a second endpoint is asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum HedgeAfter {
    /// When nineteen of twenty of the pool's answers would have begun.
    #[default]
    P95,
}

fn five() -> u32 {
    5
}

/// A path that is passed through unread, with the pool's failover, breakers and limits.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Passthrough {
    /// The path. A `*` at its end stands for any rest.
    pub path: String,
    /// The pool.
    pub pool: String,
    /// The methods it takes. Absent: GET and POST.
    #[serde(default)]
    pub methods: Option<Vec<String>>,
    /// Whether WebSockets may be opened on it.
    #[serde(default)]
    pub websocket: bool,
    /// Whether it is meant to pass unread although `guardrails` must read everything.
    #[serde(default)]
    pub unguarded: bool,
}

/// What holds for every request.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Requests {
    /// The largest body, in bytes. Beyond it: 413.
    #[schemars(range(min = 1))]
    pub body_bytes_max: u64,
    /// How long a body may take to arrive, in milliseconds.
    #[schemars(range(min = 1))]
    pub body_ms: u64,
    /// Prefixes that are taken off a path before it is looked up: `/openai` makes `/openai/v1/models` work.
    pub strip_prefixes: Vec<String>,
    /// Silence on a stream after which the client gets a comment, in milliseconds. 0: never.
    pub heartbeat_ms: u64,
    /// What happens to the upstream's work when the client leaves.
    pub on_disconnect: OnDisconnect,
    /// How long a drained answer may go on after the client left, in milliseconds.
    #[schemars(range(min = 1))]
    pub drain_ms: u64,
    /// What happens to the running requests of a key that is revoked, or of a key, a token or a certificate whose time
    /// is over. What the newest policy says counts.
    pub on_revoked: OnRevoked,
    /// The tokens that an answer may have, for each of its choices, where the request does not say and a limit on
    /// tokens or money holds: they are reserved, and written into the request.
    #[schemars(range(min = 1))]
    pub output_tokens: u64,
    /// The header that names the end user, for limits that count each. Absent: the body's `user` does.
    pub user_header: Option<String>,
    /// How long a client may take to accept a piece of the answer, in milliseconds.
    #[schemars(range(min = 1))]
    pub write_ms: u64,
    /// The header by which a client may name one of `priorities`. Absent: it may not.
    pub priority_header: Option<String>,
    /// Whether answers tell the upstream that gave them (`x-infergate-upstream`).
    pub name_upstream: bool,
    /// Whether answers tell how long each stage took (`server-timing`).
    pub server_timing: bool,
    /// Whether answers tell the microseconds that the gateway itself took (`x-infergate-overhead-us`).
    pub overhead: bool,
    /// The gateway whose health paths and headers are here too, for applications that count on them. Absent: none.
    pub compatible_with: Option<Other>,
}

/// Another gateway.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Other {
    /// LiteLLM: `/health/liveliness`, `/health/liveness` and `/health/readiness`; on answers `x-litellm-call-id`,
    /// `-model-id`, `-model-group`, `-response-cost`, `-response-duration-ms`, `-overhead-duration-ms`,
    /// `-attempted-retries` and `-attempted-fallbacks`.
    Litellm,
}

impl Default for Requests {
    fn default() -> Self {
        Self {
            body_bytes_max: 32 << 20,
            body_ms: 60_000,
            strip_prefixes: Vec::new(),
            heartbeat_ms: 15_000,
            on_disconnect: OnDisconnect::Cancel,
            drain_ms: 60_000,
            on_revoked: OnRevoked::Finish,
            output_tokens: 4096,
            user_header: None,
            write_ms: 60_000,
            priority_header: None,
            name_upstream: true,
            server_timing: true,
            overhead: false,
            compatible_with: None,
        }
    }
}

/// What happens to the upstream's work when the client leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum OnDisconnect {
    /// The upstream is told at once, so that it stops generating.
    Cancel,
    /// The answer is read to its end, so that its usage is known.
    Drain,
}

/// What happens to the running requests of whoever would not be let in any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum OnRevoked {
    /// They go on to their end.
    Finish,
    /// Answers end at once, as broken streams of their protocol do: code `key_revoked`.
    Cut,
}

/// The journal: one record for every request, chained and signed. Where it lies is in the settings.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Audit {
    /// What happens to a request for whose record there is no room, because the disk does not keep up: `deny`
    /// refuses it with 503 `audit_unavailable`, `allow` serves it without a record, and the journal says how many.
    pub on_error: OnError,
    /// Records that may be on their way to the disk at once, those of running requests included.
    #[schemars(range(min = 1))]
    pub places: u32,
    /// When a record is on disk: `soon` (within `commit_ms`; that much is lost if the machine or the process dies) or
    /// `before_response_end` (a client that has the whole answer can be sure that its record is safe; of a WebSocket,
    /// one that has its upstream's goodbye, or the end of the connection).
    pub durable: Durable,
    /// How long records are gathered before they are written and flushed to disk together, in milliseconds.
    #[schemars(range(min = 1, max = 60_000))]
    pub commit_ms: u64,
    /// How often the chain is signed while records come in, in seconds.
    #[schemars(range(min = 1))]
    pub checkpoint_s: u64,
    /// The size at which a segment is finished, in bytes.
    #[schemars(range(min = 4_096))]
    pub segment_bytes: u64,
    /// The age at which a segment is finished, in seconds.
    #[schemars(range(min = 1))]
    pub segment_s: u64,
    /// Whether finished segments are compressed (zstd).
    pub compress: bool,
    /// Finished segments older than this many days are removed; the journal says so. Absent: never.
    #[schemars(range(min = 1))]
    pub keep_days: Option<u32>,
    /// The oldest finished segments are removed while all finished ones together are larger than this, in bytes. What a
    /// sink has not had yet stays all the same. Absent: never.
    pub keep_bytes: Option<u64>,
    /// Where the journal's lines go besides. Each sink has its own position and tries again on its own: it gets every
    /// line at least once, those of one run in order.
    pub sinks: Vec<sink::Config>,
    /// Whether the text of requests is kept, which it is not unless this says so.
    pub capture: Capture,
}

impl Default for Audit {
    fn default() -> Self {
        Self {
            on_error: OnError::Deny,
            places: 65_536,
            durable: Durable::Soon,
            commit_ms: 100,
            checkpoint_s: 60,
            segment_bytes: 64 << 20,
            segment_s: 86_400,
            compress: true,
            keep_days: None,
            keep_bytes: None,
            sinks: Vec::new(),
            capture: Capture::default(),
        }
    }
}

/// Which requests' text is kept. It lies in files of its own beside the journal; the record holds its SHA-256.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Capture {
    /// `none`: no prompt and no answer is ever kept. `redacted`: what `guardrails` left of both, before originals come
    /// back; nothing of a prompt that they blocked. `full`: both bodies, as they came and went.
    pub text: CaptureText,
    /// The tenants whose text is kept. Absent: everybody's.
    pub tenants: Option<Vec<String>>,
    /// The share of requests, 1 for all.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub share: f64,
    /// The most that is kept of a body, in bytes.
    #[schemars(range(max = 16_777_216))]
    pub bytes_max: u64,
    /// Captures older than this many days are removed. Absent: never.
    #[schemars(range(min = 1))]
    pub keep_days: Option<u32>,
}

impl Default for Capture {
    fn default() -> Self {
        Self { text: CaptureText::None, tenants: None, share: 1.0, bytes_max: 65_536, keep_days: Some(30) }
    }
}

/// What of a request's text is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum CaptureText {
    /// Nothing.
    None,
    /// What guardrails left.
    Redacted,
    /// Everything.
    Full,
}

/// How the tokens of requests come to be known. Absent: as with `usage: ask` where the policy has `prices` or an upstream
/// with `kv_events`, and as with `as_is` where it has neither.
#[derive(Clone, Copy, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Metering {
    /// `ask`: streams of chats and completions are asked for their usage (`stream_options.include_usage`) where the
    /// client did not; the event with it is kept from the client. `as_is`: no byte changes for it.
    pub usage: MeterUsage,
    /// Whether streams tell what they cost: in a comment before their last event, `: x-infergate-cost-usd=0.000123000`.
    pub cost_on_streams: bool,
}

/// Whether streams are asked for their usage.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum MeterUsage {
    /// They are.
    #[default]
    Ask,
    /// They tell it if the client wants it told.
    AsIs,
}

/// What happens when a check or a record that the policy asks for cannot be made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum OnError {
    /// The request is refused.
    #[default]
    Deny,
    /// The request goes on without it.
    Allow,
}

/// When a record is on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Durable {
    /// Within `commit_ms`.
    Soon,
    /// Before the client has the end of its answer.
    BeforeResponseEnd,
}

/// What is told to other systems while requests run. Metrics need nothing here: they are on the admin port.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Telemetry {
    /// Traces: one span for each request and one for each attempt, sent by OTLP over HTTP. `traces: {}` is enough where
    /// a collector runs beside the gateway. Absent: none, and a caller's `traceparent` passes on as it came.
    pub traces: Option<Traces>,
    /// The tenants whose cost has a metric of its own, `infergate_tenant_cost_nanousd_total`, by model: a hundred at
    /// most. Absent: none. What each has spent is in `infergate usage` in any case.
    #[schemars(length(max = 100))]
    pub tenants: Vec<String>,
}

/// Which traces are kept and where they go.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Traces {
    /// The collector's base URL; `/v1/traces` is added. Absent: what OTEL_EXPORTER_OTLP_ENDPOINT says, else
    /// `http://localhost:4318`.
    pub endpoint: Option<String>,
    /// The share of requests that are kept, 1 for all. A caller that has decided already, in its `traceparent`, is
    /// obeyed.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub share: f64,
    /// Requests that take as long as this are kept whatever the share, in milliseconds. 0: they are not.
    pub slow_ms: u64,
    /// Whether requests that fail are kept whatever the share: upstream errors, time-outs, aborted requests, answers
    /// with a status of 500 and above.
    pub errors: bool,
    /// Headers for the collector.
    pub headers: BTreeMap<String, String>,
    /// Headers for the collector whose values are secret.
    pub secret_headers: BTreeMap<String, SecretSource>,
    /// The gateway's `service.name`. Absent: what OTEL_SERVICE_NAME says, else `infergate`.
    pub service_name: Option<String>,
}

impl Default for Traces {
    fn default() -> Self {
        Self {
            endpoint: None,
            share: 0.01,
            slow_ms: 60_000,
            errors: true,
            headers: BTreeMap::new(),
            secret_headers: BTreeMap::new(),
            service_name: None,
        }
    }
}

/// A class of urgency.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Priority {
    /// Higher goes first. Requests without a class have 0.
    #[schemars(range(min = -100, max = 100))]
    pub level: i32,
    /// How long a request of this class may wait in a queue, in milliseconds. Absent: the pool's own limit.
    #[serde(default)]
    pub queue_ms: Option<u64>,
    /// Nobody waits for its requests: they go only where a pool has room (its `batch`), and wait behind all others
    /// until then, whatever their levels.
    #[serde(default)]
    pub batch: bool,
}
