//! The contract of [`Hypervisor`]: every test runs against every back end.
//!
//! The QEMU tests boot a real kernel, taken with its initial RAM file system from `XBEE_IMAGES`
//! (default `~/.cache/xbee/images`). So do those of Xen, which run in dom0 of a Xen host (`make
//! xen-test` makes one).
#![allow(clippy::unwrap_used)]

mod network;
mod peers;
mod qemu_only;
mod sim_only;
mod support;
#[cfg(feature = "xen")]
mod xen_only;

use std::collections::HashSet;
use std::io::Write;
use std::time::Duration;

use support::{FIRMWARE_LIMIT, Fixture, Guest, LIMIT, READY, state};
use tokio::time::{Instant, sleep, timeout};
use uuid::Uuid;
use xbee_agent::protocol::StartMode;
use xbee_agent::{Agent, Event, Resume};
use xbee_hypervisor::{
    Disk, DiskFormat, DomainId, DomainState, Error, Hypervisor, Interface, ShutdownOutcome,
    StopReason,
};

/// Makes `mod sim`, `mod qemu` and `mod xen` of the functions named, each run with its back end's fixture.
macro_rules! contract {
    ($($name:ident),* $(,)?) => {
        mod sim {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $name() {
                super::$name(super::Fixture::sim()).await;
            })*
        }
        mod qemu {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $name() {
                let Some(fixture) = super::Fixture::qemu() else { return };
                super::$name(fixture).await;
            })*
        }
        #[cfg(feature = "xen")]
        mod xen {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $name() {
                let Some(fixture) = super::Fixture::xen() else { return };
                super::$name(fixture).await;
            })*
        }
    };
}

contract!(
    probe_tells_what_the_host_offers,
    a_domain_is_made_runs_and_is_destroyed,
    everything_can_be_repeated,
    a_different_domain_of_the_same_identity_is_refused,
    unknown_domains_are_not_found,
    operations_out_of_order_are_refused,
    a_guest_that_switches_off_is_seen_at_once,
    a_guest_that_resets_is_not_restarted,
    a_panic_is_told_from_a_reset,
    a_crash_of_the_hypervisor_is_seen_at_once,
    the_power_button_is_heard,
    a_deaf_guest_is_shut_down_by_force,
    a_paused_domain_does_not_move,
    a_console_flood_is_bounded,
    destroy_works_in_every_state,
    domains_start_at_once,
    the_agent_connects_and_dials_again,
    an_image_with_its_own_boot_loader_boots,
    domains_outlive_their_manager,
    what_happened_meanwhile_is_known_after_a_restart,
    what_a_back_end_cannot_do_it_says,
    a_saved_domain_goes_on_where_it_was,
    a_halted_domain_is_saved_and_restored_halted,
    only_the_newest_save_of_a_domain_restores_it,
    a_save_that_cannot_be_written_changes_nothing,
    disks_come_and_go,
    interfaces_come_and_go,
    memory_and_processors_change_within_their_limits,
    a_failed_create_leaves_nothing,
    user_errors_say_what_to_do,
);

async fn probe_tells_what_the_host_offers(fixture: Fixture) {
    let found = fixture.open().await.probe().await.unwrap();
    assert!(
        found.cpus >= 1 && found.memory_bytes >= 1 << 28,
        "{found:?}"
    );
    assert!(
        !found.version.is_empty() && !found.accelerator.is_empty(),
        "{found:?}"
    );
    println!("{found:?}");
}

async fn a_domain_is_made_runs_and_is_destroyed(fixture: Fixture) {
    let hypervisor = fixture.open().await;
    let mut events = hypervisor.events();
    let spec = fixture.spec(Guest::Idle);
    let begin = Instant::now();
    hypervisor.create(&spec).await.unwrap();
    let created = begin.elapsed();
    assert_eq!(
        state(&*hypervisor, spec.id).await,
        Some(DomainState::Created)
    );
    assert_eq!(hypervisor.stats(spec.id).await.unwrap(), Default::default());

    let begin = Instant::now();
    hypervisor.start(spec.id).await.unwrap();
    let started = begin.elapsed();
    assert_eq!(events.recv().await.unwrap().state, DomainState::Running);
    fixture.wait_console(&*hypervisor, spec.id, READY).await;
    let up = begin.elapsed();
    println!("created in {created:?}, started in {started:?}, up {up:?} after the start");
    let stats = hypervisor.stats(spec.id).await.unwrap();
    assert!(stats.memory_bytes > 1 << 20, "{stats:?}");
    let list = hypervisor.list().await.unwrap();
    assert_eq!((list.len(), &list[0].name), (1, &spec.name));
    assert_ne!(fixture.process_exists(spec.id), Some(false));

    hypervisor.destroy(spec.id).await.unwrap();
    let event = events.recv().await.unwrap();
    assert_eq!(
        (event.id, event.state),
        (spec.id, stopped(StopReason::Destroyed))
    );
    assert_gone(&fixture, &*hypervisor, spec.id).await;
}

async fn everything_can_be_repeated(fixture: Fixture) {
    let hypervisor = fixture.open().await;
    let spec = fixture.spec(Guest::Idle);
    for _ in 0..2 {
        hypervisor.create(&spec).await.unwrap();
    }
    for _ in 0..2 {
        hypervisor.start(spec.id).await.unwrap();
    }
    hypervisor.create(&spec).await.unwrap();
    assert_eq!(
        state(&*hypervisor, spec.id).await,
        Some(DomainState::Running)
    );
    for _ in 0..2 {
        hypervisor.pause(spec.id).await.unwrap();
    }
    for _ in 0..2 {
        hypervisor.resume(spec.id).await.unwrap();
    }
    for _ in 0..2 {
        assert_eq!(
            hypervisor.shutdown(spec.id, Duration::ZERO).await.unwrap(),
            ShutdownOutcome::Forced
        );
    }
    for _ in 0..2 {
        hypervisor.destroy(spec.id).await.unwrap();
    }
    // The same again, from the beginning.
    hypervisor.create(&spec).await.unwrap();
    hypervisor.start(spec.id).await.unwrap();
    hypervisor.destroy(spec.id).await.unwrap();
    assert_gone(&fixture, &*hypervisor, spec.id).await;
}

