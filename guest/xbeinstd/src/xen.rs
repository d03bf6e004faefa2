//! A domain of Xen's: the way to domain 0, and what its tool stack says by xenstore.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd};

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
}

/// Which watches have fired.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Fired {
    shutdown: bool,
    domain: bool,
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
    pub(crate) fn news(&mut self) -> Result<Option<News>, String> {
        let Some(store) = &mut self.store else {
            return Ok(None);
        };
        let news = self.seen.look(store).map_err(|error| self.lose(&error))?;
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

impl Seen {
    fn look(&mut self, store: &mut Xenstore) -> Result<Option<News>, xenstore::Error> {
        let mut fired = Fired::default();
        while let Some(event) = store.next_event()? {
            match event.token.as_str() {
                SHUTDOWN => fired.shutdown = true,
                DOMAIN => fired.domain = true,
                _ => {}
            }
        }
        if fired == Fired::default() {
            return Ok(None);
        }
        // At once: the kernel takes the word away when it has read it.
        let word = store.read(SHUTDOWN)?.unwrap_or_default();
        let own = store.read(DOMAIN)?.unwrap_or_default();
        Ok(self.judge(fired, &word, own))
    }

    fn judge(&mut self, fired: Fired, word: &str, own: String) -> Option<News> {
        let written = fired.shutdown && std::mem::replace(&mut self.shutdown, true);
        // Nobody writes to `domid`: an event means a restore, even if the number happens to be the
        // same on another machine.
        let moved = fired.domain && std::mem::replace(&mut self.domain, true);
        let known = self.own.replace(own.clone());
        if moved || known.is_some_and(|known| known != own) {
            return Some(News::Restored);
        }
        match word {
            "suspend" => Some(News::Suspending),
            // As a rule there was a word that the kernel has taken already.
            "" if written => Some(News::Suspending),
            _ => None,
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    const SHUTDOWN_ONLY: Fired = Fired {
        shutdown: true,
        domain: false,
    };
    const DOMAIN_ONLY: Fired = Fired {
        shutdown: false,
        domain: true,
    };
    /// After the events that come with watching.
    fn watching() -> Seen {
        let mut seen = Seen::default();
        assert_eq!(seen.judge(SHUTDOWN_ONLY, "", "1".into()), None);
        assert_eq!(seen.judge(DOMAIN_ONLY, "", "1".into()), None);
        seen
    }

    #[test]
    fn every_write_to_shutdown_may_have_been_suspend() {
        let mut seen = watching();
        let mut judge = |word| seen.judge(SHUTDOWN_ONLY, word, "1".into());
        assert_eq!(judge("poweroff"), None);
        assert_eq!(judge("suspend"), Some(News::Suspending));
        assert_eq!(judge(""), Some(News::Suspending));
        assert_eq!(judge(""), Some(News::Suspending));
    }

    #[test]
    fn a_restore_is_noticed_by_the_number_and_without_a_new_one() {
        for (fired, own) in [(SHUTDOWN_ONLY, "2"), (DOMAIN_ONLY, "2"), (DOMAIN_ONLY, "1")] {
            let news = watching().judge(fired, "", own.into());
            assert_eq!(news, Some(News::Restored));
        }
    }
}
