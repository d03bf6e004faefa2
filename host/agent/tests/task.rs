//! Tasks, against the real agent.

#![allow(clippy::unwrap_used)]

mod common;

use std::time::{Duration, Instant};

use common::{Guest, LIMIT, finish, gone, run, shell, task};
use tokio::sync::mpsc;
use tokio::time::timeout;
use xbee_agent::protocol::{
    EndCause, ExitStatus, Limits, OUTPUT_WINDOW_BYTES, OutputStream, ResumePoint, Variable, code,
};
use xbee_agent::{Event, Resume};

/// The rest of a task's standard output, and how it ended. A shell may tell on standard error of its
/// `sleep`, which a signal to all of the task has reached too.
async fn the_rest(events: &mut mpsc::Receiver<Event>) -> (Vec<u8>, ExitStatus) {
    let mut said = Vec::new();
    loop {
        match events.recv().await.unwrap() {
            Event::Output {
                data,
                stream: OutputStream::Stdout,
                ..
            } => said.extend_from_slice(&data),
            Event::Output { .. } => {}
            Event::Exited { exited, .. } => return (said, exited.status),
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn output_exit_code_and_environment() {
    let guest = Guest::start();
    let (agent, mut events) = guest.connect().await;
    assert_eq!(agent.domain(), xbee_agent::protocol::Uuid::from_u128(42));
    let mut task = shell("echo out $GREETING $(pwd) $HOME; echo err >&2; exit 3");
    task.environment.push(Variable {
        name: "GREETING".into(),
        value: "hello world".into(),
    });
    task.working_directory = Some("/usr".into());
    let outcome = run(&agent, &mut events, task).await;
    assert_eq!(outcome.text(), "out hello world /usr /root\n");
    assert_eq!(outcome.stderr, b"err\n");
    let exited = outcome.end.unwrap();
    assert_eq!((exited.status, exited.cause), (ExitStatus::Code(3), None));
    assert_eq!((exited.stdout_bytes, exited.stderr_bytes), (27, 4));
    assert!(exited.max_resident_kib > 100, "{exited:?}");
}

#[tokio::test]
async fn signals_are_told_apart_from_exit_codes() {
    let guest = Guest::start();
    let (agent, mut events) = guest.connect().await;
    let outcome = run(&agent, &mut events, shell("kill -9 $$")).await;
    assert_eq!(
        outcome.end.unwrap().status,
        ExitStatus::Signal {
            signal: 9,
            core_dumped: false
        }
    );

    let task = shell("trap 'echo got it; exit 5' USR1; echo ready; while :; do sleep 0.01; done");
    let conversation = task.conversation;
    agent.execute(task).await.unwrap();
    // The signal is sent only when the trap is set.
    match events.recv().await.unwrap() {
        Event::Output { data, .. } => assert_eq!(data, b"ready\n"),
        other => panic!("{other:?}"),
    }
    agent.signal(conversation, 10).await.unwrap();
    assert_eq!(
        the_rest(&mut events).await,
        (b"got it\n".to_vec(), ExitStatus::Code(5))
    );
    assert_eq!(
        agent.signal(conversation, 10).await.unwrap_err().code(),
        code::NOT_FOUND
    );
}

#[tokio::test]
async fn what_cannot_be_started_says_why() {
    let guest = Guest::start();
    let (agent, mut events) = guest.connect().await;
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    std::fs::write(at("plain"), "text").unwrap();
    std::fs::write(at("script"), "#!/no/such/interpreter\n").unwrap();
    let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(at("script"), executable).unwrap();

    let mut in_nowhere = shell("true");
    in_nowhere.working_directory = Some("/no/where".into());
    let mut as_nobody = shell("true");
    as_nobody.user = Some("no-such-user".into());
    let mut from_nothing = shell("true");
    from_nothing.stdin = Some("/no/such/file".into());
    for (task, code, text) in [
        (
            task(&["no-such-command", "x"]),
            code::COMMAND_NOT_FOUND,
            "command \"no-such-command\" not found in the guest".to_owned(),
        ),
        (
            task(&["/no/such"]),
            code::COMMAND_NOT_FOUND,
            "command \"/no/such\" not found in the guest".into(),
        ),
        (
            task(&[&at("plain")]),
            code::COMMAND_NOT_EXECUTABLE,
            format!(
                "cannot execute {:?} in the guest: Permission denied",
                at("plain")
            ),
        ),
        (
            task(&[&at("script")]),
            code::COMMAND_NOT_EXECUTABLE,
            format!(
                "cannot execute {:?} in the guest: the interpreter or loader that it names is not there",
                at("script")
            ),
        ),
        (
            in_nowhere,
            code::BAD_WORKING_DIRECTORY,
            "cannot enter the working directory /no/where in the guest: No such file or directory"
                .into(),
        ),
        (
            as_nobody,
            code::UNKNOWN_USER,
            "user \"no-such-user\" is not in the guest's /etc/passwd".into(),
        ),
        (
            from_nothing,
            code::BAD_STANDARD_STREAM,
            "cannot read /no/such/file in the guest as user root: No such file or directory".into(),
        ),
        (task(&[]), code::BAD_REQUEST, "no command given".into()),
    ] {
        let failure = run(&agent, &mut events, task).await.end.unwrap_err();
        assert_eq!(
            (failure.code.as_str(), failure.message.as_str()),
            (code, text.as_str())
        );
    }
    // The exit code that shells use for this is a task's own business.
    let outcome = run(&agent, &mut events, shell("exit 127")).await;
    assert_eq!(outcome.end.unwrap().status, ExitStatus::Code(127));
}

#[tokio::test]
async fn a_command_is_found_along_path_and_a_script_needs_no_first_line() {
    let guest = Guest::start();
    let (agent, mut events) = guest.connect().await;
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("job"), "echo \"$0 $1\"").unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(dir.path().join("job"), mode).unwrap();
    let mut task = task(&["job", "a b"]);
    let path = format!("/nowhere:{}", dir.path().display());
    task.environment.push(Variable {
        name: "PATH".into(),
        value: path,
    });
    let outcome = run(&agent, &mut events, task).await;
    assert_eq!(
        outcome.text(),
        format!("{}/job a b\n", dir.path().display())
    );
}

#[tokio::test]
async fn user_umask_files_and_limits() {
    let guest = Guest::start();
    let (agent, mut events) = guest.connect().await;
    let dir = tempfile::tempdir().unwrap();
    std::os::unix::fs::chown(dir.path(), Some(65534), Some(65534)).unwrap();
    std::fs::write(dir.path().join("in"), "from the file\n").unwrap();
    let mut task = shell("cat; id -un; umask; ulimit -n; ulimit -c; echo e >&2");
    task.working_directory = Some(dir.path().to_str().unwrap().into());
    task.stdin = Some("in".into());
    task.stdout = Some("out".into());
    task.stderr = Some("out".into());
    task.user = Some("nobody".into());
    task.umask = Some(0o027);
    task.limits = Limits {
        open_files: Some(99),
        core_bytes: Some(0),
        ..Limits::default()
    };
    let outcome = run(&agent, &mut events, task).await;
    assert_eq!(outcome.text(), "from the file\nnobody\n0027\n99\n0\n");
    assert_eq!(outcome.end.unwrap().status, ExitStatus::Code(0));
    let out = dir.path().join("out");
    let mut lines: Vec<String> = std::fs::read_to_string(&out)
        .unwrap()
        .lines()
        .map(String::from)
        .collect();
    lines.sort();
    assert_eq!(
        lines,
        ["0", "0027", "99", "e", "from the file", "nobody"],
        "both streams, neither overwritten"
    );
    let meta = std::fs::metadata(&out).unwrap();
    use std::os::unix::fs::MetadataExt;
    assert_eq!((meta.uid(), meta.mode() & 0o777), (65534, 0o640));

    // What the user may not write is not written for them.
    let mut task = shell("true");
    task.user = Some("nobody".into());
    task.stdout = Some("/etc/xbee-test".into());
    assert_eq!(
        run(&agent, &mut events, task).await.end.unwrap_err().code,
        code::BAD_STANDARD_STREAM
    );
    assert!(!std::path::Path::new("/etc/xbee-test").exists());

    let mut task = shell("while :; do :; done");
    task.limits.cpu_seconds = Some(1);
    let exited = run(&agent, &mut events, task).await.end.unwrap();
    assert_eq!(
        exited.status,
        ExitStatus::Signal {
            signal: 24,
            core_dumped: false
        },
        "SIGXCPU"
    );
    // The kernel looks at the limit at its ticks, and bills what a tick found to whom it found.
    assert!((500..4000).contains(&exited.cpu_ms), "{exited:?}");
}

#[tokio::test]
async fn large_output_is_exact() {
    let guest = Guest::start();
    let (agent, mut events) = guest.connect().await;
    let bytes = 64 * 1024 * 1024;
    let started = Instant::now();
    let outcome = run(
        &agent,
        &mut events,
        shell(&format!("yes 0123456789abcde | head -c {bytes}")),
    )
    .await;
    assert_eq!(outcome.stdout.len(), bytes);
    assert!(
        outcome
            .stdout
            .chunks(16)
            .all(|line| line == b"0123456789abcde\n")
    );
    println!("64 MiB in {:?}", started.elapsed());
}

#[tokio::test]
async fn without_acknowledgement_the_task_waits() {
    let guest = Guest::start();
    let (agent, mut events) = guest.connect().await;
    let task = shell("head -c 3000000 /dev/zero");
    let conversation = task.conversation;
    agent.execute(task).await.unwrap();
    let mut total = 0;
    while total < 1024 * 1024 {
        match events.recv().await.unwrap() {
            Event::Output { data, .. } => total += data.len(),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(total, 1024 * 1024, "the window");
    let more = tokio::time::timeout(Duration::from_millis(300), events.recv()).await;
    assert!(more.is_err(), "{more:?}");
    // The connection is not blocked for others.
    agent.stats().await.unwrap();
    agent
        .ack_output(conversation, OutputStream::Stdout, total as u64)
        .unwrap();
    while total < 3_000_000 {
        match events.recv().await.unwrap() {
            Event::Output { data, stream, .. } => {
                total += data.len();
                agent
                    .ack_output(conversation, stream, total as u64)
                    .unwrap();
            }
            other => panic!("{other:?}"),
        }
    }
    assert!(matches!(events.recv().await.unwrap(), Event::Exited { .. }));
}

#[tokio::test]
async fn execute_twice_starts_once() {
    let guest = Guest::start();
    let (agent, mut events) = guest.connect().await;
    let file = guest.dir.path().join("count");
    let task = shell(&format!("echo x >> {}", file.display()));
    assert!(!agent.execute(task.clone()).await.unwrap());
    assert!(agent.execute(task.clone()).await.unwrap());
    finish(&agent, &mut events).await.end.unwrap();
    drop((agent, events));
    // Neither on another connection, after its end.
    let (agent, mut events) = guest.connect().await;
    assert_eq!(agent.hello().conversations.len(), 1);
    assert!(!agent.hello().conversations[0].running);
    assert!(agent.execute(task).await.unwrap());
    finish(&agent, &mut events).await.end.unwrap();
    assert_eq!(std::fs::read_to_string(file).unwrap(), "x\n");
}

#[tokio::test]
async fn reconnecting_in_mid_output_leaves_no_gap_and_repeats_nothing() {
    let guest = Guest::start();
    let bytes = 8 * 1024 * 1024;
    let mut task = shell(&format!("seq 1 100000000 | head -c {bytes}; exit 9"));
    task.stdout = Some(guest.dir.path().join("copy").to_str().unwrap().into());
    let conversation = task.conversation;
    let mut received: Vec<u8> = Vec::new();
    let mut durable = 0;
    let mut connections = 0;
    let exited = 'connections: loop {
        connections += 1;
        // What came and was not acknowledged is lost with the connection, and comes again.
        let have = durable;
        received.truncate(have);
        let point = ResumePoint {
            conversation,
            stdout_bytes: have as u64,
            stderr_bytes: 0,
        };
        let points = if connections == 1 {
            vec![]
        } else {
            vec![point]
        };
        let (agent, mut events) = guest.resume(Resume { points }).await;
        agent.execute(task.clone()).await.unwrap();
        let stop_at = received.len() + 700_000;
        loop {
            match events.recv().await.unwrap() {
                Event::Output {
                    stream,
                    offset,
                    data,
                    ..
                } => {
                    assert_eq!(offset, received.len() as u64);
                    received.extend_from_slice(&data);
                    if received.len() > durable + 100_000 {
                        durable = received.len();
                        agent
                            .ack_output(conversation, stream, durable as u64)
                            .unwrap();
                    }
                }
                Event::Exited { exited, .. } => break 'connections exited,
                other => panic!("{other:?}"),
            }
            if received.len() > stop_at {
                // Dropped without a word.
                continue 'connections;
            }
        }
    };
    assert!(connections > 5, "{connections}");
    assert_eq!(exited.status, ExitStatus::Code(9));
    assert_eq!(received.len(), bytes);
    assert!(
        received == std::fs::read(guest.dir.path().join("copy")).unwrap(),
        "contents differ"
    );
    assert!(received.starts_with(b"1\n2\n3\n"));
}

#[tokio::test]
async fn an_acknowledgement_lost_with_the_connection_is_made_good_by_the_next() {
    let guest = Guest::start();
    let (agent, mut events) = guest.connect().await;
    let task = shell("head -c 3000000 /dev/zero");
    let conversation = task.conversation;
    agent.execute(task).await.unwrap();
    let mut total = 0u64;
    while total < OUTPUT_WINDOW_BYTES {
        match events.recv().await.unwrap() {
            Event::Output { data, .. } => total += data.len() as u64,
            other => panic!("{other:?}"),
        }
    }
    // The window is full, and the host goes before it says what it has.
    drop((agent, events));
    let point = ResumePoint {
        conversation,
        stdout_bytes: total,
        stderr_bytes: 0,
    };
    let (_agent, mut events) = guest
        .resume(Resume {
            points: vec![point],
        })
        .await;
    match timeout(LIMIT, events.recv()).await.unwrap().unwrap() {
        Event::Output { offset, .. } => assert_eq!(offset, total),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_host_that_claims_too_much_is_refused() {
    let guest = Guest::start();
    let (agent, mut events) = guest.connect().await;
    let task = shell("echo x");
    let conversation = task.conversation;
    run(&agent, &mut events, task).await;
    drop((agent, events));
    let points = vec![ResumePoint {
        conversation,
        stdout_bytes: 1000,
        stderr_bytes: 0,
    }];
    let (_agent, mut events) = guest.resume(Resume { points }).await;
    match events.recv().await.unwrap() {
        Event::Lost(error) => assert_eq!(error.code(), code::RESUME_MISMATCH),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn terminate_ends_the_whole_tree() {
    let guest = Guest::start();
    let (agent, mut events) = guest.connect().await;
    // A child, one in another session, and an orphan of another session that ignores TERM.
    let task = shell(
        "sleep 1001 & echo $!; setsid sh -c 'echo $$; sleep 1002'& \
         (setsid sh -c 'trap \"\" TERM; echo $$; while :; do sleep 0.1; done' &) ; wait",
    );
    let conversation = task.conversation;
    agent.execute(task).await.unwrap();
    let mut text = String::new();
    while text.lines().count() < 3 {
        match events.recv().await.unwrap() {
            Event::Output { data, .. } => text.push_str(std::str::from_utf8(&data).unwrap()),
            other => panic!("{other:?}"),
        }
    }
    let started = Instant::now();
    agent
        .terminate_task(conversation, Duration::from_millis(500))
        .await
        .unwrap();
    let exited = loop {
        match timeout(LIMIT, events.recv()).await.unwrap().unwrap() {
            Event::Exited { exited, .. } => break exited,
            // Shells tell of what the signal has done.
            Event::Output {
                stream: OutputStream::Stderr,
                ..
            } => {}
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(exited.cause, Some(EndCause::Terminated));
    assert_eq!(
        exited.status,
        ExitStatus::Signal {
            signal: 15,
            core_dumped: false
        }
    );
    assert!(
        started.elapsed() >= Duration::from_millis(500),
        "the grace was not waited for"
    );
    for pid in text.lines() {
        gone(pid.parse().unwrap()).await;
    }
    // Again, and of what is not there.
    agent
        .terminate_task(conversation, Duration::ZERO)
        .await
        .unwrap();
    let error = agent
        .terminate_task(uuid::Uuid::new_v4(), Duration::ZERO)
        .await
        .unwrap_err();
    assert_eq!(error.code(), code::NOT_FOUND);
}

#[tokio::test]
async fn a_task_that_ends_on_term_has_not_to_wait_for_the_grace() {
    let guest = Guest::start();
    let (agent, mut events) = guest.connect().await;
    let task = shell("trap 'echo bye; exit 4' TERM; echo ready; while :; do sleep 0.01; done");
    let conversation = task.conversation;
    agent.execute(task).await.unwrap();
    events.recv().await.unwrap();
    let started = Instant::now();
    agent
        .terminate_task(conversation, Duration::from_secs(50))
        .await
        .unwrap();
    assert_eq!(
        the_rest(&mut events).await,
        (b"bye\n".to_vec(), ExitStatus::Code(4))
    );
    assert!(started.elapsed() < Duration::from_secs(10));
}

#[tokio::test]
async fn wall_clock_time_is_bounded() {
    let guest = Guest::start();
    let (agent, mut events) = guest.connect().await;
    let mut task = shell("sleep 1000");
    task.limits.wall_clock_ms = Some(300);
    let exited = run(&agent, &mut events, task).await.end.unwrap();
    assert_eq!(exited.cause, Some(EndCause::WallClockLimit));
    assert!((300..5000).contains(&exited.wall_clock_ms), "{exited:?}");
}

#[tokio::test]
async fn a_task_outlives_what_it_leaves_behind_and_the_host() {
    let guest = Guest::start();
    let (agent, events) = guest.connect().await;
    // The daemon keeps the pipes open; the task ends all the same.
    let task = shell("sleep 30 & echo daemon $!");
    let conversation = task.conversation;
    agent.execute(task).await.unwrap();
    drop((agent, events));
    tokio::time::sleep(Duration::from_millis(200)).await;
    let point = ResumePoint {
        conversation,
        stdout_bytes: 0,
        stderr_bytes: 0,
    };
    let (agent, mut events) = guest
        .resume(Resume {
            points: vec![point],
        })
        .await;
    let outcome = finish(&agent, &mut events).await;
    assert_eq!(outcome.end.as_ref().unwrap().status, ExitStatus::Code(0));
    let pid: i32 = outcome
        .text()
        .trim_start_matches("daemon ")
        .trim()
        .parse()
        .unwrap();
    assert!(std::path::Path::new(&format!("/proc/{pid}")).exists());
    agent.shutdown(Duration::ZERO).await.unwrap();
    let mut guest = guest;
    assert!(guest.child.wait().await.unwrap().success());
    gone(pid).await;
}
