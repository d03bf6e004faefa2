//! From the typed job to a document.

use std::fmt::Write as _;

use crate::chars::is_space;
use crate::diagnostic::Diagnostic;
use crate::job::{
    ApplicationKind, CreationFlag, DataStaging, FileSystem, InstanceDefinition, InstanceSource,
    Job, Limits, Located, Location, Process, Resources,
};
use crate::namespace::{HPCP, JSDL, POSIX, PREFIXES, XBE, XSDL};
use crate::range::{Bound, RangeValue};
use crate::{Options, parse};

/// Why a job has no document.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WriteError {
    /// A value does not fit where it belongs, such as a control character in an argument.
    #[error("the job cannot be written as JSDL")]
    Invalid(#[source] Diagnostic),
    /// Reading the document would give another job, as where a file name ends in a space.
    #[error(
        "the job cannot be written as JSDL: white space at the ends of names would be lost, \
         or a number is not one"
    )]
    Lossy,
}

/// Writes a job as a valid document, which [`parse`] reads as the same job.
///
/// # Errors
/// If the job holds what JSDL cannot say.
pub fn write(job: &Job) -> Result<String, WriteError> {
    let mut writer = Writer {
        text: "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n".to_owned(),
        open: Vec::new(),
    };
    writer.job(job);
    // Held against the reader, so that no second copy of the schema's rules is needed here.
    match parse(writer.text.as_bytes(), &Options::default()) {
        Ok(parsed) if parsed.job == *job => Ok(writer.text),
        Ok(_) => Err(WriteError::Lossy),
        Err(findings) => Err(findings
            .into_iter()
            .next()
            .map_or(WriteError::Lossy, WriteError::Invalid)),
    }
}

type Attributes<'a> = &'a [(&'a str, Option<&'a str>)];

struct Writer {
    text: String,
    /// Names of the open elements.
    open: Vec<String>,
}

impl Writer {
    fn indent(&mut self) {
        self.text.extend(std::iter::repeat_n("  ", self.open.len()));
    }

    fn tag(&mut self, name: &str, attributes: Attributes) {
        self.indent();
        self.text.push('<');
        self.text.push_str(name);
        for (name, value) in attributes {
            if let Some(value) = value {
                self.text.push(' ');
                self.text.push_str(name);
                self.text.push_str("=\"");
                escape(&mut self.text, value, true);
                self.text.push('"');
            }
        }
    }

    /// An element with others inside, written by `inside`.
    fn element(&mut self, name: &str, attributes: Attributes, inside: impl FnOnce(&mut Self)) {
        self.tag(name, attributes);
        self.text.push_str(">\n");
        self.open.push(name.to_owned());
        inside(self);
        self.open.pop();
        self.indent();
        self.text.push_str("</");
        self.text.push_str(name);
        self.text.push_str(">\n");
    }

    fn empty(&mut self, name: &str, attributes: Attributes) {
        self.tag(name, attributes);
        self.text.push_str("/>\n");
    }

    fn leaf(&mut self, name: &str, attributes: Attributes, value: &str) {
        self.tag(name, attributes);
        self.text.push('>');
        escape(&mut self.text, value, false);
        self.text.push_str("</");
        self.text.push_str(name);
        self.text.push_str(">\n");
    }

    fn optional(&mut self, name: &str, value: Option<&str>) {
        if let Some(value) = value {
            self.leaf(name, &[], value);
        }
    }

    fn job(&mut self, job: &Job) {
        let mut names: Vec<String> = vec![format!("xmlns:{}", prefix(JSDL))];
        let mut uris = vec![JSDL];
        let used = [
            (
                POSIX,
                matches!(job.application.kind, ApplicationKind::Posix(_)),
            ),
            (
                HPCP,
                matches!(job.application.kind, ApplicationKind::Hpcp(_)),
            ),
            (XBE, job.application.kind == ApplicationKind::Continuous),
            (
                XSDL,
                job.instance.is_some() || job.staging.iter().any(needs_xsdl),
            ),
        ];
        for (uri, _) in used.iter().filter(|(_, is_used)| *is_used) {
            names.push(format!("xmlns:{}", prefix(uri)));
            uris.push(uri);
        }
        let mut attributes: Vec<(&str, Option<&str>)> = names
            .iter()
            .zip(&uris)
            .map(|(name, uri)| (name.as_str(), Some(*uri)))
            .collect();
        attributes.push(("id", job.id.as_deref()));
        self.element("jsdl:JobDefinition", &attributes, |w| {
            w.element("jsdl:JobDescription", &[], |w| {
                w.identification(job);
                w.application(job);
                if job.resources != Resources::default() || job.instance.is_some() {
                    w.resources(&job.resources, job.instance.as_ref());
                }
                for staging in &job.staging {
                    w.staging(staging);
                }
            });
        });
    }

