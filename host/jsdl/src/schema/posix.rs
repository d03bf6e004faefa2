//! JSDL-POSIX: GFD.56, section 8 and appendix 2.

use super::{
    AttributeDecl, ComplexType, Content, ElementDecl, Module, Simple, Type, any_number, attribute,
    complex, optional,
};
use crate::datatypes::Builtin;
use crate::namespace;

pub(crate) static MODULE: Module = Module {
    namespace: namespace::POSIX,
    elements: ELEMENTS,
    types: TYPES,
};

const fn text(
    name: &'static str,
    base: Builtin,
    attributes: &'static [AttributeDecl],
) -> ComplexType {
    ComplexType {
        namespace: namespace::POSIX,
        name,
        content: Content::Text(Simple::Builtin(base)),
        attributes,
        any_attribute: true,
    }
}

const FILESYSTEM_NAME: AttributeDecl = attribute("filesystemName", Builtin::NcName, false);

static ENVIRONMENT: ComplexType = text(
    "Environment_Type",
    Builtin::String,
    &[attribute("name", Builtin::NcName, true), FILESYSTEM_NAME],
);
static ARGUMENT: ComplexType = text(
    "Argument_Type",
    Builtin::NormalizedString,
    &[FILESYSTEM_NAME],
);
static FILE_NAME: ComplexType = text("FileName_Type", Builtin::String, &[FILESYSTEM_NAME]);
static DIRECTORY_NAME: ComplexType =
    text("DirectoryName_Type", Builtin::String, &[FILESYSTEM_NAME]);
static LIMITS: ComplexType = text("Limits_Type", Builtin::NonNegativeInteger, &[]);
static USER_NAME: ComplexType = text("UserName_Type", Builtin::String, &[]);
static GROUP_NAME: ComplexType = text("GroupName_Type", Builtin::String, &[]);

static POSIX_APPLICATION: ComplexType = ComplexType {
    namespace: namespace::POSIX,
    name: "POSIXApplication_Type",
    content: Content::Sequence(&[
        optional("Executable"),
        any_number("Argument"),
        optional("Input"),
        optional("Output"),
        optional("Error"),
        optional("WorkingDirectory"),
        any_number("Environment"),
        optional("WallTimeLimit"),
        optional("FileSizeLimit"),
        optional("CoreDumpLimit"),
        optional("DataSegmentLimit"),
        optional("LockedMemoryLimit"),
        optional("MemoryLimit"),
        optional("OpenDescriptorsLimit"),
        optional("PipeSizeLimit"),
        optional("StackSizeLimit"),
        optional("CPUTimeLimit"),
        optional("ProcessCountLimit"),
        optional("VirtualMemoryLimit"),
        optional("ThreadCountLimit"),
        optional("UserName"),
        optional("GroupName"),
    ]),
    attributes: &[attribute("name", Builtin::NcName, false)],
    any_attribute: true,
};

const ELEMENTS: &[ElementDecl] = &[
    complex("POSIXApplication", &POSIX_APPLICATION),
    complex("Executable", &FILE_NAME),
    complex("Argument", &ARGUMENT),
    complex("Input", &FILE_NAME),
    complex("Output", &FILE_NAME),
    complex("Error", &FILE_NAME),
    complex("WorkingDirectory", &DIRECTORY_NAME),
    complex("Environment", &ENVIRONMENT),
    complex("WallTimeLimit", &LIMITS),
    complex("FileSizeLimit", &LIMITS),
    complex("CoreDumpLimit", &LIMITS),
    complex("DataSegmentLimit", &LIMITS),
    complex("LockedMemoryLimit", &LIMITS),
    complex("MemoryLimit", &LIMITS),
    complex("OpenDescriptorsLimit", &LIMITS),
    complex("PipeSizeLimit", &LIMITS),
    complex("StackSizeLimit", &LIMITS),
    complex("CPUTimeLimit", &LIMITS),
    complex("ProcessCountLimit", &LIMITS),
    complex("VirtualMemoryLimit", &LIMITS),
    complex("ThreadCountLimit", &LIMITS),
    complex("UserName", &USER_NAME),
    complex("GroupName", &GROUP_NAME),
];

const TYPES: &[Type] = &[
    Type::Complex(&ENVIRONMENT),
    Type::Complex(&ARGUMENT),
    Type::Complex(&FILE_NAME),
    Type::Complex(&DIRECTORY_NAME),
    Type::Complex(&LIMITS),
    Type::Complex(&USER_NAME),
    Type::Complex(&GROUP_NAME),
    Type::Complex(&POSIX_APPLICATION),
];
