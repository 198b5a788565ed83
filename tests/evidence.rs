//! One record for every request, which tells what was asked, who decided what, who answered, and how it ended.

mod acts;
mod crash;
mod keeping;
mod outcomes;
mod pressure;
mod tampering;

use std::time::Duration;

use http::{Method, Request};
use http_body_util::Full;
use infergate::surface::{Surface, TABLE};
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};

use crate::support::requests::{STREAMING, body, every_surface, passed_on, policy_for_every_surface, request};
use crate::support::socket::Socket;
use crate::support::wire::{Framing, Step, Wire, read_until};
use crate::support::{
    Answer, Client, Gateway, Journal, Simulated, chat, eventually, faulty_server, model_server, policy,
};

const CHAT: &str = "/v1/chat/completions";
/// Slack for a loaded machine.
const SOON: Duration = Duration::from_secs(5);
/// All that a record may say of itself; nothing else stands at its top.
const MEMBERS: [&str; 25] = [
    "v",
    "seq",
    "kind",
    "at",
    "id",
    "outcome",
    "status",
    "surface",
    "operation",
    "method",
    "stream",
    "client",
    "trace",
    "principal",
    "tenant",
    "model",
    "policy",
    "decisions",
    "attempts",
    "usage",
    "bytes",
    "times",
    "code",
    "message",
    "chain",
];

fn id(answer: &Answer) -> &str {
    answer.header("x-request-id")
}

/// The record of an answered request, the only one with its id.
async fn record(gateway: &Gateway, answer: &Answer) -> Value {
    Journal::settled(gateway).await.record(id(answer))
}

fn words<'a>(list: &'a Value, member: &str) -> Vec<&'a str> {
    list.as_array().unwrap().iter().map(|entry| entry[member].as_str().unwrap()).collect()
}

/// Times that must not go backwards.
#[track_caller]
fn in_order(times: &[&Value]) {
    let times: Vec<u64> = times.iter().map(|time| time.as_u64().expect("a time")).collect();
    assert!(times.is_sorted(), "{times:?}");
}

/// What every record says, whatever became of its request.
fn check_frame(record: &Value, hash: &str, protocol: &str) {
    let strangers: Vec<_> = record.as_object().unwrap().keys().filter(|key| !MEMBERS.contains(&key.as_str())).collect();
    assert!(strangers.is_empty(), "{strangers:?} in {record}");
    assert_eq!((&record["policy"]["revision"], &record["policy"]["hash"]), (&json!(1), &json!(hash)));
    assert_eq!(record["client"]["protocol"], protocol);
    assert!(record["client"]["address"].as_str().unwrap().starts_with("127.0.0.1:"), "{record}");
    assert!(record["times"]["ended"].as_u64().unwrap() > 0 && record["times"]["self"].is_u64(), "{record}");
}

/// What the record of a request says that an upstream answered.
fn check_passed(record: &Value, surface: &str, sent: usize, answer: &Answer) {
    assert_eq!((&record["outcome"], &record["status"]), (&json!("ok"), &json!(200)), "{record}");
    assert_eq!(record["surface"], surface);
    // Nobody asked for a key, and the pool takes any number of requests.
    assert_eq!(words(&record["decisions"], "stage"), ["route"], "{record}");
    for decision in record["decisions"].as_array().unwrap() {
        let said = ["rule", "verdict", "why"].iter().all(|name| !decision[name].as_str().unwrap().is_empty());
        assert!(said, "{decision}");
    }
    let (bytes, attempts) = (&record["bytes"], record["attempts"].as_array().unwrap());
    assert_eq!((&bytes["request"], &bytes["answer"]), (&json!(sent), &json!(answer.body.len())), "{record}");
    let [attempt] = attempts.as_slice() else { panic!("one attempt: {record}") };
    assert_eq!((&attempt["pool"], &attempt["provider"]), (&json!("p"), &json!("sglang")));
    assert_eq!(attempt["upstream"], answer.header("x-infergate-upstream"));
    assert_eq!((&attempt["status"], &attempt["result"]), (&json!(200), &json!("answered")));
    // Nothing is told twice.
    for name in ["address", "sent", "received"] {
        assert_eq!(attempt.get(name), None, "{record}");
    }
    let times = &record["times"];
    assert_eq!(times.get("queued"), None, "{record}");
    in_order(&[&times["body"], &times["admitted"], &times["first"], &times["ended"]]);
    in_order(&[
        &times["admitted"],
        &attempt["began"],
        &attempt["head"],
        &times["first"],
        &attempt["ended"],
        &times["ended"],
    ]);
}

