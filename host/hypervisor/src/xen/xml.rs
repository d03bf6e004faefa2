//! A domain in libvirt's words (<https://libvirt.org/formatdomain.html>). Pure: the same inputs give
//! the same text. `xen-configs/` shows and explains what comes out.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use quick_xml::escape::escape;

use super::config::XenConfig;
use super::files::{self, Server};
use super::port::NO_SCRIPT;
use crate::domain::{Disk, DiskFormat, DomainId, DomainSpec, Interface};
use crate::error::Error;
use crate::image;
use crate::spec::DISKS_MAX;

/// Where the boot's configuration is if it is on a disk: the last that has a letter.
pub(crate) const BOOT_DISK_NAME: &str = "xvdz";

/// What libxl takes of a kernel's command line (Linux, `COMMAND_LINE_SIZE` of x86, less the NUL).
const KERNEL_ARGS_MAX_BYTES: usize = 2047;

pub(crate) const MIB: u64 = 1 << 20;

/// The name that Xen's and libvirt's tools show.
pub(crate) fn name(id: DomainId) -> String {
    format!("xbee-{}", &id.simple().to_string()[..8])
}

/// How Xen runs a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Hardware virtualization, and only devices that know Xen.
    Pvh,
    /// No hardware virtualization.
    Pv,
    /// As a PC with firmware, by a device model.
    Hvm,
}

impl Mode {
    /// How the domain's image can be run: in a PVH container if nothing is against it.
    ///
    /// # Errors
    /// [`Error::ImageUnreadable`] and [`Error::UnknownKernel`].
    pub(crate) fn of(spec: &DomainSpec, config: &XenConfig) -> Result<Self, Error> {
        let Some(path) = &spec.kernel else {
            return Ok(Self::Hvm);
        };
        let (_, entries) = image::look_at_kernel(path)?;
        let found = match (config.paravirtual, entries.pvh, entries.pv) {
            (false, true, _) => return Ok(Self::Pvh),
            (_, _, true) => return Ok(Self::Pv),
            (false, false, false) => "an ELF file with a note for neither PVH nor PV",
            (true, _, false) => {
                "an ELF file without a note for PV, which the configuration asks for"
            }
        };
        Err(image::unknown_kernel(path, found))
    }
}

/// The domain's description, for whoever wants to start it. `boot_file` and `disks` are the files that the guest
/// is to have as its initial RAM file system (without a kernel: as a further disk) and as its disks.
pub(crate) fn render(
    spec: &DomainSpec,
    mode: Mode,
    config: &XenConfig,
    boot_file: Option<&Path>,
    disks: &[PathBuf],
) -> Result<String, Error> {
    describe(spec, mode, config, boot_file, disks, None)
}

/// The description with which it is started here, where its interfaces are put on the bridge by [`super::port`].
pub(crate) fn render_to_start(
    spec: &DomainSpec,
    mode: Mode,
    config: &XenConfig,
    boot_file: Option<&Path>,
    disks: &[PathBuf],
) -> Result<String, Error> {
    describe(spec, mode, config, boot_file, disks, Some(NO_SCRIPT))
}

