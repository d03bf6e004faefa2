//! Content models as data. One module of tables for each namespace; `validate` reads them.

pub(crate) mod hpcp;
pub(crate) mod jsdl;
pub(crate) mod posix;
pub(crate) mod sweep;
pub(crate) mod xsdl;

use crate::datatypes::Builtin;
use crate::namespace;

/// The declarations of one namespace.
pub(crate) struct Module {
    pub namespace: &'static str,
    /// Global elements.
    pub elements: &'static [ElementDecl],
    /// Named types, for `xsi:type`.
    pub types: &'static [Type],
}

/// The declarations a document is held against. Elements of other namespaces are let through where
/// a wildcard allows them.
pub(crate) type Schema = [&'static Module];

/// JSDL and its POSIX application: what makes a document a valid one.
pub(crate) const STANDARD: &Schema = &[&jsdl::MODULE, &posix::MODULE];
/// All that this crate understands.
pub(crate) const UNDERSTOOD: &Schema = &[
    &jsdl::MODULE,
    &posix::MODULE,
    &hpcp::MODULE,
    &xsdl::MODULE,
    &xsdl::XBE_MODULE,
];

/// What is inside a parameter sweep. A job's document has none of it.
pub(crate) const SWEPT: &Schema = &[&sweep::MODULE, &sweep::FUNCTIONS];

/// An element and its type.
pub(crate) struct ElementDecl {
    pub name: &'static str,
    pub type_: Type,
}

/// A type definition.
#[derive(Clone, Copy)]
pub(crate) enum Type {
    /// The type of elements that no declaration covers: anything goes, but declared elements
    /// inside are held to their declarations.
    Any,
    Simple(&'static SimpleType),
    Complex(&'static ComplexType),
    Builtin(Builtin),
}

/// A named restriction of a built-in type.
pub(crate) struct SimpleType {
    pub name: &'static str,
    pub base: Builtin,
    pub facet: Facet,
}

/// How a simple type restricts its base.
pub(crate) enum Facet {
    /// Not at all: a new name only.
    None,
    Enumeration(&'static [&'static str]),
    /// A condition on the value as it stands, and what it expects.
    Pattern(fn(&str) -> bool, &'static str),
}

/// A type with attributes, children or both.
pub(crate) struct ComplexType {
    pub namespace: &'static str,
    pub name: &'static str,
    pub content: Content,
    pub attributes: &'static [AttributeDecl],
    /// Whether attributes of other namespaces are allowed.
    pub any_attribute: bool,
}

/// What a complex type has between its tags.
pub(crate) enum Content {
    Empty,
    Text(Simple),
    /// Elements, in this order.
    Sequence(&'static [Particle]),
}

/// A simple type, built in or restricted.
#[derive(Clone, Copy)]
pub(crate) enum Simple {
    Builtin(Builtin),
    Restricted(&'static SimpleType),
}

/// An attribute without namespace.
pub(crate) struct AttributeDecl {
    pub name: &'static str,
    pub type_: Simple,
    pub required: bool,
}

/// One place in a sequence.
pub(crate) struct Particle {
    pub term: Term,
    pub required: bool,
    pub repeated: bool,
}

/// What may stand in a place of a sequence.
#[derive(Clone, Copy)]
pub(crate) enum Term {
    /// A global element of the same namespace.
    Global(&'static str),
    /// An element declared on the spot, of the same namespace.
    Local(&'static ElementDecl),
    /// One of these global elements of the same namespace.
    Choice(&'static [&'static str]),
    /// Any element of another namespace, but not of none.
    Other,
}

/// Exactly one.
pub(crate) const fn one(name: &'static str) -> Particle {
    Particle {
        term: Term::Global(name),
        required: true,
        repeated: false,
    }
}

/// One or none.
pub(crate) const fn optional(name: &'static str) -> Particle {
    Particle {
        term: Term::Global(name),
        required: false,
        repeated: false,
    }
}

/// Any number.
pub(crate) const fn any_number(name: &'static str) -> Particle {
    Particle {
        term: Term::Global(name),
        required: false,
        repeated: true,
    }
}

/// One or more.
pub(crate) const fn at_least_one(name: &'static str) -> Particle {
    Particle {
        term: Term::Global(name),
        required: true,
        repeated: true,
    }
}

/// Any number of elements of other namespaces.
pub(crate) const OTHERS: Particle = Particle {
    term: Term::Other,
    required: false,
    repeated: true,
};

/// A global element of a simple built-in type.
pub(crate) const fn plain(name: &'static str, builtin: Builtin) -> ElementDecl {
    ElementDecl {
        name,
        type_: Type::Builtin(builtin),
    }
}

/// A global element of a restricted simple type.
pub(crate) const fn simple(name: &'static str, type_: &'static SimpleType) -> ElementDecl {
    ElementDecl {
        name,
        type_: Type::Simple(type_),
    }
}

/// A global element of a complex type.
pub(crate) const fn complex(name: &'static str, type_: &'static ComplexType) -> ElementDecl {
    ElementDecl {
        name,
        type_: Type::Complex(type_),
    }
}

/// An attribute of a built-in type.
pub(crate) const fn attribute(name: &'static str, type_: Builtin, required: bool) -> AttributeDecl {
    AttributeDecl {
        name,
        type_: Simple::Builtin(type_),
        required,
    }
}

fn module(schema: &Schema, namespace: &str) -> Option<&'static Module> {
    schema
        .iter()
        .copied()
        .find(|module| module.namespace == namespace)
}

/// The declaration of a global element.
pub(crate) fn element(
    schema: &Schema,
    namespace: &str,
    local: &str,
) -> Option<&'static ElementDecl> {
    module(schema, namespace)?
        .elements
        .iter()
        .find(|decl| decl.name == local)
}

/// A type by its qualified name.
pub(crate) fn type_by_name(schema: &Schema, namespace: &str, local: &str) -> Option<Type> {
    if namespace == namespace::XSD {
        return match local {
            "anyType" => Some(Type::Any),
            _ => Builtin::by_name(local).map(Type::Builtin),
        };
    }
    module(schema, namespace)?
        .types
        .iter()
        .copied()
        .find(|type_| type_.name() == Some(local))
}

impl Term {
    /// Whether the element may stand in this place of a sequence of a type of the namespace `home`.
    pub(crate) fn admits(self, home: &str, namespace: &str, local: &str) -> bool {
        let own = namespace == home;
        match self {
            Term::Global(name) => own && name == local,
            Term::Local(decl) => own && decl.name == local,
            Term::Choice(names) => own && names.contains(&local),
            Term::Other => !own && !namespace.is_empty(),
        }
    }

    /// For messages.
    pub(crate) fn display(self, home: &str) -> String {
        let name = |local: &str| namespace::display(home, local);
        match self {
            Term::Global(local) => name(local),
            Term::Local(decl) => name(decl.name),
            Term::Choice(names) => names
                .iter()
                .map(|local| name(local))
                .collect::<Vec<_>>()
                .join(" or "),
            Term::Other => "an element of another namespace".to_owned(),
        }
    }
}

impl Type {
    fn name(self) -> Option<&'static str> {
        match self {
            Type::Simple(simple) => Some(simple.name),
            Type::Complex(complex) => Some(complex.name),
            Type::Any | Type::Builtin(_) => None,
        }
    }

    /// Whether this type is `ancestor` or derived from it (XML Schema part 1, 3.4.6 and 3.14.6).
    pub(crate) fn derives_from(self, ancestor: Type) -> bool {
        let builtin_base = match self {
            Type::Any => None,
            Type::Builtin(builtin) => Some(builtin),
            Type::Simple(simple) => Some(simple.base),
            Type::Complex(complex) => match &complex.content {
                Content::Text(Simple::Builtin(builtin)) => Some(*builtin),
                Content::Text(Simple::Restricted(simple)) => Some(simple.base),
                Content::Empty | Content::Sequence(_) => None,
            },
        };
        match ancestor {
            Type::Any => true,
            Type::Builtin(ancestor) => builtin_base.is_some_and(|base| base.derives_from(ancestor)),
            Type::Simple(ancestor) => {
                matches!(self, Type::Simple(own) if std::ptr::eq(own, ancestor))
            }
            Type::Complex(ancestor) => {
                matches!(self, Type::Complex(own) if std::ptr::eq(own, ancestor))
            }
        }
    }
}
