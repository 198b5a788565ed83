//! A virtual model: what is asked decides which model answers, on every endpoint with text; nothing but the model's name
//! changes in the body; the header and the record say what was decided and why; and the same policy decides the same.

use std::io::Write;
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};

use crate::support::issuer::Issuer;
use crate::support::keys::{PEPPER, asks_for, key, start};
use crate::support::signer::Signer;
use crate::support::wire::{Framing, Step, Wire, sha256};
use crate::support::{Client, Gateway, Journal, Options, Process, Simulated};

const CHAT: &str = "/v1/chat/completions";
const MESSAGES: &str = "/v1/messages";
const RESPONSES: &str = "/v1/responses";

const CODE: &str = "implement quicksort in c++";
const BANK: &str = "move 20 euros to my checking account";
const NEITHER: &str = "who painted the mona lisa";

const ROUTERS: &str = "routers:
  auto:
    default: plain
    session_header: x-session
    ask:
      - signals: {name: pictures, model: eyes, images: true}
      - semantic:
          routes:
            - name: code
              model: coder
              examples:
                - write a python function that sorts a list
                - fix the bug in this javascript loop
                - why does my rust program not compile
                - explain this sql query
                - refactor this class into smaller functions
            - name: bank
              model: small
              examples:
                - transfer fifty dollars to my savings account
                - what is my account balance
                - how do i pay my credit card bill
                - send money to my landlord
                - show my recent transactions
";

fn routed(url: &str, more: &str) -> String {
    format!(
        "version: 1\nmodels:\n  - {{name: coder, pool: p}}\n  - {{name: small, pool: p}}\n  - {{name: plain, pool: p}}\n  - {{name: eyes, pool: p}}\npools:\n  p: {{upstreams: [{{url: '{url}'}}]}}\n{ROUTERS}{more}"
    )
}

async fn models() -> Simulated {
    let models = ["coder", "small", "plain", "eyes"].map(str::to_owned).to_vec();
    Simulated::start(Options { models, ..Options::default() }).await.unwrap()
}

/// A body whose model's name, key order, spaces and unknown fields are not what anybody would write.
fn body(path: &str, text: &str, stream: bool) -> String {
    match path {
        MESSAGES => format!(
            r#"{{"max_tokens":3, "x_own":1.50,"model" : "auto","messages":[{{"role":"user","content":[{{"type":"text","text":"{text}"}}]}}],"stream":{stream}}}"#
        ),
        RESPONSES => format!(
            r#"{{"max_output_tokens":16,"input":[{{"role":"user","content":[{{"type":"input_text","text":"{text}"}}]}}], "model" : "auto","stream":{stream}}}"#
        ),
        _ => format!(
            r#"{{"x_own":1.50,"messages":[{{"role":"system","content":"You are a bank."}}, {{"role":"user","content":"{text}"}}],"model" : "auto","max_tokens":3,"stream":{stream}}}"#
        ),
    }
}

fn tool_loop(text: &str) -> String {
    format!(
        r#"{{"model":"auto","max_tokens":3,"messages":[{{"role":"user","content":"{CODE}"}},{{"role":"assistant","content":"ok"}},{{"role":"user","content":"{text}"}},{{"role":"assistant","content":null,"tool_calls":[{{"id":"c1","type":"function","function":{{"name":"f","arguments":"{{}}"}}}}]}},{{"role":"tool","tool_call_id":"c1","content":"done"}}]}}"#
    )
}

async fn route(gateway: &Gateway, headers: &[(&str, &str)], path: &str, body: String) -> String {
    let answer = Client::h1().post_with(gateway.address, path, headers, body).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.header("x-infergate-route").to_owned()
}

#[tokio::test]
async fn a_prompt_goes_to_the_model_that_the_examples_say_and_only_the_models_name_changes() {
    let server = models().await;
    let gateway = Gateway::start(&routed(&server.url(), "")).await;
    for (text, model) in
        [(CODE, "coder"), (BANK, "small"), (NEITHER, "plain"), (r"\u0069mplement quicksort in c++", "coder")]
    {
        for path in [CHAT, MESSAGES, RESPONSES] {
            for stream in [false, true] {
                let sent = body(path, text, stream);
                let answer = Client::h1().post(gateway.address, path, sent.clone()).await;
                assert_eq!(answer.status, 200, "{path} {text}: {}", answer.text());
                assert_eq!(answer.header("x-infergate-route"), format!("auto={model}"), "{path} {text}");
                assert_eq!(answer.header("x-infergate-model"), model);
                let expected = sent.replace("\"auto\"", &format!("\"{model}\""));
                let seen = server.seen().into_iter().rfind(|seen| seen.method == "POST").unwrap();
                assert_eq!(seen.body_sha256, sha256(expected.as_bytes()), "{path} {text}");
            }
        }
    }
    let picture = r#"{"model":"auto","max_tokens":3,"messages":[{"role":"user","content":[{"type":"text","text":"fix the bug"},{"type":"image_url","image_url":{"url":"data:image/png;base64,AA=="}}]}]}"#;
    assert_eq!(route(&gateway, &[], CHAT, picture.to_owned()).await, "auto=eyes");
}

