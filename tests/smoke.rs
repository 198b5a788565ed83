//! The very first promise: a request goes in and the model server's answer comes out.

use crate::support::{Client, Gateway, chat, model_server, policy};

#[tokio::test]
async fn an_answer_reaches_the_client_on_both_protocols() {
    let server = model_server().await;
    let gateway = Gateway::start(&policy(&[&server.url()], "")).await;
    for client in Client::both() {
        let answer = client.post(gateway.address, "/v1/chat/completions", chat(false, 4)).await;
        assert_eq!((answer.status, answer.header("x-infergate-attempts")), (200, "1"));
        assert_eq!(answer.json()["usage"]["completion_tokens"], 4);
    }
}
