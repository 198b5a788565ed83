//! A connection that changes its protocol (WebSocket): after the handshake the bytes pass both ways, unread.

use std::pin::Pin;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::header::{CONNECTION, UPGRADE};
use http::{HeaderValue, StatusCode};
use pingora::protocols::http::ServerSession;
use pingora::protocols::http::v1::client::HttpSession as Http1Session;

use super::attempt::{Failure, pingora_head};
use super::connection::{Connection, Connections, Target, plain};
use super::headers::{HOP_BY_HOP, RequestHead};
use super::waiting::Waiting;
use super::{AnswerHead, Downstream};
use crate::policy::file::Timeouts;

/// What became of the wish for a tunnel.
pub enum Tunnelled {
    /// It stands.
    Open(Box<Tunnel>),
    /// The upstream did not want it: its answer's head. The client has not been answered.
    Refused(Box<AnswerHead>),
}

/// A tunnel to an upstream. The client has not been told.
pub struct Tunnel {
    upstream: Http1Session,
    answer: AnswerHead,
    quiet: Duration,
    /// What the upstream says, where its goodbye is held.
    frames: Option<Frames>,
}

/// How long the client has to answer a goodbye that was held.
const FAREWELL: Duration = Duration::from_secs(5);

/// Opens a tunnel to `target`.
pub async fn tunnel(
    connections: &Connections,
    target: &Target,
    head: &RequestHead<'_>,
    timeouts: &Timeouts,
    waiting: &mut Waiting<'_>,
) -> Result<Tunnelled, Failure> {
    let limit = Instant::now() + Duration::from_millis(timeouts.connect_ms);
    let connect = connections.connect(target, Duration::ZERO, None);
    let connection =
        waiting.until(limit, connect).await.map_err(|_| Failure::ConnectTimeout)?.map_err(Failure::Connect)?;
    let Connection::Http1(stream, _) = connection else {
        return Err(Failure::Invalid("WebSockets need HTTP/1.1 to the upstream: set `http2: never`".to_owned()));
    };
    let lost = |error: pingora::BError| Failure::Reset(plain(&error));
    let mut upstream = Http1Session::new(stream);
    upstream.write_request_header(Box::new(pingora_head(head).map_err(lost)?)).await.map_err(lost)?;
    let limit = Instant::now() + Duration::from_millis(timeouts.answer_ms);
    let read = waiting.until(limit, upstream.read_response()).await.map_err(|_| Failure::AnswerTimeout)?;
    read.map_err(lost)?;
    let Some(answer) = upstream.resp_header().cloned() else { return Err(Failure::Invalid("no head".to_owned())) };
    if answer.status != StatusCode::SWITCHING_PROTOCOLS {
        return Ok(Tunnelled::Refused(Box::new(answer)));
    }
    upstream.maybe_upgrade_body_writer();
    let quiet = Duration::from_millis(timeouts.between_tokens_ms);
    Ok(Tunnelled::Open(Box::new(Tunnel { upstream, answer, quiet, frames: None })))
}

/// Why a tunnel carries nothing more.
#[derive(Debug)]
pub enum Parting {
    /// One side closed, or nothing passed for too long.
    Closed,
    /// It was cut.
    Cut,
    /// The upstream says goodbye with these bytes. They have not been passed on.
    Goodbye(Bytes),
}

/// Carries bytes until one side closes, nothing passes for too long, or `cut` resolves; counts those from the client
/// and those to it. Both sides stay open: [`part`] closes them. `holds`: the upstream's goodbye is not passed on.
pub async fn carry(
    tunnel: &mut Tunnel,
    downstream: &mut Downstream,
    counts: (&mut u64, &mut u64),
    holds: bool,
    cut: Pin<&mut impl Future<Output = ()>>,
) -> Parting {
    downstream.tunnelled();
    let session = downstream.session();
    if session.write_response_header(Box::new(tunnel.head())).await.is_err() {
        return Parting::Closed;
    }
    tunnel.frames = holds.then(Frames::default);
    tokio::select! {
        () = cut => Parting::Cut,
        goodbye = tunnel.pump(session, counts) => goodbye.map_or(Parting::Closed, Parting::Goodbye),
    }
}

/// Closes both sides. A goodbye that was held is passed on before, and the client's answer to it.
pub async fn part(mut tunnel: Tunnel, downstream: &mut Downstream, goodbye: Option<Bytes>) {
    let session = downstream.session();
    if let Some(goodbye) = goodbye
        && session.write_response_body(goodbye, false).await.is_ok()
    {
        tunnel.frames = None;
        let _ = tokio::time::timeout(FAREWELL, tunnel.pump(session, (&mut 0, &mut 0))).await;
    }
    tunnel.upstream.shutdown().await;
    session.shutdown().await;
}

