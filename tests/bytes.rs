//! Bytes: what the client sent is what the upstream gets, and the other way; and nobody can make us hold too many.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::{Body, Frame};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::support::wire::{EVENTS, Framing, Step, Wire, read_until, sha256};
use crate::support::{Client, Gateway, chat, eventually, faulty_server, model_server, policy, raw};

const CHAT: &str = "/v1/chat/completions";
const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;
const YES: &str = r#"{"ok":true}"#;

/// A chat request of exactly `size` bytes, no two blocks of it alike.
fn sized(size: usize) -> Bytes {
    let (start, end) = (r#"{"messages":[{"role":"user","content":""#, r#""}],"model":"m"}"#);
    let filling = size - start.len() - end.len();
    let blocks: String = (0..=filling / 64).map(|number| format!("{number:064x}")).collect();
    let body = [start, &blocks[..filling], end].concat();
    assert_eq!(body.len(), size);
    body.into()
}

async fn yes() -> Wire {
    Wire::start(|_| Framing::Length.answer("application/json", &Bytes::from(YES), 99)).await
}

/// A gateway that asks `first`, which says no, and then `second`.
async fn failing_over(first: &Wire, second: &Wire) -> Gateway {
    let upstream = |wire: &Wire, zone: &str| format!("{{url: '{}', zone: {zone}}}", wire.url());
    let text = format!(
        "version: 1\nmodels: [{{name: m, pool: p}}]\npools:\n  p:\n    upstreams: [{}, {}]\n    breaker: {{failures: 0, failure_ratio: 1.0, requests_min: 1000000}}\n    retry: {{budget: 10.0}}\n",
        upstream(first, "here"),
        upstream(second, "there")
    );
    Gateway::with(&text, "threads: 2\nzone: here\n", &[]).await
}

async fn unavailable() -> Wire {
    Wire::saying("HTTP/1.1 503 Service Unavailable\r\ncontent-length: 2\r\ncontent-type: application/json\r\n\r\n{}")
        .await
}

/// A body whose length is not told before.
struct Pieces(VecDeque<Bytes>);

impl Body for Pieces {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Ready(self.0.pop_front().map(|piece| Ok(Frame::data(piece))))
    }
}

/// Posts in HTTP/2 without a length; returns status and body.
async fn post_unsized(address: SocketAddr, body: &Bytes, size: usize) -> (u16, Bytes) {
    let stream = TcpStream::connect(address).await.unwrap();
    stream.set_nodelay(true).unwrap();
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    let pieces = body.chunks(size).map(Bytes::copy_from_slice).collect();
    let request = http::Request::post(format!("http://{address}{CHAT}")).header("content-type", "application/json");
    let answer = sender.send_request(request.body(Pieces(pieces)).unwrap()).await.unwrap();
    let status = answer.status().as_u16();
    (status, answer.into_body().collect().await.map(|body| body.to_bytes()).unwrap_or_default())
}

/// A head in HTTP/1.1, with more headers, each with its line end.
fn head(path: &str, headers: &str) -> String {
    format!("POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n{headers}\r\n")
}

/// Posts in chunks of `size` bytes that are written by hand; returns the whole answer.
async fn post_chunked(address: SocketAddr, body: &Bytes, size: usize) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.set_nodelay(true).unwrap();
    stream.write_all(head(CHAT, "transfer-encoding: chunked\r\n").as_bytes()).await.unwrap();
    for piece in body.chunks(size) {
        stream.write_all(&Framing::Chunked.piece(piece)).await.unwrap();
    }
    stream.write_all(b"0\r\n\r\n").await.unwrap();
    read_until(&mut stream, YES).await
}

const SIZES: [usize; 10] =
    [32 * KIB - 1, 32 * KIB, 32 * KIB + 1, 64 * KIB - 1, 64 * KIB, 64 * KIB + 1, 128 * KIB, MIB, 4 * MIB, 10 * MIB];

#[tokio::test]
async fn a_body_of_any_size_reaches_the_upstream_unchanged_after_a_failover() {
    bodies_of(&SIZES).await;
}

#[tokio::test]
async fn a_body_of_32_mib_reaches_the_upstream_unchanged_after_a_failover() {
    bodies_of(&[32 * MIB]).await;
}

