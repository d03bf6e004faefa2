//! What is added to a domain and taken from it while it runs: disks, interfaces, processors, memory.
//!
//! The record has a device before QEMU has it, and until QEMU has it no more: so a restart of this process
//! finds what was under way.

use std::collections::HashSet;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::broadcast;

use super::card::Side;
use super::command::{self, PLUG_BUS, base_set, overlay_set};
use super::domain::Domain;
use super::qmp::{Qmp, QmpError};
use super::{Net, card, gateway, tap};
use crate::bridge::Network;
use crate::domain::{Disk, DomainState, Hardware, Interface};
use crate::error::Error;
use crate::spec;
use crate::work::blocking;

/// Slots of a bus (PCI Local Bus Specification 3.0, section 3.2.2.3.1).
const SLOTS: usize = 32;

/// How long a guest may take to let a device go.
const LET_GO_LIMIT: Duration = Duration::from_secs(30);

const COLD_DISK: &str = "it was started with this disk, on a bus that nothing is taken from";
const COLD_INTERFACE: &str =
    "it was started with this interface, on a bus that nothing is taken from";
const COLD_VCPU: &str = "a machine keeps the processors that it was started with";
const TCG_VCPU: &str =
    "QEMU's TCG ends (7.2) when a processor is added in the place of one that was taken";
const NO_BALLOON: &str =
    "it was not made with more memory than it has, so it has no memory balloon";

impl Domain {
    /// What it is to have now.
    pub(crate) fn hardware(&self) -> Hardware {
        self.kept.hardware()
    }

    fn control(&self, operation: &'static str) -> Result<Qmp, Error> {
        match (self.life.get(), self.qmp()) {
            (DomainState::Running | DomainState::Paused, Some(qmp)) => Ok(qmp),
            _ => Err(self.life.wrong(operation)),
        }
    }

    fn failed(&self, operation: &'static str, error: QmpError) -> Error {
        match self.life.get() {
            // It ended just now: that says more than a closed connection.
            DomainState::Stopped { .. } => self.life.wrong(operation),
            _ => Error::Control {
                id: self.spec.id,
                operation,
                source: Box::new(error),
            },
        }
    }

    /// Attaches a disk. The caller holds `operation`.
    pub(crate) async fn attach_disk(self: &Arc<Self>, disk: Disk) -> Result<usize, Error> {
        let qmp = self.control("attach a disk to")?;
        let index = spec::free_disk(&self.spec, &self.hardware())?;
        let files = {
            let (dir, disk) = (self.dir.clone(), disk.clone());
            blocking(move || {
                dir.remove_overlay(index)?;
                let made = dir
                    .make_disk_for_qemu(index, &disk)
                    .and_then(|()| dir.open_disk_for_qemu(index, &disk));
                if made.is_err() {
                    dir.remove_overlay(index)?;
                }
                made
            })
            .await?
        };
        let new = disk.clone();
        self.kept
            .change_hardware(move |hardware| {
                hardware.disks.insert(index, new);
            })
            .await?;
        let plugged = async {
            let set = json!({ "fdset-id": base_set(index) });
            qmp.give("add-fd", set, Some(files.base.into())).await?;
            if let Some(overlay) = files.overlay {
                let set = json!({ "fdset-id": overlay_set(index) });
                qmp.give("add-fd", set, Some(overlay.into())).await?;
            }
            for node in command::disk_nodes(index, &disk) {
                qmp.give("blockdev-add", node, None).await?;
            }
            let mut device = command::disk_device(index, &disk);
            device["bus"] = PLUG_BUS.into();
            // Slot 0 is the bus's own.
            device["addr"] = format!("{:x}", index + 1).into();
            qmp.give("device_add", device, None).await
        };
        if let Err(error) = plugged.await {
            self.drop_disk(&qmp, index, &disk).await?;
            return Err(self.failed("attach the disk", error));
        }
        Ok(index)
    }

