//! A real PostgreSQL on a port and in a directory of its own, that can be frozen, killed and started again.

use std::fs::{File, Permissions};
use std::io::Write;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use tempfile::TempDir;
use tokio_postgres::{Client, NoTls};

use super::{eventually, free_port};

/// A server with an empty database; it is killed when dropped.
pub struct Postgres {
    child: Option<Child>,
    port: u16,
    directory: TempDir,
}

impl Postgres {
    /// A server that was never started yet.
    pub fn made() -> Self {
        let (port, directory) = (free_port(), tempfile::tempdir().unwrap());
        if let Some((user, group)) = servant() {
            chown(directory.path(), Some(user), Some(group)).unwrap();
        }
        let made = command("initdb")
            .args(["--username=gate", "--auth=trust", "--no-sync", "--encoding=UTF8", "--locale=C", "--pgdata"])
            .arg(directory.path().join("data"))
            .current_dir(directory.path())
            .output()
            .unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        Self { child: None, port, directory }
    }

    /// A server, ready.
    pub async fn start() -> Self {
        let mut postgres = Self::made();
        postgres.restart().await;
        postgres
    }

    /// Lets it speak TLS from its next start on, with this certificate and its key.
    pub fn secure(&self, chain: &Path, key: &Path) {
        let data = self.directory.path().join("data");
        for (from, name) in [(chain, "server.crt"), (key, "server.key")] {
            let to = data.join(name);
            std::fs::copy(from, &to).unwrap();
            std::fs::set_permissions(&to, Permissions::from_mode(0o600)).unwrap();
            if let Some((user, group)) = servant() {
                chown(&to, Some(user), Some(group)).unwrap();
            }
        }
        // Whoever comes without TLS is turned away.
        std::fs::write(data.join("pg_hba.conf"), "hostssl all all 127.0.0.1/32 trust\n").unwrap();
        let mut settings = File::options().append(true).open(data.join("postgresql.conf")).unwrap();
        settings.write_all(b"ssl = on\n").unwrap();
    }

    /// Waits until it takes connections, whatever it asks of them.
    pub async fn listens(&mut self) {
        self.child = Some(spawn(self.port, self.directory.path()));
        let port = self.port;
        let there = || async { tokio::net::TcpStream::connect(("127.0.0.1", port)).await.is_ok() };
        eventually("PostgreSQL listens", Duration::from_secs(30), there).await;
    }

    /// Its address.
    pub fn url(&self) -> String {
        format!("postgres://gate@127.0.0.1:{}/postgres", self.port)
    }

    /// Starts it, for the first time or again.
    pub async fn restart(&mut self) {
        let this = std::cell::RefCell::new(self);
        let answers = || async {
            let ended = this.borrow_mut().child.as_mut().is_none_or(|child| child.try_wait().unwrap().is_some());
            if ended {
                // One that was killed may leave children behind for a moment: then the next one does not start.
                let mut this = this.borrow_mut();
                let child = spawn(this.port, this.directory.path());
                this.child = Some(child);
            }
            let url = this.borrow().url();
            tokio_postgres::connect(&url, NoTls).await.is_ok()
        };
        eventually("PostgreSQL is ready", Duration::from_secs(30), answers).await;
    }

    /// Ends it as a power cut would.
    pub fn kill(&mut self) {
        self.signal("KILL");
        self.child.take().unwrap().wait().unwrap();
    }

    /// Sends a signal to all its processes: `STOP`, `CONT`, `KILL`.
    pub fn signal(&self, signal: &str) {
        let server = self.child.as_ref().unwrap().id();
        let children = std::fs::read_to_string(format!("/proc/{server}/task/{server}/children")).unwrap();
        for process in [server.to_string().as_str()].into_iter().chain(children.split_whitespace()) {
            // A child may be gone by now.
            let _ = Command::new("kill").args([&format!("-{signal}"), process]).stderr(Stdio::null()).status();
        }
    }

    /// A connection.
    pub async fn client(&self) -> Client {
        let (client, connection) = tokio_postgres::connect(&self.url(), NoTls).await.unwrap();
        tokio::spawn(connection);
        client
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        if self.child.is_some() {
            self.kill();
        }
    }
}

fn spawn(port: u16, directory: &Path) -> Child {
    command("postgres")
        .args(["-p", &port.to_string(), "-h", "127.0.0.1", "-k", "", "-c", "shared_buffers=16MB", "-D"])
        .arg(directory.join("data"))
        .current_dir(directory)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

/// A program of PostgreSQL's. It refuses to run as root: then it runs as one who may nothing.
fn command(program: &str) -> Command {
    let path = directory().join(program);
    let Some((user, group)) = servant() else { return Command::new(path) };
    let mut command = Command::new("setpriv");
    command.args([format!("--reuid={user}"), format!("--regid={group}")]).arg("--clear-groups").arg("--").arg(path);
    command
}

/// Debian puts each version where no path looks.
fn directory() -> PathBuf {
    let versions = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten();
    let versions = versions.filter_map(|entry| Some(entry.ok()?.path().join("bin")));
    versions.filter(|path| path.join("postgres").exists()).max().expect("postgresql is missing: tests/run installs it")
}

/// `nobody`, where we are root.
fn servant() -> Option<(u32, u32)> {
    let root = Command::new("id").arg("-u").output().unwrap().stdout == b"0\n";
    root.then_some((65_534, 65_534))
}
