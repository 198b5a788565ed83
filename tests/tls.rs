//! TLS on both sides, HTTP/2 where it is negotiated, and Unix sockets.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use rustls::client::Resumption;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tempfile::TempDir;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio_rustls::client::TlsStream;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::support::{Client, Gateway, Process, Simulated, chat, eventually, model_server, policy};

const SOON: Duration = Duration::from_secs(10);

/// An authority that signs certificates, and a directory for its files.
pub(crate) struct Authority {
    pub(crate) issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
    pub(crate) directory: TempDir,
}

impl Authority {
    pub(crate) fn new(name: &str) -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        let certificate = params.self_signed(&key).unwrap();
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("ca.pem"), certificate.pem()).unwrap();
        Self { certificate: certificate.der().clone(), issuer: Issuer::new(params, key), directory }
    }

    /// Signs a certificate for `name` and puts it and its key into `files`.
    fn sign(&self, name: &str, files: &Files) {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        std::fs::write(&files.chain, certificate.pem()).unwrap();
        std::fs::write(&files.key, key.serialize_pem()).unwrap();
    }

    /// A new certificate for `name`, in this authority's directory.
    pub(crate) fn issue(&self, name: &str) -> Files {
        let files = Files::new(self.directory.path(), name);
        self.sign(name, &files);
        files
    }

    pub(crate) fn file(&self) -> PathBuf {
        self.directory.path().join("ca.pem")
    }

    fn roots(&self) -> RootCertStore {
        let mut roots = RootCertStore::empty();
        roots.add(self.certificate.clone()).unwrap();
        roots
    }
}

/// The files of a certificate.
#[derive(Clone)]
pub(crate) struct Files {
    pub(crate) chain: PathBuf,
    pub(crate) key: PathBuf,
}

impl Files {
    pub(crate) fn new(directory: &Path, name: &str) -> Self {
        Self { chain: directory.join(format!("{name}.crt")), key: directory.join(format!("{name}.key")) }
    }

    fn chain(&self) -> Vec<CertificateDer<'static>> {
        CertificateDer::pem_file_iter(&self.chain).unwrap().map(Result::unwrap).collect()
    }

    fn key(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::from_pem_file(&self.key).unwrap()
    }

    pub(crate) fn yaml(&self) -> String {
        format!("{{chain: {}, key: {}}}", self.chain.display(), self.key.display())
    }
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

/// A client that trusts `authority`, shows `own` and offers `alpn`.
pub(crate) fn client(authority: &Authority, own: Option<&Files>, alpn: &[&str]) -> Arc<ClientConfig> {
    let config = ClientConfig::builder_with_provider(provider()).with_safe_default_protocol_versions().unwrap();
    let config = config.with_root_certificates(authority.roots());
    let mut config = match own {
        Some(own) => config.with_client_auth_cert(own.chain(), own.key()).unwrap(),
        None => config.with_no_client_auth(),
    };
    config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
    // A resumed session shows the certificate of the first one.
    config.resumption = Resumption::disabled();
    Arc::new(config)
}

pub(crate) async fn connect(
    address: SocketAddr,
    name: &str,
    config: &Arc<ClientConfig>,
) -> io::Result<TlsStream<TcpStream>> {
    let stream = TcpStream::connect(address).await?;
    let name = ServerName::try_from(name.to_owned()).unwrap();
    TlsConnector::from(config.clone()).connect(name, stream).await
}

/// Asks for `path` over a connection that stands; the status and the body.
async fn ask(
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    http2: bool,
    stream_answer: bool,
) -> Result<(u16, Bytes), String> {
    let told = |error: hyper::Error| format!("{error:?}");
    let request = Request::post("http://a.test/v1/chat/completions")
        .header("host", "a.test")
        .header("content-type", "application/json");
    let request = request.body(Full::new(Bytes::from(chat(stream_answer, 3)))).unwrap();
    let asking = async {
        let answer = if http2 {
            let (mut sender, connection) =
                hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
                    .await
                    .map_err(told)?;
            tokio::spawn(connection);
            sender.send_request(request).await.map_err(told)?
        } else {
            let (mut sender, connection) =
                hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(told)?;
            tokio::spawn(connection);
            sender.send_request(request).await.map_err(told)?
        };
        let status = answer.status().as_u16();
        Ok((status, answer.into_body().collect().await.map_err(told)?.to_bytes()))
    };
    tokio::time::timeout(SOON, asking).await.expect("in time")
}

