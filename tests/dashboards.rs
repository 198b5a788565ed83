//! The dashboards and alerts that ship: a real Prometheus scrapes a gateway that has seen all kinds of traffic, and
//! answers every query of every panel; no panel is empty, no alert is broken.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use infergate::policy::problem::Document;
use serde_json::Value;
use tokio::task::JoinHandle;

use crate::support::http::post;
use crate::support::prometheus::{Prometheus, command, shipped};
use crate::support::redis::Redis;
use crate::support::{Client, Gateway, Options, Simulated, chat, eventually, faulty_server, model_server};

const CHAT: &str = "/v1/chat/completions";

/// Good, bad, slow and dead upstreams; a fallback; a queue with one place; a budget that soon refuses retries; a limit
/// that is soon spent; guardrails that block, take out and tell.
fn policy([good, bad, slow]: [&Simulated; 3], store: &Redis, comment: &str) -> String {
    let (good, bad, slow, store) = (good.url(), bad.url(), slow.url(), store.url());
    format!(
        "# {comment}
version: 1
audit:
  sinks:
    - {{name: disk, file: {{path: records.jsonl}}}}
    - {{name: nowhere, webhook: {{url: 'http://127.0.0.1:9/'}}}}
telemetry: {{traces: {{endpoint: 'http://127.0.0.1:9', share: 1}}}}
shared: {{redis: {{url: '{store}'}}, replicas: 1, timeout_ms: 1000}}
prices: {{list: [{{models: [m], pool: good, input: 1, output: 4}}]}}
models:
  - {{name: m, pool: good}}
  - {{name: breaks, pool: bad}}
  - {{name: saved, pool: bad, rename: m, fallbacks: [{{pool: good}}]}}
  - {{name: waits, pool: slow, rename: m}}
  - {{name: dead, pool: dead, rename: m}}
  - {{name: spent, pool: good, rename: m}}
limits:
  - {{name: pocket, models: [spent], output_tokens: 10, per: total, warn_at: [50]}}
  - {{requests: 1000000, per: 1m}}
routers:
  auto: {{default: m, ask: [{{signals: {{name: code, model: m, code: true}}}}]}}
  steps: {{default: breaks, cascade: {{models: [breaks, m]}}}}
guardrails:
  - {{name: cards, in: [prompt.user], verdict: block, pii: {{find: [card]}}}}
  - {{name: addresses, in: [prompt.user], verdict: redact, pii: {{find: [email]}}}}
  - {{name: greetings, in: [prompt.user], verdict: flag, words: {{list: [hello]}}}}
pools:
  good: {{upstreams: [{{url: '{good}'}}]}}
  bad:
    upstreams: [{{url: '{bad}'}}]
    breaker: {{failures: 0, requests_min: 1000000}}
    retry: {{attempts: 3, backoff_ms: 1}}
  slow: {{upstreams: [{{url: '{slow}'}}], concurrency: {{max: 1, queue: 1, queue_ms: 30000}}}}
  dead: {{upstreams: [{{url: 'http://127.0.0.1:9'}}], health: {{interval_ms: 200}}, breaker: {{failures: 1}}}}
"
    )
}

