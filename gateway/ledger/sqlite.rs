//! The ledger in an SQLite file, beside the journal: one writer, everything on disk before it counts.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::functions::{Aggregate, Context, FunctionFlags};
use rusqlite::types::ValueRef;
use rusqlite::{Connection, Error, ErrorCode, OpenFlags, Transaction, TransactionBehavior, params_from_iter};

use super::fold::{Batch, Row};
use super::{NUMBERS, Position, Spent, Store, Trouble, Value};
use crate::audit::private;

/// What the file says that it is: "IGLG".
const APPLICATION: i64 = 0x4947_4c47;
/// The version of the tables.
const VERSION: i64 = 2;
/// How long another process's transaction is waited for.
const BUSY: Duration = Duration::from_secs(5);

const TABLES: &str = "
CREATE TABLE infergate_ledger (pruned INTEGER NOT NULL);
INSERT INTO infergate_ledger VALUES (0);
CREATE TABLE infergate_positions (run TEXT PRIMARY KEY, next INTEGER NOT NULL, chain TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE infergate_sums (
    grain INTEGER NOT NULL, at INTEGER NOT NULL, tenant TEXT NOT NULL, model TEXT NOT NULL, principal TEXT NOT NULL,
    requests INTEGER NOT NULL, ok INTEGER NOT NULL, input_tokens INTEGER NOT NULL, output_tokens INTEGER NOT NULL,
    cached_tokens INTEGER NOT NULL, reasoning_tokens INTEGER NOT NULL, cost_nanousd INTEGER NOT NULL,
    unpriced INTEGER NOT NULL, estimated INTEGER NOT NULL, asked INTEGER NOT NULL,
    PRIMARY KEY (grain, at, tenant, model, principal)) WITHOUT ROWID;
CREATE TABLE infergate_requests (
    id TEXT PRIMARY KEY, at INTEGER NOT NULL, tenant TEXT NOT NULL, model TEXT NOT NULL, principal TEXT NOT NULL,
    used TEXT NOT NULL, outcome TEXT NOT NULL, status INTEGER NOT NULL, source TEXT NOT NULL, prices TEXT NOT NULL,
    input_tokens INTEGER NOT NULL, output_tokens INTEGER NOT NULL, cached_tokens INTEGER NOT NULL,
    reasoning_tokens INTEGER NOT NULL, cost_nanousd INTEGER NOT NULL, unpriced INTEGER NOT NULL) WITHOUT ROWID;
CREATE INDEX infergate_requests_at ON infergate_requests (at);
";

/// From the tables of version 1, which did not know how many requests an upstream was asked for.
const FROM_1: &str = "
ALTER TABLE infergate_sums ADD COLUMN asked INTEGER NOT NULL DEFAULT 0;
UPDATE infergate_sums SET asked = ok;
";

const MOVE: &str = "UPDATE infergate_positions SET next = ?1, chain = ?2 WHERE run = ?3 AND next = ?4 AND chain = ?5";

/// An open file.
pub(super) struct Sqlite {
    path: PathBuf,
    connection: Connection,
    /// The device and inode that were opened.
    opened: Option<(u64, u64)>,
    rows: bool,
    add: String,
}

impl Sqlite {
    /// Opens it to write, and makes it if it is not there.
    pub(super) fn open(path: &Path, rows: bool) -> Result<Self, Trouble> {
        let told = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
        if let Some(directory) = path.parent().filter(|directory| !directory.as_os_str().is_empty()) {
            private::directory(directory).map_err(|error| told(&error))?;
        }
        // SQLite gives its other files the permissions of this one.
        private::append(path).map_err(|error| told(&error))?;
        let sqlite = Self::connect(path, OpenFlags::SQLITE_OPEN_READ_WRITE, rows)?;
        sqlite.prepare().map_err(|error| sqlite.told(&error))?.map_err(|error| told(&error))?;
        Ok(sqlite)
    }

    /// Opens it to look at.
    pub(super) fn look(path: &Path) -> Result<Self, Trouble> {
        if !path.exists() {
            return Err(format!("{}: there is no such file: no gateway keeps its ledger here", path.display()));
        }
        let sqlite = Self::connect(path, OpenFlags::SQLITE_OPEN_READ_ONLY, false)?;
        sqlite.check().map_err(|error| sqlite.told(&error))??;
        Ok(sqlite)
    }

    fn connect(path: &Path, flags: OpenFlags, rows: bool) -> Result<Self, Trouble> {
        let connection = Connection::open_with_flags(path, flags | OpenFlags::SQLITE_OPEN_NO_MUTEX);
        let connection = connection.map_err(|error| told(path, &error))?;
        let function = FunctionFlags::SQLITE_UTF8 | FunctionFlags::SQLITE_DETERMINISTIC;
        let made = connection
            .busy_timeout(BUSY)
            .and_then(|()| connection.create_aggregate_function("saturating_sum", 1, function, SaturatingSum));
        made.map_err(|error| told(path, &error))?;
        let (path, opened) = (path.to_owned(), inode(path));
        Ok(Self { path, connection, opened, rows, add: add() })
    }

    fn told(&self, error: &Error) -> Trouble {
        told(&self.path, error)
    }

    /// Makes the tables in an empty file.
    fn prepare(&self) -> rusqlite::Result<Result<(), Trouble>> {
        self.connection.pragma_update(None, "journal_mode", "WAL")?;
        self.connection.pragma_update(None, "synchronous", "FULL")?;
        let transaction = Transaction::new_unchecked(&self.connection, TransactionBehavior::Immediate)?;
        let tables: i64 = transaction.query_row("SELECT COUNT(*) FROM sqlite_schema", [], |row| row.get(0))?;
        let version: i64 = transaction.pragma_query_value(None, "user_version", |row| row.get(0))?;
        match (tables, version) {
            (0, _) => transaction.execute_batch(TABLES)?,
            (_, 1) if self.is_ours()? => transaction.execute_batch(FROM_1)?,
            _ => return self.check(),
        }
        transaction.pragma_update(None, "application_id", APPLICATION)?;
        transaction.pragma_update(None, "user_version", VERSION)?;
        transaction.commit().map(Ok)
    }

    fn is_ours(&self) -> rusqlite::Result<bool> {
        self.connection.pragma_query_value(None, "application_id", |row| Ok(row.get::<_, i64>(0)? == APPLICATION))
    }

    /// Whether these are our tables.
    fn check(&self) -> rusqlite::Result<Result<(), Trouble>> {
        let pragma = |name| self.connection.pragma_query_value(None, name, |row| row.get::<_, i64>(0));
        let path = self.path.display();
        Ok(match (pragma("application_id")?, pragma("user_version")?) {
            (APPLICATION, VERSION) => Ok(()),
            (APPLICATION, version) => Err(format!(
                "{path}: version {version} of the tables is not known here: it was made by another version of Infergate"
            )),
            _ => Err(format!("{path}: this is another program's database: give the ledger another `path`")),
        })
    }

    fn add_all(&mut self, batch: &Batch) -> rusqlite::Result<bool> {
        let transaction = self.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        if batch.from == Position::start() {
            let begin = "INSERT INTO infergate_positions VALUES (?1, 1, '') ON CONFLICT DO NOTHING";
            transaction.execute(begin, [&batch.run])?;
        }
        let (from, to) = (&batch.from, &batch.to);
        let moved = transaction.execute(MOVE, (number(to.next), &to.chain, &batch.run, number(from.next), &from.chain));
        if moved? == 0 {
            return Ok(false);
        }
        let mut add = transaction.prepare_cached(&self.add)?;
        for (key, spent) in batch.sums() {
            let names = [Value::Text(key.tenant), Value::Text(key.model), Value::Text(key.principal)];
            let values = [Value::Number(key.grain), Value::Number(key.at)].into_iter().chain(names);
            add.execute(params_from_iter(values.chain(spent.numbers().map(|n| Value::Number(number(n))))))?;
        }
        drop(add);
        if self.rows {
            batch.rows.iter().flatten().try_for_each(|row| insert(&transaction, row))?;
        }
        transaction.commit().map(|()| true)
    }
}

fn told(path: &Path, error: &Error) -> Trouble {
    let damaged = matches!(error.sqlite_error_code(), Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase));
    let hint = if damaged { ". Move the file away: what the journal still has is folded into a new one" } else { "" };
    format!("{}: {error}{hint}", path.display())
}

