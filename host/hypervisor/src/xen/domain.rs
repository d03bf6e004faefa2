//! One domain: what watches it, and the operations on it.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, broadcast, watch};
use tokio::task::AbortHandle;
use tokio::time::Instant;

use super::channel::{self, Streams};
use super::config::XenConfig;
use super::files;
use super::libvirt::{Libvirt, Seen};
use super::memory::{self, Promises};
use super::port;
use super::xml::{self, Mode};
use crate::bridge::Network;
use crate::domain::{
    AgentStream, DomainEvent, DomainSpec, DomainState, DomainStats, ShutdownOutcome, StopReason,
};
use crate::error::{Error, chain};
use crate::kept::{Kept, Transfer};
use crate::lifecycle::Lifecycle;
use crate::pipe_log::PipeLog;
use crate::rundir::{Record, RunDir};
use crate::save_file;
use crate::work::blocking;

/// A guest that is still booting does not hear that it shall switch off, so it is told again.
const SHUTDOWN_INTERVAL: Duration = Duration::from_secs(2);

/// The console's last words come within this time of the guest's end, through a daemon.
const LAST_WORDS: Duration = Duration::from_millis(200);

/// What could not be done about an ended domain is tried again after so long.
const RETRY_PAUSE: Duration = Duration::from_secs(5);

/// A domain. Operations on its life cycle are serialised by `operation`; the state of a started
/// one is set by what `supervise` sees and by nothing else.
#[derive(Debug)]
pub(crate) struct Domain {
    pub(crate) spec: DomainSpec,
    pub(crate) dir: RunDir,
    pub(crate) operation: tokio::sync::Mutex<()>,
    pub(crate) life: Lifecycle,
    pub(super) kept: Arc<Kept>,
    pub(super) libvirt: Arc<Libvirt>,
    pub(super) network: Arc<Network>,
    /// Something happened to it.
    pub(crate) look: Notify,
    /// libvirt said that its guest ended by itself.
    pub(crate) ended_by_itself: AtomicBool,
    /// Its end is our doing.
    killed: AtomicBool,
    /// It is being saved: what it does meanwhile is no change of its state.
    pub(super) saving: watch::Sender<bool>,
    pub(super) streams: watch::Sender<Streams>,
    pub(super) streams_opened: AtomicU32,
    /// Nothing is left of it but its directory. It has been told to have ended before.
    gone: watch::Sender<bool>,
    supervisor: Mutex<Option<AbortHandle>>,
}

impl Domain {
    pub(crate) fn new(
        spec: DomainSpec,
        dir: RunDir,
        record: Record,
        state: DomainState,
        libvirt: Arc<Libvirt>,
        network: Arc<Network>,
        events: broadcast::Sender<DomainEvent>,
    ) -> Self {
        Self {
            life: Lifecycle::new(spec.id, state, events),
            spec,
            kept: Kept::new(dir.clone(), record),
            dir,
            operation: tokio::sync::Mutex::new(()),
            libvirt,
            network,
            look: Notify::new(),
            ended_by_itself: AtomicBool::new(false),
            killed: AtomicBool::new(false),
            saving: watch::Sender::new(false),
            streams: watch::Sender::new(Streams::Open(0)),
            streams_opened: AtomicU32::new(0),
            // One that has not been started has nothing to leave.
            gone: watch::Sender::new(true),
            supervisor: Mutex::default(),
        }
    }

