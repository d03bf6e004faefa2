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

const SWEEP: &str = r#"  <sweep:Sweep xmlns:sweep="http://schemas.ogf.org/jsdl/2009/03/sweep">
    <sweep:Assignment>
      <sweep:DocumentNode>
        <sweep:NamespaceBinding prefix="posix" ns="http://schemas.ggf.org/jsdl/2005/11/jsdl-posix"/>
        <sweep:Match>PATH</sweep:Match>
      </sweep:DocumentNode>
      <LoopInteger xmlns="http://schemas.ogf.org/jsdl/2009/03/sweep/functions" start="1" end="LAST"/>
    </sweep:Assignment>
  </sweep:Sweep>
</JobDefinition>"#;

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
    let sweep = |path: &str, last: &str| {
        let sweep = SWEEP.replace("PATH", path).replace("LAST", last);
        VALID.replace("</JobDefinition>", &sweep)
    };
    session.write("sweep.jsdl", &sweep("//posix:Executable", "1000"));
    session.write("sweep-match.jsdl", &sweep("//posix:Executable/..", "1000"));
    session.write("sweep-large.jsdl", &sweep("//posix:Executable", "100000"));
    let limit = "</posix:Executable><posix:WallTimeLimit>1</posix:WallTimeLimit>";
    let bad_job = sweep("//posix:WallTimeLimit", "3")
        .replace("</posix:Executable>", limit)
        .replace("start=\"1\"", "start=\"-1\"");
    session.write("sweep-job.jsdl", &bad_job);
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
        "sweep-match",
        "sweep-large",
        "sweep-job",
        "hostile",
    ] {
        session.run(&["check", &format!("{name}.jsdl")]);
    }
    session.run(&["check", "--lenient", "order.jsdl", "element.jsdl"]);
    session.run(&["check", "--json", "valid.jsdl", "element.jsdl"]);
    session.run(&["check", "--json", "sweep.jsdl"]);
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
