//! A domain of Xen's: the way to domain 0, and what its tool stack says by xenstore.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use xbee_link::device;
use xbee_link::vchan::{self, RingSize, Vchan};
use xbee_link::xenstore::{self, Xenstore};
use xbee_link::{Address, Link};

/// Who the host is.
const HOST_DOMAIN: u16 = 0;
/// The tool stack writes here what the domain is to do.
const SHUTDOWN: &str = "control/shutdown";
/// Another one after each restore.
const DOMAIN: &str = "domid";
/// After a restore all watches fire: that this long ago there was one explains those without a
/// reason.
const RESTORE_ECHO: Duration = Duration::from_secs(5);

/// What there is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum News {
    /// The domain may be saved at any moment: no channel may be open then.
    Suspending,
    /// The domain has been restored: a channel that is open still is dead and must not be touched.
    Restored,
}

/// The way to domain 0.
#[derive(Debug)]
pub(crate) struct Xen {
    path: String,
    port: u16,
    store: Option<Xenstore>,
    seen: Seen,
}

/// What xenstore has said.
#[derive(Debug, Default)]
struct Seen {
    own: Option<String>,
    /// The first event of a watch says that it is set.
    domain: bool,
    shutdown: bool,
    restored_at: Option<Instant>,
}

impl Xen {
    pub(crate) fn new(path: String, port: u16) -> Xen {
        Xen {
            path,
            port,
            store: None,
            seen: Seen::default(),
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
                let store = watching().map_err(|error| whole(&error))?;
                self.seen = Seen::default();
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
    pub(crate) fn news(&mut self, now: Instant) -> Result<Option<News>, String> {
        let Some(store) = &mut self.store else {
            return Ok(None);
        };
        match self.seen.look(store, now) {
            Ok(news) => Ok(news),
            Err(error) => Err(self.lose(&error)),
        }
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

impl Seen {
    fn look(
        &mut self,
        store: &mut Xenstore,
        now: Instant,
    ) -> Result<Option<News>, xenstore::Error> {
        let (mut shutdown, mut domain) = (false, false);
        while let Some(event) = store.next_event()? {
            match event.token.as_str() {
                SHUTDOWN => shutdown = true,
                DOMAIN => domain = true,
                _ => {}
            }
        }
        if !shutdown && !domain {
            return Ok(None);
        }
        let first_domain = domain && !std::mem::replace(&mut self.domain, true);
        let first_shutdown = shutdown && !std::mem::replace(&mut self.shutdown, true);
        // Before anything else: the kernel takes the word away when it has read it.
        let word = store.read(SHUTDOWN)?.unwrap_or_default();
        let own = store.read(DOMAIN)?.unwrap_or_default();
        let known = self.own.replace(own.clone());
        let echo = (self.restored_at).is_some_and(|at| now.duration_since(at) < RESTORE_ECHO);
        // Nobody writes to `domid`: an event means a restore, even if the number happens to be the
        // same on another machine.
        if known.is_some_and(|known| known != own) || domain && !first_domain && !echo {
            self.restored_at = Some(now);
            return Ok(Some(News::Restored));
        }
        Ok(match word.as_str() {
            "suspend" => Some(News::Suspending),
            // It may have been "suspend" before it was read.
            "" if shutdown && !first_shutdown && !echo => Some(News::Suspending),
            _ => None,
        })
    }
}

fn watching() -> Result<Xenstore, xenstore::Error> {
    let mut store = Xenstore::open()?;
    for path in [SHUTDOWN, DOMAIN] {
        store.watch(path, path)?;
    }
    Ok(store)
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
