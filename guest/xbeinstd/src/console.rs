//! What the agent has to say where nobody may be listening: the guest's console.

use std::io::Write;

/// Writes a line. The console is the last resort, so its failing is nobody's news.
pub(crate) fn log(text: &str) {
    let _nowhere = writeln!(std::io::stderr(), "xbeinstd: {text}");
}
