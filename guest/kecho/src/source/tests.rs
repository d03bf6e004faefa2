use super::*;
use crate::log::{CURSOR, ENDED};
use crate::memory::Page;
use crate::types::EventType;

#[test]
fn a_sink_that_lies_about_what_it_has_read_does_no_harm() {
    // Within the log, and beyond all that there is.
    for bytes in [8, 4096] {
        a_sink_lies(bytes);
    }
}

/// Its cursor is at what looks like a frame with a body of so many bytes.
fn a_sink_lies(bytes: usize) {
    let options = SourceOptions {
        log_bytes: 64 << 10,
        policy: Policy::Block,
        flush: Flush::Auto,
    };
    let sender = Sender::start().unwrap();
    let core = SourceCore::create(Uuid::new_v4(), &options, sender.clone()).unwrap();
    let (page, bell) = (Arc::new(Page::create().unwrap().0), Bell::create().unwrap());
    let request = AttachRequest {
        sink: Uuid::new_v4(),
        types: Vec::new(),
        filter: None,
        policy: None,
        state: Vec::new(),
        next: None,
    };
    core.attach_memory(request, Way::SharedMemory, page.clone(), Arc::new(bell))
        .unwrap();
    let kind = EventType::raw("t").unwrap();
    let submit = |payload: &[u8]| {
        let event = Submission {
            kind: &kind,
            attributes: &[],
            payload,
        };
        core.submit(&event, false)
    };
    submit(b"x").unwrap();
    let frame = core.ring().cell(HEAD).load(Ordering::Acquire);
    // A frame within an event: of the last event there can be, and for nobody.
    let inner = [Header::word(bytes, 1, Kind::Event), u64::MAX, 0];
    submit(&inner.map(u64::to_le_bytes).concat()).unwrap();
    let payload = frame + (HEADER_BYTES + crate::event::FIXED_BYTES) as u64;
    page.cell(CURSOR).store(payload, Ordering::Release);
    // Nor does who asks for the status trip over it.
    core.sinks();
    // However that ends for the sink, the source goes on or says that it is full.
    for _ in 0..1000 {
        match submit(&[0; 1000]) {
            Ok(()) | Err(SubmitError::Full) => {}
            Err(error) => panic!("{error}"),
        }
    }
    // One beyond all that there is, which nobody can have read, is believed no longer.
    page.cell(CURSOR).store(1 << 40, Ordering::Release);
    for _ in 0..100 {
        submit(&[0; 1000]).unwrap();
    }
    assert_eq!(page.cell(ENDED).load(Ordering::Acquire), ENDED_LEFT);
    sender.stop();
}
