//! `run` and `submit`: new tasks.

use std::cell::Cell;
use std::io::{self, Read};
use std::path::Path;

use xbee_api::client::{Client, Log};
use xbee_api::{State, SubState, SubmitRequest, TaskStatus, chain};
use xbee_jsdl::limits::MAX_DOCUMENT_BYTES;

use crate::cli;
use crate::document;
use crate::error::Error;
use crate::exit;
use crate::files::{self, Files};
use crate::follow;
use crate::ports::Ports;
use crate::signals::Signals;
use crate::tasks::published;
use crate::term::{self, Progress, note};

/// `submit`.
pub async fn submit(client: &Client, args: &cli::Submit) -> Result<u8, Error> {
    let mut request = request(&args.job)?;
    if !args.wait {
        check_ports(client, &args.job)?;
    }
    let ports = Ports::listen(client, &mut request.publish).await?;
    let progress = Progress::new(!args.json.json);
    let files = Files::of(client, &request);
    files.send(client, &mut request, &progress).await?;
    let task = files::submit(client, &request).await?;
    if args.json.json {
        term::json(&task)?
    } else {
        term::out(task.id)?
    }
    tell_and_wait(client, task, files, ports, &progress, args.wait).await
}

/// Says where a new task's ports are, and waits for its end if that is wanted; gives the exit code.
///
/// # Errors
/// Those of the server, and of what is fetched from it.
pub async fn tell_and_wait(
    client: &Client,
    task: TaskStatus,
    files: Files,
    ports: Ports,
    progress: &Progress,
    wait: bool,
) -> Result<u8, Error> {
    tell_ports(&task);
    ports.tell();
    if !wait {
        return Ok(0);
    }
    let id = task.id.to_string();
    follow::taken(client, &id).await?;
    let task = tokio::select! {
        task = follow::states(client, &id, progress, |_| Ok(())) => task?,
        never = ports.serve(client, &id) => match never {},
    };
    files.fetch(client, &task, progress).await?;
    tell_end(&task);
    Ok(exit::of_job(&task))
}

/// Whether somebody listens on a job's ports when `xbe` does not stay.
///
/// # Errors
/// [`Error::NobodyListens`].
pub fn check_ports(client: &Client, job: &cli::Job) -> Result<(), Error> {
    match client.is_remote() && !job.publish.is_empty() {
        true => Err(Error::NobodyListens),
        false => Ok(()),
    }
}

/// The request for a document.
pub fn request(job: &cli::Job) -> Result<SubmitRequest, Error> {
    Ok(SubmitRequest {
        jsdl: read_text(&job.file)?,
        lenient: job.lenient,
        publish: job.publish.clone(),
        priority: job.priority,
        retries: job.retries,
        ..SubmitRequest::default()
    })
}

/// `run --print-jsdl`.
pub fn print_jsdl(args: &cli::Run) -> Result<u8, Error> {
    term::out(document::of(args)?.trim_end())?;
    Ok(0)
}

