//! A cage for a program that its input may take over, as a guest may its QEMU.
//!
//! The program `cage` gives up what the [`Plan`] does not leave, and becomes the program. What a host's kernel
//! has for that differs: [`Cage::find`] asks `cage` itself, and what it found is required from then on, so that
//! a fence that falls away fails a start instead of leaving a gap.
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod cgroup;
mod fence;
mod filter;
mod plan;
mod report;
mod rights;
mod root;
mod spaces;

pub use plan::{CHECK, Cage, Identity, Namespaces, Parts, Plan};
pub use report::{Finding, Report};

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Why a program is not in its cage. It does not run then.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The plan is not one.
    #[error("the plan of the cage cannot be read")]
    Plan(#[source] serde_json::Error),
    /// The kernel refused a step.
    #[error("cannot {step}")]
    Step {
        /// What was tried.
        step: String,
        /// The kernel's word.
        #[source]
        source: std::io::Error,
    },
    /// Landlock refused.
    #[error("landlock: cannot {step}")]
    Landlock {
        /// What was tried.
        step: &'static str,
        /// The library's word.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The kernel has landlock no more, or less of it than was found.
    #[error("landlock is not enforced any more: find out anew what this host has (restart xbed)")]
    Unfenced,
    /// The filter of system calls was refused.
    #[error("seccomp: the filter of system calls cannot be installed")]
    Filter(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// A file that was handed over is not at its name any more.
    #[error("{0} was replaced while the program started: start it again")]
    Replaced(PathBuf),
}

impl Error {
    fn step(step: impl Into<String>) -> impl FnOnce(rustix::io::Errno) -> Self {
        let step = step.into();
        move |error| Self::Step {
            step,
            source: error.into(),
        }
    }

    fn io(step: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let step = step.into();
        move |source| Self::Step { step, source }
    }
}

/// Becomes `program`, caged. The process must have one thread, and its working directory be the program's.
///
/// # Errors
/// What could not be done; some of the rest is done by then, so all that is left is to say so and end.
pub fn enter(plan: &Plan, program: &Path, args: &[OsString]) -> Error {
    match confine(plan, program) {
        Ok(()) => {
            Error::io(format!("run {}", program.display()))(Command::new(program).args(args).exec())
        }
        Err(error) => error,
    }
}

fn confine(plan: &Plan, program: &Path) -> Result<(), Error> {
    cgroup::join(&plan.cgroups)?;
    rights::limit(plan)?;
    spaces::leave(plan.parts.namespaces)?;
    if plan.parts.namespaces != Namespaces::Shared {
        root::change(plan, program)?;
    }
    rights::drop_all(plan.identity.as_ref())?;
    if plan.parts.landlock {
        fence::put_up(plan, program)?;
    }
    filter::install(plan.sockets)
}
