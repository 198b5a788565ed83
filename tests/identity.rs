//! Who may ask is asked for a key on every endpoint, over both protocols; who is not known learns nothing.

mod certificates;
mod key_api;
mod operators;
mod parameters;
mod revocation;
mod tokens;

use std::time::Duration;

use http::{HeaderMap, Method, Request};
use http_body_util::Full;
use serde_json::{Value, json};

use crate::support::keys::{PEPPER, asks_for, key, start};
use crate::support::requests::{self, every_surface, passed_on, policy_for_every_surface};
use crate::support::{Answer, Client, Gateway, Journal, Process, chat, model_server, policy};

const CHAT: &str = "/v1/chat/completions";
const SOON: Duration = Duration::from_secs(5);

/// The headers of an answer that do not differ from request to request.
fn lasting(headers: &HeaderMap) -> Vec<(String, String)> {
    let passing = ["x-request-id", "date"];
    let mut headers: Vec<_> = headers
        .iter()
        .filter(|(name, _)| !passing.contains(&name.as_str()))
        .map(|(name, value)| (name.to_string(), value.to_str().unwrap().to_owned()))
        .collect();
    headers.sort();
    headers
}

/// The body without the request's own id, which Anthropic's envelope has.
fn told(answer: &Answer) -> String {
    answer.text().replace(answer.header("x-request-id"), "ID")
}

/// The decision of `identify` in a record.
fn identified(record: &Value) -> &Value {
    let decisions = record["decisions"].as_array().unwrap();
    decisions.iter().find(|decision| decision["stage"] == "identify").unwrap()
}

fn bearer(key: &str) -> String {
    format!("Bearer {key}")
}

async fn ask(gateway: &Gateway, key: &str) -> Answer {
    Client::h1().post_with(gateway.address, CHAT, &[("authorization", &bearer(key))], chat(false, 2)).await
}

