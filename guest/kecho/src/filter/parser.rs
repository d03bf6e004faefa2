//! From words to a tree.

use super::error::{Fault, FilterError};
use super::lexer::{Lexer, Token};
use super::tree::{Binary, Form, Function, Node, Property, RESERVED, Read, Tree, Unary};
use super::{
    MAX_DEPTH, MAX_INSTRUCTIONS, MAX_SOURCE_BYTES, MAX_TEXT_VARIABLE_BYTES, MAX_VARIABLES,
};
use crate::value::Value;

/// The tree of a source. Kinds are not looked at here.
pub(super) fn parse(source: &str) -> Result<Tree, FilterError> {
    if source.len() > MAX_SOURCE_BYTES {
        return Err(FilterError::new(source, 0, Fault::Length(source.len())));
    }
    let mut lexer = Lexer::new(source);
    let (at, token) = lexer.next()?;
    let mut parser = Parser {
        lexer,
        at,
        token,
        variables: Vec::new(),
        depth: 0,
        nodes: 0,
    };
    while parser.token == Token::Name("var") {
        parser.variable()?;
    }
    let root = parser.expression(1)?;
    match &parser.token {
        Token::End => Ok(Tree {
            variables: parser.variables,
            root,
        }),
        _ => Err(parser.unexpected("an operator or the end")),
    }
}

struct Parser<'a> {
    lexer: Lexer<'a>,
    /// Where the word begins.
    at: usize,
    /// The word that is looked at.
    token: Token<'a>,
    variables: Vec<(String, Value)>,
    depth: usize,
    nodes: usize,
}

impl<'a> Parser<'a> {
    fn error(&self, at: usize, fault: Fault) -> FilterError {
        self.lexer.error(at, fault)
    }

    /// Something else than the word that there is was expected.
    fn unexpected(&self, expected: &'static str) -> FilterError {
        let write = match self.token {
            Token::Name("and" | "AND") => Some("&&"),
            Token::Name("or" | "OR") => Some("||"),
            Token::Name("not" | "NOT") => Some("!"),
            _ => None,
        };
        let found = match &self.token {
            Token::Name(name) => (*name).to_owned(),
            other => other.describe(),
        };
        let fault = match (&self.token, write) {
            (_, Some(write)) => Fault::Word { found, write },
            (Token::Symbol("="), _) => Fault::Equals,
            (token, None) => Fault::Expected {
                expected,
                found: token.describe(),
            },
        };
        self.error(self.at, fault)
    }

    /// Goes to the next word; the one that was there, and where.
    fn next(&mut self) -> Result<(usize, Token<'a>), FilterError> {
        let (at, token) = self.lexer.next()?;
        let at = std::mem::replace(&mut self.at, at);
        Ok((at, std::mem::replace(&mut self.token, token)))
    }

    fn expect(&mut self, symbol: &'static str, said: &'static str) -> Result<(), FilterError> {
        match self.token == Token::Symbol(symbol) {
            true => self.next().map(drop),
            false => Err(self.unexpected(said)),
        }
    }

    fn node(&mut self, at: usize, form: Form) -> Result<Node, FilterError> {
        self.nodes += 1;
        match self.nodes > MAX_INSTRUCTIONS {
            true => Err(self.error(at, Fault::Instructions)),
            false => Ok(Node { at, form }),
        }
    }

    /// `var name = literal;`
    fn variable(&mut self) -> Result<(), FilterError> {
        self.next()?;
        let Token::Name(name) = self.token else {
            return Err(self.unexpected("the variable's name"));
        };
        let (at, _) = self.next()?;
        let function = Function::ALL.iter().any(|entry| entry.1 == name);
        if RESERVED.contains(&name) || function || matches!(name, "has" | "set") {
            return Err(self.error(at, Fault::Reserved(name.to_owned())));
        }
        if self.variables.iter().any(|(known, _)| known == name) {
            return Err(self.error(at, Fault::Twice(name.to_owned())));
        }
        if self.variables.len() == MAX_VARIABLES {
            return Err(self.error(at, Fault::Variables));
        }
        self.expect("=", "'=' and the variable's first value")?;
        let first = self.at;
        let value = match self.literal()? {
            Some(value) => value,
            None => return Err(self.unexpected("a number, a text, true or false")),
        };
        if let Value::Text(text) = &value
            && text.len() > MAX_TEXT_VARIABLE_BYTES
        {
            return Err(self.error(first, Fault::TextVariable(text.len())));
        }
        self.expect(";", "';' after the variable's first value")?;
        self.variables.push((name.to_owned(), value));
        Ok(())
    }

