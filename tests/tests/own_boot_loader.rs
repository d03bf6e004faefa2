//! An image of the store that brings its own boot loader, kernel and agent.
#![allow(clippy::unwrap_used)]

#[path = "../../host/hypervisor/tests/support/boot_image.rs"]
mod boot_image;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use xbee_tests::{Xbed, images, run};

/// The image's init: all that is asked of it is to load the drivers and to start the agent.
const INIT: &str = r"#!/bin/busybox sh
export PATH=/bin:/sbin:/usr/bin:/usr/sbin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
while read -r module; do insmod $module; done </xbee/modules
/xbee/xbeinstd --service &
while true; do sleep 1000; done
";

/// The base image's files with that init.
fn initramfs(directory: &Path) -> PathBuf {
    let init = directory.join("init");
    fs::write(&init, INIT).unwrap();
    fs::set_permissions(&init, fs::Permissions::from_mode(0o755)).unwrap();
    let mut pack = Command::new("sh");
    pack.args([
        "-c",
        r#"cp "$1" initramfs && echo init | cpio --quiet -o -H newc >>initramfs"#,
        "-",
    ]);
    run(pack
        .arg(images().join("base/initramfs.cpio"))
        .current_dir(directory))
    .ok();
    directory.join("initramfs")
}

#[test]
fn a_job_runs_in_an_image_with_its_own_boot_loader() {
    let store = tempfile::tempdir().unwrap();
    let image = store.path().join("whole");
    fs::create_dir(&image).unwrap();
    let base = images().join("base/image.toml");
    if !base.exists() {
        println!("skipped: {} is missing: run `make images`", base.display());
        return;
    }
    let vmlinuz = images().join("kernel/vmlinuz");
    let made = boot_image::make(
        &image.join("whole.img"),
        &vmlinuz,
        &initramfs(store.path()),
        "",
    );
    if made.is_none() {
        return;
    }
    fs::write(
        image.join("image.toml"),
        "boot = \"disk\"\ndisk = \"whole.img\"\n",
    )
    .unwrap();
    let xbed = Xbed::start("qemu", &[&format!("images = {:?}", store.path())]);
    let ran = xbed.xbe(["run", "--image", "whole", "--", "/bin/cat", "/proc/1/comm"]);
    assert_eq!(ran.ok().stdout, "init\n");
}
