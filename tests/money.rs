//! Money: usage is always there, what it cost is on record to the nano-dollar, and clients see nothing of the asking.

use std::time::Duration;

use bytes::Bytes;
use infergate::tokens::Tokenizer;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::support::keys::{asks_for, key, start};
use crate::support::requests::{STREAMING, every_surface, passed_on, policy_for_every_surface, request};
use crate::support::wire::{EVENTS, Framing, Heard, Wire, sha256};
use crate::support::{
    Answer, Client, Gateway, Journal, Process, chat, eventually, faulty_server, model_server, policy,
};

const CHAT: &str = "/v1/chat/completions";
const PRICES: &str = "prices: {list: [{models: [m], input: 2.5, cached_input: 1.25, output: 10}]}\n";

/// What the model server says before its usage, and behind it.
const BEFORE: &str = ": hi\n\ndata: {\"choices\":[{\"delta\":{\"content\":\"\u{4e2d} \\\"prompt_tokens\\\"\"}}],\"usage\":null}\r\n\r\n\
    data: {\"choices\":[{\"delta\":{}}]}\n\n";
const USAGE: &str = "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":304,\"completion_tokens\":550,\"prompt_tokens_details\":{\"cached_tokens\":4}}}\r\n\r\n";
const BEHIND: &str = "data: [DONE]\n\n";
/// 300 * 2500 + 4 * 1250 + 550 * 10000.
const COST: u64 = 6_255_000;

/// A model server that tells its usage at the end of a stream if it is asked to, cut in two where `x-cut` says.
async fn telling() -> Wire {
    Wire::streaming(|heard| {
        let asked = String::from_utf8_lossy(&heard.body).contains("\"include_usage\":true");
        [BEFORE, if asked { USAGE } else { "" }, BEHIND].concat()
    })
    .await
}

/// The record of the request that got this answer.
async fn record_of(gateway: &Gateway, answer: &Answer) -> Value {
    let id = answer.header("x-request-id").to_owned();
    let path = format!("/admin/v1/requests/{id}");
    eventually("the record", Duration::from_secs(5), || async { gateway.admin(&path).await.status == 200 }).await;
    gateway.admin(&path).await.json()
}

fn asked(body: &str) -> String {
    body.replace("\"stream\":true", "\"stream\":true,\"stream_options\":{\"include_usage\":true}")
}

#[tokio::test]
async fn usage_is_asked_for_and_kept_from_the_client_wherever_the_stream_is_cut() {
    let wire = telling().await;
    let gateway = Gateway::start(&format!("{}{PRICES}", policy(&[&wire.url()], ""))).await;
    let (whole, body) = ([BEFORE, USAGE, BEHIND].concat(), chat(true, 9));
    for (client, protocol) in Client::both().into_iter().zip(["h1", "h2"]) {
        let mut running = JoinSet::new();
        for cut in 0..=whole.len() {
            if running.len() == 16 {
                running.join_next().await.unwrap().unwrap();
            }
            let (client, address, body, cut) = (client.clone(), gateway.address, body.clone(), cut.to_string());
            running.spawn(async move {
                let answer = client.post_with(address, CHAT, &[("x-cut", &cut)], body).await;
                assert_eq!((answer.status, answer.whole), (200, true), "{protocol} {cut}");
                assert_eq!(answer.text(), [BEFORE, BEHIND].concat(), "{protocol} {cut}");
            });
        }
        while let Some(done) = running.join_next().await {
            done.unwrap();
        }
    }
    let heard = wire.heard();
    assert_eq!(heard.len(), 2 * (whole.len() + 1));
    assert!(heard.iter().all(|heard| heard.body == asked(&body)), "one splice, every other byte as it came");
    let records = Journal::settled(&gateway).await.of_kind("request");
    assert_eq!(records.len(), heard.len());
    for record in records {
        let usage = json!({"input_tokens": 304, "output_tokens": 550, "cached_tokens": 4, "source": "upstream"});
        assert_eq!((&record["usage"], &record["cost"]["nanousd"]), (&usage, &COST.into()));
        assert_eq!(record["bytes"]["answer"], BEFORE.len() + BEHIND.len(), "what went to the client");
    }
    let total = COST as f64 * heard.len() as f64;
    gateway.comes_to("infergate_cost_nanousd_total{gen_ai_request_model=\"m\"}", total).await;
}

