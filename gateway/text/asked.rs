//! The schemas that a request brings along: of the answer that it wants, and of the tools that it offers.

use std::ops::Range;

use infergate_plugins::operation::Operation;
use serde::Deserialize;
use serde_json::value::RawValue;

use super::{Unreadable, read};

/// Where the schemas of a request stand.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Schemas {
    /// The schema of its answer.
    pub answer: Option<Schema>,
    /// Its tools, each by its name. None where it has no tools.
    pub tools: Option<Vec<(String, Option<Range<usize>>)>>,
}

/// The schema of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Schema {
    /// Any object.
    Object,
    /// What stands here.
    At(Range<usize>),
}

#[derive(Deserialize)]
struct Request<'a> {
    #[serde(borrow, default)]
    response_format: Option<Format<'a>>,
    /// The Responses API's.
    #[serde(borrow, default)]
    text: Option<Output<'a>>,
    #[serde(borrow, default)]
    tools: Option<Vec<Offer<'a>>>,
    /// What tools were called once.
    #[serde(borrow, default)]
    functions: Option<Vec<Offer<'a>>>,
}

#[derive(Deserialize)]
struct Output<'a> {
    #[serde(borrow, default)]
    format: Option<Format<'a>>,
}

#[derive(Deserialize)]
struct Format<'a> {
    #[serde(default, rename = "type")]
    kind: Option<String>,
    #[serde(borrow, default)]
    json_schema: Option<Named<'a>>,
    #[serde(borrow, default)]
    schema: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Named<'a> {
    #[serde(borrow, default)]
    schema: Option<&'a RawValue>,
}

/// A tool, in any dialect.
#[derive(Deserialize)]
struct Offer<'a> {
    #[serde(borrow, default)]
    function: Option<Box<Offer<'a>>>,
    #[serde(default)]
    name: Option<String>,
    #[serde(borrow, default)]
    parameters: Option<&'a RawValue>,
    #[serde(borrow, default)]
    input_schema: Option<&'a RawValue>,
}

/// The schemas of the request `body` to `operation`.
pub fn schemas(operation: Operation, body: &[u8]) -> Result<Schemas, Unreadable> {
    if !matches!(operation, Operation::Chat | Operation::Completions | Operation::Responses | Operation::Messages) {
        return Ok(Schemas::default());
    }
    let request: Request<'_> = read(body)?;
    let span = |value: &RawValue| {
        let from = value.get().as_ptr() as usize - body.as_ptr() as usize;
        from..from + value.get().len()
    };
    let format = request.response_format.or_else(|| request.text.and_then(|text| text.format));
    let answer = format.and_then(|format| match format.kind.as_deref() {
        Some("json_object") => Some(Schema::Object),
        Some("json_schema") => {
            let schema = format.json_schema.and_then(|named| named.schema).or(format.schema);
            Some(schema.map_or(Schema::Object, |schema| Schema::At(span(schema))))
        }
        _ => None,
    });
    let offered = |offer: Offer<'_>| {
        let offer = offer.function.map_or(offer_of(offer.name, offer.parameters, offer.input_schema), |inner| *inner);
        Some((offer.name?, offer.parameters.or(offer.input_schema).map(span)))
    };
    let any = request.tools.is_some() || request.functions.is_some();
    let offers = request.tools.into_iter().chain(request.functions).flatten();
    Ok(Schemas { answer, tools: any.then(|| offers.filter_map(offered).collect()) })
}

fn offer_of<'a>(
    name: Option<String>,
    parameters: Option<&'a RawValue>,
    input_schema: Option<&'a RawValue>,
) -> Offer<'a> {
    Offer { function: None, name, parameters, input_schema }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_dialects_schemas_are_found() {
        let told = |operation, document: &str| {
            let found = schemas(operation, document.as_bytes()).unwrap();
            let at = |span: Range<usize>| document[span].to_owned();
            let answer = found.answer.map(|schema| match schema {
                Schema::Object => "object".to_owned(),
                Schema::At(span) => at(span),
            });
            let tools = found
                .tools
                .map(|tools| tools.into_iter().map(|(name, schema)| (name, schema.map(at))).collect::<Vec<_>>());
            (answer, tools)
        };
        let some = |text: &str| Some(text.to_owned());
        let chat = r#"{"response_format":{"type":"json_schema","json_schema":{"name":"x","schema":{"a":1}}},"tools":[{"type":"function","function":{"name":"f","parameters":{"b":2}}},{"type":"custom","custom":{"name":"c"}}]}"#;
        let tools = |schema: Option<&str>| Some(vec![("f".to_owned(), schema.map(str::to_owned))]);
        assert_eq!(told(Operation::Chat, chat), (some(r#"{"a":1}"#), tools(Some(r#"{"b":2}"#))));
        let responses = r#"{"text":{"format":{"type":"json_schema","name":"x","schema":true}},"tools":[{"type":"function","name":"f","parameters":{"b":2}}]}"#;
        assert_eq!(told(Operation::Responses, responses), (some("true"), tools(Some(r#"{"b":2}"#))));
        let messages = r#"{"tools":[{"name":"f","input_schema":{"b":2}}]}"#;
        assert_eq!(told(Operation::Messages, messages), (None, tools(Some(r#"{"b":2}"#))));
        let object = r#"{"response_format":{"type":"json_object"},"functions":[{"name":"f"}]}"#;
        assert_eq!(told(Operation::Chat, object), (some("object"), tools(None)));
        assert_eq!(told(Operation::Chat, r#"{"response_format":{"type":"text"}}"#), (None, None));
    }
}
