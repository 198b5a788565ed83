//! Limits that replicas share: together they keep to them, whatever becomes of the store or of one of them. Every
//! replica is a process, the store a real `redis-server`.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use infergate::house::House;
use infergate::limits::effort::Work;
use infergate::limits::shared::{self, Parameters};
use infergate::limits::{Costs, Counted, Limit, Outcome, Reservation, Used, millis};
use infergate::money::Cached;
use infergate::policy::{World, compile, reload};
use infergate::settings::Settings;
use infergate::usage::Usage;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use crate::limits::deaf_server;
use crate::support::redis::Redis;
use crate::support::{Answer, Client, Gateway, Journal, chat, eventually, faulty_server, model_server, policy};
use crate::tls::Authority;

const CHAT: &str = "/v1/chat/completions";
const UP: &str = "infergate_store_up{store=\"redis\"}";
/// A token of an answer costs ten micro-dollars, one of a prompt nothing: what a request costs at most is known.
const PRICES: &str = "prices: {list: [{models: ['*'], input: 0, output: 10}]}\n";
/// The store is given all the time that a busy machine needs.
const PATIENT: &str = "timeout_ms: 5000, on_store_error: deny";

fn limited(url: &str, redis: &str, how: &str, limits: &str) -> String {
    let shared = format!("shared: {{redis: {{url: '{redis}'}}, replicas: 3, {how}}}\n");
    format!("{}{shared}{PRICES}limits:\n{limits}\n", policy(&[url], ""))
}

/// So many replicas, each in talk with the store.
async fn replicas(count: usize, text: &str) -> Vec<Gateway> {
    let gateways: Vec<Gateway> = (0..count).map(|_| Gateway::spawn(text, "threads: 1\n", &[], &[])).collect();
    for gateway in &gateways {
        gateway.ready().await;
        is_up(gateway, 1.0).await;
    }
    gateways
}

async fn is_up(gateway: &Gateway, up: f64) {
    let limit = Duration::from_secs(10);
    eventually("the store is as it should be", limit, || async { gateway.metric(UP).await == up }).await;
}

/// Waits until the store knows all that `gateway` has used.
async fn has_told(gateway: &Gateway) {
    let calls = || gateway.metric("infergate_store_duration_seconds_count{store=\"redis\"}");
    gateway.comes_to("infergate_limit_reserved", 0.0).await;
    let before = calls().await;
    let told = || async { calls().await >= before + 2.0 };
    eventually("the store knows what it has used", Duration::from_secs(5), told).await;
}

async fn ask(gateway: &Gateway) -> Answer {
    Client::h1().post(gateway.address, CHAT, chat(false, 2)).await
}

/// Asks `count` times, all at once, the replicas in turn; returns how many were answered. The others were refused by
/// the limit.
async fn admitted(gateways: &[Gateway], count: usize) -> usize {
    let mut running = JoinSet::new();
    for index in 0..count {
        let address = gateways[index % gateways.len()].address;
        running.spawn(async move { Client::h1().post(address, CHAT, chat(false, 2)).await });
    }
    let answers = running.join_all().await;
    let told = answers.iter().find(|answer| ![200, 429].contains(&answer.status));
    assert!(told.is_none(), "{}", told.unwrap().text());
    answers.iter().filter(|answer| answer.status == 200).count()
}

/// How many runs: enough to notice, or, with `INFERGATE_LONG=1`, enough to be sure.
fn seeds() -> u64 {
    if std::env::var_os("INFERGATE_LONG").is_some() { 100 } else { 10 }
}

#[tokio::test]
async fn two_hundred_callers_over_three_replicas_never_spend_more_than_the_budget_and_all_of_it() {
    let (server, redis) = (model_server().await, Redis::start().await);
    // Two tokens of an answer are twenty micro-dollars.
    let text = |seed: u64, mode: &str, most: u64| {
        let budget =
            format!("  - {{name: b{seed}{mode}, usd: {:.5}, per: month, on_short: refuse}}", most as f64 * 0.00002);
        limited(&server.url(), &redis.url(), &format!("mode: {mode}, {PATIENT}"), &budget)
    };
    let gateways = replicas(3, &text(0, "exact", 1)).await;
    for seed in 1..=seeds() {
        for mode in ["exact", "lease"] {
            let most = fastrand::Rng::with_seed(seed).u64(1..100);
            for gateway in &gateways {
                assert_eq!(gateway.reload(&text(seed, mode, most)).await.status, 200);
            }
            let answered = admitted(&gateways, 200).await as u64;
            assert!(answered <= most, "seed {seed}, {mode}: {answered} of {most}");
            // Slices that one replica has and does not spend may leave some for later.
            if mode == "exact" {
                assert_eq!(answered, most, "seed {seed}: refused with money left");
            }
        }
    }
}

