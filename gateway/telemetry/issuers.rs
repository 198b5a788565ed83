//! The metrics of identity providers' keys.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct IssuerLabels {
    issuer: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ReadLabels {
    issuer: String,
    result: &'static str,
}

/// What the keys of one issuer tell.
#[derive(Clone, Debug)]
pub struct IssuerMeters {
    /// How many keys are known.
    pub keys: Gauge,
    /// 0 since the newest reading failed, else 1.
    pub healthy: Gauge,
    /// Times that they were read.
    pub read: Counter,
    /// Times that they could not be read.
    pub failed: Counter,
}

/// The metrics of all issuers.
#[derive(Debug, Default)]
pub(super) struct Issuers {
    keys: Family<IssuerLabels, Gauge>,
    healthy: Family<IssuerLabels, Gauge>,
    reads: Family<ReadLabels, Counter>,
}

impl Issuers {
    pub(super) fn new(registry: &mut Registry) -> Self {
        let issuers = Self::default();
        registry.register("issuer_keys", "Keys that are known of an issuer", issuers.keys.clone());
        registry.register("issuer_healthy", "0 since its keys could not be read", issuers.healthy.clone());
        registry.register("issuer_reads", "Readings of an issuer's keys by result", issuers.reads.clone());
        issuers
    }

    pub(super) fn of(&self, issuer: &str) -> IssuerMeters {
        let labels = IssuerLabels { issuer: issuer.to_owned() };
        let reads = |result| self.reads.get_or_create_owned(&ReadLabels { issuer: issuer.to_owned(), result });
        IssuerMeters {
            keys: self.keys.get_or_create_owned(&labels),
            healthy: self.healthy.get_or_create_owned(&labels),
            read: reads("read"),
            failed: reads("failed"),
        }
    }

    pub(super) fn forget(&self, issuer: &str) {
        let labels = IssuerLabels { issuer: issuer.to_owned() };
        self.keys.remove(&labels);
        self.healthy.remove(&labels);
        for result in ["read", "failed"] {
            self.reads.remove(&ReadLabels { issuer: issuer.to_owned(), result });
        }
    }
}
