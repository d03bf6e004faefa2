//! The QEMU back end: one unprivileged QEMU process a domain.
//!
//! A domain outlives the process that started it. All that is needed to find it again is in its run
//! directory; [`QemuHypervisor::new`] adopts what it finds there.

mod agent_port;
mod card;
mod command;
mod config;
mod devices;
mod domain;
mod files;
mod gateway;
mod guests_socket;
mod host;
mod process;
mod qmp;
mod supervisor;
mod switch;
mod tap;

use std::collections::HashMap;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::{OnceCell, broadcast};
use tokio::task::JoinSet;
use xbee_protocol::{AGENT_VSOCK_PORT, Transport};

pub use config::{Accelerator, Bridge, GuestsSocket, QemuConfig};
use domain::Domain;
pub use gateway::router;
use host::Host;
use switch::Switch;
pub use xbee_gateway::rules::Outbound;

use crate::bridge::Network;
use crate::domain::{
    AgentStream, Disk, DomainEvent, DomainId, DomainInfo, DomainSpec, DomainState, DomainStats,
    HostCapabilities, Interface, ShutdownOutcome,
};
use crate::error::{Error, chain};
use crate::rundir::{self, Record, RunDir};
use crate::work::{blocking, joined};
use crate::{Hypervisor, image, spec};

/// Events kept for a receiver that lags.
const EVENTS_MAX: usize = 4096;

/// As QEMU itself says when asked to (7.2, docs of `query-migrate`: "non-migratable device").
const NO_SAVE: &str =
    "QEMU does not save a domain with a vhost-user-vsock device, over which its agent is reached";

/// Domains as QEMU processes.
#[derive(Debug)]
pub struct QemuHypervisor(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    config: QemuConfig,
    boot_id: String,
    host: OnceCell<Host>,
    switch: Switch,
    /// Where interfaces are, if not with the switch.
    bridge: Option<Network>,
    domains: Mutex<HashMap<DomainId, Arc<Domain>>>,
    events: broadcast::Sender<DomainEvent>,
}

/// Where interfaces are put.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Net<'a> {
    pub(crate) config: &'a QemuConfig,
    pub(crate) switch: &'a Switch,
    pub(crate) bridge: Option<&'a Network>,
}

impl QemuHypervisor {
    /// Takes up the domains found in the configured directory. One instance at a time may use it.
    ///
    /// # Errors
    /// [`Error::Io`] where the directory or something in it cannot be read.
    pub async fn new(config: QemuConfig) -> Result<Self, Error> {
        let boot_id = rundir::boot_id()?;
        let (events, _) = broadcast::channel(EVENTS_MAX);
        let mut domains = HashMap::new();
        let domains_dir = config.domains_dir.clone();
        let found = blocking(move || RunDir::scan(&domains_dir)).await?;
        // All at once: those that do not answer are waited for.
        let mut adopted = JoinSet::new();
        for (dir, record) in found {
            let (boot_id, config, events) = (boot_id.clone(), config.clone(), events.clone());
            adopted
                .spawn(async move { domain::adopt(dir, record, &boot_id, &config, events).await });
        }
        while let Some(domain) = adopted.join_next().await {
            let domain = domain.unwrap_or_else(|error| match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                Err(error) => Err(Error::HypervisorBroken {
                    detail: error.to_string(),
                }),
            })?;
            tracing::info!(domain = %domain.spec.id, state = %domain.life.get(), "domain found");
            domains.insert(domain.spec.id, domain);
        }
        let vswitch = config::companion(config.vswitch_program.as_deref(), "vswitch")?;
        let guests_socket = config.guests_socket.clone();
        let switch = Switch::new(vswitch, &config.domains_dir, guests_socket);
        let bridge = config
            .bridge
            .as_ref()
            .map(|bridge| Network::new(bridge.firewall, &bridge.name, |_| Ok(())));
        if let Some(bridge) = &bridge {
            for domain in domains.values() {
                domain.note_ports(bridge, domain.hardware().interfaces);
            }
            // What is lacking here is an error where a domain is to start.
            if let Err(error) = bridge.apply(None).await {
                tracing::warn!(error = chain(&error), "guests' network");
            }
        }
        let inner = Inner {
            config,
            boot_id,
            host: OnceCell::new(),
            switch,
            bridge,
            domains: Mutex::new(domains),
            events,
        };
        // Dropped when it fails, which ends a switch without domains.
        let hypervisor = Self(Arc::new(inner));
        let inner = &hypervisor.0;
        match inner.config.guests_socket {
            Some(_) => inner.switch.serve(&inner.host().await?.cage).await?,
            None => inner.switch.end_programs().await,
        }
        Ok(hypervisor)
    }

    fn domain(&self, id: DomainId) -> Result<Arc<Domain>, Error> {
        self.0.find(id).ok_or(Error::NotFound(id))
    }

    /// Runs `operation` to its end even if the caller stops waiting: half an operation would leave
    /// a process or a directory that nothing knows of.
    async fn complete<T, F>(&self, operation: impl FnOnce(Arc<Inner>) -> F) -> Result<T, Error>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, Error>> + Send + 'static,
    {
        joined(tokio::spawn(operation(Arc::clone(&self.0)))).await
    }
}

