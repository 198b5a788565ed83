//! A connection that changes its protocol (WebSocket): after the handshake the bytes pass both ways, unread.

use std::pin::Pin;
use std::time::{Duration, Instant};

use http::{HeaderValue, StatusCode};
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
}

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
    Ok(Tunnelled::Open(Box::new(Tunnel { upstream, answer, quiet })))
}

/// Carries bytes until one side closes, nothing passes for too long, or `cut` resolves; counts those from the client
/// and those to it. Returns whether it was cut.
pub async fn carry(
    tunnel: Tunnel,
    downstream: &mut Downstream,
    from: &mut u64,
    to: &mut u64,
    mut cut: Pin<&mut impl Future<Output = ()>>,
) -> bool {
    let Tunnel { mut upstream, mut answer, quiet } = tunnel;
    let protocol = answer.headers.get(http::header::UPGRADE).cloned();
    for name in &HOP_BY_HOP {
        answer.remove_header(name);
    }
    let _ = answer.insert_header(http::header::CONNECTION, "upgrade");
    let _ = answer.insert_header(http::header::UPGRADE, protocol.unwrap_or(HeaderValue::from_static("websocket")));
    downstream.tunnelled();
    let session = downstream.session();
    let mut open = session.write_response_header(Box::new(answer)).await.is_ok();
    let mut was_cut = false;
    while open {
        open = tokio::select! {
            () = cut.as_mut() => {
                was_cut = true;
                false
            }
            // After the handshake both sessions read a body that ends with its connection.
            sent = session.read_request_body() => match sent {
                Ok(Some(bytes)) => {
                    *from += bytes.len() as u64;
                    upstream.write_body(&bytes).await.is_ok()
                }
                _ => false,
            },
            read = upstream.read_body_bytes() => match read {
                Ok(Some(bytes)) => {
                    *to += bytes.len() as u64;
                    session.write_response_body(bytes, false).await.is_ok()
                }
                _ => false,
            },
            () = tokio::time::sleep(quiet) => false,
        }
    }
    upstream.shutdown().await;
    session.shutdown().await;
    was_cut
}
