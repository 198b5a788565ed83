//! Client certificates: real handshakes, and who is known by them.

use std::sync::Arc;

use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rcgen::{CertificateParams, DnType, KeyPair, SanType};
use rustls::ClientConfig;
use serde_json::json;

use super::{CHAT, identified};
use crate::support::keys::{Key, PEPPER, entries, key};
use crate::support::{Client, Gateway, Journal, chat, model_server, policy};
use crate::tls::{Authority, Files, client, connect};

/// A certificate of this authority with a URI and a subject.
fn certificate(authority: &Authority, file: &str, uri: &str, name: &str, days: i64) -> Files {
    let files = Files::new(authority.directory.path(), file);
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    if !uri.is_empty() {
        params.subject_alt_names.push(SanType::URI(uri.try_into().unwrap()));
    }
    params.distinguished_name.push(DnType::CommonName, name);
    params.distinguished_name.push(DnType::OrganizationName, "Acme");
    params.not_after =
        (std::time::SystemTime::now() + std::time::Duration::from_secs(86_400 * days.unsigned_abs())).into();
    let key = KeyPair::generate().unwrap();
    let made = params.signed_by(&key, &authority.issuer).unwrap();
    std::fs::write(&files.chain, made.pem()).unwrap();
    std::fs::write(&files.key, key.serialize_pem()).unwrap();
    files
}

const RULES: &str = "authenticators:\n  - mtls:\n      identities:\n        - {spiffe: 'spiffe://acme.test/ns/search/*', tenant: search}\n        - {subject: {common_name: ci, organization: Acme}, tenant: ads, name: builds}\n";

async fn gateway(authority: &Authority, url: &str, more: &str) -> Gateway {
    let own = authority.issue("a.test");
    let settings = format!(
        "threads: 2\nlisteners:\n  - tls: {{certificates: [{}], client_ca: {}}}\n",
        own.yaml(),
        authority.file().display()
    );
    let text = format!("{}tenants: {{search: {{}}, ads: {{}}}}\n{RULES}{more}", policy(&[url], ""));
    let gateway = Gateway::spawn(&text, &settings, &[], &[("INFERGATE_PEPPER", PEPPER)]);
    gateway.ready().await;
    gateway
}

/// Asks over a connection of its own; the status and the request's id.
async fn visit(gateway: &Gateway, config: &Arc<ClientConfig>, headers: &[(&str, &str)]) -> (u16, String) {
    let stream = connect(gateway.address, "a.test", config).await.unwrap();
    let http2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
    let request = Request::post(format!("https://a.test{CHAT}"))
        .header("host", "a.test")
        .header("content-type", "application/json");
    let request = headers.iter().fold(request, |request, (name, value)| request.header(*name, *value));
    let request = request.body(Full::new(Bytes::from(chat(false, 2)))).unwrap();
    let answer = if http2 {
        let (mut sender, connection) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        sender.send_request(request).await.unwrap()
    } else {
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        sender.send_request(request).await.unwrap()
    };
    let id = answer.headers()["x-request-id"].to_str().unwrap().to_owned();
    let status = answer.status().as_u16();
    answer.into_body().collect().await.unwrap();
    (status, id)
}

#[tokio::test]
async fn a_certificate_says_who_asks_and_no_header_does() {
    let (server, authority) = (model_server().await, Authority::new("ours"));
    let own = key("ads", "name: by-key");
    let keys = format!("  - keys:\n      pepper: {{env: INFERGATE_PEPPER}}\n      list:\n{}", entries(&[&own], 8));
    let gateway = gateway(&authority, &server.url(), &keys).await;
    let spiffe = certificate(&authority, "one", "spiffe://acme.test/ns/search/sa/api", "ci", 30);
    let subject = certificate(&authority, "two", "", "ci", 30);
    let stranger = certificate(&authority, "three", "spiffe://other.test/ns/search/sa/api", "else", 30);
    let forged = [
        ("x-forwarded-client-cert", "By=x;URI=spiffe://acme.test/ns/search/sa/api"),
        ("x-client-cert", "spiffe://acme.test/ns/search/sa/api"),
        ("ssl-client-s-dn", "CN=ci,O=Acme"),
    ];
    let mut expected = Vec::new();
    for alpn in [&["h2"][..], &["http/1.1"]] {
        let named = client(&authority, Some(&spiffe), alpn);
        expected.push((visit(&gateway, &named, &[]).await, Some(("spiffe://acme.test/ns/search/sa/api", "search"))));
        let by_subject = client(&authority, Some(&subject), alpn);
        expected.push((visit(&gateway, &by_subject, &[]).await, Some(("builds", "ads"))));
        // A certificate that no rule knows is left to the keys.
        let unknown = client(&authority, Some(&stranger), alpn);
        expected.push((visit(&gateway, &unknown, &forged).await, None));
        let Key { text, .. } = &own;
        expected.push((visit(&gateway, &unknown, &[("x-api-key", text)]).await, Some(("by-key", "ads"))));
        let none = client(&authority, None, alpn);
        expected.push((visit(&gateway, &none, &forged).await, None));
        // The certificate was asked first.
        expected.push((visit(&gateway, &by_subject, &[("x-api-key", text)]).await, Some(("builds", "ads"))));
    }
    let journal = Journal::settled(&gateway).await;
    for ((status, id), who) in expected {
        let record = journal.record(&id);
        assert_eq!(status, if who.is_some() { 200 } else { 401 }, "{record}");
        assert_eq!(record["principal"].as_str().zip(record["tenant"].as_str()), who, "{record}");
        if record["principal"] == "builds" {
            assert_eq!(identified(&record)["rule"], "mtls");
            assert!(identified(&record)["why"].as_str().unwrap().starts_with("the client certificate "), "{record}");
        }
    }
}

#[tokio::test]
async fn a_session_that_is_taken_up_again_is_held_to_the_authorities_of_the_moment() {
    let (server, authority, next) = (model_server().await, Authority::new("ours"), Authority::new("next"));
    let gateway = gateway(&authority, &server.url(), "").await;
    let spiffe = certificate(&authority, "one", "spiffe://acme.test/ns/search/sa/api", "x", 30);
    let mut config = ClientConfig::clone(&client(&authority, Some(&spiffe), &["http/1.1"]));
    config.resumption = rustls::client::Resumption::in_memory_sessions(8);
    let config = Arc::new(config);
    for _ in 0..3 {
        assert_eq!(visit(&gateway, &config, &[]).await.0, 200);
    }
    let resumed = connect(gateway.address, "a.test", &config).await.unwrap();
    assert_eq!(resumed.get_ref().1.handshake_kind(), Some(rustls::HandshakeKind::Resumed), "it is tried at all");
    std::fs::copy(next.file(), authority.file()).unwrap();
    assert_eq!(Client::h1().post(gateway.admin, "/admin/reload", "").await.status, 200);
    assert_eq!(visit(&gateway, &config, &[]).await.0, 401, "the authority is none any more");
}

#[tokio::test]
async fn a_policy_that_knows_certificates_is_warned_of_where_no_listener_takes_any() {
    let server = model_server().await;
    let text = format!("{}tenants: {{search: {{}}, ads: {{}}}}\n{RULES}", policy(&[&server.url()], ""));
    let gateway = Gateway::start(&text).await;
    assert!(gateway.log().contains("no listener takes client certificates"), "{}", gateway.log());
    assert_eq!(Client::h1().post(gateway.address, CHAT, chat(false, 2)).await.status, 401);
    let record = &Journal::settled(&gateway).await.of_kind("request")[0];
    assert_eq!(identified(record)["verdict"], json!("refuse"));
}
