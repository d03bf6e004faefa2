//! Holds an element tree against a schema (XML Schema part 1).

use std::collections::HashSet;

use crate::chars::{split_qname, trim};
use crate::datatypes::Builtin;
use crate::diagnostic::{Diagnostic, Position, quoted};
use crate::document::{Attribute, Element, resolve};
use crate::limits::MAX_DIAGNOSTICS;
use crate::namespace;
use crate::schema::{self, ComplexType, Content, Facet, Particle, Schema, Simple, Term, Type};
use crate::tree::Tree;

/// All that is wrong with the tree, in document order, cut off at [`MAX_DIAGNOSTICS`].
pub(crate) fn validate(tree: &Tree, schema: &Schema) -> Vec<Diagnostic> {
    let root = &tree.root;
    let mut validator = Validator {
        schema,
        findings: Vec::new(),
        ids: tree.ids.clone(),
    };
    match schema::element(schema, &root.namespace, &root.local) {
        Some(decl) => validator.element(root, Some(decl.type_)),
        None => validator.report(
            root.position,
            "unknown-document",
            format!(
                "element {} is not known, expected jsdl:JobDefinition with \
                 xmlns:jsdl=\"{}\"",
                root.display(),
                namespace::JSDL
            ),
        ),
    }
    validator.findings
}

/// All that is wrong with a part of a tree whose elements `schema` declares, as [`validate`] does it.
pub(crate) fn validate_part(element: &Element, schema: &Schema) -> Vec<Diagnostic> {
    let mut validator = Validator {
        schema,
        findings: Vec::new(),
        ids: HashSet::new(),
    };
    validator.lax(element);
    validator.findings
}

struct Validator<'s> {
    schema: &'s Schema,
    findings: Vec<Diagnostic>,
    /// Identifiers seen, each allowed once.
    ids: HashSet<String>,
}

