//! The element tree of a document.

use std::rc::Rc;

use crate::diagnostic::Position;
use crate::namespace;

/// An element with its attributes and children.
#[derive(Debug, Clone)]
pub(crate) struct Element {
    /// Namespace; empty for none.
    pub namespace: Rc<str>,
    /// As it was written; empty for none.
    pub prefix: Rc<str>,
    pub local: String,
    pub attributes: Vec<Attribute>,
    pub children: Vec<Node>,
    pub scope: Option<Rc<Scope>>,
    pub position: Position,
}

/// An attribute that is not a namespace declaration, its value normalised (XML 1.0, 3.3.3).
#[derive(Debug, Clone)]
pub(crate) struct Attribute {
    /// Namespace; empty for none.
    pub namespace: Rc<str>,
    /// As it was written; empty for none.
    pub prefix: Rc<str>,
    pub local: String,
    pub value: String,
    pub position: Position,
}

/// Content of an element. Comments and processing instructions are left out; text around them is
/// one piece.
#[derive(Debug, Clone)]
pub(crate) enum Node {
    Element(Element),
    /// Text, and the place of its first character other than white space.
    Text(String, Option<Position>),
}

/// The namespace declarations of one element and, by `outer`, of those around it.
#[derive(Debug)]
pub(crate) struct Scope {
    /// Prefix (empty for the default namespace) and namespace (empty where it is undone).
    pub bindings: Vec<(String, Rc<str>)>,
    /// How many declarations there are, those around it included.
    pub total: usize,
    pub outer: Option<Rc<Scope>>,
}

/// The namespace bound to `prefix`, if it is declared; the empty prefix is always bound.
pub(crate) fn resolve(scope: Option<&Rc<Scope>>, prefix: &str) -> Option<Rc<str>> {
    let mut at = scope;
    while let Some(scope) = at {
        if let Some((_, uri)) = scope.bindings.iter().find(|(bound, _)| bound == prefix) {
            return Some(uri.clone());
        }
        at = scope.outer.as_ref();
    }
    match prefix {
        "" => Some(Rc::from("")),
        "xml" => Some(Rc::from(namespace::XML)),
        _ => None,
    }
}

impl Element {
    /// Whether the element has this qualified name.
    pub(crate) fn is(&self, namespace: &str, local: &str) -> bool {
        &*self.namespace == namespace && self.local == local
    }

    /// The name for messages.
    pub(crate) fn display(&self) -> String {
        namespace::display(&self.namespace, &self.local)
    }

    pub(crate) fn elements(&self) -> impl Iterator<Item = &Element> {
        self.children.iter().filter_map(|node| match node {
            Node::Element(element) => Some(element),
            Node::Text(..) => None,
        })
    }

    /// The children of this name.
    pub(crate) fn all<'e>(
        &'e self,
        namespace: &'e str,
        local: &'e str,
    ) -> impl Iterator<Item = &'e Element> {
        self.elements()
            .filter(move |child| child.is(namespace, local))
    }

    /// The first child of this name.
    pub(crate) fn child(&self, namespace: &str, local: &str) -> Option<&Element> {
        self.elements().find(|child| child.is(namespace, local))
    }

    /// All character content that stands directly in the element.
    pub(crate) fn text(&self) -> String {
        self.children
            .iter()
            .filter_map(|node| match node {
                Node::Text(text, _) => Some(text.as_str()),
                Node::Element(_) => None,
            })
            .collect()
    }

    /// The first character content other than white space.
    pub(crate) fn stray_text(&self) -> Option<(&str, Position)> {
        self.children.iter().find_map(|node| match node {
            Node::Text(text, stray) => stray.map(|position| (text.as_str(), position)),
            Node::Element(_) => None,
        })
    }

    /// The value of an attribute without namespace.
    pub(crate) fn attribute(&self, local: &str) -> Option<&Attribute> {
        self.qualified_attribute("", local)
    }

    pub(crate) fn qualified_attribute(&self, namespace: &str, local: &str) -> Option<&Attribute> {
        self.attributes
            .iter()
            .find(|attribute| &*attribute.namespace == namespace && attribute.local == local)
    }
}
