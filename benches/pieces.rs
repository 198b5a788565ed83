//! The pieces of a request's way, one by one: the body scan, the splice, the event framer, the usage,
//! the route, the pick.

use std::hint::black_box;
use std::time::{Instant, SystemTime};

use bytes::Bytes;
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use infergate::audit::record::{
    AttemptList, BodyBytes, Client, Id, Models, Moment, Outcome, Peer, PolicyMark, Record, Times, Trace,
};
use infergate::policy::{Policy, World, compile};
use infergate::scan;
use infergate::sse::Framer;
use infergate::state::State;
use infergate::telemetry::trace::{Target, Tracer, Traces, traceparent};
use infergate::telemetry::{Telemetry, TraceMeters};
use infergate::usage::{Meter, Usage};
use infergate_plugins::operation::Operation;

/// A chat request of about `bytes` bytes, nearly all of it prose with a line end now and then.
fn chat(bytes: usize) -> Bytes {
    const LINE: &str = "The quick brown fox jumps over the lazy dog, and then it does so once more.\\n";
    let frame = r#"{"messages":[{"role":"user","content":""}],"temperature":0.7,"stream":true,"model":"llama-3"}"#;
    let prose = LINE.repeat(bytes.saturating_sub(frame.len()) / LINE.len());
    frame.replace("\"content\":\"\"", &format!("\"content\":\"{prose}\"")).into()
}

fn policy(upstreams: usize) -> Policy {
    let urls: String = (0..upstreams).map(|n| format!("      - url: http://127.0.0.1:{}\n", 10_000 + n)).collect();
    let text = format!(
        "version: 1\nmodels:\n  - {{name: 'llama-*', pool: p}}\n  - {{name: llama-3, pool: p}}\npools:\n  p:\n    upstreams:\n{urls}"
    );
    let (state, telemetry) = (State::new(0), Telemetry::new());
    let world = World {
        env: &|_| None,
        state: &state,
        telemetry: &telemetry,
        zone: None,
        now: Instant::now(),
        secret_files: true,
    };
    match compile(&text, &world) {
        Ok(policy) => policy,
        Err(problems) => panic!("{:?}", problems.lines("bench")),
    }
}

fn scans(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("scan");
    for kib in [1, 16, 100, 1024] {
        let body = chat(kib << 10);
        group.throughput(Throughput::Bytes(body.len() as u64));
        group.bench_function(format!("{kib} KiB"), |bencher| {
            bencher.iter(|| {
                scan::json(black_box(&body)).map(|scan| scan.model(&body).map(|model| model.map(|m| m.len())))
            });
        });
    }
    group.finish();
}

fn splices(criterion: &mut Criterion) {
    let body = chat(16 << 10);
    let Ok(found) = scan::json(&body) else { return };
    criterion.bench_function("splice a model's name into 16 KiB", |bencher| {
        bencher.iter_batched(
            || found.rename_model("another").into_iter().collect::<Vec<_>>(),
            |mut edits| scan::splice(black_box(&body), &mut edits),
            BatchSize::SmallInput,
        );
    });
}

fn frames(criterion: &mut Criterion) {
    let event = format!("data: {{\"choices\":[{{\"delta\":{{\"content\":\"{}\"}}}}]}}\n\n", "x".repeat(150));
    let mut group = criterion.benchmark_group("sse");
    group.throughput(Throughput::Elements(1));
    group.bench_function("an event of 200 bytes", |bencher| {
        let mut framer = Framer::default();
        bencher.iter(|| framer.push(black_box(event.as_bytes())));
    });
    group.finish();
}

