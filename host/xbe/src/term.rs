//! What goes to the terminal: tables, times, colours, the progress bar.
//!
//! Nothing here panics when the reader of a pipe has gone, as `println!` would.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use xbee_api::{State, SubState, TaskStatus};

use crate::error::Error;

/// How often the bar moves.
const TICK: Duration = Duration::from_millis(120);

/// Writes one line to standard output.
///
/// # Errors
/// [`Error::Output`].
pub fn out(line: impl fmt::Display) -> Result<(), Error> {
    let mut stdout = io::stdout().lock();
    writeln!(stdout, "{line}")
        .and_then(|()| stdout.flush())
        .map_err(Error::Output)
}

/// Writes a value as one line of JSON to standard output.
///
/// # Errors
/// [`Error::Output`].
pub fn json(value: &impl Serialize) -> Result<(), Error> {
    out(serde_json::to_string(value).map_err(|error| Error::Output(error.into()))?)
}

/// Tells the user something on standard error. There is nobody to tell if that fails.
pub fn note(text: impl fmt::Display) {
    raw_note(format_args!("xbe: {text}"));
}

/// As [`note`], for programs.
pub fn raw_note(text: impl fmt::Display) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// Text from documents and guests without what would steer the terminal; line ends stay.
pub fn clean(text: &str) -> String {
    let mut clean = String::with_capacity(text.len());
    for char in text.chars() {
        match char {
            '\n' | '\t' => clean.push(char),
            char if char.is_control() => clean.extend(char.escape_default()),
            char => clean.push(char),
        }
    }
    clean
}

/// As [`clean`], in one line.
pub fn clean_line(text: &str) -> String {
    clean(text).replace(['\n', '\t'], " ")
}

/// Standard output is a terminal that may be coloured (<https://no-color.org>).
pub fn colours() -> bool {
    let forbidden = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    !forbidden && io::stdout().is_terminal()
}

/// The task's state, in its colour if `colours`.
pub fn state(task: &TaskStatus, colours: bool) -> String {
    let text = state_name(task.state, task.substate);
    let colour = match (task.state, task.exit_code) {
        _ if !colours => return text,
        (State::Finished, Some(0)) => 32,
        (State::Finished | State::Failed, _) => 31,
        (State::Terminated, _) => 33,
        (State::Running, _) => 36,
        (State::Pending, _) => return text,
    };
    format!("\x1b[{colour}m{text}\x1b[0m")
}

/// State and sub-state in the words of BES.
pub fn state_name(state: State, substate: Option<SubState>) -> String {
    match substate {
        None => state.name().to_owned(),
        Some(substate) => format!("{}: {}", state.name(), substate.name()),
    }
}

/// A time span for reading: `0.123 s`, `2 min 05 s`, `3 h 07 min`.
pub fn span(ms: u64) -> String {
    let seconds = ms / 1000;
    match seconds {
        0..60 => format!("{seconds}.{:03} s", ms % 1000),
        60..3600 => format!("{} min {:02} s", seconds / 60, seconds % 60),
        _ => format!("{} h {:02} min", seconds / 3600, seconds / 60 % 60),
    }
}

/// An age in one word: `12s`, `5m`, `3h`, `2d`.
pub fn age(ms: u64) -> String {
    let seconds = ms / 1000;
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m", seconds / 60),
        3600..86400 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86400),
    }
}

/// Progress on the terminal, on standard error; silent in a pipe or if not wanted.
#[derive(Debug)]
pub struct Progress {
    visible: Cell<bool>,
    /// What is shown, and the bar that shows it: each transfer has its own rate.
    shown: RefCell<Option<(String, ProgressBar)>>,
}

impl Progress {
    /// A bar that appears with the first thing it has to show.
    pub fn new(wanted: bool) -> Self {
        let visible = Cell::new(wanted && io::stderr().is_terminal());
        Progress {
            visible,
            shown: RefCell::default(),
        }
    }

    /// It is on a terminal: worth asking for what it shows.
    pub fn is_visible(&self) -> bool {
        self.visible.get()
    }

    /// Shows what the task is doing. While it executes the terminal is its own.
    pub fn show(&self, task: &TaskStatus) {
        let is_quiet = task.state.is_final() || task.substate == Some(SubState::Executing);
        if is_quiet {
            return;
        }
        match &task.progress {
            Some(now) => self.transfer(&now.what, now.done_bytes, now.total_bytes),
            None => self.draw(state_name(task.state, task.substate), None),
        }
    }

    /// Shows how far a transfer is.
    pub fn transfer(&self, what: &str, done_bytes: u64, total_bytes: Option<u64>) {
        self.draw(clean_line(what), Some((done_bytes, total_bytes)));
    }

    fn draw(&self, message: String, bytes: Option<(u64, Option<u64>)>) {
        if !self.visible.get() {
            return;
        }
        let style = match bytes {
            Some((_, Some(_))) => "{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}",
            Some((_, None)) => "{spinner} {msg} {bytes} {bytes_per_sec}",
            None => "{spinner} {msg} {elapsed}",
        };
        let mut shown = self.shown.borrow_mut();
        if shown
            .as_ref()
            .is_none_or(|(message_shown, _)| *message_shown != message)
        {
            if let Some((_, old)) = shown.take() {
                old.finish_and_clear();
            }
            let bar = ProgressBar::no_length();
            if let Ok(style) = ProgressStyle::with_template(style) {
                bar.set_style(style);
            }
            bar.set_message(message.clone());
            bar.enable_steady_tick(TICK);
            *shown = Some((message, bar));
        }
        if let (Some((_, bar)), Some((done, total))) = (&*shown, bytes) {
            if let Some(total) = total {
                bar.set_length(total);
            }
            bar.set_position(done);
        }
    }

    /// Takes the bar away; [`Progress::show`] brings it back.
    pub fn clear(&self) {
        if let Some((_, bar)) = self.shown.borrow_mut().take() {
            bar.finish_and_clear();
        }
    }

    /// Takes the bar away for good.
    pub fn stop(&self) {
        self.clear();
        self.visible.set(false);
    }
}

/// Rows in columns, the last one unpadded.
pub fn table(rows: &[Vec<String>]) -> Result<(), Error> {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        rows.iter()
            .filter_map(|row| row.get(column))
            .map(|cell| cell.chars().count())
            .max()
    };
    let widths: Vec<usize> = (0..columns)
        .map(|column| width(column).unwrap_or(0))
        .collect();
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            line.push_str(&format!("{cell:width$}  "));
        }
        out(line.trim_end())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_are_readable() {
        for (ms, text) in [
            (0, "0.000 s"),
            (59_999, "59.999 s"),
            (60_000, "1 min 00 s"),
            (3_599_999, "59 min 59 s"),
            (3_600_000, "1 h 00 min"),
            (90_000_000, "25 h 00 min"),
        ] {
            assert_eq!(span(ms), text);
        }
    }

    #[test]
    fn hostile_text_cannot_steer_the_terminal() {
        assert_eq!(clean("a\x1b[2J\r\n\u{9b}b"), "a\\u{1b}[2J\\r\n\\u{9b}b");
        assert_eq!(clean_line("a\nb"), "a b");
    }
}
