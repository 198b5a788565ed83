//! As much HTTP/1.1 as both ends of the load need: heads, and bodies by length or by chunks.

use crate::Failure;
use bytes::{Buf, BytesMut};
use std::net::SocketAddr;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Room for the next read: the big bodies should not come in small pieces.
const READ_AHEAD: usize = 64 * 1024;

/// A connection and what was read from it but not yet used.
pub struct Wire {
    /// The socket itself, for writing.
    pub socket: TcpStream,
    buffer: BytesMut,
}

impl Wire {
    /// Takes over a connected socket.
    pub fn new(socket: TcpStream) -> std::io::Result<Self> {
        socket.set_nodelay(true)?;
        Ok(Self { socket, buffer: BytesMut::new() })
    }

    /// The next head, without its body; `None` if the peer closed before one began.
    pub async fn head(&mut self) -> Result<Option<Head>, Failure> {
        loop {
            if let Some(end) = memchr::memmem::find(&self.buffer, b"\r\n\r\n") {
                return Ok(Some(Head(self.buffer.split_to(end + 4))));
            }
            if self.more().await? == 0 {
                return match self.buffer.is_empty() {
                    true => Ok(None),
                    false => Err("the connection closed inside a head".into()),
                };
            }
        }
    }

    /// Hands every piece of the body to `each`.
    pub async fn body(&mut self, mut framing: Framing, mut each: impl FnMut(&[u8])) -> Result<(), Failure> {
        while !framing.is_done() {
            self.piece(&mut framing, &mut each).await?;
        }
        Ok(())
    }

    /// Hands what is there of the body to `each`, waiting only if that is nothing.
    pub async fn piece(&mut self, framing: &mut Framing, each: &mut impl FnMut(&[u8])) -> Result<(), Failure> {
        if self.buffer.is_empty() && self.more().await? == 0 {
            return Err("the connection closed inside a body".into());
        }
        let used = framing.feed(&self.buffer, each)?;
        self.buffer.advance(used);
        Ok(())
    }

    /// Returns once the peer closes; anything it sends meanwhile waits for the next head.
    pub async fn closed(&mut self) -> std::io::Result<()> {
        while self.more().await? > 0 {}
        Ok(())
    }

    async fn more(&mut self) -> std::io::Result<usize> {
        self.buffer.reserve(READ_AHEAD);
        self.socket.read_buf(&mut self.buffer).await
    }
}

/// What `server` answers to a request without a body: the status and the text.
pub async fn call(server: SocketAddr, method: &str, path: &str) -> Result<(u16, String), Failure> {
    let mut wire = Wire::new(TcpStream::connect(server).await?)?;
    wire.socket
        .write_all(format!("{method} {path} HTTP/1.1\r\nhost: load\r\ncontent-length: 0\r\n\r\n").as_bytes())
        .await?;
    let head = wire.head().await?.ok_or("no answer")?;
    let mut text = Vec::new();
    wire.body(head.framing(), |piece| text.extend_from_slice(piece)).await?;
    Ok((head.word(1).parse()?, String::from_utf8(text)?))
}

/// What `server` answers to a GET.
pub async fn get(server: SocketAddr, path: &str) -> Result<String, Failure> {
    Ok(call(server, "GET", path).await?.1)
}

/// A request's or an answer's first line and headers, as received.
pub struct Head(BytesMut);

impl Head {
    /// A word of the first line: method, path, status.
    pub fn word(&self, index: usize) -> &str {
        let line = self.lines().next().unwrap_or_default();
        let word = line.split(|byte| *byte == b' ').nth(index);
        std::str::from_utf8(word.unwrap_or_default()).unwrap_or_default()
    }

    /// A header's value.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.lines().skip(1).find_map(|line| {
            let (key, value) = line.split_at_checked(name.len())?;
            let value = value.strip_prefix(b":")?;
            (key.eq_ignore_ascii_case(name.as_bytes())).then(|| std::str::from_utf8(value).unwrap_or_default().trim())
        })
    }

    /// A header that is a number.
    pub fn number(&self, name: &str) -> Option<u64> {
        self.header(name)?.parse().ok()
    }

    /// How the body that follows is framed.
    pub fn framing(&self) -> Framing {
        match self.header("transfer-encoding") {
            Some(coding) if coding.eq_ignore_ascii_case("chunked") => Framing::chunked(),
            _ => Framing::Length(self.number("content-length").unwrap_or(0)),
        }
    }

    /// Whether the peer wants the connection closed after this exchange.
    pub fn closes(&self) -> bool {
        self.header("connection").is_some_and(|value| value.eq_ignore_ascii_case("close"))
    }

    fn lines(&self) -> impl Iterator<Item = &[u8]> {
        self.0[..].split(|byte| *byte == b'\n').map(|line| line.strip_suffix(b"\r").unwrap_or(line))
    }
}

