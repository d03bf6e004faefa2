//! A small certification authority, for people who have none: a directory with `ca.pem`, `ca.key`, `crl.pem`, `subjects`,
//! and `NAME.pem` and `NAME.key` of each that was issued. `openssl` reads all of them but the list of subjects.
//!
//! Keys are in PKCS #8, unencrypted, and for their owner alone (mode 0600). A file is written whole or not at all.

use std::fs::{self, File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use openssl::asn1::{Asn1Integer, Asn1Time};
use openssl::bn::{BigNum, MsbOption};
use openssl::ec::{EcGroup, EcKey};
use openssl::error::ErrorStack;
use openssl::hash::MessageDigest;
use openssl::nid::Nid;
use openssl::pkey::{PKey, Private};
use openssl::rsa::Rsa;
use openssl::x509::extension::{
    AuthorityKeyIdentifier, BasicConstraints, ExtendedKeyUsage, KeyUsage, SubjectKeyIdentifier,
};
use openssl::x509::{
    CrlNumber, X509, X509Builder, X509Crl, X509CrlBuilder, X509Name, X509Revoked,
    X509RevokedBuilder,
};

use crate::trust::{self, Role};

/// For how long a CA's certificate is valid, days.
pub const CA_DAYS: u32 = 3650;
/// For how long a certificate is valid, days.
pub const CERTIFICATE_DAYS: u32 = 365;
/// A revocation list is out of date after so many days; then nobody is believed until it is signed again ([`revoke`]).
pub const CRL_DAYS: u32 = 365;
/// X.520's upper bound of a common name, characters.
const MAX_NAME_CHARS: usize = 64;
/// As RFC 5280 has it, 20 bytes at most; 16 of chance.
const SERIAL_BITS: i32 = 127;
/// Clocks that are so late still take a new certificate, seconds.
const EARLIER_S: i64 = 300;

/// Why the CA did not do it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A name that is no file's, or too long.
    #[error(
        "the name {0:?}: expected 1 to 64 of A-Z a-z 0-9 . _ @ -, beginning with a letter or digit, not 'ca' or 'crl'"
    )]
    Name(String),
    /// The file is there already.
    #[error("{} exists already", .0.display())]
    Exists(PathBuf),
    /// Cannot read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Cannot write.
    #[error("cannot write {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// No certificate, key or revocation list is in the file.
    #[error("{} is not in PEM, or not what its name says", path.display())]
    Pem {
        /// The file.
        path: PathBuf,
        /// Why.
        source: ErrorStack,
    },
    /// On the list of subjects in another role.
    #[error("{} has {subject} in another role: change that line, if it is wrong", path.display())]
    Listed {
        /// The list.
        path: PathBuf,
        /// The subject.
        subject: String,
    },
    /// The certificate is of another CA.
    #[error("{} was not issued by this CA", .0.display())]
    Foreign(PathBuf),
    /// OpenSSL failed.
    #[error("OpenSSL failed")]
    OpenSsl(#[from] ErrorStack),
}

impl Error {
    /// Stable name for programs.
    pub fn code(&self) -> &'static str {
        match self {
            Error::Name(_) => "bad-name",
            Error::Exists(_) => "exists",
            Error::Read { .. } => "cannot-read",
            Error::Write { .. } => "cannot-write",
            Error::Pem { .. } => "bad-pem",
            Error::Listed { .. } => "listed",
            Error::Foreign(_) => "foreign-certificate",
            Error::OpenSsl(_) => "openssl",
        }
    }
}

/// Kinds of keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Kind {
    /// ECDSA and ECDH on P-256.
    #[default]
    P256,
    /// RSA with 3072 bits.
    Rsa3072,
}

/// The files of a certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Issued {
    /// The certificate.
    pub certificate: PathBuf,
    /// Its key.
    pub key: PathBuf,
}

