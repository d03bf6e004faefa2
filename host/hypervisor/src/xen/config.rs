//! How the Xen back end is set up.

use std::path::PathBuf;
use std::time::Duration;

/// Settings of the Xen back end.
#[derive(Debug, Clone)]
pub struct XenConfig {
    /// Holds the run directories, each named by its domain's identity. Made on demand. What is
    /// found here at start is adopted, and what is incomplete is removed.
    pub domains_dir: PathBuf,
    /// libvirt's connection URI.
    pub uri: String,
    /// Bridge of the control domain that interfaces are on.
    pub bridge: String,
    /// Domains with an interface are started only where the rules of `xen-configs/dom0/xenbee.nft`
    /// are loaded, and these are told of each. Otherwise something else must keep guests apart.
    pub firewall: bool,
    /// Guests run without hardware virtualization (PV), not in a PVH container. Those whose kernel
    /// cannot run in one do so in any case.
    pub paravirtual: bool,
    /// Most bytes kept of a domain's console.
    pub console_max_bytes: u64,
    /// How long libvirt may take for what is not a start.
    pub command_limit: Duration,
}

impl XenConfig {
    /// The defaults.
    #[must_use]
    pub fn new(domains_dir: PathBuf) -> Self {
        Self {
            domains_dir,
            uri: "xen:///system".to_owned(),
            bridge: "xenbr0".to_owned(),
            firewall: true,
            paravirtual: false,
            console_max_bytes: 4 << 20,
            command_limit: Duration::from_secs(60),
        }
    }
}
