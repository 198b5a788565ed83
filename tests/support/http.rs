//! Clients: a pooled one for HTTP/1 and one for HTTP/2, and one that sends exactly the bytes it is given.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Request};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::client::legacy;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// A whole answer.
#[derive(Debug)]
pub struct Answer {
    /// The status.
    pub status: u16,
    /// The head.
    pub headers: HeaderMap,
    /// The body, as far as it came.
    pub body: Bytes,
    /// Whether the body ended as it should.
    pub whole: bool,
}

impl Answer {
    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The body as JSON.
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.text()))
    }

    /// One header, empty if absent.
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }

    /// The code of an error in OpenAI's envelope.
    pub fn code(&self) -> String {
        self.json()["error"]["code"].as_str().unwrap_or_default().to_owned()
    }
}

/// A client that keeps connections. Cheap to clone.
#[derive(Clone)]
pub struct Client(legacy::Client<HttpConnector, Full<Bytes>>);

/// Long enough for anything that is not broken.
const PATIENCE: Duration = Duration::from_secs(60);

impl Client {
    /// HTTP/1.1.
    pub fn h1() -> Self {
        Self::new(false)
    }

    /// HTTP/2 without TLS.
    pub fn h2() -> Self {
        Self::new(true)
    }

    fn new(h2: bool) -> Self {
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        Self(legacy::Client::builder(TokioExecutor::new()).http2_only(h2).build(connector))
    }

    /// Both protocols, for promises that hold on both.
    pub fn both() -> [Self; 2] {
        [Self::h1(), Self::h2()]
    }

    /// Gets a path.
    pub async fn get(&self, address: SocketAddr, path: &str) -> Answer {
        self.send(Request::get(format!("http://{address}{path}")).body(Full::default()).unwrap()).await
    }

    /// Gets a path; `None` where nobody answers.
    pub async fn try_get(&self, address: SocketAddr, path: &str) -> Option<Answer> {
        let request = Request::get(format!("http://{address}{path}")).body(Full::default()).unwrap();
        Some(collect(self.0.request(request).await.ok()?).await)
    }

    /// Posts JSON.
    pub async fn post(&self, address: SocketAddr, path: &str, body: impl Into<Bytes>) -> Answer {
        self.post_with(address, path, &[], body).await
    }

    /// Posts JSON with more headers.
    pub async fn post_with(
        &self,
        address: SocketAddr,
        path: &str,
        headers: &[(&str, &str)],
        body: impl Into<Bytes>,
    ) -> Answer {
        self.send(post(address, path, headers, body)).await
    }

    /// Posts JSON and hands over the answer when its head is here, to be read piece by piece.
    pub async fn open(
        &self,
        address: SocketAddr,
        path: &str,
        headers: &[(&str, &str)],
        body: impl Into<Bytes>,
    ) -> http::Response<Incoming> {
        tokio::time::timeout(PATIENCE, self.0.request(post(address, path, headers, body)))
            .await
            .expect("in time")
            .unwrap()
    }

    /// Sends a request and hands over the answer when its head is here.
    pub async fn begin(&self, request: Request<Full<Bytes>>) -> http::Response<Incoming> {
        tokio::time::timeout(PATIENCE, self.0.request(request)).await.expect("in time").unwrap()
    }

    /// Sends a request and waits for its whole answer.
    pub async fn send(&self, request: Request<Full<Bytes>>) -> Answer {
        tokio::time::timeout(PATIENCE, async { collect(self.0.request(request).await.unwrap()).await })
            .await
            .expect("in time")
    }

    /// The same, but nobody may answer.
    pub async fn try_send(&self, request: Request<Full<Bytes>>) -> Result<Answer, legacy::Error> {
        tokio::time::timeout(PATIENCE, async { Ok(collect(self.0.request(request).await?).await) })
            .await
            .expect("in time")
    }
}

/// A POST of JSON.
pub fn post(address: SocketAddr, path: &str, headers: &[(&str, &str)], body: impl Into<Bytes>) -> Request<Full<Bytes>> {
    let request = Request::post(format!("http://{address}{path}")).header("content-type", "application/json");
    let request = headers.iter().fold(request, |request, (name, value)| request.header(*name, *value));
    request.body(Full::new(body.into())).unwrap()
}

async fn collect(response: http::Response<Incoming>) -> Answer {
    let (parts, mut body) = response.into_parts();
    let (mut bytes, mut whole) = (Vec::new(), true);
    while let Some(frame) = body.frame().await {
        match frame {
            Ok(frame) => bytes.extend_from_slice(frame.data_ref().unwrap_or(&Bytes::new())),
            Err(_) => {
                whole = false;
                break;
            }
        }
    }
    Answer { status: parts.status.as_u16(), headers: parts.headers, body: bytes.into(), whole }
}

/// Sends exactly these bytes on a connection of its own and returns all that comes until it is closed, or until
/// nothing came for half a second.
pub async fn raw(address: SocketAddr, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.set_nodelay(true).unwrap();
    // The gateway may close before it has read everything.
    let _ = stream.write_all(bytes).await;
    let mut answer = Vec::new();
    let mut buffer = [0; 16 << 10];
    while let Ok(Ok(read)) = tokio::time::timeout(Duration::from_millis(500), stream.read(&mut buffer)).await {
        if read == 0 {
            break;
        }
        answer.extend_from_slice(&buffer[..read]);
    }
    String::from_utf8_lossy(&answer).into_owned()
}

/// The `data:` of every event in a stream, in order.
pub fn events(body: &[u8]) -> Vec<String> {
    let text = String::from_utf8_lossy(body).replace("\r\n", "\n").replace('\r', "\n");
    let datas = text.split("\n\n").filter_map(|event| {
        let lines: Vec<&str> =
            event.lines().filter_map(|line| line.strip_prefix("data:")).map(str::trim_start).collect();
        (!lines.is_empty()).then(|| lines.join("\n"))
    });
    datas.collect()
}
