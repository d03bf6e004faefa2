//! Files on their way (`PutFile`, `GetFile`). Work comes in slices, so that heartbeats go on.

use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, SeekFrom as Whence, Uid, fchmod, fchown, fstat, fstatvfs,
    ftruncate, openat, renameat, unlinkat,
};
use rustix::io::Errno;
use xbee_protocol::{
    Failure, FileInfo, MAX_DATA_BYTES, PutFile, STREAM_WINDOW_BYTES, StreamBody, code,
};

use crate::failure::{failure, file_failure};
use crate::pump::{CREDIT_STEP_BYTES, message};
use crate::root::{Root, split};
use crate::session::Outbox;
use crate::users::identity;

/// Zeros hashed in one go, in bytes.
const SLICE_BYTES: u64 = 4 * 1024 * 1024;
static ZEROS: [u8; 64 * 1024] = [0; 64 * 1024];

/// Where a transfer stands after a slice of work.
#[derive(Debug)]
pub(crate) enum Progress {
    /// There is more to do at once.
    Busy,
    /// The host has to go on first.
    Waiting,
    /// It is over.
    Done(Result<FileInfo, Failure>),
}

/// A file that comes.
#[derive(Debug)]
pub(crate) struct Put {
    pub(crate) request: u32,
    stream: u32,
    path: String,
    directory: OwnedFd,
    name: String,
    temporary: String,
    file: File,
    mode: u32,
    uid: u32,
    gid: u32,
    received: VecDeque<StreamBody>,
    size: u64,
    hasher: blake3::Hasher,
    taken: u32,
    in_place: bool,
}

impl Put {
    pub(crate) fn start(root: &Root, request: u32, put: PutFile) -> Result<Put, Failure> {
        let PutFile {
            stream,
            path,
            mode,
            user,
            group,
            size,
        } = put;
        let owner = identity(root, user.as_deref(), group.as_deref())?;
        let fail = |error| file_failure("write", &path, error);
        let Some((above, name)) = split(&path) else {
            return Err(fail(Errno::ISDIR));
        };
        let directory = root.make_directories(above).map_err(fail)?;
        if root
            .stat(&path)
            .is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode).is_dir())
        {
            return Err(fail(Errno::ISDIR));
        }
        let temporary = format!(".xbee-put-{stream}");
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        // Left over from an agent that was killed in the middle.
        let _none = unlinkat(&directory, &temporary, AtFlags::empty());
        let file =
            openat(&directory, &temporary, flags, Mode::from_raw_mode(0o600)).map_err(fail)?;
        let put = Put {
            request,
            stream,
            name: name.into(),
            directory,
            temporary,
            file: file.into(),
            mode,
            uid: owner.uid,
            gid: owner.gid,
            received: VecDeque::new(),
            size: 0,
            hasher: blake3::Hasher::new(),
            taken: 0,
            in_place: false,
            path,
        };
        if let Some(size) = size {
            let space =
                fstatvfs(&put.file).map_err(|error| file_failure("write", &put.path, error))?;
            let available = space.f_bavail.saturating_mul(space.f_frsize);
            // RAM file systems without a limit have no blocks at all.
            if space.f_blocks > 0 && size > available {
                return Err(failure(
                    code::FILE_ERROR,
                    format!(
                        "cannot write {} in the guest: {size} bytes needed, {available} free",
                        put.path
                    ),
                ));
            }
        }
        Ok(put)
    }

    pub(crate) fn receive(&mut self, body: StreamBody) {
        self.received.push_back(body);
    }

    /// Does the next piece of work.
    pub(crate) fn step(&mut self, out: &mut Outbox) -> Progress {
        let result = match self.received.pop_front() {
            None => return Progress::Waiting,
            Some(StreamBody::Data(data)) => self.write(&data, out),
            Some(StreamBody::Hole(bytes)) => {
                let slice = bytes.min(SLICE_BYTES);
                hash_zeros(&mut self.hasher, slice);
                self.size = self.size.saturating_add(slice);
                if bytes > slice {
                    self.received.push_front(StreamBody::Hole(bytes - slice));
                }
                Ok(())
            }
            Some(StreamBody::End) => return Progress::Done(self.finish()),
            Some(StreamBody::Reset) => {
                return Progress::Done(Err(failure(
                    code::CANCELLED,
                    "the host cancelled the file",
                )));
            }
            Some(StreamBody::Credit(_)) => Ok(()),
        };
        match result {
            Ok(()) if self.received.is_empty() => Progress::Waiting,
            Ok(()) => Progress::Busy,
            Err(failure) => Progress::Done(Err(failure)),
        }
    }

    pub(crate) fn is_busy(&self) -> bool {
        !self.received.is_empty()
    }

    fn write(&mut self, data: &[u8], out: &mut Outbox) -> Result<(), Failure> {
        self.file
            .write_all_at(data, self.size)
            .map_err(|error| file_failure("write", &self.path, errno(&error)))?;
        self.hasher.update(data);
        self.size += data.len() as u64;
        self.taken += data.len() as u32;
        if self.taken >= CREDIT_STEP_BYTES {
            out.push(&message(
                self.stream,
                StreamBody::Credit(std::mem::take(&mut self.taken)),
            ));
        }
        Ok(())
    }

    fn finish(&mut self) -> Result<FileInfo, Failure> {
        let fail = |error| file_failure("write", &self.path, error);
        // A hole at the end has no bytes that were written.
        ftruncate(&self.file, self.size).map_err(fail)?;
        fchown(
            &self.file,
            Some(Uid::from_raw(self.uid)),
            Some(Gid::from_raw(self.gid)),
        )
        .map_err(fail)?;
        // After the owner: a change of owner takes set-id bits away.
        fchmod(&self.file, Mode::from_raw_mode(self.mode & 0o7777)).map_err(fail)?;
        renameat(
            &self.directory,
            &self.temporary,
            &self.directory,
            &self.name,
        )
        .map_err(fail)?;
        self.in_place = true;
        info(&self.file, self.size, &self.hasher).map_err(fail)
    }
}

