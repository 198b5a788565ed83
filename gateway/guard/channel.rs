//! One text of an answer or a request on its way through the rules: decoded for them, edited as it is encoded.

use std::sync::Arc;

use infergate_plugins::guardrail::json::{Decoder, Nested};
use infergate_plugins::guardrail::redact::{Placeholders, Restorer};
use infergate_plugins::guardrail::stream::{Edit, Progress, Scanner, Stream};

use crate::scan;
use crate::text::Text;

/// A text that comes in pieces.
#[derive(Debug)]
pub(super) struct Channel {
    codec: Codec,
    judge: Judge,
    text: String,
    progress: Progress,
    /// Encoded bytes so far.
    pub(super) end: u64,
    /// So many of them may leave.
    pub(super) released: u64,
    /// What judges the same bytes in another way, and edits nothing: both must let them go.
    beside: Option<Box<Channel>>,
}

#[derive(Debug)]
enum Codec {
    Text(Box<Decoder>),
    /// JSON in a string: the arguments of a tool.
    Document(Box<Nested>),
    /// What stands in a form as it is, at once.
    Raw,
}

enum Judge {
    Rules(Box<Stream>),
    Originals(Restorer),
}

impl std::fmt::Debug for Judge {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if matches!(self, Self::Rules(_)) { "Rules" } else { "Originals" })
    }
}

/// An edit of encoded bytes, counted from the text's beginning.
#[derive(Clone, Debug)]
pub(super) struct Encoded(pub(super) Edit);

impl Encoded {
    /// The same in the document in which the whole text stands.
    pub(super) fn at(self, text: &Text) -> scan::Edit {
        let Edit { range, replacement } = self.0;
        let place = |offset: u64| text.span.start + offset as usize;
        scan::Edit { span: place(range.start)..place(range.end), text: replacement }
    }
}

impl Codec {
    fn new(is_json: bool) -> Self {
        match is_json {
            true => Self::Document(Box::default()),
            false => Self::Text(Box::new(Decoder::string())),
        }
    }

    fn push(&mut self, bytes: &[u8], text: &mut String) {
        match self {
            Self::Text(decoder) => decoder.push(bytes, text),
            Self::Document(nested) => nested.push(bytes, text),
            Self::Raw => text.push_str(&String::from_utf8_lossy(bytes)),
        }
    }

    fn finish(&mut self, text: &mut String) {
        match self {
            Self::Text(decoder) => decoder.finish(text),
            Self::Document(nested) => nested.finish(text),
            Self::Raw => {}
        }
    }

    fn encoded(&self, decoded: u64) -> u64 {
        match self {
            Self::Text(decoder) => decoder.encoded(decoded),
            Self::Document(nested) => nested.encoded(decoded),
            Self::Raw => decoded,
        }
    }

    fn edits(&self, edit: &Edit) -> Vec<Edit> {
        match self {
            Self::Text(decoder) => decoder.edits(edit),
            Self::Document(nested) => nested.edits(edit),
            Self::Raw => vec![edit.clone()],
        }
    }

    fn forget(&mut self, decoded: u64) {
        match self {
            Self::Text(decoder) => decoder.forget(decoded),
            Self::Document(nested) => nested.forget(decoded),
            Self::Raw => {}
        }
    }
}

/// A whole text, decoded into `room` if it is not the same as it is encoded.
pub(crate) fn decoded<'t>(encoded: &'t [u8], of: &Text, room: &'t mut String) -> &'t str {
    let is_plain = of.is_raw || (!of.is_json && memchr::memchr(b'\\', encoded).is_none());
    if let (true, Ok(text)) = (is_plain, std::str::from_utf8(encoded)) {
        return text;
    }
    let mut codec = if of.is_raw { Codec::Raw } else { Codec::new(of.is_json) };
    room.clear();
    codec.push(encoded, room);
    codec.finish(room);
    room
}

impl Channel {
    /// One that rules judge.
    pub(super) fn of_rules(scanner: &Arc<Scanner>, is_json: bool) -> Self {
        Self::new(Judge::Rules(Box::new(scanner.stream())), is_json)
    }

