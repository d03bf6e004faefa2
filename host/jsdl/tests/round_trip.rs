//! A written job is read as the same job.

use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use xbee_jsdl::{
    Application, ApplicationKind, Bound, Compression, ControlScript, CreationFlag, DataStaging,
    EnvironmentVariable, Exact, FileSystem, Hash, HashAlgorithm, Identification, Instance,
    InstanceDefinition, InstanceSource, Job, KernelArgument, Limits, Located, Location, Options,
    Process, Range, RangeValue, Resources, ScriptTarget, WriteError, parse, verdict, write,
};

/// Text without white space at its ends.
fn text() -> impl Strategy<Value = String> {
    "[!-~äß€😀][ -~äß\n]{0,8}[!-~äß€😀]"
}

/// Text with every white space and markup there is.
fn raw() -> impl Strategy<Value = String> {
    "[ -~\n\t\r€😀<>&\"']{0,12}"
}

fn name() -> impl Strategy<Value = String> {
    "[A-Za-z_][A-Za-z0-9._-]{0,6}"
}

fn located(value: impl Strategy<Value = String>) -> impl Strategy<Value = Located> {
    (value, option::of(Just("ROOT".to_owned())))
        .prop_map(|(value, file_system)| Located { value, file_system })
}

fn number() -> impl Strategy<Value = f64> {
    prop_oneof![
        (0_u32..1 << 31).prop_map(f64::from),
        any::<f64>().prop_filter("NaN equals nothing", |n| !n.is_nan()),
    ]
}

fn bound() -> impl Strategy<Value = Bound> {
    (number(), any::<bool>()).prop_map(|(value, exclusive)| Bound { value, exclusive })
}

fn range() -> impl Strategy<Value = RangeValue> {
    let exact = (number(), prop_oneof![Just(0.0), 0.0..10.0])
        .prop_map(|(value, epsilon)| Exact { value, epsilon });
    let both = (bound(), bound()).prop_map(|(lower, upper)| Range { lower, upper });
    (
        option::of(bound()),
        option::of(bound()),
        vec(exact, 0..3),
        vec(both, 0..3),
    )
        .prop_map(|(upper_bounded, lower_bounded, exact, ranges)| RangeValue {
            upper_bounded,
            lower_bounded,
            exact,
            ranges,
        })
        .prop_filter("an empty range is not read", |r| {
            *r != RangeValue::default()
        })
}

fn process() -> impl Strategy<Value = Process> {
    let files = (
        option::of(located(text())),
        option::of(located(text())),
        option::of(located(text())),
        option::of(located(text())),
    );
    let variable =
        (name(), located(raw())).prop_map(|(name, value)| EnvironmentVariable { name, value });
    let limits = vec(option::of(any::<u64>()), 13).prop_map(|l| Limits {
        wall_time_s: l[0],
        file_size_bytes: l[1],
        core_dump_bytes: l[2],
        data_segment_bytes: l[3],
        locked_memory_bytes: l[4],
        memory_bytes: l[5],
        open_descriptors: l[6],
        pipe_size_bytes: l[7],
        stack_size_bytes: l[8],
        cpu_time_s: l[9],
        process_count: l[10],
        virtual_memory_bytes: l[11],
        thread_count: l[12],
    });
    (
        option::of(name()),
        located(text()),
        vec(located(raw()), 0..4),
        files,
        vec(variable, 0..3),
        limits,
        option::of(text()),
        option::of(text()),
    )
        .prop_map(
            |(name, executable, arguments, files, environment, limits, user, group)| Process {
                name,
                executable,
                arguments,
                input: files.0,
                output: files.1,
                error: files.2,
                working_directory: files.3,
                environment,
                limits,
                user,
                group,
            },
        )
}

fn kind() -> impl Strategy<Value = ApplicationKind> {
    prop_oneof![
        Just(ApplicationKind::None),
        Just(ApplicationKind::Continuous),
        process().prop_map(ApplicationKind::Posix),
        (text(), vec(raw(), 0..3)).prop_map(|(executable, arguments)| {
            let plain = |value| Located {
                value,
                file_system: None,
            };
            ApplicationKind::Hpcp(Process {
                executable: plain(executable),
                arguments: arguments.into_iter().map(plain).collect(),
                ..Process::default()
            })
        }),
    ]
}

fn location() -> impl Strategy<Value = Location> {
    let hash = proptest::sample::select(HashAlgorithm::ALL).prop_flat_map(|algorithm| {
        proptest::string::string_regex(&format!("[0-9a-f]{{{}}}", algorithm.digest_digits()))
            .expect("pattern")
            .prop_map(move |digest| Hash { algorithm, digest })
    });
    (
        "(file:///|http://host:80/|image:)[a-z%/]{0,3}[a-z]",
        option::of(0_u32..0o10000),
        option::of(hash),
        option::of(proptest::sample::select(Compression::ALL)),
    )
        .prop_filter("a percent sign needs digits", |(uri, ..)| {
            !uri.contains('%')
        })
        .prop_map(|(uri, mode, hash, compression)| Location {
            uri,
            mode,
            hash,
            compression,
        })
}

