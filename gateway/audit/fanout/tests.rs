//! The promises of the fanout, with a journal made here and sinks that fail when they are told to.

use std::convert::Infallible;
use std::fs::{self, File};
use std::io::Write;
use std::net::SocketAddr;

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use infergate_plugins::sink;
use parking_lot::Mutex;
use rustix::fs::{FlockOperation, flock};
use tempfile::TempDir;
use tokio::net::TcpListener;

use super::*;

const OWN: &str = "20260102T000000Z-00000000";
const DEAD: &str = "20260101T000000Z-00000000";

/// A journal in a directory of its own, with a run that this process writes.
struct Made {
    directory: TempDir,
    committed: watch::Sender<u64>,
    locks: Vec<File>,
}

impl Made {
    fn new() -> Self {
        let mut made =
            Self { directory: tempfile::tempdir().unwrap(), committed: watch::Sender::new(0), locks: Vec::new() };
        made.live(OWN);
        made
    }

    /// Begins a run whose process is alive.
    fn live(&mut self, run: &str) {
        self.write(run, 1..=1);
        let lock = File::create(self.path(run).join("lock")).unwrap();
        flock(&lock, FlockOperation::LockExclusive).unwrap();
        self.locks.push(lock);
    }

    fn path(&self, run: &str) -> PathBuf {
        self.directory.path().join("runs").join(run)
    }

    /// Writes lines: the first one of a run opens it, every tenth is an act, the others are requests.
    fn write(&self, run: &str, seqs: std::ops::RangeInclusive<u64>) {
        fs::create_dir_all(self.path(run)).unwrap();
        let file = File::options().create(true).append(true).open(self.path(run).join("000001.jsonl"));
        let mut file = file.unwrap();
        for seq in seqs {
            let kind = if seq == 1 {
                "open"
            } else if seq % 10 == 0 {
                "act"
            } else {
                "request"
            };
            writeln!(file, r#"{{"v":1,"seq":{seq},"kind":"{kind}","at":"2026-01-02T00:00:00.000000Z","id":"{run}/{seq}","chain":"0"}}"#).unwrap();
        }
    }

    /// Writes lines of our own run and says that they are on disk.
    fn commit(&self, seqs: std::ops::RangeInclusive<u64>) {
        let last = *seqs.end();
        self.write(OWN, seqs);
        self.committed.send_replace(last);
    }

    fn source(&self) -> Source {
        let directory = self.directory.path().to_owned();
        Source { directory, run: OWN.to_owned(), committed: self.committed.subscribe() }
    }

    fn fanout(&self) -> Fanout {
        Fanout::new(self.source(), Arc::new(Egress::new(None).unwrap()), Arc::default())
    }

    fn wanted(&self, name: &str, run: &str) -> Option<u64> {
        wanted(self.directory.path(), run, &[name])
    }
}

/// A receiver of webhooks.
struct Hook {
    address: SocketAddr,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    /// The status that it answers with; 0: it never answers.
    status: Mutex<u16>,
    got: Mutex<Vec<String>>,
}

impl Hook {
    async fn start(status: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared { status: Mutex::new(status), got: Mutex::default() });
        let serving = shared.clone();
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let shared = serving.clone();
                let service = hyper::service::service_fn(move |request| shared.clone().answer(request));
                tokio::spawn(
                    hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service),
                );
            }
        });
        Self { address, shared }
    }

    fn answers(&self, status: u16) {
        *self.shared.status.lock() = status;
    }

    /// What was acknowledged, as `run/seq`.
    fn got(&self) -> Vec<String> {
        self.shared.got.lock().clone()
    }

    async fn gets(&self, expected: &[String]) {
        eventually(|| self.got().len() >= expected.len()).await;
        assert_eq!(self.got(), expected);
    }
}

impl Shared {
    async fn answer(self: Arc<Self>, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
        let body = request.into_body().collect().await.unwrap().to_bytes();
        let status = *self.status.lock();
        if status == 0 {
            std::future::pending::<()>().await;
        }
        if status == 200 {
            let id = |line: &str| {
                serde_json::from_str::<serde_json::Value>(line).unwrap()["id"].as_str().unwrap().to_owned()
            };
            self.got.lock().extend(std::str::from_utf8(&body).unwrap().lines().map(id));
        }
        let mut answer = Response::new(Full::default());
        *answer.status_mut() = StatusCode::from_u16(status).unwrap();
        Ok(answer)
    }
}

