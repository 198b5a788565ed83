//! Traces: one tree a request, from its caller to its upstream, at no cost to the request.

use std::time::{Duration, Instant};

use http::HeaderMap;
use infergate::telemetry::names;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::trace::v1::Span;
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;

use crate::support::otlp::{Collector, Mood, attribute, hex};
use crate::support::wire::{EVENTS, Framing, Step, Wire};
use crate::support::{
    Client, Gateway, Journal, Process, Simulated, chat, eventually, faulty_server, free_port, model_server, policy,
};

const CHAT: &str = "/v1/chat/completions";
/// A dependency's trouble is told within this time (R39).
const TOLD: Duration = Duration::from_secs(5);
const SOON: Duration = Duration::from_secs(5);
const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const CALLER: &str = "00f067aa0ba902b7";
const CALM: &str = "breaker: {failures: 0, requests_min: 1000000}\nhealth: {enabled: false}\n";

/// The names that the conventions publish, with the type of their values, of those that a gateway can know.
///
/// From OpenTelemetry's semantic conventions 1.42.0, the registry of attributes:
/// <https://opentelemetry.io/docs/specs/semconv/registry/attributes/>
const PUBLISHED: [(&str, &str); 29] = [
    ("client.address", "string"),
    ("client.port", "int"),
    ("error.type", "string"),
    ("gen_ai.operation.name", "string"),
    ("gen_ai.provider.name", "string"),
    ("gen_ai.request.max_tokens", "int"),
    ("gen_ai.request.model", "string"),
    ("gen_ai.request.stream", "boolean"),
    ("gen_ai.response.id", "string"),
    ("gen_ai.response.model", "string"),
    ("gen_ai.response.time_to_first_chunk", "double"),
    ("gen_ai.usage.cache_creation.input_tokens", "int"),
    ("gen_ai.usage.cache_read.input_tokens", "int"),
    ("gen_ai.usage.input_tokens", "int"),
    ("gen_ai.usage.output_tokens", "int"),
    ("gen_ai.usage.reasoning.output_tokens", "int"),
    ("host.name", "string"),
    ("http.request.method", "string"),
    ("http.response.status_code", "int"),
    ("http.route", "string"),
    ("network.peer.address", "string"),
    ("network.peer.port", "int"),
    ("network.protocol.name", "string"),
    ("network.protocol.version", "string"),
    ("server.address", "string"),
    ("server.port", "int"),
    ("service.instance.id", "string"),
    ("service.name", "string"),
    ("service.version", "string"),
];

/// A policy with one model on `urls` whose traces go to `endpoint`; `traces` is the rest of their YAML.
fn traced(urls: &[&str], endpoint: &str, traces: &str) -> String {
    format!("{}telemetry:\n  traces: {{endpoint: '{endpoint}'{traces}}}\n", policy(urls, CALM))
}

fn traceparent(sampled: bool) -> String {
    format!("00-{TRACE}-{CALLER}-0{}", u8::from(sampled))
}

/// Waits until the collector has so many spans; returns them.
async fn spans(collector: &Collector, count: usize) -> Vec<Span> {
    eventually(&format!("{count} spans"), SOON, || async { collector.spans().len() >= count }).await;
    collector.spans()
}

fn of_kind(spans: &[Span], kind: SpanKind) -> Vec<&Span> {
    let mut found: Vec<&Span> = spans.iter().filter(|span| span.kind == kind as i32).collect();
    found.sort_by_key(|span| span.start_time_unix_nano);
    found
}

fn told(span: &Span, name: &str) -> String {
    attribute(&span.attributes, name)
}

/// Long enough for an export that should not come.
async fn a_while() {
    tokio::time::sleep(Duration::from_millis(2_500)).await;
}

