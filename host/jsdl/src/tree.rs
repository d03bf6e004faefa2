//! From text to element tree: well-formedness (XML 1.0) and namespaces (Namespaces in XML 1.0).
//!
//! The tokens are quick-xml's; it splits the text and matches end tags. What it leaves to its
//! caller is checked here, so that a document that passes is well-formed.

use std::cell::Cell;
use std::collections::HashSet;
use std::rc::Rc;

use quick_xml::events::Event;
use quick_xml::reader::Reader;

use crate::chars::{is_char, is_name, is_ncname, is_space, split_qname, trim};
use crate::diagnostic::{Diagnostic, Position, quoted, shown};
use crate::document::{Attribute, Element, Node, Scope, resolve};
use crate::limits::{MAX_ATTRIBUTES, MAX_DEPTH, MAX_ELEMENTS, MAX_NAMESPACES, MAX_QUOTED_CHARS};
use crate::namespace;
use crate::prolog;
use crate::uri::is_uri_reference;

const NOT_WELL_FORMED: &str = "not-well-formed";

/// A parsed document and what a lenient reading had to forgive to get it.
pub(crate) struct Tree {
    pub root: Element,
    /// The values of `xml:id`.
    pub ids: HashSet<String>,
    pub forgiven: Vec<Diagnostic>,
}

/// Builds the tree of a document. With `lenient`, customary prefixes need no declaration.
pub(crate) fn build(text: &str, lenient: bool) -> Result<Tree, Diagnostic> {
    Builder::new(text, lenient).run()
}

struct Builder<'t> {
    text: &'t str,
    line_starts: Vec<usize>,
    lenient: bool,
    forgiven: Vec<Diagnostic>,
    /// Open elements, outermost first.
    open: Vec<Element>,
    root: Option<Element>,
    elements: usize,
    has_doctype: bool,
    /// Namespace names and prefixes seen, each stored once.
    names: HashSet<Rc<str>>,
    /// Prefixes whose missing declaration was forgiven.
    undeclared: HashSet<String>,
    ids: HashSet<String>,
    /// The last place looked up: start of its line, offset, column. Places are asked for nearly in
    /// order, so that a document of one long line is not counted again for each.
    last: Cell<(usize, usize, usize)>,
}

impl<'t> Builder<'t> {
    fn new(text: &'t str, lenient: bool) -> Self {
        let line_starts = std::iter::once(0)
            .chain(text.match_indices('\n').map(|(at, _)| at + 1))
            .collect();
        Builder {
            text,
            line_starts,
            lenient,
            forgiven: Vec::new(),
            open: Vec::new(),
            root: None,
            elements: 0,
            has_doctype: false,
            names: HashSet::new(),
            undeclared: HashSet::new(),
            ids: HashSet::new(),
            last: Cell::new((0, 0, 1)),
        }
    }

    fn position(&self, offset: usize) -> Position {
        let line = self.line_starts.partition_point(|&start| start <= offset);
        let start = self.line_starts[line.saturating_sub(1)];
        let (last_start, last_offset, last_column) = self.last.get();
        let (from, counted) = if last_start == start && last_offset <= offset {
            (last_offset, last_column)
        } else {
            (start, 1)
        };
        let column = counted
            + self
                .text
                .get(from..offset)
                .map_or(0, |between| between.chars().count());
        self.last.set((start, offset, column));
        Position {
            line: u32::try_from(line).unwrap_or(u32::MAX),
            column: u32::try_from(column).unwrap_or(u32::MAX),
        }
    }

    fn ill_formed(&self, offset: usize, message: impl Into<String>) -> Diagnostic {
        self.position(offset).diagnostic(NOT_WELL_FORMED, message)
    }

