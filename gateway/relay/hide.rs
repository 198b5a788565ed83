//! Takes the usage that the gateway asked for, and the client did not, out of an event stream.
//!
//! It is one event of its own: `{"choices": [], "usage": {…}}`. Everything else passes as it came.

use std::ops::Range;
use std::sync::LazyLock;

use bytes::{Bytes, BytesMut};
use memchr::memmem::Finder;
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::Value;

use crate::sse::Framer;

/// Hides one event of one stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Hide {
    /// Nothing, or nothing any more.
    #[default]
    Nothing,
    /// The event that tells the usage and nothing else, when it comes.
    Usage,
    /// The line feed that may still belong to that event.
    LineFeed,
}

impl Hide {
    /// Takes it out of the first piece.
    pub(super) fn out_of_first(&mut self, piece: Bytes) -> Bytes {
        if *self == Self::Nothing || self.find(&piece).is_none() {
            return piece;
        }
        let mut piece = BytesMut::from(piece);
        self.out_of(&mut piece);
        piece.freeze()
    }

    /// Takes it out of `pieces`, which are whole events.
    pub(super) fn out_of(&mut self, pieces: &mut BytesMut) {
        let Some(found) = self.find(pieces) else { return };
        let behind = pieces.split_off(found.end);
        *self = match (*self, behind.is_empty() && pieces.ends_with(b"\r")) {
            (Self::Usage, true) => Self::LineFeed,
            _ => Self::Nothing,
        };
        pieces.truncate(found.start);
        pieces.extend_from_slice(&behind);
    }

    fn find(&mut self, pieces: &[u8]) -> Option<Range<usize>> {
        match *self {
            Self::Nothing => None,
            Self::Usage => usage_event(pieces),
            Self::LineFeed if pieces.starts_with(b"\n") => Some(0..1),
            Self::LineFeed => {
                if !pieces.is_empty() {
                    *self = Self::Nothing;
                }
                None
            }
        }
    }
}

/// Where the event stands that tells the usage and nothing else. Most pieces cost one search.
fn usage_event(pieces: &[u8]) -> Option<Range<usize>> {
    static NUMBERS: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new("\"prompt_tokens\""));
    NUMBERS.find(pieces)?;
    let (mut framer, mut from) = (Framer::default(), 0);
    for at in 0..pieces.len() {
        let ends = framer.push(&pieces[at..=at]) > 0;
        // Of CRLF, the line feed belongs to its carriage return.
        let end = if pieces[at] == b'\r' && pieces.get(at + 1) == Some(&b'\n') { at + 2 } else { at + 1 };
        if (ends || end >= pieces.len()) && at >= from {
            if is_usage(&pieces[from..end]) {
                return Some(from..end);
            }
            from = end;
        }
    }
    None
}

/// One event of a chat, as far as it matters.
#[derive(Deserialize)]
struct Chunk {
    choices: Vec<IgnoredAny>,
    usage: serde_json::Map<String, Value>,
}

fn is_usage(event: &[u8]) -> bool {
    let lines = event.split(|byte| matches!(byte, b'\n' | b'\r'));
    let mut told = lines.filter_map(|line| line.strip_prefix(b"data:"));
    let (Some(text), None) = (told.next(), told.next()) else { return false };
    serde_json::from_slice::<Chunk>(text).is_ok_and(|chunk| chunk.choices.is_empty() && !chunk.usage.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHUNK: &str = "data: {\"choices\":[{\"delta\":{\"content\":\"\\\"prompt_tokens\\\"\"}}],\"usage\":null}\n\n";
    const CONTINUOUS: &str = "data: {\"choices\":[{\"delta\":{}}],\"usage\":{\"prompt_tokens\":1}}\n\n";
    const FILTER: &str = "data: {\"choices\":[],\"prompt_filter_results\":[]}\n\n";
    const USAGE: &str =
        "data: {\"id\":\"x\",\"choices\": [ ],\"usage\":{\"prompt_tokens\":1,\"completion_tokens\":2}}\n\n";
    const DONE: &str = "data: [DONE]\n\n";

    /// What passes of a stream that comes in pieces, as whole events.
    fn passed(stream: &[u8], pieces: &[&[u8]]) -> String {
        let (mut hide, mut framer, mut held, mut out) = (Hide::Usage, Framer::default(), BytesMut::new(), Vec::new());
        for (index, piece) in pieces.iter().enumerate() {
            let complete = framer.push(piece);
            let behind = held.len();
            held.extend_from_slice(piece);
            let mut whole = if complete > 0 { held.split_to(behind + complete) } else { BytesMut::new() };
            if index == 0 {
                out.extend_from_slice(&hide.out_of_first(whole.freeze()));
            } else {
                hide.out_of(&mut whole);
                out.extend_from_slice(&whole);
            }
        }
        hide.out_of(&mut held);
        out.extend_from_slice(&held);
        assert_eq!(pieces.concat(), stream);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn exactly_the_usage_is_taken_out_wherever_the_stream_is_cut() {
        let others = [CHUNK, CONTINUOUS, FILTER, ": note\n\n"].concat();
        for ends in ["\n", "\r\n", "\r"] {
            for (before, behind) in [(others.as_str(), DONE), ("", DONE), (&others, ""), (DONE, &others)] {
                let stream = [before, USAGE, behind].concat().replace('\n', ends);
                let rest = [before, behind].concat().replace('\n', ends);
                for cut in 0..=stream.len() {
                    let (one, other) = stream.as_bytes().split_at(cut);
                    assert_eq!(passed(stream.as_bytes(), &[one, other]), rest, "cut at {cut} of {stream:?}");
                }
                let bytes: Vec<&[u8]> = stream.as_bytes().chunks(1).collect();
                assert_eq!(passed(stream.as_bytes(), &bytes), rest, "{stream:?}");
            }
        }
    }

    #[test]
    fn only_one_event_is_taken_out_and_the_last_need_not_be_ended() {
        let twice = [CHUNK, USAGE, USAGE].concat();
        assert_eq!(passed(twice.as_bytes(), &[twice.as_bytes()]), [CHUNK, USAGE].concat());
        let open = [CHUNK, USAGE.trim_end()].concat();
        assert_eq!(passed(open.as_bytes(), &[open.as_bytes()]), CHUNK);
    }

    #[test]
    fn what_is_not_touched_is_the_same_memory() {
        let piece = Bytes::from_static(CHUNK.as_bytes());
        assert_eq!(Hide::Usage.out_of_first(piece.clone()).as_ptr(), piece.as_ptr());
    }
}
