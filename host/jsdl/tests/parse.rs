//! What a document means: the typed job, and what keeps it from being one.

use xbee_jsdl::{
    ApplicationKind, Bound, Compression, CreationFlag, Diagnostic, HashAlgorithm, InstanceSource,
    Located, Options, Parsed, ScriptTarget, parse,
};

const NAMESPACES: &str = "xmlns='http://schemas.ggf.org/jsdl/2005/11/jsdl' \
     xmlns:p='http://schemas.ggf.org/jsdl/2005/11/jsdl-posix' \
     xmlns:h='http://schemas.ggf.org/jsdl/2006/07/jsdl-hpcpa' \
     xmlns:spmd='http://schemas.ogf.org/jsdl/2007/02/jsdl-spmd' \
     xmlns:sweep='http://schemas.ogf.org/jsdl/2009/03/sweep' \
     xmlns:x='http://www.example.com/schemas/xbe/2007/01/xsdl' \
     xmlns:xbe='http://www.example.com/schemas/xbe/2007/01/xbe' xmlns:f='urn:foreign'";

fn document(body: &str) -> String {
    format!("<JobDefinition {NAMESPACES}><JobDescription>{body}</JobDescription></JobDefinition>")
}

fn read(document: &str) -> Result<Parsed, Vec<Diagnostic>> {
    parse(document.as_bytes(), &Options::default())
}

#[track_caller]
fn parsed(body: &str) -> Parsed {
    read(&document(body)).expect("a job")
}

#[track_caller]
fn error_codes(body: &str) -> Vec<&'static str> {
    let findings = read(&document(body)).expect_err("no job");
    findings.iter().map(|finding| finding.code).collect()
}

fn warning_codes(body: &str) -> Vec<&'static str> {
    parsed(body)
        .warnings
        .iter()
        .map(|finding| finding.code)
        .collect()
}

fn located(value: &str, file_system: Option<&str>) -> Located {
    Located {
        value: value.to_owned(),
        file_system: file_system.map(str::to_owned),
    }
}

fn application(body: &str) -> String {
    format!("<Application><p:POSIXApplication>{body}</p:POSIXApplication></Application>")
}

fn instance(body: &str) -> String {
    format!(
        "<Resources><x:InstanceDefinition><x:InstanceDescription>{body}\
         </x:InstanceDescription></x:InstanceDefinition></Resources>"
    )
}

