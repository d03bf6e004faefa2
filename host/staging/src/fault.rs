//! Places at which a test lets the process die while it puts a file. What happens there, the program says.

/// Called with the name of each place passed. In debug builds only, which are what the tests run.
#[cfg(debug_assertions)]
pub static AT_POINT: std::sync::OnceLock<fn(&'static str)> = std::sync::OnceLock::new();

/// A place at which the process may die.
#[cfg(debug_assertions)]
pub(crate) fn point(name: &'static str) {
    if let Some(at_point) = AT_POINT.get() {
        at_point(name);
    }
}

/// A place at which the process may die.
#[cfg(not(debug_assertions))]
#[inline(always)]
pub(crate) fn point(_name: &'static str) {}
