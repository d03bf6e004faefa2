//! Control groups, of version 1 or 2 or both, as the host has them (cgroups(7)).

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::Error;

/// What is limited.
const CONTROLLERS: [&str; 3] = ["memory", "pids", "cpu"];

/// Name of a group of version 2 beside which, not below which, others are made: `DelegateSubgroup=` of a systemd unit. The
/// kernel hands controllers on only from a group that has no process of its own.
pub const SUBGROUP: &str = "xbed";

/// The time over which processors are counted, in microseconds (the kernel's default).
const CPU_PERIOD_US: u64 = 100_000;

/// The kernel lets a group go a moment after its last process was waited for.
const REMOVE_TRIES: u32 = 50;
const REMOVE_PAUSE: Duration = Duration::from_millis(10);

/// Limits of one group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Most memory, in bytes.
    pub memory_bytes: u64,
    /// Most processes and threads.
    pub pids: u64,
    /// Most processors at once.
    pub cpus: u64,
}

/// Where groups can be made: below this process's own, or beside it if that is [`SUBGROUP`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// For each directory what is limited there.
    directories: BTreeMap<PathBuf, Vec<String>>,
    /// Those of version 2 among them.
    unified: Option<PathBuf>,
}

impl Place {
    /// Looks for it, and makes and removes a group to see that it can.
    ///
    /// # Errors
    /// Where `/proc` cannot be read. That there is nothing is no error.
    pub fn find() -> Result<Self, Error> {
        let read = |path: &str| fs::read_to_string(path).map_err(Error::io(format!("read {path}")));
        let mounts = read("/proc/self/mountinfo")?;
        let own = read("/proc/self/cgroup")?;
        let mut place = Self::default();
        for hierarchy in hierarchies(&mounts, &own) {
            let usable = hierarchy.usable();
            if usable.is_empty() || !can_have_groups(&hierarchy.directory) {
                continue;
            }
            if hierarchy.unified {
                place.unified = Some(hierarchy.directory.clone());
            }
            place.directories.insert(hierarchy.directory, usable);
        }
        Ok(place)
    }

    /// What cannot be limited here.
    #[must_use]
    pub fn lacking(&self) -> Vec<&'static str> {
        let has = |wanted: &str| self.directories.values().flatten().any(|one| one == wanted);
        CONTROLLERS.into_iter().filter(|one| !has(one)).collect()
    }

    /// Whether memory can be limited.
    #[must_use]
    pub fn limits_memory(&self) -> bool {
        !self.lacking().contains(&"memory")
    }

    /// Which control groups these are, for people.
    #[must_use]
    pub fn version(&self) -> &'static str {
        match (&self.unified, self.directories.len()) {
            (None, _) => "version 1",
            (Some(_), 1) => "version 2",
            (Some(_), _) => "versions 1 and 2",
        }
    }

    /// The directories of a group of this name.
    #[must_use]
    pub fn group(&self, name: &str) -> Vec<PathBuf> {
        let directories = self.directories.keys();
        directories.map(|directory| directory.join(name)).collect()
    }

    /// Makes a group and sets its limits. What is there of this name is used.
    ///
    /// # Errors
    /// What the kernel refused; the group may be there in part.
    pub fn make(&self, name: &str, limits: Limits) -> Result<(), Error> {
        for (directory, controllers) in &self.directories {
            let group = directory.join(name);
            match fs::create_dir(&group) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(Error::io(format!("make {}", group.display()))(error));
                }
                _ => {}
            }
            let unified = self.unified.as_ref() == Some(directory);
            for controller in controllers {
                for (file, value, needed) in settings(controller, unified, limits) {
                    let path = group.join(file);
                    if !needed && !path.exists() {
                        continue;
                    }
                    fs::write(&path, &value)
                        .map_err(Error::io(format!("write {value} to {}", path.display())))?;
                }
            }
        }
        Ok(())
    }
}

