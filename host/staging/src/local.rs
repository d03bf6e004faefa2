//! Files of this host, opened with the rights of the job's owner.

use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use rustix::fs::{CWD, Mode, OFlags, PROC_SUPER_MAGIC, ResolveFlags};
use rustix::io::Errno;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use crate::error::ErrorKind;
use crate::fetch::{Fetched, finished};
use crate::identity::{Identity, on_thread};
use crate::inflow::{Feed, Halt};
use crate::meter::Meter;
use crate::output::Partial;
use crate::put::Creation;
use crate::uri::Uri;

/// Bytes read at once.
const CHUNK_BYTES: usize = 256 << 10;

/// Bytes the kernel copies at once: short enough to look for a cancellation in between.
const COPY_BYTES: u64 = 8 << 20;

/// The path of a `file` URI. Parsing has made sure that there is one.
fn path_of(uri: &Uri) -> Result<PathBuf, ErrorKind> {
    uri.file_path().ok_or_else(|| ErrorKind::InvalidUri {
        reason: "it names no path of this host".into(),
    })
}

/// Opens the file of a `file` URI for reading, as `identity`.
pub(crate) fn open(uri: &Uri, identity: Identity) -> oneshot::Receiver<Result<File, ErrorKind>> {
    let path = path_of(uri);
    identity.run(move || open_regular(&path?, OFlags::empty()))
}

/// Opens the local source of an upload, with the process's own rights. Not through a link: what a guest
/// produced must not name a file of the host.
pub(crate) fn open_own(path: PathBuf) -> oneshot::Receiver<Result<File, ErrorKind>> {
    on_thread("stage-read", move || {
        open_regular(&path, OFlags::NOFOLLOW).map_err(|kind| match kind {
            ErrorKind::NotFound { .. } => ErrorKind::local(
                "cannot read the file to send,",
                &path,
                io::ErrorKind::NotFound.into(),
            ),
            kind => kind,
        })
    })
}

/// Opens a regular file. Looks before it opens: opening a device may already do something.
///
/// Neither magic links nor `/proc` itself: to a thread of this process, whatever its user, they open the
/// process's own descriptors and state (`/proc/self/fd/7`).
fn open_regular(path: &Path, extra: OFlags) -> Result<File, ErrorKind> {
    let failed = |error| access("cannot read", path, error);
    let metadata = match extra.contains(OFlags::NOFOLLOW) {
        true => fs::symlink_metadata(path),
        false => fs::metadata(path),
    };
    regular(&metadata.map_err(failed)?)?;
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC | extra;
    let resolve = ResolveFlags::NO_MAGICLINKS;
    let file = match rustix::fs::openat2(CWD, path, flags, Mode::empty(), resolve) {
        Ok(file) => File::from(file),
        Err(Errno::LOOP) => return Err(not_for_users()),
        Err(errno) => return Err(failed(errno.into())),
    };
    let system = rustix::fs::fstatfs(&file).map_err(|errno| failed(errno.into()))?;
    if system.f_type == PROC_SUPER_MAGIC {
        return Err(not_for_users());
    }
    regular(&file.metadata().map_err(failed)?)?;
    Ok(file)
}

fn not_for_users() -> ErrorKind {
    ErrorKind::AccessDenied {
        detail: "it leads into /proc, or links lead in a circle".into(),
    }
}

fn regular(metadata: &Metadata) -> Result<(), ErrorKind> {
    let kind = metadata.file_type();
    let what = match kind {
        kind if kind.is_file() => return Ok(()),
        kind if kind.is_dir() => "a directory",
        kind if kind.is_symlink() => "a symbolic link",
        kind if kind.is_fifo() => "a named pipe",
        kind if kind.is_socket() => "a socket",
        kind if kind.is_char_device() => "a character device",
        kind if kind.is_block_device() => "a block device",
        _ => "something unknown",
    };
    Err(ErrorKind::NotRegularFile { what })
}

/// A failure to reach a user's file.
fn access(what: &'static str, path: &Path, error: io::Error) -> ErrorKind {
    match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => ErrorKind::NotFound {
            detail: String::new(),
        },
        io::ErrorKind::PermissionDenied => ErrorKind::AccessDenied {
            detail: String::new(),
        },
        _ => ErrorKind::local(what, path, error),
    }
}

/// Reads the file of a `file` URI into `feed`.
pub(crate) async fn read(uri: &Uri, identity: Identity, feed: Feed) -> Result<(), Halt> {
    let path = path_of(uri)?;
    let file = finished(open(uri, identity).await)?;
    pump(file, path, feed).await
}