impl Validator<'_> {
    fn report(&mut self, position: Position, code: &'static str, message: String) {
        if self.findings.len() < MAX_DIAGNOSTICS {
            self.findings.push(position.diagnostic(code, message));
        }
    }

    /// Validates an element against its declared type, or laxly if there is no declaration.
    fn element(&mut self, element: &Element, declared: Option<Type>) {
        if declared.is_some()
            && let Some(nil) = element.qualified_attribute(namespace::XSI, "nil")
        {
            self.nil(element, nil);
        }
        let local = element
            .qualified_attribute(namespace::XSI, "type")
            .and_then(|attribute| self.local_type(element, attribute, declared));
        match local.or(declared).unwrap_or(Type::Any) {
            Type::Any => self.lax_children(element),
            Type::Builtin(builtin) => self.simple_element(element, Simple::Builtin(builtin)),
            Type::Simple(simple) => self.simple_element(element, Simple::Restricted(simple)),
            Type::Complex(complex) => self.complex_element(element, complex),
        }
    }

    /// No element of ours is nillable (3.3.4, clause 3.1): `xsi:nil` is an error whatever it says.
    fn nil(&mut self, element: &Element, nil: &Attribute) {
        let problem = if Builtin::Boolean.accepts(&nil.value, |_| false) {
            "is not allowed here"
        } else {
            "is neither true nor false"
        };
        self.report(
            nil.position,
            "invalid-attribute",
            format!("attribute xsi:nil of {} {problem}", element.display()),
        );
    }

    /// The type that `xsi:type` names (3.3.4, clause 4). White space around the name makes it an
    /// unknown one, as it does for libxml2.
    fn local_type(
        &mut self,
        element: &Element,
        attribute: &Attribute,
        declared: Option<Type>,
    ) -> Option<Type> {
        let found = split_qname(&attribute.value)
            .and_then(|(prefix, local)| {
                let namespace = resolve(element.scope.as_ref(), prefix.unwrap_or_default())?;
                Some((namespace, local))
            })
            .and_then(|(namespace, local)| schema::type_by_name(self.schema, &namespace, local));
        let problem = match (found, declared) {
            (None, _) => "is not known",
            (Some(own), Some(declared)) if !own.derives_from(declared) => {
                "does not fit the element's"
            }
            (Some(own), _) => return Some(own),
        };
        self.report(
            attribute.position,
            "invalid-type",
            format!(
                "type {} given by xsi:type of {} {problem}",
                quoted(&attribute.value),
                element.display()
            ),
        );
        None
    }

    /// Elements that no declaration covers are let through; what they hold is not.
    fn lax_children(&mut self, element: &Element) {
        for child in element.elements() {
            self.lax(child);
        }
    }

    fn lax(&mut self, element: &Element) {
        let decl = schema::element(self.schema, &element.namespace, &element.local);
        self.element(element, decl.map(|decl| decl.type_));
    }

    fn simple_element(&mut self, element: &Element, simple: Simple) {
        for attribute in &element.attributes {
            if !is_instance_attribute(attribute) {
                self.unexpected_attribute(element, attribute, &[]);
            }
        }
        self.text_content(element, simple);
    }

    fn text_content(&mut self, element: &Element, simple: Simple) {
        if let Some(child) = element.elements().next() {
            self.report(
                child.position,
                "unexpected-element",
                format!(
                    "element {} is not expected in {}, expected text only",
                    child.display(),
                    element.display()
                ),
            );
            return;
        }
        let text = element.text();
        if let Err(expected) = self.check(element, simple, &text, false) {
            self.report(
                element.position,
                "invalid-value",
                format!(
                    "{} is not a value of {}, expected {expected}",
                    quoted(trim(&text)),
                    element.display()
                ),
            );
        }
    }

    /// Checks a value; the error is what was expected.
    fn check(
        &mut self,
        element: &Element,
        simple: Simple,
        value: &str,
        is_attribute: bool,
    ) -> Result<(), String> {
        let builtin = match simple {
            Simple::Builtin(builtin) => builtin,
            Simple::Restricted(restricted) => restricted.base,
        };
        let is_prefix = |prefix: &str| resolve(element.scope.as_ref(), prefix).is_some();
        if !builtin.accepts(value, is_prefix) {
            return Err(builtin.expectation().to_owned());
        }
        if builtin == Builtin::Id && is_attribute && !self.ids.insert(trim(value).to_owned()) {
            return Err("a name that is given only once".to_owned());
        }
        let Simple::Restricted(restricted) = simple else {
            return Ok(());
        };
        match &restricted.facet {
            Facet::None => Ok(()),
            Facet::Enumeration(values) if values.contains(&value) => Ok(()),
            Facet::Enumeration(values) if values.contains(&trim(value)) => {
                Err(format!("'{}' without white space", trim(value)))
            }
            Facet::Enumeration(values) => Err(one_of(values)),
            Facet::Pattern(holds, _) if holds(value) => Ok(()),
            Facet::Pattern(_, expected) => Err((*expected).to_owned()),
        }
    }

    fn complex_element(&mut self, element: &Element, complex: &'static ComplexType) {
        self.attributes(element, complex);
        match complex.content {
            Content::Text(simple) => self.text_content(element, simple),
            Content::Empty => {
                if let Some(child) = element.elements().next() {
                    self.unexpected(child, element, &[]);
                } else if !element.children.is_empty() {
                    self.stray(element, "text", element.position);
                }
            }
            Content::Sequence(particles) => {
                if let Some((text, position)) = element.stray_text() {
                    self.stray(element, &format!("text {}", quoted(trim(text))), position);
                }
                self.sequence(element, complex.namespace, particles);
            }
        }
    }

    fn stray(&mut self, element: &Element, what: &str, position: Position) {
        self.report(
            position,
            "unexpected-text",
            format!("{what} is not expected in {}", element.display()),
        );
    }

    fn attributes(&mut self, element: &Element, complex: &'static ComplexType) {
        for attribute in &element.attributes {
            if is_instance_attribute(attribute) {
                continue;
            }
            let own = (!attribute.namespace.is_empty()).then_some(&*attribute.namespace);
            let decl = complex
                .attributes
                .iter()
                .find(|decl| own.is_none() && decl.name == attribute.local);
            match decl {
                Some(decl) => {
                    if let Err(expected) = self.check(element, decl.type_, &attribute.value, true) {
                        self.report(
                            attribute.position,
                            "invalid-attribute",
                            format!(
                                "{} is not a value of attribute {} of {}, expected {expected}",
                                quoted(&attribute.value),
                                attribute.local,
                                element.display()
                            ),
                        );
                    }
                }
                // Attributes of another namespace than the element's type, but not of none.
                None if complex.any_attribute
                    && own.is_some_and(|own| own != complex.namespace) => {}
                None => {
                    let names: Vec<&str> =
                        complex.attributes.iter().map(|decl| decl.name).collect();
                    self.unexpected_attribute(element, attribute, &names);
                }
            }
        }
        for decl in complex.attributes.iter().filter(|decl| decl.required) {
            if element.attribute(decl.name).is_none() {
                self.report(
                    element.position,
                    "missing-attribute",
                    format!(
                        "attribute {} of {} is missing",
                        decl.name,
                        element.display()
                    ),
                );
            }
        }
    }

    fn unexpected_attribute(&mut self, element: &Element, attribute: &Attribute, names: &[&str]) {
        let name = namespace::display(&attribute.namespace, &attribute.local);
        let expected = if names.is_empty() {
            String::new()
        } else {
            format!(", expected {}", one_of(names))
        };
        self.report(
            attribute.position,
            "unexpected-attribute",
            format!(
                "attribute {name} is not allowed in {}{expected}",
                element.display()
            ),
        );
    }

    fn sequence(&mut self, element: &Element, home: &str, particles: &'static [Particle]) {
        let mut at = Place::default();
        let mut in_order = true;
        for child in element.elements() {
            match at.step(home, particles, child) {
                Some(Term::Local(decl)) if in_order => self.element(child, Some(decl.type_)),
                Some(_) if in_order => self.lax(child),
                _ if in_order => {
                    in_order = false;
                    let expected = at.expected(home, particles);
                    self.unexpected(child, element, &expected);
                }
                // Behind the first misplaced child the order tells nothing more, but what the
                // children hold can still be checked.
                _ => self.out_of_order(child, particles),
            }
        }
        if in_order {
            let missing = at.missing(home, particles);
            if !missing.is_empty() {
                self.report(
                    element.position,
                    "missing-element",
                    format!(
                        "element {} is incomplete, expected {} in it",
                        element.display(),
                        one_of(&missing)
                    ),
                );
            }
        }
    }

    fn out_of_order(&mut self, child: &Element, particles: &'static [Particle]) {
        let local = particles.iter().find_map(|particle| match particle.term {
            Term::Local(decl) if decl.name == child.local => Some(decl.type_),
            _ => None,
        });
        match local {
            Some(type_) => self.element(child, Some(type_)),
            None => self.lax(child),
        }
    }

    fn unexpected(&mut self, child: &Element, parent: &Element, expected: &[String]) {
        let expected = if expected.is_empty() {
            "no more elements".to_owned()
        } else {
            one_of(expected)
        };
        self.report(
            child.position,
            "unexpected-element",
            format!(
                "element {} is not expected here in {}, expected {expected}",
                child.display(),
                parent.display()
            ),
        );
    }
}

