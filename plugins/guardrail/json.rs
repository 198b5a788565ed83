//! Text inside JSON: judged decoded, edited encoded.
//!
//! A [`Decoder`] takes the bytes of JSON as they come, cut anywhere (within `\u00e9`, between the halves of a surrogate
//! pair, within a letter), gives the text that they stand for, and remembers which bytes stand for which text. An edit
//! of the text then becomes edits of the bytes that keep the JSON whole ([`Decoder::edits`]). It never fails: what is no
//! JSON is judged as it stands.
//!
//! - [`Decoder::string`] is within one string from its first byte on: a delta's content.
//! - [`Decoder::document`] begins outside: the arguments of a tool, once they are unquoted. Names, values and structure
//!   are one text, so that `"password": "..."` is read as a whole; only what stands in strings is replaced. In a bare
//!   number each digit becomes a 9, since JSON has no other way to say nothing of it.
//! - [`Nested`] is a document within a string, as the wire has such arguments.

use std::collections::VecDeque;

use super::stream::Edit;

/// Decodes JSON as it comes.
#[derive(Clone, Debug)]
pub struct Decoder {
    document: bool,
    in_string: bool,
    /// Bytes that do not make a letter yet.
    pending: Vec<u8>,
    runs: VecDeque<Run>,
    decoded: u64,
    encoded: u64,
}

/// Bytes that stand for text.
#[derive(Clone, Debug)]
struct Run {
    decoded: u64,
    encoded: u64,
    decoded_len: u64,
    encoded_len: u64,
    part: Part,
}

#[derive(Clone, Debug, PartialEq)]
enum Part {
    /// Within a string.
    Text,
    /// Outside: what stands there.
    Bare(String),
    /// Outside: signs that nobody may touch.
    Structure,
}

impl Run {
    fn end(&self) -> u64 {
        self.decoded + self.decoded_len
    }

    /// Where a place in its text stands in its bytes. One escape is one letter: there is no place within.
    fn encoded_at(&self, decoded: u64) -> u64 {
        match decoded.saturating_sub(self.decoded) {
            0 => self.encoded,
            offset if offset >= self.decoded_len => self.encoded + self.encoded_len,
            offset => self.encoded + offset,
        }
    }
}

/// One letter of a string, and how many bytes stand for it.
enum Unit {
    One(char, usize),
    More,
}

impl Decoder {
    /// Begins within a string.
    pub fn string() -> Self {
        Self::new(false)
    }

    /// Begins before a document.
    pub fn document() -> Self {
        Self::new(true)
    }

    fn new(document: bool) -> Self {
        let (pending, runs) = (Vec::new(), VecDeque::new());
        Self { document, in_string: !document, pending, runs, decoded: 0, encoded: 0 }
    }

    /// Takes the next bytes and adds what they stand for.
    pub fn push(&mut self, bytes: &[u8], text: &mut String) {
        if self.pending.is_empty() {
            let done = self.decode(bytes, text);
            self.pending.extend_from_slice(&bytes[done..]);
            return;
        }
        let mut all = std::mem::take(&mut self.pending);
        all.extend_from_slice(bytes);
        let done = self.decode(&all, text);
        all.drain(..done);
        self.pending = all;
    }

    /// There are no more bytes: what is left of a letter counts as one that nobody knows.
    pub fn finish(&mut self, text: &mut String) {
        let left = std::mem::take(&mut self.pending);
        if !left.is_empty() {
            self.letter(char::REPLACEMENT_CHARACTER, left.len(), text);
        }
    }

    /// How much text there is.
    pub fn decoded(&self) -> u64 {
        self.decoded
    }

    /// Where the bytes begin that stand for the text from `decoded` on; all before may leave where that text may.
    pub fn encoded(&self, decoded: u64) -> u64 {
        match self.run(decoded) {
            Some(run) => run.encoded_at(decoded),
            None => self.encoded,
        }
    }

