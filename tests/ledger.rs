//! The ledger is the journal's sum, to the nano-dollar: whoever is killed, frozen or deleted meanwhile.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use infergate::ledger::{self, Ledger, Place, Scope, Spent};
use infergate::settings::Settings;
use infergate::telemetry::Telemetry;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::support::keys::{PEPPER, asks_for, key};
use crate::support::postgres::Postgres;
use crate::support::{
    Client, Gateway, Journal, Load, Options, Process, Simulated, chat, eventually, model_server, policy,
};
use crate::tls::Authority;

const CHAT: &str = "/v1/chat/completions";
const SOON: Duration = Duration::from_secs(15);
const PRICES: &str = "prices: {list: [{models: [m], input: 2.5, output: 10.000001}]}\n";
const NUMBERS: [&str; ledger::NUMBERS] = Spent::NAMES;

/// Sums by what a report is by.
type Sums = BTreeMap<Vec<String>, [u64; ledger::NUMBERS]>;

/// What records come to, added up in the plainest way.
fn added(records: &[Value], by: &[&str]) -> Sums {
    let mut sums = Sums::new();
    for record in records {
        let at = record["at"].as_str().unwrap();
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let key = by.iter().map(|by| match *by {
            "model" => text(&record["model"]["route"]),
            "day" => at[..10].to_owned(),
            "hour" => format!("{}:00", &at[..13]),
            by => text(&record[by]),
        });
        let tokens = |name: &str| record["usage"][name].as_u64().unwrap_or(0);
        let source = record["usage"]["source"].as_str().unwrap_or_default();
        let numbers = [
            1,
            u64::from(record["outcome"] == "ok"),
            tokens("input_tokens"),
            tokens("output_tokens"),
            tokens("cached_tokens"),
            tokens("reasoning_tokens"),
            record["cost"]["nanousd"].as_u64().unwrap_or(0),
            u64::from(record["unpriced"] == true),
            u64::from(source == "estimated" || source == "partial"),
            u64::from(record["attempts"] != json!([])),
        ];
        let sum = sums.entry(key.collect()).or_default();
        sum.iter_mut().zip(numbers).for_each(|(sum, number)| *sum += number);
    }
    sums
}

fn total(records: &[Value]) -> [u64; ledger::NUMBERS] {
    added(records, &[]).into_values().next().unwrap_or_default()
}

fn numbers(row: &Value) -> [u64; ledger::NUMBERS] {
    NUMBERS.map(|name| row[name].as_u64().unwrap_or_else(|| panic!("{name} in {row}")))
}

fn rows(report: &Value, by: &[&str]) -> Sums {
    let key = |row: &Value| by.iter().map(|by| row[by].as_str().unwrap().to_owned()).collect();
    report["rows"].as_array().unwrap().iter().map(|row| (key(row), numbers(row))).collect()
}

/// What `infergate usage` says of a ledger.
fn usage(ledger: &str, more: &[&str]) -> Value {
    let (code, out, err) = Process::run(&[&["usage", "--json", "--since", "1d", "--ledger", ledger], more].concat());
    assert_eq!(code, Some(0), "{err}");
    serde_json::from_str(&out).unwrap()
}

fn spent(ledger: &str) -> [u64; ledger::NUMBERS] {
    numbers(&usage(ledger, &[])["total"])
}

fn file(journal: &Path) -> String {
    journal.join("ledger.sqlite3").to_str().unwrap().to_owned()
}

fn with(server: &Simulated, audit: &str) -> String {
    format!("{}{PRICES}audit: {{{audit}}}\n", policy(&[&server.url()], "health: {enabled: false}"))
}

/// A gateway with its journal there.
fn gateway_on(journal: &Path, text: &str, settings: &str) -> Gateway {
    let env = [("INFERGATE_JOURNAL", journal.to_str().unwrap())];
    Gateway::spawn(text, &format!("threads: 1\nshutdown: {{drain_delay_ms: 0}}\n{settings}"), &[], &env)
}

/// Asks until nobody answers any more; the ids of whole answers, each with what it is said to cost.
async fn ask(client: Client, address: SocketAddr) -> Vec<(String, Option<String>)> {
    let mut seen = Vec::new();
    for turn in 0.. {
        let body = chat(turn % 3 == 1, 1 + turn % 7);
        match client.try_send(crate::support::http::post(address, CHAT, &[], body)).await {
            Ok(answer) if answer.whole => {
                let cost = Some(answer.header("x-infergate-cost-usd").to_owned()).filter(|cost| !cost.is_empty());
                seen.push((answer.header("x-request-id").to_owned(), cost));
            }
            Ok(_) => {}
            Err(_) => break,
        }
    }
    seen
}

