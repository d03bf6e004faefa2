use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use super::*;
use crate::source::{AttachRequest, Flush, Policy, SourceOptions, Way};

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

#[test]
fn who_acknowledges_without_end_keeps_nobody_waiting() {
    let options = SourceOptions {
        log_bytes: 1,
        policy: Policy::DropOldest,
        flush: Flush::Background,
    };
    let core = SourceCore::create(Uuid::nil(), &options, Sender::start().unwrap()).unwrap();
    core.attach_socket(request(Uuid::from_u128(1)), Way::Tcp)
        .unwrap();
    let socket = core.sockets()[0].clone();
    let (here, mut there) = UnixStream::pair().unwrap();
    socket.outgoing.lock().unwrap().wire = Some(Wire::Plain(here.into()));
    // More than is read at once, all of it right.
    let turns = 3;
    let acks = vec![0; turns * MAX_ACK_READS * ACKS * ACK_BYTES];
    there.write_all(&acks).unwrap();
    for _ in 0..turns {
        socket.take_acks(&core).unwrap();
        // Others have their turn, and then the rest is read without its descriptor saying so again.
        assert!(socket.is_ready());
    }
    socket.take_acks(&core).unwrap();
    assert!(!socket.is_ready());
    // What was never sent cannot have been read.
    there.write_all(&1u64.to_le_bytes()).unwrap();
    socket.take_acks(&core).unwrap_err();
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
