//! A model guest that keeps the standard's rules, against [`Conn`], in random interleavings.

use proptest::prelude::*;

use super::*;

const GUEST_CID: u32 = 7;

fn key() -> Key {
    Key {
        guest_port: 1000,
        peer_cid: 2,
        peer_port: 1 << 30,
    }
}

fn header(op: u16) -> Header {
    Header {
        src_cid: GUEST_CID.into(),
        dst_cid: 2,
        src_port: 1000,
        dst_port: 1 << 30,
        kind: TYPE_STREAM,
        op,
        buf_alloc: 64 * 1024,
        ..Header::default()
    }
}

fn established() -> Conn {
    let mut conn = Conn::requested(GUEST_CID, key());
    assert_eq!(conn.next_packet(4096).unwrap().header.op, op::REQUEST);
    conn.on_packet(&header(op::RESPONSE), &[]);
    assert!(conn.is_established());
    conn
}

fn ops(conn: &mut Conn) -> Vec<(u16, u32)> {
    let mut ops = Vec::new();
    while let Some(p) = conn.next_packet(4096) {
        ops.push((p.header.op, p.header.flags));
    }
    ops
}

/// Which byte stands at a position of a direction.
fn byte(direction: u8, at: usize) -> u8 {
    (at.wrapping_mul(31) ^ (at >> 8)) as u8 ^ direction
}

/// The other end, as virtio 1.2 section 5.10.6 wants it.
struct Guest {
    buf_alloc: u32,
    unread: usize,
    read: u32,
    told: u32,
    received: usize,
    sent: usize,
    host_buf_alloc: u32,
    host_fwd_cnt: u32,
    eof: bool,
    rst: bool,
}

impl Guest {
    fn header(&mut self, op: u16) -> Header {
        self.told = self.read;
        Header {
            buf_alloc: self.buf_alloc,
            fwd_cnt: self.read,
            ..header(op)
        }
    }

    fn credit(&self) -> usize {
        let in_flight = (self.sent as u32).wrapping_sub(self.host_fwd_cnt);
        self.host_buf_alloc.checked_sub(in_flight).unwrap() as usize
    }

    fn send(&mut self, conn: &mut Conn, n: usize) {
        let n = n.min(self.credit());
        if n > 0 {
            let bytes: Vec<u8> = (self.sent..self.sent + n).map(|i| byte(1, i)).collect();
            self.sent += n;
            let header = Header {
                len: n as u32,
                ..self.header(op::RW)
            };
            conn.on_packet(&header, &bytes);
        }
    }

    fn read(&mut self, conn: &mut Conn, n: usize) {
        let n = n.min(self.unread);
        self.unread -= n;
        self.read = self.read.wrapping_add(n as u32);
        if self.read.wrapping_sub(self.told) > self.buf_alloc / 2 {
            let update = self.header(op::CREDIT_UPDATE);
            conn.on_packet(&update, &[]);
        }
    }

    /// Takes one packet with `room`; false if there was none.
    fn take(&mut self, conn: &mut Conn, room: usize) -> bool {
        let Some(packet) = conn.next_packet(room) else {
            return false;
        };
        let h = packet.header;
        assert!(!self.rst, "a packet after the RST");
        assert!(packet.payload.len() <= room);
        assert_eq!(packet.payload.len(), h.len as usize);
        assert_eq!((h.src_port, h.dst_port), (1 << 30, 1000));
        self.host_buf_alloc = h.buf_alloc;
        self.host_fwd_cnt = h.fwd_cnt;
        match h.op {
            op::RW => {
                assert!(!self.eof, "data after SHUTDOWN");
                for (i, b) in packet.payload.iter().enumerate() {
                    assert_eq!(*b, byte(0, self.received + i));
                }
                self.received += packet.payload.len();
                self.unread += packet.payload.len();
                assert!(self.unread <= self.buf_alloc as usize, "credit exceeded");
            }
            op::CREDIT_REQUEST => {
                let update = self.header(op::CREDIT_UPDATE);
                conn.on_packet(&update, &[]);
            }
            op::SHUTDOWN => self.eof |= h.flags & SHUTDOWN_SEND != 0,
            op::RST => self.rst = true,
            op::CREDIT_UPDATE => {}
            other => panic!("unexpected operation {other}"),
        }
        true
    }
}

#[derive(Debug, Clone)]
enum Step {
    HostWrites(usize),
    HostReads(usize),
    GuestWrites(usize),
    GuestReads(usize),
    Packet(usize),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (1usize..100_000).prop_map(Step::HostWrites),
        (1usize..100_000).prop_map(Step::HostReads),
        (1usize..70_000).prop_map(Step::GuestWrites),
        (1usize..100_000).prop_map(Step::GuestReads),
        (0usize..5_000).prop_map(Step::Packet),
    ]
}

