//! QEMU's command line. Pure: the same inputs give the same arguments.

use std::ffi::OsString;
use std::os::fd::RawFd;

use serde_json::{Value, json};

use super::host::Host;
use super::{card, files};
use crate::domain::{Disk, DiskFormat, DomainSpec};
use crate::error::Error;
use crate::rundir;

/// What the kernel takes of its command line (Linux, `COMMAND_LINE_SIZE` of x86, less the NUL).
const KERNEL_ARGS_MAX_BYTES: usize = 2047;

const MIB: u64 = 1 << 20;

/// The bus for what is added to a running domain.
pub(crate) const PLUG_BUS: &str = "plug";

/// Files handed over by descriptor, with the numbers they have in the new process.
#[derive(Debug)]
pub(crate) struct Descriptors {
    pub(crate) qmp_listener: RawFd,
    /// Connected to the vsock switch.
    pub(crate) vhost: RawFd,
    pub(crate) kernel: Option<RawFd>,
    /// In the order of the domain's disks.
    pub(crate) disks: Vec<DiskDescriptors>,
    /// Connection of its network card, if it has one, and where to.
    pub(crate) card: Option<(card::Side, RawFd)>,
}

/// The files of a disk.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DiskDescriptors {
    pub(crate) base: RawFd,
    /// `None`: the disk is not written to.
    pub(crate) overlay: Option<RawFd>,
}

/// The set of descriptors in which QEMU finds the base of a disk.
pub(crate) fn base_set(index: usize) -> usize {
    2 * index
}

/// And its overlay.
pub(crate) fn overlay_set(index: usize) -> usize {
    2 * index + 1
}

/// The arguments for one domain. Paths are relative to its run directory, which is the process's
/// working directory: it needs no access to what lies above. `has_boot_file`: there is an initial
/// RAM file system or, without a kernel, the disk in its place.
pub(crate) fn args(
    spec: &DomainSpec,
    host: &Host,
    fds: &Descriptors,
    has_boot_file: bool,
) -> Result<Vec<OsString>, Error> {
    let mut args = Args::default();
    let memory_mib = spec.memory_limit_bytes().div_ceil(MIB);

    args.option(
        "-name",
        format!("guest={},debug-threads=on", escape(&spec.name)),
    );
    args.option("-uuid", spec.id.to_string());
    args.flag("-nodefaults");
    args.flag("-no-user-config");
    args.option("-display", "none");
    args.option(
        "-sandbox",
        "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
    );
    // A domain that ended stays, halted, until its end has been seen: the reason must not be lost
    // when it happens while nobody is connected.
    args.option("-action", "reboot=shutdown,shutdown=pause,panic=pause");

    args.option(
        "-machine",
        "q35,memory-backend=mem,smm=off,sata=off,smbus=off,i8042=off,vmport=off,hpet=off",
    );
    match host.kvm {
        Some(_) => {
            args.option("-accel", "kvm");
            args.option("-cpu", "host");
        }
        None => {
            // The translation cache is part of each domain's footprint. 128 MiB hold a Linux boot
            // several times over.
            args.option("-accel", "tcg,thread=multi,tb-size=128");
            // Distributions build for x86-64-v2 and v3, which the default CPU model is not.
            args.option("-cpu", "max,la57=off");
        }
    }
    args.option(
        "-smp",
        format!("cpus={},maxcpus={}", spec.vcpus, spec.vcpus_limit()),
    );
    args.option("-m", format!("{memory_mib}M"));
    // Shared: a vhost-user back end works on the guest's memory itself.
    args.json("-object", &json!({
        "qom-type": "memory-backend-memfd", "id": "mem", "share": true, "size": memory_mib * MIB,
    }));

    if let Some(kernel) = fds.kernel {
        // QEMU's own file opening cannot take the kernel from a descriptor set; the kernel can.
        args.option("-kernel", format!("/proc/self/fd/{kernel}"));
        if has_boot_file {
            args.option("-initrd", rundir::INITRAMFS);
        }
        args.option("-append", kernel_args(spec, host)?);
    }

    args.option(
        "-chardev",
        format!("socket,id=qmp,fd={},server=on,wait=off", fds.qmp_listener),
    );
    args.option("-mon", "chardev=qmp,mode=control");
    args.option(
        "-chardev",
        format!("pipe,id=console,path={}", files::CONSOLE_PIPE),
    );
    args.option("-serial", "chardev:console");
    args.json("-device", &json!({ "driver": "pvpanic" }));
    args.json(
        "-object",
        &json!({ "qom-type": "rng-builtin", "id": "rng" }),
    );
    args.json(
        "-device",
        &json!({ "driver": "virtio-rng-pci", "rng": "rng" }),
    );

    args.option("-chardev", format!("socket,id=vsock,fd={}", fds.vhost));
    args.json(
        "-device",
        &json!({ "driver": "vhost-user-vsock-pci", "chardev": "vsock" }),
    );

    // Where devices are added later: the root's own bus takes none.
    args.json(
        "-device",
        &json!({ "driver": "pcie-pci-bridge", "id": PLUG_BUS }),
    );
    if spec.memory_limit_bytes() > spec.memory_bytes {
        args.json(
            "-device",
            &json!({ "driver": "virtio-balloon-pci", "id": "balloon" }),
        );
    }

    if let (Some(interface), Some((side, fd))) = (&spec.interface, fds.card) {
        args.json(
            "-netdev",
            &card::backend(side, interface.mac, &fd.to_string()),
        );
        args.json("-device", &card::device(side, interface.mac));
    }

    for (index, (disk, files)) in spec.disks.iter().zip(&fds.disks).enumerate() {
        args.option(
            "-add-fd",
            format!("fd={},set={}", files.base, base_set(index)),
        );
        if let Some(fd) = files.overlay {
            args.option("-add-fd", format!("fd={fd},set={}", overlay_set(index)));
        }
        for node in disk_nodes(index, disk) {
            args.json("-blockdev", &node);
        }
        let mut device = disk_device(index, disk);
        if fds.kernel.is_none() && index == 0 {
            device["bootindex"] = 0.into();
        }
        args.json("-device", &device);
    }
    if fds.kernel.is_none() && has_boot_file {
        args.json(
            "-blockdev",
            &json!({
                "driver": "raw", "node-name": "boot", "read-only": true,
                "file": { "driver": "file", "filename": rundir::BOOT_DISK, "read-only": true },
            }),
        );
        args.json(
            "-device",
            &json!({ "driver": "virtio-blk-pci", "drive": "boot", "id": "boot" }),
        );
    }
    Ok(args.0)
}

