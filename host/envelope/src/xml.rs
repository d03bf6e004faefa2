//! The part of XML that messages use: elements of two namespaces that have either text or elements. No attributes but
//! namespace declarations, no document type, no processing instructions.

use std::collections::VecDeque;

use quick_xml::events::{BytesDecl, BytesText, Event};
use quick_xml::name::{PrefixDeclaration, ResolveResult};
use quick_xml::{NsReader, Writer};

use super::message::Error;
use crate::{MSG, XBE};

/// Elements within elements.
const MAX_DEPTH: usize = 8;
/// Elements of a message.
const MAX_ELEMENTS: usize = 50_000;
/// Characters of a name that an error repeats.
const MAX_QUOTED_CHARS: usize = 60;

/// An element. `name` has the prefix that it is written with: `xbemsg:` or `xbe:`.
#[derive(Debug)]
pub(crate) struct Element {
    pub name: String,
    pub content: Content,
}

#[derive(Debug)]
pub(crate) enum Content {
    Text(String),
    Elements(Vec<Element>),
}

/// An `xbe:` element with text.
pub(crate) fn leaf(name: &str, text: impl ToString) -> Element {
    Element {
        name: format!("xbe:{name}"),
        content: Content::Text(text.to_string()),
    }
}

/// An `xbe:` element with elements.
pub(crate) fn node(name: &str, elements: Vec<Element>) -> Element {
    Element {
        name: format!("xbe:{name}"),
        content: Content::Elements(elements),
    }
}

/// The document of a root element.
pub(crate) fn write(root: &Element) -> Result<Vec<u8>, Error> {
    let mut writer = Writer::new(Vec::new());
    let declaration = Event::Decl(BytesDecl::new("1.0", Some("UTF-8"), None));
    // Memory can always be written to, so the writer has no errors of its own.
    writer.write_event(declaration).map_err(Error::Write)?;
    put(&mut writer, root, true)?;
    Ok(writer.into_inner())
}

fn put(writer: &mut Writer<Vec<u8>>, element: &Element, root: bool) -> Result<(), Error> {
    let mut start = quick_xml::events::BytesStart::new(element.name.as_str());
    if root {
        start.push_attribute(("xmlns:xbemsg", MSG));
        start.push_attribute(("xmlns:xbe", XBE));
    }
    let end = start.to_end().into_owned();
    writer
        .write_event(Event::Start(start.borrow()))
        .map_err(Error::Write)?;
    match &element.content {
        Content::Elements(elements) => {
            for element in elements {
                put(writer, element, false)?;
            }
        }
        Content::Text(text) => {
            if let Some(c) = text.chars().find(|&c| !allowed(c)) {
                return Err(Error::Character(u32::from(c), element.name.clone()));
            }
            writer
                .write_event(Event::Text(BytesText::new(text)))
                .map_err(Error::Write)?;
        }
    }
    writer.write_event(Event::End(end)).map_err(Error::Write)
}

/// The production `Char` (XML 1.0, 2.2).
fn allowed(c: char) -> bool {
    matches!(c, '\t' | '\n' | '\r' | ' '..='\u{fffd}' | '\u{10000}'..)
}

/// The root element of a document.
pub(crate) fn read(text: &str) -> Result<Element, Error> {
    let mut reader = NsReader::from_str(text);
    let mut open: Vec<(String, String, Vec<Element>)> = Vec::new();
    let mut root = None;
    let mut elements = 0;
    let mut first = true;
    loop {
        let (namespace, event) = reader.read_resolved_event().map_err(Error::NotXml)?;
        let namespace = match namespace {
            ResolveResult::Bound(namespace) => Some(namespace.as_ref().to_owned()),
            ResolveResult::Unbound | ResolveResult::Unknown(_) => None,
        };
        let empty = matches!(event, Event::Empty(_));
        match event {
            Event::Decl(_) if first => {}
            Event::Start(start) | Event::Empty(start) => {
                let local = start.local_name();
                let name = match namespace.as_deref() {
                    Some(n) if n == MSG => format!("xbemsg:{}", local.as_ref()),
                    Some(n) if n == XBE => format!("xbe:{}", local.as_ref()),
                    _ => return Err(Error::Unknown(shown(start.name().as_ref()))),
                };
                // Errors, and so logs, repeat names.
                if name.contains(char::is_control) {
                    return Err(Error::Unknown(shown(&name)));
                }
                for attribute in start.attributes() {
                    let attribute = attribute.map_err(|error| Error::NotXml(error.into()))?;
                    let is_namespace = matches!(
                        attribute.key.as_namespace_binding(),
                        Some(PrefixDeclaration::Default | PrefixDeclaration::Named(_))
                    );
                    if !is_namespace {
                        return Err(Error::Attribute(shown(attribute.key.as_ref())));
                    }
                }
                elements += 1;
                if open.len() == MAX_DEPTH || elements > MAX_ELEMENTS {
                    return Err(Error::TooMany);
                }
                if open.is_empty() && root.is_some() {
                    return Err(Error::Misplaced("a second root element"));
                }
                open.push((name, String::new(), Vec::new()));
                if empty {
                    close(&mut open, &mut root)?;
                }
            }
            Event::End(_) => close(&mut open, &mut root)?,
            Event::Text(text) => add(&mut open, &text.xml10_content())?,
            Event::CData(text) => add(&mut open, &text.xml10_content())?,
            Event::GeneralRef(reference) => {
                let c = match reference.resolve_char_ref().map_err(Error::NotXml)? {
                    Some(c) => c,
                    None => match reference.xml10_content().as_ref() {
                        "lt" => '<',
                        "gt" => '>',
                        "amp" => '&',
                        "apos" => '\'',
                        "quot" => '"',
                        other => return Err(Error::Entity(shown(other))),
                    },
                };
                if open.is_empty() {
                    return Err(Error::Misplaced("text outside of the root element"));
                }
                add(&mut open, c.encode_utf8(&mut [0; 4]))?;
            }
            Event::Comment(_) => {}
            Event::Eof => break,
            Event::DocType(_) => return Err(Error::Misplaced("a document type")),
            Event::PI(_) => return Err(Error::Misplaced("a processing instruction")),
            Event::Decl(_) => return Err(Error::Misplaced("an XML declaration")),
        }
        first = false;
    }
    match root {
        Some(root) if open.is_empty() => Ok(root),
        _ => Err(Error::Misplaced("the end")),
    }
}

