//! Guardrails: what must not pass does not, streamed or not, wherever the bytes are cut; what is not touched leaves as
//! it came; and the record says who read what.

mod dialects;
mod shapes;

use bytes::Bytes;
use serde_json::{Value, json};

use crate::support::wire::{EVENTS, Framing, Wire, sha256};
use crate::support::{Answer, Client, Gateway, Journal, chat, events, model_server, policy};

const CHAT: &str = "/v1/chat/completions";
/// A card that is none: its digits are those of tests.
const CARD: &str = "4111 1111 1111 1111";

fn guarded(url: &str, rules: &str) -> String {
    format!("{}guardrails:\n{rules}\n", policy(&[url], ""))
}

const REDACTS: &str = "  - {name: cards, in: [answer.content, answer.tool_arguments], verdict: redact, redact: mask, pii: {find: [card]}}\n  - {name: words, in: [answer.content], verdict: redact, redact: drop, words: {list: [geheim\u{4e2d}]}}";
const BLOCKS: &str = "  - {name: cards, in: [answer.content, answer.reasoning, answer.tool_arguments], verdict: block, pii: {find: [card]}}";

/// One event of a chat with this much of the answer.
fn delta(content: &str) -> String {
    let delta = json!({"id": "c-1", "object": "chat.completion.chunk", "created": 1, "model": "m",
        "choices": [{"index": 0, "delta": {"content": content}, "finish_reason": null}]});
    format!("data: {delta}\n\n")
}

fn finish() -> String {
    "data: {\"id\":\"c-1\",\"choices\":[{\"index\":0,\"delta\":{},\"finish_reason\":\"stop\"}]}\n\ndata: [DONE]\n\n"
        .to_owned()
}

/// A model server that streams `body`, cut in two where `x-cut` says.
async fn streaming(body: String) -> Wire {
    Wire::streaming(move |_| body.clone()).await
}

/// What a chat's stream says altogether.
fn said(answer: &Answer) -> String {
    let texts = events(&answer.body).into_iter().filter_map(|data| serde_json::from_str::<Value>(&data).ok());
    texts.filter_map(|event| event["choices"][0]["delta"]["content"].as_str().map(str::to_owned)).collect()
}

async fn record(gateway: &Gateway) -> Value {
    Journal::settled(gateway).await.of_kind("request").pop().unwrap()
}

#[tokio::test]
async fn a_prompt_that_does_not_pass_reaches_no_upstream_and_the_record_says_who_read_it() {
    let server = model_server().await;
    let rules = "  - {name: no-cards, in: [prompt.user], verdict: block, pii: {find: [card]}}\n  - {name: greets, in: [prompt.user], verdict: flag, words: {list: [hello]}}";
    let gateway = Gateway::start(&guarded(&server.url(), rules)).await;
    for client in Client::both() {
        let refused =
            client.post(gateway.address, CHAT, chat(false, 2).replace("Hello", &format!("Hello {CARD}"))).await;
        assert_eq!((refused.status, refused.code().as_str()), (400, "content_filter"));
        assert_eq!(refused.header("x-should-retry"), "false");
        assert!(refused.text().contains("no-cards") && !refused.text().contains("4111"), "{}", refused.text());
        let passed = client.post(gateway.address, CHAT, chat(false, 2)).await;
        assert_eq!((passed.status, passed.header("x-infergate-guardrails")), (200, "greets=flagged"));
    }
    let records = Journal::settled(&gateway).await.of_kind("request");
    assert_eq!((&records[0]["outcome"], &records[0]["attempts"]), (&json!("blocked"), &json!([])));
    let of = |record: &Value, rule: &str| {
        record["guardrails"].as_array().unwrap().iter().find(|entry| entry["rule"] == rule).unwrap().clone()
    };
    assert_eq!(of(&records[0], "no-cards")["outcome"], "blocked");
    assert_eq!(of(&records[0], "no-cards")["found"], json!({"card": 1}));
    assert_eq!(of(&records[1], "no-cards")["outcome"], "passed");
    assert_eq!(of(&records[1], "greets")["outcome"], "flagged");
    assert!(!records[0].to_string().contains("4111"));
    gateway.comes_to("infergate_guardrail_verdicts_total{rule=\"no-cards\",outcome=\"blocked\"}", 2.0).await;
}

