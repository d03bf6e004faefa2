//! Who may connect from where: options that `kecho` and `kechod` share.

use std::path::PathBuf;

use clap::Args;
use xbee_kecho::TlsFiles;

/// Options of TLS.
#[derive(Debug, Args)]
pub struct Security {
    /// Certificates, in PEM, of the authority of those who connect from other machines.
    #[arg(long, requires = "certificate", requires = "key", global = true)]
    ca: Option<PathBuf>,
    /// The own certificate, in PEM.
    #[arg(long, requires = "ca", global = true)]
    certificate: Option<PathBuf>,
    /// The certificate's key, in PEM.
    #[arg(long, requires = "ca", global = true)]
    key: Option<PathBuf>,
    /// Revocation lists, in PEM, one of every authority; read again when it changes. While it is broken or out of
    /// date nobody gets in from other machines.
    #[arg(long, requires = "ca", global = true)]
    crl: Option<PathBuf>,
    /// Whether TCP may leave the machine without TLS.
    #[arg(long, global = true)]
    pub plaintext: bool,
    /// Whether TCP within the machine needs TLS too, because other users of it are not to be trusted.
    #[arg(long, global = true)]
    pub strict: bool,
    /// On a host: xbed's socket for guests (`guests-socket`), to reach one's own guests over vsock and be reached by them.
    #[arg(long, global = true, value_name = "PATH", env = "KECHO_GUESTS")]
    pub guests: Option<PathBuf>,
}

impl Security {
    /// The files, if they are given.
    pub fn tls(&self) -> Option<TlsFiles> {
        Some(TlsFiles {
            ca: self.ca.clone()?,
            certificate: self.certificate.clone()?,
            key: self.key.clone()?,
            crl: self.crl.clone(),
        })
    }
}

/// Tells on the standard error what went wrong, with its causes.
pub fn complain(program: &str, error: &dyn std::error::Error) {
    let mut text = format!("{program}: {error}");
    let mut cause = error.source();
    while let Some(error) = cause {
        text += &format!(": {error}");
        cause = error.source();
    }
    eprintln!("{text}");
}
