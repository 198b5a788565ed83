//! What a request of the Responses API leaves at the server that answers it. What cannot be read leaves all that it could.

use serde::Deserialize;
use serde_json::value::RawValue;

/// What it says of that.
#[derive(Deserialize)]
struct Said<'a> {
    #[serde(default)]
    store: Option<bool>,
    #[serde(default)]
    background: Option<bool>,
    #[serde(default, borrow)]
    conversation: Option<&'a RawValue>,
    #[serde(default, borrow)]
    tools: Option<&'a RawValue>,
}

/// A tool that the client calls itself, or one that the server would: maybe twice.
#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
enum Tool {
    Function,
    Custom,
    #[serde(other)]
    Servers,
}

/// Whether the answer is kept where it was made: by default it is.
pub fn keeps_answer(body: &[u8]) -> bool {
    serde_json::from_slice::<Said<'_>>(body).map_or(true, |said| said.store != Some(false))
}

/// Whether nothing at all is left: neither an answer, nor a turn of a conversation, nor what a tool of the server's did.
pub fn leaves_nothing(body: &[u8]) -> bool {
    serde_json::from_slice::<Said<'_>>(body).is_ok_and(|said| {
        said.store == Some(false)
            && said.background != Some(true)
            && said.conversation.is_none()
            && said.tools.is_none_or(are_the_clients)
    })
}

fn are_the_clients(tools: &RawValue) -> bool {
    let tools = serde_json::from_str::<Vec<Tool>>(tools.get());
    tools.is_ok_and(|tools| !tools.iter().any(|tool| matches!(tool, Tool::Servers)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_response_nothing_is_left_only_where_all_of_it_says_so() {
        for (body, leaves) in [
            (r#"{"store":false}"#, false),
            (
                r#"{"store":false,"tools":[{"type":"function","name":"f"},{"type":"custom"}],"conversation":null}"#,
                false,
            ),
            (r#"{}"#, true),
            (r#"{"store":null}"#, true),
            (r#"{"store":true}"#, true),
            (r#"{"store":false,"store":true}"#, true),
            (r#"{"input":{"store":false}}"#, true),
            (r#"{"store":false,"background":true}"#, true),
            (r#"{"store":false,"conversation":"c"}"#, true),
            (r#"{"store":false,"tools":[{"type":"code_interpreter"}]}"#, true),
            (r#"{"store":false,"tools":[{"name":"f"}]}"#, true),
            (r#"{"store":false"#, true),
        ] {
            assert_eq!(leaves_nothing(body.as_bytes()), !leaves, "{body}");
        }
    }

    #[test]
    fn a_response_is_kept_unless_it_is_not_to_be() {
        for (body, stored) in [("{}", true), (r#"{"store":true}"#, true), (r#"{"store":false}"#, false), ("no", true)] {
            assert_eq!(keeps_answer(body.as_bytes()), stored, "{body}");
        }
    }
}
