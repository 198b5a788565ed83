//! How the process begins, ends, and hands over to the next one.

use std::time::{Duration, Instant};

use http_body_util::BodyExt;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::support::http::post;
use crate::support::{
    Client, Gateway, Journal, Load, Options, Simulated, chat, eventually, faulty_server, model_server, policy,
};

const SOON: Duration = Duration::from_secs(15);

/// A server that says 20 tokens a second.
async fn slow_server() -> Simulated {
    Simulated::start(Options { models: vec!["m".to_owned()], tokens_per_second: 20.0, ..Options::default() })
        .await
        .unwrap()
}

async fn gateway(server: &Simulated, drain_delay_ms: u64, drain_ms: u64) -> Gateway {
    let settings = format!("threads: 2\nshutdown: {{drain_delay_ms: {drain_delay_ms}, drain_ms: {drain_ms}}}\n");
    Gateway::with(&policy(&[&server.url()], ""), &settings, &[]).await
}

#[tokio::test]
async fn operators_see_that_it_lives_is_ready_and_what_it_measures() {
    let server = model_server().await;
    let gateway = Gateway::start(&policy(&[&server.url()], "")).await;
    Client::h1().post(gateway.address, "/v1/chat/completions", chat(false, 1)).await;
    gateway.comes_to(r#"infergate_requests_total{surface="/v1/chat/completions",outcome="ok"}"#, 1.0).await;
    for client in Client::both() {
        for path in ["/livez", "/readyz"] {
            let answer = client.get(gateway.admin, path).await;
            assert_eq!((answer.status, answer.text().as_str()), (200, "ok\n"), "{path}");
        }
        let page = client.get(gateway.admin, "/metrics").await;
        assert!(page.header("content-type").starts_with("application/openmetrics-text"));
        assert!(page.text().ends_with("# EOF\n"));
        assert!(
            page.text().contains(r#"infergate_requests_total{surface="/v1/chat/completions",outcome="ok"} 1"#),
            "{}",
            page.text()
        );
        let upstreams = client.get(gateway.admin, "/admin/upstreams").await.json();
        assert_eq!(
            (&upstreams["endpoints"][0]["healthy"], &upstreams["endpoints"][0]["breaker"]),
            (&true.into(), &"closed".into())
        );
        let lost = client.get(gateway.admin, "/").await;
        assert!(lost.status == 404 && lost.text().contains("GET /readyz"), "the way is told: {}", lost.text());
        let answer = client.post(gateway.admin, "/metrics", "").await;
        assert_eq!((answer.status, answer.header("allow")), (405, "GET"));
    }
}

#[tokio::test]
async fn liveness_depends_on_no_upstream() {
    let gateway = Gateway::start(&policy(&["http://127.0.0.1:1"], "")).await;
    assert_eq!(gateway.admin("/livez").await.status, 200);
    assert_eq!(gateway.admin("/readyz").await.status, 200);
    assert_eq!(Client::h1().get(gateway.address, "/health").await.status, 200);
}

#[tokio::test]
async fn readiness_fails_first_while_requests_are_still_served() {
    let server = model_server().await;
    let mut gateway = gateway(&server, 1_500, 10_000).await;
    gateway.signal("TERM");
    eventually("readiness fails", Duration::from_secs(1), || async { gateway.admin("/readyz").await.status == 503 })
        .await;
    assert_eq!(gateway.admin("/livez").await.status, 200);
    assert_eq!(gateway.admin("/metrics").await.status, 200);
    for client in Client::both() {
        let answer = client.post(gateway.address, "/v1/chat/completions", chat(true, 2)).await;
        assert!(answer.status == 200 && answer.whole, "a new connection is served: {}", answer.text());
        assert_eq!(client.get(gateway.address, "/health").await.status, 503, "the clients' port says it too");
    }
    assert_eq!(gateway.ended(SOON).await, Some(0));
}

#[tokio::test]
async fn on_the_way_down_connections_are_closed_after_their_answer() {
    let server = model_server().await;
    let gateway = gateway(&server, 1_500, 10_000).await;
    let mut stream = TcpStream::connect(gateway.address).await.unwrap();
    let body = chat(false, 1);
    let request =
        format!("POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n{body}", body.len());
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut buffer = vec![0; 64 << 10];
    let read = stream.read(&mut buffer).await.unwrap();
    let first = String::from_utf8_lossy(&buffer[..read]).to_ascii_lowercase();
    assert!(first.starts_with("http/1.1 200") && !first.contains("connection: close"), "{first}");
    gateway.signal("TERM");
    eventually("readiness fails", Duration::from_secs(1), || async { gateway.admin("/readyz").await.status == 503 })
        .await;
    // The connection is from before.
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut rest = Vec::new();
    tokio::time::timeout(SOON, stream.read_to_end(&mut rest)).await.unwrap().unwrap();
    let second = String::from_utf8_lossy(&rest).to_ascii_lowercase();
    assert!(second.starts_with("http/1.1 200") && second.contains("connection: close"), "{second}");
}

#[tokio::test]
async fn on_the_way_down_http2_is_told_to_go_away() {
    let server = model_server().await;
    let gateway = gateway(&server, 100, 10_000).await;
    let mut stream = TcpStream::connect(gateway.address).await.unwrap();
    stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
    let mut said = vec![0; 9];
    stream.read_exact(&mut said).await.unwrap();
    assert_eq!(said[3], 4, "its settings come first");
    gateway.signal("TERM");
    tokio::time::timeout(SOON, stream.read_to_end(&mut said)).await.unwrap().unwrap();
    let mut frames = Vec::new();
    let mut rest = &said[..];
    while rest.len() >= 9 {
        let length = usize::from(rest[1]) << 8 | usize::from(rest[2]);
        frames.push((rest[3], rest[9..9 + length].to_vec()));
        rest = &rest[9 + length..];
    }
    let goaways: Vec<&[u8]> = frames.iter().filter(|(kind, _)| *kind == 7).map(|(_, payload)| &payload[..]).collect();
    assert!(!goaways.is_empty(), "{frames:?}");
    assert!(goaways.iter().all(|payload| payload[4..8] == [0; 4]), "without an error: {goaways:?}");
}

#[tokio::test]
async fn an_idle_process_ends_at_once() {
    let server = model_server().await;
    let mut gateway = gateway(&server, 0, 300_000).await;
    // Kept connections are no reason to stay.
    for client in Client::both() {
        client.post(gateway.address, "/v1/chat/completions", chat(false, 1)).await;
    }
    let start = Instant::now();
    gateway.signal("TERM");
    assert_eq!(gateway.ended(Duration::from_secs(5)).await, Some(0));
    assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
}

#[tokio::test]
async fn streams_finish_on_the_way_down() {
    let server = slow_server().await;
    let mut gateway = gateway(&server, 0, 30_000).await;
    let mut open = Vec::new();
    for client in Client::both() {
        open.push(client.open(gateway.address, "/v1/chat/completions", &[], chat(true, 30)).await);
    }
    let client = Client::h1();
    let whole = client.post(gateway.address, "/v1/chat/completions", chat(false, 30));
    let start = Instant::now();
    let (whole, ()) = tokio::join!(whole, async {
        eventually("all three run", SOON, || async { server.in_flight() == 3 }).await;
        gateway.signal("TERM");
    });
    assert!(whole.status == 200 && whole.whole);
    for answer in open {
        let text = answer.into_body().collect().await.unwrap().to_bytes();
        assert!(text.ends_with(b"data: [DONE]\n\n"), "{text:?}");
    }
    assert_eq!(gateway.ended(Duration::from_secs(2)).await, Some(0), "and then it ends at once");
    assert!(start.elapsed() >= Duration::from_millis(1_000), "they were long: {:?}", start.elapsed());
}

#[tokio::test]
async fn what_does_not_finish_in_time_is_cut_and_still_settles() {
    let server = slow_server().await;
    let settings = "threads: 2\nshutdown: {drain_delay_ms: 0, drain_ms: 1000}\n";
    let mut gateway = Gateway::spawn(&policy(&[&server.url()], ""), settings, &[], &[("INFERGATE_LOG", "debug")]);
    gateway.ready().await;
    let mut open = Vec::new();
    for client in Client::both() {
        open.push(client.open(gateway.address, "/v1/chat/completions", &[], chat(true, 2_000)).await);
    }
    let start = Instant::now();
    gateway.signal("TERM");
    for answer in open {
        let body = tokio::time::timeout(SOON, answer.into_body().collect()).await.unwrap();
        assert!(body.is_err(), "a cut stream has no clean end");
    }
    gateway.ended(Duration::from_secs(5)).await;
    assert!(start.elapsed() >= Duration::from_millis(900), "{:?}", start.elapsed());
    let log = gateway.log();
    assert!(log.contains(r#""left":2"#), "they are counted: {log}");
    let settled = log.lines().filter(|line| line.contains("request ended") && line.contains("aborted")).count();
    assert_eq!(settled, 2, "{log}");
    eventually("the upstream is told", SOON, || async { server.in_flight() == 0 }).await;
}

#[tokio::test]
async fn nothing_is_lost_when_it_is_told_to_go_down_under_load() {
    let server = model_server().await;
    let mut gateway = gateway(&server, 1_500, 10_000).await;
    let load = Load::start(gateway.address, 4);
    tokio::time::sleep(Duration::from_millis(300)).await;
    gateway.signal("TERM");
    // As a load balancer would: it sees that readiness fails, and some time later it sends nothing more.
    eventually("readiness fails", Duration::from_secs(1), || async { gateway.admin("/readyz").await.status == 503 })
        .await;
    tokio::time::sleep(Duration::from_millis(700)).await;
    let tally = load.stop().await;
    assert!(tally.lost.is_empty() && tally.unconnected == 0 && tally.whole > 20, "{tally:?}");
    assert_eq!(gateway.ended(SOON).await, Some(0));
}

#[tokio::test]
async fn what_runs_when_it_is_interrupted_is_on_record_and_the_journal_is_closed() {
    let server = faulty_server(&["stall"]).await;
    let mut gateway = gateway(&server, 300, 10_000).await;
    let held = Client::h1().begin(post(gateway.address, "/v1/chat/completions", &[], chat(true, 20))).await;
    gateway.signal("INT");
    gateway.ended(SOON).await;
    drop(held);
    let journal = Journal::of(&gateway);
    let outcomes: Vec<_> = journal.of_kind("request").iter().map(|record| record["outcome"].clone()).collect();
    assert_eq!(outcomes, ["aborted"]);
    journal.proved();
}

#[tokio::test]
async fn clients_that_never_stop_only_find_nobody_home() {
    let server = model_server().await;
    let mut gateway = gateway(&server, 300, 10_000).await;
    let load = Load::start(gateway.address, 2);
    tokio::time::sleep(Duration::from_millis(200)).await;
    gateway.signal("TERM");
    assert_eq!(gateway.ended(SOON).await, Some(0));
    let tally = load.stop().await;
    assert!(tally.whole > 0 && tally.unconnected > 0, "{tally:?}");
    // What the kernel had connected and nobody had accepted yet is reset when the listener closes; no more than that:
    // every request that came to the model server was answered to its end.
    let reset = tally.lost.iter().all(|error| error.contains("ConnectionReset"));
    assert!(reset && tally.lost.len() <= 4, "{tally:?}");
    let asked = server.seen().iter().filter(|seen| seen.path != "/health").count() as u64;
    assert_eq!(asked, tally.whole, "{tally:?}");
}

#[tokio::test]
async fn an_upgrade_under_load_loses_nothing() {
    let (fast, slow) = (model_server().await, slow_server().await);
    let text = format!(
        "version: 1\nmodels: [{{name: m, pool: p}}, {{name: slow, pool: q, rename: m}}]\npools:\n  p: {{upstreams: [{{url: '{}'}}]}}\n  q: {{upstreams: [{{url: '{}'}}]}}\n",
        fast.url(),
        slow.url()
    );
    let sockets = tempfile::tempdir().unwrap();
    let settings = format!(
        "threads: 2\nupgrade_socket: {}\nshutdown: {{drain_delay_ms: 0, drain_ms: 60000}}\n",
        sockets.path().join("upgrade.sock").display()
    );
    let mut gateway = Gateway::with(&text, &settings, &[]).await;
    let long = chat(true, 160).replace("\"m\"", "\"slow\"");
    let stream = Client::h1().open(gateway.address, "/v1/chat/completions", &[], long).await;
    let load = Load::start(gateway.address, 3);
    let admin = tokio::spawn({
        let address = gateway.admin;
        async move {
            let mut failed = 0;
            for _ in 0..300 {
                let answer = Client::h1().try_get(address, "/livez").await;
                failed += u32::from(answer.is_none_or(|answer| answer.status != 200));
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            failed
        }
    });
    let next = gateway.upgrade();
    tokio::time::sleep(Duration::from_millis(500)).await;
    gateway.signal("QUIT");
    // The stream is on the old process, which stays for it and then ends.
    let body = stream.into_body().collect().await.unwrap().to_bytes();
    assert!(body.ends_with(b"data: [DONE]\n\n"), "{body:?}");
    assert_eq!(gateway.ended(Duration::from_secs(30)).await, Some(0));
    assert_eq!(admin.await.unwrap(), 0, "the admin port was always there");
    let before = fast.seen().len();
    eventually("the new process serves", SOON, || async { fast.seen().len() > before || fast.seen().len() == 1_000 })
        .await;
    let tally = load.stop().await;
    assert!(tally.lost.is_empty() && tally.unconnected == 0 && tally.whole > 50, "{tally:?}");
    // Only the new one is left, and it answers on both ports.
    assert_eq!(Client::h2().post(gateway.address, "/v1/chat/completions", chat(false, 1)).await.status, 200);
    assert_eq!(gateway.admin("/readyz").await.status, 200);
    drop(next);
}

#[tokio::test]
async fn an_upgrade_without_a_socket_is_ignored() {
    let server = model_server().await;
    let gateway = Gateway::start(&policy(&[&server.url()], "")).await;
    gateway.signal("QUIT");
    eventually("it says so", SOON, || async { gateway.log().contains("upgrade_socket") }).await;
    assert_eq!(Client::h1().post(gateway.address, "/v1/chat/completions", chat(false, 1)).await.status, 200);
    assert_eq!(gateway.admin("/readyz").await.status, 200);
}

#[tokio::test]
async fn an_interrupt_ends_it_without_ado() {
    let server = slow_server().await;
    let mut gateway = gateway(&server, 60_000, 60_000).await;
    let _open = Client::h1().open(gateway.address, "/v1/chat/completions", &[], chat(true, 2_000)).await;
    gateway.signal("TERM");
    eventually("it goes down", SOON, || async { gateway.admin("/readyz").await.status == 503 }).await;
    gateway.signal("INT");
    let start = Instant::now();
    gateway.ended(Duration::from_secs(5)).await;
    assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
}
