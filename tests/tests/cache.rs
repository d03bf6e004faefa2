//! Files that are fetched once: the cache, by its commands and by the images of jobs.
#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use serde_json::Value;
use xbee_tests::{PATIENCE, Xbed, images, qemu, run, sim};

/// What the server did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Did {
    /// It sent the file.
    Sent,
    /// It said that the file has not changed.
    Unchanged,
}

#[derive(Default)]
struct Files {
    /// By path: what is sent, and its `ETag`.
    files: HashMap<String, (Vec<u8>, String)>,
    log: Vec<(String, Did)>,
    /// The second half of a file is held back.
    is_held: bool,
}

/// An HTTP server that knows versions.
struct Server {
    address: String,
    files: Arc<(Mutex<Files>, Condvar)>,
}

impl Server {
    fn start() -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let files = Arc::<(Mutex<Files>, Condvar)>::default();
        let shared = files.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (stream, files) = (stream.unwrap(), shared.clone());
                // A client that goes away is what some tests are about.
                std::thread::spawn(move || drop(answer(stream, &files)));
            }
        });
        Server { address, files }
    }

    fn put(&self, path: &str, content: &[u8], etag: &str) {
        let file = (content.to_vec(), format!("\"{etag}\""));
        let mut files = self.files.0.lock().unwrap();
        files.files.insert(path.into(), file);
    }

    fn hold(&self, is_held: bool) {
        self.files.0.lock().unwrap().is_held = is_held;
        self.files.1.notify_all();
    }

    fn uri(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// What was asked for with this path, and forgets it.
    fn did(&self, path: &str) -> Vec<Did> {
        let log = &mut self.files.0.lock().unwrap().log;
        let did = log.iter().filter(|(asked, _)| asked == path);
        let did = did.map(|(_, did)| *did).collect();
        log.retain(|(asked, _)| asked != path);
        did
    }

    fn wait_for_request(&self) {
        let begun = Instant::now();
        while self.files.0.lock().unwrap().log.is_empty() {
            assert!(begun.elapsed() < PATIENCE, "nobody asks");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

fn answer(mut stream: TcpStream, shared: &(Mutex<Files>, Condvar)) -> std::io::Result<()> {
    let mut head = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    head.read_line(&mut line)?;
    let path = line.split(' ').nth(1).unwrap_or_default().to_owned();
    let mut known = None;
    loop {
        line.clear();
        if head.read_line(&mut line)? == 0 || line.trim().is_empty() {
            break;
        }
        if let Some((name, value)) = line.split_once(':')
            && name.eq_ignore_ascii_case("if-none-match")
        {
            known = Some(value.trim().to_owned());
        }
    }
    let mut files = shared.0.lock().unwrap();
    let Some((content, etag)) = files.files.get(&path).cloned() else {
        return stream
            .write_all(b"HTTP/1.1 404 No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    };
    let is_known = known.as_ref() == Some(&etag);
    files
        .log
        .push((path, if is_known { Did::Unchanged } else { Did::Sent }));
    drop(files);
    if is_known {
        let head = format!("HTTP/1.1 304 x\r\nETag: {etag}\r\nConnection: close\r\n\r\n");
        return stream.write_all(head.as_bytes());
    }
    let length = content.len();
    let head = format!(
        "HTTP/1.1 200 x\r\nETag: {etag}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
    );
    stream.write_all(head.as_bytes())?;
    stream.write_all(&content[..length / 2])?;
    let files = shared.0.lock().unwrap();
    drop(shared.1.wait_while(files, |files| files.is_held).unwrap());
    stream.write_all(&content[length / 2..])
}

/// A job with an image of its own, which is at `uri` as `location` says beside.
fn document(kernel: &str, uri: &str, location: &str, command: &[&str]) -> String {
    let arguments = command[1..].iter();
    let arguments: String = arguments
        .map(|argument| format!("<p:Argument>{argument}</p:Argument>"))
        .collect();
    let program = command[0];
    format!(
        r#"<j:JobDefinition xmlns:j="http://schemas.ggf.org/jsdl/2005/11/jsdl"
        xmlns:p="http://schemas.ggf.org/jsdl/2005/11/jsdl-posix"
        xmlns:x="http://www.example.com/schemas/xbe/2007/01/xsdl"><j:JobDescription>
        <j:Application><p:POSIXApplication><p:Executable>{program}</p:Executable>
        {arguments}</p:POSIXApplication></j:Application>
        <j:Resources><x:InstanceDefinition><x:InstanceDescription><x:Instance>
        <x:Kernel><x:Location><x:URI>{kernel}</x:URI></x:Location></x:Kernel>
        <x:Image><x:Location><x:URI>{uri}</x:URI>{location}</x:Location></x:Image></x:Instance>
        </x:InstanceDescription></x:InstanceDefinition></j:Resources></j:JobDescription></j:JobDefinition>"#
    )
}

/// A job on the simulator whose image and kernel are the same file.
fn simulated(uri: &str) -> String {
    document(uri, uri, "", &["true"])
}

fn entries(xbed: &Xbed) -> Vec<Value> {
    let list = xbed.xbe(["cache", "ls", "--json"]).json();
    list.as_array().unwrap().clone()
}

/// The cache's directory holds the entries' files, and nothing else.
#[track_caller]
fn assert_whole(xbed: &Xbed) {
    let mut names: Vec<String> = entries(xbed)
        .iter()
        .map(|entry| entry["id"].as_str().unwrap().to_owned())
        .collect();
    let files = fs::read_dir(xbed.data().join("cache")).unwrap();
    let files = files.map(|file| file.unwrap().file_name().into_string().unwrap());
    let mut files: Vec<String> = files.collect();
    names.sort();
    files.sort();
    assert_eq!(files, names);
}

#[track_caller]
fn finished(xbed: &Xbed, document: &str) -> String {
    let task = xbed.submit(document);
    xbed.wait_for(&task, "Finished");
    task
}

/// A root file system with busybox alone, packed.
fn packed_image(xbed: &Xbed) -> Vec<u8> {
    let tree = xbed.scratch().join("tree");
    for directory in ["bin", "etc", "tmp", "proc", "sys", "dev", "run", "root"] {
        fs::create_dir_all(tree.join(directory)).unwrap();
    }
    fs::copy("/bin/busybox", tree.join("bin/busybox")).unwrap();
    for applet in ["sh", "cat", "sleep", "touch"] {
        std::os::unix::fs::symlink("busybox", tree.join("bin").join(applet)).unwrap();
    }
    let image = xbed.scratch().join("root.img");
    let mut make = Command::new("mke2fs");
    make.args(["-q", "-t", "ext4", "-d"]).arg(&tree);
    run(make.arg(&image).arg("16M")).ok();
    run(Command::new("gzip").arg("-1").arg(&image)).ok();
    fs::read(image.with_extension("img.gz")).unwrap()
}

#[test]
fn an_image_is_fetched_once_for_machines_that_boot_from_it() {
    let Some(xbed) = qemu() else { return };
    let server = Server::start();
    server.put("/root.img.gz", &packed_image(&xbed), "v1");
    let kernel = format!("file://{}", images().join("kernel/vmlinux").display());
    let uri = server.uri("/root.img.gz");
    let gzip = "<x:Compression algorithm=\"gzip\"/>";
    let job = |script: &str| document(&kernel, &uri, gzip, &["/bin/sh", "-c", script]);
    let output = |job: &str| {
        let task = finished(&xbed, job);
        xbed.xbe(["logs", task.as_str()]).ok().stdout
    };
    assert_eq!(output(&job("echo first &gt; /x; cat /x")), "first\n");
    assert_eq!(server.did("/root.img.gz"), [Did::Sent]);
    // What the first wrote is nobody else's.
    let second = job("cat /x; echo second");
    assert_eq!(output(&second), "second\n");
    assert_eq!(server.did("/root.img.gz"), [Did::Unchanged]);
    let [entry] = &entries(&xbed)[..] else {
        panic!("{:?}", entries(&xbed))
    };
    // Unpacked, with its holes.
    assert_eq!(entry["size_bytes"], 16 << 20);
    assert!(
        entry["allocated_bytes"].as_u64().unwrap() < 12 << 20,
        "{entry}"
    );

    // One that runs has the very file, and keeps it.
    let file = xbed
        .data()
        .join("cache")
        .join(entry["id"].as_str().unwrap());
    let runs = xbed.submit(&job("echo up; until [ -e /tmp/go ]; do sleep 0.1; done; cat /bin/busybox &gt; /dev/null; echo read"));
    xbed.wait_for_output(&runs, "up\n");
    let spool = xbed.data().join("tasks").join(&runs);
    let image = fs::metadata(spool.join("boot/image")).unwrap();
    assert_eq!(fs::metadata(&file).unwrap().ino(), image.ino());
    assert_eq!(entries(&xbed)[0]["in_use"], true);
    xbed.xbe(["cache", "rm", entry["id"].as_str().unwrap()])
        .ok();
    assert_eq!(entries(&xbed), [Value::Null; 0]);
    assert!(!file.exists());
    xbed.xbe(["exec", &runs, "--", "/bin/touch", "/tmp/go"])
        .ok();
    xbed.wait_for(&runs, "Finished");
    assert_eq!(xbed.xbe(["logs", runs.as_str()]).ok().stdout, "up\nread\n");

    // It is fetched anew, and once more when the file is not what it was, or the server's is not.
    server.did("/root.img.gz");
    assert_eq!(output(&second), "second\n");
    assert_eq!(server.did("/root.img.gz"), [Did::Sent]);
    let id = entries(&xbed)[0]["id"].as_str().unwrap().to_owned();
    let file = xbed.data().join("cache").join(&id);
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
    let cut = fs::File::options().write(true).open(&file).unwrap();
    cut.set_len(8 << 20).unwrap();
    assert_eq!(output(&second), "second\n");
    assert_eq!(server.did("/root.img.gz"), [Did::Sent]);
    assert_whole(&xbed);
    xbed.assert_nothing_left();
}

#[test]
fn entries_are_added_named_and_removed() {
    let mut xbed = sim();
    let server = Server::start();
    server.put("/in", b"content\n", "v1");
    let uri = server.uri("/in").replace("http://", "http://me:secret@");
    let id = xbed.xbe(["cache", "add", &uri]).line();
    let listed = xbed.xbe(["cache", "ls"]).ok().stdout;
    assert!(
        listed.contains(&id) && !listed.contains("secret"),
        "{listed}"
    );
    let source = format!("cache:{}:/data/in", &id[..8]);
    let ran = xbed.xbe(["run", "-v", &source, "--", "cat", "/data/in"]);
    assert_eq!((ran.code, ran.stdout.as_str()), (0, "content\n"), "{ran:?}");
    assert_eq!(server.did("/in"), [Did::Sent]);
    // Asked for again, it is the same; another version is another entry, and the only one.
    assert_eq!(xbed.xbe(["cache", "add", &uri]).line(), id);
    assert_eq!(server.did("/in"), [Did::Unchanged]);
    server.put("/in", b"other\n", "v2");
    let other = xbed.xbe(["cache", "add", &uri]).line();
    assert_ne!(other, id);
    assert_eq!(entries(&xbed).len(), 1);
    let refused = xbed.xbe(["run", "-v", &source, "--", "cat", "/data/in"]);
    let told = format!(
        "xbe: no entry {} of yours is in the cache; `xbe cache ls` lists those there are\n",
        &id[..8]
    );
    assert_eq!((refused.code, refused.stderr), (125, told));
    let none = xbed.xbe(["cache", "add", &server.uri("/none")]);
    assert!(
        none.stderr.contains("/none: not found (HTTP status 404)"),
        "{none:?}"
    );
    // Its hash is looked at again.
    let wrong = "<j:DataStaging><j:FileName>/in</j:FileName><j:CreationFlag>overwrite</j:CreationFlag><j:Source><j:URI>cache:";
    let hash = format!(
        "</j:URI><x:Hash xmlns:x=\"http://www.example.com/schemas/xbe/2007/01/xsdl\" algorithm=\"sha256\">{}</x:Hash></j:Source></j:DataStaging></j:JobDescription>",
        "0".repeat(64)
    );
    let text = document("cache:1", "cache:1", "", &["true"]);
    let from = text.find("<j:Resources>").unwrap();
    let until = text.find("</j:JobDescription>").unwrap();
    let mut text = text;
    text.replace_range(
        from..until + "</j:JobDescription>".len(),
        &format!("{wrong}{other}{hash}"),
    );
    let task = xbed.submit(&text);
    xbed.wait_for_end(&task);
    let status = xbed.status(&task);
    assert_eq!(status["reason_code"], "hash-mismatch", "{status:#}");
    let reason = status["reason"].as_str().unwrap();
    assert!(
        reason.starts_with(&format!("cache:{other}: wrong sha256")),
        "{reason}"
    );
    xbed.xbe(["cache", "rm", &other[..8]]).ok();
    assert_whole(&xbed);
    assert_eq!(entries(&xbed).len(), 0);
    xbed.assert_nothing_left();
}

#[test]
fn two_that_want_the_same_fetch_once_and_one_may_go() {
    let xbed = sim();
    let server = Server::start();
    server.put("/image", &[b'x'; 300_000], "v1");
    server.hold(true);
    let job = simulated(&server.uri("/image"));
    let tasks = [xbed.submit(&job), xbed.submit(&job), xbed.submit(&job)];
    server.wait_for_request();
    for task in &tasks {
        xbed.wait_for(task, "Stage-In");
        // It is shown how far it is.
        let begun = Instant::now();
        while xbed.status(task)["progress"]["total_bytes"] != 300_000 {
            assert!(begun.elapsed() < PATIENCE, "{}", xbed.status(task));
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    // The first to come is the first to go.
    xbed.xbe(["terminate", &tasks[0]]).ok();
    xbed.wait_for(&tasks[0], "Terminated");
    server.hold(false);
    for task in &tasks[1..] {
        xbed.wait_for(task, "Finished");
    }
    let did = server.did("/image");
    assert_eq!(
        did.iter().filter(|did| **did == Did::Sent).count(),
        1,
        "{did:?}"
    );
    // When the last one goes, so does the fetch.
    server.put("/image", &[b'y'; 300_000], "v2");
    server.hold(true);
    let last = xbed.submit(&job);
    server.wait_for_request();
    xbed.xbe(["terminate", &last]).ok();
    xbed.wait_for(&last, "Terminated");
    assert_whole(&xbed);
    server.hold(false);
    xbed.assert_nothing_left();
}

#[test]
fn a_known_content_is_not_asked_for_again() {
    let xbed = sim();
    let server = Server::start();
    server.put("/image", b"an image", "v1");
    let mut digest = Command::new("sha256sum");
    fs::write(xbed.scratch().join("image"), "an image").unwrap();
    let digest = run(digest.arg(xbed.scratch().join("image"))).ok().stdout;
    let hash = format!("<x:Hash algorithm=\"sha256\">{}</x:Hash>", &digest[..64]);
    let kernel = format!("file://{}", xbed.scratch().join("image").display());
    let job = document(&kernel, &server.uri("/image"), &hash, &["true"]);
    finished(&xbed, &job);
    server.put("/image", b"another!", "v2");
    finished(&xbed, &job);
    assert_eq!(server.did("/image"), [Did::Sent]);
    assert_eq!(
        entries(&xbed)[0]["digest"],
        format!("sha256:{}", &digest[..64])
    );
}

#[test]
fn an_image_larger_than_the_cache_is_used_and_not_kept() {
    let xbed = Xbed::start("sim", &["[cache]", "max-mib = 1"]);
    let server = Server::start();
    server.put("/small", &[b'x'; 4096], "v1");
    server.put("/large", &[b'x'; 2 << 20], "v1");
    let small = xbed.xbe(["cache", "add", &server.uri("/small")]).line();
    finished(&xbed, &simulated(&server.uri("/large")));
    let left: Vec<Value> = entries(&xbed)
        .iter()
        .map(|entry| entry["id"].clone())
        .collect();
    assert_eq!(left, [small]);
    assert_whole(&xbed);
    xbed.assert_nothing_left();
}

#[test]
fn a_package_is_fetched_once_and_unpacked_for_each() {
    let xbed = sim();
    let server = Server::start();
    fs::write(xbed.scratch().join("root.img"), "an image").unwrap();
    let mut pack = Command::new("tar");
    pack.args(["-cz", "-f", "package.tgz", "root.img"]);
    run(pack.current_dir(xbed.scratch())).ok();
    let packed = fs::read(xbed.scratch().join("package.tgz")).unwrap();
    server.put("/package.tgz", &packed, "v1");
    let text = xbed.xbe([
        "run",
        "--print-jsdl",
        "-I",
        &server.uri("/package.tgz"),
        "--",
        "true",
    ]);
    let location = "package.tgz</xsdl:URI>";
    let text = text.ok().stdout;
    assert!(text.contains(location), "{text}");
    let compressed = format!("{location}<xsdl:Compression algorithm=\"tgz\"/>");
    let job = text.replace(location, &compressed);
    finished(&xbed, &job);
    finished(&xbed, &job);
    assert_eq!(server.did("/package.tgz"), [Did::Sent, Did::Unchanged]);
    let entry = &entries(&xbed)[0];
    assert_eq!(
        (&entry["size_bytes"], &entry["compression"]),
        (&packed.len().into(), &Value::Null)
    );
    xbed.assert_nothing_left();
}

#[test]
fn a_killed_xbed_leaves_no_half_entry() {
    const POINTS: [&str; 8] = [
        "cache fetch",
        "cache fetched",
        "cache record",
        "cached",
        "cache link",
        "cache linked",
        "uncache",
        "uncached",
    ];
    for point in POINTS {
        let mut xbed = Xbed::start_with("sim", &[], &[("XBED_DIE_AT", point.into())]);
        assert!(xbed.came_up(), "{}", xbed.log());
        let server = Server::start();
        server.put("/image", &[b'x'; 100_000], "v1");
        let job = simulated(&server.uri("/image"));
        if point.starts_with("uncache") {
            // It is replaced, which removes it.
            finished(&xbed, &job);
            server.put("/image", &[b'y'; 100_000], "v2");
        }
        let path = xbed.document("job.xsdl", &job);
        // It may die before it has answered.
        xbed.xbe(["submit".as_ref(), path.as_os_str()]);
        let begun = Instant::now();
        while !xbed.has_ended() {
            let waited = begun.elapsed();
            assert!(waited < PATIENCE, "{point} was not come by\n{}", xbed.log());
            std::thread::sleep(Duration::from_millis(5));
        }
        xbed.restart(&[]);
        assert!(xbed.came_up(), "{}", xbed.log());
        let tasks = xbed.xbe(["ps", "-a", "--json"]).json();
        let task = tasks.as_array().unwrap().last().unwrap()["id"].clone();
        let status = xbed.wait_for(task.as_str().unwrap(), "Finished");
        assert_eq!(status["exit_code"], 0, "{point}: {status:#}");
        assert_eq!(entries(&xbed).len(), 1, "{point}");
        let id = entries(&xbed)[0]["id"].as_str().unwrap().to_owned();
        let content = fs::read(xbed.data().join("cache").join(id)).unwrap();
        assert_eq!(content.len(), 100_000, "{point}");
        assert_whole(&xbed);
        xbed.assert_nothing_left();
    }
}

#[test]
fn a_full_disk_is_made_room_on() {
    let work = tempfile::Builder::new()
        .prefix("xc")
        .tempdir_in("/tmp")
        .unwrap();
    let disk = work.path().join("d");
    fs::create_dir(&disk).unwrap();
    let mut mount = Command::new("mount");
    let mounted = run(mount
        .args(["-t", "tmpfs", "-o", "size=8m", "tmpfs"])
        .arg(&disk));
    if mounted.code != 0 {
        println!(
            "skipped: no file system can be mounted here: {}",
            mounted.stderr.trim()
        );
        return;
    }
    let _mounted = Mounted(&disk);
    let mut xbed = Xbed::start_on(&disk.join("data"), "sim", &[], &[]);
    assert!(xbed.came_up(), "{}", xbed.log());
    let server = Server::start();
    server.put("/old", &[b'x'; 4 << 20], "v1");
    server.put("/new", &[b'y'; 5 << 20], "v1");
    let old = xbed.xbe(["cache", "add", &server.uri("/old")]).line();
    finished(&xbed, &simulated(&server.uri("/new")));
    assert!(
        entries(&xbed).iter().all(|entry| entry["id"] != old),
        "{:?}",
        entries(&xbed)
    );
    // What is not for the cache has its place, too.
    server.put("/file", &[b'z'; 4 << 20], "v1");
    let source = format!("{}:/data/in", server.uri("/file"));
    xbed.xbe(["run", "-v", &source, "--", "true"]).ok();
    assert_eq!(entries(&xbed).len(), 0);
    xbed.assert_nothing_left();
}

struct Mounted<'a>(&'a Path);

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        let begun = Instant::now();
        // A process that has just ended may still hold it.
        while run(Command::new("umount").arg(self.0)).code != 0 {
            if begun.elapsed() > Duration::from_secs(10) {
                eprintln!("{} stays mounted", self.0.display());
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}
