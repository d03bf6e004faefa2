//! Staging: brings a job's files to the host and its results away, by URI.
//!
//! A fetch is one streaming pass: transfer, digest of the bytes as transferred, decompression, and
//! either a sparse write or unpacking into a directory. Nothing is kept whole in memory, nothing is
//! read twice, and a destination exists either complete and verified or not at all.
//!
//! Servers, archives and URIs are hostile: every size, count and time is bounded by [`Limits`],
//! archive entries cannot leave their directory, and credentials in URIs are never printed.
//!
//! Schemes: `file`, `ftp`, `http`, `https`. `file` URIs are opened with the rights of the job's
//! owner ([`Identity`]), because the host manager may run as root for many users.

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod bzip2;
mod bzip2_block;
mod compression;
mod error;
mod fault;
mod fetch;
mod ftp;
mod hash;
mod http;
mod identity;
mod inflow;
mod limits;
mod local;
mod meter;
mod note;
mod output;
mod put;
mod resume;
mod sparse;
mod tls;
mod unpack;
mod uri;
mod version;

pub use compression::{Compression, UnknownCompression};
pub use error::{Error, ErrorKind};
#[cfg(debug_assertions)]
pub use fault::AT_POINT;
pub use fetch::{Destination, FetchRequest, Fetched};
pub use hash::{Algorithm, Digest, InvalidDigest};
pub use identity::Identity;
pub use limits::Limits;
pub use meter::Progress;
pub use note::Repeatable;
pub use put::{Creation, PutRequest};
pub use unpack::{Entry, EntryKind};
pub use uri::{Scheme, Uri};
pub use version::Validators;

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

/// Fetches and puts files. Cheap to share behind an [`Arc`]; holds the HTTP connection pools.
#[derive(Debug)]
pub struct Stager {
    limits: Arc<Limits>,
    ca_file: Option<PathBuf>,
    fetch_client: OnceLock<reqwest::Client>,
    put_client: OnceLock<reqwest::Client>,
}

impl Stager {
    /// A stager that trusts the platform's certificate authorities.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits: Arc::new(limits),
            ca_file: None,
            fetch_client: OnceLock::new(),
            put_client: OnceLock::new(),
        }
    }

    /// Trusts the certificate authorities in the PEM file `path` as well. The file is read when
    /// the first HTTP transfer starts.
    pub fn with_ca_file(mut self, path: &Path) -> Self {
        self.ca_file = Some(path.to_path_buf());
        self
    }
}
