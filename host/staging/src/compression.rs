//! Compression formats and their streaming decoders.

use std::io::{self, BufRead, Read};
use std::str::FromStr;

/// How the transferred bytes are packed. The tar forms unpack into a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// One file, bzip2.
    Bzip2,
    /// One file, gzip (RFC 1952).
    Gzip,
    /// One file, xz.
    Xz,
    /// One file, Zstandard (RFC 8878).
    Zstd,
    /// A tar archive.
    Tar,
    /// A tar archive, bzip2.
    Tbz,
    /// A tar archive, gzip.
    Tgz,
    /// A tar archive, xz.
    Txz,
    /// A tar archive, Zstandard.
    Tzst,
}

/// A name that is no compression.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown compression {0:?}; supported are bzip2, gzip, xz, zstd, tar, tbz, tgz, txz, tzst")]
pub struct UnknownCompression(String);

impl FromStr for Compression {
    type Err = UnknownCompression;

    fn from_str(text: &str) -> Result<Self, UnknownCompression> {
        Ok(match text.to_ascii_lowercase().as_str() {
            "bzip2" | "bz2" => Self::Bzip2,
            "gzip" | "gz" => Self::Gzip,
            "xz" => Self::Xz,
            "zstd" | "zst" => Self::Zstd,
            "tar" => Self::Tar,
            "tbz" | "tbz2" | "tar.bz2" => Self::Tbz,
            "tgz" | "tar.gz" => Self::Tgz,
            "txz" | "tar.xz" => Self::Txz,
            "tzst" | "tar.zst" => Self::Tzst,
            _ => return Err(UnknownCompression(crate::error::tame(text))),
        })
    }
}

impl Compression {
    /// Whether it holds an archive that unpacks into a directory.
    pub fn is_archive(self) -> bool {
        matches!(
            self,
            Self::Tar | Self::Tbz | Self::Tgz | Self::Txz | Self::Tzst
        )
    }

    /// Name of the outer format, for messages.
    pub(crate) fn format(self) -> &'static str {
        match self {
            Self::Bzip2 | Self::Tbz => "bzip2",
            Self::Gzip | Self::Tgz => "gzip",
            Self::Xz | Self::Txz => "xz",
            Self::Zstd | Self::Tzst => "zstd",
            Self::Tar => "tar",
        }
    }
}

/// Memory an xz stream may ask for. `xz -9` needs 65 MiB.
const XZ_MEMORY_BYTES: u64 = 256 << 20;

/// A decoder for the outer format; the input itself for plain data. All accept concatenated
/// streams, as the command line tools do.
pub(crate) fn decoder<'a>(
    compression: Option<Compression>,
    input: impl BufRead + 'a,
) -> io::Result<Box<dyn Read + 'a>> {
    Ok(match compression {
        None | Some(Compression::Tar) => Box::new(input),
        Some(Compression::Bzip2 | Compression::Tbz) => Box::new(crate::bzip2::Decoder::new(input)?),
        Some(Compression::Gzip | Compression::Tgz) => {
            Box::new(flate2::bufread::MultiGzDecoder::new(input))
        }
        Some(Compression::Xz | Compression::Txz) => {
            let stream = liblzma::stream::Stream::new_stream_decoder(
                XZ_MEMORY_BYTES,
                liblzma::stream::CONCATENATED,
            )
            .map_err(io::Error::other)?;
            Box::new(liblzma::bufread::XzDecoder::new_stream(input, stream))
        }
        // The window is bounded by the library's default, 128 MiB.
        Some(Compression::Zstd | Compression::Tzst) => {
            Box::new(zstd::stream::read::Decoder::with_buffer(input)?)
        }
    })
}
