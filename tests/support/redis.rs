//! A real `redis-server` in a directory of its own, that can be frozen, killed and started again.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::{eventually, free_port};

/// A server; it is killed when dropped.
pub struct Redis {
    child: Child,
    port: u16,
    password: String,
    directory: TempDir,
    /// The certificate that it shows, and its key; without one it speaks no TLS.
    tls: Option<(PathBuf, PathBuf)>,
}

impl Redis {
    /// A server on a free port, ready. It keeps nothing on disk.
    pub async fn start() -> Self {
        Self::with_password("").await
    }

    /// The same, for those who know this.
    pub async fn with_password(password: &str) -> Self {
        Self::made(password, None).await
    }

    /// One that speaks nothing but TLS, with this certificate and its key.
    pub async fn with_tls(chain: &Path, key: &Path) -> Self {
        Self::made("", Some((chain.to_owned(), key.to_owned()))).await
    }

    async fn made(password: &str, tls: Option<(PathBuf, PathBuf)>) -> Self {
        let (port, directory) = (free_port(), tempfile::tempdir().unwrap());
        let child = spawn(port, password, tls.as_ref(), directory.path());
        let redis = Self { child, port, password: password.to_owned(), directory, tls };
        redis.ready().await;
        redis
    }

    /// Its address, without a password.
    pub fn url(&self) -> String {
        format!("redis{}://127.0.0.1:{}/0", if self.tls.is_some() { "s" } else { "" }, self.port)
    }

    /// Sends a signal: `STOP`, `CONT`.
    pub fn signal(&self, signal: &str) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args([&format!("-{signal}"), &pid]).status().unwrap().success());
    }

    /// Ends it as a power cut would; it forgets everything.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Starts it again after it was killed.
    pub async fn restart(&mut self) {
        self.child = spawn(self.port, &self.password, self.tls.as_ref(), self.directory.path());
        self.ready().await;
    }

    async fn ready(&self) {
        eventually("redis-server is ready", Duration::from_secs(20), || self.answers()).await;
    }

    /// It says something, if only that it wants a password. Where it wants TLS, it listens.
    async fn answers(&self) -> bool {
        let Ok(mut stream) = TcpStream::connect(("127.0.0.1", self.port)).await else { return false };
        if self.tls.is_some() {
            return true;
        }
        let mut word = [0; 1];
        stream.write_all(b"PING\r\n").await.is_ok() && stream.read_exact(&mut word).await.is_ok()
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn spawn(port: u16, password: &str, tls: Option<&(PathBuf, PathBuf)>, directory: &Path) -> Child {
    // Debian puts it where only the system's own path looks.
    let path = format!("{}:/usr/sbin", std::env::var("PATH").unwrap_or_default());
    let mut command = Command::new("redis-server");
    command.env("PATH", path).args(["--bind", "127.0.0.1", "--save", ""]);
    let port = port.to_string();
    match tls {
        None => drop(command.args(["--port", &port])),
        Some((chain, key)) => {
            command.args(["--port", "0", "--tls-port", &port, "--tls-auth-clients", "no", "--tls-cert-file"]);
            command.arg(chain).arg("--tls-key-file").arg(key).arg("--tls-ca-cert-file").arg(chain);
        }
    }
    if !password.is_empty() {
        command.args(["--requirepass", password]);
    }
    command
        .arg("--dir")
        .arg(directory)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("redis-server is missing: tests/run installs it")
}
