//! From a document's words to a [`Plan`] for this host.

use std::collections::BTreeMap;

use xbee_api::{CACHE_SCHEME, PublishedPort, SubmitRequest};
use xbee_hypervisor::MEMORY_MIN_BYTES;
use xbee_jsdl::limits::MAX_SWEEP_JOBS;
use xbee_jsdl::sweep;
use xbee_jsdl::{
    Application, ApplicationKind, CreationFlag, DataStaging, Diagnostic, InstanceDefinition,
    InstanceSource, Job as JsdlJob, Located, Location, Options, Process, RangeValue, Resources,
    ScriptTarget,
};
use xbee_staging::Uri;

use crate::anywhere::Needs;
use crate::images::{DEFAULT_IMAGE, DEFAULT_MEMORY_MIB, ImageError, ImageStore};
use crate::plan::{
    Boot, Command, Creation, Limits, Plan, Script, Source, StageIn, StageOut, When, Work,
};
use crate::store::Job;

/// Where a task runs if its document does not say.
const WORKING_DIRECTORY: &str = "/job";
/// File systems that every domain has, by their names in GFD.56, section 6.4.3.
const WELL_KNOWN: [(&str, &str); 4] = [
    ("HOME", "/root"),
    ("ROOT", "/"),
    ("SCRATCH", "/scratch"),
    ("TMP", "/tmp"),
];
/// Most files that go in or out.
const MAX_STAGINGS: usize = 1024;
/// Most ports published.
const MAX_PORTS: usize = 64;
/// Capacity of a pipe on Linux, pipe(7), bytes.
const PIPE_BYTES: u64 = 65_536;

/// Why a document does not become a task.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// It is not valid.
    #[error("the document is not valid: {}", list(.0))]
    Invalid(Vec<Diagnostic>),
    /// It uses what this host cannot do.
    #[error("{element} is not supported: {detail}")]
    Unsupported {
        /// The element.
        element: String,
        /// What, and what to do.
        detail: String,
    },
    /// It asks for what this host is not.
    #[error("this host does not match {element}: {detail}")]
    Mismatch {
        /// The element.
        element: String,
        /// What was asked for, what there is.
        detail: String,
    },
    /// A path is in a file system that is not declared.
    #[error(
        "no file system {name:?} is declared: add a FileSystem with that name to Resources, or use HOME, ROOT, SCRATCH or TMP"
    )]
    UnknownFileSystem {
        /// The name.
        name: String,
    },
    /// A URI cannot be used.
    #[error(transparent)]
    Uri(xbee_staging::Error),
    /// The image cannot be used.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// There is too much of something.
    #[error("the job has {count} {what}, at most {limit} are possible")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// How many.
        count: usize,
        /// The limit.
        limit: usize,
    },
}

impl PlanError {
    /// Stable code for programs.
    pub fn code(&self) -> &str {
        match self {
            PlanError::Invalid(_) => "invalid-document",
            PlanError::Unsupported { .. } => "unsupported-element",
            PlanError::Mismatch { .. } => "host-mismatch",
            PlanError::UnknownFileSystem { .. } => "unknown-filesystem",
            PlanError::Uri(error) => error.code(),
            PlanError::Image(_) => "image-unusable",
            PlanError::TooMany { .. } => "too-many",
        }
    }
}

fn list(diagnostics: &[Diagnostic]) -> String {
    let lines: Vec<String> = diagnostics.iter().map(|d| format!("line {d}")).collect();
    lines.join("; ")
}

impl Plan {
    /// Reads the document and resolves it; gives warnings beside the plan.
    pub fn from_request(
        request: &SubmitRequest,
        images: &ImageStore,
    ) -> Result<(Plan, Vec<String>), PlanError> {
        let options = Options {
            lenient: request.lenient,
        };
        let parsed =
            xbee_jsdl::parse(request.jsdl.as_bytes(), &options).map_err(PlanError::Invalid)?;
        let warnings = parsed.warnings.iter().map(ToString::to_string).collect();
        let plan = resolve(&parsed.job, &request.publish, images)?;
        Ok((plan, warnings))
    }
}