fn instance() -> impl Strategy<Value = InstanceDefinition> {
    let argument = (option::of(name()), "[a-z=,0-9]{0,5}")
        .prop_map(|(name, value)| KernelArgument { name, value });
    let parts = (
        option::of(text()),
        location(),
        vec(argument, 0..3),
        option::of(location()),
        location(),
        option::of(Just("ext3".to_owned())),
    )
        .prop_map(|(description, kernel, arguments, initrd, image, kind)| {
            InstanceSource::Instance(Box::new(Instance {
                description,
                kernel,
                kernel_arguments: arguments,
                initrd,
                image,
                image_file_system: kind,
            }))
        });
    let script = (proptest::sample::select(ScriptTarget::ALL), location())
        .prop_map(|(target, location)| ControlScript { target, location });
    (
        prop_oneof![location().prop_map(InstanceSource::Package), parts],
        vec(script, 0..3),
    )
        .prop_map(|(source, scripts)| InstanceDefinition { source, scripts })
}

fn staging() -> impl Strategy<Value = DataStaging> {
    (
        option::of(name()),
        located(text()),
        prop_oneof![
            Just(CreationFlag::Overwrite),
            Just(CreationFlag::Append),
            Just(CreationFlag::DontOverwrite)
        ],
        any::<bool>(),
        option::of(location()),
        option::of("ftp://[a-z]{1,5}/[a-z]{0,5}"),
    )
        .prop_map(
            |(name, file, creation, delete_on_termination, source, target)| DataStaging {
                name,
                file,
                creation,
                delete_on_termination,
                source,
                target,
            },
        )
}

fn resources() -> impl Strategy<Value = Resources> {
    let root = (option::of(text()), option::of(text()), option::of(range())).prop_map(
        |(description, mount_point, disk_space)| FileSystem {
            name: "ROOT".to_owned(),
            kind: Some("normal".to_owned()),
            description,
            mount_point,
            disk_space,
        },
    );
    (
        vec(text(), 0..3),
        option::of(root),
        option::of(any::<bool>()),
        (option::of(Just("LINUX".to_owned())), option::of(text())),
        option::of(Just("x86_64".to_owned())),
        vec(option::of(range()), 13),
    )
        .prop_map(|(hosts, root, exclusive, system, architecture, r)| {
            let mut r = r.into_iter();
            let mut next = || r.next().flatten();
            Resources {
                candidate_hosts: hosts,
                file_systems: root.into_iter().collect(),
                exclusive_execution: exclusive,
                operating_system: system.0,
                operating_system_version: system.1,
                cpu_architecture: architecture,
                individual_cpu_speed: next(),
                individual_cpu_time: next(),
                individual_cpu_count: next(),
                individual_network_bandwidth: next(),
                individual_physical_memory: next(),
                individual_virtual_memory: next(),
                individual_disk_space: next(),
                total_cpu_time: next(),
                total_cpu_count: next(),
                total_physical_memory: next(),
                total_virtual_memory: next(),
                total_disk_space: next(),
                total_resource_count: next(),
            }
        })
}

fn job() -> impl Strategy<Value = Job> {
    let identification = (
        option::of(text()),
        option::of(text()),
        vec(text(), 0..3),
        vec(text(), 0..3),
    )
        .prop_map(
            |(name, description, annotations, projects)| Identification {
                name,
                description,
                annotations,
                projects,
            },
        );
    let application = (
        option::of(text()),
        option::of(text()),
        option::of(text()),
        kind(),
    )
        .prop_map(|(name, version, description, kind)| Application {
            name,
            version,
            description,
            kind,
        });
    (
        option::of(name()),
        identification,
        application,
        resources(),
        vec(staging(), 0..3),
        option::of(instance()),
    )
        .prop_map(
            |(id, identification, application, resources, staging, instance)| Job {
                id,
                identification,
                application,
                resources,
                staging,
                instance,
            },
        )
}

proptest! {
    #[test]
    fn a_written_job_is_read_as_the_same_job(job in job()) {
        let document = write(&job).expect("writable");
        prop_assert_eq!(verdict(document.as_bytes()), Ok(()));
        let parsed = parse(document.as_bytes(), &Options::default()).expect("readable");
        prop_assert_eq!(parsed.job, job);
        prop_assert_eq!(parsed.warnings, []);
    }
}

fn running(arguments: &[&str]) -> Job {
    let plain = |value: &str| Located {
        value: value.to_owned(),
        file_system: None,
    };
    Job {
        application: Application {
            kind: ApplicationKind::Posix(Process {
                executable: plain("/bin/sh"),
                arguments: arguments.iter().map(|argument| plain(argument)).collect(),
                ..Process::default()
            }),
            ..Application::default()
        },
        ..Job::default()
    }
}

#[test]
fn what_jsdl_cannot_say_is_refused() {
    let error = write(&running(&["a\u{1}b"])).expect_err("a control character");
    assert!(
        matches!(&error, WriteError::Invalid(finding) if finding.message.contains("U+0001")),
        "{error:?}"
    );

    let mut job = running(&[]);
    job.staging.push(DataStaging {
        file: Located {
            value: "name ".to_owned(),
            file_system: None,
        },
        ..DataStaging::default()
    });
    assert_eq!(write(&job), Err(WriteError::Lossy));
}

#[test]
fn a_script_keeps_its_lines() {
    let script = "\n  echo a\n\techo 'b  c' && exit 3\n";
    let document = write(&running(&["-c", script])).expect("writable");
    let parsed = parse(document.as_bytes(), &Options::default()).expect("readable");
    let process = parsed
        .job
        .application
        .kind
        .process()
        .expect("a program")
        .clone();
    assert_eq!(process.arguments[1].value, script);
}