    /// Makes the domain and waits until it executes. The caller holds `operation`. A domain that did
    /// not start has ended: half a start may have left traces. One for which there is no room now
    /// has not been touched.
    pub(crate) async fn start(
        self: &Arc<Self>,
        config: &XenConfig,
        promises: &Arc<Promises>,
    ) -> Result<(), Error> {
        self.network.check(self.spec.interface.as_ref()).await?;
        let name = xml::name(self.spec.id);
        if super::release::names().await?.contains(&name) {
            return Err(Error::NameTaken { name });
        }
        let _promise = promises.promise(self.needed_bytes(), &self.libvirt).await?;
        let boot_file = self.dir.boot_file();
        let xml = xml::render_to_start(
            &self.spec,
            Mode::of(&self.spec, config)?,
            config,
            boot_file.as_deref(),
            &files::sources(&self.spec, &self.dir),
        )?;
        self.dir.mark_started(&xml)?;
        let started = self.set_going(xml).await;
        if let Err(error) = started {
            let detail = match self.libvirt.destroy(self.spec.id).await {
                Ok(_) => chain(&error),
                Err(again) => format!("{}; {}", chain(&error), chain(&again)),
            };
            self.leave_network().await;
            self.fail(format!("it did not start: {detail}"))?;
            return Err(Error::StartFailed {
                id: self.spec.id,
                detail,
            });
        }
        self.attend(config);
        self.life.left(&DomainState::Created).await;
        // Long before its kernel looks.
        self.limit_vcpus().await;
        Ok(())
    }

    /// Until its port is known to the firewall and on the bridge, the guest has no network.
    async fn set_going(&self, xml: String) -> Result<(), Error> {
        self.libvirt.create(xml).await?;
        self.join_network().await
    }

    /// Lets its interfaces send as who they are, and to whom they may.
    pub(super) async fn join_network(&self) -> Result<(), Error> {
        // One without an interface changes nothing; one that has ended is seen in its turn.
        if self.note_network().await? {
            self.network.apply(Some(self.spec.id)).await?;
        }
        Ok(())
    }

    /// Finds its interfaces' places on the bridge; whether it may have any.
    async fn note_network(&self) -> Result<bool, Error> {
        let interfaces = self.kept.hardware().interfaces;
        if interfaces.is_empty() && self.spec.interface.is_none() {
            return Ok(false);
        }
        let Some(domid) = self.libvirt.domid(self.spec.id).await? else {
            return Ok(false);
        };
        let named = blocking(move || {
            let mut store = channel::store()?;
            let broken = |error| channel::broken(&error);
            let path = format!("/local/domain/0/backend/vif/{domid}");
            let mut named = Vec::new();
            for name in store.list(&path).map_err(broken)?.unwrap_or_default() {
                let mac = store.read(&format!("{path}/{name}/mac")).map_err(broken)?;
                let interface = (interfaces.iter()).find(|interface| {
                    Some(xml::mac(interface)) == mac.as_ref().map(|mac| mac.to_lowercase())
                });
                if let (Ok(number), Some(interface)) = (name.parse(), interface) {
                    named.push((port::name(domid, number), *interface));
                }
            }
            Ok(named)
        })
        .await?;
        self.network.note(&self.spec, named);
        Ok(true)
    }

    /// What it takes of the machine's memory.
    pub(super) fn needed_bytes(&self) -> u64 {
        memory::needed_bytes(
            self.kept.hardware().memory_bytes,
            self.spec.memory_limit_bytes(),
            self.spec.vcpus_limit(),
        )
    }

    async fn leave_network(&self) {
        if let Err(error) = self.network.leave(self.spec.id).await {
            // The next change tries again, and the port is not there any more.
            tracing::warn!(domain = %self.spec.id, error = chain(&error), "still in the firewall");
        }
    }

    /// Waits for something to happen to it, and not for ever.
    async fn look_again(&self) {
        // Whichever comes first.
        let _ = tokio::time::timeout(RETRY_PAUSE, self.look.notified()).await;
    }

    fn fail(&self, detail: String) -> Result<(), Error> {
        let reason = StopReason::Failed { detail };
        self.dir.set_stop_reason(&reason)?;
        self.life.set(DomainState::Stopped { reason });
        Ok(())
    }

