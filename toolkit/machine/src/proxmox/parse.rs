//! Parses a guest's configuration into a machine.

use std::collections::HashMap;

use imgtool_core::machine::{
    Arch, BootEntry, Chipset, ControllerModel, Drive, DriveKind, Firmware, MAX_DRIVES, Machine, Nic,
    NicModel, Os, Tpm,
};
use imgtool_core::{Error, Result};
use uuid::Uuid;

use super::config::{GuestConfig, MapEntry, map_entries};
use super::drives;

/// Maximum length in bytes of a configuration: that of VMA. Real ones are a page of text.
const MAX_LEN: usize = u16::MAX as usize;

/// Memory in MiB of a guest whose configuration states none: Proxmox VE's default.
const DEFAULT_MEMORY: u64 = 512;

/// Settings that run a program on the host, or give the guest a device or a directory of the host.
const OF_THE_HOST: [&str; 7] = ["args", "hookscript", "hostpci", "usb", "serial", "parallel", "virtiofs"];

/// Names of the operating systems in `ostype`.
pub(super) const SYSTEMS: &[(&str, Os)] = &[
    ("other", Os::Other),
    ("l24", Os::Linux24),
    ("l26", Os::Linux),
    ("solaris", Os::Solaris),
    ("w2k", Os::Windows2000),
    ("wxp", Os::WindowsXp),
    ("w2k3", Os::Windows2003),
    ("wvista", Os::WindowsVista),
    ("w2k8", Os::Windows2008),
    ("win7", Os::Windows7),
    ("win8", Os::Windows8),
    ("win10", Os::Windows10),
    ("win11", Os::Windows11),
];

/// Names of the SCSI controllers in `scsihw`. The first is Proxmox VE's default.
pub(super) const CONTROLLERS: &[(&str, ControllerModel)] = &[
    ("lsi", ControllerModel::LsiLogic),
    ("lsi53c810", ControllerModel::Lsi53c810),
    ("megasas", ControllerModel::MegaSas),
    ("pvscsi", ControllerModel::Pvscsi),
    ("virtio-scsi-pci", ControllerModel::VirtioScsi),
    ("virtio-scsi-single", ControllerModel::VirtioScsiSingle),
];

/// Parses a configuration as an archive or `/etc/pve/qemu-server` has it.
///
/// # Errors
/// [`imgtool_core::ErrorKind::WrongFormat`] for another text, `LimitExceeded` beyond the limits.
pub fn parse(bytes: &[u8]) -> Result<Machine> {
    if bytes.len() > MAX_LEN {
        let len = bytes.len();
        return Err(Error::limit(format!("the configuration has {len} bytes, more than {MAX_LEN}")));
    }
    let text = String::from_utf8_lossy(bytes);
    let config = GuestConfig::parse(&text).ok_or_else(|| {
        Error::wrong_format("not a configuration of Proxmox VE: most lines are no settings of it")
    })?;
    let (map, machine) = (map_entries(&text), Machine::default());
    Ok(Parser { config: &config, map, machine, bootable: HashMap::new() }.machine())
}

struct Parser<'a> {
    config: &'a GuestConfig,
    /// Devices of the archive.
    map: Vec<MapEntry>,
    machine: Machine,
    /// Drives and adapters by their settings.
    bootable: HashMap<String, BootEntry>,
}

