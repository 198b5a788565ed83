//! A new policy comes into force under traffic, and only if it is good.

use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::{Duration, Instant};

use http_body_util::BodyExt;

use crate::support::{Answer, Client, Gateway, Load, Options, Simulated, chat, eventually, model_server, policy};

const SOON: Duration = Duration::from_secs(5);

async fn revision(gateway: &Gateway) -> u64 {
    gateway.admin("/admin/policy").await.json()["revision"].as_u64().unwrap()
}

/// Waits until this many policies have come into force since the start.
async fn reaches(gateway: &Gateway, wanted: u64, limit: Duration) {
    eventually(&format!("revision {wanted}"), limit, || async { revision(gateway).await == wanted }).await;
}

async fn ask(gateway: &Gateway, model: &str) -> Answer {
    Client::h1()
        .post(gateway.address, "/v1/chat/completions", chat(false, 1).replace("\"m\"", &format!("\"{model}\"")))
        .await
}

/// A policy whose only model has this name.
fn named(server: &Simulated, model: &str) -> String {
    policy(&[&server.url()], "").replacen("name: m", &format!("name: {model}\n    rename: m"), 1)
}

#[tokio::test]
async fn a_saved_file_comes_into_force_unasked() {
    let server = model_server().await;
    let gateway = Gateway::start(&named(&server, "one")).await;
    // As editors do it: a new file in its place.
    let fresh = gateway.directory.path().join("fresh");
    std::fs::write(&fresh, named(&server, "two")).unwrap();
    std::fs::rename(&fresh, gateway.policy_path()).unwrap();
    reaches(&gateway, 2, SOON).await;
    assert_eq!((ask(&gateway, "one").await.status, ask(&gateway, "two").await.status), (404, 200));
    // And as `echo > file` does it.
    std::fs::write(gateway.policy_path(), named(&server, "three")).unwrap();
    reaches(&gateway, 3, SOON).await;
    assert_eq!(ask(&gateway, "three").await.status, 200);
}

#[tokio::test]
async fn a_mounted_configmap_is_followed() {
    let server = model_server().await;
    let gateway = Gateway::start(&named(&server, "one")).await;
    let at = |name: &str| gateway.directory.path().join(name);
    let mount = |version: &str, model: &str| {
        std::fs::create_dir(at(version)).unwrap();
        std::fs::write(at(version).join("policy.yaml"), named(&server, model)).unwrap();
        symlink(version, at("..data_tmp")).unwrap();
        std::fs::rename(at("..data_tmp"), at("..data")).unwrap();
    };
    mount("..2026_01", "one");
    std::fs::remove_file(gateway.policy_path()).unwrap();
    symlink("..data/policy.yaml", gateway.policy_path()).unwrap();
    eventually("the same policy by another way changes nothing", SOON, || async {
        ask(&gateway, "one").await.status == 200
    })
    .await;
    for (version, model) in [("..2026_02", "two"), ("..2026_03", "three")] {
        mount(version, model);
        eventually(model, SOON, || async { ask(&gateway, model).await.status == 200 }).await;
        assert_eq!(ask(&gateway, "one").await.status, 404);
    }
    assert_eq!(revision(&gateway).await, 3);
}

