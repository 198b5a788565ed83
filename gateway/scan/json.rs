//! A strict walk over one JSON object that notes where the deciding fields stand.
//!
//! It checks the structure (RFC 8259) and looks inside nothing that it need not: a string is crossed with a
//! vectorised search for its closing quote. What a raw control character or broken UTF-8 inside a string
//! means is the upstream's to judge; it gets the same bytes.

use std::ops::Range;

use super::{Fault, Field, Scan};

/// As deep as `serde_json` goes by default.
const DEPTH_MAX: usize = 128;

pub(super) fn scan(body: &[u8]) -> Result<Scan, Fault> {
    let mut walk = Walk { body, at: 0 };
    let mut scan = Scan::default();
    walk.space();
    walk.members(|walk, key| {
        let field = walk.field(key.clone())?;
        let start = walk.at;
        walk.value(1)?;
        scan.put_template(&walk.body[key], start..walk.at);
        field.map_or(Ok(()), |field| scan.put(field, start..walk.at))
    })?;
    walk.space();
    if walk.at < body.len() { Err(walk.wrong("nothing may follow the object")) } else { Ok(scan) }
}

/// The members of the object at `span` of a body that has been scanned: their names, and where their values stand.
pub(super) fn members(body: &[u8], span: Range<usize>) -> Option<Vec<(String, Range<usize>)>> {
    let mut walk = Walk { body, at: span.start };
    let mut found = Vec::new();
    let walked = walk.members(|walk, key| {
        let name = serde_json::from_slice(&walk.body[key.start - 1..=key.end]);
        let name = name.map_err(|_| Fault::Malformed("a broken key", key.start))?;
        let start = walk.at;
        walk.value(2)?;
        found.push((name, start..walk.at));
        Ok(())
    });
    walked.ok().map(|()| found)
}

struct Walk<'a> {
    body: &'a [u8],
    at: usize,
}

