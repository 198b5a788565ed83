//! A model server that says exactly the bytes it is told, when it is told, and nothing else.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use sha2::{Digest, Sha256};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;

/// How much of a request's body is remembered.
const KEPT: usize = 1 << 20;

/// A request as it came.
#[derive(Clone, Debug, Default)]
pub struct Heard {
    /// Its head, line ends included.
    pub head: String,
    /// The first MiB of its body.
    pub body: Bytes,
    /// SHA-256 of the whole body, in hex.
    pub sha256: String,
}

impl Heard {
    /// One header, empty if absent.
    pub fn header(&self, name: &str) -> &str {
        let pairs = self.head.lines().filter_map(|line| line.split_once(": "));
        let mut found = pairs.filter(|(key, _)| key.eq_ignore_ascii_case(name));
        found.next().map_or("", |(_, value)| value)
    }
}

/// What the server does next.
#[derive(Clone, Debug)]
pub enum Step {
    /// Says this, in one write.
    Say(Bytes),
    /// Says nothing for a while.
    Pause(Duration),
    /// Says nothing until it gets a permit.
    Await(Arc<Semaphore>),
    /// Says nothing until the other side has closed the connection, and counts that.
    UntilGone,
    /// Closes the connection.
    Close,
}

/// What to do about a request.
type Script = dyn Fn(&Heard) -> Vec<Step> + Send + Sync;

/// The server. It answers GETs (health checks) with 200; it stops when dropped.
pub struct Wire {
    address: SocketAddr,
    log: Arc<Log>,
    accepting: JoinHandle<()>,
}

#[derive(Default)]
struct Log {
    heard: Mutex<Vec<Heard>>,
    gone: AtomicUsize,
}

impl Wire {
    /// A server that does about each POST what `script` says.
    pub async fn start(script: impl Fn(&Heard) -> Vec<Step> + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, log) = (listener.local_addr().unwrap(), Arc::<Log>::default());
        let (shared, script): (_, Arc<Script>) = (log.clone(), Arc::new(script));
        let accepting = tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                stream.set_nodelay(true).unwrap();
                // It ends when its peer closes it, which is no failure.
                tokio::spawn(serve(stream, script.clone(), shared.clone()));
            }
        });
        Self { address, log, accepting }
    }

    /// A server that answers each POST with these bytes, head and all, in one write.
    pub async fn saying(answer: impl Into<Bytes>) -> Self {
        let answer = answer.into();
        Self::start(move |_| vec![Step::Say(answer.clone())]).await
    }

    /// A server that answers each POST with a stream of these events, cut in two where `x-cut` says.
    pub async fn streaming(body: impl Fn(&Heard) -> String + Send + Sync + 'static) -> Self {
        Self::start(move |heard| {
            let body = body(heard);
            let at = heard.header("x-cut").parse().unwrap_or(0).min(body.len());
            let (one, other) = body.as_bytes().split_at(at);
            let chunk = |piece: &[u8]| if piece.is_empty() { Bytes::new() } else { Framing::Chunked.piece(piece) };
            vec![
                Step::Say([Framing::Chunked.head(EVENTS, 0), chunk(one)].concat().into()),
                Step::Pause(Duration::from_millis(1)),
                Step::Say([chunk(other), Bytes::from("0\r\n\r\n")].concat().into()),
            ]
        })
        .await
    }

    /// Where it listens, as a URL.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The POSTs so far.
    pub fn heard(&self) -> Vec<Heard> {
        self.log.heard.lock().clone()
    }

    /// How often the other side has left before all was said, or where the script waited for that.
    pub fn gone(&self) -> usize {
        self.log.gone.load(Relaxed)
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

async fn serve(stream: TcpStream, script: Arc<Script>, log: Arc<Log>) -> Option<()> {
    let mut stream = BufReader::with_capacity(64 << 10, stream);
    loop {
        let heard = hear(&mut stream).await?;
        if heard.head.starts_with("GET ") {
            stream.get_mut().write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await.ok()?;
            continue;
        }
        log.heard.lock().push(heard.clone());
        for step in script(&heard) {
            match step {
                Step::Say(bytes) => {
                    if stream.get_mut().write_all(&bytes).await.is_err() {
                        log.gone.fetch_add(1, Relaxed);
                        return None;
                    }
                }
                Step::Pause(time) => tokio::time::sleep(time).await,
                Step::Await(permits) => permits.acquire().await.ok()?.forget(),
                Step::UntilGone => {
                    // It may end in a reset, too.
                    let _ = stream.read(&mut [0]).await;
                    log.gone.fetch_add(1, Relaxed);
                    return None;
                }
                Step::Close => return None,
            }
        }
    }
}

/// Reads one request; `None` at the end of the connection.
async fn hear(stream: &mut BufReader<TcpStream>) -> Option<Heard> {
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if stream.read_line(&mut head).await.ok()? == 0 {
            return None;
        }
    }
    let mut heard = Heard { head, ..Heard::default() };
    let mut left: usize = heard.header("content-length").parse().unwrap_or(0);
    let (mut hash, mut kept) = (Sha256::new(), Vec::new());
    while left > 0 {
        let piece = stream.fill_buf().await.ok()?;
        let piece = &piece[..piece.len().min(left)];
        if piece.is_empty() {
            return None;
        }
        hash.update(piece);
        kept.extend_from_slice(&piece[..piece.len().min(KEPT - kept.len())]);
        let length = piece.len();
        left -= length;
        stream.consume(length);
    }
    heard.body = kept.into();
    heard.sha256 = hex(&hash.finalize());
    Some(heard)
}

