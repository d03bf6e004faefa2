//! Destinations that exist complete or not at all.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::ErrorKind;

/// A file or directory under a temporary name beside its destination; removed unless committed.
pub(crate) struct Partial {
    temporary: PathBuf,
    destination: PathBuf,
    is_directory: bool,
    committed: bool,
}

/// Makes temporary names unique within the process.
static COUNTER: AtomicU64 = AtomicU64::new(0);

impl Partial {
    fn create<T>(
        destination: &Path,
        is_directory: bool,
        make: impl Fn(&Path) -> io::Result<T>,
    ) -> Result<(Self, T), ErrorKind> {
        loop {
            let number = COUNTER.fetch_add(1, Ordering::Relaxed);
            let name = format!(".xbee-stage-{}-{number}", std::process::id());
            let temporary = destination.with_file_name(name);
            match make(&temporary) {
                Ok(made) => {
                    let partial = Self {
                        temporary,
                        destination: destination.to_path_buf(),
                        is_directory,
                        committed: false,
                    };
                    return Ok((partial, made));
                }
                // Left behind by an earlier process with the same id.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(ErrorKind::local("cannot create", destination, error)),
            }
        }
    }

    /// A new file, readable and writable, with `mode` before the umask.
    pub(crate) fn file(destination: &Path, mode: u32) -> Result<(Self, File), ErrorKind> {
        Self::create(destination, false, |path| new_file(path, mode))
    }

    /// A new directory that only the owner may enter.
    pub(crate) fn directory(destination: &Path) -> Result<Self, ErrorKind> {
        let (partial, ()) = Self::create(destination, true, |path| {
            DirBuilder::new().mode(0o700).create(path)
        })?;
        Ok(partial)
    }

    /// A new file with this temporary name, which nobody else uses: what has it was left behind.
    pub(crate) fn file_named(
        destination: &Path,
        name: &str,
        mode: u32,
    ) -> Result<(Self, File), ErrorKind> {
        let temporary = destination.with_file_name(name);
        remove_if_there(&temporary)
            .and_then(|()| new_file(&temporary, mode))
            .map(|file| {
                let partial = Self {
                    temporary,
                    destination: destination.to_path_buf(),
                    is_directory: false,
                    committed: false,
                };
                (partial, file)
            })
            .map_err(|error| ErrorKind::local("cannot create", destination, error))
    }

    /// The temporary path.
    pub(crate) fn path(&self) -> &Path {
        &self.temporary
    }

    /// Gives it its name, replacing a file or an empty directory.
    pub(crate) fn commit(mut self) -> Result<(), ErrorKind> {
        fs::rename(&self.temporary, &self.destination).map_err(|source| {
            ErrorKind::local(
                "cannot put the finished result at",
                &self.destination,
                source,
            )
        })?;
        self.committed = true;
        Ok(())
    }

    /// Gives it its name, unless something has that name.
    pub(crate) fn commit_new(mut self) -> Result<(), ErrorKind> {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        let renamed = renameat_with(
            CWD,
            &self.temporary,
            CWD,
            &self.destination,
            RenameFlags::NOREPLACE,
        );
        match renamed {
            Ok(()) => {
                self.committed = true;
                Ok(())
            }
            Err(rustix::io::Errno::EXIST) => Err(ErrorKind::Exists),
            Err(errno) => Err(ErrorKind::local(
                "cannot put the finished result at",
                &self.destination,
                errno.into(),
            )),
        }
    }
}

fn new_file(path: &Path, mode: u32) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path)
}

/// Removes a file that may be there.
pub(crate) fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if self.committed {
            return;
        }
        let removed = match self.is_directory {
            true => fs::remove_dir_all(&self.temporary),
            false => fs::remove_file(&self.temporary),
        };
        if let Err(error) = removed {
            tracing::warn!(path = %self.temporary.display(), %error, "cannot remove partial output");
        }
    }
}
