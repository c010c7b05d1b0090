//! Descriptions of a virtual machine, read into [`imgtool_core::Machine`] and written from it.
//!
//! | module | dialect |
//! |---|---|
//! | [`ovf`] | the descriptor of an OVF package or OVA |
//! | [`libvirt`] | the domain XML of libvirt |
//! | [`proxmox`] | `qemu-server.conf` of Proxmox VE, as VMA archives have it |
//!
//! Each dialect has a `parse`, which takes untrusted bytes, and a `print`, whose result lists what the
//! dialect has no place for. Nothing that runs a program on the host or takes a device of the host is carried
//! over. The crate opens no file.

use imgtool_core::Machine;
use imgtool_core::error::escape_control;
use imgtool_core::machine::{ControllerModel, DriveKind, Firmware, MacAddress};

pub mod description;
pub mod libvirt;
pub mod ovf;
pub mod proxmox;
mod xml;

/// A description, and what it does not hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Printed {
    /// Text of the description.
    pub text: String,
    /// Parts of the machine that the dialect has no place for, one line each.
    pub lost: Vec<String>,
}

/// Memory in bytes of a machine whose memory is unknown. Our choice: enough for the installer of every
/// system.
pub const DEFAULT_MEMORY: u64 = 2 << 30;

/// Parses the MAC address of a network adapter. Another text becomes a line of what is left out.
fn mac_address(text: &str, number: usize, extra: &mut Vec<String>) -> Option<MacAddress> {
    let mac = text.parse().ok();
    if mac.is_none() && !text.is_empty() {
        let text = escape_control(xml::shortened(text));
        extra.push(format!("address '{text}' of network adapter {number}: no MAC address"));
    }
    mac
}

/// True if the firmware of a machine has no driver for drives on this controller. EDK II leaves the drivers
/// PvScsi, MptScsi and LsiScsi out of OVMF since 2022, as Debian 12 has it; MegaRAID it never had. Its UEFI
/// guests boot from SATA instead, for which every operating system has a driver.
fn lacks_firmware_driver(machine: &Machine, model: ControllerModel) -> bool {
    use ControllerModel::{BusLogic, Lsi53c810, LsiLogic, LsiSas1068, MegaSas, Pvscsi};
    machine.firmware == Firmware::Uefi
        && matches!(model, BusLogic | LsiLogic | LsiSas1068 | Lsi53c810 | MegaSas | Pvscsi)
}

/// Returns the machine with its first disk as the boot disk, unless it states a boot order; and a line that
/// says so if the machine has several disks to choose from.
fn with_boot_disk(machine: &Machine, is_disk: impl Fn(usize) -> bool) -> (Machine, Option<String>) {
    let mut machine = machine.clone();
    if !machine.boot_order().is_empty() {
        return (machine, None);
    }
    let is_candidate = |index: &usize| machine.drives[*index].kind == DriveKind::Disk && is_disk(*index);
    let mut disks = (0..machine.drives.len()).filter(is_candidate);
    let (Some(first), other) = (disks.next(), disks.next()) else { return (machine, None) };
    let device = machine.drives[first].device.as_deref().unwrap_or("the first disk");
    let line = format!("boot order: the source states none; boots from {}", xml::shortened(device));
    machine.drives[first].boot = Some(0);
    (machine, other.map(|_| line))
}
