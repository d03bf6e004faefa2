//! What a job means on this host: the document's words resolved into images, paths and numbers.
//!
//! A plan is made once, when the job is accepted, and kept with the task: a later `xbed` that
//! reads documents differently does not change what was promised.

use serde::{Deserialize, Serialize};
use uuid::Uuid;
use xbee_engine::Demand;

/// A job, resolved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// The job's name.
    pub name: Option<String>,
    /// What the domain boots.
    pub boot: Boot,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Memory in bytes.
    pub memory_bytes: u64,
    /// Directories that must exist before files come: the working directory, mount points.
    pub directories: Vec<String>,
    /// Scripts of the image's author.
    pub scripts: Vec<Script>,
    /// Files that go in.
    pub stage_in: Vec<StageIn>,
    /// Files that come out.
    pub stage_out: Vec<StageOut>,
    /// What runs.
    pub work: Work,
}

/// What runs in the domain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Work {
    /// A command, to its end.
    Command(Box<Command>),
    /// The domain itself, until it is terminated (XBEApplication/ContinuousTask).
    Continuous,
    /// Nothing: files are moved only.
    Nothing,
}

/// A command in the guest.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Command {
    /// Program and arguments.
    pub argv: Vec<String>,
    /// Environment.
    pub environment: Vec<(String, String)>,
    /// Working directory.
    pub working_directory: String,
    /// File of standard input.
    pub input: Option<String>,
    /// File that standard output goes to as well.
    pub output: Option<String>,
    /// File that standard error goes to as well.
    pub error: Option<String>,
    /// User.
    pub user: Option<String>,
    /// Group.
    pub group: Option<String>,
    /// Bounds.
    pub limits: Limits,
}

/// Bounds on a command: POSIXApplication's limits (GFD.136, section 8.1) that Linux can hold.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// WallTimeLimit, seconds.
    pub wall_seconds: Option<u64>,
    /// CPUTimeLimit, seconds.
    pub cpu_seconds: Option<u64>,
    /// FileSizeLimit, bytes.
    pub file_size_bytes: Option<u64>,
    /// CoreDumpLimit, bytes.
    pub core_bytes: Option<u64>,
    /// DataSegmentLimit, bytes.
    pub data_bytes: Option<u64>,
    /// StackSizeLimit, bytes.
    pub stack_bytes: Option<u64>,
    /// OpenDescriptorsLimit.
    pub open_files: Option<u64>,
    /// The lesser of ProcessCountLimit and ThreadCountLimit: to Linux a thread is a process.
    pub processes: Option<u64>,
    /// VirtualMemoryLimit, bytes.
    pub address_space_bytes: Option<u64>,
    /// LockedMemoryLimit, bytes.
    pub locked_memory_bytes: Option<u64>,
    /// MemoryLimit, bytes.
    #[serde(default)]
    pub memory_bytes: Option<u64>,
}

/// What the domain boots.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[expect(
    clippy::large_enum_variant,
    reason = "there is one a task, in a box of its own"
)]
pub enum Boot {
    /// An image of the store.
    Store {
        /// Its name.
        name: String,
    },
    /// The user's own parts (XSDL Instance).
    Instance {
        /// Kernel; the store's own where it is not given.
        kernel: Option<Source>,
        /// Kernel arguments.
        kernel_args: Vec<String>,
        /// Initial RAM file system.
        initrd: Option<Source>,
        /// Root file system.
        image: Source,
    },
    /// One archive with all parts (XSDL Package).
    Package {
        /// The archive.
        package: Source,
    },
}

impl Boot {
    /// For lists.
    pub fn label(&self) -> String {
        match self {
            Boot::Store { name } => name.clone(),
            Boot::Instance { image, .. } => redacted(&image.uri),
            Boot::Package { package } => redacted(&package.uri),
        }
    }
}

/// A file somewhere.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Source {
    /// Where.
    pub uri: String,
    /// Algorithm and digest in hexadecimal, of the file as it is there.
    pub hash: Option<(String, String)>,
    /// How it is packed: `gzip`, `tbz`...
    pub compression: Option<String>,
    /// What the owner sent is taken instead of the URI, which then names a file of the owner's machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub upload: Option<Uuid>,
}

/// A script in the guest, run as root with the path of the root as its argument.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Script {
    /// When.
    pub when: When,
    /// The script.
    pub source: Source,
}

