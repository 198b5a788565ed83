//! A client that leaves: the upstream learns of it at once, whatever was asked and however far the answer was.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use http_body_util::BodyExt;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use crate::support::requests::{STREAMING, every_surface, passed_on, policy_for_every_surface, request};
use crate::support::wire::{Framing, Step, Wire, read_until};
use crate::support::{Client, Gateway, Outcome, Simulated, chat, eventually, model_server, policy};

const CHAT: &str = "/v1/chat/completions";
/// The promise.
const SOON: Duration = Duration::from_millis(250);

/// What became of the request with this id; `None` if it has not come.
fn outcome(server: &Simulated, id: &str) -> Option<Outcome> {
    let named = |headers: &http::HeaderMap| headers.get("x-test-id").is_some_and(|value| value == id);
    server.seen().iter().rev().find(|seen| named(&seen.headers)).map(|seen| seen.outcome)
}

async fn arrived(server: &Simulated, id: &str) {
    eventually(id, Duration::from_secs(10), || async { outcome(server, id).is_some() }).await;
}

/// Waits until the request with this id is over; its client must be the reason.
async fn told(server: &Simulated, id: &str) -> Duration {
    let took = eventually(id, Duration::from_secs(5), || async { outcome(server, id) != Some(Outcome::Running) }).await;
    assert_eq!(outcome(server, id), Some(Outcome::Disconnected), "{id}");
    took
}

/// Every surface, streaming and not where it can be, with a name.
fn everything() -> Vec<(&'static str, bool, String)> {
    let both = passed_on().flat_map(|row| [(row.path, false), (row.path, true)]);
    let possible = both.filter(|(path, stream)| !stream || STREAMING.contains(path));
    possible.map(|(path, stream)| (path, stream, format!("{}-{stream}", path.replace('/', "-")))).collect()
}

/// Times are measured on a machine that does other things too: a second try is allowed to show what is possible.
fn check_soon(times: &BTreeMap<String, Duration>) {
    let late: Vec<_> = times.iter().filter(|(_, took)| **took > SOON).collect();
    assert!(late.is_empty(), "{late:?}");
}

#[tokio::test]
async fn a_client_that_leaves_before_the_first_token_stops_the_upstream_on_every_surface() {
    let server = every_surface().await;
    for upstream in ["", ", http2: always"] {
        let gateway = Gateway::start(&policy_for_every_surface(&server.url(), upstream, "", "")).await;
        let mut times = BTreeMap::new();
        for (client, protocol) in Client::both().into_iter().zip(["h1", "h2"]) {
            for (path, stream, name) in everything() {
                let id = format!("before-{protocol}{}{name}", upstream.len());
                let (client, request) = (client.clone(), request(&gateway, path, stream, &id, "hang"));
                let asking = tokio::spawn(async move { client.try_send(request).await.map(|answer| answer.status) });
                arrived(&server, &id).await;
                asking.abort();
                times.insert(id.clone(), told(&server, &id).await);
            }
        }
        check_soon(&times);
        gateway.comes_to("infergate_requests_in_flight", 0.0).await;
        assert!(
            server.seen().last().unwrap().http2 != upstream.is_empty() || server.seen().last().unwrap().method == "GET"
        );
    }
}

/// Opens a request, reads the answer's first piece, leaves, and waits for the upstream to notice.
async fn leave_midway(
    gateway: &Gateway,
    server: &Simulated,
    client: &Client,
    path: &str,
    stream: bool,
    id: &str,
    fault: &str,
) -> Duration {
    let (head, mut body) = client.begin(request(gateway, path, stream, id, fault)).await.into_parts();
    assert_eq!(head.status, 200, "{id}");
    body.frame().await.unwrap().unwrap();
    assert_eq!(outcome(server, id), Some(Outcome::Running), "{id}");
    drop(body);
    told(server, id).await
}

