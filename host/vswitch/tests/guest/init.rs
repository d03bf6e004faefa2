//! `/init` of the test guest: loads the vsock modules and serves commands on vsock port 1000.
//!
//! Built by the tests with plain `rustc` for a static target; only std, and the few libc functions
//! std links already. A connection's first line is a command:
//!
//! - `echo`: gives back every byte, then ends its direction.
//! - `source LEN SEED CHUNK`: writes LEN pattern bytes in writes of CHUNK bytes, then closes.
//! - `sink LEN SEED`: reads to the end, answers `ok` or what differed.
//! - `half`: reads to the end, then answers with the number of bytes and closes.
//! - `take LEN`: reads LEN bytes, then answers with their number and closes.
//! - `deaf MS`: does not read for MS milliseconds, then behaves as `half`.
//! - `shutread`: ends its reading direction at once, then says `shut` and closes after a second.
//! - `zeros LEN`: writes LEN zeros in large writes, then closes.
//! - `dial CID PORT COMMAND...`: connects, reports `connected MS` or `errno N MS`, runs COMMAND on
//!   the new connection and reports how that went.
//! - `copy LEN SEED CHUNK COMMAND...`: behind `dial`, to another guest: sends COMMAND and LEN pattern
//!   bytes in writes of CHUNK bytes, ends its direction and reports the answer.
//! - `poweroff LEN SEED`: writes LEN pattern bytes and turns the machine off as soon as the kernel has
//!   had time to hand them to the device.

use std::ffi::{c_char, c_int, c_long, c_uint, c_void};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::time::Instant;

unsafe extern "C" {
    fn socket(domain: c_int, kind: c_int, protocol: c_int) -> c_int;
    fn bind(fd: c_int, addr: *const c_void, len: c_uint) -> c_int;
    fn listen(fd: c_int, backlog: c_int) -> c_int;
    fn accept(fd: c_int, addr: *mut c_void, len: *mut c_uint) -> c_int;
    fn connect(fd: c_int, addr: *const c_void, len: c_uint) -> c_int;
    fn shutdown(fd: c_int, how: c_int) -> c_int;
    fn syscall(number: c_long, ...) -> c_long;
    fn reboot(how: c_int) -> c_int;
    fn signal(number: c_int, handler: usize) -> usize;
}

const AF_VSOCK: c_int = 40;
const SOCK_STREAM: c_int = 1;
const SYS_FINIT_MODULE: c_long = 313;

#[repr(C)]
struct SockaddrVm {
    family: u16,
    reserved: u16,
    port: u32,
    cid: u32,
    zero: [u8; 4],
}

fn address(cid: u32, port: u32) -> SockaddrVm {
    SockaddrVm {
        family: AF_VSOCK as u16,
        reserved: 0,
        port,
        cid,
        zero: [0; 4],
    }
}

fn check(result: c_int) -> io::Result<c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

fn vsock() -> io::Result<File> {
    // SAFETY: no pointers; the descriptor is new and owned by the File from here on.
    unsafe { Ok(File::from_raw_fd(check(socket(AF_VSOCK, SOCK_STREAM, 0))?)) }
}

fn dial(cid: u32, port: u32) -> io::Result<File> {
    let stream = vsock()?;
    let addr = address(cid, port);
    // SAFETY: the pointer and length describe `addr`, which outlives the call.
    check(unsafe {
        connect(
            stream.as_raw_fd(),
            (&raw const addr).cast(),
            size_of::<SockaddrVm>() as c_uint,
        )
    })?;
    Ok(stream)
}

fn end_writing(stream: &File) {
    // SAFETY: no pointers.
    unsafe { shutdown(stream.as_raw_fd(), 1) };
}

/// The byte stream both sides know, by position.
struct Pattern(u64);

impl Pattern {
    fn fill(&mut self, bytes: &mut [u8]) {
        for b in bytes {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            *b = (self.0 >> 24) as u8;
        }
    }
}

fn number(words: &[&str], i: usize) -> io::Result<u64> {
    words
        .get(i)
        .and_then(|w| w.parse().ok())
        .ok_or_else(|| io::Error::other("missing number"))
}

