//! What a card's guest may reach beyond its network: a process for each card, between the switch and the world. It ends when
//! the switch closes the connection, which is when the card goes, so nobody keeps account of it.

use std::fs::{File, OpenOptions};
use std::io;
use std::net::Ipv6Addr;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::process::Command;
use tokio::time::timeout;
use xbee_gateway::Plan;
use xbee_gateway::rules::Outbound;
use xbee_vswitch::ether::{UplinkSpec, neighbour};

use super::switch::Switch;
use super::{card, config::QemuConfig, config::companion, domain};
use crate::domain::{DomainSpec, Interface};
use crate::error::Error;

const PROGRAM: &str = "gateway";
const LOG: &str = "gateway.log";

/// The log is begun anew when a gateway is started and it is longer than this, in bytes.
const LOG_MAX_BYTES: u64 = 1 << 20;

/// How long a gateway may take until it serves.
const START_LIMIT: Duration = Duration::from_secs(10);

/// The router that guests have where they may reach anything beyond their network.
#[must_use]
pub fn router() -> Ipv6Addr {
    neighbour::of_mac(neighbour::LINK_LOCAL, neighbour::ROUTER_MAC)
}

/// Starts the gateway of a card that the switch has, unless its guest may reach nothing.
pub(crate) async fn start(
    config: &QemuConfig,
    spec: &DomainSpec,
    interface: &Interface,
    socket: &Path,
    switch: &Switch,
) -> Result<(), Error> {
    if config.outbound == Outbound::Off {
        return Ok(());
    }
    let program = companion(config.gateway_program.as_deref(), PROGRAM)?;
    if !program.is_file() {
        return Err(Error::HypervisorMissing {
            program: program.display().to_string(),
            remedy: "put the program gateway beside this one, or set [qemu] outbound to \"off\"",
        });
    }
    let uplink = UplinkSpec {
        cid: spec.cid,
        mac: interface.mac,
        socket: socket.to_owned(),
    };
    switch.attach_uplink(spec.id, uplink).await?;
    let connection = card::connect(socket).map_err(Error::io("connect to", socket))?;
    let network = (interface.address.to_bits() >> 64) as u64;
    let plan = Plan {
        router: neighbour::router_address(network),
        outbound: config.outbound.clone(),
        uid: domain::identity(spec, config),
    };
    let log = config.domains_dir.join(LOG);
    let started = launch(&program, &plan, connection, open_log(&log)).await;
    match started {
        Ok(true) => Ok(()),
        Ok(false) => Err(Error::HypervisorBroken {
            detail: format!("the gateway did not start: see {}", log.display()),
        }),
        Err(error) => Err(Error::io("start", &program)(error)),
    }
}

fn open_log(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new().append(true).create(true).open(path)?;
    if file.metadata()?.len() > LOG_MAX_BYTES {
        file.set_len(0)?;
    }
    Ok(file)
}

/// Starts the process, which outlives this one. False: it does not serve.
async fn launch(
    program: &Path,
    plan: &Plan,
    connection: OwnedFd,
    log: io::Result<File>,
) -> io::Result<bool> {
    let mut child = Command::new(program)
        .arg(serde_json::to_string(plan)?)
        .env_clear()
        .current_dir("/")
        .stdin(connection)
        .stdout(Stdio::piped())
        .stderr(log?)
        .process_group(0)
        .kill_on_drop(false)
        .spawn()?;
    let mut ready = String::new();
    if let Some(stdout) = child.stdout.take() {
        let mut reader = BufReader::new(stdout).take(64);
        // An error or the time limit leave `ready` empty.
        let _ = timeout(START_LIMIT, reader.read_line(&mut ready)).await;
    }
    let serves = ready.trim_end() == "ready";
    if !serves {
        // It may have ended by itself.
        let _ = child.start_kill();
    }
    // Reaped when it ends, should this process still be there.
    tokio::spawn(async move { child.wait().await });
    Ok(serves)
}
