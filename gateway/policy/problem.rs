//! What is wrong with a YAML file, all of it, each with its line and column and what to do.

use std::collections::HashMap;
use std::fmt;

use schemars::{JsonSchema, Schema};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use serde_saphyr::granit_parser::{Event, Parser};

use crate::money::usd::{self, Usd};

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Line and column, from 1, where they are known.
    pub place: Option<(usize, usize)>,
    /// The key, from the top: `pools.fast.upstreams[0].url`.
    pub path: String,
    /// What is wrong and what to do.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some((line, column)) = self.place {
            write!(f, "{line}:{column}: ")?;
        }
        if !self.path.is_empty() {
            write!(f, "{}: ", self.path)?;
        }
        f.write_str(&self.message)
    }
}

/// A YAML document: its values, and where each stands.
#[derive(Debug, Default)]
pub struct Document {
    /// The values.
    pub value: Value,
    places: HashMap<String, (usize, usize)>,
}

impl Document {
    /// Parses `text`. A file that is no YAML has one problem: everything behind it is unknown.
    pub fn parse(text: &str) -> Result<Self, Problem> {
        // A model may be called `n` or `no`: only `true` and `false` are booleans.
        let options = serde_saphyr::options! { strict_booleans: true };
        let value = serde_saphyr::from_str_with_options::<Option<Value>>(text, options).map_err(|error| Problem {
            place: error.location().map(|at| (at.line() as usize, at.column() as usize)),
            path: String::new(),
            message: first_line(&error.to_string()),
        })?;
        Ok(Self { value: value.unwrap_or(Value::Null), places: places(text) })
    }

    /// A problem with the value at `path`, or with the nearest thing around it that has a place.
    pub fn problem(&self, path: &str, message: impl Into<String>) -> Problem {
        let mut around = path;
        while !self.places.contains_key(around) {
            match around.rfind(['.', '[']) {
                Some(cut) => around = &around[..cut],
                None => break,
            }
        }
        Problem { place: self.places.get(around).copied(), path: path.to_owned(), message: message.into() }
    }

    /// The document as a `T`, or everything in which it is not what the schema of `T` says.
    pub fn read<T: DeserializeOwned + JsonSchema>(&self) -> Result<T, Vec<Problem>> {
        let problems = self.against(&schemars::schema_for!(T));
        if !problems.is_empty() {
            return Err(problems);
        }
        serde_json::from_value(self.value.clone()).map_err(|error| vec![self.problem("", error.to_string())])
    }

    /// Everything in which the document is not what `schema` says, each thing once.
    fn against(&self, schema: &Schema) -> Vec<Problem> {
        let mut check = Check { document: self, root: schema.as_value(), problems: Vec::new() };
        check.value("", &self.value, schema.as_value());
        check.problems
    }
}

/// The parser's sentence without the position that it repeats.
fn first_line(text: &str) -> String {
    let text = text.lines().next().unwrap_or_default();
    text.strip_prefix("error: ").unwrap_or(text).to_owned()
}

/// The line and column of every key and every element, by path.
fn places(text: &str) -> HashMap<String, (usize, usize)> {
    /// A collection that is open: its path, and the key whose value comes next, or the next index.
    enum Open {
        Map(String, Option<String>),
        List(String, usize),
    }
    fn next_path(open: &mut [Open]) -> String {
        match open.last_mut() {
            None => String::new(),
            Some(Open::Map(path, key)) => join(path, &key.take().unwrap_or_default()),
            Some(Open::List(path, index)) => {
                *index += 1;
                format!("{path}[{}]", *index - 1)
            }
        }
    }
    let mut places = HashMap::new();
    let mut open: Vec<Open> = Vec::new();
    for item in Parser::new_from_str(text) {
        let Ok((event, span)) = item else { break };
        let place = (span.start.line(), span.start.col() + 1);
        match event {
            Event::Scalar(ref text, ..) if matches!(open.last(), Some(Open::Map(_, None))) => {
                let Some(Open::Map(path, key)) = open.last_mut() else { continue };
                places.insert(join(path, text), place);
                *key = Some(text.to_string());
            }
            Event::Scalar(..) | Event::Alias(_) => {
                let path = next_path(&mut open);
                places.entry(path).or_insert(place);
            }
            Event::MappingStart(..) => {
                let path = next_path(&mut open);
                places.entry(path.clone()).or_insert(place);
                open.push(Open::Map(path, None));
            }
            Event::SequenceStart(..) => {
                let path = next_path(&mut open);
                places.entry(path.clone()).or_insert(place);
                open.push(Open::List(path, 0));
            }
            Event::MappingEnd | Event::SequenceEnd => drop(open.pop()),
            _ => {}
        }
    }
    places
}

fn join(path: &str, key: &str) -> String {
    if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") }
}