    /// Detaches a disk. The caller holds `operation`.
    pub(crate) async fn detach_disk(self: &Arc<Self>, index: usize) -> Result<(), Error> {
        let qmp = self.control("detach a disk from")?;
        let Some(disk) = self.hardware().disks.remove(&index) else {
            return Ok(());
        };
        if index < self.spec.disks.len() {
            return Err(self.cannot("detach a disk from", COLD_DISK));
        }
        self.unplug(&qmp, &command::disk_id(index))
            .await
            .map_err(|error| self.failed("detach the disk", error))?;
        self.drop_disk(&qmp, index, &disk).await
    }

    /// Removes what is behind a disk that no guest has.
    async fn drop_disk(
        self: &Arc<Self>,
        qmp: &Qmp,
        index: usize,
        disk: &Disk,
    ) -> Result<(), Error> {
        for node in command::disk_nodes(index, disk).into_iter().rev() {
            let name = json!({ "node-name": node["node-name"] });
            if let Err(error) = qmp.give("blockdev-del", name, None).await {
                // It may never have been made.
                tracing::debug!(domain = %self.spec.id, %error, "blockdev-del");
            }
        }
        for set in [base_set(index), overlay_set(index)] {
            let set = json!({ "fdset-id": set });
            if let Err(error) = qmp.give("remove-fd", set, None).await {
                tracing::debug!(domain = %self.spec.id, %error, "remove-fd");
            }
        }
        self.kept
            .change_hardware(move |hardware| {
                hardware.disks.remove(&index);
            })
            .await?;
        let dir = self.dir.clone();
        blocking(move || dir.remove_overlay(index)).await
    }

    /// Makes a card's other side for QEMU: has the switch serve it, and starts what serves its guest's way out; or makes
    /// a port of the bridge.
    pub(crate) async fn connect_card(
        &self,
        interface: &Interface,
        net: Net<'_>,
    ) -> Result<(Side, OwnedFd), Error> {
        let Some(bridge) = net.bridge else {
            let socket = self.dir.card_socket(interface.mac);
            let card = card::spec(self.spec.cid, &socket, interface);
            net.switch.attach(self.spec.id, card).await?;
            let uplink = self.dir.uplink_socket(interface.mac);
            gateway::start(net.config, &self.spec, interface, &uplink, net.switch).await?;
            let connection = card::connect(&socket).map_err(Error::io("connect to", socket))?;
            return Ok((Side::Switch, connection));
        };
        bridge.check(Some(interface)).await?;
        let mac = interface.mac;
        let tap = blocking(move || tap::create(mac)).await?;
        let mut interfaces = self.hardware().interfaces;
        interfaces.retain(|known| known.mac != mac);
        interfaces.push(*interface);
        self.note_ports(bridge, interfaces);
        bridge.apply(Some(self.spec.id)).await?;
        Ok((Side::Bridge, tap))
    }

    /// Tells the bridge of the ports that the domain has.
    pub(crate) fn note_ports(&self, bridge: &Network, interfaces: Vec<Interface>) {
        let named = interfaces
            .into_iter()
            .map(|interface| (tap::name(interface.mac), interface))
            // Those of before the bridge was configured have none.
            .filter(|(name, _)| Path::new("/sys/class/net").join(name).exists());
        bridge.note(&self.spec, named.collect());
    }

    /// Takes away what was at a card's other side.
    async fn disconnect_card(&self, mac: [u8; 6], net: Net<'_>) -> Result<(), Error> {
        match net.bridge {
            // The device itself goes with QEMU's descriptor.
            Some(bridge) => bridge.leave_one(self.spec.id, mac).await,
            None => net.switch.detach(self.spec.id, self.spec.cid, mac).await,
        }
    }