#[tokio::test]
async fn a_client_that_leaves_mid_stream_stops_the_upstream_on_every_surface_that_streams() {
    let server = every_surface().await;
    for upstream in ["", ", http2: always"] {
        let gateway = Gateway::start(&policy_for_every_surface(&server.url(), upstream, "", "")).await;
        let mut times = BTreeMap::new();
        for (client, protocol) in Client::both().into_iter().zip(["h1", "h2"]) {
            for path in STREAMING {
                for fault in ["stall,after=3", "delay-between=20", "drip=1"] {
                    let id = format!("mid-{protocol}{}-{}-{}", upstream.len(), path.replace('/', "."), &fault[..4]);
                    times.insert(id.clone(), leave_midway(&gateway, &server, &client, path, true, &id, fault).await);
                }
            }
        }
        check_soon(&times);
    }
    eventually("no connection is left", SOON, || async { server.in_flight() == 0 }).await;
}

#[tokio::test]
async fn a_client_that_leaves_in_the_middle_of_an_answer_stops_the_upstream_on_every_surface() {
    let server = every_surface().await;
    let gateway = Gateway::start(&policy_for_every_surface(&server.url(), "", "", "")).await;
    let mut times = BTreeMap::new();
    for (path, stream, name) in everything().into_iter().filter(|(_, stream, _)| !stream) {
        let id = format!("answer{name}");
        times.insert(id.clone(), leave_midway(&gateway, &server, &Client::h2(), path, stream, &id, "stall").await);
        // Over HTTP/1 the first bytes of an answer whose length is known may wait for some more, so none is awaited.
        let id = format!("answer-h1{name}");
        let request = request(&gateway, path, stream, &id, "stall");
        let asking = tokio::spawn(async move { Client::h1().try_send(request).await.map(|answer| answer.status) });
        arrived(&server, &id).await;
        asking.abort();
        times.insert(id.clone(), told(&server, &id).await);
    }
    check_soon(&times);
}

#[tokio::test]
async fn a_client_that_leaves_in_the_middle_of_chunks_closes_the_upstreams_connection() {
    let wire = Wire::start(|_| {
        let said = [Framing::Chunked.head("application/json", 0), Framing::Chunked.piece(b"{\"half\":")];
        vec![Step::Say(said.concat().into()), Step::UntilGone]
    })
    .await;
    let gateway = Gateway::start(&policy(&[&wire.url()], "")).await;
    for (client, count) in Client::both().into_iter().zip(1..) {
        let mut body = client.open(gateway.address, CHAT, &[], chat(false, 1)).await.into_body();
        assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), "{\"half\":");
        assert_eq!(wire.gone(), count - 1);
        drop(body);
        let took = eventually("it is closed", Duration::from_secs(5), || async { wire.gone() == count }).await;
        assert!(took < SOON, "{took:?}");
    }
}

#[tokio::test]
async fn a_client_that_leaves_a_pass_through_path_stops_the_upstream() {
    let server = every_surface().await;
    let top = "passthrough: [{path: /v1/unheard, pool: p}]\n";
    let gateway = Gateway::start(&policy_for_every_surface(&server.url(), "", "", top)).await;
    for client in Client::both() {
        let request = http::Request::post(format!("http://{}/v1/unheard", gateway.address));
        let request =
            request.header("x-simulate-fault", "hang").header("x-test-id", "through").body("x".into()).unwrap();
        let asking = tokio::spawn(async move { client.try_send(request).await.map(|answer| answer.status) });
        arrived(&server, "through").await;
        asking.abort();
        let took = told(&server, "through").await;
        assert!(took < SOON, "{took:?}");
    }
}