    /// A literal, a number with its sign, if there is one.
    fn literal(&mut self) -> Result<Option<Value>, FilterError> {
        let value = match &mut self.token {
            Token::Name("true") => Value::Bool(true),
            Token::Name("false") => Value::Bool(false),
            Token::Float(value) => Value::Float(*value),
            Token::Text(text) => Value::Text(std::mem::take(text)),
            Token::Int(value) => match i64::try_from(*value) {
                Ok(value) => Value::Int(value),
                Err(_) => return Err(self.error(self.at, Fault::Number(self.token.describe()))),
            },
            Token::Symbol("-") => {
                self.next()?;
                return self.negative();
            }
            _ => return Ok(None),
        };
        self.next()?;
        Ok(Some(value))
    }

    /// The number after a minus, if there is one.
    fn negative(&mut self) -> Result<Option<Value>, FilterError> {
        let value = match self.token {
            Token::Float(value) => Value::Float(-value),
            Token::Int(value) => match 0i64.checked_sub_unsigned(value) {
                Some(value) => Value::Int(value),
                None => {
                    let text = format!("-{value}");
                    return Err(self.error(self.at, Fault::Number(text)));
                }
            },
            _ => return Ok(None),
        };
        self.next()?;
        Ok(Some(value))
    }

    /// Operators that bind at least so strongly, and what is between them.
    fn expression(&mut self, strength: u8) -> Result<Node, FilterError> {
        let mut left = self.unary()?;
        loop {
            let Token::Symbol(symbol) = self.token else {
                return Ok(left);
            };
            let known = Binary::ALL.iter().find(|(_, known)| *known == symbol);
            let Some(&(binary, _)) = known else {
                return Ok(left);
            };
            if binary.strength() < strength {
                return Ok(left);
            }
            let (at, _) = self.next()?;
            let right = self.expression(binary.strength() + 1)?;
            if let (Binary::Compare(_), Token::Symbol(next)) = (binary, &self.token) {
                let chained = |entry: &(Binary, &str)| {
                    entry.1 == *next && matches!(entry.0, Binary::Compare(_))
                };
                if Binary::ALL.iter().any(chained) {
                    return Err(self.error(self.at, Fault::Chain));
                }
            }
            left = self.node(at, Form::Binary(binary, Box::new(left), Box::new(right)))?;
        }
    }

    fn unary(&mut self) -> Result<Node, FilterError> {
        if self.depth == MAX_DEPTH {
            return Err(self.error(self.at, Fault::Depth));
        }
        self.depth += 1;
        let node = match self.token {
            Token::Symbol("!") => {
                let (at, _) = self.next()?;
                let of = self.unary()?;
                self.node(at, Form::Unary(Unary::Not, Box::new(of)))
            }
            Token::Symbol("-") => {
                let (at, _) = self.next()?;
                match self.negative()? {
                    Some(value) => self.node(at, Form::Literal(value)),
                    None => {
                        let of = self.unary()?;
                        self.node(at, Form::Unary(Unary::Minus, Box::new(of)))
                    }
                }
            }
            _ => self.primary(),
        };
        self.depth -= 1;
        node
    }

    fn primary(&mut self) -> Result<Node, FilterError> {
        let at = self.at;
        if self.token == Token::Symbol("(") {
            self.next()?;
            let inside = self.expression(1)?;
            self.expect(")", "an operator or ')'")?;
            return Ok(inside);
        }
        if let Some(value) = self.literal()? {
            return self.node(at, Form::Literal(value));
        }
        let Token::Name(name) = self.token else {
            let read = self.read()?;
            return self.node(at, Form::Read(read));
        };
        if matches!(name, "event" | "sink") {
            let read = self.read()?;
            return self.node(at, Form::Read(read));
        }
        if matches!(name, "not" | "NOT" | "var") {
            return Err(self.unexpected("a value; variables come before all else"));
        }
        self.next()?;
        if self.token == Token::Symbol("(") {
            return self.call(at, name);
        }
        let variable = self.variables.iter().position(|(known, _)| known == name);
        let form = match variable {
            Some(index) => Form::Variable(index as u8),
            None => Form::Read(Read::Field(name.to_owned())),
        };
        self.node(at, form)
    }

