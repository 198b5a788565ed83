//! The gateway as its users run it: a process, with a policy file and settings.

use std::fs::File;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::free_port;
use super::http::{Answer, Client};

/// A running gateway; it is killed when dropped, and its log is shown if the test fails.
pub struct Gateway {
    child: Child,
    /// Where clients connect.
    pub address: SocketAddr,
    /// Where operators connect.
    pub admin: SocketAddr,
    /// Its directory, with `policy.yaml`, `settings.yaml` and `log`.
    pub directory: TempDir,
}

const PROGRAM: &str = env!("CARGO_BIN_EXE_infergate");

impl Gateway {
    /// A gateway with this policy, ready.
    pub async fn start(policy: &str) -> Self {
        Self::with(policy, "threads: 2\n", &[]).await
    }

    /// A gateway with this policy, these settings, and more arguments, ready.
    pub async fn with(policy: &str, settings: &str, arguments: &[&str]) -> Self {
        let gateway = Self::spawn(policy, settings, arguments, &[]);
        gateway.ready().await;
        gateway
    }

    /// A gateway that may not become ready.
    pub fn spawn(policy: &str, settings: &str, arguments: &[&str], env: &[(&str, &str)]) -> Self {
        Self::run(Command::new(PROGRAM), policy, settings, arguments, env)
    }

    /// A gateway that does not die of this signal.
    pub fn spawn_deaf(signal: &str, policy: &str, settings: &str) -> Self {
        let mut shell = Command::new("sh");
        shell.arg("-c").arg(format!("trap '' {signal}; exec \"$0\" \"$@\"")).arg(PROGRAM);
        Self::run(shell, policy, settings, &[], &[])
    }

    fn run(program: Command, policy: &str, settings: &str, arguments: &[&str], env: &[(&str, &str)]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("policy.yaml"), policy).unwrap();
        std::fs::write(directory.path().join("settings.yaml"), settings).unwrap();
        let (address, admin) = (free_address(), free_address());
        let policy_path = directory.path().join("policy.yaml");
        let mut command = base_command(program, &directory, address, admin);
        if !arguments.contains(&"--upstream") {
            command.arg("--policy").arg(policy_path);
        }
        let child = command.args(arguments).envs(env.iter().copied()).spawn().unwrap();
        Self { child, address, admin, directory }
    }

    /// Starts a second process that takes over this one's listeners (`upgrade_socket` must be in the settings).
    pub fn upgrade(&self) -> Next {
        let mut command = base_command(Command::new(PROGRAM), &self.directory, self.address, self.admin);
        command.arg("--policy").arg(self.policy_path()).arg("--upgrade");
        Next(command.spawn().unwrap())
    }

    /// Starts it again where it was, after it has ended.
    pub fn again(&mut self) {
        let mut command = base_command(Command::new(PROGRAM), &self.directory, self.address, self.admin);
        self.child = command.arg("--policy").arg(self.policy_path()).spawn().unwrap();
    }

    /// Waits until it is ready.
    pub async fn ready(&self) {
        let start = Instant::now();
        while Client::h1().try_get(self.admin, "/readyz").await.is_none_or(|answer| answer.status != 200) {
            assert!(start.elapsed() < Duration::from_secs(20), "not ready; its log:\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Asks the admin port.
    pub async fn admin(&self, path: &str) -> Answer {
        Client::h1().get(self.admin, path).await
    }

    /// The value of a metric, written as on the page: `infergate_refusals_total{code="not_found"}`. Absent is 0.
    pub async fn metric(&self, name: &str) -> f64 {
        let page = self.admin("/metrics").await.text();
        let line = page.lines().find(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(' ')));
        line.map_or(0.0, |line| line.rsplit(' ').next().unwrap().parse().unwrap())
    }

    /// Waits until a metric has this value: a request is counted out a moment after its client has the last byte.
    pub async fn comes_to(&self, name: &str, value: f64) {
        let limit = Duration::from_secs(5);
        super::eventually(name, limit, || async { self.metric(name).await == value }).await;
    }

    /// The policy's path.
    pub fn policy_path(&self) -> PathBuf {
        self.directory.path().join("policy.yaml")
    }

    /// Replaces the policy as editors do, by a rename, and asks for a reload; returns the admin port's answer.
    pub async fn reload(&self, policy: &str) -> Answer {
        let fresh = self.directory.path().join(".policy.yaml.new");
        std::fs::write(&fresh, policy).unwrap();
        std::fs::rename(fresh, self.policy_path()).unwrap();
        Client::h1().post(self.admin, "/admin/reload", "").await
    }

    /// Sends a signal: `TERM`, `QUIT`, `HUP`, `INT`, `KILL`, `STOP`, `CONT`.
    pub fn signal(&self, signal: &str) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args([&format!("-{signal}"), &pid]).status().unwrap().success());
    }

    /// Waits until the process has ended, for `limit` at most; returns its exit code.
    pub async fn ended(&mut self, limit: Duration) -> Option<i32> {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            assert!(start.elapsed() < limit, "still running; its log:\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// The process's id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Resident memory in bytes.
    pub fn resident(&self) -> u64 {
        let text = std::fs::read_to_string(format!("/proc/{}/statm", self.child.id())).unwrap();
        text.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
    }

    /// The most memory that has ever been resident, in bytes.
    pub fn peak_resident(&self) -> u64 {
        let text = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = text.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
    }

    /// What it has logged so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            let log = self.log();
            let tail: Vec<&str> = log.lines().rev().take(60).collect();
            eprintln!("the gateway's log ends with:\n{}", tail.into_iter().rev().collect::<Vec<_>>().join("\n"));
        }
    }
}

/// A process that took over from another; it is killed when dropped.
pub struct Next(Child);

impl Next {
    /// Asks it to end, and waits for that, for `limit` at most.
    pub async fn terminated(&mut self, limit: Duration) {
        let pid = self.0.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
        super::eventually("the new one ends", limit, || std::future::ready(self.0.try_wait().unwrap().is_some())).await;
    }
}

impl Drop for Next {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn free_address() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], free_port()))
}

fn base_command(mut command: Command, directory: &TempDir, address: SocketAddr, admin: SocketAddr) -> Command {
    let log = File::options().create(true).append(true).open(directory.path().join("log")).unwrap();
    command
        .args(["serve", "--listen", &address.to_string(), "--admin", &admin.to_string()])
        .env("INFERGATE_LOG", "info")
        .env("INFERGATE_JOURNAL", directory.path().join("journal"))
        .arg("--settings")
        .arg(directory.path().join("settings.yaml"))
        .current_dir(directory.path())
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log);
    command
}
