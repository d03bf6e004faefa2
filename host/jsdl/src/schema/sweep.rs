//! Parameter sweep: GFD.149.
//!
//! What the standard leaves open to substitution, parameters and functions, is any element here; the
//! reader names those it does not know.

use super::{
    ComplexType, Content, ElementDecl, Module, Particle, Simple, Term, Type, any_number,
    at_least_one, attribute, complex, one, plain,
};
use crate::datatypes::Builtin;
use crate::namespace;

pub(crate) static MODULE: Module = Module {
    namespace: namespace::SWEEP,
    elements: ELEMENTS,
    types: &[],
};

pub(crate) static FUNCTIONS: Module = Module {
    namespace: namespace::SWEEP_FUNCTIONS,
    elements: FUNCTION_ELEMENTS,
    types: &[],
};

static SWEEP: ComplexType = ComplexType {
    namespace: namespace::SWEEP,
    name: "Sweep_Type",
    content: Content::Sequence(&[any_number("Assignment"), any_number("Sweep")]),
    attributes: &[],
    any_attribute: true,
};

static ASSIGNMENT: ComplexType = ComplexType {
    namespace: namespace::SWEEP,
    name: "Assignment_Type",
    content: Content::Sequence(&[
        Particle {
            term: Term::Choice(&["DocumentNode", "FileSweep"]),
            required: true,
            repeated: true,
        },
        Particle {
            term: Term::Other,
            required: true,
            repeated: false,
        },
    ]),
    attributes: &[],
    any_attribute: true,
};

static DOCUMENT_NODE: ComplexType = ComplexType {
    namespace: namespace::SWEEP,
    name: "DocumentNode_Type",
    content: Content::Sequence(&[any_number("NamespaceBinding"), one("Match")]),
    attributes: &[],
    any_attribute: true,
};

static NAMESPACE_BINDING: ComplexType = ComplexType {
    namespace: namespace::SWEEP,
    name: "NamespaceBinding_Type",
    content: Content::Sequence(&[]),
    attributes: &[
        attribute("ns", Builtin::AnyUri, true),
        attribute("prefix", Builtin::NcName, true),
    ],
    any_attribute: true,
};

const ELEMENTS: &[ElementDecl] = &[
    complex("Sweep", &SWEEP),
    complex("Assignment", &ASSIGNMENT),
    complex("DocumentNode", &DOCUMENT_NODE),
    complex("NamespaceBinding", &NAMESPACE_BINDING),
    plain("Match", Builtin::String),
    ElementDecl {
        name: "FileSweep",
        type_: Type::Any,
    },
];

static VALUES: ComplexType = ComplexType {
    namespace: namespace::SWEEP_FUNCTIONS,
    name: "Values_Type",
    content: Content::Sequence(&[at_least_one("Value")]),
    attributes: &[],
    any_attribute: true,
};

static LOOP_INTEGER: ComplexType = ComplexType {
    namespace: namespace::SWEEP_FUNCTIONS,
    name: "LoopInteger_Type",
    content: Content::Sequence(&[any_number("Exception")]),
    attributes: &[
        attribute("start", Builtin::Integer, true),
        attribute("end", Builtin::Integer, true),
        attribute("step", Builtin::Integer, false),
    ],
    any_attribute: true,
};

static LOOP_DOUBLE: ComplexType = ComplexType {
    namespace: namespace::SWEEP_FUNCTIONS,
    name: "LoopDouble_Type",
    content: Content::Sequence(&[any_number("Exception")]),
    attributes: &[
        attribute("start", Builtin::Double, true),
        attribute("end", Builtin::Double, true),
        attribute("step", Builtin::Double, true),
    ],
    any_attribute: true,
};

/// Programs write its number as an attribute or as text.
static EXCEPTION: ComplexType = ComplexType {
    namespace: namespace::SWEEP_FUNCTIONS,
    name: "Exception_Type",
    content: Content::Text(Simple::Builtin(Builtin::String)),
    attributes: &[attribute("value", Builtin::Double, false)],
    any_attribute: true,
};

const FUNCTION_ELEMENTS: &[ElementDecl] = &[
    complex("Values", &VALUES),
    // Of any type: programs say `xsi:type` of each value.
    ElementDecl {
        name: "Value",
        type_: Type::Any,
    },
    complex("LoopInteger", &LOOP_INTEGER),
    complex("LoopDouble", &LOOP_DOUBLE),
    complex("Exception", &EXCEPTION),
];
