//! A kernel that cannot run in a PVH container runs without hardware virtualization.

use std::path::{Path, PathBuf};

use xbee_hypervisor::StopReason;

use crate::support::{Fixture, Guest, READY};

/// Types of ELF notes of the entry points (Xen public header `elfnote.h`).
const PVH: u8 = 18;
const PV: u8 = 1;

/// A copy of the kernel without an entry point: its note is made one of a type that nobody knows.
fn without(fixture: &Fixture, kernel: &Path, note: u8) -> PathBuf {
    let mut bytes = std::fs::read(kernel).unwrap();
    let is_note = |at: usize| {
        // Lengths of the owner's name and of the content, which is an address; the type; the name.
        bytes[at..].starts_with(&[4, 0, 0, 0])
            && matches!(bytes[at + 4..at + 8], [4 | 8, 0, 0, 0])
            && bytes[at + 8..at + 16] == [note, 0, 0, 0, b'X', b'e', b'n', 0]
    };
    let found: Vec<_> = (0..bytes.len() - 16)
        .step_by(4)
        .filter(|at| is_note(*at))
        .collect();
    assert!(!found.is_empty(), "the kernel has no note of type {note}");
    for at in found {
        bytes[at + 8] = 0x7e;
    }
    let path = fixture.path(&format!("vmlinux-without-{note}"));
    std::fs::write(&path, bytes).unwrap();
    path
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kernel_without_an_entry_point_for_pvh_runs_as_pv() {
    let Some(fixture) = Fixture::xen() else {
        return;
    };
    let hypervisor = fixture.open().await;
    let mut spec = fixture.spec(Guest::PowerOff);
    let kernel = without(&fixture, spec.kernel.as_ref().unwrap(), PVH);
    spec.kernel = Some(kernel.clone());
    hypervisor.create(&spec).await.unwrap();
    hypervisor.start(spec.id).await.unwrap();
    let described = std::fs::read_to_string(spec.run_dir.join("domain.xml")).unwrap();
    assert!(described.contains("<type>linux</type>"), "{described}");
    fixture.wait_console(&*hypervisor, spec.id, READY).await;
    assert_eq!(
        crate::end(&*hypervisor, spec.id).await,
        StopReason::GuestShutdown
    );
    hypervisor.destroy(spec.id).await.unwrap();
    // With neither it is no kernel for Xen.
    spec.kernel = Some(without(&fixture, &kernel, PV));
    let error = hypervisor.create(&spec).await.unwrap_err();
    assert_eq!(error.code(), "unknown-kernel", "{error}");
}
