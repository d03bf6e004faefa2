//! Several `xbed` that share the tasks of one queue.
#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::Value;
use xbee_tests::site::{Process, Site, activemq, document, one_file, plain_broker, rabbitmq};
use xbee_tests::{PATIENCE, Ran, Xbed};

/// A broker and users, for members to come.
struct Pool {
    site: Site,
    uri: String,
    _broker: Process,
}

impl Pool {
    fn new() -> Pool {
        let pool = Pool::through(|site| {
            let (broker, port, _) = plain_broker(site);
            Some((broker, format!("stomp://127.0.0.1:{port}")))
        });
        pool.unwrap()
    }

    /// With another broker, if it is there.
    fn through(broker: impl Fn(&Site) -> Option<(Process, String)>) -> Option<Pool> {
        let site = Site::new(&["alice", "bob"]);
        site.pki(["issue", "--daemon", "pool1"]);
        let (broker, address) = broker(&site)?;
        Some(Pool {
            site,
            uri: format!("{address}/pool1"),
            _broker: broker,
        })
    }

    fn config(&self, lines: &[&str]) -> Vec<String> {
        let mut config: Vec<String> = lines.iter().map(|line| (*line).to_owned()).collect();
        config.extend(self.site.table("pool", "pool1", &self.uri));
        config
    }

    /// A member that has come up and is in the pool.
    fn member(&self, lines: &[&str]) -> Xbed {
        let member = self.start("sim", lines, &[]);
        wait_until("it is in the pool", || is_member(&member));
        member
    }

    fn start(&self, backend: &'static str, lines: &[&str], environment: &[(&str, String)]) -> Xbed {
        let config = self.config(lines);
        let config: Vec<&str> = config.iter().map(String::as_str).collect();
        Xbed::start_with(backend, &config, environment)
    }

    fn alice(&self, args: &[&str]) -> Ran {
        self.site.xbe("alice", &self.uri, args.iter().copied())
    }

    fn submit(&self, command: &[&str]) -> String {
        let document = document(&self.site, "job.xsdl", command);
        self.alice(&["submit", &document]).line()
    }
}

fn is_member(xbed: &Xbed) -> bool {
    let log = xbed.log();
    log.contains("a member of the pool") && log.contains("listening on")
}

#[track_caller]
fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < PATIENCE, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// The tasks that a member has, by its own word, with their states.
fn tasks(member: &Xbed) -> Vec<(String, String)> {
    let all = member.xbe(["ps", "-a", "--json"]).json();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let all = all.as_array().unwrap().iter();
    all.map(|task| (text(&task["id"]), text(&task["state"])))
        .collect()
}