impl Tunnel {
    /// The head that the client gets.
    fn head(&self) -> AnswerHead {
        let mut head = self.answer.clone();
        for name in &HOP_BY_HOP {
            head.remove_header(name);
        }
        let protocol = self.answer.headers.get(UPGRADE).cloned();
        let _ = head.insert_header(CONNECTION, "upgrade");
        let _ = head.insert_header(UPGRADE, protocol.unwrap_or(HeaderValue::from_static("websocket")));
        head
    }

    /// Passes bytes both ways. Returns the upstream's goodbye, if frames are followed and it comes.
    async fn pump(&mut self, session: &mut ServerSession, (from, to): (&mut u64, &mut u64)) -> Option<Bytes> {
        loop {
            tokio::select! {
                // After the handshake both sessions read a body that ends with its connection.
                sent = session.read_request_body() => {
                    let bytes = sent.ok()??;
                    *from += bytes.len() as u64;
                    self.upstream.write_body(&bytes).await.ok()?;
                }
                read = self.upstream.read_body_bytes() => {
                    let mut bytes = read.ok()??;
                    *to += bytes.len() as u64;
                    let goodbye = self.frames.as_mut().and_then(|frames| frames.goodbye(&bytes));
                    let goodbye = goodbye.map(|at| bytes.split_off(at));
                    session.write_response_body(bytes, false).await.ok()?;
                    if goodbye.is_some() {
                        return goodbye;
                    }
                }
                () = tokio::time::sleep(self.quiet) => return None,
            }
        }
    }
}

/// Follows the frames of one side of a WebSocket, however they are cut (RFC 6455, 5.2).
#[derive(Debug, Default)]
struct Frames {
    /// The head of a frame, as far as it has come.
    head: [u8; 14],
    length: usize,
    /// What is still to come of a frame whose head is complete.
    left: u64,
}

impl Frames {
    /// Where the first Close frame begins in `bytes`, which come next.
    fn goodbye(&mut self, bytes: &[u8]) -> Option<usize> {
        const CLOSE: u8 = 8;
        let mut at = 0;
        while at < bytes.len() {
            if self.left > 0 {
                let skipped = self.left.min((bytes.len() - at) as u64);
                self.left -= skipped;
                at += skipped as usize;
                continue;
            }
            if self.length == 0 && bytes[at] & 0x0f == CLOSE {
                return Some(at);
            }
            self.push(bytes[at]);
            at += 1;
        }
        None
    }

    fn push(&mut self, byte: u8) {
        self.head[self.length] = byte;
        self.length += 1;
        if let Some(left) = self.payload() {
            (self.left, self.length) = (left, 0);
        }
    }

    /// How long the frame's payload is, once its head is complete.
    fn payload(&self) -> Option<u64> {
        let second = *self.head[..self.length].get(1)?;
        let (wide, short) = match second & 0x7f {
            126 => (2, 0),
            127 => (8, 0),
            short => (0, u64::from(short)),
        };
        let mask = if second & 0x80 == 0 { 0 } else { 4 };
        let length = self.head[2..2 + wide].iter().fold(short, |length, byte| length << 8 | u64::from(*byte));
        (self.length == 2 + wide + mask).then_some(length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Messages of all widths of length, one of them masked, whose payloads look like goodbyes; then a goodbye.
    fn conversation() -> (Vec<u8>, usize) {
        let mut bytes = vec![0x81, 3, 0x88, 0x88, 0x88, 0x89, 0, 0x82, 126, 0, 200];
        bytes.extend([0x88; 200]);
        bytes.extend([0x02, 127, 0, 0, 0, 0, 0, 1, 0, 0]);
        bytes.extend([0x88; 1 << 16]);
        bytes.extend([0x80, 0x82, 8, 8, 8, 8, 0x88, 0x88]);
        let at = bytes.len();
        bytes.extend([0x88, 2, 3, 232]);
        (bytes, at)
    }

    #[test]
    fn a_goodbye_is_found_where_it_begins_however_the_bytes_are_cut() {
        let (bytes, at) = conversation();
        for size in [1, 2, 3, 7, 100, 65_536, bytes.len()] {
            let (mut frames, mut passed) = (Frames::default(), 0);
            let found = bytes.chunks(size).find_map(|piece| {
                let found = frames.goodbye(piece).map(|at| passed + at);
                passed += piece.len();
                found
            });
            assert_eq!(found, Some(at), "in pieces of {size}");
        }
        assert_eq!(Frames::default().goodbye(&bytes[..at]), None);
    }

    #[test]
    fn a_length_that_no_frame_can_have_is_only_a_frame_that_never_ends() {
        let mut frames = Frames::default();
        assert_eq!(frames.goodbye(&[0x81, 127, 255, 255, 255, 255, 255, 255, 255, 255, 0x88, 0x88]), None);
        assert_eq!(frames.left, u64::MAX - 2);
    }
}
