//! Which replica a request goes to where the pool weighs what each one has to do: the fast get more, and one that
//! freezes, lies, joins or leaves is nobody else's trouble.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};
use zeromq::{Socket, SocketSend};

use crate::support::journal::Journal;
use crate::support::keys;
use crate::support::{Client, Gateway, Options, Simulated, chat, eventually, model_server, policy};

const CHAT: &str = "/v1/chat/completions";
/// Slack for a loaded machine.
const SOON: Duration = Duration::from_secs(10);

/// A server whose first token takes so long.
async fn paced(ttft_ms: u64) -> Simulated {
    let models = vec!["m".to_owned()];
    Simulated::start(Options { models, ttft_ms, max_model_len: 1 << 20, ..Options::default() }).await.unwrap()
}

fn posts(server: &Simulated) -> usize {
    server.seen().iter().filter(|seen| seen.method == "POST").count()
}

/// A stream whose prompt begins with `begins`.
fn prompt(begins: &str) -> String {
    format!(r#"{{"model":"m","messages":[{{"role":"user","content":"{begins}"}}],"stream":true,"max_tokens":2}}"#)
}

/// One request after the other; returns how many each server got.
async fn one_by_one(gateway: &Gateway, servers: &[&Simulated], count: usize) -> Vec<usize> {
    let before: Vec<usize> = servers.iter().map(|server| posts(server)).collect();
    for _ in 0..count {
        assert_eq!(Client::h1().post(gateway.address, CHAT, chat(true, 2)).await.status, 200);
    }
    servers.iter().zip(before).map(|(server, before)| posts(server) - before).collect()
}

/// The decision about the replica in a request's record.
async fn decision(gateway: &Gateway, id: &str) -> serde_json::Value {
    let record = Journal::settled(gateway).await.record(id);
    let decisions = record["decisions"].as_array().unwrap();
    decisions.iter().find(|decision| decision["stage"] == "replica").unwrap().clone()
}

/// A model server behind a page of metrics that says what it is told to say.
struct Liar {
    address: SocketAddr,
    page: Arc<Mutex<&'static str>>,
    /// How often the page was read.
    asked: Arc<AtomicUsize>,
    task: JoinHandle<()>,
}

impl Liar {
    async fn start(server: &Simulated, page: &'static str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, behind) = (listener.local_addr().unwrap(), server.address());
        let (page, asked) = (Arc::new(Mutex::new(page)), Arc::new(AtomicUsize::new(0)));
        let (says, counted) = (page.clone(), asked.clone());
        let task = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let page = *says.lock().unwrap();
                connections.spawn(lie(stream, behind, page, counted.clone()));
            }
        });
        Self { address, page, asked, task }
    }

    fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Says something else from now on, which has been read when this returns.
    async fn says(&self, page: &'static str, meanwhile: impl AsyncFn()) {
        *self.page.lock().unwrap() = page;
        let before = self.asked.load(Relaxed);
        let read = async || {
            meanwhile().await;
            self.asked.load(Relaxed) >= before + 2
        };
        eventually("the page is read twice", SOON, read).await;
    }
}

