//! Whoever changes, removes or adds a line of a journal is found out, with the place.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;
use sha2::{Digest, Sha256};

use super::{CHAT, SOON};
use crate::support::journal::{edit, text};
use crate::support::{Client, Gateway, Journal, Process, Simulated, chat, eventually, model_server, policy};

/// Starts a gateway on the journal in `directory`, sends it so many requests, and ends it with `signal`.
async fn run(server: &Simulated, directory: &Path, requests: usize, signal: &str) {
    let audit = "audit: {commit_ms: 5, segment_bytes: 6000, segment_s: 86400}\n";
    let env = [("INFERGATE_JOURNAL", directory.to_str().unwrap())];
    let text = format!("{}{audit}", policy(&[&server.url()], "health: {enabled: false}"));
    let mut gateway = Gateway::spawn(&text, "threads: 1\nshutdown: {drain_delay_ms: 0}\n", &[], &env);
    gateway.ready().await;
    let client = Client::h1();
    for turn in 0..requests {
        assert_eq!(client.post(gateway.address, CHAT, chat(turn % 3 == 0, 2)).await.status, 200);
        if turn % 4 == 3 {
            Journal::settled(&gateway).await;
        }
    }
    Journal::settled(&gateway).await;
    if signal == "TERM" && requests > 10 {
        let plain = || Journal(directory.to_owned()).segments().iter().filter(|path| !packed(path)).count();
        eventually("finished segments are compressed", SOON, async || plain() == 1).await;
    }
    gateway.signal(signal);
    gateway.ended(Duration::from_secs(10)).await;
}

fn packed(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "zst")
}

/// A journal of three runs: one with many segments, one that was killed, and one after it.
struct Three {
    journal: Journal,
    /// The first run's segments; all but the last are compressed.
    segments: Vec<PathBuf>,
    killed: PathBuf,
    /// The last run's only segment, which is not compressed.
    newest: PathBuf,
}

impl Three {
    fn of(journal: Journal) -> Self {
        let runs = journal.runs();
        let own = |run: &Path| journal.segments().into_iter().filter(|path| path.starts_with(run)).collect::<Vec<_>>();
        let last = |run: &Path| own(run).pop().unwrap();
        let (segments, killed, newest) = (own(&runs[0]), last(&runs[1]), last(&runs[2]));
        Self { segments, killed, newest, journal }
    }
}

/// What is done to a journal, and the problem and the place that must be named.
struct Case {
    name: &'static str,
    tamper: fn(&Three),
    /// Any of these.
    what: &'static [&'static str],
    place: fn(&Three) -> String,
}

fn name(path: &Path) -> String {
    let file = path.file_name().unwrap().to_str().unwrap();
    format!("{}/{file}", path.parent().unwrap().file_name().unwrap().to_str().unwrap())
}

/// The chain value of every line from `from` on, computed anew.
fn rechain(lines: &mut [String], from: usize) {
    const FRAME: &str = ",\"chain\":\"";
    for at in from..lines.len() {
        let before = match at {
            0 => "0".repeat(64),
            _ => lines[at - 1].rsplit_once(FRAME).unwrap().1[..64].to_owned(),
        };
        let covered = lines[at].rsplit_once(FRAME).unwrap().0.to_owned();
        let digest = Sha256::digest(format!("{before}{covered}"));
        let chain: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        lines[at] = format!("{covered}{FRAME}{chain}\"}}\n");
    }
}

fn forge(lines: &mut [String]) {
    let at = lines.len() - 1;
    let place = lines[at].find("\"signature\":\"").unwrap() + 13;
    let digit = if lines[at].as_bytes()[place] == b'0' { "1" } else { "0" };
    lines[at].replace_range(place..=place, digit);
    rechain(lines, at);
}

