//! Where nodes and registries are.

use std::fmt;
use std::net::SocketAddrV6;
use std::path::PathBuf;
use std::str::FromStr;

use minicbor::{Decode, Decoder, Encode, Encoder, decode, encode};
use uuid::Uuid;

/// The longest address, in bytes of its text.
const MAX_ADDRESS_BYTES: usize = 256;
/// The most addresses of a node.
const MAX_ENDPOINTS: usize = 16;
/// The longest identifier of a boot.
pub(crate) const MAX_BOOT_BYTES: usize = 64;

/// Where something listens.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Address {
    /// `unix:/path`
    Unix(PathBuf),
    /// `vsock:CID:PORT`
    Vsock {
        /// Context identifier of the guest.
        cid: u32,
        /// Port.
        port: u32,
    },
    /// `tcp:[::1]:7400`
    Tcp(SocketAddrV6),
}

/// A text that is no address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is no address: expected unix:/PATH, vsock:CID:PORT or tcp:[IPV6]:PORT")]
pub struct AddressError(String);

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Address, AddressError> {
        let parse = || {
            if text.len() > MAX_ADDRESS_BYTES {
                return None;
            }
            let (kind, rest) = text.split_once(':')?;
            match kind {
                "unix" if rest.starts_with('/') => Some(Address::Unix(rest.into())),
                "vsock" => {
                    let (cid, port) = rest.split_once(':')?;
                    let (cid, port) = (cid.parse().ok()?, port.parse().ok()?);
                    Some(Address::Vsock { cid, port })
                }
                "tcp" => Some(Address::Tcp(rest.parse().ok()?)),
                _ => None,
            }
        };
        parse().ok_or_else(|| AddressError(text.chars().take(MAX_ADDRESS_BYTES).collect()))
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Unix(path) => write!(f, "unix:{}", path.display()),
            Address::Vsock { cid, port } => write!(f, "vsock:{cid}:{port}"),
            Address::Tcp(address) => write!(f, "tcp:{address}"),
        }
    }
}

impl<C> Encode<C> for Address {
    fn encode<W: encode::Write>(
        &self,
        e: &mut Encoder<W>,
        _: &mut C,
    ) -> Result<(), encode::Error<W::Error>> {
        e.str(&self.to_string())?.ok()
    }
}

impl<'b, C> Decode<'b, C> for Address {
    fn decode(d: &mut Decoder<'b>, _: &mut C) -> Result<Self, decode::Error> {
        d.str()?.parse().map_err(decode::Error::custom)
    }
}

/// A node, and where it listens.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct NodeAddress {
    /// Which node.
    #[cbor(n(0), with = "id")]
    pub node: Uuid,
    /// Which boot of which machine it runs in.
    #[n(1)]
    pub boot: String,
    /// Where it listens.
    #[n(2)]
    pub endpoints: Vec<Address>,
}

impl NodeAddress {
    /// Whatever node listens there.
    pub fn at(address: Address) -> NodeAddress {
        NodeAddress {
            node: Uuid::nil(),
            boot: String::new(),
            endpoints: vec![address],
        }
    }

    /// Whether it keeps to the bounds.
    pub(crate) fn is_sane(&self) -> bool {
        self.boot.len() <= MAX_BOOT_BYTES && self.endpoints.len() <= MAX_ENDPOINTS
    }
}

impl fmt::Display for NodeAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.endpoints.last() {
            Some(address) => write!(f, "{address}"),
            None => write!(f, "node {}", self.node),
        }
    }
}

/// UUIDs as 16 bytes.
pub(crate) mod id {
    use minicbor::encode::Write;
    use minicbor::{Decoder, Encoder};
    use uuid::Uuid;

    pub(crate) fn encode<C, W: Write>(
        id: &Uuid,
        e: &mut Encoder<W>,
        _: &mut C,
    ) -> Result<(), minicbor::encode::Error<W::Error>> {
        e.bytes(id.as_bytes())?.ok()
    }

    pub(crate) fn decode<C>(
        d: &mut Decoder<'_>,
        _: &mut C,
    ) -> Result<Uuid, minicbor::decode::Error> {
        Uuid::from_slice(d.bytes()?).map_err(minicbor::decode::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_they_are_written() {
        for text in [
            "unix:/run/x",
            "vsock:3:7400",
            "tcp:[::1]:7400",
            "tcp:[fe80::1%2]:1",
        ] {
            let address: Address = text.parse().unwrap();
            assert_eq!(address.to_string(), text);
            let bytes = minicbor::to_vec(&address).unwrap();
            assert_eq!(minicbor::decode::<Address>(&bytes).unwrap(), address);
        }
        for text in [
            "",
            "unix:x",
            "vsock:3",
            "vsock:a:1",
            "tcp:1.2.3.4:1",
            "tcp:[::1]",
            "udp:[::1]:1",
        ] {
            text.parse::<Address>().unwrap_err();
        }
        let error = "tcp:x".parse::<Address>().unwrap_err().to_string();
        let expected =
            "'tcp:x' is no address: expected unix:/PATH, vsock:CID:PORT or tcp:[IPV6]:PORT";
        assert_eq!(error, expected);
    }
}