/// A connection and one request on it; either may fail.
async fn visit(address: SocketAddr, name: &str, config: &Arc<ClientConfig>) -> Result<u16, String> {
    let stream = connect(address, name, config).await.map_err(|error| error.to_string())?;
    ask(stream, false, false).await.map(|(status, _)| status)
}

fn shown(stream: &TlsStream<TcpStream>) -> Vec<u8> {
    stream.get_ref().1.peer_certificates().unwrap()[0].to_vec()
}

async fn gateway(server: &Simulated, tls: &str) -> Gateway {
    Gateway::with(&policy(&[&server.url()], ""), &format!("threads: 2\nlisteners:\n  - tls: {{{tls}}}\n"), &[]).await
}

#[tokio::test]
async fn a_listener_shows_the_certificate_that_fits_the_name() {
    let (server, authority) = (model_server().await, Authority::new("ours"));
    let (a, b) = (authority.issue("a.test"), authority.issue("*.b.test"));
    let gateway = gateway(&server, &format!("certificates: [{}, {}]", a.yaml(), b.yaml())).await;
    let config = client(&authority, None, &["http/1.1"]);
    for (name, files) in [("a.test", &a), ("x.b.test", &b)] {
        let stream = connect(gateway.address, name, &config).await.unwrap();
        assert_eq!(shown(&stream), files.chain()[0].to_vec(), "{name}");
        assert_eq!(ask(stream, false, false).await.unwrap().0, 200, "{name}");
    }
    // A name that none fits gets the first, which the client then refuses.
    assert!(connect(gateway.address, "c.test", &config).await.is_err());
    // Without TLS nobody is served.
    assert!(Client::h1().try_get(gateway.address, "/v1/models").await.is_none());
}

#[tokio::test]
async fn http2_is_spoken_where_the_client_offers_it() {
    let (server, authority) = (model_server().await, Authority::new("ours"));
    let gateway = gateway(&server, &format!("certificates: [{}]", authority.issue("a.test").yaml())).await;
    let offers: [(&[&str], Option<&[u8]>); 3] =
        [(&["h2", "http/1.1"], Some(b"h2")), (&["http/1.1"], Some(b"http/1.1")), (&[], None)];
    for (offered, chosen) in offers {
        let stream = connect(gateway.address, "a.test", &client(&authority, None, offered)).await.unwrap();
        assert_eq!(stream.get_ref().1.alpn_protocol(), chosen);
        let (status, body) = ask(stream, chosen == Some(b"h2"), true).await.unwrap();
        assert!(status == 200 && body.ends_with(b"data: [DONE]\n\n"), "{offered:?}");
    }
}

/// What curl says of a POST of so many bytes over HTTP/2: its exit status and the answer's.
async fn curl(gateway: &Gateway, path: &str, bytes: usize) -> (Option<i32>, String) {
    let body = gateway.directory.path().join("body");
    std::fs::write(&body, vec![b'a'; bytes]).unwrap();
    let url = format!("https://{}{path}", gateway.address);
    let mut curl = tokio::process::Command::new("curl");
    curl.args(["--silent", "--insecure", "--http2", "--output", "/dev/null", "--write-out", "%{http_code}"]);
    let told = curl.arg("--data-binary").arg(format!("@{}", body.display())).arg(url).output().await.unwrap();
    (told.status.code(), String::from_utf8(told.stdout).unwrap())
}

#[tokio::test]
async fn a_refusal_over_http2_reaches_a_client_that_is_still_sending() {
    let (server, authority) = (model_server().await, Authority::new("ours"));
    let gateway = gateway(&server, &format!("certificates: [{}]", authority.issue("a.test").yaml())).await;
    for bytes in [10, 1_000, 100_000].repeat(7) {
        let told = curl(&gateway, "/v1/nothing", bytes).await;
        assert_eq!(told, (Some(0), "404".to_owned()), "{bytes} bytes");
    }
}

