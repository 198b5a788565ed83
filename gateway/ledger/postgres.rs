//! The ledger in PostgreSQL, for several gateways: each folds its own journal, all into the same sums.
//!
//! Every statement of a batch waits for the one before, and the first one moves the position: a transaction whose
//! end we did not hear of has either moved it or has added nothing.

use std::fmt;
use std::future::Future;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustls::ClientConfig;
use tokio::runtime::{Builder, Runtime};
use tokio_postgres::config::{Host, SslMode};
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Client, Config, NoTls, Transaction};

use super::fold::Batch;
use super::tls::Secured;
use super::{NUMBERS, Position, Spent, Store, Trouble, Value};
use crate::egress::Egress;
use crate::secret::Secret;

/// The version of the tables.
const VERSION: i64 = 2;
/// Until a connection stands.
const CONNECT: Duration = Duration::from_secs(5);
/// The longest that an answer is waited for.
const ANSWER: Duration = Duration::from_secs(15);
/// What the server does if we are gone, or another one's transaction stands in the way: it must never be for long.
const LIMITS: &str = "SET LOCAL statement_timeout = '10s'; SET LOCAL lock_timeout = '5s'; \
                      SET LOCAL idle_in_transaction_session_timeout = '10s'; SET LOCAL synchronous_commit = on";
/// One at a time makes the tables.
const LOCK: &str = "SELECT pg_advisory_xact_lock(7954886271103442771)";

const TABLES: &str = r#"
CREATE TABLE infergate_ledger (version BIGINT NOT NULL, pruned BIGINT NOT NULL);
INSERT INTO infergate_ledger VALUES (2, 0);
CREATE TABLE infergate_positions (run TEXT PRIMARY KEY, next BIGINT NOT NULL, chain TEXT NOT NULL);
CREATE TABLE infergate_sums (
    grain BIGINT NOT NULL, at BIGINT NOT NULL, tenant TEXT COLLATE "C" NOT NULL, model TEXT COLLATE "C" NOT NULL,
    principal TEXT COLLATE "C" NOT NULL, requests BIGINT NOT NULL, ok BIGINT NOT NULL, input_tokens BIGINT NOT NULL,
    output_tokens BIGINT NOT NULL, cached_tokens BIGINT NOT NULL, reasoning_tokens BIGINT NOT NULL,
    cost_nanousd BIGINT NOT NULL, unpriced BIGINT NOT NULL, estimated BIGINT NOT NULL, asked BIGINT NOT NULL,
    PRIMARY KEY (grain, at, tenant, model, principal)) WITH (fillfactor = 70);
CREATE TABLE infergate_requests (
    id TEXT PRIMARY KEY, at BIGINT NOT NULL, tenant TEXT NOT NULL, model TEXT NOT NULL, principal TEXT NOT NULL,
    used TEXT NOT NULL, outcome TEXT NOT NULL, status BIGINT NOT NULL, source TEXT NOT NULL, prices TEXT NOT NULL,
    input_tokens BIGINT NOT NULL, output_tokens BIGINT NOT NULL, cached_tokens BIGINT NOT NULL,
    reasoning_tokens BIGINT NOT NULL, cost_nanousd BIGINT NOT NULL, unpriced BIGINT NOT NULL);
CREATE INDEX infergate_requests_at ON infergate_requests (at);
"#;

/// From the tables of version 1, which did not know how many requests an upstream was asked for.
const FROM_1: &str = "
ALTER TABLE infergate_sums ADD COLUMN asked BIGINT NOT NULL DEFAULT 0;
UPDATE infergate_sums SET asked = ok;
UPDATE infergate_ledger SET version = 2;
";

const BEGIN: &str = "INSERT INTO infergate_positions VALUES ($1, 1, '') ON CONFLICT DO NOTHING";
const MOVE: &str = "UPDATE infergate_positions SET next = $1, chain = $2 WHERE run = $3 AND next = $4 AND chain = $5";
const ROWS: &str = "INSERT INTO infergate_requests SELECT * FROM unnest($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, \
                    $12, $13, $14, $15, $16) ON CONFLICT DO NOTHING";