/// Makes a CA in the directory, which is made too: its key, its certificate, an empty revocation list.
pub fn init(dir: &Path, name: &str, kind: Kind) -> Result<Issued, Error> {
    let subject = common_name(name)?;
    fs::create_dir_all(dir).map_err(|source| Error::Write {
        path: dir.to_owned(),
        source,
    })?;
    let key = generate(kind)?;
    let mut builder = start(&subject, &key, CA_DAYS)?;
    builder.set_issuer_name(&subject)?;
    builder.append_extension(BasicConstraints::new().critical().ca().build()?)?;
    builder.append_extension(
        KeyUsage::new()
            .critical()
            .key_cert_sign()
            .crl_sign()
            .build()?,
    )?;
    let id = SubjectKeyIdentifier::new().build(&builder.x509v3_context(None, None))?;
    builder.append_extension(id)?;
    let id = AuthorityKeyIdentifier::new()
        .keyid(true)
        .build(&builder.x509v3_context(None, None));
    // A root's own is the same as its subject's; where OpenSSL cannot say it, it may be left out (RFC 5280, 4.2.1.1).
    if let Ok(id) = id {
        builder.append_extension(id)?;
    }
    builder.sign(&key, MessageDigest::sha256())?;
    let certificate = builder.build();
    let issued = save(dir, "ca", &certificate, &key)?;
    let ca = Ca { certificate, key };
    let list = ca.list(Vec::new(), BigNum::from_u32(1)?)?;
    put(&dir.join("crl.pem"), &list.to_pem()?, 0o644, false)?;
    Ok(issued)
}

/// Makes a key and a certificate for the name, of a user.
pub fn issue(dir: &Path, name: &str, kind: Kind) -> Result<Issued, Error> {
    issue_for(dir, name, kind, CERTIFICATE_DAYS)
}

/// The same of a daemon, which is good for TLS between hosts too.
pub fn issue_daemon(dir: &Path, name: &str, kind: Kind) -> Result<Issued, Error> {
    let mut usage = ExtendedKeyUsage::new();
    usage.email_protection().server_auth().client_auth();
    issue_with(dir, name, kind, CERTIFICATE_DAYS, usage)
}

/// With 0 days, one that is expired already.
pub(crate) fn issue_for(dir: &Path, name: &str, kind: Kind, days: u32) -> Result<Issued, Error> {
    let mut usage = ExtendedKeyUsage::new();
    usage.email_protection();
    issue_with(dir, name, kind, days, usage)
}

fn issue_with(
    dir: &Path,
    name: &str,
    kind: Kind,
    days: u32,
    purposes: ExtendedKeyUsage,
) -> Result<Issued, Error> {
    let subject = common_name(name)?;
    let ca = Ca::open(dir)?;
    let key = generate(kind)?;
    let mut builder = start(&subject, &key, days)?;
    builder.set_issuer_name(ca.certificate.subject_name())?;
    builder.append_extension(BasicConstraints::new().critical().build()?)?;
    let mut usage = KeyUsage::new();
    usage.critical().digital_signature();
    match kind {
        Kind::P256 => usage.key_agreement(),
        Kind::Rsa3072 => usage.key_encipherment(),
    };
    builder.append_extension(usage.build()?)?;
    builder.append_extension(purposes.build()?)?;
    let context = builder.x509v3_context(Some(&ca.certificate), None);
    let ids = [
        SubjectKeyIdentifier::new().build(&context)?,
        AuthorityKeyIdentifier::new().keyid(true).build(&context)?,
    ];
    for id in ids {
        builder.append_extension(id)?;
    }
    builder.sign(&ca.key, MessageDigest::sha256())?;
    save(dir, name, &builder.build(), &key)
}

