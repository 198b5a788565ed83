//! Models weighed against each other: what the policy weighs decides, what a model cannot do and where a tenant's requests
//! may not go is never outvoted, a conversation changes its model only where that pays, and the record has all of it.

use std::time::Duration;

use serde_json::{Value, json};

use crate::support::keys::{asks_for, key, start};
use crate::support::wire::sha256;
use crate::support::{Client, Gateway, Journal, Options, Simulated, eventually};

const CHAT: &str = "/v1/chat/completions";
const MESSAGES: &str = "/v1/messages";
const RESPONSES: &str = "/v1/responses";
/// Slack for a loaded machine.
const SOON: Duration = Duration::from_secs(60);

async fn server() -> Simulated {
    let models = ["small", "big"].map(str::to_owned).to_vec();
    Simulated::start(Options { models, max_model_len: 1 << 20, ..Options::default() }).await.unwrap()
}

/// What a test changes of the policy.
struct Lists<'a> {
    small: &'a str,
    big: &'a str,
    weigh: &'a str,
    /// Of `small` and of `big`.
    quality: (f32, f32),
    /// More of each model's entry, and of each one's pool.
    models: (&'a str, &'a str),
    pools: (&'a str, &'a str),
    /// More of the virtual model, four spaces deep.
    auto: &'a str,
    more: &'a str,
}

impl<'a> Lists<'a> {
    fn of(small: &'a str, big: &'a str, weigh: &'a str) -> Self {
        let none = ("", "");
        Self { small, big, weigh, quality: (0.5, 0.8), models: none, pools: none, auto: "", more: "" }
    }

    /// `big` costs sixteen times as much as `small`: four doublings.
    fn policy(&self) -> String {
        let Self { small, big, weigh, quality, models, pools, auto, more } = self;
        format!(
            "version: 1
models:
  - {{name: small, pool: one{}}}
  - {{name: big, pool: two{}}}
pools:
  one: {{upstreams: [{{url: '{small}'}}]{}}}
  two: {{upstreams: [{{url: '{big}'}}]{}}}
prices:
  list:
    - {{models: [small], input: 100, cached_input: 10, output: 100}}
    - {{models: [big], input: 1600, cached_input: 160, output: 1600}}
routers:
  auto:
    default: best
    shortlists:
      best:
        weigh: {weigh}
        models: [{{model: small, quality: {}}}, {{model: big, quality: {}}}]
{auto}
{more}
",
            models.0, models.1, pools.0, pools.1, quality.0, quality.1
        )
    }
}

