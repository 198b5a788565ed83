use std::sync::Arc;
use std::time::{Instant, SystemTime};

use infergate_plugins::operation::Operation;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use opentelemetry_proto::tonic::trace::v1::status::StatusCode;

use super::*;
use crate::audit::record::{Attempt, AttemptList, Client, Ending, Models, Moment, Peer, PolicyMark, Times};
use crate::policy::{Policy, World, compile, reload};
use crate::pool::Wanted;
use crate::settings::Settings;
use crate::state::State;
use crate::telemetry::{Telemetry, names};
use crate::usage::Usage;

const CALLER: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

fn parsed(text: &str) -> Option<Context> {
    Context::parse(text)
}

#[test]
fn a_callers_context_is_read_as_the_standard_spells_it() {
    let context = parsed(CALLER).unwrap();
    assert_eq!(context.trace, 0x4bf9_2f35_77b3_4da6_a3ce_929d_0e0e_4736);
    assert_eq!((context.parent, context.sampled), (0x00f0_67aa_0ba9_02b7, true));
    assert!(!parsed(&CALLER.replace("-01", "-00")).unwrap().sampled);
    assert!(parsed(&CALLER.replace("-01", "-03")).unwrap().sampled, "unknown flags are nobody's business");
    assert!(!parsed(&CALLER.replace("-01", "-fe")).unwrap().sampled);
}

#[test]
fn what_is_no_context_is_none() {
    let wrong = [
        "",
        "00",
        "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7",
        "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-1",
        "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
        "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
        "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
        "00-4bf92f3577b34da6a3ce929d0e0e473-000f067aa0ba902b7-01",
        "00_4bf92f3577b34da6a3ce929d0e0e4736_00f067aa0ba902b7_01",
        "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-more",
        "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01 ",
        "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        "0x-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        "cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01more",
        "00-4bf92f3577b34da6a3ce929d0e0e473é-00f067aa0ba902b7-01",
    ];
    for text in wrong {
        assert_eq!(parsed(text), None, "{text}");
    }
    // A version of the future: what all versions have in common counts.
    assert_eq!(parsed(&CALLER.replacen("00-", "cc-", 1)), parsed(CALLER));
    assert_eq!(parsed(&format!("{}-what-the-future-brings", CALLER.replacen("00-", "cc-", 1))), parsed(CALLER));
}

#[test]
fn strangers_bytes_are_read_without_harm() {
    let mut random = fastrand::Rng::with_seed(59);
    for _ in 0..20_000 {
        let mut text = CALLER.as_bytes().to_vec();
        for _ in 0..random.usize(1..4) {
            let at = random.usize(0..text.len());
            text[at] = random.u8(..);
        }
        text.truncate(random.usize(40..=text.len()));
        let _ = Context::parse(&String::from_utf8_lossy(&text));
    }
}

#[test]
fn of_two_contexts_none_counts() {
    let mut headers = HeaderMap::new();
    assert_eq!(Context::of(&headers), None);
    headers.append(TRACEPARENT, CALLER.parse().unwrap());
    assert_eq!(Context::of(&headers), parsed(CALLER));
    headers.append(TRACEPARENT, CALLER.parse().unwrap());
    assert_eq!(Context::of(&headers), None);
}

#[test]
fn what_is_sent_on_can_be_read_again() {
    for sampled in [true, false] {
        let trace = Trace { id: 0xabc, span: 1, parent: None, sampled };
        let text = traceparent(&trace, 0xfff0);
        let text = std::str::from_utf8(&text).unwrap();
        assert_eq!(text, format!("00-{:032x}-000000000000fff0-0{}", 0xabc, u8::from(sampled)));
        assert_eq!(parsed(text), Some(Context { trace: 0xabc, parent: 0xfff0, sampled }));
    }
}

fn target() -> Target {
    let url = Uri::from_static("http://127.0.0.1:1/v1/traces");
    Target { url, headers: HeaderMap::new(), service: "infergate".to_owned() }
}

fn keeping(share: f64, slow_ms: u64, errors: bool) -> Traces {
    Traces::new(share, (slow_ms > 0).then_some(Duration::from_millis(slow_ms)), errors, target())
}

