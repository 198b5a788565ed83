//! The record of one request: what it asked, who decided what, who answered, how it ended.
//!
//! Fields are added, never renamed; the schema is `config/record.schema.json`. Nothing that a client sends can set a
//! field of ours: what it said stands under `client` and `model.asked`, clipped. No prompt and no answer is in it.

use std::borrow::Cow;
use std::fmt;
use std::net::{SocketAddr, SocketAddrV4};
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use schemars::JsonSchema;
use serde::{Serialize, Serializer};
use smallvec::SmallVec;
use uuid::Uuid;

use super::capture::Mark;
use crate::guard::{JudgedList, JudgedRecord};
use crate::hex;
use crate::limits::{Reservation, Settled};
use crate::money::Price;
use crate::money::bill::Cost;
use crate::policy::Route;
use crate::pool::origin::{Address, Endpoint};
use crate::pool::worked::Share;
use crate::pool::{Picked, Pool, Upstream};
use crate::routers::shortlist::{CandidateRecord, Weight};
use crate::usage::{Source, Usage};

/// The most of a name or a sentence from outside that a record keeps, in bytes.
pub const CLIPPED: usize = 256;

/// One request's record, borrowed from the request that is over. Members that do not apply are absent; times are
/// microseconds after the head had been read.
#[derive(Debug, Serialize, JsonSchema)]
pub struct Record<'a> {
    /// The gateway's own id of the request (UUIDv7), unique; it is `x-request-id` on the answer.
    #[schemars(with = "Uuid")]
    pub id: Id,
    /// How it ended.
    pub outcome: Outcome,
    /// The status that the client got.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub status: Option<u16>,
    /// The endpoint, as the table of endpoints spells it.
    #[serde(serialize_with = "word")]
    pub surface: &'static str,
    /// What was asked of the model, by OpenTelemetry's name where it has one.
    #[serde(serialize_with = "word")]
    pub operation: &'static str,
    /// The HTTP method.
    pub method: &'a str,
    /// Whether a stream was asked for.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub stream: bool,
    /// Whom the request came from.
    pub client: Client<'a>,
    /// Its place in a distributed trace, where the trace is the caller's or is kept.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trace: Option<Trace>,
    /// Who asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub principal: Option<&'a str>,
    /// Who pays.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tenant: Option<&'a str>,
    /// The model's names.
    pub model: Models<'a>,
    /// The policy that decided.
    pub policy: PolicyMark<'a>,
    /// Every decision, in order. Where the policy leaves nothing to decide there is none: no key is asked for, or a pool
    /// takes any number of requests.
    #[schemars(with = "Vec<Decision>")]
    pub decisions: &'a [Decision],
    /// The models of the shortlist that chose one, in the order of the policy.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Vec<CandidateRecord<'_>>>")]
    pub candidates: Option<CandidateList<'a>>,
    /// Every attempt on an upstream, in order.
    #[schemars(with = "Vec<AttemptRecord<'_>>")]
    pub attempts: AttemptList<'a>,
    /// The tokens of the answer that was passed on, and the work of servers that are paid by the hour.
    #[serde(skip_serializing_if = "Usage::says_nothing")]
    pub usage: Usage,
    /// What it cost, where the policy has prices.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cost: Option<Cost<'a>>,
    /// Whether it used something that has no price, where the policy has prices.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub unpriced: bool,
    /// What became of each guardrail that looks at its prompt or its answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Vec<JudgedRecord<'_>>>")]
    pub guardrails: Option<JudgedList<'a>>,
    /// What it reserved of each limit that holds for it, and what it used.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Vec<Settled<'_>>>")]
    pub limits: Option<LimitList<'a>>,
    /// Bytes of bodies.
    pub bytes: BodyBytes,
    /// What was captured of its text, if the policy asked for that.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub capture: Option<Mark>,
    /// When each stage was over.
    pub times: Times,
    /// Why we said no, or why the answer broke off: the `code` that the client got.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub code: Option<&'static str>,
    /// The same as a sentence.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message: Option<&'a str>,
    /// When it began and ended.
    #[serde(skip)]
    pub moment: Moment,
}

/// What became of the limits that hold for a request.
#[derive(Clone, Copy, Debug)]
pub struct LimitList<'a>(pub &'a Reservation);