#[tokio::test]
async fn a_client_that_asks_for_usage_itself_gets_every_byte_of_it() {
    let wire = telling().await;
    let gateway = Gateway::start(&format!("{}{PRICES}", policy(&[&wire.url()], ""))).await;
    for client in Client::both() {
        let body = asked(&chat(true, 9));
        let answer = client.post(gateway.address, CHAT, body.clone()).await;
        assert_eq!(answer.text(), [BEFORE, USAGE, BEHIND].concat());
        assert_eq!(wire.heard().last().unwrap().sha256, sha256(body.as_bytes()));
        assert_eq!(record_of(&gateway, &answer).await["cost"]["nanousd"], COST);
    }
}

#[tokio::test]
async fn without_prices_and_metering_no_byte_changes_and_nothing_costs() {
    let wire = telling().await;
    for extra in ["", "metering: {usage: as_is}\n"] {
        let gateway = Gateway::start(&format!("{}{extra}", policy(&[&wire.url()], ""))).await;
        for client in Client::both() {
            let answer = client.post(gateway.address, CHAT, chat(true, 9)).await;
            assert_eq!(answer.text(), [BEFORE, BEHIND].concat());
            assert_eq!(wire.heard().last().unwrap().sha256, sha256(chat(true, 9).as_bytes()));
            assert_eq!(answer.header("x-infergate-cost-usd"), "");
            let record = record_of(&gateway, &answer).await;
            assert!(record.get("cost").is_none() && record.get("unpriced").is_none(), "{record:#}");
            assert_eq!(record["usage"], json!({"output_tokens": 2, "source": "estimated"}));
        }
    }
    let gateway = Gateway::start(&format!("{}metering: {{}}\n", policy(&[&wire.url()], ""))).await;
    let answer = Client::h1().post(gateway.address, CHAT, chat(true, 9)).await;
    let record = record_of(&gateway, &answer).await;
    assert_eq!((&record["usage"]["source"], record.get("cost")), (&"upstream".into(), None));
}

#[tokio::test]
async fn a_server_that_would_not_understand_is_not_asked() {
    let wire = telling().await;
    let text = policy(&[&wire.url()], "").replace(&wire.url(), &format!("{}\n        provider: tgi", wire.url()));
    let gateway = Gateway::start(&format!("{text}{PRICES}")).await;
    let answer = Client::h1().post(gateway.address, CHAT, chat(true, 9)).await;
    assert_eq!(answer.text(), [BEFORE, BEHIND].concat());
    assert_eq!(wire.heard()[0].sha256, sha256(chat(true, 9).as_bytes()));
    let record = record_of(&gateway, &answer).await;
    assert_eq!(record["usage"]["source"], "estimated");
    assert!(record["cost"]["nanousd"].as_u64().unwrap() > 20_000, "{record:#}");
    gateway.comes_to("infergate_usage_estimated_total{source=\"estimated\"}", 1.0).await;
}

/// What a record's usage costs at a dollar for a million input tokens and three for output.
fn reckoned(record: &Value) -> u64 {
    let count = |name: &str| record["usage"][name].as_u64().unwrap_or(0);
    let beside =
        if record["surface"] == "/v1/messages" { count("cached_tokens") + count("cache_write_tokens") } else { 0 };
    1_000 * (count("input_tokens") + beside) + 3_000 * count("output_tokens")
}