    /// An edit of the text as edits of the bytes, in order.
    pub fn edits(&self, edit: &Edit) -> Vec<Edit> {
        let mut edits: Vec<Edit> = Vec::new();
        let mut replacement = Some(escape(&edit.replacement));
        let (mut last_text, mut at) = (None, self.first(edit.range.start));
        while let Some(run) = self.runs.get(at).filter(|run| run.decoded < edit.range.end) {
            let (from, to) = (edit.range.start.max(run.decoded), edit.range.end.min(run.end()));
            let range = run.encoded_at(from)..run.encoded_at(to);
            at += 1;
            match &run.part {
                Part::Structure => {}
                Part::Bare(text) => {
                    let part = text.get((from - run.decoded) as usize..(to - run.decoded) as usize).unwrap_or(text);
                    edits.push(Edit { range, replacement: nines(part, text) });
                }
                Part::Text => {
                    match edits
                        .last_mut()
                        .filter(|last| last_text == Some(range.start) && last.range.end == range.start)
                    {
                        Some(last) => last.range.end = range.end,
                        None => edits
                            .push(Edit { range: range.clone(), replacement: replacement.take().unwrap_or_default() }),
                    }
                    last_text = Some(range.end);
                }
            }
        }
        edits
    }

    /// Forgets the bytes of text that has left.
    pub fn forget(&mut self, decoded: u64) {
        while self.runs.front().is_some_and(|run| run.end() <= decoded) {
            self.runs.pop_front();
        }
    }

    /// The first run that ends behind this place.
    fn first(&self, decoded: u64) -> usize {
        self.runs.partition_point(|run| run.end() <= decoded)
    }

    fn run(&self, decoded: u64) -> Option<&Run> {
        self.runs.get(self.first(decoded))
    }

    /// Decodes what is complete; how many bytes that were.
    fn decode(&mut self, bytes: &[u8], text: &mut String) -> usize {
        let mut at = 0;
        while at < bytes.len() {
            let rest = &bytes[at..];
            let plain = self.plain(rest);
            if plain > 0 {
                self.verbatim(&rest[..plain], text);
                at += plain;
                continue;
            }
            match self.special(rest) {
                Unit::One(c, len) => {
                    self.letter(c, len, text);
                    at += len;
                }
                Unit::More => break,
            }
        }
        at
    }

    /// How many bytes stand for themselves.
    fn plain(&self, bytes: &[u8]) -> usize {
        let end = match (self.in_string, self.document) {
            (true, true) => memchr::memchr2(b'\\', b'"', bytes),
            (true, false) => memchr::memchr(b'\\', bytes),
            (false, _) => memchr::memchr(b'"', bytes),
        };
        let bytes = &bytes[..end.unwrap_or(bytes.len())];
        match std::str::from_utf8(bytes) {
            Ok(_) => bytes.len(),
            Err(error) => error.valid_up_to(),
        }
    }

    /// Reads a quote, an escape, or what is no UTF-8.
    fn special(&mut self, bytes: &[u8]) -> Unit {
        match bytes {
            [b'"', ..] if self.document => Unit::One('"', 1),
            [b'\\', ..] if self.in_string => escaped(bytes),
            _ => match std::str::from_utf8(&bytes[..bytes.len().min(4)]) {
                Err(error) if error.error_len().is_none() => Unit::More,
                Err(error) => Unit::One(char::REPLACEMENT_CHARACTER, error.error_len().unwrap_or(1)),
                Ok(text) => text.chars().next().map_or(Unit::More, |c| Unit::One(c, c.len_utf8())),
            },
        }
    }

    /// Takes text that stands for itself.
    fn verbatim(&mut self, bytes: &[u8], text: &mut String) {
        let Ok(plain) = std::str::from_utf8(bytes) else { return };
        text.push_str(plain);
        if self.in_string {
            return self.add(plain.len(), plain.len(), Part::Text);
        }
        let signs = |c: char| c.is_ascii_whitespace() || matches!(c, '{' | '}' | '[' | ']' | ',' | ':');
        let mut rest = plain;
        while let Some(first) = rest.chars().next() {
            let is_sign = signs(first);
            let end = rest.find(|c| signs(c) != is_sign).unwrap_or(rest.len());
            let part = if is_sign { Part::Structure } else { Part::Bare(rest[..end].to_owned()) };
            self.add(end, end, part);
            rest = &rest[end..];
        }
    }

    /// Takes one letter that so many bytes stand for.
    fn letter(&mut self, c: char, encoded: usize, text: &mut String) {
        text.push(c);
        let quote = self.document && c == '"' && encoded == 1;
        let part = if quote { Part::Structure } else { Part::Text };
        self.add(c.len_utf8(), encoded, part);
        self.in_string ^= quote;
    }

