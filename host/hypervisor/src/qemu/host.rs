//! What QEMU and this host can do.

use std::ffi::OsString;
use std::fs::File;
use std::io::Seek;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use rustix::fs::MemfdFlags;
use xbee_cage::{Cage, Identity, Plan};

use super::config::{Accelerator, QemuConfig, companion};
use super::files::caged;
use super::process::{self, Exit, Launch};
use crate::domain::HostCapabilities;
use crate::error::Error;
use crate::work::blocking;

const PROGRAM: &str = "qemu-system-x86_64";
const REMEDY: &str = "install it (Debian, Ubuntu: apt-get install qemu-system-x86)";

/// What [`Host::probe`] found; it does not change while this process runs.
#[derive(Debug, Clone)]
pub(crate) struct Host {
    pub(crate) program: PathBuf,
    /// What domains' processes are started in.
    pub(crate) cage: Cage,
    version: String,
    pub(crate) kvm: Option<Kvm>,
    accelerator_note: String,
    /// Frequency of the time stamp counter, where it is known and steady.
    pub(crate) tsc_khz: Option<u64>,
}

/// KVM works.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Kvm {
    /// Group that may open the device, for processes that are not root's.
    pub(crate) gid: Option<u32>,
}

pub(crate) const KVM_DEVICE: &str = "/dev/kvm";

impl Host {
    pub(crate) async fn probe(config: &QemuConfig) -> Result<Self, Error> {
        let program = find_program(config.program.as_deref())?;
        let version = version(&program, config.command_limit).await?;
        let cage = find_cage(config.cage_program.as_deref()).await?;
        let tried = match config.accelerator {
            Accelerator::Tcg => Err("TCG was chosen by the configuration".to_owned()),
            Accelerator::Auto | Accelerator::Kvm => probe_kvm(&program, &cage, config).await,
        };
        let (kvm, accelerator_note) = match tried {
            Ok(kvm) => (Some(kvm), "a probe guest ran".to_owned()),
            Err(note) if config.accelerator == Accelerator::Kvm => {
                return Err(Error::HypervisorBroken {
                    detail: format!("KVM was chosen by the configuration: {note}"),
                });
            }
            Err(note) => (None, note),
        };
        let tsc_khz = tokio::task::spawn_blocking(tsc_khz).await.ok().flatten();
        Ok(Self {
            program,
            cage,
            version,
            kvm,
            accelerator_note,
            tsc_khz,
        })
    }

    pub(crate) fn capabilities(&self) -> HostCapabilities {
        HostCapabilities {
            backend: "qemu".to_owned(),
            version: self.version.clone(),
            accelerator: if self.kvm.is_some() { "kvm" } else { "tcg" }.to_owned(),
            accelerator_note: self.accelerator_note.clone(),
            cpus: cpus(),
            memory_bytes: memory_bytes(),
        }
    }
}

pub(crate) fn cpus() -> u32 {
    std::thread::available_parallelism().map_or(1, |n| u32::try_from(n.get()).unwrap_or(u32::MAX))
}

/// The host's memory.
pub(crate) fn memory_bytes() -> u64 {
    let info = rustix::system::sysinfo();
    (info.totalram as u64).saturating_mul(u64::from(info.mem_unit.max(1)))
}

fn find_program(configured: Option<&Path>) -> Result<PathBuf, Error> {
    let missing = |program: String| Error::HypervisorMissing {
        program,
        remedy: REMEDY,
    };
    match configured {
        Some(path) if path.is_file() => Ok(path.to_owned()),
        Some(path) => Err(missing(path.display().to_string())),
        None => std::env::var_os("PATH")
            .iter()
            .flat_map(std::env::split_paths)
            .map(|dir| dir.join(PROGRAM))
            .find(|path| path.is_file())
            .ok_or_else(|| missing(PROGRAM.to_owned())),
    }
}

/// Finds out what this host has for the cage, and says once what it has not.
async fn find_cage(configured: Option<&Path>) -> Result<Cage, Error> {
    let program = companion(configured, "cage")?;
    if !program.is_file() {
        return Err(Error::HypervisorMissing {
            program: program.display().to_string(),
            remedy: "put the program cage beside this one, or name it in the configuration",
        });
    }
    let cage = blocking(move || Cage::find(&program).map_err(caged)).await?;
    if let Some(lacks) = cage.report.lacks() {
        tracing::warn!("QEMU's cage has gaps on this host: {lacks}");
    }
    Ok(cage)
}

