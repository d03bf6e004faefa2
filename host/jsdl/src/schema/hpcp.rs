//! HPC Profile Application: GFD.111.

use super::{
    AttributeDecl, ComplexType, Content, ElementDecl, Module, Simple, any_number, attribute,
    complex, one, optional,
};
use crate::datatypes::Builtin;
use crate::namespace;

pub(crate) static MODULE: Module = Module {
    namespace: namespace::HPCP,
    elements: ELEMENTS,
    types: &[],
};

const fn text(name: &'static str, attributes: &'static [AttributeDecl]) -> ComplexType {
    ComplexType {
        namespace: namespace::HPCP,
        name,
        content: Content::Text(Simple::Builtin(Builtin::String)),
        attributes,
        any_attribute: true,
    }
}

static STRING: ComplexType = text("FileName_Type", &[]);
static ENVIRONMENT: ComplexType = text(
    "Environment_Type",
    &[attribute("name", Builtin::NcName, true)],
);

static HPC_PROFILE_APPLICATION: ComplexType = ComplexType {
    namespace: namespace::HPCP,
    name: "HPCProfileApplication_Type",
    content: Content::Sequence(&[
        one("Executable"),
        any_number("Argument"),
        optional("Input"),
        optional("Output"),
        optional("Error"),
        optional("WorkingDirectory"),
        any_number("Environment"),
        optional("UserName"),
    ]),
    attributes: &[attribute("name", Builtin::NcName, false)],
    any_attribute: true,
};

const ELEMENTS: &[ElementDecl] = &[
    complex("HPCProfileApplication", &HPC_PROFILE_APPLICATION),
    complex("Executable", &STRING),
    complex("Argument", &STRING),
    complex("Input", &STRING),
    complex("Output", &STRING),
    complex("Error", &STRING),
    complex("WorkingDirectory", &STRING),
    complex("Environment", &ENVIRONMENT),
    complex("UserName", &STRING),
];