#[test]
fn a_program_with_all_its_surroundings() {
    let job = parsed(
        "<JobIdentification><JobName> n </JobName><JobAnnotation>a</JobAnnotation>\
         <JobAnnotation>b</JobAnnotation><JobProject>p</JobProject></JobIdentification>\
         <Application><ApplicationName>app</ApplicationName><ApplicationVersion>1.2</ApplicationVersion>\
         <p:POSIXApplication name='main'>\
         <p:Executable filesystemName='ROOT'>\n  bin/sh\n</p:Executable>\
         <p:Argument>\n -c  x\ty \n</p:Argument><p:Argument xml:space='preserve'> \n</p:Argument><p:Argument/>\
         <p:Input>in</p:Input><p:Output filesystemName='TMP'>out</p:Output><p:Error>err</p:Error>\
         <p:WorkingDirectory>/w</p:WorkingDirectory>\
         <p:Environment name='A'>\n1\n</p:Environment><p:Environment name='HOME' filesystemName='ROOT'/>\
         <p:WallTimeLimit>10</p:WallTimeLimit><p:FileSizeLimit>1</p:FileSizeLimit>\
         <p:CoreDumpLimit>2</p:CoreDumpLimit><p:DataSegmentLimit>3</p:DataSegmentLimit>\
         <p:LockedMemoryLimit>4</p:LockedMemoryLimit><p:MemoryLimit>5</p:MemoryLimit>\
         <p:OpenDescriptorsLimit>6</p:OpenDescriptorsLimit><p:PipeSizeLimit>7</p:PipeSizeLimit>\
         <p:StackSizeLimit>8</p:StackSizeLimit><p:CPUTimeLimit>9</p:CPUTimeLimit>\
         <p:ProcessCountLimit>+10</p:ProcessCountLimit><p:VirtualMemoryLimit>11</p:VirtualMemoryLimit>\
         <p:ThreadCountLimit> 12 </p:ThreadCountLimit><p:UserName>u</p:UserName><p:GroupName>g</p:GroupName>\
         </p:POSIXApplication></Application>",
    )
    .job;
    assert_eq!(job.identification.name.as_deref(), Some("n"));
    assert_eq!(job.identification.annotations, ["a", "b"]);
    assert_eq!(job.identification.projects, ["p"]);
    assert_eq!(job.application.name.as_deref(), Some("app"));
    assert_eq!(job.application.version.as_deref(), Some("1.2"));
    let process = job.application.kind.process().expect("a program");
    assert_eq!(process.name.as_deref(), Some("main"));
    assert_eq!(process.executable, located("bin/sh", Some("ROOT")));
    assert_eq!(
        process.arguments,
        [
            located("-c  x y", None),
            located(" \n", None),
            located("", None)
        ]
    );
    assert_eq!(process.input, Some(located("in", None)));
    assert_eq!(process.output, Some(located("out", Some("TMP"))));
    assert_eq!(process.error, Some(located("err", None)));
    assert_eq!(process.working_directory, Some(located("/w", None)));
    assert_eq!(process.environment[0].name, "A");
    assert_eq!(process.environment[0].value, located("1", None));
    assert_eq!(process.environment[1].value, located("", Some("ROOT")));
    let limits = process.limits;
    let in_order = [
        limits.file_size_bytes,
        limits.core_dump_bytes,
        limits.data_segment_bytes,
        limits.locked_memory_bytes,
        limits.memory_bytes,
        limits.open_descriptors,
        limits.pipe_size_bytes,
        limits.stack_size_bytes,
        limits.cpu_time_s,
        limits.process_count,
        limits.virtual_memory_bytes,
        limits.thread_count,
    ];
    assert_eq!(limits.wall_time_s, Some(10));
    for (expected, limit) in (1..).zip(in_order) {
        assert_eq!(limit, Some(expected));
    }
    assert_eq!(process.user.as_deref(), Some("u"));
    assert_eq!(process.group.as_deref(), Some("g"));
}

/// Line ends are normalised (XML 1.0, 2.11), those written as references are not.
#[test]
fn line_ends() {
    let job = parsed(&application(
        "<p:Executable>a</p:Executable><p:Environment name='A'>a\r\nb\rc&#13;d</p:Environment>",
    ))
    .job;
    let process = job.application.kind.process().expect("a program");
    assert_eq!(process.environment[0].value.value, "a\nb\nc\rd");
}

#[test]
fn kinds_of_application() {
    let kind = |body: &str| parsed(body).job.application.kind;
    assert_eq!(kind(""), ApplicationKind::None);
    assert_eq!(kind("<Application/>"), ApplicationKind::None);
    let continuous =
        "<Application><xbe:XBEApplication><xbe:ContinuousTask/></xbe:XBEApplication></Application>";
    assert_eq!(kind(continuous), ApplicationKind::Continuous);
    let hpcp = kind(
        "<Application><h:HPCProfileApplication><h:Executable>/bin/ls</h:Executable>\
         <h:Argument>-l</h:Argument></h:HPCProfileApplication></Application>",
    );
    let ApplicationKind::Hpcp(process) = &hpcp else {
        panic!("{hpcp:?}");
    };
    assert_eq!(process.executable, located("/bin/ls", None));
    assert_eq!(process.arguments, [located("-l", None)]);
}

