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
use crate::fault;
use crate::fetch::{Fetched, finished};
use crate::identity::{Identity, on_thread};
use crate::inflow::{Feed, Halt};
use crate::meter::Meter;
use crate::note::{FileId, Note, Noted};
use crate::output::{Partial, remove_if_there};
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
            ..Fetched::default()
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

/// How a file is put.
pub(crate) struct Target {
    pub(crate) creation: Creation,
    pub(crate) identity: Identity,
    /// Note and temporary name of a put that may be repeated.
    pub(crate) note: Option<(Arc<Note>, String)>,
}

/// Writes `source` to the file of a `file` URI, with the rights of the target's identity, and makes it durable.
/// Returns the bytes copied.
pub(crate) async fn put(
    uri: &Uri,
    source: File,
    target: Target,
    meter: Arc<Meter>,
    stop: CancellationToken,
) -> Result<u64, ErrorKind> {
    let path = path_of(uri)?;
    let Target {
        creation,
        identity,
        note,
    } = target;
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
        let noted = note.as_ref().map(|(note, _)| note.read()).transpose()?;
        let length = source
            .metadata()
            .map_err(|e| access("cannot read", &path, e))?
            .len();
        let put = Put {
            source: &source,
            path: &path,
            note: note.as_ref(),
            meter: &meter,
            stop: &stop,
        };
        match (creation, &existing, noted) {
            // It got its name before the process was killed.
            (_, Some(existing), Some(Noted::Named(id)))
                if FileId::of(existing) == id && existing.len() == length =>
            {
                put.sync_directory(None)?;
                Ok(length)
            }
            (Creation::DontOverwrite, Some(_), _) => Err(ErrorKind::Exists),
            (Creation::Append, Some(_), noted) => put.append(noted),
            (_, existing, _) => put.replace(existing.as_ref(), creation),
        }
    });
    finished(copied.await)
}

/// Takes back what a put that was cut off has left.
pub(crate) async fn take_back(
    uri: &Uri,
    source: File,
    noted: Noted,
    temporary: String,
    identity: Identity,
) -> Result<(), ErrorKind> {
    let path = path_of(uri)?;
    let taken = identity.run(move || {
        let failed = |error| access("cannot write", &path, error);
        let path = real_path(&path).map_err(failed)?;
        remove_if_there(&path.with_file_name(temporary)).map_err(failed)?;
        let Noted::Appending(id, end) = noted else {
            return Ok(());
        };
        let file = open_to_append(&path)?;
        if FileId::of(&file.metadata().map_err(failed)?) == id
            && appended(&source, &file, end).map_err(failed)? == Appended::Part
        {
            file.set_len(end).map_err(failed)?;
        }
        Ok(())
    });
    finished(taken.await)
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

fn open_to_append(path: &Path) -> Result<File, ErrorKind> {
    let failed = |error| access("cannot write", path, error);
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(OFlags::NONBLOCK.bits().cast_signed())
        .open(path)
        .map_err(failed)?;
    regular(&file.metadata().map_err(failed)?)?;
    Ok(file)
}

/// How much of a source a file has from some length on.
#[derive(Debug, PartialEq, Eq)]
enum Appended {
    /// All of it; others may have added to it since.
    All,
    /// None or the beginning, and then the file ends.
    Part,
    /// Something else.
    Other,
}

/// How much of `source` was appended to `file`, which had `end` bytes before.
fn appended(source: &File, file: &File, end: u64) -> io::Result<Appended> {
    let (length, now) = (source.metadata()?.len(), file.metadata()?.len());
    let Some(added) = now.checked_sub(end) else {
        return Ok(Appended::Other);
    };
    let common = added.min(length);
    let (mut ours, mut theirs) = (vec![0; CHUNK_BYTES], vec![0; CHUNK_BYTES]);
    let mut position = 0;
    while position < common {
        let rest = usize::try_from(common - position).unwrap_or(usize::MAX);
        let amount = rest.min(CHUNK_BYTES);
        source.read_exact_at(&mut ours[..amount], position)?;
        file.read_exact_at(&mut theirs[..amount], end + position)?;
        if ours[..amount] != theirs[..amount] {
            return Ok(Appended::Other);
        }
        position += amount as u64;
    }
    Ok(match added >= length {
        true => Appended::All,
        false => Appended::Part,
    })
}

/// A put of an opened file to a path without links.
struct Put<'a> {
    source: &'a File,
    path: &'a Path,
    note: Option<&'a (Arc<Note>, String)>,
    meter: &'a Meter,
    stop: &'a CancellationToken,
}

