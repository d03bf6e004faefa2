//! The Xen back end: domains of Xen's own, through libvirt's driver for libxl.
//!
//! A domain is *transient*: libvirt forgets it when it is gone, so nothing is left behind. It
//! outlives the process that started it, and libvirt's daemon; what is needed to find it again is
//! in its run directory, and [`XenHypervisor::new`] adopts what it finds there.

mod channel;
mod config;
mod devices;
mod domain;
mod files;
mod libvirt;
mod memory;
mod peer;
mod port;
mod release;
mod save;
mod xl;
mod xml;

use std::collections::HashMap;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::{OnceCell, Semaphore, broadcast};
use tokio::task::AbortHandle;
use xbee_protocol::Transport;

pub use config::XenConfig;
use domain::Domain;
use libvirt::{Libvirt, Notice};
use memory::Promises;
use xml::Mode;

use crate::bridge::Network;
use crate::domain::{
    AgentStream, Description, DescriptionForm, Disk, DomainEvent, DomainId, DomainInfo, DomainSpec,
    DomainState, DomainStats, HostCapabilities, Interface, ShutdownOutcome,
};
use crate::error::{Error, chain};
use crate::rundir::{self, Record, RunDir};
use crate::work::{blocking, joined};
use crate::{Hypervisor, spec};

/// Events kept for a receiver that lags.
const EVENTS_MAX: usize = 4096;

/// Starts at a time: more do not end sooner, and Xen's scripts for interfaces give up after 40 s.
const STARTS_MAX: usize = 2;

/// Pauses between attempts to reach libvirt's daemon again.
const RECONNECT_MIN: Duration = Duration::from_millis(200);
const RECONNECT_MAX: Duration = Duration::from_secs(5);

/// TCP port of an agent whose kernel has no vchan; the address is its domain's own.
const AGENT_TCP_PORT: u16 = 22594;

/// Domains of Xen.
#[derive(Debug)]
pub struct XenHypervisor {
    inner: Arc<Inner>,
    tasks: Vec<AbortHandle>,
}

#[derive(Debug)]
struct Inner {
    config: XenConfig,
    boot_id: String,
    libvirt: Arc<Libvirt>,
    network: Arc<Network>,
    host: OnceCell<Host>,
    starts: Semaphore,
    promises: Arc<Promises>,
    domains: Mutex<HashMap<DomainId, Arc<Domain>>>,
    events: broadcast::Sender<DomainEvent>,
    /// The connection to libvirt was lost.
    lost: tokio::sync::Notify,
}

/// What does not change while this process runs.
#[derive(Debug)]
struct Host {
    version: String,
    cpus: u32,
    memory_bytes: u64,
}

impl XenHypervisor {
    /// Takes up the domains found in the configured directory. One instance at a time may use it.
    /// Xen and libvirt need not be there yet: [`Hypervisor::probe`] says what is missing.
    ///
    /// # Errors
    /// [`Error::Io`] where the directory or something in it cannot be read.
    pub async fn new(config: XenConfig) -> Result<Self, Error> {
        let boot_id = rundir::boot_id()?;
        let (events, _) = broadcast::channel(EVENTS_MAX);
        let domains_dir = config.domains_dir.clone();
        let inner = Arc::new_cyclic(|inner: &Weak<Inner>| {
            let observer = Weak::clone(inner);
            Inner {
                libvirt: Arc::new(Libvirt::new(config.uri.clone(), move |notice| {
                    if let Some(inner) = observer.upgrade() {
                        inner.noticed(notice);
                    }
                })),
                network: Arc::new(Network::new(
                    config.firewall,
                    &config.bridge,
                    port::announce,
                )),
                config,
                boot_id,
                host: OnceCell::new(),
                starts: Semaphore::new(STARTS_MAX),
                promises: Arc::default(),
                domains: Mutex::default(),
                events,
                lost: tokio::sync::Notify::new(),
            }
        });
        let found = blocking(move || RunDir::scan(&domains_dir)).await?;
        for (dir, record) in found {
            let id = record.spec.id;
            let domain = domain::adopt(
                dir,
                record,
                &inner.boot_id,
                &inner.config,
                &inner.libvirt,
                &inner.network,
                inner.events.clone(),
            )
            .await?;
            tracing::info!(domain = %id, state = %domain.life.get(), "domain found");
            if domain.is_unsettled() {
                tokio::spawn(settle(Arc::clone(&inner), Arc::clone(&domain)));
            }
            inner.lock().insert(id, domain);
        }
        // What is not there now cuts guests off, and lets them do nothing.
        if let Err(error) = inner.network.apply(None).await {
            tracing::warn!(error = chain(&error), "guests' network");
        }
        // What happened between a look at a domain and its place in the map was noticed by nobody.
        inner.look_at_all();
        let tasks = vec![
            tokio::spawn(keep_connected(Arc::clone(&inner))).abort_handle(),
            tokio::spawn(release::watch(Arc::clone(&inner))).abort_handle(),
            tokio::spawn(peer::run(Arc::clone(&inner))).abort_handle(),
        ];
        Ok(Self { inner, tasks })
    }

