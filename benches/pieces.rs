//! The pieces of a request's way, one by one: the body scan, the splice, the event framer, the usage,
//! the route, the pick, the record, the trace.

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use infergate::audit::journal::Unwritten;
use infergate::audit::record::{Attempt, AttemptList, Decision, Ending, Moment, Record, Trace};
use infergate::identity;
use infergate::money::Cached;
use infergate::policy::{Policy, World, compile, prices};
use infergate::pool::prefix::{Blocks, Chain};
use infergate::pool::score::Asked;
use infergate::pool::{Pool, Wanted};
use infergate::scan;
use infergate::settings::Settings;
use infergate::sse::Framer;
use infergate::state::State;
use infergate::telemetry::trace::{Target, Tracer, Traces, traceparent};
use infergate::telemetry::{Telemetry, TraceMeters};
use infergate::usage::{Meter, Source, Usage};
use infergate_plugins::authenticator::jwt::KeySet;
use infergate_plugins::authenticator::keys::Fresh;
use infergate_plugins::authenticator::{self, Credentials};
use infergate_plugins::operation::Operation;
use infergate_plugins::secret::Secret;

use self::signer::Signer;

#[path = "../tests/support/signer.rs"]
#[allow(dead_code, clippy::unwrap_used, reason = "it is the tests'")]
mod signer;

/// A chat request of about `bytes` bytes, nearly all of it prose with a line end now and then.
fn chat(bytes: usize) -> Bytes {
    const LINE: &str = "The quick brown fox jumps over the lazy dog, and then it does so once more.\\n";
    let frame = r#"{"messages":[{"role":"user","content":""}],"temperature":0.7,"stream":true,"model":"llama-3"}"#;
    let prose = LINE.repeat(bytes.saturating_sub(frame.len()) / LINE.len());
    frame.replace("\"content\":\"\"", &format!("\"content\":\"{prose}\"")).into()
}

fn policy(upstreams: usize) -> Policy {
    policy_with(upstreams, "")
}

/// The same with more under the pool.
fn policy_with(upstreams: usize, more: &str) -> Policy {
    let urls: String = (0..upstreams).map(|n| format!("      - url: http://127.0.0.1:{}\n", 10_000 + n)).collect();
    let text = format!(
        "version: 1\nmodels:\n  - {{name: 'llama-*', pool: p}}\n  - {{name: llama-3, pool: p}}\npools:\n  p:\n    upstreams:\n{urls}{more}"
    );
    let (state, telemetry, settings) = (State::new(0), Telemetry::new(), Settings::default());
    match compile(&text, &World::new(&|_| None, &state, &telemetry, &settings)) {
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
            bencher.iter(|| pool.pick(&Wanted::of(Operation::Chat), &[], black_box(Instant::now())).is_some());
        });
    }
    for upstreams in [5, 25, 100] {
        let policy = policy_with(upstreams, "    balance: expected_time\n");
        let pool = &policy.pools["p"];
        let wanted =
            Wanted { asked: Asked { prompt: 6_000, output: 200, key: 7, turn: 0 }, ..Wanted::of(Operation::Chat) };
        let allocated = allocation_counter::measure(|| drop(pool.pick(&wanted, &[], Instant::now())));
        assert_eq!(allocated.count_total, 0, "a choice among {upstreams} allocates");
        group.bench_function(format!("by expected time of {upstreams}"), |bencher| {
            bencher.iter(|| pool.pick(black_box(&wanted), &[], black_box(Instant::now())).is_some());
        });
    }
    for upstreams in [5, 25, 100] {
        let policy = policy_with(upstreams, "    balance: expected_time\n");
        let pool = &policy.pools["p"];
        let Some(chain) = read_by_all(pool) else { panic!("the pool remembers no prefixes") };
        let asked = Asked { prompt: 130_000, output: 200, key: 7, turn: 0 };
        let wanted = Wanted { asked, chain: Some(&chain), ..Wanted::of(Operation::Chat) };
        let allocated = allocation_counter::measure(|| drop(pool.pick(&wanted, &[], Instant::now())));
        assert_eq!(allocated.count_total, 0, "a choice among {upstreams} that have read some allocates");
        group.bench_function(
            format!("by expected time of {upstreams}, with their 2,048 blocks looked up"),
            |bencher| {
                bencher.iter(|| pool.pick(black_box(&wanted), &[], black_box(Instant::now())).is_some());
            },
        );
    }
    group.finish();
}

/// The chain of a prompt of which every endpoint has read the beginning, each fourth one more of it.
fn read_by_all(pool: &Pool) -> Option<Chain> {
    let prefixes = pool.prefixes.as_ref()?;
    let text = chat(2048 * Blocks::default().bytes() as usize);
    let chain = |share: usize| {
        prefixes.chain(Blocks::default(), "llama-3", std::iter::once(("messages", &text[..text.len() / share])))
    };
    for (n, upstream) in pool.upstreams.iter().enumerate() {
        let share = [60, 50, 40, 2][n % 4];
        prefixes.learn(&chain(share), upstream.origin.endpoints().first()?.seat(prefixes)?);
    }
    Some(chain(1))
}

