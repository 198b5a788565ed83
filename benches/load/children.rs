//! The processes of a comparison: the fake model server, the bare proxy and the gateway with or
//! without what it can do besides, each on a free port, each ended when its value is dropped.

use crate::Failure;
use crate::cpu::{self, Cores};
use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// How long a process may take until it serves.
const START_LIMIT: Duration = Duration::from_secs(120);

/// What the gateway does besides its work.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Besides {
    /// Nothing, like the bare proxy.
    Nothing,
    /// It keeps a journal, and traces of one request in a hundred, with a collector in the fake server.
    Evidence,
    /// The same with segments so small that they are finished, signed and compressed all the time.
    Packed,
    /// It keeps a journal, and nothing folds it.
    Journal,
    /// It knows who asks, holds four limits and a budget, and folds the journal into the ledger.
    Limits,
    /// It lets guardrails read prompts and answers: personal data, secrets and words.
    Guards,
    /// All of that at once, and a model that is chosen by meaning.
    Everything,
    /// The same, but nobody reads prompts for guardrails.
    AllButPrompts,
}

/// Who asks, four limits that are never reached, a budget, and what everything costs.
const LIMITS: &str = "authenticators: [{anonymous: {tenant: team}}]
tenants: {team: {limits: [{usd: 100000, per: month}, {each: [key], requests: 1000000000, per: 1m}]}}
limits:
  - {tokens: 1000000000000, per: 1m}
  - {each: [model], output_tokens: 1000000000000, per: 1h}
  - {concurrency: 100000}
prices: {list: [{models: ['*'], input: 0.000001, output: 0.000001}]}
";

const GUARDS: &str = "guardrails:
  - {name: pii, in: [prompt.user, prompt.tool, answer.content, answer.tool_arguments], verdict: redact, pii: {find: [email, phone, card, iban, ip]}}
  - {name: secrets, in: [prompt.user, answer.content, answer.tool_arguments], verdict: block, secrets: {}}
  - {name: words, in: [prompt.user, answer.content], verdict: flag, words: {list: [project bluebird, internal use only]}}
";

/// The same rules for answers alone.
const ANSWER_GUARDS: &str = "guardrails:
  - {name: pii, in: [answer.content, answer.tool_arguments], verdict: redact, pii: {find: [email, phone, card, iban, ip]}}
  - {name: secrets, in: [answer.content, answer.tool_arguments], verdict: block, secrets: {}}
  - {name: words, in: [answer.content], verdict: flag, words: {list: [project bluebird, internal use only]}}
";

/// One model for the load.
const MODEL: &str = "models:
  - {name: 'load-*', pool: load}
";

/// A name for the load that leaves open which of two models answers.
const ROUTED: &str = "models:
  - {name: small, pool: load}
  - {name: large, pool: load}
routers:
  load-model:
";

/// What chooses between them by examples.
pub const BY_EXAMPLES: &str = "    ask:
      - semantic:
          routes:
            - {name: code, model: large, examples: [fix the bug in this loop, write a python function,
                what does this stack trace mean, explain this sql query, why does my program not compile]}
            - {name: banking, model: small, examples: [what is my balance, send money to my landlord,
                my card was declined, freeze my debit card, show my recent transactions]}
    default: small
";

