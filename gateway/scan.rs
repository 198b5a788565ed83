//! The one look at a request's body: where the fields are that policy decides on, as offsets into the bytes.
//!
//! Nothing is copied and nothing is re-written. An edit is a [`splice`] at an offset, so unknown fields, key
//! order, number spelling and white space reach the upstream byte for byte.

mod json;
mod multipart;
mod output;

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;

use bytes::{Bytes, BytesMut};

/// A top-level field that some decision reads. A body that has one of them twice is refused: two readers could
/// disagree on which one counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Field {
    /// Which model is asked.
    Model,
    /// Whether the answer is to be a stream.
    Stream,
    /// `stream_options`, where usage on streams is asked for.
    StreamOptions,
    /// The most tokens that may be generated, old spelling.
    MaxTokens,
    /// The same, OpenAI's newer spelling.
    MaxCompletionTokens,
    /// The same, in the Responses API.
    MaxOutputTokens,
    /// How many answers.
    N,
    /// The end user, as the application names them.
    User,
    /// How many answers are made, of which the best are told.
    BestOf,
    /// Where TGI keeps what bounds an answer.
    Parameters,
}

const FIELDS: [(&str, Field); 10] = [
    ("model", Field::Model),
    ("stream", Field::Stream),
    ("stream_options", Field::StreamOptions),
    ("max_tokens", Field::MaxTokens),
    ("max_completion_tokens", Field::MaxCompletionTokens),
    ("max_output_tokens", Field::MaxOutputTokens),
    ("n", Field::N),
    ("user", Field::User),
    ("best_of", Field::BestOf),
    ("parameters", Field::Parameters),
];

impl Field {
    /// Its name in the body.
    pub fn name(self) -> &'static str {
        FIELDS[self as usize].0
    }

    /// The field of this name.
    pub fn named(name: &[u8]) -> Option<Self> {
        FIELDS.iter().find(|(known, _)| known.as_bytes() == name).map(|(_, field)| *field)
    }
}

/// What a model's template is made of, in the order in which templates have it: what salts the engine's cache, what
/// changes the template itself, tools, the system's words, and all that is said.
const TEMPLATE: [&str; 10] = [
    "cache_salt",
    "chat_template_kwargs",
    "reasoning_effort",
    "tools",
    "system",
    "instructions",
    "prompt",
    "inputs",
    "input",
    "messages",
];

/// Where a body's deciding fields stand.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scan {
    spans: [Option<Range<usize>>; FIELDS.len()],
    /// Where the values of [`TEMPLATE`] stand; empty where there is none.
    template: [Range<usize>; TEMPLATE.len()],
    /// Whether the values are JSON (quoted, escaped) or a form's raw text.
    raw: bool,
}

/// Why a body is not what its endpoint takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Not well formed: what was expected, and the offset in bytes where it was not found.
    Malformed(&'static str, usize),
    /// The field stands twice.
    Twice(Field),
    /// The field has a value of the wrong kind: what it must be.
    Kind(Field, &'static str),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Malformed(expected, at) => write!(f, "the body is malformed at byte {at}: {expected}"),
            Self::Twice(field) => write!(f, "the field `{}` stands twice in the body: send it once", field.name()),
            Self::Kind(field, must) => write!(f, "the field `{}` must be {must}", field.name()),
        }
    }
}

/// Scans a JSON body: one object, at most 128 levels deep.
pub fn json(body: &[u8]) -> Result<Scan, Fault> {
    json::scan(body)
}

/// Scans a multipart form whose `Content-Type` is `content_type`.
pub fn multipart(body: &[u8], content_type: &[u8]) -> Result<Scan, Fault> {
    multipart::scan(body, content_type)
}

/// The members of a JSON body that has been scanned: their names, and where their values stand.
pub fn members(body: &[u8]) -> Option<Vec<(String, Range<usize>)>> {
    let start = memchr::memchr(b'{', body)?;
    json::members(body, start..body.len())
}

/// The same of the object at `span`; `None` where there is none.
pub fn members_at(body: &[u8], span: Range<usize>) -> Option<Vec<(String, Range<usize>)>> {
    json::members(body, span)
}

