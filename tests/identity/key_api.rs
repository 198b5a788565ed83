//! Keys over the admin port: only an owner makes them, they work at once, and they are gone within a second.

use std::time::{Duration, Instant};

use http::{Method, Request};
use http_body_util::Full;
use serde_json::{Value, json};

use super::operators::made;
use super::{ask, infergate, with};
use crate::support::keys::{asks_for, key, start};
use crate::support::{Answer, Client, Gateway, Journal, model_server, policy};

const KEYS: &str = "/admin/v1/keys";

/// A gateway whose policy names a file of keys, and the keys of an operator and an owner.
async fn gateway(url: &str, inline: &str) -> (Gateway, String, String) {
    let ([operator, owner], own) = (["operator", "owner"].map(made), key("search", "name: inline"));
    let settings = format!("admin: {{pepper: {{env: INFERGATE_PEPPER}}, keys: [{}, {}]}}\n", operator.1, owner.1);
    let keys = asks_for(&[&own], "{search: {}, ads: {}}");
    let text = format!("{}{keys}{inline}", policy(&[url], ""));
    let gateway = start(&text, &settings).await;
    (gateway, operator.0, owner.0)
}

/// The same, with an empty file of keys in force.
async fn with_file(url: &str) -> (Gateway, String, String) {
    let (gateway, operator, owner) = gateway(url, "").await;
    std::fs::write(gateway.directory.path().join("keys.yaml"), "# made by the gateway\n").unwrap();
    let text = std::fs::read_to_string(gateway.policy_path()).unwrap() + "      file: keys.yaml\n";
    std::fs::write(gateway.policy_path(), text).unwrap();
    assert_eq!(admin(&gateway, Method::POST, "/admin/reload", &owner, "").await.status, 200);
    (gateway, operator, owner)
}

async fn admin(gateway: &Gateway, method: Method, path: &str, key: &str, body: &str) -> Answer {
    let request = Request::builder().method(method).uri(format!("http://{}{path}", gateway.admin));
    let request = request.body(Full::new(body.to_owned().into())).unwrap();
    Client::h1().send(with(request, &[("authorization", &format!("Bearer {key}"))])).await
}

async fn make(gateway: &Gateway, owner: &str, body: Value) -> Value {
    let answer = admin(gateway, Method::POST, KEYS, owner, &body.to_string()).await;
    assert_eq!((answer.status, answer.header("cache-control")), (201, "no-store"), "{}", answer.text());
    answer.json()
}

