//! The host's part of the handshake.

use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::timeout;
use xbee_protocol::proof::{Side, prove, verify};
use xbee_protocol::{
    AgentInfo, Failure, GENERATION, GuestHello, GuestMessage, GuestProof, HostHello, HostMessage,
    ResumePoint, SILENCE_LIMIT_MS, Secret, Uuid, Welcome, code, sanitise,
};

use crate::{Error, FrameReader, FrameWriter};

/// The oldest generation that this host still speaks.
const LEAST_GENERATION: u16 = 1;
/// Longest version or kernel release that is believed, in bytes.
const MAX_NAME_BYTES: usize = 128;

/// What the handshake yields.
#[derive(Debug)]
pub(crate) struct Established {
    pub(crate) domain: Uuid,
    pub(crate) generation: u16,
    pub(crate) info: AgentInfo,
}

pub(crate) async fn handshake<R, W>(
    reader: &mut FrameReader<R>,
    writer: &mut FrameWriter<W>,
    secret: &Secret,
    resume: Vec<ResumePoint>,
) -> Result<Established, Error>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let hello = match receive(reader).await? {
        GuestMessage::Hello(hello) => hello,
        other => return Err(unexpected("hello", &other)),
    };
    let generation = hello.generation.min(GENERATION);
    if generation < LEAST_GENERATION {
        let error = Error::Generation {
            offered: hello.generation,
            least: LEAST_GENERATION,
        };
        refuse(writer, &error).await;
        return Err(error);
    }
    let mut nonce = [0; 32];
    getrandom::fill(&mut nonce).map_err(Error::Random)?;
    let proof = prove(secret, Side::Host, &hello, generation, &nonce);
    writer
        .send(&HostMessage::Hello(HostHello {
            generation,
            nonce,
            proof,
        }))
        .await?;
    let info = match receive(reader).await? {
        GuestMessage::Proof(GuestProof { proof, info }) => {
            if !verify(secret, Side::Guest, &hello, generation, &nonce, &proof) {
                refuse(writer, &Error::Authentication).await;
                return Err(Error::Authentication);
            }
            info
        }
        other => return Err(unexpected("proof", &other)),
    };
    writer
        .send(&HostMessage::Welcome(Welcome { resume }))
        .await?;
    let GuestHello { domain, .. } = hello;
    let info = AgentInfo {
        version: sanitise(&info.version, MAX_NAME_BYTES),
        kernel: sanitise(&info.kernel, MAX_NAME_BYTES),
        ..info
    };
    Ok(Established {
        domain,
        generation,
        info,
    })
}

async fn receive<R: AsyncRead + Unpin>(reader: &mut FrameReader<R>) -> Result<GuestMessage, Error> {
    let message = timeout(Duration::from_millis(SILENCE_LIMIT_MS), reader.next())
        .await
        .map_err(|_| Error::Silent {
            seconds: SILENCE_LIMIT_MS / 1000,
        })??;
    match message {
        Some(GuestMessage::Refuse(failure)) if failure.code == code::AUTHENTICATION_FAILED => {
            Err(Error::Authentication)
        }
        Some(GuestMessage::Refuse(failure)) => Err(Error::refused(failure)),
        Some(message) => Ok(message),
        None => Err(Error::Closed),
    }
}

/// Tells the agent why; that this fails too changes nothing.
async fn refuse<W: AsyncWrite + Unpin>(writer: &mut FrameWriter<W>, error: &Error) {
    let failure = Failure {
        code: error.code().into(),
        message: error.to_string(),
    };
    if let Err(error) = writer.send(&HostMessage::Refuse(failure)).await {
        tracing::debug!(%error, "the agent did not wait for the refusal");
    }
}

fn unexpected(wanted: &str, message: &GuestMessage) -> Error {
    let got = match message {
        GuestMessage::Hello(_) => "hello",
        GuestMessage::Proof(_) => "proof",
        GuestMessage::Refuse(_) => "refusal",
        GuestMessage::Heartbeat => "heartbeat",
        GuestMessage::Response { .. } => "response",
        GuestMessage::Task { .. } => "task event",
        GuestMessage::ProcessExited { .. } => "process exit",
        GuestMessage::Stream { .. } => "stream message",
    };
    Error::protocol(format!("{got} in place of {wanted} in the handshake"))
}
