//! The frame of an event stream: where one event ends and the next begins, for every way to split the bytes.
//!
//! Nothing is decoded here and nothing is changed: [`Framer::push`] only says how far into the bytes the last
//! complete event reaches, so that whole events pass on at once as they came and a broken one never does.
//! Line ends are LF, CRLF or CR (WHATWG HTML, 9.2.5, "Parsing an event stream").

/// Follows one stream across its chunks.
#[derive(Clone, Copy, Debug, Default)]
pub struct Framer {
    state: State,
}

/// Where in a line the last byte left us.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    /// At the start of a line, after a blank line or at the very beginning: between events.
    #[default]
    Between,
    /// Inside a line.
    Line,
    /// At the start of a line inside an event.
    LineStart,
    /// After a CR that ended a line with text; an LF may still belong to it.
    LineCr,
    /// After a CR that ended an event; an LF may still belong to it.
    BlankCr,
}

impl Framer {
    /// Takes the next bytes; returns how many of them belong to complete events. The rest begins an event whose
    /// end has not come yet.
    pub fn push(&mut self, bytes: &[u8]) -> usize {
        let mut complete = 0;
        while let Some(length) = self.to_end(&bytes[complete..]) {
            complete += length;
        }
        complete
    }

    /// Takes the next bytes as far as the first event among them ends; returns how many they are. Where none ends, all
    /// are taken.
    pub fn to_end(&mut self, bytes: &[u8]) -> Option<usize> {
        let mut at = 0;
        while let Some(&byte) = bytes.get(at) {
            if self.state == State::Line && byte != b'\n' && byte != b'\r' {
                // Most bytes are inside a line: go to its end in one vectorised step.
                at += memchr::memchr2(b'\n', b'\r', &bytes[at..])?;
                continue;
            }
            self.state = self.state.after(byte);
            at += 1;
            if self.state.is_boundary() {
                return Some(at);
            }
        }
        None
    }

    /// Whether the bytes so far end with a complete event, or there were none.
    pub fn at_boundary(&self) -> bool {
        self.state.is_boundary()
    }
}

impl State {
    fn is_boundary(self) -> bool {
        matches!(self, Self::Between | Self::BlankCr)
    }

    fn after(self, byte: u8) -> Self {
        match (self, byte) {
            // The LF of a CRLF whose CR has been counted already.
            (Self::LineCr, b'\n') => Self::LineStart,
            (Self::BlankCr, b'\n') => Self::Between,
            (Self::Line, b'\n') => Self::LineStart,
            (Self::Line, b'\r') => Self::LineCr,
            // A blank line ends the event. Between events it is one more separator.
            (Self::LineStart | Self::LineCr, b'\r') => Self::BlankCr,
            (Self::LineStart, b'\n') => Self::Between,
            (Self::Between | Self::BlankCr, b'\r') => Self::BlankCr,
            (Self::Between, b'\n') => Self::Between,
            _ => Self::Line,
        }
    }
}

/// Whether a complete event carries something for the application: an event of comments alone does not.
pub fn has_data(event: &[u8]) -> bool {
    event.split(|byte| matches!(byte, b'\n' | b'\r')).any(|line| !line.is_empty() && !line.starts_with(b":"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const STREAMS: &[&str] = &[
        "data: {\"a\":1}\n\ndata: [DONE]\n\n",
        "data: {\"a\":1}\r\n\r\ndata: [DONE]\r\n\r\n",
        "data: x\r\rdata: y\r\r",
        ": comment\n\nevent: e\ndata: 1\ndata: 2\n\n\n\ndata: \u{1F600}\u{4e2d}\n\n",
        "\u{feff}data:no space\r\n\r\nid: 7\n\nretry: 3\n\n",
    ];

    /// The events' ends as a slow, obvious reading of the standard finds them.
    fn ends(text: &str) -> Vec<usize> {
        let (mut ends, mut at, mut open) = (Vec::new(), 0, false);
        while at < text.len() {
            let rest = &text[at..];
            let line = rest.find(['\n', '\r']).unwrap_or(rest.len());
            let newline = match &rest[line..] {
                end if end.starts_with("\r\n") => 2,
                "" => break,
                _ => 1,
            };
            at += line + newline;
            open |= line > 0;
            if line == 0 {
                open = false;
            }
            if !open {
                ends.push(at);
            }
        }
        ends
    }

    #[test]
    fn every_split_finds_the_same_ends() {
        for stream in STREAMS {
            let bytes = stream.as_bytes();
            let last = *ends(stream).last().unwrap();
            assert_eq!(Framer::default().push(bytes), last, "{stream:?}");
            for cut in 0..=bytes.len() {
                let mut framer = Framer::default();
                let first = framer.push(&bytes[..cut]);
                assert!(first <= cut);
                let second = framer.push(&bytes[cut..]);
                let total = if second > 0 { cut + second } else { first };
                assert_eq!(total, last, "cut at {cut} of {stream:?}");
                assert!(framer.at_boundary());
            }
        }
    }

    #[test]
    fn a_boundary_is_reported_only_where_an_event_ends() {
        for stream in STREAMS {
            let ends = ends(stream);
            let mut framer = Framer::default();
            for (at, byte) in stream.bytes().enumerate() {
                framer.push(&[byte]);
                let crlf_open = stream.as_bytes().get(at + 1) == Some(&b'\n') && byte == b'\r';
                let expected = ends.contains(&(at + 1)) || (crlf_open && ends.contains(&(at + 2)));
                assert_eq!(framer.at_boundary(), expected, "after byte {at} of {stream:?}");
            }
        }
    }

    #[test]
    fn an_unfinished_event_is_not_complete() {
        let mut framer = Framer::default();
        assert_eq!(framer.push(b"data: 1\n\ndata: {\"half\":"), 9);
        assert!(!framer.at_boundary());
    }

    #[test]
    fn comments_are_no_data() {
        assert!(!has_data(b": keep-alive\n\n"));
        assert!(!has_data(b":\r\n\r\n"));
        assert!(has_data(b": c\ndata: x\n\n"));
    }
}