impl Parser<'_> {
    fn machine(mut self) -> Machine {
        self.machine.description = self.description();
        self.machine.memory = Some(DEFAULT_MEMORY << 20);
        let scsi = self.config.get("scsihw").unwrap_or_default();
        let scsi = CONTROLLERS.iter().find(|(name, _)| *name == scsi).unwrap_or(&CONTROLLERS[0]).1;
        let settings: Vec<(&str, &str)> = self.config.settings().collect();
        for (key, value) in sorted(settings) {
            if !self.take(key, value, scsi) {
                self.leave(key, value);
            }
        }
        self.boot_order();
        self.machine.extra.extend(self.config.left_out.iter().map(|part| format!("left out: {part}")));
        self.machine
    }

    /// Returns the text of the leading comments, which Proxmox VE encodes.
    fn description(&self) -> String {
        let lines: Vec<String> = self.config.leading_comments().map(decoded).collect();
        lines.join("\n").trim().to_owned()
    }

    /// Takes a setting into the machine. Returns false if the model has no place for it.
    fn take(&mut self, key: &str, value: &str, scsi: ControllerModel) -> bool {
        let machine = &mut self.machine;
        let number = |least: u32| value.parse::<u32>().ok().filter(|number| *number >= least);
        match key {
            "name" => machine.name = value.to_owned(),
            "cores" => return number(1).map(|cores| machine.cpu.cores = cores).is_some(),
            "sockets" => return number(1).map(|sockets| machine.cpu.sockets = sockets).is_some(),
            "memory" => return memory(value).map(|bytes| machine.memory = Some(bytes)).is_some(),
            "bios" if value == "ovmf" => machine.firmware = Firmware::Uefi,
            "bios" => {}
            "ostype" => {
                machine.os = SYSTEMS.iter().find(|(name, _)| *name == value).map(|(_, os)| *os);
                return machine.os.is_some();
            }
            "arch" if value == "aarch64" => machine.arch = Arch::Aarch64,
            "machine" if is_chipset(value, "q35") => machine.chipset = Some(Chipset::Q35),
            "machine" if is_chipset(value, "pc") => machine.chipset = Some(Chipset::I440fx),
            "smbios1" => {
                let uuid = option(value, "uuid").and_then(|uuid| Uuid::parse_str(uuid).ok());
                machine.uuid = uuid;
                return uuid.is_some() && !value.contains(',');
            }
            // The controller's model is taken with its drives; the machine's own settings below.
            "scsihw" | "boot" | "bootdisk" | "meta" => {}
            _ if key.starts_with("net") && is_numbered(key, "net") => return self.add_nic(key, value),
            _ if drives::bus_of(key).is_some() => return self.add_drive(key, value, scsi),
            _ => return false,
        }
        true
    }

    /// Keeps a setting that the model has no place for as a line for people.
    fn leave(&mut self, key: &str, value: &str) {
        let name = key.trim_end_matches(|c: char| c.is_ascii_digit());
        let line = match OF_THE_HOST.contains(&name) {
            true => format!("{key}: concerns the host, never carried over"),
            false => format!("{key}: {}", crate::xml::shortened(value)),
        };
        self.machine.extra.push(line);
    }

    fn add_nic(&mut self, key: &str, value: &str) -> bool {
        let (first, rest) = value.split_once(',').unwrap_or((value, ""));
        let (name, mac) = first.split_once('=').unwrap_or((first, ""));
        let name = if name == "model" { mac } else { name };
        let model = match name {
            "virtio" => NicModel::Virtio,
            "e1000e" => NicModel::E1000e,
            "vmxnet3" => NicModel::Vmxnet3,
            "pcnet" => NicModel::Pcnet,
            "rtl8139" => NicModel::Rtl8139,
            name if name.starts_with("e1000") => NicModel::E1000,
            _ => return false,
        };
        let number = self.machine.nics.len();
        let mac = if first.starts_with("model=") { "" } else { mac };
        let mut nic =
            Nic { mac: crate::mac_address(mac, number, &mut self.machine.extra), ..Nic::new(model) };
        let mut others = Vec::new();
        for part in rest.split(',').filter(|part| !part.is_empty()) {
            match part.split_once('=') {
                Some(("bridge", bridge)) => nic.network = Some(bridge.to_owned()),
                Some(("macaddr", mac)) => {
                    nic.mac = crate::mac_address(mac, number, &mut self.machine.extra).or(nic.mac);
                }
                Some(("link_down", down)) => nic.connected = down != "1",
                _ => others.push(part),
            }
        }
        self.others(key, &others);
        self.bootable.insert(key.to_owned(), BootEntry::Nic(self.machine.nics.len()));
        self.machine.nics.push(nic);
        true
    }

    fn add_drive(&mut self, key: &str, value: &str, scsi: ControllerModel) -> bool {
        if self.machine.drives.len() >= MAX_DRIVES {
            return false;
        }
        let (name, number) = key.split_at(key.trim_end_matches(|c: char| c.is_ascii_digit()).len());
        let Ok(position) = number.parse::<u32>() else { return false };
        let model = match name {
            "ide" => Some(ControllerModel::Ide),
            "sata" => Some(ControllerModel::Ahci),
            "virtio" => Some(ControllerModel::VirtioBlk),
            "scsi" => Some(scsi),
            _ => None,
        };
        let kind = match name {
            "efidisk" => DriveKind::EfiVars,
            "tpmstate" => DriveKind::TpmState,
            _ if drives::holds_disk(value) => DriveKind::Disk,
            _ => DriveKind::Cdrom,
        };
        let is_saved = kind != DriveKind::Cdrom && option(value, "backup") != Some("0");
        let entry = self.map.iter().find(|entry| entry.drive == key);
        let device = match entry {
            Some(entry) => entry.device.clone(),
            None => drives::device_name(key),
        };
        let mut drive = Drive::new(kind, Some(&*device).filter(|_| is_saved));
        drive.read_only |= option(value, "ro") == Some("1");
        if let Some(model) = model {
            self.machine.attach(&mut drive, model, position);
        }
        self.drive_options(key, value, &drive);
        self.bootable.insert(key.to_owned(), BootEntry::Drive(self.machine.drives.len()));
        self.machine.drives.push(drive);
        true
    }

    /// Takes the options of a drive that concern the machine, and keeps the others as a line.
    fn drive_options(&mut self, key: &str, value: &str, drive: &Drive) {
        match drive.kind {
            DriveKind::EfiVars => {
                self.machine.secure_boot = option(value, "pre-enrolled-keys") == Some("1");
                return;
            }
            DriveKind::TpmState => {
                let is_old = option(value, "version") == Some("v1.2");
                self.machine.tpm = Some(if is_old { Tpm::V1_2 } else { Tpm::V2_0 });
                return;
            }
            DriveKind::Cdrom if !matches!(drives::volume(value), "none" | "cdrom") => {
                let volume = crate::xml::shortened(drives::volume(value));
                self.machine.extra.push(format!("{key}: content of the CD drive ({volume})"));
            }
            DriveKind::Disk if drive.device.is_none() => {
                self.machine.extra.push(format!("{key}: the disk is not part of backups"));
            }
            _ => {}
        }
        const TAKEN: [&str; 8] = ["backup", "file", "format", "media", "ro", "size", "replicate", "shared"];
        let is_other = |part: &&str| part.split_once('=').is_none_or(|(name, _)| !TAKEN.contains(&name));
        let others: Vec<&str> = value.split(',').skip(1).filter(is_other).collect();
        self.others(key, &others);
    }

    fn others(&mut self, key: &str, others: &[&str]) {
        if !others.is_empty() {
            let others = others.join(",");
            self.machine.extra.push(format!("{key}: {}", crate::xml::shortened(&others)));
        }
    }

    /// Takes the boot order: `order=scsi0;net0`, or the disk of the older `bootdisk`.
    fn boot_order(&mut self) {
        let boot = self.config.get("boot").unwrap_or_default();
        let order = option(boot, "order").or(self.config.get("bootdisk")).unwrap_or_default().to_owned();
        for (place, name) in (0..).zip(order.split(';')) {
            let boot = match self.bootable.get(name) {
                Some(BootEntry::Drive(index)) => &mut self.machine.drives[*index].boot,
                Some(BootEntry::Nic(index)) => &mut self.machine.nics[*index].boot,
                None => continue,
            };
            boot.get_or_insert(place);
        }
    }
}

