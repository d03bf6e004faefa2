//! Trust for HTTPS: the platform's certificate authorities and those the operator adds.

use std::path::Path;
use std::sync::Arc;

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, RootCertStore};
use rustls_platform_verifier::Verifier;

use crate::error::ErrorKind;

/// A client configuration that trusts the platform and the PEM file `ca_file`.
pub(crate) fn client_config(ca_file: Option<&Path>) -> Result<ClientConfig, ErrorKind> {
    let extra = match ca_file {
        Some(path) => read_certificates(path)?,
        None => Vec::new(),
    };
    let broken = |error: rustls::Error| ErrorKind::Connect {
        source: error.into(),
    };
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(broken)?;
    match Verifier::new_with_extra_roots(extra, provider) {
        Ok(verifier) => Ok(builder
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_no_client_auth()),
        // Plain HTTP must work on a host without certificates; HTTPS then trusts nobody.
        Err(error) => {
            tracing::warn!(
                %error,
                "no certificate authorities: every https transfer will fail; \
                 install ca-certificates or configure a CA file"
            );
            Ok(builder
                .with_root_certificates(RootCertStore::empty())
                .with_no_client_auth())
        }
    }
}

fn read_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, ErrorKind> {
    let what = "cannot read the CA file";
    let failed = |error: rustls::pki_types::pem::Error| {
        ErrorKind::local(what, path, std::io::Error::other(error))
    };
    let certificates = CertificateDer::pem_file_iter(path)
        .map_err(failed)?
        .collect::<Result<Vec<_>, _>>()
        .map_err(failed)?;
    match certificates.is_empty() {
        true => Err(ErrorKind::local(
            what,
            path,
            std::io::Error::other("it contains no PEM certificate"),
        )),
        false => Ok(certificates),
    }
}
