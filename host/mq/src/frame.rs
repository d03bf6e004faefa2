//! What STOMP is made of: versions, commands, headers, frames.

use std::fmt;

/// A version of STOMP; later ones are greater.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Version {
    /// STOMP 1.0: headers without escapes, padded as one likes.
    V1_0,
    /// STOMP 1.1: escapes for line feed, colon and backslash; heart-beats; NACK.
    V1_1,
    /// STOMP 1.2: an escape for carriage return, lines may end in CR LF, ACK by `id`.
    V1_2,
}

impl Version {
    /// All of them, oldest first.
    pub const ALL: [Version; 3] = [Version::V1_0, Version::V1_1, Version::V1_2];

    /// As it stands in headers.
    pub fn as_str(self) -> &'static str {
        match self {
            Version::V1_0 => "1.0",
            Version::V1_1 => "1.1",
            Version::V1_2 => "1.2",
        }
    }

    /// The highest version in the list of an `accept-version` header that is known here.
    pub fn highest_of(list: &str) -> Option<Version> {
        let known = |text: &str| Version::ALL.into_iter().find(|v| v.as_str() == text.trim());
        list.split(',').filter_map(known).max()
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

macro_rules! commands {
    ($($name:ident $text:literal $doc:literal;)*) => {
        /// What a frame is about.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Command {
            $(#[doc = $doc] $name,)*
        }

        impl Command {
            /// All of them.
            pub const ALL: &[Command] = &[$(Command::$name,)*];

            /// As it stands on the wire.
            pub fn as_str(self) -> &'static str {
                match self {
                    $(Command::$name => $text,)*
                }
            }

            /// Reads the first line of a frame, without its end. Commands are case sensitive.
            pub fn from_line(line: &[u8]) -> Option<Command> {
                $(if line == $text.as_bytes() {
                    return Some(Command::$name);
                })*
                None
            }
        }
    };
}

commands! {
    Send "SEND" "A client sends a message.";
    Ack "ACK" "A client has consumed a message.";
    Message "MESSAGE" "The server delivers a message.";
    Receipt "RECEIPT" "The server has processed a frame.";
    Subscribe "SUBSCRIBE" "A client wants messages.";
    Unsubscribe "UNSUBSCRIBE" "A client wants no more of them.";
    Nack "NACK" "A client did not consume a message.";
    Begin "BEGIN" "A transaction begins.";
    Commit "COMMIT" "It takes effect.";
    Abort "ABORT" "It never was.";
    Connect "CONNECT" "A client's first frame.";
    Stomp "STOMP" "The same, under a name that no other protocol uses.";
    Connected "CONNECTED" "The server's answer to it.";
    Disconnect "DISCONNECT" "A client's last frame.";
    Error "ERROR" "The server's last frame.";
}

impl Command {
    /// Whether its headers are never escaped, so that all versions can read them.
    pub fn is_unescaped(self) -> bool {
        matches!(self, Command::Connect | Command::Stomp | Command::Connected)
    }

    /// Whether its frames may have a body.
    pub fn may_have_body(self) -> bool {
        matches!(self, Command::Send | Command::Message | Command::Error)
    }
}

/// The headers of a frame, in order, without escapes. Of repeated ones the first counts.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Headers {
    // All names and values in a row, and where each name and its value end: three allocations fewer a header.
    text: String,
    ends: Vec<(u32, u32)>,
}

impl Headers {
    /// No headers.
    pub fn new() -> Headers {
        Headers::default()
    }

    /// Appends one.
    ///
    /// # Panics
    ///
    /// If all of them together have 4 GiB.
    pub fn push(&mut self, name: &str, value: &str) {
        self.text.push_str(name);
        let name_end = self.text.len();
        self.text.push_str(value);
        self.end(name_end);
    }

    /// Appends one whose value is what displays so.
    pub fn push_display(&mut self, name: &str, value: impl fmt::Display) {
        use fmt::Write as _;
        self.text.push_str(name);
        let name_end = self.text.len();
        // Writing to a string does not fail.
        let _ = write!(self.text, "{value}");
        self.end(name_end);
    }

    /// Appends what `write` appends of name and value; it gives the length of the text after the name.
    pub(crate) fn push_with<E>(
        &mut self,
        write: impl FnOnce(&mut String) -> Result<usize, E>,
    ) -> Result<(), E> {
        let name_end = write(&mut self.text)?;
        self.end(name_end);
        Ok(())
    }

    fn end(&mut self, name_end: usize) {
        let length = |at: usize| u32::try_from(at).expect("headers of less than 4 GiB");
        self.ends.push((length(name_end), length(self.text.len())));
    }

    /// With one more.
    #[must_use]
    pub fn with(mut self, name: &str, value: &str) -> Headers {
        self.push(name, value);
        self
    }

    /// The value of the first header with this name.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.iter().find(|(n, _)| *n == name).map(|(_, v)| v)
    }

    /// Name and value of each, in order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        let mut start = 0;
        self.ends.iter().map(move |&(name_end, end)| {
            let (name_end, end) = (name_end as usize, end as usize);
            let both = (&self.text[start..name_end], &self.text[name_end..end]);
            start = end;
            both
        })
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// Bytes of all names and values.
    pub fn bytes(&self) -> usize {
        self.text.len()
    }

    /// Gives back memory that is held for further headers.
    pub(crate) fn shrink(&mut self) {
        self.text.shrink_to_fit();
        self.ends.shrink_to_fit();
    }
}

impl fmt::Debug for Headers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A passcode must not get into a log by way of a frame.
        let shown = |(name, value)| (name, if name == "passcode" { "…" } else { value });
        f.debug_list().entries(self.iter().map(shown)).finish()
    }
}

impl<'a> FromIterator<(&'a str, &'a str)> for Headers {
    fn from_iter<I: IntoIterator<Item = (&'a str, &'a str)>>(all: I) -> Headers {
        let mut headers = Headers::new();
        for (name, value) in all {
            headers.push(name, value);
        }
        headers
    }
}

/// A frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// What it is about.
    pub command: Command,
    /// Its headers.
    pub headers: Headers,
    /// Its body, any bytes.
    pub body: Vec<u8>,
}

impl Frame {
    /// A frame without headers and body.
    pub fn new(command: Command) -> Frame {
        Frame {
            command,
            headers: Headers::new(),
            body: Vec::new(),
        }
    }

    /// With one more header.
    #[must_use]
    pub fn header(mut self, name: &str, value: &str) -> Frame {
        self.headers.push(name, value);
        self
    }

    /// With this body.
    #[must_use]
    pub fn body(mut self, body: impl Into<Vec<u8>>) -> Frame {
        self.body = body.into();
        self
    }
}
