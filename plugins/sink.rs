//! Sinks: what leaves of the journal, and in which shape. The gateway carries it and keeps each sink's position.
//! # A whole plugin
//!
//! A JSON array of lines, posted. The gateway makes the request, keeps the position and tries again.
//!
//! ```
//! use std::time::SystemTime;
//!
//! use http::{HeaderValue, Uri, header::CONTENT_TYPE};
//! use infergate_plugins::sink::{Batch, Delivery, Failure, Post, Sink, Way};
//!
//! #[derive(Debug)]
//! struct Arrays {
//!     url: Uri,
//! }
//!
//! impl Sink for Arrays {
//!     fn kind(&self) -> &'static str {
//!         "arrays"
//!     }
//!
//!     fn way(&self) -> Way<'_> {
//!         Way::Http
//!     }
//!
//!     fn delivery(&self, batch: &Batch<'_>) -> Delivery {
//!         let body = [b"[", batch.lines.join(&b","[..]).as_slice(), b"]"].concat().into();
//!         let headers = vec![(CONTENT_TYPE, HeaderValue::from_static("application/json"))];
//!         Delivery::Http(Post { url: self.url.clone(), headers, body })
//!     }
//! }
//!
//! let sink = Arrays { url: Uri::from_static("https://logs.example.com/lines") };
//! let lines: [&[u8]; 2] = [br#"{"seq":1}"#, br#"{"seq":2}"#];
//! let batch = Batch { run: "20261122T140305Z-1a2b3c4d", lines: &lines, now: SystemTime::UNIX_EPOCH };
//! let Delivery::Http(post) = sink.delivery(&batch) else { panic!("it posts") };
//! assert_eq!(post.body, r#"[{"seq":1},{"seq":2}]"#);
//! // What an answer means may stay as it is: 4xx about the lines is final, all else is tried again.
//! assert!(matches!(sink.judge(503, b""), Err(Failure::Later(_))));
//! assert!(matches!(sink.judge(413, b""), Err(Failure::Refused(_))));
//! ```

pub mod kafka;
pub mod nats;

mod file;
mod line;
mod otlp;
mod stdout;
mod webhook;

use std::collections::{BTreeMap, HashSet};
use std::fmt::Debug;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Uri};
use schemars::JsonSchema;
use serde::Deserialize;

use crate::secret::{Secret, SecretSource};

/// A place where records go. It decides their shape; getting them there is the gateway's work.
pub trait Sink: Debug + Send + Sync {
    /// The word for it in `policy.yaml`.
    fn kind(&self) -> &'static str;

    /// How to get there.
    fn way(&self) -> Way<'_>;

    /// What leaves for these lines.
    fn delivery(&self, batch: &Batch<'_>) -> Delivery;

    /// What an HTTP answer means: delivered, perhaps without some lines, or not, and why.
    fn judge(&self, status: u16, _body: &[u8]) -> Result<Option<Rejected>, Failure> {
        match status {
            200..300 => Ok(None),
            _ => Err(Failure::of(status, format!("it answers with status {status}"))),
        }
    }
}

/// Why a delivery was not taken, in words for the log, and what the gateway does about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The same may be taken another time. It is sent again for as long as it takes, and nothing behind it leaves.
    Later(String),
    /// It will never be taken. It is sent again in halves, and a line that is refused alone is passed over: it stays
    /// in the journal, is counted in `infergate_sink_refused_total` and named in the log.
    Refused(String),
}

impl Failure {
    /// What an HTTP status says of the lines that were sent. All but a few are about the sink, its address or its
    /// credentials, not about them.
    pub fn of(status: u16, why: String) -> Self {
        match status {
            400 | 413 | 422 => Self::Refused(why),
            _ => Self::Later(why),
        }
    }
}

/// Lines of a delivery that a sink threw away, though it took the others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejected {
    /// How many.
    pub lines: u64,
    /// Why, for the log.
    pub why: String,
}

/// Lines of one run, in order.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    /// The run they are from.
    pub run: &'a str,
    /// The lines, without their line ends; never empty.
    pub lines: &'a [&'a [u8]],
    /// The time.
    pub now: SystemTime,
}

