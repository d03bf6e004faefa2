//! What is wrong with a filter's source.

use super::{
    MAX_DEPTH, MAX_INSTRUCTIONS, MAX_NAMES, MAX_SOURCE_BYTES, MAX_STACK, MAX_TEXT_VARIABLE_BYTES,
    MAX_VARIABLES,
};
use crate::types::MAX_NAME_BYTES;

/// Why a filter is none, and where.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("filter, line {line}, column {column}: {fault}")]
pub struct FilterError {
    /// The line, from 1.
    pub line: usize,
    /// The character in the line, from 1.
    pub column: usize,
    /// What is wrong there.
    pub fault: Fault,
}

impl FilterError {
    /// A fault at this byte of the source.
    pub(super) fn new(source: &str, at: usize, fault: Fault) -> FilterError {
        let before = source.get(..at).unwrap_or(source);
        let line = before.rsplit('\n').next().unwrap_or(before);
        FilterError {
            line: 1 + before.matches('\n').count(),
            column: 1 + line.chars().count(),
            fault,
        }
    }

    /// A stable name for programs.
    pub fn code(&self) -> &'static str {
        match self.fault {
            Fault::Length(_)
            | Fault::Depth
            | Fault::Instructions
            | Fault::Stack
            | Fault::Names
            | Fault::Variables
            | Fault::TextVariable(_) => "filter-too-large",
            Fault::Character(_)
            | Fault::Quotes
            | Fault::Open(_)
            | Fault::Escape(_)
            | Fault::Number(_)
            | Fault::Name(_) => "filter-token",
            Fault::Expected { .. }
            | Fault::Word { .. }
            | Fault::Equals
            | Fault::Single(_)
            | Fault::Chain => "filter-syntax",
            Fault::Reserved(_)
            | Fault::Twice(_)
            | Fault::NoVariable(_)
            | Fault::Function(_)
            | Fault::Property(_) => "filter-name",
            Fault::Arguments { .. } | Fault::Has => "filter-arguments",
            Fault::Kind { .. } | Fault::Both { .. } | Fault::Set { .. } => "filter-kind",
        }
    }
}

/// What is wrong with a filter.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Fault {
    /// A source that is too long.
    #[error("a source of {0} bytes: at most {MAX_SOURCE_BYTES}; make it shorter")]
    Length(usize),
    /// Too many parentheses within each other.
    #[error("nested too deeply: at most {MAX_DEPTH}; take parentheses or calls out")]
    Depth,
    /// Too much to do for each event.
    #[error("more than {MAX_INSTRUCTIONS} values and operators; make the filter shorter")]
    Instructions,
    /// Too much to remember on the way.
    #[error(
        "more than {MAX_STACK} values wait for their operators; put the nested part of an operator first"
    )]
    Stack,
    /// Too many names.
    #[error("more than {MAX_NAMES} different fields, attributes and states; use fewer")]
    Names,
    /// Too many variables.
    #[error("more than {MAX_VARIABLES} variables; use fewer")]
    Variables,
    /// A text that no variable holds.
    #[error("a text of {0} bytes; a variable holds at most {MAX_TEXT_VARIABLE_BYTES}")]
    TextVariable(usize),
    /// A character that is nothing.
    #[error("'{0}' has no meaning in a filter; texts are in double quotes, attributes after '@'")]
    Character(char),
    /// The wrong quotes.
    #[error("texts are in double quotes, not in single ones: \"text\"")]
    Quotes,
    /// A quote that is not closed.
    #[error("what begins with {0} here does not end; close it with {0}")]
    Open(char),
    /// An escape that is none.
    #[error(
        "'\\{0}' is no escape in a text: \\\" \\\\ \\n \\t are; for a backslash write two of them"
    )]
    Escape(char),
    /// A number out of range.
    #[error(
        "{0} is too large: whole numbers are within 64 bits with sign, floats within about 1.8e308"
    )]
    Number(String),
    /// A name in backquotes that is none.
    #[error(
        "`{0}` is not a name: 1 to {MAX_NAME_BYTES} ASCII letters, digits, '_', '-' or '.', and a letter or '_' first"
    )]
    Name(String),
    /// Something else was expected.
    #[error("expected {expected}, found {found}")]
    Expected {
        /// What.
        expected: &'static str,
        /// What there is.
        found: String,
    },
    /// A word of another language.
    #[error("'{found}' is no operator here; write {write}")]
    Word {
        /// The word.
        found: String,
        /// What means it here.
        write: &'static str,
    },
    /// One `=`.
    #[error("'=' is for the first value of a variable only; compare with '==', store with set()")]
    Equals,
    /// One `&` or `|`.
    #[error("'{0}' is no operator; write '{0}{0}'")]
    Single(char),
    /// `a < b < c`.
    #[error("comparisons cannot be chained; write a < b && b < c")]
    Chain,
    /// A variable with a name that means something.
    #[error("'{0}' has a meaning of its own; give the variable another name")]
    Reserved(String),
    /// Two variables of one name.
    #[error("the variable '{0}' is there twice; give one another name")]
    Twice(String),
    /// No such variable.
    #[error("there is no variable '{0}' to set; begin the filter with: var {0} = 0;")]
    NoVariable(String),
    /// No such function.
    #[error(
        "there is no function '{0}'; there are abs, min, max, starts_with, ends_with, contains, len, has, set"
    )]
    Function(String),
    /// No such property of an event.
    #[error(
        "an event has no '{0}'; it has event.type, event.version, event.size and event.sequence; attributes are @{0}"
    )]
    Property(String),
    /// Too few or too many arguments.
    #[error("{function} takes {expected} and has {found}: {usage}")]
    Arguments {
        /// The function.
        function: &'static str,
        /// How many it takes, in words.
        expected: &'static str,
        /// How many there are.
        found: usize,
        /// How to write it.
        usage: &'static str,
    },
    /// has() of something that is always there.
    #[error(
        "has() asks for a field, an attribute or a state: has(cpu), has(@node), has(sink.load)"
    )]
    Has,
    /// A value of the wrong kind.
    #[error("{place} takes {expected}, and this is {found}")]
    Kind {
        /// Whose value it is.
        place: &'static str,
        /// What it has to be.
        expected: &'static str,
        /// What it is.
        found: &'static str,
    },
    /// Two values that cannot be compared.
    #[error("'{operator}' cannot compare {left} and {right}; both have to be {expected}")]
    Both {
        /// The operator.
        operator: &'static str,
        /// The kind left of it.
        left: &'static str,
        /// The kind right of it.
        right: &'static str,
        /// What would do.
        expected: &'static str,
    },
    /// A value that the variable cannot hold.
    #[error("the variable '{name}' holds {holds}, as its first value, and this is {found}")]
    Set {
        /// The variable.
        name: String,
        /// What it holds.
        holds: &'static str,
        /// What it should get.
        found: &'static str,
    },
}
