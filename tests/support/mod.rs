//! What the promises are tried with: the real gateway as a process, model servers to stand behind it, clients.

pub mod chart;
pub mod dns;
pub mod gateway;
pub mod http;
pub mod issuer;
pub mod journal;
#[cfg(feature = "kafka")]
pub mod kafka;
pub mod keys;
pub mod load;
pub mod nats;
pub mod otlp;
pub mod ports;
pub mod postgres;
pub mod process;
pub mod prometheus;
pub mod redis;
pub mod requests;
pub mod signer;
pub mod socket;
pub mod wire;

pub use gateway::Gateway;
pub use http::{Answer, Client, events, raw};
pub use infergate::simulate::{Engine, Options, Outcome, Simulated};
pub use journal::Journal;
pub use load::Load;
pub use ports::free_port;
pub use process::Process;

use std::future::Future;
use std::time::{Duration, Instant};

/// A model server with one model, `m`, that answers at once.
pub async fn model_server() -> Simulated {
    Simulated::start(Options { models: vec!["m".to_owned()], max_model_len: 64 << 20, ..Options::default() })
        .await
        .unwrap()
}

/// The same with faults on every request, in the grammar of `infergate simulate --fault`.
pub async fn faulty_server(faults: &[&str]) -> Simulated {
    let server = model_server().await;
    server.set_faults(faults.iter().map(|fault| fault.parse().unwrap()).collect());
    server
}

/// A client's own secrets wherever it may put them, and an id that cannot stand in a header: none may come out anywhere.
pub const CANARY_HEADERS: [(&str, &str); 5] = [
    ("authorization", "Bearer canary-client"),
    ("x-api-key", "canary-client"),
    ("api-key", "canary-client"),
    ("cookie", "canary-client"),
    ("x-request-id", "canary client"),
];

/// A policy with one model, `m`, on a pool of `urls`; `extra` is YAML under the pool, four spaces deep.
pub fn policy(urls: &[&str], extra: &str) -> String {
    let upstreams: String = urls.iter().map(|url| format!("      - url: {url}\n")).collect();
    format!("version: 1\nmodels:\n  - name: m\n    pool: p\npools:\n  p:\n    upstreams:\n{upstreams}{}", indent(extra))
}

fn indent(extra: &str) -> String {
    extra.lines().map(|line| format!("    {}\n", line.trim_end())).collect()
}

/// A chat request for the model `m`.
pub fn chat(stream: bool, max_tokens: u32) -> String {
    format!(
        r#"{{"model":"m","messages":[{{"role":"user","content":"Hello"}}],"stream":{stream},"max_tokens":{max_tokens}}}"#
    )
}

/// Asks again and again until `check` says yes; fails with `what` after `limit`.
pub async fn eventually<F: Future<Output = bool>>(
    what: &str,
    limit: Duration,
    mut check: impl FnMut() -> F,
) -> Duration {
    let start = Instant::now();
    while !check().await {
        assert!(start.elapsed() < limit, "{what}: not within {limit:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    start.elapsed()
}
