//! JSON as it comes: whether the bytes so far can still become a document.

/// Follows one document byte by byte.
#[derive(Debug)]
pub(super) struct Syntax {
    /// What is open: `{` or `[`.
    open: Vec<u8>,
    expects: Expects,
}

/// As deep as documents are read.
const DEPTH_MAX: usize = 120;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expects {
    Value,
    ValueOrEnd,
    Key,
    KeyOrEnd,
    Colon,
    CommaOrEnd,
    /// Within a string, which may be a key.
    Text {
        key: bool,
    },
    Escape {
        key: bool,
    },
    Hex {
        key: bool,
        left: u8,
    },
    /// The rest of `true`, `false` or `null`.
    Word(&'static [u8]),
    Number(Number),
    /// Only white space.
    Nothing,
}

/// What of a number has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Number {
    Minus,
    Zero,
    Digits,
    Dot,
    Fraction,
    E,
    Sign,
    Exponent,
}

impl Default for Syntax {
    fn default() -> Self {
        Self { open: Vec::new(), expects: Expects::Value }
    }
}

impl Syntax {
    /// Takes the next byte; whether it can still become a document whose first byte `begins`.
    pub(super) fn takes(&mut self, byte: u8, begins: impl Fn(u8) -> bool) -> bool {
        let is_first = self.open.is_empty() && self.expects == Expects::Value;
        let is_space = matches!(byte, b' ' | b'\n' | b'\r' | b'\t');
        if is_first && !is_space && !begins(byte) {
            return false;
        }
        let next = self.next(byte, is_space);
        self.expects = next.unwrap_or(self.expects);
        next.is_some()
    }

    fn next(&mut self, byte: u8, is_space: bool) -> Option<Expects> {
        use Expects::{Colon, CommaOrEnd, Escape, Hex, Key, KeyOrEnd, Nothing, Number, Text, Value, ValueOrEnd, Word};
        match self.expects {
            Text { key } => text(byte, key),
            Escape { key } => match byte {
                b'u' => Some(Hex { key, left: 4 }),
                b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't' => Some(Text { key }),
                _ => None,
            },
            Hex { key, left } => byte.is_ascii_hexdigit().then_some(match left {
                1 => Text { key },
                _ => Hex { key, left: left - 1 },
            }),
            Word([expected, rest @ ..]) if *expected == byte => {
                Some(if rest.is_empty() { CommaOrEnd } else { Word(rest) })
            }
            Word(_) => None,
            Number(number) => match number.next(byte) {
                Some(number) => Some(Number(number)),
                None if number.is_whole() => self.after(byte, is_space),
                None => None,
            },
            CommaOrEnd => self.after(byte, is_space),
            expects if is_space => Some(expects),
            Nothing => None,
            Colon => (byte == b':').then_some(Value),
            KeyOrEnd if byte == b'}' => self.close(byte),
            Key | KeyOrEnd => (byte == b'"').then_some(Text { key: true }),
            ValueOrEnd if byte == b']' => self.close(byte),
            Value | ValueOrEnd => self.value(byte),
        }
        .map(|next| if next == CommaOrEnd && self.open.is_empty() { Nothing } else { next })
    }

    fn value(&mut self, byte: u8) -> Option<Expects> {
        match byte {
            b'"' => Some(Expects::Text { key: false }),
            b'{' | b'[' if self.open.len() < DEPTH_MAX => {
                self.open.push(byte);
                Some(if byte == b'{' { Expects::KeyOrEnd } else { Expects::ValueOrEnd })
            }
            b't' => Some(Expects::Word(b"rue")),
            b'f' => Some(Expects::Word(b"alse")),
            b'n' => Some(Expects::Word(b"ull")),
            b'-' => Some(Expects::Number(Number::Minus)),
            b'0' => Some(Expects::Number(Number::Zero)),
            b'1'..=b'9' => Some(Expects::Number(Number::Digits)),
            _ => None,
        }
    }

    /// Behind a value.
    fn after(&mut self, byte: u8, is_space: bool) -> Option<Expects> {
        match (byte, self.open.last()) {
            _ if is_space => Some(Expects::CommaOrEnd),
            (b',', Some(b'{')) => Some(Expects::Key),
            (b',', Some(_)) => Some(Expects::Value),
            (b'}' | b']', Some(_)) => self.close(byte),
            _ => None,
        }
    }

    fn close(&mut self, byte: u8) -> Option<Expects> {
        let opened = self.open.pop()?;
        matches!((opened, byte), (b'{', b'}') | (b'[', b']')).then_some(Expects::CommaOrEnd)
    }
}

fn text(byte: u8, key: bool) -> Option<Expects> {
    match byte {
        b'"' if key => Some(Expects::Colon),
        b'"' => Some(Expects::CommaOrEnd),
        b'\\' => Some(Expects::Escape { key }),
        0..0x20 => None,
        _ => Some(Expects::Text { key }),
    }
}

impl Number {
    fn next(self, byte: u8) -> Option<Self> {
        use Number::{Digits, Dot, E, Exponent, Fraction, Minus, Sign, Zero};
        match (self, byte) {
            (Minus, b'0') => Some(Zero),
            (Minus, b'1'..=b'9') | (Digits, b'0'..=b'9') => Some(Digits),
            (Zero | Digits, b'.') => Some(Dot),
            (Dot | Fraction, b'0'..=b'9') => Some(Fraction),
            (Zero | Digits | Fraction, b'e' | b'E') => Some(E),
            (E, b'+' | b'-') => Some(Sign),
            (E | Sign | Exponent, b'0'..=b'9') => Some(Exponent),
            _ => None,
        }
    }

    fn is_whole(self) -> bool {
        matches!(self, Self::Zero | Self::Digits | Self::Fraction | Self::Exponent)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;

    fn survives(text: &[u8]) -> bool {
        let mut syntax = Syntax::default();
        text.iter().all(|byte| syntax.takes(*byte, |_| true))
    }

    #[test]
    fn every_beginning_of_a_document_survives() {
        let text = br#" {"a\u00e9\"":[1,-0.5e+3,true,false,null,{},[],"x\n"],"b":{"c":0}} "#;
        assert!((0..=text.len()).all(|end| survives(&text[..end])));
        assert!(serde_json::from_slice::<Value>(text).is_ok());
    }

    proptest! {
        #[test]
        fn what_is_json_survives_and_what_serde_gives_up_before_its_end_does_not(
            parts in proptest::collection::vec(proptest::sample::select(vec![
                "{", "}", "[", "]", ",", ":", "\"", "\"a\"", "\\", "\\u00e9", "1", "-", "0", ".5", "e", "true", "nul", "null", " ", "é",
            ]), 0..12)
        ) {
            let text = parts.concat();
            match serde_json::from_str::<Value>(&text) {
                Ok(_) => prop_assert!(survives(text.as_bytes())),
                Err(error) if error.is_eof() => {}
                Err(_) => prop_assert!(!survives(text.as_bytes()), "{}", text),
            }
        }
    }
}