/// A walk over a document beside its schema. It knows the part of JSON Schema that our own schemas use.
struct Check<'a> {
    document: &'a Document,
    root: &'a Value,
    problems: Vec<Problem>,
}

impl Check<'_> {
    fn wrong(&mut self, path: &str, message: impl Into<String>) {
        self.problems.push(self.document.problem(path, message));
    }

    fn value(&mut self, path: &str, value: &Value, schema: &Value) {
        let schema = self.resolved(schema);
        if let Some(choices) = schema.get("anyOf").and_then(Value::as_array) {
            // An optional shape: null, or the shape itself.
            let shape = choices.iter().find(|choice| choice.get("type") != Some(&Value::from("null")));
            if let (false, Some(shape)) = (value.is_null(), shape) {
                self.value(path, value, &shape.clone());
            }
            return;
        }
        if let Some(words) = words(&schema) {
            return self.word(path, value, &words);
        }
        if !self.kind(path, value, &schema) {
            return;
        }
        if schema.get("format").is_some_and(|format| format == usd::FORMAT)
            && let Err(wrong) = Usd::deserialize(value)
        {
            return self.wrong(path, wrong.to_string());
        }
        match value {
            Value::Object(members) => self.object(path, members, &schema),
            Value::Array(elements) => self.list(path, elements, &schema),
            Value::Number(number) => self.range(path, number.as_f64().unwrap_or_default(), &schema),
            Value::String(text) if (text.chars().count() as u64) < least(&schema, "minLength") => {
                self.wrong(path, "must not be empty");
            }
            _ => {}
        }
    }

    fn resolved(&self, schema: &Value) -> Value {
        let target = schema.get("$ref").and_then(Value::as_str).and_then(|reference| reference.strip_prefix('#'));
        target.and_then(|pointer| self.root.pointer(pointer)).unwrap_or(schema).clone()
    }

    fn word(&mut self, path: &str, value: &Value, words: &[String]) {
        let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        if !words.contains(&text) {
            let hint = nearest(&text, words.iter().map(String::as_str));
            self.wrong(path, format!("{text} is none of {}{hint}", words.join(", ")));
        }
    }

    fn kind(&mut self, path: &str, value: &Value, schema: &Value) -> bool {
        let kinds: Vec<&str> = match schema.get("type") {
            Some(Value::String(kind)) => vec![kind],
            Some(Value::Array(kinds)) => kinds.iter().filter_map(Value::as_str).collect(),
            _ => return true,
        };
        let fits = kinds.iter().any(|kind| match *kind {
            "object" => value.is_object(),
            "array" => value.is_array(),
            "string" => value.is_string(),
            "boolean" => value.is_boolean(),
            "integer" => value.is_i64() || value.is_u64(),
            "number" => value.is_number(),
            "null" => value.is_null(),
            _ => true,
        });
        if !fits {
            // What stands where a mapping is due may be a secret that belongs somewhere else.
            let is = if value.is_string() && kinds.contains(&"object") { "text".to_owned() } else { shown(value) };
            self.wrong(path, format!("must be {}, but it is {is}", described(&kinds)));
        }
        fits
    }

    fn object(&mut self, path: &str, members: &serde_json::Map<String, Value>, schema: &Value) {
        let known = schema.get("properties").and_then(Value::as_object).cloned().unwrap_or_default();
        let others = schema.get("additionalProperties").cloned().unwrap_or(Value::Bool(true));
        for (key, value) in members {
            let place = join(path, key);
            match (known.get(key), &others) {
                (Some(shape), _) => self.value(&place, value, shape),
                (None, Value::Bool(false)) => {
                    let names = known.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
                    let hint = nearest(key, known.keys().map(String::as_str));
                    self.wrong(&place, format!("unknown key{hint}; known here: {names}"));
                }
                (None, shape) => self.value(&place, value, shape),
            }
        }
        for name in schema.get("required").and_then(Value::as_array).into_iter().flatten() {
            let name = name.as_str().unwrap_or_default();
            if !members.contains_key(name) {
                self.wrong(path, format!("`{name}` is missing: {}", sentence(known.get(name))));
            }
        }
    }

    fn list(&mut self, path: &str, elements: &[Value], schema: &Value) {
        let least = least(schema, "minItems");
        if (elements.len() as u64) < least {
            self.wrong(path, format!("must have at least {least} entry: it is empty"));
        }
        let Some(shape) = schema.get("items") else { return };
        for (index, element) in elements.iter().enumerate() {
            self.value(&format!("{path}[{index}]"), element, shape);
        }
    }

    fn range(&mut self, path: &str, number: f64, schema: &Value) {
        let bound = |name: &str| schema.get(name).and_then(Value::as_f64);
        if let Some(least) = bound("minimum").filter(|least| number < *least) {
            self.wrong(path, format!("must be at least {least}, but it is {number}"));
        }
        if let Some(most) = bound("maximum").filter(|most| number > *most) {
            self.wrong(path, format!("must be at most {most}, but it is {number}"));
        }
    }
}

