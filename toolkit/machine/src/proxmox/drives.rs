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
            size: stated_size(value),
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
    /// Indices of disks that fit no drive that is left. Their drives are guesses, which the user must confirm.
    pub unclear: Vec<usize>,
}

/// Assigns a drive to each disk: by the assignments `map` of an earlier archive or of a machine, by its name, by the
/// name of a drive's volume, by its size if that is unique, or in order; a further disk gets a free drive, SCSI
/// first. The firmware's and the TPM's drive get only disks that can be theirs. The names of `disks` are those of the archive.
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
    let mut unclear = Unclear { open: &mut open, drives: &mut drives, disks };
    unclear.by_kind_in_name();
    unclear.by_size();
    unclear.by_state_size();
    unclear.in_order();
    let is_unclear = unclear.is_left();
    let unclear = if is_unclear { free(&drives) } else { Vec::new() };
    guess(&mut open, &mut drives, disks, &unclear);
    used.extend(config.settings().map(|(key, _)| key.to_owned()));
    for index in free(&drives) {
        let mut names = BUSES
            .iter()
            .filter(|bus| bus.bootable)
            .flat_map(|bus| (0..bus.drives).map(move |number| format!("{}{number}", bus.name)));
        drives[index] = names.find(|drive| used.insert(drive.clone()));
    }
    Assignment { drives, without_disk: open.into_iter().map(|line| line.name).collect(), unclear }
}

/// Largest disk of firmware variables on x86-64: 528 KiB, which LVM and ZFS round up, to 4 MiB at most (qm.conf(5):
/// efitype).
const EFI_DISK_MOST: u64 = 4 << 20;

/// Sizes of OVMF's variables as files: efitype 2m and 4m. On aarch64 they have 64 MiB, as other disks can.
const EFI_DISKS: [u64; 3] = [128 << 10, 528 << 10, EFI_DISK_OF_ARM];
const EFI_DISK_OF_ARM: u64 = 64 << 20;

/// Size of a TPM's state, the only one that Proxmox VE makes.
const TPM_STATE: u64 = 4 << 20;

/// True if a disk of this size can be the drive: the firmware's and the TPM's are small.
fn can_be(drive: &str, size: u64) -> bool {
    match bus_of(drive).map(|bus| bus.name) {
        Some("efidisk") => size <= EFI_DISK_MOST || size == EFI_DISK_OF_ARM,
        Some("tpmstate") => size == TPM_STATE,
        _ => true,
    }
}

/// Returns why a disk of this size is hardly the drive that it was given to; `None` if nothing speaks against it.
pub fn doubt(config: &GuestConfig, drive: &str, size: u64) -> Option<String> {
    if !can_be(drive, size) {
        let what =
            if drive == "tpmstate0" { "a TPM's state has 4 MiB" } else { "EFI variables have up to 4 MiB" };
        return Some(format!("{what}, this disk {size} bytes"));
    }
    let stated =
        config.get(drive).and_then(stated_size).filter(|stated| is_bootable(drive) && size < *stated)?;
    Some(format!("its line states {stated} bytes, this disk has {size}"))
}

/// Returns the size in bytes that a drive line states.
fn stated_size(line: &str) -> Option<u64> {
    line.split(',').find_map(|option| option.strip_prefix("size=")).and_then(parse_size)
}

/// Returns the drive that the name of a disk's file speaks of: `win11-efivars`, `OVMF_VARS`, `tpm`.
fn state_by_name(name: &str) -> Option<&'static str> {
    let name = name.to_lowercase();
    let mut words = name.split(|c: char| !c.is_ascii_alphanumeric());
    words.find_map(|word| {
        let begins = |with: &[&str]| with.iter().any(|start| word.starts_with(start));
        match word {
            "vars" => Some("efidisk0"),
            _ if begins(&["efi", "uefi", "ovmf", "nvram"]) => Some("efidisk0"),
            _ if begins(&["tpm", "vtpm", "swtpm"]) => Some("tpmstate0"),
            _ => None,
        }
    })
}

