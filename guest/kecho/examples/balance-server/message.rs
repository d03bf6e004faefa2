//! What servers tell each other, and how it is an event.

use xbee_kecho::balance::{RequestId, ServerId};
use xbee_kecho::value::{Value, ValueRef};
use xbee_kecho::{EventRef, EventType, FieldKind, TypeError};

/// The attribute that says who gets an event: 8 bytes a server, little endian. Without it all get it.
pub const TO: &str = "to";

/// What servers tell each other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// A client asks for this path.
    Request(RequestId, String),
    /// Nobody waits for its answer any more.
    Cancel(RequestId),
    /// An answer, and whose.
    Answer(RequestId, ServerId, String),
    /// This server has no room for it.
    Refused(RequestId, ServerId),
    /// So many requests are in this server.
    Load(ServerId, u32),
}

/// The types of the events.
#[derive(Debug)]
pub struct Types {
    request: EventType,
    cancel: EventType,
    answer: EventType,
    refused: EventType,
    load: EventType,
}

impl Types {
    /// All of them.
    ///
    /// # Errors
    /// None, unless a name here is wrong.
    pub fn new() -> Result<Types, TypeError> {
        let id = [("front", FieldKind::U64), ("number", FieldKind::U64)];
        let from = [id[0], id[1], ("server", FieldKind::U64)];
        let load = [("server", FieldKind::U64), ("load", FieldKind::U32)];
        Ok(Types {
            // The path follows the fields.
            request: EventType::new("request", 1, id)?,
            cancel: EventType::new("cancel", 1, id)?,
            // The body follows the fields.
            answer: EventType::new("answer", 1, from)?,
            refused: EventType::new("refused", 1, from)?,
            load: EventType::new("load", 1, load)?,
        })
    }

    /// The type of a message and its payload.
    ///
    /// # Errors
    /// None, unless the fields here are wrong.
    pub fn encode(&self, message: &Message) -> Result<(&EventType, Vec<u8>), TypeError> {
        // As a field of 64 bits takes it.
        let int = |number: u64| Value::Int(number.cast_signed());
        let id = |id: &RequestId| [int(id.front.0), int(id.number)];
        let from = |id: &RequestId, from: &ServerId| [int(id.front.0), int(id.number), int(from.0)];
        let (kind, mut payload, text) = match message {
            Message::Request(request, path) => {
                let kind = &self.request;
                (kind, kind.payload(&id(request))?, path.as_str())
            }
            Message::Cancel(request) => (&self.cancel, self.cancel.payload(&id(request))?, ""),
            Message::Answer(request, server, body) => {
                let kind = &self.answer;
                (kind, kind.payload(&from(request, server))?, body.as_str())
            }
            Message::Refused(request, server) => {
                let kind = &self.refused;
                (kind, kind.payload(&from(request, server))?, "")
            }
            Message::Load(server, load) => {
                let values = [int(server.0), Value::Int(i64::from(*load))];
                (&self.load, self.load.payload(&values)?, "")
            }
        };
        payload.extend_from_slice(text.as_bytes());
        Ok((kind, payload))
    }

    /// The message in an event; `None` where it is none.
    pub fn decode(&self, event: &EventRef<'_>) -> Option<Message> {
        let number = |name| match event.field(name)? {
            ValueRef::Int(number) => Some(number.cast_unsigned()),
            _ => None,
        };
        let server = |name| number(name).map(ServerId);
        let id = || {
            let (front, number) = (server("front")?, number("number")?);
            Some(RequestId { front, number })
        };
        let kind = event.kind();
        let text = || {
            let text = event.payload().get(kind.size()..)?;
            Some(std::str::from_utf8(text).ok()?.to_owned())
        };
        let is = |one: &EventType| kind.id() == one.id();
        Some(if is(&self.request) {
            Message::Request(id()?, text()?)
        } else if is(&self.cancel) {
            Message::Cancel(id()?)
        } else if is(&self.answer) {
            Message::Answer(id()?, server("server")?, text()?)
        } else if is(&self.refused) {
            Message::Refused(id()?, server("server")?)
        } else if is(&self.load) {
            Message::Load(server("server")?, u32::try_from(number("load")?).ok()?)
        } else {
            return None;
        })
    }
}

/// The value of the attribute [`TO`].
pub fn address(to: &[ServerId]) -> Value {
    let bytes: Vec<u8> = to
        .iter()
        .flat_map(|server| server.0.to_le_bytes())
        .collect();
    Value::Bytes(bytes)
}

/// Whether an event is for a server.
pub fn is_for(event: &EventRef<'_>, server: ServerId) -> bool {
    match event.attribute(TO) {
        None => true,
        Some(ValueRef::Bytes(to)) => (to.chunks_exact(8)).any(|one| one == server.0.to_le_bytes()),
        Some(_) => false,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use xbee_kecho::Submission;

    use super::*;

    #[test]
    fn messages_are_events_and_back() {
        let types = Types::new().unwrap();
        let request = RequestId {
            front: ServerId(u64::MAX),
            number: 1 << 40,
        };
        let server = ServerId(0x8000_0000_0000_0001);
        for message in [
            Message::Request(request, "/a/b?c=ü".into()),
            Message::Cancel(request),
            Message::Answer(request, server, "a body\n".into()),
            Message::Answer(request, server, String::new()),
            Message::Refused(request, server),
            Message::Load(server, u32::MAX),
        ] {
            let (kind, payload) = types.encode(&message).unwrap();
            let to = [server, ServerId(2)];
            let submission = Submission {
                kind,
                attributes: &[(TO, address(&to))],
                payload: &payload,
            };
            let mut bytes = vec![];
            submission.encode(0, |part| bytes.extend_from_slice(part));
            let event = EventRef::parse(&bytes, kind).unwrap();
            assert_eq!(types.decode(&event), Some(message));
            assert!(is_for(&event, server) && is_for(&event, ServerId(2)));
            assert!(!is_for(&event, ServerId(1)));
        }
    }

    #[test]
    fn what_is_no_message_is_none() {
        let types = Types::new().unwrap();
        let other = EventType::raw("request").unwrap();
        let bad_text = [
            types
                .encode(&Message::Cancel(RequestId {
                    front: ServerId(0),
                    number: 0,
                }))
                .unwrap()
                .1,
            vec![0xff],
        ]
        .concat();
        for (kind, payload) in [(&other, &[0; 16][..]), (&types.request, &bad_text)] {
            let submission = Submission {
                kind,
                attributes: &[],
                payload,
            };
            let mut bytes = vec![];
            submission.encode(0, |part| bytes.extend_from_slice(part));
            let event = EventRef::parse(&bytes, kind).unwrap();
            assert_eq!(types.decode(&event), None);
            // Addressed to nobody means to all.
            assert!(is_for(&event, ServerId(1)));
        }
    }
}
