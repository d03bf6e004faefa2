//! `pki`: certificates for sealed messages.

use xbee_envelope::pki::{self, Kind};
use xbee_envelope::trust::Role;

use crate::cli::{self, PkiAction};
use crate::error::Error;
use crate::term;

/// `pki`. Prints the files that were made.
pub fn pki(args: &cli::Pki) -> Result<u8, Error> {
    let kind = |rsa: bool| if rsa { Kind::Rsa3072 } else { Kind::P256 };
    let made = match &args.action {
        PkiAction::Init { name, rsa } => {
            let made = pki::init(&args.dir, name, kind(*rsa))?;
            vec![made.certificate, made.key, args.dir.join("crl.pem")]
        }
        PkiAction::Issue { name, daemon, rsa } => {
            let (made, role) = match *daemon {
                true => (pki::issue_daemon(&args.dir, name, kind(*rsa)), Role::Daemon),
                false => (pki::issue(&args.dir, name, kind(*rsa)), Role::User),
            };
            let made = made?;
            let list = pki::list(&args.dir, name, role)?;
            vec![made.certificate, made.key, list]
        }
        PkiAction::Revoke { certificates } => {
            pki::revoke(&args.dir, certificates)?;
            vec![args.dir.join("crl.pem")]
        }
    };
    for path in made {
        term::out(term::clean(&path.to_string_lossy()))?;
    }
    Ok(0)
}
