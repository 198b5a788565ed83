//! Every endpoint answers through the gateway as the model server does, and says what a caller can use.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request};
use http_body_util::Full;
use infergate::surface::{Body, Surface, TABLE};
use infergate_plugins::operation::Operation;
use serde_json::{Value, json};

use crate::support::socket::Socket;
use crate::support::{
    Answer, Client, Engine, Gateway, Options, Outcome, Simulated, chat, events, eventually, model_server, policy,
};

const PATIENCE: Duration = Duration::from_secs(10);

/// What is asked of an endpoint; `None` for the one that is no request and answer.
fn body(surface: &Surface) -> Option<Value> {
    let hello = json!([{"role": "user", "content": "hello"}]);
    let mut body = match surface.operation {
        Operation::Chat => json!({"messages": hello, "max_tokens": 5}),
        Operation::Completions => json!({"prompt": "hello", "max_tokens": 5}),
        Operation::Embeddings | Operation::Pooling => json!({"input": ["hello", "there"]}),
        Operation::Responses => json!({"input": "hello", "max_output_tokens": 5}),
        Operation::Messages | Operation::CountTokens => json!({"messages": hello, "max_tokens": 5}),
        Operation::Rerank => json!({"query": "hello", "documents": ["there", "hello there"]}),
        Operation::Score => json!({"text_1": "hello", "text_2": ["there", "hello there"]}),
        Operation::Speech => json!({"input": "hello", "voice": "alloy"}),
        Operation::Images => json!({"prompt": "a house", "size": "64x64"}),
        Operation::Moderation => json!({"input": "hello"}),
        Operation::Tokenize if surface.path == "/detokenize" => json!({"tokens": [38, 48]}),
        Operation::Tokenize => json!({"prompt": "hello"}),
        // TGI serves one model, so nobody names it.
        Operation::Generate => return Some(json!({"inputs": "hello", "parameters": {"max_new_tokens": 5}})),
        Operation::Transcription | Operation::Models | Operation::Status => json!({}),
        Operation::Realtime | Operation::Passthrough => return None,
    };
    body["model"] = json!("m");
    Some(body)
}

/// A form with a file of bytes that are no text, and the model behind it.
fn form() -> Bytes {
    let mut form = b"--edge\r\ncontent-disposition: form-data; name=\"file\"; filename=\"a.wav\"\r\ncontent-type: audio/wav\r\n\r\n".to_vec();
    form.extend((0..70_000_u32).map(|n| (n * 7) as u8));
    form.extend_from_slice(b"\r\n--edge\r\ncontent-disposition: form-data; name=\"model\"\r\n\r\nm\r\n--edge--\r\n");
    form.into()
}

fn request(address: SocketAddr, surface: &Surface, body: &Value) -> Request<Full<Bytes>> {
    let request = Request::builder().method(surface.method.clone()).uri(format!("http://{address}{}", surface.path));
    match surface.body {
        Body::None => request.body(Full::default()).unwrap(),
        Body::Multipart => {
            request.header("content-type", "multipart/form-data; boundary=edge").body(Full::new(form())).unwrap()
        }
        _ => request.header("content-type", "application/json").body(Full::new(body.to_string().into())).unwrap(),
    }
}

/// A body without what differs from answer to answer: ids and times.
fn lasting(answer: &Answer) -> String {
    let kind = answer.header("content-type");
    let parse = |text: &str| {
        serde_json::from_str::<Value>(text).map_or_else(|_| text.to_owned(), |value| clean(value).to_string())
    };
    match () {
        () if kind.starts_with("text/event-stream") => {
            events(&answer.body).iter().map(|data| parse(data) + "\n").collect()
        }
        () if kind.starts_with("application/json") => parse(&answer.text()),
        () => format!("{:?}", answer.body),
    }
}

