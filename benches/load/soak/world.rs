//! What changes around the gateway: policies in which hardly a name is that of the one before, policies that are broken,
//! upstreams that join, leave, freeze or were never there.

use super::mix::{Client, Names};
use crate::children::{BY_EXAMPLES, Running, Stage};
use crate::{Failure, wire};
use serde_json::Value;
use std::fmt::Write;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// The gateway and all that it talks to.
pub struct World<'a> {
    stage: &'a Stage,
    /// The gateway's binary.
    pub program: PathBuf,
    /// The gateway.
    pub gateway: Running,
    servers: Vec<Running>,
    faulty: Running,
    keys: Vec<Key>,
    pepper: PathBuf,
    /// Counts the policies.
    epoch: u32,
}

/// A key of the gateway's own.
struct Key {
    /// What clients send.
    secret: String,
    prefix: String,
    hash: String,
}

/// What became of the world's deeds.
#[derive(Clone, Copy, Default)]
pub struct Turns {
    /// Policies that came into force.
    pub reloads: u64,
    /// Broken policies that were refused.
    pub refused: u64,
    /// Times that a server stood still.
    pub frozen: u64,
}

const NAME: &str = "soak";
const SERVERS: usize = 3;
const KEYS: usize = 16;
const TEAMS: usize = 4;
/// From one policy to the next.
const EPOCH: Duration = Duration::from_secs(4);
/// A name is good for so many policies: whoever has just sent a request with it must not be surprised.
const GOOD_FOR: u32 = 3;
/// The most bytes of finished segments.
pub const KEEP_BYTES: u64 = 48 << 20;
/// The size of a segment.
pub const SEGMENT_BYTES: u64 = 1 << 20;
/// HTTP/1 connections to upstreams that are kept.
const KEPT_CONNECTIONS: usize = 64;

impl<'a> World<'a> {
    /// Starts everything, with the first policy.
    pub async fn begin(stage: &'a Stage, program: PathBuf) -> Result<Self, Failure> {
        let servers: Vec<Running> = (0..SERVERS).map(|_| stage.upstream_everywhere()).collect::<Result<_, _>>()?;
        let faulty = stage.simulated(&program, Ipv4Addr::LOCALHOST, &["--log", "error"])?;
        let pepper = stage.file("pepper", "0123456789abcdef0123456789abcdef0123456789abcdef")?;
        let keys = (0..KEYS).map(|_| Key::create(&program, &pepper)).collect::<Result<Vec<_>, _>>()?;
        let text = Text { servers: &servers, faulty: &faulty, keys: &keys, pepper: &pepper, epoch: 0 }.policy();
        let settings = format!(
            "threads: 1\naudit: {{directory: {:?}}}\nkept_connections: {KEPT_CONNECTIONS}\nshutdown: {{drain_delay_ms: 0, drain_ms: 5000}}\n",
            stage.journal()
        );
        let gateway = stage.gateway_on(&program, NAME, &text, &settings)?;
        Ok(Self { stage, program, gateway, servers, faulty, keys, pepper, epoch: 0 })
    }

    /// Where operators connect.
    pub fn admin(&self) -> Result<SocketAddr, Failure> {
        self.gateway.admin.ok_or_else(|| "no admin port".into())
    }

    /// The journal's directory.
    pub fn journal(&self) -> PathBuf {
        self.stage.journal()
    }

    /// What clients may say now.
    pub fn names(&self) -> Names {
        Names { epoch: self.epoch, keys: self.keys.iter().map(|key| key.secret.clone()).collect() }
    }

    /// Turns until `end`, and leaves everybody running.
    pub async fn turn_until(&mut self, end: Instant, client: &Client) -> Result<Turns, Failure> {
        let mut turns = Turns::default();
        while Instant::now() + EPOCH < end {
            tokio::time::sleep(EPOCH).await;
            self.epoch += 1;
            if self.epoch % 4 == 2 {
                self.break_policy().await?;
                turns.refused += 1;
            }
            self.renew_policy().await?;
            turns.reloads += 1;
            client.say(self.names());
            turns.frozen += u64::from(self.freeze().await?);
        }
        tokio::time::sleep(end.saturating_duration_since(Instant::now())).await;
        Ok(turns)
    }

    async fn renew_policy(&self) -> Result<(), Failure> {
        let text = self.text().policy();
        match self.load(&text).await? {
            (200, _) => Ok(()),
            (status, told) => Err(format!("a good policy was refused ({status}): {told}\n{text}").into()),
        }
    }

