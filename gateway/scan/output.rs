//! How long an answer may be, as each endpoint's body says it, and the edits that say less.

use std::ops::Range;

use infergate_plugins::operation::Operation;

use super::{Edit, Fault, Field, Scan, json};

/// Where TGI says it, in `parameters`.
const MAX_NEW_TOKENS: &str = "max_new_tokens";

impl Scan {
    /// The most tokens that one choice of the answer may have, if the body bounds it. Where two fields do, the larger
    /// counts: servers differ in which one they obey. What is below zero bounds nothing.
    pub fn output_max(&self, operation: Operation, body: &[u8]) -> Result<Option<u64>, Fault> {
        let mut most = None;
        for (field, span) in self.bounds(operation, body) {
            most = most.max(number(body, &span).map_err(|must| Fault::Kind(field, must))?);
        }
        Ok(most)
    }

    /// How many answers are made.
    pub fn choices(&self, body: &[u8]) -> Result<u64, Fault> {
        let mut choices = 1;
        for field in [Field::N, Field::BestOf] {
            let Some(span) = self.span(field) else { continue };
            choices = choices.max(number(body, &span).map_err(|must| Fault::Kind(field, must))?.unwrap_or(1));
        }
        Ok(choices)
    }

    /// The edits after which no choice of the answer has more than `max` tokens. `newer`: a chat's server wants the
    /// newer spelling where the body has none.
    pub fn bound_output(&self, operation: Operation, body: &[u8], max: u64, newer: bool) -> Vec<Edit> {
        let bounds = self.bounds(operation, body);
        if bounds.is_empty() {
            return self.insert_bound(operation, body, max, newer).into_iter().collect();
        }
        let is_more = |span: &Range<usize>| !matches!(number(body, span), Ok(Some(asked)) if asked <= max);
        let more = bounds.into_iter().map(|(_, span)| span).filter(is_more);
        more.map(|span| Edit { span, text: max.to_string() }).collect()
    }

    fn bounds(&self, operation: Operation, body: &[u8]) -> Vec<(Field, Range<usize>)> {
        let fields: &[Field] = match operation {
            Operation::Chat | Operation::Completions => &[Field::MaxTokens, Field::MaxCompletionTokens],
            Operation::Messages => &[Field::MaxTokens],
            Operation::Responses => &[Field::MaxOutputTokens],
            Operation::Generate => return self.parameter(body).map(|span| (Field::Parameters, span)).collect(),
            _ => &[],
        };
        fields.iter().filter_map(|field| Some((*field, self.span(*field)?))).collect()
    }

    fn parameter(&self, body: &[u8]) -> impl Iterator<Item = Range<usize>> {
        let members = self.span(Field::Parameters).and_then(|span| json::members(body, span));
        let named = members.into_iter().flatten().filter(|(name, _)| name == MAX_NEW_TOKENS);
        named.map(|(_, span)| span)
    }

    fn insert_bound(&self, operation: Operation, body: &[u8], max: u64, newer: bool) -> Option<Edit> {
        let (object, text) = match operation {
            Operation::Chat if newer => (0..body.len(), format!("\"max_completion_tokens\":{max}")),
            Operation::Chat | Operation::Completions | Operation::Messages => {
                (0..body.len(), format!("\"max_tokens\":{max}"))
            }
            Operation::Responses => (0..body.len(), format!("\"max_output_tokens\":{max}")),
            Operation::Generate => {
                match self.span(Field::Parameters).filter(|span| body.get(span.start) == Some(&b'{')) {
                    Some(span) => (span, format!("\"{MAX_NEW_TOKENS}\":{max}")),
                    None => (0..body.len(), format!("\"parameters\":{{\"{MAX_NEW_TOKENS}\":{max}}}")),
                }
            }
            _ => return None,
        };
        first_member(body, object, text)
    }
}

