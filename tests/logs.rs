//! Logs are for people: their levels change while the process runs, and nothing secret is in them.

use std::time::Duration;

use bytes::Bytes;
use http::Request;
use http_body_util::Full;
use serde_json::{Value, json};

use crate::support::{
    Answer, CANARY_HEADERS, Client, Gateway, Process, chat, eventually, faulty_server, free_port, model_server, policy,
};

const CHAT: &str = "/v1/chat/completions";
const LOG: &str = "/admin/v1/log";
const SOON: Duration = Duration::from_secs(5);

async fn put(gateway: &Gateway, body: impl Into<Bytes>, headers: &[(&str, &str)]) -> Answer {
    let request = Request::put(format!("http://{}{LOG}", gateway.admin));
    let request = headers.iter().fold(request, |request, (name, value)| request.header(*name, *value));
    Client::h1().send(request.body(Full::new(body.into())).unwrap()).await
}

async fn set(gateway: &Gateway, levels: &str) -> Answer {
    put(gateway, json!({"levels": levels}).to_string(), &[]).await
}

async fn levels(gateway: &Gateway) -> Value {
    gateway.admin(LOG).await.json()["levels"].clone()
}

/// How often a request that has ended has been logged, after one more.
async fn ended(gateway: &Gateway) -> usize {
    assert_eq!(Client::h1().post(gateway.address, CHAT, chat(false, 2)).await.status, 200);
    gateway.comes_to("infergate_requests_in_flight", 0.0).await;
    gateway.log().matches("request ended").count()
}

/// The text of the journal as far as it is on disk.
fn journal(gateway: &Gateway) -> String {
    let runs = std::fs::read_dir(gateway.directory.path().join("journal/runs")).unwrap();
    let segment = |run: std::io::Result<std::fs::DirEntry>| run.unwrap().path().join("000001.jsonl");
    runs.map(|run| std::fs::read_to_string(segment(run)).unwrap()).collect()
}

