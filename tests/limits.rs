//! Limits: what may be used is reserved before anybody is asked, holds while tokens flow, and comes back whatever
//! becomes of the request.

use std::time::Duration;

use bytes::Bytes;
use infergate::limits::effort::Work;
use infergate::limits::{Costs, Counted, Outcome, Reservation, Used};
use infergate::money::Cached;
use infergate::policy::{World, compile};
use infergate::settings::Settings;
use infergate::state::State;
use infergate::telemetry::Telemetry;
use infergate::usage::Usage;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::support::keys::{asks_for, key, start};
use crate::support::requests::{STREAMING, every_surface, passed_on, policy_for_every_surface, request};
use crate::support::wire::{EVENTS, Framing, Step, Wire};
use crate::support::{Answer, Client, Gateway, Journal, chat, events, faulty_server, model_server, policy};

const CHAT: &str = "/v1/chat/completions";
/// A token of a prompt costs a micro-dollar, one of an answer ten.
const PRICES: &str = "prices: {list: [{models: ['*'], input: 1, output: 10}]}\n";

fn limited(url: &str, limits: &str) -> String {
    format!("{}limits:\n{limits}\n", policy(&[url], ""))
}

async fn ask(gateway: &Gateway, body: impl Into<Bytes>) -> Answer {
    Client::h1().post(gateway.address, CHAT, body).await
}

/// Nothing is reserved any more.
async fn all_is_given_back(gateway: &Gateway) {
    gateway.comes_to("infergate_limit_reserved", 0.0).await;
}

async fn left(gateway: &Gateway, limit: &str) -> u64 {
    let told = gateway.admin("/admin/v1/limits").await.json();
    let limit = told["limits"].as_array().unwrap().iter().find(|entry| entry["limit"] == limit).unwrap().clone();
    limit["levels"][0]["left"].as_u64().unwrap_or(limit["max"].as_u64().unwrap())
}

#[tokio::test]
async fn the_request_beyond_a_limit_is_refused_in_its_dialect_and_told_when_to_come_back() {
    let server = model_server().await;
    let gateway = Gateway::start(&limited(&server.url(), "  - {requests: 2, per: 1h}")).await;
    for client in Client::both() {
        let gateway = Gateway::start(&limited(&server.url(), "  - {requests: 2, per: 1h}")).await;
        for remaining in ["1", "0"] {
            let answer = client.post(gateway.address, CHAT, chat(false, 2)).await;
            assert_eq!(answer.status, 200);
            assert_eq!(answer.header("x-ratelimit-limit-requests"), "2");
            assert_eq!(answer.header("x-ratelimit-remaining-requests"), remaining);
            assert!(answer.header("x-ratelimit-reset-requests").ends_with('s'));
        }
        let refused = client.post(gateway.address, CHAT, chat(false, 2)).await;
        assert_eq!((refused.status, refused.code().as_str()), (429, "rate_limit_exceeded"));
        assert_eq!(refused.header("x-should-retry"), "true");
        assert_eq!(refused.header("x-ratelimit-remaining-requests"), "0");
        let seconds: u64 = refused.header("retry-after").parse().unwrap();
        assert!((1..=7200).contains(&seconds), "{seconds}");
    }
    let messages = r#"{"model":"m","max_tokens":2,"messages":[{"role":"user","content":"Hello"}]}"#;
    let client = Client::h1();
    let post = || client.post(gateway.address, "/v1/messages", messages);
    assert_eq!(post().await.header("anthropic-ratelimit-requests-remaining"), "1");
    post().await;
    let refused = post().await;
    assert_eq!((refused.status, &refused.json()["error"]["type"]), (429, &json!("rate_limit_error")));
    assert!(refused.header("anthropic-ratelimit-requests-reset").ends_with('Z'));
}

#[tokio::test]
async fn a_spent_budget_is_no_invitation_to_try_again() {
    let server = model_server().await;
    let text = format!("{}{PRICES}", limited(&server.url(), "  - {name: pocket, usd: 0.0005, per: month}"));
    let gateway = Gateway::start(&text).await;
    let mut answers = Vec::new();
    for _ in 0..20 {
        answers.push(ask(&gateway, chat(false, 5)).await);
    }
    let refused: Vec<_> = answers.iter().filter(|answer| answer.status == 429).collect();
    assert!(!refused.is_empty() && refused.len() < 19, "{}", refused.len());
    for answer in &refused {
        assert_eq!((answer.code().as_str(), answer.header("x-should-retry")), ("insufficient_quota", "false"));
        assert_eq!(answer.json()["error"]["type"], "insufficient_quota");
        assert!(answer.text().contains("pocket"), "{}", answer.text());
    }
    let records = Journal::settled(&gateway).await.of_kind("request");
    let cost: u64 = records.iter().filter_map(|record| record["cost"]["nanousd"].as_u64()).sum();
    assert!(cost <= 500_000, "{cost} nano-dollars of a budget of 500,000");
    assert_eq!(left(&gateway, "pocket").await, 500_000 - cost, "the level is the sum of the records");
}