    /// A policy that is wrong in one of several ways; the one in force must stay.
    async fn break_policy(&self) -> Result<(), Failure> {
        let good = self.text().policy();
        let text = match self.epoch / 4 % 4 {
            0 => good.replacen("version: 1", "version: 2", 1),
            1 => good.replacen("pool: main", "pool: nowhere", 1),
            2 => good[..good.len() / 2].to_owned() + ": [",
            _ => good.replacen(&format!("{:?}", self.pepper), "/nowhere/pepper", 1),
        };
        match self.load(&text).await? {
            (422, _) => Ok(()),
            (status, told) => Err(format!("a broken policy was not refused ({status}): {told}\n{text}").into()),
        }
    }

    async fn load(&self, text: &str) -> Result<(u16, String), Failure> {
        self.stage.rewrite(NAME, text)?;
        wire::call(self.admin()?, "POST", "/admin/reload").await
    }

    fn text(&self) -> Text<'_> {
        let Self { servers, faulty, keys, pepper, epoch, .. } = self;
        Text { servers, faulty, keys, pepper, epoch: *epoch }
    }

    /// Every third policy a server stands still for a moment, every twelfth for longer than anybody waits.
    async fn freeze(&self) -> Result<bool, Failure> {
        let pause = match self.epoch % 12 {
            1 | 4 | 7 => Duration::from_millis(1200),
            10 => Duration::from_millis(u64::from(ANSWER_MS) + 1500),
            _ => return Ok(false),
        };
        let server = &self.servers[1 + self.epoch as usize / 3 % (SERVERS - 1)];
        server.signal("STOP")?;
        tokio::time::sleep(pause).await;
        server.signal("CONT")?;
        Ok(true)
    }
}

/// How long an upstream may take until an answer begins.
const ANSWER_MS: u32 = 4000;

impl Key {
    fn create(program: &Path, pepper: &Path) -> Result<Self, Failure> {
        let made = Command::new(program)
            .args(["key", "create", "--tenant", "team", "--json", "--pepper-file"])
            .arg(pepper)
            .output()?;
        let made: Value = serde_json::from_slice(&made.stdout)
            .map_err(|error| format!("`key create`: {error}: {}", String::from_utf8_lossy(&made.stderr)))?;
        let text = |at: &str| made.pointer(at).and_then(Value::as_str).unwrap_or_default().to_owned();
        Ok(Self { secret: text("/key"), prefix: text("/entry/prefix"), hash: text("/entry/hash") })
    }
}

/// A policy by its number.
struct Text<'a> {
    servers: &'a [Running],
    faulty: &'a Running,
    keys: &'a [Key],
    pepper: &'a Path,
    epoch: u32,
}

