//! A domain in the words of `xl` (xl.cfg(5)), for people: the same domain that [`super::xml`] describes to
//! libvirt. Pure; `xen-configs/domain.cfg` shows what comes out.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use super::config::XenConfig;
use super::files::{self, Server};
use super::xml::{MIB, disk_name, kernel_args, name, text};
use crate::domain::{DiskFormat, DomainSpec};
use crate::error::Error;

/// The domain's description. `initramfs` and `disks` are as for [`super::xml::render`].
pub(crate) fn render(
    spec: &DomainSpec,
    config: &XenConfig,
    initramfs: Option<&Path>,
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
        string(if config.paravirtual { "pv" } else { "pvh" }),
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
    line("kernel", string(text("kernel", &spec.kernel)?));
    if let Some(initramfs) = initramfs {
        line("ramdisk", string(text("run_dir", initramfs)?));
    }
    line("cmdline", string(&kernel_args(spec)?));
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
                disk_name(index)?,
                if disk.read_only { "ro" } else { "rw" },
                text("disks", source)?
            );
            let _ = writeln!(list, "    {},", string(&disk));
        }
        line("disk", format!("[\n{list}]"));
    }
    if let Some(interface) = &spec.interface {
        let mac = interface.mac.map(|byte| format!("{byte:02x}")).join(":");
        let vif = format!("mac={mac},bridge={}", config.bridge);
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
    use crate::xen::xml::tests::example;

    fn rendered(spec: &DomainSpec, config: &XenConfig) -> Result<String, Error> {
        let dir = RunDir::named(&config.domains_dir, spec.id);
        let initramfs = dir.path(crate::rundir::INITRAMFS);
        render(spec, config, Some(&initramfs), &files::sources(spec, &dir))
    }

    #[test]
    fn the_example_is_what_is_rendered() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../xen-configs/domain.cfg");
        let cfg = rendered(&example(), &XenConfig::new("/var/lib/xbee/run".into())).unwrap();
        if std::env::var_os("XBEE_ACCEPT").is_some() {
            std::fs::write(&path, &cfg).unwrap();
        }
        assert_eq!(
            cfg,
            std::fs::read_to_string(&path).unwrap(),
            "accept with XBEE_ACCEPT=1"
        );
    }

    #[test]
    fn strings_are_quoted_and_guests_can_be_paravirtual() {
        let mut spec = example();
        spec.kernel_args = vec![r#"dyndbg="a\b""#.to_owned()];
        let mut config = XenConfig::new("/var/lib/xbee/run".into());
        config.paravirtual = true;
        let cfg = rendered(&spec, &config).unwrap();
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
