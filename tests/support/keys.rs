//! API keys for tests, and policies that ask for them.

use infergate_plugins::authenticator::keys::Fresh;
use infergate_plugins::secret::Secret;

use super::Gateway;

/// The pepper of all test policies, in `INFERGATE_PEPPER`.
pub const PEPPER: &str = "canary-pepper-of-at-least-thirty-two-characters";

/// A key and its entry in YAML.
#[derive(Clone)]
pub struct Key {
    /// The key itself.
    pub text: String,
    /// Its entry, on one line.
    pub entry: String,
}

/// A key of `tenant` whose entry has `more` members, like `name: ci`.
pub fn key(tenant: &str, more: &str) -> Key {
    let fresh = Fresh::make(|bytes| {
        bytes.iter_mut().for_each(|byte| *byte = fastrand::u8(..));
        Ok(())
    });
    let fresh = fresh.unwrap();
    let (prefix, hash) = (fresh.prefix(), fresh.hash(&Secret::new(PEPPER)));
    let more = if more.is_empty() { String::new() } else { format!(", {more}") };
    Key {
        text: fresh.key().reveal().to_owned(),
        entry: format!("{{tenant: {tenant}, prefix: {prefix}, hash: '{hash}'{more}}}"),
    }
}

/// A list of these keys' entries in YAML, each line indented by `indent`.
pub fn entries(keys: &[&Key], indent: usize) -> String {
    keys.iter().map(|key| format!("{:indent$}- {}\n", "", key.entry)).collect()
}

/// What asks for one of these keys, to be put behind a policy; `tenants` is YAML in flow style.
pub fn asks_for(keys: &[&Key], tenants: &str) -> String {
    let list = if keys.is_empty() { String::new() } else { format!("      list:\n{}", entries(keys, 8)) };
    format!("tenants: {tenants}\nauthenticators:\n  - keys:\n      pepper: {{env: INFERGATE_PEPPER}}\n{list}")
}

/// A gateway with this policy and the pepper, ready.
pub async fn start(policy: &str, settings: &str) -> Gateway {
    let env = [("INFERGATE_PEPPER", PEPPER), ("INFERGATE_LOG", "debug")];
    let gateway = Gateway::spawn(policy, &format!("threads: 2\n{settings}"), &[], &env);
    gateway.ready().await;
    gateway
}
