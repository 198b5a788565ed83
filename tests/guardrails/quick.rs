//! Long texts: whoever asks for something else meanwhile is answered as quickly as ever (R42).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use bytes::Bytes;
use serde_json::json;

use super::{CARD, CHAT, guarded};
use crate::support::wire::{Framing, Wire};
use crate::support::{Client, Gateway, chat, eventually};

/// What 99 of 100 may take. Unoptimised code scans a hundred times slower, on a machine that does other things too.
const P99: Duration = if cfg!(debug_assertions) { Duration::from_secs(1) } else { Duration::from_millis(50) };
const RULES: &str = "  - {name: pii, in: [prompt.user, answer.content], verdict: redact, pii: {find: [card, email, phone, iban]}}\n  - {name: words, in: [prompt.user, answer.content], verdict: block, words: {list: [forbidden fruit]}}";

fn p99(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() * 99 / 100]
}

/// Asks for this text again and again, many at a time, while the health page and short requests are asked for.
async fn meanwhile(gateway: &Gateway, text: String) -> [Duration; 2] {
    let (over, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let asked = Bytes::from(chat(false, 9).replace("Hello", &text));
    let address = gateway.address;
    let asking: Vec<_> = (0..6)
        .map(|_| {
            let (over, done, asked) = (over.clone(), done.clone(), asked.clone());
            tokio::spawn(async move {
                while !over.load(Relaxed) {
                    let answer = Client::h1().post(address, CHAT, asked.clone()).await;
                    assert_eq!(answer.status, 200, "{}", &answer.text()[..200.min(answer.body.len())]);
                    done.fetch_add(1, Relaxed);
                }
            })
        })
        .collect();
    let (mut health, mut short) = (Vec::new(), Vec::new());
    while health.len() < 200 || done.load(Relaxed) < 6 {
        let start = Instant::now();
        assert_eq!(gateway.admin("/livez").await.status, 200);
        health.push(start.elapsed());
        let start = Instant::now();
        assert_eq!(Client::h1().get(address, "/v1/models").await.status, 200);
        short.push(start.elapsed());
    }
    over.store(true, Relaxed);
    for one in asking {
        one.await.unwrap();
    }
    [p99(health), p99(short)]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_every_thread_could_be_scanning_a_mebibyte_health_and_others_stay_quick() {
    let wire = Wire::start(|heard| {
        // A request for a long answer says so.
        let long = String::from_utf8_lossy(&heard.body[..heard.body.len().min(200)]).contains("a long answer");
        let content = if long { text() } else { "ok".to_owned() };
        let answer = json!({"choices": [{"message": {"content": content}}]}).to_string();
        Framing::Length.answer("application/json", &Bytes::from(answer), 1 << 20)
    })
    .await;
    let gateway = Gateway::start(&guarded(&wire.url(), RULES)).await;
    for asked in [text(), "a long answer".to_owned()] {
        let times = meanwhile(&gateway, asked).await;
        assert!(times.iter().all(|time| *time < P99), "{times:?}");
    }
    eventually("all is counted", Duration::from_secs(10), || async {
        gateway.metric("infergate_guardrail_verdicts_total{rule=\"pii\",outcome=\"redacted\"}").await >= 12.0
    })
    .await;
}

/// A mebibyte with something to find.
fn text() -> String {
    let line = format!("The order of 14 March came to 1,204.50, paid with {CARD} or so, said Ann. ");
    line.repeat((1 << 20) / line.len())
}
