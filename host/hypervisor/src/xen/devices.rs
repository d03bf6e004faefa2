//! What is added to a domain and taken from it while it runs: disks, interfaces, memory, processors.
//!
//! The record says first what the domain is to have, so that a restart of this process finds what was
//! under way.

use std::sync::Arc;
use std::time::Duration;

use super::channel;
use super::domain::Domain;
use super::files::{self, Server};
use super::memory::Promises;
use super::{port, xml};
use crate::domain::{Disk, DomainState, Hardware, Interface};
use crate::error::{Error, chain};
use crate::spec;
use crate::work::blocking;

const MIB: u64 = 1 << 20;

/// Pause between looks at whether QEMU serves a disk.
const SERVED_PAUSE: Duration = Duration::from_millis(100);

/// Why a disk cannot be had by a domain that was started without one.
const NO_QEMU: &str = "its disk would be served by a QEMU, which is started only with a domain that has such a \
     disk from the beginning";

const EMULATED: &str = "its firmware has booted from it, by a controller that lets no disk go";

impl Domain {
    fn is_changeable(&self, operation: &'static str) -> Result<(), Error> {
        match self.life.get() {
            DomainState::Running | DomainState::Paused => Ok(()),
            _ => Err(self.life.wrong(operation)),
        }
    }

    /// What it is to have now.
    pub(crate) fn hardware(&self) -> Hardware {
        self.kept.hardware()
    }

    /// Attaches a disk. The caller holds `operation`.
    pub(crate) async fn attach_disk(
        self: &Arc<Self>,
        disk: Disk,
        limit: Duration,
    ) -> Result<usize, Error> {
        self.is_changeable("attach a disk to")?;
        let index = spec::free_disk(&self.spec, &self.hardware())?;
        if files::server(&disk) == Server::Qemu && !self.has_qemu().await? {
            return Err(Error::Unsupported {
                id: self.spec.id,
                operation: "attach a disk to",
                reason: NO_QEMU,
            });
        }
        let xml = {
            let (dir, disk, spec) = (self.dir.clone(), disk.clone(), self.spec.clone());
            blocking(move || {
                dir.remove_overlay(index)?;
                let made = dir.make_disk_for_xen(index, &disk);
                if made.is_err() {
                    dir.remove_overlay(index)?;
                }
                made?;
                xml::disk(&spec, index, &disk, &files::source(index, &disk, &dir))
            })
            .await?
        };
        self.kept
            .change_hardware(move |hardware| {
                hardware.disks.insert(index, disk);
            })
            .await?;
        let attached = match self.libvirt.attach(self.spec.id, xml.clone()).await {
            Ok(()) => self.served(index, limit).await,
            Err(error) => Err(error),
        };
        if let Err(error) = attached {
            // A guest's kernel fails when it is restored with a disk that nobody serves.
            self.libvirt.detach(self.spec.id, xml).await?;
            self.forget_disk(index).await?;
            return Err(self.refused("attach the disk", error));
        }
        Ok(index)
    }

    /// Detaches a disk. The caller holds `operation`.
    pub(crate) async fn detach_disk(self: &Arc<Self>, index: usize) -> Result<(), Error> {
        self.is_changeable("detach a disk from")?;
        let Some(disk) = self.hardware().disks.remove(&index) else {
            return Ok(());
        };
        if xml::is_emulated(&self.spec, index) {
            return Err(Error::Unsupported {
                id: self.spec.id,
                operation: "detach a disk from",
                reason: EMULATED,
            });
        }
        let xml = xml::disk(
            &self.spec,
            index,
            &disk,
            &files::source(index, &disk, &self.dir),
        )?;
        // Until it is gone the record has it: what was cut off has not happened.
        self.libvirt
            .detach(self.spec.id, xml)
            .await
            .map_err(|error| self.refused("detach the disk", error))?;
        self.forget_disk(index).await
    }

    async fn forget_disk(self: &Arc<Self>, index: usize) -> Result<(), Error> {
        self.kept
            .change_hardware(move |hardware| {
                hardware.disks.remove(&index);
            })
            .await?;
        let dir = self.dir.clone();
        blocking(move || dir.remove_overlay(index)).await
    }

    /// Attaches an interface. The caller holds `operation`.
    pub(crate) async fn attach_interface(
        self: &Arc<Self>,
        interface: Interface,
        bridge: &str,
    ) -> Result<(), Error> {
        self.is_changeable("attach an interface to")?;
        if !spec::check_new_interface(&self.hardware(), &interface)? {
            return Ok(());
        }
        self.network.check(Some(&interface)).await?;
        let xml = xml::interface(&self.spec, &interface, bridge, Some(port::NO_SCRIPT));
        self.kept
            .change_hardware(move |hardware| hardware.interfaces.push(interface))
            .await?;
        let attached = match self.libvirt.attach(self.spec.id, xml.clone()).await {
            Ok(()) => self.join_network().await,
            Err(error) => Err(error),
        };
        if let Err(error) = attached {
            self.libvirt.detach(self.spec.id, xml).await?;
            self.forget_interface(interface.mac).await?;
            return Err(self.refused("attach the interface", error));
        }
        Ok(())
    }

    /// Detaches an interface. The caller holds `operation`.
    pub(crate) async fn detach_interface(
        self: &Arc<Self>,
        mac: [u8; 6],
        bridge: &str,
    ) -> Result<(), Error> {
        self.is_changeable("detach an interface from")?;
        let hardware = self.hardware();
        let Some(interface) = hardware.interfaces.iter().find(|known| known.mac == mac) else {
            return Ok(());
        };
        self.libvirt
            .detach(
                self.spec.id,
                xml::interface(&self.spec, interface, bridge, Some(port::NO_SCRIPT)),
            )
            .await
            .map_err(|error| self.refused("detach the interface", error))?;
        self.forget_interface(mac).await
    }

