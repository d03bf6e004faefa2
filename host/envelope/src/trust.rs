//! Whom to believe: certificates of the CAs, revocation lists, and the subjects that may do something.
//!
//! The subjects are a text file, one a line: a role (`user` or `daemon`), a space, and the subject as
//! `openssl x509 -noout -subject -nameopt RFC2253` prints it. Lines that are empty or begin with `#` are skipped.
//!
//! All files are looked at before each decision and read again when one has changed. As long as one of them cannot be
//! read, nobody is believed.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use openssl::error::ErrorStack;
use openssl::nid::Nid;
use openssl::ssl::SslFiletype;
use openssl::stack::Stack;
use openssl::x509::store::{X509Lookup, X509Store, X509StoreBuilder};
use openssl::x509::verify::{X509VerifyFlags, X509VerifyParam};
use openssl::x509::{X509, X509KeyUsage, X509NameRef, X509PurposeId, X509Ref, X509StoreContext};

/// A file of certificates, revocation lists or subjects has at most so many bytes.
pub const MAX_FILE_BYTES: u64 = 16 << 20;
/// Security level of keys and signatures in a chain, as OpenSSL counts: 112 bits, so no RSA under 2048 and no SHA-1.
const LEVEL: i32 = 2;

/// Why a certificate is not believed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// One of the files cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// One of the files is larger than [`MAX_FILE_BYTES`].
    #[error("{} has more than {MAX_FILE_BYTES} bytes", .0.display())]
    Large(PathBuf),
    /// No certificates or revocation lists are in the file.
    #[error("{} has nothing in PEM of what is expected there", path.display())]
    Pem {
        /// The file.
        path: PathBuf,
        /// Why.
        source: ErrorStack,
    },
    /// A line of the subjects' file.
    #[error("line {line} of {}: expected 'user' or 'daemon', a space, and a subject like CN=alice,O=Site", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// From 1.
        line: usize,
    },
    /// No chain to one of the CAs, or not valid now, or revoked.
    #[error("the certificate of {subject} is not believed: {reason}")]
    Chain {
        /// The subject.
        subject: String,
        /// OpenSSL's words.
        reason: &'static str,
    },
    /// The certificate is for something else.
    #[error("the certificate of {0} is not for signatures and encryption")]
    Usage(String),
    /// Not in the subjects' file.
    #[error("{0} is not in the list of subjects")]
    NotListed(String),
    /// A subject that has no text.
    #[error("the subject of a certificate cannot be written as text")]
    Subject,
    /// OpenSSL failed.
    #[error("OpenSSL failed")]
    OpenSsl(#[from] ErrorStack),
}

/// What a subject may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Asks.
    User,
    /// Answers.
    Daemon,
}

impl Role {
    /// As it stands in the list of subjects.
    pub fn word(self) -> &'static str {
        match self {
            Role::User => "user",
            Role::Daemon => "daemon",
        }
    }
}

/// Where it is written whom to believe. All in PEM but the subjects.
#[derive(Debug, Clone)]
pub struct Files {
    /// Certificates of the CAs: roots, and what is between.
    pub authorities: PathBuf,
    /// Revocation lists, one of every CA. One that is out of date lets nobody in.
    pub revoked: PathBuf,
    /// The subjects.
    pub subjects: PathBuf,
}

/// Decides whom to believe.
pub struct Trust {
    files: Files,
    loaded: Mutex<Option<Loaded>>,
}

struct Loaded {
    stamps: [Stamp; 3],
    store: X509Store,
    roles: HashMap<String, Role>,
}

/// Changes whenever the file does, if it is replaced or its length or time changes.
#[derive(PartialEq)]
struct Stamp(u64, u64, u64, i64, i64);

impl Trust {
    /// The files are read when they are needed first.
    pub fn new(files: Files) -> Self {
        Trust {
            files,
            loaded: Mutex::new(None),
        }
    }

    /// What the certificate's subject may do; an error if it is not to be believed now.
    pub fn check(&self, certificate: &X509Ref) -> Result<Role, Error> {
        let subject = subject(certificate.subject_name())?;
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        let stamps = self.stamps()?;
        if loaded.as_ref().is_none_or(|loaded| loaded.stamps != stamps) {
            *loaded = None;
            *loaded = Some(self.load(stamps)?);
        }
        let Some(Loaded { store, roles, .. }) = &*loaded else {
            return Err(Error::NotListed(subject));
        };
        let mut context = X509StoreContext::new()?;
        let none = Stack::new()?;
        let (good, reason) = context.init(store, certificate, &none, |context| {
            Ok((context.verify_cert()?, context.error().error_string()))
        })?;
        if !good {
            return Err(Error::Chain { subject, reason });
        }
        let both = X509KeyUsage::KEY_ENCIPHERMENT | X509KeyUsage::KEY_AGREEMENT;
        let usable = |usage: X509KeyUsage| {
            usage.contains(X509KeyUsage::DIGITAL_SIGNATURE) && usage.intersects(both)
        };
        if !certificate.key_usage().is_none_or(usable) {
            return Err(Error::Usage(subject));
        }
        let role = roles.get(&subject).copied();
        role.ok_or(Error::NotListed(subject))
    }