impl Serialize for LimitList<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.0.settled())
    }
}

/// What came of the models of a shortlist.
#[derive(Clone, Copy, Debug)]
pub struct CandidateList<'a>(pub &'a [Weight]);

impl Serialize for CandidateList<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.0.iter().map(Weight::record))
    }
}

impl Record<'_> {
    /// Nobody will find the trace that was begun here: it was not kept.
    pub fn forget_trace(&mut self) {
        self.trace = self.trace.filter(|trace| trace.parent.is_some());
    }
}

impl<'a> Record<'a> {
    /// The record of a chat that went well: what tests and benches make theirs of.
    #[doc(hidden)]
    pub fn sample(moment: Moment) -> Self {
        Self {
            id: Id::new(),
            outcome: Outcome::Ok,
            status: Some(200),
            surface: "/v1/chat/completions",
            operation: "chat",
            method: "POST",
            stream: true,
            client: Client {
                address: Peer(Some(([10, 1, 2, 3], 45_678).into())),
                protocol: "http/1.1",
                request_id: Some("a4b3c2d1-0000-4000-8000-000000000001"),
            },
            trace: None,
            principal: None,
            tenant: None,
            model: Models { asked: Some("llama-3"), route: Some("llama-3"), used: Some("llama-3") },
            policy: PolicyMark {
                revision: 1,
                hash: "88cd65a21399a152699ba090edee007f0c8793a3ada79c21306c740bcd501f8d",
            },
            decisions: &[],
            candidates: None,
            attempts: AttemptList {
                list: &[],
                moment,
                bytes: BodyBytes { request: 1024, answer: 587 },
                metered: None,
                route: None,
            },
            usage: Usage {
                input_tokens: Some(211),
                output_tokens: Some(49),
                source: Source::Upstream,
                ..Usage::default()
            },
            cost: None,
            unpriced: false,
            guardrails: None,
            limits: None,
            bytes: BodyBytes { request: 1024, answer: 587 },
            capture: None,
            times: Times {
                body: Some(40),
                admitted: Some(60),
                queued: Some(61),
                first: Some(5_310),
                ended: 99_000,
                own: 75,
            },
            code: None,
            message: None,
            moment,
        }
    }
}

/// A record as it stands in the journal: the frame of its line, and the record.
#[derive(Serialize, JsonSchema)]
struct Line<'a> {
    /// The version of this format: 1.
    v: u8,
    /// The number of the line in its run, from 1, without holes.
    seq: u64,
    /// `request`: lines of other kinds are the journal's own.
    kind: &'a str,
    /// When the head of the request had been read: RFC 3339, UTC, microseconds.
    at: &'a str,
    #[serde(flatten)]
    record: Record<'a>,
    /// SHA-256 over the chain of the line before and this line up to here.
    chain: &'a str,
}

/// The JSON Schema of a `request` line.
pub fn schema() -> schemars::Schema {
    let generator = schemars::generate::SchemaSettings::draft2020_12().for_serialize().into_generator();
    let mut schema = generator.into_root_schema_for::<Line<'static>>();
    schema.insert("title".to_owned(), "A record of Infergate's journal".into());
    schema
}

/// A word of ours, like a variant's name: nothing in it is to be escaped.
fn word<S: Serializer>(word: &&'static str, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_unit_variant("", 0, word)
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The answer was given to its end. A status that says what the client did wrong is no failure.
    Ok,
    /// We said no.
    Refused,
    /// No upstream could answer, one broke off, or one answered with a status of 500 or above.
    UpstreamError,
    /// A time-out of the policy.
    Timeout,
    /// The client left.
    ClientClosed,
    /// A guardrail stopped the request or its answer.
    Blocked,
    /// The answer was ended at a limit.
    LimitCut,
    /// The exchange was dropped: shutdown, or a panic.
    Aborted,
}

/// Every outcome with its name, in the order of the enum.
pub const OUTCOMES: [(Outcome, &str); 8] = [
    (Outcome::Ok, "ok"),
    (Outcome::Refused, "refused"),
    (Outcome::UpstreamError, "upstream_error"),
    (Outcome::Timeout, "timeout"),
    (Outcome::ClientClosed, "client_closed"),
    (Outcome::Blocked, "blocked"),
    (Outcome::LimitCut, "limit_cut"),
    (Outcome::Aborted, "aborted"),
];

