//! Who one is to others, and whom one believes: files as `xbe pki` leaves them. `DIR/NAME` stands for the certificate
//! `DIR/NAME.pem` and its key `DIR/NAME.key`; beside them are `ca.pem`, `crl.pem` and `subjects`. `DIR` alone will do where
//! it has one key that is not the authority's.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use xbee_envelope::seal::{self, Endpoint, Identity};
use xbee_envelope::trust::{self, Trust};

/// Largest certificate or key, bytes.
const MAX_PEM_BYTES: u64 = 1 << 20;

/// Why there is no identity.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file cannot be read.
    #[error("cannot read {}: `xbe pki issue` makes what belongs there", path.display())]
    Read {
        /// The file or directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Too long for what it should be.
    #[error("{} is no certificate or key", .0.display())]
    Large(PathBuf),
    /// No key, or several.
    #[error("{} has {count} keys: name one, as {}/NAME", path.display(), path.display())]
    Which {
        /// The directory.
        path: PathBuf,
        /// How many.
        count: usize,
    },
    /// Certificate, key or kept streams are not as they should be.
    #[error("{} cannot be used", path.display())]
    Seal {
        /// The certificate.
        path: PathBuf,
        /// Why.
        #[source]
        source: Box<seal::Error>,
    },
}

impl Error {
    /// Stable code for programs.
    pub fn code(&self) -> &'static str {
        "no-identity"
    }
}

/// The files of an identity.
#[derive(Debug, Clone)]
pub struct Files {
    /// The certificate.
    pub certificate: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// Whom to believe.
    pub trust: trust::Files,
}

impl Files {
    /// Those of `DIR/NAME`, or of the one key in `DIR`.
    pub fn find(path: &Path) -> Result<Files, Error> {
        let (dir, stem) = match path.is_dir() {
            true => (path, only_key(path)?),
            false => (path.parent().unwrap_or(Path::new("")), path.to_owned()),
        };
        let with = |end: &str| {
            let mut name = stem.clone().into_os_string();
            name.push(end);
            PathBuf::from(name)
        };
        Ok(Files {
            certificate: with(".pem"),
            key: with(".key"),
            trust: trust::Files {
                authorities: dir.join("ca.pem"),
                revoked: dir.join("crl.pem"),
                subjects: dir.join("subjects"),
            },
        })
    }

    /// An end for messages. `streams` is as for [`Endpoint::new`].
    pub fn open(self, streams: Option<PathBuf>) -> Result<Endpoint, Error> {
        let failed = |source| Error::Seal {
            path: self.certificate.clone(),
            source: Box::new(source),
        };
        let identity = Identity::from_pem(&read(&self.certificate)?, &read(&self.key)?);
        let identity = identity.map_err(failed)?;
        // They are read again whenever they change; what is missing now is an error at once.
        let Files { trust, .. } = &self;
        for path in [&trust.authorities, &trust.revoked, &trust.subjects] {
            fs::File::open(path).map_err(|source| Error::Read {
                path: path.clone(),
                source,
            })?;
        }
        Endpoint::new(identity, Trust::new(trust.clone()), streams).map_err(failed)
    }
}

/// `DIR/NAME` of the one `DIR/NAME.key` that is not `ca.key`.
fn only_key(dir: &Path) -> Result<PathBuf, Error> {
    let failed = |source| Error::Read {
        path: dir.to_owned(),
        source,
    };
    let mut keys = vec![];
    for entry in fs::read_dir(dir).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let is_key = path.extension().is_some_and(|end| end == "key");
        if is_key && path.file_name().is_some_and(|name| name != "ca.key") {
            keys.push(path.with_extension(""));
        }
    }
    let count = keys.len();
    match (keys.pop(), count) {
        (Some(key), 1) => Ok(key),
        _ => Err(Error::Which {
            path: dir.to_owned(),
            count,
        }),
    }
}

fn read(path: &Path) -> Result<Vec<u8>, Error> {
    let failed = |source| Error::Read {
        path: path.to_owned(),
        source,
    };
    if fs::metadata(path).map_err(failed)?.len() > MAX_PEM_BYTES {
        return Err(Error::Large(path.to_owned()));
    }
    fs::read(path).map_err(failed)
}
