//! From a validated element tree to the typed job.
//!
//! White space: JSDL's texts are laid out over lines in practice, so white space at both ends of a
//! text is dropped, and inside an argument line breaks and tabs become spaces, as its type
//! `normalizedString` has it. `xml:space="preserve"` (XML 1.0, 2.10) keeps all of it.

use crate::chars::{is_space, trim};
use crate::datatypes::{parse_boolean, parse_double};
use crate::diagnostic::{Diagnostic, Position, quoted};
use crate::document::Element;
use crate::extensions;
use crate::job::{
    Application, ApplicationKind, Compression, ControlScript, CreationFlag, DataStaging,
    EnvironmentVariable, FileSystem, Hash, HashAlgorithm, Identification, Instance,
    InstanceDefinition, InstanceSource, Job, KernelArgument, Limits, Located, Location, Process,
    Resources,
};
use crate::limits::MAX_DIAGNOSTICS;
use crate::namespace::{self, HPCP, JSDL, POSIX, XBE, XSDL};
use crate::range::{Bound, Exact, Range, RangeValue};

/// What a reading found beside the job.
#[derive(Default)]
pub(crate) struct Findings {
    pub errors: Vec<Diagnostic>,
    pub warnings: Vec<Diagnostic>,
}

impl Findings {
    pub(crate) fn error(&mut self, at: Position, code: &'static str, message: String) {
        if self.errors.len() < MAX_DIAGNOSTICS {
            self.errors.push(at.diagnostic(code, message));
        }
    }

    pub(crate) fn warning(&mut self, at: Position, code: &'static str, message: String) {
        if self.warnings.len() < MAX_DIAGNOSTICS {
            self.warnings.push(at.diagnostic(code, message));
        }
    }
}

/// Reads a job. The tree must have passed validation; what it lacks all the same is left out.
pub(crate) fn read(root: &Element) -> (Job, Findings) {
    let mut reader = Reader {
        findings: Findings::default(),
    };
    if !root.is(JSDL, "JobDefinition") {
        reader.findings.error(
            root.position,
            "not-a-job",
            format!(
                "the document is a {}, expected a jsdl:JobDefinition",
                root.display()
            ),
        );
        return (Job::default(), reader.findings);
    }
    extensions::check(root, &mut reader.findings);
    let job = reader.job(root);
    (job, reader.findings)
}

struct Reader {
    findings: Findings,
}

impl Reader {
    fn job(&mut self, root: &Element) -> Job {
        let mut job = Job {
            id: root.attribute("id").map(|id| trim(&id.value).to_owned()),
            ..Job::default()
        };
        let Some(description) = root.child(JSDL, "JobDescription") else {
            return job;
        };
        if let Some(element) = description.child(JSDL, "JobIdentification") {
            job.identification = Identification {
                name: text_of(element, JSDL, "JobName"),
                description: text_of(element, JSDL, "Description"),
                annotations: texts_of(element, JSDL, "JobAnnotation"),
                projects: texts_of(element, JSDL, "JobProject"),
            };
        }
        if let Some(element) = description.child(JSDL, "Resources") {
            job.resources = self.resources(element);
            job.instance = element
                .child(XSDL, "InstanceDefinition")
                .and_then(|definition| definition.child(XSDL, "InstanceDescription"))
                .and_then(|description| self.instance(description));
        }
        if let Some(element) = description.child(JSDL, "Application") {
            job.application = self.application(element, &job.resources);
        }
        for element in description.all(JSDL, "DataStaging") {
            let staging = self.staging(element, &job.resources);
            job.staging.extend(staging);
        }
        job
    }

    fn application(&mut self, element: &Element, resources: &Resources) -> Application {
        let kind = if let Some(posix) = element.child(POSIX, "POSIXApplication") {
            ApplicationKind::Posix(self.process(posix, POSIX, resources))
        } else if let Some(hpcp) = element.child(HPCP, "HPCProfileApplication") {
            ApplicationKind::Hpcp(self.process(hpcp, HPCP, resources))
        } else if element.child(XBE, "XBEApplication").is_some() {
            ApplicationKind::Continuous
        } else {
            ApplicationKind::None
        };
        Application {
            name: text_of(element, JSDL, "ApplicationName"),
            version: text_of(element, JSDL, "ApplicationVersion"),
            description: text_of(element, JSDL, "Description"),
            kind,
        }
    }