    fn run(mut self) -> Result<Tree, Diagnostic> {
        if let Some((at, c)) = self.text.char_indices().find(|&(_, c)| !is_char(c)) {
            return Err(self.ill_formed(
                at,
                format!("the character U+{:04X} is not allowed in XML", u32::from(c)),
            ));
        }
        let mut reader = Reader::from_str(self.text);
        loop {
            let start = offset(reader.buffer_position());
            let event = reader.read_event().map_err(|error| {
                let at = offset(reader.error_position()).min(self.text.len());
                let reason = shown(&error.to_string(), MAX_QUOTED_CHARS * 3);
                self.ill_formed(at, format!("not well-formed: {reason}"))
            })?;
            let raw = self
                .text
                .get(start..offset(reader.buffer_position()))
                .unwrap_or_default();
            match event {
                Event::Start(_) => {
                    self.start(start, inner(raw, "<", ">"))?;
                }
                Event::Empty(_) => {
                    self.start(start, inner(raw, "<", "/>"))?;
                    self.end(start)?;
                }
                Event::End(_) => self.end(start)?,
                Event::Text(_) => self.text(start, raw)?,
                Event::GeneralRef(_) => {
                    let c = self.reference(start, inner(raw, "&", ";"))?;
                    if self.open.is_empty() {
                        return Err(self.outside(start));
                    }
                    self.append(start, c.encode_utf8(&mut [0; 4]));
                }
                Event::CData(_) => {
                    if self.open.is_empty() {
                        return Err(self.outside(start));
                    }
                    self.append(start, inner(raw, "<![CDATA[", "]]>"));
                }
                Event::Comment(_) => {
                    let comment = inner(raw, "<!--", "-->");
                    if comment.contains("--") || comment.ends_with('-') {
                        return Err(self.ill_formed(start, "a comment must not contain '--'"));
                    }
                }
                Event::Decl(_) => self.declaration(start, inner(raw, "<?xml", "?>"))?,
                Event::PI(_) => self.instruction(start, inner(raw, "<?", "?>"))?,
                Event::DocType(_) => self.doctype(start, inner(raw, "<!DOCTYPE", ">"))?,
                Event::Eof => break,
            }
        }
        if let Some(element) = self.open.last() {
            return Err(element.position.diagnostic(
                NOT_WELL_FORMED,
                format!(
                    "element {} is not closed, expected </{}> before the end of the document",
                    element.display(),
                    element.local
                ),
            ));
        }
        match self.root {
            Some(root) => Ok(Tree {
                root,
                ids: self.ids,
                forgiven: self.forgiven,
            }),
            None => Err(self.ill_formed(
                self.text.len(),
                "the document has no element, expected jsdl:JobDefinition",
            )),
        }
    }

    fn outside(&self, start: usize) -> Diagnostic {
        let place = if self.root.is_some() {
            "behind"
        } else {
            "before"
        };
        self.ill_formed(
            start,
            format!("text {place} the document's element, expected none"),
        )
    }

    fn text(&mut self, start: usize, raw: &str) -> Result<(), Diagnostic> {
        if let Some(at) = raw.find("]]>") {
            return Err(self.ill_formed(start + at, "']]>' in text, expected ']]&gt;'"));
        }
        if self.open.is_empty() {
            return match raw.find(|c| !is_space(c)) {
                Some(at) => Err(self.outside(start + at)),
                None => Ok(()),
            };
        }
        self.append(start, raw);
        Ok(())
    }

    /// Adds character content to the innermost open element.
    fn append(&mut self, start: usize, text: &str) {
        let stray = text
            .find(|c| !is_space(c))
            .map(|leading| self.position(start + leading));
        let Some(parent) = self.open.last_mut() else {
            return;
        };
        if let Some(Node::Text(before, first)) = parent.children.last_mut() {
            before.push_str(text);
            *first = first.or(stray);
        } else {
            parent.children.push(Node::Text(text.to_owned(), stray));
        }
    }

