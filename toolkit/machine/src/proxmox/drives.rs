//! The drives of a guest, and the disk that becomes each of them.

use std::collections::BTreeSet;
use std::path::Path;

use imgtool_core::{Device, DeviceKind, parse_size};

use super::config::{GuestConfig, MapEntry};

/// A bus, and the maximum number of disks on it.
pub(super) struct Bus {
    pub(super) name: &'static str,
    pub(super) drives: u32,
    bootable: bool,
}

/// All buses for disks, from qm.conf(5).
const BUSES: [Bus; 6] = [
    Bus { name: "scsi", drives: 31, bootable: true },
    Bus { name: "virtio", drives: 16, bootable: true },
    Bus { name: "sata", drives: 6, bootable: true },
    Bus { name: "ide", drives: 4, bootable: true },
    Bus { name: "efidisk", drives: 1, bootable: false },
    Bus { name: "tpmstate", drives: 1, bootable: false },
];

/// Returns the bus of a drive such as `scsi0`; `None` if no such drive exists.
pub(super) fn bus_of(drive: &str) -> Option<&'static Bus> {
    BUSES.iter().find(|bus| {
        let number = drive.strip_prefix(bus.name).filter(|n| *n == "0" || !n.starts_with('0'));
        number.and_then(|number| number.parse::<u32>().ok()).is_some_and(|number| number < bus.drives)
    })
}

/// Returns the drives on a bus, then those on other buses that a guest can boot from.
pub(super) fn free_drives(bus: &str) -> impl Iterator<Item = String> {
    let is_first = |one: &&Bus| one.name == bus;
    let first = BUSES.iter().find(is_first);
    let others =
        BUSES.iter().filter(move |one| one.bootable && first.is_none_or(|first| first.name != one.name));
    let buses = first.into_iter().chain(others);
    buses.flat_map(|bus| (0..bus.drives).map(move |number| format!("{}{number}", bus.name)))
}

/// True if a guest can boot from a drive.
pub fn is_bootable(drive: &str) -> bool {
    bus_of(drive).is_some_and(|bus| bus.bootable)
}

/// Returns the name of a drive's device in an archive, as QEMU calls the drive. Proxmox VE copies the TPM's
/// state before it saves it, and the copy has a name of its own.
pub fn device_name(drive: &str) -> String {
    let backup = if drive == "tpmstate0" { "-backup" } else { "" };
    format!("drive-{drive}{backup}")
}

/// A drive line of a configuration whose disk belongs into a backup.
#[derive(Debug, Clone, PartialEq, Eq)]
struct DriveLine {
    name: String,
    /// File name of the volume, without extension.
    volume: String,
    /// Size in bytes that the line states.
    size: Option<u64>,
}

/// Returns the drives of a configuration that a backup includes, in the order in which disks without a name
/// are assigned: those of the boot order first, then by bus and number, the firmware's and the TPM's last.
fn drive_lines(config: &GuestConfig) -> Vec<DriveLine> {
    let boot =
        config.get("boot").and_then(|boot| boot.split(',').find_map(|part| part.strip_prefix("order=")));
    let boot: Vec<&str> = boot.map(|order| order.split(';').collect()).unwrap_or_default();
    let place = |drive: &str| {
        let bus = BUSES.iter().position(|bus| drive.starts_with(bus.name)).unwrap_or(BUSES.len());
        let number: u32 = drive.trim_start_matches(|c: char| c.is_ascii_alphabetic()).parse().unwrap_or(0);
        (boot.iter().position(|name| *name == drive).unwrap_or(boot.len()), bus, number)
    };
    let is_saved = |value: &str| holds_disk(value) && !value.split(',').any(|option| option == "backup=0");
    let mut lines: Vec<DriveLine> = config
        .settings()
        .filter(|(key, value)| bus_of(key).is_some() && is_saved(value))
        .map(|(key, value)| DriveLine {
            name: key.to_owned(),
            volume: stem(volume(value)).to_owned(),
            size: value.split(',').find_map(|option| option.strip_prefix("size=")).and_then(parse_size),
        })
        .collect();
    lines.sort_by_key(|line| place(&line.name));
    lines
}

