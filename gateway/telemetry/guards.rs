//! What guardrails said, by rule.

use std::collections::HashSet;

use infergate_plugins::guardrail::Outcome;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::registry::Registry;

use super::series::Series;

/// Every outcome with its word, in the order of the enum.
const OUTCOMES: [&str; 7] = ["passed", "flagged", "redacted", "blocked", "skipped", "failed", "timed_out"];

/// The metrics.
#[derive(Debug)]
pub(super) struct Guards(Series<GuardLabels, Counter>);

/// The handles of one rule. They live with the policy, so that a request looks nothing up.
#[derive(Clone, Debug, Default)]
pub struct GuardMeters([Counter; OUTCOMES.len()]);

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct GuardLabels {
    rule: String,
    outcome: &'static str,
}

impl Guards {
    pub(super) fn new(registry: &mut Registry) -> Self {
        let verdicts = Series::default();
        registry.register("guardrail_verdicts", "What became of guardrails, by rule", verdicts.family());
        Self(verdicts)
    }

    /// The handles of the rule `name`.
    pub(super) fn of(&self, name: &str) -> GuardMeters {
        GuardMeters(OUTCOMES.map(|outcome| self.0.of(&GuardLabels { rule: name.to_owned(), outcome })))
    }

    /// Rules of other names leave the page.
    pub(super) fn keep(&self, rules: &HashSet<&str>) {
        self.0.keep(|labels| rules.contains(&*labels.rule));
    }

    /// How many series there are.
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }
}

impl GuardMeters {
    /// One exchange was judged.
    pub fn count(&self, outcome: Outcome) {
        self.0[outcome as usize].inc();
    }
}