/// The names of a form's parts, each of which can be read in one way only.
pub fn part_names(body: &[u8], content_type: &[u8]) -> Result<Vec<String>, Fault> {
    multipart::names(body, content_type)
}

/// Where the parts of a form with this name stand. Each part must have one name that can be read in one way only.
pub fn parts_named(body: &[u8], content_type: &[u8], name: &str) -> Result<Vec<Range<usize>>, Fault> {
    multipart::named(body, content_type, name)
}

impl Scan {
    /// Where `field`'s value stands, if the body has it.
    pub fn span(&self, field: Field) -> Option<Range<usize>> {
        self.spans[field as usize].clone()
    }

    /// What the model reads, in the order in which its template has it: the name of each field, and its value as it
    /// stands in the body.
    pub fn template<'a>(&self, body: &'a [u8]) -> impl Iterator<Item = (&'static str, &'a [u8])> {
        let values = self.template.clone().into_iter().map(|span| body.get(span).unwrap_or_default());
        TEMPLATE.into_iter().zip(values).filter(|(_, value)| !value.is_empty())
    }

    /// The model's name. A JSON `null` counts as absent.
    pub fn model<'a>(&self, body: &'a [u8]) -> Result<Option<Cow<'a, str>>, Fault> {
        let Some(value) = self.value(Field::Model, body) else { return Ok(None) };
        if !self.raw && value == b"null" {
            return Ok(None);
        }
        let wrong = || Fault::Kind(Field::Model, "a string");
        let text = std::str::from_utf8(value).map_err(|_| wrong())?;
        if self.raw {
            return Ok(Some(Cow::Borrowed(text)));
        }
        decode(text).map(Some).ok_or_else(wrong)
    }

    /// Whether a stream is asked for.
    pub fn stream(&self, body: &[u8]) -> Result<bool, Fault> {
        match self.value(Field::Stream, body) {
            None | Some(b"false" | b"null" | b"False") => Ok(false),
            Some(b"true" | b"True") => Ok(true),
            Some(_) => Err(Fault::Kind(Field::Stream, "true or false")),
        }
    }

    /// The edit that gives the model another name.
    pub fn rename_model(&self, name: &str) -> Option<Edit> {
        let span = self.span(Field::Model)?;
        let text = if self.raw { name.to_owned() } else { serde_json::Value::from(name).to_string() };
        Some(Edit { span, text })
    }

    /// The edits after which a chat's stream tells its usage at its end; `None` if it does so already, or cannot be
    /// made to.
    pub fn ask_for_usage(&self, body: &[u8]) -> Option<Vec<Edit>> {
        const ASK: &str = r#"{"include_usage":true}"#;
        let Some(span) = self.span(Field::StreamOptions) else {
            let stream = self.span(Field::Stream).filter(|_| !self.raw)?;
            return Some(vec![Edit { span: stream.end..stream.end, text: format!(",\"stream_options\":{ASK}") }]);
        };
        if body.get(span.clone()) == Some(b"null") {
            return Some(vec![Edit { span, text: ASK.to_owned() }]);
        }
        let members = json::members(body, span.clone())?;
        let named = |name: &str| members.iter().filter(|(known, _)| known == name).collect::<Vec<_>>();
        let mut edits = Vec::new();
        match named("include_usage")[..] {
            [] => {
                let comma = if members.is_empty() { "" } else { "," };
                let text = format!("\"include_usage\":true{comma}");
                edits.push(Edit { span: span.start + 1..span.start + 1, text });
            }
            [(_, value)] if matches!(body.get(value.clone()), Some(b"false" | b"null")) => {
                edits.push(Edit { span: value.clone(), text: "true".to_owned() });
            }
            _ => return None,
        }
        // vLLM's usage on every event, which means nothing without the one at the end, must not come to life with it.
        let continuous = named("continuous_usage_stats").into_iter();
        edits.extend(continuous.map(|(_, value)| Edit { span: value.clone(), text: "false".to_owned() }));
        Some(edits)
    }

    /// The edit after which a chat names its session; none where the client may have named one.
    pub fn name_session(&self, body: &[u8], id: &str) -> Option<Edit> {
        let after = memchr::memchr(b'{', body).filter(|_| !self.raw)? + 1;
        let is_named = memchr::memmem::find(body, b"\"session_").is_some();
        (!is_named).then(|| Edit { span: after..after, text: format!("\"session_id\":\"{id}\",") })
    }

    /// Whether a chat's stream tells its usage because the client asked.
    pub fn tells_usage(&self, body: &[u8]) -> bool {
        let members = self.span(Field::StreamOptions).and_then(|span| json::members(body, span)).unwrap_or_default();
        members.iter().any(|(name, value)| name == "include_usage" && body.get(value.clone()) == Some(b"true"))
    }

    fn value<'a>(&self, field: Field, body: &'a [u8]) -> Option<&'a [u8]> {
        body.get(self.span(field)?)
    }

    fn put(&mut self, field: Field, span: Range<usize>) -> Result<(), Fault> {
        match self.spans[field as usize].replace(span) {
            None => Ok(()),
            Some(_) => Err(Fault::Twice(field)),
        }
    }

    fn put_template(&mut self, key: &[u8], span: Range<usize>) {
        if let Some(place) = TEMPLATE.iter().position(|name| name.as_bytes() == key) {
            self.template[place] = span;
        }
    }
}

