//! Audit records leave for other systems: every line at least once, in order, whoever is down meanwhile.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use infergate::audit::read;
use opentelemetry_proto::tonic::logs::v1::LogRecord;
use opentelemetry_proto::tonic::resource::v1::Resource;
use parking_lot::Mutex;
use sha2::{Digest, Sha256};
use tokio::net::{TcpListener, TcpSocket};

use crate::support::otlp::{Collector, attribute, hex};
use crate::support::{Client, Gateway, Simulated, chat, eventually, model_server, policy};

const SOON: Duration = Duration::from_secs(10);
/// R39: an outage is on the metrics page and in the log within so long.
const ALARM: Duration = Duration::from_secs(5);
const SECRET: &str = "whsec_c2VjcmV0IGJ5dGVz";

/// A receiver of webhooks.
struct Receiver {
    batches: Arc<Mutex<Vec<(HeaderMap, Bytes)>>>,
}

impl Receiver {
    fn at(place: TcpSocket) -> Self {
        let listener = place.listen(64).unwrap();
        let batches = Arc::new(Mutex::default());
        tokio::spawn(receive(listener, batches.clone()));
        Self { batches }
    }

    fn text(&self) -> String {
        self.batches.lock().iter().map(|(_, body)| String::from_utf8(body.to_vec()).unwrap()).collect()
    }

    /// What came of one run: the ids of its batches begin with its name.
    fn of_run(&self, run: &str) -> String {
        let batches = self.batches.lock();
        let own = |headers: &HeaderMap| headers["webhook-id"].to_str().unwrap().starts_with(run);
        let own = batches.iter().filter(|(headers, _)| own(headers));
        own.map(|(_, body)| String::from_utf8(body.to_vec()).unwrap()).collect()
    }

    fn lines(&self) -> usize {
        self.text().lines().count()
    }
}

async fn receive(listener: TcpListener, batches: Arc<Mutex<Vec<(HeaderMap, Bytes)>>>) {
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        let batches = batches.clone();
        let service = hyper::service::service_fn(move |request: Request<Incoming>| {
            let batches = batches.clone();
            async move {
                let (head, body) = request.into_parts();
                let body = body.collect().await.unwrap().to_bytes();
                batches.lock().push((head.headers, body));
                Ok::<_, Infallible>(Response::new(Full::<Bytes>::default()))
            }
        });
        tokio::spawn(hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service));
    }
}