    fn identification(&mut self, job: &Job) {
        let names = &job.identification;
        if *names == crate::Identification::default() {
            return;
        }
        self.element("jsdl:JobIdentification", &[], |w| {
            w.optional("jsdl:JobName", names.name.as_deref());
            w.optional("jsdl:Description", names.description.as_deref());
            for annotation in &names.annotations {
                w.leaf("jsdl:JobAnnotation", &[], annotation);
            }
            for project in &names.projects {
                w.leaf("jsdl:JobProject", &[], project);
            }
        });
    }

    fn application(&mut self, job: &Job) {
        let application = &job.application;
        if *application == crate::Application::default() {
            return;
        }
        self.element("jsdl:Application", &[], |w| {
            w.optional("jsdl:ApplicationName", application.name.as_deref());
            w.optional("jsdl:ApplicationVersion", application.version.as_deref());
            w.optional("jsdl:Description", application.description.as_deref());
            match &application.kind {
                ApplicationKind::None => {}
                ApplicationKind::Posix(process) => {
                    w.process("jsdl-posix", "POSIXApplication", process);
                }
                ApplicationKind::Hpcp(process) => {
                    w.process("jsdl-hpcpa", "HPCProfileApplication", process);
                }
                ApplicationKind::Continuous => {
                    w.element("xbe:XBEApplication", &[], |w| {
                        w.empty("xbe:ContinuousTask", &[])
                    });
                }
            }
        });
    }

    fn process(&mut self, prefix: &str, name: &str, process: &Process) {
        let name_of = |local: &str| format!("{prefix}:{local}");
        let attributes = [("name", process.name.as_deref())];
        self.element(&name_of(name), &attributes, |w| {
            w.located(&name_of("Executable"), &process.executable);
            for argument in &process.arguments {
                w.located(&name_of("Argument"), argument);
            }
            let files = [
                ("Input", &process.input),
                ("Output", &process.output),
                ("Error", &process.error),
                ("WorkingDirectory", &process.working_directory),
            ];
            for (local, file) in files {
                if let Some(file) = file {
                    w.located(&name_of(local), file);
                }
            }
            for variable in &process.environment {
                w.leaf(
                    &name_of("Environment"),
                    &[
                        ("name", Some(&variable.name)),
                        ("filesystemName", variable.value.file_system.as_deref()),
                        space(&variable.value.value),
                    ],
                    &variable.value.value,
                );
            }
            w.limits(&process.limits);
            w.optional(&name_of("UserName"), process.user.as_deref());
            w.optional(&name_of("GroupName"), process.group.as_deref());
        });
    }

    fn located(&mut self, name: &str, located: &Located) {
        let attributes = [
            ("filesystemName", located.file_system.as_deref()),
            space(&located.value),
        ];
        self.leaf(name, &attributes, &located.value);
    }

    fn limits(&mut self, limits: &Limits) {
        let limits = [
            ("WallTimeLimit", limits.wall_time_s),
            ("FileSizeLimit", limits.file_size_bytes),
            ("CoreDumpLimit", limits.core_dump_bytes),
            ("DataSegmentLimit", limits.data_segment_bytes),
            ("LockedMemoryLimit", limits.locked_memory_bytes),
            ("MemoryLimit", limits.memory_bytes),
            ("OpenDescriptorsLimit", limits.open_descriptors),
            ("PipeSizeLimit", limits.pipe_size_bytes),
            ("StackSizeLimit", limits.stack_size_bytes),
            ("CPUTimeLimit", limits.cpu_time_s),
            ("ProcessCountLimit", limits.process_count),
            ("VirtualMemoryLimit", limits.virtual_memory_bytes),
            ("ThreadCountLimit", limits.thread_count),
        ];
        for (local, limit) in limits {
            if let Some(limit) = limit {
                self.leaf(&format!("jsdl-posix:{local}"), &[], &limit.to_string());
            }
        }
    }

