//! What a tenant's requests may ask of a model, on every surface, and that nothing else of a body changes.

use serde_json::{Value, json};

use super::{CHAT, bearer};
use crate::support::keys::{Key, asks_for, key, start};
use crate::support::requests::{self, every_surface, passed_on, policy_for_every_surface};
use crate::support::{Answer, Client, Gateway, Journal, raw};

const TENANTS: &str = "{top: {parameters: {forbid: [logit_bias], user: caller}}, low: {parent: top, parameters: {forbid: [tools, language], user: mine, defaults: {temperature: 0.2, top_p: 1.0}}}, free: {}}";

async fn gateway(url: &str, keys: &[&Key]) -> Gateway {
    let more = asks_for(keys, TENANTS);
    start(
        &policy_for_every_surface(url, "", "passthrough: [{path: '/files/*', pool: p, websocket: true}]\n", &more),
        "",
    )
    .await
}

async fn send(client: &Client, gateway: &Gateway, path: &str, key: &Key, body: String) -> Answer {
    client.post_with(gateway.address, path, &[("authorization", &bearer(&key.text))], body).await
}

/// A body with one more member, put in front.
fn with(body: &str, member: &str) -> String {
    body.replacen('{', &format!("{{{member},"), 1)
}

#[tokio::test]
async fn a_forbidden_parameter_is_refused_on_every_surface_and_named() {
    let server = every_surface().await;
    let (low, free) = (key("low", ""), key("free", ""));
    let gateway = gateway(&server.url(), &[&low, &free]).await;
    let mut refused = Vec::new();
    for client in Client::both() {
        for surface in passed_on() {
            let (kind, body) = requests::body(surface.path, false);
            if body.is_empty() {
                continue;
            }
            let bodies: Vec<(String, &str)> = if kind.starts_with("multipart") {
                let part = "--edge\r\nContent-Disposition: form-data; name=\"language\"\r\n\r\nde\r\n";
                vec![(format!("{part}{body}"), "language")]
            } else {
                vec![
                    (with(&body, r#""tools":[]"#), "tools"),
                    (with(&body, r#""logit_bias":null"#), "logit_bias"),
                    (with(&body, r#""too\u006cs":[{"type":"function"}]"#), "tools"),
                    (with(&body, r#""x":1,"tools":[],"tools":0"#), "tools"),
                ]
            };
            for (body, name) in bodies {
                let post = |key: &Key| {
                    let headers = [("authorization", bearer(&key.text)), ("content-type", kind.to_owned())];
                    let mut request = requests::request(&gateway, surface.path, false, "", "");
                    *request.body_mut() = http_body_util::Full::new(body.clone().into());
                    for (header, value) in headers {
                        request.headers_mut().insert(header, value.parse().unwrap());
                    }
                    request
                };
                let answer = client.send(post(&low)).await;
                assert_eq!(answer.status, 400, "{} {name}: {}", surface.path, answer.text());
                assert!(answer.text().contains(&format!("`{name}`")), "{}", answer.text());
                assert_eq!(answer.header("x-should-retry"), "false");
                if surface.path == CHAT {
                    let error = &answer.json()["error"];
                    assert_eq!((&error["code"], &error["param"]), (&json!("parameter_not_allowed"), &json!(name)));
                }
                refused.push(answer.header("x-request-id").to_owned());
                let others = client.send(post(&free)).await;
                assert!(!others.text().contains("may not send"), "{} {name}: {}", surface.path, others.text());
            }
        }
        // Inside of TGI's own object.
        let body = r#"{"inputs":"a","parameters":{"max_new_tokens":2,"tools":[]}}"#;
        assert_eq!(send(&client, &gateway, "/generate", &low, body.to_owned()).await.status, 400);
        // A name inside of something else is nobody's business.
        let inner = with(&requests::body(CHAT, false).1, r#""metadata":{"tools":"x"}"#);
        assert_eq!(send(&client, &gateway, CHAT, &low, inner).await.status, 200);
    }
    let journal = Journal::settled(&gateway).await;
    for id in refused {
        let decisions = journal.record(&id)["decisions"].clone();
        let decision = decisions.as_array().unwrap().iter().find(|decision| decision["stage"] == "parameters").cloned();
        let decision = decision.unwrap();
        assert_eq!((&decision["rule"], &decision["verdict"]), (&json!("low"), &json!("refuse")), "{decision}");
    }
}

#[tokio::test]
async fn what_is_not_read_is_refused_to_whom_something_is_forbidden() {
    let server = every_surface().await;
    let (low, free) = (key("low", ""), key("free", ""));
    let gateway = gateway(&server.url(), &[&low, &free]).await;
    for client in Client::both() {
        let answer = send(&client, &gateway, "/files/x", &low, "{}".to_owned()).await;
        assert_eq!((answer.status, answer.code()), (403, "surface_not_allowed".to_owned()), "{}", answer.text());
        assert_ne!(send(&client, &gateway, "/files/x", &free, "{}".to_owned()).await.status, 403);
    }
    for (key, status) in [(&low, "403"), (&free, "101")] {
        for path in ["/v1/realtime?model=m", "/files/socket"] {
            let head = format!(
                "GET {path} HTTP/1.1\r\nhost: x\r\nauthorization: {}\r\nupgrade: websocket\r\nconnection: upgrade\r\nsec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
                bearer(&key.text)
            );
            let answer = raw(gateway.address, head.as_bytes()).await;
            let reached = answer.starts_with(&format!("HTTP/1.1 {status}"));
            assert!(
                reached || (status == "101" && path.starts_with("/files") && !answer.contains("403")),
                "{path}: {answer}"
            );
        }
    }
}

#[tokio::test]
async fn the_upstream_gets_the_user_and_the_defaults_and_every_other_byte_as_it_came() {
    let server = every_surface().await;
    let (top, low, free) = (key("top", "name: ada"), key("low", "name: bob"), key("free", ""));
    let gateway = gateway(&server.url(), &[&top, &low, &free]).await;
    let odd =
        r#"{ "messages" : [{"role":"user","content":"a\u0000b"}],"unknown":1.000e2 , "model":"m","max_tokens":2}"#;
    let cases = [
        (&free, CHAT, odd.to_owned(), odd.to_owned()),
        (&top, CHAT, odd.to_owned(), odd.replacen('{', r#"{"user":"ada","#, 1)),
        (&low, CHAT, odd.to_owned(), odd.replacen('{', r#"{"user":"bob","temperature":0.2,"top_p":1.0,"#, 1)),
        (&top, CHAT, with(odd, r#""user" : "root""#), with(odd, r#""user" : "ada""#)),
        (
            &low,
            CHAT,
            with(odd, r#""temperature":2,"user":{"deep":["x"]}"#),
            with(odd, r#""temperature":2,"user":"bob""#).replacen('{', r#"{"top_p":1.0,"#, 1),
        ),
        (&top, "/v1/messages", odd.to_owned(), odd.replacen('{', r#"{"metadata":{"user_id":"ada"},"#, 1)),
        (
            &top,
            "/v1/messages",
            with(odd, r#""metadata": {"user_id":"root"}"#),
            with(odd, r#""metadata": {"user_id":"ada"}"#),
        ),
    ];
    for client in Client::both() {
        for (key, path, came, goes) in &cases {
            let answer = send(&client, &gateway, path, key, came.clone()).await;
            assert_eq!(answer.status, 200, "{came}: {}", answer.text());
            let seen = server.seen().into_iter().rfind(|seen| seen.path == *path).unwrap();
            let (got, goes) = (String::from_utf8_lossy(&seen.body).into_owned(), goes.clone());
            assert_eq!(got, goes, "{path} {came}");
            assert!(serde_json::from_str::<Value>(&got).is_ok());
        }
        // Two of them: nobody knows which one counts.
        let twice = with(odd, r#""user":"a","user":"b""#);
        assert_eq!(send(&client, &gateway, CHAT, &top, twice).await.code(), "duplicate_field");
    }
    // A stream's question of its usage goes well with it, and so does another name of the model.
    let journal = Journal::settled(&gateway).await;
    let edited = journal
        .of_kind("request")
        .into_iter()
        .filter(|record| record["decisions"].as_array().unwrap().iter().any(|decision| decision["verdict"] == "edit"));
    assert_eq!(edited.count(), 2 * 6);
}
