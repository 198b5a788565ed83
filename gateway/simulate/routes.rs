//! From a request to its answer: reading it, what goes wrong with it, and which endpoint answers.

use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, Method, Request, Response, StatusCode};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::upgrade::OnUpgrade;

use super::answer::{self, Answer, Body, JSON, Refusal, Whole};
use super::connection::Line;
use super::engine::{Finish, Slot, Work};
use super::fault::{Fault, Instead, Trouble};
use super::input::Input;
use super::options::Engine;
use super::visit::Visit;
use super::{
    Server, audio, chat, completions, draft, embeddings, images, listing, messages, metrics, responses, socket, tgi,
};

/// A body that is longer is refused.
const LONGEST_BODY: usize = 256 << 20;

/// A request that was read.
pub(super) struct Call {
    pub(super) server: Arc<Server>,
    pub(super) method: Method,
    pub(super) path: String,
    pub(super) headers: HeaderMap,
    pub(super) body: Bytes,
    pub(super) trouble: Trouble,
}

/// Answers one request of one connection.
pub(super) async fn answer(server: Arc<Server>, line: Arc<Line>, mut request: Request<Incoming>) -> Response<Body> {
    let upgrade = request.extensions_mut().remove::<OnUpgrade>();
    let (parts, body) = request.into_parts();
    let mut visit = Visit::new(&server, &line, &parts);
    let Some(body) = read(body).await else {
        return refused(&server, visit, Refusal::new(413, "Request body is too large"), parts.uri.path());
    };
    visit.body(&body);
    let path = parts.uri.path().to_owned();
    let trouble = match path.starts_with("/simulate/") {
        true => Trouble::default(),
        false => Arc::clone(&server.faults.read()).strike(&parts.method, &path, &parts.headers),
    };
    let mut call = Call { server, method: parts.method, path, headers: parts.headers, body, trouble };
    if let Some(wait) = call.trouble.slow_first {
        tokio::time::sleep(wait).await;
    }
    if call.path == "/v1/realtime" && call.trouble.instead.is_none() && call.allowed() {
        return socket::upgrade(&call, visit, upgrade);
    }
    let whole = match call.trouble.instead.take() {
        Some(instead) => Answer::Whole(call.fail(instead, &mut visit).await),
        None => call.answer().await,
    };
    let trouble = std::mem::take(&mut call.trouble);
    let head = call.method == Method::HEAD;
    answer::send(&call.server, visit, trouble, call.decorate(whole), head)
}

fn refused(server: &Server, visit: Visit, refusal: Refusal, path: &str) -> Response<Body> {
    let whole = refusal.whole(server.options.engine, path);
    answer::send(server, visit, Trouble::default(), whole.into(), false)
}

/// The whole body; none if it is too long. A client that leaves meanwhile ends all of this.
async fn read(mut body: Incoming) -> Option<Bytes> {
    let mut all = BytesMut::new();
    let mut first = Bytes::new();
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame.ok()?.into_data() else { continue };
        if all.len() + first.len() + data.len() > LONGEST_BODY {
            return None;
        }
        match first.is_empty() && all.is_empty() {
            true => first = data,
            false => {
                all.extend_from_slice(&std::mem::take(&mut first));
                all.extend_from_slice(&data);
            }
        }
    }
    Some(if all.is_empty() { first } else { all.freeze() })
}

impl Call {
    async fn answer(&self) -> Answer {
        if !self.allowed() {
            return self.unauthorized().into();
        }
        match self.route().await {
            Ok(answer) => answer,
            Err(refusal) => refusal.whole(self.engine(), &self.path).into(),
        }
    }

