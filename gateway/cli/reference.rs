//! `infergate reference`: the reference of the policy or the settings as Markdown, made from their schema.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use serde_json::Value;

use crate::policy;
use crate::settings::Settings;

/// Print a reference.
#[derive(Args)]
pub(super) struct Reference {
    /// The reference of the settings instead
    #[arg(long)]
    settings: bool,
    /// Put it into this file, between the lines `<!-- reference -->` and `<!-- /reference -->`
    #[arg(long, value_name = "FILE")]
    into: Option<PathBuf>,
}

const BEGIN: &str = "<!-- reference -->\n";
const END: &str = "<!-- /reference -->";

impl Reference {
    pub(super) fn run(self) -> Result<ExitCode, String> {
        let schema = if self.settings { schemars::schema_for!(Settings) } else { policy::schema() };
        let text = markdown(schema.as_value());
        match self.into {
            Some(file) => put(&file, &text)?,
            None => print!("{text}"),
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// Replaces what stands between the two marks.
fn put(file: &Path, text: &str) -> Result<(), String> {
    let told = |error: std::io::Error| format!("{}: {error}", file.display());
    let before = std::fs::read_to_string(file).map_err(told)?;
    let marks = before.split_once(BEGIN).and_then(|(head, rest)| Some((head, rest.split_once(END)?.1)));
    let Some((head, tail)) = marks else {
        return Err(format!("{} lacks the lines {} and {END}", file.display(), BEGIN.trim_end()));
    };
    std::fs::write(file, format!("{head}{BEGIN}{text}{END}{tail}")).map_err(told)
}

/// A section for the top, then one for each shape, with a row a key.
fn markdown(schema: &Value) -> String {
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
    text.as_str().unwrap_or_default().replace('\n', " ").replace('|', "\\|")
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
