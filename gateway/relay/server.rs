//! Pingora's server around our apps: listeners, threads, signals, the way down and the hand-over to a new binary.

use std::collections::BTreeMap;
use std::future::Future;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use parking_lot::Mutex;
use pingora::apps::ServerApp;
use pingora::listeners::{L4BufferSettings, ListenerConfig};
use pingora::protocols::Stream;
use pingora::server::configuration::{Opt, ServerConf};
use pingora::server::{RunArgs, Server, ShutdownSignal, ShutdownSignalWatch, ShutdownWatch};
use pingora::services::background::{BackgroundService, background_service};
use pingora::services::listening::Service;
use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};

use super::App;
use super::downstream::{LINGER, WRITE_BUFFER};
use super::tls::ListenerTls;
use crate::admin::Admin;
use crate::audit::fanout;
use crate::audit::journal::By;
use crate::house::House;
use crate::settings::{Listener, Settings};
use crate::telemetry::Runtimes;

/// How long the end of the process waits for the collector of traces.
const FLUSH: Duration = Duration::from_secs(1);

/// How long sinks may still take what the journal holds when the process ends. What they lack comes with the next start.
const SETTLE: Duration = Duration::from_secs(2);

/// Work that goes on beside the requests, as long as the process lives.
pub type Background = Pin<Box<dyn Future<Output = ()> + Send>>;

/// The certificates of all listeners, to be read again with the policy.
#[derive(Clone, Debug, Default)]
pub struct Certificates(Vec<Arc<ListenerTls>>);

impl Certificates {
    /// Reads all certificates again; a listener whose files are wrong keeps its old ones.
    pub fn reload(&self) {
        for listener in &self.0 {
            if let Err(error) = listener.reload() {
                tracing::error!(%error, "a certificate was refused; the one before stays in use");
            }
        }
    }
}

/// A process that is ready to run.
pub struct Running {
    house: Arc<House>,
    listeners: Vec<(Listener, Option<Arc<ListenerTls>>)>,
    upgrade: bool,
}

impl Running {
    /// Checks everything that can be checked before the first thread starts: certificates, and whether the
    /// addresses are free (unless they are taken over from the running process).
    pub fn prepare(house: Arc<House>, upgrade: bool) -> Result<Self, String> {
        let load = |listener: &Listener| match &listener.tls {
            Some(tls) => ListenerTls::load(tls).map(Some),
            None => Ok(None),
        };
        let listeners: Vec<_> = house
            .settings
            .listeners
            .iter()
            .map(|listener| Ok((listener.clone(), load(listener)?)))
            .collect::<Result<_, String>>()?;
        if !upgrade {
            let addresses = listeners.iter().map(|(listener, _)| listener.address.as_str());
            addresses.chain([house.settings.admin.address.as_str()]).try_for_each(check_free)?;
        }
        Ok(Self { house, listeners, upgrade })
    }

    /// The certificates of the listeners.
    pub fn certificates(&self) -> Certificates {
        Certificates(self.listeners.iter().filter_map(|(_, tls)| tls.clone()).collect())
    }

    /// Serves until a signal ends it. `background` runs beside it.
    pub fn run(self, admin: Admin, background: Background) -> Result<(), String> {
        let settings = &self.house.settings;
        let mut server =
            Server::new_with_opt_and_conf(Opt { upgrade: self.upgrade, ..Opt::default() }, server_conf(settings));
        server.bootstrap();
        // Each service has threads of its own, so listeners that are alike share one.
        let mut services: BTreeMap<(bool, u64), Service<App>> = BTreeMap::new();
        for (listener, tls) in &self.listeners {
            let idle = Duration::from_millis(listener.idle_ms);
            let service = services.entry((listener.h2c, listener.idle_ms)).or_insert_with(|| {
                Service::new("requests".to_owned(), App::new(self.house.clone(), listener.h2c, idle))
            });
            service.add_listener(endpoint(listener, tls.as_ref())?);
        }
        for (_, mut service) in services {
            service.threads = Some(settings.thread_count());
            server.add_service(service);
        }
        let mut admin_service =
            Service::new("admin".to_owned(), AdminApp(Arc::new(admin), self.house.telemetry.runtimes.clone()));
        admin_service.threads = Some(1);
        let plain = Listener { address: settings.admin.address.clone(), ..Listener::default() };
        admin_service.add_listener(endpoint(&plain, None)?);
        server.add_service(admin_service);
        let beside = Beside { house: self.house.clone(), work: Mutex::new(Some(background)) };
        let mut beside = background_service("background", beside);
        beside.threads = Some(1);
        server.add_service(beside);
        server.run(RunArgs { shutdown_signal: Box::new(Signals(self.house.clone())) });
        Ok(())
    }
}

fn server_conf(settings: &Settings) -> ServerConf {
    let upgrade_socket = settings.upgrade_socket.clone().unwrap_or_else(|| "/nonexistent/upgrade.sock".into());
    ServerConf {
        threads: settings.thread_count(),
        grace_period_seconds: Some(settings.shutdown.drain_ms.div_ceil(1000)),
        graceful_shutdown_timeout_seconds: Some(1),
        upgrade_sock: upgrade_socket.to_string_lossy().into_owned(),
        ..ServerConf::default()
    }
}

