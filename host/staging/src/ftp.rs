//! FTP (RFC 959) in passive mode: EPSV (RFC 2428) first, PASV where the server has only that.

use std::time::Duration;

use bytes::BytesMut;
use suppaftp::tokio::AsyncFtpStream;
use suppaftp::types::FileType;
use suppaftp::{FtpError, Mode, Status};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::timeout;

use crate::error::{ErrorKind, tame};
use crate::inflow::{Feed, Halt, Piece};
use crate::limits::Limits;
use crate::meter::Meter;
use crate::put::Creation;
use crate::resume::{Resume, changed};
use crate::uri::Uri;

/// Bytes read at once.
const CHUNK_BYTES: usize = 128 << 10;

/// How long to say goodbye to a server, or to remove a half file from it.
const FAREWELL: Duration = Duration::from_millis(600);

/// Downloads `uri` into `feed`. Goes on with further connections if one breaks (REST, RFC 3659).
pub(crate) async fn get(uri: &Uri, limits: &Limits, feed: &Feed) -> Result<(), Halt> {
    let mut resume = Resume::new(limits);
    let mut version = None;
    loop {
        let halt = match get_once(uri, limits, feed, &mut resume, &mut version).await {
            Ok(()) => return Ok(()),
            Err(halt) => halt,
        };
        // Without both the file cannot be recognised.
        let same = matches!(version, Some((Some(size), Some(_))) if resume.received_bytes() < size);
        resume.again(same, halt, &feed.meter).await?;
    }
}

/// Length and time of last modification, as far as the server tells.
type Version = (Option<u64>, Option<String>);

/// One connection's part of a download. Notes the version that the first connection brings.
async fn get_once(
    uri: &Uri,
    limits: &Limits,
    feed: &Feed,
    resume: &mut Resume,
    version: &mut Option<Version>,
) -> Result<(), Halt> {
    let path = uri.ftp_path()?;
    let mut ftp = login(uri, limits, &feed.meter).await?;
    // Not every server knows SIZE; without it the length is only not known in advance.
    let size = ftp.size(&path).await.ok().map(|size| size as u64);
    feed.meter.peer_turn();
    let modified = match size {
        Some(_) => ftp.mdtm(&path).await.ok().map(|time| time.to_string()),
        None => None,
    };
    let now = (size, modified);
    match version {
        Some(before) if *before != now => return Err(changed()),
        Some(_) => {}
        None => {
            if let Some(size) = size {
                feed.meter.expect(size)?;
            }
            *version = Some(now);
        }
    }
    feed.meter.peer_turn();
    let opened = match open_download(&mut ftp, &path, resume).await {
        Err(error) if fall_back(&mut ftp, &error) => open_download(&mut ftp, &path, resume).await,
        opened => opened,
    };
    let mut data = opened.map_err(|error| failed(error, Access::Read))?;
    let mut chunk = BytesMut::new();
    loop {
        chunk.reserve(CHUNK_BYTES);
        let read = data.read_buf(&mut chunk).await;
        let amount =
            read.map_err(|error| failed(FtpError::ConnectionError(error), Access::Read))?;
        if amount == 0 {
            break;
        }
        resume.push(feed, chunk.split().freeze()).await?;
    }
    // Only the final reply tells a complete file from a lost connection.
    let ended = data.finish().await;
    let received = resume.received_bytes();
    if let Some(size) = size.filter(|size| received < *size) {
        let said = ended
            .err()
            .map_or_else(String::new, |error| format!("; {error}"));
        return Err(Halt::Failed(ErrorKind::Transfer {
            source: format!("the server sent {received} of {size} bytes{}", tame(&said)).into(),
        }));
    }
    ended.map_err(|error| failed(error, Access::Read))?;
    farewell(ftp).await;
    Ok(())
}

async fn open_download(
    ftp: &mut AsyncFtpStream,
    path: &str,
    resume: &Resume,
) -> Result<suppaftp::tokio::TransferStream<suppaftp::tokio::AsyncNoTlsStream>, FtpError> {
    // It holds for the next command only, and there may be two.
    let offset = usize::try_from(resume.received_bytes()).unwrap_or(usize::MAX);
    ftp.resume_transfer(offset).await?;
    ftp.retr_as_stream(path).await
}

/// Uploads `pieces` to `uri`, until `interrupted` resolves. What was sent by then is removed; a file that
/// the server did not let this upload replace is left alone.
pub(crate) async fn put(
    uri: &Uri,
    limits: &Limits,
    creation: Creation,
    pieces: mpsc::Receiver<Piece>,
    meter: &Meter,
    interrupted: impl Future<Output = ErrorKind>,
) -> Result<(), ErrorKind> {
    tokio::pin!(interrupted);
    let path = uri.ftp_path()?;
    let prepare = async {
        let mut ftp = login(uri, limits, meter).await?;
        if creation == Creation::DontOverwrite && ftp.size(&path).await.is_ok() {
            return Err(ErrorKind::Exists);
        }
        meter.peer_turn();
        Ok(ftp)
    };
    let mut ftp = tokio::select! {
        ftp = prepare => ftp?,
        kind = &mut interrupted => return Err(kind),
    };
    let mut started = false;
    let sent = tokio::select! {
        sent = send(&mut ftp, &path, creation, pieces, meter, &mut started) => sent,
        kind = interrupted => Err(kind),
    };
    match sent {
        Ok(()) => farewell(ftp).await,
        // To an FTP server the end of the data connection is the end of the file.
        Err(_) if started && creation != Creation::Append => {
            let removed = timeout(FAREWELL, ftp.rm(&path)).await;
            tracing::debug!(%uri, ?removed, "removing a half uploaded file");
        }
        Err(_) => {}
    }
    sent
}

