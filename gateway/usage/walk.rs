//! How deep a byte of JSON stands, counted from where the walk began. Only braces count: a report is an object's.

use memchr::memchr2;

/// Follows one JSON text across its pieces.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Walk {
    /// Braces opened less braces closed.
    pub(super) level: i64,
    /// The lowest level since it was last set.
    pub(super) lowest: i64,
    inside: Inside,
}

/// What the next byte is part of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Inside {
    #[default]
    Structure,
    String,
    Escape,
}

impl Walk {
    /// Goes over all of `text`.
    pub(super) fn over(&mut self, text: &[u8]) {
        self.close(text, i64::MIN);
    }

    /// Goes behind the brace with which the level falls to `level`, or over all of `text` if there is none.
    pub(super) fn close(&mut self, text: &[u8], level: i64) -> Option<usize> {
        let mut at = 0;
        while let Some(&byte) = text.get(at) {
            at += 1;
            match (self.inside, byte) {
                (Inside::Structure, b'}') => {
                    self.level -= 1;
                    self.lowest = self.lowest.min(self.level);
                    if self.level == level {
                        return Some(at);
                    }
                }
                (Inside::Structure, b'{') => self.level += 1,
                (Inside::Structure, b'"') => self.inside = Inside::String,
                (Inside::Structure, _) => {}
                (Inside::Escape, _) => self.inside = Inside::String,
                (Inside::String, _) => at = self.string(text, at - 1),
            }
        }
        None
    }

    /// Goes behind the end of a string, or into an escape in it.
    fn string(&mut self, text: &[u8], from: usize) -> usize {
        let Some(found) = memchr2(b'"', b'\\', &text[from..]) else { return text.len() };
        let at = from + found;
        self.inside = if text[at] == b'"' { Inside::Structure } else { Inside::Escape };
        at + 1
    }
}
