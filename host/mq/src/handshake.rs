//! CONNECT and CONNECTED: version, heart-beats, who it is.

use std::time::Duration;

use crate::frame::{Command, Frame, Version};
use crate::refused::Refused;

/// Name and version in the header `server`.
pub const SERVER: &str = concat!("xbee-mq/", env!("CARGO_PKG_VERSION"));

/// How often the two sides of a connection write at least.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct HeartBeats {
    /// We do.
    pub send: Option<Duration>,
    /// The other side does.
    pub expect: Option<Duration>,
}

impl HeartBeats {
    /// What holds after both sides have said what they can send and would like to get, in milliseconds.
    pub fn agree((can_send, wants): (u64, u64), (they_can_send, they_want): (u64, u64)) -> Self {
        let every = |can: u64, wants: u64| match can == 0 || wants == 0 {
            true => None,
            false => Some(Duration::from_millis(can.max(wants))),
        };
        HeartBeats {
            send: every(can_send, they_want),
            expect: every(they_can_send, wants),
        }
    }

    /// When to write something though there is nothing to say: somewhat before the other side looks for it.
    pub fn send_after(&self) -> Option<Duration> {
        self.send.map(|every| every * 3 / 4)
    }

    /// How long a silence means that the other side is dead: twice what was agreed, and some time for delays.
    pub fn dead_after(&self) -> Option<Duration> {
        self.expect
            .map(|every| every * 2 + Duration::from_millis(500))
    }
}

/// Reads a `heart-beat` header: what its sender can send and would like to get, in milliseconds.
pub fn read_heart_beat(frame: &Frame) -> Result<(u64, u64), Refused> {
    let Some(text) = frame.headers.get("heart-beat") else {
        return Ok((0, 0));
    };
    let number = |text: &str| {
        let text = text.trim();
        let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        // More than a day says the same as a day.
        digits.then(|| text.parse().unwrap_or(u64::MAX).min(86_400_000))
    };
    text.split_once(',')
        .and_then(|(send, wants)| Some((number(send)?, number(wants)?)))
        .ok_or_else(|| Refused::BadHeader {
            name: "heart-beat",
            value: text.into(),
            expected: "two numbers of milliseconds with a comma between them",
        })
}

/// What a client's first frame asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Accepted {
    /// The version to speak.
    pub version: Version,
    /// Heart-beats that both agree to.
    pub heart_beats: HeartBeats,
    /// What CONNECTED says of them.
    pub offer_ms: (u64, u64),
    /// Who the client says it is.
    pub login: Option<String>,
}

/// Judges a client's first frame. Heart-beats are as often as the client likes, but no more often than `least_ms`.
///
/// `host` is not looked at: there are no virtual hosts, and clients of 1.1 and 1.2 that leave it out, though they must not,
/// are served like those that name anything.
pub fn accept(frame: &Frame, least_ms: u64) -> Result<Accepted, Refused> {
    if !matches!(frame.command, Command::Connect | Command::Stomp) {
        return Err(Refused::NotConnected(frame.command));
    }
    let version = match frame.headers.get("accept-version") {
        None => Version::V1_0,
        Some(list) => Version::highest_of(list).ok_or(Refused::Version)?,
    };
    let (can_send, wants) = read_heart_beat(frame)?;
    let offer = |theirs: u64| match theirs {
        0 => 0,
        theirs => theirs.max(least_ms),
    };
    let offer_ms = (offer(wants), offer(can_send));
    Ok(Accepted {
        version,
        heart_beats: HeartBeats::agree(offer_ms, (can_send, wants)),
        offer_ms,
        login: credential(frame, version, "login").map(str::to_owned),
    })
}

/// `login` or `passcode`; clients of 1.0 may pad them.
pub fn credential<'a>(frame: &'a Frame, version: Version, name: &str) -> Option<&'a str> {
    let text = frame.headers.get(name)?;
    Some(match version {
        Version::V1_0 => text.trim(),
        _ => text,
    })
}

/// The answer to a client that is accepted.
pub fn connected(accepted: &Accepted, session: &str) -> Frame {
    let (sends, wants) = accepted.offer_ms;
    Frame::new(Command::Connected)
        .header("version", accepted.version.as_str())
        .header("heart-beat", &format!("{sends},{wants}"))
        .header("session", session)
        .header("server", SERVER)
}

/// The frame that says why a connection ends.
pub fn error(refused: &Refused, receipt: Option<&str>) -> Frame {
    let mut frame = Frame::new(Command::Error);
    if let Some(receipt) = receipt {
        frame.headers.push("receipt-id", receipt);
    }
    if *refused == Refused::Version {
        frame.headers.push("version", "1.0,1.1,1.2");
    }
    let text = refused.to_string();
    frame
        .header("message", text.split(':').next().unwrap_or(&text))
        .header("code", refused.code())
        .header("content-type", "text/plain")
        .body(text + "\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn connect(headers: &[(&str, &str)]) -> Frame {
        Frame {
            headers: headers.iter().copied().collect(),
            ..Frame::new(Command::Connect)
        }
    }

    #[test]
    fn the_highest_common_version_is_spoken() {
        let version = |list| accept(&connect(&[("accept-version", list)]), 1).map(|a| a.version);
        assert_eq!(version("1.0,1.1,2.0"), Ok(Version::V1_1));
        assert_eq!(version("1.2,1.0"), Ok(Version::V1_2));
        assert_eq!(version(" 1.1 , 1.0"), Ok(Version::V1_1));
        assert_eq!(version("2.0"), Err(Refused::Version));
        assert_eq!(version(""), Err(Refused::Version));
        let none = accept(&connect(&[]), 1).unwrap();
        assert_eq!(none.version, Version::V1_0);
        let error = error(&Refused::Version, None);
        assert_eq!(error.headers.get("version"), Some("1.0,1.1,1.2"));
    }

    #[test]
    fn heart_beats_are_the_slower_of_what_both_say() {
        let beats = |text| {
            accept(&connect(&[("heart-beat", text)]), 100).map(|a| (a.heart_beats, a.offer_ms))
        };
        let ms = |n| Some(Duration::from_millis(n));
        let (both, offer) = beats("500,50").unwrap();
        assert_eq!(
            (both.expect, both.send, offer),
            (ms(500), ms(100), (100, 500))
        );
        assert_eq!(beats("0,0").unwrap(), (HeartBeats::default(), (0, 0)));
        let (one, offer) = beats("0,1000").unwrap();
        assert_eq!((one.expect, one.send, offer), (None, ms(1000), (1000, 0)));
        for wrong in ["", "1", "1,", "a,b", "-1,1", "1,1,1"] {
            assert!(beats(wrong).is_err(), "{wrong}");
        }
        assert_eq!(
            HeartBeats::agree((1000, 300), (200, 400)),
            HeartBeats {
                send: ms(1000),
                expect: ms(300),
            }
        );
    }
}
