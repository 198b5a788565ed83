//! An OTLP/HTTP collector that decodes the real protobuf, of traces and of logs, and can be slow, down or failing.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use opentelemetry_proto::tonic::collector::logs::v1::ExportLogsServiceRequest;
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTracePartialSuccess, ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::KeyValue;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::logs::v1::LogRecord;
use opentelemetry_proto::tonic::resource::v1::Resource;
use opentelemetry_proto::tonic::trace::v1::Span;
use parking_lot::Mutex;
use prost::Message;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};

/// A running collector; it stops, and closes its connections, when dropped.
pub struct Collector {
    address: SocketAddr,
    shared: Arc<Shared>,
    serving: JoinHandle<()>,
}

/// What the collector does about a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mood {
    /// Takes it.
    Takes,
    /// Takes it after a while.
    Slow(Duration),
    /// Never answers.
    Hangs,
    /// Answers with this status, with `Retry-After` in seconds if there is one.
    Says(u16, Option<u64>),
    /// Takes it but for this many spans or records.
    Rejects(i64),
}

/// A request as it came.
#[derive(Clone, Debug)]
pub struct Posted {
    /// The path.
    pub path: String,
    /// The head.
    pub headers: HeaderMap,
    /// The body.
    pub body: Bytes,
}

struct Shared {
    mood: Mutex<Mood>,
    posted: Mutex<Vec<Posted>>,
    taken: Mutex<Taken>,
}

/// What was taken, decoded.
#[derive(Default)]
struct Taken {
    spans: Vec<Span>,
    logs: Vec<LogRecord>,
    resources: Vec<Resource>,
}

impl Collector {
    /// A collector on a free port.
    pub async fn start() -> Self {
        Self::at(SocketAddr::from(([127, 0, 0, 1], 0))).await
    }

    /// A collector at this address, where one may have been before.
    pub async fn at(address: SocketAddr) -> Self {
        let listener = TcpListener::bind(address).await.unwrap();
        let shared = Shared { mood: Mutex::new(Mood::Takes), posted: Mutex::default(), taken: Mutex::default() };
        let (address, shared) = (listener.local_addr().unwrap(), Arc::new(shared));
        let serving = tokio::spawn(serve(listener, shared.clone()));
        Self { address, shared, serving }
    }

    /// The endpoint to be told to an exporter.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// What it does from now on.
    pub fn set(&self, mood: Mood) {
        *self.shared.mood.lock() = mood;
    }

    /// Every request that came, also those that were not taken.
    pub fn posted(&self) -> Vec<Posted> {
        self.shared.posted.lock().clone()
    }

    /// The spans that were taken, in the order in which they came.
    pub fn spans(&self) -> Vec<Span> {
        self.shared.taken.lock().spans.clone()
    }

    /// The log records that were taken, in the order in which they came.
    pub fn logs(&self) -> Vec<LogRecord> {
        self.shared.taken.lock().logs.clone()
    }

    /// Who sent them: one for each request that was taken.
    pub fn resources(&self) -> Vec<Resource> {
        self.shared.taken.lock().resources.clone()
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

async fn serve(listener: TcpListener, shared: Arc<Shared>) {
    // Dropped with this task, so that a collector that is down has no connection left.
    let mut connections = JoinSet::new();
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        connections.spawn(connection(stream, shared.clone()));
        while connections.try_join_next().is_some() {}
    }
}

async fn connection(stream: TcpStream, shared: Arc<Shared>) {
    let service = service_fn(|request| {
        let shared = shared.clone();
        async move { Ok::<_, Infallible>(answer(&shared, request).await) }
    });
    // It ends when its peer closes it, which is no failure.
    let _ = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
}

async fn answer(shared: &Shared, request: Request<Incoming>) -> Response<Full<Bytes>> {
    let (head, body) = request.into_parts();
    let Ok(body) = body.collect().await else { return said(StatusCode::BAD_REQUEST) };
    let posted = Posted { path: head.uri.path().to_owned(), headers: head.headers, body: body.to_bytes() };
    shared.posted.lock().push(posted.clone());
    let mood = shared.mood.lock().clone();
    match mood {
        Mood::Takes => take(shared, &posted, 0),
        Mood::Rejects(rejected) => take(shared, &posted, rejected),
        Mood::Hangs => std::future::pending().await,
        Mood::Slow(pause) => {
            tokio::time::sleep(pause).await;
            take(shared, &posted, 0)
        }
        Mood::Says(status, after) => {
            let mut answer = said(StatusCode::from_u16(status).unwrap());
            if let Some(seconds) = after {
                answer.headers_mut().insert("retry-after", seconds.into());
            }
            answer
        }
    }
}

fn take(shared: &Shared, posted: &Posted, rejected: i64) -> Response<Full<Bytes>> {
    if posted.headers.get("content-type").is_none_or(|kind| kind != "application/x-protobuf") {
        return said(StatusCode::UNSUPPORTED_MEDIA_TYPE);
    }
    let taken = match posted.path.as_str() {
        "/v1/traces" => shared.taken.lock().traces(&posted.body),
        "/v1/logs" => shared.taken.lock().logs(&posted.body),
        _ => return said(StatusCode::NOT_FOUND),
    };
    if let Err(error) = taken {
        panic!("{} got what is not its protobuf: {error}", posted.path);
    }
    let partial = (rejected > 0)
        .then(|| ExportTracePartialSuccess { rejected_spans: rejected, error_message: "not these".to_owned() });
    // The answer about logs has the same fields under the same numbers.
    let answer = ExportTraceServiceResponse { partial_success: partial }.encode_to_vec();
    let mut answer = Response::new(Full::new(answer.into()));
    answer.headers_mut().insert("content-type", http::HeaderValue::from_static("application/x-protobuf"));
    answer
}

fn said(status: StatusCode) -> Response<Full<Bytes>> {
    let mut answer = Response::new(Full::default());
    *answer.status_mut() = status;
    answer
}

impl Taken {
    fn traces(&mut self, body: &Bytes) -> Result<(), prost::DecodeError> {
        for part in ExportTraceServiceRequest::decode(body.clone())?.resource_spans {
            self.resources.extend(part.resource);
            self.spans.extend(part.scope_spans.into_iter().flat_map(|scope| scope.spans));
        }
        Ok(())
    }

    fn logs(&mut self, body: &Bytes) -> Result<(), prost::DecodeError> {
        for part in ExportLogsServiceRequest::decode(body.clone())?.resource_logs {
            self.resources.extend(part.resource);
            self.logs.extend(part.scope_logs.into_iter().flat_map(|scope| scope.log_records));
        }
        Ok(())
    }
}

/// An attribute's value as text, empty if there is none.
pub fn attribute(attributes: &[KeyValue], name: &str) -> String {
    let found = attributes.iter().find(|pair| pair.key == name);
    match found.and_then(|pair| pair.value.as_ref()?.value.as_ref()) {
        Some(Value::StringValue(text)) => text.clone(),
        Some(Value::IntValue(number)) => number.to_string(),
        Some(Value::DoubleValue(number)) => number.to_string(),
        Some(Value::BoolValue(yes)) => yes.to_string(),
        Some(other) => format!("{other:?}"),
        None => String::new(),
    }
}

/// An id in hex.
pub fn hex(id: &[u8]) -> String {
    id.iter().map(|byte| format!("{byte:02x}")).collect()
}
