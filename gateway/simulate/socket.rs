//! `/v1/realtime`: a WebSocket that says everything back.

use std::io;
use std::sync::Arc;

use http::header::{CONNECTION, HeaderName, HeaderValue, UPGRADE};
use http::{Response, StatusCode};
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::Server;
use super::answer::{self, Body, Refusal};
use super::connection::Open;
use super::encoding::{base64, sha1};
use super::fault::Trouble;
use super::routes::Call;
use super::visit::Visit;

const MAGIC: &str = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11";

/// Longer messages end the connection.
const LONGEST: u64 = 16 << 20;

/// Answers the handshake and echoes from then on.
pub(super) fn upgrade(call: &Call, visit: Visit, upgrade: Option<OnUpgrade>) -> Response<Body> {
    let key = call.headers.get("sec-websocket-key").map(|key| String::from_utf8_lossy(key.as_bytes()).into_owned());
    let (Some(key), Some(upgrade)) = (key, upgrade) else {
        let refusal = Refusal::new(426, "This path speaks WebSocket over HTTP/1.1 only");
        let whole = refusal.whole(call.engine(), &call.path).with("upgrade", "websocket");
        return answer::send(&call.server, visit, Trouble::default(), whole.into(), false);
    };
    tokio::spawn(serve(Arc::clone(&call.server), visit, upgrade));
    let mut response = Response::new(Body::nothing());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = response.headers_mut();
    headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
    headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    let accept = base64(&sha1(format!("{key}{MAGIC}").as_bytes()));
    if let Ok(accept) = HeaderValue::from_str(&accept) {
        headers.insert(HeaderName::from_static("sec-websocket-accept"), accept);
    }
    if let Some(protocol) = call.headers.get("sec-websocket-protocol") {
        // Of several offers the first is taken.
        let first = protocol.to_str().unwrap_or_default().split(',').next().unwrap_or_default().trim();
        if let Ok(first) = HeaderValue::from_str(first) {
            headers.insert(HeaderName::from_static("sec-websocket-protocol"), first);
        }
    }
    response
}

/// Completed if the peer said goodbye, else disconnected.
async fn serve(server: Arc<Server>, mut visit: Visit, upgrade: OnUpgrade) {
    let _open = Open::new(&server);
    let mut stop = server.stop.subscribe();
    let echoing = async {
        let upgraded = upgrade.await.map_err(io::Error::other)?;
        echo(TokioIo::new(upgraded)).await
    };
    tokio::select! {
        ended = echoing => if ended.is_ok() { visit.completed() },
        // The server was dropped.
        _ = stop.wait_for(|stop| *stop) => {}
    }
}

async fn echo(mut wire: TokioIo<Upgraded>) -> io::Result<()> {
    loop {
        let Frame { first, payload } = Frame::read(&mut wire).await?;
        match first & 0x0f {
            // A goodbye is answered with the same, then the connection ends.
            8 => {
                write(&mut wire, first, &payload).await?;
                return wire.shutdown().await;
            }
            9 => write(&mut wire, 0x8a, &payload).await?,
            10 => {}
            _ => write(&mut wire, first, &payload).await?,
        }
    }
}

struct Frame {
    /// The final bit and the kind.
    first: u8,
    payload: Vec<u8>,
}

impl Frame {
    async fn read(wire: &mut TokioIo<Upgraded>) -> io::Result<Self> {
        let first = wire.read_u8().await?;
        let second = wire.read_u8().await?;
        let length = match second & 0x7f {
            126 => u64::from(wire.read_u16().await?),
            127 => wire.read_u64().await?,
            short => u64::from(short),
        };
        if second & 0x80 == 0 || length > LONGEST {
            return Err(io::Error::other("a frame that is not masked, or too long"));
        }
        let mut mask = [0; 4];
        wire.read_exact(&mut mask).await?;
        let mut payload = vec![0; length as usize];
        wire.read_exact(&mut payload).await?;
        payload.iter_mut().zip(mask.iter().cycle()).for_each(|(byte, mask)| *byte ^= mask);
        Ok(Self { first, payload })
    }
}

async fn write(wire: &mut TokioIo<Upgraded>, first: u8, payload: &[u8]) -> io::Result<()> {
    let mut frame = vec![first];
    match payload.len() {
        short @ 0..126 => frame.push(short as u8),
        middle @ 126..65_536 => {
            frame.push(126);
            frame.extend_from_slice(&(middle as u16).to_be_bytes());
        }
        long => {
            frame.push(127);
            frame.extend_from_slice(&(long as u64).to_be_bytes());
        }
    }
    frame.extend_from_slice(payload);
    wire.write_all(&frame).await?;
    wire.flush().await
}
