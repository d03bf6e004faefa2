//! All that a task or command has started.
//!
//! With cgroup v2 the kernel knows. Without it, the members are the first process's descendants, its
//! session, and orphans that the agent inherited, told apart by a mark in their environment.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::process::{Pid, Signal, getpid, kill_process, kill_process_group};
use xbee_protocol::{EndCause, Limits};

/// In the environment of every process that a task starts, unless it takes care to remove it.
pub(crate) const MARK: &str = "XBEE_CONVERSATION";

/// Where control groups are, where the agent owns the machine.
const CGROUPS: &str = "/sys/fs/cgroup";

/// A processes' tree.
#[derive(Debug)]
pub(crate) struct Tree {
    cgroup: Option<Cgroup>,
    /// Leader of the first session, while it is not reaped.
    leader: Option<Pid>,
    /// The session's id stays after its leader.
    session: Option<Pid>,
    /// Value of [`MARK`]; without it orphans are left alone.
    mark: Option<String>,
}

/// A control group of its own.
#[derive(Debug)]
struct Cgroup {
    path: PathBuf,
    procs: File,
}

/// What is left to the agent and the kernel when a task takes all memory that is there when it starts: 1 part in so
/// many.
const RESERVE_PART: u64 = 8;
/// But so much at least, in bytes.
const RESERVE_MIN_BYTES: u64 = 24 << 20;
/// Memory that a process takes in the kernel and for itself at the very least, in bytes (Linux: stack, page tables,
/// task structure): no more of them than the machine has memory for.
const PROCESS_MIN_BYTES: u64 = 64 << 10;

impl Cgroup {
    /// A new group, where cgroup v2 is there to be written.
    fn new(name: &str) -> Option<Cgroup> {
        let path = Path::new(CGROUPS).join(name);
        // The file is of version 2 only.
        fs::metadata(Path::new(CGROUPS).join("cgroup.procs")).ok()?;
        fs::create_dir(&path).ok()?;
        match OpenOptions::new()
            .write(true)
            .open(path.join("cgroup.procs"))
        {
            Ok(procs) => Some(Cgroup { path, procs }),
            Err(_) => {
                // Without it there is the way without control groups.
                let _left = fs::remove_dir(&path);
                None
            }
        }
    }

    /// Bounds the task as a whole. Of what the kernel cannot do the first process's own limits are left.
    fn bound(&self, limits: &Limits) {
        let available_bytes = available_bytes().unwrap_or(u64::MAX);
        let reserve_bytes = (available_bytes / RESERVE_PART).max(RESERVE_MIN_BYTES);
        let most_bytes = available_bytes.saturating_sub(reserve_bytes);
        let memory = limits.memory_bytes.unwrap_or(u64::MAX).min(most_bytes);
        let processes = limits.processes.unwrap_or(most_bytes / PROCESS_MIN_BYTES);
        // Handed on one by one: a kernel may have one of them only.
        for controller in ["+memory", "+pids"] {
            let _lacking = fs::write(
                Path::new(CGROUPS).join("cgroup.subtree_control"),
                controller,
            );
        }
        for (file, value) in [
            ("memory.max", memory),
            // None of it is worth anything without the others.
            ("memory.oom.group", 1),
            ("pids.max", processes),
        ] {
            let _lacking = fs::write(self.path.join(file), value.to_string());
        }
    }

    /// The bound that the task ran into, if it did.
    fn hit(&self) -> Option<EndCause> {
        let counted = |file: &str, name: &str| {
            let text = fs::read_to_string(self.path.join(file)).unwrap_or_default();
            let mut words = text.split_whitespace();
            words.any(|word| word == name) && words.next().is_some_and(|count| count != "0")
        };
        if counted("memory.events", "oom_kill") {
            Some(EndCause::MemoryLimit)
        } else if counted("pids.events", "max") {
            Some(EndCause::ProcessLimit)
        } else {
            None
        }
    }

