//! What people do to a gateway is on record beside what the gateway does: who, by what way, and what changed.

use std::time::Duration;

use serde_json::{Value, json};

use super::{CHAT, SOON};
use crate::support::{Client, Gateway, Journal, Load, chat, eventually, model_server, policy};

/// The acts of this name, when there are so many.
async fn acts(gateway: &Gateway, act: &str, count: usize) -> Vec<Value> {
    let journal = Journal::of(gateway);
    eventually(&format!("{count} of {act}"), Duration::from_secs(15), async || journal.acts(act).len() == count).await;
    journal.acts(act)
}

async fn hash(gateway: &Gateway) -> Value {
    gateway.admin("/admin/policy").await.json()["hash"].clone()
}

#[tokio::test]
async fn a_start_and_an_end_are_on_record() {
    let server = model_server().await;
    let mut gateway =
        Gateway::with(&policy(&[&server.url()], ""), "threads: 2\nshutdown: {drain_delay_ms: 0}\n", &[]).await;
    let start = acts(&gateway, "start", 1).await.remove(0);
    assert_eq!((&start["by"], &start["upgrade"]), (&json!({"how": "process"}), &json!(false)));
    assert_eq!(start["listeners"], json!([gateway.address.to_string()]));
    let first = acts(&gateway, "reload", 1).await.remove(0);
    assert_eq!((&first["from"], &first["to"], &first["revision"]), (&Value::Null, &hash(&gateway).await, &json!(1)));
    gateway.signal("TERM");
    assert_eq!(gateway.ended(SOON).await, Some(0));
    let journal = Journal::of(&gateway);
    let drain = journal.acts("drain").remove(0);
    assert_eq!((&drain["by"], &drain["signal"]), (&json!({"how": "signal"}), &json!("SIGTERM")));
    let last = journal.lines().pop().unwrap();
    assert_eq!((&last["kind"], last["reason"].is_string()), (&json!("close"), true));
    journal.proved();
}

#[tokio::test]
async fn a_reload_is_on_record_with_who_asked_and_what_changed() {
    let server = model_server().await;
    // A secret in another directory is read again only when somebody asks.
    let elsewhere = tempfile::tempdir().unwrap();
    let key = elsewhere.path().join("key");
    std::fs::write(&key, "canary-1").unwrap();
    let upstream = format!("{}\n        key: {{file: {}}}", server.url(), key.display());
    let gateway = Gateway::start(&policy(&[&upstream], "")).await;
    let mut hashes = vec![hash(&gateway).await];
    std::fs::write(&key, "canary-2").unwrap();
    assert_eq!(Client::h1().post(gateway.admin, "/admin/reload", "").await.json()["reloaded"], true);
    acts(&gateway, "reload", 2).await;
    hashes.push(hash(&gateway).await);
    std::fs::write(&key, "canary-3").unwrap();
    gateway.signal("HUP");
    acts(&gateway, "reload", 3).await;
    hashes.push(hash(&gateway).await);
    std::fs::write(gateway.policy_path(), policy(&[&upstream], "timeouts: {answer_ms: 3000}")).unwrap();
    let reloads = acts(&gateway, "reload", 4).await;
    hashes.push(hash(&gateway).await);
    for (at, two) in hashes.windows(2).enumerate() {
        let reload = &reloads[at + 1];
        assert_eq!(
            (&reload["from"], &reload["to"], &reload["revision"]),
            (&two[0], &two[1], &json!(at + 2)),
            "{reload}"
        );
        assert_eq!(two[1].as_str().unwrap().len(), 64);
    }
    let by: Vec<&str> = reloads.iter().map(|reload| reload["by"]["how"].as_str().unwrap()).collect();
    assert_eq!(by, ["process", "admin", "signal", "file"]);
    assert!(reloads[1]["by"]["address"].as_str().unwrap().starts_with("127.0.0.1:"), "{}", reloads[1]);
    assert!(!String::from_utf8_lossy(&Journal::of(&gateway).everything()).contains("canary"));
    // A reload that changes nothing is no act.
    assert_eq!(Client::h1().post(gateway.admin, "/admin/reload", "").await.json()["reloaded"], false);
    assert_eq!(Journal::settled(&gateway).await.acts("reload").len(), 4);
    // The next request says which policy decided about it.
    assert_eq!(Client::h1().post(gateway.address, CHAT, chat(false, 1)).await.status, 200);
    let record = Journal::settled(&gateway).await.of_kind("request").pop().unwrap();
    assert_eq!((&record["policy"]["hash"], &record["policy"]["revision"]), (&hashes[3], &json!(4)));
}