    /// Whether something may be there to be completed or undone.
    pub(super) fn is_unsettled(&self) -> bool {
        match self.kept.transfer() {
            Transfer::None => {
                self.kept.get(|record| record.hardware.is_some())
                    && !matches!(self.life.get(), DomainState::Stopped { .. })
            }
            Transfer::Saved { .. } => false,
            Transfer::Saving { .. } | Transfer::Restoring { .. } | Transfer::Restored { .. } => {
                true
            }
        }
    }

    /// Watches a domain that has been started until it ends.
    pub(super) fn attend(self: &Arc<Self>, config: &XenConfig) {
        self.gone.send_replace(false);
        let task = tokio::spawn(supervise(Arc::clone(self), config.console_max_bytes));
        *self
            .supervisor
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Some(task.abort_handle());
    }

    /// Lets go of the domain without ending it: it is gone, or somebody else takes it up.
    pub(crate) fn discard(&self) {
        let supervisor = self
            .supervisor
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(supervisor) = supervisor {
            supervisor.abort();
        }
    }

    /// Waits for the agent. Cancel-safe.
    pub(crate) async fn agent(&self) -> Result<Box<dyn AgentStream>, Error> {
        let control = |source| Error::Control {
            id: self.spec.id,
            operation: "reach its agent",
            source,
        };
        let mut streams = self.streams.subscribe();
        let interfaces = self.hardware().interfaces;
        let address = interfaces.first().map(|interface| interface.address);
        loop {
            // Not while it is saved. The sender lives as long as `self`.
            let open = streams
                .wait_for(|streams| matches!(streams, Streams::Open(_)))
                .await
                .map_or(Streams::Ended, |streams| *streams);
            let Some(domid) = self.libvirt.domid(self.spec.id).await? else {
                // It ends, and why is about to be known.
                let reason = self.life.stopped().await;
                return Err(Error::Gone {
                    id: self.spec.id,
                    reason,
                });
            };
            tokio::select! {
                _ = streams.wait_for(|streams| *streams != open) => {}
                stream = super::channel::connect(domid, address, open, self.streams.subscribe()) => {
                    return stream.map_err(|error| control(error.into()));
                }
            }
        }
    }

    /// Waits until it is not being saved, up to `deadline`.
    async fn not_saving(&self, deadline: Instant) {
        let mut saving = self.saving.subscribe();
        // Past the deadline the caller does what it wants to.
        let _ = tokio::time::timeout_at(deadline, saving.wait_for(|saving| !saving)).await;
    }

    pub(crate) async fn pause(&self, limit: Duration) -> Result<(), Error> {
        match self.life.get() {
            DomainState::Paused => Ok(()),
            DomainState::Running => {
                let asked = self.libvirt.pause(self.spec.id).await;
                self.changed("pause", asked, &DomainState::Running, limit)
                    .await
            }
            _ => Err(self.life.wrong("pause")),
        }
    }

    pub(crate) async fn resume(&self, limit: Duration) -> Result<(), Error> {
        match self.life.get() {
            DomainState::Running => Ok(()),
            DomainState::Paused => {
                let asked = self.libvirt.resume(self.spec.id).await;
                self.changed("resume", asked, &DomainState::Paused, limit)
                    .await
            }
            _ => Err(self.life.wrong("resume")),
        }
    }

    /// Waits until what was asked of libvirt has been seen.
    async fn changed(
        &self,
        operation: &'static str,
        asked: Result<(), Error>,
        before: &DomainState,
        limit: Duration,
    ) -> Result<(), Error> {
        let control = |source| Error::Control {
            id: self.spec.id,
            operation,
            source,
        };
        asked.map_err(|error| control(error.into()))?;
        self.look.notify_one();
        tokio::time::timeout(limit, self.life.left(before))
            .await
            .map_err(|elapsed| control(elapsed.into()))?;
        match self.life.get() {
            DomainState::Stopped { .. } => Err(self.life.wrong(operation)),
            _ => Ok(()),
        }
    }