/// The record of a chat request that went well, as its exchange would put it together.
fn record<'a>(trace: Trace, decisions: &'a [Decision], attempts: &'a [Attempt], moment: Moment) -> Record<'a> {
    let sample = Record::sample(moment);
    let attempts = AttemptList { list: attempts, ..sample.attempts };
    Record { trace: Some(trace), decisions, attempts, ..sample }
}

/// What the journal costs: a request that files its record, and the thread that numbers and chains it.
fn records(criterion: &mut Criterion) {
    let mut journal = journal();
    let (placed, decisions, attempts, moment) = parts();
    let file = |journal: &Unwritten| {
        let record = record(placed, black_box(&decisions), &attempts, moment);
        let place = journal.journal().reserve();
        place.map(|place| journal.journal().file(&record, place))
    };
    // Twice, because there are two buffers that take turns.
    for _ in 0..2 {
        (0..GROUP).for_each(|_| _ = file(&journal));
        journal.frame();
    }
    let allocated = allocation_counter::measure(|| (0..GROUP).for_each(|_| _ = file(&journal)));
    assert_eq!(allocated.count_total, 0, "filing a record allocates");
    let allocated = allocation_counter::measure(|| _ = journal.frame());
    assert_eq!(allocated.count_total, 0, "framing a record allocates");
    let mut group = criterion.benchmark_group("record");
    group.bench_function("built, encoded, filed", |bencher| {
        bencher.iter_custom(|times| {
            in_groups(times, &mut journal, |journal, group| timed(|| (0..group).for_each(|_| _ = file(journal))))
        });
    });
    group.bench_function("numbered, chained", |bencher| {
        bencher.iter_custom(|times| {
            in_groups(times, &mut journal, |journal, group| {
                (0..group).for_each(|_| _ = file(journal));
                timed(|| _ = black_box(journal.frame()))
            })
        });
    });
    group.finish();
}

/// As many records as a commit may have.
const GROUP: u64 = 1000;

/// A journal that keeps what is filed until it is framed here.
fn journal() -> Unwritten {
    let opened = tempfile::tempdir().map_err(|error| error.to_string());
    match opened.and_then(|directory| Unwritten::open(directory.path())) {
        Ok(journal) => journal,
        Err(error) => panic!("{error}"),
    }
}

/// What an exchange has when it is over.
fn parts() -> (Trace, [Decision; 3], [Attempt; 1], Moment) {
    let decision = |stage, rule, verdict, why| Decision { stage, rule, verdict, why };
    let decisions = [
        decision("identify", "anonymous".into(), "allow".into(), "the policy asks for no key".into()),
        decision("route", "llama-3".into(), "p".into(), "by its name".into()),
        decision("queue", "p".into(), "enter".into(), "at once".into()),
    ];
    let (policy, began) = (policy(1), Instant::now());
    let pool = &policy.pools["p"];
    let Some(picked) = pool.pick(&Wanted::of(Operation::Chat), &[], began) else { panic!("nothing to pick") };
    let mut attempt = Attempt::begin(pool, &picked, 1024, 1);
    attempt.head = Some((Instant::now(), 200));
    attempt.end(Ending::Answered, None);
    let moment = Moment { at: SystemTime::now(), received: began, ended: Instant::now() };
    (Trace { id: u128::MAX / 3, span: 1, parent: None, sampled: false }, decisions, [attempt], moment)
}

fn timed(work: impl FnOnce()) -> Duration {
    let begun = Instant::now();
    work();
    begun.elapsed()
}

/// So often, a group at a time, with an empty buffer before each.
fn in_groups(times: u64, journal: &mut Unwritten, each: impl Fn(&mut Unwritten, u64) -> Duration) -> Duration {
    let groups = (0..times).step_by(GROUP as usize).map(|done| GROUP.min(times - done));
    groups
        .map(|group| {
            let took = each(journal, group);
            journal.frame();
            took
        })
        .sum()
}

