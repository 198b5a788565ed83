//! The client's side of a request: its head and body in, our answer out, and whether it is still there.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::header::{CONNECTION, CONTENT_LENGTH, EXPECT, HOST, TRANSFER_ENCODING};
use http::{HeaderValue, Method, StatusCode, Version, request};
use infergate_plugins::authenticator::Credentials;
use infergate_plugins::authenticator::mtls::Certificate;
use pingora::ErrorType;
use pingora::apps::{HttpPersistentSettings, ReusedHttpStream};
use pingora::protocols::http::{HttpTask, ServerSession};
use pingora::server::ShutdownWatch;
use tokio::sync::watch;

use super::AnswerHead;
use super::connection::plain;
use crate::audit::record::Peer;
use crate::ending::before_last;
use crate::refusal::{Code, Refusal};
use crate::state::Lease;

/// How long a connection may still bring a request after the process began to go down.
pub const LINGER: Duration = Duration::from_millis(500);

/// What Pingora gathers before it writes to a client. Small enough for many quiet streams; the head of an answer and
/// a short body still leave in one write.
pub const WRITE_BUFFER: usize = 4 << 10;

/// One request's client.
pub struct Downstream {
    session: ServerSession,
    closing: watch::Receiver<bool>,
    head_sent: bool,
    finished: bool,
    /// The client left, and the answer is read to its end without it.
    mute: bool,
    /// Bytes that an HTTP/1 answer of known length still lacks.
    lacking: u64,
    /// Whether the last piece waits for the end, and that piece.
    holds_last: bool,
    held: Bytes,
    held_head: Option<Box<AnswerHead>>,
    write_timeout: Duration,
}

/// The client has left, or cannot be written to any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gone;

impl Downstream {
    /// Waits for the next request on a connection. `None` where there is none: the client closed, stayed idle for
    /// too long, the gateway is going down, or what came is no HTTP (which is answered here).
    pub(super) async fn read(
        mut session: ServerSession,
        idle: Duration,
        shutdown: &ShutdownWatch,
        closing: &watch::Receiver<bool>,
    ) -> Option<Self> {
        session.set_pipelining_enabled(true);
        let mut shutdown = shutdown.clone();
        let read = {
            let reading = session.read_request();
            tokio::pin!(reading);
            let down = async { shutdown.wait_for(|down| *down).await.is_ok() };
            tokio::select! {
                biased;
                read = &mut reading => Some(read),
                () = tokio::time::sleep(idle) => None,
                // A request may be on its way when the process goes down: it is still served.
                _ = down => tokio::time::timeout(LINGER, reading).await.ok(),
            }
        };
        match read {
            Some(Ok(true)) => {}
            Some(Err(error)) if *error.etype() == ErrorType::InvalidHTTPHeader => {
                tracing::debug!(error = %plain(&error), "refused a head that is no HTTP");
                refuse_unread(&mut session).await;
                return None;
            }
            _ => return None,
        }
        // Pingora takes a chunk size that is missing for the last one and reads what follows as trailers. A server in
        // front that skips it would read on, so nothing that comes behind a chunked body can be trusted (R53).
        if !session.is_http2() && session.req_header().headers.contains_key(TRANSFER_ENCODING) {
            session.set_keepalive(None);
        }
        Some(Self {
            session,
            closing: closing.clone(),
            head_sent: false,
            finished: false,
            mute: false,
            lacking: 0,
            holds_last: false,
            held: Bytes::new(),
            held_head: None,
            write_timeout: Duration::MAX,
        })
    }

    /// The request's head.
    pub fn head(&self) -> &request::Parts {
        self.session.req_header()
    }

    /// The other end of the connection.
    pub fn peer(&self) -> Peer {
        Peer(self.session.client_addr().and_then(|address| address.as_inet().copied()))
    }