/// The dollars in a header as nano-dollars.
fn nanousd(text: &str) -> u64 {
    let (whole, rest) = text.split_once('.').unwrap_or((text, ""));
    whole.parse::<u64>().unwrap() * 1_000_000_000 + format!("{rest:0<9}").parse::<u64>().unwrap()
}

/// What the next process would begin with: the ledger and what was not folded yet, since the beginning and since the
/// last minutes, each with its time.
fn restored(directory: &Path, settings: &str) -> Vec<(u64, [u64; ledger::NUMBERS])> {
    let telemetry = Telemetry::new();
    let journal = infergate::audit::journal::Journal::open(directory, None, Default::default(), telemetry.journal);
    let (journal, settings) = (journal.unwrap(), Settings::parse(settings).unwrap());
    let place = Place::of(&settings, Some(directory)).unwrap();
    let ledger = Ledger::start(place, &settings.ledger, &journal, telemetry.ledger).unwrap();
    ledger.catch_up(Instant::now() + SOON).unwrap();
    let minute = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() / 60 * 60;
    let spent = |since| (since, ledger.spent(&Scope::default(), since, None).unwrap().numbers());
    let restored = [0, minute - 120, minute - 60, minute].map(spent).to_vec();
    journal.close("tested");
    ledger.close(SOON);
    restored
}

#[tokio::test]
async fn a_gateway_killed_again_and_again_counts_every_answer_once() {
    let (server, directory) = (model_server().await, tempfile::tempdir().unwrap());
    let text = with(&server, "durable: before_response_end, segment_bytes: 30000");
    let mut seen = Vec::new();
    for _ in 0..12 {
        let mut gateway = gateway_on(directory.path(), &text, "ledger: {rows: all}\n");
        gateway.ready().await;
        let mut asking = JoinSet::new();
        for client in Client::both() {
            (0..2).for_each(|_| drop(asking.spawn(ask(client.clone(), gateway.address))));
        }
        // So that it is killed while it folds, and while it has only just begun.
        tokio::time::sleep(Duration::from_millis(fastrand::u64(20..700))).await;
        gateway.signal("KILL");
        gateway.ended(SOON).await;
        seen.extend(asking.join_all().await.into_iter().flatten());
    }
    let records = Journal(directory.path().to_owned()).of_kind("request");
    let restore = |settings: String| {
        let path = directory.path().to_owned();
        tokio::task::spawn_blocking(move || restored(&path, &settings))
    };
    let restored = restore("ledger: {rows: all}".to_owned()).await.unwrap();
    let expected = restored.iter().map(|(since, _)| {
        let since = infergate::ledger::report::time(*since);
        let later = records.iter().filter(|record| record["at"].as_str().unwrap() >= &since[..19]);
        total(&later.cloned().collect::<Vec<_>>())
    });
    assert_eq!(restored.iter().map(|(_, spent)| *spent).collect::<Vec<_>>(), expected.collect::<Vec<_>>());
    assert_eq!(spent(&file(directory.path())), total(&records));
    // Several that take over the same runs at once.
    let postgres = Postgres::start().await;
    let settings = format!("ledger: {{rows: all, url: '{}'}}", postgres.url());
    let all = [(); 4].map(|()| restore(settings.clone()));
    for restoring in all {
        restoring.await.unwrap();
    }
    assert_eq!(spent(&postgres.url()), total(&records));
    let costs: BTreeMap<&str, u64> = records
        .iter()
        .map(|record| (record["id"].as_str().unwrap(), record["cost"]["nanousd"].as_u64().unwrap_or(0)))
        .collect();
    for (id, cost) in &seen {
        let counted = costs.get(id.as_str()).unwrap_or_else(|| panic!("{id} has no record"));
        cost.iter().for_each(|cost| assert_eq!(nanousd(cost), *counted, "{id}"));
    }
    let opened = rusqlite::Connection::open(file(directory.path())).unwrap();
    let sums = "SELECT COUNT(*), SUM(cost_nanousd) FROM infergate_requests";
    let (count, cost): (i64, i64) = opened.query_row(sums, [], |row| Ok((row.get(0)?, row.get(1)?))).unwrap();
    let (count, cost) = (count.unsigned_abs(), cost.unsigned_abs());
    assert_eq!([count, cost], [total(&records)[0], total(&records)[6]], "the rows say the same");
    println!("{} answers seen, {} records, {} nano-dollars", seen.len(), records.len(), cost);
    assert!(seen.len() > 100, "{}", seen.len());
}