#[tokio::test]
async fn a_hangup_and_a_request_reload_too() {
    let server = model_server().await;
    let (elsewhere, here) = (tempfile::tempdir().unwrap(), named(&server, "one"));
    let gateway = Gateway::start(&here).await;
    // A secret that is in another directory is read again when somebody asks.
    let key = elsewhere.path().join("key");
    std::fs::write(&key, "first").unwrap();
    let text =
        here.replace("timeouts", "").replacen("- url", &format!("- key: {{file: {}}}\n        url", key.display()), 1);
    assert_eq!(gateway.reload(&text).await.json()["revision"], 2);
    std::fs::write(&key, "second").unwrap();
    gateway.signal("HUP");
    reaches(&gateway, 3, SOON).await;
    ask(&gateway, "one").await;
    assert_eq!(server.seen().pop().unwrap().headers["authorization"], "Bearer second");
    std::fs::write(&key, "third").unwrap();
    let answer = Client::h1().post(gateway.admin, "/admin/reload", "").await;
    assert_eq!((answer.status, &answer.json()["revision"]), (200, &4.into()));
    let again = Client::h1().post(gateway.admin, "/admin/reload", "").await;
    let told = again.json();
    assert_eq!((again.status, &told["reloaded"], &told["newest"]), (200, &false.into(), &true.into()), "{told}");
    assert_eq!((&told["revision"], &told["hash"]), (&4.into(), &answer.json()["hash"]), "what is in force is told");
    ask(&gateway, "one").await;
    assert_eq!(server.seen().pop().unwrap().headers["authorization"], "Bearer third");
}

#[tokio::test]
async fn a_secret_beside_the_policy_is_watched_with_it() {
    let server = model_server().await;
    let gateway = Gateway::start(&policy(&[&server.url()], "")).await;
    let key = gateway.directory.path().join("key");
    std::fs::write(&key, "first").unwrap();
    let text =
        policy(&[&server.url()], "").replacen("- url", &format!("- key: {{file: {}}}\n        url", key.display()), 1);
    assert_eq!(gateway.reload(&text).await.status, 200);
    std::fs::write(&key, "second\n").unwrap();
    reaches(&gateway, 3, SOON).await;
    assert_eq!(ask(&gateway, "m").await.status, 200);
    assert_eq!(server.seen().pop().unwrap().headers["authorization"], "Bearer second");
    // An empty secret is no secret: the old one stays in use.
    std::fs::write(&key, "").unwrap();
    eventually("told", SOON, || async { gateway.metric("infergate_policy_failed").await == 1.0 }).await;
    assert_eq!(ask(&gateway, "m").await.status, 200);
    assert_eq!(server.seen().pop().unwrap().headers["authorization"], "Bearer second");
}

#[tokio::test]
async fn a_bad_policy_changes_nothing_and_everybody_is_told() {
    let server = model_server().await;
    let good = named(&server, "one");
    let gateway = Gateway::start(&good).await;
    let hash = gateway.admin("/admin/policy").await.json()["hash"].as_str().unwrap().to_owned();
    assert_eq!(gateway.metric(&format!("infergate_policy_info{{hash=\"{hash}\"}}")).await, 1.0);
    let bad = [
        good.replace("pool: p", "pool: q"),
        good.replace("version: 1", "version: 2"),
        good.replace("url:", "uri:"),
        "version: 1\nmodels: [".to_owned(),
        String::new(),
        good.replacen("- url", "- key: {file: /does/not/exist}\n        url", 1),
    ];
    for (count, text) in bad.iter().enumerate() {
        let answer = gateway.reload(text).await;
        assert_eq!(answer.status, 422, "{text}: {}", answer.text());
        let told = answer.json()["problems"].clone();
        assert!(!told.as_array().unwrap().is_empty(), "{text}");
        let status = gateway.admin("/admin/policy").await.json();
        assert_eq!(
            (&status["hash"], &status["revision"], &status["problems"]),
            (&hash.as_str().into(), &1.into(), &told),
            "{text}"
        );
        assert_eq!(ask(&gateway, "one").await.status, 200);
        assert_eq!(gateway.metric("infergate_policy_failed").await, 1.0);
        assert!(gateway.metric("infergate_policy_reloads_failed_total").await > count as f64);
    }
    let answer = gateway.reload(&bad[0]).await.json();
    assert_eq!((&answer["newest"], &answer["hash"]), (&false.into(), &hash.as_str().into()), "{answer}");
    assert!(
        answer["problems"][0].as_str().unwrap().contains("policy.yaml:5:5: models[0].pool: no pool is named q"),
        "{answer}"
    );
    assert!(gateway.log().contains("no pool is named q"), "{}", gateway.log());
    // The good one again: all is well, and it is still the first.
    assert_eq!(gateway.reload(&good).await.status, 200);
    assert_eq!((gateway.metric("infergate_policy_failed").await, revision(&gateway).await), (0.0, 1));
    assert!(gateway.admin("/admin/policy").await.json()["problems"].as_array().unwrap().is_empty());
}

