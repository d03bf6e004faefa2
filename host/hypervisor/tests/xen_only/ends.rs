//! When an end is told. Printed, for what is promised is no more than that it is told correctly.

use std::os::fd::AsFd;
use std::sync::mpsc;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, poll};
use xbee_hypervisor::{DomainEvent, DomainId, DomainState, Hypervisor, StopReason};
use xbee_link::xenstore::Xenstore;

use super::super::support::{Fixture, Guest, LIMIT, READY, xen_name, xl};

/// Instants at which xenstore told that some domain has ended: Xen itself says so.
fn releases() -> mpsc::Receiver<Instant> {
    let mut store = Xenstore::open().unwrap();
    store.watch("@releaseDomain", "release").unwrap();
    // The first comes at once, for the watch itself.
    while store.next_event().unwrap().is_some() {}
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        loop {
            poll(&mut [PollFd::new(&store.as_fd(), PollFlags::IN)], None).unwrap();
            while store.next_event().unwrap().is_some() {
                if sender.send(Instant::now()).is_err() {
                    return;
                }
            }
        }
    });
    receiver
}

/// Waits for the event of the domain's end.
async fn told(
    events: &mut tokio::sync::broadcast::Receiver<DomainEvent>,
    id: DomainId,
) -> (StopReason, Instant) {
    let wait = async {
        loop {
            let event = events.recv().await.unwrap();
            if let (true, DomainState::Stopped { reason }) = (event.id == id, event.state) {
                return (reason, Instant::now());
            }
        }
    };
    tokio::time::timeout(LIMIT, wait).await.expect("no end")
}

/// Runs a guest, ends it by `act`, and prints when that was told.
async fn measure(
    fixture: &Fixture,
    hypervisor: &dyn Hypervisor,
    what: &str,
    guest: Guest,
    act: impl FnOnce(&str),
) -> StopReason {
    let mut events = hypervisor.events();
    let spec = fixture.run(hypervisor, guest).await;
    fixture.wait_console(hypervisor, spec.id, READY).await;
    // A guest that ends by itself may be ended already.
    let released = releases();
    let began = Instant::now();
    tokio::task::block_in_place(|| act(&xen_name(spec.id)));
    let (reason, told) = told(&mut events, spec.id).await;
    // The last before: what was left of the one before may still be on its way.
    let by_xen = released.try_iter().filter(|when| *when <= told).last();
    let since = |when: Option<Instant>| match when {
        Some(when) if told >= when => format!("{:.2} s after", (told - when).as_secs_f64()),
        Some(when) => format!("{:.2} s before", (when - told).as_secs_f64()),
        None => "without".to_owned(),
    };
    println!(
        "end by {what}: told {} Xen said so, {} s after it was asked for: {reason}",
        since(by_xen),
        (told - began).as_secs_f32(),
    );
    hypervisor.destroy(spec.id).await.unwrap();
    super::super::assert_gone(fixture, hypervisor, spec.id).await;
    reason
}

#[tokio::test(flavor = "multi_thread")]
async fn ends_are_told_for_what_they_are() {
    let Some(fixture) = Fixture::xen() else {
        return;
    };
    let hypervisor = fixture.open().await;
    let run = |what, guest, command: &'static [&'static str]| {
        let act = move |name: &str| {
            if let Some((verb, options)) = command.split_first() {
                let words = [&[*verb], &[name][..], options].concat();
                xl(&words).expect(verb);
            }
        };
        measure(&fixture, &*hypervisor, what, guest, act)
    };
    let reason = run("the guest's power-off", Guest::LatePowerOff, &[]).await;
    assert_eq!(reason, StopReason::GuestShutdown);
    let reason = run("the guest's reset", Guest::LateReset, &[]).await;
    assert_eq!(reason, StopReason::GuestReset);
    let reason = run("a panic", Guest::LatePanic, &[]).await;
    assert_eq!(reason, StopReason::GuestPanic);
    let reason = run("xl shutdown", Guest::Button, &["shutdown"]).await;
    assert_eq!(reason, StopReason::GuestShutdown);
    let reason = run("xl reboot", Guest::Button, &["reboot"]).await;
    assert_eq!(reason, StopReason::GuestReset);
    let reason = run("xl destroy", Guest::Idle, &["destroy"]).await;
    assert!(matches!(reason, StopReason::Failed { .. }), "{reason}");
}
