//! Schema: an answer that is to be JSON of a certain shape is JSON of that shape, or it does not pass.
//!
//! The shape is the policy's, or the one that the request itself asks its model for. An answer is judged at its end, and
//! held until then where the rule blocks; what can no longer become JSON is found with the byte that says so.

mod compile;
mod syntax;
mod validate;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::Value;

pub use self::compile::Schema;
use self::syntax::Syntax;
use super::stream::{Finder, Found, Scanner, Search, Window};
use super::{Config as RuleConfig, Detector, Guardrails, Place, World, Wrong};

/// An answer that is not JSON of a certain shape. Exactly one of `schema`, `file` and `from_request` must be given. It looks
/// at `answer.content`, each choice for itself, and at `answer.tool_arguments`, each call for itself. The keywords are
/// those of JSON Schema 2020-12 that say what one value may be: `type`, `enum`, `const`, `properties`,
/// `patternProperties`, `additionalProperties`, `required`, `minProperties`, `maxProperties`, `items`, `prefixItems`,
/// `minItems`, `maxItems`, `uniqueItems`, `minLength`, `maxLength`, `pattern`, `minimum`, `maximum`, `exclusiveMinimum`,
/// `exclusiveMaximum`, `multipleOf`, `allOf`, `anyOf`, `oneOf`, `not`, and `$ref` to a place in the same schema. `format`
/// says nothing here. Any other keyword is an error.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "SchemaRule")]
pub struct Config {
    /// The schema.
    #[serde(default)]
    pub schema: Option<Value>,
    /// A file with the schema, as JSON.
    #[serde(default)]
    pub file: Option<PathBuf>,
    /// The request's own schema: of contents `response_format.json_schema.schema` (in the Responses API
    /// `text.format.schema`), of a tool's arguments the tool's. A request without one is not judged. One that is too large,
    /// or has another keyword, cannot be judged (`on_error`).
    #[serde(default)]
    pub from_request: bool,
    /// The longest answer that is judged, in bytes. A longer one is found.
    #[serde(default = "bytes_max")]
    #[schemars(range(min = 16, max = 1_048_576))]
    pub bytes_max: u64,
}

fn bytes_max() -> u64 {
    64 << 10
}

/// A rule as it is built.
#[derive(Debug)]
pub(crate) struct Shape {
    schema: Option<Arc<Schema>>,
    bytes_max: u64,
}

pub(super) fn build(rule: &RuleConfig, config: &Config, world: &mut World<'_>) -> Result<Detector, Vec<Wrong>> {
    let mut wrong = misplaced(rule);
    if !(16..=1 << 20).contains(&config.bytes_max) {
        wrong.push((".bytes_max".to_owned(), "it must be 16 to 1048576".to_owned()));
    }
    let schema = match source(config, world) {
        Ok(schema) => schema,
        Err(fault) => {
            wrong.push(fault);
            None
        }
    };
    if wrong.is_empty() { Ok(Detector::Shape(Shape { schema, bytes_max: config.bytes_max })) } else { Err(wrong) }
}

/// Only what a model writes for a program has a shape.
fn misplaced(rule: &RuleConfig) -> Vec<Wrong> {
    let shaped = |place: &Place| matches!(place, Place::AnswerContent | Place::AnswerToolArguments);
    let others = rule.places.iter().filter(|place| !shaped(place));
    others
        .map(|place| {
            let message = format!("{} has no shape: give answer.content or answer.tool_arguments", place.name());
            (String::new(), message)
        })
        .collect()
}