impl Drop for QemuHypervisor {
    /// Lets go of the domains; they run on, and so does their switch.
    fn drop(&mut self) {
        let domains = self
            .0
            .domains
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        for domain in domains.values() {
            domain.discard();
        }
        if domains.is_empty() {
            self.0.switch.stop();
        }
    }
}

impl Inner {
    fn net(&self) -> Net<'_> {
        Net {
            config: &self.config,
            switch: &self.switch,
            bridge: self.bridge.as_ref(),
        }
    }

    fn find(&self, id: DomainId) -> Option<Arc<Domain>> {
        self.domains
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(&id)
            .cloned()
    }

    async fn host(&self) -> Result<&Host, Error> {
        self.host
            .get_or_try_init(|| Host::probe(&self.config))
            .await
    }

    async fn create(self: Arc<Self>, spec: DomainSpec) -> Result<(), Error> {
        spec::check(&spec, host::memory_bytes())?;
        let dir = RunDir::of(&spec, &self.config.domains_dir)?;
        let owner = domain::identity(&spec, &self.config);
        let boot_id = self.boot_id.clone();
        let existing = self.find(spec.id);
        let (spec, dir, made) = blocking(move || {
            if let Some(existing) = existing {
                dir.check_same(&existing.spec, &spec)?;
                return Ok((spec, dir, None));
            }
            spec.kernel.as_deref().map(image::open_kernel).transpose()?;
            let record = Record::new(spec.clone(), boot_id);
            dir.make(&record, owner, || dir.make_for_qemu(&spec, owner))?;
            Ok((spec, dir, Some(record)))
        })
        .await?;
        if let Some(record) = made {
            let id = spec.id;
            let state = DomainState::Created;
            let events = self.events.clone();
            let domain = match Domain::new(spec, dir.clone(), record, state, events) {
                Ok(domain) => domain,
                Err(error) => {
                    dir.remove()?;
                    return Err(error);
                }
            };
            self.domains
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .insert(id, Arc::new(domain));
        }
        Ok(())
    }

    async fn start(self: Arc<Self>, domain: Arc<Domain>) -> Result<(), Error> {
        let host = self.host().await?;
        let _operation = domain.operation.lock().await;
        match domain.life.get() {
            DomainState::Created => domain.start(host, self.net()).await,
            DomainState::Running | DomainState::Paused => Ok(()),
            DomainState::Stopped { .. } => Err(domain.life.wrong("start")),
        }
    }

    async fn destroy(self: Arc<Self>, id: DomainId) -> Result<(), Error> {
        let Some(domain) = self.find(id) else {
            // Left by a creation that was cut off.
            let dir = RunDir::named(&self.config.domains_dir, id);
            return blocking(move || dir.remove()).await;
        };
        let _operation = domain.operation.lock().await;
        domain.kill(self.config.command_limit).await?;
        self.switch.remove(id, domain.spec.cid).await?;
        if let Some(bridge) = &self.bridge
            && let Err(error) = bridge.leave(id).await
        {
            // The next change tries again, and the port is not there any more.
            tracing::warn!(domain = %id, error = chain(&error), "still in the firewall");
        }
        let dir = domain.dir.clone();
        blocking(move || {
            dir.remove_cgroups()?;
            dir.remove()
        })
        .await?;
        domain.discard();
        self.domains
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&id);
        Ok(())
    }
}

#[async_trait]
impl Hypervisor for QemuHypervisor {
    fn transport(&self) -> Transport {
        Transport::Vsock {
            port: AGENT_VSOCK_PORT,
        }
    }

    async fn probe(&self) -> Result<HostCapabilities, Error> {
        Ok(self.0.host().await?.capabilities())
    }