#[tokio::test]
async fn every_surface_has_a_cost_that_follows_from_its_usage_and_the_metric_is_their_sum() {
    let server = every_surface().await;
    let prices = "prices: {list: [{models: ['*'], input: 1, output: 3}]}\n";
    let gateway = Gateway::start(&policy_for_every_surface(&server.url(), "", "", prices)).await;
    let free = ["/v1/messages/count_tokens", "/tokenize", "/detokenize", "/info"];
    let mut asked = 0;
    for client in Client::both() {
        for surface in passed_on() {
            for stream in [false, true] {
                if stream && !STREAMING.contains(&surface.path) {
                    continue;
                }
                let answer = client.send(request(&gateway, surface.path, stream, "", "")).await;
                assert_eq!(answer.status, 200, "{}", surface.path);
                asked += 1;
            }
        }
    }
    let records = Journal::settled(&gateway).await.of_kind("request");
    assert_eq!(records.len(), asked);
    let (mut total, mut unpriced) = (0, 0);
    for record in &records {
        let path = record["surface"].as_str().unwrap();
        let cost = record["cost"]["nanousd"].as_u64();
        if free.contains(&path) {
            assert_eq!((cost, record.get("unpriced")), (None, None), "{path}");
        } else if record.get("unpriced").is_some() {
            // Sound without a length, and without a price by the second.
            assert!(path.starts_with("/v1/audio/trans") && cost.is_none(), "{record:#}");
            unpriced += 1;
        } else {
            let cost = cost.unwrap_or_else(|| panic!("{record:#}"));
            assert!(cost > 0 && cost == reckoned(record), "{record:#}");
            assert_eq!(record["cost"]["prices"].as_str().unwrap().len(), 12);
            total += cost;
        }
        if STREAMING.contains(&path) && record["stream"] == true {
            assert_eq!(record["usage"]["source"], "upstream", "{record:#}");
        }
    }
    gateway.comes_to("infergate_cost_nanousd_total{gen_ai_request_model=\"m\"}", total as f64).await;
    gateway.comes_to("infergate_unpriced_total{gen_ai_request_model=\"m\"}", f64::from(unpriced)).await;
}

#[tokio::test]
async fn an_answer_that_is_here_at_once_says_what_it_costs() {
    let server = model_server().await;
    let gateway = Gateway::start(&format!("{}{PRICES}", policy(&[&server.url()], ""))).await;
    for client in Client::both() {
        let answer = client.post(gateway.address, CHAT, chat(false, 5)).await;
        let record = record_of(&gateway, &answer).await;
        let nano = record["cost"]["nanousd"].as_u64().unwrap();
        assert_eq!(answer.header("x-infergate-cost-usd"), format!("0.{nano:09}"));
        assert!(nano > 50_000, "{nano}");
        let stream = client.post(gateway.address, CHAT, chat(true, 5)).await;
        assert_eq!(stream.header("x-infergate-cost-usd"), "", "nobody knows yet");
    }
}

#[tokio::test]
async fn a_model_without_a_price_is_unpriced_and_an_upstreams_error_costs_nothing() {
    let server = model_server().await;
    let prices = "prices: {list: [{models: [another], input: 1, output: 1}]}\n";
    let gateway = Gateway::start(&format!("{}{prices}", policy(&[&server.url()], ""))).await;
    for client in Client::both() {
        let record = record_of(&gateway, &client.post(gateway.address, CHAT, chat(true, 5)).await).await;
        assert_eq!((record.get("cost"), &record["unpriced"]), (None, &true.into()), "{record:#}");
        let wrong = chat(false, 5).replace("\"max_tokens\":5", "\"max_tokens\":-5");
        let answer = client.post(gateway.address, CHAT, wrong).await;
        assert_eq!(answer.status, 400, "{}", answer.text());
        let record = record_of(&gateway, &answer).await;
        assert_eq!((record.get("cost"), record.get("unpriced")), (None, None), "{record:#}");
    }
}

#[tokio::test]
async fn a_stream_without_usage_is_estimated_and_one_that_breaks_off_is_partial_and_both_cost_something() {
    for (faults, source) in [(&["no-usage"][..], "estimated"), (&["no-usage", "cut,after=6"], "partial")] {
        let server = faulty_server(faults).await;
        let gateway = Gateway::start(&format!("{}{PRICES}", policy(&[&server.url()], "retry: {attempts: 1}"))).await;
        for (client, path) in Client::both().into_iter().zip([CHAT, "/v1/messages"]) {
            let answer = client.post(gateway.address, path, chat(true, 20)).await;
            assert_eq!(answer.status, 200);
            let record = record_of(&gateway, &answer).await;
            assert_eq!(record["usage"]["source"], source, "{record:#}");
            assert!(record["usage"]["input_tokens"].as_u64() > Some(0), "{record:#}");
            assert!(record["cost"]["nanousd"].as_u64() > Some(0), "{record:#}");
        }
        gateway.comes_to(&format!("infergate_usage_estimated_total{{source=\"{source}\"}}"), 2.0).await;
    }
}

