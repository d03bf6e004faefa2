//! The second source of ends: xenstore tells whenever some domain has ended, also of those that
//! libvirt does not, and sooner than it. And it knows all their names.

use std::collections::HashSet;
use std::os::fd::AsFd;
use std::sync::Arc;

use xbee_link::xenstore::Xenstore;

use super::Inner;
use super::channel::broken;
use crate::error::{Error, chain};
use crate::readable::readable;
use crate::work::blocking;

/// Has all domains looked at when some domain has ended.
pub(crate) async fn watch(inner: Arc<Inner>) {
    if let Err(error) = try_watch(&inner).await {
        // libvirt is still there.
        tracing::warn!(
            error = chain(&error),
            "ends of domains are not seen in xenstore"
        );
    }
}

/// The names of Xen's domains, whoever made them.
pub(crate) async fn names() -> Result<HashSet<String>, Error> {
    const DOMAINS: &str = "/local/domain";
    blocking(|| {
        let mut store = Xenstore::open().map_err(|error| broken(&error))?;
        let ids = store.list(DOMAINS).map_err(|error| broken(&error))?;
        let mut names = HashSet::new();
        for id in ids.unwrap_or_default() {
            let path = format!("{DOMAINS}/{id}/name");
            names.extend(store.read(&path).map_err(|error| broken(&error))?);
        }
        Ok(names)
    })
    .await
}

async fn try_watch(inner: &Inner) -> Result<(), Error> {
    const WATCHED: &str = "@releaseDomain";
    let mut store = blocking(|| {
        let mut store = Xenstore::open().map_err(|error| broken(&error))?;
        store
            .watch(WATCHED, "release")
            .map_err(|error| broken(&error))?;
        Ok(store)
    })
    .await?;
    let failed = |error| Error::io("await events of", "/dev/xen/xenbus")(error);
    let fd = store.as_fd().try_clone_to_owned().map_err(failed)?;
    let events = readable(fd).map_err(failed)?;
    loop {
        // Without a reply to wait for this does not block.
        while store
            .next_event()
            .map_err(|error| broken(&error))?
            .is_some()
        {
            inner.look_at_all();
        }
        events.readable().await.map_err(failed)?.clear_ready();
    }
}
