//! Rules that ask another service: what it finds counts, what it does not say follows `on_error`, and nothing leaves before.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use serde_json::{Value, json};
use tokio::sync::Semaphore;

use super::{CHAT, delta, finish, guarded, record, said, streaming};
use crate::support::wire::{Framing, Heard, Step, Wire};
use crate::support::{Client, Gateway, chat, eventually, model_server};

const WITHIN: Duration = Duration::from_secs(10);
/// Bytes that an upstream says at once.
const PIECE: usize = 40;

fn answer(body: &Value) -> Vec<Step> {
    Framing::Length.answer("application/json", &Bytes::from(body.to_string()), 4096)
}

/// A service that answers what `says` makes of what it is asked.
async fn service(says: impl Fn(&Value) -> Value + Send + Sync + 'static) -> Wire {
    Wire::start(move |heard: &Heard| answer(&says(&serde_json::from_slice(&heard.body).unwrap()))).await
}

/// A webhook that finds `bad`, and says where.
async fn webhook() -> Wire {
    service(|asked| {
        let spans = asked["spans"].as_array().unwrap().iter().enumerate();
        let found = spans.filter_map(|(span, asked)| Some((span, asked["text"].as_str()?.find("bad")?)));
        let spans: Vec<Value> = found
            .map(|(span, start)| json!({"span": span, "start": start, "end": start + 3, "label": "bad"}))
            .collect();
        json!({"verdict": if spans.is_empty() { "allow" } else { "block" }, "spans": spans})
    })
    .await
}

fn rule(places: &str, verdict: &str, service: &str, more: &str) -> String {
    format!("  - {{name: ask, in: [{places}], verdict: {verdict}, remote: {{url: '{service}/v1', {more}}}}}")
}

fn whole(content: &str) -> Vec<Step> {
    answer(
        &json!({"choices": [{"message": {"content": content}}], "usage": {"prompt_tokens": 3, "completion_tokens": 5}}),
    )
}

#[tokio::test]
async fn each_shape_stops_what_it_finds_and_is_asked_once_about_the_same() {
    let server = model_server().await;
    let moderation = service(|asked| {
        let results = asked["input"].as_array().unwrap().iter();
        let score = |text: &Value| if text.as_str().unwrap().contains("bad") { 0.9 } else { 0.1 };
        json!({"results": results.map(|text| json!({"flagged": false, "category_scores": {"hate": score(text)}})).collect::<Vec<_>>()})
    });
    let judge = service(|asked| {
        let bad = asked["messages"][0]["content"].as_str().unwrap().contains("bad");
        json!({"choices": [{"message": {"content": if bad { "\n\nunsafe\nS3" } else { "\n\nsafe" }}}]})
    });
    for (wire, shape, label) in [
        (moderation.await, "shape: moderation, categories: {hate: 0.5}", "hate"),
        (judge.await, "shape: judge, model: guard", "S3"),
        (webhook().await, "shape: webhook", "bad"),
    ] {
        let gateway = Gateway::start(&guarded(&server.url(), &rule("prompt.user", "block", &wire.url(), shape))).await;
        for _ in 0..2 {
            let asked = chat(false, 2).replace("Hello", "Hello bad");
            let refused = Client::h1().post(gateway.address, CHAT, asked).await;
            assert_eq!((refused.status, refused.code().as_str()), (400, "content_filter"), "{shape}");
            assert_eq!(record(&gateway).await["guardrails"][0]["found"], json!({label: 1}));
        }
        let passed = Client::h2().post(gateway.address, CHAT, chat(true, 2)).await;
        assert_eq!(passed.status, 200, "{shape}");
        assert_eq!(record(&gateway).await["guardrails"][0]["outcome"], "passed");
        assert_eq!(wire.heard().len(), 2, "what it said of a text is kept");
    }
}