impl Drop for Put {
    fn drop(&mut self) {
        if !self.in_place {
            // It has a name that nobody looks at; the next one takes it away.
            let _left = unlinkat(&self.directory, &self.temporary, AtFlags::empty());
        }
    }
}

/// A file that goes.
#[derive(Debug)]
pub(crate) struct Get {
    pub(crate) request: u32,
    stream: u32,
    path: String,
    file: File,
    /// As it was at the beginning.
    size: u64,
    offset: u64,
    /// Where the present run of bytes ends; before it, `offset` is in a hole if equal.
    data_end: u64,
    window: u32,
    hasher: blake3::Hasher,
}

impl Get {
    pub(crate) fn start(
        root: &Root,
        request: u32,
        stream: u32,
        path: String,
    ) -> Result<Get, Failure> {
        let fail = |error| file_failure("read", &path, error);
        let fd = root
            .open(
                &path,
                OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY,
                Mode::empty(),
            )
            .map_err(fail)?;
        let stat = fstat(&fd).map_err(fail)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(failure(
                code::FILE_ERROR,
                format!("cannot read {path} in the guest: not a regular file"),
            ));
        }
        Ok(Get {
            request,
            stream,
            path,
            file: fd.into(),
            size: stat.st_size as u64,
            offset: 0,
            data_end: 0,
            window: STREAM_WINDOW_BYTES,
            hasher: blake3::Hasher::new(),
        })
    }

    pub(crate) fn credit(&mut self, bytes: u32) {
        self.window = self.window.saturating_add(bytes);
    }

    /// Whether a step would get on.
    pub(crate) fn is_busy(&self, out: &Outbox) -> bool {
        self.window > 0 && out.has_room()
    }

    /// Sends the next piece.
    pub(crate) fn step(&mut self, out: &mut Outbox) -> Progress {
        if !self.is_busy(out) {
            return Progress::Waiting;
        }
        match self.slice(out) {
            Ok(true) => Progress::Busy,
            Ok(false) => Progress::Done(
                info(&self.file, self.size, &self.hasher)
                    .map_err(|error| file_failure("read", &self.path, error)),
            ),
            Err(error) => Progress::Done(Err(file_failure("read", &self.path, error))),
        }
    }

    fn slice(&mut self, out: &mut Outbox) -> Result<bool, Errno> {
        if self.offset >= self.size {
            return Ok(false);
        }
        if self.offset >= self.data_end {
            let next = match rustix::fs::seek(&self.file, Whence::Data(self.offset)) {
                Ok(next) => next.min(self.size),
                // A hole up to the end.
                Err(Errno::NXIO) => self.size,
                // A file system without holes.
                Err(Errno::INVAL) => self.offset,
                Err(error) => return Err(error),
            };
            if next > self.offset {
                let slice = (next - self.offset).min(SLICE_BYTES);
                hash_zeros(&mut self.hasher, slice);
                out.push(&message(self.stream, StreamBody::Hole(slice)));
                self.offset += slice;
                return Ok(true);
            }
            self.data_end = match rustix::fs::seek(&self.file, Whence::Hole(self.offset)) {
                Ok(end) => end.min(self.size),
                Err(_) => self.size,
            };
        }
        let length = (self.data_end - self.offset)
            .min(MAX_DATA_BYTES as u64)
            .min(self.window.into());
        let mut data = vec![0; length as usize];
        let read = self
            .file
            .read_at(&mut data, self.offset)
            .map_err(|error| errno(&error))?;
        if read == 0 {
            // It has been cut short meanwhile: what is sent is what there was.
            self.size = self.offset;
            return Ok(false);
        }
        data.truncate(read);
        self.hasher.update(&data);
        self.offset += read as u64;
        self.window -= read as u32;
        out.push(&message(self.stream, StreamBody::Data(data)));
        Ok(true)
    }
}

fn info(file: &File, size: u64, hasher: &blake3::Hasher) -> Result<FileInfo, Errno> {
    let stat = fstat(file)?;
    Ok(FileInfo {
        size,
        mode: stat.st_mode & 0o7777,
        uid: stat.st_uid,
        gid: stat.st_gid,
        modified_unix_seconds: stat.st_mtime,
        blake3: *hasher.finalize().as_bytes(),
    })
}

fn hash_zeros(hasher: &mut blake3::Hasher, mut bytes: u64) {
    while bytes > 0 {
        let part = bytes.min(ZEROS.len() as u64);
        hasher.update(&ZEROS[..part as usize]);
        bytes -= part;
    }
}

fn errno(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}