#[test]
fn a_caller_is_obeyed_and_the_rest_is_drawn_by_the_traces_id() {
    let (none, all) = (keeping(0.0, 0, false), keeping(1.0, 0, false));
    for sampled in [true, false] {
        for traces in [&none, &all] {
            let placed = traces.place(Some(Context { trace: 7, parent: 9, sampled }));
            assert_eq!((placed.id, placed.parent, placed.sampled), (7, Some(9), sampled));
        }
    }
    assert!((0..1000).all(|_| all.place(None).sampled && !none.place(None).sampled));
    let (some, more) = (keeping(0.1, 0, false), keeping(0.3, 0, false));
    let placed: Vec<Trace> = (0..20_000).map(|_| some.place(None)).collect();
    let share = placed.iter().filter(|trace| trace.sampled).count() as f64 / 20_000.0;
    assert!((0.08..0.12).contains(&share), "{share}");
    assert!(placed.iter().all(|trace| trace.id != 0 && trace.span != 0 && trace.parent.is_none()));
    // Whoever keeps more keeps these too: the traces are whole where several services draw.
    assert!(placed.iter().filter(|trace| trace.sampled).all(|trace| more.draws(trace.id)));
    // OpenTelemetry's own sampler looks at the lower half without its lowest bit.
    let half = keeping(0.5, 0, false);
    assert!(half.draws(0x7fff_ffff_ffff_ffff) && !half.draws(0x8000_0000_0000_0000));
    assert!(half.draws(u128::MAX << 64));
}

/// A policy with a pool `p` of one upstream, `up`, which knows the model as `theirs`.
fn policy() -> Policy {
    let (state, telemetry, settings) = (State::new(0), Telemetry::new(), Settings::default());
    let text = "version: 1\npools: {p: {upstreams: [{url: 'http://127.0.0.1:8000', name: up, model: theirs}]}}\nmodels: [{name: ours, pool: p}]\n";
    compile(text, &World::new(&|_| None, &state, &telemetry, &settings)).unwrap()
}

fn attempts(endings: &[(Ending, Option<u16>)]) -> Vec<Attempt> {
    let policy = policy();
    let pool = policy.pools.values().next().unwrap();
    let one = |(ending, status): &(Ending, Option<u16>)| {
        let picked = pool.pick(&Wanted::of(Operation::Chat), &[], Instant::now()).unwrap();
        let mut attempt = Attempt::begin(pool, &picked, 10, new_span());
        attempt.head = status.map(|status| (Instant::now(), status));
        attempt.end(*ending, None);
        attempt
    };
    endings.iter().map(one).collect()
}

fn record(attempts: &[Attempt]) -> Record<'_> {
    let received = Instant::now() - Duration::from_secs(2);
    let moment = Moment { at: SystemTime::now(), received, ended: Instant::now() };
    let sample = Record::sample(moment);
    Record {
        client: Client { address: Peer(None), protocol: "http/1.1", request_id: Some("canary") },
        trace: Some(Trace { id: 1, span: 2, parent: Some(3), sampled: false }),
        principal: Some("canary"),
        tenant: Some("red"),
        model: Models { asked: Some("canary"), route: Some("ours"), used: Some("theirs") },
        policy: PolicyMark { revision: 3, hash: "abc" },
        attempts: AttemptList { list: attempts, ..sample.attempts },
        usage: Usage::default(),
        times: Times { first: Some(1_500_000), ended: 2_000_000, own: 50, ..Times::default() },
        ..sample
    }
}

