//! The client over HTTP/2 without TLS: eight streams share a connection.

use crate::client::{Load, MOST_ERRORS, Seen, Stop};
use crate::{Failure, upstream};
use bytes::Bytes;
use h2::client::SendRequest;
use http::Request;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;
use tokio::net::TcpStream;
use tokio::task::JoinSet;

const STREAMS_PER_CONNECTION: usize = 8;

/// A connection that is kept; a task of its own moves its bytes.
pub type Sender = SendRequest<Bytes>;

/// Runs as many exchanges at a time as the load asks for, over connections that are kept.
pub async fn run(kept: &mut Vec<Sender>, load: Load, target: SocketAddr, stop: &Arc<Stop>) -> Result<Seen, Failure> {
    while kept.len() < load.connections.div_ceil(STREAMS_PER_CONNECTION) {
        kept.push(connect(target).await?);
    }
    let body = load.body();
    let mut streams = JoinSet::new();
    for sender in kept.iter() {
        for _ in 0..STREAMS_PER_CONNECTION {
            streams.spawn(in_turn(sender.clone(), target, body.clone(), Arc::clone(stop)));
        }
    }
    let mut seen = Seen::default();
    while let Some(part) = streams.join_next().await {
        seen.add(part?);
    }
    Ok(seen)
}

async fn connect(target: SocketAddr) -> Result<Sender, Failure> {
    let socket = TcpStream::connect(target).await?;
    socket.set_nodelay(true)?;
    let (sender, connection) = h2::client::handshake(socket).await?;
    // Its end is seen by the streams, each of which counts its error.
    tokio::spawn(connection);
    Ok(sender)
}

/// One request after the other.
async fn in_turn(mut sender: Sender, target: SocketAddr, body: Bytes, stop: Arc<Stop>) -> Seen {
    let mut seen = Seen::default();
    while seen.errors < MOST_ERRORS && stop.one_more() {
        let began = Instant::now();
        match exchange(&mut sender, target, &body).await {
            Ok(()) => {
                seen.requests += 1;
                seen.latencies.push(began.elapsed());
            }
            Err(failure) => seen.fail(failure),
        }
    }
    seen
}

async fn exchange(sender: &mut Sender, target: SocketAddr, body: &Bytes) -> Result<(), Failure> {
    std::future::poll_fn(|context| sender.poll_ready(context)).await?;
    let (answer, mut sending) = sender.send_request(request(target, body.len())?, false)?;
    // The library keeps what the window does not take yet: our bodies are small.
    sending.send_data(body.clone(), true)?;
    let (head, mut answer) = answer.await?.into_parts();
    if head.status != http::StatusCode::OK {
        return Err(format!("status {}", head.status).into());
    }
    let mut text = Vec::with_capacity(upstream::COMPLETION.len());
    while let Some(piece) = answer.data().await {
        let piece = piece?;
        answer.flow_control().release_capacity(piece.len())?;
        text.extend_from_slice(&piece);
    }
    match text == upstream::COMPLETION.as_bytes() {
        true => Ok(()),
        false => Err("the answer is not what the upstream sent".into()),
    }
}

/// The same headers as over HTTP/1.1.
fn request(target: SocketAddr, length: usize) -> Result<Request<()>, Failure> {
    Ok(Request::post(format!("http://{target}/v1/chat/completions"))
        .header("accept", "application/json")
        .header("accept-encoding", "gzip, deflate")
        .header("user-agent", "OpenAI/Python 2.8.1")
        .header("authorization", "Bearer sk-load-0123456789abcdef")
        .header("content-type", "application/json")
        .header("content-length", length)
        .body(())?)
}
