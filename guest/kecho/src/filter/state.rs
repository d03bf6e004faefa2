//! What a sink has told a source about itself: its load, say.

use crate::types::is_name;
use crate::value::{MAX_TEXT_BYTES, Value};

/// The most names in a sink's state.
pub const MAX_STATE_NAMES: usize = 32;

/// Why a state is not kept.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// A name that is none.
    #[error(
        "a state cannot be called '{0}': ASCII letters, digits, '_', '-', '.', a letter or '_' first, at most 64"
    )]
    Name(String),
    /// One more than there may be.
    #[error("no room for '{0}': a sink has at most {MAX_STATE_NAMES} states; use those it has")]
    Full(String),
    /// Too long.
    #[error("the state '{name}' has {bytes} bytes: at most {MAX_TEXT_BYTES}")]
    Long {
        /// Its name.
        name: String,
        /// How many bytes it has.
        bytes: usize,
    },
}

impl StateError {
    /// A stable name for programs.
    pub fn code(&self) -> &'static str {
        match self {
            StateError::Name(_) => "state-name",
            StateError::Full(_) => "state-full",
            StateError::Long { .. } => "state-too-large",
        }
    }
}

/// Names and values, few enough to be looked through.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct State(Vec<(String, Value)>);

impl State {
    /// The value of a name.
    #[inline]
    pub fn get(&self, name: &str) -> Option<&Value> {
        self.0.iter().find(|entry| entry.0 == name).map(|e| &e.1)
    }

    /// Gives a name a value, instead of the one it had.
    ///
    /// # Errors
    /// [`StateError`]; the state is then as it was.
    pub fn set(&mut self, name: &str, value: Value) -> Result<(), StateError> {
        let bytes = match &value {
            Value::Text(text) => text.len(),
            Value::Bytes(bytes) => bytes.len(),
            _ => 0,
        };
        if bytes > MAX_TEXT_BYTES {
            let name = name.to_owned();
            return Err(StateError::Long { name, bytes });
        }
        if let Some(entry) = self.0.iter_mut().find(|entry| entry.0 == name) {
            entry.1 = value;
            return Ok(());
        }
        if !is_name(name) {
            return Err(StateError::Name(name.to_owned()));
        }
        if self.0.len() == MAX_STATE_NAMES {
            return Err(StateError::Full(name.to_owned()));
        }
        self.0.push((name.to_owned(), value));
        Ok(())
    }

    /// How many names there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is nothing.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_has_bounds_and_says_them() {
        let mut state = State::default();
        for n in 0..MAX_STATE_NAMES {
            state.set(&format!("s{n}"), Value::Int(0)).unwrap();
        }
        state.set("s3", "new".into()).unwrap();
        assert_eq!(state.get("s3"), Some(&"new".into()));
        assert_eq!(state.get("none"), None);
        let error = state.set("more", Value::Int(0)).unwrap_err();
        let text = "no room for 'more': a sink has at most 32 states; use those it has";
        assert_eq!(
            (error.to_string().as_str(), error.code()),
            (text, "state-full")
        );
        let error = state.set("a b", Value::Int(0)).unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("a state cannot be called 'a b': ")
        );
        let error = state.set("s1", Value::Bytes(vec![0; 4097])).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the state 's1' has 4097 bytes: at most 4096"
        );
        assert_eq!((state.get("s1"), state.len()), (Some(&Value::Int(0)), 32));
    }
}