    fn stamps(&self) -> Result<[Stamp; 3], Error> {
        let Files {
            authorities,
            revoked,
            subjects,
        } = &self.files;
        Ok([stamp(authorities)?, stamp(revoked)?, stamp(subjects)?])
    }

    /// `stamps` are from before the files are read: what changes meanwhile is read again next time.
    fn load(&self, stamps: [Stamp; 3]) -> Result<Loaded, Error> {
        let pem = |path: &Path| {
            let path = path.to_owned();
            move |source| Error::Pem { path, source }
        };
        let Files {
            authorities,
            revoked,
            subjects,
        } = &self.files;
        let mut store = X509StoreBuilder::new()?;
        let certificates = X509::stack_from_pem(&read(authorities)?).map_err(pem(authorities))?;
        for certificate in certificates {
            store.add_cert(certificate)?;
        }
        let mut param = X509VerifyParam::new()?;
        param.set_auth_level(LEVEL);
        param.set_flags(X509VerifyFlags::CRL_CHECK | X509VerifyFlags::CRL_CHECK_ALL)?;
        param.set_purpose(X509PurposeId::SMIME_SIGN)?;
        store.set_param(&param)?;
        let lookup = store.add_lookup(X509Lookup::file())?;
        lookup
            .load_crl_file(revoked, SslFiletype::PEM)
            .map_err(pem(revoked))?;
        Ok(Loaded {
            stamps,
            store: store.build(),
            roles: roles(subjects, &read(subjects)?)?,
        })
    }
}

fn stamp(path: &Path) -> Result<Stamp, Error> {
    let meta = fs::metadata(path).map_err(|source| Error::Read {
        path: path.to_owned(),
        source,
    })?;
    if meta.len() > MAX_FILE_BYTES {
        return Err(Error::Large(path.to_owned()));
    }
    Ok(Stamp(
        meta.dev(),
        meta.ino(),
        meta.len(),
        meta.mtime(),
        meta.mtime_nsec(),
    ))
}

fn read(path: &Path) -> Result<Vec<u8>, Error> {
    let mut bytes = Vec::new();
    fs::File::open(path)
        .and_then(|file| file.take(MAX_FILE_BYTES).read_to_end(&mut bytes))
        .map_err(|source| Error::Read {
            path: path.to_owned(),
            source,
        })?;
    Ok(bytes)
}

fn roles(path: &Path, text: &[u8]) -> Result<HashMap<String, Role>, Error> {
    let mut roles = HashMap::new();
    for (n, line) in text.split(|&c| c == b'\n').enumerate() {
        let line = line.trim_ascii();
        if line.is_empty() || line.starts_with(b"#") {
            continue;
        }
        let parsed = std::str::from_utf8(line).ok().and_then(|line| {
            let (role, subject) = line.split_once(' ')?;
            let role = match role {
                "user" => Role::User,
                "daemon" => Role::Daemon,
                _ => return None,
            };
            let subject = subject.trim();
            let new = subject.contains('=') && !roles.contains_key(subject);
            new.then(|| (subject.to_owned(), role))
        });
        let (subject, role) = parsed.ok_or_else(|| Error::Line {
            path: path.to_owned(),
            line: n + 1,
        })?;
        roles.insert(subject, role);
    }
    Ok(roles)
}

/// A subject as text (RFC 2253): the last part first, special characters escaped.
pub fn subject(name: &X509NameRef) -> Result<String, Error> {
    let mut parts = Vec::new();
    for entry in name.entries() {
        let nid = entry.object().nid();
        if nid == Nid::UNDEF {
            return Err(Error::Subject);
        }
        let key = nid.short_name().map_err(|_| Error::Subject)?;
        let value = entry.data().to_string().map_err(|_| Error::Subject)?;
        // Stands for what is no text; two subjects must not look the same.
        if value.contains('\u{fffd}') {
            return Err(Error::Subject);
        }
        parts.push(format!("{key}={}", escaped(&value)));
    }
    if parts.is_empty() {
        return Err(Error::Subject);
    }
    parts.reverse();
    Ok(parts.join(","))
}

fn escaped(value: &str) -> String {
    let last = value.chars().count().saturating_sub(1);
    let mut text = String::new();
    for (n, c) in value.chars().enumerate() {
        match c {
            ',' | '+' | '"' | '\\' | '<' | '>' | ';' => text.extend(['\\', c]),
            '#' if n == 0 => text.push_str("\\#"),
            ' ' if n == 0 || n == last => text.push_str("\\ "),
            ' '..='~' => text.push(c),
            // Bytes, so that no line of a log or of the list is broken.
            _ => {
                for byte in c.encode_utf8(&mut [0; 4]).bytes() {
                    // A String takes everything.
                    let _ = write!(text, "\\{byte:02X}");
                }
            }
        }
    }
    text
}