    fn domain(&self, id: DomainId) -> Result<Arc<Domain>, Error> {
        self.inner.find(id).ok_or(Error::NotFound(id))
    }

    /// Runs `operation` to its end even if the caller stops waiting: half an operation would leave
    /// a domain or a directory that nothing knows of.
    async fn complete<T, F>(&self, operation: impl FnOnce(Arc<Inner>) -> F) -> Result<T, Error>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, Error>> + Send + 'static,
    {
        joined(tokio::spawn(operation(Arc::clone(&self.inner)))).await
    }
}

impl Drop for XenHypervisor {
    /// Lets go of the domains; they run on.
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
        for domain in self.inner.lock().values() {
            domain.discard();
        }
        self.inner.libvirt.disconnect();
    }
}

/// Completes or undoes what was under way with a domain that was found.
async fn settle(inner: Arc<Inner>, domain: Arc<Domain>) {
    let _operation = domain.operation.lock().await;
    if let Err(error) = domain.settle(&inner.config, &inner.boot_id).await {
        tracing::error!(domain = %domain.spec.id, error = chain(&error), "left in between");
    }
}

/// Reaches libvirt's daemon again whenever the connection to it is lost.
async fn keep_connected(inner: Arc<Inner>) {
    loop {
        inner.lost.notified().await;
        let mut pause = RECONNECT_MIN;
        while let Err(error) = inner.libvirt.connect().await {
            tracing::warn!(%error, "libvirt is not back");
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(RECONNECT_MAX);
        }
        tracing::info!("libvirt is back");
        inner.look_at_all();
    }
}

