//! What nodes and the registry say to each other: frames of a length (4 bytes, big endian) and CBOR.

use std::io;

use minicbor::{Decode, Encode};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use uuid::Uuid;

use crate::address::{MAX_BOOT_BYTES, NodeAddress, id};
use crate::channel::ChannelOptions;
use crate::source::{AttachRequest, Policy, SourceCounters, TypeSelector, Way};
use crate::value::Value;

/// The version of all this.
pub(crate) const VERSION: u16 = 1;
/// The longest frame, in bytes.
pub(crate) const MAX_FRAME_BYTES: usize = 1 << 20;
/// The longest name of a channel, in bytes.
const MAX_CHANNEL_BYTES: usize = 128;
/// The most nodes in a channel.
pub(crate) const MAX_PARTICIPANTS: usize = 1024;
/// The most sources and sinks of a node in a channel.
pub(crate) const MAX_PORTS: usize = 256;
/// The most sources and sinks in a channel, so that they fit into a frame.
pub(crate) const MAX_CHANNEL_PORTS: usize = 16 << 10;

/// Whether a channel may be called so.
pub fn is_channel_name(name: &str) -> bool {
    let allowed = |c: u8| c.is_ascii_alphanumeric() || b"_-./:".contains(&c);
    (1..=MAX_CHANNEL_BYTES).contains(&name.len()) && name.bytes().all(allowed)
}

/// The first frame, from who has dialled.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub(crate) struct Hello {
    #[n(0)]
    pub version: u16,
    #[cbor(n(1), with = "id")]
    pub node: Uuid,
    #[n(2)]
    pub boot: String,
    #[n(3)]
    pub purpose: Purpose,
}

/// What a connection is for.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub(crate) enum Purpose {
    /// Envelopes between nodes.
    #[n(0)]
    Control,
    /// Envelopes with a registry.
    #[n(1)]
    Registry,
    /// Events of a source to a sink.
    #[n(2)]
    Attach(#[n(0)] Attach),
}

/// Which sink wants which source.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub(crate) struct Attach {
    #[n(0)]
    pub channel: String,
    #[cbor(n(1), with = "id")]
    pub source: Uuid,
    #[cbor(n(2), with = "id")]
    pub sink: Uuid,
    #[n(3)]
    pub types: Vec<TypeSelector>,
    #[n(4)]
    pub filter: Option<String>,
    #[n(5)]
    pub policy: Option<Policy>,
    #[n(6)]
    pub state: Vec<(String, Value)>,
    #[n(7)]
    pub next: Option<u64>,
}

impl Attach {
    pub(crate) fn new(channel: String, source: Uuid, request: AttachRequest) -> Attach {
        let AttachRequest {
            sink,
            types,
            filter,
            policy,
            state,
            next,
        } = request;
        Attach {
            channel,
            source,
            sink,
            types,
            filter,
            policy,
            state,
            next,
        }
    }

    pub(crate) fn request(self) -> AttachRequest {
        let Attach {
            sink,
            types,
            filter,
            policy,
            state,
            next,
            ..
        } = self;
        AttachRequest {
            sink,
            types,
            filter,
            policy,
            state,
            next,
        }
    }
}

/// What the dialled side says to [`Hello`].
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub(crate) enum Answer {
    /// Who it is. To a [`Purpose::Attach`] one more answer follows.
    #[n(0)]
    Welcome {
        #[cbor(n(0), with = "id")]
        node: Uuid,
    },
    /// The sink is attached.
    #[n(1)]
    Attached(#[n(0)] Position),
    /// No.
    #[n(2)]
    Refusal {
        #[n(0)]
        code: String,
        #[n(1)]
        text: String,
    },
}

/// Where a sink begins.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub(crate) struct Position {
    #[n(0)]
    pub slot: u32,
    #[n(1)]
    pub position: u64,
    #[n(2)]
    pub ack_bytes: u64,
    /// Descriptors, encoded.
    #[n(3)]
    pub types: Vec<minicbor::bytes::ByteVec>,
    #[n(4)]
    pub sequence: u64,
    #[n(5)]
    pub lost: u64,
}

/// A frame after the first ones.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub(crate) struct Envelope {
    /// Of a request and its reply.
    #[n(0)]
    pub id: u64,
    #[n(1)]
    pub body: Body,
}

#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub(crate) enum Body {
    #[n(0)]
    Ping,
    #[n(1)]
    Request(#[n(0)] Request),
    #[n(2)]
    Reply(#[n(0)] Reply),
    #[n(3)]
    Notice(#[n(0)] Notice),
}

/// A node in a channel.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub(crate) struct Participant {
    #[n(0)]
    pub node: NodeAddress,
    #[n(1)]
    pub ports: Vec<Port>,
}

/// A source or sink.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub(crate) struct Port {
    #[cbor(n(0), with = "id")]
    pub id: Uuid,
    #[n(1)]
    pub role: Role,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(index_only)]
