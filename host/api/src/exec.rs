//! Frames of an exec connection, both ways: kind (1 byte), length (4 bytes, big endian), data.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Largest data in one frame, bytes.
pub const MAX_FRAME: usize = 64 * 1024;
/// Client to server: standard input. Empty: end of input.
pub const STDIN: u8 = 0;
/// Server to client: standard output.
pub const STDOUT: u8 = 1;
/// Server to client: standard error.
pub const STDERR: u8 = 2;
/// Client to server: window size, rows and columns as big-endian u16.
pub const RESIZE: u8 = 3;
/// Server to client, last: exit code as big-endian i32.
pub const EXIT: u8 = 4;
/// Server to client, last: the command could not be run; UTF-8 text.
pub const ERROR: u8 = 5;
/// Client to server: send signal, number as big-endian i32.
pub const SIGNAL: u8 = 6;

/// Bytes before the data.
const HEADER: usize = 5;

/// One frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// One of the constants of this module; unknown kinds are to be skipped.
    pub kind: u8,
    /// At most [`MAX_FRAME`] bytes.
    pub data: Vec<u8>,
}

/// Reads one frame; `None` if the stream ended before it. Not cancel safe.
///
/// # Errors
/// Those of the stream; `UnexpectedEof` within a frame; `InvalidData` for one that is too long.
pub async fn read_frame<R: AsyncRead + Unpin>(reader: &mut R) -> io::Result<Option<Frame>> {
    let mut header = [0u8; HEADER];
    if reader.read(&mut header[..1]).await? == 0 {
        return Ok(None);
    }
    reader.read_exact(&mut header[1..]).await?;
    let [kind, length @ ..] = header;
    let length = u32::from_be_bytes(length) as usize;
    if length > MAX_FRAME {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("an exec frame of {length} bytes, at most {MAX_FRAME} are allowed"),
        ));
    }
    let mut data = vec![0; length];
    reader.read_exact(&mut data).await?;
    Ok(Some(Frame { kind, data }))
}

/// Writes `data` as one frame. Not cancel safe.
///
/// # Errors
/// Those of the stream; `InvalidInput` for more than [`MAX_FRAME`] bytes.
pub async fn write_frame<W: AsyncWrite + Unpin>(
    writer: &mut W,
    kind: u8,
    data: &[u8],
) -> io::Result<()> {
    if data.len() > MAX_FRAME {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut frame = Vec::with_capacity(HEADER + data.len());
    frame.push(kind);
    frame.extend_from_slice(&(data.len() as u32).to_be_bytes());
    frame.extend_from_slice(data);
    writer.write_all(&frame).await?;
    writer.flush().await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn frames_come_back_as_they_were_sent() {
        let (mut near, mut far) = tokio::io::duplex(MAX_FRAME * 2);
        write_frame(&mut near, STDOUT, b"hello").await.unwrap();
        write_frame(&mut near, STDIN, b"").await.unwrap();
        drop(near);
        let frame = read_frame(&mut far).await.unwrap().unwrap();
        assert_eq!((frame.kind, frame.data.as_slice()), (STDOUT, &b"hello"[..]));
        let end = read_frame(&mut far).await.unwrap().unwrap();
        assert_eq!((end.kind, end.data.len()), (STDIN, 0));
        assert_eq!(read_frame(&mut far).await.unwrap(), None);
    }

    #[tokio::test]
    async fn hostile_frames_are_refused() {
        let too_long = [STDOUT, 0, 1, 0, 1];
        let error = read_frame(&mut too_long.as_slice()).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        let cut = [STDOUT, 0, 0, 0, 4, b'h'];
        let error = read_frame(&mut cut.as_slice()).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        let mut sink = tokio::io::sink();
        let error = write_frame(&mut sink, STDIN, &vec![0; MAX_FRAME + 1])
            .await
            .unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }
}