fn kept(traces: &Traces, edit: impl Fn(&mut Record<'_>)) -> bool {
    let attempts = attempts(&[(Ending::Answered, Some(200))]);
    let mut record = record(&attempts);
    edit(&mut record);
    record.trace.is_some_and(|trace| traces.keeps(&trace, &record))
}

#[test]
fn failures_and_slow_requests_are_kept_although_nobody_sampled_them() {
    let traces = keeping(0.0, 0, true);
    assert!(!kept(&traces, |_| ()));
    for outcome in [Outcome::UpstreamError, Outcome::Timeout, Outcome::Aborted] {
        assert!(kept(&traces, |record| record.outcome = outcome), "{outcome:?}");
        assert!(!kept(&keeping(0.0, 0, false), |record| record.outcome = outcome), "{outcome:?}");
    }
    for outcome in [Outcome::Refused, Outcome::ClientClosed, Outcome::Blocked, Outcome::LimitCut] {
        assert!(!kept(&traces, |record| record.outcome = outcome), "{outcome:?}");
    }
    assert!(kept(&traces, |record| record.status = Some(500)));
    assert!(kept(&traces, |record| (record.outcome, record.status) = (Outcome::Refused, Some(503))));
    assert!(!kept(&traces, |record| (record.outcome, record.status) = (Outcome::Refused, Some(404))));
    assert!(kept(&keeping(0.0, 2_000, false), |_| ()));
    assert!(!kept(&keeping(0.0, 2_001, false), |_| ()));
    assert!(!kept(&keeping(1.0, 1, true), |record| record.trace = None), "it came before any policy asked for traces");
}

fn value<'a>(span: &'a Span, name: &str) -> Option<&'a Value> {
    span.attributes.iter().find(|pair| pair.key == name)?.value.as_ref()?.value.as_ref()
}

fn text<'a>(span: &'a Span, name: &str) -> &'a str {
    match value(span, name) {
        Some(Value::StringValue(text)) => text,
        other => panic!("{name} of {}: {other:?}", span.name),
    }
}

#[test]
fn a_request_and_its_attempts_are_spans_of_one_tree() {
    let attempts = attempts(&[(Ending::Connect, None), (Ending::Answered, Some(200))]);
    let record = record(&attempts);
    let spans = span::spans(&record.trace.unwrap(), &record);
    let [request, failed, answered] = &spans[..] else { panic!("{spans:?}") };
    assert_eq!((request.name.as_str(), request.kind), ("chat ours", SpanKind::Server as i32));
    assert_eq!(request.parent_span_id, 3u64.to_be_bytes());
    assert_eq!(request.end_time_unix_nano - request.start_time_unix_nano, {
        (record.moment.ended - record.moment.received).as_nanos() as u64
    });
    for attempt in [failed, answered] {
        assert_eq!((attempt.name.as_str(), attempt.kind), ("chat theirs", SpanKind::Client as i32));
        assert_eq!((&attempt.trace_id, &attempt.parent_span_id), (&request.trace_id, &request.span_id));
        assert_eq!(text(attempt, names::SERVER_ADDRESS), "127.0.0.1");
        assert_eq!(value(attempt, names::SERVER_PORT), Some(&Value::IntValue(8000)));
        assert_eq!((text(attempt, names::POOL), text(attempt, names::UPSTREAM)), ("p", "up"));
    }
    assert_ne!(failed.span_id, answered.span_id);
    assert_eq!((request.flags, failed.flags), (0x300, 0x100), "the caller is elsewhere, the request is here");
    assert_eq!(text(failed, names::ERROR_TYPE), "connect");
    assert_eq!(failed.status.as_ref().unwrap().code, StatusCode::Error as i32);
    assert_eq!((&answered.status, &request.status), (&None, &None));
    assert_eq!(text(answered, names::ATTEMPT_RESULT), "answered");
    assert_eq!((text(request, names::REQUEST_MODEL), text(request, names::RESPONSE_MODEL)), ("ours", "theirs"));
    assert_eq!((text(request, names::PROVIDER), text(request, names::PROTOCOL_VERSION)), ("vllm", "1.1"));
    assert_eq!(value(request, names::TIME_TO_FIRST_CHUNK), Some(&Value::DoubleValue(1.5)));
    assert_eq!(value(request, names::ATTEMPTS), Some(&Value::IntValue(2)));
    assert_eq!(text(request, names::REQUEST_ID), record.id.as_str());
    assert!(!format!("{spans:?}").contains("canary"), "what only the client says is in the record, not in spans");
}

