//! The account of what was spent, folded from the journal: by minute, hour and day, by tenant, model and principal.
//!
//! Nothing is written here that does not stand in the journal, and where the journal is folded up to is stored in the
//! same transaction as the sums: after a crash the rest is folded again, and no nano-dollar is lost or counted twice.
//! One thread does it (`follow`); requests know nothing of it. The sums are in an SQLite file of the journal's
//! directory, or in a PostgreSQL that several gateways share.

pub(crate) mod facts;
mod fold;
mod follow;
mod postgres;
pub mod report;
mod sqlite;
mod tls;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use prometheus_client::metrics::gauge::Gauge;
use tokio::sync::watch;

use self::fold::Batch;
use self::follow::{Follower, Shared};
pub use self::report::{Dimension, Query, Report};
use crate::audit::journal::Journal;
use crate::money::NanoUsd;
use crate::settings;
use crate::telemetry::LedgerMeters;

/// The file's name in the journal's directory.
pub const FILE: &str = "ledger.sqlite3";

/// What a ledger answers to who asks it: what is wrong, and where.
type Trouble = String;

/// The ledger of this process.
#[derive(Debug)]
pub struct Ledger {
    place: Place,
    shared: Arc<Shared>,
    committed: watch::Receiver<u64>,
    lag: Gauge,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// Where a ledger is.
#[derive(Clone, Debug)]
pub enum Place {
    /// An SQLite file.
    File(PathBuf),
    /// A PostgreSQL server.
    Server(Box<postgres::Server>),
}

/// What of the ledger is meant. An empty list stands for everybody or everything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scope {
    /// The tenants, each by itself: who wants a whole branch of the tree names all of it.
    pub tenants: Vec<String>,
    /// The principals.
    pub principals: Vec<String>,
    /// The models, by the policy's names.
    pub models: Vec<String>,
}

/// What was spent. Sums stop at 2⁶³ - 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Spent {
    /// Requests that left a record.
    pub requests: u64,
    /// Those that were answered to their end.
    pub ok: u64,
    /// Tokens of prompts, as the records have them.
    pub input_tokens: u64,
    /// Tokens of answers.
    pub output_tokens: u64,
    /// Tokens of prompts that were in a cache.
    pub cached_tokens: u64,
    /// Tokens of answers that were spent on reasoning.
    pub reasoning_tokens: u64,
    /// What it cost.
    pub cost: NanoUsd,
    /// Requests that used something without a price: their cost is not in the sum.
    pub unpriced: u64,
    /// Requests whose tokens nobody reported, so that they were counted or estimated.
    pub estimated: u64,
    /// Requests that an upstream was asked for.
    pub asked: u64,
}

/// How many numbers there are.
pub const NUMBERS: usize = 10;

impl Spent {
    /// The names of the numbers, in their order, as the tables have them.
    pub const NAMES: [&str; NUMBERS] = [
        "requests",
        "ok",
        "input_tokens",
        "output_tokens",
        "cached_tokens",
        "reasoning_tokens",
        "cost_nanousd",
        "unpriced",
        "estimated",
        "asked",
    ];

    /// The numbers, in the order of their names.
    pub fn numbers(&self) -> [u64; NUMBERS] {
        [
            self.requests,
            self.ok,
            self.input_tokens,
            self.output_tokens,
            self.cached_tokens,
            self.reasoning_tokens,
            self.cost.0,
            self.unpriced,
            self.estimated,
            self.asked,
        ]
    }

    fn of([requests, ok, input, output, cached, reasoning, cost, unpriced, estimated, asked]: [u64; NUMBERS]) -> Self {
        Self {
            requests,
            ok,
            input_tokens: input,
            output_tokens: output,
            cached_tokens: cached,
            reasoning_tokens: reasoning,
            cost: NanoUsd(cost),
            unpriced,
            estimated,
            asked,
        }
    }

