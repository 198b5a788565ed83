//! ZeroMQ's wire protocol (ZMTP 3.0, rfc.zeromq.org/spec/23), as far as a subscriber without security needs it.
//!
//! Whoever speaks is not trusted: a frame has its bounds, and takes memory as its bytes come and not as it says it will.

use std::io::{self, Error, ErrorKind};

use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// The longest frame: engines' batches with a hundred thousand tokens have less than one.
const FRAME_MAX: u64 = 8 << 20;
/// A topic, a number, a batch; nobody sends more.
const FRAMES_MAX: usize = 4;
const GREETING: usize = 64;
/// Flags of a frame: another one follows; its length has eight bytes; it is a command.
const MORE: u8 = 1;
const LONG: u8 = 2;
const COMMAND: u8 = 4;
/// Says who we are: `READY` with our type of socket.
const READY: &[u8] = b"\x04\x19\x05READY\x0bSocket-Type\0\0\0\x03SUB";
/// Wants messages of whatever topic.
const SUBSCRIBE: &[u8] = b"\0\x01\x01";

/// A subscription to everything that a publisher says.
#[derive(Debug)]
pub(super) struct Subscription<S> {
    stream: S,
    frames: Vec<Vec<u8>>,
}

impl<S: AsyncReadExt + AsyncWriteExt + Unpin> Subscription<S> {
    /// Greets the publisher at the other end, and subscribes.
    pub(super) async fn open(mut stream: S) -> io::Result<Self> {
        stream.write_all(&greeting()).await?;
        let mut theirs = [0; GREETING];
        stream.read_exact(&mut theirs).await?;
        // No more than the signature, the version and the mechanism matters.
        if theirs[0] != 0xff || theirs[9] != 0x7f || theirs[10] < 3 || theirs[12..32] != greeting()[12..32] {
            return Err(wrong("it does not speak ZMTP 3 without security"));
        }
        stream.write_all(READY).await?;
        let mut this = Self { stream, frames: Vec::new() };
        let (flags, ready) = this.frame().await?;
        if flags & COMMAND == 0 || !ready.starts_with(b"\x05READY") {
            return Err(wrong("it is not ready"));
        }
        this.stream.write_all(SUBSCRIBE).await?;
        Ok(this)
    }

    /// The frames of the next message.
    pub(super) async fn next(&mut self) -> io::Result<&[Vec<u8>]> {
        self.frames.clear();
        loop {
            let (flags, frame) = self.frame().await?;
            if flags & COMMAND != 0 {
                continue;
            }
            if self.frames.len() == FRAMES_MAX {
                return Err(wrong("a message of too many frames"));
            }
            self.frames.push(frame);
            if flags & MORE == 0 {
                return Ok(&self.frames);
            }
        }
    }

    async fn frame(&mut self) -> io::Result<(u8, Vec<u8>)> {
        let flags = self.stream.read_u8().await?;
        let length = match flags & LONG {
            0 => u64::from(self.stream.read_u8().await?),
            _ => self.stream.read_u64().await?,
        };
        if flags & !(MORE | LONG | COMMAND) != 0 || length > FRAME_MAX {
            return Err(wrong("no frame, or one that is too long"));
        }
        let mut frame = Vec::new();
        (&mut self.stream).take(length).read_to_end(&mut frame).await?;
        if frame.len() as u64 != length {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        Ok((flags, frame))
    }
}

fn greeting() -> [u8; GREETING] {
    let mut greeting = [0; GREETING];
    (greeting[0], greeting[9], greeting[10]) = (0xff, 0x7f, 3);
    greeting[12..16].copy_from_slice(b"NULL");
    greeting
}

fn wrong(why: &'static str) -> Error {
    Error::new(ErrorKind::InvalidData, why)
}

/// The number and the batch of a message: `[topic, number, batch]`.
pub(super) fn numbered(message: &[Vec<u8>]) -> Option<(u64, &[u8])> {
    let [_topic, number, batch] = message else { return None };
    Some((u64::from_be_bytes(number.as_slice().try_into().ok()?), batch))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a subscriber makes of a publisher that says `says` and goes.
    async fn heard(says: &[u8]) -> io::Result<Vec<Vec<u8>>> {
        let (ours, mut theirs) = tokio::io::duplex(1 << 16);
        theirs.write_all(says).await?;
        theirs.shutdown().await?;
        Ok(Subscription::open(ours).await?.next().await?.to_vec())
    }

    fn after_greeting(frames: &[u8]) -> Vec<u8> {
        [&greeting(), READY, frames].concat()
    }

    #[tokio::test]
    async fn messages_are_read_whatever_the_length_of_their_frames_and_commands_passed_over() {
        let long = [&b"\x02"[..], &300_u64.to_be_bytes(), &[7; 300]].concat();
        let says = after_greeting(&[b"\x04\x05\x04PING\x01\x01t", &long[..]].concat());
        assert_eq!(heard(&says).await.unwrap(), [b"t".to_vec(), vec![7; 300]]);
    }

    #[tokio::test]
    async fn what_is_no_publisher_is_left() {
        let mut older = greeting();
        older[10] = 2;
        let mut secured = greeting();
        secured[12..17].copy_from_slice(b"CURVE");
        let too_long = [&b"\x02"[..], &(FRAME_MAX + 1).to_be_bytes()].concat();
        let many = b"\x01\x01x".repeat(FRAMES_MAX + 1);
        for says in [
            &b"HTTP/1.1 400 Bad Request\r\n\r\n"[..],
            &[older.as_slice(), READY].concat(),
            &[secured.as_slice(), READY].concat(),
            &[&greeting(), &b"\0\x01x"[..]].concat(),
            &after_greeting(&too_long),
            &after_greeting(&many),
            &after_greeting(b"\x80\x01x"),
            &after_greeting(b"\0\x05x"),
        ] {
            assert!(heard(says).await.is_err(), "{}", says.escape_ascii());
        }
    }

    #[test]
    fn a_batch_stands_behind_its_topic_and_its_number() {
        let message = [b"kv".to_vec(), 7_u64.to_be_bytes().to_vec(), b"batch".to_vec()];
        assert_eq!(numbered(&message), Some((7, &b"batch"[..])));
        assert_eq!(numbered(&message[..2]), None);
        assert_eq!(numbered(&[b"kv".to_vec(), b"7".to_vec(), b"batch".to_vec()]), None);
    }
}