async fn a_different_domain_of_the_same_identity_is_refused(fixture: Fixture) {
    let hypervisor = fixture.open().await;
    let spec = fixture.spec(Guest::Idle);
    hypervisor.create(&spec).await.unwrap();
    let mut other = spec.clone();
    other.vcpus = 2;
    other.name = "other".to_owned();
    let error = hypervisor.create(&other).await.unwrap_err();
    assert_eq!(error.code(), "domain-exists");
    assert_eq!(
        error.to_string(),
        format!("domain {} exists already and differs: name, vcpus", spec.id)
    );
    let mut other = spec.clone();
    other.boot_config.push(0);
    assert_eq!(
        hypervisor.create(&other).await.unwrap_err().code(),
        "domain-exists"
    );
    hypervisor.destroy(spec.id).await.unwrap();
}

async fn unknown_domains_are_not_found(fixture: Fixture) {
    let hypervisor = fixture.open().await;
    let id = Uuid::new_v4();
    for error in [
        hypervisor.start(id).await.unwrap_err(),
        hypervisor.channel(id).await.err().unwrap(),
        hypervisor.console(id).await.unwrap_err(),
        hypervisor.pause(id).await.unwrap_err(),
        hypervisor.resume(id).await.unwrap_err(),
        hypervisor.shutdown(id, LIMIT).await.unwrap_err(),
        hypervisor.stats(id).await.unwrap_err(),
        hypervisor
            .save(id, &fixture.path("save"))
            .await
            .unwrap_err(),
        hypervisor
            .restore(id, &fixture.path("save"))
            .await
            .unwrap_err(),
    ] {
        assert!(
            matches!(error, Error::NotFound(unknown) if unknown == id),
            "{error}"
        );
    }
    hypervisor.destroy(id).await.unwrap();
    assert_eq!(hypervisor.list().await.unwrap(), []);
}

async fn operations_out_of_order_are_refused(fixture: Fixture) {
    let hypervisor = fixture.open().await;
    let spec = fixture.spec(Guest::Idle);
    hypervisor.create(&spec).await.unwrap();
    for error in [
        hypervisor.channel(spec.id).await.err().unwrap(),
        hypervisor.pause(spec.id).await.unwrap_err(),
        hypervisor.resume(spec.id).await.unwrap_err(),
        hypervisor.shutdown(spec.id, LIMIT).await.unwrap_err(),
    ] {
        assert!(
            matches!(
                error,
                Error::WrongState {
                    state: DomainState::Created,
                    ..
                }
            ),
            "{error}"
        );
    }
    hypervisor.start(spec.id).await.unwrap();
    hypervisor.shutdown(spec.id, Duration::ZERO).await.unwrap();
    for error in [
        hypervisor.start(spec.id).await.unwrap_err(),
        hypervisor.channel(spec.id).await.err().unwrap(),
        hypervisor.pause(spec.id).await.unwrap_err(),
        hypervisor.resume(spec.id).await.unwrap_err(),
        hypervisor.stats(spec.id).await.unwrap_err(),
    ] {
        assert!(
            matches!(
                error,
                Error::Gone {
                    reason: StopReason::Destroyed,
                    ..
                }
            ),
            "{error}"
        );
    }
    // The console can still be read.
    assert!(hypervisor.console(spec.id).await.unwrap().exists());
    hypervisor.destroy(spec.id).await.unwrap();
}

async fn a_guest_that_switches_off_is_seen_at_once(fixture: Fixture) {
    let hypervisor = fixture.open().await;
    let spec = fixture.run(&*hypervisor, Guest::PowerOff).await;
    assert_eq!(end(&*hypervisor, spec.id).await, StopReason::GuestShutdown);
    assert_ne!(fixture.process_exists(spec.id), Some(true));
    // A waiting `channel` says why there will be none.
    let error = timeout(LIMIT, hypervisor.channel(spec.id))
        .await
        .unwrap()
        .err()
        .unwrap();
    assert!(
        matches!(
            error,
            Error::Gone {
                reason: StopReason::GuestShutdown,
                ..
            }
        ),
        "{error}"
    );
    assert_eq!(
        hypervisor.shutdown(spec.id, LIMIT).await.unwrap(),
        ShutdownOutcome::Graceful
    );
    hypervisor.destroy(spec.id).await.unwrap();
}

async fn a_guest_that_resets_is_not_restarted(fixture: Fixture) {
    let hypervisor = fixture.open().await;
    let spec = fixture.run(&*hypervisor, Guest::Reset).await;
    assert_eq!(end(&*hypervisor, spec.id).await, StopReason::GuestReset);
    hypervisor.destroy(spec.id).await.unwrap();
}

async fn a_panic_is_told_from_a_reset(fixture: Fixture) {
    let hypervisor = fixture.open().await;
    let spec = fixture.run(&*hypervisor, Guest::Panic).await;
    assert_eq!(end(&*hypervisor, spec.id).await, StopReason::GuestPanic);
    let console = std::fs::read_to_string(hypervisor.console(spec.id).await.unwrap()).unwrap();
    assert!(console.contains("Kernel panic"), "{console}");
    hypervisor.destroy(spec.id).await.unwrap();
}

async fn a_crash_of_the_hypervisor_is_seen_at_once(fixture: Fixture) {
    let hypervisor = fixture.open().await;
    let spec = fixture.run(&*hypervisor, Guest::Idle).await;
    let mut events = hypervisor.events();
    fixture.crash(spec.id);
    let before = Instant::now();
    let event = timeout(LIMIT, events.recv()).await.unwrap().unwrap();
    assert!(before.elapsed() < Duration::from_secs(1));
    let detail = fixture.crash_detail().to_owned();
    assert_eq!(event.state, stopped(StopReason::Failed { detail }));
    hypervisor.destroy(spec.id).await.unwrap();
    assert_gone(&fixture, &*hypervisor, spec.id).await;
}

