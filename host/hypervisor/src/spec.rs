//! Checks of a domain's specification that hold for every back end.

use std::path::Path;

use crate::domain::{
    CID_MIN, DomainId, DomainSpec, Hardware, Interface, MEMORY_MIN_BYTES, VCPUS_MAX,
};
use crate::error::Error;

/// Longest name, in bytes.
const NAME_MAX_BYTES: usize = 128;

const MIB: u64 = 1 << 20;

/// Most disks and network interfaces of a domain: the first are named by letters.
pub(crate) const DISKS_MAX: usize = 26;
/// As many if the last letter is that of the disk with the boot's configuration.
const DISKS_MAX_WITHOUT_KERNEL: usize = DISKS_MAX - 1;
const INTERFACES_MAX: usize = 8;

/// Whether some host with `host_memory_bytes` could run this.
pub(crate) fn check(spec: &DomainSpec, host_memory_bytes: u64) -> Result<(), Error> {
    let invalid = |field, detail: String| Err(Error::InvalidSpec { field, detail });
    if spec.name.is_empty()
        || spec.name.len() > NAME_MAX_BYTES
        || spec.name.chars().any(char::is_control)
    {
        return invalid(
            "name",
            format!(
                "{:?}, expected 1 to {NAME_MAX_BYTES} bytes without control characters",
                spec.name
            ),
        );
    }
    if !(1..=VCPUS_MAX).contains(&spec.vcpus) {
        return invalid(
            "vcpus",
            format!("{}, expected 1 to {VCPUS_MAX}", spec.vcpus),
        );
    }
    if spec.memory_bytes < MEMORY_MIN_BYTES {
        return invalid(
            "memory_bytes",
            format!(
                "{}, expected at least {MEMORY_MIN_BYTES} ({} MiB)",
                spec.memory_bytes,
                MEMORY_MIN_BYTES / MIB
            ),
        );
    }
    if !(spec.vcpus..=VCPUS_MAX).contains(&spec.vcpus_limit()) {
        return invalid(
            "vcpus_max",
            format!(
                "{}, expected {} to {VCPUS_MAX}",
                spec.vcpus_limit(),
                spec.vcpus
            ),
        );
    }
    if spec.memory_limit_bytes() < spec.memory_bytes {
        return invalid(
            "memory_max_bytes",
            format!(
                "{}, expected at least {}",
                spec.memory_limit_bytes(),
                spec.memory_bytes
            ),
        );
    }
    if spec.memory_limit_bytes() > host_memory_bytes {
        return Err(Error::TooMuchMemory {
            asked_mib: spec.memory_limit_bytes().div_ceil(MIB),
            available_mib: host_memory_bytes / MIB,
        });
    }
    if spec.cid < CID_MIN || spec.cid == u32::MAX {
        return invalid(
            "cid",
            format!("{}, expected {CID_MIN} to {}", spec.cid, u32::MAX - 1),
        );
    }
    if let Some(arg) = spec
        .kernel_args
        .iter()
        .find(|arg| arg.is_empty() || arg.chars().any(char::is_control))
    {
        return invalid(
            "kernel_args",
            format!("{arg:?}, expected no empty ones and no control characters"),
        );
    }
    if spec.kernel.is_none() {
        check_without_kernel(spec)?;
    }
    Ok(())
}

/// Of a domain whose first disk is booted by the firmware.
fn check_without_kernel(spec: &DomainSpec) -> Result<(), Error> {
    let (field, detail) = if spec.initramfs.is_some() {
        ("initramfs", "there is no kernel to take it".to_owned())
    } else if !spec.kernel_args.is_empty() {
        ("kernel_args", "there is no kernel to take them".to_owned())
    } else if spec.disks.len() > DISKS_MAX_WITHOUT_KERNEL {
        (
            "disks",
            format!(
                "more than {DISKS_MAX_WITHOUT_KERNEL}, as many as a domain without a kernel has"
            ),
        )
    } else {
        match spec.disks.first() {
            None => (
                "disks",
                "none, and there is no kernel: the firmware boots the first disk".to_owned(),
            ),
            Some(disk) if disk.read_only => (
                "disks",
                "the first, which the firmware boots, is read-only: it is used through an overlay"
                    .to_owned(),
            ),
            Some(_) => return Ok(()),
        }
    };
    Err(Error::InvalidSpec { field, detail })
}

