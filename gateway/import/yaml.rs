//! YAML as people would write it: what fits on a line stands on one.

use std::fmt::Write;

use serde_json::Value;

/// The longest line.
const WIDTH: usize = 110;

/// A value whose members keep their order.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Yaml {
    /// Written as it is.
    Word(String),
    List(Vec<Yaml>),
    Map(Vec<(String, Yaml)>),
}

impl Yaml {
    /// A word that needs no quotes.
    pub fn word(word: &str) -> Self {
        Self::Word(word.to_owned())
    }

    /// Any text, in quotes where it needs them.
    pub fn text(text: &str) -> Self {
        Self::Word(if is_plain(text) { text.to_owned() } else { Value::from(text).to_string() })
    }

    pub fn number(number: u64) -> Self {
        Self::Word(number.to_string())
    }

    pub fn texts<'t>(texts: impl IntoIterator<Item = &'t str>) -> Self {
        Self::List(texts.into_iter().map(Self::text).collect())
    }

    /// A mapping of what there is.
    pub fn map<'k>(members: impl IntoIterator<Item = (&'k str, Option<Self>)>) -> Self {
        let there = members.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?)));
        Self::Map(there.collect())
    }

    /// It on one line.
    pub fn flow(&self) -> String {
        match self {
            Self::Word(word) => word.clone(),
            Self::List(items) => format!("[{}]", items.iter().map(Self::flow).collect::<Vec<_>>().join(", ")),
            Self::Map(members) => {
                let members = members.iter().map(|(key, value)| format!("{}: {}", key_text(key), value.flow()));
                format!("{{{}}}", members.collect::<Vec<_>>().join(", "))
            }
        }
    }

    /// It as a section of a file.
    pub fn section(&self, name: &str, out: &mut String) {
        match self {
            Self::Word(_) => drop(writeln!(out, "\n{name}: {}", self.flow())),
            _ => {
                let _ = writeln!(out, "\n{name}:");
                self.block(2, out);
            }
        }
    }

    fn block(&self, indent: usize, out: &mut String) {
        match self {
            Self::Word(word) => drop(writeln!(out, "{:indent$}{word}", "")),
            Self::Map(members) => members.iter().for_each(|(key, value)| value.member(key, indent, out)),
            Self::List(items) => items.iter().for_each(|item| item.item(indent, out)),
        }
    }

    fn member(&self, key: &str, indent: usize, out: &mut String) {
        let (key, flow) = (key_text(key), self.flow());
        if self.is_small() && indent + key.len() + 2 + flow.len() <= WIDTH {
            let _ = writeln!(out, "{:indent$}{key}: {flow}", "");
            return;
        }
        let _ = writeln!(out, "{:indent$}{key}:", "");
        self.block(indent + 2, out);
    }

    fn item(&self, indent: usize, out: &mut String) {
        let flow = self.flow();
        if indent + 2 + flow.len() <= WIDTH || matches!(self, Self::Word(_)) {
            let _ = writeln!(out, "{:indent$}- {flow}", "");
            return;
        }
        // The first line of the block, with the dash in front of it.
        let mut block = String::new();
        self.block(indent + 2, &mut block);
        let _ = write!(out, "{:indent$}- {}", "", block.trim_start());
    }

    /// Whether people would put it on its key's line: nothing in it has mappings of its own.
    fn is_small(&self) -> bool {
        let flat = |value: &Self| match value {
            Self::Word(_) => true,
            Self::List(items) => items.iter().all(|item| matches!(item, Self::Word(_))),
            Self::Map(_) => false,
        };
        match self {
            Self::Word(_) => true,
            Self::List(items) => items.is_empty() || items.iter().all(flat),
            Self::Map(members) => members.iter().all(|(_, value)| flat(value)),
        }
    }
}

/// A key as people write it: here only `true` and `false` are not themselves.
fn key_text(key: &str) -> String {
    if key == "on" { key.to_owned() } else { Yaml::text(key).flow() }
}

/// Whether a text means itself without quotes, wherever it stands.
fn is_plain(text: &str) -> bool {
    let word = |byte: u8| byte.is_ascii_alphanumeric() || b"_./-".contains(&byte);
    let reserved = ["true", "false", "null", "yes", "no", "on", "off", "y", "n"];
    text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '/')
        && text.bytes().all(word)
        && !reserved.contains(&text.to_ascii_lowercase().as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back_whatever_the_text() {
        let texts =
            ["no", "1e5", "a: b", "é\n\t\"", "*", "", "{x}", "- a", "gpt-4.1", "0x1", "~", "a #b", "/v1", ".inf"];
        let long = Yaml::texts(std::iter::repeat_n("a-rather-long-word", 12));
        let texts_member = Some(Yaml::texts(texts));
        let inner = Yaml::map([("long", Some(long)), ("no", Some(Yaml::text("off"))), ("none", None)]);
        let list = Yaml::List(vec![inner.clone(), Yaml::Map(Vec::new()), Yaml::List(Vec::new())]);
        let mut out = String::new();
        Yaml::map([("texts", texts_member), ("list", Some(list))]).section("top", &mut out);
        let read: Value = serde_saphyr::from_str(&out).unwrap();
        assert_eq!(read["top"]["texts"], serde_json::json!(texts), "{out}");
        assert_eq!(read["top"]["list"][0]["long"].as_array().unwrap().len(), 12, "{out}");
        assert_eq!(read["top"]["list"][0]["no"], "off");
        assert_eq!(read["top"]["list"][1], serde_json::json!({}));
        assert!(out.lines().all(|line| line.len() <= WIDTH), "{out}");
    }
}
