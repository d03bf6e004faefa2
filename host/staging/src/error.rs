//! What can go wrong, in words for the user who wrote the URI.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use crate::hash::Algorithm;
use crate::uri::Uri;

/// A failed transfer: the redacted URI and what happened to it.
#[derive(Debug)]
pub struct Error {
    uri: String,
    kind: ErrorKind,
}

impl Error {
    pub(crate) fn new(uri: &Uri, kind: ErrorKind) -> Self {
        Self {
            uri: uri.to_string(),
            kind,
        }
    }

    /// For text that is no valid URI; `redacted` must have passed [`crate::uri::redact`].
    pub(crate) fn for_text(redacted: String, kind: ErrorKind) -> Self {
        Self {
            uri: redacted,
            kind,
        }
    }

    /// What happened.
    pub fn kind(&self) -> &ErrorKind {
        &self.kind
    }

    /// Stable kebab-case name of what happened, for programs.
    pub fn code(&self) -> &'static str {
        self.kind.code()
    }

    /// The URI without credentials and query.
    pub fn uri(&self) -> &str {
        &self.uri
    }
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.uri, self.kind)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.kind.source()
    }
}

pub(crate) type Cause = Box<dyn std::error::Error + Send + Sync>;

/// What happened to a transfer. The URI it happened to is in [`Error`].
#[derive(Debug, thiserror::Error)]
pub enum ErrorKind {
    /// The text is not a URI this crate can use.
    #[error("invalid URI: {reason}")]
    InvalidUri {
        /// What is wrong with it.
        reason: String,
    },
    /// The scheme is not one of those supported.
    #[error(
        "unknown URI scheme {scheme:?}; supported are {}",
        crate::uri::SUPPORTED
    )]
    UnknownScheme {
        /// The scheme as written.
        scheme: String,
    },
    /// Nothing is there.
    #[error("not found{}", reply(.detail))]
    NotFound {
        /// What the server or system said, if it said more.
        detail: String,
    },
    /// The identity or the credentials do not suffice.
    #[error("access denied{}", reply(.detail))]
    AccessDenied {
        /// What the server or system said, if it said more.
        detail: String,
    },
    /// A directory, pipe, socket or device where a regular file is needed.
    #[error("is {what}, not a regular file")]
    NotRegularFile {
        /// With its article, as in "a directory".
        what: &'static str,
    },
    /// The destination exists and must not be replaced.
    #[error("exists already and may not be overwritten")]
    Exists,
    /// The bytes transferred are not those promised.
    #[error("wrong {algorithm} digest: expected {expected}, got {got}")]
    HashMismatch {
        /// Digest algorithm.
        algorithm: Algorithm,
        /// Expected digest in hexadecimal.
        expected: String,
        /// Digest of the bytes transferred, in hexadecimal.
        got: String,
    },
    /// A size, ratio or count limit was reached.
    #[error("too large: more than {limit} {what}")]
    SizeLimit {
        /// The limit.
        limit: u64,
        /// What is counted.
        what: &'static str,
    },
    /// A time limit was reached.
    #[error("timed out: {what} took longer than {} s", after.as_secs_f32())]
    Timeout {
        /// What did not happen in time.
        what: &'static str,
        /// The limit.
        after: Duration,
    },
    /// The caller cancelled the transfer.
    #[error("cancelled")]
    Cancelled,
    /// The data cannot be decompressed or unpacked.
    #[error("corrupt or truncated {format} data")]
    CorruptArchive {
        /// Format that was expected.
        format: &'static str,
        /// What the decoder found.
        #[source]
        source: io::Error,
    },
    /// An archive entry that could reach outside of the destination, or is no file.
    #[error("unsafe archive entry {entry:?}: {reason}")]
    UnsafeArchiveEntry {
        /// Entry path as stored in the archive, shortened.
        entry: String,
        /// Why it is refused.
        reason: String,
    },
    /// The HTTP server answered with a failure.
    #[error("the server answered HTTP status {status}")]
    HttpStatus {
        /// Status code.
        status: u16,
    },
    /// An HTTP redirect that is not followed.
    #[error("redirect refused: {reason}")]
    Redirect {
        /// Why; names the redacted target.
        reason: String,
    },
    /// No connection.
    #[error("cannot connect")]
    Connect {
        /// The cause.
        #[source]
        source: Cause,
    },
    /// The connection broke, or the peer broke the protocol, before all was transferred.
    #[error("the transfer broke off")]
    Transfer {
        /// The cause.
        #[source]
        source: Cause,
    },
    /// The connection broke, and the file is another one since then.
    #[error("the transfer broke off, and the file has changed since")]
    Changed,
    /// The file is what it was when it was fetched before. [`crate::Stager::fetch_to_keep`] turns it into its answer.
    #[error("has not changed")]
    Unchanged,
    /// The FTP server answered with a failure.
    #[error("the FTP server answered: {reply}")]
    Ftp {
        /// Reply code and text, shortened.
        reply: String,
    },
    /// The request asks for something this scheme or destination cannot do.
    #[error("not supported: {what}")]
    Unsupported {
        /// What was asked for.
        what: &'static str,
    },
    /// The host's own file system or system failed.
    #[error("{what}{}", at(.path))]
    Local {
        /// What was tried.
        what: &'static str,
        /// On which path; empty if on none.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
}

fn reply(detail: &str) -> String {
    match detail {
        "" => String::new(),
        detail => format!(" ({detail})"),
    }
}

fn at(path: &std::path::Path) -> String {
    match path.as_os_str().is_empty() {
        true => String::new(),
        false => format!(" {}", path.display()),
    }
}

impl ErrorKind {
    /// Stable kebab-case name, for programs.
    pub fn code(&self) -> &'static str {
        match self {
            Self::InvalidUri { .. } => "invalid-uri",
            Self::UnknownScheme { .. } => "unknown-scheme",
            Self::NotFound { .. } => "not-found",
            Self::AccessDenied { .. } => "access-denied",
            Self::NotRegularFile { .. } => "not-regular-file",
            Self::Exists => "exists",
            Self::HashMismatch { .. } => "hash-mismatch",
            Self::SizeLimit { .. } => "size-limit",
            Self::Timeout { .. } => "timeout",
            Self::Cancelled => "cancelled",
            Self::CorruptArchive { .. } => "corrupt-archive",
            Self::UnsafeArchiveEntry { .. } => "unsafe-archive-entry",
            Self::HttpStatus { .. } => "http-status",
            Self::Redirect { .. } => "redirect",
            Self::Connect { .. } => "connect",
            Self::Transfer { .. } => "transfer",
            Self::Changed => "changed",
            Self::Unchanged => "unchanged",
            Self::Ftp { .. } => "ftp",
            Self::Unsupported { .. } => "unsupported",
            Self::Local { source, .. }
                if matches!(
                    source.kind(),
                    io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
                ) =>
            {
                "disk-full"
            }
            Self::Local { .. } => "local-io",
        }
    }

    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        std::error::Error::source(self)
    }

    /// A failure of the host's own files.
    pub(crate) fn local(what: &'static str, path: &std::path::Path, source: io::Error) -> Self {
        Self::Local {
            what,
            path: path.to_path_buf(),
            source,
        }
    }
}

/// Text from a peer for an error message: one line, printable, short.
pub(crate) fn tame(text: &str) -> String {
    const MAX_CHARS: usize = 200;
    let mut line: String = text
        .trim()
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(MAX_CHARS)
        .collect();
    if text.trim().chars().count() > MAX_CHARS {
        line.push('…');
    }
    line
}
