//! An existing LiteLLM configuration becomes a policy: it compiles, it is told of every key, no secret comes out, and it
//! is served.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output};

use infergate::policy::problem::Document;
use serde_json::Value;

use crate::support::http::post;
use crate::support::{Client, Gateway, Options, Process, Simulated, model_server};

const CHAT: &str = "/v1/chat/completions";

fn fixtures() -> Vec<PathBuf> {
    let directory = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/litellm");
    let mut files: Vec<PathBuf> = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(files.len() >= 12);
    files
}

fn fixture(number: &str) -> PathBuf {
    fixtures().into_iter().find(|path| path.file_name().unwrap().to_str().unwrap().starts_with(number)).unwrap()
}

fn import(path: &PathBuf, env: &[(&str, &str)], arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_infergate"));
    command.args(["import", "litellm"]).arg(path).args(arguments).env_remove("AZURE_API_BASE_CA");
    command.envs(env.iter().copied()).output().unwrap()
}

/// The policy, and each finding as `outcome key: message`.
fn imported(number: &str, env: &[(&str, &str)]) -> (String, Vec<String>) {
    let done = import(&fixture(number), env, &["--json"]);
    let told = String::from_utf8(done.stderr).unwrap();
    assert!(done.status.success(), "{told}");
    let findings = told.lines().map(|line| {
        let finding: Value = serde_json::from_str(line).unwrap();
        let word = |key: &str| finding[key].as_str().unwrap().to_owned();
        format!("{} {}: {}", word("outcome"), word("key"), word("message"))
    });
    (String::from_utf8(done.stdout).unwrap(), findings.collect())
}

fn has(findings: &[String], begin: &str, word: &str) {
    let there = findings.iter().any(|finding| finding.starts_with(begin) && finding.contains(word));
    assert!(there, "{begin} … {word}\n{findings:#?}");
}

fn value(policy: &str) -> Value {
    Document::parse(policy).unwrap().value
}

const SERVERS: [(&str, &str); 2] = [("SERVER_1", "http://127.0.0.1:8001/v1"), ("SERVER_2", "http://127.0.0.1:8002")];

#[test]
fn every_file_becomes_a_policy_that_check_takes_and_no_secret_comes_out() {
    for path in fixtures() {
        let done = import(&path, &SERVERS, &[]);
        let (policy, told) = (String::from_utf8(done.stdout).unwrap(), String::from_utf8(done.stderr).unwrap());
        assert!(done.status.success(), "{path:?}: {told}");
        assert!(!policy.contains("canary") && !told.contains("canary"), "{path:?}\n{policy}\n{told}");
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), &policy).unwrap();
        let (code, said, _) = Process::run(&["check", "--without-secrets", file.path().to_str().unwrap()]);
        assert_eq!(code, Some(0), "{path:?}: {said}\n{policy}");
        assert!(told.trim_end().ends_with(" not supported"), "{told}");
    }
}

/// Every key of a document that has a value of its own.
fn leaves(path: &str, value: &Value, leaves: &mut Vec<String>) {
    match value {
        Value::Object(members) if !members.is_empty() => {
            for (key, value) in members {
                let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                self::leaves(&path, value, leaves);
            }
        }
        Value::Array(items) if !items.is_empty() => {
            items.iter().enumerate().for_each(|(index, item)| self::leaves(&format!("{path}[{index}]"), item, leaves));
        }
        Value::Object(_) | Value::Array(_) | Value::Null => {}
        _ => leaves.push(path.to_owned()),
    }
}

#[test]
fn no_key_is_passed_over_in_silence() {
    // What names an entry is told with the entry.
    const WITH_IT: [&str; 9] = [
        "model_name",
        "credential_name",
        "api_base",
        "custom_llm_provider",
        "id",
        "base_model",
        "health_check_interval",
        "redis_port",
        "redis_password",
    ];
    let mut told_of = 0;
    for path in fixtures() {
        let done = import(&path, &SERVERS, &["--json"]);
        let told = String::from_utf8(done.stderr).unwrap();
        let findings: Vec<Value> = told.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert!(findings.iter().all(|finding| finding["line"].is_u64()), "{findings:#?}");
        let key = |finding: &Value| finding["key"].as_str().unwrap().to_owned();
        let told: BTreeSet<String> = findings.iter().map(key).collect();
        let left_out = findings.iter().filter(|finding| finding["message"].as_str().unwrap().contains("left out"));
        let left_out: Vec<String> =
            left_out.filter_map(|finding| key(finding).split_once(']').map(|(entry, _)| format!("{entry}]"))).collect();
        let mut keys = Vec::new();
        leaves("", &Document::parse(&fs::read_to_string(&path).unwrap()).unwrap().value, &mut keys);
        for key in keys.iter().filter(|key| !WITH_IT.contains(&key.rsplit('.').next().unwrap())) {
            let above = |told: &String| {
                key == told || key.strip_prefix(told.as_str()).is_some_and(|rest| rest.starts_with(['.', '[']))
            };
            // The first of its prices speaks for a model's others, a left-out entry for all that is in it.
            let of_price = key.contains("cost") && told.iter().any(|told| told.contains("cost"));
            let with_entry = left_out.iter().any(|entry| key.starts_with(entry.as_str()));
            assert!(told.iter().any(above) || of_price || with_entry, "{path:?}: {key}\n{told:#?}");
            told_of += 1;
        }
    }
    assert!(told_of > 200, "{told_of}");
}