fn clean(value: Value) -> Value {
    let passing = ["id", "item_id", "created", "created_at", "completed_at", "response_id", "request_id"];
    match value {
        Value::Object(fields) => fields
            .into_iter()
            .filter(|(name, _)| !passing.contains(&name.as_str()))
            .map(|(name, value)| (name, clean(value)))
            .collect(),
        Value::Array(values) => values.into_iter().map(clean).collect(),
        other => other,
    }
}

/// vLLM with the model `m`, TGI with another, and a gateway before both.
struct Rig {
    vllm: Simulated,
    tgi: Simulated,
    gateway: Gateway,
}

impl Rig {
    async fn new(extra: &str) -> Self {
        let vllm = model_server().await;
        let options = Options { models: vec!["t".to_owned()], engine: Engine::Tgi, ..Options::default() };
        let tgi = Simulated::start(options).await.unwrap();
        let text = format!(
            "version: 1\ndefault_model: t\nmodels:\n  - {{name: m, pool: vllm}}\n  - {{name: t, pool: tgi}}\n\
             pools:\n  vllm: {{upstreams: [{{url: '{}', name: one}}]}}\n  tgi: {{upstreams: [{{url: '{}', provider: tgi}}]}}\n{extra}",
            vllm.url(),
            tgi.url()
        );
        let gateway = Gateway::start(&text).await;
        Self { vllm, tgi, gateway }
    }

    fn upstream(&self, surface: &Surface) -> SocketAddr {
        if surface.operation == Operation::Generate { self.tgi.address() } else { self.vllm.address() }
    }
}

#[tokio::test]
async fn every_endpoint_answers_through_the_gateway_as_it_does_directly() {
    let rig = Rig::new("").await;
    let mut tried = 0;
    for client in Client::both() {
        for surface in TABLE.iter().filter(|surface| !surface.is_local()) {
            let Some(body) = body(surface) else { continue };
            let direct = client.send(request(rig.upstream(surface), surface, &body)).await;
            let through = client.send(request(rig.gateway.address, surface, &body)).await;
            assert_eq!(direct.status, 200, "{}: {}", surface.path, direct.text());
            assert_eq!(through.status, 200, "{}: {}", surface.path, through.text());
            assert_eq!(through.header("content-type"), direct.header("content-type"), "{}", surface.path);
            assert_eq!(lasting(&through), lasting(&direct), "{}", surface.path);
            assert!(through.whole && !through.body.is_empty(), "{}", surface.path);
            tried += 1;
        }
    }
    // All but /v1/realtime, which has its own tests, and the four that the gateway answers itself.
    assert_eq!(tried, 2 * (TABLE.len() - 5));
}

