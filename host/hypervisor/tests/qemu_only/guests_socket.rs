//! The socket by which programs of the host reach guests.

use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use xbee_hypervisor::Hypervisor;

use super::super::support::{Fixture, Guest, LIMIT, READY};

/// Listens for guests, and is answered.
fn listen(socket: &Path) -> UnixStream {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream.write_all(b"LISTEN 7400\n").unwrap();
    let mut answer = [0; 8];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"OK 7400\n");
    stream
}

fn is_open(stream: &UnixStream) -> bool {
    stream.set_nonblocking(true).unwrap();
    let read = { stream }.read(&mut [0]);
    stream.set_nonblocking(false).unwrap();
    matches!(read, Err(error) if error.kind() == std::io::ErrorKind::WouldBlock)
}

fn ends(stream: &UnixStream) {
    assert_eq!({ stream }.read(&mut [0]).unwrap(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn host_programs_are_served_over_restarts_as_long_as_the_operator_says() {
    let Some(fixture) = Fixture::qemu() else {
        return;
    };
    let socket = fixture.path("guests/socket");
    let open = async |socket: Option<&Path>| -> Box<dyn Hypervisor> {
        fixture.open_guests_socket(socket).await.unwrap()
    };
    let hypervisor = open(Some(&socket)).await;
    let mode = |path: &Path| std::fs::metadata(path).unwrap().mode() & 0o777;
    assert_eq!(mode(socket.parent().unwrap()), 0o755);
    assert_eq!(mode(&socket), 0o666);
    let program = listen(&socket);
    let spec = fixture.run(&*hypervisor, Guest::Idle).await;
    fixture.wait_console(&*hypervisor, spec.id, READY).await;

    // The next manager finds it served, by the switch that goes on.
    let inode = std::fs::metadata(&socket).unwrap().ino();
    drop(hypervisor);
    assert!(is_open(&program));
    let hypervisor = open(Some(&socket)).await;
    assert_eq!(std::fs::metadata(&socket).unwrap().ino(), inode);
    assert!(is_open(&program));

    // Another place; then none.
    drop(hypervisor);
    let other = fixture.path("guests/other");
    let hypervisor = open(Some(&other)).await;
    ends(&program);
    let program = listen(&other);
    drop(hypervisor);
    let hypervisor = open(None).await;
    ends(&program);
    drop(hypervisor);

    // The name goes with the switch, for want of domains.
    let hypervisor = open(Some(&socket)).await;
    let program = listen(&socket);
    hypervisor.destroy(spec.id).await.unwrap();
    assert!(is_open(&program));
    drop(hypervisor);
    ends(&program);
    let deadline = Instant::now() + LIMIT;
    while socket.exists() {
        assert!(Instant::now() < deadline, "the socket is still there");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_socket_for_guests_is_not_put_where_others_could_be() {
    let Some(fixture) = Fixture::qemu() else {
        return;
    };
    let refused = async |path: &Path| {
        let error = fixture.open_guests_socket(Some(path)).await.err().unwrap();
        assert_eq!(error.code(), "guests-socket", "{error}");
        let text = format!(
            "cannot serve the socket for guests {} (`guests-socket`)",
            path.display()
        );
        assert_eq!(error.to_string(), text);
        std::error::Error::source(&error).unwrap().to_string()
    };
    let file = fixture.path("file");
    std::fs::write(&file, "precious").unwrap();
    let text = "something else is there: move it away or use another path";
    assert_eq!(refused(&file).await, text);
    assert_eq!(std::fs::read(&file).unwrap(), b"precious");

    let taken = fixture.path("taken");
    let _listener = UnixListener::bind(&taken).unwrap();
    let text = "another process serves it, perhaps another xbed's switch: use another path";
    assert_eq!(refused(&taken).await, text);

    let everybodys = fixture.path("everybodys");
    std::fs::create_dir(&everybodys).unwrap();
    let all = std::fs::Permissions::from_mode(0o1777);
    std::fs::set_permissions(&everybodys, all).unwrap();
    let text = "its directory must belong to root or to xbed's user, who alone may write to it";
    assert_eq!(refused(&everybodys.join("socket")).await, text);

    let text = "it must be an absolute path";
    assert_eq!(refused(Path::new("socket")).await, text);
    refused(&fixture.path("none/none/socket")).await;
    refused(&fixture.path(&"x".repeat(120))).await;
    // The switch is none the worse.
    let hypervisor = fixture.open_guests_socket(None).await.unwrap();
    let spec = fixture.run(&*hypervisor, Guest::Idle).await;
    hypervisor.destroy(spec.id).await.unwrap();
}
