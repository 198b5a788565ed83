//! Which models were chosen where their names left it open, by which decision, and how long that took.

use std::sync::Arc;
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

use super::SELF_BUCKETS;
use crate::audit::record::Text;
use crate::routers::Decided;

/// The metrics. All labels are names of the policy or words of ours.
#[derive(Debug)]
pub(super) struct Routes {
    decisions: Family<DecisionLabels, Counter>,
    abstentions: Family<AbstentionLabels, Counter>,
    took: Family<RouterLabels, Histogram>,
    escalations: Family<EscalationLabels, Counter>,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct DecisionLabels {
    router: Arc<str>,
    route: Arc<str>,
    gen_ai_request_model: Arc<str>,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct AbstentionLabels {
    router: Arc<str>,
    kind: &'static str,
    why: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct EscalationLabels {
    router: Arc<str>,
    cause: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct RouterLabels {
    router: Arc<str>,
}

impl Routes {
    pub(super) fn new(registry: &mut Registry) -> Self {
        let (decisions, abstentions, escalations) = (Family::default(), Family::default(), Family::default());
        let took = Family::<RouterLabels, Histogram>::new_with_constructor(|| Histogram::new(SELF_BUCKETS));
        registry.register("route_decisions", "Models that were chosen, by route", decisions.clone());
        registry.register("route_abstentions", "Routers that had no answer, by why", abstentions.clone());
        registry.register_with_unit("route_decision", "To choose a model", Unit::Seconds, took.clone());
        let asked = "Models that were asked because the answer before was not good enough, by cause";
        registry.register("route_escalations", asked, escalations.clone());
        Self { decisions, abstentions, took, escalations }
    }

    /// A virtual model was asked for. What nobody can answer is no decision.
    pub(super) fn decided(&self, router: &Arc<str>, decided: &Decided, took: Duration) {
        for (kind, why) in &decided.passes {
            self.abstentions.get_or_create(&AbstentionLabels { router: router.clone(), kind, why }).inc();
        }
        self.took.get_or_create(&RouterLabels { router: router.clone() }).observe(took.as_secs_f64());
        if decided.unfit.is_none() {
            let (route, gen_ai_request_model) = (shared(&decided.rule), decided.model.clone());
            let labels = DecisionLabels { router: router.clone(), route, gen_ai_request_model };
            self.decisions.get_or_create(&labels).inc();
        }
    }

    /// The next model of a cascade is asked.
    pub(super) fn escalated(&self, router: &Arc<str>, cause: &'static str) {
        self.escalations.get_or_create(&EscalationLabels { router: router.clone(), cause }).inc();
    }

    /// Puts each on the page once.
    pub(super) fn show(&self) {
        let none: Arc<str> = "".into();
        let (router, route, gen_ai_request_model) = (none.clone(), none.clone(), none.clone());
        let _ = self.decisions.get_or_create(&DecisionLabels { router, route, gen_ai_request_model });
        let _ = self.abstentions.get_or_create(&AbstentionLabels { router: none.clone(), kind: "", why: "" });
        let _ = self.escalations.get_or_create(&EscalationLabels { router: none.clone(), cause: "" });
        let _ = self.took.get_or_create(&RouterLabels { router: none });
    }
}

fn shared(rule: &Text) -> Arc<str> {
    match rule {
        Text::Shared(name) => name.clone(),
        other => other.as_str().into(),
    }
}
