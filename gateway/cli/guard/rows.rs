//! Labelled texts, as they stand in a file: one JSON object a line.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::ops::Range;
use std::path::Path;

use infergate_plugins::guardrail::Place;
use serde::Deserialize;
use serde_json::Value;

/// A text, and what should be found in it.
#[derive(Debug, PartialEq)]
pub(super) struct Row {
    /// Its line in the file.
    pub line: usize,
    /// Where it stands.
    pub place: Place,
    /// The text.
    pub text: String,
    /// What should be found.
    pub expected: Expected,
}

/// What should be found in a text.
#[derive(Debug, PartialEq)]
pub(super) enum Expected {
    /// These, somewhere.
    Labels(Vec<String>),
    /// These, at these bytes.
    Spans(Vec<(String, Range<usize>)>),
}

impl Expected {
    /// Every label, as often as it is expected.
    pub fn labels(&self) -> Vec<&str> {
        match self {
            Self::Labels(labels) => labels.iter().map(String::as_str).collect(),
            Self::Spans(spans) => spans.iter().map(|(label, _)| label.as_str()).collect(),
        }
    }
}

/// A line as it is written.
#[derive(Deserialize)]
struct Written {
    text: String,
    #[serde(default, rename = "in")]
    place: Option<Place>,
    #[serde(default)]
    label: Option<Value>,
    #[serde(default)]
    spans: Option<Value>,
}

/// Reads a file; `place` is where texts stand that do not say.
pub(super) fn read(file: &Path, place: Place) -> Result<Vec<Row>, String> {
    let unreadable = |error: std::io::Error| format!("{} cannot be read: {error}", file.display());
    let lines = BufReader::new(File::open(file).map_err(unreadable)?).lines();
    let mut rows = Vec::new();
    for (number, line) in (1..).zip(lines) {
        let line = line.map_err(unreadable)?;
        if !line.trim().is_empty() {
            rows.push(row(number, &line, place).map_err(|wrong| format!("{}:{number}: {wrong}", file.display()))?);
        }
    }
    if rows.is_empty() { Err(format!("{} has no line with a text", file.display())) } else { Ok(rows) }
}

fn row(line: usize, written: &str, place: Place) -> Result<Row, String> {
    let Written { text, place: own, label, spans } = serde_json::from_str(written)
        .map_err(|error| format!("{error}: a line is like {{\"text\": \"...\", \"label\": \"a rule's name\"}}"))?;
    let expected = match (label, spans) {
        (Some(_), Some(_)) => return Err("give `label` or `spans`, not both".to_owned()),
        (label, None) => Expected::Labels(labels(label.unwrap_or_default())?),
        (None, Some(spans)) => Expected::Spans(all_spans(&text, &spans)?),
    };
    Ok(Row { line, place: own.unwrap_or(place), text, expected })
}

fn labels(label: Value) -> Result<Vec<String>, String> {
    match label {
        Value::Null => Ok(Vec::new()),
        Value::String(label) => Ok(vec![label]),
        list => {
            serde_json::from_value(list).map_err(|_| "`label` is a rule's name, a list of such, or null".to_owned())
        }
    }
}

fn all_spans(text: &str, spans: &Value) -> Result<Vec<(String, Range<usize>)>, String> {
    // Where each character begins, and the text ends.
    let places: Vec<usize> = text.char_indices().map(|(at, _)| at).chain([text.len()]).collect();
    let list = spans.as_array().ok_or("`spans` is a list")?;
    list.iter().map(|written| span(&places, written).ok_or_else(|| beyond(written, &places))).collect()
}

fn beyond(written: &Value, places: &[usize]) -> String {
    let count = places.len() - 1;
    format!(
        "{written} is no span of a text of {count} characters: write {{\"start\": 0, \"end\": 1, \"label\": \"...\"}}"
    )
}

fn span(places: &[usize], written: &Value) -> Option<(String, Range<usize>)> {
    let [label, start, end] = match written {
        Value::Array(parts) => [parts.first()?, parts.get(1)?, parts.get(2)?],
        parts => [parts.get("label")?, parts.get("start")?, parts.get("end")?],
    };
    let at = |number: &Value| places.get(usize::try_from(number.as_u64()?).ok()?).copied();
    let range = at(start)?..at(end)?;
    (range.start < range.end).then_some((label.as_str()?.to_owned(), range))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn expected(line: &str) -> Result<Expected, String> {
        row(1, line, Place::PromptUser).map(|row| row.expected)
    }

    #[test]
    fn labels_are_one_many_or_none() {
        let of = |labels: &[&str]| Ok(Expected::Labels(labels.iter().map(|label| (*label).to_owned()).collect()));
        assert_eq!(expected(r#"{"text":"a","label":"x"}"#), of(&["x"]));
        assert_eq!(expected(r#"{"text":"a","label":["x","y"],"more":1}"#), of(&["x", "y"]));
        assert_eq!(expected(r#"{"text":"a","label":null}"#), of(&[]));
        assert_eq!(expected(r#"{"text":"a"}"#), of(&[]));
    }

    #[test]
    fn spans_are_counted_in_characters() {
        let spans = Ok(Expected::Spans(vec![("x".to_owned(), 3..5)]));
        assert_eq!(expected(r#"{"text":"aéhi","spans":[{"start":2,"end":4,"label":"x"}]}"#), spans);
        assert_eq!(expected(r#"{"text":"aéhi","spans":[["x",2,4]]}"#), spans);
    }

    #[test]
    fn a_wrong_line_says_what_is_wrong() {
        for (line, told) in [
            ("{", "a line is like"),
            (r#"{"label":"x"}"#, "missing field `text`"),
            (r#"{"text":"a","label":1}"#, "`label` is a rule's name"),
            (r#"{"text":"a","label":"x","spans":[]}"#, "not both"),
            (r#"{"text":"a","spans":[["x",0,2]]}"#, "no span of a text of 1 characters"),
            (r#"{"text":"a","spans":[["x",1,0]]}"#, "no span"),
            (r#"{"text":"a","spans":[7]}"#, "no span"),
            (r#"{"text":"a","in":"nowhere"}"#, "unknown variant"),
        ] {
            let wrong = expected(line).unwrap_err();
            assert!(wrong.contains(told), "{line}: {wrong}");
        }
    }
}
