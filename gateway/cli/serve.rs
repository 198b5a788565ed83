//! `infergate serve`: settings and policy in, requests served.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;

use serde_json::json;

use super::{Logging, counted};
use crate::admin::Admin;
use crate::admin::access::Access;
use crate::audit::fanout;
use crate::audit::journal::{By, Journal};
use crate::discover::Upstreams;
use crate::egress::Egress;
use crate::guard::remote;
use crate::house::House;
use crate::issuers;
use crate::ledger::{Ledger, Place};
use crate::limits;
use crate::limits::restore::{keep_restored, restore};
use crate::limits::warn::file_warnings;
use crate::logging::Levels;
use crate::memory;
use crate::policy::{Problems, World, compile, reload};
use crate::pool::watch::{self, Names};
use crate::relay::server::{Certificates, Running};
use crate::routers::second;
use crate::settings::{Audit, Settings, check_address};
use crate::simulate::{Options, Simulated};

/// The policy that is served where no file is named and `config/policy.yaml` is not there.
const SHIPPED_POLICY: &str = include_str!("../../config/policy.yaml");
const SHIPPED_PATH: &str = "config/policy.yaml";
/// Where the shipped policy expects the embedded model server.
const DEMO: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 8081);
/// The models of the embedded server in the demo.
const DEMO_MODELS: [&str; 2] = ["sim-small", "sim-large"];

/// Serve requests.
#[derive(Args)]
pub(super) struct Serve {
    /// The policy file. Without it, and without --upstream: the shipped policy, with an embedded model server
    #[arg(long, value_name = "FILE", env = "INFERGATE_POLICY", conflicts_with = "upstream")]
    policy: Option<PathBuf>,
    /// The settings file: listeners, TLS, threads, memory
    #[arg(long, value_name = "FILE", env = "INFERGATE_SETTINGS")]
    settings: Option<PathBuf>,
    /// Where clients connect, instead of what the settings say: IP:PORT or unix:/path
    #[arg(long, value_name = "ADDR", env = "INFERGATE_LISTEN", value_parser = address)]
    listen: Option<String>,
    /// Where operators connect, instead of what the settings say: IP:PORT or unix:/path
    #[arg(long, value_name = "ADDR", env = "INFERGATE_ADMIN", value_parser = address)]
    admin: Option<String>,
    /// The directory of the journal, instead of what the settings say
    #[arg(long, value_name = "DIR", env = "INFERGATE_JOURNAL")]
    journal: Option<PathBuf>,
    /// Serve every model that this server lists, without a policy file. May be given several times
    #[arg(long, value_name = "URL")]
    upstream: Vec<String>,
    /// The environment variable with the key that the --upstream servers want
    #[arg(long, value_name = "NAME", requires = "upstream")]
    upstream_key_env: Option<String>,
    /// Take over the listeners of the running gateway (settings: upgrade_socket), then send it SIGQUIT
    #[arg(long)]
    upgrade: bool,
    #[command(flatten)]
    logging: Logging,
}

fn address(text: &str) -> Result<String, String> {
    check_address(text).map(|()| text.to_owned())
}

/// How long the start waits for the ledger to say what budgets had been spent.
const RESTORE: Duration = Duration::from_secs(10);

/// Where the policy comes from.
enum Source {
    /// A file, watched.
    File(PathBuf),
    /// The shipped policy, in front of the embedded model server; watched if it lies where we stand.
    Demo(Option<PathBuf>),
    /// What the upstreams say of themselves.
    Upstreams(Upstreams),
}

impl Serve {
    pub(super) fn run(self) -> Result<ExitCode, String> {
        let levels = self.logging.start()?;
        // Before anything that speaks TLS: one provider for all of it.
        let _already_there = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let settings = self.settings()?;
        let mut house = House::new(settings);
        house.journal = open_journal(&house)?;
        house.ledger = start_ledger(&house)?;
        let house = Arc::new(house);
        let served = self.serve(&house, levels);
        house.close_journal();
        served.map(|()| ExitCode::SUCCESS)
    }

    fn serve(&self, house: &Arc<House>, levels: Levels) -> Result<(), String> {
        let source = self.source();
        source.load(house)?;
        restore(house, RESTORE);
        let addresses: Vec<_> = house.settings.listeners.iter().map(|listener| &listener.address).collect();
        house.act("start", By::itself("process"), json!({"upgrade": self.upgrade, "listeners": addresses}));
        let access = Access::new(&house.settings.admin, &|name| std::env::var(name).ok())?;
        if access.is_open() && !house.settings.admin.is_local() {
            let address = &house.settings.admin.address;
            tracing::warn!(%address, "everybody who reaches the admin port may do everything: give the settings `admin.keys`");
        }
        let running = Running::prepare(house.clone(), self.upgrade)?;
        let certificates = running.certificates();
        let admin = Admin::new(house.clone(), source.path(), certificates.clone(), levels, access);
        let background = Box::pin(beside(house.clone(), source, certificates));
        running.run(admin, background)?;
        house.wait_for_the_last();
        Ok(())
    }