    fn process(&mut self, element: &Element, ns: &str, resources: &Resources) -> Process {
        let mut located = |name: &str| {
            element
                .child(ns, name)
                .map(|child| self.located(child, content(child), resources))
        };
        let executable = located("Executable").unwrap_or_default();
        let input = located("Input");
        let output = located("Output");
        let error = located("Error");
        let working_directory = located("WorkingDirectory");
        if executable.value.is_empty() {
            self.findings.error(
                element.position,
                "missing-executable",
                format!(
                    "element {} has no program to run, expected {} with its path",
                    element.display(),
                    namespace::display(ns, "Executable")
                ),
            );
        }
        let arguments = element
            .all(ns, "Argument")
            .map(|argument| {
                let value = match preserves_space(argument) {
                    true => argument.text(),
                    false => trim(&argument.text()).replace(is_space, " "),
                };
                self.located(argument, value, resources)
            })
            .collect();
        let environment = element
            .all(ns, "Environment")
            .map(|variable| EnvironmentVariable {
                name: name_of(variable, "name").unwrap_or_default(),
                value: self.located(variable, content(variable), resources),
            })
            .collect();
        Process {
            name: name_of(element, "name"),
            executable,
            arguments,
            input,
            output,
            error,
            working_directory,
            environment,
            limits: self.limits(element),
            user: text_of(element, ns, "UserName"),
            group: text_of(element, ns, "GroupName"),
        }
    }

    fn limits(&mut self, element: &Element) -> Limits {
        let mut limit = |name: &str| {
            let child = element.child(POSIX, name)?;
            let text = child.text();
            let digits = trim(&text).trim_start_matches(['+', '-']);
            let value = digits.parse().ok();
            if value.is_none() {
                self.findings.error(
                    child.position,
                    "value-too-large",
                    format!(
                        "{} is too much for {}, expected at most {}",
                        quoted(trim(&text)),
                        child.display(),
                        u64::MAX
                    ),
                );
            }
            value
        };
        Limits {
            wall_time_s: limit("WallTimeLimit"),
            file_size_bytes: limit("FileSizeLimit"),
            core_dump_bytes: limit("CoreDumpLimit"),
            data_segment_bytes: limit("DataSegmentLimit"),
            locked_memory_bytes: limit("LockedMemoryLimit"),
            memory_bytes: limit("MemoryLimit"),
            open_descriptors: limit("OpenDescriptorsLimit"),
            pipe_size_bytes: limit("PipeSizeLimit"),
            stack_size_bytes: limit("StackSizeLimit"),
            cpu_time_s: limit("CPUTimeLimit"),
            process_count: limit("ProcessCountLimit"),
            virtual_memory_bytes: limit("VirtualMemoryLimit"),
            thread_count: limit("ThreadCountLimit"),
        }
    }

    /// A value with the file system that the attribute `filesystemName` names.
    fn located(&mut self, element: &Element, value: String, resources: &Resources) -> Located {
        let file_system = name_of(element, "filesystemName");
        if let Some(name) = &file_system {
            self.known_file_system(element.position, name, resources);
        }
        Located { value, file_system }
    }

    fn known_file_system(&mut self, at: Position, name: &str, resources: &Resources) {
        if !resources.has_file_system(name) {
            self.findings.error(
                at,
                "unknown-file-system",
                format!(
                    "the file system {} is not declared, expected a jsdl:FileSystem of this name \
                     in jsdl:Resources",
                    quoted(name)
                ),
            );
        }
    }

