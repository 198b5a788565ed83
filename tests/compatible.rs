//! What applications of another gateway count on is there where the policy says so, and nowhere else.

use crate::support::http::post;
use crate::support::{Answer, Client, Gateway, chat, model_server, policy};

const CHAT: &str = "/v1/chat/completions";
const PATHS: [&str; 3] = ["/health/liveliness", "/health/liveness", "/health/readiness"];

fn headers(answer: &Answer) -> Vec<&str> {
    answer.headers.keys().map(|name| name.as_str()).filter(|name| name.starts_with("x-litellm-")).collect()
}

async fn asked(extra: &str) -> (Gateway, Answer) {
    let server = model_server().await;
    let prices = "prices: {list: [{models: [m], input: 1, output: 4}]}\n";
    let policy = format!("{prices}{}", policy(&["http://127.0.0.1:9", &server.url()], "health: {enabled: false}"));
    let gateway = Gateway::start(&format!("{policy}{extra}")).await;
    let mut answer = Client::h1().send(post(gateway.address, CHAT, &[], chat(false, 4))).await;
    // One of the two does not listen: it may or may not have been tried first.
    for _ in 0..20 {
        if answer.header("x-infergate-attempts") == "2" {
            break;
        }
        answer = Client::h1().send(post(gateway.address, CHAT, &[], chat(false, 4))).await;
    }
    assert_eq!(answer.status, 200, "{}", answer.text());
    (gateway, answer)
}

#[tokio::test]
async fn without_a_word_in_the_policy_nothing_of_it_is_there() {
    let (gateway, answer) = asked("").await;
    assert_eq!(headers(&answer), Vec::<&str>::new());
    for path in PATHS {
        let answer = Client::h1().get(gateway.address, path).await;
        assert_eq!((answer.status, headers(&answer).len()), (404, 0), "{path}");
    }
}

#[tokio::test]
async fn with_it_answers_say_in_the_others_words_what_our_own_say() {
    let (gateway, answer) = asked("requests: {compatible_with: litellm}\n").await;
    assert_eq!(answer.header("x-litellm-call-id"), answer.header("x-request-id"));
    assert_eq!(answer.header("x-litellm-response-cost"), answer.header("x-infergate-cost-usd"));
    assert!(!answer.header("x-litellm-response-cost").is_empty());
    assert_eq!(answer.header("x-litellm-model-id"), answer.header("x-infergate-upstream"));
    assert_eq!(answer.header("x-litellm-model-group"), "m");
    assert_eq!(answer.header("x-litellm-attempted-fallbacks"), "0");
    let attempts: u32 = answer.header("x-infergate-attempts").parse().unwrap();
    assert_eq!(answer.header("x-litellm-attempted-retries"), (attempts - 1).to_string());
    let times = ["x-litellm-overhead-duration-ms", "x-litellm-response-duration-ms"];
    let [overhead, whole] = times.map(|name| answer.header(name).parse::<f64>().unwrap());
    assert!(overhead >= 0.0 && overhead <= whole, "{overhead} of {whole}");
    for path in PATHS {
        let answer = Client::h1().get(gateway.address, path).await;
        assert_eq!(answer.status, 200, "{path}");
    }
    assert_eq!(Client::h1().get(gateway.address, PATHS[0]).await.text(), "\"I'm alive!\"");
    assert_eq!(Client::h1().get(gateway.address, PATHS[2]).await.json()["status"], "healthy");
    // A refusal has an id too.
    let refused = Client::h1().send(post(gateway.address, CHAT, &[], chat(false, 4).replace("\"m\"", "\"x\""))).await;
    assert_eq!(refused.status, 404);
    assert_eq!(headers(&refused), ["x-litellm-call-id"]);
}

#[tokio::test]
async fn an_upstream_that_is_not_to_be_named_is_not_named_so_either() {
    let (_gateway, answer) = asked("requests: {compatible_with: litellm, name_upstream: false}\n").await;
    assert_eq!(answer.header("x-litellm-model-id"), "");
}

#[tokio::test]
async fn going_down_it_is_alive_and_not_ready() {
    let server = model_server().await;
    let policy = format!("{}requests: {{compatible_with: litellm}}\n", policy(&[&server.url()], ""));
    let gateway = Gateway::with(&policy, "threads: 2\nshutdown: {drain_delay_ms: 20000}\n", &[]).await;
    gateway.signal("TERM");
    let not_ready = async || Client::h1().get(gateway.address, PATHS[2]).await.status == 503;
    crate::support::eventually("not ready", std::time::Duration::from_secs(5), not_ready).await;
    assert_eq!(Client::h1().get(gateway.address, PATHS[0]).await.status, 200);
}
