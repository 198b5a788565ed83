//! The network side of the simulated server: accepting, idle closing, cutting and resetting connections.

use std::convert::Infallible;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize};
use std::task::{Context, Poll};
use std::time::Duration;

use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio::task::JoinSet;

use super::{Server, routes};

/// How long a connection lives on after it was cut, so that what was said before is sent.
const LAST_WORDS: Duration = Duration::from_millis(5);

const NOT_HTTP: &[u8] = b"HTTP/9.9 \x00\xff OK\r\n: no name\r\ncontent-length: x\r\n\r\n\x15\x03\x01\x00\x02";

/// Serves until dropped, which cuts all connections.
pub(super) async fn accept(server: Arc<Server>, listener: TcpListener) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    connections.spawn(serve(Arc::clone(&server), stream));
                }
                // Out of file descriptors, most likely: the next moment may be better.
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn serve(server: Arc<Server>, stream: TcpStream) {
    let _open = Open::new(&server);
    // It fails only for connections that are gone already.
    let _ = stream.set_nodelay(true);
    let line = Arc::new(Line::default());
    let wire = TokioIo::new(Wire { stream, line: Arc::clone(&line) });
    let service = service_fn(|request| {
        let answer = routes::answer(Arc::clone(&server), Arc::clone(&line), request);
        async { Ok::<_, Infallible>(answer.await) }
    });
    let http = http();
    let connection = http.serve_connection_with_upgrades(wire, service);
    tokio::select! {
        // A broken connection is the client's affair: `Seen` tells what became of its requests.
        _ = connection => {}
        () = line.was_cut() => {}
        () = line.was_idle(&server) => {}
    }
}

fn http() -> auto::Builder<TokioExecutor> {
    let mut http = auto::Builder::new(TokioExecutor::new());
    http.http1().keep_alive(true).half_close(false);
    let mut http2 = http.http2();
    http2.max_concurrent_streams(10_000);
    http2.initial_stream_window_size(4 << 20).initial_connection_window_size(16 << 20);
    http
}

/// Counts as open until dropped.
pub(super) struct Open(Arc<Server>);

impl Open {
    pub(super) fn new(server: &Arc<Server>) -> Self {
        server.open.fetch_add(1, Relaxed);
        Self(Arc::clone(server))
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Relaxed);
    }
}

/// What the requests of a connection can do to it.
#[derive(Default)]
pub(super) struct Line {
    cut: Notify,
    reset: AtomicBool,
    garbage: AtomicBool,
    busy: AtomicUsize,
    served: AtomicBool,
    idle_since_ms: AtomicU64,
}

impl Line {
    /// Closes the connection without a word, once what was written before is sent.
    pub(super) fn cut(&self) {
        self.cut.notify_one();
    }

    /// Closes the connection with a TCP reset.
    pub(super) fn reset(&self) {
        self.reset.store(true, Relaxed);
        self.cut.notify_one();
    }

    /// Replaces the next bytes that are written, then closes.
    pub(super) fn garbage(&self) {
        self.garbage.store(true, Relaxed);
    }

    pub(super) fn begin(&self) {
        self.busy.fetch_add(1, Relaxed);
    }

    pub(super) fn end(&self, now_ms: u64) {
        self.idle_since_ms.store(now_ms, Relaxed);
        self.served.store(true, Relaxed);
        self.busy.fetch_sub(1, Relaxed);
    }

    async fn was_cut(&self) {
        self.cut.notified().await;
        if !self.reset.load(Relaxed) {
            tokio::time::sleep(LAST_WORDS).await;
        }
    }

    /// As uvicorn: the first request of a connection may take its time.
    async fn was_idle(&self, server: &Server) {
        let Some(longest) = server.options.keep_alive_ms else {
            return std::future::pending().await;
        };
        loop {
            let idle = server.elapsed_ms().saturating_sub(self.idle_since_ms.load(Relaxed));
            let resting = self.busy.load(Relaxed) == 0 && self.served.load(Relaxed);
            if resting && idle >= longest {
                return;
            }
            let left = if resting { longest - idle } else { longest };
            tokio::time::sleep(Duration::from_millis(left.max(1))).await;
        }
    }
}

/// The socket; it can be made to say something that is no HTTP, and to end in a reset.
struct Wire {
    stream: TcpStream,
    line: Arc<Line>,
}

impl Wire {
    fn garbage(&mut self, cx: &mut Context<'_>) -> Option<Poll<io::Result<usize>>> {
        if !self.line.garbage.load(Relaxed) {
            return None;
        }
        let written = Pin::new(&mut self.stream).poll_write(cx, NOT_HTTP);
        if written.is_ready() {
            self.line.garbage.store(false, Relaxed);
            self.line.cut();
        }
        Some(written)
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        if self.line.reset.load(Relaxed) {
            // Closing a socket with zero linger is what sends the reset.
            let _ = self.stream.set_zero_linger();
        }
    }
}

impl AsyncRead for Wire {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, into)
    }
}

impl AsyncWrite for Wire {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.garbage(cx) {
            Some(written) => written.map_ok(|_| bytes.len()),
            None => Pin::new(&mut self.stream).poll_write(cx, bytes),
        }
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.garbage(cx) {
            Some(written) => written.map_ok(|_| bytes.iter().map(|part| part.len()).sum()),
            None => Pin::new(&mut self.stream).poll_write_vectored(cx, bytes),
        }
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
