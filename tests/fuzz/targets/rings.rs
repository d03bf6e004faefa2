//! A guest that writes anything into its rings, its descriptors and the rest of its memory: a packet that is read has the
//! length that it says, and what is written to the guest goes where its descriptors let it and nowhere else.
#![no_main]
#![allow(clippy::unwrap_used, reason = "what cannot be set up shall end it")]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use xbee_vswitch::chain::{RxChain, read_packet};
use xbee_vswitch::packet::{HEADER_LEN, Header};

/// The guest's memory, in bytes: two regions with a hole between them.
const REGIONS: [(u64, usize); 2] = [(0, 0x8000), (0xc000, 0x4000)];
/// Where the rings are, unless the input says otherwise.
const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
/// Chains taken in a run.
const CHAINS_MAX: usize = 64;
/// Longest payload that is taken, in bytes.
const PAYLOAD_MAX: usize = 0x2000;

#[derive(Debug, Arbitrary)]
struct Descriptor {
    address: u16,
    /// Anywhere in 64 bits instead.
    far: Option<u64>,
    len: u16,
    long: Option<u32>,
    flags: u16,
    next: u16,
}

#[derive(Debug, Arbitrary)]
struct Input {
    size_bits: u8,
    event_idx: bool,
    /// Moves the rings elsewhere, also out of the memory.
    elsewhere: Option<[u16; 3]>,
    next_available: u16,
    table: Vec<Descriptor>,
    heads: Vec<u8>,
    /// Published beside those that there are.
    more_heads: u8,
    /// A packet's header in memory, at its address.
    headers: Vec<(u16, [u8; HEADER_LEN], Option<u16>)>,
    noise: Vec<(u16, Vec<u8>)>,
    /// How many bytes go into each receive chain; else the ring is one that the guest transmits on.
    receive: Option<u16>,
}

/// What the guest sees.
fn contents(memory: &GuestMemoryMmap) -> Vec<u8> {
    let mut all = vec![0; 0x1_0000];
    for (start, len) in REGIONS {
        let part = &mut all[start as usize..start as usize + len];
        memory.read_slice(part, GuestAddress(start)).unwrap();
    }
    all
}

fuzz_target!(|input: Input| {
    let regions = REGIONS.map(|(start, len)| (GuestAddress(start), len));
    let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&regions).unwrap();
    // What does not fit in the memory is no matter.
    let put = |bytes: &[u8], at: u64| {
        let _ = memory.write_slice(bytes, GuestAddress(at));
    };
    for (at, bytes) in &input.noise {
        put(bytes, u64::from(*at));
    }
    for (index, descriptor) in input.table.iter().enumerate() {
        let mut raw = [0; 16];
        let address = descriptor.far.unwrap_or(descriptor.address.into());
        raw[..8].copy_from_slice(&address.to_le_bytes());
        let len = descriptor.long.unwrap_or(descriptor.len.into());
        raw[8..12].copy_from_slice(&len.to_le_bytes());
        raw[12..14].copy_from_slice(&descriptor.flags.to_le_bytes());
        raw[14..].copy_from_slice(&descriptor.next.to_le_bytes());
        put(&raw, DESCRIPTORS + 16 * index as u64);
    }
    for (at, header, len) in &input.headers {
        let mut header = Header::decode(header);
        header.len = len.map_or(header.len, u32::from);
        put(&header.encode(), u64::from(*at));
    }
    let size = 1u16 << (input.size_bits % 11);
    for (index, head) in input.heads.iter().enumerate() {
        let slot = (usize::from(input.next_available) + index) % usize::from(size);
        put(
            &u16::from(*head).to_le_bytes(),
            AVAILABLE + 4 + 2 * slot as u64,
        );
    }
    let published = (input.heads.len() as u16).wrapping_add(input.more_heads.into());
    let published = input.next_available.wrapping_add(published);
    put(&published.to_le_bytes(), AVAILABLE + 2);

    let mut queue = Queue::new(1024).unwrap();
    queue.try_set_size(size).unwrap();
    let at = input
        .elsewhere
        .map_or([DESCRIPTORS, AVAILABLE, USED], |at| at.map(u64::from));
    // As the device does with what the front-end says.
    if queue
        .try_set_desc_table_address(GuestAddress(at[0]))
        .is_err()
        || queue
            .try_set_avail_ring_address(GuestAddress(at[1]))
            .is_err()
        || queue
            .try_set_used_ring_address(GuestAddress(at[2]))
            .is_err()
    {
        return;
    }
    queue.set_event_idx(input.event_idx);
    queue.set_next_avail(input.next_available);
    queue.set_ready(true);

    let mut payload = Vec::new();
    for _ in 0..CHAINS_MAX {
        if queue.disable_notification(&memory).is_err() {
            return;
        }
        let Ok(mut chains) = queue.iter(&memory) else {
            return;
        };
        let Some(chain) = chains.next() else {
            return;
        };
        let head = chain.head_index();
        let mut written = 0;
        if let Some(len) = input.receive {
            let allowed: Vec<(u64, u64)> = chain
                .clone()
                .filter(|descriptor| descriptor.is_write_only())
                .map(|descriptor| (descriptor.addr().0, u64::from(descriptor.len())))
                .collect();
            let chain = RxChain::new(chain);
            assert_eq!(chain.head, head);
            if let Some(room) = chain.room() {
                let bytes = vec![0xa5; room.min(len.into())];
                let header = Header {
                    len: bytes.len() as u32,
                    ..Header::default()
                };
                let before = contents(&memory);
                let result = chain.write_packet(&memory, &header, &bytes);
                let after = contents(&memory);
                for (at, (before, after)) in before.iter().zip(&after).enumerate() {
                    let at = at as u64;
                    let may = |(from, len): &(u64, u64)| at >= *from && at - from < *len;
                    assert!(
                        before == after || allowed.iter().any(may),
                        "written at {at:#x}, where the guest has no buffer"
                    );
                }
                if let Ok(result) = result {
                    assert_eq!(result as usize, HEADER_LEN + bytes.len());
                    written = result;
                }
            }
        } else {
            match read_packet(&memory, chain, &mut payload, PAYLOAD_MAX) {
                Ok(header) => assert_eq!(payload.len(), header.len as usize),
                Err(Some(header)) => assert!(payload.len() <= header.len as usize),
                Err(None) => assert!(payload.is_empty()),
            }
            assert!(payload.len() <= PAYLOAD_MAX);
        }
        if queue.add_used(&memory, head, written).is_err()
            || queue.needs_notification(&memory).is_err()
        {
            return;
        }
    }
});
