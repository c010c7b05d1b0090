//! Packing disks for Proxmox VE: the configuration that `qmrestore` needs in an archive, and the archive's
//! name.
//!
//! `qmrestore` needs two lines for each disk: a setting (`scsi0: …`), and a comment
//! `#qmdump#map:DRIVE:DEVICE:STORAGE:FORMAT:`, which assigns a device of the archive to the drive.

use std::path::{Path, PathBuf};

use imgtool_core::{Attachment, Device, Error, Machine, Result};
use imgtool_engine::SelectedDisk;
use imgtool_machine::proxmox as dialect;
use imgtool_machine::proxmox::keys::{self, Advice, Wrong};
use imgtool_machine::proxmox::{ANY_VMID, Assignment, MapEntry};

mod name;

pub use imgtool_machine::proxmox::{CONFIG_NAME, FIREWALL_NAME, GuestConfig};
pub use name::{Better, is_for_proxmox, note_on_name, vmid_of_config};

/// Memory of a guest in MiB, if the user states none.
const MEMORY: &str = "2048";

/// The configuration on which a new one is based.
#[derive(Debug)]
pub enum Base {
    /// None: a minimal one is made.
    Nothing,
    /// A file of the user.
    File(PathBuf, GuestConfig, Attachment),
    /// That of a source.
    Source(GuestConfig, Attachment),
    /// The machine of a source or a file that has no configuration of Proxmox VE.
    Machine(dialect::Settings),
}

impl Base {
    /// Converts a machine.
    pub fn of_machine(machine: &Machine) -> Self {
        Self::Machine(dialect::settings(machine))
    }

    fn config(&self) -> GuestConfig {
        match self {
            Self::Nothing => GuestConfig::default(),
            Self::File(_, config, _) | Self::Source(config, _) => config.clone(),
            Self::Machine(settings) => settings.config.clone(),
        }
    }

    /// Returns the assignments of devices that the configuration had in an earlier archive.
    fn map(&self) -> Vec<MapEntry> {
        match self {
            Self::Nothing => Vec::new(),
            Self::File(_, _, bytes) | Self::Source(_, bytes) => {
                dialect::map_entries(&String::from_utf8_lossy(&bytes.data))
            }
            Self::Machine(settings) => settings.map.clone(),
        }
    }

    /// Returns the guest number that the file's name has.
    fn vmid(&self) -> Option<&str> {
        let Self::File(path, ..) = self else { return None };
        vmid_of_config(path)
    }
}

/// A configuration for an archive, and what the user should know of it.
#[derive(Debug)]
pub struct Packed {
    /// The configuration.
    pub config: Attachment,
    /// Notes for the summary.
    pub notes: Vec<String>,
}

/// Makes the configuration of an archive from `base` and the settings that override it, and renames the disks
/// to match. In an archive that the user did not make for Proxmox VE, the disks keep their names. `labels`
/// name the disks in notes; `dest` is the path of the archive, from whose name the guest number is taken.
///
/// # Errors
/// [`imgtool_core::ErrorKind::Usage`] for a setting that Proxmox VE does not take, or one that is given
/// twice.
pub fn pack(
    base: &Base,
    settings: &[String],
    disks: &mut [SelectedDisk],
    labels: &[String],
    dest: Option<&Path>,
) -> Result<Packed> {
    let mut config = base.config();
    let overrides = parse(settings)?;
    let old_map = base.map();
    if let (Base::File(path, _, bytes), true) = (base, overrides.is_empty())
        && is_complete(&old_map, disks)
    {
        // The file comes from an archive with these disks: it stays as it is.
        let mut notes = vec![format!("{CONFIG_NAME}: {} as it is", path.display())];
        notes.extend(wrong_values(&config, &[]));
        return Ok(Packed { config: Attachment { name: CONFIG_NAME.to_owned(), ..bytes.clone() }, notes });
    }
    for (key, value) in &overrides {
        config.set(key, value);
    }
    let file_name = dest.and_then(Path::file_name).and_then(|name| name.to_str());
    let vmid = file_name.and_then(name::vmid_of).or_else(|| base.vmid()).unwrap_or(ANY_VMID);
    let mut devices: Vec<Device> = disks.iter().map(device).collect();
    let found = dialect::assign(&config, &old_map, &devices);
    refuse_unclear(&found, labels)?;
    let mut notes = notes(base, &overrides, &config, &found, labels);
    notes.extend(doubts(&config, &found, disks, labels));
    found.without_disk.iter().for_each(|drive| config.remove(drive));
    let is_for_guest = !matches!(base, Base::Nothing) || !overrides.is_empty();
    // A colon ends a name in a map line.
    let has_colon = disks.iter().any(|disk| disk.name.contains(':'));
    let renames = is_for_guest || has_colon || dest.is_some_and(is_for_proxmox);
    let map = dialect::add_drives(&mut config, &found, &mut devices, vmid, renames);
    check_boot(&config, &overrides)?;
    for (disk, device) in disks.iter_mut().zip(devices) {
        disk.name = device.name;
    }
    if matches!(base, Base::Nothing) {
        add_defaults(&mut config, &map);
    }
    let data = config.text(&map).into_bytes();
    Ok(Packed { config: Attachment { name: CONFIG_NAME.to_owned(), data }, notes })
}

