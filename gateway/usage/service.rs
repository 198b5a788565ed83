//! The class of service that an answer had, where it stands beside the report: `"service_tier":"flex"`.
//!
//! An answer may repeat what its request held, deeper; only the answer's own word counts. So every brace is followed,
//! which costs time; it is done only where a price depends on it. A stream's last word counts: the first may be what
//! was asked for.

use memchr::memchr3;

use super::ServiceTier;

/// Looks for one key at one depth, across pieces.
#[derive(Clone, Debug)]
pub(super) struct Service {
    /// The last word so far.
    pub(super) found: Option<ServiceTier>,
    /// How many braces are open around the key.
    level: u32,
    /// Whether every line begins anew, as the events of a stream do.
    lines: bool,
    depth: u32,
    inside: Inside,
    /// What has been read of the string, as far as it may matter.
    text: [u8; 16],
    length: usize,
    /// What came before.
    after: After,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Inside {
    Structure,
    String,
    Escape,
}

/// What the next string would be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum After {
    Anything,
    /// Behind the key.
    Key,
    /// Behind the key and its colon.
    Colon,
}

const KEY: &[u8] = b"service_tier";

impl Service {
    pub(super) fn at(level: u32, lines: bool) -> Self {
        Self {
            found: None,
            level,
            lines,
            depth: 0,
            inside: Inside::Structure,
            text: [0; 16],
            length: 0,
            after: After::Anything,
        }
    }

    pub(super) fn push(&mut self, piece: &[u8]) {
        let mut rest = piece;
        while let Some((&byte, behind)) = rest.split_first() {
            if self.inside == Inside::String {
                let end = memchr3(b'"', b'\\', b'\n', rest).unwrap_or(rest.len());
                self.keep(&rest[..end]);
                rest = &rest[end..];
                if let Some((&byte, behind)) = rest.split_first() {
                    self.step(byte);
                    rest = behind;
                }
            } else {
                self.step(byte);
                rest = behind;
            }
        }
    }

    fn step(&mut self, byte: u8) {
        match (self.inside, byte) {
            (_, b'\n' | b'\r') if self.lines => *self = Self { found: self.found, ..Self::at(self.level, true) },
            (Inside::String, b'"') => self.string(),
            (Inside::String, b'\\') => self.inside = Inside::Escape,
            (Inside::String, _) => {}
            (Inside::Escape, _) => {
                // No word that matters has one.
                self.length = self.text.len() + 1;
                self.inside = Inside::String;
            }
            (Inside::Structure, b'"') => {
                self.inside = Inside::String;
                self.length = 0;
            }
            (Inside::Structure, b'{') => self.depth = self.depth.saturating_add(1),
            (Inside::Structure, b'}') => self.depth = self.depth.saturating_sub(1),
            (Inside::Structure, b':') if self.after == After::Key => return self.after = After::Colon,
            (Inside::Structure, byte) if byte.is_ascii_whitespace() => return,
            (Inside::Structure, _) => {}
        }
        if self.inside == Inside::Structure && byte != b'"' {
            self.after = After::Anything;
        }
    }

    fn keep(&mut self, text: &[u8]) {
        let free = self.text.get_mut(self.length..).unwrap_or_default();
        let kept = free.len().min(text.len());
        free[..kept].copy_from_slice(&text[..kept]);
        self.length = (self.length + text.len()).min(self.text.len() + 1);
    }

    /// A string ends.
    fn string(&mut self) {
        let text = self.text.get(..self.length).unwrap_or_default();
        if self.after == After::Colon {
            self.found = Some(ServiceTier::named(text));
        }
        self.after = if self.depth == self.level && text == KEY { After::Key } else { After::Anything };
        self.inside = Inside::Structure;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(level: u32, lines: bool, text: &str) -> Option<ServiceTier> {
        let mut whole = Service::at(level, lines);
        whole.push(text.as_bytes());
        for cut in 0..=text.len() {
            let (one, other) = text.as_bytes().split_at(cut);
            let mut parts = Service::at(level, lines);
            parts.push(one);
            parts.push(other);
            assert_eq!(parts.found, whole.found, "cut at {cut}");
        }
        whole.found
    }

    #[test]
    fn only_the_answers_own_last_word_counts() {
        use ServiceTier::{Default, Flex, Other, Priority};
        assert_eq!(found(1, false, r#"{"a":{"service_tier":"flex"},"service_tier" : "priority"}"#), Some(Priority));
        assert_eq!(found(1, false, r#"{"a":{"service_tier":"flex"}}"#), None);
        assert_eq!(found(1, false, r#"{"content":"\"service_tier\":\"flex\"","x":"service_tier"}"#), None);
        assert_eq!(found(1, false, r#"{"a":["service_tier","flex"],"service_tier":null,"b":"flex"}"#), None);
        assert_eq!(found(1, false, r#"{"service_tier":{"x":"flex"}}"#), None);
        assert_eq!(found(1, false, r#"{"service_tier":"a_class_that_nobody_knows"}"#), Some(Other));
        assert_eq!(found(1, false, "{\n \"service_tier\": \"standard\"\n}"), Some(Default));
        let stream = "data: {\"x\":{\"service_tier\":\"auto\"},\"open\":{{{\n\ndata: {\"service_tier\":\"flex\"}\n\n";
        assert_eq!(found(1, true, stream), Some(Flex));
        assert_eq!(
            found(1, true, &format!("data: {{\"service_tier\":\"auto\"}}\n\n{stream}data: [DONE]\n\n")),
            Some(Flex)
        );
        assert_eq!(found(2, true, "data: {\"response\":{\"service_tier\":\"flex\"}}\r\n\r\n"), Some(Flex));
        assert_eq!(found(2, true, "data: {\"response\":{\"metadata\":{\"service_tier\":\"flex\"}}}\n\n"), None);
    }
}
