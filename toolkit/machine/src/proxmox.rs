//! The configuration of a Proxmox VE guest, `qemu-server.conf` in an archive (qm.conf(5)).
//!
//! `qmrestore` needs two lines for each disk: a setting (`scsi0: …`), and a comment
//! `#qmdump#map:DRIVE:DEVICE:STORAGE:FORMAT:`, which assigns a device of the archive to the drive.

mod config;
mod drives;
pub mod keys;
mod parse;
mod print;
#[cfg(test)]
mod tests;

use imgtool_core::Device;

pub use config::{GuestConfig, MAP_LINE, MapEntry, map_entries};
pub use drives::{Assignment, assign, doubt, is_bootable, is_disk};
pub use parse::parse;
pub use print::{Settings, for_archive, settings};

/// Name of the guest's configuration in an archive.
pub const CONFIG_NAME: &str = "qemu-server.conf";

/// Name of the guest's firewall rules in an archive.
pub const FIREWALL_NAME: &str = "qemu-server.fw";

/// Name of the storage in the volume names of new disk lines. Every node has this storage; `qmrestore
/// --storage` replaces it.
const ANY_STORAGE: &str = "local";

/// Guest number (VMID) in the volume names of new disk lines, if no name tells it. `qmrestore` replaces it.
pub const ANY_VMID: &str = "100";

/// Renames the disks after their drives if `renames` is set, and adds the lines of new drives. Returns the
/// assignments.
pub fn add_drives(
    config: &mut GuestConfig,
    found: &Assignment,
    disks: &mut [Device],
    vmid: &str,
    renames: bool,
) -> Vec<MapEntry> {
    let mut map = Vec::new();
    for (index, (drive, disk)) in found.drives.iter().zip(disks).enumerate() {
        let Some(drive) = drive else { continue };
        if renames {
            disk.name = drives::device_name(drive);
        }
        if config.get(drive).is_none_or(|line| !drives::holds_disk(line)) {
            let extra = match drive.as_str() {
                "efidisk0" => ",efitype=4m",
                "tpmstate0" => ",version=v2.0",
                _ => "",
            };
            let size = disk.size.div_ceil(1024);
            let volume = format!("{ANY_STORAGE}:{vmid}/vm-{vmid}-disk-{index}.raw");
            config.set(drive, &format!("{volume}{extra},size={size}K"));
        }
        let (storage, format) = drives::storage_and_format(config.get(drive).unwrap_or_default());
        map.push(MapEntry {
            drive: drive.clone(),
            device: disk.name.clone(),
            storage: storage.to_owned(),
            format: format.to_owned(),
        });
    }
    map
}
