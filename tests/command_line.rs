//! The commands say what they do, what is wrong and what to do about it.

use std::net::TcpListener;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use infergate::settings::Settings;
use serde_json::Value;

use crate::support::{Client, Gateway, Options, Process, Simulated, chat, eventually, free_port, model_server, policy};

const SOON: Duration = Duration::from_secs(15);
const HOME: &str = env!("CARGO_MANIFEST_DIR");

/// A file with this text in a directory that lives as long as the result.
fn file(text: &str) -> (tempfile::TempDir, String) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("policy.yaml");
    std::fs::write(&path, text).unwrap();
    let path = path.display().to_string();
    (directory, path)
}

const BROKEN: &str = "\
version: 1
default_model: nobody
models:
  - name: a
    pool: fats
    priority: urgent
  - name: a
    pool: fast
pools:
  fast:
    upstreams:
      - url: gpu:8000
      - {url: 'http://x', provider: vlm}
";

#[test]
fn check_tells_all_that_is_wrong_each_thing_at_its_place() {
    let (_directory, path) = file(BROKEN);
    let (code, out, _) = Process::run(&["check", &path]);
    assert_eq!(code, Some(1));
    for expected in [
        "policy.yaml:2:1: default_model: no model is named nobody",
        "policy.yaml:5:5: models[0].pool: no pool is named fats; did you mean fast?",
        "policy.yaml:12:9: pools.fast.upstreams[0].url: ",
        "policy.yaml:13:27: pools.fast.upstreams[1].provider: vlm is none of ",
        "did you mean vllm?",
        "policy.yaml:6:5: models[0].priority: no priority is named urgent",
        "policy.yaml:7:5: models[1].name: a is taken already",
    ] {
        assert!(out.contains(expected), "{expected} is not in\n{out}");
    }
    let problems = out.lines().filter(|line| line.contains("policy.yaml:") && !line.contains("to mend")).count();
    assert!(out.trim_end().ends_with(&format!("{problems} problems to mend")), "{out}");
}

#[test]
fn check_tells_keys_that_do_not_exist_and_values_of_the_wrong_kind() {
    let cases = [
        ("version: 1\nmodel: []\n", "policy.yaml:2:1: ", "did you mean models?"),
        ("version: 2\n", "policy.yaml:1:1: version", "1"),
        ("version: 1\npools: {p: {upstreams: [{url: 'http://x', weight: many}]}}\n", "policy.yaml:2:", "weight"),
        ("version: 1\npools: {p: {upstreams: [], retry: {attempts: 99}}}\n", "policy.yaml:2:", "attempts"),
        ("version: 1\nversion: 1\n", "policy.yaml:2:", "version"),
        ("version: 1\n  pools: x\n", "policy.yaml:2:", ""),
        ("", "policy.yaml", "empty"),
        ("version: 1\nrequests: {name_upstream: yes}\n", "policy.yaml:2:12: ", "true or false"),
    ];
    for (text, place, word) in cases {
        let (_directory, path) = file(text);
        let (code, out, err) = Process::run(&["check", &path]);
        assert_eq!(code, Some(1), "{text}: {out}{err}");
        assert!(out.contains(place) && out.contains(word), "{text}\n{out}");
    }
    let (code, out, _) = Process::run(&["check", "/does/not/exist.yaml"]);
    assert!(code == Some(1) && out.contains("/does/not/exist.yaml: cannot be read"), "{out}");
}

#[test]
fn check_speaks_json_to_machines() {
    let (_directory, path) = file(BROKEN);
    let (code, out, _) = Process::run(&["check", "--json", &path]);
    assert_eq!(code, Some(1));
    let problems: Vec<Value> = out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let first = problems.iter().find(|problem| problem["key"] == "models[0].pool").unwrap();
    assert_eq!((&first["line"], &first["column"], &first["file"]), (&5.into(), &5.into(), &path.as_str().into()));
    assert!(first["message"].as_str().unwrap().contains("did you mean fast?"));
    let (_good, good) = file(&policy(&["http://127.0.0.1:1"], ""));
    let (code, out, _) = Process::run(&["check", "--json", &good]);
    assert_eq!((code, &serde_json::from_str::<Value>(&out).unwrap()["ok"]), (Some(0), &true.into()));
}