/// The lowest number that no disk has.
pub(crate) fn free_disk(spec: &DomainSpec, hardware: &Hardware) -> Result<usize, Error> {
    let max = match spec.kernel {
        Some(_) => DISKS_MAX,
        None => DISKS_MAX_WITHOUT_KERNEL,
    };
    (0..max)
        .find(|index| !hardware.disks.contains_key(index))
        .ok_or(Error::InvalidSpec {
            field: "disks",
            detail: format!("more than {max}"),
        })
}

/// Whether an interface is a further one; `false`: the domain has it.
pub(crate) fn check_new_interface(
    hardware: &Hardware,
    interface: &Interface,
) -> Result<bool, Error> {
    let invalid = |detail| {
        Err(Error::InvalidSpec {
            field: "interface",
            detail,
        })
    };
    match hardware
        .interfaces
        .iter()
        .find(|known| known.mac == interface.mac)
    {
        Some(known) if known == interface => Ok(false),
        Some(_) => invalid("another interface has this hardware address".to_owned()),
        None if hardware.interfaces.len() >= INTERFACES_MAX => {
            invalid(format!("more than {INTERFACES_MAX}"))
        }
        None => Ok(true),
    }
}

pub(crate) fn check_memory(spec: &DomainSpec, bytes: u64) -> Result<(), Error> {
    let max_bytes = spec.memory_limit_bytes();
    if (MEMORY_MIN_BYTES..=max_bytes).contains(&bytes) {
        return Ok(());
    }
    Err(Error::InvalidSpec {
        field: "memory_bytes",
        detail: format!("{bytes}, expected {MEMORY_MIN_BYTES} to {max_bytes}"),
    })
}

pub(crate) fn check_vcpus(spec: &DomainSpec, vcpus: u32) -> Result<(), Error> {
    let max = spec.vcpus_limit();
    if (1..=max).contains(&vcpus) {
        return Ok(());
    }
    Err(Error::InvalidSpec {
        field: "vcpus",
        detail: format!("{vcpus}, expected 1 to {max}"),
    })
}

/// Whether the run directory is where the back end's are.
pub(crate) fn check_run_dir(spec: &DomainSpec, domains_dir: &Path) -> Result<(), Error> {
    let expected = domains_dir.join(spec.id.to_string());
    if spec.run_dir == expected {
        return Ok(());
    }
    Err(Error::InvalidSpec {
        field: "run_dir",
        detail: format!(
            "{}, expected {}",
            spec.run_dir.display(),
            expected.display()
        ),
    })
}

/// Whether a repeated `create` asks for the same domain. The boot configuration is not compared.
pub(crate) fn check_same(existing: &DomainSpec, asked: &DomainSpec) -> Result<(), Error> {
    let differences = [
        ("name", existing.name != asked.name),
        ("owner", existing.owner != asked.owner),
        ("vcpus", existing.vcpus != asked.vcpus),
        ("vcpus_max", existing.vcpus_max != asked.vcpus_max),
        ("memory_bytes", existing.memory_bytes != asked.memory_bytes),
        (
            "memory_max_bytes",
            existing.memory_max_bytes != asked.memory_max_bytes,
        ),
        ("kernel", existing.kernel != asked.kernel),
        ("initramfs", existing.initramfs != asked.initramfs),
        ("kernel_args", existing.kernel_args != asked.kernel_args),
        ("disks", existing.disks != asked.disks),
        ("cid", existing.cid != asked.cid),
        ("interface", existing.interface != asked.interface),
        ("run_dir", existing.run_dir != asked.run_dir),
    ];
    let differing: Vec<_> = differences
        .iter()
        .filter(|(_, differs)| *differs)
        .map(|(field, _)| *field)
        .collect();
    if differing.is_empty() {
        return Ok(());
    }
    Err(Error::Exists {
        id: existing.id,
        detail: differing.join(", "),
    })
}

/// The error for a repeated `create` with another boot configuration, which is not shown.
pub(crate) fn other_boot_config(id: DomainId) -> Error {
    Error::Exists {
        id,
        detail: "boot_config".to_owned(),
    }
}
