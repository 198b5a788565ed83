//! Text: none is kept unless policy asks, and what is kept can be proven and removed without breaking the journal.

use serde_json::Value;

use crate::support::{Client, Gateway, Process, chat, journal::Journal, model_server, policy};

const CHAT: &str = "/v1/chat/completions";

/// A gateway with `capture` under `audit`, and the answers that it gave: plain and streamed on both protocols.
async fn asked(capture: &str) -> (Gateway, Vec<(String, String)>) {
    let server = model_server().await;
    let gateway = Gateway::start(&format!("{}audit: {{capture: {capture}}}\n", policy(&[&server.url()], ""))).await;
    let mut answers = Vec::new();
    for client in Client::both() {
        for stream in [false, true] {
            let answer = client.post(gateway.address, CHAT, chat(stream, 5).replace("Hello", "canary-prompt")).await;
            assert_eq!(answer.status, 200);
            answers.push((answer.header("x-request-id").to_owned(), answer.text()));
        }
    }
    (gateway, answers)
}

fn explained(journal: &Journal, id: &str) -> String {
    let directory = journal.0.to_str().unwrap().to_owned();
    let (_, out, err) = Process::run(&["explain", id, "--directory", &directory, "--text"]);
    out + &err
}

#[tokio::test]
async fn no_text_is_kept_unless_the_policy_asks() {
    for capture in ["{}", "{text: none}", "{text: full, share: 0}"] {
        let (gateway, answers) = asked(capture).await;
        let journal = Journal::settled(&gateway).await;
        assert!(!journal.0.join("captures").exists(), "{capture}");
        assert!(!String::from_utf8_lossy(&journal.everything()).contains("canary-prompt"), "{capture}");
        assert!(explained(&journal, &answers[0].0).contains("the policy did not ask"), "{capture}");
    }
}

#[tokio::test]
async fn what_is_captured_is_what_came_and_went_and_its_record_proves_it() {
    let (gateway, answers) = asked("{text: full}").await;
    let journal = Journal::settled(&gateway).await;
    for (id, answer) in &answers {
        let told = explained(&journal, id);
        assert!(told.contains("canary-prompt") && told.contains(answer), "{told}");
        assert_eq!(told.matches("as the record proves").count(), 2, "{told}");
        assert_eq!(journal.record(id)["capture"]["cut"], Value::Bool(false));
    }
    // In the journal itself there is nothing but its sum.
    let lines = journal.lines().iter().map(Value::to_string).collect::<String>();
    assert!(!lines.contains("canary-prompt"));
}

#[tokio::test]
async fn a_capture_that_was_changed_is_told_and_one_that_was_removed_breaks_nothing() {
    let (mut gateway, answers) = asked("{text: full, bytes_max: 60}").await;
    let journal = Journal::settled(&gateway).await;
    let id = &answers[0].0;
    assert_eq!(journal.record(id)["capture"]["cut"], Value::Bool(true));
    assert!(explained(&journal, id).contains("cut at the policy's bytes_max"));
    let runs = std::fs::read_dir(journal.0.join("captures")).unwrap();
    let file = runs.map(|run| run.unwrap().path().join("000001.jsonl")).next().unwrap();
    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, text.replacen("messages", "massages", 1)).unwrap();
    assert!(explained(&journal, id).contains("CHANGED"));
    std::fs::remove_dir_all(journal.0.join("captures")).unwrap();
    assert!(explained(&journal, id).contains("is gone"));
    gateway.signal("TERM");
    gateway.ended(std::time::Duration::from_secs(10)).await;
    journal.proved();
}