/// How to get to a sink.
#[derive(Clone, Copy, Debug)]
pub enum Way<'a> {
    /// Text to the standard output.
    Stdout,
    /// Text to the end of a file.
    File(&'a Path),
    /// An HTTP request.
    Http,
    /// Messages to a JetStream.
    Nats(&'a nats::Servers),
    /// Messages to a topic.
    Kafka(&'a kafka::Brokers),
}

/// What leaves at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// Whole lines.
    Text(Bytes),
    /// One request.
    Http(Post),
    /// One message for each line, in order.
    Messages(Vec<Message>),
}

/// An HTTP request.
#[derive(Clone, PartialEq, Eq)]
pub struct Post {
    /// Where it goes.
    pub url: Uri,
    /// Its headers; those with secrets are marked as sensitive.
    pub headers: Vec<(HeaderName, HeaderValue)>,
    /// Its body.
    pub body: Bytes,
}

impl Debug for Post {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // A path may have a secret in it.
        write!(f, "Post({}, {} bytes)", self.url.authority().map_or("", |host| host.as_str()), self.body.len())
    }
}

/// A message of a queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// The subject or the topic.
    pub subject: String,
    /// The record's id, or `run:seq`: the same again where it is sent again.
    pub id: String,
    /// The line.
    pub payload: Bytes,
}

/// One place where the lines of the journal go. Exactly one of the kinds must be given.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[schemars(rename = "Sink")]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Its name. The position in the journal is kept under it: a new name starts anew.
    #[schemars(length(min = 1))]
    pub name: String,
    /// The kinds of lines that it gets. Absent: every line, which is what `infergate audit verify --anchor` and a
    /// proof elsewhere need.
    #[serde(default)]
    pub kinds: Option<Vec<Kind>>,
    /// Where a sink with a new name begins.
    #[serde(default)]
    pub from: From,
    /// How many lines leave at once.
    #[serde(default)]
    pub batch: Bounds,
    /// How long one delivery may take, in milliseconds. Then it counts as failed and is made again; a write to the
    /// standard output or a file, which cannot be taken back, is waited for again.
    #[serde(default = "Config::timeout_ms")]
    #[schemars(range(min = 100, max = 600_000))]
    pub timeout_ms: u64,
    /// Lines on the standard output: `stdout: {}`.
    #[serde(default)]
    pub stdout: Option<stdout::Config>,
    /// Lines in a file.
    #[serde(default)]
    pub file: Option<file::Config>,
    /// OpenTelemetry logs over HTTP, one log record a line.
    #[serde(default)]
    pub otlp: Option<otlp::Config>,
    /// Batches of lines to a URL, signed as Standard Webhooks are.
    #[serde(default)]
    pub webhook: Option<webhook::Config>,
    /// Messages to NATS JetStream.
    #[serde(default)]
    pub nats: Option<nats::Config>,
    /// Messages to Kafka, where the gateway was built with it.
    #[serde(default)]
    pub kafka: Option<kafka::Config>,
}

impl Config {
    fn timeout_ms() -> u64 {
        10_000
    }
}

/// A kind of line in the journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[schemars(rename = "LineKind")]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// The beginning of a run.
    Open,
    /// The beginning of a segment.
    Segment,
    /// One request's record.
    Request,
    /// What an operator did.
    Act,
    /// A signature over all lines before.
    Checkpoint,
    /// Requests that were served without a record.
    Gap,
    /// A segment that retention removed.
    Retired,
    /// The end of a run.
    Close,
}

impl Kind {
    /// Its word in the journal.
    pub fn name(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Segment => "segment",
            Self::Request => "request",
            Self::Act => "act",
            Self::Checkpoint => "checkpoint",
            Self::Gap => "gap",
            Self::Retired => "retired",
            Self::Close => "close",
        }
    }
}

