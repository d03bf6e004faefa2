//! One simulated domain.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::DuplexStream;
use tokio::sync::{Notify, broadcast, mpsc, watch};
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep};
use uuid::Uuid;
use xbee_protocol::{BOOT_CONFIG_PATH, BootConfig};

use super::agent::{Agent, Order};
use super::config::{SimConfig, SimEvent};
use super::connection::Connection;
use super::random::Random;
use crate::domain::{
    DomainEvent, DomainSpec, DomainState, DomainStats, Hardware, ShutdownOutcome, StopReason,
};
use crate::error::Error;
use crate::log::BoundedLog;
use crate::save_file::{self, Fingerprint};

/// What goes through a domain's console at a time, in bytes, when it floods it.
const FLOOD_BYTES: usize = 16 << 10;
const FLOOD_INTERVAL: Duration = Duration::from_millis(10);
/// Between two lines of one that counts.
const COUNT_INTERVAL: Duration = Duration::from_millis(100);

#[derive(Debug)]
pub(super) struct Domain {
    pub(super) spec: DomainSpec,
    state: watch::Sender<DomainState>,
    events: broadcast::Sender<DomainEvent>,
    console: Mutex<BoundedLog>,
    hardware: Mutex<Hardware>,
    newest_connection: Mutex<Option<DuplexStream>>,
    /// Counts the saves: connections from before one are cut.
    saves: watch::Sender<u32>,
    /// What it was saved to, and whether it was halted.
    saved: Mutex<Option<(Fingerprint, bool)>>,
    connected: Notify,
    life: Mutex<Option<Life>>,
}

/// What a started domain has.
#[derive(Debug)]
struct Life {
    task: AbortHandle,
    happenings: mpsc::UnboundedSender<Happening>,
    started: Instant,
}

#[derive(Debug)]
enum Happening {
    Injected(SimEvent),
    PowerButton,
}

impl Domain {
    pub(super) fn new(
        spec: DomainSpec,
        config: &SimConfig,
        events: broadcast::Sender<DomainEvent>,
    ) -> io::Result<Self> {
        let console = BoundedLog::open(&console_path(&spec), config.console_max_bytes)?;
        Ok(Self {
            hardware: Mutex::new(Hardware::of(&spec)),
            spec,
            state: watch::Sender::new(DomainState::Created),
            events,
            console: Mutex::new(console),
            newest_connection: Mutex::default(),
            saves: watch::Sender::new(0),
            saved: Mutex::default(),
            connected: Notify::new(),
            life: Mutex::default(),
        })
    }

    pub(super) fn state(&self) -> DomainState {
        self.state.borrow().clone()
    }

    fn set_state(&self, state: DomainState) {
        let changed = self.state.send_if_modified(|current| {
            if *current == state || current.is_final() {
                return false;
            }
            current.clone_from(&state);
            true
        });
        if changed {
            // Nobody listening is fine.
            let _ = self.events.send(DomainEvent {
                id: self.spec.id,
                state,
            });
        }
    }

    pub(super) fn wrong_state(&self, operation: &'static str) -> Error {
        match self.state() {
            DomainState::Stopped { reason } => Error::Gone {
                id: self.spec.id,
                reason,
            },
            state => Error::WrongState {
                id: self.spec.id,
                operation,
                state,
            },
        }
    }

    pub(super) fn console_path(&self) -> PathBuf {
        console_path(&self.spec)
    }

    fn print(&self, text: &str) {
        let mut console = self.console.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = console.append(text.as_bytes()) {
            tracing::warn!(domain = %self.spec.id, %error, "cannot write a domain's log");
        }
    }

    pub(super) fn start(self: &Arc<Self>, config: &SimConfig) -> Result<(), Error> {
        let mut life = self.life.lock().unwrap_or_else(PoisonError::into_inner);
        match self.state() {
            DomainState::Created => {}
            DomainState::Running | DomainState::Paused => return Ok(()),
            DomainState::Stopped { .. } => return Err(self.wrong_state("start")),
        }
        let mut random = Random::new(config.seed, self.spec.id.as_u128());
        if random.happens(config.refused_start) {
            let detail = "simulated: the start failed".to_owned();
            self.set_state(DomainState::Stopped {
                reason: StopReason::Failed {
                    detail: detail.clone(),
                },
            });
            return Err(Error::StartFailed {
                id: self.spec.id,
                detail,
            });
        }
        self.set_state(DomainState::Running);
        let (happenings, receiver) = mpsc::unbounded_channel();
        let task = tokio::spawn(live(Arc::clone(self), config.clone(), random, receiver));
        *life = Some(Life {
            task: task.abort_handle(),
            happenings,
            started: Instant::now(),
        });
        Ok(())
    }

    pub(super) fn inject(&self, event: SimEvent) -> Result<(), Error> {
        self.happen(Happening::Injected(event))
    }

    fn happen(&self, happening: Happening) -> Result<(), Error> {
        let life = self.life.lock().unwrap_or_else(PoisonError::into_inner);
        match life.as_ref().map(|life| life.happenings.send(happening)) {
            Some(Ok(())) => Ok(()),
            _ => Err(self.wrong_state("change")),
        }
    }

