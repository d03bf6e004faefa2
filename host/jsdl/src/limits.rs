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