    fn resources(&mut self, resources: &Resources, instance: Option<&InstanceDefinition>) {
        self.element("jsdl:Resources", &[], |w| {
            if !resources.candidate_hosts.is_empty() {
                w.element("jsdl:CandidateHosts", &[], |w| {
                    for host in &resources.candidate_hosts {
                        w.leaf("jsdl:HostName", &[], host);
                    }
                });
            }
            for file_system in &resources.file_systems {
                w.file_system(file_system);
            }
            if let Some(exclusive) = resources.exclusive_execution {
                w.leaf("jsdl:ExclusiveExecution", &[], &exclusive.to_string());
            }
            w.operating_system(resources);
            if let Some(name) = &resources.cpu_architecture {
                w.element("jsdl:CPUArchitecture", &[], |w| {
                    w.leaf("jsdl:CPUArchitectureName", &[], name);
                });
            }
            let ranges = [
                ("IndividualCPUSpeed", &resources.individual_cpu_speed),
                ("IndividualCPUTime", &resources.individual_cpu_time),
                ("IndividualCPUCount", &resources.individual_cpu_count),
                (
                    "IndividualNetworkBandwidth",
                    &resources.individual_network_bandwidth,
                ),
                (
                    "IndividualPhysicalMemory",
                    &resources.individual_physical_memory,
                ),
                (
                    "IndividualVirtualMemory",
                    &resources.individual_virtual_memory,
                ),
                ("IndividualDiskSpace", &resources.individual_disk_space),
                ("TotalCPUTime", &resources.total_cpu_time),
                ("TotalCPUCount", &resources.total_cpu_count),
                ("TotalPhysicalMemory", &resources.total_physical_memory),
                ("TotalVirtualMemory", &resources.total_virtual_memory),
                ("TotalDiskSpace", &resources.total_disk_space),
                ("TotalResourceCount", &resources.total_resource_count),
            ];
            for (local, range) in ranges {
                w.range(local, range.as_ref());
            }
            if let Some(instance) = instance {
                w.instance(instance);
            }
        });
    }

    fn operating_system(&mut self, resources: &Resources) {
        let version = resources.operating_system_version.as_deref();
        if resources.operating_system.is_none() && version.is_none() {
            return;
        }
        self.element("jsdl:OperatingSystem", &[], |w| {
            if let Some(name) = &resources.operating_system {
                w.element("jsdl:OperatingSystemType", &[], |w| {
                    w.leaf("jsdl:OperatingSystemName", &[], name);
                });
            }
            w.optional("jsdl:OperatingSystemVersion", version);
        });
    }

    fn file_system(&mut self, file_system: &FileSystem) {
        let attributes = [("name", Some(file_system.name.as_str()))];
        self.element("jsdl:FileSystem", &attributes, |w| {
            w.optional("jsdl:FileSystemType", file_system.kind.as_deref());
            w.optional("jsdl:Description", file_system.description.as_deref());
            w.optional("jsdl:MountPoint", file_system.mount_point.as_deref());
            w.range("DiskSpace", file_system.disk_space.as_ref());
        });
    }

    fn range(&mut self, local: &str, range: Option<&RangeValue>) {
        let Some(range) = range else {
            return;
        };
        self.element(&format!("jsdl:{local}"), &[], |w| {
            w.bound("UpperBoundedRange", range.upper_bounded);
            w.bound("LowerBoundedRange", range.lower_bounded);
            for exact in &range.exact {
                let epsilon = (exact.epsilon != 0.0).then(|| number(exact.epsilon));
                let attributes = [("epsilon", epsilon.as_deref())];
                w.leaf("jsdl:Exact", &attributes, &number(exact.value));
            }
            for range in &range.ranges {
                w.element("jsdl:Range", &[], |w| {
                    w.bound("LowerBound", Some(range.lower));
                    w.bound("UpperBound", Some(range.upper));
                });
            }
        });
    }

    fn bound(&mut self, local: &str, bound: Option<Bound>) {
        if let Some(bound) = bound {
            let attributes = [("exclusiveBound", bound.exclusive.then_some("true"))];
            self.leaf(&format!("jsdl:{local}"), &attributes, &number(bound.value));
        }
    }

