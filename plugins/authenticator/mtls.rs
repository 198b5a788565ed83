//! Client certificates: who was let in by one of the listener's authorities, by SPIFFE ID or subject.

use std::sync::Arc;
use std::time::SystemTime;

use aws_lc_rs::digest::{SHA256, digest};
use schemars::JsonSchema;
use serde::Deserialize;

use super::{Answer, Authenticator, Built, Credentials, Fault, Identity, Mark, Named, Wrong};

/// Client certificates (mTLS). The listener checks them (settings: `client_ca`); this says whose they are. A certificate
/// that fits none of these is left to the next authenticator.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Mtls")]
pub struct Config {
    /// Whose certificates are good; the first that fits.
    #[schemars(length(min = 1))]
    pub identities: Vec<Rule>,
}

/// Certificates that are known. Exactly one of `spiffe` and `subject` must be given.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "CertificateIdentity")]
pub struct Rule {
    /// The SPIFFE ID, the certificate's only URI: `spiffe://acme.example/ns/search/sa/api`. `/*` at its end stands for any
    /// further path.
    #[serde(default)]
    pub spiffe: Option<String>,
    /// What must be in its subject.
    #[serde(default)]
    pub subject: Option<Subject>,
    /// The tenant that pays, one of `tenants`.
    #[schemars(length(min = 1))]
    pub tenant: String,
    /// Who it is, for records. Absent: the SPIFFE ID, or the subject.
    #[serde(default)]
    #[schemars(length(min = 1))]
    pub name: Option<String>,
}

/// Parts of a subject, all of which must be there, to the letter.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(rename = "CertificateSubject")]
pub struct Subject {
    /// Its common name, the only one.
    pub common_name: Option<String>,
    /// One of its organisations.
    pub organization: Option<String>,
    /// One of its units.
    pub unit: Option<String>,
}

/// A certificate that a client has shown and that one of the listener's authorities vouches for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Certificate {
    /// Its URIs.
    pub uris: Vec<String>,
    /// The common names in its subject.
    pub common_names: Vec<String>,
    /// The organisations in its subject.
    pub organizations: Vec<String>,
    /// The units in its subject.
    pub units: Vec<String>,
    /// Its subject on one line.
    pub subject: String,
    /// When it ends.
    pub ends: SystemTime,
}

/// The longest name of a principal, in characters.
const NAME_MAX: usize = 256;

impl Certificate {
    /// Its SPIFFE ID, where it has exactly one URI and that is one (X.509-SVID, 2).
    pub fn spiffe(&self) -> Option<&str> {
        match &self.uris[..] {
            [uri] if is_spiffe(uri) => Some(uri),
            _ => None,
        }
    }
}

