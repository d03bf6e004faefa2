//! A QEMU that its guest has taken over: it tries every door, and says of each on its standard error whether it was open.
//!
//! Where to look is told by words `door.NAME=VALUE`, which may be on the guest's kernel's command line. Of what must
//! be shut in the cage much is open to it outside, where it is run too: so the tests know that they look at doors.

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::net::TcpStream;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::time::Duration;

/// More threads than any domain here may have.
const THREADS: usize = 200;

type Tried = io::Result<()>;

struct Targets(Vec<String>);

impl Targets {
    fn get(&self, name: &str) -> &str {
        let mark = format!("door.{name}=");
        let mut words = self.0.iter();
        words
            .find_map(|word| word.strip_prefix(&mark))
            .unwrap_or("/nowhere")
    }

    fn number(&self, name: &str) -> i64 {
        self.get(name).parse().unwrap_or(0)
    }
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if args == ["--version"] {
        println!("QEMU emulator version 0.0 (taken over)");
        return;
    }
    let words = args.iter().flat_map(|arg| arg.split(' '));
    let at = Targets(words.map(str::to_owned).collect());
    files(&at);
    sockets(&at);
    processes(&at);
    kernel();
    say("threads", threads());
    // Last, for this may be its end.
    if at.number("memory") > 0 {
        say("memory", memory(at.number("memory") as usize));
    }
    eprintln!("all doors tried");
    std::process::exit(3);
}

fn say(door: &str, tried: Tried) {
    match tried {
        Ok(()) => eprintln!("door {door}: open"),
        // Whatever this kernel has not is no door.
        Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => eprintln!("door {door}: none"),
        Err(error) => eprintln!("door {door}: shut ({error})"),
    }
}

fn files(at: &Targets) {
    let read = |path: &str| File::open(path).map(drop);
    let write = |path: &str| File::options().append(true).open(path).map(drop);
    let make = |path: &str| {
        File::create_new(path)?;
        fs::remove_file(path)
    };
    say("read-shadow", read("/etc/shadow"));
    say("read-passwd", read("/etc/passwd"));
    say("read-shell", read("/bin/sh"));
    say("list-root", fs::read_dir("/").map(drop));
    say("list-parent", fs::read_dir("..").map(drop));
    for name in [
        "initramfs.cpio",
        "console.log",
        "domain.json",
        "disk0.qcow2",
    ] {
        let path = format!("{}/{name}", at.get("other"));
        say(&format!("read-other-{name}"), read(&path));
        say(&format!("write-other-{name}"), write(&path));
    }
    say("read-database", read(at.get("database")));
    say("write-database", write(at.get("database")));
    say(
        "read-manager",
        read(&format!("/proc/{}/status", at.get("manager"))),
    );
    say(
        "read-other-memory",
        read(&format!("/proc/{}/mem", at.get("victim"))),
    );
    say(
        "make-in-tmp",
        make(&format!("/tmp/taken-over-{}", std::process::id())),
    );
    say("make-here", make("made-by-taken-over"));
    say("write-record", write("domain.json"));
    say(
        "read-disks",
        read("/dev/vda")
            .or_else(|_| read("/dev/mem"))
            .or_else(|_| read("/dev/kmsg")),
    );
}

fn sockets(at: &Targets) {
    let unix = |path: &str| UnixStream::connect(path).map(drop);
    say("connect-manager", unix(at.get("api")));
    say("connect-switch", unix(at.get("switch")));
    say(
        "connect-other-vsock",
        unix(&format!("{}/vsock", at.get("other"))),
    );
    let own = "socket-of-taken-over";
    let made = UnixListener::bind(own).and_then(|_listener| {
        unix(own)?;
        fs::remove_file(own)
    });
    say("socket-here", made);
    let name = SocketAddr::from_abstract_name(at.get("abstract"));
    say(
        "connect-abstract",
        name.and_then(|name| UnixStream::connect_addr(&name))
            .map(drop),
    );
    let address = ([127, 0, 0, 1], at.number("tcp") as u16).into();
    say(
        "connect-loopback",
        TcpStream::connect_timeout(&address, Duration::from_secs(5)).map(drop),
    );
    let icmp = libc::IPPROTO_ICMP;
    for (door, family, kind, protocol) in [
        ("socket-inet", libc::AF_INET, libc::SOCK_DGRAM, 0),
        ("socket-raw", libc::AF_INET, libc::SOCK_RAW, icmp),
        ("socket-packet", libc::AF_PACKET, libc::SOCK_RAW, 0),
        ("socket-netlink", libc::AF_NETLINK, libc::SOCK_RAW, 0),
    ] {
        // SAFETY: numbers only.
        say(
            door,
            check(unsafe { libc::socket(family, kind, protocol) }.into()),
        );
    }
}