    fn resources(&mut self, element: &Element) -> Resources {
        let mut file_systems: Vec<FileSystem> = Vec::new();
        for child in element.all(JSDL, "FileSystem") {
            let name = name_of(child, "name").unwrap_or_default();
            if file_systems.iter().any(|other| other.name == name) {
                self.findings.error(
                    child.position,
                    "duplicate-file-system",
                    format!("the file system {} is declared twice", quoted(&name)),
                );
            }
            file_systems.push(FileSystem {
                name,
                kind: text_of(child, JSDL, "FileSystemType"),
                description: text_of(child, JSDL, "Description"),
                mount_point: text_of(child, JSDL, "MountPoint"),
                disk_space: self.range(child, "DiskSpace"),
            });
        }
        let system = element.child(JSDL, "OperatingSystem");
        Resources {
            candidate_hosts: element
                .child(JSDL, "CandidateHosts")
                .map(|hosts| texts_of(hosts, JSDL, "HostName"))
                .unwrap_or_default(),
            file_systems,
            exclusive_execution: element
                .child(JSDL, "ExclusiveExecution")
                .map(|child| parse_boolean(&child.text())),
            operating_system: system
                .and_then(|system| system.child(JSDL, "OperatingSystemType"))
                .and_then(|kind| text_of(kind, JSDL, "OperatingSystemName")),
            operating_system_version: system
                .and_then(|system| text_of(system, JSDL, "OperatingSystemVersion")),
            cpu_architecture: element
                .child(JSDL, "CPUArchitecture")
                .and_then(|architecture| text_of(architecture, JSDL, "CPUArchitectureName")),
            individual_cpu_speed: self.range(element, "IndividualCPUSpeed"),
            individual_cpu_time: self.range(element, "IndividualCPUTime"),
            individual_cpu_count: self.range(element, "IndividualCPUCount"),
            individual_network_bandwidth: self.range(element, "IndividualNetworkBandwidth"),
            individual_physical_memory: self.range(element, "IndividualPhysicalMemory"),
            individual_virtual_memory: self.range(element, "IndividualVirtualMemory"),
            individual_disk_space: self.range(element, "IndividualDiskSpace"),
            total_cpu_time: self.range(element, "TotalCPUTime"),
            total_cpu_count: self.range(element, "TotalCPUCount"),
            total_physical_memory: self.range(element, "TotalPhysicalMemory"),
            total_virtual_memory: self.range(element, "TotalVirtualMemory"),
            total_disk_space: self.range(element, "TotalDiskSpace"),
            total_resource_count: self.range(element, "TotalResourceCount"),
        }
    }

    fn range(&mut self, parent: &Element, name: &str) -> Option<RangeValue> {
        let element = parent.child(JSDL, name)?;
        let range = RangeValue {
            upper_bounded: element.child(JSDL, "UpperBoundedRange").and_then(bound),
            lower_bounded: element.child(JSDL, "LowerBoundedRange").and_then(bound),
            exact: element
                .all(JSDL, "Exact")
                .filter_map(|exact| {
                    Some(Exact {
                        value: parse_double(&exact.text())?,
                        epsilon: exact
                            .attribute("epsilon")
                            .and_then(|epsilon| parse_double(&epsilon.value))
                            .unwrap_or(0.0),
                    })
                })
                .collect(),
            ranges: element
                .all(JSDL, "Range")
                .filter_map(|range| {
                    Some(Range {
                        lower: range.child(JSDL, "LowerBound").and_then(bound)?,
                        upper: range.child(JSDL, "UpperBound").and_then(bound)?,
                    })
                })
                .collect(),
        };
        if range == RangeValue::default() {
            self.findings.warning(
                element.position,
                "empty-range",
                format!(
                    "element {} says nothing and is ignored, expected a value or range in it",
                    element.display()
                ),
            );
            return None;
        }
        Some(range)
    }

    fn staging(&mut self, element: &Element, resources: &Resources) -> Option<DataStaging> {
        let path = text_of(element, JSDL, "FileName").unwrap_or_default();
        if path.is_empty() {
            self.findings.error(
                element.position,
                "missing-file-name",
                format!("element {} has an empty file name", element.display()),
            );
            return None;
        }
        let file_system = text_of(element, JSDL, "FilesystemName");
        if let Some(name) = &file_system {
            self.known_file_system(element.position, name, resources);
        }
        let creation = match text_of(element, JSDL, "CreationFlag").as_deref() {
            Some("append") => CreationFlag::Append,
            Some("dontOverwrite") => CreationFlag::DontOverwrite,
            _ => CreationFlag::Overwrite,
        };
        let source = match element.child(JSDL, "Source") {
            Some(source) => Some(self.location(source, JSDL)?),
            None => None,
        };
        let target = match element.child(JSDL, "Target") {
            Some(target) => Some(self.location(target, JSDL)?.uri),
            None => None,
        };
        Some(DataStaging {
            name: name_of(element, "name"),
            file: Located {
                value: path,
                file_system,
            },
            creation,
            delete_on_termination: element
                .child(JSDL, "DeleteOnTermination")
                .is_some_and(|child| parse_boolean(&child.text())),
            source,
            target,
        })
    }