/// Whether a text is a SPIFFE ID (SPIFFE-ID, 2), which can be read in one way only.
fn is_spiffe(text: &str) -> bool {
    let Some(rest) = text.strip_prefix("spiffe://").filter(|_| text.len() <= 2_048) else { return false };
    let (domain, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    let is_domain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-._".contains(&byte);
    let is_path = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
    let segments = path.split('/').skip(1);
    let mut good = segments.map(|part| !matches!(part, "" | "." | "..") && part.bytes().all(is_path));
    !domain.is_empty() && domain.bytes().all(is_domain) && good.all(|good| good)
}

#[derive(Debug)]
struct Mtls(Vec<Known>);

#[derive(Debug)]
struct Known {
    rule: Rule,
    tenant: Arc<str>,
    mark: Mark,
}

pub(super) fn build(config: &Config) -> Result<Built, Vec<Wrong>> {
    let (mut known, mut wrong, mut tenants) = (Vec::new(), Vec::new(), Vec::new());
    for (index, rule) in config.identities.iter().enumerate() {
        let path = |key: &str| format!(".mtls.identities[{index}]{key}");
        tenants.push(Named { path: path(".tenant"), within: String::new(), tenant: rule.tenant.clone() });
        wrong.extend(fault(rule).map(|(key, message)| (path(key), message)));
        known.push(Known { rule: rule.clone(), tenant: rule.tenant.as_str().into(), mark: mark(rule) });
    }
    if wrong.is_empty() { Ok(Built { authenticator: Arc::new(Mtls(known)), tenants }) } else { Err(wrong) }
}

fn fault(rule: &Rule) -> Option<(&'static str, String)> {
    let exact = rule.spiffe.as_deref().map(|id| id.strip_suffix("/*").unwrap_or(id));
    match (exact, &rule.subject) {
        (Some(id), None) if is_spiffe(id) => None,
        (Some(_), None) => Some((
            ".spiffe",
            "this is no SPIFFE ID, like spiffe://acme.example/ns/search/* or without a star".to_owned(),
        )),
        (None, Some(subject)) if *subject == Subject::default() => {
            Some((".subject", "every certificate has this: name what must be in its subject".to_owned()))
        }
        (None, Some(_)) => None,
        _ => Some(("", "give one of spiffe, subject and nothing else".to_owned())),
    }
}

/// The same rule has the same mark in every policy.
fn mark(rule: &Rule) -> Mark {
    let subject = rule.subject.clone().unwrap_or_default();
    let parts = [&rule.spiffe, &subject.common_name, &subject.organization, &subject.unit, &Some(rule.tenant.clone())];
    let mut mark = Mark::default();
    mark.copy_from_slice(digest(&SHA256, format!("mtls {parts:?}").as_bytes()).as_ref());
    mark
}

impl Authenticator for Mtls {
    fn kind(&self) -> &'static str {
        "mtls"
    }

    fn ask(&self, credentials: &Credentials<'_>, now: SystemTime) -> Answer {
        let Some(certificate) = credentials.certificate() else { return Answer::Pass };
        let Some(known) = self.0.iter().find(|known| known.rule.takes(certificate)) else { return Answer::Pass };
        let identity = known.identity(certificate);
        // A connection may outlive it.
        if now >= certificate.ends {
            Answer::No(Fault::Refused(format!("{} has expired", identity.by).into()))
        } else {
            Answer::Yes(identity)
        }
    }

    fn still_knows(&self, mark: &Mark) -> bool {
        self.0.iter().any(|known| known.mark == *mark)
    }
}

impl Rule {
    fn takes(&self, certificate: &Certificate) -> bool {
        match (&self.spiffe, &self.subject) {
            (Some(wanted), _) => certificate.spiffe().is_some_and(|id| fits(wanted, id)),
            (None, Some(subject)) => subject.is_of(certificate),
            (None, None) => false,
        }
    }
}

fn fits(wanted: &str, id: &str) -> bool {
    match wanted.strip_suffix('*') {
        // No ID ends with a slash, so something follows.
        Some(before) => id.starts_with(before),
        None => id == wanted,
    }
}

impl Subject {
    fn is_of(&self, certificate: &Certificate) -> bool {
        let has = |wanted: &Option<String>, list: &[String]| wanted.as_ref().is_none_or(|wanted| list.contains(wanted));
        // Of two common names nobody knows which one the authority has checked.
        let named = self.common_name.as_ref().is_none_or(|name| certificate.common_names == [name.as_str()]);
        named && has(&self.organization, &certificate.organizations) && has(&self.unit, &certificate.units)
    }
}

