//! One stream connection between a guest and something outside it, as a state machine without I/O.
//!
//! In go packets of the guest ([`Conn::on_packet`]) and bytes of the host side
//! ([`Conn::push_from_host`]); out come packets for the guest ([`Conn::next_packet`]) and bytes for
//! the host side ([`Conn::to_host`]). "Host side" is whatever the switch tied the connection to: a
//! unix socket of the host, or another guest.
//!
//! Rules: virtio 1.2, section 5.10.6 (credit 5.10.6.3, connections 5.10.6.5 and 5.10.6.6).

use std::time::Duration;

use crate::packet::{Header, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM, op};

/// Receive buffer granted to the guest for one connection, in bytes.
pub const BUF_ALLOC: u32 = 256 * 1024;

/// Most bytes taken from the host side and not yet handed to the guest.
pub const FROM_HOST_MAX: usize = 64 * 1024;

/// How long a guest may take to answer a REQUEST.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a guest may take to answer the last SHUTDOWN by a RST. Linux guests give up after 8 s.
pub const CLOSE_TIMEOUT: Duration = Duration::from_secs(10);

/// What names a connection on one guest's device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key {
    /// The guest's port.
    pub guest_port: u32,
    /// Context identifier of the other end.
    pub peer_cid: u32,
    /// Port of the other end.
    pub peer_port: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// The guest asked; the host side has not answered yet.
    Dialling,
    /// The host side asked; the guest has not answered yet.
    Requested,
    Established,
    /// A RST went either way. Bytes for the host side may remain.
    Closed,
}

/// Control packets that wait to be sent.
#[derive(Debug, Default)]
struct Due {
    request: bool,
    response: bool,
    credit_update: bool,
    credit_request: bool,
    rst: bool,
}

/// A packet for the guest.
#[derive(Debug)]
pub struct Outgoing<'a> {
    /// The header, `len` set.
    pub header: Header,
    /// The payload, `header.len` bytes.
    pub payload: &'a [u8],
}

/// The state of one connection. See the module's documentation.
#[derive(Debug)]
pub struct Conn {
    guest_cid: u32,
    key: Key,
    state: State,
    due: Due,

    to_host: ByteQueue,
    /// Bytes the host side took (wraps).
    fwd_cnt: u32,
    /// `fwd_cnt` as the guest last heard it.
    told_fwd_cnt: u32,

    from_host: ByteQueue,
    /// Payload bytes sent to the guest (wraps).
    tx_cnt: u32,
    guest_buf_alloc: u32,
    guest_fwd_cnt: u32,
    credit_asked: bool,

    /// The host side sends no more.
    host_eof: bool,
    /// The host side reads no more.
    host_deaf: bool,
    /// SHUTDOWN flags the guest was told.
    told_shutdown: u32,
    /// SHUTDOWN flags the guest sent.
    guest_shutdown: u32,
}

impl Conn {
    fn new(guest_cid: u32, key: Key, state: State) -> Self {
        Self {
            guest_cid,
            key,
            state,
            due: Due::default(),
            to_host: ByteQueue::default(),
            fwd_cnt: 0,
            told_fwd_cnt: 0,
            from_host: ByteQueue::default(),
            tx_cnt: 0,
            guest_buf_alloc: 0,
            guest_fwd_cnt: 0,
            credit_asked: false,
            host_eof: false,
            host_deaf: false,
            told_shutdown: 0,
            guest_shutdown: 0,
        }
    }

    /// A connection the host side opens: a REQUEST goes to the guest.
    pub fn requested(guest_cid: u32, key: Key) -> Self {
        let mut conn = Self::new(guest_cid, key, State::Requested);
        conn.due.request = true;
        conn
    }

    /// A connection the guest opens by `request`. [`Conn::accept`] or [`Conn::refuse`] answers it.
    pub fn dialling(guest_cid: u32, key: Key, request: &Header) -> Self {
        let mut conn = Self::new(guest_cid, key, State::Dialling);
        conn.guest_buf_alloc = request.buf_alloc;
        conn.guest_fwd_cnt = request.fwd_cnt;
        conn
    }

    /// The connection's name.
    pub fn key(&self) -> Key {
        self.key
    }

    /// The host side took the guest's request.
    pub fn accept(&mut self) {
        if self.state == State::Dialling {
            self.state = State::Established;
            self.due.response = true;
        }
    }

    /// Ends the connection from this side at once: a RST goes to the guest.
    pub fn refuse(&mut self) {
        if self.state != State::Closed {
            self.close();
            self.due.rst = true;
        }
    }

    /// Both sides know each other, or did before the connection ended.
    pub fn is_established(&self) -> bool {
        self.state == State::Established
    }

    /// The guest's request is not yet answered by the host side.
    pub fn is_dialling(&self) -> bool {
        self.state == State::Dialling
    }

    /// The guest knows, or will know by the packet that waits, that the connection is over.
    pub fn is_closed(&self) -> bool {
        self.state == State::Closed
    }

