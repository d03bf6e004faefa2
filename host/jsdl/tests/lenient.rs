//! What a lenient reading forgives, and that it says so.

use xbee_jsdl::{Options, Parsed, parse, verdict, verdict_with};

const LENIENT: Options = Options { lenient: true };

/// Reads a document that only a lenient reading takes; the codes of what was forgiven.
#[track_caller]
fn forgiven(document: &str) -> (Parsed, Vec<&'static str>) {
    verdict(document.as_bytes()).expect_err("valid without forgiving");
    let parsed = parse(document.as_bytes(), &LENIENT).expect(document);
    let told = verdict_with(document.as_bytes(), &LENIENT).expect(document);
    assert_eq!(told, parsed.forgiven);
    let codes = parsed.forgiven.iter().map(|finding| finding.code).collect();
    (parsed, codes)
}

fn job(body: &str) -> String {
    format!(
        "<jsdl:JobDefinition xmlns:jsdl='http://schemas.ggf.org/jsdl/2005/11/jsdl' \
             xmlns:jsdl-posix='http://schemas.ggf.org/jsdl/2005/11/jsdl-posix'>{body}</jsdl:JobDefinition>"
    )
}

#[test]
fn a_valid_document_needs_nothing_forgiven() {
    let document = job("<jsdl:JobDescription/>");
    let parsed = parse(document.as_bytes(), &LENIENT).expect("a job");
    assert_eq!(parsed.forgiven, []);
}

#[test]
fn elements_out_of_order() {
    let (parsed, codes) = forgiven(&job("<jsdl:JobDescription>\
         <jsdl:DataStaging><jsdl:Target><jsdl:URI>ftp://h/b</jsdl:URI></jsdl:Target>\
         <jsdl:Source><jsdl:URI>ftp://h/a</jsdl:URI></jsdl:Source><jsdl:CreationFlag>append</jsdl:CreationFlag>\
         <jsdl:FileName>f</jsdl:FileName></jsdl:DataStaging>\
         <jsdl:JobIdentification><jsdl:Description>d</jsdl:Description><jsdl:JobName>n</jsdl:JobName>\
         </jsdl:JobIdentification></jsdl:JobDescription>"));
    assert_eq!(codes, ["wrong-order"; 5]);
    assert_eq!(
        parsed.forgiven[0].message,
        "element jsdl:JobIdentification stands behind jsdl:DataStaging in jsdl:JobDescription, \
         expected it before"
    );
    assert_eq!(parsed.job.identification.name.as_deref(), Some("n"));
    assert_eq!(parsed.job.staging[0].file.value, "f");
    assert_eq!(parsed.job.staging[0].target.as_deref(), Some("ftp://h/b"));
}

#[test]
fn missing_wrappers() {
    let (parsed, codes) = forgiven(&job(
        "<jsdl:JobName>n</jsdl:JobName><jsdl:Description>d</jsdl:Description>\
         <jsdl-posix:Executable>/bin/ls</jsdl-posix:Executable><jsdl-posix:Argument>-l</jsdl-posix:Argument>\
         <jsdl:OperatingSystemName>LINUX</jsdl:OperatingSystemName>\
         <jsdl:TotalCPUCount><jsdl:Exact>2</jsdl:Exact></jsdl:TotalCPUCount>",
    ));
    assert!(
        codes.iter().all(|code| *code == "missing-wrapper"),
        "{codes:?}"
    );
    let job = parsed.job;
    assert_eq!(job.identification.name.as_deref(), Some("n"));
    assert_eq!(job.identification.description.as_deref(), Some("d"));
    let process = job.application.kind.process().expect("a program");
    assert_eq!(process.executable.value, "/bin/ls");
    assert_eq!(process.arguments[0].value, "-l");
    assert_eq!(job.resources.operating_system.as_deref(), Some("LINUX"));
    assert!(job.resources.total_cpu_count.expect("CPUs").contains(2.0));
}

#[test]
fn a_wrapper_behind_what_it_should_hold() {
    let (parsed, codes) = forgiven(&job("<jsdl:JobDescription><jsdl:JobName>n</jsdl:JobName>\
         <jsdl:JobIdentification><jsdl:Description>d</jsdl:Description></jsdl:JobIdentification>\
         </jsdl:JobDescription>"));
    assert_eq!(codes, ["missing-wrapper"]);
    assert_eq!(parsed.job.identification.name.as_deref(), Some("n"));
    assert_eq!(parsed.job.identification.description.as_deref(), Some("d"));
}

#[test]
fn undeclared_customary_prefixes() {
    let (parsed, codes) = forgiven(
        "<jsdl:JobDefinition><jsdl:JobDescription><jsdl:Application><jsdl-posix:POSIXApplication>\
         <jsdl-posix:Executable>echo</jsdl-posix:Executable></jsdl-posix:POSIXApplication>\
         </jsdl:Application></jsdl:JobDescription></jsdl:JobDefinition>",
    );
    assert_eq!(codes, ["undeclared-prefix"; 2]);
    assert!(parsed.job.application.kind.process().is_some());
    let unknown = "<foo:JobDefinition/>";
    let findings = parse(unknown.as_bytes(), &LENIENT).expect_err("unknown prefix");
    assert_eq!(findings[0].code, "undeclared-prefix");
}

#[test]
fn staging_without_creation_flag() {
    let (_, codes) = forgiven(&job(
        "<jsdl:JobDescription><jsdl:DataStaging><jsdl:FileName>f</jsdl:FileName>\
         <jsdl:HandleAsArchive>false</jsdl:HandleAsArchive></jsdl:DataStaging></jsdl:JobDescription>",
    ));
    assert_eq!(codes, ["unknown-element", "missing-creation-flag"]);
}

#[test]
fn what_is_not_forgiven() {
    for body in [
        "<jsdl:JobDescription><jsdl:Bogus/></jsdl:JobDescription>",
        "<jsdl:JobDescription>text</jsdl:JobDescription>",
        "<jsdl:JobDescription><jsdl:Application/><jsdl:Application/></jsdl:JobDescription>",
        "<jsdl:JobDescription><jsdl:DataStaging><jsdl:FileName>f</jsdl:FileName>\
         <jsdl:HandleAsArchive>true</jsdl:HandleAsArchive></jsdl:DataStaging></jsdl:JobDescription>",
        "<jsdl:JobDescription><jsdl:Resources><jsdl:ExclusiveExecution>maybe</jsdl:ExclusiveExecution>\
         </jsdl:Resources></jsdl:JobDescription>",
    ] {
        parse(job(body).as_bytes(), &LENIENT).expect_err(body);
    }
}