#[tokio::test]
async fn what_the_client_gets_is_the_same_wherever_the_upstreams_bytes_are_cut() {
    let pieces =
        ["Pay ", "4111 ", "1111 111", "1 1111", " or ge", "heim\u{4e2d}", " \\\"4111\u{1F600} ", "4111 1111", " 11"];
    let body: String = pieces.iter().map(|piece| delta(piece)).collect::<String>() + &finish();
    let wire = streaming(body.clone()).await;
    let gateway = Gateway::start(&guarded(&wire.url(), REDACTS)).await;
    let whole = Client::h1().post(gateway.address, CHAT, chat(true, 9)).await;
    assert!(
        said(&whole).starts_with("Pay ") && said(&whole).ends_with(" \\\"4111\u{1F600} 4111 1111 11"),
        "{}",
        said(&whole)
    );
    assert!(!said(&whole).contains(CARD) && !said(&whole).contains("geheim"), "{}", said(&whole));
    for client in Client::both() {
        for cut in 1..body.len() {
            let headers = [("x-cut", cut.to_string())];
            let headers: Vec<_> = headers.iter().map(|(name, value)| (*name, value.as_str())).collect();
            let answer = client.post_with(gateway.address, CHAT, &headers, chat(true, 9)).await;
            assert_eq!(answer.text(), whole.text(), "cut at {cut}");
        }
    }
}

#[tokio::test]
async fn a_text_is_judged_as_one_however_the_model_cuts_it_into_tokens() {
    let text = format!("My card is {CARD}, thanks \u{4e2d}\u{1F600}.");
    let whole = {
        let wire = streaming(delta(&text) + &finish()).await;
        let gateway = Gateway::start(&guarded(&wire.url(), REDACTS)).await;
        said(&Client::h1().post(gateway.address, CHAT, chat(true, 9)).await)
    };
    let ends: Vec<usize> = text.char_indices().map(|(at, _)| at).skip(1).collect();
    let wire = Wire::start({
        let text = text.clone();
        move |heard| {
            let mut cuts: Vec<usize> = heard.header("x-cuts").split(',').filter_map(|cut| cut.parse().ok()).collect();
            cuts.insert(0, 0);
            cuts.push(text.len());
            let body: String =
                cuts.windows(2).map(|pair| delta(&text[pair[0]..pair[1]])).collect::<String>() + &finish();
            Framing::Chunked.answer(EVENTS, &Bytes::from(body), 4096)
        }
    })
    .await;
    let gateway = Gateway::start(&guarded(&wire.url(), REDACTS)).await;
    for first in &ends {
        for second in ends.iter().filter(|second| *second > first) {
            let cuts = format!("{first},{second}");
            let answer = Client::h1().post_with(gateway.address, CHAT, &[("x-cuts", &cuts)], chat(true, 9)).await;
            assert_eq!(said(&answer), whole, "cut at {cuts}");
        }
    }
    let every: Vec<String> = ends.iter().map(ToString::to_string).collect();
    let answer = Client::h1().post_with(gateway.address, CHAT, &[("x-cuts", &every.join(","))], chat(true, 9)).await;
    assert_eq!(said(&answer), whole, "a letter an event");
}

#[tokio::test]
async fn nothing_of_what_is_blocked_leaves_and_the_stream_ends_as_its_protocol_ends_filtered_ones() {
    let body = delta("Here it is: ") + &delta("41") + &delta("11 1111 1111") + &delta(" 1111 and more") + &finish();
    let wire = streaming(body.clone()).await;
    let gateway = Gateway::start(&guarded(&wire.url(), BLOCKS)).await;
    for client in Client::both() {
        for cut in (0..body.len()).step_by(7) {
            let answer = client.post_with(gateway.address, CHAT, &[("x-cut", &cut.to_string())], chat(true, 9)).await;
            assert_eq!((answer.status, answer.whole), (200, true));
            assert_eq!(said(&answer), "Here it is: ", "cut at {cut}");
            let told = events(&answer.body);
            let last: Value = serde_json::from_str(&told[told.len() - 2]).unwrap();
            assert_eq!(last["choices"][0]["finish_reason"], "content_filter");
            assert_eq!(told.last().unwrap(), "[DONE]");
        }
    }
    let record = record(&gateway).await;
    assert_eq!((&record["outcome"], &record["code"]), (&json!("blocked"), &json!("content_filter")));
    let answer = format!("{{\"choices\":[{{\"message\":{{\"content\":\"{CARD}\"}}}}]}}");
    let wire = Wire::start(move |_| Framing::Length.answer("application/json", &Bytes::from(answer.clone()), 20)).await;
    let gateway = Gateway::start(&guarded(&wire.url(), BLOCKS)).await;
    let refused = Client::h1().post(gateway.address, CHAT, chat(false, 9)).await;
    assert_eq!((refused.status, refused.code().as_str()), (400, "content_filter"));
    assert!(!refused.text().contains("4111"));
}

