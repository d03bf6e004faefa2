//! A command beside the task: frames of the API on one side, the agent's streams on the other.

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;
use xbee_agent::protocol::{ExitStatus, TerminalSize};
use xbee_agent::{Agent, Error, ExecSpec, Process, StreamReader, StreamWriter};
use xbee_api::exec::{self, Frame};
use xbee_api::{ExecRequest, chain};

/// Frames on their way to the client.
const QUEUE: usize = 8;

/// Starts the command.
pub async fn begin(agent: &Agent, request: ExecRequest) -> Result<Process, Error> {
    let spec = ExecSpec {
        argv: request.argv,
        environment: request.env,
        terminal: request.tty.map(|size| TerminalSize {
            rows: size.rows,
            columns: size.cols,
        }),
        ..ExecSpec::default()
    };
    agent.exec(spec).await
}

/// Exit code in the shell's way.
pub fn exit_code(status: ExitStatus) -> i32 {
    match status {
        ExitStatus::Code(code) => i32::from(code),
        ExitStatus::Signal { signal, .. } => 128 + signal,
    }
}

/// Carries frames both ways until the command ends or the client goes away; then the command,
/// which nobody hears any more, is killed by the drop of `process`.
pub async fn relay(mut process: Process, connection: impl AsyncRead + AsyncWrite) {
    let (from_client, mut to_client) = tokio::io::split(connection);
    let (out, mut outgoing) = mpsc::channel(QUEUE);
    let (to_stdin, for_stdin) = mpsc::channel(QUEUE);
    let (control, mut controls) = mpsc::channel(QUEUE);
    let (stdin, stdout, stderr) = (
        process.stdin.take(),
        process.stdout.take(),
        process.stderr.take(),
    );
    let streams = {
        let out = out.clone();
        async move {
            tokio::join!(
                copy(stdout, exec::STDOUT, &out),
                copy(stderr, exec::STDERR, &out)
            );
        }
    };
    let command = async move {
        let mut streams = std::pin::pin!(streams);
        let mut flowing = true;
        loop {
            tokio::select! {
                () = &mut streams, if flowing => flowing = false,
                frame = controls.recv() => match frame {
                    Some(frame) => obey(&process, frame).await,
                    None => return,
                },
                status = process.wait(), if !flowing => {
                    let last = match status {
                        Ok(status) => frame(exec::EXIT, exit_code(status).to_be_bytes().to_vec()),
                        Err(error) => frame(exec::ERROR, chain(&error).into_bytes()),
                    };
                    // A client that is gone does not ask how it ended.
                    let _ = out.send(last).await;
                    return std::future::pending().await;
                }
            }
        }
    };
    let write = async {
        while let Some(Frame { kind, data }) = outgoing.recv().await {
            let last = matches!(kind, exec::EXIT | exec::ERROR);
            if exec::write_frame(&mut to_client, kind, &data)
                .await
                .is_err()
                || last
            {
                break;
            }
        }
        let _ = to_client.shutdown().await;
    };
    let input = async {
        tokio::join!(
            receive(from_client, to_stdin, control),
            feed(stdin, for_stdin)
        );
        // The client is gone. Dropping `control` has told the command's side.
        std::future::pending().await
    };
    tokio::select! {
        () = input => {}
        () = command => {}
        () = write => {}
    }
}

fn frame(kind: u8, data: Vec<u8>) -> Frame {
    Frame { kind, data }
}

/// Frames of the client; ends after the client has. A command that does not read its input holds
/// up what the client sends after it, once the queue is full: nothing is lost.
async fn receive(
    mut client: impl AsyncRead + Unpin,
    stdin: mpsc::Sender<Vec<u8>>,
    control: mpsc::Sender<Frame>,
) {
    let mut stdin = Some(stdin);
    while let Ok(Some(frame)) = exec::read_frame(&mut client).await {
        if frame.kind != exec::STDIN {
            if control.send(frame).await.is_err() {
                return;
            }
        } else if frame.data.is_empty() {
            stdin = None;
        } else if let Some(open) = &stdin {
            // A command that no longer reads is no reason to end it.
            if open.send(frame.data).await.is_err() {
                stdin = None;
            }
        }
    }
}

async fn feed(stdin: Option<StreamWriter>, mut data: mpsc::Receiver<Vec<u8>>) {
    let Some(mut stdin) = stdin else { return };
    while let Some(piece) = data.recv().await {
        if stdin.write_all(&piece).await.is_err() {
            return;
        }
    }
}

/// Does what a frame of the client says; unknown kinds are passed over.
async fn obey(process: &Process, frame: Frame) {
    let done = match (frame.kind, frame.data.as_slice()) {
        (exec::RESIZE, &[a, b, c, d]) => {
            let size = TerminalSize {
                rows: u16::from_be_bytes([a, b]),
                columns: u16::from_be_bytes([c, d]),
            };
            process.resize(size).await
        }
        (exec::SIGNAL, &[a, b, c, d]) => process.signal(i32::from_be_bytes([a, b, c, d])).await,
        _ => Ok(()),
    };
    if let Err(error) = done {
        tracing::debug!(error = chain(&error), "exec request of the client failed");
    }
}

async fn copy(from: Option<StreamReader>, kind: u8, to: &mpsc::Sender<Frame>) {
    let Some(mut from) = from else { return };
    let mut buffer = vec![0; exec::MAX_FRAME];
    loop {
        match from.read(&mut buffer).await {
            Ok(0) | Err(_) => return,
            Ok(n) => {
                if to.send(frame(kind, buffer[..n].to_vec())).await.is_err() {
                    return;
                }
            }
        }
    }
}
