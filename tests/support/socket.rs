//! A client's side of a WebSocket.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const PATIENCE: Duration = Duration::from_secs(10);

/// One side of a WebSocket, by hand.
pub struct Socket(TcpStream);

impl Socket {
    /// Shakes hands; the answer's head, and the socket if it was 101.
    pub async fn open(address: SocketAddr, path: &str, headers: &str) -> (String, Self) {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let head = format!(
            "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n{headers}\r\n"
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        while !answer.ends_with(b"\r\n\r\n") {
            let byte = tokio::time::timeout(PATIENCE, stream.read_u8()).await.unwrap();
            let Ok(byte) = byte else { break };
            answer.push(byte);
        }
        (String::from_utf8(answer).unwrap(), Self(stream))
    }

    /// Sends one frame; `first` is its final bit and its kind.
    pub async fn send(&mut self, first: u8, text: &[u8]) {
        let mut frame = vec![first];
        match text.len() {
            short @ 0..126 => frame.push(0x80 | short as u8),
            long => {
                frame.push(0x80 | 127);
                frame.extend_from_slice(&(long as u64).to_be_bytes());
            }
        }
        frame.extend_from_slice(&[1, 2, 3, 4]);
        frame.extend(text.iter().zip([1, 2, 3, 4].iter().cycle()).map(|(byte, mask)| byte ^ mask));
        self.0.write_all(&frame).await.unwrap();
    }

    /// The next message, or nothing where the connection has ended.
    pub async fn receive(&mut self) -> Option<(u8, Vec<u8>)> {
        let reading = async {
            let first = self.0.read_u8().await.ok()?;
            let length = match self.0.read_u8().await.ok()? {
                126 => u64::from(self.0.read_u16().await.ok()?),
                127 => self.0.read_u64().await.ok()?,
                short => u64::from(short),
            };
            let mut text = vec![0; length as usize];
            self.0.read_exact(&mut text).await.ok()?;
            Some((first, text))
        };
        tokio::time::timeout(PATIENCE, reading).await.expect("in time")
    }
}