impl Outcome {
    /// Its name in records, on metrics and in logs.
    pub fn name(self) -> &'static str {
        OUTCOMES[self as usize].1
    }
}

/// A request's id: a UUIDv7 of ours, as text.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Id([u8; 36]);

impl Id {
    /// A new id.
    pub fn new() -> Self {
        let mut text = [0; 36];
        Uuid::now_v7().hyphenated().encode_lower(&mut text);
        Self(text)
    }

    /// As the bytes of its text.
    pub fn bytes(&self) -> [u8; 36] {
        self.0
    }

    /// As text.
    pub fn as_str(&self) -> &str {
        std::str::from_utf8(&self.0).unwrap_or_default()
    }
}

impl Default for Id {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Debug for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Serialize for Id {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

/// Whom a request came from.
#[derive(Debug, Serialize, JsonSchema)]
pub struct Client<'a> {
    /// The peer of the connection, `IP:PORT` or `unix`.
    #[serde(serialize_with = "peer")]
    #[schemars(with = "String")]
    pub address: Peer,
    /// `http/1.0`, `http/1.1` or `h2`.
    #[serde(serialize_with = "word")]
    pub protocol: &'static str,
    /// What the client itself called the request (its `x-request-id`). Anything may stand here.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub request_id: Option<&'a str>,
}

/// The other end of a client's connection; none on a Unix socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer(pub Option<SocketAddr>);

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(address) => address.fmt(f),
            None => f.write_str("unix"),
        }
    }
}

fn peer<S: Serializer>(peer: &Peer, serializer: S) -> Result<S::Ok, S::Error> {
    match peer.0 {
        Some(SocketAddr::V4(address)) => v4(address, serializer),
        _ => serializer.collect_str(peer),
    }
}

/// What `Display` says, at a tenth of its cost.
fn v4<S: Serializer>(address: SocketAddrV4, serializer: S) -> Result<S::Ok, S::Error> {
    // From behind: each number, and the mark before it.
    let (mut text, mut at) = (*b".255.255.255.255:65535", 22);
    let mut put = |mark, mut number: u16| {
        loop {
            at -= 1;
            text[at] = b'0' + (number % 10) as u8;
            number /= 10;
            if number == 0 {
                break;
            }
        }
        at -= 1;
        text[at] = mark;
    };
    put(b':', address.port());
    address.ip().octets().iter().rev().for_each(|octet| put(b'.', (*octet).into()));
    serializer.serialize_str(std::str::from_utf8(&text[at + 1..]).unwrap_or_default())
}

/// A request's place in a distributed trace (W3C Trace Context).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Trace {
    /// The trace's id.
    #[serde(serialize_with = "hex128")]
    #[schemars(with = "String")]
    pub id: u128,
    /// The request's own span.
    #[serde(serialize_with = "hex64")]
    #[schemars(with = "String")]
    pub span: u64,
    /// The caller's span.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "hex64_option")]
    #[schemars(with = "Option<String>")]
    pub parent: Option<u64>,
    /// Whether the trace is kept whatever becomes of the request.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub sampled: bool,
}

fn hex128<S: Serializer>(value: &u128, serializer: S) -> Result<S::Ok, S::Error> {
    hex::<32, S>(*value, serializer)
}

fn hex64<S: Serializer>(value: &u64, serializer: S) -> Result<S::Ok, S::Error> {
    hex::<16, S>((*value).into(), serializer)
}

fn hex<const N: usize, S: Serializer>(value: u128, serializer: S) -> Result<S::Ok, S::Error> {
    let mut digits = [0; N];
    hex::spell(&mut digits, value);
    serializer.serialize_str(std::str::from_utf8(&digits).unwrap_or_default())
}

fn hex64_option<S: Serializer>(value: &Option<u64>, serializer: S) -> Result<S::Ok, S::Error> {
    hex64(&value.unwrap_or_default(), serializer)
}

/// A model's names on the way from the client to the upstream.
#[derive(Clone, Copy, Debug, Default, Serialize, JsonSchema)]
pub struct Models<'a> {
    /// What the client asked for, clipped to 256 bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub asked: Option<&'a str>,
    /// The policy's entry that took it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub route: Option<&'a str>,
    /// What the last upstream that was asked knows it by.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub used: Option<&'a str>,
}