    async fn route(&self) -> Result<Answer, Refusal> {
        let get = self.method == Method::GET || self.method == Method::HEAD;
        match (self.path.as_str(), get) {
            ("/simulate/seen", true) => Ok(listing::seen(self)),
            ("/simulate/faults", false) => self.set_faults(),
            ("/health" | "/ping", true) | ("/ping", false) => Ok(Whole::empty(StatusCode::OK).into()),
            ("/metrics", true) => Ok(self.metrics()),
            ("/v1/models", true) => Ok(listing::models(self)),
            ("/version", true) => Ok(Whole::json(r#"{"version":"0.32.0"}"#).into()),
            ("/load", true) => Ok(listing::load(self)),
            ("/info" | "/get_server_info" | "/get_model_info", true) => listing::info(self),
            ("/v1/chat/completions", false) => chat::answer(self).await,
            ("/v1/completions", false) => completions::answer(self).await,
            ("/v1/responses", false) => responses::answer(self).await,
            ("/v1/messages", false) => messages::answer(self).await,
            ("/v1/messages/count_tokens", false) => messages::count(self),
            ("/v1/embeddings", false) => embeddings::embed(self).await,
            ("/pooling" | "/v1/pooling", false) => embeddings::pool(self).await,
            ("/score" | "/v1/score", false) => embeddings::score(self).await,
            ("/rerank" | "/v1/rerank" | "/v2/rerank", false) => embeddings::rerank(self).await,
            ("/tokenize", false) => listing::tokenize(self),
            ("/detokenize", false) => listing::detokenize(self),
            ("/v1/audio/transcriptions" | "/v1/audio/translations", false) => audio::transcribe(self).await,
            ("/v1/audio/speech", false) => audio::speak(self).await,
            ("/v1/images/generations", false) => images::generate(self).await,
            ("/v1/moderations", false) => images::moderate(self).await,
            ("/generate" | "/generate_stream", false) => tgi::answer(self).await,
            ("/", false) if self.engine() == Engine::Tgi => tgi::answer(self).await,
            (path, true) if path.starts_with("/v1/models/") => listing::model(self),
            (path, _) => Ok(unknown(path).into()),
        }
    }

    pub(super) fn engine(&self) -> Engine {
        self.server.options.engine
    }

    /// The model that is asked for; with none named, the first.
    pub(super) fn model(&self, input: &Input) -> Result<String, Refusal> {
        let model = input.text("model")?.unwrap_or_else(|| self.server.options.first_model());
        self.check_model(model)?;
        Ok(model.to_owned())
    }

    pub(super) fn check_model(&self, model: &str) -> Result<(), Refusal> {
        let options = &self.server.options;
        if options.serves(model) {
            return Ok(());
        }
        if options.engine == Engine::Openai {
            let message = format!("The model `{model}` does not exist or you do not have access to it.");
            return Err(Refusal::new(404, message).code("model_not_found"));
        }
        let known = options.models.join(", ");
        Err(Refusal::new(404, format!("The model `{model}` does not exist. Valid aliases: {known}.")).about("model"))
    }

    /// The end of what `system_fingerprint` says.
    pub(super) fn fingerprint(&self) -> String {
        let engine = match self.engine() {
            Engine::Vllm => "vllm-0.32.0",
            Engine::Tgi => "tgi-3.3.6",
            Engine::Sglang => "sglang-0.5.6",
            Engine::Openai => "openai",
        };
        match self.server.options.name.as_str() {
            "simulated" => format!("simulated-{engine}"),
            name => format!("simulated-{engine}-{name}"),
        }
    }

    /// An id that ends like vLLM's: in the request's own id, else at random.
    pub(super) fn id(&self, prefix: &str) -> String {
        let own = self.headers.get("x-request-id").and_then(|id| id.to_str().ok());
        let own = own.filter(|id| self.engine() == Engine::Vllm && !id.is_empty());
        own.map_or_else(|| format!("{prefix}{}", draft::hex_id()), |id| format!("{prefix}{id}"))
    }

    /// Runs the engine for an answer that is not streamed.
    pub(super) async fn generate(&self, work: Work, tokens: u64, longest: u64) -> Slot {
        let engine = Arc::clone(&self.server.engine);
        let extra = self.trouble.slow_first_token.unwrap_or(Duration::ZERO);
        engine.generate(work, tokens, longest, extra).await
    }

    /// Runs the engine for an answer without tokens, such as an embedding.
    pub(super) async fn compute(&self, work: Work) {
        self.generate(work, 0, 0).await.finish(Finish::Stop);
    }

    fn metrics(&self) -> Answer {
        let page = metrics::page(&self.server.engine, &self.server.options);
        Whole::new(StatusCode::OK, "text/plain; version=1.0.0; charset=utf-8", page).into()
    }

    fn set_faults(&self) -> Result<Answer, Refusal> {
        let input = Input::parse(&self.body)?;
        let faults = input.list("faults")?.iter().map(|text| {
            let parsed = text.as_str().unwrap_or_default().parse::<Fault>();
            parsed.map_err(|why| Refusal::new(400, why).about("faults"))
        });
        self.server.set_faults(faults.collect::<Result<_, _>>()?);
        Ok(Whole::json("{}").into())
    }
}

fn unknown(path: &str) -> Whole {
    let only_post = matches!(path, "/v1/chat/completions" | "/v1/completions" | "/v1/responses" | "/v1/messages");
    match only_post {
        true => {
            Whole::new(StatusCode::METHOD_NOT_ALLOWED, JSON, r#"{"detail":"Method Not Allowed"}"#).with("allow", "POST")
        }
        false => not_found(),
    }
}

/// FastAPI's answer to a path that does not exist.
pub(super) fn not_found() -> Whole {
    Whole::new(StatusCode::NOT_FOUND, JSON, r#"{"detail":"Not Found"}"#)
}

// Keys.
impl Call {
    fn allowed(&self) -> bool {
        let Some(key) = &self.server.options.key else { return true };
        let guarded = self.path.starts_with("/v1/") || self.path.starts_with("/generate");
        if !guarded {
            return true;
        }
        let header = |name: &str| self.headers.get(name).and_then(|value| value.to_str().ok());
        let bearer = header("authorization").and_then(|value| value.strip_prefix("Bearer "));
        let anthropic = header("x-api-key").filter(|_| self.path.starts_with("/v1/messages"));
        bearer == Some(key) || anthropic == Some(key)
    }

    fn unauthorized(&self) -> Whole {
        if self.engine() == Engine::Vllm && !self.path.starts_with("/v1/messages") {
            return Whole::new(StatusCode::UNAUTHORIZED, JSON, r#"{"error":"Unauthorized"}"#);
        }
        Refusal::new(401, "Incorrect API key provided.").whole(self.engine(), &self.path)
    }
}

// What is wrong with the whole of an answer, and what every answer has.
impl Call {
    async fn fail(&self, instead: Instead, visit: &mut Visit) -> Whole {
        let refusal = match instead {
            Instead::Hang => return std::future::pending().await,
            Instead::Reset => {
                visit.faulted();
                visit.line().reset();
                return std::future::pending().await;
            }
            Instead::Garbage => {
                visit.faulted();
                visit.line().garbage();
                return Whole::empty(StatusCode::OK);
            }
            Instead::Redirect(url) => {
                visit.faulted();
                return Whole::empty(StatusCode::TEMPORARY_REDIRECT).with("location", &url);
            }
            Instead::Status(status, retry_after) => {
                visit.faulted();
                let refusal = Refusal::new(status, format!("Simulated fault: status {status}"));
                let whole = refusal.whole(self.engine(), &self.path);
                return match retry_after {
                    Some(seconds) => whole.with("retry-after", &seconds.to_string()),
                    None => whole,
                };
            }
            Instead::Context => {
                let longest = self.server.options.max_model_len;
                draft::too_long(self.engine(), longest, longest + 1)
            }
            Instead::ContentFilter => {
                let message = "The response was filtered due to the prompt triggering the content management policy.";
                Refusal::new(400, message).about("prompt").kind("invalid_request_error").code("content_filter")
            }
            Instead::Unknown(why) => Refusal::new(400, why).about("x-simulate-fault"),
        };
        visit.faulted();
        let openai = refusal.code == Some("content_filter") && !self.path.starts_with("/v1/messages");
        refusal.whole(if openai { Engine::Openai } else { self.engine() }, &self.path)
    }

    /// Adds the headers that a request or an engine calls for.
    fn decorate(&self, answer: Answer) -> Answer {
        let Answer::Whole(mut whole) = answer else { return answer };
        if let Some(load) = self.load_report(&whole) {
            whole = whole.with("endpoint-load-metrics", &load);
        }
        if self.engine() == Engine::Openai && self.path.starts_with("/v1/") {
            whole = whole.with("x-request-id", &format!("req_{}", draft::hex_id()));
            whole = whole.with("openai-processing-ms", "1").with("openai-version", "2020-10-01");
        }
        Answer::Whole(whole)
    }

    /// ORCA's load report, which vLLM puts into answers that are not streamed.
    fn load_report(&self, whole: &Whole) -> Option<String> {
        let reports = matches!(self.path.as_str(), "/v1/chat/completions" | "/v1/completions");
        let format =
            self.headers.get("endpoint-load-metrics-format").filter(|_| reports && whole.status == StatusCode::OK)?;
        let waiting = self.server.engine.metrics.waiting.load(std::sync::atomic::Ordering::Relaxed) as f64;
        let usage = self.server.engine.kv_usage();
        match format.to_str().ok()?.to_ascii_lowercase().as_str() {
            "json" => Some(format!(
                r#"JSON {{"named_metrics": {{"num_requests_waiting": {waiting:?}, "kv_cache_usage_perc": {usage:?}}}}}"#
            )),
            "text" => Some(format!(
                "TEXT named_metrics.num_requests_waiting={waiting:?}, named_metrics.kv_cache_usage_perc={usage:?}"
            )),
            _ => None,
        }
    }
}