#[tokio::test]
async fn the_metrics_tell_revision_hash_and_age() {
    let server = model_server().await;
    let gateway = Gateway::start(&named(&server, "one")).await;
    eventually("the policy gets older", SOON, || async { gateway.metric("infergate_policy_age_seconds").await > 0.05 })
        .await;
    let before = gateway.metric("infergate_policy_age_seconds").await;
    let answer = gateway.reload(&named(&server, "two")).await.json();
    let hash = answer["hash"].as_str().unwrap();
    assert_eq!(gateway.metric(&format!("infergate_policy_info{{hash=\"{hash}\"}}")).await, 1.0);
    let page = gateway.admin("/metrics").await.text();
    assert_eq!(page.lines().filter(|line| line.starts_with("infergate_policy_info{")).count(), 1);
    assert_eq!(
        (gateway.metric("infergate_policy_revision").await, gateway.metric("infergate_policy_reloads_total").await),
        (2.0, 2.0)
    );
    assert!(gateway.metric("infergate_policy_age_seconds").await < before + 1.0);
    let status = gateway.admin("/admin/policy").await.json();
    assert_eq!((&status["hash"], status["loaded_at"].is_u64()), (&hash.into(), true));
    assert!(status["file"].as_str().unwrap().ends_with("policy.yaml"));
}

#[tokio::test]
async fn what_runs_keeps_the_policy_that_it_began_with() {
    let options = Options { models: vec!["m".to_owned()], tokens_per_second: 40.0, ..Options::default() };
    let server = Simulated::start(options).await.unwrap();
    let gateway = Gateway::start(&policy(&[&server.url()], "")).await;
    let mut open = Vec::new();
    for client in Client::both() {
        open.push(client.open(gateway.address, "/v1/chat/completions", &[], chat(true, 20)).await);
    }
    // The model, its pool and its upstream are gone for whoever comes now.
    let other = model_server().await;
    let text = format!(
        "version: 1\nmodels: [{{name: n, pool: q}}]\npools: {{q: {{upstreams: [{{url: '{}'}}]}}}}\n",
        other.url()
    );
    assert_eq!(gateway.reload(&text).await.status, 200);
    assert_eq!(ask(&gateway, "m").await.status, 404);
    for answer in open {
        let text = answer.into_body().collect().await.unwrap().to_bytes();
        assert!(text.ends_with(b"data: [DONE]\n\n"), "{text:?}");
    }
}

#[tokio::test]
async fn a_reload_keeps_what_is_known_of_an_upstream_that_stays() {
    let server = model_server().await;
    let text = policy(
        &[&server.url()],
        "health: {enabled: false}\nretry: {attempts: 1}\nbreaker: {failures: 2, open_ms: 60000}\n",
    );
    let gateway = Gateway::start(&text).await;
    server.set_faults(vec!["status=500".parse().unwrap()]);
    for _ in 0..2 {
        ask(&gateway, "m").await;
    }
    assert_eq!(gateway.reload(&format!("{text}# again\n")).await.json()["revision"], 2);
    assert_eq!(ask(&gateway, "m").await.code(), "no_upstream", "the breaker is still open");
}

