//! How far the start of a domain is, for the `xbed` that comes after this one.
//!
//! A domain that boots needs no `xbed`: the next one waits for its agent as this one did. Once files are put and scripts
//! run in it, what was done and what was not is known to nobody, and it is begun anew.

use std::io;
use std::path::Path;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use tracing::warn;
use xbee_engine::Failure;

use super::{fail, io_failure};
use crate::fault;
use crate::session::CONTACT_TIMEOUT;

/// Name of the file in the spool.
pub const FILE: &str = "start.json";
/// Its name until it is complete.
pub const DRAFT: &str = "start.new";
/// How often a start is begun before it is given up: what ends `xbed` each time may be this very task.
const BEGUN_MAX: u32 = 5;

/// How far it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "stage")]
enum Stage {
    /// A domain is being made.
    Making,
    /// It runs, and its agent has not been spoken to.
    Booting {
        /// When its agent is given up, milliseconds since the host's boot. No domain lives longer than that.
        until_ms: u64,
        /// It had more time because there was no `xbed` to hear its agent.
        prolonged: bool,
    },
    /// Files and scripts are put into it.
    Furnishing,
}

/// The start of a domain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attempt {
    /// How often it was begun.
    begun: u32,
    #[serde(flatten)]
    stage: Stage,
}

