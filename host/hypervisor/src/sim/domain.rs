//! One simulated domain.

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::DuplexStream;
use tokio::sync::{Notify, broadcast, mpsc, watch};
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep};
use xbee_protocol::{BOOT_CONFIG_PATH, BootConfig};

use super::agent::{Agent, Order};
use super::config::{SimConfig, SimEvent};
use super::random::Random;
use crate::domain::{
    DomainEvent, DomainSpec, DomainState, DomainStats, ShutdownOutcome, StopReason,
};
use crate::error::Error;
use crate::log::BoundedLog;

/// What goes through a domain's console at a time, in bytes, when it floods it.
const FLOOD_BYTES: usize = 16 << 10;
const FLOOD_INTERVAL: Duration = Duration::from_millis(10);

#[derive(Debug)]
pub(super) struct Domain {
    pub(super) spec: DomainSpec,
    state: watch::Sender<DomainState>,
    events: broadcast::Sender<DomainEvent>,
    console: Mutex<BoundedLog>,
    newest_connection: Mutex<Option<DuplexStream>>,
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
            spec,
            state: watch::Sender::new(DomainState::Created),
            events,
            console: Mutex::new(console),
            newest_connection: Mutex::default(),
            connected: Notify::new(),
            life: Mutex::default(),
        })
    }

    pub(super) fn state(&self) -> DomainState {
        self.state.borrow().clone()
    }

    fn set_state(&self, state: DomainState) {
        let changed = self.state.send_if_modified(|current| {
            if *current == state || matches!(current, DomainState::Stopped { .. }) {
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
        let _ = state.wait_for(|state| *state != DomainState::Paused).await;
    }

    async fn paused(&self) {
        let mut state = self.state.subscribe();
        // Fails only when the domain is no more.
        let _ = state.wait_for(|state| *state == DomainState::Paused).await;
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

    pub(super) async fn next_connection(&self) -> DuplexStream {
        loop {
            let connected = self.connected.notified();
            let stream = self
                .newest_connection
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take();
            if let Some(stream) = stream {
                return stream;
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
                    memory_bytes: self.spec.memory_bytes,
                })
            }
        }
    }
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
    let mut deaf = false;
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
