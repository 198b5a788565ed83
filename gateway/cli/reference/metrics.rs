//! The metrics, as `/metrics` tells them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

use super::cell;
use crate::telemetry::Telemetry;

/// What a page says of one metric.
#[derive(Default)]
struct Metric<'a> {
    kind: &'a str,
    help: &'a str,
    labels: BTreeSet<&'a str>,
}

/// One table, by name.
pub(super) fn markdown() -> String {
    let page = Telemetry::shown();
    let mut out = "| metric | kind | labels | what it counts |\n|---|---|---|---|\n".to_owned();
    for (name, Metric { kind, help, labels }) in metrics(&page) {
        let name = if kind == "counter" { format!("{name}_total") } else { name.to_owned() };
        let labels: Vec<String> = labels.iter().map(|label| format!("`{label}`")).collect();
        let _ = writeln!(out, "| `{name}` | {kind} | {} | {} |", labels.join(", "), cell(help));
    }
    out.push('\n');
    out
}

fn metrics(page: &str) -> BTreeMap<&str, Metric<'_>> {
    let mut metrics: BTreeMap<&str, Metric<'_>> = BTreeMap::new();
    for line in page.lines() {
        let words = line.strip_prefix("# ").map(|told| told.splitn(3, ' ').collect::<Vec<_>>());
        match words.as_deref() {
            Some(["HELP", name, help]) => metrics.entry(name).or_default().help = help,
            Some(["TYPE", name, kind]) => metrics.entry(name).or_default().kind = kind,
            Some(_) => {}
            None => {
                let (name, labels) = series(line);
                let of = [name, name.rsplit_once('_').map_or(name, |(name, _)| name)];
                if let Some(known) = of.into_iter().find(|name| metrics.contains_key(name)) {
                    metrics.entry(known).or_default().labels.extend(labels);
                }
            }
        }
    }
    metrics
}

/// The name of a series and those of its labels, without the bounds of a histogram.
fn series(line: &str) -> (&str, Vec<&str>) {
    let (name, rest) = line.split_at(line.find(['{', ' ']).unwrap_or(line.len()));
    let labels = rest.strip_prefix('{').and_then(|rest| rest.split_once('}')).map_or("", |(labels, _)| labels);
    let names = labels.split(',').filter_map(|label| Some(label.split_once('=')?.0));
    (name, names.filter(|name| *name != "le").collect())
}