    fn members(&self) -> Option<Vec<Pid>> {
        let list = fs::read_to_string(self.path.join("cgroup.procs")).ok()?;
        Some(
            list.lines()
                .filter_map(|line| Pid::from_raw(line.parse().ok()?))
                .collect(),
        )
    }

    /// Kills all members at once; Linux 5.14 and later can.
    fn kill(&self) -> std::io::Result<()> {
        OpenOptions::new()
            .write(true)
            .open(self.path.join("cgroup.kill"))?
            .write_all(b"1")
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // Refused while something is left in it, which is then nobody's business any more.
        let _busy = fs::remove_dir(&self.path);
    }
}

impl Tree {
    /// A tree with nothing in it; with control groups only where the agent owns the machine, and there bounded.
    pub(crate) fn new(
        name: &str,
        owns_machine: bool,
        mark: Option<String>,
        limits: &Limits,
    ) -> Tree {
        let cgroup = if owns_machine {
            Cgroup::new(name)
        } else {
            None
        };
        if let Some(cgroup) = &cgroup {
            cgroup.bound(limits);
        }
        Tree {
            cgroup,
            leader: None,
            session: None,
            mark,
        }
    }

    /// What the first process writes itself into.
    pub(crate) fn cgroup_procs(&self) -> Option<BorrowedFd<'_>> {
        self.cgroup.as_ref().map(|cgroup| cgroup.procs.as_fd())
    }

    pub(crate) fn started(&mut self, leader: Pid) {
        self.leader = Some(leader);
        self.session = Some(leader);
    }

    /// The first process is reaped: its number may be another's soon.
    pub(crate) fn leader_reaped(&mut self) {
        self.leader = None;
    }

    /// The bound of all of it together that it ran into, if it did.
    pub(crate) fn bound_hit(&self) -> Option<EndCause> {
        self.cgroup.as_ref().and_then(Cgroup::hit)
    }

    /// Whether memory is bounded for all of it together.
    pub(crate) fn bounds_memory(&self) -> bool {
        let bounded = |cgroup: &Cgroup| cgroup.path.join("memory.max").exists();
        self.cgroup.as_ref().is_some_and(bounded)
    }

    /// The task is over: its control group goes, unless somebody was left behind in it.
    pub(crate) fn release(&mut self) {
        self.cgroup = None;
    }

    /// Sends a signal to the first process's group.
    pub(crate) fn signal_group(&self, signal: Signal) -> Result<(), Errno> {
        match self.leader {
            Some(leader) => kill_process_group(leader, signal),
            None => Err(Errno::SRCH),
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.members().is_empty()
    }

    /// Asks everything to end: TERM, and CONT for what is stopped.
    pub(crate) fn terminate(&self) {
        // The first process first: it is to end by the signal, not by what becomes of its children.
        let others = self
            .members()
            .into_iter()
            .filter(|pid| Some(*pid) != self.leader);
        for pid in self.leader.into_iter().chain(others) {
            // What has ended meanwhile needs no signal.
            let _gone = kill_process(pid, Signal::TERM);
            let _gone = kill_process(pid, Signal::CONT);
        }
    }

    /// Ends everything. What forks meanwhile is met in the next round.
    pub(crate) fn kill(&self) {
        if self
            .cgroup
            .as_ref()
            .is_some_and(|cgroup| cgroup.kill().is_ok())
        {
            return;
        }
        let mut stopped = HashSet::new();
        loop {
            // Stopped first, so that the number of those that can fork shrinks in every round.
            let fresh: Vec<Pid> = self
                .members()
                .into_iter()
                .filter(|pid| stopped.insert(*pid))
                .collect();
            if fresh.is_empty() {
                break;
            }
            for pid in fresh {
                let _gone = kill_process(pid, Signal::STOP);
            }
        }
        for pid in stopped {
            let _gone = kill_process(pid, Signal::KILL);
        }
    }

    fn members(&self) -> Vec<Pid> {
        match self.cgroup.as_ref().and_then(Cgroup::members) {
            Some(members) => members,
            None => self.members_in(&processes()),
        }
    }

    fn members_in(&self, processes: &HashMap<i32, Process>) -> Vec<Pid> {
        let own = getpid().as_raw_nonzero().get();
        let leader = self.leader.map(|pid| pid.as_raw_nonzero().get());
        let session = self.session.map(|pid| pid.as_raw_nonzero().get());
        let mut members: HashSet<i32> = processes
            .iter()
            .filter(|(pid, process)| {
                Some(**pid) == leader
                    || Some(process.session) == session
                    || (process.parent == own && self.is_marked(**pid))
            })
            .map(|(pid, _)| *pid)
            .collect();
        loop {
            let before = members.len();
            let children = processes
                .iter()
                .filter(|(_, process)| members.contains(&process.parent))
                .map(|(pid, _)| *pid);
            members.extend(children.collect::<Vec<_>>());
            if members.len() == before {
                break;
            }
        }
        members.remove(&own);
        members
            .into_iter()
            .filter(|pid| processes.get(pid).is_some_and(|process| !process.zombie))
            .filter_map(Pid::from_raw)
            .collect()
    }

    fn is_marked(&self, pid: i32) -> bool {
        let Some(mark) = &self.mark else { return false };
        let wanted = format!("{MARK}={mark}");
        fs::read(format!("/proc/{pid}/environ")).is_ok_and(|environ| {
            environ
                .split(|byte| *byte == 0)
                .any(|v| v == wanted.as_bytes())
        })
    }
}