#[test]
fn a_key_that_nobody_has_heard_of_is_told_as_not_supported_at_its_line() {
    let (_, findings) = imported("11", &[]);
    has(&findings, "not supported general_settings.some_future_setting", "nothing here is like it");
    let told = String::from_utf8(import(&fixture("11"), &[], &[]).stderr).unwrap();
    assert!(
        told.contains("11-everything-else.yaml:26:3: not supported: general_settings.some_future_setting: "),
        "{told}"
    );
    assert_eq!(import(&fixture("11"), &[], &["--strict"]).status.code(), Some(1));
}

#[test]
fn entries_of_one_name_are_a_pool_and_what_each_may_do_is_its_share() {
    let (policy, findings) = imported("02", &[("AZURE_API_BASE_CA", "https://acme-ca.openai.azure.com")]);
    let policy = value(&policy);
    let upstreams = &policy["pools"]["gpt-4o"]["upstreams"];
    let part = |key: &str| upstreams.as_array().unwrap().iter().map(|one| one[key].clone()).collect::<Vec<_>>();
    assert_eq!(part("url"), ["eu", "us", "ca"].map(|region| format!("https://acme-{region}.openai.azure.com/openai")));
    assert_eq!(part("model"), ["gpt-4o-eu", "gpt-4o-us", "gpt-4o-ca"]);
    assert_eq!(part("weight"), [600, 300, 300]);
    assert_eq!(part("name")[..2], ["eu-west", "us-east"]);
    assert_eq!(upstreams[1]["key"]["env"], "AZURE_API_KEY_US");
    assert_eq!(policy["limits"][0]["requests"], 1200);
    assert_eq!(policy["limits"][1]["tokens"], 240_000);
    assert_eq!(policy["pools"]["gpt-4o"]["breaker"], serde_json::json!({"failures": 4, "open_ms": 30_000}));
    assert_eq!(policy["pools"]["gpt-4o"]["timeouts"]["answer_ms"], 30_000);
    assert_eq!(policy["shared"]["redis"]["env"], "STORE_URL");
    assert_eq!(policy["authenticators"][0]["keys"]["pepper"]["env"], "INFERGATE_PEPPER");
    assert_eq!(policy["prices"]["list"][0]["models"][0], "gpt-4o-eu");
    has(&findings, "changed model_list[2].litellm_params.api_base", "AZURE_API_BASE_CA");
    has(&findings, "changed general_settings.master_key", "infergate key create");
    // An address that is nowhere is said, and its entry left out.
    let (policy, findings) = imported("02", &[]);
    assert_eq!(value(&policy)["pools"]["gpt-4o"]["upstreams"].as_array().unwrap().len(), 2);
    has(&findings, "not supported model_list[2].litellm_params.api_base", "AZURE_API_BASE_CA");
}

#[test]
fn fallbacks_stand_behind_their_models_for_their_causes_and_never_cross_dialects() {
    let (policy, findings) = imported("03", &[]);
    let policy = value(&policy);
    let small = &policy["models"][0];
    assert_eq!(small["fallbacks"][0]["pool"], "large");
    assert_eq!(small["fallbacks"][0]["rename"], "Qwen/Qwen3-235B");
    assert_eq!(
        small["fallbacks"][0]["on"],
        serde_json::json!(["connect", "reset", "timeout", "5xx", "429", "unavailable", "context_length"])
    );
    assert_eq!(small["fallbacks"][1], serde_json::json!({"pool": "cloud", "rename": "gpt-4.1-mini"}));
    assert_eq!(policy["models"][2]["fallbacks"][0]["on"], serde_json::json!(["content_filter"]));
    assert_eq!(policy["models"][3].get("fallbacks"), None, "Claude falls back on nothing that speaks OpenAI");
    assert_eq!(policy["pools"]["small"]["timeouts"], serde_json::json!({"answer_ms": 20_000, "first_token_ms": 5_000}));
    assert_eq!(policy["pools"]["small"]["retry"]["attempts"], 6);
    has(&findings, "not supported litellm_settings.fallbacks[1].large", "not translated");
    has(&findings, "not supported litellm_settings.fallbacks[2].ghost", "no model is named ghost");
}

