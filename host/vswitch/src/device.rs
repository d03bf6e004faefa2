//! The vhost-user side of one guest's vsock device: features, guest memory, rings.
//!
//! The front-end (QEMU) is not trusted further than its own guest: memory it hands over must be
//! sealed against shrinking, so that it cannot make the switch fault for everybody.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::event::epoll;
use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig,
    VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{
    Error as VhostError, GpuBackend, Result as VhostResult, VhostUserBackendReqHandlerMut,
    VhostUserVirtioFeatures,
};
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap};

/// Index of the queue the guest receives on (virtio 1.2, section 5.10.2).
pub const RX: usize = 0;
/// Index of the queue the guest transmits on.
pub const TX: usize = 1;
/// Receive, transmit and event queue. QEMU keeps the event queue to itself.
pub const QUEUES: usize = 3;
/// Most descriptors a queue may have; QEMU's device has 128.
const QUEUE_SIZE_MAX: u16 = 1024;

const VIRTIO_F_VERSION_1: u64 = 1 << 32;
const VIRTIO_RING_F_INDIRECT_DESC: u64 = 1 << 28;
const VIRTIO_RING_F_EVENT_IDX: u64 = 1 << 29;

/// What the device can do.
const FEATURES: u64 = VIRTIO_F_VERSION_1
    | VIRTIO_RING_F_INDIRECT_DESC
    | VIRTIO_RING_F_EVENT_IDX
    | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// One ring and the event descriptors around it.
pub struct Vring {
    /// The ring's indices and addresses.
    pub queue: Queue,
    kick: Option<File>,
    call: Option<File>,
    enabled: bool,
}

impl Vring {
    /// Tells the guest about used descriptors, unless it asked not to be told.
    pub fn notify(&mut self, mem: &GuestMemoryMmap) -> Result<(), virtio_queue::Error> {
        if self.queue.needs_notification(mem)?
            && let Some(call) = &self.call
        {
            // A full counter (EAGAIN) is a notification already pending, and a front-end that
            // closed the other end hears nothing either way.
            let _ = rustix::io::write(call, &1u64.to_ne_bytes());
        }
        Ok(())
    }
}

/// A range of the front-end's addresses and where the guest sees it.
struct Mapping {
    front_end_addr: u64,
    size: u64,
    guest_addr: u64,
}

/// The device as the front-end set it up.
pub struct Device {
    guest_cid: u32,
    epoll: Arc<OwnedFd>,
    /// Epoll user data of queue 0's kick; queue n has `kick_token + n`.
    kick_token: u64,
    memory: Option<Arc<GuestMemoryMmap>>,
    mappings: Vec<Mapping>,
    vrings: [Vring; QUEUES],
    acked_features: u64,
    /// `next_avail` of the rings when they were last stopped.
    stopped_at: [Option<u16>; QUEUES],
    reset: bool,
}

impl Device {
    /// A device no front-end has set up yet.
    pub fn new(
        guest_cid: u32,
        epoll: Arc<OwnedFd>,
        kick_token: u64,
    ) -> Result<Self, virtio_queue::Error> {
        let vring = || {
            Ok(Vring {
                queue: Queue::new(QUEUE_SIZE_MAX)?,
                kick: None,
                call: None,
                enabled: false,
            })
        };
        Ok(Self {
            guest_cid,
            epoll,
            kick_token,
            memory: None,
            mappings: Vec::new(),
            vrings: [vring()?, vring()?, vring()?],
            acked_features: 0,
            stopped_at: [None; QUEUES],
            reset: false,
        })
    }

    /// Whether a new driver took the device since the last call: connections of the old one are
    /// gone.
    pub fn take_reset(&mut self) -> bool {
        std::mem::take(&mut self.reset)
    }

    /// The guest's memory and the ring `index`, if the driver has started it.
    pub fn ring(&mut self, index: usize) -> Option<(Arc<GuestMemoryMmap>, &mut Vring)> {
        let memory = self.memory.clone()?;
        let vring = self.vrings.get_mut(index)?;
        (vring.enabled && vring.queue.ready()).then_some((memory, vring))
    }

    /// Lets go of the guest's memory and descriptors: the front-end is gone.
    pub fn detach(&mut self) {
        self.break_rings();
        for index in 0..QUEUES {
            self.unwatch_kick(index);
            self.vrings[index].call = None;
        }
        self.memory = None;
        self.mappings.clear();
    }

    /// Stops all rings until the driver is set up anew: the guest broke them.
    pub fn break_rings(&mut self) {
        for vring in &mut self.vrings {
            vring.queue.set_ready(false);
        }
    }

    fn vring(&mut self, index: u32) -> VhostResult<&mut Vring> {
        self.vrings
            .get_mut(index as usize)
            .ok_or(VhostError::InvalidParam)
    }