#[tokio::test]
async fn every_endpoint_leaves_one_record_that_names_every_stage() {
    let server = every_surface().await;
    let top = "passthrough: [{path: /v1/unheard, pool: p}]\n";
    let gateway = Gateway::start(&policy_for_every_surface(&server.url(), "", "", top)).await;
    let hash = gateway.admin("/admin/policy").await.json()["hash"].as_str().unwrap().to_owned();
    let mut count = 0;
    for (client, protocol) in Client::both().into_iter().zip(["http/1.1", "h2"]) {
        for (row, stream) in passed_on().flat_map(|row| [(row, false), (row, true)]) {
            if stream && !STREAMING.contains(&row.path) {
                continue;
            }
            let answer = client.send(request(&gateway, row.path, stream, "x", "")).await;
            let record = record(&gateway, &answer).await;
            check_frame(&record, &hash, protocol);
            check_passed(&record, row.path, body(row.path, stream).1.len(), &answer);
            check_asked(&record, row, stream || row.path == "/generate_stream");
            let seen = server.seen().into_iter().rfind(|seen| seen.path == row.path).unwrap();
            assert_eq!(seen.headers["x-request-id"], id(&answer), "the upstream got the same id");
            count += 1;
        }
        for path in ["/v1/models", "/health", "/ping", "/version"] {
            let answer = client.get(gateway.address, path).await;
            let record = record(&gateway, &answer).await;
            check_frame(&record, &hash, protocol);
            assert_eq!((&record["outcome"], &record["surface"]), (&json!("ok"), &json!(path)));
            assert_eq!(record["decisions"], json!([]));
            assert_eq!((&record["attempts"], &record["bytes"]["answer"]), (&json!([]), &json!(answer.body.len())));
            count += 1;
        }
        let through = client.post(gateway.address, "/v1/unheard", "any bytes").await;
        let through = record(&gateway, &through).await;
        check_frame(&through, &hash, protocol);
        assert_eq!(
            (&through["surface"], &through["outcome"], &through["status"]),
            (&json!("*"), &json!("ok"), &json!(404))
        );
        assert_eq!((words(&through["decisions"], "stage"), &through["model"].get("asked")), (vec!["route"], &None));
        let unknown = client.get(gateway.address, "/nobody?key=canary").await;
        let unknown = record(&gateway, &unknown).await;
        check_frame(&unknown, &hash, protocol);
        assert_eq!(
            (&unknown["surface"], &unknown["outcome"], &unknown["code"]),
            (&json!("unknown"), &json!("refused"), &json!("not_found"))
        );
        assert_eq!((words(&unknown["decisions"], "stage").pop(), &unknown["status"]), (Some("refuse"), &json!(404)));
        count += 2;
    }
    check_websocket(&gateway, &hash).await;
    let journal = Journal::settled(&gateway).await;
    assert_eq!((journal.ids().len(), journal.of_kind("request").len()), (count + 1, count + 1), "one each and no more");
}

/// What the request was, and the model's names.
fn check_asked(record: &Value, row: &Surface, stream: bool) {
    assert_eq!((&record["operation"], &record["method"]), (&json!(row.operation.name()), &json!(row.method.as_str())));
    assert_eq!(record.get("stream"), stream.then_some(&json!(true)), "{record}");
    let names_none = ["/generate", "/generate_stream", "/info"].contains(&row.path);
    let asked = if names_none { Value::Null } else { json!("m") };
    let model = &record["model"];
    assert_eq!((&model["asked"], &model["route"], &model["used"]), (&asked, &json!("m"), &json!("m")), "{record}");
}

