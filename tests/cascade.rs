//! A cascade: the cheap model answers first, the dear one only where that answer is not good enough; everything that was
//! asked is metered, counted and on the record, and a client sees one answer.

use std::time::Duration;

use bytes::Bytes;
use serde_json::{Value, json};

use crate::support::wire::{EVENTS, Framing, Heard, Step, Wire};
use crate::support::{Answer, Client, Gateway, Journal, Process, eventually};

const CHAT: &str = "/v1/chat/completions";
const PRICES: &str =
    "prices: {list: [{models: [small], input: 1, output: 2}, {models: [large], input: 10, output: 20}]}\n";
/// 7 * 1000 + 5 * 2000, and 9 * 10000 + 3 * 20000.
const COSTS: (u64, u64) = (17_000, 150_000);

fn routed(url: &str, cascade: &str, more: &str) -> String {
    format!(
        "version: 1\nmodels:\n  - {{name: small, pool: p}}\n  - {{name: large, pool: p}}\n  - {{name: huge, pool: p}}\npools:\n  p: {{upstreams: [{{url: '{url}'}}]}}\nrouters:\n  auto: {{default: small, cascade: {{models: [small, large]{cascade}}}}}\n{more}"
    )
}

fn model(heard: &Heard) -> String {
    let body: Value = serde_json::from_slice(&heard.body).unwrap();
    body["model"].as_str().unwrap().to_owned()
}

fn said(choice: Value, tokens: (u64, u64)) -> Vec<Step> {
    let usage = json!({"prompt_tokens": tokens.0, "completion_tokens": tokens.1});
    let body = Bytes::from(json!({"choices": [choice], "usage": usage}).to_string());
    Framing::Length.answer("application/json", &body, 4096)
}

fn spoken(content: &str) -> Value {
    json!({"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"})
}

/// A server whose small model says this, and whose large one says `{"ok":1}`.
async fn server(small: Value) -> Wire {
    Wire::start(move |heard| match model(heard).as_str() {
        "small" => said(small.clone(), (7, 5)),
        _ => said(spoken("{\"ok\":1}"), (9, 3)),
    })
    .await
}

