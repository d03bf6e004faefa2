//! What is encoded is decoded again, in whatever pieces it comes; everything else is refused.

#![allow(clippy::unwrap_used)]

use proptest::prelude::*;
use xbee_protocol::{
    AgentInfo, ConversationInfo, EndCause, Exec, Execute, ExitStatus, Exited, Failure, FileInfo,
    FrameBuffer, FrameError, GuestHello, GuestMessage, GuestProof, HostHello, HostMessage, Limits,
    MAX_DATA_BYTES, MAX_FRAME_BYTES, MakeDirectory, MakeSymlink, MountRoot, OutputStream, Phase,
    PutFile, Reply, Request, ResumePoint, RootInfo, StartInfo, StartMode, Stats, StreamBody,
    TaskEvent, TerminalSize, Uuid, Variable, Welcome, decode, encode_frame,
};

fn text() -> impl Strategy<Value = String> {
    "\\PC{0,24}"
}

fn id() -> impl Strategy<Value = Uuid> {
    any::<u128>().prop_map(Uuid::from_u128)
}

fn maybe() -> impl Strategy<Value = Option<String>> {
    prop::option::of(text())
}

fn failure() -> impl Strategy<Value = Failure> {
    (text(), text()).prop_map(|(code, message)| Failure { code, message })
}

fn bytes() -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(any::<u8>(), 0..300)
}

fn body() -> impl Strategy<Value = StreamBody> {
    prop_oneof![
        bytes().prop_map(StreamBody::Data),
        any::<u64>().prop_map(StreamBody::Hole),
        Just(StreamBody::End),
        any::<u32>().prop_map(StreamBody::Credit),
        Just(StreamBody::Reset),
    ]
}

fn output_stream() -> impl Strategy<Value = OutputStream> {
    prop_oneof![Just(OutputStream::Stdout), Just(OutputStream::Stderr)]
}

fn status() -> impl Strategy<Value = ExitStatus> {
    prop_oneof![
        any::<u8>().prop_map(ExitStatus::Code),
        any::<(i32, bool)>().prop_map(|(signal, core_dumped)| ExitStatus::Signal {
            signal,
            core_dumped
        }),
    ]
}

fn environment() -> impl Strategy<Value = Vec<Variable>> {
    let variable = (text(), text()).prop_map(|(name, value)| Variable { name, value });
    prop::collection::vec(variable, 0..4)
}

fn limits() -> impl Strategy<Value = Limits> {
    prop::array::uniform11(any::<Option<u64>>()).prop_map(|[a, b, c, d, e, f, g, h, i, j, k]| {
        Limits {
            cpu_seconds: a,
            file_size_bytes: b,
            core_bytes: c,
            data_bytes: d,
            stack_bytes: e,
            open_files: f,
            processes: g,
            address_space_bytes: h,
            locked_memory_bytes: i,
            wall_clock_ms: j,
            memory_bytes: k,
        }
    })
}

fn execute() -> impl Strategy<Value = Execute> {
    let paths = (maybe(), maybe(), maybe(), maybe(), maybe(), maybe());
    let argv = prop::collection::vec(text(), 0..5);
    (
        id(),
        argv,
        environment(),
        paths,
        any::<Option<u32>>(),
        limits(),
    )
        .prop_map(
            |(conversation, argv, environment, (a, b, c, d, e, f), umask, limits)| Execute {
                conversation,
                argv,
                environment,
                working_directory: a,
                stdin: b,
                stdout: c,
                stderr: d,
                user: e,
                group: f,
                umask,
                limits,
            },
        )
}

