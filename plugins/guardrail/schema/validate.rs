//! A value held against a schema, within bounds: a stranger's schema may ask for more work than anybody has.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

use super::compile::{Bound, Counted, Node, Schema, Type};

/// So many comparisons, and nobody goes on.
const STEPS_MAX: u64 = 200_000;
/// As deep as subschemas stand in one another, references followed.
const DEPTH_MAX: u32 = 200;

const TOO_COMPLEX: &str = "too_complex";

impl Schema {
    /// The keyword that `text` breaks, if it is not what the schema says.
    pub(super) fn validate(&self, text: &str) -> Result<(), &'static str> {
        let mut json = serde_json::Deserializer::from_str(text);
        let value = Strict.deserialize(&mut json).and_then(|value| json.end().map(|()| value));
        let value = value.map_err(|error| if error.to_string().starts_with(TWICE) { TWICE } else { "not_json" })?;
        Work { nodes: &self.nodes, steps: STEPS_MAX }.node(0, &value, 0)
    }
}

const TWICE: &str = "duplicate_key";

/// Reads a value in which no key stands twice: two readers could disagree on which one counts.
#[derive(Clone, Copy)]
struct Strict;

impl<'de> DeserializeSeed<'de> for Strict {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Strict {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Value, E> {
        Number::from_f64(value).map(Value::Number).ok_or_else(|| E::custom("no number"))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element_seed(self)? {
            list.push(item);
        }
        Ok(Value::Array(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<Value, A::Error> {
        let mut map = Map::new();
        while let Some(key) = members.next_key::<String>()? {
            if map.insert(key, members.next_value_seed(self)?).is_some() {
                return Err(A::Error::custom(TWICE));
            }
        }
        Ok(Value::Object(map))
    }
}

type Held = Result<(), &'static str>;

fn keyword(name: &'static str, holds: bool) -> Held {
    if holds { Ok(()) } else { Err(name) }
}

struct Work<'s> {
    nodes: &'s [Node],
    steps: u64,
}

impl Work<'_> {
    fn step(&mut self, steps: usize) -> Held {
        self.steps = self.steps.checked_sub(steps as u64 + 1).ok_or(TOO_COMPLEX)?;
        Ok(())
    }

    fn node(&mut self, number: usize, value: &Value, depth: u32) -> Held {
        self.step(0)?;
        if depth > DEPTH_MAX {
            return Err(TOO_COMPLEX);
        }
        let nodes = self.nodes;
        let node = &nodes[number];
        keyword("false", !node.never)?;
        keyword("type", node.types.as_ref().is_none_or(|types| types.iter().any(|one| is(*one, value))))?;
        if let Some((name, values)) = &node.one_of_values {
            self.step(values.len())?;
            keyword(name, values.iter().any(|one| same(one, value)))?;
        }
        self.combined(node, value, depth + 1)?;
        match value {
            Value::Object(members) => self.members(node, members, depth + 1),
            Value::Array(items) => self.items(node, items, depth + 1),
            Value::String(text) => string(node, text),
            Value::Number(number) => of_number(node, number),
            Value::Null | Value::Bool(_) => Ok(()),
        }
    }

    /// Whether it is right by another schema. Work that does not end is no answer.
    fn is_right(&mut self, number: usize, value: &Value, depth: u32) -> Result<bool, &'static str> {
        match self.node(number, value, depth) {
            Ok(()) => Ok(true),
            Err(TOO_COMPLEX) => Err(TOO_COMPLEX),
            Err(_) => Ok(false),
        }
    }

    fn combined(&mut self, node: &Node, value: &Value, depth: u32) -> Held {
        for number in node.reference.iter().chain(&node.all_of) {
            self.node(*number, value, depth)?;
        }
        if let Some(number) = node.not {
            keyword("not", !self.is_right(number, value, depth)?)?;
        }
        if let Some(numbers) = &node.any_of {
            let mut any = false;
            for number in numbers {
                any = any || self.is_right(*number, value, depth)?;
            }
            keyword("anyOf", any)?;
        }
        if let Some(numbers) = &node.one_of {
            let mut count = 0;
            for number in numbers {
                count += usize::from(self.is_right(*number, value, depth)?);
            }
            keyword("oneOf", count == 1)?;
        }
        Ok(())
    }

