//! A filter as a tree, and how a tree is written.

use std::fmt;

use crate::value::Value;

/// Words that mean something; a field of such a name is written in backquotes.
pub(super) const RESERVED: [&str; 5] = ["var", "true", "false", "event", "sink"];

/// A filter.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Tree {
    /// Its variables and their first values, which are of the kinds `Bool` to `Text`.
    pub variables: Vec<(String, Value)>,
    /// What says whether an event passes.
    pub root: Node,
}

/// An expression.
#[derive(Debug, Clone)]
pub(super) struct Node {
    /// Where it is in the source, in bytes.
    pub at: usize,
    pub form: Form,
}

/// Where it stands does not matter.
impl PartialEq for Node {
    fn eq(&self, other: &Node) -> bool {
        self.form == other.form
    }
}

#[derive(Debug, Clone, PartialEq)]
pub(super) enum Form {
    /// Not `Bytes`.
    Literal(Value),
    Read(Read),
    /// An index into [`Tree::variables`].
    Variable(u8),
    /// `has(…)`.
    Has(Read),
    /// `set(…, …)`.
    Set(u8, Box<Node>),
    Unary(Unary, Box<Node>),
    Binary(Binary, Box<Node>, Box<Node>),
    Call(Function, Vec<Node>),
}

/// What is read from outside the filter.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Read {
    Field(String),
    Attribute(String),
    State(String),
    Event(Property),
}

/// What every event has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Property {
    Type,
    Version,
    Size,
    Sequence,
}