/// What is still to come of a body.
pub enum Framing {
    /// So many bytes.
    Length(u64),
    /// Chunks, and where in them we are.
    Chunked(Chunks),
}

impl Framing {
    fn chunked() -> Self {
        Self::Chunked(Chunks::Size(0))
    }

    /// Whether all of the body has come.
    pub fn is_done(&self) -> bool {
        matches!(self, Self::Length(0) | Self::Chunked(Chunks::Done))
    }

    /// Uses as much of `bytes` as it can and says how much that was.
    fn feed(&mut self, bytes: &[u8], each: &mut impl FnMut(&[u8])) -> Result<usize, Failure> {
        match self {
            Self::Length(left) => {
                let take = bytes.len().min(usize::try_from(*left)?);
                each(&bytes[..take]);
                *left -= take as u64;
                Ok(take)
            }
            Self::Chunked(chunks) => chunks.feed(bytes, each),
        }
    }
}

/// The place inside a chunked body.
#[derive(Clone, Copy)]
pub enum Chunks {
    /// In a size line, with the size so far.
    Size(usize),
    /// After a size, until the line ends.
    Extension(usize),
    /// In a chunk, with what is left of it.
    Data(usize),
    /// In the line end after a chunk.
    AfterData,
    /// In the trailer, with the length of its current line.
    Trailer(usize),
    /// Past the end.
    Done,
}

impl Chunks {
    fn feed(&mut self, bytes: &[u8], each: &mut impl FnMut(&[u8])) -> Result<usize, Failure> {
        let mut at = 0;
        while at < bytes.len() && !matches!(self, Self::Done) {
            if let Self::Data(left) = *self {
                let take = left.min(bytes.len() - at);
                each(&bytes[at..at + take]);
                at += take;
                *self = match left - take {
                    0 => Self::AfterData,
                    rest => Self::Data(rest),
                };
            } else {
                *self = self.step(bytes[at])?;
                at += 1;
            }
        }
        Ok(at)
    }

    fn step(self, byte: u8) -> Result<Self, Failure> {
        Ok(match (self, byte) {
            (Self::Size(size) | Self::Extension(size), b'\n') if size == 0 => Self::Trailer(0),
            (Self::Size(size) | Self::Extension(size), b'\n') => Self::Data(size),
            (Self::Size(size), b'\r' | b';' | b' ') => Self::Extension(size),
            (Self::Size(size), digit) => Self::Size(size * 16 + hex(digit)?),
            (Self::AfterData, b'\n') => Self::Size(0),
            (Self::Trailer(0), b'\n') => Self::Done,
            (Self::Trailer(_), b'\n') => Self::Trailer(0),
            (Self::Trailer(length), b'\r') => Self::Trailer(length),
            (Self::Trailer(length), _) => Self::Trailer(length + 1),
            (same, _) => same,
        })
    }
}

fn hex(digit: u8) -> Result<usize, Failure> {
    char::from(digit)
        .to_digit(16)
        .map(|value| value as usize)
        .ok_or_else(|| format!("byte {digit:#04x} in a chunk size").into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chunked_body_reads_the_same_at_every_split() {
        let wire = b"5\r\nhello\r\n6;x=y\r\n world\r\n0\r\nt: u\r\n\r\nNEXT";
        for split in 0..wire.len() {
            let mut chunks = Chunks::Size(0);
            let mut text = Vec::new();
            let mut used = 0;
            for end in [split, wire.len()] {
                used += chunks
                    .feed(&wire[used..end], &mut |piece| text.extend_from_slice(piece))
                    .unwrap_or_else(|failure| panic!("split {split}: {failure}"));
            }
            assert_eq!(text, b"hello world", "split {split}");
            assert_eq!(&wire[used..], b"NEXT", "split {split}");
        }
    }

    #[test]
    fn headers_are_found_whatever_their_case() {
        let head = Head(BytesMut::from(&b"HTTP/1.1 200 OK\r\nContent-Length: 12\r\nconnection:close\r\n\r\n"[..]));
        assert_eq!(head.word(1), "200");
        assert_eq!(head.number("content-length"), Some(12));
        assert!(head.closes());
    }
}
