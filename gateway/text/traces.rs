//! What tells a text a second time, or tells that it is over: its tokens with their chances, the reason why it ends.
//! Where a text is edited the first must go, where it is cut the other.

use infergate_plugins::operation::Operation;
use serde_json::value::RawValue;

use super::closing;
use crate::scan::Edit;

/// Keys whose values have the words of an answer in other places, and what takes their place.
const fn tokens(operation: Operation) -> &'static [(&'static str, &'static str)] {
    match operation {
        Operation::Generate => &[("id", "0"), ("tokens", "[]"), ("top_tokens", "[]")],
        Operation::Responses => &[("logprobs", "[]")],
        _ => &[("logprobs", "null"), ("token_ids", "null")],
    }
}

/// Keys whose values say that an answer is at its end.
const fn ends(operation: Operation) -> &'static [(&'static str, &'static str)] {
    match operation {
        Operation::Generate => &[("generated_text", "null"), ("details", "null")],
        _ => &[("finish_reason", "null")],
    }
}

/// Takes the tokens of edited texts out of `document` too.
pub fn forget_tokens(operation: Operation, document: &[u8], edits: &mut Vec<Edit>) {
    if !edits.is_empty() {
        replace(document, tokens(operation), edits);
    }
}

/// Takes out of an event what says that its text is at its end.
pub fn forget_end(operation: Operation, event: &[u8], edits: &mut Vec<Edit>) {
    replace(event, ends(operation), edits);
}

/// Gives the keys other values, whatever edits there are within them.
fn replace(document: &[u8], keys: &[(&str, &str)], edits: &mut Vec<Edit>) {
    let mut at = 0;
    while let Some(open) = memchr::memchr(b'"', &document[at..]).map(|found| at + found) {
        let Some(close) = closing(document, open + 1) else { return };
        at = close + 1;
        let instead = keys.iter().find(|(key, _)| key.as_bytes() == &document[open + 1..close]);
        if let Some((_, instead)) = instead
            && let Some(span) = value(document, at)
        {
            at = span.end;
            edits.retain(|edit| edit.span.end <= span.start || edit.span.start >= span.end);
            edits.push(Edit { span, text: (*instead).to_owned() });
        }
    }
}

/// Where the value of the key stands that ends at `from`; none if it is no key.
fn value(document: &[u8], from: usize) -> Option<std::ops::Range<usize>> {
    let skip = |at: usize| Some(at + document.get(at..)?.iter().position(|byte| !byte.is_ascii_whitespace())?);
    let colon = skip(from)?;
    if document[colon] != b':' {
        return None;
    }
    let start = skip(colon + 1)?;
    let mut values = serde_json::Deserializer::from_slice(&document[start..]).into_iter::<&RawValue>();
    let value = values.next()?.ok()?;
    Some(start..start + value.get().len())
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::scan::splice;

    #[test]
    fn tokens_go_where_a_text_was_edited_and_nowhere_else() {
        let document = r#"{"choices":[{"text":"a \"logprobs\": 1","logprobs" : {"tokens":["a"]},"token_ids":[1]}]}"#;
        let mut edits = Vec::new();
        forget_tokens(Operation::Completions, document.as_bytes(), &mut edits);
        assert_eq!(edits, []);
        edits.push(Edit { span: 21..22, text: "b".to_owned() });
        forget_tokens(Operation::Completions, document.as_bytes(), &mut edits);
        let out = splice(&Bytes::from(document), &mut edits);
        let expected = r#"{"choices":[{"text":"b \"logprobs\": 1","logprobs" : null,"token_ids":null}]}"#;
        assert_eq!(String::from_utf8_lossy(&out), expected);
    }

    #[test]
    fn an_end_goes_with_the_edits_that_are_in_it() {
        let event = "data:{\"token\":{\"text\":\"a\"},\"generated_text\":\"xyz\",\"details\":{\"finish_reason\":\"length\"}}\n\n";
        let within = event.find("xyz").unwrap();
        let mut edits = vec![Edit { span: within..within + 1, text: String::new() }];
        forget_end(Operation::Generate, event.as_bytes(), &mut edits);
        let out = splice(&Bytes::from(event), &mut edits);
        let expected = "data:{\"token\":{\"text\":\"a\"},\"generated_text\":null,\"details\":null}\n\n";
        assert_eq!(String::from_utf8_lossy(&out), expected);
    }

    #[test]
    fn what_is_no_json_is_left_alone() {
        for document in ["", "\"logprobs\"", "\"logprobs\":", "\"logprobs\": {", "\"logprobs", "\"logprobs\\"] {
            let mut edits = vec![Edit { span: 0..0, text: String::new() }];
            forget_tokens(Operation::Chat, document.as_bytes(), &mut edits);
            assert_eq!(edits.len(), 1, "{document}");
        }
    }
}
