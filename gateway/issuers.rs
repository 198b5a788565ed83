//! The keys of identity providers, kept up to date beside the requests.
//!
//! Every ten minutes, and when a token names a key that is not there, though not more often than every thirty seconds.
//! What cannot be had leaves the last keys in place. The log and the metrics say so.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, StatusCode, Uri};
use infergate_plugins::authenticator::jwt::{KeySet, Source, check_url};
use serde::Deserialize;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout};

use crate::egress::Egress;
use crate::house::House;
use crate::telemetry::IssuerMeters;

/// How often keys are read again.
const EVERY: Duration = Duration::from_secs(600);
/// The least time between two readings that tokens wished for.
const WISHED: Duration = Duration::from_secs(30);
/// How long keys that could not be had are waited for, at most.
const AGAIN_MAX: Duration = Duration::from_secs(30);
/// How long an answer may take.
const WITHIN: Duration = Duration::from_secs(5);
/// How long the first reading may hold up the start.
const START: Duration = Duration::from_secs(6);

/// A key set, and what its reader needs to know.
#[derive(Debug)]
pub struct Kept {
    /// The keys.
    pub set: Arc<KeySet>,
    source: Source,
    wish: Arc<Notify>,
    /// Whether somebody reads it.
    read: AtomicBool,
    /// Whether it was tried once.
    tried: watch::Sender<bool>,
}

impl Kept {
    /// A set without keys.
    pub fn new(source: Source) -> Self {
        let wish = Arc::new(Notify::new());
        let wished = wish.clone();
        let set = Arc::new(KeySet::new(move || wished.notify_one()));
        Self { set, source, wish, read: AtomicBool::new(false), tried: watch::Sender::new(false) }
    }

    /// Whether a policy, or a request under an older one, asks these keys.
    pub fn is_asked(&self) -> bool {
        Arc::strong_count(&self.set) > 1
    }

    /// The server, for the log and the metrics; in the rest of an address there may be secrets.
    fn server(&self) -> String {
        let (Source::Url(url) | Source::Discovery(url)) = &self.source else { return String::new() };
        let uri: Uri = url.parse().unwrap_or_default();
        uri.authority().map_or_else(String::new, |authority| format!("{authority}{}", uri.path()))
    }
}

/// Reads all key sets of the policies that come, until the process ends.
pub async fn run(house: Arc<House>, egress: Arc<Egress>) {
    let mut changes = house.policy.changes();
    let mut readers = tokio::task::JoinSet::new();
    loop {
        for kept in house.state.key_sets() {
            if !kept.read.swap(true, Ordering::Relaxed) {
                readers.spawn(keep(house.clone(), egress.clone(), kept));
            }
        }
        while readers.try_join_next().is_some() {}
        if changes.changed().await.is_err() {
            return;
        }
    }
}

/// Waits until each set was tried once, or for a few seconds: nobody with a good token is to be refused because the
/// process has just started.
pub async fn tried(house: &House) {
    let sets = house.state.key_sets();
    let all = async {
        for kept in &sets {
            // The sender lives as long as `kept`.
            let _ = kept.tried.subscribe().wait_for(|tried| *tried).await;
        }
    };
    let _ = timeout(START, all).await;
}

/// Keeps one set up to date as long as somebody asks it.
async fn keep(house: Arc<House>, egress: Arc<Egress>, kept: Arc<Kept>) {
    let server = kept.server();
    let meters = house.telemetry.issuer(&server);
    let (mut failures, mut wished) = (0_u32, None);
    while house.state.keeps(&kept) {
        kept.set.looking();
        let read = fetch(&egress, &kept.source).await.and_then(|text| kept.set.put(&text));
        failures = if read.is_ok() { 0 } else { failures.saturating_add(1) };
        tell(&server, &meters, &kept, read);
        kept.tried.send_replace(true);
        let again = if failures == 0 { EVERY } else { pause(failures) };
        wait(again, &kept.wish, &mut wished).await;
    }
    house.telemetry.issuer_gone(&server);
}

/// After a failure: soon, then less often.
fn pause(failures: u32) -> Duration {
    Duration::from_secs(1 << failures.saturating_sub(1).min(5)).min(AGAIN_MAX)
}

