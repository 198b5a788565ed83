//! Who is told that a limit is nearly used up: the log and a metric at once, and by a line in the journal every sink
//! that takes acts, such as a webhook.

use std::sync::{Arc, OnceLock};

use serde_json::json;
use tokio::sync::mpsc;

use super::Limit;
use crate::audit::journal::By;
use crate::house::House;

/// Where warnings go on their way to the journal; nowhere before the process listens to them.
#[derive(Clone, Debug, Default)]
pub struct Warnings(Arc<OnceLock<mpsc::Sender<Warning>>>);

/// A limit of which so much is used.
#[derive(Debug)]
struct Warning {
    limit: Arc<str>,
    whose: String,
    percent: u8,
    of: String,
}

/// So many may wait. Each level warns once a window, so there are more only where very many levels fill up at once;
/// the log and the metric have those as well.
const WAITING_MAX: usize = 1_024;

impl Limit {
    /// A threshold was passed: somebody is told.
    pub(super) fn warned(&self, whose: &str, percent: u8) {
        self.meters.warned.inc();
        let of = self.unit.spelt(self.max);
        tracing::warn!(limit = %self.name, whose, "{percent} % of {of} are used");
        if let Some(listener) = self.warnings.0.get() {
            let warning = Warning { limit: self.name.clone(), whose: whose.to_owned(), percent, of };
            // What finds no room is on the log.
            let _ = listener.try_send(warning);
        }
    }
}

/// Files warnings as they come, for as long as the process lives.
pub async fn file_warnings(house: Arc<House>) {
    let (sender, mut warnings) = mpsc::channel(WAITING_MAX);
    if house.state.limits.warnings.0.set(sender).is_err() {
        return;
    }
    while let Some(Warning { limit, whose, percent, of }) = warnings.recv().await {
        let whose = (!whose.is_empty()).then_some(whose);
        let change = json!({"limit": &*limit, "whose": whose, "percent": percent, "of": of});
        house.act("limit_warning", By::itself("limit"), change);
    }
}
