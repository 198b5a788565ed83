//! The requests: chat completions of an exact size, in the shape the official clients send them.

use bytes::Bytes;

/// One paragraph of ordinary prose as JSON writes it: a few escapes and a few letters beyond ASCII.
const PARAGRAPH: &str = r#"The committee met again on Tuesday, in the small room behind the library, to decide what should become of the old mill. Mrs. Ferrante had brought the plans; they covered the table and part of the floor. \"It will cost more than we have,\" she said, \"but less than doing nothing.\" Nobody answered. Outside, the river went by as it had for four hundred years, and the café across the bridge was putting out its chairs.\n\nWhat the engineers found was not what the town had feared. The beams were sound, the wheel could be mended, and the only real danger was the roof, which had been repaired in 1954 by a man who did not believe in nails. They wrote forty pages about it, and at the end a single sentence that everybody remembered. "#;

/// Plain letters for whatever is left at the end, so that the size is exact.
const FILLER: &str = "and so on ";

/// How the text is laid out in messages.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Turns {
    /// One user message holds it all.
    One,
    /// A system message and a conversation of many turns.
    Many,
}

/// A chat completion request of `size` bytes (or the smallest possible).
///
/// `model` comes after `messages`, as the official Python client writes it: whoever looks for it
/// has to pass the text.
pub fn chat(size: usize, turns: Turns, stream: bool) -> Bytes {
    let tail = match stream {
        true => {
            r#"],"model":"load-model","max_tokens":256,"stream":true,"stream_options":{"include_usage":true},"temperature":0.7}"#
        }
        false => r#"],"model":"load-model","max_tokens":256,"temperature":0.7}"#,
    };
    let mut body = String::from(r#"{"messages":["#);
    let room = size.saturating_sub(body.len() + tail.len());
    match turns {
        Turns::One => message(&mut body, "user", room),
        Turns::Many => conversation(&mut body, room),
    }
    body.push_str(tail);
    body.into()
}

/// The same request with another beginning of its text: the first words give way to a number.
pub fn begun_apart(body: &Bytes, number: usize) -> Bytes {
    const FIRST: &str = "The committee";
    let own = format!("{number:0width$}", width = FIRST.len());
    String::from_utf8_lossy(body).replacen(FIRST, &own, 1).into()
}

/// Messages of about 700 bytes, the system first, then user and assistant in turns.
fn conversation(body: &mut String, room: usize) {
    let end = body.len() + room;
    let count = (room / 700).max(2);
    for turn in 0..count {
        let role = match turn {
            0 => "system",
            _ if turn % 2 == 1 => "user",
            _ => "assistant",
        };
        let comma = usize::from(turn > 0);
        if comma > 0 {
            body.push(',');
        }
        let left = end.saturating_sub(body.len());
        let share = left / (count - turn);
        message(body, role, share);
    }
}

/// One message of `room` bytes in all.
fn message(body: &mut String, role: &str, room: usize) {
    let start = body.len();
    body.push_str(r#"{"role":""#);
    body.push_str(role);
    body.push_str(r#"","content":""#);
    let end = (start + room).saturating_sub(2);
    while body.len() + PARAGRAPH.len() <= end {
        body.push_str(PARAGRAPH);
    }
    let letters = FILLER.chars().cycle();
    body.extend(letters.take(end.saturating_sub(body.len())));
    body.push_str(r#""}"#);
}

/// The whole HTTP/1.1 request around a body. `extra` are header lines with their line ends; they may say that answers
/// must not be compressed.
pub fn request(body: &Bytes, extra: &str) -> Bytes {
    let accepts = if extra.contains("accept-encoding:") { "" } else { "accept-encoding: gzip, deflate\r\n" };
    let mut request = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\naccept: application/json\r\n{accepts}user-agent: OpenAI/Python 2.8.1\r\nauthorization: Bearer sk-load-0123456789abcdef\r\ncontent-type: application/json\r\n{extra}content-length: {}\r\n\r\n",
        body.len()
    )
    .into_bytes();
    request.extend_from_slice(body);
    request.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_that_begins_apart_is_as_long_and_like_no_other() {
        let body = chat(1024, Turns::One, true);
        let apart = [3, 4].map(|number| begun_apart(&body, number));
        assert_eq!(apart.each_ref().map(Bytes::len), [1024, 1024]);
        assert!(apart[0] != apart[1] && apart[0] != body);
    }

    #[test]
    fn a_body_is_json_of_exactly_the_size_asked_for() {
        for size in [1024, 16 * 1024, 100 * 1024, 1024 * 1024] {
            for (turns, stream) in [(Turns::One, false), (Turns::Many, false), (Turns::One, true)] {
                let body = chat(size, turns, stream);
                assert_eq!(body.len(), size);
                let json: serde_json::Value =
                    serde_json::from_slice(&body).unwrap_or_else(|error| panic!("{size} bytes: {error}"));
                assert_eq!(json["model"], "load-model");
            }
        }
    }
}
