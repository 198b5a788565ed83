//! What the claims of a verified token mean here: who pays, and whether the roles suffice.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::{Issuer, Wrong, half};
use crate::claim;

/// What is wrong with a token, for the record only.
pub(super) type Flaw = Cow<'static, str>;

/// Which claim of a token names who pays.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TenantClaim {
    /// The claim: a text, or a list of texts. A dot leads into an object: `resource.team`. Absent: `default` pays for
    /// all.
    #[serde(default)]
    #[schemars(length(min = 1))]
    pub claim: Option<String>,
    /// The tenant for each value of the claim. A value that is not among them counts as none. Absent: the value is the
    /// tenant's name.
    #[serde(default)]
    pub map: Option<BTreeMap<String, String>>,
    /// The tenant where the claim has no value. Absent: such a token is refused.
    #[serde(default)]
    pub default: Option<String>,
}

/// Roles of which a token must have one.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Roles {
    /// The claim: a text, in which spaces separate roles, or a list of texts. A dot leads into an object:
    /// `realm_access.roles`.
    #[schemars(length(min = 1))]
    pub claim: String,
    /// The roles. A token that has none of them is refused.
    #[schemars(length(min = 1))]
    pub one_of: Vec<String>,
}

/// Which claim of a token names the plans of its bearer.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Plans {
    /// The claim: a text, or a list of texts. A dot leads into an object: `account.plan`.
    #[schemars(length(min = 1))]
    pub claim: String,
    /// The plan where the claim has no value. Absent: none, so that no limit with `plans` holds.
    #[serde(default)]
    pub default: Option<String>,
}

/// The most plans that a token has; the others are passed over.
const PLANS_MAX: usize = 8;

impl Plans {
    fn of(&self, claims: &Map<String, Value>) -> Arc<[Arc<str>]> {
        let named = texts(claims, &self.claim, false).into_iter().filter(|plan| is_name(plan, 128));
        let named: Vec<&str> = named.take(PLANS_MAX).collect();
        let default = self.default.iter().map(String::as_str).filter(|_| named.is_empty());
        named.iter().copied().chain(default).map(Arc::from).collect()
    }
}

impl TenantClaim {
    /// The tenants that it names, each with its key.
    pub(super) fn named(&self) -> Vec<(String, String)> {
        let mapped = self.map.iter().flatten().map(|(value, tenant)| (format!(".map.{value}"), tenant.clone()));
        mapped.chain(self.default.iter().map(|tenant| (".default".to_owned(), tenant.clone()))).collect()
    }
}

/// How an issuer's claims are read.
#[derive(Debug)]
pub(super) struct Claims {
    tenant: TenantClaim,
    roles: Option<Roles>,
    plans: Option<Plans>,
    /// Those that are kept as they are.
    kept: Vec<Arc<str>>,
    /// What all that may come out of it is found by again, where that is known.
    marks: HashSet<[u8; 16]>,
}

/// What the claims give.
#[derive(Debug)]
pub(super) struct Given {
    pub tenant: Arc<str>,
    pub plans: Arc<[Arc<str>]>,
    pub claims: claim::Claims,
    pub mark: [u8; 16],
}

impl Claims {
    pub(super) fn build(config: &Issuer, kept: &[Arc<str>]) -> Result<Self, Vec<Wrong>> {
        let (tenant, mut wrong) = (&config.tenant, Vec::new());
        if tenant.claim.is_none() && tenant.default.is_none() {
            let message = "nobody pays: name the claim with the tenant, or a `default` for all";
            wrong.push((".tenant".to_owned(), message.to_owned()));
        }
        if tenant.claim.is_none() && tenant.map.is_some() {
            wrong.push((".tenant.map".to_owned(), "there is no `claim` whose values these could be".to_owned()));
        }
        let mapped = tenant.map.iter().flatten().map(|(value, tenant)| mark(value, tenant));
        let marks = mapped.chain(tenant.default.iter().map(|tenant| mark("", tenant))).collect();
        let (roles, plans) = (config.roles.clone(), config.plans.clone());
        let claims = Self { tenant: tenant.clone(), roles, plans, kept: kept.to_vec(), marks };
        if wrong.is_empty() { Ok(claims) } else { Err(wrong) }
    }