/// Memory that is there to be taken; `None`: the kernel does not say.
fn available_bytes() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let mut words = text.split_whitespace();
    words.find(|word| *word == "MemAvailable:")?;
    words.next()?.parse::<u64>().ok()?.checked_mul(1024)
}

/// What `/proc` says of a process.
#[derive(Debug)]
struct Process {
    parent: i32,
    session: i32,
    zombie: bool,
}

fn processes() -> HashMap<i32, Process> {
    let Ok(entries) = fs::read_dir("/proc") else {
        return HashMap::new();
    };
    entries
        .filter_map(|entry| {
            let pid = entry.ok()?.file_name().to_str()?.parse().ok()?;
            // It may be gone again.
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            Some((pid, parse_stat(&stat)?))
        })
        .collect()
}

/// `proc(5)`: the name is in parentheses and may hold anything.
fn parse_stat(stat: &str) -> Option<Process> {
    let (_, rest) = stat.rsplit_once(") ")?;
    let mut fields = rest.split(' ');
    let state = fields.next()?;
    let parent = fields.next()?.parse().ok()?;
    let _group = fields.next()?;
    let session = fields.next()?.parse().ok()?;
    Some(Process {
        parent,
        session,
        zombie: matches!(state, "Z" | "X"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_may_hold_anything() {
        let process = parse_stat("12 (a) Z 1 (b) S 7 9 9 0 -1 4194560 0").unwrap();
        assert_eq!(
            (process.parent, process.session, process.zombie),
            (7, 9, false)
        );
        assert!(parse_stat("12 (x) Z 7 9 9 0").unwrap().zombie);
        assert!(parse_stat("").is_none());
    }

    #[test]
    fn descendants_and_session_are_members() {
        let process = |parent, session| Process {
            parent,
            session,
            zombie: false,
        };
        let mut tree = Tree::new("t", false, None, &Limits::default());
        tree.started(Pid::from_raw(100).unwrap());
        let processes = HashMap::from([
            (100, process(1, 100)),
            (101, process(100, 101)),
            (102, process(101, 102)),
            (103, process(1, 100)),
            (104, process(1, 104)),
        ]);
        let mut members: Vec<i32> = tree
            .members_in(&processes)
            .iter()
            .map(|pid| pid.as_raw_nonzero().get())
            .collect();
        members.sort_unstable();
        assert_eq!(members, [100, 101, 102, 103]);
    }
}
