//! The switch of guests' streams and networks: one process for all domains, started on demand, which like them outlives this
//! one.

use std::fs::OpenOptions;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::process::Command;
use tokio::sync::Mutex;
use xbee_cage::{Cage, Plan};
use xbee_vswitch::control::{Client, ClientError};
use xbee_vswitch::ether::{CardSpec, UplinkSpec};
use xbee_vswitch::switch::DomainSpec as Port;

use super::config::GuestsSocket;
use super::guests_socket;
use crate::domain::DomainId;
use crate::error::Error;
use crate::rundir::make_domains_dir;

const CONTROL_SOCKET: &str = "vswitch.sock";
/// Held by the switch as long as it runs.
const LOCK: &str = "vswitch.sock.lock";
const LOG: &str = "vswitch.log";

/// The log is begun anew when the switch is started and it is longer than this, in bytes.
const LOG_MAX_BYTES: u64 = 1 << 20;

/// Most open files: a dozen for each domain and one for each of its connections; the host's own limit is most often lower.
const OPEN_FILES_MAX: u64 = 1 << 20;

/// How long the switch may take to answer that it stops.
const STOP_LIMIT: Duration = Duration::from_secs(1);

/// Drives the switch of one directory of domains.
#[derive(Debug)]
pub(crate) struct Switch {
    program: PathBuf,
    control: PathBuf,
    log: PathBuf,
    guests_socket: Option<GuestsSocket>,
    /// The socket for guests is this switch's.
    has_socket: AtomicBool,
    client: Mutex<Option<Client>>,
}

/// Of a domain's network cards.
enum Change {
    Attach(CardSpec),
    Uplink(UplinkSpec),
    Detach { cid: u32, mac: [u8; 6] },
}

impl Change {
    async fn ask(&self, client: &mut Client) -> Result<(), ClientError> {
        match self {
            Self::Attach(card) => client.attach_interface(card.clone()).await,
            Self::Uplink(uplink) => client.attach_uplink(uplink.clone()).await,
            Self::Detach { cid, mac } => client.detach_interface(*cid, *mac).await,
        }
    }
}

impl Switch {
    pub(crate) fn new(
        program: PathBuf,
        domains_dir: &Path,
        guests_socket: Option<GuestsSocket>,
    ) -> Self {
        Self {
            program,
            control: domains_dir.join(CONTROL_SOCKET),
            log: domains_dir.join(LOG),
            guests_socket,
            has_socket: AtomicBool::new(false),
            client: Mutex::default(),
        }
    }

    /// Has host programs served, by the switch that runs or a new one.
    pub(crate) async fn serve(&self, cage: &Cage) -> Result<(), Error> {
        let mut slot = self.client.lock().await;
        let mut client = self.spawn(cage).await?;
        self.open_socket(&mut client).await?;
        *slot = Some(client);
        Ok(())
    }

    /// Has a switch that runs serve no host programs, as another configuration may have asked for.
    pub(crate) async fn end_programs(&self) {
        let ended = match Client::connect(&self.control).await {
            Ok(mut client) => client.end_programs().await,
            // None runs.
            Err(_) => return,
        };
        if let Err(error) = ended {
            // One of an earlier version, which cannot serve them either.
            tracing::debug!(%error, "the switch does not know of host programs");
        }
    }