fn request() -> impl Strategy<Value = Request> {
    let size = || any::<(u16, u16)>().prop_map(|(rows, columns)| TerminalSize { rows, columns });
    prop_oneof![
        (maybe(), maybe(), any::<bool>()).prop_map(|(device, fs_type, read_only)| {
            Request::MountRoot(MountRoot {
                device,
                fs_type,
                read_only,
            })
        }),
        (any::<(u32, u32, Option<u64>)>(), text(), maybe(), maybe()).prop_map(
            |((stream, mode, size), path, user, group)| Request::PutFile(PutFile {
                stream,
                path,
                mode,
                user,
                group,
                size
            })
        ),
        (any::<u32>(), text()).prop_map(|(stream, path)| Request::GetFile { stream, path }),
        (text(), any::<Option<u32>>(), maybe(), maybe()).prop_map(|(path, mode, user, group)| {
            Request::MakeDirectory(MakeDirectory {
                path,
                mode,
                user,
                group,
            })
        }),
        (text(), text(), maybe(), maybe()).prop_map(|(path, target, user, group)| {
            Request::MakeSymlink(MakeSymlink {
                path,
                target,
                user,
                group,
            })
        }),
        text().prop_map(|path| Request::Remove { path }),
        prop_oneof![
            Just(StartMode::Auto),
            Just(StartMode::Init),
            Just(StartMode::Agent)
        ]
        .prop_map(|mode| Request::Start { mode }),
        execute().prop_map(Request::Execute),
        (id(), any::<u64>()).prop_map(|(conversation, grace_ms)| Request::Terminate {
            conversation,
            grace_ms
        }),
        (id(), any::<i32>()).prop_map(|(conversation, signal)| Request::SignalTask {
            conversation,
            signal
        }),
        (
            any::<(u32, Option<u32>)>(),
            prop::collection::vec(text(), 0..4),
            environment(),
            (maybe(), maybe(), maybe()),
            prop::option::of(size())
        )
            .prop_map(
                |((stream, stderr_stream), argv, environment, (a, b, c), terminal)| {
                    Request::Exec(Exec {
                        stream,
                        stderr_stream,
                        argv,
                        environment,
                        working_directory: a,
                        user: b,
                        group: c,
                        terminal,
                    })
                }
            ),
        any::<(u32, i32)>().prop_map(|(stream, signal)| Request::SignalProcess { stream, signal }),
        (any::<u32>(), size()).prop_map(|(stream, size)| Request::Resize { stream, size }),
        any::<(u32, u16)>().prop_map(|(stream, port)| Request::Forward { stream, port }),
        Just(Request::Stats),
        any::<(u64, u32)>().prop_map(|(unix_seconds, nanoseconds)| Request::SetTime {
            unix_seconds,
            nanoseconds
        }),
        bytes().prop_map(|seed| Request::Reseed { seed }),
        any::<u64>().prop_map(|grace_ms| Request::Shutdown { grace_ms }),
    ]
}

fn host_message() -> impl Strategy<Value = HostMessage> {
    let point =
        (id(), any::<(u64, u64)>()).prop_map(|(conversation, (stdout_bytes, stderr_bytes))| {
            ResumePoint {
                conversation,
                stdout_bytes,
                stderr_bytes,
            }
        });
    prop_oneof![
        any::<(u16, [u8; 32], [u8; 32])>().prop_map(|(generation, nonce, proof)| {
            HostMessage::Hello(HostHello {
                generation,
                nonce,
                proof,
            })
        }),
        prop::collection::vec(point, 0..4)
            .prop_map(|resume| HostMessage::Welcome(Welcome { resume })),
        failure().prop_map(HostMessage::Refuse),
        Just(HostMessage::Heartbeat),
        (any::<u32>(), request()).prop_map(|(id, request)| HostMessage::Request { id, request }),
        (id(), output_stream(), any::<u64>()).prop_map(|(conversation, stream, offset)| {
            HostMessage::OutputAck {
                conversation,
                stream,
                offset,
            }
        }),
        (any::<u32>(), body()).prop_map(|(stream, body)| HostMessage::Stream { stream, body }),
    ]
}

