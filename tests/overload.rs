//! More requests than there is room for: who waits, who goes first, who is told to come back, and when.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::task::{JoinHandle, JoinSet};

use crate::support::{
    Answer, Client, Gateway, Journal, Options, Simulated, chat, eventually, faulty_server, model_server, policy, raw,
};

const CHAT: &str = "/v1/chat/completions";
/// Slack for a loaded machine.
const SOON: Duration = Duration::from_secs(5);

fn posts(server: &Simulated) -> usize {
    server.seen().iter().filter(|seen| seen.method == "POST").count()
}

/// A request on a task of its own.
fn spawn(
    client: &Client,
    gateway: &Gateway,
    headers: &[(&'static str, &'static str)],
    body: String,
) -> JoinHandle<Answer> {
    let (client, address, headers) = (client.clone(), gateway.address, headers.to_vec());
    tokio::spawn(async move { client.post_with(address, CHAT, &headers, body).await })
}

/// Waits until so many requests are in the queue of pool `p`.
async fn queued(gateway: &Gateway, count: f64) {
    let waiting = async || gateway.metric(r#"infergate_pool_waiting{pool="p"}"#).await == count;
    eventually(&format!("{count} requests wait"), SOON, waiting).await;
}

/// The values of a header in the order in which the server saw the requests.
fn order(server: &Simulated, header: &str) -> Vec<String> {
    let posts = server.seen().into_iter().filter(|seen| seen.method == "POST");
    posts.filter_map(|seen| seen.headers.get(header).map(|value| value.to_str().unwrap().to_owned())).collect()
}

// The gate.

#[tokio::test]
async fn a_pool_never_runs_more_requests_than_it_may_and_all_get_their_turn() {
    let server = faulty_server(&["slow-first=30"]).await;
    let gateway = Gateway::start(&policy(&[&server.url()], "concurrency: {max: 4}")).await;
    for client in Client::both() {
        let running: Vec<_> = (0..40).map(|n| spawn(&client, &gateway, &[], chat(n % 2 == 0, 1))).collect();
        let most = AtomicUsize::new(0);
        eventually("all are answered", SOON, async || {
            most.fetch_max(server.in_flight(), Relaxed);
            running.iter().all(JoinHandle::is_finished)
        })
        .await;
        assert!((3..=4).contains(&most.load(Relaxed)), "{most:?} at once");
        for answer in running {
            assert_eq!(answer.await.unwrap().status, 200);
        }
    }
    gateway.comes_to(r#"infergate_pool_in_flight{pool="p"}"#, 0.0).await;
}

#[tokio::test]
async fn a_stream_keeps_its_place_until_its_end() {
    let server = model_server().await;
    let gateway = Gateway::start(&policy(&[&server.url()], "concurrency: {max: 1}")).await;
    for client in Client::both() {
        server.set_faults(vec!["delay-between=40,times=1".parse().unwrap()]);
        let stream = spawn(&client, &gateway, &[], chat(true, 10));
        eventually("the stream runs", SOON, async || server.in_flight() == 1).await;
        let before = posts(&server);
        let next = spawn(&client, &gateway, &[], chat(false, 1));
        queued(&gateway, 1.0).await;
        assert_eq!(posts(&server), before);
        let next = next.await.unwrap();
        assert!(stream.is_finished() || stream.await.unwrap().whole, "the stream ended first");
        assert_eq!(next.status, 200);
        let timing = next.header("server-timing");
        assert!(timing.contains("queue;dur="), "{timing}");
    }
}

#[tokio::test]
async fn beyond_the_queue_a_request_is_told_to_come_back() {
    let server = faulty_server(&["hang"]).await;
    let gateway = Gateway::start(&policy(&[&server.url()], "concurrency: {max: 1, queue: 2}")).await;
    let client = Client::h1();
    let _running = spawn(&client, &gateway, &[], chat(false, 1));
    eventually("it runs", SOON, async || server.in_flight() == 1).await;
    let _waiting = [spawn(&client, &gateway, &[], chat(false, 1)), spawn(&client, &gateway, &[], chat(false, 1))];
    queued(&gateway, 2.0).await;
    for client in Client::both() {
        for stream in [false, true] {
            let answer = client.post(gateway.address, CHAT, chat(stream, 1)).await;
            assert_eq!((answer.status, answer.code().as_str()), (503, "queue_full"));
            assert!(answer.header("retry-after").parse::<u64>().unwrap() >= 1);
            assert_eq!((answer.header("x-should-retry"), answer.header("x-infergate-attempts")), ("true", "0"));
        }
    }
    assert_eq!(posts(&server), 1);
}

#[tokio::test]
async fn the_time_to_come_back_is_what_the_queue_really_takes() {
    let server = faulty_server(&["slow-first=500"]).await;
    let gateway = Gateway::start(&policy(&[&server.url()], "concurrency: {max: 1, queue: 7}")).await;
    let client = Client::h1();
    for _ in 0..2 {
        assert_eq!(client.post(gateway.address, CHAT, chat(false, 1)).await.status, 200);
    }
    let running = spawn(&client, &gateway, &[], chat(false, 1));
    eventually("it runs", SOON, async || server.in_flight() == 1).await;
    let mut waiting: Vec<_> = (0..7).map(|_| spawn(&client, &gateway, &[], chat(false, 1))).collect();
    queued(&gateway, 7.0).await;
    let answer = client.post(gateway.address, CHAT, chat(false, 1)).await;
    let told: f64 = answer.header("retry-after").parse().unwrap();
    // The eighth in the line of a server that takes half a second each.
    assert!((4.0..=6.0).contains(&told), "{told}");
    waiting.push(running);
    waiting.iter().for_each(JoinHandle::abort);
}

#[tokio::test]
async fn a_wait_that_takes_too_long_ends_in_time_and_leaves_no_trace() {
    let server = faulty_server(&["hang"]).await;
    let gateway = Gateway::start(&policy(&[&server.url()], "concurrency: {max: 1, queue_ms: 300}")).await;
    let _running = spawn(&Client::h1(), &gateway, &[], chat(false, 1));
    eventually("it runs", SOON, async || server.in_flight() == 1).await;
    for client in Client::both() {
        let start = Instant::now();
        let answer = client.post(gateway.address, CHAT, chat(false, 1)).await;
        let took = start.elapsed();
        assert_eq!((answer.status, answer.code().as_str()), (503, "queue_timeout"));
        assert!(answer.header("retry-after").parse::<u64>().unwrap() >= 1);
        assert!(took >= Duration::from_millis(295) && took < Duration::from_millis(1_000), "{took:?}");
    }
    queued(&gateway, 0.0).await;
    assert_eq!(posts(&server), 1);
}

#[tokio::test]
async fn the_total_time_counts_in_the_queue_too() {
    let server = faulty_server(&["hang"]).await;
    let extra = "concurrency: {max: 1}\ntimeouts: {total_ms: 400}";
    let gateway = Gateway::start(&policy(&[&server.url()], extra)).await;
    let running = spawn(&Client::h1(), &gateway, &[], chat(false, 1));
    eventually("it runs", SOON, async || server.in_flight() == 1).await;
    server.set_faults(Vec::new());
    let (start, waiting) = (Instant::now(), spawn(&Client::h2(), &gateway, &[], chat(false, 1)));
    assert_eq!(running.await.unwrap().code(), "total_timeout");
    assert_eq!(waiting.await.unwrap().status, 200, "its turn came in time: after {:?}", start.elapsed());
    server.set_faults(vec!["hang".parse().unwrap()]);
    let _running = spawn(&Client::h1(), &gateway, &[], chat(false, 1));
    eventually("it runs", SOON, async || server.in_flight() == 1).await;
    let longer = gateway.reload(&policy(&[&server.url()], "concurrency: {max: 1}\ntimeouts: {total_ms: 200}")).await;
    assert_eq!(longer.status, 200);
    let answer = Client::h1().post(gateway.address, CHAT, chat(false, 1)).await;
    assert_eq!((answer.status, answer.code().as_str()), (504, "total_timeout"));
}

#[tokio::test]
async fn a_full_pool_sends_the_request_to_its_fallback() {
    let (full, free) = (faulty_server(&["hang"]).await, model_server().await);
    let text = format!(
        "version: 1\nmodels: [{{name: m, pool: p, fallbacks: [{{pool: q, 'on': [unavailable]}}]}}]\npools:\n  \
         p: {{upstreams: [{{url: '{}'}}], concurrency: {{max: 1, queue: 0}}}}\n  q: {{upstreams: [{{url: '{}', name: free}}]}}\n",
        full.url(),
        free.url()
    );
    let gateway = Gateway::start(&text).await;
    let _running = spawn(&Client::h1(), &gateway, &[], chat(false, 1));
    eventually("it runs", SOON, async || full.in_flight() == 1).await;
    for client in Client::both() {
        let answer = client.post(gateway.address, CHAT, chat(false, 1)).await;
        assert_eq!((answer.status, answer.header("x-infergate-upstream")), (200, "free"));
    }
}

#[tokio::test]
async fn each_pool_has_a_gate_of_its_own() {
    let (full, free) = (faulty_server(&["hang"]).await, model_server().await);
    let text = format!(
        "version: 1\nmodels: [{{name: m, pool: p}}, {{name: other, pool: q, rename: m}}]\npools:\n  \
         p: {{upstreams: [{{url: '{}'}}], concurrency: {{max: 1, queue: 0}}}}\n  \
         q: {{upstreams: [{{url: '{}'}}], concurrency: {{max: 1, queue: 0}}}}\n",
        full.url(),
        free.url()
    );
    let gateway = Gateway::start(&text).await;
    let _running = spawn(&Client::h1(), &gateway, &[], chat(false, 1));
    eventually("it runs", SOON, async || full.in_flight() == 1).await;
    let answer = Client::h1().post(gateway.address, CHAT, chat(false, 1).replace("\"m\"", "\"other\"")).await;
    assert_eq!(answer.status, 200);
}

#[tokio::test]
async fn a_client_that_leaves_the_queue_gives_up_its_turn() {
    let server = model_server().await;
    let gateway = Gateway::start(&policy(&[&server.url()], "concurrency: {max: 1}")).await;
    for client in Client::both() {
        server.set_faults(vec!["hang,times=1".parse().unwrap()]);
        let before = posts(&server);
        let running = spawn(&client, &gateway, &[], chat(false, 1));
        eventually("it runs", SOON, async || server.in_flight() == 1).await;
        let leaver = spawn(&client, &gateway, &[("x-who", "leaver")], chat(false, 1));
        queued(&gateway, 1.0).await;
        let stayer = spawn(&client, &gateway, &[("x-who", "stayer")], chat(false, 1));
        queued(&gateway, 2.0).await;
        leaver.abort();
        queued(&gateway, 1.0).await;
        running.abort();
        assert_eq!(stayer.await.unwrap().status, 200);
        assert_eq!(posts(&server), before + 2, "the one that left was never sent");
        assert!(!order(&server, "x-who").contains(&"leaver".to_owned()));
    }
}

#[tokio::test]
async fn a_wider_policy_lets_the_waiting_in() {
    let server = faulty_server(&["hang"]).await;
    let gateway = Gateway::start(&policy(&[&server.url()], "concurrency: {max: 1}")).await;
    let client = Client::h1();
    let _first = spawn(&client, &gateway, &[], chat(false, 1));
    eventually("it runs", SOON, async || server.in_flight() == 1).await;
    let _second = spawn(&client, &gateway, &[], chat(false, 1));
    queued(&gateway, 1.0).await;
    assert_eq!(gateway.reload(&policy(&[&server.url()], "concurrency: {max: 3}")).await.status, 200);
    let _third = spawn(&client, &gateway, &[], chat(false, 1));
    eventually("all three run", SOON, async || server.in_flight() == 3).await;
}

// Urgency.

/// One model for people, one for batches, one pool with one place.
fn classes(server: &Simulated) -> String {
    format!(
        "version: 1\nmodels:\n  - {{name: m, pool: p}}\n  - {{name: m-chat, pool: p, rename: m, priority: interactive}}\n  \
         - {{name: m-batch, pool: p, rename: m, priority: batch}}\n\
         priorities:\n  interactive: {{level: 10}}\n  batch: {{level: -10}}\n  hasty: {{level: 20, queue_ms: 100}}\n\
         requests: {{priority_header: x-priority}}\n\
         pools:\n  p: {{upstreams: [{{url: '{}'}}], concurrency: {{max: 1}}}}\n",
        server.url()
    )
}

/// Queues requests, each of a model and with a header, and returns the order in which the server got them.
async fn served_in_order(client: &Client, asked: &[(&'static str, &'static str, &'static str)]) -> Vec<String> {
    let server = faulty_server(&["slow-first=600,times=1"]).await;
    let gateway = Gateway::start(&classes(&server)).await;
    let mut running = vec![spawn(client, &gateway, &[], chat(false, 1))];
    eventually("it runs", SOON, async || server.in_flight() == 1).await;
    for (n, (who, model, priority)) in asked.iter().enumerate() {
        let headers = [("x-who", *who), ("x-priority", *priority)];
        running.push(spawn(client, &gateway, &headers, chat(false, 1).replace("\"m\"", &format!("\"{model}\""))));
        queued(&gateway, (n + 1) as f64).await;
    }
    for answer in running {
        assert_eq!(answer.await.unwrap().status, 200);
    }
    order(&server, "x-who")
}

#[tokio::test]
async fn batch_yields_to_interactive_whether_the_model_or_the_header_says_so() {
    for client in Client::both() {
        let served = served_in_order(
            &client,
            &[
                ("1 batch by model", "m-batch", ""),
                ("2 batch by header", "m", "batch"),
                ("3 plain", "m", ""),
                ("4 interactive by model", "m-chat", ""),
                ("5 unknown class", "m", "emperor"),
                ("6 interactive by header", "m", "interactive"),
                ("7 header beats model", "m-chat", "batch"),
                ("8 header lifts model", "m-batch", "interactive"),
            ],
        )
        .await;
        let numbers: Vec<&str> = served.iter().map(|who| &who[..1]).collect();
        assert_eq!(numbers, ["4", "6", "8", "3", "5", "1", "2", "7"], "{served:?}");
    }
}

#[tokio::test]
async fn without_a_header_named_in_the_policy_clients_choose_no_class() {
    let server = faulty_server(&["slow-first=400,times=1"]).await;
    let gateway = Gateway::start(&classes(&server).replace("requests: {priority_header: x-priority}\n", "")).await;
    let client = Client::h1();
    let running = spawn(&client, &gateway, &[], chat(false, 1));
    eventually("it runs", SOON, async || server.in_flight() == 1).await;
    let first = spawn(&client, &gateway, &[("x-who", "first")], chat(false, 1));
    queued(&gateway, 1.0).await;
    let second = spawn(&client, &gateway, &[("x-who", "second"), ("x-priority", "interactive")], chat(false, 1));
    for answer in [running, first, second] {
        assert_eq!(answer.await.unwrap().status, 200);
    }
    assert_eq!(order(&server, "x-who"), ["first", "second"]);
}

#[tokio::test]
async fn a_class_has_its_own_patience() {
    let server = faulty_server(&["hang"]).await;
    let gateway = Gateway::start(&classes(&server)).await;
    let client = Client::h1();
    let _running = spawn(&client, &gateway, &[], chat(false, 1));
    eventually("it runs", SOON, async || server.in_flight() == 1).await;
    let start = Instant::now();
    let answer = client.post_with(gateway.address, CHAT, &[("x-priority", "hasty")], chat(false, 1)).await;
    assert_eq!((answer.status, answer.code().as_str()), (503, "queue_timeout"));
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
}

// Batch.

/// A pool without a limit of its own that takes batch as long as fewer than two requests run on its one endpoint.
async fn with_batch(server: &Simulated, extra: &str) -> Gateway {
    let classes = "priorities: {batch: {level: 50, batch: true, queue_ms: 60000}, hasty: {level: 0, batch: true, queue_ms: 200}}\n\
                   requests: {priority_header: x-priority}\n";
    Gateway::start(&(policy(&[&server.url()], &format!("batch: {{in_flight: 2}}\n{extra}")) + classes)).await
}

#[tokio::test]
async fn batch_waits_for_room_that_others_leave_and_keeps_nobody_waiting() {
    for extra in ["", "balance: expected_time", "concurrency: {max: 10, queue: 1}"] {
        let server = faulty_server(&["hang,times=2"]).await;
        let gateway = with_batch(&server, extra).await;
        let client = Client::h1();
        let busy = [spawn(&client, &gateway, &[], chat(true, 1)), spawn(&client, &gateway, &[], chat(true, 1))];
        eventually("they run", SOON, async || server.in_flight() == 2).await;
        let batch = spawn(&client, &gateway, &[("x-priority", "batch"), ("x-who", "batch")], chat(false, 1));
        queued(&gateway, 1.0).await;
        for _ in 0..5 {
            let other = client.post_with(gateway.address, CHAT, &[("x-who", "other")], chat(false, 1)).await;
            assert_eq!(other.status, 200, "{extra}");
        }
        assert!(!batch.is_finished());
        busy.into_iter().for_each(|one| one.abort());
        let answer = batch.await.unwrap();
        assert_eq!(answer.status, 200);
        assert_eq!(order(&server, "x-who"), ["other", "other", "other", "other", "other", "batch"]);
        let record = Journal::settled(&gateway).await.record(answer.header("x-request-id"));
        assert!(record["decisions"].to_string().contains("waited"), "{}", record["decisions"]);
    }
}

#[tokio::test]
async fn a_heap_of_batch_never_takes_more_than_its_room_and_all_of_it_is_done() {
    let server = Arc::new(faulty_server(&["slow-first=60"]).await);
    let gateway = with_batch(&server, "").await;
    let client = Client::h1();
    let most = tokio::spawn({
        let server = server.clone();
        async move {
            let (mut most, mut seen) = (0, 0);
            while seen < 30 {
                (most, seen) = (most.max(server.in_flight()), order(&server, "x-who").len());
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            most
        }
    });
    let headers = [("x-priority", "batch"), ("x-who", "batch")];
    let heap: Vec<_> = (0..30).map(|_| spawn(&client, &gateway, &headers, chat(false, 1))).collect();
    for answer in heap {
        assert_eq!(answer.await.unwrap().status, 200);
    }
    assert!((1..=2).contains(&most.await.unwrap()));
}

#[tokio::test]
async fn batch_for_which_no_room_comes_is_told_so_in_time() {
    let server = faulty_server(&["hang"]).await;
    let gateway = with_batch(&server, "").await;
    let client = Client::h1();
    let _busy = [spawn(&client, &gateway, &[], chat(true, 1)), spawn(&client, &gateway, &[], chat(true, 1))];
    eventually("they run", SOON, async || server.in_flight() == 2).await;
    let answer = client.post_with(gateway.address, CHAT, &[("x-priority", "hasty")], chat(false, 1)).await;
    assert_eq!((answer.status, answer.code().as_str()), (503, "queue_timeout"));
    assert!(answer.text().contains("no room for batch in pool p"), "{}", answer.text());
    assert_eq!(server.in_flight(), 2);
}

// Bursts.

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_burst_of_2048_requests_at_healthy_workers_is_answered_and_opens_no_breaker() {
    let options = || Options { models: vec!["m".to_owned()], slots: 4_096, ttft_ms: 500, ..Options::default() };
    let servers = [Simulated::start(options()).await.unwrap(), Simulated::start(options()).await.unwrap()];
    let urls = servers.each_ref().map(Simulated::url);
    let gateway = Gateway::start(&policy(
        &[&urls[0], &urls[1]],
        "concurrency: {max: 2048, queue: 0}\nhealth: {interval_ms: 100}",
    ))
    .await;
    // Half of them on connections of their own, half on eight HTTP/2 connections.
    let (each, shared) = (Client::h1(), [(); 8].map(|()| Client::h2()));
    let mut running = JoinSet::new();
    for n in 0..2_048 {
        let client = if n % 2 == 0 { each.clone() } else { shared[n / 2 % 8].clone() };
        let address = gateway.address;
        running.spawn(async move {
            let answer = client.post(address, CHAT, chat(n % 4 < 2, 2)).await;
            (answer.status, answer.whole, answer.header("x-infergate-attempts").to_owned())
        });
    }
    let mut told = BTreeMap::new();
    for answer in running.join_all().await {
        *told.entry(answer).or_insert(0) += 1;
    }
    assert_eq!(told, BTreeMap::from([((200, true, "1".to_owned()), 2_048)]));
    let page = gateway.admin("/metrics").await.text();
    assert!(
        page.lines().filter(|line| line.starts_with("infergate_endpoint_breaker{")).all(|line| line.ends_with(" 0"))
    );
    assert!(
        page.lines().filter(|line| line.starts_with("infergate_endpoint_healthy{")).all(|line| line.ends_with(" 1"))
    );
    gateway.comes_to("infergate_requests_in_flight", 0.0).await;
}

// Memory.

const MIB: u64 = 1 << 20;

#[tokio::test]
async fn at_the_memory_ceiling_new_requests_are_refused_what_runs_goes_on_and_below_it_all_is_served_again() {
    let server = model_server().await;
    let text = policy(&[&server.url()], "health: {enabled: false}");
    let base = {
        let gateway = Gateway::start(&text).await;
        Client::h1().post(gateway.address, "/v1/nothing", "{}").await;
        gateway.resident()
    };
    let settings =
        format!("threads: 2\nmemory: {{ceiling_bytes: {}, bodies_bytes: {}}}\n", base + 60 * MIB, 1024 * MIB);
    let gateway = Gateway::with(&text, &settings, &[]).await;
    let big = format!(r#"{{"model":"m","messages":[{{"role":"user","content":"{}"}}]}}"#, "x".repeat(20 << 20));
    let client = Client::h1();
    let stream = spawn(&client, &gateway, &[("x-simulate-fault", "delay-between=50")], chat(true, 60));
    let hang = [("x-simulate-fault", "hang")];
    let running: Vec<_> = (0..5).map(|_| spawn(&client, &gateway, &hang, big.clone())).collect();
    for client in Client::both() {
        eventually("it sheds", SOON, async || client.post(gateway.address, CHAT, "{}").await.status == 503).await;
        let answer = client.post(gateway.address, CHAT, chat(false, 1)).await;
        assert_eq!((answer.status, answer.code().as_str(), answer.header("retry-after")), (503, "overloaded", "1"));
        assert!(answer.text().contains("memory"), "{}", answer.text());
    }
    assert_eq!(gateway.metric("infergate_shedding").await, 1.0);
    assert_eq!(gateway.admin("/livez").await.status, 200, "it is no reason to be killed");
    assert!(!stream.is_finished(), "the stream still runs");
    let stream = stream.await.unwrap();
    assert!(stream.whole && stream.text().contains("[DONE]"));
    running.iter().for_each(JoinHandle::abort);
    for client in Client::both() {
        eventually("it serves again", SOON, async || {
            client.post(gateway.address, CHAT, chat(false, 1)).await.status == 200
        })
        .await;
    }
    assert!(gateway.resident() < base + 60 * MIB);
}

#[tokio::test]
async fn bodies_beyond_their_budget_are_refused_before_they_are_read() {
    let server = faulty_server(&["hang"]).await;
    let settings = "threads: 2\nmemory: {bodies_bytes: 3000000}\n";
    let gateway = Gateway::with(&policy(&[&server.url()], ""), settings, &[]).await;
    let big = format!(r#"{{"model":"m","messages":[{{"role":"user","content":"{}"}}]}}"#, "x".repeat(2 << 20));
    for client in Client::both() {
        let running = spawn(&client, &gateway, &[], big.clone());
        eventually("it runs", SOON, async || server.in_flight() == 1).await;
        // Only the head is sent: the answer comes all the same.
        let head = format!("POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n", big.len());
        let answer = raw(gateway.address, head.as_bytes()).await;
        assert!(
            answer.starts_with("HTTP/1.1 503 ") && answer.contains("overloaded") && answer.contains("retry-after: 1"),
            "{answer}"
        );
        running.abort();
        eventually("its bytes are given back", SOON, async || {
            gateway.metric("infergate_bodies_in_flight_bytes").await == 0.0 && server.in_flight() == 0
        })
        .await;
    }
}

// The slow.

#[tokio::test]
async fn a_sender_that_is_too_slow_is_told_and_let_go() {
    let server = model_server().await;
    let text = format!("{}requests: {{body_ms: 300}}\n", policy(&[&server.url()], ""));
    let gateway = Gateway::start(&text).await;
    let half = format!("POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n{{\"model\":");
    let start = Instant::now();
    let answer = raw(gateway.address, half.as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 408 ") && answer.contains("request_timeout"), "{answer}");
    assert!(answer.to_ascii_lowercase().contains("connection: close"), "{answer}");
    assert!(start.elapsed() < Duration::from_secs(2));
    gateway.comes_to("infergate_bodies_in_flight_bytes", 0.0).await;
    assert_eq!(posts(&server), 0);
}

#[tokio::test]
async fn a_reader_that_takes_nothing_is_let_go_and_its_upstream_too() {
    let server = faulty_server(&["big=30000000"]).await;
    let text = format!("{}requests: {{write_ms: 300}}\n", policy(&[&server.url()], "health: {enabled: false}"));
    let gateway = Gateway::start(&text).await;
    for stream in [false, true] {
        let body = chat(stream, 4);
        let mut client = TcpStream::connect(gateway.address).await.unwrap();
        let request = format!("POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n{body}", body.len());
        client.write_all(request.as_bytes()).await.unwrap();
        eventually("it is served", SOON, async || gateway.metric("infergate_requests_in_flight").await == 1.0).await;
        eventually("the upstream is let go", SOON, async || server.open_connections() == 0).await;
        eventually("nothing of it runs", SOON, async || gateway.metric("infergate_requests_in_flight").await == 0.0)
            .await;
        drop(client);
    }
}