#[tokio::test]
async fn two_gateways_share_a_server_that_is_frozen_killed_and_started_again() {
    let (server, mut postgres) = (model_server().await, Postgres::start().await);
    let directories = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let (text, settings) =
        (with(&server, "commit_ms: 5"), format!("ledger: {{url: '{}', rows: all}}\n", postgres.url()));
    let mut gateways = directories.each_ref().map(|directory| gateway_on(directory.path(), &text, &settings));
    for gateway in &gateways {
        gateway.ready().await;
    }
    let loads = gateways.each_ref().map(|gateway| Load::start(gateway.address, 1));
    let well = async |is: f64| {
        for gateway in &gateways {
            let told = || async { gateway.metric("infergate_ledger_healthy").await == is };
            eventually("the ledger's health is told", Duration::from_secs(40), told).await;
        }
    };
    // Connections that end at any moment.
    let client = postgres.client().await;
    for _ in 0..10 {
        let others = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'infergate'";
        client.batch_execute(others).await.unwrap();
        tokio::time::sleep(Duration::from_millis(fastrand::u64(20..250))).await;
    }
    // Frozen until they give up: what was on its way arrives afterwards.
    postgres.signal("STOP");
    well(0.0).await;
    postgres.signal("CONT");
    well(1.0).await;
    for _ in 0..2 {
        postgres.kill();
        well(0.0).await;
        postgres.restart().await;
        well(1.0).await;
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    for load in loads {
        let tally = load.stop().await;
        assert!(tally.lost.is_empty() && tally.whole > 100, "a ledger is no client's business: {tally:?}");
    }
    for gateway in &mut gateways {
        gateway.signal("TERM");
        assert_eq!(gateway.ended(SOON).await, Some(0));
    }
    let records: Vec<Value> =
        directories.iter().flat_map(|directory| Journal(directory.path().to_owned()).of_kind("request")).collect();
    assert_eq!(spent(&postgres.url()), total(&records));
    let row = postgres.client().await.query_one("SELECT COUNT(*) FROM infergate_requests", &[]).await.unwrap();
    assert_eq!(row.get::<_, i64>(0), records.len() as i64);
    println!("{} records", records.len());
}

/// Fails at every point of a transaction, by chance, and at its end.
const CHANCE: &str = "
CREATE FUNCTION chance() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN IF random() < 0.25 THEN RAISE EXCEPTION 'by chance'; END IF; RETURN NULL; END $$;
CREATE TRIGGER chance AFTER UPDATE ON infergate_positions FOR EACH STATEMENT EXECUTE FUNCTION chance();
CREATE TRIGGER chance AFTER INSERT ON infergate_sums FOR EACH STATEMENT EXECUTE FUNCTION chance();
CREATE CONSTRAINT TRIGGER late AFTER UPDATE ON infergate_positions DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION chance();
";

#[tokio::test]
async fn a_gateway_starts_without_its_server_keeps_what_it_must_and_folds_all_of_it_later() {
    let (server, mut postgres, directory) = (model_server().await, Postgres::made(), tempfile::tempdir().unwrap());
    let text = with(&server, "commit_ms: 5, segment_bytes: 4096, keep_bytes: 1");
    let settings = format!("ledger: {{url: '{}'}}\n", postgres.url());
    let mut gateway = gateway_on(directory.path(), &text, &settings);
    gateway.ready().await;
    let asked = async |times: usize| {
        for _ in 0..times {
            let answer = Client::h1().post(gateway.address, CHAT, chat(false, 2)).await;
            assert_eq!(answer.status, 200, "{}", answer.text());
        }
    };
    asked(50).await;
    let told = || async { gateway.log().contains("the ledger cannot be written: the journal waits for it") };
    eventually("the outage is told", SOON, told).await;
    assert_eq!(gateway.metric("infergate_ledger_healthy").await, 0.0);
    let lags = || async { gateway.metric("infergate_ledger_lag_lines").await >= 50.0 };
    eventually("the lag shows", SOON, lags).await;
    let report = gateway.admin("/admin/v1/usage").await;
    assert_eq!(report.status, 503, "{}", report.text());
    let kept = || async { gateway.log().contains("kept beyond its time") };
    eventually("retention waits", SOON, kept).await;
    let records = Journal(directory.path().to_owned()).of_kind("request");
    assert_eq!(records.len(), 50);

    postgres.restart().await;
    let all = async |records: u64| {
        let folded = || async { gateway.admin("/admin/v1/usage").await.json()["total"]["requests"] == records };
        eventually("everything is folded", Duration::from_secs(40), folded).await;
    };
    all(50).await;
    postgres.client().await.batch_execute(CHANCE).await.unwrap();
    for _ in 0..20 {
        asked(5).await;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    all(150).await;
    let failures = gateway.metric("infergate_ledger_failures_total").await;
    assert!(failures >= 3.0, "{failures}: nothing failed");
    assert_eq!(gateway.metric("infergate_ledger_missed_lines_total").await, 0.0);
    assert_eq!(spent(&postgres.url())[6], 3 * total(&records)[6], "all of them cost the same");
    gateway.signal("TERM");
    assert_eq!(gateway.ended(SOON).await, Some(0));
}

#[tokio::test]
async fn a_ledger_that_somebody_deletes_or_damages_is_made_again_from_the_journal() {
    let (server, directory) = (model_server().await, tempfile::tempdir().unwrap());
    let (text, ledger) = (with(&server, "commit_ms: 5, segment_bytes: 4096"), file(directory.path()));
    let journal = Journal(directory.path().to_owned());
    let ask = async |gateway: &Gateway| {
        for _ in 0..20 {
            let answer = Client::h1().post(gateway.address, CHAT, chat(false, 3)).await;
            assert_eq!(answer.status, 200, "{}", answer.text());
        }
    };
    let folded = async |gateway: &Gateway, records: u64| {
        let folded = || async { gateway.admin("/admin/v1/usage").await.json()["total"]["requests"] == records };
        eventually("everything is folded", SOON, folded).await;
        assert_eq!(spent(&ledger), total(&journal.of_kind("request")));
    };
    let begun = async || {
        let gateway = gateway_on(directory.path(), &text, "");
        gateway.ready().await;
        ask(&gateway).await;
        gateway
    };
    let ends = async |mut gateway: Gateway| {
        gateway.signal("TERM");
        assert_eq!(gateway.ended(SOON).await, Some(0));
    };
    let first = begun().await;
    folded(&first, 20).await;
    std::fs::remove_file(&ledger).unwrap();
    ask(&first).await;
    folded(&first, 40).await;
    ends(first).await;

    // From its first page on it is nothing any more.
    for end in ["", "-wal", "-shm"] {
        let _ = std::fs::write(format!("{ledger}{end}"), "no database ".repeat(1_000));
    }
    let second = begun().await;
    let told = || async { second.log().contains("Move the file away") };
    eventually("it says what to do", SOON, told).await;
    assert_eq!(second.metric("infergate_ledger_healthy").await, 0.0);
    let report = second.admin("/admin/v1/usage").await;
    assert!(report.status == 503 && report.text().contains("ledger.sqlite3"), "{}", report.text());
    let (code, _, err) = Process::run(&["usage", "--ledger", &ledger]);
    assert!(code == Some(1) && err.contains("Move the file away"), "{err}");
    std::fs::rename(&ledger, directory.path().join("damaged")).unwrap();
    folded(&second, 60).await;
    // What dead runs had is taken from them again, too.
    std::fs::remove_file(&ledger).unwrap();
    ask(&second).await;
    folded(&second, 80).await;
    ends(second).await;
    journal.proved();
}

#[tokio::test]
async fn reports_are_what_the_records_come_to_whoever_asks_and_by_whatever() {
    let models = ["m", "other"].map(str::to_owned).to_vec();
    let server = Simulated::start(Options { models, ..Options::default() }).await.unwrap();
    let keys = [key("a", "name: ci"), key("a", ""), key("b", "name: app"), key("c", "")];
    let models = "models:\n  - {name: m, pool: p}\n  - {name: other, pool: p, aliases: [m2]}\n";
    let text = policy(&[&server.url()], "").replace("models:\n  - name: m\n    pool: p\n", models);
    let list: Vec<_> = keys.iter().collect();
    let text = format!(
        "{text}{PRICES}metering: {{usage: as_is}}\naudit: {{commit_ms: 5}}\n{}",
        asks_for(&list, "{a: {}, b: {}, c: {}}")
    );
    let directory = tempfile::tempdir().unwrap();
    let env = [("INFERGATE_JOURNAL", directory.path().to_str().unwrap()), ("INFERGATE_PEPPER", PEPPER)];
    let gateway = Gateway::spawn(&text, "threads: 2\n", &[], &env);
    gateway.ready().await;
    let client = Client::h1();
    for turn in 0..60_u32 {
        let key = keys.get(turn as usize % 5).map_or("none", |key| key.text.as_str());
        let body = chat(turn.is_multiple_of(2), 1 + turn % 5);
        let body = if turn.is_multiple_of(3) { body.replace("\"m\"", "\"other\"") } else { body };
        let body = if turn.is_multiple_of(11) { body.replace("\"m\"", "\"nothing\"") } else { body };
        client.post_with(gateway.address, CHAT, &[("x-api-key", key)], body).await;
    }
    gateway.comes_to("infergate_requests_in_flight", 0.0).await;
    // It answers when all that has been filed is on disk and in the ledger.
    let by = ["tenant", "model", "principal", "day", "hour"];
    let report = gateway.admin(&format!("/admin/v1/usage?by={}", by.join(","))).await.json();
    assert_eq!(report.get("behind"), None);
    let (code, out, err) =
        Process::run(&["audit", "grep", directory.path().to_str().unwrap(), "--kind", "request", "--json"]);
    assert_eq!(code, Some(0), "{err}");
    let records: Vec<Value> = out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(records.len(), 60);
    assert!(total(&records).iter().filter(|number| **number > 0).count() >= 7, "{:?}", total(&records));
    assert_eq!(rows(&report, &by), added(&records, &by));
    assert!(rows(&report, &by).len() >= 9, "{report:#}");

    let ledger = file(directory.path());
    for by in [vec!["tenant"], vec!["model", "tenant"], vec!["principal"], vec!["hour", "tenant"], vec!["day"]] {
        let report = usage(&ledger, &["--by", &by.join(",")]);
        assert_eq!(rows(&report, &by), added(&records, &by));
        assert_eq!(numbers(&report["total"]), total(&records));
    }
    let of_a: Vec<Value> = records.iter().filter(|record| record["tenant"] == "a").cloned().collect();
    assert_eq!(numbers(&usage(&ledger, &["--tenant", "a"])["total"]), total(&of_a));
    assert_eq!(spent_until(&ledger, "1h"), [0; ledger::NUMBERS], "what came later is not in it");

    let (mut paged, mut cursor) = (Sums::new(), String::new());
    loop {
        let path = format!("/admin/v1/usage?by=tenant,principal,model&limit=2&cursor={cursor}");
        let page = gateway.admin(&path).await.json();
        assert_eq!(numbers(&page["total"]), total(&records));
        paged.extend(rows(&page, &["tenant", "principal", "model"]));
        match page["cursor"].as_str() {
            Some(next) => cursor = next.to_owned(),
            None => break,
        }
    }
    assert_eq!(paged, added(&records, &["tenant", "principal", "model"]));
    let (_, csv, _) = Process::run(&["usage", "--ledger", &ledger, "--by", "tenant", "--csv"]);
    let expected = added(&records, &["tenant"])
        .into_iter()
        .map(|(key, sum)| format!("{},{},", key[0], sum.map(|number| number.to_string()).join(",")));
    let lines: Vec<&str> = csv.lines().skip(1).collect();
    assert!(expected.zip(&lines).all(|(expected, line)| line.starts_with(&expected)) && lines.len() == 4, "{csv}");
    assert_eq!(gateway.admin("/admin/v1/usage?by=team").await.status, 400);
}

fn spent_until(ledger: &str, until: &str) -> [u64; ledger::NUMBERS] {
    numbers(&usage(ledger, &["--until", until])["total"])
}

#[tokio::test]
async fn a_ledger_behind_tls_is_written_by_whoever_trusts_its_authority_and_by_nobody_else() {
    let (server, mut postgres) = (model_server().await, Postgres::made());
    let (ours, theirs) = (Authority::new("ours"), Authority::new("theirs"));
    let files = ours.issue("127.0.0.1");
    postgres.secure(&files.chain, &files.key);
    postgres.listens().await;
    for (authority, healthy) in [(&theirs, 0.0), (&ours, 1.0)] {
        let journal = tempfile::tempdir().unwrap();
        let settings =
            format!("ca_file: {}\nledger: {{url: '{}?sslmode=require'}}\n", authority.file().display(), postgres.url());
        let gateway = gateway_on(journal.path(), &with(&server, "commit_ms: 5"), &settings);
        gateway.ready().await;
        assert_eq!(Client::h1().post(gateway.address, CHAT, chat(false, 3)).await.status, 200);
        let told = || async {
            let report = gateway.admin("/admin/v1/usage").await;
            gateway.metric("infergate_ledger_healthy").await == healthy
                && if healthy > 0.0 { report.json()["total"]["requests"] == 1 } else { report.status == 503 }
        };
        eventually("it is written, or that it cannot be is told", Duration::from_secs(40), told).await;
    }
}