async fn the_power_button_is_heard(fixture: Fixture) {
    let hypervisor = fixture.open().await;
    let spec = fixture.run(&*hypervisor, Guest::Button).await;
    // Pressed while it boots, and while it is halted: it must not be lost.
    hypervisor.pause(spec.id).await.unwrap();
    assert_eq!(
        hypervisor.shutdown(spec.id, LIMIT).await.unwrap(),
        ShutdownOutcome::Graceful
    );
    assert_eq!(
        state(&*hypervisor, spec.id).await,
        Some(stopped(StopReason::GuestShutdown))
    );
    hypervisor.destroy(spec.id).await.unwrap();
}

async fn a_deaf_guest_is_shut_down_by_force(fixture: Fixture) {
    let hypervisor = fixture.open().await;
    let spec = fixture.run(&*hypervisor, Guest::Idle).await;
    let before = Instant::now();
    let grace = Duration::from_millis(300);
    assert_eq!(
        hypervisor.shutdown(spec.id, grace).await.unwrap(),
        ShutdownOutcome::Forced
    );
    assert!(before.elapsed() >= grace);
    assert_eq!(
        state(&*hypervisor, spec.id).await,
        Some(stopped(StopReason::Destroyed))
    );
    hypervisor.destroy(spec.id).await.unwrap();
}

async fn a_paused_domain_does_not_move(fixture: Fixture) {
    let hypervisor = fixture.open().await;
    let spec = fixture.run(&*hypervisor, Guest::Flood).await;
    let console = hypervisor.console(spec.id).await.unwrap();
    fixture.wait_console(&*hypervisor, spec.id, "flood").await;
    let mut events = hypervisor.events();
    hypervisor.pause(spec.id).await.unwrap();
    assert_eq!(events.recv().await.unwrap().state, DomainState::Paused);
    // What is on its way to the log still comes.
    sleep(Duration::from_millis(500)).await;
    let before = std::fs::read(&console).unwrap();
    sleep(Duration::from_millis(300)).await;
    assert!(
        std::fs::read(&console).unwrap() == before,
        "a halted guest printed"
    );
    hypervisor.resume(spec.id).await.unwrap();
    assert_eq!(events.recv().await.unwrap().state, DomainState::Running);
    let deadline = Instant::now() + LIMIT;
    while std::fs::read(&console).unwrap() == before {
        assert!(Instant::now() < deadline, "the guest does not go on");
        sleep(Duration::from_millis(20)).await;
    }
    hypervisor.destroy(spec.id).await.unwrap();
}

async fn a_console_flood_is_bounded(fixture: Fixture) {
    let hypervisor = fixture.open().await;
    let spec = fixture.run(&*hypervisor, Guest::Flood).await;
    let console = hypervisor.console(spec.id).await.unwrap();
    let max_bytes = support::CONSOLE_MAX_BYTES;
    // Once the log has been cut, what it holds is bounded, and it goes on.
    fixture
        .wait_console(&*hypervisor, spec.id, "bytes of older output dropped]")
        .await;
    for _ in 0..50 {
        let len = std::fs::metadata(&console).unwrap().len();
        assert!(len <= max_bytes, "{len}");
        sleep(Duration::from_millis(10)).await;
    }
    hypervisor.destroy(spec.id).await.unwrap();
}

async fn destroy_works_in_every_state(fixture: Fixture) {
    let hypervisor = fixture.open().await;
    let created = fixture.spec(Guest::Idle);
    hypervisor.create(&created).await.unwrap();
    let running = fixture.run(&*hypervisor, Guest::Idle).await;
    let paused = fixture.run(&*hypervisor, Guest::Idle).await;
    hypervisor.pause(paused.id).await.unwrap();
    let ended = fixture.run(&*hypervisor, Guest::Idle).await;
    hypervisor.shutdown(ended.id, Duration::ZERO).await.unwrap();
    let shutting_down = fixture.run(&*hypervisor, Guest::Idle).await;
    for spec in [&created, &running, &paused, &ended] {
        hypervisor.destroy(spec.id).await.unwrap();
    }
    // Not only between operations.
    let (shutdown, destroyed) = tokio::join!(hypervisor.shutdown(shutting_down.id, LIMIT), async {
        sleep(Duration::from_millis(100)).await;
        timeout(
            Duration::from_secs(20),
            hypervisor.destroy(shutting_down.id),
        )
        .await
        .unwrap()
    });
    destroyed.unwrap();
    assert_eq!(shutdown.unwrap(), ShutdownOutcome::Forced);
    for spec in [created, running, paused, ended, shutting_down] {
        assert_gone(&fixture, &*hypervisor, spec.id).await;
    }
}

async fn domains_start_at_once(fixture: Fixture) {
    let hypervisor = fixture.open().await;
    let hypervisor = &*hypervisor;
    let fixture = &fixture;
    let count = fixture.domains_max();
    let specs: Vec<_> = (0..count).map(|_| fixture.spec(Guest::Idle)).collect();
    let one = |spec| async move {
        hypervisor.create(spec).await.unwrap();
        hypervisor.start(spec.id).await.unwrap();
        fixture.wait_console(hypervisor, spec.id, READY).await;
    };
    join_all(specs.iter().map(one)).await;
    assert_eq!(hypervisor.list().await.unwrap().len(), count);
    join_all(
        specs
            .iter()
            .map(|spec| async move { hypervisor.destroy(spec.id).await.unwrap() }),
    )
    .await;
    for spec in &specs {
        assert_gone(fixture, hypervisor, spec.id).await;
    }
}

