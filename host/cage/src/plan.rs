//! What a program is left with.

use std::io;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde::{Deserialize, Serialize};

use crate::Error;
use crate::report::Report;

/// In the place of a plan: says as JSON what this host has for cages.
pub const CHECK: &str = "--check";

/// Whom the program runs as.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Further groups.
    pub groups: Vec<u32>,
}

/// How the program's namespaces are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Namespaces {
    /// By root.
    Own,
    /// In a user namespace.
    User,
    /// Not at all: the host forbids it.
    #[default]
    Shared,
}

/// The fences that a host has. Each that is named here must hold, or the program is not started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Parts {
    /// Mounts, network, System V IPC, host name and cgroups.
    pub namespaces: Namespaces,
    /// Whether the starting process can give it a process namespace too (see [`Plan`]).
    pub processes: bool,
    /// Landlock.
    pub landlock: bool,
}

/// What a program is left with. A process namespace is not made here but by the process that starts `cage`
/// (`unshare` of a thread before the fork): the program is to be its child.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Plan {
    /// Required fences.
    pub parts: Parts,
    /// `None`: it stays who it is.
    pub identity: Option<Identity>,
    /// Names in the working directory of what it may read.
    pub read: Vec<String>,
    /// Names in the working directory of what it may read and write.
    pub write: Vec<String>,
    /// It makes, reaches and removes unix sockets in its working directory and below, which else it only enters. It makes
    /// connections of no other kind.
    #[serde(default)]
    pub sockets: bool,
    /// Descriptors of files that it opens again under `/proc/self/fd`.
    pub reopen: Vec<RawFd>,
    /// Devices that it may use.
    pub devices: Vec<PathBuf>,
    /// Directories of control groups to join.
    pub cgroups: Vec<PathBuf>,
    /// Most open files.
    pub open_files_max: u64,
    /// Most threads of its user; `None`: not limited.
    pub threads_max: Option<u64>,
    /// Most address space, in bytes; `None`: not limited.
    pub address_space_max_bytes: Option<u64>,
}

/// The program `cage`, and what it found on this host.
#[derive(Debug, Clone)]
pub struct Cage {
    /// Where it is.
    pub program: PathBuf,
    /// What it found.
    pub report: Report,
}

impl Cage {
    /// Asks the program what this host has. Takes some milliseconds.
    ///
    /// # Errors
    /// Where it cannot be run, or says what is no report.
    pub fn find(program: &Path) -> Result<Self, Error> {
        let output = Command::new(program)
            .arg(CHECK)
            .stdin(Stdio::null())
            .output()
            .map_err(Error::io(format!("run {}", program.display())))?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            return Err(Error::io(format!("use {} {CHECK}", program.display()))(
                io::Error::other(said.trim().to_owned()),
            ));
        }
        Ok(Self {
            program: program.to_owned(),
            report: serde_json::from_slice(&output.stdout).map_err(Error::Plan)?,
        })
    }
}
