//! Digests of the bytes as transferred.

use std::str::FromStr;

use sha2::Digest as _;

/// Digest algorithm. MD5 and SHA-1 find accidents, not forgers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Algorithm {
    /// RFC 1321.
    Md5,
    /// FIPS 180-4.
    Sha1,
    /// FIPS 180-4.
    Sha224,
    /// FIPS 180-4.
    Sha256,
    /// FIPS 180-4.
    Sha384,
    /// FIPS 180-4.
    Sha512,
    /// BLAKE3 with 32 bytes of output.
    Blake3,
}

impl Algorithm {
    const ALL: [Self; 7] = [
        Self::Md5,
        Self::Sha1,
        Self::Sha224,
        Self::Sha256,
        Self::Sha384,
        Self::Sha512,
        Self::Blake3,
    ];

    /// Lower-case name, as in `sha256`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Md5 => "md5",
            Self::Sha1 => "sha1",
            Self::Sha224 => "sha224",
            Self::Sha256 => "sha256",
            Self::Sha384 => "sha384",
            Self::Sha512 => "sha512",
            Self::Blake3 => "blake3",
        }
    }

    /// Bytes in a digest.
    pub fn len_bytes(self) -> usize {
        match self {
            Self::Md5 => 16,
            Self::Sha1 => 20,
            Self::Sha224 => 28,
            Self::Sha256 | Self::Blake3 => 32,
            Self::Sha384 => 48,
            Self::Sha512 => 64,
        }
    }
}

impl std::fmt::Display for Algorithm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Text that is no digest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidDigest {
    /// No such algorithm.
    #[error(
        "unknown digest algorithm {0:?}; supported are md5, sha1, sha224, sha256, sha384, sha512, blake3"
    )]
    Algorithm(String),
    /// Not hexadecimal, or of the wrong length.
    #[error("a {algorithm} digest is {expected_digits} hexadecimal digits")]
    Digits {
        /// The algorithm.
        algorithm: Algorithm,
        /// Digits of its digests.
        expected_digits: usize,
    },
}

impl FromStr for Algorithm {
    type Err = InvalidDigest;

    /// Accepts any case and a hyphen, as in `SHA-256`.
    fn from_str(text: &str) -> Result<Self, InvalidDigest> {
        let name = text.to_ascii_lowercase().replace('-', "");
        Self::ALL
            .into_iter()
            .find(|algorithm| algorithm.name() == name)
            .ok_or_else(|| InvalidDigest::Algorithm(crate::error::tame(text)))
    }
}

/// An expected digest.
#[derive(Clone, PartialEq, Eq)]
pub struct Digest {
    algorithm: Algorithm,
    bytes: Vec<u8>,
}

impl Digest {
    /// Reads a digest in hexadecimal, of either case.
    ///
    /// # Errors
    /// If it is not as long as the algorithm's digests or not hexadecimal.
    pub fn from_hex(algorithm: Algorithm, hex: &str) -> Result<Self, InvalidDigest> {
        let invalid = InvalidDigest::Digits {
            algorithm,
            expected_digits: 2 * algorithm.len_bytes(),
        };
        let digits: Option<Vec<u8>> = hex
            .chars()
            .map(|c| c.to_digit(16).and_then(|digit| u8::try_from(digit).ok()))
            .collect();
        match digits {
            Some(digits) if digits.len() == 2 * algorithm.len_bytes() => Ok(Self {
                algorithm,
                bytes: digits
                    .chunks_exact(2)
                    .map(|pair| pair[0] << 4 | pair[1])
                    .collect(),
            }),
            _ => Err(invalid),
        }
    }

    /// The algorithm.
    pub fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    /// The digest in lower-case hexadecimal.
    pub fn to_hex(&self) -> String {
        self.bytes
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect()
    }
}

impl std::fmt::Debug for Digest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.algorithm, self.to_hex())
    }
}

/// A digest under way.
pub(crate) enum Hasher {
    Md5(md5::Md5),
    Sha1(sha1::Sha1),
    Sha224(sha2::Sha224),
    Sha256(sha2::Sha256),
    Sha384(sha2::Sha384),
    Sha512(sha2::Sha512),
    Blake3(Box<blake3::Hasher>),
}