/// Sorts settings so that `net10` follows `net9`.
fn sorted<'a>(mut settings: Vec<(&'a str, &'a str)>) -> Vec<(&'a str, &'a str)> {
    settings.sort_by_key(|(key, _)| {
        let name = key.trim_end_matches(|c: char| c.is_ascii_digit());
        (name, key[name.len()..].parse::<u64>().unwrap_or(0))
    });
    settings
}

/// True for a key of this name with a number.
fn is_numbered(key: &str, name: &str) -> bool {
    key.strip_prefix(name).is_some_and(|number| number.parse::<u32>().is_ok())
}

/// True if a machine type is a version of this chipset: `q35`, `pc-q35-9.0`, `pc-i440fx-8.1`.
fn is_chipset(value: &str, chipset: &str) -> bool {
    let kind = value.split(',').next().unwrap_or_default();
    let kind = kind.strip_prefix("type=").unwrap_or(kind);
    match chipset {
        "q35" => kind == "q35" || kind.starts_with("pc-q35-"),
        _ => kind == "pc" || kind == "i440fx" || kind.starts_with("pc-i440fx-"),
    }
}

/// Returns an option of a value of the form `FIRST,NAME=VALUE,…`.
fn option<'a>(value: &'a str, name: &str) -> Option<&'a str> {
    value.split(',').find_map(|part| part.strip_prefix(name)?.strip_prefix('='))
}

/// Returns the bytes of a `memory` setting, in MiB: `8192` or `current=8192`.
fn memory(value: &str) -> Option<u64> {
    let mebibytes = value.strip_prefix("current=").unwrap_or(value);
    mebibytes.parse::<u64>().ok()?.checked_mul(1 << 20).filter(|bytes| *bytes > 0)
}

/// Decodes `%3A`, as Proxmox VE writes the characters of a description that are no plain text.
fn decoded(line: &str) -> String {
    let mut bytes = Vec::with_capacity(line.len());
    let mut rest = line.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        let digits =
            after.get(..2).filter(|digits| *first == b'%' && digits.iter().all(u8::is_ascii_hexdigit));
        let byte = digits.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok());
        match byte {
            Some(byte) => {
                bytes.push(byte);
                rest = &after[2..];
            }
            None => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