fn body(more: &str) -> String {
    format!(r#"{{"messages":[{{"role":"user","content":"Hello"}}], "x_own":1.50,"model" : "auto"{more}}}"#)
}

const SHAPE: &str = r#","response_format":{"type":"json_schema","json_schema":{"name":"s","schema":{"type":"object","required":["ok"]}}}"#;

async fn ask(gateway: &Gateway, body: String) -> Answer {
    Client::h1().post(gateway.address, CHAT, body).await
}

async fn record(gateway: &Gateway) -> Value {
    Journal::settled(gateway).await.of_kind("request").pop().unwrap()
}

fn decision(record: &Value) -> (String, String) {
    let all = record["decisions"].as_array().unwrap();
    let found = all.iter().rfind(|decision| decision["stage"] == "cascade");
    let text = |key: &str| found.map(|found| found[key].as_str().unwrap().to_owned()).unwrap_or_default();
    (text("verdict"), text("why"))
}

/// What made the virtual model ask the next one, and how often.
async fn escalations(gateway: &Gateway) -> Vec<String> {
    let page = gateway.admin("/metrics").await.text();
    let lines =
        page.lines().filter_map(|line| line.strip_prefix("infergate_route_escalations_total{router=\"auto\",cause=\""));
    lines.map(|line| line.replace("\"}", "")).collect()
}

#[tokio::test]
async fn an_answer_that_does_not_fit_its_schema_is_replaced_and_both_are_metered() {
    let server = server(spoken("Sure! {\"ok\": 1}")).await;
    let gateway = Gateway::start(&routed(&server.url(), "", PRICES)).await;
    let answer = ask(&gateway, body(SHAPE)).await;
    assert_eq!((answer.status, answer.header("x-infergate-route")), (200, "auto=large"), "{}", answer.text());
    assert_eq!(answer.json()["choices"][0]["message"]["content"], "{\"ok\":1}");
    assert_eq!(answer.header("x-infergate-cost-usd"), "0.000167000");
    let models: Vec<String> = server.heard().iter().map(model).collect();
    assert_eq!(models, ["small", "large"]);
    let second = String::from_utf8_lossy(&server.heard()[1].body).into_owned();
    assert_eq!(second, body(SHAPE).replace("\"auto\"", "\"large\""), "every other byte as it came");
    let record = record(&gateway).await;
    assert_eq!(decision(&record), ("large".to_owned(), "schema: not_json".to_owned()));
    assert_eq!(record["model"], json!({"asked": "auto", "route": "large", "used": "large"}));
    let attempts = record["attempts"].as_array().unwrap();
    let first = json!({"input_tokens": 7, "output_tokens": 5, "source": "upstream", "cost_nanousd": COSTS.0});
    let second = json!({"input_tokens": 9, "output_tokens": 3, "source": "upstream", "cost_nanousd": COSTS.1});
    assert_eq!((&attempts[0]["metered"], &attempts[1]["metered"]), (&first, &second));
    assert_eq!((&attempts[0]["result"], &attempts[0]["model"]), (&json!("escalated"), &json!("small")));
    assert_eq!((&attempts[1]["result"], attempts.len()), (&json!("answered"), 2));
    assert_eq!(record["usage"], json!({"input_tokens": 16, "output_tokens": 8, "source": "upstream"}));
    assert_eq!(record["cost"]["nanousd"], COSTS.0 + COSTS.1);
}

#[tokio::test]
async fn a_good_answer_stands_and_nobody_else_is_asked() {
    let server = server(spoken("{\"ok\": 2}")).await;
    let gateway = Gateway::start(&routed(&server.url(), ", mean_logprob_min: -0.5", PRICES)).await;
    for body in [body(SHAPE), body("")] {
        let answer = ask(&gateway, body).await;
        assert_eq!((answer.status, answer.header("x-infergate-route")), (200, "auto=small"));
        assert_eq!(answer.json()["choices"][0]["message"]["content"], "{\"ok\": 2}");
        let record = record(&gateway).await;
        assert_eq!((&record["cost"]["nanousd"], decision(&record).0.as_str()), (&COSTS.0.into(), ""));
        assert_eq!(record["attempts"].as_array().unwrap().len(), 1);
    }
    assert_eq!(server.heard().len(), 2);
}

#[tokio::test]
async fn a_refusal_an_unsure_answer_and_a_failure_are_not_good_enough() {
    let refusal = json!({"index": 0, "message": {"content": null, "refusal": "No."}, "finish_reason": "stop"});
    let mut unsure = spoken("perhaps");
    unsure["logprobs"] = json!({"content": [{"logprob": -0.2}, {"logprob": -1.4}]});
    for (small, why) in [
        (refusal, "refusal: refusal"),
        (spoken("I\u{2019}m sorry, but I can\u{2019}t help with that."), "refusal: its words"),
        (unsure, "logprob: mean -0.800 of -0.500"),
    ] {
        let server = server(small).await;
        let gateway = Gateway::start(&routed(&server.url(), ", mean_logprob_min: -0.5", "")).await;
        assert_eq!(ask(&gateway, body("")).await.header("x-infergate-route"), "auto=large", "{why}");
        assert_eq!(decision(&record(&gateway).await), ("large".to_owned(), why.to_owned()));
        assert_eq!(escalations(&gateway).await, [format!("{} 1", why.split(':').next().unwrap())]);
    }
    let failing = Wire::start(|heard| match model(heard).as_str() {
        "small" => vec![Step::Say("HTTP/1.1 503 No\r\ncontent-length: 2\r\n\r\nno".into())],
        _ => said(spoken("fine"), (9, 3)),
    })
    .await;
    for (on, status, asked) in [("", 200, "large"), (", on: [schema]", 503, "")] {
        let gateway = Gateway::start(&routed(&failing.url(), on, "")).await;
        assert_eq!(ask(&gateway, body("")).await.status, status, "{on}");
        assert_eq!(decision(&record(&gateway).await).0, asked);
        assert_eq!(escalations(&gateway).await.len(), usize::from(!asked.is_empty()), "{on}");
    }
    let breaking = Wire::start(|heard| match model(heard).as_str() {
        "small" => vec![Step::Say("HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n{\"choices\":[".into()), Step::Close],
        _ => said(spoken("fine"), (9, 3)),
    })
    .await;
    let gateway = Gateway::start(&routed(&breaking.url(), "", "")).await;
    assert_eq!(ask(&gateway, body("")).await.json()["choices"][0]["message"]["content"], "fine");
    assert_eq!(record(&gateway).await["attempts"][0]["result"], "broken");
    assert_eq!(escalations(&gateway).await, ["failure 1"]);
}

#[tokio::test]
async fn no_model_is_asked_twice_and_the_last_ones_answer_stands_whatever_it_is() {
    let server = Wire::start(|_| said(spoken("I can't help with that."), (7, 5))).await;
    let policy = routed(&server.url(), "", "").replace("[small, large]", "[small, large, huge]");
    let gateway = Gateway::start(&policy).await;
    let answer = ask(&gateway, body("")).await;
    assert_eq!((answer.status, answer.header("x-infergate-route")), (200, "auto=huge"));
    let models: Vec<String> = server.heard().iter().map(model).collect();
    assert_eq!(models, ["small", "large", "huge"]);
    let record = record(&gateway).await;
    assert_eq!(record["usage"], json!({"input_tokens": 21, "output_tokens": 15, "source": "upstream"}));
}

#[tokio::test]
async fn each_model_thinks_as_much_as_its_own_rule_says_and_one_without_a_rule_as_the_one_before() {
    let server = Wire::start(|_| said(spoken("I can't help with that."), (7, 5))).await;
    let efforts = |sent: &str| -> Vec<Value> {
        let heard = server.heard();
        let bodies = heard.iter().map(|heard| serde_json::from_slice::<Value>(&heard.body).unwrap());
        let ours: Vec<Value> = bodies.filter(|body| body["user"] == sent).collect();
        assert_eq!(ours.len(), 3, "{ours:?}");
        ours.iter().map(|body| body["reasoning_effort"].clone()).collect()
    };
    for (effort, asked, expected) in [
        ("default: {strip: true}, large: {default: high}", "low", [Value::Null, json!("low"), json!("low")]),
        (
            "default: {strip: true}, large: {set: high}, huge: {strip: true}",
            "low",
            [Value::Null, json!("high"), Value::Null],
        ),
        ("default: {set: low}, huge: {set: high}", "medium", [json!("low"), json!("low"), json!("high")]),
        ("large: {set: high}", "medium", [json!("medium"), json!("high"), json!("high")]),
    ] {
        let policy = routed(&server.url(), "", "").replace("[small, large]", "[small, large, huge]");
        let gateway =
            Gateway::start(&policy.replace("{default: small,", &format!("{{default: small, effort: {{{effort}}},")))
                .await;
        let sent = body(&format!(r#","user":"{effort}","reasoning_effort":"{asked}""#));
        assert_eq!(ask(&gateway, sent).await.header("x-infergate-route"), "auto=huge");
        assert_eq!(efforts(effort), expected, "{effort}");
        let record = record(&gateway).await;
        let named = |decision: &&Value| decision["stage"] == "effort";
        assert_eq!(record["decisions"].as_array().unwrap().iter().filter(named).count(), effort.matches('{').count());
    }
    let first =
        routed(&server.url(), "", "").replace("{default: small,", "{default: small, effort: {small: {strip: true}},");
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), first).unwrap();
    let (code, out, _) = Process::run(&["check", file.path().to_str().unwrap()]);
    assert!(code == Some(1) && out.contains("no decision is named small"), "it is no step that is gone on to: {out}");
}

#[tokio::test]
async fn limits_count_every_model_that_was_asked_and_the_request_once() {
    let limits = "limits:\n  - {name: tokens, tokens: 1000, per: 1h}\n  - {name: requests, requests: 3, per: 1h}\n  - {name: large, models: [large], requests: 2, per: 1h}\n  - {name: money, usd: 1, per: 1h}\n";
    let server = server(spoken("I can't help with that.")).await;
    let gateway = Gateway::start(&routed(&server.url(), "", &format!("{PRICES}{limits}"))).await;
    assert_eq!(ask(&gateway, body(r#","max_tokens":20"#)).await.header("x-infergate-route"), "auto=large");
    let record_of_both = record(&gateway).await;
    let used = |name: &str| -> u64 {
        let all = record_of_both["limits"].as_array().unwrap();
        all.iter().filter(|limit| limit["limit"] == name).map(|limit| limit["used"].as_u64().unwrap()).sum()
    };
    assert_eq!((used("tokens"), used("requests"), used("large")), (24, 1, 1));
    assert_eq!(used("money"), COSTS.0 + COSTS.1);
    assert_eq!(ask(&gateway, body(r#","max_tokens":20"#)).await.header("x-infergate-route"), "auto=large");
    record(&gateway).await;
    // Nothing is left for the large one: the answer that is there stands.
    let third = ask(&gateway, body(r#","max_tokens":20"#)).await;
    assert_eq!((third.status, third.header("x-infergate-route")), (200, "auto=small"));
    let record = record(&gateway).await;
    let (verdict, why) = decision(&record);
    assert_eq!(verdict, "stay");
    assert!(why.starts_with("refusal: its words; ") && why.contains("large"), "{why}");
    assert_eq!((&record["usage"]["input_tokens"], &record["cost"]["nanousd"]), (&json!(7), &json!(COSTS.0)));
    assert_eq!(ask(&gateway, body("")).await.status, 429, "three requests are three");
    assert_eq!(gateway.admin("/admin/v1/limits").await.json()["reserved"], 0, "nothing stays reserved");
}

fn streamed(events: &[&str]) -> Bytes {
    let all: String = events.iter().map(|event| format!("data: {event}\n\n")).collect();
    [Framing::Chunked.head(EVENTS, 0), Framing::Chunked.piece(all.as_bytes()), Bytes::from("0\r\n\r\n")].concat().into()
}

const GOOD: [&str; 3] = [
    r#"{"choices":[{"index":0,"delta":{"content":"fine"}}]}"#,
    r#"{"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":3}}"#,
    "[DONE]",
];
const POOR: [&str; 3] = [
    r#"{"choices":[{"index":0,"delta":{"content":"I can't "}}]}"#,
    r#"{"choices":[{"index":0,"delta":{"content":"help with that."},"finish_reason":"stop"}],"usage":{"prompt_tokens":7,"completion_tokens":5}}"#,
    "[DONE]",
];

#[tokio::test]
async fn a_budget_counts_what_was_done_in_vain_before_an_answer_that_stands() {
    let (hangs, says) = (Wire::start(|_| vec![Step::UntilGone]).await, server(spoken("I can't help with that.")).await);
    let text = format!(
        "version: 1\nmodels:\n  - {{name: small, pool: p, fallbacks: [{{pool: q}}]}}\n  - {{name: large, pool: q}}\npools:\n  p: {{upstreams: [{{url: '{}'}}], timeouts: {{answer_ms: 300}}}}\n  q: {{upstreams: [{{url: '{}'}}]}}\nrouters:\n  auto: {{default: small, cascade: {{models: [small, large]}}}}\nprices: {{list: [{{models: [small, large], gpu_hour: 36}}]}}\nlimits:\n  - {{name: purse, usd: 99, per: day}}\n  - {{name: large, models: [large], requests: 0, per: 1h}}\n",
        hangs.url(),
        says.url()
    );
    let gateway = Gateway::start(&text).await;
    assert_eq!(ask(&gateway, body("")).await.header("x-infergate-route"), "auto=small");
    let record = record(&gateway).await;
    assert_eq!((decision(&record).0.as_str(), &record["attempts"][0]["result"]), ("stay", &json!("timeout")));
    // A cent a second.
    let cost = record["cost"]["nanousd"].as_u64().unwrap();
    assert!(cost >= 3_000_000, "{record:#}");
    let purse = record["limits"].as_array().unwrap().iter().filter(|limit| limit["limit"] == "purse");
    assert_eq!(purse.map(|limit| limit["used"].as_u64().unwrap()).sum::<u64>(), cost, "{record:#}");
}

#[tokio::test]
async fn what_models_did_in_vain_costs_what_each_of_them_costs() {
    let (hangs, says) = (Wire::start(|_| vec![Step::UntilGone]).await, server(spoken("fine")).await);
    let text = format!(
        "version: 1\nmodels:\n  - {{name: small, pool: p}}\n  - {{name: large, pool: q}}\npools:\n  p: {{upstreams: [{{url: '{}'}}], timeouts: {{answer_ms: 300}}, retry: {{attempts: 1}}}}\n  q: {{upstreams: [{{url: '{}'}}]}}\nrouters:\n  auto: {{default: small, cascade: {{models: [small, large]}}}}\nprices: {{list: [{{models: [small], gpu_hour: 36}}, {{models: [large], gpu_hour: 0.000036}}]}}\n",
        hangs.url(),
        says.url()
    );
    let gateway = Gateway::start(&text).await;
    assert_eq!(ask(&gateway, body("")).await.header("x-infergate-route"), "auto=large");
    let record = record(&gateway).await;
    // A cent a second, and next to nothing for the answer.
    let (micros, cost) = (record["usage"]["gpu_us"].as_u64().unwrap(), record["cost"]["nanousd"].as_u64().unwrap());
    assert!(micros >= 300_000 && cost >= 3_000_000, "{record:#}");
    let models: Vec<&Value> = record["attempts"].as_array().unwrap().iter().map(|attempt| &attempt["model"]).collect();
    assert_eq!(models, [&json!("small"), &Value::Null], "the last one's is the record's");
}

#[tokio::test]
async fn a_limit_sends_no_cascade_to_a_model_that_is_not_its_own() {
    let server = server(spoken("fine")).await;
    let text =
        routed(&server.url(), "", "limits: [{models: [large], requests: 0, per: 1h, on_exhausted: {use: huge}}]\n");
    // Nobody is asked for the small one: its pool has no place.
    let text = text.replace("{name: small, pool: p}", "{name: small, pool: full}").replace(
        "pools:\n",
        &format!("pools:\n  full: {{upstreams: [{{url: '{}'}}], concurrency: {{max: 1, queue: 0}}}}\n", server.url()),
    );
    let taken = Wire::start(|_| vec![Step::UntilGone]).await;
    let text = text.replacen(&server.url(), &taken.url(), 1);
    let gateway = Gateway::start(&text).await;
    let first = tokio::spawn({
        let (address, body) = (gateway.address, body("").replace("auto", "small"));
        async move { Client::h1().post(address, CHAT, body).await }
    });
    let heard = &taken;
    eventually("the place is taken", Duration::from_secs(20), || async move { heard.heard().len() == 1 }).await;
    let answer = ask(&gateway, body("")).await;
    assert_eq!((answer.status, server.heard().len()), (503, 0), "{}", answer.text());
    first.abort();
}

#[tokio::test]
async fn a_request_that_takes_too_long_while_an_answer_is_held_asks_nobody_else() {
    let server =
        Wire::start(|_| vec![Step::Say("HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n{".into()), Step::UntilGone])
            .await;
    let text = routed(&server.url(), "", "").replace("'}]}", "'}], timeouts: {total_ms: 500}}");
    let gateway = Gateway::start(&text).await;
    let answer = ask(&gateway, body("")).await;
    assert_eq!((answer.status, answer.code().as_str()), (504, "total_timeout"), "{}", answer.text());
    assert_eq!(server.heard().len(), 1);
    assert_eq!(record(&gateway).await["attempts"][0]["result"], "timeout");
}

#[tokio::test]
async fn all_that_came_of_a_held_answer_is_counted_when_its_client_leaves() {
    let word = r#"{"choices":[{"index":0,"delta":{"content":" word"}}]}"#;
    let pieces = (0..50).map(|_| Framing::Chunked.piece(format!("data: {word}\n\n").as_bytes()));
    let mut steps = vec![Step::Say(Framing::Chunked.head(EVENTS, 0))];
    steps.extend(pieces.flat_map(|piece| [Step::Say(piece), Step::Pause(Duration::from_millis(2))]));
    steps.push(Step::UntilGone);
    let server = Wire::start(move |_| steps.clone()).await;
    let gateway = Gateway::start(&routed(&server.url(), ", streams: hold", "")).await;
    let (gateway, waits) = (&gateway, std::sync::atomic::AtomicU64::new(200));
    let waits = &waits;
    eventually("it counts what came before its client left", Duration::from_secs(60), || async move {
        let wait = Duration::from_millis(waits.fetch_add(200, std::sync::atomic::Ordering::Relaxed));
        let asking = ask(gateway, body(r#","stream":true"#));
        assert!(tokio::time::timeout(wait, asking).await.is_err(), "it never ends by itself");
        record(gateway).await["usage"]["output_tokens"].as_u64().is_some_and(|tokens| tokens >= 50)
    })
    .await;
}

#[tokio::test]
async fn a_stream_is_passed_on_as_it_comes_unless_the_policy_holds_it() {
    let server =
        Wire::start(|heard| vec![Step::Say(streamed(if model(heard) == "small" { &POOR } else { &GOOD }))]).await;
    let asked = body(r#","stream":true"#);
    let gateway = Gateway::start(&routed(&server.url(), "", "")).await;
    let answer = ask(&gateway, asked.clone()).await;
    assert!(answer.text().contains("I can't ") && answer.header("x-infergate-route") == "auto=small");
    assert_eq!(decision(&record(&gateway).await), ("skip".to_owned(), "it is a stream".to_owned()));
    let gateway = Gateway::start(&routed(&server.url(), ", streams: hold", "")).await;
    let answer = ask(&gateway, asked).await;
    assert!(answer.whole && answer.text().contains("fine") && !answer.text().contains("can't"), "{}", answer.text());
    assert_eq!(answer.header("x-infergate-route"), "auto=large");
    let record = record(&gateway).await;
    assert_eq!(decision(&record), ("large".to_owned(), "refusal: its words".to_owned()));
    assert_eq!(record["attempts"][0]["metered"]["output_tokens"], 5);
    assert_eq!(record["usage"]["output_tokens"], 8);
}

#[tokio::test]
async fn the_client_of_a_held_stream_gets_signs_of_life_and_one_stream() {
    let server = Wire::start(|heard| {
        let all = streamed(if model(heard) == "small" { &POOR } else { &GOOD });
        vec![
            Step::Say(all.slice(..all.len() - 30)),
            Step::Pause(Duration::from_millis(400)),
            Step::Say(all.slice(all.len() - 30..)),
        ]
    })
    .await;
    let policy = routed(&server.url(), ", streams: hold", "requests: {heartbeat_ms: 50}\n");
    let answer = ask(&Gateway::start(&policy).await, body(r#","stream":true"#)).await;
    assert!(answer.text().starts_with(": ") && answer.text().contains("fine"), "{}", answer.text());
    assert_eq!(answer.text().matches("[DONE]").count(), 1);
}

#[tokio::test]
async fn a_client_that_leaves_while_an_answer_is_held_ends_it() {
    let server =
        Wire::start(|_| vec![Step::Say("HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n{".into()), Step::UntilGone])
            .await;
    let gateway = Gateway::start(&routed(&server.url(), "", "")).await;
    let asking = tokio::spawn({
        let (address, body) = (gateway.address, body(""));
        async move { Client::h1().post(address, CHAT, body).await }
    });
    let server = &server;
    eventually("it is asked", Duration::from_secs(20), || async move { server.heard().len() == 1 }).await;
    asking.abort();
    eventually("it is let go", Duration::from_secs(20), || async move { server.gone() == 1 }).await;
    let record = record(&gateway).await;
    assert_eq!((&record["outcome"], &record["attempts"][0]["result"]), (&json!("client_closed"), &json!("cancelled")));
    assert_eq!(server.heard().len(), 1, "no other model is asked for nobody");
}

const LOOPED: &str = r#"{"model":"auto","messages":[{"role":"user","content":"Hello"},{"role":"assistant","content":null,"tool_calls":[{"id":"c1","type":"function","function":{"name":"f","arguments":"{}"}}]},{"role":"tool","tool_call_id":"c1","content":"done"}]}"#;

#[tokio::test]
async fn whoever_calls_a_tool_gets_what_it_gave_back_and_is_not_replaced_then() {
    let replaced = server(spoken("I can't help with that.")).await;
    let gateway = Gateway::start(&routed(&replaced.url(), "", "")).await;
    assert_eq!(ask(&gateway, body("")).await.header("x-infergate-route"), "auto=large");
    assert_eq!(ask(&gateway, LOOPED.to_owned()).await.header("x-infergate-route"), "auto=large");
    assert_eq!(replaced.heard().len(), 3, "small, large, large");
    let stays = Wire::start(|heard| {
        let is_looped = String::from_utf8_lossy(&heard.body).contains("tool_call_id");
        said(spoken(if is_looped { "I can't help with that." } else { "fine" }), (7, 5))
    })
    .await;
    let gateway = Gateway::start(&routed(&stays.url(), "", "")).await;
    assert_eq!(ask(&gateway, body("")).await.header("x-infergate-route"), "auto=small");
    record(&gateway).await;
    assert_eq!(ask(&gateway, LOOPED.to_owned()).await.header("x-infergate-route"), "auto=small");
    let told = decision(&record(&gateway).await);
    assert_eq!(told, ("skip".to_owned(), "the model was chosen before, and is kept".to_owned()));
}