fn processes(at: &Targets) {
    // Signal 0 does nothing, and what is seized goes on.
    for (door, pid) in [
        ("manager", at.number("manager")),
        ("other", at.number("victim")),
    ] {
        say(
            &format!("signal-{door}"),
            call(libc::SYS_kill, [pid, 0, 0, 0, 0]),
        );
        say(
            &format!("pidfd-{door}"),
            call(libc::SYS_pidfd_open, [pid, 0, 0, 0, 0]),
        );
        say(
            &format!("tgkill-{door}"),
            call(libc::SYS_tgkill, [pid, pid, 0, 0, 0]),
        );
    }
    let victim = at.number("victim");
    say(
        "trace-other",
        call(
            libc::SYS_ptrace,
            [libc::PTRACE_SEIZE.into(), victim, 0, 0, 0],
        ),
    );
    say("fork", fork());
    // With other numbers and in other ways for the same.
    say(
        "clone3",
        call(libc::SYS_clone3, [0; 5]).or_else(|error| match error.raw_os_error() {
            // What it is asked for makes no sense, but it is there to say so.
            Some(libc::EINVAL) => Ok(()),
            _ => Err(error),
        }),
    );
}

/// A process that ends at once.
fn fork() -> Tried {
    // SAFETY: the child makes no call but the one that ends it.
    unsafe {
        let child = libc::fork();
        if child == 0 {
            libc::_exit(0);
        }
        check(child.into())?;
        check(libc::waitpid(child, std::ptr::null_mut(), 0).into())
    }
}

fn kernel() {
    // SAFETY: the path and the kind are strings that outlive the call.
    let mounted = unsafe {
        libc::mount(
            c"t".as_ptr(),
            c".".as_ptr(),
            c"tmpfs".as_ptr(),
            0,
            std::ptr::null(),
        )
    };
    say("mount", check(mounted.into()));
    if mounted == 0 {
        // SAFETY: as above.
        unsafe { libc::umount2(c".".as_ptr(), libc::MNT_DETACH) };
    }
    let device = CString::from(c"made-by-taken-over-too");
    // SAFETY: as above.
    let made = unsafe { libc::mknod(device.as_ptr(), libc::S_IFCHR | 0o600, libc::makedev(1, 1)) };
    say("make-device", check(made.into()));
    if made == 0 {
        let _ = fs::remove_file("made-by-taken-over-too");
    }
    let mut uring = [0u8; 120];
    let map = [2u32, 4, 4, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let mut perf = [0u64; 16];
    // A software event (linux/perf_event.h: type 1, size 64).
    perf[0] = 1 | 64 << 32;
    for (door, number, args) in [
        ("become-root", libc::SYS_setresuid, [0; 5]),
        (
            "namespaces",
            libc::SYS_unshare,
            [libc::CLONE_NEWUTS.into(), 0, 0, 0, 0],
        ),
        ("keys", libc::SYS_keyctl, [0, -3, 1, 0, 0]),
        ("bpf", libc::SYS_bpf, [0, map.as_ptr() as i64, 64, 0, 0]),
        ("userfaultfd", libc::SYS_userfaultfd, [0; 5]),
        (
            "io-uring",
            libc::SYS_io_uring_setup,
            [1, uring.as_mut_ptr() as i64, 0, 0, 0],
        ),
        (
            "perf",
            libc::SYS_perf_event_open,
            [perf.as_ptr() as i64, 0, -1, -1, 0],
        ),
        ("kernel-log", libc::SYS_syslog, [10, 0, 0, 0, 0]),
        ("shared-memory", libc::SYS_shmget, [0, 4096, 0o600, 0, 0]),
        ("x32", libc::SYS_getpid | 0x4000_0000, [0; 5]),
        // The last: it takes away what root has outside.
        (
            "user-namespace",
            libc::SYS_unshare,
            [libc::CLONE_NEWUSER.into(), 0, 0, 0, 0],
        ),
    ] {
        say(door, call(number, args));
    }
}

/// So many threads that wait, all at once.
fn threads() -> Tried {
    let mut waiting = vec![];
    for _ in 0..THREADS {
        let thread = std::thread::Builder::new().stack_size(64 << 10);
        waiting.push(thread.spawn(std::thread::park)?);
    }
    Ok(())
}

fn memory(bytes: usize) -> Tried {
    // SAFETY: a new mapping, of which every page is written to and nothing read.
    unsafe {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let kind = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE;
        let at = libc::mmap(std::ptr::null_mut(), bytes, access, kind, -1, 0);
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        libc::munmap(at, bytes);
    }
    Ok(())
}

fn call(number: libc::c_long, args: [i64; 5]) -> Tried {
    let [a, b, c, d, e] = args;
    // SAFETY: pointers among the arguments are to what the caller holds, of the size that the call takes.
    check(unsafe { libc::syscall(number, a, b, c, d, e) })
}

fn check(returned: libc::c_long) -> Tried {
    match returned {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}