impl Needs {
    /// What a request needs of a host, whichever: this one need neither have the image nor be one that is named.
    ///
    /// # Errors
    /// No host could do it: what keeps a document from being a task but the host itself.
    pub fn read(request: &SubmitRequest, images: &ImageStore) -> Result<Needs, PlanError> {
        let options = Options {
            lenient: request.lenient,
        };
        let document = request.jsdl.as_bytes();
        let sweep = sweep::expand(document, &options, MAX_SWEEP_JOBS);
        if sweep.map_err(PlanError::Invalid)?.is_some() {
            return Err(PlanError::Unsupported {
                element: "jsdl-sweep:Sweep".into(),
                detail: "its jobs belong to one host: submit it without --anywhere".into(),
            });
        }
        let job = xbee_jsdl::parse(document, &options).map_err(PlanError::Invalid)?;
        let job = job.job;
        let image = match &job.instance {
            None => Some(DEFAULT_IMAGE.to_owned()),
            Some(instance) => instance.source.image_name().map(ToString::to_string),
        };
        let known = images.get(image.as_deref().unwrap_or(DEFAULT_IMAGE));
        let usual_bytes = known.map_or(DEFAULT_MEMORY_MIB << 20, |image| image.memory_bytes);
        let (vcpus, memory_bytes) = machine(&job.resources, usual_bytes)?;
        Ok(Needs {
            image,
            vcpus,
            memory_bytes,
            hosts: job.resources.candidate_hosts,
        })
    }
}

/// What a request asks for.
#[derive(Debug)]
pub enum Planned {
    /// A job.
    One(Box<Job>),
    /// The jobs of a parameter sweep.
    Sweep(Vec<Swept>),
}

impl Planned {
    /// Reads the document and resolves it, each job of a sweep as if it had been submitted alone; gives warnings beside it.
    pub fn read(
        request: SubmitRequest,
        images: &ImageStore,
    ) -> Result<(Planned, Vec<String>), PlanError> {
        let options = Options {
            lenient: request.lenient,
        };
        let sweep = sweep::expand(request.jsdl.as_bytes(), &options, MAX_SWEEP_JOBS);
        let Some(sweep) = sweep.map_err(PlanError::Invalid)? else {
            let (plan, warnings) = Plan::from_request(&request, images)?;
            return Ok((Planned::One(Box::new(Job { request, plan })), warnings));
        };
        if !request.publish.is_empty() {
            return Err(PlanError::Unsupported {
                element: "jsdl-sweep:Sweep".into(),
                detail: "ports of its jobs are not published; publish none".into(),
            });
        }
        let warnings = sweep.forgiven().iter().map(ToString::to_string).collect();
        let mut jobs = vec![];
        for member in sweep.jobs() {
            let member = member.map_err(PlanError::Invalid)?;
            let plan = resolve(&member.parsed.job, &[], images)?;
            let assigned: Vec<String> = member
                .assignments
                .iter()
                .map(|assigned| format!("{}={}", assigned.place, assigned.value))
                .collect();
            let request = SubmitRequest {
                jsdl: member.document,
                // What was to be forgiven is no more in it.
                lenient: false,
                ..request.clone()
            };
            jobs.push(Swept {
                job: Job { request, plan },
                assigned: assigned.join(", "),
            });
        }
        Ok((Planned::Sweep(jobs), warnings))
    }

    /// What is asked for, job by job, to be changed.
    pub fn plans_mut(&mut self) -> impl Iterator<Item = &mut Plan> {
        let (one, sweep) = match self {
            Planned::One(job) => (Some(&mut job.plan), &mut [][..]),
            Planned::Sweep(jobs) => (None, &mut jobs[..]),
        };
        one.into_iter()
            .chain(sweep.iter_mut().map(|swept| &mut swept.job.plan))
    }

    /// What is asked for, job by job.
    pub fn plans(&self) -> impl Iterator<Item = &Plan> {
        let (one, sweep) = match self {
            Planned::One(job) => (Some(&job.plan), &[][..]),
            Planned::Sweep(jobs) => (None, &jobs[..]),
        };
        one.into_iter()
            .chain(sweep.iter().map(|swept| &swept.job.plan))
    }
}

/// A job of a sweep.
#[derive(Debug)]
pub struct Swept {
    /// The job.
    pub job: Job,
    /// What makes it differ from the others.
    pub assigned: String,
}