/// The thresholds of a limit that were told, by all replicas together: in their metrics, and in their journals.
async fn warned(gateways: &[Gateway]) -> (f64, Vec<u64>) {
    let (mut counted, mut told) = (0.0, Vec::new());
    for gateway in gateways {
        counted += gateway.metric("infergate_limit_warnings_total{limit=\"b\"}").await;
        let acts = Journal::of(gateway).of_kind("act").into_iter().filter(|act| act["act"] == "limit_warning");
        told.extend(acts.map(|act| act["percent"].as_u64().unwrap()));
    }
    told.sort_unstable();
    (counted, told)
}

#[tokio::test]
async fn of_all_replicas_one_tells_that_a_threshold_was_passed() {
    let server = model_server().await;
    for mode in ["exact", "lease"] {
        let mut redis = Redis::start().await;
        let limit = "  - {name: b, requests: 100, per: month, warn_at: [20, 50]}";
        let how = format!("mode: {mode}, timeout_ms: 5000, on_store_error: local_share");
        let gateways = replicas(3, &limited(&server.url(), &redis.url(), &how, limit)).await;
        assert_eq!(admitted(&gateways, 12).await, 12);
        for gateway in &gateways {
            has_told(gateway).await;
        }
        // Slices that are out count as used.
        if mode == "exact" {
            assert_eq!(warned(&gateways).await, (0.0, vec![]), "not yet");
        }
        for _ in 0..16 {
            assert_eq!(admitted(&gateways, 3).await, 3);
            for gateway in &gateways {
                has_told(gateway).await;
            }
        }
        let told = || async { warned(&gateways).await.1 == [20, 50] };
        eventually("both are told", Duration::from_secs(20), told).await;
        assert_eq!(warned(&gateways).await.0, 2.0, "{mode}: once each, though all have seen it");
        // A store that comes back and has forgotten everything makes nobody say it twice.
        redis.kill();
        is_up(&gateways[0], 0.0).await;
        redis.restart().await;
        for gateway in &gateways {
            is_up(gateway, 1.0).await;
            has_told(gateway).await;
        }
        assert_eq!(warned(&gateways).await, (2.0, vec![20, 50]), "{mode}");
    }
}

/// One request that was answered: when it was sent and when its answer was here, in milliseconds since 1970, and the
/// tokens that it used.
type Seen = (u64, u64, u64);

async fn hammer(gateways: &[Gateway], time: Duration) -> Vec<Seen> {
    let mut running = JoinSet::new();
    let until = Instant::now() + time;
    for caller in 0..12 {
        let address = gateways[caller % gateways.len()].address;
        running.spawn(async move {
            let (client, mut seen) = (Client::h1(), Vec::new());
            while Instant::now() < until {
                let sent = millis(SystemTime::now());
                let answer = client.post(address, CHAT, chat(false, 2)).await;
                assert!([200, 429].contains(&answer.status), "{}", answer.text());
                if answer.status == 200 {
                    let tokens = answer.json()["usage"]["total_tokens"].as_u64().unwrap();
                    seen.push((sent, millis(SystemTime::now()), tokens));
                }
            }
            seen
        });
    }
    running.join_all().await.concat()
}

#[tokio::test]
async fn no_aligned_window_has_more_than_the_limit_over_all_replicas() {
    let (server, redis) = (model_server().await, Redis::start().await);
    const WINDOW: u64 = 2000;
    for mode in ["exact", "lease"] {
        for (limit, most, counts_tokens) in [("requests: 60", 60, false), ("tokens: 900", 900, true)] {
            let how = format!("namespace: '{mode}{most}', mode: {mode}, {PATIENT}");
            let text =
                limited(&server.url(), &redis.url(), &how, &format!("  - {{{limit}, per: 2s, on_short: refuse}}"));
            let gateways = replicas(3, &text).await;
            let seen = hammer(&gateways, Duration::from_secs(5)).await;
            let mut windows = std::collections::BTreeMap::<u64, u64>::new();
            // Those that were surely admitted in one window: sent and answered in it.
            for (sent, here, tokens) in seen.iter().filter(|(sent, here, _)| sent / WINDOW == here / WINDOW) {
                assert!(here >= sent);
                *windows.entry(sent / WINDOW).or_default() += if counts_tokens { *tokens } else { 1 };
            }
            assert!(windows.values().all(|used| *used <= most), "{mode} {limit}: {windows:?}");
            let all: u64 = windows.values().sum();
            assert!(all > most, "{mode} {limit}: hardly anything was let through: {windows:?}");
        }
    }
}

