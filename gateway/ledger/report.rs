//! What was spent, asked by whom and for what: from the coarsest sums that fit.

use serde_json::{Map, json};

use super::fold::{GRAINS, begin};
use super::{Scope, Spent, Store, Trouble, Value};
use crate::hex;
use crate::time::Stamp;

/// What a report is by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dimension {
    /// Who pays.
    Tenant,
    /// The model, by the policy's name.
    Model,
    /// Who asked.
    Principal,
    /// The day, in UTC.
    Day,
    /// The hour, in UTC.
    Hour,
}

const DIMENSIONS: [(Dimension, &str, &str); 5] = [
    (Dimension::Tenant, "tenant", "tenant"),
    (Dimension::Model, "model", "model"),
    (Dimension::Principal, "principal", "principal"),
    (Dimension::Day, "day", "at - at % 86400"),
    (Dimension::Hour, "hour", "at - at % 3600"),
];

impl Dimension {
    /// Its name.
    pub fn name(self) -> &'static str {
        DIMENSIONS[self as usize].1
    }

    /// `tenant,day`.
    pub fn list(text: &str) -> Result<Vec<Self>, String> {
        let mut list = Vec::new();
        for name in text.split(',').map(str::trim).filter(|name| !name.is_empty()) {
            let found = DIMENSIONS.iter().find(|(_, known, _)| *known == name);
            let (dimension, ..) = found.ok_or_else(|| {
                format!("{name} is nothing that a report can be by: tenant, model, principal, day, hour")
            })?;
            if !list.contains(dimension) {
                list.push(*dimension);
            }
        }
        Ok(list)
    }

    fn column(self) -> &'static str {
        DIMENSIONS[self as usize].2
    }

    /// Its value as text.
    fn text(self, value: &Value) -> String {
        match value {
            Value::Text(text) => text.clone(),
            Value::Number(at) => time(at.unsigned_abs())[..if self == Self::Day { 10 } else { 16 }].to_owned(),
        }
    }
}

/// Seconds since 1970 as `2026-11-22T14:03:05Z`.
pub fn time(at: u64) -> String {
    let text = Stamp(std::time::UNIX_EPOCH + std::time::Duration::from_secs(at.min(200_000_000_000))).to_string();
    format!("{}Z", &text[..19])
}

/// What is asked for.
#[derive(Clone, Debug, Default)]
pub struct Query {
    /// One row for each of these; without any there is only the total.
    pub by: Vec<Dimension>,
    /// What of the ledger is meant.
    pub scope: Scope,
    /// From this time on, in seconds since 1970: from its minute's beginning.
    pub since: u64,
    /// Before this time: to its minute's end.
    pub until: Option<u64>,
    /// So many rows at most.
    pub limit: Option<u32>,
    /// Only what comes behind the report that told this cursor.
    pub cursor: Option<String>,
}

/// The answer.
#[derive(Clone, Debug)]
pub struct Report {
    /// What the rows are by.
    pub by: Vec<Dimension>,
    /// From when on it counts, after rounding.
    pub since: u64,
    /// Up to when.
    pub until: Option<u64>,
    /// The rows, in the order of their keys.
    pub rows: Vec<Row>,
    /// The sum of all rows, also of those that are not on this page.
    pub total: Spent,
    /// Where the next page begins, if there is one.
    pub cursor: Option<String>,
}

/// One row.
#[derive(Clone, Debug)]
pub struct Row {
    /// What it is about, in the order of [`Report::by`].
    pub key: Vec<String>,
    /// What was spent.
    pub spent: Spent,
}

/// Asks for a report.
pub(super) fn made(store: &mut dyn Store, query: &Query) -> Result<Report, Trouble> {
    let bounds = Bounds::of(query, pruned(store)?);
    let total = rows(store, query, &bounds, &[], None)?.pop().map(|(_, spent)| spent).unwrap_or_default();
    let (mut found, cursor) = match query.by.is_empty() {
        true => (Vec::new(), None),
        false => page(store, query, &bounds)?,
    };
    let texts = |key: Vec<Value>| query.by.iter().zip(&key).map(|(dimension, value)| dimension.text(value)).collect();
    let rows = found.drain(..).map(|(key, spent)| Row { key: texts(key), spent }).collect();
    let until = query.until.map(|_| bounds.to.unsigned_abs());
    Ok(Report { by: query.by.clone(), since: bounds.from.unsigned_abs(), until, rows, total, cursor })
}