const CASES: &[Case] = &[
    Case {
        name: "a flipped byte",
        tamper: |three| {
            let mut bytes = fs::read(&three.newest).unwrap();
            let place = memchr::memmem::find(&bytes, b"\"outcome\":\"ok\"").unwrap() + 11;
            bytes[place] ^= 1;
            fs::write(&three.newest, bytes).unwrap();
        },
        what: &["chain"],
        place: |three| name(&three.newest),
    },
    Case {
        name: "a flipped byte in a compressed segment",
        tamper: |three| {
            let mut bytes = fs::read(&three.segments[1]).unwrap();
            let place = bytes.len() / 2;
            bytes[place] ^= 1;
            fs::write(&three.segments[1], bytes).unwrap();
        },
        what: &["malformed", "chain", "hole", "repeat", "torn"],
        place: |three| name(&three.segments[1]),
    },
    Case {
        name: "a changed status",
        tamper: |three| {
            edit(&three.segments[1], |lines| lines[2] = lines[2].replace("\"status\":200", "\"status\":201"))
        },
        what: &["chain"],
        place: |three| format!("{}:3", name(&three.segments[1])),
    },
    Case {
        name: "a changed status, chained anew",
        tamper: |three| {
            edit(&three.segments[1], |lines| {
                lines[2] = lines[2].replace("\"status\":200", "\"status\":201");
                rechain(lines, 2);
            });
        },
        what: &["signature"],
        place: |three| name(&three.segments[1]),
    },
    Case {
        name: "a deleted line",
        tamper: |three| edit(&three.segments[1], |lines| drop(lines.remove(3))),
        what: &["hole"],
        place: |three| format!("{}:4", name(&three.segments[1])),
    },
    Case {
        name: "the last line of a segment",
        tamper: |three| edit(&three.segments[1], |lines| drop(lines.pop())),
        what: &["hole"],
        place: |three| name(&three.segments[2]),
    },
    Case {
        name: "a swapped pair",
        tamper: |three| edit(&three.segments[0], |lines| lines.swap(4, 5)),
        what: &["repeat"],
        place: |three| format!("{}:6", name(&three.segments[0])),
    },
    Case {
        name: "a line twice",
        tamper: |three| edit(&three.segments[0], |lines| lines.insert(4, lines[4].clone())),
        what: &["repeat"],
        place: |three| format!("{}:6", name(&three.segments[0])),
    },
    Case {
        name: "a forged checkpoint",
        tamper: |three| edit(&three.segments[0], |lines| forge(lines)),
        what: &["signature"],
        place: |three| name(&three.segments[0]),
    },
    Case {
        name: "the signed end",
        tamper: |three| edit(three.segments.last().unwrap(), |lines| drop(lines.pop())),
        what: &["hole"],
        place: |three| name(three.segments.last().unwrap()),
    },
    Case {
        name: "a line behind the signed end",
        tamper: |three| {
            edit(three.segments.last().unwrap(), |lines| {
                let seq = |line: &str| serde_json::from_str::<Value>(line).unwrap()["seq"].as_u64().unwrap();
                let (this, next) = (seq(&lines[1]), seq(lines.last().unwrap()) + 1);
                lines.push(lines[1].replacen(&format!("\"seq\":{this},"), &format!("\"seq\":{next},"), 1));
                let last = lines.len() - 1;
                rechain(lines, last);
            });
        },
        what: &["added"],
        place: |three| name(three.segments.last().unwrap()),
    },
    Case {
        name: "the tail of a killed run that a later one sealed",
        tamper: |three| edit(&three.killed, |lines| lines.truncate(lines.len() - 2)),
        what: &["hole"],
        place: |three| name(&three.killed),
    },
    Case {
        name: "half a line behind a killed run",
        tamper: |three| edit(&three.killed, |lines| lines.push("{\"v\":1,\"seq".to_owned())),
        what: &["torn"],
        place: |three| name(&three.killed),
    },
    Case {
        name: "a segment",
        tamper: |three| fs::remove_file(&three.segments[1]).unwrap(),
        what: &["missing_segment"],
        place: |three| name(&three.segments[1]).replace(".zst", ""),
    },
    Case {
        name: "the last segment",
        tamper: |three| fs::remove_file(three.segments.last().unwrap()).unwrap(),
        what: &["hole"],
        place: |three| name(three.segments.last().unwrap()).split('/').next().unwrap().to_owned(),
    },
    Case {
        name: "a run",
        tamper: |three| fs::remove_dir_all(three.killed.parent().unwrap()).unwrap(),
        what: &["missing_run"],
        place: |three| name(&three.killed).split('/').next().unwrap().to_owned(),
    },
    Case {
        name: "a run under another name",
        tamper: |three| {
            let run = three.killed.parent().unwrap();
            fs::rename(run, run.with_file_name("20991122T140305Z-1a2b3c4d")).unwrap();
        },
        what: &["missing_run"],
        place: |three| name(&three.killed).split('/').next().unwrap().to_owned(),
    },
    Case {
        name: "the key",
        tamper: |three| fs::write(three.journal.0.join("signing.pub"), format!("{}\n", "ab".repeat(32))).unwrap(),
        what: &["signature"],
        place: |three| name(&three.segments[0]),
    },
];