#[test]
fn orders_are_pools_behind_each_other() {
    let (policy, _) = imported("09", &[]);
    let policy = value(&policy);
    let assistant = &policy["models"][0];
    assert_eq!(assistant["pool"], "assistant");
    let behind: Vec<&Value> = assistant["fallbacks"].as_array().unwrap().iter().map(|one| &one["pool"]).collect();
    assert_eq!(behind, ["assistant-2", "assistant-3"]);
    let weights: Vec<&Value> =
        policy["pools"]["assistant"]["upstreams"].as_array().unwrap().iter().map(|one| &one["weight"]).collect();
    assert_eq!(weights, [1000, 500]);
    assert_eq!(policy["pools"]["assistant"]["timeouts"]["answer_ms"], 600_000, "by way of an anchor");
    assert_eq!(policy["pools"]["spread"]["concurrency"]["max"], 40);
}

#[test]
fn prices_are_those_of_the_file_or_those_that_ship() {
    let (policy, findings) = imported("08", &[]);
    let policy = value(&policy);
    let of = |model: &str| {
        policy["prices"]["list"].as_array().unwrap().iter().find(|price| price["models"][0] == model).unwrap().clone()
    };
    assert_eq!((of("own-7b")["input"].clone(), of("own-7b")["output"].clone()), (0.15.into(), 0.6.into()));
    assert_eq!(of("own-7b")["pool"], "own");
    assert_eq!(of("gpt-4.1")["cached_input"], 0.5);
    assert_eq!(of("gpt-4o-mini")["output"], 0.6);
    assert_eq!(of("llama3.1")["input"], 0);
    let limit =
        |name: &str| policy["limits"].as_array().unwrap().iter().find(|one| one["name"] == name).unwrap().clone();
    assert_eq!(
        (limit("budget of own")["usd"].clone(), limit("budget of own")["per"].clone()),
        (20.into(), "day".into())
    );
    assert_eq!(limit("budget of openai")["models"], serde_json::json!(["cached", "book"]));
    has(&findings, "not supported router_settings.provider_budget_config.bedrock", "no model is this vendor's");
    has(&findings, "not supported model_list[4].litellm_params.input_cost_per_second", "no price");
}

#[test]
fn guardrails_that_need_nobody_else_are_rules_and_the_others_are_told() {
    let (policy, findings) = imported("07", &[]);
    let policy = value(&policy);
    let rules = policy["guardrails"].as_array().unwrap();
    let rule =
        |name: &str| rules.iter().find(|rule| rule["name"] == name).unwrap_or_else(|| panic!("{name}: {rules:#?}"));
    assert_eq!(rule("personal")["pii"]["find"], serde_json::json!(["email", "phone"]));
    assert_eq!(
        (&rule("personal-block")["verdict"], &rule("personal-block")["pii"]["countries"][0]),
        (&"block".into(), &"us".into())
    );
    assert_eq!(
        rule("house-rules-words")["in"],
        serde_json::json!(["prompt.system", "prompt.user", "prompt.tool", "answer.content"])
    );
    assert_eq!(rule("house-rules-patterns")["regex"]["window"], 1024);
    assert_eq!(
        (&rule("on-request")["mode"], &rule("on-request")["in"]),
        (&"monitor".into(), &serde_json::json!(["answer.content"]))
    );
    assert_eq!(rule("injection")["verdict"], "block");
    assert!(rules.iter().all(|rule| rule["name"] != "cloud-judge" && rule["name"] != "lookbehind-patterns"));
    has(&findings, "not supported guardrails[3]", "left out");
    has(&findings, "not supported guardrails[5]", "lakera_v2 asks another service");
    has(&findings, "not supported guardrails[0].litellm_params.pii_entities_config", "PERSON cannot be found");
}