pub(crate) enum Role {
    #[n(0)]
    Source,
    #[n(1)]
    Sink,
}

#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub(crate) enum Request {
    /// To the contact: this node is in the channel, with these ports. To join, to change ports, and
    /// to come back with the epoch that it knows.
    #[n(0)]
    Join {
        #[n(0)]
        channel: String,
        #[n(1)]
        participant: Participant,
        #[n(2)]
        epoch: Option<u64>,
    },
    /// To the contact: this node leaves. From the contact, with its epoch: it leaves, and who is asked is the contact.
    #[n(1)]
    Leave {
        #[n(0)]
        channel: String,
        #[n(1)]
        epoch: Option<u64>,
    },
    #[n(2)]
    Destroy {
        #[n(0)]
        channel: String,
    },
    #[n(3)]
    SetFilter {
        #[n(0)]
        channel: String,
        #[cbor(n(1), with = "id")]
        source: Uuid,
        #[cbor(n(2), with = "id")]
        sink: Uuid,
        #[n(3)]
        filter: Option<String>,
    },
    #[n(4)]
    SetState {
        #[n(0)]
        channel: String,
        #[cbor(n(1), with = "id")]
        source: Uuid,
        #[cbor(n(2), with = "id")]
        sink: Uuid,
        #[n(3)]
        name: String,
        #[n(4)]
        value: Value,
    },
    /// To any participant: what it knows of the channel.
    #[n(5)]
    Describe {
        #[n(0)]
        channel: String,
    },
    /// To the registry, again and again.
    #[n(6)]
    Register {
        #[n(0)]
        channel: String,
        #[n(1)]
        contact: NodeAddress,
        #[n(2)]
        epoch: u64,
        /// Only if there is no such channel.
        #[n(3)]
        create: bool,
        /// How long the channel has been there.
        #[n(4)]
        age_ms: u64,
    },
    #[n(7)]
    Lookup {
        #[n(0)]
        channel: String,
    },
    #[n(8)]
    Unregister {
        #[n(0)]
        channel: String,
    },
    /// Names after this one.
    #[n(9)]
    List {
        #[n(0)]
        after: String,
    },
}

#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub(crate) enum Reply {
    #[n(0)]
    Done,
    #[n(1)]
    Refused {
        #[n(0)]
        code: String,
        #[n(1)]
        text: String,
    },
    #[n(2)]
    Joined(#[n(0)] Joined),
    /// Ask this one, if it is known.
    #[n(3)]
    NotContact {
        #[n(0)]
        contact: Option<NodeAddress>,
    },
    #[n(4)]
    Described(#[n(0)] Described),
    #[n(5)]
    Registered {
        #[n(0)]
        ttl_ms: u64,
    },
    #[n(6)]
    Taken {
        #[n(0)]
        contact: NodeAddress,
        #[n(1)]
        epoch: u64,
    },
    #[n(7)]
    Found {
        #[n(0)]
        contact: NodeAddress,
        #[n(1)]
        epoch: u64,
    },
    /// No such channel, as far as a registry knows that has been there for so long.
    #[n(8)]
    Unknown {
        #[n(0)]
        since_ms: u64,
    },
    #[n(9)]
    Channels {
        #[n(0)]
        names: Vec<String>,
    },
}

#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub(crate) struct Joined {
    #[n(0)]
    pub epoch: u64,
    /// The number of who has joined.
    #[n(1)]
    pub number: u32,
    #[n(2)]
    pub options: ChannelOptions,
    #[n(3)]
    pub participants: Vec<(u32, Participant)>,
    /// Whether it was in the list before.
    #[n(4)]
    pub known: bool,
}

#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub(crate) struct Described {
    #[n(0)]
    pub epoch: u64,
    #[n(1)]
    pub contact: NodeAddress,
    #[n(2)]
    pub participants: Vec<(u32, Participant)>,
    /// Of the sources of who answers.
    #[n(3)]
    pub sources: Vec<Counted>,
}

#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub(crate) struct Counted {
    #[cbor(n(0), with = "id")]
    pub source: Uuid,
    /// Attached sinks, by the way to them.
    #[n(1)]
    pub sinks: Vec<(Way, u32)>,
    /// What the slowest of them has not read yet, in bytes.
    #[n(2)]
    pub behind: u64,
    #[n(3)]
    pub counters: SourceCounters,
}

