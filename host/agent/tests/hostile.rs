//! A guest that breaks the rules loses its connection, and nothing else happens.

#![allow(clippy::unwrap_used)]

mod common;

use std::time::Duration;

use common::{Guest, LIMIT, SECRET, task};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, ReadHalf, WriteHalf};
use tokio::sync::mpsc;
use tokio::time::timeout;
use xbee_agent::protocol::proof::{Side, prove, verify};
use xbee_agent::protocol::{
    AgentInfo, ExitStatus, Exited, Failure, GuestHello, GuestMessage, GuestProof, HostMessage,
    OUTPUT_WINDOW_BYTES, OutputStream, Phase, Reply, Request, STREAM_WINDOW_BYTES, Secret,
    StreamBody, TaskEvent, Uuid, code,
};
use xbee_agent::{Agent, Error, Event, ExecSpec, FrameReader, FrameWriter, Resume};

/// A guest that follows the handshake and then does as the test says.
struct Impostor {
    reader: FrameReader<ReadHalf<DuplexStream>>,
    writer: FrameWriter<WriteHalf<DuplexStream>>,
}

impl Impostor {
    fn new(stream: DuplexStream) -> Impostor {
        let (reader, writer) = tokio::io::split(stream);
        Impostor {
            reader: FrameReader::new(reader),
            writer: FrameWriter::new(writer),
        }
    }

    async fn shake_hands(&mut self, secret: &Secret) {
        let hello = GuestHello {
            generation: 9,
            domain: Uuid::from_u128(5),
            nonce: [3; 32],
        };
        self.send(GuestMessage::Hello(hello.clone())).await;
        let Some(HostMessage::Hello(answer)) = self.reader.next().await.unwrap() else {
            panic!()
        };
        assert_eq!(answer.generation, 1, "the lower of both");
        assert!(verify(
            &SECRET,
            Side::Host,
            &hello,
            1,
            &answer.nonce,
            &answer.proof
        ));
        let proof = prove(secret, Side::Guest, &hello, 1, &answer.nonce);
        let info = AgentInfo {
            version: "0\x1b[2J".into(),
            kernel: "k".into(),
            boot_id: Uuid::nil(),
            memory_kib: 1,
            phase: Phase::Started,
            conversations: vec![],
        };
        self.send(GuestMessage::Proof(GuestProof { proof, info }))
            .await;
    }

    async fn send(&mut self, message: GuestMessage) {
        self.writer.send(&message).await.unwrap();
    }

    /// The next request.
    async fn request(&mut self) -> (u32, Request) {
        loop {
            match self.reader.next().await.unwrap().unwrap() {
                HostMessage::Request { id, request } => return (id, request),
                HostMessage::Heartbeat | HostMessage::Welcome(_) => {}
                other => panic!("{other:?}"),
            }
        }
    }
}

async fn pair() -> (Impostor, Agent, mpsc::Receiver<Event>) {
    let (host, guest) = tokio::io::duplex(1 << 20);
    let mut impostor = Impostor::new(guest);
    let (connected, ()) = tokio::join!(
        Agent::connect(host, &SECRET, Resume::default()),
        impostor.shake_hands(&SECRET)
    );
    let (agent, events) = connected.unwrap();
    (impostor, agent, events)
}

/// Why the connection was lost.
async fn lost(events: &mut mpsc::Receiver<Event>) -> String {
    loop {
        match timeout(LIMIT, events.recv()).await.unwrap().unwrap() {
            Event::Lost(Error::Lost(reason)) => return reason.to_string(),
            Event::Lost(other) => panic!("{other:?}"),
            _ => {}
        }
    }
}

#[tokio::test]
async fn a_wrong_secret_is_refused_by_either_side() {
    let (host, guest) = tokio::io::duplex(1 << 20);
    let mut impostor = Impostor::new(guest);
    let (connected, ()) = tokio::join!(
        Agent::connect(host, &SECRET, Resume::default()),
        impostor.shake_hands(&Secret([8; 32]))
    );
    assert!(
        matches!(connected, Err(Error::Authentication)),
        "{connected:?}"
    );
    let refusal = impostor.reader.next().await.unwrap();
    assert!(
        matches!(refusal, Some(HostMessage::Refuse(_))),
        "{refusal:?}"
    );

    let guest = Guest::start();
    let error = Agent::connect(guest.accept().await, &Secret([8; 32]), Resume::default())
        .await
        .unwrap_err();
    assert!(matches!(error, Error::Authentication), "{error:?}");
    // It comes again, and the right one is let in.
    guest.connect().await.0.stats().await.unwrap();
}

