//! Types of events: a name, a version, and the layout of the fields at the payload's beginning.
//!
//! Fields lie one after the other without gaps, little endian; what follows them in a payload is
//! the event's own affair. Two descriptors that differ in anything have different [`EventType::id`]s.

use minicbor::{Decode, Encode};

use crate::value::{Value, ValueRef};

/// The longest name of a type, a field, an attribute or a state, in bytes.
pub const MAX_NAME_BYTES: usize = 64;
/// The most fields of a type.
pub const MAX_FIELDS: usize = 256;
/// The most bytes of a type's fields.
pub const MAX_FIELDS_BYTES: usize = 64 << 10;

/// What is wrong with a type, or with values for it.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum TypeError {
    /// A name that is none.
    #[error(
        "'{0}' is not a name: 1 to {MAX_NAME_BYTES} ASCII letters, digits, '_', '-' or '.', and a letter or '_' first"
    )]
    Name(String),
    /// Two fields of one name.
    #[error("the field '{0}' is there twice")]
    Twice(String),
    /// Too much of something.
    #[error(
        "a type of {fields} fields and {bytes} bytes: at most {MAX_FIELDS} and {MAX_FIELDS_BYTES}"
    )]
    TooLarge {
        /// How many fields.
        fields: usize,
        /// How many bytes.
        bytes: usize,
    },
    /// Not as many values as fields.
    #[error("{values} values for the {fields} fields of '{kind}'")]
    Count {
        /// The type.
        kind: String,
        /// How many fields it has.
        fields: usize,
        /// How many values there were.
        values: usize,
    },
    /// A value that the field cannot hold.
    #[error("the field '{field}' cannot hold {value}: it is {kind:?}")]
    Value {
        /// The field.
        field: String,
        /// The value.
        value: String,
        /// What the field holds.
        kind: FieldKind,
    },
}

impl TypeError {
    /// A stable name for programs.
    pub fn code(&self) -> &'static str {
        match self {
            TypeError::Name(_) => "type-name",
            TypeError::Twice(_) => "type-field-twice",
            TypeError::TooLarge { .. } => "type-too-large",
            TypeError::Count { .. } => "type-values",
            TypeError::Value { .. } => "type-value",
        }
    }
}