fn usages(criterion: &mut Criterion) {
    let usage = r#""usage":{"prompt_tokens":6,"total_tokens":206,"completion_tokens":200,"prompt_tokens_details":{"cached_tokens":0}}"#;
    let frame = format!(
        r#"{{"id":"chatcmpl-1","object":"chat.completion","model":"llama-3","choices":[{{"index":0,"message":{{"role":"assistant","content":"@"}},"finish_reason":"stop"}}],{usage},"kv_transfer_params":null}}"#
    );
    let answer = frame.replace('@', &"and so on ".repeat((1usize << 10).saturating_sub(frame.len()) / 10));
    let event = b"data: {\"choices\":[{\"text\":\" word\"}]}\n\n";
    let last = format!("data: {{\"choices\":[],{usage}}}\n\n");
    let mut group = criterion.benchmark_group("usage");
    group.bench_function("an answer of 1 KiB", |bencher| {
        bencher.iter(|| {
            let mut meter = Meter::new(Operation::Chat, false);
            meter.push(black_box(answer.as_bytes()));
            meter.usage()
        });
    });
    group.bench_function("an event of 40 bytes without any", |bencher| {
        let mut meter = Meter::new(Operation::Chat, true);
        bencher.iter(|| meter.push(black_box(event)));
    });
    group.bench_function("a stream's last event", |bencher| {
        bencher.iter(|| {
            let mut meter = Meter::new(Operation::Chat, true);
            meter.push(black_box(last.as_bytes()));
            meter.usage()
        });
    });
    group.finish();
}

fn routes(criterion: &mut Criterion) {
    let policy = policy(1);
    criterion.bench_function("route a model by name", |bencher| {
        bencher.iter(|| policy.route(black_box(Some("llama-3"))).is_ok());
    });
    criterion.bench_function("route a model by pattern", |bencher| {
        bencher.iter(|| policy.route(black_box(Some("llama-4"))).is_ok());
    });
}

fn picks(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("pick");
    for upstreams in [1, 5, 25, 100] {
        let policy = policy(upstreams);
        let pool = &policy.pools["p"];
        group.bench_function(format!("of {upstreams}"), |bencher| {
            bencher.iter(|| pool.pick(Operation::Chat, &[], black_box(Instant::now())).is_some());
        });
    }
    group.finish();
}

/// What traces cost a request: one that is sampled out, and one that is kept.
fn traces(criterion: &mut Criterion) {
    let url = http::Uri::from_static("http://127.0.0.1:1/v1/traces");
    let target = Target { url, headers: http::HeaderMap::new(), service: "bench".to_owned() };
    let (tracer, traces) = (Tracer::new(TraceMeters::default()), Traces::new(0.0, None, true, target));
    let placed = traces.place(None);
    let moment = Moment { at: SystemTime::now(), received: Instant::now(), ended: Instant::now() };
    let record = |trace: Trace| Record {
        id: Id::new(),
        outcome: Outcome::Ok,
        status: Some(200),
        surface: "/v1/chat/completions",
        operation: "chat",
        method: "POST",
        stream: true,
        client: Client { address: Peer(None), protocol: "http/1.1", request_id: None },
        trace: Some(trace),
        principal: None,
        tenant: None,
        model: Models { asked: Some("llama-3"), route: Some("llama-3"), used: Some("llama-3") },
        policy: PolicyMark { revision: 1, hash: "0123456789abcdef" },
        decisions: &[],
        attempts: AttemptList { list: &[], moment },
        usage: Usage::default(),
        bytes: BodyBytes::default(),
        capture: None,
        times: Times::default(),
        code: None,
        message: None,
        moment,
    };
    let mut group = criterion.benchmark_group("trace");
    group.bench_function("a place", |bencher| bencher.iter(|| traces.place(black_box(None))));
    group.bench_function("traceparent", |bencher| bencher.iter(|| traceparent(black_box(&placed), 1)));
    let out = record(placed);
    group.bench_function("sampled out", |bencher| bencher.iter(|| tracer.finish(&traces, black_box(&out))));
    let kept = record(Trace { sampled: true, ..placed });
    // A tracer for each: one that is full throws spans away before it builds them.
    group.bench_function("kept", |bencher| {
        let fresh = || Tracer::new(TraceMeters::default());
        bencher.iter_batched_ref(fresh, |tracer| tracer.finish(&traces, black_box(&kept)), BatchSize::SmallInput);
    });
    group.finish();
}

criterion_group!(pieces, scans, splices, frames, usages, routes, picks, traces);
criterion_main!(pieces);