    /// Waits for the end. Cancel-safe.
    pub(super) async fn stopped(&self) -> StopReason {
        let mut state = self.state.subscribe();
        let stopped = state
            .wait_for(|state| matches!(state, DomainState::Stopped { .. }))
            .await;
        match stopped.as_deref() {
            Ok(DomainState::Stopped { reason }) => reason.clone(),
            // Not reached: the sender lives as long as `self`.
            _ => StopReason::Destroyed,
        }
    }

    async fn unpaused(&self) {
        let mut state = self.state.subscribe();
        // Fails only when the domain is no more.
        let _ = state.wait_for(|state| !is_halted(state)).await;
    }

    async fn paused(&self) {
        let mut state = self.state.subscribe();
        // Fails only when the domain is no more.
        let _ = state.wait_for(is_halted).await;
    }

    /// Gives the host its end of a new connection, in place of one that it has not taken.
    fn offer(&self, stream: DuplexStream) {
        let mut newest = self
            .newest_connection
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *newest = Some(stream);
        self.connected.notify_one();
    }

    pub(super) fn forget_connection(&self) {
        *self
            .newest_connection
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = None;
    }

    pub(super) async fn next_connection(&self) -> Connection {
        loop {
            let saves = self.saves.subscribe();
            let connected = self.connected.notified();
            let stream = self
                .newest_connection
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take();
            if let Some(stream) = stream {
                return Connection::new(stream, saves);
            }
            connected.await;
        }
    }

    pub(super) fn pause(&self) -> Result<(), Error> {
        match self.state() {
            DomainState::Running | DomainState::Paused => {
                self.set_state(DomainState::Paused);
                Ok(())
            }
            _ => Err(self.wrong_state("pause")),
        }
    }

    pub(super) fn resume(&self) -> Result<(), Error> {
        match self.state() {
            DomainState::Running | DomainState::Paused => {
                self.set_state(DomainState::Running);
                Ok(())
            }
            _ => Err(self.wrong_state("resume")),
        }
    }