fn resolve(
    job: &JsdlJob,
    publish: &[PublishedPort],
    images: &ImageStore,
) -> Result<Plan, PlanError> {
    limit("DataStaging elements", job.staging.len(), MAX_STAGINGS)?;
    limit("published ports", publish.len(), MAX_PORTS)?;
    let (boot, scripts, usual_memory_bytes) = boot(job.instance.as_ref(), images)?;
    let mounts = mounts(&job.resources);
    let process = job.application.kind.process();
    let cwd = match process.and_then(|process| process.working_directory.as_ref()) {
        Some(path) => mounts.path(path, "/")?,
        None => WORKING_DIRECTORY.into(),
    };
    let work = work(&job.application, &mounts, &cwd)?;
    let executable = match &work {
        Work::Command(command) => command.argv.first().cloned(),
        Work::Continuous | Work::Nothing => None,
    };
    let (mut stage_in, mut stage_out) = (vec![], vec![]);
    for file in &job.staging {
        stage(
            file,
            &mounts,
            &cwd,
            executable.as_deref(),
            &mut stage_in,
            &mut stage_out,
        )?;
    }
    let mut directories = vec![cwd];
    directories.extend(mounts.declared);
    is_candidate(&job.resources.candidate_hosts)?;
    let (vcpus, memory_bytes) = machine(&job.resources, usual_memory_bytes)?;
    Ok(Plan {
        name: job.identification.name.clone(),
        boot,
        vcpus,
        memory_bytes,
        directories,
        scripts,
        stage_in,
        stage_out,
        work,
    })
}

fn limit(what: &'static str, count: usize, limit: usize) -> Result<(), PlanError> {
    if count > limit {
        return Err(PlanError::TooMany { what, count, limit });
    }
    Ok(())
}

fn mismatch(element: &str, asked: &str, here: &str) -> PlanError {
    PlanError::Mismatch {
        element: element.into(),
        detail: format!("the job asks for {asked}, this host has {here}"),
    }
}

/// The name that documents have for this host.
pub fn host_name() -> String {
    let name = rustix::system::uname();
    name.nodename().to_string_lossy().into_owned()
}

/// Whether this host is among those that a job may run on; all may, if none is named.
///
/// # Errors
/// [`PlanError::Mismatch`].
pub fn is_candidate(hosts: &[String]) -> Result<(), PlanError> {
    let here = host_name();
    match hosts.is_empty() || hosts.contains(&here) {
        true => Ok(()),
        false => Err(mismatch("CandidateHosts", &hosts.join(", "), &here)),
    }
}

/// CPUs and memory, after the requirements that no choice of these can meet were looked at.
fn machine(wanted: &Resources, usual_memory_bytes: u64) -> Result<(u32, u64), PlanError> {
    let unmeasured: [(&str, &Option<RangeValue>); 8] = [
        ("IndividualCPUSpeed", &wanted.individual_cpu_speed),
        ("IndividualCPUTime", &wanted.individual_cpu_time),
        (
            "IndividualNetworkBandwidth",
            &wanted.individual_network_bandwidth,
        ),
        ("IndividualVirtualMemory", &wanted.individual_virtual_memory),
        ("IndividualDiskSpace", &wanted.individual_disk_space),
        ("TotalCPUTime", &wanted.total_cpu_time),
        ("TotalVirtualMemory", &wanted.total_virtual_memory),
        ("TotalDiskSpace", &wanted.total_disk_space),
    ];
    if let Some((element, _)) = unmeasured.iter().find(|(_, value)| value.is_some()) {
        return Err(PlanError::Unsupported {
            element: (*element).into(),
            detail: "this host cannot promise it; leave it out".into(),
        });
    }
    if let Some(count) = &wanted.total_resource_count
        && !count.contains(1.0)
    {
        return Err(PlanError::Unsupported {
            element: "TotalResourceCount".into(),
            detail: "a job runs in one domain; ask for 1".into(),
        });
    }
    if let Some(system) = &wanted.operating_system
        && system != "LINUX"
    {
        return Err(mismatch("OperatingSystemName", system, "LINUX"));
    }
    if let Some(architecture) = &wanted.cpu_architecture
        && !["x86_64", "x86"].contains(&architecture.as_str())
    {
        return Err(mismatch("CPUArchitectureName", architecture, "x86_64"));
    }
    let vcpus = choose(
        [
            ("TotalCPUCount", &wanted.total_cpu_count),
            ("IndividualCPUCount", &wanted.individual_cpu_count),
        ],
        1,
        1,
    )?;
    let memory_bytes = choose(
        [
            ("TotalPhysicalMemory", &wanted.total_physical_memory),
            (
                "IndividualPhysicalMemory",
                &wanted.individual_physical_memory,
            ),
        ],
        usual_memory_bytes,
        MEMORY_MIN_BYTES,
    )?;
    Ok((u32::try_from(vcpus).unwrap_or(u32::MAX), memory_bytes))
}