#[tokio::test]
async fn a_service_sees_what_other_rules_left_and_what_it_finds_is_redacted_with_that() {
    let (service, upstream) = (webhook().await, Wire::start(|_| whole("ok")).await);
    let mail = "  - {name: mail, in: [prompt.user], verdict: redact, redact: placeholder, pii: {find: [email]}}\n";
    let rules = mail.to_owned() + &rule("prompt.user", "redact", &service.url(), "shape: webhook");
    let gateway = Gateway::start(&guarded(&upstream.url(), &rules)).await;
    let asked = chat(false, 9).replace("Hello", "\\u00e9 ann@example.com is bad, bob@example.com");
    let got = Client::h1().post(gateway.address, CHAT, asked.clone()).await;
    assert_eq!((got.status, got.header("x-infergate-guardrails")), (200, "mail=redacted, ask=redacted"));
    assert!(!String::from_utf8_lossy(&service.heard()[0].body).contains("example.com"));
    let expected =
        asked.replace("ann@example.com", "<EMAIL_1>").replace("bob@example.com", "<EMAIL_2>").replace("bad", "[BAD]");
    assert_eq!(String::from_utf8_lossy(&upstream.heard()[0].body), expected, "every other byte as it came");
}

#[tokio::test]
async fn what_is_not_said_in_time_or_not_said_at_all_follows_on_error() {
    let server = model_server().await;
    let silent = || Wire::start(|_| vec![Step::UntilGone]);
    let broken = || Wire::saying("HTTP/1.1 500 No\r\ncontent-length: 0\r\n\r\n");
    let mumbling = || service(|_| json!({"verdict": "perhaps"}));
    for (wire, outcome) in [(silent().await, "timed_out"), (broken().await, "failed"), (mumbling().await, "failed")] {
        let rule = rule("prompt.user", "block", &wire.url(), "shape: webhook, deadline_ms: 200");
        let gateway = Gateway::start(&guarded(&server.url(), &rule)).await;
        let refused = Client::h1().post(gateway.address, CHAT, chat(false, 2)).await;
        assert_eq!((refused.status, refused.code().as_str()), (400, "content_unread"), "{outcome}");
        assert_eq!(record(&gateway).await["guardrails"][0]["outcome"], outcome);
        let lenient = rule.replace("verdict: block", "verdict: block, on_error: allow");
        let gateway = Gateway::start(&guarded(&server.url(), &lenient)).await;
        assert_eq!(Client::h1().post(gateway.address, CHAT, chat(false, 2)).await.status, 200);
        assert_eq!(record(&gateway).await["guardrails"][0]["outcome"], outcome);
    }
}

#[tokio::test]
async fn an_answer_is_judged_before_anything_of_it_leaves_streamed_or_not() {
    let service = webhook().await;
    for (content, passes) in [("all is well", true), ("all is bad", false)] {
        let upstream = Wire::start(move |heard| {
            if String::from_utf8_lossy(&heard.body).contains("\"stream\":false") {
                return whole(content);
            }
            let (one, other) = content.split_at(8);
            let body = Bytes::from(delta(one) + &delta(other) + &finish());
            Framing::Chunked.answer("text/event-stream", &body, 40)
        })
        .await;
        let rule = rule("answer.content", "block", &service.url(), "shape: webhook, stream: hold");
        let gateway = Gateway::start(&guarded(&upstream.url(), &rule)).await;
        for stream in [false, true] {
            for client in Client::both() {
                let got = client.post(gateway.address, CHAT, chat(stream, 9)).await;
                if passes {
                    assert_eq!(got.status, 200);
                    assert!(!stream || got.text() == delta(&content[..8]) + &delta(&content[8..]) + &finish());
                } else {
                    assert_eq!((got.status, got.code().as_str()), (400, "content_filter"), "stream: {stream}");
                    assert!(!got.text().contains("bad"));
                }
                let outcome = if passes { "passed" } else { "blocked" };
                assert_eq!(record(&gateway).await["guardrails"][0]["outcome"], outcome);
            }
        }
    }
}

#[tokio::test]
async fn a_flag_lets_a_held_stream_pass_as_it_came_and_tells() {
    let service = webhook().await;
    let body = delta("that is ") + &delta("bad") + &finish();
    let upstream = streaming(body.clone()).await;
    let rule = rule("answer.content", "flag", &service.url(), "shape: webhook, stream: hold");
    let gateway = Gateway::start(&guarded(&upstream.url(), &rule)).await;
    let got = Client::h1().post(gateway.address, CHAT, chat(true, 9)).await;
    assert_eq!((got.text(), got.header("x-infergate-guardrails")), (body, "ask=flagged"));
}