/// Where a server is, and as whom we come.
#[derive(Clone)]
pub struct Server {
    config: Config,
    /// Absent for a connection that does not leave the machine.
    tls: Option<Arc<ClientConfig>>,
}

impl Server {
    /// From the settings. The URL has no password: that is a secret of its own.
    pub(super) fn new(url: &str, password: Option<&Secret>, ca_file: Option<&Path>) -> Result<Self, String> {
        Self::check(url)?;
        let mut config = parsed(url)?;
        if let Some(password) = password {
            config.password(password.reveal());
        }
        Self::reached(config, url, ca_file)
    }

    /// Whether a URL can stand in the settings.
    pub(super) fn check(url: &str) -> Result<(), String> {
        match parsed(url)?.get_password() {
            Some(_) => Err("there is a password in `url`: give it as `password`".to_owned()),
            None => Ok(()),
        }
    }

    /// From a terminal: the password may be in the URL or in the environment, as `psql` has it.
    pub(super) fn given(url: &str) -> Result<Self, String> {
        let mut config = parsed(url)?;
        if let (None, Ok(password)) = (config.get_password(), std::env::var("PGPASSWORD")) {
            config.password(password);
        }
        Self::reached(config, url, None)
    }

    /// TLS, unless the connection stays on this machine or the URL says otherwise.
    fn reached(mut config: Config, url: &str, ca_file: Option<&Path>) -> Result<Self, String> {
        config.connect_timeout(CONNECT).application_name("infergate");
        let here = config.get_hosts().iter().all(is_here) && !url.contains("sslmode=require");
        let plain = here || url.contains("sslmode=disable");
        let tls = match plain {
            true => None,
            false => Some(Arc::new(Egress::new(ca_file)?.tls())),
        };
        config.ssl_mode(if plain { SslMode::Disable } else { SslMode::Require });
        Ok(Self { config, tls })
    }

    async fn connect(&self) -> Result<Client, tokio_postgres::Error> {
        // Dropped with the runtime: it ends when the client is gone, and says by the client what went wrong.
        match &self.tls {
            Some(tls) => {
                let (client, connection) = self.config.connect(Secured::new(tls.clone())).await?;
                drop(tokio::spawn(connection));
                Ok(client)
            }
            None => {
                let (client, connection) = self.config.connect(NoTls).await?;
                drop(tokio::spawn(connection));
                Ok(client)
            }
        }
    }
}

/// Whether a URL names a PostgreSQL server; the error shows nothing of it, there may be a password in it.
fn parsed(url: &str) -> Result<Config, String> {
    let config: Config =
        url.parse().map_err(|error| format!("this is no URL like postgres://user@host:5432/database: {error}"))?;
    match config.get_hosts().is_empty() {
        true => Err("the URL names no server: postgres://user@host:5432/database".to_owned()),
        false => Ok(config),
    }
}

fn is_here(host: &Host) -> bool {
    match host {
        Host::Tcp(name) => name == "localhost" || name.parse::<IpAddr>().is_ok_and(|address| address.is_loopback()),
        Host::Unix(_) => true,
    }
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let host = match self.config.get_hosts().first() {
            Some(Host::Tcp(name)) => name.clone(),
            Some(Host::Unix(path)) => path.display().to_string(),
            None => String::new(),
        };
        let port = self.config.get_ports().first().map(|port| format!(":{port}")).unwrap_or_default();
        write!(f, "PostgreSQL at {host}{port}, database {}", self.config.get_dbname().unwrap_or("of the user's name"))
    }
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A connection. Its runtime is its own: whoever uses it waits.
pub(super) struct Postgres {
    client: Client,
    runtime: Runtime,
    rows: bool,
    add: String,
    shown: String,
}

