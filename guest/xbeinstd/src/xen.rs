//! A domain of Xen's: the way to domain 0, and what its tool stack says by xenstore.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd};

use xbee_link::device;
use xbee_link::suspend::{News, Suspension};
use xbee_link::vchan::{self, RingSize, Vchan};
use xbee_link::xenstore::{self, Xenstore};
use xbee_link::{Address, Link};

/// Who the host is.
const HOST_DOMAIN: u16 = 0;

/// The way to domain 0.
#[derive(Debug)]
pub(crate) struct Xen {
    path: String,
    port: u16,
    store: Option<Xenstore>,
    suspension: Suspension,
}

impl Xen {
    pub(crate) fn new(path: String, port: u16) -> Xen {
        Xen {
            path,
            port,
            store: None,
            suspension: Suspension::default(),
        }
    }

    /// Where events come from, once there has been a dial.
    pub(crate) fn events(&self) -> Option<BorrowedFd<'_>> {
        self.store.as_ref().map(AsFd::as_fd)
    }

    /// Offers the host a channel; a port, where this kernel has no channels. [`Xen::news`] is to be
    /// asked for afterwards.
    pub(crate) fn dial(&mut self) -> Result<Link, String> {
        let store = match &mut self.store {
            Some(store) => store,
            none => {
                let mut store = Xenstore::open().map_err(|error| whole(&error))?;
                self.suspension = Suspension::watch(&mut store).map_err(|error| whole(&error))?;
                none.insert(store)
            }
        };
        let link = match Vchan::serve(store, HOST_DOMAIN, &self.path, RingSize::default()) {
            Ok(channel) => Ok(channel.into()),
            Err(vchan::Error::Device(device::Error::Missing { .. })) => {
                let address = Address::Listen { port: self.port };
                let link = Link::dial(&address)
                    .map_err(|error| format!("no vchan here, and not {address}: {error}"))?;
                let node = format!("{}/ipv6", self.path);
                let announced = store.write(&node, &self.port.to_string());
                announced.map(|()| link)
            }
            Err(vchan::Error::Xenstore(error)) => Err(error),
            Err(error) => return Err(whole(&error)),
        };
        link.map_err(|error| self.lose(&error))
    }

    /// What has happened since.
    pub(crate) fn news(&mut self) -> Result<Option<News>, String> {
        let Some(store) = &mut self.store else {
            return Ok(None);
        };
        let news = heed(&mut self.suspension, store).map_err(|error| self.lose(&error))?;
        if news == Some(News::Restored) {
            // New watches, which fire before the kernel's own where the store takes the last one
            // first; and what the old ones have to say of the restore is heard no more.
            self.store = None;
        }
        Ok(news)
    }

    /// A connection that does not work is made anew with the next dial.
    fn lose(&mut self, error: &xenstore::Error) -> String {
        self.store = None;
        whole(error)
    }
}

impl fmt::Display for Xen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "xen:{}", self.path)
    }
}

fn heed(
    suspension: &mut Suspension,
    store: &mut Xenstore,
) -> Result<Option<News>, xenstore::Error> {
    while let Some(event) = store.next_event()? {
        suspension.note(&event);
    }
    suspension.news(store)
}

/// An error with its causes.
fn whole(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(&format!(": {error}"));
        cause = error.source();
    }
    text
}
