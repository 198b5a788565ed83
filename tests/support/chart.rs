//! Renders our Helm chart as Helm does, as far as the chart goes: the part of Go's templates that it keeps to.
//!
//! An action that is not known here fails the test, so the chart cannot leave what is tested.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use infergate::policy::problem::Document;
use serde_json::{Value, json};

/// One piece of a template.
#[derive(Clone, Debug)]
enum Piece {
    Text(String),
    /// The words between the braces.
    Print(String),
    If(String, Vec<Piece>, Vec<Piece>),
}

/// A chart whose templates are parsed.
pub struct Chart {
    templates: Vec<(String, Vec<Piece>)>,
    defined: HashMap<String, Vec<Piece>>,
    chart: Value,
    values: Value,
}

impl Chart {
    /// Reads the chart in this directory.
    pub fn read(directory: &Path) -> Self {
        let yaml = |name: &str| Document::parse(&fs::read_to_string(directory.join(name)).unwrap()).unwrap().value;
        let (chart, values) = (yaml("Chart.yaml"), yaml("values.yaml"));
        let mut read = Self { templates: Vec::new(), defined: HashMap::new(), chart, values };
        let mut files: Vec<_> =
            fs::read_dir(directory.join("templates")).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.sort();
        for path in files {
            let text = fs::read_to_string(&path).unwrap();
            let mut tokens = tokens(&text);
            tokens.reverse();
            let pieces = read.parse(&mut tokens);
            assert!(tokens.is_empty(), "{path:?}: an end too many");
            read.templates.push((path.file_name().unwrap().to_str().unwrap().to_owned(), pieces));
        }
        read
    }

    /// The values with others over them, as `helm -f` lays them.
    pub fn values(&self, over: &Value) -> Value {
        let mut values = self.values.clone();
        merge(&mut values, over);
        values
    }

    /// Every object of a release called `gate`: what Helm would send.
    pub fn render(&self, over: &Value) -> Vec<Value> {
        let release = json!({"Name": "gate", "Service": "Helm", "Namespace": "default"});
        let context = json!({"Values": self.values(over), "Release": release,
            "Chart": {"AppVersion": self.chart["appVersion"], "Name": self.chart["name"]}});
        let mut objects = Vec::new();
        for (name, pieces) in self.templates.iter().filter(|(name, _)| name.ends_with(".yaml")) {
            let text = self.print(pieces, &context);
            for part in text.split("\n---\n").filter(|part| part.lines().any(|line| !line.trim().is_empty())) {
                let document = Document::parse(part).unwrap_or_else(|problem| panic!("{name}: {problem}\n{part}"));
                objects.push(document.value);
            }
        }
        objects
    }

    fn parse(&mut self, tokens: &mut Vec<Token>) -> Vec<Piece> {
        let mut pieces = Vec::new();
        while let Some(token) = tokens.last() {
            let action = match token {
                Token::Text(text) => {
                    pieces.push(Piece::Text(text.clone()));
                    tokens.pop();
                    continue;
                }
                Token::Action(action) => action.clone(),
            };
            if action == "end" || action == "else" {
                return pieces;
            }
            tokens.pop();
            if let Some(name) = action.strip_prefix("define ") {
                let body = self.parse(tokens);
                tokens.pop().expect("an end");
                self.defined.insert(name.trim_matches('"').to_owned(), body);
            } else if let Some(condition) = action.strip_prefix("if ") {
                let then = self.parse(tokens);
                let has_else = matches!(tokens.pop(), Some(Token::Action(word)) if word == "else");
                let otherwise = if has_else { self.parse(tokens) } else { Vec::new() };
                if has_else {
                    tokens.pop().expect("an end");
                }
                pieces.push(Piece::If(condition.to_owned(), then, otherwise));
            } else if !action.starts_with("/*") {
                pieces.push(Piece::Print(action));
            }
        }
        pieces
    }

    fn print(&self, pieces: &[Piece], context: &Value) -> String {
        let print = |piece: &Piece| match piece {
            Piece::Text(text) => text.clone(),
            Piece::Print(action) => shown(&self.pipeline(action, context)),
            Piece::If(condition, then, otherwise) => {
                let met = is_true(&self.pipeline(condition, context));
                self.print(if met { then } else { otherwise }, context)
            }
        };
        pieces.iter().map(print).collect()
    }

    /// Calls divided by `|`, each with the value before it as its last argument.
    fn pipeline(&self, action: &str, context: &Value) -> Value {
        action.split(" | ").fold(None, |before, call| Some(self.call(call.trim(), before, context))).expect("a call")
    }

    fn call(&self, call: &str, piped: Option<Value>, context: &Value) -> Value {
        let mut words = call.split_whitespace();
        let name = words.next().expect("a word");
        let mut arguments: Vec<Value> = words.map(|word| argument(word, context)).collect();
        arguments.extend(piped);
        let first = || arguments.first().cloned().unwrap_or(Value::Null);
        match name {
            "include" => {
                let body = &self.defined[first().as_str().unwrap()];
                Value::from(self.print(body, context))
            }
            "toYaml" => Value::from(block(&first(), 0).trim_end().to_owned()),
            "nindent" => {
                let indent = " ".repeat(first().as_u64().unwrap() as usize);
                let text = shown(arguments.last().unwrap());
                Value::from(text.lines().map(|line| format!("\n{indent}{line}")).collect::<String>())
            }
            "quote" => Value::from(Value::from(shown(&first())).to_string()),
            "default" => {
                if is_true(&arguments[1]) {
                    arguments[1].clone()
                } else {
                    first()
                }
            }
            "not" => Value::from(!is_true(&first())),
            "add" => Value::from(arguments.iter().map(|value| value.as_i64().expect("a whole number")).sum::<i64>()),
            path if path.starts_with('.') && arguments.is_empty() => argument(path, context),
            other => panic!("the chart says {other}, which is not known here: {call}"),
        }
    }
}