impl Attempt {
    /// The one under way, if there is one. What a power cut left of its file says only that there was one, and that its
    /// domain is no more.
    pub fn load(spool: &Path) -> Result<Option<Attempt>, Failure> {
        let path = spool.join(FILE);
        match std::fs::read(&path) {
            Ok(text) => Ok(Some(serde_json::from_slice(&text).unwrap_or_else(|why| {
                warn!(path = %path.display(), %why, "the start is begun anew");
                Attempt {
                    begun: 1,
                    stage: Stage::Making,
                }
            }))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(io_failure(path.display(), &error)),
        }
    }

    /// A further one, after `before`.
    pub fn begin(before: Option<&Attempt>, spool: &Path) -> Result<Attempt, Failure> {
        let begun = before.map_or(0, |attempt| attempt.begun);
        if begun >= BEGUN_MAX {
            return Err(fail(
                "start-interrupted",
                format!(
                    "xbed ended {begun} times while the domain was started: its log may say why"
                ),
            ));
        }
        let attempt = Attempt {
            begun: begun + 1,
            stage: Stage::Making,
        };
        attempt.save(spool)?;
        Ok(attempt)
    }

    /// The domain runs, and its agent may take so long.
    pub fn booting(&mut self, limit: Duration, spool: &Path) -> Result<(), Failure> {
        self.stage = Stage::Booting {
            until_ms: now_ms().saturating_add(millis(limit)),
            prolonged: false,
        };
        self.save(spool)
    }

    /// The domain has been taken up again while it booted, with what is left of its time; `None`: it cannot be. One that may have
    /// been ready while there was no `xbed` has the time to say so, once.
    pub fn take_up(&mut self, spool: &Path) -> Result<Option<Duration>, Failure> {
        let Stage::Booting {
            until_ms,
            prolonged,
        } = self.stage
        else {
            return Ok(None);
        };
        let now_ms = now_ms();
        let left = Duration::from_millis(until_ms.saturating_sub(now_ms));
        if left >= CONTACT_TIMEOUT || prolonged {
            return Ok(Some(left));
        }
        self.stage = Stage::Booting {
            until_ms: now_ms.saturating_add(millis(CONTACT_TIMEOUT)),
            prolonged: true,
        };
        self.save(spool)?;
        Ok(Some(CONTACT_TIMEOUT))
    }

    /// From here on the domain cannot be taken up again.
    pub fn furnishing(&mut self, spool: &Path) -> Result<(), Failure> {
        self.stage = Stage::Furnishing;
        self.save(spool)
    }

    /// Not forced to the disk, because a power cut ends the domain as well; so it may leave an empty file.
    fn save(&self, spool: &Path) -> Result<(), Failure> {
        let (path, draft) = (spool.join(FILE), spool.join(DRAFT));
        let saved = serde_json::to_vec(self)
            .map_err(io::Error::other)
            .and_then(|text| std::fs::write(&draft, text))
            .inspect(|()| fault::point("attempt"))
            .and_then(|()| std::fs::rename(&draft, &path));
        saved.map_err(|error| io_failure(path.display(), &error))
    }
}

fn millis(duration: Duration) -> u64 {
    duration.as_millis().try_into().unwrap_or(u64::MAX)
}

/// Milliseconds since the host's boot, which a clock that is set does not change.
fn now_ms() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    let (seconds, nanos) = (now.tv_sec.unsigned_abs(), now.tv_nsec.unsigned_abs());
    seconds
        .saturating_mul(1000)
        .saturating_add(nanos / 1_000_000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_start_is_given_up_after_it_was_begun_so_often() {
        let spool = tempfile::tempdir().unwrap();
        for begun in 1..=BEGUN_MAX {
            let before = Attempt::load(spool.path()).unwrap();
            let attempt = Attempt::begin(before.as_ref(), spool.path()).unwrap();
            assert_eq!(attempt.begun, begun);
        }
        let before = Attempt::load(spool.path()).unwrap();
        let refused = Attempt::begin(before.as_ref(), spool.path()).unwrap_err();
        assert_eq!(refused.code, "start-interrupted");
    }

    #[test]
    fn a_file_that_a_power_cut_emptied_is_a_start_to_begin_anew() {
        let spool = tempfile::tempdir().unwrap();
        let spool = spool.path();
        for left in [&b""[..], &[0; 40], br#"{"begun":1,"#] {
            std::fs::write(spool.join(FILE), left).unwrap();
            let mut before = Attempt::load(spool).unwrap().unwrap();
            assert_eq!(before.take_up(spool).unwrap(), None);
            let attempt = Attempt::begin(Some(&before), spool).unwrap();
            assert_eq!(attempt.begun, 2);
            assert_eq!(Attempt::load(spool).unwrap(), Some(attempt));
        }
    }

    #[test]
    fn only_a_domain_that_boots_is_taken_up_and_its_time_goes_on() {
        let spool = tempfile::tempdir().unwrap();
        let spool = spool.path();
        let loaded = || Attempt::load(spool).unwrap().unwrap();
        let mut attempt = Attempt::begin(None, spool).unwrap();
        assert_eq!(loaded().take_up(spool).unwrap(), None);
        let limit = Duration::from_secs(600);
        attempt.booting(limit, spool).unwrap();
        let Stage::Booting { until_ms, .. } = attempt.stage else {
            unreachable!("it boots")
        };
        let left = loaded().take_up(spool).unwrap().unwrap();
        assert!(left <= limit && !left.is_zero(), "{left:?}");
        // No more time than it had at first.
        assert_eq!(loaded(), attempt);
        assert!(until_ms <= now_ms() + millis(limit));
        attempt.furnishing(spool).unwrap();
        assert_eq!(loaded().take_up(spool).unwrap(), None);
    }

    #[test]
    fn a_domain_whose_time_has_passed_without_xbed_is_heard_once() {
        let spool = tempfile::tempdir().unwrap();
        let spool = spool.path();
        let mut attempt = Attempt::begin(None, spool).unwrap();
        attempt.booting(Duration::ZERO, spool).unwrap();
        let mut loaded = Attempt::load(spool).unwrap().unwrap();
        assert_eq!(loaded.take_up(spool).unwrap(), Some(CONTACT_TIMEOUT));
        std::thread::sleep(Duration::from_millis(20));
        let again = Attempt::load(spool).unwrap().unwrap().take_up(spool);
        assert!(again.unwrap().unwrap() <= CONTACT_TIMEOUT);
        let Stage::Booting { until_ms, .. } = loaded.stage else {
            unreachable!("it boots")
        };
        let kept = Attempt::load(spool).unwrap().unwrap().stage;
        assert_eq!(
            kept,
            Stage::Booting {
                until_ms,
                prolonged: true
            }
        );
    }
}
