//! What hosts say to each other on the channel, as typed events of bounded size: a question is for all, an offer for who asked.

use uuid::Uuid;
use xbee_kecho::value::ValueRef;
use xbee_kecho::{EventRef, EventType, FieldKind, TypeError, Value};

use super::auction::{Begins, Bid};

/// Attribute of an offer: who asked, as text. Nobody else has it sent.
pub const TO: &str = "to";
/// Attribute of a question: that it is one. All have it sent.
pub const ASKED: &str = "asked";

/// Longest name of an image or a host, bytes.
const NAME_BYTES: u16 = 128;
/// Longest address of an `xbed`, bytes.
pub const SERVER_BYTES: u16 = 255;
/// Longest reason, and all names of the hosts that a job may run on, bytes.
const TEXT_BYTES: u16 = 1024;
/// Bytes of an id.
const ID_BYTES: u16 = 16;
/// Between the names of hosts.
const SEPARATOR: char = '\n';

/// What a task needs of a host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Needs {
    /// The image of the store; `None` if it brings its own.
    pub image: Option<String>,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Memory, bytes.
    pub memory_bytes: u64,
    /// Names of the hosts that it may run on; empty: all.
    pub hosts: Vec<String>,
}

/// Who could run this?
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// One of a kind.
    pub id: Uuid,
    /// Who asks.
    pub asker: Uuid,
    /// What is asked for.
    pub needs: Needs,
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Offer {
    /// To which question.
    pub question: Uuid,
    /// To whom.
    pub asker: Uuid,
    /// The boot of the machine that this host is, as the kernel names it: paths of sockets mean something there only.
    pub machine: Uuid,
    /// What is offered.
    pub bid: Bid,
}

/// Anything that is said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// To all.
    Question(Question),
    /// To one.
    Offer(Offer),
}

/// Why an event says nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadMessage {
    /// Of another type, or another version.
    #[error("its type is not known")]
    Kind,
    /// A field is not what it should be.
    #[error("its field {0} is not as it should be")]
    Field(&'static str),
}

/// A message as an event.
#[derive(Debug)]
pub struct Written<'a> {
    /// Its type.
    pub kind: &'a EventType,
    /// By which it is decided who has it sent.
    pub attribute: (&'static str, Value),
    /// Its fields.
    pub payload: Vec<u8>,
}

/// The types of the events.
#[derive(Debug)]
pub struct Kinds {
    /// Of questions.
    pub question: EventType,
    /// Of offers.
    pub offer: EventType,
}

impl Kinds {
    /// Version 1.
    ///
    /// # Errors
    /// None, unless the types here are wrong.
    pub fn new() -> Result<Kinds, TypeError> {
        let question = [
            ("id", FieldKind::Bytes(ID_BYTES)),
            ("asker", FieldKind::Bytes(ID_BYTES)),
            ("image", FieldKind::Text(NAME_BYTES)),
            ("vcpus", FieldKind::U32),
            ("memory_bytes", FieldKind::U64),
            ("hosts", FieldKind::Text(TEXT_BYTES)),
        ];
        let offer = [
            ("question", FieldKind::Bytes(ID_BYTES)),
            ("asker", FieldKind::Bytes(ID_BYTES)),
            ("machine", FieldKind::Bytes(ID_BYTES)),
            ("server", FieldKind::Text(SERVER_BYTES)),
            ("host", FieldKind::Text(NAME_BYTES)),
            ("begins", FieldKind::U8),
            ("waiting", FieldKind::U32),
            ("load_permille", FieldKind::U32),
            ("free_vcpus", FieldKind::U32),
            ("free_memory_bytes", FieldKind::U64),
            ("why", FieldKind::Text(TEXT_BYTES)),
        ];
        Ok(Kinds {
            question: EventType::new("xbee.question", 1, question)?,
            offer: EventType::new("xbee.offer", 1, offer)?,
        })
    }

