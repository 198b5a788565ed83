//! What clients see when upstreams fail: nothing, as long as anybody can answer; else which time ran out, and when to
//! come back.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::task::{JoinHandle, JoinSet};

use crate::support::{
    Answer, Client, Gateway, Options, Simulated, chat, events, eventually, faulty_server, free_port, model_server,
    policy,
};

const CHAT: &str = "/v1/chat/completions";
/// Slack for a loaded machine.
const SOON: Duration = Duration::from_secs(5);
/// No breaker and no health check, for tests of everything else.
const CALM: &str = "breaker: {failures: 0, requests_min: 1000000}\nhealth: {enabled: false}\n";

fn posts(server: &Simulated) -> usize {
    server.seen().iter().filter(|seen| seen.method == "POST").count()
}

fn set_faults(server: &Simulated, faults: &[&str]) {
    server.set_faults(faults.iter().map(|fault| fault.parse().unwrap()).collect());
}

/// A gateway that asks `first` before `second`.
async fn in_order(first: &str, second: &str, extra: &str) -> Gateway {
    let urls = [
        format!("{first}\n        zone: here\n        name: first"),
        format!("{second}\n        zone: there\n        name: second"),
    ];
    Gateway::with(&policy(&[&urls[0], &urls[1]], extra), "threads: 2\nzone: here\n", &[]).await
}

async fn ask(client: &Client, gateway: &Gateway, stream: bool) -> Answer {
    client.post(gateway.address, CHAT, chat(stream, 4)).await
}

/// The code of an error, in the answer or in the last event of a stream.
fn code(answer: &Answer) -> String {
    if answer.status != 200 {
        return answer.code();
    }
    let last: Value = serde_json::from_str(&events(&answer.body).pop().unwrap()).unwrap();
    last["error"]["code"].as_str().unwrap().to_owned()
}

/// An address that takes no connection and refuses none: its line of connections to accept is full.
struct Blackhole {
    address: SocketAddr,
    _listener: TcpListener,
    _line: Vec<JoinHandle<()>>,
}

impl Blackhole {
    async fn new() -> Self {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let listener = socket.listen(1).unwrap();
        let address = listener.local_addr().unwrap();
        let hold = move |_| {
            tokio::spawn(async move {
                let stream = TcpStream::connect(address).await;
                std::future::pending::<()>().await;
                drop(stream);
            })
        };
        let line = (0..8).map(hold).collect();
        let full = async || tokio::time::timeout(Duration::from_millis(50), TcpStream::connect(address)).await.is_err();
        eventually("the line is full", SOON, full).await;
        Self { address, _listener: listener, _line: line }
    }

    fn url(&self) -> String {
        format!("http://{}", self.address)
    }
}

// Times.

/// Asks, and asserts that the answer comes after `limit_ms` and not much later. What comes late may be the machine's
/// fault; what comes late five times is not.
async fn timed<F: Future<Output = Answer>>(what: &str, limit_ms: u64, mut ask: impl FnMut() -> F) -> Answer {
    let limit = Duration::from_millis(limit_ms);
    let mut late = Vec::new();
    for _ in 0..5 {
        let start = Instant::now();
        let answer = ask().await;
        let took = start.elapsed();
        assert!(took + Duration::from_millis(5) >= limit, "{what}: {took:?} for a limit of {limit:?}");
        if took <= limit + Duration::from_millis(60) {
            return answer;
        }
        late.push(took);
    }
    panic!("{what}: {late:?} for a limit of {limit:?}");
}

#[tokio::test]
async fn each_time_limit_fires_in_time_and_is_named() {
    for (limit, fault, stream, named) in [
        ("first_token_ms", "hang", true, "first_token_timeout"),
        ("first_token_ms", "slow-first=9000", true, "first_token_timeout"),
        ("first_token_ms", "slow-first-token=9000", true, "first_token_timeout"),
        ("answer_ms", "hang", false, "answer_timeout"),
        ("answer_ms", "slow-first=9000", false, "answer_timeout"),
        ("between_tokens_ms", "stall", true, "between_tokens_timeout"),
        ("total_ms", "hang", true, "total_timeout"),
        ("total_ms", "hang", false, "total_timeout"),
        ("total_ms", "delay-between=50", true, "total_timeout"),
    ] {
        let server = faulty_server(&[fault]).await;
        let text = policy(&[&server.url()], &format!("timeouts: {{{limit}: 400}}\nretry: {{attempts: 1}}\n{CALM}"));
        let gateway = Gateway::start(&text).await;
        for client in Client::both() {
            let answer = timed(named, 400, || client.post(gateway.address, CHAT, chat(stream, 1_000))).await;
            let status = if answer.header("content-type").starts_with("text/event-stream") { 200 } else { 504 };
            assert_eq!((answer.status, code(&answer).as_str(), answer.whole), (status, named, true), "{fault}");
            assert!(!answer.text().contains("[DONE]"), "a stream that was cut says so");
            eventually("the upstream is let go", SOON, async || server.in_flight() == 0).await;
        }
    }
}

#[tokio::test]
async fn a_connection_that_does_not_come_is_given_up_in_time() {
    let hole = Blackhole::new().await;
    let text = policy(&[&hole.url()], &format!("timeouts: {{connect_ms: 400}}\nretry: {{attempts: 1}}\n{CALM}"));
    let gateway = Gateway::start(&text).await;
    for client in Client::both() {
        for stream in [false, true] {
            let answer = timed("connect", 400, || ask(&client, &gateway, stream)).await;
            assert_eq!((answer.status, answer.code().as_str()), (504, "connect_timeout"));
            assert_eq!(answer.header("x-should-retry"), "true");
        }
    }
}