async fn the_agent_connects_and_dials_again(fixture: Fixture) {
    let mut hypervisor = fixture.open().await;
    let spec = fixture.run(&*hypervisor, Guest::Agent).await;
    let stream = timeout(LIMIT, hypervisor.channel(spec.id))
        .await
        .unwrap()
        .unwrap();
    let (agent, mut events) = Agent::connect(stream, &support::SECRET, Resume::default())
        .await
        .unwrap();
    assert_eq!(agent.domain(), spec.id);
    agent.start(StartMode::Agent).await.unwrap();
    let conversation = Uuid::new_v4();
    assert!(!agent.execute(support::echo(conversation)).await.unwrap());
    let Some(Event::Output { data, .. }) = events.recv().await else {
        panic!("no output")
    };
    assert_eq!(data, b"hello\n");
    assert!(matches!(events.recv().await, Some(Event::Exited { .. })));

    let mut first = Some((agent, events));
    // After a lost connection, and after a restart of the manager, it is the same agent.
    for restart in [false, true] {
        if restart {
            drop(hypervisor);
            hypervisor = fixture.open().await;
        } else {
            first.take();
        }
        let stream = timeout(LIMIT, hypervisor.channel(spec.id))
            .await
            .unwrap()
            .unwrap();
        let (agent, _events) = Agent::connect(stream, &support::SECRET, Resume::default())
            .await
            .unwrap();
        assert!(
            agent.execute(support::echo(conversation)).await.unwrap(),
            "restart {restart}"
        );
        if restart {
            agent.shutdown(Duration::ZERO).await.unwrap();
        }
    }
    assert_eq!(end(&*hypervisor, spec.id).await, StopReason::GuestShutdown);
    hypervisor.destroy(spec.id).await.unwrap();
    assert_gone(&fixture, &*hypervisor, spec.id).await;
}

async fn an_image_with_its_own_boot_loader_boots(fixture: Fixture) {
    let Some(spec) = fixture.self_booting(Guest::Service) else {
        return;
    };
    let image = &spec.disks[0].image;
    let content = std::fs::read(image).unwrap();
    let mut hypervisor = fixture.open().await;
    for _ in 0..2 {
        hypervisor.create(&spec).await.unwrap();
    }
    let mut other = spec.clone();
    other.boot_config.push(0);
    let error = hypervisor.create(&other).await.unwrap_err();
    assert_eq!(error.code(), "domain-exists");
    let begin = Instant::now();
    hypervisor.start(spec.id).await.unwrap();
    fixture
        .wait_console_for(FIRMWARE_LIMIT, &*hypervisor, spec.id, READY)
        .await;
    println!("up {:?} after the start", begin.elapsed());
    // Its agent has found the configuration of this boot, and answers after a restart of the manager.
    for restart in [false, true] {
        if restart {
            drop(hypervisor);
            hypervisor = fixture.open().await;
        }
        let (agent, _events) = connect(&*hypervisor, spec.id).await;
        assert_eq!(agent.domain(), spec.id);
        println!("restart {restart}: {:?}", agent.hello());
        if restart {
            // Its init does not switch off. By force at once, the machine could be gone before its answer is.
            agent.shutdown(Duration::from_secs(5)).await.unwrap();
        }
    }
    assert_eq!(end(&*hypervisor, spec.id).await, StopReason::GuestShutdown);
    hypervisor.destroy(spec.id).await.unwrap();
    assert_gone(&fixture, &*hypervisor, spec.id).await;
    assert!(
        std::fs::read(image).unwrap() == content,
        "the image was written"
    );
}

async fn domains_outlive_their_manager(fixture: Fixture) {
    let hypervisor = fixture.open().await;
    let created = fixture.spec(Guest::Idle);
    hypervisor.create(&created).await.unwrap();
    let running = fixture.run(&*hypervisor, Guest::Idle).await;
    let paused = fixture.run(&*hypervisor, Guest::Idle).await;
    hypervisor.pause(paused.id).await.unwrap();
    drop(hypervisor);

    let hypervisor = fixture.open().await;
    let list = hypervisor.list().await.unwrap();
    let find = |id: DomainId| {
        list.iter()
            .find(|info| info.id == id)
            .map(|info| info.state.clone())
    };
    assert_eq!(find(created.id), Some(DomainState::Created));
    assert_eq!(find(running.id), Some(DomainState::Running));
    assert_eq!(find(paused.id), Some(DomainState::Paused));
    // All of them can be used as if nothing had happened.
    fixture.wait_console(&*hypervisor, running.id, READY).await;
    hypervisor.create(&running).await.unwrap();
    hypervisor.resume(paused.id).await.unwrap();
    fixture.wait_console(&*hypervisor, paused.id, READY).await;
    hypervisor.start(created.id).await.unwrap();
    fixture.wait_console(&*hypervisor, created.id, READY).await;
    let mut events = hypervisor.events();
    fixture.crash(running.id);
    assert!(matches!(
        events.recv().await.unwrap().state,
        DomainState::Stopped {
            reason: StopReason::Failed { .. }
        }
    ));
    for spec in [created, running, paused] {
        hypervisor.destroy(spec.id).await.unwrap();
        assert_gone(&fixture, &*hypervisor, spec.id).await;
    }
}

async fn what_happened_meanwhile_is_known_after_a_restart(fixture: Fixture) {
    let hypervisor = fixture.open().await;
    let ended = fixture.run(&*hypervisor, Guest::Idle).await;
    hypervisor.shutdown(ended.id, Duration::ZERO).await.unwrap();
    let crashing = fixture.run(&*hypervisor, Guest::Idle).await;
    let switching_off = fixture.run(&*hypervisor, Guest::PowerOff).await;
    drop(hypervisor);
    fixture.crash(crashing.id);
    fixture.wait_until_switched_off(switching_off.id).await;

    let hypervisor = fixture.open().await;
    assert_eq!(end(&*hypervisor, ended.id).await, StopReason::Destroyed);
    assert!(matches!(
        end(&*hypervisor, crashing.id).await,
        StopReason::Failed { .. }
    ));
    assert_eq!(
        end(&*hypervisor, switching_off.id).await,
        StopReason::GuestShutdown
    );
    for spec in [ended, crashing, switching_off] {
        hypervisor.destroy(spec.id).await.unwrap();
        assert_gone(&fixture, &*hypervisor, spec.id).await;
    }
}

