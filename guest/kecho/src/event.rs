//! How an event lies in a log and on the wire.
//!
//! Little endian; an event's bytes begin with
//!
//! | bytes | what |
//! |---|---|
//! | 8 | sequence: the source's events are counted from 0 |
//! | 8 | the type's [`id`](crate::EventType::id) |
//! | 4 | bytes of all attributes |
//! | 4 | bytes of the payload |
//!
//! and go on with the attributes, then the payload. An attribute is the length of its name (1
//! byte), its name, what it is (1 byte) and its value: a byte for yes or no, 8 bytes for a number, a
//! length of 2 bytes and the bytes for text and bytes.

use crate::types::{EventType, is_name};
use crate::value::{MAX_TEXT_BYTES, Value, ValueRef};

/// Bytes before the attributes.
pub const FIXED_BYTES: usize = 24;
/// The most attributes of an event.
pub const MAX_ATTRIBUTES: usize = 64;

/// What is wrong with an event.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum EventError {
    /// Attributes beyond the bounds.
    #[error("{0} attributes: an event has at most {MAX_ATTRIBUTES}")]
    TooMany(usize),
    /// An attribute's name that is none.
    #[error(
        "an attribute cannot be called '{0}': ASCII letters, digits, '_', '-', '.', at most 64"
    )]
    Name(String),
    /// An attribute's value that is too long.
    #[error("the attribute '{name}' has {bytes} bytes: at most {MAX_TEXT_BYTES}")]
    Long {
        /// Its name.
        name: String,
        /// How many bytes it has.
        bytes: usize,
    },
    /// A payload that is too short for the type's fields.
    #[error("a payload of {payload} bytes; the fields of '{kind}' take {fields}")]
    Short {
        /// The type.
        kind: String,
        /// What its fields take.
        fields: usize,
        /// What there is.
        payload: usize,
    },
    /// An event that the log of the source does not take.
    #[error("an event of {bytes} bytes; this source takes at most {limit}: give it a larger log")]
    TooLarge {
        /// Its bytes.
        bytes: usize,
        /// The most.
        limit: usize,
    },
    /// Bytes that are no event.
    #[error("these bytes are no event: {0}")]
    Malformed(&'static str),
}

impl EventError {
    /// A stable name for programs.
    pub fn code(&self) -> &'static str {
        match self {
            EventError::TooMany(_) => "event-attributes",
            EventError::Name(_) => "event-attribute-name",
            EventError::Long { .. } => "event-attribute-too-large",
            EventError::Short { .. } => "event-too-short",
            EventError::TooLarge { .. } => "event-too-large",
            EventError::Malformed(_) => "event-malformed",
        }
    }
}

/// An event to submit.
#[derive(Debug, Clone, Copy)]
pub struct Submission<'a> {
    /// Its type.
    pub kind: &'a EventType,
    /// Names and values beside the payload.
    pub attributes: &'a [(&'a str, Value)],
    /// The payload, which begins with the type's fields.
    pub payload: &'a [u8],
}

impl Submission<'_> {
    /// How many bytes the event takes.
    ///
    /// # Errors
    /// What is wrong with the submission.
    pub fn size(&self) -> Result<usize, EventError> {
        if self.payload.len() < self.kind.size() {
            return Err(EventError::Short {
                kind: self.kind.name().to_owned(),
                fields: self.kind.size(),
                payload: self.payload.len(),
            });
        }
        if self.attributes.len() > MAX_ATTRIBUTES {
            return Err(EventError::TooMany(self.attributes.len()));
        }
        let mut size = FIXED_BYTES + self.payload.len();
        for (name, value) in self.attributes {
            if !is_name(name) {
                return Err(EventError::Name((*name).to_owned()));
            }
            let bytes = value_bytes(value);
            if bytes > MAX_TEXT_BYTES + 2 {
                let (name, bytes) = ((*name).to_owned(), bytes - 2);
                return Err(EventError::Long { name, bytes });
            }
            size += 2 + name.len() + bytes;
        }
        Ok(size)
    }

    /// Hands the event's bytes to `put`, piece by piece. [`Submission::size`] has said that all is well.
    pub fn encode(&self, sequence: u64, mut put: impl FnMut(&[u8])) {
        let attributes = self.attributes.iter();
        let attributes = attributes.map(|(name, value)| 2 + name.len() + value_bytes(value));
        let mut fixed = [0; FIXED_BYTES];
        fixed[..8].copy_from_slice(&sequence.to_le_bytes());
        fixed[8..16].copy_from_slice(&self.kind.id().to_le_bytes());
        fixed[16..20].copy_from_slice(&(attributes.sum::<usize>() as u32).to_le_bytes());
        fixed[20..].copy_from_slice(&(self.payload.len() as u32).to_le_bytes());
        put(&fixed);
        for (name, value) in self.attributes {
            put(&[name.len() as u8]);
            put(name.as_bytes());
            match value {
                Value::Bool(v) => put(&[BOOL, (*v).into()]),
                Value::Int(v) => {
                    put(&[INT]);
                    put(&v.to_le_bytes());
                }
                Value::Float(v) => {
                    put(&[FLOAT]);
                    put(&v.to_le_bytes());
                }
                Value::Text(v) => {
                    put(&[TEXT]);
                    put(&(v.len() as u16).to_le_bytes());
                    put(v.as_bytes());
                }
                Value::Bytes(v) => {
                    put(&[BYTES]);
                    put(&(v.len() as u16).to_le_bytes());
                    put(v);
                }
            }
        }
        put(self.payload);
    }
}

