//! Every way in which a request can end is told as it was: when, by whom, after which attempts, and why.

use std::time::{Duration, Instant};

use http_body_util::BodyExt;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use super::{CHAT, SOON, id, in_order, record, words};
use crate::support::wire::read_until;
use crate::support::{
    Answer, Client, Gateway, Journal, Options, Simulated, chat, eventually, faulty_server, free_port, model_server,
    policy, raw,
};

/// No breaker and no health check, for tests of everything else.
const CALM: &str = "breaker: {failures: 0, requests_min: 1000000}\nhealth: {enabled: false}\n";

async fn calm(urls: &[&str], extra: &str, top: &str) -> Gateway {
    Gateway::start(&format!("{}{top}", policy(urls, &format!("{CALM}{extra}")))).await
}

/// The record of the only request that is not in `before`.
async fn newest(gateway: &Gateway) -> Value {
    Journal::settled(gateway).await.of_kind("request").pop().expect("a record")
}

/// Everything that a refusal told its client is in its record.
fn check_refusal(record: &Value, outcome: &str, code: &str, answer: &Answer) {
    assert_eq!((&record["outcome"], &record["code"]), (&json!(outcome), &json!(code)), "{record}");
    assert_eq!(record["status"], answer.status, "{record}");
    let told = answer.json();
    let message = told["error"]["message"].as_str().or(told["error"].as_str()).unwrap();
    assert_eq!(record["message"], message);
    assert_eq!(record["bytes"]["answer"], answer.body.len(), "{record}");
    let last = record["decisions"].as_array().unwrap().last().unwrap();
    assert_eq!(
        (&last["stage"], &last["rule"], &last["verdict"], &last["why"]),
        (&json!("refuse"), &json!(code), &json!("refuse"), &json!(message))
    );
}