    /// Type, attribute and payload of what is to be said.
    ///
    /// # Errors
    /// A name is longer than there is room for.
    pub fn write(&self, message: &Message) -> Result<Written<'_>, TypeError> {
        match message {
            Message::Question(question) => {
                let needs = &question.needs;
                let payload = self.question.payload(&[
                    id(question.id),
                    id(question.asker),
                    needs.image.as_deref().unwrap_or_default().into(),
                    Value::Int(needs.vcpus.into()),
                    Value::Int(needs.memory_bytes.cast_signed()),
                    needs.hosts.join(&SEPARATOR.to_string()).into(),
                ])?;
                Ok(Written {
                    kind: &self.question,
                    attribute: (ASKED, true.into()),
                    payload,
                })
            }
            Message::Offer(offer) => {
                let bid = &offer.bid;
                let payload = self.offer.payload(&[
                    id(offer.question),
                    id(offer.asker),
                    id(offer.machine),
                    bid.server.as_str().into(),
                    cut(&bid.host, NAME_BYTES).into(),
                    Value::Int(match bid.begins {
                        Begins::Never => 0,
                        Begins::Later => 1,
                        Begins::AtOnce => 2,
                    }),
                    Value::Int(bid.waiting.into()),
                    Value::Int(bid.load_permille.into()),
                    Value::Int(bid.free_vcpus.into()),
                    Value::Int(bid.free_memory_bytes.cast_signed()),
                    cut(&bid.why, TEXT_BYTES).into(),
                ])?;
                let to = (TO, offer.asker.to_string().into());
                Ok(Written {
                    kind: &self.offer,
                    attribute: to,
                    payload,
                })
            }
        }
    }

    /// Reads what was said, by whomever.
    ///
    /// # Errors
    /// [`BadMessage`].
    pub fn read(&self, event: &EventRef<'_>) -> Result<Message, BadMessage> {
        let fields = Fields(event);
        if *event.kind() == self.question {
            let image = fields.text("image")?;
            let hosts = fields.any_text("hosts")?.split(SEPARATOR);
            return Ok(Message::Question(Question {
                id: fields.id("id")?,
                asker: fields.id("asker")?,
                needs: Needs {
                    image: (!image.is_empty()).then(|| image.to_owned()),
                    vcpus: fields.number("vcpus")?,
                    memory_bytes: fields.int("memory_bytes")?.cast_unsigned(),
                    hosts: hosts
                        .filter(|host| !host.is_empty())
                        .map(str::to_owned)
                        .collect(),
                },
            }));
        }
        if *event.kind() != self.offer {
            return Err(BadMessage::Kind);
        }
        Ok(Message::Offer(Offer {
            question: fields.id("question")?,
            asker: fields.id("asker")?,
            machine: fields.id("machine")?,
            bid: Bid {
                server: fields.text("server")?.to_owned(),
                host: fields.text("host")?.to_owned(),
                begins: match fields.int("begins")? {
                    0 => Begins::Never,
                    1 => Begins::Later,
                    2 => Begins::AtOnce,
                    _ => return Err(BadMessage::Field("begins")),
                },
                waiting: fields.number("waiting")?,
                load_permille: fields.number("load_permille")?,
                free_vcpus: fields.number("free_vcpus")?,
                free_memory_bytes: fields.int("free_memory_bytes")?.cast_unsigned(),
                why: fields.text("why")?.to_owned(),
            },
        }))
    }
}

fn id(id: Uuid) -> Value {
    Value::Bytes(id.as_bytes().to_vec())
}

