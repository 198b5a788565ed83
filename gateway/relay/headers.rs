//! Which headers pass, in both directions, and how a request's head is written.

use http::header::{
    ACCEPT_ENCODING, AUTHORIZATION, CONNECTION, CONTENT_LENGTH, COOKIE, EXPECT, HOST, PROXY_AUTHENTICATE,
    PROXY_AUTHORIZATION, TE, TRAILER, TRANSFER_ENCODING, UPGRADE,
};
use http::{HeaderMap, HeaderName, HeaderValue, request};

use crate::headers::REQUEST_ID;
use crate::pool::Upstream;
use crate::pool::feed::SESSION;
use crate::telemetry::trace::{Context, TRACEPARENT, TRACESTATE};

const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");
const X_API_KEY: HeaderName = HeaderName::from_static("x-api-key");
const API_KEY: HeaderName = HeaderName::from_static("api-key");

/// Headers that belong to one connection (RFC 9110, 7.6.1), whatever its `Connection` header names beside them.
pub const HOP_BY_HOP: [HeaderName; 9] = [
    CONNECTION,
    KEEP_ALIVE,
    PROXY_CONNECTION,
    PROXY_AUTHENTICATE,
    PROXY_AUTHORIZATION,
    TE,
    TRAILER,
    TRANSFER_ENCODING,
    UPGRADE,
];

/// Whether the gateway itself writes this header, so that nobody else may.
pub fn is_framing(name: &HeaderName) -> bool {
    HOP_BY_HOP.contains(name) || *name == HOST || *name == CONTENT_LENGTH || *name == EXPECT
}

/// Whether a client's header stays here: it carries the client's credentials, or it is a word between us.
fn is_private(name: &HeaderName) -> bool {
    [AUTHORIZATION, X_API_KEY, API_KEY, COOKIE].contains(name)
        || name.as_str().starts_with("x-infergate-")
        || *name == REQUEST_ID
}

/// The client's headers that go on to an upstream.
///
/// Bodies are read here, so an upstream is asked for no compression (`inspected`), unless the path passes
/// through unread.
pub fn forwarded(headers: &HeaderMap, inspected: bool) -> impl Iterator<Item = (&HeaderName, &HeaderValue)> {
    let named = named_by_connection(headers);
    headers.iter().filter(move |(name, _)| {
        let stays = is_framing(name)
            || is_private(name)
            || (inspected && **name == ACCEPT_ENCODING)
            || named.iter().any(|other| other.eq_ignore_ascii_case(name.as_str()));
        !stays
    })
}

/// The headers that `Connection` names; nearly always none beyond the usual words.
fn named_by_connection(headers: &HeaderMap) -> Vec<&str> {
    let values = headers.get_all(CONNECTION).iter().filter_map(|value| value.to_str().ok());
    let names = values.flat_map(|value| value.split(',')).map(str::trim);
    names.filter(|name| !name.eq_ignore_ascii_case("keep-alive") && !name.eq_ignore_ascii_case("close")).collect()
}

/// What an upstream is to be asked, but for the body.
pub struct RequestHead<'a> {
    /// The client's head.
    pub client: &'a request::Parts,
    /// The path and query at the upstream.
    pub path: &'a str,
    /// The `Host` header.
    pub authority: &'a HeaderValue,
    /// The policy's headers, the key among them; they win over the client's.
    pub set: &'a [(HeaderName, HeaderValue)],
    /// Headers that the provider requires, where the client sent none.
    pub required: &'static [(&'static str, &'static str)],
    /// The request's id.
    pub id: &'a str,
    /// The `traceparent` that stands in the client's place.
    pub traceparent: Option<HeaderValue>,
    /// Whether the request's id is also its session's, by which the engine tells what it keeps of it.
    pub session: bool,
    /// Whether bodies are read here.
    pub inspected: bool,
    /// The body's length in bytes; `None` for a request that has no body.
    pub length: Option<usize>,
    /// The protocol to change to.
    pub upgrade: Option<&'a HeaderValue>,
}