#[tokio::test]
async fn a_thousand_reloads_half_of_them_bad_lose_nothing() {
    let (one, two) = (model_server().await, model_server().await);
    let gateway = Gateway::start(&policy(&[&one.url()], "")).await;
    let load = Load::start(gateway.address, 3);
    let start = Instant::now();
    for round in 0..500 {
        let servers = if round % 2 == 0 { vec![two.url(), one.url()] } else { vec![one.url()] };
        let urls: Vec<&str> = servers.iter().map(String::as_str).collect();
        let text = policy(&urls, "");
        let answer = gateway.reload(&format!("{text}# round {round}\n")).await;
        // The watcher may have been faster than the request.
        assert_eq!((answer.status, revision(&gateway).await), (200, round as u64 + 2), "{}", answer.text());
        let bad = [text.replace("pool: p", "pool: nowhere"), text.replace("version", "vision"), "}".to_owned()];
        assert_eq!(gateway.reload(&bad[round % 3]).await.status, 422);
    }
    let tally = load.stop().await;
    assert!(tally.lost.is_empty() && tally.unconnected == 0, "{tally:?}");
    assert!(tally.whole > 200, "{} requests in {:?}", tally.whole, start.elapsed());
    assert_eq!(gateway.metric("infergate_policy_reloads_total").await, 501.0);
    assert!(gateway.metric("infergate_policy_reloads_failed_total").await >= 500.0);
}

#[tokio::test]
async fn a_policy_that_was_taken_away_stays_in_force() {
    let server = model_server().await;
    let gateway = Gateway::start(&policy(&[&server.url()], "")).await;
    std::fs::remove_file(gateway.policy_path()).unwrap();
    eventually("told", SOON, || async { gateway.metric("infergate_policy_failed").await == 1.0 }).await;
    assert_eq!(ask(&gateway, "m").await.status, 200);
    assert!(!Path::new(&gateway.policy_path()).exists());
}

#[tokio::test]
async fn a_process_that_starts_with_a_broken_file_serves_the_last_good_one_if_the_settings_say_so() {
    const END: Duration = Duration::from_secs(20);
    let server = model_server().await;
    let (good, better) = (named(&server, "one"), named(&server, "two"));
    for (settings, serves) in [("start_with: last_good\n", true), ("", false)] {
        let mut gateway = Gateway::with(&good, &format!("threads: 1\n{settings}"), &[]).await;
        let reloaded = gateway.reload(&better).await;
        assert_eq!(reloaded.status, 200);
        assert_eq!(gateway.reload(&better.replace("pool: p", "pool: q")).await.status, 422);
        gateway.signal("TERM");
        assert_eq!(gateway.ended(END).await, Some(0));
        gateway.again();
        if !serves {
            assert_eq!(gateway.ended(END).await, Some(1), "{}", gateway.log());
            continue;
        }
        gateway.ready().await;
        assert_eq!(ask(&gateway, "two").await.status, 200);
        assert_eq!(gateway.metric("infergate_policy_failed").await, 1.0);
        let status = gateway.admin("/admin/policy").await.json();
        assert_eq!(status["hash"], reloaded.json()["hash"]);
        assert!(status["problems"][0].as_str().unwrap().contains("no pool is named q"), "{status}");
        assert!(gateway.log().contains("the last good one is in force"), "{}", gateway.log());
        // The file is mended: that is what holds, and all is well.
        assert_eq!(gateway.reload(&good).await.status, 200);
        assert_eq!((ask(&gateway, "one").await.status, ask(&gateway, "two").await.status), (200, 404));
        assert_eq!(gateway.metric("infergate_policy_failed").await, 0.0);
    }
}

#[tokio::test]
async fn where_nothing_was_ever_good_a_broken_file_is_the_end() {
    let settings = "threads: 1\nstart_with: last_good\n";
    let mut gateway = Gateway::spawn("version: 1\nmodels: nonsense\n", settings, &[], &[]);
    assert_eq!(gateway.ended(Duration::from_secs(20)).await, Some(1));
    assert!(gateway.log().contains("policy.yaml:2:1: models: must be a list"), "{}", gateway.log());
}
