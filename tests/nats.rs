//! Audit records in NATS JetStream, with a real server that is killed under load.

use std::collections::HashSet;
use std::path::Path;
use std::time::Duration;

use infergate::audit::read;

use crate::support::nats::Nats;
use crate::support::{Client, Gateway, Load, chat, eventually, model_server, policy};

fn with_sink(server: &str, nats: &str) -> String {
    let sinks = format!("  sinks:\n    - name: js\n      timeout_ms: 2000\n      nats: {{servers: ['{nats}']}}\n");
    format!("{}audit:\n  commit_ms: 20\n{sinks}", policy(&[server], ""))
}

/// Every line of a journal with one run.
pub fn journal(directory: &Path) -> Vec<String> {
    let run = read::runs(&directory.join("journal")).unwrap().remove(0);
    let mut lines = run.lines(1);
    let mut all = Vec::new();
    while let Some(line) = lines.next().unwrap() {
        all.push(String::from_utf8(line.to_vec()).unwrap());
    }
    all
}

/// The payloads of messages in the order of their first arrival.
pub fn firsts<'a>(payloads: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let mut seen = HashSet::new();
    payloads.filter(|payload| seen.insert(*payload)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_killed_under_load_gets_every_record_in_order() {
    let (server, mut nats) = (model_server().await, Nats::start().await);
    nats.make_stream("AUDIT", "infergate.audit.>").await;
    let gateway = Gateway::start(&with_sink(&server.url(), &nats.url())).await;
    let (healthy, lag) = ("infergate_sink_healthy{sink=\"js\"}", "infergate_sink_lag_lines{sink=\"js\"}");
    let load = Load::start(gateway.address, 2);
    for _ in 0..3 {
        tokio::time::sleep(Duration::from_millis(700)).await;
        nats.kill();
        let told = || async { gateway.metric(healthy).await == 0.0 };
        eventually("the outage is on the metrics page", Duration::from_secs(5), told).await;
        nats.restart().await;
        let well = || async { gateway.metric(healthy).await == 1.0 };
        eventually("records flow again", Duration::from_secs(30), well).await;
    }
    let tally = load.stop().await;
    assert!(tally.lost.is_empty(), "a sink that is down is no client's business: {tally:?}");
    let all = || async {
        let records =
            journal(gateway.directory.path()).iter().filter(|line| line.contains("\"kind\":\"request\"")).count();
        records as u64 == tally.whole && gateway.metric(lag).await == 0.0
    };
    eventually("everything is delivered", Duration::from_secs(60), all).await;
    let (journal, stored) = (journal(gateway.directory.path()), nats.stored("AUDIT").await);
    let came = firsts(stored.iter().map(|message| message.payload.as_str()));
    assert!(came == journal, "{} lines of {} came, or in another order", came.len(), journal.len());
    println!("{} lines, {} of them twice", journal.len(), stored.len() - journal.len());
    assert!(gateway.log().contains("audit records cannot be delivered"));
    assert!(gateway.log().contains("audit records are delivered again"));
}

#[tokio::test]
async fn a_record_is_known_by_its_id_and_goes_to_the_subject_of_its_kind() {
    let (server, nats) = (model_server().await, Nats::start().await);
    nats.make_stream("AUDIT", "infergate.audit.>").await;
    let gateway = Gateway::start(&with_sink(&server.url(), &nats.url())).await;
    let answer = Client::h1().post(gateway.address, "/v1/chat/completions", chat(false, 1)).await;
    let id = answer.header("x-request-id").to_owned();
    let there = || async { nats.stored("AUDIT").await.iter().any(|message| message.id == id) };
    eventually("the record is there", Duration::from_secs(10), there).await;
    let stored = nats.stored("AUDIT").await;
    let record = stored.iter().find(|message| message.id == id).unwrap();
    assert_eq!(record.subject, "infergate.audit.request");
    assert_eq!(stored[0].subject, "infergate.audit.open");
}

#[tokio::test]
async fn a_stream_that_is_missing_is_told_and_made_later() {
    let (server, nats) = (model_server().await, Nats::start().await);
    let gateway = Gateway::start(&with_sink(&server.url(), &nats.url())).await;
    let told = || async { gateway.log().contains("no stream takes the subject infergate.audit.open") };
    eventually("the log says what is missing", Duration::from_secs(10), told).await;
    nats.make_stream("AUDIT", "infergate.audit.>").await;
    let there = || async { !nats.stored("AUDIT").await.is_empty() };
    eventually("the first line is there", Duration::from_secs(30), there).await;
}

/// What is too large for a stream, or for the server, is refused for good: everything behind it still comes.
#[tokio::test]
async fn a_record_that_is_too_large_is_passed_over() {
    let (server, mut nats) = (model_server().await, Nats::start().await);
    nats.make_stream_for("AUDIT", "infergate.audit.>", LARGE).await;
    nats.make_stream("OTHER", "infergate.other.>").await;
    let first = Gateway::start(&with_sink(&server.url(), &nats.url())).await;
    refuses_only_the_large_ones(&first, &nats).await;
    drop(first);
    nats.kill();
    nats.restart_with(&format!("max_payload: {LARGE}\n")).await;
    let policy = with_sink(&server.url(), &nats.url()).replace("nats: {", "nats: {subject: 'infergate.other.{kind}', ");
    let second = Gateway::start(&policy).await;
    refuses_only_the_large_ones(&second, &nats).await;
}

/// Between the length of a short record and that of one with a long name in it.
const LARGE: i32 = 1400;

async fn refuses_only_the_large_ones(gateway: &Gateway, nats: &Nats) {
    for model in ["m", &"x".repeat(250), "m"] {
        let body = chat(false, 1).replace("\"m\"", &format!("\"{model}\""));
        Client::h1().post(gateway.address, "/v1/chat/completions", body).await;
    }
    let (refused, lag) = ("infergate_sink_refused_total{sink=\"js\"}", "infergate_sink_lag_lines{sink=\"js\"}");
    let records = || journal(gateway.directory.path()).iter().filter(|line| line.contains("\"usage\"")).count();
    let over = || async { records() >= 2 && gateway.metric(refused).await > 0.0 && gateway.metric(lag).await == 0.0 };
    eventually("everything else is delivered", Duration::from_secs(20), over).await;
    let (large, journal): (Vec<_>, Vec<_>) =
        journal(gateway.directory.path()).into_iter().partition(|line| line.contains("xxx"));
    let stored = [nats.stored("AUDIT").await, nats.stored("OTHER").await].concat();
    let came: Vec<&str> = stored.iter().map(|message| message.payload.as_str()).collect();
    assert!(journal.iter().all(|line| came.contains(&line.as_str())), "{came:#?}");
    assert!(large.len() == 1 && !came.contains(&large[0].as_str()), "{large:?}");
    assert_eq!(gateway.metric(refused).await, 1.0);
    let told: Vec<String> = gateway.log().lines().filter(|line| line.contains("for good")).map(str::to_owned).collect();
    let seq: serde_json::Value = serde_json::from_str(&large[0]).unwrap();
    assert!(told.len() == 1 && told[0].contains(&format!("\"seq\":{}", seq["seq"])), "{told:?}");
}