/// A number that all of the ranges given contain: with one domain, "in total" and "individual" mean the same.
fn choose(
    wanted: [(&str, &Option<RangeValue>); 2],
    usual: u64,
    least: u64,
) -> Result<u64, PlanError> {
    let mut chosen = usual;
    for (element, range) in wanted {
        let Some(range) = range else { continue };
        chosen = range
            .choose(chosen)
            .filter(|number| *number >= least)
            .ok_or_else(|| PlanError::Mismatch {
                element: element.into(),
                detail: format!("no number from {least} on is in the range"),
            })?;
    }
    for (element, range) in wanted {
        if let Some(range) = range
            && !range.contains(chosen as f64)
        {
            return Err(PlanError::Mismatch {
                element: element.into(),
                detail: format!("it excludes {chosen}, which another range of the job asks for"),
            });
        }
    }
    Ok(chosen)
}

fn boot(
    instance: Option<&InstanceDefinition>,
    images: &ImageStore,
) -> Result<(Boot, Vec<Script>, u64), PlanError> {
    let usual = |name: &str| images.get(name).map(|image| image.memory_bytes);
    let Some(instance) = instance else {
        let boot = Boot::Store {
            name: DEFAULT_IMAGE.into(),
        };
        return Ok((boot, vec![], usual(DEFAULT_IMAGE)?));
    };
    let mut scripts = vec![];
    for script in &instance.scripts {
        scripts.push(Script {
            when: match script.target {
                ScriptTarget::PreSetup => When::PreSetup,
                ScriptTarget::Setup => When::Setup,
                ScriptTarget::Cleanup => When::Cleanup,
                ScriptTarget::PostCleanup => When::PostCleanup,
            },
            source: source(&script.location)?,
        });
    }
    let (boot, memory_bytes) = match (instance.source.image_name(), &instance.source) {
        (Some(name), _) => (Boot::Store { name: name.into() }, usual(name)?),
        (None, InstanceSource::Package(package)) => {
            let package = source(package)?;
            (Boot::Package { package }, usual(DEFAULT_IMAGE)?)
        }
        (None, InstanceSource::Instance(parts)) => {
            let boot = Boot::Instance {
                kernel: Some(source(&parts.kernel)?),
                kernel_args: parts
                    .kernel_arguments
                    .iter()
                    .map(ToString::to_string)
                    .collect(),
                initrd: parts.initrd.as_ref().map(source).transpose()?,
                image: source(&parts.image)?,
            };
            (boot, usual(DEFAULT_IMAGE)?)
        }
    };
    Ok((boot, scripts, memory_bytes))
}

/// A location whose URI can be fetched from, or names an entry of the cache: whose that is, is looked at later.
fn source(location: &Location) -> Result<Source, PlanError> {
    if !location.uri.starts_with(CACHE_SCHEME) {
        check_uri(&location.uri)?;
    }
    Ok(Source {
        uri: location.uri.clone(),
        hash: location
            .hash
            .as_ref()
            .map(|hash| (hash.algorithm.to_string(), hash.digest.clone())),
        compression: location
            .compression
            .map(|compression| compression.to_string()),
        upload: None,
    })
}

fn check_uri(uri: &str) -> Result<(), PlanError> {
    uri.parse::<Uri>().map(drop).map_err(PlanError::Uri)
}

/// Mount points by name.
struct Mounts {
    by_name: BTreeMap<String, String>,
    /// Those that the document declares, which must exist.
    declared: Vec<String>,
}

