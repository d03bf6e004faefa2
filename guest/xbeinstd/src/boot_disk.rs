//! The boot configuration of a guest that its own boot loader has booted: no initial RAM file system
//! brings it, but a small disk, whose content is the same archive.

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;
use std::time::{Duration, Instant};

use xbee_protocol::BOOT_CONFIG_PATH;

const BLOCK_DEVICES: &str = "/sys/class/block";
const DEVICES: &str = "/dev";
/// How the names of disks begin that it can be: virtio's, Xen's, SCSI's. A look at others can take long.
const KINDS: [&str; 3] = ["vd", "xvd", "sd"];
/// The image's init may start the agent before it has loaded the disk's driver.
const LIMIT: Duration = Duration::from_secs(10);
const INTERVAL: Duration = Duration::from_millis(50);

/// How much of a disk is looked at.
const MAX_BYTES: u64 = 64 * 1024;
/// Entries of the archive: the directory, the file, the end.
const ENTRIES_MAX: usize = 4;

/// Waits for the disk and returns the configuration that is on it.
pub(crate) fn read() -> Result<Vec<u8>, String> {
    let deadline = Instant::now() + LIMIT;
    loop {
        if let Some(config) = find(Path::new(BLOCK_DEVICES), Path::new(DEVICES)) {
            return Ok(config);
        }
        if Instant::now() >= deadline {
            return Err(format!(
                "after {} s none of the disks in {BLOCK_DEVICES} holds a boot configuration",
                LIMIT.as_secs()
            ));
        }
        std::thread::sleep(INTERVAL);
    }
}

/// The configuration on the first disk that has one.
fn find(block_devices: &Path, devices: &Path) -> Option<Vec<u8>> {
    let mut names: Vec<String> = fs::read_dir(block_devices)
        .ok()?
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| KINDS.iter().any(|kind| name.starts_with(kind)))
        .filter(|name| !block_devices.join(name).join("partition").exists())
        .collect();
    names.sort();
    names.into_iter().find_map(|name| {
        let mut head = Vec::new();
        // One that cannot be read is none.
        File::open(devices.join(name))
            .and_then(|file| file.take(MAX_BYTES).read_to_end(&mut head))
            .ok()?;
        config(&head).map(<[u8]>::to_vec)
    })
}

/// The content of the configuration's file in a newc archive (Linux,
/// Documentation/driver-api/early-userspace/buffer-format.rst).
fn config(mut archive: &[u8]) -> Option<&[u8]> {
    const HEADER_BYTES: usize = 110;
    const SIZE_AT: usize = 54;
    const NAME_SIZE_AT: usize = 94;
    let wanted = BOOT_CONFIG_PATH.trim_start_matches('/').as_bytes();
    for _ in 0..ENTRIES_MAX {
        if !archive.starts_with(b"070701") {
            return None;
        }
        let number = |at: usize| {
            let digits = std::str::from_utf8(archive.get(at..at + 8)?).ok()?;
            usize::try_from(u32::from_str_radix(digits, 16).ok()?).ok()
        };
        let (size, name_size) = (number(SIZE_AT)?, number(NAME_SIZE_AT)?);
        let name_end = HEADER_BYTES.checked_add(name_size)?;
        let name = archive.get(HEADER_BYTES..name_end)?;
        let begin = name_end.next_multiple_of(4);
        let content = archive.get(begin..begin.checked_add(size)?)?;
        if name.strip_suffix(b"\0") == Some(wanted) {
            return Some(content);
        }
        archive = archive.get((begin + size).next_multiple_of(4)..)?;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(archive: &mut Vec<u8>, name: &str, content: &[u8]) {
        archive.extend_from_slice(b"070701");
        let sizes = [(6, content.len()), (11, name.len() + 1)];
        for field in 0..13 {
            let value = sizes.iter().find(|(at, _)| *at == field);
            archive.extend_from_slice(format!("{:08x}", value.map_or(0, |(_, n)| *n)).as_bytes());
        }
        archive.extend_from_slice(name.as_bytes());
        archive.push(0);
        archive.resize(archive.len().next_multiple_of(4), 0);
        archive.extend_from_slice(content);
        archive.resize(archive.len().next_multiple_of(4), 0);
    }

    fn archive() -> Vec<u8> {
        let mut archive = Vec::new();
        entry(&mut archive, "xbee", b"");
        entry(&mut archive, "xbee/boot", b"secret");
        entry(&mut archive, "TRAILER!!!", b"");
        archive.resize(archive.len().next_multiple_of(512), 0);
        archive
    }

    #[test]
    fn the_file_is_found_in_the_archive_and_nothing_else() {
        let whole = archive();
        assert_eq!(config(&whole), Some(&b"secret"[..]));
        // Cut off anywhere, it is none.
        let end = whole
            .windows(6)
            .position(|bytes| bytes == b"secret")
            .unwrap()
            + 6;
        for len in 0..end {
            assert_eq!(config(&whole[..len]), None, "{len}");
        }
        for (at, bytes) in [
            (0, "070702"),
            (94, "ffffffff"),
            (54, "ffffffff"),
            (54, "zzzzzzzz"),
        ] {
            let mut wrong = whole.clone();
            wrong[at..at + bytes.len()].copy_from_slice(bytes.as_bytes());
            assert_eq!(config(&wrong), None, "{bytes} at {at}");
        }
        let mut many = Vec::new();
        for _ in 0..ENTRIES_MAX {
            entry(&mut many, "other", b"");
        }
        entry(&mut many, "xbee/boot", b"secret");
        assert_eq!(config(&many), None);
    }

    #[test]
    fn the_disk_is_found_among_others() {
        let dir = tempfile::tempdir().unwrap();
        let (sys, dev) = (dir.path().join("sys"), dir.path().join("dev"));
        fs::create_dir(&dev).unwrap();
        let device = |name: &str, content: &[u8]| {
            fs::create_dir_all(sys.join(name)).unwrap();
            fs::write(dev.join(name), content).unwrap();
        };
        device("vda", &[0; 4096]);
        device("vda1", &archive());
        fs::write(sys.join("vda1/partition"), "1").unwrap();
        device("loop0", &archive());
        fs::create_dir_all(sys.join("vdb")).unwrap();
        assert_eq!(find(&sys, &dev), None);
        device("xvdz", &archive());
        assert_eq!(find(&sys, &dev).unwrap(), b"secret");
    }
}
