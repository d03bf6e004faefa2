//! Failures as they go to the host.

use std::fmt::Display;

use rustix::io::Errno;
use xbee_protocol::{Failure, code};

/// A failure with a code and the words for it.
pub(crate) fn failure(code: &str, message: impl Into<String>) -> Failure {
    Failure {
        code: code.into(),
        message: message.into(),
    }
}

/// A file operation that failed.
pub(crate) fn file_failure(what: &str, path: &str, error: Errno) -> Failure {
    let code = match error {
        Errno::NOENT => code::FILE_NOT_FOUND,
        _ => code::FILE_ERROR,
    };
    failure(
        code,
        format!("cannot {what} {path} in the guest: {}", words(error)),
    )
}

/// A system call that failed.
pub(crate) fn system_failure(what: &str, error: Errno) -> Failure {
    failure(code::SYSTEM_ERROR, format!("{what}: {}", words(error)))
}

/// The system's words for an error, without its number.
pub(crate) fn words(error: Errno) -> impl Display {
    let text = std::io::Error::from(error).to_string();
    match text.find(" (os error") {
        Some(end) => text[..end].to_owned(),
        None => text,
    }
}
