//! A vsock driver in the test's own process: a vhost-user front-end with its own "guest" memory,
//! which can be as wrong as a test wants.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use vhost::vhost_user::message::VhostUserHeaderFlag;
use vhost::vhost_user::{Frontend, VhostUserFrontend, VhostUserProtocolFeatures};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use xbee_vswitch::packet::{HEADER_LEN, Header, TYPE_STREAM, op};
use xbee_vswitch::switch::DomainSpec;

pub const MEMORY: u64 = 4 << 20;
/// Entries of each ring.
pub const SIZE: u16 = 128;
/// Where the rings start; queue n has 16 KiB from `RINGS + n * 0x4000`.
pub const RINGS: u64 = 0x1000;
const BUFFERS: u64 = 0x10_0000;
const SLOT: u64 = 0x4000;

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

fn descriptors(queue: usize) -> u64 {
    RINGS + queue as u64 * 0x4000
}
fn avail(queue: usize) -> u64 {
    descriptors(queue) + 0x1000
}
fn used(queue: usize) -> u64 {
    descriptors(queue) + 0x2000
}

/// One descriptor: address, length, flags without [`NEXT`].
pub type Part = (u64, u32, u16);

pub struct Driver {
    pub front_end: Frontend,
    pub memory: GuestMemoryMmap,
    cid: u32,
    kicks: [EventFd; 2],
    calls: [EventFd; 2],
    next_avail: [u16; 2],
    seen_used: [u16; 2],
    next_descriptor: [u16; 2],
    /// Sizes of the descriptors of the receive buffers posted from now on.
    pub rx_shape: Vec<u32>,
    posted: u16,
    chains: Vec<Vec<Part>>,
}

/// Memory as QEMU's memory-backend-memfd has it; `sealed` as its default.
pub fn memory_file(sealed: bool) -> File {
    let file: File = rustix::fs::memfd_create(
        "guest",
        rustix::fs::MemfdFlags::ALLOW_SEALING | rustix::fs::MemfdFlags::CLOEXEC,
    )
    .unwrap()
    .into();
    file.set_len(MEMORY).unwrap();
    if sealed {
        rustix::fs::fcntl_add_seals(
            &file,
            rustix::fs::SealFlags::SHRINK | rustix::fs::SealFlags::GROW,
        )
        .unwrap();
    }
    file
}

impl Driver {
    /// Connects and brings the device up as a driver does.
    pub fn start(spec: &DomainSpec) -> Self {
        let mut driver = Self::connect(spec, memory_file(true)).unwrap();
        driver.bring_up();
        driver
    }