type Found = (Vec<Value>, Spent);

/// The rows of a page, and where the next one begins.
fn page(store: &mut dyn Store, query: &Query, bounds: &Bounds) -> Result<(Vec<Found>, Option<String>), Trouble> {
    let behind = query.cursor.as_deref().map(|cursor| read_cursor(cursor, &query.by)).transpose()?;
    let mut found = rows(store, query, bounds, &query.by, behind.as_deref())?;
    let limit = query.limit.map_or(usize::MAX, |limit| limit as usize);
    let more = found.len() > limit;
    found.truncate(limit);
    Ok((found.clone(), found.last().filter(|_| more).map(|(key, _)| cursor(key))))
}

/// Up to when the minutes have been removed.
fn pruned(store: &mut dyn Store) -> Result<i64, Trouble> {
    match store.ask("SELECT pruned FROM infergate_ledger", &[])?.first().and_then(|row| row.first()) {
        Some(Value::Number(pruned)) => Ok(*pruned),
        _ => Ok(0),
    }
}

/// The sums by `by`, in their order; one more than the limit, which tells whether there are more.
fn rows(
    store: &mut dyn Store,
    query: &Query,
    bounds: &Bounds,
    by: &[Dimension],
    behind: Option<&[Value]>,
) -> Result<Vec<Found>, Trouble> {
    let columns: Vec<&str> = by.iter().map(|dimension| dimension.column()).collect();
    let sums = Spent::NAMES.map(|name| store.sum(name));
    let selected: Vec<&str> = columns.iter().copied().chain(sums.iter().map(String::as_str)).collect();
    let mut asked =
        Asked { sql: format!("SELECT {} FROM infergate_sums WHERE ", selected.join(", ")), values: Vec::new() };
    asked.within(bounds, by);
    asked.only("tenant", &query.scope.tenants);
    asked.only("principal", &query.scope.principals);
    asked.only("model", &query.scope.models);
    if !by.is_empty() {
        asked.behind(&columns, behind.unwrap_or_default());
        let order: Vec<String> = (1..=columns.len()).map(|at| at.to_string()).collect();
        asked.sql.push_str(&format!(" GROUP BY {0} ORDER BY {0}", order.join(", ")));
        query.limit.iter().for_each(|limit| asked.sql.push_str(&format!(" LIMIT {}", u64::from(*limit) + 1)));
    }
    let found = store.ask(&asked.sql, &asked.values)?;
    Ok(found.into_iter().map(|row| split(row, columns.len())).collect())
}

fn split(mut row: Vec<Value>, keys: usize) -> Found {
    let sums = row.split_off(keys);
    let numbers = std::array::from_fn(|at| match sums.get(at) {
        Some(Value::Number(number)) => number.unsigned_abs(),
        _ => 0,
    });
    (row, Spent::of(numbers))
}

/// A question that grows. Values are numbered as they come; what comes from outside is always a value.
struct Asked {
    sql: String,
    values: Vec<Value>,
}

impl Asked {
    fn value(&mut self, value: Value) {
        self.values.push(value);
        self.sql.push_str(&format!("${}", self.values.len()));
    }

    fn list(&mut self, values: impl IntoIterator<Item = Value>) {
        for (at, value) in values.into_iter().enumerate() {
            self.sql.push_str(if at == 0 { "(" } else { ", " });
            self.value(value);
        }
        self.sql.push(')');
    }

    /// Only what is in these times, each piece of them from the coarsest sums.
    fn within(&mut self, bounds: &Bounds, by: &[Dimension]) {
        let coarsest = if by.contains(&Dimension::Hour) { 1 } else { 2 };
        let mut pieces = Vec::new();
        cover(bounds.from, bounds.to, coarsest, &mut pieces);
        self.sql.push('(');
        for (at, (grain, from, to)) in pieces.iter().enumerate() {
            // The numbers are ours, and a plan is better where it sees them.
            let or = if at == 0 { "" } else { " OR " };
            self.sql.push_str(&format!("{or}(grain = {grain} AND at >= {from} AND at < {to})"));
        }
        self.sql.push_str(if pieces.is_empty() { "1 = 0)" } else { ")" });
    }

