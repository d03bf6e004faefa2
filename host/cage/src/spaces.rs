//! Namespaces.

use rustix::mount::MountPropagationFlags;
use rustix::thread::UnshareFlags;

use crate::Error;
use crate::plan::Namespaces;

/// Leaves the host's namespaces. The new network has a loopback device that is down, and nothing else.
pub(crate) fn leave(how: Namespaces) -> Result<(), Error> {
    let spaces = UnshareFlags::NEWNS
        | UnshareFlags::NEWNET
        | UnshareFlags::NEWIPC
        | UnshareFlags::NEWUTS
        | UnshareFlags::NEWCGROUP;
    match how {
        Namespaces::Shared => return Ok(()),
        Namespaces::Own => unshare(spaces).map_err(Error::step("make namespaces"))?,
        Namespaces::User => {
            let uid = rustix::process::getuid().as_raw();
            let gid = rustix::process::getgid().as_raw();
            unshare(spaces | UnshareFlags::NEWUSER)
                .map_err(Error::step("make namespaces as a user"))?;
            // Without this a user may map no group (user_namespaces(7)).
            for (file, text) in [
                ("/proc/self/setgroups", "deny".to_owned()),
                ("/proc/self/uid_map", format!("{uid} {uid} 1")),
                ("/proc/self/gid_map", format!("{gid} {gid} 1")),
            ] {
                std::fs::write(file, text).map_err(Error::io(format!("write {file}")))?;
            }
        }
    }
    // What is mounted from here on stays here, and what the host mounts stays there.
    rustix::mount::mount_change(
        "/",
        MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
    )
    .map_err(Error::step("make the mounts private"))
}

pub(crate) fn unshare(spaces: UnshareFlags) -> rustix::io::Result<()> {
    // SAFETY: descriptors are not unshared, and this process has one thread.
    unsafe { rustix::thread::unshare_unsafe(spaces) }
}