#[test]
fn a_failure_says_why_in_a_word_and_in_a_sentence() {
    let failure = |edit: &dyn Fn(&mut Record<'_>)| {
        let attempts = attempts(&[(Ending::Answered, Some(500))]);
        let mut record = record(&attempts);
        edit(&mut record);
        let request = span::spans(&record.trace.unwrap(), &record).swap_remove(0);
        (text(&request, names::ERROR_TYPE).to_owned(), request.status.unwrap().message)
    };
    let told = failure(&|record| {
        record.outcome = Outcome::Timeout;
        (record.code, record.message) = (Some("answer_timeout"), Some("no answer within 5 ms"));
    });
    assert_eq!(told, ("answer_timeout".to_owned(), "no answer within 5 ms".to_owned()));
    assert_eq!(failure(&|record| record.status = Some(500)), ("500".to_owned(), "500".to_owned()));
    assert_eq!(failure(&|record| record.outcome = Outcome::Aborted), ("aborted".to_owned(), "aborted".to_owned()));
}

#[test]
fn a_client_that_left_and_a_refusal_by_its_own_fault_are_no_errors() {
    let attempts = attempts(&[(Ending::Cancelled, None)]);
    let mut record = record(&attempts);
    record.outcome = Outcome::ClientClosed;
    let spans = span::spans(&record.trace.unwrap(), &record);
    assert!(spans.iter().all(|span| span.status.is_none()));
    assert_eq!(text(&spans[1], names::ERROR_TYPE), "cancelled");
    assert!(value(&spans[0], names::RESPONSE_MODEL).is_none(), "nobody answered");
    record.attempts.list = &[];
    (record.outcome, record.status, record.code) = (Outcome::Refused, Some(404), Some("not_found"));
    (record.model, record.stream) = (Models::default(), false);
    let spans = span::spans(&record.trace.unwrap(), &record);
    assert_eq!((spans.len(), spans[0].name.as_str(), &spans[0].status), (1, "chat", &None));
    assert!(value(&spans[0], names::ERROR_TYPE).is_none() && value(&spans[0], names::PROVIDER).is_none());
}

#[test]
fn every_name_is_in_the_list_once() {
    let all: Vec<&str> = names::ON_SPANS.iter().chain(&names::ON_RESOURCE).copied().collect();
    let unique: std::collections::BTreeSet<&str> = all.iter().copied().collect();
    assert_eq!(unique.len(), all.len());
    let attempts = attempts(&[(Ending::Status, Some(503)), (Ending::Answered, Some(200))]);
    let record = record(&attempts);
    for pair in span::spans(&record.trace.unwrap(), &record).iter().flat_map(|span| &span.attributes) {
        assert!(names::ON_SPANS.contains(&pair.key.as_str()), "{}", pair.key);
    }
}

#[tokio::test]
async fn a_queue_that_is_full_drops_and_counts_and_a_policy_without_traces_empties_it() {
    let tracer = Tracer::new(TraceMeters::default());
    let (traces, policy) = (keeping(1.0, 1, false), reload::InForce::default());
    let attempts = attempts(&[(Ending::Answered, Some(200))]);
    let record = record(&attempts);
    for _ in 0..HELD_MAX / 2 + 3 {
        tracer.finish(&traces, &record);
    }
    assert_eq!((tracer.queue.lock().len(), tracer.meters.dropped.get()), (HELD_MAX, 6));
    tracer.export(&policy).await;
    assert_eq!(tracer.held.load(Ordering::Relaxed), 0);
    assert_eq!((tracer.meters.dropped.get(), tracer.meters.exported.get()), (HELD_MAX as u64 + 6, 0));
    tracer.finish(&traces, &record);
    assert_eq!(tracer.held.load(Ordering::Relaxed), 2);
}

#[test]
fn what_is_not_kept_leaves_nothing() {
    let tracer = Tracer::new(TraceMeters::default());
    let attempts = attempts(&[(Ending::Answered, Some(200))]);
    tracer.finish(&keeping(0.0, 0, true), &record(&attempts));
    assert!(tracer.queue.lock().is_empty() && tracer.meters.dropped.get() == 0);
}

#[test]
fn a_pool_is_kept_alive_by_nobody_here() {
    // Spans own what they tell: a policy that is gone is gone.
    let attempts = attempts(&[(Ending::Answered, Some(200))]);
    let pool = Arc::downgrade(attempts[0].pool());
    let spans = span::spans(&Trace { id: 1, span: 2, parent: None, sampled: true }, &record(&attempts));
    drop(attempts);
    assert!(pool.upgrade().is_none() && spans.len() == 2);
}
