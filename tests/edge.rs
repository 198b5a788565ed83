//! The strict edge: what two servers could read differently is refused, nothing a client sends moves the upstream,
//! and no secret leaves.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Request};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::support::{
    CANARY_HEADERS, Client, Gateway, Options, Outcome, Process, Simulated, chat, eventually, free_port, model_server,
    policy,
};

/// No probes, so that everything an upstream sees came from a client.
const QUIET: &str = "health: {enabled: false}\n";

async fn rig() -> (Simulated, Gateway) {
    let server = model_server().await;
    let gateway = Gateway::start(&policy(&[&server.url()], QUIET)).await;
    (server, gateway)
}

/// Sends the bytes on a connection of their own: what came back, and whether the gateway then closed.
async fn exchange(address: SocketAddr, bytes: &[u8]) -> (String, bool) {
    let mut stream = TcpStream::connect(address).await.unwrap();
    // It may close before it has read everything.
    let _ = stream.write_all(bytes).await;
    let (mut answer, mut buffer) = (Vec::new(), [0; 16 << 10]);
    loop {
        match tokio::time::timeout(Duration::from_millis(1500), stream.read(&mut buffer)).await {
            Ok(Ok(0) | Err(_)) => return (String::from_utf8_lossy(&answer).into_owned(), true),
            Ok(Ok(read)) => answer.extend_from_slice(&buffer[..read]),
            Err(_) => return (String::from_utf8_lossy(&answer).into_owned(), false),
        }
    }
}

/// The statuses in what came back on one connection.
fn statuses(answer: &str) -> Vec<u16> {
    answer.split("HTTP/1.").skip(1).filter_map(|rest| rest.get(2..5)?.parse().ok()).collect()
}