/// The policy that decided about a request.
#[derive(Clone, Copy, Debug, Serialize, JsonSchema)]
pub struct PolicyMark<'a> {
    /// Counts the policies since the start.
    pub revision: u64,
    /// SHA-256 of the file and the secrets that it names.
    pub hash: &'a str,
}

/// Bytes of bodies.
#[derive(Clone, Copy, Debug, Default, Serialize, JsonSchema)]
pub struct BodyBytes {
    /// What came from the client.
    pub request: u64,
    /// What went to it.
    pub answer: u64,
}

/// When each stage was over, in microseconds after the head had been read.
#[derive(Clone, Copy, Debug, Default, Serialize, JsonSchema)]
pub struct Times {
    /// The body was there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub body: Option<u64>,
    /// Parsed and routed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub admitted: Option<u64>,
    /// It had its place in the pool, where that was not at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queued: Option<u64>,
    /// The first piece of the answer left.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first: Option<u64>,
    /// The end.
    pub ended: u64,
    /// What of it the gateway itself took until the first piece left.
    #[serde(rename = "self")]
    pub own: u64,
}

/// One decision about a request.
#[derive(Debug, Serialize, JsonSchema)]
pub struct Decision {
    /// The stage that decided: `identify` (who may ask, and where), `route`, `effort`, `queue`, `refuse`.
    #[serde(serialize_with = "word")]
    pub stage: &'static str,
    /// The rule of the policy, or the refusal's code.
    #[schemars(with = "String")]
    pub rule: Text,
    /// What it said.
    #[schemars(with = "String")]
    pub verdict: Text,
    /// Why.
    #[schemars(with = "String")]
    pub why: Text,
}

/// All decisions about one request.
pub type Decisions = SmallVec<[Decision; 4]>;

/// A few words that cost nothing to keep: constant, shared with the policy, or made for this request.
#[derive(Clone, Debug)]
pub enum Text {
    /// Constant.
    Static(&'static str),
    /// The policy's own.
    Shared(Arc<str>),
    /// Made for this request.
    Own(Box<str>),
}

impl Text {
    /// The words.
    pub fn as_str(&self) -> &str {
        match self {
            Self::Static(text) => text,
            Self::Shared(text) => text,
            Self::Own(text) => text,
        }
    }
}

impl From<&'static str> for Text {
    fn from(text: &'static str) -> Self {
        Self::Static(text)
    }
}

impl From<&Arc<str>> for Text {
    fn from(text: &Arc<str>) -> Self {
        Self::Shared(text.clone())
    }
}

impl From<String> for Text {
    fn from(text: String) -> Self {
        Self::Own(text.into())
    }
}

impl From<Cow<'static, str>> for Text {
    fn from(text: Cow<'static, str>) -> Self {
        match text {
            Cow::Borrowed(text) => Self::Static(text),
            Cow::Owned(text) => Self::Own(text.into()),
        }
    }
}

impl Serialize for Text {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(clip(self.as_str()))
    }
}

/// One attempt on an upstream, as it goes on.
#[derive(Debug)]
pub struct Attempt {
    pool: Arc<Pool>,
    upstream: usize,
    endpoint: Arc<Endpoint>,
    /// The head of its answer: when it came, and its status.
    pub head: Option<(Instant, u16)>,
    /// When it began.
    pub began: Instant,
    /// When it was over; absent for one that runs.
    pub ended: Option<Instant>,
    /// What it came to.
    pub result: Ending,
    /// Why, where there is more to say than the result.
    pub why: Option<Text>,
    /// Bytes of the body that went to it.
    pub sent: u64,
    /// Bytes of its answer's body that were passed on.
    pub received: u64,
    /// Its span in the trace; 0 without one.
    pub span: u64,
    /// Its part of its server's work, where that has a price: while it runs, and once it is over, in microseconds.
    share: Option<Share>,
    gpu_us: Option<u64>,
    /// What it used and what that cost, where its answer was read and another's was passed on.
    pub metered: Option<Metered>,
    /// Where the policy sent it.
    route: Option<Arc<Route>>,
    /// What its server costs, where that is paid by the hour.
    hourly: Option<Arc<Price>>,
}