    fn only(&mut self, column: &str, names: &[String]) {
        if !names.is_empty() {
            self.sql.push_str(&format!(" AND {column} IN "));
            self.list(names.iter().cloned().map(Value::Text));
        }
    }

    fn behind(&mut self, columns: &[&str], key: &[Value]) {
        if !key.is_empty() {
            self.sql.push_str(&format!(" AND ({}) > ", columns.join(", ")));
            self.list(key.iter().cloned());
        }
    }
}

/// From when to when, in whole minutes.
#[derive(Debug, PartialEq, Eq)]
struct Bounds {
    from: i64,
    to: i64,
}

impl Bounds {
    /// Minutes before `pruned` are gone: there whole hours count.
    fn of(query: &Query, pruned: i64) -> Self {
        let seconds = |time: u64| i64::try_from(time).unwrap_or(i64::MAX).min(LAST);
        let grain = |at: i64| if at < pruned { GRAINS[1] } else { GRAINS[0] };
        let (from, to) = (seconds(query.since), query.until.map_or(LAST, seconds));
        Self { from: begin(from, grain(from)), to: end(to, grain(to)) }
    }
}

/// A day beyond all times: 9999-12-31.
const LAST: i64 = 253_402_214_400;

/// The first beginning of a `grain` that is not before `at`.
fn end(at: i64, grain: i64) -> i64 {
    begin(at + grain - 1, grain)
}

/// Puts together `from` to `to`: days in the middle, hours and minutes at the ends.
fn cover(from: i64, to: i64, coarsest: usize, pieces: &mut Vec<(i64, i64, i64)>) {
    let grain = GRAINS[coarsest];
    let (first, last) = (end(from, grain), begin(to, grain));
    if from >= to {
        return;
    }
    if first < last {
        pieces.push((grain, first, last));
    }
    if coarsest > 0 && first < last {
        cover(from, first, coarsest - 1, pieces);
        cover(last, to, coarsest - 1, pieces);
    } else if coarsest > 0 {
        cover(from, to, coarsest - 1, pieces);
    }
}

/// The place behind a row, for whoever wants the next ones.
fn cursor(key: &[Value]) -> String {
    let values = key.iter().map(|value| match value {
        Value::Number(number) => json!(number),
        Value::Text(text) => json!(text),
    });
    hex::text(json!(values.collect::<Vec<_>>()).to_string().as_bytes())
}

fn read_cursor(text: &str, by: &[Dimension]) -> Result<Vec<Value>, Trouble> {
    let wrong = || "this cursor is of no such report: give back what `cursor` said, with the same `by`".to_owned();
    let bytes = hex::bytes(text.as_bytes()).ok_or_else(wrong)?;
    let values: Vec<serde_json::Value> = serde_json::from_slice(&bytes).map_err(|_| wrong())?;
    let typed = |(dimension, value): (&Dimension, &serde_json::Value)| match dimension {
        Dimension::Day | Dimension::Hour => value.as_i64().map(Value::Number),
        _ => value.as_str().filter(|text| !text.contains('\0')).map(|text| Value::Text(text.to_owned())),
    };
    let key: Option<Vec<Value>> = by.iter().zip(&values).map(typed).collect();
    key.filter(|_| values.len() == by.len()).ok_or_else(wrong)
}

impl Report {
    /// As JSON: exact numbers, and the cost in dollars beside.
    pub fn json(&self) -> serde_json::Value {
        let rows = self.rows.iter().map(|row| {
            let names =
                self.by.iter().zip(&row.key).map(|(dimension, value)| (dimension.name().to_owned(), json!(value)));
            names.chain(members(&row.spent)).collect::<Map<_, _>>()
        });
        json!({
            "since": time(self.since), "until": self.until.map(time),
            "rows": rows.collect::<Vec<_>>(), "total": members(&self.total).collect::<Map<_, _>>(),
            "cursor": self.cursor,
        })
    }
}