    /// What the client has shown of itself: its headers, and the certificate of its connection.
    pub fn credentials(&self) -> Credentials<'_> {
        let tls = self.session.digest().and_then(|digest| digest.ssl_digest.as_deref());
        Credentials::of(&self.head().headers).with(tls.and_then(|tls| tls.extension.get::<Certificate>()))
    }

    /// The protocol, as records name it.
    pub fn protocol(&self) -> &'static str {
        match (self.is_http2(), self.head().version) {
            (true, _) => "h2",
            (_, Version::HTTP_10) => "http/1.0",
            _ => "http/1.1",
        }
    }

    /// Whether the request came over HTTP/2.
    pub fn is_http2(&self) -> bool {
        self.session.is_http2()
    }

    /// Refuses every head that two servers could read differently (RFC 9112, 2.2, 5.2, 6.3; R52, R53). Pingora has
    /// checked the authority and the chunked coding already.
    pub fn check_head(&self) -> Result<(), Refusal> {
        let head = self.head();
        let wrong = |what: &'static str| Err(Refusal::new(Code::BadRequest, what).closing());
        if head.method == Method::CONNECT {
            let message = "CONNECT is not served here";
            return Err(Refusal::new(Code::MethodNotAllowed, message).closing());
        }
        let lengths = head.headers.get_all(CONTENT_LENGTH).iter().count();
        let listed =
            head.headers.get(CONTENT_LENGTH).is_some_and(|value| !value.as_bytes().iter().all(u8::is_ascii_digit));
        if lengths > 1 || listed {
            return wrong("Content-Length must be given once, as a number");
        }
        let path = self.session.req_header().raw_path();
        if path.iter().any(|byte| matches!(byte, b'#' | b'\\' | b' ' | 0..=31 | 127)) {
            return wrong("the path has characters that must be percent-encoded");
        }
        if ![&b"/"[..], b"http://", b"https://"].iter().any(|start| path.starts_with(start)) {
            return wrong("the path must begin with a slash");
        }
        if head.headers.get(HOST).is_some_and(|host| !host.as_bytes().iter().all(|byte| is_host(*byte))) {
            return wrong("Host is one name or address, with a port or without");
        }
        if is_twisted(head.uri.path()) {
            return wrong("the path has empty or dot segments, or an encoded slash, backslash, dot or NUL");
        }
        if self.session.is_http2() { Ok(()) } else { self.check_http1() }
    }

    /// What can only be wrong in HTTP/1, where the head is text.
    fn check_http1(&self) -> Result<(), Refusal> {
        let raw = self.session.to_h1_raw();
        let wrong = |what: &'static str| Err(Refusal::new(Code::BadRequest, what).closing());
        if let Some(fault) = line_fault(&raw) {
            return wrong(fault);
        }
        let line = raw.split(|byte| *byte == b'\n').find(|line| line.len() > 1).unwrap_or_default();
        if line.contains(&b'#') {
            // The parsed path has lost it.
            return wrong("the path has a fragment, which never leaves a client");
        }
        let head = self.head();
        let both = head.headers.contains_key(TRANSFER_ENCODING) && names(&raw, b"content-length");
        if both {
            return wrong("Transfer-Encoding and Content-Length exclude each other");
        }
        if head
            .headers
            .get_all(TRANSFER_ENCODING)
            .iter()
            .any(|value| !value.as_bytes().eq_ignore_ascii_case(b"chunked"))
        {
            return wrong("the only Transfer-Encoding is chunked");
        }
        if head.version == Version::HTTP_11 && !head.headers.contains_key(HOST) && head.uri.authority().is_none() {
            return wrong("HTTP/1.1 wants a Host header");
        }
        Ok(())
    }

    /// The body's length, where the client says it.
    pub fn content_length(&self) -> Option<u64> {
        length(&self.head().headers)
    }

    /// Reads the whole body, whose lease grows with it, up to `max` bytes.
    pub async fn read_body(&mut self, max: u64, lease: &mut Lease) -> Result<Bytes, BodyFault> {
        if self.head().headers.contains_key(EXPECT) {
            self.session.write_continue_response().await.map_err(|_| BodyFault::Gone)?;
        }
        let Some(first) = self.read_piece().await? else { return Ok(Bytes::new()) };
        let known = self.content_length();
        if known == Some(first.len() as u64) {
            return Ok(first);
        }
        // The space for the rest is reserved at once, but never on the client's word alone.
        let mut body = BytesMut::with_capacity(known.unwrap_or(0).min(max).min(1 << 20) as usize);
        let mut next = Some(first);
        while let Some(piece) = next {
            let grown = (body.len() + piece.len()) as u64;
            if grown > max {
                return Err(BodyFault::TooLarge);
            }
            if !lease.grow(grown) {
                return Err(BodyFault::NoRoom);
            }
            if let (Some(known), true) = (known, body.capacity() < body.len() + piece.len()) {
                body.reserve((known - body.len() as u64).min(max) as usize);
            }
            body.extend_from_slice(&piece);
            next = self.read_piece().await?;
        }
        Ok(body.freeze())
    }

    async fn read_piece(&mut self) -> Result<Option<Bytes>, BodyFault> {
        self.session.read_request_body().await.map_err(|error| match error.etype() {
            ErrorType::ConnectionClosed | ErrorType::ReadError | ErrorType::H2Error => BodyFault::Gone,
            ErrorType::ReadTimedout => BodyFault::Slow,
            _ => BodyFault::Malformed,
        })
    }

    /// Resolves when the client has left. To be asked only when the body has been read.
    pub async fn departed(&mut self) -> Gone {
        if self.mute {
            std::future::pending::<()>().await;
        }
        loop {
            // Anything but an error is an event of the protocol that means nothing here.
            if self.session.read_body_or_idle(true).await.is_err() {
                return Gone;
            }
        }
    }

    /// From now on the client counts as gone: writes go nowhere.
    pub fn mute(&mut self) {
        self.mute = true;
    }

    /// Whether the client counts as gone.
    pub fn is_mute(&self) -> bool {
        self.mute
    }

    /// Whether the head of an answer has been sent.
    pub fn head_sent(&self) -> bool {
        self.head_sent
    }

    /// How long the client may take to accept a piece.
    pub fn set_write_timeout(&mut self, timeout: Duration) {
        self.write_timeout = timeout;
        self.session.set_write_timeout(Some(timeout));
    }

    /// Sends the head of an answer. Without a length it is chunked, or ends with the connection for HTTP/1.0.
    pub async fn write_head(&mut self, mut head: Box<AnswerHead>) -> Result<(), Gone> {
        if self.mute {
            return Ok(());
        }
        if *self.closing.borrow() {
            self.session.set_keepalive(None);
        }
        if !self.is_http2() {
            // An upstream's HTTP/2 head cannot be written in HTTP/1.
            head.set_version(Version::HTTP_11);
        }
        let unframed = !head.headers.contains_key(CONTENT_LENGTH) && !head.status.is_informational();
        if unframed
            && !self.is_http2()
            && head.status != StatusCode::NO_CONTENT
            && head.status != StatusCode::NOT_MODIFIED
        {
            match self.head().version {
                Version::HTTP_10 => self.session.set_keepalive(None),
                _ => drop(head.insert_header(TRANSFER_ENCODING, "chunked")),
            }
        }
        self.head_sent = true;
        if !self.is_http2() {
            self.lacking = length(&head.headers).unwrap_or(0);
        }
        self.session.write_response_header(head).await.map_err(|_| Gone)
    }

    /// Keeps the head of an answer without a body until the answer is finished.
    pub fn hold_head(&mut self, head: Box<AnswerHead>) {
        self.held_head = Some(head);
    }

    /// From now on the last piece that was written leaves only when the answer is finished.
    pub fn hold_last(&mut self, holds: bool) {
        self.holds_last = holds;
    }

    /// Sends a piece of the answer, at once, unless it is to be held.
    pub async fn write(&mut self, mut piece: Bytes) -> Result<(), Gone> {
        if self.mute || piece.is_empty() {
            return Ok(());
        }
        if self.holds_last {
            std::mem::swap(&mut self.held, &mut piece);
        }
        self.send(piece).await
    }

    async fn send(&mut self, piece: Bytes) -> Result<(), Gone> {
        if piece.is_empty() {
            return Ok(());
        }
        self.lacking = self.lacking.saturating_sub(piece.len() as u64);
        if self.lacking > 0 && piece.len() < WRITE_BUFFER {
            return self.write_through(piece).await;
        }
        self.session.write_response_body(piece, false).await.map_err(|_| Gone)
    }

    /// Sends a piece behind which more will come. Pingora keeps small pieces of an answer of known length until it
    /// has all, and has no flush in its API; but it flushes what it has when a list of tasks ends with a failure.
    async fn write_through(&mut self, piece: Bytes) -> Result<(), Gone> {
        const FLUSH: ErrorType = ErrorType::Custom("flush");
        let tasks = vec![HttpTask::Body(Some(piece), false), HttpTask::Failed(pingora::Error::new(FLUSH))];
        let written = tokio::time::timeout(self.write_timeout, self.session.response_duplex_vec(tasks)).await;
        match written {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) if *error.etype() == FLUSH => Ok(()),
            _ => Err(Gone),
        }
    }

    /// Puts a comment of the protocol's before the last event that is held; behind it, if it cannot be told where that
    /// begins. `whole`: what is held begins with an event.
    pub fn put_before_end(&mut self, comment: &str, whole: bool) {
        self.held = before_last(&self.held, comment, whole);
    }

    /// Ends the answer.
    pub async fn finish(&mut self) -> Result<(), Gone> {
        self.finished = true;
        if self.mute {
            return Ok(());
        }
        if let Some(head) = self.held_head.take() {
            self.write_head(head).await?;
        }
        let held = std::mem::take(&mut self.held);
        self.send(held).await?;
        self.session.finish_body().await.map_err(|_| Gone)
    }

    /// Breaks the answer off so that the client cannot take it for complete.
    pub async fn abort(&mut self) {
        self.session.set_keepalive(None);
        self.session.shutdown().await;
    }

    /// Sends a whole answer.
    pub async fn answer(&mut self, mut head: Box<AnswerHead>, body: Bytes, close: bool) -> Result<(), Gone> {
        if close || *self.closing.borrow() {
            self.session.set_keepalive(None);
        }
        let length = head.insert_header(CONTENT_LENGTH, body.len());
        debug_assert!(length.is_ok(), "a number is a header value");
        self.write_head(head).await?;
        self.write(body).await?;
        self.finish().await
    }

    /// The session for the connection's next request, if it can have one.
    pub(super) async fn into_next(mut self) -> Option<ServerSession> {
        if !self.finished || self.mute {
            // An answer that was not ended leaves the protocol in the middle of something.
            self.session.shutdown().await;
            return None;
        }
        self.session.set_total_drain_timeout(Some(Duration::from_secs(1)));
        if self.is_http2() {
            // A stream whose body was not read is reset behind its answer, and then some clients (curl 7.88) lose that.
            let _ = self.session.drain_request_body().await;
            return None;
        }
        let settings = HttpPersistentSettings::for_session(&self.session);
        let reusable = self.session.finish().await.ok()??;
        let (stream, settings) = ReusedHttpStream::from_reusable_stream(reusable, settings).consume();
        let mut next = ServerSession::new_http1(stream);
        settings.into_iter().for_each(|settings| settings.apply_to_session(&mut next));
        Some(next)
    }

    /// The session itself, for a protocol that takes it over.
    pub(super) fn session(&mut self) -> &mut ServerSession {
        &mut self.session
    }

    /// The protocol took the session over and is done with it.
    pub(super) fn tunnelled(&mut self) {
        self.head_sent = true;
        self.session.set_keepalive(None);
    }
}