#[tokio::test]
async fn text_from_a_guest_is_harmless() {
    let (mut impostor, agent, _events) = pair().await;
    assert_eq!(agent.hello().version, "0\u{fffd}[2J");
    let asking = tokio::spawn({
        let agent = agent.clone();
        async move { agent.stats().await.unwrap_err() }
    });
    let (id, _) = impostor.request().await;
    let failure = Failure {
        code: "x\n".repeat(500),
        message: "\x1b]0;evil\x07".repeat(2000),
    };
    impostor
        .send(GuestMessage::Response {
            id,
            reply: Reply::Failed(failure),
        })
        .await;
    let error = asking.await.unwrap();
    assert!(error.code().len() < 100 && error.to_string().len() < 1100);
    assert!(!error.to_string().contains(['\x1b', '\x07']));
}

#[tokio::test]
async fn each_broken_rule_ends_the_connection() {
    let conversation = Uuid::from_u128(77);
    let data = |stream, body| GuestMessage::Stream { stream, body };
    let event = |event| GuestMessage::Task {
        conversation,
        event,
    };
    let output = |offset, length| {
        event(TaskEvent::Output {
            stream: OutputStream::Stdout,
            offset,
            data: vec![0; length],
        })
    };
    let exited = event(TaskEvent::Exited(Exited {
        status: ExitStatus::Code(0),
        cause: None,
        stdout_bytes: 5,
        stderr_bytes: 0,
        cpu_ms: 0,
        wall_clock_ms: 0,
        max_resident_kib: 0,
    }));
    let full = STREAM_WINDOW_BYTES as usize / 65536;
    let all = OUTPUT_WINDOW_BYTES / 65536;
    // Stream 1 is the command's standard output, stream 2 its standard error.
    let cases: Vec<(&str, Vec<GuestMessage>)> = vec![
        (
            "message on a stream that is not open",
            vec![data(99, StreamBody::Data(vec![1]))],
        ),
        (
            "message on a stream that is not open",
            vec![data(99, StreamBody::Credit(1))],
        ),
        (
            "data after the end of a stream",
            vec![data(1, StreamBody::End), data(1, StreamBody::Data(vec![1]))],
        ),
        (
            "more data than the window allows",
            vec![data(1, StreamBody::Data(vec![1; 65536])); full + 1],
        ),
        (
            "more data than the window allows",
            vec![data(1, StreamBody::Data(vec![1; 65537]))],
        ),
        (
            "more credit than was used",
            vec![data(1, StreamBody::Credit(1))],
        ),
        (
            "a hole in a stream that has none",
            vec![data(1, StreamBody::Hole(1))],
        ),
        (
            "reply to a request that was not made",
            vec![GuestMessage::Response {
                id: 12345,
                reply: Reply::Done,
            }],
        ),
        (
            "end of a process that does not run",
            vec![GuestMessage::ProcessExited {
                stream: 2,
                status: ExitStatus::Code(0),
            }],
        ),
        (
            "a second handshake",
            vec![GuestMessage::Hello(GuestHello {
                generation: 1,
                domain: conversation,
                nonce: [0; 32],
            })],
        ),
        (
            "news of an unknown task 00000000-0000-0000-0000-00000000004e",
            vec![GuestMessage::Task {
                conversation: Uuid::from_u128(78),
                event: TaskEvent::Failed(Failure {
                    code: String::new(),
                    message: String::new(),
                }),
            }],
        ),
        (
            "output of task 00000000-0000-0000-0000-00000000004d goes on at byte 5, not at 0",
            vec![output(5, 1)],
        ),
        ("output message of a wrong size", vec![output(0, 0)]),
        (
            "more output than the window allows",
            (0..=all).map(|n| output(n * 65536, 65536)).collect(),
        ),
        (
            "task 00000000-0000-0000-0000-00000000004d has ended, but not all of its output came",
            vec![exited.clone()],
        ),
        (
            "news of task 00000000-0000-0000-0000-00000000004d after its end",
            vec![output(0, 5), exited.clone(), exited],
        ),
    ];
    for (rule, messages) in cases {
        let (mut impostor, agent, mut events) = pair().await;
        let asking = tokio::spawn({
            let agent = agent.clone();
            async move {
                let spec = ExecSpec {
                    argv: vec!["x".into()],
                    ..ExecSpec::default()
                };
                let process = agent.exec(spec).await.unwrap();
                let mut task = task(&["x"]);
                task.conversation = conversation;
                agent.execute(task).await.unwrap();
                process
            }
        });
        let (id, request) = impostor.request().await;
        assert!(matches!(request, Request::Exec(_)));
        impostor
            .send(GuestMessage::Response {
                id,
                reply: Reply::Process { pid: 4 },
            })
            .await;
        let (id, _) = impostor.request().await;
        impostor
            .send(GuestMessage::Response {
                id,
                reply: Reply::Accepted { known: false },
            })
            .await;
        let mut process = asking.await.unwrap();
        for message in messages {
            // The host may have gone before the last of them.
            let _closed = impostor.writer.send(&message).await;
        }
        assert_eq!(
            lost(&mut events).await,
            format!("the agent broke the protocol: {rule}")
        );
        // Whoever waits hears of it.
        assert_eq!(
            process.wait().await.unwrap_err().code(),
            code::PROTOCOL_ERROR,
            "{rule}"
        );
        assert_eq!(
            agent.stats().await.unwrap_err().code(),
            code::PROTOCOL_ERROR
        );
    }
}