    fn settings(&self) -> Result<Settings, String> {
        let mut settings = match &self.settings {
            Some(path) => {
                Settings::load(path).map_err(|problems| problems.lines(&path.display().to_string()).join("\n"))?
            }
            None => Settings::default(),
        };
        if let Some(listen) = &self.listen {
            settings.listeners.truncate(1);
            for listener in &mut settings.listeners {
                listener.address.clone_from(listen);
            }
        }
        if let Some(admin) = &self.admin {
            settings.admin.address.clone_from(admin);
        }
        if let Some(journal) = &self.journal {
            settings.audit.directory = Some(journal.clone());
        }
        Ok(settings)
    }

    fn source(&self) -> Source {
        let shipped = Path::new(SHIPPED_PATH);
        match &self.policy {
            Some(path) => Source::File(path.clone()),
            None if !self.upstream.is_empty() => {
                Source::Upstreams(Upstreams { urls: self.upstream.clone(), key_env: self.upstream_key_env.clone() })
            }
            None => Source::Demo(shipped.is_file().then(|| shipped.to_owned())),
        }
    }
}

/// The journal that the settings name, or the usual one; none where there is none to be.
fn open_journal(house: &House) -> Result<Option<Arc<Journal>>, String> {
    let audit = &house.settings.audit;
    if !audit.enabled {
        return Ok(None);
    }
    let open = |directory: &Path| {
        Journal::open(directory, audit.key_file.as_deref(), Default::default(), house.telemetry.journal.clone())
    };
    if let Some(directory) = &audit.directory {
        return open(directory).map(Some);
    }
    let usual = Audit::usual_directory(&|name| std::env::var(name).ok());
    match usual.ok_or_else(|| "no directory for it is known".to_owned()).and_then(|directory| open(&directory)) {
        Ok(journal) => Ok(Some(journal)),
        Err(error) => {
            tracing::warn!(%error, "requests leave no record: name a directory with --journal or in the settings, under `audit`");
            Ok(None)
        }
    }
}

/// The ledger that the settings name; none without a journal.
fn start_ledger(house: &House) -> Result<Option<Arc<Ledger>>, String> {
    let Some(journal) = house.journal.as_ref().filter(|_| house.settings.ledger.enabled) else { return Ok(None) };
    let place = Place::of(&house.settings, Some(journal.directory()))?;
    Ledger::start(place, &house.settings.ledger, journal, house.telemetry.ledger.clone()).map(Some)
}

impl Source {
    /// The file that is watched.
    fn path(&self) -> Option<PathBuf> {
        match self {
            Self::File(path) | Self::Demo(Some(path)) => Some(path.clone()),
            Self::Demo(None) | Self::Upstreams(_) => None,
        }
    }

    /// Puts the first policy in force, before anything listens. What upstreams serve is asked later.
    fn load(&self, house: &House) -> Result<(), String> {
        let told =
            |name: &str, problems: Problems| format!("the policy is refused:\n{}", problems.lines(name).join("\n"));
        if let Some(path) = self.path() {
            return reload::start(house, &path).map_err(|problems| told(&path.display().to_string(), problems));
        }
        if let Self::Demo(_) = self {
            let env = |name: &str| std::env::var(name).ok();
            let world = World::new(&env, &house.state, &house.telemetry, &house.settings);
            let shipped = compile(SHIPPED_POLICY, &world).map_err(|problems| told(SHIPPED_PATH, problems))?;
            reload::swap(house, shipped, By::itself("process"));
        }
        Ok(())
    }
}