/// Adds to a sum, or begins it.
fn add() -> String {
    let added =
        Spent::NAMES.map(|name| format!("{name} = min({name}, {} - excluded.{name}) + excluded.{name}", i64::MAX));
    let values: Vec<String> = (1..=5 + NUMBERS).map(|at| format!("?{at}")).collect();
    format!(
        "INSERT INTO infergate_sums VALUES ({}) ON CONFLICT (grain, at, tenant, model, principal) DO UPDATE SET {}",
        values.join(", "),
        added.join(", ")
    )
}

fn insert(transaction: &Transaction<'_>, row: &Row) -> rusqlite::Result<()> {
    let insert = "INSERT INTO infergate_requests VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16) \
                  ON CONFLICT DO NOTHING";
    let [_, _, input, output, cached, reasoning, cost, unpriced, ..] = row.spent.numbers().map(number);
    let names = (&row.tenant, &row.model, &row.principal, &row.used, &row.outcome);
    transaction.prepare_cached(insert)?.execute((
        &row.id,
        row.at,
        names.0,
        names.1,
        names.2,
        names.3,
        names.4,
        row.status,
        &row.source,
        &row.prices,
        input,
        output,
        cached,
        reasoning,
        cost,
        unpriced,
    ))?;
    Ok(())
}