fn mounts(resources: &Resources) -> Mounts {
    let mut by_name: BTreeMap<String, String> = WELL_KNOWN
        .iter()
        .map(|(name, path)| ((*name).into(), (*path).into()))
        .collect();
    let mut declared = vec![];
    for system in &resources.file_systems {
        let known = by_name.get(&system.name).cloned();
        let path = system
            .mount_point
            .clone()
            .or(known)
            .unwrap_or_else(|| format!("/mnt/{}", system.name));
        let path = join("/", &path);
        declared.push(path.clone());
        by_name.insert(system.name.clone(), path);
    }
    Mounts { by_name, declared }
}

impl Mounts {
    /// Absolute path in the guest; a path without file system is relative to `base`.
    fn path(&self, located: &Located, base: &str) -> Result<String, PlanError> {
        match &located.file_system {
            Some(name) => {
                let mount = self.mount(name)?;
                let below = located.value.trim_start_matches('/');
                Ok(join(mount, below))
            }
            None => Ok(join(base, &located.value)),
        }
    }

    /// A word that is a path only if it names a file system.
    fn word(&self, located: &Located) -> Result<String, PlanError> {
        match located.file_system {
            Some(_) => self.path(located, "/"),
            None => Ok(located.value.clone()),
        }
    }

    fn mount(&self, name: &str) -> Result<&str, PlanError> {
        let found = self.by_name.get(name).map(String::as_str);
        found.ok_or_else(|| PlanError::UnknownFileSystem { name: name.into() })
    }
}

/// `path` below `base` unless it is absolute, without empty components and `.`. `..` stays: what it
/// means depends on the guest's links.
fn join(base: &str, path: &str) -> String {
    let base = if path.starts_with('/') { "" } else { base };
    let parts = base.split('/').chain(path.split('/'));
    let kept: Vec<&str> = parts.filter(|part| !matches!(*part, "" | ".")).collect();
    format!("/{}", kept.join("/"))
}

fn work(application: &Application, mounts: &Mounts, cwd: &str) -> Result<Work, PlanError> {
    Ok(match &application.kind {
        ApplicationKind::None => Work::Nothing,
        ApplicationKind::Continuous => Work::Continuous,
        ApplicationKind::Posix(process) | ApplicationKind::Hpcp(process) => {
            Work::Command(Box::new(command(process, mounts, cwd)?))
        }
    })
}

fn command(process: &Process, mounts: &Mounts, cwd: &str) -> Result<Command, PlanError> {
    let executable = &process.executable;
    // A name alone is looked up along PATH in the guest.
    let program = if executable.file_system.is_none() && !executable.value.contains('/') {
        executable.value.clone()
    } else {
        mounts.path(executable, cwd)?
    };
    let mut argv = vec![program];
    for argument in &process.arguments {
        argv.push(mounts.word(argument)?);
    }
    let mut environment = vec![];
    for variable in &process.environment {
        environment.push((variable.name.clone(), mounts.word(&variable.value)?));
    }
    let file = |located: &Option<Located>| {
        let path = located.as_ref().map(|located| mounts.path(located, cwd));
        path.transpose()
    };
    Ok(Command {
        argv,
        environment,
        working_directory: cwd.into(),
        input: file(&process.input)?,
        output: file(&process.output)?,
        error: file(&process.error)?,
        user: process.user.clone(),
        group: process.group.clone(),
        limits: limits(&process.limits)?,
    })
}

fn limits(limits: &xbee_jsdl::Limits) -> Result<Limits, PlanError> {
    if let Some(bytes) = limits.pipe_size_bytes
        && bytes < PIPE_BYTES
    {
        return Err(PlanError::Unsupported {
            element: "PipeSizeLimit".into(),
            detail: format!("a pipe of Linux holds {PIPE_BYTES} bytes; ask for that or more"),
        });
    }
    let least = |a: Option<u64>, b: Option<u64>| a.into_iter().chain(b).min();
    Ok(Limits {
        wall_seconds: limits.wall_time_s,
        cpu_seconds: limits.cpu_time_s,
        file_size_bytes: limits.file_size_bytes,
        core_bytes: limits.core_dump_bytes,
        data_bytes: limits.data_segment_bytes,
        stack_bytes: limits.stack_size_bytes,
        open_files: limits.open_descriptors,
        // To Linux a thread is a process of the user.
        processes: least(limits.process_count, limits.thread_count),
        address_space_bytes: limits.virtual_memory_bytes,
        locked_memory_bytes: limits.locked_memory_bytes,
        memory_bytes: limits.memory_bytes,
    })
}