fn describe(
    spec: &DomainSpec,
    mode: Mode,
    config: &XenConfig,
    boot_file: Option<&Path>,
    disks: &[PathBuf],
    script: Option<&str>,
) -> Result<String, Error> {
    let os_type = match mode {
        Mode::Pvh => "xenpvh",
        Mode::Pv => "linux",
        Mode::Hvm => "hvm",
    };
    let memory_mib = spec.memory_bytes.div_ceil(MIB);
    let memory_max_mib = spec.memory_limit_bytes().div_ceil(MIB);
    let current_memory = match memory_mib == memory_max_mib {
        true => String::new(),
        false => format!("<currentMemory unit='MiB'>{memory_mib}</currentMemory>\n  "),
    };
    let mut xml = format!(
        "<domain type='xen'>\n  \
           <name>{name}</name>\n  \
           <uuid>{uuid}</uuid>\n  \
           <title>{title}</title>\n  \
           <memory unit='MiB'>{memory_max_mib}</memory>\n  \
           {current_memory}\
           <vcpu>{vcpus}</vcpu>\n  \
           <os>\n    \
             <type>{os_type}</type>\n",
        name = name(spec.id),
        uuid = spec.id,
        title = escape(spec.name.as_str()),
        memory_max_mib = memory_max_mib,
        // All there can be: those that it is not to have are switched off once it is there.
        vcpus = spec.vcpus_limit(),
    );
    let mut line = |text: String| {
        // Writing to a `String` does not fail.
        let _ = writeln!(xml, "{text}");
    };
    if let Some(kernel) = &spec.kernel {
        line(format!("    <kernel>{}</kernel>", path("kernel", kernel)?));
        if let Some(initramfs) = boot_file {
            line(format!(
                "    <initrd>{}</initrd>",
                path("run_dir", initramfs)?
            ));
        }
        let args = kernel_args(spec)?;
        line(format!("    <cmdline>{}</cmdline>", escape(args.as_str())));
    } else {
        line("    <boot dev='hd'/>".to_owned());
    }
    line("  </os>".to_owned());
    if mode == Mode::Hvm {
        line("  <features><acpi/><apic/><pae/></features>".to_owned());
    }
    // Not emulated: the guest reads the counter itself.
    line("  <clock offset='utc'><timer name='tsc' mode='native'/></clock>".to_owned());
    // A domain that switched itself off or crashed stays until its end has been seen; one that
    // asked for a reset goes. That is how they are told apart: libvirt calls both a shutdown.
    line("  <on_poweroff>preserve</on_poweroff>".to_owned());
    line("  <on_reboot>destroy</on_reboot>".to_owned());
    line("  <on_crash>preserve</on_crash>".to_owned());
    line("  <devices>".to_owned());
    for (index, (disk, source)) in spec.disks.iter().zip(disks).enumerate() {
        let xml = self::disk(spec, index, disk, source)?;
        line(indent(&xml));
    }
    if let (None, Some(boot_disk)) = (&spec.kernel, boot_file) {
        line(indent(&self::boot_disk(boot_disk)?));
    }
    if let Some(interface) = &spec.interface {
        line(indent(&self::interface(
            spec,
            interface,
            &config.bridge,
            script,
        )));
    }
    match mode {
        Mode::Pvh | Mode::Pv => {
            line("    <console type='pty'><target type='xen' port='0'/></console>".to_owned());
        }
        Mode::Hvm => {
            line("    <serial type='pty'><target port='0'/></serial>".to_owned());
            line("    <console type='pty'><target type='serial' port='0'/></console>".to_owned());
        }
    }
    line("  </devices>".to_owned());
    line("</domain>".to_owned());
    Ok(xml)
}

/// A disk.
pub(crate) fn disk(
    spec: &DomainSpec,
    index: usize,
    disk: &Disk,
    source: &Path,
) -> Result<String, Error> {
    let driver = match files::server(disk) {
        Server::Qemu => format!("name='qemu' type='{}'", DiskFormat::Qcow2),
        Server::Kernel => format!("name='phy' type='{}'", DiskFormat::Raw),
    };
    let mut xml = format!(
        "<disk type='file' device='disk'>\n  \
           <driver {driver}/>\n  \
           <source file='{source}'/>\n  \
           <target dev='{name}' bus='{bus}'/>\n",
        source = path("disks", source)?,
        name = disk_name(spec, index)?,
        bus = match is_emulated(spec, index) {
            true => "ide",
            false => "xen",
        },
    );
    if disk.read_only {
        xml.push_str("  <readonly/>\n");
    }
    xml.push_str("</disk>");
    Ok(xml)
}

/// The disk with the boot's configuration.
fn boot_disk(source: &Path) -> Result<String, Error> {
    Ok(format!(
        "<disk type='file' device='disk'>\n  \
           <driver name='phy' type='raw'/>\n  \
           <source file='{source}'/>\n  \
           <target dev='{BOOT_DISK_NAME}' bus='xen'/>\n  \
           <readonly/>\n\
         </disk>",
        source = path("run_dir", source)?,
    ))
}

/// A network interface. `script` is run in place of the one that puts it on the bridge.
pub(crate) fn interface(
    spec: &DomainSpec,
    interface: &Interface,
    bridge: &str,
    script: Option<&str>,
) -> String {
    // The device model's card would be a second port of the bridge, which the firewall does not know.
    let model = match spec.kernel {
        Some(_) => "",
        None => "  <model type='netfront'/>\n",
    };
    format!(
        "<interface type='bridge'>\n  \
           <mac address='{}'/>\n  \
           <source bridge='{}'/>\n\
         {script}{model}</interface>",
        mac(interface),
        escape(bridge),
        script = script.map_or_else(String::new, |path| format!("  <script path='{path}'/>\n")),
    )
}

/// A hardware address as libvirt writes it.
pub(crate) fn mac(interface: &Interface) -> String {
    interface.mac.map(|byte| format!("{byte:02x}")).join(":")
}

fn indent(xml: &str) -> String {
    let lines = xml.lines().map(|line| format!("    {line}"));
    lines.collect::<Vec<_>>().join("\n")
}

/// Whether the device model emulates the disk until the guest's own driver takes over: firmware
/// knows no other.
pub(crate) fn is_emulated(spec: &DomainSpec, index: usize) -> bool {
    spec.kernel.is_none() && index == 0
}