    pub(super) fn hardware(&self) -> Hardware {
        let hardware = self.hardware.lock();
        hardware.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Changes what a running or paused domain has.
    pub(super) fn change<T>(
        &self,
        operation: &'static str,
        change: impl FnOnce(&mut Hardware) -> Result<T, Error>,
    ) -> Result<T, Error> {
        match self.state() {
            DomainState::Running | DomainState::Paused => {
                let hardware = self.hardware.lock();
                change(&mut hardware.unwrap_or_else(PoisonError::into_inner))
            }
            _ => Err(self.wrong_state(operation)),
        }
    }

    pub(super) fn save(&self, file: &Path) -> Result<(), Error> {
        let paused = match self.state() {
            DomainState::Running => false,
            DomainState::Paused => true,
            _ => return Err(self.wrong_state("save")),
        };
        let write = || {
            // The guest itself is parked in memory; its file is one of a kind.
            let mut opened = save_file::begin(file)?;
            writeln!(opened, "simulated: {} {}", self.spec.id, Uuid::new_v4())
                .map_err(Error::io("write", file))?;
            let known_by = save_file::seal(file)?;
            save_file::publish(file)?;
            Ok(known_by)
        };
        let known_by = write().map_err(|error| Error::NotSaved {
            id: self.spec.id,
            source: Box::new(error),
        })?;
        *self.saved.lock().unwrap_or_else(PoisonError::into_inner) = Some((known_by, paused));
        self.forget_connection();
        self.saves.send_modify(|saves| *saves += 1);
        self.set_state(DomainState::Stopped {
            reason: StopReason::Saved,
        });
        Ok(())
    }

    pub(super) fn restore(&self, file: &Path) -> Result<(), Error> {
        let mut saved = self.saved.lock().unwrap_or_else(PoisonError::into_inner);
        let (known_by, paused) = match (self.state(), &*saved) {
            (DomainState::Running | DomainState::Paused, _) => return Ok(()),
            (
                DomainState::Stopped {
                    reason: StopReason::Saved,
                },
                Some(saved),
            ) => saved,
            _ => return Err(self.wrong_state("restore")),
        };
        save_file::check(file, self.spec.id, known_by)?;
        save_file::forget(file)?;
        let state = match paused {
            true => DomainState::Paused,
            false => DomainState::Running,
        };
        *saved = None;
        self.set_state(state);
        Ok(())
    }

    pub(super) async fn shutdown(&self, grace: Duration) -> Result<ShutdownOutcome, Error> {
        match self.state() {
            DomainState::Created => return Err(self.wrong_state("shut down")),
            DomainState::Stopped { .. } => {}
            DomainState::Paused | DomainState::Running => {
                self.resume()?;
                // It may have ended just now.
                let _ = self.happen(Happening::PowerButton);
            }
        }
        if let Ok(reason) = tokio::time::timeout(grace, self.stopped()).await {
            return Ok(reason.shutdown_outcome());
        }
        self.kill();
        Ok(ShutdownOutcome::Forced)
    }

    pub(super) fn kill(&self) {
        let life = self
            .life
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(life) = life {
            life.task.abort();
        }
        if self.state() != DomainState::Created {
            self.set_state(DomainState::Stopped {
                reason: StopReason::Destroyed,
            });
        }
    }

    pub(super) fn stats(&self) -> Result<DomainStats, Error> {
        match self.state() {
            DomainState::Created => Ok(DomainStats::default()),
            DomainState::Stopped { .. } => Err(self.wrong_state("measure")),
            DomainState::Running | DomainState::Paused => {
                let life = self.life.lock().unwrap_or_else(PoisonError::into_inner);
                let running = life
                    .as_ref()
                    .map_or(Duration::ZERO, |life| life.started.elapsed());
                Ok(DomainStats {
                    // One virtual CPU is busy, and all of the memory is touched.
                    cpu_ms: u64::try_from(running.as_millis()).unwrap_or(u64::MAX),
                    memory_bytes: self.hardware().memory_bytes,
                })
            }
        }
    }
}

/// Whether nothing in the guest goes on, for now.
fn is_halted(state: &DomainState) -> bool {
    let saved = DomainState::Stopped {
        reason: StopReason::Saved,
    };
    *state == DomainState::Paused || *state == saved
}

fn console_path(spec: &DomainSpec) -> PathBuf {
    spec.run_dir.join("console.log")
}

/// A domain's life from its start to its end.
async fn live(
    domain: Arc<Domain>,
    config: SimConfig,
    mut random: Random,
    mut happenings: mpsc::UnboundedReceiver<Happening>,
) {
    let reason = end(&domain, &config, &mut random, &mut happenings).await;
    domain.set_state(DomainState::Stopped { reason });
}

async fn end(
    domain: &Arc<Domain>,
    config: &SimConfig,
    random: &mut Random,
    happenings: &mut mpsc::UnboundedReceiver<Happening>,
) -> StopReason {
    let mut flooding = random.happens(config.console_flood);
    let crash_at = random
        .happens(config.crash)
        .then(|| Instant::now() + Duration::from_millis(random.within(&config.crash_ms)));
    let (orders, receiver) = mpsc::unbounded_channel();
    let guest = guest(domain, config, random.clone(), receiver);
    tokio::pin!(guest);
    let (mut deaf, mut counting) = (false, false);
    loop {
        domain.unpaused().await;
        tokio::select! {
            happening = happenings.recv() => match happening {
                None => return StopReason::Destroyed,
                Some(Happening::PowerButton) if deaf => {}
                Some(Happening::PowerButton) => {
                    sleep(Duration::from_millis(random.within(&config.shutdown_ms))).await;
                    return StopReason::GuestShutdown;
                }
                Some(Happening::Injected(event)) => match event {
                    SimEvent::PowerOff => return StopReason::GuestShutdown,
                    SimEvent::Reset => return StopReason::GuestReset,
                    SimEvent::Panic => {
                        domain.print("Kernel panic - not syncing: simulated\n");
                        return StopReason::GuestPanic;
                    }
                    SimEvent::Crash { detail } => return StopReason::Failed { detail },
                    SimEvent::FloodConsole => flooding = true,
                    SimEvent::Count => counting = true,
                    SimEvent::IgnorePowerButton => deaf = true,
                    // Nobody takes them where no agent is.
                    SimEvent::DropConnection => drop(orders.send(Order::Drop)),
                    SimEvent::SilenceAgent => drop(orders.send(Order::Silence)),
                },
            },
            () = &mut guest => {
                sleep(Duration::from_millis(random.within(&config.shutdown_ms))).await;
                return StopReason::GuestShutdown;
            }
            () = super::at(crash_at) => {
                return StopReason::Failed { detail: "simulated: the hypervisor crashed".to_owned() };
            }
            () = sleep(FLOOD_INTERVAL), if flooding => {
                domain.print(&"flood\n".repeat(FLOOD_BYTES / 6));
            }
            () = sleep(COUNT_INTERVAL), if counting => domain.print("another line\n"),
            // Nothing above goes on while it is halted.
            () = domain.paused() => {}
        }
    }
}

/// What runs in the domain. Returns when it switches itself off.
async fn guest(
    domain: &Domain,
    config: &SimConfig,
    mut random: Random,
    orders: mpsc::UnboundedReceiver<Order>,
) {
    sleep(Duration::from_millis(random.within(&config.boot_ms))).await;
    domain.print("simulated guest: up\n");
    if random.happens(config.lost_agent) {
        return std::future::pending().await;
    }
    match BootConfig::decode(&domain.spec.boot_config) {
        Ok(boot) => {
            let dial = |stream| domain.offer(stream);
            let init = config.init.clone();
            Agent::new(&domain.spec, boot, init, random, orders, dial)
                .run()
                .await;
            domain.print("simulated guest: down\n");
        }
        Err(error) => {
            domain.print(&format!("xbeinstd: {BOOT_CONFIG_PATH}: {error}\n"));
            std::future::pending().await
        }
    }
}