/// A place in a sequence: the particle reached, and whether it was met there.
#[derive(Default)]
struct Place {
    index: usize,
    met: bool,
}

impl Place {
    /// Moves over the child; nothing, and no move, if it may not stand here.
    ///
    /// libxml2 lets a repeated optional element and the repeated wildcard right behind it mix in
    /// any order, and so does this.
    fn step(&mut self, home: &str, particles: &[Particle], child: &Element) -> Option<Term> {
        let mixes = match particles.get(..=self.index).unwrap_or_default() {
            [.., before, here] => {
                matches!(here.term, Term::Other) && before.repeated && !before.required
            }
            _ => false,
        };
        let first = self.index - usize::from(mixes);
        for (index, particle) in particles.iter().enumerate().skip(first) {
            let met = index == self.index && self.met;
            let has_room = particle.repeated || !met;
            if has_room && particle.term.admits(home, &child.namespace, &child.local) {
                *self = Place { index, met: true };
                return Some(particle.term);
            }
            if particle.required && !met {
                return None;
            }
        }
        None
    }

    /// What may come next.
    fn expected(&self, home: &str, particles: &[Particle]) -> Vec<String> {
        let mut expected = Vec::new();
        for (index, particle) in particles.iter().enumerate().skip(self.index) {
            let met = index == self.index && self.met;
            if particle.repeated || !met {
                expected.push(particle.term.display(home));
            }
            if particle.required && !met {
                break;
            }
        }
        expected
    }

    /// What must still come.
    fn missing(&self, home: &str, particles: &[Particle]) -> Vec<String> {
        particles
            .iter()
            .enumerate()
            .skip(self.index)
            .filter(|(index, particle)| particle.required && !(*index == self.index && self.met))
            .map(|(_, particle)| particle.term.display(home))
            .collect()
    }
}

/// The attributes that tell a validator something and are allowed everywhere (2.6).
fn is_instance_attribute(attribute: &Attribute) -> bool {
    &*attribute.namespace == namespace::XSI
        && matches!(
            attribute.local.as_str(),
            "type" | "nil" | "schemaLocation" | "noNamespaceSchemaLocation"
        )
}

/// `a`, `a or b`, `a, b or c`; long lists are cut.
fn one_of<S: AsRef<str>>(names: &[S]) -> String {
    const MOST: usize = 6;
    let names: Vec<&str> = names.iter().map(AsRef::as_ref).collect();
    match names.as_slice() {
        [] => String::new(),
        [name] => (*name).to_owned(),
        many if many.len() > MOST => format!("{} or another", many[..MOST].join(", ")),
        [first @ .., last] => format!("{} or {last}", first.join(", ")),
    }
}
