//! Commands, files and connections beside the task, against the real agent.

#![allow(clippy::unwrap_used)]

mod common;

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::time::Duration;

use common::{Guest, LIMIT, SECRET, gone};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;
use xbee_agent::protocol::{
    ExitStatus, MakeDirectory, MakeSymlink, MountRoot, StartMode, TerminalSize, code,
};
use xbee_agent::{Agent, Error, ExecSpec, FileMeta, Process, Resume};

fn spec(argv: &[&str]) -> ExecSpec {
    ExecSpec {
        argv: argv.iter().map(|&word| word.to_owned()).collect(),
        ..ExecSpec::default()
    }
}

/// Reads both outputs and waits for the end.
async fn output(mut process: Process) -> (Vec<u8>, Vec<u8>, ExitStatus) {
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    drop(process.stdin.take());
    let mut out = process.stdout.take().unwrap();
    let read_out = out.read_to_end(&mut stdout);
    if let Some(mut err) = process.stderr.take() {
        let both = async { tokio::try_join!(read_out, err.read_to_end(&mut stderr)).unwrap() };
        timeout(LIMIT, both).await.unwrap();
    } else {
        timeout(LIMIT, read_out).await.unwrap().unwrap();
    }
    let status = timeout(LIMIT, process.wait()).await.unwrap().unwrap();
    (stdout, stderr, status)
}

#[tokio::test]
async fn exec_has_three_streams_and_a_status() {
    let guest = Guest::start();
    let (agent, _events) = guest.connect().await;
    let mut process = agent
        .exec(spec(&["sh", "-c", "cat; echo err >&2; exit 6"]))
        .await
        .unwrap();
    let mut stdin = process.stdin.take().unwrap();
    let big = vec![b'x'; 3_000_000];
    let expected = big.clone();
    let writing = tokio::spawn(async move {
        stdin.write_all(&big).await.unwrap();
        stdin.shutdown().await.unwrap();
    });
    let (stdout, stderr, status) = output(process).await;
    writing.await.unwrap();
    assert!(stdout == expected, "{} bytes came back", stdout.len());
    assert_eq!(
        (stderr.as_slice(), status),
        (&b"err\n"[..], ExitStatus::Code(6))
    );

    let error = agent.exec(spec(&["no-such-command"])).await.unwrap_err();
    assert_eq!(error.code(), code::COMMAND_NOT_FOUND);
    assert_eq!(
        error.to_string(),
        "command \"no-such-command\" not found in the guest"
    );
}

#[tokio::test]
async fn a_command_that_does_not_read_blocks_neither_its_writer_nor_others() {
    let guest = Guest::start();
    let (agent, _events) = guest.connect().await;
    // It never reads: its window fills, and everything else goes on.
    let mut stuck = agent.exec(spec(&["sleep", "1000"])).await.unwrap();
    let mut stdin = stuck.stdin.take().unwrap();
    let full = timeout(
        Duration::from_millis(300),
        stdin.write_all(&vec![0; 10_000_000]),
    )
    .await;
    assert!(full.is_err(), "10 MB do not fit into a window");
    let unread = agent
        .exec(spec(&["head", "-c", "10000000", "/dev/zero"]))
        .await
        .unwrap();
    let (stdout, ..) = output(agent.exec(spec(&["echo", "fine"])).await.unwrap()).await;
    assert_eq!(stdout, b"fine\n");
    assert_eq!(output(unread).await.0.len(), 10_000_000);
    stuck.signal(9).await.unwrap();
    assert_eq!(
        stuck.wait().await.unwrap(),
        ExitStatus::Signal {
            signal: 9,
            core_dumped: false
        }
    );
}

#[tokio::test]
async fn a_terminal_has_a_size_that_changes_and_an_end_of_file() {
    let guest = Guest::start();
    let (agent, _events) = guest.connect().await;
    let terminal = Some(TerminalSize {
        rows: 24,
        columns: 80,
    });
    let script = "trap 'stty size' WINCH; tty; stty size; while read line; do echo \"got $line\"; done; echo end";
    let mut process = agent
        .exec(ExecSpec {
            terminal,
            ..spec(&["bash", "-c", script])
        })
        .await
        .unwrap();
    assert!(process.stderr.is_none());
    let mut stdin = process.stdin.take().unwrap();
    let mut stdout = process.stdout.take().unwrap();
    let mut text = String::new();
    let mut buffer = [0; 1024];
    for (send, wanted) in [
        ("", "24 80"),
        ("one\n", "got one"),
        ("resize", "50 132"),
        ("end", "\r\nend"),
    ] {
        match send {
            "resize" => process
                .resize(TerminalSize {
                    rows: 50,
                    columns: 132,
                })
                .await
                .unwrap(),
            "end" => drop(stdin.shutdown().await),
            text => stdin.write_all(text.as_bytes()).await.unwrap(),
        }
        if send == "resize" {
            // bash runs the trap after the next line.
            stdin.write_all(b"two\n").await.unwrap();
        }
        while !text.contains(wanted) {
            let length = timeout(LIMIT, stdout.read(&mut buffer))
                .await
                .unwrap()
                .unwrap();
            assert!(length > 0, "ended without {wanted:?}: {text:?}");
            text.push_str(std::str::from_utf8(&buffer[..length]).unwrap());
        }
    }
    assert!(text.starts_with("/dev/pts/"), "{text:?}");
    assert_eq!(process.wait().await.unwrap(), ExitStatus::Code(0));

    let plain = agent.exec(spec(&["cat"])).await.unwrap();
    let error = plain
        .resize(TerminalSize {
            rows: 1,
            columns: 1,
        })
        .await
        .unwrap_err();
    assert_eq!(error.code(), code::WRONG_STATE);
}

