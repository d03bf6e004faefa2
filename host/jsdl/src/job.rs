//! The typed job: what a document says, without its XML.

use std::fmt;
use std::str::FromStr;

use crate::range::RangeValue;

/// A job description.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Job {
    /// `id` of the definition.
    pub id: Option<String>,
    /// What the job is called.
    pub identification: Identification,
    /// What is run.
    pub application: Application,
    /// What it needs.
    pub resources: Resources,
    /// Files to bring in and out, in document order.
    pub staging: Vec<DataStaging>,
    /// The virtual machine it runs in; without it the host's usual one.
    pub instance: Option<InstanceDefinition>,
}

/// Names of a job (GFD.56, section 6.2).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Identification {
    /// Short name; need not be unique.
    pub name: Option<String>,
    /// For people.
    pub description: Option<String>,
    /// For machines.
    pub annotations: Vec<String>,
    /// Projects the job counts for.
    pub projects: Vec<String>,
}

/// The application (GFD.56, section 6.3).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Application {
    /// Name of the software.
    pub name: Option<String>,
    /// Its version.
    pub version: Option<String>,
    /// For people.
    pub description: Option<String>,
    /// What is started.
    pub kind: ApplicationKind,
}

/// What is started in the virtual machine.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum ApplicationKind {
    /// Nothing: the job only moves files.
    #[default]
    None,
    /// A POSIXApplication.
    Posix(Process),
    /// An HPCProfileApplication. It has no limits, group or file system names.
    Hpcp(Process),
    /// An XBEApplication with a ContinuousTask: a server, which runs until it is terminated.
    Continuous,
}

impl ApplicationKind {
    /// The program to run, if there is one.
    #[must_use]
    pub fn process(&self) -> Option<&Process> {
        match self {
            ApplicationKind::Posix(process) | ApplicationKind::Hpcp(process) => Some(process),
            ApplicationKind::None | ApplicationKind::Continuous => None,
        }
    }
}

/// A value that may be relative to a file system of [`Resources::file_systems`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Located {
    /// The value; of a path, relative to the mount point if a file system is named.
    pub value: String,
    /// Name of a declared file system.
    pub file_system: Option<String>,
}

/// A program with its surroundings (GFD.56, section 8).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Process {
    /// `name` of the application element.
    pub name: Option<String>,
    /// The program.
    pub executable: Located,
    /// Its arguments, white space inside kept.
    pub arguments: Vec<Located>,
    /// File for standard input.
    pub input: Option<Located>,
    /// File for standard output.
    pub output: Option<Located>,
    /// File for standard error.
    pub error: Option<Located>,
    /// Directory to start in.
    pub working_directory: Option<Located>,
    /// Environment, in document order; of a name given twice the last counts.
    pub environment: Vec<EnvironmentVariable>,
    /// Limits to the process.
    pub limits: Limits,
    /// User to run as.
    pub user: Option<String>,
    /// Group to run as.
    pub group: Option<String>,
}

/// One variable of the environment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EnvironmentVariable {
    /// Its name.
    pub name: String,
    /// Its value; with a file system named, a path in that.
    pub value: Located,
}

/// Limits to a process (GFD.56, section 8.1).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// Time from start to end, in seconds.
    pub wall_time_s: Option<u64>,
    /// Largest file written, in bytes.
    pub file_size_bytes: Option<u64>,
    /// Largest core dump, in bytes.
    pub core_dump_bytes: Option<u64>,
    /// Largest data segment, in bytes.
    pub data_segment_bytes: Option<u64>,
    /// Locked memory, in bytes.
    pub locked_memory_bytes: Option<u64>,
    /// Resident memory, in bytes.
    pub memory_bytes: Option<u64>,
    /// Open file descriptors.
    pub open_descriptors: Option<u64>,
    /// Pipe size, in bytes.
    pub pipe_size_bytes: Option<u64>,
    /// Stack size, in bytes.
    pub stack_size_bytes: Option<u64>,
    /// CPU time, in seconds.
    pub cpu_time_s: Option<u64>,
    /// Processes.
    pub process_count: Option<u64>,
    /// Virtual memory, in bytes.
    pub virtual_memory_bytes: Option<u64>,
    /// Threads.
    pub thread_count: Option<u64>,
}

