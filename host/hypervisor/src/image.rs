//! Recognises kernels and disk images by their content, before a hypervisor gets them.
//!
//! Only fixed places are read, and nothing is followed: the files come from users.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::domain::{Disk, DiskFormat};
use crate::error::Error;

/// Sector size of every disk a guest sees, in bytes.
pub const SECTOR_BYTES: u64 = 512;

/// How much of a file's beginning is looked at: up to the btrfs superblock's magic number.
const HEAD_BYTES: usize = 0x1_1000;

/// ELF note that holds the address of the 32-bit entry point for PVH
/// (Xen public header `elfnote.h`, `XEN_ELFNOTE_PHYS32_ENTRY`).
const PVH_NOTE_TYPE: u32 = 18;

/// A checked disk image, open for reading.
#[derive(Debug)]
pub struct DiskImage {
    /// The image.
    pub file: File,
    /// Size of the disk the guest sees, in bytes, a multiple of [`SECTOR_BYTES`].
    pub virtual_size_bytes: u64,
}

/// Opens a disk image and checks that it is one, and of the format it is said to have.
///
/// # Errors
/// [`Error::ImageUnreadable`] and [`Error::NotAnImage`].
pub fn open_disk(disk: &Disk) -> Result<DiskImage, Error> {
    let file = open("disk image", &disk.image)?;
    let (head, len) = head(&file, &disk.image)?;
    let not_an_image = |found: String| Error::NotAnImage {
        path: disk.image.clone(),
        expected: "disk image",
        found,
    };
    let content = sniff(&head);
    match (disk.format, content) {
        (DiskFormat::Qcow2, Content::Qcow2) => {
            let virtual_size_bytes = qcow2_size(&head).map_err(not_an_image)?;
            Ok(DiskImage {
                file,
                virtual_size_bytes,
            })
        }
        (DiskFormat::Raw, Content::Disk(_)) => Ok(DiskImage {
            file,
            virtual_size_bytes: len.next_multiple_of(SECTOR_BYTES),
        }),
        (DiskFormat::Qcow2, Content::Disk(what)) => Err(not_an_image(format!(
            "{what}: its format is raw, not qcow2"
        ))),
        (DiskFormat::Raw, Content::Qcow2) => Err(not_an_image(
            "a qcow2 image: its format is qcow2, not raw".to_owned(),
        )),
        (_, Content::Other(what)) => Err(not_an_image(what.to_owned())),
        (_, Content::Unknown) => Err(not_an_image(
            "neither a partition table nor a file system known here".to_owned(),
        )),
    }
}

/// Opens a kernel and checks that it is of a kind that can be started directly.
///
/// # Errors
/// [`Error::ImageUnreadable`] and [`Error::UnknownKernel`].
pub fn open_kernel(path: &Path) -> Result<File, Error> {
    let file = open("kernel", path)?;
    let (head, _) = head(&file, path)?;
    let unknown = |found: &str| Error::UnknownKernel {
        path: path.to_owned(),
        found: found.to_owned(),
    };
    // Linux, Documentation/arch/x86/boot.rst: boot sector signature and "HdrS".
    if bytes_at(&head, 0x1fe, b"\x55\xaa") && bytes_at(&head, 0x202, b"HdrS") {
        return Ok(file);
    }
    if head.starts_with(b"\x7fELF") {
        return match has_pvh_note(&file, &head) {
            Ok(true) => Ok(file),
            Ok(false) => Err(unknown("an ELF file without a PVH note")),
            Err(source) => Err(Error::ImageUnreadable {
                role: "kernel",
                path: path.to_owned(),
                source,
            }),
        };
    }
    Err(unknown(match sniff(&head) {
        Content::Qcow2 => "a qcow2 image",
        Content::Disk(what) | Content::Other(what) => what,
        Content::Unknown => "data of an unknown kind",
    }))
}

/// Opens an initial RAM file system. What it holds is the guest kernel's affair.
///
/// # Errors
/// [`Error::ImageUnreadable`].
pub fn open_initramfs(path: &Path) -> Result<File, Error> {
    open("initramfs", path)
}