#[tokio::test]
async fn what_a_client_left_behind_is_partial_and_paid_for() {
    let server = faulty_server(&["drip=5"]).await;
    let gateway = Gateway::start(&format!("{}{PRICES}", policy(&[&server.url()], ""))).await;
    for client in Client::both() {
        let answer = client.open(gateway.address, CHAT, &[], chat(true, 10_000)).await;
        let id = answer.headers()["x-request-id"].to_str().unwrap().to_owned();
        tokio::time::sleep(Duration::from_millis(300)).await;
        drop((answer, client));
        let path = format!("/admin/v1/requests/{id}");
        eventually("the record", Duration::from_secs(5), || async { gateway.admin(&path).await.status == 200 }).await;
        let record = gateway.admin(&path).await.json();
        assert_eq!((&record["outcome"], &record["usage"]["source"]), (&"client_closed".into(), &"partial".into()));
        assert!(record["cost"]["nanousd"].as_u64() > Some(0), "{record:#}");
    }
}

#[tokio::test]
async fn the_model_that_answered_is_the_one_that_is_paid() {
    let answer = |tokens: u32| {
        let body = format!("{{\"choices\":[],\"usage\":{{\"prompt_tokens\":{tokens},\"completion_tokens\":0}}}}");
        [Framing::Length.head("application/json", body.len()), body.into()].concat()
    };
    let own = Wire::saying("HTTP/1.1 503 Busy\r\ncontent-length: 0\r\n\r\n").await;
    let cloud = Wire::saying(answer(1_000)).await;
    let text = format!(
        "version: 1\nmodels:\n  - {{name: m, pool: own, fallbacks: [{{pool: cloud, rename: dear}}]}}\npools:\n  own: {{upstreams: [{{url: '{}'}}], retry: {{on: [connect]}}}}\n  cloud: {{upstreams: [{{url: '{}', provider: openai}}]}}\nprices:\n  list:\n    - {{models: [m], input: 1}}\n    - {{models: [dear], input: 7}}\n    - {{models: [dear], input: 9, pool: own}}\n    - {{models: [dear], input: 8, provider: azure}}\n    - {{models: [dear], input: 6, from: 9999-01-01}}\n",
        own.url(),
        cloud.url()
    );
    let gateway = Gateway::start(&text).await;
    let answer = Client::h1().post(gateway.address, CHAT, chat(false, 1)).await;
    assert_eq!(answer.header("x-infergate-cost-usd"), "0.007000000");
    assert_eq!(record_of(&gateway, &answer).await["cost"]["nanousd"], 7_000_000);
}

#[tokio::test]
async fn new_prices_have_a_new_version_and_come_into_force_as_a_policy_does() {
    let server = model_server().await;
    let write = |gateway: &Gateway, text: &str| {
        let fresh = gateway.directory.path().join(".fresh");
        std::fs::write(&fresh, text).unwrap();
        std::fs::rename(fresh, gateway.directory.path().join("prices.yaml")).unwrap();
    };
    let text = format!("{}prices: {{file: prices.yaml}}\n", policy(&[&server.url()], ""));
    let gateway = Gateway::start(&policy(&[&server.url()], "")).await;
    write(&gateway, "version: 1\nlist: [{models: [m], input: 1, output: 1}]\n");
    assert_eq!(gateway.reload(&text).await.status, 200);
    let price = async || {
        let record = record_of(&gateway, &Client::h1().post(gateway.address, CHAT, chat(false, 5)).await).await;
        (record["cost"]["nanousd"].as_u64().unwrap(), record["cost"]["prices"].as_str().unwrap().to_owned())
    };
    let (cheap, first) = price().await;
    write(&gateway, "version: 1\nlist: [{models: [m], input: 2, output: 2}]\n");
    eventually("the new prices", Duration::from_secs(15), async || price().await.0 == 2 * cheap).await;
    assert_ne!(price().await.1, first);
    // A broken file changes nothing, and is told with its own line.
    write(&gateway, "version: 1\nlist:\n  - {models: [m], input: 3, outptu: 2}\n");
    let refused = Client::h1().post(gateway.admin, "/admin/reload", "").await;
    assert!(refused.text().contains("prices.yaml:3:"), "{}", refused.text());
    assert_eq!(price().await.0, 2 * cheap);
}

