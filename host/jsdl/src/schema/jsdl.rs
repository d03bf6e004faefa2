//! JSDL 1.0: GFD.56, section 6 and appendix 1.

use super::{
    AttributeDecl, ComplexType, Content, ElementDecl, Facet, Module, OTHERS, Particle, Simple,
    SimpleType, Term, Type, any_number, at_least_one, attribute, complex, one, optional, plain,
    simple,
};
use crate::datatypes::Builtin;
use crate::namespace;

pub(crate) static MODULE: Module = Module {
    namespace: namespace::JSDL,
    elements: ELEMENTS,
    types: TYPES,
};

/// A type that only has elements, and attributes of other namespaces.
const fn elements(name: &'static str, sequence: &'static [Particle]) -> ComplexType {
    with_attributes(name, sequence, &[])
}

const fn with_attributes(
    name: &'static str,
    sequence: &'static [Particle],
    attributes: &'static [AttributeDecl],
) -> ComplexType {
    ComplexType {
        namespace: namespace::JSDL,
        name,
        content: Content::Sequence(sequence),
        attributes,
        any_attribute: true,
    }
}

const fn double(name: &'static str, attributes: &'static [AttributeDecl]) -> ComplexType {
    ComplexType {
        namespace: namespace::JSDL,
        name,
        content: Content::Text(Simple::Builtin(Builtin::Double)),
        attributes,
        any_attribute: true,
    }
}

