//! What can be known of kinds before there is an event.

use super::error::{Fault, FilterError};
use super::tree::{Arithmetic, Binary, Compare, Form, Function, Node, Property, Read, Tree, Unary};
use crate::value::Value;

/// What an expression yields.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Bool,
    Int,
    Float,
    /// One of the two before.
    Number,
    Text,
    /// What a field, an attribute or a state is, only the event says.
    Any,
}

impl Kind {
    fn is_number(self) -> bool {
        matches!(self, Kind::Int | Kind::Float | Kind::Number)
    }

    fn describe(self) -> &'static str {
        match self {
            Kind::Bool => "true or false",
            Kind::Int => "a whole number",
            Kind::Float => "a float",
            Kind::Number => "a number",
            Kind::Text => "a text",
            Kind::Any => "any value",
        }
    }

    fn of(value: &Value) -> Kind {
        match value {
            Value::Bool(_) => Kind::Bool,
            Value::Int(_) => Kind::Int,
            Value::Float(_) => Kind::Float,
            Value::Text(_) => Kind::Text,
            Value::Bytes(_) => Kind::Any,
        }
    }
}

/// Refuses what fails for every event.
pub(super) fn check(source: &str, tree: &Tree) -> Result<(), FilterError> {
    let checker = Checker { source, tree };
    checker.bool(&tree.root, "a filter")
}

/// What this yields, if it is right.
pub(super) fn kind(tree: &Tree, node: &Node) -> Kind {
    Checker { source: "", tree }.kind(node).unwrap_or(Kind::Any)
}

struct Checker<'a> {
    source: &'a str,
    tree: &'a Tree,
}

impl Checker<'_> {
    fn wrong<T>(
        &self,
        node: &Node,
        place: &'static str,
        expected: &'static str,
        found: Kind,
    ) -> Result<T, FilterError> {
        let fault = Fault::Kind {
            place,
            expected,
            found: found.describe(),
        };
        Err(FilterError::new(self.source, node.at, fault))
    }

    fn bool(&self, node: &Node, place: &'static str) -> Result<(), FilterError> {
        match self.kind(node)? {
            Kind::Bool | Kind::Any => Ok(()),
            other => self.wrong(node, place, Kind::Bool.describe(), other),
        }
    }

    fn number(&self, node: &Node, place: &'static str) -> Result<Kind, FilterError> {
        match self.kind(node)? {
            kind if kind.is_number() => Ok(kind),
            Kind::Any => Ok(Kind::Number),
            other => self.wrong(node, place, Kind::Number.describe(), other),
        }
    }

    fn text(&self, node: &Node, place: &'static str) -> Result<(), FilterError> {
        match self.kind(node)? {
            Kind::Text | Kind::Any => Ok(()),
            other => self.wrong(node, place, Kind::Text.describe(), other),
        }
    }

    fn kind(&self, node: &Node) -> Result<Kind, FilterError> {
        Ok(match &node.form {
            Form::Literal(value) => Kind::of(value),
            Form::Variable(index) => self.variable(*index).1,
            Form::Read(Read::Event(Property::Type)) => Kind::Text,
            Form::Read(Read::Event(_)) => Kind::Int,
            Form::Read(_) => Kind::Any,
            Form::Has(_) => Kind::Bool,
            Form::Set(index, value) => {
                self.set(*index, value)?;
                Kind::Bool
            }
            Form::Unary(Unary::Not, of) => {
                self.bool(of, "'!'")?;
                Kind::Bool
            }
            Form::Unary(Unary::Minus, of) => self.number(of, "'-'")?,
            Form::Binary(Binary::Compare(compare), left, right) => {
                self.comparable(node, *compare, left, right)?;
                Kind::Bool
            }
            Form::Binary(Binary::Arithmetic(arithmetic), left, right) => {
                let place = match arithmetic {
                    Arithmetic::Add => "'+'",
                    Arithmetic::Subtract => "'-'",
                    Arithmetic::Multiply => "'*'",
                    Arithmetic::Divide => "'/'",
                    Arithmetic::Remainder => "'%'",
                };
                self.numbers(place, left, right)?
            }
            Form::Binary(binary, left, right) => {
                let place = match binary {
                    Binary::Or => "'||'",
                    _ => "'&&'",
                };
                self.bool(left, place)?;
                self.bool(right, place)?;
                Kind::Bool
            }
            Form::Call(function, arguments) => self.call(*function, arguments)?,
        })
    }

    fn numbers(&self, place: &'static str, left: &Node, right: &Node) -> Result<Kind, FilterError> {
        let (left, right) = (self.number(left, place)?, self.number(right, place)?);
        Ok(match (left, right) {
            (Kind::Int, Kind::Int) => Kind::Int,
            (Kind::Float, _) | (_, Kind::Float) => Kind::Float,
            _ => Kind::Number,
        })
    }

    fn call(&self, function: Function, arguments: &[Node]) -> Result<Kind, FilterError> {
        Ok(match (function, arguments) {
            (Function::Abs, [of]) => self.number(of, "abs()")?,
            (Function::Min, [left, right]) => self.numbers("min()", left, right)?,
            (Function::Max, [left, right]) => self.numbers("max()", left, right)?,
            (Function::Len, [of]) => {
                self.text(of, "len()")?;
                Kind::Int
            }
            (function, arguments) => {
                for argument in arguments {
                    let place = match function {
                        Function::StartsWith => "starts_with()",
                        Function::EndsWith => "ends_with()",
                        _ => "contains()",
                    };
                    self.text(argument, place)?;
                }
                Kind::Bool
            }
        })
    }

    fn comparable(
        &self,
        node: &Node,
        compare: Compare,
        left: &Node,
        right: &Node,
    ) -> Result<(), FilterError> {
        let (left, right) = (self.kind(left)?, self.kind(right)?);
        let equality = matches!(compare, Compare::Equal | Compare::NotEqual);
        let fits = match (left, right) {
            (Kind::Bool, Kind::Bool) => equality,
            (Kind::Any, Kind::Bool) | (Kind::Bool, Kind::Any) => equality,
            (Kind::Any, _) | (_, Kind::Any) => true,
            (Kind::Text, Kind::Text) => true,
            (left, right) => left.is_number() && right.is_number(),
        };
        if fits {
            return Ok(());
        }
        let fault = Fault::Both {
            operator: Binary::Compare(compare).symbol(),
            left: left.describe(),
            right: right.describe(),
            expected: match equality {
                true => "numbers, texts, or true or false",
                false => "numbers or texts",
            },
        };
        Err(FilterError::new(self.source, node.at, fault))
    }

    fn set(&self, index: u8, value: &Node) -> Result<(), FilterError> {
        let found = self.kind(value)?;
        let (name, holds) = self.variable(index);
        let fits = match (holds, found) {
            (_, Kind::Any) => true,
            (Kind::Float, found) => found.is_number(),
            (Kind::Int, found) => matches!(found, Kind::Int | Kind::Number),
            (holds, found) => holds == found,
        };
        if fits {
            return Ok(());
        }
        let fault = Fault::Set {
            name: name.to_owned(),
            holds: holds.describe(),
            found: found.describe(),
        };
        Err(FilterError::new(self.source, value.at, fault))
    }

    fn variable(&self, index: u8) -> (&str, Kind) {
        match self.tree.variables.get(usize::from(index)) {
            Some((name, first)) => (name, Kind::of(first)),
            None => ("", Kind::Any),
        }
    }
}