/// Requests of all kinds until the task is aborted.
fn traffic(gateway: SocketAddr) -> JoinHandle<()> {
    tokio::spawn(async move {
        let client = Client::h1();
        let named = |model: &str, stream| chat(stream, 5).replace(r#""model":"m""#, &format!(r#""model":"{model}""#));
        loop {
            let models = ["m", "breaks", "dead", "nobody", "spent", "auto", "steps"].map(|model| (model, false));
            for (model, stream) in models.into_iter().chain([("m", true), ("saved", true)]) {
                let body = named(model, stream)
                    .replace("\"stream\"", "\"stream_options\":{\"include_usage\":true},\"stream\"");
                let _any = client.try_send(post(gateway, CHAT, &[], body)).await;
            }
            for said in ["4111 1111 1111 1111", "ada@example.com"] {
                let _any = client.try_send(post(gateway, CHAT, &[], chat(false, 1).replace("Hello", said))).await;
            }
            let input = r#"{"model":"m","input":"Hello"}"#;
            let _any = client.try_send(post(gateway, "/v1/embeddings", &[], input)).await;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
}

/// Three at a time for a pool that takes one and lets one wait.
fn crowd(gateway: SocketAddr) -> Vec<JoinHandle<()>> {
    let waiting = || async move {
        let client = Client::h1();
        loop {
            let body = chat(false, 1).replace(r#""model":"m""#, r#""model":"waits""#);
            let _any = client.try_send(post(gateway, CHAT, &[], body)).await;
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    (0..3).map(|_| tokio::spawn(waiting())).collect()
}

/// Every panel of every dashboard: its place and its queries.
fn panels() -> Vec<(String, Vec<String>)> {
    let mut panels = Vec::new();
    for (name, dashboard) in dashboards() {
        for panel in dashboard["panels"].as_array().unwrap() {
            let queries = panel["targets"].as_array().unwrap().iter();
            let queries = queries.map(|target| target["expr"].as_str().unwrap().to_owned()).collect();
            panels.push((format!("{name}: {}", panel["title"].as_str().unwrap()), queries));
        }
    }
    panels
}

fn dashboards() -> BTreeMap<String, Value> {
    let files = fs::read_dir(shipped("grafana/dashboards")).unwrap().map(|entry| entry.unwrap().path());
    files
        .map(|path| {
            let dashboard = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
            (path.file_stem().unwrap().to_str().unwrap().to_owned(), dashboard)
        })
        .collect()
}

/// A query as Grafana asks it: its variables filled in.
fn filled(query: &str) -> String {
    let query = query.replace("$__rate_interval", "10s").replace("$__range", "1m");
    let query = query.replace("$model", ".*").replace("$pool", ".*");
    assert!(!query.contains('$'), "a variable that no dashboard has: {query}");
    query
}

/// Whether a query has anything to show: a series with a number.
async fn shows(prometheus: &Prometheus, query: &str) -> bool {
    let number = |series: &Value| series["value"][1].as_str().is_some_and(|value| value != "NaN");
    prometheus.query(&filled(query)).await.iter().any(number)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_panel_is_empty_and_every_alert_can_be_evaluated() {
    let (good, bad) = (model_server().await, faulty_server(&["status=500"]).await);
    let options = Options { models: vec!["m".to_owned()], ..Options::default() };
    let slow = Simulated::start(options).await.unwrap();
    slow.set_faults(vec!["slow-first=700".parse().unwrap()]);
    let (servers, mut store) = ([&good, &bad, &slow], Redis::start().await);
    let gateway = Gateway::start(&policy(servers, &store, "first")).await;
    let prometheus = Prometheus::start(gateway.admin).await;
    let mut tasks = crowd(gateway.address);
    tasks.push(traffic(gateway.address));

    tokio::time::sleep(Duration::from_secs(4)).await;
    assert_eq!(gateway.reload(&policy(servers, &store, "second")).await.status, 200);
    assert_eq!(gateway.reload("version: 1\nmodels: nonsense\n").await.status, 422);

    let mut empty = panels();
    let start = Instant::now();
    while !empty.is_empty() && start.elapsed() < Duration::from_secs(60) {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let mut still = Vec::new();
        for (panel, queries) in empty {
            let mut left = Vec::new();
            for query in queries {
                if !shows(&prometheus, &query).await {
                    left.push(query);
                }
            }
            if !left.is_empty() {
                still.push((panel, left));
            }
        }
        empty = still;
    }
    assert!(empty.is_empty(), "{empty:#?}");
    alerts_evaluate(&prometheus).await;
    store.kill();
    let stirs = async || rules(&prometheus).await.iter().any(|rule| is(rule, "InfergateStoreAway") && !is_quiet(rule));
    eventually("the store is missed", Duration::from_secs(60), stirs).await;
    every_metric_of_an_alert_exists(&gateway).await;
    tasks.iter().for_each(JoinHandle::abort);
}

/// Prometheus has loaded all alerts and evaluates each without an error; those whose trouble is there stir.
async fn alerts_evaluate(prometheus: &Prometheus) {
    const STIR: [&str; 8] = [
        "InfergateLimitNearlySpent",
        "InfergatePolicyRefused",
        "InfergateRequestsFail",
        "InfergateRefusesForWantOfRoom",
        "InfergateEndpointUnhealthy",
        "InfergatePoolIsOut",
        "InfergateRetryBudgetSpent",
        "InfergateSinkFails",
    ];
    const QUIET: [&str; 8] = [
        "InfergateDown",
        "InfergateSheds",
        "InfergatePoliciesDiffer",
        "InfergateJournalFails",
        "InfergateGuardrailCannotRead",
        "InfergateLedgerBehind",
        "InfergateLimitsUnavailable",
        "InfergateStoreAway",
    ];
    let stirred = async || {
        let rules = rules(prometheus).await;
        STIR.iter().all(|name| rules.iter().any(|rule| is(rule, name) && !is_quiet(rule)))
    };
    eventually("the alerts stir", Duration::from_secs(30), stirred).await;
    let rules = rules(prometheus).await;
    assert!(rules.len() > 20, "{}", rules.len());
    for rule in &rules {
        assert_eq!((rule["health"].as_str(), rule["lastError"].as_str()), (Some("ok"), None), "{rule}");
    }
    for quiet in QUIET {
        assert!(rules.iter().any(|rule| is(rule, quiet) && is_quiet(rule)), "{quiet}");
    }
}

fn is(rule: &Value, name: &str) -> bool {
    rule["name"] == name
}

fn is_quiet(rule: &Value) -> bool {
    rule["state"] == "inactive"
}

async fn rules(prometheus: &Prometheus) -> Vec<Value> {
    let groups = prometheus.api("rules").await;
    let groups = groups["groups"].as_array().unwrap().iter();
    groups.flat_map(|group| group["rules"].as_array().unwrap().clone()).collect()
}

/// A misspelt name is no error to Prometheus, only an alert that never comes.
async fn every_metric_of_an_alert_exists(gateway: &Gateway) {
    let page = gateway.admin("/metrics").await.text();
    let rules = fs::read_to_string(shipped("prometheus/alerts.yaml")).unwrap();
    let words = rules.split(|letter: char| !letter.is_ascii_alphanumeric() && letter != '_');
    let named: BTreeSet<&str> = words
        .filter(|word| {
            ["infergate_", "gen_ai_server_", "gen_ai_client", "process_", "tokio_"]
                .iter()
                .any(|ours| word.starts_with(ours))
        })
        .collect();
    assert!(named.len() > 15, "{named:?}");
    for name in named {
        let there = page.lines().any(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' '])));
        assert!(there, "{name} is asked for by an alert, and no such metric exists");
    }
}

#[test]
fn promtool_finds_nothing_wrong_with_rules_and_configuration() {
    for arguments in [["check", "rules"], ["check", "config"]] {
        let file = if arguments[1] == "rules" { "prometheus/alerts.yaml" } else { "prometheus/prometheus.yaml" };
        let checked = command("promtool").args(arguments).arg(shipped(file)).output().unwrap();
        assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stderr));
    }
}

#[test]
fn the_files_for_grafana_are_sound() {
    for file in ["datasources/prometheus.yaml", "dashboards/infergate.yaml"] {
        let text = fs::read_to_string(shipped("grafana/provisioning").join(file)).unwrap();
        assert_eq!(Document::parse(&text).unwrap().value["apiVersion"], 1, "{file}");
    }
}

#[test]
fn every_alert_says_what_it_means_where_to_look_and_what_to_do() {
    let text = fs::read_to_string(shipped("prometheus/alerts.yaml")).unwrap();
    let rules = Document::parse(&text).unwrap().value;
    for rule in rules["groups"].as_array().unwrap().iter().flat_map(|group| group["rules"].as_array().unwrap()) {
        for words in ["summary", "means", "look", "do"] {
            assert!(rule["annotations"][words].as_str().is_some_and(|text| text.len() > 20), "{words}: {rule}");
        }
        assert!(["page", "ticket"].contains(&rule["labels"]["severity"].as_str().unwrap()), "{rule}");
    }
}

#[test]
fn every_dashboard_asks_the_data_source_of_its_reader() {
    let mut uids = BTreeSet::new();
    for (name, dashboard) in dashboards() {
        assert!(uids.insert(dashboard["uid"].as_str().unwrap().to_owned()), "{name}");
        let variables: Vec<&Value> = dashboard["templating"]["list"].as_array().unwrap().iter().collect();
        assert_eq!((&variables[0]["name"], &variables[0]["type"]), (&"DS".into(), &"datasource".into()), "{name}");
        for panel in dashboard["panels"].as_array().unwrap() {
            let sources = panel["targets"].as_array().unwrap().iter().chain([panel]);
            assert!(sources.clone().all(|from| from["datasource"]["uid"] == "${DS}"), "{name}: {}", panel["title"]);
            assert!(panel["description"].as_str().is_some_and(|text| !text.is_empty()), "{name}: {}", panel["title"]);
        }
    }
    assert_eq!(uids.len(), 6);
}
