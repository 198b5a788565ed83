//! The embedded model server answers as a real vLLM did: what was recorded of one (fixtures/vllm-0.32) is asked
//! again, over HTTP/1 and HTTP/2, and the answers have the same shape.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on should stop")]

use std::collections::BTreeMap;
use std::fmt::Write;

use bytes::Bytes;
use http::{HeaderMap, Method, Request};
use http_body_util::{BodyExt, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use infergate::simulate::{Options, Simulated};
use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// What was asked for each recording. The model was called `tiny`, its context had 4096 tokens.
fn asked() -> Vec<Asked> {
    let hello = json!([{"role": "user", "content": "hello"}]);
    let chat = |fields: Value| {
        let mut body = json!({"model": "tiny", "messages": hello, "max_tokens": 4});
        body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        post("/v1/chat/completions", body)
    };
    let schema = json!({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]});
    let format = json!({"type": "json_schema", "json_schema": {"name": "x", "schema": schema}});
    let usage = json!({"include_usage": true});
    let continuous = json!({"include_usage": true, "continuous_usage_stats": true});
    let partial = json!([{"role": "user", "content": "hello"}, {"role": "assistant", "content": "the quick"}]);
    let response = json!({"model": "tiny", "input": "hello", "max_output_tokens": 6});
    let message = json!({"model": "tiny", "messages": hello, "max_tokens": 6});
    let with = |body: &Value, name: &str, value: Value| {
        let mut body = body.clone();
        body[name] = value;
        body
    };
    vec![
        chat(json!({"max_tokens": 8})).of("chat"),
        chat(json!({"max_tokens": 100, "response_format": format})).of("chat_json_schema"),
        chat(json!({"max_tokens": 3, "n": 2, "logprobs": true, "top_logprobs": 2})).of("chat_n2_logprobs"),
        chat(json!({"max_tokens": 3, "n": 2, "stream": true})).of("chat_n2_stream"),
        chat(json!({})).header("endpoint-load-metrics-format: json").of("chat_orca_json"),
        chat(json!({})).header("endpoint-load-metrics-format: text").of("chat_orca_text"),
        chat(json!({"messages": partial, "continue_final_message": true, "add_generation_prompt": false}))
            .of("chat_prefill_continue"),
        chat(json!({"max_tokens": 8, "stream": true})).of("chat_stream"),
        chat(json!({"stream": true, "stream_options": continuous})).of("chat_stream_continuous_usage"),
        chat(json!({"max_tokens": 8, "stream": true, "stream_options": usage})).of("chat_stream_usage"),
        post("/v1/completions", json!({"model": "tiny", "prompt": "hello", "max_tokens": 4})).of("completion"),
        post(
            "/v1/completions",
            json!({"model": "tiny", "prompt": "hello", "max_tokens": 4, "stream": true, "stream_options": usage}),
        )
        .of("completion_stream_usage"),
        post("/detokenize", json!({"model": "tiny", "tokens": [38, 48]})).exactly("detokenize"),
        // That server did not embed; this one does. The answer to an unknown path is the same.
        post("/v1/no/such/path", json!({"model": "tiny", "input": "hello"})).exactly("embeddings_unsupported"),
        chat(json!({"messages": [{"role": "user", "content": "hello ".repeat(8000)}]})).of("err_context"),
        post("/v1/chat/completions", Value::Null).body("{\"model\":").exactly("err_json"),
        chat(json!({"model": "nope"})).exactly("err_model"),
        chat(json!({"temperature": 9.0})).exactly("err_param"),
        get("/health").exactly("health"),
        get("/load").exactly("load"),
        get("/v1/models").of("models"),
        get("/ping").exactly("ping"),
        get("/version").exactly("version"),
        post("/v1/messages", message.clone()).of("messages"),
        post("/v1/messages", with(&message, "stream", json!(true))).of("messages_stream"),
        post("/v1/messages/count_tokens", json!({"model": "tiny", "messages": hello})).of("messages_count"),
        post("/v1/responses", response.clone()).of("responses"),
        post("/v1/responses", with(&response, "stream", json!(true))).of("responses_stream"),
        post("/tokenize", json!({"model": "tiny", "prompt": "hello"})).of("tokenize"),
    ]
}

