//! What an attribute or a field can hold.

use std::fmt;

use minicbor::{Decode, Encode};

/// The longest text or byte string in an attribute, in bytes.
pub const MAX_TEXT_BYTES: usize = 4096;

/// A value of an attribute, a field, or a sink's state.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub enum Value {
    /// Yes or no.
    #[n(0)]
    Bool(#[n(0)] bool),
    /// A whole number.
    #[n(1)]
    Int(#[n(0)] i64),
    /// A number with a fraction.
    #[n(2)]
    Float(#[n(0)] f64),
    /// Text.
    #[n(3)]
    Text(#[n(0)] String),
    /// Bytes.
    #[n(4)]
    Bytes(
        #[n(0)]
        #[cbor(with = "minicbor::bytes")]
        Vec<u8>,
    ),
}

/// A [`Value`] that lies in an event.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum ValueRef<'a> {
    /// Yes or no.
    Bool(bool),
    /// A whole number.
    Int(i64),
    /// A number with a fraction.
    Float(f64),
    /// Text.
    Text(&'a str),
    /// Bytes.
    Bytes(&'a [u8]),
}

impl Value {
    /// The same without owning it.
    pub fn borrow(&self) -> ValueRef<'_> {
        match self {
            Value::Bool(v) => ValueRef::Bool(*v),
            Value::Int(v) => ValueRef::Int(*v),
            Value::Float(v) => ValueRef::Float(*v),
            Value::Text(v) => ValueRef::Text(v),
            Value::Bytes(v) => ValueRef::Bytes(v),
        }
    }
}

impl ValueRef<'_> {
    /// The same, owned.
    pub fn to_value(&self) -> Value {
        match *self {
            ValueRef::Bool(v) => Value::Bool(v),
            ValueRef::Int(v) => Value::Int(v),
            ValueRef::Float(v) => Value::Float(v),
            ValueRef::Text(v) => Value::Text(v.to_owned()),
            ValueRef::Bytes(v) => Value::Bytes(v.to_owned()),
        }
    }
}

impl fmt::Display for ValueRef<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ValueRef::Bool(v) => v.fmt(f),
            ValueRef::Int(v) => v.fmt(f),
            // With its point, so that it is read as what it is.
            ValueRef::Float(v) => write!(f, "{v:?}"),
            ValueRef::Text(v) => v.fmt(f),
            ValueRef::Bytes(v) => v.iter().try_for_each(|byte| write!(f, "{byte:02x}")),
        }
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.borrow().fmt(f)
    }
}

impl From<bool> for Value {
    fn from(v: bool) -> Self {
        Value::Bool(v)
    }
}

impl From<i64> for Value {
    fn from(v: i64) -> Self {
        Value::Int(v)
    }
}

impl From<f64> for Value {
    fn from(v: f64) -> Self {
        Value::Float(v)
    }
}

impl From<&str> for Value {
    fn from(v: &str) -> Self {
        Value::Text(v.to_owned())
    }
}

impl From<String> for Value {
    fn from(v: String) -> Self {
        Value::Text(v)
    }
}

impl From<Vec<u8>> for Value {
    fn from(v: Vec<u8>) -> Self {
        Value::Bytes(v)
    }
}