/// All numbers of ours are bounded.
fn number(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

fn inode(path: &Path) -> Option<(u64, u64)> {
    fs::metadata(path).ok().map(|file| (file.dev(), file.ino()))
}

impl Store for Sqlite {
    fn position(&mut self, run: &str) -> Result<Position, Trouble> {
        let position = "SELECT next, chain FROM infergate_positions WHERE run = ?1";
        let found = self.connection.query_row(position, [run], |row| Ok((row.get::<_, i64>(0)?, row.get(1)?)));
        match found {
            Ok((next, chain)) => Ok(Position { next: next.max(1).unsigned_abs(), chain }),
            Err(Error::QueryReturnedNoRows) => Ok(Position::start()),
            Err(error) => Err(self.told(&error)),
        }
    }

    fn fold(&mut self, batch: &Batch) -> Result<bool, Trouble> {
        self.is_in_place()?;
        self.add_all(batch).map_err(|error| told(&self.path, &error))
    }

    fn prune(&mut self, minutes: i64, rows: Option<i64>) -> Result<(), Trouble> {
        let prune = || {
            let transaction = Transaction::new_unchecked(&self.connection, TransactionBehavior::Immediate)?;
            transaction.execute("DELETE FROM infergate_sums WHERE grain = 60 AND at < ?1", [minutes])?;
            transaction.execute("UPDATE infergate_ledger SET pruned = max(pruned, ?1)", [minutes])?;
            if let Some(rows) = rows {
                transaction
                    .execute("DELETE FROM infergate_requests WHERE at < ?1", [rows.saturating_mul(1_000_000)])?;
            }
            transaction.commit()
        };
        prune().map_err(|error: Error| self.told(&error))
    }

    fn is_in_place(&mut self) -> Result<(), Trouble> {
        match inode(&self.path) == self.opened {
            true => Ok(()),
            false => Err(format!("{}: the file was removed or replaced", self.path.display())),
        }
    }

    fn ask(&mut self, sql: &str, values: &[Value]) -> Result<Vec<Vec<Value>>, Trouble> {
        let ask = || {
            let mut statement = self.connection.prepare(sql)?;
            let columns = statement.column_count();
            let rows = statement.query_map(params_from_iter(values), |row| {
                (0..columns).map(|column| value(row.get_ref(column)?)).collect()
            })?;
            rows.collect::<rusqlite::Result<Vec<Vec<Value>>>>()
        };
        ask().map_err(|error: Error| self.told(&error))
    }

    fn sum(&self, column: &str) -> String {
        format!("saturating_sum({column})")
    }
}

fn value(value: ValueRef<'_>) -> rusqlite::Result<Value> {
    Ok(match value {
        ValueRef::Integer(number) => Value::Number(number),
        other => Value::Text(other.as_str()?.to_owned()),
    })
}

impl rusqlite::ToSql for Value {
    fn to_sql(&self) -> rusqlite::Result<rusqlite::types::ToSqlOutput<'_>> {
        match self {
            Self::Number(number) => number.to_sql(),
            Self::Text(text) => text.to_sql(),
        }
    }
}

/// SQLite's own sum is an error beyond 2⁶³ - 1.
struct SaturatingSum;

impl Aggregate<i64, i64> for SaturatingSum {
    fn init(&self, _: &mut Context<'_>) -> rusqlite::Result<i64> {
        Ok(0)
    }

    fn step(&self, context: &mut Context<'_>, sum: &mut i64) -> rusqlite::Result<()> {
        *sum = sum.saturating_add(context.get(0)?);
        Ok(())
    }