/// When a script runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum When {
    /// Before files are put into the domain.
    PreSetup,
    /// With the files in place, before the task.
    Setup,
    /// After the task.
    Cleanup,
    /// After the results were taken out.
    PostCleanup,
}

impl When {
    /// After the task.
    pub fn is_clean_up(self) -> bool {
        matches!(self, When::Cleanup | When::PostCleanup)
    }

    /// XSDL's word.
    pub fn name(self) -> &'static str {
        match self {
            When::PreSetup => "pre-setup",
            When::Setup => "setup",
            When::Cleanup => "cleanup",
            When::PostCleanup => "post-cleanup",
        }
    }
}

/// What happens to a file that is there (GFD.136, CreationFlag).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Creation {
    /// It is replaced.
    Overwrite,
    /// It is added to.
    Append,
    /// It stays.
    DontOverwrite,
}

/// A file that goes into the domain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StageIn {
    /// From where.
    pub source: Source,
    /// Absolute path in the guest; a directory where the source is an archive.
    pub path: String,
    /// Permission bits of a file.
    pub mode: u32,
    /// If it is there.
    pub creation: Creation,
}

/// A file that comes out of the domain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StageOut {
    /// Absolute path in the guest.
    pub path: String,
    /// To where.
    pub uri: String,
    /// If it is there.
    pub creation: Creation,
    /// It stays with the task until its owner fetches it: the URI names a file of the owner's machine.
    #[serde(default)]
    pub keep: bool,
}

impl Plan {
    /// What it needs of the host.
    pub fn demand(&self) -> Demand {
        Demand {
            vcpus: self.vcpus,
            memory_bytes: self.memory_bytes,
            disk_bytes: 0,
        }
    }

    /// How long its command runs at most, if that is bounded, milliseconds.
    pub fn longest_run_ms(&self) -> Option<u64> {
        match &self.work {
            Work::Command(command) => command.limits.wall_seconds?.checked_mul(1000),
            Work::Continuous => None,
            Work::Nothing => Some(0),
        }
    }

    /// Where all that goes in is from.
    pub fn sources(&self) -> impl Iterator<Item = &Source> {
        let boot = match &self.boot {
            Boot::Store { .. } => [None, None, None],
            Boot::Instance {
                kernel,
                initrd,
                image,
                ..
            } => [kernel.as_ref(), initrd.as_ref(), Some(image)],
            Boot::Package { package } => [Some(package), None, None],
        };
        let scripts = self.scripts.iter().map(|script| &script.source);
        let files = self.stage_in.iter().map(|file| &file.source);
        boot.into_iter().flatten().chain(scripts).chain(files)
    }

    /// The same, to be changed.
    pub fn sources_mut(&mut self) -> impl Iterator<Item = &mut Source> {
        let boot = match &mut self.boot {
            Boot::Store { .. } => [None, None, None],
            Boot::Instance {
                kernel,
                initrd,
                image,
                ..
            } => [kernel.as_mut(), initrd.as_mut(), Some(image)],
            Boot::Package { package } => [Some(package), None, None],
        };
        let scripts = self.scripts.iter_mut().map(|script| &mut script.source);
        let files = self.stage_in.iter_mut().map(|file| &mut file.source);
        boot.into_iter().flatten().chain(scripts).chain(files)
    }

    /// What it takes of what was sent.
    pub fn uploads(&self) -> impl Iterator<Item = Uuid> {
        self.sources().filter_map(|source| source.upload)
    }

    /// Scripts for one occasion, with their place among all.
    pub fn scripts_at(&self, when: When) -> impl Iterator<Item = (usize, &Script)> {
        self.scripts
            .iter()
            .enumerate()
            .filter(move |(_, script)| script.when == when)
    }
}

/// A URI for people: without user and password.
pub fn redacted(uri: &str) -> String {
    match url::Url::parse(uri) {
        Ok(mut url) if url.has_authority() => {
            // Fails only for URLs that cannot have a user, which then have none.
            let _ = url.set_username("");
            let _ = url.set_password(None);
            url.to_string()
        }
        _ => uri.into(),
    }
}

#[cfg(test)]
impl Plan {
    /// A job that does nothing, for tests of what surrounds it.
    pub fn example() -> Plan {
        Plan {
            name: None,
            boot: Boot::Store {
                name: "base".into(),
            },
            vcpus: 1,
            memory_bytes: 1 << 20,
            directories: vec![],
            scripts: vec![],
            stage_in: vec![],
            stage_out: vec![],
            work: Work::Nothing,
        }
    }
}
