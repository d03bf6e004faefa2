//! An image with a boot loader and a kernel of its own, made without root: SYSLINUX on a FAT file system.

use std::path::Path;
use std::process::Command;

const TOOLS: [&str; 3] = ["mkfs.vfat", "mcopy", "syslinux"];

/// What the file system takes beside the files, and enough for it to be of the kind that SYSLINUX knows.
const ROOM_BYTES: u64 = 16 << 20;

/// Makes the image. `None`, and a printed reason, where something for it is missing.
pub fn make(image: &Path, vmlinuz: &Path, initramfs: &Path, argument: &str) -> Option<()> {
    if !vmlinuz.exists() {
        println!("skipped: {} is missing (make images)", vmlinuz.display());
        return None;
    }
    for tool in TOOLS {
        if command(tool).arg("--version").output().is_err() {
            println!("skipped: {tool} is missing (ci/install test)");
            return None;
        }
    }
    let config = image.with_extension("cfg");
    // On QEMU and on Xen the serial port is the console.
    let arguments = format!(
        "console=ttyS0 quiet no_timer_check random.trust_cpu=1 mitigations=off cryptomgr.notests panic=-1 {argument}"
    );
    std::fs::write(
        &config,
        format!(
            "DEFAULT linux\nLABEL linux\nLINUX vmlinuz\nINITRD initramfs\nAPPEND {arguments}\n"
        ),
    )
    .unwrap();
    let size = |path: &Path| std::fs::metadata(path).unwrap().len();
    std::fs::File::create(image)
        .unwrap()
        .set_len((size(vmlinuz) + size(initramfs) + ROOM_BYTES).next_multiple_of(1 << 20))
        .unwrap();
    run(command("mkfs.vfat").arg(image));
    for (file, name) in [
        (vmlinuz, "vmlinuz"),
        (initramfs, "initramfs"),
        (&*config, "syslinux.cfg"),
    ] {
        let name = format!("::{name}");
        run(command("mcopy").arg("-i").arg(image).arg(file).arg(name));
    }
    run(command("syslinux").arg("--install").arg(image));
    Some(())
}

/// A tool that may be where only root looks for it.
fn command(tool: &str) -> Command {
    let path = std::env::var("PATH").unwrap_or_default();
    let mut command = Command::new(tool);
    command.env("PATH", format!("{path}:/usr/sbin:/sbin"));
    command
}

fn run(command: &mut Command) {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {output:?}");
}
