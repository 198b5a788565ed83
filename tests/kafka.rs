//! Audit records in Kafka, with a cluster by other hands that goes away under load. `tests/run --kafka` runs these.

use std::path::Path;
use std::time::Duration;

use crate::nats::{firsts, journal};
use crate::support::kafka::Kafka;
use crate::support::{Client, Gateway, Load, chat, eventually, model_server, policy};

const HEALTHY: &str = "infergate_sink_healthy{sink=\"k\"}";
const LAG: &str = "infergate_sink_lag_lines{sink=\"k\"}";
const REFUSED: &str = "infergate_sink_refused_total{sink=\"k\"}";
/// Of Kafka's protocol.
const MESSAGE_TOO_LARGE: u32 = 10;
/// For what the gateway does by itself after a while.
const SOON: Duration = Duration::from_secs(60);

fn with_sink(server: &str, kafka: &Kafka, topic: &str) -> String {
    let brokers = &kafka.brokers;
    let sink = format!("name: k\n      timeout_ms: 2000\n      kafka: {{brokers: {brokers:?}, topic: {topic}}}");
    format!("{}audit:\n  commit_ms: 20\n  sinks:\n    - {sink}\n", policy(&[server], ""))
}

/// Everything that has been filed is delivered: each line, in order, in one partition, with its record's id as its key.
async fn has_all(kafka: &Kafka, gateway: &Gateway, records: u64) {
    let directory: &Path = gateway.directory.path();
    let all = || async {
        let journal = journal(directory);
        let filed = journal.iter().filter(|line| line.contains("\"kind\":\"request\"")).count();
        if filed as u64 != records || gateway.metric(LAG).await > 0.0 {
            return false;
        }
        let stored = kafka.stored();
        firsts(stored.iter().map(|message| message.value.as_str())) == journal
    };
    eventually("everything is delivered, in order", SOON, all).await;
    let (lines, stored) = (journal(directory).len(), kafka.stored());
    assert!(stored.iter().all(|message| message.partition == stored[0].partition));
    let is_named = |line: &str, key: &str| !line.contains("\"id\":") || line.contains(&format!("\"id\":\"{key}\""));
    assert!(stored.iter().all(|message| is_named(&message.value, &message.key)), "{:?}", stored.last());
    println!("{lines} lines, {} of them twice", stored.len() - lines);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_that_goes_away_under_load_gets_every_record_in_order() {
    let (server, kafka) = (model_server().await, Kafka::start(1, 3));
    let gateway = Gateway::start(&with_sink(&server.url(), &kafka, "audit")).await;
    let load = Load::start(gateway.address, 1);
    for _ in 0..3 {
        let flows = gateway.metric("infergate_sink_delivered_total{sink=\"k\"}").await;
        let more = || async { gateway.metric("infergate_sink_delivered_total{sink=\"k\"}").await > flows + 20.0 };
        eventually("records flow", SOON, more).await;
        kafka.down();
        let told = || async { gateway.metric(HEALTHY).await == 0.0 };
        eventually("the outage is on the metrics page", SOON, told).await;
        kafka.up();
        let well = || async { gateway.metric(HEALTHY).await == 1.0 };
        eventually("records flow again", SOON, well).await;
    }
    let tally = load.stop().await;
    assert!(tally.lost.is_empty(), "a sink that is down is no client's business: {tally:?}");
    has_all(&kafka, &gateway, tally.whole).await;
    assert!(gateway.log().contains("audit records cannot be delivered"));
    assert!(gateway.log().contains("audit records are delivered again"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_partition_that_another_broker_leads_is_followed_there() {
    let (server, kafka) = (model_server().await, Kafka::start(3, 1));
    let gateway = Gateway::start(&with_sink(&server.url(), &kafka, "audit")).await;
    let load = Load::start(gateway.address, 2);
    for broker in [2, 3, 1] {
        kafka.lead(0, broker);
        let before = gateway.metric("infergate_sink_delivered_total{sink=\"k\"}").await;
        let more = || async { gateway.metric("infergate_sink_delivered_total{sink=\"k\"}").await > before + 20.0 };
        eventually("records go to the new leader", SOON, more).await;
    }
    has_all(&kafka, &gateway, load.stop().await.whole).await;
}

#[tokio::test]
async fn what_a_broker_cannot_keep_now_and_a_batch_that_is_too_large_come_all_the_same() {
    let (server, kafka) = (model_server().await, Kafka::start(1, 1));
    let gateway = Gateway::start(&with_sink(&server.url(), &kafka, "audit")).await;
    let ask = || async { Client::h1().post(gateway.address, "/v1/chat/completions", chat(false, 1)).await.status };
    // NOT_ENOUGH_REPLICAS, REQUEST_TIMED_OUT.
    for (requests, error) in [(1, 19), (2, 7)] {
        kafka.answer(error);
        assert_eq!(ask().await, 200);
        has_all(&kafka, &gateway, requests).await;
    }
    kafka.down();
    for _ in 0..4 {
        assert_eq!(ask().await, 200);
    }
    let waits = || async { gateway.metric(LAG).await >= 4.0 };
    eventually("a batch waits", SOON, waits).await;
    kafka.answer(MESSAGE_TOO_LARGE);
    kafka.up();
    has_all(&kafka, &gateway, 6).await;
    assert_eq!(gateway.metric(REFUSED).await, 0.0, "it went in parts");
}

#[tokio::test]
async fn a_line_that_is_too_large_is_told_and_passed_over() {
    let (server, kafka) = (model_server().await, Kafka::start(1, 1));
    let gateway = Gateway::start(&with_sink(&server.url(), &kafka, "audit")).await;
    has_all(&kafka, &gateway, 0).await;
    let ask = || async { Client::h1().post(gateway.address, "/v1/chat/completions", chat(false, 1)).await };
    kafka.answer(MESSAGE_TOO_LARGE);
    let large = ask().await.header("x-request-id").to_owned();
    let over = || async { gateway.metric(REFUSED).await == 1.0 };
    eventually("it is passed over", SOON, over).await;
    let next = ask().await.header("x-request-id").to_owned();
    let there = || async { kafka.stored().iter().any(|message| message.key == next) };
    eventually("what is behind it comes", SOON, there).await;
    assert!(kafka.stored().iter().all(|message| message.key != large));
    assert!(gateway.log().lines().any(|line| line.contains("for good")), "{}", gateway.log());
}

#[tokio::test]
async fn a_topic_that_is_missing_is_told() {
    let (server, kafka) = (model_server().await, Kafka::start(1, 1));
    let gateway = Gateway::start(&with_sink(&server.url(), &kafka, "none")).await;
    let told = || async { gateway.log().contains("there is no topic none: make it") };
    eventually("the log says what is missing", SOON, told).await;
    assert_eq!(gateway.metric(HEALTHY).await, 0.0);
}
