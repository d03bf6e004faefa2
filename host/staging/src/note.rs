//! What a put writes down of itself, so that after a kill of the process its repetition does nothing twice.

use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::error::ErrorKind;

/// Length of a note. It is written at once and lies in one sector, so it is there whole or not at all.
const NOTE_BYTES: usize = 128;

/// Makes a put repeatable: called again with the same after a kill of the process or a power cut, it goes on where
/// it was.
#[derive(Debug, Clone)]
pub struct Repeatable {
    /// File of the caller's in which the put takes notes; made when it is not there.
    pub note: PathBuf,
    /// Name that no other put has, a part of a file's name.
    pub name: String,
}

impl Repeatable {
    /// Name of the file, beside its destination, that is written before it gets its name.
    pub(crate) fn temporary(&self) -> String {
        format!(".xbee-stage-{}", self.name)
    }
}

/// A file, as far as a put has to recognise it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FileId {
    device: u64,
    inode: u64,
}

impl FileId {
    pub(crate) fn of(metadata: &Metadata) -> FileId {
        FileId {
            device: metadata.dev(),
            inode: metadata.ino(),
        }
    }
}

/// How far a put was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Noted {
    /// Nothing has been changed but the temporary file.
    Begun,
    /// This file is whole and gets its name next.
    Named(FileId),
    /// This file is added to, from this length on.
    Appending(FileId, u64),
    /// It is over; so many bytes.
    Sent(u64),
}

/// A note, open.
pub(crate) struct Note {
    file: File,
    path: PathBuf,
}

impl Note {
    /// Opens the note of a put, and makes it if it is the first time.
    pub(crate) fn open(path: &Path) -> Result<Note, ErrorKind> {
        let open = || -> io::Result<File> {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .open(path)?;
            // Its name too shall outlive a power cut.
            if let Some(directory) = path.parent() {
                File::open(directory)?.sync_all()?;
            }
            Ok(file)
        };
        let file = open().map_err(|error| ErrorKind::local("cannot note in", path, error))?;
        Ok(Note {
            file,
            path: path.into(),
        })
    }

    /// Opens it if it is there.
    pub(crate) fn find(path: &Path) -> Result<Option<Note>, ErrorKind> {
        match path.try_exists() {
            Ok(true) => Note::open(path).map(Some),
            Ok(false) => Ok(None),
            Err(error) => Err(ErrorKind::local("cannot read", path, error)),
        }
    }

    /// What was written last.
    pub(crate) fn read(&self) -> Result<Noted, ErrorKind> {
        let failed = |error| ErrorKind::local("cannot read", &self.path, error);
        let mut bytes = [0; NOTE_BYTES];
        if self.file.metadata().map_err(failed)?.len() == 0 {
            return Ok(Noted::Begun);
        }
        self.file.read_exact_at(&mut bytes, 0).map_err(failed)?;
        let text = std::str::from_utf8(&bytes).unwrap_or_default();
        let mut words = text.split_whitespace();
        let word = words.next();
        let numbers: Vec<u64> = words.filter_map(|word| word.parse().ok()).collect();
        let id = |device, inode| FileId { device, inode };
        match (word, &numbers[..]) {
            (Some("named"), &[device, inode]) => Ok(Noted::Named(id(device, inode))),
            (Some("appending"), &[device, inode, length]) => {
                Ok(Noted::Appending(id(device, inode), length))
            }
            (Some("sent"), &[bytes]) => Ok(Noted::Sent(bytes)),
            _ => Err(failed(io::ErrorKind::InvalidData.into())),
        }
    }

    /// Writes down how far the put is. On the disk when this returns.
    pub(crate) fn write(&self, noted: Noted) -> Result<(), ErrorKind> {
        let text = match noted {
            Noted::Begun => return Ok(()),
            Noted::Named(FileId { device, inode }) => format!("named {device} {inode}"),
            Noted::Appending(FileId { device, inode }, length) => {
                format!("appending {device} {inode} {length}")
            }
            Noted::Sent(bytes) => format!("sent {bytes}"),
        };
        let line = format!("{text:width$}\n", width = NOTE_BYTES - 1);
        let written = self.file.write_all_at(line.as_bytes(), 0);
        written
            .and_then(|()| self.file.sync_all())
            .map_err(|error| ErrorKind::local("cannot note in", &self.path, error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_is_read_as_it_was_written() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("note");
        assert!(Note::find(&path).unwrap().is_none());
        let note = Note::open(&path).unwrap();
        assert_eq!(note.read().unwrap(), Noted::Begun);
        let id = FileId {
            device: u64::MAX,
            inode: u64::MAX,
        };
        for noted in [
            Noted::Appending(id, u64::MAX),
            Noted::Named(id),
            Noted::Sent(7),
        ] {
            note.write(noted).unwrap();
            let again = Note::find(&path).unwrap().unwrap();
            assert_eq!(again.read().unwrap(), noted);
        }
        std::fs::write(&path, "sent").unwrap();
        assert!(note.read().is_err());
    }
}
