//! What sinks read in a line of the journal. Whatever else it has, and whatever it lacks, it leaves all the same.

use std::borrow::Cow;

use serde::Deserialize;

/// The members that sinks look at.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Line<'a> {
    pub(super) seq: u64,
    #[serde(borrow)]
    pub(super) kind: Cow<'a, str>,
    #[serde(borrow)]
    pub(super) at: Cow<'a, str>,
    #[serde(borrow)]
    pub(super) id: Option<Cow<'a, str>>,
    #[serde(borrow)]
    pub(super) outcome: Option<Cow<'a, str>>,
    pub(super) status: Option<i64>,
    #[serde(borrow)]
    pub(super) surface: Option<Cow<'a, str>>,
    #[serde(borrow)]
    pub(super) operation: Option<Cow<'a, str>>,
    #[serde(borrow)]
    pub(super) method: Option<Cow<'a, str>>,
    #[serde(borrow)]
    pub(super) principal: Option<Cow<'a, str>>,
    #[serde(borrow)]
    pub(super) tenant: Option<Cow<'a, str>>,
    #[serde(borrow)]
    pub(super) code: Option<Cow<'a, str>>,
    #[serde(borrow)]
    pub(super) act: Option<Cow<'a, str>>,
    #[serde(borrow)]
    pub(super) model: Model<'a>,
    #[serde(borrow)]
    pub(super) trace: Trace<'a>,
    #[serde(borrow)]
    pub(super) attempts: Vec<Attempt<'a>>,
    pub(super) usage: Usage,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Model<'a> {
    #[serde(borrow)]
    pub(super) asked: Option<Cow<'a, str>>,
    #[serde(borrow)]
    pub(super) used: Option<Cow<'a, str>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Trace<'a> {
    #[serde(borrow)]
    pub(super) id: Cow<'a, str>,
    #[serde(borrow)]
    pub(super) span: Cow<'a, str>,
    pub(super) sampled: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Attempt<'a> {
    #[serde(borrow)]
    pub(super) pool: Option<Cow<'a, str>>,
    #[serde(borrow)]
    pub(super) upstream: Option<Cow<'a, str>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Usage {
    pub(super) input_tokens: Option<u64>,
    pub(super) output_tokens: Option<u64>,
}

impl<'a> Line<'a> {
    /// Reads a line. Of one that is not as expected only what every line begins with is read, so that it is still
    /// known by its place; one that is none has nothing in it.
    pub(super) fn read(line: &'a [u8]) -> Self {
        serde_json::from_slice(line).unwrap_or_else(|_| Self::framed(line))
    }

    fn framed(line: &'a [u8]) -> Self {
        let text = line.utf8_chunks().next().map_or("", |chunk| chunk.valid());
        let text = if text.starts_with("{\"v\":") { text } else { "" };
        let member = |name: &str, end| Some(text.split_once(name)?.1.split_once(end)?.0);
        let seq = member(",\"seq\":", ',').and_then(|seq| seq.parse().ok()).unwrap_or_default();
        let word = |name| Cow::Borrowed(member(name, '"').unwrap_or_default());
        Self { seq, kind: word(",\"kind\":\""), at: word(",\"at\":\""), ..Self::default() }
    }

    /// What it is known by: a record's id, or its place in the journal.
    pub(super) fn key(&self, run: &str) -> String {
        match &self.id {
            Some(id) if self.kind == "request" => id.clone().into_owned(),
            _ => format!("{run}:{}", self.seq),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sink::tests::{LINE, OPEN};

    #[test]
    fn a_record_is_known_by_its_id_and_the_rest_by_its_place() {
        assert_eq!(Line::read(LINE.as_bytes()).key("R"), "0197-a");
        assert_eq!(Line::read(OPEN.as_bytes()).key("R"), "R:1");
    }

    #[test]
    fn numbers_beyond_all_bounds_take_nothing_from_a_line() {
        let line = LINE.replace(":12,", &format!(":{},", u64::MAX));
        let line = Line::read(line.as_bytes());
        assert_eq!((line.key("R").as_str(), line.usage.input_tokens), ("0197-a", Some(u64::MAX)));
    }

    #[test]
    fn a_line_that_is_not_as_expected_is_known_by_its_place() {
        for (from, to) in [(":12,", ":-1,"), ("\"ok\"", "{}"), ("\"chain\":\"00\"}", ""), ("0197-a", "\\ud800")] {
            let line = LINE.replace(from, to);
            let line = Line::read(line.as_bytes());
            assert_eq!((line.key("R").as_str(), line.kind.as_ref()), ("R:7", "request"), "{to}");
            assert_eq!(line.at, "2026-11-22T14:03:05.123456Z");
        }
    }

    #[test]
    fn what_is_no_line_has_nothing_in_it() {
        assert_eq!(Line::read(b"\xff{").kind, "");
    }
}
