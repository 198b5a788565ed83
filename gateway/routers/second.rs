//! The second stage on its way: asked from the background, in time, so many at once, and not twice about the same.
//!
//! A request hands its doubt over and waits no longer than the policy lets it.

use std::sync::Arc;
use std::time::Instant;

use infergate_plugins::router::second::Doubt;
use parking_lot::Mutex;
use sha2::{Digest, Sha256};
use tokio::sync::oneshot;
use tokio::time::timeout;

use crate::egress::Egress;
use crate::handover::Handover;
use crate::house::House;
use crate::kept::Kept;

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

impl Seconds {
    /// The route that it is, or why nobody says so.
    pub async fn ask(&self, doubt: &Doubt) -> Result<Arc<str>, String> {
        let key = Sha256::digest(doubt.key()).into();
        if let Some(route) = self.kept.lock().get(&key) {
            return Ok(route.clone());
        }
        let (said, hears) = oneshot::channel();
        let job = Job { doubt: doubt.clone(), said };
        if !self.jobs.give(job) {
            return Err("too many wait for it".to_owned());
        }
        let route = match timeout(doubt.second.deadline(), hears).await {
            Ok(Ok(said)) => said?,
            Ok(Err(_)) => return Err("it was not asked".to_owned()),
            Err(_) => return Err(format!("no answer within {} ms", doubt.second.deadline().as_millis())),
        };
        self.kept.lock().keep(key, route.clone(), doubt.second.kept());
        Ok(route)
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
    let answer = egress.post(doubt.post(), doubt.second.deadline()).await?;
    let index = doubt.read(&answer)?;
    Ok(doubt.routes[index].0.clone())
}

/// What a decision that was in doubt comes to: the model and route, or why the first stage's answer stands.
pub async fn decides(house: &House, doubt: &Doubt) -> (Option<(Arc<str>, Arc<str>)>, String) {
    let began = Instant::now();
    let said = house.seconds.ask(doubt).await;
    let [(one, _), (other, _)] = &doubt.routes;
    let between = format!("between {one} and {other}, margin {:.3}", doubt.margin);
    match said {
        Ok(route) => {
            let chosen = doubt.routes.iter().find(|(name, _)| *name == route).cloned();
            (chosen, format!("second stage, {between}, in {} ms", began.elapsed().as_millis()))
        }
        Err(why) => (None, format!("second stage, {between}: {why}")),
    }
}
