//! Which models were chosen where their names left it open, by which decision, and how long that took.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

use super::SELF_BUCKETS;
use super::series::Series;
use crate::audit::record::Text;
use crate::routers::{Decided, Routers};

/// The most series of decisions that a new policy finds and leaves.
const DECISIONS_MAX: usize = 10_000;

/// The metrics. All labels are names of the policy or words of ours.
#[derive(Debug)]
pub(super) struct Routes {
    decisions: Series<DecisionLabels, Counter>,
    abstentions: Series<AbstentionLabels, Counter>,
    took: Series<RouterLabels, Histogram>,
    escalations: Series<EscalationLabels, Counter>,
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
        let (decisions, abstentions, escalations) = (Series::default(), Series::default(), Series::default());
        let took = Series::<RouterLabels, Histogram>::new(|| Histogram::new(SELF_BUCKETS));
        registry.register("route_decisions", "Models that were chosen, by route", decisions.family());
        registry.register("route_abstentions", "Routers that had no answer, by why", abstentions.family());
        registry.register_with_unit("route_decision", "To choose a model", Unit::Seconds, took.family());
        let asked = "Models that were asked because the answer before was not good enough, by cause";
        registry.register("route_escalations", asked, escalations.family());
        Self { decisions, abstentions, took, escalations }
    }

    /// A virtual model was asked for. What nobody can answer is no decision.
    pub(super) fn decided(&self, router: &Arc<str>, decided: &Decided, took: Duration) {
        for (kind, why) in &decided.passes {
            self.abstentions.of(&AbstentionLabels { router: router.clone(), kind, why }).inc();
        }
        self.took.of(&RouterLabels { router: router.clone() }).observe(took.as_secs_f64());
        if decided.unfit.is_none() {
            let (route, gen_ai_request_model) = (shared(&decided.rule), decided.model.clone());
            let labels = DecisionLabels { router: router.clone(), route, gen_ai_request_model };
            self.decisions.of(&labels).inc();
        }
    }

    /// The next model of a cascade is asked.
    pub(super) fn escalated(&self, router: &Arc<str>, cause: &'static str) {
        self.escalations.of(&EscalationLabels { router: router.clone(), cause }).inc();
    }

    /// What is of another router, or of a model that its router no longer has, leaves the page.
    pub(super) fn keep(&self, routers: &HashMap<&str, &Routers>) {
        let stays = |router: &Arc<str>| routers.contains_key(&**router);
        self.decisions.keep(|labels| {
            let router = routers.get(&*labels.router);
            router.is_some_and(|router| router.models.contains_key(&labels.gen_ai_request_model))
        });
        self.abstentions.keep(|labels| stays(&labels.router));
        self.took.keep(|labels| stays(&labels.router));
        self.escalations.keep(|labels| stays(&labels.router));
        // Routes are renamed too. Counters that begin anew are what every restart makes of them.
        if self.decisions.len() > DECISIONS_MAX {
            self.decisions.keep(|_| false);
        }
    }

    /// How many series there are.
    pub(super) fn len(&self) -> usize {
        self.decisions.len() + self.abstentions.len() + self.took.len() + self.escalations.len()
    }

    /// Puts each on the page once.
    pub(super) fn show(&self) {
        let none: Arc<str> = "".into();
        let (router, route, gen_ai_request_model) = (none.clone(), none.clone(), none.clone());
        let _ = self.decisions.of(&DecisionLabels { router, route, gen_ai_request_model });
        let _ = self.abstentions.of(&AbstentionLabels { router: none.clone(), kind: "", why: "" });
        let _ = self.escalations.of(&EscalationLabels { router: none.clone(), cause: "" });
        let _ = self.took.of(&RouterLabels { router: none });
    }
}

fn shared(rule: &Text) -> Arc<str> {
    match rule {
        Text::Shared(name) => name.clone(),
        other => other.as_str().into(),
    }
}