/// Refuses a boot order of `--proxmox` with a device that the guest does not have.
fn check_boot(config: &GuestConfig, overrides: &[(String, String)]) -> Result<()> {
    let order =
        overrides.iter().find(|(key, _)| key == "boot").and_then(|(_, value)| value.strip_prefix("order="));
    let missing = order.and_then(|order| order.split(';').find(|name| config.get(name).is_none()));
    let Some(missing) = missing else { return Ok(()) };
    let drives: Vec<&str> =
        config.settings().map(|(key, _)| key).filter(|key| dialect::is_bootable(key)).collect();
    Err(Error::usage(format!("--proxmox boot: the guest has no {missing}"))
        .hint(format!("its drives are {}", drives.join(", "))))
}

/// Refuses disks of which nobody knows what drive they are. A wrong one boots nothing, and is found out only after the
/// guest was restored.
fn refuse_unclear(found: &Assignment, labels: &[String]) -> Result<()> {
    let label = |index: usize| labels.get(index).map_or("a disk", |label| &**label);
    let Some(first) = found.unclear.first() else { return Ok(()) };
    let drives = found.drives.iter().enumerate();
    let names: Vec<String> =
        drives.filter_map(|(index, drive)| Some(format!("{}={}", drive.as_ref()?, label(index)))).collect();
    Err(Error::usage(format!(
        "{}: by name and size it is none of the drives of the configuration that are left",
        label(*first)
    ))
    .hint(format!("say which drive each file is, for example {}", names.join(" "))))
}

/// Returns a note for each disk that is hardly the drive that its name or the order gives it.
fn doubts(
    config: &GuestConfig,
    found: &Assignment,
    disks: &[SelectedDisk],
    labels: &[String],
) -> Vec<String> {
    let of_disk = |((drive, disk), label): ((&Option<String>, &SelectedDisk), &String)| {
        let drive = drive.as_ref()?;
        let why = dialect::doubt(config, drive, disk.device.size)?;
        Some(format!("is {drive} really {label}? {why}"))
    };
    found.drives.iter().zip(disks).zip(labels).filter_map(of_disk).collect()
}

/// Returns a disk as the device of the archive.
fn device(disk: &SelectedDisk) -> Device {
    Device { name: disk.name.clone(), ..disk.device.clone() }
}

/// True if the assignments of an earlier archive name exactly these disks.
fn is_complete(map: &[MapEntry], disks: &[SelectedDisk]) -> bool {
    let disks: Vec<&str> =
        disks.iter().filter(|disk| dialect::is_disk(&disk.device)).map(|disk| &*disk.name).collect();
    !map.is_empty()
        && map.len() == disks.len()
        && map.iter().all(|entry| disks.contains(&entry.device.as_str()))
}

/// Adds what a guest needs to start from its disks.
fn add_defaults(config: &mut GuestConfig, map: &[MapEntry]) {
    let drives = || map.iter().map(|entry| &*entry.drive);
    if let Some(disk) = drives().find(|drive| dialect::is_bootable(drive)) {
        config.set_default("boot", &format!("order={disk}"));
    }
    if drives().any(|drive| drive.starts_with("scsi")) {
        config.set_default("scsihw", "virtio-scsi-single");
    }
    if drives().any(|drive| drive == "efidisk0") {
        config.set_default("bios", "ovmf");
    }
    config.set_default("memory", MEMORY);
}

