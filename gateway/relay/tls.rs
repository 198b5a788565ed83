//! Certificates of listeners: chosen by SNI, checked before they are used, swapped while connections come in.

use std::any::Any;
use std::path::Path;
use std::sync::Arc;

use arc_swap::ArcSwap;
use async_trait::async_trait;
use pingora::listeners::TlsAccept;
use pingora::listeners::tls::TlsSettings;
use pingora::protocols::tls::TlsRef;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ClientHello, ParsedCertificate, ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use rustls::{DigitallySignedStruct, DistinguishedName, RootCertStore, SignatureScheme, client, crypto};

use crate::certificate;
use crate::settings::{Certificate, Tls};

/// One listener's certificates and client authorities, which can be read again.
#[derive(Debug)]
pub struct ListenerTls {
    settings: Tls,
    loaded: ArcSwap<Loaded>,
}

#[derive(Debug)]
struct Loaded {
    certificates: Vec<Arc<CertifiedKey>>,
    clients: Option<Arc<dyn ClientCertVerifier>>,
}

impl ListenerTls {
    /// Reads the files that the settings name, or says which one is wrong and how.
    pub fn load(settings: &Tls) -> Result<Arc<Self>, String> {
        let loaded = Loaded::read(settings)?;
        Ok(Arc::new(Self { settings: settings.clone(), loaded: ArcSwap::from_pointee(loaded) }))
    }

    /// Reads the files again. If one is wrong, the old ones stay.
    pub fn reload(&self) -> Result<(), String> {
        self.loaded.store(Arc::new(Loaded::read(&self.settings)?));
        Ok(())
    }

    /// What Pingora's listener wants to know.
    pub fn pingora(self: &Arc<Self>) -> Result<TlsSettings, String> {
        let mut tls = TlsSettings::with_callbacks(Box::new(Shown(self.clone()))).map_err(|error| error.to_string())?;
        tls.set_cert_resolver(Arc::new(Resolver(self.clone())));
        if self.settings.client_ca.is_some() {
            tls.set_client_cert_verifier(Arc::new(Clients(self.clone())));
        }
        tls.enable_h2();
        Ok(tls)
    }
}

/// Reads the certificate that a client has shown, once for its connection.
struct Shown(Arc<ListenerTls>);

#[async_trait]
impl TlsAccept for Shown {
    async fn handshake_complete_callback(&self, tls: &TlsRef) -> Option<Arc<dyn Any + Send + Sync>> {
        let (own, above) = tls.peer_cert_chain_der()?.split_first()?;
        let loaded = self.0.loaded.load();
        // A session that is taken up again was checked when it began, perhaps against other authorities.
        let checked = loaded.clients.as_ref()?.verify_client_cert(own, above, UnixTime::now());
        if let Err(error) = checked {
            tracing::debug!(%error, "a certificate of an earlier session is not good any more");
            return None;
        }
        Some(Arc::new(certificate::read(own)?))
    }
}

impl Loaded {
    fn read(settings: &Tls) -> Result<Self, String> {
        let certificates = settings.certificates.iter().map(read_certificate).collect::<Result<_, _>>()?;
        let clients = match &settings.client_ca {
            Some(path) => Some(client_verifier(path, settings.require_client_certificate)?),
            None => None,
        };
        Ok(Self { certificates, clients })
    }
}

fn read_certificate(certificate: &Certificate) -> Result<Arc<CertifiedKey>, String> {
    let chain = read_chain(&certificate.chain)?;
    let told = |error: &dyn std::fmt::Display| format!("{}: {error}", certificate.key.display());
    let key = PrivateKeyDer::from_pem_file(&certificate.key).map_err(|error| told(&error))?;
    let key = CertifiedKey::from_der(chain, key, &crypto::aws_lc_rs::default_provider());
    key.map(Arc::new)
        .map_err(|error| format!("{} does not fit {}: {error}", certificate.key.display(), certificate.chain.display()))
}

fn read_chain(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let told = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
    let chain: Result<Vec<_>, _> = CertificateDer::pem_file_iter(path).map_err(|error| told(&error))?.collect();
    match chain {
        Ok(chain) if chain.is_empty() => Err(told(&"there is no certificate in this file")),
        chain => chain.map_err(|error| told(&error)),
    }
}

fn client_verifier(path: &Path, required: bool) -> Result<Arc<dyn ClientCertVerifier>, String> {
    let mut roots = RootCertStore::empty();
    for certificate in read_chain(path)? {
        roots.add(certificate).map_err(|error| format!("{}: {error}", path.display()))?;
    }
    let provider = Arc::new(crypto::aws_lc_rs::default_provider());
    let builder = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
    let builder = if required { builder } else { builder.allow_unauthenticated() };
    builder.build().map_err(|error| format!("{}: {error}", path.display()))
}

/// Picks the certificate whose names fit the client's SNI.
#[derive(Debug)]
struct Resolver(Arc<ListenerTls>);

impl ResolvesServerCert for Resolver {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let loaded = self.0.loaded.load();
        let named = hello.server_name().and_then(|name| {
            let name = ServerName::try_from(name).ok()?;
            loaded.certificates.iter().find(|key| fits(key, &name))
        });
        named.or(loaded.certificates.first()).cloned()
    }
}

fn fits(key: &CertifiedKey, name: &ServerName<'_>) -> bool {
    let parsed = key.cert.first().and_then(|certificate| ParsedCertificate::try_from(certificate).ok());
    parsed.is_some_and(|certificate| client::verify_server_name(&certificate, name).is_ok())
}

/// Checks clients against the authorities of the moment.
#[derive(Debug)]
struct Clients(Arc<ListenerTls>);

impl Clients {
    fn current(&self) -> Result<Arc<dyn ClientCertVerifier>, rustls::Error> {
        let none = || rustls::Error::General("no client authorities".to_owned());
        self.0.loaded.load().clients.clone().ok_or_else(none)
    }
}

impl ClientCertVerifier for Clients {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // Hints are optional, and they cannot be lent out of something that is swapped.
        &[]
    }

    fn client_auth_mandatory(&self) -> bool {
        self.0.settings.require_client_certificate
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: rustls::pki_types::UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.current()?.verify_client_cert(end_entity, intermediates, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<client::danger::HandshakeSignatureValid, rustls::Error> {
        self.current()?.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<client::danger::HandshakeSignatureValid, rustls::Error> {
        self.current()?.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.current().map(|verifier| verifier.supported_verify_schemes()).unwrap_or_default()
    }
}
