//! From a schema as it is written to one that values are held against. What is not understood is an error, never ignored.

use std::collections::{BTreeMap, HashMap};

use regex_automata::meta::Regex;
use serde_json::{Map, Value};

use crate::guardrail::Wrong;

/// A schema, compiled.
#[derive(Debug)]
pub struct Schema {
    pub(super) nodes: Vec<Node>,
}

/// What one (sub)schema says. Absent means that it says nothing of that.
#[derive(Debug, Default)]
pub(super) struct Node {
    /// Nothing is right.
    pub never: bool,
    pub types: Option<Vec<Type>>,
    pub one_of_values: Option<(&'static str, Vec<Value>)>,
    pub reference: Option<usize>,
    pub all_of: Vec<usize>,
    pub any_of: Option<Vec<usize>>,
    pub one_of: Option<Vec<usize>>,
    pub not: Option<usize>,
    pub properties: BTreeMap<String, usize>,
    pub pattern_properties: Vec<(Regex, usize)>,
    pub additional_properties: Option<usize>,
    pub required: Vec<String>,
    pub prefix_items: Vec<usize>,
    pub items: Option<usize>,
    pub unique_items: bool,
    pub pattern: Option<Regex>,
    pub multiple_of: Option<f64>,
    pub numbers: Vec<(&'static str, Bound, f64)>,
    pub counts: Vec<(&'static str, Counted, Bound, u64)>,
}

/// The types of values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Type {
    Null,
    Boolean,
    Integer,
    Number,
    String,
    Array,
    Object,
}

/// Where a bound is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Bound {
    Least,
    Most,
    Above,
    Below,
}

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Counted {
    Letters,
    Items,
    Properties,
}

/// Keywords that say nothing of what a value may be.
const SILENT: [&str; 16] = [
    "title",
    "description",
    "default",
    "examples",
    "deprecated",
    "readOnly",
    "writeOnly",
    "format",
    "contentEncoding",
    "contentMediaType",
    "contentSchema",
    "$schema",
    "$id",
    "$comment",
    "$defs",
    "definitions",
];

const DEPTH_MAX: usize = 32;

/// How much one schema may cost.
#[derive(Clone, Copy, Debug)]
struct Bounds {
    nodes: usize,
    patterns: usize,
    pattern_bytes: usize,
}

const OURS: Bounds = Bounds { nodes: 10_000, patterns: 1_000, pattern_bytes: 1 << 20 };
const A_STRANGERS: Bounds = Bounds { nodes: 2_000, patterns: 16, pattern_bytes: 64 << 10 };

impl Schema {
    /// Compiles the policy's own.
    pub(super) fn compile(schema: &Value) -> Result<Self, Wrong> {
        Compiler::run(schema, OURS)
    }

    /// Compiles one that nobody vouches for.
    pub(super) fn of_a_stranger(schema: &Value) -> Result<Self, Wrong> {
        Compiler::run(schema, A_STRANGERS)
    }

    /// One by which nothing is right.
    pub(super) fn never() -> Self {
        Self { nodes: vec![Node { never: true, ..Node::default() }] }
    }

    /// Whether a value that begins with this byte can be right.
    pub(super) fn may_begin(&self, byte: u8) -> bool {
        let Some(types) = self.nodes[0].types.as_ref().filter(|_| !self.nodes[0].never) else {
            return !self.nodes[0].never;
        };
        types.iter().any(|one| match one {
            Type::Null => byte == b'n',
            Type::Boolean => matches!(byte, b't' | b'f'),
            Type::Integer | Type::Number => matches!(byte, b'-' | b'0'..=b'9'),
            Type::String => byte == b'"',
            Type::Array => byte == b'[',
            Type::Object => byte == b'{',
        })
    }
}

struct Compiler<'s> {
    root: &'s Value,
    bounds: Bounds,
    nodes: Vec<Node>,
    patterns: usize,
    /// Subschemas that something refers to.
    referred: HashMap<String, usize>,
}

