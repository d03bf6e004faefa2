//! TLS between hosts: whoever has a certificate of the authority is one of us, whatever its name, unless it was revoked.

mod trust;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::Resumption;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::NoServerSessionStorage;
use rustls::{ClientConfig, RootCertStore, ServerConfig};

use crate::error::Error;
pub(crate) use trust::{Peer, Session, Trust};

/// Files in PEM.
#[derive(Debug, Clone)]
pub struct TlsFiles {
    /// Certificates of the authorities that the others' certificates are of.
    pub ca: PathBuf,
    /// This node's certificate, and those between it and an authority.
    pub certificate: PathBuf,
    /// The certificate's key.
    pub key: PathBuf,
    /// Revocation lists, one of every authority. It is read again whenever it changes; while it cannot be read, or is
    /// out of date, nobody is believed.
    pub crl: Option<PathBuf>,
}

/// Both sides of TLS.
#[derive(Debug, Clone)]
pub(crate) struct Tls {
    pub client: Arc<ClientConfig>,
    pub server: Arc<ServerConfig>,
    pub trust: Arc<Trust>,
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, Error> {
    let all = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    match all {
        Ok(all) if all.is_empty() => Err(broken(path)("no certificate in it")),
        Ok(all) => Ok(all),
        Err(error) => Err(broken(path)(error)),
    }
}

fn broken<E: ToString>(path: &Path) -> impl Fn(E) -> Error {
    move |error| Error::Tls {
        path: path.to_owned(),
        why: error.to_string(),
    }
}

impl Tls {
    pub(crate) fn load(files: &TlsFiles) -> Result<Tls, Error> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut roots = RootCertStore::empty();
        for certificate in certificates(&files.ca)? {
            roots.add(certificate).map_err(broken(&files.ca))?;
        }
        let trust = Trust::load(roots, provider.clone(), files.crl.clone())?;
        let chain = certificates(&files.certificate)?;
        let key = PrivateKeyDer::from_pem_file(&files.key).map_err(broken(&files.key))?;
        let failed = broken(&files.certificate);
        let mut server = ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(&failed)?
            .with_client_cert_verifier(trust.clone())
            .with_single_cert(chain.clone(), key.clone_key())
            .map_err(&failed)?;
        let mut client = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(&failed)?
            .dangerous()
            .with_custom_certificate_verifier(trust.clone())
            .with_client_auth_cert(chain, key)
            .map_err(&failed)?;
        // Who resumes a session is not asked for its certificate.
        server.session_storage = Arc::new(NoServerSessionStorage {});
        server.send_tls13_tickets = 0;
        client.resumption = Resumption::disabled();
        Ok(Tls {
            client: Arc::new(client),
            server: Arc::new(server),
            trust,
        })
    }
}
