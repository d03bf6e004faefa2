//! Kernel modules that a guest needs before its root is there.

use std::collections::HashMap;
use std::ffi::CString;
use std::fs::{self, File};

use rustix::io::Errno;
use rustix::system::{finit_module, uname};

use crate::console;
use crate::failure::words;

/// Made with the image: files in the order in which they load, one a line, parameters after them.
const LIST: &str = "/xbee/modules";
/// What is looked for in an initial RAM file system that does not say.
const WANTED: [&str; 10] = [
    "xen_evtchn",
    "xen_gntalloc",
    "xen_netfront",
    "xen_blkfront",
    "virtio_pci",
    "virtio_blk",
    "ext4",
    "vmw_vsock_virtio_transport",
    "virtio_rng",
    "virtio_net",
];
/// `xen` on Xen, not there elsewhere.
const HYPERVISOR: &str = "/sys/hypervisor/type";
/// What Xen's guests have no devices for, by how the names begin.
const NOT_ON_XEN: [&str; 5] = ["virtio", "vmw_vsock", "vsock", "net_failover", "failover"];
/// `MODULE_INIT_COMPRESSED_FILE`: the kernel decompresses, since Linux 5.17 and if so configured.
const COMPRESSED_FILE: i32 = 4;

/// Loads them. What fails is said on the console: the machine may do without.
pub(crate) fn load() {
    let on_xen = fs::read_to_string(HYPERVISOR).is_ok_and(|kind| kind.trim() == "xen");
    match fs::read_to_string(LIST) {
        Ok(list) => {
            for line in list
                .lines()
                .map(str::trim)
                .filter(|line| !line.is_empty() && !line.starts_with('#'))
            {
                let (path, parameters) = line.split_once(' ').unwrap_or((line, ""));
                if fits(path, on_xen) {
                    load_one(path, parameters);
                }
            }
        }
        Err(_) => load_wanted(on_xen),
    }
}

/// Whether there can be devices for a module here.
fn fits(path: &str, on_xen: bool) -> bool {
    let name = module_name(path);
    match on_xen {
        true => !NOT_ON_XEN.iter().any(|other| name.starts_with(other)),
        false => !name.starts_with("xen"),
    }
}

fn load_wanted(on_xen: bool) {
    let directory = format!("/lib/modules/{}", uname().release().to_string_lossy());
    // A kernel without modules has everything built in.
    let Ok(text) = fs::read_to_string(format!("{directory}/modules.dep")) else {
        return;
    };
    for path in order(&text, &WANTED)
        .into_iter()
        .filter(|path| fits(path, on_xen))
    {
        load_one(&format!("{directory}/{path}"), "");
    }
}

/// The files to load for the wanted modules, dependencies first, each once.
fn order<'a>(modules_dep: &'a str, wanted: &[&str]) -> Vec<&'a str> {
    let by_name: HashMap<String, (&str, &str)> = modules_dep
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(path, needs)| (module_name(path), (path, needs)))
        .collect();
    let mut files: Vec<&str> = Vec::new();
    for name in wanted {
        let Some((path, needs)) = by_name.get(*name) else {
            continue;
        };
        // `modules.dep(5)` names all of them, the last to be loaded first.
        for file in needs.split_whitespace().rev().chain([*path]) {
            if !files.contains(&file) {
                files.push(file);
            }
        }
    }
    files
}

fn module_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split(".ko").next().unwrap_or(file).replace('-', "_")
}

fn load_one(path: &str, parameters: &str) {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) => return console::log(&format!("cannot open module {path}: {error}")),
    };
    let Ok(parameters) = CString::new(parameters) else {
        return;
    };
    let compressed = !path.ends_with(".ko");
    let flags = if compressed { COMPRESSED_FILE } else { 0 };
    match finit_module(&file, &parameters, flags) {
        // It is loaded, or built in.
        Ok(()) | Err(Errno::EXIST) => {}
        Err(Errno::OPNOTSUPP | Errno::INVAL) if compressed => console::log(&format!(
            "cannot load module {path}: this kernel does not decompress modules; put it into the initramfs decompressed"
        )),
        Err(error) => console::log(&format!("cannot load module {path}: {}", words(error))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_hypervisor_has_no_devices_for_is_left_out() {
        for (path, on_xen, elsewhere) in [
            ("kernel/drivers/xen/xen-evtchn.ko", true, false),
            ("kernel/drivers/net/xen-netfront.ko.xz", true, false),
            ("kernel/drivers/virtio/virtio_ring.ko", false, true),
            ("kernel/net/vmw_vsock/vsock.ko", false, true),
            ("kernel/fs/overlayfs/overlay.ko", true, true),
        ] {
            assert_eq!(fits(path, true), on_xen, "{path} on Xen");
            assert_eq!(fits(path, false), elsewhere, "{path} elsewhere");
        }
    }

    #[test]
    fn dependencies_come_first_and_once() {
        let text = "kernel/fs/ext4/ext4.ko: kernel/lib/crc16.ko kernel/fs/mbcache.ko kernel/fs/jbd2/jbd2.ko\n\
                    kernel/drivers/virtio/virtio-pci.ko.xz: kernel/drivers/virtio/virtio.ko\n\
                    kernel/drivers/block/virtio_blk.ko: kernel/drivers/virtio/virtio.ko\n";
        assert_eq!(
            order(text, &["virtio_pci", "virtio_blk", "absent", "ext4"]),
            [
                "kernel/drivers/virtio/virtio.ko",
                "kernel/drivers/virtio/virtio-pci.ko.xz",
                "kernel/drivers/block/virtio_blk.ko",
                "kernel/fs/jbd2/jbd2.ko",
                "kernel/fs/mbcache.ko",
                "kernel/lib/crc16.ko",
                "kernel/fs/ext4/ext4.ko",
            ]
        );
    }
}