/// What a job needs (GFD.56, section 6.4).
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Resources {
    /// Hosts that may run it; empty for any.
    pub candidate_hosts: Vec<String>,
    /// File systems by which paths are named.
    pub file_systems: Vec<FileSystem>,
    /// Whether nothing else may run beside it.
    pub exclusive_execution: Option<bool>,
    /// Name of the operating system, a value of the CIM list in JSDL.
    pub operating_system: Option<String>,
    /// Version of the operating system.
    pub operating_system_version: Option<String>,
    /// Name of the processor architecture, a value of JSDL's list.
    pub cpu_architecture: Option<String>,
    /// Hertz of each CPU.
    pub individual_cpu_speed: Option<RangeValue>,
    /// Seconds of CPU time of each resource.
    pub individual_cpu_time: Option<RangeValue>,
    /// CPUs of each resource.
    pub individual_cpu_count: Option<RangeValue>,
    /// Bits a second of each resource.
    pub individual_network_bandwidth: Option<RangeValue>,
    /// Bytes of memory of each resource.
    pub individual_physical_memory: Option<RangeValue>,
    /// Bytes of virtual memory of each resource.
    pub individual_virtual_memory: Option<RangeValue>,
    /// Bytes of disk of each resource.
    pub individual_disk_space: Option<RangeValue>,
    /// Seconds of CPU time in all.
    pub total_cpu_time: Option<RangeValue>,
    /// CPUs in all.
    pub total_cpu_count: Option<RangeValue>,
    /// Bytes of memory in all.
    pub total_physical_memory: Option<RangeValue>,
    /// Bytes of virtual memory in all.
    pub total_virtual_memory: Option<RangeValue>,
    /// Bytes of disk in all.
    pub total_disk_space: Option<RangeValue>,
    /// Resources (machines) in all.
    pub total_resource_count: Option<RangeValue>,
}

/// The file systems that need no declaration (GFD.56, section 6.4).
pub const WELL_KNOWN_FILE_SYSTEMS: &[&str] = &["HOME", "ROOT", "SCRATCH", "TMP"];

impl Resources {
    /// Whether paths may name the file system.
    pub(crate) fn has_file_system(&self, name: &str) -> bool {
        WELL_KNOWN_FILE_SYSTEMS.contains(&name)
            || self
                .file_systems
                .iter()
                .any(|declared| declared.name == name)
    }
}

/// A file system (GFD.56, section 6.4).
#[derive(Debug, Clone, Default, PartialEq)]
pub struct FileSystem {
    /// The name by which paths refer to it.
    pub name: String,
    /// `swap`, `temporary`, `spool` or `normal`.
    pub kind: Option<String>,
    /// For people.
    pub description: Option<String>,
    /// Where it is mounted in the machine.
    pub mount_point: Option<String>,
    /// Bytes needed in it.
    pub disk_space: Option<RangeValue>,
}

/// A file to bring in, out, or both (GFD.56, section 6.5).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DataStaging {
    /// `name` of the element.
    pub name: Option<String>,
    /// The path in the machine.
    pub file: Located,
    /// What happens to a file that is there already.
    pub creation: CreationFlag,
    /// Whether the file is removed when the job is over.
    pub delete_on_termination: bool,
    /// Where it comes from.
    pub source: Option<Location>,
    /// Where it goes afterwards.
    pub target: Option<String>,
}

/// What happens to a file that is there already.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum CreationFlag {
    /// It is replaced.
    #[default]
    Overwrite,
    /// What comes is put behind it.
    Append,
    /// It is left alone and nothing is fetched.
    DontOverwrite,
}

/// The virtual machine a job runs in (XSDL InstanceDefinition).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InstanceDefinition {
    /// What is booted.
    pub source: InstanceSource,
    /// Scripts around the job, in document order.
    pub scripts: Vec<ControlScript>,
}

/// What is booted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum InstanceSource {
    /// One archive or image with all that is needed, or, by a URI `image:NAME`, an image of the
    /// host.
    Package(Location),
    /// The parts, each from its own place.
    Instance(Box<Instance>),
}

impl InstanceSource {
    /// The name of an image of the host: of the URI `image:NAME`.
    #[must_use]
    pub fn image_name(&self) -> Option<&str> {
        match self {
            InstanceSource::Package(location) => location.uri.strip_prefix(IMAGE_SCHEME),
            InstanceSource::Instance(_) => None,
        }
    }
}

/// What the URI of an image of the host begins with; the image's name follows.
pub const IMAGE_SCHEME: &str = "image:";

