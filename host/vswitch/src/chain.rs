//! Reading and writing packets in descriptor chains of any shape.
//!
//! A chain is the guest's word: any number of descriptors, any lengths, any addresses, loops. What
//! `virtio-queue`'s iterator yields is bounded by the size of the table; every address is checked
//! by `vm-memory` when it is used.

use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::packet::{HEADER_LEN, Header};

/// Most descriptors of one receive chain that are used; more are left alone.
const RX_DESCRIPTORS_MAX: usize = 256;

type Chain<'m> = DescriptorChain<&'m GuestMemoryMmap>;

/// Reads a packet from a transmit chain: the header, and the payload into `payload`.
///
/// An error is a chain that is no packet: shorter than a header, shorter than its header says,
/// longer than `payload_max`, or in memory the guest does not have. It carries the header if that
/// could be read, so that the connection can be told.
pub fn read_packet(
    mem: &GuestMemoryMmap,
    chain: Chain<'_>,
    payload: &mut Vec<u8>,
    payload_max: usize,
) -> Result<Header, Option<Header>> {
    payload.clear();
    let mut raw = [0u8; HEADER_LEN];
    let mut have = 0;
    let mut header = None;
    for desc in chain {
        if desc.is_write_only() {
            break;
        }
        let mut addr = desc.addr();
        let mut left = desc.len() as usize;
        if header.is_none() {
            let n = left.min(HEADER_LEN - have);
            mem.read_slice(&mut raw[have..have + n], addr)
                .map_err(|_| None)?;
            have += n;
            left -= n;
            if have < HEADER_LEN {
                continue;
            }
            addr = GuestAddress(addr.0.wrapping_add(n as u64));
            let decoded = Header::decode(&raw);
            if decoded.len as usize > payload_max {
                return Err(Some(decoded));
            }
            header = Some(decoded);
        }
        if let Some(header) = header {
            let at = payload.len();
            let n = left.min(header.len as usize - at);
            if n > 0 {
                payload.resize(at + n, 0);
                mem.read_slice(&mut payload[at..], addr)
                    .map_err(|_| Some(header))?;
            }
            if payload.len() == header.len as usize {
                return Ok(header);
            }
        }
    }
    Err(header)
}

/// A receive chain the guest made available.
pub struct RxChain {
    /// Head index, for the used ring.
    pub head: u16,
    parts: Vec<(GuestAddress, usize)>,
    capacity: usize,
}

impl RxChain {
    /// Notes the writable descriptors of `chain`.
    pub fn new(chain: Chain<'_>) -> Self {
        let head = chain.head_index();
        let parts: Vec<_> = chain
            .filter(|d| d.is_write_only())
            .take(RX_DESCRIPTORS_MAX)
            .map(|d| (d.addr(), d.len() as usize))
            .collect();
        let capacity = parts.iter().map(|p| p.1).sum();
        Self {
            head,
            parts,
            capacity,
        }
    }

    /// Payload bytes that fit behind a header; `None` if not even a header fits.
    pub fn room(&self) -> Option<usize> {
        self.capacity.checked_sub(HEADER_LEN)
    }

    /// Writes a packet and returns the bytes written. The payload fits in [`RxChain::room`].
    pub fn write_packet(
        &self,
        mem: &GuestMemoryMmap,
        header: &Header,
        payload: &[u8],
    ) -> Result<u32, vm_memory::GuestMemoryError> {
        let raw = header.encode();
        let mut sources = [raw.as_slice(), payload];
        let mut written = 0;
        for &(mut addr, mut left) in &self.parts {
            for source in &mut sources {
                let n = left.min(source.len());
                if n > 0 {
                    mem.write_slice(&source[..n], addr)?;
                    *source = &source[n..];
                    addr = GuestAddress(addr.0.wrapping_add(n as u64));
                    left -= n;
                    written += n;
                }
            }
        }
        // A packet is at most a header and FROM_HOST_MAX bytes.
        Ok(written as u32)
    }
}