    fn members(&mut self, node: &Node, members: &Map<String, Value>, depth: u32) -> Held {
        counted(node, Counted::Properties, members.len() as u64)?;
        self.step(node.required.len())?;
        keyword("required", node.required.iter().all(|name| members.contains_key(name)))?;
        for (name, value) in members {
            let mut known = false;
            if let Some(number) = node.properties.get(name) {
                known = true;
                self.node(*number, value, depth)?;
            }
            for (regex, number) in &node.pattern_properties {
                self.step(name.len())?;
                if regex.is_match(name) {
                    known = true;
                    self.node(*number, value, depth)?;
                }
            }
            if let Some(number) = node.additional_properties.filter(|_| !known) {
                let nothing = self.nodes[number].never;
                self.node(number, value, depth)
                    .map_err(|wrong| if nothing { "additionalProperties" } else { wrong })?;
            }
        }
        Ok(())
    }

    fn items(&mut self, node: &Node, items: &[Value], depth: u32) -> Held {
        counted(node, Counted::Items, items.len() as u64)?;
        for (index, item) in items.iter().enumerate() {
            if let Some(number) = node.prefix_items.get(index).copied().or(node.items) {
                self.node(number, item, depth)?;
            }
        }
        if node.unique_items {
            self.step(items.len().saturating_mul(items.len()) / 2)?;
            let again = |(index, item): (usize, &Value)| items[..index].iter().any(|other| same(other, item));
            keyword("uniqueItems", !items.iter().enumerate().any(again))?;
        }
        Ok(())
    }
}

fn string(node: &Node, text: &str) -> Held {
    counted(node, Counted::Letters, text.chars().count() as u64)?;
    keyword("pattern", node.pattern.as_ref().is_none_or(|pattern| pattern.is_match(text)))
}

fn of_number(node: &Node, number: &Number) -> Held {
    let Some(is) = number.as_f64() else { return Ok(()) };
    for (name, bound, limit) in &node.numbers {
        keyword(
            name,
            match bound {
                Bound::Least => is >= *limit,
                Bound::Most => is <= *limit,
                Bound::Above => is > *limit,
                Bound::Below => is < *limit,
            },
        )?;
    }
    // 0.3 is three times 0.1, whatever binary fractions say.
    let divides = |step: f64| (is / step - (is / step).round()).abs() < 1e-9;
    keyword("multipleOf", node.multiple_of.is_none_or(divides))
}

fn counted(node: &Node, what: Counted, count: u64) -> Held {
    for (name, _, bound, limit) in node.counts.iter().filter(|(_, counted, ..)| *counted == what) {
        keyword(name, if *bound == Bound::Least { count >= *limit } else { count <= *limit })?;
    }
    Ok(())
}

fn is(one: Type, value: &Value) -> bool {
    match (one, value) {
        (Type::Null, Value::Null)
        | (Type::Boolean, Value::Bool(_))
        | (Type::Number, Value::Number(_))
        | (Type::String, Value::String(_))
        | (Type::Array, Value::Array(_))
        | (Type::Object, Value::Object(_)) => true,
        (Type::Integer, Value::Number(number)) => {
            number.is_i64() || number.is_u64() || number.as_f64().is_some_and(|number| number.fract() == 0.0)
        }
        _ => false,
    }
}

/// Whether two values are the same; 1 and 1.0 are.
fn same(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Number(x), Value::Number(y)) => {
            x == y || ((x.is_f64() || y.is_f64()) && x.as_f64().is_some() && x.as_f64() == y.as_f64())
        }
        (Value::Array(x), Value::Array(y)) => x.len() == y.len() && x.iter().zip(y).all(|(x, y)| same(x, y)),
        (Value::Object(x), Value::Object(y)) => {
            x.len() == y.len() && x.iter().all(|(key, value)| y.get(key).is_some_and(|other| same(value, other)))
        }
        _ => a == b,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn broken(schema: &str, text: &str) -> Option<&'static str> {
        Schema::compile(&serde_json::from_str(schema).unwrap()).unwrap().validate(text).err()
    }

    #[test]
    fn every_keyword_finds_what_breaks_it() {
        for (schema, right, wrong, name) in [
            ("true", "1", "1 2", "not_json"),
            (r#"{"type":["integer","null"]}"#, "2.0", "2.5", "type"),
            (r#"{"enum":[1,"a",{"b":[2]}]}"#, r#"{"b":[2.0]}"#, r#"{"b":[3]}"#, "enum"),
            (r#"{"const":null}"#, "null", "0", "const"),
            (r#"{"required":["a"]}"#, r#"{"a":1}"#, "{}", "required"),
            (r#"{"properties":{"a":{"type":"string"}}}"#, r#"{"a":"x","b":1}"#, r#"{"a":1}"#, "type"),
            (r#"{"patternProperties":{"^x":{"const":1}}}"#, r#"{"x1":1,"y":2}"#, r#"{"x1":2}"#, "const"),
            (
                r#"{"patternProperties":{"^x":true},"additionalProperties":false}"#,
                r#"{"x":1}"#,
                r#"{"y":1}"#,
                "additionalProperties",
            ),
            (r#"{"additionalProperties":{"type":"null"}}"#, r#"{"a":null}"#, r#"{"a":1}"#, "type"),
            (r#"{"minProperties":1}"#, r#"{"a":1}"#, "{}", "minProperties"),
            (r#"{"maxProperties":1}"#, r#"{"a":1}"#, r#"{"a":1,"b":2}"#, "maxProperties"),
            (r#"{"items":{"type":"null"}}"#, "[null]", "[null,1]", "type"),
            (r#"{"prefixItems":[{"const":1}],"items":false}"#, "[1]", "[1,2]", "false"),
            (r#"{"minItems":2}"#, "[1,2]", "[1]", "minItems"),
            (r#"{"maxItems":1}"#, "[1]", "[1,2]", "maxItems"),
            (r#"{"uniqueItems":true}"#, "[1,2]", "[1,2,1.0]", "uniqueItems"),
            (r#"{"minLength":2}"#, "\"éé\"", "\"é\"", "minLength"),
            (r#"{"maxLength":1}"#, "\"é\"", "\"éé\"", "maxLength"),
            (r#"{"pattern":"^a+$"}"#, "\"aa\"", "\"ab\"", "pattern"),
            (r#"{"minimum":1}"#, "1", "0.9", "minimum"),
            (r#"{"maximum":1}"#, "1", "1.1", "maximum"),
            (r#"{"exclusiveMinimum":1}"#, "1.1", "1", "exclusiveMinimum"),
            (r#"{"exclusiveMaximum":1}"#, "0.9", "1", "exclusiveMaximum"),
            (r#"{"multipleOf":0.1}"#, "0.3", "0.35", "multipleOf"),
            (r#"{"allOf":[{"minimum":1},{"maximum":2}]}"#, "2", "3", "maximum"),
            (r#"{"anyOf":[{"const":1},{"const":2}]}"#, "2", "3", "anyOf"),
            (r#"{"oneOf":[{"minimum":1},{"minimum":2}]}"#, "1", "3", "oneOf"),
            (r#"{"not":{"type":"null"}}"#, "1", "null", "not"),
            (r##"{"$ref":"#/$defs/a","$defs":{"a":{"const":1}}}"##, "1", "2", "const"),
            (
                r##"{"properties":{"next":{"$ref":"#"}},"required":["n"]}"##,
                r#"{"n":1,"next":{"n":2}}"#,
                r#"{"n":1,"next":{}}"#,
                "required",
            ),
            (r#"{"format":"email","title":"x"}"#, "\"no\"", "{\"a\":1,\"a\":2}", "duplicate_key"),
        ] {
            assert_eq!((broken(schema, right), broken(schema, wrong)), (None, Some(name)), "{schema}");
        }
    }

    #[test]
    fn work_without_end_is_given_up() {
        assert_eq!(broken(r##"{"$ref":"#"}"##, "1"), Some(TOO_COMPLEX));
        let items: Vec<String> = (0..1_000).map(|n| n.to_string()).collect();
        assert_eq!(broken(r#"{"uniqueItems":true}"#, &format!("[{}]", items.join(","))), Some(TOO_COMPLEX));
    }
}
