//! Files and ports of the client's machine: sources are sent, results are fetched, ports are forwarded.

use super::*;

/// Bytes that no two blocks have in common, with a hole in between.
fn content() -> Vec<u8> {
    let mut random = xbee_tests::Random::new(7);
    let mut bytes: Vec<u8> = (0..700_000).map(|_| random.below(256) as u8).collect();
    bytes[100_000..400_000].fill(0);
    bytes
}

/// Names in a directory of the data of `xbed`.
fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.collect()
}

#[test]
fn files_of_this_machine_go_there_and_back() {
    let site = Site::new(&["alice", "bob"]);
    let broker = Broker::start(&site);
    let uri = broker.uri();
    let xbed = xbed(&site, &uri);
    site.wait_for("alice", &uri, &xbed);
    let of = |who: &str, args: &[&str]| site.xbe(who, &uri, args.iter().copied());
    let (input, output) = (site.path("in put"), site.path("output"));
    fs::write(&input, content()).unwrap();
    let volume = format!("{}:/data/in", input.display());
    let empty = site.path("empty");
    fs::write(&empty, "").unwrap();
    let nothing = format!("{}:/data/empty", empty.display());
    let result = format!("/data/in:{}", output.display());
    let ran = of(
        "alice",
        &[
            "run",
            "-v",
            &volume,
            "-v",
            &nothing,
            "-o",
            &result,
            "--",
            "cat",
            "/data/empty",
        ],
    );
    assert_eq!((ran.code, ran.stdout.as_str()), (0, ""), "{ran:?}");
    assert!(fs::read(&output).unwrap() == content());
    // What was sent is gone, what is kept is not.
    wait_for(|| names(&xbed.data().join("uploads")).is_empty());
    fs::remove_file(&output).unwrap();
    let task = of("alice", &["ps", "-a", "--json"]).json()[0]["id"].clone();
    let task = task.as_str().unwrap();
    let fetched = of("alice", &["fetch", task]).line();
    assert_eq!(fetched, output.display().to_string());
    assert!(fs::read(&output).unwrap() == content());
    let directory = site.path("elsewhere");
    fs::create_dir(&directory).unwrap();
    let to = directory.to_str().unwrap();
    of("alice", &["fetch", task, "--to", to]).ok();
    assert!(fs::read(directory.join("output")).unwrap() == content());
    let again = of("alice", &["fetch", task, "--to", to]);
    assert_eq!(again.code, 125);
    assert!(again.stderr.contains("exists"), "{again:?}");
    assert_eq!(names(&directory), ["output"]);
    let ran = of("bob", &["fetch", task]);
    assert!(ran.code == 125 && ran.stderr.contains("no task"), "{ran:?}");
    of("alice", &["rm", task]).ok();
    assert!(names(&xbed.data().join("tasks")).is_empty());

    // What is added to, and what stays.
    let print = [
        "run",
        "--print-jsdl",
        "-v",
        &volume,
        "-o",
        &result,
        "--",
        "true",
    ];
    let document = of("alice", &print).ok().stdout;
    let flag = document.rfind("overwrite</").unwrap();
    for (new, is_put) in [("append", true), ("dontOverwrite", false)] {
        let mut document = document.clone();
        document.replace_range(flag..flag + 9, new);
        let path = site.path("job.xsdl");
        fs::write(&path, document).unwrap();
        fs::write(&output, "before").unwrap();
        let ran = of("alice", &["submit", "--wait", path.to_str().unwrap()]);
        let now = fs::read(&output).unwrap();
        match is_put {
            true => assert!(now == [b"before", &content()[..]].concat(), "{ran:?}"),
            false => {
                assert!(
                    ran.code == 125 && ran.stderr.contains("xbe fetch"),
                    "{ran:?}"
                );
                assert_eq!(now, b"before");
            }
        }
    }
    let left = names(site.path("").as_path());
    assert!(!left.iter().any(|name| name.starts_with('.')), "{left:?}");

    // A file that is not there is said before anything is sent.
    let path = site.path("job.xsdl");
    fs::write(&path, document).unwrap();
    fs::remove_file(&input).unwrap();
    let ran = of("alice", &["submit", path.to_str().unwrap()]);
    assert!(
        ran.code == 125 && ran.stderr.contains("cannot read"),
        "{ran:?}"
    );
    // Nothing is left that was sent in vain.
    fs::write(&input, content()).unwrap();
    let ran = of(
        "alice",
        &["submit", "--priority", "1", path.to_str().unwrap()],
    );
    assert!(
        ran.code == 125 && ran.stderr.contains("priority 1"),
        "{ran:?}"
    );
    assert!(names(&xbed.data().join("uploads")).is_empty());
    of("alice", &["check", "--host", path.to_str().unwrap()]).ok();
    assert!(names(&xbed.data().join("uploads")).is_empty());
}

