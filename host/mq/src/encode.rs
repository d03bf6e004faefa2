//! Frames to bytes.

use crate::frame::{Command, Frame, Headers, Version};

/// Writes the beginning of a frame.
pub(crate) fn command(out: &mut Vec<u8>, command: Command) {
    out.extend_from_slice(command.as_str().as_bytes());
    out.push(b'\n');
}

/// Writes a header, escaped as `version` has it; `None`: as in CONNECT and CONNECTED, not at all.
///
/// Where nothing can be escaped, a header that would break the frame is left out: one with a line feed, or a colon in its
/// name.
pub(crate) fn header(out: &mut Vec<u8>, version: Option<Version>, name: &str, value: &str) {
    let breaks = |text: &str| memchr::memchr2(b'\n', b'\0', text.as_bytes()).is_some();
    match version {
        Some(version @ (Version::V1_1 | Version::V1_2)) => {
            escape(out, version, name);
            out.push(b':');
            escape(out, version, value);
        }
        _ if breaks(name) || name.contains(':') || breaks(value) => return,
        _ => {
            out.extend_from_slice(name.as_bytes());
            out.push(b':');
            out.extend_from_slice(value.as_bytes());
        }
    }
    out.push(b'\n');
}

/// Writes a header whose value is a number.
pub(crate) fn number(out: &mut Vec<u8>, name: &str, value: u64) {
    out.extend_from_slice(name.as_bytes());
    out.push(b':');
    digits(out, value);
    out.push(b'\n');
}

/// Writes a number in decimal.
pub(crate) fn digits(out: &mut Vec<u8>, mut value: u64) {
    let mut text = [0; 20];
    let mut at = text.len();
    loop {
        at -= 1;
        text[at] = b'0' + (value % 10) as u8;
        value /= 10;
        if value == 0 {
            break;
        }
    }
    out.extend_from_slice(&text[at..]);
}

/// Writes the end of the headers, the body and the end of the frame.
pub(crate) fn body(out: &mut Vec<u8>, body: &[u8]) {
    out.push(b'\n');
    out.extend_from_slice(body);
    out.push(b'\0');
}

fn escape(out: &mut Vec<u8>, version: Version, text: &str) {
    let mut rest = text.as_bytes();
    loop {
        let special = |&b: &u8| match b {
            b'\\' | b'\n' | b':' => true,
            b'\r' => version == Version::V1_2,
            _ => false,
        };
        let Some(at) = rest.iter().position(special) else {
            out.extend_from_slice(rest);
            return;
        };
        out.extend_from_slice(&rest[..at]);
        out.extend_from_slice(match rest[at] {
            b'\\' => b"\\\\",
            b'\n' => b"\\n",
            b'\r' => b"\\r",
            _ => b"\\c",
        });
        rest = &rest[at + 1..];
    }
}

impl Frame {
    /// Appends the frame as `version` has it. `content-length` is written where there is a body, whatever the headers say.
    pub fn encode(&self, version: Version, out: &mut Vec<u8>) {
        command(out, self.command);
        let version = (!self.command.is_unescaped()).then_some(version);
        for (name, value) in self.headers.iter() {
            if name != "content-length" {
                header(out, version, name, value);
            }
        }
        if !self.body.is_empty() {
            number(out, "content-length", self.body.len() as u64);
        }
        body(out, &self.body);
    }
}

impl Headers {
    /// As the lines of a frame of STOMP 1.2.
    pub(crate) fn to_lines(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.bytes() + 2 * self.len());
        for (name, value) in self.iter() {
            header(&mut out, Some(Version::V1_2), name, value);
        }
        out
    }
}
