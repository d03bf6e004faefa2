//! The part of XPath 1.0 with which a parameter sweep says where its values go.
//!
//! `/a:b//c:d[2]/@e` and `substring(PATH, START, LENGTH)`: steps to children, descendants and
//! attributes and to `text()`, names and `*`, and the predicates `[2]`, `[last()]`,
//! `[position()=2]` and `[@a='b']`. All else is refused by name.
//!
//! Text around comments is one piece here, so that `text()` finds one text where XPath has two.

use std::rc::Rc;

use crate::chars::{is_name_char, is_ncname, is_space};
use crate::diagnostic::{Diagnostic, Position, quoted};
use crate::document::{Element, Node};
use crate::limits::{MAX_MATCH_STEPS, MAX_MATCH_VISITS};
use crate::namespace;

const UNSUPPORTED: &str = "unsupported-match";

/// A path, and which part of the text that it finds is meant.
#[derive(Debug)]
pub(crate) struct Match {
    steps: Vec<Step>,
    pub part: Option<Part>,
}

/// The second and third argument of `substring`: characters, counted from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Part {
    pub start: u64,
    /// To the end if there is none.
    pub length: Option<u64>,
}

#[derive(Debug)]
struct Step {
    /// Behind `//`: from all descendants too.
    descends: bool,
    kind: Kind,
    predicates: Vec<Predicate>,
}

#[derive(Debug)]
enum Kind {
    Child(Name),
    Attribute(Name),
    Text,
}

/// A name or, without one of its parts, any.
#[derive(Debug)]
struct Name {
    namespace: Option<Rc<str>>,
    local: Option<String>,
}

impl Name {
    fn fits(&self, namespace: &str, local: &str) -> bool {
        self.namespace
            .as_ref()
            .is_none_or(|own| **own == *namespace)
            && self.local.as_ref().is_none_or(|own| own == local)
    }
}

#[derive(Debug)]
enum Predicate {
    Position(u64),
    Last,
    Attribute(Name, String),
}

impl Match {
    /// Reads an expression whose prefixes `bindings` declares; `at` is its place.
    pub(crate) fn parse(
        text: &str,
        bindings: &[(String, Rc<str>)],
        at: Position,
    ) -> Result<Match, Diagnostic> {
        let mut parser = Parser {
            text,
            rest: text,
            bindings,
            at,
        };
        let found = parser.expression()?;
        parser.skip_space();
        if parser.rest.is_empty() {
            Ok(found)
        } else {
            Err(parser.unsupported("the end"))
        }
    }
}

struct Parser<'m> {
    text: &'m str,
    rest: &'m str,
    bindings: &'m [(String, Rc<str>)],
    at: Position,
}

impl<'m> Parser<'m> {
    fn unsupported(&self, expected: &str) -> Diagnostic {
        let found = match self.rest.trim_start_matches(is_space) {
            "" => "its end".to_owned(),
            rest => quoted(rest),
        };
        self.at.diagnostic(
            UNSUPPORTED,
            format!(
                "the match {} is not understood at {found}, expected {expected}",
                quoted(self.text.trim_matches(is_space)),
            ),
        )
    }

    fn skip_space(&mut self) {
        self.rest = self.rest.trim_start_matches(is_space);
    }

    fn eat(&mut self, token: &str) -> bool {
        self.skip_space();
        match self.rest.strip_prefix(token) {
            Some(rest) => {
                self.rest = rest;
                true
            }
            None => false,
        }
    }

    fn need(&mut self, token: &str) -> Result<(), Diagnostic> {
        match self.eat(token) {
            true => Ok(()),
            false => Err(self.unsupported(&format!("'{token}'"))),
        }
    }

    fn expression(&mut self) -> Result<Match, Diagnostic> {
        self.skip_space();
        if self.rest.starts_with('/') {
            let steps = self.path()?;
            return Ok(Match { steps, part: None });
        }
        if !self.eat("substring") || !self.eat("(") {
            self.rest = self.text;
            return Err(self.unsupported("a path from '/' on or substring(PATH, START, LENGTH)"));
        }
        let steps = self.path()?;
        self.need(",")?;
        let start = self.number()?;
        let length = match self.eat(",") {
            true => Some(self.number()?),
            false => None,
        };
        self.need(")")?;
        let part = Some(Part { start, length });
        Ok(Match { steps, part })
    }

