//! What the process and its Tokio runtimes use, under the standard names, read when somebody asks.

use std::cell::Cell;
use std::fs;
use std::sync::Arc;

use parking_lot::Mutex;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, MetricEncoder};
use prometheus_client::metrics::MetricType::{self, Counter, Gauge};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Unit;
use tokio::runtime::{Handle, RuntimeMetrics};

/// Linux counts a process's time in hundredths of a second, whatever the kernel's own clock does.
const TICKS: f64 = 100.0;

/// The runtimes that have told of themselves.
#[derive(Clone, Debug, Default)]
pub struct Runtimes(Arc<Mutex<Vec<(&'static str, Handle)>>>);

thread_local! {
    static TOLD: Cell<bool> = const { Cell::new(false) };
}

impl Runtimes {
    /// The runtime that we are on has a name. Each thread says so once; after that it costs next to nothing.
    pub fn on(&self, name: &'static str) {
        if !TOLD.replace(true) {
            self.add(name);
        }
    }

    #[cold]
    pub(super) fn add(&self, name: &'static str) {
        let Ok(handle) = Handle::try_current() else { return };
        let mut runtimes = self.0.lock();
        if runtimes.iter().all(|(_, known)| known.id() != handle.id()) {
            runtimes.push((name, handle));
        }
    }

    /// Every name with the metrics of its runtimes: one, or one a thread.
    fn by_name(&self) -> Vec<(&'static str, Vec<RuntimeMetrics>)> {
        let mut names: Vec<(&'static str, Vec<RuntimeMetrics>)> = Vec::new();
        for (name, handle) in self.0.lock().iter() {
            match names.iter_mut().find(|(known, _)| known == name) {
                Some((_, metrics)) => metrics.push(handle.metrics()),
                None => names.push((name, vec![handle.metrics()])),
            }
        }
        names
    }
}

/// Writes both kinds at each scrape.
#[derive(Debug)]
pub(super) struct Process(pub(super) Runtimes);

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> std::fmt::Result {
        Usage::now().encode(&mut encoder)?;
        runtimes(&self.0.by_name(), &mut encoder)
    }
}

/// What the kernel says of the process.
#[derive(Debug, Default, PartialEq)]
struct Usage {
    cpu_seconds: f64,
    started: f64,
    resident_bytes: u64,
    threads: u64,
    open_fds: u64,
    max_fds: u64,
}

impl Usage {
    fn now() -> Self {
        let read = |path| fs::read_to_string(path).unwrap_or_default();
        let stat = read("/proc/self/stat");
        let status = read("/proc/self/status");
        let boot: f64 = number(&read("/proc/stat"), "btime ").unwrap_or(0) as f64;
        Self {
            cpu_seconds: (ticks(&stat, 11) + ticks(&stat, 12)) / TICKS,
            started: boot + ticks(&stat, 19) / TICKS,
            resident_bytes: number(&status, "VmRSS:").unwrap_or(0) * 1024,
            threads: number(&status, "Threads:").unwrap_or(0),
            // The listing itself holds one open.
            open_fds: fs::read_dir("/proc/self/fd").map_or(0, |list| list.count().saturating_sub(1) as u64),
            max_fds: number(&read("/proc/self/limits"), "Max open files").unwrap_or(0),
        }
    }

    fn encode(&self, encoder: &mut DescriptorEncoder<'_>) -> std::fmt::Result {
        for (name, help, unit, kind, value) in [
            ("process_cpu", "CPU time", Some(&Unit::Seconds), Counter, self.cpu_seconds),
            ("process_start_time", "Since 1970", Some(&Unit::Seconds), Gauge, self.started),
            ("process_resident_memory", "Resident memory", Some(&Unit::Bytes), Gauge, self.resident_bytes as f64),
            ("process_threads", "Threads", None, Gauge, self.threads as f64),
            ("process_open_fds", "Open file descriptors", None, Gauge, self.open_fds as f64),
            ("process_max_fds", "The most file descriptors", None, Gauge, self.max_fds as f64),
        ] {
            write(encoder.encode_descriptor(name, help, unit, kind)?, kind, value)?;
        }
        Ok(())
    }
}

fn write(encoder: MetricEncoder<'_>, kind: MetricType, value: f64) -> std::fmt::Result {
    match kind {
        Counter => ConstCounter::new(value).encode(encoder),
        _ => ConstGauge::new(value).encode(encoder),
    }
}

/// The field of `/proc/self/stat` that stands `index` places behind the name, which may hold anything.
fn ticks(stat: &str, index: usize) -> f64 {
    let fields = stat.rsplit_once(") ").map_or("", |(_, fields)| fields);
    fields.split(' ').nth(index).and_then(|field| field.parse().ok()).unwrap_or(0.0)
}

/// The first number on the line that begins with `name`.
fn number(text: &str, name: &str) -> Option<u64> {
    let rest = text.lines().find_map(|line| line.strip_prefix(name))?;
    rest.split_whitespace().next()?.parse().ok()
}

type OfRuntime = fn(&RuntimeMetrics) -> f64;

/// What is told of each runtime.
const OF_RUNTIMES: [(&str, &str, Option<&Unit>, MetricType, OfRuntime); 5] = [
    ("tokio_runtime_workers", "Worker threads", None, Gauge, |metrics| metrics.num_workers() as f64),
    ("tokio_runtime_alive_tasks", "Tasks that live", None, Gauge, |metrics| metrics.num_alive_tasks() as f64),
    ("tokio_runtime_global_queue_depth", "Tasks that no worker has taken yet", None, Gauge, |metrics| {
        metrics.global_queue_depth() as f64
    }),
    ("tokio_runtime_worker_busy", "Time that workers were busy", Some(&Unit::Seconds), Counter, |metrics| {
        workers(metrics).map(|worker| metrics.worker_total_busy_duration(worker).as_secs_f64()).sum()
    }),
    ("tokio_runtime_park", "Times that a worker went to sleep", None, Counter, |metrics| {
        workers(metrics).map(|worker| metrics.worker_park_count(worker) as f64).sum()
    }),
];

fn workers(metrics: &RuntimeMetrics) -> std::ops::Range<usize> {
    0..metrics.num_workers()
}

fn runtimes(names: &[(&'static str, Vec<RuntimeMetrics>)], encoder: &mut DescriptorEncoder<'_>) -> std::fmt::Result {
    for (name, help, unit, kind, of) in OF_RUNTIMES {
        let mut family = encoder.encode_descriptor(name, help, unit, kind)?;
        for (runtime, metrics) in names {
            let value = metrics.iter().map(of).sum();
            write(family.encode_family(&[("runtime", *runtime)])?, kind, value)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use prometheus_client::encoding::text::encode;
    use prometheus_client::registry::Registry;

    use super::*;

    fn page(runtimes: Runtimes) -> String {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(Process(runtimes)));
        let mut page = String::new();
        encode(&mut page, &registry).unwrap();
        page
    }

    #[test]
    fn a_process_knows_itself() {
        let usage = Usage::now();
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs_f64();
        assert!(now - usage.started < 3600.0 && now + 2.0 > usage.started, "{usage:?}");
        assert!(usage.resident_bytes > 1 << 20 && usage.threads >= 1, "{usage:?}");
        assert!(usage.open_fds >= 3 && usage.max_fds >= usage.open_fds, "{usage:?}");
        assert!(usage.cpu_seconds < 600.0, "{usage:?}");
    }

    #[test]
    fn a_name_may_hold_anything() {
        let stat = "7 (a) b ( c) S 1 7 7 0 -1 4194560 100 0 0 0 250 50 0 0 20 0 5 0 12345 1 2";
        assert_eq!((ticks(stat, 11), ticks(stat, 12), ticks(stat, 19)), (250.0, 50.0, 12_345.0));
    }

    #[tokio::test]
    async fn a_runtime_is_told_once_by_its_name() {
        let runtimes = Runtimes::default();
        runtimes.on("requests");
        runtimes.on("requests");
        runtimes.add("requests");
        let page = page(runtimes);
        assert!(page.contains("\ntokio_runtime_workers{runtime=\"requests\"} 1.0\n"), "{page}");
        assert!(page.contains("\ntokio_runtime_worker_busy_seconds_total{runtime=\"requests\"} "), "{page}");
        assert!(page.contains("\nprocess_cpu_seconds_total "), "{page}");
    }
}
