//! One attempt: connect, send, and wait for the first piece of an answer.
//!
//! Until the first piece nothing of the answer has reached the client, so whatever fails here can be tried
//! elsewhere.

use std::time::{Duration, Instant};

use bytes::{Buf, Bytes, BytesMut};
use http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use http::{StatusCode, Version};
use pingora::http::RequestHeader;
use pingora::protocols::Stream;
use pingora::protocols::http::v1::client::HttpSession as Http1Session;
use pingora::protocols::http::v2::client::Http2Session;
use tokio::io::AsyncWriteExt;

use super::AnswerHead;
use super::connection::{Connection, Connections, Target, plain};
use super::headers::RequestHead;
use super::waiting::{Interrupted, Waiting};
use crate::policy::file::Timeouts;
use crate::pool::Upstream;
use crate::sse::{Framer, has_data};

/// The most of an unfinished event that is held back; a longer one passes in pieces.
const EVENT_HELD_MAX: usize = 1 << 20;
/// The most of an error answer that is read to find its reason.
const ERROR_READ_MAX: usize = 64 << 10;
/// How long an upstream may take over the rest of an error answer.
const ERROR_READ: Duration = Duration::from_secs(2);

/// A kept connection that the upstream had closed fails within a round trip. One that fails later took the request,
/// which may have been in work.
const STALE_WITHIN: Duration = Duration::from_secs(1);

/// The most that is read of what the gateway asks for itself.
const FETCH_MAX: usize = 1 << 20;

/// What is asked of an upstream, ready to be sent.
pub struct Order<'a> {
    http1: Vec<u8>,
    /// For a target that may speak HTTP/2.
    http2: Option<Box<RequestHeader>>,
    bodiless: bool,
    body: Bytes,
    streaming: bool,
    timeouts: &'a Timeouts,
}

impl<'a> Order<'a> {
    /// The order for `target`: `streaming` says that the client asked for a stream.
    pub fn new(
        target: &Target,
        head: &RequestHead<'_>,
        body: Bytes,
        streaming: bool,
        timeouts: &'a Timeouts,
    ) -> Result<Self, Failure> {
        let http2 = if target.may_speak_http2() { Some(Box::new(pingora_head(head).map_err(broken)?)) } else { None };
        let bodiless = head.client.method == http::Method::HEAD;
        Ok(Self { http1: head.http1(), http2, bodiless, body, streaming, timeouts })
    }
}

fn broken(error: pingora::BError) -> Failure {
    Failure::Connect(plain(&error))
}

/// Why an attempt gave nothing to pass on.
#[derive(Debug)]
pub enum Failure {
    /// No connection: nothing was sent.
    Connect(String),
    /// No connection in time.
    ConnectTimeout,
    /// The connection was lost before an answer.
    Reset(String),
    /// What came back was no HTTP.
    Invalid(String),
    /// No first event of a stream in time.
    FirstTokenTimeout,
    /// No answer in time.
    AnswerTimeout,
    /// The whole request's time is up.
    TotalTimeout,
    /// The client left.
    Gone,
    /// The prompt turned out not to pass.
    Stopped,
}

/// An answer whose head and first piece are here.
pub struct Answer {
    /// Its head, as the upstream sent it.
    pub head: Box<AnswerHead>,
    /// When the head came.
    pub head_at: Instant,
    /// Whether a kept connection was found stale on the way.
    pub stale: bool,
    /// What comes behind the head.
    pub rest: Rest,
}

/// An answer without its head.
pub struct Rest {
    /// When the first piece came.
    pub first_at: Instant,
    /// What has come of the body and can be passed on.
    pub first: Bytes,
    pub(super) body: AnswerBody,
}

impl Rest {
    /// What is here of the body.
    pub fn body(&self) -> Bytes {
        self.first.clone()
    }

    /// Puts another body in the place of one that is here as a whole.
    pub fn replace(&mut self, head: &mut AnswerHead, body: Bytes) {
        if head.headers.contains_key(CONTENT_LENGTH) && body.len() != self.first.len() {
            // A number is always a valid header.
            let _ = head.insert_header(CONTENT_LENGTH, body.len().to_string());
        }
        self.first = body;
    }

    /// Lets an answer go that is not passed on.
    pub async fn discard(self, connections: &Connections, target: &Target) {
        self.body.release(connections, target).await;
    }

    /// The whole body, if it has come and `head` says so.
    pub fn whole(&self, head: &AnswerHead) -> Option<&Bytes> {
        let length: usize = head.headers.get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok()?;
        (self.body.framer.is_none() && length == self.first.len()).then_some(&self.first)
    }
}

