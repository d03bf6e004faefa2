//! Landlock: the second fence around files, and where namespaces are not to be had the first.

use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, LandlockStatus,
    PathBeneath, PathFd, RestrictionStatus, Ruleset, RulesetAttr, RulesetCreatedAttr,
    RulesetStatus, Scope,
};

use crate::Error;
use crate::plan::Plan;
use crate::root;

/// The newest that is asked for: what a kernel does not know of it is left out.
const WANTED: ABI = ABI::V6;

/// Lets the process use the files of the plan, no TCP, and no process or abstract socket outside.
pub(crate) fn put_up(plan: &Plan, program: &Path) -> Result<(), Error> {
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    let write: BitFlags<AccessFs> = AccessFs::ReadFile | AccessFs::WriteFile;
    let mut rules: Vec<(PathBuf, BitFlags<AccessFs>)> = vec![];
    rules.extend(root::readable(program).into_iter().map(|path| (path, read)));
    // The loader is there if anything needs it.
    let executed = [program, Path::new(root::LOADER)];
    let executed = executed.into_iter().filter(|path| path.exists());
    rules.extend(executed.map(|path| (path.to_owned(), AccessFs::Execute | AccessFs::ReadFile)));
    rules.extend(
        plan.read
            .iter()
            .map(|name| (name.into(), AccessFs::ReadFile.into())),
    );
    rules.extend(plan.write.iter().map(|name| (name.into(), write)));
    if plan.sockets {
        let change = AccessFs::MakeSock | AccessFs::RemoveFile;
        rules.push((".".into(), change));
    }
    let devices = root::DEVICES
        .iter()
        .map(PathBuf::from)
        .chain(plan.devices.iter().cloned());
    rules.extend(devices.map(|path| (path, write | AccessFs::IoctlDev)));
    let status = restrict(&rules, &plan.reopen)?;
    match status.ruleset {
        RulesetStatus::NotEnforced => Err(Error::Unfenced),
        _ => Ok(()),
    }
}

fn restrict(
    rules: &[(PathBuf, BitFlags<AccessFs>)],
    reopen: &[i32],
) -> Result<RestrictionStatus, Error> {
    fn failed<E: std::error::Error + Send + Sync + 'static>(
        step: &'static str,
    ) -> impl FnOnce(E) -> Error {
        move |error| Error::Landlock {
            step,
            source: Box::new(error),
        }
    }
    let mut ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(WANTED))
        .and_then(|rules| rules.handle_access(AccessNet::from_all(WANTED)))
        .and_then(|rules| rules.scope(Scope::from_all(WANTED)))
        .and_then(Ruleset::create)
        .map_err(failed("make rules"))?;
    for (path, access) in rules {
        let place = PathFd::new(path).map_err(failed("open what is left to the program"))?;
        ruleset = ruleset
            .add_rule(PathBeneath::new(place, *access))
            .map_err(failed("add a rule"))?;
    }
    for fd in reopen {
        // SAFETY: whoever starts `cage` leaves the descriptors of the plan open.
        let file = unsafe { BorrowedFd::borrow_raw(*fd) };
        ruleset = ruleset
            .add_rule(PathBeneath::new(file, AccessFs::ReadFile))
            .map_err(failed("add a rule"))?;
    }
    ruleset.restrict_self().map_err(failed("restrict itself"))
}

/// Which version holds here; otherwise why none does. The calling process is restricted by that.
pub(crate) fn version() -> Result<i32, String> {
    let status = restrict(&[], &[]).map_err(|error| error.to_string())?;
    match status.landlock {
        LandlockStatus::Available {
            effective_abi,
            kernel_abi,
        } => Ok(kernel_abi.unwrap_or(effective_abi as i32)),
        LandlockStatus::NotEnabled => Err("the kernel has landlock, switched off".to_owned()),
        _ => Err("the kernel has no landlock (Linux 5.13 and later have)".to_owned()),
    }
}
