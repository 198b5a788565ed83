//! The processes of a comparison: the fake model server, the bare proxy and the gateway with or
//! without evidence, each on a free port, each ended when its value is dropped.

use crate::Failure;
use crate::cpu::Cores;
use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How long a process may take until it serves.
const START_LIMIT: Duration = Duration::from_secs(15);

/// Whether the gateway keeps evidence of what it does: a journal, and traces of one request in a hundred.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Evidence {
    /// It does nothing but its work, like the bare proxy.
    Off,
    /// With a collector in the fake server.
    On,
    /// The same with segments so small that they are finished, signed and compressed all the time.
    Packed,
}

impl Evidence {
    fn name(self) -> &'static str {
        match self {
            Self::Off => "gateway",
            Self::On | Self::Packed => "gateway with evidence",
        }
    }

    /// What the policy says of it. Unpacked, a segment is so large that a case never finishes one.
    fn extra(self, upstream: SocketAddr) -> String {
        let segment_bytes = match self {
            Self::Off => return String::new(),
            Self::On => 4_u64 << 30,
            Self::Packed => 4 << 20,
        };
        format!(
            "audit: {{segment_bytes: {segment_bytes}}}\n\
             telemetry: {{traces: {{share: 0.01, endpoint: 'http://{upstream}'}}}}\n"
        )
    }

    /// The policy the gateway runs with: every model of the load goes to the fake server.
    fn policy(self, upstream: SocketAddr) -> String {
        let extra = self.extra(upstream);
        format!(
            r#"version: 1
models:
  - name: "load-*"
    pool: load
pools:
  load:
    upstreams:
      - url: http://{upstream}
{extra}"#
        )
    }

    /// The settings the gateway runs with: one worker thread, like the bare proxy.
    fn settings(self, journal: &Path) -> String {
        match self {
            Self::Off => "threads: 1\naudit: {enabled: false}\n".to_owned(),
            Self::On | Self::Packed => format!("threads: 1\naudit: {{directory: {journal:?}}}\n"),
        }
    }
}

/// How the gateway is started on these files.
fn gateway_arguments(command: &mut Command, policy: &Path, settings: &Path, listen: SocketAddr) {
    command
        .arg("serve")
        .arg("--policy")
        .arg(policy)
        .arg("--settings")
        .arg(settings)
        .args(["--listen", &listen.to_string()]);
}

/// What stands beside the bare proxy in a comparison.
pub enum Subject {
    /// The gateway's binary.
    Gateway(PathBuf),
    /// A second bare proxy: every ratio should be 1.
    BareAgain,
}

/// Starts processes on the right cores, with one directory for what they write.
pub struct Stage {
    cores: Option<Cores>,
    directory: PathBuf,
}

impl Stage {
    /// Makes the directory.
    pub fn new(cores: Option<Cores>) -> Result<Self, Failure> {
        let name = format!("infergate-load-{}", std::process::id());
        let directory = std::env::temp_dir().join(name);
        fs::create_dir_all(&directory)?;
        Ok(Self { cores, directory })
    }

    /// The fake model server.
    pub fn upstream(&self) -> Result<Running, Failure> {
        let listen = free_address()?;
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["upstream", "--listen", &listen.to_string()]);
        self.start(command, "upstream", listen)
    }

    /// The bare proxy.
    pub fn bare(&self, upstream: SocketAddr, h2c: bool) -> Result<Running, Failure> {
        let listen = free_address()?;
        let mut command = self.on_the_proxies_core(&std::env::current_exe()?);
        command.args(["bare", "--listen", &listen.to_string()]);
        command.args(["--upstream", &upstream.to_string()]);
        if h2c {
            command.arg("--h2c");
        }
        self.start(command, "bare", listen)
    }

    /// The gateway, or what stands for it.
    pub fn subject(&self, subject: &Subject, upstream: SocketAddr, h2c: bool) -> Result<Running, Failure> {
        match subject {
            Subject::Gateway(program) => self.gateway(program, upstream, Evidence::Off),
            Subject::BareAgain => self.bare(upstream, h2c),
        }
    }

    /// The gateway, with a directory of its own: its policy file is watched.
    pub fn gateway(&self, program: &Path, upstream: SocketAddr, evidence: Evidence) -> Result<Running, Failure> {
        let directory = self.directory.join(evidence.name());
        fs::create_dir_all(&directory)?;
        let (policy_file, settings_file) = (directory.join("policy.yaml"), directory.join("settings.yaml"));
        fs::write(&policy_file, evidence.policy(upstream))?;
        fs::write(&settings_file, evidence.settings(&self.journal()))?;
        let listen = free_address()?;
        let mut command = self.on_the_proxies_core(program);
        gateway_arguments(&mut command, &policy_file, &settings_file, listen);
        command.args(["--admin", &free_address()?.to_string()]);
        self.start(command, evidence.name(), listen)
    }

    fn journal(&self) -> PathBuf {
        self.directory.join("journal")
    }

    /// Removes the journal and says how many finished segments of it were compressed.
    pub fn forget_journal(&self) -> Result<usize, Failure> {
        let mut packed = 0;
        for run in fs::read_dir(self.journal().join("runs"))? {
            for file in fs::read_dir(run?.path())? {
                packed += usize::from(file?.path().extension().is_some_and(|extension| extension == "zst"));
            }
        }
        fs::remove_dir_all(self.journal())?;
        Ok(packed)
    }

    fn on_the_proxies_core(&self, program: &Path) -> Command {
        let Some(cores) = &self.cores else {
            return Command::new(program);
        };
        // taskset becomes the program: the process id stays.
        let mut command = Command::new("taskset");
        command.args(["-c", &cores.proxy]).arg(program);
        command
    }

    fn start(&self, mut command: Command, name: &'static str, address: SocketAddr) -> Result<Running, Failure> {
        let log = self.directory.join(format!("{name}.log"));
        let output = File::create(&log)?;
        let child = command
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .spawn()
            .map_err(|error| format!("cannot start {command:?}: {error}"))?;
        let mut running = Running { child, name, address, log };
        running.wait_until_it_listens()?;
        Ok(running)
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        // Only a temporary directory: what is left of it does no harm.
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// A process that serves.
pub struct Running {
    child: Child,
    /// What it is, for messages.
    pub name: &'static str,
    /// Where it listens.
    pub address: SocketAddr,
    log: PathBuf,
}

impl Running {
    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The end of what it wrote, to show beside a failure.
    pub fn last_words(&self) -> String {
        let text = fs::read(&self.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(12)..].join("\n")
    }

    fn wait_until_it_listens(&mut self) -> Result<(), Failure> {
        let end = Instant::now() + START_LIMIT;
        while std::net::TcpStream::connect(self.address).is_err() {
            let ended = self.child.try_wait()?;
            if ended.is_some() || Instant::now() > end {
                let why = match ended {
                    Some(status) => format!("ended with {status}"),
                    None => format!("does not listen after {START_LIMIT:?}"),
                };
                return Err(format!("{} {why}:\n{}", self.name, self.last_words()).into());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended on its own.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn free_address() -> Result<SocketAddr, Failure> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    Ok(listener.local_addr()?)
}
