//! What it costs to know who asks, to hold them to what they may use, and to settle that: one request with a key, four
//! limits and a budget, in nanoseconds and allocations.

use std::hint::black_box;
use std::time::SystemTime;

use criterion::{Criterion, criterion_group, criterion_main};
use infergate::identity;
use infergate::limits::effort::Work;
use infergate::limits::{Costs, Counted, Outcome, Used, millis};
use infergate::money::Cached;
use infergate::policy::{Policy, World, compile};
use infergate::settings::Settings;
use infergate::state::State;
use infergate::telemetry::Telemetry;
use infergate::usage::Usage;
use infergate_plugins::authenticator::Credentials;
use infergate_plugins::authenticator::keys::Fresh;
use infergate_plugins::secret::Secret;

const PEPPER: &str = "a pepper of thirty-two characters";

/// A policy under which this key may ask, with room for as many requests as a bench makes.
fn policy(key: &Fresh, state: &State) -> Policy {
    let (prefix, hash) = (key.prefix(), key.hash(&Secret::new(PEPPER)));
    let text = format!(
        "version: 1
models: [{{name: m, pool: p}}]
pools: {{p: {{upstreams: [{{url: 'http://127.0.0.1:1'}}]}}}}
tenants: {{t: {{}}}}
authenticators: [{{keys: {{pepper: {{env: PEPPER}}, list: [{{tenant: t, prefix: {prefix}, hash: '{hash}'}}]}}}}]
prices: {{list: [{{models: ['*'], input: 0.001, output: 0.002}}]}}
limits:
  - {{requests: 1000000000000, per: 1m}}
  - {{each: [key], tokens: 1000000000000, per: 1m}}
  - {{each: [tenant, model], output_tokens: 1000000000000, per: 1h}}
  - {{concurrency: 1000}}
  - {{name: budget, each: [tenant], usd: 1000000, per: month}}
"
    );
    let (telemetry, settings) = (Telemetry::new(), Settings::default());
    let env = |_: &str| Some(PEPPER.to_owned());
    match compile(&text, &World::new(&env, state, &telemetry, &settings)) {
        Ok(policy) => policy,
        Err(problems) => panic!("{:?}", problems.lines("bench")),
    }
}

/// Everything of a request that is about who asks and how much: they are identified, what they may use is reserved,
/// what they used is settled.
fn admitted(policy: &Policy, state: &State, headers: &http::HeaderMap) -> u64 {
    let now = SystemTime::now();
    let Some(chain) = &policy.authenticators else { return 0 };
    let Ok(who) = identity::ask(chain, &Credentials::of(black_box(headers)), now).1 else { return 0 };
    let price = policy.prices.as_ref().and_then(|book| book.find("m", "p", "vllm", now));
    let counted = Counted {
        tenant: Some(&who.tenant),
        key: Some(&who.principal),
        plans: &who.plans,
        model: "m",
        surface: "/v1/chat/completions",
        user: None,
        input: 400,
        output: 200,
        cost: Costs {
            prices: price.map(std::slice::from_ref).unwrap_or_default(),
            cached: Cached::Within,
            besides: Usage::default(),
            work: Work::default(),
        },
        before: Used::default(),
        held: None,
        now: millis(now),
    };
    let Some(Outcome::Reserved(mut reservation)) = state.limits.reserve(policy.limits.iter(), &counted) else {
        return 0;
    };
    reservation.settle(&Used { asked: true, input: 380, output: 120, nanousd: 620 }, counted.now);
    reservation.output
}

fn admission(criterion: &mut Criterion) {
    let chance = |bytes: &mut [u8]| {
        bytes.iter_mut().for_each(|byte| *byte = fastrand::u8(..));
        Ok(())
    };
    let Ok(key) = Fresh::make(chance) else { panic!("no key") };
    let state = State::new(0);
    let policy = policy(&key, &state);
    let value = format!("Bearer {}", key.key().reveal()).parse().unwrap_or(http::HeaderValue::from_static(""));
    let headers: http::HeaderMap = [(http::header::AUTHORIZATION, value)].into_iter().collect();
    assert_eq!(admitted(&policy, &state, &headers), 200, "it is admitted");
    let allocated = allocation_counter::measure(|| _ = admitted(&policy, &state, &headers));
    println!("admission: {} allocations of {} bytes", allocated.count_total, allocated.bytes_total);
    criterion.bench_function("a key, four limits, a budget and their settlement", |bencher| {
        bencher.iter(|| admitted(&policy, &state, &headers));
    });
}

criterion_group!(benches, admission);
criterion_main!(benches);