fn length(headers: &http::HeaderMap) -> Option<u64> {
    headers.get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// Why a body did not come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BodyFault {
    /// The client left.
    Gone,
    /// It came too slowly.
    Slow,
    /// It is larger than allowed.
    TooLarge,
    /// There is no room for it.
    NoRoom,
    /// Its framing is broken.
    Malformed,
}

/// Whether a byte may stand in a host, an address or a port.
fn is_host(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-._~:[]%".contains(&byte)
}

/// Whether a path could be read in two ways by two servers.
fn is_twisted(path: &str) -> bool {
    let encoded = |code: &str| path.as_bytes().windows(3).any(|three| three.eq_ignore_ascii_case(code.as_bytes()));
    let twisted = path.split('/').skip(1).any(|segment| segment == "." || segment == "..") || path.contains("//");
    twisted || (path.contains('%') && ["%2f", "%5c", "%2e", "%00", "%23"].iter().any(|code| encoded(code)))
}

/// What is wrong with the line ends of a raw head.
fn line_fault(raw: &[u8]) -> Option<&'static str> {
    memchr::memchr_iter(b'\n', raw).find_map(|at| {
        match (at.checked_sub(1).map(|before| raw[before]), raw.get(at + 1)) {
            (Some(b'\r'), Some(b' ' | b'\t')) => Some("a header is folded over two lines, which HTTP has given up"),
            (Some(b'\r'), _) => None,
            _ => Some("a line of the head ends with a bare LF: lines end with CRLF"),
        }
    })
}