impl Text<'_> {
    fn policy(&self) -> String {
        let parts = [
            self.who(),
            self.limits(),
            self.guardrails(),
            self.models(),
            self.routers(),
            self.pools(),
            self.evidence(),
        ];
        format!("version: 1\n{}", parts.concat())
    }

    /// The policies whose names are good still.
    fn recent(&self) -> impl Iterator<Item = u32> {
        self.epoch.saturating_sub(GOOD_FOR - 1)..=self.epoch
    }

    /// The same keys, under names and tenants of their own in each policy.
    fn who(&self) -> String {
        let epoch = self.epoch;
        let mut text = format!("authenticators:\n- keys:\n    pepper: {{file: {:?}}}\n    list:\n", self.pepper);
        for (n, Key { prefix, hash, .. }) in self.keys.iter().enumerate() {
            let team = n % TEAMS;
            _ = writeln!(
                text,
                "    - {{name: app-{epoch}-{n}, tenant: team-{epoch}-{team}, prefix: {prefix}, hash: '{hash}'}}"
            );
        }
        text += "tenants:\n";
        for team in 0..TEAMS {
            _ = writeln!(
                text,
                "  team-{epoch}-{team}: {{limits: [{{usd: 1000000, per: month}}, {{each: [key], requests: 100000000, per: 1m}}]}}"
            );
        }
        text
    }

    fn limits(&self) -> String {
        format!(
            "limits:
- {{name: everybody, concurrency: 100000}}
- {{name: users, each: [user], tokens: 1000000000000, per: day}}
- {{name: keys, each: [key, model], output_tokens: 1000000000000, per: 1h}}
- {{name: tight, each: [user], models: ['tight'], requests: 2, per: 1m}}
- {{name: fleeting-{}, requests: 1000000000, per: 1m}}
",
            self.epoch
        )
    }

    fn guardrails(&self) -> String {
        format!(
            "guardrails:
- {{name: pii, in: [prompt.user, answer.content], verdict: redact, pii: {{find: [email, phone, card, iban]}}}}
- {{name: secrets, in: [prompt.user, answer.content], verdict: block, secrets: {{}}}}
- {{name: fleeting-{}, in: [prompt.user], verdict: block, words: {{list: [project bluebird]}}}}
",
            self.epoch
        )
    }

    fn models(&self) -> String {
        let mut text = "models:\n".to_owned();
        for name in ["steady", "tight", "small", "large"] {
            _ = writeln!(text, "- {{name: {name}, pool: main}}");
        }
        text += "- {name: faulty, pool: faulty, rename: load-model}\n";
        for epoch in self.recent() {
            _ = writeln!(text, "- {{name: model-{epoch}, pool: pool-{epoch}, fallbacks: [{{pool: main}}]}}");
        }
        text + "prices: {list: [{models: ['*'], input: 1, output: 2}]}\n"
    }

    fn routers(&self) -> String {
        let mut text = format!("routers:\n  auto:\n{BY_EXAMPLES}");
        for epoch in self.recent() {
            _ = writeln!(
                text,
                "  router-{epoch}: {{ask: [{{cel: {{name: rule-{epoch}, when: 'tokens > 500', model: large}}}}], default: model-{epoch}}}"
            );
        }
        text
    }

    fn pools(&self) -> String {
        let rest = format!(
            "timeouts: {{connect_ms: 1000, first_token_ms: {ANSWER_MS}, answer_ms: {ANSWER_MS}}}, retry: {{attempts: 4, budget: 1.0}}, health: {{interval_ms: 500}}"
        );
        let main: Vec<String> = (0..SERVERS).filter_map(|server| self.server(server)).collect();
        let mut text = format!(
            "pools:
  faulty: {{upstreams: [{{url: 'http://{}'}}], timeouts: {{first_token_ms: 1000, answer_ms: 1000, between_tokens_ms: 1000}}, breaker: {{failures: 0, requests_min: 1000000000}}, health: {{enabled: false}}}}
  main: {{upstreams: [{}], balance: expected_time, slow_start_ms: 1000, {rest}}}
",
            self.faulty.address,
            main.join(", ")
        );
        for epoch in self.recent() {
            let port = self.servers[0].address.port();
            let urls =
                [1, 2].map(|n| format!("{{name: fleeting-{epoch}-{n}, url: 'http://{}:{port}'}}", apart(n, epoch)));
            _ = writeln!(text, "  pool-{epoch}: {{upstreams: [{}], {rest}}}", urls.join(", "));
        }
        text
    }

    /// The first server is always there. The others leave now and then, and come back at addresses that nobody has seen
    /// before; every fifth policy names one that does not exist.
    fn server(&self, server: usize) -> Option<String> {
        let port = self.servers[server].address.port();
        let epoch = self.epoch;
        match server {
            0 => Some(format!("{{name: steady, url: 'http://127.0.0.1:{port}'}}")),
            1 if epoch % 4 == 3 => None,
            2 if epoch % 5 == 4 => Some("{name: nobody, url: 'http://127.0.0.1:1'}".to_owned()),
            _ => Some(format!("{{name: server-{epoch}-{server}, url: 'http://{}:{port}'}}", apart(10 + server, epoch))),
        }
    }

    fn evidence(&self) -> String {
        let teams: Vec<String> = (0..TEAMS).map(|team| format!("team-{}-{team}", self.epoch)).collect();
        format!(
            "telemetry: {{tenants: [{}], traces: {{share: 0.02, endpoint: 'http://127.0.0.1:{}'}}}}
audit: {{segment_bytes: {SEGMENT_BYTES}, segment_s: 20, checkpoint_s: 5, keep_bytes: {KEEP_BYTES}}}
",
            teams.join(", "),
            self.servers[0].address.port()
        )
    }
}

/// An address of this machine that no other policy names.
fn apart(net: usize, epoch: u32) -> Ipv4Addr {
    let [_, _, high, low] = (epoch + 1).to_be_bytes();
    Ipv4Addr::new(127, u8::try_from(net).unwrap_or(u8::MAX), high, low)
}

/// The size of all files in a directory, with those below it.
pub fn bytes(directory: &Path) -> u64 {
    let Ok(files) = fs::read_dir(directory) else { return 0 };
    let size = |file: fs::DirEntry| match file.metadata() {
        Ok(about) if about.is_dir() => bytes(&file.path()),
        Ok(about) => about.len(),
        Err(_) => 0,
    };
    files.flatten().map(size).sum()
}