impl Postgres {
    /// Connects to write, and makes the tables if they are not there.
    pub(super) fn open(server: &Server, rows: bool) -> Result<Self, Trouble> {
        let mut postgres = Self::connect(server, rows)?;
        postgres.run(async |client| {
            let transaction = begin(client).await?;
            transaction.batch_execute(LOCK).await?;
            // Who may not make tables may still use those that are there.
            match version(&transaction).await? {
                None => transaction.batch_execute(TABLES).await?,
                Some(1) => transaction.batch_execute(FROM_1).await?,
                Some(_) => {}
            }
            transaction.commit().await
        })?;
        postgres.check()?;
        Ok(postgres)
    }

    /// Connects to look at what is there.
    pub(super) fn look(server: &Server) -> Result<Self, Trouble> {
        let mut postgres = Self::connect(server, false)?;
        let there = postgres.run(async |client| exists(&client.transaction().await?).await)?;
        if !there {
            return Err(format!("{}: there is no ledger: no gateway has written to it", postgres.shown));
        }
        postgres.check()?;
        Ok(postgres)
    }

    fn connect(server: &Server, rows: bool) -> Result<Self, Trouble> {
        let shown = server.to_string();
        let runtime = Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|error| format!("{shown}: {error}"))?;
        let connected = runtime.block_on(within(CONNECT * 2, server.connect()));
        let client = connected.map_err(|why| format!("{shown}: {why}"))?;
        Ok(Self { client, runtime, rows, add: add(), shown })
    }

    fn check(&mut self) -> Result<(), Trouble> {
        let version = "SELECT version FROM infergate_ledger";
        let found = self.ask(version, &[])?;
        match found.first().and_then(|row| row.first()) {
            Some(Value::Number(VERSION)) => Ok(()),
            other => Err(format!(
                "{}: version {other:?} of the tables is not known here: they were made by another version of Infergate",
                self.shown
            )),
        }
    }

    /// Does something and waits for it, but not for ever.
    fn run<T>(
        &mut self,
        work: impl AsyncFnOnce(&mut Client) -> Result<T, tokio_postgres::Error>,
    ) -> Result<T, Trouble> {
        let done = self.runtime.block_on(within(ANSWER, work(&mut self.client)));
        done.map_err(|why| format!("{}: {why}", self.shown))
    }
}

async fn within<T>(time: Duration, work: impl Future<Output = Result<T, tokio_postgres::Error>>) -> Result<T, String> {
    match tokio::time::timeout(time, work).await {
        Ok(done) => done.map_err(|error| plain(&error)),
        Err(_) => Err(format!("no answer within {} s", time.as_secs())),
    }
}

/// What went wrong, with what the server says of it.
fn plain(error: &tokio_postgres::Error) -> String {
    match (error.as_db_error(), std::error::Error::source(error)) {
        (Some(said), _) => format!("{} ({})", said.message(), said.code().code()),
        (None, Some(source)) => format!("{error}: {source}"),
        (None, None) => error.to_string(),
    }
}

async fn begin(client: &mut Client) -> Result<Transaction<'_>, tokio_postgres::Error> {
    let transaction = client.transaction().await?;
    transaction.batch_execute(LIMITS).await?;
    Ok(transaction)
}

async fn exists(transaction: &Transaction<'_>) -> Result<bool, tokio_postgres::Error> {
    let there = "SELECT to_regclass('infergate_ledger') IS NOT NULL";
    Ok(transaction.query_typed_one(there, &[]).await?.get(0))
}

/// The version of the tables, where there are any.
async fn version(transaction: &Transaction<'_>) -> Result<Option<i64>, tokio_postgres::Error> {
    if !exists(transaction).await? {
        return Ok(None);
    }
    let found = transaction.query_typed_opt("SELECT version FROM infergate_ledger", &[]).await?;
    Ok(found.map(|row| row.get(0)))
}

