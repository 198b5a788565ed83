//! Every name that a span of ours carries, in one list, each as its convention spells it.
//!
//! The conventions are OpenTelemetry's, release 1.42.0 (<https://opentelemetry.io/docs/specs/semconv/>); those under
//! `gen_ai.` live in a repository of their own since then
//! (<https://github.com/open-telemetry/semantic-conventions-genai>). What no convention knows is ours and begins with
//! `infergate.`.

/// What is asked of the model: `chat`, `text_completion`, `embeddings`, …
pub const OPERATION: &str = "gen_ai.operation.name";
/// The family of servers.
pub const PROVIDER: &str = "gen_ai.provider.name";
/// The model that is asked for.
pub const REQUEST_MODEL: &str = "gen_ai.request.model";
/// Whether a stream was asked for.
pub const REQUEST_STREAM: &str = "gen_ai.request.stream";
/// The model that answered.
pub const RESPONSE_MODEL: &str = "gen_ai.response.model";
/// Until the first piece of a stream, in seconds.
pub const TIME_TO_FIRST_CHUNK: &str = "gen_ai.response.time_to_first_chunk";
/// Tokens of the prompt.
pub const INPUT_TOKENS: &str = "gen_ai.usage.input_tokens";
/// Tokens of the answer.
pub const OUTPUT_TOKENS: &str = "gen_ai.usage.output_tokens";
/// Tokens of the prompt that the server had in its cache.
pub const CACHE_READ_TOKENS: &str = "gen_ai.usage.cache_read.input_tokens";
/// Tokens of the prompt that went into the server's cache.
pub const CACHE_CREATION_TOKENS: &str = "gen_ai.usage.cache_creation.input_tokens";
/// Tokens of the answer that were thought and not said.
pub const REASONING_TOKENS: &str = "gen_ai.usage.reasoning.output_tokens";
/// Why it failed, in one word.
pub const ERROR_TYPE: &str = "error.type";
/// The HTTP method.
pub const METHOD: &str = "http.request.method";
/// The endpoint, as the table of endpoints spells it.
pub const ROUTE: &str = "http.route";
/// The status of the answer.
pub const STATUS: &str = "http.response.status_code";
/// The version of HTTP that the client spoke.
pub const PROTOCOL_VERSION: &str = "network.protocol.version";
/// The upstream's name or address.
pub const SERVER_ADDRESS: &str = "server.address";
/// The upstream's port.
pub const SERVER_PORT: &str = "server.port";
/// The address behind the upstream's name.
pub const PEER_ADDRESS: &str = "network.peer.address";

/// The request's id, which is its record's.
pub const REQUEST_ID: &str = "infergate.request.id";
/// How the request ended.
pub const OUTCOME: &str = "infergate.outcome";
/// Who pays.
pub const TENANT: &str = "infergate.tenant";
/// The policy that decided.
pub const POLICY_HASH: &str = "infergate.policy.hash";
/// The same, counted since the start.
pub const POLICY_REVISION: &str = "infergate.policy.revision";
/// How many attempts there were.
pub const ATTEMPTS: &str = "infergate.attempts";
/// Until the body was there, in microseconds.
pub const TIME_BODY: &str = "infergate.time.body_us";
/// Until it was parsed and routed.
pub const TIME_ADMITTED: &str = "infergate.time.admitted_us";
/// Until it had its place in the pool.
pub const TIME_QUEUED: &str = "infergate.time.queued_us";
/// Until the first piece of the answer left.
pub const TIME_FIRST: &str = "infergate.time.first_us";
/// What of it the gateway itself took.
pub const TIME_SELF: &str = "infergate.time.self_us";
/// The pool that was asked.
pub const POOL: &str = "infergate.pool";
/// The upstream that was asked.
pub const UPSTREAM: &str = "infergate.upstream";
/// What the attempt came to.
pub const ATTEMPT_RESULT: &str = "infergate.attempt.result";

/// The gateway's name among services.
pub const SERVICE_NAME: &str = "service.name";
/// Its version.
pub const SERVICE_VERSION: &str = "service.version";
/// This process among those of the same name.
pub const SERVICE_INSTANCE: &str = "service.instance.id";
/// The machine.
pub const HOST_NAME: &str = "host.name";

/// All names on spans.
pub const ON_SPANS: [&str; 33] = [
    OPERATION,
    PROVIDER,
    REQUEST_MODEL,
    REQUEST_STREAM,
    RESPONSE_MODEL,
    TIME_TO_FIRST_CHUNK,
    INPUT_TOKENS,
    OUTPUT_TOKENS,
    CACHE_READ_TOKENS,
    CACHE_CREATION_TOKENS,
    REASONING_TOKENS,
    ERROR_TYPE,
    METHOD,
    ROUTE,
    STATUS,
    PROTOCOL_VERSION,
    SERVER_ADDRESS,
    SERVER_PORT,
    PEER_ADDRESS,
    REQUEST_ID,
    OUTCOME,
    TENANT,
    POLICY_HASH,
    POLICY_REVISION,
    ATTEMPTS,
    TIME_BODY,
    TIME_ADMITTED,
    TIME_QUEUED,
    TIME_FIRST,
    TIME_SELF,
    POOL,
    UPSTREAM,
    ATTEMPT_RESULT,
];

/// All names on what the spans have in common.
pub const ON_RESOURCE: [&str; 4] = [SERVICE_NAME, SERVICE_VERSION, SERVICE_INSTANCE, HOST_NAME];

/// A provider as `gen_ai.provider.name` spells it: the convention's word where it has one, else the policy's.
pub fn provider(kind: &str) -> &str {
    match kind {
        "azure" => "azure.ai.openai",
        other => other,
    }
}