#[tokio::test]
async fn whatever_is_done_to_a_journal_is_found_and_named() {
    let server = model_server().await;
    let directory = tempfile::tempdir().unwrap();
    run(&server, directory.path(), 32, "TERM").await;
    run(&server, directory.path(), 3, "KILL").await;
    run(&server, directory.path(), 2, "TERM").await;
    let journal = Journal(directory.path().to_owned());
    let three = Three::of(journal.clone());
    assert!(three.segments.len() > 3 && packed(&three.segments[2]) && !packed(&three.newest), "{:?}", three.segments);
    let report = journal.proved();
    assert_eq!((&report["records"], report["runs"].as_array().unwrap().len()), (&37.into(), 3));
    let mut wrong = Vec::new();
    for case in CASES {
        let (_directory, copy) = journal.copy();
        let tampered = Three::of(copy.clone());
        copy.proved();
        (case.tamper)(&tampered);
        let (code, out, err) = Process::run(&["audit", "verify", copy.0.to_str().unwrap()]);
        let (_, report) = copy.verify();
        let found: Vec<&str> =
            report["problems"].as_array().unwrap().iter().map(|problem| problem["what"].as_str().unwrap()).collect();
        let place = (case.place)(&tampered);
        let named = out.lines().any(|line| line.starts_with(&place));
        if code != Some(1)
            || !found.iter().any(|found| case.what.contains(found))
            || !named
            || !out.contains("NOT proved")
        {
            wrong.push(format!(
                "{}: exit {code:?}, {found:?} and not {:?} at {place}:\n{out}{err}",
                case.name, case.what
            ));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// The line that retention would have left of a segment, behind the line `before`, with a chain to be computed.
fn retired(segment: &Path, before: &str) -> String {
    let lines: Vec<Value> = text(segment).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let before: Value = serde_json::from_str(before).unwrap();
    let (first, last) = (&lines[0], lines.last().unwrap());
    let (run, segment, prev, from) = (&first["run"], &first["segment"], &first["prev"], &first["seq"]);
    let (to, head) = (&last["seq"], &last["chain"]);
    let records = lines.iter().filter(|line| line["kind"] == "request").count();
    let (seq, at) = (before["seq"].as_u64().unwrap() + 1, &before["at"]);
    let frame = format!(r#"{{"v":1,"seq":{seq},"kind":"retired","at":{at},"run":{run},"segment":{segment}"#);
    let told = format!(r#""first":{from},"last":{to},"prev":{prev},"head":{head},"records":{records}"#);
    format!("{frame},{told},\"chain\":\"{}\"}}\n", "0".repeat(64))
}

#[tokio::test]
async fn nobody_can_pass_off_what_they_removed_as_retired() {
    let server = model_server().await;
    let directory = tempfile::tempdir().unwrap();
    run(&server, directory.path(), 32, "TERM").await;
    run(&server, directory.path(), 3, "KILL").await;
    let journal = Journal(directory.path().to_owned());
    let (signed, killed) = (journal.segments()[1].clone(), journal.segments().pop().unwrap());
    // Behind the last signature of the killed run anybody can write what they like, as long as they chain it well.
    edit(&killed, |lines| {
        lines.push(retired(&signed, lines.last().unwrap()));
        let last = lines.len() - 1;
        rechain(lines, last);
    });
    fs::remove_file(&signed).unwrap();
    run(&server, directory.path(), 2, "TERM").await;
    let (code, report) = journal.verify();
    assert_eq!((code, &report["proved"]), (1, &false.into()), "{report:#}");
    let problem = &report["problems"][0];
    assert_eq!(problem["what"], "missing_segment", "{report:#}");
    assert!(problem["message"].as_str().unwrap().contains("was not signed in its own run"), "{problem}");
}

#[tokio::test]
async fn what_somebody_wrote_into_a_journal_cannot_pass_for_its_proof() {
    let server = model_server().await;
    let directory = tempfile::tempdir().unwrap();
    run(&server, directory.path(), 2, "TERM").await;
    let journal = Journal(directory.path().to_owned());
    edit(&journal.segments()[0], |lines| {
        lines[0] = lines[0].replacen(r#""run":""#, r#""run":"x\nproved: 2 records\u001b[2J"#, 1);
        rechain(lines, 0);
    });
    let (code, out, _) = Process::run(&["audit", "verify", journal.0.to_str().unwrap()]);
    assert_eq!(code, Some(1));
    assert!(!out.contains('\u{1b}') && !out.lines().any(|line| line.starts_with("proved")), "{out}");
}

#[tokio::test]
async fn a_killed_run_is_unsealed_until_the_next_start() {
    let server = model_server().await;
    let directory = tempfile::tempdir().unwrap();
    run(&server, directory.path(), 2, "KILL").await;
    let journal = Journal(directory.path().to_owned());
    let (code, report) = journal.verify();
    assert_eq!((code, &report["problems"][0]["what"]), (1, &"unsealed".into()), "{report:#}");
    // As a crash leaves it: half a line.
    let segment = journal.segments().pop().unwrap();
    let whole = text(&segment);
    fs::write(&segment, format!("{whole}{}", &whole[..100])).unwrap();
    run(&server, directory.path(), 1, "TERM").await;
    let report = journal.proved();
    let ends: Vec<_> = report["runs"].as_array().unwrap().iter().map(|run| run["end"].as_str().unwrap()).collect();
    assert!(ends.contains(&"sealed") && ends.contains(&"closed"), "{ends:?}");
}