fn endpoint(listener: &Listener, tls: Option<&Arc<ListenerTls>>) -> Result<ListenerConfig, String> {
    let mut endpoint = match listener.address.strip_prefix("unix:") {
        Some(path) => {
            let mode = u32::from_str_radix(&listener.permissions, 8).unwrap_or(0o660);
            ListenerConfig::uds(path).permissions(std::fs::Permissions::from_mode(mode))
        }
        None => ListenerConfig::tcp(listener.address.as_str()),
    };
    // Without TLS every read goes into the buffer of a head or a body at once: one more would only be copied from, and
    // lie about for as long as a stream is open. TLS reads in small pieces.
    let read = if tls.is_some() { 16 << 10 } else { 0 };
    endpoint = endpoint.l4_buffer(L4BufferSettings::new(read, WRITE_BUFFER));
    Ok(match tls {
        Some(tls) => endpoint.tls(tls.pingora()?),
        None => endpoint,
    })
}

/// A taken address would only be noticed on a thread of its own, which nobody sees fail.
fn check_free(address: &str) -> Result<(), String> {
    if let Some(path) = address.strip_prefix("unix:") {
        let directory = Path::new(path).parent().unwrap_or(Path::new("/"));
        return match directory.is_dir() {
            true => Ok(()),
            false => Err(format!("cannot listen on {address}: {} is no directory", directory.display())),
        };
    }
    let socket: SocketAddr = address.parse().map_err(|_| format!("{address} is no address"))?;
    std::net::TcpListener::bind(socket).map(drop).map_err(|error| {
        format!("cannot listen on {address}: {error}. Is another gateway running? Choose another address with --listen and --admin")
    })
}

/// The background work, and the end of the process when it has nothing left to do.
struct Beside {
    house: Arc<House>,
    work: Mutex<Option<Background>>,
}

#[async_trait]
impl BackgroundService for Beside {
    async fn start(&self, mut shutdown: ShutdownWatch) {
        let Some(work) = self.work.lock().take() else { return };
        self.house.telemetry.runtimes.on("background");
        let work = tokio::spawn(work);
        // An error means that the server is gone, which is the same.
        let _ = shutdown.wait_for(|down| *down).await;
        self.house.drain();
        // A moment before Pingora cuts what is left, so that it is told.
        let drain = Duration::from_millis(self.house.settings.shutdown.drain_ms);
        let until = Instant::now() + drain.saturating_sub(Duration::from_millis(100));
        tokio::time::sleep(LINGER + Duration::from_millis(50)).await;
        while Instant::now() < until {
            if self.house.telemetry.in_flight.get() == 0 {
                tracing::info!("nothing is running any more: good-bye");
                self.house.tracer.flush(&self.house.policy, FLUSH).await;
                self.house.close_journal();
                self.house.state.limits.shared.settle(SETTLE).await;
                fanout::settle(&self.house, SETTLE).await;
                std::process::exit(0);
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let left = self.house.telemetry.in_flight.get();
        tracing::warn!(left, "the time to finish is over: what still runs is cut");
        work.abort();
    }
}

/// SIGTERM: fail readiness, serve on for the announced delay, then finish what runs. SIGQUIT: hand the listeners to
/// the new process, then the same. SIGINT: at once.
struct Signals(Arc<House>);

#[async_trait]
impl ShutdownSignalWatch for Signals {
    async fn recv(&self) -> ShutdownSignal {
        let (Ok(mut terminate), Ok(mut quit), Ok(mut interrupt)) =
            (signal(SignalKind::terminate()), signal(SignalKind::quit()), signal(SignalKind::interrupt()))
        else {
            tracing::error!("signals cannot be received: the process can only be killed");
            return std::future::pending().await;
        };
        loop {
            tokio::select! {
                _ = terminate.recv() => {
                    self.0.act("drain", By::itself("signal"), json!({"signal": "SIGTERM"}));
                    tracing::info!(delay_ms = self.0.settings.shutdown.drain_delay_ms, "going down: readiness fails now");
                    self.0.drain();
                    let delay = Duration::from_millis(self.0.settings.shutdown.drain_delay_ms);
                    tokio::select! {
                        () = tokio::time::sleep(delay) => {}
                        _ = interrupt.recv() => return ShutdownSignal::FastShutdown,
                    }
                    return ShutdownSignal::GracefulTerminate;
                }
                _ = quit.recv() => {
                    if self.0.settings.upgrade_socket.is_some() {
                        self.0.act("upgrade", By::itself("signal"), json!({"signal": "SIGQUIT"}));
                        tracing::info!("handing the listeners to the new process");
                        return ShutdownSignal::GracefulUpgrade;
                    }
                    tracing::error!("SIGQUIT asks for an upgrade, but the settings have no `upgrade_socket`: ignored");
                }
                _ = interrupt.recv() => return ShutdownSignal::FastShutdown,
            }
        }
    }
}

/// The admin listener: hyper on Pingora's sockets, so that an upgrade hands it over too.
struct AdminApp(Arc<Admin>, Runtimes);

#[async_trait]
impl ServerApp for AdminApp {
    async fn process_new(self: &Arc<Self>, stream: Stream, shutdown: &ShutdownWatch) -> Option<Stream> {
        let admin = self.0.clone();
        self.1.on("admin");
        let peer = stream.get_socket_digest().and_then(|digest| digest.peer_addr().map(ToString::to_string));
        let service = hyper::service::service_fn(move |request| {
            let (admin, peer) = (admin.clone(), peer.clone());
            async move { Ok::<_, std::convert::Infallible>(admin.answer(request, peer).await) }
        });
        let builder = Builder::new(TokioExecutor::new());
        let connection = builder.serve_connection(TokioIo::new(stream), service);
        tokio::pin!(connection);
        let mut shutdown = shutdown.clone();
        let down = async move { shutdown.wait_for(|down| *down).await.is_ok() };
        tokio::select! {
            // What a client of the admin port does wrong is its own affair.
            _ = connection.as_mut() => {}
            _ = down => {
                connection.as_mut().graceful_shutdown();
                let _ = connection.await;
            }
        }
        None
    }
}