#[test]
fn what_is_not_supported_is_named() {
    let cases = [
        (
            "<Application><spmd:SPMDApplication/></Application>",
            "unsupported-application",
        ),
        (
            "<Application><f:Other/></Application>",
            "unsupported-application",
        ),
        ("<sweep:Sweep/>", "unsupported-sweep"),
        (&application(""), "missing-executable"),
        (
            &application("<p:Executable> </p:Executable>"),
            "missing-executable",
        ),
        (
            "<Application><p:POSIXApplication><p:Executable>a</p:Executable></p:POSIXApplication>\
             <xbe:XBEApplication><xbe:ContinuousTask/></xbe:XBEApplication></Application>",
            "repeated-element",
        ),
        (
            &application("<p:Executable filesystemName='NOPE'>a</p:Executable>"),
            "unknown-file-system",
        ),
        (
            "<Resources><FileSystem name='A'/><FileSystem name='A'/></Resources>",
            "duplicate-file-system",
        ),
        (
            &application(
                "<p:Executable>a</p:Executable><p:WallTimeLimit>99999999999999999999</p:WallTimeLimit>",
            ),
            "value-too-large",
        ),
        (
            "<DataStaging><FileName/><CreationFlag>append</CreationFlag></DataStaging>",
            "missing-file-name",
        ),
        (
            "<DataStaging><FileName>a</FileName><CreationFlag>append</CreationFlag><Source/></DataStaging>",
            "missing-uri",
        ),
        (
            "<DataStaging><FileName>a</FileName><CreationFlag>append</CreationFlag><Source><URI>b</URI>\
             <x:Hash algorithm='md5'>00</x:Hash></Source></DataStaging>",
            "invalid-hash",
        ),
        (
            "<DataStaging><FileName>a</FileName><CreationFlag>append</CreationFlag><Source><URI>b</URI>\
             <x:Hash algorithm='crc'>00</x:Hash></Source></DataStaging>",
            "invalid-attribute",
        ),
        (&instance("<x:Package/>"), "missing-element"),
        (
            &instance("<x:Package><x:Location><x:Mode>0888</x:Mode></x:Location></x:Package>"),
            "invalid-value",
        ),
        (
            &instance("<x:Package><x:Location/></x:Package>"),
            "missing-uri",
        ),
    ];
    for (body, code) in cases {
        assert_eq!(error_codes(body), [code], "{body}");
    }
    let root = format!("<Application {NAMESPACES}/>");
    assert_eq!(read(&root).expect_err("no job")[0].code, "not-a-job");
}

#[test]
fn what_is_ignored_is_named() {
    let cases = [
        ("<f:x/>", "unsupported-extension"),
        ("<Resources><f:x/></Resources>", "unsupported-extension"),
        // Understood elsewhere, but not here.
        (
            "<x:InstanceDefinition><x:InstanceDescription><x:Package><x:Location/></x:Package>\
          </x:InstanceDescription></x:InstanceDefinition>",
            "unsupported-extension",
        ),
        ("<Resources f:a='1'/>", "unsupported-attribute"),
        ("<Resources><TotalCPUCount/></Resources>", "empty-range"),
    ];
    for (body, code) in cases {
        assert_eq!(warning_codes(body), [code], "{body}");
    }
    assert_eq!(warning_codes("<Resources xml:lang='en'/>"), [""; 0]);
}

#[test]
fn resources() {
    let resources = parsed(
        "<Resources><CandidateHosts><HostName>a</HostName><HostName>b</HostName></CandidateHosts>\
         <FileSystem name='WORK'><FileSystemType>spool</FileSystemType><MountPoint>/data/</MountPoint>\
         <DiskSpace><LowerBoundedRange>10</LowerBoundedRange></DiskSpace></FileSystem>\
         <FileSystem name='DATA'/>\
         <ExclusiveExecution>1</ExclusiveExecution><OperatingSystem><OperatingSystemType>\
         <OperatingSystemName>LINUX</OperatingSystemName></OperatingSystemType>\
         <OperatingSystemVersion>6.1</OperatingSystemVersion></OperatingSystem>\
         <CPUArchitecture><CPUArchitectureName>x86_64</CPUArchitectureName></CPUArchitecture>\
         <IndividualPhysicalMemory><UpperBoundedRange exclusiveBound='true'>8e9</UpperBoundedRange>\
         <Exact epsilon='0.5'>2</Exact><Range><LowerBound>3</LowerBound><UpperBound>4</UpperBound></Range>\
         </IndividualPhysicalMemory><TotalCPUCount><Exact>2.0</Exact></TotalCPUCount></Resources>",
    )
    .job
    .resources;
    assert_eq!(resources.candidate_hosts, ["a", "b"]);
    assert_eq!(resources.file_systems[0].kind.as_deref(), Some("spool"));
    assert_eq!(
        resources.file_systems[0].mount_point.as_deref(),
        Some("/data/")
    );
    let space = resources.file_systems[0].disk_space.as_ref();
    assert_eq!(space.expect("disk space").choose(0), Some(10));
    assert_eq!(resources.file_systems[1].name, "DATA");
    assert_eq!(resources.exclusive_execution, Some(true));
    assert_eq!(resources.operating_system.as_deref(), Some("LINUX"));
    assert_eq!(resources.operating_system_version.as_deref(), Some("6.1"));
    assert_eq!(resources.cpu_architecture.as_deref(), Some("x86_64"));
    let memory = resources
        .individual_physical_memory
        .as_ref()
        .expect("memory");
    assert_eq!(
        memory.upper_bounded,
        Some(Bound {
            value: 8e9,
            exclusive: true
        })
    );
    assert_eq!(memory.exact[0].epsilon, 0.5);
    assert_eq!(memory.ranges[0].upper.value, 4.0);
    assert_eq!(
        resources.total_cpu_count.as_ref().expect("CPUs").choose(1),
        Some(2)
    );
}