#[tokio::test]
async fn noise_and_oversize_end_the_connection() {
    for noise in [
        &b"GET / HTTP/1.0\r\n\r\n"[..],
        &[0, 0, 0, 1, 0xff],
        &[0xff; 8],
    ] {
        let (host, mut guest) = tokio::io::duplex(1 << 16);
        guest.write_all(noise).await.unwrap();
        let error = Agent::connect(host, &SECRET, Resume::default())
            .await
            .unwrap_err();
        assert!(matches!(error, Error::Frame(_)), "{error:?}");
    }
    let (host, guest) = tokio::io::duplex(1 << 16);
    drop(guest);
    let error = Agent::connect(host, &SECRET, Resume::default())
        .await
        .unwrap_err();
    assert!(matches!(error, Error::Closed), "{error:?}");
}

#[tokio::test]
async fn noise_does_not_hurt_the_agent() {
    let guest = Guest::start();
    for noise in [
        &b"GET / HTTP/1.0\r\n\r\n"[..],
        &[0, 0, 0, 1, 0xff],
        &[0xff; 100],
        &[0, 0, 0, 0],
    ] {
        let mut stream = guest.accept().await;
        stream.write_all(noise).await.unwrap();
        // The agent says hello, says why it goes, and goes.
        let mut all = Vec::new();
        timeout(LIMIT, stream.read_to_end(&mut all))
            .await
            .unwrap()
            .unwrap();
        assert!(!all.is_empty());
    }
    guest.connect().await.0.stats().await.unwrap();
}

#[tokio::test]
async fn silence_is_a_loss() {
    let (_impostor, agent, mut events) = pair().await;
    assert_eq!(
        lost(&mut events).await,
        "the agent has been silent for 10 s"
    );
    assert_eq!(agent.stats().await.unwrap_err().code(), "agent-silent");
}

#[tokio::test]
async fn many_small_events_are_taken_slowly_without_being_lost() {
    let (mut impostor, agent, mut events) = pair().await;
    let conversation = Uuid::from_u128(1);
    let mut task = task(&["x"]);
    task.conversation = conversation;
    let asking = tokio::spawn({
        let agent = agent.clone();
        async move { agent.execute(task).await.unwrap() }
    });
    let (id, _) = impostor.request().await;
    impostor
        .send(GuestMessage::Response {
            id,
            reply: Reply::Accepted { known: false },
        })
        .await;
    asking.await.unwrap();
    for offset in 0..20_000u64 {
        for stream in [OutputStream::Stdout, OutputStream::Stderr] {
            let event = TaskEvent::Output {
                stream,
                offset,
                data: vec![offset as u8],
            };
            impostor
                .send(GuestMessage::Task {
                    conversation,
                    event,
                })
                .await;
        }
    }
    // Nobody has taken anything so far; others are served all the same.
    let asking = tokio::spawn(async move { agent.stats().await });
    let (id, _) = impostor.request().await;
    impostor
        .send(GuestMessage::Response {
            id,
            reply: Reply::Done,
        })
        .await;
    assert_eq!(
        asking.await.unwrap().unwrap_err().code(),
        code::PROTOCOL_ERROR
    );
    tokio::time::sleep(Duration::from_millis(10)).await;
    let mut totals = [0u64; 2];
    let mut pieces = 0;
    while totals != [20_000; 2] {
        match timeout(LIMIT, events.recv()).await.unwrap().unwrap() {
            Event::Output {
                stream,
                offset,
                data,
                ..
            } => {
                assert_eq!(offset, totals[stream as usize]);
                assert!(
                    data.iter()
                        .zip(offset..)
                        .all(|(byte, at)| *byte == at as u8)
                );
                totals[stream as usize] += data.len() as u64;
                pieces += 1;
            }
            other => panic!("{other:?}"),
        }
    }
    assert!(pieces < 100, "{pieces} pieces are held for 40,000 bytes");
}