async fn bodies_of(sizes: &[usize]) {
    let (first, second) = (unavailable().await, yes().await);
    let gateway = failing_over(&first, &second).await;
    for &size in sizes {
        let body = sized(size);
        for client in Client::both() {
            let answer = client.post(gateway.address, CHAT, body.clone()).await;
            assert_eq!((answer.status, answer.text().as_str()), (200, YES), "{size}");
            assert_eq!(answer.header("x-infergate-attempts"), "2", "{size}");
        }
        let answer = post_chunked(gateway.address, &body, 100_003).await;
        assert!(answer.starts_with("HTTP/1.1 200 ") && answer.contains("x-infergate-attempts: 2"), "{size}: {answer}");
        assert_eq!(post_unsized(gateway.address, &body, 50_001).await, (200, Bytes::from(YES)), "{size}");
        let sha = sha256(&body);
        for server in [&first, &second] {
            let heard = server.heard();
            assert!(heard.iter().rev().take(4).all(|heard| heard.sha256 == sha), "{size}");
            let length = heard.last().unwrap().header("content-length").parse();
            assert_eq!(length, Ok(size));
        }
    }
    assert_eq!((first.heard().len(), second.heard().len()), (4 * sizes.len(), 4 * sizes.len()));
}

#[tokio::test]
async fn chunks_of_one_byte_make_the_same_body() {
    let server = yes().await;
    let gateway = Gateway::start(&policy(&[&server.url()], "")).await;
    let body = sized(3000);
    for size in [1, 2, 7, 2999] {
        assert!(post_chunked(gateway.address, &body, size).await.starts_with("HTTP/1.1 200 "), "{size}");
        // Very many very small frames are a flood in HTTP/2, and are refused as one.
        assert_eq!(post_unsized(gateway.address, &body, size.max(100)).await.0, 200, "{size}");
    }
    assert_eq!(server.heard().len(), 8);
    assert!(server.heard().iter().all(|heard| heard.body == body));
}

#[tokio::test]
async fn an_answer_of_any_size_reaches_the_client_unchanged() {
    let bodies: Vec<Bytes> = [2 * MIB, 5 * MIB, 50 * MIB].into_iter().map(sized).collect();
    let served = bodies.clone();
    let wire = Wire::start(move |heard| {
        let asked: Vec<usize> = heard.header("x-ask").split(' ').map(|word| word.parse().unwrap()).collect();
        Framing::ALL[asked[1]].answer("application/json", &served[asked[0]], 300_000)
    })
    .await;
    let gateway = Gateway::start(&policy(&[&wire.url()], "")).await;
    for client in Client::both() {
        for (index, framing) in (0..bodies.len()).flat_map(|index| (0..3).map(move |framing| (index, framing))) {
            let ask = format!("{index} {framing}");
            let answer = client.post_with(gateway.address, CHAT, &[("x-ask", &ask)], chat(false, 1)).await;
            assert!(answer.whole && answer.body == bodies[index], "{ask}: {} bytes", answer.body.len());
            let told = Framing::ALL[framing] == Framing::Length;
            assert_eq!(answer.headers.contains_key("content-length"), told, "{ask}");
        }
    }
}

/// A body that no writer of JSON would write the same way twice.
const ODD: &str = "{ \"unknown\" : {\"deep\":[1.0,1.00,1e+2,-0,12345678901234567890123,\"\\u00e9\\/\"]},\t\"model\":\"m\",\r\n \"Model\":\"x\",\
    \"chat_template_kwargs\":{\"enable_thinking\":false,\"model\":\"inner\"},\"extra_body\":{},\"messages\":[{\"role\":\"user\",\"content\":\"\u{1F600}\",\
    \"reasoning_content\":null}],\"a\":1,\"a\":2,\"temperature\":0.10 , \"z\":\"\"}\n";

#[tokio::test]
async fn what_nobody_reads_survives_both_ways() {
    let vendor = "{ \"id\":null,\"usage\":{\"total_tokens\":1.0,\"vendor\":1e3},\"choices\":[{\"message\":{\"reasoning_content\":\"\\u4e2d\"}}],\t\"x\":0.10}\n";
    let wire = Wire::start(move |_| Framing::Length.answer("application/json", &Bytes::from(vendor), 9999)).await;
    let gateway = Gateway::start(&policy(&[&wire.url()], "")).await;
    for client in Client::both() {
        assert_eq!(client.post(gateway.address, CHAT, ODD).await.text(), vendor);
    }
    assert!(wire.heard().iter().all(|heard| heard.body == ODD));
}

