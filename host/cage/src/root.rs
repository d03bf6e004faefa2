//! A root directory that has what the program needs and nothing else.
//!
//! Everything keeps the path that it has on the host, so arguments and messages mean the same inside. Only
//! `/proc` is none: under `/proc/self/fd` are the files of [`Plan::reopen`].

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, StatVfsMountFlags};
use rustix::mount::{MountFlags, UnmountFlags};

use crate::Error;
use crate::plan::Plan;

/// Where libraries are (file-hierarchy(7)), the last two for programs that were installed by hand.
const LIBRARIES: [&str; 6] = [
    "/lib",
    "/lib64",
    "/usr/lib",
    "/usr/lib64",
    "/usr/local/lib",
    "/nix/store",
];
/// What else a dynamically linked program and QEMU read: its firmware and option ROMs, which distributions
/// put beside it and link to.
const FILES: [&str; 8] = [
    "/etc/ld.so.cache",
    "/usr/share/qemu",
    "/usr/share/seabios",
    "/usr/share/seavgabios",
    "/usr/share/ipxe",
    "/usr/share/ipxe.efi",
    "/usr/share/qemu-kvm",
    "/usr/share/vgabios",
];
/// The dynamic loader (System V ABI, AMD64 supplement).
pub(crate) const LOADER: &str = "/lib64/ld-linux-x86-64.so.2";
/// Devices that do nothing to anybody.
pub(crate) const DEVICES: [&str; 2] = ["/dev/null", "/dev/urandom"];

/// Any directory that every host has: it is covered only in our own namespace, and only until the host's root
/// is gone.
const STAND: &str = "/tmp";
/// The size is the most that directories and mount points may take.
const ROOT_OPTIONS: &std::ffi::CStr = c"mode=0755,size=1m";

/// Directories and files to read from, those that are there.
pub(crate) fn readable(program: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> = LIBRARIES.iter().chain(&FILES).map(PathBuf::from).collect();
    // A QEMU of its own, as in /opt/qemu/bin, has these beside it.
    if let Some(prefix) = program.parent().and_then(Path::parent) {
        for own in ["lib", "lib64", "share/qemu"] {
            let own = prefix.join(own);
            if !paths.contains(&own) {
                paths.push(own);
            }
        }
    }
    paths.retain(|path| path.exists());
    paths
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Read,
    Write,
    Device,
}

/// Something of the host's, held open while the host's root disappears.
struct Source {
    file: OwnedFd,
    path: PathBuf,
    kind: Kind,
}

/// Makes the new root and goes there. The working directory has the same path as before.
pub(crate) fn change(plan: &Plan, program: &Path) -> Result<(), Error> {
    let directory = std::env::current_dir().map_err(Error::io("tell the working directory"))?;
    let mut sources = vec![];
    let mut links = vec![];
    for path in readable(program).into_iter().chain([program.to_owned()]) {
        match fs::read_link(&path) {
            // As /lib is /usr/lib in most distributions.
            Ok(target) if LIBRARIES.iter().any(|library| path == Path::new(library)) => {
                links.push((path, target));
            }
            _ => sources.push(open(path, Kind::Read)?),
        }
    }
    for name in &plan.read {
        sources.push(open(directory.join(name), Kind::Read)?);
    }
    for name in &plan.write {
        sources.push(open(directory.join(name), Kind::Write)?);
    }
    if plan.sockets {
        sources.push(open(directory.clone(), Kind::Write)?);
    }
    for device in DEVICES
        .iter()
        .map(Path::new)
        .chain(plan.devices.iter().map(PathBuf::as_path))
    {
        sources.push(open(device.to_owned(), Kind::Device)?);
    }
    for fd in &plan.reopen {
        sources.push(reopen(*fd)?);
    }
    links.push(("/proc/self/exe".into(), program.to_owned()));

    // What is made here is for the program's user to pass.
    rustix::process::umask(Mode::from_raw_mode(0o022));
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    rustix::mount::mount("cage", STAND, c"tmpfs", flags, ROOT_OPTIONS)
        .map_err(Error::step("mount the root of the cage"))?;
    let inside = |path: &Path| Path::new(STAND).join(path.strip_prefix("/").unwrap_or(path));
    let make = |path: &Path| {
        fs::create_dir_all(path).map_err(Error::io(format!("make {}", path.display())))
    };
    for source in &sources {
        mount(source, &inside(&source.path))?;
    }
    for (path, target) in links {
        let link = inside(&path);
        make(link.parent().unwrap_or(&link))?;
        std::os::unix::fs::symlink(target, &link)
            .map_err(Error::io(format!("make {}", link.display())))?;
    }
    make(&inside(&directory))?;

    let pivot = || {
        rustix::process::chdir(STAND)?;
        // The old root comes to lie on the new one, and goes from there (pivot_root(2)).
        rustix::process::pivot_root(".", ".")?;
        rustix::mount::unmount(".", UnmountFlags::DETACH)?;
        rustix::mount::mount_remount("/", flags | MountFlags::RDONLY | MountFlags::BIND, c"")?;
        rustix::process::chdir(&directory)
    };
    pivot().map_err(Error::step("leave the host's root directory"))
}

