//! Servers and helpers shared by the tests.
#![allow(dead_code, reason = "each test binary uses its own part")]

pub mod ftp;
pub mod http;

use std::io::Write;
use std::path::{Path, PathBuf};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use xbee_staging::{
    Compression, Creation, Destination, Digest, Error, FetchRequest, Fetched, Identity, Limits,
    Progress, PutRequest, Stager,
};

/// A directory for one test, and what is done in it.
pub struct Bench {
    pub dir: tempfile::TempDir,
    pub stager: Stager,
}

impl Bench {
    pub fn new() -> Self {
        Self::with_limits(Limits::default())
    }

    pub fn with_limits(limits: Limits) -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
            stager: Stager::new(limits),
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, bytes).unwrap();
        path
    }

    /// Names in the directory, hidden ones included.
    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = std::fs::read_dir(self.dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    pub fn request(&self, uri: &str) -> FetchRequest {
        FetchRequest {
            uri: uri.parse().unwrap(),
            hash: None,
            compression: None,
            destination: Destination::File(self.path("out")),
            identity: Identity::current(),
        }
    }

    pub async fn run(&self, request: FetchRequest) -> Result<Fetched, Error> {
        let progress = watch::channel(Progress::default()).0;
        self.stager
            .fetch(request, progress, &CancellationToken::new())
            .await
    }

    /// Fetches to the file `out`.
    pub async fn fetch(&self, uri: &str) -> Result<Fetched, Error> {
        self.run(self.request(uri)).await
    }

    /// Fetches to the file `out` with a digest and a compression.
    pub async fn fetch_as(
        &self,
        uri: &str,
        hash: Option<Digest>,
        compression: Option<Compression>,
    ) -> Result<Fetched, Error> {
        self.run(FetchRequest {
            hash,
            compression,
            ..self.request(uri)
        })
        .await
    }

    /// Unpacks to the directory `tree`.
    pub async fn unpack(&self, uri: &str, compression: Compression) -> Result<Fetched, Error> {
        self.run(FetchRequest {
            compression: Some(compression),
            destination: Destination::Unpack(self.path("tree")),
            ..self.request(uri)
        })
        .await
    }

    pub async fn put(&self, source: &Path, uri: &str, creation: Creation) -> Result<u64, Error> {
        let request = PutRequest {
            uri: uri.parse().unwrap(),
            source: source.to_path_buf(),
            creation,
            identity: Identity::current(),
            repeatable: None,
        };
        let progress = watch::channel(Progress::default()).0;
        self.stager
            .put(request, progress, &CancellationToken::new())
            .await
    }

    pub fn out(&self) -> Vec<u8> {
        std::fs::read(self.path("out")).unwrap()
    }
}

pub fn file_uri(path: &Path) -> String {
    url::Url::from_file_path(path).unwrap().to_string()
}

/// Bytes that do not compress, the same for the same seed.
pub fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        })
        .collect()
}

/// Compresses with the format's own encoder.
pub fn pack(compression: Compression, bytes: &[u8]) -> Vec<u8> {
    match compression {
        Compression::Bzip2 | Compression::Tbz => {
            let mut encoder = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::fast());
            encoder.write_all(bytes).unwrap();
            encoder.finish().unwrap()
        }
        Compression::Gzip | Compression::Tgz => {
            let mut encoder =
                flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            encoder.write_all(bytes).unwrap();
            encoder.finish().unwrap()
        }
        Compression::Xz | Compression::Txz => {
            let mut encoder = liblzma::write::XzEncoder::new(Vec::new(), 1);
            encoder.write_all(bytes).unwrap();
            encoder.finish().unwrap()
        }
        Compression::Zstd | Compression::Tzst => {
            let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap();
            encoder.include_checksum(true).unwrap();
            encoder.write_all(bytes).unwrap();
            encoder.finish().unwrap()
        }
        Compression::Tar => bytes.to_vec(),
    }
}
