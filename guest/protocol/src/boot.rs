//! What a boot tells its agent: the file [`BOOT_CONFIG_PATH`](crate::BOOT_CONFIG_PATH).

use std::net::Ipv6Addr;

use minicbor::{Decode, Encode};

use crate::{FrameError, Secret, Uuid, frame};

/// The agent's configuration. Carries the boot's secret: the file has mode 0600, and the agent
/// removes it once read.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct BootConfig {
    /// Generation of the protocol that the host speaks.
    #[n(0)]
    pub generation: u16,
    /// Identity of the domain.
    #[cbor(n(1), with = "crate::wire::uuid")]
    pub domain: Uuid,
    /// Host name that the guest takes.
    #[n(2)]
    pub hostname: String,
    /// The secret of this boot.
    #[n(3)]
    pub secret: Secret,
    /// How to reach the host.
    #[n(4)]
    pub transport: Transport,
    /// The interface that the agent sets up, if any.
    #[n(5)]
    pub network: Option<Network>,
}

/// How the agent reaches the host.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum Transport {
    /// `AF_VSOCK` to context 2.
    #[n(0)]
    Vsock {
        /// Port on the host, [`AGENT_VSOCK_PORT`](crate::AGENT_VSOCK_PORT) as a rule.
        #[n(0)]
        port: u32,
    },
    /// A unix socket: an agent beside the host manager, for tests.
    #[n(1)]
    Unix {
        /// Path of the socket.
        #[n(0)]
        path: String,
    },
    /// A domain of Xen's: domain 0 connects. The agent serves a vchan for it, a new one for each
    /// connection. Where the guest's kernel cannot do that it listens for TCP over IPv6, and says
    /// so by the port at `path`/`ipv6` in xenstore.
    #[n(2)]
    Xen {
        /// Path of the vchan in xenstore below the domain's own, as `data/xbee/agent`.
        #[n(0)]
        path: String,
        /// TCP port to listen at.
        #[n(1)]
        port: u16,
    },
}

/// One interface's address. Where the image's init sets up the same again, nothing is lost.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Network {
    /// Hardware address of the interface that is meant.
    #[cbor(n(0), with = "minicbor::bytes")]
    pub mac: [u8; 6],
    /// Its address, which nobody else has: there is no looking for duplicates.
    #[n(1)]
    pub address: Ipv6Addr,
    /// Bits of the address that name the network, up to 128.
    #[n(2)]
    pub prefix_length: u8,
    /// The router to everywhere else.
    #[n(3)]
    pub gateway: Option<Ipv6Addr>,
}

impl BootConfig {
    /// The file's bytes.
    pub fn encode(&self) -> Vec<u8> {
        frame::encode(self)
    }

    /// Reads the file's bytes.
    ///
    /// # Errors
    /// [`FrameError::Malformed`] where they are not a configuration.
    pub fn decode(bytes: &[u8]) -> Result<Self, FrameError> {
        frame::decode(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip() {
        let network = |gateway| {
            Some(Network {
                mac: [0, 0x16, 0x3e, 1, 2, 3],
                address: "fd00::5".parse().unwrap(),
                prefix_length: 64,
                gateway,
            })
        };
        let xen = Transport::Xen {
            path: "data/xbee/agent".into(),
            port: 22594,
        };
        for (transport, network) in [
            (Transport::Vsock { port: 22594 }, None),
            (Transport::Unix { path: "/x".into() }, network(None)),
            (xen, network(Some("fd00::1".parse().unwrap()))),
        ] {
            let config = BootConfig {
                generation: 1,
                domain: Uuid::from_u128(3),
                hostname: "web-1".into(),
                secret: Secret([9; 32]),
                transport,
                network,
            };
            assert_eq!(BootConfig::decode(&config.encode()).unwrap(), config);
        }
        BootConfig::decode(b"").unwrap_err();
    }

    #[test]
    fn a_configuration_from_before_there_was_a_network_is_understood() {
        let config = BootConfig {
            generation: 1,
            domain: Uuid::from_u128(3),
            hostname: "web-1".into(),
            secret: Secret([9; 32]),
            transport: Transport::Vsock { port: 22594 },
            network: None,
        };
        let bytes = config.encode();
        // An array of five in place of one of six that ends with null, if it was written.
        let mut old = bytes.clone();
        if old.last() == Some(&0xf6) {
            old.pop();
        }
        old[0] = 0x85;
        assert_eq!(BootConfig::decode(&old).unwrap(), config);
    }
}