#[test]
fn staging() {
    let job = parsed(
        "<DataStaging name='one'><FileName> a </FileName><FilesystemName>TMP</FilesystemName>\
         <CreationFlag>dontOverwrite</CreationFlag><DeleteOnTermination>true</DeleteOnTermination>\
         <Source><URI>\n http://h/a.tgz \n</URI><x:Hash algorithm='sha1'>\
         DA39A3EE5E6B4B0D3255BFEF95601890AFD80709</x:Hash><x:Compression algorithm='tgz'/>\
         <x:Mode>0755</x:Mode></Source><Target><URI>ftp://h/b</URI></Target></DataStaging>\
         <DataStaging><FileName>b</FileName><CreationFlag>append</CreationFlag></DataStaging>",
    )
    .job;
    let [one, two] = job.staging.as_slice() else {
        panic!("{:?}", job.staging);
    };
    assert_eq!(one.name.as_deref(), Some("one"));
    assert_eq!(one.file, located("a", Some("TMP")));
    assert_eq!(one.creation, CreationFlag::DontOverwrite);
    assert!(one.delete_on_termination);
    assert_eq!(one.target.as_deref(), Some("ftp://h/b"));
    let source = one.source.as_ref().expect("source");
    assert_eq!(source.uri, "http://h/a.tgz");
    assert_eq!(source.mode, Some(0o755));
    assert_eq!(source.compression, Some(Compression::Tgz));
    let hash = source.hash.as_ref().expect("hash");
    assert_eq!(hash.algorithm, HashAlgorithm::Sha1);
    assert_eq!(hash.digest, "da39a3ee5e6b4b0d3255bfef95601890afd80709");
    assert_eq!(two.creation, CreationFlag::Append);
    assert!(!two.delete_on_termination && two.source.is_none() && two.target.is_none());
}

#[test]
fn instances_in_all_namespaces() {
    let body = instance(
        "<x:Instance><x:Description>d</x:Description><x:Kernel><x:Location><x:URI>file:///k</x:URI>\
         </x:Location><x:Argument name='root'>/dev/vda</x:Argument><x:Argument>quiet</x:Argument></x:Kernel>\
         <x:Initrd><x:Location><x:URI>file:///i</x:URI></x:Location></x:Initrd>\
         <x:Image fs-type='ext3'><x:Location><x:URI>file:///r</x:URI>\
         <x:Compression algorithm='zstd'/></x:Location></x:Image></x:Instance>\
         <x:Control><x:Script target='pre-setup'><x:Location><x:URI>file:///s</x:URI></x:Location></x:Script>\
         </x:Control>",
    );
    for namespace in [
        "http://www.example.com/schemas/xbe/2007/01/xsdl",
        "http://xenbee.berlios.de/schemas/xsdl/2007/01/xsdl",
    ] {
        let document =
            document(&body).replace("http://www.example.com/schemas/xbe/2007/01/xsdl", namespace);
        let job = read(&document).expect("a job").job;
        let definition = job.instance.expect("an instance");
        assert_eq!(definition.scripts[0].target, ScriptTarget::PreSetup);
        assert_eq!(definition.scripts[0].location.uri, "file:///s");
        assert_eq!(definition.source.image_name(), None);
        let InstanceSource::Instance(parts) = definition.source else {
            panic!("a package");
        };
        assert_eq!(parts.kernel.uri, "file:///k");
        let arguments: Vec<String> = parts
            .kernel_arguments
            .iter()
            .map(ToString::to_string)
            .collect();
        assert_eq!(arguments, ["root=/dev/vda", "quiet"]);
        assert_eq!(parts.initrd.expect("initrd").uri, "file:///i");
        assert_eq!(parts.image.uri, "file:///r");
        assert_eq!(parts.image_file_system.as_deref(), Some("ext3"));
    }
}
