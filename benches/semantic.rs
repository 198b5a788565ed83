//! What the semantic layer costs a prompt: reading it, telling routes and attacks, counting, training.

use std::hint::black_box;
use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use infergate_plugins::prompt::{Prompt, Role, Span};
use infergate_plugins::router::signals::Signals;
use infergate_plugins::router::{self, Config};
use infergate_plugins::semantic::{Embedding, Examples, Heads, Injection, prepare};

/// A sentence of about ten tokens, another for each number, so that the table is not read from the first cache alone.
fn sentence(n: usize) -> String {
    const WHO: [&str; 7] =
        ["The engineer", "My neighbour", "A student", "The committee", "Her lawyer", "Nobody", "The gardener"];
    const DOES: [&str; 11] = [
        "explained",
        "postponed",
        "translated",
        "compared",
        "refused",
        "measured",
        "painted",
        "repaired",
        "predicted",
        "summarised",
        "delivered",
    ];
    const WHAT: [&str; 13] = [
        "the annual report",
        "an old bicycle",
        "two contracts",
        "the weather forecast",
        "a recursive function",
        "three invoices",
        "the kitchen wall",
        "a poem about rivers",
        "the database schema",
        "an insurance claim",
        "the chemistry lesson",
        "a train timetable",
        "the tax return",
    ];
    format!("{} {} {} on day {n}. ", WHO[n % 7], DOES[n % 11], WHAT[n % 13])
}

fn prompt(tokens: usize) -> String {
    (0..tokens.div_ceil(10)).map(sentence).collect()
}

/// Routes and their examples; those of one route are about the same thing.
fn routes(count: usize, examples: usize) -> Vec<(String, Vec<String>)> {
    let texts = |route: usize| (0..examples).map(|n| sentence(route * 13 * 7 * 11 / count.max(1) + 13 * n)).collect();
    (0..count).map(|route| (format!("route-{route}"), texts(route))).collect()
}

fn heads(routes: &[(String, Vec<String>)]) -> Heads {
    Examples::train(routes.iter().map(|(name, texts)| (name.as_str(), texts.iter().collect())))
}

fn prompts(criterion: &mut Criterion) {
    prepare();
    let few = heads(&routes(10, 20));
    for tokens in [20, 200, 512, 2_000, 8_000] {
        let text = prompt(tokens);
        let spans = [Span { role: Role::User, turn: 0, text: &text }];
        let whole = Prompt { spans: &spans, ..Prompt::default() };
        let mut group = criterion.benchmark_group(format!("{tokens} tokens"));
        group.bench_function("embed", |bencher| bencher.iter(|| Embedding::of(black_box(&text))));
        group.bench_function("embed and tell 10 routes", |bencher| {
            bencher.iter(|| few.classify(&Embedding::of(black_box(&text))).map(|class| class.score));
        });
        group.bench_function("injection", |bencher| bencher.iter(|| Injection::score(black_box(&text))));
        group.bench_function("signals", |bencher| bencher.iter(|| Signals::of(black_box(&whole))));
        group.finish();
    }
}

fn tells(criterion: &mut Criterion) {
    let text = Embedding::of("The engineer compared two contracts on the train.");
    let mut group = criterion.benchmark_group("tell");
    for (count, examples) in [(10, 20), (50, 20), (150, 20)] {
        let heads = heads(&routes(count, examples));
        group.bench_function(format!("{count} routes of {examples} examples"), |bencher| {
            bencher.iter(|| heads.classify(black_box(&text)).map(|class| class.score));
        });
    }
    group.finish();
}

fn routers(criterion: &mut Criterion) {
    let config = r#"[{"difficulty": {"weak": "w", "strong": "s"}},
        {"signals": {"model": "m", "code": true, "languages": ["en"], "words": ["invoice", "contract"]}},
        {"cel": {"model": "m", "when": "'gold' in plans && tokens > 4000 && code"}}]"#;
    let configs: Vec<Config> = serde_json::from_str(config).unwrap_or_default();
    let text = prompt(200);
    let spans = [Span { role: Role::User, turn: 0, text: &text }];
    let whole = Prompt { spans: &spans, ..Prompt::default() };
    let mut world = router::World {
        file: &mut |_| Err("there is none".to_owned()),
        secret: &mut |_| Err("there is none".to_owned()),
    };
    for built in router::build(&configs, &mut world).unwrap_or_default() {
        criterion.bench_function(&format!("ask {}, 200 tokens", built.router.kind()), |bencher| {
            bencher.iter(|| built.router.ask(black_box(&whole)));
        });
    }
}

fn training(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("train");
    group.sample_size(10).measurement_time(Duration::from_secs(2));
    for (count, examples) in [(5, 10), (10, 50)] {
        let routes = routes(count, examples);
        group.bench_function(format!("{count} routes of {examples} examples"), |bencher| {
            bencher.iter(|| heads(black_box(&routes)).least_likeness());
        });
    }
    group.finish();
}

criterion_group!(
    name = benches;
    config = Criterion::default().warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1));
    targets = prompts, tells, routers, training
);
criterion_main!(benches);