impl Drop for Liar {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn lie(mut stream: TcpStream, behind: SocketAddr, page: &str, asked: Arc<AtomicUsize>) {
    let mut first = [0; 12];
    if stream.read_exact(&mut first).await.is_err() {
        return;
    }
    if first.starts_with(b"GET /metrics") {
        asked.fetch_add(1, Relaxed);
        let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{page}", page.len());
        let _ = stream.write_all(head.as_bytes()).await;
        return;
    }
    let mut server = TcpStream::connect(behind).await.unwrap();
    server.write_all(&first).await.unwrap();
    let _ = tokio::io::copy_bidirectional(&mut stream, &mut server).await;
}

#[tokio::test]
async fn the_fast_replica_gets_what_the_slow_one_would_have_kept_waiting() {
    let (fast, slow) = (paced(2).await, paced(150).await);
    let gateway = Gateway::start(&policy(&[&slow.url(), &fast.url()], "balance: expected_time")).await;
    let shares = one_by_one(&gateway, &[&fast, &slow], 60).await;
    assert!(shares[1] <= 10 && shares[1] >= 1, "{shares:?}: tried, and left");
    let even = Gateway::start(&policy(&[&slow.url(), &fast.url()], "balance: round_robin")).await;
    assert_eq!(one_by_one(&even, &[&fast, &slow], 20).await, [10, 10], "what takes turns does not see that");
}

#[tokio::test]
async fn a_frozen_replica_keeps_what_it_has_and_gets_no_more() {
    let (one, two, frozen) = (paced(5).await, paced(5).await, paced(5).await);
    frozen.set_faults(vec!["hang,path=/v1/chat/completions".parse().unwrap()]);
    let urls = [&*one.url(), &two.url(), &frozen.url()];
    let gateway = Gateway::start(&policy(&urls, "balance: expected_time\ntimeouts: {first_token_ms: 60000}")).await;
    let mut stuck = Vec::new();
    let mut took = Vec::new();
    for _ in 0..100 {
        let (begun, address) = (Instant::now(), gateway.address);
        let mut asking = tokio::spawn(async move { Client::h1().post(address, CHAT, chat(true, 2)).await.status });
        match tokio::time::timeout(Duration::from_secs(1), &mut asking).await {
            Ok(status) => {
                assert_eq!(status.unwrap(), 200);
                took.push(begun.elapsed());
            }
            Err(_) => stuck.push(asking),
        }
    }
    assert!(stuck.len() <= 2, "{} of 100 went where nothing comes from", stuck.len());
    assert_eq!(posts(&frozen), stuck.len());
    stuck.iter().for_each(JoinHandle::abort);
}

const IDLE: &str = "vllm:num_requests_running 0\nvllm:num_requests_waiting 0\nvllm:kv_cache_usage_perc 0\n";
const HUGE: &str = "vllm:num_requests_running 9999\nvllm:num_requests_waiting 9999\nvllm:kv_cache_usage_perc 1e30\n";
const NONSENSE: &str = "vllm:num_requests_running -7\nvllm:num_requests_waiting NaN\nvllm:kv_cache_usage_perc\n\u{0}\n";

/// How many requests came, of which a server remembers the last thousand only.
fn arrived(server: &Simulated) -> usize {
    server.seen().last().map_or(0, |seen| seen.id as usize)
}

/// Two servers that answer alike, of which one lies on its page of metrics; how `at_once` clients' requests are shared
/// once it has been read twice: (the honest one's, the liar's).
async fn shares_beside(page: &'static str, at_once: usize) -> (usize, usize) {
    let (honest, behind) = (paced(20).await, paced(20).await);
    let liar = Liar::start(&behind, page).await;
    let extra = "balance: expected_time\nload: {metrics_ms: 1000}";
    let gateway = Gateway::start(&policy(&[&honest.url(), &liar.url()], extra)).await;
    let (address, asked) = (gateway.address, liar.asked.clone());
    let stop = Arc::new(AtomicUsize::new(0));
    let mut clients = JoinSet::new();
    for _ in 0..at_once {
        let stop = stop.clone();
        clients.spawn(async move {
            while stop.load(Relaxed) == 0 {
                assert_eq!(Client::h1().post(address, CHAT, chat(true, 2)).await.status, 200);
            }
        });
    }
    eventually("the page is read twice", SOON, async || asked.load(Relaxed) >= 2).await;
    let before = (arrived(&honest), arrived(&behind));
    let enough = async || arrived(&honest) + arrived(&behind) - before.0 - before.1 >= 100;
    eventually("a hundred requests are answered", SOON, enough).await;
    stop.store(1, Relaxed);
    while let Some(client) = clients.join_next().await {
        client.unwrap();
    }
    (arrived(&honest) - before.0, arrived(&behind) - before.1)
}

#[tokio::test]
async fn who_claims_to_be_idle_attracts_nothing_by_it() {
    for page in [IDLE, NONSENSE] {
        let (honest, liar) = shares_beside(page, 8).await;
        assert!(liar as f64 <= 1.5 * honest as f64, "{page}: honest {honest}, liar {liar}");
    }
}

#[tokio::test]
async fn who_claims_to_be_full_loses_its_own_work_and_nobody_elses() {
    let (honest, liar) = shares_beside(HUGE, 8).await;
    assert!(honest > liar, "honest {honest}, liar {liar}");
}

#[tokio::test]
async fn pages_of_metrics_are_left_alone_while_nobody_asks_anything_of_their_pool() {
    let server = paced(0).await;
    let liar = Liar::start(&server, IDLE).await;
    let gateway = Gateway::start(&policy(
        &[&liar.url()],
        "balance: expected_time\nload: {metrics_ms: 1000}\nhealth: {interval_ms: 100}",
    ))
    .await;
    // Health checks come, so the watch is at work.
    let checks = || server.seen().iter().filter(|seen| seen.path.starts_with("/health")).count();
    eventually("fifteen health checks", SOON, async || checks() >= 15).await;
    assert_eq!(liar.asked.load(Relaxed), 0);
    assert_eq!(Client::h1().post(gateway.address, CHAT, chat(true, 2)).await.status, 200);
    eventually("the page is read", SOON, async || liar.asked.load(Relaxed) > 0).await;
}

#[tokio::test]
async fn one_that_joins_or_leaves_changes_nothing_for_what_is_known_of_the_others() {
    let (fast, slow, new) = (paced(2).await, paced(150).await, paced(2).await);
    let (two, extra) = ([&*fast.url(), &slow.url()], "balance: expected_time");
    let gateway = Gateway::start(&policy(&two, extra)).await;
    one_by_one(&gateway, &[&fast, &slow], 30).await;
    let three = [&*fast.url(), &slow.url(), &new.url()];
    assert_eq!(gateway.reload(&policy(&three, extra)).await.status, 200);
    let joined = one_by_one(&gateway, &[&fast, &slow, &new], 60).await;
    assert!(joined[1] <= 3, "{joined:?}: the slow one is still known for it");
    // How much each gets depends on what else the machine does while their speeds are measured.
    assert!((2..=57).contains(&joined[2]), "{joined:?}: the new one has its share and not everything");
    assert_eq!(gateway.reload(&policy(&two, extra)).await.status, 200);
    let left = one_by_one(&gateway, &[&fast, &slow], 20).await;
    assert!(left[0] >= 17, "{left:?}");
}

#[tokio::test]
async fn a_prompt_goes_where_its_beginning_has_been_read() {
    let servers = [paced(5).await, paced(5).await, paced(5).await];
    let urls = servers.each_ref().map(Simulated::url);
    let gateway = Gateway::start(&policy(&urls.each_ref().map(|url| &**url), "balance: expected_time")).await;
    let mut homes = BTreeMap::new();
    for turn in 0..4 {
        for conversation in 0..12 {
            let begins = format!("conversation {conversation}: ").repeat(400) + &"and on ".repeat(10 * turn);
            let before = servers.each_ref().map(posts);
            assert_eq!(Client::h1().post(gateway.address, CHAT, prompt(&begins)).await.status, 200);
            let home = (0..3).find(|n| posts(&servers[*n]) > before[*n]).unwrap();
            *homes.entry((conversation, home)).or_insert(0) += 1;
        }
    }
    assert_eq!(homes.len(), 12, "every conversation has one home: {homes:?}");
    let used: std::collections::BTreeSet<_> = homes.keys().map(|(_, home)| home).collect();
    assert!(used.len() > 1, "and they do not all have the same: {homes:?}");
}

/// The n-th conversation: two thousand tokens or so.
fn conversation(n: usize) -> String {
    prompt(&format!("conversation {n:03}: be brief. ").repeat(270))
}

/// Asks on in these conversations, one after the other; returns at which of `urls` each of them was answered.
async fn homes(gateway: &Gateway, urls: &[String], conversations: &[usize]) -> Vec<usize> {
    let mut homes = Vec::new();
    for n in conversations {
        let answer = Client::h1().post(gateway.address, CHAT, conversation(*n)).await;
        assert_eq!(answer.status, 200);
        let home = answer.header("x-infergate-upstream");
        homes.push(urls.iter().position(|url| url.ends_with(home)).unwrap());
    }
    homes
}

#[tokio::test]
async fn whatever_one_does_the_others_keep_what_they_have() {
    let options = || Options {
        models: vec!["m".to_owned()],
        prefill_per_second: 20_000.0,
        max_model_len: 1 << 20,
        ..Options::default()
    };
    let mut servers = Vec::new();
    for _ in 0..5 {
        servers.push(Simulated::start(options()).await.unwrap());
    }
    let liar = Liar::start(&servers[3], IDLE).await;
    let urls = [servers[0].url(), servers[1].url(), servers[2].url(), liar.url(), servers[4].url()];
    let of = |those: &[usize]| {
        let urls: Vec<&str> = those.iter().map(|at| &*urls[*at]).collect();
        policy(&urls, "balance: expected_time\nload: {metrics_ms: 1000}\ntimeouts: {first_token_ms: 60000}")
    };
    let gateway = Gateway::start(&of(&[0, 1, 2, 3])).await;
    let all: Vec<usize> = (0..24).collect();
    homes(&gateway, &urls, &all).await;
    let first = homes(&gateway, &urls, &all).await;
    let at = |server: usize| all.iter().copied().filter(|n| first[*n] == server).collect::<Vec<_>>();
    let others = |but: usize| all.iter().copied().filter(|n| first[*n] != but).collect::<Vec<_>>();
    let as_first = |those: &[usize]| those.iter().map(|n| first[*n]).collect::<Vec<_>>();
    assert!((0..4).all(|server| !at(server).is_empty()), "everybody has some: {first:?}");

    // One lies.
    for page in [HUGE, NONSENSE, IDLE] {
        liar.says(page, async || drop(homes(&gateway, &urls, &at(0)[..1]).await)).await;
        assert_eq!(homes(&gateway, &urls, &others(3)).await, as_first(&others(3)), "{page}");
    }
    // One freezes: what it has stays there, and nothing else goes there.
    servers[2].set_faults(vec![format!("hang,path={CHAT}").parse().unwrap()]);
    let (before, address) = (posts(&servers[2]), gateway.address);
    let stuck = at(2)[0];
    let asking = tokio::spawn(async move { Client::h1().post(address, CHAT, conversation(stuck)).await.status });
    eventually("it is stuck", SOON, async || posts(&servers[2]) > before).await;
    let alive: Vec<usize> = others(2).into_iter().filter(|n| first[*n] != 3).collect();
    assert_eq!(homes(&gateway, &urls, &alive).await, as_first(&alive));
    assert_eq!(posts(&servers[2]), before + 1);
    // It leaves.
    assert_eq!(gateway.reload(&of(&[0, 1, 3])).await.status, 200);
    assert_eq!(homes(&gateway, &urls, &alive).await, as_first(&alive));
    assert!(homes(&gateway, &urls, &at(2)).await.iter().all(|home| *home != 2), "what it had is answered by others");
    asking.abort();
    // Another one joins.
    assert_eq!(gateway.reload(&of(&[0, 1, 3, 4])).await.status, 200);
    assert_eq!(homes(&gateway, &urls, &alive).await, as_first(&alive));
    assert_eq!(posts(&servers[4]), 0, "it takes nothing from anybody");
    let new: Vec<usize> = (100..112).collect();
    assert!(homes(&gateway, &urls, &new).await.contains(&4), "and has its share of what is new");
}

#[tokio::test]
async fn one_that_was_started_anew_is_known_by_what_it_has_read_since() {
    let server = paced(2).await;
    let extra = "balance: expected_time\nhealth: {interval_ms: 20, unhealthy_after: 1}";
    let gateway = Gateway::start(&policy(&[&server.url()], extra)).await;
    let address = server.address();
    let healthy = format!(r#"infergate_endpoint_healthy{{pool="p",upstream="{address}",address="{address}"}}"#);
    let has_read = async |begins: &str| {
        let answer = Client::h1().post(gateway.address, CHAT, prompt(&begins.repeat(500))).await;
        assert_eq!(answer.status, 200);
        let decision = decision(&gateway, answer.header("x-request-id")).await;
        decision["why"].as_str().unwrap().contains("has read")
    };
    eventually("it is known to have read it", SOON, async || has_read("begins ").await).await;
    server.set_faults(vec!["status=500,path=/health".parse().unwrap()]);
    eventually("it is out", SOON, async || gateway.metric(&healthy).await == 0.0).await;
    server.set_faults(Vec::new());
    eventually("it is back", SOON, async || gateway.metric(&healthy).await == 1.0).await;
    assert!(!has_read("begins ").await, "what it had read is gone");
    eventually("it is known again", SOON, async || has_read("begins ").await).await;
}

#[tokio::test]
async fn the_record_says_what_a_replica_was_chosen_for() {
    let (fast, slow) = (paced(2).await, paced(150).await);
    let gateway = Gateway::start(&policy(&[&slow.url(), &fast.url()], "balance: expected_time")).await;
    one_by_one(&gateway, &[&fast, &slow], 12).await;
    let answer = Client::h1().post(gateway.address, CHAT, prompt(&"begins ".repeat(500))).await;
    let again = Client::h1().post(gateway.address, CHAT, prompt(&"begins ".repeat(500))).await;
    assert_eq!((answer.status, again.status), (200, 200));
    let decision = decision(&gateway, again.header("x-request-id")).await;
    let (name, why) = (decision["verdict"].as_str().unwrap(), decision["why"].as_str().unwrap());
    assert_eq!((decision["rule"].as_str(), name), (Some("p"), &*fast.address().to_string()));
    assert!(why.starts_with(&format!("expected_time of 2, {name} ")) && why.contains(" s, "), "{why}");
    assert!(why.contains("has read"), "{why}");
}

#[tokio::test]
async fn engines_are_asked_for_their_load_only_where_the_policy_says_so_and_clients_never_see_it() {
    let server = model_server().await;
    for (extra, asked) in [("balance: expected_time\nload: {headers: true}", true), ("balance: expected_time", false)] {
        let gateway = Gateway::start(&policy(&[&server.url()], extra)).await;
        let answer = Client::h1().post(gateway.address, CHAT, chat(false, 2)).await;
        assert_eq!((answer.status, answer.header("endpoint-load-metrics")), (200, ""));
        let seen = server.seen().into_iter().rfind(|seen| seen.method == "POST").unwrap();
        assert_eq!(seen.headers.contains_key("endpoint-load-metrics-format"), asked);
    }
}

#[tokio::test]
async fn a_replica_that_has_the_adapter_loaded_is_asked() {
    const LOADED: &str = "vllm:num_requests_running 0\nvllm:num_requests_waiting 0\nvllm:kv_cache_usage_perc 0\nvllm:lora_requests_info{running_lora_adapters=\"m\",waiting_lora_adapters=\"\"} 1\n";
    let (plain, behind) = (paced(5).await, paced(5).await);
    let liar = Liar::start(&behind, LOADED).await;
    let extra = "balance: expected_time\nload: {metrics_ms: 1000, adapters: true}";
    let gateway = Gateway::start(&policy(&[&plain.url(), &liar.url()], extra)).await;
    let read = async || {
        assert_eq!(Client::h1().post(gateway.address, CHAT, chat(true, 2)).await.status, 200);
        liar.asked.load(Relaxed) >= 2
    };
    eventually("the page is read twice", SOON, read).await;
    let shares = one_by_one(&gateway, &[&plain, &behind], 20).await;
    assert!(shares[1] >= 18, "{shares:?}");
}

#[tokio::test]
async fn an_engine_says_itself_how_much_it_can_hold() {
    let options = Options { models: vec!["m".to_owned()], kv_tokens: 48_000, ..Options::default() };
    let server = Simulated::start(options).await.unwrap();
    let gateway = Gateway::start(&policy(&[&server.url()], "balance: expected_time\nload: {metrics_ms: 1000}")).await;
    let told = async || gateway.admin("/admin/upstreams").await.json()["endpoints"][0]["kv_cache"].clone();
    assert_eq!(told().await, serde_json::Value::Null, "nobody has asked it");
    assert_eq!(Client::h1().post(gateway.address, CHAT, chat(true, 2)).await.status, 200);
    eventually("it has told", SOON, async || told().await["tokens"] == 48_000).await;
    assert_eq!(told().await["block_tokens"], 16);
    let address = server.address();
    let gauge = format!(r#"infergate_endpoint_kv_tokens{{pool="p",upstream="{address}",address="{address}"}}"#);
    assert_eq!(gateway.metric(&gauge).await, 48_000.0);
}

/// What an engine says to which nothing happened, and one that has cleared its cache.
const NOTHING: &[u8] = b"\x92\xc0\x90";
const CLEARED: &[u8] = b"\x92\xcb\0\0\0\0\0\0\0\0\x91\x91\xb0AllBlocksCleared";

/// A batch that says that blocks with these names, of 64 tokens, were stored for a session, or evicted.
fn blocks(event: &str, names: std::ops::RangeInclusive<u8>, session: &str) -> Vec<u8> {
    let text = |text: &str| [&[0xd9, text.len() as u8], text.as_bytes()].concat();
    let names = [&[0xdc, 0, names.clone().count() as u8][..], &names.collect::<Vec<u8>>()].concat();
    let members = [
        text("type"),
        text(event),
        text("block_hashes"),
        names,
        text("block_size"),
        vec![64],
        text("session_id"),
        text(session),
    ];
    [&[0x92, 0xc0, 0x91, 0x84], &members.concat()[..]].concat()
}

/// A gateway before an engine that publishes what happens to its cache.
struct Publisher {
    socket: zeromq::PubSocket,
    number: u64,
    server: Simulated,
    gateway: Gateway,
}

impl Publisher {
    /// One that is heard.
    async fn start() -> Self {
        let mut socket = zeromq::PubSocket::new();
        let zeromq::Endpoint::Tcp(_, port) = socket.bind("tcp://127.0.0.1:0").await.unwrap() else { panic!("no port") };
        let server = paced(2).await;
        let upstream = format!("{}\n        kv_events: {port}", server.url());
        let gateway = Gateway::start(&policy(&[&upstream], "balance: expected_time")).await;
        let mut this = Self { socket, number: 0, server, gateway };
        while this.told().await.is_null() {
            this.publish(NOTHING).await;
        }
        this
    }

    async fn publish(&mut self, batch: &[u8]) {
        let frames = [b"kv", &self.number.to_be_bytes()[..], batch].map(bytes::Bytes::copy_from_slice);
        self.socket.send(zeromq::ZmqMessage::try_from(frames.to_vec()).unwrap()).await.unwrap();
        self.number += 1;
    }

    /// Publishes a batch and waits until it was heard.
    async fn tell(&mut self, batch: &[u8]) {
        let before = self.told().await["batches"].as_u64().unwrap();
        self.publish(batch).await;
        let heard = async || self.told().await["batches"].as_u64().unwrap() > before;
        eventually("it has told it", SOON, heard).await;
    }

    /// What the gateway has heard from it.
    async fn told(&self) -> serde_json::Value {
        self.gateway.admin("/admin/upstreams").await.json()["endpoints"][0]["kv_events"].clone()
    }

    /// Asks; returns the request's id.
    async fn ask(&self, text: &str) -> String {
        let theirs = [("x-session-id", "the client's own")];
        let answer = Client::h1().post_with(self.gateway.address, CHAT, &theirs, prompt(text)).await;
        answer.header("x-request-id").to_owned()
    }

    /// How many tokens of this it has read before, as the gateway sees it.
    async fn has_read(&self, text: &str) -> u64 {
        let decision = decision(&self.gateway, &self.ask(text).await).await;
        let (_, share) = decision["why"].as_str().unwrap().split_once("has read ").unwrap_or(("", "0 of"));
        share.split(' ').next().unwrap().parse().unwrap()
    }
}

#[tokio::test]
async fn an_engine_that_clears_its_cache_says_so_itself() {
    let (mut engine, text) = (Publisher::start().await, "begins ".repeat(500));
    eventually("it has read it", SOON, async || engine.has_read(&text).await > 0).await;
    engine.tell(CLEARED).await;
    let followed = async || engine.told().await["followed"] == true;
    eventually("it is followed", SOON, followed).await;
    assert_eq!(engine.has_read(&text).await, 0, "what it had read is gone");
}

#[tokio::test]
async fn an_engine_says_itself_which_blocks_of_which_prompt_it_has_evicted() {
    let (mut engine, text) = (Publisher::start().await, "begins ".repeat(730));
    let id = engine.ask(&text).await;
    let seen = engine.server.seen().into_iter().rfind(|seen| seen.method == "POST").unwrap();
    let sessions: Vec<_> = seen.headers.get_all("x-session-id").iter().collect();
    assert_eq!(sessions, [&*id], "the request's id, and not what the client sends");
    let tokens = Journal::settled(&engine.gateway).await.record(&id)["usage"]["input_tokens"].as_u64().unwrap();
    let count = (tokens / 64) as u8;
    // An engine tells before it answers; this one a moment after. Where that was too late it tells of the next.
    while engine.told().await["placed_blocks"] == 0 {
        engine.tell(&blocks("BlockRemoved", 1..=count, "")).await;
        let id = engine.ask(&text).await;
        engine.tell(&blocks("BlockStored", 1..=count, &id)).await;
        engine.tell(NOTHING).await;
    }
    assert!(engine.has_read(&text).await > tokens * 9 / 10);
    engine.tell(&blocks("BlockRemoved", count / 2..=count, "")).await;
    assert_eq!(engine.told().await["held_blocks"], count / 2 - 1);
    assert!(engine.has_read(&text).await < tokens * 6 / 10);
}

#[tokio::test]
async fn an_engine_that_reads_a_sessions_name_from_the_body_finds_it_there_unless_the_client_has_named_one() {
    let server = paced(0).await;
    let upstream = format!("{}\n        kv_events: 9\n        kv_session: body", server.url());
    let text = policy(&[&upstream], "balance: expected_time");
    let gateway = Gateway::start(&format!("{text}metering: {{usage: as_is}}\n")).await;
    let own = prompt("begins").replacen('{', r#"{"session_params":{"id":"s"},"#, 1);
    for body in [prompt("begins"), own] {
        let answer = Client::h1().post(gateway.address, CHAT, body.clone()).await;
        let seen = server.seen().into_iter().rfind(|seen| seen.method == "POST").unwrap();
        let named = body.replacen('{', &format!(r#"{{"session_id":"{}","#, answer.header("x-request-id")), 1);
        let expected = if body.contains("session_params") { &body } else { &named };
        assert_eq!((&*seen.body, seen.headers.get("x-session-id")), (expected.as_bytes(), None));
    }
}

#[tokio::test]
async fn a_user_stays_with_their_replica_whoever_names_them() {
    let servers = [paced(0).await, paced(0).await, paced(0).await];
    let urls = servers.each_ref().map(Simulated::url);
    let text = policy(&urls.each_ref().map(|url| &**url), "balance: hash");
    let gateway = Gateway::start(&format!("{text}requests: {{user_header: x-user}}\n")).await;
    let mut used = std::collections::BTreeSet::new();
    for user in 0..12 {
        let before = servers.each_ref().map(posts);
        for question in 0..3 {
            let body = prompt(&format!("{question}"));
            let named = format!("u{user}");
            assert_eq!(Client::h1().post_with(gateway.address, CHAT, &[("x-user", &named)], body).await.status, 200);
        }
        let body = prompt("else").replacen('{', &format!(r#"{{"user":"u{user}","#), 1);
        assert_eq!(Client::h1().post(gateway.address, CHAT, body).await.status, 200);
        let homes: Vec<usize> = (0..3).filter(|n| posts(&servers[*n]) > before[*n]).collect();
        assert_eq!(homes.len(), 1, "user {user}");
        used.extend(homes);
    }
    assert!(used.len() > 1);
}

#[tokio::test]
async fn a_key_stays_with_its_replica() {
    let servers = [paced(0).await, paced(0).await, paced(0).await];
    let urls = servers.each_ref().map(Simulated::url);
    let gateway = Gateway::start(&policy(&urls.each_ref().map(|url| &**url), "balance: hash")).await;
    let mut used = std::collections::BTreeSet::new();
    for user in 0..12 {
        let body = format!(
            r#"{{"model":"m","user":"u{user}","messages":[{{"role":"user","content":"Hello"}}],"max_tokens":1}}"#
        );
        let before = servers.each_ref().map(posts);
        for _ in 0..3 {
            assert_eq!(Client::h1().post(gateway.address, CHAT, body.clone()).await.status, 200);
        }
        let homes: Vec<usize> = (0..3).filter(|n| posts(&servers[*n]) > before[*n]).collect();
        assert_eq!(homes.len(), 1, "user {user}");
        used.extend(homes);
    }
    assert!(used.len() > 1);
}

// Asking twice.

/// A gateway with two servers that take turns and hedge; forty answers have told how long first tokens take.
async fn hedging(budget_percent: u32) -> (Gateway, [Simulated; 2]) {
    hedging_with(budget_percent, "").await
}

async fn hedging_with(budget_percent: u32, more: &str) -> (Gateway, [Simulated; 2]) {
    let servers = [paced(5).await, paced(5).await];
    let urls = servers.each_ref().map(Simulated::url);
    let extra = format!("balance: round_robin\nhedge: {{budget_percent: {budget_percent}}}");
    let text = policy(&urls.each_ref().map(|url| &**url), &extra) + more;
    let gateway = Gateway::start(&text).await;
    let all = one_by_one(&gateway, &[&servers[0], &servers[1]], 40).await;
    assert!(all.iter().sum::<usize>() >= 40);
    (gateway, servers)
}

async fn hedges(gateway: &Gateway, result: &str) -> f64 {
    gateway.metric(&format!(r#"infergate_hedges_total{{pool="p",result="{result}"}}"#)).await
}

fn slow(server: &Simulated, ms: u64) {
    server.set_faults(vec![format!("slow-first={ms},path={CHAT}").parse().unwrap()]);
}

#[tokio::test]
async fn a_hedge_cuts_the_tail_and_the_one_that_lost_is_let_go_at_once() {
    let (gateway, [one, two]) = hedging(50).await;
    slow(&two, 30_000);
    let mut answers = Vec::new();
    for stream in [true, true, true, true, true, true] {
        let begun = Instant::now();
        let answer = Client::h1().post(gateway.address, CHAT, chat(stream, 2)).await;
        assert_eq!(answer.status, 200);
        assert!(begun.elapsed() < SOON, "the slow one takes half a minute");
        answers.push(answer);
    }
    assert!(hedges(&gateway, "won").await >= 2.0);
    eventually("nothing runs at the one that lost", SOON, async || two.in_flight() == 0).await;
    let hedged = answers.iter().find(|answer| answer.header("x-infergate-attempts") == "2").unwrap();
    let record = Journal::settled(&gateway).await.record(hedged.header("x-request-id"));
    let attempts = record["attempts"].as_array().unwrap();
    let (lost, won) = (&attempts[0], &attempts[1]);
    assert_eq!((lost["result"].as_str(), won["result"].as_str()), (Some("cancelled"), Some("answered")));
    assert_eq!(won["upstream"], one.address().to_string());
    assert!(lost["why"].as_str().unwrap().contains("another endpoint began first"), "{lost}");
}

#[tokio::test]
async fn the_first_one_may_still_win_and_stands_last_on_the_record() {
    let (gateway, [one, two]) = hedging(50).await;
    slow(&one, 300);
    slow(&two, 300);
    let answer = Client::h1().post(gateway.address, CHAT, chat(true, 2)).await;
    assert_eq!((answer.status, answer.header("x-infergate-attempts")), (200, "2"));
    assert!(hedges(&gateway, "lost").await + hedges(&gateway, "won").await >= 1.0);
    let record = Journal::settled(&gateway).await.record(answer.header("x-request-id"));
    let results: Vec<_> = record["attempts"].as_array().unwrap().iter().map(|one| one["result"].clone()).collect();
    assert_eq!(results, ["cancelled", "answered"]);
}

#[tokio::test]
async fn hedges_stay_within_their_budget() {
    let (gateway, [_one, two]) = hedging(5).await;
    slow(&two, 200);
    for _ in 0..20 {
        assert_eq!(Client::h1().post(gateway.address, CHAT, chat(true, 2)).await.status, 200);
    }
    let asked_twice = hedges(&gateway, "won").await + hedges(&gateway, "lost").await;
    assert!((1.0..=3.0).contains(&asked_twice), "{asked_twice} of sixty, where one in twenty may be");
    // When enough of them were slow, that is what is to be expected, and nobody is asked twice for it.
    assert!(hedges(&gateway, "refused").await >= 1.0);
}

#[tokio::test]
async fn what_is_stored_is_not_asked_twice() {
    let (gateway, [one, two]) = hedging(50).await;
    slow(&one, 200);
    slow(&two, 200);
    let body = chat(true, 2).replace("\"stream\"", "\"store\":true,\"stream\"");
    let answer = Client::h1().post(gateway.address, CHAT, body).await;
    assert_eq!((answer.status, answer.header("x-infergate-attempts")), (200, "1"));
    let answer = Client::h1().post(gateway.address, CHAT, chat(true, 2)).await;
    assert_eq!(answer.header("x-infergate-attempts"), "2", "and anything else is");
}

#[tokio::test]
async fn what_a_hedges_loser_was_given_is_used_and_paid_for() {
    let prices = "prices: {list: [{models: [m], input: 2.5, output: 10}]}\n";
    let (gateway, [_one, two]) = hedging_with(50, prices).await;
    slow(&two, 30_000);
    let mut hedged = None;
    for _ in 0..6 {
        let answer = Client::h1().post(gateway.address, CHAT, prompt(&"begins ".repeat(500))).await;
        assert_eq!(answer.status, 200);
        hedged = hedged.or((answer.header("x-infergate-attempts") == "2").then_some(answer));
    }
    let record = Journal::settled(&gateway).await.record(hedged.unwrap().header("x-request-id"));
    let [lost, won] = [0, 1].map(|n| record["attempts"][n]["metered"].clone());
    let tokens = |of: &serde_json::Value| of["input_tokens"].as_u64().unwrap();
    assert_eq!((lost["source"].as_str(), won["source"].as_str()), (Some("partial"), Some("upstream")), "{record}");
    assert!(tokens(&lost) > 400, "{lost}");
    assert_eq!(tokens(&record["usage"]), tokens(&lost) + tokens(&won));
    assert_eq!(
        (record["usage"]["output_tokens"].as_u64(), record["usage"]["source"].as_str()),
        (Some(2), Some("partial"))
    );
    assert_eq!(lost["cost_nanousd"].as_u64(), Some(tokens(&lost) * 2_500));
    let cost = tokens(&record["usage"]) * 2_500 + 2 * 10_000;
    assert_eq!(record["cost"]["nanousd"].as_u64(), Some(cost));
    let counted = gateway.metric(r#"infergate_hedge_tokens_total{pool="p"}"#).await;
    assert!(counted >= tokens(&lost) as f64, "{counted}");
}

#[tokio::test]
async fn a_limit_counts_what_a_hedges_loser_was_given() {
    let (gateway, [_one, two]) = hedging_with(50, "limits: [{name: l, tokens: 100000, per: 1h}]\n").await;
    slow(&two, 30_000);
    let left = async || gateway.metric(r#"infergate_limit_left{limit="l"}"#).await;
    let mut grew = 0.0_f64;
    for _ in 0..6 {
        let before = left().await;
        let answer = Client::h1().post(gateway.address, CHAT, prompt(&"begins ".repeat(500))).await;
        if answer.header("x-infergate-attempts") == "2" {
            grew = grew.max(before - left().await);
        }
    }
    assert!(grew > 1_200.0, "{grew}: its own seven hundred and the loser's");
}

#[tokio::test]
async fn a_response_is_asked_twice_only_where_nothing_is_left_of_it() {
    let (gateway, [one, two]) = hedging(50).await;
    // So many that the slow ones stay fewer than one in twenty.
    one_by_one(&gateway, &[&one, &two], 160).await;
    for server in [&one, &two] {
        server.set_faults(vec!["slow-first=200,path=/v1/responses".parse().unwrap()]);
    }
    for (more, attempts) in [
        ("", "1"),
        (r#","store":true"#, "1"),
        (r#","store":false,"conversation":"c""#, "1"),
        (r#","store":false,"tools":[{"type":"mcp","server_label":"x"}]"#, "1"),
        (r#","store":false,"tools":[{"type":"function","name":"f","parameters":{}}]"#, "2"),
        (r#","store":false"#, "2"),
    ] {
        let body = format!(r#"{{"model":"m","input":"Hello","stream":true,"max_output_tokens":2{more}}}"#);
        let answer = Client::h1().post(gateway.address, "/v1/responses", body).await;
        assert_eq!((answer.status, answer.header("x-infergate-attempts")), (200, attempts), "{more}");
    }
}

#[tokio::test]
async fn where_both_fail_the_request_fails_once_with_two_attempts_told() {
    let (gateway, servers) = hedging(50).await;
    for server in &servers {
        server.set_faults(vec![
            format!("slow-first=100,path={CHAT}").parse().unwrap(),
            format!("reset,path={CHAT}").parse().unwrap(),
        ]);
    }
    let answer = Client::h1().post(gateway.address, CHAT, chat(true, 2)).await;
    assert!(answer.status >= 500, "{}", answer.status);
    let record = Journal::settled(&gateway).await.record(answer.header("x-request-id"));
    let attempts = record["attempts"].as_array().unwrap();
    assert!((2..=3).contains(&attempts.len()), "no more than the policy's three: {attempts:?}");
    assert!(attempts.iter().all(|attempt| attempt["result"] != "answered"));
}

// Fairness.

#[tokio::test]
async fn a_tenant_that_asks_for_everything_does_not_keep_another_waiting() {
    let server = paced(0).await;
    server.set_faults(vec![format!("slow-first=100,path={CHAT}").parse().unwrap()]);
    let [greedy_key, modest_key] = ["greedy", "modest"].map(|tenant| keys::key(tenant, ""));
    let asks = keys::asks_for(&[&greedy_key, &modest_key], "{greedy: {}, modest: {}}");
    let text = policy(&[&server.url()], "concurrency: {max: 2, queue: 20}") + &asks;
    let gateway = keys::start(&text, "").await;
    let ask = |key: &keys::Key| {
        let (address, key) = (gateway.address, format!("Bearer {}", key.text));
        async move { Client::h1().post_with(address, CHAT, &[("authorization", &key)], chat(false, 1)).await.status }
    };
    let greedy: Vec<_> = (0..30).map(|_| tokio::spawn(ask(&greedy_key))).collect();
    eventually("the pool is full", SOON, async || gateway.metric(r#"infergate_pool_waiting{pool="p"}"#).await >= 18.0)
        .await;
    let begun = Instant::now();
    assert_eq!(ask(&modest_key).await, 200);
    let waited = begun.elapsed();
    // Two run, and two more get the places that they leave; without fairness twenty would have been before it.
    assert!(waited < Duration::from_secs(1), "{waited:?} where each takes a tenth of a second");
    let statuses: Vec<_> =
        JoinSet::from_iter(greedy.into_iter().map(|one| async { one.await.unwrap() })).join_all().await;
    assert!(statuses.iter().all(|status| [200, 503].contains(status)), "{statuses:?}");
}
