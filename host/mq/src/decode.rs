//! Bytes to frames.
//!
//! A [`Decoder`] takes bytes in whatever pieces they come and keeps nothing but the frame that is not complete, within
//! [`FrameLimits`]. What it is strict about, and what it passes over:
//!
//! - CR before LF ends a line in 1.2. In 1.0 and 1.1 it belongs to the line, unless the frame's first line ends so too: a
//!   command has no CR, so that client ends all lines so. CONNECT comes before the version is known and takes both.
//! - A header's value begins after the first colon; further colons are taken as they are, though 1.2 wants them escaped.
//! - Header lines without a colon or without a name, unknown escapes, a NUL where none can be, and text that is not UTF-8
//!   are errors. In 1.0 names and values are trimmed, since its specification pads them in examples.
//! - DISCONNECT may lack the empty line after its headers, as the specification's own example of it does.

use crate::frame::{Command, Frame, Headers, Version};

/// Length of the longest first line of a frame, with room for CR LF, in bytes.
const COMMAND_LINE_BYTES: usize = 16;
/// A body is given this much memory before any of it has come, at most.
const BODY_RESERVE_BYTES: usize = 64 * 1024;

/// How large a frame may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameLimits {
    /// Headers of a frame.
    pub headers: usize,
    /// Bytes of a header line, without its end.
    pub header_line_bytes: usize,
    /// Bytes of all header lines.
    pub header_bytes: usize,
    /// Bytes of a body.
    pub body_bytes: usize,
}

impl Default for FrameLimits {
    fn default() -> FrameLimits {
        FrameLimits {
            headers: 128,
            header_line_bytes: 8 * 1024,
            header_bytes: 64 * 1024,
            body_bytes: 16 << 20,
        }
    }
}

/// Why bytes are no frame.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// The first line is no command.
    #[error("unknown command {0:?}")]
    Command(String),
    /// A header line without a colon.
    #[error("a header line without a colon: {0:?}")]
    NoColon(String),
    /// A header line that begins with the colon.
    #[error("a header without a name")]
    NoName,
    /// A header that is not UTF-8.
    #[error("a header that is not UTF-8")]
    NotUtf8,
    /// A backslash and something that makes no escape of it.
    #[error("undefined escape sequence in the header line {0:?}")]
    Escape(String),
    /// NUL before the end of the headers.
    #[error("NUL in the headers: a frame's headers end with an empty line")]
    Nul,
    /// A carriage return within a line of 1.2.
    #[error("a carriage return in a header that is not escaped")]
    CarriageReturn,
    /// `content-length` is no number.
    #[error("content-length {0:?} is no number")]
    ContentLength(String),
    /// After so many bytes as `content-length` says comes something else.
    #[error("no NUL after a body of {0} bytes, which is its content-length")]
    Unterminated(usize),
    /// Too many headers.
    #[error("more than {0} headers")]
    TooManyHeaders(usize),
    /// A line that is too long.
    #[error("a header line of more than {0} bytes")]
    LineTooLong(usize),
    /// Headers that are too long together.
    #[error("headers of more than {0} bytes")]
    HeadersTooLong(usize),
    /// A body that is too long.
    #[error("a body of more than {0} bytes")]
    BodyTooLong(usize),
}

impl Malformed {
    /// Stable code for programs.
    pub fn code(&self) -> &'static str {
        match self {
            Malformed::Command(_) => "unknown-command",
            Malformed::TooManyHeaders(_)
            | Malformed::LineTooLong(_)
            | Malformed::HeadersTooLong(_)
            | Malformed::BodyTooLong(_) => "frame-too-large",
            _ => "malformed-frame",
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Between frames or in a first line.
    Command,
    Headers,
    /// So many bytes of the body are missing.
    Counted(usize),
    /// The NUL after a counted body is missing.
    End,
    /// The body ends with a NUL.
    UntilNul,
}

/// Makes frames of bytes. After an error it is of no use any more.
#[derive(Debug)]
pub struct Decoder {
    limits: FrameLimits,
    version: Version,
    state: State,
    /// What has come of a line that is not complete.
    line: Vec<u8>,
    /// All lines of this frame end with CR LF.
    crlf: bool,
    header_bytes: usize,
    frame: Frame,
}

impl Decoder {
    /// A decoder at the beginning of a connection, or of another stream in this version.
    pub fn new(version: Version, limits: FrameLimits) -> Decoder {
        Decoder {
            limits,
            version,
            state: State::Command,
            line: Vec::new(),
            crlf: false,
            header_bytes: 0,
            frame: Frame::new(Command::Send),
        }
    }

