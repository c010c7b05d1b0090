//! Prints a machine as a guest's configuration.

use std::collections::BTreeSet;

use imgtool_core::Device;
use imgtool_core::machine::{
    Arch, BootEntry, Bus, Chipset, ControllerModel, Drive, DriveKind, Firmware, Machine, Nic, NicModel,
};

use super::config::{GuestConfig, MapEntry};
use super::parse::{CONTROLLERS, SYSTEMS};
use super::{ANY_VMID, add_drives, assign, drives};
use crate::{DEFAULT_MEMORY, Printed};

/// Bridge of an adapter whose network Proxmox VE does not have. Every node has this bridge.
const BRIDGE: &str = "vmbr0";
/// Number of network adapters of a guest, from qm.conf(5).
const MAX_NICS: usize = 32;
/// Maximum number of characters of a description, from qm.conf(5).
const MAX_DESCRIPTION: usize = 8192;
/// Maximum length of a label of the domain name system (RFC 1035).
const MAX_LABEL: usize = 63;

/// The settings of a guest, without those of its disks.
#[derive(Debug, Clone, Default)]
pub struct Settings {
    /// The settings.
    pub config: GuestConfig,
    /// The drive of each disk, by the machine's name of its device.
    pub map: Vec<MapEntry>,
    /// Parts of the machine that Proxmox VE has no place for, one line each.
    pub lost: Vec<String>,
}

/// Returns the configuration for an archive with these devices, which keep their names.
pub fn for_archive(machine: &Machine, devices: &[Device]) -> Printed {
    let Settings { mut config, map, lost } = settings(machine);
    let found = assign(&config, &map, devices);
    let map = add_drives(&mut config, &found, &mut devices.to_vec(), ANY_VMID, false);
    Printed { text: config.text(&map), lost }
}

/// Converts a machine into the settings of a guest. Those of the disks follow when it is known where they
/// are.
pub fn settings(machine: &Machine) -> Settings {
    let (machine, line) = crate::with_boot_disk(machine, |_| true);
    let machine = &machine;
    let is_moved = |model| crate::lacks_firmware_driver(machine, model);
    let stays = |drive: &&Drive| !machine.controller_of(drive).is_some_and(is_moved);
    let places = machine.drives.iter().filter(stays).filter_map(|drive| machine.position(drive));
    let wanted = places.map(|(bus, position)| format!("{bus}{position}")).collect();
    let mut printer =
        Printer { machine, settings: Settings::default(), names: Vec::new(), used: BTreeSet::new(), wanted };
    printer.name();
    printer.system();
    printer.drives();
    printer.nics();
    printer.boot_order();
    printer.settings.lost.extend(line);
    printer.settings.lost.extend(machine.extra.iter().cloned());
    printer.description();
    printer.settings
}

struct Printer<'a> {
    machine: &'a Machine,
    settings: Settings,
    /// Name of each drive of the machine (`scsi0`), as far as it has one.
    names: Vec<Option<String>>,
    used: BTreeSet<String>,
    /// Names by the places of all drives.
    wanted: BTreeSet<String>,
}

