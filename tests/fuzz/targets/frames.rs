//! Bytes from the other end of an agent's connection, both ways: in whatever pieces they come, the same frames are
//! cut from them, and a message that was understood is written as one that means the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use xbee_protocol::frame::HEADER_BYTES;
use xbee_protocol::{BootConfig, FrameBuffer, GuestMessage, HostMessage, decode, encode_frame};

/// Decodes as `T`, and what it is written as again.
macro_rules! same_again {
    ($type:ty, $body:expr) => {
        if let Ok(message) = decode::<$type>($body) {
            let mut frame = Vec::new();
            // What it is written as may be longer than what was read, and then it is too long.
            if encode_frame(&message, &mut frame).is_ok() {
                let again: $type = decode(&frame[HEADER_BYTES..]).expect("what was written");
                assert_eq!(again, message);
            }
        }
    };
}

/// The bodies of all frames, and whether the stream was given up.
fn frames(pieces: impl Iterator<Item = Vec<u8>>) -> (Vec<Vec<u8>>, bool) {
    let mut buffer = FrameBuffer::default();
    let mut bodies = Vec::new();
    for piece in pieces {
        buffer.extend(&piece);
        loop {
            match buffer.next_body() {
                Ok(Some(body)) => bodies.push(body.to_vec()),
                Ok(None) => break,
                Err(_) => return (bodies, true),
            }
        }
    }
    (bodies, false)
}

fuzz_target!(|input: (u8, &[u8])| {
    let (size, bytes) = input;
    let at_once = frames(std::iter::once(bytes.to_vec()));
    let size = usize::from(size).max(1);
    let in_pieces = frames(bytes.chunks(size).map(<[u8]>::to_vec));
    assert_eq!(at_once, in_pieces);
    for body in &at_once.0 {
        same_again!(GuestMessage, body);
        same_again!(HostMessage, body);
    }
    // Without a header, so that the fuzzer need not find a length that fits.
    same_again!(GuestMessage, bytes);
    same_again!(HostMessage, bytes);
    if let Ok(config) = BootConfig::decode(bytes) {
        assert_eq!(BootConfig::decode(&config.encode()).ok(), Some(config));
    }
});