fn least(schema: &Value, name: &str) -> u64 {
    schema.get(name).and_then(Value::as_u64).unwrap_or(0)
}

/// The words of an enum, whether or not each has a description.
fn words(schema: &Value) -> Option<Vec<String>> {
    if let Some(words) = schema.get("enum").and_then(Value::as_array) {
        return Some(words.iter().filter_map(Value::as_str).map(str::to_owned).collect());
    }
    let choices = schema.get("oneOf")?.as_array()?;
    choices.iter().map(|choice| choice.get("const")?.as_str().map(str::to_owned)).collect()
}

/// The first sentence of a key's description.
fn sentence(schema: Option<&Value>) -> &str {
    let text =
        schema.and_then(|schema| schema.get("description")).and_then(Value::as_str).unwrap_or("it must be given");
    text.split_inclusive('.').next().unwrap_or(text)
}

fn described(kinds: &[&str]) -> String {
    let word = |kind: &&str| match *kind {
        "object" => "a mapping (key: value)",
        "array" => "a list",
        "string" => "text",
        "boolean" => "true or false",
        "integer" => "a whole number",
        "null" => "left out",
        _ => "a number",
    };
    kinds.iter().map(word).collect::<Vec<_>>().join(" or ")
}

fn shown(value: &Value) -> String {
    match value {
        Value::Object(_) => "a mapping".to_owned(),
        Value::Array(_) => "a list".to_owned(),
        Value::Null => "empty".to_owned(),
        other => other.to_string().chars().take(60).collect(),
    }
}

/// `; did you mean x?`, where some candidate is near enough to `text`.
pub fn nearest<'a>(text: &str, candidates: impl Iterator<Item = &'a str>) -> String {
    let best = candidates.map(|candidate| (distance(text, candidate), candidate)).min();
    match best {
        // Two letters that changed places count as two, also in a short word.
        Some((distance, candidate)) if distance <= (text.len() / 3).max(1 + usize::from(text.len() > 3)) => {
            format!("; did you mean {candidate}?")
        }
        _ => String::new(),
    }
}

/// Levenshtein's distance in bytes.
fn distance(left: &str, right: &str) -> usize {
    let mut row: Vec<usize> = (0..=right.len()).collect();
    for (i, a) in left.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, b) in right.bytes().enumerate() {
            let substitute = diagonal + usize::from(a != b);
            diagonal = row[j + 1];
            row[j + 1] = substitute.min(row[j] + 1).min(row[j + 1] + 1);
        }
    }
    row[right.len()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::file::File;

    fn problems(text: &str) -> Vec<String> {
        let document = Document::parse(text).unwrap();
        document.against(&schemars::schema_for!(File)).iter().map(Problem::to_string).collect()
    }

    #[test]
    fn all_problems_are_told_each_at_its_place() {
        let text = "version: 1\nmodels:\n  - name: a\n    pol: x\n    pool: 7\npools:\n  p:\n    upstreams: []\n    retry: {attempts: 0, on: [conect]}\n    slow_start_ms: fast\n";
        let told = problems(text);
        assert_eq!(told.len(), 6, "{told:#?}");
        assert!(told[0].starts_with("4:5: models[0].pol: unknown key; did you mean pool?"), "{}", told[0]);
        assert!(told[1].starts_with("5:5: models[0].pool: must be text, but it is 7"), "{}", told[1]);
        assert!(told.iter().any(|t| t.starts_with("8:5: pools.p.upstreams: must have at least 1 entry")));
        assert!(told.iter().any(|t| t.starts_with("9:13: pools.p.retry.attempts: must be at least 1, but it is 0")));
        assert!(
            told.iter()
                .any(|t| t.contains("pools.p.retry.on[0]: conect is none of") && t.contains("did you mean connect?"))
        );
        assert!(told.iter().any(|t| t.starts_with("10:5: pools.p.slow_start_ms: must be a whole number")));
    }

    #[test]
    fn a_missing_key_says_what_it_is_for() {
        let told = problems("version: 1\npools: {p: {upstreams: [{weight: 1}]}}\n");
        assert_eq!(told.len(), 1);
        assert!(told[0].contains("`url` is missing: Its base URL"), "{}", told[0]);
    }

    #[test]
    fn what_is_no_yaml_says_where() {
        let problem = Document::parse("a: 1\n  b: [\n").unwrap_err();
        assert!(problem.place.is_some(), "{problem}");
        let twice = Document::parse("a: 1\na: 2\n").unwrap_err();
        assert_eq!(twice.place.map(|(line, _)| line), Some(2), "{twice}");
    }

    #[test]
    fn an_empty_file_is_not_a_policy() {
        assert_eq!(problems("# nothing\n").len(), 1);
    }
}