/// True if a drive line is that of a disk, not of a CD-ROM or an empty drive.
pub fn holds_disk(line: &str) -> bool {
    let volume = volume(line);
    !(volume == "none" || volume == "cdrom" || line.split(',').any(|option| option == "media=cdrom"))
}

/// True if this is a disk, not the state of a guest.
pub fn is_disk(disk: &Device) -> bool {
    disk.kind != DeviceKind::VmState
}

/// Returns the volume of a drive line: `local-lvm:vm-100-disk-0`.
pub fn volume(line: &str) -> &str {
    let first = line.split(',').next().unwrap_or_default();
    first.strip_prefix("file=").unwrap_or(first)
}

/// Returns the file name of a volume without its extension.
fn stem(volume: &str) -> &str {
    let name = volume.split_once(':').map_or(volume, |(_, name)| name);
    Path::new(name).file_stem().and_then(|stem| stem.to_str()).unwrap_or(name)
}

/// Returns the storage of a drive line and its format there, for a map line.
pub fn storage_and_format(line: &str) -> (&str, &str) {
    let volume = volume(line);
    let storage = volume.split_once(':').map_or("", |(storage, _)| storage);
    let stated = line.split(',').find_map(|option| option.strip_prefix("format="));
    let extension = Path::new(volume).extension().and_then(|extension| extension.to_str());
    let format = stated.or(extension.filter(|extension| ["qcow2", "vmdk"].contains(extension)));
    (if storage.starts_with('/') { "" } else { storage }, format.unwrap_or("raw"))
}

/// The drive that each disk becomes.
#[derive(Debug, Default)]
pub struct Assignment {
    /// Drive of each disk; `None` for the state of a guest, and for a disk if no drive is free.
    pub drives: Vec<Option<String>>,
    /// Drives of the configuration that no disk was found for.
    pub without_disk: Vec<String>,
}

/// Assigns a drive to each disk: by the assignments `map` of an earlier archive or of a machine, by its name, by the
/// name of a drive's volume, by its size if that is unique, or in order; a further disk gets a free drive, SCSI
/// first. The names of `disks` are those of the archive.
pub fn assign(config: &GuestConfig, map: &[MapEntry], disks: &[Device]) -> Assignment {
    let mut open = drive_lines(config);
    let mut drives: Vec<Option<String>> = vec![None; disks.len()];
    let all: Vec<usize> = (0..disks.len()).filter(|index| is_disk(&disks[*index])).collect();
    let mut used = BTreeSet::new();
    let earlier = |name: &str| map.iter().find(|entry| entry.device == name).map(|entry| entry.drive.clone());
    // A disk that is named after a drive becomes it, whether the configuration has it or not. The map comes first for
    // all disks: a file may be called ide0 and hold the disk scsi1.
    for assigned in [&earlier as &dyn Fn(&str) -> Option<String>, &drive_of] {
        for index in &all {
            if drives[*index].is_some() {
                continue;
            }
            let drive = assigned(&disks[*index].name).filter(|drive| bus_of(drive).is_some());
            if let Some(drive) = drive.filter(|drive| used.insert(drive.clone())) {
                open.retain(|line| line.name != drive);
                drives[*index] = Some(drive);
            }
        }
    }
    let free = |drives: &[Option<String>]| -> Vec<usize> {
        all.iter().copied().filter(|index| drives[*index].is_none()).collect()
    };
    for index in free(&drives) {
        if let Some(place) = open.iter().position(|line| line.volume == disks[index].name) {
            drives[index] = Some(open.remove(place).name);
        }
    }
    for index in free(&drives) {
        let size = disks[index].size;
        let fits = |line: &DriveLine| line.size == Some(size);
        let is_only_disk = free(&drives).iter().filter(|other| disks[**other].size == size).count() == 1;
        let place = open.iter().position(fits).filter(|_| is_only_disk);
        if let (Some(place), 1) = (place, open.iter().filter(|line| fits(line)).count()) {
            drives[index] = Some(open.remove(place).name);
        }
    }
    for index in free(&drives) {
        if !open.is_empty() {
            drives[index] = Some(open.remove(0).name);
        }
    }
    used.extend(config.settings().map(|(key, _)| key.to_owned()));
    for index in free(&drives) {
        let mut names = BUSES
            .iter()
            .filter(|bus| bus.bootable)
            .flat_map(|bus| (0..bus.drives).map(move |number| format!("{}{number}", bus.name)));
        drives[index] = names.find(|drive| used.insert(drive.clone()));
    }
    Assignment { drives, without_disk: open.into_iter().map(|line| line.name).collect() }
}

