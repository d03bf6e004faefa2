//! A file that a domain is saved to: written under another name first, and told from every other.
//!
//! It is what the hypervisor made of it, without a mark of ours: adding one could fail for want of
//! space when the domain is gone already.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::domain::DomainId;
use crate::error::Error;
use crate::rundir::new_file;

/// So much of a file is looked at to know it again: blocks at equal distances. Among them are the first
/// and the last, where the virtual machine's description and its processors' state are.
const BLOCKS: u64 = 256;
const BLOCK_BYTES: u64 = 4 << 10;

/// What a save file is known by.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Fingerprint {
    len_bytes: u64,
    blocks: String,
}

impl Fingerprint {
    fn of(file: &mut File) -> io::Result<Self> {
        let len_bytes = file.metadata()?.len();
        let mut hasher = blake3::Hasher::new();
        let mut block = Vec::new();
        let last = len_bytes.saturating_sub(BLOCK_BYTES);
        for index in 0..BLOCKS {
            file.seek(SeekFrom::Start(last / (BLOCKS - 1) * index))?;
            block.clear();
            file.take(BLOCK_BYTES).read_to_end(&mut block)?;
            hasher.update(&block);
        }
        file.seek(SeekFrom::Start(last))?;
        block.clear();
        file.take(BLOCK_BYTES).read_to_end(&mut block)?;
        hasher.update(&block);
        Ok(Self {
            len_bytes,
            blocks: hasher.finalize().to_hex().to_string(),
        })
    }
}

/// The name that a file has until it is complete.
pub(crate) fn partial(file: &Path) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(".partial");
    name.into()
}

/// Makes the empty partial file, which nobody else can read: it will hold a guest's memory.
pub(crate) fn begin(file: &Path) -> Result<File, Error> {
    if !file.is_absolute() || file.file_name().is_none() {
        return Err(Error::io("save to", file)(io::Error::new(
            io::ErrorKind::InvalidInput,
            "no absolute path of a file",
        )));
    }
    let partial = partial(file);
    forget(&partial)?;
    new_file(&partial).map_err(Error::io("make", partial))
}

/// Makes sure that a partial file which is complete stays so, and says what it is known by.
pub(crate) fn seal(file: &Path) -> Result<Fingerprint, Error> {
    let partial = partial(file);
    let seal = || {
        let mut opened = File::open(&partial)?;
        opened.sync_all()?;
        Fingerprint::of(&mut opened)
    };
    seal().map_err(Error::io("complete", &partial))
}

/// Whether a partial file ends so.
#[cfg(feature = "xen")]
pub(crate) fn ends_with(file: &Path, end: &[u8]) -> Result<bool, Error> {
    let partial = partial(file);
    let look = || {
        let mut opened = File::open(&partial)?;
        let len_bytes = opened.metadata()?.len();
        let from = len_bytes.saturating_sub(end.len() as u64);
        opened.seek(SeekFrom::Start(from))?;
        let mut found = Vec::new();
        opened.read_to_end(&mut found)?;
        Ok(found == end)
    };
    look().map_err(Error::io("read", &partial))
}

/// Gives a sealed file its name, unless it has it already.
pub(crate) fn publish(file: &Path) -> Result<(), Error> {
    match fs::rename(partial(file), file) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(Error::io("write", file)(error));
        }
        _ => {}
    }
    let directory = file.parent().unwrap_or(file);
    File::open(directory)
        .and_then(|directory| directory.sync_all())
        .map_err(Error::io("write", directory))
}

/// Whether `file` is the one that the domain was last saved to.
pub(crate) fn check(file: &Path, id: DomainId, known_by: &Fingerprint) -> Result<(), Error> {
    let mut opened = File::open(file).map_err(Error::io("open the save file", file))?;
    let found = Fingerprint::of(&mut opened).map_err(Error::io("read", file))?;
    if found == *known_by {
        return Ok(());
    }
    Err(Error::NotItsSave {
        id,
        path: file.to_owned(),
        detail: "it is not, or no longer, the file that the domain was last saved to",
    })
}

/// Removes a file that may be there.
pub(crate) fn forget(file: &Path) -> Result<(), Error> {
    match fs::remove_file(file) {
        Err(error)
            if !matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ) =>
        {
            Err(Error::io("remove", file)(error))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_file_is_known_again_and_others_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("save");
        let content: Vec<u8> = (0..3_000_000u32).map(|n| (n / 4096) as u8).collect();
        begin(&file).unwrap().write_all(&content).unwrap();
        let known_by = seal(&file).unwrap();
        publish(&file).unwrap();
        // Again, as after a restart in between.
        publish(&file).unwrap();
        assert!(!partial(&file).exists());
        let id = DomainId::nil();
        check(&file, id, &known_by).unwrap();
        let mut longer = content.clone();
        longer.push(0);
        let (mut first, mut last) = (content.clone(), content);
        first[0] ^= 1;
        *last.last_mut().unwrap() ^= 1;
        for other in [longer, first, last, Vec::new()] {
            fs::write(&file, &other).unwrap();
            let error = check(&file, id, &known_by).unwrap_err();
            assert_eq!(error.code(), "not-its-save");
        }
        assert_eq!(begin(Path::new("save")).unwrap_err().code(), "host-io");
    }
}
