//! How two guests of Xen find each other: nodes in xenstore, of which domain 0 copies what the
//! other guest is to know. Nothing here does I/O.
//!
//! All paths are below a domain's own directory, which only that domain and domain 0 can read.
//! What a guest wants it writes into its own; what concerns it, domain 0 writes there.
//!
//! | node | by | says |
//! |---|---|---|
//! | `cid` | domain 0 | the guest's context identifier |
//! | `listen/PORT` | guest | something listens |
//! | `dial/N` | guest | `CID PORT`: whom to reach; N is the stream's port here |
//! | `accept/PORT/A-N` | domain 0 | `CID`: domain A has dialled. The guest removes it once it serves or will not |
//! | `stream/A-N` | guest | the vchan that it serves for domain A |
//! | `answer/N` | domain 0 | an [`Answer`] |
//!
//! `dial/N` and `stream/A-N` last as long as the stream. When one of them goes, domain 0 removes
//! the other and `answer/N`, by which the guests hear of ends that a vchan does not tell of.

use std::fmt;
use std::str::FromStr;

/// Of all nodes.
pub const ROOT: &str = "data/xbee/peer";
/// See above.
pub const CID: &str = "data/xbee/peer/cid";
/// See above.
pub const LISTEN: &str = "data/xbee/peer/listen";
/// See above.
pub const DIAL: &str = "data/xbee/peer/dial";
/// See above.
pub const ACCEPT: &str = "data/xbee/peer/accept";
/// See above.
pub const STREAM: &str = "data/xbee/peer/stream";
/// See above.
pub const ANSWER: &str = "data/xbee/peer/answer";

/// Dials that a guest can have under way and open, all of its processes together.
pub const DIALS_MAX: usize = 64;

/// What is written is not as it should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not as the rendezvous of guests has it")]
pub struct Malformed;

/// A number in decimal, in the one way there is to write it.
///
/// # Errors
/// [`Malformed`].
pub fn number<T: FromStr + ToString>(text: &str) -> Result<T, Malformed> {
    let number = text.parse::<T>().map_err(|_| Malformed)?;
    (number.to_string() == text)
        .then_some(number)
        .ok_or(Malformed)
}

fn pair(text: &str, between: char) -> Result<(&str, &str), Malformed> {
    text.split_once(between).ok_or(Malformed)
}

/// The name of a stream, among all of a host's: who has dialled, and the number of that dial.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct StreamName {
    /// The domain that has dialled.
    pub domain: u16,
    /// The number of its dial, its port.
    pub dial: u32,
}

impl fmt::Display for StreamName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.domain, self.dial)
    }
}

impl FromStr for StreamName {
    type Err = Malformed;

    fn from_str(text: &str) -> Result<Self, Malformed> {
        let (domain, dial) = pair(text, '-')?;
        Ok(StreamName {
            domain: number(domain)?,
            dial: number(dial)?,
        })
    }
}

/// Whom a guest wants to reach.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dial {
    /// Context identifier.
    pub cid: u32,
    /// Port.
    pub port: u32,
}

impl fmt::Display for Dial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.cid, self.port)
    }
}

impl FromStr for Dial {
    type Err = Malformed;

    fn from_str(text: &str) -> Result<Self, Malformed> {
        let (cid, port) = pair(text, ' ')?;
        Ok(Dial {
            cid: number(cid)?,
            port: number(port)?,
        })
    }
}

/// What became of a dial.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// The domain serves the stream's vchan.
    Open {
        /// Xen's number of it.
        domain: u16,
    },
    /// Nothing listens there.
    Refused,
    /// There is no such guest of the same owner.
    Unreachable,
    /// One of the two has too much under way.
    Busy,
    /// The other guest has not said anything.
    TimedOut,
}

/// All but [`Answer::Open`], in words.
const WORDS: [(Answer, &str); 4] = [
    (Answer::Refused, "refused"),
    (Answer::Unreachable, "unreachable"),
    (Answer::Busy, "busy"),
    (Answer::TimedOut, "timed-out"),
];
const OPEN: &str = "open";

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Answer::Open { domain } = self {
            return write!(f, "{OPEN} {domain}");
        }
        let word = WORDS.iter().find(|(answer, _)| answer == self);
        f.write_str(word.map_or("", |(_, word)| word))
    }
}

impl FromStr for Answer {
    type Err = Malformed;

    fn from_str(text: &str) -> Result<Self, Malformed> {
        if let Some((answer, _)) = WORDS.iter().find(|(_, word)| *word == text) {
            return Ok(*answer);
        }
        match pair(text, ' ')? {
            (OPEN, domain) => Ok(Answer::Open {
                domain: number(domain)?,
            }),
            _ => Err(Malformed),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn answers_are_read_as_written() {
        let open = Answer::Open { domain: 7 };
        for answer in WORDS.map(|(answer, _)| answer).into_iter().chain([open]) {
            let text = answer.to_string();
            assert!(!text.is_empty());
            assert_eq!(text.parse(), Ok(answer));
        }
        for text in [
            "",
            "open",
            "open ",
            "open 65536",
            "open 07",
            "no",
            "open 7 ",
        ] {
            assert_eq!(text.parse::<Answer>(), Err(Malformed), "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn names_and_dials_are_read_as_written(domain: u16, dial: u32, cid: u32, port: u32) {
            let name = StreamName { domain, dial };
            prop_assert_eq!(name.to_string().parse(), Ok(name));
            let dial = Dial { cid, port };
            prop_assert_eq!(dial.to_string().parse(), Ok(dial));
        }

        #[test]
        fn what_is_read_is_written_so(text in "[0-9+ -]{0,12}") {
            if let Ok(name) = text.parse::<StreamName>() {
                prop_assert_eq!(name.to_string(), text.clone());
            }
            if let Ok(dial) = text.parse::<Dial>() {
                prop_assert_eq!(dial.to_string(), text);
            }
        }
    }
}