    /// What follows is in this version.
    pub fn set_version(&mut self, version: Version) {
        self.version = version;
    }

    /// Whether a frame has begun and is not complete.
    pub fn is_within_frame(&self) -> bool {
        self.state != State::Command || !self.line.is_empty()
    }

    /// The receipt that the frame asks for which is not complete, if that much of it has come.
    pub fn receipt(&self) -> Option<&str> {
        match self.state {
            State::Command => None,
            _ => self.frame.headers.get("receipt"),
        }
    }

    /// Takes bytes from the front of `input` until a frame is complete or nothing is left.
    pub fn decode(&mut self, input: &mut &[u8]) -> Result<Option<Frame>, Malformed> {
        while !input.is_empty() {
            match self.state {
                State::Command => self.command_line(input)?,
                State::Headers => {
                    if input[0] == 0
                        && self.line.is_empty()
                        && self.frame.command == Command::Disconnect
                    {
                        *input = &input[1..];
                        return Ok(Some(self.take()));
                    }
                    self.header_line(input)?;
                }
                State::Counted(missing) => {
                    let (now, later) = input.split_at(missing.min(input.len()));
                    self.frame.body.extend_from_slice(now);
                    *input = later;
                    self.state = match missing - now.len() {
                        0 => State::End,
                        missing => State::Counted(missing),
                    };
                }
                State::End => {
                    if input[0] != 0 {
                        return Err(Malformed::Unterminated(self.frame.body.len()));
                    }
                    *input = &input[1..];
                    return Ok(Some(self.take()));
                }
                State::UntilNul => {
                    let end = memchr::memchr(0, input);
                    let (now, later) = input.split_at(end.unwrap_or(input.len()));
                    if self.frame.body.len() + now.len() > self.limits.body_bytes {
                        return Err(Malformed::BodyTooLong(self.limits.body_bytes));
                    }
                    self.frame.body.extend_from_slice(now);
                    *input = later;
                    if end.is_some() {
                        *input = &input[1..];
                        return Ok(Some(self.take()));
                    }
                }
            }
        }
        Ok(None)
    }

    fn take(&mut self) -> Frame {
        self.state = State::Command;
        self.crlf = false;
        self.header_bytes = 0;
        std::mem::replace(&mut self.frame, Frame::new(Command::Send))
    }

    fn command_line(&mut self, input: &mut &[u8]) -> Result<(), Malformed> {
        // Ends of line between frames, which are heart-beats too.
        if self.line.is_empty() && input[0] == b'\n' {
            *input = &input[1..];
            return Ok(());
        }
        let mut kept = std::mem::take(&mut self.line);
        let unknown = |line: &[u8]| Malformed::Command(excerpt(line));
        let Some(apart) = whole_line(&mut kept, input) else {
            if kept.len() > COMMAND_LINE_BYTES || kept.contains(&0) {
                return Err(unknown(&kept));
            }
            self.line = kept;
            return Ok(());
        };
        let line = apart.unwrap_or(&kept);
        let bare = line.strip_suffix(b"\r").unwrap_or(line);
        if !bare.is_empty() {
            self.frame.command = Command::from_line(bare).ok_or_else(|| unknown(bare))?;
            self.crlf = bare.len() < line.len();
            self.state = State::Headers;
        }
        kept.clear();
        self.line = kept;
        Ok(())
    }

    fn header_line(&mut self, input: &mut &[u8]) -> Result<(), Malformed> {
        let most = self.limits.header_line_bytes;
        let mut kept = std::mem::take(&mut self.line);
        let Some(apart) = whole_line(&mut kept, input) else {
            if kept.len() > most + 1 {
                return Err(Malformed::LineTooLong(most));
            }
            if kept.contains(&0) {
                return Err(Malformed::Nul);
            }
            self.line = kept;
            return Ok(());
        };
        let unescaped = self.frame.command.is_unescaped();
        let line = apart.unwrap_or(&kept);
        let line = match line.strip_suffix(b"\r") {
            Some(bare) if unescaped || self.crlf || self.version == Version::V1_2 => bare,
            // A line of nothing but CR is no header: it can only be meant as the empty one.
            Some(b"") => b"",
            _ => line,
        };
        if line.is_empty() {
            self.end_of_headers()?;
        } else {
            if line.len() > most {
                return Err(Malformed::LineTooLong(most));
            }
            self.header_bytes += line.len();
            if self.header_bytes > self.limits.header_bytes {
                return Err(Malformed::HeadersTooLong(self.limits.header_bytes));
            }
            if self.frame.headers.len() == self.limits.headers {
                return Err(Malformed::TooManyHeaders(self.limits.headers));
            }
            let version = (!unescaped).then_some(self.version);
            read_header(&mut self.frame.headers, version, line)?;
        }
        kept.clear();
        self.line = kept;
        Ok(())
    }