    fn unwatch_kick(&mut self, index: usize) {
        if let Some(old) = self.vrings[index].kick.take() {
            // Explicit, since the front-end keeps the same eventfd open, and so would epoll.
            let _ = epoll::delete(&self.epoll, &old);
        }
    }

    fn guest_address(&self, front_end_addr: u64) -> VhostResult<u64> {
        self.mappings
            .iter()
            .find_map(|m| {
                let offset = front_end_addr.checked_sub(m.front_end_addr)?;
                (offset < m.size).then(|| m.guest_addr.checked_add(offset))?
            })
            .ok_or(VhostError::InvalidParam)
    }
}

/// Refuses memory that the front-end could take away again: the next access would be a SIGBUS.
fn check_memory(file: &File, region: &VhostUserMemoryRegion) -> io::Result<()> {
    let seals = rustix::fs::fcntl_get_seals(file).map_err(|source| {
        io::Error::new(
            source.kind(),
            "guest memory is not sealable: start QEMU with memory-backend-memfd,share=on",
        )
    })?;
    if !seals.contains(rustix::fs::SealFlags::SHRINK) {
        return Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            "guest memory is not sealed against shrinking: leave memory-backend-memfd's seal=on",
        ));
    }
    let end = region.mmap_offset.checked_add(region.memory_size);
    if end.is_none_or(|end| file.metadata().is_ok_and(|m| end > m.len())) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "guest memory region reaches beyond the end of its file",
        ));
    }
    Ok(())
}

fn unsupported<T>(what: &'static str) -> VhostResult<T> {
    Err(VhostError::InvalidOperation(what))
}

impl VhostUserBackendReqHandlerMut for Device {
    fn set_owner(&mut self) -> VhostResult<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> VhostResult<()> {
        self.acked_features = 0;
        Ok(())
    }

    fn reset_device(&mut self) -> VhostResult<()> {
        unsupported("reset device")
    }

    fn get_features(&mut self) -> VhostResult<u64> {
        Ok(FEATURES)
    }