/// The rest of an answer.
pub(super) struct AnswerBody {
    leg: Leg,
    /// Follows the events, where the answer is an event stream.
    pub(super) framer: Option<Framer>,
    /// The beginning of an event whose end has not come.
    held: BytesMut,
    /// Whether an event too long to be held is on its way in pieces.
    split: bool,
    /// A fault that was met while pieces were gathered; the next read tells it.
    fault: Option<String>,
    pub(super) ended: bool,
}

/// The upstream's side of a request.
enum Leg {
    Http1(Box<Http1Session>),
    Http2(Box<Http2Session>),
}

/// Asks one endpoint. A kept connection that turns out to be closed is replaced once, for free.
pub async fn ask(
    connections: &Connections,
    target: &Target,
    order: &Order<'_>,
    waiting: &mut Waiting<'_>,
) -> Result<Answer, Failure> {
    let begun = Instant::now();
    match ask_once(connections, target, order, waiting, (begun, false)).await {
        Err((Failure::Reset(_), true)) if begun.elapsed() < STALE_WITHIN => {
            let again = ask_once(connections, target, order, waiting, (Instant::now(), true)).await;
            again.map(|answer| Answer { stale: true, ..answer }).map_err(|(failure, _)| failure)
        }
        other => other.map_err(|(failure, _)| failure),
    }
}

/// Begins now, on a connection that is opened for it (`fresh`) or not. The failure's flag says that the connection had
/// been kept from an earlier request.
async fn ask_once(
    connections: &Connections,
    target: &Target,
    order: &Order<'_>,
    waiting: &mut Waiting<'_>,
    (now, fresh): (Instant, bool),
) -> Result<Answer, (Failure, bool)> {
    let timeouts = order.timeouts;
    let limit = now + Duration::from_millis(timeouts.connect_ms);
    let idle = Duration::from_millis(timeouts.idle_ms);
    let connection = match waiting.until(limit, connections.connect(target, idle, Some(now).filter(|_| !fresh))).await {
        Ok(Ok(connection)) => connection,
        Ok(Err(error)) => return Err((Failure::Connect(error), false)),
        Err(interrupted) => return Err((interrupted.during(Failure::ConnectTimeout), false)),
    };
    let kept = matches!(connection, Connection::Http1(_, true) | Connection::Http2(_, true));
    answer(connection, order, waiting).await.map_err(|failure| (failure, kept))
}

/// Gets `path` from an endpoint of `upstream` without a client behind it: the status, and the body's first MiB.
/// Whoever stops waiting closes the connection.
pub async fn fetch(
    connections: &Connections,
    target: &Target,
    upstream: &Upstream,
    path: &str,
) -> Result<(u16, Bytes), String> {
    let mut read = BytesMut::new();
    let keep = |piece: &[u8]| {
        read.extend_from_slice(piece);
        false
    };
    let status = fetch_until(connections, target, upstream, path, keep).await?;
    Ok((status, read.freeze()))
}

/// The same piece by piece, until one is `enough`.
pub async fn fetch_until(
    connections: &Connections,
    target: &Target,
    upstream: &Upstream,
    path: &str,
    mut enough: impl FnMut(&[u8]) -> bool,
) -> Result<u16, String> {
    let (client, ()) = http::Request::get("/").body(()).map_err(|error| error.to_string())?.into_parts();
    let head = RequestHead::own(&client, upstream, path, "infergate");
    let (nothing, timeouts) = (Bytes::new(), Timeouts::default());
    let order = Order::new(target, &head, nothing, false, &timeouts).map_err(|failure| format!("{failure:?}"))?;
    let connection = connections.connect(target, Duration::ZERO, None).await?;
    let (leg, head) = exchange(connection, &order).await.map_err(|failure| format!("{failure:?}"))?;
    let mut body = AnswerBody::new(leg, &head, &order);
    let (mut piece, mut read) = (BytesMut::new(), 0);
    while read < FETCH_MAX && !body.ended {
        piece.clear();
        body.next(&mut piece).await?;
        read += piece.len();
        if enough(&piece) {
            break;
        }
    }
    // Closed, not kept: it belongs to the background's thread, which every request on it would have to wake.
    body.close().await;
    Ok(head.status.as_u16())
}