    /// The character a reference stands for.
    fn reference(&self, start: usize, name: &str) -> Result<char, Diagnostic> {
        let predefined = match name {
            "lt" => Some('<'),
            "gt" => Some('>'),
            "amp" => Some('&'),
            "quot" => Some('"'),
            "apos" => Some('\''),
            _ => None,
        };
        if let Some(c) = predefined {
            return Ok(c);
        }
        let Some(number) = name.strip_prefix('#') else {
            return Err(self.ill_formed(
                start,
                format!(
                    "the entity {} is not defined, expected lt, gt, amp, quot, apos or a \
                     character number",
                    quoted(name)
                ),
            ));
        };
        let (digits, radix) = match number.strip_prefix('x') {
            Some(digits) => (digits, 16),
            None => (number, 10),
        };
        digits
            .chars()
            .all(|c| c.is_digit(radix))
            .then(|| u32::from_str_radix(digits.trim_start_matches('0'), radix).ok())
            .flatten()
            .and_then(char::from_u32)
            .filter(|&c| is_char(c))
            .ok_or_else(|| {
                self.ill_formed(
                    start,
                    format!("{} is not the number of an XML character", quoted(name)),
                )
            })
    }

    fn start(&mut self, start: usize, tag: &str) -> Result<(), Diagnostic> {
        if self.open.is_empty() && self.root.is_some() {
            return Err(self.ill_formed(start, "a second element, expected only one at the top"));
        }
        if self.open.len() >= MAX_DEPTH {
            return Err(self.position(start).diagnostic(
                "document-too-deep",
                format!("elements are nested deeper than {MAX_DEPTH}"),
            ));
        }
        self.elements += 1;
        if self.elements > MAX_ELEMENTS {
            return Err(self.position(start).diagnostic(
                "document-too-large",
                format!("the document has more than {MAX_ELEMENTS} elements"),
            ));
        }
        let name_end = tag.find(is_space).unwrap_or(tag.len());
        let (name, attributes) = tag.split_at(name_end);
        let raw = self.attributes(start + 1 + name_end, attributes)?;
        let scope = self.scope(&raw)?;
        let (namespace, prefix, local) = self.expand(start + 1, name, scope.as_ref(), true)?;
        let mut element = Element {
            namespace,
            prefix,
            local,
            attributes: Vec::new(),
            children: Vec::new(),
            position: self.position(start),
            scope,
        };
        for (at, name, value) in raw {
            if name == "xmlns" || name.starts_with("xmlns:") {
                continue;
            }
            let (namespace, prefix, local) =
                self.expand(at, name, element.scope.as_ref(), false)?;
            if element.qualified_attribute(&namespace, &local).is_some() {
                return Err(self.ill_formed(at, format!("the attribute {name} is given twice")));
            }
            let is_id = &*namespace == namespace::XML && local == "id";
            if is_id && !is_ncname(trim(&value)) {
                return Err(self.ill_formed(at, "xml:id must be a name without colon"));
            }
            if is_id && !self.ids.insert(trim(&value).to_owned()) {
                return Err(
                    self.ill_formed(at, format!("xml:id {} is given twice", quoted(&value)))
                );
            }
            element.attributes.push(Attribute {
                namespace,
                prefix,
                local,
                value,
                position: self.position(at),
            });
        }
        self.open.push(element);
        Ok(())
    }