/// A request that nobody may ever execute: it comes behind one that is refused.
fn smuggled() -> String {
    let body = chat(false, 1);
    format!(
        "POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nX-Smuggled: yes\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
}

/// A chat request over HTTP/1.1 with these lines beside its host; `{n}` stands for the body's length.
fn with(lines: &str) -> String {
    let body = chat(false, 1);
    let lines = lines.replace("{n}", &body.len().to_string());
    format!("POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\n{lines}\r\n\r\n{body}")
}

/// The same with its body in one chunk.
fn chunked(lines: &str) -> String {
    let body = chat(false, 1);
    format!("POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\n{lines}\r\n\r\n{:x}\r\n{body}\r\n0\r\n\r\n", body.len())
}

/// A chat request for this request line.
fn line(line: &str) -> String {
    let body = chat(false, 1);
    format!("{line}\r\nHost: a\r\nContent-Length: {}\r\n\r\n{body}", body.len())
}

/// Each is refused, its connection is closed, and neither it nor what comes behind it reaches the upstream.
async fn all_refused(attacks: &[(&str, String)]) {
    let (server, gateway) = rig().await;
    let mut wrong = Vec::new();
    for (name, attack) in attacks {
        let (answer, closed) = exchange(gateway.address, format!("{attack}{}", smuggled()).as_bytes()).await;
        let statuses = statuses(&answer);
        let refused = match statuses.as_slice() {
            // What is no HTTP at all need not be answered.
            [] => true,
            [status] => matches!(status, 400 | 405 | 413 | 414 | 431 | 501 | 505),
            _ => false,
        };
        let answer: String = answer.chars().take(400).collect();
        if !refused || !closed {
            wrong.push(format!("{name}: {statuses:?}, closed {closed}: {answer}"));
        }
        let polite = statuses.is_empty() || answer.to_ascii_lowercase().contains("connection: close");
        if !polite {
            wrong.push(format!("{name}: does not say that it closes: {answer}"));
        }
    }
    let seen: Vec<_> = server.seen().iter().map(|seen| format!("{} {}", seen.method, seen.path)).collect();
    assert!(wrong.is_empty() && seen.is_empty(), "{wrong:#?}\nseen upstream: {seen:?}");
    // The gateway is as it was.
    assert_eq!(Client::h1().post(gateway.address, "/v1/chat/completions", chat(false, 1)).await.status, 200);
}

#[tokio::test]
async fn a_body_whose_end_is_ambiguous_is_refused() {
    let two = "Content-Length: {n}\r\nContent-Length: ";
    let attacks = [
        (
            "CL then TE",
            with("Content-Length: {n}\r\nTransfer-Encoding: chunked").replace("\r\n\r\n{", "\r\n\r\n0\r\n\r\n{"),
        ),
        ("TE then CL", chunked("Transfer-Encoding: chunked\r\nContent-Length: 5")),
        ("TE and an empty CL", chunked("Transfer-Encoding: chunked\r\nContent-Length:")),
        ("the same CL twice", with(&format!("{two}{{n}}"))),
        ("two CLs", with(&format!("{two}1"))),
        ("CL as a list", with("Content-Length: {n}, {n}")),
        ("CL as a list of one", with("Content-Length: {n},")),
        ("CL with a plus", with("Content-Length: +{n}")),
        ("CL with a minus", with("Content-Length: -{n}")),
        ("CL with a space within", with("Content-Length: {n} 0")),
        ("CL in hex", with("Content-Length: 0x20")),
        ("CL with a fraction", with("Content-Length: {n}.0")),
        ("an empty CL", with("Content-Length:")),
        ("a CL that overflows", with("Content-Length: 18446744073709551617")),
        ("a space before CL's colon", with("Content-Length : {n}")),
        ("chunked, identity", chunked("Transfer-Encoding: chunked, identity")),
        ("identity, chunked", chunked("Transfer-Encoding: identity, chunked")),
        ("xchunked", chunked("Transfer-Encoding: xchunked")),
        ("chunked twice", chunked("Transfer-Encoding: chunked, chunked")),
        ("gzip, chunked", chunked("Transfer-Encoding: gzip, chunked")),
        ("identity", with("Transfer-Encoding: identity\r\nContent-Length: {n}")),
        ("two TEs", chunked("Transfer-Encoding: chunked\r\nTransfer-Encoding: identity")),
        ("two TEs, the last one chunked", chunked("Transfer-Encoding: identity\r\nTransfer-Encoding: chunked")),
        ("a vertical tab before chunked", chunked("Transfer-Encoding: \x0bchunked")),
        ("a NUL behind chunked", chunked("Transfer-Encoding: chunked\0")),
        ("a space before TE's colon", chunked("Transfer-Encoding : chunked")),
        ("quoted", chunked("Transfer-Encoding: \"chunked\"")),
        ("an empty TE", chunked("Transfer-Encoding:")),
        ("TE in HTTP/1.0", chunked("Transfer-Encoding: chunked").replacen("HTTP/1.1", "HTTP/1.0", 1)),
        (
            "TE in HTTP/1.0, kept alive",
            chunked("Connection: keep-alive\r\nTransfer-Encoding: chunked").replacen("HTTP/1.1", "HTTP/1.0", 1),
        ),
    ];
    all_refused(&attacks).await;
}

#[tokio::test]
async fn a_head_whose_lines_are_ambiguous_is_refused() {
    let attacks = [
        ("bare LFs everywhere", with("Content-Length: {n}").replace("\r\n", "\n")),
        ("one bare LF", with("X-A: b\nContent-Length: {n}")),
        ("a bare LF before the body", with("Content-Length: {n}").replace("\r\n\r\n", "\r\n\n")),
        ("a bare CR in a value", with("X-A: b\rc: d\r\nContent-Length: {n}")),
        ("a folded line, space", with("X-A: b\r\n c\r\nContent-Length: {n}")),
        ("a folded line, tab", with("X-A: b\r\n\tc\r\nContent-Length: {n}")),
        ("a folded TE", chunked("Transfer-Encoding:\r\n chunked")),
        ("the first header begins with a space", line("POST /v1/chat/completions HTTP/1.1").replace("Host", " Host")),
        ("NUL in a value", with("X-A: b\0c\r\nContent-Length: {n}")),
        ("NUL in a name", with("X\0A: b\r\nContent-Length: {n}")),
        ("a name without a colon", with("X-A\r\nContent-Length: {n}")),
        ("no name", with(": b\r\nContent-Length: {n}")),
        ("a space in a name", with("X A: b\r\nContent-Length: {n}")),
        ("a space before the colon", with("X-A : b\r\nContent-Length: {n}")),
        ("a parenthesis in a name", with("X(A): b\r\nContent-Length: {n}")),
    ];
    all_refused(&attacks).await;
}

#[tokio::test]
async fn a_request_whose_addressee_is_ambiguous_is_refused() {
    let hosts = |lines: &str| with(&format!("{lines}\r\nContent-Length: {{n}}")).replacen("Host: a\r\n", "", 1);
    let attacks = [
        ("two hosts", hosts("Host: a\r\nHost: b")),
        ("the same host twice", hosts("Host: a\r\nHost: a")),
        ("no host", hosts("X-A: b")),
        ("a host with a user", hosts("Host: a@b")),
        ("a host with a path", hosts("Host: a/b")),
        ("a host with a space", hosts("Host: a b")),
        ("hosts as a list", hosts("Host: a, b")),
        ("a host with a fragment", hosts("Host: a#b")),
        ("absolute form, another host", line("POST http://b/v1/chat/completions HTTP/1.1")),
        ("absolute form, another port", line("POST http://a:99/v1/chat/completions HTTP/1.1")),
        ("absolute form with a user", line("POST http://u@a/v1/chat/completions HTTP/1.1")),
        ("CONNECT", "CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n".to_owned()),
        ("CONNECT to a path", "CONNECT /v1/chat/completions HTTP/1.1\r\nHost: a\r\n\r\n".to_owned()),
        ("authority form", line("POST a:80 HTTP/1.1")),
    ];
    all_refused(&attacks).await;
}

#[tokio::test]
async fn a_path_that_could_be_read_in_two_ways_is_refused() {
    let paths = [
        "/v1/chat/completions#x",
        "/v1/chat/completions?a=b#x",
        "/v1/chat%2Fcompletions",
        "/v1/chat%2fcompletions",
        "/v1/../v1/chat/completions",
        "/v1/./chat/completions",
        "/v1/%2e%2e/v1/chat/completions",
        "/v1/.%2E/v1/chat/completions",
        "//v1/chat/completions",
        "/v1//chat/completions",
        "/v1/chat/completions/..",
        "/v1\\chat\\completions",
        "/v1%5cchat%5Ccompletions",
        "/v1/chat/completions%00",
        "/v1/chat/completions%23x",
        "/v1/chat/compl\tetions",
        "/v1/chat/compl\x01etions",
        "/v1/chat/completions HTTP/1.1 x",
        "v1/chat/completions",
        "",
    ];
    let lines: Vec<(&str, String)> = paths.iter().map(|path| (*path, line(&format!("POST {path} HTTP/1.1")))).collect();
    all_refused(&lines).await;
    // What HTTP/2 lets through at all meets the same rules.
    let (server, gateway) = rig().await;
    for path in
        ["/v1/chat%2Fcompletions", "/v1/../v1/chat/completions", "//v1/chat/completions", "/v1/chat/completions%00"]
    {
        let answer = Client::h2().post(gateway.address, path, chat(false, 1)).await;
        assert_eq!((answer.status, answer.code().as_str()), (400, "bad_request"), "{path}");
    }
    assert!(server.seen().is_empty());
}

#[tokio::test]
async fn a_chunk_of_a_bad_size_is_refused() {
    let body = chat(false, 1);
    let n = body.len();
    let head = "POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n";
    let whole = |chunk: String| format!("{head}{chunk}\r\n{body}\r\n0\r\n\r\n");
    let attacks = [
        ("minus", whole(format!("-{n:x}"))),
        ("plus", whole(format!("+{n:x}"))),
        ("0x", whole(format!("0x{n:x}"))),
        ("a space within", whole(format!("{n:x} 0"))),
        ("no number", whole("xyz".to_owned())),
        ("nothing", whole(String::new())),
        ("an overflow", whole(format!("1000000000000000{n:016x}"))),
        ("a bare LF behind the size", format!("{head}{n:x}\n{body}\r\n0\r\n\r\n")),
        ("a bare CR in an extension", whole(format!("{n:x};a\rb"))),
        ("more bytes than said", format!("{head}{:x}\r\n{body}\r\n0\r\n\r\n", n - 3)),
        ("fewer bytes than said", format!("{head}{:x}\r\n{body}\r\n0\r\n\r\n", n + 1)),
    ];
    all_refused(&attacks).await;
}

#[tokio::test]
async fn nothing_behind_a_chunked_body_is_executed() {
    // Servers disagree about line ends in extensions and about trailers, so the connection ends with such a request.
    let (server, gateway) = rig().await;
    let (body, head) =
        (chat(false, 1), "POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n");
    let n = body.len();
    for chunks in [
        format!("{n:x};a\nb\r\n{body}\r\n0\r\n\r\n"),
        format!("{n:x}\r\n{body}\r\n0;a\n\r\nx: y\r\n\r\n"),
        format!("{n:x}\r\n{body}\r\n\r\nx: y\r\n\r\n"),
        format!("{n:x}\r\n{body}\r\n0\r\n\r\n"),
    ] {
        let (answer, closed) = exchange(gateway.address, format!("{head}{chunks}{}", smuggled()).as_bytes()).await;
        assert!(closed && statuses(&answer).len() == 1, "{chunks}: {answer}");
        assert!(answer.to_ascii_lowercase().contains("connection: close"), "{answer}");
    }
    assert!(server.seen().iter().all(|seen| !seen.headers.contains_key("x-smuggled")));
}

#[tokio::test]
async fn what_is_no_http_at_all_is_refused() {
    let many: String = (0..400).map(|n| format!("X-{n}: y\r\n")).collect();
    let attacks = [
        ("TLS on a plain port", "\x16\x03\x01\x02\x00\x01\x00\x01\u{fc}\x03\x03".to_owned()),
        ("HTTP/0.9", "GET /v1/models\r\n\r\n".to_owned()),
        ("HTTP/2 in words", line("POST /v1/chat/completions HTTP/2.0")),
        ("HTTP/3 in words", line("POST /v1/chat/completions HTTP/3")),
        ("a version in lower case", line("POST /v1/chat/completions http/1.1")),
        ("no method", line("/v1/chat/completions HTTP/1.1")),
        ("a method with a colon", line("PO:ST /v1/chat/completions HTTP/1.1")),
        ("400 headers", with(&format!("{many}Content-Length: {{n}}"))),
        ("a header of 2 MiB", with(&format!("X-A: {}\r\nContent-Length: {{n}}", "x".repeat(2 << 20)))),
        ("a path of 2 MiB", line(&format!("POST /{} HTTP/1.1", "x".repeat(2 << 20)))),
    ];
    all_refused(&attacks).await;
}

#[tokio::test]
async fn a_change_of_protocol_is_refused_where_none_is_expected() {
    let attacks = [
        ("websocket", with("Connection: Upgrade\r\nUpgrade: websocket\r\nContent-Length: {n}")),
        (
            "h2c",
            with(
                "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\nContent-Length: {n}",
            ),
        ),
        ("an unknown one", with("Connection: Upgrade\r\nUpgrade: foo/2\r\nContent-Length: {n}")),
        (
            "h2c on /v1/realtime",
            "GET /v1/realtime?model=m HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n".to_owned(),
        ),
        (
            "on /health",
            "GET /health HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n".to_owned(),
        ),
    ];
    all_refused(&attacks).await;
}

#[tokio::test]
async fn the_body_of_a_refused_request_is_never_taken_for_a_request() {
    let (server, gateway) = rig().await;
    let inner = smuggled();
    let sized = |line: &str, inner: &str| {
        format!("{line} HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n{inner}", inner.len())
    };
    let chunked = |line: &str| {
        format!(
            "{line} HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n{:x}\r\n{inner}\r\n0\r\n\r\n",
            inner.len()
        )
    };
    let lines = [
        ("POST /nobody", 404),
        ("POST /v1/models", 405),
        ("GET /v1/chat/completions", 405),
        ("GET /health", 200),
        ("GET /v1/models", 200),
        ("POST /v1/chat/completions", 400),
        ("GET /v1/realtime", 400),
        ("DELETE /v1/chat/completions", 405),
    ];
    for (line, status) in lines {
        for request in [sized(line, &inner), chunked(line)] {
            let (answer, _) = exchange(
                gateway.address,
                format!("{request}GET /version HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").as_bytes(),
            )
            .await;
            let told = statuses(&answer);
            // Either the connection is closed, or the next request is the next one.
            assert!(told == [status] || told == [status, 200], "{line}: {told:?} {answer}");
        }
    }
    // A client that stops in the middle of a body.
    let (answer, _) = exchange(
        gateway.address,
        format!("POST /nobody HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n{inner}").as_bytes(),
    )
    .await;
    assert_eq!(statuses(&answer), [404]);
    assert!(server.seen().is_empty(), "{:?}", server.seen());
}

#[tokio::test]
async fn pipelined_requests_are_answered_in_their_order() {
    let (server, gateway) = rig().await;
    let request = |id: u32| with(&format!("X-Request-Id: id-{id}\r\nContent-Length: {{n}}"));
    let all: String = (0..10).map(request).collect();
    let last = "GET /version HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
    let (answer, closed) = exchange(gateway.address, format!("{all}{last}").as_bytes()).await;
    assert_eq!((statuses(&answer), closed), (vec![200; 11], true));
    let ids: Vec<String> = answer
        .lines()
        .filter_map(|line| line.to_ascii_lowercase().strip_prefix("x-client-request-id: id-").map(str::to_owned))
        .collect();
    assert_eq!(ids, ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]);
    assert_eq!(server.seen().len(), 10);
}