    /// One whose bytes stand for themselves, if this text's do.
    pub(super) fn written_like(self, text: &Text) -> Self {
        if text.is_raw { Self { codec: Codec::Raw, ..self } } else { self }
    }

    /// One in which originals come back.
    pub(super) fn of_originals(is_json: bool) -> Self {
        Self::new(Judge::Originals(Restorer::default()), is_json)
    }

    fn new(judge: Judge, is_json: bool) -> Self {
        let (text, progress) = (String::new(), Progress::default());
        Self { codec: Codec::new(is_json), judge, text, progress, end: 0, released: 0, beside: None }
    }

    /// The same with rules that judge the shape of what stands there: JSON is not taken apart for them.
    pub(super) fn with_shapes(
        rules: Option<&Arc<Scanner>>,
        is_json: bool,
        shapes: Option<&Arc<Scanner>>,
    ) -> Option<Self> {
        match (rules, shapes) {
            (None, None) => None,
            (Some(rules), None) => Some(Self::of_rules(rules, is_json)),
            (None, Some(shapes)) => Some(Self::of_rules(shapes, false)),
            (Some(rules), Some(shapes)) => {
                let beside = Some(Box::new(Self::of_rules(shapes, false)));
                Some(Self { beside, ..Self::of_rules(rules, is_json) })
            }
        }
    }

    /// Takes the next encoded bytes; returns what is known now, and the edits of encoded bytes that are new.
    pub(super) fn push(&mut self, encoded: &[u8], placeholders: &mut Placeholders) -> (&Progress, Vec<Encoded>) {
        self.text.clear();
        self.codec.push(encoded, &mut self.text);
        self.end += encoded.len() as u64;
        match &mut self.judge {
            Judge::Rules(stream) => stream.push(&self.text, placeholders, &mut self.progress),
            Judge::Originals(restorer) => restorer.push(&self.text, placeholders, &mut self.progress),
        }
        let edits = self.edited();
        self.released = self.codec.encoded(self.progress.released);
        self.codec.forget(self.progress.released);
        if let Some(beside) = &mut self.beside {
            let (progress, _) = beside.push(encoded, placeholders);
            self.progress.found.extend_from_slice(&progress.found);
            self.progress.blocked = self.progress.blocked.or(progress.blocked);
            self.released = self.released.min(beside.released);
        }
        (&self.progress, edits)
    }

    /// The text is at its end.
    pub(super) fn finish(&mut self, placeholders: &mut Placeholders) -> (Progress, Vec<Encoded>) {
        self.text.clear();
        self.codec.finish(&mut self.text);
        let mut first = Progress::default();
        match &mut self.judge {
            Judge::Rules(stream) => {
                stream.push(&self.text, placeholders, &mut first);
                stream.finish(placeholders, &mut self.progress);
            }
            Judge::Originals(restorer) => {
                restorer.push(&self.text, placeholders, &mut first);
                restorer.finish(&mut self.progress);
            }
        }
        self.progress.edits.splice(0..0, first.edits);
        self.progress.found.splice(0..0, first.found);
        let edits = self.edited();
        let is_whole = self.progress.blocked.is_none();
        self.released = if is_whole { self.end } else { self.codec.encoded(self.progress.released) };
        if let Some(beside) = &mut self.beside {
            let (progress, _) = beside.finish(placeholders);
            self.progress.found.extend(progress.found);
            self.progress.blocked = self.progress.blocked.or(progress.blocked);
            self.released = self.released.min(beside.released);
        }
        (self.progress.clone(), edits)
    }

    /// The same for a text that is here at once.
    pub(super) fn whole(&mut self, encoded: &[u8], placeholders: &mut Placeholders) -> (Progress, Vec<Encoded>) {
        let (progress, mut edits) = self.push(encoded, placeholders);
        let mut found = progress.found.clone();
        let (mut progress, more) = self.finish(placeholders);
        edits.extend(more);
        found.append(&mut progress.found);
        (Progress { found, ..progress }, edits)
    }

    fn edited(&self) -> Vec<Encoded> {
        self.progress.edits.iter().flat_map(|edit| self.codec.edits(edit)).map(Encoded).collect()
    }
}