#[test]
fn check_is_content_with_a_good_file_and_looks_at_all_of_them() {
    let (_good, good) = file(&policy(&["http://127.0.0.1:1"], ""));
    let (code, out, _) = Process::run(&["check", &good]);
    assert_eq!(code, Some(0));
    assert!(out.contains("good (1 model, 1 pool, 1 upstream,"), "{out}");
    let (_bad, bad) = file(BROKEN);
    let (code, out, _) = Process::run(&["check", &bad, &good]);
    assert!(code == Some(1) && out.contains("good (") && out.contains("to mend"), "{out}");
}

#[test]
fn check_wants_the_secrets_unless_told_otherwise() {
    let (_directory, path) = file(
        "version: 1\npools: {p: {upstreams: [{url: 'http://x', key: {env: INFERGATE_NO_SUCH_KEY}}, {url: 'http://y', key: {file: /no/such/key}}]}}\n",
    );
    let (code, out, _) = Process::run(&["check", &path]);
    assert!(
        code == Some(1) && out.contains("INFERGATE_NO_SUCH_KEY is not set") && out.contains("/no/such/key"),
        "{out}"
    );
    assert_eq!(Process::run(&["check", "--without-secrets", &path]).0, Some(0));
}

#[test]
fn check_reads_settings_too() {
    let (_directory, path) = file("listeners:\n  - address: localhost\n    premissions: x\n");
    let (code, out, _) = Process::run(&["check", "--kind", "settings", &path]);
    assert!(code == Some(1) && out.contains("policy.yaml:3:5: ") && out.contains("did you mean permissions?"), "{out}");
}

// What is shipped.

fn shipped() -> Vec<String> {
    let mut files = vec![format!("{HOME}/config/policy.yaml")];
    let examples = std::fs::read_dir(format!("{HOME}/config/examples")).unwrap();
    files.extend(
        examples.map(|entry| entry.unwrap().path().display().to_string()).filter(|path| path.ends_with(".yaml")),
    );
    files
}

#[test]
fn every_policy_that_is_shipped_is_good() {
    let files = shipped();
    assert!(files.len() >= 6, "{files:?}");
    let arguments: Vec<&str> =
        ["check", "--without-secrets"].into_iter().chain(files.iter().map(String::as_str)).collect();
    let (code, out, _) = Process::run(&arguments);
    assert_eq!((code, out.matches(": good (").count()), (Some(0), files.len()), "{out}");
}

#[test]
fn every_policy_that_is_shipped_tells_editors_its_schema() {
    for path in shipped().into_iter().chain([format!("{HOME}/config/settings.yaml")]) {
        let text = std::fs::read_to_string(&path).unwrap();
        let schema = text.lines().next().unwrap().strip_prefix("# yaml-language-server: $schema=").expect(&path);
        assert!(Path::new(&path).parent().unwrap().join(schema).is_file(), "{path}: {schema}");
    }
}

#[test]
fn the_settings_that_are_shipped_say_what_holds_without_them() {
    let path = format!("{HOME}/config/settings.yaml");
    let (code, out, _) = Process::run(&["check", "--kind", "settings", &path]);
    assert_eq!(code, Some(0), "{out}");
    let read = Settings::load(Path::new(&path)).unwrap();
    assert_eq!(format!("{read:?}"), format!("{:?}", Settings::default()));
}

#[test]
fn the_schemas_that_are_shipped_are_those_of_this_version() {
    let schemas = [
        (&["schema"][..], "policy"),
        (&["schema", "--settings"], "settings"),
        (&["schema", "--record"], "record"),
        (&["schema", "--prices"], "prices"),
    ];
    for (arguments, name) in schemas {
        let (code, out, _) = Process::run(arguments);
        let shipped = std::fs::read_to_string(format!("{HOME}/config/{name}.schema.json")).unwrap();
        assert_eq!(code, Some(0));
        assert!(
            out == shipped,
            "config/{name}.schema.json is old: infergate {} > config/{name}.schema.json",
            arguments.join(" ")
        );
        let schema: Value = serde_json::from_str(&out).unwrap();
        let lacking =
            schema["properties"].as_object().unwrap().iter().find(|(_, value)| value["description"].is_null());
        assert!(lacking.is_none(), "no description: {lacking:?}");
    }
}

// Starting.

