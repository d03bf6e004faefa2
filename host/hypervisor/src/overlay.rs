//! Writes an empty qcow2 overlay (QEMU, docs/interop/qcow2.txt).
//!
//! `qemu-img` need not be installed, and what the header refers to is decided here alone.

use std::io::{self, Write};
use std::path::Path;

use crate::domain::DiskFormat;

const CLUSTER_BITS: u32 = 16;
const CLUSTER_BYTES: u64 = 1 << CLUSTER_BITS;
const VERSION: u32 = 3;
const HEADER_BYTES: u32 = 104;
/// Reference counts of 16 bits, as QEMU's own default.
const REFCOUNT_ORDER: u32 = 4;

/// Largest disk, in bytes: beyond it the first-level table is larger than QEMU takes (32 MiB).
pub(crate) const DISK_MAX_BYTES: u64 = (32 << 20) / 8 * (CLUSTER_BYTES / 8) * CLUSTER_BYTES;

/// Header extension that holds the backing file's format.
const BACKING_FORMAT: u32 = 0xe279_2aca;

/// Longest name of a backing file in a header, in bytes.
const BACKING_MAX_BYTES: usize = 1023;

/// The base an overlay names.
#[derive(Debug)]
pub(crate) struct Backing {
    name: String,
    format: DiskFormat,
}

impl Backing {
    /// The base at `path`. It is named such that QEMU opens no other file for it, whatever the
    /// base's own header says by then. `None`: the path does not fit, or is not text.
    #[cfg_attr(
        not(feature = "xen"),
        expect(dead_code, reason = "QEMU gets its bases by descriptor")
    )]
    pub(crate) fn new(path: &Path, format: DiskFormat) -> Option<Self> {
        let mut name = serde_json::json!({
            "driver": format.to_string(),
            "file": { "driver": "file", "filename": path.to_str()? },
        });
        if format == DiskFormat::Qcow2 {
            name["backing"] = serde_json::Value::Null;
        }
        let name = format!("json:{name}");
        (name.len() <= BACKING_MAX_BYTES).then_some(Self { name, format })
    }
}

/// Writes an overlay of a disk of `virtual_size_bytes`, all of it unallocated. The caller has
/// checked the size against [`DISK_MAX_BYTES`].
pub(crate) fn write(
    out: &mut impl Write,
    virtual_size_bytes: u64,
    backing: Option<&Backing>,
) -> io::Result<()> {
    let extensions = extensions(backing);
    let name = backing.map_or("", |backing| &backing.name);
    let name_at = match backing {
        Some(_) => HEADER_BYTES as usize + extensions.len(),
        None => 0,
    };
    // Clusters: header, reference count table, one reference count block, first-level table.
    let l1_entries = virtual_size_bytes.div_ceil(CLUSTER_BYTES * (CLUSTER_BYTES / 8));
    let l1_clusters = (l1_entries * 8).div_ceil(CLUSTER_BYTES).max(1);
    let clusters = 3 + l1_clusters;

    let mut header = Vec::new();
    header.extend_from_slice(b"QFI\xfb");
    header.extend_from_slice(&VERSION.to_be_bytes());
    header.extend_from_slice(&(name_at as u64).to_be_bytes()); // backing file: 0 is none
    header.extend_from_slice(&(name.len() as u32).to_be_bytes());
    header.extend_from_slice(&CLUSTER_BITS.to_be_bytes());
    header.extend_from_slice(&virtual_size_bytes.to_be_bytes());
    header.extend_from_slice(&0u32.to_be_bytes()); // encryption: none
    header.extend_from_slice(
        &u32::try_from(l1_entries)
            .map_err(io::Error::other)?
            .to_be_bytes(),
    );
    header.extend_from_slice(&(3 * CLUSTER_BYTES).to_be_bytes()); // first-level table
    header.extend_from_slice(&CLUSTER_BYTES.to_be_bytes()); // reference count table
    header.extend_from_slice(&1u32.to_be_bytes()); // its clusters
    header.extend_from_slice(&0u32.to_be_bytes()); // snapshots
    header.extend_from_slice(&0u64.to_be_bytes()); // snapshot table
    header.extend_from_slice(&0u64.to_be_bytes()); // incompatible features
    header.extend_from_slice(&0u64.to_be_bytes()); // compatible features
    header.extend_from_slice(&0u64.to_be_bytes()); // auto-clear features
    header.extend_from_slice(&REFCOUNT_ORDER.to_be_bytes());
    header.extend_from_slice(&HEADER_BYTES.to_be_bytes());
    header.extend_from_slice(&extensions);
    header.extend_from_slice(name.as_bytes());
    out.write_all(&cluster(&header))?;

    out.write_all(&cluster(&(2 * CLUSTER_BYTES).to_be_bytes()))?;
    let counts: Vec<u8> = (0..clusters).flat_map(|_| 1u16.to_be_bytes()).collect();
    out.write_all(&cluster(&counts))?;
    for _ in 0..l1_clusters {
        out.write_all(&cluster(&[]))?;
    }
    out.flush()
}