#[tokio::test]
async fn over_http1_every_recorded_answer_has_its_shape() {
    let server = tiny().await;
    for asked in asked() {
        let answer = asked.over_http1(&server).await;
        let mut complaints = asked.compare(&answer);
        let recorded = recorded(asked.recording);
        for name in recorded.headers.keys() {
            let (theirs, ours) = (&recorded.headers[name], answer.headers.get(name));
            let varies = ["date", "content-length", "endpoint-load-metrics"].contains(&name.as_str());
            if !ours.is_some_and(|ours| varies || ours == theirs) {
                writeln!(complaints, "header {name}: {ours:?} instead of {theirs:?}").unwrap();
            }
        }
        let added = answer.headers.keys().filter(|name| !recorded.headers.contains_key(*name));
        let added: Vec<_> = added.filter(|name| *name != "connection").collect();
        assert!(complaints.is_empty() && added.is_empty(), "{}: {complaints}{added:?}", asked.recording);
    }
}

#[tokio::test]
async fn over_http2_every_recorded_answer_has_its_shape() {
    let server = tiny().await;
    let stream = TcpStream::connect(server.address()).await.unwrap();
    stream.set_nodelay(true).unwrap();
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    for asked in asked() {
        let url = format!("{}{}", server.url(), asked.path);
        let mut request = Request::builder().method(asked.method.clone()).uri(url);
        if let Some((name, value)) = asked.header.and_then(|header| header.split_once(": ")) {
            request = request.header(name, value);
        }
        let request = request.body(Full::new(Bytes::from(asked.body.clone()))).unwrap();
        let (head, body) = sender.send_request(request).await.unwrap().into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        let answer = Answer {
            status: head.status.as_u16(),
            headers: lines(&head.headers),
            body: String::from_utf8(body.to_vec()).unwrap(),
        };
        let complaints = asked.compare(&answer);
        assert!(complaints.is_empty(), "{}: {complaints}", asked.recording);
        let recorded = recorded(asked.recording);
        assert_eq!(answer.headers.get("content-type"), recorded.headers.get("content-type"), "{}", asked.recording);
    }
    assert!(server.seen().iter().all(|seen| seen.http2));
}

#[tokio::test]
async fn metrics_have_vllms_names_labels_and_buckets() {
    let server = tiny().await;
    let ours = get("/metrics").of("metrics").over_http1(&server).await;
    let theirs = recorded("metrics");
    assert_eq!(ours.headers["content-type"], theirs.headers["content-type"]);
    let (ours, theirs) = (samples(&ours.body), samples(&theirs.body));
    for line in &theirs {
        assert!(ours.contains(line), "missing: {line}");
    }
    for line in &ours {
        assert!(theirs.contains(line), "added: {line}");
    }
}

/// The engine's own lines, without values; the configuration of the cache without its particulars.
fn samples(page: &str) -> Vec<String> {
    let lines = page.lines().filter(|line| line.contains("vllm:"));
    lines
        .map(|line| match line.split_once('{') {
            Some((name, labels)) if name == "vllm:cache_config_info" => {
                let names = labels.split("\",").map(|label| label.split('=').next().unwrap());
                format!("{name} {}", names.collect::<Vec<_>>().join(","))
            }
            _ if line.starts_with('#') => line.to_owned(),
            _ => line.rsplit_once(' ').unwrap().0.to_owned(),
        })
        .collect()
}

async fn tiny() -> Simulated {
    let options = Options { models: vec!["tiny".to_owned()], max_model_len: 4096, ..Options::default() };
    Simulated::start(options).await.unwrap()
}