/// A place where nobody listens yet: connections are refused, and nobody else can take it.
fn reserved() -> (TcpSocket, SocketAddr) {
    let place = TcpSocket::new_v4().unwrap();
    place.bind(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
    let address = place.local_addr().unwrap();
    (place, address)
}

/// A policy whose journal has these sinks, in YAML's flow style.
fn with_sinks(server: &Simulated, sinks: &str) -> String {
    format!("{}audit: {{commit_ms: 20, sinks: [{sinks}]}}\n", policy(&[&server.url()], ""))
}

fn webhook(address: SocketAddr) -> String {
    format!("{{name: hook, webhook: {{url: 'http://{address}/in?token=canary', secret: {{env: HOOK_SECRET}}}}}}")
}

/// Every line of the journal, run by run.
fn journal(directory: &Path) -> String {
    read::runs(directory).unwrap().iter().map(run_text).collect()
}

fn run_text(run: &read::Run) -> String {
    let (mut lines, mut all) = (run.lines(1), String::new());
    while let Some(line) = lines.next().unwrap() {
        all.push_str(std::str::from_utf8(line).unwrap());
        all.push('\n');
    }
    all
}

async fn ask(gateway: &Gateway, times: usize) -> Vec<String> {
    let mut ids = Vec::new();
    for _ in 0..times {
        let answer = Client::h1().post(gateway.address, "/v1/chat/completions", chat(false, 1)).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        ids.push(answer.header("x-request-id").to_owned());
    }
    ids
}

/// Waits until the journal has the records with these ids.
async fn recorded(directory: &Path, ids: &[String]) {
    let there = || async {
        let journal = journal(directory);
        ids.iter().all(|id| journal.contains(id.as_str()))
    };
    eventually("the records are on disk", SOON, there).await;
}

/// RFC 2104 and the words of Standard Webhooks, from SHA-256 up.
fn signed(headers: &HeaderMap, body: &[u8]) -> bool {
    let header = |name: &str| headers[name].to_str().unwrap();
    let secret = BASE64_STANDARD.decode(SECRET.strip_prefix("whsec_").unwrap()).unwrap();
    let keyed = |with: u8, parts: &[&[u8]]| {
        let key: Vec<u8> = (0..64).map(|at| secret.get(at).copied().unwrap_or(0) ^ with).collect();
        parts.iter().fold(Sha256::new_with_prefix(key), |hash, part| hash.chain_update(part)).finalize()
    };
    let inner =
        keyed(0x36, &[header("webhook-id").as_bytes(), b".", header("webhook-timestamp").as_bytes(), b".", body]);
    header("webhook-signature") == format!("v1,{}", BASE64_STANDARD.encode(keyed(0x5c, &[&inner])))
}

#[tokio::test]
async fn a_webhook_that_is_down_at_first_gets_everything_signed_and_in_order() {
    let (server, (place, address)) = (model_server().await, reserved());
    let text = with_sinks(&server, &webhook(address));
    let gateway = Gateway::spawn(&text, "threads: 2\n", &[], &[("HOOK_SECRET", SECRET)]);
    gateway.ready().await;
    let (healthy, lag) = ("infergate_sink_healthy{sink=\"hook\"}", "infergate_sink_lag_lines{sink=\"hook\"}");
    let told = || async {
        gateway.metric(healthy).await == 0.0 && gateway.log().contains("audit records cannot be delivered")
    };
    eventually("the outage is told", ALARM, told).await;
    let directory = gateway.directory.path().join("journal");
    recorded(&directory, &ask(&gateway, 30).await).await;
    eventually("the lag shows", SOON, || async { gateway.metric(lag).await >= 30.0 }).await;

    let receiver = Receiver::at(place);
    let expected = journal(&directory);
    eventually("all lines came", Duration::from_secs(40), || async { receiver.text() == expected }).await;
    eventually("it is well again", SOON, || async { gateway.metric(healthy).await == 1.0 }).await;
    for (headers, body) in receiver.batches.lock().iter() {
        assert!(signed(headers, body), "{headers:?}");
        assert_eq!(headers["content-type"], "application/x-ndjson");
    }
    assert!(!gateway.log().contains("canary") && !gateway.log().contains(SECRET));
}

#[tokio::test]
async fn what_a_killed_gateway_left_is_delivered_by_the_next_one() {
    let (server, (place, address), directory) = (model_server().await, reserved(), tempfile::tempdir().unwrap());
    let (text, path) = (with_sinks(&server, &webhook(address)), directory.path().to_str().unwrap());
    let start = || async {
        let gateway = Gateway::spawn(&text, "threads: 2\n", &["--journal", path], &[("HOOK_SECRET", SECRET)]);
        gateway.ready().await;
        gateway
    };
    let mut first = start().await;
    recorded(directory.path(), &ask(&first, 10).await).await;
    first.signal("KILL");
    first.ended(SOON).await;
    let receiver = Receiver::at(place);
    let second = start().await;
    recorded(directory.path(), &ask(&second, 10).await).await;
    // Between runs there is no order.
    let runs = read::runs(directory.path()).unwrap();
    assert_eq!(runs.len(), 2);
    for run in runs {
        let came = || async { receiver.of_run(&run.name) == run_text(&run) };
        eventually("all lines of the run came", Duration::from_secs(20), came).await;
    }
}

#[tokio::test]
async fn log_records_of_otlp_carry_the_line_and_belong_to_the_trace() {
    let (server, collector) = (model_server().await, Collector::start().await);
    let sink = format!("{{name: logs, otlp: {{url: '{}/v1/logs', service: gate}}}}", collector.url());
    let traces = format!("telemetry: {{traces: {{endpoint: '{}'}}}}\n", collector.url());
    let gateway = Gateway::start(&format!("{}{traces}", with_sinks(&server, &sink))).await;
    let trace = "0af7651916cd43dd8448eb211c80319c";
    let parent = format!("00-{trace}-b7ad6b7169203331-01");
    let headers = [("traceparent", parent.as_str())];
    let answer = Client::h1().post_with(gateway.address, "/v1/chat/completions", &headers, chat(false, 3)).await;
    let id = answer.header("x-request-id").to_owned();
    let uid = |log: &LogRecord| attribute(&log.attributes, "log.record.uid");
    eventually("the record came", SOON, || async { collector.logs().iter().any(|log| uid(log) == id) }).await;

    let log = collector.logs().into_iter().find(|log| uid(log) == id).unwrap();
    let body = format!("{:?}", log.body.unwrap().value.unwrap());
    assert!(body.contains(&id), "{body}");
    assert_eq!(
        (hex(&log.trace_id).as_str(), log.span_id.len(), log.event_name.as_str()),
        (trace, 8, "infergate.request")
    );
    let value = |name| attribute(&log.attributes, name);
    assert_eq!(value("infergate.outcome"), "ok");
    assert_eq!(value("http.response.status_code"), "200");
    assert_eq!(value("url.path"), "/v1/chat/completions");
    assert_eq!(value("gen_ai.request.model"), "m");
    assert_eq!(value("gen_ai.usage.output_tokens"), "3");
    assert_eq!(value("infergate.pool"), "p");
    let from = |resource: &Resource| attribute(&resource.attributes, "service.name") == "gate";
    assert!(collector.resources().iter().any(from));
}

#[tokio::test]
async fn a_sink_that_a_reload_brings_gets_the_whole_run_and_one_that_it_takes_gets_no_more() {
    let (server, (place, address)) = (model_server().await, reserved());
    let receiver = Receiver::at(place);
    let gateway = Gateway::start(&with_sinks(&server, "")).await;
    let directory = gateway.directory.path().join("journal");
    recorded(&directory, &ask(&gateway, 5).await).await;
    let sink = format!("{{name: hook, kinds: [request], webhook: {{url: 'http://{address}/'}}}}");
    assert_eq!(gateway.reload(&with_sinks(&server, &sink)).await.status, 200);
    eventually("the lines from before the reload came", SOON, || async { receiver.lines() == 5 }).await;
    ask(&gateway, 3).await;
    eventually("those behind it too", SOON, || async { receiver.lines() == 8 }).await;
    assert!(receiver.text().lines().all(|line| line.contains("\"kind\":\"request\"")));

    assert_eq!(gateway.reload(&with_sinks(&server, "")).await.status, 200);
    let gone = || async { !gateway.admin("/metrics").await.text().contains("sink=\"hook\"") };
    eventually("it is gone", SOON, gone).await;
    recorded(&directory, &ask(&gateway, 3).await).await;
    assert_eq!(receiver.lines(), 8);
}

#[tokio::test]
async fn a_file_and_the_standard_output_get_the_lines_as_they_are() {
    let server = model_server().await;
    let gateway =
        Gateway::start(&with_sinks(&server, "{name: out, stdout: {}}, {name: disk, file: {path: audit.log}}")).await;
    let directory = gateway.directory.path().join("journal");
    let ids = ask(&gateway, 5).await;
    recorded(&directory, &ids).await;
    let file = || std::fs::read_to_string(gateway.directory.path().join("audit.log")).unwrap_or_default();
    eventually("the file has all", SOON, || async { file() == journal(&directory) }).await;
    // The gateway's log goes to the same place in these tests.
    let printed = || async { journal(&directory).lines().all(|line| gateway.log().contains(line)) };
    eventually("the output has all", SOON, printed).await;
}

#[tokio::test]
async fn a_mistake_in_a_sink_is_told_at_its_place() {
    let server = model_server().await;
    let gateway = Gateway::start(&with_sinks(&server, "")).await;
    let told = |sinks: &'static str| async {
        let answer = gateway.reload(&with_sinks(&server, sinks)).await;
        assert_eq!(answer.status, 422, "{}", answer.text());
        answer.text()
    };
    assert!(told("{name: a}").await.contains("audit.sinks[0]: it goes nowhere"));
    assert!(
        told("{name: a, stdout: {}, file: {path: x}}").await.contains("audit.sinks[0].file: a sink is of one kind")
    );
    assert!(told("{name: a, stdout: {}}, {name: a, stdout: {}}").await.contains("audit.sinks[1].name: a is taken"));
    assert!(told("{name: a, webhook: {url: 'http://x', secret: {env: NONE}}}").await.contains("NONE is not set"));
    assert!(told("{name: a, webhok: {}}").await.contains("did you mean webhook?"));
}