/// `xvda` to `xvdz`; `hda` is what an emulated `xvda` is called.
pub(crate) fn disk_name(spec: &DomainSpec, index: usize) -> Result<String, Error> {
    if is_emulated(spec, index) {
        return Ok("hda".to_owned());
    }
    let letter = u8::try_from(index)
        .ok()
        .and_then(|index| b'a'.checked_add(index))
        .filter(u8::is_ascii_lowercase);
    match letter {
        Some(letter) => Ok(format!("xvd{}", char::from(letter))),
        None => Err(Error::InvalidSpec {
            field: "disks",
            detail: format!("more than {DISKS_MAX}"),
        }),
    }
}

/// The number that Xen has for `xvda` and so on (Xen, docs/man/xen-vbd-interface.7).
pub(crate) fn disk_number(index: usize) -> usize {
    match index < 16 {
        true => 202 << 8 | index << 4,
        false => 1 << 28 | index << 8,
    }
}

/// The kernel's command line: what shortens the boot, then the caller's, which wins.
pub(crate) fn kernel_args(spec: &DomainSpec) -> Result<String, Error> {
    let ours = [
        "console=hvc0",
        "quiet",
        "random.trust_cpu=1",
        "mitigations=off",
        "cryptomgr.notests",
    ];
    let all: Vec<&str> = ours
        .into_iter()
        .chain(spec.kernel_args.iter().map(String::as_str))
        .collect();
    let line = all.join(" ");
    if line.len() > KERNEL_ARGS_MAX_BYTES {
        return Err(Error::InvalidSpec {
            field: "kernel_args",
            detail: format!(
                "{} bytes with those XenBEE adds, a kernel takes {KERNEL_ARGS_MAX_BYTES}",
                line.len()
            ),
        });
    }
    Ok(line)
}

fn path(field: &'static str, path: &Path) -> Result<String, Error> {
    text(field, path).map(|text| escape(text).into_owned())
}

