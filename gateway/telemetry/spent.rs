//! What requests cost, by model, and how sure that is.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;
use std::collections::HashSet;
use std::sync::{Arc, OnceLock};

use super::series::Series;
use crate::audit::record::Record;
use crate::money::NanoUsd;
use crate::usage::Source;

/// The most that one request adds to a counter, in nano-dollars, so that no upstream's wild number makes it run over.
const STEP_MAX: u64 = 1 << 53;

/// The metrics.
#[derive(Debug)]
pub(super) struct Spent {
    cost: Series<ModelLabels, Counter>,
    unpriced: Series<ModelLabels, Counter>,
    by_tenant: Series<TenantLabels, Counter>,
    estimated: Counter,
    partial: Counter,
}

/// The handles of one route. They live with the policy, so that a request looks nothing up.
#[derive(Debug, Default)]
pub struct SpentMeters(OnceLock<Handles>);

#[derive(Debug)]
struct Handles {
    cost: Counter,
    unpriced: Counter,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ModelLabels {
    gen_ai_request_model: Arc<str>,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct TenantLabels {
    tenant: Arc<str>,
    gen_ai_request_model: Arc<str>,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct SourceLabels {
    source: &'static str,
}

impl Spent {
    pub(super) fn new(registry: &mut Registry) -> Self {
        let (cost, unpriced) = (Series::default(), Series::default());
        let estimated = Family::<SourceLabels, Counter>::default();
        let of = |source: Source| estimated.get_or_create_owned(&SourceLabels { source: source.name() });
        registry.register("cost_nanousd", "What requests cost, in billionths of a dollar", cost.family());
        let by_tenant = Series::<TenantLabels, Counter>::default();
        let help = "What requests of the tenants cost that the policy lists, in billionths of a dollar";
        registry.register("tenant_cost_nanousd", help, by_tenant.family());
        registry.register("unpriced", "Requests that used a model without a price", unpriced.family());
        registry.register("usage_estimated", "Requests whose usage the upstream did not tell", estimated.clone());
        Self { cost, unpriced, by_tenant, estimated: of(Source::Estimated), partial: of(Source::Partial) }
    }

    /// Makes a series of each.
    pub(super) fn show(&self) {
        let labels = ModelLabels { gen_ai_request_model: "".into() };
        let _held = (self.cost.of(&labels), self.unpriced.of(&labels));
        self.by("".into(), "".into(), NanoUsd(0));
    }

    /// Models of other names, and tenants that are not measured any more, leave the page.
    pub(super) fn keep(&self, models: &HashSet<&str>, tenants: &HashSet<&str>) {
        let stays = |labels: &ModelLabels| models.contains(&*labels.gen_ai_request_model);
        self.cost.keep(stays);
        self.unpriced.keep(stays);
        let stays = |labels: &TenantLabels| models.contains(&*labels.gen_ai_request_model);
        self.by_tenant.keep(|labels| tenants.contains(&*labels.tenant) && stays(labels));
    }

    /// How many series of tenants there are.
    pub(super) fn len(&self) -> usize {
        self.by_tenant.len()
    }

    /// A request is over whose tenant's cost is measured.
    pub(super) fn by(&self, tenant: Arc<str>, gen_ai_request_model: Arc<str>, cost: NanoUsd) {
        let labels = TenantLabels { tenant, gen_ai_request_model };
        self.by_tenant.of(&labels).inc_by(cost.0.min(STEP_MAX));
    }

    /// A request is over. `model` names the route that it went to.
    pub(super) fn finished(&self, record: &Record<'_>, meters: &SpentMeters, model: impl FnOnce() -> Arc<str>) {
        match record.usage.source {
            Source::Estimated => drop(self.estimated.inc()),
            Source::Partial => drop(self.partial.inc()),
            Source::None | Source::Upstream => {}
        }
        if record.cost.is_none() && !record.unpriced {
            return;
        }
        let handles = meters.0.get_or_init(|| {
            let labels = ModelLabels { gen_ai_request_model: model() };
            let (cost, unpriced) = (&self.cost, &self.unpriced);
            Handles { cost: cost.of(&labels), unpriced: unpriced.of(&labels) }
        });
        match record.cost {
            Some(cost) => drop(handles.cost.inc_by(cost.nanousd.0.min(STEP_MAX))),
            None => drop(handles.unpriced.inc()),
        }
    }
}