#[tokio::test]
async fn a_refused_policy_is_on_record_without_the_secrets_in_it() {
    let server = model_server().await;
    let good = policy(&[&server.url()], "");
    let gateway = Gateway::start(&good).await;
    let bad = [
        good.replace("- url: ", "- key: canary-key\n        url: "),
        good.replace("- url: ", "- key: {env: [canary-key]}\n        url: "),
        good.replace("- url: ", "- key: {literal: canary-key}\n        url: "),
        good.replace("- url: ", "- key: {file: /does/not/exist}\n        url: "),
        good.replace("http://", "http://user:canary-password@"),
        good.replace("http://", "ftp://user:canary-password@"),
        good.replace("- url: ", "- headers: {authorization: [canary-key]}\n        url: "),
        good.replace("- url: ", "- headers: {authorization: \"canary-key\\n\"}\n        url: "),
        good.replace("pool: p", "pool: q"),
    ];
    let mut refused = 0;
    for text in &bad {
        let answer = gateway.reload(text).await;
        assert_eq!(answer.status, 422, "{text}\n{}", answer.text());
        let told = acts(&gateway, "reload_refused", refused + 1);
        let told = tokio::time::timeout(SOON, told).await;
        // The watcher may have seen the file too.
        let journal = Journal::settled(&gateway).await;
        let all = journal.acts("reload_refused");
        assert!(told.is_ok() || all.len() > refused, "{text}");
        refused = all.len();
        let last = all.last().unwrap();
        assert!(!last["problems"].as_array().unwrap().is_empty(), "{last}");
        let everything = String::from_utf8_lossy(&journal.everything()).into_owned();
        assert_eq!(everything.lines().find(|line| line.contains("canary")), None, "{text}");
        assert_eq!(gateway.log().lines().find(|line| line.contains("canary")), None, "{text}");
    }
    assert_eq!(Journal::of(&gateway).acts("reload").len(), 1, "none came into force");
}

