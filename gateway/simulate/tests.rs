//! What tests of the gateway rely on: faults strike, clients that leave are noticed, queues queue.

use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::*;

async fn start(options: Options) -> Simulated {
    Simulated::start(options).await.unwrap()
}

fn chat(fields: Value) -> String {
    let mut body = json!({"messages": [{"role": "user", "content": "What is the weather in Paris?"}]});
    body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    body.to_string()
}

/// A connection that speaks HTTP/1.1 in bytes.
async fn ask(server: &Simulated, path: &str, headers: &str, body: &str) -> TcpStream {
    let mut stream = TcpStream::connect(server.address()).await.unwrap();
    send(&mut stream, path, headers, body).await;
    stream
}

async fn send(stream: &mut TcpStream, path: &str, headers: &str, body: &str) {
    let method = if body.is_empty() { "GET" } else { "POST" };
    let length = body.len();
    let request = format!("{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {length}\r\n{headers}\r\n{body}");
    stream.write_all(request.as_bytes()).await.unwrap();
}

/// Everything until the server closes the connection; also whether it was reset.
async fn all(mut stream: TcpStream) -> (Vec<u8>, bool) {
    let mut read = Vec::new();
    let reset = stream.read_to_end(&mut read).await.is_err();
    (read, reset)
}

async fn text(server: &Simulated, path: &str, headers: &str, body: &str) -> String {
    let headers = format!("connection: close\r\n{headers}");
    let (read, _) = all(ask(server, path, &headers, body).await).await;
    String::from_utf8_lossy(&read).into_owned()
}

async fn body(server: &Simulated, path: &str, body: Value) -> Value {
    let answer = text(server, path, "", &body.to_string()).await;
    let json = answer.split_once("\r\n\r\n").unwrap().1;
    serde_json::from_str(json).unwrap_or_else(|_| panic!("{path}: {answer}"))
}

/// Reads until `wanted` was said.
async fn read_until(stream: &mut TcpStream, wanted: &str) -> String {
    let mut read = Vec::new();
    while !String::from_utf8_lossy(&read).contains(wanted) {
        assert_ne!(stream.read_buf(&mut read).await.unwrap(), 0, "{}", String::from_utf8_lossy(&read));
    }
    String::from_utf8_lossy(&read).into_owned()
}

async fn http2(server: &Simulated, headers: &str, body: String) -> (Response<Incoming>, impl Sized) {
    let stream = TcpStream::connect(server.address()).await.unwrap();
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    let mut request = Request::post(format!("{}/v1/chat/completions", server.url()));
    if let Some((name, value)) = headers.split_once(": ") {
        request = request.header(name, value);
    }
    let request = request.body(Full::new(Bytes::from(body))).unwrap();
    (sender.send_request(request).await.unwrap(), sender)
}

