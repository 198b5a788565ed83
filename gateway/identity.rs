//! Who asks: the authenticators are asked in order, and what they say is on record.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use infergate_plugins::authenticator::{Answer, Authenticator, Credentials, Fault, Identity, Mark};
use infergate_plugins::operation::Operation;

use crate::audit::record::Text;
use crate::exchange::Exchange;
use crate::house::House;
use crate::policy::file::OnRevoked;
use crate::policy::{Policy, Route, Tenant};
use crate::refusal::{Code, Refusal};

/// How long a wait for the end of a key lasts, at least and at most.
const TICK: Duration = Duration::from_millis(1);
const HOUR: Duration = Duration::from_secs(3_600);

/// Somebody who may ask.
#[derive(Clone, Debug)]
pub struct Who {
    /// Who asks.
    pub identity: Identity,
    /// Who pays.
    pub tenant: Arc<Tenant>,
}

/// What whoever is not let in gets to hear, whatever the reason.
const NOT_LET_IN: &str = "no valid API key: send yours as `Authorization: Bearer KEY`, or in `x-api-key` or `api-key`";

/// From the head alone: who asks, and may they ask here? `path` is the endpoint as policies name it.
pub fn identify(exchange: &mut Exchange, credentials: &Credentials<'_>, path: &str) -> Result<(), Refusal> {
    let policy = exchange.policy.clone();
    let Some(authenticators) = &policy.authenticators else { return Ok(()) };
    if exchange.surface.operation == Operation::Status {
        // Load balancers ask for health, and have no key.
        exchange.decide("identify", "open", "allow", "this endpoint asks for no key");
        return Ok(());
    }
    let (rule, said) = ask(authenticators, credentials, exchange.times.at);
    let identity = match said {
        Ok(identity) => identity,
        Err(fault) => {
            exchange.decide("identify", rule, "refuse", why(&fault));
            return Err(Refusal::new(Code::InvalidApiKey, NOT_LET_IN));
        }
    };
    let Some(tenant) = policy.tenants.get(&identity.tenant).cloned() else {
        exchange.decide("identify", rule, "refuse", format!("no tenant is named {}", identity.tenant));
        return Err(Refusal::new(Code::InvalidApiKey, NOT_LET_IN));
    };
    exchange.decide("identify", rule, "allow", &identity.by);
    let may_ask = exchange.surface.operation == Operation::Models || tenant.may_ask(path);
    if !may_ask {
        exchange.decide("identify", &tenant.name, "refuse", "the path is not in the tenant's surfaces");
    }
    exchange.who = Some(Who { identity, tenant });
    if may_ask { Ok(()) } else { Err(surface_not_allowed(path)) }
}

fn surface_not_allowed(path: &str) -> Refusal {
    Refusal::new(Code::SurfaceNotAllowed, format!("this key may not be used for {path}"))
}

/// The first answer, and whose it is.
pub fn ask(
    authenticators: &[Arc<dyn Authenticator>],
    credentials: &Credentials<'_>,
    now: SystemTime,
) -> (&'static str, Result<Identity, Fault>) {
    for authenticator in authenticators {
        match authenticator.ask(credentials, now) {
            Answer::Yes(identity) => return (authenticator.kind(), Ok(identity)),
            Answer::No(fault) => return (authenticator.kind(), Err(fault)),
            Answer::Pass => {}
        }
    }
    ("authenticators", Err(Fault::Absent))
}

/// Why credentials are not good; callers never learn it.
pub fn why(fault: &Fault) -> Text {
    match fault {
        Fault::Absent => "no key, or none of ours".into(),
        Fault::Malformed => "the key is malformed: mistyped or cut off".into(),
        Fault::Ambiguous => "two headers carry two different keys".into(),
        Fault::Unknown => "the key is unknown: made up, or revoked".into(),
        Fault::Expired(whose) => format!("the key {whose} has expired").into(),
        Fault::Refused(why) => why.clone().into(),
    }
}

/// Where the model `asked` is served for whoever asks. What they may not use, they do not learn to exist.
pub fn route(exchange: &mut Exchange, asked: Option<&str>) -> Result<Arc<Route>, Refusal> {
    let policy = exchange.policy.clone();
    let Some(tenant) = exchange.who.as_ref().map(|who| who.tenant.clone()) else {
        return policy.route(asked).cloned();
    };
    match policy.route_among(asked, &|name| tenant.names(name)) {
        Ok(route) if tenant.may_use(route, asked) => Ok(route.clone()),
        Err(refusal) if asked.is_none_or(|name| tenant.names(name)) => Err(refusal),
        _ => Err(model_not_allowed(exchange, &tenant, asked)),
    }
}

