//! Filters that a sink places at the source, and the language they are written in.
//!
//! A filter is compiled once and then runs for each event of the source and that sink. It comes from
//! strangers: there are no loops, its instructions only jump forwards, and what depends on the length
//! of texts is counted ([`WORK`]). `docs/kecho-filters.md` is the language's reference.

mod check;
mod code;
mod error;
mod lexer;
#[cfg(test)]
mod model;
mod parser;
mod run;
pub mod state;
#[cfg(test)]
mod tests;
mod tree;

pub use error::{Fault, FilterError};
pub use run::Failure;
pub use state::{MAX_STATE_NAMES, State, StateError};

use crate::event::EventRef;
use crate::types::EventType;
use crate::value::Value;
use code::Code;
use run::{Context, Place};

/// The longest source, in bytes.
pub const MAX_SOURCE_BYTES: usize = 4 << 10;
/// The most instructions, each of which runs at most once an event.
pub const MAX_INSTRUCTIONS: usize = 256;
/// The most values that wait for their operators.
pub const MAX_STACK: usize = 32;
/// How deeply parentheses, calls and signs can be nested.
pub const MAX_DEPTH: usize = 32;
/// The most variables.
pub const MAX_VARIABLES: usize = 16;
/// The longest text in a variable, in bytes.
pub const MAX_TEXT_VARIABLE_BYTES: usize = 256;
/// The most different fields, attributes and states of a filter.
pub const MAX_NAMES: usize = 32;
/// The most steps for one event beside the instructions: bytes of texts that are looked at (twice as many
/// for those that are searched), 8 for an attribute or state that is passed by, bits of a float's remainder.
pub const WORK: usize = 16 << 10;
/// The most types whose layout a filter remembers.
const MAX_TYPES: usize = 64;

/// What a filter has done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FilterCounters {
    /// Events it was run for.
    pub run: u64,
    /// Of these, those that passed.
    pub passed: u64,
    /// Of these, those that did not pass because the filter could not decide.
    pub failed: u64,
}

/// A compiled filter with its variables, for one sink at one source.
#[derive(Debug, Clone)]
pub struct SinkFilter {
    code: Code,
    variables: Vec<Value>,
    /// Where the fields are, by the type's id.
    types: Vec<(u64, Box<[Option<Place>]>)>,
    /// The type of the last event.
    last: usize,
    counters: FilterCounters,
    failure: Option<Failure>,
}

impl SinkFilter {
    /// The filter with this source.
    ///
    /// # Errors
    /// [`FilterError`]: where the source is wrong, and what to do.
    pub fn compile(source: &str) -> Result<SinkFilter, FilterError> {
        let tree = parser::parse(source)?;
        check::check(source, &tree)?;
        let code = code::generate(source, &tree)?;
        Ok(SinkFilter {
            code,
            variables: tree.variables.into_iter().map(|(_, first)| first).collect(),
            types: Vec::new(),
            last: 0,
            counters: FilterCounters::default(),
            failure: None,
        })
    }

    /// Whether an event of the type `kind` passes. Where that cannot be decided it does not, which is
    /// counted, and [`SinkFilter::last_failure`] says why.
    #[inline]
    pub fn passes(&mut self, event: &EventRef<'_>, kind: &EventType, state: &State) -> bool {
        self.counters.run += 1;
        if !self.code.fields.is_empty()
            && self.types.get(self.last).map(|known| known.0) != Some(kind.id())
        {
            self.last = self.bind(kind);
        }
        let places = self.types.get(self.last);
        let context = Context {
            event,
            places: places.map_or(&[], |known| &known.1),
            state,
        };
        match run::run(&self.code, &context, &mut self.variables) {
            Ok(passes) => {
                self.counters.passed += u64::from(passes);
                passes
            }
            Err(failure) => {
                self.counters.failed += 1;
                self.failure = Some(failure);
                false
            }
        }
    }

    /// The index of a type in `types`.
    fn bind(&mut self, kind: &EventType) -> usize {
        if let Some(index) = self.types.iter().position(|known| known.0 == kind.id()) {
            return index;
        }
        let places = self.code.fields.iter().map(|name| {
            kind.field(name).map(|field| Place {
                kind: field.kind,
                offset: field.offset,
            })
        });
        let known = (kind.id(), places.collect());
        if self.types.len() < MAX_TYPES {
            self.types.push(known);
            return self.types.len() - 1;
        }
        // The next one after the last: with so many types it does not matter which.
        let index = (self.last + 1) % MAX_TYPES;
        self.types[index] = known;
        index
    }

    /// What it has done since it was compiled.
    pub fn counters(&self) -> FilterCounters {
        self.counters
    }

    /// Why it could not decide on the last event of which [`FilterCounters::failed`] speaks.
    pub fn last_failure(&self) -> Option<Failure> {
        self.failure
    }
}
