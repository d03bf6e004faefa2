//! Bytes of a client of the message broker: in whatever pieces they come, the same frames are cut from them, what was
//! understood is written as the same again, and the broker stands whatever such clients ask for.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use xbee_mq::broker::{Broker, ConnectionId};
use xbee_mq::decode::{Decoder, FrameLimits};
use xbee_mq::destination::Rights;
use xbee_mq::frame::{Frame, Headers, Version};
use xbee_mq::limits::Limits;

const LIMITS: FrameLimits = FrameLimits {
    headers: 16,
    header_line_bytes: 200,
    header_bytes: 1000,
    body_bytes: 2000,
};

/// All frames, and whether the stream was given up.
fn frames<'a>(version: Version, pieces: impl Iterator<Item = &'a [u8]>) -> (Vec<Frame>, bool) {
    let mut decoder = Decoder::new(version, LIMITS);
    let mut frames = Vec::new();
    for mut piece in pieces {
        while !piece.is_empty() {
            match decoder.decode(&mut piece) {
                Ok(Some(frame)) => frames.push(frame),
                Ok(None) => {}
                Err(_) => return (frames, true),
            }
        }
    }
    (frames, false)
}

/// Without what writing adds.
fn bare(frame: &Frame) -> Frame {
    let headers: Headers = frame
        .headers
        .iter()
        .filter(|(name, _)| *name != "content-length")
        .collect();
    Frame {
        headers,
        ..frame.clone()
    }
}

fuzz_target!(|input: (u8, u8, &[u8])| {
    let (version, size, bytes) = input;
    let version = Version::ALL[usize::from(version) % 3];
    let at_once = frames(version, std::iter::once(bytes));
    let size = usize::from(size).max(1);
    assert_eq!(frames(version, bytes.chunks(size)), at_once);
    let limits = Limits {
        queue_messages: 10,
        subscriptions: 10,
        redeliveries: 2,
        ..Limits::default()
    };
    let mut broker = Broker::new(limits, 1, true);
    let clients = [ConnectionId(1), ConnectionId(2)];
    for id in clients {
        broker.connect(id, version, Arc::new(Rights::all()));
    }
    for (n, frame) in at_once.0.into_iter().enumerate() {
        // The others cannot write all that a client of 1.2 can.
        if version == Version::V1_2 {
            let mut written = Vec::new();
            frame.encode(version, &mut written);
            if let (again, false) = frames(version, std::iter::once(&written[..]))
                && let [again] = &again[..]
            {
                assert_eq!(bare(again), bare(&frame));
            }
        }
        broker.frame(clients[n % 2], frame);
        broker.effects().for_each(drop);
        if let Some((ticket, _)) = broker.take_changes() {
            broker.stored(ticket);
        }
    }
    for id in clients {
        broker.gone(id);
    }
});
