//! What needs a restart: listeners, TLS, threads, memory, directories. `settings.yaml`, or nothing at all.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::admin::access;
use crate::ledger;
use crate::policy::Problems;
use crate::policy::problem::{Document, Problem};
use crate::secret::{Secret, SecretSource};

/// How the process is set up. Every key has a default.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Where clients connect.
    #[schemars(length(min = 1))]
    pub listeners: Vec<Listener>,
    /// Where operators connect: health, metrics, reload. Never on a public address.
    pub admin: Admin,
    /// Threads that serve requests. Absent: one a core.
    #[schemars(range(min = 1, max = 1024))]
    pub threads: Option<usize>,
    /// What is served by a process that starts with a policy file that is broken.
    pub start_with: StartWith,
    /// Where the journal lies.
    pub audit: Audit,
    /// Where the account of what was spent is.
    pub ledger: Ledger,
    /// How the process ends.
    pub shutdown: Shutdown,
    /// How much memory it may use.
    pub memory: Memory,
    /// The zone this gateway is in; upstreams of the same zone are asked first.
    pub zone: Option<String>,
    /// A PEM file of certificate authorities that upstreams are checked against. Absent: the system's.
    pub ca_file: Option<PathBuf>,
    /// Kept connections to upstreams, in all.
    #[schemars(range(min = 1))]
    pub kept_connections: usize,
    /// DNS servers to ask, as `IP:PORT`. Absent: the system's.
    pub dns_servers: Vec<SocketAddr>,
    /// The socket over which a new process takes over the listeners of the running one (`infergate serve
    /// --upgrade`). Keep it in a directory that only the gateway's user can write to.
    pub upgrade_socket: Option<PathBuf>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            listeners: vec![Listener::default()],
            admin: Admin::default(),
            threads: None,
            start_with: StartWith::File,
            audit: Audit::default(),
            ledger: Ledger::default(),
            shutdown: Shutdown::default(),
            memory: Memory::default(),
            zone: None,
            ca_file: None,
            kept_connections: 4_096,
            dns_servers: Vec::new(),
            upgrade_socket: None,
        }
    }
}

/// What a process begins with. A running one keeps to its last good policy in any case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum StartWith {
    /// The policy file or nothing: if it is broken, the process says why and ends.
    #[default]
    File,
    /// The policy file, or, if it is broken, the last text of it that was good, which is kept in the journal's directory.
    /// The log, `/admin/policy` and `infergate_policy_failed` say so until the file is mended. Files that a policy names,
    /// and its secrets, are not kept: they are read where they are.
    LastGood,
}

/// One place where clients connect.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Listener {
    /// `IP:PORT`, or `unix:/path/of/a/socket`.
    pub address: String,
    /// The permissions of a Unix socket, in octal.
    pub permissions: String,
    /// TLS. Absent: none.
    pub tls: Option<Tls>,
    /// Whether HTTP/2 is understood without TLS too.
    pub h2c: bool,
    /// How long a client's connection may lie idle, in milliseconds.
    #[schemars(range(min = 1))]
    pub idle_ms: u64,
}

impl Default for Listener {
    fn default() -> Self {
        Self {
            address: "127.0.0.1:8080".to_owned(),
            permissions: "660".to_owned(),
            tls: None,
            h2c: true,
            idle_ms: 75_000,
        }
    }
}

/// TLS on a listener. Certificates are read again whenever the policy is.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Tls {
    /// Certificates. The one whose names fit the client's SNI is used, the first one otherwise.
    #[schemars(length(min = 1))]
    pub certificates: Vec<Certificate>,
    /// A PEM file of the authorities whose client certificates are accepted.
    #[serde(default)]
    pub client_ca: Option<PathBuf>,
    /// Whether a client must show a certificate.
    #[serde(default)]
    pub require_client_certificate: bool,
}

/// A certificate and its key.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Certificate {
    /// The PEM file of the chain, the server's own certificate first.
    pub chain: PathBuf,
    /// The PEM file of the private key.
    pub key: PathBuf,
}