async fn version(program: &Path, limit: Duration) -> Result<String, Error> {
    let broken = |detail: String| Error::HypervisorBroken {
        detail: format!("{} --version: {detail}", program.display()),
    };
    let output = tokio::process::Command::new(program)
        .arg("--version")
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let output = tokio::time::timeout(limit, output)
        .await
        .map_err(|_| broken(format!("no answer within {} s", limit.as_secs())))?
        .map_err(|error| broken(error.to_string()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    text.lines()
        .next()
        .filter(|_| output.status.success())
        .map(|line| line.trim_start_matches("QEMU emulator version ").to_owned())
        .ok_or_else(|| broken(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
}

/// Whether a guest runs with KVM; otherwise why not. That the device can be opened proves nothing.
async fn probe_kvm(program: &Path, cage: &Cage, config: &QemuConfig) -> Result<Kvm, String> {
    let meta = std::fs::metadata(KVM_DEVICE).map_err(|error| format!("/dev/kvm: {error}"))?;
    if !meta.file_type().is_char_device() {
        return Err("/dev/kvm is no device".to_owned());
    }
    // Domains run without root's rights: their processes need the device's group, unless everybody
    // may open it.
    let privileged = rustix::process::geteuid().is_root();
    let gid = match meta.mode() {
        mode if mode & 0o006 == 0o006 => None,
        mode if mode & 0o060 == 0o060 && meta.gid() != 0 => Some(meta.gid()),
        mode if privileged => {
            return Err(format!(
                "/dev/kvm (mode {:o}, group {}) cannot be opened by domains, which are not root: give it to the group kvm",
                mode & 0o777,
                meta.gid()
            ));
        }
        _ => None,
    };
    let identity = privileged.then_some(Identity {
        uid: config.uid_base,
        gid: config.uid_base,
        groups: gid.into_iter().collect(),
    });
    let kernel = config.kvm_probe_kernel.as_deref().ok_or_else(|| {
        "no kernel is configured to try KVM with: a device that opens proves nothing".to_owned()
    })?;
    let plan = Plan {
        identity,
        devices: vec![KVM_DEVICE.into()],
        threads_max: privileged.then_some(64),
        ..Plan::default()
    };
    let accelerator = ["-accel", "kvm", "-cpu", "host"];
    let limit = config.kvm_probe_limit;
    run_probe_guest(program, cage, &accelerator, kernel, plan, limit).await?;
    Ok(Kvm { gid })
}

/// Boots a kernel that has no root file system: it panics at the end of its own start, and resets
/// at once, upon which QEMU ends. Less is no proof: there are hosts where KVM runs a firmware, and
/// every kernel hangs.
async fn run_probe_guest(
    program: &Path,
    cage: &Cage,
    accelerator: &[&str],
    kernel: &Path,
    plan: Plan,
    limit: Duration,
) -> Result<(), String> {
    let kernel = crate::image::open_kernel(kernel).map_err(|error| crate::error::chain(&error))?;
    let setup = || -> std::io::Result<_> {
        let root = rustix::fs::open("/", rustix::fs::OFlags::PATH, rustix::fs::Mode::empty())?;
        let stat: File = rustix::fs::memfd_create(c"xbee-probe-stat", MemfdFlags::CLOEXEC)?.into();
        let stderr: File =
            rustix::fs::memfd_create(c"xbee-probe-stderr", MemfdFlags::CLOEXEC)?.into();
        let fixed = "-nodefaults -no-user-config -display none -no-reboot -machine q35 -m 256";
        let mut args: Vec<OsString> = fixed.split(' ').map(Into::into).collect();
        args.extend(accelerator.iter().map(Into::into));
        args.push("-kernel".into());
        args.push(format!("/proc/self/fd/{}", kernel.as_raw_fd()).into());
        args.push("-append".into());
        args.push("quiet panic=-1 cryptomgr.notests".into());
        let process = process::launch(Launch {
            program,
            args,
            directory: &root,
            stat_file: &stat,
            stderr: stderr.try_clone()?.into(),
            inherit: vec![kernel.as_raw_fd()],
            cage,
            plan: Plan {
                reopen: vec![kernel.as_raw_fd()],
                ..plan
            },
        })?;
        Ok((process, stderr))
    };
    let (process, mut stderr) =
        setup().map_err(|error| format!("the probe guest was not started: {error}"))?;
    let exit = match tokio::time::timeout(limit, process.exited()).await {
        Ok(exit) => exit,
        Err(_) => {
            process
                .kill()
                .map_err(|error| format!("the probe guest hangs and cannot be killed: {error}"))?;
            // Its end is waited for so that no zombie stays.
            let _ = tokio::time::timeout(limit, process.exited()).await;
            return Err(format!(
                "a probe guest did not boot within {} ms",
                limit.as_millis()
            ));
        }
    };
    match exit {
        Ok(Exit::Code(0)) => Ok(()),
        Ok(exit) => {
            let mut said = String::new();
            let read = stderr
                .rewind()
                .and_then(|()| std::io::Read::read_to_string(&mut stderr, &mut said));
            let said = match read {
                Ok(_) => said.lines().next().unwrap_or(""),
                Err(_) => "",
            };
            Err(format!("a probe guest failed ({exit}): {said}"))
        }
        Err(error) => Err(format!("a probe guest was lost: {error}")),
    }
}

/// Measures the time stamp counter where the kernel itself trusts it as its clock.
fn tsc_khz() -> Option<u64> {
    let source =
        std::fs::read_to_string("/sys/devices/system/clocksource/clocksource0/current_clocksource")
            .ok()?;
    if !matches!(source.trim(), "tsc" | "kvm-clock") {
        return None;
    }
    let (ticks, time) = (tsc()?, Instant::now());
    std::thread::sleep(Duration::from_millis(20));
    let (ticks, time) = (tsc()?.checked_sub(ticks)?, time.elapsed());
    u64::try_from(u128::from(ticks) * 1_000_000 / time.as_nanos().max(1)).ok()
}

#[cfg(target_arch = "x86_64")]
fn tsc() -> Option<u64> {
    // SAFETY: every x86-64 CPU has the instruction; Linux leaves it to user space unless a process
    // asks otherwise (PR_SET_TSC), which this one does not.
    Some(unsafe { std::arch::x86_64::_rdtsc() })
}

#[cfg(not(target_arch = "x86_64"))]
fn tsc() -> Option<u64> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_program_is_named_with_the_remedy() {
        let error = find_program(Some(Path::new("/nowhere/qemu"))).unwrap_err();
        assert_eq!(
            error.to_string(),
            "/nowhere/qemu not found: install it (Debian, Ubuntu: apt-get install qemu-system-x86)"
        );
    }

    #[tokio::test]
    async fn the_probe_guest_tells_working_from_broken() {
        let Ok(program) = find_program(None) else {
            println!("skipped: {PROGRAM} is not installed");
            return;
        };
        let images = std::env::var_os("XBEE_IMAGES").map(PathBuf::from);
        let home = std::env::var_os("HOME").map(PathBuf::from);
        let images = images.or_else(|| Some(home?.join(".cache/xbee/images")));
        let kernel = images.unwrap_or_default().join("kernel/vmlinux");
        if !kernel.exists() {
            println!("skipped: {} is missing (make images)", kernel.display());
            return;
        }
        // Cargo puts the programs of the workspace above the tests.
        let cage = std::env::current_exe().unwrap();
        let cage = cage.parent().unwrap().with_file_name("cage");
        if !cage.exists() {
            println!(
                "skipped: {} is missing (cargo build -p xbee-cage)",
                cage.display()
            );
            return;
        }
        let cage = Cage::find(&cage).unwrap();
        let run = |accelerator: &'static [&'static str], limit| {
            let plan = Plan::default();
            run_probe_guest(&program, &cage, accelerator, &kernel, plan, limit)
        };
        let limit = Duration::from_secs(90);
        run(&["-accel", "tcg"], limit).await.unwrap();
        let error = run(&["-accel", "none-such"], limit).await.unwrap_err();
        assert!(
            error.contains("exit code 1") && error.contains("none-such"),
            "{error}"
        );
        // A guest that never gets to its first instruction.
        let limit = Duration::from_millis(300);
        let error = run(&["-accel", "tcg", "-S"], limit).await.unwrap_err();
        assert_eq!(error, "a probe guest did not boot within 300 ms");
    }
}