/// A model server that hears heads and says a short answer.
async fn listener() -> Wire {
    let body = bytes::Bytes::from_static(br#"{"usage":{"prompt_tokens":7,"completion_tokens":3,"total_tokens":10}}"#);
    Wire::start(move |_| Framing::Length.answer("application/json", &body, 1 << 20)).await
}

#[tokio::test]
async fn a_request_and_its_attempts_are_one_tree_and_the_upstream_hears_of_it() {
    let (collector, server) = (Collector::start().await, listener().await);
    let dead = format!("http://127.0.0.1:{}\n        name: dead\n        zone: here", free_port());
    let alive = format!("{}\n        name: alive\n        zone: there\n        model: theirs", server.url());
    let text = traced(&[&dead, &alive], &collector.url(), ", share: 0");
    let gateway = Gateway::with(&text, "threads: 2\nzone: here\n", &[]).await;
    for client in Client::both() {
        let before = collector.spans().len();
        let headers = [("traceparent", &*traceparent(true)), ("tracestate", "vendor=1")];
        let answer = client.post_with(gateway.address, CHAT, &headers, chat(false, 3)).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        let spans = spans(&collector, before + 3).await.split_off(before);
        let (requests, attempts) = (of_kind(&spans, SpanKind::Server), of_kind(&spans, SpanKind::Client));
        let [request] = requests[..] else { panic!("{spans:#?}") };
        let [failed, answered] = attempts[..] else { panic!("{spans:#?}") };
        assert!(spans.iter().all(|span| hex(&span.trace_id) == TRACE), "the trace is the caller's");
        assert_eq!(hex(&request.parent_span_id), CALLER);
        for attempt in [failed, answered] {
            assert_eq!(attempt.parent_span_id, request.span_id);
            assert!(attempt.start_time_unix_nano >= request.start_time_unix_nano);
            assert!(attempt.end_time_unix_nano <= request.end_time_unix_nano);
        }
        assert!(failed.end_time_unix_nano <= answered.start_time_unix_nano);
        // R59: what the upstream hears has our span as its parent.
        let heard = server.heard().pop().unwrap();
        assert_eq!(heard.header("traceparent"), format!("00-{TRACE}-{}-01", hex(&answered.span_id)));
        assert_eq!(heard.head.to_lowercase().matches("traceparent:").count(), 1, "{}", heard.head);
        assert_eq!(heard.header("tracestate"), "vendor=1");
        assert_eq!((request.name.as_str(), answered.name.as_str()), ("chat m", "chat theirs"));
        assert_eq!((told(failed, names::ATTEMPT_RESULT), told(failed, names::ERROR_TYPE)), two("connect", "connect"));
        assert_eq!((told(failed, names::UPSTREAM), told(answered, names::UPSTREAM)), two("dead", "alive"));
        assert_eq!((told(answered, names::STATUS), told(request, names::STATUS)), two("200", "200"));
        assert_eq!((told(request, names::INPUT_TOKENS), told(request, names::OUTPUT_TOKENS)), two("7", "3"));
        assert_eq!((told(request, names::OUTCOME), told(request, names::ATTEMPTS)), two("ok", "2"));
        assert_eq!(told(request, names::REQUEST_ID), answer.header("x-request-id"), "the span leads to the record");
        assert_eq!((failed.status.as_ref().unwrap().code, &request.status), (2, &None));
        assert_eq!(format!("http://127.0.0.1:{}", told(answered, names::SERVER_PORT)), server.url());
    }
    let posted = collector.posted();
    assert!(posted.iter().all(|post| post.path == "/v1/traces"));
    assert_eq!(attribute(&collector.resources()[0].attributes, names::SERVICE_NAME), "infergate");
}

fn two(one: &str, other: &str) -> (String, String) {
    (one.to_owned(), other.to_owned())
}

#[tokio::test]
async fn without_a_caller_the_trace_is_ours_and_what_is_no_context_is_taken_off() {
    let (collector, server) = (Collector::start().await, listener().await);
    let gateway = Gateway::start(&traced(&[&server.url()], &collector.url(), ", share: 1")).await;
    let zeros = format!("00-{}-{CALLER}-01", "0".repeat(32));
    let upper = traceparent(true).to_uppercase();
    let twice = traceparent(true);
    let cases: [&[(&str, &str)]; 4] = [
        &[],
        &[("traceparent", &zeros), ("tracestate", "vendor=1")],
        &[("traceparent", &upper), ("tracestate", "vendor=1")],
        &[("traceparent", &twice), ("traceparent", &twice), ("tracestate", "vendor=1")],
    ];
    for (index, headers) in cases.into_iter().enumerate() {
        assert_eq!(Client::h1().post_with(gateway.address, CHAT, headers, chat(false, 3)).await.status, 200);
        let spans = spans(&collector, 2 * (index + 1)).await.split_off(2 * index);
        let request = of_kind(&spans, SpanKind::Server)[0];
        let trace = hex(&request.trace_id);
        assert!(request.parent_span_id.is_empty() && trace != TRACE && trace != "0".repeat(32), "{request:?}");
        let heard = server.heard().pop().unwrap();
        assert_eq!(heard.header("traceparent").split('-').nth(1), Some(&*trace), "{}", heard.head);
        assert_eq!(heard.head.to_lowercase().matches("traceparent:").count(), 1, "{}", heard.head);
        assert_eq!(heard.header("tracestate"), "", "it means nothing without its trace");
    }
}

#[tokio::test]
async fn a_gateway_without_traces_passes_a_callers_context_on_as_it_came() {
    let server = listener().await;
    let gateway = Gateway::start(&policy(&[&server.url()], CALM)).await;
    for context in [traceparent(true), "not one".to_owned()] {
        let headers = [("traceparent", &*context), ("tracestate", "vendor=1")];
        assert_eq!(Client::h1().post_with(gateway.address, CHAT, &headers, chat(false, 3)).await.status, 200);
        let heard = server.heard().pop().unwrap();
        assert_eq!((heard.header("traceparent"), heard.header("tracestate")), (&*context, "vendor=1"));
    }
}

#[tokio::test]
async fn every_name_is_in_our_list_and_in_the_published_conventions() {
    let (collector, server) = (Collector::start().await, model_server().await);
    let named = format!("{}\n        name: named", server.url().replace("127.0.0.1", "localhost"));
    let limit = "    concurrency: {max: 9}\n"; // or there is no queue to tell of
    let text = traced(&[&named], &collector.url(), ", share: 1").replace("telemetry:", &format!("{limit}telemetry:"));
    let gateway = Gateway::start(&text).await;
    for (path, body) in
        [(CHAT, chat(true, 3)), (CHAT, chat(false, 3)), (CHAT, "{".to_owned()), ("/nobody", chat(true, 1))]
    {
        Client::h1().post(gateway.address, path, body).await;
    }
    server.set_faults(vec!["status=500".parse().unwrap()]);
    Client::h1().post(gateway.address, CHAT, chat(true, 3)).await;
    let spans = spans(&collector, 8).await;
    let resource = collector.resources().pop().unwrap();
    let published = |name: &str| PUBLISHED.iter().find(|(known, _)| *known == name).map(|(_, kind)| *kind);
    for name in names::ON_SPANS.iter().chain(&names::ON_RESOURCE) {
        assert!(name.starts_with("infergate.") || published(name).is_some(), "{name} is in no convention");
    }
    for pair in spans.iter().flat_map(|span| &span.attributes).chain(&resource.attributes) {
        let name = pair.key.as_str();
        assert!(names::ON_SPANS.contains(&name) || names::ON_RESOURCE.contains(&name), "{name} is not in the list");
        let kind = match pair.value.as_ref().unwrap().value.as_ref().unwrap() {
            Value::StringValue(text) => {
                assert!(!text.is_empty(), "{name} is empty");
                "string"
            }
            Value::IntValue(_) => "int",
            Value::DoubleValue(_) => "double",
            Value::BoolValue(_) => "boolean",
            other => panic!("{name}: {other:?}"),
        };
        assert!(published(name).is_none_or(|published| published == kind), "{name} is a {kind}");
    }
    for span in &spans {
        let mut keys: Vec<&str> = span.attributes.iter().map(|pair| pair.key.as_str()).collect();
        keys.sort_unstable();
        assert!(keys.windows(2).all(|two| two[0] != two[1]), "an attribute stands twice: {keys:?}");
    }
    let seen = |name: &str| spans.iter().any(|span| span.attributes.iter().any(|pair| pair.key == name));
    let rare = [names::CACHE_CREATION_TOKENS, names::CACHE_READ_TOKENS, names::REASONING_TOKENS, names::TENANT];
    for name in names::ON_SPANS.iter().filter(|name| !rare.contains(name)) {
        assert!(seen(name), "{name} is in the list but on no span");
    }
    assert_eq!(attribute(&resource.attributes, names::SERVICE_VERSION), env!("CARGO_PKG_VERSION"));
}

#[tokio::test]
async fn what_is_sampled_out_leaves_nothing_but_failures_and_slow_requests_stay() {
    let (collector, server) = (Collector::start().await, model_server().await);
    let gateway = Gateway::start(&traced(&[&server.url()], &collector.url(), ", share: 0, slow_ms: 400")).await;
    let ask = async |headers: &[(&str, &str)], path: &str| {
        Client::h1().post_with(gateway.address, path, headers, chat(false, 3)).await.status
    };
    assert_eq!(ask(&[], CHAT).await, 200);
    assert_eq!(ask(&[("traceparent", &traceparent(false))], CHAT).await, 200);
    assert_eq!(ask(&[("traceparent", "garbage")], CHAT).await, 200);
    assert_eq!(ask(&[], "/nobody").await, 404);
    a_while().await;
    assert!(collector.posted().is_empty(), "{:#?}", collector.spans());
    // The caller keeps it.
    assert_eq!(ask(&[("traceparent", &traceparent(true))], CHAT).await, 200);
    assert!(spans(&collector, 2).await.iter().all(|span| hex(&span.trace_id) == TRACE));
    // It fails, even where the caller does not keep it.
    server.set_faults(vec!["status=500".parse().unwrap()]);
    assert_eq!(ask(&[("traceparent", &traceparent(false))], CHAT).await, 500);
    let failed = spans(&collector, 4).await.split_off(2);
    let request = of_kind(&failed, SpanKind::Server)[0];
    assert_eq!((told(request, names::ERROR_TYPE), hex(&request.parent_span_id)), two("500", CALLER));
    assert_eq!(request.status.as_ref().unwrap().code, 2);
    // It is slow.
    let before = collector.spans().len();
    server.set_faults(vec!["slow-first=500".parse().unwrap()]);
    assert_eq!(ask(&[], CHAT).await, 200);
    let slow = spans(&collector, before + 2).await.split_off(before);
    let request = of_kind(&slow, SpanKind::Server)[0];
    assert!(request.end_time_unix_nano - request.start_time_unix_nano >= 400_000_000);
    assert_eq!(told(request, names::OUTCOME), "ok");
    // A record names the trace that can be found: the caller's, or one of ours that was kept.
    let records = Journal::settled(&gateway).await.of_kind("request");
    let traces = records.iter().map(|record| record["trace"].as_object().map(|trace| trace.contains_key("parent")));
    assert_eq!(traces.collect::<Vec<_>>(), [None, Some(true), None, None, Some(true), Some(true), Some(false)]);
    let kept = records.last().unwrap();
    assert_eq!(kept["trace"]["id"], hex(&request.trace_id), "{kept}");
}

/// Asks so often, one after the other; returns how long the slowest took. Each must be answered with 200.
async fn ask_often(gateway: &Gateway, count: usize) -> Duration {
    let (client, mut slowest) = (Client::h1(), Duration::ZERO);
    for index in 0..count {
        let start = Instant::now();
        let answer = client.post(gateway.address, CHAT, chat(index % 2 == 0, 3)).await;
        assert!(answer.status == 200 && answer.whole, "{}", answer.text());
        slowest = slowest.max(start.elapsed());
    }
    slowest
}

fn warnings(gateway: &Gateway) -> usize {
    gateway.log().matches("traces cannot be exported").count()
}

#[tokio::test]
async fn a_collector_in_trouble_costs_no_request_anything_and_is_told_in_time() {
    let (collector, server) = (Collector::start().await, model_server().await);
    let gateway = Gateway::start(&traced(&[&server.url()], &collector.url(), ", share: 1")).await;
    let mut wanted = 0;
    for mood in [Mood::Hangs, Mood::Says(503, None), Mood::Says(429, Some(1))] {
        collector.set(mood.clone());
        let failures = gateway.metric("infergate_trace_exports_failed_total").await;
        let said = (warnings(&gateway), gateway.log().matches("traces are exported again").count());
        let start = Instant::now();
        let slowest = ask_often(&gateway, 40).await;
        wanted += 80;
        assert!(slowest < Duration::from_millis(500), "{mood:?}: {slowest:?}");
        eventually("it is told", TOLD, || async { warnings(&gateway) == said.0 + 1 }).await;
        assert!(gateway.metric("infergate_trace_exports_failed_total").await > failures);
        assert!(start.elapsed() < TOLD, "{mood:?}: told after {:?}", start.elapsed());
        ask_often(&gateway, 10).await;
        wanted += 20;
        collector.set(Mood::Takes);
        let again = async || gateway.log().matches("traces are exported again").count() == said.1 + 1;
        eventually("its recovery is told", TOLD, again).await;
        assert_eq!(warnings(&gateway), said.0 + 1, "once, not with every attempt");
        // All that waited is there; nothing came twice.
        assert_eq!(spans(&collector, wanted).await.len(), wanted, "{mood:?}");
        eventually("they are counted", SOON, || async {
            gateway.metric("infergate_trace_spans_exported_total").await == wanted as f64
        })
        .await;
    }
    assert_eq!(gateway.metric("infergate_trace_spans_dropped_total").await, 0.0);
    let mut ids: Vec<String> = collector.spans().iter().map(|span| hex(&span.span_id)).collect();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), wanted);
}