/// `run`.
pub async fn run(client: &Client, args: &cli::Run) -> Result<u8, Error> {
    let jsdl = document::of(args)?;
    let mut signals = Signals::catch()?;
    let mut request = SubmitRequest {
        jsdl,
        publish: args.publish.clone(),
        ..SubmitRequest::default()
    };
    let ports = Ports::listen(client, &mut request.publish).await?;
    let progress = Progress::new(!args.quiet);
    let files = Files::of(client, &request);
    let interrupted = tokio::select! {
        sent = files.send(client, &mut request, &progress) => sent.map(|()| None)?,
        (_, code) = signals.next() => Some(code),
    };
    if let Some(code) = interrupted {
        progress.clear();
        files::take_back(client, &request.uploads).await;
        return Ok(code);
    }
    let task = files::submit(client, &request).await?;
    if !args.quiet {
        tell_ports(&task);
        ports.tell();
    }
    let id = task.id.to_string();

    let (mut stdout, mut stderr) = (tokio::io::stdout(), tokio::io::stderr());
    let line_is_open = Cell::new(false);
    let work = async {
        follow::taken(client, &id).await?;
        tokio::try_join!(
            follow::states(client, &id, &progress, |event| {
                // From here on the terminal is the job's, or from its first output on.
                if event.transition.substate == Some(SubState::Executing) {
                    progress.stop();
                }
                Ok(())
            }),
            follow::log(client, &id, Log::Stdout, true, async |data| {
                progress.stop();
                follow::copy(&mut stdout, data).await
            }),
            follow::log(client, &id, Log::Stderr, true, async |data| {
                line_is_open.set(data.last().is_some_and(|&byte| byte != b'\n'));
                progress.stop();
                follow::copy(&mut stderr, data).await
            }),
        )
    };
    let mut work = std::pin::pin!(work);
    let mut serving = std::pin::pin!(ports.serve(client, &id));
    let mut interrupted = None;
    let ended = loop {
        tokio::select! {
            ended = &mut work => break ended,
            never = &mut serving => match never {},
            (_, code) = signals.next() => {
                if interrupted.is_some() {
                    return Ok(code);
                }
                interrupted = Some(code);
                progress.stop();
                end_line(&line_is_open);
                note(format_args!("terminating task {id}; Ctrl-C again leaves at once"));
                let (client, id) = (client.clone(), id.clone());
                tokio::spawn(async move {
                    let terminated = match follow::taken(&client, &id).await {
                        Ok(()) => client.terminate(&id).await.map(drop).map_err(Error::from),
                        Err(error) => Err(error),
                    };
                    if let Err(error) = terminated {
                        note(chain(&error));
                    }
                });
            }
        }
    };
    let task = match ended {
        Ok((task, (), ())) => task,
        Err(error) if error.is_closed_pipe() => {
            client.terminate(&id).await?;
            return Ok(exit::BROKEN_PIPE);
        }
        Err(error) => {
            end_line(&line_is_open);
            note(format_args!(
                "task {id} was left as it is: see `xbe status {id}`"
            ));
            return Err(error);
        }
    };
    if task.state != State::Finished {
        end_line(&line_is_open);
    }
    tell_end(&task);
    let progress = Progress::new(!args.quiet);
    tokio::select! {
        fetched = files.fetch(client, &task, &progress) => fetched?,
        (_, code) = signals.next() => {
            progress.clear();
            note(format_args!("task {id} keeps its results: see `xbe fetch`"));
            return Ok(code);
        }
    }
    if args.rm {
        client.remove(&id).await?;
    }
    Ok(interrupted.unwrap_or_else(|| exit::of_job(&task)))
}

/// Ends the line that the job has left open on standard error.
fn end_line(is_open: &Cell<bool>) {
    if is_open.replace(false) {
        term::raw_note("");
    }
}

/// A document as text; `-` is standard input.
pub fn read_text(path: &Path) -> Result<String, Error> {
    String::from_utf8(read(path)?).map_err(|_| Error::NotUtf8 {
        path: path.to_owned(),
    })
}

/// Reads a document; `-` is standard input.
pub fn read(path: &Path) -> Result<Vec<u8>, Error> {
    let open = || -> io::Result<Box<dyn Read>> {
        Ok(if path == Path::new("-") {
            Box::new(io::stdin())
        } else {
            Box::new(std::fs::File::open(path)?)
        })
    };
    let mut bytes = Vec::new();
    // One byte more than allowed: what is longer is refused, not cut.
    open()
        .and_then(|file| {
            file.take(MAX_DOCUMENT_BYTES as u64 + 1)
                .read_to_end(&mut bytes)
        })
        .map_err(|source| Error::Read {
            path: path.to_owned(),
            source,
        })?;
    Ok(bytes)
}

fn tell_ports(task: &TaskStatus) {
    for port in &task.ports {
        note(format_args!("port {}", published(port)));
    }
}

/// Says why a task has no exit code of its own.
fn tell_end(task: &TaskStatus) {
    let end = match task.state {
        State::Failed => "failed",
        State::Terminated => "was terminated",
        _ => return,
    };
    match &task.reason {
        Some(reason) => note(format_args!("the job {end}: {}", term::clean(reason))),
        None => note(format_args!("the job {end}")),
    }
}
