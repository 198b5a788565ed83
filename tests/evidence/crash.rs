//! The process is killed at any moment: what a client has seen answered is on record, once, as far as the policy
//! promises, and the journal is proved.

use std::collections::HashMap;
use std::fs::File;
use std::io::Write;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use http::Request;
use http_body_util::Full;
use tokio::task::JoinSet;

use super::{CHAT, SOON, id};
use crate::support::{Client, Gateway, Journal, Simulated, chat, http as client, model_server, policy};

/// An answer that a client has seen to its end.
struct Seen {
    id: String,
    at: Instant,
}

/// Asks for this and that until nobody answers any more.
async fn ask(client: Client, address: SocketAddr) -> Vec<Seen> {
    let mut seen = Vec::new();
    for turn in 0.. {
        let request = match turn % 6 {
            0 | 2 => client::post(address, CHAT, &[], chat(false, 4)),
            1 | 3 => client::post(address, CHAT, &[], chat(true, 12)),
            4 => client::post(address, CHAT, &[], chat(true, 12).replace("\"m\"", "\"other\"")),
            _ => Request::get(format!("http://{address}/v1/models")).body(Full::default()).unwrap(),
        };
        match client.try_send(request).await {
            Ok(answer) if answer.whole => seen.push(Seen { id: id(&answer).to_owned(), at: Instant::now() }),
            Ok(_) => {}
            Err(_) => return seen,
        }
    }
    seen
}

/// Starts a gateway, kills it at some moment, and returns what its clients had seen by then.
async fn life(text: &str, journal: &Path) -> (Instant, Vec<Seen>) {
    let env = [("INFERGATE_JOURNAL", journal.to_str().unwrap())];
    let mut gateway = Gateway::spawn(text, "threads: 1\n", &[], &env);
    let mut asking = JoinSet::new();
    if fastrand::u8(..8) == 0 {
        // Before it is ready, too.
        tokio::time::sleep(Duration::from_millis(fastrand::u64(..200))).await;
    } else {
        gateway.ready().await;
        for client in Client::both() {
            (0..2).for_each(|_| drop(asking.spawn(ask(client.clone(), gateway.address))));
        }
        tokio::time::sleep(Duration::from_millis(fastrand::u64(50..300))).await;
    }
    let killed = Instant::now();
    gateway.signal("KILL");
    gateway.ended(SOON).await;
    (killed, asking.join_all().await.into_iter().flatten().collect())
}

/// How often it is killed.
const RUNS: usize = 100;

/// Lives and deaths of gateways on one journal, two at a time.
async fn lives(text: &str, journal: &Path, count: usize) -> Vec<(Instant, Vec<Seen>)> {
    let lane = |count| async move {
        let mut lives = Vec::new();
        for _ in 0..count {
            lives.push(life(text, journal).await);
        }
        lives
    };
    let (mut one, other) = tokio::join!(lane(count / 2), lane(count - count / 2));
    one.extend(other);
    one
}

/// Starts a gateway once more, which seals what the others left behind, and stops it.
async fn sealed(text: &str, journal: &Path) {
    let env = [("INFERGATE_JOURNAL", journal.to_str().unwrap())];
    let mut gateway = Gateway::spawn(text, "threads: 1\nshutdown: {drain_delay_ms: 0}\n", &[], &env);
    gateway.ready().await;
    gateway.signal("TERM");
    assert_eq!(gateway.ended(Duration::from_secs(10)).await, Some(0));
}

fn with(server: &Simulated, audit: &str) -> String {
    format!("{}audit: {{{audit}}}\n", policy(&[&server.url()], "health: {enabled: false}"))
}

/// None twice, the journal is proved; returns how often each id is there.
fn checked(journal: &Journal, runs: usize) -> HashMap<String, usize> {
    let ids = journal.ids();
    let twice: Vec<_> = ids.iter().filter(|(_, count)| **count > 1).collect();
    assert!(twice.is_empty(), "{twice:?}");
    let report = journal.proved();
    let told = report["runs"].as_array().unwrap().len();
    // Some were killed before they had a journal.
    assert!(told > runs / 2 && told <= runs + 1, "{told} of {runs} runs");
    ids
}

#[tokio::test]
async fn what_was_answered_before_a_kill_is_on_record_exactly_once() {
    let server = model_server().await;
    let directory = tempfile::tempdir().unwrap();
    // Small segments, so that it is also killed while one ends, is compressed, or begins.
    let text = with(&server, "durable: before_response_end, segment_bytes: 30000");
    let lives = lives(&text, directory.path(), RUNS).await;
    sealed(&text, directory.path()).await;
    let ids = checked(&Journal(directory.path().to_owned()), RUNS);
    let seen: Vec<&Seen> = lives.iter().flat_map(|(_, seen)| seen).collect();
    let missing: Vec<_> = seen.iter().filter(|seen| !ids.contains_key(&seen.id)).map(|seen| &seen.id).collect();
    assert!(missing.is_empty(), "{} of {} answers have no record: {missing:?}", missing.len(), seen.len());
    assert!(seen.len() > RUNS * 10, "{}", seen.len());
    println!("{} answers seen, {} records", seen.len(), ids.len());
}

#[tokio::test]
async fn what_was_answered_a_commit_before_a_kill_is_on_record() {
    let server = model_server().await;
    let directory = tempfile::tempdir().unwrap();
    let text = with(&server, "durable: soon, commit_ms: 20");
    let slowest = Slowest::watch(directory.path());
    let lives = lives(&text, directory.path(), RUNS / 3).await;
    let slowest = slowest.stop();
    sealed(&text, directory.path()).await;
    let ids = checked(&Journal(directory.path().to_owned()), RUNS / 3);
    // The declared bound, and what the disk takes for the group before and for this one, on a loaded machine.
    let bound = Duration::from_millis(20 + 80) + 2 * slowest;
    let due = lives.iter().flat_map(|(killed, seen)| seen.iter().filter(|seen| seen.at + bound < *killed));
    let due: Vec<_> = due.map(|seen| &seen.id).collect();
    let missing: Vec<_> = due.iter().filter(|id| !ids.contains_key(**id)).collect();
    assert!(missing.is_empty(), "{} of {}: {missing:?}", missing.len(), due.len());
    println!("{} answers were due with a disk that took {slowest:?}", due.len());
}

/// How long this disk takes to flush, at worst.
struct Slowest(Arc<AtomicBool>, JoinHandle<Duration>);

impl Slowest {
    fn watch(directory: &Path) -> Self {
        let (stop, mut file) = (Arc::new(AtomicBool::new(false)), File::create(directory.join("probe")).unwrap());
        let stopped = stop.clone();
        let probe = move || {
            let mut slowest = Duration::ZERO;
            while !stopped.load(Relaxed) {
                let begun = Instant::now();
                file.write_all(&[b'x'; 4096]).unwrap();
                file.sync_data().unwrap();
                slowest = slowest.max(begun.elapsed());
                std::thread::sleep(Duration::from_millis(5));
            }
            slowest
        };
        Self(stop, std::thread::spawn(probe))
    }

    fn stop(self) -> Duration {
        self.0.store(true, Relaxed);
        self.1.join().unwrap()
    }
}