/// A machine in parts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Instance {
    /// For people.
    pub description: Option<String>,
    /// The kernel.
    pub kernel: Location,
    /// The kernel's command line.
    pub kernel_arguments: Vec<KernelArgument>,
    /// The initial RAM disk.
    pub initrd: Option<Location>,
    /// The root file system's image.
    pub image: Location,
    /// The image's file system: `ext2`, `ext3` or `ext4`.
    pub image_file_system: Option<String>,
}

/// One word of a kernel's command line: `name=value`, or the value alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelArgument {
    /// What stands before `=`.
    pub name: Option<String>,
    /// What stands behind it.
    pub value: String,
}

impl fmt::Display for KernelArgument {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.name {
            Some(name) => write!(f, "{name}={}", self.value),
            None => f.write_str(&self.value),
        }
    }
}

/// Where a file is and what it must be (XSDL Location).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Location {
    /// The URI; not empty in a parsed document.
    pub uri: String,
    /// Permission bits the file gets.
    pub mode: Option<u32>,
    /// Its hash, of the bytes as they are fetched.
    pub hash: Option<Hash>,
    /// How it is packed. Archives are unpacked: into the directory that the file name of the
    /// staging names.
    pub compression: Option<Compression>,
}

/// A script around the job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ControlScript {
    /// When it runs.
    pub target: ScriptTarget,
    /// Where it comes from.
    pub location: Location,
}

/// A file's hash.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hash {
    /// The algorithm.
    pub algorithm: HashAlgorithm,
    /// The digest in lower-case hexadecimal, of the algorithm's length.
    pub digest: String,
}

/// Declares an enumeration whose values have names in the document.
macro_rules! named {
    ($(#[$meta:meta])* $name:ident { $($(#[$doc:meta])* $variant:ident = $text:literal,)+ }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum $name { $($(#[$doc])* $variant,)+ }

        impl $name {
            /// All values.
            pub const ALL: &'static [$name] = &[$($name::$variant,)+];

            /// The name in a document.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self { $($name::$variant => $text,)+ }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }

        impl FromStr for $name {
            type Err = UnknownName;

            fn from_str(text: &str) -> Result<Self, UnknownName> {
                match text { $($text => Ok($name::$variant),)+ _ => Err(UnknownName) }
            }
        }
    };
}

/// A name that is none of an enumeration's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UnknownName;

impl fmt::Display for UnknownName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("unknown name")
    }
}

impl std::error::Error for UnknownName {}

named! {
    /// How a file's hash is made.
    HashAlgorithm {
        /// MD5.
        Md5 = "md5",
        /// SHA-1.
        Sha1 = "sha1",
        /// SHA-224.
        Sha224 = "sha224",
        /// SHA-256.
        Sha256 = "sha256",
        /// SHA-384.
        Sha384 = "sha384",
        /// SHA-512.
        Sha512 = "sha512",
        /// BLAKE3 with 256 bits; not in XSDL's own list.
        Blake3 = "blake3",
    }
}

impl HashAlgorithm {
    /// Length of the digest in hexadecimal digits.
    #[must_use]
    pub fn digest_digits(self) -> usize {
        match self {
            HashAlgorithm::Md5 => 32,
            HashAlgorithm::Sha1 => 40,
            HashAlgorithm::Sha224 => 56,
            HashAlgorithm::Sha256 | HashAlgorithm::Blake3 => 64,
            HashAlgorithm::Sha384 => 96,
            HashAlgorithm::Sha512 => 128,
        }
    }
}

named! {
    /// How a file is packed.
    Compression {
        /// One file, bzip2.
        Bzip2 = "bzip2",
        /// One file, gzip.
        Gzip = "gzip",
        /// One file, xz; not in XSDL's own list.
        Xz = "xz",
        /// One file, zstd; not in XSDL's own list.
        Zstd = "zstd",
        /// tar in bzip2.
        Tbz = "tbz",
        /// tar in gzip.
        Tgz = "tgz",
        /// tar in xz; not in XSDL's own list.
        Txz = "txz",
        /// tar in zstd; not in XSDL's own list.
        Tzst = "tzst",
    }
}

named! {
    /// When a control script runs.
    ScriptTarget {
        /// Before the machine's files are set up.
        PreSetup = "pre-setup",
        /// Before the job.
        Setup = "setup",
        /// After the job.
        Cleanup = "cleanup",
        /// After the machine is stopped.
        PostCleanup = "post-cleanup",
    }
}