    /// Nothing is left to do for either side.
    pub fn is_finished(&self) -> bool {
        self.state == State::Closed && !self.due.rst && self.to_host.is_empty()
    }

    /// The guest's driver is gone: nothing goes to it any more, what it sent still goes to the host
    /// side.
    pub fn guest_gone(&mut self) {
        self.close();
    }

    /// How long this state may last, when it may not last for ever.
    pub fn time_limit(&self) -> Option<Duration> {
        match self.state {
            State::Requested => Some(REQUEST_TIMEOUT),
            State::Established if self.told_shutdown == SHUTDOWN_BOTH => Some(CLOSE_TIMEOUT),
            _ => None,
        }
    }

    fn close(&mut self) {
        self.state = State::Closed;
        self.due = Due::default();
        self.from_host = ByteQueue::default();
        if self.host_deaf {
            self.to_host = ByteQueue::default();
        }
    }

    // ---- guest -> host ----

    /// Takes a packet that carries this connection's ports.
    ///
    /// A guest that breaks the protocol (wrong state, more bytes than its credit) gets a RST.
    pub fn on_packet(&mut self, header: &Header, payload: &[u8]) {
        if self.state == State::Closed {
            return;
        }
        if header.op == op::RST {
            self.close();
            return;
        }
        if header.buf_alloc != self.guest_buf_alloc || header.fwd_cnt != self.guest_fwd_cnt {
            self.guest_buf_alloc = header.buf_alloc;
            self.guest_fwd_cnt = header.fwd_cnt;
            self.credit_asked = false;
        }
        match (self.state, header.op) {
            (State::Requested, op::RESPONSE) => self.state = State::Established,
            (State::Established, op::RW) => self.on_data(payload),
            (State::Established, op::SHUTDOWN) => self.on_shutdown(header.flags),
            (State::Established, op::CREDIT_UPDATE) => {}
            (State::Established, op::CREDIT_REQUEST) => self.due.credit_update = true,
            // A guest may give up before it was answered.
            (State::Dialling, op::SHUTDOWN) => self.refuse(),
            _ => self.refuse(),
        }
    }

    fn on_data(&mut self, payload: &[u8]) {
        let free = (BUF_ALLOC as usize).saturating_sub(self.to_host.len());
        if payload.len() > free || self.guest_shutdown & SHUTDOWN_SEND != 0 {
            self.refuse();
        } else if self.host_deaf {
            self.forwarded(payload.len());
        } else {
            self.to_host.push(payload);
        }
    }

    fn on_shutdown(&mut self, flags: u32) {
        self.guest_shutdown |= flags & SHUTDOWN_BOTH;
        if self.guest_shutdown & SHUTDOWN_RECEIVE != 0 {
            self.from_host = ByteQueue::default();
        }
        self.finish_if_drained();
    }

    /// After the guest's last word everything it sent goes to the host side, and only then the RST.
    fn finish_if_drained(&mut self) {
        if self.state == State::Established
            && self.guest_shutdown == SHUTDOWN_BOTH
            && self.to_host.is_empty()
        {
            self.refuse();
        }
    }

    /// Bytes for the host side; [`Conn::delivered`] says how many it took.
    pub fn to_host(&self) -> &[u8] {
        self.to_host.as_slice()
    }

    /// The host side took the first `n` bytes of [`Conn::to_host`].
    pub fn delivered(&mut self, n: usize) {
        self.to_host.consume(n);
        self.forwarded(n);
        self.finish_if_drained();
    }

    fn forwarded(&mut self, n: usize) {
        // n is at most BUF_ALLOC.
        self.fwd_cnt = self.fwd_cnt.wrapping_add(n as u32);
        if self.state == State::Established
            && self.fwd_cnt.wrapping_sub(self.told_fwd_cnt) >= BUF_ALLOC / 4
        {
            self.due.credit_update = true;
        }
    }

    /// Nothing will follow what the host side already has: its stream can be ended.
    pub fn to_host_ended(&self) -> bool {
        self.to_host.is_empty()
            && (self.state == State::Closed || self.guest_shutdown & SHUTDOWN_SEND != 0)
    }

    /// The guest reads no more: what the host side writes is lost.
    pub fn guest_deaf(&self) -> bool {
        self.state == State::Closed || self.guest_shutdown & SHUTDOWN_RECEIVE != 0
    }

    // ---- host -> guest ----

    fn credit(&self) -> usize {
        let in_flight = self.tx_cnt.wrapping_sub(self.guest_fwd_cnt);
        self.guest_buf_alloc.saturating_sub(in_flight) as usize
    }

    /// How many bytes [`Conn::push_from_host`] takes now: what the guest has room for, bounded.
    pub fn host_window(&self) -> usize {
        if self.state != State::Established || self.host_eof || self.guest_deaf() {
            return 0;
        }
        self.credit()
            .min(FROM_HOST_MAX)
            .saturating_sub(self.from_host.len())
    }