/// Where operators connect, and what each of them may do there.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Admin {
    /// `IP:PORT`, or `unix:/path/of/a/socket`.
    pub address: String,
    /// The keys of operators: `infergate key create --role R` makes one and its entry. Absent: whoever reaches the
    /// address may do everything.
    pub keys: Vec<AdminKey>,
    /// The secret that the hashes of these keys are made with: at least 32 characters.
    pub pepper: Option<SecretSource>,
    /// Whether `/metrics` is answered without a key. `/livez` and `/readyz` always are.
    pub open_metrics: bool,
}

impl Admin {
    /// Whether only this machine reaches it.
    pub fn is_local(&self) -> bool {
        is_local(&self.address)
    }
}

fn is_local(address: &str) -> bool {
    match address.parse::<SocketAddr>() {
        Ok(address) => address.ip().is_loopback(),
        Err(_) => true, // a Unix socket
    }
}

impl Default for Admin {
    fn default() -> Self {
        Self { address: "127.0.0.1:9090".to_owned(), keys: Vec::new(), pepper: None, open_metrics: true }
    }
}

/// One operator's key.
#[derive(Clone, Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AdminKey {
    /// Who has it: what they change is on record under this name.
    #[schemars(length(min = 1))]
    pub name: String,
    /// What it allows.
    pub role: Role,
    /// The part of it that may be shown: `ig_` and six characters.
    pub prefix: String,
    /// HMAC-SHA256 of the whole key under the pepper, in 64 hexadecimal digits.
    pub hash: String,
    /// When it ends: `2027-02-01T00:00:00Z`. Absent: never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires: Option<String>,
}

/// What an operator may do. Each role may do what those before it may.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize, Serialize, JsonSchema, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Look at everything.
    Viewer,
    /// Reload, set breakers and log levels.
    Operator,
    /// Everything.
    Owner,
}

/// Where the journal lies. What becomes of its records is in the policy, under `audit`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Audit {
    /// Whether there is a journal at all.
    pub enabled: bool,
    /// Its directory. Several gateways may share one, if it is on a local disk. Absent: `$STATE_DIRECTORY/journal`
    /// (systemd sets it), else `$XDG_STATE_HOME/infergate/journal`, else `~/.local/state/infergate/journal`; where
    /// none of these can be written, the gateway warns and runs without a journal.
    pub directory: Option<PathBuf>,
    /// The file with the key that signs it (Ed25519, PKCS#8 in hexadecimal digits), made at the first start. Absent:
    /// `signing.key` in the directory. Keep it elsewhere, so that whoever can edit the journal cannot sign it.
    pub key_file: Option<PathBuf>,
}

impl Default for Audit {
    fn default() -> Self {
        Self { enabled: true, directory: None, key_file: None }
    }
}

impl Audit {
    /// The directory that is used where none is named.
    pub fn usual_directory(env: &dyn Fn(&str) -> Option<String>) -> Option<PathBuf> {
        let below = |name: &str, rest: &str| {
            env(name).filter(|path| path.starts_with('/')).map(|path| PathBuf::from(path).join(rest))
        };
        below("STATE_DIRECTORY", "journal")
            .or_else(|| below("XDG_STATE_HOME", "infergate/journal"))
            .or_else(|| below("HOME", ".local/state/infergate/journal"))
    }
}