#[tokio::test]
async fn a_client_without_the_right_certificate_is_refused_where_one_is_required() {
    let (server, authority, stranger) = (model_server().await, Authority::new("ours"), Authority::new("theirs"));
    let tls = format!(
        "certificates: [{}], client_ca: {}, require_client_certificate: true",
        authority.issue("a.test").yaml(),
        authority.file().display()
    );
    let gateway = gateway(&server, &tls).await;
    let (good, wrong) = (authority.issue("app.test"), stranger.issue("app.test"));
    let seen = || server.seen().iter().filter(|seen| seen.method == "POST").count();
    assert!(visit(gateway.address, "a.test", &client(&authority, None, &[])).await.is_err(), "none");
    assert!(visit(gateway.address, "a.test", &client(&authority, Some(&wrong), &[])).await.is_err(), "a stranger's");
    assert_eq!(seen(), 0);
    assert_eq!(visit(gateway.address, "a.test", &client(&authority, Some(&good), &[])).await, Ok(200));
    assert_eq!(seen(), 1);
}

#[tokio::test]
async fn a_client_certificate_can_be_optional_but_never_wrong() {
    let (server, authority, stranger) = (model_server().await, Authority::new("ours"), Authority::new("theirs"));
    let tls =
        format!("certificates: [{}], client_ca: {}", authority.issue("a.test").yaml(), authority.file().display());
    let gateway = gateway(&server, &tls).await;
    let (good, wrong) = (authority.issue("app.test"), stranger.issue("app.test"));
    assert_eq!(visit(gateway.address, "a.test", &client(&authority, None, &[])).await, Ok(200));
    assert_eq!(visit(gateway.address, "a.test", &client(&authority, Some(&good), &[])).await, Ok(200));
    assert!(visit(gateway.address, "a.test", &client(&authority, Some(&wrong), &[])).await.is_err());
}

#[tokio::test]
async fn certificates_are_read_again_and_a_broken_one_changes_nothing() {
    let (server, authority, next) = (model_server().await, Authority::new("ours"), Authority::new("next"));
    let files = authority.issue("a.test");
    let tls = format!("certificates: [{}], client_ca: {}", files.yaml(), authority.file().display());
    let gateway = gateway(&server, &tls).await;
    let config = client(&authority, None, &[]);
    // A connection from before goes on.
    let before = connect(gateway.address, "a.test", &config).await.unwrap();
    let first = shown(&before);
    authority.sign("a.test", &files);
    assert_eq!(Client::h1().post(gateway.admin, "/admin/reload", "").await.status, 200);
    let second = shown(&connect(gateway.address, "a.test", &config).await.unwrap());
    assert!(second != first && second == files.chain()[0].to_vec());
    assert_eq!(ask(before, false, false).await.unwrap().0, 200);
    std::fs::write(&files.chain, "no certificate").unwrap();
    Client::h1().post(gateway.admin, "/admin/reload", "").await;
    assert_eq!(shown(&connect(gateway.address, "a.test", &config).await.unwrap()), second);
    eventually("it is told", SOON, || async { gateway.log().contains("a certificate was refused") }).await;
    // A key that belongs to another certificate is refused as well.
    authority.sign("a.test", &Files { chain: files.chain.clone(), key: files.key.with_extension("other") });
    gateway.signal("HUP");
    eventually("it is told", SOON, || async { gateway.log().contains("does not fit") }).await;
    assert_eq!(shown(&connect(gateway.address, "a.test", &config).await.unwrap()), second);
    // New authorities for clients come with it.
    let theirs = next.issue("app.test");
    assert!(visit(gateway.address, "a.test", &client(&authority, Some(&theirs), &[])).await.is_err());
    authority.sign("a.test", &files);
    std::fs::copy(next.file(), authority.file()).unwrap();
    Client::h1().post(gateway.admin, "/admin/reload", "").await;
    assert_eq!(visit(gateway.address, "a.test", &client(&authority, Some(&theirs), &[])).await, Ok(200));
}

