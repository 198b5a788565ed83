//! What the gateway measures: the conventions' names, ours, the process's, and never more series than it should.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::support::{Client, Gateway, chat, eventually, faulty_server, model_server, policy};

const CHAT: &str = "/v1/chat/completions";
const SOON: Duration = Duration::from_secs(5);

/// The labels of chat with the model `m` on the usual upstream.
const M: &str = r#"gen_ai_operation_name="chat",gen_ai_provider_name="vllm",gen_ai_request_model="m""#;

#[tokio::test]
async fn an_answer_is_told_in_the_words_of_the_genai_conventions() {
    let server = model_server().await;
    let gateway = Gateway::start(&policy(&[&server.url()], "")).await;
    let mut used = [0.0, 0.0];
    for client in Client::both() {
        let answer = client.post(gateway.address, CHAT, chat(false, 7)).await.json();
        used[0] += answer["usage"]["prompt_tokens"].as_f64().unwrap();
        used[1] += answer["usage"]["completion_tokens"].as_f64().unwrap();
    }
    gateway.comes_to(&format!("gen_ai_server_request_duration_seconds_count{{{M}}}"), 2.0).await;
    for (kind, used) in [("input", used[0]), ("output", used[1])] {
        let name = format!(r#"gen_ai_client_token_usage_sum{{{M},gen_ai_token_type="{kind}"}}"#);
        assert!(used > 0.0 && gateway.metric(&name).await == used, "{name}: {used}");
    }
    assert_eq!(gateway.metric(&format!("gen_ai_server_time_to_first_token_seconds_count{{{M}}}")).await, 0.0);
}

#[tokio::test]
async fn a_stream_tells_its_first_token_and_the_pace_of_the_others() {
    let server = faulty_server(&["slow-first=100", "delay-between=20"]).await;
    let gateway = Gateway::start(&policy(&[&server.url()], "")).await;
    let body = chat(true, 11).replace("\"stream\"", "\"stream_options\":{\"include_usage\":true},\"stream\"");
    assert_eq!(Client::h1().post(gateway.address, CHAT, body).await.status, 200);
    let name = |metric| format!("gen_ai_server_{metric}{{{M}}}");
    gateway.comes_to(&name("time_per_output_token_seconds_count"), 1.0).await;
    let first = gateway.metric(&name("time_to_first_token_seconds_sum")).await;
    let pace = gateway.metric(&name("time_per_output_token_seconds_sum")).await;
    let whole = gateway.metric(&name("request_duration_seconds_sum")).await;
    assert!((0.1..5.0).contains(&first) && (0.01..0.5).contains(&pace), "{first} {pace}");
    assert!((whole - first - 10.0 * pace).abs() < 1e-3, "{whole} {first} {pace}");
}

#[tokio::test]
async fn a_failure_is_told_with_its_kind_and_its_time() {
    let server = faulty_server(&["reset,times=1", "status=400,times=1"]).await;
    let gateway = Gateway::start(&policy(&[&server.url()], "retry: {attempts: 1}")).await;
    for (status, error) in [(502, "upstream_closed"), (400, "status_4xx")] {
        let answer = Client::h1().post(gateway.address, CHAT, chat(false, 1)).await;
        assert_eq!(answer.status, status, "{}", answer.text());
        let name = format!(r#"gen_ai_server_request_duration_seconds_count{{{M},error_type="{error}"}}"#);
        gateway.comes_to(&name, 1.0).await;
    }
    assert_eq!(gateway.metric(&format!("gen_ai_server_request_duration_seconds_count{{{M}}}")).await, 0.0);
}

#[tokio::test]
async fn what_the_gateway_itself_takes_is_told_by_stage() {
    let server = faulty_server(&["slow-first=300"]).await;
    let gateway = Gateway::start(&policy(&[&server.url()], "")).await;
    assert_eq!(Client::h1().post(gateway.address, CHAT, chat(true, 3)).await.status, 200);
    for stage in ["admit", "relay"] {
        gateway.comes_to(&format!(r#"infergate_self_time_seconds_count{{stage="{stage}"}}"#), 1.0).await;
        let took = gateway.metric(&format!(r#"infergate_self_time_seconds_sum{{stage="{stage}"}}"#)).await;
        assert!(took < 0.2, "the upstream's time is not ours: {stage} {took}");
    }
}

#[tokio::test]
async fn the_process_and_its_runtimes_are_told_under_the_usual_names() {
    let server = model_server().await;
    let gateway = Gateway::start(&policy(&[&server.url()], "")).await;
    assert_eq!(Client::h1().post(gateway.address, CHAT, chat(false, 1)).await.status, 200);
    for (name, least, most) in [
        ("process_resident_memory_bytes", 1e6, 1e10),
        ("process_cpu_seconds_total", 0.0, 100.0),
        ("process_open_fds", 5.0, 1000.0),
        ("process_max_fds", 100.0, f64::MAX),
        ("process_threads", 4.0, 100.0),
        ("process_start_time_seconds", 1.7e9, 1e11),
        (r#"tokio_runtime_workers{runtime="requests"}"#, 2.0, 2.0),
        (r#"tokio_runtime_workers{runtime="admin"}"#, 1.0, 1.0),
        (r#"tokio_runtime_workers{runtime="background"}"#, 1.0, 1.0),
        (r#"tokio_runtime_alive_tasks{runtime="requests"}"#, 1.0, 1000.0),
        (r#"tokio_runtime_global_queue_depth{runtime="requests"}"#, 0.0, 1000.0),
        (r#"tokio_runtime_worker_busy_seconds_total{runtime="requests"}"#, 1e-9, 100.0),
        (r#"tokio_runtime_park_total{runtime="requests"}"#, 1.0, 1e9),
    ] {
        let value = gateway.metric(name).await;
        assert!((least..=most).contains(&value), "{name} {value}");
    }
}

#[tokio::test]
async fn an_upstream_that_left_the_policy_leaves_the_metrics() {
    let [old, fresh] = [model_server().await, model_server().await];
    let gateway = Gateway::start(&policy(&[&old.url()], "")).await;
    assert_eq!(Client::h1().post(gateway.address, CHAT, chat(false, 1)).await.status, 200);
    let told = async || gateway.admin("/metrics").await.text().contains(&old.address().to_string());
    assert!(told().await);
    assert_eq!(gateway.reload(&policy(&[&fresh.url()], "")).await.status, 200);
    eventually("the old upstream is gone", SOON, async || !told().await).await;
    assert_eq!(Client::h1().post(gateway.address, CHAT, chat(false, 1)).await.status, 200);
    let answered = format!(r#"infergate_attempts_total{{pool="p",upstream="{}",result="answered"}}"#, fresh.address());
    gateway.comes_to(&answered, 1.0).await;
}

/// R58.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_thousand_random_models_users_keys_and_paths_leave_the_metrics_as_they_were() {
    const REQUESTS: usize = 100_000;
    let server = model_server().await;
    let policy = policy(&[&server.url()], "").replace(
        "models:\n",
        "passthrough: [{path: '/files/*', pool: p}]\nmodels:\n  - {name: 'any-*', pool: p, rename: m}\n",
    );
    let gateway = Gateway::start(&policy).await;
    ask_all(gateway.address, 1, 100).await;
    counted(&gateway, 100).await;
    let before = series(&gateway).await;
    ask_all(gateway.address, 16, REQUESTS).await;
    counted(&gateway, 100 + REQUESTS).await;
    let after = series(&gateway).await;
    let new: Vec<_> = after.difference(&before).collect();
    assert!(new.is_empty(), "{new:?}");
    assert!(after.len() < 2_500, "{}", after.len());
}

/// Sends so many requests over so many connections.
async fn ask_all(address: SocketAddr, connections: usize, requests: usize) {
    let sent = Arc::new(AtomicUsize::new(0));
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..connections {
        let sent = sent.clone();
        tasks.spawn(async move {
            let mut connection = None;
            loop {
                let n = sent.fetch_add(1, Ordering::Relaxed);
                if n >= requests {
                    return;
                }
                connection = ask(address, connection, n).await;
            }
        });
    }
    tasks.join_all().await;
}

/// One request with names that nobody has used before; few of them reach the model server, to save time. The
/// connection comes back if it can be used again.
async fn ask(address: SocketAddr, connection: Option<TcpStream>, n: usize) -> Option<TcpStream> {
    let random = fastrand::u64(..);
    let (status, path, model) = match n % 20 {
        0 => (200, CHAT.to_owned(), "any"),
        1 => (404, format!("/files/{random}"), "none"),
        n if n % 2 == 0 => (404, CHAT.to_owned(), "nobody"),
        _ => (404, format!("/nowhere/{n}/{random}"), "none"),
    };
    let body = format!(
        r#"{{"model":"{model}-{random}","user":"u-{random}","max_tokens":1,"messages":[{{"role":"user","content":"Hi"}}]}}"#
    );
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: h-{random}\r\nauthorization: Bearer sk-{random}\r\nx-request-id: {random}\r\nuser-agent: {random}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    let mut connection = match connection {
        Some(connection) => connection,
        None => TcpStream::connect(address).await.unwrap(),
    };
    connection.write_all(format!("{head}{body}").as_bytes()).await.unwrap();
    let answer = read_answer(&mut connection).await;
    assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{n} {answer}");
    (!answer.to_ascii_lowercase().contains("\r\nconnection: close")).then_some(connection)
}

/// An answer whose length is known.
async fn read_answer(connection: &mut TcpStream) -> String {
    let mut answer = Vec::with_capacity(2048);
    loop {
        assert!(connection.read_buf(&mut answer).await.unwrap() > 0, "{}", String::from_utf8_lossy(&answer));
        let text = String::from_utf8_lossy(&answer).to_ascii_lowercase();
        let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
        let length =
            head.lines().find_map(|line| line.strip_prefix("content-length: ")).map(|text| text.parse().unwrap());
        if length.map_or(body.ends_with("0\r\n\r\n"), |length: usize| body.len() >= length) {
            return String::from_utf8_lossy(&answer).into_owned();
        }
    }
}

/// Waits until so many requests have been counted out.
async fn counted(gateway: &Gateway, requests: usize) {
    let sum = async || {
        let page = gateway.admin("/metrics").await.text();
        let counts = page.lines().filter_map(|line| line.strip_prefix("infergate_requests_total{")?.rsplit_once(' '));
        counts.map(|(_, count)| count.parse::<usize>().unwrap()).sum::<usize>()
    };
    eventually("all are counted", SOON, async || sum().await == requests).await;
}

/// Everything on the page that has a value, without it.
async fn series(gateway: &Gateway) -> BTreeSet<String> {
    let page = gateway.admin("/metrics").await.text();
    let lines = page.lines().filter(|line| !line.starts_with('#'));
    lines.map(|line| line.rsplit_once(' ').unwrap().0.to_owned()).collect()
}