#[tokio::test]
async fn the_time_for_an_answer_holds_on_every_endpoint() {
    let server = faulty_server(&["hang"]).await;
    let text = policy(&[&server.url()], &format!("timeouts: {{answer_ms: 300}}\nretry: {{attempts: 1}}\n{CALM}"));
    let gateway = Gateway::start(&text).await;
    let asks = [
        (CHAT, r#""messages":[{"role":"user","content":"x"}]"#),
        ("/v1/completions", r#""prompt":"x""#),
        ("/v1/embeddings", r#""input":"x""#),
        ("/v1/responses", r#""input":"x""#),
        ("/v1/messages", r#""max_tokens":4,"messages":[{"role":"user","content":"x"}]"#),
        ("/v1/messages/count_tokens", r#""messages":[{"role":"user","content":"x"}]"#),
        ("/v1/rerank", r#""query":"x","documents":["y"]"#),
        ("/v1/score", r#""text_1":"x","text_2":"y""#),
        ("/v1/pooling", r#""input":"x""#),
        ("/v1/moderations", r#""input":"x""#),
        ("/v1/audio/speech", r#""input":"x","voice":"a""#),
        ("/v1/images/generations", r#""prompt":"x""#),
        ("/tokenize", r#""prompt":"x""#),
        ("/detokenize", r#""tokens":[1]"#),
    ];
    for client in Client::both() {
        let mut running = JoinSet::new();
        for (path, body) in asks {
            let (client, address) = (client.clone(), gateway.address);
            running.spawn(async move {
                let body = format!(r#"{{"model":"m",{body}}}"#);
                (path, timed(path, 300, || client.post(address, path, body.clone())).await)
            });
        }
        for (path, answer) in running.join_all().await {
            assert_eq!(answer.status, 504, "{path}");
            assert!(answer.text().contains("no answer within 300 ms"), "{path}: {}", answer.text());
        }
    }
}

// Failover.

#[tokio::test]
async fn whatever_fails_before_the_first_byte_the_next_upstream_answers() {
    let (first, second) = (model_server().await, model_server().await);
    let times = "timeouts: {first_token_ms: 400, answer_ms: 400}\nretry: {budget: 10}\n";
    let gateway = in_order(&first.url(), &second.url(), &format!("{times}{CALM}")).await;
    for fault in [
        "reset",
        "hang",
        "garbage",
        "slow-first=9000",
        "status=429",
        "status=500",
        "status=502",
        "status=503",
        "status=504",
        "status=529",
    ] {
        set_faults(&first, &[fault, "close-after"]);
        for client in Client::both() {
            for stream in [false, true] {
                let before = (posts(&first), posts(&second));
                let answer = ask(&client, &gateway, stream).await;
                let told =
                    (answer.status, answer.header("x-infergate-attempts"), answer.header("x-infergate-upstream"));
                assert_eq!(told, (200, "2", "second"), "{fault}: {}", answer.text());
                assert_eq!((posts(&first), posts(&second)), (before.0 + 1, before.1 + 1), "{fault}");
            }
        }
    }
}

#[tokio::test]
async fn a_stream_that_breaks_off_before_its_first_event_is_asked_elsewhere() {
    let (first, second) = (model_server().await, model_server().await);
    let gateway = in_order(&first.url(), &second.url(), &format!("timeouts: {{first_token_ms: 400}}\n{CALM}")).await;
    for fault in ["cut,after=0", "slow-first-token=9000"] {
        set_faults(&first, &[fault]);
        for client in Client::both() {
            let answer = ask(&client, &gateway, true).await;
            let told = (answer.status, answer.header("x-infergate-attempts"), answer.header("x-infergate-upstream"));
            assert_eq!(told, (200, "2", "second"), "{fault}: {}", answer.text());
            assert!(answer.whole && answer.text().contains("[DONE]"));
        }
    }
}

#[tokio::test]
async fn an_upstream_that_cannot_be_reached_is_passed_over() {
    let (hole, second) = (Blackhole::new().await, model_server().await);
    for first in [format!("http://127.0.0.1:{}", free_port()), hole.url(), "unix:/nobody/listens".to_owned()] {
        let gateway = in_order(&first, &second.url(), &format!("timeouts: {{connect_ms: 150}}\n{CALM}")).await;
        for client in Client::both() {
            for stream in [false, true] {
                let answer = ask(&client, &gateway, stream).await;
                assert_eq!((answer.status, answer.header("x-infergate-attempts")), (200, "2"), "{first}");
            }
        }
    }
}

#[tokio::test]
async fn a_cause_that_the_policy_does_not_list_is_no_reason_to_ask_again() {
    let (first, second) = (model_server().await, model_server().await);
    for (fault, listed, status) in [
        ("status=503", "[connect, reset, timeout, '429']", 503),
        ("status=429", "[connect, reset, timeout, 5xx]", 429),
        ("reset", "[connect, timeout, 5xx, '429']", 502),
        ("hang", "[connect, reset, 5xx, '429']", 504),
        ("status=500", "[]", 500),
    ] {
        set_faults(&first, &[fault]);
        let extra = format!("timeouts: {{first_token_ms: 150, answer_ms: 150}}\nretry: {{'on': {listed}}}\n{CALM}");
        let gateway = in_order(&first.url(), &second.url(), &extra).await;
        for client in Client::both() {
            let answer = ask(&client, &gateway, false).await;
            assert_eq!((answer.status, answer.header("x-infergate-attempts")), (status, "1"), "{fault}");
        }
    }
    assert_eq!(posts(&second), 0);
}

#[tokio::test]
async fn each_cause_has_its_own_fallback() {
    let (first, second) = (model_server().await, model_server().await);
    let causes = ["connect", "reset", "timeout", "5xx", "429", "context_length", "content_filter"];
    let pools = causes
        .map(|cause| format!("  at-{cause}: {{upstreams: [{{url: '{}', name: at-{cause}}}]}}\n", second.url()))
        .concat();
    let fallbacks = causes.map(|cause| format!("{{pool: at-{cause}, 'on': ['{cause}']}}")).join(", ");
    let closed = free_port();
    let calm = "retry: {'on': []}, timeouts: {answer_ms: 400, first_token_ms: 400}, health: {enabled: false}, breaker: {failures: 0, requests_min: 1000000}";
    let gateway = Gateway::start(&format!(
        "version: 1\nmodels:\n  - {{name: m, pool: a, fallbacks: [{fallbacks}]}}\n  - {{name: dead, pool: d, rename: m, fallbacks: [{fallbacks}]}}\n\
         pools:\n  a: {{upstreams: [{{url: '{}'}}], {calm}}}\n  d: {{upstreams: [{{url: 'http://127.0.0.1:{closed}'}}], {calm}}}\n{pools}",
        first.url()
    ))
    .await;
    for (model, fault, pool) in [
        ("dead", "", "at-connect"),
        ("m", "reset", "at-reset"),
        ("m", "hang", "at-timeout"),
        ("m", "status=503", "at-5xx"),
        ("m", "status=429", "at-429"),
        ("m", "context", "at-context_length"),
        ("m", "content-filter=400", "at-content_filter"),
    ] {
        let faults: Vec<&str> = [fault, "close-after"].into_iter().filter(|fault| !fault.is_empty()).collect();
        set_faults(&first, &faults);
        for client in Client::both() {
            for stream in [false, true] {
                let body = chat(stream, 4).replace("\"m\"", &format!("\"{model}\""));
                let answer = client.post(gateway.address, CHAT, body).await;
                let told =
                    (answer.status, answer.header("x-infergate-upstream"), answer.header("x-infergate-attempts"));
                assert_eq!(told, (200, pool, "2"), "{fault}: {}", answer.text());
            }
        }
    }
}

#[tokio::test]
async fn without_a_fallback_for_it_a_prompt_too_long_is_told_in_the_upstreams_own_words() {
    let (first, second) = (model_server().await, model_server().await);
    let text = format!(
        "version: 1\nmodels: [{{name: m, pool: a, fallbacks: [{{pool: b}}]}}, {{name: also, pool: a, rename: m, fallbacks: [{{pool: b, 'on': [content_filter]}}]}}]\n\
         pools:\n  a: {{upstreams: [{{url: '{}'}}]}}\n  b: {{upstreams: [{{url: '{}'}}]}}\n",
        first.url(),
        second.url()
    );
    let gateway = Gateway::start(&text).await;
    set_faults(&first, &["context"]);
    let direct = Client::h1().post(first.address(), CHAT, chat(false, 4)).await;
    for client in Client::both() {
        for model in ["m", "also"] {
            let answer =
                client.post(gateway.address, CHAT, chat(false, 4).replace("\"m\"", &format!("\"{model}\""))).await;
            assert_eq!((answer.status, answer.text()), (400, direct.text()));
        }
    }
    assert_eq!(posts(&second), 0);
}

#[tokio::test]
async fn the_upstreams_own_last_error_passes_untouched_when_nothing_else_is_left() {
    let (first, second) = (model_server().await, model_server().await);
    let gateway = in_order(&first.url(), &second.url(), &format!("retry: {{attempts: 2, budget: 10}}\n{CALM}")).await;
    for (fault, status) in
        [("status=503,retry_after=7", 503), ("status=429", 429), ("status=500", 500), ("status=529", 529)]
    {
        set_faults(&first, &["reset"]);
        set_faults(&second, &[fault]);
        let direct = Client::h1().post(second.address(), CHAT, chat(false, 4)).await;
        for client in Client::both() {
            for stream in [false, true] {
                let answer = ask(&client, &gateway, stream).await;
                assert_eq!((answer.status, answer.text()), (status, direct.text()));
                assert_eq!(answer.header("retry-after"), direct.header("retry-after"));
                assert_eq!(
                    (answer.header("x-infergate-attempts"), answer.header("x-infergate-upstream")),
                    ("2", "second")
                );
            }
        }
    }
}

#[tokio::test]
async fn retries_leave_an_attempt_for_each_fallback_that_could_help() {
    let (bad, good) = (faulty_server(&["status=503", "close-after"]).await, model_server().await);
    let calm = "health: {enabled: false}, breaker: {failures: 0, requests_min: 1000000}";
    let text = format!(
        "version: 1\nmodels:\n  - {{name: m, pool: a, fallbacks: [{{pool: b}}, {{pool: c}}]}}\n  \
         - {{name: other, rename: m, pool: a, fallbacks: [{{pool: c, 'on': [context_length]}}]}}\npools:\n  \
         a: {{upstreams: [{{url: '{0}'}}], retry: {{attempts: 4, budget: 10, backoff_ms: 1}}, {calm}}}\n  \
         b: {{upstreams: [{{url: '{0}'}}], {calm}}}\n  c: {{upstreams: [{{url: '{1}'}}]}}\n",
        bad.url(),
        good.url()
    );
    let gateway = Gateway::start(&text).await;
    let client = Client::h1();
    let answer = ask(&client, &gateway, false).await;
    assert_eq!((answer.status, answer.header("x-infergate-attempts")), (200, "4"), "{}", answer.text());
    assert_eq!((posts(&bad), posts(&good)), (3, 1), "twice at a, once at b, once at c");
    // What cannot help is left nothing.
    let body = chat(false, 4).replace("\"m\"", "\"other\"");
    let answer = client.post(gateway.address, CHAT, body).await;
    assert_eq!((answer.status, answer.header("x-infergate-attempts")), (503, "4"));
}

#[tokio::test]
async fn an_upstreams_error_passes_even_if_the_fallback_is_out() {
    let first = faulty_server(&["status=503,retry_after=7"]).await;
    let drained = model_server().await;
    let text = format!(
        "version: 1\nmodels: [{{name: m, pool: a, fallbacks: [{{pool: b}}]}}]\npools:\n  \
         a: {{upstreams: [{{url: '{}'}}], retry: {{'on': []}}, breaker: {{failures: 0}}}}\n  \
         b: {{upstreams: [{{url: '{}', weight: 0}}]}}\n",
        first.url(),
        drained.url()
    );
    let gateway = Gateway::start(&text).await;
    for client in Client::both() {
        let answer = ask(&client, &gateway, false).await;
        assert_eq!(
            (answer.status, answer.header("retry-after"), answer.header("x-infergate-attempts")),
            (503, "7", "1")
        );
        assert!(!answer.header("x-infergate-upstream").is_empty(), "it is the upstream's own: {}", answer.text());
    }
}

// The bound on attempts.

#[tokio::test]
async fn one_number_bounds_all_attempts_of_a_request_and_the_answer_tells_them() {
    let servers = [model_server().await, model_server().await, model_server().await];
    let times = "timeouts: {answer_ms: 60, first_token_ms: 60}";
    for attempts in [1, 2, 3, 5] {
        let pool = |name: &str, which: &[usize], retry: &str| {
            let urls: Vec<String> = which.iter().map(|n| format!("{{url: '{}'}}", servers[*n].url())).collect();
            format!(
                "  {name}: {{upstreams: [{}], {times}, health: {{enabled: false}}, breaker: {{failures: 0, requests_min: 1000000}}, retry: {{{retry}budget: 10, backoff_ms: 1}}}}\n",
                urls.join(", ")
            )
        };
        let mine = format!("attempts: {attempts}, ");
        let text = format!(
            "version: 1\nmodels:\n  - {{name: m, pool: one}}\n  - {{name: two, rename: m, pool: two}}\n  \
             - {{name: deep, rename: m, pool: one, fallbacks: [{{pool: two}}, {{pool: three}}]}}\n\
             pools:\n{}{}{}",
            pool("one", &[0], &mine),
            pool("two", &[0, 1], &mine),
            pool("three", &[0, 1, 2], "attempts: 20, ")
        );
        let gateway = Gateway::start(&text).await;
        let client = Client::h1();
        for fault in ["status=503", "status=429", "reset", "hang", "garbage", "cut,after=0"] {
            servers.iter().for_each(|server| set_faults(server, &[fault, "close-after"]));
            for (model, stream) in [("m", false), ("two", true), ("deep", false), ("deep", true)] {
                if fault.starts_with("cut") && !stream {
                    continue;
                }
                // A kept connection that breaks would bring one more request, for free.
                let unconnected = async || servers.iter().all(|server| server.open_connections() == 0);
                eventually("nothing is kept", SOON, unconnected).await;
                let before: usize = servers.iter().map(posts).sum();
                let body = chat(stream, 4).replace("\"m\"", &format!("\"{model}\""));
                let asked = [("x-infergate-attempts", "50"), ("x-stainless-retry-count", "9")];
                let answer = client.post_with(gateway.address, CHAT, &asked, body).await;
                assert_ne!(answer.status, 200, "{fault}");
                let seen = servers.iter().map(posts).sum::<usize>() - before;
                assert_eq!(seen, attempts, "{fault} {model} with {attempts}");
                assert_eq!(answer.header("x-infergate-attempts"), attempts.to_string(), "{fault} {model}");
            }
        }
    }
}

#[tokio::test]
async fn an_attempt_on_the_same_upstream_waits_first_and_longer_each_time() {
    let server = faulty_server(&["status=503"]).await;
    let gateway =
        Gateway::start(&policy(&[&server.url()], &format!("retry: {{attempts: 3, backoff_ms: 100}}\n{CALM}"))).await;
    for client in Client::both() {
        let start = Instant::now();
        let answer = ask(&client, &gateway, false).await;
        let took = start.elapsed();
        assert_eq!((answer.status, answer.header("x-infergate-attempts")), (503, "3"));
        // 100 to 200 ms, then 200 to 400 ms.
        assert!(took >= Duration::from_millis(300) && took < Duration::from_millis(2_000), "{took:?}");
    }
}

#[tokio::test]
async fn the_retry_budget_spares_a_pool_that_is_down_and_the_clients_get_its_own_answer() {
    let servers =
        [faulty_server(&["status=503,retry_after=9"]).await, faulty_server(&["status=503,retry_after=9"]).await];
    let urls = servers.each_ref().map(Simulated::url);
    let text = policy(&[&urls[0], &urls[1]], &format!("retry: {{attempts: 3, budget: 0.2, backoff_ms: 1}}\n{CALM}"));
    let gateway = Gateway::start(&text).await;
    let client = Client::h1();
    for _ in 0..100 {
        let answer = ask(&client, &gateway, false).await;
        assert_eq!((answer.status, answer.header("retry-after")), (503, "9"), "{}", answer.text());
        assert_ne!(answer.header("x-infergate-upstream"), "", "the upstream's own words: {}", answer.text());
    }
    let seen: usize = servers.iter().map(posts).sum();
    assert!((110..=125).contains(&seen), "100 requests and a fifth of it retries: {seen}");
    assert!(gateway.metric(r#"infergate_retries_refused_total{pool="p"}"#).await > 50.0);
}

// Breakers and health.

fn breaker(server: &Simulated) -> String {
    format!(r#"infergate_endpoint_breaker{{pool="p",upstream="{0}",address="{0}"}}"#, server.address())
}

#[tokio::test]
async fn a_breaker_opens_after_so_many_failures_in_a_row_and_says_when_to_come_back() {
    for (fault, retried) in [("status=500", ""), ("reset", ""), ("hang", ""), ("garbage", "")] {
        let server = faulty_server(&[fault, "close-after"]).await;
        let extra = format!(
            "{retried}timeouts: {{answer_ms: 60}}\nretry: {{attempts: 1}}\nbreaker: {{failures: 3, open_ms: 30000}}\nhealth: {{enabled: false}}"
        );
        let gateway = Gateway::start(&policy(&[&server.url()], &extra)).await;
        let client = Client::h1();
        for _ in 0..3 {
            assert_ne!(ask(&client, &gateway, false).await.code(), "no_upstream");
        }
        assert_eq!(gateway.metric(&breaker(&server)).await, 2.0, "{fault}");
        for client in Client::both() {
            let answer = ask(&client, &gateway, false).await;
            assert_eq!((answer.status, answer.code().as_str()), (503, "no_upstream"), "{fault}");
            let wait: u64 = answer.header("retry-after").parse().unwrap();
            assert!((25..=30).contains(&wait), "{wait}");
            assert_eq!((answer.header("x-infergate-attempts"), answer.header("x-should-retry")), ("0", "true"));
        }
        assert_eq!(posts(&server), 3, "{fault}: an open breaker lets nothing through");
    }
}

#[tokio::test]
async fn half_open_lets_one_request_try_and_its_success_closes_the_breaker() {
    let server = faulty_server(&["status=500"]).await;
    let extra = "retry: {attempts: 1}\nbreaker: {failures: 2, open_ms: 300}\nhealth: {enabled: false}";
    let gateway = Gateway::start(&policy(&[&server.url()], extra)).await;
    let client = Client::h1();
    for _ in 0..2 {
        ask(&client, &gateway, false).await;
    }
    eventually("it is half open", SOON, async || gateway.metric(&breaker(&server)).await == 1.0).await;
    set_faults(&server, &["slow-first=300"]);
    let mut running = JoinSet::new();
    for _ in 0..10 {
        let (client, address) = (client.clone(), gateway.address);
        running.spawn(async move { client.post(address, CHAT, chat(false, 1)).await.status });
    }
    let mut statuses = running.join_all().await;
    statuses.sort_unstable();
    assert_eq!(statuses, [&[200][..], &[503; 9]].concat(), "one tried and nine were spared");
    assert_eq!(posts(&server), 3);
    assert_eq!(gateway.metric(&breaker(&server)).await, 0.0);
    assert_eq!(ask(&client, &gateway, false).await.status, 200);
}

#[tokio::test]
async fn a_trial_that_fails_opens_the_breaker_again_for_longer() {
    let server = faulty_server(&["status=500"]).await;
    let extra =
        "retry: {attempts: 1}\nbreaker: {failures: 1, open_ms: 200, open_ms_max: 5000}\nhealth: {enabled: false}";
    let gateway = Gateway::start(&policy(&[&server.url()], extra)).await;
    let client = Client::h1();
    let mut open = Vec::new();
    for _ in 0..3 {
        assert_eq!(ask(&client, &gateway, false).await.status, 500);
        let start = Instant::now();
        eventually("half open", SOON, async || gateway.metric(&breaker(&server)).await == 1.0).await;
        open.push(start.elapsed().as_millis());
    }
    assert!((150..390).contains(&open[0]) && open[1] > 350 && open[2] > 750, "{open:?}");
}

#[tokio::test]
async fn a_client_that_leaves_during_the_trial_does_not_leave_the_breaker_half_open() {
    let server = faulty_server(&["status=500"]).await;
    let extra = "retry: {attempts: 1}\nbreaker: {failures: 1, open_ms: 100}\nhealth: {enabled: false}";
    let gateway = Gateway::start(&policy(&[&server.url()], extra)).await;
    for client in Client::both() {
        set_faults(&server, &["status=500"]);
        ask(&client, &gateway, false).await;
        eventually("half open", SOON, async || gateway.metric(&breaker(&server)).await == 1.0).await;
        set_faults(&server, &["hang,times=1"]);
        let trial = tokio::spawn({
            let (client, address) = (client.clone(), gateway.address);
            async move { client.post(address, CHAT, chat(false, 1)).await }
        });
        eventually("the trial runs", SOON, async || server.in_flight() == 1).await;
        trial.abort();
        eventually("the next one may try", SOON, async || ask(&client, &gateway, false).await.status == 200).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_of_4xx_open_no_breaker_are_not_asked_again_and_pass_untouched() {
    let (first, second) = (model_server().await, model_server().await);
    let gateway =
        in_order(&first.url(), &second.url(), "breaker: {failures: 1, requests_min: 1}\nhealth: {enabled: false}")
            .await;
    let mut clients = JoinSet::new();
    for _ in 0..8 {
        let address = gateway.address;
        clients.spawn(async move {
            let client = Client::h1();
            let mut lost = Vec::new();
            // 8 clients, 1,250 requests each: 10,000.
            for round in 0..1_250 {
                let status = [400, 401, 403, 404, 413, 422][round % 6];
                let fault = format!("status={status}");
                let answer = client.post_with(address, CHAT, &[("x-simulate-fault", &fault)], chat(false, 1)).await;
                if (answer.status, answer.header("x-infergate-attempts")) != (status, "1")
                    || !answer.text().contains("error")
                {
                    lost.push((status, answer.status, answer.text()));
                }
            }
            lost
        });
    }
    let lost: Vec<_> = clients.join_all().await.into_iter().flatten().collect();
    assert!(lost.is_empty(), "{} of them: {:?}", lost.len(), lost[0]);
    assert_eq!(posts(&second), 0);
    assert!(
        gateway
            .admin("/metrics")
            .await
            .text()
            .lines()
            .filter(|line| line.starts_with("infergate_endpoint_breaker{"))
            .all(|line| line.ends_with(" 0"))
    );
    assert_eq!(ask(&Client::h1(), &gateway, false).await.status, 200);
}

#[tokio::test]
async fn a_429_pauses_its_upstream_as_long_as_it_asked_and_no_longer() {
    for client in Client::both() {
        let server = faulty_server(&["status=429,retry_after=1,times=1"]).await;
        let gateway = Gateway::start(&policy(&[&server.url()], "health: {interval_ms: 50}")).await;
        let answer = ask(&client, &gateway, false).await;
        let start = Instant::now();
        assert_eq!(
            (answer.status, answer.header("retry-after"), answer.header("x-infergate-attempts")),
            (429, "1", "1")
        );
        let paused = ask(&client, &gateway, false).await;
        assert_eq!((paused.status, paused.code().as_str(), paused.header("retry-after")), (503, "no_upstream", "1"));
        eventually("it is over", SOON, async || ask(&client, &gateway, false).await.status == 200).await;
        let took = start.elapsed();
        assert!(took > Duration::from_millis(900) && took < Duration::from_millis(1_800), "{took:?}");
        assert_eq!(posts(&server), 2, "nothing was sent during the pause");
    }
}

#[tokio::test]
async fn a_pause_lasts_its_time_even_where_the_breaker_had_been_open_before() {
    let server = faulty_server(&["status=500,times=1"]).await;
    let extra = "retry: {attempts: 1}\nbreaker: {failures: 1, open_ms: 100}\nhealth: {interval_ms: 50}";
    let gateway = Gateway::start(&policy(&[&server.url()], extra)).await;
    let client = Client::h1();
    assert_eq!(ask(&client, &gateway, false).await.status, 500);
    eventually("half open", SOON, async || gateway.metric(&breaker(&server)).await == 1.0).await;
    set_faults(&server, &["status=429,retry_after=2,times=1"]);
    assert_eq!(ask(&client, &gateway, false).await.status, 429);
    let start = Instant::now();
    eventually("it is over", SOON, async || ask(&client, &gateway, false).await.status == 200).await;
    assert!(start.elapsed() > Duration::from_millis(1_900), "good health checks cut it to {:?}", start.elapsed());
}

#[tokio::test]
async fn while_one_upstream_pauses_after_a_429_the_others_serve_and_no_429_opens_a_breaker() {
    let (first, second) = (faulty_server(&["status=429,retry_after=60,times=1"]).await, model_server().await);
    let gateway = in_order(&first.url(), &second.url(), "breaker: {failures: 1}\nhealth: {enabled: false}").await;
    let client = Client::h1();
    let answer = ask(&client, &gateway, false).await;
    assert_eq!((answer.status, answer.header("x-infergate-attempts")), (200, "2"));
    for _ in 0..20 {
        assert_eq!(ask(&client, &gateway, false).await.header("x-infergate-attempts"), "1");
    }
    assert_eq!(posts(&first), 1);
    // Without Retry-After there is no pause either: each request asks again.
    let plain = faulty_server(&["status=429"]).await;
    let gateway =
        Gateway::start(&policy(&[&plain.url()], "retry: {attempts: 1}\nbreaker: {failures: 1, requests_min: 1}")).await;
    for _ in 0..100 {
        assert_eq!(ask(&client, &gateway, false).await.status, 429);
    }
    assert_eq!((posts(&plain), gateway.metric(&breaker(&plain)).await), (100, 0.0));
}

#[tokio::test]
async fn health_checks_take_an_upstream_out_and_bring_it_back() {
    for fault in ["status=500,path=/health", "hang,path=/health", "reset,path=/health", "status=429,path=/health"] {
        let (steady, sick) = (model_server().await, faulty_server(&[fault]).await);
        let health = "health: {interval_ms: 50, timeout_ms: 60, unhealthy_after: 2, healthy_after: 2}";
        let gateway = Gateway::start(&policy(&[&steady.url(), &sick.url()], health)).await;
        let level = format!(r#"infergate_endpoint_healthy{{pool="p",upstream="{0}",address="{0}"}}"#, sick.address());
        eventually("it is out", SOON, async || gateway.metric(&level).await == 0.0).await;
        let (client, before) = (Client::h1(), posts(&sick));
        for _ in 0..20 {
            assert_eq!(ask(&client, &gateway, false).await.status, 200);
        }
        assert_eq!(posts(&sick), before, "{fault}: out means no request");
        set_faults(&sick, &[]);
        eventually("it gets requests again", SOON, async || {
            ask(&client, &gateway, false).await;
            posts(&sick) > before
        })
        .await;
    }
}

#[tokio::test]
async fn a_server_without_a_health_path_is_well_as_long_as_it_answers() {
    let server = faulty_server(&["status=404,path=/health"]).await;
    let gateway = Gateway::start(&policy(&[&server.url()], "health: {interval_ms: 20, unhealthy_after: 1}")).await;
    eventually("it was asked", SOON, async || server.seen().iter().filter(|seen| seen.path == "/health").count() > 3)
        .await;
    assert_eq!(ask(&Client::h1(), &gateway, false).await.status, 200);
}

#[tokio::test]
async fn with_all_upstreams_out_a_503_says_when_to_return_and_one_good_probe_is_enough() {
    for (fault, health) in [("status=500,path=/", "unhealthy_after: 2"), ("status=500,path=/v1", "unhealthy_after: 2")]
    {
        let servers = [faulty_server(&[fault]).await, faulty_server(&[fault]).await];
        let urls = servers.each_ref().map(Simulated::url);
        // The breakers would stay open for long: the probe is what opens the way again.
        let extra = format!(
            "retry: {{backoff_ms: 0}}\nbreaker: {{failures: 2, open_ms: 60000}}\nhealth: {{interval_ms: 500, {health}}}"
        );
        let gateway = Gateway::start(&policy(&[&urls[0], &urls[1]], &extra)).await;
        let client = Client::h1();
        eventually("all are out", SOON, async || {
            let answer = ask(&client, &gateway, false).await;
            answer.status == 503
                && answer.code() == "no_upstream"
                && answer.header("retry-after").parse::<u64>().unwrap() >= 1
        })
        .await;
        servers.iter().for_each(|server| set_faults(server, &[]));
        let healed = Instant::now();
        eventually("requests are served", SOON, async || ask(&client, &gateway, false).await.status == 200).await;
        // The next probe comes within 500 ms; from then on it may take 1 s.
        assert!(healed.elapsed() < Duration::from_millis(1_500), "{:?}", healed.elapsed());
    }
}

// Kept connections.

#[tokio::test]
async fn an_upstream_that_closes_idle_connections_is_never_noticed() {
    let options = Options { models: vec!["m".to_owned()], keep_alive_ms: Some(10), ..Options::default() };
    let server = Simulated::start(options).await.unwrap();
    let gateway = Gateway::start(&policy(&[&server.url()], "retry: {attempts: 1}\nhealth: {enabled: false}")).await;
    for client in Client::both() {
        for round in 0..150 {
            let answer = ask(&client, &gateway, false).await;
            assert_eq!((answer.status, answer.header("x-infergate-attempts")), (200, "1"), "{}", answer.text());
            // Around the moment at which the server closes.
            tokio::time::sleep(Duration::from_micros(9_000 + round * 20)).await;
        }
    }
}

#[tokio::test]
async fn an_upstream_that_closes_after_each_answer_is_never_noticed() {
    let server = faulty_server(&["close-after"]).await;
    let gateway = Gateway::start(&policy(&[&server.url()], "retry: {attempts: 1}\nhealth: {enabled: false}")).await;
    for client in Client::both() {
        for _ in 0..200 {
            let answer = ask(&client, &gateway, false).await;
            assert_eq!((answer.status, answer.header("x-infergate-attempts")), (200, "1"), "{}", answer.text());
        }
    }
}

#[tokio::test]
async fn a_post_that_an_upstream_had_in_work_is_not_sent_again_for_free() {
    // The server takes the request on a kept connection, works on it, and dies.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let requests = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let counted = requests.clone();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let counted = counted.clone();
            tokio::spawn(async move {
                let mut buffer = vec![0; 8192];
                while read_request(&mut stream, &mut buffer).await {
                    if counted.fetch_add(1, std::sync::atomic::Ordering::Relaxed) % 2 == 1 {
                        return tokio::time::sleep(Duration::from_millis(1_500)).await;
                    }
                    stream.write_all(ANSWER).await.unwrap();
                }
            });
        }
    });
    let gateway = Gateway::start(&policy(&[&url], "retry: {attempts: 1}\nhealth: {enabled: false}")).await;
    let client = Client::h1();
    assert_eq!(ask(&client, &gateway, false).await.status, 200);
    let answer = ask(&client, &gateway, false).await;
    assert_eq!((answer.status, answer.code().as_str()), (502, "upstream_closed"));
    assert_eq!(requests.load(std::sync::atomic::Ordering::Relaxed), 2, "it saw two requests for two requests");
}

const ANSWER: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 11\r\n\r\n{\"ok\":true}";

/// Reads one request with a short body. False at the end of the connection.
async fn read_request(stream: &mut TcpStream, buffer: &mut [u8]) -> bool {
    let mut filled = 0;
    loop {
        match stream.read(&mut buffer[filled..]).await {
            Ok(0) | Err(_) => return false,
            Ok(read) => filled += read,
        }
        if message_length(&buffer[..filled]).is_some_and(|length| filled >= length) {
            return true;
        }
    }
}

/// The length of an HTTP/1 message, once its head is here.
fn message_length(bytes: &[u8]) -> Option<usize> {
    let head = bytes.windows(4).position(|window| window == b"\r\n\r\n")? + 4;
    let text = std::str::from_utf8(&bytes[..head]).unwrap().to_ascii_lowercase();
    let length = text.lines().find_map(|line| line.strip_prefix("content-length: ")).unwrap_or("0");
    Some(head + length.parse::<usize>().unwrap())
}

/// A server that answers at once and closes each connection, unannounced, at a random moment after a few answers.
async fn restless_server() -> (SocketAddr, JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let serving = tokio::spawn(async move {
        let mut seed = 7_u64;
        while let Ok((mut stream, _)) = listener.accept().await {
            stream.set_nodelay(true).unwrap();
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let (answers, linger_us) = (1 + (seed >> 60), (seed >> 33) % 2_000);
            tokio::spawn(async move {
                let mut buffer = vec![0; 4096];
                for _ in 0..answers {
                    if !read_request(&mut stream, &mut buffer).await || stream.write_all(ANSWER).await.is_err() {
                        return;
                    }
                }
                // Whatever comes in meanwhile is never read.
                if linger_us < 1_000 {
                    tokio::task::yield_now().await;
                } else {
                    tokio::time::sleep(Duration::from_micros(linger_us)).await;
                }
            });
        }
    });
    (address, serving)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_100_000_posts_to_an_upstream_that_closes_idle_connections_none_fails() {
    // The full number takes a minute in a debug build: INFERGATE_LONG=1 asks for it.
    let count = if std::env::var_os("INFERGATE_LONG").is_some() { 100_000 } else { 20_000 };
    let (upstream, _serving) = restless_server().await;
    let extra = "retry: {attempts: 1}\nhealth: {enabled: false}\nbreaker: {failures: 1}";
    let gateway = Gateway::start(&policy(&[&format!("http://{upstream}")], extra)).await;
    let body = chat(false, 1);
    let request = format!(
        "POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    let mut clients = JoinSet::new();
    for number in 0..16_u64 {
        let (address, request) = (gateway.address, request.clone());
        clients.spawn(async move {
            let mut stream = TcpStream::connect(address).await.unwrap();
            stream.set_nodelay(true).unwrap();
            let (mut buffer, mut lost) = (vec![0; 8192], Vec::new());
            for round in 0..count / 16 {
                stream.write_all(request.as_bytes()).await.unwrap();
                assert!(read_request(&mut stream, &mut buffer).await, "the gateway closed");
                if !buffer.starts_with(b"HTTP/1.1 200 ") {
                    lost.push(String::from_utf8_lossy(&buffer[..300]).into_owned());
                }
                if (round + number).is_multiple_of(16) {
                    tokio::time::sleep(Duration::from_micros((round * 37 + number * 211) % 3_000)).await;
                }
            }
            lost
        });
    }
    let lost: Vec<_> = clients.join_all().await.into_iter().flatten().collect();
    assert!(lost.is_empty(), "{} of {count}: {}", lost.len(), lost[0]);
    let name = format!(r#"infergate_attempts_total{{pool="p",upstream="{upstream}",result="stale"}}"#);
    assert!(gateway.metric(&name).await > 0.0, "no connection was found stale: the test is too easy");
}

// Isolation.

/// The 99th percentile of `count` requests' times.
async fn p99(client: &Client, gateway: &Gateway, model: &str, count: usize) -> Vec<Duration> {
    let body = chat(false, 1).replace("\"m\"", &format!("\"{model}\""));
    let mut running = JoinSet::new();
    for _ in 0..4 {
        let (client, address, body) = (client.clone(), gateway.address, body.clone());
        running.spawn(async move {
            let mut times = Vec::new();
            for _ in 0..count / 4 {
                let start = Instant::now();
                assert_eq!(client.post(address, CHAT, body.clone()).await.status, 200);
                times.push(start.elapsed());
            }
            times
        });
    }
    running.join_all().await.into_iter().flatten().collect()
}

fn percentile(mut times: Vec<Duration>, share: f64) -> Duration {
    times.sort_unstable();
    times[((times.len() - 1) as f64 * share) as usize]
}

#[tokio::test]
async fn an_upstream_that_hangs_does_not_slow_the_others() {
    let (well, hanging) = (faulty_server(&["slow-first=40"]).await, faulty_server(&["hang"]).await);
    let text = format!(
        "version: 1\nmodels: [{{name: m, pool: a}}, {{name: stuck, pool: b}}]\npools:\n  a: {{upstreams: [{{url: '{}'}}]}}\n  b: {{upstreams: [{{url: '{}'}}]}}\n",
        well.url(),
        hanging.url()
    );
    let gateway = Gateway::start(&text).await;
    let (client, stuck) = (Client::h1(), Client::h2());
    let (mut alone, mut beside) = (Vec::new(), Vec::new());
    // Turn by turn, so that what else the machine does hits both alike.
    for _ in 0..3 {
        alone.extend(p99(&client, &gateway, "m", 60).await);
        let mut running = JoinSet::new();
        for _ in 0..100 {
            let (client, address) = (stuck.clone(), gateway.address);
            running
                .spawn(async move { client.post(address, CHAT, chat(false, 1).replace("\"m\"", "\"stuck\"")).await });
        }
        eventually("they hang", SOON, async || hanging.in_flight() == 100).await;
        beside.extend(p99(&client, &gateway, "m", 60).await);
        running.abort_all();
        eventually("they are gone", SOON, async || hanging.in_flight() == 0).await;
    }
    let (alone, beside) = (percentile(alone, 0.98), percentile(beside, 0.98));
    assert!(beside < alone.mul_f64(1.05) + Duration::from_millis(15), "{alone:?} alone, {beside:?} beside");
}

#[tokio::test]
async fn within_a_pool_one_that_hangs_gets_few_requests_and_the_others_answer_at_once() {
    let (well, hanging) = (model_server().await, faulty_server(&["hang"]).await);
    let gateway = Gateway::start(&policy(&[&well.url(), &hanging.url()], "health: {enabled: false}")).await;
    let mut running = JoinSet::new();
    for n in 1..=60 {
        let address = gateway.address;
        running.spawn(async move { Client::h1().post(address, CHAT, chat(false, 1)).await.status });
        let settled = async || posts(&well) - well.in_flight() + hanging.in_flight() == n;
        eventually("it is answered, or it hangs", SOON, settled).await;
    }
    let stuck = hanging.in_flight();
    assert!(stuck <= 2, "{stuck} of 60 went to the one that hangs");
}
