//! `exec` and `proxy`: connections into a task's domain.

use std::io::{self, IsTerminal};
use std::os::fd::AsFd;

use rustix::termios::{self, OptionalActions, Termios};
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::signal::unix::SignalKind;
use tokio::sync::mpsc;
use xbee_api::client::{Client, Tunnel};
use xbee_api::exec::{self as frames, Frame};
use xbee_api::{ExecRequest, WindowSize};

use crate::cli;
use crate::error::Error;
use crate::exit;
use crate::follow;
use crate::signals::{Signals, listen};

/// Where there is no terminal, or it does not know its size.
const USUAL_WINDOW: WindowSize = WindowSize { rows: 24, cols: 80 };
/// Window sizes and signals that may wait to be sent.
const CONTROL_FRAMES: usize = 16;

/// `exec`.
pub async fn exec(client: &Client, args: &cli::Exec) -> Result<u8, Error> {
    let request = ExecRequest {
        argv: args.command.clone(),
        tty: args.tty.then(|| window_size().unwrap_or(USUAL_WINDOW)),
        env: args.env.clone(),
    };
    let mut signals = Signals::catch()?;
    let mut resized = listen(SignalKind::window_change())?;
    let tunnel = client.exec(&args.task, &request).await?;
    let (reader, writer) = tokio::io::split(tunnel);
    let _raw = if args.tty && args.interactive {
        RawTerminal::enter()?
    } else {
        None
    };
    let (control, frames) = mpsc::channel(CONTROL_FRAMES);
    tokio::spawn(send(writer, args.interactive, frames));
    let mut receive = std::pin::pin!(receive(reader));
    let mut interrupted = false;
    loop {
        let frame = tokio::select! {
            code = &mut receive => return code,
            (signal, code) = signals.next() => {
                // A command that ignores the first one does not hold its user.
                if interrupted {
                    return Ok(code);
                }
                interrupted = true;
                let data = signal.as_raw_value().to_be_bytes().to_vec();
                Frame { kind: frames::SIGNAL, data }
            }
            _ = resized.recv(), if args.tty => {
                let Some(size) = window_size() else { continue };
                let data = [size.rows.to_be_bytes(), size.cols.to_be_bytes()].concat();
                Frame { kind: frames::RESIZE, data }
            }
        };
        // Full or closed: the connection stands still or is over, which the receiver will see.
        let _ = control.try_send(frame);
    }
}

/// Copies output until the command has ended.
async fn receive(mut reader: ReadHalf<Tunnel>) -> Result<u8, Error> {
    let (mut stdout, mut stderr) = (tokio::io::stdout(), tokio::io::stderr());
    loop {
        let frame = match frames::read_frame(&mut reader).await {
            // What a socket says of an end is chance: whether something was still to be read there.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => None,
            frame => frame.map_err(Error::Tunnel)?,
        };
        let Some(Frame { kind, data }) = frame else {
            return Err(Error::Tunnel(io::ErrorKind::UnexpectedEof.into()));
        };
        match kind {
            frames::STDOUT => follow::copy(&mut stdout, &data).await?,
            frames::STDERR => follow::copy(&mut stderr, &data).await?,
            frames::ERROR => return Err(Error::Exec(String::from_utf8_lossy(&data).into_owned())),
            frames::EXIT => {
                let code = data.try_into().map(i32::from_be_bytes).map_err(|_| {
                    Error::Tunnel(io::Error::new(
                        io::ErrorKind::InvalidData,
                        "a bad exit code",
                    ))
                })?;
                return Ok(exit::of_command(code));
            }
            _ => {}
        }
    }
}

/// Sends input and control frames. Errors end it: the receiver learns of them too.
async fn send(
    mut writer: WriteHalf<Tunnel>,
    interactive: bool,
    mut control: mpsc::Receiver<Frame>,
) -> io::Result<()> {
    let mut stdin = tokio::io::stdin();
    let mut open = interactive;
    if !open {
        frames::write_frame(&mut writer, frames::STDIN, &[]).await?;
    }
    let mut buffer = vec![0; frames::MAX_FRAME];
    loop {
        tokio::select! {
            read = stdin.read(&mut buffer), if open => {
                let read = read?;
                open = read > 0;
                frames::write_frame(&mut writer, frames::STDIN, &buffer[..read]).await?;
            }
            frame = control.recv() => match frame {
                Some(frame) => frames::write_frame(&mut writer, frame.kind, &frame.data).await?,
                None => return Ok(()),
            }
        }
    }
}

fn window_size() -> Option<WindowSize> {
    let size = termios::tcgetwinsize(io::stdout()).ok()?;
    let size = WindowSize {
        rows: size.ws_row,
        cols: size.ws_col,
    };
    (size.rows > 0 && size.cols > 0).then_some(size)
}

/// The terminal in raw mode; as before when dropped.
struct RawTerminal(Termios);

impl RawTerminal {
    fn enter() -> Result<Option<Self>, Error> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return Ok(None);
        }
        let enter = || {
            let before = termios::tcgetattr(stdin.as_fd())?;
            let mut raw = before.clone();
            raw.make_raw();
            termios::tcsetattr(stdin.as_fd(), OptionalActions::Now, &raw)?;
            Ok(before)
        };
        enter()
            .map(|before| Some(RawTerminal(before)))
            .map_err(|source: rustix::io::Errno| Error::System {
                action: "set the terminal's mode",
                source: source.into(),
            })
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // There is nothing left to do for a terminal that cannot be set back.
        let _ = termios::tcsetattr(io::stdin().as_fd(), OptionalActions::Now, &self.0);
    }
}

/// `proxy`: ends when the guest closes the connection, or nobody reads any more.
pub async fn proxy(client: &Client, task: &str, port: u16) -> Result<u8, Error> {
    let (mut reader, mut writer) = tokio::io::split(client.forward(task, port).await?);
    let input = tokio::spawn(async move {
        tokio::io::copy(&mut tokio::io::stdin(), &mut writer).await?;
        writer.shutdown().await
    });
    let mut stdout = tokio::io::stdout();
    let mut buffer = vec![0; frames::MAX_FRAME];
    let ended = loop {
        match reader.read(&mut buffer).await {
            Ok(0) => break Ok(0),
            Ok(read) => follow::copy(&mut stdout, &buffer[..read]).await?,
            Err(error) => break Err(Error::Tunnel(error)),
        }
    };
    input.abort();
    ended
}