fn reply() -> impl Strategy<Value = Reply> {
    prop_oneof![
        failure().prop_map(Reply::Failed),
        Just(Reply::Done),
        (text(), text(), maybe(), maybe()).prop_map(|(device, fs_type, init, os_id)| {
            Reply::Root(RootInfo {
                device,
                fs_type,
                init,
                os_id,
            })
        }),
        any::<(u64, u32, u32, u32, i64, [u8; 32])>().prop_map(
            |(size, mode, uid, gid, modified_unix_seconds, blake3)| Reply::File(FileInfo {
                size,
                mode,
                uid,
                gid,
                modified_unix_seconds,
                blake3
            })
        ),
        maybe().prop_map(|init| Reply::Started(StartInfo { init })),
        any::<bool>().prop_map(|known| Reply::Accepted { known }),
        any::<i32>().prop_map(|pid| Reply::Process { pid }),
        any::<[u64; 5]>().prop_map(|[a, b, c, d, e]| Reply::Stats(Stats {
            memory_total_kib: a,
            memory_available_kib: b,
            load_milli: c,
            agent_resident_kib: d,
            uptime_ms: e,
        })),
    ]
}

fn task_event() -> impl Strategy<Value = TaskEvent> {
    let cause = prop_oneof![
        Just(None),
        Just(Some(EndCause::Terminated)),
        Just(Some(EndCause::WallClockLimit)),
        Just(Some(EndCause::MemoryLimit)),
        Just(Some(EndCause::ProcessLimit))
    ];
    prop_oneof![
        (output_stream(), any::<u64>(), bytes()).prop_map(|(stream, offset, data)| {
            TaskEvent::Output {
                stream,
                offset,
                data,
            }
        }),
        (status(), cause, any::<[u64; 5]>()).prop_map(|(status, cause, [a, b, c, d, e])| {
            TaskEvent::Exited(Exited {
                status,
                cause,
                stdout_bytes: a,
                stderr_bytes: b,
                cpu_ms: c,
                wall_clock_ms: d,
                max_resident_kib: e,
            })
        }),
        failure().prop_map(TaskEvent::Failed),
    ]
}

fn guest_message() -> impl Strategy<Value = GuestMessage> {
    let known = (id(), any::<bool>()).prop_map(|(conversation, running)| ConversationInfo {
        conversation,
        running,
    });
    let phase = prop_oneof![
        Just(Phase::Initramfs),
        Just(Phase::Mounted),
        Just(Phase::Started)
    ];
    let info = (
        text(),
        text(),
        id(),
        any::<u64>(),
        phase,
        prop::collection::vec(known, 0..4),
    )
        .prop_map(
            |(version, kernel, boot_id, memory_kib, phase, conversations)| AgentInfo {
                version,
                kernel,
                boot_id,
                memory_kib,
                phase,
                conversations,
            },
        );
    prop_oneof![
        (any::<u16>(), id(), any::<[u8; 32]>()).prop_map(|(generation, domain, nonce)| {
            GuestMessage::Hello(GuestHello {
                generation,
                domain,
                nonce,
            })
        }),
        (any::<[u8; 32]>(), info)
            .prop_map(|(proof, info)| GuestMessage::Proof(GuestProof { proof, info })),
        failure().prop_map(GuestMessage::Refuse),
        Just(GuestMessage::Heartbeat),
        (any::<u32>(), reply()).prop_map(|(id, reply)| GuestMessage::Response { id, reply }),
        (id(), task_event()).prop_map(|(conversation, event)| GuestMessage::Task {
            conversation,
            event
        }),
        (any::<u32>(), status())
            .prop_map(|(stream, status)| GuestMessage::ProcessExited { stream, status }),
        (any::<u32>(), body()).prop_map(|(stream, body)| GuestMessage::Stream { stream, body }),
    ]
}