fn stage(
    file: &DataStaging,
    mounts: &Mounts,
    cwd: &str,
    executable: Option<&str>,
    stage_in: &mut Vec<StageIn>,
    stage_out: &mut Vec<StageOut>,
) -> Result<(), PlanError> {
    let path = mounts.path(&file.file, cwd)?;
    let creation = match file.creation {
        CreationFlag::Overwrite => Creation::Overwrite,
        CreationFlag::Append => Creation::Append,
        CreationFlag::DontOverwrite => Creation::DontOverwrite,
    };
    if let Some(location) = &file.source
        && !location.uri.is_empty()
    {
        let usual = if executable == Some(path.as_str()) {
            0o755
        } else {
            0o644
        };
        stage_in.push(StageIn {
            source: source(location)?,
            path: path.clone(),
            mode: location.mode.unwrap_or(usual),
            creation,
        });
    }
    if let Some(uri) = file.target.as_ref().filter(|uri| !uri.is_empty()) {
        check_uri(uri)?;
        stage_out.push(StageOut {
            path,
            uri: uri.clone(),
            creation,
            keep: false,
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn images() -> (tempfile::TempDir, ImageStore) {
        let dir = tempfile::tempdir().unwrap();
        for (name, mib) in [("base", 128), ("server", 256)] {
            let image = dir.path().join(name);
            std::fs::create_dir(&image).unwrap();
            let text = format!("kernel = \"k\"\ninitramfs = \"i\"\nmemory_mib = {mib}\n");
            std::fs::write(image.join("image.toml"), text).unwrap();
        }
        let store = ImageStore::new(dir.path().into());
        (dir, store)
    }

    fn plan(application: &str, resources: &str, staging: &str) -> Result<Plan, PlanError> {
        let jsdl = format!(
            r#"<j:JobDefinition xmlns:j="http://schemas.ggf.org/jsdl/2005/11/jsdl"
            xmlns:p="http://schemas.ggf.org/jsdl/2005/11/jsdl-posix"
            xmlns:x="http://www.example.com/schemas/xbe/2007/01/xsdl"><j:JobDescription>
            <j:Application><p:POSIXApplication>{application}</p:POSIXApplication></j:Application>
            <j:Resources>{resources}</j:Resources>{staging}</j:JobDescription></j:JobDefinition>"#
        );
        let request = SubmitRequest {
            jsdl,
            ..SubmitRequest::default()
        };
        let (_dir, images) = images();
        Plan::from_request(&request, &images).map(|(plan, _)| plan)
    }

    const TRUE: &str = "<p:Executable>true</p:Executable>";

    fn staging(file: &str, rest: &str) -> String {
        format!(
            "<j:DataStaging>{file}<j:CreationFlag>overwrite</j:CreationFlag>{rest}</j:DataStaging>"
        )
    }

    #[test]
    fn paths_are_resolved_in_their_file_systems() {
        let application = r#"<p:Executable filesystemName="USR">bin/tool</p:Executable>
            <p:Argument>plain</p:Argument><p:Argument filesystemName="TMP">a b</p:Argument>
            <p:Input>in</p:Input><p:Output filesystemName="SPOOL">out</p:Output>
            <p:Environment name="H" filesystemName="ROOT"/>"#;
        let resources = r#"<j:FileSystem name="USR"><j:MountPoint>/usr/</j:MountPoint></j:FileSystem>
            <j:FileSystem name="SPOOL"/>"#;
        let plan = plan(application, resources, "").unwrap();
        let Work::Command(command) = &plan.work else {
            panic!("{plan:?}")
        };
        assert_eq!(command.argv, ["/usr/bin/tool", "plain", "/tmp/a b"]);
        assert_eq!(command.input.as_deref(), Some("/job/in"));
        assert_eq!(command.output.as_deref(), Some("/mnt/SPOOL/out"));
        assert_eq!(command.environment, [("H".to_owned(), "/".to_owned())]);
        assert_eq!(plan.directories, ["/job", "/usr", "/mnt/SPOOL"]);
    }

    #[test]
    fn an_undeclared_file_system_is_named() {
        let error = plan(
            r#"<p:Executable filesystemName="NONE">x</p:Executable>"#,
            "",
            "",
        );
        let error = error.unwrap_err();
        assert!(error.to_string().contains("NONE"), "{error}");
    }

    #[test]
    fn memory_and_cpus_come_from_the_ranges() {
        let memory = |range: &str| {
            let resources = format!("<j:TotalPhysicalMemory>{range}</j:TotalPhysicalMemory>");
            plan(TRUE, &resources, "").map(|plan| plan.memory_bytes)
        };
        assert_eq!(plan(TRUE, "", "").unwrap().memory_bytes, 128 << 20);
        let exact = memory("<j:Exact>268435456</j:Exact>");
        assert_eq!(exact.unwrap(), 268_435_456);
        // What is usual lies in the range.
        let low = memory("<j:LowerBoundedRange>2097152.0</j:LowerBoundedRange>");
        assert_eq!(low.unwrap(), 128 << 20);
        let tiny = memory("<j:Exact>4096</j:Exact>").unwrap_err();
        assert_eq!(tiny.code(), "host-mismatch");
        let cpus = "<j:TotalCPUCount><j:Exact>2.0</j:Exact></j:TotalCPUCount>";
        assert_eq!(plan(TRUE, cpus, "").unwrap().vcpus, 2);
    }

    #[test]
    fn what_the_host_cannot_promise_is_refused_by_name() {
        let speed = "<j:IndividualCPUSpeed><j:Exact>1e9</j:Exact></j:IndividualCPUSpeed>";
        let error = plan(TRUE, speed, "").unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("IndividualCPUSpeed is not supported"),
            "{error}"
        );
        let sparc = "<j:CPUArchitecture><j:CPUArchitectureName>sparc</j:CPUArchitectureName></j:CPUArchitecture>";
        let error = plan(TRUE, sparc, "").unwrap_err();
        assert!(error.to_string().contains("sparc"), "{error}");
    }

    #[test]
    fn files_go_both_ways_and_a_staged_program_can_be_run() {
        let both = staging(
            "<j:FileName>tool</j:FileName>",
            "<j:Source><j:URI>http://h/tool</j:URI></j:Source><j:Target><j:URI>ftp://u:secret@h/t</j:URI></j:Target>",
        );
        let plan = plan("<p:Executable>./tool</p:Executable>", "", &both).unwrap();
        assert_eq!(plan.stage_in[0].path, "/job/tool");
        assert_eq!(plan.stage_out[0].path, "/job/tool");
        let Work::Command(command) = &plan.work else {
            panic!("{plan:?}")
        };
        assert_eq!(command.argv[0], "/job/tool");
        assert_eq!(plan.stage_in[0].mode, 0o755);
        assert_eq!(crate::plan::redacted(&plan.stage_out[0].uri), "ftp://h/t");
    }

    #[test]
    fn an_unknown_scheme_names_those_there_are() {
        let staging = staging(
            "<j:FileName>x</j:FileName>",
            "<j:Source><j:URI>gopher://h/x</j:URI></j:Source>",
        );
        let error = plan(TRUE, "", &staging).unwrap_err();
        assert_eq!(error.code(), "unknown-scheme");
        assert!(error.to_string().contains("http"), "{error}");
    }

    #[test]
    fn an_image_of_the_store_gives_its_memory() {
        let resources = "<x:InstanceDefinition><x:InstanceDescription><x:Package><x:Location>
            <x:URI>image:server</x:URI></x:Location></x:Package></x:InstanceDescription></x:InstanceDefinition>";
        let made = plan(TRUE, resources, "").unwrap();
        assert_eq!(made.boot.label(), "server");
        assert_eq!(made.memory_bytes, 256 << 20);
        let error = plan(TRUE, &resources.replace("server", "none"), "").unwrap_err();
        assert!(
            error.to_string().contains("there are base, server"),
            "{error}"
        );
    }
}
