//! How the gateway was at every moment: memory, file handles, threads, and how full its tables were, by its own account.

use super::mix::Client;
use crate::{Failure, cpu, wire};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// Who looks.
pub struct Watch {
    pid: u32,
    admin: SocketAddr,
    every: Duration,
}

/// One look.
pub struct Sample {
    /// Seconds since the first one.
    pub at: f64,
    /// Resident memory in KiB.
    pub memory: f64,
    /// Open file handles.
    pub handles: f64,
    /// Threads.
    pub threads: f64,
    /// Lines of the page of metrics.
    pub lines: f64,
    /// Seconds of CPU since the start.
    pub cpu: f64,
    tables: BTreeMap<String, Table>,
}

/// How full a table is, and how full it may be, if there is an end to it.
#[derive(Clone, Copy, Default)]
pub struct Table {
    /// What is in it.
    pub entries: f64,
    /// The most that it takes.
    pub room: Option<f64>,
}

/// All looks, in their order.
#[derive(Default)]
pub struct Samples(pub Vec<Sample>);

/// So much of the time is warming up: tables fill, allocators find their size.
const WARM_UP: f64 = 0.25;

impl Watch {
    /// Looks at a gateway some hundred times in all.
    pub fn new(pid: u32, admin: SocketAddr, time: Duration) -> Self {
        Self { pid, admin, every: (time / 240).clamp(Duration::from_secs(1), Duration::from_secs(10)) }
    }

    /// Looks until `end`, and tells of it now and then.
    pub async fn until(&self, end: Instant, client: &Client) -> Result<Samples, Failure> {
        let (began, mut samples) = (Instant::now(), Samples::default());
        let mut told = began;
        while Instant::now() < end {
            samples.0.push(self.look(began).await?);
            if told.elapsed() > self.every * 5 {
                told = Instant::now();
                samples.tell(client);
            }
            tokio::time::sleep(self.every).await;
        }
        Ok(samples)
    }

    async fn look(&self, began: Instant) -> Result<Sample, Failure> {
        let page = wire::get(self.admin, "/metrics").await?;
        let count = |kind| fs::read_dir(format!("/proc/{}/{kind}", self.pid)).map(|files| files.count() as f64);
        Ok(Sample {
            at: began.elapsed().as_secs_f64(),
            memory: cpu::resident(self.pid)? as f64,
            handles: count("fd")?,
            threads: count("task")?,
            lines: page.lines().count() as f64,
            cpu: cpu::ticks(self.pid)?.as_secs_f64(),
            tables: tables(&page),
        })
    }
}

/// The tables on a page of metrics.
fn tables(page: &str) -> BTreeMap<String, Table> {
    let mut tables = BTreeMap::<String, Table>::new();
    for (name, value) in figures(page) {
        if let Some(table) = name.strip_prefix("infergate_table_entries{table=\"") {
            tables.entry(table.trim_end_matches("\"}").to_owned()).or_default().entries = value;
        } else if let Some(table) = name.strip_prefix("infergate_table_room{table=\"") {
            tables.entry(table.trim_end_matches("\"}").to_owned()).or_default().room = Some(value);
        }
    }
    let sum = |name| sum(page, name);
    let places = Table { entries: sum("infergate_journal_places_in_use"), room: Some(sum("infergate_journal_places")) };
    tables.insert("journal_places".to_owned(), places);
    for (table, name) in [
        ("bytes_of_bodies", "infergate_bodies_in_flight_bytes"),
        ("requests_in_flight", "infergate_requests_in_flight"),
    ] {
        tables.insert(table.to_owned(), Table { entries: sum(name), room: None });
    }
    tables
}

/// The sum of all series of a metric.
pub fn sum(page: &str, metric: &str) -> f64 {
    let of_it = |name: &str| name.strip_prefix(metric).is_some_and(|rest| rest.is_empty() || rest.starts_with('{'));
    figures(page).filter(|(name, _)| of_it(name)).map(|(_, value)| value).sum()
}

/// The names, with labels, and their values.
fn figures(page: &str) -> impl Iterator<Item = (&str, f64)> {
    let lines = page.lines().filter(|line| !line.starts_with('#'));
    lines.filter_map(|line| line.rsplit_once(' ')).filter_map(|(name, value)| Some((name, value.parse().ok()?)))
}

impl Samples {
    fn tell(&self, client: &Client) {
        let (Some(first), Some(last)) = (self.0.first(), self.0.last()) else { return };
        let tally = client.tally();
        let share = 100.0 * (last.cpu - first.cpu) / (last.at - first.at).max(0.1);
        eprintln!(
            "{:5.0} s: {:.1} MiB, {} handles, {} threads, {share:.0} % of a core, {} requests, {} errors, {} late",
            last.at,
            last.memory / 1024.0,
            last.handles,
            last.threads,
            tally.sent,
            tally.errors,
            tally.late
        );
        tally.first_errors.iter().take(1).for_each(|error| eprintln!("        {error}"));
    }

