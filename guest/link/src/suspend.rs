//! What Xen's tool stack says of saving and restoring this domain. No vchan may be open while a
//! domain is saved: see [`crate::vchan`].

use rustix::time::{ClockId, clock_gettime};

use crate::xenstore::{Error, WatchEvent, Xenstore};

/// The tool stack writes here what the domain is to do.
const SHUTDOWN: &str = "control/shutdown";
/// Another one after each restore.
const DOMAIN: &str = "domid";

/// What there is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum News {
    /// The domain may be saved at any moment: no channel may be open then.
    Suspending,
    /// The domain has been restored: a channel that is open still is dead and must not be touched.
    Restored,
}

/// Watches on one connection to the store, and what they have said.
#[derive(Debug, Default)]
pub struct Suspension {
    own: Option<String>,
    /// The first event of a watch says that it is set.
    domain: bool,
    shutdown: bool,
    fired: Fired,
}

/// Which watches have fired.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Fired {
    shutdown: bool,
    domain: bool,
}

impl Suspension {
    /// Begins to watch.
    ///
    /// # Errors
    /// What [`Xenstore::watch`] says.
    pub fn watch(store: &mut Xenstore) -> Result<Suspension, Error> {
        for path in [SHUTDOWN, DOMAIN] {
            store.watch(path, path)?;
        }
        Ok(Suspension::default())
    }

    /// Takes an event of the connection. Those of other watches are let go.
    pub fn note(&mut self, event: &WatchEvent) {
        match event.token.as_str() {
            SHUTDOWN => self.fired.shutdown = true,
            DOMAIN => self.fired.domain = true,
            _ => {}
        }
    }

    /// What the events since the last call mean.
    ///
    /// # Errors
    /// What [`Xenstore::read`] says.
    pub fn news(&mut self, store: &mut Xenstore) -> Result<Option<News>, Error> {
        let fired = std::mem::take(&mut self.fired);
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

/// Up to when two clocks are taken to have been read at one time.
const CLOSE_NS: i64 = 1_000_000;
const READS_MAX: usize = 16;

/// A moment of this domain's time. A kernel that suspends itself notes how long it was away, so this says
/// at once, and without xenstore, whether a domain has been saved since.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Moment {
    /// How long the domain had been suspended by then, in nanoseconds: no less and no more than this.
    away_ns: (i64, i64),
}

impl Moment {
    pub(crate) fn now() -> Moment {
        let read = |clock| {
            let time = clock_gettime(clock);
            time.tv_sec * 1_000_000_000 + time.tv_nsec
        };
        let look = || {
            let before = read(ClockId::Monotonic);
            let whole = read(ClockId::Boottime);
            (whole - read(ClockId::Monotonic), whole - before)
        };
        let mut away_ns = look();
        for _ in 1..READS_MAX {
            if away_ns.1 - away_ns.0 <= CLOSE_NS {
                break;
            }
            away_ns = look();
        }
        Moment { away_ns }
    }

    /// Whether the domain has been suspended since.
    pub(crate) fn is_before_suspending(self) -> bool {
        Moment::now().away_ns.0 > self.away_ns.1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_that_went_by_while_suspended_is_told_from_other_time() {
        let now = Moment::now();
        std::thread::sleep(std::time::Duration::from_millis(20));
        assert!(!now.is_before_suspending());
        let (least, most) = now.away_ns;
        let away_ns = (least - 100_000_000, most - 100_000_000);
        assert!(Moment { away_ns }.is_before_suspending());
    }

    const SHUTDOWN_ONLY: Fired = Fired {
        shutdown: true,
        domain: false,
    };
    const DOMAIN_ONLY: Fired = Fired {
        shutdown: false,
        domain: true,
    };
    /// After the events that come with watching.
    fn watching() -> Suspension {
        let mut seen = Suspension::default();
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
