//! Bytes from strangers: whatever comes, nothing panics, and what two readings say of the same bytes agrees.
//!
//! A smoke run of fixed seeds by default; `INFERGATE_FUZZ_SECONDS=3600 cargo test --release --test promises fuzz`
//! goes on from random seeds for that long and prints the seed of what it finds.

use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use infergate::guard::{Blocked, Guard, Rails};
use infergate::policy::{World, compile};
use infergate::scan::{self, Fault, Field};
use infergate::settings::Settings;
use infergate::sse::Framer;
use infergate::state::State;
use infergate::telemetry::Telemetry;
use infergate::text::Reading;
use infergate_plugins::operation::Operation;
use serde_json::{Map, Value};

/// Calls `target` with mutations of `seeds`, each with its own random numbers: `rounds` of them, or for as long as the
/// environment says.
fn fuzz(rounds: u64, seeds: &[&[u8]], target: impl Fn(&[u8], &mut fastrand::Rng)) {
    let long = std::env::var("INFERGATE_FUZZ_SECONDS").ok().map(|text| Duration::from_secs(text.parse().unwrap()));
    let (start, first) = (Instant::now(), if long.is_some() { fastrand::u64(..) } else { 0 });
    for round in 0.. {
        if long.map_or(round >= rounds, |long| start.elapsed() >= long) {
            return;
        }
        let seed = first.wrapping_add(round);
        let mut random = fastrand::Rng::with_seed(seed);
        let bytes = mutated(seeds, &mut random);
        let told = format!("seed {seed}: {:?}", String::from_utf8_lossy(&bytes));
        let fine = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| target(&bytes, &mut random)));
        assert!(fine.is_ok(), "{told}");
    }
}

fn mutated(seeds: &[&[u8]], random: &mut fastrand::Rng) -> Vec<u8> {
    let mut bytes = seeds[random.usize(..seeds.len())].to_vec();
    for _ in 0..random.usize(0..6) {
        let at = random.usize(0..=bytes.len());
        let length = random.usize(0..=8.min(bytes.len() - at));
        match random.u8(0..6) {
            0 => drop(bytes.drain(at..at + length)),
            1 => bytes.insert(at, random.u8(..)),
            2 => drop(bytes.splice(at..at, b"{}[]\",:\\u\r\n-".iter().copied().skip(random.usize(..12)).take(1))),
            3 => bytes[at..at + length].fill(random.u8(..)),
            4 => {
                let other = seeds[random.usize(..seeds.len())];
                let from = random.usize(..=other.len());
                bytes.splice(at..at, other[from..(from + 20).min(other.len())].iter().copied());
            }
            _ => bytes.truncate(at),
        }
    }
    bytes
}

#[test]
fn the_body_scan_agrees_with_serde_json() {
    let seeds: [&[u8]; 5] = [
        br#"{"model":"gpt-4","messages":[{"role":"user","content":"Hi \u00e9\n"}],"stream":true,"max_tokens":17}"#,
        br#"{"n":1,"user":"u","stream_options":{"include_usage":true},"x":[1,-2.5e+3,null,{"model":"inner"}]}"#,
        br#" { "model" : "a\\b\"c" , "stream":false } "#,
        br#"{"m\u006fdel":"escaped","Model":"case"}"#,
        b"{}",
    ];
    fuzz(30_000, &seeds, |bytes, _| {
        let scanned = scan::json(bytes);
        let Ok(object) = serde_json::from_slice::<Map<String, Value>>(bytes) else { return };
        match scanned {
            Ok(found) => {
                let model = found.model(bytes);
                match object.get("model") {
                    Some(Value::String(name)) => assert_eq!(model.unwrap().as_deref(), Some(name.as_str())),
                    None | Some(Value::Null) => assert_eq!(model, Ok(None)),
                    Some(_) => assert!(model.is_err()),
                }
                assert_eq!(found.span(Field::Stream).is_some(), object.contains_key("stream"));
            }
            // serde_json takes the last of two; that is why they are refused.
            Err(fault) => assert!(matches!(fault, Fault::Twice(_)), "{fault}"),
        }
    });
}