    fn add(&mut self, decoded_len: usize, encoded_len: usize, part: Part) {
        let (decoded_len, encoded_len) = (decoded_len as u64, encoded_len as u64);
        let even = decoded_len == encoded_len;
        match self.runs.back_mut().filter(|run| even && part == run.part && run.decoded_len == run.encoded_len) {
            Some(run) if !matches!(part, Part::Bare(_)) => {
                run.decoded_len += decoded_len;
                run.encoded_len += encoded_len;
            }
            _ => {
                let (decoded, encoded) = (self.decoded, self.encoded);
                self.runs.push_back(Run { decoded, encoded, decoded_len, encoded_len, part });
            }
        }
        self.decoded += decoded_len;
        self.encoded += encoded_len;
    }
}

/// The letter that an escape stands for. One that JSON does not know stands for what is escaped.
fn escaped(bytes: &[u8]) -> Unit {
    let c = match bytes.get(1) {
        None => return Unit::More,
        Some(b'u') => return hexadecimal(bytes),
        Some(b'n') => '\n',
        Some(b't') => '\t',
        Some(b'r') => '\r',
        Some(b'b') => '\u{8}',
        Some(b'f') => '\u{c}',
        Some(byte) if byte.is_ascii() => char::from(*byte),
        Some(_) => return Unit::One(char::REPLACEMENT_CHARACTER, 1),
    };
    Unit::One(c, 2)
}

/// `\uXXXX`, or two of them that are one letter.
fn hexadecimal(bytes: &[u8]) -> Unit {
    let unknown = Unit::One(char::REPLACEMENT_CHARACTER, 6);
    let high = match unit(bytes) {
        Some(Some(unit)) => unit,
        Some(None) => return Unit::One('u', 2),
        None => return Unit::More,
    };
    if !(0xd800..0xdc00).contains(&high) {
        return char::from_u32(high).map_or(unknown, |c| Unit::One(c, 6));
    }
    let low = match unit(&bytes[6..]) {
        Some(Some(low)) if (0xdc00..0xe000).contains(&low) => low,
        Some(_) => return unknown,
        None => return Unit::More,
    };
    let code = 0x1_0000 + ((high - 0xd800) << 10) + (low - 0xdc00);
    char::from_u32(code).map_or(unknown, |c| Unit::One(c, 12))
}

/// The number of a `\uXXXX`: Some(None) if it is none, None if there is too little of it to say.
fn unit(bytes: &[u8]) -> Option<Option<u32>> {
    let mut value = 0;
    for at in 0..6 {
        let byte = *bytes.get(at)?;
        let digit = match (at, byte) {
            (0, b'\\') | (1, b'u') => continue,
            (2.., _) => char::from(byte).to_digit(16),
            _ => None,
        };
        let Some(digit) = digit else { return Some(None) };
        value = value << 4 | digit;
    }
    Some(Some(value))
}

/// Text as it stands within a JSON string.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\0'..' ' => out.push_str(&format!("\\u{:04x}", c as u32)),
            _ => out.push(c),
        }
    }
    out
}

/// What a bare value becomes: a number of nines. A word that JSON knows stays; what is no JSON is crossed out.
fn nines(part: &str, whole: &str) -> String {
    let known = ["true", "false", "null"].iter().any(|word| word.contains(whole));
    let number = whole.bytes().any(|byte| byte.is_ascii_digit());
    let sign = |c: char| match c {
        '0'..='9' => '9',
        'e' | 'E' if number => c,
        _ if known || !c.is_alphanumeric() => c,
        _ => 'x',
    };
    part.chars().map(sign).collect()
}

/// A document within a string.
#[derive(Clone, Debug)]
pub struct Nested {
    outer: Decoder,
    inner: Decoder,
}

impl Default for Nested {
    fn default() -> Self {
        Self { outer: Decoder::string(), inner: Decoder::document() }
    }
}

impl Nested {
    /// Takes the next bytes of the string and adds what the document stands for.
    pub fn push(&mut self, bytes: &[u8], text: &mut String) {
        let mut between = String::new();
        self.outer.push(bytes, &mut between);
        self.inner.push(between.as_bytes(), text);
    }

    /// There are no more bytes.
    pub fn finish(&mut self, text: &mut String) {
        let mut between = String::new();
        self.outer.finish(&mut between);
        self.inner.push(between.as_bytes(), text);
        self.inner.finish(text);
    }

    /// How much text there is.
    pub fn decoded(&self) -> u64 {
        self.inner.decoded()
    }

