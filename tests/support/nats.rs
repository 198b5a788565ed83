//! A real `nats-server` with a JetStream in a directory of its own, that can be killed and started again.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use async_nats::jetstream::{self, stream};
use tempfile::TempDir;

use super::{eventually, free_port};

/// A server; it is killed when dropped.
pub struct Nats {
    child: Child,
    port: u16,
    directory: TempDir,
}

/// A message as the stream has it.
#[derive(Clone, Debug)]
pub struct Stored {
    /// Its subject.
    pub subject: String,
    /// Its `Nats-Msg-Id`.
    pub id: String,
    /// Its payload.
    pub payload: String,
}

impl Nats {
    /// A server on a free port, ready.
    pub async fn start() -> Self {
        let (port, directory) = (free_port(), tempfile::tempdir().unwrap());
        std::fs::write(directory.path().join("more.conf"), "").unwrap();
        let nats = Self { child: spawn(port, directory.path()), port, directory };
        nats.ready().await;
        nats
    }

    /// Its address.
    pub fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.port)
    }

    /// Ends it as a power cut would.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Starts it again after it was killed.
    pub async fn restart(&mut self) {
        self.restart_with("").await;
    }

    /// The same, with more lines in its configuration.
    pub async fn restart_with(&mut self, configuration: &str) {
        std::fs::write(self.directory.path().join("more.conf"), configuration).unwrap();
        self.child = spawn(self.port, self.directory.path());
        self.ready().await;
    }

    /// Makes a stream that keeps what comes under `subjects` on disk.
    pub async fn make_stream(&self, name: &str, subjects: &str) {
        self.make_stream_for(name, subjects, -1).await;
    }

    /// The same, for messages of so many bytes at most.
    pub async fn make_stream_for(&self, name: &str, subjects: &str, max_message_size: i32) {
        let (name, subjects) = (name.to_owned(), vec![subjects.to_owned()]);
        let config = stream::Config { name, subjects, max_message_size, ..Default::default() };
        self.jetstream().await.create_stream(config).await.unwrap();
    }

    /// Everything that a stream has, in its order.
    pub async fn stored(&self, name: &str) -> Vec<Stored> {
        let mut stream = self.jetstream().await.get_stream(name).await.unwrap();
        let last = stream.info().await.unwrap().state.last_sequence;
        let mut stored = Vec::new();
        for sequence in 1..=last {
            let message = stream.get_raw_message(sequence).await.unwrap();
            let id = message.headers.get("Nats-Msg-Id").map(ToString::to_string).unwrap_or_default();
            let payload = String::from_utf8(message.payload.to_vec()).unwrap();
            stored.push(Stored { subject: message.subject.to_string(), id, payload });
        }
        stored
    }

    async fn jetstream(&self) -> jetstream::Context {
        jetstream::new(async_nats::connect(self.url()).await.unwrap())
    }

    async fn ready(&self) {
        let answers = || async { async_nats::connect(self.url()).await.is_ok() };
        eventually("nats-server is ready", Duration::from_secs(20), answers).await;
    }
}

impl Drop for Nats {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn spawn(port: u16, directory: &Path) -> Child {
    // Debian puts it where only the system's own path looks.
    let path = format!("{}:/usr/sbin", std::env::var("PATH").unwrap_or_default());
    Command::new("nats-server")
        .env("PATH", path)
        .args(["--addr", "127.0.0.1", "--port", &port.to_string(), "--jetstream", "--store_dir"])
        .arg(directory)
        .arg("--config")
        .arg(directory.join("more.conf"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("nats-server is missing: tests/run installs it")
}
