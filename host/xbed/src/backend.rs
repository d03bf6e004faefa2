//! Opens what the configuration names.

use std::fs::{File, TryLockError};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use xbee_hypervisor::Hypervisor;
use xbee_hypervisor::qemu::{Bridge, GuestsSocket, QemuConfig, QemuHypervisor};
use xbee_hypervisor::sim::{SimConfig, SimHost, SimHypervisor};
use xbee_staging::{Limits, Stager};

use crate::config::{Backend, Config, Firewall};
use crate::images::ImageStore;
use crate::store::Owner;

/// Why there is no back end.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// Another `xbed` has the data.
    #[error("another xbed uses the data directory {0}: stop it, or use another --data")]
    InUse(PathBuf),
    /// The file system's word.
    #[error("cannot use the data directory {path}")]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Not part of this program.
    #[error(
        "this xbed was built without the back end xen: build it with `cargo build -p xbed --features xen`, or use --backend qemu"
    )]
    #[cfg(not(feature = "xen"))]
    NoXen,
    /// The hypervisor's word.
    #[error(transparent)]
    Hypervisor(#[from] xbee_hypervisor::Error),
}

/// Makes the data directory this process's own: held as long as the file is open.
pub fn lock(config: &Config) -> Result<File, BackendError> {
    let failed = |source| BackendError::Io {
        path: config.data.clone(),
        source,
    };
    std::fs::create_dir_all(&config.data).map_err(failed)?;
    let file = File::create(config.data.join("lock")).map_err(failed)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(BackendError::InUse(config.data.clone())),
        Err(TryLockError::Error(error)) => Err(failed(error)),
    }
}

/// The hypervisor.
pub async fn open(config: &Config) -> Result<Arc<dyn Hypervisor>, BackendError> {
    Ok(match config.backend {
        Backend::Sim => {
            let host = SimHost::new(SimConfig::new(config.domains()));
            Arc::new(SimHypervisor::new(host))
        }
        Backend::Qemu => {
            let mut qemu = QemuConfig::new(config.domains());
            qemu.program.clone_from(&config.qemu);
            qemu.outbound.clone_from(&config.outbound);
            qemu.bridge = config.bridge.clone().map(|name| Bridge {
                name,
                firewall: config.firewall == Firewall::Required,
            });
            qemu.guests_socket = config.guests_socket.clone().map(|path| GuestsSocket {
                path,
                users_end: Owner::FIRST_REMOTE,
            });
            qemu.kvm_probe_kernel = ImageStore::new(config.images.clone()).kernel();
            Arc::new(QemuHypervisor::new(qemu).await?)
        }
        #[cfg(feature = "xen")]
        Backend::Xen => {
            use crate::config::Guests;
            use xbee_hypervisor::xen::{XenConfig, XenHypervisor};
            let mut xen = XenConfig::new(config.domains());
            if let Some(bridge) = &config.bridge {
                xen.bridge.clone_from(bridge);
            }
            xen.paravirtual = config.guests == Guests::Pv;
            xen.firewall = config.firewall == Firewall::Required;
            Arc::new(XenHypervisor::new(xen).await?)
        }
        #[cfg(not(feature = "xen"))]
        Backend::Xen => return Err(BackendError::NoXen),
    })
}

/// What moves files.
pub fn stager(config: &Config) -> Stager {
    let stager = Stager::new(Limits::default());
    match &config.ca_file {
        Some(path) => stager.with_ca_file(path),
        None => stager,
    }
}
