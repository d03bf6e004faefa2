//! A program that its input has taken over tries every door, in each kind of cage and outside of all.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::net::TcpListener;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::{SocketAddr, UnixListener};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use xbee_cage::{Cage, Identity, Namespaces, Parts, Plan};

/// Nobody's, in tests.
const CAGED: u32 = 263_001;
const USER: u32 = 263_002;

/// What a program outside may not have either, by its kernel's settings.
const UNSURE: [&str; 5] = ["read-disks", "bpf", "userfaultfd", "io-uring", "perf"];

/// All that somebody who has taken over a program could want.
struct Prey {
    dir: tempfile::TempDir,
    victim: Child,
    _listeners: (TcpListener, UnixListener, [UnixListener; 3]),
    words: Vec<String>,
}

impl Drop for Prey {
    fn drop(&mut self) {
        self.victim.kill().unwrap();
        self.victim.wait().unwrap();
    }
}

impl Prey {
    /// Everything belongs to `owner`, and its rights let everybody in whom only the cage keeps out.
    fn new(owner: u32) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let open = |path: &Path, mode| {
            fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
            chown(path, Some(owner), Some(owner)).unwrap();
        };
        let path = |name: &str| dir.path().join(name);
        open(dir.path(), 0o755);
        for name in ["own", "other"] {
            fs::create_dir(path(name)).unwrap();
            open(&path(name), 0o755);
            for file in [
                "initramfs.cpio",
                "console.log",
                "domain.json",
                "disk0.qcow2",
            ] {
                let file = path(name).join(file);
                fs::write(&file, "content").unwrap();
                open(&file, 0o666);
            }
        }
        fs::write(path("xbed.db"), "content").unwrap();
        open(&path("xbed.db"), 0o666);
        let sockets = ["api", "switch", "other/vsock"].map(|name| {
            let listener = UnixListener::bind(path(name)).unwrap();
            open(&path(name), 0o777);
            listener
        });
        for program in ["cage", "examples/taken_over"] {
            let copy = path(Path::new(program).file_name().unwrap().to_str().unwrap());
            fs::copy(built(program), &copy).unwrap();
            open(&copy, 0o755);
        }
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let name = format!("xbee-doors-{}", dir.path().display());
        let name_address = SocketAddr::from_abstract_name(&name).unwrap();
        let abstract_socket = UnixListener::bind_addr(&name_address).unwrap();
        let victim = Command::new("sleep")
            .arg("1000")
            .uid(owner)
            .gid(owner)
            .spawn()
            .unwrap();
        let at = |name: &str| path(name).display().to_string();
        let words = [
            ("other", at("other")),
            ("database", at("xbed.db")),
            ("api", at("api")),
            ("switch", at("switch")),
            ("manager", std::process::id().to_string()),
            ("victim", victim.id().to_string()),
            ("tcp", tcp.local_addr().unwrap().port().to_string()),
            ("abstract", name),
        ];
        Self {
            words: words
                .map(|(name, value)| format!("door.{name}={value}"))
                .into(),
            dir,
            victim,
            _listeners: (tcp, abstract_socket, sockets),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Runs the program, in a cage if there is a plan.
    fn try_doors(&self, plan: Option<&Plan>, uid: u32) -> BTreeMap<String, String> {
        let program = self.path("taken_over");
        let mut command = match plan {
            None => Command::new(program),
            Some(plan) => {
                let mut command = Command::new(self.path("cage"));
                command
                    .arg(serde_json::to_string(plan).unwrap())
                    .arg(program);
                command
            }
        };
        let output = command
            .args(&self.words)
            .current_dir(self.path("own"))
            .env_clear()
            .stdin(Stdio::null())
            .uid(uid)
            .gid(uid)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(
            said.contains("all doors tried"),
            "{:?} {said}",
            output.status
        );
        println!("{said}");
        let doors = said
            .lines()
            .filter_map(|line| line.strip_prefix("door ")?.split_once(": "));
        doors
            .map(|(door, is)| (door.to_owned(), is.to_owned()))
            .collect()
    }
}

fn built(name: &str) -> PathBuf {
    // Cargo puts programs above the tests.
    let test = std::env::current_exe().unwrap();
    test.parent().unwrap().parent().unwrap().join(name)
}

fn open(doors: &BTreeMap<String, String>) -> Vec<&str> {
    let open = doors.iter().filter(|(_, is)| *is == "open");
    open.map(|(door, _)| door.as_str()).collect()
}

fn plan(namespaces: Namespaces, landlock: bool, identity: Option<u32>) -> Plan {
    Plan {
        parts: Parts {
            namespaces,
            processes: false,
            landlock,
        },
        identity: identity.map(|id| Identity {
            uid: id,
            gid: id,
            groups: vec![],
        }),
        read: vec!["initramfs.cpio".to_owned()],
        write: vec!["disk0.qcow2".to_owned()],
        open_files_max: 256,
        threads_max: identity.map(|_| 50),
        ..Plan::default()
    }
}

/// Whether the test can run; says why not.
fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        println!("skipped: only root can make the cages of root and of users");
    }
    root
}