async fn check_websocket(gateway: &Gateway, hash: &str) {
    let row = TABLE.iter().find(|row| row.path == "/v1/realtime").unwrap();
    let mut stream = TcpStream::connect(gateway.address).await.unwrap();
    let head = "GET /v1/realtime?model=m HTTP/1.1\r\nhost: x\r\nupgrade: websocket\r\nconnection: upgrade\r\nsec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
    stream.write_all(head.as_bytes()).await.unwrap();
    assert!(read_until(&mut stream, "\r\n\r\n").await.contains("101"));
    tokio::time::sleep(Duration::from_millis(100)).await;
    drop(stream);
    let journal = Journal::settled(gateway).await;
    let records = journal.of_kind("request");
    let of_row: Vec<_> = records.iter().filter(|record| record["surface"] == row.path).collect();
    let [record] = of_row.as_slice() else { panic!("one record: {of_row:?}") };
    check_frame(record, hash, "http/1.1");
    assert_eq!(
        (&record["outcome"], &record["status"], &record["model"]["used"]),
        (&json!("ok"), &json!(101), &json!("m"))
    );
    assert_eq!(words(&record["decisions"], "stage"), ["route"]);
    let (attempt, times) = (&record["attempts"][0], &record["times"]);
    assert_eq!((&attempt["status"], &attempt["result"]), (&json!(101), &json!("answered")), "{record}");
    in_order(&[&times["admitted"], &attempt["head"], &times["first"], &attempt["ended"], &times["ended"]]);
    let open = times["ended"].as_u64().unwrap() - times["first"].as_u64().unwrap();
    assert!(open >= 90_000, "it stood for 100 ms: {record}");
}