impl Printer<'_> {
    fn set(&mut self, key: &str, value: &str) {
        self.settings.config.set(key, value);
    }

    fn lose(&mut self, line: String) {
        self.settings.lost.push(line);
    }

    /// Adds the comments before the settings.
    fn description(&mut self) {
        let description = &self.machine.description;
        if description.is_empty() {
            return;
        }
        let kept: String = description.chars().take(MAX_DESCRIPTION).collect();
        let lines: Vec<String> = kept.lines().map(encoded).collect();
        self.set("description", &lines.join("\\n"));
        if kept.len() < description.len() {
            self.lose(format!("end of the description: Proxmox VE keeps {MAX_DESCRIPTION} characters"));
        }
    }

    fn name(&mut self) {
        let name = dns_name(&self.machine.name);
        if !name.is_empty() {
            self.set("name", &name);
        }
        if name != self.machine.name {
            let better = if name.is_empty() { "left out".to_owned() } else { format!("becomes '{name}'") };
            self.lose(format!("name '{}': {better}", crate::xml::shortened(&self.machine.name)));
        }
    }

    fn system(&mut self) {
        let machine = self.machine;
        self.set("cores", &machine.cpu.cores.to_string());
        self.set("sockets", &machine.cpu.sockets.to_string());
        // Proxmox VE's lower limit is 16 MiB.
        let mebibytes = machine.memory.unwrap_or(DEFAULT_MEMORY).div_ceil(1 << 20).max(16);
        self.set("memory", &mebibytes.to_string());
        if machine.firmware == Firmware::Uefi {
            self.set("bios", "ovmf");
            if !machine.drives.iter().any(|drive| drive.kind == DriveKind::EfiVars) {
                self.lose(
                    "firmware variables: the guest needs an EFI disk (efidisk0) to keep them".to_owned(),
                );
            }
        }
        if machine.chipset == Some(Chipset::Q35) {
            self.set("machine", "q35");
        }
        if machine.arch == Arch::Aarch64 {
            self.set("arch", "aarch64");
        }
        if let Some((name, _)) = SYSTEMS.iter().find(|(_, os)| Some(*os) == machine.os) {
            self.set("ostype", name);
        }
        if let Some(uuid) = machine.uuid {
            self.set("smbios1", &format!("uuid={uuid}"));
        }
        let has = |kind| machine.drives.iter().any(|drive| drive.kind == kind);
        if let (Some(tpm), false) = (machine.tpm, has(DriveKind::TpmState)) {
            self.lose(format!("TPM {tpm}: the guest needs a TPM state (tpmstate0)"));
        }
        if machine.secure_boot && !has(DriveKind::EfiVars) {
            self.lose("secure boot: an EFI disk with pre-enrolled keys turns it on".to_owned());
        }
    }

    /// Names the drives, and adds the settings of those without a disk.
    fn drives(&mut self) {
        self.scsi_model();
        let machine = self.machine;
        for drive in &machine.drives {
            let name = self.drive_name(drive);
            self.names.push(name.clone());
            let shown = drive.device.as_deref().unwrap_or("empty drive");
            let Some(name) = name else {
                self.lose(format!("{}: no free drive", crate::xml::shortened(shown)));
                continue;
            };
            match (drive.kind, &drive.device) {
                (DriveKind::Cdrom, _) => self.set(&name, "none,media=cdrom"),
                (_, Some(device)) => {
                    let device = device.clone();
                    if drive.read_only {
                        self.lose(format!("{name}: read-only"));
                    }
                    let (storage, format) = (String::new(), "raw".to_owned());
                    self.settings.map.push(MapEntry { drive: name, device, storage, format });
                }
                (_, None) => self.lose(format!("{name}: the source has no content for it")),
            }
        }
    }

    /// Sets the model of all SCSI controllers: that of the first one.
    fn scsi_model(&mut self) {
        let machine = self.machine;
        let used = |index: usize| machine.drives.iter().any(|drive| drive.controller == Some(index));
        let models: Vec<ControllerModel> = (0..)
            .zip(&machine.controllers)
            .filter(|(index, one)| used(*index) && matches!(one.model.bus(), Bus::Scsi | Bus::Nvme))
            .map(|(_, one)| one.model)
            .collect();
        let lacks_driver = |model: &ControllerModel| crate::lacks_firmware_driver(machine, *model);
        for model in models.iter().filter(|model| lacks_driver(model)).collect::<BTreeSet<_>>() {
            self.lose(format!(
                "controller {model}: becomes SATA, since the UEFI firmware has no driver for it"
            ));
        }
        let Some(first) = models.iter().find(|model| model.bus() == Bus::Scsi).or(models.first()).copied()
        else {
            return;
        };
        let written = match first {
            // For the drives that find no place on SATA.
            known if lacks_driver(&known) => ControllerModel::VirtioScsi,
            ControllerModel::LsiSas1068 => ControllerModel::MegaSas,
            ControllerModel::BusLogic => ControllerModel::LsiLogic,
            ControllerModel::Nvme => ControllerModel::VirtioScsi,
            known => known,
        };
        let name = CONTROLLERS.iter().find(|(_, model)| *model == written).map_or("lsi", |(name, _)| name);
        self.set("scsihw", name);
        for model in models.iter().collect::<BTreeSet<_>>() {
            if *model != written && !lacks_driver(model) {
                self.lose(format!("controller {model}: becomes {name}"));
            }
        }
    }

    /// Returns the name of a drive: that of its place on the bus, or a free one.
    fn drive_name(&mut self, drive: &Drive) -> Option<String> {
        let machine = self.machine;
        let fixed = match drive.kind {
            DriveKind::EfiVars => Some("efidisk0"),
            DriveKind::TpmState => Some("tpmstate0"),
            _ => None,
        };
        if let Some(name) = fixed {
            return self.used.insert(name.to_owned()).then(|| name.to_owned());
        }
        let (bus, position) = machine.position(drive).unwrap_or((Bus::Scsi, 0));
        let model = machine.controller_of(drive);
        let is_moved = model.is_some_and(|model| crate::lacks_firmware_driver(machine, model));
        let bus_name = match bus {
            _ if is_moved => Bus::Sata.name(),
            Bus::Nvme => "scsi",
            bus => bus.name(),
        };
        let wanted = format!("{bus_name}{position}");
        let has_place = drives::bus_of(&wanted).is_some() && bus != Bus::Nvme && !is_moved;
        if has_place && self.used.insert(wanted.clone()) {
            return Some(wanted);
        }
        // The places that other drives of the machine have stay theirs.
        let is_taken = |name: &String| self.used.contains(name) || self.wanted.contains(name);
        let free = drives::free_drives(bus_name).find(|name| !is_taken(name))?;
        self.used.insert(free.clone());
        // Another bus has a line already, unless it had no place left.
        if !is_moved || !free.starts_with(bus_name) {
            self.lose(format!("place {position} on the {bus} bus: becomes {free}"));
        }
        Some(free)
    }

    fn nics(&mut self) {
        let machine = self.machine;
        for (number, nic) in machine.nics.iter().enumerate() {
            if number >= MAX_NICS {
                self.lose(format!("network adapter {number}: Proxmox VE has {MAX_NICS}"));
                continue;
            }
            let value = self.nic(number, nic);
            self.set(&format!("net{number}"), &value);
        }
    }

    fn nic(&mut self, number: usize, nic: &Nic) -> String {
        let model = match nic.model {
            NicModel::E1000 => "e1000",
            NicModel::E1000e => "e1000e",
            NicModel::Pcnet => "pcnet",
            NicModel::Rtl8139 => "rtl8139",
            NicModel::Vmxnet3 => "vmxnet3",
            _ => "virtio",
        };
        let mut value = model.to_owned();
        match nic.mac {
            // Proxmox VE refuses an address of a group.
            Some(mac) if mac.0[0] & 1 == 0 => value.push_str(&format!("={mac}")),
            Some(mac) => {
                self.lose(format!("address {mac} of network adapter {number}: not one of an adapter"))
            }
            None => {}
        }
        let network = nic.network.as_deref().unwrap_or(BRIDGE);
        let bridge = if is_bridge(network) { network } else { BRIDGE };
        if bridge != network {
            self.lose(format!(
                "network '{}' of adapter {number}: becomes the bridge {bridge}",
                crate::xml::shortened(network)
            ));
        }
        value.push_str(&format!(",bridge={bridge}"));
        if !nic.connected {
            value.push_str(",link_down=1");
        }
        value
    }

    fn boot_order(&mut self) {
        let order = self.machine.boot_order();
        let name = |entry: &BootEntry| match entry {
            BootEntry::Drive(index) => self.names.get(*index).cloned().flatten(),
            BootEntry::Nic(index) => (*index < MAX_NICS).then(|| format!("net{index}")),
        };
        let bootable = |name: &String| name.starts_with("net") || drives::is_bootable(name);
        let mut names: Vec<String> = order.iter().filter_map(name).filter(bootable).collect();
        if names.is_empty() {
            // Without an order, the guest would boot from nothing.
            let disks = self.machine.drives.iter().zip(&self.names);
            let mut disks = disks.filter(|(drive, _)| drive.kind == DriveKind::Disk);
            names.extend(disks.find_map(|(_, name)| name.clone()));
        }
        if !names.is_empty() {
            self.set("boot", &format!("order={}", names.join(";")));
        }
    }
}

