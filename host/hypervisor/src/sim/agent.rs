//! A simulated agent: dials the host, proves itself, and serves requests by the real protocol.

use std::future::pending;
use std::io;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, sleep_until};
use xbee_protocol::proof::{Side, prove, verify};
use xbee_protocol::{
    AgentInfo, BootConfig, Failure, FrameBuffer, FrameError, GENERATION, GuestHello, GuestMessage,
    GuestProof, HEARTBEAT_INTERVAL_MS, HostMessage, REDIAL_MAX_MS, REDIAL_MIN_MS, SILENCE_LIMIT_MS,
    Uuid, code, decode, encode_frame,
};

use super::failure;
use super::machine::Machine;
use super::random::Random;
use crate::domain::DomainSpec;

/// Room in the simulated wire, in bytes.
const WIRE_BYTES: usize = 64 << 10;

/// Messages are added while less than this waits to be written, in bytes.
const ROOM_BYTES: usize = 256 << 10;

/// What is done to an agent from outside.
#[derive(Debug)]
pub(super) enum Order {
    /// Its connection breaks.
    Drop,
    /// It says nothing more.
    Silence,
}

pub(super) struct Agent<'a, D> {
    domain: &'a DomainSpec,
    boot: BootConfig,
    boot_id: Uuid,
    machine: Machine,
    random: Random,
    orders: mpsc::UnboundedReceiver<Order>,
    /// Gives the host its end of a new connection.
    dial: D,
}

/// How a connection ended, if not by a fault that the host is told of.
enum End {
    /// The host wants the machine off.
    Shutdown,
    Lost,
}

impl<'a, D: Fn(DuplexStream)> Agent<'a, D> {
    pub(super) fn new(
        domain: &'a DomainSpec,
        boot: BootConfig,
        init: Option<String>,
        mut random: Random,
        orders: mpsc::UnboundedReceiver<Order>,
        dial: D,
    ) -> Self {
        Self {
            domain,
            boot,
            boot_id: Uuid::from_bytes(random.bytes()),
            machine: Machine::new(domain, init),
            random,
            orders,
            dial,
        }
    }

    /// Serves the host until it wants the machine off.
    pub(super) async fn run(mut self) {
        let mut redial_ms = REDIAL_MIN_MS;
        loop {
            let (wire, host) = tokio::io::duplex(WIRE_BYTES);
            (self.dial)(host);
            let mut session = Session::new(wire);
            match self.converse(&mut session).await {
                Ok(End::Shutdown) => return,
                Ok(End::Lost) => redial_ms = REDIAL_MIN_MS,
                Err(reason) => {
                    tracing::debug!(domain = %self.domain.id, reason = reason.message, "simulated agent hangs up");
                    // The host may be gone.
                    let _ = session.refuse(reason).await;
                }
            }
            drop(session);
            self.machine.disconnected();
            sleep(Duration::from_millis(redial_ms)).await;
            redial_ms = (redial_ms * 2).min(REDIAL_MAX_MS);
        }
    }

    async fn converse(&mut self, session: &mut Session) -> Result<End, Failure> {
        if !self.shake_hands(session).await? {
            return Ok(End::Lost);
        }
        let mut heard_at = Instant::now();
        let heartbeat = Duration::from_millis(HEARTBEAT_INTERVAL_MS);
        let mut beat_at = heard_at + heartbeat;
        let mut silent = false;
        loop {
            self.machine.tick(Instant::now());
            while session.has_room() && !silent {
                let Some(message) = self.machine.next() else {
                    break;
                };
                session.push(&message)?;
            }
            if self.machine.shutdown_wanted() && session.is_flushed() {
                return Ok(End::Shutdown);
            }
            let wake_at = self.machine.wake_at().filter(|_| !silent);
            tokio::select! {
                turn = session.turn() => if !turn.unwrap_or(false) {
                    return Ok(End::Lost);
                },
                () = sleep_until(beat_at) => {
                    beat_at = Instant::now() + heartbeat;
                    if !silent {
                        session.push(&GuestMessage::Heartbeat)?;
                    }
                    if heard_at.elapsed() >= Duration::from_millis(SILENCE_LIMIT_MS) {
                        return Err(failure(code::PROTOCOL_ERROR, "the host is silent"));
                    }
                }
                () = super::at(wake_at) => {}
                order = self.orders.recv() => match order {
                    Some(Order::Drop) => return Ok(End::Lost),
                    Some(Order::Silence) => silent = true,
                    // The domain ends.
                    None => return pending().await,
                },
            }
            while let Some(message) = session.next()? {
                heard_at = Instant::now();
                match message {
                    HostMessage::Refuse(_) => return Ok(End::Lost),
                    HostMessage::Hello(_) | HostMessage::Welcome(_) => {
                        return Err(failure(code::PROTOCOL_ERROR, "a second handshake"));
                    }
                    _ if silent => {}
                    message => self.machine.handle(message, heard_at),
                }
            }
        }
    }

