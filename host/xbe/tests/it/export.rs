//! `export`.

use crate::harness::Session;
use crate::server::Server;

#[test]
fn export() {
    let mut session = Session::new();
    session.write("job.xsdl", "one\ntwo\n");
    session.write("1111", "a file, but named like a task\n");
    session.run(&["export", "--xl", "job.xsdl"]);
    let _server = Server::start(&session.socket());
    session.run(&["export", "--xl", "job.xsdl"]);
    session.run(&["export", "--libvirt", "--lenient", "./1111"]);
    session.run_with(&["export", "--xl", "-"], b"one line\n");
    session.run(&["export", "--xl", "1111"]);
    session.run(&["export", "--libvirt", "1111"]);
    session.run(&["export", "--xl", "2222"]);
    session.run(&["export", "--xl", "missing.xsdl"]);
    session.run(&["export", "--xl", "no id"]);
    session.expect("export");
}