#[tokio::test]
async fn a_renamed_model_changes_its_own_bytes_and_no_others() {
    let wire = yes().await;
    let text = format!(
        "version: 1\nmodels: [{{name: m, pool: p, rename: 'org/\"n\u{e4}me\"'}}]\npools:\n  p:\n    upstreams: [{{url: '{}'}}]\n",
        wire.url()
    );
    let gateway = Gateway::start(&text).await;
    for client in Client::both() {
        assert_eq!(client.post(gateway.address, CHAT, ODD).await.status, 200);
    }
    let expected = ODD.replacen("\"model\":\"m\"", "\"model\":\"org/\\\"n\u{e4}me\\\"\"", 1);
    for heard in wire.heard() {
        assert_eq!(String::from_utf8_lossy(&heard.body), expected);
        assert_eq!(heard.header("content-length"), expected.len().to_string());
    }
}

#[tokio::test]
async fn a_form_with_a_file_reaches_the_upstream_unchanged_and_its_model_can_be_renamed() {
    let wire = yes().await;
    let text = format!(
        "version: 1\nmodels: [{{name: m, pool: p}}, {{name: n, pool: p, rename: whisper}}]\npools:\n  p:\n    upstreams: [{{url: '{}'}}]\n",
        wire.url()
    );
    let gateway = Gateway::start(&text).await;
    let file: Vec<u8> = (0..200_000_u32).map(|number| (number % 251) as u8).collect();
    let form = |model: &str| {
        let start = "--b\r\nContent-Disposition: form-data; name=\"file\"; filename=\"a\"\r\n\r\n".as_bytes();
        let model = format!("\r\n--b\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\n{model}\r\n--b--\r\n");
        Bytes::from([start, file.as_slice(), model.as_bytes()].concat())
    };
    for (client, (sent, expected)) in
        Client::both().iter().flat_map(|client| [("m", "m"), ("n", "whisper")].map(|pair| (client, pair)))
    {
        let request = http::Request::post(format!("http://{}/v1/audio/transcriptions", gateway.address));
        let request = request.header("content-type", "multipart/form-data; boundary=b");
        let answer = client.send(request.body(Full::new(form(sent))).unwrap()).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        assert!(wire.heard().last().unwrap().body == form(expected), "{sent}");
    }
}