    fn staging(&mut self, staging: &DataStaging) {
        let attributes = [("name", staging.name.as_deref())];
        self.element("jsdl:DataStaging", &attributes, |w| {
            w.leaf("jsdl:FileName", &[], &staging.file.value);
            w.optional("jsdl:FilesystemName", staging.file.file_system.as_deref());
            let creation = match staging.creation {
                CreationFlag::Overwrite => "overwrite",
                CreationFlag::Append => "append",
                CreationFlag::DontOverwrite => "dontOverwrite",
            };
            w.leaf("jsdl:CreationFlag", &[], creation);
            if staging.delete_on_termination {
                w.leaf("jsdl:DeleteOnTermination", &[], "true");
            }
            if let Some(source) = &staging.source {
                w.element("jsdl:Source", &[], |w| w.location("jsdl:URI", source));
            }
            if let Some(target) = &staging.target {
                w.element("jsdl:Target", &[], |w| w.leaf("jsdl:URI", &[], target));
            }
        });
    }

    /// What is inside a location.
    fn location(&mut self, uri: &str, location: &Location) {
        self.leaf(uri, &[], &location.uri);
        if let Some(mode) = location.mode {
            self.leaf("xsdl:Mode", &[], &format!("{mode:04o}"));
        }
        if let Some(hash) = &location.hash {
            let attributes = [("algorithm", Some(hash.algorithm.as_str()))];
            self.leaf("xsdl:Hash", &attributes, &hash.digest);
        }
        if let Some(compression) = location.compression {
            self.empty(
                "xsdl:Compression",
                &[("algorithm", Some(compression.as_str()))],
            );
        }
    }

    fn at(&mut self, location: &Location) {
        self.element("xsdl:Location", &[], |w| w.location("xsdl:URI", location));
    }

    fn instance(&mut self, definition: &InstanceDefinition) {
        self.element("xsdl:InstanceDefinition", &[], |w| {
            w.element("xsdl:InstanceDescription", &[], |w| {
                match &definition.source {
                    InstanceSource::Package(location) => {
                        w.element("xsdl:Package", &[], |w| w.at(location));
                    }
                    InstanceSource::Instance(instance) => {
                        w.element("xsdl:Instance", &[], |w| {
                            w.optional("xsdl:Description", instance.description.as_deref());
                            w.element("xsdl:Kernel", &[], |w| {
                                w.at(&instance.kernel);
                                for argument in &instance.kernel_arguments {
                                    let name = [("name", argument.name.as_deref())];
                                    w.leaf("xsdl:Argument", &name, &argument.value);
                                }
                            });
                            if let Some(initrd) = &instance.initrd {
                                w.element("xsdl:Initrd", &[], |w| w.at(initrd));
                            }
                            let kind = [("fs-type", instance.image_file_system.as_deref())];
                            w.element("xsdl:Image", &kind, |w| w.at(&instance.image));
                        });
                    }
                }
                if !definition.scripts.is_empty() {
                    w.element("xsdl:Control", &[], |w| {
                        for script in &definition.scripts {
                            let target = [("target", Some(script.target.as_str()))];
                            w.element("xsdl:Script", &target, |w| w.at(&script.location));
                        }
                    });
                }
            });
        });
    }
}

fn prefix(uri: &str) -> &'static str {
    PREFIXES
        .iter()
        .find(|(_, candidate)| *candidate == uri)
        .map_or("", |&(prefix, _)| prefix)
}

fn needs_xsdl(staging: &DataStaging) -> bool {
    staging.source.as_ref().is_some_and(|source| {
        source.mode.is_some() || source.hash.is_some() || source.compression.is_some()
    })
}

/// `xml:space`, where the reader would otherwise change the value.
fn space(value: &str) -> (&'static str, Option<&'static str>) {
    let is_kept = value.contains(|c| is_space(c) && c != ' ')
        || value.starts_with(is_space)
        || value.ends_with(is_space);
    ("xml:space", is_kept.then_some("preserve"))
}

fn number(value: f64) -> String {
    if value.is_nan() {
        "NaN".to_owned()
    } else if value.is_infinite() {
        if value > 0.0 { "INF" } else { "-INF" }.to_owned()
    } else {
        value.to_string()
    }
}

/// Appends a value to a document.
pub(crate) fn escape(out: &mut String, value: &str, is_attribute: bool) {
    for c in value.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' if is_attribute => out.push_str("&quot;"),
            // Literal ones would be read as other white space (XML 1.0, 2.11 and 3.3.3).
            '\r' => out.push_str("&#13;"),
            '\n' | '\t' if is_attribute => {
                // Writing to a string cannot fail.
                let _ = write!(out, "&#{};", u32::from(c));
            }
            _ => out.push(c),
        }
    }
}
