//! `--proxmox`: creates a guest configuration for disks that have none, so that Proxmox VE can restore their
//! archive.
//!
//! `qmrestore` needs two lines for each disk: a setting (`scsi0: …`), and a comment
//! `#qmdump#map:DRIVE:DEVICE:STORAGE:FORMAT:`, which assigns a device of the archive to the drive.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::Path;

use imgtool_core::{Attachment, DeviceKind, Error, Result};
use imgtool_engine::SelectedDisk;
use imgtool_storage::Compression;

/// Name of the guest's configuration in an archive.
pub const CONFIG_NAME: &str = "qemu-server.conf";

/// Prefix of the lines that assign a device of the archive to a drive.
const MAP_LINE: &str = "#qmdump#map:";

/// Prefix that `qmrestore` requires of an archive's name.
const ARCHIVE_PREFIX: &str = "vzdump-qemu-";

/// Name of the storage in the volume names of disk lines. Every node has this storage; `qmrestore --storage`
/// replaces it.
const ANY_STORAGE: &str = "local";

/// Guest number (VMID) in the volume names of disk lines, if the archive's name has none. `qmrestore`
/// replaces it.
const ANY_VMID: &str = "100";

/// Creates the configuration, and renames the disks to match its map lines. `dest` is the path of the
/// archive, from whose name the guest number is taken.
///
/// # Errors
/// [`imgtool_core::ErrorKind::Usage`] for a setting that is malformed or given twice.
pub fn configure(
    settings: &[String],
    selected: &mut [SelectedDisk],
    dest: Option<&Path>,
) -> Result<Attachment> {
    let mut lines = parse(settings)?;
    let drives = name_drives(selected);
    let name = dest.and_then(Path::file_name).map(|name| name.to_string_lossy().into_owned());
    let vmid = name.as_deref().and_then(vmid_of).unwrap_or(ANY_VMID);
    let mut map = String::new();
    for (index, (drive, device)) in drives.iter().zip(selected.iter()).enumerate() {
        let Some(drive) = drive else { continue };
        let volume = format!("{ANY_STORAGE}:{vmid}/vm-{vmid}-disk-{index}.raw");
        let extra = match drive.as_str() {
            "efidisk0" => ",efitype=4m",
            "tpmstate0" => ",version=v2.0",
            _ => "",
        };
        let size = device.device.size.div_ceil(1024);
        let line = lines.entry(drive.clone()).or_insert_with(|| format!("{volume}{extra},size={size}K"));
        // The storage in the user's line, if there is one; otherwise a storage that every node has.
        let storage = line.split_once(':').map_or(ANY_STORAGE, |(storage, _)| storage);
        let _ = writeln!(map, "{MAP_LINE}{drive}:{}:{storage}:raw:", device.name);
    }
    let first_disk = drives.iter().flatten().find(|drive| bus_of(drive).is_some_and(|bus| bus.bootable));
    if let Some(disk) = first_disk {
        lines.entry("boot".to_owned()).or_insert_with(|| format!("order={disk}"));
    }
    if drives.iter().flatten().any(|drive| drive.starts_with("scsi")) {
        lines.entry("scsihw".to_owned()).or_insert_with(|| "virtio-scsi-single".to_owned());
    }
    if drives.iter().flatten().any(|drive| drive == "efidisk0") {
        lines.entry("bios".to_owned()).or_insert_with(|| "ovmf".to_owned());
    }
    lines.entry("memory".to_owned()).or_insert_with(|| "2048".to_owned());
    let mut text = String::new();
    for (key, value) in &lines {
        let _ = writeln!(text, "{key}: {value}");
    }
    Ok(Attachment { name: CONFIG_NAME.to_owned(), data: (text + &map).into_bytes() })
}

/// Returns a note if `qmrestore` will refuse the name of an archive.
pub fn note_on_name(dest: &Path, compression: Option<Compression>) -> Option<String> {
    let name = dest.file_name()?.to_str()?;
    let extension = match compression {
        None => ".vma",
        Some(Compression::Gzip) => ".vma.gz",
        Some(_) => ".vma.zst",
    };
    if vmid_of(name).is_some() && name.ends_with(extension) {
        return None;
    }
    Some(format!(
        "qmrestore refuses the name '{name}': it wants {ARCHIVE_PREFIX}VMID-YYYY_MM_DD-HH_MM_SS.vma, and .zst or .gz behind it if compressed"
    ))
}