/// Everything that goes on beside the requests.
async fn beside(house: Arc<House>, source: Source, certificates: Certificates) {
    let names = Arc::new(Names::new(&house.settings.dns_servers));
    let _demo = match start_demo(&source).await {
        Ok(demo) => demo,
        Err(message) => {
            eprintln!("infergate: {message}");
            house.close_journal();
            std::process::exit(1);
        }
    };
    let mut jobs = tokio::task::JoinSet::new();
    jobs.spawn(watch::run(house.clone(), names.clone()));
    jobs.spawn(memory::watch(house.clone()));
    jobs.spawn(keep_restored(house.clone()));
    jobs.spawn(file_warnings(house.clone()));
    jobs.spawn(limits::shared::run(house.clone()));
    match Egress::new(house.settings.ca_file.as_deref()) {
        Ok(egress) => {
            let egress = Arc::new(egress);
            jobs.spawn(fanout::run(house.clone(), egress.clone()));
            jobs.spawn(issuers::run(house.clone(), egress.clone()));
            jobs.spawn(remote::run(house.clone(), egress.clone()));
            jobs.spawn(second::run(house.clone(), egress.clone()));
            let exporting = house.clone();
            jobs.spawn(async move { exporting.tracer.run(&exporting.policy, &egress).await });
        }
        Err(error) => tracing::error!(%error, "nothing can be sent out: no sinks, no traces, no keys of issuers"),
    }
    match &source {
        Source::Upstreams(upstreams) => {
            let complete = upstreams.discover(&house, &names).await.unwrap_or_else(|error| {
                eprintln!("infergate: {error}");
                house.close_journal();
                std::process::exit(1);
            });
            jobs.spawn(upstreams.clone().watch(house.clone(), names.clone(), complete));
        }
        Source::File(_) | Source::Demo(_) => watch::look_up_all(&names, &house.policy.get()).await,
    }
    if let Some(path) = source.path() {
        let files = house.settings.tls_files();
        jobs.spawn(reload::watch(house.clone(), path, files, move || certificates.reload()));
    }
    listening(&house.settings).await;
    issuers::tried(&house).await;
    house.set_started();
    greet(&house, &source);
    while jobs.join_next().await.is_some() {}
}

async fn start_demo(source: &Source) -> Result<Option<Simulated>, String> {
    if !matches!(source, Source::Demo(_)) {
        return Ok(None);
    }
    let models = DEMO_MODELS.map(str::to_owned).to_vec();
    let options = Options { listen: DEMO, models, ttft_ms: 80, tokens_per_second: 60.0, ..Options::default() };
    let started = Simulated::start(options).await;
    started.map(Some).map_err(|error| {
        format!("the embedded model server cannot listen on {DEMO}: {error}. Give --policy or --upstream to serve without it")
    })
}

/// Waits until the first listener takes connections.
async fn listening(settings: &Settings) {
    let Some(listener) = settings.listeners.first() else { return };
    for _ in 0..200 {
        let connected = match listener.address.strip_prefix("unix:") {
            Some(path) => tokio::net::UnixStream::connect(path).await.is_ok(),
            None => tokio::net::TcpStream::connect(&listener.address).await.is_ok(),
        };
        if connected {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    tracing::error!(address = %listener.address, "nothing listens there");
}

/// What a person at a terminal wants to know, with a line to paste.
fn greet(house: &House, source: &Source) {
    let policy = house.policy.get();
    let address = house.settings.listeners.first().map_or("", |listener| listener.address.as_str());
    let scheme =
        if house.settings.listeners.first().is_some_and(|listener| listener.tls.is_some()) { "https" } else { "http" };
    let (base, socket) = match address.strip_prefix("unix:") {
        Some(path) => ("http://localhost".to_owned(), format!("--unix-socket {path} ")),
        None => (format!("{scheme}://{}", address.replace("0.0.0.0", "127.0.0.1")), String::new()),
    };
    let model =
        policy.listed().iter().map(|(name, _)| name.as_str()).find(|name| !name.contains('*')).unwrap_or("MODEL");
    println!("Infergate {} listens on {address}, admin on {}", env!("CARGO_PKG_VERSION"), house.settings.admin.address);
    let (models, pools) = (policy.listed().len() as u64, policy.pools.len() as u64);
    println!("{}, {}, policy {}", counted(models, "model"), counted(pools, "pool"), source.described());
    if let Some(journal) = &house.journal {
        println!("Every request leaves a record in {}", journal.directory().display());
    }
    println!("\nTry it:\n  curl -N {socket}{base}/v1/chat/completions -H 'content-type: application/json' \\");
    println!(
        "    -d '{{\"model\":\"{model}\",\"stream\":true,\"messages\":[{{\"role\":\"user\",\"content\":\"Hello!\"}}]}}'\n"
    );
}

impl Source {
    fn described(&self) -> String {
        match self {
            Self::File(path) => format!("{} (reloads when saved)", path.display()),
            Self::Demo(Some(path)) => {
                format!("{} (reloads when saved), in front of an embedded model server on {DEMO}", path.display())
            }
            Self::Demo(None) => format!("as shipped, in front of an embedded model server on {DEMO}"),
            Self::Upstreams(upstreams) => format!("made of what {} serve", upstreams.urls.join(", ")),
        }
    }
}