fn open(role: &'static str, path: &Path) -> Result<File, Error> {
    let unreadable = |source| Error::ImageUnreadable {
        role,
        path: path.to_owned(),
        source,
    };
    // A named pipe would block the open, and a device has no size.
    let meta = std::fs::metadata(path).map_err(unreadable)?;
    if !meta.is_file() {
        return Err(unreadable(io::Error::new(
            io::ErrorKind::InvalidInput,
            if meta.is_dir() {
                "it is a directory"
            } else {
                "it is not a regular file"
            },
        )));
    }
    File::open(path).map_err(unreadable)
}

fn head(file: &File, path: &Path) -> Result<(Vec<u8>, u64), Error> {
    let read = || -> io::Result<(Vec<u8>, u64)> {
        let len = file.metadata()?.len();
        let mut head = vec![0; HEAD_BYTES.min(usize::try_from(len).unwrap_or(HEAD_BYTES))];
        file.read_exact_at(&mut head, 0)?;
        Ok((head, len))
    };
    read().map_err(Error::io("read", path))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Content {
    Qcow2,
    Disk(&'static str),
    Other(&'static str),
    Unknown,
}

fn bytes_at(data: &[u8], offset: usize, magic: &[u8]) -> bool {
    data.get(offset..)
        .is_some_and(|rest| rest.starts_with(magic))
}

fn sniff(head: &[u8]) -> Content {
    use Content::{Disk, Other, Qcow2};
    /// Offset, magic number, meaning. The first match counts: a boot sector's 55 aa is so short
    /// that it comes last.
    const KNOWN: &[(usize, &[u8], Content)] = &[
        (0, b"QFI\xfb", Qcow2),
        (
            0,
            b"\x1f\x8b",
            Other("gzip data: say Compression gzip in the document"),
        ),
        (
            0,
            b"BZh",
            Other("bzip2 data: say Compression bzip2 in the document"),
        ),
        (
            0,
            b"\xfd7zXZ\0",
            Other("xz data: say Compression xz in the document"),
        ),
        (
            0,
            b"\x28\xb5\x2f\xfd",
            Other("zstd data: say Compression zstd in the document"),
        ),
        (0, b"PK\x03\x04", Other("a zip archive: unpack it first")),
        (
            0,
            b"KDMV",
            Other("a VMDK image: convert it with qemu-img convert -O qcow2"),
        ),
        (
            0,
            b"vhdxfile",
            Other("a VHDX image: convert it with qemu-img convert -O qcow2"),
        ),
        (
            0,
            b"conectix",
            Other("a VHD image: convert it with qemu-img convert -O qcow2"),
        ),
        (
            64,
            b"\x7f\x10\xda\xbe",
            Other("a VDI image: convert it with qemu-img convert -O qcow2"),
        ),
        (0, b"\x7fELF", Other("an ELF program")),
        (0, b"070701", Other("a cpio archive (an initramfs?)")),
        (0, b"#!", Other("a script")),
        (
            257,
            b"ustar",
            Other("a tar archive, not the disk of a machine"),
        ),
        (512, b"EFI PART", Disk("a GPT partition table")),
        (1080, b"\x53\xef", Disk("an ext file system")),
        (0, b"XFSB", Disk("an XFS file system")),
        (0x1_0040, b"_BHRfS_M", Disk("a btrfs file system")),
        (0, b"hsqs", Disk("a squashfs file system")),
        (1024, b"\xe2\xe1\xf5\xe0", Disk("an EROFS file system")),
        (0x8001, b"CD001", Disk("an ISO 9660 file system")),
        (0, b"LUKS\xba\xbe", Disk("a LUKS volume")),
        (510, b"\x55\xaa", Disk("an MBR partition table")),
    ];
    if head.is_empty() {
        return Other("nothing: the file is empty");
    }
    if let Some((_, _, content)) = KNOWN
        .iter()
        .find(|(offset, magic, _)| bytes_at(head, *offset, magic))
    {
        return *content;
    }
    let text = head[..head.len().min(512)].trim_ascii_start();
    if text.first() == Some(&b'<') {
        return Other("markup (an error page in place of the image?)");
    }
    if head.iter().all(|byte| *byte == 0) {
        return Other("only zeros where a partition table or a file system begins");
    }
    if !text.is_empty()
        && text
            .iter()
            .all(|byte| byte.is_ascii_graphic() || byte.is_ascii_whitespace())
    {
        return Other("text");
    }
    Content::Unknown
}

/// Reads the disk's size off a qcow2 header (QEMU, docs/interop/qcow2.txt), and refuses images
/// that refer to other files: whoever wrote the header chose their names.
fn qcow2_size(head: &[u8]) -> Result<u64, String> {
    const DATA_FILE: u64 = 1 << 2;
    let number = |offset: usize, len: usize| {
        head.get(offset..offset + len)
            .map(|bytes| bytes.iter().fold(0u64, |n, byte| n << 8 | u64::from(*byte)))
            .ok_or_else(|| "a qcow2 header that is cut off".to_owned())
    };
    let version = number(4, 4)?;
    if !(2..=3).contains(&version) {
        return Err(format!(
            "a qcow2 image of version {version}, known are 2 and 3"
        ));
    }
    if number(8, 8)? != 0 {
        return Err(
            "a qcow2 image with a backing file: flatten it with qemu-img convert".to_owned(),
        );
    }
    if number(32, 4)? != 0 {
        return Err("an encrypted qcow2 image".to_owned());
    }
    if version == 3 && number(72, 8)? & DATA_FILE != 0 {
        return Err(
            "a qcow2 image with a data file of its own: flatten it with qemu-img convert"
                .to_owned(),
        );
    }
    let size = number(24, 8)?;
    if size == 0 || size > i64::MAX as u64 {
        return Err(format!("a qcow2 image of a disk of {size} bytes"));
    }
    Ok(size.next_multiple_of(SECTOR_BYTES))
}

fn has_pvh_note(file: &File, head: &[u8]) -> io::Result<bool> {
    // ELF-64 and ELF-32 little-endian headers (System V ABI, chapters 4 and 5). Sizes and counts
    // are bounded: the file is a user's.
    const NOTES_MAX_BYTES: u64 = 1 << 20;
    const PT_NOTE: u64 = 4;
    let number = |data: &[u8], offset: usize, len: usize| -> Option<u64> {
        let bytes = data.get(offset..offset.checked_add(len)?)?;
        Some(
            bytes
                .iter()
                .rev()
                .fold(0u64, |n, byte| n << 8 | u64::from(*byte)),
        )
    };
    let (table, entry_bytes, count, offset_at, size_at, word) = match head.get(4) {
        Some(2) => (
            number(head, 32, 8),
            number(head, 54, 2),
            number(head, 56, 2),
            8,
            32,
            8,
        ),
        Some(1) => (
            number(head, 28, 4),
            number(head, 42, 2),
            number(head, 44, 2),
            4,
            16,
            4,
        ),
        _ => return Ok(false),
    };
    let (Some(table), Some(entry_bytes), Some(count)) = (table, entry_bytes, count) else {
        return Ok(false);
    };
    for index in 0..count {
        let mut entry = vec![0; usize::try_from(entry_bytes).unwrap_or(0)];
        let Some(at) = table.checked_add(index * entry_bytes) else {
            return Ok(false);
        };
        if let Err(error) = file.read_exact_at(&mut entry, at) {
            return if error.kind() == io::ErrorKind::UnexpectedEof {
                Ok(false)
            } else {
                Err(error)
            };
        }
        if number(&entry, 0, 4) != Some(PT_NOTE) {
            continue;
        }
        let (Some(offset), Some(size)) = (
            number(&entry, offset_at, word),
            number(&entry, size_at, word),
        ) else {
            return Ok(false);
        };
        let mut notes = vec![0; usize::try_from(size.min(NOTES_MAX_BYTES)).unwrap_or(0)];
        if let Err(error) = file.read_exact_at(&mut notes, offset) {
            return if error.kind() == io::ErrorKind::UnexpectedEof {
                Ok(false)
            } else {
                Err(error)
            };
        }
        let mut rest = notes.as_slice();
        while let (Some(name_len), Some(desc_len), Some(kind)) =
            (number(rest, 0, 4), number(rest, 4, 4), number(rest, 8, 4))
        {
            if kind == u64::from(PVH_NOTE_TYPE) && bytes_at(rest, 12, b"Xen\0") {
                return Ok(true);
            }
            let next = 12 + name_len.next_multiple_of(4) + desc_len.next_multiple_of(4);
            rest = usize::try_from(next)
                .ok()
                .and_then(|next| rest.get(next..))
                .unwrap_or(&[]);
        }
    }
    Ok(false)
}