    /// False where the host has closed.
    async fn shake_hands(&mut self, session: &mut Session) -> Result<bool, Failure> {
        let hello = GuestHello {
            generation: GENERATION,
            domain: self.boot.domain,
            nonce: self.random.bytes(),
        };
        session.push(&GuestMessage::Hello(hello.clone()))?;
        let Some(HostMessage::Hello(answer)) = self.await_handshake(session).await? else {
            return Ok(false);
        };
        let (secret, generation) = (&self.boot.secret, answer.generation);
        if !(1..=GENERATION).contains(&generation) {
            return Err(failure(
                code::UNSUPPORTED_GENERATION,
                format!(
                    "the host speaks generation {generation} of the protocol, this agent up to {GENERATION}"
                ),
            ));
        }
        if !verify(
            secret,
            Side::Host,
            &hello,
            generation,
            &answer.nonce,
            &answer.proof,
        ) {
            return Err(failure(
                code::AUTHENTICATION_FAILED,
                "the host does not know the secret of this boot",
            ));
        }
        let proof = prove(secret, Side::Guest, &hello, generation, &answer.nonce);
        session.push(&GuestMessage::Proof(GuestProof {
            proof,
            info: self.info(),
        }))?;
        let Some(HostMessage::Welcome(welcome)) = self.await_handshake(session).await? else {
            return Ok(false);
        };
        self.machine.resume(&welcome)?;
        Ok(true)
    }

    async fn await_handshake(
        &mut self,
        session: &mut Session,
    ) -> Result<Option<HostMessage>, Failure> {
        let deadline = Instant::now() + Duration::from_millis(SILENCE_LIMIT_MS);
        loop {
            match session.next()? {
                Some(message @ (HostMessage::Hello(_) | HostMessage::Welcome(_))) => {
                    return Ok(Some(message));
                }
                Some(HostMessage::Refuse(_)) => return Ok(None),
                Some(_) => {
                    return Err(failure(
                        code::PROTOCOL_ERROR,
                        "another message in place of the handshake",
                    ));
                }
                None => {}
            }
            tokio::select! {
                turn = session.turn() => if !turn.unwrap_or(false) {
                    return Ok(None);
                },
                () = sleep_until(deadline) => {
                    return Err(failure(code::PROTOCOL_ERROR, "the host is silent"));
                }
                order = self.orders.recv() => match order {
                    Some(Order::Drop) => return Ok(None),
                    Some(Order::Silence) => sleep_until(deadline).await,
                    None => return pending().await,
                },
            }
        }
    }

    fn info(&self) -> AgentInfo {
        AgentInfo {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            kernel: "simulated".to_owned(),
            boot_id: self.boot_id,
            memory_kib: self.domain.memory_bytes / 1024,
            phase: self.machine.phase(),
            conversations: self.machine.conversations(),
        }
    }
}

/// The wire, with what is on its way.
struct Session {
    wire: DuplexStream,
    frames: FrameBuffer,
    out: Vec<u8>,
    written: usize,
}

impl Session {
    fn new(wire: DuplexStream) -> Self {
        Self {
            wire,
            frames: FrameBuffer::default(),
            out: Vec::new(),
            written: 0,
        }
    }

    fn push(&mut self, message: &GuestMessage) -> Result<(), Failure> {
        encode_frame(message, &mut self.out)
            .map_err(|error| failure(code::SYSTEM_ERROR, error.to_string()))
    }

    fn next(&mut self) -> Result<Option<HostMessage>, Failure> {
        let malformed = |error: FrameError| failure(code::PROTOCOL_ERROR, error.to_string());
        match self.frames.next_body().map_err(malformed)? {
            Some(body) => decode(body).map(Some).map_err(malformed),
            None => Ok(None),
        }
    }

    fn has_room(&self) -> bool {
        self.out.len() - self.written < ROOM_BYTES
    }

    fn is_flushed(&self) -> bool {
        self.out.len() == self.written
    }

    /// Reads or writes something; false where the host has closed. Cancel-safe.
    async fn turn(&mut self) -> io::Result<bool> {
        let mut chunk = [0; 16 << 10];
        let (mut reader, mut writer) = tokio::io::split(&mut self.wire);
        let waiting = &self.out[self.written..];
        tokio::select! {
            read = reader.read(&mut chunk) => {
                let len = read?;
                self.frames.extend(&chunk[..len]);
                Ok(len > 0)
            }
            written = writer.write(waiting), if !waiting.is_empty() => {
                self.written += written?;
                if self.written == self.out.len() {
                    self.out.clear();
                    self.written = 0;
                }
                Ok(true)
            }
        }
    }

    async fn refuse(&mut self, reason: Failure) -> Result<(), Failure> {
        self.push(&GuestMessage::Refuse(reason))?;
        let written = self.wire.write_all(&self.out[self.written..]);
        match tokio::time::timeout(Duration::from_millis(SILENCE_LIMIT_MS), written).await {
            Ok(Ok(())) => Ok(()),
            _ => Err(failure(code::SYSTEM_ERROR, "the host does not read")),
        }
    }
}
