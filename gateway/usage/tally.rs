//! How many events of a stream carry a part of the answer: near the number of its tokens where nobody says it.

use infergate_plugins::operation::Operation;
use memchr::memchr2;

/// Counts one stream's events across its pieces.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Tally {
    /// So many so far.
    pub(super) counted: u64,
    rule: Rule,
    place: Place,
}

/// Which events count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Rule {
    /// None: they are no tokens.
    #[default]
    None,
    /// Those with an object for their data: `data: {`. `[DONE]` has none.
    Objects,
    /// Those whose name ends so: `event: content_block_delta`, `event: response.output_text.delta`.
    Deltas,
}

/// Where in its line the next byte stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// In the field's name, after so many bytes of the one that matters.
    Name(u8),
    /// In its value, after so many bytes of its ending.
    Value(u8),
    /// In what does not matter.
    Rest,
}

const DELTA: &[u8] = b"delta";

impl Default for Place {
    fn default() -> Self {
        Self::Name(0)
    }
}

impl Place {
    /// Whether a piece ended inside a field that may matter.
    fn is_inside(self) -> bool {
        !matches!(self, Self::Name(0) | Self::Rest)
    }
}

impl Rule {
    /// Whether a line that came whole makes its event count.
    fn counts(self, line: &[u8]) -> bool {
        match self {
            Self::None => false,
            Self::Objects => {
                line.strip_prefix(b"data:").is_some_and(|value| value.trim_ascii_start().starts_with(b"{"))
            }
            Self::Deltas => line.strip_prefix(b"event:").is_some_and(|value| value.ends_with(DELTA)),
        }
    }
}

impl Tally {
    /// For the stream that answers `operation`.
    pub(super) fn of(operation: Operation) -> Self {
        let rule = match operation {
            Operation::Chat | Operation::Completions | Operation::Generate | Operation::Transcription => Rule::Objects,
            Operation::Messages | Operation::Responses => Rule::Deltas,
            _ => Rule::None,
        };
        Self { rule, ..Self::default() }
    }

    pub(super) fn push(&mut self, piece: &[u8]) {
        if self.rule == Rule::None {
            return;
        }
        let mut rest = piece;
        while let Some(&byte) = rest.first() {
            // Most lines come whole: one vectorised step to the end, one look at the start.
            let end = if self.place.is_inside() { None } else { memchr2(b'\n', b'\r', rest) };
            if let Some(end) = end {
                let counts = self.place == Place::default() && self.rule.counts(&rest[..end]);
                self.counted += u64::from(counts);
                self.place = Place::default();
                rest = &rest[end + 1..];
            } else if self.place == Place::Rest {
                return;
            } else {
                self.step(byte);
                rest = &rest[1..];
            }
        }
    }

    fn step(&mut self, byte: u8) {
        let name: &[u8] = if self.rule == Rule::Objects { b"data:" } else { b"event:" };
        self.place = match (self.place, byte) {
            (place, b'\n' | b'\r') => {
                self.counted += u64::from(place == Place::Value(DELTA.len() as u8));
                Place::Name(0)
            }
            (Place::Name(at), byte) if name[usize::from(at)] == byte => match usize::from(at) + 1 == name.len() {
                true => Place::Value(0),
                false => Place::Name(at + 1),
            },
            (Place::Value(at), byte) if self.rule == Rule::Deltas => Place::Value(ending(at, byte)),
            (Place::Value(_), byte) if byte.is_ascii_whitespace() => Place::Value(0),
            (Place::Value(_), b'{') => {
                self.counted += 1;
                Place::Rest
            }
            _ => Place::Rest,
        };
    }
}

/// How much of [`DELTA`] the value ends with after `byte`, if it was `at` before.
fn ending(at: u8, byte: u8) -> u8 {
    match DELTA.get(usize::from(at)) {
        Some(next) if *next == byte => at + 1,
        _ => u8::from(byte == DELTA[0]),
    }
}