/// Reads `file` into `feed`, on a thread. Fails if the file becomes shorter meanwhile.
pub(crate) async fn pump(file: File, path: PathBuf, feed: Feed) -> Result<(), Halt> {
    let done = on_thread("stage-read", move || {
        let failed = |error| ErrorKind::local("cannot read", &path, error);
        let expected = file.metadata().map_err(failed)?.len();
        feed.meter.expect(expected)?;
        let mut file = file;
        let mut sent = 0;
        loop {
            let mut chunk = Vec::with_capacity(CHUNK_BYTES);
            (&mut file)
                .take(CHUNK_BYTES as u64)
                .read_to_end(&mut chunk)
                .map_err(failed)?;
            if chunk.is_empty() {
                return match sent < expected {
                    true => Err(shrunk()),
                    false => Ok(true),
                };
            }
            sent += chunk.len() as u64;
            match feed.push_blocking(Bytes::from(chunk)) {
                Ok(()) => {}
                Err(Halt::Consumer) => return Ok(false),
                Err(Halt::Failed(kind)) => return Err(kind),
            }
        }
    });
    match finished(done.await)? {
        true => Ok(()),
        false => Err(Halt::Consumer),
    }
}

fn shrunk() -> ErrorKind {
    ErrorKind::Transfer {
        source: "the file became shorter while it was read".into(),
    }
}

/// Copies an opened local file to `destination`, sharing or copying within the kernel.
pub(crate) async fn fetch_copy(
    source: oneshot::Receiver<Result<File, ErrorKind>>,
    destination: PathBuf,
    meter: Arc<Meter>,
    stop: CancellationToken,
) -> Result<Fetched, ErrorKind> {
    let source = finished(source.await)?;
    let copied = on_thread("stage-write", move || {
        let (partial, file) = Partial::file(&destination, 0o600)?;
        let copied = copy(&source, &file, 0, &destination, &meter, &stop)?;
        partial.commit()?;
        Ok(Fetched {
            bytes_read: copied.bytes,
            bytes_written: copied.bytes,
            bytes_stored: copied.stored_bytes,
            entries: Vec::new(),
        })
    });
    finished(copied.await)
}

struct Copied {
    bytes: u64,
    stored_bytes: u64,
}

/// Copies all of `source` to `offset` in `target`: by reference where the file system can, else by its
/// data extents, so that holes stay holes.
fn copy(
    source: &File,
    target: &File,
    offset: u64,
    path: &Path,
    meter: &Meter,
    stop: &CancellationToken,
) -> Result<Copied, ErrorKind> {
    let failed = |error: io::Error| ErrorKind::local("cannot write", path, error);
    let len = source.metadata().map_err(failed)?.len();
    meter.expect(len)?;
    if offset == 0 && rustix::fs::ioctl_ficlone(target, source).is_ok() {
        let bytes = target.metadata().map_err(failed)?.len();
        meter.add(bytes)?;
        return Ok(Copied {
            bytes,
            stored_bytes: 0,
        });
    }
    let mut position = 0;
    let mut stored_bytes = 0;
    while position < len {
        let (data, end) = extent(source, position, len).map_err(failed)?;
        meter.add(data - position)?;
        position = data;
        while position < end {
            if stop.is_cancelled() {
                return Err(ErrorKind::Cancelled);
            }
            let want = (end - position).min(COPY_BYTES);
            let copied =
                copy_some(source, position, target, offset + position, want).map_err(failed)?;
            if copied == 0 {
                return Err(shrunk());
            }
            meter.add(copied)?;
            position += copied;
            stored_bytes += copied;
        }
    }
    target.set_len(offset + len).map_err(failed)?;
    Ok(Copied {
        bytes: len,
        stored_bytes,
    })
}

/// The next data at or after `position`: its start and end, both `len` if there is none.
fn extent(file: &File, position: u64, len: u64) -> io::Result<(u64, u64)> {
    use rustix::fs::{SeekFrom, seek};
    let data = match seek(file, SeekFrom::Data(position)) {
        Ok(data) => data,
        Err(Errno::NXIO) => return Ok((len, len)),
        // A file system that does not know its holes.
        Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok((position, len)),
        Err(errno) => return Err(errno.into()),
    };
    let hole = seek(file, SeekFrom::Hole(data))?;
    Ok((data.min(len), hole.min(len)))
}