    /// Whether what was found by `mark` could still come out of it.
    pub(super) fn still_give(&self, mark: &[u8]) -> bool {
        let by_name = self.tenant.claim.is_some() && self.tenant.map.is_none();
        by_name || self.marks.iter().any(|known| known == mark)
    }

    pub(super) fn read(&self, claims: &Map<String, Value>) -> Result<Given, Flaw> {
        if let Some(roles) = &self.roles {
            let has = texts(claims, &roles.claim, true);
            if !has.iter().any(|role| roles.one_of.iter().any(|known| known == role)) {
                return Err(format!("it has none of the roles, in `{}`", roles.claim).into());
            }
        }
        let (value, tenant) = self.tenant(claims)?;
        let plans = self.plans.as_ref().map_or_else(|| [].into(), |plans| plans.of(claims));
        let kept = claim::kept(claims, &self.kept);
        Ok(Given { mark: mark(value, tenant), tenant: tenant.into(), plans, claims: kept })
    }

    /// The value that decided, and the tenant.
    fn tenant<'a>(&'a self, claims: &'a Map<String, Value>) -> Result<(&'a str, &'a str), Flaw> {
        let claim = self.tenant.claim.as_deref().unwrap_or_default();
        let values = if claim.is_empty() { Vec::new() } else { texts(claims, claim, false) };
        let mut found: Vec<(&str, &str)> = match &self.tenant.map {
            Some(map) => values.iter().filter_map(|value| Some((*value, map.get(*value)?.as_str()))).collect(),
            None => values.into_iter().map(|value| (value, value)).collect(),
        };
        found.sort_by_key(|(_, tenant)| *tenant);
        found.dedup_by_key(|(_, tenant)| *tenant);
        match (&found[..], &self.tenant.default) {
            ([(value, tenant)], _) if is_name(tenant, 128) => Ok((*value, *tenant)),
            ([_], _) => Err(format!("its `{claim}` is no tenant's name").into()),
            ([], Some(default)) => Ok(("", default)),
            ([], None) => Err(format!("its `{claim}` names no tenant").into()),
            _ => Err(format!("its `{claim}` names several tenants").into()),
        }
    }
}

fn mark(value: &str, tenant: &str) -> [u8; 16] {
    half(&format!("{value}\0{tenant}"))
}

/// Whether a text can be a name in records.
pub(super) fn is_name(text: &str, longest: usize) -> bool {
    (1..=longest).contains(&text.chars().count()) && !text.chars().any(char::is_control)
}

/// A word that somebody sent, as far as it can be told.
pub(super) fn shown(text: &str) -> String {
    text.chars().filter(|char| char.is_ascii_graphic()).take(40).collect()
}

/// The texts of a claim: its name to the letter, or the way through objects.
fn texts<'a>(claims: &'a Map<String, Value>, name: &str, words: bool) -> Vec<&'a str> {
    match claim::named(claims, name) {
        Some(Value::String(text)) if words => text.split_ascii_whitespace().collect(),
        Some(Value::String(text)) => vec![text],
        Some(Value::Array(list)) => list.iter().filter_map(Value::as_str).collect(),
        _ => Vec::new(),
    }
}

/// A time in seconds since 1970 (RFC 7519, 2: NumericDate).
pub(super) fn time(claims: &Map<String, Value>, name: &str) -> Result<Option<SystemTime>, Flaw> {
    let Some(value) = claims.get(name) else { return Ok(None) };
    let seconds = value.as_f64().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    let time = seconds.and_then(|seconds| UNIX_EPOCH.checked_add(seconds));
    time.map(Some).ok_or_else(|| format!("its `{name}` is no time").into())
}