/// Adds to sums, or begins them.
fn add() -> String {
    let added =
        Spent::NAMES.map(|name| format!("{name} = LEAST(s.{name}, {} - excluded.{name}) + excluded.{name}", i64::MAX));
    let columns: Vec<String> = (1..=5 + NUMBERS).map(|at| format!("${at}")).collect();
    format!(
        "INSERT INTO infergate_sums AS s SELECT * FROM unnest({}) ON CONFLICT (grain, at, tenant, model, principal) \
         DO UPDATE SET {}",
        columns.join(", "),
        added.join(", ")
    )
}

/// Adds a batch. Every step waits for the one before: see the top.
async fn fold(client: &mut Client, batch: &Batch, add: &str) -> Result<bool, tokio_postgres::Error> {
    let transaction = begin(client).await?;
    if batch.from == Position::start() {
        transaction.execute_typed(BEGIN, &[(&batch.run, Type::TEXT)]).await?;
    }
    let (next, from) = (number(batch.to.next), number(batch.from.next));
    let values: [(&(dyn ToSql + Sync), Type); 5] = [
        (&next, Type::INT8),
        (&batch.to.chain, Type::TEXT),
        (&batch.run, Type::TEXT),
        (&from, Type::INT8),
        (&batch.from.chain, Type::TEXT),
    ];
    if transaction.execute_typed(MOVE, &values).await? == 0 {
        return Ok(false);
    }
    let sums = Columns::<2, 3, NUMBERS>::of(batch.sums().into_iter().map(|(key, spent)| {
        ([key.grain, key.at], [key.tenant, key.model, key.principal], spent.numbers().map(number))
    }));
    transaction.execute_typed(add, &sums.values([0, 1])).await?;
    if let Some(rows) = batch.rows.as_ref().filter(|rows| !rows.is_empty()) {
        let rows = Columns::<2, 8, 6>::of(rows.iter().map(|row| {
            let [_, _, input, output, cached, reasoning, cost, unpriced, ..] = row.spent.numbers().map(number);
            let texts =
                [&row.id, &row.tenant, &row.model, &row.principal, &row.used, &row.outcome, &row.source, &row.prices];
            ([row.at, row.status], texts.map(Clone::clone), [input, output, cached, reasoning, cost, unpriced])
        }));
        transaction.execute_typed(ROWS, &rows.values([1, 7])).await?;
    }
    transaction.commit().await.map(|()| true)
}

/// A table's columns, for `unnest`: numbers that stand among the texts, texts, and numbers behind them.
struct Columns<const A: usize, const B: usize, const C: usize> {
    first: [Vec<i64>; A],
    texts: [Vec<String>; B],
    last: [Vec<i64>; C],
}

impl<const A: usize, const B: usize, const C: usize> Columns<A, B, C> {
    fn of(rows: impl Iterator<Item = ([i64; A], [String; B], [i64; C])>) -> Self {
        let mut columns = Self {
            first: std::array::from_fn(|_| Vec::new()),
            texts: std::array::from_fn(|_| Vec::new()),
            last: std::array::from_fn(|_| Vec::new()),
        };
        for (first, texts, last) in rows {
            columns.first.iter_mut().zip(first).for_each(|(column, value)| column.push(value));
            columns.texts.iter_mut().zip(texts).for_each(|(column, value)| column.push(value));
            columns.last.iter_mut().zip(last).for_each(|(column, value)| column.push(value));
        }
        columns
    }

    /// The columns in their order; `places` says where the first numbers stand.
    fn values(&self, places: [usize; A]) -> Vec<(&(dyn ToSql + Sync), Type)> {
        let texts = self.texts.iter().map(|column| (column as &(dyn ToSql + Sync), Type::TEXT_ARRAY));
        let last = self.last.iter().map(|column| (column as &(dyn ToSql + Sync), Type::INT8_ARRAY));
        let mut values: Vec<_> = texts.chain(last).collect();
        for (place, column) in places.into_iter().zip(&self.first) {
            values.insert(place, (column, Type::INT8_ARRAY));
        }
        values
    }
}

