//! A value that satisfies a simple JSON schema: what a well-behaved model would answer.

use serde_json::{Map, Value, json};

/// Deeper schemas end in `null`: they are recursive or not meant seriously.
const DEEPEST: usize = 10;

/// A value valid for `schema`; texts are taken from `hint` where the schema leaves them free.
pub(super) fn example(schema: &Value, hint: &str) -> Value {
    Example { root: schema, hint }.of(schema, 0)
}

struct Example<'a> {
    root: &'a Value,
    hint: &'a str,
}

impl Example<'_> {
    fn of(&self, schema: &Value, depth: usize) -> Value {
        if depth > DEEPEST {
            return Value::Null;
        }
        if let Some(fixed) = fixed(schema) {
            return fixed;
        }
        if let Some(target) = self.target(schema) {
            return self.of(target, depth + 1);
        }
        for any in ["anyOf", "oneOf"] {
            if let Some(first) = schema.get(any).and_then(|all| all.get(0)) {
                return self.of(first, depth + 1);
            }
        }
        if let Some(all) = schema.get("allOf").and_then(Value::as_array) {
            return self.of_all(all, depth);
        }
        self.of_type(schema, depth)
    }

    fn target(&self, schema: &Value) -> Option<&Value> {
        let pointer = schema.get("$ref")?.as_str()?.strip_prefix('#')?;
        self.root.pointer(pointer)
    }

    fn of_all(&self, all: &[Value], depth: usize) -> Value {
        let mut merged = Map::new();
        for part in all {
            if let Value::Object(fields) = self.of(part, depth + 1) {
                merged.extend(fields);
            }
        }
        Value::Object(merged)
    }

    fn of_type(&self, schema: &Value, depth: usize) -> Value {
        match kind(schema) {
            "array" => self.array(schema, depth),
            "string" => string(schema, self.hint).into(),
            "integer" => integer(schema).into(),
            "number" => number(schema).into(),
            "boolean" => true.into(),
            "null" => Value::Null,
            _ => self.object(schema, depth),
        }
    }

    fn object(&self, schema: &Value, depth: usize) -> Value {
        let Some(properties) = schema.get("properties").and_then(Value::as_object) else {
            return json!({});
        };
        let fields = properties.iter();
        Value::Object(fields.map(|(name, field)| (name.clone(), self.of(field, depth + 1))).collect())
    }

    fn array(&self, schema: &Value, depth: usize) -> Value {
        let least = schema.get("minItems").and_then(Value::as_u64).unwrap_or(1).min(64);
        let most = schema.get("maxItems").and_then(Value::as_u64).unwrap_or(u64::MAX);
        let anything = json!({"type": "string"});
        let items = schema.get("items").unwrap_or(&anything);
        (0..least.min(most)).map(|_| self.of(items, depth + 1)).collect()
    }
}

fn fixed(schema: &Value) -> Option<Value> {
    let first = |name: &str| schema.get(name).and_then(|all| all.get(0)).cloned();
    schema.get("const").cloned().or_else(|| first("enum"))
}

fn kind(schema: &Value) -> &str {
    match schema.get("type") {
        Some(Value::String(kind)) => kind,
        Some(Value::Array(kinds)) => kinds.first().and_then(Value::as_str).unwrap_or("object"),
        _ if schema.get("items").is_some() => "array",
        _ => "object",
    }
}

fn string(schema: &Value, hint: &str) -> String {
    match schema.get("format").and_then(Value::as_str) {
        Some("date") => return "2026-01-31".to_owned(),
        Some("date-time") => return "2026-01-31T12:00:00Z".to_owned(),
        Some("email") => return "someone@example.com".to_owned(),
        Some("uri" | "url") => return "https://example.com/".to_owned(),
        Some("uuid") => return "00000000-0000-4000-8000-000000000000".to_owned(),
        _ => {}
    }
    let least = schema.get("minLength").and_then(Value::as_u64).unwrap_or(0).min(65_536) as usize;
    let most = schema.get("maxLength").and_then(Value::as_u64).unwrap_or(64).max(least as u64) as usize;
    let mut text: String = hint.chars().take(most).collect();
    text.extend(std::iter::repeat_n('x', least.saturating_sub(text.chars().count())));
    text
}

fn integer(schema: &Value) -> i64 {
    let bound = |name: &str| schema.get(name).and_then(Value::as_f64).map(|bound| bound as i64);
    let least = bound("minimum").or(bound("exclusiveMinimum").map(|bound| bound.saturating_add(1)));
    let most = bound("maximum").or(bound("exclusiveMaximum").map(|bound| bound.saturating_sub(1)));
    let step = bound("multipleOf").filter(|step| *step > 0).unwrap_or(1);
    let wish = 7.max(least.unwrap_or(i64::MIN)).min(most.unwrap_or(i64::MAX));
    let rounded = wish - wish.rem_euclid(step);
    if least.is_some_and(|least| rounded < least) { rounded.saturating_add(step) } else { rounded }
}

fn number(schema: &Value) -> f64 {
    let bound = |name: &str| schema.get(name).and_then(Value::as_f64);
    let least = bound("minimum").or(bound("exclusiveMinimum").map(|bound| bound + 0.5));
    let most = bound("maximum").or(bound("exclusiveMaximum").map(|bound| bound - 0.5));
    let step = bound("multipleOf").filter(|step| *step > 0.0);
    let wish = 21.5_f64.max(least.unwrap_or(f64::MIN)).min(most.unwrap_or(f64::MAX));
    step.map_or(wish, |step| (wish / step).floor() * step)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_example_has_every_property_with_its_type() {
        let schema = json!({
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "unit": {"enum": ["C", "F"]},
                "days": {"type": "integer", "minimum": 10, "maximum": 12},
                "near": {"type": "array", "items": {"$ref": "#/$defs/place"}, "minItems": 2},
                "note": {"type": ["string", "null"], "maxLength": 3}
            },
            "$defs": {"place": {"type": "object", "properties": {"km": {"type": "number"}, "sea": {"type": "boolean"}}}}
        });
        let place = json!({"km": 21.5, "sea": true});
        assert_eq!(
            example(&schema, "Paris"),
            json!({"city": "Paris", "unit": "C", "days": 10, "near": [place, place], "note": "Par"})
        );
    }

    #[test]
    fn a_recursive_schema_ends() {
        let schema = json!({"type": "object", "properties": {"next": {"$ref": "#"}}});
        assert!(example(&schema, "x").is_object());
    }
}
