//! How full the tables are that requests and policies fill.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

/// The metrics.
#[derive(Debug, Default)]
pub(super) struct Tables {
    entries: Family<TableLabels, Gauge>,
    room: Family<TableLabels, Gauge>,
}

/// One table, as it is now.
#[derive(Clone, Copy, Debug)]
pub struct Table {
    /// Its name.
    pub name: &'static str,
    /// What is in it.
    pub entries: usize,
    /// The most that it takes; `None` where it holds what policies and running requests name, and nothing else.
    pub room: Option<usize>,
}

impl Table {
    /// One that holds what policies and running requests name.
    pub fn named(name: &'static str, entries: usize) -> Self {
        Self { name, entries, room: None }
    }
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct TableLabels {
    table: &'static str,
}

impl Tables {
    pub(super) fn new(registry: &mut Registry) -> Self {
        let tables = Self::default();
        registry.register("table_entries", "What is in a table", tables.entries.clone());
        registry.register("table_room", "The most that a table takes", tables.room.clone());
        tables
    }

    /// Puts the sizes of a moment into the gauges.
    pub(super) fn show(&self, table: Table) {
        let (labels, gauge) = (TableLabels { table: table.name }, |size| i64::try_from(size).unwrap_or(i64::MAX));
        self.entries.get_or_create(&labels).set(gauge(table.entries));
        if let Some(room) = table.room {
            self.room.get_or_create(&labels).set(gauge(room));
        }
    }
}
