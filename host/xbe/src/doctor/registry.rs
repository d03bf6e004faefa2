//! Whether hosts find each other: what `xbed` needs for `[kecho]`.

use std::path::Path;

use xbee_api::chain;
use xbee_carry::identity::Files;
use xbee_kecho::{Address, Config, Error, Node, TlsFiles};

use super::{Look, warning};

/// The registry of channels, asked as a host asks it: with TLS where there is an identity.
pub async fn look(address: Address, identity: Option<&Path>) -> Look {
    let tls = match identity.map(Files::find).transpose() {
        Ok(files) => files.map(|files| TlsFiles {
            ca: files.trust.authorities,
            certificate: files.certificate,
            key: files.key,
            crl: Some(files.trust.revoked),
        }),
        Err(error) => return warning(chain(&error), "xbe pki issue --daemon NAME"),
    };
    let asked = tokio::task::spawn_blocking(move || ask(address, tls)).await;
    match asked.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic())) {
        Ok(found) => Ok(found),
        Err(Error::Tls { path, why }) => warning(
            format!("{}: {why}", path.display()),
            "name a daemon with --identity: DIR/NAME for DIR/NAME.pem and .key, beside ca.pem and crl.pem",
        ),
        Err(error) => warning(
            chain(&error),
            "between machines, both sides need certificates that `xbe pki issue --daemon` has made: \
             kechod registry --ca, --certificate and --key, and here --identity",
        ),
    }
}

fn ask(address: Address, tls: Option<TlsFiles>) -> Result<String, Error> {
    let failed = |source| Error::System {
        what: "make a directory for a socket".to_owned(),
        source,
    };
    let directory = tempfile::tempdir().map_err(failed)?;
    let node = Node::start(Config {
        registry: Some(address.clone()),
        strict: tls.is_some(),
        tls,
        directory: Some(directory.path().to_owned()),
        ..Config::default()
    })?;
    let channels = node.channels()?.len();
    let s = if channels == 1 { "" } else { "s" };
    Ok(format!("{address} answers and knows {channels} channel{s}"))
}