impl<'s> Compiler<'s> {
    fn run(root: &'s Value, bounds: Bounds) -> Result<Schema, Wrong> {
        let mut compiler = Self { root, bounds, nodes: Vec::new(), patterns: 0, referred: HashMap::new() };
        compiler.node(root, "", 0)?;
        Ok(Schema { nodes: compiler.nodes })
    }

    /// Compiles a subschema; the number of its node.
    fn node(&mut self, schema: &'s Value, path: &str, depth: usize) -> Result<usize, Wrong> {
        if depth > DEPTH_MAX || self.nodes.len() >= self.bounds.nodes {
            let most = self.bounds.nodes;
            return Err((path.to_owned(), format!("it is deeper than {DEPTH_MAX} or has more than {most} schemas")));
        }
        let number = self.nodes.len();
        self.nodes.push(Node::default());
        if path.is_empty() {
            self.referred.insert(String::new(), number);
        }
        let mut node = Node::default();
        match schema {
            Value::Bool(right) => node.never = !right,
            Value::Object(keywords) => {
                for (keyword, value) in keywords {
                    let at = format!("{path}.{keyword}");
                    self.keyword(&mut node, keyword, value, &at, depth + 1)?;
                }
            }
            _ => return Err((path.to_owned(), "a schema is an object, true or false".to_owned())),
        }
        self.nodes[number] = node;
        Ok(number)
    }

    fn keyword(
        &mut self,
        node: &mut Node,
        keyword: &str,
        value: &'s Value,
        at: &str,
        depth: usize,
    ) -> Result<(), Wrong> {
        let told = |message: &str| (at.to_owned(), message.to_owned());
        match keyword {
            "type" => node.types = Some(types(value).map_err(|message| (at.to_owned(), message))?),
            "enum" => node.one_of_values = Some(("enum", list(value, at)?.clone())),
            "const" => node.one_of_values = Some(("const", vec![value.clone()])),
            "$ref" => node.reference = Some(self.reference(value, at, depth)?),
            "allOf" => node.all_of = self.nodes_of(value, at, depth)?,
            "anyOf" => node.any_of = Some(self.nodes_of(value, at, depth)?),
            "oneOf" => node.one_of = Some(self.nodes_of(value, at, depth)?),
            "not" => node.not = Some(self.node(value, at, depth)?),
            "properties" => {
                for (name, schema) in object(value, at)? {
                    let number = self.node(schema, &format!("{at}.{name}"), depth)?;
                    node.properties.insert(name.clone(), number);
                }
            }
            "patternProperties" => {
                for (name, schema) in object(value, at)? {
                    let regex = self.regex(name, at)?;
                    node.pattern_properties.push((regex, self.node(schema, &format!("{at}.{name}"), depth)?));
                }
            }
            "additionalProperties" => node.additional_properties = Some(self.node(value, at, depth)?),
            "required" => {
                let name = |value: &Value| value.as_str().map(str::to_owned).ok_or_else(|| told("it has names"));
                node.required = list(value, at)?.iter().map(name).collect::<Result<_, _>>()?;
            }
            "prefixItems" => node.prefix_items = self.nodes_of(value, at, depth)?,
            "items" if value.is_array() => return Err(told("a list of schemas is called prefixItems")),
            "items" => node.items = Some(self.node(value, at, depth)?),
            "uniqueItems" => node.unique_items = value.as_bool().ok_or_else(|| told("it is true or false"))?,
            "pattern" => {
                node.pattern = Some(self.regex(value.as_str().ok_or_else(|| told("it is a text"))?, at)?);
            }
            "multipleOf" => {
                let step = value.as_f64().filter(|step| *step > 0.0);
                node.multiple_of = Some(step.ok_or_else(|| told("it is a number above 0"))?);
            }
            _ if SILENT.contains(&keyword) => {}
            _ => return bound(node, keyword, value, at),
        }
        Ok(())
    }

    fn nodes_of(&mut self, value: &'s Value, at: &str, depth: usize) -> Result<Vec<usize>, Wrong> {
        let schemas = list(value, at)?;
        if schemas.is_empty() {
            return Err((at.to_owned(), "it needs at least one schema".to_owned()));
        }
        schemas.iter().enumerate().map(|(index, one)| self.node(one, &format!("{at}[{index}]"), depth)).collect()
    }