/// True for the name of a bridge that a node of Proxmox VE usually has.
fn is_bridge(name: &str) -> bool {
    let number = name.strip_prefix("vmbr").unwrap_or_default();
    (1..=4).contains(&number.len()) && number.bytes().all(|digit| digit.is_ascii_digit())
}

/// Reduces a name to one of the domain name system, as Proxmox VE requires it.
fn dns_name(name: &str) -> String {
    let plain: String =
        name.chars().map(|c| if c.is_ascii_alphanumeric() || c == '.' { c } else { '-' }).collect();
    let label = |label: &str| label.chars().take(MAX_LABEL).collect::<String>().trim_matches('-').to_owned();
    let labels: Vec<String> = plain.split('.').map(label).filter(|label| !label.is_empty()).collect();
    labels.join(".")
}

/// Encodes a line of a description as Proxmox VE does: what is no plain ASCII, and `:` and `%`.
fn encoded(line: &str) -> String {
    let mut text = String::with_capacity(line.len());
    // Comments that begin so belong to one backup.
    let is_of_backup = ["qmdump#", "vzdump#"].iter().any(|start| line.starts_with(start));
    for (index, byte) in line.bytes().enumerate() {
        match byte {
            first if index == 0 && is_of_backup => text.push_str(&format!("%{first:02X}")),
            b'%' | b':' | 0..=0x1f | 0x7f.. => text.push_str(&format!("%{byte:02X}")),
            plain => text.push(char::from(plain)),
        }
    }
    // A blank at the end would be trimmed.
    if let Some(start) = text.strip_suffix(' ') {
        text = format!("{start}%20");
    }
    // In `description`, this would begin another line.
    text.replace('\\', "%5C")
}
