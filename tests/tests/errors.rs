//! The errors of the first day, word for word.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::process::Command;

use serde_json::Value;
use xbee_tests::{Xbed, images, program, qemu, run, silent_server, sim};

const HEAD: &str = r#"<?xml version="1.0" encoding="UTF-8"?>
<jsdl:JobDefinition xmlns:jsdl="http://schemas.ggf.org/jsdl/2005/11/jsdl"
  xmlns:posix="http://schemas.ggf.org/jsdl/2005/11/jsdl-posix"
  xmlns:xsdl="http://www.example.com/schemas/xbe/2007/01/xsdl">
<jsdl:JobDescription>
<jsdl:Application><posix:POSIXApplication>
<posix:Executable>/bin/sh</posix:Executable><posix:Argument>-c</posix:Argument><posix:Argument>SCRIPT</posix:Argument>
</posix:POSIXApplication></jsdl:Application>
"#;
const TAIL: &str = "</jsdl:JobDescription></jsdl:JobDefinition>\n";

/// A document with a script, resources and staging.
fn job(script: &str, rest: &str) -> String {
    format!("{}{rest}{TAIL}", HEAD.replace("SCRIPT", script))
}

fn stage(file: &str, inner: &str) -> String {
    format!(
        "<jsdl:DataStaging><jsdl:FileName>{file}</jsdl:FileName><jsdl:CreationFlag>overwrite</jsdl:CreationFlag>{inner}</jsdl:DataStaging>"
    )
}

fn source(uri: &str, more: &str) -> String {
    stage(
        "in",
        &format!("<jsdl:Source><jsdl:URI>{uri}</jsdl:URI>{more}</jsdl:Source>"),
    )
}

fn instance(image: &str) -> String {
    let kernel = images().join("kernel/vmlinux");
    format!(
        "<jsdl:Resources><xsdl:InstanceDefinition><xsdl:InstanceDescription><xsdl:Instance>
        <xsdl:Kernel><xsdl:Location><xsdl:URI>file://{}</xsdl:URI></xsdl:Location></xsdl:Kernel>
        <xsdl:Image><xsdl:Location><xsdl:URI>file://{image}</xsdl:URI></xsdl:Location></xsdl:Image>
        </xsdl:Instance></xsdl:InstanceDescription></xsdl:InstanceDefinition></jsdl:Resources>",
        kernel.display()
    )
}

/// Waits for the task's failure; gives code and reason.
fn failure(xbed: &Xbed, document: &str) -> (String, String) {
    let task = xbed.submit(document);
    let status = xbed.wait_for(&task, "Failed");
    let text = |key: &str| status[key].as_str().unwrap_or_default().to_owned();
    (text("reason_code"), text("reason"))
}

#[test]
fn xbed_not_running() {
    let ran = run(Command::new(program("xbe")).args(["--server", "/tmp/xbee-none/s", "ps"]));
    assert_eq!(ran.code, 125);
    assert_eq!(
        ran.stderr,
        "xbe: no xbed answers at /tmp/xbee-none/s (no such socket): start one with `xbed`, or name another with --server\n"
    );
}

#[test]
fn not_well_formed_and_invalid_documents_are_refused_with_their_line() {
    let xbed = sim();
    let refused = |name: &str, text: &str| {
        let path = xbed.document(name, text);
        let ran = xbed.xbe(["submit".as_ref(), path.as_os_str()]);
        assert_eq!((ran.code, ran.stdout.as_str()), (125, ""));
        ran.stderr
    };
    assert_eq!(
        refused("broken.xsdl", "<a>\n<b></a>\n"),
        "xbe: the document is not valid: line 2: not well-formed: ill-formed document: expected `</b>`, but `</a>` was found\n"
    );
    assert_eq!(
        refused("invalid.xsdl", &job("true", "<jsdl:Nonsense/>")),
        "xbe: the document is not valid: line 9: element jsdl:Nonsense is not expected here in jsdl:JobDescription, expected jsdl:Resources, jsdl:DataStaging or an element of another namespace\n"
    );
    assert_eq!(
        xbed.xbe(["ps", "-a", "--json"]).json(),
        Value::Array(vec![])
    );
}

#[test]
fn an_unknown_scheme_is_refused_before_anything_begins() {
    let xbed = sim();
    let path = xbed.document("job.xsdl", &job("true", &source("gopher://h/x", "")));
    let ran = xbed.xbe(["submit".as_ref(), path.as_os_str()]);
    assert_eq!(ran.code, 125);
    assert_eq!(
        ran.stderr,
        "xbe: gopher://h/x: unknown URI scheme \"gopher\"; supported are file, ftp, http, https\n"
    );
}

