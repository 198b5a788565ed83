//! Tokens of an identity provider: real signatures, a real provider that changes its keys, is slow, or is not there.

use std::time::{Duration, Instant};

use http_body_util::BodyExt;
use serde_json::{Value, json};
use tokio::net::TcpListener;

use super::{CHAT, SOON, ask, identified, lasting, told};
use crate::support::issuer::{How, Issuer, now};
use crate::support::keys::{asks_for, key, start};
use crate::support::signer::{Signer, base64, unsigned};
use crate::support::{Client, Gateway, Journal, Options, Simulated, chat, eventually, model_server, policy};

/// A policy that knows keys and this issuer's tokens.
fn with(url: &str, issuer: &str, more: &str) -> String {
    format!(
        "{}tenants: {{search: {{}}, ads: {{}}}}\nauthenticators:\n  - jwt: {{issuers: [{issuer}]}}\n{more}",
        policy(&[url], "")
    )
}

#[tokio::test]
async fn a_token_says_who_asks_beside_keys_and_whatever_is_wrong_with_it_sounds_the_same() {
    let server = model_server().await;
    let (rsa, p256, ed) = (Signer::rsa(), Signer::p256(), Signer::ed25519());
    let issuer = Issuer::start(&[rsa.jwk("r"), p256.jwk("p"), ed.jwk("e")]).await;
    let own = key("search", "name: ci");
    let keys = asks_for(&[&own], "{search: {}, ads: {}}")
        .replace("authenticators:\n", &format!("authenticators:\n  - jwt: {{issuers: [{}]}}\n", issuer.entry("")));
    let gateway = start(&format!("{}{keys}", policy(&[&server.url()], "")), "").await;
    let mut served = Vec::new();
    for client in Client::both() {
        for (signer, kid) in [(&rsa, "r"), (&p256, "p"), (&ed, "e")] {
            let token = issuer.token(signer, kid);
            for headers in [("authorization", format!("bearer {token}")), ("x-api-key", token.clone())] {
                for _ in 0..2 {
                    let headers = [(headers.0, headers.1.as_str())];
                    let answer = client.post_with(gateway.address, CHAT, &headers, chat(false, 2)).await;
                    assert_eq!(answer.status, 200, "{kid}: {}", answer.text());
                    served.push(answer.header("x-request-id").to_owned());
                }
            }
        }
    }
    let by_key = ask(&gateway, &own.text).await;
    assert_eq!(by_key.status, 200);
    let claims = |name: &str, value: Value| {
        let mut claims = issuer.claims(600);
        claims[name] = value;
        claims
    };
    let stranger = Signer::rsa();
    let text = unsigned(&json!({"alg": "HS256", "kid": "r"}), &issuer.claims(600));
    let secret = aws_lc_rs::hmac::Key::new(aws_lc_rs::hmac::HMAC_SHA256, &rsa.public());
    let hmac = format!("{text}.{}", base64(aws_lc_rs::hmac::sign(&secret, text.as_bytes()).as_ref()));
    let bad = [
        (format!("{}.", unsigned(&json!({"alg": "none"}), &issuer.claims(600))), "the algorithm none is not listed"),
        (hmac, "the algorithm HS256 is not listed"),
        (stranger.token("r", &issuer.claims(600)), "its signature is wrong"),
        (stranger.token("unknown", &issuer.claims(600)), "its issuer has no key `unknown`"),
        (ed.token("e", &claims("aud", json!("others"))), "its `aud` names somebody else"),
        (ed.token("e", &claims("aud", json!(7))), "its `aud` names somebody else"),
        (ed.token("e", &issuer.claims(-11)), "has expired"),
        (ed.token("e", &claims("nbf", json!(now() + 60))), "is not good yet"),
        (ed.token("e", &claims("team", json!("nobody"))), "no tenant is named nobody"),
        (ed.token("e", &claims("pad", json!("x".repeat(20_000)))), "longer than"),
        (ed.token("e", &claims("iss", json!("https://stranger.test"))), "no key, or none of ours"),
        ("eyJhbGciOiJub25lIn0.e30.".to_owned(), "no key, or none of ours"),
        (key("search", "").text, "unknown"),
    ];
    let mut refused = Vec::new();
    let mut first = None;
    for (token, why) in &bad {
        let answer = ask(&gateway, token).await;
        assert_eq!(answer.status, 401, "{why}: {}", answer.text());
        let seen = (lasting(&answer.headers), told(&answer));
        assert_eq!(first.get_or_insert(seen.clone()), &seen, "{why}");
        refused.push((answer.header("x-request-id").to_owned(), *why));
    }
    let journal = Journal::settled(&gateway).await;
    for id in &served {
        let record = journal.record(id);
        assert_eq!((&record["principal"], &record["tenant"]), (&json!("corp:alice"), &json!("search")), "{record}");
        assert_eq!(
            (&identified(&record)["rule"], &identified(&record)["why"]),
            (&json!("jwt"), &json!("a token of corp"))
        );
    }
    assert_eq!(journal.record(by_key.header("x-request-id"))["principal"], "ci");
    for (id, why) in refused {
        let record = journal.record(&id);
        let decision = identified(&record);
        assert!(
            decision["verdict"] == "refuse" && decision["why"].as_str().unwrap().contains(why),
            "{why}: {decision}"
        );
        assert_eq!(record.get("principal"), None);
    }
    // Nothing of any token is told anywhere, but in what the client itself sent.
    let everything = String::from_utf8_lossy(&journal.everything()).into_owned() + &gateway.log();
    for token in bad.iter().map(|(token, _)| token).chain([&issuer.token(&ed, "e")]) {
        let end = token.rsplit('.').next().unwrap();
        assert!(end.len() < 20 || !everything.contains(end), "{token:.40}");
    }
    for seen in server.seen() {
        assert!(!format!("{:?}", seen.headers).contains("eyJ"), "no token goes to the upstream");
    }
}