/// The policy's schema; none where the request's is meant.
fn source(config: &Config, world: &mut World<'_>) -> Result<Option<Arc<Schema>>, Wrong> {
    match (&config.schema, &config.file, config.from_request) {
        (Some(schema), None, false) => {
            let compiled = Schema::compile(schema).map_err(|(path, message)| (format!(".schema{path}"), message))?;
            Ok(Some(Arc::new(compiled)))
        }
        (None, Some(path), false) => {
            let told = |message: String| (".file".to_owned(), message);
            let text = (world.file)(path).map_err(told)?;
            let schema: Value = serde_json::from_str(&text).map_err(|error| told(format!("it is no JSON: {error}")))?;
            let compiled = Schema::compile(&schema).map_err(|(path, message)| told(format!("{path}: {message}")))?;
            Ok(Some(Arc::new(compiled)))
        }
        (None, None, true) => Ok(None),
        _ => Err((String::new(), "give exactly one of schema, file and from_request: true".to_owned())),
    }
}

/// The schemas that one request brings along.
#[derive(Clone, Debug, Default)]
pub struct Asked {
    /// What its answer must be.
    pub answer: Option<Arc<Schema>>,
    /// What the arguments of each tool must be. None where the request has no tools.
    pub tools: Option<HashMap<String, Arc<Schema>>>,
}

/// The longest schema that a request may bring, in bytes.
const ASKED_MAX: usize = 64 << 10;
/// All schemas of all tools of a request together.
const TOOLS_MAX: usize = 256 << 10;

/// A tool of a request: its name, and the schema of its arguments as JSON, if it has one.
pub type AskedTool<'b> = (String, Option<&'b [u8]>);

impl Asked {
    /// Compiles what a request has: the schema of its answer, and each tool's name and schema, as JSON. A tool without
    /// one takes anything.
    pub fn of<'b>(answer: Option<&'b [u8]>, tools: Option<Vec<AskedTool<'b>>>) -> Result<Self, String> {
        let within = tools.iter().flatten().filter_map(|(_, schema)| schema.map(<[u8]>::len)).sum::<usize>();
        if within > TOOLS_MAX {
            return Err(format!("the tools' schemas are longer than {TOOLS_MAX} bytes"));
        }
        let tool = |(name, schema): AskedTool<'_>| Ok((name, asked(schema.unwrap_or(b"true"))?));
        let answer = answer.map(asked).transpose()?;
        let tools = tools.map(|tools| tools.into_iter().map(tool).collect::<Result<_, String>>()).transpose()?;
        Ok(Self { answer, tools })
    }
}

fn asked(text: &[u8]) -> Result<Arc<Schema>, String> {
    if text.len() > ASKED_MAX {
        return Err(format!("the request's schema is longer than {ASKED_MAX} bytes"));
    }
    let schema: Value = serde_json::from_slice(text).map_err(|_| "the request's schema is no JSON".to_owned())?;
    let told = |(path, message): Wrong| format!("the request's schema at {path}: {message}");
    Schema::of_a_stranger(&schema).map(Arc::new).map_err(told)
}

impl Guardrails {
    /// Whether a rule judges by the request's own schemas: of its answer, and of its tools.
    pub fn asks_schemas(&self) -> (bool, bool) {
        let asks = |place: Place| self.shapes_at(place).any(|(_, shape)| shape.schema.is_none());
        (asks(Place::AnswerContent), asks(Place::AnswerToolArguments))
    }

    /// Whether a rule judges the shape of what stands at this place.
    pub fn has_shapes(&self, place: Place) -> bool {
        self.shapes_at(place).next().is_some()
    }

    /// Whether a rule judges by schemas that this request does not have.
    pub fn is_unasked(&self, rule: usize, asked: &Asked) -> bool {
        let Some(rule) = self.rules.get(rule) else { return false };
        let of_request = matches!(&rule.detector, Detector::Shape(shape) if shape.schema.is_none());
        let has = |place: &Place| match place {
            Place::AnswerToolArguments => asked.tools.is_some(),
            _ => asked.answer.is_some(),
        };
        of_request && !rule.places.iter().any(has)
    }