/// Where a sink with a new name begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[schemars(rename = "SinkFrom")]
#[serde(rename_all = "lowercase")]
pub enum From {
    /// With the first line of this process.
    #[default]
    Start,
    /// With the oldest line that the journal still has.
    Beginning,
}

/// How many lines leave at once. The first bound that is reached counts; one line always leaves whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[schemars(rename = "SinkBatch")]
#[serde(deny_unknown_fields, default)]
pub struct Bounds {
    /// Lines.
    #[schemars(range(min = 1, max = 100_000))]
    pub records: usize,
    /// Bytes of lines.
    #[schemars(range(min = 1, max = 67_108_864))]
    pub bytes: usize,
    /// How long a line may wait for others, in milliseconds.
    #[schemars(range(max = 60_000))]
    pub wait_ms: u64,
}

impl Default for Bounds {
    fn default() -> Self {
        Self { records: 500, bytes: 1 << 20, wait_ms: 200 }
    }
}

/// A sink as the policy has it. Equal ones need no restart.
#[derive(Debug)]
pub struct Outlet {
    /// What the policy says.
    pub config: Config,
    /// What it means.
    pub sink: Arc<dyn Sink>,
    secrets: Vec<Secret>,
}

impl PartialEq for Outlet {
    fn eq(&self, other: &Self) -> bool {
        self.config == other.config && self.secrets == other.secrets
    }
}

impl Outlet {
    /// Whether it wants lines of the kind that the journal calls `kind`.
    pub fn wants(&self, kind: &[u8]) -> bool {
        let named = |kinds: &Vec<Kind>| kinds.iter().any(|wanted| wanted.name().as_bytes() == kind);
        self.config.kinds.as_ref().is_none_or(named)
    }
}

/// Reads a secret, or says why that cannot be done.
pub type Resolve<'a> = &'a mut dyn FnMut(&SecretSource) -> Result<Secret, String>;

/// What is wrong: the key below the list of sinks, like `[0].webhook.url`, and what to do.
pub type Wrong = (String, String);

/// The sinks of a policy, or all that is wrong with them.
pub fn build(configs: &[Config], resolve: Resolve<'_>) -> Result<Vec<Arc<Outlet>>, Vec<Wrong>> {
    let (mut outlets, mut wrong) = (Vec::new(), Vec::new());
    let mut names = HashSet::new();
    for (index, config) in configs.iter().enumerate() {
        let at = |(path, message): Wrong| (format!("[{index}]{path}"), message);
        if !names.insert(&config.name) {
            wrong.push(at((".name".to_owned(), format!("{} is taken already by a sink above", config.name))));
        }
        match outlet(config, resolve) {
            Ok(outlet) => outlets.push(Arc::new(outlet)),
            Err(error) => wrong.push(at(error)),
        }
    }
    if wrong.is_empty() { Ok(outlets) } else { Err(wrong) }
}

fn outlet(config: &Config, resolve: Resolve<'_>) -> Result<Outlet, Wrong> {
    check_name(&config.name).map_err(|message| (".name".to_owned(), message))?;
    let mut secrets = Vec::new();
    let mut remembering = |source: &SecretSource| {
        let secret = resolve(source)?;
        secrets.push(secret.clone());
        Ok(secret)
    };
    let sink = one(config, &mut remembering)?;
    Ok(Outlet { config: config.clone(), sink, secrets })
}

type Built = Result<Arc<dyn Sink>, Wrong>;

/// The one kind that an entry names.
fn one(config: &Config, resolve: Resolve<'_>) -> Built {
    let mut built: Vec<(&str, Built)> = Vec::new();
    if let Some(config) = &config.stdout {
        built.push(("stdout", Ok(Arc::new(stdout::build(config)))));
    }
    if let Some(config) = &config.file {
        built.push(("file", file::build(config).map(shared)));
    }
    if let Some(config) = &config.otlp {
        built.push(("otlp", otlp::build(config, resolve).map(shared)));
    }
    if let Some(config) = &config.webhook {
        built.push(("webhook", webhook::build(config, resolve).map(shared)));
    }
    if let Some(config) = &config.nats {
        built.push(("nats", nats::build(config, resolve).map(shared)));
    }
    if let Some(config) = &config.kafka {
        built.push(("kafka", kafka::build(config, resolve).map(shared)));
    }
    let count = built.len();
    match (built.pop(), count) {
        (Some((kind, result)), 1) => result.map_err(|(path, message)| (format!(".{kind}{path}"), message)),
        (None, _) => Err((String::new(), format!("it goes nowhere: give one of {KINDS}"))),
        (Some((kind, _)), _) => {
            Err((format!(".{kind}"), "a sink is of one kind: make another entry, with a name of its own".to_owned()))
        }
    }
}