#[tokio::test]
async fn a_collector_that_is_down_gets_the_spans_when_it_is_back() {
    let (address, server) = (format!("127.0.0.1:{}", free_port()), model_server().await);
    let gateway = Gateway::start(&traced(&[&server.url()], &format!("http://{address}"), ", share: 1")).await;
    let start = Instant::now();
    ask_often(&gateway, 300).await;
    eventually("it is told", TOLD, || async { warnings(&gateway) == 1 }).await;
    let failures = async || gateway.metric("infergate_trace_exports_failed_total").await;
    eventually("it is counted", SOON, async || failures().await > 0.0).await;
    assert!(start.elapsed() < TOLD * 2);
    let collector = Collector::at(address.parse().unwrap()).await;
    assert_eq!(spans(&collector, 600).await.len(), 600);
    let sizes: Vec<usize> = collector.posted().iter().map(|post| post.body.len()).collect();
    assert!(sizes.len() >= 2, "in batches: {sizes:?}");
}

#[tokio::test]
async fn what_the_collector_refuses_for_good_is_dropped_and_counted() {
    let (collector, server) = (Collector::start().await, model_server().await);
    let gateway = Gateway::start(&traced(&[&server.url()], &collector.url(), ", share: 1")).await;
    collector.set(Mood::Says(400, None));
    ask_often(&gateway, 2).await;
    gateway.comes_to("infergate_trace_spans_dropped_total", 4.0).await;
    assert!(gateway.log().contains("refuses spans for good"), "{}", gateway.log());
    collector.set(Mood::Rejects(1));
    ask_often(&gateway, 2).await;
    gateway.comes_to("infergate_trace_spans_exported_total", 3.0).await;
    gateway.comes_to("infergate_trace_spans_dropped_total", 5.0).await;
    collector.set(Mood::Slow(Duration::from_millis(300)));
    ask_often(&gateway, 2).await;
    gateway.comes_to("infergate_trace_spans_exported_total", 7.0).await;
    assert!(gateway.log().contains("traces are exported again"));
}

