//! The second stage on its way: asked in time, so many at once, and not twice about the same. A service of its own is asked
//! from the background, a pool as for any request.
//!
//! A request waits no longer than the policy lets it.

mod pooled;

use std::sync::Arc;
use std::time::Instant;

use infergate_plugins::router::second::{Doubt, Whom};
use parking_lot::Mutex;
use sha2::{Digest, Sha256};
use tokio::sync::oneshot;
use tokio::time::timeout;

use crate::egress::Egress;
use crate::exchange::Exchange;
use crate::handover::Handover;
use crate::house::House;
use crate::kept::Kept;
use crate::telemetry::Table;

/// So many requests may wait for the background to take their doubts; where there is no room nobody is asked.
const WAITING_MAX: usize = 1_024;
/// So many calls may be under way at once.
const CALLS_MAX: usize = 64;
/// So many answers are kept.
const KEPT_MAX: usize = 10_000;

/// The way from requests to the background, and what was said lately.
#[derive(Debug)]
pub struct Seconds {
    jobs: Handover<Job>,
    kept: Mutex<Kept<Arc<str>>>,
}

impl Default for Seconds {
    fn default() -> Self {
        Self { jobs: Handover::of(WAITING_MAX), kept: Mutex::new(Kept::new(KEPT_MAX)) }
    }
}

/// What one request wants to know.
#[derive(Debug)]
struct Job {
    doubt: Doubt,
    said: oneshot::Sender<Result<Arc<str>, String>>,
}

/// The route that it is, or why nobody says so.
async fn said(house: &House, exchange: &mut Exchange, doubt: &Doubt) -> Result<Arc<str>, String> {
    // Whether the pool may be asked comes first: what it said for another tenant is not this one's to hear.
    let pool = match &doubt.second.whom {
        Whom::Pool(name) => Some(pooled::reached(exchange, name)?),
        Whom::Service(_) => None,
    };
    let key = Sha256::digest(doubt.key()).into();
    if let Some(route) = house.seconds.kept.lock().get(&key) {
        return Ok(route.clone());
    }
    let route = match pool {
        Some(pool) => pooled::ask(house, exchange, &pool, doubt).await?,
        None => house.seconds.ask(doubt).await?,
    };
    house.seconds.kept.lock().keep(key, route.clone(), doubt.second.kept());
    Ok(route)
}

/// Nobody said anything in time.
fn late(doubt: &Doubt) -> String {
    format!("no answer within {} ms", doubt.second.deadline().as_millis())
}

impl Seconds {
    /// What was said lately.
    pub fn table(&self) -> Table {
        Table { name: "router_answers", entries: self.kept.lock().len(), room: Some(KEPT_MAX) }
    }

    /// What a service of its own says.
    async fn ask(&self, doubt: &Doubt) -> Result<Arc<str>, String> {
        let (said, hears) = oneshot::channel();
        let job = Job { doubt: doubt.clone(), said };
        if !self.jobs.give(job) {
            return Err("too many wait for it".to_owned());
        }
        match timeout(doubt.second.deadline(), hears).await {
            Ok(Ok(said)) => said,
            Ok(Err(_)) => Err("it was not asked".to_owned()),
            Err(_) => Err(late(doubt)),
        }
    }
}

/// Asks for all requests, until the process ends.
pub async fn run(house: Arc<House>, egress: Arc<Egress>) {
    house.seconds.jobs.each(CALLS_MAX, |job| work(egress.clone(), job)).await;
}

async fn work(egress: Arc<Egress>, Job { doubt, mut said }: Job) {
    tokio::select! {
        answer = asked(&egress, &doubt) => drop(said.send(answer)),
        // Nobody waits for it any more.
        () = said.closed() => {}
    }
}

async fn asked(egress: &Egress, doubt: &Doubt) -> Result<Arc<str>, String> {
    let Whom::Service(service) = &doubt.second.whom else { return Err("it is a pool".to_owned()) };
    let answer = egress.post(doubt.post(service), doubt.second.deadline()).await?;
    Ok(doubt.read(&answer)?.clone())
}

/// What a decision that was in doubt comes to: the route, or why the first stage's answer stands.
pub async fn decides(house: &House, exchange: &mut Exchange, doubt: &Doubt) -> (Option<Arc<str>>, String) {
    let began = Instant::now();
    let said = said(house, exchange, doubt).await;
    let [(one, _), (other, _)] = &doubt.routes;
    let between = format!("between {one} and {other}, margin {:.3}", doubt.margin);
    match said {
        Ok(route) => (Some(route), format!("second stage, {between}, in {} ms", began.elapsed().as_millis())),
        Err(why) => (None, format!("second stage, {between}: {why}")),
    }
}