/// Whether whoever asks may use a path that passes through unread: where models are listed, it counts as one.
pub fn may_pass(exchange: &mut Exchange, route: &Route) -> Result<(), Refusal> {
    let Some(tenant) = exchange.who.as_ref().map(|who| who.tenant.clone()) else { return Ok(()) };
    if tenant.may_use(route, None) {
        return Ok(());
    }
    Err(model_not_allowed(exchange, &tenant, Some(&route.model.name)))
}

/// Whether what is asked may go anywhere where `route` is served.
pub fn may_go(exchange: &mut Exchange, route: &Route) -> Result<(), Refusal> {
    let operation = exchange.surface.operation;
    let stuck = |who: &&Who| who.tenant.is_bound() && !who.tenant.reaches(route, operation);
    let Some(name) = exchange.who.as_ref().filter(stuck).map(|who| who.tenant.name.clone()) else { return Ok(()) };
    exchange.decide("route", &name, "refuse", "no pool of the model is in the tenant's regions");
    let message = format!("the model `{}` is served in no region that this key may use", route.model.name);
    Err(Refusal::new(Code::ModelNotAllowed, message).param("model"))
}

fn model_not_allowed(exchange: &mut Exchange, tenant: &Tenant, asked: Option<&str>) -> Refusal {
    exchange.decide("route", &tenant.name, "refuse", "the model is not in the tenant's models");
    let asked: String = asked.unwrap_or("by default").chars().take(200).collect();
    let message = format!("this key may not use the model `{asked}`; GET /v1/models lists those that it may");
    Refusal::new(Code::ModelNotAllowed, message).param("model")
}

/// By what somebody holds the right to go on with what they began.
#[derive(Clone, Copy, Debug)]
pub struct Hold {
    mark: Mark,
    expires: Option<SystemTime>,
}

impl Hold {
    /// That of somebody who was let in.
    pub fn of(identity: &Identity) -> Self {
        Self { mark: identity.mark, expires: identity.expires }
    }

    /// How long it lasts yet; `None` where it has no end.
    fn left(&self) -> Option<Duration> {
        self.expires.map(|expires| expires.duration_since(SystemTime::now()).unwrap_or_default())
    }
}

/// What the caller of a request that was cut gets to hear.
pub fn revoked_refusal() -> Refusal {
    Refusal::new(Code::KeyRevoked, "the credentials of this request have been revoked, or their time is over")
}

/// Whether the policy in force cuts what somebody began under `policy`.
pub fn is_revoked(house: &House, policy: &Arc<Policy>, hold: &Hold) -> bool {
    let now = house.policy.get();
    let is_over = || hold.left().is_some_and(|left| left.is_zero());
    now.requests.on_revoked == OnRevoked::Cut && ((!Arc::ptr_eq(&now, policy) && !knows(&now, &hold.mark)) || is_over())
}

fn knows(policy: &Policy, mark: &Mark) -> bool {
    let Some(authenticators) = &policy.authenticators else { return true };
    authenticators.iter().any(|authenticator| authenticator.still_knows(mark))
}

/// Resolves when what somebody began under `policy` is to be cut, which nobody is whom the policy does not ask for
/// anything. Only a policy that comes into force makes any work, and the end of what they showed.
pub async fn revoked(house: &House, policy: Arc<Policy>, hold: Option<Hold>) {
    let Some(hold) = hold else { return std::future::pending().await };
    let mut changes = house.policy.changes();
    while !is_revoked(house, &policy, &hold) {
        tokio::select! {
            changed = changes.changed() => if changed.is_err() {
                return std::future::pending().await;
            },
            () = ended(house, &hold) => {}
        }
    }
}

/// Resolves when the time is over, if the policy in force cuts for that.
async fn ended(house: &House, hold: &Hold) {
    match hold.left().filter(|_| house.policy.get().requests.on_revoked == OnRevoked::Cut) {
        // The clock of the day may be set while the timer runs.
        Some(left) => tokio::time::sleep(left.clamp(TICK, HOUR)).await,
        None => std::future::pending().await,
    }
}
