//! Whoever has read the beginning of a prompt is asked again: what that is worth, on servers of unequal speed that
//! keep what they have read.

use std::time::{Duration, Instant};

use tokio::task::JoinSet;

use crate::support::{Client, Gateway, Options, Simulated, policy};

const CHAT: &str = "/v1/chat/completions";
/// Prompts that everybody begins with, and how long they are: 2,000 tokens or so.
const BEGINNINGS: usize = 12;
const BEGINNING_BYTES: usize = 8_000;
const REQUESTS: usize = 160;
/// How many run at once.
const AT_ONCE: usize = 4;

/// A server that reads so many tokens a second.
async fn reader(prefill_per_second: f64) -> Simulated {
    let models = vec!["m".to_owned()];
    Simulated::start(Options { models, prefill_per_second, ..Options::default() }).await.unwrap()
}

/// The n-th request: one of the beginnings, and a question of its own.
fn prompt(n: usize) -> String {
    // No pattern that taking turns could meet by chance.
    let which = (n * 2_654_435_761) >> 9;
    let system = format!("{:03} be brief. ", which % BEGINNINGS).repeat(BEGINNING_BYTES / 14);
    let messages =
        format!(r#"[{{"role":"system","content":"{system}"}},{{"role":"user","content":"and question {n}?"}}]"#);
    format!(r#"{{"model":"m","messages":{messages},"stream":true,"max_tokens":2}}"#)
}

/// Prompt tokens that servers were asked to read, and how many of them they had.
async fn cache(servers: &[Simulated]) -> (f64, f64) {
    let mut sums = (0.0, 0.0);
    for server in servers {
        let page = Client::h1().get(server.address(), "/metrics").await.text();
        let figure = |name: &str| {
            let line = page.lines().find(|line| line.starts_with(name)).unwrap();
            line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()
        };
        sums.0 += figure("vllm:prefix_cache_queries_total");
        sums.1 += figure("vllm:prefix_cache_hits_total");
    }
    sums
}

/// The share of prompts that was found in caches, and the time within which 99 of 100 first bytes came.
async fn served(balance: &str) -> (f64, Duration) {
    let mut servers = Vec::new();
    for prefill in [20_000.0, 20_000.0, 10_000.0, 5_000.0] {
        servers.push(reader(prefill).await);
    }
    let urls: Vec<String> = servers.iter().map(Simulated::url).collect();
    let urls: Vec<&str> = urls.iter().map(String::as_str).collect();
    let gateway = Gateway::start(&policy(&urls, &format!("balance: {balance}"))).await;
    let (mut running, mut firsts) = (JoinSet::new(), Vec::new());
    for n in 0..REQUESTS {
        if running.len() == AT_ONCE {
            firsts.push(running.join_next().await.unwrap().unwrap());
        }
        let address = gateway.address;
        running.spawn(async move {
            let begun = Instant::now();
            let answer = Client::h1().post(address, CHAT, prompt(n)).await;
            assert_eq!(answer.status, 200);
            // Two tokens, the second at once.
            begun.elapsed()
        });
    }
    firsts.extend(running.join_all().await);
    firsts.sort();
    let (asked, had) = cache(&servers).await;
    (had / asked, firsts[REQUESTS * 99 / 100])
}

#[tokio::test]
async fn prompts_find_their_beginnings_and_first_tokens_come_sooner_than_in_turn() {
    let (in_turn, ours) = (served("round_robin").await, served("expected_time").await);
    println!("hits and first token p99: in turn {in_turn:?}, by expected time {ours:?}");
    assert!(ours.0 > in_turn.0 + 0.1, "{ours:?} against {in_turn:?}");
    assert!(ours.1 < in_turn.1.mul_f64(0.8), "{ours:?} against {in_turn:?}");
}