proptest! {
    #[test]
    fn messages_come_through_in_any_pieces(
        host in prop::collection::vec(host_message(), 1..6),
        guest in prop::collection::vec(guest_message(), 1..6),
        piece in 1usize..700,
    ) {
        let mut wire = Vec::new();
        host.iter().for_each(|message| encode_frame(message, &mut wire).unwrap());
        guest.iter().for_each(|message| encode_frame(message, &mut wire).unwrap());
        let mut frames = FrameBuffer::default();
        let mut bodies = Vec::new();
        for piece in wire.chunks(piece) {
            frames.extend(piece);
            while let Some(body) = frames.next_body().unwrap() {
                bodies.push(body.to_vec());
            }
        }
        prop_assert!(frames.is_empty());
        prop_assert_eq!(bodies.len(), host.len() + guest.len());
        for (message, body) in host.iter().zip(&bodies) {
            prop_assert_eq!(message, &decode::<HostMessage>(body).unwrap());
        }
        for (message, body) in guest.iter().zip(&bodies[host.len()..]) {
            prop_assert_eq!(message, &decode::<GuestMessage>(body).unwrap());
        }
    }

    #[test]
    fn damaged_messages_are_refused_or_are_other_messages(
        message in guest_message(),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut wire = Vec::new();
        encode_frame(&message, &mut wire).unwrap();
        let mut body = wire.split_off(4);
        prop_assert!(decode::<GuestMessage>(&body[..cut.index(body.len())]).is_err());
        for (index, byte) in damage {
            let index = index.index(body.len());
            body[index] = byte;
        }
        if let Ok(other) = decode::<GuestMessage>(&body) {
            let mut wire = Vec::new();
            encode_frame(&other, &mut wire).unwrap();
            prop_assert_eq!(decode::<GuestMessage>(&wire[4..]).unwrap(), other);
        }
    }

    #[test]
    fn noise_makes_nothing_panic(noise in prop::collection::vec(any::<u8>(), 0..600)) {
        // Whether it is a message does not matter; that there is an answer does.
        let _answer = decode::<GuestMessage>(&noise);
        let _answer = decode::<HostMessage>(&noise);
        let mut frames = FrameBuffer::default();
        frames.extend(&noise);
        while let Ok(Some(body)) = frames.next_body() {
            let _answer = decode::<GuestMessage>(body);
        }
    }
}

#[test]
fn the_largest_data_fit_and_larger_frames_are_refused_on_both_sides() {
    let data = |length| GuestMessage::Stream {
        stream: u32::MAX,
        body: StreamBody::Data(vec![7; length]),
    };
    let mut wire = Vec::new();
    encode_frame(&data(MAX_DATA_BYTES), &mut wire).unwrap();
    let before = wire.clone();
    let refused = encode_frame(&data(MAX_FRAME_BYTES), &mut wire).unwrap_err();
    assert!(matches!(refused, FrameError::TooLong { .. }), "{refused:?}");
    assert!(wire == before, "a refused message left something behind");

    let mut frames = FrameBuffer::default();
    frames.extend(&(MAX_FRAME_BYTES as u32 + 1).to_be_bytes());
    assert!(
        matches!(frames.next_body(), Err(FrameError::TooLong { length }) if length == MAX_FRAME_BYTES + 1)
    );
    let mut heartbeat = Vec::new();
    encode_frame(&HostMessage::Heartbeat, &mut heartbeat).unwrap();
    heartbeat.push(0);
    assert!(matches!(
        decode::<HostMessage>(&heartbeat[4..]),
        Err(FrameError::TrailingBytes { extra: 1 })
    ));
}

/// Old agents' bytes. These do not change: a new generation adds its own.
#[test]
fn generation_1_has_these_bytes() {
    let wire = |message: &HostMessage| {
        let mut wire = Vec::new();
        encode_frame(message, &mut wire).unwrap();
        wire.iter()
            .map(|byte| format!("{byte:02x}"))
            .collect::<String>()
    };
    let body = StreamBody::Data(b"hi".to_vec());
    assert_eq!(
        wire(&HostMessage::Stream { stream: 5, body }),
        "0000000a8206820582008142".to_owned() + "6869"
    );
    assert_eq!(wire(&HostMessage::Heartbeat), "00000003820380");
    let request = Request::Terminate {
        conversation: Uuid::from_u128(1),
        grace_ms: 1000,
    };
    assert_eq!(
        wire(&HostMessage::Request { id: 9, request }),
        "0000001b8204820982088250000000000000000000000000000000011903e8"
    );
}