    fn number(&mut self) -> Result<u64, Diagnostic> {
        self.skip_space();
        let end = self
            .rest
            .find(|c: char| !c.is_ascii_digit())
            .unwrap_or(self.rest.len());
        let (digits, rest) = self.rest.split_at(end);
        match digits.parse() {
            Ok(number) if !rest.starts_with('.') => {
                self.rest = rest;
                Ok(number)
            }
            _ => Err(self.unsupported("a whole number")),
        }
    }

    fn path(&mut self) -> Result<Vec<Step>, Diagnostic> {
        let mut steps: Vec<Step> = Vec::new();
        loop {
            let descends = if self.eat("//") {
                true
            } else if self.eat("/") {
                false
            } else if steps.is_empty() {
                return Err(self.unsupported("a path from '/' on"));
            } else {
                return Ok(steps);
            };
            if steps.len() == MAX_MATCH_STEPS {
                return Err(self.unsupported(&format!("at most {MAX_MATCH_STEPS} steps")));
            }
            if !matches!(
                steps.last().map(|step| &step.kind),
                None | Some(Kind::Child(_))
            ) {
                return Err(self.unsupported("nothing behind an attribute or text"));
            }
            steps.push(self.step(descends)?);
        }
    }

    fn step(&mut self, descends: bool) -> Result<Step, Diagnostic> {
        let is_attribute = self.eat("@") || self.eat("attribute::");
        let kind = if is_attribute {
            Kind::Attribute(self.name(true)?)
        } else {
            self.eat("child::");
            let before = self.rest;
            if self.eat("text") && self.eat("(") {
                self.need(")")?;
                Kind::Text
            } else {
                self.rest = before;
                Kind::Child(self.name(true)?)
            }
        };
        let mut predicates = Vec::new();
        while matches!(kind, Kind::Child(_)) && self.eat("[") {
            predicates.push(self.predicate()?);
            self.need("]")?;
            if predicates.len() > MAX_MATCH_STEPS {
                return Err(self.unsupported("fewer predicates"));
            }
        }
        Ok(Step {
            descends,
            kind,
            predicates,
        })
    }

    fn predicate(&mut self) -> Result<Predicate, Diagnostic> {
        if self.eat("@") || self.eat("attribute::") {
            let name = self.name(false)?;
            self.need("=")?;
            return Ok(Predicate::Attribute(name, self.literal()?));
        }
        if self.eat("last") {
            self.need("(")?;
            self.need(")")?;
            return Ok(Predicate::Last);
        }
        if self.eat("position") {
            self.need("(")?;
            self.need(")")?;
            self.need("=")?;
        }
        let position = self.number();
        position.map(Predicate::Position).map_err(|_| {
            self.unsupported("[NUMBER], [last()], [position()=NUMBER] or [@NAME='VALUE']")
        })
    }

    fn literal(&mut self) -> Result<String, Diagnostic> {
        self.skip_space();
        let literal = self
            .rest
            .chars()
            .next()
            .filter(|c| matches!(c, '"' | '\''))
            .and_then(|quote| self.rest[1..].split_once(quote));
        match literal {
            Some((literal, rest)) => {
                self.rest = rest;
                Ok(literal.to_owned())
            }
            None => Err(self.unsupported("a value in quotes")),
        }
    }

    fn name(&mut self, may_be_any: bool) -> Result<Name, Diagnostic> {
        if may_be_any && self.eat("*") {
            return Ok(Name {
                namespace: None,
                local: None,
            });
        }
        self.skip_space();
        let first = self.ncname()?;
        let Some(rest) = self.rest.strip_prefix(':') else {
            return Ok(Name {
                namespace: Some(Rc::from("")),
                local: Some(first.to_owned()),
            });
        };
        if rest.starts_with(':') {
            return Err(self.unsupported("no other axis than child and attribute"));
        }
        self.rest = rest;
        let local = match may_be_any && rest.starts_with('*') {
            true => {
                self.rest = &rest[1..];
                None
            }
            false => Some(self.ncname()?.to_owned()),
        };
        let namespace = self.bindings.iter().find(|(prefix, _)| prefix == first);
        match namespace {
            Some((_, namespace)) => Ok(Name {
                namespace: Some(namespace.clone()),
                local,
            }),
            None => Err(self.at.diagnostic(
                "undeclared-prefix",
                format!(
                    "the prefix {} in the match {} is not declared, expected a \
                     jsdl-sweep:NamespaceBinding for it",
                    quoted(first),
                    quoted(self.text.trim_matches(is_space))
                ),
            )),
        }
    }