#[tokio::test]
async fn the_class_of_service_that_the_answer_names_is_the_one_that_is_paid() {
    let tiers = "prices: {list: [{models: [m], input: 2, output: 0, service_tiers: {flex: 0.5, priority: 2}}]}\n";
    let wire = Wire::start(|heard: &Heard| {
        let tier = heard.header("x-tier");
        let body = format!("{{\"service_tier\":\"{tier}\",\"choices\":[],\"usage\":{{\"prompt_tokens\":1000,\"completion_tokens\":3}}}}");
        Framing::Length.answer("application/json", &body.into(), 30)
    })
    .await;
    let gateway = Gateway::start(&format!("{}{tiers}", policy(&[&wire.url()], ""))).await;
    for (tier, nano) in [("default", 2_000_000), ("flex", 1_000_000), ("priority", 4_000_000)] {
        let answer = Client::h2().post_with(gateway.address, CHAT, &[("x-tier", tier)], chat(false, 1)).await;
        let record = record_of(&gateway, &answer).await;
        assert_eq!((&record["cost"]["nanousd"], &record["usage"]["service_tier"]), (&json!(nano), &json!(tier)));
    }
}

#[test]
fn the_prices_that_are_shipped_are_good_and_litellms_can_be_taken_over() {
    let home = env!("CARGO_MANIFEST_DIR");
    let (code, out, _) = Process::run(&["prices", "check", &format!("{home}/config/prices.yaml")]);
    assert!(code == Some(0) && out.contains(": good ("), "{out}");
    let directory = tempfile::tempdir().unwrap();
    let (theirs, ours) = (directory.path().join("theirs.json"), directory.path().join("ours.yaml"));
    std::fs::write(
        &theirs,
        r#"{"a": {"litellm_provider": "openai", "input_cost_per_token": 7.5e-08, "output_cost_per_token": 3e-07, "odd_cost": 1},
            "b": {"litellm_provider": "x", "input_cost_per_token": 1e-06}}"#,
    )
    .unwrap();
    let (code, out, told) = Process::run(&["prices", "import", "--only", "openai", theirs.to_str().unwrap()]);
    assert_eq!(code, Some(0), "{told}");
    assert!(out.contains("input: 0.075\n") && !out.contains("[\"b\"]"), "{out}");
    assert!(told.contains("a: not imported: odd_cost") && told.contains("1 price, 1 finding"), "{told}");
    std::fs::write(&ours, out).unwrap();
    let (code, out, _) = Process::run(&["prices", "check", ours.to_str().unwrap()]);
    assert!(code == Some(0) && out.contains("good (1 name, version "), "{out}");
    std::fs::write(&ours, "version: 1\nlist: [{models: [a]}]\n").unwrap();
    let (code, out, _) = Process::run(&["prices", "check", ours.to_str().unwrap()]);
    assert!(code == Some(1) && out.contains("ours.yaml:2:"), "{out}");
}

#[tokio::test]
async fn an_answer_that_does_not_tell_its_tokens_is_counted_by_its_text_however_it_was_cut() {
    let text = "Internationalization, hyperparameters and counterintuitive misunderstandings. ".repeat(8);
    let parts: Vec<&str> = (0..text.len()).step_by(3).map(|at| &text[at..(at + 3).min(text.len())]).collect();
    let event =
        |part: &&str| format!("data: {{\"choices\":[{{\"index\":0,\"delta\":{{\"content\":\"{part}\"}}}}]}}\n\n");
    let stream: String = parts.iter().map(event).chain([BEHIND.to_owned()]).collect();
    let whole = json!({"choices": [{"index": 0, "message": {"content": text}}]}).to_string();
    let wire = Wire::start(move |heard| {
        let streams = String::from_utf8_lossy(&heard.body).contains("\"stream\":true");
        let (kind, body) = if streams { (EVENTS, &stream) } else { ("application/json", &whole) };
        Framing::Length.answer(kind, &Bytes::copy_from_slice(body.as_bytes()), 100_000)
    })
    .await;
    let encoding = Tokenizer::Cl100k.of("m").unwrap();
    encoding.load();
    let expected = encoding.count(&text).unwrap();
    assert!(expected < parts.len() as u64 / 2, "there are many more parts than tokens");
    let named = policy(&[&wire.url()], "").replace("name: m\n", "name: m\n    tokenizer: cl100k\n");
    let gateway = Gateway::start(&format!("{named}{PRICES}")).await;
    for streams in [true, false] {
        let counted = || async {
            let answer = Client::h1().post(gateway.address, CHAT, chat(streams, 900)).await;
            let record = record_of(&gateway, &answer).await;
            assert_eq!(record["usage"]["source"], "estimated");
            assert!(record["cost"]["nanousd"].as_u64() > Some(0), "before the vocabulary is there it costs, too");
            record["usage"]["output_tokens"] == expected
        };
        eventually("the vocabulary is loaded", Duration::from_secs(30), counted).await;
    }
}

