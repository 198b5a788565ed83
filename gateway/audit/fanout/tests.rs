//! The promises of the fanout, with a journal made here and sinks that fail when they are told to.

use std::convert::Infallible;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::SocketAddr;

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use infergate_plugins::sink;
use parking_lot::Mutex;
use rustix::fs::{CWD, FileType, FlockOperation, Mode, flock, mknodat};
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
    /// Instead of 200: this status for a body that has one of these texts in it.
    refuses: Mutex<(u16, Vec<String>)>,
    /// Instead of 200: 413 for a body that has more lines.
    lines_max: Mutex<Option<usize>>,
    got: Mutex<Vec<String>>,
    asked: AtomicU64,
}

impl Hook {
    async fn start(status: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared { status: Mutex::new(status), ..Shared::default() });
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

    /// Answers `status` where one of these lines, given as `run/seq`, is in the body.
    fn refuses(&self, status: u16, ids: &[String]) {
        let texts = ids.iter().map(|id| format!("\"id\":\"{id}\"")).collect();
        *self.shared.refuses.lock() = (status, texts);
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
        let status = self.status_for(std::str::from_utf8(&body).unwrap());
        self.asked.fetch_add(1, Ordering::Relaxed);
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

    fn status_for(&self, body: &str) -> u16 {
        let (refused, texts) = &*self.refuses.lock();
        if self.lines_max.lock().is_some_and(|max| body.lines().count() > max) {
            413
        } else if texts.iter().any(|text| body.contains(text)) {
            *refused
        } else {
            *self.status.lock()
        }
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
async fn a_line_that_is_refused_for_good_is_passed_over_and_nothing_else_is() {
    let (made, hook) = (Made::new(), Hook::start(200).await);
    let poison: Vec<String> = [3, 17, 18, 60].map(|seq| format!("{OWN}/{seq}")).into();
    let mut fanout = made.fanout();
    for (sink, status) in [("s400", 400), ("s413", 413), ("s422", 422)] {
        hook.refuses(status, &poison);
        hook.shared.got.lock().clear();
        fanout.follow(&one(sink, &hook)).await;
        if sink == "s400" {
            made.commit(2..=60);
        }
        let expected: Vec<String> = ids(OWN, 1..=60).into_iter().filter(|id| !poison.contains(id)).collect();
        hook.gets(&expected).await;
        eventually(|| made.wanted(sink, OWN) == Some(61)).await;
        let meters = fanout.telemetry.sink(sink);
        assert_eq!((meters.refused.get(), meters.delivered.get(), meters.healthy.get()), (4, 56, 1));
    }
}

#[tokio::test]
async fn a_batch_that_is_too_large_leaves_in_smaller_ones() {
    let (made, hook) = (Made::new(), Hook::start(200).await);
    *hook.shared.lines_max.lock() = Some(3);
    let mut fanout = made.fanout();
    made.commit(2..=300);
    let batch = serde_json::json!({"batch": {"records": 300, "wait_ms": 10}});
    fanout.follow(&outlets(vec![entry("s", &hook, batch)].into())).await;
    hook.gets(&ids(OWN, 1..=300)).await;
    let meters = fanout.telemetry.sink("s");
    eventually(|| meters.delivered.get() == 300).await;
    assert_eq!((meters.refused.get(), meters.failures.get(), meters.healthy.get()), (0, 0, 1));
}

#[tokio::test]
async fn what_is_not_about_the_line_is_tried_again() {
    let (made, hook) = (Made::new(), Hook::start(200).await);
    let mut fanout = made.fanout();
    made.commit(2..=5);
    for status in [401, 403, 404, 429, 500] {
        hook.answers(status);
        let before = hook.shared.asked.load(Ordering::Relaxed);
        fanout.follow(&one(&format!("s{status}"), &hook)).await;
        eventually(|| hook.shared.asked.load(Ordering::Relaxed) >= before + 2).await;
        hook.answers(200);
        hook.gets(&ids(OWN, 1..=5)).await;
        hook.shared.got.lock().clear();
        assert_eq!(fanout.telemetry.sink(&format!("s{status}")).refused.get(), 0);
    }
}

#[tokio::test]
async fn a_sink_that_refuses_every_line_does_not_lose_them_all_at_once() {
    let (made, hook) = (Made::new(), Hook::start(400).await);
    let mut fanout = made.fanout();
    made.commit(2..=300);
    fanout.follow(&one("s", &hook)).await;
    let meters = fanout.telemetry.sink("s");
    eventually(|| meters.refused.get() >= 2).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(meters.refused.get() < 20, "{} lines are passed over", meters.refused.get());
    hook.answers(200);
    eventually(|| hook.got().len() as u64 + meters.refused.get() == 300).await;
}

#[tokio::test]
async fn a_sink_is_behind_by_what_dead_processes_left_too() {
    let (mut made, hook) = (Made::new(), Hook::start(503).await);
    let other = "20260101T120000Z-00000000";
    made.write(DEAD, 1..=30);
    made.live(other);
    made.write(other, 2..=3);
    let home = Home::new(made.directory.path(), "s");
    home.begin(DEAD).unwrap();
    home.position(DEAD).advance(11);
    made.commit(2..=5);
    let (mut fanout, outlets) = (made.fanout(), one("s", &hook));
    let meters = fanout.telemetry.sink("s");
    behind(&mut fanout, &outlets, 20 + 5).await;
    made.locks.pop();
    behind(&mut fanout, &outlets, 20 + 3 + 5).await;
    hook.answers(200);
    behind(&mut fanout, &outlets, 0).await;
    assert_eq!((hook.got().len(), meters.delivered.get()), (28, 28));
}

/// Waits until the lag on the metrics page is this.
async fn behind(fanout: &mut Fanout, outlets: &[Arc<Outlet>], lines: i64) {
    let start = std::time::Instant::now();
    while fanout.telemetry.sink("s").lag.get() != lines {
        assert!(start.elapsed() < Duration::from_secs(30), "{}", fanout.telemetry.sink("s").lag.get());
        tokio::time::sleep(Duration::from_millis(20)).await;
        fanout.follow(outlets).await;
    }
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

/// A pipe takes 64 KiB, then nothing until somebody reads.
#[tokio::test]
async fn a_write_that_is_stuck_is_told_every_time_and_made_once() {
    let made = Made::new();
    let path = made.directory.path().join("pipe");
    mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    let mut pipe = File::options().read(true).write(true).open(&path).unwrap();
    made.commit(2..=1000);
    let mut fanout = made.fanout();
    fanout
        .follow(&outlets(serde_json::json!([
            {"name": "f", "file": {"path": path}, "timeout_ms": 100, "batch": {"records": 1000, "wait_ms": 10}}
        ])))
        .await;
    let meters = fanout.telemetry.sink("f");
    let told = tokio::time::timeout(Duration::from_secs(20), async {
        while meters.failures.get() < 3 || meters.healthy.get() == 1 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    let told = told.await;
    // Read first: as long as it is stuck, no test can end.
    let expected = fs::read(made.path(OWN).join("000001.jsonl")).unwrap();
    let mut got = vec![0; expected.len()];
    let read = tokio::task::spawn_blocking(move || {
        pipe.read_exact(&mut got).unwrap();
        (pipe, got)
    });
    let (pipe, got) = read.await.unwrap();
    assert!(told.is_ok(), "{} failures are told", meters.failures.get());
    assert!(got == expected, "something else was written");
    eventually(|| meters.healthy.get() == 1 && meters.delivered.get() == 1000).await;
    assert_eq!(rustix::io::ioctl_fionread(&pipe).unwrap(), 0, "it was written twice");
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
