//! Whoever asks, with a tenant of their own.

use std::sync::Arc;
use std::time::SystemTime;

use schemars::JsonSchema;
use serde::Deserialize;

use super::{Answer, Authenticator, Built, Credentials, Identity, Mark, Named};

/// Whoever asks and was not known or refused by one above: without a key, or with one that is none of ours.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Anonymous")]
pub struct Config {
    /// The tenant that pays for them, one of `tenants`.
    #[schemars(length(min = 1))]
    pub tenant: String,
}

#[derive(Debug)]
struct Anonymous(Identity);

pub(super) fn build(config: &Config) -> Built {
    let tenant: Arc<str> = config.tenant.as_str().into();
    let by = "the policy lets anybody in".into();
    let identity = Identity {
        principal: "anonymous".into(),
        tenant,
        plans: [].into(),
        claims: [].into(),
        by,
        mark: [0; 32],
        expires: None,
    };
    let path = ".anonymous.tenant".to_owned();
    let named = Named { path, within: String::new(), tenant: config.tenant.clone() };
    Built { authenticator: Arc::new(Anonymous(identity)), tenants: vec![named] }
}

impl Authenticator for Anonymous {
    fn kind(&self) -> &'static str {
        "anonymous"
    }

    fn ask(&self, _credentials: &Credentials<'_>, _now: SystemTime) -> Answer {
        Answer::Yes(self.0.clone())
    }

    fn still_knows(&self, mark: &Mark) -> bool {
        *mark == self.0.mark
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::authenticator::tests::{built, headers};

    #[test]
    fn anybody_is_let_in_whatever_they_send() {
        let built = built(r#"[{"anonymous":{"tenant":"public"}}]"#).ok().unwrap().remove(0);
        for pairs in [&[][..], &[("authorization", "Bearer sk-none")]] {
            let headers = headers(pairs);
            let answer = built.authenticator.ask(&Credentials::of(&headers), SystemTime::UNIX_EPOCH);
            let Answer::Yes(identity) = answer else { panic!("{answer:?}") };
            assert_eq!((&*identity.principal, &*identity.tenant), ("anonymous", "public"));
            assert!(built.authenticator.still_knows(&identity.mark));
            assert!(!built.authenticator.still_knows(&[1; 32]), "somebody who had a key");
        }
    }
}