    pub(crate) async fn shutdown(
        &self,
        grace: Duration,
        limit: Duration,
    ) -> Result<ShutdownOutcome, Error> {
        let deadline = Instant::now() + grace;
        let acpi = self.spec.kernel.is_none();
        self.not_saving(deadline).await;
        loop {
            match self.life.get() {
                DomainState::Created => return Err(self.life.wrong("shut down")),
                DomainState::Stopped { reason } => return Ok(reason.shutdown_outcome()),
                // A halted guest hears nothing.
                DomainState::Paused => self.resume(limit).await?,
                DomainState::Running => {}
            }
            if Instant::now() >= deadline {
                break;
            }
            if let Err(error) = self.libvirt.shut_down(self.spec.id, acpi).await {
                // Too early in its boot, or it has ended; and what cannot be asked can be forced.
                tracing::debug!(domain = %self.spec.id, %error, "asked to shut down");
            }
            let next = deadline.min(Instant::now() + SHUTDOWN_INTERVAL);
            if let Ok(reason) = tokio::time::timeout_at(next, self.life.stopped()).await {
                return Ok(reason.shutdown_outcome());
            }
            // Its guest has ended, and what is left of it is being removed.
            if *self.streams.borrow() == Streams::Ended
                && let Ok(reason) = tokio::time::timeout(limit, self.life.stopped()).await
            {
                return Ok(reason.shutdown_outcome());
            }
        }
        self.kill(limit).await?;
        match self.life.get() {
            DomainState::Stopped { reason } => Ok(reason.shutdown_outcome()),
            _ => Ok(ShutdownOutcome::Forced),
        }
    }

    /// Ends the domain, whatever it does, and waits until it is gone.
    pub(crate) async fn kill(&self, limit: Duration) -> Result<(), Error> {
        match self.life.get() {
            DomainState::Created | DomainState::Stopped { .. } => return Ok(()),
            DomainState::Running | DomainState::Paused => {}
        }
        let control = |source| Error::Control {
            id: self.spec.id,
            operation: "end",
            source,
        };
        self.killed.store(true, Ordering::Release);
        self.streams.send_replace(Streams::Ended);
        self.libvirt
            .destroy(self.spec.id)
            .await
            .map_err(|error| control(error.into()))?;
        self.look.notify_one();
        tokio::time::timeout(limit, self.life.stopped())
            .await
            .map_err(|elapsed| control(elapsed.into()))?;
        Ok(())
    }

    /// Waits until nothing is left of an ended domain.
    pub(crate) async fn gone(&self, limit: Duration) -> Result<(), Error> {
        let mut gone = self.gone.subscribe();
        // The sender lives as long as `self`.
        match tokio::time::timeout(limit, gone.wait_for(|gone| *gone)).await {
            Ok(_) => Ok(()),
            Err(elapsed) => Err(Error::Control {
                id: self.spec.id,
                operation: "remove what is left of it",
                source: elapsed.into(),
            }),
        }
    }

    pub(crate) async fn stats(&self) -> Result<DomainStats, Error> {
        match self.life.get() {
            DomainState::Created => return Ok(DomainStats::default()),
            DomainState::Stopped { .. } => return Err(self.life.wrong("measure")),
            DomainState::Running | DomainState::Paused => {}
        }
        match self.libvirt.stats(self.spec.id).await {
            // It ended just now: that says more.
            Err(_) if matches!(self.life.get(), DomainState::Stopped { .. }) => {
                Err(self.life.wrong("measure"))
            }
            result => result,
        }
    }

    /// The terminal is there as long as the domain is; a console that cannot be read is no reason to end it.
    async fn console(&self, max_bytes: u64) -> Option<PipeLog> {
        let log = self.dir.console_log();
        let opened = match self.libvirt.console(self.spec.id).await {
            Ok(Some(terminal)) => PipeLog::open_terminal(Path::new(&terminal), &log, max_bytes)
                .map_err(Error::io("read from", terminal)),
            Ok(None) => return None,
            Err(error) => Err(error),
        };
        opened
            .inspect_err(|error| {
                tracing::warn!(domain = %self.spec.id, error = chain(error), "no console");
            })
            .ok()
    }