#[tokio::test]
async fn the_policy_says_where_traces_go_and_a_reload_changes_it() {
    let (first, second, server) = (Collector::start().await, Collector::start().await, model_server().await);
    let text = |to: &Collector, service: &str| {
        let headers = "headers: {x-team: ours}, secret_headers: {x-key: {env: CANARY_KEY}}";
        traced(&[&server.url()], &to.url(), &format!(", share: 1, service_name: {service}, {headers}"))
    };
    let gateway = Gateway::spawn(&text(&first, "edge"), "threads: 2\n", &[], &[("CANARY_KEY", "canary-key")]);
    gateway.ready().await;
    ask_often(&gateway, 1).await;
    spans(&first, 2).await;
    let headers: HeaderMap = first.posted()[0].headers.clone();
    assert_eq!((&headers["x-team"], &headers["x-key"]), (&"ours".parse().unwrap(), &"canary-key".parse().unwrap()));
    assert_eq!(attribute(&first.resources()[0].attributes, names::SERVICE_NAME), "edge");
    assert_eq!(gateway.reload(&text(&second, "core")).await.status, 200);
    ask_often(&gateway, 1).await;
    spans(&second, 2).await;
    assert_eq!(attribute(&second.resources()[0].attributes, names::SERVICE_NAME), "core");
    assert_eq!(gateway.reload(&policy(&[&server.url()], CALM)).await.status, 200);
    ask_often(&gateway, 2).await;
    a_while().await;
    assert_eq!((first.spans().len(), second.spans().len()), (2, 2));
    assert!(!gateway.log().contains("canary"), "{}", gateway.log());
}