/// Words where the configuration comes from, and what it does not hold.
fn notes(
    base: &Base,
    overrides: &[(String, String)],
    config: &GuestConfig,
    found: &Assignment,
    labels: &[String],
) -> Vec<String> {
    let origin = match base {
        Base::Nothing => "a minimal one".to_owned(),
        Base::File(path, ..) => format!("from {}", path.display()),
        Base::Source(..) => "that of the source".to_owned(),
        Base::Machine(_) => "made from the description of the machine".to_owned(),
    };
    let keys: Vec<&str> = overrides.iter().map(|(key, _)| &**key).collect();
    let with =
        if keys.is_empty() { String::new() } else { format!(" with {} of --proxmox", keys.join(", ")) };
    let pairs = found.drives.iter().zip(labels);
    let pairs: Vec<String> =
        pairs.filter_map(|(drive, label)| Some(format!("{} is {label}", drive.as_ref()?))).collect();
    let mut notes = vec![format!("{CONFIG_NAME}: {origin}{with}; {}", pairs.join(", "))];
    if matches!(base, Base::Nothing) && overrides.is_empty() {
        notes.push(format!(
            "{MEMORY} MiB of memory, no network: --config FILE takes the guest's own configuration, \
             --proxmox net0=virtio,bridge=vmbr0 sets a value"
        ));
    }
    if let Base::Machine(settings) = base {
        notes.extend(settings.lost.iter().map(|line| format!("{CONFIG_NAME} lacks {line}")));
    }
    if !config.left_out.is_empty() {
        notes.push(format!("not part of a backup, left out: {}", config.left_out.join(", ")));
    }
    if !found.without_disk.is_empty() {
        let missing = found.without_disk.join(", ");
        notes.push(format!(
            "no disk for {missing}: left out of the configuration; {}=PATH adds a disk",
            found.without_disk[0]
        ));
    }
    if !config.unknown.is_empty() {
        notes.push(format!("unknown to Proxmox VE 9, kept: {}", config.unknown.join(", ")));
    }
    notes.extend(wrong_values(config, &keys));
    notes
}

/// Returns a note on the values of a configuration that Proxmox VE does not take, except those of the `replaced` keys.
fn wrong_values(config: &GuestConfig, replaced: &[&str]) -> Option<String> {
    let is_replaced = |line: &str| replaced.iter().any(|key| line.starts_with(&format!("{key} (")));
    let wrong: Vec<&str> =
        config.wrong.iter().map(|line| &**line).filter(|line| !is_replaced(line)).collect();
    let list = wrong.join("; ");
    (!wrong.is_empty()).then(|| format!("not valid in Proxmox VE 9, which may drop them, kept: {list}"))
}

/// Returns notes on disks without a map line in the configuration, and on map lines without a disk.
pub fn notes_on_map(config: &[u8], disks: &[&str]) -> Vec<String> {
    let mapped = dialect::map_entries(&String::from_utf8_lossy(config));
    let missing = mapped.iter().filter(|entry| !disks.contains(&entry.device.as_str())).map(|entry| {
        let MapEntry { drive, device, .. } = entry;
        format!(
            "{CONFIG_NAME} says that {drive} is the device {device}, which is not in the archive: qmrestore \
             will refuse it; --proxmox KEY=VALUE, or --config, rewrites it"
        )
    });
    let is_mapped = |disk: &&&str| mapped.iter().any(|entry| entry.device == **disk);
    let unmapped = disks.iter().filter(|disk| !is_mapped(disk)).map(|disk| {
        format!(
            "{CONFIG_NAME} has no {} line for the device {disk}: qmrestore will not restore it (--proxmox \
             writes such lines)",
            dialect::MAP_LINE
        )
    });
    missing.chain(unmapped).collect()
}

/// Checks the values of `--proxmox`.
///
/// # Errors
/// [`imgtool_core::ErrorKind::Usage`] for a setting that Proxmox VE does not take, or one that is given
/// twice.
pub fn check(settings: &[String]) -> Result<()> {
    parse(settings).map(drop)
}

/// Parses and checks the values of `--proxmox`.
fn parse(settings: &[String]) -> Result<Vec<(String, String)>> {
    let mut pairs: Vec<(String, String)> = Vec::new();
    for setting in settings {
        let wrong = |what: &str| Error::usage(format!("--proxmox '{setting}': {what}"));
        let (key, value) = setting.split_once('=').ok_or_else(|| {
            wrong("expected KEY=VALUE").hint("for example --proxmox memory=4096 --proxmox name=web")
        })?;
        if value.chars().any(char::is_control) {
            return Err(wrong("the value holds a control character"));
        }
        keys::check(key, value).map_err(|found| wrong(&found.what).hint(advice(&found)))?;
        if pairs.iter().any(|(known, _)| known == key) {
            return Err(wrong("the key is given twice"));
        }
        pairs.push((key.to_owned(), value.to_owned()));
    }
    Ok(pairs)
}