#[tokio::test]
async fn simulate_starts_a_model_server() {
    let address = format!("127.0.0.1:{}", free_port());
    let process = Process::start(
        &[
            "simulate",
            "--listen",
            &address,
            "--model",
            "tiny",
            "--engine",
            "sglang",
            "--ttft-ms",
            "5",
            "--fault",
            "status=503,path=/v1/embeddings",
        ],
        &[],
    );
    eventually("it says where", SOON, || async { process.out().contains(&format!("http://{address}")) }).await;
    let (client, address) = (Client::h1(), address.parse().unwrap());
    assert_eq!(client.get(address, "/v1/models").await.json()["data"][0]["id"], "tiny");
    let answer = client.post(address, "/v1/chat/completions", chat(false, 2).replace("\"m\"", "\"tiny\"")).await;
    assert!(
        answer.json()["system_fingerprint"].as_str().is_none_or(|name| name.starts_with("simulated")),
        "{}",
        answer.text()
    );
    assert_eq!(answer.status, 200);
    assert_eq!(client.post(address, "/v1/embeddings", r#"{"model":"tiny","input":"x"}"#).await.status, 503);
}

#[tokio::test]
async fn without_a_policy_every_model_of_the_upstreams_is_served() {
    let start = |name: &str, port: u16| {
        Simulated::start(Options {
            models: vec![name.to_owned()],
            listen: ([127, 0, 0, 1], port).into(),
            ..Options::default()
        })
    };
    let early = start("early", 0).await.unwrap();
    let port = free_port();
    let late_url = format!("http://127.0.0.1:{port}");
    let gateway =
        Gateway::with("version: 1\n", "threads: 2\n", &["--upstream", &early.url(), "--upstream", &late_url]).await;
    let ask = |model: &'static str| {
        let address = gateway.address;
        async move {
            Client::h1()
                .post(address, "/v1/chat/completions", chat(true, 2).replace("\"m\"", &format!("\"{model}\"")))
                .await
        }
    };
    assert_eq!((ask("early").await.status, ask("late").await.status), (200, 404));
    let late = start("late", port).await.unwrap();
    eventually("the other model is found", SOON, || async { ask("late").await.status == 200 }).await;
    assert_eq!(ask("early").await.status, 200);
    assert!(
        late.seen().iter().any(|seen| seen.method == "POST")
            && !early.seen().iter().any(|seen| seen.body.windows(6).any(|text| text == b"\"late\""))
    );
    let list = Client::h1().get(gateway.address, "/v1/models").await.json();
    let mut names: Vec<&str> =
        list["data"].as_array().unwrap().iter().map(|model| model["id"].as_str().unwrap()).collect();
    names.sort_unstable();
    assert_eq!(names, ["early", "late"]);
    assert_eq!(Client::h1().post(gateway.admin, "/admin/reload", "").await.status, 409, "there is no file to reload");
}

#[tokio::test]
async fn without_a_policy_servers_of_one_model_stand_in_for_each_other() {
    let (one, two) = (model_server().await, model_server().await);
    let gateway =
        Gateway::with("version: 1\n", "threads: 2\n", &["--upstream", &one.url(), "--upstream", &two.url()]).await;
    one.stop().await;
    for _ in 0..10 {
        assert_eq!(Client::h1().post(gateway.address, "/v1/chat/completions", chat(false, 1)).await.status, 200);
    }
}

#[tokio::test]
async fn without_a_policy_the_upstreams_key_comes_from_the_environment() {
    let server = Simulated::start(Options {
        models: vec!["m".to_owned()],
        key: Some("secret-key".to_owned()),
        ..Options::default()
    })
    .await
    .unwrap();
    let arguments = ["--upstream", &server.url(), "--upstream-key-env", "THEIR_KEY"];
    let gateway = Gateway::spawn("version: 1\n", "threads: 2\n", &arguments, &[("THEIR_KEY", "secret-key")]);
    gateway.ready().await;
    assert_eq!(Client::h1().post(gateway.address, "/v1/chat/completions", chat(false, 1)).await.status, 200);
}

#[test]
fn wrong_arguments_are_told_with_what_is_right() {
    let cases: [(&[&str], i32, &str); 14] = [
        (&["--polcy", "x"], 2, "--policy"),
        (&["serve", "--listen", "localhost"], 2, "give IP:PORT, like 0.0.0.0:8080, or unix:/path"),
        (&["--admin", "9090"], 2, "give IP:PORT"),
        (&["--policy", "x", "--upstream", "http://y"], 2, "cannot be used with"),
        (&["--upstream-key-env", "X"], 2, "--upstream"),
        (&["chekc"], 2, "check"),
        (&["check"], 2, "<FILE>"),
        (&["simulate", "--engine", "llama"], 2, "vllm"),
        (&["simulate", "--fault", "explode"], 2, "slow-first"),
        (&["simulate", "--listen", "here"], 2, "127.0.0.1:8000"),
        (&["--policy", "/does/not/exist.yaml"], 1, "/does/not/exist.yaml: cannot be read"),
        (&["--settings", "/does/not/exist.yaml"], 1, "/does/not/exist.yaml: cannot be read"),
        (&["--upstream", "gpu:8000"], 1, "http://"),
        (&["--log", "infergate=loud", "--upstream", "http://127.0.0.1:1"], 1, "try --log info"),
    ];
    for (arguments, expected, words) in cases {
        let (code, _, err) = Process::run(arguments);
        assert_eq!(code, Some(expected), "{arguments:?}: {err}");
        assert!(err.contains(words), "{arguments:?} does not tell {words}:\n{err}");
        assert!(!err.contains("panicked"), "{arguments:?}: {err}");
    }
}

#[test]
fn help_names_every_command() {
    let (code, out, _) = Process::run(&["--help"]);
    assert_eq!(code, Some(0));
    for word in ["serve", "check", "schema", "simulate", "--policy", "--settings", "--listen", "--admin", "--upstream"]
    {
        assert!(out.contains(word), "{word} is not in\n{out}");
    }
}

#[test]
fn a_bad_policy_at_the_start_is_told_whole() {
    let (_directory, path) = file(BROKEN);
    let (code, _, err) = Process::run(&["--policy", &path, "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"]);
    assert_eq!(code, Some(1));
    for expected in ["policy.yaml:2:1: ", "policy.yaml:5:5: ", "policy.yaml:12:9: ", "policy.yaml:13:27: "] {
        assert!(err.contains(expected), "{expected} is not in\n{err}");
    }
}

#[test]
fn a_port_that_is_taken_is_told() {
    let (_directory, path) = file(&policy(&["http://127.0.0.1:1"], ""));
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().unwrap().to_string();
    let free = format!("127.0.0.1:{}", free_port());
    for (listen, admin) in [(&taken, &free), (&free, &taken)] {
        let (code, out, err) = Process::run(&["--policy", &path, "--listen", listen, "--admin", admin]);
        assert_eq!(code, Some(1), "{err}");
        assert!(err.contains(&format!("cannot listen on {taken}")) && err.contains("Choose another"), "{err}");
        assert!(!out.contains("curl"), "it must not say that it listens: {out}");
    }
    let (code, _, err) = Process::run(&["simulate", "--listen", &taken]);
    assert!(code == Some(1) && err.contains(&format!("cannot listen on {taken}")), "{err}");
}

#[tokio::test]
async fn with_no_arguments_it_serves_and_prints_a_line_that_streams_an_answer() {
    if [8080, 8081, 9090].iter().any(|port| TcpListener::bind(("127.0.0.1", *port)).is_err()) {
        eprintln!("skipped: one of the ports 8080, 8081 and 9090 is taken on this machine");
        return;
    }
    let process = Process::start(&[], &[]);
    assert_eq!(
        std::fs::read_dir(process.directory()).unwrap().count(),
        2,
        "there is no policy here, only what it says"
    );
    eventually("it greets", SOON, || async { process.out().contains("\"messages\"") }).await;
    let said = process.out();
    let curl = &said[said.find("curl").unwrap_or_else(|| panic!("{said}"))..];
    assert!(curl.contains("http://127.0.0.1:8080/v1/chat/completions"), "{said}");
    let pasted = Command::new("sh").args(["-c", curl]).output().unwrap();
    let answer = String::from_utf8_lossy(&pasted.stdout);
    assert!(
        answer.matches("data: {").count() > 2 && answer.ends_with("data: [DONE]\n\n"),
        "{answer}{}",
        String::from_utf8_lossy(&pasted.stderr)
    );
    assert_eq!(Client::h1().get(([127, 0, 0, 1], 9090).into(), "/readyz").await.status, 200);
}

const GUARDED: &str = "guardrails:
  - {name: cards, in: [prompt.user, answer.content], verdict: redact, pii: {find: [card]}}
  - {name: words, in: [prompt.user, answer.content], verdict: block, words: {list: [geheim]}}
  - {name: attacks, in: [prompt.user], verdict: flag, mode: monitor, injection: {}}
";

#[test]
fn guard_try_shows_what_is_found_and_what_would_leave() {
    let (_directory, path) = file(&(policy(&["http://127.0.0.1:1"], "") + GUARDED));
    let card = "My card is 4111 1111 1111 1111.";
    let (code, out, err) = Process::given(&["guard", "try", "--policy", &path], card);
    assert_eq!(code, Some(0), "{err}");
    for expected in [
        "prompt.user, 31 bytes, 3 rules look there: redacted",
        "11..30  cards (pii)  card  redacted",
        "My card is [CARD].",
    ] {
        assert!(out.contains(expected), "{expected} is not in\n{out}");
    }
    let (_, out, _) =
        Process::given(&["guard", "try", "--policy", &path, "--in", "answer.content", "--json"], "It is geheim now");
    let told: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(
        (&told["outcome"], &told["leaves"], &told["blocked"]),
        (&"blocked".into(), &"It is ".into(), &true.into())
    );
    let found = &told["found"][0];
    assert_eq!((&found["rule"], &found["start"], &found["text"]), (&"words".into(), &6.into(), &"geheim".into()));
    let (_, out, _) = Process::given(&["guard", "try", "--policy", &path], "It is geheim");
    assert!(out.contains("nothing of it leaves"), "{out}");
    let (_, out, _) = Process::given(&["guard", "try", "--policy", &path], "What is the capital of France?");
    assert!(out.contains("3 rules look there: passed") && out.contains("it leaves as it is"), "{out}");
}

#[test]
fn guard_test_counts_what_each_rule_found_and_missed() {
    let (directory, path) = file(&(policy(&["http://127.0.0.1:1"], "") + GUARDED));
    let rows = directory.path().join("rows.jsonl");
    let text = r#"{"text": "My card is 4111 1111 1111 1111.", "label": "cards"}
{"text": "é 4111 1111 1111 1111 and geheim", "spans": [["card", 2, 21], {"start": 26, "end": 32, "label": "words"}]}
{"text": "nothing, but geheim", "label": null}
{"text": "no card at all", "label": ["cards", "names"]}

{"text": "a system prompt", "label": "cards", "in": "prompt.system"}
"#;
    std::fs::write(&rows, text).unwrap();
    let rows = rows.display().to_string();
    let (code, out, err) = Process::run(&["guard", "test", &rows, "--policy", &path, "--json"]);
    assert_eq!(code, Some(0), "{err}");
    let told: Value = serde_json::from_str(&out).unwrap();
    let of = |rule: usize, keys: &[&str]| -> Vec<Value> {
        keys.iter().map(|key| told["rules"][rule][key].clone()).collect()
    };
    let counts = ["texts", "clean", "right", "wrong", "missed"];
    assert_eq!(of(0, &counts), [4, 1, 2, 0, 1].map(Value::from), "cards: {told}");
    assert_eq!(of(1, &counts), [4, 3, 1, 1, 0].map(Value::from), "words: {told}");
    assert_eq!(of(2, &counts), [4, 4, 0, 0, 0].map(Value::from), "attacks: {told}");
    assert_eq!((&told["rules"][1]["precision"], &told["rules"][0]["precision"]), (&0.5.into(), &1.0.into()));
    assert_eq!(told["rules"][0]["missed_examples"][0]["line"], 4);
    assert_eq!(told["rules"][1]["wrong_examples"][0]["text"], "\"geheim\"");
    assert_eq!(told["unclaimed"], serde_json::json!({"names": 1}));
    let (_, out, _) = Process::run(&["guard", "test", &rows, "--policy", &path, "--worst", "1"]);
    assert!(out.contains("rows.jsonl:4: cards missed (cards, names): \"no card at all\""), "{out}");
    assert!(out.contains("no rule is named so, or found anything that it calls so: names (1)"), "{out}");
}

#[test]
fn guard_says_what_is_wrong_and_where() {
    let (directory, path) = file(&(policy(&["http://127.0.0.1:1"], "") + GUARDED));
    let rows = directory.path().join("rows.jsonl");
    std::fs::write(&rows, "{\"text\": \"a\"}\n{\"text\": \"a\", \"spans\": [[\"x\", 0, 9]]}\n").unwrap();
    let (_bare, bare) = file(&policy(&["http://127.0.0.1:1"], ""));
    let rows = rows.display().to_string();
    for (arguments, expected) in [
        (["test", "/no/such/rows", "--policy", &path], "/no/such/rows cannot be read"),
        (["test", &rows, "--policy", &path], "rows.jsonl:2: [\"x\",0,9] is no span of a text of 1 characters"),
        (["test", &rows, "--policy", &bare], "has no guardrails"),
        (["test", &rows, "--policy", "/no/such/policy"], "/no/such/policy"),
        (["try", "--in", "answer.nothing", "--json"], "give one of prompt.system"),
    ] {
        let all: Vec<&str> = ["guard"].into_iter().chain(arguments).collect();
        let (code, out, err) = Process::run(&all);
        assert!(code != Some(0) && out.is_empty() && err.contains(expected), "{all:?}: {out}{err}");
    }
}