#[tokio::test]
async fn the_environment_names_a_collector_where_the_policy_does_not() {
    let (collector, server) = (Collector::start().await, model_server().await);
    let text = format!("{}telemetry: {{traces: {{share: 1}}}}\n", policy(&[&server.url()], CALM));
    let url = collector.url();
    let env = [("OTEL_EXPORTER_OTLP_ENDPOINT", url.as_str()), ("OTEL_SERVICE_NAME", "by-env")];
    let gateway = Gateway::spawn(&text, "threads: 2\n", &[], &env);
    gateway.ready().await;
    ask_often(&gateway, 1).await;
    spans(&collector, 2).await;
    assert_eq!(attribute(&collector.resources()[0].attributes, names::SERVICE_NAME), "by-env");
    // And never without the policy asking.
    let silent = Gateway::spawn(&policy(&[&server.url()], CALM), "threads: 2\n", &[], &env);
    silent.ready().await;
    ask_often(&silent, 1).await;
    a_while().await;
    assert_eq!(collector.spans().len(), 2);
}

#[tokio::test]
async fn spans_that_wait_leave_before_the_process_does() {
    let (collector, server) = (Collector::start().await, faulty_server(&["slow-first=1500"]).await);
    let mut gateway = Gateway::start(&traced(&[&server.url()], &collector.url(), ", share: 1")).await;
    let (address, client) = (gateway.address, Client::h1());
    let last = tokio::spawn(async move { client.post(address, CHAT, chat(false, 3)).await.status });
    gateway.comes_to("infergate_requests_in_flight", 1.0).await;
    gateway.signal("TERM");
    // The process ends as soon as this request does.
    assert_eq!((gateway.ended(Duration::from_secs(20)).await, last.await.unwrap()), (Some(0), 200));
    assert_eq!(collector.spans().len(), 2);
}