/// What traces cost a request: one that is sampled out, and one that is kept.
fn traces(criterion: &mut Criterion) {
    let url = http::Uri::from_static("http://127.0.0.1:1/v1/traces");
    let target = Target { url, headers: http::HeaderMap::new(), service: "bench".to_owned() };
    let (tracer, traces) = (Tracer::new(TraceMeters::default()), Traces::new(0.0, None, true, target));
    let placed = traces.place(None);
    let moment = Moment { at: SystemTime::now(), received: Instant::now(), ended: Instant::now() };
    let record = |trace| record(trace, &[], &[], moment);
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

fn costs(criterion: &mut Criterion) {
    let list = (0..1_000).map(|n| format!("  - {{models: [model-{n}], input: 2.5, cached_input: 1.25, output: 10}}\n"));
    let text = format!("version: 1\nlist:\n{}", list.collect::<String>());
    let book = match prices::book(&text) {
        Ok(book) => book,
        Err(problems) => panic!("{:?}", problems.lines("bench")),
    };
    let usage = Usage {
        input_tokens: Some(2_000),
        cached_tokens: Some(1_024),
        output_tokens: Some(300),
        source: Source::Upstream,
        ..Usage::default()
    };
    let now = SystemTime::now();
    criterion.bench_function("price an answer, of 1000 models", |bencher| {
        bencher.iter(|| {
            let price = book.find(black_box("model-500"), "p", "vllm", now);
            price.and_then(|price| price.cost(black_box(&usage), Cached::Within))
        });
    });
}

/// Who asks, among as many keys as a large organisation has: one that is known, one that is made up, and nobody's.
fn identities(criterion: &mut Criterion) {
    let pepper = Secret::new("a pepper of thirty-two characters");
    let fresh = || {
        let chance = |bytes: &mut [u8]| {
            bytes.iter_mut().for_each(|byte| *byte = fastrand::u8(..));
            Ok(())
        };
        Fresh::make(chance).unwrap_or_else(|error| panic!("{error}"))
    };
    let known: Vec<Fresh> = (0..1_000).map(|_| fresh()).collect();
    let entry = |key: &Fresh| serde_json::json!({"tenant": "t", "prefix": key.prefix(), "hash": key.hash(&pepper)});
    let list: Vec<_> = known.iter().map(entry).collect();
    let config = serde_json::json!([{"keys": {"pepper": {"env": "P"}, "list": list}}]);
    let configs: Vec<authenticator::Config> = serde_json::from_value(config).unwrap_or_default();
    let mut world = authenticator::World {
        secret: &mut |_| Ok(pepper.clone()),
        entries: &mut |_| Err(Vec::new()),
        key_set: &mut |_| Err(String::new()),
        claims: &[],
        time: |_| None,
    };
    let built = authenticator::build(&configs, &mut world).unwrap_or_default();
    let chain: Vec<_> = built.into_iter().map(|built| built.authenticator).collect();
    let now = SystemTime::now();
    let mut group = criterion.benchmark_group("identify");
    let made_up = fresh();
    for (what, key) in
        [("a known key", known[500].key()), ("a key made up", made_up.key()), ("no key", &Secret::new(""))]
    {
        let value = format!("Bearer {}", key.reveal()).parse().unwrap_or(http::HeaderValue::from_static(""));
        let headers: http::HeaderMap = [(http::header::AUTHORIZATION, value)].into_iter().collect();
        group.bench_function(what, |bencher| {
            bencher.iter(|| identity::ask(&chain, &Credentials::of(black_box(&headers)), now).1.is_ok());
        });
    }
    group.finish();
}

/// Who asks by a token: one that was verified before, and one whose signature is wrong, which is verified each time.
fn tokens(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("identify by a token");
    for signer in [Signer::rsa(), Signer::p256(), Signer::ed25519()] {
        let keys = serde_json::json!({"keys": [signer.jwk("k")]}).to_string();
        let Ok(keys) = KeySet::fixed(keys.as_bytes()).map(Arc::new) else { panic!("no key") };
        let config = serde_json::json!([{"jwt": {"issuers": [{
            "issuer": "https://id.test", "audience": ["a"], "algorithms": [signer.algorithm()], "tenant": {"default": "t"},
        }]}}]);
        let configs: Vec<authenticator::Config> = serde_json::from_value(config).unwrap_or_default();
        let mut world = authenticator::World {
            secret: &mut |_| Err(String::new()),
            entries: &mut |_| Err(Vec::new()),
            key_set: &mut |_| Ok(keys.clone()),
            claims: &[],
            time: |_| None,
        };
        let built = authenticator::build(&configs, &mut world).unwrap_or_default();
        let chain: Vec<_> = built.into_iter().map(|built| built.authenticator).collect();
        let claims =
            serde_json::json!({"iss": "https://id.test", "aud": "a", "sub": "alice", "exp": 4_000_000_000_u64});
        let (good, now) = (signer.token("k", &claims), SystemTime::now());
        let wrong = good.replacen('.', ".eyJpc3MiOiJodHRwczovL2lkLnRlc3QifQ.", 1);
        let wrong = wrong.rsplitn(3, '.').collect::<Vec<_>>();
        let wrong = format!("{}.{}", wrong.last().unwrap_or(&""), wrong.first().unwrap_or(&""));
        for (what, token) in [("known", good), ("wrong", wrong)] {
            let value = format!("Bearer {token}").parse().unwrap_or(http::HeaderValue::from_static(""));
            let headers: http::HeaderMap = [(http::header::AUTHORIZATION, value)].into_iter().collect();
            group.bench_function(format!("{} {what}", signer.algorithm()), |bencher| {
                bencher.iter(|| identity::ask(&chain, &Credentials::of(black_box(&headers)), now).1.is_ok());
            });
        }
    }
    group.finish();
}

criterion_group!(pieces, identities, tokens, scans, splices, frames, usages, routes, picks, records, traces, costs);
criterion_main!(pieces);
