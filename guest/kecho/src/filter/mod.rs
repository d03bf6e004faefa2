//! Filters that a sink places at the source.
