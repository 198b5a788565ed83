//! Guardrails: a prompt at once, an answer event by event, and what is held back of it.

use std::hint::black_box;
use std::sync::Arc;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use infergate_plugins::guardrail::redact::Placeholders;
use infergate_plugins::guardrail::{self, Config, Place, Progress, Scanner, World};

const PROSE: &str = "The committee met again on Thursday, and nobody was surprised that the old questions came back \
    before the new ones had been answered. It is easy to say that a plan is simple; it's harder to show why each step \
    follows from the last. When the river rises in spring, the farmers on both banks move their animals to higher \
    ground and wait. \"We have seen worse,\" said one of them, though he did not sound certain. In general, a \
    well-written report explains what was done, what was found, and what remains unknown. Yet there are limits: no \
    amount of reading replaces practice, patience and an honest critic. After lunch the discussion turned to budgets, \
    schedules and the question of who should be responsible for the archive. A short silence followed. ";

/// What the shipped policy looks for.
const DEFAULT: &str = r#"[
    {"name":"pii","in":["answer.content"],"verdict":"redact","pii":{}},
    {"name":"keys","in":["answer.content"],"verdict":"redact","secrets":{}},
    {"name":"words","in":["answer.content"],"verdict":"block","words":{"list":["project kestrel","internal use only"]}}]"#;

fn scanner(json: &str) -> Arc<Scanner> {
    let mut world = World {
        file: &mut |_| Err("there is no file".to_owned()),
        secret: &mut |_| Err("there is no secret".to_owned()),
        key: b"key",
    };
    let configs: Result<Vec<Config>, _> = serde_json::from_str(json);
    let built = configs.map(|configs| guardrail::build(&configs, &mut world));
    match built.as_ref().map(|built| built.as_ref().map(|rules| rules.scanner(Place::AnswerContent))) {
        Ok(Ok(Some(scanner))) => Arc::clone(scanner),
        _ => panic!("{built:?}"),
    }
}

/// 150 rules of two phrases each and 100 of one expression each.
fn many() -> String {
    const STEMS: [&str; 10] =
        ["kestrel", "orion", "mercury", "falcon", "granite", "lantern", "meridian", "nimbus", "obsidian", "quartz"];
    let words = (0..150).map(|n| {
        let (a, b, c) = (STEMS[n % 10], STEMS[n / 15], STEMS[n * 7 % 10]);
        format!(r#""words":{{"list":["project {a} {b}","{c}{n} initiative"]}}"#)
    });
    let expressions = (0..100).map(|n| {
        let stem = STEMS[n % 10];
        let expression = match n % 5 {
            0 => format!(r"(?i)\\b{stem}[- ]?\\d{{3,{}}}", 4 + n % 7),
            1 => format!(r"\\bTK{n}-[A-Z]{{2,5}}-\\d{{1,6}}\\b"),
            2 => format!(r"(?i)internal {} memo \\w{{2,12}}", STEMS[n / 10]),
            3 => format!(r"\\b[A-Z]{{2}}{n}\\d{{4,8}}\\b"),
            _ => format!(r"x{n}_[a-z]{{3,9}}@{stem}"),
        };
        format!(r#""regex":{{"list":["{expression}"]}}"#)
    });
    let rule = |(n, kind)| format!(r#"{{"name":"r{n}","in":["answer.content"],"verdict":"redact",{kind}}}"#);
    format!("[{}]", words.chain(expressions).enumerate().map(rule).collect::<Vec<_>>().join(","))
}

/// Lines of a log: about every second sign is a digit.
fn digits(bytes: usize) -> String {
    let mut state = 12_345u64;
    let mut next = |below: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    let mut text = String::new();
    while text.len() < bytes {
        let (day, hour, ms) = (next(28) + 1, next(24), next(1000));
        let (took, rows, id, status) = (next(5000), next(1_000_000), next(100_000), next(600));
        text +=
            &format!("2026-11-{day:02} {hour:02}:17:31.{ms:03} took {took} ms, {rows} rows; id={id} status={status}\n");
    }
    text.truncate(bytes);
    text
}

fn prose(bytes: usize) -> String {
    let mut text = PROSE.repeat(bytes / PROSE.len() + 1);
    text.truncate(bytes);
    text
}

fn whole(criterion: &mut Criterion) {
    let many = many();
    for (rules, json) in [("default", DEFAULT), ("250 rules", many.as_str())] {
        let scanner = scanner(json);
        let mut group = criterion.benchmark_group(format!("judge, {rules}"));
        for (kind, text) in [("prose", prose(102_400)), ("digits", digits(102_400))] {
            for kib in [1, 10, 100] {
                let text = &text[..kib << 10];
                group.throughput(Throughput::Bytes(text.len() as u64));
                group.bench_function(format!("{kind}, {kib} KiB"), |bencher| {
                    bencher.iter(|| scanner.judge(black_box(text), &mut Placeholders::default()).found.len());
                });
            }
        }
        group.finish();
    }
}

/// Pieces of two to eight bytes, as tokens are.
fn pieces(text: &str) -> Vec<&str> {
    let (mut pieces, mut at, mut size) = (Vec::new(), 0, 7);
    while at < text.len() {
        size = (size * 31 + 11) % 7;
        let end = (at + 2 + size).min(text.len());
        pieces.push(&text[at..end]);
        at = end;
    }
    pieces
}

/// All of an answer, event by event: what is held back after each.
fn answer(scanner: &Arc<Scanner>, pieces: &[&str], mut held: impl FnMut(u64)) {
    let (mut stream, mut placeholders) = (scanner.stream(), Placeholders::default());
    let mut progress = Progress::default();
    for piece in pieces {
        stream.push(black_box(piece), &mut placeholders, &mut progress);
        held(stream.held());
    }
    stream.finish(&mut placeholders, &mut progress);
}

fn events(criterion: &mut Criterion) {
    let many = many();
    let mut group = criterion.benchmark_group("an answer's events");
    for (rules, json) in [("default", DEFAULT), ("250 rules", many.as_str())] {
        let scanner = scanner(json);
        for (kind, text) in [("prose", prose(20_000)), ("digits", digits(20_000))] {
            let pieces = pieces(&text);
            let mut held = Vec::new();
            answer(&scanner, &pieces, |bytes| held.push(bytes));
            held.sort_unstable();
            let at = |percent: usize| held[(held.len() - 1) * percent / 100];
            println!("{rules}, {kind}: held back p50 {} p99 {} most {} bytes", at(50), at(99), at(100));
            group.throughput(Throughput::Elements(pieces.len() as u64));
            group.bench_function(format!("{rules}, {kind}"), |bencher| {
                bencher.iter(|| answer(&scanner, &pieces, |_| ()));
            });
        }
    }
    group.finish();
}

criterion_group!(benches, whole, events);
criterion_main!(benches);