    /// Splits the attributes of a start tag: offset, name, value.
    fn attributes<'a>(
        &self,
        start: usize,
        text: &'a str,
    ) -> Result<Vec<(usize, &'a str, String)>, Diagnostic> {
        let mut attributes: Vec<(usize, &str, String)> = Vec::new();
        let mut rest = text;
        loop {
            let trimmed = rest.trim_start_matches(is_space);
            let at = start + text.len() - trimmed.len();
            if trimmed.is_empty() {
                return Ok(attributes);
            }
            if trimmed.len() == rest.len() {
                return Err(self.ill_formed(at, "expected a space between attributes"));
            }
            let malformed =
                |what: &str| self.ill_formed(at, format!("malformed attribute, expected {what}"));
            let (name, after) = trimmed
                .split_once('=')
                .ok_or_else(|| malformed("name=\"value\""))?;
            let name = name.trim_end_matches(is_space);
            if !is_name(name) {
                return Err(malformed("a name before '='"));
            }
            let after = after.trim_start_matches(is_space);
            let quote = after
                .chars()
                .next()
                .filter(|c| matches!(c, '"' | '\''))
                .ok_or_else(|| malformed("a value in quotes"))?;
            let (value, behind) = after[1..]
                .split_once(quote)
                .ok_or_else(|| malformed("a closing quote"))?;
            if attributes.iter().any(|(_, other, _)| *other == name) {
                return Err(self.ill_formed(at, format!("the attribute {name} is given twice")));
            }
            if attributes.len() == MAX_ATTRIBUTES {
                return Err(self.position(at).diagnostic(
                    "document-too-large",
                    format!("an element has more than {MAX_ATTRIBUTES} attributes"),
                ));
            }
            attributes.push((at, name, self.attribute_value(at, value)?));
            rest = behind;
        }
    }

    /// Resolves references and normalises white space (XML 1.0, 3.3.3).
    fn attribute_value(&self, at: usize, raw: &str) -> Result<String, Diagnostic> {
        if raw.contains('<') {
            return Err(self.ill_formed(at, "'<' in an attribute's value, expected '&lt;'"));
        }
        let mut value = String::with_capacity(raw.len());
        let mut rest = raw;
        while let Some((before, after)) = rest.split_once('&') {
            let (name, behind) = after
                .split_once(';')
                .ok_or_else(|| self.ill_formed(at, "'&' without ';', expected '&amp;'"))?;
            value.extend(before.chars().map(|c| if is_space(c) { ' ' } else { c }));
            value.push(self.reference(at, name)?);
            rest = behind;
        }
        value.extend(rest.chars().map(|c| if is_space(c) { ' ' } else { c }));
        Ok(value)
    }

    /// The namespace declarations in force inside an element.
    fn scope(
        &mut self,
        attributes: &[(usize, &str, String)],
    ) -> Result<Option<Rc<Scope>>, Diagnostic> {
        let outer = self.open.last().and_then(|parent| parent.scope.clone());
        let mut bindings = Vec::new();
        for (at, name, uri) in attributes {
            let prefix = match name.strip_prefix("xmlns") {
                Some("") => "",
                Some(prefix) if prefix.starts_with(':') => &prefix[1..],
                _ => continue,
            };
            let wrong = |message: &str| Err(self.ill_formed(*at, message));
            if *name != "xmlns" && !is_ncname(prefix) {
                return wrong("a namespace prefix must be a name without colon");
            }
            if prefix == "xmlns" || uri == namespace::XMLNS {
                return wrong("the prefix xmlns and its namespace must not be declared");
            }
            if (prefix == "xml") != (uri == namespace::XML) {
                return wrong("the prefix xml and its namespace belong together");
            }
            if uri.is_empty() && !prefix.is_empty() {
                return wrong("a namespace prefix must not be bound to nothing");
            }
            if !is_uri_reference(uri.as_bytes()) {
                return wrong("the name of a namespace must be a URI");
            }
            bindings.push((prefix.to_owned(), self.intern(namespace::canonical(uri))));
        }
        Ok(if bindings.is_empty() {
            outer
        } else {
            let total = bindings.len() + outer.as_ref().map_or(0, |outer| outer.total);
            if total > MAX_NAMESPACES {
                let at = attributes.first().map_or(0, |(at, ..)| *at);
                return Err(self.position(at).diagnostic(
                    "document-too-large",
                    format!("more than {MAX_NAMESPACES} namespaces are declared at once"),
                ));
            }
            Some(Rc::new(Scope {
                bindings,
                total,
                outer,
            }))
        })
    }

    fn intern(&mut self, name: &str) -> Rc<str> {
        if let Some(known) = self.names.get(name) {
            return known.clone();
        }
        let new: Rc<str> = Rc::from(name);
        self.names.insert(new.clone());
        new
    }

    /// Namespace, prefix and local part of the name of an element or attribute.
    fn expand(
        &mut self,
        at: usize,
        name: &str,
        scope: Option<&Rc<Scope>>,
        is_element: bool,
    ) -> Result<(Rc<str>, Rc<str>, String), Diagnostic> {
        let (prefix, local) = split_qname(name)
            .ok_or_else(|| self.ill_formed(at, format!("{} is not a name", quoted(name))))?;
        let namespace = match prefix {
            // The default namespace does not apply to attributes (section 6.2).
            None if !is_element => self.intern(""),
            None => resolve(scope, "").unwrap_or_else(|| Rc::from("")),
            Some(prefix) => match resolve(scope, prefix) {
                Some(uri) => uri,
                None => self.undeclared(at, prefix, name)?,
            },
        };
        let prefix = self.intern(prefix.unwrap_or_default());
        Ok((namespace, prefix, local.to_owned()))
    }

    fn undeclared(&mut self, at: usize, prefix: &str, name: &str) -> Result<Rc<str>, Diagnostic> {
        let customary = namespace::by_prefix(prefix);
        let hint = customary.unwrap_or("the URI of its namespace");
        let finding = self.position(at).diagnostic(
            "undeclared-prefix",
            format!(
                "the namespace prefix of {} is not declared, expected xmlns:{prefix}=\"{hint}\"",
                quoted(name)
            ),
        );
        match customary {
            Some(uri) if self.lenient => {
                if self.undeclared.insert(prefix.to_owned()) {
                    self.forgiven.push(finding);
                }
                Ok(self.intern(uri))
            }
            _ => Err(finding),
        }
    }

    fn end(&mut self, start: usize) -> Result<(), Diagnostic> {
        let Some(element) = self.open.pop() else {
            return Err(self.ill_formed(start, "an end tag without start tag"));
        };
        match self.open.last_mut() {
            Some(parent) => parent.children.push(Node::Element(element)),
            None => self.root = Some(element),
        }
        Ok(())
    }

    fn declaration(&self, start: usize, text: &str) -> Result<(), Diagnostic> {
        if start != 0 {
            return Err(self.ill_formed(
                start,
                "an XML declaration, expected only at the very beginning of the document",
            ));
        }
        let attributes = self.attributes(start + "<?xml".len(), text)?;
        if prolog::is_declaration(&attributes) && !text.contains('&') {
            Ok(())
        } else {
            Err(self.ill_formed(
                start,
                "malformed XML declaration, expected <?xml version=\"1.0\" encoding=\"UTF-8\"?>",
            ))
        }
    }

    fn instruction(&self, start: usize, text: &str) -> Result<(), Diagnostic> {
        let target = text.split(is_space).next().unwrap_or_default();
        if !is_ncname(target) || target.eq_ignore_ascii_case("xml") {
            return Err(self.ill_formed(
                start,
                format!(
                    "{} is not the name of a processing instruction",
                    quoted(target)
                ),
            ));
        }
        Ok(())
    }

    fn doctype(&mut self, start: usize, text: &str) -> Result<(), Diagnostic> {
        if self.has_doctype || self.root.is_some() || !self.open.is_empty() {
            return Err(self.ill_formed(start, "a document type declaration in the wrong place"));
        }
        self.has_doctype = true;
        prolog::doctype(text)
            .map_err(|(code, message)| self.position(start).diagnostic(code, message))
    }
}

fn offset(position: u64) -> usize {
    usize::try_from(position).unwrap_or(usize::MAX)
}

/// The inside of a piece of markup.
fn inner<'r>(raw: &'r str, open: &str, close: &str) -> &'r str {
    let raw = raw.strip_prefix(open).unwrap_or(raw);
    raw.strip_suffix(close).unwrap_or(raw)
}
