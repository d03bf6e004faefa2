//! What is wrong with a document, and where.

use std::fmt;

use crate::limits::MAX_QUOTED_CHARS;

/// One finding about a document.
///
/// `Display` prints `LINE: what is wrong, expected what`, ready to be put behind `FILE:`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Diagnostic {
    /// Line, counted from 1.
    pub line: u32,
    /// Column in characters, counted from 1.
    pub column: u32,
    /// Stable name of the kind of finding, in kebab case.
    pub code: &'static str,
    /// What is wrong and what was expected, without the position.
    pub message: String,
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.line, self.message)
    }
}

impl std::error::Error for Diagnostic {}

/// A place in the document. Line and column count from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Position {
    pub line: u32,
    pub column: u32,
}

impl Position {
    pub(crate) const START: Position = Position { line: 1, column: 1 };

    pub(crate) fn diagnostic(self, code: &'static str, message: impl Into<String>) -> Diagnostic {
        Diagnostic {
            line: self.line,
            column: self.column,
            code,
            message: message.into(),
        }
    }
}

/// A value from the document, in quotes, fit for a terminal.
pub(crate) fn quoted(value: &str) -> String {
    format!("'{}'", shown(value, MAX_QUOTED_CHARS))
}

/// Text cut to `most` characters, control characters escaped.
pub(crate) fn shown(text: &str, most: usize) -> String {
    let mut shown = String::new();
    for c in text.chars().take(most) {
        if c.is_control() {
            shown.extend(c.escape_default());
        } else {
            shown.push(c);
        }
    }
    if text.chars().nth(most).is_some() {
        shown.push('…');
    }
    shown
}
