//! Rights and limits of the process itself.

use rustix::process::{Gid, Resource, Rlimit, Uid};
use rustix::thread::{CapabilitySet, CapabilitySets};

use crate::Error;
use crate::plan::{Identity, Plan};

/// Sets the limits that a process has by itself, where cgroups or not.
pub(crate) fn limit(plan: &Plan) -> Result<(), Error> {
    let limits = [
        (Resource::Core, Some(0)),
        (Resource::Nofile, Some(plan.open_files_max)),
        (Resource::Nproc, plan.threads_max),
        (Resource::As, plan.address_space_max_bytes),
        // Nothing is locked into memory, scheduled in real time or queued.
        (Resource::Memlock, Some(0)),
        (Resource::Rtprio, Some(0)),
        (Resource::Msgqueue, Some(0)),
    ];
    for (resource, most) in limits {
        let Some(most) = most else { continue };
        let most = match rustix::process::getrlimit(resource).maximum {
            Some(now) => most.min(now),
            None => most,
        };
        let limit = Rlimit {
            current: Some(most),
            maximum: Some(most),
        };
        rustix::process::setrlimit(resource, limit)
            .map_err(Error::step(format!("set the limit {resource:?} to {most}")))?;
    }
    Ok(())
}

/// Becomes the user of the plan, without any capability now or later.
pub(crate) fn drop_all(identity: Option<&Identity>) -> Result<(), Error> {
    let failed = || Error::step("drop capabilities");
    for bit in 0..u64::BITS {
        let one = CapabilitySet::from_bits_retain(1 << bit);
        match rustix::thread::remove_capability_from_bounding_set(one) {
            // Beyond the last one; or a user's, which has none to drop.
            Err(rustix::io::Errno::INVAL) => break,
            Err(rustix::io::Errno::PERM) if identity.is_none() => break,
            dropped => dropped.map_err(failed())?,
        }
    }
    if let Some(identity) = identity {
        let become_it = || {
            let groups: Vec<Gid> = identity.groups.iter().copied().map(Gid::from_raw).collect();
            rustix::thread::set_thread_groups(&groups)?;
            let gid = Gid::from_raw(identity.gid);
            rustix::thread::set_thread_res_gid(gid, gid, gid)?;
            let uid = Uid::from_raw(identity.uid);
            rustix::thread::set_thread_res_uid(uid, uid, uid)
        };
        become_it().map_err(Error::step(format!("become user {}", identity.uid)))?;
    }
    rustix::thread::clear_ambient_capability_set().map_err(failed())?;
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    rustix::thread::set_capabilities(None, none).map_err(failed())?;
    rustix::thread::set_no_new_privs(true).map_err(failed())
}
