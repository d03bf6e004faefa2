//! Whom to believe now, and what becomes of connections to those who are not believed any more.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use rustix::net::{Shutdown, shutdown};
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, RootCertStore, SignatureScheme,
};
use tokio::time::sleep;

use super::broken;
use crate::error::Error;

/// How often it is looked at whether those are still to be believed who are connected.
const RECHECK: Duration = Duration::from_secs(2);
/// The most bytes of a file of revocation lists.
const MAX_LIST_BYTES: u64 = 16 << 20;

/// What the other end of a connection is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Peer {
    Client,
    Server,
}

/// Believes those whose certificate is an authority's, as client and as server. Nodes are known by their identifiers,
/// not by names.
#[derive(Debug)]
pub(crate) struct Trust {
    roots: Arc<RootCertStore>,
    subjects: Vec<DistinguishedName>,
    provider: Arc<CryptoProvider>,
    list: Option<PathBuf>,
    loaded: Mutex<Option<Loaded>>,
    sessions: Mutex<Vec<Weak<Session>>>,
}

/// What the file of revocation lists has said when it was like this; what was wrong with it.
#[derive(Debug, Clone)]
struct Loaded {
    stamp: Option<Stamp>,
    verifiers: Result<Verifiers, String>,
}

#[derive(Debug, Clone)]
struct Verifiers {
    clients: Arc<dyn ClientCertVerifier>,
    servers: Arc<WebPkiServerVerifier>,
}

/// Changes whenever the file does, if it is replaced or its length or time changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp(u64, u64, u64, i64, i64);

/// A connection whose other end has shown a certificate.
#[derive(Debug)]
pub(crate) struct Session {
    socket: OwnedFd,
    peer: Peer,
    chain: Vec<CertificateDer<'static>>,
}

fn stamp(path: &Path) -> io::Result<Stamp> {
    let meta = std::fs::metadata(path)?;
    Ok(Stamp(
        meta.dev(),
        meta.ino(),
        meta.len(),
        meta.mtime(),
        meta.mtime_nsec(),
    ))
}