#[test]
fn a_renamed_body_is_the_same_but_for_the_name() {
    let seeds: [&[u8]; 2] = [br#"{"model":"a","x":[1.0,"\u0041"],"y":{}}"#, br#"{"y":null,"model" : "b"}"#];
    fuzz(10_000, &seeds, |bytes, _| {
        let Ok(found) = scan::json(bytes) else { return };
        let Some(edit) = found.rename_model("new\"name") else { return };
        let body = bytes::Bytes::copy_from_slice(bytes);
        let renamed = scan::splice(&body, &mut [edit]);
        if let Ok(mut before) = serde_json::from_slice::<Map<String, Value>>(bytes) {
            before.insert("model".to_owned(), "new\"name".into());
            assert_eq!(serde_json::from_slice::<Map<String, Value>>(&renamed).unwrap(), before);
        }
    });
}

#[test]
fn the_form_scan_never_panics() {
    let form = b"--xyz\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\nwhisper\r\n--xyz\r\nContent-Disposition: form-data; name=\"file\"; filename=\"a\"\r\n\r\n\x00\xff\r\n--xyz--\r\n";
    fuzz(20_000, &[form], |bytes, random| {
        let types: [&[u8]; 3] =
            [b"multipart/form-data; boundary=xyz", b"multipart/form-data; boundary=\"xyz\"", b"multipart/form-data"];
        if let Ok(found) = scan::multipart(bytes, types[random.usize(..3)]) {
            let _any = found.model(bytes);
            let _any = found.stream(bytes);
        }
    });
}

#[test]
fn the_event_framer_does_not_care_how_bytes_are_split() {
    let seeds: [&[u8]; 4] = [
        b"data: {\"a\":1}\n\ndata: [DONE]\n\n",
        b": c\r\n\r\nevent: x\r\ndata: 1\r\ndata: 2\r\n\r\n",
        b"data: a\r\rdata: b\r\r\n\n",
        "\u{feff}data: \u{1f600}\n\n\n\nid: 1\n".as_bytes(),
    ];
    fuzz(30_000, &seeds, |bytes, random| {
        let whole = Framer::default().push(bytes);
        let (mut framer, mut at, mut complete) = (Framer::default(), 0, 0);
        while at < bytes.len() {
            let end = at + random.usize(1..=bytes.len() - at);
            let reached = framer.push(&bytes[at..end]);
            assert!(reached <= end - at);
            complete = if reached > 0 { at + reached } else { complete };
            at = end;
        }
        assert_eq!(complete, whole);
    });
}

#[test]
fn a_policy_of_any_bytes_is_compiled_or_explained() {
    let (state, telemetry, settings) = (State::new(0), Telemetry::new(), Settings::default());
    let seeds: [&[u8]; 3] = [
        include_bytes!("../config/policy.yaml"),
        b"version: 1\nmodels:\n  - {name: 'a*', pool: p, aliases: [b], fallbacks: [{pool: q, on: [5xx]}]}\npools:\n  p: {upstreams: [{url: 'http://x:1', weight: 2}]}\n  q: &q {upstreams: [{url: 'unix:/x'}], retry: {budget: 0.5}}\n",
        b"version: 1\npools: {}\nrequests: {strip_prefixes: [/a], heartbeat_ms: 0}\npriorities: {x: {level: 3}}\n",
    ];
    fuzz(1_500, &seeds, |bytes, _| {
        let text = String::from_utf8_lossy(bytes);
        if let Err(problems) = compile(&text, &World::new(&|_| None, &state, &telemetry, &settings)) {
            assert!(!problems.0.is_empty() && problems.0.iter().all(|problem| !problem.message.is_empty()));
        }
    });
}

const RULES: [&str; 2] = [
    "  - {name: cards, in: [answer.content, answer.reasoning, answer.tool_arguments, answer.refusal], verdict: redact, redact: mask, pii: {find: [card]}}\n  - {name: words, in: [answer.content, answer.tool_arguments], verdict: redact, redact: drop, words: {list: [geheim\u{4e2d}, '\u{1f600} b'], whole: false}}\n  - {name: stop, in: [answer.content], verdict: block, on_error: allow, words: {list: [abort now]}}\n  - {name: seen, in: [answer.content], verdict: flag, regex: {list: ['[a-z]{3}\\d']}}\n",
    "  - {name: shape, in: [answer.content, answer.tool_arguments], verdict: block, schema: {schema: {type: object, required: [a]}}}\n  - {name: loops, in: [answer.content], verdict: block, repetition: {times: 3, piece_bytes_max: 20, bytes_min: 16}}\n",
];

fn rails(rules: &str) -> Arc<Rails> {
    let policy = format!(
        "version: 1\nmodels: [{{name: m, pool: p}}]\npools:\n  p: {{upstreams: [{{url: 'http://x:1'}}]}}\nguardrails:\n{rules}"
    );
    let (state, telemetry, settings) = (State::new(0), Telemetry::new(), Settings::default());
    let compiled = compile(&policy, &World::new(&|_| None, &state, &telemetry, &settings));
    compiled.unwrap_or_else(|problems| panic!("{:?}", problems.0)).guardrails.unwrap()
}

/// What leaves of a stream that comes in these pieces, and what ended it.
fn guarded(rails: &Arc<Rails>, operation: Operation, pieces: &[&[u8]]) -> (String, Option<Blocked>) {
    let mut guard = Guard::prompt(rails.clone(), &Reading::of(operation, "{}"), None).guard;
    assert!(guard.answers(operation));
    let (mut framer, mut held, mut out) = (Framer::default(), BytesMut::new(), Vec::new());
    for piece in pieces {
        let complete = framer.push(piece);
        let end = if complete > 0 { held.len() + complete } else { 0 };
        held.extend_from_slice(piece);
        let mut events = held.split_to(end);
        let passes = guard.events(&mut events, &mut |_: &[u8]| {});
        out.extend_from_slice(&events);
        if let Err(blocked) = passes {
            return (String::from_utf8_lossy(&out).into_owned(), Some(blocked));
        }
    }
    let passes = guard.events(&mut held, &mut |_: &[u8]| {});
    out.extend_from_slice(&held);
    let passes = passes.and_then(|()| {
        let (rest, passes) = guard.rest(&mut |_: &[u8]| {});
        out.extend_from_slice(&rest);
        passes
    });
    (String::from_utf8_lossy(&out).into_owned(), passes.err())
}

/// A text as JSON has it, some of its letters escaped.
fn escaped(text: &str, random: &mut fastrand::Rng) -> String {
    let mut units = [0; 2];
    text.chars()
        .map(|c| match (c, random.u8(..8)) {
            ('"' | '\\', _) => format!("\\{c}"),
            (_, 0) => c.encode_utf16(&mut units).iter().map(|unit| format!("\\u{unit:04x}")).collect(),
            _ => c.to_string(),
        })
        .collect()
}

/// One event of this dialect with a piece of a text.
fn event(operation: Operation, text: &str, random: &mut fastrand::Rng) -> String {
    let text = escaped(text, random);
    let index = random.u8(..2);
    let data = match (operation, random.u8(..3)) {
        (Operation::Chat, 0) => format!(
            r#"{{"choices":[{{"index":{index},"delta":{{"tool_calls":[{{"index":0,"function":{{"name":"f","arguments":"{text}"}}}}]}}}}]}}"#
        ),
        (Operation::Chat, 1) => format!(r#"{{"choices":[{{"index":{index},"delta":{{"reasoning":"{text}"}}}}]}}"#),
        (Operation::Chat, _) => format!(r#"{{"choices":[{{"index":{index},"delta":{{"content":"{text}"}}}}]}}"#),
        (Operation::Completions, _) => format!(r#"{{"choices":[{{"index":{index},"text":"{text}"}}]}}"#),
        (Operation::Responses, 0) => {
            format!(r#"{{"type":"response.output_text.done","output_index":{index},"text":"{text}"}}"#)
        }
        (Operation::Responses, _) => {
            format!(r#"{{"type":"response.output_text.delta","output_index":{index},"delta":"{text}"}}"#)
        }
        (Operation::Messages, 0) => format!(r#"{{"type":"content_block_stop","index":{index}}}"#),
        (Operation::Messages, _) => format!(
            r#"{{"type":"content_block_delta","index":{index},"delta":{{"type":"text_delta","text":"{text}"}}}}"#
        ),
        _ => format!(r#"{{"token":{{"id":1,"text":"{text}"}},"generated_text":null}}"#),
    };
    let end = ["\n\n", "\r\n\r\n", "\r\r"][random.usize(..3)];
    format!("data: {data}{end}")
}

#[test]
fn what_leaves_of_a_guarded_stream_does_not_depend_on_how_it_is_split() {
    const PIECES: [&str; 16] = [
        "4111 ",
        "1111 1111",
        " 1111",
        "41",
        "geheim",
        "\u{4e2d}",
        "\u{1f600}",
        " b",
        "abort ",
        "now",
        "abc1",
        "\"",
        "{\"a\":",
        "1}",
        " ",
        "x, ",
    ];
    use Operation::{Chat, Completions, Generate, Messages, Responses};
    let rails = RULES.map(rails);
    let seeds: Vec<String> = [Chat, Completions, Responses, Messages, Generate]
        .into_iter()
        .map(|operation| PIECES.map(|piece| event(operation, piece, &mut fastrand::Rng::with_seed(7))).concat())
        .collect();
    let seeds: Vec<&[u8]> = seeds.iter().map(String::as_bytes).collect();
    let (edited, stopped) = (AtomicUsize::new(0), AtomicUsize::new(0));
    fuzz(3_000, &seeds, |bytes, random| {
        let operation = [Chat, Completions, Responses, Messages, Generate][random.usize(..5)];
        let body = match random.bool() {
            true => bytes.to_vec(),
            false => {
                let count = random.usize(1..12);
                let said: Vec<&str> = (0..count).map(|_| PIECES[random.usize(..PIECES.len())]).collect();
                said.iter().map(|text| event(operation, text, random)).collect::<String>().into_bytes()
            }
        };
        let rails = &rails[random.usize(..rails.len())];
        let whole = guarded(rails, operation, &[&body]);
        let (mut pieces, mut at) = (Vec::new(), 0);
        while at < body.len() {
            let end = at + random.usize(1..=(body.len() - at).min(40));
            pieces.push(&body[at..end]);
            at = end;
        }
        edited.fetch_add(usize::from(whole.0.as_bytes() != body), Relaxed);
        stopped.fetch_add(usize::from(whole.1.is_some()), Relaxed);
        assert_eq!(guarded(rails, operation, &pieces), whole);
    });
    let counts = (edited.into_inner(), stopped.into_inner());
    assert!(counts.0 > 100 && counts.1 > 100, "enough of them are changed and ended: {counts:?}");
}