    /// The host side has bytes, but the window is closed: the guest is asked once for its credit.
    pub fn want_credit(&mut self) {
        if self.state == State::Established
            && self.credit() <= self.from_host.len()
            && !self.credit_asked
        {
            self.credit_asked = true;
            self.due.credit_request = true;
        }
    }

    /// Bytes of the host side wait for the guest.
    pub fn has_from_host(&self) -> bool {
        !self.from_host.is_empty()
    }

    /// Takes bytes of the host side, at most [`Conn::host_window`].
    pub fn push_from_host(&mut self, bytes: &[u8]) {
        debug_assert!(bytes.len() <= self.host_window());
        self.from_host.push(bytes);
    }

    /// The host side sends no more.
    pub fn host_eof(&mut self) {
        self.host_eof = true;
        if matches!(self.state, State::Dialling | State::Requested) {
            self.refuse();
        }
    }

    /// The host side reads no more: bytes for it are dropped, and the guest is told.
    pub fn host_deaf(&mut self) {
        self.host_deaf = true;
        let n = self.to_host.len();
        self.delivered(n);
    }

    /// The next packet for the guest with at most `room` payload bytes, if there is one.
    pub fn next_packet(&mut self, room: usize) -> Option<Outgoing<'_>> {
        let mut header = Header {
            src_cid: u64::from(self.key.peer_cid),
            dst_cid: u64::from(self.guest_cid),
            src_port: self.key.peer_port,
            dst_port: self.key.guest_port,
            kind: TYPE_STREAM,
            buf_alloc: BUF_ALLOC,
            fwd_cnt: self.fwd_cnt,
            ..Header::default()
        };
        let mut take = 0;
        if std::mem::take(&mut self.due.rst) {
            header.op = op::RST;
        } else if std::mem::take(&mut self.due.request) {
            header.op = op::REQUEST;
        } else if std::mem::take(&mut self.due.response) {
            header.op = op::RESPONSE;
        } else if self.state != State::Established {
            return None;
        } else if !self.from_host.is_empty() && room > 0 {
            // The window was kept when the bytes came in, but a guest may have shrunk it since.
            take = self.from_host.len().min(room).min(self.credit());
            if take > 0 {
                header.op = op::RW;
            } else if std::mem::take(&mut self.due.credit_update) {
                header.op = op::CREDIT_UPDATE;
            } else {
                self.want_credit();
                if !std::mem::take(&mut self.due.credit_request) {
                    return None;
                }
                header.op = op::CREDIT_REQUEST;
            }
        } else if self.shutdown_due() != 0 {
            self.told_shutdown |= self.shutdown_due();
            header.op = op::SHUTDOWN;
            header.flags = self.told_shutdown;
        } else if std::mem::take(&mut self.due.credit_update) {
            header.op = op::CREDIT_UPDATE;
        } else if std::mem::take(&mut self.due.credit_request) {
            header.op = op::CREDIT_REQUEST;
        } else {
            return None;
        }
        self.told_fwd_cnt = self.fwd_cnt;
        self.due.credit_update = false;
        // take is at most FROM_HOST_MAX.
        header.len = take as u32;
        self.tx_cnt = self.tx_cnt.wrapping_add(take as u32);
        Some(Outgoing {
            header,
            payload: self.from_host.take(take),
        })
    }

    /// SHUTDOWN flags the guest should hear and has not.
    fn shutdown_due(&self) -> u32 {
        let mut flags = 0;
        if self.host_eof && self.from_host.is_empty() {
            flags |= SHUTDOWN_SEND;
        }
        if self.host_deaf {
            flags |= SHUTDOWN_RECEIVE;
        }
        flags & !self.told_shutdown
    }
}

#[cfg(test)]
mod tests;

/// A first-in-first-out queue of bytes that shows its content as one slice.
#[derive(Debug, Default)]
struct ByteQueue {
    bytes: Vec<u8>,
    start: usize,
}

impl ByteQueue {
    fn len(&self) -> usize {
        self.bytes.len() - self.start
    }

    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn as_slice(&self) -> &[u8] {
        &self.bytes[self.start..]
    }

    fn push(&mut self, more: &[u8]) {
        if self.start == self.bytes.len() {
            self.bytes.clear();
            self.start = 0;
        } else if self.start > self.bytes.len() / 2 {
            // Moves fewer bytes than were consumed: constant cost per byte.
            self.bytes.drain(..self.start);
            self.start = 0;
        }
        self.bytes.extend_from_slice(more);
    }

    fn consume(&mut self, n: usize) {
        self.take(n);
    }

    /// Removes the first `n` bytes (or all) and shows them.
    fn take(&mut self, n: usize) -> &[u8] {
        let from = self.start;
        self.start = self.start.saturating_add(n).min(self.bytes.len());
        &self.bytes[from..self.start]
    }
}