#[tokio::test]
async fn the_places_of_a_replica_that_is_killed_are_free_again() {
    let (server, redis) = (faulty_server(&["slow-first=60000"]).await, Redis::start().await);
    let text = limited(&server.url(), &redis.url(), PATIENT, "  - {concurrency: 6}");
    let gateways = replicas(2, &text).await;
    let mut running = JoinSet::new();
    let mut hold = |index: usize| {
        let address = gateways[index].address;
        let task =
            async move { Client::h1().try_send(crate::support::http::post(address, CHAT, &[], chat(false, 2))).await };
        running.spawn(task);
    };
    (0..4).for_each(|_| hold(0));
    gateways[0].comes_to("infergate_limit_reserved", 4.0).await;
    (0..2).for_each(|_| hold(1));
    gateways[1].comes_to("infergate_limit_reserved", 2.0).await;
    assert_eq!(ask(&gateways[1]).await.status, 429, "all six places are taken");
    gateways[0].signal("KILL");
    let tried = || async {
        let request = crate::support::http::post(gateways[1].address, CHAT, &[], chat(false, 2));
        // Whoever gets a place waits for its answer.
        tokio::time::timeout(Duration::from_millis(500), Client::h1().try_send(request)).await.is_err()
    };
    let took = eventually("the places of the dead come back", Duration::from_secs(10), tried).await;
    assert!(took > Duration::from_secs(3), "a replica that is silent for {took:?} may still live");
}