impl Property {
    pub const ALL: [(Property, &str); 4] = [
        (Property::Type, "type"),
        (Property::Version, "version"),
        (Property::Size, "size"),
        (Property::Sequence, "sequence"),
    ];
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unary {
    Not,
    Minus,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Binary {
    Or,
    And,
    Compare(Compare),
    Arithmetic(Arithmetic),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Compare {
    Equal,
    NotEqual,
    Less,
    LessEqual,
    Greater,
    GreaterEqual,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Arithmetic {
    Add,
    Subtract,
    Multiply,
    Divide,
    Remainder,
}

impl Binary {
    pub const ALL: [(Binary, &str); 13] = [
        (Binary::Or, "||"),
        (Binary::And, "&&"),
        (Binary::Compare(Compare::Equal), "=="),
        (Binary::Compare(Compare::NotEqual), "!="),
        (Binary::Compare(Compare::Less), "<"),
        (Binary::Compare(Compare::LessEqual), "<="),
        (Binary::Compare(Compare::Greater), ">"),
        (Binary::Compare(Compare::GreaterEqual), ">="),
        (Binary::Arithmetic(Arithmetic::Add), "+"),
        (Binary::Arithmetic(Arithmetic::Subtract), "-"),
        (Binary::Arithmetic(Arithmetic::Multiply), "*"),
        (Binary::Arithmetic(Arithmetic::Divide), "/"),
        (Binary::Arithmetic(Arithmetic::Remainder), "%"),
    ];

    /// What binds stronger is larger.
    pub fn strength(self) -> u8 {
        match self {
            Binary::Or => 1,
            Binary::And => 2,
            Binary::Compare(_) => 3,
            Binary::Arithmetic(Arithmetic::Add | Arithmetic::Subtract) => 4,
            Binary::Arithmetic(_) => 5,
        }
    }

    pub fn symbol(self) -> &'static str {
        let known = Binary::ALL.iter().find(|(binary, _)| *binary == self);
        known.map_or("", |(_, symbol)| symbol)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Function {
    Abs,
    Min,
    Max,
    StartsWith,
    EndsWith,
    Contains,
    Len,
}

impl Function {
    /// Each with its name, how many arguments it takes, and how it is written.
    pub const ALL: [(Function, &str, usize, &str); 7] = [
        (Function::Abs, "abs", 1, "abs(number)"),
        (Function::Min, "min", 2, "min(number, number)"),
        (Function::Max, "max", 2, "max(number, number)"),
        (
            Function::StartsWith,
            "starts_with",
            2,
            "starts_with(text, beginning)",
        ),
        (Function::EndsWith, "ends_with", 2, "ends_with(text, end)"),
        (Function::Contains, "contains", 2, "contains(text, part)"),
        (Function::Len, "len", 1, "len(text)"),
    ];

    pub fn name(self) -> &'static str {
        let known = Function::ALL.iter().find(|entry| entry.0 == self);
        known.map_or("", |entry| entry.1)
    }
}

/// Whether it can stand without backquotes.
pub(super) fn is_plain(name: &str) -> bool {
    name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
}

impl fmt::Display for Tree {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, first) in &self.variables {
            write!(f, "var {name} = ")?;
            literal(first, f)?;
            f.write_str("; ")?;
        }
        self.node(&self.root, f)
    }
}

impl Tree {
    fn node(&self, node: &Node, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &node.form {
            Form::Literal(value) => literal(value, f),
            Form::Read(read) => self.read(read, f),
            Form::Variable(index) => f.write_str(self.variable(*index)),
            Form::Has(read) => {
                f.write_str("has(")?;
                self.read(read, f)?;
                f.write_str(")")
            }
            Form::Set(index, value) => {
                write!(f, "set({}, ", self.variable(*index))?;
                self.node(value, f)?;
                f.write_str(")")
            }
            // In parentheses always, so that a minus is not taken for a literal's.
            Form::Unary(unary, of) => {
                f.write_str(match unary {
                    Unary::Not => "!(",
                    Unary::Minus => "-(",
                })?;
                self.node(of, f)?;
                f.write_str(")")
            }
            Form::Binary(binary, left, right) => {
                self.operand(left, *binary, false, f)?;
                write!(f, " {} ", binary.symbol())?;
                self.operand(right, *binary, true, f)
            }
            Form::Call(function, arguments) => {
                write!(f, "{}(", function.name())?;
                for (n, argument) in arguments.iter().enumerate() {
                    f.write_str(if n > 0 { ", " } else { "" })?;
                    self.node(argument, f)?;
                }
                f.write_str(")")
            }
        }
    }

    /// What is left or right of an operator, in parentheses where they are needed.
    fn operand(
        &self,
        node: &Node,
        of: Binary,
        right: bool,
        f: &mut fmt::Formatter<'_>,
    ) -> fmt::Result {
        let weaker = match &node.form {
            Form::Binary(inner, ..) => {
                let compared = matches!(of, Binary::Compare(_));
                inner.strength() < of.strength() + u8::from(right || compared)
            }
            _ => false,
        };
        if !weaker {
            return self.node(node, f);
        }
        f.write_str("(")?;
        self.node(node, f)?;
        f.write_str(")")
    }

    fn read(&self, read: &Read, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (before, name) = match read {
            Read::Field(name) => {
                let taken = self.variables.iter().any(|(variable, _)| variable == name);
                if taken || RESERVED.contains(&name.as_str()) {
                    return write!(f, "`{name}`");
                }
                ("", name)
            }
            Read::Attribute(name) => ("@", name),
            Read::State(name) => ("sink.", name),
            Read::Event(property) => {
                let known = Property::ALL.iter().find(|(known, _)| known == property);
                return write!(f, "event.{}", known.map_or("", |(_, name)| name));
            }
        };
        match is_plain(name) {
            true => write!(f, "{before}{name}"),
            false => write!(f, "{before}`{name}`"),
        }
    }

    fn variable(&self, index: u8) -> &str {
        let variable = self.variables.get(usize::from(index));
        variable.map_or("", |(name, _)| name)
    }
}

fn literal(value: &Value, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let Value::Text(text) = value else {
        return write!(f, "{value}");
    };
    f.write_str("\"")?;
    for c in text.chars() {
        match c {
            '"' => f.write_str("\\\"")?,
            '\\' => f.write_str("\\\\")?,
            '\n' => f.write_str("\\n")?,
            '\t' => f.write_str("\\t")?,
            c => write!(f, "{c}")?,
        }
    }
    f.write_str("\"")
}
