//! A page with every metric that there is, whatever has happened: for the reference.

use super::{EndpointLevel, Table, Telemetry};
use crate::policy::file::OnStoreError;
use crate::pool::feed::Heard;
use crate::pool::told::Cache;

impl Telemetry {
    /// The page of a process in which everything has been counted once. Its numbers mean nothing.
    pub fn shown() -> String {
        let all = Self::new();
        let runtime = tokio::runtime::Builder::new_current_thread().build().ok();
        let _on = runtime.as_ref().map(|runtime| runtime.enter());
        all.runtimes.add("");
        all.policy_loaded(1, "");
        let endpoint = EndpointLevel {
            pool: String::new(),
            upstream: String::new(),
            address: String::new(),
            in_flight: 0,
            healthy: true,
            breaker: 0,
            work: Some((0, 0, 0.0)),
            cache: Some(Cache::default()),
            events: Some((Heard::default(), true)),
        };
        all.levels(&[(String::new(), 0, 0)], &[endpoint], 0);
        all.limit_levels([("", 0, 0)].into_iter(), 0, 0);
        all.lease_held([("", 0)].into_iter());
        all.limit_degraded(OnStoreError::Allow);
        all.admin_denied("");
        let _held = (all.attempts("", ""), all.retries_refused(""), all.hedges(""), all.store(), all.limit(""));
        let _held = (all.sink(""), all.guardrail(""), all.issuer(""));
        all.tables([Table { name: "", entries: 0, room: Some(0) }].into_iter());
        all.spent.show();
        all.routes.show();
        all.genai.show();
        all.text()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_metric_is_left_out() {
        let page = Telemetry::shown();
        let types: Vec<&str> = page.lines().filter_map(|line| line.strip_prefix("# TYPE ")).collect();
        let registry = format!("{:?}", Telemetry::new().registry.lock());
        let names: Vec<&str> =
            registry.split("Descriptor { name: \"").skip(1).filter_map(|rest| rest.split('"').next()).collect();
        assert!(names.len() > 60, "{}", names.len());
        for name in names {
            assert!(types.iter().any(|told| told.contains(name)), "{name} is not shown");
        }
    }
}
