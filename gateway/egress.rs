//! Outgoing HTTP for side calls: audit sinks, collectors, key sets. Never for a request's own upstream.
//!
//! Names are resolved by the system, on a blocking thread: use it on the background runtime only.

use std::error::Error;
use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use infergate_plugins::sink::Post;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, RootCertStore, crypto};

/// The longest answer that is read.
const ANSWER_BYTES_MAX: usize = 1 << 20;
/// Until a connection stands.
const CONNECT: Duration = Duration::from_secs(5);
/// How long an idle connection is kept.
const IDLE: Duration = Duration::from_secs(30);

/// A client for side calls. Redirects are not followed: they would carry credentials elsewhere.
#[derive(Clone)]
pub struct Egress {
    client: legacy::Client<HttpsConnector<HttpConnector>, Full<Bytes>>,
    tls: ClientConfig,
}

impl fmt::Debug for Egress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Egress")
    }
}

impl Egress {
    /// A client that trusts the authorities in `ca_file`, or the system's.
    pub fn new(ca_file: Option<&Path>) -> Result<Self, String> {
        let tls = tls_config(ca_file)?;
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        tcp.set_connect_timeout(Some(CONNECT));
        let https = HttpsConnectorBuilder::new().with_tls_config(tls.clone()).https_or_http().enable_http1();
        let client = legacy::Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE)
            .build(https.wrap_connector(tcp));
        Ok(Self { client, tls })
    }

    /// Sends a request and reads the whole answer, at most 1 MiB of it, all `within` this time. The error names
    /// the server, but neither path nor query nor any header: there are secrets in them.
    pub async fn send(&self, request: Request<Bytes>, within: Duration) -> Result<Response<Bytes>, String> {
        let server = server(&request);
        let told = |message: String| format!("{server}: {message}");
        match tokio::time::timeout(within, self.exchange(request)).await {
            Ok(answer) => answer.map_err(told),
            Err(_) => Err(told(format!("no answer within {} ms", within.as_millis()))),
        }
    }

    /// Posts this, and returns what a good answer says.
    pub async fn post(&self, post: Post, within: Duration) -> Result<Bytes, String> {
        let mut request = Request::post(post.url);
        for (name, value) in post.headers {
            request = request.header(name, value);
        }
        let request = request.body(post.body).map_err(|error| error.to_string())?;
        let answer = self.send(request, within).await?;
        match answer.status() {
            status if status.is_success() => Ok(answer.into_body()),
            status => Err(format!("it answers with status {}", status.as_u16())),
        }
    }

    /// How it speaks TLS, for clients of other protocols.
    pub fn tls(&self) -> ClientConfig {
        self.tls.clone()
    }

    async fn exchange(&self, request: Request<Bytes>) -> Result<Response<Bytes>, String> {
        let answer = self.client.request(request.map(Full::new)).await.map_err(|error| plain(&error))?;
        let (head, body) = answer.into_parts();
        match Limited::new(body, ANSWER_BYTES_MAX).collect().await {
            Ok(body) => Ok(Response::from_parts(head, body.to_bytes())),
            Err(error) if error.is::<LengthLimitError>() => Err("the answer is longer than 1 MiB".to_owned()),
            Err(error) => Err(format!("the answer broke off: {}", plain(error.as_ref()))),
        }
    }
}

/// Scheme and authority without a user's name and password.
fn server<B>(request: &Request<B>) -> String {
    let uri = request.uri();
    let port = uri.port_u16().map(|port| format!(":{port}")).unwrap_or_default();
    format!("{}://{}{port}", uri.scheme_str().unwrap_or("http"), uri.host().unwrap_or_default())
}