/// A JSON string token's text, without a copy where it has no escape.
fn decode(token: &str) -> Option<Cow<'_, str>> {
    let inner = token.strip_prefix('"')?.strip_suffix('"')?;
    if inner.contains('\\') { serde_json::from_str(token).ok().map(Cow::Owned) } else { Some(Cow::Borrowed(inner)) }
}

/// A new text for one span of a body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Edit {
    /// What is replaced.
    pub span: Range<usize>,
    /// By what.
    pub text: String,
}

/// The body with `edits` made, every other byte as it was. The edits do not overlap. Where two put something at one place,
/// they put members into one object, each as if it were alone there; what is taken out at that place is behind them.
pub fn splice(body: &Bytes, edits: &mut [Edit]) -> Bytes {
    if edits.is_empty() {
        return body.clone();
    }
    edits.sort_by_key(|edit| (edit.span.start, edit.span.end));
    let grown: usize = edits.iter().map(|edit| edit.text.len() + 1).sum();
    let mut out = BytesMut::with_capacity(body.len() + grown);
    let mut at = 0;
    let mut lacks_comma = None;
    for edit in edits {
        if lacks_comma == Some(edit.span.start) && edit.span.is_empty() {
            out.extend_from_slice(b",");
        }
        lacks_comma = (edit.span.is_empty() && !edit.text.ends_with(',')).then_some(edit.span.start);
        out.extend_from_slice(&body[at..edit.span.start]);
        out.extend_from_slice(edit.text.as_bytes());
        at = edit.span.end;
    }
    out.extend_from_slice(&body[at..]);
    out.freeze()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_fields_is_in_the_order_of_the_enum() {
        for (index, (name, field)) in FIELDS.iter().enumerate() {
            assert_eq!((index, *name), (*field as usize, field.name()));
        }
    }

    #[test]
    fn a_renamed_model_changes_nothing_else() {
        let body = Bytes::from_static(b"{ \"b\" : 1.00 ,\"model\":\t\"gpt\", \"z\":{\"model\":\"inner\"} }");
        let scan = json(&body).unwrap();
        let edited = splice(&body, &mut [scan.rename_model("lla\"ma").unwrap()]);
        assert_eq!(edited, "{ \"b\" : 1.00 ,\"model\":\t\"lla\\\"ma\", \"z\":{\"model\":\"inner\"} }");
    }

    #[test]
    fn a_stream_is_asked_for_its_usage_where_it_does_not_tell_it() {
        let asked = |text: &'static str| {
            let body = Bytes::from_static(text.as_bytes());
            let edits = json(&body).unwrap().ask_for_usage(&body);
            edits.map(|mut edits| String::from_utf8(splice(&body, &mut edits).to_vec()).unwrap())
        };
        for (came, goes) in [
            (r#"{"stream": true , "n":1}"#, r#"{"stream": true,"stream_options":{"include_usage":true} , "n":1}"#),
            (r#"{"stream":true,"stream_options":null}"#, r#"{"stream":true,"stream_options":{"include_usage":true}}"#),
            (
                r#"{"stream_options": { },"stream":true}"#,
                r#"{"stream_options": {"include_usage":true },"stream":true}"#,
            ),
            (
                r#"{"stream":true,"stream_options":{"x":[1]}}"#,
                r#"{"stream":true,"stream_options":{"include_usage":true,"x":[1]}}"#,
            ),
            (
                r#"{"stream":true,"stream_options":{"x":1, "incl\u0075de_usage" : false}}"#,
                r#"{"stream":true,"stream_options":{"x":1, "incl\u0075de_usage" : true}}"#,
            ),
            (
                r#"{"stream":true,"stream_options":{"continuous_usage_stats":true}}"#,
                r#"{"stream":true,"stream_options":{"include_usage":true,"continuous_usage_stats":false}}"#,
            ),
        ] {
            assert_eq!(asked(came).unwrap(), goes);
        }
        for left in [
            r#"{"stream":true,"stream_options":{"include_usage":true}}"#,
            r#"{"stream":true,"stream_options":{"include_usage":"yes"}}"#,
            r#"{"stream":true,"stream_options":{"include_usage":false,"include_usage":false}}"#,
            r#"{"stream":true,"stream_options":7}"#,
            r#"{"n":1}"#,
        ] {
            assert_eq!(asked(left), None, "{left}");
        }
    }

    #[test]
    fn what_a_model_reads_is_told_in_the_order_of_its_template() {
        let body = br#"{"messages":[{"tools":1}], "n":1, "tools" : [2] ,"cache_salt":"s","model":"m"}"#;
        let told: Vec<_> = json(body).unwrap().template(body).collect();
        let expected: [(&str, &[u8]); 3] =
            [("cache_salt", b"\"s\""), ("tools", b"[2]"), ("messages", br#"[{"tools":1}]"#)];
        assert_eq!(told, expected);
    }

    #[test]
    fn no_edit_is_the_same_memory() {
        let body = Bytes::from_static(b"{}");
        assert_eq!(splice(&body, &mut []).as_ptr(), body.as_ptr());
    }

    #[test]
    fn two_that_each_put_a_first_member_into_one_object_leave_it_an_object() {
        let first = |text: &str| Edit { span: 1..1, text: text.to_owned() };
        let spliced = |body: &'static str, edits: &mut [Edit]| splice(&Bytes::from_static(body.as_bytes()), edits);
        let alone = [first("\"user\":1"), first("\"max_tokens\":7"), first("\"seed\":3")];
        assert_eq!(spliced("{}", &mut alone.clone()), r#"{"user":1,"max_tokens":7,"seed":3}"#);
        assert_eq!(spliced("{ }", &mut alone[..2].to_vec()), r#"{"user":1,"max_tokens":7 }"#);
        let more = [first("\"user\":1,"), first("\"max_tokens\":7,")];
        assert_eq!(spliced(r#"{"n":1}"#, &mut more.clone()), r#"{"user":1,"max_tokens":7,"n":1}"#);
    }

    #[test]
    fn what_is_put_where_something_is_taken_out_stands_before_it() {
        let taken = Edit { span: 1..7, text: String::new() };
        let put = Edit { span: 1..1, text: "\"b\":2,".to_owned() };
        assert_eq!(splice(&Bytes::from_static(b"{\"a\":1,\"c\":3}"), &mut [taken, put]), "{\"b\":2,\"c\":3}");
    }

    #[test]
    fn an_escaped_name_is_read_as_what_it_means() {
        let body = br#"{"model":"g\u0070t"}"#;
        assert_eq!(json(body).unwrap().model(body).unwrap().unwrap(), "gpt");
    }

    #[test]
    fn a_wrong_kind_says_what_it_must_be() {
        let body = br#"{"model":7,"stream":"yes"}"#;
        let scan = json(body).unwrap();
        assert_eq!(scan.model(body), Err(Fault::Kind(Field::Model, "a string")));
        assert!(scan.stream(body).unwrap_err().to_string().contains("true or false"));
    }
}
