//! XSDL, the description of the instance a job runs in, and XBE, XenBEE's own applications.
//!
//! Hashes and compressions are those of XSDL and, added here, BLAKE3, xz and zstd.

use super::{
    AttributeDecl, ComplexType, Content, ElementDecl, Facet, Module, OTHERS, Particle, Simple,
    SimpleType, Term, any_number, at_least_one, attribute, complex, one, optional, plain, simple,
};
use crate::datatypes::Builtin;
use crate::namespace;

pub(crate) static MODULE: Module = Module {
    namespace: namespace::XSDL,
    elements: ELEMENTS,
    types: &[],
};

pub(crate) static XBE_MODULE: Module = Module {
    namespace: namespace::XBE,
    elements: &[
        complex("XBEApplication", &XBE_APPLICATION),
        complex("ContinuousTask", &CONTINUOUS_TASK),
    ],
    types: &[],
};

const fn sequence(
    name: &'static str,
    particles: &'static [Particle],
    attributes: &'static [AttributeDecl],
    any_attribute: bool,
) -> ComplexType {
    ComplexType {
        namespace: namespace::XSDL,
        name,
        content: Content::Sequence(particles),
        attributes,
        any_attribute,
    }
}

const fn enumerated(
    name: &'static str,
    type_: &'static SimpleType,
    required: bool,
) -> AttributeDecl {
    AttributeDecl {
        name,
        type_: Simple::Restricted(type_),
        required,
    }
}

const fn enumeration(name: &'static str, values: &'static [&'static str]) -> SimpleType {
    SimpleType {
        name,
        base: Builtin::String,
        facet: Facet::Enumeration(values),
    }
}

static HASH_ALGORITHM: SimpleType = enumeration(
    "HashAlgorithmEnumeration",
    &[
        "md5", "sha1", "sha224", "sha256", "sha384", "sha512", "blake3",
    ],
);

static COMPRESSION_ALGORITHM: SimpleType = enumeration(
    "CompressionTypeEnumeration",
    &["bzip2", "gzip", "xz", "zstd", "tbz", "tgz", "txz", "tzst"],
);

static SCRIPT_TARGET: SimpleType = enumeration(
    "ScriptTargetEnumeration",
    &["pre-setup", "setup", "cleanup", "post-cleanup"],
);

static FILE_SYSTEM_KIND: SimpleType =
    enumeration("FileSystemTypeEnumeration", &["ext2", "ext3", "ext4"]);

static MODE: SimpleType = SimpleType {
    name: "Mode_Type",
    base: Builtin::NormalizedString,
    facet: Facet::Pattern(
        |value| {
            let value = crate::chars::trim(value);
            value.len() == 4 && value.bytes().all(|c| matches!(c, b'0'..=b'7'))
        },
        "four octal digits",
    ),
};

static HASH: ComplexType = ComplexType {
    namespace: namespace::XSDL,
    name: "Hash_Type",
    content: Content::Text(Simple::Builtin(Builtin::HexBinary)),
    attributes: &[enumerated("algorithm", &HASH_ALGORITHM, true)],
    any_attribute: true,
};

static COMPRESSION: ComplexType = ComplexType {
    namespace: namespace::XSDL,
    name: "Compression_Type",
    content: Content::Empty,
    attributes: &[enumerated("algorithm", &COMPRESSION_ALGORITHM, true)],
    any_attribute: false,
};

static ARGUMENT: ComplexType = ComplexType {
    namespace: namespace::XSDL,
    name: "Argument_Type",
    content: Content::Text(Simple::Builtin(Builtin::NormalizedString)),
    attributes: &[attribute("name", Builtin::NcName, false)],
    any_attribute: true,
};

static LOCATION: ComplexType = sequence(
    "Location_Type",
    &[
        optional("URI"),
        optional("Mode"),
        optional("Hash"),
        optional("Compression"),
        OTHERS,
    ],
    &[],
    true,
);

static INSTANCE_DEFINITION: ComplexType = sequence(
    "InstanceDefinition_Type",
    &[one("InstanceDescription"), OTHERS],
    &[],
    false,
);

static INSTANCE_DESCRIPTION: ComplexType = sequence(
    "InstanceDescription_Type",
    &[
        Particle {
            term: Term::Choice(&["Package", "Instance"]),
            required: true,
            repeated: false,
        },
        optional("Control"),
    ],
    &[],
    false,
);

static PACKAGE: ComplexType = sequence("Package_Type", &[one("Location"), OTHERS], &[], true);

static INSTANCE: ComplexType = sequence(
    "Instance_Type",
    &[
        optional("Description"),
        one("Kernel"),
        optional("Initrd"),
        one("Image"),
        OTHERS,
    ],
    &[],
    false,
);

static KERNEL: ComplexType = sequence(
    "Kernel_Type",
    &[one("Location"), any_number("Argument"), OTHERS],
    &[],
    false,
);

static INITRD: ComplexType = sequence("Initrd_Type", &[one("Location"), OTHERS], &[], false);

static IMAGE: ComplexType = sequence(
    "Image_Type",
    &[one("Location"), OTHERS],
    &[enumerated("fs-type", &FILE_SYSTEM_KIND, false)],
    false,
);

static SCRIPT: ComplexType = sequence(
    "Script_Type",
    &[one("Location"), OTHERS],
    &[enumerated("target", &SCRIPT_TARGET, true)],
    false,
);

static CONTROL: ComplexType = sequence(
    "Control_Type",
    &[at_least_one("Script"), OTHERS],
    &[],
    false,
);

static XBE_APPLICATION: ComplexType = ComplexType {
    namespace: namespace::XBE,
    name: "XBEApplication_Type",
    content: Content::Sequence(&[one("ContinuousTask")]),
    attributes: &[],
    any_attribute: true,
};

static CONTINUOUS_TASK: ComplexType = ComplexType {
    namespace: namespace::XBE,
    name: "ContinuousTask_Type",
    content: Content::Sequence(&[]),
    attributes: &[],
    any_attribute: true,
};

const ELEMENTS: &[ElementDecl] = &[
    complex("InstanceDefinition", &INSTANCE_DEFINITION),
    complex("InstanceDescription", &INSTANCE_DESCRIPTION),
    plain("Description", Builtin::String),
    complex("Hash", &HASH),
    complex("Compression", &COMPRESSION),
    complex("Location", &LOCATION),
    complex("Package", &PACKAGE),
    complex("Argument", &ARGUMENT),
    complex("Kernel", &KERNEL),
    complex("Initrd", &INITRD),
    complex("Image", &IMAGE),
    complex("Script", &SCRIPT),
    complex("Control", &CONTROL),
    complex("Instance", &INSTANCE),
    plain("URI", Builtin::AnyUri),
    simple("Mode", &MODE),
];