#[tokio::test]
async fn the_record_says_what_was_decided_by_what_and_how_clearly() {
    let server = models().await;
    let gateway = Gateway::start(&routed(&server.url(), "")).await;
    for text in [CODE, NEITHER] {
        route(&gateway, &[], CHAT, body(CHAT, text, false)).await;
    }
    let records = Journal::settled(&gateway).await.of_kind("request");
    assert_eq!(records[0]["model"], json!({"asked": "auto", "route": "coder", "used": "coder"}));
    let decisions = |record: &Value| -> Vec<Value> {
        let all = record["decisions"].as_array().unwrap();
        all.iter().filter(|decision| decision["stage"] == "route").cloned().collect()
    };
    let of_code = decisions(&records[0]);
    assert_eq!((&of_code[0]["rule"], &of_code[0]["why"]), (&json!("auto"), &json!("by its name")));
    assert_eq!((&of_code[1]["rule"], &of_code[1]["verdict"]), (&json!("code"), &json!("coder")));
    let why = of_code[1]["why"].as_str().unwrap();
    assert!(why.starts_with("semantic: score 0.") && why.contains("margin 0."), "{why}");
    let of_neither = decisions(&records[1]);
    assert_eq!((&of_neither[1]["rule"], &of_neither[1]["verdict"]), (&json!("default"), &json!("plain")));
    let why = of_neither[1]["why"].as_str().unwrap();
    assert!(why.contains("signals: its conditions do not hold; semantic: like none of its examples"), "{why}");
}

#[tokio::test]
async fn who_called_a_tool_gets_what_it_gave_back() {
    let server = models().await;
    let gateway = Gateway::start(&routed(&server.url(), "")).await;
    let first = format!(r#"{{"model":"auto","max_tokens":3,"messages":[{{"role":"user","content":"{CODE}"}}]}}"#);
    // Nothing is remembered yet: what the user asked last decides.
    assert_eq!(route(&gateway, &[], CHAT, tool_loop(BANK)).await, "auto=small");
    assert_eq!(route(&gateway, &[], CHAT, first.clone()).await, "auto=coder");
    assert_eq!(route(&gateway, &[], CHAT, tool_loop(BANK)).await, "auto=coder", "by how the conversation begins");
    let named = [("x-session", "s-1")];
    assert_eq!(route(&gateway, &named, CHAT, body(CHAT, NEITHER, false)).await, "auto=plain");
    assert_eq!(route(&gateway, &named, CHAT, tool_loop(BANK)).await, "auto=plain", "by what the client calls it");
    assert_eq!(route(&gateway, &named, CHAT, first).await, "auto=coder", "outside of a loop it is decided again");
    let records = Journal::settled(&gateway).await.of_kind("request");
    assert!(records[2].to_string().contains("it was chosen before, and is kept"), "{}", records[2]);
}

#[tokio::test]
async fn a_conversation_keeps_its_model_where_the_policy_says_so() {
    let server = models().await;
    let keeps = |keep: &str| routed(&server.url(), "").replace("    ask:", &format!("    keep: {keep}\n    ask:"));
    let later = format!(
        r#"{{"model":"auto","max_tokens":3,"messages":[{{"role":"user","content":"{CODE}"}},{{"role":"assistant","content":"ok"}},{{"role":"user","content":"{BANK}"}}]}}"#
    );
    let first = format!(r#"{{"model":"auto","max_tokens":3,"messages":[{{"role":"user","content":"{CODE}"}}]}}"#);
    for (keep, expected) in [("conversation", "auto=coder"), ("never", "auto=small")] {
        let gateway = Gateway::start(&keeps(keep)).await;
        assert_eq!(route(&gateway, &[], CHAT, first.clone()).await, "auto=coder");
        assert_eq!(route(&gateway, &[], CHAT, later.clone()).await, expected, "{keep}");
    }
}

#[tokio::test]
async fn a_tenant_may_use_a_virtual_model_like_any_and_limits_count_the_chosen_one() {
    let server = models().await;
    let (may, may_not) = (key("may", ""), key("not", ""));
    let keys = asks_for(&[&may, &may_not], "{may: {models: [auto]}, not: {models: [coder]}}");
    let limits = "limits:\n  - {name: coders, models: [coder], requests: 1, per: 1h, on_exhausted: {use: small}}\n  - {name: smalls, models: [small], requests: 1, per: 1h}\n";
    let gateway = start(&routed(&server.url(), &format!("{keys}{limits}")), "").await;
    let client = Client::h1();
    let ask = |secret: &str, text: &str| {
        let bearer = format!("Bearer {secret}");
        let sent = body(CHAT, text, false);
        let (client, address) = (&client, gateway.address);
        async move { client.post_with(address, CHAT, &[("authorization", &bearer)], sent).await }
    };
    let refused = ask(&may_not.text, CODE).await;
    assert_eq!((refused.status, refused.code().as_str()), (403, "model_not_allowed"));
    assert_eq!(ask(&may.text, CODE).await.header("x-infergate-route"), "auto=coder");
    let refused = ask(&may.text, CODE).await;
    assert_eq!((refused.status, refused.code().as_str()), (429, "rate_limit_exceeded"), "small is not in its list");
    assert!(refused.text().contains("coders"), "{}", refused.text());
    assert_eq!(ask(&may.text, BANK).await.header("x-infergate-route"), "auto=small");
    assert!(ask(&may.text, BANK).await.text().contains("smalls"));
    assert_eq!(ask(&may.text, NEITHER).await.status, 200);
    let bearer = format!("Bearer {}", may.text);
    let request = http::Request::get(format!("http://{}/v1/models", gateway.address)).header("authorization", &bearer);
    let listed = client.send(request.body(Default::default()).unwrap()).await.json();
    let names: Vec<&str> = listed["data"].as_array().unwrap().iter().filter_map(|model| model["id"].as_str()).collect();
    assert_eq!(names, ["auto"]);
}

#[tokio::test]
async fn what_cannot_be_read_and_what_has_no_text_goes_to_the_default() {
    let server = models().await;
    let gateway = Gateway::start(&routed(&server.url(), "default_model: auto\n")).await;
    let twice = format!(
        r#"{{"model":"auto","max_tokens":3,"messages":[{{"role":"user","content":"{CODE}","content":"{CODE}"}}]}}"#
    );
    assert_eq!(route(&gateway, &[], CHAT, twice).await, "auto=plain");
    let unknown = body(CHAT, CODE, false).replace("\"auto\"", "\"whatever\"");
    assert_eq!(route(&gateway, &[], CHAT, unknown).await, "auto=coder");
    let long = body(CHAT, &format!("{CODE}. {}", "lorem ipsum dolor ".repeat(20_000)), false);
    let answer = Client::h1().post(gateway.address, CHAT, long).await;
    assert!(answer.header("x-infergate-route").starts_with("auto=") || answer.status == 400, "{}", answer.text());
}

#[tokio::test]
async fn a_reload_changes_what_is_decided_and_a_wrong_one_nothing() {
    let server = models().await;
    let gateway = Gateway::start(&routed(&server.url(), "")).await;
    let wrong = routed(&server.url(), "").replace("model: coder", "model: codr");
    let told = gateway.reload(&wrong).await.text();
    assert!(told.contains("routers.auto.ask[1].semantic.routes[0].model: no model is named codr"), "{told}");
    assert_eq!(route(&gateway, &[], CHAT, body(CHAT, CODE, false)).await, "auto=coder");
    gateway.reload(&routed(&server.url(), "").replace("model: coder", "model: small")).await;
    assert_eq!(route(&gateway, &[], CHAT, body(CHAT, CODE, false)).await, "auto=small");
}

/// The standard output of the program, given this on its standard input.
fn told(arguments: &[&str], input: &str) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_infergate"));
    let mut child =
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let done = child.wait_with_output().unwrap();
    assert!(done.status.success());
    String::from_utf8(done.stdout).unwrap()
}

fn file(text: &str) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), text).unwrap();
    file
}

