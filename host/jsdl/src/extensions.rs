//! What a document says in other namespaces than the one around it: each is either expected there
//! or named in a finding, so that nothing is passed over in silence.

use crate::document::Element;
use crate::namespace::{HPCP, JSDL, POSIX, SPMD, SWEEP, XBE, XML, XSDL, XSI};
use crate::read::Findings;

/// Namespace and local part.
pub(crate) type Name = (&'static str, &'static str);

/// Elements of one namespace that are understood inside an element of another, each at most once.
const EXPECTED: &[(Name, Name)] = &[
    ((JSDL, "Application"), (POSIX, "POSIXApplication")),
    ((JSDL, "Application"), (HPCP, "HPCProfileApplication")),
    ((JSDL, "Application"), (XBE, "XBEApplication")),
    ((JSDL, "Resources"), (XSDL, "InstanceDefinition")),
    ((JSDL, "Source"), (XSDL, "Hash")),
    ((JSDL, "Source"), (XSDL, "Compression")),
    ((JSDL, "Source"), (XSDL, "Mode")),
];

/// Checks an element and all that is understood inside it.
pub(crate) fn check(element: &Element, findings: &mut Findings) {
    for attribute in &element.attributes {
        if !attribute.namespace.is_empty() && ![XML, XSI].contains(&&*attribute.namespace) {
            findings.warning(
                attribute.position,
                "unsupported-attribute",
                format!(
                    "attribute {} of {} is not supported and ignored",
                    crate::namespace::display(&attribute.namespace, &attribute.local),
                    element.display()
                ),
            );
        }
    }
    let is_application = element.is(JSDL, "Application");
    let mut met: Vec<&Element> = Vec::new();
    for child in element.elements() {
        if child.namespace == element.namespace {
            check(child, findings);
            continue;
        }
        if !is_expected(element, child) {
            unsupported(element, child, findings);
            continue;
        }
        let clash = met
            .iter()
            .find(|other| is_application || other.is(&child.namespace, &child.local));
        if let Some(other) = clash {
            findings.error(
                child.position,
                "repeated-element",
                format!(
                    "element {} in {} beside {} of line {}, expected only one",
                    child.display(),
                    element.display(),
                    other.display(),
                    other.position.line
                ),
            );
        }
        met.push(child);
        check(child, findings);
    }
}

/// Whether `child` is understood inside `parent`, an element of another namespace.
pub(crate) fn is_expected(parent: &Element, child: &Element) -> bool {
    EXPECTED
        .iter()
        .any(|&((outer, outer_name), (inner, inner_name))| {
            parent.is(outer, outer_name) && child.is(inner, inner_name)
        })
}

/// What changes the meaning of the job is an error; what only adds to it is ignored with a warning.
fn unsupported(parent: &Element, child: &Element, findings: &mut Findings) {
    let name = child.display();
    if child.is(SPMD, "SPMDApplication") || parent.is(JSDL, "Application") {
        findings.error(
            child.position,
            "unsupported-application",
            format!(
                "application {name} is not supported, expected jsdl-posix:POSIXApplication, \
                 jsdl-hpcpa:HPCProfileApplication or xbe:XBEApplication"
            ),
        );
    } else if &*child.namespace == SWEEP {
        findings.error(
            child.position,
            "unsupported-sweep",
            if parent.is(JSDL, "JobDefinition") {
                format!("parameter sweeps ({name}) are not supported, expected one job a document")
            } else {
                format!(
                    "a parameter sweep ({name}) in {} is not supported, expected it in \
                     jsdl:JobDefinition",
                    parent.display()
                )
            },
        );
    } else {
        findings.warning(
            child.position,
            "unsupported-extension",
            format!(
                "element {name} in {} is not supported and ignored",
                parent.display()
            ),
        );
    }
}