#[test]
fn outside_the_doors_are_open() {
    if !is_root() {
        return;
    }
    let prey = Prey::new(0);
    let doors = prey.try_doors(None, 0);
    let shut: Vec<_> = doors
        .iter()
        .filter(|(door, is)| is.starts_with("shut") && !UNSURE.contains(&door.as_str()))
        .collect();
    assert!(shut.is_empty(), "{shut:?}");
    assert!(doors.len() > 40, "{}", doors.len());
}

#[test]
fn each_kind_of_cage_shuts_all_doors() {
    if !is_root() {
        return;
    }
    let found = Cage::find(&built("cage")).unwrap().report;
    println!("{found:?}");
    // Of root, of a user, and of a user on a host without namespaces.
    for (namespaces, caller) in [
        (Namespaces::Own, 0),
        (Namespaces::User, USER),
        (Namespaces::Shared, USER),
    ] {
        println!("--- {namespaces:?}");
        if found.parts.namespaces != Namespaces::Own || !found.parts.landlock {
            println!("skipped: this host has no namespaces or no landlock");
            continue;
        }
        let prey = Prey::new(USER);
        let identity = (caller == 0).then_some(CAGED);
        let doors = prey.try_doors(Some(&plan(namespaces, true, identity)), caller);
        // A limit of threads counts by user, and one with other processes has none without cgroups.
        let left: &[&str] = match identity {
            Some(_) => &[],
            None => &["threads"],
        };
        assert_eq!(open(&doors), left, "{namespaces:?}");
    }
}

#[test]
fn one_with_sockets_has_those_in_its_directory_and_no_more() {
    if !is_root() {
        return;
    }
    let found = Cage::find(&built("cage")).unwrap().report;
    if found.parts.namespaces != Namespaces::Own || !found.parts.landlock {
        println!("skipped: this host has no namespaces or no landlock");
        return;
    }
    // Root's, and so is all that it could want.
    let prey = Prey::new(0);
    let with_sockets = Plan {
        sockets: true,
        read: vec![],
        write: vec![],
        ..plan(Namespaces::Own, true, None)
    };
    let doors = prey.try_doors(Some(&with_sockets), 0);
    assert_eq!(open(&doors), ["socket-here", "threads"]);
}

#[test]
fn each_fence_stands_alone() {
    if !is_root() {
        return;
    }
    let prey = Prey::new(USER);
    // Without landlock, no file of the host's is there all the same.
    let doors = prey.try_doors(Some(&plan(Namespaces::Own, false, Some(USER))), 0);
    let left = open(&doors);
    assert_eq!(left, ["list-parent", "list-root"]);
    let shut = &doors["read-other-domain.json"];
    assert!(shut.contains("No such file"), "{shut}");
}

#[test]
fn what_was_found_and_is_gone_fails_the_start() {
    if !is_root() {
        return;
    }
    let prey = Prey::new(USER);
    let run = |plan: &Plan, uid| {
        let output = Command::new(prey.path("cage"))
            .arg(serde_json::to_string(plan).unwrap())
            .args(["/bin/echo", "not to be seen"])
            .current_dir(prey.path("own"))
            .uid(uid)
            .gid(uid)
            .output()
            .unwrap();
        assert!(
            !output.status.success() && output.stdout.is_empty(),
            "{output:?}"
        );
        String::from_utf8(output.stderr).unwrap()
    };
    // As root's, of a user.
    let said = run(&plan(Namespaces::Own, true, None), USER);
    assert_eq!(
        said,
        "cage: cannot make namespaces: Operation not permitted (os error 1)\n"
    );
    let mut no_file = plan(Namespaces::Own, true, Some(CAGED));
    no_file.read.push("not-there".to_owned());
    let said = run(&no_file, 0);
    assert!(
        said.starts_with("cage: cannot open /") && said.contains("/own/not-there: No such file"),
        "{said}"
    );
    let mut no_group = plan(Namespaces::Own, true, Some(CAGED));
    no_group.cgroups.push("/sys/fs/cgroup/none".into());
    let said = run(&no_group, 0);
    assert!(
        said.starts_with("cage: cannot enter /sys/fs/cgroup/none: "),
        "{said}"
    );
}
