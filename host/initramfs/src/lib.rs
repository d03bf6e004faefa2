//! Deterministic writer for initramfs archives.
//!
//! The format is the kernel's "newc" cpio (Documentation/driver-api/early-userspace/buffer-format.rst).
//! The same calls in the same order give the same bytes: owner and group are 0, times are 0, and
//! inode numbers count up from 1.
//!
//! [`Writer::finish`] pads the archive to a multiple of 512 bytes. The kernel reads any number of
//! archives one after another and skips zeros between them, so a finished archive can be appended
//! to another: `xbed` does so to add a few per-domain files to an image's base archive. A file that
//! occurs twice is taken from the later archive.
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod modules;

use std::io::{self, Write};

/// Longest path (without its leading slash, in bytes) the kernel's unpacker takes: `PATH_MAX` less
/// the terminating NUL.
pub const PATH_BYTES_MAX: usize = 4095;

const TRAILER: &str = "TRAILER!!!";
const ALIGNMENT: u64 = 4;
const BLOCK_BYTES: u64 = 512;

const S_IFDIR: u32 = 0o040_000;
const S_IFREG: u32 = 0o100_000;
const S_IFLNK: u32 = 0o120_000;
const S_IFCHR: u32 = 0o020_000;

/// Why an archive could not be written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The path cannot be stored: empty, not in plain form, or too long.
    #[error("cannot store {path:?} in an initramfs: {reason}")]
    Path {
        /// The path as given.
        path: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A file is larger than the 4 GiB that the format's size field can say.
    #[error("cannot store {path:?} in an initramfs: {size_bytes} bytes, at most 4294967295 fit")]
    TooLarge {
        /// The path as given.
        path: String,
        /// Size of the file.
        size_bytes: usize,
    },
    /// The output could not be written.
    #[error("cannot write the initramfs")]
    Write(#[from] io::Error),
}

/// Writes one archive to `W`. Wrap a file in a [`std::io::BufWriter`]: headers are small writes.
#[derive(Debug)]
pub struct Writer<W: Write> {
    out: W,
    written_bytes: u64,
    inode: u32,
}

impl<W: Write> Writer<W> {
    /// Starts an archive. `out` must be at a multiple of four bytes, which an empty file and the
    /// end of a finished archive both are.
    pub fn new(out: W) -> Self {
        Self {
            out,
            written_bytes: 0,
            inode: 0,
        }
    }

    /// Adds a directory. Parents come before children: the kernel creates no missing ones.
    ///
    /// # Errors
    /// [`Error::Path`] for a path that cannot be stored, [`Error::Write`] from the output.
    pub fn dir(&mut self, path: &str, mode: u32) -> Result<(), Error> {
        self.entry(path, S_IFDIR | permissions(mode), 2, (0, 0), &[])
    }

    /// Adds a regular file.
    ///
    /// # Errors
    /// As [`Writer::dir`], and [`Error::TooLarge`].
    pub fn file(&mut self, path: &str, mode: u32, content: &[u8]) -> Result<(), Error> {
        self.entry(path, S_IFREG | permissions(mode), 1, (0, 0), content)
    }

    /// Adds a symbolic link at `path` that points to `target`.
    ///
    /// # Errors
    /// As [`Writer::dir`]; an empty, overlong or NUL-bearing target is [`Error::Path`] too.
    pub fn symlink(&mut self, path: &str, target: &str) -> Result<(), Error> {
        if target.is_empty() || target.len() > PATH_BYTES_MAX || target.contains('\0') {
            return Err(Error::Path {
                path: target.to_owned(),
                reason: "a link's target has 1 to 4095 bytes and no NUL",
            });
        }
        self.entry(path, S_IFLNK | 0o777, 1, (0, 0), target.as_bytes())
    }

    /// Adds a character device with the given device number.
    ///
    /// # Errors
    /// As [`Writer::dir`].
    pub fn node(&mut self, path: &str, mode: u32, major: u32, minor: u32) -> Result<(), Error> {
        self.entry(path, S_IFCHR | permissions(mode), 1, (major, minor), &[])
    }

    /// Ends the archive and gives the output back, flushed and at a multiple of 512 bytes.
    ///
    /// # Errors
    /// [`Error::Write`] from the output.
    pub fn finish(mut self) -> Result<W, Error> {
        self.header(0, 0, 1, 0, (0, 0), TRAILER)?;
        self.pad(BLOCK_BYTES)?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn entry(
        &mut self,
        path: &str,
        mode: u32,
        links: u32,
        device: (u32, u32),
        content: &[u8],
    ) -> Result<(), Error> {
        let name = stored_name(path)?;
        let size = u32::try_from(content.len()).map_err(|_| Error::TooLarge {
            path: path.to_owned(),
            size_bytes: content.len(),
        })?;
        self.inode += 1;
        self.header(self.inode, mode, links, size, device, name)?;
        self.put(content)?;
        self.pad(ALIGNMENT)?;
        Ok(())
    }

    fn header(
        &mut self,
        inode: u32,
        mode: u32,
        links: u32,
        size: u32,
        (major, minor): (u32, u32),
        name: &str,
    ) -> io::Result<()> {
        let name_bytes = name.len() + 1;
        // magic ino mode uid gid nlink mtime filesize maj min rmaj rmin namesize chksum
        let header = format!(
            "070701{inode:08X}{mode:08X}{0:08X}{0:08X}{links:08X}{0:08X}{size:08X}\
             {0:08X}{0:08X}{major:08X}{minor:08X}{name_bytes:08X}{0:08X}",
            0
        );
        self.put(header.as_bytes())?;
        self.put(name.as_bytes())?;
        self.put(&[0])?;
        self.pad(ALIGNMENT)
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.out.write_all(bytes)?;
        self.written_bytes += bytes.len() as u64;
        Ok(())
    }

    fn pad(&mut self, multiple: u64) -> io::Result<()> {
        const ZEROS: [u8; BLOCK_BYTES as usize] = [0; BLOCK_BYTES as usize];
        let missing = self.written_bytes.next_multiple_of(multiple) - self.written_bytes;
        // At most `multiple - 1`, and no multiple is larger than a block.
        self.put(&ZEROS[..missing as usize])
    }
}

fn permissions(mode: u32) -> u32 {
    mode & 0o7777
}

/// The name as it stands in the archive: relative, in plain form.
fn stored_name(path: &str) -> Result<&str, Error> {
    let fail = |reason| {
        Err(Error::Path {
            path: path.to_owned(),
            reason,
        })
    };
    let name = path.strip_prefix('/').unwrap_or(path);
    if name.len() > PATH_BYTES_MAX {
        return fail("longer than 4095 bytes");
    }
    if name.contains('\0') {
        return fail("contains a NUL byte");
    }
    if name
        .split('/')
        .any(|part| part.is_empty() || part == "." || part == "..")
    {
        return fail("empty, or has an empty, '.' or '..' part");
    }
    if name == TRAILER {
        return fail("the name marks the end of the archive");
    }
    Ok(name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    fn sample() -> Vec<u8> {
        let mut writer = Writer::new(Vec::new());
        writer.dir("dev", 0o755).unwrap();
        writer.node("/dev/console", 0o600, 5, 1).unwrap();
        writer.file("abc", 0o644, b"four").unwrap();
        writer.file("/init", 0o755, b"hello").unwrap();
        writer.dir("/tmp", 0o1777).unwrap();
        writer.symlink("bin", "usr/bin").unwrap();
        writer.finish().unwrap()
    }

    #[test]
    fn header_has_the_fields_of_the_newc_format() {
        let mut writer = Writer::new(Vec::new());
        writer.node("/dev/console", 0o600, 5, 1).unwrap();
        let bytes = writer.finish().unwrap();
        let expected = concat!(
            "070701",
            "00000001", // inode
            "00002180", // mode: character device, 0600
            "00000000", // uid
            "00000000", // gid
            "00000001", // links
            "00000000", // mtime
            "00000000", // size
            "00000000", // device
            "00000000",
            "00000005", // of the node itself
            "00000001",
            "0000000C", // name with its NUL
            "00000000", // checksum, unused
            "dev/console\0",
        );
        assert_eq!(&bytes[..expected.len()], expected.as_bytes());
        assert_eq!(
            &bytes[expected.len()..expected.len() + 8],
            b"\0\x00070701",
            "the next header is aligned to four"
        );
    }

    #[test]
    fn same_calls_give_same_bytes_in_whole_blocks() {
        assert_eq!(sample(), sample());
        assert_eq!(sample().len() % 512, 0);
    }

    #[test]
    fn refuses_paths_the_kernel_would_misread() {
        let long = "x".repeat(PATH_BYTES_MAX + 1);
        for path in [
            "", "/", "//x", "a//b", "a/", "./a", "a/../b", "a\0b", TRAILER, &long,
        ] {
            let mut writer = Writer::new(Vec::new());
            assert!(
                matches!(writer.file(path, 0o644, b""), Err(Error::Path { .. })),
                "{path:?} was taken"
            );
        }
    }

    #[test]
    fn error_of_the_output_is_reported() {
        let mut room = [0_u8; 64];
        let mut writer = Writer::new(&mut room[..]);
        assert!(matches!(writer.file("a", 0o644, b""), Err(Error::Write(_))));
    }

    /// The reader is not ours: GNU cpio.
    #[test]
    fn another_reader_sees_a_later_archive_win() {
        let directory = tempfile::tempdir().unwrap();
        let mut later = Writer::new(Vec::new());
        later.file("abc", 0o600, b"later").unwrap();
        // The kernel reads on after the end of an archive, cpio does not: one after the other.
        for archive in [sample(), later.finish().unwrap()] {
            let mut child = Command::new("cpio")
                .args(["--extract", "--make-directories", "--unconditional"])
                // The device node needs root.
                .args(["--quiet", "--nonmatching", "dev/console"])
                .current_dir(directory.path())
                .stdin(Stdio::piped())
                .spawn()
                .unwrap();
            child.stdin.take().unwrap().write_all(&archive).unwrap();
            assert!(child.wait().unwrap().success());
        }
        let read = |name: &str| std::fs::read(directory.path().join(name)).unwrap();
        assert_eq!(read("abc"), b"later");
        assert_eq!(read("init"), b"hello");
        assert_eq!(
            std::fs::read_link(directory.path().join("bin")).unwrap(),
            std::path::Path::new("usr/bin")
        );
    }
}