#[tokio::test]
async fn two_hundred_commands_at_once() {
    let guest = Guest::start();
    let (agent, _events) = guest.connect().await;
    let mut running = Vec::new();
    for number in 0..200 {
        // All of them wait for their input, so that all of them run at once.
        let process = agent.exec(spec(&[
            "sh",
            "-c",
            &format!("read x; echo {number} $x; exit {}", number % 7),
        ]));
        running.push(process.await.unwrap());
    }
    let mut ends = tokio::task::JoinSet::new();
    for (number, mut process) in running.into_iter().enumerate() {
        ends.spawn(async move {
            process
                .stdin
                .as_mut()
                .unwrap()
                .write_all(b"go\n")
                .await
                .unwrap();
            (number, output(process).await)
        });
    }
    let mut seen = 0;
    while let Some(end) = ends.join_next().await {
        let (number, (stdout, _, status)) = end.unwrap();
        assert_eq!(String::from_utf8(stdout).unwrap(), format!("{number} go\n"));
        assert_eq!(status, ExitStatus::Code((number % 7) as u8));
        seen += 1;
    }
    assert_eq!(seen, 200);
    let stats = agent.stats().await.unwrap();
    println!(
        "agent after 200 commands: {} KiB resident",
        stats.agent_resident_kib
    );
    // The bound is kept, with words, and what was refused leaves nothing behind.
    let mut many = Vec::new();
    let refusal = loop {
        match agent.exec(spec(&["cat"])).await {
            Ok(process) => many.push(process),
            Err(error) => break error,
        }
    };
    assert!(matches!(refusal, Error::TooMany { .. }), "{refusal:?}");
    assert_eq!(many.len(), 256);
    drop(many);
    let (stdout, ..) = timeout(LIMIT, async {
        loop {
            match agent.exec(spec(&["echo", "again"])).await {
                Ok(process) => break output(process).await,
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        }
    })
    .await
    .unwrap();
    assert_eq!(stdout, b"again\n");
}

#[tokio::test]
async fn a_command_ends_with_its_handle_and_with_the_connection() {
    let guest = Guest::start();
    let (agent, events) = guest.connect().await;
    let first = agent.exec(spec(&["sleep", "1000"])).await.unwrap();
    let pid = first.pid;
    drop(first);
    gone(pid).await;
    drop((agent, events));

    // The connection is cut while the handle is alive.
    let mut stream = guest.accept().await;
    let (ours, mut theirs) = tokio::io::duplex(64 * 1024);
    let wire = tokio::spawn(async move {
        tokio::io::copy_bidirectional(&mut stream, &mut theirs)
            .await
            .unwrap();
    });
    let (agent, _events) = Agent::connect(ours, &SECRET, Resume::default())
        .await
        .unwrap();
    let mut second = agent
        .exec(spec(&["sh", "-c", "sleep 1001 & wait"]))
        .await
        .unwrap();
    wire.abort();
    gone(second.pid).await;
    let error = second.wait().await.unwrap_err();
    assert!(error.is_lost(), "{error:?}");
    // The agent is back.
    guest.connect().await.0.stats().await.unwrap();
}

#[tokio::test]
async fn files_go_in_and_out_whole_sparse_and_owned() {
    let dir = tempfile::tempdir().unwrap();
    let guest = Guest::start_in(Some(dir.path()));
    let (agent, _events) = guest.connect().await;
    // 64 MiB with two islands of data, one of them over the end of a block.
    let mut content = vec![0u8; 64 * 1024 * 1024];
    for (index, byte) in content[10_000_000..13_000_000].iter_mut().enumerate() {
        *byte = (index * 7 + index / 251) as u8;
    }
    content[40_000_001] = 1;
    let meta = FileMeta {
        path: "/a/b/file".into(),
        mode: 0o4750,
        user: Some("1234".into()),
        group: Some("4321".into()),
        size: Some(content.len() as u64),
    };
    let info = agent.put_file(meta, content.as_slice()).await.unwrap();
    assert_eq!(
        (info.size, info.mode, info.uid, info.gid),
        (content.len() as u64, 0o4750, 1234, 4321)
    );
    assert_eq!(info.blake3, *blake3::hash(&content).as_bytes());
    let path = dir.path().join("a/b/file");
    assert!(std::fs::read(&path).unwrap() == content, "contents differ");
    let allocated = std::fs::metadata(&path).unwrap().blocks() * 512;
    assert!(allocated < 8 * 1024 * 1024, "{allocated} bytes allocated");
    let mut back = Vec::new();
    let got = agent
        .get_file("a/b/file", &mut back, u64::MAX)
        .await
        .unwrap();
    assert!(back == content, "contents differ");
    assert_eq!(got, info);

    for content in [&b""[..], b"x", &[0; 70_000]] {
        let meta = FileMeta {
            path: "small".into(),
            mode: 0o600,
            ..FileMeta::default()
        };
        agent.put_file(meta, content).await.unwrap();
        let mut back = Vec::new();
        agent.get_file("/small", &mut back, 70_000).await.unwrap();
        assert!(back == content);
    }
    let error = agent
        .get_file("/small", &mut Vec::new(), 69_999)
        .await
        .unwrap_err();
    assert!(matches!(error, Error::FileTooLarge { .. }), "{error:?}");
    assert_eq!(
        std::fs::read_dir(dir.path().join("a/b")).unwrap().count(),
        1,
        "no temporary file left"
    );
}

#[tokio::test]
async fn file_errors_say_what_and_why() {
    let dir = tempfile::tempdir().unwrap();
    let guest = Guest::start_in(Some(dir.path()));
    let (agent, _events) = guest.connect().await;
    std::fs::write(dir.path().join("plain"), "x").unwrap();
    let put = |path: &str, size| {
        let meta = FileMeta {
            path: path.into(),
            mode: 0o644,
            size,
            ..FileMeta::default()
        };
        agent.put_file(meta, &b"content"[..])
    };
    let mut sink = Vec::new();
    for (error, text) in [
        (
            put("/plain/x", None).await.unwrap_err(),
            "cannot write /plain/x in the guest: Not a directory",
        ),
        (
            put("/", None).await.unwrap_err(),
            "cannot write / in the guest: Is a directory",
        ),
        (
            agent.get_file("/none", &mut sink, 1).await.unwrap_err(),
            "cannot read /none in the guest: No such file or directory",
        ),
        (
            agent.get_file("/", &mut Vec::new(), 1).await.unwrap_err(),
            "cannot read / in the guest: not a regular file",
        ),
    ] {
        let code = match text.contains("No such file") {
            true => code::FILE_NOT_FOUND,
            false => code::FILE_ERROR,
        };
        assert_eq!((error.code(), error.to_string().as_str()), (code, text));
    }
    let error = put("/big", Some(u64::MAX)).await.unwrap_err();
    assert!(
        error
            .to_string()
            .starts_with("cannot write /big in the guest: 18446744073709551615 bytes needed, "),
        "{error}"
    );
    assert_eq!(
        std::fs::read_dir(dir.path()).unwrap().count(),
        1,
        "nothing is left behind"
    );

    // A content that breaks off puts nothing there.
    let broken = tokio_util::io::StreamReader::new(futures_iter(vec![
        Ok(vec![1u8; 200_000]),
        Err(std::io::Error::other("the source broke")),
    ]));
    let meta = FileMeta {
        path: "/partial".into(),
        mode: 0o644,
        ..FileMeta::default()
    };
    let error = agent.put_file(meta, broken).await.unwrap_err();
    assert_eq!(error.code(), "source-unreadable");
    agent.stats().await.unwrap();
    for _ in 0..100 {
        if std::fs::read_dir(dir.path()).unwrap().count() == 1 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("the temporary file is still there");
}

/// A stream of results, for `tokio_util::io::StreamReader`.
fn futures_iter(
    items: Vec<std::io::Result<Vec<u8>>>,
) -> impl futures::Stream<Item = std::io::Result<std::io::Cursor<Vec<u8>>>> + Unpin {
    futures::stream::iter(items.into_iter().map(|item| item.map(std::io::Cursor::new)))
}

#[tokio::test]
async fn trees_stay_inside_the_root() {
    let outside = tempfile::tempdir().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let guest = Guest::start_in(Some(dir.path()));
    let (agent, _events) = guest.connect().await;
    let directory = |path: &str, mode: u32| MakeDirectory {
        path: path.into(),
        mode: Some(mode),
        user: Some("7".into()),
        group: Some("8".into()),
    };
    agent.mkdir(directory("/d/e", 0o2711)).await.unwrap();
    agent.mkdir(directory("/d/e", 0o710)).await.unwrap();
    let meta = std::fs::metadata(dir.path().join("d/e")).unwrap();
    assert_eq!(
        (meta.uid(), meta.gid(), meta.permissions().mode() & 0o7777),
        (7, 8, 0o710)
    );
    let link = |path: &str, target: &str| MakeSymlink {
        path: path.into(),
        target: target.into(),
        user: None,
        group: None,
    };
    // There inside as well, so that the link leads somewhere.
    agent
        .mkdir(directory(outside.path().to_str().unwrap(), 0o700))
        .await
        .unwrap();
    agent
        .symlink(link("/escape", outside.path().to_str().unwrap()))
        .await
        .unwrap();
    agent
        .symlink(link("/up", "../../../../../.."))
        .await
        .unwrap();
    for path in ["/escape/f", "/up/g", "../../h"] {
        let meta = FileMeta {
            path: path.into(),
            mode: 0o644,
            ..FileMeta::default()
        };
        agent.put_file(meta, &b"x"[..]).await.unwrap();
    }
    assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 0);
    assert!(dir.path().join("g").exists() && dir.path().join("h").exists());
    // In place of a link, not through it.
    agent.symlink(link("/escape", "new")).await.unwrap();
    assert_eq!(
        std::fs::read_link(dir.path().join("escape"))
            .unwrap()
            .to_str(),
        Some("new")
    );
    agent.remove("/d").await.unwrap();
    agent.remove("/d").await.unwrap();
    assert!(!dir.path().join("d").exists());
}

#[tokio::test]
async fn a_port_is_reached_half_closed_and_refused() {
    let guest = Guest::start();
    let (agent, _events) = guest.connect().await;
    for address in ["127.0.0.1:0", "[::1]:0"] {
        let listener = tokio::net::TcpListener::bind(address).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            let (mut socket, _) = listener.accept().await.unwrap();
            let mut all = Vec::new();
            socket.read_to_end(&mut all).await.unwrap();
            all.reverse();
            socket.write_all(&all).await.unwrap();
        });
        let mut tunnel = agent.forward(port).await.unwrap();
        let sent: Vec<u8> = (0..1_000_000u32).map(|n| (n / 3) as u8).collect();
        tunnel.write_all(&sent).await.unwrap();
        tunnel.shutdown().await.unwrap();
        let mut back = Vec::new();
        timeout(LIMIT, tunnel.read_to_end(&mut back))
            .await
            .unwrap()
            .unwrap();
        back.reverse();
        assert!(back == sent, "{address}: {} bytes", back.len());
    }
    // Nobody listens where a listener has just been.
    let closed = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = closed.local_addr().unwrap().port();
    drop(closed);
    let error = agent.forward(port).await.unwrap_err();
    assert_eq!(error.code(), code::CONNECTION_REFUSED);
    assert_eq!(
        error.to_string(),
        format!("nothing listens on TCP port {port} in the guest")
    );

    // A tunnel that is dropped is closed in the guest.
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let tunnel = agent
        .forward(listener.local_addr().unwrap().port())
        .await
        .unwrap();
    let (mut socket, _) = listener.accept().await.unwrap();
    drop(tunnel);
    let ended = timeout(LIMIT, socket.read(&mut [0; 1])).await.unwrap();
    assert!(matches!(ended, Ok(0) | Err(_)), "{ended:?}");
}

#[tokio::test]
async fn a_machine_that_is_not_the_agents_is_left_alone() {
    let guest = Guest::start();
    let (agent, _events) = guest.connect().await;
    let errors = [
        agent.mount_root(MountRoot::default()).await.unwrap_err(),
        agent
            .time_sync(std::time::SystemTime::now())
            .await
            .unwrap_err(),
        agent.reseed().await.unwrap_err(),
    ];
    for error in errors {
        assert_eq!(error.code(), code::NOT_PERMITTED, "{error}");
    }
    assert_eq!(
        agent.start(StartMode::Init).await.unwrap_err().code(),
        code::NO_INIT
    );
    assert_eq!(agent.start(StartMode::Auto).await.unwrap().init, None);
    assert_eq!(agent.start(StartMode::Auto).await.unwrap().init, None);
    let stats = agent.stats().await.unwrap();
    assert!(
        stats.memory_total_kib > stats.memory_available_kib && stats.agent_resident_kib > 0,
        "{stats:?}"
    );
    println!("agent: {} KiB resident", stats.agent_resident_kib);
}