/// Files of a group, what is written to them, and whether every kernel has them.
fn settings(controller: &str, unified: bool, limits: Limits) -> Vec<(&'static str, String, bool)> {
    let memory = limits.memory_bytes.to_string();
    let quota_us = limits.cpus * CPU_PERIOD_US;
    match (controller, unified) {
        ("memory", true) => vec![
            ("memory.max", memory, true),
            ("memory.swap.max", "0".to_owned(), false),
        ],
        ("memory", false) => vec![
            ("memory.limit_in_bytes", memory.clone(), true),
            // With swap, which is no way around it; only kernels that count it have it.
            ("memory.memsw.limit_in_bytes", memory, false),
        ],
        ("pids", _) => vec![("pids.max", limits.pids.to_string(), true)],
        ("cpu", true) => vec![("cpu.max", format!("{quota_us} {CPU_PERIOD_US}"), true)],
        ("cpu", false) => vec![
            ("cpu.cfs_period_us", CPU_PERIOD_US.to_string(), true),
            ("cpu.cfs_quota_us", quota_us.to_string(), true),
        ],
        _ => vec![],
    }
}

/// Removes the directories of a group; those that are not there are fine.
///
/// # Errors
/// Where one stays, because a process is still in it for example.
pub fn remove(group: &[PathBuf]) -> Result<(), Error> {
    for directory in group {
        let mut tries = 0;
        loop {
            match fs::remove_dir(directory) {
                Ok(()) => break,
                Err(error) if error.kind() == io::ErrorKind::NotFound => break,
                Err(error)
                    if error.kind() == io::ErrorKind::ResourceBusy && tries < REMOVE_TRIES =>
                {
                    tries += 1;
                    sleep(REMOVE_PAUSE);
                }
                Err(error) => {
                    return Err(Error::io(format!("remove {}", directory.display()))(error));
                }
            }
        }
    }
    Ok(())
}

/// How often the kernel ended a process of the group because its memory was used up.
#[must_use]
pub fn out_of_memory(group: &[PathBuf]) -> u64 {
    // Version 1 and version 2; a group has one of them, and without memory neither.
    let files = ["memory.oom_control", "memory.events"];
    let paths = group
        .iter()
        .flat_map(|directory| files.map(|file| directory.join(file)));
    let texts = paths.filter_map(|path| fs::read_to_string(path).ok());
    texts
        .filter_map(|text| {
            let mut lines = text.lines();
            lines.find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse::<u64>().ok())
        })
        .sum()
}

/// Moves this process into a group.
pub(crate) fn join(group: &[PathBuf]) -> Result<(), Error> {
    for directory in group {
        let file = directory.join("cgroup.procs");
        fs::write(&file, "0").map_err(Error::io(format!("enter {}", directory.display())))?;
    }
    Ok(())
}

#[derive(Debug, PartialEq, Eq)]
struct Hierarchy {
    directory: PathBuf,
    unified: bool,
    /// Of version 1, what its mount has.
    controllers: Vec<String>,
}

impl Hierarchy {
    /// What can be limited in groups made in the directory.
    fn usable(&self) -> Vec<String> {
        if !self.unified {
            return self.controllers.clone();
        }
        let words = |file: &str| -> Vec<String> {
            let text = fs::read_to_string(self.directory.join(file)).unwrap_or_default();
            text.split_whitespace().map(str::to_owned).collect()
        };
        // Handed on to groups below only if no process is in this one, unless it is the root.
        let there = words("cgroup.controllers");
        let wanted = CONTROLLERS
            .into_iter()
            .filter(|one| there.iter().any(|has| has == one));
        let order: Vec<String> = wanted.map(|one| format!("+{one}")).collect();
        let _ = fs::write(
            self.directory.join("cgroup.subtree_control"),
            order.join(" "),
        );
        let mut handed_on = words("cgroup.subtree_control");
        handed_on.retain(|one| CONTROLLERS.contains(&one.as_str()));
        handed_on
    }
}