#[tokio::test]
async fn of_a_held_stream_too_a_service_sees_what_other_rules_leave() {
    let service = webhook().await;
    let body = delta("write to ann@exam") + &delta("ple.com, or not") + &finish();
    let upstream = streaming(body.clone()).await;
    let ask = rule("answer.content", "block", &service.url(), "shape: webhook, stream: hold");
    let mail = |verdict: &str| {
        format!("  - {{name: mail, in: [answer.content], verdict: {verdict}, pii: {{find: [email]}}}}\n{ask}")
    };
    let gateway = Gateway::start(&guarded(&upstream.url(), &mail("redact, redact: mask"))).await;
    let got = Client::h1().post(gateway.address, CHAT, chat(true, 9)).await;
    assert!(said(&got).starts_with("write to ") && !got.text().contains("example"), "{}", got.text());
    let heard = service.heard();
    let heard: Vec<_> = heard.iter().map(|heard| String::from_utf8_lossy(&heard.body)).collect();
    assert!(heard.len() == 1 && heard[0].contains("or not") && !heard[0].contains("ann@"), "{heard:?}");
    let rules = record(&gateway).await["guardrails"].clone();
    assert_eq!((&rules[0]["outcome"], &rules[0]["found"]), (&json!("redacted"), &json!({"email": 1})), "{rules}");
    // What does not pass here goes nowhere else.
    assert_eq!(gateway.reload(&guarded(&upstream.url(), &mail("block"))).await.status, 200);
    for client in Client::both() {
        let got = client.post(gateway.address, CHAT, chat(true, 9)).await;
        assert_eq!((got.status, got.code().as_str()), (400, "content_filter"), "nothing had left: {}", got.text());
        let rules = record(&gateway).await["guardrails"].clone();
        assert_eq!((&rules[0]["outcome"], &rules[0]["found"]), (&json!("blocked"), &json!({"email": 1})), "{rules}");
    }
    assert_eq!(service.heard().len(), 1);
}

#[tokio::test]
async fn whoever_waits_for_a_held_stream_gets_signs_of_life() {
    let body = delta("all is ") + &delta("well") + &finish();
    // Before the first event is whole, and behind it.
    for pieces in [1, delta("all is ").len().div_ceil(PIECE)] {
        let (may, events) = (Arc::new(Semaphore::new(0)), Bytes::from(body.clone()));
        let permits = may.clone();
        let upstream = Wire::start(move |_| {
            let mut steps = Framing::Chunked.answer("text/event-stream", &events, PIECE);
            steps.insert(1 + pieces, Step::Await(permits.clone()));
            steps
        })
        .await;
        let service = webhook().await;
        let ask = rule("answer.content", "block", &service.url(), "shape: webhook, stream: hold");
        let beats = "\nrequests: {heartbeat_ms: 50}";
        let gateway = Gateway::start(&guarded(&upstream.url(), &(ask + beats))).await;
        for client in Client::both() {
            let mut stream = client.open(gateway.address, CHAT, &[], chat(true, 9)).await.into_body();
            three_signs_of_life(&mut stream).await;
            may.add_permits(1);
            assert_eq!(without_signs(stream).await, body);
        }
    }
}

/// Three of them come, and nothing else.
async fn three_signs_of_life(stream: &mut Incoming) {
    for _ in 0..3 {
        let frame = tokio::time::timeout(WITHIN, stream.frame()).await.unwrap().unwrap().unwrap();
        let sign = frame.into_data().unwrap();
        assert!(sign.starts_with(b": keep-alive"), "nothing else yet: {sign:?}");
    }
}

/// What else comes.
async fn without_signs(stream: Incoming) -> String {
    let rest = stream.collect().await.unwrap().to_bytes();
    String::from_utf8_lossy(&rest).replace(": keep-alive\n\n", "")
}

/// A webhook that answers only once it may.
async fn patient(verdict: &'static str) -> (Wire, Arc<Semaphore>) {
    let permits = Arc::new(Semaphore::new(0));
    let may = permits.clone();
    let wire = Wire::start(move |_| {
        let mut steps = vec![Step::Await(may.clone())];
        steps.extend(answer(&json!({"verdict": verdict})));
        steps
    })
    .await;
    (wire, permits)
}