impl Hasher {
    pub(crate) fn new(algorithm: Algorithm) -> Self {
        match algorithm {
            Algorithm::Md5 => Self::Md5(md5::Md5::new()),
            Algorithm::Sha1 => Self::Sha1(sha1::Sha1::new()),
            Algorithm::Sha224 => Self::Sha224(sha2::Sha224::new()),
            Algorithm::Sha256 => Self::Sha256(sha2::Sha256::new()),
            Algorithm::Sha384 => Self::Sha384(sha2::Sha384::new()),
            Algorithm::Sha512 => Self::Sha512(sha2::Sha512::new()),
            Algorithm::Blake3 => Self::Blake3(Box::default()),
        }
    }

    pub(crate) fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Md5(hasher) => hasher.update(bytes),
            Self::Sha1(hasher) => hasher.update(bytes),
            Self::Sha224(hasher) => hasher.update(bytes),
            Self::Sha256(hasher) => hasher.update(bytes),
            Self::Sha384(hasher) => hasher.update(bytes),
            Self::Sha512(hasher) => hasher.update(bytes),
            Self::Blake3(hasher) => {
                hasher.update(bytes);
            }
        }
    }

    pub(crate) fn finish(self) -> Digest {
        let (algorithm, bytes) = match self {
            Self::Md5(hasher) => (Algorithm::Md5, hasher.finalize().to_vec()),
            Self::Sha1(hasher) => (Algorithm::Sha1, hasher.finalize().to_vec()),
            Self::Sha224(hasher) => (Algorithm::Sha224, hasher.finalize().to_vec()),
            Self::Sha256(hasher) => (Algorithm::Sha256, hasher.finalize().to_vec()),
            Self::Sha384(hasher) => (Algorithm::Sha384, hasher.finalize().to_vec()),
            Self::Sha512(hasher) => (Algorithm::Sha512, hasher.finalize().to_vec()),
            Self::Blake3(hasher) => (Algorithm::Blake3, hasher.finalize().as_bytes().to_vec()),
        };
        Digest { algorithm, bytes }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Digests of "abc" as printed by coreutils and b3sum.
    const ABC: [(&str, &str); 7] = [
        ("md5", "900150983cd24fb0d6963f7d28e17f72"),
        ("SHA-1", "a9993e364706816aba3e25717850c26c9cd0d89d"),
        (
            "sha224",
            "23097d223405d8228642a477bda255b32aadbce4bda0b3f7e36c9da7",
        ),
        (
            "SHA256",
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
        ),
        (
            "sha384",
            "cb00753f45a35e8bb5a03d699ac65007272c32ab0eded1631a8b605a43ff5bed8086072ba1e7cc2358baeca134c825a7",
        ),
        (
            "sha512",
            "ddaf35a193617abacc417349ae20413112e6fa4e89a97ea20a9eeee64b55d39a2192992a274fc1a836ba3c23a3feebbd454d4423643ce80e2a9ac94fa54ca49f",
        ),
        (
            "blake3",
            "6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85",
        ),
    ];

    #[test]
    fn known_digests() {
        for (name, hex) in ABC {
            let algorithm: Algorithm = name.parse().unwrap();
            let mut hasher = Hasher::new(algorithm);
            hasher.update(b"a");
            hasher.update(b"bc");
            let got = hasher.finish();
            assert_eq!(got.to_hex(), hex);
            assert_eq!(
                got,
                Digest::from_hex(algorithm, &hex.to_uppercase()).unwrap()
            );
        }
    }

    #[test]
    fn invalid_digests() {
        let error = Digest::from_hex(Algorithm::Md5, "abc").unwrap_err();
        assert_eq!(error.to_string(), "a md5 digest is 32 hexadecimal digits");
        assert!(Digest::from_hex(Algorithm::Md5, &"g".repeat(32)).is_err());
        assert!("crc32".parse::<Algorithm>().is_err());
    }
}