/// Words what to give instead of a wrong setting.
fn advice(wrong: &Wrong) -> String {
    let meant = wrong.meant.as_ref().map(|meant| format!("--proxmox {meant}; ")).unwrap_or_default();
    match &wrong.advice {
        Advice::Text(text) => format!("{meant}{text}"),
        Advice::Example(example) => format!("{meant}for example --proxmox {example}"),
    }
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

    fn text(packed: Packed) -> String {
        String::from_utf8(packed.config.data).expect("text")
    }

    fn file(name: &str, content: &str) -> Base {
        let config = GuestConfig::parse(content).expect("a configuration");
        let data = content.as_bytes().to_vec();
        Base::File(PathBuf::from(name), config, Attachment { name: name.to_owned(), data })
    }

    #[test]
    fn every_disk_gets_a_drive_line_and_a_map_line() {
        let mut disks = selected(&["web", "drive-scsi0", "efidisk0"]);
        let dest = Path::new("vzdump-qemu-9000-2026_01_02-03_04_05.vma.zst");
        let settings = ["memory=4096".to_owned(), "name=web".to_owned()];
        let packed = pack(&Base::Nothing, &settings, &mut disks, &[], Some(dest)).expect("configuration");
        assert_eq!(
            text(packed),
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
        assert_eq!(disks[0].name, "drive-scsi1");
        assert_eq!(disks[2].name, "drive-efidisk0");
    }

    #[test]
    fn disks_of_other_archives_keep_their_names() {
        for (name, kept) in [("web", "web"), ("a:b", "drive-scsi0")] {
            let mut disks = selected(&[name]);
            let dest = Path::new("my.vma");
            let packed = pack(&Base::Nothing, &[], &mut disks, &[], Some(dest)).expect("configuration");
            assert_eq!(disks[0].name, kept);
            assert!(text(packed).ends_with(&format!("#qmdump#map:scsi0:{kept}:local:raw:\n")));
        }
    }

    #[test]
    fn plain_configuration_becomes_that_of_a_backup() {
        let plain = "boot: order=scsi0\nide2: none,media=cdrom\nlock: backup\nmemory: 2048\nname: web\n\
            scsi0: local-lvm:vm-105-disk-0,size=32G\nscsi1: local-lvm:vm-105-disk-1,size=1G\n\
            unused0: local-lvm:vm-105-disk-7\n[before]\nmemory: 512\n";
        let mut disks = selected(&["root"]);
        let settings = ["memory=4096".to_owned()];
        let labels = ["root.qcow2".to_owned()];
        let packed =
            pack(&file("105.conf", plain), &settings, &mut disks, &labels, None).expect("configuration");
        let notes = packed.notes.join("\n");
        for part in [
            "from 105.conf with memory of --proxmox; scsi0 is root.qcow2",
            "left out: lock (backup), unused0 (local-lvm:vm-105-disk-7), snapshot before",
            "no disk for scsi1",
        ] {
            assert!(notes.contains(part), "{notes}");
        }
        assert_eq!(
            text(packed),
            "boot: order=scsi0\nide2: none,media=cdrom\nmemory: 4096\nname: web\n\
             scsi0: local-lvm:vm-105-disk-0,size=32G\n#qmdump#map:scsi0:drive-scsi0:local-lvm:raw:\n"
        );
        assert_eq!(disks[0].name, "drive-scsi0");
    }

    #[test]
    fn configuration_of_the_same_disks_stays_as_it_is() {
        let old = "#x\n\nscsi0: local:a\n\n#qmdump#map:scsi0:web::raw:\n";
        let mut disks = selected(&["web"]);
        let packed = pack(&file("x.conf", old), &[], &mut disks, &[], None).expect("configuration");
        assert_eq!(text(packed), old);
        assert_eq!(disks[0].name, "web");
        // With a change, the old assignment tells the drive.
        let settings = ["memory=64".to_owned()];
        let packed = pack(&file("x.conf", old), &settings, &mut disks, &[], None).expect("configuration");
        assert!(text(packed).ends_with("#qmdump#map:scsi0:drive-scsi0:local:raw:\n"));
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
        for bad in ["x", "=1", "a b=1", "name=a\nagent: 1", "A=1", "memory=1\u{1b}"] {
            let packed = pack(&Base::Nothing, &[bad.to_owned()], &mut selected(&["a"]), &[], None);
            assert!(packed.is_err(), "{bad}");
        }
    }
}