/// Disks without a drive, and the drive lines that are left for them.
struct Unclear<'a> {
    open: &'a mut Vec<DriveLine>,
    drives: &'a mut [Option<String>],
    disks: &'a [Device],
}

impl Unclear<'_> {
    /// Returns the disks without a drive.
    fn free(&self) -> Vec<usize> {
        let is_free = |index: &usize| self.drives[*index].is_none() && is_disk(&self.disks[*index]);
        (0..self.disks.len()).filter(is_free).collect()
    }

    /// Gives the drive of the open line at `place` to a disk.
    fn give(&mut self, index: usize, place: usize) {
        self.drives[index] = Some(self.open.remove(place).name);
    }

    fn place_of(&self, drive: &str) -> Option<usize> {
        self.open.iter().position(|line| line.name == drive)
    }

    fn by_kind_in_name(&mut self) {
        for index in self.free() {
            let drive = state_by_name(&self.disks[index].name);
            let drive = drive.filter(|drive| can_be(drive, self.disks[index].size));
            if let Some(place) = drive.and_then(|drive| self.place_of(drive)) {
                self.give(index, place);
            }
        }
    }

    /// Gives a drive to each disk whose size is that of one line, and of no other line and disk.
    fn by_size(&mut self) {
        for index in self.free() {
            let size = self.disks[index].size;
            let fits = |line: &DriveLine| line.size == Some(size) && can_be(&line.name, size);
            let is_only_disk =
                self.free().iter().filter(|other| self.disks[**other].size == size).count() == 1;
            let place = self.open.iter().position(fits).filter(|_| is_only_disk);
            if let (Some(place), 1) = (place, self.open.iter().filter(|line| fits(line)).count()) {
                self.give(index, place);
            }
        }
    }

    /// Gives the firmware's and the TPM's drive to the only disk that can be theirs. Variables have a size of their
    /// own as a file, so they come first.
    fn by_state_size(&mut self) {
        let is_file_of_efi = |size: u64| EFI_DISKS[..2].contains(&size);
        self.give_only("efidisk0", &is_file_of_efi);
        if self.place_of("efidisk0").is_none() {
            self.give_only("tpmstate0", &|size| can_be("tpmstate0", size));
        }
        if self.place_of("tpmstate0").is_none() {
            self.give_only("efidisk0", &|size| can_be("efidisk0", size));
        }
    }

    /// Gives the drive to the disk whose size `fits`, if it is the only one.
    fn give_only(&mut self, drive: &str, fits: &dyn Fn(u64) -> bool) {
        let found: Vec<usize> =
            self.free().into_iter().filter(|index| fits(self.disks[*index].size)).collect();
        if let ([index], Some(place)) = (&*found, self.place_of(drive)) {
            self.give(*index, place);
        }
    }

    /// Gives the drives of the open lines, in order, to the first disk that is large enough. What does not fit stays
    /// open if there is a choice of kinds; a single pair is no question.
    fn in_order(&mut self) {
        let lines: Vec<DriveLine> =
            self.open.iter().filter(|line| is_bootable(&line.name)).cloned().collect();
        let is_single = self.free().len() == 1 && lines.len() == 1;
        for line in lines {
            let may_be_state =
                |size| self.open.iter().any(|other| !is_bootable(&other.name) && can_be(&other.name, size));
            let fits = |index: &usize| {
                let size = self.disks[*index].size;
                (is_single || size >= line.size.unwrap_or(0)) && !may_be_state(size)
            };
            let found = self.free().into_iter().find(fits);
            if let (Some(index), Some(place)) = (found, self.place_of(&line.name)) {
                self.give(index, place);
            }
        }
        // Without a firmware's or a TPM's drive there is no choice of kinds, only of sizes: the order counts.
        while self.open.iter().all(|line| is_bootable(&line.name))
            && let (Some(index), false) = (self.free().first().copied(), self.open.is_empty())
        {
            self.give(index, 0);
        }
    }

    /// True if lines and disks are left that do not fit each other.
    fn is_left(&self) -> bool {
        !self.open.is_empty() && !self.free().is_empty()
    }
}

