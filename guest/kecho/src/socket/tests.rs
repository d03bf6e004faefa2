use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc;
use std::thread;

use super::*;
use crate::event::Submission;
use crate::source::{AttachRequest, Flush, Policy, SourceOptions, Way};
use crate::types::EventType;

/// Attaches a sink to a source; its end of the stream.
fn attach(core: &Arc<SourceCore>) -> UnixStream {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let request = AttachRequest {
        sink: Uuid::new_v4(),
        types: Vec::new(),
        filter: None,
        policy: None,
        state: Vec::new(),
        next: None,
    };
    let (_, ticket) = core.attach_socket(request, Way::Tcp).unwrap();
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