    fn set_features(&mut self, features: u64) -> VhostResult<()> {
        if features & !FEATURES != 0 {
            return Err(VhostError::InvalidParam);
        }
        self.acked_features = features;
        // Vhost-user, "Ring states": without protocol features there is no enable message.
        let enable = features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0;
        for vring in &mut self.vrings {
            vring
                .queue
                .set_event_idx(features & VIRTIO_RING_F_EVENT_IDX != 0);
            vring.enabled |= enable;
        }
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy_listening: Option<bool>,
    ) -> VhostResult<Option<Vec<VhostUserMemoryRegionBase>>> {
        let mut mapped = Vec::new();
        let mut mappings = Vec::new();
        for (region, file) in regions.iter().zip(files) {
            check_memory(&file, region).map_err(VhostError::ReqHandlerError)?;
            mapped.push(
                GuestRegionMmap::new(
                    region.mmap_region(file)?,
                    GuestAddress(region.guest_phys_addr),
                )
                .ok_or(VhostError::InvalidParam)?,
            );
            mappings.push(Mapping {
                front_end_addr: region.user_addr,
                size: region.memory_size,
                guest_addr: region.guest_phys_addr,
            });
        }
        let memory = GuestMemoryMmap::from_regions(mapped)
            .map_err(|e| VhostError::ReqHandlerError(io::Error::other(e)))?;
        self.memory = Some(Arc::new(memory));
        self.mappings = mappings;
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> VhostResult<()> {
        let num = u16::try_from(num).map_err(|_| VhostError::InvalidParam)?;
        self.vring(index)?
            .queue
            .try_set_size(num)
            .map_err(|_| VhostError::InvalidParam)
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> VhostResult<()> {
        let descriptor = GuestAddress(self.guest_address(descriptor)?);
        let used = GuestAddress(self.guest_address(used)?);
        let available = GuestAddress(self.guest_address(available)?);
        let memory = self.memory.clone().ok_or(VhostError::InvalidParam)?;
        let queue = &mut self.vring(index)?.queue;
        queue
            .try_set_desc_table_address(descriptor)
            .and_then(|()| queue.try_set_used_ring_address(used))
            .and_then(|()| queue.try_set_avail_ring_address(available))
            .map_err(|_| VhostError::InvalidParam)?;
        // SET_VRING_BASE carries the available index only; the used index stands in the ring.
        let used_idx = queue
            .used_idx(&*memory, std::sync::atomic::Ordering::Acquire)
            .map_err(|_| VhostError::InvalidParam)?;
        queue.set_next_used(used_idx.0);
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> VhostResult<()> {
        // The low 16 bits are the index of a split ring.
        let base = base as u16;
        self.vring(index)?.queue.set_next_avail(base);
        // A paused guest goes on where its ring stopped. One whose driver starts over does not.
        if self.stopped_at[index as usize].take() != Some(base) || base == 0 {
            self.reset = true;
        }
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> VhostResult<VhostUserVringState> {
        let vring = self.vring(index)?;
        vring.queue.set_ready(false);
        vring.call = None;
        let next_avail = vring.queue.next_avail();
        self.stopped_at[index as usize] = Some(next_avail);
        self.unwatch_kick(index as usize);
        Ok(VhostUserVringState::new(index, u32::from(next_avail)))
    }

    fn set_vring_kick(&mut self, index: u8, file: Option<File>) -> VhostResult<()> {
        let i = usize::from(index);
        self.vring(u32::from(index))?;
        self.unwatch_kick(i);
        let Some(file) = file else {
            // Polling instead of kicks: QEMU never asks for it.
            return unsupported("a ring without a kick descriptor");
        };
        // Edge-triggered: the counter never has to be read. It is readable already if a kick came
        // before this message, and adding it then reports that.
        epoll::add(
            &self.epoll,
            file.as_fd(),
            epoll::EventData::new_u64(self.kick_token + u64::from(index)),
            epoll::EventFlags::IN | epoll::EventFlags::ET,
        )
        .map_err(|e| VhostError::ReqHandlerError(e.into()))?;
        let has_memory = self.memory.is_some();
        let vring = &mut self.vrings[i];
        vring.kick = Some(file);
        vring.queue.set_ready(has_memory);
        Ok(())
    }

    fn set_vring_call(&mut self, index: u8, file: Option<File>) -> VhostResult<()> {
        if let Some(file) = &file {
            // The thread must not wait for whoever reads the other end.
            rustix::fs::fcntl_setfl(file, rustix::fs::OFlags::NONBLOCK)
                .map_err(|e| VhostError::ReqHandlerError(e.into()))?;
        }
        self.vring(u32::from(index))?.call = file;
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, _file: Option<File>) -> VhostResult<()> {
        self.vring(u32::from(index)).map(|_| ())
    }

    fn get_protocol_features(&mut self) -> VhostResult<VhostUserProtocolFeatures> {
        // CONFIG: QEMU reads the guest's CID from here. MQ: it asks how many queues there are.
        Ok(VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::CONFIG)
    }

    fn set_protocol_features(&mut self, _features: u64) -> VhostResult<()> {
        Ok(())
    }

    fn get_queue_num(&mut self) -> VhostResult<u64> {
        Ok(QUEUES as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> VhostResult<()> {
        self.vring(index)?.enabled = enable;
        Ok(())
    }

    fn get_config(
        &mut self,
        offset: u32,
        size: u32,
        _flags: VhostUserConfigFlags,
    ) -> VhostResult<Vec<u8>> {
        // struct virtio_vsock_config { le64 guest_cid; } (virtio 1.2, section 5.10.4)
        let config = u64::from(self.guest_cid).to_le_bytes();
        let from = offset as usize;
        from.checked_add(size as usize)
            .and_then(|to| config.get(from..to))
            .map(<[u8]>::to_vec)
            .ok_or(VhostError::InvalidParam)
    }

    fn set_config(&mut self, _: u32, _: &[u8], _: VhostUserConfigFlags) -> VhostResult<()> {
        unsupported("the device's configuration is read-only")
    }

    fn set_gpu_socket(&mut self, _: GpuBackend) -> VhostResult<()> {
        unsupported("gpu socket")
    }

    fn get_shared_object(&mut self, _: VhostUserSharedMsg) -> VhostResult<File> {
        unsupported("shared objects")
    }

    fn get_inflight_fd(&mut self, _: &VhostUserInflight) -> VhostResult<(VhostUserInflight, File)> {
        unsupported("inflight descriptors")
    }

    fn set_inflight_fd(&mut self, _: &VhostUserInflight, _: File) -> VhostResult<()> {
        unsupported("inflight descriptors")
    }

    fn get_max_mem_slots(&mut self) -> VhostResult<u64> {
        unsupported("memory slots")
    }

    fn add_mem_region(
        &mut self,
        _: &VhostUserSingleMemoryRegion,
        _: File,
        _: Option<bool>,
    ) -> VhostResult<Option<VhostUserMemoryRegionBase>> {
        unsupported("memory slots")
    }

    fn remove_mem_region(&mut self, _: &VhostUserSingleMemoryRegion) -> VhostResult<()> {
        unsupported("memory slots")
    }

    fn set_device_state_fd(
        &mut self,
        _: VhostTransferStateDirection,
        _: VhostTransferStatePhase,
        _: File,
    ) -> VhostResult<Option<File>> {
        unsupported("device state")
    }

    fn check_device_state(&mut self) -> VhostResult<()> {
        unsupported("device state")
    }

    fn get_shmem_config(&mut self) -> VhostResult<VhostUserShMemConfig> {
        unsupported("shared memory regions")
    }

    fn set_log_base(&mut self, _: &VhostUserLog, _: File) -> VhostResult<()> {
        unsupported("dirty logging")
    }
}