    /// Attaches an interface. The caller holds `operation`.
    pub(crate) async fn attach_interface(
        self: &Arc<Self>,
        interface: Interface,
        net: Net<'_>,
    ) -> Result<(), Error> {
        let qmp = self.control("attach an interface to")?;
        let hardware = self.hardware();
        if !spec::check_new_interface(&hardware, &interface)? {
            return Ok(());
        }
        let slot = self.free_slot(&qmp, &hardware).await?;
        let mac = interface.mac;
        self.kept
            .change_hardware(move |hardware| hardware.interfaces.push(interface))
            .await?;
        let (side, connection) = match self.connect_card(&interface, net).await {
            Ok(connected) => connected,
            Err(error) => {
                self.disconnect_card(mac, net).await?;
                self.drop_interface(&qmp, mac).await?;
                return Err(error);
            }
        };
        let plugged = async {
            let name = card::id(mac);
            let fd = json!({ "fdname": name });
            qmp.give("getfd", fd, Some(connection)).await?;
            qmp.give("netdev_add", card::backend(side, mac, &name), None)
                .await?;
            let mut device = card::device(side, mac);
            device["bus"] = PLUG_BUS.into();
            device["addr"] = format!("{slot:x}").into();
            qmp.give("device_add", device, None).await
        };
        if let Err(error) = plugged.await {
            let error = self.failed("attach the interface", error);
            self.disconnect_card(mac, net).await?;
            self.drop_interface(&qmp, mac).await?;
            return Err(error);
        }
        Ok(())
    }

    /// Detaches an interface. The caller holds `operation`.
    pub(crate) async fn detach_interface(
        self: &Arc<Self>,
        mac: [u8; 6],
        net: Net<'_>,
    ) -> Result<(), Error> {
        let qmp = self.control("detach an interface from")?;
        let hardware = self.hardware();
        if !hardware.interfaces.iter().any(|known| known.mac == mac) {
            return Ok(());
        }
        if self.spec.interface.is_some_and(|first| first.mac == mac) {
            return Err(self.cannot("detach an interface from", COLD_INTERFACE));
        }
        self.unplug(&qmp, &card::id(mac))
            .await
            .map_err(|error| self.failed("detach the interface", error))?;
        // Not only QEMU is told: it may be its guest's by now.
        self.disconnect_card(mac, net).await?;
        self.drop_interface(&qmp, mac).await
    }

    /// A place on the bus for what is added, from the end: disks have theirs from the beginning.
    async fn free_slot(&self, qmp: &Qmp, hardware: &Hardware) -> Result<usize, Error> {
        let mut taken = HashSet::new();
        for interface in &hardware.interfaces {
            let path = format!("/machine/peripheral/{}", card::id(interface.mac));
            let place = json!({ "path": path, "property": "addr" });
            let answer = qmp.give("qom-get", place, None).await;
            let answer = answer.map_err(|error| self.failed("look for a free slot", error))?;
            // Slots have eight functions each.
            taken.extend(answer.as_u64().map(|place| place / 8));
        }
        (spec::DISKS_MAX + 1..SLOTS)
            .rev()
            .find(|slot| !taken.contains(&(*slot as u64)))
            .ok_or(Error::InvalidSpec {
                field: "interface",
                detail: format!(
                    "more than {} on a running domain",
                    SLOTS - spec::DISKS_MAX - 1
                ),
            })
    }

    /// Removes what is behind an interface that no guest has.
    async fn drop_interface(self: &Arc<Self>, qmp: &Qmp, mac: [u8; 6]) -> Result<(), Error> {
        let socket = json!({ "id": card::backend_id(mac) });
        if let Err(error) = qmp.give("netdev_del", socket, None).await {
            // It may never have been made.
            tracing::debug!(domain = %self.spec.id, %error, "netdev_del");
        }
        self.kept
            .change_hardware(move |hardware| hardware.interfaces.retain(|known| known.mac != mac))
            .await
    }

    /// Has the guest let a device go. One that is not there is fine.
    async fn unplug(&self, qmp: &Qmp, device: &str) -> Result<(), QmpError> {
        let mut removed = qmp.removed();
        // Of a processor only this part is said to be gone.
        let part = format!("/machine/peripheral/{device}/lapic");
        match qmp.give("device_del", json!({ "id": device }), None).await {
            Err(QmpError::NoDevice(_)) => return Ok(()),
            result => result?,
        };
        let wait = async {
            loop {
                match removed.recv().await {
                    Ok(name) if name == device || name == part => return Ok(()),
                    Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => {}
                    Err(broadcast::error::RecvError::Closed) => return Err(QmpError::Closed),
                }
            }
        };
        tokio::time::timeout(LET_GO_LIMIT, wait)
            .await
            .unwrap_or_else(|_| {
                Err(QmpError::Timeout {
                    limit_ms: LET_GO_LIMIT.as_millis(),
                })
            })
    }