const fn enumeration(name: &'static str, values: &'static [&'static str]) -> SimpleType {
    SimpleType {
        name,
        base: Builtin::String,
        facet: Facet::Enumeration(values),
    }
}

static PROCESSOR_ARCHITECTURE: SimpleType = enumeration(
    "ProcessorArchitectureEnumeration",
    &[
        "sparc", "powerpc", "x86", "x86_32", "x86_64", "parisc", "mips", "ia64", "arm", "other",
    ],
);

static OPERATING_SYSTEM: SimpleType = enumeration(
    "OperatingSystemTypeEnumeration",
    &[
        "Unknown",
        "MACOS",
        "ATTUNIX",
        "DGUX",
        "DECNT",
        "Tru64_UNIX",
        "OpenVMS",
        "HPUX",
        "AIX",
        "MVS",
        "OS400",
        "OS_2",
        "JavaVM",
        "MSDOS",
        "WIN3x",
        "WIN95",
        "WIN98",
        "WINNT",
        "WINCE",
        "NCR3000",
        "NetWare",
        "OSF",
        "DC_OS",
        "Reliant_UNIX",
        "SCO_UnixWare",
        "SCO_OpenServer",
        "Sequent",
        "IRIX",
        "Solaris",
        "SunOS",
        "U6000",
        "ASERIES",
        "TandemNSK",
        "TandemNT",
        "BS2000",
        "LINUX",
        "Lynx",
        "XENIX",
        "VM",
        "Interactive_UNIX",
        "BSDUNIX",
        "FreeBSD",
        "NetBSD",
        "GNU_Hurd",
        "OS9",
        "MACH_Kernel",
        "Inferno",
        "QNX",
        "EPOC",
        "IxWorks",
        "VxWorks",
        "MiNT",
        "BeOS",
        "HP_MPE",
        "NextStep",
        "PalmPilot",
        "Rhapsody",
        "Windows_2000",
        "Dedicated",
        "OS_390",
        "VSE",
        "TPF",
        "Windows_R_Me",
        "Caldera_Open_UNIX",
        "OpenBSD",
        "Not_Applicable",
        "Windows_XP",
        "z_OS",
        "other",
    ],
);

static FILE_SYSTEM_KIND: SimpleType = enumeration(
    "FileSystemTypeEnumeration",
    &["swap", "temporary", "spool", "normal"],
);

static CREATION_FLAG: SimpleType = enumeration(
    "CreationFlagEnumeration",
    &["overwrite", "append", "dontOverwrite"],
);

static DESCRIPTION: SimpleType = SimpleType {
    name: "Description_Type",
    base: Builtin::String,
    facet: Facet::None,
};

static BOUNDARY: ComplexType = double(
    "Boundary_Type",
    &[attribute("exclusiveBound", Builtin::Boolean, false)],
);

static EXACT: ComplexType = double(
    "Exact_Type",
    &[attribute("epsilon", Builtin::Double, false)],
);

static LOWER_BOUND: ElementDecl = complex("LowerBound", &BOUNDARY);
static UPPER_BOUND: ElementDecl = complex("UpperBound", &BOUNDARY);
static UPPER_BOUNDED_RANGE: ElementDecl = complex("UpperBoundedRange", &BOUNDARY);
static LOWER_BOUNDED_RANGE: ElementDecl = complex("LowerBoundedRange", &BOUNDARY);
static EXACT_VALUE: ElementDecl = complex("Exact", &EXACT);
static RANGE_BOTH: ElementDecl = complex("Range", &RANGE);

const fn local(decl: &'static ElementDecl, required: bool, repeated: bool) -> Particle {
    Particle {
        term: Term::Local(decl),
        required,
        repeated,
    }
}

static RANGE: ComplexType = elements(
    "Range_Type",
    &[
        local(&LOWER_BOUND, true, false),
        local(&UPPER_BOUND, true, false),
    ],
);

static RANGE_VALUE: ComplexType = elements(
    "RangeValue_Type",
    &[
        local(&UPPER_BOUNDED_RANGE, false, false),
        local(&LOWER_BOUNDED_RANGE, false, false),
        local(&EXACT_VALUE, false, true),
        local(&RANGE_BOTH, false, true),
    ],
);

static JOB_DEFINITION: ComplexType = with_attributes(
    "JobDefinition_Type",
    &[one("JobDescription"), OTHERS],
    &[attribute("id", Builtin::Id, false)],
);

static JOB_DESCRIPTION: ComplexType = elements(
    "JobDescription_Type",
    &[
        optional("JobIdentification"),
        optional("Application"),
        optional("Resources"),
        any_number("DataStaging"),
        OTHERS,
    ],
);

static JOB_IDENTIFICATION: ComplexType = elements(
    "JobIdentification_Type",
    &[
        optional("JobName"),
        optional("Description"),
        any_number("JobAnnotation"),
        any_number("JobProject"),
        OTHERS,
    ],
);

static APPLICATION: ComplexType = elements(
    "Application_Type",
    &[
        optional("ApplicationName"),
        optional("ApplicationVersion"),
        optional("Description"),
        OTHERS,
    ],
);

static RESOURCES: ComplexType = elements(
    "Resources_Type",
    &[
        optional("CandidateHosts"),
        any_number("FileSystem"),
        optional("ExclusiveExecution"),
        optional("OperatingSystem"),
        optional("CPUArchitecture"),
        optional("IndividualCPUSpeed"),
        optional("IndividualCPUTime"),
        optional("IndividualCPUCount"),
        optional("IndividualNetworkBandwidth"),
        optional("IndividualPhysicalMemory"),
        optional("IndividualVirtualMemory"),
        optional("IndividualDiskSpace"),
        optional("TotalCPUTime"),
        optional("TotalCPUCount"),
        optional("TotalPhysicalMemory"),
        optional("TotalVirtualMemory"),
        optional("TotalDiskSpace"),
        optional("TotalResourceCount"),
        OTHERS,
    ],
);

static CANDIDATE_HOSTS: ComplexType = ComplexType {
    namespace: namespace::JSDL,
    name: "CandidateHosts_Type",
    content: Content::Sequence(&[at_least_one("HostName")]),
    attributes: &[],
    any_attribute: false,
};

static CPU_ARCHITECTURE: ComplexType = elements(
    "CPUArchitecture_Type",
    &[one("CPUArchitectureName"), OTHERS],
);

static FILE_SYSTEM: ComplexType = with_attributes(
    "FileSystem_Type",
    &[
        optional("FileSystemType"),
        optional("Description"),
        optional("MountPoint"),
        optional("DiskSpace"),
        OTHERS,
    ],
    &[attribute("name", Builtin::NcName, true)],
);

static OPERATING_SYSTEM_DESCRIPTION: ComplexType = elements(
    "OperatingSystem_Type",
    &[
        optional("OperatingSystemType"),
        optional("OperatingSystemVersion"),
        optional("Description"),
        OTHERS,
    ],
);

static OPERATING_SYSTEM_TYPE: ComplexType = elements(
    "OperatingSystemType_Type",
    &[one("OperatingSystemName"), OTHERS],
);

static DATA_STAGING: ComplexType = with_attributes(
    "DataStaging_Type",
    &[
        one("FileName"),
        optional("FilesystemName"),
        one("CreationFlag"),
        optional("DeleteOnTermination"),
        optional("Source"),
        optional("Target"),
        OTHERS,
    ],
    &[attribute("name", Builtin::NcName, false)],
);

static SOURCE_TARGET: ComplexType = elements("SourceTarget_Type", &[optional("URI"), OTHERS]);

const ELEMENTS: &[ElementDecl] = &[
    complex("JobDefinition", &JOB_DEFINITION),
    complex("JobDescription", &JOB_DESCRIPTION),
    complex("JobIdentification", &JOB_IDENTIFICATION),
    plain("JobName", Builtin::String),
    simple("Description", &DESCRIPTION),
    plain("JobAnnotation", Builtin::String),
    plain("JobProject", Builtin::String),
    complex("Application", &APPLICATION),
    plain("ApplicationName", Builtin::String),
    plain("ApplicationVersion", Builtin::String),
    complex("Resources", &RESOURCES),
    complex("CandidateHosts", &CANDIDATE_HOSTS),
    plain("HostName", Builtin::String),
    complex("OperatingSystem", &OPERATING_SYSTEM_DESCRIPTION),
    complex("OperatingSystemType", &OPERATING_SYSTEM_TYPE),
    plain("OperatingSystemVersion", Builtin::String),
    simple("OperatingSystemName", &OPERATING_SYSTEM),
    plain("ExclusiveExecution", Builtin::Boolean),
    complex("CPUArchitecture", &CPU_ARCHITECTURE),
    simple("CPUArchitectureName", &PROCESSOR_ARCHITECTURE),
    complex("FileSystem", &FILE_SYSTEM),
    simple("FileSystemType", &FILE_SYSTEM_KIND),
    plain("MountPoint", Builtin::String),
    complex("DiskSpace", &RANGE_VALUE),
    complex("IndividualCPUTime", &RANGE_VALUE),
    complex("IndividualCPUSpeed", &RANGE_VALUE),
    complex("IndividualCPUCount", &RANGE_VALUE),
    complex("IndividualPhysicalMemory", &RANGE_VALUE),
    complex("IndividualVirtualMemory", &RANGE_VALUE),
    complex("IndividualNetworkBandwidth", &RANGE_VALUE),
    complex("IndividualDiskSpace", &RANGE_VALUE),
    complex("TotalCPUTime", &RANGE_VALUE),
    complex("TotalCPUCount", &RANGE_VALUE),
    complex("TotalPhysicalMemory", &RANGE_VALUE),
    complex("TotalVirtualMemory", &RANGE_VALUE),
    complex("TotalDiskSpace", &RANGE_VALUE),
    complex("TotalResourceCount", &RANGE_VALUE),
    complex("DataStaging", &DATA_STAGING),
    plain("FileName", Builtin::String),
    plain("FilesystemName", Builtin::NcName),
    simple("CreationFlag", &CREATION_FLAG),
    plain("DeleteOnTermination", Builtin::Boolean),
    complex("Source", &SOURCE_TARGET),
    complex("Target", &SOURCE_TARGET),
    plain("URI", Builtin::AnyUri),
];

const TYPES: &[Type] = &[
    Type::Simple(&PROCESSOR_ARCHITECTURE),
    Type::Simple(&OPERATING_SYSTEM),
    Type::Simple(&FILE_SYSTEM_KIND),
    Type::Simple(&CREATION_FLAG),
    Type::Simple(&DESCRIPTION),
    Type::Complex(&BOUNDARY),
    Type::Complex(&EXACT),
    Type::Complex(&RANGE),
    Type::Complex(&RANGE_VALUE),
    Type::Complex(&JOB_DEFINITION),
    Type::Complex(&JOB_DESCRIPTION),
    Type::Complex(&JOB_IDENTIFICATION),
    Type::Complex(&APPLICATION),
    Type::Complex(&RESOURCES),
    Type::Complex(&CANDIDATE_HOSTS),
    Type::Complex(&CPU_ARCHITECTURE),
    Type::Complex(&FILE_SYSTEM),
    Type::Complex(&OPERATING_SYSTEM_DESCRIPTION),
    Type::Complex(&OPERATING_SYSTEM_TYPE),
    Type::Complex(&DATA_STAGING),
    Type::Complex(&SOURCE_TARGET),
];