impl<'a> RequestHead<'a> {
    /// The head of what the gateway asks an upstream for itself.
    pub fn own(client: &'a request::Parts, upstream: &'a Upstream, path: &'a str, id: &'a str) -> Self {
        Self {
            client,
            path,
            authority: &upstream.authority,
            set: &upstream.headers,
            required: upstream.provider.required_headers(),
            id,
            traceparent: None,
            session: false,
            inspected: true,
            length: None,
            upgrade: None,
        }
    }

    /// Every header of the request but the framing, in the order in which it is sent.
    pub fn each(&self, mut header: impl FnMut(&[u8], &HeaderValue)) {
        let replaced = |name: &HeaderName| {
            self.set.iter().any(|(set, _)| set == name)
                || (self.traceparent.is_some() && self.is_trace(name))
                || (self.session && name == SESSION)
        };
        for (name, value) in forwarded(&self.client.headers, self.inspected).filter(|(name, _)| !replaced(name)) {
            header(name.as_ref(), value);
        }
        for (name, value) in self.set {
            header(name.as_ref(), value);
        }
        for (name, value) in self.required {
            if !self.client.headers.contains_key(*name) {
                header(name.as_bytes(), &HeaderValue::from_static(value));
            }
        }
        if let Ok(id) = HeaderValue::from_str(self.id) {
            header(REQUEST_ID.as_ref(), &id);
            if self.session {
                header(SESSION.as_bytes(), &id);
            }
        }
        if let Some(traceparent) = &self.traceparent {
            header(TRACEPARENT.as_bytes(), traceparent);
        }
    }

    /// Whether a client's header gives way to our place in the trace; what vendors added to theirs goes on with it,
    /// unless theirs was none.
    fn is_trace(&self, name: &HeaderName) -> bool {
        name == TRACEPARENT || (name == TRACESTATE && Context::of(&self.client.headers).is_none())
    }

    /// The head as HTTP/1.1 puts it on the wire.
    pub fn http1(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(1024);
        for part in [self.client.method.as_str(), " ", self.path, " HTTP/1.1\r\nhost: "] {
            out.extend_from_slice(part.as_bytes());
        }
        out.extend_from_slice(self.authority.as_bytes());
        out.extend_from_slice(b"\r\n");
        self.each(|name, value| line(&mut out, name, value.as_bytes()));
        if let Some(length) = self.length {
            line(&mut out, b"content-length", length.to_string().as_bytes());
        }
        if let Some(protocol) = self.upgrade {
            line(&mut out, b"connection", b"upgrade");
            line(&mut out, b"upgrade", protocol.as_bytes());
        }
        out.extend_from_slice(b"\r\n");
        out
    }
}

fn line(out: &mut Vec<u8>, name: &[u8], value: &[u8]) {
    for part in [name, b": ", value, b"\r\n"] {
        out.extend_from_slice(part);
    }
}

/// Whether a client's own id for its request can stand in a header of ours: 1 to 128 of `A-Z a-z 0-9 - _ . :`.
pub fn is_sane_id(id: &str) -> bool {
    let sane = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.:".contains(&byte);
    (1..=128).contains(&id.len()) && id.bytes().all(sane)
}

/// Where `told` (a `Location`) leads as a client of ours may know it: what is below an address of the upstream's own is
/// a path here, without the `base` that its paths begin with there. `None`: it names somebody else, or nobody can say.
pub fn led<'a>(told: &'a str, is_own: impl Fn(&str) -> bool, base: &str) -> Option<&'a str> {
    let (authority, path) = authority(told);
    let is_readable = !told.contains('\\') && authority.is_none_or(is_own);
    let below = path.strip_prefix(base).filter(|rest| rest.starts_with('/')).unwrap_or(path);
    match (authority, below) {
        _ if !is_readable => None,
        (Some(_), "") => Some("/"),
        // Neither a second authority in the path, nor a query without one.
        (Some(_), below) if !below.starts_with('/') || below.starts_with("//") => None,
        (_, below) => Some(below),
    }
}