#[tokio::test]
async fn a_certificate_that_is_replaced_on_the_disk_is_noticed() {
    let (server, authority) = (model_server().await, Authority::new("ours"));
    let files = authority.issue("a.test");
    let gateway = gateway(&server, &format!("certificates: [{}]", files.yaml())).await;
    let config = client(&authority, None, &[]);
    authority.sign("a.test", &files);
    let wanted = files.chain()[0].to_vec();
    // It lies in another directory than the policy, so it is looked at every ten seconds.
    let shows = || async { shown(&connect(gateway.address, "a.test", &config).await.unwrap()) == wanted };
    eventually("the new certificate is shown", Duration::from_secs(15), shows).await;
}

#[tokio::test]
async fn a_listener_with_broken_files_does_not_start() {
    let authority = Authority::new("ours");
    let (good, other) = (authority.issue("a.test"), authority.issue("b.test"));
    let mixed = Files { chain: good.chain.clone(), key: other.key.clone() };
    let missing = Files::new(Path::new("/nowhere"), "a");
    for (files, expected) in [(mixed, "does not fit"), (missing, "/nowhere/a.crt")] {
        let directory = tempfile::tempdir().unwrap();
        let settings = directory.path().join("settings.yaml");
        std::fs::write(&settings, format!("listeners: [{{tls: {{certificates: [{}]}}}}]\n", files.yaml())).unwrap();
        let arguments = [
            "--settings",
            settings.to_str().unwrap(),
            "--listen",
            "127.0.0.1:0",
            "--admin",
            "127.0.0.1:0",
            "--upstream",
            "http://127.0.0.1:1",
        ];
        let (code, _, told) = Process::run(&arguments);
        assert_eq!(code, Some(1), "{told}");
        assert!(told.contains(expected), "{told}");
    }
}

// Upstreams.

/// Puts TLS before a model server; the port.
async fn terminate(server: &Simulated, files: &Files, alpn: &[&str]) -> u16 {
    let config = ServerConfig::builder_with_provider(provider()).with_safe_default_protocol_versions().unwrap();
    let mut config = config.with_no_client_auth().with_single_cert(files.chain(), files.key()).unwrap();
    config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (port, behind, acceptor) =
        (listener.local_addr().unwrap().port(), server.address(), TlsAcceptor::from(Arc::new(config)));
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let acceptor = acceptor.clone();
            // A handshake that fails is what some of the tests are about.
            tokio::spawn(async move {
                let mut near = acceptor.accept(stream).await?;
                let mut far = TcpStream::connect(behind).await?;
                tokio::io::copy_bidirectional(&mut near, &mut far).await
            });
        }
    });
    port
}

async fn behind_tls(url: &str, extra: &str, ca: Option<&Path>) -> Gateway {
    let settings = ca.map_or("threads: 2\n".to_owned(), |ca| format!("threads: 2\nca_file: {}\n", ca.display()));
    Gateway::with(
        &policy(&[&format!("{url}{extra}")], "health: {enabled: false}\nretry: {attempts: 4, backoff_ms: 0}\n"),
        &settings,
        &[],
    )
    .await
}

#[tokio::test]
async fn an_upstream_with_a_private_authority_is_spoken_to_in_what_it_negotiates() {
    let (server, authority) = (model_server().await, Authority::new("private"));
    let (by_name, by_address) = (authority.issue("localhost"), authority.issue("127.0.0.1"));
    let cases: [(&Files, &str, &[&str], &str, bool); 5] = [
        (&by_name, "localhost", &["h2", "http/1.1"], "", true),
        (&by_name, "localhost", &["http/1.1"], "", false),
        (&by_name, "localhost", &[], "", false),
        (&by_name, "localhost", &["h2", "http/1.1"], "\n        http2: never", false),
        (&by_address, "127.0.0.1", &["h2"], "", true),
    ];
    for (files, host, alpn, extra, http2) in cases {
        let port = terminate(&server, files, alpn).await;
        let gateway = behind_tls(&format!("https://{host}:{port}"), extra, Some(&authority.file())).await;
        for client in Client::both() {
            let answer = client.post(gateway.address, "/v1/chat/completions", chat(false, 2)).await;
            assert_eq!(answer.status, 200, "{host} {alpn:?}: {}", answer.text());
            let answer = client.post(gateway.address, "/v1/chat/completions", chat(true, 2)).await;
            assert!(answer.text().ends_with("data: [DONE]\n\n"), "{host} {alpn:?}");
            let seen = server.seen().pop().unwrap();
            assert_eq!(seen.http2, http2, "{host} {alpn:?} {extra}");
            assert_eq!(seen.body_bytes, chat(true, 2).len());
        }
    }
}