/// A request and the recording of its answer.
struct Asked {
    method: Method,
    path: &'static str,
    header: Option<&'static str>,
    body: String,
    recording: &'static str,
    exactly: bool,
}

fn post(path: &'static str, body: Value) -> Asked {
    let body = body.to_string();
    Asked { method: Method::POST, path, header: None, body, recording: "", exactly: false }
}

fn get(path: &'static str) -> Asked {
    Asked { method: Method::GET, path, header: None, body: String::new(), recording: "", exactly: false }
}

impl Asked {
    fn header(self, header: &'static str) -> Self {
        Self { header: Some(header), ..self }
    }

    fn body(self, body: &str) -> Self {
        Self { body: body.to_owned(), ..self }
    }

    fn of(self, recording: &'static str) -> Self {
        Self { recording, ..self }
    }

    /// The same text, not only the same shape.
    fn exactly(self, recording: &'static str) -> Self {
        Self { recording, exactly: true, ..self }
    }

    async fn over_http1(&self, server: &Simulated) -> Answer {
        let mut stream = TcpStream::connect(server.address()).await.unwrap();
        let (method, path, length) = (&self.method, self.path, self.body.len());
        let header = self.header.map_or_else(String::new, |header| format!("{header}\r\n"));
        let head = format!("{method} {path} HTTP/1.1\r\nhost: x\r\n{header}content-length: {length}\r\n");
        let request = format!("{head}connection: close\r\n\r\n{}", self.body);
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        let mut answer = Answer::parse(&head.replace('\r', ""), body);
        if answer.headers.get("transfer-encoding").is_some_and(|coding| coding == "chunked") {
            answer.body = dechunked(body);
        }
        answer
    }

    /// What is different from the recording.
    fn compare(&self, answer: &Answer) -> String {
        let recorded = recorded(self.recording);
        let mut complaints = String::new();
        if answer.status != recorded.status {
            writeln!(complaints, "status {} instead of {}", answer.status, recorded.status).unwrap();
        }
        if self.exactly && answer.body != recorded.body {
            writeln!(complaints, "{} instead of {}", answer.body, recorded.body).unwrap();
        }
        let (ours, theirs) = (parts(&answer.body), parts(&recorded.body));
        let names = |parts: &[(String, Shape)]| parts.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
        if names(&ours) != names(&theirs) {
            writeln!(complaints, "events {:?} instead of {:?}", names(&ours), names(&theirs)).unwrap();
        }
        for ((name, ours), (_, theirs)) in ours.iter().zip(&theirs) {
            ours.compare(theirs, name, &mut complaints);
        }
        complaints
    }
}

fn dechunked(body: &str) -> String {
    let mut rest = body.as_bytes();
    let mut out = Vec::new();
    loop {
        let end = rest.windows(2).position(|pair| pair == b"\r\n").unwrap();
        let length = usize::from_str_radix(std::str::from_utf8(&rest[..end]).unwrap(), 16).unwrap();
        if length == 0 {
            return String::from_utf8(out).unwrap();
        }
        out.extend_from_slice(&rest[end + 2..end + 2 + length]);
        rest = &rest[end + 2 + length + 2..];
    }
}

struct Answer {
    status: u16,
    headers: BTreeMap<String, String>,
    body: String,
}

impl Answer {
    fn parse(head: &str, body: &str) -> Self {
        let mut lines = head.lines();
        let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
        let headers =
            lines.filter_map(|line| line.split_once(": ")).map(|(name, value)| (name.to_owned(), value.to_owned()));
        Self { status, headers: headers.collect(), body: body.to_owned() }
    }
}

fn lines(headers: &HeaderMap) -> BTreeMap<String, String> {
    headers.iter().map(|(name, value)| (name.to_string(), value.to_str().unwrap().to_owned())).collect()
}