/// Puts a name on the list of subjects (`subjects` in the directory), which is made if there is none; says where it is. A
/// name that is on it in another role stays as it is, which is an error.
pub fn list(dir: &Path, name: &str, role: Role) -> Result<PathBuf, Error> {
    let known = common_name(name)?;
    let subject = trust::subject(&known).map_err(|_| Error::Name(name.into()))?;
    let lock = lock(dir)?;
    let path = dir.join("subjects");
    let mut text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        Err(source) => return Err(Error::Read { path, source }),
    };
    let line = format!("{} {subject}", role.word());
    if !text.lines().any(|known| known.trim() == line) {
        let is_listed = |known: &str| {
            known
                .trim()
                .split_once(' ')
                .is_some_and(|(_, s)| s == subject)
        };
        if text.lines().any(is_listed) {
            return Err(Error::Listed { path, subject });
        }
        if !text.is_empty() && !text.ends_with('\n') {
            text.push('\n');
        }
        text.push_str(&line);
        text.push('\n');
        put(&path, text.as_bytes(), 0o644, true)?;
    }
    drop(lock);
    Ok(path)
}

/// Keeps others from changing the same files, as long as it is held.
fn lock(dir: &Path) -> Result<File, Error> {
    let path = dir.join("ca.pem");
    File::open(&path)
        .and_then(|file| file.lock().map(|()| file))
        .map_err(|source| Error::Read { path, source })
}

/// Puts the certificates on the revocation list, for good, and signs it again. Without certificates it is only signed.
pub fn revoke(dir: &Path, certificates: &[PathBuf]) -> Result<(), Error> {
    let lock = lock(dir)?;
    let ca = Ca::open(dir)?;
    let path = dir.join("crl.pem");
    let old = X509Crl::from_pem(&read(&path)?).map_err(|source| Error::Pem {
        path: path.clone(),
        source,
    })?;
    let mut revoked = Vec::new();
    for entry in old.get_revoked().into_iter().flatten() {
        revoked.push(entry.to_owned()?);
    }
    for path in certificates {
        let certificate = X509::from_pem(&read(path)?).map_err(|source| Error::Pem {
            path: path.clone(),
            source,
        })?;
        if !certificate.verify(&ca.key)? {
            return Err(Error::Foreign(path.clone()));
        }
        let serial = certificate.serial_number().to_bn()?;
        let known = |entry: &X509Revoked| Ok(entry.serial_number().to_bn()? == serial);
        if !any(&revoked, known)? {
            let mut entry = X509RevokedBuilder::new()?;
            entry.set_serial_number(certificate.serial_number())?;
            let now = Asn1Time::days_from_now(0)?;
            entry.set_revocation_date(&now)?;
            revoked.push(entry.build());
        }
    }
    let number = match old.extension::<CrlNumber>()? {
        Some((_, number)) => number.to_bn()?,
        None => BigNum::new()?,
    };
    let mut next = number;
    next.add_word(1)?;
    let list = ca.list(revoked, next)?;
    put(&path, &list.to_pem()?, 0o644, true)?;
    drop(lock);
    Ok(())
}

fn any(
    revoked: &[X509Revoked],
    is: impl Fn(&X509Revoked) -> Result<bool, ErrorStack>,
) -> Result<bool, ErrorStack> {
    for entry in revoked {
        if is(entry)? {
            return Ok(true);
        }
    }
    Ok(false)
}

struct Ca {
    certificate: X509,
    key: PKey<Private>,
}

impl Ca {
    fn open(dir: &Path) -> Result<Self, Error> {
        let pem = |name: &str| {
            let path = dir.join(name);
            move |source| Error::Pem { path, source }
        };
        let certificate = read(&dir.join("ca.pem"))?;
        let key = read(&dir.join("ca.key"))?;
        Ok(Ca {
            certificate: X509::from_pem(&certificate).map_err(pem("ca.pem"))?,
            key: PKey::private_key_from_pem_callback(&key, |_| Ok(0)).map_err(pem("ca.key"))?,
        })
    }