#[tokio::test]
async fn arguments_of_tools_are_judged_decoded_and_stay_json() {
    let arguments = |part: &str| {
        let delta = json!({"id": "c-1", "choices": [{"index": 0, "delta": {"tool_calls": [{"index": 0, "function": {"arguments": part}}]}}]});
        format!("data: {delta}\n\n")
    };
    let body =
        arguments("{\"card\": \"4111") + &arguments(" 1111\\u0020") + &arguments("1111 1111\", \"n\": 1}") + &finish();
    let wire = streaming(body).await;
    let gateway = Gateway::start(&guarded(&wire.url(), REDACTS)).await;
    let answer = Client::h1().post(gateway.address, CHAT, chat(true, 9)).await;
    let told = events(&answer.body).into_iter().filter_map(|data| serde_json::from_str::<Value>(&data).ok());
    let parts = |event: Value| {
        event["choices"][0]["delta"]["tool_calls"][0]["function"]["arguments"].as_str().map(str::to_owned)
    };
    let joined: String = told.filter_map(parts).collect();
    let parsed: Value = serde_json::from_str(&joined).unwrap();
    assert_eq!(parsed["n"], 1);
    assert!(!parsed["card"].as_str().unwrap().contains("1111 1111"), "{joined}");
}

#[tokio::test]
async fn an_answer_in_one_piece_is_edited_where_something_was_found_and_nowhere_else() {
    let answer = format!(
        "{{ \"choices\" : [{{\"message\":{{\"content\":\"a {CARD} \\u4e2d\",\"x\":1.0}}}}],\"usage\":{{\"prompt_tokens\":1,\"completion_tokens\":2}}}}"
    );
    let wire = {
        let answer = answer.clone();
        Wire::start(move |_| Framing::Length.answer("application/json", &Bytes::from(answer.clone()), 20)).await
    };
    let gateway = Gateway::start(&guarded(&wire.url(), REDACTS)).await;
    let got = Client::h1().post(gateway.address, CHAT, chat(false, 9)).await;
    let (before, behind) = answer.split_once(CARD).unwrap();
    assert!(got.text().starts_with(before) && got.text().ends_with(behind), "{}", got.text());
    assert!(!got.text().contains("4111 1111"));
    assert_eq!(got.header("content-length"), got.body.len().to_string());
    assert_eq!(record(&gateway).await["usage"]["output_tokens"], 2);
}

#[tokio::test]
async fn a_rule_that_only_watches_changes_not_one_byte() {
    let body = delta("My card: ") + &delta("4111 1111") + &delta(" 1111 1111") + &finish();
    let wire = streaming(body.clone()).await;
    let rules =
        "  - {name: cards, in: [prompt.user, answer.content], verdict: redact, mode: monitor, pii: {find: [card]}}";
    let gateway = Gateway::start(&guarded(&wire.url(), rules)).await;
    let asked = chat(true, 9).replace("Hello", CARD);
    let answer = Client::h1().post(gateway.address, CHAT, asked.clone()).await;
    assert_eq!(answer.text(), body);
    assert_eq!(wire.heard()[0].sha256, sha256(asked.as_bytes()));
    let record = record(&gateway).await;
    let outcomes: Vec<&Value> =
        record["guardrails"].as_array().unwrap().iter().map(|entry| &entry["outcome"]).collect();
    assert_eq!(outcomes, ["flagged", "flagged"]);
}

#[tokio::test]
async fn originals_come_back_in_the_answer_and_the_model_never_sees_them() {
    let wire = Wire::start(|heard| {
        let asked: Value = serde_json::from_slice(&heard.body).unwrap();
        let content = asked["messages"][0]["content"].as_str().unwrap().to_owned();
        let text = format!("You wrote: {content}");
        let body: String = text.chars().map(|c| delta(&c.to_string())).collect::<String>() + &finish();
        Framing::Chunked.answer(EVENTS, &Bytes::from(body), 100)
    })
    .await;
    let rules = "  - {name: mail, in: [prompt.user], verdict: redact, redact: placeholder, pii: {find: [email]}}";
    let gateway = Gateway::start(&guarded(&wire.url(), rules)).await;
    for client in Client::both() {
        let asked = chat(true, 9).replace("Hello", "ann@example.com and bob@example.com and ann@example.com");
        let answer = client.post(gateway.address, CHAT, asked).await;
        assert_eq!(said(&answer), "You wrote: ann@example.com and bob@example.com and ann@example.com");
        let heard = String::from_utf8_lossy(&wire.heard().last().unwrap().body).into_owned();
        assert!(!heard.contains("@example.com"), "{heard}");
    }
    assert!(!record(&gateway).await.to_string().contains("@example.com"));
}