fn with(mut request: Request<Full<bytes::Bytes>>, headers: &[(&'static str, &str)]) -> Request<Full<bytes::Bytes>> {
    for (name, value) in headers {
        request.headers_mut().append(*name, value.parse().unwrap());
    }
    request
}

#[tokio::test]
async fn every_surface_asks_for_a_key_and_tells_nobody_what_is_wrong_with_theirs() {
    let server = every_surface().await;
    let (good, over, gone) = (key("t", "name: ci"), key("t", "name: old, expires: 2020-01-01"), key("t", ""));
    let text = policy_for_every_surface(&server.url(), "", "", &asks_for(&[&good, &over], "{t: {}}"));
    let gateway = start(&text, "").await;
    let mistyped = format!("{}x", &good.text[..57]);
    let bad: [(&str, Vec<(&str, String)>); 7] = [
        ("no key, or none of ours", vec![]),
        ("no key, or none of ours", vec![("authorization", bearer("sk-other"))]),
        ("malformed", vec![("x-api-key", mistyped.clone())]),
        ("malformed", vec![("authorization", bearer(&good.text[..40]))]),
        ("unknown", vec![("api-key", gone.text.clone())]),
        ("has expired", vec![("authorization", bearer(&over.text))]),
        ("two different keys", vec![("authorization", bearer(&good.text)), ("x-api-key", gone.text.clone())]),
    ];
    let (mut refused, mut served) = (Vec::new(), Vec::new());
    for client in Client::both() {
        for surface in passed_on() {
            let request = || requests::request(&gateway, surface.path, false, "", "");
            let mut first = None;
            for (why, headers) in &bad {
                let headers: Vec<_> = headers.iter().map(|(name, value)| (*name, value.as_str())).collect();
                let answer = client.send(with(request(), &headers)).await;
                assert_eq!(answer.status, 401, "{} {headers:?}: {}", surface.path, answer.text());
                assert_eq!(answer.header("www-authenticate"), "Bearer realm=\"infergate\"");
                let seen = (lasting(&answer.headers), told(&answer));
                assert_eq!(first.get_or_insert(seen.clone()), &seen, "{} {why}", surface.path);
                refused.push((answer.header("x-request-id").to_owned(), *why));
            }
            let (_, body) = first.unwrap();
            let body: Value = serde_json::from_str(&body).unwrap();
            let word = match surface.path {
                path if path.starts_with("/v1/messages") => &body["error"]["type"],
                "/generate" | "/generate_stream" | "/info" => &body["error_type"],
                _ => &body["error"]["code"],
            };
            let expected =
                if surface.path.starts_with("/v1/messages") { "authentication_error" } else { "invalid_api_key" };
            assert_eq!(word, expected, "{}: {body}", surface.path);
            for (name, value) in [
                ("authorization", bearer(&good.text)),
                ("x-api-key", good.text.clone()),
                ("api-key", good.text.clone()),
            ] {
                let answer = client.send(with(request(), &[(name, &value)])).await;
                assert_eq!(answer.status, 200, "{} {name}: {}", surface.path, answer.text());
                served.push(answer.header("x-request-id").to_owned());
            }
        }
    }
    assert_eq!(
        server.seen().iter().filter(|seen| seen.path != "/health").count(),
        served.len(),
        "nobody else got there"
    );
    let journal = Journal::settled(&gateway).await;
    let records: std::collections::HashMap<String, Value> = journal
        .of_kind("request")
        .into_iter()
        .map(|record| (record["id"].as_str().unwrap().to_owned(), record))
        .collect();
    for (id, why) in refused {
        let record = &records[&id];
        assert_eq!((&record["outcome"], &record["code"]), (&json!("refused"), &json!("invalid_api_key")));
        assert_eq!((record.get("principal"), record.get("tenant")), (None, None), "{record}");
        let decision = identified(record);
        assert_eq!(decision["verdict"], "refuse");
        assert!(decision["why"].as_str().unwrap().contains(why), "{why}: {decision}");
    }
    for id in served {
        let record = &records[&id];
        assert_eq!((&record["principal"], &record["tenant"]), (&json!("ci"), &json!("t")), "{record}");
        let decision = identified(record);
        assert_eq!((&decision["rule"], &decision["verdict"]), (&json!("keys"), &json!("allow")));
        assert_eq!(decision["why"], format!("the key {}", &good.text[..9]));
    }
}

#[tokio::test]
async fn only_health_and_version_need_no_key() {
    let server = model_server().await;
    let good = key("t", "");
    let text = format!(
        "{}{}passthrough: [{{path: '/files/*', pool: p}}]\n",
        policy(&[&server.url()], ""),
        asks_for(&[&good], "{t: {}}")
    );
    let gateway = start(&text, "").await;
    for client in Client::both() {
        for (path, status) in [
            ("/health", 200),
            ("/ping", 200),
            ("/version", 200),
            ("/v1/models", 401),
            ("/nobody", 401),
            ("/files/x", 401),
            ("/v1/chat/completions", 401),
        ] {
            assert_eq!(client.get(gateway.address, path).await.status, status, "{path}");
        }
        // Who is known hears what is wrong with the rest.
        for (path, status) in [("/v1/models", 200), ("/nobody", 404), ("/v1/chat/completions", 405)] {
            let request = Request::get(format!("http://{}{path}", gateway.address)).body(Full::default()).unwrap();
            assert_eq!(client.send(with(request, &[("x-api-key", &good.text)])).await.status, status, "{path}");
        }
    }
    // A WebSocket is no way around.
    let head = "GET /v1/realtime?model=m HTTP/1.1\r\nhost: x\r\nupgrade: websocket\r\nconnection: upgrade\r\nsec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n";
    for (more, status) in [("\r\n".to_owned(), "401"), (format!("authorization: Bearer {}\r\n\r\n", good.text), "101")]
    {
        let answer = crate::support::raw(gateway.address, format!("{head}{more}").as_bytes()).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{answer}");
    }
}

#[tokio::test]
async fn anonymous_callers_have_a_tenant_of_their_own_and_never_the_place_of_a_refused_key() {
    let server = model_server().await;
    let (good, gone) = (key("t", "name: ci"), key("t", ""));
    let text = format!(
        "{}{}  - anonymous: {{tenant: public}}\n",
        policy(&[&server.url()], ""),
        asks_for(&[&good], "{t: {}, public: {}}")
    );
    let gateway = start(&text, "").await;
    let mut expected = Vec::new();
    for client in Client::both() {
        for (key, who) in [
            ("", Some(("anonymous", "public"))),
            ("sk-none", Some(("anonymous", "public"))),
            (&good.text, Some(("ci", "t"))),
            (&gone.text, None),
            (&good.text[..50], None),
        ] {
            let bearer = bearer(key);
            let headers = if key.is_empty() { vec![] } else { vec![("authorization", bearer.as_str())] };
            let answer = client.post_with(gateway.address, CHAT, &headers, chat(false, 2)).await;
            assert_eq!(answer.status, if who.is_some() { 200 } else { 401 }, "{key}");
            expected.push((answer.header("x-request-id").to_owned(), who));
        }
    }
    let journal = Journal::settled(&gateway).await;
    for (id, who) in expected {
        let record = journal.record(&id);
        let named = record["principal"].as_str().zip(record["tenant"].as_str());
        assert_eq!(named, who, "{record}");
    }
}

#[tokio::test]
async fn a_tenant_gets_its_models_and_surfaces_and_no_others() {
    let server = every_surface().await;
    let tenants = "{top: {models: [m, 'x-*'], surfaces: [/v1/chat/completions, /v1/messages, /generate, '/files/*']}, low: {parent: top, models: [alias, '/files/*'], surfaces: [/v1/chat/completions, '/files/*']}, none: {models: []}, free: {}}";
    let [top, low, none, free] = ["top", "low", "none", "free"].map(|tenant| key(tenant, ""));
    let text = policy_for_every_surface(
        &server.url(),
        "",
        "passthrough: [{path: '/files/*', pool: p}]\n",
        &asks_for(&[&top, &low, &none, &free], tenants),
    )
    .replace(
        "- {name: m, pool: p}",
        "- {name: m, pool: p, rename: m, aliases: [alias]}\n  - {name: secret, pool: p, rename: m}",
    );
    let gateway = start(&text, "").await;
    let cases = [
        (&top, CHAT, "m", 200, ""),
        (&top, CHAT, "alias", 200, ""),
        (&top, CHAT, "secret", 403, "model_not_allowed"),
        (&top, CHAT, "nobody", 403, "model_not_allowed"),
        (&top, "/v1/messages", "m", 200, ""),
        (&top, "/v1/messages", "secret", 403, ""),
        (&top, "/v1/embeddings", "m", 403, "surface_not_allowed"),
        (&low, CHAT, "alias", 200, ""),
        (&low, CHAT, "m", 403, "model_not_allowed"),
        (&low, "/v1/messages", "alias", 403, ""),
        (&none, CHAT, "m", 403, "model_not_allowed"),
        (&none, "/generate", "", 403, ""),
        (&top, "/generate", "", 200, ""),
        (&free, CHAT, "secret", 200, ""),
        (&free, "/v1/embeddings", "m", 200, ""),
        (&top, "/files/x", "", 403, "model_not_allowed"),
        (&low, "/files/x", "", 403, "model_not_allowed"),
    ];
    for client in Client::both() {
        for (key, path, model, status, code) in cases {
            let body = match path {
                "/files/x" => "{}".to_owned(),
                path => requests::body(path, false).1.replace("\"model\":\"m\"", &format!("\"model\":\"{model}\"")),
            };
            let answer = client.post_with(gateway.address, path, &[("x-api-key", &key.text)], body).await;
            assert_eq!(answer.status, status, "{path} {model}: {}", answer.text());
            if !code.is_empty() {
                assert_eq!(answer.code(), code, "{}", answer.text());
            }
            if status == 403 {
                assert_eq!(answer.header("x-should-retry"), "false");
                assert!(!answer.text().contains("did you mean"), "{}", answer.text());
            }
            if status == 403 && path == "/v1/messages" {
                assert_eq!(answer.json()["error"]["type"], "permission_error");
            }
        }
        for (key, expected) in
            [(&top, vec!["m", "alias"]), (&low, vec!["alias"]), (&none, vec![]), (&free, vec!["m", "alias", "secret"])]
        {
            let request = Request::builder().method(Method::GET).uri(format!("http://{}/v1/models", gateway.address));
            let answer = client.send(with(request.body(Full::default()).unwrap(), &[("x-api-key", &key.text)])).await;
            let listed: Vec<String> = answer.json()["data"]
                .as_array()
                .unwrap()
                .iter()
                .map(|model| model["id"].as_str().unwrap().to_owned())
                .collect();
            assert_eq!(listed, expected);
        }
    }
    let journal = Journal::settled(&gateway).await;
    let refused = journal.of_kind("request").into_iter().filter(|record| record["status"] == 403);
    for record in refused {
        assert!(record["principal"].is_string() && record["tenant"].is_string(), "{record}");
        let decisions = record["decisions"].as_array().unwrap();
        let told =
            decisions.iter().any(|decision| decision["verdict"] == "refuse" && decision["rule"] == record["tenant"]);
        assert!(told, "{record}");
    }
}

#[tokio::test]
async fn nothing_that_a_client_sends_makes_it_somebody_else() {
    let server = model_server().await;
    let good = key("t", "name: ci");
    let gateway = start(&format!("{}{}", policy(&[&server.url()], ""), asks_for(&[&good], "{t: {}}")), "").await;
    for client in Client::both() {
        let headers = [
            ("authorization", &*bearer(&good.text)),
            ("x-infergate-principal", "forged"),
            ("x-infergate-tenant", "forged"),
            ("x-tenant-id", "forged"),
            ("x-forwarded-user", "forged"),
            ("x-request-id", "forged"),
        ];
        let body = chat(false, 2).replacen('{', r#"{"tenant":"forged","principal":"forged","user":"forged","#, 1);
        let answer = client.post_with(gateway.address, CHAT, &headers, body).await;
        let record = Journal::settled(&gateway).await.record(answer.header("x-request-id"));
        assert_eq!((&record["principal"], &record["tenant"]), (&json!("ci"), &json!("t")));
    }
}

#[tokio::test]
async fn unknown_keys_leave_nothing_behind() {
    let server = model_server().await;
    let good = key("t", "");
    let gateway = start(&format!("{}{}", policy(&[&server.url()], ""), asks_for(&[&good], "{t: {}}")), "").await;
    let series = async || {
        gateway
            .admin("/metrics")
            .await
            .text()
            .lines()
            .filter(|line| line.starts_with("infergate_") || line.starts_with("gen_ai_"))
            .count()
    };
    for round in 0..2 {
        let key = key("t", "");
        assert_eq!(ask(&gateway, &key.text).await.status, 401, "{round}");
    }
    gateway.comes_to("infergate_requests_in_flight", 0.0).await;
    let before = series().await;
    for client in Client::both() {
        for _ in 0..200 {
            let headers = [("x-api-key", &*key("t", "").text)];
            assert_eq!(client.post_with(gateway.address, CHAT, &headers, chat(false, 2)).await.status, 401);
        }
    }
    gateway.comes_to("infergate_requests_in_flight", 0.0).await;
    // HTTP/2 may have a line of its own.
    assert!(series().await <= before + 2, "{before}");
    gateway.comes_to("infergate_refusals_total{code=\"invalid_api_key\"}", 402.0).await;
}

#[tokio::test]
async fn no_key_is_ever_told_whatever_happens() {
    let server = model_server().await;
    let (good, gone) = (key("t", "name: ci"), key("t", ""));
    let text = format!(
        "{}{}",
        policy(
            &[&server.url()],
            "timeouts: {first_token_ms: 300, answer_ms: 300}\nretry: {attempts: 1}\nbreaker: {failures: 0, requests_min: 1000000}\nhealth: {enabled: false}"
        ),
        asks_for(&[&good], "{t: {models: [m]}}")
    );
    let gateway = start(&text, "").await;
    let levels = Request::put(format!("http://{}/admin/v1/log", gateway.admin))
        .body(Full::new(r#"{"levels":"trace"}"#.into()))
        .unwrap();
    assert_eq!(Client::h1().send(levels).await.status, 200);
    let half = &good.text[..57];
    let mut told = String::new();
    for client in Client::both() {
        for stream in [false, true] {
            for key in [&good.text, &gone.text, half] {
                for (name, value) in
                    [("authorization", bearer(key)), ("x-api-key", key.to_owned()), ("api-key", key.to_owned())]
                {
                    for fault in ["", "status=500", "reset", "hang", "cut"] {
                        let mut headers = vec![(name, value.as_str())];
                        headers.extend((!fault.is_empty()).then_some(("x-simulate-fault", fault)));
                        let path = format!("{CHAT}?key={key}&api_key={key}");
                        for model in ["m", "nobody"] {
                            let body = chat(stream, 2).replace("\"m\"", &format!("\"{model}\""));
                            match client
                                .try_send(crate::support::http::post(gateway.address, &path, &headers, body))
                                .await
                            {
                                Ok(answer) => told.push_str(&format!("{:?}\n{}\n", answer.headers, answer.text())),
                                // Over HTTP/2, what is cut may be gone before its head has been looked at.
                                Err(error) => told.push_str(&format!("{error:?}\n")),
                            }
                        }
                    }
                }
            }
        }
    }
    // A key where no key belongs: in the policy.
    let whole = text.replace(&format!("prefix: {}", &good.text[..9]), &format!("prefix: {}", good.text));
    let answer = gateway.reload(&whole).await;
    assert_eq!(answer.status, 422);
    told.push_str(&answer.text());
    for path in ["/metrics", "/admin/policy", "/admin/upstreams"] {
        told.push_str(&gateway.admin(path).await.text());
    }
    for seen in server.seen() {
        told.push_str(&format!("{:?} {}\n", seen.headers, seen.path));
    }
    let journal = Journal::settled(&gateway).await;
    told.push_str(&String::from_utf8_lossy(&journal.everything()));
    let log = gateway.log();
    assert!(log.contains("request ended"), "it is logged");
    // The raw head is the transport's own word for what came; nothing of ours repeats it.
    told.push_str(&log);
    let (secret, other) = (&good.text[9..57], &gone.text[9..57]);
    let found: Vec<&str> =
        told.lines().filter(|line| line.contains(secret) || line.contains(other) || line.contains(PEPPER)).collect();
    assert!(found.is_empty(), "{} lines, such as {:.400}", found.len(), found[0]);
}

#[tokio::test]
async fn a_key_ends_when_its_time_is_over_and_two_keys_of_one_name_overlap() {
    let server = model_server().await;
    let soon = std::time::SystemTime::now() + Duration::from_secs(3);
    let stamp = infergate::time::Stamp(soon).to_string();
    let (old, new) = (key("t", &format!("name: ci, expires: '{stamp}'")), key("t", "name: ci"));
    let gateway = start(&format!("{}{}", policy(&[&server.url()], ""), asks_for(&[&old, &new], "{t: {}}")), "").await;
    let (first, second) = (ask(&gateway, &old.text).await, ask(&gateway, &new.text).await);
    assert_eq!((first.status, second.status), (200, 200));
    crate::support::eventually("the old one ends", Duration::from_secs(6), || async {
        ask(&gateway, &old.text).await.status == 401
    })
    .await;
    assert!(std::time::SystemTime::now() >= soon, "not before its time");
    assert_eq!(ask(&gateway, &new.text).await.status, 200);
    let journal = Journal::settled(&gateway).await;
    for answer in [first, second] {
        assert_eq!(journal.record(answer.header("x-request-id"))["principal"], "ci");
    }
}

/// Runs `infergate` in `gateway`'s directory with the pepper and this on its standard input.
fn infergate(gateway: &Gateway, arguments: &[&str], input: &str) -> (bool, String) {
    let mut command = Process::command(arguments);
    command.current_dir(gateway.directory.path()).env("INFERGATE_PEPPER", PEPPER);
    let (code, out, err) = Process::fed(command, input);
    (code == Some(0), out + &err)
}

#[tokio::test]
async fn a_key_that_was_just_made_works_when_its_entry_is_pasted() {
    let server = model_server().await;
    let text = format!(
        "{}{}      file: keys.yaml\n",
        policy(&[&server.url()], ""),
        asks_for(&[], "{search: {}, ads: {parent: search}}")
    );
    let gateway = start(&text.replace("      file: keys.yaml\n", ""), "").await;
    std::fs::write(gateway.directory.path().join("keys.yaml"), "").unwrap();
    assert_eq!(gateway.reload(&text).await.status, 200);
    let mut pasted = String::new();
    for (arguments, principal, tenant) in [
        (
            vec!["key", "create", "--tenant", "search", "--policy", "policy.yaml", "--name", "ci", "--expires", "90d"],
            Some("ci"),
            "search",
        ),
        (vec!["key", "create", "--tenant", "ads"], None, "ads"),
    ] {
        let (good, out) = infergate(&gateway, &arguments, "");
        assert!(good, "{out}");
        let key = out.lines().find_map(|line| line.strip_prefix("  ig_")).map(|rest| format!("ig_{rest}")).unwrap();
        let entry = out.lines().find(|line| line.starts_with("  - {")).unwrap();
        assert!(!entry.contains(&key));
        assert_eq!(ask(&gateway, &key).await.status, 401, "not before it is in the policy");
        let (known, told) = infergate(&gateway, &["key", "check", "--policy", "policy.yaml"], &key);
        assert!(!known && told.contains("not let in: the key is unknown"), "{told}");
        pasted.push_str(&format!("{}\n", entry.trim_start()));
        std::fs::write(gateway.directory.path().join("keys.yaml"), &pasted).unwrap();
        crate::support::eventually("it is in force", SOON, || async { ask(&gateway, &key).await.status == 200 }).await;
        let (known, told) = infergate(&gateway, &["key", "check", "--policy", "policy.yaml"], &format!("{key}\n"));
        let expected =
            format!("known: {} of tenant {tenant}, by the key {}", principal.unwrap_or(&key[..9]), &key[..9]);
        assert!(known && told.trim() == expected, "{told}");
        let (_, told) = infergate(&gateway, &["key", "check", "--json", "--policy", "policy.yaml"], &key);
        assert_eq!(serde_json::from_str::<Value>(&told).unwrap()["tenant"], tenant);
    }
    let (good, out) = infergate(&gateway, &["key", "create", "--json", "--tenant", "ads"], "");
    let made: Value = serde_json::from_str(&out).unwrap();
    assert!(good && made["key"].as_str().unwrap().starts_with(made["entry"]["prefix"].as_str().unwrap()));
    for (wrong, why) in [
        (vec!["--tenant", "serch", "--policy", "policy.yaml"], "no tenant is named serch; did you mean search?"),
        (vec!["--tenant", "search", "--expires", "soon"], "--expires soon: give 12h"),
        (vec!["--tenant", "search", "--expires", "2020-01-01"], "is over already"),
        (vec!["--tenant", "search", "--pepper-env", "NOBODYS_PEPPER"], "NOBODYS_PEPPER is not set"),
        (vec!["--tenant", "search", "--pepper-file", "/does/not/exist"], "/does/not/exist cannot be read"),
        (vec![], "--tenant"),
    ] {
        let (good, told) = infergate(&gateway, &[&["key", "create"], &wrong[..]].concat(), "");
        assert!(!good && told.contains(why), "{wrong:?}: {told}");
    }
    let (known, told) = infergate(&gateway, &["key", "check", "--policy", "policy.yaml"], "ig_nonsense");
    assert!(!known && told.contains("malformed"), "{told}");
}