/// The host and port that a reference names, if it names one, and what is behind them.
fn authority(reference: &str) -> (Option<&str>, &str) {
    let is_scheme = |scheme: &str| !scheme.is_empty() && !scheme.contains(['/', '?', '#']);
    let named = match reference.split_once("//") {
        Some(("", rest)) => rest,
        Some((scheme, rest)) if scheme.strip_suffix(':').is_some_and(is_scheme) => rest,
        _ => return (None, reference),
    };
    let (authority, path) = named.split_at(named.find(['/', '?', '#']).unwrap_or(named.len()));
    (Some(authority.rsplit('@').next().unwrap_or_default()), path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(headers: &[(&str, &str)]) -> request::Parts {
        let builder = http::Request::post("/v1/chat/completions");
        headers
            .iter()
            .fold(builder, |builder, (name, value)| builder.header(*name, *value))
            .body(())
            .unwrap()
            .into_parts()
            .0
    }

    fn sent(client: &request::Parts, set: &[(HeaderName, HeaderValue)]) -> String {
        let authority = HeaderValue::from_static("up:8000");
        let head = RequestHead {
            client,
            path: "/v1/x?y=1",
            authority: &authority,
            set,
            required: &[("anthropic-version", "2023-06-01")],
            id: "id-1",
            traceparent: None,
            session: false,
            inspected: true,
            length: Some(2),
            upgrade: None,
        };
        String::from_utf8(head.http1()).unwrap()
    }

    #[test]
    fn nothing_of_the_clients_connection_or_credentials_goes_on() {
        let client = parts(&[
            ("Authorization", "Bearer canary"),
            ("x-api-key", "canary"),
            ("api-key", "canary"),
            ("cookie", "canary"),
            ("proxy-authorization", "canary"),
            ("x-infergate-tenant", "canary"),
            ("x-hop", "canary"),
            ("Connection", "keep-alive, X-Hop"),
            ("Host", "canary"),
            ("Transfer-Encoding", "canary"),
            ("Content-Length", "99"),
            ("Expect", "100-continue"),
            ("accept-encoding", "gzip"),
            ("OpenAI-Organization", "kept"),
        ]);
        let sent = sent(&client, &[]);
        assert!(!sent.contains("canary"), "{sent}");
        assert_eq!(
            sent,
            "POST /v1/x?y=1 HTTP/1.1\r\nhost: up:8000\r\nopenai-organization: kept\r\nanthropic-version: 2023-06-01\r\nx-request-id: id-1\r\ncontent-length: 2\r\n\r\n"
        );
    }

    #[test]
    fn the_policys_headers_win() {
        let set = [(HeaderName::from_static("x-team"), HeaderValue::from_static("ours"))];
        let sent = sent(&parts(&[("x-team", "theirs"), ("anthropic-version", "mine")]), &set);
        assert!(sent.contains("x-team: ours") && !sent.contains("theirs"));
        assert!(sent.contains("anthropic-version: mine") && !sent.contains("2023-06-01"));
    }

    #[test]
    fn an_id_comes_back_only_if_it_is_sane() {
        assert!(is_sane_id("req_1-a.B:2"));
        assert!(["a b", "", &"x".repeat(129), "\u{e4}"].iter().all(|id| !is_sane_id(id)));
    }

    #[test]
    fn a_redirect_leads_to_a_path_of_ours_or_nowhere() {
        let own = |authority: &str| authority == "gpu:8000";
        for (told, leads) in [
            ("http://gpu:8000/base/v1/x?y=1#z", Some("/v1/x?y=1#z")),
            ("https://gpu:8000/other", Some("/other")),
            ("//gpu:8000/base/v1/", Some("/v1/")),
            ("http://user:word@gpu:8000/base/x", Some("/x")),
            ("http://gpu:8000", Some("/")),
            ("http://gpu:8000/base", Some("/base")),
            ("/base/v1/x", Some("/v1/x")),
            ("/basement/x", Some("/basement/x")),
            ("v1/x", Some("v1/x")),
            ("../x?next=http://gpu:8000/", Some("../x?next=http://gpu:8000/")),
            ("http://gpu:8001/v1/x", None),
            ("http://gpu:8000@elsewhere/x", None),
            ("http://gpu:8000//elsewhere/x", None),
            ("http://gpu:8000/base//elsewhere/x", None),
            ("http://gpu:8000?x", None),
            ("/\\elsewhere/x", None),
            ("//elsewhere/x", None),
        ] {
            assert_eq!(led(told, own, "/base"), leads, "{told}");
        }
        assert_eq!(led("http://gpu:8000/v1/x", own, ""), Some("/v1/x"));
    }
}
