//! Every header that the gateway itself reads or writes, in one list.

use http::{HeaderMap, HeaderName, HeaderValue};

use crate::refusal::{Code, Refusal};

/// A header, for whoever looks it up.
#[derive(Clone, Copy, Debug)]
pub struct Told {
    /// Its name; a `*` stands for more of the same.
    pub name: &'static str,
    /// When it is there.
    pub when: &'static str,
    /// What it says.
    pub meaning: &'static str,
}

/// The headers that the gateway puts on answers: each is a constant, and a line of the reference.
macro_rules! answers {
    ($(#[doc = $meaning:literal] $constant:ident = $name:literal, $when:literal;)+) => {
        $(
            #[doc = $meaning]
            pub const $constant: HeaderName = HeaderName::from_static($name);
        )+

        const OWN: &[Told] = &[$(Told { name: $name, when: $when, meaning: $meaning }),+];
    };
}

answers! {
    /// The request's id, which its record has too.
    REQUEST_ID = "x-request-id", "always";
    /// The id that the client gave the request.
    CLIENT_REQUEST_ID = "x-client-request-id", "it sent `x-request-id`, of 1 to 128 of `A-Z a-z 0-9 - _ . :`";
    /// The id that the upstream gave it.
    UPSTREAM_REQUEST_ID = "x-upstream-request-id", "it did";
    /// The model that answered, as the upstream knows it.
    MODEL = "x-infergate-model", "an upstream answered";
    /// The rule that decided, and the model that it chose.
    ROUTE = "x-infergate-route", "one of `routers` was asked for";
    /// The upstream that answered.
    UPSTREAM = "x-infergate-upstream", "`requests.name_upstream`";
    /// How often upstreams were asked.
    ATTEMPTS = "x-infergate-attempts", "an upstream answered, or it was refused";
    /// The gateway's own share of the time until the first piece left, in microseconds.
    OVERHEAD_US = "x-infergate-overhead-us", "`requests.overhead`";
    /// The time of each stage, in milliseconds (W3C Server Timing): `body, admit, queue, upstream, relay`.
    SERVER_TIMING = "server-timing", "`requests.server_timing`";
    /// The rules that found something and let it pass.
    GUARDRAILS = "x-infergate-guardrails", "some did; on streams in the prompt, or where the answer was held";
    /// What the answer cost, in US dollars.
    COST_USD = "x-infergate-cost-usd", "the policy has prices, and the answer came whole with its head";
    /// Whether it is any use to ask again (OpenAI's clients read it).
    SHOULD_RETRY = "x-should-retry", "it was refused";
    /// Tells nginx in front to pass a stream on as it comes.
    ACCEL_BUFFERING = "x-accel-buffering", "on streams";
}

/// Well-known headers that it puts on answers, or changes on them.
const WELL_KNOWN: &[Told] = &[
    told("retry-after", "it was refused, and it is known when it is worth asking again", "Seconds."),
    told(
        "x-ratelimit-{limit,remaining,reset}-*",
        "limits hold",
        "How the tightest one stands, as OpenAI tells it: `requests`, `tokens`, `input-tokens`, `output-tokens`.",
    ),
    told(
        "anthropic-ratelimit-*-{limit,remaining,reset}",
        "limits hold, on `/v1/messages`",
        "The same as Anthropic tells it.",
    ),
    told("cache-control", "on streams", "`no-cache`."),
    told(
        "location, content-location",
        "the upstream sent it",
        "An address of the upstream's becomes a path of the gateway's; another one stays on paths that pass through, and is taken off elsewhere.",
    ),
    told("www-authenticate", "401", "How to say who asks."),
    told("allow", "405", "The method that the path takes."),
    told("x-litellm-*", "`requests.compatible_with: litellm`", "LiteLLM's names for ids, costs and times."),
];

/// What of a client's request is read, and does not go on as it came.
const READ: &[Told] = &[
    told(
        "authorization, x-api-key, api-key, cookie",
        "sent",
        "Who asks. They never go on; nor do `key`, `api_key`, `api-key` and `access_token` in a query.",
    ),
    told("x-request-id", "sent", "Comes back as `x-client-request-id`; the upstream gets the gateway's own id."),
    told(
        "traceparent, tracestate",
        "`telemetry.traces`",
        "The trace that the request is part of: the upstream gets the gateway's span as its parent.",
    ),
    told(
        "accept-encoding",
        "bodies are read",
        "Is taken off: an upstream is asked for no compression, but on paths that pass through.",
    ),
    told("x-infergate-*", "sent", "Is taken off."),
    told("x-session-id", "the upstream has `kv_events`", "Gives way to the gateway's own."),
    told(
        "connection, and what it names; keep-alive, te, trailer, transfer-encoding, upgrade, expect",
        "sent",
        "Belong to one connection, and stay on it.",
    ),
];

/// What an upstream gets beyond what the client sent.
const SENT: &[Told] = &[
    told("x-request-id", "always", "The request's id."),
    told("host", "always", "The upstream's own name."),
    told("authorization, or what its dialect wants", "the upstream has a `key`", "The upstream's key."),
    told("traceparent", "`telemetry.traces`", "The span of the attempt."),
    told(
        "x-session-id",
        "the upstream has `kv_events`",
        "The request's id, by which its engine tells whose blocks it stores (not with `kv_session: body`).",
    ),
    told(
        "those of `headers`",
        "the upstream has them in the policy",
        "As they stand there; they win over the client's.",
    ),
    told(
        "webhook-id, webhook-timestamp, webhook-signature",
        "to sinks of the kind `webhook`",
        "As Standard Webhooks has them; the signature where there is a `secret`.",
    ),
];

const fn told(name: &'static str, when: &'static str, meaning: &'static str) -> Told {
    Told { name, when, meaning }
}

/// All of them, by whom they are between.
pub const ALL: [(&str, &[&[Told]]); 3] = [
    ("On answers to clients", &[OWN, WELL_KNOWN]),
    ("On requests of clients", &[READ]),
    ("On requests to others", &[SENT]),
];

/// Sets one header of an answer.
pub fn set<V: TryInto<HeaderValue>>(headers: &mut HeaderMap, name: HeaderName, value: V) -> Result<(), Refusal> {
    let value = value.try_into().map_err(|_| broken())?;
    headers.insert(name, value);
    Ok(())
}

fn broken() -> Refusal {
    Refusal::new(Code::Internal, "a header of the answer could not be written")
}
