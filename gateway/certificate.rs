//! What a client's certificate says of its holder, read once, when the connection is made.

use std::time::{Duration, UNIX_EPOCH};

use infergate_plugins::authenticator::mtls::Certificate;
use x509_parser::certificate::X509Certificate;
use x509_parser::der_parser::asn1_rs::FromDer;
use x509_parser::extensions::GeneralName;
use x509_parser::x509::AttributeTypeAndValue;

/// The longest certificate that is read.
const BYTES_MAX: usize = 64 << 10;

/// Reads a certificate (DER). Who vouches for it has been checked before; `None` where it cannot be read in one way only.
pub fn read(der: &[u8]) -> Option<Certificate> {
    let (rest, certificate) = X509Certificate::from_der(der.get(..BYTES_MAX.min(der.len()))?).ok()?;
    if !rest.is_empty() || der.len() > BYTES_MAX {
        return None;
    }
    let subject = certificate.subject();
    let names = certificate.subject_alternative_name().ok()?;
    let uri = |name: &GeneralName<'_>| match name {
        GeneralName::URI(uri) => Some((*uri).to_owned()),
        _ => None,
    };
    let ends = u64::try_from(certificate.validity().not_after.timestamp()).ok()?;
    Some(Certificate {
        uris: names.iter().flat_map(|names| names.value.general_names.iter().filter_map(uri)).collect(),
        common_names: texts(subject.iter_common_name())?,
        organizations: texts(subject.iter_organization())?,
        units: texts(subject.iter_organizational_unit())?,
        subject: subject.to_string().chars().filter(|char| !char.is_control()).take(256).collect(),
        ends: UNIX_EPOCH.checked_add(Duration::from_secs(ends))?,
    })
}

fn texts<'a>(attributes: impl Iterator<Item = &'a AttributeTypeAndValue<'a>>) -> Option<Vec<String>> {
    attributes.map(|attribute| attribute.as_str().ok().map(str::to_owned)).collect()
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, DnType, KeyPair, SanType};

    use super::*;

    #[test]
    fn names_and_the_end_are_read_and_nothing_else_counts() {
        let mut params = CertificateParams::new(vec!["dns.test".to_owned()]).unwrap();
        params.subject_alt_names.push(SanType::URI("spiffe://a.test/x".try_into().unwrap()));
        for (kind, text) in [
            (DnType::CommonName, "ci"),
            (DnType::OrganizationName, "Acme, Inc."),
            (DnType::OrganizationalUnitName, "Build"),
        ] {
            params.distinguished_name.push(kind, text);
        }
        params.not_after = rcgen::date_time_ymd(2040, 2, 1);
        let made = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
        let read_back = read(made.der()).unwrap();
        assert_eq!(read_back.uris, ["spiffe://a.test/x"]);
        assert_eq!(read_back.spiffe(), Some("spiffe://a.test/x"));
        assert_eq!(
            (&read_back.common_names[..], &read_back.units[..]),
            (&["ci".to_owned()][..], &["Build".to_owned()][..])
        );
        assert_eq!(read_back.organizations, ["Acme, Inc."]);
        assert_eq!(Some(read_back.ends), crate::time::parse("2040-02-01T00:00:00Z"));
        assert!(read_back.subject.contains("CN=ci"), "{}", read_back.subject);
    }

    #[test]
    fn what_is_no_certificate_is_none_and_never_a_panic() {
        let made = rcgen::generate_simple_self_signed(["a.test".to_owned()]).unwrap();
        let der = made.cert.der().to_vec();
        assert!(read(&der).is_some());
        assert!(read(&[&der[..], &[0]].concat()).is_none(), "something follows");
        for cut in 0..der.len() {
            assert!(read(&der[..cut]).is_none(), "{cut}");
        }
        for _ in 0..2_000 {
            let mut wild = der.clone();
            for _ in 0..3 {
                let at = fastrand::usize(..wild.len());
                wild[at] = fastrand::u8(..);
            }
            let _ = read(&wild);
        }
    }
}