/// Where the account of what was spent is: sums by minute, hour and day, folded from the journal. `infergate usage`
/// reads it.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Ledger {
    /// Whether there is one at all. Without a journal there is none.
    pub enabled: bool,
    /// An SQLite file, on a local disk. Absent: `ledger.sqlite3` in the journal's directory.
    pub path: Option<PathBuf>,
    /// A PostgreSQL server instead, for several gateways: `postgres://user@host:5432/database`. Every gateway folds its
    /// own journal into it. TLS is required and checked unless the server is on this machine or the URL ends with
    /// `?sslmode=disable`.
    pub url: Option<String>,
    /// The password for `url`.
    pub password: Option<SecretSource>,
    /// Whether a row for each request is kept beside the sums.
    pub rows: Rows,
    /// How many days minutes are kept; hours and days stay. A month's budget in a time zone that is half an hour off
    /// needs 32.
    #[schemars(range(min = 1, max = 36_500))]
    pub keep_minutes_days: u32,
    /// How many days the rows of requests are kept. Absent: for ever.
    #[schemars(range(min = 1, max = 36_500))]
    pub keep_rows_days: Option<u32>,
}

impl Default for Ledger {
    fn default() -> Self {
        let (path, url, password) = (None, None, None);
        Self { enabled: true, path, url, password, rows: Rows::None, keep_minutes_days: 35, keep_rows_days: None }
    }
}

impl Ledger {
    /// What is wrong with it, and where.
    fn check(&self) -> Vec<(&'static str, String)> {
        let mut wrong = Vec::new();
        if let (Some(_), Some(_)) = (&self.path, &self.url) {
            wrong.push(("ledger.path", "a ledger is in a file or on a server: `path` or `url`".to_owned()));
        }
        match &self.url {
            Some(url) => wrong.extend(ledger::check_url(url).err().map(|message| ("ledger.url", message))),
            None if self.password.is_some() => {
                wrong.push(("ledger.password", "a file has none: it is for `url`".to_owned()))
            }
            None => {}
        }
        wrong
    }
}

/// Which requests have a row of their own in the ledger.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Rows {
    /// None: there are sums alone.
    #[default]
    None,
    /// All that leave a record.
    All,
}

/// How the process ends.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Shutdown {
    /// How long new connections are still served after SIGTERM while `/readyz` says no, in milliseconds. Longer
    /// than the load balancer takes to notice.
    pub drain_delay_ms: u64,
    /// How long running requests may go on after that, in milliseconds.
    pub drain_ms: u64,
}

impl Default for Shutdown {
    fn default() -> Self {
        Self { drain_delay_ms: 1_000, drain_ms: 300_000 }
    }
}

/// How much memory the process may use.
#[derive(Clone, Copy, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Memory {
    /// Resident bytes beyond which new requests get 503. Absent: 90 % of the container's limit or of the machine.
    pub ceiling_bytes: Option<u64>,
    /// Bytes of request bodies in flight, in all, beyond which new requests get 503. Absent: a quarter of the
    /// ceiling.
    pub bodies_bytes: Option<u64>,
}

impl Settings {
    /// Reads the file at `path`, or says all that is wrong with it.
    pub fn load(path: &Path) -> Result<Self, Problems> {
        let one = |problem| Problems(vec![problem]);
        let text = std::fs::read_to_string(path).map_err(|error| {
            one(Problem { place: None, path: String::new(), message: format!("cannot be read: {error}") })
        })?;
        Self::parse(&text)
    }

    /// Reads `text`.
    pub fn parse(text: &str) -> Result<Self, Problems> {
        let document = Document::parse(text).map_err(|problem| Problems(vec![problem]))?;
        if document.value.is_null() {
            return Ok(Self::default());
        }
        let settings: Self = document.read().map_err(Problems::in_order)?;
        let mut problems = Vec::new();
        settings.check(&document, &mut problems);
        if problems.is_empty() { Ok(settings) } else { Err(Problems::in_order(problems)) }
    }

    /// Whether only this machine reaches the listeners.
    pub fn is_local(&self) -> bool {
        self.listeners.iter().all(|listener| is_local(&listener.address))
    }

    /// Whether a listener takes certificates of clients.
    pub fn takes_certificates(&self) -> bool {
        let tls = self.listeners.iter().filter_map(|listener| listener.tls.as_ref());
        tls.into_iter().any(|tls| tls.client_ca.is_some())
    }

