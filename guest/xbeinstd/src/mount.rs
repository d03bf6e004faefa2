//! File systems: those that the kernel makes up, and the guest's root.

use std::fs;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileExt, symlink};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags, fstat, statfs};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_move, unmount};
use xbee_protocol::{Failure, MountRoot, code};

use crate::console;
use crate::failure::{failure, words};
use crate::remove;

/// Where the root is mounted before it becomes `/`.
const NEW_ROOT: &str = "/xbee-root";
/// Disks appear soon after their driver is loaded.
const DISK_LIMIT: Duration = Duration::from_secs(5);
const DISK_INTERVAL: Duration = Duration::from_millis(10);
/// In this order: virtio, Xen, SCSI and its like, NVMe.
const DISKS: [&str; 4] = ["vda", "xvda", "sda", "nvme0n1"];
/// `statfs` types of what an initial RAM file system can be in.
const RAM_FILE_SYSTEMS: [i64; 2] = [0x8584_58f6, 0x0102_1994];

/// Mounts what every program expects. What fails is said: the machine may do without.
pub(crate) fn pseudo_file_systems() {
    let secure = MountFlags::NOSUID | MountFlags::NOEXEC | MountFlags::NODEV;
    let devices = MountFlags::NOSUID;
    let memory = MountFlags::NOSUID | MountFlags::NODEV;
    for (kind, target, flags, data) in [
        ("devtmpfs", "/dev", devices, c"mode=0755"),
        ("proc", "/proc", secure, c""),
        ("sysfs", "/sys", secure, c""),
        (
            "devpts",
            "/dev/pts",
            devices | MountFlags::NOEXEC,
            c"mode=0620,gid=5,ptmxmode=0666",
        ),
        ("tmpfs", "/dev/shm", memory, c"mode=1777"),
        ("tmpfs", "/run", memory, c"mode=0755"),
        ("tmpfs", "/tmp", memory, c"mode=1777"),
        ("cgroup2", "/sys/fs/cgroup", secure, c""),
    ] {
        // Where it cannot be made the mount says so.
        let _there = fs::create_dir_all(target);
        match mount(kind, target, kind, flags, data) {
            // The kernel may have mounted it already (CONFIG_DEVTMPFS_MOUNT).
            Ok(()) | Err(Errno::BUSY) => {}
            Err(error) => console::log(&format!(
                "cannot mount {kind} on {target}: {}",
                words(error)
            )),
        }
        if kind == "devtmpfs" {
            open_console();
        }
    }
    for (link, target) in [
        ("/dev/fd", "/proc/self/fd"),
        ("/dev/stdin", "/proc/self/fd/0"),
        ("/dev/stdout", "/proc/self/fd/1"),
        ("/dev/stderr", "/proc/self/fd/2"),
    ] {
        // Some are there already.
        let _there = symlink(target, link);
    }
}

/// An initial RAM file system without a console node has left the agent without descriptors 0 to 2.
fn open_console() {
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let Ok(console) = rustix::fs::open("/dev/console", flags, Mode::empty()) else {
        return;
    };
    for target in 0..3 {
        // SAFETY: puts the console in the place of a standard descriptor, none of which anything in
        // this program owns.
        unsafe { libc::dup2(console.as_raw_fd(), target) };
    }
    if console.as_raw_fd() < 3 {
        // It is one of them now, and stays.
        std::mem::forget(console);
    }
}

pub(crate) fn name_host(name: &str) {
    if let Err(error) = rustix::system::sethostname(name.as_bytes()) {
        console::log(&format!(
            "cannot take the host name {name:?}: {}",
            words(error)
        ));
    }
}

/// What was mounted.
#[derive(Debug)]
pub(crate) struct Mounted {
    pub(crate) device: String,
    pub(crate) fs_type: String,
}

/// Mounts the root and makes it `/`.
pub(crate) fn root(request: &MountRoot) -> Result<Mounted, Failure> {
    let devices = match &request.device {
        Some(device) => vec![device.clone()],
        None => default_devices()?,
    };
    fs::create_dir_all(NEW_ROOT).map_err(|error| {
        failure(
            code::MOUNT_FAILED,
            format!("cannot make {NEW_ROOT}: {error}"),
        )
    })?;
    let mut failures = Vec::new();
    for device in devices {
        match mount_device(&device, request) {
            Ok(fs_type) => {
                if let Err(error) = switch() {
                    // Half a switch cannot be undone; the host has to give this boot up.
                    return Err(failure(
                        code::MOUNT_FAILED,
                        format!("cannot make {device} the root: {}", words(error)),
                    ));
                }
                return Ok(Mounted { device, fs_type });
            }
            Err(message) => failures.push(message),
        }
    }
    Err(failure(code::MOUNT_FAILED, failures.join("; ")))
}