#[tokio::test]
async fn every_endpoint_is_counted_once_under_its_own_name() {
    let rig = Rig::new("").await;
    for surface in TABLE {
        let Some(body) = body(surface) else { continue };
        assert_eq!(
            Client::h1().send(request(rig.gateway.address, surface, &body)).await.status,
            200,
            "{}",
            surface.path
        );
        let name = format!(r#"infergate_requests_total{{surface="{}",outcome="ok"}}"#, surface.path);
        let counted = || async { rig.gateway.metric(&name).await == 1.0 };
        eventually(&name, PATIENCE, counted).await;
    }
    Client::h1().get(rig.gateway.address, "/nobody").await;
    let unknown = r#"infergate_requests_total{surface="unknown",outcome="refused"}"#;
    eventually(unknown, PATIENCE, || async { rig.gateway.metric(unknown).await == 1.0 }).await;
    assert_eq!(rig.gateway.metric(r#"infergate_refusals_total{code="not_found"}"#).await, 1.0);
}

#[tokio::test]
async fn every_stream_passes_as_it_comes() {
    let rig = Rig::new("").await;
    let streams = ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/generate_stream"];
    for client in Client::both() {
        for surface in TABLE.iter().filter(|surface| streams.contains(&surface.path)) {
            let mut body = body(surface).unwrap();
            body["stream"] = json!(true);
            body["stream_options"] = json!({"include_usage": true});
            let direct = client.send(request(rig.upstream(surface), surface, &body)).await;
            let through = client.send(request(rig.gateway.address, surface, &body)).await;
            assert!(through.whole && events(&through.body).len() > 3, "{}: {}", surface.path, through.text());
            assert_eq!(lasting(&through), lasting(&direct), "{}", surface.path);
            assert!(through.header("content-type").starts_with("text/event-stream"), "{}", surface.path);
            assert_eq!((through.header("cache-control"), through.header("x-accel-buffering")), ("no-cache", "no"));
            assert_eq!(through.header("content-length"), "");
        }
    }
}

#[tokio::test]
async fn a_form_reaches_the_upstream_byte_for_byte() {
    let rig = Rig::new("").await;
    for client in Client::both() {
        let surface = TABLE.iter().find(|surface| surface.path == "/v1/audio/transcriptions").unwrap();
        let answer = client.send(request(rig.gateway.address, surface, &Value::Null)).await;
        assert_eq!((answer.status, answer.header("x-infergate-model")), (200, "m"));
        let seen = rig.vllm.seen().pop().unwrap();
        assert_eq!(
            (seen.body_bytes, &seen.headers["content-type"]),
            (form().len(), &"multipart/form-data; boundary=edge".parse().unwrap())
        );
        assert!(form().starts_with(&seen.body));
    }
}

#[tokio::test]
async fn what_needs_no_upstream_is_answered_here() {
    let rig = Rig::new("").await;
    for client in Client::both() {
        for (path, key) in [("/health", "status"), ("/ping", "status"), ("/version", "version"), ("/v1/models", "data")]
        {
            let answer = client.get(rig.gateway.address, path).await;
            assert_eq!((answer.status, answer.json()[key].is_null()), (200, false), "{path}");
            assert!(!answer.header("x-request-id").is_empty(), "{path}");
        }
    }
    assert!(rig.vllm.seen().iter().all(|seen| seen.path == "/health"));
}

#[tokio::test]
async fn the_list_of_models_says_what_each_is_and_where_it_lives() {
    let server = model_server().await;
    let text = format!(
        "version: 1\nmodels:\n  - {{name: big, pool: p, aliases: [gpt-4o], description: Slow but wise, fallbacks: [{{pool: q}}]}}\n\
         \x20 - {{name: 'any-*', pool: p}}\npools:\n  p: {{upstreams: [{{url: '{0}'}}]}}\n  q: {{upstreams: [{{url: '{0}', provider: openai}}]}}\n",
        server.url()
    );
    let gateway = Gateway::start(&text).await;
    let list = Client::h1().get(gateway.address, "/v1/models").await.json();
    assert_eq!(list["object"], "list");
    assert_eq!(list["data"].as_array().unwrap().len(), 2, "a pattern is no name: {list}");
    let big = &list["data"][0];
    assert_eq!(
        (&big["id"], &big["object"], &big["description"]),
        (&json!("big"), &json!("model"), &json!("Slow but wise"))
    );
    assert!(big["created"].is_u64() && big["owned_by"].is_string());
    assert_eq!((&big["pools"], &big["providers"]), (&json!(["p", "q"]), &json!(["openai", "vllm"])));
    assert_eq!((&list["data"][1]["id"], &list["data"][1]["alias_of"]), (&json!("gpt-4o"), &json!("big")));
}

#[tokio::test]
async fn what_nobody_serves_gets_404_in_the_callers_dialect() {
    let server = model_server().await;
    let gateway = Gateway::start(&policy(&[&server.url()], "")).await;
    for client in Client::both() {
        for path in ["/", "/v1", "/v1/chat", "/v1/chat/completions/", "/V1/chat/completions", "/v1/files", "/metrics"] {
            let answer = client.post(gateway.address, path, chat(false, 1)).await;
            assert_eq!((answer.status, answer.code().as_str()), (404, "not_found"), "{path}");
            assert_eq!(answer.json()["error"]["type"], "invalid_request_error");
        }
        let answer = client.post(gateway.address, "/v1/chat/completions", r#"{"model":"nope","messages":[]}"#).await;
        assert_eq!((answer.status, answer.code().as_str()), (404, "model_not_found"));
        assert_eq!(answer.json()["error"]["param"], "model");
        for (path, body) in [
            ("/v1/messages", r#"{"model":"nope"}"#),
            ("/v1/messages/batches", "{}"),
            ("/v1/messages/count_tokens", r#"{"model":"no"}"#),
        ] {
            let answer = client.post(gateway.address, path, body).await;
            let told = answer.json();
            assert_eq!((answer.status, &told["type"]), (404, &json!("error")), "{path}: {told}");
            assert_eq!(told["error"]["type"], "not_found_error", "{path}");
        }
        let answer = client.post(gateway.address, "/generate", r#"{"inputs":"x"}"#).await;
        assert_eq!((answer.status, answer.json()["error_type"].as_str().unwrap()), (404, "model_not_found"));
    }
    assert!(server.seen().iter().all(|seen| seen.method == "GET"));
}

#[tokio::test]
async fn another_method_gets_405_with_the_one_that_is_taken() {
    let server = model_server().await;
    let gateway = Gateway::start(&policy(&[&server.url()], "")).await;
    for client in Client::both() {
        for surface in TABLE {
            for method in [Method::GET, Method::POST, Method::PUT, Method::DELETE, Method::PATCH] {
                if method == surface.method {
                    continue;
                }
                let uri = format!("http://{}{}", gateway.address, surface.path);
                let request = Request::builder().method(method.clone()).uri(uri).body(Full::default()).unwrap();
                let answer = client.send(request).await;
                assert_eq!(
                    (answer.status, answer.header("allow")),
                    (405, surface.method.as_str()),
                    "{method} {}",
                    surface.path
                );
                assert_eq!(answer.header("x-should-retry"), "false");
            }
        }
    }
}

#[tokio::test]
async fn prefixes_are_taken_off_only_where_the_policy_says() {
    let rig = Rig::new("requests: {strip_prefixes: [/openai, /llm/eu]}\n").await;
    for client in Client::both() {
        for path in ["/v1/chat/completions", "/openai/v1/chat/completions", "/llm/eu/v1/chat/completions"] {
            assert_eq!(client.post(rig.gateway.address, path, chat(false, 1)).await.status, 200, "{path}");
            assert_eq!(rig.vllm.seen().pop().unwrap().path, "/v1/chat/completions");
        }
        for path in
            ["/llm/v1/chat/completions", "/openaiv1/chat/completions", "/openai/openai/v1/chat/completions", "/openai"]
        {
            assert_eq!(client.post(rig.gateway.address, path, chat(false, 1)).await.status, 404, "{path}");
        }
        assert_eq!(client.get(rig.gateway.address, "/openai/v1/models").await.status, 200);
    }
}

#[tokio::test]
async fn a_query_goes_with_its_path() {
    let rig = Rig::new("").await;
    Client::h1().post(rig.gateway.address, "/v1/chat/completions?api-version=2024-10-21&x=%2F", chat(false, 1)).await;
    assert_eq!(rig.vllm.seen().pop().unwrap().path, "/v1/chat/completions?api-version=2024-10-21&x=%2F");
}

#[tokio::test]
async fn every_request_gets_an_id_of_ours_and_a_sane_one_of_the_clients_comes_back_beside_it() {
    let rig = Rig::new("").await;
    let mut given = std::collections::HashSet::new();
    let long = "x".repeat(200);
    for client in Client::both() {
        for (id, kept) in
            [("req_1-a.B:2", true), ("with space", false), ("\"quoted\"", false), ("", false), (&long, false)]
        {
            let headers = [("x-request-id", id)];
            let answer = client.post_with(rig.gateway.address, "/v1/chat/completions", &headers, chat(false, 1)).await;
            let refused = client.post_with(rig.gateway.address, "/v1/embeddings", &headers, "{").await;
            assert_eq!(refused.status, 400);
            assert_eq!(rig.vllm.seen().pop().unwrap().headers["x-request-id"], answer.header("x-request-id"));
            for answer in [answer, refused] {
                let ours = answer.header("x-request-id").to_owned();
                assert_eq!(uuid::Uuid::parse_str(&ours).unwrap().get_version_num(), 7, "{ours}");
                assert_eq!(answer.header("x-client-request-id"), if kept { id } else { "" });
                assert!(given.insert(ours), "given twice");
            }
        }
    }
}

#[tokio::test]
async fn the_upstreams_own_request_id_is_kept_beside_ours() {
    let options = Options { models: vec!["m".to_owned()], engine: Engine::Openai, ..Options::default() };
    let server = Simulated::start(options).await.unwrap();
    let gateway = Gateway::start(&policy(&[&server.url()], "")).await;
    let answer = Client::h1()
        .post_with(gateway.address, "/v1/chat/completions", &[("x-request-id", "mine")], chat(false, 1))
        .await;
    assert_eq!(answer.header("x-client-request-id"), "mine");
    assert!(answer.header("x-upstream-request-id").starts_with("req_"));
}

#[tokio::test]
async fn an_answer_tells_who_gave_it_and_what_took_how_long() {
    let rig = Rig::new("").await;
    for client in Client::both() {
        for stream in [false, true] {
            let answer = client.post(rig.gateway.address, "/v1/chat/completions", chat(stream, 2)).await;
            assert_eq!((answer.header("x-infergate-model"), answer.header("x-infergate-upstream")), ("m", "one"));
            assert_eq!(answer.header("x-infergate-attempts"), "1");
            let timing = answer.header("server-timing");
            let stages: Vec<&str> = timing.split(", ").map(|stage| stage.split_once(";dur=").unwrap().0).collect();
            assert_eq!(stages, ["body", "admit", "queue", "upstream", "relay"], "{timing}");
            let numbers = timing.split(", ").map(|stage| stage.split_once(";dur=").unwrap().1);
            assert!(
                numbers.map(|number| number.parse::<f64>().unwrap()).all(|ms| (0.0..5_000.0).contains(&ms)),
                "{timing}"
            );
        }
    }
}

#[tokio::test]
async fn an_upstreams_name_can_be_kept_to_ourselves() {
    let rig = Rig::new("requests: {name_upstream: false}\n").await;
    let answer = Client::h1().post(rig.gateway.address, "/v1/chat/completions", chat(false, 1)).await;
    assert_eq!((answer.status, answer.header("x-infergate-upstream")), (200, ""));
}

#[tokio::test]
async fn an_sdk_is_told_whether_and_when_to_retry() {
    let server = model_server().await;
    let retry_once = "health: {enabled: false}\nretry: {attempts: 1}\nbreaker: {failures: 1, open_ms: 3000}\n";
    let gateway = Gateway::start(&policy(&[&server.url()], retry_once)).await;
    for client in Client::both() {
        let answer = client.post(gateway.address, "/v1/chat/completions", "{").await;
        assert_eq!((answer.status, answer.header("x-should-retry"), answer.header("retry-after")), (400, "false", ""));
        // The upstream's own words pass, its wait among them.
        let busy = [("x-simulate-fault", "status=429,retry_after=1")];
        let answer = client.post_with(gateway.address, "/v1/chat/completions", &busy, chat(false, 1)).await;
        assert_eq!((answer.status, answer.header("retry-after")), (429, "1"));
        // The upstream said when it wants to be asked again; until then nobody is there.
        let answer = client.post(gateway.address, "/v1/chat/completions", chat(false, 1)).await;
        assert_eq!(
            (answer.status, answer.header("x-should-retry"), answer.code().as_str()),
            (503, "true", "no_upstream")
        );
        assert_eq!(answer.header("retry-after"), "1");
        assert_eq!(answer.header("x-infergate-attempts"), "0");
        eventually("the pause is over", PATIENCE, || async {
            client.post(gateway.address, "/v1/chat/completions", chat(false, 1)).await.status == 200
        })
        .await;
    }
}

// Paths that pass through unread.

#[tokio::test]
async fn a_path_that_the_policy_names_passes_through_unread() {
    let rig = Rig::new("passthrough:\n  - {path: /load, pool: vllm}\n  - {path: /v1/models/*, pool: vllm}\n  - {path: /pooling, pool: vllm, methods: [POST]}\n").await;
    for client in Client::both() {
        let answer = client.get(rig.gateway.address, "/load").await;
        assert_eq!((answer.status, answer.text().as_str()), (200, r#"{"server_load":0}"#));
        assert_eq!(client.get(rig.gateway.address, "/v1/models/m?x=1").await.json()["id"], "m");
        assert_eq!(rig.vllm.seen().pop().unwrap().path, "/v1/models/m?x=1");
        let direct = client.post(rig.vllm.address(), "/pooling", r#"{"model":"m","input":"x"}"#).await;
        let through = client.post(rig.gateway.address, "/pooling", r#"{"model":"m","input":"x"}"#).await;
        assert_eq!(lasting(&through), lasting(&direct));
        // What the upstream says of a body that is no JSON is the upstream's affair.
        let answer = client.post_with(rig.gateway.address, "/pooling", &[("accept-encoding", "gzip")], "{{").await;
        assert_eq!((answer.status, answer.header("x-infergate-upstream")), (400, "one"));
        let seen = rig.vllm.seen().pop().unwrap();
        assert_eq!((&seen.body[..], &seen.headers["accept-encoding"]), (&b"{{"[..], &"gzip".parse().unwrap()));
        for (method, path) in [(Method::GET, "/pooling"), (Method::DELETE, "/load"), (Method::GET, "/loads")] {
            let uri = format!("http://{}{path}", rig.gateway.address);
            let answer = client.send(Request::builder().method(method).uri(uri).body(Full::default()).unwrap()).await;
            assert_eq!((answer.status, answer.code().as_str()), (404, "not_found"), "{path}");
        }
    }
}

#[tokio::test]
async fn a_row_of_the_table_wins_over_a_pass_through() {
    let rig = Rig::new("passthrough:\n  - {path: '/*', pool: tgi}\n").await;
    let answer = Client::h1().post(rig.gateway.address, "/v1/chat/completions", chat(false, 1)).await;
    assert_eq!((answer.status, answer.header("x-infergate-upstream")), (200, "one"));
    assert_eq!(Client::h1().get(rig.gateway.address, "/v1/anything").await.status, 404);
    assert_eq!(rig.tgi.seen().pop().unwrap().path, "/v1/anything");
}

// WebSockets.

#[tokio::test]
async fn a_websocket_is_carried_both_ways() {
    let rig = Rig::new("").await;
    let (head, mut socket) =
        Socket::open(rig.gateway.address, "/v1/realtime?model=m", "Sec-WebSocket-Protocol: realtime\r\n").await;
    let lower = head.to_ascii_lowercase();
    assert!(lower.starts_with("http/1.1 101"), "{head}");
    // The answer to the key in RFC 6455, 1.3.
    assert!(head.contains("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="), "{head}");
    assert!(lower.contains("upgrade: websocket") && lower.contains("sec-websocket-protocol: realtime"), "{head}");
    for size in [0, 5, 125, 70_000] {
        let text = vec![b'x'; size];
        socket.send(0x82, &text).await;
        assert_eq!(socket.receive().await, Some((0x82, text)), "{size} bytes");
    }
    // Messages that are on their way at the same time.
    for text in [b"one", b"two"] {
        socket.send(0x81, text).await;
    }
    assert_eq!(socket.receive().await, Some((0x81, b"one".to_vec())));
    assert_eq!(socket.receive().await, Some((0x81, b"two".to_vec())));
    socket.send(0x88, &[3, 232]).await;
    assert_eq!(socket.receive().await, Some((0x88, vec![3, 232])), "the goodbye is answered");
    assert_eq!(socket.receive().await, None, "and the upstream's end is passed on");
    let seen = rig.vllm.seen().pop().unwrap();
    assert_eq!((seen.path.as_str(), seen.outcome), ("/v1/realtime?model=m", Outcome::Completed));
    rig.gateway.comes_to(r#"infergate_requests_total{surface="/v1/realtime",outcome="ok"}"#, 1.0).await;
}

#[tokio::test]
async fn the_upstream_sees_the_end_of_a_websocket() {
    let rig = Rig::new("").await;
    let (_, mut socket) = Socket::open(rig.gateway.address, "/v1/realtime?model=m", "").await;
    socket.send(0x81, b"hello").await;
    assert!(socket.receive().await.is_some());
    drop(socket);
    let seen = || async { rig.vllm.seen().pop().is_some_and(|seen| seen.outcome == Outcome::Disconnected) };
    let took = eventually("the upstream's side ends", PATIENCE, seen).await;
    assert!(took < Duration::from_millis(500), "{took:?}");
}

#[tokio::test]
async fn a_websocket_keeps_its_credentials_here_and_gets_ours() {
    let options = Options { models: vec!["m".to_owned()], key: Some("ours".to_owned()), ..Options::default() };
    let server = Simulated::start(options).await.unwrap();
    let text =
        policy(&[&format!("{}\n        key: {{env: UPSTREAM_KEY}}", server.url())], "health: {enabled: false}\n");
    let gateway = Gateway::spawn(&text, "threads: 2\n", &[], &[("UPSTREAM_KEY", "ours")]);
    gateway.ready().await;
    let (head, _socket) =
        Socket::open(gateway.address, "/v1/realtime?model=m", "Authorization: Bearer theirs\r\nCookie: theirs\r\n")
            .await;
    assert!(head.starts_with("HTTP/1.1 101"), "{head}");
    let seen = server.seen().pop().unwrap();
    assert_eq!((&seen.headers["authorization"], seen.headers.get("cookie")), (&"Bearer ours".parse().unwrap(), None));
}

#[tokio::test]
async fn a_websocket_on_a_pass_through_is_carried_where_the_policy_allows_it() {
    let server = model_server().await;
    let text = format!(
        "version: 1\npools:\n  p: {{upstreams: [{{url: '{}/v1'}}], health: {{enabled: false}}}}\n\
         passthrough:\n  - {{path: /realtime, pool: p, websocket: true}}\n  - {{path: /quiet, pool: p}}\n",
        server.url()
    );
    let gateway = Gateway::start(&text).await;
    let (head, mut socket) = Socket::open(gateway.address, "/realtime", "").await;
    assert!(head.starts_with("HTTP/1.1 101"), "{head}");
    socket.send(0x81, b"hello").await;
    assert_eq!(socket.receive().await, Some((0x81, b"hello".to_vec())));
    let (head, _) = Socket::open(gateway.address, "/quiet", "").await;
    assert!(head.starts_with("HTTP/1.1 400") && head.to_ascii_lowercase().contains("connection: close"), "{head}");
}

#[tokio::test]
async fn a_websocket_that_cannot_be_opened_is_refused_like_any_request() {
    let rig = Rig::new("").await;
    for client in Client::both() {
        let answer = client.get(rig.gateway.address, "/v1/realtime?model=m").await;
        assert_eq!((answer.status, answer.code().as_str()), (400, "upgrade_unsupported"));
    }
    let (head, _) = Socket::open(rig.gateway.address, "/v1/chat/completions", "").await;
    assert!(head.starts_with("HTTP/1.1 405"), "{head}");
    rig.vllm.set_faults(vec!["status=503,path=/v1/realtime".parse().unwrap()]);
    let (head, _) = Socket::open(rig.gateway.address, "/v1/realtime?model=m", "").await;
    assert!(head.starts_with("HTTP/1.1 502"), "{head}");
}