    async fn create(&self, spec: &DomainSpec) -> Result<(), Error> {
        let spec = spec.clone();
        self.complete(|inner| inner.create(spec)).await
    }

    async fn start(&self, id: DomainId) -> Result<(), Error> {
        let domain = self.domain(id)?;
        self.complete(|inner| inner.start(domain)).await
    }

    async fn channel(&self, id: DomainId) -> Result<Box<dyn AgentStream>, Error> {
        let domain = self.domain(id)?;
        if domain.life.get() == DomainState::Created {
            return Err(domain.life.wrong("reach the agent of"));
        }
        tokio::select! {
            biased;
            reason = domain.life.stopped() => Err(Error::Gone { id, reason }),
            stream = domain.agent.next() => Ok(Box::new(stream)),
        }
    }

    async fn console(&self, id: DomainId) -> Result<PathBuf, Error> {
        Ok(self.domain(id)?.dir.console_log())
    }

    async fn pause(&self, id: DomainId) -> Result<(), Error> {
        let domain = self.domain(id)?;
        let _operation = domain.operation.lock().await;
        domain.pause().await
    }

    async fn resume(&self, id: DomainId) -> Result<(), Error> {
        let domain = self.domain(id)?;
        let _operation = domain.operation.lock().await;
        domain.resume().await
    }

    async fn save(&self, id: DomainId, _file: &Path) -> Result<(), Error> {
        Err(self.domain(id)?.cannot("save", NO_SAVE))
    }

    async fn restore(&self, id: DomainId, _file: &Path) -> Result<(), Error> {
        Err(self.domain(id)?.cannot("restore", NO_SAVE))
    }

    async fn attach_disk(&self, id: DomainId, disk: &Disk) -> Result<usize, Error> {
        let (domain, disk) = (self.domain(id)?, disk.clone());
        self.complete(|_| async move {
            let _operation = domain.operation.lock().await;
            domain.attach_disk(disk).await
        })
        .await
    }

    async fn detach_disk(&self, id: DomainId, index: usize) -> Result<(), Error> {
        let domain = self.domain(id)?;
        self.complete(|_| async move {
            let _operation = domain.operation.lock().await;
            domain.detach_disk(index).await
        })
        .await
    }

    async fn attach_interface(&self, id: DomainId, interface: Interface) -> Result<(), Error> {
        let domain = self.domain(id)?;
        self.complete(|inner| async move {
            let _operation = domain.operation.lock().await;
            domain.attach_interface(interface, inner.net()).await
        })
        .await
    }

    async fn detach_interface(&self, id: DomainId, mac: [u8; 6]) -> Result<(), Error> {
        let domain = self.domain(id)?;
        self.complete(|inner| async move {
            let _operation = domain.operation.lock().await;
            domain.detach_interface(mac, inner.net()).await
        })
        .await
    }

    async fn set_memory(&self, id: DomainId, bytes: u64) -> Result<(), Error> {
        let domain = self.domain(id)?;
        self.complete(|_| async move {
            let _operation = domain.operation.lock().await;
            domain.set_memory(bytes).await
        })
        .await
    }

    async fn set_vcpus(&self, id: DomainId, vcpus: u32) -> Result<(), Error> {
        let domain = self.domain(id)?;
        self.complete(|inner| async move {
            let kvm = inner.host().await?.kvm.is_some();
            let _operation = domain.operation.lock().await;
            domain.set_vcpus(vcpus, kvm).await
        })
        .await
    }

    async fn shutdown(&self, id: DomainId, grace: Duration) -> Result<ShutdownOutcome, Error> {
        // Without `operation`: `destroy` must not wait for the grace to pass.
        self.domain(id)?
            .shutdown(grace, self.0.config.command_limit)
            .await
    }

    async fn destroy(&self, id: DomainId) -> Result<(), Error> {
        self.complete(|inner| inner.destroy(id)).await
    }

    async fn list(&self) -> Result<Vec<DomainInfo>, Error> {
        let domains = self
            .0
            .domains
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let mut list: Vec<_> = domains
            .iter()
            .map(|(id, domain)| DomainInfo {
                id: *id,
                name: domain.spec.name.clone(),
                state: domain.life.get(),
                hardware: domain.hardware(),
            })
            .collect();
        list.sort_by_key(|info| info.id);
        Ok(list)
    }

    async fn stats(&self, id: DomainId) -> Result<DomainStats, Error> {
        self.domain(id)?.stats()
    }

    fn events(&self) -> broadcast::Receiver<DomainEvent> {
        self.0.events.subscribe()
    }
}