/// Returns notes on disks without a map line in the configuration, and on map lines without a disk.
pub fn notes_on_map(config: &[u8], disks: &[&str]) -> Vec<String> {
    let text = String::from_utf8_lossy(config);
    let mapped: Vec<(&str, &str)> = text
        .lines()
        .filter_map(|line| line.strip_prefix(MAP_LINE)?.split_once(':'))
        .filter_map(|(drive, rest)| Some((drive, rest.split_once(':')?.0)))
        .collect();
    let missing = mapped.iter().filter(|(_, device)| !disks.contains(device)).map(|(drive, device)| {
        format!("{CONFIG_NAME} says that {drive} is the device {device}, which is not in the archive: qmrestore will refuse it")
    });
    let unmapped = disks.iter().filter(|disk| !mapped.iter().any(|(_, device)| device == *disk)).map(|disk| {
        format!("{CONFIG_NAME} has no {MAP_LINE} line for the device {disk}: qmrestore will not restore it (--proxmox writes such lines)")
    });
    missing.chain(unmapped).collect()
}

/// Returns the guest number in `vzdump-qemu-VMID-YYYY_MM_DD-HH_MM_SS.vma…`; `None` for any other name.
fn vmid_of(name: &str) -> Option<&str> {
    let (vmid, rest) = name.strip_prefix(ARCHIVE_PREFIX)?.split_once('-')?;
    let (time, extension) = rest.split_once(".vma")?;
    let shape: String = time.chars().map(|c| if c.is_ascii_digit() { '0' } else { c }).collect();
    let known = matches!(extension, "" | ".zst" | ".gz" | ".lzo");
    let is_number = !vmid.is_empty() && vmid.bytes().all(|byte| byte.is_ascii_digit());
    (known && is_number && shape == "0000_00_00-00_00_00").then_some(vmid)
}

fn parse(settings: &[String]) -> Result<BTreeMap<String, String>> {
    let mut lines = BTreeMap::new();
    for setting in settings {
        let wrong = |what: &str| {
            Error::usage(format!("--proxmox '{setting}': {what}")).hint(
                "give KEY=VALUE as in qemu-server.conf, such as --proxmox memory=4096 --proxmox name=web",
            )
        };
        let (key, value) = setting.split_once('=').ok_or_else(|| wrong("expected KEY=VALUE"))?;
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_' || c == '-';
        if key.is_empty() || !key.chars().all(plain) {
            return Err(wrong("the key is not one of a configuration"));
        }
        if value.chars().any(char::is_control) {
            return Err(wrong("the value holds a control character"));
        }
        if lines.insert(key.to_owned(), value.to_owned()).is_some() {
            return Err(wrong("the key is given twice"));
        }
    }
    Ok(lines)
}

/// A bus, and the maximum number of disks on it.
struct Bus {
    name: &'static str,
    drives: u32,
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
fn bus_of(drive: &str) -> Option<&'static Bus> {
    BUSES.iter().find(|bus| {
        let number = drive.strip_prefix(bus.name).filter(|n| *n == "0" || !n.starts_with('0'));
        number.and_then(|number| number.parse::<u32>().ok()).is_some_and(|number| number < bus.drives)
    })
}

/// Assigns a drive to each disk, in order, and renames the disk after it. A disk that is not named after a
/// free drive gets the next free one, starting with SCSI. The guest state gets `None`, and so does a disk if
/// no drive is free.
fn name_drives(selected: &mut [SelectedDisk]) -> Vec<Option<String>> {
    let named = |device: &SelectedDisk| {
        let name = device.name.strip_prefix("drive-").unwrap_or(&device.name);
        let name = name.strip_suffix("-backup").unwrap_or(name);
        bus_of(name).map(|_| name.to_owned())
    };
    let mut used: BTreeSet<String> = selected.iter().filter_map(named).collect();
    let mut given = BTreeSet::new();
    let mut drives = Vec::new();
    for device in selected {
        if device.device.kind == DeviceKind::VmState {
            drives.push(None);
            continue;
        }
        let own = named(device).filter(|drive| given.insert(drive.clone()));
        let drive = match own {
            Some(drive) => Some(drive),
            None => BUSES
                .iter()
                .filter(|bus| bus.bootable)
                .flat_map(|bus| (0..bus.drives).map(move |number| format!("{}{number}", bus.name)))
                .find(|drive| used.insert(drive.clone())),
        };
        if let Some(drive) = &drive {
            let backup = if drive == "tpmstate0" { "-backup" } else { "" };
            device.name = format!("drive-{drive}{backup}");
        }
        drives.push(drive);
    }
    drives
}