struct Host {
    wanted: usize,
    pushed: usize,
    taken: usize,
}

impl Host {
    fn push(&mut self, conn: &mut Conn) {
        let n = (self.wanted - self.pushed).min(conn.host_window());
        let bytes: Vec<u8> = (self.pushed..self.pushed + n).map(|i| byte(0, i)).collect();
        if n > 0 {
            conn.push_from_host(&bytes);
            self.pushed += n;
        } else if self.pushed < self.wanted {
            conn.want_credit();
        }
    }

    fn take(&mut self, conn: &mut Conn, n: usize) {
        let n = n.min(conn.to_host().len());
        for (i, b) in conn.to_host()[..n].iter().enumerate() {
            assert_eq!(*b, byte(1, self.taken + i));
        }
        self.taken += n;
        conn.delivered(n);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    /// Whatever the interleaving, room and buffer sizes: every byte arrives once and in order, no
    /// side's buffer is overrun, nothing stalls, and the end comes after the last byte.
    #[test]
    fn bytes_arrive_exactly(
        buf_alloc in 256u32..300_000,
        steps in proptest::collection::vec(step(), 1..120),
    ) {
        let mut conn = Conn::requested(GUEST_CID, key());
        let mut guest = Guest {
            buf_alloc, unread: 0, read: 0, told: 0, received: 0, sent: 0,
            host_buf_alloc: 0, host_fwd_cnt: 0, eof: false, rst: false,
        };
        let request = conn.next_packet(0).unwrap().header;
        prop_assert_eq!(request.op, op::REQUEST);
        guest.host_buf_alloc = request.buf_alloc;
        let response = guest.header(op::RESPONSE);
        conn.on_packet(&response, &[]);
        let mut host = Host { wanted: 0, pushed: 0, taken: 0 };

        for step in steps {
            match step {
                Step::HostWrites(n) => { host.wanted += n; host.push(&mut conn); }
                Step::HostReads(n) => host.take(&mut conn, n),
                Step::GuestWrites(n) => guest.send(&mut conn, n),
                Step::GuestReads(n) => guest.read(&mut conn, n),
                Step::Packet(room) => { guest.take(&mut conn, room); }
            }
            prop_assert!(conn.to_host().len() <= BUF_ALLOC as usize);
            prop_assert!(conn.is_established());
        }

        // Everybody reads: what is on its way must arrive without anything new being written.
        let mut rounds = 0;
        while host.pushed < host.wanted || guest.received < host.pushed || host.taken < guest.sent {
            host.push(&mut conn);
            while guest.take(&mut conn, 4096) {}
            guest.read(&mut conn, usize::MAX);
            host.take(&mut conn, usize::MAX);
            rounds += 1;
            prop_assert!(rounds < 20_000_000 / buf_alloc + 100, "stalled");
        }

        // The guest closes after a last word, the host reads late: RST only after that.
        guest.send(&mut conn, 1000);
        let last = conn.to_host().len();
        let shutdown = Header { flags: SHUTDOWN_BOTH, ..guest.header(op::SHUTDOWN) };
        conn.on_packet(&shutdown, &[]);
        while guest.take(&mut conn, 4096) {}
        prop_assert_eq!(guest.rst, last == 0);
        prop_assert!(!conn.to_host_ended() || last == 0);
        host.take(&mut conn, usize::MAX);
        prop_assert!(conn.to_host_ended());
        while guest.take(&mut conn, 4096) {}
        prop_assert!(guest.rst && conn.is_finished());
        prop_assert_eq!(host.taken, guest.sent);
    }

    /// A hostile guest: any packets, at any time. No panic, bounded buffers, and the connection
    /// can always be brought to its end.
    #[test]
    fn garbage_is_survived(packets in proptest::collection::vec(
        (0u16..9, any::<u32>(), any::<u32>(), any::<u32>(), 0usize..70_000, any::<bool>()), 0..200,
    )) {
        let mut conn = Conn::requested(GUEST_CID, key());
        for (op, flags, buf_alloc, fwd_cnt, len, host_acts) in packets {
            let header = Header { op, flags, buf_alloc, fwd_cnt, ..header(op) };
            conn.on_packet(&header, &vec![0; len]);
            prop_assert!(conn.to_host().len() <= BUF_ALLOC as usize);
            if host_acts {
                let n = conn.host_window();
                prop_assert!(n <= FROM_HOST_MAX);
                conn.push_from_host(&vec![0; n]);
                conn.want_credit();
                while conn.next_packet(4096).is_some() {}
            }
        }
        conn.host_eof();
        conn.host_deaf();
        conn.refuse();
        while conn.next_packet(4096).is_some() {}
        prop_assert!(conn.is_finished());
    }
}

#[test]
fn more_than_the_credit_ends_the_connection() {
    let mut conn = established();
    conn.on_packet(&header(op::RW), &vec![0; BUF_ALLOC as usize]);
    assert!(conn.is_established());
    conn.on_packet(&header(op::RW), &[0]);
    assert_eq!(ops(&mut conn), [(op::RST, 0)]);
    // What came in time is still the host side's.
    assert_eq!(conn.to_host().len(), BUF_ALLOC as usize);
    assert!(!conn.is_finished());
    conn.delivered(BUF_ALLOC as usize);
    assert!(conn.is_finished());
}

#[test]
fn half_closed_by_the_host_the_guest_goes_on() {
    let mut conn = established();
    conn.push_from_host(b"last");
    conn.host_eof();
    assert_eq!(ops(&mut conn), [(op::RW, 0), (op::SHUTDOWN, SHUTDOWN_SEND)]);
    conn.on_packet(&header(op::RW), b"answer");
    assert_eq!(conn.to_host(), b"answer");
    assert_eq!(conn.time_limit(), None);
}

#[test]
fn half_closed_by_the_guest_the_host_goes_on() {
    let mut conn = established();
    let shutdown = Header {
        flags: SHUTDOWN_SEND,
        ..header(op::SHUTDOWN)
    };
    conn.on_packet(&shutdown, &[]);
    assert!(conn.to_host_ended() && !conn.guest_deaf());
    conn.push_from_host(b"more");
    assert_eq!(ops(&mut conn), [(op::RW, 0)]);
    // Data after its own SHUTDOWN is a breach.
    conn.on_packet(&header(op::RW), b"x");
    assert_eq!(ops(&mut conn), [(op::RST, 0)]);
}

#[test]
fn a_deaf_guest_is_not_written_to() {
    let mut conn = established();
    conn.push_from_host(b"lost");
    let shutdown = Header {
        flags: SHUTDOWN_RECEIVE,
        ..header(op::SHUTDOWN)
    };
    conn.on_packet(&shutdown, &[]);
    assert!(conn.guest_deaf());
    assert_eq!(conn.host_window(), 0);
    assert_eq!(ops(&mut conn), []);
}

#[test]
fn a_host_that_hangs_up_is_waited_for_until_the_guest_resets() {
    let mut conn = established();
    conn.on_packet(&header(op::RW), b"unread");
    conn.host_deaf();
    conn.host_eof();
    assert_eq!(ops(&mut conn), [(op::SHUTDOWN, SHUTDOWN_BOTH)]);
    assert_eq!(conn.time_limit(), Some(CLOSE_TIMEOUT));
    // In flight before the guest heard of it.
    conn.on_packet(&header(op::RW), b"too late");
    assert!(conn.to_host().is_empty());
    conn.on_packet(&header(op::RST), &[]);
    assert!(conn.is_finished());
    assert_eq!(ops(&mut conn), []);
}

#[test]
fn a_request_unanswered_or_refused_ends() {
    let mut conn = Conn::requested(GUEST_CID, key());
    assert_eq!(conn.time_limit(), Some(REQUEST_TIMEOUT));
    conn.on_packet(&header(op::RST), &[]);
    assert!(conn.is_finished() && conn.to_host_ended());

    let mut conn = Conn::requested(GUEST_CID, key());
    conn.refuse();
    assert_eq!(ops(&mut conn), [(op::RST, 0)]);
}

#[test]
fn credit_is_asked_once_and_given_when_asked() {
    let mut conn = Conn::requested(GUEST_CID, key());
    assert_eq!(ops(&mut conn), [(op::REQUEST, 0)]);
    let response = Header {
        buf_alloc: 0,
        ..header(op::RESPONSE)
    };
    conn.on_packet(&response, &[]);
    assert_eq!(conn.host_window(), 0);
    conn.want_credit();
    conn.want_credit();
    assert_eq!(ops(&mut conn), [(op::CREDIT_REQUEST, 0)]);
    conn.want_credit();
    assert_eq!(ops(&mut conn), []);
    conn.on_packet(&header(op::CREDIT_UPDATE), &[]);
    assert_eq!(conn.host_window(), 64 * 1024);
    conn.on_packet(&header(op::CREDIT_REQUEST), &[]);
    assert_eq!(ops(&mut conn), [(op::CREDIT_UPDATE, 0)]);
}