    /// A location: of XSDL, or a source of JSDL with XSDL's hash and compression beside the URI.
    fn location(&mut self, element: &Element, uri_namespace: &str) -> Option<Location> {
        let Some(uri) = text_of(element, uri_namespace, "URI").filter(|uri| !uri.is_empty()) else {
            self.findings.error(
                element.position,
                "missing-uri",
                format!(
                    "element {} does not say where the file is, expected {}",
                    element.display(),
                    namespace::display(uri_namespace, "URI")
                ),
            );
            return None;
        };
        let hash = match element.child(XSDL, "Hash") {
            Some(hash) => Some(self.hash(hash)?),
            None => None,
        };
        Some(Location {
            uri,
            mode: text_of(element, XSDL, "Mode")
                .and_then(|mode| u32::from_str_radix(&mode, 8).ok()),
            hash,
            compression: element
                .child(XSDL, "Compression")
                .and_then(|compression| compression.attribute("algorithm"))
                .and_then(|algorithm| algorithm.value.parse::<Compression>().ok()),
        })
    }

    fn hash(&mut self, element: &Element) -> Option<Hash> {
        let algorithm: HashAlgorithm = element.attribute("algorithm")?.value.parse().ok()?;
        let digest = content(element).to_ascii_lowercase();
        if digest.len() != algorithm.digest_digits() {
            self.findings.error(
                element.position,
                "invalid-hash",
                format!(
                    "the hash has {} hexadecimal digits, expected {} for {algorithm}",
                    digest.len(),
                    algorithm.digest_digits()
                ),
            );
            return None;
        }
        Some(Hash { algorithm, digest })
    }

    fn instance(&mut self, element: &Element) -> Option<InstanceDefinition> {
        let source = if let Some(package) = element.child(XSDL, "Package") {
            InstanceSource::Package(self.inner_location(package)?)
        } else {
            let instance = element.child(XSDL, "Instance")?;
            let kernel = instance.child(XSDL, "Kernel")?;
            let image = instance.child(XSDL, "Image")?;
            let initrd = match instance.child(XSDL, "Initrd") {
                Some(initrd) => Some(self.inner_location(initrd)?),
                None => None,
            };
            InstanceSource::Instance(Box::new(Instance {
                description: text_of(instance, XSDL, "Description"),
                kernel: self.inner_location(kernel)?,
                kernel_arguments: kernel
                    .all(XSDL, "Argument")
                    .map(|argument| KernelArgument {
                        name: name_of(argument, "name"),
                        value: content(argument).replace(is_space, " "),
                    })
                    .collect(),
                initrd,
                image: self.inner_location(image)?,
                image_file_system: image.attribute("fs-type").map(|kind| kind.value.clone()),
            }))
        };
        let mut scripts = Vec::new();
        for script in element
            .child(XSDL, "Control")
            .into_iter()
            .flat_map(|control| control.all(XSDL, "Script"))
        {
            scripts.push(ControlScript {
                target: script.attribute("target")?.value.parse().ok()?,
                location: self.inner_location(script)?,
            });
        }
        Some(InstanceDefinition { source, scripts })
    }

    fn inner_location(&mut self, element: &Element) -> Option<Location> {
        self.location(element.child(XSDL, "Location")?, XSDL)
    }
}

fn bound(element: &Element) -> Option<Bound> {
    Some(Bound {
        value: parse_double(&element.text())?,
        exclusive: element
            .attribute("exclusiveBound")
            .is_some_and(|attribute| parse_boolean(&attribute.value)),
    })
}

fn preserves_space(element: &Element) -> bool {
    element
        .qualified_attribute(namespace::XML, "space")
        .is_some_and(|space| space.value == "preserve")
}

/// The text of an element, without white space at its ends unless the element wants it kept.
pub(crate) fn content(element: &Element) -> String {
    let text = element.text();
    if preserves_space(element) {
        text
    } else {
        trim(&text).to_owned()
    }
}

fn text_of(element: &Element, ns: &str, name: &str) -> Option<String> {
    element.child(ns, name).map(content)
}

fn texts_of(element: &Element, ns: &str, name: &str) -> Vec<String> {
    element
        .elements()
        .filter(|child| child.is(ns, name))
        .map(content)
        .collect()
}

/// The value of an attribute that is a name.
fn name_of(element: &Element, attribute: &str) -> Option<String> {
    element
        .attribute(attribute)
        .map(|attribute| trim(&attribute.value).to_owned())
}
