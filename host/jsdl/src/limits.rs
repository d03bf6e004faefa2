//! Every bound on what a document may contain, in one place.

/// Largest accepted document in bytes, before decoding.
pub const MAX_DOCUMENT_BYTES: usize = 1024 * 1024;
/// Deepest accepted nesting of elements.
pub const MAX_DEPTH: usize = 64;
/// Most elements in one document.
pub const MAX_ELEMENTS: usize = 50_000;
/// Most attributes (namespace declarations included) of one element.
pub const MAX_ATTRIBUTES: usize = 64;
/// Most namespace declarations in force at one place.
pub const MAX_NAMESPACES: usize = 256;
/// Most diagnostics reported for one document; the rest is cut off.
pub const MAX_DIAGNOSTICS: usize = 50;
/// Most characters of a document's own text repeated in one message.
pub const MAX_QUOTED_CHARS: usize = 60;

/// Most jobs of one parameter sweep where the caller has no reason for another number.
pub const MAX_SWEEP_JOBS: u64 = 10_000;
/// Most bytes that the documents of all jobs of one sweep may have together.
pub const MAX_SWEEP_BYTES: u64 = 64 * 1024 * 1024;
/// Deepest accepted nesting of `Sweep` elements.
pub const MAX_SWEEP_DEPTH: usize = 8;
/// Most `DocumentNode` elements in one document.
pub const MAX_SWEEP_MATCHES: usize = 256;
/// Most steps of one path.
pub const MAX_MATCH_STEPS: usize = 32;
/// Most elements that all paths of one document look at.
pub const MAX_MATCH_VISITS: usize = 4_000_000;
/// Most digits of a loop's numbers before the decimal point, and as many behind it.
pub const MAX_LOOP_DIGITS: usize = 18;