/// Waits until all of these have finished, each on one of the members; says on how many of each.
#[track_caller]
fn each_once(wanted: &[String], members: &[&Xbed]) -> Vec<usize> {
    let begun = Instant::now();
    loop {
        let lists: Vec<_> = members.iter().map(|member| tasks(member)).collect();
        let mut seen: HashMap<&str, usize> = HashMap::new();
        for (id, _) in lists.iter().flatten() {
            *seen.entry(id).or_default() += 1;
        }
        let twice: Vec<_> = seen.iter().filter(|(_, count)| **count > 1).collect();
        assert!(twice.is_empty(), "more than once: {twice:?}");
        let finished = lists
            .iter()
            .flatten()
            .filter(|(_, state)| state == "Finished");
        if finished.count() == wanted.len() {
            assert!(wanted.iter().all(|id| seen.contains_key(id.as_str())));
            return lists.iter().map(Vec::len).collect();
        }
        if begun.elapsed() > PATIENCE {
            for member in members {
                eprintln!("{}", member.log());
            }
            panic!("not all finish: {lists:?}");
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn what_one_host_does_the_pool_does() {
    let pool = Pool::new();
    let (one, two) = (pool.member(&[]), pool.member(&[]));
    let ran = pool.alice(&["run", "--", "/bin/echo", "hello"]);
    assert_eq!((ran.code, ran.stdout.as_str()), (0, "hello\n"), "{ran:?}");
    let fails = document(&pool.site, "fails.xsdl", &["/bin/sh", "-c", "exit 3"]);
    assert_eq!(pool.alice(&["submit", "--wait", &fails]).code, 3);
    // The result is kept by whichever has the task, and fetched from there.
    let (source, result) = (one_file("content"), pool.site.path("result"));
    let (source, target) = (format!("{source}:/in"), format!("/in:{}", result.display()));
    pool.alice(&["run", "-v", &source, "-o", &target, "--", "true"])
        .ok();
    assert_eq!(std::fs::read_to_string(result).unwrap(), "content");
    // One on each, if they take turns; found wherever they are.
    let sleepers = [0; 2].map(|_| pool.submit(&["/bin/sleep", "1000"]));
    let executes = |task: &str| {
        let status = pool.alice(&["status", "--json", task]);
        status.code == 0 && status.json()["substate"] == "Executing"
    };
    for task in &sleepers {
        wait_until("it executes", || executes(task));
    }
    let listed = pool.alice(&["ps", "--json"]).json();
    let ids: Vec<&str> = listed
        .as_array()
        .unwrap()
        .iter()
        .map(|task| task["id"].as_str().unwrap())
        .collect();
    assert_eq!(ids.len(), 2, "{listed}");
    assert!(sleepers.iter().all(|task| ids.contains(&task.as_str())));
    for task in &sleepers {
        let mut exec =
            pool.site
                .command("alice", &pool.uri, ["exec", task, "--", "/bin/echo", "in"]);
        let exec = exec.stdin(Stdio::null()).output().unwrap();
        assert_eq!(exec.stdout, b"in\n", "{exec:?}");
        // By the beginning of its id, too.
        let console = pool.alice(&["logs", "--console", &task[..8]]).ok().stdout;
        assert_ne!(console, "");
        // Nobody else has it.
        let ran = pool.site.xbe("bob", &pool.uri, ["status", "--json", task]);
        assert!(
            ran.code == 125 && ran.stderr.contains("task-not-found"),
            "{ran:?}"
        );
        pool.alice(&["terminate", task]).ok();
        wait_until("it has ended", || {
            pool.alice(&["status", "--json", task]).json()["state"] == "Terminated"
        });
        pool.alice(&["rm", task]).ok();
        let ran = pool.alice(&["status", task]);
        assert!(
            ran.code == 125 && ran.stderr.contains("it may still wait there"),
            "{ran:?}"
        );
    }
    assert_eq!(tasks(&one).len() + tasks(&two).len(), 3);

    // What is of a host is not for a pool.
    let ran = pool.alice(&["reserve", "--for", "1h"]);
    assert!(
        ran.code == 125 && ran.stderr.contains("name the queue of that host"),
        "{ran:?}"
    );
    let file = format!("{}:/in", pool.site.path("pki/ca.pem").display());
    let ran = pool.alice(&["run", "-v", &file, "--", "/bin/cat", "/in"]);
    assert!(
        ran.code == 125 && ran.stderr.contains("a file is sent to one host"),
        "{ran:?}"
    );
}

#[test]
fn two_hosts_share_forty_tasks() {
    share(&Pool::new());
}

#[test]
fn two_hosts_share_forty_tasks_through_rabbitmq() {
    if let Some(pool) = Pool::through(rabbitmq) {
        share(&pool);
    }
}

#[test]
fn two_hosts_share_forty_tasks_through_activemq() {
    if let Some(pool) = Pool::through(activemq) {
        share(&pool);
    }
}

fn share(pool: &Pool) {
    let members = [0; 2].map(|_| pool.member(&["domains = 3"]));
    let submitted: Vec<String> = std::thread::scope(|scope| {
        let users: Vec<_> = (0..4)
            .map(|user| {
                scope.spawn(move || {
                    let name = format!("{user}.xsdl");
                    let job = document(&pool.site, &name, &["/bin/sleep", "0.5"]);
                    let submit = || pool.alice(&["submit", &job]).line();
                    (0..10).map(|_| submit()).collect::<Vec<_>>()
                })
            })
            .collect();
        users
            .into_iter()
            .flat_map(|user| user.join().unwrap())
            .collect()
    });
    let shares = each_once(&submitted, &[&members[0], &members[1]]);
    assert!(shares.iter().all(|share| *share >= 8), "{shares:?}");
}

#[test]
fn a_host_that_is_killed_gives_back_what_it_has_not_begun() {
    let pool = Pool::new();
    let mut one = pool.member(&["domains = 2"]);
    let two = pool.member(&["domains = 2"]);
    let submitted: Vec<String> = (0..10).map(|_| pool.submit(&["/bin/sleep", "4"])).collect();
    wait_until("both work", || {
        tasks(&one).len() >= 2 && tasks(&two).len() >= 2
    });
    let begun = tasks(&one).len();
    one.kill();
    // The other one does all that is not on the dead one, and cannot do that.
    let done = || {
        let tasks = tasks(&two);
        tasks
            .iter()
            .filter(|(_, state)| state == "Finished")
            .count()
    };
    // It may just have taken one more.
    wait_until("the other has done the rest", || {
        done() + begun + 1 >= submitted.len()
    });
    one.restart(&[]);
    assert!(one.came_up(), "{}", one.log());
    let mut all = vec![];
    wait_until("all are over", || {
        let of_two = tasks(&two);
        assert!(of_two.iter().all(|(_, state)| state != "Failed"));
        // Simulated guests end with their host, and are not executed again.
        let of_one = tasks(&one);
        all = of_one.into_iter().chain(of_two).collect();
        let is_over = |state: &str| state == "Finished" || state == "Failed";
        all.len() >= submitted.len() && all.iter().all(|(_, state)| is_over(state))
    });
    let mut ids: Vec<_> = all.into_iter().map(|(id, _)| id).collect();
    let mut wanted = submitted;
    ids.sort();
    wanted.sort();
    assert_eq!(ids, wanted);
}

#[test]
fn a_host_is_killed_at_each_step_of_taking_a_task() {
    for point in [
        "pool take",
        "pool pass",
        "pool passed",
        "pool taken",
        "accept",
        "accepted",
        "pool acknowledge",
        "pool acknowledged",
    ] {
        let pool = Pool::new();
        // It takes part and has no room.
        let front = pool.member(&["domains = 0"]);
        let die = [("XBED_DIE_AT", point.to_owned())];
        let mut one = pool.start("sim", &[], &die);
        wait_until("it is in the pool", || is_member(&one));
        let task = pool.submit(&["/bin/sleep", "0.2"]);
        wait_until("it has died", || one.has_ended());
        let two = pool.member(&[]);
        one.restart(&[]);
        assert!(one.came_up(), "{point}: {}", one.log());
        let shares = each_once(&[task], &[&one, &two, &front]);
        // What was not taken yet is for whoever is there; what was, is its own.
        if [
            "accept",
            "accepted",
            "pool acknowledge",
            "pool acknowledged",
        ]
        .contains(&point)
        {
            assert_eq!(shares, [1, 0, 0], "{point}");
        }
        println!("{point}: {shares:?}");
    }
}

#[test]
fn a_host_is_killed_while_a_task_is_submitted() {
    for (point, is_there) in [("pool offer", false), ("pool offered", true)] {
        let pool = Pool::new();
        let die = [("XBED_DIE_AT", point.to_owned())];
        let one = pool.start("sim", &["domains = 0"], &die);
        wait_until("it is in the pool", || is_member(&one));
        let job = document(&pool.site, "job.xsdl", &["/bin/true"]);
        let mut submit = pool.site.command("alice", &pool.uri, ["submit", &job]);
        // Its client would wait for it.
        let mut submit = submit.stderr(Stdio::null()).spawn().unwrap();
        let mut one = one;
        wait_until("it has died", || one.has_ended());
        let two = pool.member(&[]);
        let seen = || !tasks(&two).is_empty();
        match is_there {
            true => wait_until("the task is there", seen),
            false => {
                // One that is submitted after it would come after it.
                let task = pool.submit(&["/bin/true"]);
                each_once(&[task], &[&two]);
            }
        }
        submit.kill().unwrap();
        submit.wait().unwrap();
    }
}

#[test]
fn a_task_runs_where_it_can_and_fails_where_nobody_could() {
    let pool = Pool::new();
    let small = pool.member(&["vcpus = 2"]);
    let run = |cpus: &str| pool.alice(&["run", "--cpus", cpus, "--", "/bin/echo", "done"]);
    // Too large for all who are there: said at once, and nothing is left in the queue.
    let ran = run("4");
    assert!(
        ran.code == 125 && ran.stderr.contains("at most 2"),
        "{ran:?}"
    );
    let mut large = pool.member(&["vcpus = 4", "domains = 1"]);
    let ran = run("4");
    assert_eq!((ran.code, ran.stdout.as_str()), (0, "done\n"), "{ran:?}");
    assert_eq!((tasks(&small).len(), tasks(&large).len()), (0, 1));

    // The one that could does something else, and then it is gone: the task is in nobody's way, and does not wait for ever.
    let submit = |cpus: &str, command: &[&str]| {
        let mut args = vec!["run", "--print-jsdl", "--cpus", cpus, "--"];
        args.extend(command);
        let job = pool.site.path("sized.xsdl");
        std::fs::write(&job, pool.alice(&args).ok().stdout).unwrap();
        pool.alice(&["submit", job.to_str().unwrap()]).line()
    };
    submit("4", &["/bin/sleep", "1000"]);
    wait_until("it is taken", || tasks(&large).len() == 2);
    let waits = submit("4", &["/bin/true"]);
    pool.alice(&["run", "--", "/bin/true"]).ok();
    assert_eq!(tasks(&small).len(), 1);
    large.kill();
    wait_until("it has failed", || tasks(&small).len() == 2);
    let status = pool.alice(&["status", "--json", &waits]).json();
    assert_eq!(status["state"], "Failed", "{status}");
    assert_eq!(status["reason_code"], "no-capacity");
    assert!(status["reason"].as_str().unwrap().contains("at most 2"));
    large.restart(&[]);
    assert!(large.came_up(), "{}", large.log());
}

#[test]
fn two_hosts_on_one_queue_of_a_host_know_nothing_of_each_other() {
    let pool = Pool::new();
    let config = pool.site.table("message-queue", "host1", &pool.uri);
    let config: Vec<&str> = config.iter().map(String::as_str).collect();
    let hosts = [0; 2].map(|_| Xbed::start("sim", &config));
    for host in &hosts {
        wait_until("it listens", || host.log().contains("listening on"));
    }
    // Whoever has the first message has the whole conversation: each works, and the two are not one.
    let ran = [0; 4].map(|_| pool.alice(&["run", "--", "/bin/echo", "hello"]));
    assert!(ran.iter().all(|ran| ran.stdout == "hello\n"), "{ran:?}");
    let shares = [tasks(&hosts[0]), tasks(&hosts[1])];
    assert_eq!(shares.each_ref().map(Vec::len), [2, 2]);
    let codes = [0; 2].map(|_| pool.alice(&["status", &shares[0][0].0]).code);
    assert!(codes.contains(&0) && codes.contains(&125), "{codes:?}");
}

#[test]
fn virtual_machines_of_a_pool() {
    if !xbee_tests::images().join("base/image.toml").exists() {
        println!("skipped: no images: run `make images`");
        return;
    }
    let pool = Pool::new();
    let members = [0; 2].map(|_| {
        let mut member = pool.start("qemu", &["domains = 1"], &[]);
        assert!(member.came_up(), "{}", member.log());
        wait_until("it is in the pool", || is_member(&member));
        member
    });
    let command = ["/bin/sh", "-c", "echo done; sleep 2"];
    let submitted = [0; 4].map(|_| pool.submit(&command));
    let shares = each_once(&submitted, &[&members[0], &members[1]]);
    assert!(shares.iter().all(|share| *share >= 1), "{shares:?}");
    for task in submitted {
        assert_eq!(pool.alice(&["logs", &task]).ok().stdout, "done\n");
    }
}