    /// The samples after the warm-up.
    pub fn warm(&self) -> &[Sample] {
        let end = self.0.last().map_or(0.0, |last| last.at);
        let first = self.0.partition_point(|sample| sample.at < end * WARM_UP);
        &self.0[first..]
    }

    /// The fullest that each table was, and the least room that it had.
    pub fn tables(&self) -> BTreeMap<&str, Table> {
        let mut fullest = BTreeMap::<&str, Table>::new();
        for (name, table) in self.0.iter().flat_map(|sample| &sample.tables) {
            let known = fullest.entry(name).or_default();
            known.entries = known.entries.max(table.entries);
            known.room = table.room;
        }
        fullest
    }

    /// The share of a core that it took.
    pub fn cores(&self) -> f64 {
        let (Some(first), Some(last)) = (self.0.first(), self.0.last()) else { return 0.0 };
        (last.cpu - first.cpu) / (last.at - first.at).max(0.1)
    }

    /// Everything, for scripts.
    pub fn json(&self) -> Value {
        let sample = |sample: &Sample| {
            let tables: BTreeMap<&str, f64> =
                sample.tables.iter().map(|(name, table)| (&**name, table.entries)).collect();
            json!({
                "at_s": sample.at, "memory_kib": sample.memory, "handles": sample.handles, "threads": sample.threads,
                "metric_lines": sample.lines, "cpu_s": sample.cpu, "tables": tables,
            })
        };
        self.0.iter().map(sample).collect()
    }
}

/// How a figure went along: the medians of its first and last quarter, and the line through all of it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Trend {
    /// The median of the first quarter.
    pub first: f64,
    /// The median of the last quarter.
    pub last: f64,
    /// How much it rises a minute, by least squares.
    pub slope: f64,
    /// The standard error of that.
    pub noise: f64,
}

impl Trend {
    /// The trend of one figure of these samples.
    pub fn of(samples: &[Sample], figure: impl Fn(&Sample) -> f64) -> Self {
        let points: Vec<(f64, f64)> = samples.iter().map(|sample| (sample.at / 60.0, figure(sample))).collect();
        let quarter = points.len().div_ceil(4);
        let (slope, noise) = line(&points);
        let first = median(points.iter().take(quarter));
        Self { first, last: median(points.iter().rev().take(quarter)), slope, noise }
    }

    /// How much higher the end is than the beginning.
    pub fn growth(&self) -> f64 {
        self.last - self.first
    }
}

fn median<'a>(points: impl Iterator<Item = &'a (f64, f64)>) -> f64 {
    let mut values: Vec<f64> = points.map(|(_, value)| *value).collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or_default()
}

/// The slope of the line through points by least squares, and its standard error.
fn line(points: &[(f64, f64)]) -> (f64, f64) {
    let count = points.len() as f64;
    let mean = |of: fn(&(f64, f64)) -> f64| points.iter().map(of).sum::<f64>() / count;
    let (x, y) = (mean(|point| point.0), mean(|point| point.1));
    let spread: f64 = points.iter().map(|point| (point.0 - x).powi(2)).sum();
    if points.len() < 3 || spread == 0.0 {
        return (0.0, f64::INFINITY);
    }
    let slope = points.iter().map(|point| (point.0 - x) * (point.1 - y)).sum::<f64>() / spread;
    let left: f64 = points.iter().map(|point| (point.1 - y - slope * (point.0 - x)).powi(2)).sum();
    (slope, (left / (count - 2.0) / spread).sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_found_in_the_noise_around_it() {
        let points: Vec<(f64, f64)> =
            (0..100).map(|x| (f64::from(x), 3.0 * f64::from(x) + f64::from(x * 37 % 11))).collect();
        let (slope, noise) = line(&points);
        assert!((slope - 3.0).abs() < 0.05 && noise < 0.05, "{slope} ± {noise}");
        assert_eq!(line(&[(1.0, 1.0), (1.0, 2.0), (1.0, 3.0)]).0, 0.0);
    }

    #[test]
    fn a_metric_is_summed_over_its_series_and_no_other_is() {
        let page = "# HELP a b\na{x=\"1\"} 2\na{x=\"2\"} 3\nab 9\na_total 9\ninfergate_table_entries{table=\"t\"} 5\ninfergate_table_room{table=\"t\"} 7\n";
        assert_eq!(sum(page, "a"), 5.0);
        let table = tables(page)["t"];
        assert_eq!((table.entries, table.room), (5.0, Some(7.0)));
    }
}