    /// Both together.
    pub fn plus(&self, other: &Self) -> Self {
        let (mut sums, others) = (self.numbers(), other.numbers());
        sums.iter_mut().zip(others).for_each(|(sum, number)| *sum = bounded(sum.saturating_add(number)));
        Self::of(sums)
    }
}

/// Whether `url` can stand in the settings.
pub fn check_url(url: &str) -> Result<(), String> {
    postgres::Server::check(url)
}

/// What a table's signed 64 bits can hold.
fn bounded(number: u64) -> u64 {
    number.min(i64::MAX as u64)
}

/// How far a run of the journal is folded.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Position {
    /// The next line.
    next: u64,
    /// The chain of the line before: no other run of this name has it. Empty if nothing is folded yet.
    chain: String,
}

impl Position {
    fn start() -> Self {
        Self { next: 1, chain: String::new() }
    }
}

/// What goes into a table, or comes out of it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Value {
    Number(i64),
    Text(String),
}

/// A ledger's tables, opened.
trait Store {
    /// Where a run is folded up to.
    fn position(&mut self, run: &str) -> Result<Position, Trouble>;

    /// Adds a batch and moves the run's position behind it, both or neither. `false`: the position is not where the
    /// batch begins, and nothing was added.
    fn fold(&mut self, batch: &Batch) -> Result<bool, Trouble>;

    /// Removes minutes before one time, rows of requests before another, in seconds since 1970.
    fn prune(&mut self, minutes: i64, rows: Option<i64>) -> Result<(), Trouble>;

    /// Whether these are still the tables that everybody else would open.
    fn is_in_place(&mut self) -> Result<(), Trouble>;

    /// Asks.
    fn ask(&mut self, sql: &str, values: &[Value]) -> Result<Vec<Vec<Value>>, Trouble>;

    /// A column's sum that stops at 2⁶³ - 1, spelt for this store.
    fn sum(&self, column: &str) -> String;
}

impl Place {
    /// Where the settings say that the ledger is. `journal` is the journal's directory.
    pub fn of(settings: &settings::Settings, journal: Option<&Path>) -> Result<Self, String> {
        let (ledger, env) = (&settings.ledger, |name: &str| std::env::var(name).ok());
        let wrong = |error: String| format!("the ledger: {error}");
        if let Some(url) = &ledger.url {
            let password = ledger.password.as_ref().map(|source| crate::secret::read(source, &env));
            let password = password.transpose().map_err(wrong)?;
            let server = postgres::Server::new(url, password.as_ref(), settings.ca_file.as_deref()).map_err(wrong)?;
            return Ok(Self::Server(Box::new(server)));
        }
        match (&ledger.path, journal) {
            (Some(path), _) => Ok(Self::File(path.clone())),
            (None, Some(journal)) => Ok(Self::File(journal.join(FILE))),
            (None, None) => Err(wrong("without a journal it has no place: give it a `path`".to_owned())),
        }
    }

    /// A path, or the URL of a PostgreSQL server, as somebody at a terminal names it.
    pub fn named(text: &str) -> Result<Self, String> {
        match text.starts_with("postgres://") || text.starts_with("postgresql://") {
            true => Ok(Self::Server(Box::new(postgres::Server::given(text)?))),
            false => Ok(Self::File(PathBuf::from(text))),
        }
    }

    /// Opens it to write; what is not there yet is made.
    fn open(&self, rows: bool) -> Result<Box<dyn Store>, Trouble> {
        Ok(match self {
            Self::File(path) => Box::new(sqlite::Sqlite::open(path, rows)?),
            Self::Server(server) => Box::new(postgres::Postgres::open(server, rows)?),
        })
    }

    /// Opens it to ask what is in it. On a thread that may block.
    pub fn reader(&self) -> Result<Reader, String> {
        Ok(Reader(match self {
            Self::File(path) => Box::new(sqlite::Sqlite::look(path)?),
            Self::Server(server) => Box::new(postgres::Postgres::look(server)?),
        }))
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => path.display().fmt(f),
            Self::Server(server) => server.fmt(f),
        }
    }
}