#[tokio::test]
async fn a_collector_that_hangs_does_not_hold_up_the_end() {
    let (collector, server) = (Collector::start().await, model_server().await);
    collector.set(Mood::Hangs);
    let mut gateway = Gateway::start(&traced(&[&server.url()], &collector.url(), ", share: 1")).await;
    ask_often(&gateway, 5).await;
    let start = Instant::now();
    gateway.signal("TERM");
    assert_eq!(gateway.ended(Duration::from_secs(20)).await, Some(0));
    assert!(start.elapsed() < Duration::from_secs(4), "{:?}", start.elapsed());
    assert!(gateway.log().contains("traces are lost"), "{}", gateway.log());
}

#[tokio::test]
async fn secrets_are_in_no_span_whatever_the_outcome() {
    let (collector, server) = (Collector::start().await, model_server().await);
    let key = "key: {env: CANARY_KEY}\n        headers: {x-upstream: canary-header}";
    let upstream = format!("{}\n        {key}", server.url());
    let text = traced(&[&upstream], &collector.url(), ", share: 1, secret_headers: {x-key: {env: CANARY_KEY}}");
    let text = text.replace(
        "health: {enabled: false}",
        "health: {enabled: false}\n    timeouts: {first_token_ms: 300, answer_ms: 300}",
    );
    let gateway = Gateway::spawn(&text, "threads: 2\n", &[], &[("CANARY_KEY", "canary-upstream")]);
    gateway.ready().await;
    let headers = [
        ("authorization", "Bearer canary-client"),
        ("x-api-key", "canary-client"),
        ("api-key", "canary-client"),
        ("cookie", "canary-client"),
        ("x-request-id", "canary-client"),
        ("tracestate", "canary=client"),
    ];
    let prompt = chat(true, 2).replace("Hello", "canary-prompt");
    for fault in ["", "status=500", "reset", "garbage", "hang", "cut", "context"] {
        let headers: Vec<_> =
            headers.into_iter().chain([("x-simulate-fault", fault)]).filter(|(_, value)| !value.is_empty()).collect();
        let path = format!("{CHAT}?key=canary-query&api_key=canary-query");
        for client in Client::both() {
            client.post_with(gateway.address, &path, &headers, prompt.clone()).await;
        }
    }
    for path in ["/nobody?key=canary-query", "/v1/models?key=canary-query", "/v1/completions?key=canary-query"] {
        Client::h1().post_with(gateway.address, path, &headers, "{\"prompt\": \"canary-prompt\"").await;
    }
    let open = Client::h1().open(gateway.address, CHAT, &headers, prompt.replace(":2", ":2000")).await;
    drop(open);
    gateway.comes_to("infergate_requests_in_flight", 0.0).await;
    let spans = spans(&collector, 30).await;
    a_while().await;
    assert!(!format!("{spans:?}").contains("canary"), "{spans:#?}");
    for post in collector.posted() {
        assert!(!String::from_utf8_lossy(&post.body).contains("canary"));
    }
    assert!(!gateway.log().contains("canary"), "{}", gateway.log());
}