impl Inner {
    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<DomainId, Arc<Domain>>> {
        self.domains.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn find(&self, id: DomainId) -> Option<Arc<Domain>> {
        self.lock().get(&id).cloned()
    }

    /// Called on the thread of libvirt's event loop.
    fn noticed(&self, notice: Notice) {
        let id = match notice {
            Notice::Lost => {
                self.lost.notify_one();
                return;
            }
            Notice::Domain(id) | Notice::Stopped(id, _) => id,
        };
        if let Some(domain) = self.find(id) {
            if notice == Notice::Stopped(id, true) {
                domain.ended_by_itself.store(true, Ordering::Release);
            }
            domain.look.notify_one();
        }
    }

    fn look_at_all(&self) {
        for domain in self.lock().values() {
            domain.look.notify_one();
        }
    }

    async fn host(&self) -> Result<&Host, Error> {
        self.host
            .get_or_try_init(|| async {
                let version = blocking(version).await?;
                let (memory_bytes, _, cpus) = self.libvirt.host().await?;
                Ok(Host {
                    version,
                    cpus,
                    memory_bytes,
                })
            })
            .await
    }

    async fn probe(&self) -> Result<HostCapabilities, Error> {
        let host = self.host().await?;
        let (_, free_bytes, _) = self.libvirt.host().await?;
        let ours: u64 = self
            .lock()
            .values()
            .filter(|domain| {
                matches!(
                    domain.life.get(),
                    DomainState::Running | DomainState::Paused
                )
            })
            .map(|domain| domain.hardware().memory_bytes)
            .sum();
        Ok(HostCapabilities {
            backend: "xen".to_owned(),
            version: host.version.clone(),
            accelerator: "xen".to_owned(),
            accelerator_note: String::new(),
            cpus: host.cpus,
            memory_bytes: free_bytes + ours,
        })
    }

    async fn create(self: Arc<Self>, spec: DomainSpec) -> Result<(), Error> {
        spec::check(&spec, self.host().await?.memory_bytes)?;
        let dir = RunDir::of(&spec, &self.config.domains_dir)?;
        let boot_id = self.boot_id.clone();
        let config = self.config.clone();
        let existing = self.find(spec.id);
        let name = xml::name(spec.id);
        if self
            .lock()
            .keys()
            .any(|id| *id != spec.id && xml::name(*id) == name)
        {
            return Err(Error::NameTaken { name });
        }
        let (spec, dir, made) = blocking(move || {
            if let Some(existing) = existing {
                dir.check_same(&existing.spec, &spec)?;
                return Ok((spec, dir, None));
            }
            let mode = Mode::of(&spec, &config)?;
            // Whether it can be described at all.
            let sources = files::sources(&spec, &dir);
            xml::render(&spec, mode, &config, Some(&spec.run_dir), &sources)?;
            let record = Record::new(spec.clone(), boot_id);
            dir.make(&record, None, || {
                let mut disks = spec.disks.iter().enumerate();
                disks.try_for_each(|(index, disk)| dir.make_disk_for_xen(index, disk))
            })?;
            Ok((spec, dir, Some(record)))
        })
        .await?;
        if let Some(record) = made {
            let id = spec.id;
            let domain = Domain::new(
                spec,
                dir,
                record,
                DomainState::Created,
                Arc::clone(&self.libvirt),
                Arc::clone(&self.network),
                self.events.clone(),
            );
            self.lock().insert(id, Arc::new(domain));
        }
        Ok(())
    }

    async fn start(self: Arc<Self>, domain: Arc<Domain>) -> Result<(), Error> {
        let _operation = domain.operation.lock().await;
        match domain.life.get() {
            DomainState::Created => {
                let _turn = self.starts.acquire().await;
                domain.start(&self.config, &self.promises).await
            }
            DomainState::Running | DomainState::Paused => Ok(()),
            DomainState::Stopped { .. } => Err(domain.life.wrong("start")),
        }
    }

    async fn save(self: Arc<Self>, domain: Arc<Domain>, file: PathBuf) -> Result<(), Error> {
        let _operation = domain.operation.lock().await;
        domain.save(&file, self.config.command_limit).await
    }

    async fn restore(self: Arc<Self>, domain: Arc<Domain>, file: PathBuf) -> Result<(), Error> {
        let _operation = domain.operation.lock().await;
        let _turn = self.starts.acquire().await;
        domain
            .restore(&file, &self.config, &self.boot_id, &self.promises)
            .await
    }

    async fn destroy(self: Arc<Self>, id: DomainId) -> Result<(), Error> {
        let Some(domain) = self.find(id) else {
            // Left by a creation that was cut off.
            let dir = RunDir::named(&self.config.domains_dir, id);
            return blocking(move || dir.remove()).await;
        };
        let _operation = domain.operation.lock().await;
        domain.kill(self.config.command_limit).await?;
        domain.gone(self.config.command_limit).await?;
        let dir = domain.dir.clone();
        blocking(move || dir.remove()).await?;
        domain.discard();
        self.lock().remove(&id);
        Ok(())
    }
}

/// Xen's version, as it names itself. Fails where this is no control domain.
fn version() -> Result<String, Error> {
    const CAPABILITIES: &str = "/proc/xen/capabilities";
    let control = std::fs::read_to_string(CAPABILITIES)
        .is_ok_and(|text| text.split_whitespace().any(|word| word == "control_d"));
    if !control {
        return Err(Error::HypervisorMissing {
            program: "Xen's control domain".to_owned(),
            remedy: "boot this machine with Xen (Debian: apt-get install xen-system-amd64, then restart) and \
                     run this program in dom0, with xenfs mounted on /proc/xen",
        });
    }
    let part = |name: &str| {
        let path = Path::new("/sys/hypervisor/version").join(name);
        let text = std::fs::read_to_string(&path).map_err(Error::io("read", path))?;
        Ok::<_, Error>(text.trim().to_owned())
    };
    // `extra` begins with a point.
    Ok(format!(
        "{}.{}{}",
        part("major")?,
        part("minor")?,
        part("extra")?
    ))
}

#[async_trait]
impl Hypervisor for XenHypervisor {
    fn transport(&self) -> Transport {
        Transport::Xen {
            path: channel::AGENT_PATH.to_owned(),
            port: AGENT_TCP_PORT,
        }
    }