#[tokio::test]
async fn a_client_that_closes_its_websocket_closes_the_upstreams() {
    let server = every_surface().await;
    let gateway = Gateway::start(&policy_for_every_surface(&server.url(), "", "", "")).await;
    let mut stream = TcpStream::connect(gateway.address).await.unwrap();
    let head = "GET /v1/realtime?model=m HTTP/1.1\r\nhost: x\r\nupgrade: websocket\r\nconnection: upgrade\r\nx-test-id: socket\r\nsec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
    stream.write_all(head.as_bytes()).await.unwrap();
    assert!(read_until(&mut stream, "\r\n\r\n").await.contains("101"));
    let health_checks = 1;
    assert!(server.open_connections() >= 1);
    drop(stream);
    let took = eventually("the socket closes", Duration::from_secs(5), || async {
        server.open_connections() <= health_checks && server.in_flight() == 0
    });
    assert!(took.await < SOON);
}

#[tokio::test]
async fn a_client_that_leaves_during_signs_of_life_stops_the_upstream() {
    let server = every_surface().await;
    let gateway =
        Gateway::start(&policy_for_every_surface(&server.url(), "", "", "requests: {heartbeat_ms: 50}\n")).await;
    for (client, protocol) in Client::both().into_iter().zip(["h1", "h2"]) {
        for fault in ["hang", "stall,after=1"] {
            let id = format!("beat-{protocol}-{}", &fault[..4]);
            let took = leave_midway(&gateway, &server, &client, CHAT, true, &id, fault).await;
            assert!(took < SOON, "{id} {took:?}");
        }
    }
}

#[tokio::test]
async fn a_client_that_leaves_gives_its_place_to_the_next() {
    let server = model_server().await;
    let gateway = Gateway::start(&policy(&[&server.url()], "concurrency: {max: 1, queue_ms: 5000}\n")).await;
    for client in Client::both() {
        for fault in ["hang", "stall,after=1"] {
            let (first, request) = (client.clone(), request(&gateway, CHAT, true, "first", fault));
            let held = tokio::spawn(async move { first.try_send(request).await.map(|answer| answer.status) });
            eventually("the first one runs", Duration::from_secs(5), || async { server.in_flight() == 1 }).await;
            let (second, address) = (client.clone(), gateway.address);
            let waiting = tokio::spawn(async move { second.post(address, CHAT, chat(false, 1)).await.status });
            eventually("the second one waits", Duration::from_secs(5), || async {
                gateway.metric("infergate_pool_waiting{pool=\"p\"}").await == 1.0
            })
            .await;
            held.abort();
            let left = Instant::now();
            assert_eq!(waiting.await.unwrap(), 200);
            assert!(left.elapsed() < Duration::from_millis(500), "{:?}", left.elapsed());
        }
    }
    assert!(
        gateway.metric("infergate_requests_total{surface=\"/v1/chat/completions\",outcome=\"client_closed\"}").await
            >= 4.0
    );
}

#[tokio::test]
async fn a_client_that_leaves_the_queue_is_never_asked_for() {
    let server = model_server().await;
    let gateway = Gateway::start(&policy(&[&server.url()], "concurrency: {max: 1, queue_ms: 5000}\n")).await;
    for client in Client::both() {
        let (first, held_request) = (client.clone(), request(&gateway, CHAT, true, "held", "hang"));
        let held = tokio::spawn(async move { first.try_send(held_request).await.map(|answer| answer.status) });
        eventually("the first one runs", Duration::from_secs(5), || async { server.in_flight() == 1 }).await;
        let (second, queued) = (client.clone(), request(&gateway, CHAT, false, "queued", ""));
        let waiting = tokio::spawn(async move { second.try_send(queued).await.map(|answer| answer.status) });
        let queue = || async { gateway.metric("infergate_pool_waiting{pool=\"p\"}").await };
        eventually("the second one waits", Duration::from_secs(5), || async { queue().await == 1.0 }).await;
        waiting.abort();
        eventually("it is forgotten", Duration::from_secs(5), || async { queue().await == 0.0 }).await;
        held.abort();
        assert_eq!(client.post(gateway.address, CHAT, chat(false, 1)).await.status, 200);
    }
    assert_eq!(outcome(&server, "queued"), None);
}