impl Known {
    fn identity(&self, certificate: &Certificate) -> Identity {
        let own = certificate.spiffe().filter(|_| self.rule.spiffe.is_some()).unwrap_or(&certificate.subject);
        let own: String = own.chars().take(NAME_MAX).collect();
        Identity {
            by: format!("the client certificate {own}").into(),
            principal: self.rule.name.clone().unwrap_or(own).into(),
            tenant: self.tenant.clone(),
            plans: [].into(),
            claims: [].into(),
            mark: self.mark,
            expires: Some(certificate.ends),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use http::HeaderMap;

    use super::*;
    use crate::authenticator::tests::built;

    fn certificate(uris: &[&str], names: &[&str], organizations: &[&str]) -> Certificate {
        let texts = |list: &[&str]| list.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>();
        Certificate {
            uris: texts(uris),
            common_names: texts(names),
            organizations: texts(organizations),
            units: Vec::new(),
            subject: format!("CN={}", names.join("+")),
            ends: SystemTime::UNIX_EPOCH + Duration::from_secs(1_000),
        }
    }

    fn rules(identities: &str) -> Result<Arc<dyn Authenticator>, Vec<Wrong>> {
        built(&format!(r#"[{{"mtls":{{"identities":[{identities}]}}}}]"#))
            .map(|mut built| built.remove(0).authenticator)
    }

    fn ask(rules: &Arc<dyn Authenticator>, certificate: Option<&Certificate>, seconds: u64) -> Answer {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        rules.ask(&Credentials::of(&HeaderMap::new()).with(certificate), now)
    }

    fn who(answer: Answer) -> (String, String) {
        let Answer::Yes(identity) = answer else { panic!("{answer:?}") };
        (identity.principal.to_string(), identity.tenant.to_string())
    }

    #[test]
    fn the_first_rule_that_fits_says_whose_it_is() {
        let rules = rules(
            r#"{"spiffe":"spiffe://a.test/ns/search/sa/api","tenant":"api"},
               {"spiffe":"spiffe://a.test/ns/search/*","tenant":"search"},
               {"subject":{"common_name":"ci","organization":"Acme"},"tenant":"ci","name":"builds"}"#,
        )
        .unwrap();
        let of = |uri: &str| ask(&rules, Some(&certificate(&[uri], &["ci"], &[])), 0);
        assert_eq!(who(of("spiffe://a.test/ns/search/sa/api")).1, "api");
        assert_eq!(who(of("spiffe://a.test/ns/search/x")), ("spiffe://a.test/ns/search/x".into(), "search".into()));
        let by_subject = ask(&rules, Some(&certificate(&[], &["ci"], &["Other", "Acme"])), 0);
        assert_eq!(who(by_subject), ("builds".into(), "ci".into()));
    }

    #[test]
    fn what_fits_no_rule_to_the_letter_is_not_for_this_to_say() {
        let rules = rules(
            r#"{"spiffe":"spiffe://a.test/ns/*","tenant":"t"},{"subject":{"common_name":"ci","organization":"Acme"},"tenant":"t"}"#,
        )
        .unwrap();
        for uris in [
            &["spiffe://a.test/ns/"][..],
            &["spiffe://a.test/ns"],
            &["spiffe://a.test/ns/../x"],
            &["spiffe://a.test/ns//x"],
            &["spiffe://a.test/ns/%2e"],
            &["spiffe://A.test/ns/x"],
            &["spiffe://a.test.evil/ns/x"],
            &["https://a.test/ns/x"],
            &["spiffe://a.test/ns/x", "spiffe://a.test/ns/y"],
        ] {
            assert_eq!(ask(&rules, Some(&certificate(uris, &[], &[])), 0), Answer::Pass, "{uris:?}");
        }
        for (names, organizations) in
            [(&["ci"][..], &[][..]), (&["ci", "x"], &["Acme"]), (&["ci2"], &["Acme"]), (&[], &["Acme"])]
        {
            let certificate = certificate(&[], names, organizations);
            assert_eq!(ask(&rules, Some(&certificate), 0), Answer::Pass, "{names:?} {organizations:?}");
        }
        assert_eq!(ask(&rules, None, 0), Answer::Pass);
    }

    #[test]
    fn a_certificate_ends_with_its_time_and_its_holder_with_the_rule() {
        let rule = r#"{"spiffe":"spiffe://a.test/x","tenant":"t"}"#;
        let (known, other) = (rules(rule).unwrap(), rules(&rule.replace("\"t\"", "\"u\"")).unwrap());
        let certificate = certificate(&["spiffe://a.test/x"], &[], &[]);
        let Answer::Yes(identity) = ask(&known, Some(&certificate), 999) else { panic!() };
        assert_eq!(identity.expires, Some(certificate.ends));
        assert!(
            matches!(ask(&known, Some(&certificate), 1_000), Answer::No(Fault::Refused(why)) if why.contains("expired"))
        );
        assert!(known.still_knows(&identity.mark) && !other.still_knows(&identity.mark));
    }

    #[test]
    fn a_wrong_rule_is_told_at_its_place() {
        for (rule, key, told) in [
            (r#"{"tenant":"t"}"#, "", "give one of spiffe, subject"),
            (r#"{"tenant":"t","spiffe":"spiffe://a/b","subject":{"unit":"x"}}"#, "", "give one of spiffe, subject"),
            (r#"{"tenant":"t","subject":{}}"#, ".subject", "every certificate has this"),
            (r#"{"tenant":"t","spiffe":"spiffe://a.test/n*"}"#, ".spiffe", "no SPIFFE ID"),
            (r#"{"tenant":"t","spiffe":"a.test/x"}"#, ".spiffe", "no SPIFFE ID"),
        ] {
            let wrong = rules(rule).err().unwrap();
            assert_eq!(wrong[0].0, format!("[0].mtls.identities[0]{key}"), "{rule}");
            assert!(wrong[0].1.contains(told), "{}", wrong[0].1);
        }
    }
}