    /// A field, an attribute, a state, a property; not a plain name that is a variable's.
    fn read(&mut self) -> Result<Read, FilterError> {
        let (_, begin) = match self.token {
            Token::Symbol("@") | Token::Name(_) | Token::Quoted(_) => self.next()?,
            _ => return Err(self.unexpected("a value: a number, a text, a field, @attribute")),
        };
        match begin {
            Token::Symbol(_) => Ok(Read::Attribute(self.name("the attribute's name")?)),
            Token::Name("sink") => {
                self.expect(".", "'.' and the name of a state")?;
                Ok(Read::State(self.name("the name of a state")?))
            }
            Token::Name("event") => {
                self.expect(".", "'.' and type, version, size or sequence")?;
                let at = self.at;
                let name = self.name("type, version, size or sequence")?;
                let known = Property::ALL.iter().find(|(_, known)| *known == name);
                match known {
                    Some((property, _)) => Ok(Read::Event(*property)),
                    None => Err(self.error(at, Fault::Property(name))),
                }
            }
            Token::Name(name) | Token::Quoted(name) => Ok(Read::Field(name.to_owned())),
            _ => Err(self.unexpected("a name")),
        }
    }

    fn name(&mut self, said: &'static str) -> Result<String, FilterError> {
        match self.token {
            Token::Name(name) | Token::Quoted(name) => {
                self.next()?;
                Ok(name.to_owned())
            }
            _ => Err(self.unexpected(said)),
        }
    }

    /// `name(…`, at the parenthesis.
    fn call(&mut self, at: usize, name: &str) -> Result<Node, FilterError> {
        self.next()?;
        match name {
            "has" => return self.has(at),
            "set" => return self.set(at),
            _ => {}
        }
        let known = Function::ALL.iter().find(|entry| entry.1 == name);
        let Some(&(function, name, count, usage)) = known else {
            return Err(self.error(at, Fault::Function(name.to_owned())));
        };
        let mut arguments = Vec::new();
        while self.token != Token::Symbol(")") {
            if !arguments.is_empty() {
                self.expect(",", "an operator, ',' or ')'")?;
            }
            arguments.push(self.expression(1)?);
        }
        self.next()?;
        if arguments.len() != count {
            let fault = Fault::Arguments {
                function: name,
                expected: if count == 1 {
                    "one value"
                } else {
                    "two values"
                },
                found: arguments.len(),
                usage,
            };
            return Err(self.error(at, fault));
        }
        self.node(at, Form::Call(function, arguments))
    }

    fn has(&mut self, at: usize) -> Result<Node, FilterError> {
        let of = self.at;
        let asked = match self.token {
            Token::Symbol("@") | Token::Quoted(_) | Token::Name("sink") => Some(self.read()?),
            Token::Name(name) => {
                let variable = self.variables.iter().any(|(known, _)| known == name);
                match variable || RESERVED.contains(&name) {
                    true => None,
                    false => Some(self.read()?),
                }
            }
            _ => None,
        };
        match asked {
            Some(read) if self.token == Token::Symbol(")") => {
                self.next()?;
                self.node(at, Form::Has(read))
            }
            _ => Err(self.error(of, Fault::Has)),
        }
    }

    fn set(&mut self, at: usize) -> Result<Node, FilterError> {
        let Token::Name(name) = self.token else {
            return Err(self.unexpected("the name of a variable"));
        };
        let (of, _) = self.next()?;
        let variable = self.variables.iter().position(|(known, _)| known == name);
        let Some(variable) = variable else {
            return Err(self.error(of, Fault::NoVariable(name.to_owned())));
        };
        self.expect(",", "',' and the variable's new value")?;
        let value = self.expression(1)?;
        self.expect(")", "an operator or ')'")?;
        self.node(at, Form::Set(variable as u8, Box::new(value)))
    }
}
