//! From the store of shared limits as it is written to how it is talked to.

use std::sync::Arc;
use std::time::Duration;

use super::{Compiler, file};
use crate::limits::shared::Parameters;
use crate::secret::{Secret, SecretSource};

impl Compiler<'_> {
    pub(super) fn shared(&mut self, shared: &file::Shared) -> Option<Arc<Parameters>> {
        let fits = |letter: char| letter.is_ascii_alphanumeric() || "_.:-".contains(letter);
        if shared.namespace.is_empty() || shared.namespace.len() > 64 || !shared.namespace.chars().all(fits) {
            self.wrong("shared.namespace", "a namespace has 1 to 64 letters, digits and _ . : -");
        }
        let url = self.store_address(&shared.redis)?;
        Some(Arc::new(Parameters {
            url,
            namespace: shared.namespace.clone(),
            leases: shared.mode == file::SharedMode::Lease,
            timeout: Duration::from_millis(shared.timeout_ms),
            on_error: shared.on_store_error,
            replicas: shared.replicas,
        }))
    }

    /// The address. What is wrong with it is told without it.
    fn store_address(&mut self, address: &file::StoreAddress) -> Option<Secret> {
        const PATH: &str = "shared.redis";
        let sources = [address.url.is_some(), address.env.is_some(), address.file.is_some()];
        if sources.iter().filter(|given| **given).count() != 1 {
            self.wrong(PATH, "give one of url, env and file");
            return None;
        }
        let url = match &address.url {
            Some(url) => Secret::new(url.clone()),
            None => {
                let source = SecretSource { env: address.env.clone(), file: address.file.clone() };
                self.secret(PATH, &source)?
            }
        };
        if address.url.is_none() && !self.world.secret_files {
            // It may be made up.
            return Some(url);
        }
        let Ok(client) = redis::Client::open(url.reveal()) else {
            self.wrong(PATH, "this is no address of a store: write it like redis://HOST:6379/0 or rediss://HOST:6380");
            return None;
        };
        if address.url.is_some() && client.get_connection_info().redis_settings().password().is_some() {
            self.wrong("shared.redis.url", "a password does not stand in the policy: give the address by env or file");
            return None;
        }
        Some(url)
    }
}

#[cfg(test)]
mod tests {
    use crate::policy::tests::{POOLS, compiled, problems};

    #[test]
    fn what_is_wrong_with_a_store_is_told_at_its_line_and_never_its_password() {
        let cases = [
            ("{replicas: 3, redis: {}}", "one of url, env and file"),
            ("{replicas: 3, redis: {url: 'redis://a', env: KEY}}", "one of url, env and file"),
            ("{replicas: 3, redis: {url: 'http://a'}}", "no address of a store"),
            ("{replicas: 3, redis: {url: 'redis://:canary@a:1/0'}}", "a password does not stand in the policy"),
            ("{replicas: 3, redis: {env: KEY}}", "no address of a store"),
            ("{replicas: 3, redis: {env: OTHER}}", "OTHER is not set"),
            ("{redis: {url: 'redis://a'}}", "replicas"),
            ("{replicas: 0, redis: {url: 'redis://a'}}", "replicas"),
            ("{replicas: 3, redis: {url: 'redis://a'}, namespace: '{a}'}", "namespace"),
            ("{replicas: 3, redis: {url: 'redis://a'}, timeout_ms: 0}", "timeout_ms"),
            ("{replicas: 3, redis: {url: 'redis://a'}, mode: exakt}", "exakt"),
            ("{replicas: 3, redis: {url: 'redis://a'}, on_store_error: ask}", "ask"),
        ];
        let line = POOLS.lines().count() + 1;
        for (shared, expected) in cases {
            let told = problems(&format!("{POOLS}shared: {shared}\n"));
            assert!(told.iter().any(|text| text.contains(expected)), "{shared}: {told:?}");
            assert!(told.iter().all(|text| text.starts_with(&format!("policy.yaml:{line}:"))), "{shared}: {told:?}");
            assert!(!told.iter().any(|text| text.contains("canary")), "{told:?}");
        }
        let policy = compiled(&format!("{POOLS}shared: {{replicas: 3, redis: {{url: 'rediss://a:1/2'}}}}\n")).unwrap();
        assert_eq!(policy.shared.unwrap().timeout.as_millis(), 10);
    }
}
