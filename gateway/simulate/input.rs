//! Request bodies: JSON with the checks, and the complaints, of a model server.

use serde_json::{Map, Value};

use super::answer::Refusal;
use super::tokens;

/// A JSON object that was sent.
pub(super) struct Input(Map<String, Value>);

impl Input {
    pub(super) fn parse(body: &[u8]) -> Result<Self, Refusal> {
        match serde_json::from_slice(body) {
            Ok(Value::Object(fields)) => Ok(Self(fields)),
            Ok(_) => Err(invalid(
                "body",
                "{'type': 'model_attributes_type', 'loc': 'body', 'msg': 'Input should be a valid dictionary or object to extract fields from'}",
            )),
            Err(error) => Err(not_json(body, &error)),
        }
    }

    pub(super) fn get(&self, name: &str) -> Option<&Value> {
        self.0.get(name).filter(|value| !value.is_null())
    }

    pub(super) fn needed(&self, name: &str) -> Result<&Value, Refusal> {
        self.get(name).ok_or_else(|| {
            let location = format!("body.{name}");
            let complaint = format!("{{'type': 'missing', 'loc': '{location}', 'msg': 'Field required'}}");
            invalid(&location, &complaint)
        })
    }

    pub(super) fn text(&self, name: &str) -> Result<Option<&str>, Refusal> {
        self.typed(name, "string", Value::as_str)
    }

    pub(super) fn flag(&self, name: &str) -> Result<bool, Refusal> {
        Ok(self.typed(name, "boolean", Value::as_bool)?.unwrap_or(false))
    }

    pub(super) fn number(&self, name: &str) -> Result<Option<f64>, Refusal> {
        self.typed(name, "number", Value::as_f64)
    }

    pub(super) fn integer(&self, name: &str) -> Result<Option<i64>, Refusal> {
        self.typed(name, "integer", Value::as_i64)
    }

    pub(super) fn list(&self, name: &str) -> Result<&[Value], Refusal> {
        Ok(self.typed(name, "list", Value::as_array)?.map_or(&[], Vec::as_slice))
    }

    /// A number of tokens or choices: at least one.
    pub(super) fn count(&self, name: &str) -> Result<Option<u64>, Refusal> {
        match self.integer(name)? {
            Some(count) if count < 1 => Err(Refusal::value(name, &format!("{name} must be at least 1"), count)),
            count => Ok(count.map(i64::cast_unsigned)),
        }
    }

    fn typed<'a, T>(
        &'a self,
        name: &str,
        kind: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, Refusal> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match read(value) {
            Some(read) => Ok(Some(read)),
            None => Err(mistyped(name, kind, value)),
        }
    }
}

fn mistyped(name: &str, kind: &str, value: &Value) -> Refusal {
    let location = format!("body.{name}");
    let shown: String = value.to_string().chars().take(60).collect();
    let complaint = format!(
        "{{'type': '{kind}_type', 'loc': '{location}', 'msg': 'Input should be a valid {kind}', 'input': '{shown}'}}"
    );
    invalid(&location, &complaint)
}

/// A body that a schema refuses.
pub(super) fn invalid(param: &str, complaint: &str) -> Refusal {
    Refusal::new(400, format!("1 validation error:\n  {complaint}")).about(param).kind("Bad Request")
}

fn not_json(body: &[u8], error: &serde_json::Error) -> Refusal {
    let before: usize =
        body.split_inclusive(|byte| *byte == b'\n').take(error.line().saturating_sub(1)).map(<[u8]>::len).sum();
    let column = if error.is_eof() { error.column() } else { error.column().saturating_sub(1) };
    let said = error.to_string();
    // Python complains of the beginning of a word that is no value, serde of the first letter that is wrong.
    let within = body.get(..before + column).filter(|_| said.contains("expected ident")).unwrap_or_default();
    let column = column - within.iter().rev().take_while(|byte| byte.is_ascii_alphanumeric()).count();
    let why = [
        ("trailing", "Extra data"),
        ("key must be a string", "Expecting property name enclosed in double quotes"),
        ("expected `:`", "Expecting ':' delimiter"),
        ("expected `,`", "Expecting ',' delimiter"),
        ("EOF while parsing a string", "Unterminated string starting at"),
        ("control character", "Invalid control character at"),
        ("escape", "Invalid \\\\escape"),
    ];
    let why = why.iter().find(|(part, _)| said.contains(part)).map_or("Expecting value", |(_, why)| why);
    let location = format!("body.{}", before + column);
    let complaint = format!(
        "{{'type': 'json_invalid', 'loc': '{location}', 'msg': 'JSON decode error', 'input': '<dict of 0 items>', 'ctx': {{'error': \"{why}\"}}}}"
    );
    invalid(&location, &complaint.replace(&format!("\"{why}\""), &python_repr(why)))
}

/// A Python string literal: in double quotes only if it has single ones.
fn python_repr(text: &str) -> String {
    if text.contains('\'') { format!("\"{text}\"") } else { format!("'{text}'") }
}

/// A prompt as the engine sees it.
#[derive(Debug, Default)]
pub(super) struct Prompt {
    /// The whole of it, roles included.
    pub(super) text: String,
    /// What the user said last.
    pub(super) said: String,
    /// Whether the last message is the result of a tool.
    pub(super) after_tool: bool,
    listening: bool,
}