#[tokio::test]
async fn nothing_allows_nothing_and_no_limit_allows_everything() {
    let server = model_server().await;
    for unit in ["requests", "input_tokens", "output_tokens", "tokens", "usd"] {
        let text = format!("{}{PRICES}", limited(&server.url(), &format!("  - {{{unit}: 0, per: 1m}}")));
        let gateway = Gateway::start(&text).await;
        let refused = ask(&gateway, chat(false, 2)).await;
        assert_eq!((refused.status, refused.code().as_str()), (429, "request_exceeds_limit"), "{unit}");
        assert_eq!(refused.header("x-should-retry"), "false");
        assert_eq!(
            gateway.metric("infergate_attempts_total{pool=\"p\",upstream=\"127.0.0.1\",result=\"answered\"}").await,
            0.0
        );
    }
    let gateway = Gateway::start(&limited(&server.url(), "  - {concurrency: 0}")).await;
    assert_eq!(ask(&gateway, chat(false, 2)).await.status, 429);
    let gateway = Gateway::start(&policy(&[&server.url()], "")).await;
    for _ in 0..50 {
        assert_eq!(ask(&gateway, chat(false, 2)).await.status, 200);
    }
}

#[tokio::test]
async fn an_answer_is_bounded_to_what_is_left_and_every_other_byte_goes_as_it_came() {
    let wire = Wire::start(|_| Framing::Length.answer("application/json", &Bytes::from_static(b"{}"), 64)).await;
    let gateway = Gateway::start(&limited(&wire.url(), "  - {output_tokens: 100, per: 1h}")).await;
    let cases = [
        (r#"{"model":"m", "max_tokens" : 900,"x":1.00}"#, r#"{"model":"m", "max_tokens" : 100,"x":1.00}"#),
        (r#"{"model":"m", "max_tokens" : 90,"x":1.00}"#, r#"{"model":"m", "max_tokens" : 90,"x":1.00}"#),
        (r#"{"model":"m"}"#, r#"{"max_tokens":100,"model":"m"}"#),
        (r#"{"model":"m","n":4,"max_tokens":99}"#, r#"{"model":"m","n":4,"max_tokens":25}"#),
    ];
    for (came, goes) in cases {
        // What the server says that it used is nothing, as it says nothing; the next one has all of it again.
        let gateway = Gateway::start(&limited(&wire.url(), "  - {output_tokens: 100, per: 1h}")).await;
        ask(&gateway, came).await;
        assert_eq!(String::from_utf8_lossy(&wire.heard().last().unwrap().body), goes);
    }
    let wrong = ask(&gateway, r#"{"model":"m","max_tokens":"many"}"#).await;
    assert_eq!((wrong.status, wrong.code().as_str()), (400, "invalid_body"));
    assert_eq!(wrong.json()["error"]["param"], "max_tokens");
}

#[tokio::test]
async fn a_limit_on_tokens_leaves_a_body_alone_that_keeps_within_it() {
    let wire = Wire::start(|_| Framing::Length.answer("application/json", &Bytes::from_static(b"{}"), 64)).await;
    let gateway =
        Gateway::start(&limited(&wire.url(), "  - {tokens: 100000, per: 1h}\n  - {requests: 9, per: 1h}")).await;
    let body = chat(false, 9);
    ask(&gateway, body.clone()).await;
    assert_eq!(wire.heard()[0].body, body.as_bytes());
}

/// A model server that streams `count` tokens, one an event, whatever is asked of it.
pub async fn deaf_server(count: usize) -> Wire {
    Wire::start(move |_| {
        let mut steps = vec![Step::Say(Framing::Chunked.head(EVENTS, 0))];
        let first = "data: {\"id\":\"c-7\",\"object\":\"chat.completion.chunk\",\"created\":5,\"model\":\"m\",\"choices\":[{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"\"}}]}\n\n";
        steps.push(Step::Say(Framing::Chunked.piece(first.as_bytes())));
        for _ in 0..count {
            let event = "data: {\"id\":\"c-7\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\"the \"}}]}\n\n";
            steps.push(Step::Say(Framing::Chunked.piece(event.as_bytes())));
            steps.push(Step::Pause(Duration::from_millis(1)));
        }
        steps.push(Step::Say(Framing::Chunked.piece(b"data: [DONE]\n\n")));
        steps.extend(Framing::Chunked.end());
        steps
    })
    .await
}

#[tokio::test]
async fn a_stream_that_does_not_keep_to_its_bound_ends_at_the_line_as_answers_end_that_are_too_long() {
    let wire = deaf_server(400).await;
    let gateway = Gateway::start(&limited(&wire.url(), "  - {output_tokens: 50, per: 1h}")).await;
    for client in Client::both() {
        let gateway = Gateway::start(&limited(&wire.url(), "  - {output_tokens: 50, per: 1h}")).await;
        let answer = client.post(gateway.address, CHAT, chat(true, 500)).await;
        assert_eq!((answer.status, answer.whole), (200, true));
        let told = events(&answer.body);
        let last: Value = serde_json::from_str(&told[told.len() - 2]).unwrap();
        assert_eq!((&last["choices"][0]["finish_reason"], &last["id"]), (&json!("length"), &json!("c-7")));
        assert_eq!(told.last().unwrap(), "[DONE]");
        let tokens = told.iter().filter(|event| event.contains("\"content\":\"t")).count();
        assert!((48..=53).contains(&tokens), "{tokens} of 50");
        let record = Journal::settled(&gateway).await.of_kind("request").remove(0);
        assert_eq!(record["outcome"], "limit_cut");
        assert_eq!(record["limits"][0]["limit"], "output_tokens/1h");
        assert!(record["usage"]["output_tokens"].as_u64().unwrap() <= 53, "{record:#}");
        all_is_given_back(&gateway).await;
    }
    crate::support::eventually("the upstream is told", Duration::from_secs(5), || async { wire.gone() == 2 }).await;
    drop(gateway);
    let finish = limited(&wire.url(), "  - {output_tokens: 50, per: 1h, on_limit: finish}");
    let gateway = Gateway::start(&finish).await;
    let answer = ask(&gateway, chat(true, 500)).await;
    assert_eq!(answer.text().matches("\"content\":\"t").count(), 400, "policy lets it finish");
    assert_eq!(left(&gateway, "output_tokens/1h").await, 0);
    gateway.comes_to("infergate_limit_overshoot_total{limit=\"output_tokens/1h\"}", 351.0).await;
}

#[tokio::test]
async fn two_hundred_callers_at_once_never_take_more_than_there_is() {
    let server = faulty_server(&[]).await;
    // Fifteen tokens, as the model server counts them, are well above the estimate's mean at first.
    let text = format!(
        "{}{PRICES}",
        limited(&server.url(), "  - {name: b, usd: 0.002, per: day, on_short: refuse}\n  - {concurrency: 50}")
    );
    let gateway = Gateway::start(&text).await;
    let mut running = JoinSet::new();
    for _ in 0..200 {
        let address = gateway.address;
        running.spawn(async move { Client::h1().post(address, CHAT, chat(false, 10)).await.status });
    }
    while let Some(done) = running.join_next().await {
        assert!([200, 429].contains(&done.unwrap()));
    }
    all_is_given_back(&gateway).await;
    let records = Journal::settled(&gateway).await.of_kind("request");
    let cost: u64 = records.iter().filter_map(|record| record["cost"]["nanousd"].as_u64()).sum();
    assert!(cost <= 2_000_000, "{cost}");
    assert_eq!(left(&gateway, "b").await, 2_000_000 - cost);
}

#[tokio::test]
async fn mixed_fates_on_every_surface_leave_nothing_reserved() {
    let server = every_surface().await;
    let limits = "limits:\n  - {concurrency: 64}\n  - {tokens: 100000000, per: 1h}\n  - {requests: 1000000, per: 1h}\n  - {usd: 1000, per: day}\n";
    let prices =
        "prices: {list: [{models: ['*'], input: 1, output: 10, image: 0.01, audio_second: 0.0001, request: 0.001}]}\n";
    let text = policy_for_every_surface(&server.url(), "", "", &format!("{limits}{prices}"));
    let gateway = Gateway::start(&text).await;
    let faults = ["", "status=500", "status=429", "reset", "cut", "status=400"];
    let mut count = 0;
    for row in passed_on() {
        for (index, fault) in faults.iter().enumerate() {
            let stream = STREAMING.contains(&row.path) && index % 2 == 0;
            let answer = Client::h1().try_send(request(&gateway, row.path, stream, "f", fault)).await;
            drop(answer);
            count += 1;
        }
        // The client leaves before it has the answer.
        let asked = request(&gateway, row.path, STREAMING.contains(&row.path), "g", "slow-first=100");
        let client = Client::h1();
        let leaves = client.try_send(asked);
        let _ = tokio::time::timeout(Duration::from_millis(10), leaves).await;
        count += 1;
    }
    all_is_given_back(&gateway).await;
    assert!(count > 100, "{count}");
    let told = gateway.admin("/admin/v1/limits").await.json();
    assert_eq!(told["reserved"], 0, "{told:#}");
    assert_eq!(told["limits"][0]["levels"][0]["left"], 64);
}

#[tokio::test]
async fn every_unit_holds_on_every_surface() {
    let server = every_surface().await;
    let prices =
        "prices: {list: [{models: ['*'], input: 1, output: 10, image: 0.01, audio_second: 0.0001, request: 0.001}]}\n";
    for limit in ["{requests: 0, per: 1m}", "{concurrency: 0}", "{usd: 0, per: 1m}"] {
        let text = policy_for_every_surface(&server.url(), "", "", &format!("limits: [{limit}]\n{prices}"));
        let gateway = Gateway::start(&text).await;
        for row in passed_on() {
            let answer = Client::h1().send(request(&gateway, row.path, false, "r", "")).await;
            assert_eq!(answer.status, 429, "{} under {limit}: {}", row.path, answer.text());
        }
    }
}

#[tokio::test]
async fn a_slot_is_free_before_the_client_has_the_last_byte() {
    let server = model_server().await;
    let gateway = Gateway::start(&limited(&server.url(), "  - {concurrency: 1}")).await;
    for client in Client::both() {
        for round in 0..200 {
            let answer = client.post(gateway.address, CHAT, chat(round % 2 == 0, 3)).await;
            assert_eq!(answer.status, 200, "round {round}: {}", answer.text());
        }
    }
}

#[tokio::test]
async fn the_limits_of_every_tenant_above_hold_and_each_key_has_its_own() {
    let server = model_server().await;
    let (one, other) = (key("low", ""), key("low", ""));
    let tenants =
        "{top: {limits: [{requests: 5, per: 1h}]}, low: {parent: top, limits: [{each: [key], requests: 3, per: 1h}]}}";
    let gateway = start(&format!("{}{}", policy(&[&server.url()], ""), asks_for(&[&one, &other], tenants)), "").await;
    let mut statuses = Vec::new();
    for key in [&one, &one, &one, &one, &other, &other, &other] {
        let bearer = format!("Bearer {}", key.text);
        let answer = Client::h1().post_with(gateway.address, CHAT, &[("authorization", &bearer)], chat(false, 2)).await;
        statuses.push(answer.status);
    }
    assert_eq!(statuses, [200, 200, 200, 429, 200, 200, 429]);
    let told = gateway.admin("/admin/v1/limits").await.json();
    let levels: Vec<_> =
        told["limits"].as_array().unwrap().iter().map(|limit| limit["levels"].as_array().unwrap().len()).collect();
    assert_eq!(levels.iter().sum::<usize>(), 3, "{told:#}");
}

#[tokio::test]
async fn a_user_is_counted_by_the_body_or_by_the_header_that_the_policy_names() {
    let server = model_server().await;
    let limit = "  - {each: [user], requests: 1, per: 1h}\n";
    let of = |user: &str| chat(false, 2).replace("\"stream\"", &format!("\"user\":\"{user}\",\"stream\""));
    let gateway = Gateway::start(&limited(&server.url(), limit)).await;
    let mut statuses = Vec::new();
    for body in [of("a"), of("b"), of("\\u0061"), chat(false, 2), chat(false, 2)] {
        statuses.push(ask(&gateway, body).await.status);
    }
    assert_eq!(statuses, [200, 200, 429, 200, 429], "nobody is one user too");
    let text = format!("{}requests: {{user_header: x-user}}\n", limited(&server.url(), limit));
    let gateway = Gateway::start(&text).await;
    let mut statuses = Vec::new();
    for user in ["a", "b", "a"] {
        let answer = Client::h1().post_with(gateway.address, CHAT, &[("x-user", user)], of("same")).await;
        statuses.push(answer.status);
    }
    assert_eq!(statuses, [200, 200, 429]);
}

#[tokio::test]
async fn another_model_answers_where_a_budget_is_spent() {
    let wire = Wire::start(|_| Framing::Length.answer("application/json", &Bytes::from_static(b"{}"), 64)).await;
    let text = format!(
        "version: 1\nmodels:\n  - {{name: big, pool: p}}\n  - {{name: small, pool: p}}\npools:\n  p: {{upstreams: [{{url: '{}'}}]}}\nlimits:\n  - {{models: [big], requests: 1, per: day, on_exhausted: {{use: small}}}}\n",
        wire.url()
    );
    let gateway = Gateway::start(&text).await;
    let body = chat(false, 2).replace("\"m\"", "\"big\"");
    for expected in ["big", "small"] {
        let answer = ask(&gateway, body.clone()).await;
        assert_eq!((answer.status, answer.header("x-infergate-model")), (200, expected));
        let heard = String::from_utf8_lossy(&wire.heard().last().unwrap().body).into_owned();
        assert_eq!(heard, body.replace("\"big\"", &format!("\"{expected}\"")));
    }
    let records = Journal::settled(&gateway).await.of_kind("request");
    assert_eq!((&records[1]["model"]["asked"], &records[1]["model"]["used"]), (&json!("big"), &json!("small")));
}

#[tokio::test]
async fn a_request_waits_for_room_where_the_policy_lets_it() {
    let server = faulty_server(&["slow-first=150"]).await;
    let limit = "  - {concurrency: 1, on_exhausted: {wait_ms: 5000}}\n";
    let gateway = Gateway::start(&limited(&server.url(), limit)).await;
    let mut running = JoinSet::new();
    for _ in 0..4 {
        let address = gateway.address;
        running.spawn(async move { Client::h1().post(address, CHAT, chat(false, 2)).await.status });
    }
    while let Some(done) = running.join_next().await {
        assert_eq!(done.unwrap(), 200);
    }
}

#[tokio::test]
async fn a_model_without_a_price_has_no_way_around_a_budget_unless_the_policy_says_so() {
    let server = model_server().await;
    let priced = "prices: {list: [{models: [other], input: 1, output: 10}]}\n";
    let gateway = Gateway::start(&format!("{}{priced}", limited(&server.url(), "  - {usd: 1, per: day}"))).await;
    let refused = ask(&gateway, chat(false, 2)).await;
    assert_eq!((refused.status, refused.code().as_str()), (403, "model_unpriced"));
    let allowed = "  - {usd: 1, per: day, on_unpriced: allow}";
    let gateway = Gateway::start(&format!("{}{priced}", limited(&server.url(), allowed))).await;
    assert_eq!(ask(&gateway, chat(false, 2)).await.status, 200);
    let record = Journal::settled(&gateway).await.of_kind("request").remove(0);
    assert_eq!(record["unpriced"], true);
}

#[tokio::test]
async fn a_reload_takes_nothing_back_and_a_changed_amount_holds_at_once() {
    let server = model_server().await;
    let of = |amount: u32| limited(&server.url(), &format!("  - {{requests: {amount}, per: 1h}}"));
    let gateway = Gateway::start(&of(2)).await;
    for _ in 0..2 {
        assert_eq!(ask(&gateway, chat(false, 2)).await.status, 200);
    }
    assert_eq!(gateway.reload(&of(3)).await.status, 200);
    assert_eq!(ask(&gateway, chat(false, 2)).await.status, 200);
    assert_eq!(ask(&gateway, chat(false, 2)).await.status, 429);
}

#[tokio::test]
async fn a_tenants_answers_are_never_longer_than_it_may_have() {
    let wire = Wire::start(|_| Framing::Length.answer("application/json", &Bytes::from_static(b"{}"), 64)).await;
    let one = key("low", "");
    let tenants = "{top: {output_tokens_max: 10}, low: {parent: top, output_tokens_max: 20}}";
    let gateway = start(&format!("{}{}", policy(&[&wire.url()], ""), asks_for(&[&one], tenants)), "").await;
    let bearer = format!("Bearer {}", one.text);
    for (came, goes) in [(chat(false, 50), chat(false, 10)), (chat(false, 5), chat(false, 5))] {
        Client::h1().post_with(gateway.address, CHAT, &[("authorization", &bearer)], came).await;
        assert_eq!(String::from_utf8_lossy(&wire.heard().last().unwrap().body), goes);
    }
}

#[tokio::test]
async fn a_budget_outlives_a_killed_process_and_one_that_is_new_knows_what_was_spent() {
    let server = model_server().await;
    let journal = tempfile::tempdir().unwrap();
    let env = [("INFERGATE_JOURNAL", journal.path().to_str().unwrap())];
    let text = format!("{}{PRICES}", limited(&server.url(), "  - {name: pocket, usd: 1, per: month}"));
    let spent = async |gateway: &Gateway| -> u64 {
        let records = Journal(journal.path().to_owned()).of_kind("request");
        let cost = records.iter().filter_map(|record| record["cost"]["nanousd"].as_u64()).sum();
        assert_eq!(left(gateway, "pocket").await, 1_000_000_000 - cost);
        cost
    };
    let mut gateway = Gateway::spawn(&text, "threads: 1\n", &[], &env);
    gateway.ready().await;
    for _ in 0..5 {
        assert_eq!(ask(&gateway, chat(false, 7)).await.status, 200);
    }
    gateway.comes_to("infergate_requests_in_flight", 0.0).await;
    gateway.admin("/admin/v1/requests/00000000-0000-7000-8000-000000000000").await;
    let before = spent(&gateway).await;
    assert!(before > 0);
    gateway.signal("KILL");
    gateway.ended(Duration::from_secs(5)).await;
    let gateway = Gateway::spawn(&text, "threads: 1\n", &[], &env);
    gateway.ready().await;
    assert_eq!(spent(&gateway).await, before);
    let more = format!("{text}  - {{name: purse, usd: 2, per: day}}\n").replace(PRICES, "");
    assert_eq!(gateway.reload(&format!("{more}{PRICES}")).await.status, 200);
    crate::support::eventually("the new budget is restored", Duration::from_secs(10), || async {
        left(&gateway, "purse").await == 2_000_000_000 - before
    })
    .await;
}

#[tokio::test]
async fn of_two_budgets_that_are_spent_the_one_counts_that_names_another_model() {
    let wire = Wire::start(|_| {
        let answer = Bytes::from_static(b"{\"usage\":{\"prompt_tokens\":1,\"completion_tokens\":2}}");
        Framing::Length.answer("application/json", &answer, 64)
    })
    .await;
    let text = format!(
        "version: 1\nmodels:\n  - {{name: big, pool: p}}\n  - {{name: small, pool: p}}\npools:\n  p: {{upstreams: [{{url: '{}'}}]}}\nprices: {{list: [{{models: [big], input: 1, output: 1000}}, {{models: [small], input: 1, output: 1}}]}}\nlimits:\n  - {{usd: 0.001, per: month}}\n  - {{models: [big], usd: 0.001, per: day, on_exhausted: {{use: small}}}}\n",
        wire.url()
    );
    let gateway = Gateway::start(&text).await;
    let answer = ask(&gateway, chat(false, 2).replace("\"m\"", "\"big\"")).await;
    assert_eq!((answer.status, answer.header("x-infergate-model")), (200, "small"), "{}", answer.text());
}

#[tokio::test]
async fn a_window_that_changes_begins_anew_and_nothing_tells_of_the_old_one() {
    let server = model_server().await;
    let of = |per: &str| limited(&server.url(), &format!("  - {{name: x, requests: 3, per: {per}}}"));
    let gateway = Gateway::start(&of("1h")).await;
    ask(&gateway, chat(false, 2)).await;
    assert_eq!(left(&gateway, "x").await, 2);
    assert_eq!(gateway.reload(&of("2h")).await.status, 200);
    assert_eq!(left(&gateway, "x").await, 3);
    gateway.comes_to("infergate_limit_left{limit=\"x\"}", 3.0).await;
}

#[tokio::test]
async fn of_several_limits_the_one_that_bounds_an_answer_is_counted() {
    let wire = Wire::start(|_| Framing::Length.answer("application/json", &Bytes::from_static(b"{}"), 64)).await;
    let limits = "  - {name: tight, output_tokens: 50, per: 1h}\n  - {name: wide, tokens: 100000, per: 1h}";
    let gateway = Gateway::start(&limited(&wire.url(), limits)).await;
    assert_eq!(ask(&gateway, chat(false, 500)).await.status, 200);
    let clamps =
        async |limit: &str| gateway.metric(&format!("infergate_limit_clamps_total{{limit=\"{limit}\"}}")).await;
    assert_eq!((clamps("tight").await, clamps("wide").await), (1.0, 0.0));
}

#[tokio::test]
async fn a_user_that_the_tenants_parameters_force_is_the_one_that_is_counted() {
    let server = model_server().await;
    let (one, other) = (key("low", ""), key("low", ""));
    let limit = "limits: [{each: [user], requests: 2, per: 1h}]\nrequests: {user_header: x-user}\n";
    let more = asks_for(&[&one, &other], "{low: {parameters: {user: caller}}}");
    let gateway = start(&format!("{}{limit}{more}", policy(&[&server.url()], "")), "").await;
    let mut statuses = Vec::new();
    for (key, user) in [(&one, "a"), (&one, "b"), (&one, "c"), (&other, "a")] {
        let body = chat(false, 2).replace("\"stream\"", &format!("\"user\":\"{user}\",\"stream\""));
        let headers = [("authorization", &*format!("Bearer {}", key.text)), ("x-user", user)];
        statuses.push(Client::h1().post_with(gateway.address, CHAT, &headers, body).await.status);
    }
    assert_eq!(statuses, [200, 200, 429, 200], "whatever name a request gives");
}

#[tokio::test]
async fn an_empty_body_that_two_rules_put_something_into_is_still_json() {
    let wire = Wire::start(|_| Framing::Length.answer("application/json", &Bytes::from_static(b"{}"), 64)).await;
    let one = key("low", "");
    let tenants = "{low: {output_tokens_max: 10, parameters: {user: me, defaults: {temperature: 1}}}}";
    let text = format!("{}default_model: m\n{}", policy(&[&wire.url()], ""), asks_for(&[&one], tenants));
    let gateway = start(&text, "").await;
    let bearer = format!("Bearer {}", one.text);
    Client::h1().post_with(gateway.address, CHAT, &[("authorization", &bearer)], "{}").await;
    let heard: Value = serde_json::from_slice(&wire.heard().last().unwrap().body).unwrap();
    assert_eq!(heard, json!({"user": "me", "temperature": 1, "max_tokens": 10}));
}

#[tokio::test]
async fn a_budget_of_requests_that_is_restored_counts_all_that_an_upstream_was_asked_for() {
    let (good, bad, journal) =
        (model_server().await, faulty_server(&["status=500"]).await, tempfile::tempdir().unwrap());
    let text = format!(
        "version: 1\nmodels: [{{name: m, pool: p}}, {{name: bad, pool: q}}]\npools:\n  p: {{upstreams: [{{url: '{}'}}]}}\n  q: {{upstreams: [{{url: '{}'}}]}}\nlimits: [{{name: calls, requests: 6, per: month}}]\n",
        good.url(),
        bad.url()
    );
    let env = [("INFERGATE_JOURNAL", journal.path().to_str().unwrap())];
    let mut gateway = Gateway::spawn(&text, "threads: 1\n", &[], &env);
    gateway.ready().await;
    for (model, status) in [("m", 200), ("bad", 500), ("bad", 500), ("nothing", 404), ("m", 200)] {
        assert_eq!(ask(&gateway, chat(false, 2).replace("\"m\"", &format!("\"{model}\""))).await.status, status);
    }
    assert_eq!(left(&gateway, "calls").await, 2);
    gateway.admin("/admin/v1/requests/00000000-0000-7000-8000-000000000000").await;
    gateway.signal("KILL");
    gateway.ended(Duration::from_secs(5)).await;
    let gateway = Gateway::spawn(&text, "threads: 1\n", &[], &env);
    gateway.ready().await;
    let restored = async || left(&gateway, "calls").await == 2;
    crate::support::eventually("it is restored", Duration::from_secs(10), restored).await;
}

#[tokio::test]
async fn a_prompt_whose_estimate_is_near_a_hard_limit_is_counted() {
    let wire = Wire::start(|_| Framing::Length.answer("application/json", &Bytes::from_static(b"{}"), 64)).await;
    // Estimated at two tokens for five bytes: 1,047 of 1,000.
    let body = |model: &str| {
        let prompt = "hello ".repeat(418);
        format!(r#"{{"model":"{model}","messages":[{{"role":"user","content":"{prompt}"}}],"max_tokens":1}}"#)
    };
    let text = format!(
        "version: 1\nmodels: [{{name: gpt-4o, pool: p}}, {{name: other, pool: p}}, {{name: far, pool: p, tokenizer: o200k}}]\npools:\n  p: {{upstreams: [{{url: '{}'}}]}}\nlimits:\n  - {{models: [gpt-4o, other], input_tokens: 1000, per: 1h}}\n  - {{name: far, models: [far], input_tokens: 900, per: 1h}}\n",
        wire.url()
    );
    let gateway = Gateway::start(&text).await;
    let status = async |model: &str| ask(&gateway, body(model)).await.status;
    crate::support::eventually("the vocabulary is loaded", Duration::from_secs(30), || async {
        status("gpt-4o").await == 200
    })
    .await;
    assert_eq!(status("far").await, 429, "an estimate that is far off the limit stands");
    assert_eq!(status("other").await, 429, "nobody knows how this one counts");
    let records = Journal::settled(&gateway).await.of_kind("request");
    let counted = |record: &Value| record["decisions"].to_string().contains("\"count\"");
    let told: Vec<_> =
        records.iter().filter(|record| counted(record)).map(|record| &record["model"]["asked"]).collect();
    assert_eq!(told, ["gpt-4o"]);
}

// The long run.

/// What a limit must say, kept apart from it: what was taken in this span and in the one before, which still counts by
/// the share of it that a rolling window covers.
struct Book {
    length: u64,
    rolls: bool,
    from: u64,
    here: u64,
    before: u64,
}

impl Book {
    fn new(length: u64, rolls: bool) -> Self {
        Self { length, rolls, from: 0, here: 0, before: 0 }
    }

    fn taken(&mut self, now: u64) -> u64 {
        let from = now - now % self.length;
        if from != self.from {
            self.before = if from == self.from + self.length { self.here } else { 0 };
            (self.from, self.here) = (from, 0);
        }
        let before = if self.rolls { self.before } else { 0 };
        self.here + (before * (from + self.length - now)).div_ceil(self.length)
    }

    fn settle(&mut self, from: u64, reserved: u64, used: u64) {
        let taken = match self.from.checked_sub(from) {
            Some(0) => &mut self.here,
            Some(behind) if behind == self.length => &mut self.before,
            _ => return,
        };
        *taken = *taken - reserved + used;
    }
}

/// One request under way: what it has of each book, and since when.
struct Open {
    reservation: Box<Reservation>,
    took: [(u64, u64); 3],
    asked: (u64, u64),
}

const DAY: u64 = 86_400_000;
/// A dollar and a fifth a day, in nano-dollars; tokens a minute; requests at one time.
const LIMITS: [u64; 3] = [1_200_000_000, 300_000, 50];

/// What a request of so many tokens needs of each.
fn needs((input, output): (u64, u64)) -> [u64; 3] {
    [input * 1_000 + output * 10_000, input + output, 1]
}

/// R4: a budget of a day, a rate of a minute and a number of places are held between half and 95 per cent of what they
/// allow, for months of their own clock. Whoever fits by the books is admitted, and nobody else.
#[test]
fn nobody_is_refused_for_whom_there_is_room_however_long_it_goes_on() {
    let limits = "limits:\n  - {name: money, usd: 1.2, per: day, on_short: refuse}\n  - {name: rate, tokens: 300000, per: 1m, on_short: refuse}\n  - {concurrency: 50}\n";
    let text = format!("{}{PRICES}{limits}", policy(&["http://127.0.0.1:1"], ""));
    for seed in 0..3 {
        let (state, telemetry, settings) = (State::new(0), Telemetry::new(), Settings::default());
        let policy = compile(&text, &World::new(&|_| None, &state, &telemetry, &settings)).unwrap();
        let price = policy.prices.as_ref().unwrap().find("m", "p", "vllm", std::time::UNIX_EPOCH).unwrap().clone();
        let reserve = |(input, output): (u64, u64), now: u64| {
            let prices = std::slice::from_ref(&price);
            let cost = Costs { prices, cached: Cached::Within, besides: Usage::default(), work: Work::default() };
            let (tenant, key, user, held, before) = (None, None, None, None, Used::default());
            let (plans, model, surface) = (&[], "m", CHAT);
            let counted = Counted { tenant, key, plans, model, surface, user, input, output, cost, before, held, now };
            match state.limits.reserve(policy.limits.iter(), &counted) {
                Some(Outcome::Reserved(reservation)) => Some(reservation),
                Some(Outcome::Short(_)) => None,
                _ => panic!("there are limits and a price"),
            }
        };
        let mut random = fastrand::Rng::with_seed(seed);
        let mut books = [Book::new(DAY, false), Book::new(60_000, true)];
        let (mut open, mut now) = (Vec::<Open>::new(), 20_700 * DAY);
        let (mut admitted, mut refused, mut within) = (0, 0, 0);
        while admitted < 20_000 {
            now += random.u64(0..800);
            // Now and then somebody asks for more than there may be.
            let pushes = random.u8(0..50) == 0;
            let most = if pushes { (300_000, 60_000) } else { (4_000, 2_000) };
            let asked = (random.u64(1..=most.0), random.u64(1..=most.1));
            let taken = [books[0].taken(now), books[1].taken(now), open.len() as u64];
            let share = |n: usize, more: u64| (taken[n] + more) as f64 / LIMITS[n] as f64;
            let most = (0..3).map(|n| share(n, needs(asked)[n])).fold(0.0, f64::max);
            if most <= 0.95 || pushes {
                let fits = (0..3).all(|n| taken[n] + needs(asked)[n] <= LIMITS[n]);
                let got = reserve(asked, now);
                assert_eq!(got.is_some(), fits, "seed {seed}: {asked:?} at {taken:?} of {LIMITS:?}");
                let Some(reservation) = got else {
                    refused += 1;
                    continue;
                };
                let took = [(books[0].from, needs(asked)[0]), (books[1].from, needs(asked)[1]), (0, 1)];
                books.iter_mut().zip(took).for_each(|(book, (_, amount))| book.here += amount);
                open.push(Open { reservation, took, asked });
                admitted += 1;
                within += u32::from((0.5..=0.95).contains(&most));
            } else if open.is_empty() {
                // All of it is spent: the next minute, or the next day.
                now += if share(0, needs(asked)[0]) > 0.95 { DAY - now % DAY } else { 1_000 };
            }
            if (most > 0.95 || random.u8(0..3) > 0) && !open.is_empty() {
                let mut over = open.swap_remove(random.usize(0..open.len()));
                let of = |asked: u64, random: &mut fastrand::Rng| match random.u8(0..10) {
                    0 => 0,
                    1 => asked + asked / 10,
                    _ => random.u64(0..=asked),
                };
                let (input, output) = (of(over.asked.0, &mut random), of(over.asked.1, &mut random));
                let used = needs((input, output));
                over.reservation.settle(&Used { asked: true, input, output, nanousd: used[0] }, now);
                books[0].taken(now);
                books[1].taken(now);
                books.iter_mut().zip(over.took).zip(used).for_each(|((book, (from, amount)), used)| {
                    book.settle(from, amount, used);
                });
            }
        }
        println!("seed {seed}: {admitted} admitted, {within} of them between half and 95 per cent, {refused} refused");
        assert!(within > 10_000 && refused > 50, "seed {seed}: {within} within, {refused} refused");
        open.clear();
        assert_eq!(state.limits.held(), 0, "seed {seed}");
    }
}
