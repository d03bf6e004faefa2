use crate::channel::ChannelOptions;
use crate::event::Submission;
use crate::log::WANTED;
use crate::node::{Config, Node};

use super::*;

#[test]
fn who_goes_to_sleep_wakes_a_source_that_began_to_wait_meanwhile() {
    let directory = tempfile::tempdir().unwrap();
    let node = Node::start(Config {
        directory: Some(directory.path().to_owned()),
        ..Config::default()
    });
    let node = node.unwrap();
    let channel = node.create("c", ChannelOptions::default()).unwrap();
    let source = channel.source().unwrap();
    let sink = channel.sink(SinkOptions::default()).unwrap();
    let event = Submission {
        kind: &EventType::raw("t").unwrap(),
        attributes: &[],
        payload: b"x",
    };
    source.submit(&event).unwrap();
    assert!(sink.poll().unwrap().is_some());
    let shared = &node.owner.shared;
    let id = *shared.state().channels["c"].sources.keys().next().unwrap();
    let core = shared.find_source("c", id).unwrap();
    let rung = || {
        let mut fds = [PollFd::new(&**core.space(), PollFlags::IN)];
        poll(
            &mut fds,
            Some(&Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            }),
        )
        .unwrap()
            > 0
    };
    core.space().clear();
    // The source wants what the sink has read, and the sink has not seen that when it read it.
    core.ring().cell(WANTED).store(2, Ordering::SeqCst);
    let short = Duration::from_millis(1);
    assert!(sink.receive_timeout(short).unwrap().is_none());
    assert!(rung());
    // Once: who waits on waits for another sink.
    core.space().clear();
    assert!(sink.receive_timeout(short).unwrap().is_none());
    assert!(!rung());
}
