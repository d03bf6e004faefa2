//! Moving packets between the guest's rings and a port's connections.

use std::sync::{Arc, PoisonError};

use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::GuestMemoryMmap;

use super::Port;
use crate::chain::{RxChain, read_packet};
use crate::conn::BUF_ALLOC;
use crate::device::{Device, RX, TX, Vring};

/// Most RSTs that wait for a receive buffer; the guest's transmit queue waits beyond that.
const REPLIES_MAX: usize = 64;
/// Packets moved in one direction before other events are looked at.
const BUDGET: usize = 256;

/// Why a guest's rings can no longer be used.
#[derive(Debug, thiserror::Error)]
enum RingError {
    #[error("invalid ring")]
    Queue(#[from] virtio_queue::Error),
    #[error("receive buffer outside the guest's memory")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

/// Why transmitting paused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pause {
    Empty,
    Budget,
    Replies,
}

impl Port {
    /// Moves packets both ways. True: there is more to do at once.
    pub(super) fn run_rings(&mut self) -> bool {
        let device = Arc::clone(&self.device);
        let mut device = device.lock().unwrap_or_else(PoisonError::into_inner);
        if device.take_reset() {
            self.guest_gone();
        }
        let moved = self
            .transmit(&mut device)
            .and_then(|again| Ok((again, self.receive(&mut device)?)));
        match moved {
            // Transmitting stops when too many replies wait, and goes on when some are gone.
            Ok((Pause::Replies, more)) => more || self.replies.len() < REPLIES_MAX,
            Ok((Pause::Budget, _)) => true,
            Ok((Pause::Empty, more)) => more,
            Err(e) => {
                let chain: &dyn std::error::Error = &e;
                tracing::warn!(
                    cid = self.shared.spec.cid,
                    error = %e,
                    cause = chain.source().map(tracing::field::display),
                    "the guest broke its rings: its device is stopped until it is set up anew"
                );
                device.break_rings();
                self.guest_gone();
                false
            }
        }
    }

    /// Guest to host, until the ring is empty, the budget spent, or too many replies wait.
    fn transmit(&mut self, device: &mut Device) -> Result<Pause, RingError> {
        let Some((mem, ring)) = device.ring(TX) else {
            return Ok(Pause::Empty);
        };
        let mem: &GuestMemoryMmap = &mem;
        let mut moved = 0;
        let pause = 'ring: loop {
            ring.queue.disable_notification(mem)?;
            loop {
                if moved == BUDGET {
                    break 'ring Pause::Budget;
                }
                if self.replies.len() >= REPLIES_MAX {
                    break 'ring Pause::Replies;
                }
                let Some(chain) = ring.queue.iter(mem)?.next() else {
                    break;
                };
                let head = chain.head_index();
                let mut payload = std::mem::take(&mut self.payload);
                match read_packet(mem, chain, &mut payload, BUF_ALLOC as usize) {
                    Ok(header) => self.on_packet(&header, &payload),
                    Err(Some(header)) => self.on_malformed(&header),
                    Err(None) => {}
                }
                self.payload = payload;
                ring.queue.add_used(mem, head, 0)?;
                moved += 1;
            }
            if !ring.queue.enable_notification(mem)? {
                break Pause::Empty;
            }
        };
        if moved > 0 {
            ring.notify(mem)?;
        }
        Ok(pause)
    }

    /// Host to guest, until nothing is left to send, no buffer is left, or the budget is spent
    /// (true).
    fn receive(&mut self, device: &mut Device) -> Result<bool, RingError> {
        let Some((mem, ring)) = device.ring(RX) else {
            return Ok(false);
        };
        let mem: &GuestMemoryMmap = &mem;
        let mut moved = 0;
        let result = self.fill_buffers(mem, ring, &mut moved);
        if moved > 0 {
            ring.notify(mem)?;
        }
        result
    }

    fn fill_buffers(
        &mut self,
        mem: &GuestMemoryMmap,
        ring: &mut Vring,
        moved: &mut usize,
    ) -> Result<bool, RingError> {
        while !(self.replies.is_empty() && self.ready.is_empty()) {
            if *moved == BUDGET {
                return Ok(true);
            }
            let Some(chain) = ring.queue.iter(mem)?.next() else {
                if ring.queue.enable_notification(mem)? {
                    continue;
                }
                return Ok(false);
            };
            let chain = RxChain::new(chain);
            let written = match chain.room() {
                // Too small for any packet: goes back unused.
                None => Some(0),
                Some(room) => self.write_next(mem, &chain, room)?,
            };
            let Some(written) = written else {
                ring.queue.go_to_previous_position();
                return Ok(false);
            };
            ring.queue.add_used(mem, chain.head, written)?;
            *moved += 1;
        }
        Ok(false)
    }

    /// Writes the next packet that waits for the guest. `None`: there is none.
    fn write_next(
        &mut self,
        mem: &GuestMemoryMmap,
        chain: &RxChain,
        room: usize,
    ) -> Result<Option<u32>, RingError> {
        if let Some(reply) = self.replies.pop_front() {
            return Ok(Some(chain.write_packet(mem, &reply, &[])?));
        }
        // Links take turns, a packet each.
        while let Some(token) = self.ready.pop_front() {
            let Some(link) = self.links.get_mut(&token) else {
                continue;
            };
            link.queued = false;
            if !link.conn.has_from_host() {
                link.fill(&mut self.buffer);
            }
            let written = match link.conn.next_packet(room) {
                Some(packet) => Some(chain.write_packet(mem, &packet.header, packet.payload)?),
                None => None,
            };
            if written.is_some() {
                self.tend(token);
                return Ok(written);
            }
            self.settle(token);
        }
        Ok(None)
    }
}