    /// Connects and hands over `memory`.
    pub fn connect(spec: &DomainSpec, memory: File) -> Result<Self, vhost::Error> {
        let mut front_end = Frontend::connect(&spec.vhost_socket, 2)?;
        front_end.set_owner()?;
        let features = front_end.get_features()?;
        front_end.set_features(features)?;
        let offered = front_end.get_protocol_features()?;
        assert!(offered.contains(VhostUserProtocolFeatures::CONFIG));
        // REPLY_ACK: errors are heard of.
        front_end.set_protocol_features(
            VhostUserProtocolFeatures::CONFIG | VhostUserProtocolFeatures::REPLY_ACK,
        )?;
        front_end.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        let memory = GuestMemoryMmap::from_ranges_with_files([(
            GuestAddress(0),
            MEMORY as usize,
            Some(FileOffset::new(memory, 0)),
        )])
        .unwrap();
        let region = memory.iter().next().unwrap();
        front_end.set_mem_table(&[VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: MEMORY,
            userspace_addr: region.as_ptr() as u64,
            mmap_offset: 0,
            mmap_handle: region.file_offset().unwrap().file().as_raw_fd(),
        }])?;
        let event = || EventFd::new(EFD_NONBLOCK).unwrap();
        Ok(Self {
            front_end,
            memory,
            cid: spec.cid,
            kicks: [event(), event()],
            calls: [event(), event()],
            next_avail: [0; 2],
            seen_used: [0; 2],
            next_descriptor: [0; 2],
            rx_shape: vec![HEADER_LEN as u32, 4096],
            posted: 0,
            chains: vec![Vec::new(); SIZE as usize],
        })
    }

    /// Starts the rings afresh, as a driver does that has just been loaded.
    pub fn bring_up(&mut self) {
        self.memory
            .write_slice(&[0; 0x8000], GuestAddress(RINGS))
            .unwrap();
        self.next_avail = [0; 2];
        self.seen_used = [0; 2];
        self.next_descriptor = [0; 2];
        let base = self.memory.iter().next().unwrap().as_ptr() as u64;
        for queue in 0..2 {
            let f = &mut self.front_end;
            f.set_vring_num(queue, SIZE).unwrap();
            f.set_vring_base(queue, 0).unwrap();
            f.set_vring_addr(
                queue,
                &VringConfigData {
                    queue_max_size: SIZE,
                    queue_size: SIZE,
                    flags: 0,
                    desc_table_addr: base + descriptors(queue),
                    used_ring_addr: base + used(queue),
                    avail_ring_addr: base + avail(queue),
                    log_addr: None,
                },
            )
            .unwrap();
            f.set_vring_call(queue, &self.calls[queue]).unwrap();
            f.set_vring_kick(queue, &self.kicks[queue]).unwrap();
            f.set_vring_enable(queue, true).unwrap();
        }
    }

    /// Stops the rings, as a driver does that goes away.
    pub fn take_down(&mut self) {
        for queue in 0..2 {
            self.front_end.get_vring_base(queue).unwrap();
        }
    }

    pub fn kick(&self, queue: usize) {
        self.kicks[queue].write(1).unwrap();
    }

    pub fn write_descriptor(&self, at: u64, (addr, len, flags): Part, next: Option<u16>) {
        let flags = flags | if next.is_some() { NEXT } else { 0 };
        let mut raw = [0; 16];
        raw[..8].copy_from_slice(&addr.to_le_bytes());
        raw[8..12].copy_from_slice(&len.to_le_bytes());
        raw[12..14].copy_from_slice(&flags.to_le_bytes());
        raw[14..].copy_from_slice(&next.unwrap_or(0).to_le_bytes());
        self.memory.write_slice(&raw, GuestAddress(at)).unwrap();
    }

    /// Makes a chain available.
    pub fn post(&mut self, queue: usize, parts: &[Part]) {
        let head = self.next_descriptor[queue];
        for (i, part) in parts.iter().enumerate() {
            let index = (head + i as u16) % SIZE;
            let next = (i + 1 < parts.len()).then_some((index + 1) % SIZE);
            self.write_descriptor(descriptors(queue) + 16 * u64::from(index), *part, next);
        }
        self.next_descriptor[queue] = (head + parts.len() as u16) % SIZE;
        if queue == 0 {
            self.chains[head as usize] = parts.to_vec();
        }
        self.publish(queue, head);
    }

    pub fn publish(&mut self, queue: usize, head: u16) {
        let slot = avail(queue) + 4 + 2 * u64::from(self.next_avail[queue] % SIZE);
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.next_avail[queue] = self.next_avail[queue].wrapping_add(1);
        fence(Ordering::SeqCst);
        self.memory
            .store(
                self.next_avail[queue],
                GuestAddress(avail(queue) + 2),
                Ordering::Release,
            )
            .unwrap();
    }

    fn used_index(&self, queue: usize) -> u16 {
        self.memory
            .load(GuestAddress(used(queue) + 2), Ordering::Acquire)
            .unwrap()
    }

    /// How many transmitted chains the device has not given back.
    pub fn unsent(&self) -> u16 {
        self.next_avail[1].wrapping_sub(self.used_index(1))
    }

    /// Puts a packet into memory and returns where.
    pub fn lay_out(&self, header: &Header, payload: &[u8]) -> u64 {
        let at = BUFFERS + 64 * SLOT;
        self.memory
            .write_slice(&header.encode(), GuestAddress(at))
            .unwrap();
        self.memory
            .write_slice(payload, GuestAddress(at + HEADER_LEN as u64))
            .unwrap();
        at
    }

    /// Sends a packet as one descriptor and waits until the device took it.
    pub fn send(&mut self, header: &Header, payload: &[u8]) {
        let at = self.lay_out(header, payload);
        self.post(1, &[(at, (HEADER_LEN + payload.len()) as u32, 0)]);
        self.kick(1);
        self.wait_sent();
    }

    pub fn wait_sent(&self) {
        let until = Instant::now() + Duration::from_secs(5);
        while self.unsent() != 0 {
            assert!(Instant::now() < until, "the device does not transmit");
            std::thread::sleep(Duration::from_micros(50));
        }
    }

    /// Keeps 16 receive buffers posted.
    fn refill(&mut self) {
        let mut any = false;
        while self.next_avail[0].wrapping_sub(self.seen_used[0]) < 16 {
            let mut at = BUFFERS + u64::from(self.posted % 32) * SLOT;
            self.posted = self.posted.wrapping_add(1);
            let parts: Vec<Part> = self
                .rx_shape
                .iter()
                .map(|&len| {
                    let part = (at, len, WRITE);
                    at += u64::from(len);
                    part
                })
                .collect();
            self.post(0, &parts);
            any = true;
        }
        if any {
            self.kick(0);
        }
    }

    /// The next packet of the device.
    pub fn receive(&mut self) -> (Header, Vec<u8>) {
        self.receive_within(Duration::from_secs(5))
            .expect("no packet within 5 s")
    }

    pub fn receive_within(&mut self, limit: Duration) -> Option<(Header, Vec<u8>)> {
        let until = Instant::now() + limit;
        loop {
            self.refill();
            if self.used_index(0) != self.seen_used[0] {
                break;
            }
            if Instant::now() >= until {
                return None;
            }
            std::thread::sleep(Duration::from_micros(50));
        }
        let entry = used(0) + 4 + 8 * u64::from(self.seen_used[0] % SIZE);
        self.seen_used[0] = self.seen_used[0].wrapping_add(1);
        let head: u32 = self.memory.read_obj(GuestAddress(entry)).unwrap();
        let len: u32 = self.memory.read_obj(GuestAddress(entry + 4)).unwrap();
        let mut bytes = Vec::new();
        for &(addr, part, _) in &self.chains[head as usize] {
            let mut piece = vec![0; part.min(len - bytes.len() as u32) as usize];
            self.memory
                .read_slice(&mut piece, GuestAddress(addr))
                .unwrap();
            bytes.extend(piece);
        }
        assert_eq!(bytes.len(), len as usize);
        let payload = bytes.split_off(HEADER_LEN);
        let header = Header::decode(bytes[..].try_into().unwrap());
        assert_eq!(header.len as usize, payload.len());
        Some((header, payload))
    }

    /// A packet from `src_port` of this guest to `dst_port` of the host.
    pub fn header(&self, op: u16, src_port: u32, dst_port: u32, len: usize) -> Header {
        Header {
            src_cid: self.cid.into(),
            dst_cid: 2,
            src_port,
            dst_port,
            len: len as u32,
            kind: TYPE_STREAM,
            op,
            flags: 0,
            buf_alloc: 1 << 20,
            fwd_cnt: 0,
        }
    }

    /// A program of the host connects to `port`; returns its stream and its port.
    pub fn accept_from_host(&mut self, uds: &Path, port: u32) -> (UnixStream, u32) {
        let mut stream = UnixStream::connect(uds).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        writeln!(stream, "CONNECT {port}").unwrap();
        let (request, _) = self.receive();
        assert_eq!((request.op, request.dst_port), (op::REQUEST, port));
        assert_eq!((request.src_cid, request.dst_cid), (2, self.cid.into()));
        let response = self.header(op::RESPONSE, port, request.src_port, 0);
        self.send(&response, &[]);
        let answer = crate::vm::read_line(&mut stream);
        assert_eq!(answer, format!("OK {}", request.src_port));
        (stream, request.src_port)
    }

    /// Asks for the host's `port` from a port of this guest's; what the device answers.
    pub fn ask_host(&mut self, from: u32, port: u32) -> u16 {
        let request = self.header(op::REQUEST, from, port, 0);
        self.send(&request, &[]);
        loop {
            let (answer, _) = self.receive();
            // Others may come to their end just now.
            if (answer.src_port, answer.dst_port) == (port, from) {
                return answer.op;
            }
        }
    }

    /// Connects from port 5000 to the host's `port`.
    pub fn connect_to_host(&mut self, port: u32) {
        let request = self.header(op::REQUEST, 5000, port, 0);
        self.send(&request, &[]);
        let (response, _) = self.receive();
        assert_eq!(response.op, op::RESPONSE);
    }
}