#[tokio::test]
async fn a_field_that_decides_and_stands_twice_is_refused() {
    let server = model_server().await;
    let gateway = Gateway::start(&policy(&[&server.url()], "")).await;
    let fields = [
        ("model", r#""m""#),
        ("stream", "false"),
        ("stream_options", "{}"),
        ("max_tokens", "1"),
        ("max_completion_tokens", "1"),
        ("max_output_tokens", "1"),
        ("n", "1"),
        ("user", r#""u""#),
    ];
    for client in Client::both() {
        for (name, value) in fields {
            let escaped = format!("\\u{:04x}{}", name.as_bytes()[0], &name[1..]);
            for again in [name, &escaped] {
                let body = format!(r#"{{"{name}":{value},"messages":[],"{again}":{value},"model2":"m"}}"#);
                let answer = client.post(gateway.address, CHAT, body).await;
                assert_eq!((answer.status, answer.code().as_str()), (400, "duplicate_field"), "{again}");
                assert_eq!(answer.json()["error"]["param"], name);
            }
        }
        // Another case is another field, which nobody decides on.
        let body = r#"{"MODEL":"x","Model":"y","Stream":true,"model":"m","messages":[{"role":"user","content":"Hi"}]}"#;
        let answer = client.post(gateway.address, CHAT, body).await;
        assert_eq!((answer.status, answer.header("content-type")), (200, "application/json"), "{}", answer.text());
        let body = r#"{"MODEL":"m","messages":[]}"#;
        assert_eq!(client.post(gateway.address, CHAT, body).await.code(), "model_not_found");
    }
}

#[tokio::test]
async fn a_body_above_the_limit_is_refused_before_it_is_read_if_its_length_is_told() {
    let wire = yes().await;
    let gateway = Gateway::start(&policy(&[&wire.url()], "")).await;
    // Not one byte of the body is sent.
    for (path, shape) in [(CHAT, r#""code":"request_too_large""#), ("/v1/messages", r#""type":"request_too_large""#)] {
        let answer =
            raw(gateway.address, head(path, &format!("content-length: {}\r\n", 32 * MIB + 1)).as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 413 ") && answer.contains(shape), "{answer}");
        assert!(answer.to_lowercase().contains("\r\nconnection: close\r\n"), "{answer}");
        assert!(answer.contains("x-should-retry: false"), "{answer}");
    }
    for client in Client::both() {
        let answer = client.try_send(crate::support::http::post(gateway.address, CHAT, &[], sized(32 * MIB + 1))).await;
        // A client that only writes may find its connection closed instead.
        if let Ok(answer) = answer {
            assert_eq!((answer.status, answer.json()["error"]["type"].as_str()), (413, Some("invalid_request_error")));
        }
    }
    assert!(wire.heard().is_empty());
    assert!(gateway.metric("infergate_refusals_total{code=\"request_too_large\"}").await >= 3.0);
}

#[tokio::test]
async fn a_body_above_the_limit_is_refused_while_it_is_read_if_its_length_is_not_told() {
    let wire = yes().await;
    let gateway =
        Gateway::start(&format!("{}requests: {{body_bytes_max: 100000}}\n", policy(&[&wire.url()], ""))).await;
    let body = sized(100_001);
    // The end never comes, so nobody waited for it.
    let mut unended = head(CHAT, "transfer-encoding: chunked\r\n").into_bytes();
    body.chunks(5000).for_each(|piece| unended.extend_from_slice(&Framing::Chunked.piece(piece)));
    let answer = raw(gateway.address, &unended).await;
    assert!(answer.starts_with("HTTP/1.1 413 ") && answer.contains(r#""code":"request_too_large""#), "{answer}");
    let (status, text) = post_unsized(gateway.address, &body, 5000).await;
    assert!(status == 413 && String::from_utf8_lossy(&text).contains("request_too_large"), "{status} {text:?}");
    // In one piece, too.
    assert_eq!(post_unsized(gateway.address, &body, 200_000).await.0, 413);
    assert!(post_chunked(gateway.address, &sized(100_000), 5000).await.starts_with("HTTP/1.1 200 "));
    assert_eq!(post_unsized(gateway.address, &sized(100_000), 5000).await.0, 200);
    assert_eq!(wire.heard().len(), 2);
}

#[tokio::test]
async fn a_small_body_in_one_piece_is_held_to_the_limit_too() {
    let wire = yes().await;
    let gateway = Gateway::start(&format!("{}requests: {{body_bytes_max: 1000}}\n", policy(&[&wire.url()], ""))).await;
    assert!(post_chunked_raw(gateway.address, 1001).await.starts_with("HTTP/1.1 413 "));
    assert_eq!(post_unsized(gateway.address, &sized(1001), 9999).await.0, 413);
    assert!(post_chunked_raw(gateway.address, 1000).await.starts_with("HTTP/1.1 200 "));
    for client in Client::both() {
        assert_eq!(client.post(gateway.address, CHAT, sized(1001)).await.status, 413);
        assert_eq!(client.post(gateway.address, CHAT, sized(1000)).await.status, 200);
    }
    assert_eq!(wire.heard().len(), 3);
}

/// Head and the only chunk in one write.
async fn post_chunked_raw(address: SocketAddr, size: usize) -> String {
    let head = head(CHAT, "transfer-encoding: chunked\r\nconnection: close\r\n");
    raw(address, &[head.as_bytes(), &Framing::Chunked.piece(&sized(size)), b"0\r\n\r\n"].concat()).await
}

#[tokio::test]
async fn beyond_the_budget_for_bodies_requests_are_refused_unread_until_there_is_room() {
    let gate = Arc::new(Semaphore::new(0));
    let permits = gate.clone();
    let wire = Wire::start(move |_| {
        let answer = Framing::Length.answer("application/json", &Bytes::from(YES), 99);
        std::iter::once(Step::Await(permits.clone())).chain(answer).collect()
    })
    .await;
    let settings = "threads: 2\nmemory: {bodies_bytes: 100000}\n";
    let gateway = Gateway::with(&policy(&[&wire.url()], ""), settings, &[]).await;
    for client in Client::both() {
        let before = wire.heard().len();
        let (holder, address) = (client.clone(), gateway.address);
        let held = tokio::spawn(async move { holder.post(address, CHAT, sized(60_000)).await.status });
        eventually("the first one is held", Duration::from_secs(5), || async { wire.heard().len() == before + 1 })
            .await;
        // Not one byte of the body is sent.
        let answer = raw(address, head(CHAT, "content-length: 60000\r\n").as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 503 ") && answer.contains(r#""code":"overloaded""#), "{answer}");
        assert!(answer.contains("retry-after: 1\r\n") && answer.contains("x-should-retry: true"), "{answer}");
        // A length that is not told is found out while reading.
        assert_eq!(post_unsized(address, &sized(60_000), 5000).await.0, 503);
        // What fits is served.
        let (small, address) = (client.clone(), gateway.address);
        let fits = tokio::spawn(async move { small.post(address, CHAT, sized(30_000)).await.status });
        eventually("it is asked for", Duration::from_secs(5), || async { wire.heard().len() == before + 2 }).await;
        gate.add_permits(2);
        assert_eq!((held.await.unwrap(), fits.await.unwrap()), (200, 200));
        gate.add_permits(1);
        assert_eq!(client.post(gateway.address, CHAT, sized(100_000)).await.status, 200);
    }
}

#[tokio::test]
async fn a_client_that_gives_up_its_upload_gives_its_room_back() {
    let wire = yes().await;
    let settings = "threads: 2\nmemory: {bodies_bytes: 100000}\n";
    let gateway = Gateway::with(&policy(&[&wire.url()], ""), settings, &[]).await;
    for client in Client::both() {
        let mut half = TcpStream::connect(gateway.address).await.unwrap();
        let expecting = head(CHAT, "content-length: 60000\r\nexpect: 100-continue\r\n");
        half.write_all(expecting.as_bytes()).await.unwrap();
        assert!(read_until(&mut half, "\r\n\r\n").await.contains(" 100 "), "the room is taken");
        half.write_all(&sized(60_000)[..30_000]).await.unwrap();
        let ask = || async { client.post(gateway.address, CHAT, sized(60_000)).await.status };
        assert_eq!(ask().await, 503);
        drop(half);
        eventually("the room is free again", Duration::from_secs(5), || async { ask().await == 200 }).await;
    }
    assert!(wire.heard().iter().all(|heard| heard.body.len() == 60_000));
}

#[tokio::test]
async fn twenty_bodies_of_28_mib_cost_at_most_one_and_a_half_times_their_bytes() {
    let gate = Arc::new(Semaphore::new(0));
    let permits = gate.clone();
    let wire = Wire::start(move |_| {
        let answer = Framing::Length.answer("application/json", &Bytes::from(YES), 99);
        std::iter::once(Step::Await(permits.clone())).chain(answer).collect()
    })
    .await;
    let settings = "threads: 2\nmemory: {bodies_bytes: 2000000000, ceiling_bytes: 8000000000}\n";
    let (body, [h1, h2]) = (sized(28 * MIB), Client::both());
    for (length_told, count) in [(true, 20), (false, 20)] {
        let gateway = Gateway::with(&policy(&[&wire.url()], ""), settings, &[]).await;
        let (baseline, before) = (gateway.resident(), wire.heard().len());
        let mut asking = JoinSet::new();
        for number in 0..count {
            let (body, address, client) = (body.clone(), gateway.address, [&h1, &h2][number % 2].clone());
            asking.spawn(async move {
                match (length_told, number % 2) {
                    (true, _) => client.post(address, CHAT, body).await.status,
                    (false, 0) => post_unsized(address, &body, 100_003).await.0,
                    (false, _) => {
                        if post_chunked(address, &body, 100_003).await.starts_with("HTTP/1.1 200 ") {
                            200
                        } else {
                            0
                        }
                    }
                }
            });
        }
        eventually("all are in flight", Duration::from_secs(60), || async { wire.heard().len() == before + count })
            .await;
        gate.add_permits(count);
        while let Some(status) = asking.join_next().await {
            assert_eq!(status.unwrap(), 200);
        }
        let grown = gateway.peak_resident() - baseline;
        let ratio = grown as f64 / (count * body.len()) as f64;
        eprintln!("length told: {length_told}: {ratio:.3} times the bytes in flight");
        assert!(ratio <= 1.5, "{ratio} times the bytes in flight, length told: {length_told}");
    }
}

#[tokio::test]
async fn a_client_that_waits_for_100_continue_gets_it_at_once() {
    let server = model_server().await;
    let gateway = Gateway::start(&policy(&[&server.url()], "")).await;
    let (body, start) = (chat(false, 1), Instant::now());
    let mut stream = TcpStream::connect(gateway.address).await.unwrap();
    let expecting =
        head(CHAT, &format!("content-length: {}\r\nexpect: 100-continue\r\nconnection: close\r\n", body.len()));
    stream.write_all(expecting.as_bytes()).await.unwrap();
    assert_eq!(read_until(&mut stream, "\r\n\r\n").await, "HTTP/1.1 100 Continue\r\n\r\n");
    assert!(start.elapsed() < Duration::from_millis(100), "{:?}", start.elapsed());
    stream.write_all(body.as_bytes()).await.unwrap();
    let answer = read_until(&mut stream, "}}").await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    assert!(server.seen().iter().all(|seen| !seen.headers.contains_key("expect")));
    // Whoever is refused by the head is not told to go on.
    for (length, status) in [(33 * MIB, "413"), (10, "404")] {
        let path = if status == "404" { "/v1/nothing" } else { CHAT };
        let answer = raw(
            gateway.address,
            head(path, &format!("content-length: {length}\r\nexpect: 100-continue\r\n")).as_bytes(),
        )
        .await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")) && !answer.contains("100 Continue"), "{answer}");
    }
}

#[tokio::test]
async fn a_slow_sender_times_out() {
    let wire = yes().await;
    let gateway = Gateway::start(&format!("{}requests: {{body_ms: 400}}\n", policy(&[&wire.url()], ""))).await;
    for framing in ["content-length: 100\r\n", "transfer-encoding: chunked\r\n"] {
        let start = Instant::now();
        let mut stream = TcpStream::connect(gateway.address).await.unwrap();
        stream.write_all(format!("{}5\r\n{{\"a\":\r\n", head(CHAT, framing)).as_bytes()).await.unwrap();
        let answer = read_until(&mut stream, "}}").await;
        let took = start.elapsed().as_millis();
        assert!(answer.starts_with("HTTP/1.1 408 ") && answer.contains(r#""code":"request_timeout""#), "{answer}");
        assert!((395..700).contains(&took), "{took} ms");
        assert!(answer.contains("x-should-retry: true"), "{answer}");
        assert_eq!(read_until(&mut stream, "never").await, "", "the connection is closed");
    }
    // A drop now and then does not help.
    let mut stream = TcpStream::connect(gateway.address).await.unwrap();
    stream.write_all(head(CHAT, "content-length: 1000\r\n").as_bytes()).await.unwrap();
    let start = Instant::now();
    while stream.write_all(b"{").await.is_ok() && start.elapsed() < Duration::from_secs(3) {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(start.elapsed() < Duration::from_millis(1500), "{:?}", start.elapsed());
    assert!(wire.heard().is_empty());
}

#[tokio::test]
async fn a_slow_sender_over_http2_times_out() {
    let wire = yes().await;
    let gateway = Gateway::start(&format!("{}requests: {{body_ms: 400}}\n", policy(&[&wire.url()], ""))).await;
    let stream = TcpStream::connect(gateway.address).await.unwrap();
    let (mut client, connection) = h2::client::handshake(stream).await.unwrap();
    tokio::spawn(connection);
    let request = http::Request::post(format!("http://{}{CHAT}", gateway.address)).body(()).unwrap();
    let (answer, mut sending) = client.send_request(request, false).unwrap();
    sending.send_data(Bytes::from("{"), false).unwrap();
    let start = Instant::now();
    assert_eq!(answer.await.unwrap().status(), 408);
    assert!((380..700).contains(&start.elapsed().as_millis()), "{:?}", start.elapsed());
}

#[tokio::test]
async fn a_slow_reader_times_out_and_costs_no_memory() {
    for (kind, stream) in [("application/json", false), (EVENTS, true)] {
        let wire = Wire::start(move |_| {
            let event = format!("data: {}\n\n", "x".repeat(992));
            Framing::Chunked.answer(kind, &event.repeat(60_000).into(), 50_000)
        })
        .await;
        let policy = format!("{}requests: {{write_ms: 400}}\n", policy(&[&wire.url()], ""));
        let gateway = Gateway::start(&policy).await;
        for (client, count) in Client::both().into_iter().zip(1..) {
            let (before, start) = (gateway.resident(), Instant::now());
            let unread = client.open(gateway.address, CHAT, &[], chat(stream, 1)).await;
            eventually("the upstream is let go", Duration::from_secs(10), || async { wire.gone() == count }).await;
            assert!(start.elapsed() >= Duration::from_millis(390), "{kind}: {:?}", start.elapsed());
            let grown = gateway.resident().saturating_sub(before);
            assert!(grown < 48 * MIB as u64, "{kind}: {grown} bytes for one slow reader");
            drop(unread);
        }
        let busy = || async { gateway.metric("infergate_requests_in_flight").await };
        eventually("all is settled", Duration::from_secs(5), || async { busy().await == 0.0 }).await;
    }
}

#[tokio::test]
async fn a_slow_reader_hurts_nobody_on_the_same_connection_to_the_upstream() {
    let server = model_server().await;
    let text = format!(
        "version: 1\nmodels: [{{name: m, pool: p}}]\npools:\n  p:\n    upstreams: [{{url: '{}', http2: always}}]\n",
        server.url()
    );
    let gateway = Gateway::start(&text).await;
    let mut unread = Vec::new();
    for client in Client::both().iter().cycle().take(4) {
        unread.push(client.open(gateway.address, CHAT, &[], chat(true, 100_000)).await);
    }
    for client in Client::both() {
        let headers = [("x-simulate-fault", "delay-between=20")];
        let answer = client.post_with(gateway.address, CHAT, &headers, chat(true, 50)).await;
        assert!(answer.whole && answer.text().ends_with("data: [DONE]\n\n"), "{}", answer.text());
    }
    drop(unread);
    assert!(server.seen().iter().filter(|seen| seen.method == "POST").all(|seen| seen.http2));
}

#[tokio::test]
async fn a_path_that_passes_through_is_not_touched() {
    let noise: Bytes =
        (0..70_000_u32).map(|number| (number.wrapping_mul(2_654_435_761) >> 24) as u8).collect::<Vec<_>>().into();
    let served = noise.clone();
    let wire = Wire::start(move |_| {
        let head = format!("HTTP/1.1 200 OK\r\ncontent-type: application/x-any\r\ncontent-encoding: gzip\r\ncontent-length: {}\r\n\r\n", served.len());
        vec![Step::Say(head.into()), Step::Say(served.clone())]
    })
    .await;
    let gateway =
        Gateway::start(&format!("{}passthrough: [{{path: '/v1/files*', pool: p}}]\n", policy(&[&wire.url()], "")))
            .await;
    for client in Client::both() {
        let request = http::Request::post(format!("http://{}/v1/files?x=%20y", gateway.address));
        let request = request.header("accept-encoding", "gzip, br").header("content-type", "application/x-any");
        let answer = client.send(request.body(Full::new(noise.clone())).unwrap()).await;
        assert_eq!((answer.status, answer.header("content-encoding")), (200, "gzip"));
        assert!(answer.whole && answer.body == noise);
        let heard = wire.heard().pop().unwrap();
        assert!(heard.body == noise && heard.head.starts_with("POST /v1/files?x=%20y HTTP/1.1\r\n"), "{}", heard.head);
        assert_eq!((heard.header("accept-encoding"), heard.header("content-type")), ("gzip, br", "application/x-any"));
    }
}

#[tokio::test]
async fn a_compressed_answer_passes_byte_for_byte() {
    let server = faulty_server(&["gzip"]).await;
    let gateway = Gateway::start(&policy(&[&server.url()], "")).await;
    let body = r#"{"model":"m","input":"Hello"}"#;
    for client in Client::both() {
        let through = client.post(gateway.address, "/v1/embeddings", body).await;
        let same = [("x-request-id", through.header("x-request-id"))];
        let direct = client.post_with(server.address(), "/v1/embeddings", &same, body).await;
        assert_eq!((direct.header("content-encoding"), through.header("content-encoding")), ("gzip", "gzip"));
        assert_eq!((through.status, through.whole, through.body.len()), (200, true, direct.body.len()));
    }
}