    /// Why it ended, and what became of a save that was under way.
    async fn outcome(&self, seen: Seen) -> Result<StopReason, Error> {
        if let Transfer::Saved { file, .. } = self.kept.transfer() {
            // What the attempt before this one came to.
            blocking(move || save_file::publish(&file)).await?;
            return Ok(StopReason::Saved);
        }
        if let Transfer::Saving { file, paused } = self.kept.transfer() {
            if seen == Seen::Gone && !self.killed.load(Ordering::Acquire) {
                return self.saved(file, paused).await;
            }
            let partial = save_file::partial(&file);
            blocking(move || save_file::forget(&partial)).await?;
            self.kept.set_transfer(Transfer::None).await?;
        }
        Ok(self.reason(seen))
    }

    fn reason(&self, seen: Seen) -> StopReason {
        let by_itself = self.ended_by_itself.load(Ordering::Acquire);
        if self.killed.load(Ordering::Acquire) {
            return StopReason::Destroyed;
        }
        match seen {
            Seen::Crashed => StopReason::GuestPanic,
            Seen::Off => StopReason::GuestShutdown,
            Seen::Reset => StopReason::GuestReset,
            // It ended in an orderly way and was not preserved.
            _ if by_itself => StopReason::GuestReset,
            _ => StopReason::Failed {
                detail: "it was destroyed, and not by the host manager".to_owned(),
            },
        }
    }
}

/// Watches a domain from its start to its end.
async fn supervise(domain: Arc<Domain>, console_max_bytes: u64) {
    let mut console = None;
    let mut console_opened = false;
    let seen = loop {
        let seen = domain.libvirt.see(domain.spec.id).await;
        if *domain.saving.borrow() {
            let mut saving = domain.saving.subscribe();
            loop {
                tokio::select! {
                    _ = saving.wait_for(|saving| !saving) => break,
                    error = run(&mut console), if console.is_some() => {
                        tracing::debug!(domain = %domain.spec.id, %error, "the console is closed");
                        console = None;
                    }
                }
            }
            continue;
        }
        match seen {
            Ok(seen @ (Seen::Off | Seen::Reset | Seen::Crashed | Seen::Gone)) => break seen,
            Ok(seen) => {
                if !console_opened {
                    console = domain.console(console_max_bytes).await;
                    console_opened = true;
                }
                domain.life.set(match seen {
                    Seen::Paused => DomainState::Paused,
                    _ => DomainState::Running,
                });
            }
            // It is looked at again when the connection is back.
            Err(error) => tracing::warn!(domain = %domain.spec.id, %error, "out of sight"),
        }
        loop {
            tokio::select! {
                () = domain.look.notified() => break,
                error = run(&mut console), if console.is_some() => {
                    tracing::debug!(domain = %domain.spec.id, %error, "the console is closed");
                    console = None;
                }
            }
        }
    };
    if console.is_none() && !console_opened && seen != Seen::Gone {
        // Adopted after its end.
        console = domain.console(console_max_bytes).await;
    }
    if console.is_some() {
        // What comes later is lost, and nothing waits for it.
        let _ = tokio::time::timeout(LAST_WORDS, run(&mut console)).await;
    }
    domain.streams.send_replace(Streams::Ended);
    let reason = loop {
        match domain.outcome(seen).await {
            Ok(reason) => break reason,
            Err(error) => {
                tracing::warn!(domain = %domain.spec.id, error = chain(&error), "the end of a domain was not noted");
                domain.look_again().await;
            }
        }
    };
    if let Err(error) = domain.dir.set_stop_reason(&reason) {
        tracing::warn!(domain = %domain.spec.id, %error, "the end of a domain was not noted");
    }
    // Told before what is left of it is removed, which takes Xen's tools seconds. Whoever wants it
    // gone waits for `gone`.
    domain.life.set(DomainState::Stopped { reason });
    while let Err(error) = domain.libvirt.destroy(domain.spec.id).await {
        tracing::warn!(domain = %domain.spec.id, error = chain(&error), "cannot remove an ended domain");
        domain.look_again().await;
    }
    domain.leave_network().await;
    domain.gone.send_replace(true);
}