/// A word of a call: a path, a string or a number.
fn argument(word: &str, context: &Value) -> Value {
    if let Some(path) = word.strip_prefix('.') {
        let steps = path.split('.').filter(|step| !step.is_empty());
        return steps.fold(context.clone(), |value, step| {
            assert!(value.is_object(), "{word}: {step} of nothing");
            value.get(step).cloned().unwrap_or(Value::Null)
        });
    }
    serde_json::from_str(word).unwrap_or_else(|_| panic!("{word} is not known here"))
}

fn is_true(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(truth) => *truth,
        Value::Number(number) => number.as_f64() != Some(0.0),
        Value::String(text) => !text.is_empty(),
        Value::Array(items) => !items.is_empty(),
        Value::Object(members) => !members.is_empty(),
    }
}

fn shown(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => panic!("a value that is not there"),
        other => other.to_string(),
    }
}

/// YAML in blocks, keys in their order.
fn block(value: &Value, indent: usize) -> String {
    let lead = " ".repeat(indent);
    match value {
        Value::Object(members) if !members.is_empty() => members
            .iter()
            .map(|(key, value)| match value {
                Value::Object(below) if !below.is_empty() => {
                    format!("{lead}{}:\n{}", Value::from(key.as_str()), block(value, indent + 2))
                }
                Value::Array(below) if !below.is_empty() => {
                    format!("{lead}{}:\n{}", Value::from(key.as_str()), block(value, indent))
                }
                flat => format!("{lead}{}: {flat}\n", Value::from(key.as_str())),
            })
            .collect(),
        Value::Array(items) if !items.is_empty() => {
            items.iter().map(|item| format!("{lead}- {}", block(item, indent + 2).trim_start())).collect()
        }
        flat => format!("{lead}{flat}\n"),
    }
}

fn merge(values: &mut Value, over: &Value) {
    match (values, over) {
        (Value::Object(values), Value::Object(over)) => {
            for (key, value) in over {
                merge(values.entry(key.clone()).or_insert(Value::Null), value);
            }
        }
        (values, over) => *values = over.clone(),
    }
}

enum Token {
    Text(String),
    Action(String),
}

/// Texts and actions, with the space away that `{{-` and `-}}` take.
fn tokens(text: &str) -> Vec<Token> {
    let (mut tokens, mut rest, mut trims) = (Vec::new(), text, false);
    while let Some((before, behind)) = rest.split_once("{{") {
        let (inside, after) = behind.split_once("}}").expect("the end of an action");
        let before = if trims { before.trim_start() } else { before };
        let before = if inside.starts_with('-') { before.trim_end() } else { before };
        tokens.push(Token::Text(before.to_owned()));
        trims = inside.ends_with('-');
        tokens.push(Token::Action(inside.trim_matches('-').trim().to_owned()));
        rest = after;
    }
    tokens.push(Token::Text(if trims { rest.trim_start() } else { rest }.to_owned()));
    tokens
}

/// Everything in which `value` is not what a schema says, for the words that `values.schema.json` uses.
pub fn against(schema: &Value, value: &Value, path: &str) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut say = |what: String| wrong.push(format!("{path}: {what}"));
    let kind = schema["type"].as_str().unwrap_or_default();
    let fits = match kind {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "boolean" => value.is_boolean(),
        "integer" => value.is_i64() || value.is_u64(),
        "" => true,
        other => panic!("{other} is not known here"),
    };
    if !fits {
        return vec![format!("{path}: is no {kind}")];
    }
    if let Some(words) = schema["enum"].as_array().filter(|words| !words.contains(value)) {
        say(format!("is none of {words:?}"));
    }
    let number = value.as_f64();
    let beyond = |bound: &str, is: fn(f64, f64) -> bool| {
        number.zip(schema[bound].as_f64()).is_some_and(|(n, bound)| is(n, bound))
    };
    if beyond("minimum", |n, least| n < least) || beyond("maximum", |n, most| n > most) {
        say("is out of range".to_owned());
    }
    if schema["minLength"].as_u64() > value.as_str().map(|text| text.len() as u64).or(Some(u64::MAX)) {
        say("is too short".to_owned());
    }
    let lacks = |schema: &Value| {
        schema["required"].as_array().into_iter().flatten().any(|key| value.get(key.as_str().unwrap()).is_none())
    };
    if lacks(schema) {
        say("lacks a key".to_owned());
    }
    if schema["not"]["anyOf"].as_array().into_iter().flatten().any(|alternative| !lacks(alternative)) {
        say("has a key that the chart itself writes".to_owned());
    }
    for (key, member) in value.as_object().into_iter().flatten() {
        match schema["properties"].get(key) {
            Some(below) => wrong.extend(against(below, member, &format!("{path}.{key}"))),
            None if schema["additionalProperties"] == false => wrong.push(format!("{path}.{key}: unknown")),
            None => {}
        }
    }
    for (index, item) in value.as_array().into_iter().flatten().enumerate() {
        if schema["items"].is_object() {
            wrong.extend(against(&schema["items"], item, &format!("{path}[{index}]")));
        }
    }
    wrong
}
