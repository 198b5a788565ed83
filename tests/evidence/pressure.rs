//! A journal that does not keep up: requests are refused rather than served without a record, or the journal says how
//! many went without.

use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{CHAT, SOON, id};
use crate::support::{Answer, Client, Gateway, Journal, Simulated, chat, eventually, model_server, policy};

fn posts(server: &Simulated) -> usize {
    server.seen().iter().filter(|seen| seen.method == "POST").count()
}

/// A journal with three places whose commits do not come by themselves.
async fn three_places(server: &Simulated, on_error: &str) -> Gateway {
    let audit = format!("audit: {{places: 3, commit_ms: 60000, on_error: {on_error}}}\n");
    Gateway::start(&format!("{}{audit}", policy(&[&server.url()], ""))).await
}

async fn ask(gateway: &Gateway) -> Answer {
    Client::h1().post(gateway.address, CHAT, chat(false, 2)).await
}

/// All places are taken by records that wait for their commit.
async fn fill(gateway: &Gateway) {
    for _ in 0..3 {
        assert_eq!(ask(gateway).await.status, 200);
    }
    gateway.comes_to("infergate_requests_in_flight", 0.0).await;
}

#[tokio::test]
async fn a_request_without_room_for_its_record_is_refused_before_any_work() {
    let server = model_server().await;
    let gateway = three_places(&server, "deny").await;
    fill(&gateway).await;
    let before = posts(&server);
    let mut refused = 0;
    for client in Client::both() {
        for (path, code) in [(CHAT, "/error/code"), ("/v1/messages", "/error/type"), ("/generate", "/error_type")] {
            let answer = client.post(gateway.address, path, chat(true, 2)).await;
            assert_eq!(answer.status, 503, "{}", answer.text());
            assert!(answer.header("retry-after").parse::<u64>().unwrap() >= 1);
            assert_eq!((answer.header("x-should-retry"), id(&answer).len()), ("true", 36));
            let told = answer.json().pointer(code).cloned().unwrap_or_default();
            assert!(
                told == "audit_unavailable" || (path == "/v1/messages" && told == "overloaded_error"),
                "{}",
                answer.text()
            );
            refused += 1;
        }
        assert_eq!(
            client.get(gateway.address, "/v1/models").await.status,
            503,
            "what needs no upstream has no record either"
        );
        refused += 1;
    }
    assert_eq!(posts(&server), before, "no upstream was asked");
    gateway.comes_to(r#"infergate_refusals_total{code="audit_unavailable"}"#, f64::from(refused)).await;
    assert_eq!(gateway.metric(r#"infergate_journal_unrecorded_total{why="refused"}"#).await, f64::from(refused));
    assert_eq!(gateway.metric("infergate_journal_places").await, 3.0);
    // When the lines are on disk there is room again, as often as one likes.
    for _ in 0..4 {
        Journal::settled(&gateway).await;
        fill(&gateway).await;
    }
    let journal = Journal::settled(&gateway).await;
    assert_eq!(journal.ids().len(), 15);
    let gaps = journal.of_kind("gap");
    assert_eq!((gaps.len(), &gaps[0]["lost"], &gaps[0]["refused"]), (1, &json!(0), &json!(refused)), "{gaps:?}");
    let time = |name: &str| gaps[0][name].as_str().unwrap().to_owned();
    let before = journal.of_kind("request").iter().map(|record| record["at"].to_string()).min().unwrap();
    assert!(before < format!("\"{}\"", time("since")) && time("since") < time("at"), "{gaps:?}");
}

#[tokio::test]
async fn where_the_policy_allows_it_requests_go_without_a_record_and_the_journal_says_how_many() {
    let server = model_server().await;
    let mut gateway = three_places(&server, "allow").await;
    fill(&gateway).await;
    for client in Client::both() {
        for stream in [false, true, true] {
            let answer = client.post(gateway.address, CHAT, chat(stream, 2)).await;
            assert!(answer.status == 200 && answer.whole, "{}", answer.text());
        }
    }
    assert_eq!(gateway.metric(r#"infergate_journal_unrecorded_total{why="served"}"#).await, 6.0);
    let journal = Journal::settled(&gateway).await;
    assert_eq!(journal.ids().len(), 3);
    let gaps = journal.of_kind("gap");
    assert_eq!((gaps.len(), &gaps[0]["lost"]), (1, &json!(6)), "{gaps:?}");
    gateway.signal("TERM");
    gateway.ended(SOON).await;
    let notes = Journal::of(&gateway).proved()["notes"].to_string();
    assert!(notes.contains('6'), "the proof tells of it: {notes}");
}

#[tokio::test]
async fn another_time_between_commits_holds_at_once() {
    let server = model_server().await;
    let text = |ms: u32| format!("{}audit: {{commit_ms: {ms}}}\n", policy(&[&server.url()], ""));
    let gateway = Gateway::start(&text(60_000)).await;
    let journal = Journal::of(&gateway);
    let first = ask(&gateway).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(journal.ids().is_empty());
    assert_eq!(gateway.reload(&text(5)).await.status, 200);
    let second = ask(&gateway).await;
    let there = async || [&first, &second].iter().all(|answer| journal.ids().contains_key(id(answer)));
    eventually("both are on disk", SOON, there).await;
    assert_eq!(gateway.reload(&text(60_000)).await.status, 200);
    ask(&gateway).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(journal.ids().len(), 2);
}

#[tokio::test]
async fn places_are_given_back_however_a_request_ends() {
    let server = model_server().await;
    let text = format!(
        "{}audit: {{places: 3, commit_ms: 1}}\n",
        policy(
            &[&server.url()],
            "retry: {attempts: 1}\nbreaker: {failures: 0, requests_min: 1000000}\ntimeouts: {first_token_ms: 100}"
        )
    );
    let gateway = Gateway::start(&text).await;
    for (path, fault) in
        [(CHAT, ""), (CHAT, "reset"), (CHAT, "cut"), (CHAT, "hang"), ("/nobody", ""), ("/v1//x", "")].repeat(3)
    {
        for client in Client::both() {
            let headers: &[_] = if fault.is_empty() { &[] } else { &[("x-simulate-fault", fault)] };
            let answer =
                client.try_send(crate::support::http::post(gateway.address, path, headers, chat(true, 3))).await;
            let refused = answer.is_ok_and(|answer| answer.text().contains("audit_unavailable"));
            assert!(!refused, "{path} {fault}");
            Journal::settled(&gateway).await;
        }
        let gone = Client::h2();
        let address = gateway.address;
        let asking = tokio::spawn(async move {
            gone.post_with(address, CHAT, &[("x-simulate-fault", "stall")], chat(true, 9)).await
        });
        eventually("it runs", SOON, async || server.in_flight() == 1).await;
        asking.abort();
        Journal::settled(&gateway).await;
    }
    eventually("none is taken", SOON, async || {
        ask(&gateway).await;
        Journal::settled(&gateway).await;
        gateway.metric("infergate_journal_places_in_use").await == 0.0
    })
    .await;
}

/// Bounds the size of every file that the process writes.
fn limit_files(gateway: &Gateway, bytes: &str) {
    let limit = format!("--fsize={bytes}:");
    let done = Command::new("prlimit").args(["--pid", &gateway.pid().to_string(), &limit]).status();
    assert!(done.expect("prlimit is part of util-linux").success());
}

#[tokio::test]
async fn a_disk_that_fails_is_told_and_heals_without_a_restart_and_without_a_loss() {
    let server = model_server().await;
    let text = format!("{}audit: {{places: 20, commit_ms: 5}}\n", policy(&[&server.url()], ""));
    let mut gateway = Gateway::spawn_deaf("XFSZ", &text, "threads: 2\n");
    gateway.ready().await;
    let mut answered: Vec<String> = Vec::new();
    for _ in 0..10 {
        let answer = ask(&gateway).await;
        assert_eq!(answer.status, 200);
        answered.push(id(&answer).to_owned());
    }
    let journal = Journal::settled(&gateway).await;
    let mut refused = 0;
    for round in 0..2 {
        // Room for half a line more.
        limit_files(&gateway, &(journal.size() + 400).to_string());
        let begun = Instant::now();
        while gateway.metric("infergate_journal_failing").await == 0.0 || refused <= round {
            assert!(begun.elapsed() < SOON, "it is not told that the disk fails:\n{}", gateway.log());
            let answer = ask(&gateway).await;
            match answer.status {
                200 => answered.push(id(&answer).to_owned()),
                _ => refused += u32::from(answer.code() == "audit_unavailable"),
            }
        }
        assert!(gateway.log().contains("the journal cannot be written"), "{}", gateway.log());
        assert_eq!(gateway.admin("/readyz").await.status, 200);
        tokio::time::sleep(Duration::from_millis(600)).await;
        limit_files(&gateway, "unlimited");
        gateway.comes_to("infergate_journal_failing", 0.0).await;
        let answer = ask(&gateway).await;
        assert_eq!(answer.status, 200, "it is as before: {}", answer.text());
        answered.push(id(&answer).to_owned());
        Journal::settled(&gateway).await;
    }
    assert!(gateway.log().contains("the journal can be written again"));
    gateway.signal("TERM");
    assert_eq!(gateway.ended(SOON).await, Some(0));
    let ids = journal.ids();
    let lost: Vec<_> = answered.iter().filter(|id| ids.get(*id) != Some(&1)).collect();
    assert!(lost.is_empty() && ids.len() == answered.len(), "{lost:?}");
    let told: u64 = journal.of_kind("gap").iter().map(|gap| gap["refused"].as_u64().unwrap()).sum();
    assert_eq!(told, u64::from(refused));
    journal.proved();
}

#[tokio::test]
async fn an_answer_that_must_be_on_record_waits_for_a_disk_that_fails() {
    let server = model_server().await;
    let text = format!("{}audit: {{durable: before_response_end}}\n", policy(&[&server.url()], ""));
    let mut gateway = Gateway::spawn_deaf("XFSZ", &text, "threads: 2\n");
    gateway.ready().await;
    let first = ask(&gateway).await;
    limit_files(&gateway, &(Journal::of(&gateway).size() + 100).to_string());
    let address = gateway.address;
    let waiting: Vec<_> = Client::both()
        .into_iter()
        .flat_map(|client| [(client.clone(), false), (client, true)])
        .map(|(client, stream)| tokio::spawn(async move { client.post(address, CHAT, chat(stream, 2)).await }))
        .collect();
    gateway.comes_to("infergate_journal_failing", 1.0).await;
    tokio::time::sleep(Duration::from_millis(700)).await;
    assert!(waiting.iter().all(|answer| !answer.is_finished()), "nobody has the end of an answer without a record");
    limit_files(&gateway, "unlimited");
    let mut ids = vec![id(&first).to_owned()];
    for answer in waiting {
        let answer = answer.await.unwrap();
        assert!(answer.status == 200 && answer.whole, "{}", answer.text());
        ids.push(id(&answer).to_owned());
    }
    gateway.signal("TERM");
    gateway.ended(SOON).await;
    let kept: Vec<Value> = ids.iter().map(|id| Journal::of(&gateway).record(id)).collect();
    assert!(kept.iter().all(|record| record["outcome"] == "ok"), "{kept:?}");
    Journal::of(&gateway).proved();
}