#[test]
fn what_speaks_another_dialect_is_left_out_and_said() {
    let (policy, findings) = imported("10", &[]);
    let names: Vec<String> = value(&policy)["models"]
        .as_array()
        .unwrap()
        .iter()
        .map(|model| model["name"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(names, ["tgi", "only-this"]);
    for (index, word) in
        [(0, "signed"), (1, "/v1"), (2, "tokens"), (3, "dialect"), (5, "whose"), (6, "api_base"), (7, "no address")]
    {
        has(&findings, &format!("not supported model_list[{index}].litellm_params"), word);
    }
    let upstream = value(&policy)["pools"]["only-this"]["upstreams"][0].clone();
    assert_eq!(upstream.get("key"), None, "what OPENAI_API_KEY holds is for OpenAI alone");
    has(&findings, "changed model_list[9].litellm_params.api_base", "no key is sent there");
    assert_eq!(
        (&upstream["url"], &upstream["headers"]["x-team"]),
        (&"https://llm.example.com/api".into(), &"search".into())
    );
}

#[test]
fn who_had_to_have_a_key_must_have_one_here() {
    for number in ["02", "05", "11", "13"] {
        let (policy, _) = imported(number, &SERVERS);
        assert!(value(&policy)["authenticators"].is_array(), "{number}\n{policy}");
    }
    let (policy, findings) = imported("01", &[]);
    assert!(value(&policy)["authenticators"].is_null());
    has(&findings, "changed model_list", "no `master_key`");
}

#[test]
fn what_is_no_such_file_is_refused_and_nothing_is_overwritten() {
    let directory = tempfile::tempdir().unwrap();
    let there = directory.path().join("there.yaml");
    let deep = format!("model_list: {}{}", "[".repeat(20_000), "]".repeat(20_000));
    let bomb = "a: &a [x,x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b,*b]\nd: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d,*d,*d]\nmodel_list: [*e,*e,*e,*e,*e,*e,*e,*e,*e,*e]\n";
    let many = format!("model_list:\n{}", "  - {}\n".repeat(2_001));
    let large = "#".repeat((4 << 20) + 1);
    for text in ["", "[]", "models: []", "model_list: [", "a: 1\na: 2", &deep, bomb, &many, &large] {
        fs::write(&there, text).unwrap();
        let done = import(&there, &[], &[]);
        assert_eq!(done.status.code(), Some(1), "{}", &text[..text.len().min(80)]);
        assert!(done.stdout.is_empty());
        assert!(!String::from_utf8_lossy(&done.stderr).contains("panicked"));
    }
    let out = directory.path().join("policy.yaml");
    let arguments = ["--out", out.to_str().unwrap()];
    assert!(import(&fixture("01"), &[], &arguments).status.success());
    let first = fs::read_to_string(&out).unwrap();
    assert_eq!(import(&fixture("03"), &[], &arguments).status.code(), Some(1));
    assert_eq!(fs::read_to_string(&out).unwrap(), first);
}

/// A server that has these models.
async fn server(models: &[&str]) -> Simulated {
    let models = models.iter().map(|model| (*model).to_owned()).collect();
    Simulated::start(Options { models, ..Options::default() }).await.unwrap()
}

fn asks(model: &str) -> String {
    format!(r#"{{"model":"{model}","messages":[{{"role":"user","content":"Hello"}}],"max_tokens":4}}"#)
}

#[tokio::test]
async fn an_imported_policy_serves_its_models_aliases_fallbacks_and_wildcards() {
    let (house, vendor) = (model_server().await, server(&["gpt-9"]).await);
    let (first, second) = (format!("{}/v1", house.url()), vendor.url());
    let env = [("SERVER_1", first.as_str()), ("SERVER_2", second.as_str())];
    let (policy, _) = imported("12", &env);
    let gateway = Gateway::spawn(&policy, "threads: 2\n", &[], &[("VENDOR_KEY", "vendor-key")]);
    gateway.ready().await;
    let ask = async |model: &str| Client::h1().send(post(gateway.address, CHAT, &[], asks(model))).await;
    for model in ["house", "gpt-4o", "broken"] {
        let answer = ask(model).await;
        assert_eq!((answer.status, answer.header("x-infergate-model")), (200, "m"), "{model}: {}", answer.text());
        assert!(!answer.header("x-infergate-cost-usd").is_empty(), "{model}");
        assert!(answer.header("x-ratelimit-limit-requests") == "1000" || model == "broken");
    }
    let answer = ask("vendor/gpt-9").await;
    assert_eq!((answer.status, answer.header("x-infergate-model")), (200, "gpt-9"), "{}", answer.text());
    assert_eq!(ask("nobody").await.status, 404);
}

#[tokio::test]
async fn an_imported_policy_with_a_master_key_lets_nobody_in_without_a_key() {
    let house = model_server().await;
    let (policy, _) = imported("13", &[("SERVER_1", house.url().as_str())]);
    let pepper = "0123456789abcdef0123456789abcdef";
    let gateway = Gateway::spawn(&policy, "threads: 2\n", &[], &[("INFERGATE_PEPPER", pepper)]);
    gateway.ready().await;
    for key in [None, Some("Bearer sk-canary-master")] {
        let headers: Vec<(&str, &str)> = key.map(|key| ("authorization", key)).into_iter().collect();
        let answer = Client::h1().send(post(gateway.address, CHAT, &headers, asks("m"))).await;
        assert_eq!(answer.status, 401, "{key:?}");
    }
    let path = gateway.policy_path().display().to_string();
    let made = Command::new(env!("CARGO_BIN_EXE_infergate"))
        .args(["key", "create", "--policy", &path, "--tenant", "default", "--name", "ci", "--json"])
        .env("INFERGATE_PEPPER", pepper)
        .output()
        .unwrap();
    let made: Value = serde_json::from_slice(&made.stdout).unwrap();
    let entry = format!("list: [{}]", made["entry"]);
    assert_eq!(gateway.reload(&policy.replace("list: []", &entry)).await.status, 200);
    let key = format!("Bearer {}", made["key"].as_str().unwrap());
    let answer = Client::h1().send(post(gateway.address, CHAT, &[("authorization", &key)], asks("m"))).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
}

/// Every place in a document where something stands.
fn spots(value: &Value, path: &str, spots: &mut Vec<String>) {
    spots.push(path.to_owned());
    let escaped = |key: &str| key.replace('~', "~0").replace('/', "~1");
    for (key, value) in value.as_object().into_iter().flatten() {
        self::spots(value, &format!("{path}/{}", escaped(key)), spots);
    }
    for (index, value) in value.as_array().into_iter().flatten().enumerate() {
        self::spots(value, &format!("{path}/{index}"), spots);
    }
}

#[test]
fn whatever_stands_in_the_file_the_policy_is_good_or_the_file_is_refused() {
    let long = "x".repeat(3000);
    let deep = (0..40).fold(Value::from(1), |value, _| serde_json::json!([value]));
    let odd = serde_json::json!([
        null, true, 0, -1, 1, 0.5, 1e308, 18_446_744_073_709_551_615_u64, "", " ", "*", "a*b*c", "on", "é\u{0}\n", long, deep, [], {}, [{}],
        "os.environ/", "os.environ/A B", "os.environ/SERVER_1", "http://", "https://u:p@h", "http://h:99999", "unix:/run/x", "openai/",
        "openai/*", "/x", "azure/a/b/c", "1e9", "-5", "30d", "1mo", "9999999999999s", {"a": {"b": ["c"]}}, {"model": "x"}, "Retry-After", "host",
        "BLOCK", "MASK", "(", "a{99999}", "[^x]*"
    ]);
    let odd = odd.as_array().unwrap();
    let env = |name: &str| (name == "SERVER_1").then(|| "http://127.0.0.1:8001".to_owned());
    let mut chance = fastrand::Rng::with_seed(7);
    let (mut good, mut refused) = (0, 0);
    for path in fixtures() {
        let document = Document::parse(&fs::read_to_string(&path).unwrap()).unwrap().value;
        let mut places = Vec::new();
        spots(&document, "", &mut places);
        for _ in 0..80 {
            let mut changed = document.clone();
            for _ in 0..chance.usize(1..4) {
                let place = &places[chance.usize(..places.len())];
                let value = odd[chance.usize(..odd.len())].clone();
                if let Some(spot) = changed.pointer_mut(place) {
                    *spot = value;
                }
            }
            match infergate::import::litellm(&changed.to_string(), &env) {
                Ok(imported) => {
                    let told = imported.findings.iter().map(|finding| finding.problem.to_string()).collect::<String>();
                    assert!(!told.contains("canary") && !imported.policy.contains("canary"), "{changed}");
                    good += 1;
                }
                Err(problem) => {
                    assert!(!problem.message.contains("our mistake"), "{problem}\n{changed}");
                    refused += 1;
                }
            }
        }
    }
    assert!(good > 1000, "{good} good, {refused} refused");
}
