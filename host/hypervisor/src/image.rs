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

/// ELF notes that hold the addresses of a kernel's entry points: the 32-bit one for PVH, and the one
/// for PV (Xen public header `elfnote.h`, `XEN_ELFNOTE_PHYS32_ENTRY` and `XEN_ELFNOTE_ENTRY`).
const PVH_NOTE_TYPE: u32 = 18;
const PV_NOTE_TYPE: u32 = 1;

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

/// What a kernel can be started as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Entries {
    /// In a PVH container, as QEMU and Xen do it.
    pub(crate) pvh: bool,
    /// Without hardware virtualization, as Xen does it.
    pub(crate) pv: bool,
}

/// Opens a kernel and checks that it is of a kind that can be started directly.
///
/// # Errors
/// [`Error::ImageUnreadable`] and [`Error::UnknownKernel`].
pub fn open_kernel(path: &Path) -> Result<File, Error> {
    match look_at_kernel(path)? {
        (file, Entries { pvh: true, .. }) => Ok(file),
        _ => Err(unknown_kernel(path, "an ELF file without a PVH note")),
    }
}

/// The error for what is no kernel for what is wanted.
pub(crate) fn unknown_kernel(path: &Path, found: &str) -> Error {
    Error::UnknownKernel {
        path: path.to_owned(),
        found: found.to_owned(),
    }
}

