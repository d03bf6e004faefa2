//! Frames: a length of four bytes, big endian, and that many bytes of CBOR.

use std::convert::Infallible;

use minicbor::{Decode, Encode};

use crate::MAX_FRAME_BYTES;

/// Bytes of a frame before its body.
pub const HEADER_BYTES: usize = 4;

/// What goes wrong with frames.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The length is beyond the bound.
    #[error("frame of {length} bytes; at most {MAX_FRAME_BYTES} are allowed")]
    TooLong {
        /// The length it has, or says it has.
        length: usize,
    },
    /// The body is not a message of this protocol.
    #[error("frame is not a message of this protocol")]
    Malformed(#[source] minicbor::decode::Error),
    /// There is more in the frame than one message.
    #[error("{extra} bytes after the message in a frame")]
    TrailingBytes {
        /// How many.
        extra: usize,
    },
}

/// CBOR of a value.
pub(crate) fn encode<T: Encode<()>>(value: &T) -> Vec<u8> {
    let mut bytes = Vec::new();
    let encoded: Result<(), minicbor::encode::Error<Infallible>> =
        minicbor::encode(value, &mut bytes);
    // Neither a vector nor a derived encoder refuses anything.
    debug_assert!(encoded.is_ok());
    bytes
}

/// Reads one message from the body of a frame.
///
/// # Errors
/// [`FrameError::Malformed`] or [`FrameError::TrailingBytes`].
pub fn decode<'b, T: Decode<'b, ()>>(body: &'b [u8]) -> Result<T, FrameError> {
    let mut decoder = minicbor::Decoder::new(body);
    let message = decoder.decode().map_err(FrameError::Malformed)?;
    match body.len() - decoder.position() {
        0 => Ok(message),
        extra => Err(FrameError::TrailingBytes { extra }),
    }
}

/// Appends a message as a frame to `out`, or leaves `out` as it was.
///
/// # Errors
/// [`FrameError::TooLong`].
pub fn encode_frame<T: Encode<()>>(message: &T, out: &mut Vec<u8>) -> Result<(), FrameError> {
    let start = out.len();
    out.extend_from_slice(&[0; HEADER_BYTES]);
    let encoded: Result<(), minicbor::encode::Error<Infallible>> =
        minicbor::encode(message, &mut *out);
    debug_assert!(encoded.is_ok());
    let length = out.len() - start - HEADER_BYTES;
    if length > MAX_FRAME_BYTES {
        out.truncate(start);
        return Err(FrameError::TooLong { length });
    }
    // MAX_FRAME_BYTES fits into 32 bits.
    out[start..start + HEADER_BYTES].copy_from_slice(&(length as u32).to_be_bytes());
    Ok(())
}

/// Cuts a stream of bytes, in whatever pieces it comes, into the bodies of frames.
#[derive(Debug, Default)]
pub struct FrameBuffer {
    bytes: Vec<u8>,
    /// Where the first frame not yet taken begins.
    start: usize,
}

impl FrameBuffer {
    /// Takes up bytes read from the connection.
    pub fn extend(&mut self, bytes: &[u8]) {
        if self.start > 0 {
            self.bytes.drain(..self.start);
            self.start = 0;
        }
        self.bytes.extend_from_slice(bytes);
    }

    /// The body of the next frame, if all of it is there.
    ///
    /// # Errors
    /// [`FrameError::TooLong`] as soon as the header is read; the stream is of no use afterwards.
    pub fn next_body(&mut self) -> Result<Option<&[u8]>, FrameError> {
        let rest = &self.bytes[self.start..];
        let Some((header, rest)) = rest.split_first_chunk::<HEADER_BYTES>() else {
            return Ok(None);
        };
        let length = u32::from_be_bytes(*header) as usize;
        if length > MAX_FRAME_BYTES {
            return Err(FrameError::TooLong { length });
        }
        if rest.len() < length {
            return Ok(None);
        }
        let body = self.start + HEADER_BYTES;
        self.start = body + length;
        Ok(Some(&self.bytes[body..body + length]))
    }

    /// Whether nothing is left, not even a part of a frame.
    pub fn is_empty(&self) -> bool {
        self.start == self.bytes.len()
    }

    /// Forgets everything, for a new connection.
    pub fn clear(&mut self) {
        self.bytes.clear();
        self.start = 0;
    }
}