impl Walk<'_> {
    /// `{"key": value, …}`: calls `member` at the start of each value, with the key's span inside its quotes.
    fn members(&mut self, mut member: impl FnMut(&mut Self, Range<usize>) -> Result<(), Fault>) -> Result<(), Fault> {
        self.expect(b'{', "an object must begin with {")?;
        self.space();
        if self.take(b'}') {
            return Ok(());
        }
        loop {
            let key = self.string()?;
            self.space();
            self.expect(b':', "a colon must follow the key")?;
            self.space();
            member(self, key)?;
            self.space();
            if self.take(b'}') {
                return Ok(());
            }
            self.expect(b',', "a comma or } must follow the value")?;
            self.space();
        }
    }

    fn elements(&mut self, depth: usize) -> Result<(), Fault> {
        self.at += 1;
        self.space();
        if self.take(b']') {
            return Ok(());
        }
        loop {
            self.value(depth)?;
            self.space();
            if self.take(b']') {
                return Ok(());
            }
            self.expect(b',', "a comma or ] must follow the value")?;
            self.space();
        }
    }

    fn value(&mut self, depth: usize) -> Result<(), Fault> {
        if depth > DEPTH_MAX {
            return Err(self.wrong("nested deeper than 128 levels"));
        }
        match self.peek() {
            Some(b'"') => self.string().map(drop),
            Some(b'{') => self.members(|walk, _| walk.value(depth + 1)),
            Some(b'[') => self.elements(depth + 1),
            Some(b't') => self.word(b"true"),
            Some(b'f') => self.word(b"false"),
            Some(b'n') => self.word(b"null"),
            Some(b'-' | b'0'..=b'9') => self.number(),
            _ => Err(self.wrong("a value was expected")),
        }
    }

    /// Crosses a string; returns what is between its quotes.
    fn string(&mut self) -> Result<Range<usize>, Fault> {
        self.expect(b'"', "a string must begin with a quote")?;
        let start = self.at;
        loop {
            let Some(found) = memchr::memchr2(b'"', b'\\', &self.body[self.at..]) else {
                return Err(Fault::Malformed("the string never ends", start));
            };
            self.at += found + 1;
            if self.body[self.at - 1] == b'"' {
                return Ok(start..self.at - 1);
            }
            self.escape()?;
        }
    }

    fn escape(&mut self) -> Result<(), Fault> {
        let hex =
            |walk: &Self| walk.body.get(walk.at + 1..walk.at + 5).is_some_and(|h| h.iter().all(u8::is_ascii_hexdigit));
        match self.peek() {
            Some(b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't') => self.at += 1,
            Some(b'u') if hex(self) => self.at += 5,
            _ => return Err(self.wrong("an unknown escape")),
        }
        Ok(())
    }

    /// `-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?`
    fn number(&mut self) -> Result<(), Fault> {
        self.take(b'-');
        if !self.take(b'0') {
            self.digits()?;
        }
        if self.take(b'.') {
            self.digits()?;
        }
        if self.take(b'e') || self.take(b'E') {
            let _sign = self.take(b'+') || self.take(b'-');
            self.digits()?;
        }
        Ok(())
    }

    fn digits(&mut self) -> Result<(), Fault> {
        let count = self.body[self.at..].iter().take_while(|byte| byte.is_ascii_digit()).count();
        self.at += count;
        if count == 0 { Err(self.wrong("a digit was expected")) } else { Ok(()) }
    }

    fn word(&mut self, word: &'static [u8]) -> Result<(), Fault> {
        if !self.body[self.at..].starts_with(word) {
            return Err(self.wrong("only true, false and null go without quotes"));
        }
        self.at += word.len();
        Ok(())
    }

    /// The deciding field that a key names, its escapes read.
    fn field(&self, key: Range<usize>) -> Result<Option<Field>, Fault> {
        let raw = &self.body[key.clone()];
        if !raw.contains(&b'\\') {
            return Ok(Field::named(raw));
        }
        let token = &self.body[key.start - 1..=key.end];
        let name: String = serde_json::from_slice(token).map_err(|_| Fault::Malformed("a broken key", key.start))?;
        Ok(Field::named(name.as_bytes()))
    }

    fn space(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\t' | b'\n' | b'\r')) {
            self.at += 1;
        }
    }

    fn expect(&mut self, byte: u8, what: &'static str) -> Result<(), Fault> {
        if self.take(byte) { Ok(()) } else { Err(self.wrong(what)) }
    }

    fn take(&mut self, byte: u8) -> bool {
        let here = self.peek() == Some(byte);
        self.at += usize::from(here);
        here
    }

    fn peek(&self) -> Option<u8> {
        self.body.get(self.at).copied()
    }

    fn wrong(&self, what: &'static str) -> Fault {
        Fault::Malformed(what, self.at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_accepts_what_serde_json_accepts_and_refuses_what_it_refuses() {
        let cases = [
            "{}",
            " { } ",
            "{\"a\":[]}",
            "{\"a\":[1,-0.5e+3,null,true,\"x\\u00e9\\n\"]}",
            "{\"a\":{\"b\":{}}}",
            "",
            "[]",
            "{",
            "{\"a\"}",
            "{\"a\":}",
            "{\"a\":1,}",
            "{\"a\":01}",
            "{\"a\":1.}",
            "{\"a\":+1}",
            "{\"a\":tru}",
            "{\"a\":\"\\x\"}",
            "{\"a\":\"\\u12\"}",
            "{\"a\":\"",
            "{a:1}",
            "{\"a\":1}x",
            "{\"a\":[1,]}",
            "{\"a\":[1 2]}",
            "{'a':1}",
            "{\"a\":1e}",
            "{\"a\":-}",
            "{\"a\" 1}",
            "nul",
            "{\"a\":.5}",
        ];
        for case in cases {
            let object = serde_json::from_str::<serde_json::Map<String, serde_json::Value>>(case);
            assert_eq!(scan(case.as_bytes()).is_ok(), object.is_ok(), "{case}");
        }
    }

    #[test]
    fn depth_is_bounded() {
        let nested = |levels: usize| format!("{{\"a\":{}{}}}", "[".repeat(levels), "]".repeat(levels));
        assert!(scan(nested(100).as_bytes()).is_ok());
        let deep = scan(nested(100_000).as_bytes()).unwrap_err();
        assert!(deep.to_string().contains("128 levels"), "{deep}");
    }

    #[test]
    fn a_field_sent_twice_is_refused_however_it_is_spelt() {
        let twice = scan(br#"{"model":"a","m\u006fdel":"b"}"#);
        assert_eq!(twice, Err(Fault::Twice(Field::Model)));
    }

    #[test]
    fn case_variants_and_inner_fields_are_not_the_field() {
        let found = scan(br#"{"Model":"a","MODEL":"b","x":{"model":"c"},"stream":true}"#).unwrap();
        assert_eq!(found.span(Field::Model), None);
        assert_eq!(found.span(Field::Stream), Some(52..56));
    }

    #[test]
    fn a_fault_says_where() {
        assert_eq!(scan(b"{\"a\":1 \"b\":2}"), Err(Fault::Malformed("a comma or } must follow the value", 7)));
    }
}
