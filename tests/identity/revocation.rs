//! A key that is taken out of the policy, or of the file beside it, is refused within a second; what it began goes on
//! or is cut, as policy says.

use std::time::{Duration, Instant};

use http_body_util::BodyExt;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::{CHAT, SOON, ask, bearer};
use crate::support::keys::{Key, asks_for, entries, key, start};
use crate::support::wire::read_until;
use crate::support::{Client, Gateway, Journal, Options, Outcome, Simulated, chat, eventually, model_server, policy};

/// What a change may take to be in force.
const SECOND: Duration = Duration::from_secs(1);

async fn refused_within_a_second(gateway: &Gateway, key: &Key, since: Instant) {
    while ask(gateway, &key.text).await.status != 401 {
        assert!(since.elapsed() < SECOND, "still let in after {:?}", since.elapsed());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    println!("refused after {:?}", since.elapsed());
}

#[tokio::test]
async fn a_key_that_is_taken_out_is_refused_within_a_second() {
    let (server, elsewhere) = (model_server().await, tempfile::tempdir().unwrap());
    let [stays, inline, filed] = [(); 3].map(|()| key("t", ""));
    let file = elsewhere.path().join("keys.yaml");
    std::fs::write(&file, entries(&[&filed], 0)).unwrap();
    let text = |keys: &[&Key]| {
        format!("{}{}      file: {}\n", policy(&[&server.url()], ""), asks_for(keys, "{t: {}}"), file.display())
    };
    let gateway = start(&text(&[&stays, &inline]), "").await;
    for key in [&stays, &inline, &filed] {
        assert_eq!(ask(&gateway, &key.text).await.status, 200);
    }
    // By the policy itself, saved as editors do.
    let fresh = gateway.directory.path().join(".new");
    std::fs::write(&fresh, text(&[&stays])).unwrap();
    std::fs::rename(fresh, gateway.policy_path()).unwrap();
    refused_within_a_second(&gateway, &inline, Instant::now()).await;
    // By the file, which lies in another directory.
    std::fs::write(&file, "").unwrap();
    refused_within_a_second(&gateway, &filed, Instant::now()).await;
    assert_eq!(ask(&gateway, &stays.text).await.status, 200);
    // A broken file takes nobody's key away.
    std::fs::write(&file, "- {tenant: t}\n").unwrap();
    eventually("told", SOON, || async { gateway.metric("infergate_policy_failed").await == 1.0 }).await;
    assert_eq!(ask(&gateway, &stays.text).await.status, 200);
}

/// A slow model server, and a gateway before it with these keys.
async fn slow(on_revoked: &str, keys: &[&Key]) -> (Simulated, Gateway, impl Fn(&[&Key]) -> String + use<>) {
    let options = Options { models: vec!["m".to_owned()], tokens_per_second: 20.0, ..Options::default() };
    let server = Simulated::start(options).await.unwrap();
    let (url, on_revoked) = (server.url(), on_revoked.to_owned());
    let text = move |keys: &[&Key]| {
        format!("{}{}requests: {{on_revoked: {on_revoked}}}\n", policy(&[&url], ""), asks_for(keys, "{t: {}}"))
    };
    let gateway = start(&text(keys), "").await;
    (server, gateway, text)
}

/// What ends a stream of each dialect that was cut.
const CUT: [(&str, &str); 4] = [
    (CHAT, r#""code":"key_revoked""#),
    ("/v1/completions", r#""code":"key_revoked""#),
    ("/v1/responses", r#""code":"key_revoked""#),
    ("/v1/messages", r#""type":"authentication_error""#),
];

fn body(path: &str) -> String {
    crate::support::requests::body(path, true).1.replace(":20", ":400")
}

#[tokio::test]
async fn what_a_revoked_key_began_is_cut_if_policy_says_so_and_nobody_elses_is() {
    let [stays, goes] = [(); 2].map(|()| key("t", ""));
    let (server, gateway, text) = slow("cut", &[&stays, &goes]).await;
    let mut open = Vec::new();
    for client in Client::both() {
        for (path, end) in CUT {
            let stream = client.open(gateway.address, path, &[("x-api-key", &goes.text)], body(path)).await;
            open.push((path, end, stream));
        }
        // Not a stream: its connection breaks off, if its head has left; here it is not even begun.
    }
    let others = Client::h1().open(gateway.address, CHAT, &[("x-api-key", &stays.text)], chat(true, 60)).await;
    // A reload that takes nobody out cuts nobody.
    assert_eq!(gateway.reload(&format!("{}# again\n", text(&[&stays, &goes]))).await.status, 200);
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(gateway.metric("infergate_requests_in_flight").await, 9.0);
    let since = Instant::now();
    assert_eq!(gateway.reload(&text(&[&stays])).await.status, 200);
    let mut ids = Vec::new();
    for (path, end, stream) in open {
        ids.push(stream.headers()["x-request-id"].to_str().unwrap().to_owned());
        let got = tokio::time::timeout(SOON, stream.into_body().collect()).await.expect("cut").unwrap().to_bytes();
        let got = String::from_utf8_lossy(&got).into_owned();
        let last = got.trim_end().rsplit("\n\n").next().unwrap();
        assert!(last.contains(end) && !got.contains("[DONE]") && !got.contains("message_stop"), "{path}: {last}");
    }
    assert!(since.elapsed() < SECOND, "{:?}", since.elapsed());
    eventually("the upstream is told", SOON, || async {
        server.seen().iter().filter(|seen| seen.outcome == Outcome::Disconnected).count() == 8
    })
    .await;
    let got = others.into_body().collect().await.unwrap().to_bytes();
    assert!(got.ends_with(b"data: [DONE]\n\n"), "nobody else's");
    let journal = Journal::settled(&gateway).await;
    for id in ids {
        let record = journal.record(&id);
        assert_eq!((&record["code"], &record["status"]), (&json!("key_revoked"), &json!(200)), "{record}");
        assert_eq!(record["attempts"][0]["result"], "cancelled", "it is not the upstream's fault");
    }
    assert_eq!(gateway.metric("infergate_refusals_total{code=\"key_revoked\"}").await, 8.0);
}

#[tokio::test]
async fn an_answer_that_has_not_begun_is_refused_and_a_websocket_is_closed() {
    let goes = key("t", "");
    let (_server, gateway, text) = slow("cut", &[&goes]).await;
    let waiting = {
        let (address, key) = (gateway.address, goes.text.clone());
        tokio::spawn(async move {
            let headers = [("x-api-key", key.as_str()), ("x-simulate-fault", "slow-first=1500")];
            Client::h1().post_with(address, CHAT, &headers, chat(false, 2)).await
        })
    };
    let mut socket = TcpStream::connect(gateway.address).await.unwrap();
    let head = format!(
        "GET /v1/realtime?model=m HTTP/1.1\r\nhost: x\r\nx-api-key: {}\r\nupgrade: websocket\r\nconnection: upgrade\r\nsec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
        goes.text
    );
    socket.write_all(head.as_bytes()).await.unwrap();
    assert!(read_until(&mut socket, "\r\n\r\n").await.starts_with("HTTP/1.1 101"));
    eventually("both run", SOON, || async { gateway.metric("infergate_requests_in_flight").await == 2.0 }).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(gateway.reload(&text(&[])).await.status, 200);
    let mut rest = Vec::new();
    // It may end in a reset, too.
    let closed = tokio::time::timeout(SECOND, socket.read_to_end(&mut rest)).await;
    assert!(closed.is_ok(), "it is closed within a second");
    let answer = waiting.await.unwrap();
    assert_eq!((answer.status, answer.code()), (401, "key_revoked".to_owned()), "{}", answer.text());
    let records = Journal::settled(&gateway).await.of_kind("request");
    assert!(records.iter().all(|record| record["code"] == "key_revoked"), "{records:?}");
}

#[tokio::test]
async fn what_a_revoked_key_began_finishes_if_policy_does_not_say_otherwise() {
    let goes = key("t", "");
    let (_server, gateway, text) = slow("finish", &[&goes]).await;
    let mut open = Vec::new();
    for client in Client::both() {
        let headers = [("authorization", &*bearer(&goes.text))];
        open.push(client.open(gateway.address, CHAT, &headers, chat(true, 20)).await);
    }
    assert_eq!(gateway.reload(&text(&[])).await.status, 200);
    assert_eq!(ask(&gateway, &goes.text).await.status, 401);
    for stream in open {
        let got = stream.into_body().collect().await.unwrap().to_bytes();
        assert!(got.ends_with(b"data: [DONE]\n\n"));
    }
}