/// The block devices of a disk, in the order in which they are made. Their files come from the disk's sets of
/// descriptors: QEMU opens none.
pub(crate) fn disk_nodes(index: usize, disk: &Disk) -> Vec<Value> {
    let mut base = json!({
        "driver": disk.format.to_string(), "node-name": format!("base{index}"),
        "file": format!("base{index}-file"), "read-only": true,
    });
    if disk.format == DiskFormat::Qcow2 {
        // Whatever the image's header says by now: no other file is opened.
        base["backing"] = Value::Null;
    }
    let mut nodes = vec![
        json!({
            "driver": "file", "node-name": format!("base{index}-file"),
            "filename": format!("/dev/fdset/{}", base_set(index)), "read-only": true,
        }),
        base,
    ];
    if !disk.read_only {
        // The overlay goes with the domain, so nothing is gained by waiting for the disk.
        let cache = json!({ "no-flush": true });
        nodes.push(json!({
            "driver": "file", "node-name": format!("disk{index}-file"),
            "filename": format!("/dev/fdset/{}", overlay_set(index)), "cache": cache,
            "discard": "unmap",
        }));
        nodes.push(json!({
            "driver": "qcow2", "node-name": format!("disk{index}"),
            "file": format!("disk{index}-file"), "backing": format!("base{index}"),
            "cache": cache, "discard": "unmap",
        }));
    }
    nodes
}

/// What the guest sees of a disk.
pub(crate) fn disk_device(index: usize, disk: &Disk) -> Value {
    let node = if disk.read_only { "base" } else { "disk" };
    json!({
        "driver": "virtio-blk-pci", "drive": format!("{node}{index}"), "id": disk_id(index),
    })
}

pub(crate) fn disk_id(index: usize) -> String {
    format!("vd{index}")
}

/// The kernel's command line: what shortens the boot, then the caller's, which wins.
fn kernel_args(spec: &DomainSpec, host: &Host) -> Result<String, Error> {
    let mut line: Vec<String> = [
        "console=ttyS0",
        "quiet",
        "no_timer_check",
        "random.trust_cpu=1",
        "mitigations=off",
        "cryptomgr.notests",
        "8250.nr_uarts=1",
        // A panic ends the domain. The reset is seen by QEMU; there is nobody to read a screen.
        "panic=-1",
    ]
    .map(str::to_owned)
    .into();
    if let Some(khz) = host.tsc_khz {
        line.push(format!("tsc_early_khz={khz}"));
        line.push("tsc=reliable".to_owned());
    }
    line.extend(spec.kernel_args.iter().cloned());
    let line = line.join(" ");
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

/// Doubles commas, as QEMU's `key=value,...` options want it.
fn escape(value: &str) -> String {
    value.replace(',', ",,")
}

#[derive(Default)]
struct Args(Vec<OsString>);

impl Args {
    fn flag(&mut self, name: &str) {
        self.0.push(name.into());
    }

    fn option(&mut self, name: &str, value: impl Into<OsString>) {
        self.0.push(name.into());
        self.0.push(value.into());
    }

    fn json(&mut self, name: &str, value: &Value) {
        self.option(name, value.to_string());
    }
}