    /// A place in the same schema. Nothing is ever fetched.
    fn reference(&mut self, value: &Value, at: &str, depth: usize) -> Result<usize, Wrong> {
        let told = |message: &str| (at.to_owned(), message.to_owned());
        let text = value.as_str().ok_or_else(|| told("it is a text"))?;
        let pointer = text.strip_prefix('#').ok_or_else(|| told("only places in this schema: `#/$defs/...`"))?;
        if let Some(number) = self.referred.get(pointer) {
            return Ok(*number);
        }
        let target = self.root.pointer(pointer).ok_or_else(|| told("there is no such place in this schema"))?;
        // What is referred to may refer to itself: its number is known before it is compiled.
        self.referred.insert(pointer.to_owned(), self.nodes.len());
        self.node(target, at, depth)
    }

    fn regex(&mut self, pattern: &str, at: &str) -> Result<Regex, Wrong> {
        self.patterns += 1;
        if self.patterns > self.bounds.patterns {
            return Err((at.to_owned(), format!("there are more than {} patterns", self.bounds.patterns)));
        }
        let config = Regex::config().nfa_size_limit(Some(self.bounds.pattern_bytes)).hybrid_cache_capacity(64 << 10);
        let built = Regex::builder().configure(config).build(pattern);
        built.map_err(|error| (at.to_owned(), format!("it is no regular expression that can be used: {error}")))
    }
}

fn types(value: &Value) -> Result<Vec<Type>, String> {
    let one = |value: &Value| match value.as_str() {
        Some("null") => Ok(Type::Null),
        Some("boolean") => Ok(Type::Boolean),
        Some("integer") => Ok(Type::Integer),
        Some("number") => Ok(Type::Number),
        Some("string") => Ok(Type::String),
        Some("array") => Ok(Type::Array),
        Some("object") => Ok(Type::Object),
        _ => Err(format!("{value} is none of null, boolean, integer, number, string, array, object")),
    };
    match value {
        Value::Array(list) => list.iter().map(one).collect(),
        value => Ok(vec![one(value)?]),
    }
}

/// What bounds a number, or how many there are of something.
fn bound(node: &mut Node, keyword: &str, value: &Value, at: &str) -> Result<(), Wrong> {
    let told = |message: &str| (at.to_owned(), message.to_owned());
    let numbers = [
        ("minimum", Bound::Least),
        ("maximum", Bound::Most),
        ("exclusiveMinimum", Bound::Above),
        ("exclusiveMaximum", Bound::Below),
    ];
    let counts = [
        ("minLength", Counted::Letters, Bound::Least),
        ("maxLength", Counted::Letters, Bound::Most),
        ("minItems", Counted::Items, Bound::Least),
        ("maxItems", Counted::Items, Bound::Most),
        ("minProperties", Counted::Properties, Bound::Least),
        ("maxProperties", Counted::Properties, Bound::Most),
    ];
    if let Some((name, bound)) = numbers.into_iter().find(|(name, _)| *name == keyword) {
        node.numbers.push((name, bound, value.as_f64().ok_or_else(|| told("it is a number"))?));
        return Ok(());
    }
    if let Some((name, counted, bound)) = counts.into_iter().find(|(name, ..)| *name == keyword) {
        node.counts.push((name, counted, bound, value.as_u64().ok_or_else(|| told("it is a whole number"))?));
        return Ok(());
    }
    Err(told("this keyword is not supported: nobody would hold an answer against it"))
}

fn list<'v>(value: &'v Value, at: &str) -> Result<&'v Vec<Value>, Wrong> {
    value.as_array().ok_or_else(|| (at.to_owned(), "it is a list".to_owned()))
}

fn object<'v>(value: &'v Value, at: &str) -> Result<&'v Map<String, Value>, Wrong> {
    value.as_object().ok_or_else(|| (at.to_owned(), "it is an object".to_owned()))
}