fn extensions(backing: Option<&Backing>) -> Vec<u8> {
    let mut extensions = Vec::new();
    if let Some(backing) = backing {
        let format = backing.format.to_string();
        extensions.extend_from_slice(&BACKING_FORMAT.to_be_bytes());
        extensions.extend_from_slice(&(format.len() as u32).to_be_bytes());
        extensions.extend_from_slice(format.as_bytes());
        extensions.resize(extensions.len().next_multiple_of(8), 0);
        // The end of the list.
        extensions.extend_from_slice(&[0; 8]);
    }
    extensions
}

fn cluster(content: &[u8]) -> Vec<u8> {
    let mut cluster = content.to_vec();
    cluster.resize(CLUSTER_BYTES as usize, 0);
    cluster
}

#[cfg(test)]
mod tests {
    use super::*;

    /// QEMU's own check is in the contract suite, where a guest reads and writes an overlay.
    #[test]
    fn tables_are_where_the_header_says() {
        for size in [512, 10 << 30, DISK_MAX_BYTES] {
            let mut image = Vec::new();
            write(&mut image, size, None).unwrap();
            let number = |at: usize, len: usize| {
                image[at..at + len]
                    .iter()
                    .fold(0u64, |n, b| n << 8 | u64::from(*b))
            };
            assert_eq!(number(24, 8), size);
            let (l1_at, l1_entries) = (number(40, 8), number(36, 4));
            assert!(l1_entries * CLUSTER_BYTES * (CLUSTER_BYTES / 8) >= size);
            assert!(l1_at + l1_entries * 8 <= image.len() as u64);
            let block_at = number(number(48, 8) as usize, 8) as usize;
            let clusters = image.len() / CLUSTER_BYTES as usize;
            for index in 0..clusters {
                assert_eq!(
                    number(block_at + index * 2, 2),
                    1,
                    "cluster {index} of {size}"
                );
            }
            assert_eq!(number(block_at + clusters * 2, 2), 0);
        }
    }

    /// That QEMU takes it is shown with a Xen domain, which reads and writes such a disk.
    #[cfg(feature = "xen")]
    #[test]
    fn a_base_is_named_with_its_format_and_nothing_behind_it() {
        let backing = Backing::new(Path::new("/a \"b\".img"), DiskFormat::Qcow2).unwrap();
        let mut image = Vec::new();
        write(&mut image, 1 << 30, Some(&backing)).unwrap();
        let number = |at: usize, len: usize| {
            image[at..at + len]
                .iter()
                .fold(0usize, |n, b| n << 8 | usize::from(*b))
        };
        assert_eq!((number(104, 4), number(108, 4)), (0xe279_2aca, 5));
        assert_eq!(&image[112..117], b"qcow2");
        // The list of extensions ends before the name begins.
        assert_eq!((number(120, 8), number(8, 8)), (0, 128));
        let name = std::str::from_utf8(&image[128..128 + number(16, 4)]).unwrap();
        assert_eq!(
            name,
            r#"json:{"backing":null,"driver":"qcow2","file":{"driver":"file","filename":"/a \"b\".img"}}"#
        );
        let long = "x".repeat(1000);
        assert!(Backing::new(Path::new(&long), DiskFormat::Raw).is_none());
    }
}
