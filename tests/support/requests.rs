//! A request that a model server answers, for every surface that the gateway passes on.

use bytes::Bytes;
use http::{Method, Request};
use http_body_util::Full;
use infergate::simulate::{Engine, Options, Simulated};
use infergate::surface::{Surface, TABLE};
use infergate_plugins::operation::Operation;

use super::Gateway;

/// Surfaces that stream if they are asked to.
pub const STREAMING: [&str; 5] =
    ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/generate_stream"];

/// The rows of the table that an upstream answers over plain HTTP.
pub fn passed_on() -> impl Iterator<Item = &'static Surface> {
    TABLE.iter().filter(|row| !row.is_local() && row.operation != Operation::Realtime)
}

/// A model server that answers every surface.
pub async fn every_surface() -> Simulated {
    let options = Options { models: vec!["m".to_owned()], engine: Engine::Tgi, ..Options::default() };
    Simulated::start(options).await.unwrap()
}

/// A policy with one upstream that is said to serve every surface. `upstream` and `pool` are YAML for those two,
/// `top` for the whole.
pub fn policy_for_every_surface(url: &str, upstream: &str, pool: &str, top: &str) -> String {
    format!(
        "version: 1\nmodels:\n  - {{name: m, pool: p}}\ndefault_model: m\npools:\n  p:\n    upstreams:\n      - {{url: '{url}', provider: sglang{upstream}}}\n{pool}{top}"
    )
}

/// A request for `path`, with the faults that it asks the model server for, and its own id.
pub fn request(gateway: &Gateway, path: &str, stream: bool, id: &str, faults: &str) -> Request<Full<Bytes>> {
    let (content_type, body) = body(path, stream);
    let method = if body.is_empty() { Method::GET } else { Method::POST };
    let request = Request::builder().method(method).uri(format!("http://{}{path}", gateway.address));
    let request = request.header("content-type", content_type).header("x-test-id", id);
    let request = if faults.is_empty() { request } else { request.header("x-simulate-fault", faults) };
    request.body(Full::new(body.into())).unwrap()
}

/// The content type and the body of a request for `path`; a GET has none.
pub fn body(path: &str, stream: bool) -> (&'static str, String) {
    const HELLO: &str = r#""messages":[{"role":"user","content":"Hello"}],"max_tokens":20"#;
    let json = |rest: &str| format!(r#"{{"model":"m",{rest},"stream":{stream}}}"#);
    let quiet = |rest: &str| format!(r#"{{"model":"m",{rest}}}"#);
    let body = match path {
        "/v1/chat/completions" | "/v1/messages" => json(HELLO),
        "/v1/messages/count_tokens" => quiet(HELLO),
        "/v1/completions" => json(r#""prompt":"Hello","max_tokens":20"#),
        "/v1/responses" => json(r#""input":"Hello","max_output_tokens":20"#),
        "/v1/embeddings" | "/v1/pooling" | "/v1/moderations" => quiet(r#""input":"Hello""#),
        "/v1/rerank" => quiet(r#""query":"Hello","documents":["a","b"]"#),
        "/v1/score" => quiet(r#""text_1":"Hello","text_2":"b""#),
        "/v1/audio/speech" => quiet(r#""input":"Hello","voice":"alloy""#),
        "/v1/images/generations" => quiet(r#""prompt":"Hello""#),
        "/tokenize" => quiet(r#""prompt":"Hello""#),
        "/detokenize" => quiet(r#""tokens":[1,2,3]"#),
        "/generate" | "/generate_stream" => r#"{"inputs":"Hello","parameters":{"max_new_tokens":20}}"#.to_owned(),
        "/v1/audio/transcriptions" | "/v1/audio/translations" => return (FORM, form()),
        "/info" => String::new(),
        other => panic!("there is no request for {other}: write one"),
    };
    ("application/json", body)
}

const FORM: &str = "multipart/form-data; boundary=edge";

fn form() -> String {
    let part = |name: &str, value: &str| format!("--edge\r\nContent-Disposition: form-data; {name}\r\n\r\n{value}\r\n");
    let file = part(r#"name="file"; filename="a.wav""#, "RIFF----WAVE");
    format!("{}{file}--edge--\r\n", part(r#"name="model""#, "m"))
}