#[tokio::test]
async fn nothing_that_a_client_sends_sets_a_field() {
    let server = model_server().await;
    let text = policy(&[&server.url()], "").replace("- name: m", "- name: '*'\n    rename: m");
    let gateway = Gateway::start(&text).await;
    let hash = gateway.admin("/admin/policy").await.json()["hash"].as_str().unwrap().to_owned();
    let forged = [
        ("x-infergate-tenant", "forged"),
        ("x-infergate-principal", "forged"),
        ("x-infergate-outcome", "forged"),
        ("x-forwarded-for", "6.6.6.6"),
        ("forwarded", "for=6.6.6.6"),
        ("x-real-ip", "6.6.6.6"),
        ("x-request-id", "forged\",\"outcome\":\"forged"),
    ];
    let members: String =
        MEMBERS.iter().filter(|name| **name != "model").map(|name| format!(r#""{name}":"forged","#)).collect();
    for client in Client::both() {
        let body = chat(false, 2).replacen('{', &format!("{{{members}"), 1).replacen(r#""stream":"forged","#, "", 1);
        let answer = client.post_with(gateway.address, CHAT, &forged, body).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        let mut record = record(&gateway, &answer).await;
        check_frame(&record, &hash, record["client"]["protocol"].as_str().unwrap());
        assert_eq!(record["client"]["request_id"], "forged\",\"outcome\":\"forged", "it stands where it belongs");
        record["client"]["request_id"].take();
        assert!(!record.to_string().contains("forged") && !record.to_string().contains("6.6.6.6"), "{record}");
        assert_eq!((record.get("tenant"), record.get("principal")), (None, None));
    }
}

#[tokio::test]
async fn a_name_from_outside_is_clipped_and_stays_one_line() {
    let server = model_server().await;
    let text = policy(&[&server.url()], "").replace("- name: m", "- name: '*'\n    rename: m");
    let gateway = Gateway::start(&text).await;
    let long = "\u{4e2d}".repeat(350_000);
    let names = [
        long.as_str(),
        "\"quotes\" and \\backslashes\\",
        "two\nlines\r\nand \"chain\":\"0\"}\n{\"v\":1",
        "NUL \0 and \u{1b}[31m",
        "line\u{2028}and paragraph\u{2029}",
        "",
    ];
    for client in Client::both() {
        for name in names {
            let body = chat(false, 2).replace("\"m\"", &json!(name).to_string());
            let answer = client.post(gateway.address, CHAT, body).await;
            assert_eq!(answer.status, 200, "{}", answer.text());
            let record = record(&gateway, &answer).await;
            let kept = record["model"]["asked"].as_str().unwrap();
            assert!(name.starts_with(kept) && kept.len() <= 256 && (kept.len() > 252 || kept == name), "{kept:?}");
        }
    }
    let refused = Client::h1().get(gateway.address, &format!("/{}", "x".repeat(9_000))).await;
    let refused = record(&gateway, &refused).await;
    assert!(refused.to_string().len() < 2_000, "{refused}");
    let mut gateway = gateway;
    gateway.signal("TERM");
    gateway.ended(SOON).await;
    Journal::of(&gateway).proved();
}

/// A gateway whose upstream has a key, logging all that it can.
async fn canaries(server: &Simulated, more: &str) -> Gateway {
    let urls =
        [format!("{}\n        key: {{env: CANARY_KEY}}\n        headers: {{x-upstream: canary-header}}", server.url())];
    let text = policy(
        &[&urls[0]],
        &format!("timeouts: {{first_token_ms: 300, answer_ms: 300, between_tokens_ms: 300}}\n{more}"),
    );
    let text = format!("{text}requests: {{body_bytes_max: 5000}}\n");
    let gateway =
        Gateway::spawn(&text, "threads: 2\n", &[], &[("CANARY_KEY", "canary-upstream"), ("INFERGATE_LOG", "debug")]);
    gateway.ready().await;
    gateway
}

#[tokio::test]
async fn no_secret_and_no_text_is_in_the_journal_whatever_happens() {
    let server = model_server().await;
    let gateway = canaries(
        &server,
        "retry: {attempts: 1}\nbreaker: {failures: 0, requests_min: 1000000}\nhealth: {enabled: false}",
    )
    .await;
    let secret = http::HeaderValue::from_bytes(b"canary-\xff\xfe").unwrap();
    for fault in
        ["", "status=500", "reset", "garbage", "hang", "cut", "stall", "context", "error-event", "content-filter=400"]
    {
        for (path, model, long) in [
            (CHAT, "m", false),
            (CHAT, "nobody", false),
            (CHAT, "m", true),
            ("/nobody", "m", false),
            ("/v1/messages", "m", false),
        ] {
            for (client, stream) in
                Client::both().into_iter().flat_map(|client| [(client.clone(), true), (client, false)])
            {
                let text = if long { "canary-prompt".repeat(1_000) } else { "canary-prompt".to_owned() };
                let body = chat(stream, 2).replace("Hello", &text).replace("\"m\"", &format!("\"{model}\""));
                let request = Request::post(format!(
                    "http://{}{path}?key=canary&api_key=canary&access_token=canary",
                    gateway.address
                ))
                .header("content-type", "application/json")
                .header("authorization", "Bearer canary-client")
                .header("x-api-key", "canary-client")
                .header("api-key", "canary-client")
                .header("cookie", "session=canary-client")
                .header("x-odd", secret.clone());
                let request = if fault.is_empty() { request } else { request.header("x-simulate-fault", fault) };
                let _broken_off = client.try_send(request.body(Full::new(body.into())).unwrap()).await;
            }
        }
    }
    let journal = Journal::settled(&gateway).await;
    let outcomes: std::collections::BTreeSet<String> =
        journal.of_kind("request").iter().map(|record| record["outcome"].as_str().unwrap().to_owned()).collect();
    assert_eq!(outcomes.into_iter().collect::<Vec<_>>(), ["ok", "refused", "timeout", "upstream_error"]);
    assert_eq!(journal.of_kind("request").len(), 10 * 5 * 4);
    // The model server's answers: their words must not stand there either.
    let answer = Client::h1().post(gateway.address, CHAT, chat(false, 40)).await.json();
    let said = answer["choices"][0]["message"]["content"].as_str().unwrap().to_owned();
    let everything = String::from_utf8_lossy(&Journal::settled(&gateway).await.everything()).into_owned();
    assert!(said.len() > 20 && !everything.contains(&said[..20]), "{said}");
    assert_eq!(everything.lines().find(|line| line.contains("canary")), None);
    assert_eq!(gateway.log().lines().find(|line| line.contains("canary")), None);
}

#[tokio::test]
async fn answers_tell_what_the_gateway_took_where_the_policy_says_so() {
    let server = faulty_server(&["slow-first=120"]).await;
    let plain = policy(&[&server.url()], "");
    let gateway = Gateway::start(&plain).await;
    for client in Client::both() {
        let answer = client.post(gateway.address, CHAT, chat(true, 2)).await;
        assert_eq!(answer.header("x-infergate-overhead-us"), "");
        assert!(answer.header("server-timing").contains("upstream;dur="), "{:?}", answer.headers);
    }
    assert_eq!(
        gateway.reload(&format!("{plain}requests: {{overhead: true, server_timing: false}}\n")).await.status,
        200
    );
    for client in Client::both() {
        for stream in [false, true] {
            let answer = client.post(gateway.address, CHAT, chat(stream, 2)).await;
            let told: u64 = answer.header("x-infergate-overhead-us").parse().unwrap();
            assert!((1..50_000).contains(&told), "the upstream's 120 ms are not in it: {told}");
            assert_eq!(answer.header("server-timing"), "");
            let kept = record(&gateway, &answer).await["times"]["self"].as_u64().unwrap();
            assert!(kept >= told && kept < 50_000, "the record agrees: {told} told, {kept} kept");
        }
    }
}

/// Whether the record of `id` is in the journal's files at this moment.
fn is_there(journal: &Journal, id: &str) -> bool {
    let wanted = format!("\"id\":\"{id}\"");
    journal
        .segments()
        .iter()
        .any(|path| memchr::memmem::find(&std::fs::read(path).unwrap(), wanted.as_bytes()).is_some())
}

#[tokio::test]
async fn whoever_has_a_whole_answer_finds_its_record_on_disk() {
    let server = model_server().await;
    let through = Wire::start(|heard| {
        let answer: &[u8] = match heard.header("x-wanted") {
            "204" => b"HTTP/1.1 204 No Content\r\n\r\n",
            "empty" => b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n",
            "no-chunks" => b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
            "no-events" => b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: 0\r\n\r\n",
            "304" => b"HTTP/1.1 304 Not Modified\r\n\r\n",
            _ => b"HTTP/1.1 500 No\r\ncontent-length: 2\r\n\r\nno",
        };
        vec![Step::Say(bytes::Bytes::from_static(answer))]
    })
    .await;
    let pieces = Wire::start(|_| {
        let body = bytes::Bytes::from(vec![b'x'; 20_000]);
        let mut steps = Framing::Length.answer("text/plain", &body, 700);
        steps.insert(5, Step::Pause(Duration::from_millis(5)));
        steps
    })
    .await;
    // So late that nothing is there by chance.
    let text = format!(
        "{}  q: {{upstreams: [{{url: '{}'}}], health: {{enabled: false}}}}\n  r: {{upstreams: [{{url: '{}'}}], health: {{enabled: false}}}}\n\
         passthrough: [{{path: /through, pool: q}}, {{path: /pieces, pool: r}}]\naudit: {{durable: before_response_end, commit_ms: 20000}}\n",
        policy(&[&server.url()], ""),
        through.url(),
        pieces.url()
    );
    let gateway = Gateway::start(&text).await;
    let journal = Journal::of(&gateway);
    let post = |path: &str, wanted: &str, body: String| {
        let request =
            Request::post(format!("http://{}{path}", gateway.address)).header("content-type", "application/json");
        request.header("x-wanted", wanted).body(Full::new(body.into())).unwrap()
    };
    let get = |path: &str| {
        Request::builder()
            .method(Method::GET)
            .uri(format!("http://{}{path}", gateway.address))
            .body(Full::default())
            .unwrap()
    };
    let mut missing = Vec::new();
    for (client, protocol) in Client::both().into_iter().zip(["h1", "h2"]) {
        for turn in 0..8 {
            let mut requests = vec![
                ("answer", post(CHAT, "", chat(false, 3))),
                ("long answer", post(CHAT, "", chat(false, 900))),
                ("stream", post(CHAT, "", chat(true, 3))),
                ("no model", post(CHAT, "", chat(false, 3).replace("\"m\"", "\"n\""))),
                ("unknown", get("/nobody")),
                ("local", get("/v1/models")),
                ("pieces", post("/pieces", "", "x".to_owned())),
            ];
            requests.extend(
                ["204", "empty", "no-chunks", "no-events", "304", "500"]
                    .map(|wanted| (wanted, post("/through", wanted, "x".to_owned()))),
            );
            for (what, request) in requests {
                let answer = client.send(request).await;
                let there = is_there(&journal, id(&answer));
                assert!(answer.whole && !id(&answer).is_empty(), "{what}");
                if !there {
                    missing.push(format!("{protocol} {what} {turn}"));
                }
            }
        }
    }
    assert!(missing.is_empty(), "{missing:?}");
}

#[tokio::test]
async fn whoever_has_the_goodbye_or_the_end_of_a_websocket_finds_its_record_on_disk() {
    let server = model_server().await;
    let rude = rude_server().await;
    // So late that nothing is there by chance.
    let text = format!(
        "{}  q: {{upstreams: [{{url: '{}'}}], health: {{enabled: false}}}}\n\
         passthrough: [{{path: /rude, pool: q, websocket: true}}]\naudit: {{durable: before_response_end, commit_ms: 20000}}\n",
        policy(&[&server.url()], ""),
        rude
    );
    let gateway = Gateway::start(&text).await;
    let journal = Journal::of(&gateway);
    for round in 0..8 {
        let (_, mut socket) = Socket::open(gateway.address, "/v1/realtime?model=m", "").await;
        socket.send(0x81, b"hello").await;
        assert_eq!(socket.receive().await, Some((0x81, b"hello".to_vec())));
        assert_eq!(count(&journal, "/v1/realtime"), round, "it is still open");
        socket.send(0x88, &[3, 232]).await;
        assert_eq!(socket.receive().await, Some((0x88, vec![3, 232])));
        assert_eq!(count(&journal, "/v1/realtime"), round + 1, "with the goodbye");
        assert_eq!(socket.receive().await, None);
        let (head, mut socket) = Socket::open(gateway.address, "/rude", "").await;
        assert_eq!(socket.receive().await, Some((0x81, b"hi".to_vec())), "{head}");
        assert_eq!(socket.receive().await, None);
        assert_eq!(count(&journal, "*"), round + 1, "with the end");
    }
    let kept = journal.of_kind("request");
    assert!(kept.iter().all(|record| record["outcome"] == "ok" && record["status"] == 101), "{kept:?}");
}

/// A WebSocket's server that says something and goes, without a goodbye. Its URL.
async fn rude_server() -> String {
    const SAID: &[u8] =
        b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n\x81\x02hi";
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            read_until(&mut stream, "\r\n\r\n").await;
            stream.write_all(SAID).await.unwrap();
        }
    });
    url
}

/// How many records of requests for `path` are in the journal's files at this moment.
fn count(journal: &Journal, path: &str) -> usize {
    let wanted = format!("\"surface\":\"{path}\"");
    let files = journal.segments().into_iter().map(|path| std::fs::read(path).unwrap());
    files.map(|file| memchr::memmem::find_iter(&file, wanted.as_bytes()).count()).sum()
}

#[tokio::test]
async fn a_record_is_found_by_its_id_as_soon_as_its_answer_is_there() {
    let server = model_server().await;
    let gateway = Gateway::start(&format!("{}audit: {{commit_ms: 20000}}\n", policy(&[&server.url()], ""))).await;
    for client in Client::both() {
        let answer = client.post(gateway.address, CHAT, chat(false, 3)).await;
        let path = format!("/admin/v1/requests/{}", id(&answer));
        eventually("it is found", SOON, || async { gateway.admin(&path).await.status == 200 }).await;
        assert_eq!(gateway.admin(&path).await.json()["id"], id(&answer));
    }
}
