//! The examples of the repository are valid jobs that say what they are meant to.

use std::path::Path;

use xbee_jsdl::{
    ApplicationKind, Compression, InstanceSource, Job, Located, Options, parse, verdict,
};

fn example(name: &str) -> Job {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../examples")
        .join(name);
    let document = std::fs::read(&path).expect(name);
    verdict(&document).expect(name);
    let parsed = parse(&document, &Options::default()).expect(name);
    assert_eq!(parsed.warnings, [], "{name}");
    assert_eq!(parsed.forgiven, [], "{name}");
    parsed.job
}

fn image(job: &Job) -> &str {
    let source = &job.instance.as_ref().expect("instance").source;
    assert!(matches!(source, InstanceSource::Package(_)));
    source.image_name().expect("image name")
}

fn memory(job: &Job) -> Option<u64> {
    job.resources.individual_physical_memory.as_ref()?.choose(0)
}

/// The path of a file behind the mount point of its declared file system.
fn path(job: &Job, file: &Located) -> String {
    let mount_point = job
        .resources
        .file_systems
        .iter()
        .find(|declared| Some(&declared.name) == file.file_system.as_ref())
        .and_then(|declared| declared.mount_point.as_deref())
        .expect("a mount point");
    format!("{mount_point}/{}", file.value)
}

#[test]
fn hello_world() {
    let job = example("hello-world.xsdl");
    let process = job.application.kind.process().expect("a program");
    assert_eq!(process.executable.value, "/bin/echo");
    assert_eq!(process.arguments[0].value, "Hello World from the guest");
    assert_eq!(process.limits.wall_time_s, Some(60));
    assert_eq!(image(&job), "base");
}

#[test]
fn povray() {
    let job = example("povray.xsdl");
    assert_eq!(image(&job), "povray");
    assert_eq!(memory(&job), Some(256 << 20));
    let paths: Vec<String> = job
        .staging
        .iter()
        .map(|staging| path(&job, &staging.file))
        .collect();
    assert_eq!(paths, ["/render/scene.pov", "/render/scene.png"]);
    let source = job.staging[0].source.as_ref().expect("source");
    assert_eq!(source.uri, "ftp://127.0.0.1:2121/scene.pov");
    assert_eq!(
        job.staging[1].target.as_deref(),
        Some("ftp://127.0.0.1:2121/scene.png")
    );
}

#[test]
fn server() {
    let job = example("server.xsdl");
    assert_eq!(job.application.kind, ApplicationKind::Continuous);
    assert_eq!(image(&job), "server");
    assert_eq!(memory(&job), Some(256 << 20));
    let source = job.staging[0].source.as_ref().expect("source");
    assert_eq!(source.compression, Some(Compression::Tbz));
    assert_eq!(path(&job, &job.staging[0].file), "/var/www/html");
}
