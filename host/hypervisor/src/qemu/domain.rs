//! One domain: its process, what watches it, and the operations on it.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use tokio::sync::broadcast;
use tokio::task::AbortHandle;
use tokio::time::Instant;
use xbee_cage::{Identity, Plan, cgroup};
use xbee_vswitch::switch::DomainSpec as Port;

use super::Net;
use super::agent_port::AgentPort;
use super::card::Side;
use super::command::{self, Descriptors, DiskDescriptors};
use super::config::QemuConfig;
use super::files::{CONSOLE_IN, CONSOLE_OUT, caged};
use super::host::{Host, KVM_DEVICE};
use super::process::{self, Exit, Launch, Process};
use super::qmp::{GuestStatus, Qmp};
use super::supervisor::{Logs, Supervisor};
use crate::domain::{
    DomainEvent, DomainSpec, DomainState, DomainStats, ShutdownOutcome, StopReason,
};
use crate::error::{Error, chain};
use crate::kept::Kept;
use crate::lifecycle::Lifecycle;
use crate::rundir::{Record, RunDir};
use crate::{image, log, work};

/// How much of what QEMU printed an error quotes, in bytes.
const ERROR_QUOTE_BYTES: u64 = 1024;

/// Threads of a QEMU process beyond its virtual CPUs: main loop, RCU, and up to 64 for disk I/O.
const THREADS_EXTRA: u64 = 80;

/// Memory of a QEMU process beyond its guest's, in bytes: the translation cache of 128 MiB, disks' caches, and what
/// is read and written for the guest.
const MEMORY_EXTRA_BYTES: u64 = 512 << 20;

/// Address space of a thread in bytes, where memory can be limited only by that: stack and allocator
/// (glibc, `HEAP_MAX_SIZE` reserved twice).
const ADDRESSES_PER_THREAD_BYTES: u64 = 144 << 20;

/// A guest that is still booting misses the power button, so it is pressed again.
const POWER_BUTTON_INTERVAL: Duration = Duration::from_secs(2);

/// A domain. Operations on its life cycle are serialised by `operation`; the state changes under
/// the operations and by what `supervise` sees.
#[derive(Debug)]
pub(crate) struct Domain {
    pub(crate) spec: DomainSpec,
    pub(crate) dir: RunDir,
    pub(crate) operation: tokio::sync::Mutex<()>,
    pub(crate) life: Lifecycle,
    pub(super) kept: Arc<Kept>,
    running: Mutex<Option<Running>>,
    /// Its end is our doing.
    pub(crate) killed: AtomicBool,
    pub(crate) agent: AgentPort,
}

#[derive(Debug)]
struct Running {
    process: Arc<Process>,
    qmp: Qmp,
    supervisor: AbortHandle,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.supervisor.abort();
    }
}

impl Domain {
    pub(crate) fn new(
        spec: DomainSpec,
        dir: RunDir,
        record: Record,
        state: DomainState,
        events: broadcast::Sender<DomainEvent>,
    ) -> Result<Self, Error> {
        let socket = dir.agent_socket();
        let life = Lifecycle::new(spec.id, state, events);
        let agent = AgentPort::listen(&socket).map_err(Error::io("listen on", socket))?;
        Ok(Self {
            spec,
            kept: Kept::new(dir.clone(), record),
            dir,
            operation: tokio::sync::Mutex::new(()),
            life,
            running: Mutex::new(None),
            killed: AtomicBool::new(false),
            agent,
        })
    }

    /// Starts QEMU and waits until it answers. The caller holds `operation`. A domain that did not
    /// start has ended: half a start may have left traces.
    pub(crate) async fn start(self: &Arc<Self>, host: &Host, net: Net<'_>) -> Result<(), Error> {
        let started = self.try_start(host, net).await;
        if let Err(error) = &started {
            self.fail(format!("it did not start: {}", chain(error)))?;
        }
        started
    }

    async fn try_start(self: &Arc<Self>, host: &Host, net: Net<'_>) -> Result<(), Error> {
        let Net { config, switch, .. } = net;
        let port = Port {
            cid: self.spec.cid,
            vhost_socket: self.dir.vhost_socket(),
            uds: self.dir.vsock(),
            owner: self.spec.owner.clone(),
            // QEMU is handed the connection.
            uid: None,
        };
        switch.add(self.spec.id, port, &host.cage).await?;
        let card = match &self.spec.interface {
            Some(interface) => Some(self.connect_card(interface, net).await?),
            None => None,
        };
        let (process, logs) = {
            let (domain, host, config) = (Arc::clone(self), host.clone(), config.clone());
            // Opens files and forks.
            work::blocking(move || domain.launch(&host, &config, card)).await?
        };
        tracing::info!(domain = %self.spec.id, pid = process.pid(), "QEMU started");
        self.attend(Arc::new(process), logs, config).await?;
        if let Err(error) = self.agree().await {
            // It may have ended already.
            tracing::warn!(domain = %self.spec.id, error = chain(&error), "more memory than asked for");
        }
        Ok(())
    }