#[tokio::test]
async fn a_key_is_made_used_listed_and_revoked() {
    let server = model_server().await;
    let (gateway, operator, owner) = with_file(&server.url()).await;
    let first = make(&gateway, &owner, json!({"tenant": "search", "name": "ci / nightly", "expires_in": "90d"})).await;
    let second = make(&gateway, &owner, json!({"tenant": "ads"})).await;
    assert_eq!((&first["in_force"], &first["tenant"]), (&json!(true), &json!("search")));
    let [one, two] = [&first, &second].map(|made| made["key"].as_str().unwrap().to_owned());
    for key in [&one, &two] {
        assert_eq!(ask(&gateway, key).await.status, 200, "at once");
        let (known, told) = infergate(&gateway, &["key", "check", "--policy", "policy.yaml"], key);
        assert!(known, "{told}");
    }
    let list = admin(&gateway, Method::GET, KEYS, &owner, "").await;
    let text = list.text();
    let listed: Vec<_> = list.json()["keys"].as_array().unwrap().clone();
    let seen: Vec<_> = listed
        .iter()
        .map(|key| (key["name"].as_str(), key["tenant"].as_str().unwrap(), key["in"].as_str().unwrap()))
        .collect();
    assert_eq!(
        seen,
        [(Some("inline"), "search", "policy"), (Some("ci / nightly"), "search", "file"), (None, "ads", "file")]
    );
    assert_eq!((&listed[1]["prefix"], &listed[1]["expired"]), (&first["prefix"], &json!(false)));
    let file = std::fs::read_to_string(gateway.directory.path().join("keys.yaml")).unwrap();
    assert!(
        file.starts_with("# made by the gateway\n- {name: \"ci / nightly\", tenant: \"search\", prefix: "),
        "{file}"
    );
    let hashes: Vec<&str> = file.split("hash: \"").skip(1).map(|rest| &rest[..64]).collect();
    assert_eq!(hashes.len(), 2);
    assert!(!text.contains("hash") && hashes.iter().all(|hash| !text.contains(hash)), "{text}");
    // By name, percent-encoded, and by prefix.
    let since = Instant::now();
    let gone = admin(&gateway, Method::DELETE, &format!("{KEYS}/ci%20%2F%20nightly"), &owner, "").await;
    assert_eq!((gone.status, &gone.json()["prefixes"]), (200, &json!([first["prefix"]])), "{}", gone.text());
    assert_eq!(ask(&gateway, &one).await.status, 401);
    assert!(since.elapsed() < Duration::from_secs(1), "{:?}", since.elapsed());
    assert_eq!(ask(&gateway, &two).await.status, 200);
    let prefix = second["prefix"].as_str().unwrap();
    assert_eq!(admin(&gateway, Method::DELETE, &format!("{KEYS}/{prefix}"), &owner, "").await.status, 200);
    assert_eq!(ask(&gateway, &two).await.status, 401);
    for (path, status, why) in [
        (format!("{KEYS}/{prefix}"), 404, "no key has this name or prefix"),
        (format!("{KEYS}/inline"), 409, "stands in the policy itself"),
        (format!("{KEYS}/%zz"), 400, "percent-encoded"),
    ] {
        let answer = admin(&gateway, Method::DELETE, &path, &owner, "").await;
        assert!(answer.status == status && answer.text().contains(why), "{path}: {}", answer.text());
    }
    // It takes an owner, and everything is on record with who did it; no key is.
    for (method, path) in [(Method::GET, KEYS), (Method::POST, KEYS), (Method::DELETE, "/admin/v1/keys/x")] {
        assert_eq!(admin(&gateway, method.clone(), path, &operator, "{}").await.status, 403);
        assert_eq!(admin(&gateway, method, path, "ig_nobody", "{}").await.status, 401);
    }
    admin(&gateway, Method::GET, "/admin/v1/requests/01970000-0000-7000-8000-000000000000", &operator, "").await;
    let journal = Journal::of(&gateway);
    let acts = |act: &str| journal.acts(act);
    assert_eq!(
        acts("key_create").iter().map(|act| act["prefix"].clone()).collect::<Vec<_>>(),
        [first["prefix"].clone(), second["prefix"].clone()]
    );
    assert_eq!(acts("key_delete").len(), 2);
    assert!(acts("key_create").iter().chain(&acts("key_delete")).all(|act| act["by"]["principal"] == "owner"));
    let denied = acts("denied");
    let who: Vec<_> =
        denied.iter().map(|act| (act["by"]["principal"].as_str(), act["why"].as_str().unwrap())).collect();
    assert_eq!(who, [(Some("operator"), "role"), (None, "unknown")].repeat(3));
    assert!(
        denied.iter().all(|act| act["by"]["address"].is_string() && act["path"].as_str().unwrap().starts_with(KEYS))
    );
    let everything = String::from_utf8_lossy(&journal.everything()).into_owned() + &gateway.log();
    for secret in [&one[9..], &two[9..], &owner[9..], hashes[0], hashes[1]] {
        assert!(!everything.contains(secret), "{secret:.6}");
    }
}

