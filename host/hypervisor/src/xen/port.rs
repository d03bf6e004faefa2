//! Puts guests' interfaces on the bridge, in place of Xen's script `vif-bridge`: that one runs dozens of
//! programs for each start and each end of a domain. And here a port joins after the firewall knows it.

use std::io;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;

use super::channel;
use crate::error::Error;
use crate::work::blocking;

/// What libxl runs instead, because it insists on a script (Xen, xl-network-configuration(5), `script`).
pub(crate) const NO_SCRIPT: &str = "/bin/true";

/// No call of `ip` takes longer on a host that works.
const IP_LIMIT: Duration = Duration::from_secs(20);

/// The name that Xen's driver gives the interface, by Xen's numbers of the domain and its device.
pub(crate) fn name(domid: u32, device: u32) -> String {
    format!("vif{domid}.{device}")
}

/// Puts an interface on the bridge and tells its driver that it is there (Xen, netif.h, `hotplug-status`). Until
/// then its guest has no carrier. One that is on it stays.
///
/// # Errors
/// [`Error::Bridge`].
pub(crate) async fn join(domid: u32, device: u32, bridge: &str) -> Result<(), Error> {
    let port = name(domid, device);
    let lacking = |detail: String| Error::Bridge {
        port: port.clone(),
        bridge: bridge.to_owned(),
        detail,
    };
    if !Path::new(&format!("/sys/class/net/{bridge}/brif/{port}")).exists() {
        // A port of another size would give the whole bridge its size.
        let mtu = tokio::fs::read_to_string(format!("/sys/class/net/{bridge}/mtu"))
            .await
            .map_err(|error| lacking(format!("the bridge: {error}")))?;
        // The host itself has nothing to say there.
        let settings = "multicast off arp off addrgenmode none up";
        let output = tokio::time::timeout(
            IP_LIMIT,
            Command::new("ip")
                .args(["link", "set", "dev", &port, "mtu", mtu.trim()])
                .args(["master", bridge])
                .args(settings.split(' '))
                .stdin(Stdio::null())
                .kill_on_drop(true)
                .output(),
        )
        .await
        .unwrap_or_else(|elapsed| Err(io::Error::new(io::ErrorKind::TimedOut, elapsed)))
        .map_err(|error| lacking(format!("ip cannot be run: {error}")))?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            let line = said.lines().next().unwrap_or("failed without a word");
            return Err(lacking(format!("ip link set: {line}")));
        }
    }
    let status = format!("/local/domain/0/backend/vif/{domid}/{device}/hotplug-status");
    blocking(move || {
        let mut store = channel::store()?;
        let broken = |error| channel::broken(&error);
        if store.read(&status).map_err(broken)?.as_deref() != Some("connected") {
            store.write(&status, "connected").map_err(broken)?;
        }
        Ok(())
    })
    .await
}