async fn what_a_back_end_cannot_do_it_says(fixture: Fixture) {
    let hypervisor = fixture.open().await;
    let mut spec = fixture.spec(Guest::Idle);
    spec.memory_max_bytes = Some(spec.memory_bytes + (64 << 20));
    hypervisor.create(&spec).await.unwrap();
    fixture.start(&*hypervisor, &spec, Guest::Idle).await;
    let file = fixture.path("save");
    // One that every back end could serve, were it there.
    let disk = Disk {
        image: fixture.path("none"),
        format: DiskFormat::Raw,
        read_only: true,
    };
    let id = spec.id;
    for (operation, error) in [
        (
            "change the memory of",
            hypervisor.set_memory(id, spec.memory_bytes).await.err(),
        ),
        (
            "change the processors of",
            hypervisor.set_vcpus(id, 1).await.err(),
        ),
        (
            "attach a disk to",
            hypervisor.attach_disk(id, &disk).await.err(),
        ),
        (
            "attach an interface to",
            hypervisor.attach_interface(id, INTERFACE).await.err(),
        ),
        ("save", hypervisor.save(id, &file).await.err()),
    ] {
        let code = error.as_ref().map(Error::code);
        assert_eq!(
            code == Some("unsupported"),
            fixture.cannot(operation),
            "{operation}: {code:?}"
        );
    }
    hypervisor.destroy(spec.id).await.unwrap();
}

async fn a_saved_domain_goes_on_where_it_was(fixture: Fixture) {
    if fixture.cannot("save") {
        return;
    }
    let mut hypervisor = fixture.open().await;
    let spec = fixture.run(&*hypervisor, Guest::Agent).await;
    let (agent, _events) = connect(&*hypervisor, spec.id).await;
    agent.start(StartMode::Agent).await.unwrap();
    let boot = agent.hello().boot_id;
    let conversation = Uuid::new_v4();
    let mut task = support::echo(conversation);
    task.argv = vec!["sleep".to_owned(), "100000".to_owned()];
    assert!(!agent.execute(task).await.unwrap());

    let file = fixture.path("save");
    for restart in [false, true] {
        let begin = Instant::now();
        hypervisor.save(spec.id, &file).await.unwrap();
        let saved = begin.elapsed();
        assert_eq!(
            state(&*hypervisor, spec.id).await,
            Some(stopped(StopReason::Saved))
        );
        assert_ne!(fixture.process_exists(spec.id), Some(true));
        // Its connections are closed, and there are no others.
        assert!(agent.stats().await.is_err());
        let error = hypervisor.channel(spec.id).await.err().unwrap();
        assert_eq!(error.code(), "domain-gone");
        if restart {
            drop(hypervisor);
            hypervisor = fixture.open().await;
            assert_eq!(
                state(&*hypervisor, spec.id).await,
                Some(stopped(StopReason::Saved))
            );
        }
        let begin = Instant::now();
        hypervisor.restore(spec.id, &file).await.unwrap();
        println!(
            "saved in {saved:?}, restored in {:?}, {} bytes",
            begin.elapsed(),
            spec.memory_bytes
        );
        assert_eq!(
            state(&*hypervisor, spec.id).await,
            Some(DomainState::Running)
        );
        assert!(!file.exists());
        // Again: it has been done.
        hypervisor.restore(spec.id, &file).await.unwrap();
        let (agent, _events) = connect(&*hypervisor, spec.id).await;
        assert_eq!(agent.hello().boot_id, boot);
        let known = &agent.hello().conversations;
        assert!(
            known
                .iter()
                .any(|known| known.conversation == conversation && known.running),
            "{known:?}"
        );
    }
    let (agent, mut events) = connect(&*hypervisor, spec.id).await;
    agent
        .terminate_task(conversation, Duration::ZERO)
        .await
        .unwrap();
    let ended = timeout(LIMIT, events.recv()).await.unwrap();
    assert!(matches!(ended, Some(Event::Exited { .. })), "{ended:?}");
    agent.shutdown(Duration::ZERO).await.unwrap();
    assert_eq!(end(&*hypervisor, spec.id).await, StopReason::GuestShutdown);
    hypervisor.destroy(spec.id).await.unwrap();
    assert_gone(&fixture, &*hypervisor, spec.id).await;
}

/// Connects to an agent until it proves itself: one that is about to dial again may offer a connection
/// that is of no use.
async fn connect(
    hypervisor: &dyn Hypervisor,
    id: DomainId,
) -> (Agent, tokio::sync::mpsc::Receiver<Event>) {
    let connect = async {
        loop {
            let stream = hypervisor.channel(id).await.unwrap();
            match Agent::connect(stream, &support::SECRET, Resume::default()).await {
                Ok(connected) => return connected,
                Err(error) => println!("not yet: {error}"),
            }
        }
    };
    timeout(LIMIT, connect).await.expect("no agent")
}

async fn a_halted_domain_is_saved_and_restored_halted(fixture: Fixture) {
    if fixture.cannot("save") {
        return;
    }
    let hypervisor = fixture.open().await;
    let spec = fixture.run(&*hypervisor, Guest::Count).await;
    fixture.wait_console(&*hypervisor, spec.id, READY).await;
    let mut events = hypervisor.events();
    hypervisor.pause(spec.id).await.unwrap();
    let file = fixture.path("save");
    hypervisor.save(spec.id, &file).await.unwrap();
    // A saved domain is as good as any other that has ended.
    assert_eq!(
        hypervisor.shutdown(spec.id, LIMIT).await.unwrap(),
        ShutdownOutcome::EndedOtherwise
    );
    hypervisor.restore(spec.id, &file).await.unwrap();
    let mut seen = Vec::new();
    while seen.last() != Some(&stopped(StopReason::Saved)) {
        seen.push(events.recv().await.unwrap().state);
    }
    assert_eq!(seen, [DomainState::Paused, stopped(StopReason::Saved)]);
    assert_eq!(events.recv().await.unwrap().state, DomainState::Paused);
    let console = hypervisor.console(spec.id).await.unwrap();
    // What is on its way to the log still comes.
    sleep(Duration::from_millis(500)).await;
    let before = std::fs::read(&console).unwrap();
    sleep(Duration::from_millis(500)).await;
    assert!(
        std::fs::read(&console).unwrap() == before,
        "a halted guest printed"
    );
    hypervisor.resume(spec.id).await.unwrap();
    goes_on(&fixture, &*hypervisor, &spec).await;
    hypervisor.destroy(spec.id).await.unwrap();
    assert_gone(&fixture, &*hypervisor, spec.id).await;
}