fn copy_some(
    source: &File,
    mut from: u64,
    target: &File,
    mut to: u64,
    want: u64,
) -> io::Result<u64> {
    let amount = usize::try_from(want).unwrap_or(usize::MAX);
    match rustix::fs::copy_file_range(source, Some(&mut from), target, Some(&mut to), amount) {
        Ok(copied) => return Ok(copied as u64),
        // Not between these two files.
        Err(Errno::XDEV | Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP | Errno::PERM) => {}
        Err(errno) => return Err(errno.into()),
    }
    let mut buffer = vec![0; amount.min(CHUNK_BYTES)];
    let read = source.read_at(&mut buffer, from)?;
    target.write_all_at(&buffer[..read], to)?;
    Ok(read as u64)
}

/// Writes `source` to the file of a `file` URI, as `identity`, and makes it durable. Returns the bytes
/// copied.
pub(crate) async fn put(
    uri: &Uri,
    source: File,
    creation: Creation,
    identity: Identity,
    meter: Arc<Meter>,
    stop: CancellationToken,
) -> Result<u64, ErrorKind> {
    let path = path_of(uri)?;
    let copied = identity.run(move || {
        let path = real_path(&path).map_err(|error| access("cannot write", &path, error))?;
        let existing = match fs::metadata(&path) {
            Ok(metadata) => Some(metadata),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(access("cannot write", &path, error)),
        };
        if let Some(existing) = &existing {
            regular(existing)?;
        }
        match (creation, &existing) {
            (Creation::DontOverwrite, Some(_)) => Err(ErrorKind::Exists),
            (Creation::Append, Some(_)) => append(&source, &path, &meter, &stop),
            _ => replace(&source, &path, existing.as_ref(), creation, &meter, &stop),
        }
    });
    finished(copied.await)
}

/// `path` without links in it; its last part need not exist. A link is written through, as by cp: the new
/// file must be beside the one it replaces. Without links it also leads through no link of `/proc`.
fn real_path(path: &Path) -> io::Result<PathBuf> {
    match (fs::canonicalize(path), path.parent(), path.file_name()) {
        (Err(error), Some(parent), Some(name)) if error.kind() == io::ErrorKind::NotFound => {
            Ok(fs::canonicalize(parent)?.join(name))
        }
        (real, _, _) => real,
    }
}

fn replace(
    source: &File,
    path: &Path,
    existing: Option<&Metadata>,
    creation: Creation,
    meter: &Meter,
    stop: &CancellationToken,
) -> Result<u64, ErrorKind> {
    let (partial, file) = Partial::file(path, 0o644).map_err(|kind| match kind {
        ErrorKind::Local { what, path, source } => access(what, &path, source),
        kind => kind,
    })?;
    let failed = |error| access("cannot write", path, error);
    if let Some(existing) = existing {
        let mode = existing.permissions().mode() & 0o777;
        file.set_permissions(fs::Permissions::from_mode(mode))
            .map_err(failed)?;
    }
    let copied = copy(source, &file, 0, path, meter, stop)?;
    file.sync_all().map_err(failed)?;
    if stop.is_cancelled() {
        return Err(ErrorKind::Cancelled);
    }
    match creation {
        Creation::DontOverwrite => partial.commit_new()?,
        _ => partial.commit()?,
    }
    // Its name too shall outlive a power cut. A directory that may be written need not be readable: then the file
    // again, with which the usual file systems write its new name.
    let directory = path.parent().map(File::open);
    let synced = match directory {
        Some(Ok(directory)) => directory.sync_all(),
        _ => file.sync_all(),
    };
    synced.map_err(failed)?;
    Ok(copied.bytes)
}

/// Appends, and cuts the file back to its old length on failure.
fn append(
    source: &File,
    path: &Path,
    meter: &Meter,
    stop: &CancellationToken,
) -> Result<u64, ErrorKind> {
    let failed = |error| access("cannot write", path, error);
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(OFlags::NONBLOCK.bits().cast_signed())
        .open(path)
        .map_err(failed)?;
    regular(&file.metadata().map_err(failed)?)?;
    let end = file.seek(SeekFrom::End(0)).map_err(failed)?;
    let copied = copy(source, &file, end, path, meter, stop)
        .and_then(|copied| file.sync_all().map_err(failed).map(|()| copied.bytes));
    if copied.is_err() {
        file.set_len(end).map_err(failed)?;
    }
    copied
}
