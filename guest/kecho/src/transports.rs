//! Which ways there are to other nodes.

use std::path::Path;

use xbee_link::HOST_CID;

/// The first context identifier of guests.
const FIRST_GUEST: u32 = 3;
/// The most entries of `/proc` that are looked at.
const MAX_PROCESSES: usize = 4096;

/// Ways to other nodes, the shortest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Transports {
    /// Within a process.
    pub same_process: bool,
    /// Within a kernel: unix sockets and shared memory.
    pub shared_memory: bool,
    /// Between guests. By default in a guest of XenBEE's.
    pub vsock: bool,
    /// IPv6.
    pub tcp: bool,
}

impl Default for Transports {
    fn default() -> Transports {
        Transports {
            same_process: true,
            shared_memory: true,
            vsock: has_agent(Path::new("/proc"))
                && xbee_link::peer::local_cid().is_ok_and(is_guest),
            tcp: true,
        }
    }
}

/// Whether XenBEE's agent runs here: in other virtual machines vsock may be for something else.
fn has_agent(processes: &Path) -> bool {
    let Ok(processes) = std::fs::read_dir(processes) else {
        return false;
    };
    processes
        .flatten()
        .take(MAX_PROCESSES)
        .any(|process| is_agent(&process.path()))
}

fn is_agent(process: &Path) -> bool {
    // It may have ended meanwhile.
    let read = |file| std::fs::read(process.join(file)).unwrap_or_default();
    match read("comm").trim_ascii_end() {
        b"xbeinstd" => true,
        // What a guest's kernel has started is called so; the agent marks its first argument.
        b"init" => read("cmdline").starts_with(b"@init\0"),
        _ => false,
    }
}

/// Whether a context identifier is one of a guest, not of the host or the hypervisor.
pub(crate) fn is_guest(cid: u32) -> bool {
    (FIRST_GUEST..u32::MAX).contains(&cid)
}

/// Whether a node with this context identifier, if it has one, reaches another by vsock. The host's is that of each host's own
/// programs, for its guests and for each other.
pub(crate) fn reaches(own: Option<u32>, cid: u32, same_boot: bool) -> bool {
    match own {
        None => false,
        Some(HOST_CID) if cid == HOST_CID => same_boot,
        Some(_) => cid == HOST_CID || is_guest(cid),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_agent_is_known_by_its_name_or_its_mark() {
        for (comm, cmdline, agent) in [
            ("xbeinstd\n", "@usr/sbin/xbeinstd\0--service\0", true),
            ("init\n", "@init\0", true),
            ("init\n", "/sbin/init\0", false),
            ("sh\n", "@init\0", false),
        ] {
            let processes = tempfile::tempdir().unwrap();
            let process = processes.path().join("1");
            std::fs::create_dir(&process).unwrap();
            std::fs::write(process.join("comm"), comm).unwrap();
            std::fs::write(process.join("cmdline"), cmdline).unwrap();
            assert_eq!(has_agent(processes.path()), agent, "{comm}{cmdline}");
        }
        assert!(!has_agent(Path::new("/proc/none")));
    }

    #[test]
    fn vsock_is_between_guests_and_their_host() {
        const GUEST: u32 = 3;
        for (own, cid, same_boot, yes) in [
            (None, GUEST, false, false),
            (None, HOST_CID, true, false),
            (Some(GUEST), 4, false, true),
            (Some(GUEST), HOST_CID, false, true),
            (Some(GUEST), GUEST, true, true),
            (Some(GUEST), 1, false, false),
            (Some(GUEST), u32::MAX, false, false),
            (Some(HOST_CID), GUEST, false, true),
            (Some(HOST_CID), HOST_CID, true, true),
            // Another host's programs.
            (Some(HOST_CID), HOST_CID, false, false),
        ] {
            assert_eq!(reaches(own, cid, same_boot), yes, "{own:?} {cid}");
        }
    }
}