#[tokio::test]
async fn a_webhook_hears_once_a_window_that_a_limit_is_nearly_used_up() {
    let (server, (place, address)) = (model_server().await, reserved());
    let receiver = Receiver::at(place);
    let sink = webhook(address).replace("name: hook", "name: hook, kinds: [act]");
    let limit = "limits: [{name: calls, requests: 10, per: total, warn_at: [50, 90]}]\n";
    let text = format!("{}{limit}", with_sinks(&server, &sink));
    let gateway = Gateway::spawn(&text, "threads: 2\n", &[], &[("HOOK_SECRET", SECRET)]);
    gateway.ready().await;
    let warnings = || -> Vec<(u64, String)> {
        let acts = receiver.text();
        let acts = acts.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
        let warnings = acts.filter(|act| act["act"] == "limit_warning" && act["limit"] == "calls");
        warnings.map(|act| (act["percent"].as_u64().unwrap(), act["of"].as_str().unwrap().to_owned())).collect()
    };
    ask(&gateway, 8).await;
    eventually("it hears of the half", SOON, || async { !warnings().is_empty() }).await;
    ask(&gateway, 2).await;
    eventually("it hears of the end", SOON, || async { warnings().len() == 2 }).await;
    assert_eq!(warnings(), [(50, "10 requests".to_owned()), (90, "10 requests".to_owned())], "{}", receiver.text());
}
