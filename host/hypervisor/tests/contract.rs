//! The contract of [`Hypervisor`]: every test runs against every back end.
//!
//! The QEMU tests boot a real kernel, taken with its initial RAM file system from `XBEE_IMAGES`
//! (default `~/.cache/xbee/images`).
#![allow(clippy::unwrap_used)]

mod support;

use support::{Fixture, Guest};

/// Makes `mod sim` and `mod qemu` of the functions named, each run with its back end's fixture.
macro_rules! contract {
    ($($name:ident),* $(,)?) => {
        mod qemu {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $name() {
                let Some(fixture) = super::Fixture::qemu() else { return };
                super::$name(fixture).await;
            })*
        }
    };
}

contract!(a_domain_is_made_runs_and_is_destroyed);

async fn a_domain_is_made_runs_and_is_destroyed(fixture: Fixture) {
    let hypervisor = fixture.open().await;
    let spec = fixture.spec(Guest::Idle);
    hypervisor.create(&spec).await.unwrap();
    hypervisor.start(spec.id).await.unwrap();
    fixture
        .wait_console(&*hypervisor, spec.id, support::READY)
        .await;
    hypervisor.destroy(spec.id).await.unwrap();
    assert!(!spec.run_dir.exists());
}