#[tokio::test]
async fn a_wrong_wish_is_told_and_changes_nothing() {
    let server = model_server().await;
    let (gateway, _, owner) = with_file(&server.url()).await;
    for (body, why) in [
        ("", "the body is"),
        (r#"{"tenant":"search","role":"owner"}"#, "unknown field `role`"),
        (r#"{"name":"x"}"#, "missing field `tenant`"),
        (r#"{"tenant":"serch"}"#, "no tenant is named serch; did you mean search?"),
        (r#"{"tenant":"search","name":""}"#, "1 to 128 characters"),
        (r#"{"tenant":"search","name":"a\nb"}"#, "1 to 128 characters"),
        (r#"{"tenant":"search","expires_in":"soon"}"#, "expires_in: give 12h"),
        (r#"{"tenant":"search","expires_in":"2020-01-01"}"#, "over already"),
    ] {
        let answer = admin(&gateway, Method::POST, KEYS, &owner, body).await;
        assert!(answer.status == 400 && answer.text().contains(why), "{body}: {}", answer.text());
    }
    let long = admin(&gateway, Method::POST, KEYS, &owner, &" ".repeat(20_000)).await;
    assert_eq!(long.status, 400);
    assert_eq!(std::fs::read_to_string(gateway.directory.path().join("keys.yaml")).unwrap(), "# made by the gateway\n");
    // A policy that is broken meanwhile: the key is made, and the answer says that it does not work yet.
    let text = std::fs::read_to_string(gateway.policy_path()).unwrap();
    std::fs::write(gateway.policy_path(), format!("{text}nonsense: 1\n")).unwrap();
    let answer = admin(&gateway, Method::POST, KEYS, &owner, r#"{"tenant":"search"}"#).await;
    assert_eq!((answer.status, &answer.json()["in_force"]), (202, &json!(false)), "{}", answer.text());
    assert!(answer.json()["problems"][0].as_str().unwrap().contains("nonsense"));
    let key = answer.json()["key"].as_str().unwrap().to_owned();
    assert_eq!(ask(&gateway, &key).await.status, 401);
    std::fs::write(gateway.policy_path(), text).unwrap();
    assert_eq!(admin(&gateway, Method::POST, "/admin/reload", &owner, "").await.status, 200);
    assert_eq!(ask(&gateway, &key).await.status, 200);
}

#[tokio::test]
async fn without_a_file_of_keys_none_is_made() {
    let server = model_server().await;
    let (gateway, _, owner) = gateway(&server.url(), "").await;
    for (method, path) in [(Method::POST, KEYS), (Method::DELETE, "/admin/v1/keys/inline")] {
        let answer = admin(&gateway, method, path, &owner, r#"{"tenant":"search"}"#).await;
        assert!(answer.status == 409 && answer.text().contains("names no file of keys"), "{}", answer.text());
    }
    assert_eq!(gateway.reload(&policy(&[&server.url()], "")).await.status, 401);
    std::fs::write(gateway.policy_path(), policy(&[&server.url()], "")).unwrap();
    assert_eq!(admin(&gateway, Method::POST, "/admin/reload", &owner, "").await.status, 200);
    let answer = admin(&gateway, Method::POST, KEYS, &owner, r#"{"tenant":"search"}"#).await;
    assert!(answer.status == 409 || answer.text().contains("no tenant"), "{}", answer.text());
}

#[tokio::test]
async fn many_who_make_keys_at_once_lose_none() {
    let server = model_server().await;
    let (gateway, _, owner) = with_file(&server.url()).await;
    let gateway = std::sync::Arc::new(gateway);
    let mut makers = tokio::task::JoinSet::new();
    for n in 0..12 {
        let (gateway, owner) = (gateway.clone(), owner.clone());
        makers.spawn(async move { make(&gateway, &owner, json!({"tenant": "ads", "name": format!("k{n}")})).await });
    }
    for made in makers.join_all().await {
        assert_eq!(ask(&gateway, made["key"].as_str().unwrap()).await.status, 200, "{}", made["name"]);
    }
}

#[tokio::test]
async fn a_flood_of_wrong_keys_does_not_fill_the_journal() {
    let server = model_server().await;
    let (gateway, operator, _) = gateway(&server.url(), "").await;
    for _ in 0..300 {
        assert_eq!(admin(&gateway, Method::GET, "/admin/policy", "ig_wrong", "").await.status, 401);
    }
    admin(&gateway, Method::GET, "/admin/v1/requests/01970000-0000-7000-8000-000000000000", &operator, "").await;
    let denied = Journal::of(&gateway).acts("denied").len();
    assert!((20..=22).contains(&denied), "{denied}");
    assert_eq!(gateway.metric("infergate_admin_denied_total{why=\"unknown\"}").await, 300.0);
}