impl Put<'_> {
    fn write_down(&self, noted: Noted) -> Result<(), ErrorKind> {
        let written = self.note.map_or(Ok(()), |(note, _)| note.write(noted));
        fault::point("put noted");
        written
    }

    fn replace(&self, existing: Option<&Metadata>, creation: Creation) -> Result<u64, ErrorKind> {
        let made = match self.note {
            Some((_, name)) => Partial::file_named(self.path, name, 0o644),
            None => Partial::file(self.path, 0o644),
        };
        let (partial, file) = made.map_err(|kind| match kind {
            ErrorKind::Local { what, path, source } => access(what, &path, source),
            kind => kind,
        })?;
        fault::point("put made");
        let failed = |error| access("cannot write", self.path, error);
        if let Some(existing) = existing {
            let mode = existing.permissions().mode() & 0o777;
            file.set_permissions(fs::Permissions::from_mode(mode))
                .map_err(failed)?;
        }
        let copied = copy(self.source, &file, 0, self.path, self.meter, self.stop)?;
        file.sync_all().map_err(failed)?;
        if self.stop.is_cancelled() {
            return Err(ErrorKind::Cancelled);
        }
        let id = FileId::of(&file.metadata().map_err(failed)?);
        self.write_down(Noted::Named(id))?;
        match creation {
            Creation::DontOverwrite => partial.commit_new()?,
            _ => partial.commit()?,
        }
        fault::point("put named");
        self.sync_directory(Some(&file))?;
        Ok(copied.bytes)
    }

    /// A file's name too shall outlive a power cut. A directory that may be written need not be readable: then the
    /// file again, with which the usual file systems write its new name.
    fn sync_directory(&self, file: Option<&File>) -> Result<(), ErrorKind> {
        let directory = self.path.parent().map(File::open);
        let synced = match (directory, file) {
            (Some(Ok(directory)), _) => directory.sync_all(),
            (_, Some(file)) => file.sync_all(),
            (_, None) => File::open(self.path).and_then(|file| file.sync_all()),
        };
        synced.map_err(|error| access("cannot write", self.path, error))
    }

    /// Appends, and cuts the file back to its old length on failure. What an earlier try has added is not added
    /// again.
    fn append(&self, noted: Option<Noted>) -> Result<u64, ErrorKind> {
        let failed = |error| access("cannot write", self.path, error);
        let mut file = open_to_append(self.path)?;
        let id = FileId::of(&file.metadata().map_err(failed)?);
        let mut end = file.seek(SeekFrom::End(0)).map_err(failed)?;
        if let Some(Noted::Appending(before, at)) = noted
            && before == id
        {
            match appended(self.source, &file, at).map_err(failed)? {
                Appended::All => {
                    file.sync_all().map_err(failed)?;
                    return Ok(self.source.metadata().map_err(failed)?.len());
                }
                Appended::Part => end = at,
                Appended::Other => {}
            }
        }
        self.write_down(Noted::Appending(id, end))?;
        let copied =
            copy(self.source, &file, end, self.path, self.meter, self.stop).and_then(|copied| {
                fault::point("put appended");
                file.sync_all().map_err(failed).map(|()| copied.bytes)
            });
        if copied.is_err() {
            file.set_len(end).map_err(failed)?;
        }
        copied
    }
}
