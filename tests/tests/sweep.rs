//! Parameter sweeps: arrays of tasks, through the command line, on the simulator.
#![allow(clippy::unwrap_used)]

use std::time::{Duration, Instant};

use serde_json::Value;
use xbee_tests::{PATIENCE, Xbed, run, sim};

/// A job for each number up to `end`, which is the exit code and in the output.
fn sweep(end: u32) -> String {
    format!(
        r#"<jsdl:JobDefinition xmlns:jsdl="http://schemas.ggf.org/jsdl/2005/11/jsdl" xmlns:posix="http://schemas.ggf.org/jsdl/2005/11/jsdl-posix"
    xmlns:sweep="http://schemas.ogf.org/jsdl/2009/03/sweep" xmlns:f="http://schemas.ogf.org/jsdl/2009/03/sweep/functions">
  <jsdl:JobDescription>
    <jsdl:JobIdentification><jsdl:JobName>scan</jsdl:JobName></jsdl:JobIdentification>
    <jsdl:Application><posix:POSIXApplication>
      <posix:Executable>echo</posix:Executable><posix:Argument>N</posix:Argument>
    </posix:POSIXApplication></jsdl:Application>
  </jsdl:JobDescription>
  <sweep:Sweep><sweep:Assignment>
    <sweep:DocumentNode>
      <sweep:NamespaceBinding ns="http://schemas.ggf.org/jsdl/2005/11/jsdl" prefix="j"/>
      <sweep:NamespaceBinding ns="http://schemas.ggf.org/jsdl/2005/11/jsdl-posix" prefix="p"/>
      <sweep:Match>/j:JobDefinition/j:JobDescription/j:Application/p:POSIXApplication/p:Argument</sweep:Match>
    </sweep:DocumentNode>
    <f:LoopInteger start="1" end="{end}"/>
  </sweep:Assignment></sweep:Sweep>
</jsdl:JobDefinition>"#
    )
}

fn list(xbed: &Xbed, args: &[&str]) -> Vec<Value> {
    let words = ["ps", "--json"];
    match xbed.xbe(words.iter().chain(args)).json() {
        Value::Array(tasks) => tasks,
        other => panic!("{other}"),
    }
}

#[test]
fn a_sweep_is_one_task_until_one_looks_into_it() {
    let mut xbed = sim();
    let array = xbed.submit(&sweep(20));
    let watched = xbed.xbe(["watch", &array]);
    assert_eq!(watched.code, 0, "{watched:?}");
    let check = |xbed: &Xbed| {
        let all = list(xbed, &["-a"]);
        assert_eq!(all.len(), 1, "{all:#?}");
        assert_eq!(all[0]["id"], array.as_str());
        assert_eq!(all[0]["state"], "Finished");
        assert_eq!(all[0]["array"]["finished"], 20);
        let states: Vec<_> = all[0]["times"].as_array().unwrap().iter().collect();
        assert_eq!(states.len(), 3, "{states:?}");
        let members = list(xbed, &["-a", "--array", &array]);
        assert_eq!(members.len(), 20);
        for (member, number) in members.iter().zip(1..) {
            assert_eq!(member["member"]["number"], number);
            let name = format!("{array}.{number}");
            let said = xbed.xbe(["logs", &name]).ok().stdout;
            assert_eq!(said, format!("{number}\n"));
        }
        let lines = xbed.xbe(["ps", "-a"]).ok().stdout;
        assert_eq!(lines.lines().count(), 2, "{lines}");
        assert!(lines.contains("20 of 20 ended"), "{lines}");
        let one = xbed.xbe(["status", &format!("{}.7", &array[..8])]).ok();
        assert!(one.stdout.contains("number 7: "), "{}", one.stdout);
    };
    check(&xbed);
    xbed.kill_and_restart();
    check(&xbed);
    let error = xbed.xbe(["logs", &array]);
    assert!(error.stderr.contains("is an array"), "{error:?}");
    assert_ne!(xbed.xbe(["status", &format!("{array}.21")]).code, 0);
    xbed.xbe(["rm", &array]).ok();
    assert!(list(&xbed, &["-a"]).is_empty());
    assert_ne!(xbed.xbe(["status", &array]).code, 0);
}

#[test]
fn an_array_is_ended_as_one() {
    let xbed = Xbed::start("sim", &["domains = 2"]);
    let text = sweep(10)
        .replace("<posix:Executable>echo<", "<posix:Executable>sleep<")
        .replace("start=\"1\" end=\"10\"", "start=\"1001\" end=\"1010\"");
    let array = xbed.submit(&text);
    let begun = Instant::now();
    while xbed.status(&array)["array"]["running"] != 2 {
        assert!(begun.elapsed() < PATIENCE);
        std::thread::sleep(Duration::from_millis(20));
    }
    xbed.xbe(["terminate", &format!("{array}.10")]).ok();
    let status = xbed.status(&array);
    assert_eq!(status["array"]["terminated"], 1, "{status:#}");
    assert_eq!(status["state"], "Running");
    let early = xbed.xbe(["rm", &array]);
    assert!(early.stderr.contains("is not over"), "{early:?}");
    xbed.xbe(["terminate", &array]).ok();
    let status = xbed.wait_for(&array, "Terminated");
    assert_eq!(status["array"]["terminated"], 10, "{status:#}");
}

#[test]
fn all_of_a_sweep_is_taken_or_nothing() {
    let xbed = Xbed::start("sim", &["queue-length = 99"]);
    let job = xbed.document("sweep.xsdl", &sweep(100));
    let refused = run(xbed.xbe_command(["submit"]).arg(&job));
    assert!(refused.stderr.contains("queue is full"), "{refused:?}");
    assert!(list(&xbed, &["-a"]).is_empty());
    let wrong = sweep(3).replace("p:Argument<", "p:Nothing<");
    let job = xbed.document("wrong.xsdl", &wrong);
    let refused = run(xbed.xbe_command(["submit"]).arg(&job));
    assert_ne!(refused.code, 0);
    assert!(list(&xbed, &["-a"]).is_empty());
}

#[test]
fn a_sweep_of_a_thousand_is_one_line() {
    let xbed = Xbed::start("sim", &["domains = 1"]);
    let job = xbed.document("sweep.xsdl", &sweep(1000));
    let begun = Instant::now();
    let array = run(xbed.xbe_command(["submit"]).arg(&job)).line();
    println!("1000 jobs taken in {:?}", begun.elapsed());
    let lines = xbed.xbe(["ps"]).ok().stdout;
    assert_eq!(lines.lines().count(), 2, "{lines}");
    assert!(lines.contains("of 1000 ended"), "{lines}");
    xbed.xbe(["terminate", &array]).ok();
    xbed.wait_for(&array, "Terminated");
}
