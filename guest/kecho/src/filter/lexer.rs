//! A filter's source as words.

use super::error::{Fault, FilterError};
use crate::types::is_name;

/// A word of the source.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Token<'a> {
    /// Without its sign, which may make it fit.
    Int(u64),
    Float(f64),
    Text(String),
    Name(&'a str),
    /// A name in backquotes.
    Quoted(&'a str),
    Symbol(&'static str),
    End,
}

impl Token<'_> {
    /// In words, for errors.
    pub fn describe(&self) -> String {
        match self {
            Token::Int(v) => format!("{v}"),
            Token::Float(v) => format!("{v:?}"),
            Token::Text(_) => "a text".to_owned(),
            Token::Name(name) | Token::Quoted(name) => format!("'{name}'"),
            Token::Symbol(symbol) => format!("'{symbol}'"),
            Token::End => "the end".to_owned(),
        }
    }
}

/// Longer ones before those that they begin with.
const SYMBOLS: [&str; 20] = [
    "||", "&&", "==", "!=", "<=", ">=", "<", ">", "+", "-", "*", "/", "%", "!", "(", ")", ",", ";",
    "@", ".",
];

/// Takes words off a source.
#[derive(Debug)]
pub(super) struct Lexer<'a> {
    source: &'a str,
    at: usize,
}

impl<'a> Lexer<'a> {
    pub fn new(source: &'a str) -> Lexer<'a> {
        Lexer { source, at: 0 }
    }

    pub fn error(&self, at: usize, fault: Fault) -> FilterError {
        FilterError::new(self.source, at, fault)
    }

    fn rest(&self) -> &'a str {
        self.source.get(self.at..).unwrap_or("")
    }

    /// The bytes from here that are such, which are passed by.
    fn take(&mut self, such: impl Fn(u8) -> bool) -> &'a str {
        let rest = self.rest();
        let end = rest.bytes().position(|b| !such(b)).unwrap_or(rest.len());
        self.at += end;
        &rest[..end]
    }

    /// The next word, and where it begins.
    pub fn next(&mut self) -> Result<(usize, Token<'a>), FilterError> {
        self.take(|b| b.is_ascii_whitespace());
        let at = self.at;
        let Some(first) = self.rest().chars().next() else {
            return Ok((at, Token::End));
        };
        let token = match first {
            '0'..='9' => self.number(at)?,
            '"' => self.text(at)?,
            '`' => self.quoted(at)?,
            c if c.is_ascii_alphabetic() || c == '_' => {
                let name = self.take(|b| b.is_ascii_alphanumeric() || b == b'_');
                if !is_name(name) {
                    return Err(self.error(at, Fault::Name(name.to_owned())));
                }
                Token::Name(name)
            }
            c => {
                let rest = self.rest();
                let Some(symbol) = SYMBOLS.iter().find(|symbol| rest.starts_with(**symbol)) else {
                    return self.lone(at, c);
                };
                self.at += symbol.len();
                Token::Symbol(symbol)
            }
        };
        Ok((at, token))
    }

    /// A character that begins nothing; `=` is left to the parser, which knows where it may be.
    fn lone(&mut self, at: usize, c: char) -> Result<(usize, Token<'a>), FilterError> {
        match c {
            '=' => {
                self.at += 1;
                Ok((at, Token::Symbol("=")))
            }
            '&' | '|' => Err(self.error(at, Fault::Single(c))),
            '\'' => Err(self.error(at, Fault::Quotes)),
            c => Err(self.error(at, Fault::Character(c))),
        }
    }

    fn number(&mut self, at: usize) -> Result<Token<'a>, FilterError> {
        let digit = |b: u8| b.is_ascii_digit();
        let second = |rest: &str, n: usize| rest.as_bytes().get(n).copied().is_some_and(digit);
        self.take(digit);
        let mut float = false;
        if self.rest().starts_with('.') && second(self.rest(), 1) {
            self.at += 1;
            self.take(digit);
            float = true;
        }
        if self.rest().starts_with(['e', 'E']) {
            let sign = usize::from(self.rest()[1..].starts_with(['+', '-']));
            if second(self.rest(), 1 + sign) {
                self.at += 1 + sign;
                self.take(digit);
                float = true;
            }
        }
        let text = &self.source[at..self.at];
        let large = || self.error(at, Fault::Number(text.to_owned()));
        if !float {
            return Ok(Token::Int(text.parse().map_err(|_| large())?));
        }
        let value: f64 = text.parse().map_err(|_| large())?;
        match value.is_finite() {
            true => Ok(Token::Float(value)),
            false => Err(large()),
        }
    }

    fn text(&mut self, at: usize) -> Result<Token<'a>, FilterError> {
        let mut text = String::new();
        let mut characters = self.rest().char_indices().skip(1);
        while let Some((n, c)) = characters.next() {
            match c {
                '"' => {
                    self.at += n + 1;
                    return Ok(Token::Text(text));
                }
                '\\' => match characters.next() {
                    Some((_, c @ ('"' | '\\'))) => text.push(c),
                    Some((_, 'n')) => text.push('\n'),
                    Some((_, 't')) => text.push('\t'),
                    Some((_, c)) => return Err(self.error(at + n, Fault::Escape(c))),
                    None => break,
                },
                c => text.push(c),
            }
        }
        Err(self.error(at, Fault::Open('"')))
    }

    fn quoted(&mut self, at: usize) -> Result<Token<'a>, FilterError> {
        let inside = &self.rest()[1..];
        let Some(end) = inside.find('`') else {
            return Err(self.error(at, Fault::Open('`')));
        };
        let name = &inside[..end];
        if !is_name(name) {
            return Err(self.error(at, Fault::Name(name.to_owned())));
        }
        self.at += end + 2;
        Ok(Token::Quoted(name))
    }
}