    /// Where the bytes begin that stand for the text from `decoded` on.
    pub fn encoded(&self, decoded: u64) -> u64 {
        self.outer.encoded(self.inner.encoded(decoded))
    }

    /// An edit of the text as edits of the bytes, in order.
    pub fn edits(&self, edit: &Edit) -> Vec<Edit> {
        self.inner.edits(edit).iter().flat_map(|edit| self.outer.edits(edit)).collect()
    }

    /// Forgets the bytes of text that has left.
    pub fn forget(&mut self, decoded: u64) {
        self.outer.forget(self.inner.encoded(decoded));
        self.inner.forget(decoded);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::super::redact::Placeholders;
    use super::super::stream::Progress;
    use super::super::tests::scanner_of;
    use super::*;

    /// Bytes with edits made.
    fn spliced(bytes: &[u8], edits: &[Edit]) -> Vec<u8> {
        let (mut out, mut at) = (Vec::new(), 0);
        for edit in edits {
            assert!(edit.range.start as usize >= at, "in order: {edits:?}");
            out.extend_from_slice(&bytes[at..edit.range.start as usize]);
            out.extend_from_slice(edit.replacement.as_bytes());
            at = edit.range.end as usize;
        }
        out.extend_from_slice(&bytes[at..]);
        out
    }

    /// What a string's content stands for, in pieces of this size.
    fn decoded(content: &[u8], size: usize) -> (String, Decoder) {
        let (mut decoder, mut text) = (Decoder::string(), String::new());
        content.chunks(size).for_each(|piece| decoder.push(piece, &mut text));
        decoder.finish(&mut text);
        (text, decoder)
    }

    const CONTENT: &str = r#"a\"b\\c\/\n\t\b\f\r\u00e9é\ud83d\ude00😀\u4e16世\u0000"#;

    #[test]
    fn escapes_mean_what_json_means_wherever_they_are_cut() {
        let expected: String = serde_json::from_str(&format!("\"{CONTENT}\"")).unwrap();
        for size in 1..=CONTENT.len() {
            assert_eq!(decoded(CONTENT.as_bytes(), size).0, expected, "{size}");
        }
    }

    #[test]
    fn what_is_no_json_is_judged_as_it_stands() {
        let cases: [(&[u8], &str); 8] = [
            (b"\\ud83d", "\u{fffd}"),
            (b"\\ud83dx", "\u{fffd}x"),
            (b"\\ude00", "\u{fffd}"),
            (b"\\ud83d\\u0041", "\u{fffd}A"),
            (b"\\u12", "\u{fffd}"),
            (b"\\u12g4", "u12g4"),
            (b"\\q\xff\xe2\x82", "q\u{fffd}\u{fffd}"),
            (b"a\\", "a\u{fffd}"),
        ];
        for (bytes, expected) in cases {
            for size in 1..=bytes.len() {
                assert_eq!(decoded(bytes, size).0, expected, "{bytes:?} in {size}");
            }
        }
    }

    #[test]
    fn any_part_of_a_text_can_be_replaced_in_its_bytes() {
        let text: String = serde_json::from_str(&format!("\"{CONTENT}\"")).unwrap();
        let places: Vec<usize> = (0..=text.len()).filter(|at| text.is_char_boundary(*at)).collect();
        let (_, decoder) = decoded(CONTENT.as_bytes(), 5);
        for (nth, from) in places.iter().enumerate() {
            for to in &places[nth + 1..] {
                let edit = Edit { range: *from as u64..*to as u64, replacement: "\"<é\n>\\".to_owned() };
                let bytes = spliced(CONTENT.as_bytes(), &decoder.edits(&edit));
                let back: String = serde_json::from_slice(&[b"\"", &bytes[..], b"\""].concat()).unwrap();
                assert_eq!(back, [&text[..*from], &edit.replacement, &text[*to..]].concat());
            }
        }
    }

    const RULES: &str = r#"[{"name":"p","in":["answer.tool_arguments"],"verdict":"redact",
            "pii":{"find":["email","card"],"countries":[]}},
        {"name":"w","in":["answer.tool_arguments"],"verdict":"redact","redact":"mask","words":{"list":["say \"hi\"","naïve"]}}]"#;

    /// Arguments as they leave, in pieces of this size, with what may have left after each piece.
    fn judged(string: &[u8], size: usize) -> Vec<u8> {
        let scanner = scanner_of(RULES, "", "answer.tool_arguments");
        let (mut nested, mut stream, mut placeholders) = (Nested::default(), scanner.stream(), Placeholders::default());
        let (mut progress, mut edits, mut sent) = (Progress::default(), Vec::new(), 0);
        let pieces: Vec<&[u8]> = string.chunks(size).collect();
        for piece in pieces.iter().map(Some).chain([None]) {
            let mut text = String::new();
            match piece {
                Some(piece) => nested.push(piece, &mut text),
                None => nested.finish(&mut text),
            }
            stream.push(&text, &mut placeholders, &mut progress);
            let mut done = vec![std::mem::take(&mut progress)];
            if piece.is_none() {
                stream.finish(&mut placeholders, &mut progress);
                done.push(std::mem::take(&mut progress));
            }
            for progress in done {
                edits.extend(progress.edits.iter().flat_map(|edit| nested.edits(edit)));
                let leaves = nested.encoded(progress.released);
                assert!(leaves >= sent && edits.iter().all(|edit| edit.range.end <= leaves), "{edits:?} {leaves}");
                sent = leaves;
                nested.forget(progress.released);
            }
        }
        assert_eq!(sent as usize, string.len());
        spliced(string, &edits)
    }

    /// A document as it stands within a string of the wire.
    fn quoted(document: &str) -> String {
        let quoted = serde_json::to_string(document).unwrap();
        quoted[1..quoted.len() - 1].to_owned()
    }

    #[test]
    fn arguments_stay_json_whatever_is_taken_out_and_however_they_are_cut() {
        let document = r#"{"to":["ann@a.example"],"n":4111111111111111,"é":"na\u00efve \ud83d\ude00, I say \"hi\"\n","x":-1.5e3,"t":true}"#;
        let string = quoted(document);
        let expected = r#"{"to":["[EMAIL]"],"n":9999999999999999,"é":"***** 😀, I *** \"**\"\n","x":-1.5e3,"t":true}"#;
        let wanted: Value = serde_json::from_str(expected).unwrap();
        for size in 1..=string.len() {
            let out = judged(string.as_bytes(), size);
            let inner: String = serde_json::from_slice(&[b"\"", &out[..], b"\""].concat()).unwrap();
            assert_eq!(serde_json::from_str::<Value>(&inner).unwrap(), wanted, "{size}: {inner}");
        }
    }

    #[test]
    fn a_match_across_values_empties_them_and_leaves_the_structure() {
        let (mut decoder, mut text) = (Decoder::document(), String::new());
        let document = br#"["one two","three four",12]"#;
        decoder.push(document, &mut text);
        let from = text.find("two").unwrap() as u64;
        let edit = Edit { range: from..text.len() as u64 - 2, replacement: "X".to_owned() };
        let out = spliced(document, &decoder.edits(&edit));
        assert_eq!(String::from_utf8(out).unwrap(), r#"["one X","",92]"#);
    }

    #[test]
    fn what_is_no_value_is_crossed_out() {
        for (part, whole, expected) in
            [("tr", "tr", "tr"), ("secret", "secret", "xxxxxx"), ("-1.5e3", "-1.5e3", "-9.9e9")]
        {
            assert_eq!(nines(part, whole), expected);
        }
    }

    proptest! {
        #[test]
        fn any_text_survives_being_escaped_and_cut(text in any::<String>(), size in 1usize..9) {
            let content = escape(&text);
            prop_assert_eq!(&decoded(content.as_bytes(), size).0, &text);
            prop_assert_eq!(serde_json::from_str::<String>(&format!("\"{content}\"")).unwrap(), text);
        }

        #[test]
        fn any_bytes_decode_the_same_however_cut(bytes in proptest::collection::vec(prop_oneof![Just(b'\\'), Just(b'u'), Just(b'd'), Just(b'8'), Just(b'"'), any::<u8>()], 0..60), size in 1usize..9) {
            let run = |size: usize| {
                let (mut nested, mut text) = (Nested::default(), String::new());
                bytes.chunks(size).for_each(|piece| nested.push(piece, &mut text));
                nested.finish(&mut text);
                (text, nested.encoded(u64::MAX))
            };
            prop_assert_eq!(run(size), run(100));
            prop_assert_eq!(run(size).1 as usize, bytes.len());
        }
    }
}