#[tokio::test]
async fn an_upstream_that_cannot_prove_who_it_is_gets_nothing() {
    let (server, authority, stranger) = (model_server().await, Authority::new("private"), Authority::new("stranger"));
    for (files, ca) in [
        (stranger.issue("localhost"), Some(authority.file())),
        (authority.issue("other.test"), Some(authority.file())),
        (authority.issue("localhost"), None),
    ] {
        let port = terminate(&server, &files, &["h2", "http/1.1"]).await;
        let gateway = behind_tls(&format!("https://localhost:{port}"), "", ca.as_deref()).await;
        let answer = Client::h1().post(gateway.address, "/v1/chat/completions", chat(false, 1)).await;
        assert_eq!((answer.status, answer.code().as_str()), (502, "connect_failed"), "{}", answer.text());
    }
    assert!(server.seen().is_empty());
}

#[tokio::test]
async fn an_upstream_can_be_spoken_to_in_http2_without_tls() {
    let server = model_server().await;
    let gateway = behind_tls(&server.url(), "\n        http2: always", None).await;
    for client in Client::both() {
        for stream in [false, true] {
            let answer = client.post(gateway.address, "/v1/chat/completions", chat(stream, 3)).await;
            assert!(answer.status == 200 && answer.whole, "{}", answer.text());
            let seen = server.seen().pop().unwrap();
            assert_eq!((seen.http2, seen.body_bytes), (true, chat(stream, 3).len()));
        }
    }
    assert_eq!(server.open_connections(), 1, "many requests, one connection");
}

// Unix sockets.

#[tokio::test]
async fn clients_and_operators_can_come_by_a_unix_socket() {
    let server = model_server().await;
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    std::fs::write(at("policy.yaml"), policy(&[&server.url()], "")).unwrap();
    std::fs::write(at("settings.yaml"), "listeners: [{permissions: '600'}]\nthreads: 1\n").unwrap();
    let (listen, admin) =
        (format!("unix:{}", at("clients.sock").display()), format!("unix:{}", at("admin.sock").display()));
    let arguments = [
        "--policy",
        at("policy.yaml").to_str().unwrap(),
        "--settings",
        at("settings.yaml").to_str().unwrap(),
        "--listen",
        &listen,
        "--admin",
        &admin,
    ]
    .map(str::to_owned);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let process = Process::start(&arguments, &[]);
    eventually("it greets", SOON, || async { process.out().contains("--unix-socket") }).await;
    for http2 in [false, true] {
        let stream = UnixStream::connect(at("clients.sock")).await.unwrap();
        let (status, body) = ask(stream, http2, true).await.unwrap();
        assert!(status == 200 && body.ends_with(b"data: [DONE]\n\n"));
    }
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(at("clients.sock")).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);
    assert!(UnixStream::connect(at("admin.sock")).await.is_ok(), "{}", process.err());
}

#[tokio::test]
async fn an_upstream_can_be_a_unix_socket() {
    let server = model_server().await;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vllm.sock");
    let (listener, behind) = (UnixListener::bind(&path).unwrap(), server.address());
    tokio::spawn(async move {
        loop {
            let (mut near, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                let mut far = TcpStream::connect(behind).await?;
                tokio::io::copy_bidirectional(&mut near, &mut far).await
            });
        }
    });
    let gateway = Gateway::start(&policy(&[&format!("unix:{}", path.display())], "")).await;
    for client in Client::both() {
        let answer = client.post(gateway.address, "/v1/chat/completions", chat(true, 2)).await;
        assert!(answer.status == 200 && answer.whole, "{}", answer.text());
    }
    assert_eq!(server.seen().pop().unwrap().headers["host"], "localhost");
}
