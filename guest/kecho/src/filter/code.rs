//! From a tree to instructions, which only ever jump forwards.

use super::check::{self, Kind};
use super::error::{Fault, FilterError};
use super::tree::{Arithmetic, Binary, Compare, Form, Function, Node, Property, Read, Tree, Unary};
use super::{MAX_INSTRUCTIONS, MAX_NAMES, MAX_STACK};
use crate::value::Value;

/// One step of a filter; operands are taken off the stack, and the result is put there.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Instruction {
    Bool(bool),
    Int(i64),
    Float(f64),
    /// An index into [`Code::texts`].
    Text(u16),
    /// An index into [`Code::fields`].
    Field(u8),
    /// An index into [`Code::names`].
    Attribute(u8),
    /// An index into [`Code::names`].
    State(u8),
    Property(Property),
    Variable(u8),
    HasField(u8),
    HasAttribute(u8),
    HasState(u8),
    Set(u8),
    Not,
    Minus,
    Compare(Compare),
    Arithmetic(Arithmetic),
    Call(Function),
    /// Goes there if the top is false, which stays; takes it off if it is true.
    And(u16),
    /// Goes there if the top is true, which stays; takes it off if it is false.
    Or(u16),
    /// Fails if the top is neither true nor false.
    ExpectBool,
}

/// A filter that can be run.
#[derive(Debug, Clone, Default)]
pub(super) struct Code {
    pub instructions: Vec<Instruction>,
    pub texts: Vec<String>,
    /// Names of fields.
    pub fields: Vec<String>,
    /// Names of attributes and states.
    pub names: Vec<String>,
    /// The most values on the stack.
    pub depth: usize,
}

/// The instructions of a tree that [`check::check`] has found right.
pub(super) fn generate(source: &str, tree: &Tree) -> Result<Code, FilterError> {
    let mut generator = Generator {
        source,
        tree,
        code: Code::default(),
        depth: 0,
    };
    generator.node(&tree.root)?;
    generator.expect_bool(&tree.root)?;
    Ok(generator.code)
}

struct Generator<'a> {
    source: &'a str,
    tree: &'a Tree,
    code: Code,
    depth: usize,
}

impl Generator<'_> {
    /// Appends an instruction that takes `takes` values and puts one.
    fn put(
        &mut self,
        at: usize,
        instruction: Instruction,
        takes: usize,
    ) -> Result<(), FilterError> {
        let error = |fault| Err(FilterError::new(self.source, at, fault));
        if self.code.instructions.len() == MAX_INSTRUCTIONS {
            return error(Fault::Instructions);
        }
        self.depth = self.depth + 1 - takes;
        if self.depth > MAX_STACK {
            return error(Fault::Stack);
        }
        self.code.depth = self.code.depth.max(self.depth);
        self.code.instructions.push(instruction);
        Ok(())
    }

    fn expect_bool(&mut self, node: &Node) -> Result<(), FilterError> {
        match check::kind(self.tree, node) {
            Kind::Bool => Ok(()),
            _ => self.put(node.at, Instruction::ExpectBool, 1),
        }
    }

    fn name(&mut self, at: usize, name: &str, field: bool) -> Result<u8, FilterError> {
        let all = self.code.fields.len() + self.code.names.len();
        let names = match field {
            true => &mut self.code.fields,
            false => &mut self.code.names,
        };
        if let Some(index) = names.iter().position(|known| known == name) {
            return Ok(index as u8);
        }
        if all == MAX_NAMES {
            return Err(FilterError::new(self.source, at, Fault::Names));
        }
        names.push(name.to_owned());
        Ok((names.len() - 1) as u8)
    }

    fn node(&mut self, node: &Node) -> Result<(), FilterError> {
        let at = node.at;
        match &node.form {
            Form::Literal(value) => {
                let instruction = match value {
                    Value::Bool(value) => Instruction::Bool(*value),
                    Value::Int(value) => Instruction::Int(*value),
                    Value::Float(value) => Instruction::Float(*value),
                    Value::Text(text) => {
                        self.code.texts.push(text.clone());
                        Instruction::Text((self.code.texts.len() - 1) as u16)
                    }
                    Value::Bytes(_) => Instruction::Bool(false),
                };
                self.put(at, instruction, 0)
            }
            Form::Read(read) => {
                let instruction = match read {
                    Read::Field(name) => Instruction::Field(self.name(at, name, true)?),
                    Read::Attribute(name) => Instruction::Attribute(self.name(at, name, false)?),
                    Read::State(name) => Instruction::State(self.name(at, name, false)?),
                    Read::Event(property) => Instruction::Property(*property),
                };
                self.put(at, instruction, 0)
            }
            Form::Has(read) => {
                let instruction = match read {
                    Read::Field(name) => Instruction::HasField(self.name(at, name, true)?),
                    Read::Attribute(name) => Instruction::HasAttribute(self.name(at, name, false)?),
                    Read::State(name) => Instruction::HasState(self.name(at, name, false)?),
                    Read::Event(_) => Instruction::Bool(true),
                };
                self.put(at, instruction, 0)
            }
            Form::Variable(index) => self.put(at, Instruction::Variable(*index), 0),
            Form::Set(index, value) => {
                self.node(value)?;
                self.put(at, Instruction::Set(*index), 1)
            }
            Form::Unary(unary, of) => {
                self.node(of)?;
                let instruction = match unary {
                    Unary::Not => Instruction::Not,
                    Unary::Minus => Instruction::Minus,
                };
                self.put(at, instruction, 1)
            }
            Form::Binary(Binary::And, left, right) => self.either(at, false, left, right),
            Form::Binary(Binary::Or, left, right) => self.either(at, true, left, right),
            Form::Binary(Binary::Compare(compare), left, right) => {
                self.node(left)?;
                self.node(right)?;
                self.put(at, Instruction::Compare(*compare), 2)
            }
            Form::Binary(Binary::Arithmetic(arithmetic), left, right) => {
                self.node(left)?;
                self.node(right)?;
                self.put(at, Instruction::Arithmetic(*arithmetic), 2)
            }
            Form::Call(function, arguments) => {
                for argument in arguments {
                    self.node(argument)?;
                }
                self.put(at, Instruction::Call(*function), arguments.len())
            }
        }
    }

    /// What need not look at its right side.
    fn either(
        &mut self,
        at: usize,
        or: bool,
        left: &Node,
        right: &Node,
    ) -> Result<(), FilterError> {
        self.node(left)?;
        let jump = self.code.instructions.len();
        self.put(at, Instruction::And(0), 1)?;
        // Where it does not jump its operand is gone.
        self.depth -= 1;
        self.node(right)?;
        self.expect_bool(right)?;
        let there = self.code.instructions.len() as u16;
        self.code.instructions[jump] = match or {
            true => Instruction::Or(there),
            false => Instruction::And(there),
        };
        Ok(())
    }
}