    async fn probe(&self) -> Result<HostCapabilities, Error> {
        self.inner.probe().await
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
        match domain.life.get() {
            DomainState::Running | DomainState::Paused => {}
            _ => return Err(domain.life.wrong("reach the agent of")),
        }
        tokio::select! {
            biased;
            reason = domain.life.stopped() => Err(Error::Gone { id, reason }),
            stream = domain.agent() => stream,
        }
    }

    async fn console(&self, id: DomainId) -> Result<PathBuf, Error> {
        Ok(self.domain(id)?.dir.console_log())
    }

    async fn pause(&self, id: DomainId) -> Result<(), Error> {
        let domain = self.domain(id)?;
        let _operation = domain.operation.lock().await;
        domain.pause(self.inner.config.command_limit).await
    }

    async fn resume(&self, id: DomainId) -> Result<(), Error> {
        let domain = self.domain(id)?;
        let _operation = domain.operation.lock().await;
        domain.resume(self.inner.config.command_limit).await
    }

    async fn save(&self, id: DomainId, file: &Path) -> Result<(), Error> {
        let (domain, file) = (self.domain(id)?, file.to_owned());
        self.complete(|inner| inner.save(domain, file)).await
    }

    async fn restore(&self, id: DomainId, file: &Path) -> Result<(), Error> {
        let (domain, file) = (self.domain(id)?, file.to_owned());
        self.complete(|inner| inner.restore(domain, file)).await
    }

    async fn attach_disk(&self, id: DomainId, disk: &Disk) -> Result<usize, Error> {
        let (domain, disk) = (self.domain(id)?, disk.clone());
        self.complete(|inner| async move {
            let _operation = domain.operation.lock().await;
            domain.attach_disk(disk, inner.config.command_limit).await
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
            domain
                .attach_interface(interface, &inner.config.bridge)
                .await
        })
        .await
    }

    async fn detach_interface(&self, id: DomainId, mac: [u8; 6]) -> Result<(), Error> {
        let domain = self.domain(id)?;
        self.complete(|inner| async move {
            let _operation = domain.operation.lock().await;
            domain.detach_interface(mac, &inner.config.bridge).await
        })
        .await
    }

    async fn set_memory(&self, id: DomainId, bytes: u64) -> Result<(), Error> {
        let domain = self.domain(id)?;
        self.complete(|inner| async move {
            let _operation = domain.operation.lock().await;
            domain.set_memory(bytes, &inner.promises).await
        })
        .await
    }

    async fn set_vcpus(&self, id: DomainId, vcpus: u32) -> Result<(), Error> {
        let domain = self.domain(id)?;
        self.complete(|_| async move {
            let _operation = domain.operation.lock().await;
            domain.set_vcpus(vcpus).await
        })
        .await
    }

    async fn shutdown(&self, id: DomainId, grace: Duration) -> Result<ShutdownOutcome, Error> {
        // Without `operation`: `destroy` must not wait for the grace to pass.
        self.domain(id)?
            .shutdown(grace, self.inner.config.command_limit)
            .await
    }

    async fn destroy(&self, id: DomainId) -> Result<(), Error> {
        self.complete(|inner| inner.destroy(id)).await
    }

    async fn list(&self) -> Result<Vec<DomainInfo>, Error> {
        let mut list: Vec<_> = self
            .inner
            .lock()
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
        self.domain(id)?.stats().await
    }

    fn describe(&self, spec: &DomainSpec, form: DescriptionForm) -> Result<Description, Error> {
        let (boot_file, disks, prepare) = match self.inner.find(spec.id) {
            Some(domain) => (
                domain.dir.boot_file(),
                files::sources(&domain.spec, &domain.dir),
                Vec::new(),
            ),
            None => {
                let disks = files::sources_to_be(spec);
                let prepare = files::commands(spec, &disks)?;
                (spec.initramfs.clone(), disks, prepare)
            }
        };
        let render = match form {
            DescriptionForm::Xl => xl::render,
            DescriptionForm::Libvirt => xml::render,
        };
        let config = &self.inner.config;
        let mode = Mode::of(spec, config)?;
        let text = render(spec, mode, config, boot_file.as_deref(), &disks)?;
        Ok(Description { text, prepare })
    }

    fn events(&self) -> broadcast::Receiver<DomainEvent> {
        self.inner.events.subscribe()
    }
}