fn members(spent: &Spent) -> impl Iterator<Item = (String, serde_json::Value)> + use<> {
    let numbers = Spent::NAMES.into_iter().zip(spent.numbers()).map(|(name, number)| (name.to_owned(), json!(number)));
    numbers.chain([("cost_usd".to_owned(), json!(spent.cost.to_string()))])
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: i64 = 86_400;

    #[test]
    fn a_time_is_put_together_from_days_hours_and_minutes_without_a_gap_and_nothing_twice() {
        let covered = |from: i64, to: i64, coarsest: usize| {
            let mut pieces = Vec::new();
            cover(from, to, coarsest, &mut pieces);
            pieces.sort_by_key(|(_, from, _)| *from);
            let mut at = from;
            for (grain, begin, end) in &pieces {
                assert_eq!((at, begin % grain, end % grain), (*begin, 0, 0), "{pieces:?}");
                at = *end;
            }
            assert_eq!(at, to.max(from), "{pieces:?}");
            pieces.iter().map(|(grain, ..)| *grain).collect::<Vec<_>>()
        };
        assert_eq!(covered(DAY, 3 * DAY, 2), [86_400]);
        assert_eq!(covered(DAY + 60, 3 * DAY + 7_260, 2), [60, 3_600, 86_400, 3_600, 60]);
        assert_eq!(covered(DAY + 60, DAY + 7_260, 2), [60, 3_600, 60]);
        assert_eq!(covered(DAY + 60, DAY + 120, 2), [60]);
        assert_eq!(covered(DAY, 3 * DAY, 1), [3_600]);
        assert!(covered(DAY, DAY, 2).is_empty() && covered(DAY, 0, 2).is_empty());
        for _ in 0..2_000 {
            let from = fastrand::i64(0..5_000) * 60;
            covered(from, from + fastrand::i64(0..9_000) * 60, fastrand::usize(1..3));
        }
    }

    #[test]
    fn ends_are_whole_minutes_or_whole_hours_where_no_minutes_are_left() {
        let query = Query { since: 3_600 * 10 + 61, until: Some(3_600 * 20 + 61), ..Query::default() };
        assert_eq!(Bounds::of(&query, 0), Bounds { from: 36_060, to: 72_120 });
        assert_eq!(Bounds::of(&query, 3_600 * 15), Bounds { from: 36_000, to: 72_120 });
        assert_eq!(Bounds::of(&query, 3_600 * 30), Bounds { from: 36_000, to: 75_600 });
        assert_eq!(Bounds::of(&Query::default(), 0), Bounds { from: 0, to: LAST });
        assert_eq!(LAST % DAY, 0);
    }

    #[test]
    fn a_cursor_comes_back_as_it_went_and_others_are_refused() {
        let by = [Dimension::Tenant, Dimension::Day];
        let key = vec![Value::Text("\u{4e2d} 'x'".to_owned()), Value::Number(86_400)];
        assert_eq!(read_cursor(&cursor(&key), &by), Ok(key.clone()));
        for wrong in ["", "zz", "5b5d", &cursor(&key[..1]), &cursor(&[key[1].clone(), key[0].clone()])] {
            read_cursor(wrong, &by).unwrap_err();
        }
    }

    #[test]
    fn dimensions_are_named_as_they_are_listed() {
        for (index, (dimension, name, _)) in DIMENSIONS.iter().enumerate() {
            assert_eq!((*dimension as usize, Dimension::list(name)), (index, Ok(vec![*dimension])));
        }
        assert_eq!(Dimension::list("hour, tenant,hour").unwrap(), [Dimension::Hour, Dimension::Tenant]);
        assert!(Dimension::list("team").unwrap_err().contains("tenant, model, principal"));
        assert_eq!(Dimension::Day.text(&Value::Number(86_400)), "1970-01-02");
        assert_eq!(Dimension::Hour.text(&Value::Number(90_000)), "1970-01-02T01:00");
    }
}