/// The innermost causes of an error: the outer ones only say that there is an error.
fn plain(error: &(dyn Error + 'static)) -> String {
    let mut causes = Vec::new();
    let mut next = Some(error);
    while let Some(error) = next {
        causes.push(error.to_string());
        next = error.source();
    }
    causes.dedup();
    let inner = causes.len().saturating_sub(2);
    causes.split_off(inner).join(": ")
}

fn tls_config(ca_file: Option<&Path>) -> Result<ClientConfig, String> {
    let roots = match ca_file {
        Some(path) => authorities(path)?,
        None => system_authorities(),
    };
    let provider = Arc::new(crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    Ok(builder.map_err(|error| error.to_string())?.with_root_certificates(roots).with_no_client_auth())
}

fn authorities(path: &Path) -> Result<RootCertStore, String> {
    let told = |error: &dyn fmt::Display| format!("{}: {error}", path.display());
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_file_iter(path).map_err(|error| told(&error))? {
        roots.add(certificate.map_err(|error| told(&error))?).map_err(|error| told(&error))?;
    }
    if roots.is_empty() { Err(told(&"there is no certificate in this file")) } else { Ok(roots) }
}

/// What the system trusts. A system without any still speaks http; https then says that the issuer is unknown.
fn system_authorities() -> RootCertStore {
    let found = rustls_native_certs::load_native_certs();
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(found.certs);
    if roots.is_empty() {
        tracing::warn!(errors = ?found.errors, "the system trusts no certificate authority: https side calls will fail");
    }
    roots
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;

    const WITHIN: Duration = Duration::from_secs(5);

    /// Takes one connection and gives this answer on it once a head with a body of two bytes has come.
    async fn answering(answer: impl Into<Vec<u8>>) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/hook?token=canary", listener.local_addr().unwrap());
        let answer = answer.into();
        tokio::spawn(async move { answer_once(listener.accept().await.unwrap().0, &answer).await });
        url
    }

    async fn answer_once(mut stream: impl AsyncRead + AsyncWrite + Unpin, answer: &[u8]) {
        let mut read = Vec::new();
        while !read.ends_with(b"\r\n\r\nhi") {
            assert_ne!(stream.read_buf(&mut read).await.unwrap(), 0, "{}", String::from_utf8_lossy(&read));
        }
        let _ = stream.write_all(answer).await;
    }

    fn request(url: &str) -> Request<Bytes> {
        Request::post(url).header("x-key", "canary").body(Bytes::from_static(b"hi")).unwrap()
    }

    async fn send(url: &str, within: Duration) -> Result<Response<Bytes>, String> {
        Egress::new(None).unwrap().send(request(url), within).await
    }

    #[tokio::test]
    async fn an_answer_comes_back_whole_and_a_redirect_is_only_an_answer() {
        let url = answering("HTTP/1.1 302 Found\r\nlocation: http://elsewhere/\r\ncontent-length: 2\r\n\r\nok").await;
        let answer = send(&url, WITHIN).await.unwrap();
        assert_eq!((answer.status().as_u16(), answer.body().as_ref()), (302, b"ok".as_slice()));
    }

    #[tokio::test]
    async fn an_answer_without_end_is_cut_off() {
        let mut long = b"HTTP/1.1 200 OK\r\n\r\n".to_vec();
        long.resize(2 << 20, b'x');
        let error = send(&answering(long).await, WITHIN).await.unwrap_err();
        assert!(error.ends_with("the answer is longer than 1 MiB"), "{error}");
    }

    #[tokio::test]
    async fn a_silent_server_is_given_up_in_time() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/", listener.local_addr().unwrap());
        let error = send(&url, Duration::from_millis(50)).await.unwrap_err();
        assert!(error.ends_with("no answer within 50 ms"), "{error}");
    }

    #[tokio::test]
    async fn an_error_names_the_server_and_shows_no_secret() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        drop(listener);
        let error = send(&format!("http://user:canary@{address}/canary?t=canary"), WITHIN).await.unwrap_err();
        assert!(error.starts_with(&format!("http://{address}: ")) && error.contains("refused"), "{error}");
        assert!(!error.contains("canary"), "{error}");
    }

    #[tokio::test]
    async fn a_certificate_must_come_from_the_named_authority() {
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let ca_file = directory.path().join("ca.pem");
        std::fs::write(&ca_file, made.cert.pem()).unwrap();
        let key = rustls::pki_types::PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
        let provider = Arc::new(crypto::aws_lc_rs::default_provider());
        let server = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![made.cert.der().clone()], key)
            .unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("https://localhost:{}/", listener.local_addr().unwrap().port());
        tokio::spawn(async move {
            let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(server));
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                if let Ok(stream) = acceptor.accept(stream).await {
                    answer_once(stream, b"HTTP/1.1 204 No Content\r\n\r\n").await;
                }
            }
        });
        let error = send(&url, WITHIN).await.unwrap_err();
        assert!(error.contains("certificate"), "{error}");
        let answer = Egress::new(Some(&ca_file)).unwrap().send(request(&url), WITHIN).await.unwrap();
        assert_eq!(answer.status(), 204);
    }

    #[test]
    fn a_file_without_an_authority_is_told() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ca.pem");
        std::fs::write(&path, "nothing").unwrap();
        let error = Egress::new(Some(&path)).unwrap_err();
        assert!(error.contains("ca.pem: there is no certificate in this file"), "{error}");
    }
}