#[tokio::test]
async fn an_answer_that_breaks_off_and_a_client_that_leaves_are_told_apart() {
    let collector = Collector::start().await;
    let head = Framing::Chunked.head(EVENTS, 0);
    let event = Framing::Chunked.piece(b"data: {\"choices\":[]}\n\n");
    let broken = Wire::start(move |_| vec![Step::Say(head.clone()), Step::Say(event.clone()), Step::Close]).await;
    let gateway = Gateway::start(&traced(&[&broken.url()], &collector.url(), ", share: 1")).await;
    Client::h1().post(gateway.address, CHAT, chat(true, 3)).await;
    let all = spans(&collector, 2).await;
    let (request, attempt) = (of_kind(&all, SpanKind::Server)[0], of_kind(&all, SpanKind::Client)[0]);
    assert_eq!((told(request, names::OUTCOME), told(attempt, names::ATTEMPT_RESULT)), two("upstream_error", "broken"));
    assert_eq!(told(attempt, names::ERROR_TYPE), "broken");
    assert!(request.status.as_ref().is_some_and(|status| status.code == 2 && !status.message.is_empty()));

    let slow: Simulated = faulty_server(&["stall,after=1"]).await;
    assert_eq!(gateway.reload(&traced(&[&slow.url()], &collector.url(), ", share: 1")).await.status, 200);
    let open = Client::h1().open(gateway.address, CHAT, &[], chat(true, 300)).await;
    drop(open);
    let all = spans(&collector, 4).await.split_off(2);
    let (request, attempt) = (of_kind(&all, SpanKind::Server)[0], of_kind(&all, SpanKind::Client)[0]);
    assert_eq!(
        (told(request, names::OUTCOME), told(attempt, names::ATTEMPT_RESULT)),
        two("client_closed", "cancelled")
    );
    assert_eq!((&request.status, &attempt.status), (&None, &None), "nobody failed");
}

#[test]
fn what_is_wrong_with_traces_is_told_at_its_place() {
    let check = |traces: &str| {
        let file = tempfile::NamedTempFile::new().unwrap();
        let text = format!("version: 1\ntelemetry:\n  traces:\n    {traces}\n");
        std::fs::write(file.path(), text).unwrap();
        Process::run(&["check", file.path().to_str().unwrap()])
    };
    for (traces, place, word) in [
        ("endpoint: localhost:4318", ":4:5: telemetry.traces.endpoint: ", "http://"),
        ("endpoint: 'http://user:pass@x'", ":4:5: telemetry.traces.endpoint: ", "no user or password"),
        ("endpoint: unix:/run/otel", ":4:5: telemetry.traces.endpoint: ", "http://"),
        ("share: 1.5", ":4:5: telemetry.traces.share: ", "at most 1"),
        ("share: -0.1", ":4:5: telemetry.traces.share: ", "at least 0"),
        ("slow_ms: soon", ":4:5: telemetry.traces.slow_ms: ", "whole number"),
        ("sahre: 1", ":4:5: telemetry.traces.sahre: ", "did you mean share?"),
        ("headers: {'a b': x}", ":4:15: telemetry.traces.headers.a b: ", "no valid header"),
        ("headers: {content-length: '1'}", ":4:15: ", "the gateway itself sets this header"),
        (
            "secret_headers: {x-key: {env: NO_SUCH_KEY}}",
            ":4:22: telemetry.traces.secret_headers.x-key: ",
            "NO_SUCH_KEY",
        ),
    ] {
        let (code, out, _) = check(traces);
        assert_eq!(code, Some(1), "{traces}: {out}");
        assert!(out.contains(place) && out.contains(word), "{traces}: {out}");
    }
    assert_eq!(check("{}").0, Some(0));
    assert_eq!(check("endpoint: https://otel.example.com/base/").0, Some(0));
}
