//! The keys of a file, by its schema.

use std::fmt::Write;

use serde_json::Value;

use super::cell;

/// A section for the top, then one for each shape, with a row a key.
pub(super) fn markdown(schema: &Value) -> String {
    let mut out = String::new();
    section(&mut out, "(top)", schema);
    for (name, shape) in schema["$defs"].as_object().into_iter().flatten() {
        if shape.get("properties").is_some() {
            section(&mut out, name, shape);
        }
    }
    out
}

fn section(out: &mut String, name: &str, shape: &Value) {
    let _ = writeln!(
        out,
        "#### {name}\n\n{}\n\n| key | value | what it means |\n|---|---|---|",
        flat(&shape["description"])
    );
    let required: Vec<&str> = shape["required"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    for (key, value) in shape["properties"].as_object().into_iter().flatten() {
        let need = if required.contains(&key.as_str()) { " **(required)**" } else { "" };
        let default = value.get("default").filter(|default| !default.is_null() && !default.is_object());
        let default = default.map_or(String::new(), |default| format!(" Default: `{default}`."));
        let _ = writeln!(out, "| `{key}`{need} | {} | {}{default} |", kind(value), flat(&value["description"]));
    }
    out.push('\n');
}

fn flat(text: &Value) -> String {
    cell(text.as_str().unwrap_or_default())
}

/// What a key takes, in a word or two.
fn kind(value: &Value) -> String {
    if let Some(reference) = value["$ref"].as_str() {
        return reference.rsplit('/').next().unwrap_or_default().to_owned();
    }
    let choices = value["anyOf"].as_array().or(value["oneOf"].as_array());
    if let Some(shape) = choices.and_then(|choices| choices.iter().find(|choice| choice["type"] != "null")) {
        return kind(shape);
    }
    let word = match &value["type"] {
        Value::Array(kinds) => {
            kinds.iter().filter_map(Value::as_str).find(|kind| *kind != "null").unwrap_or("any").to_owned()
        }
        other => other.as_str().unwrap_or("any").to_owned(),
    };
    match word.as_str() {
        "array" => format!("list of {}", kind(&value["items"])),
        "object" => format!("name: {}", kind(&value["additionalProperties"])),
        other => other.to_owned(),
    }
}