    fn end_of_headers(&mut self) -> Result<(), Malformed> {
        let Some(text) = self.frame.headers.get("content-length") else {
            self.state = State::UntilNul;
            return Ok(());
        };
        if text.is_empty() || !text.bytes().all(|b| b.is_ascii_digit()) {
            return Err(Malformed::ContentLength(excerpt(text.as_bytes())));
        }
        // What does not fit a number is too long as well.
        let length = text.parse().unwrap_or(usize::MAX);
        if length > self.limits.body_bytes {
            return Err(Malformed::BodyTooLong(self.limits.body_bytes));
        }
        self.frame
            .body
            .reserve_exact(length.min(BODY_RESERVE_BYTES));
        self.state = match length {
            0 => State::End,
            _ => State::Counted(length),
        };
        Ok(())
    }
}

/// Whether a line is complete, which is then the given part of `input` or else `kept`, without its line feed. If not, `kept`
/// has all there is of it.
fn whole_line<'a>(kept: &mut Vec<u8>, input: &mut &'a [u8]) -> Option<Option<&'a [u8]>> {
    match memchr::memchr(b'\n', input) {
        Some(end) => {
            let line = &input[..end];
            *input = &input[end + 1..];
            if kept.is_empty() {
                return Some(Some(line));
            }
            kept.extend_from_slice(line);
            Some(None)
        }
        None => {
            kept.extend_from_slice(input);
            *input = &[];
            None
        }
    }
}

/// Reads a header line, without its end; `version` says what is an escape, `None` that nothing is.
fn read_header(
    headers: &mut Headers,
    version: Option<Version>,
    line: &[u8],
) -> Result<(), Malformed> {
    let text = std::str::from_utf8(line).map_err(|_| Malformed::NotUtf8)?;
    if memchr::memchr(0, line).is_some() {
        return Err(Malformed::Nul);
    }
    let (mut name, mut value) = text
        .split_once(':')
        .ok_or_else(|| Malformed::NoColon(excerpt(line)))?;
    if version == Some(Version::V1_0) {
        (name, value) = (name.trim(), value.trim());
    }
    if name.is_empty() {
        return Err(Malformed::NoName);
    }
    let escapes = matches!(version, Some(Version::V1_1 | Version::V1_2));
    if matches!(version, None | Some(Version::V1_2)) && memchr::memchr(b'\r', line).is_some() {
        return Err(Malformed::CarriageReturn);
    }
    if !escapes || memchr::memchr(b'\\', line).is_none() {
        headers.push(name, value);
        return Ok(());
    }
    let carriage_return = version == Some(Version::V1_2);
    headers.push_with(|text| {
        unescape(text, name, carriage_return)
            .and_then(|()| {
                let name_end = text.len();
                unescape(text, value, carriage_return).map(|()| name_end)
            })
            .ok_or_else(|| Malformed::Escape(excerpt(line)))
    })
}

fn unescape(out: &mut String, text: &str, carriage_return: bool) -> Option<()> {
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('\\') {
        out.push_str(before);
        out.push(match after.as_bytes().first()? {
            b'n' => '\n',
            b'c' => ':',
            b'\\' => '\\',
            b'r' if carriage_return => '\r',
            _ => return None,
        });
        rest = &after[1..];
    }
    out.push_str(rest);
    Some(())
}

/// The beginning of what a peer sent, fit for a message about it.
fn excerpt(bytes: &[u8]) -> String {
    const MOST: usize = 40;
    let text = String::from_utf8_lossy(&bytes[..bytes.len().min(MOST)]).into_owned();
    match bytes.len() > MOST {
        true => text + "…",
        false => text,
    }
}

impl Headers {
    /// Reads what [`Headers::to_lines`] has written.
    pub(crate) fn from_lines(lines: &[u8]) -> Result<Headers, Malformed> {
        let mut headers = Headers::new();
        for line in lines.split(|&b| b == b'\n').filter(|line| !line.is_empty()) {
            read_header(&mut headers, Some(Version::V1_2), line)?;
        }
        headers.shrink();
        Ok(headers)
    }
}
