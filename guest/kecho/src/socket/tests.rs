use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc;
use std::thread;

use super::*;
use crate::event::Submission;
use crate::source::{AttachRequest, Flush, Policy, SourceOptions, Way};
use crate::types::EventType;

fn request(sink: Uuid) -> AttachRequest {
    AttachRequest {
        sink,
        types: Vec::new(),
        filter: None,
        policy: None,
        state: Vec::new(),
        next: None,
    }
}

/// Attaches a sink to a source; its end of the stream.
fn attach(core: &Arc<SourceCore>) -> UnixStream {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (_, ticket) = core
        .attach_socket(request(Uuid::new_v4()), Way::Tcp)
        .unwrap();
    ticket.start(Wire::Plain(ours.into())).unwrap();
    theirs
}

#[test]
fn who_acknowledges_without_end_keeps_nobody_waiting() {
    let sender = Sender::start().unwrap();
    let options = SourceOptions {
        log_bytes: 64 << 10,
        policy: Policy::DropOldest,
        flush: Flush::Background,
    };
    let core = SourceCore::create(Uuid::new_v4(), &options, sender.clone()).unwrap();
    let mut endless = attach(&core);
    let mut quiet = attach(&core);
    let (begun, begins) = mpsc::channel();
    let flood = thread::spawn(move || {
        let acks = [0; 1 << 16];
        let mut written = 0;
        while endless.write_all(&acks).is_ok() {
            written += acks.len();
            if written == 1 << 22 {
                begun.send(()).unwrap();
            }
        }
    });
    begins.recv().unwrap();
    let event = Submission {
        kind: &EventType::raw("t").unwrap(),
        attributes: &[],
        payload: b"x",
    };
    core.submit(&event, true).unwrap();
    // It comes, though there is always something to read from the other one.
    quiet.read_exact(&mut [0; HEADER_BYTES]).unwrap();
    core.close();
    core.abandon();
    sender.stop();
    flood.join().unwrap();
}

#[test]
fn a_sink_that_is_gone_before_it_is_served_sees_the_end() {
    let options = SourceOptions {
        log_bytes: 1,
        policy: Policy::Block,
        flush: Flush::Auto,
    };
    let core = SourceCore::create(Uuid::nil(), &options, Sender::start().unwrap()).unwrap();
    let sink = Uuid::from_u128(1);
    let (_, ticket) = core.attach_socket(request(sink), Way::Tcp).unwrap();
    core.detach(sink, Gone::Left);
    let (here, mut there) = UnixStream::pair().unwrap();
    ticket.start(Wire::Plain(here.into())).unwrap();
    there
        .set_read_timeout(Some(Duration::from_secs(60)))
        .unwrap();
    assert_eq!(there.read(&mut [0; 8]).unwrap(), 0);
}
