//! Memory promised to domains that are being started: Xen counts it as free until they have it.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::Notify;

use super::libvirt::Libvirt;
use crate::error::Error;

const MIB: u64 = 1 << 20;

/// What a domain takes beyond its own memory, in bytes: for itself and for each virtual CPU. Xen's
/// tools reserve as much, and 1/128 of the memory for its page tables.
const OVERHEAD_BYTES: u64 = 2 * MIB;
const OVERHEAD_PER_VCPU_BYTES: u64 = MIB;

/// What a domain takes of the machine's memory that has so much, and can be given up to the limits.
pub(crate) fn needed_bytes(memory_bytes: u64, memory_limit_bytes: u64, vcpus_limit: u32) -> u64 {
    let overhead_bytes = OVERHEAD_BYTES + u64::from(vcpus_limit) * OVERHEAD_PER_VCPU_BYTES;
    memory_bytes + memory_limit_bytes / 128 + overhead_bytes
}

/// The sum of what is promised.
#[derive(Debug, Default)]
pub(crate) struct Promises {
    /// Who asks first is served first, also when it must wait.
    turn: tokio::sync::Mutex<()>,
    bytes: Mutex<u64>,
    /// A promise was given back.
    freed: Notify,
}

impl Promises {
    /// Promises memory until the value is dropped. Waits for others that are being started where
    /// it is not clear how much they leave.
    ///
    /// # Errors
    /// [`Error::NoMemoryNow`].
    pub(crate) async fn promise(
        self: &Arc<Self>,
        needed: u64,
        libvirt: &Arc<Libvirt>,
    ) -> Result<Promise, Error> {
        let _turn = self.turn.lock().await;
        loop {
            // Before the look: what is given back meanwhile may or may not be in what it sees.
            let promised = self.promised();
            let (_, free_bytes, _) = libvirt.host().await?;
            if needed.saturating_add(promised) <= free_bytes {
                *self.lock() += needed;
                return Ok(Promise {
                    of: Arc::clone(self),
                    bytes: needed,
                });
            }
            if promised == 0 {
                return Err(Error::NoMemoryNow {
                    asked_mib: needed.div_ceil(MIB),
                    free_mib: free_bytes / MIB,
                });
            }
            self.freed.notified().await;
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, u64> {
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn promised(&self) -> u64 {
        *self.lock()
    }
}

/// Memory promised to one domain.
#[derive(Debug)]
pub(crate) struct Promise {
    of: Arc<Promises>,
    bytes: u64,
}

impl Drop for Promise {
    fn drop(&mut self) {
        *self.of.lock() -= self.bytes;
        // Kept for who waits next, if nobody waits now.
        self.of.freed.notify_one();
    }
}