/// Sends the order and waits for the first piece.
async fn answer(connection: Connection, order: &Order<'_>, waiting: &mut Waiting<'_>) -> Result<Answer, Failure> {
    let sent_at = Instant::now();
    let (allowed, late) = if order.streaming {
        (order.timeouts.first_token_ms, Failure::FirstTokenTimeout)
    } else {
        (order.timeouts.answer_ms, Failure::AnswerTimeout)
    };
    let limit = sent_at + Duration::from_millis(allowed);
    let (leg, head) = match waiting.until(limit, exchange(connection, order)).await {
        Ok(done) => done?,
        Err(interrupted) => return Err(interrupted.during(late)),
    };
    let head_at = Instant::now();
    let mut body = AnswerBody::new(leg, &head, order);
    let limit = match order.streaming {
        true => limit,
        false => head_at + Duration::from_millis(order.timeouts.between_tokens_ms),
    };
    let first = match waiting.until(limit, body.first()).await {
        Ok(first) => first.map_err(Failure::Reset)?,
        Err(interrupted) => return Err(interrupted.during(late)),
    };
    Ok(Answer { head, head_at, stale: false, rest: Rest { first_at: Instant::now(), first, body } })
}

/// Writes the request and reads the head of its answer.
async fn exchange(connection: Connection, order: &Order<'_>) -> Result<(Leg, Box<AnswerHead>), Failure> {
    match connection {
        Connection::Http1(stream, _) => exchange_http1(stream, order).await,
        Connection::Http2(session, _) => exchange_http2(session, order).await,
    }
}

async fn exchange_http1(mut stream: Stream, order: &Order<'_>) -> Result<(Leg, Box<AnswerHead>), Failure> {
    // Head and body leave in one system call where they fit.
    let written = async {
        stream.write_all_buf(&mut order.http1.as_slice().chain(order.body.as_ref())).await?;
        stream.flush().await
    };
    // An upstream may answer before it has read everything (413): its answer is worth more than our error.
    let written = written.await;
    let mut session = Box::new(Http1Session::new(stream));
    loop {
        session.read_response().await.map_err(|error| match (&written, error.etype()) {
            (Err(error), _) => Failure::Reset(error.to_string()),
            (_, pingora::ErrorType::InvalidHTTPHeader) => Failure::Invalid(plain(&error)),
            _ => Failure::Reset(plain(&error)),
        })?;
        let Some(head) = session.resp_header() else { return Err(Failure::Invalid("no head".to_owned())) };
        if !head.status.is_informational() {
            let head = Box::new(head.clone());
            return Ok((Leg::Http1(session), head));
        }
        if head.status == StatusCode::SWITCHING_PROTOCOLS {
            return Err(Failure::Invalid("the upstream changed the protocol unasked".to_owned()));
        }
    }
}

async fn exchange_http2(mut session: Box<Http2Session>, order: &Order<'_>) -> Result<(Leg, Box<AnswerHead>), Failure> {
    let lost = |error: pingora::BError| Failure::Reset(plain(&error));
    let Some(mut request) = order.http2.clone() else {
        return Err(Failure::Invalid("the upstream chose HTTP/2 unasked".to_owned()));
    };
    request.set_version(Version::HTTP_2);
    let empty = order.body.is_empty();
    session.write_request_header(request, empty).map_err(lost)?;
    if !empty {
        session.write_request_body(order.body.clone(), true).await.map_err(lost)?;
    }
    session.read_response_header().await.map_err(lost)?;
    match session.response_header().cloned() {
        Some(head) => Ok((Leg::Http2(session), Box::new(head))),
        None => Err(Failure::Invalid("no head".to_owned())),
    }
}

/// The head as Pingora's own clients want it.
pub(super) fn pingora_head(head: &RequestHead<'_>) -> pingora::Result<RequestHeader> {
    let mut request = RequestHeader::build(head.client.method.clone(), head.path.as_bytes(), Some(24))?;
    request.insert_header(http::header::HOST, head.authority)?;
    let mut wrong = None;
    head.each(|name, value| {
        let name = String::from_utf8_lossy(name).into_owned();
        if let Err(error) = request.append_header(name, value) {
            wrong = Some(error);
        }
    });
    if let Some(length) = head.length {
        request.insert_header(CONTENT_LENGTH, length)?;
    }
    if let Some(protocol) = head.upgrade {
        request.insert_header(http::header::CONNECTION, "upgrade")?;
        request.insert_header(http::header::UPGRADE, protocol)?;
    }
    wrong.map_or(Ok(request), Err)
}

impl Interrupted {
    fn during(self, late: Failure) -> Failure {
        match self {
            Self::Gone => Failure::Gone,
            Self::Limit => late,
            Self::Total => Failure::TotalTimeout,
            Self::Stopped => Failure::Stopped,
        }
    }
}