    /// What judges the shape of one text: the arguments of `tool`, or the content of an answer.
    pub fn shapes(&self, place: Place, tool: Option<&str>, asked: &Asked) -> Option<Arc<Scanner>> {
        let mut enforcing: Vec<Arc<dyn Finder>> = Vec::new();
        let mut watching: Vec<Arc<dyn Finder>> = Vec::new();
        for (rule, shape) in self.shapes_at(place) {
            let Some(schema) = shape.schema.clone().or_else(|| asked.schema(place, tool)) else { continue };
            let finder = Arc::new(Shaped { schema, rule, bytes_max: shape.bytes_max });
            if self.rules[rule].enforces() { enforcing.push(finder) } else { watching.push(finder) }
        }
        let any = !enforcing.is_empty() || !watching.is_empty();
        any.then(|| Arc::new(Scanner::new(self.acts.clone(), enforcing, watching)))
    }

    fn shapes_at(&self, place: Place) -> impl Iterator<Item = (usize, &Shape)> {
        self.rules.iter().enumerate().filter(move |(_, rule)| rule.places.contains(&place)).filter_map(
            |(index, rule)| match &rule.detector {
                Detector::Shape(shape) => Some((index, shape)),
                _ => None,
            },
        )
    }
}

impl Asked {
    /// What an answer's text breaks of the schema that the request brought for it, if it brought one.
    pub fn wrong_with(&self, text: &str) -> Option<&'static str> {
        self.answer.as_ref()?.validate(text).err()
    }

    fn schema(&self, place: Place, tool: Option<&str>) -> Option<Arc<Schema>> {
        if place != Place::AnswerToolArguments {
            return self.answer.clone();
        }
        // A tool that the request does not have cannot be called rightly.
        let known = |tools: &HashMap<String, _>| tool.and_then(|tool| tools.get(tool).cloned());
        self.tools.as_ref().map(|tools| known(tools).unwrap_or_else(|| Arc::new(Schema::never())))
    }
}

/// One schema for one text.
#[derive(Debug)]
struct Shaped {
    schema: Arc<Schema>,
    rule: usize,
    bytes_max: u64,
}

impl Finder for Shaped {
    fn begin(self: Arc<Self>) -> Box<dyn Search> {
        Box::new(Reading { shaped: self, syntax: Syntax::default(), at: 0, over: false })
    }

    fn hold_max(&self) -> usize {
        self.bytes_max as usize + 4
    }
}

struct Reading {
    shaped: Arc<Shaped>,
    syntax: Syntax,
    at: u64,
    over: bool,
}

impl Search for Reading {
    fn advance(&mut self, window: &Window<'_>, found: &mut Vec<Found>) -> u64 {
        let end = window.base + window.text.len() as u64;
        if self.over {
            return end;
        }
        let violated = self.read(window).or_else(|| self.judge(window));
        self.over = violated.is_some() || window.last;
        found.extend(violated.map(|(label, end)| Found { rule: self.shaped.rule, label: label.into(), range: 0..end }));
        // Until then nothing is known of its first byte either.
        if self.over { end } else { 0 }
    }
}

impl Reading {
    /// Reads what is new; why it cannot become right any more, and with which byte.
    fn read(&mut self, window: &Window<'_>) -> Option<(&'static str, u64)> {
        let from = (self.at - window.base) as usize;
        for (index, byte) in window.text.as_bytes()[from..].iter().enumerate() {
            let at = window.text.ceil_char_boundary(from + index + 1);
            let is_right = self.syntax.takes(*byte, |first| self.shaped.schema.may_begin(first));
            let wrong = if is_right { None } else { Some("not_json") };
            let long = (window.base + at as u64 > self.shaped.bytes_max).then_some("too_long");
            if let Some(wrong) = wrong.or(long) {
                return Some((wrong, window.base + at as u64));
            }
        }
        self.at = window.base + window.text.len() as u64;
        None
    }

    /// The text is at its end: what is wrong with it.
    fn judge(&self, window: &Window<'_>) -> Option<(&'static str, u64)> {
        if !window.last || window.text.is_empty() {
            return None;
        }
        let wrong = self.shaped.schema.validate(window.text).err()?;
        Some((wrong, window.base + window.text.len() as u64))
    }
}

