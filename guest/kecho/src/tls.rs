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

#[cfg(test)]
mod tests {
    use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
    use rustls::pki_types::ServerName;
    use rustls::{ClientConnection, Connection, HandshakeKind, ServerConnection};

    use super::*;

    /// Sends what each has for the other, until neither has anything.
    fn talk(client: &mut Connection, server: &mut Connection) {
        while client.wants_write() || server.wants_write() {
            for turn in 0..2 {
                let (from, to) = match turn {
                    0 => (&mut *client, &mut *server),
                    _ => (&mut *server, &mut *client),
                };
                let mut bytes = Vec::new();
                while from.wants_write() {
                    from.write_tls(&mut bytes).unwrap();
                }
                let mut bytes = &bytes[..];
                while !bytes.is_empty() {
                    to.read_tls(&mut bytes).unwrap();
                    to.process_new_packets().unwrap();
                }
            }
        }
    }

    #[test]
    fn each_connection_shows_its_certificates_anew() {
        let mut parameters = CertificateParams::new(Vec::new()).unwrap();
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let authority = parameters.self_signed(&key).unwrap();
        let issuer = Issuer::new(parameters, key);
        let key = KeyPair::generate().unwrap();
        let parameters = CertificateParams::new(vec!["node".to_owned()]).unwrap();
        let certificate = parameters.signed_by(&key, &issuer).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let put = |name: &str, text: String| {
            let path = directory.path().join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        let tls = Tls::load(&TlsFiles {
            ca: put("ca", authority.pem()),
            certificate: put("crt", certificate.pem()),
            key: put("key", key.serialize_pem()),
            crl: None,
        })
        .unwrap();
        for _ in 0..2 {
            let name = ServerName::IpAddress(std::net::Ipv6Addr::LOCALHOST.into());
            let client = ClientConnection::new(tls.client.clone(), name).unwrap();
            let server = ServerConnection::new(tls.server.clone()).unwrap();
            let (mut client, mut server) = (client.into(), server.into());
            talk(&mut client, &mut server);
            assert_eq!(client.handshake_kind(), Some(HandshakeKind::Full));
            assert_eq!(server.handshake_kind(), Some(HandshakeKind::Full));
        }
    }
}