/// Every kind, as an error lists them.
const KINDS: &str = "stdout (as `stdout: {}`), file, otlp, webhook, nats, kafka";

fn shared<S: Sink + 'static>(sink: S) -> Arc<dyn Sink> {
    Arc::new(sink)
}

/// The name becomes a directory's name and a label.
fn check_name(name: &str) -> Result<(), String> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
    if (1..=64).contains(&name.len()) && name.bytes().all(plain) {
        return Ok(());
    }
    Err(format!("{name} is no name for a sink: up to 64 letters, digits, - and _"))
}

/// An http or https URL.
fn url(text: &str) -> Result<Uri, Wrong> {
    let wrong = |message: &str| (".url".to_owned(), message.to_owned());
    let uri: Uri = text.parse().map_err(|_| wrong("this is no URL"))?;
    let web = matches!(uri.scheme_str(), Some("http" | "https")) && uri.host().is_some_and(|host| !host.is_empty());
    if !web {
        return Err(wrong("a URL begins with http:// or https:// and names a server"));
    }
    // They would not be sent.
    let named = uri.authority().is_some_and(|authority| authority.as_str().contains('@'));
    if named { Err(wrong("no user and password in here: use secret_headers")) } else { Ok(uri) }
}

/// The headers of the policy, those with secrets marked.
fn headers(
    plain: &BTreeMap<String, String>,
    secret: &BTreeMap<String, SecretSource>,
    resolve: Resolve<'_>,
) -> Result<Vec<(HeaderName, HeaderValue)>, Wrong> {
    let mut headers = Vec::new();
    for (name, value) in plain {
        let place = format!(".headers.{name}");
        headers.push(header(name, value).map_err(|message| (place, message))?);
    }
    for (name, source) in secret {
        let told = |message: String| (format!(".secret_headers.{name}"), message);
        let value = resolve(source).map_err(told)?;
        let (name, mut value) = header(name, value.reveal()).map_err(told)?;
        value.set_sensitive(true);
        headers.push((name, value));
    }
    Ok(headers)
}

fn header(name: &str, value: &str) -> Result<(HeaderName, HeaderValue), String> {
    match (name.parse::<HeaderName>(), HeaderValue::from_str(value)) {
        (Ok(name), Ok(_)) if FRAMING.contains(&name.as_str()) => {
            Err("the gateway itself sets this header: take it out".to_owned())
        }
        (Ok(name), Ok(value)) => Ok((name, value)),
        _ => Err("this is no valid header".to_owned()),
    }
}