#[tokio::test]
async fn unusual_but_unambiguous_requests_are_served() {
    let (_server, gateway) = rig().await;
    let body = chat(false, 1);
    let n = body.len();
    let close = "Connection: close";
    let good = [
        ("empty lines before it", format!("\r\n\r\n{}", with(&format!("{close}\r\nContent-Length: {{n}}")))),
        (
            "absolute form",
            line("POST http://a/v1/chat/completions HTTP/1.1").replace("Host: a", &format!("Host: a\r\n{close}")),
        ),
        ("spaces around a value", with(&format!("{close}\r\nContent-Length: \t {{n}} "))),
        ("chunked", chunked(&format!("{close}\r\nTransfer-Encoding: chunked"))),
        ("CHUNKED", chunked(&format!("{close}\r\nTransfer-Encoding: CHUNKED"))),
        (
            "extensions and a trailer",
            format!(
                "POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\n{close}\r\nTransfer-Encoding: chunked\r\n\r\n{:x};x=y\r\n{}\r\n{:x}\r\n{}\r\n0\r\nX-T: u\r\n\r\n",
                10,
                &body[..10],
                n - 10,
                &body[10..]
            ),
        ),
        ("HTTP/1.0", with("Content-Length: {n}").replacen("HTTP/1.1", "HTTP/1.0", 1)),
        ("HTTP/1.0 without a host", with("Content-Length: {n}").replacen("HTTP/1.1\r\nHost: a", "HTTP/1.0", 1)),
        ("Expect", with(&format!("{close}\r\nExpect: 100-continue\r\nContent-Length: {{n}}"))),
        (
            "a host with a port",
            with(&format!("{close}\r\nContent-Length: {{n}}")).replacen("Host: a", "Host: a.example:8080", 1),
        ),
        ("an IPv6 host", with(&format!("{close}\r\nContent-Length: {{n}}")).replacen("Host: a", "Host: [::1]:8080", 1)),
    ];
    for (name, request) in good {
        let (answer, closed) = exchange(gateway.address, request.as_bytes()).await;
        let told: Vec<u16> = statuses(&answer).into_iter().filter(|status| *status != 100).collect();
        assert_eq!((told, closed), (vec![200], true), "{name}: {answer}");
    }
}