#[tokio::test]
async fn a_stream_tells_its_cost_in_a_comment_before_its_last_event_where_the_policy_wants_that() {
    let wire = telling().await;
    let extra = format!("{PRICES}metering: {{cost_on_streams: true}}\n");
    let gateway = Gateway::start(&format!("{}{extra}", policy(&[&wire.url()], ""))).await;
    for client in Client::both() {
        for cut in 0..=[BEFORE, USAGE, BEHIND].concat().len() {
            let headers = [("x-cut", &*cut.to_string())];
            let answer = client.post_with(gateway.address, CHAT, &headers, chat(true, 9)).await;
            let told = answer.text();
            let comment = ": x-infergate-cost-usd=0.006255000\n\n";
            assert_eq!(told.replacen(comment, "", 1), [BEFORE, BEHIND].concat(), "cut at {cut}");
            assert!(told.len() == BEFORE.len() + comment.len() + BEHIND.len(), "cut at {cut}: {told}");
            let data = told.lines().filter(|line| line.starts_with("data:")).count();
            assert_eq!(data, 3, "cut at {cut}: no event was torn by it: {told}");
            if cut == 0 {
                assert!(told.ends_with(&format!("{comment}{BEHIND}")), "{told}");
            }
        }
    }
}

#[tokio::test]
async fn an_own_server_costs_its_time_shared_among_those_who_ran_on_it() {
    let server = faulty_server(&["slow-first=400"]).await;
    let prices = "prices: {list: [{models: [m], gpu_hour: 36, gpus: 2}]}\n";
    let gateway = Gateway::start(&format!("{}{prices}", policy(&[&server.url()], "health: {enabled: false}"))).await;
    let mut running = JoinSet::new();
    let begun = std::time::Instant::now();
    for turn in 0..8 {
        let address = gateway.address;
        running.spawn(async move { Client::h1().post(address, CHAT, chat(turn % 2 == 0, 3)).await.status });
    }
    while let Some(done) = running.join_next().await {
        assert_eq!(done.unwrap(), 200);
    }
    let most = begun.elapsed().as_micros() as u64;
    let records = Journal::settled(&gateway).await.of_kind("request");
    let worked: Vec<u64> = records.iter().map(|record| record["usage"]["gpu_us"].as_u64().unwrap()).collect();
    let all: u64 = worked.iter().sum();
    assert!((390_000..=most).contains(&all), "eight at one time are no more than one alone: {worked:?} of {most}");
    for (record, micros) in records.iter().zip(worked) {
        // Two GPUs at a cent a second each.
        let expected = micros as u128 * 20_000 / 1_000;
        assert!(record["cost"]["nanousd"].as_u64().unwrap().abs_diff(expected as u64) <= 1, "{record:#}");
    }
}

#[tokio::test]
async fn a_budget_holds_for_an_own_server_while_nobody_knows_what_the_work_will_cost() {
    let server = faulty_server(&["slow-first=1000"]).await;
    // A cent a second. Before anything was learned, a hundred tokens are taken to be three seconds and a half.
    let money = "prices: {list: [{models: [m], gpu_hour: 36}]}\nlimits: [{name: purse, usd: 0.075, per: day}]\n";
    let gateway = Gateway::start(&format!("{}{money}", policy(&[&server.url()], "health: {enabled: false}"))).await;
    let mut running = JoinSet::new();
    for _ in 0..8 {
        let address = gateway.address;
        running.spawn(async move { Client::h1().post(address, CHAT, chat(false, 100)).await.status });
    }
    let mut told: Vec<u16> = Vec::new();
    while let Some(done) = running.join_next().await {
        told.push(done.unwrap());
    }
    told.sort_unstable();
    assert_eq!(told, [200, 200, 429, 429, 429, 429, 429, 429]);
    gateway.comes_to("infergate_limit_reserved", 0.0).await;
    assert_eq!(gateway.metric("infergate_limit_overshoot_total{limit=\"purse\"}").await, 0.0);
    // They used less, and the rest is there for the next.
    assert_eq!(Client::h1().post(gateway.address, CHAT, chat(false, 100)).await.status, 200);
}

