//! The simulator: virtual domains in memory, with agents that speak the real protocol.
//!
//! Nothing runs but tasks on the caller's runtime, and all time is tokio's: with a paused clock, an
//! hour of a thousand domains passes at once. The state is in [`SimHost`], which several
//! [`SimHypervisor`]s can share one after another, as a real host survives its manager's restart.

mod agent;
mod command;
mod config;
mod connection;
mod domain;
mod files;
mod machine;
mod random;
mod stream;
mod task;

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::broadcast;
use tokio::time::Instant;
use xbee_protocol::{AGENT_VSOCK_PORT, Transport};

pub use config::{SimConfig, SimEvent};
use domain::Domain;
use random::Random;

use crate::domain::{
    AgentStream, Disk, DomainEvent, DomainId, DomainInfo, DomainSpec, DomainState, DomainStats,
    HostCapabilities, Interface, ShutdownOutcome,
};
use crate::error::Error;
use crate::{Hypervisor, image, spec};

/// Events kept for a receiver that lags.
const EVENTS_MAX: usize = 65_536;

fn failure(code: &str, message: impl Into<String>) -> xbee_protocol::Failure {
    xbee_protocol::Failure {
        code: code.to_owned(),
        message: message.into(),
    }
}

async fn at(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

/// A simulated host: what goes on when its manager is restarted.
#[derive(Debug)]
pub struct SimHost {
    config: SimConfig,
    domains: Mutex<HashMap<DomainId, Arc<Domain>>>,
    /// How often each `create` was tried, so that a repetition can end otherwise.
    attempts: Mutex<HashMap<DomainId, u64>>,
    events: broadcast::Sender<DomainEvent>,
}

impl SimHost {
    /// A host without domains. Removes what those of an earlier one have left, which ended with its process.
    #[must_use]
    pub fn new(config: SimConfig) -> Arc<Self> {
        for entry in fs::read_dir(&config.domains_dir)
            .into_iter()
            .flatten()
            .flatten()
        {
            let name = entry.file_name();
            // Only what a domain's directory is named like is ours.
            let is_domain = name
                .to_str()
                .is_some_and(|name| name.parse::<DomainId>().is_ok());
            if is_domain && let Err(error) = fs::remove_dir_all(entry.path()) {
                tracing::warn!(directory = %entry.path().display(), %error, "a simulated domain's directory is left");
            }
        }
        let (events, _) = broadcast::channel(EVENTS_MAX);
        Arc::new(Self {
            config,
            domains: Mutex::default(),
            attempts: Mutex::default(),
            events,
        })
    }

    /// Makes something happen to a started domain.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::WrongState`] before its start, [`Error::Gone`] after its end.
    pub fn inject(&self, id: DomainId, event: SimEvent) -> Result<(), Error> {
        self.domain(id)?.inject(event)
    }

    fn find(&self, id: DomainId) -> Option<Arc<Domain>> {
        let domains = self.domains.lock().unwrap_or_else(PoisonError::into_inner);
        domains.get(&id).cloned()
    }

    fn domain(&self, id: DomainId) -> Result<Arc<Domain>, Error> {
        self.find(id).ok_or(Error::NotFound(id))
    }
}

/// Domains as simulations.
#[derive(Debug)]
pub struct SimHypervisor(Arc<SimHost>);

impl SimHypervisor {
    /// Drives the domains of a simulated host. The agents' connections to the instance before are
    /// cut, as they would be.
    #[must_use]
    pub fn new(host: Arc<SimHost>) -> Self {
        let domains = host.domains.lock().unwrap_or_else(PoisonError::into_inner);
        for domain in domains.values() {
            domain.forget_connection();
        }
        drop(domains);
        Self(host)
    }
}

#[async_trait]
impl Hypervisor for SimHypervisor {
    fn transport(&self) -> Transport {
        Transport::Vsock {
            port: AGENT_VSOCK_PORT,
        }
    }

    async fn probe(&self) -> Result<HostCapabilities, Error> {
        Ok(HostCapabilities {
            backend: "sim".to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            accelerator: "simulated".to_owned(),
            accelerator_note: String::new(),
            cpus: self.0.config.cpus,
            memory_bytes: self.0.config.memory_bytes,
        })
    }

    async fn create(&self, spec: &DomainSpec) -> Result<(), Error> {
        let config = &self.0.config;
        spec::check(spec, config.memory_bytes)?;
        spec::check_run_dir(spec, &config.domains_dir)?;
        if let Some(existing) = self.0.find(spec.id) {
            spec::check_same(&existing.spec, spec)?;
            if existing.spec.boot_config != spec.boot_config {
                return Err(spec::other_boot_config(spec.id));
            }
            return Ok(());
        }
        if config.check_images {
            spec.kernel.as_deref().map(image::open_kernel).transpose()?;
            spec.initramfs
                .as_deref()
                .map(image::open_initramfs)
                .transpose()?;
            for disk in &spec.disks {
                image::open_disk(disk)?;
            }
        }
        let attempt = {
            let mut attempts = self
                .0
                .attempts
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            let attempt = attempts.entry(spec.id).or_default();
            *attempt += 1;
            *attempt
        };
        let chance =
            Random::new(config.seed ^ attempt, spec.id.as_u128()).happens(config.refused_create);
        if chance {
            return Err(Error::HypervisorBroken {
                detail: "simulated: the domain was refused".to_owned(),
            });
        }
        let make = || match fs::create_dir_all(&spec.run_dir) {
            Ok(()) => Domain::new(spec.clone(), config, self.0.events.clone()),
            Err(error) => Err(error),
        };
        let domain = make().map_err(Error::io("make", &spec.run_dir))?;
        let mut domains = self
            .0
            .domains
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        domains.insert(spec.id, Arc::new(domain));
        Ok(())
    }

    async fn start(&self, id: DomainId) -> Result<(), Error> {
        self.0.domain(id)?.start(&self.0.config)
    }

    async fn channel(&self, id: DomainId) -> Result<Box<dyn AgentStream>, Error> {
        let domain = self.0.domain(id)?;
        if domain.state() == DomainState::Created {
            return Err(domain.wrong_state("reach the agent of"));
        }
        tokio::select! {
            biased;
            reason = domain.stopped() => Err(Error::Gone { id, reason }),
            stream = domain.next_connection() => Ok(Box::new(stream)),
        }
    }

    async fn console(&self, id: DomainId) -> Result<PathBuf, Error> {
        Ok(self.0.domain(id)?.console_path())
    }

    async fn pause(&self, id: DomainId) -> Result<(), Error> {
        self.0.domain(id)?.pause()
    }

    async fn resume(&self, id: DomainId) -> Result<(), Error> {
        self.0.domain(id)?.resume()
    }

    async fn save(&self, id: DomainId, file: &Path) -> Result<(), Error> {
        self.0.domain(id)?.save(file)
    }

    async fn restore(&self, id: DomainId, file: &Path) -> Result<(), Error> {
        self.0.domain(id)?.restore(file)
    }

    async fn attach_disk(&self, id: DomainId, disk: &Disk) -> Result<usize, Error> {
        if self.0.config.check_images {
            image::open_disk(disk)?;
        }
        let domain = self.0.domain(id)?;
        domain.change("attach a disk to", |hardware| {
            let index = spec::free_disk(&domain.spec, hardware)?;
            hardware.disks.insert(index, disk.clone());
            Ok(index)
        })
    }

    async fn detach_disk(&self, id: DomainId, index: usize) -> Result<(), Error> {
        self.0.domain(id)?.change("detach a disk from", |hardware| {
            hardware.disks.remove(&index);
            Ok(())
        })
    }

    async fn attach_interface(&self, id: DomainId, interface: Interface) -> Result<(), Error> {
        self.0
            .domain(id)?
            .change("attach an interface to", |hardware| {
                if spec::check_new_interface(hardware, &interface)? {
                    hardware.interfaces.push(interface);
                }
                Ok(())
            })
    }

    async fn detach_interface(&self, id: DomainId, mac: [u8; 6]) -> Result<(), Error> {
        self.0
            .domain(id)?
            .change("detach an interface from", |hardware| {
                hardware.interfaces.retain(|known| known.mac != mac);
                Ok(())
            })
    }

    async fn set_memory(&self, id: DomainId, bytes: u64) -> Result<(), Error> {
        let domain = self.0.domain(id)?;
        domain.change("change the memory of", |hardware| {
            spec::check_memory(&domain.spec, bytes)?;
            hardware.memory_bytes = bytes;
            Ok(())
        })
    }

    async fn set_vcpus(&self, id: DomainId, vcpus: u32) -> Result<(), Error> {
        let domain = self.0.domain(id)?;
        domain.change("change the processors of", |hardware| {
            spec::check_vcpus(&domain.spec, vcpus)?;
            hardware.vcpus = vcpus;
            Ok(())
        })
    }

    async fn shutdown(&self, id: DomainId, grace: Duration) -> Result<ShutdownOutcome, Error> {
        self.0.domain(id)?.shutdown(grace).await
    }

    async fn destroy(&self, id: DomainId) -> Result<(), Error> {
        let Some(domain) = self.0.find(id) else {
            return Ok(());
        };
        domain.kill();
        match fs::remove_dir_all(&domain.spec.run_dir) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(Error::io("remove", &domain.spec.run_dir)(error));
            }
            _ => {}
        }
        self.0
            .domains
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&id);
        self.0
            .attempts
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&id);
        Ok(())
    }

    async fn list(&self) -> Result<Vec<DomainInfo>, Error> {
        let domains = self
            .0
            .domains
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let mut list: Vec<_> = domains
            .values()
            .map(|domain| DomainInfo {
                id: domain.spec.id,
                name: domain.spec.name.clone(),
                state: domain.state(),
                hardware: domain.hardware(),
            })
            .collect();
        list.sort_by_key(|info| info.id);
        Ok(list)
    }

    async fn stats(&self, id: DomainId) -> Result<DomainStats, Error> {
        self.0.domain(id)?.stats()
    }

    fn events(&self) -> broadcast::Receiver<DomainEvent> {
        self.0.events.subscribe()
    }
}