/// Whether a guest that counts does so, and has been booted once.
async fn goes_on(
    fixture: &Fixture,
    hypervisor: &dyn Hypervisor,
    spec: &xbee_hypervisor::DomainSpec,
) {
    let before = fixture.wait_console(hypervisor, spec.id, READY).await;
    let deadline = Instant::now() + LIMIT;
    loop {
        let now = fixture.wait_console(hypervisor, spec.id, READY).await;
        assert_eq!(now.matches(READY).count(), 1, "{now}");
        if now.len() > before.len() {
            return;
        }
        assert!(Instant::now() < deadline, "the guest does not go on: {now}");
        sleep(Duration::from_millis(20)).await;
    }
}

async fn only_the_newest_save_of_a_domain_restores_it(fixture: Fixture) {
    if fixture.cannot("save") {
        return;
    }
    let hypervisor = fixture.open().await;
    let created = fixture.spec(Guest::Idle);
    hypervisor.create(&created).await.unwrap();
    let [file, older, other] = ["save", "older", "other"].map(|name| fixture.path(name));
    for error in [
        hypervisor.save(created.id, &file).await.unwrap_err(),
        hypervisor.restore(created.id, &file).await.unwrap_err(),
    ] {
        assert_eq!(error.code(), "domain-wrong-state");
    }
    let spec = fixture.run(&*hypervisor, Guest::Count).await;
    fixture.wait_console(&*hypervisor, spec.id, READY).await;
    hypervisor.save(spec.id, &file).await.unwrap();
    std::fs::copy(&file, &older).unwrap();
    hypervisor.restore(spec.id, &file).await.unwrap();
    hypervisor.save(spec.id, &file).await.unwrap();
    std::fs::write(&other, "something else").unwrap();
    for (path, code) in [
        (&older, "not-its-save"),
        (&other, "not-its-save"),
        (&fixture.path("none"), "host-io"),
    ] {
        let error = hypervisor.restore(spec.id, path).await.unwrap_err();
        assert_eq!(error.code(), code, "{error}");
        assert_eq!(
            state(&*hypervisor, spec.id).await,
            Some(stopped(StopReason::Saved))
        );
    }
    // Its name may be another by now.
    std::fs::rename(&file, &other).unwrap();
    hypervisor.restore(spec.id, &other).await.unwrap();
    goes_on(&fixture, &*hypervisor, &spec).await;
    for spec in [created, spec] {
        hypervisor.destroy(spec.id).await.unwrap();
        assert_gone(&fixture, &*hypervisor, spec.id).await;
    }
}

async fn a_save_that_cannot_be_written_changes_nothing(fixture: Fixture) {
    if fixture.cannot("save") {
        return;
    }
    let hypervisor = fixture.open().await;
    let spec = fixture.run(&*hypervisor, Guest::Count).await;
    fixture.wait_console(&*hypervisor, spec.id, READY).await;
    let file = fixture.path("none/save");
    let error = hypervisor.save(spec.id, &file).await.unwrap_err();
    assert_eq!(error.code(), "not-saved");
    assert_eq!(
        state(&*hypervisor, spec.id).await,
        Some(DomainState::Running)
    );
    goes_on(&fixture, &*hypervisor, &spec).await;
    hypervisor.destroy(spec.id).await.unwrap();
}

/// Two sectors: the first makes it a disk, the second is what a guest may look for.
fn disk_with(text: &[u8; 16]) -> Vec<u8> {
    let mut disk = vec![0; 1 << 20];
    disk[510..512].copy_from_slice(b"\x55\xaa");
    disk[1008..1024].copy_from_slice(text);
    disk
}

async fn disks_come_and_go(fixture: Fixture) {
    if fixture.cannot("attach a disk to") {
        return;
    }
    let mut hypervisor = fixture.open().await;
    let content = disk_with(b"content of image");
    let disk = |name: &str, read_only| {
        let image = fixture.path(name);
        std::fs::write(&image, &content).unwrap();
        Disk {
            image,
            format: DiskFormat::Raw,
            read_only,
        }
    };
    let (first, second, third) = (
        disk("first", false),
        disk("second", false),
        disk("third", true),
    );
    let mut spec = fixture.spec(Guest::Count);
    spec.disks = vec![first.clone()];
    hypervisor.create(&spec).await.unwrap();
    let error = hypervisor.attach_disk(spec.id, &second).await.unwrap_err();
    assert_eq!(error.code(), "domain-wrong-state");
    fixture.start(&*hypervisor, &spec, Guest::Count).await;
    fixture
        .inside(&*hypervisor, spec.id, |now| now.contains("vda=0"))
        .await;
    let mut missing = second.clone();
    missing.image = fixture.path("none");
    let error = hypervisor.attach_disk(spec.id, &missing).await.unwrap_err();
    assert_eq!(error.code(), "image-unreadable");

    let begin = Instant::now();
    assert_eq!(hypervisor.attach_disk(spec.id, &second).await.unwrap(), 1);
    println!("a disk in {:?}", begin.elapsed());
    assert_eq!(hypervisor.attach_disk(spec.id, &third).await.unwrap(), 2);
    fixture
        .inside(&*hypervisor, spec.id, |now| {
            now.contains("vdb=0") && now.contains("vdc=1")
        })
        .await;
    drop(hypervisor);
    hypervisor = fixture.open().await;
    let disks = [(0, first.clone()), (1, second.clone()), (2, third.clone())];
    assert_eq!(
        hardware(&*hypervisor, spec.id).await.disks,
        disks.clone().into()
    );
    if !fixture.cannot("save") {
        let file = fixture.path("save");
        hypervisor.save(spec.id, &file).await.unwrap();
        hypervisor.restore(spec.id, &file).await.unwrap();
        assert_eq!(hardware(&*hypervisor, spec.id).await.disks, disks.into());
        fixture
            .inside(&*hypervisor, spec.id, |now| {
                now.contains("vdb=0") && now.contains("vdc=1")
            })
            .await;
    }
    for _ in 0..2 {
        hypervisor.detach_disk(spec.id, 1).await.unwrap();
    }
    fixture
        .inside(&*hypervisor, spec.id, |now| {
            !now.contains("vdb") && now.contains("vdc=1")
        })
        .await;
    assert_eq!(
        hardware(&*hypervisor, spec.id).await.disks,
        [(0, first), (2, third.clone())].into()
    );
    // What was written to it is gone with it, and its place is free.
    assert!(!spec.run_dir.join("disk1.qcow2").exists());
    assert_eq!(hypervisor.attach_disk(spec.id, &third).await.unwrap(), 1);
    for name in ["first", "second", "third"] {
        assert!(
            std::fs::read(fixture.path(name)).unwrap() == content,
            "the image was written"
        );
    }
    // The domain is the one that was made, whatever it has by now.
    hypervisor.create(&spec).await.unwrap();
    hypervisor.destroy(spec.id).await.unwrap();
    assert_gone(&fixture, &*hypervisor, spec.id).await;
}