#[tokio::test]
async fn over_http2_host_and_authority_must_agree() {
    let (server, gateway) = rig().await;
    let stream = TcpStream::connect(gateway.address).await.unwrap();
    let (mut sender, connection) = h2::client::handshake(stream).await.unwrap();
    tokio::spawn(connection);
    let request = Request::post(format!("http://{}/v1/chat/completions", gateway.address)).header("host", "elsewhere");
    let (answer, mut body) = sender.send_request(request.body(()).unwrap(), false).unwrap();
    let _ = body.send_data(Bytes::from(chat(false, 1)), true);
    let refused = match tokio::time::timeout(Duration::from_secs(5), answer).await.unwrap() {
        Ok(answer) => answer.status().as_u16() == 400,
        Err(error) => error.is_reset(),
    };
    assert!(refused && server.seen().is_empty());
}

// What goes on to the upstream.

const CANARY: &str = "canary-9c1f";

#[tokio::test]
async fn a_clients_credentials_never_reach_an_upstream() {
    let (server, gateway) = rig().await;
    let bearer = format!("Bearer {CANARY}");
    let headers = [
        ("authorization", bearer.as_str()),
        ("x-api-key", CANARY),
        ("api-key", CANARY),
        ("cookie", CANARY),
        ("proxy-authorization", CANARY),
        ("x-infergate-tenant", CANARY),
        ("x-infergate-upstream", CANARY),
        ("openai-organization", "kept"),
    ];
    for client in Client::both() {
        for path in ["/v1/chat/completions", "/v1/embeddings", "/v1/messages"] {
            let body = chat(false, 1).replace("\"messages\"", "\"input\":\"x\",\"messages\"");
            assert_eq!(client.post_with(gateway.address, path, &headers, body).await.status, 200, "{path}");
        }
    }
    assert_eq!(server.seen().len(), 6);
    for seen in server.seen() {
        assert!(!format!("{:?}", seen.headers).contains(CANARY), "{:?}", seen.headers);
        assert_eq!(seen.headers["openai-organization"], "kept");
    }
}

