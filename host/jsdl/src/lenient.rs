//! Puts right, before validation, what people often get wrong, and says what it was.

use std::rc::Rc;

use crate::diagnostic::Diagnostic;
use crate::document::{Element, Node};
use crate::extensions::{Name, is_expected};
use crate::namespace::{self, JSDL, XSDL};
use crate::schema::{self, Content, Particle, Term, Type, UNDERSTOOD};

/// Elements that are left out where they only hold others: outer element and wrapper.
const WRAPPERS: &[(Name, Name)] = &[
    ((JSDL, "JobDefinition"), (JSDL, "JobDescription")),
    ((JSDL, "JobDescription"), (JSDL, "JobIdentification")),
    ((JSDL, "JobDescription"), (JSDL, "Application")),
    ((JSDL, "JobDescription"), (JSDL, "Resources")),
    (
        (JSDL, "Application"),
        (namespace::POSIX, "POSIXApplication"),
    ),
    ((JSDL, "Resources"), (JSDL, "OperatingSystem")),
    ((JSDL, "OperatingSystem"), (JSDL, "OperatingSystemType")),
    ((JSDL, "Resources"), (JSDL, "CPUArchitecture")),
    ((JSDL, "Resources"), (JSDL, "CandidateHosts")),
    ((JSDL, "Resources"), (XSDL, "InstanceDefinition")),
    ((XSDL, "InstanceDefinition"), (XSDL, "InstanceDescription")),
    ((XSDL, "Package"), (XSDL, "Location")),
    ((XSDL, "Kernel"), (XSDL, "Location")),
    ((XSDL, "Initrd"), (XSDL, "Location")),
    ((XSDL, "Image"), (XSDL, "Location")),
    ((XSDL, "Script"), (XSDL, "Location")),
];

/// Repairs the tree of a document.
pub(crate) fn repair(root: &mut Element, forgiven: &mut Vec<Diagnostic>) {
    if root.is(JSDL, "JobDescription") {
        let inner = std::mem::replace(root, like(root, JSDL, "JobDefinition"));
        forgiven.push(missing_wrapper(&inner, root));
        root.children.push(Node::Element(inner));
    }
    if let Some(decl) = schema::element(UNDERSTOOD, &root.namespace, &root.local) {
        element(root, decl.type_, forgiven);
    }
}

/// An empty element where another one stands.
fn like(place: &Element, ns: &str, local: &str) -> Element {
    Element {
        namespace: Rc::from(ns),
        prefix: place.prefix.clone(),
        local: local.to_owned(),
        attributes: Vec::new(),
        children: Vec::new(),
        scope: place.scope.clone(),
        position: place.position,
    }
}

fn missing_wrapper(inner: &Element, wrapper: &Element) -> Diagnostic {
    inner.position.diagnostic(
        "missing-wrapper",
        format!(
            "element {} stands alone, expected it in {}",
            inner.display(),
            wrapper.display()
        ),
    )
}

fn element(parent: &mut Element, type_: Type, forgiven: &mut Vec<Diagnostic>) {
    let Type::Complex(complex) = type_ else {
        return;
    };
    let Content::Sequence(particles) = complex.content else {
        return;
    };
    wrap(parent, particles, forgiven);
    let is_staging = parent.is(JSDL, "DataStaging");
    if is_staging {
        drop_no_archive(parent, forgiven);
    }
    reorder(parent, complex.namespace, particles, forgiven);
    if is_staging {
        add_creation_flag(parent, forgiven);
    }
    for node in &mut parent.children {
        let Node::Element(child) = node else {
            continue;
        };
        let local = particles.iter().find_map(|particle| match particle.term {
            Term::Local(decl) if decl.name == child.local => Some(decl),
            _ => None,
        });
        if let Some(decl) =
            local.or_else(|| schema::element(UNDERSTOOD, &child.namespace, &child.local))
        {
            element(child, decl.type_, forgiven);
        }
    }
}