    pub(crate) fn cannot(&self, operation: &'static str, reason: &'static str) -> Error {
        Error::Unsupported {
            id: self.spec.id,
            operation,
            reason,
        }
    }

    fn fail(&self, detail: String) -> Result<(), Error> {
        let reason = StopReason::Failed { detail };
        self.dir.set_stop_reason(&reason)?;
        self.life.set(DomainState::Stopped { reason });
        Ok(())
    }

    /// Lets go of the process without ending it: it is gone, or somebody else takes it up.
    pub(crate) fn discard(&self) {
        *self.running.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Takes up a process that runs already.
    pub(crate) async fn attend(
        self: &Arc<Self>,
        process: Arc<Process>,
        mut logs: Logs,
        config: &QemuConfig,
    ) -> Result<(), Error> {
        let socket = self.dir.qmp_socket();
        let connected = tokio::select! {
            connected = Qmp::connect(&socket, config.start_limit, config.command_limit) => connected,
            exit = process.exited() => {
                let exit = exit.unwrap_or(Exit::Unknown);
                logs.drain();
                return Err(self.start_failed(self.explain(exit)));
            }
        };
        let (qmp, status) = match connected {
            Ok(connected) => connected,
            Err(error) => {
                // Its end is waited for below only so long.
                let killed = process.kill();
                let ended = tokio::time::timeout(config.command_limit, process.exited()).await;
                logs.drain();
                let mut detail = chain(&error);
                if killed.is_err() || ended.is_err() {
                    detail += &format!("; process {} cannot be killed", process.pid());
                } else if let Ok(Ok(exit)) = ended {
                    detail = format!("{detail}; {}", self.explain(exit));
                }
                return Err(self.start_failed(detail));
            }
        };
        let state = match *status.borrow() {
            GuestStatus::Paused => DomainState::Paused,
            // An end is left to the supervisor.
            _ => DomainState::Running,
        };
        let supervisor = Supervisor {
            domain: Arc::clone(self),
            process: Arc::clone(&process),
            qmp: qmp.clone(),
            status,
            logs,
            command_limit: config.command_limit,
        };
        // `Running` must be in place before the supervisor can see an end.
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        self.life.set(state);
        *running = Some(Running {
            process,
            qmp,
            supervisor: tokio::spawn(supervisor.run()).abort_handle(),
        });
        Ok(())
    }

    /// Blocking part of the start.
    fn launch(
        &self,
        host: &Host,
        config: &QemuConfig,
        card: Option<(Side, OwnedFd)>,
    ) -> Result<(Process, Logs), Error> {
        let logs = Logs::open(&self.dir, config)?;
        let identity = identity(&self.spec, config).map(|id| Identity {
            uid: id,
            gid: id,
            groups: host.kvm.and_then(|kvm| kvm.gid).into_iter().collect(),
        });
        let kernel = match &self.spec.kernel {
            Some(path) => Some(self.open_kernel(path, identity.as_ref())?),
            None => None,
        };
        let disks = self
            .spec
            .disks
            .iter()
            .enumerate()
            .map(|(index, disk)| self.dir.open_disk_for_qemu(index, disk))
            .collect::<Result<Vec<_>, _>>()?;
        let socket = self.dir.qmp_socket();
        let listener = UnixListener::bind(&socket).map_err(Error::io("listen on", socket))?;
        let socket = self.dir.vhost_socket();
        let vhost = UnixStream::connect(&socket).map_err(Error::io("connect to", socket))?;
        let path = self.dir.as_path();
        let directory = rustix::fs::open(
            path,
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .map_err(|error| Error::io("open", path)(error.into()))?;
        let path = self.dir.error_pipe();
        let stderr = rustix::fs::open(
            &path,
            OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .map_err(|error| Error::io("open", path)(error.into()))?;
        let stat_file = self.dir.create_stat()?;
        let fds = Descriptors {
            qmp_listener: listener.as_raw_fd(),
            vhost: vhost.as_raw_fd(),
            kernel: kernel.as_ref().map(AsRawFd::as_raw_fd),
            disks: disks
                .iter()
                .map(|disk| DiskDescriptors {
                    base: disk.base.as_raw_fd(),
                    overlay: disk.overlay.as_ref().map(AsRawFd::as_raw_fd),
                })
                .collect(),
            card: card.as_ref().map(|(side, fd)| (*side, fd.as_raw_fd())),
        };
        let has_boot_file = self.dir.boot_file().is_some();
        let args = command::args(&self.spec, host, &fds, has_boot_file)?;
        let plan = self.cage(host, identity, fds.kernel)?;
        let of_disks = fds
            .disks
            .iter()
            .flat_map(|disk| [Some(disk.base), disk.overlay]);
        let process = process::launch(Launch {
            program: &host.program,
            args,
            directory: &directory,
            stat_file: &stat_file,
            stderr,
            inherit: [fds.qmp_listener, fds.vhost]
                .into_iter()
                .chain(fds.kernel)
                .chain(of_disks.flatten())
                .chain(fds.card.map(|(_, fd)| fd))
                .collect(),
            cage: &host.cage,
            plan,
        })
        .map_err(Error::io("start", &host.program))?;
        Ok((process, logs))
    }

    /// What QEMU is left with; makes its control groups.
    fn cage(
        &self,
        host: &Host,
        identity: Option<Identity>,
        kernel: Option<i32>,
    ) -> Result<Plan, Error> {
        let threads_max = u64::from(self.spec.vcpus_limit()) + THREADS_EXTRA;
        let memory_bytes = self.spec.memory_limit_bytes() + MEMORY_EXTRA_BYTES;
        let place = &host.cage.report.cgroups;
        let name = format!("xbee-{}", self.spec.id);
        let group = place.group(&name);
        self.dir.note_cgroups(&group)?;
        let limits = cgroup::Limits {
            memory_bytes,
            pids: threads_max,
            // Beside its processors, the main loop and disk I/O take time.
            cpus: u64::from(self.spec.vcpus_limit()) + 1,
        };
        place.make(&name, limits).map_err(caged)?;
        let address_space = memory_bytes + threads_max * ADDRESSES_PER_THREAD_BYTES;
        Ok(Plan {
            // Counted by user, so only for one that has no other processes.
            threads_max: identity.is_some().then_some(threads_max),
            identity,
            read: self.dir.readable_for_qemu(),
            write: vec![CONSOLE_IN.to_owned(), CONSOLE_OUT.to_owned()],
            reopen: kernel.into_iter().collect(),
            devices: host.kvm.map(|_| KVM_DEVICE.into()).into_iter().collect(),
            cgroups: group,
            address_space_max_bytes: (!place.limits_memory()).then_some(address_space),
            ..Plan::default()
        })
    }

    /// Opens the kernel, or a copy of it if the domain's process may not read it.
    fn open_kernel(&self, path: &Path, identity: Option<&Identity>) -> Result<File, Error> {
        let kernel = image::open_kernel(path)?;
        let meta = kernel.metadata().map_err(Error::io("look at", path))?;
        match identity {
            Some(identity) if meta.mode() & 0o004 == 0 => {
                self.dir.copy_kernel(kernel, identity.uid)
            }
            _ => Ok(kernel),
        }
    }

    fn start_failed(&self, detail: String) -> Error {
        Error::StartFailed {
            id: self.spec.id,
            detail,
        }
    }

    /// A process's unexpected end in words, with what it said last.
    pub(crate) fn explain(&self, exit: Exit) -> String {
        let said = log::tail(&self.dir.error_log(), ERROR_QUOTE_BYTES).unwrap_or_default();
        // A crash is told even if what the limits were is not known any more.
        let group = self.dir.cgroups().unwrap_or_default();
        if cgroup::out_of_memory(&group) > 0 {
            let most_mib = (self.spec.memory_limit_bytes() + MEMORY_EXTRA_BYTES) >> 20;
            return format!("QEMU ended ({exit}): it used up its memory, {most_mib} MiB");
        }
        match said.trim() {
            "" => format!("QEMU ended ({exit})"),
            said => format!("QEMU ended ({exit}): {said}"),
        }
    }

    /// The connection to its QEMU, if it has one.
    pub(super) fn qmp(&self) -> Option<Qmp> {
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        running.as_ref().map(|running| running.qmp.clone())
    }

    pub(crate) async fn command(
        &self,
        operation: &'static str,
        command: &'static str,
    ) -> Result<(), Error> {
        let Some(qmp) = self.qmp() else {
            return Err(self.life.wrong(operation));
        };
        match qmp.execute(command).await {
            Ok(_) => Ok(()),
            // It ended just now: that says more than a closed connection.
            Err(_) if matches!(self.life.get(), DomainState::Stopped { .. }) => {
                Err(self.life.wrong(operation))
            }
            Err(error) => Err(Error::Control {
                id: self.spec.id,
                operation,
                source: Box::new(error),
            }),
        }
    }

    pub(crate) async fn pause(&self) -> Result<(), Error> {
        match self.life.get() {
            DomainState::Paused => Ok(()),
            DomainState::Running => {
                self.command("pause", "stop").await?;
                self.life.set(DomainState::Paused);
                Ok(())
            }
            _ => Err(self.life.wrong("pause")),
        }
    }

    pub(crate) async fn resume(&self) -> Result<(), Error> {
        match self.life.get() {
            DomainState::Running => Ok(()),
            DomainState::Paused => {
                self.command("resume", "cont").await?;
                self.life.set(DomainState::Running);
                Ok(())
            }
            _ => Err(self.life.wrong("resume")),
        }
    }

    pub(crate) async fn shutdown(
        &self,
        grace: Duration,
        command_limit: Duration,
    ) -> Result<ShutdownOutcome, Error> {
        let deadline = Instant::now() + grace;
        loop {
            match self.life.get() {
                DomainState::Created => return Err(self.life.wrong("shut down")),
                DomainState::Stopped { reason } => return Ok(reason.shutdown_outcome()),
                // A halted guest sees no button.
                DomainState::Paused => self.resume().await?,
                DomainState::Running => {}
            }
            if Instant::now() >= deadline {
                break;
            }
            if let Err(error) = self
                .command("press the power button", "system_powerdown")
                .await
            {
                // It may have ended meanwhile; and what cannot be asked can still be forced.
                tracing::warn!(domain = %self.spec.id, %error, "no power button");
            }
            let next = deadline.min(Instant::now() + POWER_BUTTON_INTERVAL);
            if let Ok(reason) = tokio::time::timeout_at(next, self.life.stopped()).await {
                return Ok(reason.shutdown_outcome());
            }
        }
        self.kill(command_limit).await?;
        Ok(ShutdownOutcome::Forced)
    }

    /// Ends the process, whatever it does, and waits until it is gone.
    pub(crate) async fn kill(&self, limit: Duration) -> Result<(), Error> {
        let process = {
            let running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
            running.as_ref().map(|running| Arc::clone(&running.process))
        };
        let Some(process) = process else {
            return Ok(());
        };
        self.killed.store(true, Ordering::Release);
        let unkillable = |source: Box<dyn std::error::Error + Send + Sync>| Error::Control {
            id: self.spec.id,
            operation: "end",
            source,
        };
        process.kill().map_err(|error| unkillable(error.into()))?;
        tokio::time::timeout(limit, self.life.stopped())
            .await
            .map_err(|_| {
                unkillable(format!("process {} is still there after SIGKILL", process.pid()).into())
            })?;
        Ok(())
    }

    pub(crate) fn stats(&self) -> Result<DomainStats, Error> {
        let process = {
            let running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
            running.as_ref().map(|running| Arc::clone(&running.process))
        };
        let usage = match process {
            Some(process) => process.usage().map_err(Error::io(
                "read",
                PathBuf::from(format!("/proc/{}/stat", process.pid())),
            ))?,
            None => None,
        };
        match usage {
            Some((cpu_ms, memory_bytes)) => Ok(DomainStats {
                cpu_ms,
                memory_bytes,
            }),
            None => match self.life.get() {
                DomainState::Created => Ok(DomainStats::default()),
                _ => Err(self.life.wrong("measure")),
            },
        }
    }
}

/// User and group of a domain's process; `None`: as this one.
pub(crate) fn identity(spec: &DomainSpec, config: &QemuConfig) -> Option<u32> {
    rustix::process::geteuid()
        .is_root()
        .then(|| config.uid_base.saturating_add(spec.cid))
}

/// Finds out what became of a domain that was made before this process began.
pub(crate) async fn adopt(
    dir: RunDir,
    record: Record,
    boot_id: &str,
    config: &QemuConfig,
    events: broadcast::Sender<DomainEvent>,
) -> Result<Arc<Domain>, Error> {
    let stat = dir.process_stat()?;
    let process = if record.boot_id == boot_id {
        Process::adopt(&stat).map_err(Error::io("look for the process of", dir.as_path()))?
    } else {
        None
    };
    let state = match (dir.stop_reason()?, &process) {
        (_, Some(_)) => DomainState::Running,
        (Some(reason), None) => DomainState::Stopped { reason },
        (None, None) if stat.is_empty() => DomainState::Created,
        (None, None) => {
            let detail = if record.boot_id == boot_id {
                "QEMU ended while the host manager was not running"
            } else {
                "the host was restarted"
            };
            DomainState::Stopped {
                reason: StopReason::Failed {
                    detail: detail.to_owned(),
                },
            }
        }
    };
    let domain = Arc::new(Domain::new(
        record.spec.clone(),
        dir,
        record,
        state,
        events,
    )?);
    if let Some(process) = process {
        let logs = Logs::open(&domain.dir, config)?;
        if let Err(error) = domain.attend(Arc::new(process), logs, config).await {
            domain.fail(format!("it could not be taken up again: {}", chain(&error)))?;
        } else if domain.kept.get(|record| record.hardware.is_some())
            && let Err(error) = domain.agree().await
        {
            tracing::warn!(domain = %domain.spec.id, error = chain(&error), "not as it was to be");
        }
    }
    Ok(domain)
}