#[test]
fn only_domains_of_xen_can_be_exported() {
    let xbed = sim();
    let path = xbed.document("job.xsdl", &job("exit 0", ""));
    let not_xen = "xbe: domains of this back end have no description: only those of xen have one (xbed --backend xen)\n";
    for form in ["--xl", "--libvirt"] {
        let ran = xbed.xbe(["export".as_ref(), form.as_ref(), path.as_os_str()]);
        assert_eq!((ran.code, ran.stdout.as_str()), (125, ""));
        assert_eq!(ran.stderr, not_xen);
    }
    let document = xbed.xbe(["run", "--print-jsdl", "--", "sleep", "600"]).ok();
    let task = xbed.submit(&document.stdout);
    xbed.wait_for(&task, "Executing");
    let ran = xbed.xbe(["export", "--xl", task.as_str()]);
    assert_eq!((ran.code, ran.stderr.as_str()), (125, not_xen));
    xbed.xbe(["terminate", task.as_str()]).ok();
    xbed.wait_for(&task, "Terminated");
    let ran = xbed.xbe(["export", "--xl", task.as_str()]);
    assert_eq!(
        ran.stderr,
        format!("xbe: task {task} has no running domain now\n")
    );
    // What it would boot is known when it has been fetched.
    let path = xbed.document("own.xsdl", &job("true", &instance("/no/such/image")));
    let ran = xbed.xbe(["export".as_ref(), "--xl".as_ref(), path.as_os_str()]);
    assert!(ran.stderr.contains("brings its own image"), "{ran:?}");
}

#[test]
fn a_missing_file_and_a_wrong_hash_fail_in_stage_in() {
    let xbed = sim();
    let (code, reason) = failure(&xbed, &job("true", &source("file:///no/such/file", "")));
    assert_eq!(code, "not-found");
    assert_eq!(reason, "file:///no/such/file: not found");
    let file = xbed.scratch().join("data");
    fs::write(&file, "abc").unwrap();
    let zeros = "0".repeat(40);
    let hash = format!("<xsdl:Hash algorithm=\"sha1\">{zeros}</xsdl:Hash>");
    let uri = format!("file://{}", file.display());
    let (code, reason) = failure(&xbed, &job("true", &source(&uri, &hash)));
    assert_eq!(code, "hash-mismatch");
    assert_eq!(
        reason,
        format!(
            "{uri}: wrong sha1 digest: expected {zeros}, got a9993e364706816aba3e25717850c26c9cd0d89d"
        )
    );
}

#[test]
fn an_image_that_is_none_says_what_it_is() {
    let Some(xbed) = qemu() else { return };
    let path = xbed.scratch().join("image");
    fs::write(&path, "this is a text\n".repeat(10_000)).unwrap();
    let (code, reason) = failure(&xbed, &job("true", &instance(path.to_str().unwrap())));
    assert_eq!(code, "not-an-image");
    assert!(
        reason.starts_with(&format!("{} is not a disk image: it holds", path.display())),
        "{reason}"
    );
    xbed.assert_nothing_left();
}

/// An `xbed` whose `base` image boots otherwise than it should; with a limit for the boot.
fn broken_base(
    initramfs: &str,
    kernel_args: &str,
    boot_timeout_s: u32,
) -> Option<(tempfile::TempDir, Xbed)> {
    qemu()?;
    let home = tempfile::tempdir().unwrap();
    let image = home.path().join("base");
    fs::create_dir(&image).unwrap();
    fs::write(image.join("empty.cpio"), trailer()).unwrap();
    let kernel = images().join("kernel/vmlinux");
    fs::write(
        image.join("image.toml"),
        format!("kernel = {kernel:?}\ninitramfs = {initramfs:?}\nkernel_args = [{kernel_args}]\n"),
    )
    .unwrap();
    let config = [
        format!("images = {:?}", home.path()),
        format!("boot-timeout-s = {boot_timeout_s}"),
    ];
    let xbed = Xbed::start("qemu", &config.each_ref().map(String::as_str));
    Some((home, xbed))
}

#[test]
fn an_agent_that_never_comes_fails_the_instance() {
    let base = images().join("base/initramfs.cpio");
    let args = r#""rdinit=/bin/sleep", "--", "1000""#;
    let Some((_home, xbed)) = broken_base(base.to_str().unwrap(), args, 3) else {
        return;
    };
    let (code, reason) = failure(&xbed, &job("true", ""));
    assert_eq!(code, "agent-never-came");
    assert!(
        reason.starts_with("the domain was started but its agent did not report within 3 s: does the image's kernel boot, and does its initramfs hold the agent, or its init start it?"),
        "{reason}"
    );
    xbed.assert_nothing_left();
}