/// Returns the drive after which a disk is named: `scsi0`, `drive-scsi0`, `drive-tpmstate0-backup`.
fn drive_of(name: &str) -> Option<String> {
    let name = name.strip_prefix("drive-").unwrap_or(name);
    let name = name.strip_suffix("-backup").unwrap_or(name);
    bus_of(name).map(|_| name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disks(list: &[(&str, u64)]) -> Vec<Device> {
        list.iter().map(|(name, size)| Device::disk(0, *name, *size)).collect()
    }

    const CONFIG: &str = "boot: order=virtio1;ide2;net0\nefidisk0: local-lvm:vm-100-disk-1,size=4M\n\
        ide2: local:iso/debian.iso,media=cdrom\nscsi0: local-lvm:vm-100-disk-0,size=32G\n\
        scsi1: local-lvm:vm-100-disk-5,backup=0,size=9G\nvirtio1: local:100/vm-100-disk-2.qcow2,size=8G\n";

    fn assigned(list: &[(&str, u64)]) -> (Vec<String>, Vec<String>) {
        let config = GuestConfig::parse(CONFIG).expect("a configuration");
        let found = assign(&config, &[], &disks(list));
        (found.drives.into_iter().map(Option::unwrap_or_default).collect(), found.without_disk)
    }

    #[test]
    fn disks_become_drives_by_name_volume_size_and_order() {
        let of = |list: &[(&str, u64)]| assigned(list).0;
        // Boot order first, the firmware's disk last.
        assert_eq!(of(&[("a", 1), ("b", 2), ("c", 3)]), ["virtio1", "scsi0", "efidisk0"]);
        assert_eq!(of(&[("a", 1), ("drive-virtio1", 2)]), ["scsi0", "virtio1"]);
        assert_eq!(of(&[("vm-100-disk-0", 1), ("b", 2)]), ["scsi0", "virtio1"]);
        assert_eq!(of(&[("a", 4 << 20), ("b", 32 << 30), ("c", 8 << 30)]), ["efidisk0", "scsi0", "virtio1"]);
        // Two disks of one size: the order decides.
        assert_eq!(of(&[("a", 32 << 30), ("b", 32 << 30)]), ["virtio1", "scsi0"]);
        // Further disks get free drives. The line that backups exclude is not free either.
        assert_eq!(of(&[("a", 1), ("b", 2), ("c", 3), ("d", 4)]), ["virtio1", "scsi0", "efidisk0", "scsi2"]);
        assert_eq!(assigned(&[("a", 1)]).1, ["scsi0", "efidisk0"]);
    }

    #[test]
    fn the_map_counts_more_than_the_names_of_files() {
        let config = GuestConfig::parse("cores: 1\n").expect("a configuration");
        let entry = |drive: &str, device: &str| MapEntry {
            drive: drive.to_owned(),
            device: device.to_owned(),
            storage: String::new(),
            format: "raw".to_owned(),
        };
        let map = [entry("scsi0", "scsi1"), entry("scsi1", "scsi0"), entry("scsi2", "efidisk0")];
        let list = disks(&[("scsi1", 1), ("scsi0", 2), ("efidisk0", 3), ("sata0", 4)]);
        let found: Vec<_> = assign(&config, &map, &list).drives.into_iter().flatten().collect();
        assert_eq!(found, ["scsi0", "scsi1", "scsi2", "sata0"]);
    }

    #[test]
    fn map_lines_have_storage_and_format() {
        for (line, expected) in [
            ("local-lvm:vm-100-disk-0,size=1G", ("local-lvm", "raw")),
            ("file=nas:100/vm-100-disk-0.qcow2", ("nas", "qcow2")),
            ("local:100/vm-100-disk-0.raw,format=vmdk", ("local", "vmdk")),
            ("/dev/disk/by-id/x:1", ("", "raw")),
        ] {
            assert_eq!(storage_and_format(line), expected, "{line}");
        }
    }
}