/// The edit that puts a member at the head of the object that begins in `span`.
pub(super) fn first_member(body: &[u8], span: Range<usize>, member: String) -> Option<Edit> {
    let open = span.start + body.get(span)?.iter().position(|byte| *byte == b'{')? + 1;
    let next = body[open..].iter().find(|byte| !byte.is_ascii_whitespace());
    let comma = if next == Some(&b'}') { "" } else { "," };
    Some(Edit { span: open..open, text: format!("{member}{comma}") })
}

/// A whole number of the body's; nothing where it is null or below zero.
fn number(body: &[u8], span: &Range<usize>) -> Result<Option<u64>, &'static str> {
    let text = body.get(span.clone()).and_then(|text| std::str::from_utf8(text).ok()).unwrap_or_default();
    if text == "null" || (text.starts_with('-') && text[1..].bytes().all(|byte| byte.is_ascii_digit())) {
        return Ok(None);
    }
    text.parse().map(Some).map_err(|_| "a whole number")
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::super::splice;
    use super::*;

    fn bounded(operation: Operation, text: &'static str, newer: bool) -> String {
        let body = Bytes::from_static(text.as_bytes());
        let mut edits = json::scan(&body).unwrap().bound_output(operation, &body, 7, newer);
        String::from_utf8(splice(&body, &mut edits).to_vec()).unwrap()
    }

    #[test]
    fn an_answer_is_bounded_where_its_endpoint_says_it() {
        use Operation::{Chat, Completions, Embeddings, Generate, Messages, Responses};
        let cases = [
            (Chat, r#"{ "max_tokens" : 9, "n":1}"#, r#"{ "max_tokens" : 7, "n":1}"#),
            (Chat, r#"{"max_tokens":6}"#, r#"{"max_tokens":6}"#),
            (Chat, r#"{"max_tokens":null,"max_completion_tokens":8}"#, r#"{"max_tokens":7,"max_completion_tokens":7}"#),
            (Chat, r#"{"max_tokens":-1}"#, r#"{"max_tokens":7}"#),
            (Chat, r#" { } "#, r#" {"max_tokens":7 } "#),
            (Completions, r#"{"n":1}"#, r#"{"max_tokens":7,"n":1}"#),
            (Messages, r#"{"max_tokens":70}"#, r#"{"max_tokens":7}"#),
            (Responses, r#"{"a":1}"#, r#"{"max_output_tokens":7,"a":1}"#),
            (Generate, r#"{"inputs":"x"}"#, r#"{"parameters":{"max_new_tokens":7},"inputs":"x"}"#),
            (Generate, r#"{"parameters":{"a":1}}"#, r#"{"parameters":{"max_new_tokens":7,"a":1}}"#),
            (Generate, r#"{"parameters":{"max_new_tokens":70}}"#, r#"{"parameters":{"max_new_tokens":7}}"#),
            (Embeddings, r#"{"input":"x"}"#, r#"{"input":"x"}"#),
        ];
        for (operation, came, goes) in cases {
            assert_eq!(bounded(operation, came, false), goes);
        }
        assert_eq!(bounded(Chat, "{\"n\":1}", true), "{\"max_completion_tokens\":7,\"n\":1}");
    }

    #[test]
    fn the_larger_of_two_bounds_counts_and_what_is_no_number_is_told() {
        let asked = |text: &str| json::scan(text.as_bytes()).unwrap().output_max(Operation::Chat, text.as_bytes());
        assert_eq!(asked(r#"{"max_tokens":5,"max_completion_tokens":9}"#), Ok(Some(9)));
        assert_eq!(asked(r#"{"max_tokens":null}"#), Ok(None));
        for wrong in [r#"{"max_tokens":"5"}"#, r#"{"max_tokens":1.5}"#, r#"{"max_tokens":1e3}"#] {
            assert!(asked(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn all_answers_that_are_made_count() {
        let choices = |text: &str| json::scan(text.as_bytes()).unwrap().choices(text.as_bytes());
        assert_eq!(choices("{}"), Ok(1));
        assert_eq!(choices(r#"{"n":2,"best_of":5}"#), Ok(5));
        assert!(choices(r#"{"n":"2"}"#).is_err());
    }
}