/// The outcome of the last request, once it has one.
async fn outcome(server: &Simulated) -> Outcome {
    let begun = Instant::now();
    loop {
        let seen = server.seen().pop().unwrap();
        if seen.outcome != Outcome::Running || begun.elapsed() > Duration::from_secs(2) {
            return seen.outcome;
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

#[tokio::test]
async fn a_client_that_leaves_frees_its_slot_within_250_ms() {
    let server = start(Options { slots: 1, tokens_per_second: 20.0, ..Options::default() }).await;
    for stream in [true, false] {
        let mut leaving = ask(&server, "/v1/chat/completions", "", &chat(json!({"stream": stream}))).await;
        if stream {
            read_until(&mut leaving, "said").await;
        }
        while server.in_flight() == 0 {
            tokio::task::yield_now().await;
        }
        let left = Instant::now();
        drop(leaving);
        assert_eq!(outcome(&server).await, Outcome::Disconnected);
        assert!(left.elapsed() < Duration::from_millis(250));
        assert_eq!(server.server.engine.metrics.running.load(Relaxed), 0);
    }
}

#[tokio::test]
async fn a_reset_http2_stream_is_noticed_while_its_connection_lives() {
    let server = start(Options { tokens_per_second: 20.0, ..Options::default() }).await;
    let (mut response, _sender) = http2(&server, "", chat(json!({"stream": true}))).await;
    response.body_mut().frame().await.unwrap().unwrap();
    let left = Instant::now();
    drop(response);
    assert_eq!(outcome(&server).await, Outcome::Disconnected);
    assert!(left.elapsed() < Duration::from_millis(250));
    assert_eq!((server.open_connections(), server.in_flight()), (1, 0));
}

#[tokio::test]
async fn work_beyond_the_slots_shows_as_waiting() {
    let server = start(Options { slots: 1, ttft_ms: 10_000, ..Options::default() }).await;
    let long = chat(json!({"stream": true}));
    let _first = ask(&server, "/v1/chat/completions", "", &long).await;
    let _second = ask(&server, "/v1/chat/completions", "", &long).await;
    let begun = Instant::now();
    loop {
        let page = text(&server, "/metrics", "", "").await;
        let shows = |name: &str| page.contains(&format!("vllm:{name}{{engine=\"0\",model_name=\"sim-small\"}} 1.0"));
        if shows("num_requests_running") && shows("num_requests_waiting") {
            assert!(!page.contains("vllm:kv_cache_usage_perc{engine=\"0\",model_name=\"sim-small\"} 0.0\n"));
            break;
        }
        assert!(begun.elapsed() < Duration::from_secs(5), "{page}");
    }
}

#[tokio::test]
async fn an_answer_keeps_the_pace_it_was_given() {
    let server = start(Options { ttft_ms: 50, tokens_per_second: 100.0, ..Options::default() }).await;
    for stream in [true, false] {
        let begun = Instant::now();
        text(&server, "/v1/chat/completions", "", &chat(json!({"stream": stream, "max_tokens": 11}))).await;
        let took = begun.elapsed();
        assert!((Duration::from_millis(148)..Duration::from_secs(2)).contains(&took), "{took:?}");
    }
}

#[tokio::test]
async fn a_repeated_prompt_is_found_in_the_prefix_cache() {
    let server = start(Options::default()).await;
    let asked = json!({"prompt": "word ".repeat(100), "max_tokens": 2});
    let cached = |answer: &Value| answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64();
    assert_eq!(cached(&body(&server, "/v1/completions", asked.clone()).await), Some(0));
    assert_eq!(cached(&body(&server, "/v1/completions", asked).await), Some(112));
    let page = text(&server, "/metrics", "", "").await;
    assert!(page.contains("vllm:prefix_cache_hits_total{engine=\"0\",model_name=\"sim-small\"} 112.0"));
}

#[tokio::test]
async fn faults_strike_over_http1() {
    let server = start(Options::default()).await;
    for (fault, stream, expected) in [
        ("status=503,retry_after=7", true, "HTTP/1.1 503 Service Unavailable"),
        ("status=503,retry_after=7", true, "retry-after: 7"),
        ("context", false, "maximum context length is 32768 tokens"),
        ("content-filter", true, "\"finish_reason\":\"content_filter\""),
        ("content-filter=400", false, "\"code\":\"content_filter\""),
        ("garbage", false, "HTTP/9.9"),
        ("error-event", true, "data: {\"error\":{"),
        ("crlf", true, "data: [DONE]\r\n\r\n"),
        ("gzip", true, "content-encoding: gzip"),
        ("redirect=http://127.0.0.1:9/", false, "location: http://127.0.0.1:9/"),
        ("no-such-fault", false, "must be one of status"),
    ] {
        let asked = chat(json!({"stream": stream, "max_tokens": 5}));
        let answer = text(&server, "/v1/chat/completions", &format!("x-simulate-fault: {fault}\r\n"), &asked).await;
        assert!(answer.contains(expected), "{fault}: {answer}");
    }
}

#[tokio::test]
async fn cuts_and_resets_close_the_connection() {
    let server = start(Options::default()).await;
    let asked = |stream: bool| chat(json!({"stream": stream, "max_tokens": 20}));
    for (fault, stream, events, was_reset) in
        [("cut,after=3", true, 3, false), ("cut", false, 0, false), ("reset", true, 0, true), ("reset", false, 0, true)]
    {
        let headers = format!("x-simulate-fault: {fault}\r\n");
        let (read, reset) = all(ask(&server, "/v1/chat/completions", &headers, &asked(stream)).await).await;
        let read = String::from_utf8_lossy(&read);
        assert_eq!((read.matches("data: ").count(), reset), (events, was_reset), "{fault}: {read}");
        assert!(!read.contains("\r\n0\r\n") && !read.ends_with('}'), "{fault}: {read}");
        assert_eq!(outcome(&server).await, Outcome::Faulted);
    }
}

#[tokio::test]
async fn faults_strike_over_http2() {
    let server = start(Options::default()).await;
    let asked = || chat(json!({"stream": true, "max_tokens": 20}));
    let (cut, _sender) = http2(&server, "x-simulate-fault: cut", asked()).await;
    assert!(cut.into_body().collect().await.is_err());
    let (busy, _sender) = http2(&server, "x-simulate-fault: status=529", asked()).await;
    assert_eq!(busy.status(), 529);
    let (stalled, _sender) = http2(&server, "x-simulate-fault: stall,after=1", asked()).await;
    let mut stalled = stalled.into_body();
    stalled.frame().await.unwrap().unwrap();
    assert!(tokio::time::timeout(Duration::from_millis(50), stalled.frame()).await.is_err());
}

#[tokio::test]
async fn a_body_that_drips_or_is_packed_is_still_complete() {
    let server = start(Options::default()).await;
    for fault in ["drip=0", "half-utf8", "close-after"] {
        for stream in [true, false] {
            let asked = chat(json!({"stream": stream, "max_tokens": 3}));
            let mut connection =
                ask(&server, "/v1/chat/completions", &format!("x-simulate-fault: {fault}\r\n"), &asked).await;
            let end = if stream { "[DONE]\n\n" } else { "\"metrics\":null}" };
            // A piece of the last event may be on its own: what is waited for is the end of the text.
            let mut read = Vec::new();
            let complete = |read: &[u8]| {
                let text = String::from_utf8_lossy(read);
                let text: String = if stream { unchunked(&text) } else { text.into_owned() };
                text.contains(end)
            };
            while !complete(&read) {
                assert_ne!(connection.read_buf(&mut read).await.unwrap(), 0, "{fault}");
            }
            assert_eq!(outcome(&server).await, Outcome::Completed, "{fault} {stream}");
            if fault == "close-after" {
                assert!(!all(connection).await.1);
            }
        }
    }
}

/// What is left of a chunked body without lines that are sizes; good enough to look for a word.
fn unchunked(text: &str) -> String {
    let is_size = |line: &str| !line.is_empty() && line.len() < 5 && line.bytes().all(|byte| byte.is_ascii_hexdigit());
    text.split("\r\n").filter(|line| !is_size(line)).collect()
}

#[tokio::test]
async fn pieces_of_half_utf8_end_within_characters() {
    let server = start(Options::default()).await;
    let asked = chat(json!({"stream": true, "max_tokens": 8}));
    let (response, _sender) = http2(&server, "x-simulate-fault: half-utf8", asked).await;
    let (mut frames, mut halves, mut body) = (response.into_body(), 0, Vec::new());
    while let Some(frame) = frames.frame().await {
        let data = frame.unwrap().into_data().unwrap();
        halves += usize::from(std::str::from_utf8(&data).is_err());
        body.extend_from_slice(&data);
    }
    assert!(halves > 8);
    assert!(String::from_utf8(body).unwrap().ends_with("data: [DONE]\n\n"));
}

#[tokio::test]
async fn an_idle_connection_is_closed_without_a_word() {
    let server = start(Options { keep_alive_ms: Some(20), ..Options::default() }).await;
    let mut connection = TcpStream::connect(server.address()).await.unwrap();
    for _ in 0..2 {
        send(&mut connection, "/version", "", "").await;
        let answer = read_until(&mut connection, "0.32.0\"}").await;
        assert!(!answer.to_lowercase().contains("connection: close"));
    }
    let (rest, reset) = all(connection).await;
    assert!(rest.is_empty() && !reset);
    assert_eq!(server.open_connections(), 0);
}

#[tokio::test]
async fn a_key_is_asked_for_where_there_is_one() {
    let server = start(Options { key: Some("secret".to_owned()), ..Options::default() }).await;
    let message = json!({"max_tokens": 3, "messages": [{"role": "user", "content": "hi"}]}).to_string();
    for (path, headers, status) in [
        ("/v1/chat/completions", "", "401"),
        ("/v1/chat/completions", "x-api-key: secret\r\n", "401"),
        ("/v1/chat/completions", "authorization: Bearer secret\r\n", "200"),
        ("/v1/messages", "x-api-key: secret\r\n", "200"),
        ("/v1/messages", "x-api-key: other\r\n", "401"),
        ("/tokenize", "", "200"),
    ] {
        let answer = text(&server, path, headers, &message).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{path} {headers}: {answer}");
    }
}

#[tokio::test]
async fn a_dropped_server_cuts_its_connections() {
    let server = start(Options { tokens_per_second: 10.0, ..Options::default() }).await;
    let mut stream = ask(&server, "/v1/chat/completions", "", &chat(json!({"stream": true}))).await;
    read_until(&mut stream, "said").await;
    let address = server.address();
    server.stop().await;
    tokio::time::timeout(Duration::from_secs(1), all(stream)).await.unwrap();
    assert!(TcpStream::connect(address).await.is_err());
}

#[tokio::test]
async fn every_other_surface_answers() {
    let server = start(Options::default()).await;
    let image = body(&server, "/v1/images/generations", json!({"prompt": "a fox", "n": 2})).await;
    assert!(image["data"][1]["b64_json"].as_str().unwrap().starts_with("iVBORw0KGgo"));
    let ranked = json!({"query": "red fox", "documents": ["a whale", "the red fox", {"text": "fox"}], "top_n": 2});
    assert_eq!(body(&server, "/v1/rerank", ranked).await["results"][0]["index"], 1);
    let scores = json!({"text_1": "fox", "text_2": ["fox", "whale"]});
    assert_eq!(body(&server, "/score", scores).await["data"].as_array().unwrap().len(), 2);
    let vector = body(&server, "/v1/embeddings", json!({"input": [[1, 2], [3]], "encoding_format": "base64"})).await;
    assert_eq!(
        (vector["data"][1]["embedding"].as_str().unwrap().len(), &vector["usage"]["prompt_tokens"]),
        (344, &json!(3))
    );
    assert_eq!(
        body(&server, "/pooling", json!({"input": "x", "dimensions": 5})).await["data"][0]["data"]
            .as_array()
            .unwrap()
            .len(),
        5
    );
    let violent = body(&server, "/v1/moderations", json!({"input": "how to build a bomb"})).await;
    assert_eq!(violent["results"][0]["flagged"], true);
    let speech = text(&server, "/v1/audio/speech", "", r#"{"input":"hi","voice":"x"}"#).await;
    assert!(speech.contains("content-type: audio/wav") && speech.contains("RIFF"));
    let form = "--b\r\ncontent-disposition: form-data; name=\"file\"; filename=\"a\"\r\n\r\nabc\r\n--b--\r\n";
    let heard =
        text(&server, "/v1/audio/transcriptions", "content-type: multipart/form-data; boundary=b\r\n", form).await;
    assert!(heard.contains("3 bytes of simulated speech"), "{heard}");
    let ids = body(&server, "/tokenize", json!({"prompt": "naïve 日本 😀"})).await["tokens"].clone();
    assert_eq!(body(&server, "/detokenize", json!({"tokens": ids})).await["prompt"], "naïve 日本 😀");
}

#[tokio::test]
async fn tools_are_called_on_every_surface_that_has_them() {
    let server = start(Options::default()).await;
    let schema = json!({"type": "object", "properties": {"city": {"type": "string"}}});
    let tool = json!({"type": "function", "function": {"name": "weather", "parameters": schema}});
    let asked: Value = serde_json::from_str(&chat(json!({"tools": [tool]}))).unwrap();
    let choice = body(&server, "/v1/chat/completions", asked).await["choices"][0].clone();
    assert_eq!(choice["message"]["tool_calls"][0]["function"]["arguments"], r#"{"city":"Paris"}"#);
    assert_eq!(choice["finish_reason"], "tool_calls");
    let tool = json!({"type": "function", "name": "weather", "parameters": schema});
    let called = body(&server, "/v1/responses", json!({"input": "How is Paris?", "tools": [tool]})).await;
    assert_eq!(called["output"][0]["arguments"], r#"{"city":"Paris"}"#);
    let tool = json!({"name": "weather", "input_schema": schema});
    let message =
        json!({"max_tokens": 99, "messages": [{"role": "user", "content": "How is Paris?"}], "tools": [tool]});
    let called = body(&server, "/v1/messages", message.clone()).await;
    assert_eq!((&called["content"][0]["input"]["city"], &called["stop_reason"]), (&json!("Paris"), &json!("tool_use")));
    let mut streamed = message;
    streamed["stream"] = json!(true);
    let events = text(&server, "/v1/messages", "", &streamed.to_string()).await;
    assert!(events.contains("input_json_delta") && events.contains("\"stop_reason\":\"tool_use\""));
}

#[tokio::test]
async fn other_engines_answer_in_their_own_shapes() {
    let tgi = start(Options { engine: Engine::Tgi, ..Options::default() }).await;
    let asked = json!({"inputs": "hi", "parameters": {"max_new_tokens": 3, "details": true}});
    let answer = body(&tgi, "/generate", asked.clone()).await;
    assert_eq!(
        (answer["details"]["generated_tokens"].as_u64(), &answer["details"]["finish_reason"]),
        (Some(3), &json!("length"))
    );
    assert!(text(&tgi, "/generate_stream", "", &asked.to_string()).await.contains("data:{\"index\":3,"));
    assert!(text(&tgi, "/metrics", "", "").await.contains("tgi_queue_size 0.0"));
    let sglang = start(Options { engine: Engine::Sglang, ..Options::default() }).await;
    assert!(text(&sglang, "/get_server_info", "", "").await.contains("max_total_num_tokens"));
    assert!(text(&sglang, "/metrics", "", "").await.contains("sglang:num_queue_reqs{model_name=\"sim-small\"} 0.0"));
    let openai = start(Options { engine: Engine::Openai, ..Options::default() }).await;
    let unknown = text(&openai, "/v1/chat/completions", "", &chat(json!({"model": "nope"}))).await;
    assert!(unknown.contains("\"code\":\"model_not_found\"") && unknown.contains("x-request-id: req_"));
    let streamed = text(&openai, "/v1/chat/completions", "", &chat(json!({"stream": true}))).await;
    assert!(streamed.contains("\"delta\":{},") && streamed.contains("simulated-openai"));
}

#[tokio::test]
async fn what_was_seen_and_what_goes_wrong_can_be_reached_from_another_process() {
    let server = start(Options::default()).await;
    let faults = json!({"faults": ["status=503,times=1,path=/v1/chat"]}).to_string();
    assert!(text(&server, "/simulate/faults", "", &faults).await.starts_with("HTTP/1.1 200"));
    let wrong = text(&server, "/simulate/faults", "", r#"{"faults":["boom"]}"#).await;
    assert!(wrong.starts_with("HTTP/1.1 400") && wrong.contains("must be one of"));
    let big = chat(json!({"user": "x".repeat(100_000)}));
    assert!(text(&server, "/v1/chat/completions?a=b", "x-a: 1\r\nx-a: 2\r\n", &big).await.starts_with("HTTP/1.1 503"));
    assert!(text(&server, "/v1/chat/completions", "", &big).await.starts_with("HTTP/1.1 200"));
    let listed = text(&server, "/simulate/seen", "", "").await;
    let listed: Value = serde_json::from_str(listed.split_once("\r\n\r\n").unwrap().1).unwrap();
    let (failed, fine) = (&listed[2], &listed[3]);
    assert_eq!((&failed["path"], &failed["outcome"]), (&json!("/v1/chat/completions?a=b"), &json!("faulted")));
    assert_eq!((&failed["headers"]["x-a"], &fine["outcome"]), (&json!("1, 2"), &json!("completed")));
    assert_eq!(
        (failed["body_bytes"].as_u64(), failed["body"].as_str().unwrap().len()),
        (Some(big.len() as u64), 65_536)
    );
    assert_eq!(failed["body_sha256"], fine["body_sha256"]);
}

#[tokio::test]
async fn a_websocket_says_everything_back() {
    let server = start(Options::default()).await;
    let headers = "connection: Upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n";
    let mut socket = ask(&server, "/v1/realtime?model=x", headers, "").await;
    let head = read_until(&mut socket, "\r\n\r\n").await;
    assert!(head.starts_with("HTTP/1.1 101") && head.contains("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="), "{head}");
    socket.write_all(&[0x81, 0x82, 1, 2, 3, 4, b'h' ^ 1, b'i' ^ 2]).await.unwrap();
    let mut echo = [0; 4];
    socket.read_exact(&mut echo).await.unwrap();
    assert_eq!(&echo, b"\x81\x02hi");
    assert_eq!(server.open_connections(), 1);
    socket.write_all(&[0x88, 0x80, 0, 0, 0, 0]).await.unwrap();
    assert_eq!(all(socket).await, (vec![0x88, 0], false));
    assert_eq!(outcome(&server).await, Outcome::Completed);
}