fn recorded(name: &str) -> Answer {
    let path = format!("{}/tests/fixtures/vllm-0.32/{name}.txt", env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
    let (head, body) = text.split_once("\n\n").unwrap();
    Answer::parse(head, body)
}

/// The parts of a body that differ in shape, in order: events by name, or the one JSON text that it is.
fn parts(body: &str) -> Vec<(String, Shape)> {
    let is_stream = body.starts_with("data: ") || body.starts_with("event: ");
    if !is_stream {
        return serde_json::from_str(body).map(|shape| (String::new(), shape)).into_iter().collect();
    }
    let mut parts: Vec<(String, Shape)> = Vec::new();
    for event in body.split("\n\n").filter(|event| !event.trim().is_empty()) {
        let name = event.lines().find_map(|line| line.strip_prefix("event: ")).unwrap_or_default();
        let data = event.lines().find_map(|line| line.strip_prefix("data: ")).unwrap();
        // Names of fields tell events apart that have no name of their own.
        let shape: Shape = serde_json::from_str(data).unwrap_or(Shape::Word(data.to_owned()));
        let name = format!("{name}{}", shape.names());
        if !parts.iter().any(|(known, _)| *known == name) {
            parts.push((name, shape));
        }
    }
    parts
}

/// JSON without its values, but with the order of its fields.
#[derive(Clone, Debug, PartialEq)]
enum Shape {
    Null,
    Bool,
    Integer,
    Float,
    Text,
    List(Vec<Shape>),
    Object(Vec<(String, Shape)>),
    /// No JSON, such as `[DONE]`.
    Word(String),
}

impl Shape {
    /// All field names, in order.
    fn names(&self) -> String {
        match self {
            Self::Object(fields) => fields.iter().map(|(name, shape)| format!(" {name}{}", shape.names())).collect(),
            Self::List(items) => items.first().map_or_else(String::new, Self::names),
            Self::Word(word) => word.clone(),
            _ => String::new(),
        }
    }

    fn compare(&self, theirs: &Self, place: &str, complaints: &mut String) {
        match (self, theirs) {
            (Self::Object(ours), Self::Object(theirs)) => {
                let names = |fields: &[(String, Self)]| fields.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
                if names(ours) != names(theirs) {
                    writeln!(complaints, "{place} has {:?} instead of {:?}", names(ours), names(theirs)).unwrap();
                }
                for ((name, ours), (_, theirs)) in ours.iter().zip(theirs) {
                    ours.compare(theirs, &format!("{place}.{name}"), complaints);
                }
            }
            // Lists are as long as their content is; what is in them has one shape.
            (Self::List(ours), Self::List(theirs)) => {
                for ours in ours {
                    theirs.iter().take(1).for_each(|theirs| ours.compare(theirs, &format!("{place}[]"), complaints));
                }
            }
            _ if self == theirs => {}
            _ => writeln!(complaints, "{place} is {self:?} instead of {theirs:?}").unwrap(),
        }
    }
}

impl<'de> Deserialize<'de> for Shape {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ShapeVisitor)
    }
}

struct ShapeVisitor;

impl<'de> Visitor<'de> for ShapeVisitor {
    type Value = Shape;

    fn expecting(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str("JSON")
    }

    fn visit_unit<E>(self) -> Result<Shape, E> {
        Ok(Shape::Null)
    }

    fn visit_bool<E>(self, _: bool) -> Result<Shape, E> {
        Ok(Shape::Bool)
    }

    fn visit_u64<E>(self, _: u64) -> Result<Shape, E> {
        Ok(Shape::Integer)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Shape, E> {
        Ok(Shape::Integer)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Shape, E> {
        Ok(Shape::Float)
    }

    fn visit_str<E>(self, _: &str) -> Result<Shape, E> {
        Ok(Shape::Text)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Shape, A::Error> {
        let mut all = Vec::new();
        while let Some(item) = items.next_element()? {
            all.push(item);
        }
        Ok(Shape::List(all))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<Shape, A::Error> {
        let mut all = Vec::new();
        while let Some(field) = fields.next_entry()? {
            all.push(field);
        }
        Ok(Shape::Object(all))
    }
}