const INTERFACE: Interface = Interface {
    mac: [0x02, 0xbe, 0, 0, 0, 9],
    address: std::net::Ipv6Addr::new(0xfd58, 0x454e, 0, 0, 0, 0, 0, 9),
    peers: false,
};

async fn interfaces_come_and_go(fixture: Fixture) {
    if fixture.cannot("attach an interface to") {
        return;
    }
    let mut hypervisor = fixture.open().await;
    let spec = fixture.run(&*hypervisor, Guest::Count).await;
    let id = spec.id;
    fixture
        .inside(&*hypervisor, id, |now| now.contains("interfaces 1"))
        .await;
    for _ in 0..2 {
        hypervisor.attach_interface(id, INTERFACE).await.unwrap();
    }
    let mut other = INTERFACE;
    other.address = "fd58:454e::a".parse().unwrap();
    let error = hypervisor.attach_interface(id, other).await.unwrap_err();
    assert_eq!(error.code(), "domain-invalid");
    fixture
        .inside(&*hypervisor, id, |now| now.contains("interfaces 2"))
        .await;
    drop(hypervisor);
    hypervisor = fixture.open().await;
    assert_eq!(hardware(&*hypervisor, id).await.interfaces, [INTERFACE]);
    for _ in 0..2 {
        hypervisor
            .detach_interface(id, INTERFACE.mac)
            .await
            .unwrap();
    }
    assert_eq!(hardware(&*hypervisor, id).await.interfaces, []);
    fixture
        .inside(&*hypervisor, id, |now| now.contains("interfaces 1"))
        .await;
    hypervisor.destroy(id).await.unwrap();
}

async fn memory_and_processors_change_within_their_limits(fixture: Fixture) {
    const MIB: u64 = 1 << 20;
    if fixture.cannot("change the memory of") || fixture.cannot("change the processors of") {
        return;
    }
    let mut hypervisor = fixture.open().await;
    let mut spec = fixture.spec(Guest::Count);
    let id = spec.id;
    spec.vcpus_max = Some(2);
    spec.memory_max_bytes = Some(256 * MIB);
    hypervisor.create(&spec).await.unwrap();
    let error = hypervisor.set_memory(id, 200 * MIB).await.unwrap_err();
    assert_eq!(error.code(), "domain-wrong-state");
    fixture.start(&*hypervisor, &spec, Guest::Count).await;
    // Of 192 MiB, and of 256, as far as its kernel leaves them to others.
    let at_most = |mib: u64| move |now: &str| field(now, "memory") < mib << 10;
    let at_least = |mib: u64| move |now: &str| field(now, "memory") > mib << 10;
    let cpus = |count| move |now: &str| field(now, "cpus") == count;
    fixture.inside(&*hypervisor, id, at_most(192)).await;
    fixture.inside(&*hypervisor, id, cpus(1)).await;
    hypervisor.set_memory(id, 256 * MIB).await.unwrap();
    hypervisor.set_vcpus(id, 2).await.unwrap();
    fixture.inside(&*hypervisor, id, at_least(192)).await;
    fixture.inside(&*hypervisor, id, cpus(2)).await;
    for (error, text) in [
        (
            hypervisor.set_memory(id, 257 * MIB).await.unwrap_err(),
            "domain specification: memory_bytes: 269484032, expected 33554432 to 268435456",
        ),
        (
            hypervisor.set_vcpus(id, 3).await.unwrap_err(),
            "domain specification: vcpus: 3, expected 1 to 2",
        ),
    ] {
        assert_eq!(error.to_string(), text);
    }
    hypervisor.set_memory(id, 160 * MIB).await.unwrap();
    let left = match hypervisor.set_vcpus(id, 1).await {
        Err(error) if fixture.cannot("take processors from") => {
            assert_eq!(error.code(), "unsupported", "{error}");
            2
        }
        result => {
            result.unwrap();
            1
        }
    };
    drop(hypervisor);
    hypervisor = fixture.open().await;
    if !fixture.cannot("save") {
        let file = fixture.path("save");
        hypervisor.save(id, &file).await.unwrap();
        hypervisor.restore(id, &file).await.unwrap();
    }
    fixture.inside(&*hypervisor, id, at_most(160)).await;
    fixture
        .inside(&*hypervisor, id, cpus(u64::from(left)))
        .await;
    let has = hardware(&*hypervisor, id).await;
    assert_eq!((has.vcpus, has.memory_bytes), (left, 160 * MIB));
    hypervisor.set_vcpus(id, 2).await.unwrap();
    fixture.inside(&*hypervisor, id, cpus(2)).await;
    hypervisor.destroy(id).await.unwrap();
}

/// A number that the guest says it has.
fn field(now: &str, name: &str) -> u64 {
    let mut words = now.split_whitespace();
    words.find(|word| *word == name);
    words.next().unwrap().parse().unwrap()
}

async fn hardware(hypervisor: &dyn Hypervisor, id: DomainId) -> xbee_hypervisor::Hardware {
    let list = hypervisor.list().await.unwrap();
    let found = list.into_iter().find(|info| info.id == id);
    found.unwrap().hardware
}

async fn a_failed_create_leaves_nothing(fixture: Fixture) {
    let hypervisor = fixture.open().await;
    let mut spec = fixture.spec(Guest::Idle);
    spec.disks = vec![Disk {
        image: fixture.path("missing.img"),
        format: DiskFormat::Raw,
        read_only: false,
    }];
    let error = hypervisor.create(&spec).await.unwrap_err();
    assert_eq!(error.code(), "image-unreadable");
    assert_gone(&fixture, &*hypervisor, spec.id).await;
    // With the reason gone, it works.
    spec.disks.clear();
    hypervisor.create(&spec).await.unwrap();
    hypervisor.destroy(spec.id).await.unwrap();
}

