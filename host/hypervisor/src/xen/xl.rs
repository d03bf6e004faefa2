//! A domain in the words of `xl` (xl.cfg(5)), for people: the same domain that [`super::xml`] describes to
//! libvirt. Pure; `xen-configs/domain.cfg` shows what comes out.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use super::config::XenConfig;
use super::files::{self, Server};
use super::xml::{BOOT_DISK_NAME, MIB, Mode, disk_name, kernel_args, name, text};
use crate::domain::{DiskFormat, DomainSpec};
use crate::error::Error;

/// The domain's description. `boot_file` and `disks` are as for [`super::xml::render`].
pub(crate) fn render(
    spec: &DomainSpec,
    mode: Mode,
    config: &XenConfig,
    boot_file: Option<&Path>,
    disks: &[PathBuf],
) -> Result<String, Error> {
    let mut cfg = String::new();
    let mut line = |key: &str, value: String| {
        // Writing to a `String` does not fail.
        let _ = writeln!(cfg, "{key} = {value}");
    };
    line("name", string(&name(spec.id)));
    line("uuid", string(&spec.id.to_string()));
    line(
        "type",
        string(match mode {
            Mode::Pvh => "pvh",
            Mode::Pv => "pv",
            Mode::Hvm => "hvm",
        }),
    );
    line("memory", spec.memory_bytes.div_ceil(MIB).to_string());
    if spec.memory_limit_bytes() != spec.memory_bytes {
        line(
            "maxmem",
            spec.memory_limit_bytes().div_ceil(MIB).to_string(),
        );
    }
    line("vcpus", spec.vcpus.to_string());
    if spec.vcpus_limit() != spec.vcpus {
        line("maxvcpus", spec.vcpus_limit().to_string());
    }
    if let Some(kernel) = &spec.kernel {
        line("kernel", string(text("kernel", kernel)?));
        if let Some(initramfs) = boot_file {
            line("ramdisk", string(text("run_dir", initramfs)?));
        }
        line("cmdline", string(&kernel_args(spec)?));
    } else {
        line("boot", string("c"));
        line("serial", string("pty"));
        line("vga", string("none"));
        line("vnc", "0".to_owned());
    }
    line("tsc_mode", string("native"));
    line("on_poweroff", string("preserve"));
    line("on_reboot", string("destroy"));
    line("on_crash", string("preserve"));
    if !disks.is_empty() {
        let mut list = String::new();
        for (index, (disk, source)) in spec.disks.iter().zip(disks).enumerate() {
            let (format, back_end) = match files::server(disk) {
                Server::Qemu => (DiskFormat::Qcow2, "qdisk"),
                Server::Kernel => (DiskFormat::Raw, "phy"),
            };
            // The target comes last: whatever is in its name belongs to it.
            let disk = format!(
                "format={format},vdev={},access={},backendtype={back_end},target={}",
                disk_name(spec, index)?,
                if disk.read_only { "ro" } else { "rw" },
                text("disks", source)?
            );
            let _ = writeln!(list, "    {},", string(&disk));
        }
        if let (None, Some(boot_disk)) = (&spec.kernel, boot_file) {
            let disk = format!(
                "format=raw,vdev={BOOT_DISK_NAME},access=ro,backendtype=phy,target={}",
                text("run_dir", boot_disk)?
            );
            let _ = writeln!(list, "    {},", string(&disk));
        }
        line("disk", format!("[\n{list}]"));
    }
    if let Some(interface) = &spec.interface {
        let mac = interface.mac.map(|byte| format!("{byte:02x}")).join(":");
        let mut vif = format!("mac={mac},bridge={}", config.bridge);
        if mode == Mode::Hvm {
            vif.push_str(",type=vif");
        }
        line("vif", format!("[{}]", string(&vif)));
    }
    Ok(cfg)
}

/// A string of xl's.
fn string(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', r"\\").replace('"', "\\\""))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rundir::RunDir;
    use crate::rundir::{BOOT_DISK, INITRAMFS};
    use crate::xen::xml::tests::{assert_shown, example, mode, without_kernel};

    fn rendered(spec: &DomainSpec, config: &XenConfig) -> Result<String, Error> {
        let dir = RunDir::named(&config.domains_dir, spec.id);
        let boot_file = dir.path(match spec.kernel {
            Some(_) => INITRAMFS,
            None => BOOT_DISK,
        });
        render(
            spec,
            mode(spec),
            config,
            Some(&boot_file),
            &files::sources(spec, &dir),
        )
    }

    #[test]
    fn the_examples_are_what_is_rendered() {
        let config = XenConfig::new("/var/lib/xbee/run".into());
        for (spec, name) in [
            (example(), "domain.cfg"),
            (without_kernel(), "domain-hvm.cfg"),
        ] {
            assert_shown(name, &rendered(&spec, &config).unwrap());
        }
    }

    #[test]
    fn strings_are_quoted_and_guests_can_be_paravirtual() {
        let mut spec = example();
        spec.kernel_args = vec![r#"dyndbg="a\b""#.to_owned()];
        let config = XenConfig::new("/var/lib/xbee/run".into());
        let cfg = render(&spec, Mode::Pv, &config, None, &[]).unwrap();
        assert!(cfg.contains(r#" dyndbg=\"a\\b\"""#), "{cfg}");
        assert!(cfg.contains("type = \"pv\""), "{cfg}");
    }

    #[test]
    fn what_is_not_there_can_be_made() {
        let mut spec = example();
        spec.disks[0].image = "/a b/it's.img".into();
        let overlays = files::sources_to_be(&spec);
        assert_eq!(
            files::commands(&spec, &overlays).unwrap(),
            [
                r"qemu-img create -f qcow2 -F qcow2 -b '/a b/it'\''s.img' /var/tmp/xbee-7bf4280f-disk0.qcow2",
                "qemu-img create -f qcow2 -F raw -b '/var/lib/xbee/data.img' /var/tmp/xbee-7bf4280f-disk1.qcow2",
            ]
        );
    }
}