/// Opens a kernel and finds what it can be started as. A bzImage may be anything: what is in it is
/// compressed, and to look would take seconds.
pub(crate) fn look_at_kernel(path: &Path) -> Result<(File, Entries), Error> {
    let file = open("kernel", path)?;
    let (head, _) = head(&file, path)?;
    // Linux, Documentation/arch/x86/boot.rst: boot sector signature and "HdrS".
    if bytes_at(&head, 0x1fe, b"\x55\xaa") && bytes_at(&head, 0x202, b"HdrS") {
        let entries = Entries {
            pvh: true,
            pv: true,
        };
        return Ok((file, entries));
    }
    if head.starts_with(b"\x7fELF") {
        return match xen_notes(&file, &head) {
            Ok(entries) => Ok((file, entries)),
            Err(source) => Err(Error::ImageUnreadable {
                role: "kernel",
                path: path.to_owned(),
                source,
            }),
        };
    }
    let found = match sniff(&head) {
        Content::Qcow2 => "a qcow2 image",
        Content::Disk(what) | Content::Other(what) => what,
        Content::Unknown => "data of an unknown kind",
    };
    Err(unknown_kernel(path, found))
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

/// What the notes of an ELF kernel say; those of one that is cut off say what there is.
fn xen_notes(file: &File, head: &[u8]) -> io::Result<Entries> {
    // ELF-64 and ELF-32 little-endian headers (System V ABI, chapters 4 and 5). Sizes and counts
    // are bounded: the file is a user's.
    const NOTES_MAX_BYTES: u64 = 1 << 20;
    let mut room_bytes = NOTES_MAX_BYTES;
    const PT_NOTE: u64 = 4;
    let mut entries = Entries {
        pvh: false,
        pv: false,
    };
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
        _ => return Ok(entries),
    };
    let (Some(table), Some(entry_bytes), Some(count)) = (table, entry_bytes, count) else {
        return Ok(entries);
    };
    for index in 0..count {
        let mut entry = vec![0; usize::try_from(entry_bytes).unwrap_or(0)];
        let Some(at) = table.checked_add(index * entry_bytes) else {
            return Ok(entries);
        };
        if let Err(error) = file.read_exact_at(&mut entry, at) {
            return if error.kind() == io::ErrorKind::UnexpectedEof {
                Ok(entries)
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
            return Ok(entries);
        };
        let mut notes = vec![0; usize::try_from(size.min(room_bytes)).unwrap_or(0)];
        room_bytes = room_bytes.saturating_sub(size);
        if let Err(error) = file.read_exact_at(&mut notes, offset) {
            return if error.kind() == io::ErrorKind::UnexpectedEof {
                Ok(entries)
            } else {
                Err(error)
            };
        }
        let mut rest = notes.as_slice();
        while let (Some(name_len), Some(desc_len), Some(kind)) =
            (number(rest, 0, 4), number(rest, 4, 4), number(rest, 8, 4))
        {
            if bytes_at(rest, 12, b"Xen\0") {
                entries.pvh |= kind == u64::from(PVH_NOTE_TYPE);
                entries.pv |= kind == u64::from(PV_NOTE_TYPE);
            }
            let next = 12 + name_len.next_multiple_of(4) + desc_len.next_multiple_of(4);
            rest = usize::try_from(next)
                .ok()
                .and_then(|next| rest.get(next..))
                .unwrap_or(&[]);
        }
    }
    Ok(entries)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A kernel with Xen's notes of these types.
    #[cfg(feature = "xen")]
    pub(crate) fn kernel_with(notes: &[u32]) -> Vec<u8> {
        let notes = notes.iter().map(|kind| ("Xen", *kind, &[0; 8][..]));
        kernel(&notes.collect::<Vec<_>>())
    }

    /// A kernel of one segment of notes: their owners, types and contents.
    fn kernel(notes: &[(&str, u32, &[u8])]) -> Vec<u8> {
        let mut segment = Vec::new();
        for (owner, kind, content) in notes {
            segment.extend_from_slice(&(owner.len() as u32 + 1).to_le_bytes());
            segment.extend_from_slice(&(content.len() as u32).to_le_bytes());
            segment.extend_from_slice(&kind.to_le_bytes());
            segment.extend_from_slice(owner.as_bytes());
            segment.push(0);
            segment.resize(segment.len().next_multiple_of(4), 0);
            segment.extend_from_slice(content);
            segment.resize(segment.len().next_multiple_of(4), 0);
        }
        let mut elf = vec![0; 64 + 56];
        elf[..5].copy_from_slice(b"\x7fELF\x02");
        elf[32..40].copy_from_slice(&64u64.to_le_bytes());
        elf[54..56].copy_from_slice(&56u16.to_le_bytes());
        elf[56..58].copy_from_slice(&1u16.to_le_bytes());
        elf[64..68].copy_from_slice(&4u32.to_le_bytes());
        elf[64 + 8..64 + 16].copy_from_slice(&(64u64 + 56).to_le_bytes());
        elf[64 + 32..64 + 40].copy_from_slice(&(segment.len() as u64).to_le_bytes());
        elf.extend(segment);
        elf
    }

    fn entries(content: &[u8]) -> Result<Entries, Error> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kernel");
        std::fs::write(&path, content).unwrap();
        look_at_kernel(&path).map(|(_, entries)| entries)
    }

    #[test]
    fn notes_say_what_a_kernel_can_be_started_as() {
        let address = [0, 0, 0, 1, 0, 0, 0, 0];
        let other = ("GNU", 3, &[7; 20][..]);
        let pvh = ("Xen", PVH_NOTE_TYPE, &address[..4]);
        let pv = ("Xen", PV_NOTE_TYPE, &address[..]);
        let others = ("GNU", PVH_NOTE_TYPE, &address[..]);
        for (notes, is_pvh, is_pv) in [
            (&[other, pv, pvh][..], true, true),
            (&[other, pvh][..], true, false),
            (&[pv, other][..], false, true),
            (&[other, others][..], false, false),
            (&[][..], false, false),
        ] {
            let expected = Entries {
                pvh: is_pvh,
                pv: is_pv,
            };
            assert_eq!(entries(&kernel(notes)).unwrap(), expected, "{notes:?}");
        }
    }

    #[test]
    fn a_kernel_that_is_cut_off_or_lies_says_what_there_is() {
        let none = Entries {
            pvh: false,
            pv: false,
        };
        let whole = kernel(&[("Xen", PVH_NOTE_TYPE, &[0; 4])]);
        for len in 5..whole.len() {
            assert_eq!(entries(&whole[..len]).unwrap(), none, "{len}");
        }
        // Sizes: of the table's entries, of the segment, of a name.
        for (at, len) in [(54, 2), (64 + 32, 8), (64 + 56, 4)] {
            let mut wrong = whole.clone();
            wrong[at..at + len].fill(0xff);
            entries(&wrong).unwrap();
        }
        // A name of any length ends the list.
        let mut wrong = kernel(&[("Xen", 7, &[0; 4]), ("Xen", PV_NOTE_TYPE, &[0; 8])]);
        wrong[64 + 56..64 + 60].fill(0xff);
        assert_eq!(entries(&wrong).unwrap(), none);
    }

    #[test]
    fn what_is_compressed_may_be_either() {
        let mut image = vec![0; 1024];
        image[0x1fe..0x200].copy_from_slice(b"\x55\xaa");
        image[0x202..0x206].copy_from_slice(b"HdrS");
        let both = Entries {
            pvh: true,
            pv: true,
        };
        assert_eq!(entries(&image).unwrap(), both);
    }
}