const BOOL: u8 = 0;
const INT: u8 = 1;
const FLOAT: u8 = 2;
const TEXT: u8 = 3;
const BYTES: u8 = 4;

/// Bytes of a value in an attribute.
fn value_bytes(value: &Value) -> usize {
    match value {
        Value::Bool(_) => 1,
        Value::Int(_) | Value::Float(_) => 8,
        Value::Text(v) => 2 + v.len(),
        Value::Bytes(v) => 2 + v.len(),
    }
}

/// An event, seen in bytes that may be anybody's.
#[derive(Debug, Clone, Copy)]
pub struct EventRef<'a> {
    sequence: u64,
    kind: &'a EventType,
    attributes: &'a [u8],
    payload: &'a [u8],
}

impl<'a> EventRef<'a> {
    /// The id of the type of the event in `bytes`.
    pub fn type_id(bytes: &[u8]) -> Option<u64> {
        Some(u64::from_le_bytes(*bytes.get(8..16)?.first_chunk()?))
    }

    /// The event in `bytes`, which is of this type.
    ///
    /// # Errors
    /// [`EventError::Malformed`]. Of the attributes only their bounds are looked at here: one that
    /// is none, and all that follow it, are not found later.
    #[inline]
    pub fn parse(bytes: &'a [u8], kind: &'a EventType) -> Result<EventRef<'a>, EventError> {
        let short = EventError::Malformed("too short");
        let fixed: &[u8; FIXED_BYTES] = bytes.first_chunk().ok_or(short)?;
        let number = |at: usize| {
            u32::from_le_bytes([fixed[at], fixed[at + 1], fixed[at + 2], fixed[at + 3]]) as usize
        };
        let (attributes, payload) = (number(16), number(20));
        if attributes.checked_add(payload) != Some(bytes.len() - FIXED_BYTES) {
            return Err(EventError::Malformed(
                "its parts are not as long as the whole",
            ));
        }
        if payload < kind.size() {
            return Err(EventError::Malformed(
                "the payload is shorter than the type's fields",
            ));
        }
        if EventRef::type_id(bytes) != Some(kind.id()) {
            return Err(EventError::Malformed("it is of another type"));
        }
        let (attributes, payload) = bytes[FIXED_BYTES..].split_at(attributes);
        let sequence = u64::from_le_bytes(*fixed.first_chunk().unwrap_or(&[0; 8]));
        Ok(EventRef {
            sequence,
            kind,
            attributes,
            payload,
        })
    }

    /// The event in `bytes`, which [`EventRef::parse`] has found to be one of this type.
    pub(crate) fn parse_checked(bytes: &'a [u8], kind: &'a EventType) -> EventRef<'a> {
        let (fixed, rest) = bytes.split_at(FIXED_BYTES);
        let number = |at: usize| {
            u32::from_le_bytes([fixed[at], fixed[at + 1], fixed[at + 2], fixed[at + 3]]) as usize
        };
        let (attributes, payload) = rest.split_at(number(16));
        let sequence = fixed
            .first_chunk()
            .map_or(0, |bytes| u64::from_le_bytes(*bytes));
        EventRef {
            sequence,
            kind,
            attributes,
            payload,
        }
    }

    /// Its number among the source's events, which are counted from 0.
    pub fn sequence(&self) -> u64 {
        self.sequence
    }

    /// Its type.
    pub fn kind(&self) -> &'a EventType {
        self.kind
    }

    /// The payload, the type's fields first.
    pub fn payload(&self) -> &'a [u8] {
        self.payload
    }

    /// The value of a field.
    pub fn field(&self, name: &str) -> Option<ValueRef<'a>> {
        let field = self.kind.field(name)?;
        let bytes = self
            .payload
            .get(field.offset..field.offset + field.kind.size())?;
        field.kind.read(bytes)
    }

    /// The value of an attribute, the first of that name.
    pub fn attribute(&self, name: &str) -> Option<ValueRef<'a>> {
        self.find_attribute(name).1
    }

    /// The value of an attribute, and how many were looked at.
    #[inline]
    pub(crate) fn find_attribute(&self, name: &str) -> (usize, Option<ValueRef<'a>>) {
        let mut rest = self.attributes;
        for looked in 1..=MAX_ATTRIBUTES {
            let Some(found) = take(&mut rest) else {
                return (looked, None);
            };
            if found.0 == name.as_bytes() {
                return (looked, value(found.1, found.2));
            }
        }
        (MAX_ATTRIBUTES, None)
    }

    /// All attributes that are ones.
    pub fn attributes(&self) -> impl Iterator<Item = (&'a str, ValueRef<'a>)> + use<'a> {
        let mut rest = self.attributes;
        std::iter::from_fn(move || {
            let (name, kind, bytes) = take(&mut rest)?;
            Some((std::str::from_utf8(name).ok()?, value(kind, bytes)?))
        })
        .take(MAX_ATTRIBUTES)
    }
}

