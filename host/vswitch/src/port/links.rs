//! The tables of a port's connections, and the packets of the guest that belong to them.

use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::time::Instant;

use rustix::event::epoll;

use super::Port;
use crate::conn::{Conn, Key};
use crate::link::Link;
use crate::packet::{HOST_CID, Header, TYPE_STREAM, op};
use crate::socket;

impl Port {
    pub(super) fn insert(&mut self, token: u64, link: Link) {
        self.by_key.insert(link.conn.key(), token);
        self.links.insert(token, link);
        self.count();
        self.tend(token);
    }

    fn count(&self) {
        self.shared
            .connections
            .store(self.links.len(), Ordering::Relaxed);
    }

    pub(super) fn on_stream(&mut self, token: u64, flags: epoll::EventFlags) {
        if let Some(link) = self.links.get_mut(&token) {
            link.on_event(flags);
            self.tend(token);
        } else {
            self.on_caller(token);
        }
    }

    /// After anything happened to a link: moves bytes to the host side and queues the link, since
    /// it may have a packet for the guest.
    pub(super) fn tend(&mut self, token: u64) {
        if let Some(link) = self.links.get_mut(&token) {
            link.flush();
            if !link.queued {
                link.queued = true;
                self.ready.push_back(token);
            }
            self.settle(token);
        }
    }

    /// Keeps the tables true to a link's state.
    pub(super) fn settle(&mut self, token: u64) {
        let Some(link) = self.links.get_mut(&token) else {
            return;
        };
        let limit = link.conn.time_limit();
        match (link.deadline, limit) {
            (None, Some(limit)) => {
                let deadline = Instant::now() + limit;
                link.deadline = Some(deadline);
                self.deadlines.insert((deadline, token));
            }
            (Some(deadline), None) => {
                link.deadline = None;
                self.deadlines.remove(&(deadline, token));
            }
            _ => {}
        }
        if link.conn.is_closed() {
            let key = link.conn.key();
            if self.by_key.get(&key) == Some(&token) {
                self.by_key.remove(&key);
            }
        }
        if link.conn.is_finished() {
            self.links.remove(&token);
            self.count();
        }
    }

    pub(super) fn expire(&mut self) {
        let now = Instant::now();
        while let Some(&(deadline, token)) = self.deadlines.first() {
            if deadline > now {
                return;
            }
            self.deadlines.pop_first();
            self.callers.remove(&token);
            if let Some(link) = self.links.get_mut(&token) {
                link.deadline = None;
                link.conn.refuse();
                self.tend(token);
            }
        }
    }

    /// The guest's driver is gone or new: its connections are over, what it sent is not lost.
    pub(super) fn guest_gone(&mut self) {
        self.replies.clear();
        self.ready.clear();
        let tokens: Vec<u64> = self.links.keys().copied().collect();
        for token in tokens {
            if let Some(link) = self.links.get_mut(&token) {
                link.queued = false;
                link.conn.guest_gone();
                link.flush();
                self.settle(token);
            }
        }
    }

    // ---- packets of the guest ----

    /// The name of the connection a packet belongs to. `None`: it claims another sender.
    fn key_of(&self, header: &Header) -> Option<Key> {
        if header.src_cid != u64::from(self.shared.spec.cid) {
            return None;
        }
        Some(Key {
            guest_port: header.src_port,
            // A CID beyond 32 bits is nobody's; u32::MAX is the standard's "any" and nobody's, too.
            peer_cid: u32::try_from(header.dst_cid).unwrap_or(u32::MAX),
            peer_port: header.dst_port,
        })
    }

    pub(super) fn on_packet(&mut self, header: &Header, payload: &[u8]) {
        let Some(key) = self.key_of(header) else {
            return;
        };
        if header.kind != TYPE_STREAM {
            self.reply_rst(header);
        } else if let Some(&token) = self.by_key.get(&key) {
            if let Some(link) = self.links.get_mut(&token) {
                link.conn.on_packet(header, payload);
                self.tend(token);
            }
        } else if header.op == op::REQUEST {
            self.on_request(key, header);
        } else {
            self.reply_rst(header);
        }
    }

    /// The payload cannot be had: the connection, if any, has lost bytes and ends.
    pub(super) fn on_malformed(&mut self, header: &Header) {
        let Some(key) = self.key_of(header) else {
            return;
        };
        if let Some(&token) = self.by_key.get(&key) {
            if let Some(link) = self.links.get_mut(&token) {
                link.conn.refuse();
                self.tend(token);
            }
        } else {
            self.reply_rst(header);
        }
    }

    fn reply_rst(&mut self, header: &Header) {
        if header.op != op::RST {
            self.replies.push_back(header.rst_for());
        }
    }

    /// A stream to the host program that listens at a port for this domain's owner.
    fn program(&self, key: Key) -> Option<UnixStream> {
        let from = (self.shared.spec.cid, key.guest_port);
        self.switch
            .offer(&self.shared.spec.owner, key.peer_port, from)
            .inspect_err(
                |e| tracing::warn!(cid = self.shared.spec.cid, error = %e, "cannot connect"),
            )
            .ok()
            .flatten()
    }

    /// The guest opens a connection.
    fn on_request(&mut self, key: Key, header: &Header) {
        let stream = if self.is_full() {
            None
        } else if key.peer_cid == HOST_CID {
            // What was made for this domain comes first: its agent's port among it.
            socket::connect(&socket::host_path(&self.shared.spec.uds, key.peer_port))
                .ok()
                .or_else(|| self.program(key))
        } else {
            self.switch
                .dial(
                    &self.shared.spec,
                    key.guest_port,
                    key.peer_cid,
                    key.peer_port,
                )
                .inspect_err(
                    |e| tracing::warn!(cid = self.shared.spec.cid, error = %e, "cannot connect"),
                )
                .ok()
                .flatten()
        };
        let watched = stream.and_then(|stream| Some((self.watch(&stream)?, stream)));
        let Some((token, stream)) = watched else {
            self.reply_rst(header);
            return;
        };
        let mut conn = Conn::dialling(self.shared.spec.cid, key, header);
        if key.peer_cid == HOST_CID {
            conn.accept();
        }
        self.insert(token, Link::new(conn, stream, None));
    }
}
