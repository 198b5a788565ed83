//! What budgets had been spent before this process began to count, from the ledger.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use super::{Counted, Each, Limit, Unit, millis};
use crate::house::House;
use crate::ledger::report::Row;
use crate::ledger::{Dimension, Query, Reader, Scope, Spent};
use crate::policy::Policy;

/// How often a ledger is asked again that could not be.
const AGAIN: Duration = Duration::from_secs(5);

/// Gives every budget that this process has not counted from its period's beginning what the ledger says was spent.
/// Blocks its thread, `within` this time where the ledger must catch up first. Returns whether all of them have it.
pub fn restore(house: &House, within: Duration) -> bool {
    let policy = house.policy.get();
    if policy.shared.is_some() {
        // The store knows.
        return true;
    }
    let levels = &house.state.limits;
    levels.forget_restored(policy.all_limits());
    let due: Vec<&Arc<Limit>> =
        policy.all_limits().filter(|limit| limit.is_budget() && !levels.is_restored(limit)).collect();
    let (Some(ledger), false) = (&house.ledger, due.is_empty()) else { return true };
    let asked = ledger
        .catch_up(Instant::now() + within)
        .and_then(|()| ledger.place().reader())
        .and_then(|mut reader| due.iter().try_for_each(|limit| restored(house, &policy, limit, &mut reader)));
    if let Err(error) = &asked {
        tracing::warn!(%error, "what budgets had been spent before is not known yet: they count from now on");
    }
    asked.is_ok()
}

/// Keeps budgets restored: those of a policy that comes into force, and those that could not be before. Forgets, in
/// passing, the levels that say nothing.
pub async fn keep_restored(house: Arc<House>) {
    const WITHIN: Duration = Duration::from_secs(2);
    const SWEEP: Duration = Duration::from_secs(60);
    let mut changes = house.policy.changes();
    loop {
        let asked = house.clone();
        let done = tokio::task::spawn_blocking(move || restore(&asked, WITHIN)).await.unwrap_or(true);
        house.state.limits.sweep(millis(SystemTime::now()));
        let wait = if done { SWEEP } else { AGAIN };
        if let Ok(Err(_)) = tokio::time::timeout(wait, changes.changed()).await {
            return;
        }
    }
}

fn restored(house: &House, policy: &Policy, limit: &Arc<Limit>, reader: &mut Reader) -> Result<(), String> {
    let now = millis(SystemTime::now());
    let query = Query {
        by: vec![Dimension::Tenant, Dimension::Principal, Dimension::Model],
        scope: Scope { tenants: tenants(policy, limit), ..Scope::default() },
        since: limit.window.span(now).from / 1000,
        until: None,
        limit: None,
        cursor: None,
    };
    let report = reader.report(&query)?;
    for row in &report.rows {
        give(house, limit, row, now);
    }
    house.state.limits.set_restored(limit);
    if limit.plans.is_some() || limit.each.iter().any(|each| matches!(each, Each::Surface | Each::User)) {
        tracing::warn!(limit = %limit.name, "the ledger knows no users, no plans and no endpoints: this budget begins anew with the process");
    }
    Ok(())
}

/// The tenants that a limit counts; none for everybody's.
fn tenants(policy: &Policy, limit: &Arc<Limit>) -> Vec<String> {
    let holds = |limits: &[Arc<Limit>]| limits.iter().any(|other| Arc::ptr_eq(other, limit));
    policy.tenants.values().filter(|tenant| holds(&tenant.limits)).map(|tenant| tenant.name.to_string()).collect()
}

fn give(house: &House, limit: &Limit, row: &Row, now: u64) {
    let [tenant, key, model] = &row.key[..] else { return };
    if limit.models.as_ref().is_some_and(|list| !list.iter().any(|pattern| pattern.takes(model))) {
        return;
    }
    if limit.surfaces.is_some()
        || limit.plans.is_some()
        || limit.each.iter().any(|each| matches!(each, Each::Surface | Each::User))
    {
        return;
    }
    let counted = Counted { tenant: Some(tenant), key: Some(key), model, ..Counted::nobody(now) };
    let level = house.state.limits.of(limit, &counted);
    level.count().restore(&limit.terms(now), amount(limit.unit, &row.spent));
}

fn amount(unit: Unit, spent: &Spent) -> u64 {
    match unit {
        Unit::Requests => spent.asked,
        Unit::InputTokens => spent.input_tokens,
        Unit::OutputTokens => spent.output_tokens,
        Unit::Tokens => spent.input_tokens.saturating_add(spent.output_tokens),
        Unit::Nanousd => spent.cost.0,
        Unit::Concurrency => 0,
    }
}