fn asks(text: &str, more: &str) -> String {
    format!(r#"{{"model":"auto","messages":[{{"role":"user","content":"{text}"}}],"max_tokens":3{more}}}"#)
}

async fn route(gateway: &Gateway, body: String) -> String {
    let answer = Client::h1().post(gateway.address, CHAT, body).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.header("x-infergate-route").to_owned()
}

async fn last_record(gateway: &Gateway) -> Value {
    Journal::settled(gateway).await.of_kind("request").pop().unwrap()
}

#[tokio::test]
async fn the_best_by_the_policys_weights_answers_and_the_record_has_every_candidate_and_term() {
    let server = server().await;
    let url = server.url();
    let even = Lists::of(&url, &url, "{quality: 1, price: 1}");
    let gateway = Gateway::start(&even.policy()).await;
    // 0.5 and 1 against 0.8 and a half: four doublings.
    assert_eq!(route(&gateway, asks("Hello", "")).await, "auto=small");
    let record = last_record(&gateway).await;
    assert_eq!(record["model"], json!({"asked": "auto", "route": "small", "used": "small"}));
    let (small, big) = (&record["candidates"][0], &record["candidates"][1]);
    assert_eq!((&small["model"], &big["model"]), (&json!("small"), &json!("big")));
    let terms =
        |one: &Value| [&one["quality_permille"], &one["price_permille"], &one["score_permille"]].map(Value::as_u64);
    assert_eq!(terms(small), [Some(500), Some(1000), Some(750)], "{record}");
    assert_eq!(terms(big), [Some(800), Some(500), Some(650)], "{record}");
    assert_eq!(big["cost_nanousd"].as_u64(), small["cost_nanousd"].as_u64().map(|cost| cost * 16), "{record}");
    assert!(big["first_token_permille"].is_null() && big["load_permille"].is_null(), "not weighed, not measured");
    let decision = &record["decisions"].as_array().unwrap()[1];
    assert_eq!((&decision["rule"], &decision["verdict"]), (&json!("default"), &json!("small")));
    assert_eq!(decision["why"], "best: 0.750 is the best of 2, margin 0.100");
    gateway.reload(&Lists { weigh: "{quality: 2, price: 1}", ..even }.policy()).await;
    assert_eq!(route(&gateway, asks("Hello there", "")).await, "auto=big");
    assert_eq!(last_record(&gateway).await["candidates"][1]["score_permille"], 700);
}

#[tokio::test]
async fn any_decision_may_name_a_shortlist_and_nothing_but_the_models_name_changes() {
    let server = server().await;
    let url = server.url();
    let auto = "    ask: [{signals: {name: code, model: best, code: true}}]\n";
    let lists = Lists { auto, ..Lists::of(&url, &url, "{quality: 1}") };
    let gateway = Gateway::start(&lists.policy().replace("default: best", "default: small")).await;
    assert_eq!(route(&gateway, asks("Hello", "")).await, "auto=small");
    let sent = asks("write a python function", r#", "x_own" : 1.50"#);
    assert_eq!(route(&gateway, sent.clone()).await, "auto=big");
    let seen = server.seen().into_iter().rfind(|seen| seen.method == "POST").unwrap();
    assert_eq!(seen.body_sha256, sha256(sent.replace("auto", "big").as_bytes()));
    let why = last_record(&gateway).await["decisions"][1]["why"].as_str().unwrap().to_owned();
    assert!(why.starts_with("signals: score 1.000, margin 1.000; best: 0.800 is the best of 2"), "{why}");
}

#[tokio::test]
async fn what_a_model_cannot_do_no_weight_outvotes() {
    let server = server().await;
    let url = server.url();
    let lists = Lists {
        quality: (0.0, 1.0),
        models: ("", ", can: {images: false, tools: false, structured: false, context_tokens: 600}"),
        ..Lists::of(&url, &url, "{quality: 1000}")
    };
    let gateway = Gateway::start(&lists.policy()).await;
    assert_eq!(route(&gateway, asks("Hello", "")).await, "auto=big");
    let image = r#"[{"type":"text","text":"what is this"},{"type":"image_url","image_url" : {"url":"data:image/png;base64,AA=="}}]"#;
    let anthropic = r#"[{"type":"text","text":"a"},{"type": "image","source":{"type":"base64","media_type":"image/png","data":"AA=="}}]"#;
    let said = |content: &str| {
        format!(r#"{{"model":"auto","max_tokens":3,"messages":[{{"role":"user","content":{content}}}]}}"#)
    };
    let long = "lorem ipsum dolor ".repeat(200);
    for (path, body, out) in [
        (CHAT, said(image), "reads no images"),
        (MESSAGES, said(anthropic), "reads no images"),
        (CHAT, asks("a", r#","tools":[{"type":"function","function":{"name":"f"}}]"#), "calls no tools"),
        (CHAT, asks("a", r#","response_format":{"type":"json_object"}"#), "answers in no form"),
        (
            RESPONSES,
            r#"{"model":"auto","input":"a","text":{"format":{"type":"json_object"}}}"#.into(),
            "answers in no form",
        ),
        (CHAT, asks(&long, ""), "has room for 600 tokens of"),
        (CHAT, asks("a", "").replace("\"max_tokens\":3", "\"max_tokens\":600"), "has room for 600 tokens of"),
    ] {
        let answer = Client::h1().post(gateway.address, path, body).await;
        assert_eq!(
            (answer.status, answer.header("x-infergate-route")),
            (200, "auto=small"),
            "{out}: {}",
            answer.text()
        );
        let told = last_record(&gateway).await["candidates"][1].clone();
        assert!(told["out"].as_str().unwrap().starts_with(out) && told["score_permille"].is_null(), "{told}");
    }
}

#[tokio::test]
async fn where_no_model_can_answer_the_refusal_says_what_each_lacks_and_no_upstream_is_asked() {
    let server = server().await;
    let url = server.url();
    let models = (", can: {tools: false}", ", can: {context_tokens: 5}");
    let lists = Lists { models, ..Lists::of(&url, &url, "{quality: 1}") };
    let gateway = Gateway::start(&lists.policy()).await;
    let tools = asks("Hello", r#","tools":[{"type":"function","function":{"name":"f"}}]"#);
    let refused = Client::h1().post(gateway.address, CHAT, tools).await;
    assert_eq!((refused.status, refused.code().as_str()), (400, "invalid_body"), "{}", refused.text());
    let told = refused.text();
    assert!(told.contains("small calls no tools, big has room for 5 tokens of"), "{told}");
    assert!(!server.seen().iter().any(|seen| seen.method == "POST"));
}

#[tokio::test]
async fn a_tenants_requests_stay_in_its_regions_whatever_else_speaks_for_a_model() {
    let (here, there) = (server().await, server().await);
    let (bound, free) = (key("bound", ""), key("free", ""));
    let tenants = "{bound: {parent: top}, top: {regions: [eu, mars]}, free: {}}";
    let keys = asks_for(&[&bound, &free], tenants);
    let more =
        format!("{keys}limits: [{{name: few, models: [small], requests: 3, per: 1h, on_exhausted: {{use: big}}}}]\n");
    let (near, far) = (here.url(), there.url());
    let lists = Lists {
        quality: (0.0, 1.0),
        pools: (", region: eu", ", region: us"),
        auto: "    ask: [{signals: {name: code, model: big, code: true}}]\n",
        more: &more,
        ..Lists::of(&near, &far, "{quality: 1000}")
    };
    let text = lists.policy().replace("pool: one", "pool: one, fallbacks: [{pool: two}]");
    let text = format!("{text}passthrough: [{{path: /raw, pool: two}}]\n");
    let unknown = text.replace("[eu, mars]", "[eu, mats]").replace("region: us", "region: mats2");
    let gateway = start(
        &text.replace("region: us", "region: us}\n  three: {region: mars, upstreams: [{url: 'http://127.0.0.1:9'}]"),
        "",
    )
    .await;
    let told = gateway.reload(&unknown).await.text();
    assert!(told.contains("tenants.top.regions[1]: no pool has the region mats; did you mean mats2?"), "{told}");
    let post = |secret: &str, path: &'static str, body: String| {
        let bearer = format!("Bearer {secret}");
        async move { Client::h1().post_with(gateway.address, path, &[("authorization", &bearer)], body).await }
    };
    let free_one = post(&free.text, CHAT, asks("Hello", "")).await;
    assert_eq!(free_one.header("x-infergate-route"), "auto=big", "{}", free_one.text());
    let before = there.seen().iter().filter(|seen| seen.method == "POST").count();
    assert_eq!(post(&bound.text, CHAT, asks("Hello", "")).await.header("x-infergate-route"), "auto=small");
    let code = post(&bound.text, CHAT, asks("write a python function", "")).await;
    assert_eq!(code.header("x-infergate-route"), "auto=small", "{}", code.text());
    let record = last_record(&gateway).await;
    assert_eq!(record["candidates"][1]["out"], "is in no region that this key may use");
    let why = record["decisions"].to_string();
    assert!(
        why.contains("signals: big is in no region that this key may use"),
        "a decision for it is passed over: {why}"
    );
    let named = |model: &str| asks("Hello", "").replace("auto", model);
    let refused = post(&bound.text, CHAT, named("big")).await;
    assert_eq!((refused.status, refused.code().as_str()), (403, "model_not_allowed"), "by its own name too");
    assert_eq!(post(&bound.text, "/raw", "{}".into()).await.status, 403, "unread too");
    let request = http::Request::get(format!("http://{}/v1/models", gateway.address));
    let request = request.header("authorization", format!("Bearer {}", bound.text));
    let listed = Client::h1().send(request.body(Default::default()).unwrap()).await.text();
    assert!(listed.contains("small") && !listed.contains("\"big\""), "what is out of reach is not listed: {listed}");
    here.set_faults(vec!["status=503".parse().unwrap()]);
    let failed = post(&bound.text, CHAT, named("small")).await;
    assert_eq!(failed.status, 503, "no fallback leads out: {}", failed.text());
    here.set_faults(Vec::new());
    let spent = post(&bound.text, CHAT, named("small")).await;
    assert_eq!((spent.status, spent.code().as_str()), (429, "rate_limit_exceeded"), "nor does a limit");
    let after = there.seen().iter().filter(|seen| seen.method == "POST").count();
    assert_eq!(before, after, "nothing of it was sent there");
}

#[tokio::test]
async fn a_model_whose_pool_is_full_gives_way_until_there_is_room_again() {
    let (busy, idle) = (server().await, server().await);
    let (one, two) = (busy.url(), idle.url());
    let pools = (", concurrency: {max: 1}", "");
    let lists = Lists { quality: (0.9, 0.8), pools, ..Lists::of(&one, &two, "{quality: 1, load: 1}") };
    let gateway = Gateway::start(&lists.policy()).await;
    assert_eq!(route(&gateway, asks("Hello", "")).await, "auto=small");
    let running = tokio::spawn({
        let address = gateway.address;
        let body =
            asks("Hi", "").replace("auto", "small").replace("\"max_tokens\":3", "\"max_tokens\":3,\"stream\":true");
        async move { Client::h1().post_with(address, CHAT, &[("x-simulate-fault", "stall")], body).await }
    });
    eventually("the pool is full", SOON, async || busy.in_flight() == 1).await;
    assert_eq!(route(&gateway, asks("Hello", "")).await, "auto=big");
    let full = &last_record_now(&gateway).await["candidates"][0];
    assert_eq!((&full["load_permille"], &full["score_permille"]), (&json!(0), &json!(450)), "{full}");
    running.abort();
    eventually("there is room", SOON, async || busy.in_flight() == 0).await;
    eventually("it answers again", SOON, async || route(&gateway, asks("Hello", "")).await == "auto=small").await;
}

/// The newest record, while another request runs on.
async fn last_record_now(gateway: &Gateway) -> Value {
    let journal = Journal::of(gateway);
    let newest = || journal.of_kind("request").pop().filter(|record| record["model"]["route"] == "big");
    eventually("it is on record", SOON, async || newest().is_some()).await;
    newest().unwrap()
}

#[tokio::test]
async fn a_model_that_nobody_can_be_asked_for_gives_way() {
    let server = server().await;
    let url = server.url();
    let pools = (", health: {interval_ms: 50, unhealthy_after: 1}, retry: {attempts: 1}", "");
    let lists = Lists { quality: (1.0, 0.0), pools, ..Lists::of("http://127.0.0.1:9", &url, "{quality: 1}") };
    let gateway = Gateway::start(&lists.policy()).await;
    let chosen = || async {
        Client::h1().post(gateway.address, CHAT, asks("Hello", "")).await.header("x-infergate-route") == "auto=big"
    };
    eventually("it is known to be away", SOON, chosen).await;
    assert_eq!(last_record(&gateway).await["candidates"][0]["out"], "has nobody who can be asked now");
}

#[tokio::test]
async fn the_sooner_first_token_wins_once_it_has_been_seen() {
    let fast = server().await;
    let models = ["small", "big"].map(str::to_owned).to_vec();
    let options = Options { models, prefill_per_second: 2_000.0, ..Options::default() };
    let slow = Simulated::start(options).await.unwrap();
    let (one, two) = (slow.url(), fast.url());
    let measured = ", balance: expected_time";
    let lists = Lists { pools: (measured, measured), ..Lists::of(&one, &two, "{first_token: 1}") };
    let gateway = Gateway::start(&lists.policy()).await;
    let streamed = |model: &str, n: usize| {
        let text = format!("{n} {}", "lorem ipsum dolor ".repeat(200));
        asks(&text, r#","stream":true"#).replace("auto", model)
    };
    assert_eq!(route(&gateway, asks("Hello", "")).await, "auto=small", "nothing is known: the first of equals");
    for n in 0..8 {
        for model in ["small", "big"] {
            assert_eq!(Client::h1().post(gateway.address, CHAT, streamed(model, n)).await.status, 200);
        }
    }
    assert_eq!(route(&gateway, streamed("auto", 99)).await, "auto=big");
    let record = last_record(&gateway).await;
    let seconds = |at: usize| record["candidates"][at]["first_token_us"].as_u64().unwrap();
    assert!(seconds(0) > 2 * seconds(1), "{record}");
}

/// A conversation of so many turns.
fn turns(count: usize) -> String {
    let long = "we talk about the history of the town and all that lived there ".repeat(120);
    let said =
        (1..count).map(|n| format!(r#",{{"role":"assistant","content":"ok"}},{{"role":"user","content":"more {n}"}}"#));
    format!(
        r#"{{"model":"auto","max_tokens":3,"messages":[{{"role":"user","content":"{long}"}}{}]}}"#,
        said.collect::<String>()
    )
}

#[tokio::test]
async fn a_conversation_changes_its_model_only_where_the_gain_is_more_than_reading_it_again_costs() {
    let server = server().await;
    let url = server.url();
    for balance in ["p2c", "expected_time"] {
        let pool = format!(", balance: {balance}");
        let of = |quality, auto| {
            let lists =
                Lists { quality, auto, pools: (&pool, &pool), ..Lists::of(&url, &url, "{quality: 1, price: 1}") };
            lists
                .policy()
                .replace("input: 1600, cached_input: 160, output: 1600", "input: 100, cached_input: 10, output: 100")
        };
        let gateway = Gateway::start(&of((0.6, 0.5), "")).await;
        assert_eq!(route(&gateway, turns(1)).await, "auto=small", "{balance}");
        gateway.reload(&of((0.4, 0.5), "")).await;
        assert_eq!(route(&gateway, asks("Hello", "")).await, "auto=big", "a new one goes to the better model");
        assert_eq!(route(&gateway, turns(2)).await, "auto=small", "{balance}: the gain is a twentieth");
        let record = last_record(&gateway).await;
        let (small, big) = (&record["candidates"][0], &record["candidates"][1]);
        let loss = big["loss_permille"].as_u64().unwrap();
        assert!((100..250).contains(&loss) && small["loss_permille"].is_null(), "{record}");
        assert!(small["has_conversation"] == true && small["held_tokens"].as_u64().unwrap() > 1_000, "{record}");
        let why = record["decisions"][1]["why"].as_str().unwrap();
        assert!(why.contains("which has the conversation"), "{why}");
        gateway.reload(&of((0.4, 0.95), "")).await;
        assert_eq!(route(&gateway, turns(3)).await, "auto=big", "{balance}: the gain is more than a quarter");
        assert_eq!(route(&gateway, turns(4)).await, "auto=big", "and there it stays");
        gateway.reload(&of((0.96, 0.95), "    keep: never\n")).await;
        let expected = if balance == "p2c" { "auto=small" } else { "auto=big" };
        assert_eq!(route(&gateway, turns(5)).await, expected, "what an index knows of servers counts all the same");
    }
}

#[tokio::test]
async fn in_a_tool_loop_nothing_changes_whatever_the_gain() {
    let server = server().await;
    let url = server.url();
    let of = |quality| Lists { quality, ..Lists::of(&url, &url, "{quality: 1}") }.policy();
    let gateway = Gateway::start(&of((1.0, 0.0))).await;
    assert_eq!(route(&gateway, asks("Hello", "")).await, "auto=small");
    gateway.reload(&of((0.0, 1.0))).await;
    let looped = r#"{"model":"auto","max_tokens":3,"messages":[{"role":"user","content":"Hello"},{"role":"assistant","content":null,"tool_calls":[{"id":"c1","type":"function","function":{"name":"f","arguments":"{}"}}]},{"role":"tool","tool_call_id":"c1","content":"done"}]}"#;
    assert_eq!(route(&gateway, looped.to_owned()).await, "auto=small");
    assert_eq!(route(&gateway, asks("Hello", "")).await, "auto=big");
}

#[tokio::test]
async fn all_that_is_wrong_with_a_shortlist_is_told_at_its_line() {
    let server = server().await;
    let url = server.url();
    let good = Lists::of(&url, &url, "{quality: 1, price: 1}").policy();
    let gateway = Gateway::start(&good).await;
    for (from, to, told) in [
        (
            "{quality: 1, price: 1}",
            "{}",
            "policy.yaml:17:9: routers.auto.shortlists.best.weigh: must have numbers from 0 to 1000, and one",
        ),
        ("quality: 0.5", "quality: 2", "routers.auto.shortlists.best.models[0].quality: must be at most 1"),
        (
            "{model: big, quality",
            "{model: bog, quality",
            "routers.auto.shortlists.best.models[1].model: no model is named bog; did you mean big?",
        ),
        (
            "price: 1}",
            "first_token: 1}",
            "models[0]: first_token is weighed, and the balance p2c of the pool one measures none",
        ),
        ("models: [big]", "models: [bog]", "models[1]: price is weighed, and big has none at the pool two"),
        ("default: best", "default: small", "routers.auto: nothing decides"),
        ("best:", "small:", "routers.auto.shortlists.small: small is the name of a model already"),
        ("weigh: {", "weighs: {", "weighs"),
    ] {
        let refused = gateway.reload(&good.replace(from, to)).await;
        assert!(refused.status == 422 && refused.text().contains(told), "{to}: {}", refused.text());
    }
    assert_eq!(route(&gateway, asks("Hello", "")).await, "auto=small", "the last good one stays");
}

// How much models think.

const EFFORT: &str =
    "    ask: [{signals: {name: code, model: big, code: true}}, {signals: {name: maths, model: big, maths: true}}]
    effort: {code: {set: high}, maths: {default: low}, default: {strip: true}}
";

#[tokio::test]
async fn a_decision_sets_and_strips_what_requests_say_of_thinking_and_changes_no_other_byte() {
    let server = server().await;
    let url = server.url();
    let gateway = Gateway::start(&Lists { auto: EFFORT, ..Lists::of(&url, &url, "{quality: 1}") }.policy()).await;
    let sent = |path: &str, text: &str, more: &str| match path {
        RESPONSES => format!(r#"{{ "x":1.50, "model":"auto","input":"{text}","max_output_tokens":16{more}}}"#),
        _ => format!(
            r#"{{ "x":1.50, "model":"auto","messages":[{{"role":"user","content":"{text}"}}],"max_tokens":2000{more}}}"#
        ),
    };
    let (code, maths) = ("write a python function", "solve for x the equation");
    let first = |body: String, member: &str| body.replacen("{ ", &format!("{{{member}, "), 1);
    for (path, text, says, verdict, goes) in [
        (CHAT, code, r#","reasoning_effort" : "low""#, "high", sent(CHAT, code, r#","reasoning_effort" : "high""#)),
        (CHAT, code, "", "high", first(sent(CHAT, code, ""), r#""reasoning_effort":"high""#)),
        (CHAT, maths, "", "low", first(sent(CHAT, maths, ""), r#""reasoning_effort":"low""#)),
        (CHAT, maths, r#","reasoning_effort":"high""#, "leave", sent(CHAT, maths, r#","reasoning_effort":"high""#)),
        (CHAT, "Hello", r#", "reasoning_effort":"high","thinking":{"a":"}"}"#, "strip", sent(CHAT, "Hello", "")),
        (CHAT, "Hello", "", "strip", sent(CHAT, "Hello", "")),
        (
            RESPONSES,
            code,
            r#","reasoning":{"summary":"auto"}"#,
            "high",
            sent(RESPONSES, code, r#","reasoning":{"effort":"high","summary":"auto"}"#),
        ),
        (RESPONSES, "Hello", r#","reasoning":{"effort":"low"}"#, "strip", sent(RESPONSES, "Hello", "")),
        (
            MESSAGES,
            code,
            "",
            "high",
            first(sent(MESSAGES, code, ""), r#""thinking":{"type":"enabled","budget_tokens":1999}"#),
        ),
        (
            MESSAGES,
            "Hello",
            r#","thinking":{"type":"enabled","budget_tokens":1024}"#,
            "strip",
            sent(MESSAGES, "Hello", ""),
        ),
    ] {
        let answer = Client::h1().post(gateway.address, path, sent(path, text, says)).await;
        assert_eq!(answer.status, 200, "{path} {text}{says}: {}", answer.text());
        let seen = server.seen().into_iter().rfind(|seen| seen.method == "POST").unwrap();
        let goes = goes.replacen("\"auto\"", "\"big\"", 1);
        assert_eq!(String::from_utf8(seen.body.to_vec()).unwrap(), goes, "{path} {text}{says}");
        let record = last_record(&gateway).await;
        let decisions = record["decisions"].as_array().unwrap();
        let effort = decisions.iter().find(|decision| decision["stage"] == "effort").unwrap();
        assert_eq!(effort["verdict"], verdict, "{effort}");
    }
    let twice = sent(CHAT, code, r#","reasoning_effort":"low","reasoning_effort":"high""#);
    let refused = Client::h1().post(gateway.address, CHAT, twice).await;
    assert_eq!((refused.status, refused.code().as_str()), (400, "duplicate_field"));
    let embeds = Client::h1().post(gateway.address, "/v1/embeddings", r#"{"model":"auto","input":"Hello"}"#).await;
    assert_eq!(embeds.status, 200, "where nobody thinks there is nothing to say: {}", embeds.text());
}

#[tokio::test]
async fn a_decision_about_thinking_comes_before_a_tenants_default_and_a_tool_loop_keeps_it() {
    let server = server().await;
    let url = server.url();
    let theirs = key("theirs", "");
    let keys = asks_for(&[&theirs], "{theirs: {parameters: {defaults: {reasoning_effort: medium, seed: 7}}}}");
    let lists = Lists { auto: EFFORT, more: &keys, ..Lists::of(&url, &url, "{quality: 1}") };
    let gateway = start(&lists.policy(), "").await;
    let bearer = format!("Bearer {}", theirs.text);
    let sent = |body: String| {
        let (server, bearer, address) = (&server, &bearer, gateway.address);
        async move {
            let answer = Client::h1().post_with(address, CHAT, &[("authorization", bearer)], body).await;
            assert_eq!(answer.status, 200, "{}", answer.text());
            let seen = server.seen().into_iter().rfind(|seen| seen.method == "POST").unwrap();
            let body: Value = serde_json::from_slice(&seen.body).unwrap();
            (body["reasoning_effort"].clone(), body["seed"].clone())
        }
    };
    assert_eq!(sent(asks("write a python function", "")).await, (json!("high"), json!(7)));
    assert_eq!(sent(asks("Hello", "")).await, (Value::Null, json!(7)));
    assert_eq!(sent(asks("solve for x the equation", "")).await, (json!("medium"), json!(7)), "it says something");
    let looped = r#"{"model":"auto","max_tokens":3,"messages":[{"role":"user","content":"write a python function"},{"role":"assistant","content":null,"tool_calls":[{"id":"c1","type":"function","function":{"name":"f","arguments":"{}"}}]},{"role":"tool","tool_call_id":"c1","content":"done"}]}"#;
    assert_eq!(sent(looped.to_owned()).await, (json!("high"), json!(7)), "by the decision that is kept");
}

#[tokio::test]
async fn nobody_is_made_to_think_where_a_tenants_own_parameters_rule_that_out() {
    let server = server().await;
    let url = server.url();
    let (cool, brief) = (key("cool", ""), key("brief", ""));
    let tenants = "{cool: {parameters: {defaults: {temperature: 0.2}}}, brief: {output_tokens_max: 1500}}";
    let keys = asks_for(&[&cool, &brief], tenants);
    let gateway =
        start(&Lists { auto: EFFORT, more: &keys, ..Lists::of(&url, &url, "{quality: 1}") }.policy(), "").await;
    let body = asks("write a python function", r#","max_tokens":9000"#).replacen(r#","max_tokens":3"#, "", 1);
    for (key, thinking) in [(&cool, Value::Null), (&brief, json!({"type": "enabled", "budget_tokens": 1499}))] {
        let bearer = format!("Bearer {}", key.text);
        let answer =
            Client::h1().post_with(gateway.address, MESSAGES, &[("authorization", &bearer)], body.clone()).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        let seen = server.seen().into_iter().rfind(|seen| seen.method == "POST").unwrap();
        let sent: Value = serde_json::from_slice(&seen.body).unwrap();
        assert_eq!(sent["thinking"], thinking, "{sent}");
    }
}

#[tokio::test]
async fn effort_for_no_decision_is_told_at_its_line() {
    let server = server().await;
    let url = server.url();
    let good = Lists { auto: EFFORT, ..Lists::of(&url, &url, "{quality: 1}") }.policy();
    let gateway = Gateway::start(&good).await;
    for (from, to, told) in [
        ("effort: {code", "effort: {coed", "routers.auto.effort.coed: no decision is named coed; did you mean code?"),
        ("{set: high}", "{}", "routers.auto.effort.code: give exactly one of: set, default, strip: true"),
        ("{set: high}", "{set: highest}", "highest"),
    ] {
        let refused = gateway.reload(&good.replace(from, to)).await;
        assert!(refused.status == 422 && refused.text().contains(told), "{to}: {}", refused.text());
    }
}

// What is counted.

#[tokio::test]
async fn decisions_and_abstentions_are_counted_by_names_that_the_policy_bounds() {
    let server = server().await;
    let url = server.url();
    let gateway = Gateway::start(&Lists { auto: EFFORT, ..Lists::of(&url, &url, "{quality: 1}") }.policy()).await;
    for text in ["write a python function", "Hello", "Hello", "Bye"] {
        route(&gateway, asks(text, "")).await;
    }
    let page = gateway.admin("/metrics").await.text();
    for line in [
        r#"infergate_route_decisions_total{router="auto",route="code",gen_ai_request_model="big"} 1"#,
        r#"infergate_route_decisions_total{router="auto",route="default",gen_ai_request_model="big"} 3"#,
        r#"infergate_route_abstentions_total{router="auto",kind="signals",why="unmatched"} 6"#,
        r#"infergate_route_decision_seconds_count{router="auto"} 4"#,
    ] {
        assert!(page.contains(line), "{line} is not in {page}");
    }
    assert!(!page.contains("Hello"), "nothing of what is asked is a label");
}