#[tokio::test]
async fn what_belongs_to_one_connection_stays_on_it() {
    let (server, gateway) = rig().await;
    let lines = "Connection: keep-alive, X-Hop, close\r\nX-Hop: hop\r\nKeep-Alive: timeout=5\r\nProxy-Connection: keep-alive\r\n\
        TE: trailers\r\nTrailer: X-T\r\nProxy-Authenticate: x\r\nAccept-Encoding: gzip\r\nX-End: kept\r\nContent-Length: {n}";
    let (answer, _) = exchange(gateway.address, with(lines).as_bytes()).await;
    assert_eq!(statuses(&answer), [200], "{answer}");
    let headers = server.seen().pop().unwrap().headers;
    let gone = [
        "x-hop",
        "keep-alive",
        "proxy-connection",
        "te",
        "trailer",
        "proxy-authenticate",
        "accept-encoding",
        "upgrade",
        "connection",
        "transfer-encoding",
    ];
    for name in gone {
        assert!(!headers.contains_key(name), "{name}: {headers:?}");
    }
    assert_eq!(headers["x-end"], "kept");
}

#[tokio::test]
async fn a_connection_header_cannot_take_off_what_decides() {
    let (server, gateway) = rig().await;
    let lines = "Connection: close, Host, Content-Length, Content-Type, X-Request-Id\r\nContent-Type: application/json\r\nX-Request-Id: mine\r\nContent-Length: {n}";
    let (answer, _) = exchange(gateway.address, with(lines).as_bytes()).await;
    assert_eq!(statuses(&answer), [200], "{answer}");
    let seen = server.seen().pop().unwrap();
    let id = answer.lines().find_map(|line| line.strip_prefix("x-request-id: ")).unwrap();
    assert_eq!((seen.body_bytes, seen.headers["x-request-id"].to_str().unwrap()), (chat(false, 1).len(), id));
    assert_eq!(seen.headers["host"], server.address().to_string().as_str());
}

