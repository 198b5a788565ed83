//! An identity provider: its configuration, its keys, and tokens that it signs.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

use super::signer::Signer;

/// A running identity provider.
pub struct Issuer {
    /// Its address, which is its `iss`.
    pub url: String,
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

struct Shared {
    keys: Mutex<Vec<Value>>,
    answers: Mutex<How>,
    /// How often its keys were asked for.
    asked: AtomicUsize,
}

/// How it answers.
#[derive(Clone, Debug, PartialEq)]
pub enum How {
    Well,
    /// Takes connections and says nothing.
    Hangs,
    /// These bytes, whatever is asked.
    With(Vec<u8>),
}

impl Issuer {
    /// A provider with these keys.
    pub async fn start(keys: &[Value]) -> Self {
        Self::on(TcpListener::bind("127.0.0.1:0").await.unwrap(), keys)
    }

    /// The same on an address that is known before.
    pub fn on(listener: TcpListener, keys: &[Value]) -> Self {
        let url = format!("http://{}", listener.local_addr().unwrap());
        let shared = Arc::new(Shared {
            keys: Mutex::new(keys.to_vec()),
            answers: Mutex::new(How::Well),
            asked: AtomicUsize::new(0),
        });
        let (serving, own) = (shared.clone(), url.clone());
        let task = tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                // Whoever asks may leave.
                let (shared, url) = (serving.clone(), own.clone());
                tokio::spawn(async move { answer(stream, &shared, &url).await.ok() });
            }
        });
        Self { url, shared, task }
    }

    /// Has other keys from now on.
    pub fn rotate(&self, keys: &[Value]) {
        *self.shared.keys.lock() = keys.to_vec();
    }

    /// Answers in another way from now on.
    pub fn answer(&self, how: How) {
        *self.shared.answers.lock() = how;
    }

    /// How often its keys were asked for.
    pub fn asked(&self) -> usize {
        self.shared.asked.load(Ordering::SeqCst)
    }

    /// Claims of this issuer for alice of the team search, good for `seconds`.
    pub fn claims(&self, seconds: i64) -> Value {
        json!({"iss": self.url, "aud": "infergate", "sub": "alice", "team": "search", "exp": now() + seconds})
    }

    /// A good token.
    pub fn token(&self, signer: &Signer, kid: &str) -> String {
        signer.token(kid, &self.claims(600))
    }

    /// Its entry in a policy, in YAML's flow style; `more` are members.
    pub fn entry(&self, more: &str) -> String {
        format!(
            "{{issuer: '{}', name: corp, audience: [infergate], algorithms: [RS256, ES256, EdDSA], tenant: {{claim: team}}{more}}}",
            self.url
        )
    }
}

impl Drop for Issuer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Seconds since 1970.
pub fn now() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() as i64
}

async fn answer(mut stream: TcpStream, shared: &Shared, url: &str) -> std::io::Result<()> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        if stream.read_buf(&mut head).await? == 0 {
            return Ok(());
        }
    }
    let is_keys = head.starts_with(b"GET /keys ");
    shared.asked.fetch_add(usize::from(is_keys), Ordering::SeqCst);
    let how = shared.answers.lock().clone();
    let body = match how {
        How::Well if is_keys => json!({"keys": *shared.keys.lock()}).to_string(),
        How::Well => {
            json!({"issuer": url, "jwks_uri": format!("{url}/keys"), "scopes_supported": ["openid"]}).to_string()
        }
        How::With(bytes) => {
            stream.write_all(&bytes).await?;
            return stream.shutdown().await;
        }
        How::Hangs => {
            tokio::time::sleep(Duration::from_secs(600)).await;
            return Ok(());
        }
    };
    let head = format!(
        "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(format!("{head}{body}").as_bytes()).await?;
    stream.shutdown().await
}