    fn list(&self, revoked: Vec<X509Revoked>, number: BigNum) -> Result<X509Crl, ErrorStack> {
        let mut list = X509CrlBuilder::new()?;
        list.set_issuer_name(self.certificate.subject_name())?;
        list.set_last_update(&*Asn1Time::from_unix(now_s() - EARLIER_S)?)?;
        list.set_next_update(&*Asn1Time::days_from_now(CRL_DAYS)?)?;
        // The context of a certificate: only the CA's identifier is taken from it.
        let context = X509Builder::new()?;
        let context = context.x509v3_context(Some(&self.certificate), None);
        list.append_extension(AuthorityKeyIdentifier::new().keyid(true).build(&context)?)?;
        list.append_extension(CrlNumber::new(number)?.build()?)?;
        for entry in revoked {
            list.add_revoked(entry)?;
        }
        list.sort()?;
        list.sign(&self.key, MessageDigest::sha256())?;
        list.build()
    }
}

fn now_s() -> i64 {
    time::OffsetDateTime::now_utc().unix_timestamp()
}

fn generate(kind: Kind) -> Result<PKey<Private>, ErrorStack> {
    match kind {
        Kind::P256 => {
            let group = EcGroup::from_curve_name(Nid::X9_62_PRIME256V1)?;
            PKey::from_ec_key(EcKey::generate(&group)?)
        }
        Kind::Rsa3072 => PKey::from_rsa(Rsa::generate(3072)?),
    }
}

fn common_name(name: &str) -> Result<X509Name, Error> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "._@-".contains(c);
    let good = !["ca", "crl"].contains(&name)
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.chars().all(allowed)
        && name.len() <= MAX_NAME_CHARS;
    if !good {
        return Err(Error::Name(name.into()));
    }
    let mut subject = X509Name::builder()?;
    subject.append_entry_by_nid(Nid::COMMONNAME, name)?;
    Ok(subject.build())
}

/// All but issuer and extensions. With 0 days, it has expired.
fn start(subject: &X509Name, key: &PKey<Private>, days: u32) -> Result<X509Builder, ErrorStack> {
    let mut builder = X509Builder::new()?;
    builder.set_version(2)?;
    let mut serial = BigNum::new()?;
    serial.rand(SERIAL_BITS, MsbOption::MAYBE_ZERO, false)?;
    builder.set_serial_number(&*Asn1Integer::from_bn(&serial)?)?;
    builder.set_subject_name(subject)?;
    builder.set_pubkey(key)?;
    let now = now_s();
    builder.set_not_before(&*Asn1Time::from_unix(now - EARLIER_S)?)?;
    builder.set_not_after(&*Asn1Time::from_unix(now - 1 + i64::from(days) * 86_400)?)?;
    Ok(builder)
}

/// The key first: a certificate without key is of no use.
fn save(dir: &Path, name: &str, certificate: &X509, key: &PKey<Private>) -> Result<Issued, Error> {
    let issued = Issued {
        certificate: dir.join(format!("{name}.pem")),
        key: dir.join(format!("{name}.key")),
    };
    put(&issued.key, &key.private_key_to_pem_pkcs8()?, 0o600, false)?;
    put(&issued.certificate, &certificate.to_pem()?, 0o644, false)?;
    Ok(issued)
}

/// Writes a file as a whole; over another one only with `replace`.
fn put(path: &Path, bytes: &[u8], mode: u32, replace: bool) -> Result<(), Error> {
    let failed = |source| Error::Write {
        path: path.to_owned(),
        source,
    };
    let dir = path.parent().unwrap_or(Path::new("."));
    let write = || {
        // Made with mode 0600.
        let mut file = tempfile::NamedTempFile::new_in(dir)?;
        file.write_all(bytes)?;
        let file_ref = file.as_file();
        file_ref.set_permissions(Permissions::from_mode(mode))?;
        file_ref.sync_all()?;
        let kept = match replace {
            true => file.persist(path),
            false => file.persist_noclobber(path),
        };
        kept.map_err(|error| error.error)?;
        File::open(dir)?.sync_all()
    };
    write().map_err(|source| match source.kind() {
        io::ErrorKind::AlreadyExists => Error::Exists(path.to_owned()),
        _ => failed(source),
    })
}

fn read(path: &Path) -> Result<Vec<u8>, Error> {
    fs::read(path).map_err(|source| Error::Read {
        path: path.to_owned(),
        source,
    })
}
