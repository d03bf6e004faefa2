//! From an element tree back to a document that is read as the same tree.

use std::rc::Rc;

use crate::document::{Element, Node, Scope, resolve};
use crate::namespace::PREFIXES;
use crate::write::escape;

/// The document of a tree. Comments and processing instructions are not in the tree, and lost.
pub(crate) fn document(root: &Element) -> String {
    let mut text = "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n".to_owned();
    element(&mut text, root, None);
    text.push('\n');
    text
}

fn element(text: &mut String, element: &Element, around: Option<&Rc<Scope>>) {
    let scope = element.scope.as_ref();
    let mut declared = declarations(scope, around);
    let name = name(
        scope,
        &mut declared,
        (&element.namespace, &element.prefix, &element.local),
        true,
    );
    let attributes: Vec<(String, &str)> = element
        .attributes
        .iter()
        .map(|attribute| {
            let parts = (&attribute.namespace, &attribute.prefix, &*attribute.local);
            let name = self::name(scope, &mut declared, parts, false);
            (name, attribute.value.as_str())
        })
        .collect();
    text.push('<');
    text.push_str(&name);
    for (prefix, uri) in &declared {
        text.push_str(if prefix.is_empty() {
            " xmlns"
        } else {
            " xmlns:"
        });
        text.push_str(prefix);
        quoted(text, uri);
    }
    for (name, value) in attributes {
        text.push(' ');
        text.push_str(&name);
        quoted(text, value);
    }
    if element.children.is_empty() {
        text.push_str("/>");
        return;
    }
    text.push('>');
    for child in &element.children {
        match child {
            Node::Element(child) => self::element(text, child, scope),
            Node::Text(content, _) => escape(text, content, false),
        }
    }
    text.push_str("</");
    text.push_str(&name);
    text.push('>');
}

fn quoted(text: &mut String, value: &str) {
    text.push_str("=\"");
    escape(text, value, true);
    text.push('"');
}

/// The namespaces that an element must declare, by prefix.
fn declarations(scope: Option<&Rc<Scope>>, around: Option<&Rc<Scope>>) -> Vec<(String, Rc<str>)> {
    let is_same = |a: Option<&Rc<Scope>>, b: Option<&Rc<Scope>>| match (a, b) {
        (Some(a), Some(b)) => Rc::ptr_eq(a, b),
        (None, None) => true,
        _ => false,
    };
    let mut declared: Vec<(String, Rc<str>)> = Vec::new();
    let mut at = scope;
    // Where a lenient reading put the element into another one, none of the scopes is that around it,
    // and all declarations are repeated.
    while let Some(scope) = at
        && !is_same(at, around)
    {
        for binding in &scope.bindings {
            if !declared.iter().any(|(prefix, _)| *prefix == binding.0) {
                declared.push(binding.clone());
            }
        }
        at = scope.outer.as_ref();
    }
    let default = |scope| resolve(scope, "").is_some_and(|uri| !uri.is_empty());
    if !is_same(at, around) && default(around) && !default(scope) {
        declared.retain(|(prefix, _)| !prefix.is_empty());
        declared.push((String::new(), Rc::from("")));
    }
    declared
}

/// The qualified name of an element or attribute. What a lenient reading let pass without a
/// declaration gets one.
fn name(
    scope: Option<&Rc<Scope>>,
    declared: &mut Vec<(String, Rc<str>)>,
    (namespace, prefix, local): (&Rc<str>, &Rc<str>, &str),
    is_element: bool,
) -> String {
    if namespace.is_empty() && !is_element {
        return local.to_owned();
    }
    let bound = |declared: &[(String, Rc<str>)], prefix: &str| {
        let own = declared.iter().find(|(own, _)| own == prefix);
        own.map(|(_, uri)| uri.clone())
            .or_else(|| resolve(scope, prefix))
    };
    let qualified = |prefix: &str| match prefix {
        "" => local.to_owned(),
        prefix => format!("{prefix}:{local}"),
    };
    let fits = |declared: &[(String, Rc<str>)], prefix: &str| {
        (is_element || !prefix.is_empty())
            && bound(declared, prefix).is_some_and(|uri| *uri == **namespace)
    };
    if fits(declared, prefix) {
        return qualified(prefix);
    }
    let customary = PREFIXES
        .iter()
        .find(|(_, uri)| *uri == &**namespace)
        .map(|(prefix, _)| (*prefix).to_owned());
    let mut candidates = customary
        .into_iter()
        .chain((0..).map(|number| format!("ns{number}")));
    let free = candidates
        .find(|candidate| fits(declared, candidate) || bound(declared, candidate).is_none());
    let prefix = free.unwrap_or_default();
    if !fits(declared, &prefix) {
        declared.push((prefix.clone(), namespace.clone()));
    }
    qualified(&prefix)
}