    /// Threads that serve requests.
    pub fn thread_count(&self) -> usize {
        self.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from))
    }

    /// Resident bytes beyond which new requests are refused.
    pub fn memory_ceiling(&self) -> u64 {
        self.memory.ceiling_bytes.unwrap_or_else(|| crate::memory::available() / 10 * 9)
    }

    /// Bytes of bodies in flight, in all.
    pub fn bodies_bytes(&self) -> u64 {
        self.memory.bodies_bytes.unwrap_or_else(|| self.memory_ceiling() / 4)
    }

    /// Every file with a certificate, a key or an authority.
    pub fn tls_files(&self) -> Vec<PathBuf> {
        let tls = self.listeners.iter().filter_map(|listener| listener.tls.as_ref());
        tls.flat_map(|tls| {
            let certificates = tls.certificates.iter().flat_map(|certificate| [&certificate.chain, &certificate.key]);
            certificates.chain(&tls.client_ca).cloned()
        })
        .collect()
    }

    fn check(&self, document: &Document, problems: &mut Vec<Problem>) {
        let addresses = self.listeners.iter().enumerate();
        let addresses = addresses.map(|(index, listener)| (format!("listeners[{index}].address"), &listener.address));
        for (path, address) in addresses.chain([("admin.address".to_owned(), &self.admin.address)]) {
            if let Err(message) = check_address(address) {
                problems.push(document.problem(&path, message));
            }
        }
        // Hashes need no pepper to be looked at.
        if let Err(wrong) = access::ring(&self.admin.keys, &Secret::new("")) {
            problems.extend(wrong.into_iter().map(|(path, message)| document.problem(&path, message)));
        }
        if !self.admin.keys.is_empty() && self.admin.pepper.is_none() {
            let message = "`pepper` is missing: the keys were made with one";
            problems.push(document.problem("admin.keys", message));
        }
        problems.extend(self.ledger.check().into_iter().map(|(path, message)| document.problem(path, message)));
        for (index, listener) in self.listeners.iter().enumerate() {
            if u32::from_str_radix(&listener.permissions, 8).is_err() {
                let path = format!("listeners[{index}].permissions");
                problems.push(document.problem(&path, format!("{} is not octal, like 660", listener.permissions)));
            }
        }
    }
}

/// Whether something can listen on `address`, as far as its text tells.
pub fn check_address(address: &str) -> Result<(), String> {
    let unix = address.strip_prefix("unix:").is_some_and(|path| path.starts_with('/'));
    if unix || address.parse::<SocketAddr>().is_ok() {
        return Ok(());
    }
    Err(format!("{address} is no address: give IP:PORT, like 0.0.0.0:8080, or unix:/path"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_a_whole_set_of_settings() {
        let settings = Settings::parse("").unwrap();
        assert_eq!(settings.listeners[0].address, "127.0.0.1:8080");
        assert_eq!(settings.admin.address, "127.0.0.1:9090");
    }

    #[test]
    fn a_wrong_ledger_is_told_at_its_place_and_no_password_with_it() {
        let told = |text: &str| Settings::parse(text).unwrap_err().lines("settings.yaml").join("\n");
        assert!(
            told("ledger: {path: x, url: 'postgres://h/d'}").contains("1:10: ledger.path: a ledger is in a file or")
        );
        assert!(told("ledger: {password: {env: X}}").contains("ledger.password: a file has none"));
        let told = told("ledger:\n  url: postgres://u:canary@h/d\n");
        assert!(told.contains("2:") && told.contains("give it as `password`") && !told.contains("canary"), "{told}");
    }

    #[test]
    fn a_wrong_address_is_told_at_its_place() {
        let problems = Settings::parse("listeners:\n  - address: localhost\nadmin: {address: 'unix:x'}\n").unwrap_err();
        let told = problems.lines("settings.yaml");
        assert!(told[0].starts_with("settings.yaml:2:5: listeners[0].address: localhost is no address"), "{told:?}");
        assert_eq!(told.len(), 2);
    }
}