    async fn open_socket(&self, client: &mut Client) -> Result<(), Error> {
        match &self.guests_socket {
            Some(socket) => {
                let has = guests_socket::open(socket, &self.control, client).await?;
                self.has_socket.store(has, Ordering::Relaxed);
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// A switch, which serves host programs if it can.
    async fn start(&self, cage: &Cage) -> Result<Client, Error> {
        let mut client = self.spawn(cage).await?;
        if let Err(error) = self.open_socket(&mut client).await {
            // Guests can do without.
            tracing::error!(
                error = crate::error::chain(&error),
                "host programs reach no guests"
            );
        }
        Ok(client)
    }

    /// Adds a domain. When this returns, QEMU can connect. `cage`: what the switch is started in where it does not run.
    pub(crate) async fn add(&self, id: DomainId, port: Port, cage: &Cage) -> Result<(), Error> {
        let mut slot = self.client.lock().await;
        let client = match slot.take() {
            Some(client) => client,
            None => self.start(cage).await?,
        };
        let client = slot.insert(client);
        let mut added = client.add(port.clone()).await;
        match &added {
            // Left by a domain whose end nobody saw.
            Err(error) if matches!(error.code(), "cid-in-use" | "path-in-use") => {
                added = match client.remove(port.cid).await {
                    Ok(()) => client.add(port).await,
                    Err(error) => Err(error),
                };
            }
            Err(ClientError::Refused { .. }) | Ok(()) => {}
            // The switch was restarted since; whatever it served is gone.
            Err(_) => {
                *slot = None;
                added = slot.insert(self.start(cage).await?).add(port).await;
            }
        }
        if !matches!(added, Ok(()) | Err(ClientError::Refused { .. })) {
            *slot = None;
        }
        added.map_err(|source| Error::Switch {
            id,
            action: "added to",
            source: Box::new(source),
        })
    }

    /// Removes a domain; one that is not there, or no switch, is fine.
    pub(crate) async fn remove(&self, id: DomainId, cid: u32) -> Result<(), Error> {
        let mut slot = self.client.lock().await;
        let removed = match slot.take() {
            Some(mut client) => {
                let removed = client.remove(cid).await;
                (removed, Some(client))
            }
            None => (Err(ClientError::NoAnswer), None),
        };
        let (removed, client) = match removed {
            (Ok(()) | Err(ClientError::Refused { .. }), Some(_)) => removed,
            // A broken connection says nothing: ask anew.
            _ => match Client::connect(&self.control).await {
                Ok(mut client) => (client.remove(cid).await, Some(client)),
                // Without a switch there is nothing to remove.
                Err(ClientError::Connect { .. }) => return Ok(()),
                Err(error) => (Err(error), None),
            },
        };
        match removed {
            Err(error) if error.code() != "unknown-cid" => Err(Error::Switch {
                id,
                action: "removed from",
                source: Box::new(error),
            }),
            _ => {
                *slot = client;
                Ok(())
            }
        }
    }

    /// Gives a domain that was added a network card. When this returns, the connection can be made.
    pub(crate) async fn attach(&self, id: DomainId, card: CardSpec) -> Result<(), Error> {
        self.change(id, "given an interface of", &Change::Attach(card))
            .await
    }

    /// Gives a network card an uplink. When this returns, the connection can be made.
    pub(crate) async fn attach_uplink(
        &self,
        id: DomainId,
        uplink: UplinkSpec,
    ) -> Result<(), Error> {
        self.change(id, "given a way out by", &Change::Uplink(uplink))
            .await
    }

    /// Takes a network card from a domain; one that is not there is fine.
    pub(crate) async fn detach(&self, id: DomainId, cid: u32, mac: [u8; 6]) -> Result<(), Error> {
        self.change(id, "taken an interface of", &Change::Detach { cid, mac })
            .await
    }

    /// Asks the switch that runs, once more where the connection to it was an old one.
    async fn change(
        &self,
        id: DomainId,
        action: &'static str,
        change: &Change,
    ) -> Result<(), Error> {
        let failed = |source| Error::Switch {
            id,
            action,
            source: Box::new(source),
        };
        let mut slot = self.client.lock().await;
        if let Some(mut client) = slot.take() {
            let answer = change.ask(&mut client).await;
            if matches!(answer, Ok(()) | Err(ClientError::Refused { .. })) {
                *slot = Some(client);
                return answer.map_err(failed);
            }
        }
        let mut client = Client::connect(&self.control).await.map_err(failed)?;
        let answer = change.ask(&mut client).await;
        if matches!(answer, Ok(()) | Err(ClientError::Refused { .. })) {
            *slot = Some(client);
        }
        answer.map_err(failed)
    }

    async fn spawn(&self, cage: &Cage) -> Result<Client, Error> {
        if !self.program.is_file() {
            return Err(Error::HypervisorMissing {
                program: self.program.display().to_string(),
                remedy: "put the program vswitch beside this one, or name it in the configuration",
            });
        }
        // All its sockets are below.
        let directory = self.control.parent().unwrap_or(&self.control);
        make_domains_dir(directory)?;
        let log = || {
            let file = OpenOptions::new()
                .append(true)
                .create(true)
                .open(&self.log)?;
            if file.metadata()?.len() > LOG_MAX_BYTES {
                file.set_len(0)?;
            }
            io::Result::Ok(())
        };
        log().map_err(Error::io("write", &self.log))?;
        let lock = directory.join(LOCK);
        // In its cage it makes sockets, and no files.
        OpenOptions::new()
            .append(true)
            .create(true)
            .open(&lock)
            .map_err(Error::io("write", lock))?;
        let broken = |error: &dyn std::error::Error| Error::HypervisorBroken {
            detail: crate::error::chain(error),
        };
        let plan = Plan {
            parts: cage.report.parts,
            sockets: true,
            write: vec![LOCK.to_owned()],
            open_files_max: OPEN_FILES_MAX,
            ..Plan::default()
        };
        let plan = serde_json::to_string(&plan).map_err(|error| broken(&error))?;
        let mut command = Command::new(&cage.program);
        command.arg(plan).arg(&self.program);
        command.current_dir(directory);
        Client::spawn_by(command, &self.control, &self.log)
            .await
            .map_err(|error| broken(&error))
    }

    /// Ends the switch, for when no domain is left. Blocks until it answers, a second at most.
    pub(crate) fn stop(&self) {
        let stop = || {
            let mut stream = UnixStream::connect(&self.control)?;
            stream.set_write_timeout(Some(STOP_LIMIT))?;
            stream.set_read_timeout(Some(STOP_LIMIT))?;
            stream.write_all(b"{\"op\":\"stop\"}\n")?;
            // It stops once its answer is out, which a closed connection would not take.
            stream.read_exact(&mut [0])
        };
        match stop() {
            Ok(()) => {
                if let Some(socket) = &self.guests_socket
                    && self.has_socket.load(Ordering::Relaxed)
                {
                    guests_socket::remove(&socket.path);
                }
            }
            // Most likely it never ran.
            Err(error) => tracing::debug!(%error, "the vsock switch is not stopped"),
        }
    }
}
