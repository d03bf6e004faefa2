//! One connection to the host: handshake, frames, heartbeats.

use std::io::ErrorKind;
use std::time::{Duration, Instant};

use rustix::rand::{GetRandomFlags, getrandom};
use xbee_link::Link;
use xbee_protocol::proof::{Side, prove, verify};
use xbee_protocol::{
    AgentInfo, BootConfig, Failure, FrameBuffer, GENERATION, GuestHello, GuestMessage, GuestProof,
    HEARTBEAT_INTERVAL_MS, HostHello, HostMessage, SILENCE_LIMIT_MS, Welcome, code, decode,
    encode_frame,
};

use crate::failure::failure;

/// Data are added while less than this waits to be written, in bytes.
const DATA_ROOM_BYTES: usize = 512 * 1024;
/// Read in one go, in bytes; then it is others' turn.
const READ_BYTES: usize = 256 * 1024;

/// Frames to be written.
#[derive(Debug, Default)]
pub(crate) struct Outbox {
    bytes: Vec<u8>,
    written: usize,
}

impl Outbox {
    pub(crate) fn push(&mut self, message: &GuestMessage) {
        if encode_frame(message, &mut self.bytes).is_err() {
            // Only texts of the guest's can be that long; data are cut to size.
            if let GuestMessage::Response { id, .. } = message {
                let reply = xbee_protocol::Reply::Failed(failure(
                    code::SYSTEM_ERROR,
                    "the reply is too long",
                ));
                let short = GuestMessage::Response { id: *id, reply };
                let _fits = encode_frame(&short, &mut self.bytes);
            }
        }
    }

    /// Whether data may be added.
    pub(crate) fn has_room(&self) -> bool {
        self.bytes.len() - self.written < DATA_ROOM_BYTES
    }

    fn is_empty(&self) -> bool {
        self.bytes.len() == self.written
    }
}

/// Where in the handshake the connection is.
#[derive(Debug)]
enum Step {
    Hello(GuestHello),
    Welcome,
    Ready,
}

/// One connection.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) link: Link,
    pub(crate) out: Outbox,
    frames: FrameBuffer,
    step: Step,
    heard_at: Instant,
    beat_at: Instant,
}

/// What a message means to the agent.
#[derive(Debug)]
pub(crate) enum Incoming {
    /// The handshake goes on.
    Handshake,
    /// The handshake is over.
    Ready(Welcome),
    /// Everything else.
    Message(Box<HostMessage>),
}

impl Session {
    /// A new connection, which begins with a hello.
    pub(crate) fn new(link: Link, boot: &BootConfig, now: Instant) -> Result<Session, Failure> {
        let mut nonce = [0; 32];
        // Uniqueness is all that is asked of the nonce: waiting for entropy would delay the boot.
        let filled = getrandom(&mut nonce, GetRandomFlags::INSECURE);
        if filled.map_err(|error| crate::failure::system_failure("no random numbers", error))?
            < nonce.len()
        {
            return Err(failure(code::SYSTEM_ERROR, "no random numbers"));
        }
        let hello = GuestHello {
            generation: GENERATION,
            domain: boot.domain,
            nonce,
        };
        let mut out = Outbox::default();
        out.push(&GuestMessage::Hello(hello.clone()));
        Ok(Session {
            link,
            out,
            frames: FrameBuffer::default(),
            step: Step::Hello(hello),
            heard_at: now,
            beat_at: now + Duration::from_millis(HEARTBEAT_INTERVAL_MS),
        })
    }

    pub(crate) fn is_ready(&self) -> bool {
        matches!(self.step, Step::Ready)
    }

    pub(crate) fn wants_to_write(&self) -> bool {
        !self.out.is_empty()
    }

    /// Reads what is there. False where the host has closed.
    pub(crate) fn read(&mut self, now: Instant) -> std::io::Result<bool> {
        let mut chunk = [0; 32 * 1024];
        let mut total = 0;
        while total < READ_BYTES {
            match self.link.read(&mut chunk) {
                Ok(0) => return Ok(false),
                Ok(length) => {
                    self.frames.extend(&chunk[..length]);
                    self.heard_at = now;
                    total += length;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    /// Writes what fits now.
    pub(crate) fn write(&mut self) -> std::io::Result<()> {
        while !self.out.is_empty() {
            match self.link.write(&self.out.bytes[self.out.written..]) {
                Ok(length) => self.out.written += length,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.out.written = 0;
        self.out.bytes.clear();
        // A burst's buffer is not kept for the guest's life.
        self.out.bytes.shrink_to(64 * 1024);
        Ok(())
    }

    /// The next message, when it is whole. `info` is asked for once the host is known.
    pub(crate) fn next(
        &mut self,
        boot: &BootConfig,
        info: impl FnOnce() -> AgentInfo,
    ) -> Result<Option<Incoming>, Failure> {
        let malformed =
            |error: xbee_protocol::FrameError| failure(code::PROTOCOL_ERROR, error.to_string());
        let Some(body) = self.frames.next_body().map_err(malformed)? else {
            return Ok(None);
        };
        let message: HostMessage = decode(body).map_err(malformed)?;
        if let HostMessage::Refuse(refusal) = message {
            return Err(refusal);
        }
        match (&self.step, message) {
            (Step::Hello(hello), HostMessage::Hello(answer)) => {
                let HostHello {
                    generation,
                    nonce,
                    proof,
                } = answer;
                if generation == 0 || generation > GENERATION {
                    return Err(failure(
                        code::UNSUPPORTED_GENERATION,
                        format!(
                            "the host speaks generation {generation} of the protocol, this agent up to {GENERATION}"
                        ),
                    ));
                }
                if !verify(&boot.secret, Side::Host, hello, generation, &nonce, &proof) {
                    return Err(failure(
                        code::AUTHENTICATION_FAILED,
                        "the host does not know the secret of this boot",
                    ));
                }
                let proof = prove(&boot.secret, Side::Guest, hello, generation, &nonce);
                self.out.push(&GuestMessage::Proof(GuestProof {
                    proof,
                    info: info(),
                }));
                self.step = Step::Welcome;
                Ok(Some(Incoming::Handshake))
            }
            (Step::Welcome, HostMessage::Welcome(welcome)) => {
                self.step = Step::Ready;
                Ok(Some(Incoming::Ready(welcome)))
            }
            (Step::Ready, HostMessage::Hello(_) | HostMessage::Welcome(_)) => {
                Err(failure(code::PROTOCOL_ERROR, "a second handshake"))
            }
            (Step::Ready, message) => Ok(Some(Incoming::Message(Box::new(message)))),
            _ => Err(failure(
                code::PROTOCOL_ERROR,
                "another message in place of the handshake",
            )),
        }
    }

    /// When [`Session::tick`] is wanted.
    pub(crate) fn wake_at(&self) -> Instant {
        self.beat_at
    }

    /// Sends a heartbeat when it is time for one. False where the host has been silent for too long.
    pub(crate) fn tick(&mut self, now: Instant) -> bool {
        if now >= self.beat_at {
            self.beat_at = now + Duration::from_millis(HEARTBEAT_INTERVAL_MS);
            if self.is_ready() {
                self.out.push(&GuestMessage::Heartbeat);
            }
        }
        now.duration_since(self.heard_at) < Duration::from_millis(SILENCE_LIMIT_MS)
    }
}
