//! Figures of vsock streams: through this switch, through `vhost-device-vsock`, and through a unix socket alone.
//! Prints rows of a table for `make bench`.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::vm::{Boot, Guest, Switch, eventually};

const MIB: u64 = 1 << 20;
/// Bytes of one measurement of throughput.
const LEN: u64 = 64 * MIB;
/// Round trips of one measurement, of which the median counts.
const TRIPS: usize = 500;
/// Each is measured once a round, in turn.
const ROUNDS: usize = 5;
/// Longer without a byte is no figure.
const PATIENCE: Duration = Duration::from_secs(60);

/// MiB/s out of the guest and into it, and seconds of a round trip.
type Figures = [f64; 3];

fn measure(open: impl Fn(&str) -> io::Result<UnixStream>) -> io::Result<Figures> {
    let mut buffer = vec![0; MIB as usize];
    let command = |command: &str| {
        let stream = open(command)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        io::Result::Ok(stream)
    };
    let rate = |start: Instant| (LEN / MIB) as f64 / start.elapsed().as_secs_f64();

    let mut stream = command(&format!("zeros {LEN}"))?;
    let start = Instant::now();
    let mut got = 0;
    loop {
        match stream.read(&mut buffer)? {
            0 => break,
            n => got += n as u64,
        }
    }
    if got != LEN {
        return Err(io::Error::other(format!("{got} bytes of {LEN} came")));
    }
    let out = rate(start);

    // Not by its end: the other program loses the answer then.
    let mut stream = command(&format!("take {LEN}"))?;
    let start = Instant::now();
    for _ in 0..LEN / MIB {
        stream.write_all(&buffer)?;
    }
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    if answer != format!("{LEN}\n") {
        return Err(io::Error::other(format!("{answer:?} came")));
    }
    let into = rate(start);

    let mut stream = command("echo")?;
    let mut trips = Vec::with_capacity(TRIPS);
    for _ in 0..TRIPS {
        let start = Instant::now();
        stream.write_all(b"x")?;
        stream.read_exact(&mut buffer[..1])?;
        trips.push(start.elapsed().as_secs_f64());
    }
    Ok([out, into, median(&mut trips)])
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// What a guest does, done by a thread.
fn alone(command: &str) -> io::Result<UnixStream> {
    let (near, mut far) = UnixStream::pair()?;
    let command = command.to_owned();
    std::thread::spawn(move || {
        let mut buffer = vec![0; MIB as usize];
        if command.starts_with("zeros") {
            for _ in 0..LEN / MIB {
                far.write_all(&buffer)?;
            }
            return Ok(());
        }
        let mut got = 0;
        loop {
            let n = far.read(&mut buffer)?;
            if n == 0 {
                break;
            }
            got += n;
            if command.starts_with("take") && got as u64 == LEN {
                break;
            }
            if command == "echo" {
                far.write_all(&buffer[..n])?;
            }
        }
        if command.starts_with("take") {
            writeln!(far, "{got}")?;
        }
        io::Result::Ok(())
    });
    Ok(near)
}

fn of_guest(guest: &Guest, command: &str) -> io::Result<UnixStream> {
    let mut stream = UnixStream::connect(&guest.uds)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(b"CONNECT 1000\n")?;
    let mut byte = [0];
    while byte != *b"\n" {
        stream.read_exact(&mut byte)?;
    }
    writeln!(stream, "{command}")?;
    Ok(stream)
}

/// The other program; ended when dropped.
struct Other(Child);

impl Drop for Other {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        self.0.wait().unwrap();
    }
}

#[test]
#[ignore = "measures: make bench"]
fn streams_beside_those_of_others() {
    let mut switch = Switch::start();
    let Some(boot) = Boot::new(switch.dir.path()) else {
        return;
    };
    let ours = switch.boot(&boot, 3, "alice");
    let other = std::env::var_os("VHOST_DEVICE_VSOCK").map(|program| {
        let spec = switch.spec(4, "other");
        let child = Command::new(PathBuf::from(program))
            .args(["--guest-cid", "4", "--socket"])
            .arg(&spec.vhost_socket)
            .arg("--uds-path")
            .arg(&spec.uds)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let program = Other(child);
        eventually("it listens", || spec.vhost_socket.exists());
        (Guest::start(&boot, &spec), program)
    });
    let mut rows: Vec<(&str, Vec<Figures>, Option<io::Error>)> = vec![
        ("`vswitch`", vec![], None),
        ("`vhost-device-vsock`", vec![], None),
        ("a unix socket, no guest", vec![], None),
    ];
    for _ in 0..ROUNDS {
        for (index, (_, figures, error)) in rows.iter_mut().enumerate() {
            let measured = match (index, &other) {
                (0, _) => measure(|command| of_guest(&ours, command)),
                (1, Some((guest, _))) if error.is_none() => {
                    measure(|command| of_guest(guest, command))
                }
                (1, _) => continue,
                _ => measure(alone),
            };
            match measured {
                Ok(measured) => figures.push(measured),
                Err(failed) => *error = Some(failed),
            }
        }
    }
    for (name, figures, error) in &rows {
        if let Some(error) = error {
            println!("| {name} | fails: {error} | | |");
        } else if !figures.is_empty() {
            let [out, into, trip] =
                [0, 1, 2].map(|at| median(&mut figures.iter().map(|f| f[at]).collect::<Vec<_>>()));
            println!("| {name} | {out:.0} | {into:.0} | {:.0} |", trip * 1e6);
        }
    }
    assert!(rows[0].2.is_none(), "{:?}", rows[0].2);
}
