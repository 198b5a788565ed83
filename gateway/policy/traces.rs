//! What the policy says of traces: which are kept, and where they go.

use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue, Uri};
use sha2::Digest;

use super::{Compiler, file};
use crate::pool::origin::{Host, Origin};
use crate::relay::headers::is_framing;
use crate::telemetry::trace::{Target, Traces};

/// Where a collector listens that runs beside the gateway.
const USUAL_ENDPOINT: &str = "http://localhost:4318";

impl Compiler<'_> {
    pub(super) fn traces(&mut self, traces: &file::Traces) -> Option<Traces> {
        // A check that makes do without secrets gets made-up values for all that it asks for.
        let (env, real) = (self.world.env, self.world.secret_files);
        let from_env = |name: &str| env(name).filter(|value| real && !value.is_empty());
        let endpoint = traces.endpoint.clone().or_else(|| from_env("OTEL_EXPORTER_OTLP_ENDPOINT"));
        let endpoint = endpoint.unwrap_or_else(|| USUAL_ENDPOINT.to_owned());
        let service = traces.service_name.clone().or_else(|| from_env("OTEL_SERVICE_NAME"));
        let service = service.unwrap_or_else(|| "infergate".to_owned());
        // They may come from the environment, and decide as much as the file does.
        self.secrets.update(&endpoint);
        self.secrets.update(&service);
        let url = url(&endpoint).map_err(|error| self.wrong("telemetry.traces.endpoint", error));
        let headers = self.trace_headers(traces);
        let slow = (traces.slow_ms > 0).then_some(Duration::from_millis(traces.slow_ms));
        let target = Target { url: url.ok()?, headers: headers?, service };
        Some(Traces::new(traces.share, slow, traces.errors, target))
    }

    fn trace_headers(&mut self, traces: &file::Traces) -> Option<HeaderMap> {
        let before = self.problems.len();
        let mut headers = HeaderMap::new();
        for (name, value) in &traces.headers {
            let path = format!("telemetry.traces.headers.{name}");
            headers.extend(self.trace_header(&path, name, value));
        }
        for (name, source) in &traces.secret_headers {
            let path = format!("telemetry.traces.secret_headers.{name}");
            let Some(secret) = self.secret(&path, source) else { continue };
            let header = self.trace_header(&path, name, secret.reveal());
            headers.extend(header.map(|(name, mut value)| {
                value.set_sensitive(true);
                (name, value)
            }));
        }
        (self.problems.len() == before).then_some(headers)
    }

    fn trace_header(&mut self, path: &str, name: &str, value: &str) -> Option<(HeaderName, HeaderValue)> {
        match (name.parse::<HeaderName>(), HeaderValue::from_str(value)) {
            (Ok(name), Ok(value)) if !is_framing(&name) => return Some((name, value)),
            (Ok(_), Ok(_)) => self.wrong(path, "the gateway itself sets this header: take it out"),
            _ => self.wrong(path, "this is no valid header"),
        }
        None
    }
}

/// The collector's URL for traces, from its base.
fn url(endpoint: &str) -> Result<Uri, String> {
    let (origin, path) = Origin::parse(endpoint, file::Http2::Never)?;
    if matches!(origin.host, Host::Unix(_)) {
        return Err(format!("{endpoint}: a collector is asked over http:// or https://"));
    }
    let scheme = if origin.tls { "https" } else { "http" };
    let url = format!("{scheme}://{}{path}/v1/traces", origin.authority());
    url.parse().map_err(|error| format!("{endpoint} is no URL: {error}"))
}

#[cfg(test)]
mod tests {
    use super::url;

    #[test]
    fn the_path_for_traces_goes_behind_the_base() {
        assert_eq!(url("http://localhost:4318/").unwrap(), "http://localhost:4318/v1/traces");
        assert_eq!(url("https://otel.example.com/x").unwrap(), "https://otel.example.com/x/v1/traces");
        assert_eq!(url("http://[::1]:4318").unwrap(), "http://[::1]:4318/v1/traces");
        for wrong in ["localhost:4318", "unix:/run/x", "http://user:pass@x", "http://x?y=1", "ftp://x", ""] {
            assert!(url(wrong).is_err(), "{wrong}");
        }
    }
}
