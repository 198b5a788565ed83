//! Operators have keys of their own: what each may do, and that it is on record who did what.

use http::{Method, Request};
use http_body_util::Full;
use serde_json::json;

use super::{infergate, with};
use crate::support::keys::{PEPPER, start};
use crate::support::{Answer, Client, Gateway, Journal, Process, eventually, model_server, policy, raw};

/// A key for this role and its entry for the settings, as the command makes them.
pub(super) fn made(role: &str) -> (String, String) {
    let gateway = std::process::Command::new(env!("CARGO_BIN_EXE_infergate"))
        .args(["key", "create", "--json", "--role", role, "--name", role])
        .env("INFERGATE_PEPPER", PEPPER)
        .output()
        .unwrap();
    let made: serde_json::Value = serde_json::from_slice(&gateway.stdout).unwrap();
    (made["key"].as_str().unwrap().to_owned(), made["entry"].to_string())
}

async fn ask(gateway: &Gateway, method: &Method, path: &str, key: &str) -> Answer {
    let body = if path == "/admin/v1/log" && *method == Method::PUT { r#"{"levels":"info"}"# } else { "" };
    let request = Request::builder().method(method).uri(format!("http://{}{path}", gateway.admin));
    let request = request.body(Full::new(body.into())).unwrap();
    let bearer = format!("Bearer {key}");
    let headers = if key.is_empty() { vec![] } else { vec![("authorization", bearer.as_str())] };
    Client::h1().send(with(request, &headers)).await
}

/// What each of nobody, a viewer, an operator and an owner gets: whether they are let in.
const PATHS: [(Method, &str, [bool; 4]); 15] = [
    (Method::GET, "/livez", [true; 4]),
    (Method::GET, "/readyz", [true; 4]),
    (Method::GET, "/metrics", [true; 4]),
    (Method::GET, "/nothing", [true; 4]),
    (Method::GET, "/admin/policy", [false, true, true, true]),
    (Method::GET, "/admin/upstreams", [false, true, true, true]),
    (Method::GET, "/admin/v1/requests/x", [false, true, true, true]),
    (Method::GET, "/admin/v1/log", [false, true, true, true]),
    (Method::PUT, "/admin/v1/log", [false, false, true, true]),
    (Method::POST, "/admin/reload", [false, false, true, true]),
    (Method::POST, "/admin/v1/breaker", [false, false, true, true]),
    (Method::GET, "/admin/v1/keys", [false, false, false, true]),
    (Method::POST, "/admin/v1/keys", [false, false, false, true]),
    (Method::DELETE, "/admin/v1/keys/x", [false, false, false, true]),
    (Method::POST, "/admin/v1/breaker?pool=p&address=A&state=closed", [false, false, true, true]),
];

#[tokio::test]
async fn each_role_may_do_what_it_may_and_every_change_is_on_record_with_who_made_it() {
    let server = model_server().await;
    let keys = ["viewer", "operator", "owner"].map(made);
    let entries: Vec<&str> = keys.iter().map(|(_, entry)| entry.as_str()).collect();
    let settings = format!("admin: {{pepper: {{env: INFERGATE_PEPPER}}, keys: [{}]}}\n", entries.join(", "));
    let gateway = start(&policy(&[&server.url()], ""), &settings).await;
    for (method, path, admitted) in &PATHS {
        let path = path.replace("A&", &format!("{}&", server.address()));
        let who = [""].into_iter().chain(keys.iter().map(|(key, _)| key.as_str()));
        for (index, key) in who.enumerate() {
            let answer = ask(&gateway, method, &path, key).await;
            let expected = if index == 0 { 401 } else { 403 };
            assert_eq!(
                !matches!(answer.status, 401 | 403),
                admitted[index],
                "{method} {path} {index}: {}",
                answer.text()
            );
            if !admitted[index] {
                assert_eq!(answer.status, expected);
                assert_eq!(answer.header("www-authenticate").is_empty(), index != 0);
            }
        }
    }
    let wrong = ask(&gateway, &Method::GET, "/admin/policy", &format!("{}x", &keys[2].0[..57])).await;
    let none = ask(&gateway, &Method::GET, "/admin/policy", "").await;
    assert_eq!((wrong.status, wrong.text()), (401, none.text()));
    // It answers when all that has been filed is on disk.
    ask(&gateway, &Method::GET, "/admin/v1/requests/01970000-0000-7000-8000-000000000000", &keys[0].0).await;
    let journal = Journal::of(&gateway);
    for act in ["breaker", "log_levels"] {
        let who: Vec<_> = journal.acts(act).iter().map(|line| line["by"]["principal"].clone()).collect();
        assert_eq!(who, [json!("operator"), json!("owner")], "{act}");
    }
    let everything = String::from_utf8_lossy(&journal.everything()).into_owned() + &gateway.log();
    assert!(keys.iter().all(|(key, _)| !everything.contains(&key[9..])), "no key is told");
}

#[tokio::test]
async fn metrics_ask_for_a_viewer_if_the_settings_say_so_and_explain_has_a_key() {
    let server = model_server().await;
    let (key, entry) = made("viewer");
    let settings = format!("admin: {{pepper: {{env: INFERGATE_PEPPER}}, keys: [{entry}], open_metrics: false}}\n");
    let gateway = start(&policy(&[&server.url()], ""), &settings).await;
    for (path, status) in [("/livez", 200), ("/readyz", 200), ("/metrics", 401)] {
        assert_eq!(gateway.admin(path).await.status, status, "{path}");
    }
    assert_eq!(ask(&gateway, &Method::GET, "/metrics", &key).await.status, 200);
    let answer = Client::h1().post(gateway.address, super::CHAT, crate::support::chat(false, 2)).await;
    let id = answer.header("x-request-id");
    let admin = gateway.admin.to_string();
    let (good, told) = infergate(&gateway, &["explain", id, "--admin", &admin], "");
    assert!(!good && told.contains("asks for an operator's key"), "{told}");
    let explain = Process::start(&["explain", id, "--admin", &admin], &[("INFERGATE_ADMIN_KEY", &key)]);
    eventually("it tells", super::SOON, || async { explain.out().contains(id) }).await;
}

/// What the admin port answers to somebody who calls it by this name.
async fn by_name(gateway: &Gateway, path: &str, host: &str) -> String {
    let request = format!("GET {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n");
    raw(gateway.admin, request.as_bytes()).await
}

#[tokio::test]
async fn a_page_whose_own_name_leads_to_the_admin_port_reads_nothing() {
    let server = model_server().await;
    let gateway = Gateway::start(&policy(&[&server.url()], "")).await;
    let address = gateway.admin.to_string();
    for path in ["/metrics", "/admin/policy", "/admin/upstreams", "/admin/v1/requests/x", "/admin/v1/log"] {
        let answer = by_name(&gateway, path, "rebound.example:9090").await;
        assert!(answer.starts_with("HTTP/1.1 403 ") && answer.contains("settings: admin.keys"), "{path}: {answer}");
        for host in [&address, "localhost:9090", "infergate:9090", "[::1]:9090"] {
            let answer = by_name(&gateway, path, host).await;
            assert!(!answer.starts_with("HTTP/1.1 403 "), "{path} as {host}: {answer}");
        }
    }
    assert!(by_name(&gateway, "/livez", "rebound.example").await.starts_with("HTTP/1.1 200 "));
    let old = raw(gateway.admin, b"GET /admin/policy HTTP/1.0\r\n\r\n").await;
    assert!(old.starts_with("HTTP/1.0 200 "), "{old}");
    // Where a key must be shown, which no page has, every name is good.
    let (_, entry) = made("viewer");
    let settings = format!("admin: {{pepper: {{env: INFERGATE_PEPPER}}, keys: [{entry}]}}\n");
    let gateway = start(&policy(&[&server.url()], ""), &settings).await;
    assert!(by_name(&gateway, "/metrics", "gateway.example").await.starts_with("HTTP/1.1 200 "));
    assert!(by_name(&gateway, "/admin/policy", "gateway.example").await.starts_with("HTTP/1.1 401 "));
}

#[tokio::test]
async fn an_open_admin_port_that_others_reach_is_warned_of() {
    let server = model_server().await.url();
    let address = |ip: &str| format!("{ip}:{}", crate::support::free_port());
    let serve = |admin: &str| {
        let (listen, admin) = (address("127.0.0.1"), address(admin));
        Process::start(&["serve", "--listen", &listen, "--admin", &admin, "--upstream", &server], &[])
    };
    const WARNING: &str = "everybody who reaches the admin port may do everything";
    for (admin, warned) in [("0.0.0.0", true), ("127.0.0.1", false)] {
        let process = serve(admin);
        eventually("it serves", super::SOON, || async { process.out().contains("listens on") }).await;
        assert_eq!(process.err().contains(WARNING), warned, "{admin}: {}", process.err());
    }
}

#[test]
fn a_gateway_whose_operators_keys_have_no_pepper_does_not_start() {
    let (_, entry) = made("viewer");
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("settings.yaml");
    for (settings, why) in [
        (format!("admin: {{keys: [{entry}]}}\n"), "`pepper` is missing"),
        (format!("admin: {{pepper: {{env: NOBODYS_PEPPER}}, keys: [{entry}]}}\n"), "NOBODYS_PEPPER is not set"),
    ] {
        std::fs::write(&path, settings).unwrap();
        let listen = format!("127.0.0.1:{}", crate::support::free_port());
        let admin = format!("127.0.0.1:{}", crate::support::free_port());
        let arguments = [
            "serve",
            "--settings",
            path.to_str().unwrap(),
            "--listen",
            &listen,
            "--admin",
            &admin,
            "--upstream",
            "http://127.0.0.1:1",
        ];
        let (code, out, err) = Process::run(&arguments);
        assert!(code == Some(1) && err.contains(why), "{out}{err}");
    }
}