/// An `xbe` that listens on a port, and stays.
struct Waiting {
    port: u16,
    process: Child,
    _errors: BufReader<std::process::ChildStderr>,
}

impl Waiting {
    fn start(mut command: Command) -> Waiting {
        let command = command.stdin(Stdio::null()).stdout(Stdio::null());
        let mut process = command.stderr(Stdio::piped()).spawn().unwrap();
        let mut errors = BufReader::new(process.stderr.take().unwrap());
        let mut line = String::new();
        errors.read_line(&mut line).unwrap();
        let port = line.strip_prefix("xbe: port 127.0.0.1:");
        let port = port
            .and_then(|rest| rest.split(' ').next())
            .unwrap_or(&line);
        Waiting {
            port: port.parse().unwrap_or_else(|_| panic!("{line}")),
            process,
            _errors: errors,
        }
    }

    /// Its exit code, when it has ended by itself.
    fn end(&mut self) -> i32 {
        wait_for(|| self.process.try_wait().unwrap().is_some());
        self.process.wait().unwrap().code().unwrap_or(-1)
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn xbed_with(site: &Site, uri: &str, backend: &'static str) -> Xbed {
    let config = site.config(uri);
    let config: Vec<&str> = config.iter().map(String::as_str).collect();
    Xbed::start(backend, &config)
}

/// What is said back at a port.
fn echo(port: u16, text: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.write_all(text.as_bytes())?;
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut heard = String::new();
    stream.read_to_string(&mut heard)?;
    Ok(heard)
}

#[test]
fn ports_of_this_machine_lead_into_the_domain() {
    if !xbee_tests::has_image("base") {
        return;
    }
    let site = Site::new(&["alice"]);
    let broker = Broker::start(&site);
    let uri = broker.uri();
    let xbed = xbed_with(&site, &uri, "qemu");
    site.wait_for("alice", &uri, &xbed);
    let serve = ["nc", "-ll", "-p", "80", "-e", "cat"];
    let serves = document(&site, "serves.xsdl", &serve);
    let sent = "0123456789abcde\n".repeat(16 << 10);
    let run = [&["run", "-p", "0:80", "--"], &serve[..]].concat();
    for command in [run, vec!["submit", "--wait", "-p", "0:80", &serves]] {
        let mut run = Waiting::start(site.command("alice", &uri, command));
        let port = run.port;
        let tasks = || site.xbe("alice", &uri, ["ps", "--json"]).json();
        wait_for(|| tasks()[0]["substate"] == "Executing");
        // It has only begun.
        wait_for(|| echo(port, &sent).is_ok_and(|heard| heard == sent));
        // A second one that wants the same port is told before anything is submitted.
        let taken = format!("{port}:80");
        let ran = site.xbe("alice", &uri, ["run", "-p", &taken, "--", "true"]);
        assert!(
            ran.code == 125 && ran.stderr.contains("cannot listen"),
            "{ran:?}"
        );
        let list = tasks();
        assert_eq!(list.as_array().unwrap().len(), 1);
        let task = list[0]["id"].as_str().unwrap();
        site.xbe("alice", &uri, ["terminate", task]).ok();
        assert_eq!(run.end(), 125);
    }
    // Nobody would be there for them.
    let ran = site.xbe("alice", &uri, ["submit", "-p", "0:80", &serves]);
    assert!(ran.code == 125 && ran.stderr.contains("--wait"), "{ran:?}");
}

#[test]
fn a_killed_xbed_still_has_what_was_sent_and_leaks_nothing() {
    let site = Site::new(&["alice"]);
    let (_broker, _, uri) = plain_broker(&site);
    let mut xbed = xbed(&site, &uri);
    site.wait_for("alice", &uri, &xbed);
    let (input, output) = (site.path("input"), site.path("output"));
    fs::write(&input, content()).unwrap();
    let volume = format!("{}:/data/in", input.display());
    let result = format!("/data/in:{}", output.display());
    let print = [
        "run",
        "--print-jsdl",
        "-v",
        &volume,
        "-o",
        &result,
        "--",
        "true",
    ];
    let job = site.path("job.xsdl");
    fs::write(&job, site.xbe("alice", &uri, print).ok().stdout).unwrap();
    let job = job.to_str().unwrap();
    let die_at = |xbed: &mut Xbed, point: &str| {
        xbed.kill();
        xbed.restart(&[("XBED_DIE_AT", point.to_owned())]);
        assert!(xbed.came_up());
        site.wait_for("alice", &uri, xbed);
    };
    for point in [
        "upload",
        "uploaded",
        "accept",
        "accepted",
        "fetch",
        "keep",
        "kept",
        "remove upload",
    ] {
        die_at(&mut xbed, point);
        // Its end with its xbed would be long to wait for.
        let client = Follower::start(site.command("alice", &uri, ["submit", job]));
        wait_for(|| xbed.has_ended());
        drop(client);
        let is_accepted = !["upload", "uploaded", "accept"].contains(&point);
        xbed.kill_and_restart();
        site.wait_for("alice", &uri, &xbed);
        let tasks = xbed.xbe(["ps", "-a", "--json"]).json();
        let tasks = tasks.as_array().unwrap();
        assert_eq!(tasks.len(), usize::from(is_accepted), "{point}");
        for task in tasks {
            let task = task["id"].as_str().unwrap();
            let status = xbed.wait_for(task, "Finished");
            assert_eq!(status["exit_code"], 0, "{point}");
            // An upload that came to its end, and of which nobody heard, is there for an hour.
            wait_for(|| names(&xbed.data().join("uploads")).is_empty());
            let _ = fs::remove_file(&output);
            site.xbe("alice", &uri, ["fetch", task]).ok();
            assert!(fs::read(&output).unwrap() == content(), "{point}");
            xbed.assert_nothing_left();
            site.xbe("alice", &uri, ["rm", task]).ok();
        }
        let left = names(&xbed.data().join("uploads"));
        let is_whole = ["uploaded", "accept"].contains(&point);
        assert_eq!(left.len(), usize::from(is_whole), "{point}: {left:?}");
        for file in left {
            assert!(!file.ends_with(".part"), "{point}: {file}");
            fs::remove_file(xbed.data().join("uploads").join(file)).unwrap();
        }
    }
}

#[test]
fn virtual_machines_on_another_machine_have_files_of_this_one() {
    if !xbee_tests::has_image("base") {
        return;
    }
    let site = Site::new(&["alice"]);
    let broker = Broker::start(&site);
    let uri = broker.uri();
    let xbed = xbed_with(&site, &uri, "qemu");
    site.wait_for("alice", &uri, &xbed);
    // Each job of a sweep has its own file, and one in common.
    let (one, two, both) = (site.path("one"), site.path("two"), site.path("both"));
    for (path, text) in [(&one, "first"), (&two, "second"), (&both, "common")] {
        fs::write(path, text).unwrap();
    }
    let out = site.path("out-of-one");
    let (own, common) = (
        format!("{}:/in/own", one.display()),
        format!("{}:/in/both", both.display()),
    );
    let result = format!("/out:{}", out.display());
    let script = "cat /in/own /in/both > /out";
    let print = [
        "run",
        "--print-jsdl",
        "-v",
        &own,
        "-v",
        &common,
        "-o",
        &result,
        "--",
        "sh",
        "-c",
        script,
    ];
    let job = site.path("job.xsdl");
    let document = site.xbe("alice", &uri, print).ok().stdout;
    let sources = [&one, &two];
    let targets = [&out, &site.path("out-of-two")];
    let sweep = format!(
        r#"<s:Sweep xmlns:s="http://schemas.ogf.org/jsdl/2009/03/sweep"
        xmlns:f="http://schemas.ogf.org/jsdl/2009/03/sweep/functions">{}{}</s:Sweep>"#,
        assignment("DataStaging[1]/j:Source", sources),
        assignment("DataStaging[3]/j:Target", targets),
    );
    let end = document.rfind("</jsdl:JobDefinition>").unwrap();
    let (begin, end) = document.split_at(end);
    fs::write(&job, [begin, &sweep, end].concat()).unwrap();
    let ran = site.xbe("alice", &uri, ["submit", "--wait", job.to_str().unwrap()]);
    assert_eq!(ran.code, 0, "{ran:?}\n{}", xbed.log());
    assert_eq!(fs::read_to_string(&out).unwrap(), "firstcommon");
    let second = fs::read_to_string(site.path("out-of-two")).unwrap();
    assert_eq!(second, "secondcommon");
    xbed.assert_nothing_left();
}

#[test]
fn a_server_on_another_machine_serves_here_and_takes_ssh() {
    if !xbee_tests::has_image("server") {
        return;
    }
    let site = Site::new(&["alice"]);
    let broker = Broker::start(&site);
    let uri = broker.uri();
    let xbed = xbed_with(&site, &uri, "qemu");
    site.wait_for("alice", &uri, &xbed);
    let pages = site.path("pages");
    fs::create_dir(&pages).unwrap();
    fs::write(pages.join("index.html"), "<h1>served from a domain</h1>\n").unwrap();
    let archive = site.path("content.tar.bz2");
    let mut tar = Command::new("tar");
    run(tar.arg("-cjf").arg(&archive).arg("-C").arg(&pages).arg(".")).ok();
    let example = fs::read_to_string(xbee_tests::root().join("examples/server.xsdl")).unwrap();
    let document = example.replace("/srv/xenbee/content.tar.bz2", archive.to_str().unwrap());
    assert_ne!(document, example);
    let path = site.path("server.xsdl");
    fs::write(&path, document).unwrap();
    let submit = ["submit", "--wait", "-p", "0:80", path.to_str().unwrap()];
    let mut submit = Waiting::start(site.command("alice", &uri, submit));
    let task = || site.xbe("alice", &uri, ["ps", "--json"]).json()[0].clone();
    wait_for(|| task()["substate"] == "Executing");
    // nginx is started by the image's init, which has only begun.
    let mut curl = Command::new("curl");
    curl.args(["-sS", "--fail", "--retry", "60", "--retry-delay", "1"]);
    curl.arg("--retry-all-errors");
    let page = run(curl.arg(format!("http://127.0.0.1:{}/", submit.port))).ok();
    assert_eq!(page.stdout, "<h1>served from a domain</h1>\n");
    let task = task()["id"].as_str().unwrap().to_owned();
    let ssh = |command: &[&str]| {
        let args = ["ssh", &task, "--"].into_iter();
        site.xbe("alice", &uri, args.chain(command.iter().copied()))
    };
    let hostname = ssh(&["hostname"]);
    assert_eq!(
        hostname.stdout.trim(),
        format!("xbee-{}", &task[..8]),
        "{hostname:?}"
    );
    assert_eq!(ssh(&["exit", "9"]).code, 9);
    site.xbe("alice", &uri, ["terminate", &task]).ok();
    assert_eq!(submit.end(), 125);
    xbed.assert_nothing_left();
}

/// The URIs of one element, job by job.
fn assignment(element: &str, files: [&PathBuf; 2]) -> String {
    let [one, two] = files.map(|file| format!("<f:Value>file://{}</f:Value>", file.display()));
    format!(
        r#"<s:Assignment><s:DocumentNode>
        <s:NamespaceBinding ns="http://schemas.ggf.org/jsdl/2005/11/jsdl" prefix="j"/>
        <s:Match>/j:JobDefinition/j:JobDescription/j:{element}/j:URI</s:Match>
        </s:DocumentNode><f:Values>{one}{two}</f:Values></s:Assignment>"#
    )
}