#[cfg(test)]
mod tests {
    use super::*;
    use imgtool_core::Device;

    fn selected(names: &[&str]) -> Vec<SelectedDisk> {
        let one = |name: &&str| SelectedDisk {
            source: 0,
            device: Device::disk(0, "disk", 528 * 1024),
            name: (*name).to_owned(),
        };
        names.iter().map(one).collect()
    }

    #[test]
    fn every_disk_gets_a_drive_line_and_a_map_line() {
        let mut devices = selected(&["web", "drive-scsi0", "efidisk0"]);
        let dest = Path::new("vzdump-qemu-9000-2026_01_02-03_04_05.vma.zst");
        let settings = ["memory=4096".to_owned(), "name=web".to_owned()];
        let config = configure(&settings, &mut devices, Some(dest)).expect("configuration");
        assert_eq!(
            String::from_utf8(config.data).expect("text"),
            "bios: ovmf\n\
             boot: order=scsi1\n\
             efidisk0: local:9000/vm-9000-disk-2.raw,efitype=4m,size=528K\n\
             memory: 4096\n\
             name: web\n\
             scsi0: local:9000/vm-9000-disk-1.raw,size=528K\n\
             scsi1: local:9000/vm-9000-disk-0.raw,size=528K\n\
             scsihw: virtio-scsi-single\n\
             #qmdump#map:scsi1:drive-scsi1:local:raw:\n\
             #qmdump#map:scsi0:drive-scsi0:local:raw:\n\
             #qmdump#map:efidisk0:drive-efidisk0:local:raw:\n"
        );
        assert_eq!(devices[0].name, "drive-scsi1");
        assert_eq!(devices[2].name, "drive-efidisk0");
    }

    #[test]
    fn notes_names_that_qmrestore_refuses() {
        let note = |name: &str, compression| note_on_name(Path::new(name), compression);
        let name = "d/vzdump-qemu-100-2026_11_22-10_03_58.vma";
        assert!(note(name, None).is_none());
        assert!(note(&format!("{name}.zst"), Some(Compression::Zstd)).is_none());
        assert!(note(&format!("{name}.gz"), Some(Compression::Gzip)).is_none());
        // A compressed archive must have the extension of its compression.
        assert!(note(name, Some(Compression::Zstd)).is_some());
        for name in [
            "vm.vma",
            "vzdump-qemu-x-2026_11_22-10_03_58.vma",
            "vzdump-qemu-100.vma",
            "vzdump-qemu-1-2026_11_22-10_03_58.vma.xz",
        ] {
            assert!(note(name, None).is_some(), "{name}");
        }
    }

    #[test]
    fn notes_disks_that_do_not_match_the_map_lines() {
        let config = b"scsi0: local:a\n#qmdump#map:scsi0:drive-scsi0:local:raw:\n";
        assert!(notes_on_map(config, &["drive-scsi0"]).is_empty());
        let notes = notes_on_map(config, &["web"]);
        assert!(notes[0].contains("the device drive-scsi0, which is not in the archive"), "{notes:?}");
        assert!(notes[1].contains("line for the device web"), "{notes:?}");
        assert_eq!(notes.len(), 2);
    }

    #[test]
    fn refuses_settings_that_forge_lines() {
        for bad in ["x", "=1", "a b=1", "name=a\nagent: 1", "A=1"] {
            assert!(configure(&[bad.to_owned()], &mut selected(&["a"]), None).is_err(), "{bad}");
        }
    }
}