#[tokio::test]
async fn nothing_a_client_sends_moves_the_upstream() {
    let (server, gateway) = rig().await;
    let trap = model_server().await;
    let (url, address) = (trap.url(), trap.address().to_string());
    let headers: Vec<(&str, &str)> = [
        "x-forwarded-host",
        "x-host",
        "x-original-url",
        "x-rewrite-url",
        "x-upstream",
        "x-infergate-upstream",
        "forwarded",
        "x-real-ip",
        "referer",
        "origin",
    ]
    .iter()
    .map(|name| (*name, if name.contains("url") { url.as_str() } else { address.as_str() }))
    .collect();
    let fields = ["api_base", "base_url", "api_url", "endpoint", "host", "upstream", "proxy", "url"];
    let fields: String = fields.iter().map(|name| format!("\"{name}\":\"{url}\",")).collect();
    let body = chat(false, 1).replacen('{', &format!("{{{fields}"), 1);
    for client in Client::both() {
        for path in [
            "/v1/chat/completions",
            &format!("/v1/chat/completions?base_url={url}&host={address}"),
            &format!("/v1/chat/completions?@{address}"),
        ] {
            let answer = client.post_with(gateway.address, path, &headers, body.clone()).await;
            assert_eq!(answer.status, 200, "{path}: {}", answer.text());
        }
    }
    // Whatever the host: it says where the gateway is, not where to go.
    for (line, host) in [
        (format!("POST {url}/v1/chat/completions HTTP/1.1"), address.as_str()),
        ("POST /v1/chat/completions HTTP/1.1".to_owned(), &address),
    ] {
        let body = chat(false, 1);
        let request =
            format!("{line}\r\nHost: {host}\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}", body.len());
        let (answer, _) = exchange(gateway.address, request.as_bytes()).await;
        assert_eq!(statuses(&answer), [200], "{answer}");
    }
    for model in [url.clone(), format!("m@{address}"), "m#x".to_owned(), format!("../../{address}")] {
        let answer = Client::h1()
            .post(gateway.address, "/v1/chat/completions", format!("{{\"model\":\"{model}\",\"messages\":[]}}"))
            .await;
        assert_eq!(answer.status, 404, "{model}");
    }
    assert!(trap.seen().is_empty(), "{:?}", trap.seen());
    assert_eq!(server.seen().len(), 8);
    assert!(server.seen().iter().all(|seen| seen.headers["host"] == server.address().to_string().as_str()));
}

