//! The thesis's own examples: POV-Ray with files by FTP, and the web server domain.
#![allow(clippy::unwrap_used)]

#[path = "../../host/staging/tests/common/ftp.rs"]
mod ftp;

use std::fs;
use std::process::Command;

use xbee_tests::{has_image, qemu, root, run};

#[test]
fn povray_renders_a_scene_that_came_by_ftp_and_sends_the_picture_back() {
    if !has_image("povray") {
        return;
    }
    let Some(xbed) = qemu() else { return };
    let files = xbed.scratch();
    fs::copy(
        root().join("examples/scenes/scene.pov"),
        files.join("scene.pov"),
    )
    .unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let server = runtime.block_on(ftp::serve(&files));
    let example = fs::read_to_string(root().join("examples/povray.xsdl")).unwrap();
    let document = example.replace("127.0.0.1:2121", &server.to_string());
    assert_ne!(document, example);
    let path = xbed.document("povray.xsdl", &document);
    let submitted = xbed.xbe(["submit".as_ref(), "--wait".as_ref(), path.as_os_str()]);
    assert_eq!(submitted.code, 0, "{submitted:?}\n{}", xbed.log());
    let picture = fs::read(files.join("scene.png")).unwrap();
    assert_eq!(size_of_png(&picture), (320, 240));
    xbed.assert_nothing_left();
}

/// Width and height from the header (PNG specification, 11.2.2), and the end where it belongs.
fn size_of_png(picture: &[u8]) -> (u32, u32) {
    assert!(picture.starts_with(b"\x89PNG\r\n\x1a\n"), "not a PNG");
    assert!(picture.ends_with(b"IEND\xaeB`\x82"), "cut off");
    assert_eq!(&picture[12..16], b"IHDR");
    let number = |at: usize| u32::from_be_bytes(picture[at..at + 4].try_into().unwrap());
    (number(16), number(20))
}

#[test]
fn the_web_server_domain_serves_its_content_and_takes_ssh() {
    if !has_image("server") {
        return;
    }
    let Some(xbed) = qemu() else { return };
    let pages = xbed.scratch().join("pages");
    fs::create_dir_all(pages.join("sub")).unwrap();
    fs::write(pages.join("index.html"), "<h1>served from a domain</h1>\n").unwrap();
    fs::write(pages.join("sub/page.html"), "deeper\n").unwrap();
    let archive = xbed.scratch().join("content.tar.bz2");
    let mut tar = Command::new("tar");
    run(tar.arg("-cjf").arg(&archive).arg("-C").arg(&pages).arg(".")).ok();
    let example = fs::read_to_string(root().join("examples/server.xsdl")).unwrap();
    let document = example.replace("/srv/xenbee/content.tar.bz2", archive.to_str().unwrap());
    assert_ne!(document, example);
    let path = xbed.document("server.xsdl", &document);
    let args = ["submit", "-p", "0:80", path.to_str().unwrap()];
    let task = xbed.xbe(args).line();
    let status = xbed.wait_for(&task, "Executing");
    let port = status["ports"][0]["host"].as_u64().unwrap();

    let url = |page: &str| format!("http://127.0.0.1:{port}/{page}");
    // nginx is started by the image's init, which has only begun.
    let mut curl = Command::new("curl");
    curl.args([
        "-sS",
        "--fail",
        "--retry",
        "60",
        "--retry-delay",
        "1",
        "--retry-all-errors",
    ]);
    let page = run(curl.arg(url(""))).ok();
    assert_eq!(page.stdout, "<h1>served from a domain</h1>\n");
    let page = run(Command::new("curl")
        .args(["-sS", "--fail"])
        .arg(url("sub/page.html")))
    .ok();
    assert_eq!(page.stdout, "deeper\n");

    let expected = format!("xbee-{}", &task[..8]);
    let hostname = xbed.xbe(["ssh", task.as_str(), "--", "hostname"]);
    assert_eq!(hostname.stdout.trim(), expected, "{hostname:?}");
    let code = xbed.xbe(["ssh", task.as_str(), "--", "exit", "9"]).code;
    assert_eq!(code, 9);
    // The image's own init has the machine.
    let init = xbed
        .xbe(["exec", task.as_str(), "--", "cat", "/proc/1/comm"])
        .line();
    assert_eq!(init, "systemd");

    xbed.xbe(["terminate", task.as_str()]).ok();
    xbed.wait_for(&task, "Terminated");
    xbed.assert_nothing_left();
    let refused = run(Command::new("curl")
        .args(["-sS", "--max-time", "5"])
        .arg(url("")));
    assert_eq!(refused.code, 7, "the port is free again: {refused:?}");
}