fn outlets(sinks: serde_json::Value) -> Vec<Arc<Outlet>> {
    let configs: Vec<sink::Config> = serde_json::from_value(sinks).unwrap();
    sink::build(&configs, &mut |_| Err("no secrets here".to_owned())).unwrap()
}

/// An entry of the policy: a webhook in small batches, with more members.
fn entry(name: &str, hook: &Hook, more: serde_json::Value) -> serde_json::Value {
    let mut entry = serde_json::json!({
        "name": name,
        "webhook": {"url": format!("http://{}/", hook.address)},
        "batch": {"records": 7, "wait_ms": 10},
    });
    entry.as_object_mut().unwrap().extend(more.as_object().cloned().unwrap_or_default());
    entry
}

fn one(name: &str, hook: &Hook) -> Vec<Arc<Outlet>> {
    outlets(serde_json::json!([entry(name, hook, serde_json::json!({}))]))
}

fn ids(run: &str, seqs: std::ops::RangeInclusive<u64>) -> Vec<String> {
    seqs.map(|seq| format!("{run}/{seq}")).collect()
}

async fn eventually(mut check: impl FnMut() -> bool) {
    let start = std::time::Instant::now();
    while !check() {
        assert!(start.elapsed() < Duration::from_secs(20), "not in time");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn every_line_on_disk_arrives_once_and_in_order() {
    let (made, hook) = (Made::new(), Hook::start(200).await);
    let mut fanout = made.fanout();
    fanout.follow(&one("s", &hook)).await;
    made.commit(2..=50);
    hook.gets(&ids(OWN, 1..=50)).await;
    made.write(OWN, 51..=60);
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(hook.got().len(), 50, "what is not on disk yet does not leave");
    made.committed.send_replace(60);
    hook.gets(&ids(OWN, 1..=60)).await;
    eventually(|| made.wanted("s", OWN) == Some(61)).await;
}

#[tokio::test]
async fn a_sink_that_fails_delays_no_other_and_loses_nothing() {
    let (made, good, bad, silent) = (Made::new(), Hook::start(200).await, Hook::start(503).await, Hook::start(0).await);
    let none = serde_json::json!({});
    let entries = [("good", &good), ("bad", &bad), ("silent", &silent)];
    let outlets = outlets(entries.map(|(name, hook)| entry(name, hook, none.clone())).to_vec().into());
    let mut fanout = made.fanout();
    fanout.follow(&outlets).await;
    made.commit(2..=100);
    good.gets(&ids(OWN, 1..=100)).await;
    let meters = fanout.telemetry.sink("bad");
    eventually(|| meters.healthy.get() == 0 && meters.failures.get() > 0).await;
    assert_eq!((fanout.telemetry.sink("good").healthy.get(), bad.got().len(), silent.got().len()), (1, 0, 0));
    fanout.follow(&outlets).await;
    assert_eq!(meters.lag.get(), 100);
    bad.answers(200);
    bad.gets(&ids(OWN, 1..=100)).await;
    eventually(|| meters.healthy.get() == 1 && meters.delivered.get() == 100).await;
    let silent = fanout.telemetry.sink("silent");
    eventually(|| silent.healthy.get() == 0).await;
}

#[tokio::test]
async fn a_position_survives_a_restart() {
    let (made, hook) = (Made::new(), Hook::start(200).await);
    let mut fanout = made.fanout();
    fanout.follow(&one("s", &hook)).await;
    made.commit(2..=20);
    hook.gets(&ids(OWN, 1..=20)).await;
    fanout.follow(&[]).await;
    assert_eq!(made.wanted("s", OWN), Some(21));
    made.commit(21..=40);
    let mut fanout = made.fanout();
    fanout.follow(&one("s", &hook)).await;
    hook.gets(&ids(OWN, 1..=40)).await;
}

#[tokio::test]
async fn what_a_dead_process_left_is_taken_over_and_what_a_live_one_writes_is_not() {
    let (mut made, hook) = (Made::new(), Hook::start(200).await);
    let other = "20260101T120000Z-00000000";
    made.write(DEAD, 1..=30);
    made.live(other);
    let home = Home::new(made.directory.path(), "s");
    home.begin(DEAD).unwrap();
    home.position(DEAD).advance(11);
    made.committed.send_replace(1);
    let mut fanout = made.fanout();
    fanout.follow(&one("s", &hook)).await;
    hook.gets(&[ids(DEAD, 11..=30), ids(OWN, 1..=1)].concat()).await;
    assert_eq!(made.wanted("s", DEAD), Some(31));
    made.write(other, 2..=3);
    made.locks.pop();
    hook.gets(&[ids(DEAD, 11..=30), ids(OWN, 1..=1), ids(other, 1..=3)].concat()).await;
}

#[tokio::test]
async fn a_new_sink_starts_with_this_process_or_with_the_beginning() {
    let (made, now, all) = (Made::new(), Hook::start(200).await, Hook::start(200).await);
    made.write(DEAD, 1..=5);
    made.committed.send_replace(1);
    let none = serde_json::json!({});
    let from = serde_json::json!({"from": "beginning"});
    let mut fanout = made.fanout();
    fanout.follow(&outlets(vec![entry("now", &now, none), entry("all", &all, from)].into())).await;
    all.gets(&[ids(DEAD, 1..=5), ids(OWN, 1..=1)].concat()).await;
    now.gets(&ids(OWN, 1..=1)).await;
    assert_eq!((made.wanted("now", DEAD), made.wanted("all", DEAD)), (None, Some(6)));
}

#[tokio::test]
async fn a_sink_gets_only_the_kinds_that_it_names_and_its_position_moves_on() {
    let (made, hook) = (Made::new(), Hook::start(200).await);
    let mut fanout = made.fanout();
    fanout.follow(&outlets(vec![entry("s", &hook, serde_json::json!({"kinds": ["act"]}))].into())).await;
    made.commit(2..=25);
    hook.gets(&[format!("{OWN}/10"), format!("{OWN}/20")]).await;
    eventually(|| made.wanted("s", OWN) == Some(26)).await;
}

#[tokio::test]
async fn the_sinks_that_run_are_those_of_the_policy() {
    let (made, old, new) = (Made::new(), Hook::start(200).await, Hook::start(200).await);
    let mut fanout = made.fanout();
    fanout.follow(&one("s", &old)).await;
    made.commit(2..=5);
    old.gets(&ids(OWN, 1..=5)).await;
    fanout.follow(&one("s", &new)).await;
    made.commit(6..=9);
    new.gets(&ids(OWN, 6..=9)).await;
    fanout.follow(&[]).await;
    made.commit(10..=12);
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!((old.got().len(), new.got().len()), (5, 4));
    assert!(!fanout.telemetry.text().contains("sink=\"s\""));
}

#[tokio::test]
async fn lines_go_to_a_file() {
    let made = Made::new();
    let path = made.directory.path().join("audit.log");
    let mut fanout = made.fanout();
    fanout.follow(&outlets(serde_json::json!([{"name": "f", "file": {"path": path}}]))).await;
    made.commit(2..=30);
    let lines = || fs::read_to_string(&path).unwrap_or_default();
    eventually(|| lines().lines().count() == 30).await;
    assert_eq!(lines(), fs::read_to_string(made.path(OWN).join("000001.jsonl")).unwrap());
}

#[tokio::test]
async fn the_end_of_the_process_waits_for_its_sinks() {
    let (made, hook) = (Made::new(), Hook::start(503).await);
    let mut fanout = made.fanout();
    fanout.follow(&one("s", &hook)).await;
    made.commit(2..=20);
    let settled = settled(made.directory.path(), OWN, &["s"], 20);
    let mut settled = std::pin::pin!(settled);
    assert!(tokio::time::timeout(Duration::from_millis(300), &mut settled).await.is_err());
    hook.answers(200);
    tokio::time::timeout(Duration::from_secs(20), settled).await.unwrap();
    assert_eq!(hook.got(), ids(OWN, 1..=20));
}

#[test]
fn what_any_sink_still_wants_is_kept() {
    let made = Made::new();
    for (name, next) in [("a", 5), ("b", 9)] {
        let home = Home::new(made.directory.path(), name);
        home.begin(OWN).unwrap();
        home.position(OWN).advance(next);
    }
    let wanted = |run, names: &[&str]| wanted(made.directory.path(), run, names);
    assert_eq!(wanted(OWN, &["a", "b"]), Some(5));
    assert_eq!(wanted(OWN, &["b"]), Some(9));
    assert_eq!((wanted(DEAD, &["a", "b"]), wanted(OWN, &[])), (None, None));
    assert_eq!(wanted(DEAD, &["a sink that has not begun"]), Some(1));
}