/// Headers that say where a body ends and what it is.
const FRAMING: &[&str] = &[
    "connection",
    "content-encoding",
    "content-length",
    "content-type",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

/// The lines as they stand in the journal.
fn text(lines: &[&[u8]]) -> Bytes {
    let mut text = Vec::with_capacity(lines.iter().map(|line| line.len() + 1).sum());
    for line in lines {
        text.extend_from_slice(line);
        text.push(b'\n');
    }
    text.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `yaml` as JSON builds to; every environment variable has its own name as value.
    pub(super) fn built(json: &str) -> Result<Vec<Arc<Outlet>>, Vec<Wrong>> {
        let configs: Vec<Config> = serde_json::from_str(json).unwrap();
        build(&configs, &mut |source| source.env.clone().map(Secret::new).ok_or_else(|| "not set".to_owned()))
    }

    pub(super) const LINE: &str = r#"{"v":1,"seq":7,"kind":"request","at":"2026-11-22T14:03:05.123456Z","id":"0197-a","outcome":"ok","status":200,"surface":"/v1/chat/completions","method":"POST","trace":{"id":"0af7651916cd43dd8448eb211c80319c","span":"b7ad6b7169203331","sampled":true},"tenant":"red team","model":{"asked":"gpt-4o","used":"llama"},"attempts":[{"pool":"a","upstream":"gpu-1"},{"pool":"b","upstream":"gpu-2"}],"usage":{"input_tokens":12,"output_tokens":40},"chain":"00"}"#;
    pub(super) const OPEN: &str =
        r#"{"v":1,"seq":1,"kind":"open","at":"2026-11-22T14:03:00.000000Z","run":"R","chain":"00"}"#;

    pub(super) fn batch<'a>(lines: &'a [&'a [u8]]) -> Batch<'a> {
        Batch { run: "R", lines, now: SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_700_000_000) }
    }

    #[test]
    fn an_entry_is_of_exactly_one_kind() {
        let wrong = |json| built(json).unwrap_err().remove(0);
        assert!(wrong(r#"[{"name":"a"}]"#).1.contains("stdout: {}"));
        assert_eq!(wrong(r#"[{"name":"a","stdout":{},"file":{"path":"/x"}}]"#).0, "[0].file");
        assert_eq!(built(r#"[{"name":"a","stdout":{}}]"#).unwrap()[0].sink.kind(), "stdout");
    }

    #[test]
    fn every_problem_is_told_at_its_place() {
        let json = r#"[{"name":"a","stdout":{}},{"name":"a","stdout":{}},{"name":"../x","stdout":{}},
            {"name":"w","webhook":{"url":"ftp://x"}},{"name":"v","webhook":{"url":"http://x","secret":{"file":"/none"}}},
            {"name":"o","otlp":{"url":"http://u:p@x"}},
            {"name":"h","otlp":{"url":"http://x","headers":{"Content-Length":"3"}}}]"#;
        let places: Vec<String> = built(json).unwrap_err().into_iter().map(|(path, _)| path).collect();
        let expected = ["[1].name", "[2].name", "[3].webhook.url", "[4].webhook.secret", "[5].otlp.url"];
        assert_eq!(
            (&places[..5], places[5].as_str()),
            (&expected.map(str::to_owned)[..], "[6].otlp.headers.Content-Length")
        );
    }

    #[test]
    fn only_what_is_said_of_the_lines_themselves_is_for_good() {
        let sink = built(r#"[{"name":"w","webhook":{"url":"http://x/"}}]"#).unwrap().remove(0).sink.clone();
        assert_eq!(sink.judge(204, b""), Ok(None));
        for status in [400, 413, 422] {
            assert!(matches!(sink.judge(status, b""), Err(Failure::Refused(_))), "{status}");
        }
        for status in [302, 401, 403, 404, 405, 408, 415, 429, 500, 503] {
            assert!(matches!(sink.judge(status, b""), Err(Failure::Later(_))), "{status}");
        }
    }

    #[test]
    fn a_changed_secret_makes_another_outlet() {
        let json = r#"[{"name":"w","webhook":{"url":"http://x/","secret":{"env":"A"}}}]"#;
        let configs: Vec<Config> = serde_json::from_str(json).unwrap();
        let with = |secret: &'static str| build(&configs, &mut |_| Ok(Secret::new(secret))).unwrap().remove(0);
        assert_eq!(with("a"), with("a"));
        assert_ne!(with("a"), with("b"));
        assert!(!format!("{:?}", with("canary")).contains("canary"));
    }

    #[test]
    fn a_sink_gets_the_kinds_that_it_names_or_all() {
        let outlets = built(r#"[{"name":"a","kinds":["act"],"stdout":{}},{"name":"b","stdout":{}}]"#).unwrap();
        assert!(outlets[0].wants(b"act") && !outlets[0].wants(b"request"));
        assert!(outlets[1].wants(b"request") && outlets[1].wants(b"a kind of tomorrow"));
    }
}