    fn ncname(&mut self) -> Result<&'m str, Diagnostic> {
        let end = self
            .rest
            .find(|c| c == ':' || !is_name_char(c))
            .unwrap_or(self.rest.len());
        let (name, rest) = self.rest.split_at(end);
        if !is_ncname(name) || rest.trim_start_matches(is_space).starts_with('(') {
            return Err(self.unsupported("the name of an element or attribute"));
        }
        self.rest = rest;
        Ok(name)
    }
}

/// A place with text that a match found: the content of an element, or one of its attributes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Place {
    /// Of each element on the way from the document's, its index among the children.
    pub path: Vec<usize>,
    /// The index of the attribute.
    pub attribute: Option<usize>,
}

/// The elements of a tree in document order, for searches.
pub(crate) struct Index<'t> {
    /// The first stands for the document around the element of the tree.
    entries: Vec<Entry<'t>>,
    visits: usize,
}

struct Entry<'t> {
    element: Option<&'t Element>,
    parent: usize,
    /// Index among the children of the parent.
    child: usize,
    /// Behind the last entry that is inside this one.
    end: usize,
}

impl<'t> Index<'t> {
    pub(crate) fn new(root: &'t Element) -> Self {
        let mut index = Index {
            entries: vec![Entry {
                element: None,
                parent: 0,
                child: 0,
                end: 0,
            }],
            visits: 0,
        };
        index.add(root, 0, 0);
        index.entries[0].end = index.entries.len();
        index
    }

    fn add(&mut self, element: &'t Element, parent: usize, child: usize) {
        let own = self.entries.len();
        self.entries.push(Entry {
            element: Some(element),
            parent,
            child,
            end: 0,
        });
        for (at, node) in element.children.iter().enumerate() {
            if let Node::Element(inner) = node {
                self.add(inner, own, at);
            }
        }
        self.entries[own].end = self.entries.len();
    }

    /// The one place that the match finds; `text` is its expression.
    pub(crate) fn find(
        &mut self,
        found: &Match,
        text: &str,
        at: Position,
    ) -> Result<Place, Diagnostic> {
        let text = quoted(text.trim_matches(is_space));
        let mut nodes = vec![0];
        for (number, step) in found.steps.iter().enumerate() {
            if step.descends {
                nodes = self.with_descendants(&nodes);
            }
            self.visits = self.visits.saturating_add(nodes.len());
            if self.visits > MAX_MATCH_VISITS {
                return Err(at.diagnostic(
                    "sweep-too-large",
                    format!(
                        "the matches up to {text} look at more than {MAX_MATCH_VISITS} elements"
                    ),
                ));
            }
            let is_last = number + 1 == found.steps.len();
            nodes = match &step.kind {
                Kind::Child(name) => self.children(&nodes, name, &step.predicates),
                Kind::Attribute(name) if is_last => {
                    return self.attribute(&nodes, name, &text, at);
                }
                Kind::Text if is_last => {
                    nodes.retain(|&node| self.has_text(node));
                    nodes
                }
                // The parser lets nothing stand behind these.
                Kind::Attribute(_) | Kind::Text => Vec::new(),
            };
        }
        let node = one(&nodes, &text, at)?;
        if let Some(element) = self.entries[node].element
            && let Some(inner) = element.elements().next()
        {
            return Err(at.diagnostic(
                UNSUPPORTED,
                format!(
                    "the match {text} finds {}, which has {} in it, expected an element with text \
                     only",
                    element.display(),
                    inner.display()
                ),
            ));
        }
        Ok(Place {
            path: self.path(node),
            attribute: None,
        })
    }

    /// The nodes and all inside them, in document order.
    fn with_descendants(&self, nodes: &[usize]) -> Vec<usize> {
        let mut all: Vec<usize> = Vec::new();
        let mut end = 0;
        for &node in nodes {
            all.extend(node.max(end)..self.entries[node].end.max(end));
            end = end.max(self.entries[node].end);
        }
        all
    }

    fn children(&mut self, nodes: &[usize], name: &Name, predicates: &[Predicate]) -> Vec<usize> {
        let mut all = Vec::new();
        for &node in nodes {
            let mut fitting = Vec::new();
            let mut child = node + 1;
            while child < self.entries[node].end {
                self.visits = self.visits.saturating_add(1);
                let element = self.entries[child].element;
                if element.is_some_and(|element| name.fits(&element.namespace, &element.local)) {
                    fitting.push(child);
                }
                child = self.entries[child].end;
            }
            for predicate in predicates {
                fitting = self.filter(fitting, predicate);
            }
            all.append(&mut fitting);
        }
        // Children of a node may stand behind those of one inside it.
        all.sort_unstable();
        all
    }