#[test]
fn the_command_line_explains_a_prompt_and_the_same_policy_has_the_same_fingerprint() {
    let policy = file(&routed("http://127.0.0.1:1", ""));
    let path = policy.path().to_str().unwrap();
    let explain = |more: &[&str], text: &str| {
        told(&[&["route", "explain", "--policy", path], more].concat(), &body(CHAT, text, false))
    };
    let parsed = |text: &str| serde_json::from_str::<Value>(&explain(&["--json"], text)).unwrap();
    let (one, two) = (parsed(CODE), parsed(CODE));
    assert_eq!((&one["asked"], &one["model"], &one["rule"]), (&json!("auto"), &json!("coder"), &json!("code")));
    assert_eq!(one["candidates"], json!(["plain", "coder", "eyes", "small"]));
    assert_eq!(one["routers"][1]["fingerprint"].as_str().unwrap().len(), 16);
    assert_eq!(one["routers"], two["routers"], "bit by bit");
    assert!(one["microseconds"].as_f64().unwrap() > 0.0 && one["signals"]["turns"] == 1);
    let story = explain(&["--model", "auto"], NEITHER);
    assert!(story.starts_with("auto -> plain   by default"), "{story}");
    assert!(story.contains("semantic") && story.contains("likeness") && story.contains("signals"), "{story}");
}