/// What a field holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub enum FieldKind {
    /// One byte, 0 or not.
    #[n(0)]
    Bool,
    /// 8 bits, signed.
    #[n(1)]
    I8,
    /// 16 bits, signed.
    #[n(2)]
    I16,
    /// 32 bits, signed.
    #[n(3)]
    I32,
    /// 64 bits, signed.
    #[n(4)]
    I64,
    /// 8 bits.
    #[n(5)]
    U8,
    /// 16 bits.
    #[n(6)]
    U16,
    /// 32 bits.
    #[n(7)]
    U32,
    /// 64 bits, read as signed: what is beyond `i64::MAX` is negative.
    #[n(8)]
    U64,
    /// IEEE 754, 32 bits.
    #[n(9)]
    F32,
    /// IEEE 754, 64 bits.
    #[n(10)]
    F64,
    /// UTF-8 in so many bytes, filled with zeros.
    #[n(11)]
    Text(#[n(0)] u16),
    /// So many bytes.
    #[n(12)]
    Bytes(#[n(0)] u16),
}

impl FieldKind {
    /// How many bytes of a payload it takes.
    pub const fn size(self) -> usize {
        match self {
            FieldKind::Bool | FieldKind::I8 | FieldKind::U8 => 1,
            FieldKind::I16 | FieldKind::U16 => 2,
            FieldKind::I32 | FieldKind::U32 | FieldKind::F32 => 4,
            FieldKind::I64 | FieldKind::U64 | FieldKind::F64 => 8,
            FieldKind::Text(n) | FieldKind::Bytes(n) => n as usize,
        }
    }

    /// The value in `bytes`, which are as many as [`FieldKind::size`] says; `None` where they are
    /// not, or are no UTF-8.
    #[inline]
    pub fn read(self, bytes: &[u8]) -> Option<ValueRef<'_>> {
        Some(match self {
            FieldKind::Bool => ValueRef::Bool(*bytes.first()? != 0),
            FieldKind::I8 => ValueRef::Int(i8::from_le_bytes(bytes.try_into().ok()?).into()),
            FieldKind::I16 => ValueRef::Int(i16::from_le_bytes(bytes.try_into().ok()?).into()),
            FieldKind::I32 => ValueRef::Int(i32::from_le_bytes(bytes.try_into().ok()?).into()),
            FieldKind::I64 => ValueRef::Int(i64::from_le_bytes(bytes.try_into().ok()?)),
            FieldKind::U8 => ValueRef::Int(u8::from_le_bytes(bytes.try_into().ok()?).into()),
            FieldKind::U16 => ValueRef::Int(u16::from_le_bytes(bytes.try_into().ok()?).into()),
            FieldKind::U32 => ValueRef::Int(u32::from_le_bytes(bytes.try_into().ok()?).into()),
            FieldKind::U64 => ValueRef::Int(i64::from_le_bytes(bytes.try_into().ok()?)),
            FieldKind::F32 => ValueRef::Float(f32::from_le_bytes(bytes.try_into().ok()?).into()),
            FieldKind::F64 => ValueRef::Float(f64::from_le_bytes(bytes.try_into().ok()?)),
            FieldKind::Text(_) => {
                let end = bytes.iter().position(|&b| b == 0).unwrap_or(bytes.len());
                ValueRef::Text(std::str::from_utf8(&bytes[..end]).ok()?)
            }
            FieldKind::Bytes(_) => ValueRef::Bytes(bytes),
        })
    }

    /// Appends `value`; `None` where it does not fit.
    fn write(self, value: &Value, out: &mut Vec<u8>) -> Option<()> {
        match (self, value) {
            (FieldKind::Bool, Value::Bool(v)) => out.push((*v).into()),
            (FieldKind::I8, Value::Int(v)) => out.extend(i8::try_from(*v).ok()?.to_le_bytes()),
            (FieldKind::I16, Value::Int(v)) => out.extend(i16::try_from(*v).ok()?.to_le_bytes()),
            (FieldKind::I32, Value::Int(v)) => out.extend(i32::try_from(*v).ok()?.to_le_bytes()),
            (FieldKind::I64 | FieldKind::U64, Value::Int(v)) => out.extend(v.to_le_bytes()),
            (FieldKind::U8, Value::Int(v)) => out.extend(u8::try_from(*v).ok()?.to_le_bytes()),
            (FieldKind::U16, Value::Int(v)) => out.extend(u16::try_from(*v).ok()?.to_le_bytes()),
            (FieldKind::U32, Value::Int(v)) => out.extend(u32::try_from(*v).ok()?.to_le_bytes()),
            (FieldKind::F32, Value::Float(v)) => out.extend((*v as f32).to_le_bytes()),
            (FieldKind::F64, Value::Float(v)) => out.extend(v.to_le_bytes()),
            (FieldKind::Text(n), Value::Text(v)) => fill(v.as_bytes(), n, out)?,
            (FieldKind::Bytes(n), Value::Bytes(v)) => fill(v, n, out)?,
            _ => return None,
        }
        Some(())
    }
}

/// Appends `bytes` and zeros, `size` bytes in all; `None` where they are more.
fn fill(bytes: &[u8], size: u16, out: &mut Vec<u8>) -> Option<()> {
    let zeros = usize::from(size).checked_sub(bytes.len())?;
    out.extend_from_slice(bytes);
    out.resize(out.len() + zeros, 0);
    Some(())
}

/// A field of a type.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Field {
    /// Its name.
    pub name: String,
    /// What it holds.
    pub kind: FieldKind,
    /// Where it begins in a payload, in bytes.
    pub offset: usize,
}

/// A type of events. See the module's documentation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EventType {
    name: String,
    version: u16,
    fields: Vec<Field>,
    size: usize,
    id: u64,
}

impl EventType {
    /// A type with these fields, in this order.
    ///
    /// # Errors
    /// [`TypeError`] for names that are none or twice, and for too much.
    pub fn new<N: Into<String>>(
        name: impl Into<String>,
        version: u16,
        fields: impl IntoIterator<Item = (N, FieldKind)>,
    ) -> Result<EventType, TypeError> {
        let name = checked(name.into())?;
        let mut size = 0;
        let mut known: Vec<Field> = Vec::new();
        for (name, kind) in fields {
            let name = checked(name.into())?;
            if known.iter().any(|field| field.name == name) {
                return Err(TypeError::Twice(name));
            }
            known.push(Field {
                name,
                kind,
                offset: size,
            });
            size += kind.size();
            if known.len() > MAX_FIELDS || size > MAX_FIELDS_BYTES {
                return Err(TypeError::TooLarge {
                    fields: known.len(),
                    bytes: size,
                });
            }
        }
        let mut kind = EventType {
            name,
            version,
            fields: known,
            size,
            id: 0,
        };
        let digest = blake3::hash(&kind.encode());
        let id = digest
            .as_bytes()
            .first_chunk()
            .copied()
            .map_or(0, u64::from_le_bytes);
        kind.id = id;
        Ok(kind)
    }