#[tokio::test]
async fn a_redirect_is_not_followed() {
    let (server, gateway) = rig().await;
    let trap = model_server().await;
    server.set_faults(vec![format!("redirect={}/v1/chat/completions", trap.url()).parse().unwrap()]);
    for client in Client::both() {
        for stream in [false, true] {
            let answer = client.post(gateway.address, "/v1/chat/completions", chat(stream, 1)).await;
            assert_eq!(answer.status, 307);
        }
    }
    assert!(trap.seen().is_empty());
}

#[tokio::test]
async fn the_clients_port_has_no_page_for_operators() {
    let (server, gateway) = rig().await;
    let paths = [
        "/livez",
        "/readyz",
        "/metrics",
        "/admin",
        "/admin/",
        "/admin/policy",
        "/admin/upstreams",
        "/admin/reload",
        "/debug/pprof/heap",
        "/simulate/seen",
        "/simulate/faults",
    ];
    for client in Client::both() {
        for path in paths {
            assert_eq!(client.get(gateway.address, path).await.status, 404, "{path}");
            assert_eq!(client.post(gateway.address, path, "{}").await.status, 404, "{path}");
        }
    }
    assert!(server.seen().is_empty());
    assert_eq!(gateway.metric("infergate_policy_revision").await, 1.0, "nothing was reloaded");
}

#[tokio::test]
async fn a_page_in_a_browser_cannot_reload() {
    let (_server, gateway) = rig().await;
    let answer =
        Client::h1().post_with(gateway.admin, "/admin/reload", &[("origin", "https://evil.example")], "").await;
    assert_eq!(answer.status, 403);
    assert_eq!(Client::h1().get(gateway.admin, "/admin/reload").await.status, 405);
}

/// Everything that anybody could read afterwards.
struct Told(String);

impl Told {
    fn add(&mut self, what: &str, headers: &HeaderMap, text: &str) {
        self.0.push_str(&format!("--- {what:?}\n{headers:?}\n{text}\n"));
    }
}

