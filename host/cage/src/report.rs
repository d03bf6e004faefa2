//! What a host has for cages, found by trying.

use rustix::thread::UnshareFlags;
use serde::{Deserialize, Serialize};

use crate::cgroup::Place;
use crate::plan::{Namespaces, Parts, Plan};
use crate::{Error, fence, filter, root, spaces};

/// What was found of one part.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// Which: `namespaces`, `processes`, `landlock`, `seccomp` or `cgroup`.
    pub part: String,
    /// Whether it holds, and to its full extent.
    pub holds: bool,
    /// In words.
    pub found: String,
}

/// What a host has for cages.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// What a plan may require.
    pub parts: Parts,
    /// Where control groups can be made.
    pub cgroups: Place,
    /// In words, part by part.
    pub findings: Vec<Finding>,
}

impl Report {
    /// Tries everything. The calling process is caged by that, and good for nothing but to say what it found.
    #[must_use]
    pub fn of_this_host() -> Self {
        let mut report = Self::default();
        report.find_cgroups();
        report.find_namespaces();
        match fence::version() {
            Ok(version) => {
                report.parts.landlock = true;
                // Of version 6: processes and abstract sockets outside cannot be reached.
                let full = version >= 6;
                let lack = if full {
                    ""
                } else {
                    ": signals to other processes of its user are left to seccomp (6 has them)"
                };
                report.add("landlock", full, format!("version {version}{lack}"));
            }
            Err(why) => report.add("landlock", false, why),
        }
        match filter::install(false) {
            Ok(()) => report.add("seccomp", true, "on".to_owned()),
            Err(error) => report.add("seccomp", false, chain(&error)),
        }
        report
    }

    /// As one line of JSON.
    #[must_use]
    pub fn json(&self) -> String {
        // Nothing in it can fail to be written as JSON.
        serde_json::to_string(self).unwrap_or_default()
    }

    /// What does not hold, in words; `None` where nothing is amiss.
    #[must_use]
    pub fn lacks(&self) -> Option<String> {
        let lacking: Vec<_> = self
            .findings
            .iter()
            .filter(|finding| !finding.holds)
            .map(|finding| format!("{}: {}", finding.part, finding.found))
            .collect();
        (!lacking.is_empty()).then(|| lacking.join("; "))
    }

    fn add(&mut self, part: &str, holds: bool, found: String) {
        self.findings.push(Finding {
            part: part.to_owned(),
            holds,
            found,
        });
    }

    fn find_cgroups(&mut self) {
        match Place::find() {
            Ok(place) => {
                let lacking = place.lacking();
                let found = match lacking.as_slice() {
                    [] => format!("memory, pids and cpu, {}", place.version()),
                    lacking => format!(
                        "{} cannot be limited, only by rlimits",
                        lacking.join(" and ")
                    ),
                };
                self.add("cgroup", lacking.is_empty(), found);
                self.cgroups = place;
            }
            Err(error) => self.add("cgroup", false, chain(&error)),
        }
    }

    fn find_namespaces(&mut self) {
        let mut why = vec![];
        for how in [Namespaces::Own, Namespaces::User] {
            let plan = Plan::default();
            let tried = std::env::current_exe()
                .map_err(Error::io("find this program"))
                .and_then(|program| {
                    spaces::leave(how)?;
                    root::change(&plan, &program)
                });
            match tried {
                Ok(()) => {
                    self.parts.namespaces = how;
                    break;
                }
                Err(error) => why.push(chain(&error)),
            }
        }
        match self.parts.namespaces {
            Namespaces::Own => {
                self.add("namespaces", true, "mounts, network, IPC, names".to_owned());
                let tried = spaces::unshare(UnshareFlags::NEWPID);
                self.parts.processes = tried.is_ok();
                match tried {
                    Ok(()) => self.add("processes", true, "a namespace of its own".to_owned()),
                    Err(error) => self.add("processes", false, error.to_string()),
                }
            }
            Namespaces::User => {
                self.add(
                    "namespaces",
                    true,
                    "mounts, network, IPC, names; in a user namespace".to_owned(),
                );
                self.add(
                    "processes",
                    false,
                    "a namespace of processes needs root; landlock and seccomp keep them apart"
                        .to_owned(),
                );
            }
            Namespaces::Shared => {
                self.add("namespaces", false, why.join("; "));
                self.add("processes", false, "see namespaces".to_owned());
            }
        }
    }
}

fn chain(error: &Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}