/// A path as text.
pub(crate) fn text<'a>(field: &'static str, path: &'a Path) -> Result<&'a str, Error> {
    match path.to_str() {
        Some(text) if !text.chars().any(char::is_control) => Ok(text),
        _ => Err(Error::InvalidSpec {
            field,
            detail: format!("{path:?}: libvirt takes no path that is not text"),
        }),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::path::Path;

    use super::*;

    /// What the files in `xen-configs/` show.
    pub(crate) fn example() -> DomainSpec {
        let id: DomainId = "7bf4280f-fe99-4e19-829e-6705512a33dd".parse().unwrap();
        let disk = |image: &str, format, read_only| Disk {
            image: image.into(),
            format,
            read_only,
        };
        DomainSpec {
            id,
            name: "xbee-7bf4280f".to_owned(),
            owner: "1000".to_owned(),
            vcpus: 1,
            vcpus_max: None,
            memory_bytes: 192 * MIB,
            memory_max_bytes: None,
            kernel: Some("/var/lib/xbee/images/kernel/vmlinux".into()),
            initramfs: None,
            kernel_args: vec!["xbee.note=a<b".to_owned()],
            disks: vec![
                disk("/var/lib/xbee/images/root.qcow2", DiskFormat::Qcow2, false),
                disk("/var/lib/xbee/data.img", DiskFormat::Raw, false),
            ],
            cid: 5,
            interface: Some(Interface {
                mac: [0x02, 0xbe, 0, 0, 0, 5],
                address: "fd00:1:2:3::5".parse().unwrap(),
                peers: false,
            }),
            boot_config: Vec::new(),
            run_dir: format!("/var/lib/xbee/run/{id}").into(),
        }
    }

    fn rendered(spec: &DomainSpec, config: &XenConfig) -> Result<String, Error> {
        let mode = mode(spec);
        let dir = crate::rundir::RunDir::named(&config.domains_dir, spec.id);
        let boot_file = dir.path(match spec.kernel {
            Some(_) => crate::rundir::INITRAMFS,
            None => crate::rundir::BOOT_DISK,
        });
        render(
            spec,
            mode,
            config,
            Some(&boot_file),
            &files::sources(spec, &dir),
        )
    }

    /// The same with a boot loader of its own.
    pub(crate) fn without_kernel() -> DomainSpec {
        DomainSpec {
            kernel: None,
            kernel_args: Vec::new(),
            ..example()
        }
    }

    /// How they are run.
    pub(crate) fn mode(spec: &DomainSpec) -> Mode {
        match spec.kernel {
            Some(_) => Mode::Pvh,
            None => Mode::Hvm,
        }
    }

    /// Compares with a file of `xen-configs/`.
    pub(crate) fn assert_shown(name: &str, text: &str) {
        let path = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../../xen-configs")
            .join(name);
        if std::env::var_os("XBEE_ACCEPT").is_some() {
            std::fs::write(&path, text).unwrap();
        }
        assert_eq!(
            text,
            std::fs::read_to_string(&path).unwrap(),
            "accept with XBEE_ACCEPT=1"
        );
    }

    #[test]
    fn the_examples_are_what_is_rendered() {
        let config = XenConfig::new("/var/lib/xbee/run".into());
        for (spec, name) in [
            (example(), "domain.xml"),
            (without_kernel(), "domain-hvm.xml"),
        ] {
            assert_shown(name, &rendered(&spec, &config).unwrap());
        }
    }

    #[test]
    fn what_cannot_be_described_is_refused() {
        let config = XenConfig::new("/var/lib/xbee/run".into());
        let field = |change: &dyn Fn(&mut DomainSpec)| {
            let mut spec = example();
            change(&mut spec);
            match rendered(&spec, &config) {
                Err(Error::InvalidSpec { field, .. }) => field,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(field(&|spec| spec.kernel = Some("/a\nb".into())), "kernel");
        assert_eq!(
            field(&|spec| spec.disks = vec![spec.disks[0].clone(); 27]),
            "disks"
        );
        assert_eq!(
            field(&|spec| spec.kernel_args = vec!["a".repeat(2000)]),
            "kernel_args"
        );
    }

    #[test]
    fn disks_are_numbered_and_what_can_be_had_later_is_there() {
        let disk = |read_only, format| Disk {
            image: "/base.img".into(),
            format,
            read_only,
        };
        let read_only = disk(true, DiskFormat::Raw);
        let xml = self::disk(&example(), 3, &read_only, &read_only.image).unwrap();
        assert!(
            xml.contains("name='phy' type='raw'")
                && xml.contains("dev='xvdd'")
                && xml.contains("<readonly/>"),
            "{xml}"
        );
        assert_eq!(
            [disk_number(0), disk_number(3), disk_number(16)],
            [51712, 51760, 268_439_552]
        );
        let mut spec = example();
        spec.memory_max_bytes = Some(256 * MIB);
        spec.vcpus_max = Some(4);
        let xml = rendered(&spec, &XenConfig::new("/var/lib/xbee/run".into())).unwrap();
        for part in [
            "<memory unit='MiB'>256</memory>",
            "<currentMemory unit='MiB'>192</currentMemory>",
            "<vcpu>4</vcpu>",
        ] {
            assert!(xml.contains(part), "{part}: {xml}");
        }
    }

    #[test]
    fn names_are_escaped_and_guests_can_be_paravirtual() {
        let mut spec = example();
        spec.name = "<&'\">".to_owned();
        let config = XenConfig::new("/var/lib/xbee/run".into());
        let xml = render(&spec, Mode::Pv, &config, None, &[]).unwrap();
        assert!(
            xml.contains("<title>&lt;&amp;&apos;&quot;&gt;</title>"),
            "{xml}"
        );
        assert!(xml.contains("<type>linux</type>"), "{xml}");
    }

    #[test]
    fn how_a_guest_is_run_is_its_kernels_and_the_configurations_affair() {
        let dir = tempfile::tempdir().unwrap();
        let mut config = XenConfig::new("/var/lib/xbee/run".into());
        let (pvh, pv) = (18, 1);
        for (paravirtual, notes, expected) in [
            (false, &[pvh, pv][..], Ok(Mode::Pvh)),
            (false, &[pvh][..], Ok(Mode::Pvh)),
            (false, &[pv][..], Ok(Mode::Pv)),
            (true, &[pvh, pv][..], Ok(Mode::Pv)),
            (true, &[pv][..], Ok(Mode::Pv)),
            (
                false,
                &[][..],
                Err("an ELF file with a note for neither PVH nor PV"),
            ),
            (
                true,
                &[pvh][..],
                Err("an ELF file without a note for PV, which the configuration asks for"),
            ),
        ] {
            let path = dir.path().join("kernel");
            std::fs::write(&path, image::tests::kernel_with(notes)).unwrap();
            config.paravirtual = paravirtual;
            let mut spec = example();
            spec.kernel = Some(path);
            match (Mode::of(&spec, &config), expected) {
                (Ok(mode), expected) => assert_eq!(Ok(mode), expected, "{notes:?}"),
                (Err(Error::UnknownKernel { found, .. }), expected) => {
                    assert_eq!(Err(found.as_str()), expected);
                }
                (Err(other), _) => panic!("{other}"),
            }
            spec.kernel = None;
            assert_eq!(Mode::of(&spec, &config).unwrap(), Mode::Hvm);
        }
    }
}