#[test]
fn a_kernel_that_panics_is_reported_with_its_console() {
    let Some((_home, xbed)) = broken_base("empty.cpio", "", 120) else {
        return;
    };
    let (code, reason) = failure(&xbed, &job("true", ""));
    assert_eq!(code, "domain-lost");
    assert!(
        reason.contains("the last lines of its console:"),
        "{reason}"
    );
    assert!(reason.contains("Kernel panic"), "{reason}");
    xbed.assert_nothing_left();
}

/// An empty newc archive.
fn trailer() -> Vec<u8> {
    let mut archive = b"070701".to_vec();
    let name = b"TRAILER!!!\0";
    for field in 0..13 {
        let value = if field == 11 { name.len() } else { 0 };
        archive.extend(format!("{value:08x}").bytes());
    }
    archive.extend(name);
    archive.resize(archive.len().next_multiple_of(512), 0);
    archive
}

#[test]
fn a_result_that_was_not_made_is_named() {
    let Some(xbed) = qemu() else { return };
    let target = "<jsdl:Target><jsdl:URI>file:///tmp/xbee-never</jsdl:URI></jsdl:Target>";
    let (code, reason) = failure(&xbed, &job("exit 0", &stage("/tmp/none", target)));
    assert_eq!(code, "result-missing");
    assert!(
        reason.starts_with("/tmp/none, to be staged out, is not there"),
        "{reason}"
    );
}

#[test]
fn a_silent_agent_is_a_failed_instance() {
    let Some(xbed) = qemu() else { return };
    let task = xbed.submit(&job("echo begun; sleep 1000", ""));
    xbed.wait_for_output(&task, "begun\n");
    let processes = xbed.processes();
    let machine = processes
        .iter()
        .find(|(_, line)| line.contains("qemu-system"));
    let pid = machine.unwrap().0.to_string();
    run(Command::new("kill").args(["-STOP", &pid])).ok();
    let status = xbed.wait_for(&task, "Failed");
    assert_eq!(status["reason_code"], "agent-silent");
    let reason = status["reason"].as_str().unwrap();
    assert!(
        reason.starts_with("the agent in the domain has not been heard of for 30 s"),
        "{reason}"
    );
    assert_eq!(xbed.xbe(["logs", task.as_str()]).ok().stdout, "begun\n");
    xbed.assert_nothing_left();
}

#[test]
fn terminate_works_in_each_state_and_leaves_nothing() {
    if qemu().is_none() {
        return;
    }
    let xbed = Xbed::start("qemu", &["domains = 1"]);
    let (_server, address) = silent_server();
    let slow_script = {
        let path = xbed.scratch().join("cleanup");
        fs::write(&path, "#!/bin/sh\nsleep 1000\n").unwrap();
        format!(
            "<jsdl:Resources><xsdl:InstanceDefinition><xsdl:InstanceDescription>
            <xsdl:Package><xsdl:Location><xsdl:URI>image:base</xsdl:URI></xsdl:Location></xsdl:Package>
            <xsdl:Control><xsdl:Script target=\"cleanup\"><xsdl:Location><xsdl:URI>file://{}</xsdl:URI></xsdl:Location></xsdl:Script></xsdl:Control>
            </xsdl:InstanceDescription></xsdl:InstanceDefinition></jsdl:Resources>",
            path.display()
        )
    };
    let slow_put = stage(
        "/tmp/r",
        &format!("<jsdl:Target><jsdl:URI>http://{address}/r</jsdl:URI></jsdl:Target>"),
    );
    let states = [
        (
            "Stage-In",
            job("true", &source(&format!("http://{address}/x"), "")),
        ),
        ("Instance-Starting", job("true", "")),
        ("Executing", job("sleep 1000", "")),
        ("Instance-Stopping", job("true", &slow_script)),
        ("Stage-Out", job("echo x > /tmp/r", &slow_put)),
    ];
    for (state, document) in states {
        let task = xbed.submit(&document);
        xbed.wait_for(&task, state);
        // One domain at a time: a second task waits, and ends at once.
        let pending = xbed.submit(&job("true", ""));
        assert_eq!(xbed.status(&pending)["state"], "Pending");
        xbed.xbe(["terminate", pending.as_str()]).ok();
        xbed.wait_for(&pending, "Terminated");
        xbed.xbe(["terminate", task.as_str()]).ok();
        let status = xbed.wait_for(&task, "Terminated");
        assert_eq!(status["reason"], "terminated on request", "{state}");
        xbed.assert_nothing_left();
        for part in ["in", "out", "boot", "scripts"] {
            let path = xbed.data().join("tasks").join(&task).join(part);
            assert!(!path.exists(), "{state}: {} is left", path.display());
        }
    }
}