    async fn forget_interface(self: &Arc<Self>, mac: [u8; 6]) -> Result<(), Error> {
        self.kept
            .change_hardware(move |hardware| hardware.interfaces.retain(|known| known.mac != mac))
            .await?;
        self.join_network().await
    }

    /// Has the guest give memory back or take more. The caller holds `operation`.
    pub(crate) async fn set_memory(
        self: &Arc<Self>,
        bytes: u64,
        promises: &Arc<Promises>,
    ) -> Result<(), Error> {
        self.is_changeable("change the memory of")?;
        spec::check_memory(&self.spec, bytes)?;
        let more = bytes.saturating_sub(self.hardware().memory_bytes);
        let _promise = promises.promise(more, &self.libvirt).await?;
        self.kept
            .change_hardware(move |hardware| hardware.memory_bytes = bytes)
            .await?;
        self.apply_memory()
            .await
            .map_err(|error| self.refused("change the memory", error))
    }

    async fn apply_memory(&self) -> Result<(), Error> {
        let kib = self.hardware().memory_bytes.div_ceil(MIB) << 10;
        self.libvirt.set_memory(self.spec.id, kib).await
    }

    /// Has the guest use so many of its processors. The caller holds `operation`.
    pub(crate) async fn set_vcpus(self: &Arc<Self>, vcpus: u32) -> Result<(), Error> {
        self.is_changeable("change the processors of")?;
        spec::check_vcpus(&self.spec, vcpus)?;
        self.kept
            .change_hardware(move |hardware| hardware.vcpus = vcpus)
            .await?;
        self.apply_vcpus()
            .await
            .map_err(|error| self.refused("change the processors", error))
    }

    /// Tells the guest's kernel which of its processors to use. All of them are there when it boots:
    /// a PVH kernel does not take up others later. libvirt would refuse more than the machine has.
    pub(super) async fn apply_vcpus(&self) -> Result<(), Error> {
        let max = self.spec.vcpus_limit();
        if max == 1 {
            return Ok(());
        }
        let Some(domid) = self.libvirt.domid(self.spec.id).await? else {
            return Err(self.life.wrong("change the processors of"));
        };
        let vcpus = self.hardware().vcpus;
        blocking(move || {
            let mut store = channel::store()?;
            for index in 0..max {
                let word = if index < vcpus { "online" } else { "offline" };
                let path = format!("/local/domain/{domid}/cpu/{index}/availability");
                store
                    .write(&path, word)
                    .map_err(|error| channel::broken(&error))?;
            }
            Ok(())
        })
        .await
    }

    /// Takes from a domain that has just begun the processors that it is not to have.
    pub(super) async fn limit_vcpus(&self) {
        if self.hardware().vcpus < self.spec.vcpus_limit()
            && let Err(error) = self.apply_vcpus().await
        {
            // It may have ended already.
            tracing::warn!(domain = %self.spec.id, error = chain(&error), "it has all its processors");
        }
    }

    /// What libvirt does not have of what the record says was under way when the process before this
    /// one ended: it is forgotten. The other way round does not happen, since the record is first to
    /// have a device and last to have it not.
    pub(super) async fn agree(self: &Arc<Self>) -> Result<(), Error> {
        let there = self.libvirt.devices(self.spec.id).await?;
        let hardware = self.hardware();
        for index in hardware.disks.keys().copied() {
            if !there.disks.contains(&xml::disk_name(&self.spec, index)?) {
                self.forget_disk(index).await?;
            }
        }
        for interface in &hardware.interfaces {
            if !there.macs.contains(&xml::mac(interface)) {
                self.forget_interface(interface.mac).await?;
            }
        }
        self.apply_memory().await?;
        self.apply_vcpus().await
    }

    /// Whether libvirt's tools have started a QEMU for the domain.
    async fn has_qemu(&self) -> Result<bool, Error> {
        let Some(domid) = self.libvirt.domid(self.spec.id).await? else {
            return Ok(false);
        };
        let path = format!("/local/domain/0/device-model/{domid}/state");
        let state = blocking(move || channel::read(&path)).await?;
        Ok(state.as_deref() == Some("running"))
    }

    /// Waits until somebody serves the disk: libvirt says nothing of a QEMU that cannot.
    async fn served(&self, index: usize, limit: Duration) -> Result<(), Error> {
        let Some(domid) = self.libvirt.domid(self.spec.id).await? else {
            return Err(self.life.wrong("attach a disk to"));
        };
        let frontend = format!(
            "/local/domain/{domid}/device/vbd/{}",
            xml::disk_number(index)
        );
        let wait = async {
            loop {
                let path = format!("{frontend}/backend");
                let state = blocking(move || match channel::read(&path)? {
                    Some(backend) => channel::read(&format!("{backend}/state")),
                    None => Ok(None),
                })
                .await?;
                // Past "initialising" (Xen, public/io/xenbus.h).
                if matches!(state.as_deref(), Some("2" | "3" | "4")) {
                    return Ok(());
                }
                tokio::time::sleep(SERVED_PAUSE).await;
            }
        };
        tokio::time::timeout(limit, wait)
            .await
            .unwrap_or_else(|elapsed| {
                Err(Error::Control {
                    id: self.spec.id,
                    operation: "serve the disk",
                    source: elapsed.into(),
                })
            })
    }

    fn refused(&self, operation: &'static str, error: Error) -> Error {
        match (self.life.get(), error) {
            // It ended just now: that says more.
            (DomainState::Stopped { .. }, _) => self.life.wrong(operation),
            (_, error @ Error::Control { .. }) => error,
            (_, error) => Error::Control {
                id: self.spec.id,
                operation,
                source: error.into(),
            },
        }
    }
}
