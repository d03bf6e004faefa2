//! What a boot tells its agent: the file [`BOOT_CONFIG_PATH`](crate::BOOT_CONFIG_PATH).

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
        for transport in [
            Transport::Vsock { port: 22594 },
            Transport::Unix { path: "/x".into() },
        ] {
            let config = BootConfig {
                generation: 1,
                domain: Uuid::from_u128(3),
                hostname: "web-1".into(),
                secret: Secret([9; 32]),
                transport,
            };
            assert_eq!(BootConfig::decode(&config.encode()).unwrap(), config);
        }
        BootConfig::decode(b"").unwrap_err();
    }
}