/// Waits for the next reading: for so long, or for a wish, if the last one is long enough ago.
async fn wait(again: Duration, wish: &Notify, wished: &mut Option<Instant>) {
    let heard = async {
        wish.notified().await;
        if let Some(before) = *wished {
            sleep_until(before + WISHED).await;
        }
    };
    tokio::select! {
        () = sleep(again) => {}
        () = heard => *wished = Some(Instant::now()),
    }
}

fn tell(server: &str, meters: &IssuerMeters, kept: &Kept, read: Result<usize, String>) {
    let count = i64::try_from(kept.set.count()).unwrap_or(i64::MAX);
    meters.keys.set(count);
    meters.healthy.set(i64::from(read.is_ok()));
    match read {
        Ok(keys) => {
            meters.read.inc();
            tracing::debug!(issuer = server, keys, "keys read");
        }
        Err(error) => {
            meters.failed.inc();
            tracing::warn!(issuer = server, %error, kept = count, "an issuer's keys cannot be read; the last ones stay");
        }
    }
}

async fn fetch(egress: &Egress, source: &Source) -> Result<Bytes, String> {
    match source {
        Source::File(_) => Err("a file is read with the policy".to_owned()),
        Source::Url(url) => get(egress, url).await,
        Source::Discovery(issuer) => {
            let url = format!("{}/.well-known/openid-configuration", issuer.trim_end_matches('/'));
            get(egress, &keys_of(issuer, &get(egress, &url).await?)?).await
        }
    }
}

/// Where an issuer says that its keys are (OpenID Connect Discovery 1.0, 4.3).
fn keys_of(issuer: &str, text: &[u8]) -> Result<String, String> {
    #[derive(Deserialize)]
    struct Provider {
        issuer: String,
        jwks_uri: String,
    }
    let provider: Provider =
        serde_json::from_slice(text).map_err(|_| "its configuration has no `issuer` and `jwks_uri`".to_owned())?;
    if provider.issuer != issuer {
        return Err("its configuration is that of another issuer".to_owned());
    }
    check_url(&provider.jwks_uri).map_err(|error| format!("its jwks_uri: {error}"))?;
    // Whoever is asked over https never sends us to this machine's own ports.
    let is_plain = |url: &str| !url.starts_with("https:");
    if is_plain(&provider.jwks_uri) && !is_plain(issuer) {
        return Err("its jwks_uri is not https".to_owned());
    }
    Ok(provider.jwks_uri)
}

async fn get(egress: &Egress, url: &str) -> Result<Bytes, String> {
    let request = Request::get(url).header("accept", "application/json").body(Bytes::new());
    let answer = egress.send(request.map_err(|error| error.to_string())?, WITHIN).await?;
    match answer.status() {
        StatusCode::OK => Ok(answer.into_body()),
        status => Err(format!("the answer is {status}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_issuer_is_believed_only_about_itself() {
        let told = |issuer: &str, uri: &str| {
            let text = format!(r#"{{"issuer":"https://id.test/a","jwks_uri":"{uri}","more":[]}}"#);
            keys_of(issuer, text.as_bytes())
        };
        assert_eq!(told("https://id.test/a", "https://keys.test/k").as_deref(), Ok("https://keys.test/k"));
        for (issuer, uri, why) in [
            ("https://id.test/b", "https://keys.test/k", "another issuer"),
            ("https://id.test/a", "http://keys.test/k", "over https"),
            ("https://id.test/a", "http://127.0.0.1/admin/reload", "not https"),
            ("https://id.test/a", "file:///etc/passwd", "its jwks_uri"),
        ] {
            assert!(told(issuer, uri).unwrap_err().contains(why), "{issuer} {uri}");
        }
        assert!(keys_of("x", b"{}").is_err() && keys_of("x", b"<html>").is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn wishes_are_heard_at_once_and_then_every_thirty_seconds() {
        let (wish, mut wished, begun) = (Notify::new(), None, Instant::now());
        let mut rounds = Vec::new();
        for _ in 0..3 {
            wish.notify_one();
            wait(EVERY, &wish, &mut wished).await;
            rounds.push(begun.elapsed().as_secs());
        }
        wait(EVERY, &wish, &mut wished).await;
        rounds.push(begun.elapsed().as_secs());
        assert_eq!(rounds, [0, 30, 60, 660]);
    }

    #[test]
    fn what_cannot_be_had_is_tried_again_soon_and_then_less_often() {
        assert_eq!([1, 2, 3, 5, 6, 99].map(|failures| pause(failures).as_secs()), [1, 2, 4, 16, 30, 30]);
    }
}