/// Moves children that belong into a wrapper there.
fn wrap(parent: &mut Element, particles: &[Particle], forgiven: &mut Vec<Diagnostic>) {
    let wrappers: Vec<Name> = WRAPPERS
        .iter()
        .filter(|((ns, local), _)| parent.is(ns, local))
        .map(|&(_, wrapper)| wrapper)
        .collect();
    if wrappers.is_empty() {
        return;
    }
    let home = parent.namespace.clone();
    let mut kept: Vec<Node> = Vec::new();
    let mut made: Vec<Name> = Vec::new();
    for node in std::mem::take(&mut parent.children) {
        let Node::Element(child) = node else {
            kept.push(node);
            continue;
        };
        // The wrapper itself, behind elements that were put into one made for them.
        if let Some(&(ns, local)) = made.iter().find(|(ns, local)| child.is(ns, local))
            && let Some(wrapper) = last_of(&mut kept, ns, local)
        {
            wrapper.attributes.extend(child.attributes);
            wrapper.children.extend(child.children);
            made.retain(|name| *name != (ns, local));
            continue;
        }
        let belongs_here = particles
            .iter()
            .any(|particle| names(particle.term, &home, &child))
            || is_expected(parent, &child);
        let wrapper = wrappers
            .iter()
            .find(|wrapper| !belongs_here && accepts(**wrapper, &child));
        let Some(&(ns, local)) = wrapper else {
            kept.push(Node::Element(child));
            continue;
        };
        if let Some(wrapper) = last_of(&mut kept, ns, local) {
            forgiven.push(missing_wrapper(&child, wrapper));
            wrapper.children.push(Node::Element(child));
        } else {
            let mut wrapper = like(&child, ns, local);
            forgiven.push(missing_wrapper(&child, &wrapper));
            wrapper.children.push(Node::Element(child));
            kept.push(Node::Element(wrapper));
            made.push((ns, local));
        }
    }
    parent.children = kept;
}

fn last_of<'n>(nodes: &'n mut [Node], ns: &str, local: &str) -> Option<&'n mut Element> {
    nodes.iter_mut().rev().find_map(|node| match node {
        Node::Element(element) if element.is(ns, local) => Some(element),
        _ => None,
    })
}

/// Whether the place of a sequence names this element, rather than letting any through.
fn names(term: Term, home: &str, child: &Element) -> bool {
    !matches!(term, Term::Other) && term.admits(home, &child.namespace, &child.local)
}

/// Whether the wrapper, or one inside it, is where the element belongs.
fn accepts((ns, local): Name, child: &Element) -> bool {
    let Some(Type::Complex(complex)) =
        schema::element(UNDERSTOOD, ns, local).map(|decl| decl.type_)
    else {
        return false;
    };
    let own = match complex.content {
        Content::Sequence(particles) => particles
            .iter()
            .any(|particle| names(particle.term, complex.namespace, child)),
        Content::Empty | Content::Text(_) => false,
    };
    let mut wrapper = like(child, ns, local);
    wrapper.scope = None;
    own || is_expected(&wrapper, child)
        || WRAPPERS
            .iter()
            .filter(|(outer, _)| *outer == (ns, local))
            .any(|&(_, inner)| accepts(inner, child))
}

/// One system adds an element to JSDL that, where it says no, changes nothing.
fn drop_no_archive(parent: &mut Element, forgiven: &mut Vec<Diagnostic>) {
    parent.children.retain(|node| match node {
        Node::Element(child) if child.is(JSDL, "HandleAsArchive") && is_false(child) => {
            forgiven.push(child.position.diagnostic(
                "unknown-element",
                format!(
                    "element {} is not known, expected none; ignored as it says no",
                    child.display()
                ),
            ));
            false
        }
        _ => true,
    });
}

/// Staging is often written without the flag.
fn add_creation_flag(parent: &mut Element, forgiven: &mut Vec<Diagnostic>) {
    if parent.child(JSDL, "CreationFlag").is_some() {
        return;
    }
    forgiven.push(parent.position.diagnostic(
        "missing-creation-flag",
        format!(
            "element {} has no jsdl:CreationFlag, expected one; taken as overwrite",
            parent.display()
        ),
    ));
    let mut flag = like(parent, JSDL, "CreationFlag");
    let text = Node::Text("overwrite".to_owned(), Some(parent.position));
    flag.children.push(text);
    let names = parent
        .children
        .iter()
        .take_while(|node| match node {
            Node::Element(child) => child.is(JSDL, "FileName") || child.is(JSDL, "FilesystemName"),
            Node::Text(..) => false,
        })
        .count();
    parent.children.insert(names, Node::Element(flag));
}

fn is_false(element: &Element) -> bool {
    matches!(crate::chars::trim(&element.text()), "false" | "0")
}

/// Sorts children into the order of the sequence. What has no place there goes last.
fn reorder(
    parent: &mut Element,
    home: &str,
    particles: &[Particle],
    forgiven: &mut Vec<Diagnostic>,
) {
    let place = |node: &Node| match node {
        Node::Element(child) => particles
            .iter()
            .position(|particle| particle.term.admits(home, &child.namespace, &child.local))
            .unwrap_or(particles.len()),
        Node::Text(..) => particles.len(),
    };
    let mut last: Option<(usize, &Element)> = None;
    for node in &parent.children {
        let Node::Element(child) = node else {
            continue;
        };
        let at = place(node);
        match last {
            Some((before, other)) if at < before => {
                forgiven.push(child.position.diagnostic(
                    "wrong-order",
                    format!(
                        "element {} stands behind {} in {}, expected it before",
                        child.display(),
                        other.display(),
                        parent.display()
                    ),
                ));
            }
            _ => last = Some((at, child)),
        }
    }
    parent.children.sort_by_key(place);
}