async fn user_errors_say_what_to_do(fixture: Fixture) {
    let hypervisor = fixture.open().await;
    let path = fixture.path("file");
    let spec = |change: &dyn Fn(&mut xbee_hypervisor::DomainSpec)| {
        let mut spec = fixture.spec(Guest::Idle);
        change(&mut spec);
        spec
    };
    let disk = |format| {
        let image = path.clone();
        spec(&move |spec| {
            spec.disks = vec![Disk {
                image: image.clone(),
                format,
                read_only: true,
            }];
        })
    };
    let without_kernel = |disks: Vec<Disk>| {
        spec(&move |spec| {
            (spec.kernel, spec.initramfs) = (None, None);
            spec.kernel_args.clear();
            spec.disks.clone_from(&disks);
        })
    };
    let name = path.display();
    std::fs::File::create(&path)
        .unwrap()
        .write_all(b"\x1f\x8b\x08\x00 and so on")
        .unwrap();
    let missing = fixture.path("none");
    for (spec, code, text) in [
        (
            disk(DiskFormat::Raw),
            "not-an-image",
            format!(
                "{name} is not a disk image: it holds gzip data: say Compression gzip in the document"
            ),
        ),
        (
            spec(&|spec| spec.kernel = Some(path.clone())),
            "unknown-kernel",
            format!(
                "{name} is no kernel that can be started (an ELF vmlinux with a PVH note, or a bzImage): \
                 it holds gzip data: say Compression gzip in the document"
            ),
        ),
        (
            spec(&|spec| spec.kernel = Some(missing.clone())),
            "image-unreadable",
            format!("cannot open the kernel {}", missing.display()),
        ),
        (
            spec(&|spec| spec.initramfs = Some(missing.clone())),
            "image-unreadable",
            format!("cannot open the initramfs {}", missing.display()),
        ),
        (
            spec(&|spec| spec.vcpus = 0),
            "domain-invalid",
            "domain specification: vcpus: 0, expected 1 to 255".to_owned(),
        ),
        (
            spec(&|spec| spec.memory_bytes = 1 << 20),
            "domain-invalid",
            "domain specification: memory_bytes: 1048576, expected at least 33554432 (32 MiB)"
                .to_owned(),
        ),
        (
            spec(&|spec| spec.vcpus_max = Some(0)),
            "domain-invalid",
            "domain specification: vcpus_max: 0, expected 1 to 255".to_owned(),
        ),
        (
            spec(&|spec| spec.memory_max_bytes = Some(32 << 20)),
            "domain-invalid",
            "domain specification: memory_max_bytes: 33554432, expected at least 201326592"
                .to_owned(),
        ),
        (
            spec(&|spec| spec.kernel = None),
            "domain-invalid",
            "domain specification: initramfs: there is no kernel to take it".to_owned(),
        ),
        (
            spec(&|spec| (spec.kernel, spec.initramfs) = (None, None)),
            "domain-invalid",
            "domain specification: kernel_args: there is no kernel to take them".to_owned(),
        ),
        (
            without_kernel(vec![]),
            "domain-invalid",
            "domain specification: disks: none, and there is no kernel: the firmware boots the first disk"
                .to_owned(),
        ),
        (
            without_kernel(disk(DiskFormat::Raw).disks),
            "domain-invalid",
            "domain specification: disks: the first, which the firmware boots, is read-only: it is used through an overlay"
                .to_owned(),
        ),
        (
            without_kernel(vec![disk(DiskFormat::Raw).disks[0].clone(); 26]),
            "domain-invalid",
            "domain specification: disks: more than 25, as many as a domain without a kernel has"
                .to_owned(),
        ),
        (
            spec(&|spec| spec.cid = 2),
            "domain-invalid",
            "domain specification: cid: 2, expected 3 to 4294967294".to_owned(),
        ),
    ] {
        let error = hypervisor.create(&spec).await.unwrap_err();
        assert_eq!((error.code(), error.to_string()), (code, text));
        assert_gone(&fixture, &*hypervisor, spec.id).await;
    }
    let error = hypervisor
        .create(&spec(&|spec| spec.memory_bytes = 1 << 60))
        .await
        .unwrap_err();
    assert_eq!(error.code(), "too-much-memory");
    assert!(
        error
            .to_string()
            .starts_with("the domain asks for 1099511627776 MiB of memory, this host has "),
        "{error}"
    );
}

fn stopped(reason: StopReason) -> DomainState {
    DomainState::Stopped { reason }
}

/// Waits for a domain's end.
async fn end(hypervisor: &dyn Hypervisor, id: DomainId) -> StopReason {
    let mut events = hypervisor.events();
    let wait = async {
        loop {
            if let Some(DomainState::Stopped { reason }) = state(hypervisor, id).await {
                return reason;
            }
            events.recv().await.unwrap();
        }
    };
    timeout(LIMIT, wait).await.expect("the domain does not end")
}

async fn assert_gone(fixture: &Fixture, hypervisor: &dyn Hypervisor, id: DomainId) {
    assert_eq!(state(hypervisor, id).await, None);
    assert_ne!(fixture.process_exists(id), Some(true));
    let left: HashSet<_> = match std::fs::read_dir(fixture.path("domains")) {
        Ok(entries) => entries.map(|entry| entry.unwrap().file_name()).collect(),
        Err(_) => HashSet::new(),
    };
    assert!(
        !left.contains(std::ffi::OsStr::new(&id.to_string())),
        "{left:?}"
    );
}

async fn join_all(futures: impl Iterator<Item = impl Future<Output = ()>>) {
    let mut futures: Vec<_> = futures.map(Box::pin).collect();
    std::future::poll_fn(|context| {
        futures.retain_mut(|future| future.as_mut().poll(context).is_pending());
        if futures.is_empty() {
            std::task::Poll::Ready(())
        } else {
            std::task::Poll::Pending
        }
    })
    .await;
}
