//! Shapes: an answer that must be JSON of a certain shape is, streamed or not, or the client gets nothing of it.

use bytes::Bytes;
use serde_json::{Value, json};

use super::{CHAT, delta, finish, guarded, record, said, streaming};
use crate::support::wire::{EVENTS, Framing, Step, Wire};
use crate::support::{Client, Gateway, chat, events};

const OURS: &str = "  - {name: shape, in: [answer.content], verdict: block, schema: {schema: {type: object, required: [n], properties: {n: {type: integer}}}}}";
const THEIRS: &str =
    "  - {name: shape, in: [answer.content, answer.tool_arguments], verdict: block, schema: {from_request: true}}";

/// A chat that wants an answer of this shape, and has one tool `f` with it.
fn asking(stream: bool, schema: &Value) -> String {
    let mut asked: Value = serde_json::from_str(&chat(stream, 9)).unwrap();
    asked["response_format"] = json!({"type": "json_schema", "json_schema": {"name": "x", "schema": schema}});
    asked["tools"] = json!([{"type": "function", "function": {"name": "f", "parameters": schema}}]);
    asked.to_string()
}

#[tokio::test]
async fn a_stream_of_the_right_shape_leaves_as_it_came_and_of_another_nothing_leaves_wherever_it_is_cut() {
    let right = delta(" {\"n\":") + &delta(" 7}") + &finish();
    let wrong = delta(" {\"n\":") + &delta(" \"7\"}") + &finish();
    for (body, passes) in [(right, true), (wrong, false)] {
        let wire = streaming(body.clone()).await;
        let gateway = Gateway::start(&guarded(&wire.url(), OURS)).await;
        for client in Client::both() {
            for cut in (1..body.len()).step_by(5) {
                let headers = [("x-cut", &*cut.to_string())];
                let answer = client.post_with(gateway.address, CHAT, &headers, chat(true, 9)).await;
                if passes {
                    assert_eq!(answer.text(), body, "cut at {cut}");
                } else {
                    assert_eq!(said(&answer), "", "cut at {cut}");
                    assert!(answer.text().contains("content_filter"), "{}", answer.text());
                }
            }
        }
        let told = record(&gateway).await;
        let outcome = if passes { "passed" } else { "blocked" };
        assert_eq!(told["guardrails"][0]["outcome"], outcome);
        assert_eq!(told["guardrails"][0]["found"].is_null(), passes);
    }
}

#[tokio::test]
async fn a_stream_that_can_no_longer_become_right_ends_at_once_and_its_upstream_is_left() {
    let wire = Wire::start(|_| {
        let chunk = Framing::Chunked.piece(delta("Sure! Here").as_bytes());
        vec![Step::Say([Framing::Chunked.head(EVENTS, 0), chunk].concat().into()), Step::UntilGone]
    })
    .await;
    let gateway = Gateway::start(&guarded(&wire.url(), OURS)).await;
    let answer = Client::h1().post(gateway.address, CHAT, chat(true, 9)).await;
    assert_eq!((said(&answer).as_str(), answer.whole), ("", true));
    assert_eq!(events(&answer.body).last().unwrap(), "[DONE]");
    assert_eq!(record(&gateway).await["guardrails"][0]["found"], json!({"not_json": 1}));
}

#[tokio::test]
async fn an_answer_in_one_piece_of_another_shape_is_refused() {
    for (content, status) in [("{\\\"n\\\":1}", 200), ("{\\\"n\\\":1.5}", 400), ("{\\\"n\\\":1}x", 400)] {
        let answer = format!("{{\"choices\":[{{\"message\":{{\"content\":\"{content}\"}}}}]}}");
        let wire =
            Wire::start(move |_| Framing::Length.answer("application/json", &Bytes::from(answer.clone()), 20)).await;
        let gateway = Gateway::start(&guarded(&wire.url(), OURS)).await;
        let got = Client::h1().post(gateway.address, CHAT, chat(false, 9)).await;
        assert_eq!(got.status, status, "{content}");
    }
}