#[tokio::test]
async fn the_time_of_an_own_server_that_gave_no_answer_is_paid_for_too() {
    let (bad, good) = (faulty_server(&["hang"]).await, model_server().await);
    let pool = |url: &str| {
        format!(
            "{{upstreams: [{{url: '{url}'}}], health: {{enabled: false}}, retry: {{attempts: 2}}, timeouts: {{answer_ms: 300}}}}"
        )
    };
    let text = format!(
        "version: 1\nmodels:\n  - {{name: m, pool: p, fallbacks: [{{pool: q}}]}}\n  - {{name: alone, pool: p, rename: m}}\n  - {{name: dead, pool: r, rename: m}}\n\
         pools:\n  p: {}\n  q: {}\n  r: {}\n\
         prices: {{list: [{{models: [m], gpu_hour: 36}}]}}\nlimits: [{{name: purse, usd: 9, per: day}}]\n",
        pool(&bad.url()),
        pool(&good.url()),
        pool("http://127.0.0.1:9")
    );
    let gateway = Gateway::start(&text).await;
    for (model, status) in [("m", 200), ("alone", 504), ("dead", 502)] {
        let body = chat(false, 4).replace("\"m\"", &format!("\"{model}\""));
        let answer = Client::h1().post(gateway.address, CHAT, body).await;
        assert_eq!(answer.status, status, "{}", answer.text());
        let record = record_of(&gateway, &answer).await;
        let (worked, cost) = (record["usage"]["gpu_us"].as_u64(), record["cost"]["nanousd"].as_u64());
        assert_eq!(record["limits"][0]["used"].as_u64(), Some(cost.unwrap_or(0)), "{record:#}");
        if model == "dead" {
            assert_eq!((worked, cost), (None, None), "nobody was reached: {record:#}");
            continue;
        }
        assert_eq!(record["attempts"][0]["result"], "timeout");
        // A cent a second.
        let (worked, cost) = (worked.unwrap(), cost.unwrap());
        assert!(worked >= 300_000 && cost.abs_diff(worked * 10) <= 2, "{record:#}");
    }
}

#[tokio::test]
async fn of_several_attempts_the_one_that_was_metered_says_what_it_used() {
    let (bad, good) = (faulty_server(&["status=503"]).await, model_server().await);
    let text = format!(
        "version: 1\nmodels: [{{name: m, pool: p, fallbacks: [{{pool: q}}]}}]\npools:\n  p: {{upstreams: [{{url: '{}'}}], retry: {{'on': [connect]}}}}\n  q: {{upstreams: [{{url: '{}'}}]}}\n{PRICES}",
        bad.url(),
        good.url()
    );
    let gateway = Gateway::start(&text).await;
    let answer = Client::h1().post(gateway.address, CHAT, chat(false, 4)).await;
    let record = record_of(&gateway, &answer).await;
    let [first, second] = &record["attempts"].as_array().unwrap()[..] else { panic!("{record:#}") };
    assert_eq!(first.get("metered"), None, "{record:#}");
    assert_eq!(second["metered"]["cost_nanousd"], record["cost"]["nanousd"]);
    assert_eq!(second["metered"]["output_tokens"], record["usage"]["output_tokens"]);
    assert!(record["cost"]["nanousd"].as_u64() > Some(0));
}

#[tokio::test]
async fn what_a_listed_tenant_costs_has_a_metric_and_nobody_elses_has() {
    let wire = telling().await;
    let (one, other) = (key("a", ""), key("b", ""));
    let more = asks_for(&[&one, &other], "{a: {}, b: {}}");
    let text = format!("{}{PRICES}telemetry: {{tenants: [a]}}\n{more}", policy(&[&wire.url()], ""));
    let gateway = start(&text, "").await;
    for key in [&one, &other] {
        let headers = [("x-api-key", &*key.text)];
        assert_eq!(Client::h1().post_with(gateway.address, CHAT, &headers, chat(true, 9)).await.status, 200);
    }
    let of = |tenant| format!("infergate_tenant_cost_nanousd_total{{tenant=\"{tenant}\",gen_ai_request_model=\"m\"}}");
    gateway.comes_to("infergate_cost_nanousd_total{gen_ai_request_model=\"m\"}", 2.0 * COST as f64).await;
    assert_eq!((gateway.metric(&of("a")).await, gateway.metric(&of("b")).await), (COST as f64, 0.0));
    assert!(!gateway.admin("/metrics").await.text().contains("tenant=\"b\""));
}