#[tokio::test]
async fn every_refusal_is_on_record_with_its_reason() {
    let server = model_server().await;
    let gateway = calm(&[&server.url()], "", "requests: {body_bytes_max: 10000, body_ms: 300}\n").await;
    let long = chat(false, 1).replace("Hello", &"x".repeat(20_000));
    let posts = [
        ("bad_request", "/v1//models", chat(false, 1)),
        ("invalid_body", CHAT, "{\"model\": ".to_owned()),
        ("duplicate_field", CHAT, chat(false, 1).replacen('{', r#"{"model":"m","#, 1)),
        ("not_found", "/v1/nothing", chat(false, 1)),
        ("not_found", "/generate", r#"{"model":"m","inputs":"x"}"#.to_owned()),
        ("method_not_allowed", "/v1/models", chat(false, 1)),
        ("model_not_found", CHAT, chat(false, 1).replace("\"m\"", "\"other\"")),
        ("model_not_found", "/v1/messages", chat(false, 1).replace("\"m\"", "\"other\"")),
        ("request_too_large", CHAT, long),
    ];
    for client in Client::both() {
        for (code, path, body) in &posts {
            let answer = client.post(gateway.address, path, body.clone()).await;
            let record = record(&gateway, &answer).await;
            check_refusal(&record, "refused", code, &answer);
            assert_eq!(record["attempts"], json!([]), "nobody was asked");
        }
        let answer = client.get(gateway.address, "/v1/realtime?model=m").await;
        check_refusal(&record(&gateway, &answer).await, "refused", "upgrade_unsupported", &answer);
    }
    let slow =
        raw(gateway.address, format!("POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{{").as_bytes())
            .await;
    assert!(slow.starts_with("HTTP/1.1 408"), "{slow}");
    let record = newest(&gateway).await;
    assert_eq!(
        (&record["outcome"], &record["code"], &record["status"]),
        (&json!("refused"), &json!("request_timeout"), &json!(408))
    );
    assert!(record["times"]["ended"].as_u64().unwrap() >= 300_000, "{record}");
    // What is no HTTP has no head, and so no record.
    let before = Journal::settled(&gateway).await.ids().len();
    raw(gateway.address, b"no HTTP at all\r\n\r\n").await;
    assert_eq!(Journal::settled(&gateway).await.ids().len(), before);
    assert!(server.seen().iter().all(|seen| seen.method == "GET"));
}

#[tokio::test]
async fn who_finds_no_room_is_on_record_with_the_wait() {
    let server = faulty_server(&["hang"]).await;
    let gateway = calm(&[&server.url()], "concurrency: {max: 1, queue: 1, queue_ms: 400}", "").await;
    let address = gateway.address;
    let _running = tokio::spawn(async move { Client::h1().post(address, CHAT, chat(false, 1)).await });
    eventually("it runs", SOON, async || server.in_flight() == 1).await;
    let waiting = tokio::spawn(async move { Client::h2().post(address, CHAT, chat(false, 1)).await });
    gateway.comes_to(r#"infergate_pool_waiting{pool="p"}"#, 1.0).await;
    let full = Client::h1().post(address, CHAT, chat(false, 1)).await;
    let waited = waiting.await.unwrap();
    gateway.comes_to("infergate_requests_in_flight", 1.0).await;
    gateway.admin("/admin/v1/requests/01970000-0000-7000-8000-000000000000").await;
    let journal = Journal::of(&gateway);
    check_refusal(&journal.record(id(&full)), "refused", "queue_full", &full);
    let record = journal.record(id(&waited));
    check_refusal(&record, "refused", "queue_timeout", &waited);
    assert!(record["times"]["ended"].as_u64().unwrap() >= 400_000, "{record}");
    assert_eq!(words(&record["decisions"], "stage"), ["route", "refuse"]);
}

#[tokio::test]
async fn an_upstream_that_fails_is_on_record_with_what_it_did() {
    let server = model_server().await;
    let gateway = calm(
        &[&server.url()],
        "retry: {attempts: 1}\ntimeouts: {first_token_ms: 200, answer_ms: 200, between_tokens_ms: 200, total_ms: 900}",
        "",
    )
    .await;
    // What the model server does, whether a stream is asked for, and what the record says of it.
    let cases = [
        ("reset", false, "upstream_error", "upstream_closed", "reset", 0),
        ("garbage", false, "upstream_error", "upstream_invalid", "reset", 0),
        ("cut", true, "upstream_error", "upstream_closed", "broken", 0),
        ("cut", false, "upstream_error", "upstream_closed", "broken", 0),
        ("hang", true, "timeout", "first_token_timeout", "timeout", 200),
        ("hang", false, "timeout", "answer_timeout", "timeout", 200),
        ("stall", true, "timeout", "between_tokens_timeout", "broken", 200),
        ("delay-between=50", true, "timeout", "total_timeout", "broken", 900),
    ];
    for client in Client::both() {
        for (fault, stream, outcome, code, result, least_ms) in cases {
            let answer = client
                .try_send(crate::support::http::post(
                    gateway.address,
                    CHAT,
                    &[("x-simulate-fault", fault)],
                    chat(stream, 200),
                ))
                .await;
            let record = newest(&gateway).await;
            let told = format!("{fault} {stream}: {record}");
            assert_eq!((&record["outcome"], &record["code"]), (&json!(outcome), &json!(code)), "{told}");
            let [attempt] = record["attempts"].as_array().unwrap().as_slice() else { panic!("{told}") };
            assert_eq!(
                (&attempt["result"], &attempt["upstream"]),
                (&json!(result), &json!(server.address().to_string())),
                "{told}"
            );
            assert!(
                !attempt["why"].as_str().unwrap().is_empty() && !record["message"].as_str().unwrap().is_empty(),
                "{told}"
            );
            let (ended, times) = (record["times"]["ended"].as_u64().unwrap(), &record["times"]);
            assert!((least_ms * 1_000..(least_ms + 3_000) * 1_000).contains(&ended), "{told}");
            in_order(&[&times["admitted"], &attempt["began"], &attempt["ended"], &times["ended"]]);
            if let Ok(answer) = answer {
                assert_eq!(
                    (id(&answer), &record["status"]),
                    (record["id"].as_str().unwrap(), &json!(answer.status)),
                    "{told}"
                );
            }
            let verdict = if result == "broken" { "break off" } else { "refuse" };
            assert_eq!(record["decisions"].as_array().unwrap().last().unwrap()["verdict"], verdict, "{told}");
        }
    }
}

#[tokio::test]
async fn an_upstream_that_cannot_be_reached_is_on_record_and_so_is_a_pool_without_any() {
    let nobody = format!("http://127.0.0.1:{}", free_port());
    let gateway = Gateway::start(&policy(
        &[&nobody],
        "retry: {attempts: 1}\nbreaker: {failures: 1, open_ms: 60000}\nhealth: {enabled: false}",
    ))
    .await;
    let client = Client::h1();
    let failed = client.post(gateway.address, CHAT, chat(false, 1)).await;
    let told = record(&gateway, &failed).await;
    check_refusal(&told, "upstream_error", "connect_failed", &failed);
    assert_eq!((words(&told["attempts"], "result"), told["attempts"][0].get("head")), (vec!["connect"], None));
    let out = client.post(gateway.address, CHAT, chat(false, 1)).await;
    let told = record(&gateway, &out).await;
    check_refusal(&told, "refused", "no_upstream", &out);
    assert_eq!(told["attempts"], json!([]));
}

#[tokio::test]
async fn a_failover_is_on_record_attempt_by_attempt() {
    let (first, second) = (faulty_server(&["status=503", "slow-first=50"]).await, model_server().await);
    let urls = [
        format!("{}\n        zone: here\n        name: first", first.url()),
        format!("{}\n        zone: there\n        name: second", second.url()),
    ];
    let text = policy(&[&urls[0], &urls[1]], &format!("{CALM}retry: {{attempts: 2}}"));
    let gateway = Gateway::with(&text, "threads: 2\nzone: here\n", &[]).await;
    for client in Client::both() {
        for stream in [false, true] {
            let answer = client.post(gateway.address, CHAT, chat(stream, 3)).await;
            assert_eq!(answer.status, 200);
            let record = record(&gateway, &answer).await;
            let attempts = &record["attempts"];
            assert_eq!(
                (words(attempts, "upstream"), words(attempts, "result")),
                (vec!["first", "second"], vec!["status", "answered"]),
                "{record}"
            );
            assert_eq!(
                (&attempts[0]["status"], &attempts[1]["status"], &attempts[0]["why"]),
                (&json!(503), &json!(200), &json!("status 503"))
            );
            in_order(&[
                &attempts[0]["began"],
                &attempts[0]["head"],
                &attempts[0]["ended"],
                &attempts[1]["began"],
                &attempts[1]["head"],
                &attempts[1]["ended"],
            ]);
            let took = attempts[0]["ended"].as_u64().unwrap() - attempts[0]["began"].as_u64().unwrap();
            assert!(took >= 50_000, "{record}");
            assert_eq!(
                (&record["outcome"], &attempts[0]["received"], &record["bytes"]["answer"]),
                (&json!("ok"), &json!(0), &json!(answer.body.len()))
            );
        }
    }
    second.set_faults(vec!["status=500".parse().unwrap()]);
    let answer = Client::h1().post(gateway.address, CHAT, chat(false, 3)).await;
    let record = record(&gateway, &answer).await;
    assert_eq!(
        (answer.status, &record["status"], &record["outcome"]),
        (500, &json!(500), &json!("upstream_error")),
        "the upstream's own error was passed on: {record}"
    );
    assert_eq!(record["attempts"].as_array().unwrap().len(), 2, "{record}");
}

/// Waits until so many requests are on record, and returns the newest.
async fn recorded(gateway: &Gateway, count: usize) -> Value {
    eventually("it is on record", SOON, async || Journal::of(gateway).ids().len() == count).await;
    Journal::of(gateway).of_kind("request").pop().unwrap()
}

#[tokio::test]
async fn a_client_that_left_is_on_record_with_the_time_it_stayed() {
    let server = model_server().await;
    let gateway = calm(&[&server.url()], "concurrency: {max: 1}", "audit: {commit_ms: 5}\n").await;
    let address = gateway.address;
    let mut count = 0;
    for client in Client::both() {
        // Before the first token.
        let asking = tokio::spawn({
            let client = client.clone();
            async move { client.post_with(address, CHAT, &[("x-simulate-fault", "hang")], chat(true, 1)).await }
        });
        eventually("it runs", SOON, async || server.in_flight() == 1).await;
        // While it waits for its turn.
        let waiting = tokio::spawn({
            let client = client.clone();
            async move { client.post(address, CHAT, chat(false, 1)).await }
        });
        gateway.comes_to(r#"infergate_pool_waiting{pool="p"}"#, 1.0).await;
        tokio::time::sleep(Duration::from_millis(100)).await;
        waiting.abort();
        count += 1;
        let waited = recorded(&gateway, count).await;
        check_gone(&waited, &[]);
        assert!(waited["times"]["queued"].is_null() && waited["status"].is_null(), "{waited}");
        asking.abort();
        count += 1;
        let asked = recorded(&gateway, count).await;
        check_gone(&asked, &["cancelled"]);
        assert!(asked["status"].is_null() && asked["times"]["first"].is_null(), "{asked}");
        assert_eq!(words(&asked["decisions"], "stage"), ["route", "queue"], "this pool takes one: {asked}");
        in_order(&[&asked["times"]["admitted"], &asked["times"]["queued"], &asked["times"]["ended"]]);
        // In the middle of a stream.
        let mut stream = client.open(address, CHAT, &[("x-simulate-fault", "stall")], chat(true, 9)).await.into_body();
        let first = stream.frame().await.unwrap().unwrap().into_data().unwrap();
        tokio::time::sleep(Duration::from_millis(100)).await;
        drop(stream);
        count += 1;
        let left = recorded(&gateway, count).await;
        check_gone(&left, &["cancelled"]);
        assert_eq!((&left["status"], &left["attempts"][0]["status"]), (&json!(200), &json!(200)));
        assert!(left["bytes"]["answer"].as_u64().unwrap() >= first.len() as u64, "{left}");
        // With half a body.
        let mut half = TcpStream::connect(address).await.unwrap();
        half.write_all(format!("POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{{").as_bytes())
            .await
            .unwrap();
        gateway.comes_to("infergate_requests_in_flight", 1.0).await;
        tokio::time::sleep(Duration::from_millis(100)).await;
        drop(half);
        count += 1;
        check_gone(&recorded(&gateway, count).await, &[]);
    }
}

fn check_gone(record: &Value, results: &[&str]) {
    assert_eq!(
        (&record["outcome"], words(&record["attempts"], "result")),
        (&json!("client_closed"), results.to_vec()),
        "{record}"
    );
    let ended = record["times"]["ended"].as_u64().unwrap();
    assert!((90_000..5_000_000).contains(&ended), "it stayed for 100 ms: {record}");
}

#[tokio::test]
async fn what_the_end_of_the_process_cuts_is_on_record_as_aborted() {
    let slow = Options { models: vec!["m".to_owned()], tokens_per_second: 20.0, ..Options::default() };
    let server = Simulated::start(slow).await.unwrap();
    let settings = "threads: 2\nshutdown: {drain_delay_ms: 0, drain_ms: 1000}\n";
    for durable in ["soon", "before_response_end"] {
        let text = format!("{}audit: {{durable: {durable}, commit_ms: 2000}}\n", policy(&[&server.url()], CALM));
        let mut gateway = Gateway::with(&text, settings, &[]).await;
        let mut open = Vec::new();
        for client in Client::both() {
            open.push(client.open(gateway.address, CHAT, &[], chat(true, 2_000)).await);
        }
        let address = gateway.address;
        let _quiet = tokio::spawn(async move { Client::h1().post(address, CHAT, chat(false, 2_000)).await });
        let mut socket = TcpStream::connect(address).await.unwrap();
        socket.write_all(b"GET /v1/realtime?model=m HTTP/1.1\r\nhost: x\r\nupgrade: websocket\r\nconnection: upgrade\r\nsec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n").await.unwrap();
        assert!(read_until(&mut socket, "\r\n\r\n").await.contains("101"));
        eventually("all four run", SOON, async || gateway.metric("infergate_requests_in_flight").await == 4.0).await;
        let begun = Instant::now();
        gateway.signal("TERM");
        gateway.ended(Duration::from_secs(8)).await;
        assert!(begun.elapsed() >= Duration::from_millis(900));
        let journal = Journal::of(&gateway);
        let records = journal.of_kind("request");
        assert_eq!(records.len(), 4, "{durable}: {records:#?}");
        for record in &records {
            assert_eq!(
                (&record["outcome"], words(&record["attempts"], "result")),
                (&json!("aborted"), vec!["cancelled"]),
                "{record}"
            );
            assert!(record["times"]["ended"].as_u64().unwrap() >= 900_000, "{record}");
            let running = ["/v1/realtime", CHAT].contains(&record["surface"].as_str().unwrap());
            assert!(running && record["attempts"][0]["upstream"] == server.address().to_string(), "{record}");
        }
        for answer in &open {
            let record = journal.record(answer.headers()["x-request-id"].to_str().unwrap());
            assert!(record["status"] == 200 && record["bytes"]["answer"].as_u64().unwrap() > 100, "{record}");
        }
        assert_eq!(journal.proved()["runs"][0]["end"], "closed");
    }
}