    /// Has the guest use so many processors. The caller holds `operation`.
    pub(crate) async fn set_vcpus(self: &Arc<Self>, vcpus: u32, kvm: bool) -> Result<(), Error> {
        let qmp = self.control("change the processors of")?;
        spec::check_vcpus(&self.spec, vcpus)?;
        if vcpus < self.spec.vcpus {
            return Err(self.cannot("change the processors of", COLD_VCPU));
        }
        if vcpus < self.hardware().vcpus && !kvm {
            return Err(self.cannot("change the processors of", TCG_VCPU));
        }
        self.kept
            .change_hardware(move |hardware| hardware.vcpus = vcpus)
            .await?;
        self.plug_vcpus(&qmp)
            .await
            .map_err(|error| self.failed("change the processors", error))
    }

    async fn plug_vcpus(&self, qmp: &Qmp) -> Result<(), QmpError> {
        let vcpus = self.hardware().vcpus as usize;
        let answer = qmp.execute("query-hotpluggable-cpus").await?;
        let Value::Array(mut places) = answer else {
            return Err(QmpError::Protocol("no list of processors"));
        };
        // QEMU names the highest first.
        places.reverse();
        for (index, place) in places.iter().enumerate() {
            let id = format!("cpu{index}");
            match (index < vcpus, place.get("qom-path")) {
                (true, None) => {
                    let mut device = place["props"].clone();
                    device["driver"] = place["type"].clone();
                    device["id"] = id.into();
                    qmp.give("device_add", device, None).await?;
                }
                (false, Some(_)) => self.unplug(qmp, &id).await?,
                _ => {}
            }
        }
        Ok(())
    }

    /// Has the guest give memory back or take more. The caller holds `operation`.
    pub(crate) async fn set_memory(self: &Arc<Self>, bytes: u64) -> Result<(), Error> {
        let qmp = self.control("change the memory of")?;
        spec::check_memory(&self.spec, bytes)?;
        if !self.has_balloon() {
            return Err(self.cannot("change the memory of", NO_BALLOON));
        }
        self.kept
            .change_hardware(move |hardware| hardware.memory_bytes = bytes)
            .await?;
        self.inflate(&qmp)
            .await
            .map_err(|error| self.failed("change the memory", error))
    }

    fn has_balloon(&self) -> bool {
        self.spec.memory_limit_bytes() > self.spec.memory_bytes
    }

    async fn inflate(&self, qmp: &Qmp) -> Result<(), QmpError> {
        let value = json!({ "value": self.hardware().memory_bytes });
        qmp.give("balloon", value, None).await.map(drop)
    }

    /// Makes a domain that runs what the record says it is, after its start and after a restart of this
    /// process: a disk that the guest does not have is forgotten.
    pub(super) async fn agree(self: &Arc<Self>) -> Result<(), Error> {
        let qmp = self.control("look at")?;
        let failed = |error| self.failed("say what it has", error);
        let hardware = self.hardware();
        let later = hardware.disks.range(self.spec.disks.len()..);
        let path = json!({ "path": "/machine/peripheral" });
        let answer = qmp.give("qom-list", path, None).await.map_err(failed)?;
        let names = answer.as_array().into_iter().flatten();
        let there: HashSet<&str> = names.filter_map(|one| one["name"].as_str()).collect();
        for (index, disk) in later {
            if !there.contains(command::disk_id(*index).as_str()) {
                self.drop_disk(&qmp, *index, disk).await?;
            }
        }
        for interface in &hardware.interfaces {
            if !there.contains(card::id(interface.mac).as_str()) {
                self.drop_interface(&qmp, interface.mac).await?;
            }
        }
        if hardware.vcpus != self.spec.vcpus {
            self.plug_vcpus(&qmp).await.map_err(failed)?;
        }
        if self.has_balloon() {
            self.inflate(&qmp).await.map_err(failed)?;
        }
        Ok(())
    }
}