#[cfg(test)]
mod tests {
    use super::super::redact::Placeholders;
    use super::super::tests::{built, built_with, check_cuts};
    use super::*;

    const PERSON: &str = r#"{"type":"object","required":["name"],"additionalProperties":false,
        "properties":{"name":{"type":"string","maxLength":5},"age":{"type":"integer","minimum":0}}}"#;

    fn rule(source: &str) -> String {
        format!(
            r#"[{{"name":"s","in":["answer.content","answer.tool_arguments"],"verdict":"block","schema":{{{source}}}}}]"#
        )
    }

    fn scanner(source: &str) -> Arc<Scanner> {
        let guardrails = built(&rule(source)).unwrap();
        guardrails.shapes(Place::AnswerContent, None, &Asked::default()).unwrap()
    }

    /// What is found, and how many bytes say so.
    fn found(scanner: &Arc<Scanner>, text: &str) -> Option<(String, u64)> {
        let progress = scanner.judge(text, &mut Placeholders::default());
        assert_eq!(progress.blocked.is_some(), !progress.found.is_empty());
        assert!(progress.blocked.is_none() || progress.released == 0, "nothing of it leaves");
        progress.found.first().map(|found| (found.label.to_string(), found.range.end))
    }

    #[test]
    fn an_answer_passes_if_it_is_what_the_schema_says() {
        let scanner = scanner(&format!(r#""schema":{PERSON}"#));
        for (text, expected) in [
            (r#"{"name":"Ann","age":7}"#, None),
            (" {\"name\":\"\\u00e9\\n\"} \n", None),
            (r#"{"age":7}"#, Some("required")),
            (r#"{"name":7}"#, Some("type")),
            (r#"{"name":"Ann","age":-1}"#, Some("minimum")),
            (r#"{"name":"Annabel"}"#, Some("maxLength")),
            (r#"{"name":"Ann","x":1}"#, Some("additionalProperties")),
            (r#"{"name":"Ann""#, Some("not_json")),
            (r#"{"name":"Ann","name":"Ben"}"#, Some("duplicate_key")),
        ] {
            assert_eq!(found(&scanner, text).map(|(label, _)| label).as_deref(), expected, "{text}");
            check_cuts(&scanner, text);
        }
    }

    #[test]
    fn what_can_no_longer_become_right_is_found_with_the_byte_that_says_so() {
        let scanner = scanner(&format!(r#""schema":{PERSON},"bytes_max":40"#));
        let long = format!("{{\"name\":\"{}\"}}", "é".repeat(40));
        for (text, bytes) in [
            ("Sure! {}", 1),
            ("  [1]", 3),
            ("{\"name\":\"Ann\"} and", 16),
            ("{\"name\":\"A\nn\"}", 11),
            ("{'name'}", 2),
            ("{\"age\":01}", 9),
            (long.as_str(), 41),
        ] {
            assert_eq!(found(&scanner, text).unwrap().1, bytes, "{text}");
            check_cuts(&scanner, text);
        }
    }

    #[test]
    fn a_rule_that_only_watches_holds_nothing() {
        let json = rule(&format!(r#""schema":{PERSON}"#)).replace("\"block\"", "\"flag\"");
        let scanner = built(&json).unwrap().shapes(Place::AnswerContent, None, &Asked::default()).unwrap();
        let (mut stream, mut progress) = (scanner.stream(), super::super::Progress::default());
        for (piece, released) in [("{\"na", 4), ("me\":7", 9), ("}", 10)] {
            stream.push(piece, &mut Placeholders::default(), &mut progress);
            assert_eq!((progress.released, progress.found.len()), (released, 0));
        }
        stream.finish(&mut Placeholders::default(), &mut progress);
        assert_eq!((&*progress.found[0].label, progress.blocked), ("type", None));
    }

    #[test]
    fn the_requests_own_schemas_hold_and_a_tool_that_it_does_not_have_cannot_be_called() {
        let guardrails = built(&rule(r#""from_request":true"#)).unwrap();
        assert_eq!(guardrails.asks_schemas(), (true, true));
        let tools = vec![("f".to_owned(), Some(PERSON.as_bytes())), ("g".to_owned(), None)];
        let asked = Asked::of(Some(br#"{"const":1}"#), Some(tools)).unwrap();
        let judged = |place, tool, text: &str| found(&guardrails.shapes(place, tool, &asked).unwrap(), text).is_none();
        assert!(judged(Place::AnswerContent, None, "1.0") && !judged(Place::AnswerContent, None, "2"));
        let arguments = Place::AnswerToolArguments;
        assert!(judged(arguments, Some("f"), "{\"name\":\"A\"}") && !judged(arguments, Some("f"), "{}"));
        assert!(judged(arguments, Some("g"), "{}") && !judged(arguments, Some("h"), "{}"));
        assert!(guardrails.shapes(Place::AnswerContent, None, &Asked::default()).is_none());
        assert!(guardrails.is_unasked(0, &Asked::default()) && !guardrails.is_unasked(0, &asked));
    }

    #[test]
    fn a_strangers_schema_is_bounded() {
        let deep = format!("{}true{}", "{\"not\":".repeat(70), "}".repeat(70));
        let long = format!("{{\"title\":\"{}\"}}", "x".repeat(ASKED_MAX));
        let wide = format!("{{\"anyOf\":[{}true]}}", "{},".repeat(5_000));
        let heavy = r#"{"pattern":"(a{900}){900}"}"#.to_owned();
        for text in [deep, long, wide, heavy, r#"{"$ref":"http://x/y"}"#.to_owned(), r#"{"if":true}"#.to_owned()] {
            assert!(Asked::of(Some(text.as_bytes()), None).is_err(), "{}", &text[..20]);
        }
        // Each of these asks three times for the next: nobody waits for the end of that.
        let levels: Vec<String> = (0..14)
            .map(|n| format!(r##""a{n}":{{"anyOf":[{{"$ref":"#/$defs/a{0}"}},{{"$ref":"#/$defs/a{0}"}},{{"$ref":"#/$defs/a{0}"}}]}}"##, n + 1))
            .collect();
        let text = format!(r##"{{"$ref":"#/$defs/a0","$defs":{{{},"a14":false}}}}"##, levels.join(","));
        let asked = Asked::of(Some(text.as_bytes()), None).unwrap();
        let guardrails = built(&rule(r#""from_request":true"#)).unwrap();
        let scanner = guardrails.shapes(Place::AnswerContent, None, &asked).unwrap();
        assert_eq!(found(&scanner, "1").unwrap().0, "too_complex");
    }

    #[test]
    fn what_is_wrong_with_a_schema_is_told_at_its_place() {
        for (source, path, message) in [
            (r#""schema":{"properties":{"a":{"type":"strin"}}}"#, ".schema.properties.a.type", "strin"),
            (r#""schema":{"properties":{"a":{"if":true}}}"#, ".schema.properties.a.if", "not supported"),
            (r##""schema":{"$ref":"#/$defs/x"}"##, ".schema.$ref", "no such place"),
            (r#""schema":{"pattern":"("}"#, ".schema.pattern", "regular expression"),
            (r#""file":"x.json""#, ".file", "no JSON"),
            (r#""from_request":true,"schema":true"#, "", "exactly one"),
            (r#""schema":true,"bytes_max":3"#, ".bytes_max", "16 to"),
        ] {
            let wrong = built_with(&rule(source), "no").unwrap_err();
            assert_eq!(wrong[0].0, format!("[0].schema{path}"), "{wrong:?}");
            assert!(wrong[0].1.contains(message), "{wrong:?}");
        }
        let prompts = rule(r#""schema":true"#).replace("answer.content", "prompt.user");
        assert!(built(&prompts).unwrap_err()[0].1.contains("has no shape"));
    }
}