impl Leg {
    /// Reads the next piece and hands it to `take`. Returns whether there was one.
    async fn read(&mut self, take: impl FnOnce(&[u8])) -> Result<bool, String> {
        let told = |error: pingora::BError| plain(&error);
        match self {
            Self::Http1(session) => {
                let piece = session.read_body_ref().await.map_err(told)?;
                Ok(piece.map(take).is_some())
            }
            Self::Http2(session) => {
                let piece = session.read_response_body().await.map_err(told)?;
                Ok(piece.map(|piece| take(&piece)).is_some())
            }
        }
    }
}

impl AnswerBody {
    fn new(leg: Leg, head: &AnswerHead, order: &Order<'_>) -> Self {
        let events =
            head.headers.get(CONTENT_TYPE).is_some_and(|kind| kind.as_bytes().starts_with(b"text/event-stream"));
        let encoded = head.headers.contains_key(http::header::CONTENT_ENCODING);
        Self {
            leg,
            // A compressed stream is no text: it passes as it is.
            framer: (events && !encoded).then(Framer::default),
            held: BytesMut::new(),
            split: false,
            fault: None,
            ended: order.bodiless,
        }
    }

    /// The first piece: of an event stream everything up to its first event with data, else whatever comes first.
    async fn first(&mut self) -> Result<Bytes, String> {
        let mut first = BytesMut::new();
        while !self.ended {
            let before = first.len();
            self.next(&mut first).await?;
            let enough = self.framer.is_none() || has_data(&first[before..]);
            if enough && !first.is_empty() {
                break;
            }
        }
        Ok(first.freeze())
    }

    /// Reads the next piece and appends to `out` what of it can be passed on, which may be nothing: of an event
    /// stream only whole events. Sets `ended` at the end. Dropping the future loses nothing.
    pub(super) async fn next(&mut self, out: &mut BytesMut) -> Result<(), String> {
        if let Some(fault) = self.fault.take() {
            return Err(fault);
        }
        let Self { leg, framer, held, split, .. } = self;
        let more = leg.read(|piece| pass_whole_events(framer, held, split, piece, out)).await?;
        if !more {
            self.ended = true;
            out.extend_from_slice(&std::mem::take(&mut self.held));
        }
        Ok(())
    }

    /// Keeps a fault for the next read.
    pub(super) fn keep_fault(&mut self, fault: String) {
        self.fault = Some(fault);
    }

    /// Whether the bytes that were passed on end between two events.
    pub(super) fn at_boundary(&self) -> bool {
        !self.split
    }

    /// Gives the connection back if the answer has been read to its end; closes it otherwise, which tells the
    /// upstream to stop.
    pub(super) async fn release(self, connections: &Connections, target: &Target) {
        match self.leg {
            Leg::Http1(mut session) if self.ended => {
                session.respect_keepalive();
                if let Some(stream) = session.reuse().await {
                    connections.keep(target, stream);
                }
            }
            Leg::Http2(session) if self.ended => connections.release(target, *session).await,
            _ => self.close().await,
        }
    }

    async fn close(self) {
        match self.leg {
            Leg::Http1(mut session) => session.shutdown().await,
            Leg::Http2(mut session) => session.shutdown(),
        }
    }
}

/// Appends the whole events of `held` and `piece` to `out`; the rest waits in `held`. What is no event stream passes.
fn pass_whole_events(
    framer: &mut Option<Framer>,
    held: &mut BytesMut,
    split: &mut bool,
    piece: &[u8],
    out: &mut BytesMut,
) {
    let complete = framer.as_mut().map_or(piece.len(), |framer| framer.push(piece));
    let too_long = held.len() + piece.len() > EVENT_HELD_MAX;
    let cut = match complete {
        0 if *split || too_long => piece.len(),
        complete => complete,
    };
    *split = cut > complete;
    if cut > 0 {
        out.extend_from_slice(held);
        held.clear();
        out.extend_from_slice(&piece[..cut]);
    }
    held.extend_from_slice(&piece[cut..]);
}

impl Answer {
    /// Reads the rest of an error answer, as far as it is worth, so that its reason can be found.
    pub async fn read_reason(&mut self, waiting: &mut Waiting<'_>) {
        let limit = Instant::now() + ERROR_READ;
        let Rest { first, body, .. } = &mut self.rest;
        let mut read = BytesMut::from(first.as_ref());
        while read.len() < ERROR_READ_MAX && !body.ended {
            let Ok(Ok(())) = waiting.until(limit, body.next(&mut read)).await else { break };
        }
        *first = read.freeze();
    }

    /// Whether it is a stream of events that can be told apart.
    pub fn is_event_stream(&self) -> bool {
        self.rest.body.framer.is_some()
    }
}