    fn filter(&self, mut nodes: Vec<usize>, predicate: &Predicate) -> Vec<usize> {
        match predicate {
            Predicate::Position(position) => usize::try_from(*position)
                .ok()
                .and_then(|position| nodes.get(position.checked_sub(1)?).copied())
                .into_iter()
                .collect(),
            Predicate::Last => nodes.pop().into_iter().collect(),
            Predicate::Attribute(name, value) => {
                nodes.retain(|&node| {
                    self.entries[node].element.is_some_and(|element| {
                        element.attributes.iter().any(|attribute| {
                            name.fits(&attribute.namespace, &attribute.local)
                                && attribute.value == *value
                        })
                    })
                });
                nodes
            }
        }
    }

    fn has_text(&self, node: usize) -> bool {
        self.entries[node].element.is_some_and(|element| {
            let is_text = |node: &Node| matches!(node, Node::Text(..));
            element.children.iter().any(is_text)
        })
    }

    fn attribute(
        &self,
        nodes: &[usize],
        name: &Name,
        text: &str,
        at: Position,
    ) -> Result<Place, Diagnostic> {
        let mut places = Vec::new();
        for &node in nodes {
            let attributes = self.entries[node]
                .element
                .map_or(&[][..], |element| &element.attributes);
            for (index, attribute) in attributes.iter().enumerate() {
                if name.fits(&attribute.namespace, &attribute.local) {
                    places.push((node, index, attribute));
                }
            }
        }
        let (node, index, attribute) = one(&places, text, at)?;
        if &*attribute.namespace == namespace::XML {
            return Err(at.diagnostic(
                UNSUPPORTED,
                format!(
                    "the match {text} finds xml:{}, expected another attribute",
                    attribute.local
                ),
            ));
        }
        Ok(Place {
            path: self.path(node),
            attribute: Some(index),
        })
    }

    fn path(&self, node: usize) -> Vec<usize> {
        let mut path = Vec::new();
        let mut at = node;
        while self.entries[at].parent != 0 {
            path.push(self.entries[at].child);
            at = self.entries[at].parent;
        }
        path.reverse();
        path
    }
}