#[tokio::test]
async fn with_drain_the_answer_is_read_to_its_end_without_its_client() {
    let server = every_surface().await;
    let top = "requests: {on_disconnect: drain}\n";
    let gateway = Gateway::start(&policy_for_every_surface(&server.url(), "", "", top)).await;
    for (client, protocol) in Client::both().into_iter().zip(["h1", "h2"]) {
        for (path, stream) in [(CHAT, true), ("/v1/messages", true), (CHAT, false)] {
            let id = format!("drain-{protocol}-{}-{stream}", path.replace('/', "."));
            let fault = if stream { "delay-between=15" } else { "drip=3" };
            let mut body = client.begin(request(&gateway, path, stream, &id, fault)).await.into_body();
            body.frame().await.unwrap().unwrap();
            drop(body);
            eventually(&id, Duration::from_secs(10), || async { outcome(&server, &id) != Some(Outcome::Running) })
                .await;
            assert_eq!(outcome(&server, &id), Some(Outcome::Completed), "{id}");
        }
    }
    eventually("all is settled", SOON, || async { gateway.metric("infergate_requests_in_flight").await == 0.0 }).await;
    assert!(
        gateway.metric("infergate_requests_total{surface=\"/v1/chat/completions\",outcome=\"client_closed\"}").await
            >= 4.0
    );
}

#[tokio::test]
async fn with_drain_an_answer_that_has_not_begun_is_waited_for_too() {
    let server = every_surface().await;
    let top = "requests: {on_disconnect: drain}\n";
    let gateway = Gateway::start(&policy_for_every_surface(&server.url(), "", "", top)).await;
    for stream in [true, false] {
        let id = format!("early-{stream}");
        let client = Client::h1();
        let answer = client.begin(request(&gateway, CHAT, stream, &id, "slow-first=400"));
        let left = tokio::time::timeout(Duration::from_millis(100), answer).await;
        assert!(left.is_err(), "it has not begun");
        eventually(&id, Duration::from_secs(10), || async { outcome(&server, &id) == Some(Outcome::Completed) }).await;
    }
    eventually("all is settled", SOON, || async { gateway.metric("infergate_requests_in_flight").await == 0.0 }).await;
}

#[tokio::test]
async fn with_drain_an_answer_that_does_not_end_is_left_after_a_while() {
    let server = every_surface().await;
    let top = "requests: {on_disconnect: drain, drain_ms: 400}\n";
    let gateway = Gateway::start(&policy_for_every_surface(&server.url(), "", "", top)).await;
    for (client, protocol) in Client::both().into_iter().zip(["h1", "h2"]) {
        for fault in ["stall,after=2", "delay-between=150"] {
            let id = format!("long-{protocol}-{}", &fault[..4]);
            let took = leave_midway(&gateway, &server, &client, CHAT, true, &id, fault).await;
            assert!((Duration::from_millis(380)..Duration::from_millis(750)).contains(&took), "{id} {took:?}");
        }
    }
}

#[tokio::test]
async fn a_hundred_clients_that_leave_at_once_all_stop_their_upstream() {
    let server = model_server().await;
    let gateway = Gateway::start(&policy(&[&server.url()], "")).await;
    for client in Client::both() {
        let mut asking = tokio::task::JoinSet::new();
        for number in 0..100 {
            let fault = if number % 2 == 0 { "hang" } else { "stall,after=1" };
            let (client, request) = (client.clone(), request(&gateway, CHAT, number % 3 > 0, "crowd", fault));
            asking.spawn(async move { client.try_send(request).await.map(|answer| answer.status) });
        }
        eventually("they hang", Duration::from_secs(10), || async { server.in_flight() >= 100 }).await;
        drop(asking);
        let took = eventually("all are over", Duration::from_secs(5), || async { server.in_flight() == 0 }).await;
        assert!(took < SOON, "{took:?}");
    }
}