fn lists(path: &Path) -> Result<Vec<CertificateRevocationListDer<'static>>, String> {
    let mut bytes = Vec::new();
    let read = File::open(path).and_then(|f| f.take(MAX_LIST_BYTES + 1).read_to_end(&mut bytes));
    match read.map_err(|error| error.to_string())? as u64 {
        0..=MAX_LIST_BYTES => {}
        _ => return Err(format!("it has more than {MAX_LIST_BYTES} bytes")),
    }
    let all = CertificateRevocationListDer::pem_slice_iter(&bytes);
    match all.collect::<Result<Vec<_>, _>>() {
        Ok(all) if all.is_empty() => Err("no revocation list in it".to_owned()),
        Ok(all) => Ok(all),
        Err(error) => Err(error.to_string()),
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Trust {
    /// # Errors
    /// There are no authorities, or the list is none. One that is out of date is no error: nobody is believed.
    pub(super) fn load(
        roots: RootCertStore,
        provider: Arc<CryptoProvider>,
        list: Option<PathBuf>,
    ) -> Result<Arc<Trust>, Error> {
        let trust = Trust {
            subjects: roots.subjects(),
            roots: Arc::new(roots),
            provider,
            list: list.clone(),
            loaded: Mutex::new(None),
            sessions: Mutex::default(),
        };
        if let Err(why) = trust.verifiers() {
            return Err(broken(&list.unwrap_or_default())(why));
        }
        Ok(Arc::new(trust))
    }

    /// As the list is now.
    fn verifiers(&self) -> Result<Verifiers, String> {
        let (now, unreadable) = match self.list.as_deref().map(stamp).transpose() {
            Ok(stamp) => (stamp, None),
            Err(error) => (None, Some(error.to_string())),
        };
        let mut loaded = locked(&self.loaded);
        match &*loaded {
            Some(Loaded { stamp, verifiers }) if *stamp == now && unreadable.is_none() => {
                return verifiers.clone();
            }
            _ => {}
        }
        let before = loaded.as_ref().map(|loaded| loaded.verifiers.is_ok());
        let verifiers = match unreadable {
            Some(why) => Err(why),
            None => self.read(),
        };
        // At the start it is said by an error.
        if let (Err(why), Some(true), Some(list)) = (&verifiers, before, &self.list) {
            tracing::warn!(list = %list.display(), why, "no use for TLS: nobody is believed until it is put right");
        }
        *loaded = Some(Loaded {
            stamp: now,
            verifiers: verifiers.clone(),
        });
        verifiers
    }

    fn read(&self) -> Result<Verifiers, String> {
        let lists = self.list.as_deref().map_or(Ok(Vec::new()), lists)?;
        let (roots, provider) = (self.roots.clone(), self.provider.clone());
        let clients = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone());
        let clients = clients.with_crls(lists.iter().cloned());
        let clients = clients.enforce_revocation_expiration().build();
        let servers = WebPkiServerVerifier::builder_with_provider(roots, provider);
        let servers = servers.with_crls(lists).enforce_revocation_expiration();
        Ok(Verifiers {
            clients: clients.map_err(|error| error.to_string())?,
            servers: servers.build().map_err(|error| error.to_string())?,
        })
    }

    fn check(
        &self,
        peer: Peer,
        certificate: &CertificateDer<'_>,
        between: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), rustls::Error> {
        let verifiers = self.verifiers().map_err(|why| {
            let list = self.list.as_deref().unwrap_or(Path::new(""));
            rustls::Error::General(format!("{}: no use for TLS: {why}", list.display()))
        })?;
        if peer == Peer::Client {
            return verifiers
                .clients
                .verify_client_cert(certificate, between, now)
                .map(|_| ());
        }
        let nobody = ServerName::IpAddress(std::net::Ipv6Addr::UNSPECIFIED.into());
        let checked = verifiers
            .servers
            .verify_server_cert(certificate, between, &nobody, &[], now);
        match checked {
            // The name is what is looked at when all else is good.
            Err(rustls::Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) => Ok(()),
            other => other.map(|_| ()),
        }
    }

    /// Has a connection ended when who is at its other end is not believed any more, as long as what is returned lives.
    pub(crate) fn watch(
        &self,
        socket: BorrowedFd<'_>,
        peer: Peer,
        chain: Option<&[CertificateDer<'_>]>,
    ) -> io::Result<Arc<Session>> {
        let chain = chain.unwrap_or_default().iter();
        let session = Arc::new(Session {
            socket: socket.try_clone_to_owned()?,
            peer,
            chain: chain.map(|one| one.clone().into_owned()).collect(),
        });
        let mut sessions = locked(&self.sessions);
        if sessions.len() == sessions.capacity() {
            sessions.retain(|session| session.strong_count() > 0);
        }
        sessions.push(Arc::downgrade(&session));
        Ok(session)
    }

    /// Looks again and again.
    pub(crate) async fn keep_checking(self: Arc<Self>) {
        loop {
            sleep(RECHECK).await;
            let sessions: Vec<Weak<Session>> = locked(&self.sessions).clone();
            let now = UnixTime::now();
            let mut known: HashMap<(Peer, Vec<CertificateDer<'static>>), Option<String>> =
                HashMap::new();
            for session in sessions.iter().filter_map(Weak::upgrade) {
                let key = (session.peer, session.chain.clone());
                let wrong = match known.get(&key) {
                    Some(wrong) => wrong.clone(),
                    None => {
                        let wrong = match session.chain.split_first() {
                            Some((certificate, between)) => self
                                .check(session.peer, certificate, between, now)
                                .err()
                                .map(|error| error.to_string()),
                            None => Some("it has shown no certificate".to_owned()),
                        };
                        known.insert(key, wrong.clone());
                        // There may be many.
                        tokio::task::yield_now().await;
                        wrong
                    }
                };
                if let Some(why) = wrong {
                    tracing::info!(
                        why,
                        "a connection ends: its other end is not believed any more"
                    );
                    // It may have ended.
                    let _ = shutdown(&session.socket, Shutdown::Both);
                }
            }
            locked(&self.sessions).retain(|session| session.strong_count() > 0);
        }
    }
}

impl ServerCertVerifier for Trust {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.check(Peer::Server, end_entity, intermediates, now)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}

impl ClientCertVerifier for Trust {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &self.subjects
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.check(Peer::Client, end_entity, intermediates, now)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        ServerCertVerifier::verify_tls12_signature(self, message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        ServerCertVerifier::verify_tls13_signature(self, message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        ServerCertVerifier::supported_verify_schemes(self)
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, date_time_ymd};

    use super::*;

    /// 2030-01-01 and 2032-01-01, in seconds.
    const BEFORE: u64 = 1_893_456_000;
    const AFTER: u64 = 1_956_528_000;

    #[test]
    fn a_certificate_is_believed_until_it_expires_whatever_its_name_and_side() {
        let mut parameters = CertificateParams::new(Vec::new()).unwrap();
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let authority = parameters.self_signed(&key).unwrap();
        let issuer = Issuer::new(parameters, key);
        let mut parameters = CertificateParams::new(vec!["somebody".to_owned()]).unwrap();
        parameters.not_after = date_time_ymd(2031, 1, 1);
        let key = KeyPair::generate().unwrap();
        let certificate = parameters.signed_by(&key, &issuer).unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(authority.der().clone()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let trust = Trust::load(roots, provider, None).unwrap();
        for peer in [Peer::Client, Peer::Server] {
            let at = |seconds| UnixTime::since_unix_epoch(Duration::from_secs(seconds));
            let check = |now| trust.check(peer, certificate.der(), &[], now);
            check(at(BEFORE)).unwrap();
            let error = check(at(AFTER)).unwrap_err().to_string();
            assert!(error.contains("xpired"), "{error}");
        }
    }
}