/// The first disk's partitions if it has some, and the disk itself.
fn default_devices() -> Result<Vec<String>, Failure> {
    let deadline = Instant::now() + DISK_LIMIT;
    let disk = loop {
        let found = DISKS
            .into_iter()
            .find(|disk| Path::new("/sys/class/block").join(disk).exists());
        match found {
            Some(disk) => break disk,
            None if Instant::now() < deadline => std::thread::sleep(DISK_INTERVAL),
            None => {
                return Err(failure(
                    code::NO_ROOT_DEVICE,
                    format!(
                        "no disk in the guest after {} s; looked for {}",
                        DISK_LIMIT.as_secs(),
                        DISKS.join(", ")
                    ),
                ));
            }
        }
    };
    let mut partitions: Vec<(u32, String)> = fs::read_dir(Path::new("/sys/class/block").join(disk))
        .into_iter()
        .flatten()
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let number = fs::read_to_string(entry.path().join("partition")).ok()?;
            Some((
                number.trim().parse().ok()?,
                entry.file_name().into_string().ok()?,
            ))
        })
        .collect();
    partitions.sort();
    let names = partitions
        .into_iter()
        .map(|(_, name)| name)
        .chain([disk.to_owned()]);
    Ok(names.map(|name| format!("/dev/{name}")).collect())
}

/// Mounts a device on [`NEW_ROOT`] if it holds a root; returns the type of its file system.
fn mount_device(device: &str, request: &MountRoot) -> Result<String, String> {
    let fs_type = match &request.fs_type {
        Some(fs_type) => fs_type.clone(),
        None => probe(device)?.to_owned(),
    };
    let read_only = if request.read_only {
        MountFlags::RDONLY
    } else {
        MountFlags::empty()
    };
    let mounted = match mount(device, NEW_ROOT, &*fs_type, read_only, None) {
        // The device or the file system itself cannot be written.
        Err(Errno::ACCESS | Errno::ROFS) => {
            mount(device, NEW_ROOT, &*fs_type, MountFlags::RDONLY, None)
        }
        result => result,
    };
    mounted.map_err(|error| match error {
        Errno::NODEV => format!("cannot mount {device}: the guest's kernel has no {fs_type}"),
        Errno::NOENT => format!("cannot mount {device}: no such device in the guest"),
        error => format!("cannot mount {device} as {fs_type}: {}", words(error)),
    })?;
    let looks_like_root = ["bin", "etc", "sbin", "usr", "lib"]
        .into_iter()
        .any(|name| Path::new(NEW_ROOT).join(name).is_dir());
    // A device that was asked for by name is taken as it is.
    if looks_like_root || request.device.is_some() {
        return Ok(fs_type);
    }
    match unmount(NEW_ROOT, UnmountFlags::empty()) {
        Ok(()) => Err(format!(
            "{device} ({fs_type}) holds no root file system: none of /bin, /etc, /sbin, /usr, /lib"
        )),
        Err(error) => Err(format!("cannot unmount {device}: {}", words(error))),
    }
}

/// The type of a device's file system, by its magic numbers.
fn probe(device: &str) -> Result<&'static str, String> {
    let file = fs::File::open(device)
        .map_err(|error| format!("cannot open {device} in the guest: {error}"))?;
    let found = [
        (0x438, &b"\x53\xef"[..], "ext4"),
        (0, b"XFSB", "xfs"),
        (0x1_0040, b"_BHRfS_M", "btrfs"),
        (0, b"hsqs", "squashfs"),
        (0x400, b"\xe2\xe1\xf5\xe0", "erofs"),
        (0x8001, b"CD001", "iso9660"),
    ]
    .into_iter()
    .find(|(offset, magic, _)| {
        let mut bytes = [0; 8];
        let bytes = &mut bytes[..magic.len()];
        file.read_exact_at(bytes, *offset).is_ok() && bytes == *magic
    });
    found
        .map(|(_, _, fs_type)| fs_type)
        .ok_or_else(|| format!("{device} holds no file system that is known (ext2 to ext4, xfs, btrfs, squashfs, erofs, iso9660)"))
}

/// Makes [`NEW_ROOT`] the root of everything, as `switch_root(8)` does, and frees the old one's memory.
fn switch() -> Result<(), Errno> {
    for directory in ["dev", "proc", "sys", "run"] {
        let target = format!("{NEW_ROOT}/{directory}");
        // A root that cannot be written may still have it.
        let _there = fs::create_dir(&target);
        mount_move(format!("/{directory}"), &target).inspect_err(|error| {
            console::log(&format!(
                "cannot move /{directory} to the root: {}",
                words(*error)
            ));
        })?;
    }
    // The image's own /tmp is used, if it can be.
    let _there = fs::create_dir(format!("{NEW_ROOT}/tmp"));
    if !is_writable(&format!("{NEW_ROOT}/tmp"))
        && mount_move("/tmp", format!("{NEW_ROOT}/tmp")).is_ok()
    {
        console::log("the root cannot be written: /tmp is in memory");
    } else if let Err(error) = unmount("/tmp", UnmountFlags::DETACH) {
        console::log(&format!("cannot unmount /tmp: {}", words(error)));
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let old = rustix::fs::open("/", flags, Mode::empty())?;
    let is_ram = statfs("/").is_ok_and(|fs| RAM_FILE_SYSTEMS.contains(&fs.f_type));
    rustix::process::chdir(NEW_ROOT)?;
    mount_move(".", "/")?;
    rustix::process::chroot(".")?;
    rustix::process::chdir("/")?;
    if is_ram {
        // What is left costs memory and nothing else.
        let emptied = fstat(&old).and_then(|stat| remove::empty(old.as_fd(), stat.st_dev, 0));
        if let Err(error) = emptied {
            console::log(&format!(
                "the initial RAM file system is still in memory: {}",
                words(error)
            ));
        }
    }
    Ok(())
}

fn is_writable(path: &str) -> bool {
    rustix::fs::access(path, rustix::fs::Access::WRITE_OK).is_ok()
}
