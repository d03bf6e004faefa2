//! Names of destinations.
//!
//! `/topic/NAME` is a topic: each subscriber gets each message that is sent while it is subscribed. Everything else is a
//! queue: each message goes to one of its consumers. The whole string is the name, so `/queue/a` and `a` are two queues.

use std::fmt;

/// What messages to a destination do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// One consumer gets a message.
    Queue,
    /// All subscribers do.
    Topic,
}

/// Why a string names no destination.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadDestination {
    /// Nothing, or nothing after the prefix.
    #[error("a destination without a name")]
    Empty,
    /// More bytes than the limit.
    #[error("a destination's name of more than {0} bytes")]
    TooLong(usize),
    /// Line ends and their like.
    #[error("a destination's name with control characters")]
    Control,
}

/// What messages to `name` do.
pub fn kind(name: &str, most_bytes: usize) -> Result<Kind, BadDestination> {
    if name.len() > most_bytes {
        return Err(BadDestination::TooLong(most_bytes));
    }
    if name.chars().any(char::is_control) {
        return Err(BadDestination::Control);
    }
    let bare = name
        .strip_prefix("/queue/")
        .or_else(|| name.strip_prefix("/topic/"))
        .unwrap_or(name);
    match bare.is_empty() {
        true => Err(BadDestination::Empty),
        false if name.starts_with("/topic/") => Ok(Kind::Topic),
        false => Ok(Kind::Queue),
    }
}

/// Names of destinations: one, or all that begin alike (`/queue/jobs.*`).
#[derive(Debug, Clone, PartialEq, Eq, serde::Deserialize)]
#[serde(try_from = "String")]
pub struct Pattern {
    text: String,
    open: bool,
}

impl Pattern {
    /// Whether `name` is one of them.
    pub fn matches(&self, name: &str) -> bool {
        match self.open {
            true => name.starts_with(&self.text),
            false => name == self.text,
        }
    }
}

impl TryFrom<String> for Pattern {
    type Error = String;

    fn try_from(mut text: String) -> Result<Pattern, String> {
        let open = text.ends_with('*');
        if open {
            text.pop();
        }
        match text.contains('*') {
            true => Err(format!("{text:?}: a * can only be the last character")),
            false => Ok(Pattern { text, open }),
        }
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.text, if self.open { "*" } else { "" })
    }
}

/// What somebody may do.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rights {
    /// Destinations that they may subscribe to.
    pub read: Vec<Pattern>,
    /// Destinations that they may send to.
    pub write: Vec<Pattern>,
}

impl Rights {
    /// Everything.
    pub fn all() -> Rights {
        let everything = || {
            vec![Pattern {
                text: String::new(),
                open: true,
            }]
        };
        Rights {
            read: everything(),
            write: everything(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn topics_by_their_prefix_and_all_else_a_queue() {
        assert_eq!(kind("/topic/a", 99), Ok(Kind::Topic));
        assert_eq!(kind("/queue/a", 99), Ok(Kind::Queue));
        assert_eq!(kind("jobs", 99), Ok(Kind::Queue));
        assert_eq!(kind("/temp-queue/a", 99), Ok(Kind::Queue));
        for empty in ["", "/queue/", "/topic/"] {
            assert_eq!(kind(empty, 99), Err(BadDestination::Empty));
        }
        assert_eq!(kind("/queue/a", 7), Err(BadDestination::TooLong(7)));
        assert_eq!(kind("/queue/a\nb", 99), Err(BadDestination::Control));
    }

    #[test]
    fn a_pattern_is_one_name_or_a_beginning() {
        let pattern = |text: &str| Pattern::try_from(text.to_owned());
        assert!(pattern("/queue/a*").unwrap().matches("/queue/ab"));
        assert!(!pattern("/queue/a*").unwrap().matches("/queue/b"));
        assert!(pattern("*").unwrap().matches("x"));
        assert!(!pattern("/queue/a").unwrap().matches("/queue/ab"));
        assert!(pattern("/queue/*/b").is_err());
    }
}