/// Takes one attribute off: its name, what it is, and the bytes of its value.
#[inline]
fn take<'a>(rest: &mut &'a [u8]) -> Option<(&'a [u8], u8, &'a [u8])> {
    let (&length, after) = rest.split_first()?;
    let (name, after) = after.split_at_checked(length.into())?;
    let (&kind, after) = after.split_first()?;
    let (length, after) = match kind {
        BOOL => (1, after),
        INT | FLOAT => (8, after),
        TEXT | BYTES => {
            let (length, after) = after.split_first_chunk()?;
            (u16::from_le_bytes(*length).into(), after)
        }
        _ => return None,
    };
    let (bytes, after) = after.split_at_checked(length)?;
    *rest = after;
    Some((name, kind, bytes))
}

fn value(kind: u8, bytes: &[u8]) -> Option<ValueRef<'_>> {
    Some(match kind {
        BOOL => ValueRef::Bool(*bytes.first()? != 0),
        INT => ValueRef::Int(i64::from_le_bytes(bytes.try_into().ok()?)),
        FLOAT => ValueRef::Float(f64::from_le_bytes(bytes.try_into().ok()?)),
        TEXT => ValueRef::Text(std::str::from_utf8(bytes).ok()?),
        _ => ValueRef::Bytes(bytes),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::types::FieldKind;

    fn bytes(event: &Submission<'_>, sequence: u64) -> Vec<u8> {
        let mut out = Vec::new();
        event.encode(sequence, |piece| out.extend_from_slice(piece));
        assert_eq!(out.len(), event.size().unwrap());
        out
    }

    #[test]
    fn an_event_is_read_as_it_was_written() {
        let kind = EventType::new("load", 1, [("cpu", FieldKind::F64)]).unwrap();
        let mut payload = kind.payload(&[Value::Float(0.5)]).unwrap();
        payload.extend(b"more");
        let attributes = [
            ("node", Value::from("a")),
            ("n", Value::Int(-3)),
            ("ok", Value::Bool(true)),
            ("raw", Value::Bytes(vec![1, 2])),
        ];
        let event = Submission {
            kind: &kind,
            attributes: &attributes,
            payload: &payload,
        };
        let bytes = bytes(&event, 7);
        let read = EventRef::parse(&bytes, &kind).unwrap();
        assert_eq!(read.sequence(), 7);
        assert_eq!(read.payload(), payload);
        assert_eq!(read.field("cpu"), Some(ValueRef::Float(0.5)));
        assert_eq!(read.field("none"), None);
        assert_eq!(read.attribute("ok"), Some(ValueRef::Bool(true)));
        assert_eq!(read.attribute("none"), None);
        let all: Vec<_> = read
            .attributes()
            .map(|(name, v)| (name, v.to_value()))
            .collect();
        assert_eq!(all, attributes);
    }

    #[test]
    fn what_is_too_much_is_refused_before_it_is_sent() {
        let kind = EventType::new("t", 1, [("a", FieldKind::U64)]).unwrap();
        let short = Submission {
            kind: &kind,
            attributes: &[],
            payload: &[1],
        };
        let error = short.size().unwrap_err().to_string();
        assert_eq!(error, "a payload of 1 bytes; the fields of 't' take 8");
        let long = [("x", Value::Text("x".repeat(MAX_TEXT_BYTES + 1)))];
        let long = Submission {
            kind: &kind,
            attributes: &long,
            payload: &[0; 8],
        };
        assert!(matches!(
            long.size(),
            Err(EventError::Long { bytes: 4097, .. })
        ));
        let many = vec![("x", Value::Bool(true)); MAX_ATTRIBUTES + 1];
        let many = Submission {
            kind: &kind,
            attributes: &many,
            payload: &[0; 8],
        };
        assert_eq!(many.size(), Err(EventError::TooMany(65)));
        assert_eq!(many.size().unwrap_err().code(), "event-attributes");
    }

    proptest! {
        #[test]
        fn no_bytes_are_too_strange(bytes: Vec<u8>, attributes: Vec<u8>) {
            let kind = EventType::raw("t").unwrap();
            let _ = EventRef::parse(&bytes, &kind);
            let mut framed = vec![0; 8];
            framed.extend(kind.id().to_le_bytes());
            framed.extend((attributes.len() as u32).to_le_bytes());
            framed.extend(0u32.to_le_bytes());
            framed.extend(&attributes);
            let event = EventRef::parse(&framed, &kind).unwrap();
            prop_assert!(event.attributes().count() <= MAX_ATTRIBUTES);
            let _ = event.attribute("x");
        }
    }
}