/// Guesses the drives of the disks `unclear`, as a proposal for the user.
fn guess(open: &mut Vec<DriveLine>, drives: &mut [Option<String>], disks: &[Device], unclear: &[usize]) {
    for index in unclear {
        let size = disks[*index].size;
        let state = open.iter().position(|line| !is_bootable(&line.name) && can_be(&line.name, size));
        let place = state.or_else(|| open.iter().position(|line| is_bootable(&line.name)));
        drives[*index] = place.map(|place| open.remove(place).name);
    }
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
        let (small, large) = (10 << 30, 40 << 30);
        // Boot order first, the firmware's disk last.
        assert_eq!(of(&[("a", small), ("b", large), ("c", 3)]), ["virtio1", "scsi0", "efidisk0"]);
        assert_eq!(of(&[("a", large), ("drive-virtio1", 2)]), ["scsi0", "virtio1"]);
        assert_eq!(of(&[("vm-100-disk-0", 1), ("b", small)]), ["scsi0", "virtio1"]);
        assert_eq!(of(&[("a", 4 << 20), ("b", 32 << 30), ("c", 8 << 30)]), ["efidisk0", "scsi0", "virtio1"]);
        // Two disks of one size: the order decides.
        assert_eq!(of(&[("a", 32 << 30), ("b", 32 << 30)]), ["virtio1", "scsi0"]);
        // Further disks get free drives. The line that backups exclude is not free either.
        let four = [("a", small), ("b", large), ("c", 3), ("d", large)];
        assert_eq!(of(&four), ["virtio1", "scsi0", "efidisk0", "scsi2"]);
        assert_eq!(assigned(&[("a", small)]).1, ["scsi0", "efidisk0"]);
    }

    #[test]
    fn firmware_and_tpm_get_only_disks_that_can_be_theirs() {
        let config = "boot: order=scsi0\nefidisk0: l:vm-200-disk-0,efitype=4m,size=4M\n\
            scsi0: l:vm-200-disk-1,size=64G\ntpmstate0: l:vm-200-disk-2,size=4M,version=v2.0\n";
        let config = GuestConfig::parse(config).expect("a configuration");
        let found = |list: &[(&str, u64)]| {
            let found = assign(&config, &[], &disks(list));
            (found.drives.into_iter().map(Option::unwrap_or_default).collect::<Vec<_>>(), found.unclear)
        };
        let (vars, tpm, disk) = (528 << 10, 4 << 20, 80 << 30);
        let all = |names: [&str; 3]| (names.map(str::to_owned).to_vec(), Vec::new());
        // By the file's name, and by its size alone, in any order.
        for names in [["efivars", "win", "tpm"], ["a", "b", "c"]] {
            let [a, b, c] = names;
            assert_eq!(found(&[(a, vars), (b, disk), (c, tpm)]), all(["efidisk0", "scsi0", "tpmstate0"]));
            assert_eq!(found(&[(c, tpm), (b, disk), (a, vars)]), all(["tpmstate0", "scsi0", "efidisk0"]));
        }
        let rounded = [("WIN_VARS", tpm), ("disk", disk), ("vtpm", tpm)];
        assert_eq!(found(&rounded), all(["efidisk0", "scsi0", "tpmstate0"]));
        // The variables alone are not the disk.
        assert_eq!(found(&[("x", vars)]), (vec!["efidisk0".to_owned()], vec![]));
        // Two disks that could be either, a disk that is too small, and one that could be neither.
        assert_eq!(found(&[("a", tpm), ("b", disk), ("c", tpm)]).1, [0, 2]);
        assert_eq!(found(&[("efi", vars), ("b", 10 << 30), ("c", 10 << 30)]).1, [1, 2]);
        assert_eq!(found(&[("efi", vars), ("b", 10 << 30)]).1, Vec::<usize>::new());
        assert_eq!(found(&[("a", disk), ("b", disk)]).1, [1]);
        assert!(doubt(&config, "efidisk0", disk).is_some_and(|why| why.contains("4 MiB")));
        assert!(doubt(&config, "scsi0", vars).is_some_and(|why| why.contains("68719476736")));
        assert_eq!(doubt(&config, "scsi0", disk), None);
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