fn run(words: &[&str], stream: &mut File) -> io::Result<String> {
    let mut buffer = vec![0u8; 64 * 1024];
    match words.first().copied() {
        Some("echo") => {
            loop {
                let n = stream.read(&mut buffer)?;
                if n == 0 {
                    break;
                }
                stream.write_all(&buffer[..n])?;
            }
            end_writing(stream);
            Ok("done".into())
        }
        Some("source") => {
            let (mut left, seed, chunk) = (number(words, 1)?, number(words, 2)?, number(words, 3)?);
            let mut pattern = Pattern(seed);
            let mut buffer = vec![0u8; chunk as usize];
            while left > 0 {
                let n = left.min(chunk) as usize;
                pattern.fill(&mut buffer[..n]);
                stream.write_all(&buffer[..n])?;
                left -= n as u64;
            }
            Ok("done".into())
        }
        Some("zeros") => {
            // For throughput: no time goes into a pattern.
            let mut left = number(words, 1)?;
            let buffer = vec![0u8; 1 << 20];
            while left > 0 {
                let n = left.min(buffer.len() as u64) as usize;
                stream.write_all(&buffer[..n])?;
                left -= n as u64;
            }
            Ok("done".into())
        }
        Some("sink") => {
            let (len, seed) = (number(words, 1)?, number(words, 2)?);
            let mut pattern = Pattern(seed);
            let mut expected = vec![0u8; buffer.len()];
            let mut at = 0u64;
            loop {
                let n = stream.read(&mut buffer)?;
                if n == 0 {
                    break;
                }
                pattern.fill(&mut expected[..n]);
                if buffer[..n] != expected[..n] {
                    return Ok(format!("differs in the {n} bytes from {at}"));
                }
                at += n as u64;
            }
            let result = if at == len { "ok".into() } else { format!("{at} bytes") };
            writeln!(stream, "{result}")?;
            Ok(result)
        }
        Some(command @ ("half" | "deaf")) => {
            if command == "deaf" {
                std::thread::sleep(std::time::Duration::from_millis(number(words, 1)?));
            }
            let mut total = 0u64;
            loop {
                let n = stream.read(&mut buffer)?;
                if n == 0 {
                    break;
                }
                total += n as u64;
            }
            writeln!(stream, "{total}")?;
            Ok(format!("{total}"))
        }
        Some("take") => {
            let len = number(words, 1)?;
            let mut total = 0u64;
            while total < len {
                let n = stream.read(&mut buffer)?;
                if n == 0 {
                    break;
                }
                total += n as u64;
            }
            writeln!(stream, "{total}")?;
            Ok(format!("{total}"))
        }
        Some("shutread") => {
            // SAFETY: no pointers.
            unsafe { shutdown(stream.as_raw_fd(), 0) };
            std::thread::sleep(std::time::Duration::from_millis(500));
            writeln!(stream, "shut")?;
            std::thread::sleep(std::time::Duration::from_millis(500));
            Ok("done".into())
        }
        Some("dial") => {
            let (cid, port) = (number(words, 1)? as u32, number(words, 2)? as u32);
            let start = Instant::now();
            match dial(cid, port) {
                Ok(mut out) => {
                    writeln!(stream, "connected {}", start.elapsed().as_millis())?;
                    let result = run(&words[3..], &mut out);
                    drop(out);
                    match result {
                        Ok(text) => writeln!(stream, "{text}")?,
                        Err(e) => writeln!(stream, "failed: {e}")?,
                    }
                }
                Err(e) => writeln!(
                    stream,
                    "errno {} {}",
                    e.raw_os_error().unwrap_or(0),
                    start.elapsed().as_millis()
                )?,
            }
            Ok("done".into())
        }
        Some("copy") => {
            let (mut left, seed, chunk) = (number(words, 1)?, number(words, 2)?, number(words, 3)?);
            writeln!(stream, "{}", words[4..].join(" "))?;
            let mut pattern = Pattern(seed);
            buffer.resize(chunk as usize, 0);
            while left > 0 {
                let n = left.min(buffer.len() as u64) as usize;
                pattern.fill(&mut buffer[..n]);
                stream.write_all(&buffer[..n])?;
                left -= n as u64;
            }
            end_writing(stream);
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            Ok(answer.trim_end().into())
        }
        Some("poweroff") => {
            let mut buffer = vec![0; number(words, 1)? as usize];
            Pattern(number(words, 2)?).fill(&mut buffer);
            stream.write_all(&buffer)?;
            // A worker of the kernel does it, and nothing tells of its end.
            std::thread::sleep(std::time::Duration::from_millis(500));
            // SAFETY: no pointers; LINUX_REBOOT_CMD_POWER_OFF.
            unsafe { reboot(0x4321_fedc) };
            Ok("done".into())
        }
        _ => Err(io::Error::other("unknown command")),
    }
}

fn serve(mut stream: File) -> io::Result<()> {
    let mut line = Vec::new();
    let mut byte = [0u8; 1];
    while stream.read(&mut byte)? == 1 && byte[0] != b'\n' {
        line.push(byte[0]);
    }
    let line = String::from_utf8_lossy(&line).into_owned();
    let words: Vec<&str> = line.split_whitespace().collect();
    run(&words, &mut stream).map(|_| ())
}

fn load_modules() -> io::Result<()> {
    let mut modules: Vec<_> = std::fs::read_dir("/modules")?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .collect();
    modules.sort();
    for module in modules {
        let file = File::open(&module)?;
        // SAFETY: a descriptor, an empty C string and flags, as finit_module(2) wants them.
        let result =
            unsafe { syscall(SYS_FINIT_MODULE, file.as_raw_fd(), c"".as_ptr() as *const c_char, 0) };
        if result != 0 {
            println!("{}: {}", module.display(), io::Error::last_os_error());
        }
    }
    Ok(())
}

fn main() {
    // SAFETY: SIGCHLD and SIGPIPE ignored, no handler runs.
    unsafe { signal(13, 1) };
    if let Err(e) = load_modules().and_then(|()| listen_for_ever()) {
        println!("guest failed: {e}");
    }
    loop {
        std::thread::park();
    }
}

fn listen_for_ever() -> io::Result<()> {
    let listener = vsock()?;
    let addr = address(u32::MAX, 1000);
    // SAFETY: the pointer and length describe `addr`, which outlives the call.
    unsafe {
        check(bind(
            listener.as_raw_fd(),
            (&raw const addr).cast(),
            size_of::<SockaddrVm>() as c_uint,
        ))?;
        check(listen(listener.as_raw_fd(), 128))?;
    }
    println!("guest ready");
    loop {
        // SAFETY: null address and length are allowed; the descriptor is new and owned.
        let stream = unsafe {
            File::from_raw_fd(check(accept(
                listener.as_raw_fd(),
                std::ptr::null_mut(),
                std::ptr::null_mut(),
            ))?)
        };
        std::thread::spawn(move || {
            if let Err(e) = serve(stream) {
                println!("command failed: {e}");
            }
        });
    }
}
