//! A real Prometheus (the Debian package) that scrapes a gateway every second, set up as `docker/prometheus` says.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;

use super::{Client, eventually, free_port};

/// A running Prometheus; it is killed when dropped.
pub struct Prometheus {
    child: Child,
    address: SocketAddr,
    _directory: TempDir,
}

/// A file that ships with the gateway.
pub fn shipped(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("docker").join(path)
}

/// A command of the package.
pub fn command(name: &str) -> Command {
    let found = std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|directory| directory.join(name).is_file()));
    assert!(found, "{name} is not installed: run tests/run --install");
    Command::new(name)
}

impl Prometheus {
    /// Scrapes this admin listener with the configuration that ships, only faster.
    pub async fn start(admin: SocketAddr) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let config = fs::read_to_string(shipped("prometheus/prometheus.yaml")).unwrap();
        let replaced = config
            .replace("15s", "1s")
            .replace("infergate:9090", &admin.to_string())
            .replace("- alerts.yaml", &format!("- '{}'", shipped("prometheus/alerts.yaml").display()));
        let path = directory.path().join("prometheus.yaml");
        fs::write(&path, replaced).unwrap();
        let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
        let log = fs::File::create(directory.path().join("log")).unwrap();
        let child = command("prometheus")
            .arg(format!("--config.file={}", path.display()))
            .arg(format!("--storage.tsdb.path={}", directory.path().join("data").display()))
            .arg(format!("--web.listen-address={address}"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        let prometheus = Self { child, address, _directory: directory };
        let ready = async || Client::h1().try_get(address, "/-/ready").await.is_some_and(|answer| answer.status == 200);
        eventually("Prometheus is ready", Duration::from_secs(30), ready).await;
        prometheus
    }

    /// What its API says at `path`, without the envelope.
    pub async fn api(&self, path: &str) -> Value {
        let answer = Client::h1().get(self.address, &format!("/api/v1/{path}")).await;
        let mut envelope = answer.json();
        assert_eq!(envelope["status"], "success", "{path}: {envelope}");
        envelope["data"].take()
    }

    /// The series that a query has now.
    pub async fn query(&self, query: &str) -> Vec<Value> {
        let encoded: String = query.bytes().map(|byte| format!("%{byte:02x}")).collect();
        self.api(&format!("query?query={encoded}")).await["result"].as_array().cloned().unwrap_or_default()
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
