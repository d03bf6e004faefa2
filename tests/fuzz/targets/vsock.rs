//! A guest that sends any packets in any order to one connection of the switch, with a host side that does what it
//! likes: credit is kept on both sides, bytes stay in order, and nothing comes after the end.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use xbee_vswitch::conn::{BUF_ALLOC, Conn, FROM_HOST_MAX, Key};
use xbee_vswitch::packet::{HEADER_LEN, Header, TYPE_STREAM, op};

#[derive(Debug, Arbitrary)]
enum Step {
    /// The guest sends a packet; a payload belongs to it if it is one with data.
    Packet {
        header: [u8; HEADER_LEN],
        payload: u16,
    },
    /// As most guests do: a packet with sensible fields.
    Sensible {
        op: u8,
        flags: u8,
        buf_alloc: u32,
        taken: u16,
        payload: u16,
    },
    Accept,
    Refuse,
    GuestGone,
    /// The host side takes so many bytes, at most those that are there.
    Deliver(u16),
    /// The host side has so many bytes, at most those that there is room for.
    FromHost(u16),
    WantCredit,
    HostEof,
    HostDeaf,
    /// The guest has room for so many bytes.
    Next(u16),
}

#[derive(Debug, Arbitrary)]
struct Input {
    by_guest: bool,
    request_buf_alloc: u32,
    steps: Vec<Step>,
}

/// Bytes whose place in the stream can be told from them.
fn pattern(from: u64, len: usize) -> Vec<u8> {
    (from..).take(len).map(|at| (at % 251) as u8).collect()
}

fuzz_target!(|input: Input| {
    let key = Key {
        guest_port: 1,
        peer_cid: 2,
        peer_port: 3,
    };
    let request = Header {
        op: op::REQUEST,
        buf_alloc: input.request_buf_alloc,
        ..Header::default()
    };
    let mut conn = match input.by_guest {
        true => Conn::dialling(3, key, &request),
        false => Conn::requested(3, key),
    };
    let mut guest_took: u32 = 0;
    // Bytes: sent by the guest, taken by the host side, given by the host side, sent to the guest.
    let (mut sent, mut taken, mut given, mut told) = (0u64, 0u64, 0u64, 0u64);
    let mut closed = false;
    for step in input.steps {
        let packet = match step {
            Step::Packet { header, payload } => Some((Header::decode(&header), payload)),
            Step::Sensible {
                op,
                flags,
                buf_alloc,
                taken,
                payload,
            } => {
                guest_took = guest_took
                    .wrapping_add(u32::from(taken).min((told as u32).wrapping_sub(guest_took)));
                let op = u16::from(op) % 8;
                let header = Header {
                    op,
                    flags: flags.into(),
                    buf_alloc,
                    fwd_cnt: guest_took,
                    kind: TYPE_STREAM,
                    ..Header::default()
                };
                Some((header, payload))
            }
            Step::Accept => {
                conn.accept();
                None
            }
            Step::Refuse => {
                conn.refuse();
                None
            }
            Step::GuestGone => {
                conn.guest_gone();
                None
            }
            Step::Deliver(n) => {
                let n = usize::from(n).min(conn.to_host().len());
                assert_eq!(
                    conn.to_host()[..n],
                    pattern(taken, n),
                    "out of order for the host side"
                );
                conn.delivered(n);
                taken += n as u64;
                None
            }
            Step::FromHost(n) => {
                let n = usize::from(n).min(conn.host_window());
                conn.push_from_host(&pattern(given, n));
                given += n as u64;
                None
            }
            Step::WantCredit => {
                conn.want_credit();
                None
            }
            Step::HostEof => {
                conn.host_eof();
                None
            }
            Step::HostDeaf => {
                conn.host_deaf();
                taken = sent;
                None
            }
            Step::Next(room) => {
                if let Some(packet) = conn.next_packet(room.into()) {
                    let header = packet.header;
                    assert!(!closed || header.op == op::RST, "{header:?} after the end");
                    assert_eq!(header.len as usize, packet.payload.len());
                    assert!(packet.payload.len() <= usize::from(room));
                    assert!(packet.payload.is_empty() || header.op == op::RW);
                    assert_eq!(
                        packet.payload,
                        pattern(told, packet.payload.len()),
                        "out of order for the guest"
                    );
                    told += packet.payload.len() as u64;
                    closed |= header.op == op::RST;
                    let decoded = Header::decode(&header.encode());
                    assert_eq!(decoded, header);
                }
                None
            }
        };
        if let Some((header, payload)) = packet {
            let before = conn.to_host().len();
            let data = match header.op {
                op::RW => pattern(sent, payload.into()),
                _ => Vec::new(),
            };
            conn.on_packet(&header, &data);
            let kept = conn.to_host().len();
            if kept > before {
                assert_eq!(kept - before, data.len());
                sent += data.len() as u64;
            } else if header.op == op::RW && !conn.is_closed() && !data.is_empty() {
                // The host side reads no more, and the bytes are dropped.
                sent += data.len() as u64;
                taken = sent;
            }
        }
        assert!(conn.to_host().len() <= BUF_ALLOC as usize);
        assert!(conn.host_window() <= FROM_HOST_MAX);
        assert!(!conn.is_finished() || conn.is_closed());
        assert!(!conn.to_host_ended() || conn.to_host().is_empty());
    }
});
