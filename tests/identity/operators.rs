//! Operators have keys of their own: what each may do, and that it is on record who did what.

use http::{Method, Request};
use http_body_util::Full;
use serde_json::json;

use super::{infergate, with};
use crate::support::keys::{PEPPER, start};
use crate::support::{Answer, Client, Gateway, Journal, Process, eventually, model_server, policy};

/// A key for this role and its entry for the settings, as the command makes them.
fn made(role: &str) -> (String, String) {
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
const PATHS: [(Method, &str, [bool; 4]); 12] = [
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
            assert_eq!(!matches!(answer.status, 401 | 403), admitted[index], "{method} {path} {index}: {}", answer.text());
            if !admitted[index] {
                assert_eq!(answer.status, expected);
                assert_eq!(answer.header("www-authenticate").is_empty(), index != 0);
            }
        }
    }
    let wrong = ask(&gateway, &Method::GET, "/admin/policy", &format!("{}x", &keys[2].0[..57])).await;
    let none = ask(&gateway, &Method::GET, "/admin/policy", "").await;
    assert_eq!((wrong.status, wrong.text()), (401, none.text()));
    let acts = async || Journal::settled_with(&gateway, &keys[0].0).await;
    let journal = acts().await;
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
    let settings =
        format!("admin: {{pepper: {{env: INFERGATE_PEPPER}}, keys: [{entry}], open_metrics: false}}\n");
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
        let arguments = ["serve", "--settings", path.to_str().unwrap(), "--listen", &listen, "--admin", &admin, "--upstream", "http://127.0.0.1:1"];
        let (code, out, err) = Process::run(&arguments);
        assert!(code == Some(1) && err.contains(why), "{out}{err}");
    }
}