/// Whether some line of a raw head begins with the header `name`, in any case.
fn names(raw: &[u8], name: &[u8]) -> bool {
    raw.split(|byte| *byte == b'\n').any(|line| {
        line.len() > name.len()
            && line[..name.len()].eq_ignore_ascii_case(name)
            && matches!(line[name.len()], b':' | b' ' | b'\t')
    })
}

/// The answer to something that is no HTTP: there is no head to answer to, so OpenAI's envelope it is.
async fn refuse_unread(session: &mut ServerSession) {
    let refusal = Refusal::new(Code::BadRequest, "the request's head is malformed or ambiguous");
    let body = refusal.body(crate::surface::Dialect::OpenAi, "");
    let Ok(mut head) = AnswerHead::build(StatusCode::BAD_REQUEST, Some(4)) else { return };
    let _ = head.insert_header(http::header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    let _ = head.insert_header(CONTENT_LENGTH, body.len());
    let _ = head.insert_header(CONNECTION, "close");
    session.set_keepalive(None);
    let _ = session.write_error_response(head, body.into()).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_that_two_servers_could_read_differently_is_twisted() {
        for path in ["/v1/../admin", "/v1//models", "/v1/%2e%2E/x", "/v1%2Fmodels", "/a%5cb", "/./x", "/x/.."] {
            assert!(is_twisted(path), "{path}");
        }
        for path in ["/v1/models", "/v1/files/a.b..c", "/100%25", "/"] {
            assert!(!is_twisted(path), "{path}");
        }
    }

    #[test]
    fn a_header_is_found_in_a_raw_head_whatever_its_case() {
        let raw = b"POST / HTTP/1.1\r\nHost: x\r\ncONTENT-lENGTH : 3\r\n\r\n";
        assert!(names(raw, b"content-length") && !names(raw, b"content-len"));
    }
}