#[tokio::test]
async fn while_a_service_judges_a_prompt_or_a_held_answer_there_are_signs_of_life() {
    let body = delta("all is ") + &delta("well") + &finish();
    let upstream = streaming(body.clone()).await;
    for (place, how) in [("prompt.user", ""), ("prompt.user", ", beside: true"), ("answer.content", ", stream: hold")] {
        for (client, nth) in Client::both().into_iter().zip(1..) {
            let (service, may) = patient("allow").await;
            let ask = rule(place, "block", &service.url(), &format!("shape: webhook, deadline_ms: 20000{how}"));
            let beats = "\nrequests: {heartbeat_ms: 50}";
            let gateway = Gateway::start(&guarded(&upstream.url(), &(ask + beats))).await;
            let text = chat(true, 9).replace("Hello", &format!("Hello {nth}"));
            let mut stream = client.open(gateway.address, CHAT, &[], text).await.into_body();
            three_signs_of_life(&mut stream).await;
            assert_eq!(service.heard().len(), 1, "{place}{how}: it is the service that is waited for");
            may.add_permits(1);
            assert_eq!(without_signs(stream).await, body, "{place}{how}");
        }
    }
}

#[tokio::test]
async fn beside_the_upstream_is_asked_at_once_and_the_first_byte_waits_for_both() {
    let (service, may) = patient("allow").await;
    let body = delta("Hi") + &finish();
    let upstream = streaming(body.clone()).await;
    let rule = rule("prompt.user", "block", &service.url(), "shape: webhook, beside: true, deadline_ms: 20000");
    let gateway = Gateway::start(&guarded(&upstream.url(), &rule)).await;
    let address = gateway.address;
    let asking = tokio::spawn(async move { Client::h1().post(address, CHAT, chat(true, 9)).await });
    eventually("both are asked", WITHIN, || async { upstream.heard().len() + service.heard().len() == 2 }).await;
    tokio::time::timeout(Duration::from_millis(100), async {
        while !asking.is_finished() {
            tokio::task::yield_now().await
        }
    })
    .await
    .expect_err("nothing leaves before the verdict");
    may.add_permits(1);
    assert_eq!(asking.await.unwrap().text(), body);
    assert_eq!(record(&gateway).await["guardrails"][0]["outcome"], "passed");
}

#[tokio::test]
async fn beside_a_block_leaves_the_upstream_while_it_thinks() {
    let (service, may) = patient("block").await;
    let upstream = Wire::start(|_| vec![Step::UntilGone]).await;
    let rule = rule("prompt.user", "block", &service.url(), "shape: webhook, beside: true, deadline_ms: 20000");
    let gateway = Gateway::start(&guarded(&upstream.url(), &rule)).await;
    for (client, nth) in Client::both().into_iter().zip(1..) {
        let address = gateway.address;
        let text = chat(true, 9).replace("Hello", &format!("Hello {nth}"));
        let asking = tokio::spawn(async move { client.post(address, CHAT, text).await });
        eventually("the upstream is asked", WITHIN, || async { upstream.heard().len() == nth }).await;
        may.add_permits(1);
        let refused = asking.await.unwrap();
        assert_eq!((refused.status, refused.code().as_str()), (400, "content_filter"));
        eventually("the upstream is left", WITHIN, || async { upstream.gone() == nth }).await;
        let told = record(&gateway).await;
        assert_eq!((&told["outcome"], &told["attempts"][0]["result"]), (&json!("blocked"), &json!("cancelled")));
        assert_eq!(told["guardrails"][0]["outcome"], "blocked");
    }
}

#[tokio::test]
async fn beside_what_a_blocked_answer_cost_is_metered_and_nothing_of_it_leaves() {
    let (service, may) = patient("block").await;
    let upstream = Wire::start(|_| whole("the answer")).await;
    let rule = rule("prompt.user", "block", &service.url(), "shape: webhook, beside: true, deadline_ms: 20000");
    let gateway = Gateway::start(&guarded(&upstream.url(), &rule)).await;
    let address = gateway.address;
    let asking = tokio::spawn(async move { Client::h1().post(address, CHAT, chat(false, 9)).await });
    eventually("the upstream is asked", WITHIN, || async { upstream.heard().len() == 1 }).await;
    // Its answer is there long before this.
    tokio::time::sleep(Duration::from_millis(100)).await;
    may.add_permits(1);
    let refused = asking.await.unwrap();
    assert_eq!((refused.status, refused.code().as_str()), (400, "content_filter"));
    assert!(!refused.text().contains("the answer"));
    let told = record(&gateway).await;
    assert_eq!((&told["usage"]["input_tokens"], &told["usage"]["output_tokens"]), (&json!(3), &json!(5)));
}