#[test]
fn the_command_line_explains_what_was_weighed_and_how_much_is_thought() {
    let list = "    effort: {code: {set: high}}
    shortlists:
      capable:
        weigh: {quality: 2, price: 1}
        models: [{model: coder, quality: 0.9}, {model: small, quality: 0.5}, {model: eyes, quality: 1}]
prices: {list: [{models: [coder], input: 16, output: 16}, {models: [small, eyes], input: 4, output: 4}]}
";
    let text = routed("http://127.0.0.1:1", list).replacen("model: coder", "model: capable", 1);
    let policy = file(&text.replace("{name: eyes, pool: p}", "{name: eyes, pool: p, can: {tools: false}}"));
    let path = policy.path().to_str().unwrap();
    let asked = body(CHAT, CODE, false).replacen('{', r#"{"tools":[{"type":"function"}],"#, 1);
    let found: Value = serde_json::from_str(&told(&["route", "explain", "--policy", path, "--json"], &asked)).unwrap();
    assert_eq!((&found["model"], &found["shortlist"]["name"]), (&json!("coder"), &json!("capable")), "{found}");
    let models = found["shortlist"]["models"].as_array().unwrap();
    assert_eq!(models[2]["out"], "calls no tools");
    // (2 x 0.9 + 0.75) / 3 against (2 x 0.5 + 1) / 3: two doublings.
    assert_eq!([&models[0]["score_permille"], &models[1]["score_permille"]], [&json!(850), &json!(667)], "{found}");
    assert_eq!((&found["shortlist"]["margin"], &found["effort"]), (&json!(0.1833), &json!({"set": "high"})));
    let story = told(&["route", "explain", "--policy", path], &asked);
    for line in
        ["  coder                score 850 (quality 900, price 750)", "  eyes                 out: calls no tools"]
    {
        assert!(story.lines().any(|told| told == line), "{line} is not in {story}");
    }
    assert!(story.contains(r#"effort      {"set":"high"}"#), "{story}");
}

#[test]
fn the_command_line_explains_what_a_tenant_gets_with_its_headers() {
    let text = routed("http://127.0.0.1:1", "tenants: {clinic: {regions: [eu]}, shop: {models: [small]}, bank: {}}\n")
        .replace("{name: coder, pool: p}", "{name: coder, pool: q}")
        .replace("pools:\n", "pools:\n  q: {region: us, upstreams: [{url: 'http://127.0.0.1:2'}]}\n")
        .replace("p: {upstreams", "p: {region: eu, upstreams")
        .replacen("    ask:\n", "    cascade: {models: [small, coder, eyes]}\n    ask:\n      - cel: {model: eyes, when: \"tenant == 'bank' && headers['x-team'] == 'blue'\", headers: [x-team]}\n      - cel: {model: eyes, when: \"principal == 'ann' && 'gold' in plans && claims.team == 'art'\", claims: [team]}\n", 1);
    let policy = file(&text);
    let path = policy.path().to_str().unwrap();
    let explain = |more: &[&str], said: &str| {
        told(&[&["route", "explain", "--policy", path], more].concat(), &body(CHAT, said, false))
    };
    let parsed = |more: &[&str], said: &str| {
        serde_json::from_str::<Value>(&explain(&[more, &["--json"]].concat(), said)).unwrap()
    };
    let model = |more: &[&str], said: &str| parsed(more, said)["model"].as_str().unwrap().to_owned();
    assert_eq!(model(&[], CODE), "coder");
    let blue = ["--tenant", "bank", "--header", "X-Team: blue"];
    assert_eq!([model(&blue, CODE), model(&blue[..2], CODE)], ["eyes", "coder"]);
    let twice = [&blue[..], &["--header", "x-team: red"]].concat();
    assert_eq!(model(&twice, CODE), "coder", "which is meant?");
    let paid = ["--principal", "ann", "--plan", "free", "--plan", "gold", "--claims", r#"{"team": "art", "age": 3}"#];
    assert_eq!(model(&paid, CODE), "eyes");
    for missing in [0..2, 4..6, 6..8] {
        let mut fewer = paid.to_vec();
        drop(fewer.drain(missing.clone()));
        assert_eq!(model(&fewer, CODE), "coder", "without {missing:?}");
    }
    let clinic = parsed(&["--tenant", "clinic"], CODE);
    assert_eq!((&clinic["model"], &clinic["tenant"]), (&json!("plain"), &json!("clinic")), "{clinic}");
    assert!(clinic["why"].as_str().unwrap().contains("coder is in no region that this key may use"), "{clinic}");
    let steps = |more: &[&str]| parsed(more, BANK)["escalates_to"].clone();
    assert_eq!((steps(&[]), steps(&["--tenant", "clinic"])), (json!(["coder", "eyes"]), json!(["eyes"])));
    assert_eq!(parsed(&["--tenant", "shop"], CODE)["refused"], "auto is not in the models of shop");
    let story = explain(&["--tenant", "shop"], CODE);
    assert!(story.contains("  refused     auto is not in the models of shop"), "{story}");
    for (wrong, words) in [
        (["--tenant", "bnak"], "no tenant bnak; did you mean bank?"),
        (["--header", "x-team blue"], "write it as 'name: value'"),
        (["--header", "x team: blue"], "is no header's name"),
        (["--claims", "[3]"], "this is no JSON object"),
    ] {
        let (code, _, complaint) = Process::run(&[&["route", "explain", "--policy", path], &wrong[..]].concat());
        assert!(code != Some(0) && complaint.contains(words), "{complaint}");
    }
}

#[test]
fn the_command_line_measures_routes_on_labelled_prompts() {
    let policy = file(&routed("http://127.0.0.1:1", ""));
    let rows = [(CODE, "code"), (BANK, "bank"), ("will my python loop end", "bank"), (NEITHER, "art")];
    let lines: String =
        rows.iter().map(|(text, label)| format!("{}\n", json!({"text": text, "label": label}))).collect();
    let rows = file(&lines);
    let arguments = ["route", "eval", rows.path().to_str().unwrap(), "--policy", policy.path().to_str().unwrap()];
    let found: Value = serde_json::from_str(&told(&[&arguments[..], &["--json"]].concat(), "")).unwrap();
    assert_eq!((&found["in_scope"], &found["out_of_scope"]), (&json!(3), &json!(1)));
    assert!((found["accuracy"].as_f64().unwrap() - 2.0 / 3.0).abs() < 1e-9, "{found}");
    assert_eq!((&found["auroc"], &found["worst"][0]["got"]), (&json!(1.0), &json!("code")));
    assert_eq!(found["confusion"], json!([{"label": "bank", "got": "code", "rows": 1}]));
    let report = told(&arguments, "");
    assert!(report.starts_with("accuracy 66.7 % of 3 prompts"), "{report}");
    assert!(report.contains("line 3: bank taken for code") && report.contains("AUROC 100.0 %"), "{report}");
    let (code, _, complaint) =
        Process::run(&["route", "eval", arguments[2], "--policy", arguments[4], "--model", "no"]);
    assert!(code == Some(1) && complaint.contains("no no under `routers`"), "{complaint}");
}

#[test]
fn check_warns_of_routes_that_will_not_do_and_says_that_the_policy_is_good() {
    let few = "            - name: few\n              model: small\n              examples: [sing a song for my cat]\n";
    let policy = file(&routed("http://127.0.0.1:1", few));
    let (code, out, _) = Process::run(&["check", policy.path().to_str().unwrap()]);
    assert_eq!(code, Some(0), "{out}");
    let warning = out.lines().find(|line| line.starts_with("warning: ")).unwrap();
    assert!(warning.contains("routers.auto.ask[1].semantic.routes[2].examples: 1 examples are few"), "{warning}");
    assert!(out.lines().last().unwrap().contains("good ("), "{out}");
}

/// Prompts of which the weak model gets every third wrong, and a broken line if wanted.
fn outcomes(more: &str) -> String {
    let rows = (0..90).map(|n| {
        let hard = n % 3 == 0;
        let text = if hard {
            "Prove that the sum of ".to_owned() + &"terms ".repeat(1 + n % 7)
        } else {
            format!("Say {}", "hello ".repeat(1 + n % 5))
        };
        format!("{}\n", json!({"text": text, "weak_ok": !hard, "strong_ok": true}))
    });
    rows.collect::<String>() + more
}

#[tokio::test]
async fn difficulty_is_learned_from_labelled_prompts_told_honestly_and_followed() {
    let (rows, directory) = (file(&outcomes("")), tempfile::tempdir().unwrap());
    let into = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let train = |into: &str, more: &[&str]| {
        let arguments = ["route", "train", rows.path().to_str().unwrap(), "--into", into, "--strong-share", "0.33"];
        told(&[&arguments[..], more].concat(), "")
    };
    let found: Value = serde_json::from_str(&train(&into("one.json"), &["--json"])).unwrap();
    let report = train(&into("two.json"), &[]);
    let read = |name: &str| std::fs::read(into(name)).unwrap();
    assert_eq!(read("one.json"), read("two.json"), "bit by bit");
    assert_eq!((&found["prompts"], &found["strong_right"]), (&json!(90), &json!(1.0)));
    assert!(found["held_out"]["auroc"].as_f64().unwrap() > 0.9, "{found}");
    assert!(found["threshold"].is_f64() && found["by_length"]["apgr"].is_f64(), "{found}");
    assert!(report.contains("AUROC") && report.contains("warning: 90 prompts are few"), "{report}");
    assert!(report.contains(&format!("trained: {}, strong_share: 0.33", into("two.json"))), "{report}");

    let server = models().await;
    let ask = format!(
        "    ask:\n      - difficulty: {{weak: small, strong: coder, trained: '{}', strong_share: 0.33}}\n",
        into("one.json")
    );
    let policy = routed(&server.url(), "");
    let policy = format!("{}{ask}", &policy[..policy.find("    ask:").unwrap()]);
    let gateway = Gateway::start(&policy).await;
    assert_eq!(route(&gateway, &[], CHAT, body(CHAT, "Prove that the sum of terms terms", false)).await, "auto=coder");
    assert_eq!(route(&gateway, &[], CHAT, body(CHAT, "Say hello hello", false)).await, "auto=small");
    std::fs::write(into("one.json"), "{}").unwrap();
    let wrong = gateway.reload(&format!("{policy}# again\n")).await.text();
    assert!(wrong.contains("routers.auto.ask[0].difficulty.trained: ") && wrong.contains("missing field"), "{wrong}");
}

#[test]
fn what_cannot_be_learned_from_is_told_at_its_line() {
    for (more, complaint) in [
        ("{\"text\": 1}\n", "line 91: invalid type"),
        ("{\"text\": \"a\", \"weak_ok\": true}\n", "line 91: missing field `strong_ok`"),
    ] {
        let rows = file(&outcomes(more));
        let (code, _, told) = Process::run(&["route", "train", rows.path().to_str().unwrap()]);
        assert!(code == Some(1) && told.contains(complaint), "{told}");
    }
    let few = file("{\"text\": \"a\", \"weak_ok\": false, \"strong_ok\": true}\n");
    let (code, _, told) = Process::run(&["route", "train", few.path().to_str().unwrap()]);
    assert!(code == Some(1) && told.contains("1 prompts are too few"), "{told}");
}

#[tokio::test]
async fn a_condition_decides_by_who_asks_where_and_what_and_one_that_fails_does_not_hold() {
    let server = models().await;
    let (gold, iron) = (key("acme", ""), key("other", ""));
    let keys = asks_for(&[&gold, &iron], "{acme: {}, other: {}}");
    let ask = "    ask:\n      - cel: {name: team, model: coder, when: \"headers['x-team'] == 'blue' && tenant == 'acme'\", headers: [x-team]}\n      - cel: {name: tools, model: eyes, when: \"tools > 1 && surface.endsWith('completions')\"}\n";
    let policy = routed(&server.url(), &keys);
    let begin = policy.find("    ask:").unwrap();
    let rest = policy.find("tenants:").unwrap();
    let gateway = start(&format!("{}{ask}{}", &policy[..begin], &policy[rest..]), "").await;
    let asked = |secret: &str, headers: &[(&str, &str)], body: String| {
        let bearer = format!("Bearer {secret}");
        let mut all: Vec<(String, String)> =
            headers.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        all.push(("authorization".to_owned(), bearer));
        let address = gateway.address;
        async move {
            let all: Vec<(&str, &str)> = all.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
            let answer = Client::h1().post_with(address, CHAT, &all, body).await;
            assert_eq!(answer.status, 200, "{}", answer.text());
            answer.header("x-infergate-route").to_owned()
        }
    };
    let plain = || body(CHAT, NEITHER, false);
    let tools = plain().replace("\"x_own\"", "\"tools\":[{\"type\":\"function\",\"function\":{\"name\":\"a\"}},{\"type\":\"function\",\"function\":{\"name\":\"b\"}}],\"x_own\"");
    assert_eq!(asked(&gold.text, &[("x-team", "blue")], plain()).await, "auto=coder");
    assert_eq!(asked(&iron.text, &[("x-team", "blue")], plain()).await, "auto=plain");
    assert_eq!(
        asked(&gold.text, &[("x-team", "blue"), ("x-team", "red")], plain()).await,
        "auto=plain",
        "which is meant?"
    );
    assert_eq!(asked(&gold.text, &[], tools).await, "auto=eyes");
    let records = Journal::settled(&gateway).await.of_kind("request");
    let told = |words: &str| records.iter().filter(|record| record.to_string().contains(words)).count();
    assert_eq!((told("cel: its condition fails: there is no such key"), told("blue")), (1, 0), "{records:?}");
    let wrong = policy.replace("    ask:", "    ask:\n      - cel: {model: coder, when: 'tokens > 1 && team'}");
    let told = gateway.reload(&wrong).await.text();
    assert!(told.contains("routers.auto.ask[0].cel.when: team is not known"), "{told}");
}

#[tokio::test]
async fn a_condition_sees_the_claims_that_it_lists_and_whoever_has_none_goes_on() {
    let (server, signer) = (models().await, Signer::p256());
    let issuer = Issuer::start(&[signer.jwk("k")]).await;
    let own = key("search", "");
    let callers = asks_for(&[&own], "{search: {}}")
        .replace("authenticators:\n", &format!("authenticators:\n  - jwt: {{issuers: [{}]}}\n", issuer.entry("")));
    let rule = "cel: {name: staff, model: coder, when: \"'ml' in claims.groups && claims['account.level'] > 2\", claims: [groups, account.level]}";
    let policy = routed(&server.url(), &callers);
    let (begin, rest) = (policy.find("    ask:").unwrap(), policy.find("tenants:").unwrap());
    let policy = format!("{}    ask:\n      - {rule}\n{}", &policy[..begin], &policy[rest..]);
    let gateway = start(&policy, "").await;
    let token = |groups: Value, level: u32| {
        let mut claims = issuer.claims(600);
        (claims["groups"], claims["account"], claims["canary"]) =
            (groups, json!({"level": level}), json!("canary-claim"));
        signer.token("k", &claims)
    };
    let staff = token(json!(["canary-group", "ml"]), 3);
    for (credentials, model) in [
        (&staff, "coder"),
        (&staff, "coder"),
        (&token(json!(["ml"]), 2), "plain"),
        (&token(json!("x".repeat(300)), 3), "plain"),
        (&own.text, "plain"),
    ] {
        let bearer = format!("Bearer {credentials}");
        let got = route(&gateway, &[("authorization", &bearer)], CHAT, body(CHAT, NEITHER, false)).await;
        assert_eq!(got, format!("auto={model}"));
    }
    let records = Journal::settled(&gateway).await.of_kind("request");
    let told = |words: &str| records.iter().filter(|record| record.to_string().contains(words)).count();
    let failed = told("cel: its condition fails: there is no such key");
    assert_eq!((failed, told("canary")), (2, 0), "what a claim says is in no record: {records:?}");
    let without = policy.replacen(&format!("  - jwt: {{issuers: [{}]}}\n", issuer.entry("")), "", 1);
    let file = file(&without.replace("{env: INFERGATE_PEPPER}", "{env: NONE}"));
    let (_, out, _) = Process::run(&["check", "--without-secrets", file.path().to_str().unwrap()]);
    assert!(out.contains("routers.auto.ask[0].cel.claims") && out.contains("no authenticator reads tokens"), "{out}");
}

/// Two routes of which nothing in the first stage says which it is.
fn doubtful(url: &str, service: &str, more: &str) -> String {
    let route = |name: &str, model: &str| {
        format!(
            "            - {{name: {name}, model: {model}, examples: [write a letter to my {name}, send a letter to my {name}, draft a letter for my {name}, type a letter to a {name}, a letter to the {name}]}}\n"
        )
    };
    let second = format!("          second: {{url: '{service}/v1', model: judge, margin: 0.5, {more}}}\n");
    let policy = routed(url, "");
    let routes = route("landlord", "coder") + &route("banker", "small");
    let ask = format!("    ask:\n      - semantic:\n          least_likeness: 0\n{second}          routes:\n{routes}");
    format!("{}{ask}", &policy[..policy.find("    ask:").unwrap()])
}

const DOUBT: &str = "please write a letter";

fn letter(says: &str) -> Vec<Step> {
    let answer = json!({"choices": [{"message": {"content": says}}]}).to_string();
    Framing::Length.answer("application/json", &answer.into(), 4096)
}

#[tokio::test]
async fn where_two_routes_are_alike_another_service_says_which_and_is_asked_once() {
    let server = models().await;
    let mut chosen = Vec::new();
    for says in ["A", "B"] {
        let judge = Wire::start(move |_| letter(says)).await;
        let gateway = Gateway::start(&doubtful(&server.url(), &judge.url(), "shape: judge, deadline_ms: 5000")).await;
        chosen.push(route(&gateway, &[], CHAT, body(CHAT, DOUBT, false)).await);
        assert_eq!(route(&gateway, &[], CHAT, body(CHAT, DOUBT, false)).await, *chosen.last().unwrap());
        assert_eq!(judge.heard().len(), 1, "what it said of a text is kept");
        let record = Journal::settled(&gateway).await.of_kind("request").remove(0).to_string();
        assert!(record.contains("second stage, between ") && record.contains("semantic: score"), "{record}");
    }
    chosen.sort();
    assert_eq!(chosen, ["auto=coder", "auto=small"], "each is chosen if it is said");
    let vectors = Wire::start(|heard| {
        let asked: Value = serde_json::from_slice(&heard.body).unwrap();
        let of = |text: &Value| if text.as_str().unwrap().contains("landlord") { [0.0, 1.0] } else { [1.0, 0.0] };
        let data = asked["input"].as_array().unwrap().iter().enumerate();
        let data: Vec<Value> = data.map(|(at, text)| json!({"index": at, "embedding": of(text)})).collect();
        Framing::Length.answer("application/json", &json!({"data": data}).to_string().into(), 4096)
    })
    .await;
    let gateway =
        Gateway::start(&doubtful(&server.url(), &vectors.url(), "shape: embeddings, deadline_ms: 5000")).await;
    assert_eq!(route(&gateway, &[], CHAT, body(CHAT, DOUBT, false)).await, "auto=small");
}

/// The same with a service that is a pool, in the region us; the requests of the tenant `near` stay in eu.
fn doubtful_in_a_pool(url: &str, service: &str, more: &str) -> String {
    let pool = format!(
        "  judges: {{region: us, {more}upstreams: [{{url: '{service}/base', key: {{env: INFERGATE_PEPPER}}, model: wise, headers: {{x-own: '1'}}}}]}}\n"
    );
    doubtful(url, service, "shape: judge, deadline_ms: 5000")
        .replace(&format!("url: '{service}/v1'"), "pool: judges")
        .replace("p: {upstreams", "p: {region: eu, upstreams")
        .replace("routers:\n", &format!("{pool}routers:\n"))
}

/// The same where the pool needs no key.
fn without_key(policy: String) -> String {
    policy.replace(", key: {env: INFERGATE_PEPPER}", "")
}

#[tokio::test]
async fn a_second_stage_in_a_pool_is_asked_as_any_request_and_only_where_the_tenants_requests_may_go() {
    let (server, judge) = (models().await, Wire::start(|_| letter("B")).await);
    let (near, far) = (key("near", ""), key("far", ""));
    let keys = asks_for(&[&near, &far], "{near: {regions: [eu]}, far: {}}");
    let policy = doubtful_in_a_pool(&server.url(), &judge.url(), "") + &keys;
    let gateway = start(&policy, "").await;
    let ask = |secret: &str| {
        let (bearer, gateway) = (format!("Bearer {secret}"), &gateway);
        async move { route(gateway, &[("authorization", &bearer)], CHAT, body(CHAT, DOUBT, false)).await }
    };
    let first = ask(&near.text).await;
    assert!(judge.heard().is_empty(), "it stands where these requests may not go");
    let second = ask(&far.text).await;
    assert_eq!((ask(&far.text).await, judge.heard().len()), (second.clone(), 1), "what it said of a text is kept");
    assert_eq!(ask(&near.text).await, first, "and is not for those who may not ask");
    let heard = &judge.heard()[0];
    assert!(heard.head.starts_with("POST /base/v1/chat/completions "), "{}", heard.head);
    assert_eq!(heard.header("authorization"), format!("Bearer {PEPPER}"));
    assert_eq!((heard.header("x-own"), heard.header("content-type")), ("1", "application/json"));
    assert_eq!(serde_json::from_slice::<Value>(&heard.body).unwrap()["model"], "wise");
    let records = Journal::settled(&gateway).await.of_kind("request");
    let told = |at: usize, words: &str| records[at].to_string().contains(words);
    assert!(told(0, "pool judges is in no region of near") && told(3, "in no region") && !told(1, "in no region"));
    assert!(told(1, "second stage, between "), "{}", records[1]);
    let page = gateway.admin("/metrics").await.text();
    let answered = page.lines().find(|line| line.contains("pool=\"judges\"") && line.contains("result=\"answered\""));
    assert!(answered.is_some_and(|line| line.ends_with(" 1")), "{answered:?}");
}

/// A judge that finds for the second route, and says that it read 40 tokens and wrote 2.
async fn paid_judge() -> Wire {
    Wire::start(|_| {
        let usage = json!({"prompt_tokens": 40, "completion_tokens": 2});
        let answer = json!({"choices": [{"message": {"content": "B"}}], "usage": usage}).to_string();
        Framing::Length.answer("application/json", &answer.into(), 4096)
    })
    .await
}

#[tokio::test]
async fn what_a_second_stage_in_a_pool_uses_is_paid_for_and_counts_in_the_limits_of_whoever_asks() {
    let (judge, server) = (paid_judge().await, models().await);
    let money = "prices: {list: [{models: ['*'], input: 1, output: 2}, {models: [wise], input: 1000, output: 3000}]}\nlimits: [{name: all, tokens: 1000, per: 1h}, {name: read, input_tokens: 1000, per: 1h}, {name: written, output_tokens: 1000, per: 1h}, {name: purse, usd: 1, per: day}]\n";
    let gateway = Gateway::start(&(without_key(doubtful_in_a_pool(&server.url(), &judge.url(), "")) + money)).await;
    for _ in 0..2 {
        route(&gateway, &[], CHAT, body(CHAT, DOUBT, false)).await;
    }
    let records = Journal::settled(&gateway).await.of_kind("request");
    let figures = |at: usize| {
        let tokens = |side: &str| records[at]["usage"][side].as_u64().unwrap();
        let (input, output) = (tokens("input_tokens"), tokens("output_tokens"));
        let costs = records[at]["cost"]["nanousd"].as_u64().unwrap();
        let used = ["all", "read", "written", "purse"].map(|name| limit(&records[at], name, "used"));
        assert_eq!(used, [input + output, input, output, costs]);
        let reserved = |name| limit(&records[at], name, "reserved");
        assert!(reserved("all") >= input + output && reserved("purse") >= costs, "{}", records[at]);
        [input, output, costs]
    };
    let ([input, output, costs], alone) = (figures(0), figures(1));
    assert_eq!([input, output, costs], [alone[0] + 40, alone[1] + 2, alone[2] + 46_000_000], "kept, it costs nothing");
    let reserved = |name| limit(&records[0], name, "reserved");
    let own = [reserved("read") - 40, reserved("written") - 2];
    assert_eq!(reserved("all"), own[0] + own[1] + 42);
    assert_eq!(reserved("purse"), own[0] * 1_000 + own[1] * 2_000 + 46_000_000, "the model has not said its tokens");
}

#[tokio::test]
async fn what_a_second_stage_used_counts_in_the_limits_that_refuse_the_request_after_it() {
    let (judge, server) = (paid_judge().await, models().await);
    let limits = "limits: [{name: all, tokens: 1000, per: 1h, on_short: refuse}, {requests: 9, per: 1h}]\n";
    let gateway = Gateway::start(&(without_key(doubtful_in_a_pool(&server.url(), &judge.url(), "")) + limits)).await;
    let asks_for =
        |tokens: &str| body(CHAT, DOUBT, false).replace("\"max_tokens\":3", &format!("\"max_tokens\":{tokens}"));
    for _ in 0..2 {
        let answer = Client::h1().post(gateway.address, CHAT, asks_for("990")).await;
        assert!((400..500).contains(&answer.status), "{}", answer.text());
    }
    let records = Journal::settled(&gateway).await.of_kind("request");
    assert_eq!((limit(&records[0], "all", "used"), judge.heard().len()), (42, 1), "kept, it is not asked again");
    for (record, left) in records.iter().zip(["1000 tokens left", "958 tokens left"]) {
        assert!(record["attempts"] == json!([]) && record["decisions"].to_string().contains(left), "{record}");
    }
    route(&gateway, &[], CHAT, asks_for("800")).await;
}

/// What a record says of a limit.
fn limit(record: &Value, name: &str, what: &str) -> u64 {
    let mut limits = record["limits"].as_array().unwrap().iter();
    limits.find(|limit| limit["limit"] == name).unwrap()[what].as_u64().unwrap()
}

#[tokio::test]
async fn a_second_stage_in_a_pool_leaves_the_first_answer_where_the_pool_fails_is_out_or_is_full() {
    let server = models().await;
    let broken = Wire::saying("HTTP/1.1 500 No\r\ncontent-length: 0\r\n\r\n").await;
    let breaker = "breaker: {failures: 2, open_ms: 60000, open_ms_max: 60000}, ";
    let gateway = Gateway::start(&without_key(doubtful_in_a_pool(&server.url(), &broken.url(), breaker))).await;
    let mut answers = Vec::new();
    for _ in 0..4 {
        answers.push(route(&gateway, &[], CHAT, body(CHAT, DOUBT, false)).await);
    }
    answers.dedup();
    assert_eq!((answers.len(), broken.heard().len()), (1, 2), "two failures open the breaker");
    let records = Journal::settled(&gateway).await.of_kind("request");
    let told = |words: &str| records.iter().filter(|record| record.to_string().contains(words)).count();
    assert_eq!((told("it answers with status 500"), told("every upstream of pool judges is out")), (2, 2));

    let silent = Wire::start(|_| vec![Step::UntilGone]).await;
    let policy = doubtful_in_a_pool(&server.url(), &silent.url(), "concurrency: {max: 1, queue: 0}, ");
    let policy = without_key(policy);
    let gateway = Gateway::start(&policy.replace("deadline_ms: 5000", "deadline_ms: 2000")).await;
    let ask = || route(&gateway, &[], CHAT, body(CHAT, DOUBT, false));
    let both = tokio::join!(ask(), ask());
    assert_eq!(both.0, answers[0]);
    assert_eq!(both.1, answers[0]);
    let records = Journal::settled(&gateway).await.of_kind("request");
    let told = |words: &str| records.iter().filter(|record| record.to_string().contains(words)).count();
    assert_eq!((told("no answer within 2000 ms"), told("pool judges is full")), (1, 1), "{records:?}");
    assert_eq!(silent.heard().len(), 1);
}

#[tokio::test]
async fn what_the_second_stage_does_not_say_in_time_leaves_the_first_stages_answer() {
    let server = models().await;
    let silent = Wire::start(|_| vec![Step::UntilGone]).await;
    let mumbling = Wire::start(|_| letter("perhaps")).await;
    let broken = Wire::saying("HTTP/1.1 500 No\r\ncontent-length: 0\r\n\r\n").await;
    let mut first = None;
    for (wire, why) in [(&silent, "no answer within 200 ms"), (&mumbling, "neither A nor B"), (&broken, "status 500")] {
        let policy = doubtful(&server.url(), &wire.url(), "shape: judge, deadline_ms: 200");
        let gateway = Gateway::start(&policy).await;
        let asking = route(&gateway, &[], CHAT, body(CHAT, DOUBT, false));
        let got = tokio::time::timeout(Duration::from_secs(20), asking).await.expect("nobody waits for more");
        let record = Journal::settled(&gateway).await.of_kind("request").remove(0);
        assert!(record.to_string().contains(why), "{record}");
        assert_eq!(*first.get_or_insert(got.clone()), got, "the same whatever goes wrong");
        let narrow = policy.replace("margin: 0.5", "margin: 0");
        let asked = wire.heard().len();
        let gateway = Gateway::start(&narrow).await;
        assert_eq!(route(&gateway, &[], CHAT, body(CHAT, DOUBT, false)).await, got);
        assert_eq!(wire.heard().len(), asked, "outside the margin nobody is asked");
    }
}