#[tokio::test]
async fn a_breaker_set_by_hand_holds_and_is_on_record() {
    let (one, two) = (model_server().await, model_server().await);
    let gateway = Gateway::start(&policy(&[&one.url(), &two.url()], "health: {enabled: false}")).await;
    let set = async |state: &str| {
        let path = format!("/admin/v1/breaker?pool=p&address={}&state={state}", one.address());
        let answer = Client::h1().post(gateway.admin, &path, "").await;
        assert_eq!(answer.status, 200, "{}", answer.text());
    };
    let ask = async || {
        for client in Client::both() {
            for _ in 0..10 {
                assert_eq!(client.post(gateway.address, CHAT, chat(false, 1)).await.status, 200);
            }
        }
    };
    ask().await;
    let before = one.seen().len();
    assert!(before > 0);
    set("open").await;
    ask().await;
    assert_eq!(one.seen().len(), before, "it gets no requests");
    let listed = gateway.admin("/admin/upstreams").await.text();
    assert!(listed.contains(r#""breaker": "open""#), "{listed}");
    set("closed").await;
    ask().await;
    assert!(one.seen().len() > before, "it gets requests again");
    let acts = acts(&gateway, "breaker", 2).await;
    for (act, state) in acts.iter().zip(["open", "closed"]) {
        assert_eq!(
            (&act["pool"], &act["address"], &act["state"]),
            (&json!("p"), &json!(one.address().to_string()), &json!(state))
        );
        assert!(
            act["by"]["how"] == "admin" && act["by"]["address"].as_str().unwrap().starts_with("127.0.0.1:"),
            "{act}"
        );
    }
    for wrong in [
        "pool=p&address=1.2.3.4:5&state=open",
        "pool=q&state=open",
        "",
        &format!("pool=p&address={}&state=ajar", one.address()),
    ] {
        let answer = Client::h1().post(gateway.admin, &format!("/admin/v1/breaker?{wrong}"), "").await;
        assert!(matches!(answer.status, 400 | 404), "{wrong}: {}", answer.text());
    }
    assert_eq!(Journal::settled(&gateway).await.acts("breaker").len(), 2);
}

#[tokio::test]
async fn other_log_levels_are_on_record() {
    let server = model_server().await;
    let gateway = Gateway::start(&policy(&[&server.url()], "")).await;
    let request = http::Request::put(format!("http://{}/admin/v1/log", gateway.admin))
        .body(r#"{"levels":"info,infergate=debug"}"#.into())
        .unwrap();
    assert_eq!(Client::h1().send(request).await.status, 200);
    let act = acts(&gateway, "log_levels", 1).await.remove(0);
    assert_eq!(
        (&act["before"], &act["levels"], &act["by"]["how"]),
        (&json!("info"), &json!("info,infergate=debug"), &json!("admin"))
    );
}

#[tokio::test]
async fn an_upgrade_is_on_record_and_two_processes_share_a_journal() {
    let server = model_server().await;
    let sockets = tempfile::tempdir().unwrap();
    let settings = format!(
        "threads: 2\nupgrade_socket: {}\nshutdown: {{drain_delay_ms: 0, drain_ms: 20000}}\n",
        sockets.path().join("upgrade.sock").display()
    );
    // Small segments, so that both put the journal in order at the same time.
    let text = format!("{}audit: {{commit_ms: 5, segment_bytes: 12000}}\n", policy(&[&server.url()], ""));
    let mut gateway = Gateway::with(&text, &settings, &[]).await;
    let journal = Journal::of(&gateway);
    let stream =
        Client::h1().open(gateway.address, CHAT, &[("x-simulate-fault", "delay-between=50")], chat(true, 40)).await;
    let load = Load::start(gateway.address, 2);
    let mut next = gateway.upgrade();
    eventually("two runs", SOON, async || journal.runs().len() == 2).await;
    tokio::time::sleep(Duration::from_millis(400)).await;
    gateway.signal("QUIT");
    let body = http_body_util::BodyExt::collect(stream.into_body()).await.unwrap().to_bytes();
    assert!(body.ends_with(b"data: [DONE]\n\n"));
    let (code, report) = journal.verify();
    assert_eq!(code, 0, "while both write: {:#}", report["problems"]);
    assert_eq!(gateway.ended(Duration::from_secs(20)).await, Some(0));
    let tally = load.stop().await;
    assert!(tally.lost.is_empty() && tally.whole > 20, "{tally:?}");
    next.terminated(Duration::from_secs(15)).await;
    let acts = journal.acts("upgrade");
    assert_eq!((acts.len(), &acts[0]["signal"]), (1, &json!("SIGQUIT")));
    let mut starts: Vec<bool> = journal.acts("start").iter().map(|act| act["upgrade"].as_bool().unwrap()).collect();
    starts.sort_unstable();
    assert_eq!(starts, [false, true]);
    let report = journal.proved();
    assert!(report["runs"].as_array().unwrap().iter().all(|run| run["end"] == "closed"), "{report:#}");
    let records = report["records"].as_u64().unwrap();
    assert_eq!(records, tally.whole + 1, "one each");
    assert_eq!(gateway.log().matches("could not be put in order").count(), 0, "{}", gateway.log());
}