#[tokio::test]
async fn new_keys_are_found_at_once_and_a_flood_of_unknown_ones_is_one_question() {
    let server = model_server().await;
    let (old, new, newer) = (Signer::ed25519(), Signer::p256(), Signer::ed25519());
    let issuer = Issuer::start(&[old.jwk("old")]).await;
    let gateway = start(&with(&server.url(), &issuer.entry(""), ""), "").await;
    let old_token = issuer.token(&old, "old");
    assert_eq!((ask(&gateway, &old_token).await.status, issuer.asked()), (200, 1));
    issuer.rotate(&[old.jwk("old"), new.jwk("new")]);
    let token = issuer.token(&new, "new");
    eventually("the new key is known", SOON, || async { ask(&gateway, &token).await.status == 200 }).await;
    assert_eq!(ask(&gateway, &old_token).await.status, 200, "the old one is good as long as it is listed");
    let before = issuer.asked();
    // The issuer is not asked again within 30 s, however many unknown keys are named.
    for n in 0..200 {
        assert_eq!(ask(&gateway, &issuer.token(&newer, &format!("unknown-{n}"))).await.status, 401);
    }
    assert_eq!(issuer.asked(), before);
    let host = issuer.url.trim_start_matches("http://");
    assert_eq!(gateway.metric(&format!("infergate_issuer_keys{{issuer=\"{host}/\"}}")).await, 2.0);
}