fn open(path: PathBuf, kind: Kind) -> Result<Source, Error> {
    let file = rustix::fs::open(&path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        .map_err(Error::step(format!("open {}", path.display())))?;
    Ok(Source { file, path, kind })
}

/// The kernel mounts only what was opened in this namespace, so the file is opened again, by its name.
fn reopen(fd: i32) -> Result<Source, Error> {
    let path = PathBuf::from(format!("/proc/self/fd/{fd}"));
    let name =
        fs::read_link(&path).map_err(Error::io(format!("tell the name of {}", path.display())))?;
    let mut source = open(name, Kind::Read)?;
    let same = || -> io::Result<bool> {
        // SAFETY: whoever starts `cage` leaves the descriptors of the plan open.
        let given = rustix::fs::fstat(unsafe { rustix::fd::BorrowedFd::borrow_raw(fd) })?;
        let found = rustix::fs::fstat(&source.file)?;
        Ok((given.st_dev, given.st_ino) == (found.st_dev, found.st_ino))
    };
    if !same().map_err(Error::io(format!("look at {}", source.path.display())))? {
        return Err(Error::Replaced(source.path));
    }
    source.path = path;
    Ok(source)
}

fn mount(source: &Source, target: &Path) -> Result<(), Error> {
    let failed = || Error::step(format!("put {} into the cage", source.path.display()));
    let stat = rustix::fs::fstat(&source.file).map_err(failed())?;
    let make = || {
        if rustix::fs::FileType::from_raw_mode(stat.st_mode).is_dir() {
            return fs::create_dir_all(target);
        }
        fs::create_dir_all(target.parent().unwrap_or(target))?;
        fs::File::create(target).map(drop)
    };
    make().map_err(Error::io(format!("make {}", target.display())))?;
    let from = format!("/proc/self/fd/{}", source.file.as_raw_fd());
    match rustix::mount::mount_bind(&from, target) {
        // A user must take what is mounted below along (mount_namespaces(7)).
        Err(rustix::io::Errno::INVAL) => rustix::mount::mount_bind_recursive(&from, target),
        mounted => mounted,
    }
    .map_err(failed())?;
    let mut flags = MountFlags::BIND | MountFlags::NOSUID | kept(source).map_err(failed())?;
    if source.kind != Kind::Device {
        flags |= MountFlags::NODEV;
    }
    if source.kind != Kind::Write {
        flags |= MountFlags::RDONLY;
    }
    rustix::mount::mount_remount(target, flags, c"").map_err(failed())
}

/// What the host's own mount has that a user must not take away.
fn kept(source: &Source) -> rustix::io::Result<MountFlags> {
    let has = rustix::fs::fstatvfs(&source.file)?.f_flag;
    let pairs = [
        (StatVfsMountFlags::NODEV, MountFlags::NODEV),
        (StatVfsMountFlags::NOEXEC, MountFlags::NOEXEC),
        (StatVfsMountFlags::RDONLY, MountFlags::RDONLY),
    ];
    Ok(pairs
        .into_iter()
        .filter(|(host, _)| has.contains(*host))
        .fold(MountFlags::empty(), |flags, (_, ours)| flags | ours))
}
