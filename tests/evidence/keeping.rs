//! Segments end, are compressed and go when the policy says so, and what is kept stays proved and can be read.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use serde_json::Value;

use super::{CHAT, SOON, id};
use crate::support::{Client, Gateway, Journal, Load, Process, Simulated, chat, eventually, model_server, policy};

const SEGMENT: u64 = 20_000;

async fn small(server: &Simulated, segment_bytes: u64, audit: &str) -> Gateway {
    let text =
        format!("{}audit: {{commit_ms: 5, segment_bytes: {segment_bytes}{audit}}}\n", policy(&[&server.url()], ""));
    Gateway::with(&text, "threads: 2\nshutdown: {drain_delay_ms: 0}\n", &[]).await
}

fn packed(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "zst")
}

async fn all_packed(journal: &Journal) {
    let plain = || journal.segments().iter().filter(|path| !packed(path)).count();
    eventually("finished segments are compressed", SOON, async || plain() <= 1).await;
}

fn grep(journal: &Journal, arguments: &[&str]) -> Vec<Value> {
    let (code, out, err) =
        Process::run(&[&["audit", "grep", journal.0.to_str().unwrap(), "--json"], arguments].concat());
    assert_eq!(code, Some(0), "{err}");
    out.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[tokio::test]
async fn a_record_is_found_in_plain_and_in_compressed_segments() {
    let server = model_server().await;
    let mut gateway = small(&server, SEGMENT, "").await;
    let client = Client::h1();
    let mut ids = Vec::new();
    let journal = Journal::of(&gateway);
    while ids.len() < 90 || journal.segments().len() < 4 {
        let answer = client.post(gateway.address, CHAT, chat(false, 2)).await;
        ids.push(id(&answer).to_owned());
    }
    Journal::settled(&gateway).await;
    all_packed(&journal).await;
    assert!(!packed(journal.segments().last().unwrap()), "the one that is being written");
    let admin = gateway.admin.to_string();
    for id in [&ids[0], &ids[45], &ids[89]] {
        let record = gateway.admin(&format!("/admin/v1/requests/{id}")).await;
        assert_eq!((record.status, record.json()), (200, journal.record(id)));
        assert_eq!(grep(&journal, &["--id", id]), [journal.record(id)]);
        for place in [["--admin", &admin], ["--directory", journal.0.to_str().unwrap()]] {
            let (code, out, err) = Process::run(&[&["explain", id], &place[..]].concat());
            assert!(code == Some(0) && out.contains(id.as_str()) && out.lines().count() <= 10, "{out}{err}");
        }
    }
    assert_eq!(grep(&journal, &["--outcome", "ok", "--model", "m"]).len(), ids.len());
    assert!(journal.verify().1["problems"].as_array().unwrap().is_empty(), "also while it is being written");
    gateway.signal("TERM");
    gateway.ended(SOON).await;
    journal.proved();
}

/// Looks at the journal's size all the time, and remembers the largest.
fn watch(journal: &Journal, stop: &Arc<AtomicBool>) -> (Arc<AtomicU64>, std::thread::JoinHandle<()>) {
    let (largest, journal, stop) = (Arc::new(AtomicU64::new(0)), journal.clone(), stop.clone());
    let told = largest.clone();
    let thread = std::thread::spawn(move || {
        while !stop.load(Relaxed) {
            largest.fetch_max(journal.size(), Relaxed);
            std::thread::sleep(Duration::from_millis(3));
        }
    });
    (told, thread)
}

#[tokio::test]
async fn the_oldest_segments_go_under_load_and_the_rest_stays_proved() {
    const KEPT: u64 = 60_000;
    const SEGMENT: u64 = 60_000;
    let server = model_server().await;
    for compress in [true, false] {
        let mut gateway = small(&server, SEGMENT, &format!(", keep_bytes: {KEPT}, compress: {compress}")).await;
        let (journal, stop) = (Journal::of(&gateway), Arc::new(AtomicBool::new(false)));
        let (largest, watching) = watch(&journal, &stop);
        let load = Load::start(gateway.address, 2);
        let retired = async || !journal.of_kind("retired").is_empty();
        eventually("segments go", Duration::from_secs(15), retired).await;
        tokio::time::sleep(Duration::from_millis(700)).await;
        let tally = load.stop().await;
        assert!(tally.lost.is_empty() && tally.whole > 100, "{tally:?}");
        let last = Client::h1().post(gateway.address, CHAT, chat(false, 1)).await;
        stop.store(true, Relaxed);
        watching.join().unwrap();
        // The segment that is written, and what comes while older ones are compressed and removed, which takes a few
        // flushes of a disk that others use too.
        let (largest, bound) = (largest.load(Relaxed), KEPT + 8 * SEGMENT);
        assert!(largest <= bound, "compress {compress}: {largest} bytes are more than {bound}");
        assert_eq!(Journal::settled(&gateway).await.record(id(&last))["status"], 200);
        eventually("it comes to rest", SOON, async || journal.size() <= KEPT + SEGMENT + 5_000).await;
        assert_eq!(gateway.log().matches("could not be put in order").count(), 0, "{}", gateway.log());
        gateway.signal("TERM");
        gateway.ended(SOON).await;
        let report = journal.proved();
        assert!(report["runs"][0]["retired"].as_u64().unwrap() > 0, "{report:#}");
        check_retired(&journal);
    }
}

/// Each removed segment is told once, in order, and before it was gone.
fn check_retired(journal: &Journal) {
    let told: Vec<u64> = journal.of_kind("retired").iter().map(|line| line["segment"].as_u64().unwrap()).collect();
    assert!(told.windows(2).all(|two| two[0] + 1 == two[1]), "{told:?}");
    let there: Vec<u64> = journal
        .segments()
        .iter()
        .map(|path| path.file_name().unwrap().to_str().unwrap().split('.').next().unwrap().parse().unwrap())
        .collect();
    assert!(there.first() > told.last(), "{told:?} are told, {there:?} are there");
}

#[tokio::test]
async fn runs_of_earlier_processes_are_compressed_and_removed_too() {
    let server = model_server().await;
    let directory = tempfile::tempdir().unwrap();
    let journal = Journal(directory.path().to_owned());
    let env = [("INFERGATE_JOURNAL", directory.path().to_str().unwrap())];
    let (mut log, mut first) = (String::new(), String::new());
    for (turn, signal) in ["TERM", "KILL", "TERM", "TERM"].into_iter().enumerate() {
        let text = format!(
            "{}audit: {{commit_ms: 5, segment_bytes: {SEGMENT}, keep_bytes: 12000}}\n",
            policy(&[&server.url()], "")
        );
        let mut gateway = Gateway::spawn(&text, "threads: 2\nshutdown: {drain_delay_ms: 0}\n", &[], &env);
        gateway.ready().await;
        let client = Client::h1();
        for _ in 0..if turn == 3 { 150 } else { 40 } {
            assert_eq!(client.post(gateway.address, CHAT, chat(false, 2)).await.status, 200);
        }
        gateway.comes_to("infergate_requests_in_flight", 0.0).await;
        tokio::time::sleep(Duration::from_millis(200)).await;
        gateway.signal(signal);
        gateway.ended(SOON).await;
        assert_eq!(gateway.log().matches("could not be put in order").count(), 0, "{}", gateway.log());
        log.push_str(&gateway.log());
        if turn == 0 {
            first = journal.runs()[0].file_name().unwrap().to_str().unwrap().to_owned();
        }
    }
    // The lines that tell of it may have been removed with their segment meanwhile.
    let told = log.lines().any(|line| line.contains("journal segment retired") && line.contains(&first));
    assert!(told, "{first}: {log}");
    assert!(journal.runs().len() < 4, "a run without segments is gone: {:?}", journal.runs());
    journal.proved();
}