#[tokio::test]
async fn the_last_keys_stay_when_the_issuer_is_gone_slow_or_broken() {
    let server = model_server().await;
    let signer = Signer::ed25519();
    for how in [
        None,
        Some(How::Hangs),
        Some(How::With(b"HTTP/1.1 500 Oh\r\ncontent-length: 0\r\n\r\n".to_vec())),
        Some(How::With(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n<html>".to_vec())),
        Some(How::With(b"HTTP/1.1 302 Found\r\nlocation: http://127.0.0.1:1/\r\ncontent-length: 0\r\n\r\n".to_vec())),
        Some(How::With([&b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n"[..], &vec![b' '; 2 << 20]].concat())),
    ] {
        let issuer = Issuer::start(&[signer.jwk("k")]).await;
        let [good, other] = ["k", "other"].map(|kid| issuer.token(&signer, kid));
        let (host, entry) = (issuer.url.trim_start_matches("http://").to_owned(), issuer.entry(""));
        let gateway = start(&with(&server.url(), &entry, ""), "").await;
        assert_eq!(ask(&gateway, &good).await.status, 200);
        let _running = match how.clone() {
            Some(how) => {
                issuer.answer(how);
                Some(issuer)
            }
            None => {
                drop(issuer);
                None
            }
        };
        // A key that is not there makes it ask, in vain.
        assert_eq!(ask(&gateway, &other).await.status, 401);
        let failed = format!("infergate_issuer_reads_total{{issuer=\"{host}/\",result=\"failed\"}}");
        eventually("it failed", Duration::from_secs(10), || async { gateway.metric(&failed).await >= 1.0 }).await;
        assert_eq!(gateway.metric(&format!("infergate_issuer_healthy{{issuer=\"{host}/\"}}")).await, 0.0);
        assert!(gateway.log().contains("an issuer's keys cannot be read; the last ones stay"), "{how:?}");
        let asked = Instant::now();
        assert_eq!(ask(&gateway, &good).await.status, 200, "{how:?}");
        assert!(asked.elapsed() < Duration::from_secs(1), "nobody waits for it");
        // A reload keeps them, too.
        assert_eq!(gateway.reload(&with(&server.url(), &entry, "# again\n")).await.status, 200);
        assert_eq!(ask(&gateway, &good).await.status, 200, "{how:?}");
    }
}

#[tokio::test]
async fn an_issuer_that_comes_later_is_found() {
    let (server, signer) = (model_server().await, Signer::ed25519());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let entry = Issuer::on(listener, &[]).entry("");
    tokio::task::yield_now().await;
    let gateway = start(&with(&server.url(), &entry, ""), "").await;
    let listener = loop {
        // The first one has just gone.
        match TcpListener::bind(address).await {
            Ok(listener) => break listener,
            Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
        }
    };
    let issuer = Issuer::on(listener, &[signer.jwk("k")]);
    let token = issuer.token(&signer, "k");
    eventually("its keys are found", Duration::from_secs(10), || async { ask(&gateway, &token).await.status == 200 })
        .await;
}

#[tokio::test]
async fn keys_in_a_file_are_watched() {
    let (server, old, new) = (model_server().await, Signer::ed25519(), Signer::ed25519());
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("keys.json");
    let write = |signer: &Signer| std::fs::write(&file, json!({"keys": [signer.jwk("k")]}).to_string()).unwrap();
    write(&old);
    let issuer = Issuer::start(&[]).await;
    let entry = issuer.entry(&format!(", jwks: {{file: {}}}", file.display()));
    let gateway = start(&with(&server.url(), &entry, ""), "").await;
    let [first, second] = [&old, &new].map(|signer| issuer.token(signer, "k"));
    assert_eq!((ask(&gateway, &first).await.status, ask(&gateway, &second).await.status), (200, 401));
    write(&new);
    let since = Instant::now();
    eventually("the file is read again", SOON, || async { ask(&gateway, &second).await.status == 200 }).await;
    assert!(since.elapsed() < Duration::from_secs(1), "{:?}", since.elapsed());
    assert_eq!(ask(&gateway, &first).await.status, 401);
    assert_eq!(issuer.asked(), 0, "nobody is asked");
}

/// A gateway before a model server that is slow, and an open stream of somebody whose token ends in `seconds`.
async fn slow(
    signer: &Signer,
    on_revoked: &str,
    seconds: i64,
) -> (Simulated, Issuer, Gateway, http::Response<hyper::body::Incoming>) {
    let options = Options { models: vec!["m".to_owned()], tokens_per_second: 20.0, ..Options::default() };
    let server = Simulated::start(options).await.unwrap();
    let issuer = Issuer::start(&[signer.jwk("k")]).await;
    let text =
        with(&server.url(), &issuer.entry(", leeway_s: 0"), &format!("requests: {{on_revoked: {on_revoked}}}\n"));
    let gateway = start(&text, "").await;
    let token = signer.token("k", &issuer.claims(seconds));
    let stream = Client::h2().open(gateway.address, CHAT, &[("x-api-key", &token)], chat(true, 80)).await;
    assert_eq!(stream.status(), 200);
    (server, issuer, gateway, stream)
}

#[tokio::test]
async fn what_a_token_began_is_cut_at_its_end_if_policy_says_so() {
    let signer = Signer::ed25519();
    let (_server, _issuer, gateway, stream) = slow(&signer, "cut", 2).await;
    let begun = Instant::now();
    let id = stream.headers()["x-request-id"].to_str().unwrap().to_owned();
    let got = stream.into_body().collect().await.unwrap().to_bytes();
    let got = String::from_utf8_lossy(&got).into_owned();
    assert!(got.contains(r#""code":"key_revoked""#) && !got.contains("[DONE]"), "{got}");
    assert!(begun.elapsed() < Duration::from_millis(3_500), "{:?}", begun.elapsed());
    let record = Journal::settled(&gateway).await.record(&id);
    assert_eq!((&record["code"], &record["attempts"][0]["result"]), (&json!("key_revoked"), &json!("cancelled")));
    let (_server, _issuer, gateway, stream) = slow(&signer, "finish", 1).await;
    let got = stream.into_body().collect().await.unwrap().to_bytes();
    assert!(got.ends_with(b"data: [DONE]\n\n"), "{}", gateway.log());
}

#[tokio::test]
async fn what_the_tokens_of_an_issuer_began_is_cut_when_it_leaves_the_policy() {
    let signer = Signer::ed25519();
    let (server, issuer, gateway, stream) = slow(&signer, "cut", 600).await;
    let text = |entry: &str| with(&server.url(), entry, "requests: {on_revoked: cut}\n");
    assert_eq!(gateway.reload(&text(&issuer.entry(", leeway_s: 1"))).await.status, 200);
    let other = issuer.entry("").replace(&issuer.url, "https://127.0.0.1:1");
    assert_eq!(gateway.reload(&text(&other)).await.status, 200);
    let since = Instant::now();
    let got = stream.into_body().collect().await.unwrap().to_bytes();
    let got = String::from_utf8_lossy(&got).into_owned();
    assert!(got.contains("key_revoked") && since.elapsed() < Duration::from_secs(1), "{got}");
}

#[test]
fn a_wrong_issuer_is_told_at_its_line() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("policy.yaml");
    let good = "issuer: https://id.test\n          audience: [infergate]\n          algorithms: [RS256]\n          tenant: {claim: team}\n";
    for (from, to, place, told) in [
        ("          audience: [infergate]\n", "", ":8:", "`audience` is missing"),
        ("[infergate]", "[]", ":9:", "audience: must have at least 1 entry"),
        ("RS256", "HS256", ":10:", "HS256 is none of RS256"),
        ("RS256", "none", ":10:", "none is none of RS256"),
        ("https://id.test", "http://id.test", ":8:", "keys come over https"),
        ("          tenant: {claim: team}\n", "", ":8:", "`tenant` is missing: Who pays"),
        ("{claim: team}", "{}", ":11:", "nobody pays"),
        ("{claim: team}", "{default: serch}", ":11:", "no tenant is named serch; did you mean search?"),
        ("{claim: team}", "{claim: team, map: {a: ads}}", ":11:", "no tenant is named ads"),
        (
            "{claim: team}",
            "{claim: team}\n          jwks: {url: 'http://id.test/keys'}",
            ":12:",
            "keys come over https",
        ),
        ("{claim: team}", "{claim: team}\n          jwks: {file: none.json}", ":12:", "none.json"),
        ("{claim: team}", "{claim: team}\n          leeway_s: 31", ":12:", "at most 30"),
    ] {
        let text = format!(
            "version: 1\npools: {{p: {{upstreams: [{{url: 'http://127.0.0.1:1'}}]}}}}\ntenants:\n  search: {{}}\nauthenticators:\n  - jwt:\n      issuers:\n        - {}",
            good.replace(from, to)
        );
        std::fs::write(&path, text).unwrap();
        let (code, out, _) = crate::support::Process::run(&["check", path.to_str().unwrap()]);
        let line = out.lines().next().unwrap_or_default();
        assert!(code == Some(1) && line.contains(&format!("policy.yaml{place}")) && line.contains(told), "{to}: {out}");
    }
}

#[tokio::test]
async fn the_plan_that_a_token_names_says_which_limits_hold_for_it() {
    let (server, signer) = (model_server().await, Signer::p256());
    let issuer = Issuer::start(&[signer.jwk("k")]).await;
    let limits = "limits:\n  - {name: gold, plans: [gold], each: [key], requests: 3, per: 1h}\n  - {name: free, plans: [free], each: [key], requests: 1, per: 1h}\n";
    let entry = issuer.entry(", plans: {claim: account.plan, default: free}");
    let gateway = start(&with(&server.url(), &entry, limits), "").await;
    let mut statuses = Vec::new();
    for (subject, plan) in
        [("a", json!("gold")), ("b", json!(["gold", "else"])), ("c", json!(null)), ("d", json!("none"))]
    {
        let mut claims = issuer.claims(600);
        (claims["sub"], claims["account"]) = (json!(subject), json!({"plan": plan}));
        let token = signer.token("k", &claims);
        let mut served = 0;
        for _ in 0..5 {
            served += u32::from(ask(&gateway, &token).await.status == 200);
        }
        statuses.push(served);
    }
    assert_eq!(statuses, [3, 3, 1, 5], "whoever has a plan without a limit has none");
}
