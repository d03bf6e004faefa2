//! Places at which a test lets this process die as `kill -9` would: before and after each write to the
//! journal and each action outside this process.
//!
//! Part of debug builds only, which are what the tests run: a release build has no code for it. A feature
//! would do the same, but the tests would then run a program that nobody builds otherwise.
//!
//! `XBED_DIE_AT=N` kills the process at the N-th point that it comes by, or at the first of a name, `XBED_POINTS=FILE` has the name of
//! each point appended to a file, a line each.

/// A place at which the process may die.
#[cfg(not(debug_assertions))]
#[inline(always)]
pub fn point(_name: &str) {}

/// Another boot of the host than this, if a test pretends one: `XBED_HOST_BOOT`.
#[cfg(not(debug_assertions))]
#[inline(always)]
pub fn host_boot() -> Option<String> {
    None
}

/// Makes the points of libraries points of this.
#[cfg(not(debug_assertions))]
#[inline(always)]
pub fn arm() {}

#[cfg(debug_assertions)]
pub use armed::{arm, host_boot, point};

#[cfg(debug_assertions)]
mod armed {
    use std::fs::{File, OpenOptions};
    use std::io::Write;
    use std::sync::{LazyLock, Mutex, PoisonError};

    struct Points {
        passed: usize,
        die_at: Option<String>,
        names: Option<File>,
    }

    static POINTS: LazyLock<Mutex<Points>> = LazyLock::new(|| {
        let names = std::env::var_os("XBED_POINTS").map(|path| {
            let opened = OpenOptions::new().create(true).append(true).open(&path);
            opened.unwrap_or_else(|error| panic!("XBED_POINTS={}: {error}", path.display()))
        });
        Mutex::new(Points {
            passed: 0,
            die_at: std::env::var("XBED_DIE_AT").ok(),
            names,
        })
    });

    /// Makes the points of libraries points of this.
    pub fn arm() {
        // Set before: by this, which does it once.
        let _ = xbee_staging::AT_POINT.set(point);
    }

    /// Another boot of the host than this, if a test pretends one.
    pub fn host_boot() -> Option<String> {
        std::env::var("XBED_HOST_BOOT").ok()
    }

    /// A place at which the process may die.
    pub fn point(name: &str) {
        // One at a time, so that nothing goes on while the process dies.
        let mut points = POINTS.lock().unwrap_or_else(PoisonError::into_inner);
        points.passed += 1;
        if let Some(names) = &mut points.names {
            let line = format!("{name}\n");
            names
                .write_all(line.as_bytes())
                .unwrap_or_else(|error| panic!("XBED_POINTS: {error}"));
        }
        let number = points.passed.to_string();
        if points
            .die_at
            .as_deref()
            .is_some_and(|at| at == name || at == number)
        {
            let killed = rustix::process::kill_process(
                rustix::process::getpid(),
                rustix::process::Signal::KILL,
            );
            unreachable!("a process outlived its SIGKILL: {killed:?}");
        }
    }
}