fn add(open: &mut [(String, String, Vec<Element>)], text: &str) -> Result<(), Error> {
    if let Some(c) = text.chars().find(|&c| !allowed(c)) {
        let name = open.last().map_or("", |(name, ..)| name);
        return Err(Error::Character(u32::from(c), name.into()));
    }
    match open.last_mut() {
        Some((_, all, _)) => all.push_str(text),
        None if is_blank(text) => {}
        None => return Err(Error::Misplaced("text outside of the root element")),
    }
    Ok(())
}

fn is_blank(text: &str) -> bool {
    text.chars().all(|c| matches!(c, ' ' | '\t' | '\r' | '\n'))
}

fn close(
    open: &mut Vec<(String, String, Vec<Element>)>,
    root: &mut Option<Element>,
) -> Result<(), Error> {
    let Some((name, text, elements)) = open.pop() else {
        return Err(Error::Misplaced("an end tag"));
    };
    let content = match elements.is_empty() {
        true => Content::Text(text),
        false if is_blank(&text) => Content::Elements(elements),
        false => return Err(Error::Misplaced("text between elements")),
    };
    let element = Element { name, content };
    match open.last_mut() {
        Some((_, _, siblings)) => siblings.push(element),
        None => *root = Some(element),
    }
    Ok(())
}

fn shown(name: &str) -> String {
    let seen = |c: char| if c.is_control() { '\u{fffd}' } else { c };
    name.chars().take(MAX_QUOTED_CHARS).map(seen).collect()
}

/// The elements of an element, taken in the order of the schema.
pub(crate) struct Fields {
    of: String,
    left: VecDeque<Element>,
}

impl Fields {
    pub fn new(element: Element) -> Result<Self, Error> {
        let left = match element.content {
            Content::Elements(elements) => elements.into(),
            Content::Text(text) if is_blank(&text) => VecDeque::new(),
            Content::Text(_) => return Err(Error::Misplaced("text between elements")),
        };
        Ok(Fields {
            of: element.name,
            left,
        })
    }

    /// The next element, whatever it is called.
    pub fn any(&mut self) -> Result<Element, Error> {
        let missing = || Error::Missing("a message", self.of.clone());
        self.left.pop_front().ok_or_else(missing)
    }

    /// The next element, if it is called that (with its prefix).
    pub fn element(&mut self, name: &str) -> Option<Element> {
        match self.left.front() {
            Some(next) if next.name == name => self.left.pop_front(),
            _ => None,
        }
    }

    /// The text of the next element, if it is called that.
    pub fn optional(&mut self, name: &'static str) -> Result<Option<String>, Error> {
        match self.element(name).map(|element| element.content) {
            None => Ok(None),
            Some(Content::Text(text)) => Ok(Some(text)),
            Some(Content::Elements(_)) => Err(Error::Value(name)),
        }
    }

    pub fn text(&mut self, name: &'static str) -> Result<String, Error> {
        self.optional(name)?
            .ok_or_else(|| Error::Missing(name, self.of.clone()))
    }

    /// A value that is read from text.
    pub fn value<T: std::str::FromStr>(&mut self, name: &'static str) -> Result<T, Error> {
        self.text(name)?.parse().map_err(|_| Error::Value(name))
    }

    pub fn optional_value<T: std::str::FromStr>(
        &mut self,
        name: &'static str,
    ) -> Result<Option<T>, Error> {
        let text = self.optional(name)?;
        text.map(|text| text.parse().map_err(|_| Error::Value(name)))
            .transpose()
    }

    /// Nothing else may follow.
    pub fn end(mut self) -> Result<(), Error> {
        match self.left.pop_front() {
            None => Ok(()),
            Some(element) => Err(Error::Unknown(shown(&element.name))),
        }
    }
}