/// How many tokens a picture, a sound or a file is.
const MEDIA_TOKENS: usize = 256;

impl Prompt {
    /// A text alone.
    pub(super) fn plain(text: &str) -> Self {
        Self { text: text.to_owned(), said: excerpt(text).to_owned(), ..Self::default() }
    }

    /// Adds a message of OpenAI's or Anthropic's shape.
    pub(super) fn message(&mut self, role: &str, content: Option<&Value>) {
        self.text.push_str(role);
        self.text.push(':');
        self.after_tool = matches!(role, "tool" | "function");
        self.listening = self.after_tool || role == "user";
        if self.listening {
            self.said.clear();
        }
        self.content(content);
        self.text.push('\n');
    }

    fn content(&mut self, content: Option<&Value>) {
        match content {
            Some(Value::String(text)) => self.hear(text),
            Some(Value::Array(parts)) => parts.iter().for_each(|part| self.part(part)),
            Some(part @ Value::Object(_)) => self.part(part),
            _ => {}
        }
    }

    fn part(&mut self, part: &Value) {
        let field = |name: &str| part.get(name).and_then(Value::as_str);
        match field("type").unwrap_or("text") {
            "text" | "input_text" | "output_text" | "thinking" => self.hear(field("text").unwrap_or_default()),
            "refusal" => self.text.push_str(field("refusal").unwrap_or_default()),
            "tool_result" => {
                self.after_tool = true;
                self.content(part.get("content"));
            }
            "tool_use" => self.text.push_str(&part.to_string()),
            _ => self.media(part),
        }
    }

    fn hear(&mut self, text: &str) {
        self.text.push_str(text);
        if self.listening {
            self.said.push_str(excerpt(text));
        }
    }

    /// As many tokens as a picture has, the same ones for the same picture.
    fn media(&mut self, part: &Value) {
        let word = format!("{:016x}", tokens::hash(part.to_string()));
        self.text.extend(std::iter::repeat_n(word.as_str(), MEDIA_TOKENS / 4));
    }
}

/// The first words of a text: enough for an answer to repeat.
fn excerpt(text: &str) -> &str {
    &text[..text.floor_char_boundary(400)]
}

/// A text with its number of tokens.
#[derive(Clone, Debug)]
pub(super) struct Text {
    pub(super) text: String,
    pub(super) tokens: u64,
}

impl Text {
    pub(super) fn new(text: &str) -> Self {
        Self { text: text.to_owned(), tokens: tokens::count(text) }
    }

    /// The text of token ids. There are as many tokens as ids, even where the text would be split in another way.
    pub(super) fn from_ids(ids: &[Value], field: &str) -> Result<Self, Refusal> {
        let numbers: Option<Vec<u64>> = ids.iter().map(Value::as_u64).collect();
        let numbers = numbers.ok_or_else(|| mistyped(field, "integer", &Value::Array(ids.to_vec())))?;
        let unknown = || Refusal::new(400, format!("{field} has a token id that is out of vocabulary")).about(field);
        let text = tokens::text(&numbers).ok_or_else(unknown)?;
        Ok(Self { text, tokens: ids.len() as u64 })
    }
}

/// The texts of a field that is a text, token ids, or a list of either.
pub(super) fn texts(value: &Value, field: &str) -> Result<Vec<Text>, Refusal> {
    match value {
        Value::Array(all) if all.is_empty() => {
            Err(Refusal::new(400, format!("{field} must not be empty")).about(field))
        }
        Value::Array(all) if all[0].is_number() => Ok(vec![Text::from_ids(all, field)?]),
        Value::Array(all) => all.iter().map(|one| text(one, field)).collect(),
        _ => Ok(vec![text(value, field)?]),
    }
}

fn text(value: &Value, field: &str) -> Result<Text, Refusal> {
    match value {
        Value::String(text) => Ok(Text::new(text)),
        Value::Array(ids) => Text::from_ids(ids, field),
        Value::Object(_) => {
            let mut prompt = Prompt::default();
            prompt.content(Some(value.get("content").unwrap_or(value)));
            Ok(Text::new(&prompt.text))
        }
        _ => Err(mistyped(field, "string", value)),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn broken_json_is_located_as_python_does() {
        let refusal = Input::parse(b"{\"model\":").err().unwrap();
        assert_eq!(refusal.param.as_deref(), Some("body.9"));
        let expected = "1 validation error:\n  {'type': 'json_invalid', 'loc': 'body.9', 'msg': 'JSON decode error', 'input': '<dict of 0 items>', 'ctx': {'error': 'Expecting value'}}";
        assert_eq!(refusal.message, expected);
        let other = Input::parse(b"{\"model\":nope}").err().unwrap();
        assert_eq!(other.param.as_deref(), Some("body.9"));
    }

    #[test]
    fn a_picture_has_a_fixed_number_of_tokens() {
        let mut prompt = Prompt::default();
        let url = format!("data:image/png;base64,{}", "A".repeat(100_000));
        let parts = json!([{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is it?"}]);
        prompt.message("user", Some(&parts));
        assert_eq!(tokens::count(&prompt.text), 256 + 5);
    }
}