/// What an attempt came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Ending {
    /// Its answer was passed on to the end.
    Answered,
    /// No connection.
    Connect,
    /// The connection was lost before an answer.
    Reset,
    /// No answer in time.
    Timeout,
    /// Its status made us ask another.
    Status,
    /// The client left, or the process ended.
    Cancelled,
    /// The answer broke off on its way.
    Broken,
    /// Its answer was read to the end and was not good enough: the next model of a cascade was asked.
    Escalated,
}

/// All attempts of one request.
pub type Attempts = SmallVec<[Attempt; 1]>;

impl Attempt {
    /// An attempt that begins now, with its span in the trace (0: none).
    pub fn begin(pool: &Arc<Pool>, picked: &Picked<'_>, sent: usize, span: u64) -> Self {
        Self {
            pool: pool.clone(),
            upstream: picked.upstream.index,
            endpoint: picked.endpoint.clone(),
            head: None,
            began: Instant::now(),
            ended: None,
            // What it stays if nobody says more: its future was dropped.
            result: Ending::Cancelled,
            why: None,
            sent: sent as u64,
            received: 0,
            span,
            share: None,
            gpu_us: None,
            metered: None,
            route: None,
            hourly: None,
        }
    }

    /// It asks for the model of `route`. Where its server is paid by the hour, how long that works is measured.
    pub fn asks_for(mut self, route: Option<Arc<Route>>, hourly: Option<Arc<Price>>) -> Self {
        self.share = hourly.as_ref().map(|_| Share::begin(&self.endpoint, self.began));
        Self { route, hourly, ..self }
    }

    /// What its server costs, where that is paid by the hour.
    pub fn hourly(&self) -> Option<&Price> {
        self.hourly.as_deref()
    }

    /// The policy's entry for the model that was asked.
    pub fn model(&self) -> Option<&str> {
        self.route.as_ref().map(|route| route.model.name.as_str())
    }

    /// The microseconds that its server has worked for it, where that is measured.
    pub fn gpu_us(&self) -> Option<u64> {
        self.gpu_us.or_else(|| Some(self.share.as_ref()?.micros(Instant::now())))
    }

    /// Its server has nothing more to do for it, however long its answer takes on to the client.
    pub fn worked(&mut self) {
        self.gpu_us = self.gpu_us();
        self.share = None;
    }

    /// It is over.
    pub fn end(&mut self, result: Ending, why: Option<Text>) {
        self.worked();
        self.ended = Some(Instant::now());
        self.result = result;
        self.why = why;
    }

    /// The address that was asked.
    pub fn address(&self) -> &Address {
        &self.endpoint.address
    }

    /// The pool.
    pub fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }

    /// The upstream; `None` never happens, because the pool is the one it was picked from.
    pub fn upstream(&self) -> Option<&Upstream> {
        self.pool.upstreams.get(self.upstream)
    }

    /// The attempt as a record tells it.
    pub fn record(&self, moment: &Moment, bytes: BodyBytes) -> AttemptRecord<'_> {
        let upstream = self.upstream();
        let name = upstream.and_then(|upstream| upstream.name.to_str().ok()).unwrap_or_default();
        AttemptRecord {
            pool: &self.pool.name,
            upstream: name,
            address: Some(&*self.endpoint.spelt).filter(|address| *address != name),
            provider: upstream.map_or("", |upstream| upstream.provider.kind()),
            began: moment.micros(self.began),
            head: self.head.map(|(at, _)| moment.micros(at)),
            ended: moment.micros(self.ended.unwrap_or(moment.ended)),
            status: self.head.map(|(_, status)| status),
            result: self.result,
            why: self.why.as_ref(),
            sent: Some(self.sent).filter(|sent| *sent != bytes.request),
            received: Some(self.received).filter(|received| *received != bytes.answer),
            metered: self.metered,
            model: self.model().map(clip),
        }
    }
}