async fn run(console: &mut Option<PipeLog>) -> std::io::Error {
    match console {
        Some(console) => console.run().await,
        None => std::future::pending().await,
    }
}

/// Takes up a domain that was made before this process began.
pub(crate) async fn adopt(
    dir: RunDir,
    record: Record,
    boot_id: &str,
    config: &XenConfig,
    libvirt: &Arc<Libvirt>,
    network: &Arc<Network>,
    events: broadcast::Sender<DomainEvent>,
) -> Result<Arc<Domain>, Error> {
    let id = record.spec.id;
    let (stopped, started) = {
        let dir = dir.clone();
        blocking(move || Ok((dir.stop_reason()?, dir.has_started()))).await?
    };
    let same_boot = record.boot_id == boot_id;
    let state = match (&record.transfer, stopped) {
        (Transfer::Saved { .. } | Transfer::Restoring { .. }, _) => DomainState::Stopped {
            reason: StopReason::Saved,
        },
        (Transfer::Restored { .. }, _) if same_boot => DomainState::Stopped {
            reason: StopReason::Saved,
        },
        (_, Some(reason)) if reason != StopReason::Saved => DomainState::Stopped { reason },
        (_, _) if started && !same_boot => DomainState::Stopped {
            reason: StopReason::Failed {
                detail: "the host was restarted".to_owned(),
            },
        },
        (_, _) if started => DomainState::Running,
        (_, _) => DomainState::Created,
    };
    if started && same_boot && state.is_final() {
        // Its end was noted, and then perhaps not completed. Without libvirt there is a next time.
        if let Err(error) = libvirt.destroy(id).await {
            tracing::warn!(domain = %id, %error, "an ended domain may be there still");
        }
    }
    let running = state == DomainState::Running;
    let transfer = record.transfer.clone();
    let domain = Domain::new(
        record.spec.clone(),
        dir,
        record,
        state,
        Arc::clone(libvirt),
        Arc::clone(network),
        events,
    );
    let domain = Arc::new(domain);
    match &transfer {
        // Whatever was left to do of it.
        Transfer::Saved { file, .. } => {
            let (file, dir) = (file.clone(), domain.dir.clone());
            blocking(move || {
                save_file::publish(&file)?;
                dir.set_stop_reason(&StopReason::Saved)
            })
            .await?;
        }
        Transfer::Saving { file, .. } if !same_boot => {
            let partial = save_file::partial(file);
            blocking(move || save_file::forget(&partial)).await?;
            domain.kept.set_transfer(Transfer::None).await?;
        }
        Transfer::Restoring {
            file,
            known_by,
            paused,
        } if !same_boot => {
            let saved = Transfer::Saved {
                file: file.clone(),
                known_by: known_by.clone(),
                paused: *paused,
            };
            domain.kept.set_transfer(saved).await?;
        }
        _ => {}
    }
    domain
        .saving
        .send_replace(matches!(domain.kept.transfer(), Transfer::Saving { .. }));
    if running {
        match libvirt.see(id).await {
            Ok(Seen::Paused) => domain.life.set(DomainState::Paused),
            Ok(_) => {}
            Err(error) => tracing::warn!(domain = %id, %error, "out of sight"),
        }
        if let Err(error) = domain.note_network().await {
            tracing::warn!(domain = %id, error = chain(&error), "its network is not known");
        }
        domain.attend(config);
    }
    Ok(domain)
}