async fn send(
    ftp: &mut AsyncFtpStream,
    path: &str,
    creation: Creation,
    mut pieces: mpsc::Receiver<Piece>,
    meter: &Meter,
    started: &mut bool,
) -> Result<(), ErrorKind> {
    let mut opened = open_upload(ftp, path, creation).await;
    if let Err(error) = &opened
        && fall_back(ftp, error)
    {
        opened = open_upload(ftp, path, creation).await;
    }
    let mut data = opened.map_err(|error| failed(error, Access::Write))?;
    *started = true;
    loop {
        match pieces.recv().await {
            Some(Piece::Data(chunk)) => {
                meter.peer_turn();
                data.write_all(&chunk)
                    .await
                    .map_err(|error| failed(FtpError::ConnectionError(error), Access::Write))?;
            }
            Some(Piece::End) => break,
            None => {
                return Err(ErrorKind::Transfer {
                    source: "the source was cut off".into(),
                });
            }
        }
    }
    meter.peer_turn();
    data.finish()
        .await
        .map_err(|error| failed(error, Access::Write))
}

async fn open_upload(
    ftp: &mut AsyncFtpStream,
    path: &str,
    creation: Creation,
) -> Result<suppaftp::tokio::TransferStream<suppaftp::tokio::AsyncNoTlsStream>, FtpError> {
    match creation {
        Creation::Append => ftp.append_with_stream(path).await,
        Creation::Overwrite | Creation::DontOverwrite => ftp.put_with_stream(path).await,
    }
}

/// Connects and logs in; anonymous unless the URI names a user.
async fn login(uri: &Uri, limits: &Limits, meter: &Meter) -> Result<AsyncFtpStream, ErrorKind> {
    let url = uri.secret();
    let host = url
        .host_str()
        .map(|host| host.trim_matches(['[', ']']))
        .ok_or_else(|| ErrorKind::InvalidUri {
            reason: "it names no host".into(),
        })?;
    let (user, password) = match uri.credentials()? {
        Some(credentials) => credentials,
        None => ("anonymous".to_owned(), "anonymous@".to_owned()),
    };
    let connect = TcpStream::connect((host, url.port().unwrap_or(21)));
    meter.own_turn();
    let stream = timeout(limits.connect, connect)
        .await
        .map_err(|_| ErrorKind::Timeout {
            what: "connecting",
            after: limits.connect,
        })?
        .map_err(|error| ErrorKind::Connect {
            source: error.into(),
        })?;
    meter.peer_turn();
    let mut ftp = AsyncFtpStream::connect_with_stream(stream)
        .await
        .map_err(|error| failed(error, Access::Other))?;
    ftp.set_mode(Mode::ExtendedPassive);
    // Data connections go to the server itself, whatever address it names.
    ftp.set_passive_nat_workaround(true);
    meter.peer_turn();
    ftp.login(user, password)
        .await
        .map_err(|error| match error {
            // The text is left out: a server may repeat the password in it.
            FtpError::UnexpectedResponse(response) => ErrorKind::AccessDenied {
                detail: format!("FTP login failed with {}", response.status.code()),
            },
            error => failed(error, Access::Other),
        })?;
    meter.peer_turn();
    ftp.transfer_type(FileType::Binary)
        .await
        .map_err(|error| failed(error, Access::Other))?;
    meter.peer_turn();
    Ok(ftp)
}

/// Whether `error` means that the server does not know EPSV; then PASV is tried next.
fn fall_back(ftp: &mut AsyncFtpStream, error: &FtpError) -> bool {
    let unknown = matches!(
        error,
        FtpError::UnexpectedResponse(response)
            if matches!(
                response.status,
                Status::BadCommand | Status::BadArguments | Status::NotImplemented
            ) || response.status.code() == 522
    );
    if unknown {
        ftp.set_mode(Mode::Passive);
    }
    unknown
}

/// Ends the session politely, if the server is.
async fn farewell(mut ftp: AsyncFtpStream) {
    if !matches!(timeout(FAREWELL, ftp.quit()).await, Ok(Ok(()))) {
        tracing::debug!("the FTP server did not say goodbye");
    }
}

/// What was asked of the server.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Access {
    Read,
    Write,
    Other,
}

/// Sorts the client's errors. 550 is both "no such file" and "permission denied".
fn failed(error: FtpError, access: Access) -> ErrorKind {
    let response = match error {
        FtpError::UnexpectedResponse(response) => response,
        FtpError::ConnectionError(error) => {
            return ErrorKind::Transfer {
                source: error.into(),
            };
        }
        error => {
            return ErrorKind::Transfer {
                source: error.into(),
            };
        }
    };
    let detail = tame(&String::from_utf8_lossy(&response.body));
    let denied = detail.to_ascii_lowercase().contains("denied");
    match (response.status.code(), access) {
        (530 | 532 | 553, _) | (550, Access::Write) => ErrorKind::AccessDenied { detail },
        (550, Access::Read) if denied => ErrorKind::AccessDenied { detail },
        (550, Access::Read) => ErrorKind::NotFound { detail },
        _ => ErrorKind::Ftp { reply: detail },
    }
}