/// Where this process's groups are, by `/proc/self/mountinfo` and `/proc/self/cgroup`.
fn hierarchies(mounts: &str, own: &str) -> Vec<Hierarchy> {
    let mut found = vec![];
    for line in mounts.lines() {
        let Some((before, after)) = line.split_once(" - ") else {
            continue;
        };
        let before: Vec<&str> = before.split(' ').collect();
        let after: Vec<&str> = after.split(' ').collect();
        let ([_, _, _, root, at, ..], [kind, _, options, ..]) = (&before[..], &after[..]) else {
            continue;
        };
        let unified = *kind == "cgroup2";
        if !unified && *kind != "cgroup" {
            continue;
        }
        let controllers: Vec<String> = CONTROLLERS
            .into_iter()
            .filter(|one| !unified && options.split(',').any(|option| option == *one))
            .map(str::to_owned)
            .collect();
        let path = own.lines().find_map(|line| {
            let mut fields = line.splitn(3, ':');
            let (number, names, path) = (fields.next()?, fields.next()?, fields.next()?);
            let same = match unified {
                true => number == "0",
                false => names
                    .split(',')
                    .any(|name| controllers.iter().any(|one| one == name)),
            };
            same.then_some(path)
        });
        // A process outside of what is mounted here has no directory to work with.
        let Some(below) = path.and_then(|path| Path::new(path).strip_prefix(root).ok()) else {
            continue;
        };
        let below = match below.parent() {
            Some(parent) if unified && below.ends_with(SUBGROUP) => parent,
            _ => below,
        };
        let directory: PathBuf = Path::new(at).join(below).components().collect();
        if found
            .iter()
            .all(|one: &Hierarchy| one.directory != directory)
        {
            found.push(Hierarchy {
                directory,
                unified,
                controllers,
            });
        }
    }
    found
}

fn can_have_groups(directory: &Path) -> bool {
    let trial = directory.join(format!("xbee-check-{}", std::process::id()));
    fs::create_dir(&trial).is_ok() && fs::remove_dir(&trial).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "\
30 23 0:25 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755
31 30 0:26 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct
32 30 0:27 / /sys/fs/cgroup/memory rw,relatime shared:10 - cgroup cgroup rw,memory
33 30 0:28 /inner /sys/fs/cgroup/pids rw,relatime - cgroup cgroup rw,pids
34 30 0:29 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd
35 30 0:30 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup rw";
    const OWN: &str = "\
4:cpu,cpuacct:/a/b
3:memory:/
2:pids:/elsewhere
1:name=systemd:/s
0::/u";

    #[test]
    fn the_own_groups_are_found_in_both_versions() {
        let found = hierarchies(HYBRID, OWN);
        let found: Vec<_> = found
            .iter()
            .map(|one| {
                (
                    one.directory.to_str().unwrap(),
                    one.unified,
                    one.controllers.join(" "),
                )
            })
            .collect();
        assert_eq!(
            found,
            [
                ("/sys/fs/cgroup/cpu,cpuacct/a/b", false, "cpu".to_owned()),
                ("/sys/fs/cgroup/memory", false, "memory".to_owned()),
                ("/sys/fs/cgroup/unified/u", true, String::new()),
            ]
        );
    }

    #[test]
    fn beside_the_subgroup_of_a_service_others_are_made() {
        let mounts = "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw";
        for (own, made) in [
            (
                "0::/system.slice/xbed.service/xbed",
                "system.slice/xbed.service",
            ),
            ("0::/system.slice/xbed.service", "system.slice/xbed.service"),
            ("0::/xbed", ""),
        ] {
            let found = hierarchies(mounts, own);
            let made = Path::new("/sys/fs/cgroup").join(made);
            assert_eq!(found[0].directory, made.components().collect::<PathBuf>());
        }
    }

    #[test]
    fn limits_are_written_as_each_version_wants_them() {
        let limits = Limits {
            memory_bytes: 4096,
            pids: 7,
            cpus: 2,
        };
        let dir = tempfile::tempdir().unwrap();
        for unified in [false, true] {
            let at = dir.path().join(unified.to_string());
            fs::create_dir_all(at.join("group")).unwrap();
            for file in ["memory.swap.max", "memory.memsw.limit_in_bytes"] {
                fs::write(at.join("group").join(file), "max").unwrap();
            }
            let place = Place {
                directories: [(at.clone(), CONTROLLERS.map(str::to_owned).into())].into(),
                unified: unified.then_some(at),
            };
            place.make("group", limits).unwrap();
        }
        let text = |file: &str| fs::read_to_string(dir.path().join(file)).unwrap();
        assert_eq!(text("false/group/memory.limit_in_bytes"), "4096");
        assert_eq!(text("false/group/memory.memsw.limit_in_bytes"), "4096");
        assert_eq!(text("false/group/pids.max"), "7");
        assert_eq!(text("false/group/cpu.cfs_quota_us"), "200000");
        assert_eq!(text("true/group/memory.max"), "4096");
        assert_eq!(text("true/group/memory.swap.max"), "0");
        assert_eq!(text("true/group/pids.max"), "7");
        assert_eq!(text("true/group/cpu.max"), "200000 100000");
    }
}
