//! Guests' interfaces as Xen's driver has them.

use super::channel;
use crate::error::Error;

/// What libxl runs instead of its own script, because it insists on one (Xen, xl-network-configuration(5), `script`).
pub(crate) const NO_SCRIPT: &str = "/bin/true";

/// The name that Xen's driver gives the interface, by Xen's numbers of the domain and its device.
pub(crate) fn name(domid: u32, device: u32) -> String {
    format!("vif{domid}.{device}")
}

/// Tells the driver of an interface that it is on the bridge (Xen, netif.h, `hotplug-status`). Until then its guest has
/// no carrier.
///
/// # Errors
/// [`Error::Control`] where xenstore fails.
pub(crate) fn announce(port: &str) -> Result<(), Error> {
    let numbers = port
        .strip_prefix("vif")
        .and_then(|rest| rest.split_once('.'));
    let Some((domid, device)) = numbers else {
        return Ok(());
    };
    let status = format!("/local/domain/0/backend/vif/{domid}/{device}/hotplug-status");
    let mut store = channel::store()?;
    let broken = |error| channel::broken(&error);
    if store.read(&status).map_err(broken)?.as_deref() != Some("connected") {
        store.write(&status, "connected").map_err(broken)?;
    }
    Ok(())
}