/// A ledger that can be asked. It keeps one connection, so many questions are best asked of one reader. It blocks its
/// thread: never on one that serves requests.
pub struct Reader(Box<dyn Store>);

impl Reader {
    /// What was spent within `scope` since `since` and before `until`, both in seconds since 1970; without `until`,
    /// everything since. A request belongs to the minute in which its head had been read.
    ///
    /// Both ends should be whole minutes: `since` counts from its minute's beginning, `until` to its minute's end.
    /// Where the minutes of an end have been removed already (`ledger.keep_minutes_days`) the whole hour counts, so
    /// that never less is told than was spent.
    pub fn spent(&mut self, scope: &Scope, since: u64, until: Option<u64>) -> Result<Spent, String> {
        let query = Query { by: Vec::new(), scope: scope.clone(), since, until, limit: None, cursor: None };
        Ok(self.report(&query)?.total)
    }

    /// A table of what was spent.
    pub fn report(&mut self, query: &Query) -> Result<Report, String> {
        report::made(self.0.as_mut(), query)
    }
}

impl Ledger {
    /// Begins to fold `journal` on a thread of its own. It always begins: a ledger that cannot be opened is tried
    /// again, and the journal waits for it.
    pub fn start(
        place: Place,
        settings: &settings::Ledger,
        journal: &Journal,
        meters: LedgerMeters,
    ) -> Result<Arc<Self>, String> {
        let feed = journal.feed_ledger(settings.rows == settings::Rows::None);
        let shared = Arc::new(Shared::default());
        let (committed, lag) = (journal.committed(), meters.lag.clone());
        let follower = Follower::new(place.clone(), settings, journal, feed, meters, shared.clone());
        let thread = std::thread::Builder::new().name("ledger".to_owned()).spawn(move || follower.run());
        let thread = thread.map_err(|error| format!("the ledger has no thread: {error}"))?;
        Ok(Arc::new(Self { place, shared, committed, lag, thread: Mutex::new(Some(thread)) }))
    }

    /// Where it is.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// Sets the metric of what is still to be folded: a reader of metrics wants to know what is so now, not what was
    /// when a batch was done.
    pub fn measure(&self) {
        let committed = *self.committed.borrow();
        self.lag.set(i64::try_from(self.shared.lag(committed)).unwrap_or(i64::MAX));
    }

    /// Waits until everything is folded that is on the journal's disk now: what this process wrote, and what dead
    /// ones left. Blocks its thread, until `deadline` at most; the error then says what stands in the way.
    pub fn catch_up(&self, deadline: Instant) -> Result<(), String> {
        let target = *self.committed.borrow();
        self.shared.folded(target, deadline).map_err(|why| format!("the ledger in {}: {why}", self.place))
    }

    /// What was spent within `scope`, as [`Reader::spent`] tells it. What is not folded yet is not in it: to restore
    /// budgets at the start, call [`Ledger::catch_up`] first. Opens the ledger; who has many questions takes a
    /// [`Place::reader`]. Blocks its thread.
    pub fn spent(&self, scope: &Scope, since: u64, until: Option<u64>) -> Result<Spent, String> {
        self.place.reader()?.spent(scope, since, until)
    }

    /// Folds what the journal still has, `within` this time at most, and ends the thread. What is left then, the next
    /// process folds.
    pub fn close(&self, within: Duration) {
        let Some(thread) = self.thread.lock().take() else { return };
        let deadline = Instant::now() + within;
        if let Err(error) = self.catch_up(deadline) {
            tracing::warn!(%error, "the process ends before the ledger has everything: the next one folds the rest");
        }
        self.shared.stop();
        // One that waits for a server is left to itself: what it does is done whole or not at all.
        while !thread.is_finished() && Instant::now() < deadline {
            std::thread::park_timeout(Duration::from_millis(1));
        }
    }
}