#[tokio::test]
async fn the_requests_own_schema_holds_for_its_answer_and_its_tools_and_one_without_is_not_judged() {
    let schema = json!({"type": "object", "required": ["n"]});
    let call = |arguments: &str| {
        let function = |delta: Value| {
            format!("data: {}\n\n", json!({"id": "c-1", "choices": [{"index": 0, "delta": {"tool_calls": [delta]}}]}))
        };
        let (one, other) = arguments.split_at(4);
        function(json!({"index": 0, "id": "i", "function": {"name": "f", "arguments": ""}}))
            + &function(json!({"index": 0, "function": {"arguments": one}}))
            + &function(json!({"index": 0, "function": {"arguments": other}}))
            + &finish()
    };
    let cases = [
        (delta("{\"n\":\"a\\\"b\"}") + &finish(), true),
        (delta("{\"m\":1}") + &finish(), false),
        (call("{\"n\": \"a\\\"b\"}"), true),
        (call("{\"m\": 1}"), false),
        (call("{\"n\": 1}").replace("\"f\"", "\"g\""), false),
    ];
    for (body, passes) in cases {
        let wire = streaming(body.clone()).await;
        let gateway = Gateway::start(&guarded(&wire.url(), THEIRS)).await;
        let answer = Client::h1().post(gateway.address, CHAT, asking(true, &schema)).await;
        assert_eq!(answer.text() == body, passes, "{}", answer.text());
        assert_eq!(answer.text().contains("content_filter"), !passes);
        let unasked = Client::h1().post(gateway.address, CHAT, chat(true, 9)).await;
        assert_eq!(unasked.text(), body);
        assert_eq!(record(&gateway).await["guardrails"][0]["outcome"], "skipped");
    }
}

#[tokio::test]
async fn arguments_that_stand_as_json_are_held_against_their_tools_schema() {
    let said = |n: &str| format!("{{\"content\":[{{\"type\":\"tool_use\",\"name\":\"f\",\"input\":{{\"n\":{n}}}}}]}}");
    for (n, status) in [("1", 200), ("\"x\"", 400)] {
        let answer = said(n);
        let wire =
            Wire::start(move |_| Framing::Length.answer("application/json", &Bytes::from(answer.clone()), 99)).await;
        let gateway = Gateway::start(&guarded(&wire.url(), THEIRS)).await;
        let schema = json!({"properties": {"n": {"type": "integer"}}});
        let asked = json!({"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "Hi"}],
            "tools": [{"name": "f", "input_schema": schema}]});
        let got = Client::h1().post(gateway.address, "/v1/messages", asked.to_string()).await;
        assert_eq!(got.status, status, "{}", got.text());
    }
}

#[tokio::test]
async fn a_schema_that_nobody_can_judge_by_follows_on_error_before_any_upstream_is_asked() {
    let body = delta("anything") + &finish();
    let wire = streaming(body.clone()).await;
    let schema = json!({"if": true});
    let gateway = Gateway::start(&guarded(&wire.url(), THEIRS)).await;
    let refused = Client::h1().post(gateway.address, CHAT, asking(true, &schema)).await;
    assert_eq!((refused.status, refused.code().as_str(), wire.heard().len()), (400, "content_unread", 0));
    assert!(refused.text().contains("not supported"), "{}", refused.text());
    assert_eq!(record(&gateway).await["guardrails"][0]["outcome"], "failed");
    let lenient = THEIRS.replace("verdict: block", "verdict: block, on_error: allow");
    let gateway = Gateway::start(&guarded(&wire.url(), &lenient)).await;
    let allowed = Client::h1().post(gateway.address, CHAT, asking(true, &schema)).await;
    assert_eq!(allowed.text(), body);
    assert_eq!(record(&gateway).await["guardrails"][0]["outcome"], "failed");
}
