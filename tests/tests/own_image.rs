//! A user's own image: no agent inside, with or without an init, with or without partitions.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use xbee_tests::{Xbed, images, qemu, run};

const SECTOR: usize = 512;
/// Where the partition begins, in sectors: 1 MiB, as every tool of today has it.
const FIRST_SECTOR: u32 = 2048;

/// A root file system with busybox alone.
fn root_file_system(xbed: &Xbed, inittab: Option<&str>) -> PathBuf {
    let tree = xbed.scratch().join("tree");
    for directory in [
        "bin", "sbin", "etc", "tmp", "proc", "sys", "dev", "run", "root",
    ] {
        fs::create_dir_all(tree.join(directory)).unwrap();
    }
    fs::copy("/bin/busybox", tree.join("bin/busybox")).unwrap();
    for applet in ["sh", "cat", "sleep", "touch"] {
        symlink("busybox", tree.join("bin").join(applet)).unwrap();
    }
    if let Some(inittab) = inittab {
        symlink("../bin/busybox", tree.join("sbin/init")).unwrap();
        fs::write(tree.join("etc/inittab"), inittab).unwrap();
    }
    let image = xbed.scratch().join("root.img");
    let mut make = Command::new("mke2fs");
    make.args(["-q", "-t", "ext4", "-d"])
        .arg(&tree)
        .arg(&image)
        .arg("16M");
    run(&mut make).ok();
    image
}

/// The same file system in the first partition of a disk (MBR).
fn partitioned(image: &Path) -> PathBuf {
    let content = fs::read(image).unwrap();
    let start = FIRST_SECTOR as usize * SECTOR;
    let mut disk = vec![0; start];
    let entry = &mut disk[446..462];
    entry[4] = 0x83; // Linux
    entry[8..12].copy_from_slice(&FIRST_SECTOR.to_le_bytes());
    let sectors = u32::try_from(content.len() / SECTOR).unwrap();
    entry[12..16].copy_from_slice(&sectors.to_le_bytes());
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    disk.extend(content);
    let path = image.with_extension("disk");
    fs::write(&path, disk).unwrap();
    path
}

fn document(image: &Path, initrd: Option<&Path>, script: &str) -> String {
    let file = |element: &str, path: &Path| {
        format!(
            "<x:{element}><x:Location><x:URI>file://{}</x:URI></x:Location></x:{element}>",
            path.display()
        )
    };
    format!(
        r#"<j:JobDefinition xmlns:j="http://schemas.ggf.org/jsdl/2005/11/jsdl"
        xmlns:p="http://schemas.ggf.org/jsdl/2005/11/jsdl-posix"
        xmlns:x="http://www.example.com/schemas/xbe/2007/01/xsdl"><j:JobDescription>
        <j:Application><p:POSIXApplication><p:Executable>/bin/sh</p:Executable>
        <p:Argument>-c</p:Argument><p:Argument>{script}</p:Argument></p:POSIXApplication></j:Application>
        <j:Resources><x:InstanceDefinition><x:InstanceDescription><x:Instance>{}{}{}</x:Instance>
        </x:InstanceDescription></x:InstanceDefinition></j:Resources></j:JobDescription></j:JobDefinition>"#,
        file("Kernel", &images().join("kernel/vmlinux")),
        initrd.map(|path| file("Initrd", path)).unwrap_or_default(),
        file("Image", image),
    )
}

/// Runs the document to its end; gives its output.
fn output(xbed: &Xbed, document: &str) -> String {
    let task = xbed.submit(document);
    let status = xbed.wait_for(&task, "Finished");
    assert_eq!(status["exit_code"], 0, "{status}");
    xbed.xbe(["logs", task.as_str()]).ok().stdout
}

#[test]
fn an_image_with_an_init_boots_it_and_the_job_runs_beside_it() {
    let Some(xbed) = qemu() else { return };
    let image = root_file_system(&xbed, Some("::sysinit:/bin/touch /tmp/up\n"));
    let before = fs::read(&image).unwrap();
    let script =
        "until [ -e /tmp/up ]; do sleep 0.1; done; cat /proc/1/comm; echo changed > /written";
    assert_eq!(output(&xbed, &document(&image, None, script)), "init\n");
    assert!(
        fs::read(&image).unwrap() == before,
        "the image was written to"
    );
}

#[test]
fn an_image_without_init_is_run_by_the_agent() {
    let Some(xbed) = qemu() else { return };
    let image = root_file_system(&xbed, None);
    let script = "cat /proc/1/comm; cat /proc/self/mounts";
    let seen = output(&xbed, &document(&image, None, script));
    assert!(seen.contains("/dev/vda / ext4"), "{seen}");
}

#[test]
fn a_partitioned_disk_and_the_users_own_initrd_will_do() {
    let Some(xbed) = qemu() else { return };
    let image = partitioned(&root_file_system(&xbed, None));
    // Holds nothing of ours: the agent is appended to it.
    let initrd = xbed.scratch().join("initrd");
    let mut pack = Command::new("sh");
    pack.args(["-c", "echo etc | cpio --quiet -o -H newc | gzip"]);
    let packed = pack
        .current_dir(xbed.scratch().join("tree"))
        .output()
        .unwrap();
    assert!(packed.status.success());
    fs::write(&initrd, packed.stdout).unwrap();
    let seen = output(
        &xbed,
        &document(&image, Some(&initrd), "cat /proc/self/mounts"),
    );
    assert!(seen.contains("/dev/vda1 / ext4"), "{seen}");
}