/// SHA-256 in hex.
pub fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn hex(digest: &[u8]) -> String {
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// How an answer says where it ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// In chunks.
    Chunked,
    /// By its length.
    Length,
    /// By the end of the connection.
    Close,
}

impl Framing {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Chunked, Self::Length, Self::Close];

    /// A head for an answer of this type and framing.
    pub fn head(self, content_type: &str, length: usize) -> Bytes {
        let framing = match self {
            Self::Chunked => "transfer-encoding: chunked".to_owned(),
            Self::Length => format!("content-length: {length}"),
            Self::Close => "connection: close".to_owned(),
        };
        format!("HTTP/1.1 200 OK\r\ncontent-type: {content_type}\r\n{framing}\r\n\r\n").into()
    }

    /// The steps that say `body` in pieces of `size` bytes, each in a write of its own.
    pub fn answer(self, content_type: &str, body: &Bytes, size: usize) -> Vec<Step> {
        let pieces = body.chunks(size).map(|piece| Step::Say(self.piece(piece)));
        let head = Step::Say(self.head(content_type, body.len()));
        std::iter::once(head).chain(pieces).chain(self.end()).collect()
    }

    /// One piece of a body.
    pub fn piece(self, piece: &[u8]) -> Bytes {
        match self {
            Self::Chunked => [format!("{:x}\r\n", piece.len()).as_bytes(), piece, b"\r\n"].concat().into(),
            _ => Bytes::copy_from_slice(piece),
        }
    }

    /// The end of an answer.
    pub fn end(self) -> Option<Step> {
        match self {
            Self::Chunked => Some(Step::Say(Bytes::from_static(b"0\r\n\r\n"))),
            Self::Length => None,
            Self::Close => Some(Step::Close),
        }
    }
}

/// The content type of events.
pub const EVENTS: &str = "text/event-stream";

/// A raw connection that reads until `wanted` has come; returns all that came, also if it ended before.
pub async fn read_until(stream: &mut TcpStream, wanted: &str) -> String {
    let mut read = Vec::new();
    while !String::from_utf8_lossy(&read).contains(wanted) {
        match tokio::time::timeout(Duration::from_secs(60), stream.read_buf(&mut read)).await.expect("in time") {
            Ok(0) | Err(_) => break,
            Ok(_) => {}
        }
    }
    String::from_utf8_lossy(&read).into_owned()
}