/// One attempt in a record.
#[derive(Debug, Serialize, JsonSchema)]
pub struct AttemptRecord<'a> {
    /// The pool.
    pub pool: &'a str,
    /// The upstream's name.
    pub upstream: &'a str,
    /// The address that was asked, where the name is another.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub address: Option<&'a str>,
    /// Its dialect.
    #[serde(serialize_with = "word")]
    pub provider: &'static str,
    /// When it began, in microseconds after the head of the request had been read.
    pub began: u64,
    /// When the head of its answer came.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub head: Option<u64>,
    /// When it was over.
    pub ended: u64,
    /// Its status.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub status: Option<u16>,
    /// What it came to.
    pub result: Ending,
    /// Why, where there is more to say.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    pub why: Option<&'a Text>,
    /// Bytes of the body that went to it, where they are not as many as came from the client (`bytes.request`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sent: Option<u64>,
    /// Bytes of its answer's body that were passed on, where they are not as many as the client got (`bytes.answer`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub received: Option<u64>,
    /// What it used and what that cost, where there were several attempts and its answer was read. A single attempt's
    /// are the request's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metered: Option<Metered>,
    /// The policy's entry for the model that was asked, where a cascade asked another one after it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<&'a str>,
}

/// What one of several attempts used.
#[derive(Clone, Copy, Debug, Serialize, JsonSchema)]
pub struct Metered {
    /// Tokens of the prompt.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub input_tokens: Option<u64>,
    /// Tokens of its answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub output_tokens: Option<u64>,
    /// Where the numbers come from.
    pub source: Source,
    /// What they cost, in nano-dollars, where the policy has a price.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cost_nanousd: Option<u64>,
}

/// The attempts of a request, told in its own time.
#[derive(Clone, Copy, Debug)]
pub struct AttemptList<'a> {
    /// The attempts.
    pub list: &'a [Attempt],
    /// The request's moment.
    pub moment: Moment,
    /// The request's own bytes: an attempt tells only what is different.
    pub bytes: BodyBytes,
    /// What the answer used that was passed on: the last attempt's.
    pub metered: Option<Metered>,
    /// The policy's entry for the request's model: an attempt tells only another one.
    pub route: Option<&'a str>,
}

impl Serialize for AttemptList<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let last = self.list.len() - self.list.len().min(1);
        let passed_on = |index| self.metered.filter(|_| index > 0 && index == last);
        serializer.collect_seq(self.list.iter().enumerate().map(|(index, attempt)| {
            let told = attempt.record(&self.moment, self.bytes);
            let model = told.model.filter(|_| attempt.model() != self.route);
            AttemptRecord { metered: told.metered.or(passed_on(index)), model, ..told }
        }))
    }
}

/// When a request began and ended, on the clock of the day and on the one that never jumps.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    /// The head had been read, by the clock of the day.
    pub at: SystemTime,
    /// The same.
    pub received: Instant,
    /// The end.
    pub ended: Instant,
}

impl Moment {
    /// Microseconds from the beginning to `instant`.
    pub fn micros(&self, instant: Instant) -> u64 {
        instant.saturating_duration_since(self.received).as_micros() as u64
    }

    /// The time of the day at `instant`.
    pub fn clock(&self, instant: Instant) -> SystemTime {
        self.at + instant.saturating_duration_since(self.received)
    }
}

impl Metered {
    /// What an answer used, and what that cost.
    pub fn of(usage: &Usage, cost_nanousd: Option<u64>) -> Option<Self> {
        let Usage { input_tokens, output_tokens, source, .. } = *usage;
        (!usage.is_unknown()).then_some(Self { input_tokens, output_tokens, source, cost_nanousd })
    }
}

/// At most [`CLIPPED`] bytes of `text`, whole characters.
pub fn clip(text: &str) -> &str {
    &text[..text.floor_char_boundary(CLIPPED)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_from_outside_is_clipped_at_a_character() {
        let long = "\u{4e2d}".repeat(200);
        assert_eq!(clip(&long).len(), 255);
        assert_eq!(clip("short"), "short");
    }

    #[test]
    fn outcomes_are_named_in_the_order_of_the_enum_and_as_serde_names_them() {
        for (index, (outcome, name)) in OUTCOMES.iter().enumerate() {
            assert_eq!((*outcome as usize, outcome.name()), (index, *name));
            assert_eq!(serde_json::to_value(outcome).unwrap(), *name);
        }
    }

    #[test]
    fn ids_are_uuids_that_sort_by_time() {
        let ids: Vec<Id> = (0..1000).map(|_| Id::new()).collect();
        assert!(ids.windows(2).all(|two| two[0].as_str() < two[1].as_str()));
        assert_eq!(Uuid::parse_str(ids[0].as_str()).unwrap().get_version_num(), 7);
    }
}