#[tokio::test]
async fn no_secret_is_ever_told_whatever_happens() {
    let start = |key: &str| {
        Simulated::start(Options {
            models: vec!["m".to_owned()],
            key: Some(key.to_owned()),
            tokens_per_second: 100.0,
            ..Options::default()
        })
    };
    let by_env = start("canary-by-env").await.unwrap();
    let by_file = start("canary-by-file").await.unwrap();
    let strict = start("another-key").await.unwrap();
    let secret = tempfile::tempdir().unwrap();
    let file = secret.path().join("key");
    std::fs::write(&file, "canary-by-file\n").unwrap();
    let pool = |name: &str, url: &str, key: &str| {
        format!(
            "  {name}: {{upstreams: [{{url: '{url}', key: {{{key}}}}}], health: {{enabled: false}}, retry: {{attempts: 2}}, breaker: {{failures: 0, failure_ratio: 1}}, timeouts: {{first_token_ms: 300, answer_ms: 300, connect_ms: 300}}}}\n"
        )
    };
    let (env, path) = ("env: CANARY_KEY", format!("file: {}", file.display()));
    let dead = format!("http://127.0.0.1:{}", free_port());
    let text = format!(
        "version: 1\nmodels: [{{name: env, pool: env, rename: m}}, {{name: file, pool: file, rename: m}}, {{name: strict, pool: strict, rename: m}}, {{name: dead, pool: dead}}]\npools:\n{}{}{}{}",
        pool("env", &by_env.url(), env),
        pool("file", &by_file.url(), &path),
        pool("strict", &strict.url(), env),
        pool("dead", &dead, env),
    );
    let env = [("CANARY_KEY", "canary-by-env"), ("INFERGATE_LOG", "debug")];
    let gateway = Gateway::spawn(&text, "threads: 2\n", &[], &env);
    gateway.ready().await;
    let mut told = Told(String::new());
    let body = |model: &str, stream: bool| {
        chat(stream, 2).replace("\"m\"", &format!("\"{model}\"")).replace("Hello", "canary-prompt")
    };
    let outcomes = [
        ("env", "", 200),
        ("file", "", 200),
        ("strict", "", 401),
        ("dead", "", 502),
        ("nobody", "", 404),
        ("env", "status=500", 500),
        ("env", "reset", 502),
        ("env", "garbage", 502),
        ("env", "hang", 504),
        ("env", "cut", 200),
        ("env", "context", 400),
    ];
    for client in Client::both() {
        for stream in [false, true] {
            for (model, fault, status) in outcomes {
                let headers: Vec<_> = CANARY_HEADERS
                    .into_iter()
                    .chain((!fault.is_empty()).then_some(("x-simulate-fault", fault)))
                    .collect();
                let path = "/v1/chat/completions?key=canary-query&api_key=canary-query";
                let answer = client.post_with(gateway.address, path, &headers, body(model, stream)).await;
                assert_eq!(answer.status, status, "{model} {fault} {stream}: {}", answer.text());
                told.add(&format!("{model} {fault} {stream}"), &answer.headers, &answer.text());
            }
        }
        for (path, body) in [
            ("/v1/chat/completions?key=canary-query", "{"),
            ("/nobody?key=canary-query", "{}"),
            ("/v1/models?key=canary-query", ""),
        ] {
            let answer = client.post_with(gateway.address, path, &CANARY_HEADERS, body).await;
            told.add(path, &answer.headers, &answer.text());
        }
        let open = client
            .open(gateway.address, "/v1/chat/completions", &CANARY_HEADERS, body("env", true).replace(":2", ":2000"))
            .await;
        drop(open);
    }
    // Heads that are refused: a line end in a value, a folded line, a broken length.
    for lines in [
        "Authorization: Bearer canary-client\rX: canary-client\r\nContent-Length: {n}",
        "Authorization: Bearer\r\n canary-client\r\nContent-Length: {n}",
        "Authorization: canary-client\r\nContent-Length: canary-client",
        "canary-client\r\nX: y",
    ] {
        let (answer, _) = exchange(gateway.address, with(lines).as_bytes()).await;
        told.add(lines, &HeaderMap::new(), &answer);
    }
    eventually("all is over", Duration::from_secs(5), || async {
        gateway.metric("infergate_requests_in_flight").await == 0.0
    })
    .await;
    let gone = by_env.seen().iter().filter(|seen| seen.outcome == Outcome::Disconnected).count();
    assert!(gone >= 2, "the clients that left were among them: {gone}");
    for path in ["/livez", "/readyz", "/metrics", "/admin/policy", "/admin/upstreams", "/nothing"] {
        let answer = gateway.admin(path).await;
        told.add(path, &answer.headers, &answer.text());
    }
    // A reload with a secret that cannot be used, and what `check` says of it.
    std::fs::write(&file, "canary-by-file\u{1}\n").unwrap();
    let answer = gateway.reload(&format!("{text}# again\n")).await;
    assert_eq!(answer.status, 422, "{}", answer.text());
    told.add("reload", &answer.headers, &answer.text());
    told.add("policy", &HeaderMap::new(), &gateway.admin("/admin/policy").await.text());
    let policy_path = gateway.policy_path().display().to_string();
    for extra in [
        vec!["check", &policy_path],
        vec!["check", "--json", &policy_path],
        vec!["check", "--without-secrets", &policy_path],
    ] {
        let check = Process::start(&extra, &env);
        eventually("check says something", Duration::from_secs(10), || async { !check.out().is_empty() }).await;
        told.add("check", &HeaderMap::new(), &format!("{}{}", check.out(), check.err()));
    }
    let log = gateway.log();
    assert!(log.contains("request ended"), "the log is at debug: {log}");
    told.add("log", &HeaderMap::new(), &log);
    let told: Vec<&str> = told.0.lines().filter(|line| line.contains("canary-") && !line.starts_with("---")).collect();
    assert!(told.is_empty(), "{told:#?}");
}