/// The beginning of a text that is for people.
fn cut(text: &str, bytes: u16) -> &str {
    let mut end = text.len().min(bytes.into());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

struct Fields<'a>(&'a EventRef<'a>);

impl<'a> Fields<'a> {
    fn any_text(&self, name: &'static str) -> Result<&'a str, BadMessage> {
        match self.0.field(name) {
            Some(ValueRef::Text(text)) => Ok(text),
            _ => Err(BadMessage::Field(name)),
        }
    }

    /// Text that can be shown.
    fn text(&self, name: &'static str) -> Result<&'a str, BadMessage> {
        let text = self.any_text(name)?;
        match text.contains(char::is_control) {
            true => Err(BadMessage::Field(name)),
            false => Ok(text),
        }
    }

    fn int(&self, name: &'static str) -> Result<i64, BadMessage> {
        match self.0.field(name) {
            Some(ValueRef::Int(number)) => Ok(number),
            _ => Err(BadMessage::Field(name)),
        }
    }

    fn number(&self, name: &'static str) -> Result<u32, BadMessage> {
        let number = self.int(name)?;
        u32::try_from(number).map_err(|_| BadMessage::Field(name))
    }

    fn id(&self, name: &'static str) -> Result<Uuid, BadMessage> {
        match self.0.field(name) {
            Some(ValueRef::Bytes(bytes)) => Uuid::from_slice(bytes).ok(),
            _ => None,
        }
        .ok_or(BadMessage::Field(name))
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;
    use proptest::sample::Index;
    use xbee_kecho::Submission;

    use super::*;

    /// The event as the others have it.
    fn over_the_wire(kinds: &Kinds, message: &Message) -> Result<Message, BadMessage> {
        let Written {
            kind,
            attribute,
            payload,
        } = kinds.write(message).unwrap();
        let bytes = bytes(kind, attribute, &payload);
        kinds.read(&EventRef::parse(&bytes, kind).unwrap())
    }

    fn bytes(kind: &EventType, attribute: (&'static str, Value), payload: &[u8]) -> Vec<u8> {
        let submission = Submission {
            kind,
            attributes: &[attribute],
            payload,
        };
        submission.size().unwrap();
        let mut bytes = vec![];
        submission.encode(0, |piece| bytes.extend_from_slice(piece));
        bytes
    }

    fn question() -> Message {
        Message::Question(Question {
            id: Uuid::from_u128(1),
            asker: Uuid::from_u128(2),
            needs: Needs {
                image: Some("server".into()),
                vcpus: 3,
                memory_bytes: u64::MAX,
                hosts: vec!["a".into(), "b".into()],
            },
        })
    }

    fn offer(why: &str) -> Message {
        Message::Offer(Offer {
            question: Uuid::from_u128(1),
            asker: Uuid::from_u128(2),
            machine: Uuid::from_u128(3),
            bid: Bid {
                server: "stomp://h/q".into(),
                host: "h".into(),
                begins: Begins::Later,
                waiting: 7,
                load_permille: 1000,
                free_vcpus: 1,
                free_memory_bytes: 1 << 40,
                why: why.into(),
            },
        })
    }

    #[test]
    fn what_is_said_is_heard() {
        let kinds = Kinds::new().unwrap();
        for message in [question(), offer("")] {
            assert_eq!(over_the_wire(&kinds, &message), Ok(message));
        }
        let Message::Question(mut bare) = question() else {
            unreachable!()
        };
        bare.needs.image = None;
        bare.needs.hosts.clear();
        let bare = Message::Question(bare);
        assert_eq!(over_the_wire(&kinds, &bare), Ok(bare));
        // An offer is for one, and says for whom.
        let attribute = kinds.write(&offer("")).unwrap().attribute;
        assert_eq!(attribute, (TO, Uuid::from_u128(2).to_string().into()));
    }

    #[test]
    fn what_is_too_long_is_cut_where_it_is_for_people_and_refused_where_it_is_not() {
        let kinds = Kinds::new().unwrap();
        let long = "ä".repeat(600);
        let Ok(Message::Offer(heard)) = over_the_wire(&kinds, &offer(&format!("x{long}"))) else {
            unreachable!()
        };
        assert_eq!(heard.bid.why.len(), 1023);
        let Message::Question(mut question) = question() else {
            unreachable!()
        };
        question.needs.image = Some("i".repeat(129));
        assert!(kinds.write(&Message::Question(question)).is_err());
    }

    #[test]
    fn what_is_no_message_is_none() {
        let kinds = Kinds::new().unwrap();
        let read = |message: Message| over_the_wire(&kinds, &message);
        assert_eq!(read(offer("\u{1b}[2J")), Err(BadMessage::Field("why")));
        let Written {
            kind,
            attribute,
            mut payload,
        } = kinds.write(&offer("")).unwrap();
        payload[kind.field("begins").unwrap().offset] = 3;
        let bytes = bytes(kind, attribute, &payload);
        let event = EventRef::parse(&bytes, kind).unwrap();
        assert_eq!(kinds.read(&event), Err(BadMessage::Field("begins")));
        let other = EventType::new("xbee.offer", 2, [("a", FieldKind::U8)]).unwrap();
        let bytes = self::bytes(&other, (TO, true.into()), &[0]);
        let event = EventRef::parse(&bytes, &other).unwrap();
        assert_eq!(kinds.read(&event), Err(BadMessage::Kind));
    }

    proptest! {
        #[test]
        fn anything_is_read_or_refused(changes in vec((any::<Index>(), any::<u8>()), 0..20)) {
            let kinds = Kinds::new().unwrap();
            for message in [question(), offer("")] {
                let Written {
                    kind,
                    attribute,
                    mut payload,
                } = kinds.write(&message).unwrap();
                for (at, byte) in &changes {
                    payload[at.index(kind.size())] = *byte;
                }
                let bytes = bytes(kind, attribute, &payload);
                let event = EventRef::parse(&bytes, kind).unwrap();
                if let Ok(message) = kinds.read(&event) {
                    prop_assert_eq!(over_the_wire(&kinds, &message), Ok(message));
                }
            }
        }
    }
}
