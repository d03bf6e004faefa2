//! `check`.

use crate::harness::Session;
use crate::server::Server;

const VALID: &str = r#"<?xml version="1.0" encoding="UTF-8"?>
<JobDefinition xmlns="http://schemas.ggf.org/jsdl/2005/11/jsdl"
    xmlns:posix="http://schemas.ggf.org/jsdl/2005/11/jsdl-posix">
  <JobDescription>
    <Application>
      <posix:POSIXApplication>
        <posix:Executable>/bin/true</posix:Executable>
      </posix:POSIXApplication>
    </Application>
  </JobDescription>
</JobDefinition>
"#;

fn documents(session: &Session) {
    session.write("valid.jsdl", VALID);
    session.write("huge.jsdl", &VALID.replace("/bin/true", "/bin/huge"));
    session.write("cut.jsdl", &VALID[..300]);
    session.write("empty.jsdl", "");
    session.write(
        "element.jsdl",
        &VALID.replace("posix:Executable", "posix:Executeable"),
    );
    let order = VALID.replace(
        "</posix:Executable>",
        "</posix:Executable><posix:Output>o</posix:Output><posix:Argument>a</posix:Argument>",
    );
    session.write("order.jsdl", &order);
    let resources = "</Application><Resources><OperatingSystem><OperatingSystemType>\
        <OperatingSystemName>WINNT</OperatingSystemName></OperatingSystemType>\
        </OperatingSystem></Resources>";
    let extension = VALID.replace(
        "</JobDescription>",
        "<x:y xmlns:x=\"urn:x\"/></JobDescription>",
    );
    session.write("extension.jsdl", &extension);
    let sweep = "<Sweep xmlns=\"http://schemas.ogf.org/jsdl/2009/03/sweep\"/></JobDefinition>";
    session.write("sweep.jsdl", &VALID.replace("</JobDefinition>", sweep));
    session.write("windows.jsdl", &VALID.replace("</Application>", resources));
    session.write(
        "hostile.jsdl",
        &VALID.replace("/bin/true</", "/bin/true\u{9b}2J</posix:\u{9b}"),
    );
}

#[test]
fn check() {
    let mut session = Session::new();
    documents(&session);
    session.run(&["check", "valid.jsdl"]);
    for name in [
        "cut",
        "empty",
        "element",
        "order",
        "windows",
        "extension",
        "sweep",
        "hostile",
    ] {
        session.run(&["check", &format!("{name}.jsdl")]);
    }
    session.run(&["check", "--lenient", "order.jsdl", "element.jsdl"]);
    session.run(&["check", "--json", "valid.jsdl", "element.jsdl"]);
    session.run_with(&["check", "-"], VALID.as_bytes());
    session.run(&["check", "valid.jsdl", "missing.jsdl"]);
    session.expect("check");
}

#[test]
fn check_with_the_host() {
    let mut session = Session::new();
    documents(&session);
    session.run(&["check", "--host", "valid.jsdl"]);
    let _server = Server::start(&session.socket());
    session.run(&["check", "--host", "valid.jsdl", "huge.jsdl"]);
    session.run(&["check", "--host", "huge.jsdl", "element.jsdl"]);
    session.run(&["check", "--host", "--json", "huge.jsdl"]);
    session.expect("check_with_the_host");
}
