//! Real guests talk through the switch. Needs `XBEE_KERNEL` (a bzImage) and, if vsock is modular
//! there, `XBEE_MODULES` (its module tree); skipped with a printed reason otherwise.

mod vm;

use std::io::Write;
use std::net::Shutdown;
use std::thread;
use std::time::{Duration, Instant};

use vm::{Boot, Pattern, Switch, eventually, read_all, read_line};

const MIB: u64 = 1 << 20;

#[test]
fn host_and_guest_talk_both_ways() {
    let mut switch = Switch::start();
    let Some(boot) = Boot::new(switch.dir.path()) else {
        return;
    };
    let guest = switch.boot(&boot, 3, "alice");

    // Host to guest: echo, and half-close.
    let mut echo = guest.command("echo");
    echo.write_all(b"hello guest").unwrap();
    echo.shutdown(Shutdown::Write).unwrap();
    assert_eq!(read_all(&mut echo), "hello guest");

    // Guest to host: the guest's connection comes out of a unix socket.
    let listener = guest.listen(5000);
    let mut report = guest.command("dial 2 5000 echo");
    let (mut echo, _) = listener.accept().unwrap();
    assert!(read_line(&mut report).starts_with("connected "));
    echo.write_all(b"hello host").unwrap();
    echo.shutdown(Shutdown::Write).unwrap();
    assert_eq!(read_all(&mut echo), "hello host");
    assert_eq!(read_all(&mut report), "done\n");
}