impl Besides {
    fn name(self) -> &'static str {
        match self {
            Self::Nothing => "gateway",
            Self::Evidence | Self::Packed => "gateway with evidence",
            Self::Journal => "gateway with a journal",
            Self::Limits => "gateway with limits",
            Self::Guards => "gateway with guardrails",
            Self::Everything => "gateway with everything",
            Self::AllButPrompts => "gateway with everything but prompt guards",
        }
    }

    /// The same without what is measured.
    pub fn without(self) -> Self {
        if self == Self::Limits { Self::Journal } else { Self::Nothing }
    }

    /// Whether the fake server must get traces.
    pub fn is_evidence(self) -> bool {
        matches!(self, Self::Evidence | Self::Packed | Self::Everything | Self::AllButPrompts)
    }

    fn is_everything(self) -> bool {
        matches!(self, Self::Everything | Self::AllButPrompts)
    }

    /// What the policy says of it. Unpacked, a segment is so large that a case never finishes one.
    fn extra(self, upstream: SocketAddr) -> String {
        let segment_bytes = if self == Self::Packed { 4 << 20 } else { 4_u64 << 30 };
        let audit = format!("audit: {{segment_bytes: {segment_bytes}}}\n");
        let traced = format!("{audit}telemetry: {{traces: {{share: 0.01, endpoint: 'http://{upstream}'}}}}\n");
        match self {
            Self::Nothing => String::new(),
            Self::Evidence | Self::Packed => traced,
            Self::Everything => format!("{traced}{LIMITS}{GUARDS}"),
            Self::AllButPrompts => format!("{traced}{LIMITS}{ANSWER_GUARDS}"),
            Self::Journal => audit,
            Self::Limits => format!("{audit}{LIMITS}"),
            Self::Guards => GUARDS.to_owned(),
        }
    }

    /// The policy the gateway runs with: every model of the load goes to the fake server.
    fn policy(self, upstream: SocketAddr) -> String {
        let models = if self.is_everything() { [ROUTED, BY_EXAMPLES].concat() } else { MODEL.to_owned() };
        let extra = self.extra(upstream);
        format!("version: 1\n{models}pools: {{load: {{upstreams: [{{url: 'http://{upstream}'}}]}}}}\n{extra}")
    }

    /// The settings the gateway runs with: one worker thread, like the bare proxy.
    fn settings(self, journal: &Path) -> String {
        match self {
            Self::Nothing | Self::Guards => "threads: 1\naudit: {enabled: false}\n".to_owned(),
            _ => format!(
                "threads: 1\naudit: {{directory: {journal:?}}}\nledger: {{enabled: {}}}\n",
                self == Self::Limits || self.is_everything()
            ),
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

/// Another proxy, as whoever installs it by its own documentation gets it, told to pass everything on to one server.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Neighbour {
    /// nginx, from Debian: it looks at nothing.
    Nginx,
    /// HAProxy, from Debian: it looks at nothing.
    Haproxy,
    /// SGLang's router, from PyPI.
    SglangRouter,
    /// vLLM's router, from PyPI.
    VllmRouter,
    /// Portkey's gateway, from npm.
    Portkey,
    /// LiteLLM's proxy, from PyPI.
    Litellm,
}

/// Compressing answers is not what is compared.
const PLAINLY: &str = "accept-encoding: identity\r\n";

impl Neighbour {
    /// Its program.
    pub fn name(self) -> &'static str {
        match self {
            Self::Nginx => "nginx",
            Self::Haproxy => "haproxy",
            Self::SglangRouter => "sglang-router",
            Self::VllmRouter => "vllm-router",
            Self::Portkey => "portkey",
            Self::Litellm => "litellm",
        }
    }

    /// Where it is installed, if it is: npm's in this directory, the others where programs are.
    pub fn program(self) -> Option<PathBuf> {
        if self == Self::Portkey {
            let script = PathBuf::from("node_modules/@portkey-ai/gateway/build/start-server.js");
            return script.canonicalize().ok();
        }
        let path = std::env::var_os("PATH").unwrap_or_default();
        let usual = ["/usr/sbin", "/usr/bin", "/usr/local/sbin"].map(PathBuf::from);
        std::env::split_paths(&path).chain(usual).map(|at| at.join(self.name())).find(|at| at.exists())
    }

    /// Whether it writes bodies anew, so that only what they say can be compared.
    fn rewrites(self) -> bool {
        matches!(self, Self::Portkey | Self::Litellm)
    }

    /// Header lines by which a request tells it where to go.
    fn header_lines(self, upstream: SocketAddr) -> String {
        match self {
            Self::Portkey => {
                format!("{PLAINLY}x-portkey-provider: openai\r\nx-portkey-custom-host: http://{upstream}/v1\r\n")
            }
            Self::Litellm => PLAINLY.to_owned(),
            _ => String::new(),
        }
    }

    /// How it is started: one worker, on the file of its configuration where it has one.
    fn command(
        self,
        stage: &Stage,
        program: &Path,
        file: &Path,
        [listen, metrics]: [SocketAddr; 2],
        to: SocketAddr,
    ) -> Command {
        let (port, worker) = (listen.port().to_string(), format!("http://{to}"));
        let address = ["--host", "127.0.0.1", "--port", &port];
        let routes = ["--worker-urls", &worker, "--policy", "round_robin"];
        let metrics = ["--prometheus-port", &metrics.port().to_string()];
        let mut command = stage.on_the_proxies_core(if self == Self::Portkey { Path::new("node") } else { program });
        match self {
            Self::Nginx => command.arg("-p").arg(file.with_file_name("")).arg("-c").arg(file),
            Self::Haproxy => command.arg("-db").arg("-f").arg(file),
            Self::SglangRouter => {
                command.arg("launch").args(address).args(routes).args(metrics).args(["--log-level", "warn"])
            }
            Self::VllmRouter => command.args(address).args(routes).args(metrics).args(["--log-level", "warning"]),
            Self::Portkey => command.arg(program).arg(format!("--port={port}")).arg("--headless"),
            Self::Litellm => command
                .arg("--config")
                .arg(file)
                .args(address)
                .args(["--num_workers", "1"])
                .env("LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY", "true"),
        };
        command
    }

    /// What it is told in a file: one process, connections kept on both sides, nothing logged.
    fn configuration(self, listen: SocketAddr, upstream: SocketAddr) -> String {
        match self {
            Self::SglangRouter | Self::VllmRouter | Self::Portkey => String::new(),
            Self::Litellm => format!(
                "model_list:
  - model_name: load-model
    litellm_params: {{model: openai/load-model, api_base: 'http://{upstream}/v1', api_key: none}}
litellm_settings: {{telemetry: false}}
"
            ),
            Self::Nginx => format!(
                "daemon off; master_process off; worker_processes 1; pid nginx.pid; error_log stderr crit;
events {{ worker_connections 8192; }}
http {{ access_log off; client_max_body_size 64m; client_body_buffer_size 2m; keepalive_requests 100000000;
  upstream load {{ server {upstream}; keepalive 256; keepalive_requests 100000000; }}
  server {{ listen {listen}; location / {{ proxy_pass http://load; proxy_http_version 1.1;
    proxy_set_header Connection ''; proxy_buffering off; proxy_request_buffering off; }} }} }}
"
            ),
            Self::Haproxy => format!(
                "global
  nbthread 1
  maxconn 8192
defaults
  mode http
  timeout client 60s
  timeout server 60s
  timeout connect 5s
  http-reuse always
frontend front
  bind {listen}
  default_backend load
backend load
  server one {upstream}
"
            ),
        }
    }
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
        self.upstream_that(&[])
    }

    /// The fake model server at every address of this machine; the first one is told.
    pub fn upstream_everywhere(&self) -> Result<Running, Failure> {
        let listen = SocketAddr::from((Ipv4Addr::UNSPECIFIED, free_address()?.port()));
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["upstream", "--listen", &listen.to_string()]);
        let mut running = self.start(command, "upstream", listen)?;
        running.address.set_ip(Ipv4Addr::LOCALHOST.into());
        Ok(running)
    }

    /// A file for somebody to read.
    pub fn file(&self, name: &str, text: &str) -> Result<PathBuf, Failure> {
        let file = self.directory.join(name);
        fs::write(&file, text)?;
        Ok(file)
    }

    /// The fake model server with more to say.
    pub fn upstream_that(&self, more: &[&str]) -> Result<Running, Failure> {
        let listen = free_address()?;
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["upstream", "--listen", &listen.to_string()]).args(more);
        self.start(command, "upstream", listen)
    }

    /// The gateway's embedded model server, at an address of this machine.
    pub fn simulated(&self, program: &Path, host: Ipv4Addr, more: &[&str]) -> Result<Running, Failure> {
        let listen = SocketAddr::from((host, free_address()?.port()));
        let mut command = Command::new(program);
        command.args(["simulate", "--model", "load-model", "--listen", &listen.to_string()]).args(more);
        self.start(command, "simulated", listen)
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
            Subject::Gateway(program) => self.gateway(program, upstream, Besides::Nothing),
            Subject::BareAgain => self.bare(upstream, h2c),
        }
    }

    /// The gateway, with a directory of its own: its policy file is watched.
    pub fn gateway(&self, program: &Path, upstream: SocketAddr, besides: Besides) -> Result<Running, Failure> {
        self.gateway_on(program, besides.name(), &besides.policy(upstream), &besides.settings(&self.journal()))
    }

    /// The same on these texts.
    pub fn gateway_on(
        &self,
        program: &Path,
        name: &'static str,
        policy: &str,
        settings: &str,
    ) -> Result<Running, Failure> {
        let directory = self.directory.join(name);
        fs::create_dir_all(&directory)?;
        let settings_file = directory.join("settings.yaml");
        fs::write(&settings_file, settings)?;
        let policy_file = self.rewrite(name, policy)?;
        let [listen, admin] = [free_address()?, free_address()?];
        let mut command = self.on_the_proxies_core(program);
        gateway_arguments(&mut command, &policy_file, &settings_file, listen);
        command.args(["--admin", &admin.to_string()]);
        let mut running = self.start(command, name, listen)?;
        running.admin = Some(admin);
        Ok(running)
    }

    /// Gives the gateway of this name another policy, in one step, and says where it is.
    pub fn rewrite(&self, name: &str, policy: &str) -> Result<PathBuf, Failure> {
        let file = self.directory.join(name).join("policy.yaml");
        let new = file.with_extension("new");
        fs::write(&new, policy)?;
        fs::rename(&new, &file)?;
        Ok(file)
    }

    /// Another proxy.
    pub fn neighbour(&self, neighbour: Neighbour, upstream: SocketAddr) -> Result<Running, Failure> {
        let program = neighbour.program().ok_or_else(|| format!("{} is not installed", neighbour.name()))?;
        let directory = self.directory.join(neighbour.name());
        fs::create_dir_all(&directory)?;
        let (file, listen) = (directory.join("configuration"), free_address()?);
        fs::write(&file, neighbour.configuration(listen, upstream))?;
        let command = neighbour.command(self, &program, &file, [listen, free_address()?], upstream);
        let mut running = self.start(command, neighbour.name(), listen)?;
        (running.header_lines, running.rewrites) = (neighbour.header_lines(upstream), neighbour.rewrites());
        Ok(running)
    }

    /// Where gateways keep their journal.
    pub fn journal(&self) -> PathBuf {
        self.directory.join("journal")
    }

    /// Removes the journal and says how many finished segments of it were compressed.
    pub fn forget_journal(&self) -> Result<usize, Failure> {
        let mut packed = 0;
        if !self.journal().exists() {
            return Ok(packed);
        }
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
        let mut running =
            Running { child, name, address, admin: None, header_lines: String::new(), rewrites: false, log };
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
    /// Where its operators connect.
    pub admin: Option<SocketAddr>,
    /// Header lines that it wants of every request.
    pub header_lines: String,
    /// Whether it writes bodies anew.
    pub rewrites: bool,
    log: PathBuf,
}

impl Running {
    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Stops it where it is (`STOP`), lets it go on (`CONT`), or asks it to end (`TERM`).
    pub fn signal(&self, signal: &str) -> Result<(), Failure> {
        cpu::run("kill", &[&format!("-{signal}"), &self.pid().to_string()])
    }

    /// The end of what it wrote, to show beside a failure.
    pub fn last_words(&self) -> String {
        let text = self.words();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(12)..].join("\n")
    }

    /// Asks it to end, and waits until it has.
    pub fn end(&mut self) -> Result<ExitStatus, Failure> {
        self.signal("TERM")?;
        let end = Instant::now() + START_LIMIT;
        loop {
            match self.child.try_wait()? {
                Some(status) => return Ok(status),
                None if Instant::now() > end => return Err(format!("{} does not end", self.name).into()),
                None => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }

    /// All that it wrote.
    pub fn words(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
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