    /// A type without fields: the payload is the event's own affair.
    ///
    /// # Errors
    /// [`TypeError::Name`].
    pub fn raw(name: impl Into<String>) -> Result<EventType, TypeError> {
        EventType::new(name, 0, std::iter::empty::<(String, FieldKind)>())
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its version.
    pub fn version(&self) -> u16 {
        self.version
    }

    /// Its fields, in their order.
    pub fn fields(&self) -> &[Field] {
        &self.fields
    }

    /// How many bytes of a payload the fields take; a payload has at least these.
    pub fn size(&self) -> usize {
        self.size
    }

    /// The beginning of the descriptor's BLAKE3 digest, which stands for it in events.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// The field of a name.
    pub fn field(&self, name: &str) -> Option<&Field> {
        self.fields.iter().find(|field| field.name == name)
    }

    /// A payload with these values, one for each field in its order.
    ///
    /// # Errors
    /// [`TypeError::Count`], [`TypeError::Value`].
    pub fn payload(&self, values: &[Value]) -> Result<Vec<u8>, TypeError> {
        if values.len() != self.fields.len() {
            let (fields, values) = (self.fields.len(), values.len());
            return Err(TypeError::Count {
                kind: self.name.clone(),
                fields,
                values,
            });
        }
        let mut out = Vec::with_capacity(self.size);
        for (field, value) in self.fields.iter().zip(values) {
            field
                .kind
                .write(value, &mut out)
                .ok_or_else(|| TypeError::Value {
                    field: field.name.clone(),
                    value: value.to_string(),
                    kind: field.kind,
                })?;
        }
        Ok(out)
    }

    /// The descriptor as it goes over the wire: CBOR.
    pub fn encode(&self) -> Vec<u8> {
        let fields = self.fields.iter();
        let fields = fields
            .map(|field| (field.name.as_str(), field.kind))
            .collect::<Vec<_>>();
        let mut out = Vec::new();
        let encoded = minicbor::encode((&self.name, self.version, fields), &mut out);
        // Neither a vector nor a derived encoder refuses anything.
        debug_assert!(encoded.is_ok());
        out
    }

    /// Reads a descriptor, which may be anybody's.
    ///
    /// # Errors
    /// What is wrong with it, in words.
    pub fn decode(bytes: &[u8]) -> Result<EventType, Box<dyn std::error::Error + Send + Sync>> {
        let (name, version, fields): (String, u16, Vec<(String, FieldKind)>) =
            minicbor::decode(bytes)?;
        Ok(EventType::new(name, version, fields)?)
    }
}

/// The name, if it is one.
fn checked(name: String) -> Result<String, TypeError> {
    match is_name(&name) {
        true => Ok(name),
        false => Err(TypeError::Name(name)),
    }
}

/// Whether a type, field, attribute or state may be called so.
pub fn is_name(name: &str) -> bool {
    let begins = name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_');
    let rest = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
    begins && name.len() <= MAX_NAME_BYTES && name.chars().all(rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_type_survives_the_wire_and_a_changed_one_has_another_id() {
        let fields = [("cpu", FieldKind::F64), ("name", FieldKind::Text(4))];
        let kind = EventType::new("load", 1, fields).unwrap();
        assert_eq!(EventType::decode(&kind.encode()).unwrap(), kind);
        assert_ne!(EventType::new("load", 2, fields).unwrap().id(), kind.id());
        assert_eq!((kind.size(), kind.field("name").unwrap().offset), (12, 8));
    }

    #[test]
    fn values_are_written_where_the_layout_has_them() {
        let kind = EventType::new("t", 1, [("a", FieldKind::U16), ("b", FieldKind::Text(3))]);
        let kind = kind.unwrap();
        let payload = kind.payload(&[Value::Int(0x1234), "é".into()]).unwrap();
        assert_eq!(payload, [0x34, 0x12, 0xc3, 0xa9, 0]);
        let field = kind.field("b").unwrap();
        assert_eq!(field.kind.read(&payload[2..]), Some(ValueRef::Text("é")));
        let error = kind.payload(&[Value::Int(70000), "x".into()]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the field 'a' cannot hold 70000: it is U16"
        );
        assert!(matches!(kind.payload(&[]), Err(TypeError::Count { .. })));
    }

    #[test]
    fn names_and_sizes_have_bounds() {
        for name in ["", "1a", "a b", &"x".repeat(65)] {
            assert_eq!(EventType::raw(name), Err(TypeError::Name(name.to_owned())));
        }
        let twice = EventType::new("t", 1, [("a", FieldKind::U8), ("a", FieldKind::U8)]);
        assert_eq!(twice, Err(TypeError::Twice("a".into())));
        let large = EventType::new(
            "t",
            1,
            [("a", FieldKind::Bytes(65535)), ("b", FieldKind::U16)],
        );
        assert!(matches!(large, Err(TypeError::TooLarge { .. })));
    }
}