#[tokio::test]
async fn what_cannot_be_read_follows_on_error() {
    for (stream, answer) in [(true, "data: {broken\n\n".to_owned() + &finish()), (false, "no json".to_owned())] {
        let kind = if stream { EVENTS } else { "application/json" };
        let wire = {
            let answer = answer.clone();
            Wire::start(move |_| Framing::Length.answer(kind, &Bytes::from(answer.clone()), 1000)).await
        };
        let gateway = Gateway::start(&guarded(&wire.url(), BLOCKS)).await;
        let denied = Client::h1().post(gateway.address, CHAT, chat(stream, 9)).await;
        assert!(!denied.text().contains("broken") && !denied.text().contains("no json"), "{}", denied.text());
        let told = record(&gateway).await;
        assert_eq!((&told["outcome"], &told["guardrails"][0]["outcome"]), (&json!("blocked"), &json!("failed")));
        let lenient = BLOCKS.replace("verdict: block", "verdict: block, on_error: allow");
        let gateway = Gateway::start(&guarded(&wire.url(), &lenient)).await;
        let allowed = Client::h1().post(gateway.address, CHAT, chat(stream, 9)).await;
        assert_eq!(allowed.text(), answer);
        assert_eq!(record(&gateway).await["guardrails"][0]["outcome"], "failed");
    }
    let server = model_server().await;
    let rules = "  - {name: cards, in: [prompt.user], verdict: block, pii: {find: [card]}}";
    let gateway = Gateway::start(&guarded(&server.url(), rules)).await;
    let twice = r#"{"model":"m","messages":[{"role":"user","content":"a","content":"4111 1111 1111 1111"}]}"#;
    let refused = Client::h1().post(gateway.address, CHAT, twice).await;
    assert_eq!((refused.status, refused.code().as_str()), (400, "content_unread"));
}

#[tokio::test]
async fn what_is_captured_redacted_has_nothing_of_what_was_found_on_either_side() {
    let wire = Wire::start(|heard| {
        let asked: Value = serde_json::from_slice(&heard.body).unwrap();
        let content = asked["messages"][0]["content"].as_str().unwrap().to_owned();
        if !asked["stream"].as_bool().unwrap() {
            let answer = json!({"choices": [{"message": {"content": format!("{content} {CARD}")}}]}).to_string();
            return Framing::Length.answer("application/json", &Bytes::from(answer), 40);
        }
        let body = delta(&content) + &delta(" 4111 1111") + &delta(" 1111 1111") + &finish();
        Framing::Chunked.answer(EVENTS, &Bytes::from(body), 30)
    })
    .await;
    let rules = "  - {name: mail, in: [prompt.user], verdict: redact, redact: placeholder, pii: {find: [email]}}\n  - {name: stop, in: [prompt.user], verdict: block, words: {list: [forbidden]}}\n  - {name: cards, in: [answer.content], verdict: redact, pii: {find: [card]}}\naudit: {capture: {text: redacted}}";
    let gateway = Gateway::start(&guarded(&wire.url(), rules)).await;
    for stream in [true, false] {
        let asked = chat(stream, 9).replace("Hello", "I am ann@example.com");
        let answer = Client::h1().post(gateway.address, CHAT, asked).await;
        assert!(answer.text().contains("ann@example.com"), "the client has its own: {}", answer.text());
    }
    ask_blocked(&gateway).await;
    let journal = Journal::settled(&gateway).await;
    let kept = captured(&journal);
    assert_eq!(kept.matches("I am <EMAIL_1>").count(), 4, "two prompts, two answers: {kept}");
    for secret in ["ann@example.com", "4111", "forbidden"] {
        assert!(!kept.contains(secret), "{secret}: {kept}");
    }
}

/// Everything that is captured beside the journal.
fn captured(journal: &Journal) -> String {
    let runs = std::fs::read_dir(journal.0.join("captures")).unwrap();
    let files = runs.flat_map(|run| std::fs::read_dir(run.unwrap().path()).unwrap());
    files.map(|file| std::fs::read_to_string(file.unwrap().path()).unwrap()).collect()
}

async fn ask_blocked(gateway: &Gateway) {
    let refused = Client::h1().post(gateway.address, CHAT, chat(false, 9).replace("Hello", "forbidden")).await;
    assert_eq!(refused.code(), "content_filter");
}
