//! `GET /admin/v1/usage`: what was spent, page by page.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::audit::search;
use crate::hex;
use crate::ledger::{Dimension, Ledger, Query};

/// How long what is on record may take to come into the ledger.
const CATCH_UP: Duration = Duration::from_secs(2);
/// How many rows a page has.
const LIMIT: u32 = 1_000;
const LIMIT_MAX: u32 = 10_000;
/// What a report is about where nobody says: the last week, by tenant.
const SINCE: &str = "7d";

/// What a request's query asks for.
pub(super) fn asked(text: &str) -> Result<Query, String> {
    let mut query = Query { by: vec![Dimension::Tenant], limit: Some(LIMIT), ..Query::default() };
    let mut since = SINCE.to_owned();
    for pair in text.split('&').filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        let value = decoded(value).ok_or_else(|| format!("{name} is not well encoded"))?;
        match name {
            _ if value.is_empty() => {}
            "by" => query.by = Dimension::list(&value)?,
            "since" => since = value,
            "until" => query.until = Some(seconds(&value)?),
            "tenant" => query.scope.tenants.push(value),
            "model" => query.scope.models.push(value),
            "principal" => query.scope.principals.push(value),
            "limit" => query.limit = Some(limit(&value)?),
            "cursor" => query.cursor = Some(value),
            _ => {
                return Err(format!(
                    "{name} is not known here: by, since, until, tenant, model, principal, limit, cursor"
                ));
            }
        }
    }
    query.since = seconds(&since)?;
    Ok(query)
}

fn limit(text: &str) -> Result<u32, String> {
    let limit = text.parse().ok().filter(|limit| (1..=LIMIT_MAX).contains(limit));
    limit.ok_or_else(|| format!("limit is a number from 1 to {LIMIT_MAX}"))
}

fn seconds(text: &str) -> Result<u64, String> {
    search::time(text).map(|micros| micros / 1_000_000)
}

/// Without `%41` and `+`; nothing that no name can have.
fn decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, behind @ ..] = rest {
        rest = behind;
        match first {
            b'%' => {
                bytes.extend(hex::bytes(behind.get(..2)?)?);
                rest = &behind[2..];
            }
            b'+' => bytes.push(b' '),
            other => bytes.push(*other),
        }
    }
    String::from_utf8(bytes).ok().filter(|text| !text.contains('\0'))
}

/// The report. Where the ledger is behind, it says so.
pub(super) fn told(ledger: &Ledger, query: &Query) -> Result<Value, String> {
    let behind = ledger.catch_up(Instant::now() + CATCH_UP).err();
    let mut report = ledger.place().reader()?.report(query)?.json();
    if let Some(behind) = behind {
        report["behind"] = json!(behind);
    }
    Ok(report)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_is_read_strictly() {
        let query = asked("by=model,day&tenant=a%20b&tenant=%C3%A9&since=1970-01-02T00:00:00Z&limit=2").unwrap();
        assert_eq!(query.by, [Dimension::Model, Dimension::Day]);
        assert_eq!(
            (query.scope.tenants, query.since, query.limit),
            (vec!["a b".to_owned(), "\u{e9}".to_owned()], 86_400, Some(2))
        );
        let usual = asked("").unwrap();
        assert_eq!((usual.by, usual.limit), (vec![Dimension::Tenant], Some(LIMIT)));
        for wrong in ["by=x", "limit=0", "limit=x", "since=soon", "tenant=%zz", "tenant=%4", "tenant=%00", "tenat=a"] {
            asked(wrong).unwrap_err();
        }
    }
}