    fn finalize(&self, _: &mut Context<'_>, sum: Option<i64>) -> rusqlite::Result<i64> {
        Ok(sum.unwrap_or(0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::fold::tests::{batch_of, line};
    use crate::ledger::{Dimension, Query, Scope, report};

    fn total(sqlite: &mut Sqlite) -> Spent {
        report::made(sqlite, &Query::default()).unwrap().total
    }

    fn file() -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("l.sqlite3");
        (directory, path)
    }

    #[test]
    fn a_batch_counts_once_however_often_it_is_folded() {
        let (_directory, path) = file();
        let mut sqlite = Sqlite::open(&path, true).unwrap();
        let first = batch_of("r", Position::start(), 1..=3);
        assert_eq!(sqlite.fold(&first), Ok(true));
        assert_eq!(sqlite.fold(&first), Ok(false));
        let mut other = Sqlite::open(&path, true).unwrap();
        assert_eq!(other.fold(&first), Ok(false), "whoever folds it");
        assert_eq!(other.position("r"), Ok(first.to.clone()));
        let second = batch_of("r", first.to.clone(), 4..=4);
        assert_eq!([other.fold(&second), sqlite.fold(&second)], [Ok(true), Ok(false)]);
        let same_lines_of_another = batch_of("s", Position::start(), 1..=3);
        assert_eq!(sqlite.fold(&same_lines_of_another), Ok(true));
        assert_eq!(total(&mut sqlite).numbers(), [7, 7, 21, 28, 0, 0, 49, 0, 0, 0]);
        let rows = sqlite.ask("SELECT COUNT(*) FROM infergate_requests", &[]).unwrap();
        assert_eq!(rows, [[Value::Number(4)]], "ids are those of requests");
    }

    #[test]
    fn the_tables_of_the_version_before_are_taken_over_with_what_they_know() {
        let (_directory, path) = file();
        let first = batch_of("r", Position::start(), 1..=3);
        let mut sqlite = Sqlite::open(&path, true).unwrap();
        sqlite.fold(&first).unwrap();
        let before = "ALTER TABLE infergate_sums DROP COLUMN asked; PRAGMA user_version = 1";
        sqlite.connection.execute_batch(before).unwrap();
        assert!(Sqlite::look(&path).err().unwrap().contains("version 1"), "whoever only looks changes nothing");
        let mut sqlite = Sqlite::open(&path, true).unwrap();
        assert_eq!((total(&mut sqlite).asked, total(&mut sqlite).ok), (3, 3));
        assert_eq!(sqlite.fold(&batch_of("r", first.to, 4..=4)), Ok(true));
        assert_eq!(total(&mut sqlite).requests, 4);
    }

    #[test]
    fn position_and_sums_move_together_or_not_at_all_wherever_it_fails() {
        for table in ["infergate_positions", "infergate_sums", "infergate_requests"] {
            let (_directory, path) = file();
            let mut sqlite = Sqlite::open(&path, true).unwrap();
            let first = batch_of("r", Position::start(), 1..=1);
            sqlite.fold(&first).unwrap();
            let (act, when) = if table == "infergate_positions" { ("UPDATE", "AFTER") } else { ("INSERT", "BEFORE") };
            let trigger =
                format!("CREATE TRIGGER x {when} {act} ON {table} BEGIN SELECT RAISE(ABORT, 'by chance'); END");
            sqlite.connection.execute_batch(&trigger).unwrap();
            let second = batch_of("r", first.to.clone(), 2..=2);
            let told = sqlite.fold(&second).unwrap_err();
            assert!(told.contains("l.sqlite3: by chance"), "{told}");
            assert_eq!(sqlite.position("r"), Ok(first.to.clone()), "{table}");
            assert_eq!(total(&mut sqlite).requests, 1, "{table}");
            sqlite.connection.execute_batch("DROP TRIGGER x").unwrap();
            assert_eq!(sqlite.fold(&second), Ok(true));
            assert_eq!(total(&mut sqlite).requests, 2);
        }
    }

    #[test]
    fn sums_stop_at_their_bound_and_reports_still_come() {
        let (_directory, path) = file();
        let mut sqlite = Sqlite::open(&path, false).unwrap();
        for (run, tenant) in [("a", "t"), ("b", "t"), ("c", "u")] {
            let cost = serde_json::json!({"nanousd": i64::MAX, "prices": ""});
            let dear = serde_json::json!({"id": "x", "outcome": "ok", "tenant": tenant, "cost": cost});
            let mut batch = Batch::new(run, Position::start(), false);
            batch.add(&line(1, &dear)).unwrap();
            sqlite.fold(&batch).unwrap();
        }
        assert_eq!((total(&mut sqlite).cost.0, total(&mut sqlite).requests), (i64::MAX as u64, 3));
    }

    #[test]
    fn minutes_that_are_gone_leave_their_hours() {
        let (_directory, path) = file();
        let mut sqlite = Sqlite::open(&path, true).unwrap();
        sqlite.fold(&batch_of("r", Position::start(), 1..=2)).unwrap();
        // All records are of 14:03 on that day.
        let at = 1_795_356_180;
        let mut spent = |since: i64, until: i64| {
            let query = Query { since: since.unsigned_abs(), until: Some(until.unsigned_abs()), ..Query::default() };
            report::made(&mut sqlite, &query).unwrap().total.requests
        };
        assert_eq!([spent(at, at + 60), spent(at + 60, at + 120), spent(at - 60, at)], [2, 0, 0]);
        sqlite.prune(at + 3_600 - 180, Some(at + 3_600)).unwrap();
        let mut spent = |since: i64, until: i64| {
            let query = Query { since: since.unsigned_abs(), until: Some(until.unsigned_abs()), ..Query::default() };
            report::made(&mut sqlite, &query).unwrap().total.requests
        };
        assert_eq!([spent(at + 60, at + 120), spent(at + 3_600, at + 7_200)], [2, 0], "the whole hour, never less");
        assert_eq!(sqlite.ask("SELECT COUNT(*) FROM infergate_requests", &[]).unwrap(), [[Value::Number(0)]]);
    }

    #[test]
    fn reports_have_pages_that_join_without_a_gap() {
        let (_directory, path) = file();
        let mut sqlite = Sqlite::open(&path, false).unwrap();
        let names = ["", "a", "a'b", "b", "\u{4e2d}"];
        let mut batch = Batch::new("r", Position::start(), false);
        for (at, (tenant, model)) in names.iter().flat_map(|tenant| names.map(|model| (tenant, model))).enumerate() {
            let record = serde_json::json!({"id": "x", "outcome": "ok", "tenant": tenant, "model": {"route": model}});
            batch.add(&line(at as u64 + 1, &record)).unwrap();
        }
        sqlite.fold(&batch).unwrap();
        let by = vec![Dimension::Tenant, Dimension::Day, Dimension::Model];
        let mut query = Query { by, limit: Some(4), ..Query::default() };
        let mut keys = Vec::new();
        loop {
            let page = report::made(&mut sqlite, &query).unwrap();
            assert_eq!(page.total.requests, 25);
            keys.extend(page.rows.into_iter().map(|row| row.key));
            query.cursor = page.cursor;
            if query.cursor.is_none() {
                break;
            }
        }
        let expected: Vec<_> =
            names.iter().flat_map(|tenant| names.map(|model| [*tenant, "2026-11-22", model])).collect();
        assert_eq!(keys, expected);
        let scope =
            Scope { tenants: vec!["a'b".to_owned(), "b".to_owned()], models: vec!["a".to_owned()], ..Scope::default() };
        let of_two = report::made(&mut sqlite, &Query { scope, ..Query::default() }).unwrap();
        assert_eq!(of_two.total.requests, 2);
    }

    #[test]
    fn another_programs_file_and_a_damaged_one_are_told_and_left_alone() {
        let (_directory, path) = file();
        let other = Connection::open(&path).unwrap();
        other.execute_batch("CREATE TABLE theirs (x)").unwrap();
        let told = Sqlite::open(&path, false).err().unwrap();
        assert!(told.contains("another program's database"), "{told}");
        drop(other);
        std::fs::write(&path, "no database at all ".repeat(100)).unwrap();
        let told = Sqlite::open(&path, false).err().unwrap();
        assert!(told.contains("l.sqlite3: file is not a database. Move the file away"), "{told}");
        assert!(Sqlite::look(&path.with_extension("none")).err().unwrap().contains("there is no such file"));
    }

    #[test]
    fn the_file_is_its_owners_alone_and_one_that_was_removed_is_not_written_any_more() {
        use std::os::unix::fs::PermissionsExt;
        let (directory, path) = file();
        let mut sqlite = Sqlite::open(&path, false).unwrap();
        sqlite.fold(&batch_of("r", Position::start(), 1..=1)).unwrap();
        for entry in std::fs::read_dir(directory.path()).unwrap() {
            let entry = entry.unwrap();
            assert_eq!(entry.metadata().unwrap().permissions().mode() & 0o077, 0, "{:?}", entry.path());
        }
        std::fs::remove_file(&path).unwrap();
        assert!(sqlite.fold(&batch_of("s", Position::start(), 1..=1)).unwrap_err().contains("removed or replaced"));
    }
}