#[tokio::test]
async fn levels_change_without_a_restart() {
    let server = model_server().await;
    let gateway = Gateway::start(&policy(&[&server.url()], "")).await;
    assert_eq!(levels(&gateway).await, "info");
    assert_eq!(ended(&gateway).await, 0);
    for wanted in ["info,infergate=debug", "debug", "warn,infergate::exchange=debug"] {
        let before = gateway.log().matches("request ended").count();
        let answer = set(&gateway, wanted).await;
        assert_eq!((answer.status, &answer.json()["levels"]), (200, &wanted.into()));
        assert_eq!(levels(&gateway).await, wanted);
        assert_eq!(ended(&gateway).await, before + 1, "{wanted}: {}", gateway.log());
    }
    let before = ended(&gateway).await;
    for quiet in ["info", "debug,infergate=info", "off"] {
        assert_eq!(set(&gateway, quiet).await.status, 200);
        assert_eq!(ended(&gateway).await, before, "{quiet}");
    }
    assert!(gateway.log().contains("log levels changed"), "the change itself is told");
    let acts = || journal(&gateway).matches(r#""act":"log_levels""#).count();
    eventually("each change is on record", SOON, || async { acts() == 6 }).await;
    assert!(journal(&gateway).contains(r#""before":"debug","levels":"warn,infergate::exchange=debug""#));
}

#[tokio::test]
async fn levels_that_are_none_are_refused_with_the_reason_and_change_nothing() {
    let server = model_server().await;
    let gateway = Gateway::start(&policy(&[&server.url()], "")).await;
    for (wrong, why) in [
        ("infergate=loud", "`loud` is no level"),
        ("debgu", "`debgu` is no level"),
        ("", "is no level"),
        ("info,[=debug", ""),
    ] {
        let answer = set(&gateway, wrong).await;
        assert_eq!(answer.status, 400, "{wrong}: {}", answer.text());
        assert!(answer.json()["error"].as_str().unwrap().contains(why), "{wrong}: {}", answer.text());
    }
    for body in ["", "debug", "{}", r#"{"levels": 7}"#, r#"{"levels": ["debug"]}"#] {
        let answer = put(&gateway, body, &[]).await;
        assert!(answer.status == 400 && answer.text().contains("levels"), "{body}: {}", answer.text());
    }
    let long = json!({"levels": "info,".repeat(10_000)}).to_string();
    assert_eq!(put(&gateway, long, &[]).await.status, 400);
    let page = [("origin", "http://evil.example")];
    assert_eq!(put(&gateway, r#"{"levels": "off"}"#, &page).await.status, 403, "an open page may not silence it");
    let answer = Client::h1().post(gateway.admin, LOG, "{}").await;
    assert_eq!((answer.status, answer.header("allow")), (405, "GET, PUT"));
    assert_eq!(levels(&gateway).await, "info");
    assert_eq!(ended(&gateway).await, 0);
}

#[tokio::test]
async fn without_a_terminal_each_line_is_json() {
    let server = model_server().await;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("policy.yaml");
    std::fs::write(&path, policy(&[&server.url()], "")).unwrap();
    let [listen, admin] = [(); 2].map(|()| format!("127.0.0.1:{}", free_port()));
    let journal = directory.path().join("journal").display().to_string();
    let arguments = ["--listen", &listen, "--admin", &admin, "--log", "debug", "--journal", &journal];
    let policy_argument = ["--policy", path.to_str().unwrap()];
    let process = Process::start(&[&["serve"], &arguments[..], &policy_argument[..]].concat(), &[]);
    let admin = admin.parse().unwrap();
    let ready = || async { Client::h1().try_get(admin, "/readyz").await.is_some_and(|answer| answer.status == 200) };
    eventually("ready", Duration::from_secs(20), ready).await;
    // A name with a line end in it must not make a second line.
    let body = chat(false, 2).replace("\"m\"", r#""two\nlines \u001b[31m""#);
    assert_eq!(Client::h1().post(listen.parse().unwrap(), CHAT, body).await.status, 404);
    eventually("it is logged", SOON, || async { process.err().contains("request ended") }).await;
    let log = process.err();
    assert!(log.lines().count() > 3, "{log}");
    for line in log.lines() {
        let line: Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
        for name in ["timestamp", "level", "target", "message"] {
            assert!(line[name].is_string(), "{name} is not in {line}");
        }
    }
}

#[tokio::test]
async fn no_secret_is_logged_however_much_is() {
    let server = model_server().await;
    let broken = faulty_server(&["status=500"]).await;
    let key = "key: {env: CANARY_KEY}\n        headers: {x-upstream: canary-header}";
    let urls = [&broken, &server].map(|server| format!("{}\n        {key}", server.url()));
    let gateway = Gateway::spawn(
        &policy(&[&urls[0], &urls[1]], "timeouts: {first_token_ms: 300, answer_ms: 300}"),
        "threads: 2\n",
        &[],
        &[("CANARY_KEY", "canary-upstream")],
    );
    gateway.ready().await;
    // The second means every library too.
    for wanted in ["debug", "debug,infergate=trace"] {
        assert_eq!(set(&gateway, wanted).await.status, 200);
        for fault in ["", "reset", "garbage", "hang", "cut", "context"] {
            let fault = [("x-simulate-fault", fault)];
            let headers: Vec<_> =
                CANARY_HEADERS.iter().chain(fault.iter().filter(|(_, value)| !value.is_empty())).copied().collect();
            for (path, model) in [(CHAT, "m"), (CHAT, "nobody"), ("/nobody", "m")] {
                let path = format!("{path}?key=canary-query&api_key=canary-query");
                let body = chat(true, 2).replace("Hello", "canary-prompt").replace("\"m\"", &format!("\"{model}\""));
                for client in Client::both() {
                    client.post_with(gateway.address, &path, &headers, body.clone()).await;
                }
            }
        }
        gateway.comes_to("infergate_requests_in_flight", 0.0).await;
    }
    let log = gateway.log();
    assert!(log.matches("request ended").count() >= 72, "{log}");
    assert!(log.contains(r#""target":"h2::"#), "the libraries were heard");
    assert_eq!(log.lines().find(|line| line.contains("canary")), None);
}