#[tokio::test]
async fn a_replica_that_was_frozen_spends_nothing_that_others_were_given_meanwhile() {
    let (server, redis) = (model_server().await, Redis::start().await);
    let how = format!("mode: lease, {PATIENT}");
    let limit = "  - {name: l, requests: 300, per: 1h}";
    let gateways = replicas(2, &limited(&server.url(), &redis.url(), &how, limit)).await;
    let mut all = 0;
    while gateways[0].metric("infergate_limit_lease_held{limit=\"l\"}").await < 10.0 {
        all += admitted(&gateways[..1], 1).await;
        assert!(all < 300, "nothing is ever leased");
    }
    has_told(&gateways[0]).await;
    gateways[0].signal("STOP");
    let limit = Duration::from_secs(30);
    let began = Instant::now();
    while all < 300 {
        all += admitted(&gateways[1..], 10).await;
        assert!(all <= 300 && began.elapsed() < limit, "{all} of 300 after {:?}", began.elapsed());
    }
    // Requests that are there when it wakes, before it has heard of the store.
    let body = chat(false, 2);
    let request = format!(
        "POST {CHAT} HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    let mut waiting = Vec::new();
    for _ in 0..60 {
        let mut stream = TcpStream::connect(gateways[0].address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        waiting.push(stream);
    }
    gateways[0].signal("CONT");
    for mut stream in waiting {
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert!(["HTTP/1.1 429", "HTTP/1.1 503"].iter().any(|status| answer.starts_with(status)), "{answer}");
    }
}

#[tokio::test]
async fn a_store_that_is_frozen_costs_a_moment_and_is_back_when_it_thaws() {
    let (server, redis) = (model_server().await, Redis::start().await);
    let how = "timeout_ms: 40, on_store_error: local_share";
    let text = limited(&server.url(), &redis.url(), how, "  - {requests: 1000000, per: 1h}");
    let gateways = replicas(1, &text).await;
    let slowest = |count: usize| {
        let gateway = &gateways[0];
        async move {
            let (client, mut took) = (Client::h1(), Vec::new());
            for _ in 0..count {
                let began = Instant::now();
                assert_eq!(client.post(gateway.address, CHAT, chat(false, 2)).await.status, 200);
                took.push(began.elapsed());
            }
            took.sort_unstable();
            (took[count / 2], took[count * 99 / 100])
        }
    };
    let (usual, before) = slowest(300).await;
    redis.signal("STOP");
    let frozen = Instant::now();
    let (usually, during) = slowest(300).await;
    assert!(usually < usual + Duration::from_millis(20), "{usually:?} for most, {usual:?} before: they all wait");
    assert!(during < before + Duration::from_millis(50), "{during:?} of 300 requests, {before:?} before");
    is_up(&gateways[0], 0.0).await;
    assert!(frozen.elapsed() < Duration::from_secs(5), "the log and the metric come soon");
    let degraded = gateways[0].metric("infergate_limit_degraded_total{how=\"local_share\"}").await;
    assert!(degraded > 100.0, "{degraded} requests were decided without it");
    assert!(gateways[0].log().contains("the store of shared limits does not answer"));
    redis.signal("CONT");
    let limit = Duration::from_secs(2);
    eventually("it is back", limit, || async { gateways[0].metric(UP).await == 1.0 }).await;
    let reserved = || async { gateways[0].metric("infergate_limit_reserved").await == 0.0 };
    eventually("nothing is held that nobody has", Duration::from_secs(5), reserved).await;
}

#[tokio::test]
async fn the_policy_says_what_holds_while_the_store_is_gone() {
    let server = model_server().await;
    for (how, admits, refused) in [("local_share", 2, 429), ("allow", 10, 0), ("deny", 0, 503)] {
        let mut redis = Redis::start().await;
        let how_long = format!("timeout_ms: 1000, on_store_error: {how}");
        let text = limited(&server.url(), &redis.url(), &how_long, "  - {requests: 6, per: 1h}");
        let gateways = replicas(1, &text).await;
        redis.kill();
        is_up(&gateways[0], 0.0).await;
        let mut answers = Vec::new();
        for _ in 0..10 {
            answers.push(ask(&gateways[0]).await);
        }
        let statuses: Vec<u16> = answers.iter().map(|answer| answer.status).collect();
        assert_eq!(statuses.iter().filter(|status| **status == 200).count(), admits, "{how}: {statuses:?}");
        assert!(statuses.iter().all(|status| [200, refused].contains(status)), "{how}: {statuses:?}");
        let ready = gateways[0].admin("/readyz").await.status == 200;
        assert_eq!(ready, how != "deny");
        assert_eq!(gateways[0].admin("/livez").await.status, 200);
        let served = format!("infergate_limit_degraded_total{{how=\"{how}\"}}");
        assert_eq!(gateways[0].metric(&served).await, 10.0);
        if how == "deny" {
            assert_eq!((answers[0].code().as_str(), answers[0].header("retry-after")), ("limits_unavailable", "1"));
        }
        redis.restart().await;
        is_up(&gateways[0], 1.0).await;
        // What was used without the store counts.
        assert_eq!(admitted(&gateways, 10).await, 6_usize.saturating_sub(admits), "{how}");
    }
}

#[tokio::test]
async fn a_store_that_forgets_everything_is_told_again() {
    let (server, mut redis) = (model_server().await, Redis::start().await);
    let text = limited(&server.url(), &redis.url(), PATIENT, "  - {requests: 30, per: 1h}\n  - {concurrency: 50}");
    let gateways = replicas(3, &text).await;
    assert_eq!(admitted(&gateways, 9).await, 9);
    for gateway in &gateways {
        has_told(gateway).await;
    }
    redis.kill();
    for gateway in &gateways {
        is_up(gateway, 0.0).await;
    }
    redis.restart().await;
    for gateway in &gateways {
        is_up(gateway, 1.0).await;
    }
    // The first that asks is told what the others have used, who have not asked for anything since.
    assert_eq!(admitted(&gateways[..1], 40).await, 21);
}

#[tokio::test]
async fn a_gateway_starts_without_its_store_and_finds_it_later() {
    let (server, mut redis) = (model_server().await, Redis::start().await);
    redis.kill();
    let text = limited(&server.url(), &redis.url(), "timeout_ms: 1000", "  - {requests: 6, per: 1h}");
    let gateway = Gateway::start(&text).await;
    assert_eq!(ask(&gateway).await.status, 200);
    redis.restart().await;
    is_up(&gateway, 1.0).await;
    assert_eq!(ask(&gateway).await.header("x-ratelimit-remaining-requests"), "4");
    let told = gateway.admin("/admin/v1/limits").await.json();
    assert_eq!(told["shared"], json!({"namespace": "infergate", "answers": true}));
}

#[tokio::test]
async fn each_user_is_counted_over_all_replicas_and_what_is_left_is_told() {
    let (server, redis) = (model_server().await, Redis::start().await);
    let text = limited(&server.url(), &redis.url(), PATIENT, "  - {each: [user], requests: 2, per: 1h}");
    let gateways = replicas(2, &text).await;
    let of = |user: &str| chat(false, 2).replace("\"stream\"", &format!("\"user\":\"{user}\",\"stream\""));
    let mut told = Vec::new();
    for (replica, user) in [(0, "a"), (1, "a"), (0, "a"), (1, "b"), (1, "a b"), (0, "b")] {
        let answer = Client::h1().post(gateways[replica].address, CHAT, of(user)).await;
        told.push((answer.status, answer.header("x-ratelimit-remaining-requests").to_owned()));
    }
    let expected = [(200, "1"), (200, "0"), (429, "0"), (200, "1"), (200, "1"), (200, "0")];
    assert_eq!(told, expected.map(|(status, left)| (status, left.to_owned())));
    let record = Journal::settled(&gateways[0]).await.of_kind("request").remove(0);
    assert_eq!(record["limits"][0]["used"], 1);
}

#[tokio::test]
async fn a_stream_goes_on_while_the_store_has_room_for_it_and_ends_where_all_replicas_together_are_at_the_limit() {
    let (wire, redis) = (deaf_server(200).await, Redis::start().await);
    for mode in ["exact", "lease"] {
        for most in [1000, 300] {
            let how = format!("namespace: '{mode}{most}', mode: {mode}, {PATIENT}");
            let text = limited(&wire.url(), &redis.url(), &how, &format!("  - {{output_tokens: {most}, per: 1h}}"));
            let gateways = replicas(2, &text).await;
            let mut tokens = 0;
            for gateway in &gateways {
                // The server streams 200 tokens, whatever is asked for.
                let answer = Client::h1().post(gateway.address, CHAT, chat(true, 30)).await;
                assert_eq!((answer.status, answer.whole), (200, true));
                tokens += answer.text().matches("\"content\":\"t").count();
            }
            // Three events of a stream may have no token.
            let expected = if most == 1000 { 400..=400 } else { 230..=306 };
            assert!(expected.contains(&tokens), "{mode}: {tokens} tokens of {most}");
        }
    }
}

/// A store that is called as a replica calls it.
struct Caller {
    connection: redis::aio::MultiplexedConnection,
    script: String,
}

impl Caller {
    async fn new(redis: &Redis) -> Self {
        let client = redis::Client::open(redis.url()).unwrap();
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/gateway/limits/shared/script.lua");
        let script = std::fs::read_to_string(script).unwrap();
        Self { connection: client.get_multiplexed_async_connection().await.unwrap(), script }
    }

    /// `me` tells of one level, and asks for `wanted` of it; the reply without its time. `told` says what is not usual.
    async fn call(&mut self, me: &str, number: u64, told: Value, wanted: u64) -> Vec<i64> {
        let mut level = json!({
            "from": 0, "to": 1_u64 << 53, "used": 0, "held": 0, "slice": 0, "used_before": 0, "held_before": 0,
            "max": 100, "rolls": false, "parts": 0, "expire_ms": 0, "warned": 0,
        });
        level.as_object_mut().unwrap().extend(told.as_object().unwrap().clone());
        let call = json!({
            "me": me, "number": number, "dead_ms": 100, "forget_ms": 200, "levels": [level], "requests": [[1, wanted]],
        });
        let mut eval = redis::cmd("EVAL");
        eval.arg(&self.script).arg(2).arg("{n}:alive").arg("{n}:level").arg(call.to_string());
        let mut reply: Vec<i64> = eval.query_async(&mut self.connection).await.unwrap();
        reply.drain(1..reply.len().min(2));
        reply
    }
}

#[tokio::test]
async fn a_call_that_comes_late_changes_nothing() {
    let redis = Redis::start().await;
    let mut caller = Caller::new(&redis).await;
    let stand = |taken: i64| [0, 1 << 53, taken, taken, 0, 0, 0, 0, 0, 1, taken, 0];
    let reply = caller.call("a", 7, json!({"used": 50}), 5).await;
    assert_eq!(reply, [&[0][..], &stand(55)].concat());
    assert_eq!(caller.call("a", 6, json!({"used": 10}), 5).await, [-1]);
    let reply = caller.call("a", 8, json!({"used": 60}), 5).await;
    assert_eq!(reply, [&[1][..], &stand(65)].concat());
}

#[tokio::test]
async fn whoever_tells_of_a_threshold_first_is_told_so_again_and_nobody_else_is() {
    let redis = Redis::start().await;
    let mut caller = Caller::new(&redis).await;
    for (number, (me, warned, answer)) in (1..).zip([
        ("a", 0, [0, 0]),
        ("a", 50, [50, 1]),
        ("b", 50, [50, 0]),
        ("a", 50, [50, 1]),
        ("b", 80, [80, 1]),
        ("a", 50, [80, 0]),
    ]) {
        let reply = caller.call(me, number, json!({"used": 60, "warned": warned}), 0).await;
        assert_eq!(reply[8..10], answer, "call {number}");
    }
}

#[tokio::test]
async fn the_span_before_counts_by_the_share_of_it_that_a_rolling_window_still_covers() {
    let redis = Redis::start().await;
    let mut caller = Caller::new(&redis).await;
    let from = millis(SystemTime::now());
    // An hour that begins now: nearly all of the hour before still counts.
    let told = |rolls: bool| json!({"from": from, "to": from + 3_600_000, "used_before": 60, "rolls": rolls});
    let granted = |reply: Vec<i64>| reply[10];
    assert_eq!(granted(caller.call("a", 1, told(true), 45).await), 0);
    assert_eq!(granted(caller.call("a", 2, told(true), 35).await), 1);
    assert_eq!(granted(caller.call("a", 3, told(false), 45).await), 1);
}

#[tokio::test]
async fn what_those_have_used_that_are_long_gone_still_counts() {
    let redis = Redis::start().await;
    let mut caller = Caller::new(&redis).await;
    caller.call("a", 1, json!({"used": 30, "held": 10}), 1).await;
    let mut connection = caller.connection.clone();
    for number in 1.. {
        let taken = caller.call("b", number, json!({"used": 5}), 0).await[3];
        let fields: Vec<String> = redis::cmd("HKEYS").arg("{n}:level").query_async(&mut connection).await.unwrap();
        assert!(taken == 46 || taken == 35, "{taken}: what it used counts, and what it held while it may live");
        if fields.contains(&"h:gone".to_owned()) {
            assert!(taken == 35 && !fields.contains(&"h:a".to_owned()), "{taken} {fields:?}");
            assert_eq!(caller.call("b", number + 1, json!({"used": 5}), 0).await[3], 35);
            return;
        }
        assert!(number < 10_000, "a is remembered for ever: {fields:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_store_that_was_away_itself_takes_nobody_for_dead_whom_it_could_not_hear() {
    let redis = Redis::start().await;
    let mut caller = Caller::new(&redis).await;
    caller.call("a", 1, json!({"held": 10}), 0).await;
    let lives = Instant::now();
    // Nobody is heard for longer than anybody may be silent.
    tokio::time::sleep(Duration::from_millis(150)).await;
    let woke = Instant::now();
    let mut taken = caller.call("b", 1, json!({}), 0).await[3];
    assert_eq!(taken, 10, "after {:?}", lives.elapsed());
    for number in 2.. {
        if taken == 0 {
            return assert!(woke.elapsed() >= Duration::from_millis(100), "{:?}", woke.elapsed());
        }
        assert!(number < 10_000, "a is taken for alive for ever");
        tokio::time::sleep(Duration::from_millis(5)).await;
        taken = caller.call("b", number, json!({}), 0).await[3];
    }
}

#[tokio::test]
async fn the_password_of_the_store_is_seen_nowhere() {
    let server = model_server().await;
    let redis = Redis::with_password("canary-of-the-store").await;
    let text = limited(&server.url(), "REDIS", "timeout_ms: 1000", "  - {requests: 6, per: 1h}")
        .replace("{url: 'REDIS'}", "{env: STORE}");
    let url = |password: &str| redis.url().replace("redis://", &format!("redis://:{password}@"));
    for (password, up) in [("canary-of-the-store", 1.0), ("canary-of-the-other", 0.0)] {
        let env = [("STORE", url(password)), ("INFERGATE_LOG", "debug".to_owned())];
        let env: Vec<(&str, &str)> = env.iter().map(|(name, value)| (*name, value.as_str())).collect();
        let gateway = Gateway::spawn(&text, "threads: 1\n", &[], &env);
        gateway.ready().await;
        is_up(&gateway, up).await;
        let said = || async { up == 1.0 || gateway.log().contains("does not answer") };
        eventually("it is logged", Duration::from_secs(5), said).await;
        assert_eq!(ask(&gateway).await.status, 200);
        let mut seen = gateway.log();
        for path in ["/metrics", "/admin/v1/limits", "/admin/v1/policy"] {
            seen += &gateway.admin(path).await.text();
        }
        assert!(!seen.contains("canary"), "{seen}");
    }
}

/// A gateway's limits without a gateway around them.
struct Replica {
    house: Arc<House>,
    parameters: Arc<Parameters>,
    limit: Arc<Limit>,
    talk: tokio::task::JoinHandle<()>,
}

impl Replica {
    async fn start(text: &str) -> Self {
        let house = Arc::new(House::new(Settings::default()));
        let env = |_: &str| None;
        let world = World::new(&env, &house.state, &house.telemetry, &house.settings);
        let compiled = compile(text, &world).unwrap();
        reload::swap(&house, compiled, infergate::audit::journal::By::itself("process"));
        let policy = house.policy.get();
        let (parameters, limit) = (policy.shared.clone().unwrap(), policy.limits[0].clone());
        let talk = tokio::spawn(shared::run(house.clone()));
        let replica = Self { house, parameters, limit, talk };
        let answers = || async { replica.house.state.limits.shared.answers() };
        eventually("the store answers", Duration::from_secs(10), answers).await;
        replica
    }

    /// Reserves `amount` tokens; `None`: too little is left.
    async fn reserve(&self, amount: u64) -> Option<Box<Reservation>> {
        self.reserve_for(None, amount).await
    }

    /// The same of a user's own.
    async fn reserve_for(&self, user: Option<&str>, amount: u64) -> Option<Box<Reservation>> {
        let cost = Costs { prices: &[], cached: Cached::Within, besides: Usage::default(), work: Work::default() };
        let counted = Counted {
            tenant: None,
            key: None,
            plans: &[],
            model: "m",
            surface: CHAT,
            user,
            input: amount,
            output: 0,
            cost,
            before: Used::default(),
            held: None,
            now: 0,
        };
        let limits = std::iter::once(&self.limit);
        let levels = &self.house.state.limits;
        match shared::reserve(levels, &self.parameters, &self.house.telemetry, limits, &counted).await? {
            Outcome::Reserved(reservation) => Some(reservation),
            Outcome::Short(_) => None,
            Outcome::Unpriced(_) | Outcome::Unavailable => panic!("the store is there"),
        }
    }

    fn leased(&self) -> u64 {
        self.house.state.limits.leased()
    }

    /// Returns when the store knows all that was given back here: a call that begins after that one is answered.
    async fn has_told(&self) {
        self.house.state.limits.shared.settle(Duration::from_secs(10)).await;
        assert!(self.reserve_for(Some("nobody"), 1).await.is_some());
    }
}

impl Drop for Replica {
    fn drop(&mut self) {
        self.talk.abort();
    }
}

#[tokio::test]
async fn leases_never_pass_the_limit_and_all_of_it_can_be_had() {
    let redis = Redis::start().await;
    for seed in 0..seeds() {
        let mut random = fastrand::Rng::with_seed(seed);
        let max = random.u64(1..2000);
        let how = format!("namespace: n{seed}, mode: lease, {PATIENT}");
        let limit = format!("  - {{input_tokens: {max}, per: total, on_short: refuse}}");
        let text = limited("http://127.0.0.1:1", &redis.url(), &how, &limit);
        let replicas = [Replica::start(&text).await, Replica::start(&text).await, Replica::start(&text).await];
        let (mut held, mut used, mut slices) = (Vec::<(u64, Box<Reservation>)>::new(), 0, 0);
        for _ in 0..400 {
            if random.u8(0..3) > 0 {
                let amount = random.u64(1..=max.div_ceil(10));
                let replica = &replicas[random.usize(0..3)];
                held.extend(replica.reserve(amount).await.map(|got| (amount, got)));
            } else if !held.is_empty() {
                let (amount, mut over) = held.swap_remove(random.usize(0..held.len()));
                let input = if random.u8(0..10) == 0 { random.u64(0..=amount) } else { 0 };
                over.settle(&Used { asked: true, input, ..Used::default() }, 0);
                used += input;
            }
            if random.u8(0..20) == 0 {
                tokio::time::sleep(Duration::from_millis(random.u64(0..60))).await;
            }
            let taken = used + held.iter().map(|(amount, _)| amount).sum::<u64>();
            let out: u64 = replicas.iter().map(Replica::leased).sum();
            assert!(taken + out <= max, "seed {seed}: {taken} taken and {out} leased of {max}");
            slices = slices.max(out);
        }
        held.clear();
        assert!(max < 100 || slices > 0, "seed {seed}: nothing was ever leased");
        // Slices that nobody spends of go back.
        let all = || async { used == max || replicas[0].reserve(max - used).await.is_some() };
        eventually("all that is left can be had", Duration::from_secs(10), all).await;
        assert!(replicas[1].reserve(max - used + 1).await.is_none(), "seed {seed}");
    }
}

#[tokio::test]
async fn what_is_leased_is_measured() {
    let (server, redis) = (model_server().await, Redis::start().await);
    let text = limited(
        &server.url(),
        &redis.url(),
        &format!("mode: lease, {PATIENT}"),
        "  - {name: l, requests: 600, per: 1h}",
    );
    let gateways = replicas(1, &text).await;
    let held = || gateways[0].metric("infergate_limit_lease_held{limit=\"l\"}");
    let spends = || async {
        assert_eq!(ask(&gateways[0]).await.status, 200);
        held().await > 0.0
    };
    eventually("a slice is held", Duration::from_secs(10), spends).await;
    assert!(held().await <= 100.0, "a sixth of the limit, for three replicas");
    eventually("it goes back", Duration::from_secs(10), || async { held().await == 0.0 }).await;
}

#[tokio::test]
async fn nothing_is_said_of_a_store_where_there_is_none() {
    let server = model_server().await;
    let gateway = Gateway::start(&policy(&[&server.url()], "")).await;
    let page = gateway.admin("/metrics").await.text();
    assert!(!page.lines().any(|line| line.starts_with("infergate_store_up{")), "{page}");
    let told: Value = gateway.admin("/admin/v1/limits").await.json();
    assert_eq!(told.get("shared"), None);
}

#[tokio::test]
async fn a_store_behind_tls_is_used_by_whoever_trusts_its_authority_and_by_nobody_else() {
    let (server, ours, theirs) = (model_server().await, Authority::new("ours"), Authority::new("theirs"));
    let files = ours.issue("127.0.0.1");
    let redis = Redis::with_tls(&files.chain, &files.key).await;
    let how = "timeout_ms: 5000, on_store_error: deny";
    let text = limited(&server.url(), &redis.url(), how, "  - {requests: 2, per: 1h}");
    for (authority, up) in [(&theirs, 0.0), (&ours, 1.0)] {
        let trusted = authority.file();
        let env = [("SSL_CERT_FILE", trusted.to_str().unwrap())];
        let gateway = Gateway::spawn(&text, "threads: 1\n", &[], &env);
        let listens = || async { Client::h1().try_get(gateway.admin, "/readyz").await.is_some() };
        eventually("it listens", Duration::from_secs(20), listens).await;
        if up > 0.0 {
            gateway.ready().await;
            assert_eq!(
                [ask(&gateway).await.status, ask(&gateway).await.status, ask(&gateway).await.status],
                [200, 200, 429]
            );
        } else {
            let said = || async { gateway.log().contains("does not answer") };
            eventually("it is logged", Duration::from_secs(20), said).await;
            assert_eq!(ask(&gateway).await.status, 503);
        }
    }
}

/// R4, in rounds: a budget is half spent, then held above that by many at once, up to 95 per cent of it.
#[tokio::test]
async fn nobody_is_refused_while_what_is_spent_and_reserved_has_room() {
    const MOST: usize = 400;
    let (server, redis) = (model_server().await, Redis::start().await);
    // Two tokens of an answer are twenty micro-dollars, whatever becomes of them.
    let text = |round: u64| {
        let budget = format!("  - {{name: b{round}, usd: {:.5}, per: month, on_short: refuse}}", MOST as f64 * 0.00002);
        limited(&server.url(), &redis.url(), &format!("mode: exact, {PATIENT}"), &budget)
    };
    let gateways = replicas(3, &text(0)).await;
    // Half an hour where somebody has it.
    let long = std::env::var_os("INFERGATE_LONG").is_some();
    let until = Instant::now() + Duration::from_secs(if long { 1_800 } else { 0 });
    let mut rounds = 0;
    while rounds < 2 || Instant::now() < until {
        rounds += 1;
        for gateway in &gateways {
            assert_eq!(gateway.reload(&text(rounds)).await.status, 200);
        }
        let mut spent = admitted(&gateways, MOST / 2).await;
        assert_eq!(spent, MOST / 2, "round {rounds}");
        while spent + 20 <= MOST * 95 / 100 {
            assert_eq!(admitted(&gateways, 20).await, 20, "round {rounds}: refused at {spent} of {MOST}");
            spent += 20;
        }
        let rest = admitted(&gateways, MOST).await;
        assert_eq!(spent + rest, MOST, "round {rounds}: all of it can be had, and no more");
    }
}

/// R4, by the thousand: three replicas hold one user's budget after the other between nothing and 95 per cent, in pieces
/// of up to two per cent of which some is spent and the rest given back. Nobody is refused for whom there is room. Where
/// slices are out, what is in them counts as taken.
#[tokio::test]
async fn with_a_store_too_nobody_is_refused_for_whom_there_is_room_however_long_it_goes_on() {
    const MOST: u64 = 10_000;
    let redis = Redis::start().await;
    for mode in ["exact", "lease"] {
        let how = format!("namespace: {mode}, mode: {mode}, {PATIENT}");
        let limit = format!("  - {{each: [user], input_tokens: {MOST}, per: total, on_short: refuse}}");
        let text = limited("http://127.0.0.1:1", &redis.url(), &how, &limit);
        let replicas = [Replica::start(&text).await, Replica::start(&text).await, Replica::start(&text).await];
        let (mut random, mut asked, mut early) = (fastrand::Rng::with_seed(4), 0, 0);
        for user in 0..seeds() {
            let user = format!("u{user}");
            let (mut spent, mut open) = (0, Vec::<(u64, Box<Reservation>)>::new());
            while spent < MOST * 93 / 100 {
                let amount = random.u64(1..=MOST / 50);
                let taken = spent + open.iter().map(|(amount, _)| amount).sum::<u64>();
                if taken + amount <= MOST * 95 / 100 {
                    let leased = || replicas.iter().map(Replica::leased).sum::<u64>();
                    let got = replicas[random.usize(0..3)].reserve_for(Some(&user), amount).await;
                    let has_room = taken + amount + leased() <= MOST;
                    assert!(got.is_some() || !has_room, "{mode}: {amount} refused at {taken} of {MOST}");
                    (asked, early) = (asked + 1, early + u64::from(got.is_none()));
                    if let Some(got) = got {
                        open.push((amount, got));
                        continue;
                    }
                }
                let half = open.len().div_ceil(2);
                for (amount, mut over) in open.drain(..half) {
                    let used = if random.bool() { random.u64(0..=amount) } else { 0 };
                    over.settle(&Used { asked: true, input: used, ..Used::default() }, 0);
                    spent += used;
                }
                for replica in &replicas {
                    replica.has_told().await;
                }
            }
            drop(open);
            let last = replicas[0].reserve_for(Some(&user), MOST - spent + 1).await;
            assert!(last.is_none(), "{mode}: more than there is");
        }
        println!("{mode}: {early} of {asked} refused while slices had the room");
        assert!(asked > 1_000 && (mode == "lease" || early == 0), "{mode}: {early} of {asked}");
    }
}