/// All numbers of ours are bounded.
fn number(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

impl Store for Postgres {
    fn position(&mut self, run: &str) -> Result<Position, Trouble> {
        let position = "SELECT next, chain FROM infergate_positions WHERE run = $1";
        let found = self.run(async |client| client.query_typed_opt(position, &[(&run, Type::TEXT)]).await)?;
        Ok(found.map_or_else(Position::start, |row| Position {
            next: row.get::<_, i64>(0).max(1).unsigned_abs(),
            chain: row.get(1),
        }))
    }

    fn fold(&mut self, batch: &Batch) -> Result<bool, Trouble> {
        let (add, rows) = (self.add.clone(), self.rows);
        debug_assert_eq!(rows, batch.rows.is_some(), "a batch is made for the store that it goes to");
        self.run(async |client| fold(client, batch, &add).await)
    }

    fn prune(&mut self, minutes: i64, rows: Option<i64>) -> Result<(), Trouble> {
        self.run(async |client| {
            let transaction = begin(client).await?;
            let before = [(&minutes as &(dyn ToSql + Sync), Type::INT8)];
            transaction.execute_typed("DELETE FROM infergate_sums WHERE grain = 60 AND at < $1", &before).await?;
            let pruned = "UPDATE infergate_ledger SET pruned = $1 WHERE pruned < $1";
            transaction.execute_typed(pruned, &before).await?;
            if let Some(rows) = rows {
                let before = rows.saturating_mul(1_000_000);
                let delete = "DELETE FROM infergate_requests WHERE at < $1";
                transaction.execute_typed(delete, &[(&before, Type::INT8)]).await?;
            }
            transaction.commit().await
        })
    }

    fn is_in_place(&mut self) -> Result<(), Trouble> {
        // Tables that were dropped fail the next batch.
        Ok(())
    }

    fn ask(&mut self, sql: &str, values: &[Value]) -> Result<Vec<Vec<Value>>, Trouble> {
        let values: Vec<(&(dyn ToSql + Sync), Type)> = values
            .iter()
            .map(|value| match value {
                Value::Number(number) => (number as &(dyn ToSql + Sync), Type::INT8),
                Value::Text(text) => (text as &(dyn ToSql + Sync), Type::TEXT),
            })
            .collect();
        let rows = self.run(async |client| client.query_typed(sql, &values).await)?;
        Ok(rows.iter().map(|row| (0..row.len()).map(|column| value(row, column)).collect()).collect())
    }

    fn sum(&self, column: &str) -> String {
        format!("LEAST(COALESCE(SUM({column}), 0), {})::bigint", i64::MAX)
    }
}

/// Ours are numbers and texts alone.
fn value(row: &tokio_postgres::Row, column: usize) -> Value {
    match row.columns()[column].type_() == &Type::INT8 {
        true => Value::Number(row.get(column)),
        false => Value::Text(row.get(column)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_that_leaves_the_machine_is_secured_and_nothing_shows_a_password() {
        let _already_there = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let server = |url: &str| Server::new(url, Some(&Secret::new("canary")), None);
        let away = server("postgres://u@db.example:5432/ledger").unwrap();
        assert!(away.tls.is_some() && away.config.get_ssl_mode() == SslMode::Require);
        for here in [
            "postgres://u@127.0.0.1/l",
            "postgres://u@localhost/l",
            "postgres://u@[::1]/l",
            "postgres:///l?host=/run/pg",
        ] {
            assert!(server(here).unwrap().tls.is_none(), "{here}");
        }
        assert!(
            server("postgres://u@127.0.0.1/l?sslmode=require").unwrap().tls.is_some(),
            "whoever asks for it has it"
        );
        assert_eq!(format!("{away:?}"), "PostgreSQL at db.example:5432, database ledger");
        let told = server("postgres://u:canary@db.example/ledger").unwrap_err();
        assert!(told.contains("give it as `password`") && !told.contains("canary"), "{told}");
        let told = server("postgres://u:canary@db.example/ledger?nonsense=1").unwrap_err();
        assert!(!told.contains("canary"), "{told}");
    }
}