/// The only one of what a match finds.
fn one<T: Copy>(found: &[T], text: &str, at: Position) -> Result<T, Diagnostic> {
    match found {
        [one] => Ok(*one),
        [] => Err(at.diagnostic(
            "match-finds-nothing",
            format!(
                "the match {text} finds nothing, expected a place in the document; names without \
                 prefix are in no namespace"
            ),
        )),
        several => Err(at.diagnostic(
            "match-finds-several",
            format!(
                "the match {text} finds {} places, expected one",
                several.len()
            ),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree;

    const DOCUMENT: &str = "<a xmlns='urn:x' xmlns:y='urn:y' i='0'>\
        <b n='1' y:n='2'>one</b><y:b>two</y:b><c><b n='3'>three</b><b/><b>last</b></c>\
        <d><c><b xml:lang='en'>deep<!-- --> text</b></c>mixed</d></a>";

    fn find(expression: &str) -> Result<Place, Diagnostic> {
        let tree = tree::build(DOCUMENT, false).unwrap();
        let bindings = [
            ("x".to_owned(), Rc::from("urn:x")),
            ("y".to_owned(), Rc::from("urn:y")),
        ];
        let found = Match::parse(expression, &bindings, Position::START)?;
        Index::new(&tree.root).find(&found, expression, Position::START)
    }

    #[track_caller]
    fn finds(expression: &str, path: &[usize], attribute: Option<usize>) {
        let place = find(expression).unwrap();
        assert_eq!(place.path, path, "{expression}");
        assert_eq!(place.attribute, attribute, "{expression}");
    }

    #[test]
    fn paths_find_what_xpath_finds() {
        finds("/x:a/x:b", &[0], None);
        finds(" / x:a / child::x:b / text ( ) ", &[0], None);
        finds("/x:a/y:b", &[1], None);
        finds("/x:a/y:*", &[1], None);
        finds("/*/*[2]", &[1], None);
        finds("/x:a/x:c/x:b[3]", &[2, 2], None);
        finds("/x:a/x:c/x:b[last()]", &[2, 2], None);
        finds("/x:a/x:c/x:b[position() = 2]", &[2, 1], None);
        finds("/x:a/x:c/x:b[@n='3']", &[2, 0], None);
        finds("/x:a/x:c/x:b[@n=\"3\"][1]", &[2, 0], None);
        finds("//x:d//x:b", &[3, 0, 0], None);
        finds("//x:c/x:b[2]", &[2, 1], None);
    }

    #[test]
    fn attributes_are_found() {
        finds("/x:a/@i", &[], Some(0));
        finds("/x:a/attribute::*", &[], Some(0));
        finds("/x:a/x:b/@n", &[0], Some(0));
        finds("/x:a/x:b/@y:n", &[0], Some(1));
        finds("//@i", &[], Some(0));
    }

    #[test]
    fn a_part_is_that_of_substring() {
        let part = |expression: &str| Match::parse(expression, &[], Position::START).unwrap().part;
        let expected = |start, length| Some(Part { start, length });
        assert_eq!(part("substring(/a, 4, 1)"), expected(4, Some(1)));
        assert_eq!(part(" substring ( /a[1] , 12 ) "), expected(12, None));
        assert_eq!(part("/substring"), None);
    }

    #[test]
    fn what_is_not_the_part_of_xpath_is_refused() {
        for (expression, code) in [
            ("", UNSUPPORTED),
            ("x:a", UNSUPPORTED),
            ("/", UNSUPPORTED),
            ("//", UNSUPPORTED),
            ("/x:a/", UNSUPPORTED),
            ("/x:a/..", UNSUPPORTED),
            ("/x:a | /x:b", UNSUPPORTED),
            ("/x:a/ancestor::x:a", UNSUPPORTED),
            ("/x:a/node()", UNSUPPORTED),
            ("/x:a/comment()", UNSUPPORTED),
            ("/x:a/@i/x:b", UNSUPPORTED),
            ("/x:a/text()/x:b", UNSUPPORTED),
            ("/x:a/@i[1]", UNSUPPORTED),
            ("/x:a[]", UNSUPPORTED),
            ("/x:a[1", UNSUPPORTED),
            ("/x:a[-1]", UNSUPPORTED),
            ("/x:a[1.5]", UNSUPPORTED),
            ("/x:a[x:b='one']", UNSUPPORTED),
            ("/x:a[@i=0]", UNSUPPORTED),
            ("/x:a[@i='0]", UNSUPPORTED),
            ("/x:a[99999999999999999999]", UNSUPPORTED),
            ("concat('a', 'b')", UNSUPPORTED),
            ("substring('a', 1, 1)", UNSUPPORTED),
            ("substring(/x:a)", UNSUPPORTED),
            ("substring(/x:a, 1, 1", UNSUPPORTED),
            ("substring(/x:a, P + 1, 1)", UNSUPPORTED),
            ("substring(/x:a, 1, 1, 1)", UNSUPPORTED),
            ("substring(substring(/x:a, 1, 1), 1, 1)", UNSUPPORTED),
            ("/x:a/x:c", UNSUPPORTED),
            ("/x:a/x:d/text()", UNSUPPORTED),
            ("//x:b/@xml:lang", "undeclared-prefix"),
            ("//x:d//@*", UNSUPPORTED),
            ("/z:a", "undeclared-prefix"),
            ("/a", "match-finds-nothing"),
            ("/x:a/b", "match-finds-nothing"),
            ("/x:a/x:c/x:b[0]", "match-finds-nothing"),
            ("/x:a/x:c/x:b[4]", "match-finds-nothing"),
            ("/x:a/x:c/x:b[2]/text()", "match-finds-nothing"),
            ("/x:a/x:b/@m", "match-finds-nothing"),
            ("/text()", "match-finds-nothing"),
            ("/x:a/x:c/x:b", "match-finds-several"),
            ("//x:b", "match-finds-several"),
            ("//@n", "match-finds-several"),
            (&"//*".repeat(MAX_MATCH_STEPS + 1), UNSUPPORTED),
        ] {
            assert_eq!(find(expression).unwrap_err().code, code, "{expression}");
        }
    }

    #[test]
    fn the_work_is_bounded() {
        let document = format!("<a>{}</a>", "<b><b/></b>".repeat(20_000));
        let tree = tree::build(&document, false).unwrap();
        let expression = "//*".repeat(MAX_MATCH_STEPS);
        let found = Match::parse(&expression, &[], Position::START).unwrap();
        let mut index = Index::new(&tree.root);
        let mut code = "";
        for _ in 0..200 {
            code = index
                .find(&found, &expression, Position::START)
                .unwrap_err()
                .code;
        }
        assert_eq!(code, "sweep-too-large");
    }
}