#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub(crate) enum Notice {
    /// From the contact: a participant came, changed or, without one, went.
    #[n(0)]
    Changed {
        #[n(0)]
        channel: String,
        #[n(1)]
        epoch: u64,
        #[n(2)]
        number: u32,
        #[n(3)]
        participant: Option<Participant>,
    },
    #[n(1)]
    Destroyed {
        #[n(0)]
        channel: String,
    },
    /// From who was the contact: this is it now.
    #[n(2)]
    Moved {
        #[n(0)]
        channel: String,
        #[n(1)]
        contact: NodeAddress,
        #[n(2)]
        epoch: u64,
    },
}

/// What can be read from a frame and keeps to its bounds.
pub(crate) trait Message: for<'b> Decode<'b, ()> {
    fn is_sane(&self) -> bool;
}

impl Message for Hello {
    fn is_sane(&self) -> bool {
        self.boot.len() <= MAX_BOOT_BYTES
    }
}

impl Message for Answer {
    fn is_sane(&self) -> bool {
        true
    }
}

impl Message for Envelope {
    fn is_sane(&self) -> bool {
        let participant = |p: &Participant| p.node.is_sane() && p.ports.len() <= MAX_PORTS;
        match &self.body {
            Body::Request(Request::Join {
                channel,
                participant: p,
                ..
            }) => is_channel_name(channel) && participant(p),
            Body::Request(Request::Register {
                channel, contact, ..
            }) => is_channel_name(channel) && contact.is_sane(),
            Body::Notice(Notice::Changed {
                participant: Some(p),
                ..
            }) => participant(p),
            Body::Notice(Notice::Moved { contact, .. })
            | Body::Reply(Reply::Taken { contact, .. } | Reply::Found { contact, .. }) => {
                contact.is_sane()
            }
            Body::Reply(Reply::Joined(joined)) => {
                joined.participants.len() <= MAX_PARTICIPANTS
                    && joined.participants.iter().all(|(_, p)| participant(p))
            }
            _ => true,
        }
    }
}

/// Reads what is in a frame, which may be anybody's.
pub(crate) fn decode<M: Message>(bytes: &[u8]) -> io::Result<M> {
    let malformed = |error: String| io::Error::new(io::ErrorKind::InvalidData, error);
    let message: M = minicbor::decode(bytes).map_err(|error| malformed(error.to_string()))?;
    match message.is_sane() {
        true => Ok(message),
        false => Err(malformed("a message beyond its bounds".to_owned())),
    }
}

/// The frame of a message.
pub(crate) fn frame<M: Encode<()>>(message: &M) -> io::Result<Vec<u8>> {
    let mut out = vec![0; 4];
    minicbor::encode(message, &mut out).map_err(|error| io::Error::other(error.to_string()))?;
    let bytes = out.len() - 4;
    if bytes > MAX_FRAME_BYTES {
        return Err(io::Error::other(format!(
            "a frame of {bytes} bytes: at most {MAX_FRAME_BYTES}"
        )));
    }
    out[..4].copy_from_slice(&(bytes as u32).to_be_bytes());
    Ok(out)
}

/// Reads a frame and nothing beyond it.
pub(crate) async fn read<M: Message>(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<M> {
    let mut length = [0; 4];
    stream.read_exact(&mut length).await?;
    let length = u32::from_be_bytes(length) as usize;
    if length > MAX_FRAME_BYTES {
        let error = format!("a frame of {length} bytes: at most {MAX_FRAME_BYTES}");
        return Err(io::Error::new(io::ErrorKind::InvalidData, error));
    }
    // It grows with what really comes.
    let mut bytes = Vec::new();
    if stream.take(length as u64).read_to_end(&mut bytes).await? < length {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    decode(&bytes)
}

/// Writes a message as a frame.
pub(crate) async fn write<M: Encode<()>>(
    stream: &mut (impl AsyncWrite + Unpin),
    message: &M,
) -> io::Result<()> {
    stream.write_all(&frame(message)?).await?;
    stream.flush().await
}

/// Tries to read bytes as each kind of message, for fuzzing.
#[doc(hidden)]
pub fn probe(bytes: &[u8]) {
    fn again<M: Message + Encode<()> + PartialEq + std::fmt::Debug>(bytes: &[u8]) {
        // Where floats are not equal to themselves, their bytes are.
        if let Ok(message) = decode::<M>(bytes)
            && let Ok(frame) = frame(&message)
            && let Ok(second) = decode::<M>(&frame[4..])
        {
            assert_eq!(frame.get(4..), frame_body(&second).as_deref());
        }
    }
    fn frame_body<M: Encode<()>>(message: &M) -> Option<Vec<u8>> {
        frame(message).ok().map(|frame| frame[4..].to_vec())
    }
    again::<Hello>(bytes);
    again::<Answer>(bytes);
    again::<Envelope>(bytes);
}
